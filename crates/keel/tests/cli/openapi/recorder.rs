//! A Unix socket between a client and a node, which records requests and answers. The client of
//! Evenkeel makes one connection per request.

use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// A request, and its answer.
#[derive(Debug, Clone)]
pub(crate) struct Exchange {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) request: Message,
    pub(crate) status: u16,
    pub(crate) response: Message,
}

/// What one side sends.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    /// Its content type, without parameters; empty if none.
    pub(crate) content: String,
    /// Its body, as far as it was received.
    pub(crate) body: Vec<u8>,
}

#[derive(Default)]
struct Records {
    begun: usize,
    /// Without an exchange if nothing was answered, as by an agent that is restarted.
    ended: Vec<Result<Option<Exchange>, String>>,
}

pub(crate) struct Recorder {
    records: Arc<Mutex<Records>>,
}

impl Recorder {
    /// Listens as the node of the folder `front`, and forwards to the node of the folder `node`.
    pub(crate) fn start(front: &Path, node: &Path) -> Self {
        std::fs::create_dir_all(front).expect("a folder");
        let listener = UnixListener::bind(front.join("api.socket")).expect("a socket");
        let node = node.join("api.socket");
        let records = Arc::new(Mutex::new(Records::default()));
        let all = records.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                all.lock().expect("no panic").begun += 1;
                let (node, all) = (node.clone(), all.clone());
                tokio::spawn(async move {
                    let exchange = match UnixStream::connect(node).await {
                        Ok(node) => record(client, node).await,
                        Err(_) => Ok(None),
                    };
                    all.lock().expect("no panic").ended.push(exchange);
                });
            }
        });
        Recorder { records }
    }

    /// What was recorded so far, if all connections have ended.
    pub(crate) fn exchanges(&self) -> Option<Vec<Exchange>> {
        let records = self.records.lock().expect("no panic");
        let all = records.begun == records.ended.len();
        let ended = || records.ended.iter().cloned().filter_map(Result::transpose);
        all.then(|| ended().collect::<Result<_, _>>().expect("HTTP"))
    }
}

async fn record(client: UnixStream, node: UnixStream) -> Result<Option<Exchange>, String> {
    let (from_client, to_client) = client.into_split();
    let (from_node, to_node) = node.into_split();
    let (request, response) =
        tokio::join!(forward(from_client, to_node), forward(from_node, to_client));
    if response.is_empty() {
        return Ok(None);
    }
    let (start, request) = message(&request)?;
    let (status, response) = message(&response)?;
    let mut words = start.split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Err(format!("no request: {start}"));
    };
    let status = status.split(' ').nth(1).and_then(|it| it.parse().ok());
    Ok(Some(Exchange {
        method: method.to_owned(),
        target: target.to_owned(),
        request,
        status: status.ok_or("no status")?,
        response,
    }))
}

/// Copies to the end; returns the bytes.
async fn forward(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> Vec<u8> {
    let (mut all, mut piece) = (Vec::new(), vec![0; 64 << 10]);
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        all.extend(&piece[..count]);
        if to.write_all(&piece[..count]).await.is_err() {
            break;
        }
    }
    // Who listened may be gone.
    let _ = to.shutdown().await;
    all
}

/// The first line of a message of HTTP/1.1, and the message.
fn message(bytes: &[u8]) -> Result<(String, Message), String> {
    let end = bytes.windows(4).position(|it| it == b"\r\n\r\n");
    let end = end.ok_or_else(|| format!("no head: {}", String::from_utf8_lossy(bytes)))?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let start = lines.next().unwrap_or_default().to_owned();
    let headers: Vec<(String, &str)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim()))
        .collect();
    let header = |name: &str| headers.iter().find(|it| it.0 == name).map(|it| it.1);
    let body = &bytes[end + 4..];
    let body = match header("transfer-encoding") {
        Some("chunked") => chunks(body),
        _ => body.to_vec(),
    };
    let content = header("content-type").unwrap_or_default();
    let content = content.split(';').next().unwrap_or_default();
    let content = content.trim().to_owned();
    Ok((start, Message { content, body }))
}

/// The content of complete chunks.
fn chunks(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|it| it == b"\r\n") {
        let size = std::str::from_utf8(&rest[..end]).unwrap_or_default();
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        let Some(chunk) = rest
            .get(end + 2..end + 2 + size)
            .filter(|it| !it.is_empty())
        else {
            break;
        };
        body.extend(chunk);
        rest = rest.get(end + 4 + size..).unwrap_or_default();
    }
    body
}
