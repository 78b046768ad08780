//! The output of machines with high availability. A node that fetches a checkpoint also fetches the
//! machine's output up to it, so that the output of a machine that is restarted there is whole but
//! for what the failure undid. It is kept beside the checkpoints, in the format of the machine's own
//! log:
//!
//! ```text
//!   replicas/output/MACHINE/CREATED/log.BASE          readers see all output at once
//!   replicas/output/MACHINE/CREATED-LIFE/log.BASE     output is held back (ha: protect)
//! ```
//!
//! Where readers see all output at once, an offset is never used again: output of the next life
//! begins far behind. Where it is held back, the next life continues at its checkpoint, so that
//! readers see neither a gap nor a line twice; a copy of an earlier life may differ behind that
//! checkpoint, and is dropped.

use super::super::handle::{Checkpoints, open};
use crate::logs::{LOG, WHOLE_LOG, send_left};
use crate::records::{self, HeldOutput};
use crate::state_dir::StateDir;
use keel_cluster::{MachineName, NodeName};
use keel_machine::checkpoint::Origin;
use keel_machine::log::{Log, next_life};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{LogChunk, pack, unpack};
use keel_net::Bytes;
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// Request between agents: `(machine, folder, from)` → stream of [`LogChunk`], of a node's copy of a
/// machine's output.
pub(crate) const COPIED_LOG: u16 = 0x0354;

/// The folder of the output of all lives of all machines with a name.
pub(super) fn of_machine(dir: &StateDir, machine: &MachineName) -> PathBuf {
    all(dir).join(machine.as_str())
}

/// The folder with the output of all machines.
pub(super) fn all(dir: &StateDir) -> PathBuf {
    dir.replicas().join("output")
}

/// Which of the outputs that a machine's name had.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutputLife {
    /// When the machine was created, in milliseconds since 1970-01-01 UTC.
    pub(super) created_unix_ms: u64,
    /// When its life began, if the output is held back.
    pub(super) held_unix_ms: Option<u64>,
}

impl OutputLife {
    /// The name of the folder with its copy.
    fn folder(self) -> String {
        match self.held_unix_ms {
            Some(life) => format!("{}-{life}", self.created_unix_ms),
            None => self.created_unix_ms.to_string(),
        }
    }
}

impl Checkpoints {
    /// Fetches the output of a machine's life up to an offset.
    ///
    /// # Errors
    /// If not all of it is durably here.
    pub(super) async fn fetch_output(
        &self,
        owner: &NodeName,
        machine: &MachineName,
        life: OutputLife,
        end: u64,
    ) -> Result<(), String> {
        // An earlier request may still be at it, given up by the owner.
        let _copying = Copying::begin(&self.copied, machine)?;
        let folders = of_machine(&self.context.dir, machine);
        let kept = match tokio::fs::try_exists(folders.join(life.folder())).await {
            Ok(true) => Vec::new(),
            // As long as the set names a checkpoint of a former life, its output is needed.
            _ => self.needed_output(machine, life).await?,
        };
        let folder = life.folder();
        let opened = tokio::task::spawn_blocking(move || open_copy(&folders, &folder, &kept)).await;
        let opened = opened.map_err(|error| error.to_string())?;
        let log = opened.map_err(|error| format!("its output: {error}"))?;
        if log.end() >= end {
            return Ok(());
        }
        let question = (machine, log.end(), false);
        let question = pack(&question).map_err(|error| error.to_string())?;
        let kind = match life.held_unix_ms {
            Some(_) => WHOLE_LOG,
            None => LOG,
        };
        self.take_output(owner, kind, question, log, end).await
    }

