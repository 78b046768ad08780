//! Shared by the handlers: errors as HTTP statuses, names in paths, streamed answers.

use super::super::handles::Handles;
use crate::error::CommandError;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use keel_api::Problem;
use keel_cluster::MachineName;
use std::sync::Arc;

pub(super) struct Failure(pub(super) CommandError);

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        Failure(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match &self.0 {
            CommandError::Invalid(_) => StatusCode::BAD_REQUEST,
            CommandError::NotFound(_) => StatusCode::NOT_FOUND,
            CommandError::Conflict(_) => StatusCode::CONFLICT,
            CommandError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        problem(status, self.0.to_string())
    }
}

pub(super) fn problem(status: StatusCode, error: String) -> Response {
    (status, Json(Problem { error })).into_response()
}

pub(super) type Reply<T> = Result<Json<T>, Failure>;
pub(super) type Shared = State<Arc<Handles>>;

pub(super) fn machine_name(name: &str) -> Result<MachineName, Failure> {
    MachineName::new(name).map_err(|error| Failure(CommandError::Invalid(error.to_string())))
}

/// Streams lines of JSON.
pub(super) fn line_by_line<T: serde::Serialize + Send + 'static>(
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

/// A streamed answer. After an error the stream is aborted, so that the client sees that it is
/// incomplete.
pub(super) fn streamed(
    stream: impl futures::Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    content: &'static str,
) -> Response {
    let body = Body::from_stream(stream);
    ([(header::CONTENT_TYPE, content)], body).into_response()
}
