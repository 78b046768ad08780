//! Commands of users in machines: a process is started by the agent of the machine's owner, and asked
//! for until it ends, wherever its machine is by then.
//!
//! The process belongs to the guest: it goes on if its user, or any node, is gone. A machine that
//! begins anew does not have it any more.

use super::handle::Machines;
use crate::error::CommandError;
use crate::processes::explained;
use crate::records::{self, MachineCommand, at_owner};
use data_encoding::BASE64;
use keel_api::{ExecuteEnd, ExecuteLine, ExecuteRequest};
use keel_cluster::MachineName;
use keel_machine::worker::control::{Execute, ExecutionEnd, kind};
use keel_net::RpcError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

/// How long a worker may take: for a turn, until its guest agent answers at all, and then for the
/// answer.
const WORKER_PATIENCE: Duration = Duration::from_secs(65);
/// How long nobody may know about a process until its user is told so: moves, and agents that are
/// restarted, take less.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(60);
/// How long the owner of a machine may take.
const OWNER_PATIENCE: Duration = Duration::from_secs(75);
/// The first interval at which a process is asked for, and the last one: an agent writes a line into
/// its guest's journal each time.
const POLL_FIRST: Duration = Duration::from_millis(20);
const POLL_LAST: Duration = Duration::from_secs(5);
/// The part of the time since a process began after which it is asked for again.
const POLL_SHARE: u32 = 10;
/// Bytes of a command with its arguments and environment (a Linux has room for 128 KiB in one of
/// them), and of its input.
const WORDS_BYTES_MAX: usize = 256 << 10;
const INPUT_BYTES_MAX: usize = 1 << 20;

/// Starts a process in a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StartProcess {
    pub(crate) machine: MachineName,
    pub(crate) process: Execute,
}

/// A process in a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessNumber {
    /// Its number there, which another boot of the machine may give again.
    number: i64,
    /// When the machine began to run, in milliseconds since 1970-01-01 UTC: moves do not change that.
    started_unix_ms: u64,
}

impl MachineCommand for StartProcess {
    const KIND: u16 = 0x0331;
    const PATIENCE: Duration = OWNER_PATIENCE;
    type Answer = ProcessNumber;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

/// Asks for a process in a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProcessQuery {
    pub(crate) machine: MachineName,
    pub(crate) process: ProcessNumber,
}

/// What is known of a process in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ProcessState {
    Running,
    Ended(ExecutionEnd),
    /// Nothing, and nothing ever will be.
    Lost(String),
}

impl MachineCommand for ProcessQuery {
    const KIND: u16 = 0x0332;
    const PATIENCE: Duration = OWNER_PATIENCE;
    const IS_BULK: bool = true;
    type Answer = ProcessState;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Machines {
    /// Executes a command in a machine, wherever that is. The process has started when this returns;
    /// the last line says how it ended.
    ///
    /// # Errors
    /// [`CommandError`] if it was not started.
    pub(crate) async fn execute(
        self: &Arc<Self>,
        machine: MachineName,
        request: ExecuteRequest,
    ) -> Result<mpsc::Receiver<ExecuteLine>, CommandError> {
        let process = process(request)?;
        let command = StartProcess {
            machine: machine.clone(),
            process,
        };
        let here = |it| self.start_process_here(it);
        let process = at_owner(&self.context, command, here).await?;
        let (send, lines) = mpsc::channel(4);
        let machines = self.clone();
        tokio::spawn(async move {
            machines
                .follow(&ProcessQuery { machine, process }, &send)
                .await
        });
        Ok(lines)
    }

    pub(crate) async fn start_process_here(
        &self,
        command: StartProcess,
    ) -> Result<ProcessNumber, CommandError> {
        let machine = &command.machine;
        let record = records::get(&*self.context.store, machine).await?.record;
        let kind = self.context.kinds.of(&record.spec);
        if !kind.map_err(CommandError::Conflict)?.abilities().executes {
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} is of kind {}, in whose machines no command can be executed",
                record.spec.kind
            )));
        }
        let Some(worker) = self.processes.machines.get(machine) else {
            let word = record.word();
            return Err(CommandError::Conflict(format!(
                "machine {machine:?} does not run here now (it is {word})"
            )));
        };
        let started = worker.ask(kind::EXECUTE, &command.process, WORKER_PATIENCE);
        let number = started.await.map_err(|error| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                CommandError::Conflict(format!("machine {machine:?}: {}", explained(reason)))
            }
            RpcError::NotSent { reason, .. } => {
                CommandError::Unavailable(format!("machine {machine:?}: {reason}"))
            }
            RpcError::Unknown { reason, .. } => CommandError::Unavailable(format!(
                "machine {machine:?}: the command may have been started, or not: {reason}"
            )),
        })?;
        Ok(ProcessNumber {
            number,
            started_unix_ms: record.started_unix_ms,
        })
    }

    pub(crate) async fn process_here(
        &self,
        query: ProcessQuery,
    ) -> Result<ProcessState, CommandError> {
        let machine = &query.machine;
        let record = records::get(&*self.context.store, machine).await?.record;
        if record.status.ended() {
            return Ok(ProcessState::Lost("the machine has ended".into()));
        }
        if record.started_unix_ms != query.process.started_unix_ms {
            return Ok(ProcessState::Lost("the machine has begun anew".into()));
        }
        let Some(worker) = self.processes.machines.get(machine) else {
            let reason = format!("machine {machine:?} does not run here now");
            return Err(CommandError::Unavailable(reason));
        };
        let asked = worker.ask(kind::EXECUTED, &query.process.number, WORKER_PATIENCE);
        match asked.await {
            Ok(None) => Ok(ProcessState::Running),
            Ok(Some(end)) => Ok(ProcessState::Ended(end)),
            Err(RpcError::Failed { reason, .. }) => Ok(ProcessState::Lost(reason)),
            Err(error) => Err(CommandError::Unavailable(error.to_string())),
        }
    }

    /// Whether a machine stands still for something that its user can remove, as a full disk.
    async fn is_paused(&self, machine: &MachineName) -> bool {
        let found = records::get(&*self.context.store, machine).await;
        found.is_ok_and(|found| found.record.paused.is_some())
    }

    /// Tells what becomes of a process, until it has ended or nobody listens.
    async fn follow(&self, query: &ProcessQuery, lines: &mpsc::Sender<ExecuteLine>) {
        let begun = Instant::now();
        let mut known = begun;
        loop {
            sleep((begun.elapsed() / POLL_SHARE).clamp(POLL_FIRST, POLL_LAST)).await;
            let here = |it| self.process_here(it);
            let state = at_owner(&self.context, query.clone(), here).await;
            let line = match state {
                Ok(ProcessState::Running) => {
                    known = Instant::now();
                    ExecuteLine::Running
                }
                Ok(ProcessState::Ended(end)) => ExecuteLine::Ended(shown(&end)),
                Ok(ProcessState::Lost(reason)) => unknown(&reason),
                Err(error @ (CommandError::NotFound(_) | CommandError::Invalid(_))) => {
                    unknown(&error.to_string())
                }
                Err(error) if known.elapsed() > UNKNOWN_PATIENCE => unknown(&error.to_string()),
                // It may be moving, or its node may have failed.
                Err(_) => {
                    if self.is_paused(&query.machine).await {
                        known = Instant::now();
                    }
                    ExecuteLine::Running
                }
            };
            let is_last = line != ExecuteLine::Running;
            if lines.send(line).await.is_err() || is_last {
                return;
            }
        }
    }
}

