//! Requests about what happened: the output of machines, and events.

use super::openapi::RawBytes;
use super::reply::{Failure, Reply, Shared, machine_name, streamed};
use crate::cluster_events::{self, Question};
use crate::error::CommandError;
use crate::logs::LogOffset as LogOffsetQuery;
use crate::records::{self, RecordError};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use keel_api::{EVENTS_DEFAULT, EVENTS_MAX, EventLine, LogOffset};
use serde::Deserialize;
use utoipa::IntoParams;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct LogQuery {
    /// Offset of the first byte.
    #[serde(default)]
    from: u64,
    /// Whether the answer continues until the machine ends.
    #[serde(default)]
    follow: bool,
}

/// The output of a machine.
///
/// It is a sequence of records: a byte for the kind (1 output, 2 errors, 3 time), the length of the
/// content in four bytes (little-endian), and the content. That of a time is milliseconds since
/// 1970-01-01 UTC and the offset of the record itself, in eight bytes each.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/logs",
    operation_id = "get_log",
    tag = "machines",
    params(("name", description = "Name of the machine."), LogQuery),
    responses((status = 200, description = "Records", body = RawBytes, content_type = "application/octet-stream"))
)]
pub(super) async fn logs(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, Failure> {
    let machine = machine_name(&name)?;
    let mut bytes = at.logs.read(&machine, query.from, query.follow).await?;
    // An unreadable output is an error, not an empty answer. A follower waits.
    let first = if query.follow {
        None
    } else {
        bytes.recv().await
    };
    if let Some(Err(error)) = first {
        return Err(CommandError::Unavailable(error).into());
    }
    let rest = futures::stream::unfold(bytes, |mut bytes| async {
        Some((bytes.recv().await?, bytes))
    });
    let all = futures::stream::iter(first).chain(rest);
    Ok(streamed(
        all.map_err(std::io::Error::other),
        "application/octet-stream",
    ))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct OffsetQuery {
    /// In milliseconds since 1970-01-01 UTC.
    since: u64,
}

/// Where the output of a machine since a time begins.
#[utoipa::path(
    get,
    path = "/v1/machines/{name}/logs/offset",
    operation_id = "get_log_offset",
    tag = "machines",
    params(("name", description = "Name of the machine."), OffsetQuery),
    responses((status = 200, description = "Success", body = LogOffset))
)]
pub(super) async fn log_offset(
    State(at): Shared,
    Path(name): Path<String>,
    Query(query): Query<OffsetQuery>,
) -> Reply<LogOffset> {
    let command = LogOffsetQuery {
        machine: machine_name(&name)?,
        since_unix_ms: query.since,
    };
    let offset = at.logs.offset_since(command).await?;
    Ok(Json(LogOffset { offset }))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventQuery {
    /// Only events of this machine.
    machine: Option<String>,
    /// Only events since this time, in milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    since: u64,
    /// The most events, of which the newest are answered: 1 to 10000; 1000 if absent.
    limit: Option<u32>,
    /// Whether the answer continues with new events.
    #[serde(default)]
    follow: bool,
}

/// Events of all nodes, oldest first.
///
/// The answer is one `EventLine` per line.
#[utoipa::path(
    get,
    path = "/v1/events",
    operation_id = "list_events",
    tag = "events",
    params(EventQuery),
    responses((status = 200, description = "Lines of events", body = EventLine, content_type = "application/x-ndjson"))
)]
pub(super) async fn tell_events(
    State(at): Shared,
    Query(query): Query<EventQuery>,
) -> Result<Response, Failure> {
    let limit = query.limit.unwrap_or(EVENTS_DEFAULT);
    if !(1..=EVENTS_MAX).contains(&limit) {
        let what = format!("a limit of {limit} events: 1 to {EVENTS_MAX} are possible");
        return Err(CommandError::Invalid(what).into());
    }
    let question = Question {
        machine: query.machine.as_deref().map(machine_name).transpose()?,
        since_unix_ms: query.since,
        after: 0,
        limit,
        follow: query.follow,
    };
    let gathered = cluster_events::of_cluster(&at.context, &question).await;
    // Removed machines have events too; a name with neither is a mistake.
    if let Some(machine) = &question.machine
        && gathered.events.is_empty()
        && let Err(error @ RecordError::NoMachine(_)) =
            records::get(&*at.context.store, machine).await
    {
        return Err(CommandError::from(error).into());
    }
    let lines = if question.follow {
        let lines = cluster_events::follow_cluster(&at.context, &question, gathered);
        futures::stream::unfold(lines, |mut lines| async {
            Some((lines.recv().await?, lines))
        })
        .left_stream()
    } else {
        futures::stream::iter(gathered.lines()).right_stream()
    };
    let lines = lines.map(|line: EventLine| {
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        Bytes::from(text)
    });
    Ok(streamed(lines.map(Ok), "application/x-ndjson"))
}
