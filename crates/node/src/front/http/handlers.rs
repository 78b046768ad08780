//! Requests about machines, volumes, events and the cluster itself.

use super::super::handles::Handles;
use super::reply::{Failure, Reply, Shared, line_by_line, machine_name, streamed};
use crate::checkpoints::CreateCheckpoint;
use crate::cluster_events::{self, Question};
use crate::cluster_info;
use crate::error::CommandError;
use crate::failover;
use crate::logs::LogOffset as LogOffsetQuery;
use crate::machines::{self, RemoveMachine, SetMachine, StopMachine};
use crate::moves::{CancelMove, DryRunCommand, MoveOrder};
use crate::records::{self, RecordError};
use crate::spanning::{
    MoveObjectCommand, MoveThreadCommand, ObjectsQuery, PartsQuery, SpanCommand, UnspanCommand,
};
use crate::volumes;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use keel_api::{
    CheckpointInfo, CheckpointRequest, ClusterVolumeInfo, DryRun, EVENTS_DEFAULT, EVENTS_MAX,
    EventLine, LogOffset, MachineDiff, MachineInfo, MoveRequest, NodeInfo, PartsInfo, PruneInfo,
    PruneRequest, RestoreRequest, RunRequest, SetRequest, SpanRequest, StoreInfo, ThreadMove,
    TokenRequest, Uploaded, VolumeCreateRequest, VotersRequest,
};
use keel_cluster::NodeName;
use serde::Deserialize;

pub(super) async fn status(State(at): Shared) -> Reply<keel_api::ClusterInfo> {
    Ok(Json(cluster_info::status(&at.context).await?))
}

pub(super) async fn losses(State(at): Shared) -> Reply<Vec<keel_api::NodeLoss>> {
    Ok(Json(failover::losses(&at.failover).await?))
}

pub(super) async fn nodes(State(at): Shared) -> Reply<Vec<NodeInfo>> {
    Ok(Json(cluster_info::nodes(&at.context).await?))
}

pub(super) async fn store(State(at): Shared) -> Reply<StoreInfo> {
    Ok(Json(cluster_info::store(&at.context).await?))
}

pub(super) async fn backup(State(at): Shared) -> Result<Response, Failure> {
    let bytes = cluster_info::backup(&at.context).await?;
    let all = futures::stream::iter([Ok(bytes::Bytes::from(bytes))]);
    Ok(streamed(all, "application/octet-stream"))
}

pub(super) async fn set_voters(
    State(at): Shared,
    Json(request): Json<VotersRequest>,
) -> Reply<StoreInfo> {
    cluster_info::set_voter_count(&at.context, &request.count).await?;
    Ok(Json(cluster_info::store(&at.context).await?))
}

pub(super) async fn restart_agent(State(at): Shared) -> Reply<keel_api::AgentRestart> {
    Ok(Json(at.restart.begin().await?))
}

pub(super) async fn schedule(State(at): Shared, Path(node): Path<String>) -> Reply<Vec<String>> {
    let node = NodeName::new(&node).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let machines = cluster_info::schedule(&at.context, &node).await?;
    Ok(Json(machines.iter().map(ToString::to_string).collect()))
}

pub(super) async fn tokens(State(at): Shared) -> Reply<Vec<keel_api::TokenInfo>> {
    Ok(Json(cluster_info::tokens(&at.context).await?))
}

