//! Requests about files in machines' volumes.

use super::super::handles::Handles;
use super::openapi::RawBytes;
use super::reply::{Failure, Reply, Shared, machine_name};
use crate::error::CommandError;
use crate::volumes::{FileCommand, PIECE_BYTES_MAX};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use keel_api::{FileStat, Nothing, RenameRequest};
use keel_machine::worker::control::{FileDone, FileOp};
use serde::Deserialize;
use utoipa::IntoParams;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct At {
    /// Absolute path for the guest.
    path: String,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Piece {
    /// Absolute path for the guest.
    path: String,
    /// First byte.
    offset: u64,
    /// The most bytes.
    length: u32,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Place {
    /// Absolute path for the guest.
    path: String,
    /// First byte.
    offset: u64,
    /// Whether the file is created; it must not exist.
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

/// Whether a path of a machine is a file or a directory, and its size.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/files/stat",
    operation_id = "stat_file",
    tag = "files",
    params(("name", description = "Name of the machine."), At),
    responses((status = 200, description = "Success", body = FileStat))
)]
pub(super) async fn stat(
    State(at): Shared,
    Path(name): Path<String>,
    Query(At { path }): Query<At>,
) -> Reply<FileStat> {
    match act(&at, &name, FileOp::Stat { path }).await? {
        FileDone::Stat(found) => Ok(Json(FileStat {
            bytes: found.bytes,
            directory: found.directory,
        })),
        _ => Err(otherwise()),
    }
}

/// Bytes of a file of a machine, fewer at the end of the file.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/files",
    operation_id = "read_file",
    tag = "files",
    params(("name", description = "Name of the machine."), Piece),
    responses((status = 200, description = "The bytes", body = RawBytes, content_type = "application/octet-stream"))
)]
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

/// Writes bytes into a file of a machine.
#[utoipa::path(
    put,
    path = "/v1/machines/{name}/files",
    operation_id = "write_file",
    tag = "files",
    params(("name", description = "Name of the machine."), Place),
    request_body(content = RawBytes, content_type = "application/octet-stream"),
    responses((status = 200, description = "Success", body = Nothing))
)]
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

/// Removes a file of a machine.
#[utoipa::path(
    delete,
    path = "/v1/machines/{name}/files",
    operation_id = "remove_file",
    tag = "files",
    params(("name", description = "Name of the machine."), At),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn remove(
    State(at): Shared,
    Path(name): Path<String>,
    Query(At { path }): Query<At>,
) -> Reply<Nothing> {
    act(&at, &name, FileOp::Remove { path }).await?;
    Ok(Json(Nothing {}))
}

/// Renames a file of a machine; a file that has the new name is replaced.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/files/rename",
    operation_id = "rename_file",
    tag = "files",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn rename(
    State(at): Shared,
    Path(name): Path<String>,
    Json(RenameRequest { from, to }): Json<RenameRequest>,
) -> Reply<Nothing> {
    act(&at, &name, FileOp::Rename { from, to }).await?;
    Ok(Json(Nothing {}))
}
