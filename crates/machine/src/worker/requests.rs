//! Requests of an agent to a worker: decoded, passed to the process or to the kind, and
//! answered. What blocks runs outside the async runtime.

use super::control::{
    Checkpoint, ConsoleInput, Copy, Execute, FileRequest, LeaseDeadline, ReadLog, Receive, Start,
    kind, pack, unpack,
};
use super::{Worker, source, target};
use crate::failpoint;
use crate::log::Log;
use crate::spec::Spec;
use keel_cluster::Epoch;
use keel_net::{BoxFuture, Bytes, Handler, PeerId, PinnedIdentity, Reply, RpcError};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

/// Time for the answer to a worker's last request to be sent, and for what outlives the
/// process to be released.
const FORGET_AFTER: Duration = Duration::from_millis(20);
const RELEASE_TIMEOUT: Duration = Duration::from_millis(300);

pub(super) struct Service<W>(pub(super) Arc<W>);

impl<W: Worker> Handler for Service<W> {
    fn call(
        &self,
        _peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        let worker = self.0.clone();
        Box::pin(async move { answer(worker, kind, payload).await })
    }
}

/// Runs a blocking function outside of the runtime.
///
/// # Errors
/// Those of the function, or if it panics.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RpcError> + Send + 'static,
) -> Result<T, RpcError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(RpcError::unknown)?
}

/// As [`blocking`], and encodes the result.
async fn reply<T: Serialize + Send + 'static>(
    work: impl FnOnce() -> Result<T, RpcError> + Send + 'static,
) -> Result<Reply, RpcError> {
    Ok(pack(&blocking(work).await?)?.into())
}

