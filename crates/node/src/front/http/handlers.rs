//! Requests about machines, their moves, parts and checkpoints.

use super::super::handles::Handles;
use super::caller::{BearerToken, until_refused};
use super::openapi::RawBytes;
use super::reply::{Failure, Reply, Shared, line_by_line, machine_name, problem};
use crate::checkpoints::CreateCheckpoint;
use crate::error::CommandError;
use crate::machines::{self, RemoveMachine, SetMachine, StopMachine, SystemQuery};
use crate::moves::{CancelMove, DryRunCommand, MoveOrder};
use crate::spanning::{
    MoveObjectCommand, MoveThreadCommand, ObjectsQuery, PartsQuery, SpanCommand, UnspanCommand,
};
use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use keel_api::{
    CheckpointInfo, CheckpointRequest, DryRun, ExecuteLine, ExecuteRequest, MachineDiff,
    MachineInfo, MoveLine, MoveRequest, Nothing, ObjectInfo, ObjectMoved, PartsInfo, PruneInfo,
    PruneRequest, QuotaInfo, QuotaRequest, RestoreRequest, RunRequest, SetRequest, SpanRequest,
    SystemInfo, ThreadMove,
};
use keel_cluster::NodeName;
use serde::Deserialize;
use utoipa::IntoParams;

/// All machines, ended ones included.
#[utoipa::path(
    get,
    path = "/v1/machines",
    operation_id = "list_machines",
    tag = "machines",
    responses((status = 200, description = "Success", body = Vec<MachineInfo>))
)]
pub(super) async fn list(State(at): Shared) -> Reply<Vec<MachineInfo>> {
    Ok(Json(at.machines.list().await?))
}

/// Starts a machine.
///
/// The answer does not wait until it runs.
#[utoipa::path(
    post,
    path = "/v1/machines",
    operation_id = "run_machine",
    tag = "machines",
    responses((status = 200, description = "Success", body = MachineInfo))
)]
pub(super) async fn run(State(at): Shared, Json(request): Json<RunRequest>) -> Reply<MachineInfo> {
    Ok(Json(machines::run(&at.machines, request).await?))
}

/// One machine.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}",
    operation_id = "get_machine",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = MachineInfo))
)]
pub(super) async fn inspect(State(at): Shared, Path(name): Path<String>) -> Reply<MachineInfo> {
    Ok(Json(at.machines.inspect(&machine_name(&name)?).await?))
}

/// Removes a machine that has ended, with its output.
#[utoipa::path(
    delete,
    path = "/v1/machines/{name}",
    operation_id = "remove_machine",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn remove(State(at): Shared, Path(name): Path<String>) -> Reply<Nothing> {
    let machine = machine_name(&name)?;
    at.machines.remove(RemoveMachine { machine }).await?;
    Ok(Json(Nothing {}))
}

/// Starts a machine again that has ended.
///
/// It begins anew on the node where it ended, and keeps its output and its own disk. The answer does
/// not wait until it runs.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/start",
    operation_id = "start_machine",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = MachineInfo))
)]
pub(super) async fn start_again(State(at): Shared, Path(name): Path<String>) -> Reply<MachineInfo> {
    let machine = machine_name(&name)?;
    Ok(Json(machines::start_again(&at.machines, &machine).await?))
}

/// Stops a machine at its next safepoint.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/stop",
    operation_id = "stop_machine",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn stop(State(at): Shared, Path(name): Path<String>) -> Reply<Nothing> {
    end(&at, &name, false).await
}

/// Kills the process of a machine.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/kill",
    operation_id = "kill_machine",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn kill(State(at): Shared, Path(name): Path<String>) -> Reply<Nothing> {
    end(&at, &name, true).await
}

pub(super) async fn end(at: &Handles, name: &str, kill: bool) -> Reply<Nothing> {
    let machine = machine_name(name)?;
    at.machines.stop(StopMachine { machine, kill }).await?;
    Ok(Json(Nothing {}))
}

