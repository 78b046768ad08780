//! Requests about files in machines' volumes.

use super::{Failure, Reply, Shared, machine_name};
use crate::agent::Agent;
use crate::files::{self, PIECE_BYTES_MAX};
use crate::operate::OperateError;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use keel_api::{FileStat, Nothing, RenameRequest};
use keel_machine::worker::control::{FileDone, FileOp};
use serde::Deserialize;
use std::sync::Arc;

#[derive(Deserialize)]
pub(super) struct At {
    path: String,
}

#[derive(Deserialize)]
pub(super) struct Piece {
    path: String,
    offset: u64,
    length: u32,
}

#[derive(Deserialize)]
pub(super) struct Place {
    path: String,
    offset: u64,
    #[serde(default)]
    begin: bool,
}

async fn act(agent: &Arc<Agent>, name: &str, op: FileOp) -> Result<FileDone, Failure> {
    let absolute = op.path().starts_with('/');
    if !absolute || op.path().contains('\0') {
        let what = format!("{:?} is no absolute path of the machine", op.path());
        return Err(OperateError::Bad(what).into());
    }
    Ok(files::anywhere(agent, &machine_name(name)?, op).await?)
}

fn otherwise() -> Failure {
    OperateError::Away("the node answered something else".into()).into()
}

pub(super) async fn stat(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(At { path }): Query<At>,
) -> Reply<FileStat> {
    match act(&agent, &name, FileOp::Stat { path }).await? {
        FileDone::Stat(found) => Ok(Json(found)),
        _ => Err(otherwise()),
    }
}

pub(super) async fn read(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(piece): Query<Piece>,
) -> Result<Vec<u8>, Failure> {
    let op = FileOp::Read {
        path: piece.path,
        offset: piece.offset,
        bytes_max: piece.length.min(PIECE_BYTES_MAX as u32),
    };
    match act(&agent, &name, op).await? {
        FileDone::Bytes(bytes) => Ok(bytes),
        _ => Err(otherwise()),
    }
}

pub(super) async fn write(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(place): Query<Place>,
    body: Bytes,
) -> Reply<Nothing> {
    let op = FileOp::Write {
        path: place.path,
        offset: place.offset,
        bytes: body.to_vec(),
        begin: place.begin,
    };
    act(&agent, &name, op).await?;
    Ok(Json(Nothing {}))
}

pub(super) async fn remove(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(At { path }): Query<At>,
) -> Reply<Nothing> {
    act(&agent, &name, FileOp::Remove { path }).await?;
    Ok(Json(Nothing {}))
}

pub(super) async fn rename(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(RenameRequest { from, to }): Json<RenameRequest>,
) -> Reply<Nothing> {
    act(&agent, &name, FileOp::Rename { from, to }).await?;
    Ok(Json(Nothing {}))
}
