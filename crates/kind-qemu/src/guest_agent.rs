//! The QEMU guest agent: a program in the guest that carries out commands, which it reads as lines of
//! JSON from a port of a virtio serial device (docs/interop/qemu-ga-ref.rst of QEMU).
//!
//! Nobody says whether an agent reads the port, or what of an earlier exchange is still on its way: a
//! machine may have moved in the middle of one. So every exchange begins with a number that the agent
//! is to repeat, behind a byte that no JSON has (`guest-sync-delimited`). What a guest says may be
//! anything: it is bounded here, and decoded into the types that are expected. Requests take turns, a
//! few of them, each for a limited time: a silent guest holds up nothing else of its worker. Which
//! process a user wants is left to [`crate::worker`].

use crate::guest_system;
use data_encoding::BASE64;
use keel_machine::worker::control::{Execute, ExecutionEnd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Before a synchronised exchange: no byte of UTF-8.
const DELIMITER: u8 = 0xff;
/// The longest line that is accepted, in bytes: an agent keeps 16 MiB of each of a process's two
/// outputs, which Base64 makes a third longer.
const LINE_BYTES_MAX: usize = 48 << 20;
/// Bytes of each of a process's outputs that are passed on: an answer with both fits into a message
/// of an agent.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Bytes that are read at once.
const PIECE_BYTES: usize = 64 << 10;
/// How long a request may wait for its turn, an agent until it answers at all, and then between two
/// pieces of its answer. It answers at once unless its guest is busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer may take as a whole.
const ANSWER_PATIENCE: Duration = Duration::from_secs(40);
/// Requests that wait for their turn, at most.
const WAITING_MAX: usize = 8;
/// Ends of processes that are remembered: an agent forgets one with its answer, which may be lost on
/// its way to whoever asked.
const ENDS_MAX: usize = 16;

/// Why the agent did not do something.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum AgentError {
    /// Nothing was done.
    #[error(
        "no guest agent answers in it within {} s (install qemu-guest-agent there, and see that it runs)",
        PATIENCE.as_secs()
    )]
    Silent,
    /// Nothing was done.
    #[error("its guest agent has other requests to answer; try again")]
    Busy,
    /// Nothing was done.
    #[error("its system cannot be asked: {0}")]
    Unreachable(String),
    /// The agent's own words.
    #[error("its guest agent refuses `{command}`: {reason}")]
    Refused {
        command: &'static str,
        reason: String,
    },
    /// Whether it was done is unknown.
    #[error("the answer of its guest agent to `{command}` is lost: {reason}")]
    Lost {
        command: &'static str,
        reason: String,
    },
}

impl AgentError {
    /// Whether the agent knows no such process, and never will.
    pub(crate) fn is_about_an_unknown_process(&self) -> bool {
        // "Invalid parameter 'pid'", from 9.1 on "PID 7 does not exist": its error class is that of
        // most errors.
        let AgentError::Refused { reason, .. } = self else {
            return false;
        };
        reason.to_lowercase().contains("pid")
    }

    /// Of an exchange before its command was sent.
    fn before_command(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => AgentError::Silent,
            io::ErrorKind::InvalidData => AgentError::Unreachable(error.to_string()),
            _ => AgentError::Unreachable(format!("it has ended, or is ending ({error})")),
        }
    }
}

/// An answer.
#[derive(Debug, Deserialize)]
pub(crate) struct Answer<T> {
    #[serde(rename = "return")]
    pub(crate) value: Option<T>,
    error: Option<Failure>,
}

#[derive(Debug, Deserialize)]
struct Failure {
    desc: String,
}

/// The answer to `guest-exec`.
#[derive(Debug, Deserialize)]
struct Started {
    pid: i64,
}

/// The answer to `guest-exec-status`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ProcessStatus {
    exited: bool,
    exitcode: Option<i32>,
    signal: Option<i32>,
    out_data: Option<String>,
    err_data: Option<String>,
    #[serde(default)]
    out_truncated: bool,
    #[serde(default)]
    err_truncated: bool,
}