fn unknown(reason: &str) -> ExecuteLine {
    ExecuteLine::Error(format!(
        "the command was started, and how it ended is not known: {reason}"
    ))
}

fn shown(end: &ExecutionEnd) -> ExecuteEnd {
    ExecuteEnd {
        exit_code: end.exit_code,
        signal: end.signal,
        output: BASE64.encode(&end.output),
        error_output: BASE64.encode(&end.error_output),
        is_cut: end.is_cut,
    }
}

/// What a user asks for.
///
/// # Errors
/// If it is nothing that can be executed.
fn process(request: ExecuteRequest) -> Result<Execute, CommandError> {
    let invalid = |text: &str| CommandError::Invalid(text.to_owned());
    let words = std::iter::once(&request.command)
        .chain(&request.arguments)
        .chain(&request.environment);
    if request.command.is_empty() {
        return Err(invalid("the command has no name"));
    }
    if words.clone().any(|word| word.contains('\0')) {
        return Err(invalid("a word of the command has a zero byte"));
    }
    if words.map(String::len).sum::<usize>() > WORDS_BYTES_MAX {
        return Err(CommandError::Invalid(format!(
            "the command with its arguments and environment is longer than {WORDS_BYTES_MAX} bytes"
        )));
    }
    let is_variable = |word: &String| word.find('=').is_some_and(|at| at > 0);
    if let Some(word) = request.environment.iter().find(|it| !is_variable(it)) {
        return Err(CommandError::Invalid(format!(
            "environment {word:?}: NAME=VALUE is expected"
        )));
    }
    let input = BASE64.decode(request.input.as_bytes());
    let input = input.map_err(|error| CommandError::Invalid(format!("input: {error}")))?;
    if input.len() > INPUT_BYTES_MAX {
        return Err(CommandError::Invalid(format!(
            "input of {} bytes: at most {INPUT_BYTES_MAX} are possible",
            input.len()
        )));
    }
    Ok(Execute {
        command: request.command,
        arguments: request.arguments,
        environment: request.environment,
        input,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_executed_is_refused() {
        let request = ExecuteRequest {
            command: "cat".into(),
            arguments: vec!["-n".into()],
            environment: vec!["A=".into()],
            input: "aW4=".into(),
        };
        assert_eq!(process(request.clone()).unwrap().input, b"in");
        let refused = |change: &dyn Fn(&mut ExecuteRequest)| {
            let mut request = request.clone();
            change(&mut request);
            match process(request) {
                Err(CommandError::Invalid(reason)) => reason,
                other => panic!("{other:?}"),
            }
        };
        let is_nameless = refused(&|it| it.command.clear());
        assert_eq!(is_nameless, "the command has no name");
        let has_zero = refused(&|it| it.arguments.push("a\0b".into()));
        assert!(has_zero.contains("zero byte"), "{has_zero}");
        let is_long = refused(&|it| it.arguments.push("x".repeat(WORDS_BYTES_MAX)));
        assert!(is_long.contains("longer than"), "{is_long}");
        let is_no_variable = refused(&|it| it.environment.push("=b".into()));
        assert!(is_no_variable.contains("NAME=VALUE"), "{is_no_variable}");
        let is_no_base64 = refused(&|it| it.input = "aW4".into());
        assert!(is_no_base64.starts_with("input: "), "{is_no_base64}");
        let is_much = refused(&|it| it.input = BASE64.encode(&vec![0; INPUT_BYTES_MAX + 1]));
        assert!(is_much.contains("at most"), "{is_much}");
    }
}
