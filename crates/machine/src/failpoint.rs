//! Failpoints: named points in critical operations at which a test makes the process die,
//! stop, wait or fail.
//!
//! They have no effect unless the process was started with [`ENABLE_ENVIRONMENT`] = 1: the
//! binary that is tested is the one that is shipped. An [`Injection`] is set by the failpoint's name: through an agent's API (`keel
//! debug failpoint`), which passes on those for workers to running ones and, by
//! [`ENVIRONMENT`], to those that it starts later. An injection belongs to one process:
//! its successor after a kill has none.

use rustix::process::{Signal, getpid, kill_process};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Injections for a new worker: `NAME=ORDER`, separated by `;`.
pub const ENVIRONMENT: &str = "KEEL_FAILPOINTS";
/// Set to 1, it lets a process and those that it starts inject faults.
pub const ENABLE_ENVIRONMENT: &str = "KEEL_FAULT_INJECTION";
/// A file to which each process appends the failpoints that had an effect.
pub const LOG_ENVIRONMENT: &str = "KEEL_FAILPOINT_LOG";
/// The longest delay.
const DELAY_MS_MAX: u64 = 600_000;

/// The process that passes a failpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// The agent of a move's source.
    SourceAgent,
    /// The worker at a move's source.
    SourceWorker,
    /// The agent of a move's target.
    TargetAgent,
    /// The worker at a move's target.
    TargetWorker,
    /// The agent of a node that starts or checkpoints a machine.
    Agent,
    /// The worker of that machine.
    Worker,
}

impl Site {
    /// Whether a worker passes it.
    pub fn is_worker(self) -> bool {
        match self {
            Site::SourceWorker | Site::TargetWorker | Site::Worker => true,
            Site::SourceAgent | Site::TargetAgent | Site::Agent => false,
        }
    }

    /// Whether it is at a move's target.
    pub fn is_target(self) -> bool {
        matches!(self, Site::TargetAgent | Site::TargetWorker)
    }
}

/// A named failpoint.
#[derive(Debug, Clone, Copy)]
pub struct Failpoint {
    pub name: &'static str,
    /// The process that passes it.
    pub site: Site,
    /// The situation in which it is passed.
    pub when: &'static str,
}

const fn at(name: &'static str, site: Site, when: &'static str) -> Failpoint {
    Failpoint { name, site, when }
}

