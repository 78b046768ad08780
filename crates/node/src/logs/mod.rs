//! The output of machines: read on the node of the machine, followed from node to node.
//!
//! A follower learns from the store that its machine has a new owner, and continues there at once:
//! the source's stream ends only with its worker, a while after the machine runs at the target.
//! Offsets prevent duplicates.

use crate::context::Context;
use crate::error::CommandError;
use crate::processes::{PROMPT, Processes};
use crate::records::{self, MachineCommand, RecordError, VersionedRecord, at_owner};
use keel_cluster::MachineName;
use keel_machine::log::Log;
use keel_machine::spec::Record;
use keel_machine::worker::control::{LogChunk, ReadLog, kind, pack, unpack};
use keel_net::Bytes;
use keel_store::Change;
use keel_store::keys::Key;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Bytes of output in one piece.
const PIECE_BYTES: usize = 64 << 10;
/// How long the process of a worker with a lost connection may take to end.
const GONE_WITHIN: Duration = Duration::from_millis(500);
/// Attempts to find a machine that keeps moving.
const CHASES_MAX: u32 = 25;
/// Attempts of a reader who follows a machine that is restarted when its node fails: half a minute.
const FAILOVER_CHASES_MAX: u32 = 600;
/// The longest pause between them; the first is the shortest.
const CHASE_PAUSE_MAX: Duration = Duration::from_millis(50);

/// Request between agents: `(machine, from, follow)` → stream of [`LogChunk`].
pub(crate) const LOG: u16 = 0x0307;
/// The same, with output that is held back: for copies, and for machines whose end is recorded.
pub(crate) const WHOLE_LOG: u16 = 0x0330;

/// Asks for the offset of the first output at or after a time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LogOffset {
    pub(crate) machine: MachineName,
    pub(crate) since_unix_ms: u64,
}

impl MachineCommand for LogOffset {
    const KIND: u16 = 0x0329;
    type Answer = u64;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// The output of machines.
pub(crate) struct Logs {
    context: Arc<Context>,
    processes: Arc<Processes>,
}

impl Logs {
    pub(crate) fn new(context: Arc<Context>, processes: Arc<Processes>) -> Self {
        Logs { context, processes }
    }

    /// The offset of the first output of a machine at or after a time.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn offset_since(&self, command: LogOffset) -> Result<u64, CommandError> {
        at_owner(&self.context, command, |it| self.offset_here(it)).await
    }

