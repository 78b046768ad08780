//! The API: JSON over HTTP on the node's own socket, and over TLS with a
//! token. Only maps requests to `operate`; decides nothing.

mod balance;
mod file;

use crate::agent::Agent;
use crate::events::{self, Question};
use crate::keep;
use crate::moving::MoveOrder;
use crate::operate::{self, Done, OperateError, Operation};
use crate::output;
use crate::record::{self, RecordError};
use crate::state_dir::write_whole;
use crate::volumes;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Extension, Path, Query, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use keel_api::{
    CheckpointInfo, CheckpointRequest, ClusterVolumeInfo, DryRun, EVENTS_DEFAULT, EVENTS_MAX,
    EventLine, LogOffset, MachineDiff, MachineInfo, MoveRequest, NodeInfo, PartsInfo, Problem,
    RestoreRequest, RunRequest, SetRequest, SpanRequest, ThreadMove, TokenRequest, Uploaded,
    VolumeCreateRequest,
};
use keel_cluster::clock::unix_ms;
use keel_cluster::tokens::{self, Role};
use keel_cluster::{MachineName, NodeName};
use serde::Deserialize;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tower::ServiceExt;

/// How long a TLS handshake may take.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);

/// What is said of a request that cannot be, in bytes at most.
const PROBLEM_BYTES_MAX: usize = 64 << 10;

/// Who asks.
#[derive(Debug, Clone, Copy)]
struct Caller(Role);

struct Failure(OperateError);

impl From<OperateError> for Failure {
    fn from(error: OperateError) -> Self {
        Failure(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            OperateError::Bad(_) => StatusCode::BAD_REQUEST,
            OperateError::Missing(_) => StatusCode::NOT_FOUND,
            OperateError::Conflict(_) => StatusCode::CONFLICT,
            OperateError::Away(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        problem(status, self.0.to_string())
    }
}

fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(Problem { error })).into_response()
}

type Reply<T> = Result<Json<T>, Failure>;
type Shared = State<Arc<Agent>>;

fn router(agent: Arc<Agent>) -> Router {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/nodes", get(nodes))
        .route("/v1/schedule/{node}", get(schedule))
        .route("/v1/tokens", post(make_token))
        .route(
            "/v1/modules",
            put(upload).layer(DefaultBodyLimit::max(keel_machine::MODULE_BYTES_MAX)),
        )
        .route("/v1/machines", get(machines).post(run))
        .route("/v1/machines/{name}", get(inspect))
        .route("/v1/machines/{name}", delete(remove))
        .route("/v1/machines/{name}/stop", post(stop))
        .route("/v1/machines/{name}/kill", post(kill))
        .route("/v1/machines/{name}/move", post(move_machine))
        .route("/v1/machines/{name}/dry-run", post(dry_run))
        .route("/v1/machines/{name}/cancel-move", post(cancel_move))
        .route("/v1/machines/{name}/set", post(set))
        .route("/v1/machines/{name}/diff", post(diff))
        .route(
            "/v1/machines/{name}/parts",
            get(parts).post(span).delete(unspan),
        )
        .route("/v1/machines/{name}/threads/{tid}/move", post(move_thread))
        .route("/v1/machines/{name}/objects", get(objects))
        .route(
            "/v1/machines/{name}/objects/{object}/move",
            post(move_object),
        )
        .route(
            "/v1/machines/{name}/files",
            get(file::read)
                .put(file::write)
                .delete(file::remove)
                .layer(DefaultBodyLimit::max(crate::files::PIECE_BYTES_MAX)),
        )
        .route("/v1/machines/{name}/files/stat", get(file::stat))
        .route("/v1/machines/{name}/files/rename", post(file::rename))
        .route("/v1/machines/{name}/logs", get(logs))
        .route("/v1/machines/{name}/logs/offset", get(log_offset))
        .route(
            "/v1/machines/{name}/checkpoints",
            get(checkpoints).post(checkpoint),
        )
        .route("/v1/restore", post(restore))
        .route("/v1/volumes", get(list_volumes).post(create_volume))
        .route(
            "/v1/volumes/{name}",
            get(inspect_volume).delete(remove_volume),
        )
        .route("/v1/balance", get(balance::info))
        .route("/v1/balance/policy", post(balance::change_policy))
        .route("/v1/machines/{name}/confirm-move", post(balance::confirm))
        .route("/v1/machines/{name}/why-not", get(balance::why_not))
        .route("/v1/nodes/{name}/history", get(balance::node_history))
        .route("/v1/machines/{name}/history", get(balance::machine_history))
        .route("/v1/plan", post(balance::make_plan))
        .route("/v1/plan/run", post(balance::carry_out_plan))
        .route(
            "/v1/nodes/{name}/drain",
            get(balance::drain_info)
                .post(balance::begin_drain)
                .delete(balance::end_drain),
        )
        .route("/v1/ledger", get(balance::ledger))
        .route(
            "/v1/rules",
            get(balance::list_rules).post(balance::put_rule),
        )
        .route("/v1/rules/{name}", delete(balance::remove_rule))
        .route("/v1/labels", post(balance::label))
        .route("/v1/events", get(tell_events));
    #[cfg(feature = "failpoints")]
    let router = router.route("/v1/debug/failpoint", post(failpoint));
    router
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "no such request (see /v1)".into()) })
        .layer(middleware::from_fn(in_full))
        .layer(middleware::map_response(in_json))
        .layer(middleware::from_fn(check_role))
        .with_state(agent)
}