pub(super) async fn remove_token(
    State(at): Shared,
    Path(id): Path<String>,
) -> Reply<serde_json::Value> {
    cluster_info::remove_token(&at.context, &id).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn make_token(
    State(at): Shared,
    Json(request): Json<TokenRequest>,
) -> Reply<keel_api::Token> {
    Ok(Json(cluster_info::make_token(&at.context, request).await?))
}

pub(super) async fn upload(State(at): Shared, body: Bytes) -> Reply<Uploaded> {
    let hash = at.images.upload(body).await?;
    Ok(Json(Uploaded { hash }))
}

pub(super) async fn list(State(at): Shared) -> Reply<Vec<MachineInfo>> {
    Ok(Json(at.machines.list().await?))
}

pub(super) async fn run(State(at): Shared, Json(request): Json<RunRequest>) -> Reply<MachineInfo> {
    Ok(Json(machines::run(&at.machines, request).await?))
}

pub(super) async fn inspect(State(at): Shared, Path(name): Path<String>) -> Reply<MachineInfo> {
    Ok(Json(at.machines.inspect(&machine_name(&name)?).await?))
}

pub(super) async fn remove(
    State(at): Shared,
    Path(name): Path<String>,
) -> Reply<serde_json::Value> {
    let machine = machine_name(&name)?;
    at.machines.remove(RemoveMachine { machine }).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn stop(State(at): Shared, Path(name): Path<String>) -> Reply<serde_json::Value> {
    end(&at, &name, false).await
}

pub(super) async fn kill(State(at): Shared, Path(name): Path<String>) -> Reply<serde_json::Value> {
    end(&at, &name, true).await
}

pub(super) async fn end(at: &Handles, name: &str, kill: bool) -> Reply<serde_json::Value> {
    let machine = machine_name(name)?;
    at.machines.stop(StopMachine { machine, kill }).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn cancel_move(
    State(at): Shared,
    Path(name): Path<String>,
) -> Reply<serde_json::Value> {
    let machine = machine_name(&name)?;
    at.moves.cancel(CancelMove { machine }).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn set(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<SetRequest>,
) -> Reply<MachineInfo> {
    let machine = machine_name(&name)?;
    let command = SetMachine {
        machine: machine.clone(),
        request,
    };
    at.machines.set(command).await?;
    Ok(Json(at.machines.inspect(&machine).await?))
}

pub(super) async fn span(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<SpanRequest>,
) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    Ok(Json(
        at.spanning.span(SpanCommand { machine, request }).await?,
    ))
}

pub(super) async fn unspan(State(at): Shared, Path(name): Path<String>) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    let command = UnspanCommand {
        machine: machine.clone(),
    };
    let downtime_micros = at.spanning.unspan(command).await?;
    let mut parts = at.spanning.parts(PartsQuery { machine }).await?;
    parts.downtime_micros = Some(downtime_micros);
    Ok(Json(parts))
}

pub(super) async fn parts(State(at): Shared, Path(name): Path<String>) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    Ok(Json(at.spanning.parts(PartsQuery { machine }).await?))
}

pub(super) async fn objects(
    State(at): Shared,
    Path(name): Path<String>,
) -> Reply<Vec<keel_api::ObjectInfo>> {
    let machine = machine_name(&name)?;
    Ok(Json(at.spanning.objects(ObjectsQuery { machine }).await?))
}

pub(super) async fn move_object(
    State(at): Shared,
    Path((name, object)): Path<(String, String)>,
    Json(request): Json<ThreadMove>,
) -> Reply<keel_api::ObjectMoved> {
    let command = MoveObjectCommand {
        machine: machine_name(&name)?,
        name: object,
        to: request.to,
    };
    let bytes = at.spanning.move_object(command).await?;
    Ok(Json(keel_api::ObjectMoved { bytes }))
}

pub(super) async fn move_thread(
    State(at): Shared,
    Path((name, tid)): Path<(String, u32)>,
    Json(request): Json<ThreadMove>,
) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    let command = MoveThreadCommand {
        machine: machine.clone(),
        tid,
        to: request.to,
    };
    at.spanning.move_thread(command).await?;
    Ok(Json(at.spanning.parts(PartsQuery { machine }).await?))
}

pub(super) async fn diff(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<RunRequest>,
) -> Reply<MachineDiff> {
    let machine = machine_name(&name)?;
    Ok(Json(
        machines::diff(&at.machines, &machine, &request).await?,
    ))
}

pub(super) async fn move_machine(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<MoveRequest>,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    let target =
        NodeName::new(&request.to).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let budget_micros = request.budget_micros();
    let order = MoveOrder {
        budget_micros,
        machine,
        target,
        post_copy: request.post_copy,
        checkpoint_to: request.checkpoint_to,
        urgency: request.urgency,
    };
    let lines = at.moves.move_machine(&order).await?;
    Ok(line_by_line(lines))
}

pub(super) async fn dry_run(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<MoveRequest>,
) -> Reply<DryRun> {
    let machine = machine_name(&name)?;
    let target =
        NodeName::new(&request.to).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let command = DryRunCommand {
        machine,
        target,
        budget_micros: request.budget_micros(),
    };
    Ok(Json(at.moves.dry_run(command).await?))
}

pub(super) async fn checkpoint(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<CheckpointRequest>,
) -> Reply<CheckpointInfo> {
    let machine = machine_name(&name)?;
    let command = CreateCheckpoint { machine, request };
    Ok(Json(at.checkpoints.create(command).await?))
}

#[derive(Deserialize)]
pub(super) struct RepositoryQuery {
    from: Option<String>,
}

pub(super) async fn checkpoints(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<RepositoryQuery>,
) -> Reply<Vec<CheckpointInfo>> {
    let machine = machine_name(&name)?;
    let from = query.from.as_deref();
    Ok(Json(at.checkpoints.list(&machine, from).await?))
}