async fn answer<W: Worker>(worker: Arc<W>, kind: u16, payload: Bytes) -> Result<Reply, RpcError> {
    match kind {
        kind::START => {
            let start: Start = unpack(&payload)?;
            let runtime = Handle::current();
            reply(move || {
                worker.process().check_empty()?;
                require_lease(&worker, &start.spec)?;
                worker.start(start, &runtime)
            })
            .await
        }
        kind::RECEIVE => {
            let request: Receive = unpack(&payload)?;
            let runtime = Handle::current();
            reply(move || {
                require_lease(&worker, &request.spec)?;
                target::receive(&worker, request, &runtime)
            })
            .await
        }
        kind::REPORT => reply(move || Ok(worker.process().report(&*worker))).await,
        kind::STATES => Ok(Reply::Stream(follow(worker.process().state.subscribe()))),
        kind::STALLS => Ok(Reply::Stream(follow(worker.process().paused.subscribe()))),
        kind::IDENTITY => {
            reply(move || {
                let identity = PinnedIdentity::generate().map_err(RpcError::refused)?;
                let fingerprint = identity.fingerprint;
                worker.moves(|moves| moves.identity = Some(identity));
                worker.prepare_move();
                Ok(fingerprint)
            })
            .await
        }
        kind::COPY => {
            let copy: Copy = unpack(&payload)?;
            let (send, events) = mpsc::channel(64);
            std::thread::Builder::new()
                .name("move-out".into())
                .spawn(move || {
                    source::copy(&worker, &copy, |worker| worker.begin_move(&copy), &send);
                })
                .map_err(RpcError::refused)?;
            Ok(Reply::Stream(events))
        }
        kind::END_CHECKPOINT => reply(move || worker.end_checkpoint()).await,
        kind::FREEZE => reply(move || source::freeze(&*worker)).await,
        kind::GO => {
            let epoch: Epoch = unpack(&payload)?;
            reply(move || source::go(&worker, epoch)).await
        }
        kind::THAW => {
            let epoch: Epoch = unpack(&payload)?;
            reply(move || source::thaw(&*worker, epoch)).await
        }
        kind::ABORT => {
            let reason: String = unpack(&payload)?;
            reply(move || {
                source::abort(&worker, reason);
                Ok(())
            })
            .await
        }
        kind::SERVE => reply(move || source::serve(&worker)).await,
        kind::STOP => {
            reply(move || {
                worker.stop();
                Ok(())
            })
            .await
        }
        kind::SET => {
            let spec: Spec = unpack(&payload)?;
            reply(move || {
                worker.set(spec.clone())?;
                hold_output(&worker, &spec)?;
                require_lease(&worker, &spec)
            })
            .await
        }
        kind::LEASE => {
            let deadline: LeaseDeadline = unpack(&payload)?;
            let at = Duration::from_micros(deadline.at_micros);
            let sent = Duration::from_micros(deadline.sent_micros);
            let lease = worker.process().lease();
            lease.extend(at, sent).map_err(RpcError::failed)?;
            Ok(pack(&())?.into())
        }
        kind::FILE => {
            let request: FileRequest = unpack(&payload)?;
            reply(move || worker.file(request)).await
        }
        kind::EXECUTE => {
            let process: Execute = unpack(&payload)?;
            reply(move || worker.execute(&process)).await
        }
        kind::EXECUTED => {
            let process: i64 = unpack(&payload)?;
            reply(move || worker.executed(process)).await
        }
        kind::TYPE_IN => {
            let (epoch, input): (Epoch, ConsoleInput) = unpack(&payload)?;
            reply(move || worker.type_in(epoch, &input)).await
        }
        kind::SYSTEM => reply(move || worker.system()).await,
        kind::VIEW => {
            let (epoch, viewer): (Epoch, u64) = unpack(&payload)?;
            let viewers = worker.process().viewers.clone();
            let socket = blocking(move || worker.connect_viewer(epoch)).await?;
            Ok(Reply::Stream(viewers.add(viewer, socket)?))
        }
        kind::VIEWER_INPUT => {
            let (viewer, input): (u64, Vec<u8>) = unpack(&payload)?;
            worker.process().viewers.send(viewer, &input).await?;
            Ok(pack(&())?.into())
        }
        kind::FORGET => {
            let release = tokio::task::spawn_blocking(move || worker.release());
            // The answer is sent first; nothing here needs to be saved.
            tokio::spawn(async {
                tokio::time::sleep(FORGET_AFTER).await;
                let _ = tokio::time::timeout(RELEASE_TIMEOUT, release).await;
                std::process::exit(0);
            });
            Ok(pack(&())?.into())
        }
        kind::CHECKPOINT => {
            let request: Checkpoint = unpack(&payload)?;
            let runtime = Handle::current();
            reply(move || worker.checkpoint(&request, &runtime)).await
        }
        kind::ACTIVITY => reply(move || worker.activity()).await,
        kind::MEMORY => reply(move || worker.memory()).await,
        kind::GIVE_BACK => {
            let bytes: u64 = unpack(&payload)?;
            reply(move || worker.give_back(bytes)).await
        }
        kind::LOG => {
            let read: ReadLog = unpack(&payload)?;
            let (send, chunks) = mpsc::channel(16);
            std::thread::Builder::new()
                .name("log".into())
                .spawn(move || worker.process().read_log(&read, &send))
                .map_err(RpcError::refused)?;
            Ok(Reply::Stream(chunks))
        }
        kind::LOG_SINCE => {
            let since: u64 = unpack(&payload)?;
            let log = worker.process().log();
            let log = log.ok_or_else(|| RpcError::failed("it has no output here yet"))?;
            reply(move || log.offset_since(since).map_err(|error| at(&log, &error))).await
        }
        kind::SHOW_OUTPUT => {
            let offset: u64 = unpack(&payload)?;
            let log = worker.process().log();
            let log = log.ok_or_else(|| RpcError::failed("it has no output here yet"))?;
            reply(move || log.show(offset).map_err(|error| at(&log, &error))).await
        }
        kind::FAILPOINT => {
            let (name, order): (String, Option<String>) = unpack(&payload)?;
            let order = order.map(|order| order.parse()).transpose();
            failpoint::set(&name, order.map_err(RpcError::refused)?);
            Ok(pack(&())?.into())
        }
        other => worker.answer(other, payload).await,
    }
}

/// A machine with high availability does not run without the lease of its node.
fn require_lease<W: Worker>(worker: &Arc<W>, spec: &Spec) -> Result<(), RpcError> {
    let lease = worker.process().lease();
    lease
        .require(worker, spec.ha.is_some())
        .map_err(RpcError::failed)
}

/// Holds output back from now on, or not any more, as a changed spec says. (Before it starts or
/// arrives, the agent makes the log with its hold.)
fn hold_output<W: Worker>(worker: &Arc<W>, spec: &Spec) -> Result<(), RpcError> {
    let Some(log) = worker.process().log() else {
        return Ok(());
    };
    let protects = spec.ha.as_ref().is_some_and(|ha| ha.protects_output());
    let changed = match (protects, log.held_from()) {
        (true, None) => log.hold_from_now(),
        (false, Some(_)) => log.end_hold(),
        _ => Ok(()),
    };
    changed.map_err(|error| at(&log, &error))
}

/// An error of a machine's log, with its place.
fn at(log: &Log, error: &std::io::Error) -> RpcError {
    RpcError::failed(format!("{}: {error}", log.place()))
}

/// Streams the present and all later values.
fn follow<T>(mut values: watch::Receiver<T>) -> mpsc::Receiver<Bytes>
where
    T: Clone + Serialize + Send + Sync + 'static,
{
    let (send, receive) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let value = values.borrow_and_update().clone();
            let Ok(bytes) = pack(&value) else { return };
            if send.send(bytes).await.is_err() || values.changed().await.is_err() {
                return;
            }
        }
    });
    receive
}
