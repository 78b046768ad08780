//! Requests about files in machines' volumes.

use super::super::handles::Handles;
use super::reply::{Failure, Reply, Shared, machine_name};
use crate::error::CommandError;
use crate::volumes::{FileCommand, PIECE_BYTES_MAX};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use keel_api::{FileStat, Nothing, RenameRequest};
use keel_machine::worker::control::{FileDone, FileOp};
use serde::Deserialize;

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

async fn act(at: &Handles, name: &str, op: FileOp) -> Result<FileDone, Failure> {
    let absolute = op.path().starts_with('/');
    if !absolute || op.path().contains('\0') {
        let what = format!("{:?} is no absolute path of the machine", op.path());
        return Err(CommandError::Invalid(what).into());
    }
    let machine = machine_name(name)?;
    Ok(at.files.act(FileCommand { machine, op }).await?)
}

fn otherwise() -> Failure {
    CommandError::Unavailable("the node gave an unexpected answer".into()).into()
}

pub(super) async fn stat(
    State(at): Shared,
    Path(name): Path<String>,
    Query(At { path }): Query<At>,
) -> Reply<FileStat> {
    match act(&at, &name, FileOp::Stat { path }).await? {
        FileDone::Stat(found) => Ok(Json(found)),
        _ => Err(otherwise()),
    }
}

pub(super) async fn read(
    State(at): Shared,
    Path(name): Path<String>,
    Query(piece): Query<Piece>,
) -> Result<Vec<u8>, Failure> {
    let op = FileOp::Read {
        path: piece.path,
        offset: piece.offset,
        bytes_max: piece.length.min(PIECE_BYTES_MAX as u32),
    };
    match act(&at, &name, op).await? {
        FileDone::Bytes(bytes) => Ok(bytes),
        _ => Err(otherwise()),
    }
}

pub(super) async fn write(
    State(at): Shared,
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
    act(&at, &name, op).await?;
    Ok(Json(Nothing {}))
}

pub(super) async fn remove(
    State(at): Shared,
    Path(name): Path<String>,
    Query(At { path }): Query<At>,
) -> Reply<Nothing> {
    act(&at, &name, FileOp::Remove { path }).await?;
    Ok(Json(Nothing {}))
}

pub(super) async fn rename(
    State(at): Shared,
    Path(name): Path<String>,
    Json(RenameRequest { from, to }): Json<RenameRequest>,
) -> Reply<Nothing> {
    act(&at, &name, FileOp::Rename { from, to }).await?;
    Ok(Json(Nothing {}))
}
