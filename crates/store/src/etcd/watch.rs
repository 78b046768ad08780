//! A watch of etcd: one stream in both directions, on which etcd is asked for a sign of life.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use tonic::codec::Streaming;

use super::connection::Connections;
use super::messages as pb;
use super::{Keys, etcd_revision, revision_of};
use crate::interface::{Change, Changes, Revision, StoreError, Watch};

/// Interval at which etcd is asked whether the watch is alive.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// A watch that is silent for so long is over: etcd, or the way to it, is gone.
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// Changes of entries that begin with `prefix`, from revision `from` on.
pub(super) async fn watch(
    etcd: Arc<Connections>,
    keys: Keys,
    prefix: &str,
    from: Revision,
) -> Result<Watch, StoreError> {
    let (key, range_end) = keys.under(prefix);
    let create = pb::WatchCreateRequest {
        key,
        range_end,
        start_revision: etcd_revision(from),
    };
    let requests = || {
        let create = pb::WatchRequest {
            request: Some(pb::WatchRequestKind::Create(create.clone())),
        };
        let progress = stream::unfold((), |()| async {
            tokio::time::sleep(PROGRESS_EVERY).await;
            let asked = pb::WatchRequestKind::Progress(pb::Empty {});
            let asked = pb::WatchRequest {
                request: Some(asked),
            };
            Some((asked, ()))
        });
        stream::iter([create]).chain(progress)
    };
    let responses = etcd.stream("/etcdserverpb.Watch/Watch", requests).await?;
    let mut cursor = Cursor {
        responses,
        keys,
        from,
        waiting: Vec::new(),
    };
    cursor.created().await?;
    let changes = stream::unfold(Some(cursor), |cursor| async move {
        let mut cursor = cursor?;
        let item = cursor.next().await;
        let rest = item.is_ok().then_some(cursor);
        Some((item, rest))
    });
    Ok(Watch::new(changes.boxed()))
}

struct Cursor {
    responses: Streaming<pb::WatchResponse>,
    keys: Keys,
    from: Revision,
    /// Of the last response, the newest first.
    waiting: Vec<Changes>,
}

impl Cursor {
    async fn response(&mut self) -> Result<pb::WatchResponse, StoreError> {
        let response = tokio::time::timeout(SILENCE_MAX, self.responses.message()).await;
        let response = match response {
            Ok(Ok(Some(response))) => response,
            Ok(Ok(None)) => return Err(StoreError::unavailable("etcd ended the watch")),
            Ok(Err(status)) => {
                let reason = format!("etcd ended the watch: {}", status.message());
                return Err(StoreError::unavailable(reason));
            }
            Err(_) => return Err(StoreError::unavailable("etcd is silent on a watch")),
        };
        if response.compact_revision > 0 {
            return Err(StoreError::Compacted {
                asked: self.from,
                oldest: revision_of(response.compact_revision),
            });
        }
        match response.canceled {
            true => Err(StoreError::unavailable(format!(
                "etcd cancelled the watch: {}",
                response.cancel_reason
            ))),
            false => Ok(response),
        }
    }

    /// Waits until etcd has made the watch.
    async fn created(&mut self) -> Result<(), StoreError> {
        loop {
            let response = self.response().await?;
            let created = response.created;
            self.take(response)?;
            if created {
                return Ok(());
            }
        }
    }

    async fn next(&mut self) -> Result<Changes, StoreError> {
        loop {
            if let Some(changes) = self.waiting.pop() {
                self.from = changes.revision + 1;
                return Ok(changes);
            }
            let response = self.response().await?;
            self.take(response)?;
        }
    }

    /// Sorts a response's changes by revision. etcd never divides a revision between responses.
    fn take(&mut self, response: pb::WatchResponse) -> Result<(), StoreError> {
        let mut all: Vec<Changes> = Vec::new();
        for event in response.events {
            let is_delete = event.kind == pb::EventType::Delete as i32;
            let entry = event.kv.unwrap_or_default();
            let entry = self.keys.read(entry)?;
            let revision = entry.modified;
            let change = match is_delete {
                true => Change::Delete { key: entry.key },
                false => Change::Put(entry),
            };
            match all.last_mut() {
                Some(last) if last.revision == revision => last.changes.push(change),
                _ => all.push(Changes {
                    revision,
                    changes: vec![change],
                }),
            }
        }
        all.reverse();
        self.waiting.splice(0..0, all);
        Ok(())
    }
}
