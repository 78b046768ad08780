//! The handler of each request.

use super::super::handles::Handles;
use super::caller::check_role;
use super::openapi::{self, DescribedRoutes, Document};
use super::reply::problem;
use super::{audit, balance, cluster, display, file, handlers, health, image, logs, volume};
use axum::Router;
use axum::extract::{DefaultBodyLimit, Extension, Request};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::post;
use keel_machine::failpoint;
use std::sync::Arc;
use utoipa_axum::router::UtoipaMethodRouterExt;
use utoipa_axum::routes;

/// The most bytes of the text about an invalid request.
const PROBLEM_BYTES_MAX: usize = 64 << 10;

/// The router of all requests.
///
/// # Errors
/// If the description of the requests cannot be encoded.
pub(super) fn router(handles: Arc<Handles>) -> Result<Router, serde_json::Error> {
    let (router, description) = described().split();
    let document = Document::new(&description)?;
    let audit = Arc::new(audit::Audit::new(handles.clone()));
    // Tests alone use it.
    let router = match failpoint::is_enabled() {
        true => router.route("/v1/debug/failpoint", post(handlers::failpoint)),
        false => router,
    };
    Ok(router
        .fallback(|| async {
            problem(
                StatusCode::NOT_FOUND,
                "no such request (see /v1/openapi.json)".into(),
            )
        })
        .layer(Extension(document))
        .layer(middleware::from_fn(check_role))
        .layer(middleware::from_fn_with_state(audit, audit::keep))
        .layer(middleware::from_fn(in_full))
        .layer(middleware::map_response(in_json))
        .with_state(handles))
}

/// The handlers. `routes!` takes those of one path.
pub(super) fn described() -> DescribedRoutes {
    // The kind of an image decides how large it may be.
    let images = DefaultBodyLimit::disable();
    let pieces = DefaultBodyLimit::max(crate::volumes::PIECE_BYTES_MAX);
    DescribedRoutes::new()
        .add(routes!(health::healthz))
        .add(routes!(health::readyz))
        .add(routes!(health::metrics))
        .add(routes!(openapi::document))
        .add(routes!(cluster::status))
        .add(routes!(cluster::nodes))
        .add(routes!(cluster::remove_node))
        .add(routes!(cluster::give_up_node))
        .add(routes!(cluster::losses))
        .add(routes!(cluster::store))
        .add(routes!(cluster::set_voters))
        .add(routes!(cluster::backup))
        .add(routes!(cluster::schedule))
        .add(routes!(cluster::tokens, cluster::make_token))
        .add(routes!(cluster::remove_token))
        .add(routes!(cluster::authority, cluster::set_authority))
        .add(routes!(cluster::rotate_authority))
        .add(routes!(cluster::restart_agent))
        .add(routes!(audit::log))
        .add(routes!(image::upload, image::list_images).layer(images))
        .add(routes!(
            image::inspect_image,
            image::name_image,
            image::remove_image
        ))
        .add(routes!(image::find_file))
        .add(routes!(handlers::list, handlers::run))
        .add(routes!(handlers::inspect, handlers::remove))
        .add(routes!(handlers::start_again))
        .add(routes!(handlers::stop))
        .add(routes!(handlers::kill))
        .add(routes!(handlers::execute))
        .add(routes!(handlers::system))
        .add(routes!(handlers::type_in))
        .add(routes!(display::view))
        .add(routes!(handlers::move_machine))
        .add(routes!(handlers::dry_run))
        .add(routes!(handlers::cancel_move))
        .add(routes!(handlers::set))
        .add(routes!(handlers::diff))
        .add(routes!(handlers::parts, handlers::span, handlers::unspan))
        .add(routes!(handlers::move_thread))
        .add(routes!(handlers::objects))
        .add(routes!(handlers::move_object))
        .add(routes!(file::read, file::write, file::remove).layer(pieces))
        .add(routes!(file::stat))
        .add(routes!(file::rename))
        .add(routes!(logs::logs))
        .add(routes!(logs::log_offset))
        .add(routes!(handlers::checkpoints, handlers::checkpoint))
        .add(routes!(handlers::prune))
        .add(routes!(handlers::quota, handlers::set_quota))
        .add(routes!(handlers::restore))
        .add(routes!(volume::list_volumes, volume::create_volume))
        .add(routes!(volume::inspect_volume, volume::remove_volume))
        .add(routes!(balance::info))
        .add(routes!(balance::change_policy))
        .add(routes!(balance::confirm))
        .add(routes!(balance::why_not))
        .add(routes!(balance::node_history))
        .add(routes!(balance::machine_history))
        .add(routes!(balance::make_plan))
        .add(routes!(balance::carry_out_plan))
        .add(routes!(
            balance::drain_info,
            balance::begin_drain,
            balance::end_drain
        ))
        .add(routes!(balance::ledger))
        .add(routes!(balance::list_rules, balance::put_rule))
        .add(routes!(balance::remove_rule))
        .add(routes!(balance::label))
        .add(routes!(logs::tell_events))
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
        text = format!("{status}: see /v1/openapi.json");
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
