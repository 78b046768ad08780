//! The output of machines with high availability. A node that fetches a checkpoint also fetches the
//! machine's output up to it, so that the output of a machine that is restarted there is whole but
//! for what the failure undid. It is kept beside the checkpoints, in the format of the machine's own
//! log:
//!
//! ```text
//!   replicas/output/MACHINE/CREATED/log.BASE
//! ```

use super::super::handle::{Checkpoints, open};
use crate::logs::LOG;
use crate::state_dir::StateDir;
use keel_cluster::{MachineName, NodeName};
use keel_machine::checkpoint::Origin;
use keel_machine::log::{Log, next_life};
use keel_machine::spec::Record;
use keel_machine::worker::control::{LogChunk, pack, unpack};
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// The folder of the output of all lives of all machines with a name.
pub(super) fn of_machine(dir: &StateDir, machine: &MachineName) -> PathBuf {
    all(dir).join(machine.as_str())
}

/// The folder with the output of all machines.
pub(super) fn all(dir: &StateDir) -> PathBuf {
    dir.replicas().join("output")
}

impl Checkpoints {
    /// Fetches the output of the machine that was created then, up to an offset.
    ///
    /// # Errors
    /// If not all of it is durably here.
    pub(super) async fn fetch_output(
        &self,
        owner: &NodeName,
        machine: &MachineName,
        created_unix_ms: u64,
        end: u64,
    ) -> Result<(), String> {
        // An earlier request may still be at it, given up by the owner.
        let _copying = Copying::begin(&self.copied, machine)?;
        let folders = of_machine(&self.context.dir, machine);
        let created = created_unix_ms.to_string();
        let opened = tokio::task::spawn_blocking(move || open_copy(&folders, &created)).await;
        let opened = opened.map_err(|error| error.to_string())?;
        let log = opened.map_err(|error| format!("its output: {error}"))?;
        if log.end() >= end {
            return Ok(());
        }
        let question = (machine, log.end(), false);
        let question = pack(&question).map_err(|error| error.to_string())?;
        let stream = self.context.peers.stream(owner, LOG, question).await;
        let mut stream = stream.map_err(|error| error.to_string())?;
        let (send, pieces) = mpsc::channel(4);
        let writing = tokio::task::spawn_blocking(move || write(&log, end, pieces));
        let mut lost = None;
        while let Some(piece) = stream.recv().await {
            let chunk = piece.and_then(|piece| unpack::<LogChunk>(&piece));
            match chunk {
                Ok(chunk) => {
                    let is_last =
                        chunk.bytes.is_empty() || chunk.offset + chunk.bytes.len() as u64 >= end;
                    // A writer that failed says why below.
                    if send.send(chunk).await.is_err() || is_last {
                        break;
                    }
                }
                Err(error) => {
                    lost = Some(error.to_string());
                    break;
                }
            }
        }
        drop(send);
        let written = writing.await.map_err(|error| error.to_string())?;
        match lost {
            Some(error) => Err(format!("its output: {error}")),
            None => written.map_err(|error| format!("its output: {error}")),
        }
    }

    /// Puts the output of a machine whose node failed where its new worker continues it: up to the
    /// checkpoint from which it is restarted, if this node has it. What follows begins at offsets
    /// that were never used, so that whoever follows the output sees all of it.
    ///
    /// # Errors
    /// If it cannot be put there, in a sentence.
    pub(crate) async fn place_output(
        &self,
        record: &Record,
        origin: Option<&Origin>,
    ) -> Result<(), String> {
        let end = match origin {
            Some(Origin {
                repository,
                machine,
                id: Some(id),
                ..
            }) => {
                let repository = open(repository.clone()).await;
                let repository = repository.map_err(|error| error.to_string())?;
                let manifest = repository.manifest(machine, id).await;
                manifest.map_err(|error| error.to_string())?.log_end
            }
            _ => 0,
        };
        let folders = of_machine(&self.context.dir, &record.name);
        let copy = folders.join(record.created_unix_ms.to_string());
        let worker = self.context.dir.worker(&record.name);
        let placed = tokio::task::spawn_blocking(move || place(&copy, &worker, end)).await;
        let placed = placed.map_err(|error| error.to_string())?;
        placed.map_err(|error| format!("its output up to the checkpoint: {error}"))
    }
}

/// Marks the output of a machine as being copied, until it is dropped: two at once would cut what
/// the other one writes.
struct Copying<'a> {
    copied: &'a Mutex<HashSet<MachineName>>,
    machine: &'a MachineName,
}

impl<'a> Copying<'a> {
    fn begin(
        copied: &'a Mutex<HashSet<MachineName>>,
        machine: &'a MachineName,
    ) -> Result<Self, String> {
        let mut all = copied.lock().unwrap_or_else(PoisonError::into_inner);
        match all.insert(machine.clone()) {
            true => Ok(Self { copied, machine }),
            false => Err("its output is being copied already".into()),
        }
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        let mut all = self.copied.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(self.machine);
    }
}

