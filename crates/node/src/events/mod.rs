//! What happened on this node: an event at each change of machines, moves,
//! checkpoints, leases and the agent itself, for people who ask what became of
//! something, and programs that follow it.
//!
//! ```text
//!   reconcile, moving, … ── record ──▶ queue ──▶ writer thread ──▶ events.jsonl
//!                                                     │
//!                                                     └──▶ those who follow
//! ```
//!
//! Recording never waits: neither for the disk, nor for readers. When more comes
//! than the disk takes, events are dropped, and an event says how many. Events
//! tell what happened and decide nothing: nobody acts on them.
//!
//! - `file`: the files that they are kept in
//! - `notes`: what is told of machines' lives and moves

mod file;
mod notes;

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
/// Events that one who follows may be behind before the files are read again.
const BEHIND_MAX: usize = 1024;
/// Bytes of an event's sentence, and of one of its fields.
const TEXT_BYTES_MAX: usize = 2048;
const FIELD_BYTES_MAX: usize = 512;

/// What is to be recorded.
#[derive(Debug, Clone)]
pub(crate) struct Note {
    kind: EventKind,
    machine: Option<MachineName>,
    epoch: Option<Epoch>,
    text: String,
    fields: BTreeMap<String, String>,
}

impl Note {
    /// Of the node itself.
    pub(crate) fn node(kind: EventKind, text: impl Into<String>) -> Self {
        Note {
            kind,
            machine: None,
            epoch: None,
            text: cut(text.into(), TEXT_BYTES_MAX),
            fields: BTreeMap::new(),
        }
    }

    /// Of a machine.
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

/// At most so many bytes of a text; what is cut off is marked.
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
    /// Answered when all that came before is written.
    Flush(oneshot::Sender<()>),
}

/// Records this node's events, and lets them be read.
#[derive(Debug, Clone)]
pub(crate) struct Events(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: String,
    folder: PathBuf,
    queue: SyncSender<Message>,
    /// Events that found no room in the queue.
    dropped: Arc<AtomicU64>,
    live: broadcast::Sender<Arc<Event>>,
}

/// What of a node's events is wanted.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    /// Of this machine only.
    pub(crate) machine: Option<MachineName>,
    /// Not before this, in milliseconds since 1970-01-01 UTC.
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
    /// Goes on with the events in a folder. Its writer ends with the last
    /// handle.
    ///
    /// # Errors
    /// The file system's, and if there can be no thread.
    pub(crate) fn open(folder: &Path, node: &NodeName) -> std::io::Result<Self> {
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
        })))
    }

    /// The node whose events these are.
    pub(crate) fn node(&self) -> &str {
        &self.0.node
    }

    /// Records what happened now. Never waits.
    pub(crate) fn record(&self, note: Note) {
        let event = event(&self.0.node, note);
        if self.0.queue.try_send(Message::Write(event)).is_err() {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns when all that was recorded before is written.
    pub(crate) async fn flush(&self) {
        let (done, written) = oneshot::channel();
        let queue = self.0.queue.clone();
        // The queue may be full: that is for a thread that may wait.
        let asked = tokio::task::spawn_blocking(move || queue.send(Message::Flush(done)).is_ok());
        // Where the writer is gone, nothing more is written.
        if asked.await.unwrap_or(false) {
            let _ = written.await;
        }
    }

    /// The newest events that fit, oldest first, and whether there are more.
    ///
    /// # Errors
    /// The file system's.
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
        // The writer's to give.
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
    /// Whether the last write failed: that is logged once.
    failing: bool,
}

impl Writer {
    fn run(mut self, messages: &Receiver<Message>) {
        while let Ok(message) = messages.recv() {
            match message {
                Message::Write(event) => self.write(event),
                Message::Flush(done) => {
                    self.tell_dropped();
                    // Whoever asked may have gone.
                    let _ = done.send(());
                }
            }
        }
    }

    fn tell_dropped(&mut self) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let text = format!("{dropped} event(s) were lost: more came than could be written");
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
            Err(error) if self.failing => tracing::debug!(%error, "an event is not kept"),
            Err(error) => {
                self.failing = true;
                tracing::error!(%error, "events are not kept: is the disk full?");
            }
        }
        // Nobody may follow.
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
        Events::open(folder, &NodeName::new("a").unwrap()).unwrap()
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
        events.record(Note::node(EventKind::NodeStarted, "it started again"));
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
        // The newest are there, in order; of the rest it is known how many.
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
