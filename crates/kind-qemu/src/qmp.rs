//! The QEMU Machine Protocol: commands to a QEMU process, and its events, as lines of JSON over a
//! socket (docs/interop/qmp-spec.rst of QEMU).
//!
//! A command has a time limit, because a QEMU that hangs answers nothing; what it answers in
//! excess, in a form that is not known, or without an end is bounded here. Which commands mean
//! what is left to [`crate::vm`] and [`crate::migration`].
//!
//! QEMU carries out commands one after the other, in the thread that also serves its guest's devices.
//! That may wait for a page of a guest whose memory follows it, and for ever if the connection is lost
//! over which the page was to come. So what mends the connection is carried out of this order
//! ([`Qmp::execute_at_once`], "out-of-band execution" in the specification); QEMU reads such a command
//! only while few others wait, which is seen to here.
//!
//! Of the crates for this protocol, `qapi` decodes events into an enumeration of the QEMU version
//! that it was generated from and ends the connection at one of a later version; here unknown
//! events are passed on by name.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest line that is accepted, in bytes: some answers describe many devices.
const LINE_BYTES_MAX: u64 = 4 << 20;

/// How long a command may take that does not say otherwise. QEMU answers within milliseconds
/// unless its disk hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Commands that QEMU has not answered, at most: with eight that wait it reads no more
/// (`QMP_REQ_QUEUE_LEN_MAX` in monitor/qmp.c of QEMU).
const UNANSWERED_MAX: usize = 6;

/// Why a command was not carried out.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum QmpError {
    /// QEMU's own words.
    #[error("QEMU refuses `{command}`: {reason}")]
    Refused { command: String, reason: String },
    /// Whether it was carried out is unknown.
    #[error("QEMU does not answer `{command}` within {} s", .patience.as_secs())]
    Silent { command: String, patience: Duration },
    /// The process ended, or what it says is no QMP.
    #[error("the connection to QEMU is lost: {0}")]
    Lost(String),
}

/// An event of QEMU.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct QmpEvent {
    #[serde(rename = "event")]
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) data: Value,
}

/// A line from QEMU.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Event(QmpEvent),
    Success {
        #[serde(rename = "return")]
        value: Value,
        id: Option<u64>,
    },
    Failure {
        error: Failure,
        id: Option<u64>,
    },
    Greeting {
        #[serde(rename = "QMP")]
        _greeting: Value,
    },
}

#[derive(Debug, Deserialize)]
struct Failure {
    desc: String,
}

type Answer = Result<Value, String>;

#[derive(Default)]
struct Pending {
    next: u64,
    waiting: HashMap<u64, SyncSender<Answer>>,
    /// Commands in their order that QEMU has not answered, whether somebody still waits or not.
    unanswered: HashSet<u64>,
    /// Why no answer comes any more.
    lost: Option<String>,
}

/// What is shared with the thread that reads.
#[derive(Default)]
struct Shared {
    pending: Mutex<Pending>,
    /// A command was answered, or none will be.
    answered: Condvar,
}

/// How a command is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Once those before it are.
    Queue,
    /// At once, whatever QEMU does.
    AtOnce,
}

/// A connection to one QEMU process. Its methods block.
pub(crate) struct Qmp {
    writer: Mutex<UnixStream>,
    shared: Arc<Shared>,
    /// Whether QEMU can carry a command out at once.
    executes_at_once: bool,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qmp {
    /// Negotiates with the QEMU at the other end, and reads from it until it closes. `on_event` is
    /// called on a thread of its own, and must not wait for a command.
    ///
    /// # Errors
    /// [`QmpError`]; `patience` is how long QEMU may take until it answers at all.
    pub(crate) fn connect(
        socket: UnixStream,
        patience: Duration,
        on_event: impl Fn(QmpEvent) + Send + 'static,
    ) -> Result<Self, QmpError> {
        let lost = |error: io::Error| QmpError::Lost(error.to_string());
        let reader = socket.try_clone().map_err(lost)?;
        // A QEMU that reads nothing must not hold a command up for ever.
        socket.set_write_timeout(Some(PATIENCE)).map_err(lost)?;
        let shared: Arc<Shared> = Arc::default();
        let answers = shared.clone();
        let thread = std::thread::Builder::new().name("qmp".into());
        thread
            .spawn(move || {
                let reason = match read_lines(reader, &answers, &on_event) {
                    Ok(()) => "QEMU has ended".to_owned(),
                    Err(error) => error.to_string(),
                };
                let mut pending = lock(&answers.pending);
                pending.lost = Some(reason);
                pending.waiting.clear();
                answers.answered.notify_all();
            })
            .map_err(lost)?;
        let mut qmp = Qmp {
            writer: Mutex::new(socket),
            shared,
            executes_at_once: true,
        };
        let negotiation = "qmp_capabilities";
        let enabled = qmp.execute_within(negotiation, json!({ "enable": ["oob"] }), patience);
        if let Err(QmpError::Refused { .. }) = enabled {
            qmp.executes_at_once = false;
            qmp.execute_within(negotiation, json!({}), patience)?;
        } else {
            enabled?;
        }
        Ok(qmp)
    }

    /// Carries out a command without a result.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(crate) fn execute(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.execute_within(command, arguments, PATIENCE).map(drop)
    }

