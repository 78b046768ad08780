//! Named points in the middle of what must not go wrong, at which a test makes
//! the process die, stand still, wait or fail.
//!
//! They do nothing unless the process was started with [`ENABLE_ENVIRONMENT`], as tests
//! start it: what is tested is the binary that is shipped. An [`Order`] is given by name: to an agent over its API (`keel debug
//! failpoint`), which passes on those of workers, to the ones that run and, by
//! [`ENVIRONMENT`], to those that it starts later. An order is for one process:
//! what is started anew after a kill has none.

use rustix::process::{Signal, getpid, kill_process};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Orders for a new worker: `NAME=ORDER`, separated by `;`.
pub const ENVIRONMENT: &str = "KEEL_FAILPOINTS";
/// Set to 1, it lets a process and those that it starts inject faults.
pub const ENABLE_ENVIRONMENT: &str = "KEEL_FAULT_INJECTION";
/// A file in which each process notes the failpoints at which something happened.
pub const LOG_ENVIRONMENT: &str = "KEEL_FAILPOINT_LOG";
/// The longest delay that can be ordered.
const DELAY_MS_MAX: u64 = 600_000;

/// Which process passes a failpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The agent of the node that gives a machine away.
    SourceAgent,
    /// That machine's worker.
    SourceWorker,
    /// The agent of the node that takes it.
    TargetAgent,
    /// The worker that takes it.
    TargetWorker,
    /// The agent of a node that starts or keeps a machine.
    Agent,
    /// The worker of that machine.
    Worker,
}

impl Place {
    /// Whether it is a machine's worker that passes.
    pub fn is_worker(self) -> bool {
        match self {
            Place::SourceWorker | Place::TargetWorker | Place::Worker => true,
            Place::SourceAgent | Place::TargetAgent | Place::Agent => false,
        }
    }

    /// Whether it is at a move's target.
    pub fn is_target(self) -> bool {
        matches!(self, Place::TargetAgent | Place::TargetWorker)
    }
}

/// A point that has a name.
#[derive(Debug, Clone, Copy)]
pub struct Failpoint {
    /// Its name.
    pub name: &'static str,
    /// Who passes it.
    pub place: Place,
    /// When.
    pub when: &'static str,
}

const fn at(name: &'static str, place: Place, when: &'static str) -> Failpoint {
    Failpoint { name, place, when }
}

