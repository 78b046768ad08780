//! Compiled code on this node: which programs are ready to go on here, and which one
//! is compiled next.
//!
//! ```text
//!   a move waits ──▶ front ┐
//!                          ├─▶ queue ─▶ one process at a time ─▶ ready ─▶ `code/NODE` in
//!   `ahead`      ──▶ back  ┘           (`keel compile`, yields            the store
//!                                       to guests)
//! ```
//!
//! A machine can only arrive, or be captured, where the code is ready with which its
//! threads are resumed, and compiling that takes several times as long as starting the
//! program. So it is done before: on the node where a machine runs, and on those that
//! may receive it (`ahead`), one program at a time, in a process that gets only what
//! guests leave of the processors. A move that finds no code waits for it at the head of
//! the queue, and shows how far it is. Which nodes have which code is in the store
//! (`published`): the balancer counts what compiling costs, `keel inspect` shows it.
//!
//! Native code never travels: modules do.

mod ahead;
mod process;
mod published;

pub(crate) use ahead::program_here;
pub(crate) use published::Published;

use crate::agent::Agent;
use keel_cluster::{MachineName, NodeName};
use keel_net::Fingerprint;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Bytes of an instrumented module that one core compiles in a second, about.
const COMPILED_BYTES_PER_CORE_S: f64 = 2e6;
/// Most programs that wait for their compilation ahead of use.
const QUEUE_MAX: usize = 256;
/// How long a program that could not be compiled is left alone before it is tried again,
/// unless a move wants it.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// How far a program's code is on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CodeState {
    /// Threads of it can be resumed at once.
    Ready,
    /// It is being compiled.
    Compiling {
        /// Of a hundred, as far as the compiler tells.
        percent: u8,
    },
    /// So many programs come first.
    Waiting { ahead: u32 },
    /// It could not be compiled.
    Failed { reason: String },
}

/// A program that is to be compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Job {
    program: Fingerprint,
    /// Where its module is, if it is not here.
    holder: NodeName,
    /// Whether a move waits for it.
    wanted: bool,
}

/// What is compiled now.
#[derive(Debug)]
struct Current {
    program: Fingerprint,
    percent: u8,
    /// Whether a move waits for it.
    wanted: bool,
}

#[derive(Debug, Default)]
struct Inner {
    ready: BTreeSet<Fingerprint>,
    queue: VecDeque<Job>,
    current: Option<Current>,
    failed: BTreeMap<Fingerprint, (String, tokio::time::Instant)>,
    /// Programs of the machines that run here, and the sizes of their modules in bytes.
    running: BTreeMap<MachineName, (Fingerprint, u64)>,
}

/// This node's compiled code.
#[derive(Debug)]
pub(crate) struct Code {
    inner: Mutex<Inner>,
    work: Notify,
    /// A move waits for what is being compiled.
    wanted: Notify,
    /// Counts changes of what is ready.
    ready: watch::Sender<u64>,
    /// What all nodes have.
    pub(crate) published: Published,
}

