//! A machine's display over a WebSocket (RFC 6455): its binary messages have the bytes of the remote
//! framebuffer protocol (RFB, RFC 6143), in both directions and however they are cut, as noVNC and websockify
//! have them.

use super::caller::{BearerToken, until_refused};
use super::reply::{Failure, Shared, machine_name};
use crate::machines::ViewerInput;
use axum::extract::ws::{CloseCode, CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Extension, Path, State};
use axum::response::Response;
use bytes::Bytes;
use futures::future::try_join;
use futures::stream::{SplitSink, SplitStream};
use futures::{FutureExt, SinkExt, StreamExt};
use keel_cluster::tokens::TokenError;
use keel_net::rpc::StreamReceiver;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{interval, timeout};

/// The protocol that viewers offer, if they offer any.
const PROTOCOL: &str = "binary";
/// The longest message of a viewer, and the most that is passed on at once, in bytes.
const INPUT_BYTES_MAX: usize = 64 << 10;
/// Messages that wait until those before them are passed on: a pointer that moves sends many.
const MESSAGES_AHEAD: usize = 256;
/// How often a viewer is asked whether it is there, which also keeps proxies from ending a connection
/// over which nothing goes; and how many such questions it may leave without an answer.
const ASK_INTERVAL: Duration = Duration::from_secs(20);
const SILENT_MAX: u32 = 3;
/// How long a viewer may take until it reads any more, and at the end of a view.
const VIEWER_PATIENCE: Duration = Duration::from_secs(60);
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
/// Why a display sends no more.
const ENDED: &str = "the machine has moved, ended or begun anew, or its node is lost";
/// The longest reason of a close (RFC 6455, section 5.5), in bytes.
const REASON_BYTES_MAX: usize = 123;

/// Shows the display of a machine, and takes what is typed there, over a WebSocket.
///
/// Binary messages in both directions have the bytes of the remote framebuffer protocol (RFC 6143), of
/// which the machine is the server; it asks for no password. The connection is closed with a reason when
/// the machine ends, moves or begins anew. A script in a browser, which can set no header, offers the
/// protocols `binary` and `keel.bearer.TOKEN`.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/display",
    operation_id = "view_display",
    tag = "machines",
    params(("name", description = "Name of the machine.")),
    responses((status = 101, description = "A WebSocket"))
)]
pub(super) async fn view(
    State(at): Shared,
    Path(name): Path<String>,
    token: Option<Extension<BearerToken>>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    let (display, input) = at.machines.view(machine).await?;
    let upgrade = upgrade
        .protocols([PROTOCOL])
        .max_message_size(INPUT_BYTES_MAX)
        .max_frame_size(INPUT_BYTES_MAX);
    Ok(upgrade.on_upgrade(async move |socket| {
        let refused = until_refused(token, &at.context);
        pass_on(socket, display, input, refused).await;
    }))
}

/// Passes on bytes until the viewer or the display ends, or the viewer's token is `refused`.
async fn pass_on(
    socket: WebSocket,
    display: StreamReceiver,
    input: ViewerInput,
    refused: impl Future<Output = TokenError>,
) {
    let (mut to_viewer, from_viewer) = socket.split();
    let answers = AtomicBool::new(true);
    let (queue, queued) = mpsc::channel(MESSAGES_AHEAD);
    let close = {
        let shown = pin!(show(display, &mut to_viewer, &answers));
        let received = receive(from_viewer, queue, &answers).map(Ok);
        // The viewer's end counts once all that it sent is passed on.
        let viewed = pin!(try_join(received, type_in(queued, input)));
        tokio::select! {
            close = shown => close,
            viewed = viewed => match viewed {
                Ok((close, ())) => close,
                Err(reason) => frame(close_code::RESTART, &reason),
            },
            error = refused => frame(close_code::POLICY, &error.to_string()),
        }
    };
    // It may be gone, or read nothing any more.
    let _ = timeout(CLOSE_PATIENCE, to_viewer.send(Message::Close(Some(close)))).await;
}

/// Why a view is closed.
fn frame(code: CloseCode, reason: &str) -> CloseFrame {
    let end = reason.floor_char_boundary(REASON_BYTES_MAX);
    CloseFrame {
        code,
        reason: reason[..end].into(),
    }
}

/// Passes on what a display sends, and asks the viewer from time to time whether it is there. Says why
/// there is no more.
async fn show(
    mut display: StreamReceiver,
    to_viewer: &mut SplitSink<WebSocket, Message>,
    answers: &AtomicBool,
) -> CloseFrame {
    let gone = |reason: &str| frame(close_code::AWAY, reason);
    let mut asks = interval(ASK_INTERVAL);
    let mut silent = 0;
    loop {
        let message = tokio::select! {
            piece = display.recv() => match piece {
                Some(Ok(bytes)) => Message::Binary(bytes),
                // Its worker, or its node, has closed the connection.
                Some(Err(_)) | None => return frame(close_code::RESTART, ENDED),
            },
            _ = asks.tick() => {
                silent = match answers.swap(false, Ordering::Relaxed) {
                    true => 0,
                    false => silent + 1,
                };
                if silent == SILENT_MAX {
                    return gone("the viewer does not answer");
                }
                Message::Ping(Bytes::new())
            }
        };
        match timeout(VIEWER_PATIENCE, to_viewer.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return gone("the viewer is gone"),
            Err(_) => return gone("the viewer reads nothing"),
        }
    }
}

/// Receives what a viewer sends, to its end, and says how that was.
async fn receive(
    mut viewer: SplitStream<WebSocket>,
    queue: mpsc::Sender<Bytes>,
    answers: &AtomicBool,
) -> CloseFrame {
    while let Some(message) = viewer.next().await {
        answers.store(true, Ordering::Relaxed);
        match message {
            Ok(Message::Binary(bytes)) => {
                if queue.send(bytes).await.is_err() {
                    break;
                }
            }
            Ok(Message::Text(_)) => {
                return frame(close_code::UNSUPPORTED, "binary messages are expected");
            }
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            Ok(Message::Close(_)) => break,
            Err(error) => return frame(close_code::PROTOCOL, &error.to_string()),
        }
    }
    frame(close_code::NORMAL, "")
}

/// Passes on what a viewer sends, to its end.
///
/// # Errors
/// Why the display takes no more.
async fn type_in(mut queued: mpsc::Receiver<Bytes>, mut input: ViewerInput) -> Result<(), String> {
    while let Some(bytes) = next_input(&mut queued).await {
        let sent = input.send(bytes).await;
        sent.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// What has come, together: a node far away is asked once. None at the end.
async fn next_input(queued: &mut mpsc::Receiver<Bytes>) -> Option<Vec<u8>> {
    let mut bytes = Vec::from(queued.recv().await?);
    while bytes.len() < INPUT_BYTES_MAX {
        match queued.try_recv() {
            Ok(more) => bytes.extend_from_slice(&more),
            Err(_) => break,
        }
    }
    Some(bytes)
}