pub(super) async fn prune(
    State(at): Shared,
    Json(request): Json<PruneRequest>,
) -> Reply<PruneInfo> {
    Ok(Json(at.checkpoints.prune(request).await?))
}

pub(super) async fn restore(
    State(at): Shared,
    Json(request): Json<RestoreRequest>,
) -> Reply<MachineInfo> {
    Ok(Json(machines::restore(&at.machines, request).await?))
}

pub(super) async fn create_volume(
    State(at): Shared,
    Json(request): Json<VolumeCreateRequest>,
) -> Reply<ClusterVolumeInfo> {
    Ok(Json(volumes::create(&at.context, request).await?))
}

pub(super) async fn list_volumes(State(at): Shared) -> Reply<Vec<ClusterVolumeInfo>> {
    Ok(Json(volumes::list(&at.context).await?))
}

pub(super) async fn inspect_volume(
    State(at): Shared,
    Path(name): Path<String>,
) -> Reply<ClusterVolumeInfo> {
    Ok(Json(volumes::inspect(&at.context, &name).await?))
}

#[derive(Deserialize)]
pub(super) struct RemoveVolumeQuery {
    #[serde(default)]
    forget: bool,
}

pub(super) async fn remove_volume(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<RemoveVolumeQuery>,
) -> Reply<serde_json::Value> {
    volumes::remove(&at.context, &name, query.forget).await?;
    Ok(Json(serde_json::json!({})))
}

pub(super) async fn failpoint(
    State(at): Shared,
    Json(request): Json<keel_api::FailpointRequest>,
) -> Reply<serde_json::Value> {
    at.processes.order_failpoint(request).await?;
    Ok(Json(serde_json::json!({})))
}

#[derive(Deserialize)]
pub(super) struct LogQuery {
    #[serde(default)]
    from: u64,
    #[serde(default)]
    follow: bool,
}

pub(super) async fn logs(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    let mut bytes = at.logs.read(&machine, query.from, query.follow).await?;
    // An unreadable output is an error, not an empty answer. A follower waits.
    let first = if query.follow {
        None
    } else {
        bytes.recv().await
    };
    if let Some(Err(error)) = first {
        return Err(CommandError::Unavailable(error).into());
    }
    let rest = futures::stream::unfold(bytes, |mut bytes| async {
        Some((bytes.recv().await?, bytes))
    });
    let all = futures::stream::iter(first).chain(rest);
    Ok(streamed(
        all.map_err(std::io::Error::other),
        "application/octet-stream",
    ))
}

#[derive(Deserialize)]
pub(super) struct OffsetQuery {
    since: u64,
}

pub(super) async fn log_offset(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<OffsetQuery>,
) -> Reply<LogOffset> {
    let command = LogOffsetQuery {
        machine: machine_name(&name)?,
        since_unix_ms: query.since,
    };
    let offset = at.logs.offset_since(command).await?;
    Ok(Json(LogOffset { offset }))
}

#[derive(Deserialize)]
pub(super) struct EventQuery {
    machine: Option<String>,
    #[serde(default)]
    since: u64,
    limit: Option<u32>,
    #[serde(default)]
    follow: bool,
}

pub(super) async fn tell_events(
    State(at): Shared,
    Query(query): Query<EventQuery>,
) -> Result<Response, Failure> {
    let limit = query.limit.unwrap_or(EVENTS_DEFAULT);
    if !(1..=EVENTS_MAX).contains(&limit) {
        let what = format!("a limit of {limit} events: 1 to {EVENTS_MAX} are possible");
        return Err(CommandError::Invalid(what).into());
    }
    let question = Question {
        machine: query.machine.as_deref().map(machine_name).transpose()?,
        since_unix_ms: query.since,
        after: 0,
        limit,
        follow: query.follow,
    };
    let gathered = cluster_events::of_cluster(&at.context, &question).await;
    // Removed machines have events too; a name with neither is a mistake.
    if let Some(machine) = &question.machine
        && gathered.events.is_empty()
        && let Err(error @ RecordError::NoMachine(_)) =
            records::get(&*at.context.store, machine).await
    {
        return Err(CommandError::from(error).into());
    }
    let lines = if question.follow {
        let lines = cluster_events::follow_cluster(&at.context, &question, gathered);
        futures::stream::unfold(lines, |mut lines| async {
            Some((lines.recv().await?, lines))
        })
        .left_stream()
    } else {
        futures::stream::iter(gathered.lines()).right_stream()
    };
    let lines = lines.map(|line: EventLine| {
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Bytes::from(text)
    });
    Ok(streamed(lines.map(Ok), "application/x-ndjson"))
}