    /// As [`Self::execute`], whatever QEMU does meanwhile. Few commands can be: see the schema.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(crate) fn execute_at_once(&self, command: &str, arguments: Value) -> Result<(), QmpError> {
        let order = match self.executes_at_once {
            true => Order::AtOnce,
            false => Order::Queue,
        };
        let send = |mut socket: &UnixStream, line: &[u8]| socket.write_all(line);
        self.exchange(order, command, arguments, PATIENCE, send)
            .map(drop)
    }

    /// As [`Self::execute`], with a descriptor that the command takes. Callers wait for one such
    /// command until they give the next: QEMU keeps only the last descriptor that it was passed.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(crate) fn execute_with_descriptor(
        &self,
        command: &str,
        arguments: Value,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(), QmpError> {
        let send =
            |socket: &UnixStream, line: &[u8]| send_with_descriptor(socket, line, descriptor);
        self.exchange(Order::Queue, command, arguments, PATIENCE, send)
            .map(drop)
    }

    /// Asks for something.
    ///
    /// # Errors
    /// [`QmpError`], also if the answer has another form.
    pub(crate) fn query<T: for<'de> Deserialize<'de>>(&self, command: &str) -> Result<T, QmpError> {
        self.query_with(command, json!({}))
    }

    /// As [`Self::query`], with arguments.
    ///
    /// # Errors
    /// [`QmpError`], also if the answer has another form.
    pub(crate) fn query_with<T: for<'de> Deserialize<'de>>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        let value = self.execute_within(command, arguments, PATIENCE)?;
        T::deserialize(value).map_err(|error| QmpError::Lost(format!("`{command}`: {error}")))
    }

    /// As [`Self::execute`], within a time of the caller's; with the answer.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(crate) fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        let send = |mut socket: &UnixStream, line: &[u8]| socket.write_all(line);
        self.exchange(Order::Queue, command, arguments, patience, send)
    }

    fn exchange(
        &self,
        order: Order,
        command: &str,
        arguments: Value,
        patience: Duration,
        send: impl FnOnce(&UnixStream, &[u8]) -> io::Result<()>,
    ) -> Result<Value, QmpError> {
        let silent = || QmpError::Silent {
            command: command.to_owned(),
            patience,
        };
        let deadline = Instant::now() + patience;
        let (id, answer) = self.register(order, patience)?.ok_or_else(silent)?;
        let execute = match order {
            Order::Queue => "execute",
            Order::AtOnce => "exec-oob",
        };
        let line = json!({ execute: command, "arguments": arguments, "id": id });
        let sent = send(&lock(&self.writer), format!("{line}\n").as_bytes());
        let received = match sent {
            Ok(()) => answer.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            Err(error) => {
                let mut pending = lock(&self.shared.pending);
                pending.waiting.remove(&id);
                pending.unanswered.remove(&id);
                self.shared.answered.notify_one();
                return Err(QmpError::Lost(error.to_string()));
            }
        };
        match received {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(reason)) => Err(QmpError::Refused {
                command: command.to_owned(),
                reason,
            }),
            Err(RecvTimeoutError::Timeout) => {
                lock(&self.shared.pending).waiting.remove(&id);
                Err(silent())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let reason = lock(&self.shared.pending).lost.clone();
                Err(QmpError::Lost(reason.unwrap_or_default()))
            }
        }
    }

    /// A number for a command, once QEMU has answered enough of those before it; `None` if it does not
    /// in time.
    fn register(
        &self,
        order: Order,
        patience: Duration,
    ) -> Result<Option<(u64, Receiver<Answer>)>, QmpError> {
        let is_full = |pending: &mut Pending| {
            let waits = order == Order::Queue && pending.unanswered.len() >= UNANSWERED_MAX;
            waits && pending.lost.is_none()
        };
        let pending = lock(&self.shared.pending);
        let answered = &self.shared.answered;
        let waited = answered.wait_timeout_while(pending, patience, is_full);
        let (mut pending, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = &pending.lost {
            return Err(QmpError::Lost(reason.clone()));
        }
        if waited.timed_out() {
            return Ok(None);
        }
        let id = pending.next;
        pending.next += 1;
        let (send, receive) = sync_channel(1);
        pending.waiting.insert(id, send);
        if order == Order::Queue {
            pending.unanswered.insert(id);
        }
        Ok(Some((id, receive)))
    }
}

