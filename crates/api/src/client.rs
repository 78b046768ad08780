//! A client of the API: one connection per request, on a node's Unix socket or
//! over TLS with a token.

use crate::web_socket::WebSocket;
use crate::{Problem, Uploaded};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::http::request;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use keel_machine::kind::KindName;
use keel_net::{ClientTls, Fingerprint};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// How long connecting over TLS may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Characters that need no escape in a path segment (RFC 3986, 2.3).
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The path of an object in the API: names are segments of the path, with any special characters
/// escaped.
///
/// ```
/// let path = keel_api::path(["machines", "a?/b", "stop"]);
/// assert_eq!(path, "/v1/machines/a%3F%2Fb/stop");
/// ```
pub fn path<const N: usize>(pieces: [&str; N]) -> String {
    let mut path = "/v1".to_owned();
    for piece in pieces {
        path.push('/');
        path.extend(utf8_percent_encode(piece, PLAIN));
    }
    path
}

/// The first check for a user if no node answers.
const ADVICE: &str = "is `keel up` running there?";

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("no node answers at {place}: {}", with_advice(reason))]
    Connect {
        /// Socket or address.
        place: String,
        /// The cause.
        reason: String,
    },
    /// The connection failed.
    #[error("the connection to the node failed: {0}")]
    Broken(String),
    /// The node refused.
    #[error("{reason}")]
    Problem {
        /// The HTTP status: 4xx for an invalid request, 5xx if a later attempt may succeed.
        status: u16,
        /// The reason, and the remedy.
        reason: String,
    },
    /// The answer cannot be decoded.
    #[error("the node's answer cannot be decoded: {0}")]
    Answer(String),
    /// The node has closed a WebSocket.
    #[error("{0}")]
    Closed(String),
}

/// Why a node does not answer, with advice unless the reason includes it.
fn with_advice(reason: &str) -> String {
    match reason.contains(ADVICE) {
        true => reason.to_owned(),
        false => format!("{reason} ({ADVICE})"),
    }
}

#[derive(Debug, Clone)]
enum Place {
    Socket(PathBuf),
    Tls {
        address: String,
        token: String,
        tls: ClientTls,
    },
}

/// Connects to a node.
#[derive(Debug, Clone)]
pub struct Client {
    place: Place,
}

pub(crate) fn broken(error: impl std::fmt::Display) -> ClientError {
    ClientError::Broken(error.to_string())
}

impl Client {
    /// The node whose socket this is.
    pub fn socket(path: PathBuf) -> Self {
        Client {
            place: Place::Socket(path),
        }
    }

    /// The node at `address` (`host:port`), with a user's token; the server
    /// must have a certificate of the authority with this fingerprint.
    ///
    /// # Errors
    /// [`ClientError::Connect`] if TLS cannot be set up.
    pub fn tls(address: &str, token: &str, authority: Fingerprint) -> Result<Self, ClientError> {
        let tls = ClientTls::join(authority).map_err(|error| ClientError::Connect {
            place: address.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Client {
            place: Place::Tls {
                address: address.to_owned(),
                token: token.to_owned(),
                tls,
            },
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let content = (method == Method::POST).then_some("application/json");
        self.send_as(method, path, content, Full::new(body)).await
    }

    async fn send_as<B>(
        &self,
        method: Method,
        path: &str,
        content: Option<&str>,
        body: B,
    ) -> Result<Response<Incoming>, ClientError>
    where
        B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
    {
        let mut request = self.request(method, path);
        if let Some(content) = content {
            request = request.header("content-type", content);
        }
        let response = self.exchange(request.body(body).map_err(broken)?).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refusal(response).await?)
    }

    /// A request with what all have.
    fn request(&self, method: Method, path: &str) -> request::Builder {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "keel");
        match &self.place {
            Place::Tls { token, .. } => request.header("authorization", format!("Bearer {token}")),
            Place::Socket(_) => request,
        }
    }

    async fn exchange<B>(&self, request: Request<B>) -> Result<Response<Incoming>, ClientError>
    where
        B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
    {
        match &self.place {
            Place::Socket(path) => {
                let stream =
                    UnixStream::connect(path)
                        .await
                        .map_err(|error| ClientError::Connect {
                            place: path.display().to_string(),
                            reason: error.to_string(),
                        })?;
                exchange(TokioIo::new(stream), request).await
            }
            Place::Tls { address, tls, .. } => {
                let stream =
                    tls.connect(address, None, CONNECT_PATIENCE)
                        .await
                        .map_err(|error| ClientError::Connect {
                            place: address.clone(),
                            reason: error.to_string(),
                        })?;
                exchange(TokioIo::new(stream), request).await
            }
        }
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        decoded(self.send(method, path, body).await?).await
    }

    /// `POST` of bytes that are sent as they come, until there will be no more.
    ///
    /// # Errors
    /// [`ClientError`]; perhaps while there are more.
    pub async fn post_pieces<T: DeserializeOwned>(
        &self,
        path: &str,
        pieces: mpsc::Receiver<Bytes>,
    ) -> Result<T, ClientError> {
        let content = Some("application/octet-stream");
        let sent = self.send_as(Method::POST, path, content, Pieces(pieces));
        decoded(sent.await?).await
    }

    /// Uploads a file that machines of a kind start from.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn upload(&self, kind: &KindName, image: Bytes) -> Result<Uploaded, ClientError> {
        let path = format!("/v1/images?kind={kind}");
        self.call(Method::PUT, &path, image).await
    }

