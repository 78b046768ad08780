//! Requests about the cluster, its store, its tokens and its authority.

use super::openapi::RawBytes;
use super::reply::{Failure, Reply, Shared, streamed};
use crate::certificates;
use crate::cluster_info;
use crate::error::CommandError;
use crate::failover;
use axum::Json;
use axum::extract::{Path, State};
use axum::response::Response;
use keel_api::{
    AgentRestart, AuthorityChange, AuthorityInfo, ClusterInfo, GivenUp, NodeInfo, NodeLoss,
    Nothing, StoreInfo, Token, TokenInfo, TokenRequest, VotersRequest,
};
use keel_cluster::NodeName;

/// The cluster, and the node that answers.
#[utoipa::path(
    get,
    path = "/v1/status",
    operation_id = "get_status",
    tag = "cluster",
    responses((status = 200, description = "Success", body = ClusterInfo))
)]
pub(super) async fn status(State(at): Shared) -> Reply<ClusterInfo> {
    Ok(Json(cluster_info::status(&at.context, &at.gossip).await?))
}

/// What the loss of each node would mean for its machines with high availability.
#[utoipa::path(
    get,
    path = "/v1/failover",
    operation_id = "list_node_losses",
    tag = "cluster",
    responses((status = 200, description = "Success", body = Vec<NodeLoss>))
)]
pub(super) async fn losses(State(at): Shared) -> Reply<Vec<NodeLoss>> {
    Ok(Json(failover::losses(&at.failover).await?))
}

/// All nodes.
#[utoipa::path(
    get,
    path = "/v1/nodes",
    operation_id = "list_nodes",
    tag = "nodes",
    responses((status = 200, description = "Success", body = Vec<NodeInfo>))
)]
pub(super) async fn nodes(State(at): Shared) -> Reply<Vec<NodeInfo>> {
    Ok(Json(cluster_info::nodes(&at.context, &at.gossip).await?))
}

/// The store, and the nodes that hold it.
#[utoipa::path(
    get,
    path = "/v1/store",
    operation_id = "get_store",
    tag = "store",
    responses((status = 200, description = "Success", body = StoreInfo))
)]
pub(super) async fn store(State(at): Shared) -> Reply<StoreInfo> {
    Ok(Json(cluster_info::store(&at.context).await?))
}

/// Restarts the agent of the node that answers, from the file that is installed then.
///
/// Its machines run on, and the node counts as alive for a minute at most.
#[utoipa::path(
    post,
    path = "/v1/agent/restart",
    operation_id = "restart_agent",
    tag = "nodes",
    responses((status = 200, description = "Success", body = AgentRestart))
)]
pub(super) async fn restart_agent(State(at): Shared) -> Reply<AgentRestart> {
    Ok(Json(at.restart.begin().await?))
}

/// A backup of the store, as a file.
///
/// It has the secrets of the cluster.
#[utoipa::path(
    get,
    path = "/v1/store/backup",
    operation_id = "back_up_store",
    tag = "store",
    responses((status = 200, description = "The file", body = RawBytes, content_type = "application/octet-stream"))
)]
pub(super) async fn backup(State(at): Shared) -> Result<Response, Failure> {
    let bytes = cluster_info::backup(&at.context).await?;
    let all = futures::stream::iter([Ok(bytes::Bytes::from(bytes))]);
    Ok(streamed(all, "application/octet-stream"))
}

/// Sets how many nodes hold the store.
///
/// The answer is the state in which the change begins.
#[utoipa::path(
    post,
    path = "/v1/store/voters",
    operation_id = "set_voters",
    tag = "store",
    responses((status = 200, description = "Success", body = StoreInfo))
)]
pub(super) async fn set_voters(
    State(at): Shared,
    Json(request): Json<VotersRequest>,
) -> Reply<StoreInfo> {
    cluster_info::set_voter_count(&at.context, &request.count).await?;
    Ok(Json(cluster_info::store(&at.context).await?))
}

