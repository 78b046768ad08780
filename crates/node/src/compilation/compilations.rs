//! State of the compilations of this node: programs that are ready, that wait, or that are being
//! compiled.

use super::nodes_with_code::CodeLocations;
use keel_cluster::{MachineName, NodeName};
use keel_machine::kind::KindName;
use keel_net::Fingerprint;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Approximate bytes of an instrumented module that one core compiles in a second.
const COMPILED_BYTES_PER_CORE_S: f64 = 2e6;
/// The most programs that wait for compilation ahead of use.
const QUEUE_MAX: usize = 256;
/// How long a failed compilation is not retried, unless a move needs the program.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// How long the failure is reported to the moves that waited for the program.
const TELL_FAILURE_FOR: Duration = Duration::from_secs(2);

/// State of a program's code on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CodeState {
    /// Its threads can be resumed at once.
    Ready,
    /// It is being compiled.
    Compiling {
        /// Progress in percent, as reported by the compiler.
        percent: u8,
    },
    /// Its compilation starts.
    Waiting,
    /// Its compilation failed.
    Failed { reason: String },
}

/// A compilation job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    /// The kind of machine that runs it.
    pub(super) kind: KindName,
    pub(super) program: Fingerprint,
    /// The node that has its module, if it is not here.
    pub(super) holder: NodeName,
}

/// The compilation in progress.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) percent: u8,
    /// Whether a move waits for it.
    wanted: watch::Sender<bool>,
    /// Whether it came from the queue.
    ahead: bool,
}

/// A failed compilation.
#[derive(Debug)]
struct Failure {
    reason: String,
    at: Instant,
    /// Whether a move waited for it.
    wanted: bool,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) ready: BTreeSet<Fingerprint>,
    queue: VecDeque<Job>,
    /// Programs that moves wait for, until their compilation starts.
    urgent: Vec<Job>,
    pub(super) current: BTreeMap<Fingerprint, Current>,
    failed: BTreeMap<Fingerprint, Failure>,
    /// Programs of the machines that run here, and the sizes of their modules in bytes.
    running: BTreeMap<MachineName, (Fingerprint, u64)>,
}

/// This node's compiled code.
#[derive(Debug)]
pub(crate) struct Code {
    inner: Mutex<Inner>,
    pub(super) work: Notify,
    /// Counts changes of the set of ready programs.
    pub(super) ready: watch::Sender<u64>,
    /// Code of all nodes.
    pub(crate) locations: CodeLocations,
}