    /// As [`Self::upload`], of a file that is sent as it is read.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn upload_pieces(
        &self,
        kind: &KindName,
        pieces: mpsc::Receiver<Bytes>,
    ) -> Result<Uploaded, ClientError> {
        let path = format!("/v1/images?kind={kind}");
        let content = Some("application/octet-stream");
        let sent = self.send_as(Method::PUT, &path, content, Pieces(pieces));
        decoded(sent.await?).await
    }

    /// `GET`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// `POST` of JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.call(Method::POST, path, json(body)?).await
    }

    /// `PUT` of JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let content = Some("application/json");
        let body = Full::new(json(body)?);
        decoded(self.send_as(Method::PUT, path, content, body).await?).await
    }

    /// `POST` of JSON with a streamed answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post_stream<B: Serialize>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<Lines, ClientError> {
        let response = self.send(Method::POST, path, json(body)?).await?;
        Ok(Lines::new(response.into_body()))
    }

    /// `GET` with a streamed answer.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get_stream(&self, path: &str) -> Result<Lines, ClientError> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        Ok(Lines::new(response.into_body()))
    }

    /// `GET` that becomes a WebSocket (RFC 6455).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn web_socket(&self, path: &str) -> Result<WebSocket, ClientError> {
        let key = generate_key();
        let request = self
            .request(Method::GET, path)
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", &key);
        let request = request.body(Full::<Bytes>::default()).map_err(broken)?;
        let response = self.exchange(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await?);
        }
        let accepted = response.headers().get("sec-websocket-accept");
        if accepted.is_none_or(|it| it.as_bytes() != derive_accept_key(key.as_bytes()).as_bytes()) {
            return Err(ClientError::Answer("it is no WebSocket".into()));
        }
        let stream = hyper::upgrade::on(response).await.map_err(broken)?;
        Ok(WebSocket::over(stream).await)
    }
}

/// Why a node refuses.
///
/// # Errors
/// If it does not say.
async fn refusal(response: Response<Incoming>) -> Result<ClientError, ClientError> {
    let status = response.status();
    let body = response.into_body().collect().await.map_err(broken)?;
    let text = body.to_bytes();
    let reason = match serde_json::from_slice::<Problem>(&text) {
        Ok(problem) => problem.error,
        Err(_) => format!("{status}: {}", String::from_utf8_lossy(&text)),
    };
    let status = status.as_u16();
    Ok(ClientError::Problem { status, reason })
}

/// The body of a request that is sent piece by piece.
struct Pieces(mpsc::Receiver<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.0.poll_recv(context);
        piece.map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}

async fn decoded<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, ClientError> {
    let body = response.into_body().collect().await.map_err(broken)?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| ClientError::Answer(error.to_string()))
}

fn json<B: Serialize>(body: &B) -> Result<Bytes, ClientError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(|error| ClientError::Answer(error.to_string()))
}

async fn exchange<S, B>(
    stream: TokioIo<S>,
    request: Request<B>,
) -> Result<Response<Incoming>, ClientError>
where
    B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
        .await
        .map_err(broken)?;
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await.map_err(broken)
}

/// A streamed answer.
#[derive(Debug)]
pub struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    fn new(body: Incoming) -> Self {
        Lines {
            body,
            buffer: BytesMut::new(),
        }
    }

    /// The next piece, as received; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError::Broken`].
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            if let Ok(data) = frame.map_err(broken)?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The next line of JSON; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn line<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| ClientError::Answer(error.to_string()));
            }
            match self.chunk().await? {
                Some(bytes) => self.buffer.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }
}