impl ProcessStatus {
    /// How the process ended, if it has.
    ///
    /// # Errors
    /// If its output is not Base64.
    fn end(self) -> Result<Option<ExecutionEnd>, String> {
        if !self.exited {
            return Ok(None);
        }
        let mut is_cut = self.out_truncated || self.err_truncated;
        let mut decode = |text: Option<String>| {
            let bytes = BASE64.decode(text.unwrap_or_default().as_bytes());
            let mut bytes = bytes.map_err(|error| error.to_string())?;
            is_cut |= bytes.len() > OUTPUT_BYTES_MAX;
            bytes.truncate(OUTPUT_BYTES_MAX);
            bytes.shrink_to_fit();
            Ok::<_, String>(bytes)
        };
        let (output, error_output) = (decode(self.out_data)?, decode(self.err_data)?);
        Ok(Some(ExecutionEnd {
            exit_code: self.exitcode,
            signal: self.signal,
            output,
            error_output,
            is_cut,
        }))
    }
}

/// The host's end of an agent's port. Methods block, for a limited time.
#[derive(Debug)]
pub(crate) struct GuestAgent {
    turns: Mutex<Turns>,
    /// A request has had its turn.
    freed: Condvar,
}

#[derive(Debug)]
struct Turns {
    /// None while a request has its turn.
    channel: Option<Channel>,
    waiting: usize,
    /// How processes ended, by their numbers; the newest last.
    ends: VecDeque<(i64, ExecutionEnd)>,
}

/// The turn of a request, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    agent: &'a GuestAgent,
    channel: Option<Channel>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.agent.turns().channel = self.channel.take();
        self.agent.freed.notify_one();
    }
}

impl GuestAgent {
    /// With a socket whose other end QEMU has.
    ///
    /// # Errors
    /// If the socket cannot be used.
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let channel = Channel {
            socket,
            unread: Vec::new(),
        };
        let turns = Turns {
            channel: Some(channel),
            waiting: 0,
            ends: VecDeque::new(),
        };
        Ok(GuestAgent {
            turns: Mutex::new(turns),
            freed: Condvar::new(),
        })
    }

    /// Starts a process in the guest; returns its number there.
    ///
    /// # Errors
    /// [`AgentError`].
    pub(crate) fn start_process(&self, process: &Execute) -> Result<i64, AgentError> {
        let mut arguments = json!({
            "path": process.command,
            "arg": process.arguments,
            "capture-output": true,
        });
        if !process.environment.is_empty() {
            arguments["env"] = json!(process.environment);
        }
        if !process.input.is_empty() {
            arguments["input-data"] = json!(BASE64.encode(&process.input));
        }
        let started: Started = self.query("guest-exec", &arguments)?;
        // Of an earlier boot of the guest, or so long ago that the number is used again.
        self.turns()
            .ends
            .retain(|(number, _)| *number != started.pid);
        Ok(started.pid)
    }

    /// How a process ended; `None` while it runs.
    ///
    /// # Errors
    /// [`AgentError`]; refused if the agent knows no such process.
    pub(crate) fn process_end(&self, number: i64) -> Result<Option<ExecutionEnd>, AgentError> {
        let known = {
            let turns = self.turns();
            let mut ends = turns.ends.iter();
            ends.find(|(it, _)| *it == number)
                .map(|(_, end)| end.clone())
        };
        if known.is_some() {
            return Ok(known);
        }
        let command = "guest-exec-status";
        let status: ProcessStatus = self.query(command, &json!({ "pid": number }))?;
        let end = status.end();
        let end = end.map_err(|reason| AgentError::Lost { command, reason })?;
        if let Some(end) = &end {
            let mut turns = self.turns();
            if turns.ends.len() >= ENDS_MAX {
                turns.ends.pop_front();
            }
            turns.ends.push_back((number, end.clone()));
        }
        Ok(end)
    }

    /// Sets the guest's clock, and its hardware clock; `time` is since 1970-01-01 UTC.
    ///
    /// # Errors
    /// [`AgentError`].
    pub(crate) fn set_time(&self, time: Duration) -> Result<(), AgentError> {
        let nanoseconds = i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        let set: Value = self.query("guest-set-time", &json!({ "time": nanoseconds }))?;
        drop(set);
        Ok(())
    }

    /// Asks the guest to shut down, until `deadline` at the latest.
    ///
    /// # Errors
    /// [`AgentError`], if it was not asked.
    pub(crate) fn shut_down(&self, deadline: Instant) -> Result<(), AgentError> {
        let begun = Instant::now();
        let mut turn = self.turn(PATIENCE.min(deadline.saturating_duration_since(begun)))?;
        let deadline = deadline.min(Instant::now() + PATIENCE);
        let channel = turn.channel()?;
        // It does not answer, unless it refuses.
        let command = json!({ "execute": "guest-shutdown", "arguments": { "mode": "powerdown" } });
        channel
            .synchronise(deadline)
            .and_then(|()| channel.send(format!("{command}\n").as_bytes(), deadline))
            .map_err(|error| AgentError::before_command(&error))
    }

    /// Waits until no exchange is going on, and keeps others from beginning until the result is
    /// dropped; `None` if one is not over in time. So no answer is on its way when the guest is stopped
    /// for a move.
    pub(crate) fn quiet(&self, patience: Duration) -> Option<Turn<'_>> {
        self.turn(patience).ok()
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    fn turn(&self, patience: Duration) -> Result<Turn<'_>, AgentError> {
        let mut turns = self.turns();
        if turns.waiting >= WAITING_MAX {
            return Err(AgentError::Busy);
        }
        turns.waiting += 1;
        let waited = self
            .freed
            .wait_timeout_while(turns, patience, |turns| turns.channel.is_none());
        let (mut turns, _) = waited.unwrap_or_else(PoisonError::into_inner);
        turns.waiting -= 1;
        match turns.channel.take() {
            Some(channel) => Ok(Turn {
                agent: self,
                channel: Some(channel),
            }),
            None => Err(AgentError::Busy),
        }
    }

    fn query<T: DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: &Value,
    ) -> Result<T, AgentError> {
        let lost = |reason: String| AgentError::Lost { command, reason };
        let answer = self.ask(command, arguments, LINE_BYTES_MAX)?;
        let answer: Answer<T> =
            serde_json::from_slice(&answer).map_err(|error| lost(error.to_string()))?;
        match (answer.value, answer.error) {
            (_, Some(Failure { desc })) => Err(AgentError::Refused {
                command,
                reason: desc,
            }),
            (Some(value), None) => Ok(value),
            (None, None) => Err(lost("it says nothing".into())),
        }
    }

    /// The line that answers a command, of so many bytes at most.
    ///
    /// # Errors
    /// [`AgentError`], if there is none.
    pub(crate) fn ask(
        &self,
        command: &'static str,
        arguments: &Value,
        bytes_max: usize,
    ) -> Result<Vec<u8>, AgentError> {
        let mut turn = self.turn(PATIENCE)?;
        let channel = turn.channel()?;
        channel
            .synchronise(Instant::now() + PATIENCE)
            .map_err(|error| AgentError::before_command(&error))?;
        let lost = |reason: String| AgentError::Lost { command, reason };
        let line = json!({ "execute": command, "arguments": arguments });
        let until = Instant::now() + ANSWER_PATIENCE;
        let answer = channel
            .send(format!("{line}\n").as_bytes(), until)
            .and_then(|()| channel.answer(until, bytes_max));
        answer.map_err(|error| lost(error.to_string()))
    }
}

