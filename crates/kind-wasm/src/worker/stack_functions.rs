//! The functions on the stacks of a machine that moves. Code for resuming threads is compiled
//! function by function when it is first needed, and the downtime of a move must not wait for it.
//! So the source names the functions on the stacks of the machine's threads, before the first round
//! of copying and after each, and the target compiles them meanwhile. A function that is first seen
//! at the freeze is compiled during the downtime: it is short, since functions that take long are
//! compiled before any capture ([`Program::prepare_resume`]). Of a large function the target compiles
//! what its frames need at once; the rest follows when they run there.

use keel_machine::cgroup::yield_compile_thread;
use keel_machine::link::{FUNCTIONS_MAX, Link, LinkError, Message};
use keel_wasm::runtime::{Machine, MachineError, Program};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time limit for threads to reach a safepoint, so that their stacks can be read.
const SAMPLE_PATIENCE: Duration = Duration::from_millis(100);
/// How long the target waits for compilation before it answers a round.
const COMPILE_WAIT: Duration = Duration::from_secs(1);
const COMPILE_CHECK_INTERVAL: Duration = Duration::from_millis(2);

/// The source's side: functions that the target knows.
#[derive(Debug, Default)]
pub(super) struct StackFunctions {
    named: BTreeSet<u32>,
}

/// Why the stacks cannot be read, or the target cannot be told.
#[derive(Debug, thiserror::Error)]
pub(super) enum SampleError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl StackFunctions {
    /// Names the functions that are on the stacks now and were not named before. Threads that were
    /// captured for it resume here: each compiles a function when it returns to it.
    ///
    /// # Errors
    /// [`SampleError`]. That a thread is in a long host call is none: its functions are found later.
    pub(super) fn name(&mut self, machine: &Machine, link: &mut Link) -> Result<(), SampleError> {
        let points = match machine.points_on_stacks(SAMPLE_PATIENCE) {
            Err(MachineError::FreezeTimeout(_)) => return Ok(()),
            points => points?,
        };
        let found = machine.program().stack_code(&points);
        let found = found.map_err(MachineError::from)?;
        let room = FUNCTIONS_MAX.saturating_sub(self.named.len());
        let new = found.difference(&self.named).take(room).copied();
        let new: BTreeSet<u32> = new.collect();
        if new.is_empty() {
            return Ok(());
        }
        self.named.extend(&new);
        link.send(&Message::Functions(new.clone()))?;
        Ok(link.flush()?)
    }
}

/// The target's side: compilation while memory is copied.
pub(super) struct Compilation {
    program: Arc<Program>,
    running: Vec<JoinHandle<()>>,
}

impl Compilation {
    pub(super) fn new(program: Arc<Program>) -> Self {
        Compilation {
            program,
            running: Vec::new(),
        }
    }

    /// Compiles functions on a thread of its own. What cannot be compiled fails again when the
    /// machine is built from its image.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn add(&mut self, functions: BTreeSet<u32>) -> std::io::Result<()> {
        let program = self.program.clone();
        let compile = move || {
            yield_compile_thread();
            if let Err(error) = program.prepare_stacks(&functions) {
                tracing::warn!(%error, "threads of an arriving machine cannot be resumed here");
            }
        };
        let thread = std::thread::Builder::new().name("compile".into());
        self.running.push(thread.spawn(compile)?);
        Ok(())
    }

    /// Whether all functions are compiled, after waiting a while for it.
    pub(super) fn is_complete(&mut self) -> bool {
        let deadline = Instant::now() + COMPILE_WAIT;
        loop {
            self.running.retain(|thread| !thread.is_finished());
            if self.running.is_empty() || Instant::now() >= deadline {
                return self.running.is_empty();
            }
            std::thread::sleep(COMPILE_CHECK_INTERVAL);
        }
    }
}
