//! Enters requests that change something in the audit log, before they are carried out; and
//! requests that are refused because their user lacks the role.

use super::super::handles::Handles;
use super::caller::{Caller, needed_role};
use super::reply::{Failure, Reply, problem};
use crate::error::CommandError;
use crate::records::{AuditRecord, audit_log, begin_audit, end_audit};
use axum::Json;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use keel_api::{AUDIT_DEFAULT, AUDIT_MAX, AuditEntry};
use keel_store::clock::unix_ms;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use utoipa::IntoParams;

/// Requests of that many bytes are looked into for what they name.
const LOOKED_INTO_MAX: usize = 64 << 10;
/// Commands in machines always are: none of more bytes is accepted.
const COMMAND_BYTES_MAX: usize = 2 << 20;
/// The fields of a request that name what it is about. Others may be secrets.
const NAMING: [&str; 10] = [
    "name", "machine", "command", "to", "on", "nodes", "role", "count", "mode", "labels",
];
/// The most bytes of an entry's text about that.
const ABOUT_BYTES_MAX: usize = 300;

/// Of the refused requests of a user, one in this time is entered: many must not drive out those
/// that were carried out.
const REFUSAL_EVERY: Duration = Duration::from_secs(10);

/// What it needs to keep the audit log.
pub(super) struct Audit {
    handles: Arc<Handles>,
    /// When a refused request of a user was last entered.
    refused: Mutex<HashMap<Arc<str>, Instant>>,
}

impl Audit {
    pub(super) fn new(handles: Arc<Handles>) -> Self {
        let refused = Mutex::default();
        Audit { handles, refused }
    }
}

/// Whether a refused request of this user is to be entered at this time.
fn enters_refusal(
    refused: &Mutex<HashMap<Arc<str>, Instant>>,
    user: &Arc<str>,
    now: Instant,
) -> bool {
    let mut refused = refused.lock().unwrap_or_else(PoisonError::into_inner);
    refused.retain(|_, at| now.saturating_duration_since(*at) < REFUSAL_EVERY);
    !refused.contains_key(user) && refused.insert(user.clone(), now).is_none()
}

/// Whether a request changes something that is to be found later, or tells everything.
fn is_audited(method: &Method, path: &str) -> bool {
    let only_looks = ["/dry-run", "/diff", "/plan"];
    match *method {
        // Whoever sees a display types there too.
        Method::GET => path == "/v1/store/backup" || path.ends_with("/display"),
        Method::HEAD | Method::OPTIONS => false,
        // The pieces of a file; what begins and ends it is there.
        Method::PUT => !path.ends_with("/files"),
        _ => !only_looks.iter().any(|end| path.ends_with(end)) && path != "/v1/debug/failpoint",
    }
}

/// Keeps the audit log.
pub(super) async fn keep(
    State(audit): State<Arc<Audit>>,
    request: Request,
    next: Next,
) -> Response {
    let at = &audit.handles;
    let path = request.uri().path().to_owned();
    let Some(caller) = request.extensions().get::<Caller>().cloned() else {
        return next.run(request).await;
    };
    let needed = needed_role(request.method(), &path);
    let is_refused = needed.is_some_and(|needed| !caller.role.includes(needed));
    let is_entered = match is_refused {
        true => enters_refusal(&audit.refused, &caller.user, Instant::now()),
        false => is_audited(request.method(), &path),
    };
    if !is_entered {
        return next.run(request).await;
    }
    let asked = format!("{} {path}", request.method());
    let (request, about) = match look_into(request).await {
        Ok(looked) => looked,
        Err(response) => return response,
    };
    let mut record = AuditRecord {
        user: caller.user.to_string(),
        role: caller.role.to_string(),
        node: at.context.name.to_string(),
        request: asked,
        about,
        status: None,
    };
    let store = at.context.store.clone();
    let key = match begin_audit(&*store, unix_ms(), &record).await {
        Ok(key) => key,
        Err(_) if is_refused => return next.run(request).await,
        Err(error) => {
            let text = format!("{error}; nothing is changed that the audit log does not have");
            return problem(StatusCode::SERVICE_UNAVAILABLE, text);
        }
    };
    let response = next.run(request).await;
    record.status = Some(response.status().as_u16());
    tokio::spawn(async move {
        if let Err(error) = end_audit(&*store, key, &record).await {
            tracing::warn!(%error, "the outcome of a request is not in the audit log");
        }
    });
    response
}