impl Code {
    pub(crate) fn new() -> Self {
        Code {
            inner: Mutex::default(),
            work: Notify::new(),
            wanted: Notify::new(),
            ready: watch::Sender::new(0),
            published: Published::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far a program is; puts it at the head of the queue, where a move waits for
    /// it, if it is not ready. `holder` has its module.
    pub(crate) fn demand(&self, program: Fingerprint, holder: &NodeName) -> CodeState {
        let mut inner = self.inner();
        if let Some((reason, _)) = inner.failed.remove(&program) {
            return CodeState::Failed { reason };
        }
        if let Some(state) = inner.under_way(&program) {
            if let (Some(current), true) = (&mut inner.current, state != CodeState::Ready) {
                current.wanted = true;
                self.wanted.notify_one();
            }
            return state;
        }
        let ahead = inner.queue.iter().position(|job| job.program == program);
        if let Some(mut job) = ahead.and_then(|at| inner.queue.remove(at)) {
            job.wanted = true;
            inner.queue.push_front(job);
        } else {
            inner.queue.push_front(Job {
                program,
                holder: holder.clone(),
                wanted: true,
            });
        }
        self.work.notify_one();
        let ahead = u32::from(inner.current.is_some());
        CodeState::Waiting { ahead }
    }

    /// Puts a program at the end of the queue, for whoever may need it one day.
    fn prepare(&self, program: Fingerprint, holder: &NodeName) {
        let mut inner = self.inner();
        let failed_lately = inner
            .failed
            .get(&program)
            .is_some_and(|(_, at)| at.elapsed() < RETRY_AFTER);
        let known = inner.under_way(&program).is_some()
            || inner.queue.iter().any(|job| job.program == program);
        if known || failed_lately || inner.queue.len() >= QUEUE_MAX {
            return;
        }
        inner.queue.push_back(Job {
            program,
            holder: holder.clone(),
            wanted: false,
        });
        self.work.notify_one();
    }

    /// What compiling the program of a machine that runs here takes at a target, in
    /// core-seconds; 0 where the target has its code.
    pub(crate) fn compile_core_s(&self, machine: &str, target: &str) -> f64 {
        let inner = self.inner();
        let program = machine
            .parse()
            .ok()
            .and_then(|it: MachineName| inner.running.get(&it));
        match (program, target.parse()) {
            (Some((program, bytes)), Ok(target)) if !self.published.has(&target, program) => {
                *bytes as f64 / COMPILED_BYTES_PER_CORE_S
            }
            _ => 0.0,
        }
    }

    /// What runs here now.
    fn set_running(&self, running: BTreeMap<MachineName, (Fingerprint, u64)>) {
        self.inner().running = running;
    }

    fn set_ready(&self, program: Fingerprint) {
        let mut inner = self.inner();
        if inner.ready.insert(program) {
            self.ready.send_modify(|changes| *changes += 1);
        }
    }
}

impl Inner {
    fn under_way(&self, program: &Fingerprint) -> Option<CodeState> {
        if self.ready.contains(program) {
            return Some(CodeState::Ready);
        }
        let current = self.current.as_ref().filter(|it| it.program == *program)?;
        Some(CodeState::Compiling {
            percent: current.percent,
        })
    }
}

/// Compiles what is asked for, one program after the other, until the agent ends.
pub(crate) async fn run(agent: Arc<Agent>) {
    for program in process::compiled_before(&agent).await {
        agent.code.set_ready(program);
    }
    tokio::spawn(published::publish(agent.clone()));
    tokio::spawn(published::follow(agent.clone()));
    tokio::spawn(ahead::run(agent.clone()));
    loop {
        let next = {
            let mut inner = agent.code.inner();
            let job = inner.queue.pop_front();
            inner.current = job.as_ref().map(|job| Current {
                program: job.program,
                percent: 0,
                wanted: job.wanted,
            });
            job
        };
        let Some(job) = next else {
            agent.code.work.notified().await;
            continue;
        };
        let compiled = process::compile(&agent, &job).await;
        let mut inner = agent.code.inner();
        inner.current = None;
        match compiled {
            Ok(()) => {
                inner.failed.remove(&job.program);
                drop(inner);
                agent.code.set_ready(job.program);
            }
            Err(reason) => {
                tracing::warn!(program = %job.program, reason, "a program is not compiled");
                let now = tokio::time::Instant::now();
                inner.failed.insert(job.program, (reason, now));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(number: u8) -> Fingerprint {
        Fingerprint([number; 32])
    }

    #[test]
    fn a_move_goes_before_what_may_be_needed_one_day() {
        let code = Code::new();
        let node: NodeName = "a".parse().unwrap();
        for number in [1, 2, 3, 2] {
            code.prepare(program(number), &node);
        }
        assert_eq!(code.inner().queue.len(), 3);
        let waits = CodeState::Waiting { ahead: 0 };
        assert_eq!(code.demand(program(3), &node), waits);
        assert_eq!(code.demand(program(4), &node), waits);
        let order: Vec<_> = code.inner().queue.iter().map(|job| job.program).collect();
        assert_eq!(order, [4, 3, 1, 2].map(program));
        let wanted: Vec<_> = code.inner().queue.iter().map(|job| job.wanted).collect();
        assert_eq!(wanted, [true, true, false, false]);
        code.inner().current = Some(Current {
            program: program(4),
            percent: 40,
            wanted: false,
        });
        code.inner().queue.pop_front();
        let compiling = CodeState::Compiling { percent: 40 };
        assert_eq!(code.demand(program(4), &node), compiling);
        assert!(code.inner().current.as_ref().unwrap().wanted);
        assert_eq!(code.inner().queue.len(), 3);
    }

    #[test]
    fn a_failure_is_told_once_and_then_tried_again() {
        let code = Code::new();
        let node: NodeName = "a".parse().unwrap();
        let failure = ("no memory".to_owned(), tokio::time::Instant::now());
        code.inner().failed.insert(program(1), failure);
        // Ahead of use it rests.
        code.prepare(program(1), &node);
        assert!(code.inner().queue.is_empty());
        let reason = "no memory".to_owned();
        assert_eq!(code.demand(program(1), &node), CodeState::Failed { reason });
        assert_eq!(
            code.demand(program(1), &node),
            CodeState::Waiting { ahead: 0 }
        );
    }

    #[test]
    fn what_is_ready_is_not_compiled_again() {
        let code = Code::new();
        let node: NodeName = "a".parse().unwrap();
        let mut changes = code.ready.subscribe();
        code.set_ready(program(1));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        code.set_ready(program(1));
        assert!(!changes.has_changed().unwrap());
        code.prepare(program(1), &node);
        assert_eq!(code.demand(program(1), &node), CodeState::Ready);
        assert!(code.inner().queue.is_empty());
    }
}