impl Turn<'_> {
    fn channel(&mut self) -> Result<&mut Channel, AgentError> {
        // It is there until the turn is over.
        self.channel.as_mut().ok_or(AgentError::Busy)
    }
}

/// The socket, with what was read from it beyond the last line.
#[derive(Debug)]
struct Channel {
    /// Does not block.
    socket: UnixStream,
    unread: Vec<u8>,
}

impl Channel {
    /// Begins an exchange: what comes from here on are answers to what is sent from here on.
    ///
    /// # Errors
    /// If the agent does not answer in time.
    fn synchronise(&mut self, deadline: Instant) -> io::Result<()> {
        let number = rand::random::<u32>();
        let command = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
        // The agent's parser starts anew at the delimiter, whatever was sent before.
        let mut frame = vec![DELIMITER];
        frame.extend_from_slice(format!("{command}\n").as_bytes());
        self.send(&frame, deadline)?;
        loop {
            let line = self.line(deadline, Duration::ZERO, LINE_BYTES_MAX)?;
            // Earlier answers are in front of the delimiter, on the same line or not.
            let Some(at) = line.iter().rposition(|byte| *byte == DELIMITER) else {
                continue;
            };
            let answer = serde_json::from_slice::<Answer<u32>>(&line[at + 1..]);
            if answer.is_ok_and(|answer| answer.value == Some(number)) {
                return Ok(());
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.socket.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// An answer to what was sent, of which some comes at least every [`PATIENCE`].
    fn answer(&mut self, until: Instant, bytes_max: usize) -> io::Result<Vec<u8>> {
        let first = until.min(Instant::now() + PATIENCE);
        self.line(first, until.saturating_duration_since(first), bytes_max)
    }

    /// The next line, with its end. If some of it comes before `deadline`, there is more time for the
    /// rest, `more` altogether.
    fn line(&mut self, deadline: Instant, more: Duration, bytes_max: usize) -> io::Result<Vec<u8>> {
        let (mut searched, mut deadline, last) = (0, deadline, deadline + more);
        loop {
            let rest = &self.unread[searched..];
            if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let after = self.unread.split_off(searched + end + 1);
                return Ok(std::mem::replace(&mut self.unread, after));
            }
            searched = self.unread.len();
            if searched > bytes_max {
                self.unread = Vec::new();
                let text = "it sends a line without an end";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            let mut piece = [0; PIECE_BYTES];
            match self.socket.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.unread.extend_from_slice(&piece[..count]);
                    deadline = last.min(deadline.max(Instant::now() + PATIENCE));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN, deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // A guest that never stops talking gets no more time than one that is silent.
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    fn wait(&self, for_what: PollFlags, deadline: Instant) -> io::Result<()> {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: rest.subsec_nanos().into(),
        };
        let mut waiting = [PollFd::new(&self.socket, for_what)];
        match poll(&mut waiting, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether bytes are an answer that a guest agent may give, decoded as each that is understood here.
pub(crate) fn is_answer(bytes: &[u8]) -> bool {
    let at = bytes.iter().rposition(|byte| *byte == DELIMITER);
    let line = &bytes[at.map_or(0, |at| at + 1)..];
    let status = serde_json::from_slice::<Answer<ProcessStatus>>(line);
    let is_status = status.is_ok_and(|answer| {
        // Its output may not be Base64.
        let end = answer.value.map(ProcessStatus::end);
        end.is_some_and(|end| end.is_ok()) || answer.error.is_some()
    });
    let is_start =
        serde_json::from_slice::<Answer<Started>>(line).is_ok_and(|answer| answer.value.is_some());
    let is_number =
        serde_json::from_slice::<Answer<u32>>(line).is_ok_and(|answer| answer.value.is_some());
    is_status || is_start || is_number || guest_system::is_told(line)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    /// An agent in which `act` is called with each command and its arguments, and says what to
    /// answer; `before` is what the guest has said before.
    pub(crate) fn agent(
        before: &'static [u8],
        mut act: impl FnMut(&str, &Value) -> Option<String> + Send + 'static,
    ) -> GuestAgent {
        let (ours, guest) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut writer = guest.try_clone().unwrap();
            writer.write_all(before).unwrap();
            let mut line = Vec::new();
            let mut reader = BufReader::new(guest);
            while reader.read_until(b'\n', &mut line).is_ok_and(|it| it > 0) {
                let at = line.iter().position(|byte| *byte == DELIMITER);
                let command: Value =
                    serde_json::from_slice(&line[at.map_or(0, |at| at + 1)..]).unwrap();
                let name = command["execute"].as_str().unwrap();
                let arguments = &command["arguments"];
                let answer = match name {
                    "guest-sync-delimited" => {
                        // As the real one: the delimiter is an error to it.
                        let error = br#"{"error": {"class": "GenericError", "desc": "stray"}}"#;
                        writer.write_all(error).unwrap();
                        writer.write_all(&[b'\n', DELIMITER]).unwrap();
                        Some(json!({ "return": arguments["id"] }).to_string())
                    }
                    _ => act(name, arguments),
                };
                if let Some(answer) = answer {
                    // Its host may be gone.
                    let _ = writer.write_all(format!("{answer}\n").as_bytes());
                }
                line.clear();
            }
        });
        GuestAgent::new(ours).unwrap()
    }

    fn process() -> Execute {
        Execute {
            command: "cat".into(),
            arguments: vec!["-n".into()],
            environment: vec!["A=b".into()],
            input: b"in".to_vec(),
        }
    }

    #[test]
    fn a_process_is_started_and_its_end_is_told() {
        // Answers of an exchange that was interrupted, the last one in the middle.
        let before = b"{\"return\": 5}\n\xff{\"return\": 7}\n{\"return\": {\"pi";
        let mut looks = 0;
        let agent = agent(before, move |command, arguments| {
            Some(match command {
                "guest-exec" => {
                    let expected = json!({
                        "path": "cat", "arg": ["-n"], "env": ["A=b"],
                        "input-data": "aW4=", "capture-output": true,
                    });
                    assert_eq!(*arguments, expected);
                    r#"{"return": {"pid": 73}}"#.into()
                }
                "guest-exec-status" => {
                    assert_eq!(*arguments, json!({ "pid": 73 }));
                    looks += 1;
                    match looks {
                        1 => r#"{"return": {"exited": false}}"#.into(),
                        2 => r#"{"return": {"exited": true, "exitcode": 3, "out-data": "b3V0",
                                "err-truncated": true}}"#
                            .replace('\n', " "),
                        _ => r#"{"error": {"class": "GenericError", "desc": "PID 73 does not exist"}}"#
                            .into(),
                    }
                }
                other => panic!("{other}"),
            })
        });
        assert_eq!(agent.start_process(&process()).unwrap(), 73);
        assert_eq!(agent.process_end(73).unwrap(), None);
        let end = ExecutionEnd {
            exit_code: Some(3),
            signal: None,
            output: b"out".to_vec(),
            error_output: Vec::new(),
            is_cut: true,
        };
        assert_eq!(agent.process_end(73).unwrap(), Some(end.clone()));
        // The agent knows it no more, its worker does: until the number is given again.
        assert_eq!(agent.process_end(73).unwrap(), Some(end));
        assert_eq!(agent.start_process(&process()).unwrap(), 73);
        let refused = agent.process_end(73).unwrap_err();
        assert!(refused.is_about_an_unknown_process(), "{refused}");
        assert!(refused.to_string().contains("does not exist"), "{refused}");
    }

    /// Nobody answers: a few wait, the others are told at once, and what was waited for is not done
    /// later.
    #[test]
    fn requests_to_a_silent_guest_do_not_pile_up() {
        let (ours, _guest) = UnixStream::pair().unwrap();
        let agent = GuestAgent::new(ours).unwrap();
        let turn = agent.turn(Duration::ZERO).unwrap();
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let waits: Vec<_> = (0..20)
                .map(|_| scope.spawn(|| agent.start_process(&process()).unwrap_err()))
                .collect();
            for wait in waits {
                let error = wait.join().unwrap();
                assert!(matches!(error, AgentError::Busy), "{error}");
            }
        });
        assert!(begun.elapsed() >= PATIENCE);
        assert!(agent.quiet(Duration::ZERO).is_none());
        drop(turn);
        assert_eq!(agent.turns().waiting, 0);
        assert!(agent.quiet(Duration::ZERO).is_some());
    }

    #[test]
    fn a_guest_that_has_ended_is_told_from_a_silent_one() {
        let (ours, guest) = UnixStream::pair().unwrap();
        drop(guest);
        let agent = GuestAgent::new(ours).unwrap();
        let error = agent.process_end(1).unwrap_err();
        assert!(matches!(error, AgentError::Unreachable(_)), "{error}");
        assert!(!error.is_about_an_unknown_process());
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for said in [
            "nonsense",
            "{}",
            r#"{"return": {}}"#,
            r#"{"return": {"exited": true, "out-data": "no Base64"}}"#,
            r#"{"return": [0, 0, 0]}"#,
        ] {
            let agent = agent(b"", |_, _| Some(said.into()));
            let error = agent.process_end(1).unwrap_err();
            assert!(matches!(error, AgentError::Lost { .. }), "{said}: {error}");
        }
    }

    #[test]
    fn a_guest_that_talks_without_an_end_is_not_heard_for_ever() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        std::thread::spawn(move || while guest.write_all(&[b'x'; 1 << 16]).is_ok() {});
        ours.set_nonblocking(true).unwrap();
        let mut channel = Channel {
            socket: ours,
            unread: Vec::new(),
        };
        let error = channel
            .synchronise(Instant::now() + Duration::from_secs(60))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error = channel.synchronise(Instant::now()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn answers_are_told_from_what_is_none() {
        assert!(is_answer(b"\xff{\"return\": 7}"));
        assert!(is_answer(br#"{"error": {"desc": "no"}}"#));
        assert!(!is_answer(b"{}") && !is_answer(b"\xff") && !is_answer(b"7"));
    }
}