/// The copy of the output of the machine that was created then; those of others that had its name
/// go. Blocking.
fn open_copy(folders: &Path, created: &str) -> io::Result<Arc<Log>> {
    std::fs::create_dir_all(folders)?;
    for entry in std::fs::read_dir(folders)? {
        let entry = entry?;
        if entry.file_name() != created {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Log::open(&folders.join(created), 0).map(Arc::new)
}

/// Adds pieces up to an offset. Blocking.
fn write(log: &Log, end: u64, mut pieces: mpsc::Receiver<LogChunk>) -> io::Result<()> {
    while let Some(LogChunk { offset, bytes }) = pieces.blocking_recv() {
        if bytes.is_empty() || offset >= end {
            continue;
        }
        // Output that is kept nowhere any more.
        log.begin_at(offset)?;
        let wanted = usize::try_from(end - offset).unwrap_or(usize::MAX);
        log.write_at(offset, &bytes[..wanted.min(bytes.len())])?;
    }
    match log.end() {
        found if found >= end => log.sync(),
        found => Err(io::Error::other(format!(
            "it broke off at {found} of {end} bytes"
        ))),
    }
}

/// Makes the log in a worker's folder of the copy, up to `end` and open for the next life. Blocking.
fn place(copy: &Path, worker: &Path, end: u64) -> io::Result<()> {
    let entries = match std::fs::read_dir(copy) {
        Ok(entries) => Some(entries),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    for entry in entries.into_iter().flatten() {
        let entry = entry?;
        std::fs::copy(entry.path(), worker.join(entry.file_name()))?;
    }
    let log = Log::open(worker, end)?;
    log.cut(end)?;
    log.begin_at(next_life(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::log::{LIFE_BYTES, StreamKind};

    fn all_of(log: &Log) -> Vec<u8> {
        let (mut all, mut at) = (Vec::new(), 0);
        while let (offset, bytes) = log.read(at, 1 << 20).unwrap()
            && !bytes.is_empty()
        {
            at = offset + bytes.len() as u64;
            all.extend(bytes);
        }
        all
    }

    #[test]
    fn the_output_of_a_machine_is_copied_once_at_a_time() {
        let copied = Mutex::default();
        let (m, n) = ("m".parse().unwrap(), "n".parse().unwrap());
        let first = Copying::begin(&copied, &m).unwrap();
        assert!(Copying::begin(&copied, &m).is_err());
        assert!(Copying::begin(&copied, &n).is_ok());
        drop(first);
        assert!(Copying::begin(&copied, &m).is_ok());
    }

    #[test]
    fn output_comes_along_up_to_the_checkpoint_and_goes_on_behind_a_gap() {
        let folder = tempfile::tempdir().unwrap();
        let (copies, worker) = (folder.path().join("m"), folder.path().join("worker"));
        let source = Log::open(&folder.path().join("source"), 0).unwrap();
        let mut ends = Vec::new();
        for line in [&b"one\n"[..], b"two\n", b"three\n"] {
            source.append(StreamKind::Output, line).unwrap();
            ends.push(source.end());
        }
        let send = |from: u64, end: u64| {
            let log = open_copy(&copies, "7").unwrap();
            let (send, pieces) = mpsc::channel(4);
            let (offset, bytes) = source.read(from, 1 << 20).unwrap();
            send.blocking_send(LogChunk { offset, bytes }).unwrap();
            drop(send);
            write(&log, end, pieces).map(|()| log.end())
        };
        assert_eq!(send(0, ends[0]).unwrap(), ends[0]);
        assert_eq!(send(ends[0], ends[1]).unwrap(), ends[1]);
        // What was copied twice is there once, and what is lacking is no success.
        assert_eq!(send(0, ends[1]).unwrap(), ends[1]);
        assert!(send(ends[1], ends[2] + 1).is_err());
        // The third line came, but the checkpoint is of before it.
        std::fs::create_dir(&worker).unwrap();
        place(&copies.join("7"), &worker, ends[1]).unwrap();
        let placed = Log::open(&worker, 0).unwrap();
        assert_eq!(placed.end(), LIFE_BYTES);
        let kept = source.read(0, ends[1] as usize).unwrap().1;
        assert_eq!(all_of(&placed), kept);
        placed.append(StreamKind::Output, b"new\n").unwrap();
        assert_eq!(placed.read(ends[2], 99).unwrap().0, LIFE_BYTES);
        // Another machine gets the name.
        assert_eq!(open_copy(&copies, "8").unwrap().end(), 0);
        assert!(!copies.join("7").exists());
        // Without a copy only the offsets are kept apart.
        let bare = folder.path().join("bare");
        std::fs::create_dir(&bare).unwrap();
        place(&copies.join("absent"), &bare, ends[2]).unwrap();
        assert_eq!(Log::open(&bare, 0).unwrap().end(), LIFE_BYTES);
    }
}
