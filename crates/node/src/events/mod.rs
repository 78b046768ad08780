//! Events of this node: one at each change of machines, moves, checkpoints, leases and the agent
//! itself, for users who trace a change, and programs that follow it.
//!
//! ```text
//!   reconcile, moving, … ── record ──▶ queue ──▶ writer thread ──▶ events.jsonl
//!                                                     │
//!                                                     └──▶ followers
//! ```
//!
//! Recording never waits for the disk or for readers. If events arrive faster than the disk takes
//! them, some are dropped, and an event gives their number. Events only report: no decision
//! depends on them.
//!
//! - `file`: the files of events
//! - `notes`: events about machines' lives and moves

mod file;
mod notes;

use crate::metrics::Metrics;
use file::{EventFile, Newest};
use keel_api::{Event, EventKind};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_store::clock::unix_ms;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use tokio::sync::{broadcast, oneshot};

/// Events that may wait to be written.
const QUEUE_MAX: usize = 4096;
/// Events that a follower may lag behind before the files are read again.
const BEHIND_MAX: usize = 1024;
/// Limits in bytes of an event's sentence, and of one of its fields.
const TEXT_BYTES_MAX: usize = 2048;
const FIELD_BYTES_MAX: usize = 512;

/// An event to record.
#[derive(Debug, Clone)]
pub(crate) struct Note {
    kind: EventKind,
    machine: Option<MachineName>,
    epoch: Option<Epoch>,
    text: String,
    fields: BTreeMap<String, String>,
}

impl Note {
    /// About the node itself.
    pub(crate) fn node(kind: EventKind, text: impl Into<String>) -> Self {
        Note {
            kind,
            machine: None,
            epoch: None,
            text: cut(text.into(), TEXT_BYTES_MAX),
            fields: BTreeMap::new(),
        }
    }

    /// About a machine.
    pub(crate) fn machine(kind: EventKind, machine: &MachineName, text: impl Into<String>) -> Self {
        Note {
            machine: Some(machine.clone()),
            ..Note::node(kind, text)
        }
    }

    /// Under an epoch.
    pub(crate) fn under(mut self, epoch: Epoch) -> Self {
        self.epoch = Some(epoch);
        self
    }

    /// With a field for programs.
    pub(crate) fn with(mut self, name: &str, value: impl ToString) -> Self {
        let value = cut(value.to_string(), FIELD_BYTES_MAX);
        self.fields.insert(name.to_owned(), value);
        self
    }
}

/// Truncates a text to a number of bytes and marks the cut.
fn cut(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let mark = "…";
        text.truncate(text.floor_char_boundary(bytes_max - mark.len()));
        text += mark;
    }
    text
}

enum Message {
    Write(Event),
    /// Answered when all earlier events are written.
    Flush(oneshot::Sender<()>),
}

/// Records this node's events, and reads them.
#[derive(Debug, Clone)]
pub(crate) struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: String,
    folder: PathBuf,
    queue: SyncSender<Message>,
    /// Events that found the queue full.
    dropped: Arc<AtomicU64>,
    live: broadcast::Sender<Arc<Event>>,
    metrics: Metrics,
}

/// A query of a node's events.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    /// Only about this machine.
    pub(crate) machine: Option<MachineName>,
    /// Earliest time, in milliseconds since 1970-01-01 UTC.
    pub(crate) since_unix_ms: u64,
    /// Only with greater ids.
    pub(crate) after: u64,
}

impl Filter {
    pub(crate) fn fits(&self, event: &Event) -> bool {
        event.id > self.after
            && event.at_unix_ms >= self.since_unix_ms
            && self
                .machine
                .as_ref()
                .is_none_or(|machine| event.machine.as_deref() == Some(machine.as_str()))
    }
}

impl Events {
    /// Opens the events in a folder. Their writer ends with the last handle.
    ///
    /// # Errors
    /// I/O errors, also if the thread cannot be started.
    pub(crate) fn open(folder: &Path, node: &NodeName, metrics: Metrics) -> std::io::Result<Self> {
        let file = EventFile::open(folder)?;
        let (queue, messages) = sync_channel(QUEUE_MAX);
        let (live, _) = broadcast::channel(BEHIND_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            node: node.to_string(),
            file,
            dropped: dropped.clone(),
            live: live.clone(),
            failing: false,
        };
        std::thread::Builder::new()
            .name("events".into())
            .spawn(move || writer.run(&messages))?;
        Ok(Events(Arc::new(Inner {
            node: node.to_string(),
            folder: folder.to_owned(),
            queue,
            dropped,
            live,
            metrics,
        })))
    }

    /// The node whose events these are.
    pub(crate) fn node(&self) -> &str {
        &self.0.node
    }