/// What is wrong with a request is said in one form, whoever found it.
async fn in_json(response: Response) -> Response {
    let (status, headers) = (response.status(), response.headers());
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if !status.is_client_error() || is_json {
        return response;
    }
    let (mut head, body) = response.into_parts();
    let said = axum::body::to_bytes(body, PROBLEM_BYTES_MAX).await;
    let said = said.unwrap_or_default();
    let mut text = String::from_utf8_lossy(&said).into_owned();
    if text.is_empty() {
        text = format!("{status}: see /v1");
    }
    // (What else was said, as which methods there are, stays.)
    for name in [header::CONTENT_TYPE, header::CONTENT_LENGTH] {
        head.headers.remove(name);
    }
    let mut answer = problem(status, text);
    for (name, value) in &head.headers {
        answer.headers_mut().append(name, value.clone());
    }
    answer
}

/// What changes something is carried out to its end, also where whoever asked has gone
/// meanwhile: a handler that is dropped in the middle leaves on other nodes what it made
/// there.
async fn in_full(request: Request, next: Next) -> Response {
    if request.method() == Method::GET {
        return next.run(request).await;
    }
    let done = tokio::spawn(next.run(request));
    done.await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request was not carried out");
        let text = "this request was not carried out to its end; see the agent's log".into();
        problem(StatusCode::INTERNAL_SERVER_ERROR, text)
    })
}

/// Reading needs a viewer, tokens an admin, everything else an operator, what is in
/// machines' files too.
async fn check_role(request: Request, next: Next) -> Response {
    let needed = match (request.method(), request.uri().path()) {
        (_, "/v1/tokens" | "/v1/debug/failpoint") => Role::Admin,
        (_, path) if path.split('/').nth(4) == Some("files") => Role::Operator,
        (&Method::GET, _) => Role::Viewer,
        _ => Role::Operator,
    };
    match request.extensions().get::<Caller>() {
        Some(Caller(role)) if role.includes(needed) => next.run(request).await,
        Some(_) => problem(
            StatusCode::FORBIDDEN,
            format!("this needs a token of role {needed}"),
        ),
        None => problem(
            StatusCode::UNAUTHORIZED,
            "no valid token (make one with `keel token user`)".into(),
        ),
    }
}

/// Serves until the process is told to stop.
pub(crate) async fn serve(agent: Arc<Agent>) -> std::io::Result<()> {
    let path = agent.dir.api_socket();
    let temporary = agent.dir.root().join("api.new");
    // A socket that exists answers: it is put in place once it listens.
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    std::fs::rename(&temporary, &path)?;
    let router = router(agent.clone());
    if let Some(address) = agent.settings.api {
        let listener = TcpListener::bind(address).await?;
        tokio::spawn(serve_tls(agent.clone(), listener, router.clone()));
    }
    // The socket lies in a folder that only this user can enter.
    let local = router.layer(Extension(Caller(Role::Admin)));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        result = axum::serve(listener, local) => result,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

async fn serve_tls(agent: Arc<Agent>, listener: TcpListener, router: Router) {
    let tls = match agent.identity.server_tls() {
        Ok(tls) => tls,
        Err(error) => {
            tracing::error!(%error, "no API over TLS");
            return;
        }
    };
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection to the API was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (agent, router, tls) = (agent.clone(), router.clone(), tls.clone());
        tokio::spawn(async move {
            match tls
                .accept(stream, &peer.to_string(), HANDSHAKE_PATIENCE)
                .await
            {
                Ok((stream, _)) => serve_one(agent, router, stream, peer).await,
                Err(error) => tracing::debug!(%error, "no TLS with a caller of the API"),
            }
        });
    }
}