/// The request, and what it names.
async fn look_into(request: Request) -> Result<(Request, String), Response> {
    let headers = request.headers();
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let is_json = header(header::CONTENT_TYPE).is_some_and(|it| it.contains("json"));
    let length = header(header::CONTENT_LENGTH).and_then(|it| it.parse::<usize>().ok());
    let is_command = request.uri().path().ends_with("/execute");
    let is_short = length.is_some_and(|length| length <= LOOKED_INTO_MAX);
    if !is_json || !(is_short || is_command) {
        return Ok((request, String::new()));
    }
    let (head, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, COMMAND_BYTES_MAX).await;
    let bytes = bytes.map_err(|error| problem(StatusCode::BAD_REQUEST, error.to_string()))?;
    let about = about(&bytes);
    Ok((Request::from_parts(head, Body::from(bytes)), about))
}

fn about(body: &[u8]) -> String {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) else {
        return String::new();
    };
    let mut fields = Vec::new();
    // A request may be of one of several kinds: then its fields are one level below.
    let inner = value.as_object().into_iter().flat_map(|it| it.values());
    for object in std::iter::once(&value).chain(inner) {
        for name in NAMING {
            match object.get(name) {
                None | Some(serde_json::Value::Null) => {}
                Some(serde_json::Value::String(text)) => fields.push(format!("{name} {text}")),
                Some(other) => fields.push(format!("{name} {other}")),
            }
        }
    }
    let text = fields.join(", ");
    let end = text.floor_char_boundary(ABOUT_BYTES_MAX);
    text[..end].to_owned()
}

/// What is asked of the audit log.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct AuditQuery {
    /// Only requests since this time, in milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    since: u64,
    /// The most entries, of which the newest are answered: at most 10000; 1000 if absent.
    limit: Option<usize>,
}

/// The newest requests that were to change something, oldest first.
#[utoipa::path(
    get,
    path = "/v1/audit",
    operation_id = "list_audit",
    tag = "audit",
    params(AuditQuery),
    responses((status = 200, description = "Success", body = Vec<AuditEntry>))
)]
pub(super) async fn log(
    State(at): State<Arc<Handles>>,
    Query(query): Query<AuditQuery>,
) -> Reply<Vec<AuditEntry>> {
    let limit = query.limit.unwrap_or(AUDIT_DEFAULT).min(AUDIT_MAX);
    let log = audit_log(&*at.context.store, query.since, limit).await;
    log.map(Json)
        .map_err(|error| Failure::from(CommandError::from(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_entered_and_looks_are_not() {
        for (method, path, expected) in [
            (Method::GET, "/v1/machines", false),
            (Method::GET, "/v1/store/backup", true),
            (Method::POST, "/v1/machines", true),
            (Method::POST, "/v1/machines/m/move", true),
            (Method::POST, "/v1/machines/m/execute", true),
            (Method::POST, "/v1/machines/m/input", true),
            (Method::GET, "/v1/machines/m/display", true),
            (Method::POST, "/v1/machines/m/dry-run", false),
            (Method::POST, "/v1/machines/m/diff", false),
            (Method::POST, "/v1/plan", false),
            (Method::POST, "/v1/plan/run", true),
            (Method::PUT, "/v1/images", true),
            (Method::PUT, "/v1/machines/m/files", false),
            (Method::DELETE, "/v1/machines/m/files", true),
            (Method::POST, "/v1/tokens", true),
        ] {
            assert_eq!(is_audited(&method, path), expected, "{method} {path}");
        }
    }

    #[test]
    fn of_many_refusals_a_few_are_entered() {
        let refused = Mutex::default();
        let (ada, bob): (Arc<str>, Arc<str>) = ("ada".into(), "bob".into());
        let begun = Instant::now();
        let entered = |user, after_s| {
            let now = begun + Duration::from_secs(after_s);
            enters_refusal(&refused, user, now)
        };
        assert!(entered(&ada, 0) && entered(&bob, 5));
        assert!(!entered(&ada, 9) && !entered(&bob, 9));
        assert!(entered(&ada, 10));
        assert!(!entered(&ada, 19));
    }

    #[test]
    fn only_what_a_request_names_is_told() {
        let run = br#"{"name":"web","on":"b","spec":{"environment":["PASSWORD=x"]}}"#;
        assert_eq!(about(run), "name web, on b");
        let user = br#"{"user":{"name":"ann","role":"viewer"}}"#;
        assert_eq!(about(user), "name ann, role viewer");
        let execute = br#"{"command":"passwd","arguments":["x"],"input":"eA=="}"#;
        assert_eq!(about(execute), "command passwd");
        assert_eq!(about(b"no json"), "");
        assert_eq!(about(br#"{"to":null}"#), "");
        let long = format!(r#"{{"name":"{}"}}"#, "ä".repeat(400));
        assert!(about(long.as_bytes()).len() <= ABOUT_BYTES_MAX);
    }
}
