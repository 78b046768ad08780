//! The client's end of a WebSocket (RFC 6455) whose binary messages are a stream of bytes.

use crate::client::{ClientError, broken};
use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

/// Bytes that are read at once, of which a message is made.
const PIECE_BYTES: usize = 16 << 10;
/// How long a node may say nothing: it asks three times in that time whether we are there.
const NODE_PATIENCE: Duration = Duration::from_secs(60);

/// A WebSocket to a node.
#[derive(Debug)]
pub struct WebSocket(WebSocketStream<TokioIo<Upgraded>>);

impl WebSocket {
    pub(crate) async fn over(stream: Upgraded) -> Self {
        let stream = TokioIo::new(stream);
        WebSocket(WebSocketStream::from_raw_socket(stream, Role::Client, None).await)
    }

    /// Passes bytes between it and `local`, in both directions, until one of them ends.
    ///
    /// # Errors
    /// [`ClientError`]: why the node has ended it, if it did.
    pub async fn pass_on(
        self,
        local: impl AsyncRead + AsyncWrite + Send,
    ) -> Result<(), ClientError> {
        let (mut to_node, mut from_node) = self.0.split();
        let (mut read, mut write) = tokio::io::split(local);
        let sent = async {
            let mut piece = BytesMut::new();
            loop {
                piece.reserve(PIECE_BYTES);
                // An error of the local end is its end, too.
                let Ok(1..) = read.read_buf(&mut piece).await else {
                    break to_node.close().await.map_err(broken);
                };
                let message = Message::Binary(piece.split().freeze());
                to_node.send(message).await.map_err(broken)?;
            }
        };
        let received = async {
            loop {
                let message = timeout(NODE_PATIENCE, from_node.next()).await;
                let message = message.map_err(|_| broken("it says nothing any more"))?;
                let Some(message) = message else { break };
                let bytes: Bytes = match message.map_err(broken)? {
                    Message::Binary(bytes) => bytes,
                    Message::Close(Some(close)) if close.code != CloseCode::Normal => {
                        return Err(ClientError::Closed(close.reason.to_string()));
                    }
                    Message::Close(_) => break,
                    _ => continue,
                };
                if write.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        tokio::select! {
            sent = sent => sent,
            received = received => received,
        }
    }
}