async fn serve_one<S>(agent: Arc<Agent>, router: Router, stream: S, peer: SocketAddr)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service =
        hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let (agent, router) = (agent.clone(), router.clone());
            async move {
                let mut request = request.map(Body::new);
                if let Some(token) = bearer(&request)
                    && let Some(caller) = caller(&agent, &token).await
                {
                    request.extensions_mut().insert(caller);
                }
                router.oneshot(request).await
            }
        });
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "a connection to the API broke");
    }
}

fn bearer(request: &Request) -> Option<String> {
    let header = request
        .headers()
        .get(header::AUTHORIZATION)?
        .to_str()
        .ok()?;
    header.strip_prefix("Bearer ").map(str::to_owned)
}

async fn caller(agent: &Agent, token: &str) -> Option<Caller> {
    match tokens::verify_user_token(&*agent.store, token, unix_ms()).await {
        Ok(user) => Some(Caller(user.role)),
        Err(error) => {
            tracing::info!(%error, "a token was refused");
            None
        }
    }
}

fn machine_name(name: &str) -> Result<MachineName, Failure> {
    MachineName::new(name).map_err(|error| Failure(OperateError::Bad(error.to_string())))
}

async fn status(State(agent): Shared) -> Reply<keel_api::ClusterInfo> {
    Ok(Json(operate::status(&agent).await?))
}

async fn nodes(State(agent): Shared) -> Reply<Vec<NodeInfo>> {
    Ok(Json(operate::nodes(&agent).await?))
}

async fn schedule(State(agent): Shared, Path(node): Path<String>) -> Reply<Vec<String>> {
    let node = NodeName::new(&node).map_err(|error| OperateError::Bad(error.to_string()))?;
    if !agent.members.contains(&node) {
        return Err(OperateError::Missing(format!("there is no node {node:?}")).into());
    }
    let machines = record::schedule(&*agent.store, &node)
        .await
        .map_err(OperateError::from)?;
    Ok(Json(machines.iter().map(ToString::to_string).collect()))
}

async fn make_token(
    State(agent): Shared,
    Json(request): Json<TokenRequest>,
) -> Reply<keel_api::Token> {
    Ok(Json(operate::make_token(&agent, request).await?))
}

async fn upload(State(agent): Shared, body: Bytes) -> Reply<Uploaded> {
    if !body.starts_with(b"\0asm") {
        let what = "that is not a WebAssembly module (it does not begin with \\0asm)";
        return Err(OperateError::Bad(what.into()).into());
    }
    let kept = tokio::task::spawn_blocking(move || {
        let hash = blake3::hash(&body).to_hex().to_string();
        let path = agent.dir.module(&hash);
        if !path.exists() {
            write_whole(&path, &body)
                .map_err(|error| OperateError::Away(format!("{}: {error}", path.display())))?;
        }
        Ok::<_, OperateError>(hash)
    })
    .await
    .map_err(|error| OperateError::Away(error.to_string()))??;
    Ok(Json(Uploaded { module: kept }))
}

async fn machines(State(agent): Shared) -> Reply<Vec<MachineInfo>> {
    Ok(Json(operate::list(&agent).await?))
}

async fn run(State(agent): Shared, Json(request): Json<RunRequest>) -> Reply<MachineInfo> {
    Ok(Json(operate::run(&agent, request).await?))
}

async fn inspect(State(agent): Shared, Path(name): Path<String>) -> Reply<MachineInfo> {
    Ok(Json(operate::inspect(&agent, &machine_name(&name)?).await?))
}

async fn remove(State(agent): Shared, Path(name): Path<String>) -> Reply<serde_json::Value> {
    let machine = machine_name(&name)?;
    operate::anywhere(&agent, Operation::Remove { machine }).await?;
    Ok(Json(serde_json::json!({})))
}

async fn stop(State(agent): Shared, Path(name): Path<String>) -> Reply<serde_json::Value> {
    end(&agent, &name, false).await
}

async fn kill(State(agent): Shared, Path(name): Path<String>) -> Reply<serde_json::Value> {
    end(&agent, &name, true).await
}

async fn end(agent: &Arc<Agent>, name: &str, kill: bool) -> Reply<serde_json::Value> {
    let machine = machine_name(name)?;
    operate::anywhere(agent, Operation::Stop { machine, kill }).await?;
    Ok(Json(serde_json::json!({})))
}

async fn cancel_move(State(agent): Shared, Path(name): Path<String>) -> Reply<serde_json::Value> {
    let machine = machine_name(&name)?;
    operate::anywhere(&agent, Operation::CancelMove { machine }).await?;
    Ok(Json(serde_json::json!({})))
}