/// All of them, in the order in which a move, a checkpoint, a restore and a
/// start pass them.
pub const ALL: &[Failpoint] = &[
    at(
        "move.offer",
        Place::SourceAgent,
        "before the target is asked",
    ),
    at(
        "offer.checked",
        Place::TargetAgent,
        "memory, CPU and volumes fit",
    ),
    at("offer.fetched", Place::TargetAgent, "the module is here"),
    at(
        "offer.reserved",
        Place::TargetAgent,
        "the reservation is in the store",
    ),
    at("offer.started", Place::TargetAgent, "its worker answers"),
    at(
        "in.listening",
        Place::TargetWorker,
        "the module is compiled, the port is open",
    ),
    at(
        "offer.accepted",
        Place::TargetAgent,
        "before the answer to the offer",
    ),
    at(
        "move.accepted",
        Place::SourceAgent,
        "the target has accepted",
    ),
    at(
        "out.connect",
        Place::SourceWorker,
        "before the connection to the target's worker",
    ),
    at(
        "in.greeted",
        Place::TargetWorker,
        "the source has said who it is",
    ),
    at(
        "out.hello",
        Place::SourceWorker,
        "before writes are tracked and pages sent",
    ),
    at(
        "out.round",
        Place::SourceWorker,
        "a round was sent, its answer not yet read",
    ),
    at(
        "in.round",
        Place::TargetWorker,
        "a round has arrived, not yet answered",
    ),
    at(
        "out.converged",
        Place::SourceWorker,
        "little is left, not yet said",
    ),
    at(
        "move.store",
        Place::SourceAgent,
        "before the round trip to the store",
    ),
    at(
        "move.freeze",
        Place::SourceAgent,
        "before the worker is asked to freeze",
    ),
    at(
        "out.freeze",
        Place::SourceWorker,
        "before the threads are stopped",
    ),
    at("out.frozen", Place::SourceWorker, "the threads stand"),
    at(
        "out.last-pages",
        Place::SourceWorker,
        "the last pages are sent",
    ),
    at(
        "out.image",
        Place::SourceWorker,
        "threads and WASI state are sent",
    ),
    at(
        "in.image",
        Place::TargetWorker,
        "all has arrived, nothing made of it",
    ),
    at(
        "in.ready",
        Place::TargetWorker,
        "the machine is made, not yet said",
    ),
    at(
        "in.prepared",
        Place::TargetWorker,
        "it was said that it is ready",
    ),
    at(
        "out.prepared",
        Place::SourceWorker,
        "the target is ready, the agent not told",
    ),
    at("move.commit", Place::SourceAgent, "before the commit"),
    at(
        "move.committed",
        Place::SourceAgent,
        "after the commit; an error loses its answer",
    ),
    at(
        "move.settle",
        Place::SourceAgent,
        "in doubt, before the own write",
    ),
    at(
        "move.settled",
        Place::SourceAgent,
        "in doubt, after it; an error loses its answer",
    ),
    at(
        "move.go",
        Place::SourceAgent,
        "before the target is told to go on",
    ),
    at("out.go", Place::SourceWorker, "before its worker is told"),
    at(
        "fill.name",
        Place::SourceWorker,
        "post-copy: committed, what was written last not named",
    ),
    at(
        "in.go",
        Place::TargetWorker,
        "before the machine goes on at the target",
    ),
    at("in.gone", Place::TargetWorker, "it goes on, not yet said"),
    at(
        "out.gone",
        Place::SourceWorker,
        "the source knows, its agent does not",
    ),
    at(
        "arrived.running",
        Place::TargetAgent,
        "before the store is told that it runs",
    ),
    at(
        "arrival.asked",
        Place::TargetAgent,
        "the source's agent asks what became of it",
    ),
    at(
        "arrival.settle",
        Place::TargetAgent,
        "before an arrival without its source is settled",
    ),
    at(
        "arrival.settled",
        Place::TargetAgent,
        "after that write; an error loses its answer",
    ),
    at(
        "fill.serve",
        Place::SourceWorker,
        "post-copy: it runs there, no page was sent since",
    ),
    at(
        "fill.push",
        Place::SourceWorker,
        "post-copy: some pages were sent unasked",
    ),
    at(
        "fill.pull",
        Place::SourceWorker,
        "post-copy: a page is asked for",
    ),
    at(
        "fill.page",
        Place::TargetWorker,
        "post-copy: before what came is put in place",
    ),
    at(
        "fill.wait",
        Place::TargetWorker,
        "post-copy: before a page is asked for",
    ),
    at(
        "fill.all",
        Place::TargetWorker,
        "post-copy: all is there, not yet said",
    ),
    at(
        "move.served",
        Place::SourceAgent,
        "post-copy: the target has everything",
    ),
    at(
        "move.take-back",
        Place::SourceAgent,
        "before the machine is taken back",
    ),
    at(
        "move.taken-back",
        Place::SourceAgent,
        "after that write; an error loses its answer",
    ),
    at(
        "move.thaw",
        Place::SourceAgent,
        "before the worker is asked to go on",
    ),
    at(
        "out.thaw",
        Place::SourceWorker,
        "before the machine goes on at the source",
    ),
    at(
        "move.abort",
        Place::SourceAgent,
        "before the target is told that it is over",
    ),
    at(
        "move.forget",
        Place::SourceAgent,
        "before the frozen copy is dropped",
    ),
    at(
        "move.report",
        Place::SourceAgent,
        "before the report is written",
    ),
    at(
        "keep.asked",
        Place::Agent,
        "before a worker is asked for a checkpoint",
    ),
    at("take.round", Place::Worker, "a round was copied"),
    at(
        "take.frozen",
        Place::Worker,
        "the machine stands still for a checkpoint",
    ),
    at(
        "take.packs",
        Place::Worker,
        "it runs again, not all packs are stored",
    ),
    at(
        "take.manifest",
        Place::Worker,
        "all but the manifest is stored",
    ),
    at(
        "take.stored",
        Place::Worker,
        "the manifest is stored, nobody knows",
    ),
    at(
        "keep.taken",
        Place::Agent,
        "the checkpoint is made, not yet said",
    ),
    at("restore.manifest", Place::Worker, "the manifests are read"),
    at(
        "restore.pages",
        Place::Worker,
        "memory is filled, no threads yet",
    ),
    at(
        "start.worker",
        Place::Agent,
        "a machine's worker answers, it is not started",
    ),
    at(
        "apart.held",
        Place::Agent,
        "a machine is held, and has no parts yet",
    ),
    at(
        "apart.spans",
        Place::Agent,
        "its parts have met, its memory is not read",
    ),
    at(
        "apart.brought",
        Place::Worker,
        "its memory is on its parts, it does not run",
    ),
    at(
        "home.way",
        Place::SourceWorker,
        "threads and pages of a home that moves have left, the machine runs",
    ),
    at(
        "home.left",
        Place::SourceWorker,
        "the machine stands, and its home has nothing any more",
    ),
    at(
        "home.succeeds",
        Place::TargetWorker,
        "the commit won, no other part knows its home yet",
    ),
    at(
        "parts.known",
        Place::Agent,
        "all members know a part that comes, its home does not",
    ),
    at(
        "parts.gone",
        Place::Worker,
        "a part is gone, and nobody is told",
    ),
    at(
        "start.running",
        Place::Agent,
        "it runs, the store does not know",
    ),
    at(
        "end.seen",
        Place::Agent,
        "a machine has ended, the store does not know",
    ),
];

