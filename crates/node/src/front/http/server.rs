//! Serves the API on the node's own socket, and over TLS with a token.

use super::super::handles::Handles;
use super::caller::{BearerToken, Caller};
use super::router::router;
use crate::context::Context;
use crate::supervisor::AgentEnd;
use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, Request};
use axum::http::header;
use keel_cluster::tokens::Role;
use keel_machine::link::keep_alive;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tower::ServiceExt;

/// What a token begins with that is among the protocols of a WebSocket.
const TOKEN_PROTOCOL: &str = "keel.bearer.";
/// How long a TLS handshake may take.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);

/// Serves until the process gets a signal to stop, or is asked to restart.
pub(crate) async fn serve(handles: Arc<Handles>) -> std::io::Result<AgentEnd> {
    let context = handles.context.clone();
    let restart = handles.restart.clone();
    let path = context.dir.api_socket();
    let temporary = context.dir.root().join("api.new");
    // An existing socket answers: it is renamed into place once it listens.
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    std::fs::rename(&temporary, &path)?;
    let router = router(handles)?;
    if let Some(address) = context.settings.api {
        let listener = TcpListener::bind(address).await?;
        tokio::spawn(serve_tls(context.clone(), listener, router.clone()));
    }
    // The socket is in a folder that only this user can enter.
    let local = router.layer(Extension(Caller {
        role: Role::Admin,
        user: "local".into(),
    }));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        result = axum::serve(listener, local) => result.map(|()| AgentEnd::Stopped),
        _ = terminate.recv() => Ok(AgentEnd::Stopped),
        _ = interrupt.recv() => Ok(AgentEnd::Stopped),
        () = restart.wanted() => Ok(AgentEnd::Restart),
    }
}

async fn serve_tls(context: Arc<Context>, listener: TcpListener, router: Router) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection to the API was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // So that long requests end whose clients are gone.
        if let Err(error) = keep_alive(&stream) {
            tracing::debug!(%peer, %error, "a client that is gone will not be noticed");
        }
        let (context, router) = (context.clone(), router.clone());
        let tls = context.identity.server_tls();
        tokio::spawn(async move {
            match tls
                .accept(stream, &peer.to_string(), HANDSHAKE_PATIENCE)
                .await
            {
                Ok((stream, _)) => serve_one(context, router, stream, peer).await,
                Err(error) => {
                    tracing::debug!(%error, "the TLS handshake with a client of the API failed")
                }
            }
        });
    }
}

async fn serve_one<S>(context: Arc<Context>, router: Router, stream: S, peer: SocketAddr)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service =
        hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let (context, router) = (context.clone(), router.clone());
            async move {
                let mut request = request.map(Body::new);
                if let Some(token) = bearer(&request)
                    && let Ok(caller) = token.caller(&context).await
                {
                    request.extensions_mut().insert(caller);
                    request.extensions_mut().insert(token);
                }
                router.oneshot(request).await
            }
        });
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
        // A WebSocket begins as a request.
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "a connection to the API failed");
    }
}

/// The token of a request. A script in a browser can set no header of a WebSocket, so there it may be
/// among the protocols that are offered, of which another one is chosen.
fn bearer(request: &Request) -> Option<BearerToken> {
    let header = |name| request.headers().get(name)?.to_str().ok();
    if let Some(authorization) = header(header::AUTHORIZATION) {
        return authorization.strip_prefix("Bearer ").map(BearerToken::new);
    }
    let mut protocols = header(header::SEC_WEBSOCKET_PROTOCOL)?.split(',');
    let token = protocols.find_map(|it| it.trim().strip_prefix(TOKEN_PROTOCOL));
    token.map(BearerToken::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_in_a_header_or_among_the_protocols_of_a_web_socket() {
        let authorization = (header::AUTHORIZATION, "Bearer one");
        let protocols = (header::SEC_WEBSOCKET_PROTOCOL, "binary, keel.bearer.two");
        for (headers, token) in [
            (vec![authorization.clone()], Some("one")),
            (vec![protocols.clone()], Some("two")),
            (vec![protocols, authorization], Some("one")),
            (vec![(header::SEC_WEBSOCKET_PROTOCOL, "binary")], None),
            (vec![(header::AUTHORIZATION, "Basic one")], None),
            (vec![], None),
        ] {
            let mut request = Request::new(Body::empty());
            for (name, value) in &headers {
                let value = header::HeaderValue::from_static(value);
                request.headers_mut().insert(name, value);
            }
            let found = bearer(&request);
            assert_eq!(found.as_ref().map(BearerToken::text), token, "{headers:?}");
        }
    }
}