    /// Records an event. Never waits.
    pub(crate) fn record(&self, note: Note) {
        self.0.metrics.event(note.kind);
        let event = event(&self.0.node, note);
        if self.0.queue.try_send(Message::Write(event)).is_err() {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns when all earlier events are written.
    pub(crate) async fn flush(&self) {
        let (done, written) = oneshot::channel();
        let queue = self.0.queue.clone();
        // The queue may be full, so a blocking thread sends the request.
        let asked = tokio::task::spawn_blocking(move || queue.send(Message::Flush(done)).is_ok());
        // If the writer has ended, nothing more is written.
        if asked.await.unwrap_or(false) {
            let _ = written.await;
        }
    }

    /// The newest matching events, oldest first, and whether there are more.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) async fn newest(
        &self,
        filter: Filter,
        count_max: usize,
    ) -> std::io::Result<(Vec<Event>, bool)> {
        self.flush().await;
        let folder = self.0.folder.clone();
        tokio::task::spawn_blocking(move || {
            let mut newest = Newest::new(count_max.max(1), |event| filter.fits(event));
            newest.read(&folder)?;
            Ok((newest.events.into(), newest.left_out))
        })
        .await?
    }

    /// Events from now on.
    pub(crate) fn follow(&self) -> broadcast::Receiver<Arc<Event>> {
        self.0.live.subscribe()
    }
}

fn event(node: &str, note: Note) -> Event {
    Event {
        // The writer assigns it.
        id: 0,
        at_unix_ms: unix_ms(),
        node: node.to_owned(),
        machine: note.machine.map(|machine| machine.to_string()),
        epoch: note.epoch.map(|epoch| epoch.to_string()),
        kind: note.kind,
        text: note.text,
        fields: note.fields,
    }
}

struct Writer {
    node: String,
    file: EventFile,
    dropped: Arc<AtomicU64>,
    live: broadcast::Sender<Arc<Event>>,
    /// Whether the last write failed, so that a failure is logged once.
    failing: bool,
}

impl Writer {
    fn run(mut self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Write(event) => self.write(event),
                Message::Flush(done) => {
                    self.tell_dropped();
                    // The caller may have gone.
                    let _ = done.send(());
                }
            }
        }
    }

    fn tell_dropped(&mut self) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let text = format!("{dropped} event(s) were lost: the disk is too slow");
            let note = Note::node(EventKind::EventsLost, text).with("count", dropped);
            let event = event(&self.node, note);
            self.add(event);
        }
    }

    fn write(&mut self, event: Event) {
        self.add(event);
        self.tell_dropped();
    }

    fn add(&mut self, mut event: Event) {
        match self.file.add(&mut event) {
            Ok(()) => self.failing = false,
            Err(error) if self.failing => tracing::debug!(%error, "cannot write an event"),
            Err(error) => {
                self.failing = true;
                tracing::error!(%error, "cannot write events: is the disk full?");
            }
        }
        // There may be no follower.
        let _ = self.live.send(Arc::new(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Filter {
        Filter {
            machine: None,
            since_unix_ms: 0,
            after: 0,
        }
    }

    fn open(folder: &Path) -> Events {
        Events::open(
            folder,
            &NodeName::new("a").unwrap(),
            Metrics::new().unwrap(),
        )
        .unwrap()
    }

    #[tokio::test]
    async fn what_is_recorded_is_read_and_outlives_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let machine = MachineName::new("web").unwrap();
        let events = open(folder.path());
        let mut live = events.follow();
        events.record(Note::node(EventKind::NodeStarted, "it started"));
        let epoch = Epoch {
            incarnation: 1,
            counter: 2,
        };
        events.record(
            Note::machine(EventKind::MoveDone, &machine, "it moved")
                .under(epoch)
                .with("target", "b"),
        );
        let (found, left_out) = events.newest(all(), 10).await.unwrap();
        assert_eq!((found.len(), left_out), (2, false));
        assert_eq!(*live.recv().await.unwrap(), found[0]);
        assert_eq!(*live.recv().await.unwrap(), found[1]);
        drop(events);

        let events = open(folder.path());
        events.record(Note::node(EventKind::NodeStarted, "it was restarted"));
        let (again, _) = events.newest(all(), 10).await.unwrap();
        assert_eq!(again[..2], found);
        assert!(again[2].id > found[1].id);
        let of_machine = Filter {
            machine: Some(machine),
            ..all()
        };
        let (of_machine, _) = events.newest(of_machine, 10).await.unwrap();
        let [moved] = &of_machine[..] else {
            panic!("{of_machine:?}")
        };
        assert_eq!(moved.epoch.as_deref(), Some("1.2"));
        assert_eq!(moved.fields["target"], "b");
        let later = Filter {
            after: moved.id,
            ..all()
        };
        assert_eq!(events.newest(later, 10).await.unwrap().0.len(), 1);
        let future = Filter {
            since_unix_ms: u64::MAX,
            ..all()
        };
        assert!(events.newest(future, 10).await.unwrap().0.is_empty());
    }

    #[tokio::test]
    async fn a_flood_never_waits_and_what_is_lost_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let events = open(folder.path());
        let count = 200_000;
        for number in 0..count {
            events.record(Note::node(EventKind::NodeStarted, "x").with("number", number));
        }
        let (found, _) = events.newest(all(), usize::MAX).await.unwrap();
        let lost: u64 = found
            .iter()
            .filter(|event| event.kind == EventKind::EventsLost)
            .map(|event| event.fields["count"].parse::<u64>().unwrap())
            .sum();
        // The newest are present, in order; the number of the others is known.
        let numbers: Vec<u64> = found
            .iter()
            .filter_map(|event| event.fields.get("number")?.parse().ok())
            .collect();
        assert!(numbers.is_sorted());
        assert!(numbers.len() as u64 + lost <= count);
        assert!(lost > 0 || numbers.last() == Some(&(count - 1)));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        for bytes in 0..12 {
            let text = "é".repeat(bytes);
            let short = cut(text.clone(), 9);
            assert!(short.len() <= 9 || short == text);
            assert_eq!(short == text, text.len() <= 9);
        }
        let note =
            Note::node(EventKind::NodeStarted, "x".repeat(10_000)).with("a", "y".repeat(9999));
        assert!(note.text.len() == TEXT_BYTES_MAX && note.text.ends_with('…'));
        assert_eq!(note.fields["a"].len(), FIELD_BYTES_MAX);
    }
}