/// Executes a command in a machine, by its guest agent.
///
/// The answer is one `ExecuteLine` per line, the last of which is the command's end or an error. The
/// command goes on if nobody reads them.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/execute",
    operation_id = "execute_command",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Lines while it runs, then its end or an error", body = ExecuteLine, content_type = "application/x-ndjson"))
)]
pub(super) async fn execute(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<ExecuteRequest>,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    Ok(line_by_line(at.machines.execute(machine, request).await?))
}

/// What the guest agent of a machine tells of the system in it.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/system",
    operation_id = "inspect_system",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = SystemInfo))
)]
pub(super) async fn system(State(at): Shared, Path(name): Path<String>) -> Reply<SystemInfo> {
    let machine = machine_name(&name)?;
    Ok(Json(at.machines.system(SystemQuery { machine }).await?))
}

/// Types what comes into the console of a machine, as it comes.
///
/// The answer comes once all of it was typed, or as soon as it cannot be. What the machine prints is
/// in its log.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/input",
    operation_id = "type_in",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    request_body(content = RawBytes, content_type = "application/octet-stream"),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn type_in(
    State(at): Shared,
    Path(name): Path<String>,
    token: Option<Extension<BearerToken>>,
    body: Body,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    tokio::select! {
        typed = at.machines.type_in(machine, body.into_data_stream()) => {
            typed?;
            Ok(Json(Nothing {}).into_response())
        }
        error = until_refused(token, &at.context) => Ok(problem(StatusCode::UNAUTHORIZED, error.to_string())),
    }
}

/// Cancels the move of a machine, which stays where it is.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/cancel-move",
    operation_id = "cancel_move",
    tag = "moves",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = Nothing))
)]
pub(super) async fn cancel_move(State(at): Shared, Path(name): Path<String>) -> Reply<Nothing> {
    let machine = machine_name(&name)?;
    at.moves.cancel(CancelMove { machine }).await?;
    Ok(Json(Nothing {}))
}

/// Changes settings of a machine while it runs.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/set",
    operation_id = "set_machine",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = MachineInfo))
)]
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

/// Gives a machine parts on several nodes, or other parts than it has.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/parts",
    operation_id = "set_parts",
    tag = "parts",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = PartsInfo))
)]
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

/// Removes all parts of a machine but its home.
#[utoipa::path(
    delete,
    path = "/v1/machines/{name}/parts",
    operation_id = "remove_parts",
    tag = "parts",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = PartsInfo))
)]
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

/// The parts of a machine, and its threads.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/parts",
    operation_id = "get_parts",
    tag = "parts",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = PartsInfo))
)]
pub(super) async fn parts(State(at): Shared, Path(name): Path<String>) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    Ok(Json(at.spanning.parts(PartsQuery { machine }).await?))
}

/// Ranges of the memory of a spanning machine, by the parts that hold them.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/objects",
    operation_id = "list_objects",
    tag = "parts",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = Vec<ObjectInfo>))
)]
pub(super) async fn objects(State(at): Shared, Path(name): Path<String>) -> Reply<Vec<ObjectInfo>> {
    let machine = machine_name(&name)?;
    Ok(Json(at.spanning.objects(ObjectsQuery { machine }).await?))
}

/// Moves an object of a spanning machine to another part.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/objects/{object}/move",
    operation_id = "move_object",
    tag = "parts",
    params(("name", description = "Name of the machine."), ("object", description = "Name of the object, or its range as in the list.")),
    responses((status = 200, description = "Success", body = ObjectMoved))
)]
pub(super) async fn move_object(
    State(at): Shared,
    Path((name, object)): Path<(String, String)>,
    Json(request): Json<ThreadMove>,
) -> Reply<ObjectMoved> {
    let command = MoveObjectCommand {
        machine: machine_name(&name)?,
        name: object,
        to: request.to,
    };
    let bytes = at.spanning.move_object(command).await?;
    Ok(Json(ObjectMoved { bytes }))
}

/// Moves a thread of a spanning machine to another part.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/threads/{tid}/move",
    operation_id = "move_thread",
    tag = "parts",
    params(("name", description = "Name of the machine."), ("tid", description = "Number of the thread.")),
    responses((status = 200, description = "Success", body = PartsInfo))
)]
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

/// Compares a machine with a request to start it. Nothing is changed.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/diff",
    operation_id = "compare_machine",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = MachineDiff))
)]
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

