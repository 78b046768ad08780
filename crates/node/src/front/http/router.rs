//! The handler of each request, and the role that it needs.

use super::super::handles::Handles;
use super::caller::Caller;
use super::reply::problem;
use super::{audit, balance, file, handlers, health};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post, put};
use keel_cluster::tokens::Role;
use keel_machine::failpoint;
use std::sync::Arc;

/// The most bytes of the text about an invalid request.
const PROBLEM_BYTES_MAX: usize = 64 << 10;

pub(super) fn router(handles: Arc<Handles>) -> Router {
    let image_bytes_max = handles.context.kinds.image_bytes_max();
    let router = Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(health::metrics))
        .route("/v1/status", get(handlers::status))
        .route("/v1/nodes", get(handlers::nodes))
        .route("/v1/failover", get(handlers::losses))
        .route("/v1/store", get(handlers::store))
        .route("/v1/store/voters", post(handlers::set_voters))
        .route("/v1/store/backup", get(handlers::backup))
        .route("/v1/schedule/{node}", get(handlers::schedule))
        .route(
            "/v1/tokens",
            get(handlers::tokens).post(handlers::make_token),
        )
        .route("/v1/tokens/{id}", delete(handlers::remove_token))
        .route("/v1/agent/restart", post(handlers::restart_agent))
        .route("/v1/audit", get(audit::log))
        .route(
            "/v1/images",
            put(handlers::upload).layer(DefaultBodyLimit::max(image_bytes_max)),
        )
        .route("/v1/machines", get(handlers::list).post(handlers::run))
        .route("/v1/machines/{name}", get(handlers::inspect))
        .route("/v1/machines/{name}", delete(handlers::remove))
        .route("/v1/machines/{name}/stop", post(handlers::stop))
        .route("/v1/machines/{name}/kill", post(handlers::kill))
        .route("/v1/machines/{name}/move", post(handlers::move_machine))
        .route("/v1/machines/{name}/dry-run", post(handlers::dry_run))
        .route(
            "/v1/machines/{name}/cancel-move",
            post(handlers::cancel_move),
        )
        .route("/v1/machines/{name}/set", post(handlers::set))
        .route("/v1/machines/{name}/diff", post(handlers::diff))
        .route(
            "/v1/machines/{name}/parts",
            get(handlers::parts)
                .post(handlers::span)
                .delete(handlers::unspan),
        )
        .route(
            "/v1/machines/{name}/threads/{tid}/move",
            post(handlers::move_thread),
        )
        .route("/v1/machines/{name}/objects", get(handlers::objects))
        .route(
            "/v1/machines/{name}/objects/{object}/move",
            post(handlers::move_object),
        )
        .route(
            "/v1/machines/{name}/files",
            get(file::read)
                .put(file::write)
                .delete(file::remove)
                .layer(DefaultBodyLimit::max(crate::volumes::PIECE_BYTES_MAX)),
        )
        .route("/v1/machines/{name}/files/stat", get(file::stat))
        .route("/v1/machines/{name}/files/rename", post(file::rename))
        .route("/v1/machines/{name}/logs", get(handlers::logs))
        .route("/v1/machines/{name}/logs/offset", get(handlers::log_offset))
        .route(
            "/v1/machines/{name}/checkpoints",
            get(handlers::checkpoints).post(handlers::checkpoint),
        )
        .route("/v1/checkpoints/prune", post(handlers::prune))
        .route("/v1/restore", post(handlers::restore))
        .route(
            "/v1/volumes",
            get(handlers::list_volumes).post(handlers::create_volume),
        )
        .route(
            "/v1/volumes/{name}",
            get(handlers::inspect_volume).delete(handlers::remove_volume),
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
        .route("/v1/events", get(handlers::tell_events));
    let router = match failpoint::is_enabled() {
        true => router.route("/v1/debug/failpoint", post(handlers::failpoint)),
        false => router,
    };
    router
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "no such request (see /v1)".into()) })
        .layer(middleware::from_fn_with_state(handles.clone(), audit::keep))
        .layer(middleware::from_fn(in_full))
        .layer(middleware::map_response(in_json))
        .layer(middleware::from_fn(check_role))
        .with_state(handles)
}

/// Errors have one form, whichever layer detected them.
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
    // Other headers, as the allowed methods, stay.
    for name in [header::CONTENT_TYPE, header::CONTENT_LENGTH] {
        head.headers.remove(name);
    }
    let mut answer = problem(status, text);
    for (name, value) in &head.headers {
        answer.headers_mut().append(name, value.clone());
    }
    answer
}

/// A request that changes state is carried out to its end, even if the client disconnects: a
/// handler that is dropped half-way would leave its partial results on other nodes.
async fn in_full(request: Request, next: Next) -> Response {
    if request.method() == Method::GET {
        return next.run(request).await;
    }
    let done = tokio::spawn(next.run(request));
    done.await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request handler failed");
        let text = "this request was not completed; see the agent's log".into();
        problem(StatusCode::INTERNAL_SERVER_ERROR, text)
    })
}

/// Reading needs a viewer; tokens, the audit log, backups and restarts of an agent an admin;
/// everything else an operator, including the content of machines' files.
async fn check_role(request: Request, next: Next) -> Response {
    if matches!(request.uri().path(), "/healthz" | "/readyz") {
        // Those who ask have no token, as load balancers.
        return next.run(request).await;
    }
    let needed = match (request.method(), request.uri().path()) {
        (
            _,
            "/v1/tokens"
            | "/v1/audit"
            | "/v1/store/backup"
            | "/v1/agent/restart"
            | "/v1/debug/failpoint",
        ) => Role::Admin,
        (_, path) if path.starts_with("/v1/tokens/") => Role::Admin,
        (_, path) if path.split('/').nth(4) == Some("files") => Role::Operator,
        (&Method::GET, _) => Role::Viewer,
        _ => Role::Operator,
    };
    match request.extensions().get::<Caller>() {
        Some(Caller { role, .. }) if role.includes(needed) => next.run(request).await,
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