/// All failpoints, in the order in which a move, a checkpoint, a restore and a start pass
/// them.
pub const ALL: &[Failpoint] = &[
    at(
        "move.offer",
        Site::SourceAgent,
        "before the target is asked",
    ),
    at(
        "offer.checked",
        Site::TargetAgent,
        "memory, CPU and volumes fit",
    ),
    at("offer.fetched", Site::TargetAgent, "the module is here"),
    at(
        "offer.reserved",
        Site::TargetAgent,
        "the reservation is in the store",
    ),
    at("offer.started", Site::TargetAgent, "its worker answers"),
    at(
        "target.listening",
        Site::TargetWorker,
        "the module is compiled, the port is open",
    ),
    at(
        "offer.accepted",
        Site::TargetAgent,
        "before the answer to the offer",
    ),
    at(
        "move.accepted",
        Site::SourceAgent,
        "the target has accepted",
    ),
    at(
        "source.connect",
        Site::SourceWorker,
        "before the connection to the target's worker",
    ),
    at(
        "target.greeted",
        Site::TargetWorker,
        "the source has sent its hello",
    ),
    at(
        "source.hello",
        Site::SourceWorker,
        "before writes are tracked and pages sent",
    ),
    at(
        "source.round",
        Site::SourceWorker,
        "a round was sent, its answer not yet read",
    ),
    at(
        "target.round",
        Site::TargetWorker,
        "a round has arrived, not yet answered",
    ),
    at(
        "source.converged",
        Site::SourceWorker,
        "few pages are left, not yet reported",
    ),
    at(
        "move.store",
        Site::SourceAgent,
        "before the round trip to the store",
    ),
    at(
        "move.freeze",
        Site::SourceAgent,
        "before the worker is asked to freeze",
    ),
    at(
        "source.freeze",
        Site::SourceWorker,
        "before the threads are stopped",
    ),
    at(
        "source.frozen",
        Site::SourceWorker,
        "the threads are stopped",
    ),
    at(
        "source.last-pages",
        Site::SourceWorker,
        "the last pages are sent",
    ),
    at(
        "source.image",
        Site::SourceWorker,
        "threads and WASI state are sent",
    ),
    at(
        "target.image",
        Site::TargetWorker,
        "all has arrived, nothing restored",
    ),
    at(
        "target.ready",
        Site::TargetWorker,
        "the machine is restored, not yet reported",
    ),
    at(
        "target.prepared",
        Site::TargetWorker,
        "the target was reported as ready",
    ),
    at(
        "source.prepared",
        Site::SourceWorker,
        "the target is ready, the agent not told",
    ),
    at("move.commit", Site::SourceAgent, "before the commit"),
    at(
        "move.committed",
        Site::SourceAgent,
        "after the commit; an error loses its answer",
    ),
    at(
        "move.settle",
        Site::SourceAgent,
        "in doubt, before the own write",
    ),
    at(
        "move.settled",
        Site::SourceAgent,
        "in doubt, after it; an error loses its answer",
    ),
    at(
        "move.go",
        Site::SourceAgent,
        "before the target is told to resume",
    ),
    at("source.go", Site::SourceWorker, "before its worker is told"),
    at(
        "post-copy.name",
        Site::SourceWorker,
        "post-copy: committed, pages written last not named",
    ),
    at(
        "target.go",
        Site::TargetWorker,
        "before the machine resumes at the target",
    ),
    at(
        "target.gone",
        Site::TargetWorker,
        "it runs, not yet reported",
    ),
    at(
        "source.gone",
        Site::SourceWorker,
        "the source knows, its agent does not",
    ),
    at(
        "arrived.running",
        Site::TargetAgent,
        "before the store is told that it runs",
    ),
    at(
        "arrival.asked",
        Site::TargetAgent,
        "the source's agent asks for the outcome",
    ),
    at(
        "arrival.settle",
        Site::TargetAgent,
        "before an arrival without its source is settled",
    ),
    at(
        "arrival.settled",
        Site::TargetAgent,
        "after that write; an error loses its answer",
    ),
    at(
        "post-copy.serve",
        Site::SourceWorker,
        "post-copy: it runs there, no page was sent since",
    ),
    at(
        "post-copy.push",
        Site::SourceWorker,
        "post-copy: some pages were sent in the background",
    ),
    at(
        "post-copy.pull",
        Site::SourceWorker,
        "post-copy: a page is asked for",
    ),
    at(
        "post-copy.page",
        Site::TargetWorker,
        "post-copy: before pages are installed",
    ),
    at(
        "post-copy.wait",
        Site::TargetWorker,
        "post-copy: before a page is asked for",
    ),
    at(
        "post-copy.all",
        Site::TargetWorker,
        "post-copy: all pages arrived, not yet reported",
    ),
    at(
        "move.served",
        Site::SourceAgent,
        "post-copy: the target has everything",
    ),
    at(
        "move.take-back",
        Site::SourceAgent,
        "before the machine is taken back",
    ),
    at(
        "move.taken-back",
        Site::SourceAgent,
        "after that write; an error loses its answer",
    ),
    at(
        "move.thaw",
        Site::SourceAgent,
        "before the worker is asked to resume",
    ),
    at(
        "source.thaw",
        Site::SourceWorker,
        "before the machine resumes at the source",
    ),
    at(
        "move.abort",
        Site::SourceAgent,
        "before the target is told that it is over",
    ),
    at(
        "move.forget",
        Site::SourceAgent,
        "before the frozen copy is dropped",
    ),
    at(
        "move.report",
        Site::SourceAgent,
        "before the report is written",
    ),
    at(
        "unscheduled.found",
        Site::Agent,
        "a machine is not in the schedule, its worker is not looked up",
    ),
    at(
        "unscheduled.reported",
        Site::Agent,
        "that worker said its state, the schedule is not read again",
    ),
    at(
        "checkpoint.agent.asked",
        Site::Agent,
        "before a worker is asked for a checkpoint",
    ),
    at(
        "checkpoint.worker.round",
        Site::Worker,
        "a round was copied",
    ),
    at(
        "checkpoint.worker.frozen",
        Site::Worker,
        "the machine is frozen for a checkpoint",
    ),
    at(
        "checkpoint.worker.packs",
        Site::Worker,
        "it runs again, not all packs are stored",
    ),
    at(
        "checkpoint.worker.manifest",
        Site::Worker,
        "all but the manifest is stored",
    ),
    at(
        "checkpoint.worker.stored",
        Site::Worker,
        "the manifest is stored, not yet reported",
    ),
    at(
        "checkpoint.agent.taken",
        Site::Agent,
        "the checkpoint is made, not yet reported",
    ),
    at("restore.manifest", Site::Worker, "the manifests are read"),
    at(
        "restore.pages",
        Site::Worker,
        "memory is filled, no threads yet",
    ),
    at(
        "start.worker",
        Site::Agent,
        "a machine's worker answers, it is not started",
    ),
    at(
        "spanning-start.held",
        Site::Agent,
        "a machine is held without parts",
    ),
    at(
        "spanning-start.spans",
        Site::Agent,
        "its parts are connected, its memory is not read",
    ),
    at(
        "spanning-start.brought",
        Site::Worker,
        "its memory is on its parts, it does not run",
    ),
    at(
        "home.way",
        Site::SourceWorker,
        "threads and pages of a home that moves have left, the machine runs",
    ),
    at(
        "home.left",
        Site::SourceWorker,
        "the machine is frozen, its home holds no pages",
    ),
    at(
        "home.succeeds",
        Site::TargetWorker,
        "the commit won, no other part knows its home yet",
    ),
    at(
        "parts.known",
        Site::Agent,
        "all members know a part that comes, its home does not",
    ),
    at(
        "parts.gone",
        Site::Worker,
        "a part is removed, not yet reported",
    ),
    at(
        "start.running",
        Site::Agent,
        "it runs, the store does not know",
    ),
    at(
        "end.seen",
        Site::Agent,
        "a machine has ended, the store does not know",
    ),
];