/// Sends a line, and a descriptor with its first byte (`SCM_RIGHTS`).
fn send_with_descriptor(
    mut socket: &UnixStream,
    line: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<()> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !beside.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no space for a descriptor"));
    }
    let pieces = [IoSlice::new(line)];
    let sent = sendmsg(socket, &pieces, &mut beside, SendFlags::NOSIGNAL)?;
    socket.write_all(line.get(sent..).unwrap_or_default())
}

/// Reads until QEMU closes the socket.
fn read_lines(socket: UnixStream, shared: &Shared, on_event: &dyn Fn(QmpEvent)) -> io::Result<()> {
    each_line(BufReader::new(socket), |line| {
        let (id, answer) = match line {
            Line::Greeting { .. } => return,
            Line::Event(event) => return on_event(event),
            Line::Success { value, id } => (id, Ok(value)),
            Line::Failure { error, id } => (id, Err(error.desc)),
        };
        let waiting = id.and_then(|id| {
            let mut pending = lock(&shared.pending);
            if pending.unanswered.remove(&id) {
                shared.answered.notify_one();
            }
            pending.waiting.remove(&id)
        });
        if let Some(waiting) = waiting {
            // Whoever asked may have stopped waiting.
            let _ = waiting.try_send(answer);
        }
    })
}

/// Decodes what QEMU says, line by line, until its end.
fn each_line(mut reader: impl BufRead, mut on_line: impl FnMut(Line)) -> io::Result<()> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut line = Vec::new();
    loop {
        line.clear();
        let count = (&mut reader)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)?;
        if count == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            return Err(invalid("it sent a line without an end".into()));
        }
        let parsed = serde_json::from_slice(&line);
        on_line(parsed.map_err(|error| invalid(format!("no QMP: {error}")))?);
    }
}