async fn set(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<SetRequest>,
) -> Reply<MachineInfo> {
    let machine = machine_name(&name)?;
    let operation = Operation::Set {
        machine: machine.clone(),
        request,
    };
    operate::anywhere(&agent, operation).await?;
    Ok(Json(operate::inspect(&agent, &machine).await?))
}

async fn told_parts(agent: &Arc<Agent>, operation: Operation) -> Reply<PartsInfo> {
    match operate::anywhere(agent, operation).await? {
        Done::Parts(parts) => Ok(Json(parts)),
        _ => Err(OperateError::Away("its owner answers something else".into()).into()),
    }
}

async fn span(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<SpanRequest>,
) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    told_parts(&agent, Operation::Span { machine, request }).await
}

async fn unspan(State(agent): Shared, Path(name): Path<String>) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    let unspan = Operation::Unspan {
        machine: machine.clone(),
    };
    let stood = match operate::anywhere(&agent, unspan).await? {
        Done::Offset(stood) => Some(stood),
        _ => None,
    };
    let mut told = told_parts(&agent, Operation::Parts { machine }).await?;
    told.stood_micros = stood;
    Ok(told)
}

async fn parts(State(agent): Shared, Path(name): Path<String>) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    told_parts(&agent, Operation::Parts { machine }).await
}

async fn objects(
    State(agent): Shared,
    Path(name): Path<String>,
) -> Reply<Vec<keel_api::ObjectInfo>> {
    let machine = machine_name(&name)?;
    match operate::anywhere(&agent, Operation::Objects { machine }).await? {
        Done::Objects(objects) => Ok(Json(objects)),
        _ => Err(OperateError::Away("its owner answers something else".into()).into()),
    }
}

async fn move_object(
    State(agent): Shared,
    Path((name, object)): Path<(String, String)>,
    Json(request): Json<ThreadMove>,
) -> Reply<keel_api::ObjectMoved> {
    let machine = machine_name(&name)?;
    let order = Operation::MoveObject {
        machine,
        name: object,
        to: request.to,
    };
    match operate::anywhere(&agent, order).await? {
        Done::Offset(bytes) => Ok(Json(keel_api::ObjectMoved { bytes })),
        _ => Err(OperateError::Away("its owner answers something else".into()).into()),
    }
}

async fn move_thread(
    State(agent): Shared,
    Path((name, tid)): Path<(String, u32)>,
    Json(request): Json<ThreadMove>,
) -> Reply<PartsInfo> {
    let machine = machine_name(&name)?;
    let order = Operation::MoveThread {
        machine: machine.clone(),
        tid,
        to: request.to,
    };
    operate::anywhere(&agent, order).await?;
    told_parts(&agent, Operation::Parts { machine }).await
}

async fn diff(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<RunRequest>,
) -> Reply<MachineDiff> {
    let machine = machine_name(&name)?;
    Ok(Json(crate::diff::diff(&agent, &machine, &request).await?))
}

async fn move_machine(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<MoveRequest>,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    let target =
        NodeName::new(&request.to).map_err(|error| OperateError::Bad(error.to_string()))?;
    let budget_micros = request.budget_micros();
    let order = MoveOrder {
        budget_micros,
        machine,
        target,
        post_copy: request.post_copy,
        checkpoint_to: request.checkpoint_to,
        urgency: request.urgency,
    };
    let lines = operate::move_anywhere(&agent, &order).await?;
    Ok(told_line_by_line(lines))
}

/// Lines as they come, as JSON.
fn told_line_by_line<T: serde::Serialize + Send + 'static>(
    lines: tokio::sync::mpsc::Receiver<T>,
) -> Response {
    let lines = futures::stream::unfold(lines, |mut lines| async {
        let line = lines.recv().await?;
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Some((Bytes::from(text), lines))
    });
    streamed(lines.map(Ok), "application/x-ndjson")
}

async fn dry_run(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<MoveRequest>,
) -> Reply<DryRun> {
    let machine = machine_name(&name)?;
    let target =
        NodeName::new(&request.to).map_err(|error| OperateError::Bad(error.to_string()))?;
    let operation = Operation::DryRun {
        machine,
        target,
        budget_micros: request.budget_micros(),
    };
    match operate::anywhere(&agent, operation).await? {
        Done::DryRun(dry_run) => Ok(Json(*dry_run)),
        _ => Err(OperateError::Away("the node answered something else".into()).into()),
    }
}

async fn checkpoint(
    State(agent): Shared,
    Path(name): Path<String>,
    Json(request): Json<CheckpointRequest>,
) -> Reply<CheckpointInfo> {
    let machine = machine_name(&name)?;
    let operation = Operation::Checkpoint { machine, request };
    match operate::anywhere(&agent, operation).await? {
        Done::Checkpoint(info) => Ok(Json(info)),
        _ => Err(OperateError::Away("the node answered something else".into()).into()),
    }
}

