//! Requests that only workers of this kind have: parts, threads and objects.

use super::wasm_worker::WasmWorker;
use crate::control::{CopyHome, kind};
use keel_machine::worker::control::{Positional, pack, unpack};
use keel_machine::worker::{blocking, copy};
use keel_net::{Bytes, Reply, RpcError};
use serde::Serialize;
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) async fn answer(
    worker: Arc<WasmWorker>,
    kind: u16,
    payload: Bytes,
) -> Result<Reply, RpcError> {
    match kind {
        kind::COPY_HOME => copy_home(worker, unpack(&payload)?),
        kind::IS_PART => reply(move || Ok(worker.inner().parts.member())).await,
        kind::SPAN_READY => {
            let meet = unpack(&payload)?;
            reply(move || worker.prepare_home(&meet)).await
        }
        kind::PREPARE_MEMBER => {
            let ready = unpack(&payload)?;
            reply(move || worker.prepare_member(&ready)).await
        }
        kind::SPAN => {
            let span = unpack(&payload)?;
            reply(move || worker.span(span)).await
        }
        kind::JOIN => {
            let join = unpack(&payload)?;
            reply(move || worker.join(&join)).await
        }
        kind::UNSPAN => reply(move || worker.unspan()).await,
        kind::RESTORE_SPANNING => reply(move || worker.restore_to_parts()).await,
        kind::CONNECT_NEW_PART => {
            let meet = unpack(&payload)?;
            reply(move || worker.connect_new_part(&meet)).await
        }
        kind::ADD_PART => {
            let join = unpack(&payload)?;
            reply(move || worker.add_part(join)).await
        }
        kind::REMOVE_PART => {
            let part = unpack(&payload)?;
            reply(move || worker.remove_part(part)).await
        }
        kind::PARTS => reply(move || worker.parts()).await,
        kind::MOVE_THREAD => {
            let thread = unpack(&payload)?;
            reply(move || worker.move_thread(thread)).await
        }
        kind::ROOM => {
            let room = unpack(&payload)?;
            reply(move || worker.room(room)).await
        }
        kind::OBJECTS => reply(move || worker.objects().map(Positional)).await,
        kind::HEAT => reply(move || worker.heat().map(Positional)).await,
        kind::MOVE_OBJECT => {
            let object = unpack(&payload)?;
            reply(move || worker.move_object(object)).await
        }
        other => Err(RpcError::refused(format!("no request of kind {other:#x}"))),
    }
}

async fn reply<T: Serialize + Send + 'static>(
    work: impl FnOnce() -> Result<T, RpcError> + Send + 'static,
) -> Result<Reply, RpcError> {
    Ok(pack(&blocking(work).await?)?.into())
}

/// As a copy of the whole machine, for a machine that spans.
fn copy_home(worker: Arc<WasmWorker>, home: CopyHome) -> Result<Reply, RpcError> {
    let (send, events) = mpsc::channel(64);
    std::thread::Builder::new()
        .name("move-out".into())
        .spawn(move || {
            let to = (home.successor, home.threads_to);
            let prepare = |worker: &Arc<WasmWorker>| worker.begin_session(&home.copy, Some(to));
            copy(&worker, &home.copy, prepare, &send);
        })
        .map_err(RpcError::refused)?;
    Ok(Reply::Stream(events))
}