/// The failpoint of that name.
pub fn find(name: &str) -> Option<&'static Failpoint> {
    ALL.iter().find(|failpoint| failpoint.name == name)
}

/// The effect of a failpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The process dies as by SIGKILL.
    Kill,
    /// The process stops as by SIGSTOP, until SIGCONT.
    Stop,
    /// The step fails.
    Error,
    /// The step is delayed.
    Delay(Duration),
}

/// An action with its condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injection {
    pub action: Action,
    /// Number of passes without effect before.
    pub skip: u32,
    /// Whether it has an effect at all later passes too.
    pub always: bool,
}

/// Text that is not an injection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an action for a failpoint: kill, stop, error or delay(MILLISECONDS), then @N for the N-th pass or * for all"
)]
pub struct InvalidInjection(String);

impl FromStr for Injection {
    type Err = InvalidInjection;

    fn from_str(text: &str) -> Result<Self, InvalidInjection> {
        let bad = || InvalidInjection(text.to_owned());
        let (word, skip, always) = match (text.strip_suffix('*'), text.split_once('@')) {
            (Some(word), _) => (word, 0, true),
            (None, Some((word, pass))) => {
                let pass: u32 = pass.parse().map_err(|_| bad())?;
                (word, pass.checked_sub(1).ok_or_else(bad)?, false)
            }
            (None, None) => (text, 0, false),
        };
        let action = match word {
            "kill" => Action::Kill,
            "stop" => Action::Stop,
            "error" => Action::Error,
            _ => word
                .strip_prefix("delay(")
                .and_then(|rest| rest.strip_suffix(')'))
                .and_then(|ms| ms.parse().ok())
                .filter(|ms| *ms <= DELAY_MS_MAX)
                .map(|ms| Action::Delay(Duration::from_millis(ms)))
                .ok_or_else(bad)?,
        };
        Ok(Injection {
            action,
            skip,
            always,
        })
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.action {
            Action::Kill => f.write_str("kill")?,
            Action::Stop => f.write_str("stop")?,
            Action::Error => f.write_str("error")?,
            Action::Delay(time) => write!(f, "delay({})", time.as_millis())?,
        }
        match (self.always, self.skip) {
            (true, _) => f.write_str("*"),
            (false, 0) => Ok(()),
            (false, skip) => write!(f, "@{}", u64::from(skip) + 1),
        }
    }
}