#[derive(Deserialize)]
struct VaultQuery {
    from: Option<String>,
}

async fn checkpoints(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(query): Query<VaultQuery>,
) -> Reply<Vec<CheckpointInfo>> {
    let machine = machine_name(&name)?;
    Ok(Json(
        keep::list(&agent, &machine, query.from.as_deref()).await?,
    ))
}

async fn restore(State(agent): Shared, Json(request): Json<RestoreRequest>) -> Reply<MachineInfo> {
    Ok(Json(keep::restore(&agent, request).await?))
}

async fn create_volume(
    State(agent): Shared,
    Json(request): Json<VolumeCreateRequest>,
) -> Reply<ClusterVolumeInfo> {
    Ok(Json(volumes::create(&agent, request).await?))
}

async fn list_volumes(State(agent): Shared) -> Reply<Vec<ClusterVolumeInfo>> {
    Ok(Json(volumes::list(&agent).await?))
}

async fn inspect_volume(
    State(agent): Shared,
    Path(name): Path<String>,
) -> Reply<ClusterVolumeInfo> {
    Ok(Json(volumes::inspect(&agent, &name).await?))
}

#[derive(Deserialize)]
struct RemoveVolumeQuery {
    #[serde(default)]
    forget: bool,
}

async fn remove_volume(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(query): Query<RemoveVolumeQuery>,
) -> Reply<serde_json::Value> {
    volumes::remove(&agent, &name, query.forget).await?;
    Ok(Json(serde_json::json!({})))
}

#[cfg(feature = "failpoints")]
async fn failpoint(
    State(agent): Shared,
    Json(request): Json<keel_api::FailpointRequest>,
) -> Reply<serde_json::Value> {
    crate::debug::order(&agent, request).await?;
    Ok(Json(serde_json::json!({})))
}

#[derive(Deserialize)]
struct LogQuery {
    #[serde(default)]
    from: u64,
    #[serde(default)]
    follow: bool,
}

async fn logs(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    let mut bytes = output::anywhere(&agent, &machine, query.from, query.follow).await?;
    // What cannot be read at all is an error, and no empty answer. (A follower waits.)
    let first = if query.follow {
        None
    } else {
        bytes.recv().await
    };
    if let Some(Err(error)) = first {
        return Err(OperateError::Away(error).into());
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
struct OffsetQuery {
    since: u64,
}

async fn log_offset(
    State(agent): Shared,
    Path(name): Path<String>,
    Query(query): Query<OffsetQuery>,
) -> Reply<LogOffset> {
    let operation = Operation::LogSince {
        machine: machine_name(&name)?,
        since_unix_ms: query.since,
    };
    match operate::anywhere(&agent, operation).await? {
        Done::Offset(offset) => Ok(Json(LogOffset { offset })),
        _ => Err(OperateError::Away("the node answered something else".into()).into()),
    }
}

#[derive(Deserialize)]
struct EventQuery {
    machine: Option<String>,
    #[serde(default)]
    since: u64,
    limit: Option<u32>,
    #[serde(default)]
    follow: bool,
}

async fn tell_events(
    State(agent): Shared,
    Query(query): Query<EventQuery>,
) -> Result<Response, Failure> {
    let limit = query.limit.unwrap_or(EVENTS_DEFAULT);
    if !(1..=EVENTS_MAX).contains(&limit) {
        let what = format!("a limit of {limit} events: 1 to {EVENTS_MAX} are possible");
        return Err(OperateError::Bad(what).into());
    }
    let question = Question {
        machine: query.machine.as_deref().map(machine_name).transpose()?,
        since_unix_ms: query.since,
        after: 0,
        limit,
        follow: query.follow,
    };
    let gathered = events::of_cluster(&agent, &question).await;
    // Removed machines have events too; a name without either is a mistake.
    if let Some(machine) = &question.machine
        && gathered.events.is_empty()
        && let Err(error @ RecordError::NoMachine(_)) = record::get(&*agent.store, machine).await
    {
        return Err(OperateError::from(error).into());
    }
    let lines = if question.follow {
        let lines = events::follow_cluster(&agent, &question, gathered);
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

/// An answer that comes in pieces. After an error it is broken off: whoever reads it is
/// told that it is not whole.
fn streamed(
    stream: impl futures::Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    content: &'static str,
) -> Response {
    let body = Body::from_stream(stream);
    ([(header::CONTENT_TYPE, content)], body).into_response()
}