    /// The output of a machine that runs, or ended, on this node. It ends with an empty chunk if
    /// it is complete.
    pub(crate) async fn here(
        &self,
        machine: &MachineName,
        read: ReadLog,
    ) -> Result<mpsc::Receiver<Bytes>, String> {
        let (send, chunks) = mpsc::channel(16);
        let folder = self.context.dir.worker(machine);
        let worker = self.processes.machines.get(machine);
        let mut stream = None;
        if let Some(worker) = &worker {
            match worker.stream(kind::LOG, &read).await {
                Ok(begun) => stream = Some(begun),
                Err(_) if worker.gone_within(GONE_WITHIN).await => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        tokio::spawn(async move {
            let mut at = read.from;
            if let (Some(worker), Some(stream)) = (&worker, &mut stream) {
                loop {
                    match stream.recv().await {
                        Some(Ok(bytes)) => {
                            if let Ok(LogChunk { offset, bytes }) = unpack(&bytes) {
                                at = offset + bytes.len() as u64;
                            }
                            if send.send(bytes).await.is_err() {
                                return;
                            }
                        }
                        // It has ended during the read: its output is in its folder.
                        Some(Err(_)) if worker.gone_within(GONE_WITHIN).await => break,
                        Some(Err(_)) | None => return,
                    }
                }
            }
            let left =
                tokio::task::spawn_blocking(move || send_left(&folder, at, read.whole, &send));
            match left.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "cannot read the output of an ended machine")
                }
                Err(error) => {
                    tracing::error!(%error, "reading the output of an ended machine failed")
                }
            }
        });
        Ok(chunks)
    }

    /// The offset of the first output, at or after a time, of a machine that runs or ended on this
    /// node.
    pub(crate) async fn offset_here(&self, command: LogOffset) -> Result<u64, CommandError> {
        let LogOffset {
            machine,
            since_unix_ms,
        } = &command;
        let since_unix_ms = *since_unix_ms;
        if let Some(worker) = self.processes.machines.get(machine) {
            match worker.ask(kind::LOG_SINCE, &since_unix_ms, PROMPT).await {
                Ok(offset) => return Ok(offset),
                // It has just ended.
                Err(_) if worker.gone_within(GONE_WITHIN).await => {}
                Err(error) => return Err(CommandError::Unavailable(error.to_string())),
            }
        }
        let folder = self.context.dir.worker(machine);
        let found = tokio::task::spawn_blocking(move || {
            Log::open_read_only(&folder)?.offset_since(since_unix_ms)
        });
        found
            .await
            .map_err(|error| CommandError::Unavailable(error.to_string()))?
            .map_err(|error| {
                CommandError::Unavailable(format!("the output of {machine:?}: {error}"))
            })
    }

    /// The output of a machine from an offset on, followed from node to node. An error is the last
    /// item and says why the output is incomplete.
    ///
    /// # Errors
    /// [`CommandError`], if there is no such machine.
    pub(crate) async fn read(
        self: &Arc<Self>,
        machine: &MachineName,
        from: u64,
        follow: bool,
    ) -> Result<mpsc::Receiver<Result<Bytes, String>>, CommandError> {
        records::get(&*self.context.store, machine).await?;
        // Of those who follow there may be many, and some hardly read.
        let (send, bytes) = mpsc::channel(2);
        let (logs, machine) = (self.clone(), machine.clone());
        tokio::spawn(async move {
            let mut at = from;
            let mut idle = 0;
            let mut why = "it did not start".to_owned();
            let mut chases = CHASES_MAX;
            while idle < chases && !send.is_closed() {
                let before = at;
                match records::get(&*logs.context.store, &machine).await {
                    Ok(found) => {
                        if follow && found.record.spec.ha.is_some() {
                            chases = FAILOVER_CHASES_MAX;
                        }
                        let passed = tokio::select! {
                            passed = logs.pass_on(&found.record, &mut at, follow, &send) => passed,
                            () = owner_changes(&logs.context, &found), if follow => {
                                idle = 0;
                                continue;
                            }
                        };
                        match passed {
                            Ok(()) if follow && found.record.status.ended() => return,
                            // Otherwise there may be more of it on another node.
                            Ok(()) if !follow && is_there(&logs.context, &found).await => return,
                            Ok(()) => {}
                            Err(error) => why = error,
                        }
                    }
                    Err(RecordError::NoMachine(_)) if follow => return,
                    Err(error @ RecordError::NoMachine(_)) => {
                        why = error.to_string();
                        break;
                    }
                    Err(error) => why = error.to_string(),
                }
                // It is moving, or its node is briefly unreachable.
                idle = if at > before { 0 } else { idle + 1 };
                let pause = Duration::from_millis(1) * 2u32.pow(idle.min(10));
                tokio::time::sleep(pause.min(CHASE_PAUSE_MAX)).await;
            }
            let why = format!("the output of {machine:?} is incomplete: {why}");
            // The client may have disconnected.
            let _ = send.send(Err(why)).await;
        });
        Ok(bytes)
    }

    /// Forwards the output at a machine's owner to its end. Cancel-safe: `at` counts the bytes
    /// that were forwarded.
    ///
    /// # Errors
    /// Why the output is incomplete.
    async fn pass_on(
        &self,
        record: &Record,
        at: &mut u64,
        follow: bool,
        send: &mpsc::Sender<Result<Bytes, String>>,
    ) -> Result<(), String> {
        let owner = &record.owner;
        let away = |error: &dyn std::fmt::Display| format!("node {owner}: {error}");
        let (mut local, mut remote) = (None, None);
        // Nothing undoes the output of a machine whose end is recorded.
        let ha = record.spec.ha.as_ref();
        let whole = record.status.ended() && ha.is_some_and(|ha| ha.protects_output());
        if *owner == self.context.name {
            let from = *at;
            let read = ReadLog {
                from,
                follow,
                whole,
            };
            local = Some(self.here(&record.name, read).await?);
        } else {
            let question =
                pack(&(record.name.clone(), *at, follow)).map_err(|it| it.to_string())?;
            let kind = if whole { WHOLE_LOG } else { LOG };
            let stream = self.context.peers.bulk_stream(owner, kind, question).await;
            remote = Some(stream.map_err(|error| away(&error))?);
        }
        loop {
            let chunk = match (&mut local, &mut remote) {
                (Some(local), _) => local.recv().await,
                (None, Some(remote)) => remote
                    .recv()
                    .await
                    .transpose()
                    .map_err(|error| away(&error))?,
                (None, None) => None,
            };
            let chunk = chunk.ok_or_else(|| away(&"its output ended early"))?;
            let LogChunk { offset, bytes } = unpack(&chunk).map_err(|error| away(&error))?;
            if bytes.is_empty() {
                return Ok(());
            }
            // A log that lost its oldest part begins later.
            let known = usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
            let Some(new) = bytes.get(known..) else {
                continue;
            };
            // Reserves room first: no await may separate counting and forwarding.
            let Ok(room) = send.reserve().await else {
                return Ok(());
            };
            *at = offset + bytes.len() as u64;
            room.send(Ok(Bytes::copy_from_slice(new)));
        }
    }
}

