//! Requests about the cluster's volumes.

use super::reply::{Reply, Shared};
use crate::volumes;
use axum::Json;
use axum::extract::{Path, Query, State};
use keel_api::{ClusterVolumeInfo, Nothing, VolumeCreateRequest};
use serde::Deserialize;
use utoipa::IntoParams;

/// Creates a volume of the cluster.
#[utoipa::path(
    post,
    path = "/v1/volumes",
    operation_id = "create_volume",
    tag = "volumes",
    responses((status = 200, description = "Success", body = ClusterVolumeInfo))
)]
pub(super) async fn create_volume(
    State(at): Shared,
    Json(request): Json<VolumeCreateRequest>,
) -> Reply<ClusterVolumeInfo> {
    Ok(Json(volumes::create(&at.context, request).await?))
}

/// All volumes of the cluster, without their content.
#[utoipa::path(
    get,
    path = "/v1/volumes",
    operation_id = "list_volumes",
    tag = "volumes",
    responses((status = 200, description = "Success", body = Vec<ClusterVolumeInfo>))
)]
pub(super) async fn list_volumes(State(at): Shared) -> Reply<Vec<ClusterVolumeInfo>> {
    Ok(Json(volumes::list(&at.context).await?))
}

/// A volume of the cluster, with its content.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}",
    operation_id = "get_volume",
    tag = "volumes",
    params(("name", description = "Name of the volume.")),
    responses((status = 200, description = "Success", body = ClusterVolumeInfo))
)]
pub(super) async fn inspect_volume(
    State(at): Shared,
    Path(name): Path<String>,
) -> Reply<ClusterVolumeInfo> {
    Ok(Json(volumes::inspect(&at.context, &name).await?))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct RemoveVolumeQuery {
    /// Whether its files stay at its place.
    #[serde(default)]
    forget: bool,
}

/// Removes a volume of the cluster that no machine holds, with its files.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}",
    operation_id = "remove_volume",
    tag = "volumes",
    params(("name", description = "Name of the volume."), RemoveVolumeQuery),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn remove_volume(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<RemoveVolumeQuery>,
) -> Reply<Nothing> {
    volumes::remove(&at.context, &name, query.forget).await?;
    Ok(Json(Nothing {}))
}