/// Whether bytes are what QEMU may say, of which each answer is passed on, for fuzzing.
pub(crate) fn is_conversation(bytes: &[u8], mut on_answer: impl FnMut(Value)) -> bool {
    let read = each_line(bytes, |line| {
        if let Line::Success { value, .. } = line {
            on_answer(value);
        }
    });
    read.is_ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread;

    /// A QEMU that answers the negotiation, and then as the test says.
    pub(crate) fn connect(
        qemu: impl FnOnce(&mut BufReader<UnixStream>, &mut UnixStream) + Send + 'static,
    ) -> (Result<Qmp, QmpError>, Receiver<QmpEvent>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut writer = theirs.try_clone().unwrap();
            let mut reader = BufReader::new(theirs);
            let greeting = br#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;
            writer.write_all(greeting).unwrap();
            writer.write_all(b"\r\n").unwrap();
            answer(&mut reader, &mut writer, r#""return": {}"#);
            qemu(&mut reader, &mut writer);
        });
        let (send, events) = channel();
        let on_event = move |event| {
            let _ = send.send(event);
        };
        (Qmp::connect(ours, PATIENCE, on_event), events)
    }

    /// Answers one command; returns it.
    pub(crate) fn answer(reader: &mut impl BufRead, writer: &mut impl Write, with: &str) -> Value {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        let id = &command["id"];
        let answer = format!("{{{with}, \"id\": {id}}}\r\n");
        writer.write_all(answer.as_bytes()).unwrap();
        command
    }

    #[test]
    fn commands_are_answered_and_events_of_any_name_are_passed_on() {
        let (qmp, events) = connect(|reader, writer| {
            let event = "{\"timestamp\": {}, \"event\": \"LATER\", \"data\": {\"a\": 1}}\r\n";
            writer.write_all(event.as_bytes()).unwrap();
            writer.write_all(b"{\"event\": \"STOP\"}\r\n").unwrap();
            let asked = answer(reader, writer, r#""return": {"status": "running"}"#);
            assert_eq!(asked["execute"], "query-status");
            let desc = r#""error": {"class": "GenericError", "desc": "no such device"}"#;
            let asked = answer(reader, writer, desc);
            assert_eq!(asked["arguments"]["id"], "x");
        });
        let qmp = qmp.unwrap();
        let status: Value = qmp.query("query-status").unwrap();
        assert_eq!(status["status"], "running");
        let refused = qmp.execute("device_del", json!({ "id": "x" }));
        let refused = refused.unwrap_err().to_string();
        assert_eq!(refused, "QEMU refuses `device_del`: no such device");
        let names = [events.recv().unwrap(), events.recv().unwrap()];
        assert_eq!(names[0].name, "LATER");
        assert_eq!(names[0].data["a"], 1);
        assert_eq!(names[1].name, "STOP");
    }

    /// What QEMU does not answer is not asked again and again, so that it reads what it is to carry out
    /// at once.
    #[test]
    fn a_command_is_carried_out_at_once_whatever_qemu_does() {
        let (qmp, _events) = connect(|reader, writer| {
            let mut line = String::new();
            for _ in 0..UNANSWERED_MAX {
                reader.read_line(&mut line).unwrap();
            }
            let asked = answer(reader, writer, r#""return": {}"#);
            assert_eq!(asked["exec-oob"], "migrate-recover");
            // At last.
            let first: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
            let late = format!("{{\"return\": {{}}, \"id\": {}}}\n", first["id"]);
            writer.write_all(late.as_bytes()).unwrap();
            let asked = answer(reader, writer, r#""return": {}"#);
            assert_eq!(asked["execute"], "cont");
        });
        let qmp = qmp.unwrap();
        let patience = Duration::from_millis(1);
        for _ in 0..2 * UNANSWERED_MAX {
            let silent = qmp.execute_within("query-status", json!({}), patience);
            assert!(matches!(silent, Err(QmpError::Silent { .. })), "{silent:?}");
        }
        qmp.execute_at_once("migrate-recover", json!({})).unwrap();
        qmp.execute("cont", json!({})).unwrap();
    }

    #[test]
    fn a_qemu_that_has_one_order_is_used_so() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut writer = theirs.try_clone().unwrap();
            let mut reader = BufReader::new(theirs);
            let asked = answer(&mut reader, &mut writer, r#""error": {"desc": "no such"}"#);
            assert_eq!(asked["arguments"]["enable"][0], "oob");
            answer(&mut reader, &mut writer, r#""return": {}"#);
            let asked = answer(&mut reader, &mut writer, r#""return": {}"#);
            assert_eq!(asked["execute"], "migrate-recover");
        });
        let qmp = Qmp::connect(ours, PATIENCE, |_| {}).unwrap();
        qmp.execute_at_once("migrate-recover", json!({})).unwrap();
    }

    #[test]
    fn a_qemu_that_ends_ends_all_commands() {
        let (qmp, _events) = connect(|_, _| {});
        let lost = qmp.unwrap().execute("stop", json!({})).unwrap_err();
        assert!(matches!(lost, QmpError::Lost(_)), "{lost}");
    }

    #[test]
    fn garbage_is_an_error_and_not_a_hang() {
        for garbage in [&b"\xff\x00 {]\n"[..], b"[1, 2]\n", b"{\"return\": 1"] {
            let (qmp, _events) = connect(move |_, writer| {
                writer.write_all(garbage).unwrap();
            });
            let lost = qmp.unwrap().execute("stop", json!({})).unwrap_err();
            assert!(matches!(lost, QmpError::Lost(_)), "{lost}");
        }
    }

    #[test]
    fn a_line_without_an_end_is_bounded() {
        let (qmp, _events) = connect(|_, writer| {
            let piece = vec![b' '; 1 << 20];
            // It is not read to the end.
            while writer.write_all(&piece).is_ok() {}
        });
        let lost = qmp.unwrap().execute("stop", json!({})).unwrap_err();
        assert!(matches!(lost, QmpError::Lost(_)), "{lost}");
    }
}