/// Moves a machine to another node.
///
/// The answer is one `MoveLine` per line, the last of which is a report or an error.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/move",
    operation_id = "move_machine",
    tag = "moves",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Lines of progress, then the report or an error", body = MoveLine, content_type = "application/x-ndjson"))
)]
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

/// Predicts a move. Nothing is started.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/dry-run",
    operation_id = "predict_move",
    tag = "moves",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = DryRun))
)]
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

/// Creates a checkpoint of a machine.
#[utoipa::path(
    post,
    path = "/v1/machines/{name}/checkpoints",
    operation_id = "create_checkpoint",
    tag = "checkpoints",
    params(("name", description = "Name of the machine.")),
    responses((status = 200, description = "Success", body = CheckpointInfo))
)]
pub(super) async fn checkpoint(
    State(at): Shared,
    Path(name): Path<String>,
    Json(request): Json<CheckpointRequest>,
) -> Reply<CheckpointInfo> {
    let machine = machine_name(&name)?;
    let command = CreateCheckpoint { machine, request };
    Ok(Json(at.checkpoints.create(command).await?))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct RepositoryQuery {
    /// URL of the repository; the own folder of the node if absent.
    from: Option<String>,
}

/// The checkpoints of a machine, in one repository.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/checkpoints",
    operation_id = "list_checkpoints",
    tag = "checkpoints",
    params(("name", description = "Name of the machine."), RepositoryQuery),
    responses((status = 200, description = "Success", body = Vec<CheckpointInfo>))
)]
pub(super) async fn checkpoints(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<RepositoryQuery>,
) -> Reply<Vec<CheckpointInfo>> {
    let machine = machine_name(&name)?;
    let from = query.from.as_deref();
    Ok(Json(at.checkpoints.list(&machine, from).await?))
}

/// Deletes checkpoints that are not to be kept, and what killed writers left.
///
/// The newest checkpoint of each machine stays, and whatever those that stay need.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/prune",
    operation_id = "prune_checkpoints",
    tag = "checkpoints",
    responses((status = 200, description = "Success", body = PruneInfo))
)]
pub(super) async fn prune(
    State(at): Shared,
    Json(request): Json<PruneRequest>,
) -> Reply<PruneInfo> {
    Ok(Json(at.checkpoints.prune(request).await?))
}

/// How much is stored in a place, and its quota.
#[utoipa::path(
    get,
    path = "/v1/checkpoints/quota",
    operation_id = "get_checkpoint_quota",
    tag = "checkpoints",
    params(RepositoryQuery),
    responses((status = 200, description = "Success", body = QuotaInfo))
)]
pub(super) async fn quota(
    State(at): Shared,
    Query(query): Query<RepositoryQuery>,
) -> Reply<QuotaInfo> {
    Ok(Json(at.checkpoints.quota(query.from.as_deref()).await?))
}

/// Sets or removes the quota of a place.
///
/// What is stored there stays, also if it is more; then no other checkpoint is created.
#[utoipa::path(
    post,
    path = "/v1/checkpoints/quota",
    operation_id = "set_checkpoint_quota",
    tag = "checkpoints",
    responses((status = 200, description = "Success", body = QuotaInfo))
)]
pub(super) async fn set_quota(
    State(at): Shared,
    Json(request): Json<QuotaRequest>,
) -> Reply<QuotaInfo> {
    Ok(Json(at.checkpoints.set_quota(request).await?))
}

/// Creates a machine from a checkpoint, or runs the same one again.
#[utoipa::path(
    post,
    path = "/v1/restore",
    operation_id = "restore_machine",
    tag = "checkpoints",
    responses((status = 200, description = "Success", body = MachineInfo))
)]
pub(super) async fn restore(
    State(at): Shared,
    Json(request): Json<RestoreRequest>,
) -> Reply<MachineInfo> {
    Ok(Json(machines::restore(&at.machines, request).await?))
}

pub(super) async fn failpoint(
    State(at): Shared,
    Json(request): Json<keel_api::FailpointRequest>,
) -> Reply<Nothing> {
    at.processes.order_failpoint(request).await?;
    Ok(Json(Nothing {}))
}