/// Whether a machine is still where it was found, or is removed.
async fn is_there(context: &Context, found: &VersionedRecord) -> bool {
    match records::get(&*context.store, &found.record.name).await {
        Ok(now) => now.record.owner == found.record.owner,
        Err(error) => matches!(error, RecordError::NoMachine(_)),
    }
}

/// Returns when a machine's record names another owner. Never, if the store does not answer: then
/// the end of the old owner's stream ends the wait.
async fn owner_changes(context: &Context, found: &VersionedRecord) {
    let key = Key::Machine(found.record.name.clone()).to_string();
    let Ok(mut watch) = context.store.watch(&key, found.revision + 1).await else {
        return std::future::pending().await;
    };
    while let Some(Ok(changes)) = watch.next().await {
        for change in changes.changes {
            // Keys of other machines may have this one as a prefix.
            let Change::Put(entry) = change else { continue };
            if entry.key != key {
                continue;
            }
            let owner = VersionedRecord::read(&entry).map(|found| found.record.owner);
            if owner.is_ok_and(|owner| owner != found.record.owner) {
                return;
            }
        }
    }
    std::future::pending().await
}

/// Sends the remaining output of an ended machine, with the end marker. Sends nothing for a
/// machine that has not started, or is not here any more: the client searches for its node.
pub(crate) fn send_left(
    folder: &Path,
    from: u64,
    whole: bool,
    send: &mpsc::Sender<Bytes>,
) -> std::io::Result<()> {
    let log = Log::open_read_only(folder)?;
    let mut at = from;
    loop {
        let (offset, bytes) = match whole {
            true => log.read(at, PIECE_BYTES)?,
            false => log.read_shown(at, PIECE_BYTES)?,
        };
        let is_end = bytes.is_empty();
        at = offset + bytes.len() as u64;
        let sent = pack(&LogChunk { offset, bytes })
            .ok()
            .is_some_and(|bytes| send.blocking_send(bytes).is_ok());
        if is_end || !sent {
            return Ok(());
        }
    }
}