impl Code {
    pub(crate) fn new() -> Self {
        Code {
            inner: Mutex::default(),
            work: Notify::new(),
            ready: watch::Sender::new(0),
            locations: CodeLocations::default(),
        }
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a program that a move waits for; starts its compilation at once if it is not
    /// ready. `holder` has its module.
    pub(crate) fn demand(
        &self,
        kind: &KindName,
        program: Fingerprint,
        holder: &NodeName,
    ) -> CodeState {
        let mut inner = self.inner();
        // All waiting moves get the failure; a later move, or the first one, starts a retry.
        let failed = inner.failed.get(&program);
        if let Some(failure) = failed.filter(|it| it.wanted && it.at.elapsed() < TELL_FAILURE_FOR) {
            return CodeState::Failed {
                reason: failure.reason.clone(),
            };
        }
        inner.failed.remove(&program);
        if let Some(state) = inner.under_way(&program) {
            if let Some(current) = inner.current.get(&program) {
                current.wanted.send_replace(true);
            }
            return state;
        }
        inner.queue.retain(|job| job.program != program);
        if !inner.urgent.iter().any(|job| job.program == program) {
            inner.urgent.push(Job {
                kind: kind.clone(),
                program,
                holder: holder.clone(),
            });
            self.work.notify_one();
        }
        CodeState::Waiting
    }

    /// Appends a program to the queue, ahead of any use.
    pub(crate) fn prepare(&self, kind: &KindName, program: Fingerprint, holder: &NodeName) {
        let mut inner = self.inner();
        let failed_lately = inner
            .failed
            .get(&program)
            .is_some_and(|failure| failure.at.elapsed() < RETRY_AFTER);
        let mut waiting = inner.queue.iter().chain(&inner.urgent);
        let known =
            waiting.any(|job| job.program == program) || inner.under_way(&program).is_some();
        if known || failed_lately || inner.queue.len() >= QUEUE_MAX {
            return;
        }
        inner.queue.push_back(Job {
            kind: kind.clone(),
            program,
            holder: holder.clone(),
        });
        self.work.notify_one();
    }

    /// The cost of compiling the program of a machine that runs here at a target, in core-seconds;
    /// 0 if the target has its code.
    pub(crate) fn compile_core_s(&self, machine: &str, target: &str) -> f64 {
        let inner = self.inner();
        let program = machine
            .parse()
            .ok()
            .and_then(|it: MachineName| inner.running.get(&it));
        match (program, target.parse()) {
            (Some((program, bytes)), Ok(target)) if !self.locations.has(&target, program) => {
                *bytes as f64 / COMPILED_BYTES_PER_CORE_S
            }
            _ => 0.0,
        }
    }

    /// Sets the machines that run here.
    pub(crate) fn set_running(&self, running: BTreeMap<MachineName, (Fingerprint, u64)>) {
        self.inner().running = running;
    }

    pub(super) fn done(&self, program: Fingerprint, compiled: Result<(), String>) {
        let failure = compiled.err();
        {
            let mut inner = self.inner();
            let current = inner.current.remove(&program);
            let wanted = current.is_some_and(|current| *current.wanted.borrow());
            inner.failed.remove(&program);
            if let Some(reason) = &failure {
                tracing::warn!(%program, reason, "cannot compile a program");
                let failure = Failure {
                    reason: reason.clone(),
                    at: Instant::now(),
                    wanted,
                };
                inner.failed.insert(program, failure);
            }
        }
        if failure.is_none() {
            self.set_ready(program);
        }
        self.work.notify_one();
    }

    pub(super) fn set_ready(&self, program: Fingerprint) {
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
        let current = self.current.get(program)?;
        Some(CodeState::Compiling {
            percent: current.percent,
        })
    }

    /// The jobs to start now: all that moves wait for, and one program ahead of use if none of
    /// these is in progress. Each with whether a move waits for it.
    pub(super) fn begin(&mut self) -> Vec<(Job, watch::Receiver<bool>)> {
        let mut jobs: Vec<(Job, bool)> = self.urgent.drain(..).map(|job| (job, true)).collect();
        if !self.current.values().any(|current| current.ahead) {
            // What the cache had may have been found since it was queued.
            let ready = &self.ready;
            self.queue.retain(|job| !ready.contains(&job.program));
            jobs.extend(self.queue.pop_front().map(|job| (job, false)));
        }
        let begin = |(job, wanted): (Job, bool)| {
            let (sender, receiver) = watch::channel(wanted);
            let current = Current {
                percent: 0,
                wanted: sender,
                ahead: !wanted,
            };
            self.current.insert(job.program, current);
            (job, receiver)
        };
        jobs.into_iter().map(begin).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind() -> KindName {
        "wasm".parse().unwrap()
    }

    fn program(number: u8) -> Fingerprint {
        Fingerprint([number; 32])
    }

    /// Compilation ahead of use delays no move.
    #[test]
    fn a_move_does_not_wait_for_what_may_be_needed_one_day() {
        let code = Code::new();
        let node: NodeName = "a".parse().unwrap();
        let begun = |code: &Code| -> Vec<_> {
            let begun = code.inner().begin();
            begun
                .iter()
                .map(|(job, wanted)| (job.program, *wanted.borrow()))
                .collect()
        };
        for number in [1, 2, 3, 2] {
            code.prepare(&kind(), program(number), &node);
        }
        // One at a time.
        assert_eq!(begun(&code), [(program(1), false)]);
        assert_eq!(begun(&code), []);
        assert_eq!(code.demand(&kind(), program(3), &node), CodeState::Waiting);
        assert_eq!(code.demand(&kind(), program(4), &node), CodeState::Waiting);
        assert_eq!(code.demand(&kind(), program(4), &node), CodeState::Waiting);
        code.prepare(&kind(), program(3), &node);
        assert_eq!(begun(&code), [(program(3), true), (program(4), true)]);
        // A move needs a program that is being compiled already.
        let percent = 40;
        code.inner().current.get_mut(&program(1)).unwrap().percent = percent;
        assert!(!*code.inner().current[&program(1)].wanted.borrow());
        let compiling = CodeState::Compiling { percent };
        assert_eq!(code.demand(&kind(), program(1), &node), compiling);
        assert!(*code.inner().current[&program(1)].wanted.borrow());
        // The next one follows when this one ends.
        code.done(program(1), Ok(()));
        assert_eq!(begun(&code), [(program(2), false)]);
        assert_eq!(code.demand(&kind(), program(1), &node), CodeState::Ready);
        code.done(program(3), Err("no memory".into()));
        let reason = "no memory".to_owned();
        assert_eq!(
            code.demand(&kind(), program(3), &node),
            CodeState::Failed { reason }
        );
    }

    #[test]
    fn a_failure_is_told_to_all_who_waited_and_rests_ahead_of_use() {
        let code = Code::new();
        let node: NodeName = "a".parse().unwrap();
        // No move waited: it is not retried ahead of use, but the first move retries it.
        code.prepare(&kind(), program(1), &node);
        assert_eq!(code.inner().begin().len(), 1);
        code.done(program(1), Err("unreachable".into()));
        code.prepare(&kind(), program(1), &node);
        assert!(code.inner().queue.is_empty());
        assert_eq!(code.demand(&kind(), program(1), &node), CodeState::Waiting);
        assert_eq!(code.inner().begin().len(), 1);
        code.done(program(1), Err("no memory".into()));
        for _ in 0..2 {
            let reason = "no memory".to_owned();
            assert_eq!(
                code.demand(&kind(), program(1), &node),
                CodeState::Failed { reason }
            );
        }
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
        code.prepare(&kind(), program(1), &node);
        assert_eq!(code.demand(&kind(), program(1), &node), CodeState::Ready);
        assert!(code.inner().queue.is_empty());
    }

    #[test]
    fn what_is_found_in_the_cache_late_is_not_compiled() {
        let code = Code::new();
        let node: NodeName = "a".parse().unwrap();
        code.prepare(&kind(), program(1), &node);
        code.prepare(&kind(), program(2), &node);
        code.set_ready(program(1));
        let begun = code.inner().begin();
        let programs: Vec<_> = begun.iter().map(|(job, _)| job.program).collect();
        assert_eq!(programs, [program(2)]);
    }
}
