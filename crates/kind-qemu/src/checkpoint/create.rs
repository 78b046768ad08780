//! Makes a checkpoint while the system runs. Blocking; runs on a thread of its own.
//!
//! The guest is stopped for some milliseconds. From that moment on QEMU copies what the memory had
//! then, and before the guest writes a page that is not copied yet, that page
//! (`background-snapshot`); so does it with the disk ([`super::disk`]). What is new of that since the
//! checkpoint before goes to files of this node first ([`super::memory_copy`]).

use super::disk::{DiskBackup, Zeroes, copied_bytes};
use super::memory_copy::{KnownMemory, MemoryCopy, Pump, check_room};
use super::ram_stream::StreamError;
use super::state::SystemState;
use crate::attempt::{undo, undo_later};
use crate::guest::Guest;
use crate::qmp::QmpError;
use crate::spec::QemuSpec;
use crate::vm::{RunState, Vm};
use crate::{migration, migration_status};
use keel_machine::checkpoint::{
    CheckpointId, CreatedCheckpoint, Manifest, PackError, PackName, Packer, Predecessor,
    Repository, RepositoryError, Subject, note_page,
};
use keel_machine::failpoint::{self, Injected};
use keel_machine::worker::MoveError;
use keel_store::clock::unix_ms;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// What QEMU says of a guest that it was told to stop.
const PAUSED: &str = "paused";
/// Answers of QEMU after which it has done what it had planned before.
const SETTLED_ANSWERS: usize = 2;
/// How long an exchange with the guest's agent may delay the checkpoint.
const QUIET_PATIENCE: Duration = Duration::from_millis(200);
/// How long QEMU may take until it has the state of the devices.
const DEVICES_PATIENCE: Duration = Duration::from_secs(20);
/// How often a copy is asked whether it is to end early.
const POLL: Duration = Duration::from_millis(100);
/// How often it is asked whether the guest may run on.
const DEVICES_POLL: Duration = Duration::from_micros(500);

/// Why no checkpoint was made. The system runs on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Pack(PackError),
    #[error(transparent)]
    Qemu(#[from] QmpError),
    #[error("QEMU's copy of the memory failed: {0}")]
    Memory(MoveError),
    #[error("the copy of its disk failed: {0}")]
    Disk(String),
    #[error("its state cannot be kept on this node: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("{0}")]
    Spec(String),
    #[error("the state of its devices cannot be encoded: {0}")]
    State(String),
    /// Copies of memory and disk are files of the node first.
    #[error(
        "there is no room for a copy of what is new in its memory and on its disk in {}, where 256 MiB are left free",
        .0.display()
    )]
    NoRoom(PathBuf),
    /// Of what an increment would be based on.
    #[error(
        "its memory has another form than in the checkpoint before; the next one is a full one"
    )]
    OtherMemory,
    #[error("it stands still; try again")]
    Still,
    #[error("the machine has ended")]
    Ended,
    /// A move takes precedence.
    #[error("the checkpoint was given up: the machine is to move")]
    GivenUp,
    #[error(transparent)]
    Injected(#[from] Injected),
}

impl From<PackError> for CreateError {
    fn from(error: PackError) -> Self {
        match error {
            PackError::GivenUp => CreateError::GivenUp,
            error => CreateError::Pack(error),
        }
    }
}

/// Where and how a checkpoint is stored.
#[derive(Debug)]
pub(crate) struct Destination<'a> {
    pub(crate) repository: &'a Repository,
    pub(crate) runtime: &'a Handle,
    /// Whether a full checkpoint is made in any case.
    pub(crate) full: bool,
    /// The checkpoint that counts for the machine now, wherever it is: ids increase from it.
    pub(crate) after: Option<CheckpointId>,
    /// Set by others to end it early.
    pub(crate) give_up: &'a AtomicBool,
}

/// Makes the checkpoints of one machine.
#[derive(Debug, Default)]
pub(crate) struct Checkpointer {
    last: Option<Predecessor>,
    /// Its memory then.
    known: KnownMemory,
    /// The zeroes of its own disk then.
    zeroes: Zeroes,
}

