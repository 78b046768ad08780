//! Requests about images: what machines start from.

use super::openapi::RawBytes;
use super::reply::{Reply, Shared};
use crate::error::CommandError;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use keel_api::{ImageInfo, ImageRequest, Nothing, Uploaded};
use keel_machine::kind::{InvalidKindName, KindName};
use serde::Deserialize;
use utoipa::IntoParams;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct UploadQuery {
    /// The kind of the machines that start from it; any kind if absent.
    kind: Option<String>,
}

impl UploadQuery {
    fn kind(self) -> Result<Option<KindName>, CommandError> {
        let kind = self.kind.map(|kind| kind.parse()).transpose();
        kind.map_err(|error: InvalidKindName| CommandError::Invalid(error.to_string()))
    }
}

/// Uploads an image: the file that machines start from.
///
/// For machines of kind `wasm` it is a WebAssembly module, for `qemu` a disk, a
/// kernel or its initrd.
#[utoipa::path(
    put,
    path = "/v1/images",
    operation_id = "upload_image",
    tag = "images",
    params(UploadQuery),
    request_body(content = RawBytes, content_type = "application/octet-stream"),
    responses((status = 200, description = "Success", body = Uploaded))
)]
pub(super) async fn upload(
    State(at): Shared,
    Query(query): Query<UploadQuery>,
    body: Body,
) -> Reply<Uploaded> {
    let kind = query.kind()?;
    let hash = at
        .images
        .upload(kind.as_ref(), body.into_data_stream())
        .await?;
    Ok(Json(Uploaded { hash }))
}

/// Whether a file from which machines start has to be uploaded.
#[utoipa::path(
    get,
    path = "/v1/image-files/{hash}",
    operation_id = "find_image_file",
    tag = "images",
    params(("hash", description = "Hash of the file (BLAKE3, hex)."), UploadQuery),
    responses((status = 200, description = "The cluster has it", body = Uploaded))
)]
pub(super) async fn find_file(
    State(at): Shared,
    Path(hash): Path<String>,
    Query(query): Query<UploadQuery>,
) -> Reply<Uploaded> {
    let kind = query.kind()?;
    match at.images.is_known(kind.as_ref(), &hash).await? {
        true => Ok(Json(Uploaded { hash })),
        false => Err(CommandError::NotFound(format!("there is no file {hash}: upload it")).into()),
    }
}

/// All images that have a name.
#[utoipa::path(
    get,
    path = "/v1/images",
    operation_id = "list_images",
    tag = "images",
    responses((status = 200, description = "Success", body = Vec<ImageInfo>))
)]
pub(super) async fn list_images(State(at): Shared) -> Reply<Vec<ImageInfo>> {
    Ok(Json(at.images.all_named().await?))
}

/// The image of a name.
#[utoipa::path(
    get,
    path = "/v1/images/{name}",
    operation_id = "get_image",
    tag = "images",
    params(("name", description = "Name of the image.")),
    responses((status = 200, description = "Success", body = ImageInfo))
)]
pub(super) async fn inspect_image(State(at): Shared, Path(name): Path<String>) -> Reply<ImageInfo> {
    Ok(Json(at.images.named(&name).await?))
}

/// Gives an image that was uploaded a name.
///
/// The answer does not wait until all nodes that are to keep it have it.
#[utoipa::path(
    put,
    path = "/v1/images/{name}",
    operation_id = "name_image",
    tag = "images",
    params(("name", description = "Name of the image.")),
    responses((status = 200, description = "Success", body = ImageInfo))
)]
pub(super) async fn name_image(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<ImageRequest>,
) -> Reply<ImageInfo> {
    Ok(Json(at.images.give_name(&name, request).await?))
}

/// Takes the name of an image away.
///
/// Its file is removed a day after the last machine that needs it.
#[utoipa::path(
    delete,
    path = "/v1/images/{name}",
    operation_id = "remove_image",
    tag = "images",
    params(("name", description = "Name of the image.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn remove_image(State(at): Shared, Path(name): Path<String>) -> Reply<Nothing> {
    at.images.remove_name(&name).await?;
    Ok(Json(Nothing {}))
}