/// A step that a test made fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failpoint {0}")]
pub struct Injected(&'static str);

static INJECTIONS: Mutex<BTreeMap<&'static str, Injection>> = Mutex::new(BTreeMap::new());

fn injections() -> MutexGuard<'static, BTreeMap<&'static str, Injection>> {
    INJECTIONS.lock().unwrap_or_else(|error| error.into_inner())
}

/// Sets or removes an injection in this process.
pub fn set(name: &str, injection: Option<Injection>) {
    let Some(failpoint) = find(name) else { return };
    match injection {
        Some(injection) => injections().insert(failpoint.name, injection),
        None => injections().remove(failpoint.name),
    };
}

/// Sets the injections of this process's environment.
pub fn set_from_environment() {
    let text = std::env::var(ENVIRONMENT).unwrap_or_default();
    for (name, injection) in text.split(';').filter_map(|part| part.split_once('=')) {
        set(name, injection.parse().ok());
    }
}

/// Whether this process injects faults at all: only where its environment says so.
pub fn is_enabled() -> bool {
    static ENABLED: OnceLock<bool> = OnceLock::new();
    *ENABLED.get_or_init(|| std::env::var_os(ENABLE_ENVIRONMENT).is_some_and(|it| it == "1"))
}

/// The action that is due at this pass.
fn due(name: &'static str) -> Option<Action> {
    if !is_enabled() {
        return None;
    }
    debug_assert!(find(name).is_some(), "{name}");
    let mut injections = injections();
    let injection = injections.get_mut(name)?;
    if injection.skip > 0 {
        injection.skip -= 1;
        return None;
    }
    let (action, always) = (injection.action, injection.always);
    if !always {
        injections.remove(name);
    }
    Some(action)
}

/// Appends a failpoint to the test's log, before its effect.
fn note(name: &str) {
    use std::io::Write;
    let Some(path) = std::env::var_os(LOG_ENVIRONMENT) else {
        return;
    };
    let noted = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| writeln!(file, "{name}"));
    if let Err(error) = noted {
        tracing::warn!(%error, "cannot log a failpoint");
    }
}

fn act(name: &'static str) -> Result<Option<Duration>, Injected> {
    let Some(action) = due(name) else {
        return Ok(None);
    };
    tracing::warn!(name, ?action, "failpoint");
    note(name);
    let signal = match action {
        Action::Kill => Signal::KILL,
        Action::Stop => Signal::STOP,
        Action::Error => return Err(Injected(name)),
        Action::Delay(time) => return Ok(Some(time)),
    };
    // A process may always signal itself.
    let _ = kill_process(getpid(), signal);
    Ok(None)
}

/// Passes a failpoint on a thread that may block.
///
/// # Errors
/// If the injected action is an error.
pub fn pass(name: &'static str) -> Result<(), Injected> {
    if let Some(time) = act(name)? {
        std::thread::sleep(time);
    }
    Ok(())
}

/// Passes a failpoint in a task.
///
/// # Errors
/// If the injected action is an error.
pub async fn pass_async(name: &'static str) -> Result<(), Injected> {
    if let Some(time) = act(name)? {
        tokio::time::sleep(time).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn injections_are_parsed_and_formatted() {
        for text in [
            "kill",
            "stop",
            "error*",
            "delay(300)",
            "kill@3",
            "delay(1)*",
        ] {
            assert_eq!(text.parse::<Injection>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "kil",
            "kill@0",
            "kill@x",
            "delay(-1)",
            "delay(9999999)",
            "@2",
            "*",
        ] {
            assert_eq!(
                text.parse::<Injection>(),
                Err(InvalidInjection(text.into())),
                "{text}"
            );
        }
    }

    #[test]
    fn names_are_unique_and_in_the_table_of_docs_moves() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/moves.md");
        let page = std::fs::read_to_string(path).unwrap();
        for (number, failpoint) in ALL.iter().enumerate() {
            let name = failpoint.name;
            assert!(
                ALL[..number].iter().all(|other| other.name != name),
                "{name}"
            );
            assert!(
                page.contains(&format!("| `{name}` |")),
                "{name} is not in the table"
            );
        }
        let rows = page.lines().filter(|line| {
            line.starts_with("| `") && line.contains("agent |") | line.contains("worker |")
        });
        for row in rows {
            let name = row.split('`').nth(1).unwrap();
            assert!(find(name).is_some(), "no failpoint {name}");
        }
    }
}