/// A guest of one moment.
struct Copied {
    memory: MemoryCopy,
    /// End of the output at that moment.
    log_end: u64,
    /// For how long the guest was stopped.
    pause: Duration,
}

impl Checkpointer {
    /// Makes a checkpoint: a full one if it is the first, requested, or the chain is long.
    ///
    /// # Errors
    /// [`CreateError`]; the next checkpoint is a full one then.
    pub(crate) fn take(
        &mut self,
        guest: &Guest,
        subject: Subject,
        destination: &Destination<'_>,
    ) -> Result<CreatedCheckpoint, CreateError> {
        let Destination {
            repository,
            runtime,
            ..
        } = *destination;
        let begun = Instant::now();
        let own = QemuSpec::of(&subject.spec).map_err(CreateError::Spec)?;
        if !guest.vm.runs() {
            return Err(CreateError::Still);
        }
        let parent = self.last.take();
        let parent = parent.filter(|last| last.is_continued_in(repository) && !destination.full);
        let parent = match parent {
            Some(parent) => runtime.block_on(parent.if_intact(repository, &subject.name))?,
            None => None,
        };
        if parent.is_none() {
            (self.known, self.zeroes) = Default::default();
        }
        let after = destination.after.as_ref();
        let id = Predecessor::next_id(repository, &subject.name, parent.as_ref(), after);
        let id = runtime.block_on(id)?;
        let is_incremental = parent.is_some();
        if own.root.is_some() {
            let needed = copied_bytes(&guest.vm, is_incremental)?;
            check_room(guest.vm.folder(), needed)?;
        }
        let disk = match &own.root {
            Some(disk) => Some(DiskBackup::prepare(&guest.vm, disk, is_incremental)?),
            None => None,
        };
        let attempt = guest.vm.begin_attempt();
        let known = std::mem::take(&mut self.known);
        let copied = copy(guest, disk.as_ref(), known, destination.give_up);
        let mut copied = match copied {
            Ok(copied) => copied,
            Err(error) => {
                if let Err(later) = undo(&guest.vm, attempt, false) {
                    tracing::warn!(error = %later, "a failed checkpoint is not undone yet");
                    undo_later(guest.vm.clone(), attempt, false);
                }
                return Err(match guest.vm.has_ended() {
                    true => CreateError::Ended,
                    false => error,
                });
            }
        };
        let created_unix_ms = unix_ms();
        let packer = |piece: fn(usize) -> PackName| {
            let (name, of) = (subject.name.clone(), (id.clone(), 0));
            Packer::new(repository.clone(), name, of, runtime.clone(), piece)
        };
        let (mut pages, mut runs) = (packer(PackName::Pages), Vec::new());
        copied.memory.pages(|block, at, page| {
            pages.add(page, destination.give_up)?;
            note_page(&mut runs, block, at, page.len() as u64);
            Ok(())
        })?;
        let (mut blocks, mut block_runs) = (packer(PackName::Blocks), Vec::new());
        if let Some(disk) = disk {
            let zeroes = &mut self.zeroes;
            disk.add(&mut blocks, &mut block_runs, zeroes, destination.give_up)?;
        }
        failpoint::pass("checkpoint.worker.packs")?;
        let (packs, block_packs) = (pages.finish()?, blocks.finish()?);
        let MemoryCopy {
            known,
            head,
            devices,
            ..
        } = copied.memory;
        let state = SystemState::new(head, devices, &self.zeroes)?;
        let manifest = Manifest {
            id,
            machine: subject.name,
            parent: parent.as_ref().map(|last| last.id().clone()),
            generation: 0,
            epoch: subject.epoch,
            created_unix_ms,
            spec: subject.spec,
            program: None,
            log_end: copied.log_end,
            memory_pages: state.memory_pages(),
            runs,
            packs,
            block_runs,
            block_packs,
            image: state.encode().map_err(CreateError::State)?,
        };
        failpoint::pass("checkpoint.worker.manifest")?;
        // If storing the manifest has no answer, the checkpoint may exist nevertheless.
        runtime.block_on(repository.put_manifest(&manifest))?;
        failpoint::pass("checkpoint.worker.stored")?;
        self.last = Some(Predecessor::new(repository, parent, &manifest));
        self.known = known;
        Ok(CreatedCheckpoint {
            manifest,
            pause: copied.pause,
            total: begun.elapsed(),
        })
    }
}