    /// Asks a node for output, and writes it to a log up to an offset.
    async fn take_output(
        &self,
        from: &NodeName,
        kind: u16,
        question: Bytes,
        log: Arc<Log>,
        end: u64,
    ) -> Result<(), String> {
        let stream = self.context.peers.bulk_stream(from, kind, question).await;
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

    /// Fetches the copy of a life's output from a node that has one. Returns its folder here.
    async fn fetch_copy(
        &self,
        machine: &MachineName,
        life: OutputLife,
        end: u64,
        members: &BTreeSet<NodeName>,
    ) -> Result<PathBuf, String> {
        let _copying = Copying::begin(&self.copied, machine)?;
        let folders = of_machine(&self.context.dir, machine);
        let folder = folders.join(life.folder());
        let mut failures = Vec::new();
        for member in members.iter().filter(|node| **node != self.context.name) {
            let (folders, name) = (folders.clone(), life.folder());
            let opened = tokio::task::spawn_blocking(move || open_copy(&folders, &name, &[])).await;
            let opened = opened.map_err(|error| error.to_string())?;
            let log = opened.map_err(|error| error.to_string())?;
            let question = pack(&(machine, life.folder(), log.end()));
            let question = question.map_err(|error| error.to_string())?;
            match self
                .take_output(member, COPIED_LOG, question, log, end)
                .await
            {
                Ok(()) => return Ok(folder),
                Err(error) => failures.push(format!("{member}: {error}")),
            }
        }
        Err(failures.join("; "))
    }

    /// Sends this node's copy of a life's output, from an offset on.
    pub(crate) async fn send_copy(
        &self,
        machine: &MachineName,
        folder: &str,
        from: u64,
    ) -> Result<mpsc::Receiver<Bytes>, String> {
        let is_name = |text: &str| text.bytes().all(|it| it.is_ascii_digit() || it == b'-');
        if !is_name(folder) {
            return Err(format!("{folder:?} is no output of a machine"));
        }
        let folder = of_machine(&self.context.dir, machine).join(folder);
        let (send, chunks) = mpsc::channel(16);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_left(&folder, from, true, &send) {
                tracing::warn!(%error, "cannot read the copy of an output");
            }
        });
        Ok(chunks)
    }

    /// The folder with the output of the life that the in-sync set's checkpoint is of.
    async fn needed_output(
        &self,
        machine: &MachineName,
        life: OutputLife,
    ) -> Result<Vec<String>, String> {
        let set = records::in_sync_set(&*self.context.store, machine).await;
        let set = set.map_err(|error| error.to_string())?;
        let former = set.map(|(set, _)| OutputLife {
            held_unix_ms: set.held_output.map(|held| held.life_unix_ms),
            ..life
        });
        Ok(former.map(OutputLife::folder).into_iter().collect())
    }

    /// Makes a machine's output ready for its new worker: with what is known of an earlier life, up
    /// to the checkpoint from which the next one begins (`origin`; `is_kept` if that is the in-sync
    /// set's), and held back from there on if the spec says so.
    ///
    /// # Errors
    /// If it cannot be put there, in a sentence.
    pub(crate) async fn place_output(
        &self,
        record: &Record,
        origin: Option<&Origin>,
        is_kept: bool,
    ) -> Result<(), String> {
        let worker = self.context.dir.worker(&record.name);
        let ha = record.spec.ha.as_ref();
        let holds = ha.is_some_and(|ha| ha.protects_output());
        let set = match is_kept {
            true => records::in_sync_set(&*self.context.store, &record.name)
                .await
                .map_err(|error| error.to_string())?
                .map(|(set, _)| set),
            false => None,
        };
        let held = set.as_ref().and_then(|set| set.held_output);
        let life = OutputLife {
            created_unix_ms: record.created_unix_ms,
            held_unix_ms: held.map(|held| held.life_unix_ms),
        };
        let is_moved = matches!(
            record.status,
            Status::Restarting {
                elsewhere: true,
                ..
            }
        );
        let was_held = tokio::fs::try_exists(Log::hold_file(&worker)).await;
        if !is_moved && !holds && held.is_none() && matches!(was_held, Ok(false)) {
            // The worker goes on with what is there.
            return Ok(());
        }
        let end = match origin {
            Some(Origin {
                repository,
                machine,
                id: Some(id),
                is_clone: false,
                ..
            }) => {
                let repository = open(repository.clone()).await;
                let repository = repository.map_err(|error| error.to_string())?;
                let manifest = repository.manifest(machine, id).await;
                manifest.map_err(|error| error.to_string())?.log_end
            }
            _ => 0,
        };
        let (from_checkpoint, elsewhere) = match record.status {
            Status::Restarting {
                from_checkpoint,
                elsewhere,
                ..
            } => (from_checkpoint, elsewhere),
            _ => (false, false),
        };
        let mut copy =
            elsewhere.then(|| of_machine(&self.context.dir, &record.name).join(life.folder()));
        if let Some((set, held)) = set.as_ref().zip(held) {
            let there = copy.clone().unwrap_or_else(|| worker.clone());
            let end = tokio::task::spawn_blocking(move || Log::open_read_only(&there)).await;
            let end = end.map_err(|error| error.to_string())?;
            // This node never had a copy, or lost some of it with its power.
            if end.map_or(0, |log| log.end()) < held.end {
                match self
                    .fetch_copy(&record.name, life, held.end, &set.members)
                    .await
                {
                    Ok(folder) => copy = Some(folder),
                    Err(error) => {
                        tracing::warn!(machine = %record.name, error, "its earlier output is not here");
                    }
                }
            }
        }
        let before = Before {
            copy,
            end,
            held,
            is_undone: from_checkpoint,
            is_safe: set.is_some_and(|set| set.members.len() > 1),
            failovers: record.failovers,
        };
        let placed = tokio::task::spawn_blocking(move || place(&before, &worker, holds)).await;
        let placed = placed.map_err(|error| error.to_string())?;
        placed.map_err(|error| format!("its output up to the checkpoint: {error}"))
    }
}