/// Removes a node from the cluster: the one that is asked, or one that is gone.
#[utoipa::path(
    delete,
    path = "/v1/nodes/{node}",
    operation_id = "remove_node",
    tag = "nodes",
    params(("node", description = "Name of the node.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn remove_node(State(at): Shared, Path(node): Path<String>) -> Reply<Nothing> {
    let node = NodeName::new(&node).map_err(|error| CommandError::Invalid(error.to_string()))?;
    cluster_info::remove_node(&at.context, &node).await?;
    Ok(Json(Nothing {}))
}

/// Gives up the machines of a node that is dead for good: they fail.
///
/// Those with high availability have some seconds to be restarted elsewhere before.
#[utoipa::path(
    post,
    path = "/v1/nodes/{node}/give-up",
    operation_id = "give_up_node",
    tag = "nodes",
    params(("node", description = "Name of the node.")),
    responses((status = 200, description = "Success", body = GivenUp))
)]
pub(super) async fn give_up_node(State(at): Shared, Path(node): Path<String>) -> Reply<GivenUp> {
    let node = NodeName::new(&node).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let machines = at.machines.give_up(&node).await?;
    let machines = machines.iter().map(ToString::to_string).collect();
    Ok(Json(GivenUp { machines }))
}

/// Names of the machines in the schedule of a node.
#[utoipa::path(
    get,
    path = "/v1/schedule/{node}",
    operation_id = "get_schedule",
    tag = "nodes",
    params(("node", description = "Name of the node.")),
    responses((status = 200, description = "Success", body = Vec<String>))
)]
pub(super) async fn schedule(State(at): Shared, Path(node): Path<String>) -> Reply<Vec<String>> {
    let node = NodeName::new(&node).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let machines = cluster_info::schedule(&at.context, &node).await?;
    Ok(Json(machines.iter().map(ToString::to_string).collect()))
}

/// All tokens, without their secrets.
#[utoipa::path(
    get,
    path = "/v1/tokens",
    operation_id = "list_tokens",
    tag = "tokens",
    responses((status = 200, description = "Success", body = Vec<TokenInfo>))
)]
pub(super) async fn tokens(State(at): Shared) -> Reply<Vec<TokenInfo>> {
    Ok(Json(cluster_info::tokens(&at.context).await?))
}

/// Removes a token: it is refused from now on.
#[utoipa::path(
    delete,
    path = "/v1/tokens/{id}",
    operation_id = "remove_token",
    tag = "tokens",
    params(("id", description = "Number of the token, as in the list.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn remove_token(State(at): Shared, Path(id): Path<String>) -> Reply<Nothing> {
    cluster_info::remove_token(&at.context, &id).await?;
    Ok(Json(Nothing {}))
}

/// The cluster's certificate authority, and the certificates of its nodes.
#[utoipa::path(
    get,
    path = "/v1/authority",
    operation_id = "get_authority",
    tag = "cluster",
    responses((status = 200, description = "Success", body = AuthorityInfo))
)]
pub(super) async fn authority(State(at): Shared) -> Reply<AuthorityInfo> {
    Ok(Json(certificates::info(&at.context).await?))
}

/// Sets how long certificates of nodes are valid.
#[utoipa::path(
    post,
    path = "/v1/authority",
    operation_id = "set_authority",
    tag = "cluster",
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn set_authority(
    State(at): Shared,
    Json(change): Json<AuthorityChange>,
) -> Reply<Nothing> {
    certificates::set_lifetime(&at.context, &change).await?;
    Ok(Json(Nothing {}))
}

/// Begins to replace the cluster's certificate authority.
#[utoipa::path(
    post,
    path = "/v1/authority/rotate",
    operation_id = "rotate_authority",
    tag = "cluster",
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn rotate_authority(State(at): Shared) -> Reply<Nothing> {
    certificates::rotate(&at.context).await?;
    Ok(Json(Nothing {}))
}

/// Creates a token for a node or a user.
#[utoipa::path(
    post,
    path = "/v1/tokens",
    operation_id = "create_token",
    tag = "tokens",
    responses((status = 200, description = "Success", body = Token))
)]
pub(super) async fn make_token(
    State(at): Shared,
    Json(request): Json<TokenRequest>,
) -> Reply<Token> {
    Ok(Json(cluster_info::make_token(&at.context, request).await?))
}