/// The failpoint of that name.
pub fn find(name: &str) -> Option<&'static Failpoint> {
    ALL.iter().find(|failpoint| failpoint.name == name)
}

/// What happens at a failpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The process dies as of SIGKILL.
    Kill,
    /// It stands still as of SIGSTOP, until somebody sends SIGCONT.
    Stop,
    /// The step fails.
    Error,
    /// This long passes first.
    Delay(Duration),
}

/// What is to happen, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// What.
    pub action: Action,
    /// Passes that go by before it happens.
    pub skip: u32,
    /// Whether it happens at all later passes too.
    pub always: bool,
}

/// An order that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no order for a failpoint: kill, stop, error or delay(MILLISECONDS), then @N for the N-th pass or * for all"
)]
pub struct BadOrder(String);

impl FromStr for Order {
    type Err = BadOrder;

    fn from_str(text: &str) -> Result<Self, BadOrder> {
        let bad = || BadOrder(text.to_owned());
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
        Ok(Order {
            action,
            skip,
            always,
        })
    }
}

impl fmt::Display for Order {
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

/// A step that failed because a test wanted it to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failpoint {0}")]
pub struct Injected(&'static str);

static ORDERS: Mutex<BTreeMap<&'static str, Order>> = Mutex::new(BTreeMap::new());

fn orders() -> MutexGuard<'static, BTreeMap<&'static str, Order>> {
    ORDERS.lock().unwrap_or_else(|error| error.into_inner())
}

/// Gives this process an order, or takes it back.
pub fn set(name: &str, order: Option<Order>) {
    let Some(failpoint) = find(name) else { return };
    match order {
        Some(order) => orders().insert(failpoint.name, order),
        None => orders().remove(failpoint.name),
    };
}

/// Takes the orders that the environment has for this process.
pub fn set_from_environment() {
    let text = std::env::var(ENVIRONMENT).unwrap_or_default();
    for (name, order) in text.split(';').filter_map(|part| part.split_once('=')) {
        set(name, order.parse().ok());
    }
}

/// Whether this process injects faults at all: only where whoever started it said so.
pub fn is_enabled() -> bool {
    static ENABLED: OnceLock<bool> = OnceLock::new();
    *ENABLED.get_or_init(|| std::env::var_os(ENABLE_ENVIRONMENT).is_some_and(|it| it == "1"))
}

/// What is to happen now.
fn due(name: &'static str) -> Option<Action> {
    if !is_enabled() {
        return None;
    }
    debug_assert!(find(name).is_some(), "{name}");
    let mut orders = orders();
    let order = orders.get_mut(name)?;
    if order.skip > 0 {
        order.skip -= 1;
        return None;
    }
    let (action, always) = (order.action, order.always);
    if !always {
        orders.remove(name);
    }
    Some(action)
}

/// Notes for the test that something happens here, before it does.
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
        tracing::warn!(%error, "a failpoint is not noted");
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

/// Passes a failpoint, on a thread that may block.
///
/// # Errors
/// If that was ordered.
pub fn pass(name: &'static str) -> Result<(), Injected> {
    if let Some(time) = act(name)? {
        std::thread::sleep(time);
    }
    Ok(())
}

/// Passes a failpoint in a task.
///
/// # Errors
/// If that was ordered.
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
    fn orders_are_read_and_shown() {
        for text in [
            "kill",
            "stop",
            "error*",
            "delay(300)",
            "kill@3",
            "delay(1)*",
        ] {
            assert_eq!(text.parse::<Order>().unwrap().to_string(), text);
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
            assert_eq!(text.parse::<Order>(), Err(BadOrder(text.into())), "{text}");
        }
    }

    #[test]
    fn names_are_unique_and_in_the_table_of_the_architecture() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ARCHITECTURE.md");
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