/// The output of a machine's former lives.
struct Before {
    /// This node's copy of it, if the machine was on another node.
    copy: Option<PathBuf>,
    /// Where it ended at the checkpoint from which the machine is started.
    end: u64,
    held: Option<HeldOutput>,
    /// Whether work of the last life is done again.
    is_undone: bool,
    /// Whether another node has the checkpoint.
    is_safe: bool,
    /// How often the machine's node failed.
    failovers: u32,
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

/// The copy of the output in a folder; where it is new, other folders go, but for those that are
/// kept. Blocking.
fn open_copy(folders: &Path, folder: &str, kept: &[String]) -> io::Result<Arc<Log>> {
    let path = folders.join(folder);
    if !path.exists() {
        std::fs::create_dir_all(folders)?;
        for entry in std::fs::read_dir(folders)? {
            let entry = entry?;
            if !kept.iter().any(|kept| entry.file_name() == kept.as_str()) {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
    }
    Log::open(&path, 0).map(Arc::new)
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

/// Makes the log in a worker's folder ready for the next life. Blocking.
fn place(before: &Before, worker: &Path, holds: bool) -> io::Result<()> {
    let seen = Log::open_read_only(worker)?.held_from();
    if holds && seen.is_none() {
        // Before there is anything that could be seen.
        Log::hold_before(worker, 0)?;
    }
    if let Some(copy) = &before.copy {
        for entry in std::fs::read_dir(worker)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("log.") {
                std::fs::remove_file(entry.path())?;
            }
        }
        let entries = match std::fs::read_dir(copy) {
            Ok(entries) => Some(entries),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        for entry in entries.into_iter().flatten() {
            let entry = entry?;
            std::fs::copy(entry.path(), worker.join(entry.file_name()))?;
        }
    }
    let log = Log::open(worker, before.end)?;
    match (before.held, &before.copy) {
        // Nothing behind it was seen.
        (Some(held), _) => {
            log.cut(held.end)?;
            log.begin_at(held.end)?;
        }
        (None, Some(_)) => {
            log.cut(before.end)?;
            log.begin_at(next_life(before.end, before.failovers))?;
        }
        (None, None) => {
            if let Some(seen) = seen.filter(|_| before.is_undone) {
                log.cut(seen)?;
            }
        }
    }
    match (holds, log.held_from()) {
        // What no other node can bring back is shown when one can.
        (true, _) => match seen.filter(|_| before.held.is_some() && !before.is_safe) {
            Some(seen) => log.hold_from(seen.min(log.end())),
            None => log.hold_from(log.end()),
        },
        (false, Some(_)) => log.end_hold(),
        (false, None) => Ok(()),
    }
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
            let log = open_copy(&copies, "7", &[]).unwrap();
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
        let restarted = |copy: PathBuf, end| Before {
            copy: Some(copy),
            end,
            held: None,
            is_undone: true,
            is_safe: true,
            failovers: 1,
        };
        place(&restarted(copies.join("7"), ends[1]), &worker, false).unwrap();
        let placed = Log::open(&worker, 0).unwrap();
        assert_eq!(placed.end(), LIFE_BYTES);
        let kept = source.read(0, ends[1] as usize).unwrap().1;
        assert_eq!(all_of(&placed), kept);
        placed.append(StreamKind::Output, b"new\n").unwrap();
        assert_eq!(placed.read(ends[2], 99).unwrap().0, LIFE_BYTES);
        // Another machine gets the name.
        assert_eq!(open_copy(&copies, "8", &[]).unwrap().end(), 0);
        assert!(!copies.join("7").exists());
        // Without a copy only the offsets are kept apart.
        let bare = folder.path().join("bare");
        std::fs::create_dir(&bare).unwrap();
        place(&restarted(copies.join("absent"), ends[2]), &bare, false).unwrap();
        assert_eq!(Log::open(&bare, 0).unwrap().end(), LIFE_BYTES);
    }
    #[test]
    fn held_output_goes_on_at_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let life = |unix_ms| OutputLife {
            created_unix_ms: 7,
            held_unix_ms: Some(unix_ms),
        };
        let copies = folder.path().join("m");
        let copy = open_copy(&copies, &life(100).folder(), &[]).unwrap();
        let mut ends = Vec::new();
        for line in [&b"one\n"[..], b"not seen\n"] {
            copy.append(StreamKind::Output, line).unwrap();
            ends.push(copy.end());
        }
        let held = Some(HeldOutput {
            end: ends[0],
            life_unix_ms: 100,
        });
        let before = |copy, held| Before {
            copy,
            end: ends[0],
            held,
            is_undone: true,
            is_safe: true,
            failovers: 1,
        };
        // On another node, and where the process was lost.
        let elsewhere = at("elsewhere");
        let given = before(Some(copies.join(life(100).folder())), held);
        place(&given, &elsewhere, true).unwrap();
        let here = at("here");
        for entry in std::fs::read_dir(copies.join(life(100).folder())).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), here.join(entry.file_name())).unwrap();
        }
        Log::open(&here, 0).unwrap().hold_from(ends[0]).unwrap();
        place(&before(None, held), &here, true).unwrap();
        for worker in [&elsewhere, &here] {
            let log = Log::open(worker, 0).unwrap();
            assert_eq!((log.end(), log.held_from()), (ends[0], Some(ends[0])));
            log.append(StreamKind::Output, b"done again\n").unwrap();
            assert_eq!(log.shown_end(), ends[0]);
            // Its first checkpoint was not made: what nobody saw is undone again.
            place(&before(None, None), worker, true).unwrap();
            assert_eq!(Log::open(worker, 0).unwrap().end(), ends[0]);
            // It ended by itself, and begins anew: its output stays, and is seen.
            let log = Log::open(worker, 0).unwrap();
            log.append(StreamKind::Output, b"last words\n").unwrap();
            let again = Before {
                is_undone: false,
                ..before(None, None)
            };
            place(&again, worker, true).unwrap();
            assert_eq!(Log::open(worker, 0).unwrap().held_from(), Some(log.end()));
            // The spec was changed meanwhile.
            place(&again, worker, false).unwrap();
            assert_eq!(Log::open(worker, 0).unwrap().held_from(), None);
        }
        // Only this node has the checkpoint: nothing more is seen than was.
        let alone = at("alone");
        let log = Log::open(&alone, 0).unwrap();
        log.append(StreamKind::Output, b"seen\n").unwrap();
        let seen = log.end();
        log.hold_from(seen).unwrap();
        log.append(StreamKind::Output, b"held\n").unwrap();
        let given = Before {
            copy: None,
            end: log.end(),
            held: Some(HeldOutput {
                end: log.end(),
                life_unix_ms: 100,
            }),
            is_undone: true,
            is_safe: false,
            failovers: 0,
        };
        place(&given, &alone, true).unwrap();
        let placed = Log::open(&alone, 0).unwrap();
        assert_eq!((placed.end(), placed.held_from()), (log.end(), Some(seen)));
        // A copy of an earlier life is of no use, once no set names its checkpoint.
        let earlier = [life(100).folder()];
        let copy = open_copy(&copies, &life(200).folder(), &earlier).unwrap();
        assert_eq!(copy.end(), 0);
        assert!(copies.join(life(100).folder()).exists());
        open_copy(&copies, &life(300).folder(), &[]).unwrap();
        assert!(!copies.join(life(100).folder()).exists());
    }
}
