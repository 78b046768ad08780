//! Who makes a request, and who may.

use super::reply::problem;
use crate::context::Context;
use axum::extract::{Extension, Request};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use keel_cluster::tokens::{Role, TokenError, verify_user_token};
use keel_store::clock::unix_ms;
use std::sync::Arc;
use std::time::Duration;

/// How long a request that takes long goes on at most once its token is revoked or has ended.
const VERIFY_INTERVAL: Duration = Duration::from_secs(30);

/// Whose a request is: added where it comes in, before any handler.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) role: Role,
    /// The name of the token, or `local`.
    pub(super) user: Arc<str>,
}

/// The token of a request.
#[derive(Clone)]
pub(super) struct BearerToken(Arc<str>);

impl BearerToken {
    pub(super) fn new(text: &str) -> Self {
        BearerToken(text.into())
    }

    #[cfg(test)]
    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// Whose it is.
    ///
    /// # Errors
    /// If it is not valid, or the store does not say.
    pub(super) async fn caller(&self, context: &Context) -> Result<Caller, TokenError> {
        let user = verify_user_token(&*context.store, &self.0, unix_ms()).await;
        let user = user.inspect_err(|error| tracing::info!(%error, "a token was refused"))?;
        Ok(Caller {
            role: user.role,
            user: user.name.into(),
        })
    }
}

/// Returns once the token of a request is not valid any more; never for one that has none.
pub(super) async fn until_refused(
    token: Option<Extension<BearerToken>>,
    context: &Context,
) -> TokenError {
    let Some(Extension(token)) = token else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(VERIFY_INTERVAL).await;
        match token.caller(context).await {
            // It was valid when the store last said.
            Ok(_) | Err(TokenError::Store(_)) => {}
            Err(error) => return error,
        }
    }
}

/// The role that a request needs; `None` for those that need no token, as load balancers have none.
///
/// Reading needs a viewer, tokens, the authority, removal of nodes, the audit log and backups an
/// admin, everything else an operator, including the content of machines' files.
pub(super) fn needed_role(method: &Method, path: &str) -> Option<Role> {
    Some(match (method, path) {
        (_, "/healthz" | "/readyz") => return None,
        (
            _,
            "/v1/tokens"
            | "/v1/audit"
            | "/v1/store/backup"
            | "/v1/agent/restart"
            | "/v1/debug/failpoint",
        ) => Role::Admin,
        (_, path) if path.starts_with("/v1/tokens/") => Role::Admin,
        (&Method::POST, path) if path.starts_with("/v1/authority") => Role::Admin,
        (&Method::DELETE, path) if path.starts_with("/v1/nodes/") => Role::Admin,
        (&Method::POST, path) if path.starts_with("/v1/nodes/") && path.ends_with("/give-up") => {
            Role::Admin
        }
        (_, path) if matches!(path.split('/').nth(4), Some("files" | "display")) => Role::Operator,
        (&Method::GET, _) => Role::Viewer,
        _ => Role::Operator,
    })
}

/// Refuses requests of callers without the role that they need.
pub(super) async fn check_role(request: Request, next: Next) -> Response {
    let Some(needed) = needed_role(request.method(), request.uri().path()) else {
        return next.run(request).await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_need_the_role_of_what_they_do() {
        for (method, path, role) in [
            (Method::GET, "/healthz", None),
            (Method::GET, "/metrics", Some(Role::Viewer)),
            (Method::GET, "/v1/openapi.json", Some(Role::Viewer)),
            (Method::GET, "/v1/machines/m", Some(Role::Viewer)),
            (
                Method::GET,
                "/v1/machines/m/files/stat",
                Some(Role::Operator),
            ),
            (Method::POST, "/v1/machines/m/stop", Some(Role::Operator)),
            (Method::POST, "/v1/machines/m/execute", Some(Role::Operator)),
            (Method::POST, "/v1/machines/m/input", Some(Role::Operator)),
            (Method::GET, "/v1/machines/m/display", Some(Role::Operator)),
            (Method::PUT, "/v1/images", Some(Role::Operator)),
            (Method::GET, "/v1/tokens", Some(Role::Admin)),
            (Method::DELETE, "/v1/tokens/7", Some(Role::Admin)),
            (Method::GET, "/v1/store/backup", Some(Role::Admin)),
            (Method::DELETE, "/v1/nodes/a", Some(Role::Admin)),
            (Method::GET, "/v1/authority", Some(Role::Viewer)),
            (Method::POST, "/v1/authority", Some(Role::Admin)),
            (Method::POST, "/v1/authority/rotate", Some(Role::Admin)),
        ] {
            assert_eq!(needed_role(&method, path), role, "{method} {path}");
        }
    }
}
