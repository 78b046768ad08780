//! The machine: a thread that counts. It can be frozen between two numbers, and continues with the
//! next one, in the same process or another.

use crate::NullSpec;
use keel_machine::log::{Log, StreamKind};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It reached its last number.
    Complete,
    Stopped,
    /// A line cannot be written.
    Failed(String),
    /// It never ran here, and nobody asks how it ended.
    Discarded,
}

#[derive(Debug)]
struct State {
    /// The next number.
    next: u64,
    /// Written on each line.
    epoch: u64,
    is_frozen: bool,
    /// Its node has no lease.
    is_held: bool,
    ending: Option<Ending>,
}

/// A machine that counts.
#[derive(Debug)]
pub(crate) struct Counter {
    state: Mutex<State>,
    changed: Condvar,
    spec: NullSpec,
    log: Arc<Log>,
}

impl Counter {
    /// A frozen machine.
    pub(crate) fn new(spec: NullSpec, log: Arc<Log>, next: u64, epoch: u64) -> Arc<Self> {
        Arc::new(Counter {
            state: Mutex::new(State {
                next,
                epoch,
                is_frozen: true,
                is_held: false,
                ending: None,
            }),
            changed: Condvar::new(),
            spec,
            log,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts until the end. Every line is written under the lock: once the machine is frozen,
    /// nothing of it is.
    pub(crate) fn run(&self) -> Ending {
        let mut file = match self.open() {
            Ok(file) => file,
            Err(reason) => return Ending::Failed(reason),
        };
        loop {
            // A frozen machine ends once it is thawed, or dropped: it may run elsewhere.
            let waiting = |state: &mut State| {
                (state.is_frozen || state.is_held) && state.ending != Some(Ending::Discarded)
            };
            let state = self.changed.wait_while(self.state(), waiting);
            let mut state = state.unwrap_or_else(PoisonError::into_inner);
            if let Some(ending) = &state.ending {
                return ending.clone();
            }
            let line = format!("{} {}\n", state.next, state.epoch);
            let written = match &mut file {
                Some(file) => file.write_all(line.as_bytes()),
                None => Ok(()),
            };
            let written =
                written.and_then(|()| self.log.append(StreamKind::Output, line.as_bytes()));
            // Under the lock: a machine that has ended is not frozen for a move.
            if let Err(error) = written {
                let ending = Ending::Failed(format!("it cannot write a line: {error}"));
                return state.ending.insert(ending).clone();
            }
            if self.spec.last == Some(state.next) {
                return state.ending.insert(Ending::Complete).clone();
            }
            state.next += 1;
            drop(state);
            self.pause();
        }
    }

    fn open(&self) -> Result<Option<File>, String> {
        let Some(path) = &self.spec.file else {
            return Ok(None);
        };
        let opened = OpenOptions::new().create(true).append(true).open(path);
        opened
            .map(Some)
            .map_err(|error| format!("it cannot open {path}: {error}"))
    }

    fn pause(&self) {
        let time = Duration::from_micros(self.spec.pause_us);
        if !self.spec.is_busy {
            std::thread::sleep(time);
            return;
        }
        let until = Instant::now() + time;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    }

    /// Stops counting; returns the next number.
    ///
    /// # Errors
    /// If it has ended.
    pub(crate) fn freeze(&self) -> Result<u64, &'static str> {
        let mut state = self.state();
        if state.ending.is_some() {
            return Err("the machine has ended");
        }
        state.is_frozen = true;
        Ok(state.next)
    }

    pub(crate) fn thaw(&self) {
        self.state().is_frozen = false;
        self.changed.notify_all();
    }

    /// Whether it may not run, for lack of a lease. From the call on nothing of it is written.
    pub(crate) fn hold(&self, is_held: bool) {
        self.state().is_held = is_held;
        self.changed.notify_all();
    }

    pub(crate) fn set_epoch(&self, epoch: u64) {
        self.state().epoch = epoch;
    }

    /// Ends the machine, frozen or not.
    pub(crate) fn end(&self, ending: Ending) {
        self.state().ending.get_or_insert(ending);
        self.changed.notify_all();
    }
}