/// Copies what the guest has at one moment, memory and disk, to files of this node.
///
/// QEMU's copy of the memory is never given up once it has begun: QEMU's main loop may wait for a
/// page that is still protected, and would wait for ever, since nobody lets go of that page any more.
fn copy(
    guest: &Guest,
    disk: Option<&DiskBackup<'_>>,
    known: KnownMemory,
    give_up: &AtomicBool,
) -> Result<Copied, CreateError> {
    let vm = &guest.vm;
    migration::set_up_snapshot(vm)?;
    let file = tempfile::tempfile_in(vm.folder())?;
    failpoint::pass("checkpoint.worker.round")?;
    if let Some(disk) = disk {
        disk.flush()?;
    }
    // An answer of its agent, or what is typed, must not be on its way while the guest is stopped:
    // the restored guest would get it too.
    let agent = vm.agent();
    let quiet = agent.and_then(|agent| agent.quiet(QUIET_PATIENCE));
    let untyped = guest.console.quiet();
    vm.expect_migration();
    let begun = Instant::now();
    vm.pause()?;
    let state = migration::settle_console(vm, &guest.console).map_err(CreateError::Memory)?;
    if state.status != PAUSED {
        // A disk without room has stopped it: QEMU can make no copy of such a guest.
        return Err(CreateError::Still);
    }
    let log_end = guest.log.end();
    failpoint::pass("checkpoint.worker.frozen")?;
    if let Some(disk) = disk {
        disk.begin()?;
    }
    let socket = migration::accept(vm, migration::Attempt::First).map_err(CreateError::Memory)?;
    let pump = Pump::start(socket, file, vm.folder(), known)?;
    // Some versions of QEMU let the guest run on themselves, others leave that to others.
    let deadline = Instant::now() + DEVICES_PATIENCE;
    while vm.stopped_for().is_some()
        && !pump.has_devices()
        && !vm.has_ended()
        && Instant::now() < deadline
    {
        std::thread::sleep(DEVICES_POLL);
    }
    let has_devices = vm.stopped_for().is_none() || pump.has_devices();
    let resumed = resume(vm);
    let pause = begun.elapsed();
    drop((quiet, untyped));
    while vm
        .wait_for_migration(POLL, &migration_status::ENDED)
        .is_none()
    {
        if vm.has_ended() {
            return Err(CreateError::Ended);
        }
    }
    resumed?;
    if !has_devices {
        let reason = "QEMU does not tell the state of the devices in time";
        return Err(CreateError::Memory(reason.into()));
    }
    let memory = pump.finish()?;
    migration_status::check(vm).map_err(CreateError::Memory)?;
    if let Some(disk) = disk {
        disk.wait(give_up)?;
    }
    if give_up.load(Ordering::Relaxed) {
        return Err(CreateError::GivenUp);
    }
    Ok(Copied {
        memory,
        log_end,
        pause,
    })
}

/// Lets a guest run on of which QEMU has begun a copy.
///
/// QEMU itself lets it run, or, from 9.0 on, gives it the state again that it had: whichever that
/// version does must not come after the command, and a guest that runs must not be taken for one that
/// is paused. QEMU does first what it has planned before it answers twice.
fn resume(vm: &Vm) -> Result<(), QmpError> {
    for _ in 0..SETTLED_ANSWERS {
        let _: RunState = vm.qmp()?.query("query-status")?;
    }
    vm.resume()?;
    let now: RunState = vm.qmp()?.query("query-status")?;
    match now.status == PAUSED && vm.is_to_run() {
        true => vm.resume(),
        false => Ok(()),
    }
}
