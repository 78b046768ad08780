//! The output of machines: read where a machine is, followed from node to node.
//!
//! A follower is told by the store that its machine has another owner, and goes on
//! there at once: the source's stream ends only when its worker is gone, a while
//! after the machine runs at the target. Offsets make nothing come twice.

use crate::agent::Agent;
use crate::operate::OperateError;
use crate::record::{self, Found, RecordError};
use crate::service::kind as node_kind;
use crate::workers::PROMPT;
use keel_cluster::MachineName;
use keel_cluster::keys::Key;
use keel_cluster::store::Change;
use keel_machine::log::Log;
use keel_machine::spec::Record;
use keel_machine::worker::control::{LogChunk, ReadLog, kind, pack, unpack};
use keel_net::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Bytes of output in one piece.
const PIECE_BYTES: usize = 64 << 10;
/// Attempts to find a machine that is moving about.
const CHASES_MAX: u32 = 25;
/// The longest pause between them; the first is the shortest.
const CHASE_PAUSE_MAX: Duration = Duration::from_millis(50);

/// The output of a machine that runs, or ended, on this node.
pub(crate) async fn here(
    agent: &Arc<Agent>,
    machine: &MachineName,
    from: u64,
    follow: bool,
) -> Result<mpsc::Receiver<Bytes>, String> {
    let (send, chunks) = mpsc::channel(16);
    let Some(worker) = agent.workers.get(machine) else {
        let folder = agent.dir.worker(machine);
        if !folder.is_dir() {
            return Err(format!("machine {machine:?} has no output here"));
        }
        let log = Log::open(&folder, 0).map_err(|error| error.to_string())?;
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || send_left(&log, from, &send))
            .map_err(|error| error.to_string())?;
        return Ok(chunks);
    };
    let mut stream = worker
        .stream(kind::LOG, &ReadLog { from, follow })
        .await
        .map_err(|error| error.to_string())?;
    tokio::spawn(async move {
        while let Some(Ok(bytes)) = stream.recv().await {
            if send.send(bytes).await.is_err() {
                return;
            }
        }
    });
    Ok(chunks)
}

/// Where the output begins that a machine, which runs or ended on this node, wrote
/// at a time or later.
pub(crate) async fn since(
    agent: &Arc<Agent>,
    machine: &MachineName,
    since_unix_ms: u64,
) -> Result<u64, OperateError> {
    if let Some(worker) = agent.workers.get(machine) {
        let offset = worker.ask(kind::LOG_SINCE, &since_unix_ms, PROMPT).await;
        return offset.map_err(|error| OperateError::Away(error.to_string()));
    }
    let folder = agent.dir.worker(machine);
    let found = tokio::task::spawn_blocking(move || {
        match folder.is_dir() {
            true => Log::open(&folder, 0)?.offset_since(since_unix_ms),
            // It has not begun.
            false => Ok(0),
        }
    });
    found
        .await
        .map_err(|error| OperateError::Away(error.to_string()))?
        .map_err(|error| OperateError::Away(format!("the output of {machine:?}: {error}")))
}

/// Sends what an ended machine left.
fn send_left(log: &Log, from: u64, send: &mpsc::Sender<Bytes>) {
    let mut at = from;
    while let Ok((offset, bytes)) = log.read(at, PIECE_BYTES) {
        if bytes.is_empty() {
            return;
        }
        at = offset + bytes.len() as u64;
        let sent = pack(&LogChunk { offset, bytes })
            .ok()
            .is_some_and(|bytes| send.blocking_send(bytes).is_ok());
        if !sent {
            return;
        }
    }
}

/// The output of a machine from an offset on, following it from node to node.
///
/// # Errors
/// [`OperateError`], if there is no such machine.
pub(crate) async fn anywhere(
    agent: &Arc<Agent>,
    machine: &MachineName,
    from: u64,
    follow: bool,
) -> Result<mpsc::Receiver<Bytes>, OperateError> {
    record::get(&*agent.store, machine).await?;
    let (send, bytes) = mpsc::channel(16);
    let (agent, machine) = (agent.clone(), machine.clone());
    tokio::spawn(async move {
        let mut at = from;
        let mut idle = 0;
        while idle < CHASES_MAX && !send.is_closed() {
            let before = at;
            let mut moved = false;
            let ended = match record::get(&*agent.store, &machine).await {
                Ok(found) if !follow => {
                    return pass_on(&agent, &found.record, &mut at, false, &send).await;
                }
                Ok(found) => {
                    tokio::select! {
                        () = pass_on(&agent, &found.record, &mut at, true, &send) => {}
                        () = owner_changes(&agent, &found) => moved = true,
                    }
                    found.record.status.ended()
                }
                Err(RecordError::NoMachine(_)) => true,
                Err(_) => false,
            };
            if ended {
                return;
            }
            if moved {
                idle = 0;
                continue;
            }
            // It is on its way, or its node is away for a moment.
            idle = if at > before { 0 } else { idle + 1 };
            let pause = Duration::from_millis(1) * 2u32.pow(idle.min(10));
            tokio::time::sleep(pause.min(CHASE_PAUSE_MAX)).await;
        }
    });
    Ok(bytes)
}

/// Returns when a machine's record names another owner. Never, if the store does
/// not tell: then the end of the old owner's stream does.
async fn owner_changes(agent: &Agent, found: &Found) {
    let key = Key::Machine(found.record.name.clone()).to_string();
    let Ok(mut watch) = agent.store.watch(&key, found.revision + 1).await else {
        return std::future::pending().await;
    };
    while let Some(Ok(changes)) = watch.next().await {
        for change in changes.changes {
            // (Keys of other machines may begin with this one.)
            let Change::Put(entry) = change else { continue };
            if entry.key != key {
                continue;
            }
            let owner = Record::decode(&entry.value).map(|record| record.owner);
            if owner.is_ok_and(|owner| owner != found.record.owner) {
                return;
            }
        }
    }
    std::future::pending().await
}

/// Passes on what a machine's owner has, until its stream ends. May be dropped at
/// any time: what `at` counts was passed on.
async fn pass_on(
    agent: &Arc<Agent>,
    record: &Record,
    at: &mut u64,
    follow: bool,
    send: &mpsc::Sender<Bytes>,
) {
    let read = |chunk: Bytes| -> Option<(u64, Vec<u8>)> {
        let chunk: LogChunk = unpack(&chunk).ok()?;
        Some((chunk.offset, chunk.bytes))
    };
    let mut local = None;
    let mut remote = None;
    if record.owner == agent.name {
        local = here(agent, &record.name, *at, follow).await.ok();
    } else if let Ok(question) = pack(&(record.name.clone(), *at, follow)) {
        let stream = agent.peers.stream(&record.owner, node_kind::LOG, question);
        remote = stream.await.ok();
    }
    loop {
        let chunk = match (&mut local, &mut remote) {
            (Some(local), _) => local.recv().await,
            (None, Some(remote)) => match remote.recv().await {
                Some(Ok(chunk)) => Some(chunk),
                _ => None,
            },
            (None, None) => None,
        };
        let Some((offset, bytes)) = chunk.and_then(read) else {
            return;
        };
        // A log that lost its oldest part begins later.
        let known = usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(new) = bytes.get(known..) else {
            continue;
        };
        // Room first: nothing may come between counting and passing on.
        let Ok(room) = send.reserve().await else {
            return;
        };
        *at = offset + bytes.len() as u64;
        room.send(Bytes::copy_from_slice(new));
    }
}
