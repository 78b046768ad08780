//! The worker process of a machine of this kind: supervises its QEMU.

use super::checkpoints::Checkpoints;
use crate::arguments::Machine;
use crate::balloon::Balloon;
use crate::channel::IncomingChannels;
use crate::console::Console;
use crate::disk_copy::IncomingDisk;
use crate::full_disk;
use crate::guest::Guest;
use crate::guest_agent::{AgentError, GuestAgent};
use crate::guest_clock;
use crate::host_offers;
use crate::migration::Incoming;
use crate::post_copy::IncomingMemory;
use crate::process::VmEnd;
use crate::processor::Accelerator;
use crate::qmp::QmpError;
use crate::root_disk;
use crate::session::QemuSession;
use crate::spec::QemuSpec;
use crate::vm::{Launch, Vm};
use keel_cluster::{Epoch, MachineName};
use keel_machine::failpoint;
use keel_machine::high_availability::Fence;
use keel_machine::kind::WorkerFolders;
use keel_machine::link::{Link, LinkError, Message};
use keel_machine::log::Log;
use keel_machine::moves::TargetEvent;
use keel_machine::moves::prediction::Activity;
use keel_machine::spec::{Spec, Status};
use keel_machine::worker::control::{
    Checkpoint, CheckpointReport, ConsoleInput, Copy, Execute, ExecutionEnd, GuestMemory,
    GuestSystem, Receive, Report, Start, StartFrom, StartPhase, StartProgress, State,
};
use keel_machine::worker::{
    Accepted, Connect, LogTarget, MoveError, MoveState, Process, Receiver, Worker, step_target,
    write_notice,
};
use keel_net::RpcError;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// What QEMU may use beside the guest's memory and an eighth of it (its page tables, and what a
/// migration remembers of pages), in bytes: translated code, device models, and images in the page
/// cache.
const QEMU_BYTES: u64 = 512 << 20;
/// How long a guest may take to read what is typed until its user is told how much it has taken.
const TYPING_PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct QemuWorker {
    pub(super) process: Process,
    folders: WorkerFolders,
    inner: Mutex<Inner>,
    pub(super) checkpoints: Checkpoints,
    balloon: Mutex<Balloon>,
    /// Locked while the guest's agent is asked for its system.
    asks_system: Mutex<()>,
}

#[derive(Default)]
pub(super) struct Inner {
    pub(super) moves: MoveState<QemuSession>,
    pub(super) name: Option<MachineName>,
    pub(super) spec: Option<Spec>,
    pub(super) guest: Option<Guest>,
    /// Since when the machine is being restored from a checkpoint.
    restoring: Option<Instant>,
    /// The guest's memory as it was when that was asked for last.
    memory: Option<GuestMemory>,
    /// Memory that follows the guest here, until all of it has come.
    incoming: Option<Arc<IncomingMemory>>,
}

/// Runs a worker until its agent ends it.
///
/// # Errors
/// If its folder or socket cannot be used.
pub(crate) fn run(folders: &WorkerFolders) -> Result<(), String> {
    keel_machine::worker::run(&folders.folder, |process| {
        Ok(QemuWorker {
            process,
            folders: folders.clone(),
            inner: Mutex::default(),
            checkpoints: Checkpoints::default(),
            balloon: Mutex::default(),
            asks_system: Mutex::default(),
        })
    })
}

impl QemuWorker {
    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine of this worker.
    fn vm(&self) -> Result<Arc<Vm>, RpcError> {
        let inner = self.inner();
        let vm = inner.guest.as_ref().map(|guest| guest.vm.clone());
        vm.ok_or_else(|| RpcError::failed("no machine runs here"))
    }

    /// Lets the guest give back no more memory than it has, if it is about to.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub(super) fn stop_giving_back(&self) -> Result<(), RpcError> {
        let Some((vm, memory_bytes)) = self.with_balloon()? else {
            return Ok(());
        };
        let qmp = vm.qmp().map_err(RpcError::failed)?;
        let stopped = self.lock_balloon().stop(qmp, memory_bytes);
        stopped.map_err(RpcError::failed)
    }

    /// Has something done by the agent in the guest.
    fn ask_agent<T>(
        &self,
        question: impl FnOnce(&GuestAgent) -> Result<T, AgentError>,
    ) -> Result<T, RpcError> {
        let vm = self.vm()?;
        let agent = vm.agent().ok_or_else(|| {
            RpcError::failed(
                "it has no port for a guest agent (run it again, with guest-agent = true)",
            )
        })?;
        question(agent).map_err(|error| match error {
            AgentError::Lost { .. } => RpcError::unknown(error),
            AgentError::Silent | AgentError::Busy | AgentError::Unreachable(_) => {
                RpcError::refused(error)
            }
            AgentError::Refused { .. } => RpcError::failed(error),
        })
    }

    /// Starts QEMU with a guest that does not run yet.
    ///
    /// # Errors
    /// A message for the user.
    pub(super) fn launch(
        self: &Arc<Self>,
        name: &MachineName,
        spec: &Spec,
        log: Arc<Log>,
        is_incoming: bool,
    ) -> Result<Guest, String> {
        let own = QemuSpec::of(spec)?;
        if let Some(group) = self.process.group() {
            let bytes = spec.memory_bytes.saturating_add(spec.memory_bytes / 8);
            if let Err(error) = group.limit_memory(bytes.saturating_add(QEMU_BYTES)) {
                tracing::warn!(error, "cannot limit the memory of this worker");
            }
        }
        let cache = &self.folders.cache;
        let accelerator = match &own.processor {
            Some(processor) => {
                let checked = host_offers::check(processor, cache);
                checked.map_err(|lacking| format!("it cannot run here: {lacking}"))?;
                processor.accelerator
            }
            None => Accelerator::of_host(cache),
        };
        let machine = Machine {
            name: name.as_str(),
            spec: &own,
            memory_bytes: spec.memory_bytes,
            images: &self.folders.images,
            accelerator,
            is_incoming,
        };
        root_disk::prepare(self.process.folder(), &self.folders.images, &own)?;
        let Launch { vm, console } = Vm::launch(self.process.folder(), &machine)?;
        if spec.cpu_limit_millis.is_some() {
            self.limit_cpu(&vm, spec)
                .inspect_err(|_| vm.kill(VmEnd::Discarded))?;
        }
        let console = Console::follow(console, log.clone(), spec.output_bytes_per_s);
        let console = console.map_err(|error| {
            vm.kill(VmEnd::Discarded);
            format!("its console cannot be read: {error}")
        })?;
        Ok(Guest { vm, console, log })
    }

    /// A guest at its beginning.
    fn boot(self: &Arc<Self>, start: &Start) -> Result<Guest, RpcError> {
        let log = Log::open(self.process.folder(), 0);
        let log = Arc::new(log.map_err(RpcError::failed)?);
        if let Some(notice) = &start.notice {
            write_notice(&log, &format!("{notice}; it boots again"));
        }
        let guest = self.launch(&start.machine, &start.spec, log, false);
        guest.map_err(RpcError::failed)
    }

    /// Limits the CPU time of the guest, or ends its limit.
    ///
    /// # Errors
    /// If it cannot be limited here.
    fn limit_cpu(&self, vm: &Vm, spec: &Spec) -> Result<(), String> {
        let failed = |error: String| format!("its CPU time cannot be limited: {error}");
        let Some(group) = self.process.group() else {
            return match spec.cpu_limit_millis {
                Some(_) => Err(failed("its worker has no control group".into())),
                None => Ok(()),
            };
        };
        let threads = vm.processor_threads();
        let threads = threads.map_err(|error| failed(error.to_string()))?;
        let limited = group.limit_cpu(spec.cpu_limit_millis, &threads);
        limited.map_err(failed)
    }

    /// Lets the guest run where its node has a lease.
    ///
    /// # Errors
    /// If it does not run, and has not run for a moment either.
    fn let_run(&self, guest: &Guest) -> Result<(), String> {
        let vm = &guest.vm;
        vm.connect()?;
        let lease = self.process.lease();
        let hold = || {
            // `machine_changed` looks whether it is held.
            let _ = vm.hold();
        };
        if let Err(error) = lease.resume(hold, || vm.resume()) {
            let reason = format!("it cannot run: {error}");
            if matches!(error, QmpError::Refused { .. }) {
                return Err(reason);
            }
            // It may have run, so this is its end.
            vm.kill(VmEnd::Failed(reason));
        }
        lease.machine_changed(self);
        Ok(())
    }

    fn lock_balloon(&self) -> MutexGuard<'_, Balloon> {
        self.balloon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine with the memory that it was started with, in bytes, if it has a balloon.
    fn with_balloon(&self) -> Result<Option<(Arc<Vm>, u64)>, RpcError> {
        let inner = self.inner();
        let (Some(guest), Some(spec)) = (&inner.guest, &inner.spec) else {
            return Err(RpcError::failed("no machine runs here"));
        };
        let own = QemuSpec::of(spec).map_err(RpcError::failed)?;
        let memory_bytes = spec.memory_bytes;
        Ok(own.balloon.then(|| (guest.vm.clone(), memory_bytes)))
    }

    /// Follows a guest's process to its end, also that of one that arrives and never runs here.
    ///
    /// # Errors
    /// If it cannot: the process is ended.
    fn watch(self: &Arc<Self>, guest: &Guest, spec: &Spec) -> Result<(), String> {
        let disks = QemuSpec::of(spec)?.disks;
        let paused = self.process.paused.clone();
        let followed = full_disk::follow(guest.vm.clone(), disks, paused);
        followed
            .and_then(|()| self.watch_end(guest))
            .map_err(|error| {
                guest.vm.kill(VmEnd::Discarded);
                guest.console.close();
                format!("it cannot be watched: {error}")
            })
    }

    fn watch_end(self: &Arc<Self>, guest: &Guest) -> io::Result<()> {
        let (worker, watched) = (self.clone(), guest.clone());
        let thread = std::thread::Builder::new().name("end".into());
        let watch = thread.spawn(move || {
            let end = watched.vm.wait();
            watched.console.close();
            if let VmEnd::Failed(reason) = &end {
                let failed = TargetEvent::Failed(reason.clone());
                let is_dropped = |state: &State| matches!(state, State::Dropped { .. });
                if !step_target(&worker, failed).is_empty()
                    || is_dropped(&worker.process.state.borrow())
                {
                    // Its source still has it.
                    return;
                }
            }
            worker.report_end(&watched, end);
        });
        watch.map(drop)
    }

    fn report_end(&self, guest: &Guest, end: VmEnd) {
        let status = match end {
            VmEnd::ShutDown => Status::Exited { code: 0 },
            VmEnd::Stopped => Status::Stopped,
            VmEnd::Failed(reason) => Status::Failed { reason },
            VmEnd::Discarded => return,
        };
        if let Err(error) = guest.console.drain() {
            tracing::warn!(%error, "the end of the console's output is lost");
        }
        let epoch = self.inner().moves.epoch;
        let ended = State::Ended { epoch, status };
        self.process.state.send_replace(ended);
        guest.log.close();
    }

    /// Follows the memory of a guest that runs here, and publishes how far it is.
    fn follow_memory(self: &Arc<Self>, incoming: Arc<IncomingMemory>) {
        let worker = self.clone();
        let thread = std::thread::Builder::new().name("memory".into());
        let follows = move || {
            // What is told before the machine counts as one whose memory is to come would be lost.
            let mut state = worker.process.state.subscribe();
            let runs =
                |state: &State| !matches!(state, State::Receiving { .. } | State::Prepared { .. });
            let runs = futures::executor::block_on(state.wait_for(runs)).is_ok();
            if runs {
                incoming.follow(&|now| worker.process.publish_post_copy(now));
            }
            worker.inner().incoming = None;
        };
        if let Err(error) = thread.spawn(follows) {
            let reason = format!("it is not known when all of its memory is here: {error}");
            if let Ok(vm) = self.vm() {
                vm.kill(VmEnd::Failed(reason));
            }
        }
    }

    /// Receives the machine from a source that has connected.
    fn take_over(
        self: &Arc<Self>,
        request: &Receive,
        accepted: Accepted,
        link: &mut Link,
    ) -> Result<(), MoveError> {
        let log_base = accepted.hello.log_base;
        let log = Arc::new(Log::open(self.process.folder(), log_base)?);
        let mut output = LogTarget::new(log.clone());
        let post_copy = accepted.hello.post_copy;
        let has_root_disk = QemuSpec::of(&request.spec)?.root.is_some();
        let channels = match has_root_disk || post_copy {
            true => Some(Arc::new(IncomingChannels::begin(accepted)?)),
            false => None,
        };
        let guest = self.launch(&request.machine, &request.spec, log.clone(), true)?;
        // Dropped from here on, if the move fails.
        self.inner().guest = Some(guest.clone());
        self.watch(&guest, &request.spec)?;
        let (mut incoming, follows) = match &channels {
            Some(channels) if post_copy => {
                let follows = IncomingMemory::begin(&guest.vm, channels.clone())?;
                (None, Some(follows))
            }
            _ => (Some(Incoming::begin(&guest.vm)?), None),
        };
        let mut disk = match channels {
            Some(channels) if has_root_disk => Some(IncomingDisk::begin(&guest.vm, channels)?),
            _ => None,
        };
        loop {
            match link.receive()? {
                Message::Frozen => {}
                Message::Log { offset, bytes } => output.take(offset, &bytes)?,
                Message::LogBegins { offset } => output.begins(offset)?,
                Message::RoundEnd => {
                    failpoint::pass("target.round")?;
                    output.request_missing(link)?;
                    link.send(&Message::RoundDone)?;
                    link.flush()?;
                }
                Message::Image(bytes) => match &mut incoming {
                    Some(incoming) => incoming.take(&bytes)?,
                    None => return Err(out_of_turn(&Message::Image(bytes))),
                },
                Message::ImageEnd => {
                    if let Some(disk) = disk.take() {
                        disk.finish()?;
                    }
                    if let Some(incoming) = incoming.take() {
                        incoming.finish()?;
                    }
                    if let Some(follows) = &follows {
                        follows.check()?;
                    }
                    match output.request_missing(link)? {
                        true => link.flush()?,
                        false => break,
                    }
                }
                other => return Err(out_of_turn(&other)),
            }
        }
        failpoint::pass("target.image")?;
        failpoint::pass("target.ready")?;
        self.process.set_log(log);
        self.inner().incoming = follows.map(Arc::new);
        Ok(())
    }
}

/// Of the refusals of an agent to say how a process ended only one is final: it may stand still, or be
/// replaced by a newer one.
fn unless_unknown(
    error: AgentError,
) -> Result<Result<Option<ExecutionEnd>, AgentError>, AgentError> {
    match error {
        error if error.is_about_an_unknown_process() => Ok(Err(error)),
        AgentError::Refused { .. } => Err(AgentError::Unreachable(error.to_string())),
        error => Err(error),
    }
}

fn out_of_turn(message: &Message) -> MoveError {
    LinkError::Message(format!("{message:?} out of turn")).into()
}

impl Worker for QemuWorker {
    type Session = QemuSession;

    fn process(&self) -> &Process {
        &self.process
    }

    fn moves<R>(&self, access: impl FnOnce(&mut MoveState<QemuSession>) -> R) -> R {
        access(&mut self.inner().moves)
    }

    fn start(self: &Arc<Self>, start: Start, runtime: &Handle) -> Result<(), RpcError> {
        let guest = match &start.from {
            StartFrom::Beginning { .. } => self.boot(&start)?,
            StartFrom::Checkpoint(origin) => {
                self.inner().restoring = Some(Instant::now());
                let restored = self.restore(origin, &start, runtime);
                self.inner().restoring = None;
                restored?
            }
        };
        self.process.set_log(guest.log.clone());
        {
            let mut inner = self.inner();
            inner.name = Some(start.machine);
            inner.spec = Some(start.spec.clone());
            inner.moves.epoch = start.epoch;
            inner.guest = Some(guest.clone());
        }
        let running = State::Running { epoch: start.epoch };
        self.process.state.send_replace(running);
        self.watch(&guest, &start.spec).map_err(RpcError::failed)?;
        match self.let_run(&guest) {
            Ok(()) if matches!(start.from, StartFrom::Checkpoint(_)) => {
                if let Err(error) = guest_clock::set_after_restore(guest) {
                    tracing::warn!(%error, "the clock of a restored system is not set");
                }
            }
            Ok(()) => {}
            Err(reason) => guest.vm.kill(VmEnd::Failed(reason)),
        }
        Ok(())
    }

    fn describe(&self, report: &mut Report) {
        let inner = self.inner();
        report.start = inner.restoring.map(|since| StartProgress {
            phase: StartPhase::Restore,
            elapsed_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
            percent: None,
        });
        let (Some(guest), Some(spec)) = (&inner.guest, &inner.spec) else {
            return;
        };
        report.threads = QemuSpec::of(spec).map_or(0, |own| own.cpus);
        report.memory_pages = vec![spec.memory_bytes >> 16];
        report.memory_bytes = guest.vm.resident_bytes();
        report.guest_memory = inner.memory;
    }

    fn stop(&self) {
        let inner = self.inner();
        let (Some(guest), Some(spec)) = (&inner.guest, &inner.spec) else {
            return;
        };
        let patience_s = QemuSpec::of(spec).map_or(0, |own| own.shutdown_s);
        guest.vm.shut_down(Duration::from_secs(patience_s.into()));
    }

    fn set(&self, spec: Spec) -> Result<(), RpcError> {
        let fixed = |spec: &Spec| (spec.memory_bytes, spec.output_bytes_per_s);
        let (now, vm) = {
            let inner = self.inner();
            let vm = inner.guest.as_ref().map(|guest| guest.vm.clone());
            (inner.spec.clone(), vm)
        };
        if now.as_ref().is_some_and(|now| fixed(now) != fixed(&spec)) {
            return Err(RpcError::failed(
                "the memory and output rate of a machine of kind qemu cannot change while it runs",
            ));
        }
        let limit = now.and_then(|now| now.cpu_limit_millis);
        if limit != spec.cpu_limit_millis
            && let Some(vm) = vm
        {
            self.limit_cpu(&vm, &spec).map_err(RpcError::failed)?;
        }
        self.inner().spec = Some(spec);
        Ok(())
    }

    fn begin_move(self: &Arc<Self>, copy: &Copy) -> Result<Connect<QemuSession>, String> {
        let inner = self.inner();
        let (Some(guest), Some(name)) = (&inner.guest, &inner.name) else {
            return Err("this worker has no machine to move".into());
        };
        let (guest, name, epoch) = (guest.clone(), name.clone(), inner.moves.epoch);
        let own = inner.spec.as_ref().map(QemuSpec::of).transpose()?;
        let has_root_disk = own.is_some_and(|own| own.root.is_some());
        let (copy, worker) = (copy.clone(), self.clone());
        Ok(Connect {
            give_up: None,
            connect: Box::new(move |identity| {
                worker.checkpoints.end().map_err(LinkError::Aborted)?;
                QemuSession::connect(name, epoch, guest, has_root_disk, identity, &copy)
            }),
        })
    }

    /// The guest does not see its epoch.
    fn stay_under(&self, _epoch: Epoch) {}

    fn thaw(&self) -> Result<(), RpcError> {
        let vm = self.vm()?;
        vm.resume().map_err(RpcError::failed)
    }

    /// A process that is stopped has the locks of its disks, which another node needs: then the
    /// kernel's timer ends it, unless a program of the operator makes the node's end certain.
    fn hold_for_lease(&self) -> bool {
        let (vm, spec) = {
            let inner = self.inner();
            (
                inner.guest.as_ref().map(|guest| guest.vm.clone()),
                inner.spec.clone(),
            )
        };
        let Some(vm) = vm else { return true };
        let has_locks = spec.is_some_and(|spec| {
            let is_hook = spec.ha.as_ref().is_some_and(|ha| ha.fence == Fence::Hook);
            let own = QemuSpec::of(&spec).ok();
            !is_hook && own.is_some_and(|own| own.disks.iter().any(|disk| !disk.read_only))
        });
        vm.hold() && (!has_locks || vm.has_ended())
    }

    fn release_for_lease(&self) {
        if let Ok(vm) = self.vm() {
            vm.release();
        }
    }

    fn begin_receive(
        self: &Arc<Self>,
        request: Receive,
        _runtime: &Handle,
    ) -> Result<Receiver, RpcError> {
        QemuSpec::of(&request.spec).map_err(RpcError::failed)?;
        {
            let mut inner = self.inner();
            inner.name = Some(request.machine.clone());
            inner.spec = Some(request.spec.clone());
        }
        let worker = self.clone();
        Ok(Box::new(move |link, accepted| {
            worker.take_over(&request, accepted, link)
        }))
    }

    fn resume(self: &Arc<Self>, _epoch: Epoch) -> Result<(), String> {
        let guest = self.inner().guest.clone();
        let guest = guest.ok_or("no machine has arrived here")?;
        let incoming = self.inner().incoming.clone();
        if let Some(incoming) = incoming {
            let arrived = incoming.wait_for_devices();
            arrived.map_err(|error| error.to_string())?;
        }
        self.let_run(&guest)?;
        let thread = std::thread::Builder::new().name("announce".into());
        if let Err(error) = thread.spawn(move || guest.vm.announce()) {
            tracing::warn!(%error, "the machine's new place is not announced to its networks");
        }
        Ok(())
    }

    fn resumed(self: &Arc<Self>, epoch: Epoch) -> State {
        let incoming = self.inner().incoming.clone();
        let Some(incoming) = incoming else {
            return State::Running { epoch };
        };
        let is_complete = incoming.is_complete();
        self.follow_memory(incoming);
        match is_complete {
            true => State::Running { epoch },
            false => State::Filling {
                epoch,
                source_lost: false,
            },
        }
    }

    fn drop_received(&self, reason: &str) {
        if let Some(guest) = self.inner().guest.take() {
            guest.vm.kill(VmEnd::Discarded);
        }
        let reason = reason.to_owned();
        self.process.state.send_replace(State::Dropped { reason });
    }

    fn checkpoint(
        &self,
        request: &Checkpoint,
        runtime: &Handle,
    ) -> Result<CheckpointReport, RpcError> {
        if self.inner().incoming.is_some() {
            return Err(RpcError::refused("some of its memory is still to come"));
        }
        self.make_checkpoint(request, runtime)
    }

    fn end_checkpoint(&self) -> Result<(), RpcError> {
        self.checkpoints.end().map_err(RpcError::failed)
    }

    fn execute(&self, process: &Execute) -> Result<i64, RpcError> {
        self.ask_agent(|agent| agent.start_process(process))
    }

    fn executed(&self, process: i64) -> Result<Option<ExecutionEnd>, RpcError> {
        self.ask_agent(|agent| agent.process_end(process).map(Ok).or_else(unless_unknown))
            .and_then(|end| end.map_err(RpcError::failed))
    }

    fn system(&self) -> Result<GuestSystem, RpcError> {
        if !self.vm()?.is_agent_connected().map_err(RpcError::failed)? {
            return Err(RpcError::failed(
                "no guest agent runs in it (install qemu-guest-agent there)",
            ));
        }
        // It takes several turns at its agent, which others wait for.
        let asked = self.asks_system.try_lock();
        let _one = asked.map_err(|_| RpcError::refused("it is being asked already; try again"))?;
        self.ask_agent(GuestAgent::system)
    }

    fn type_in(&self, epoch: Epoch, input: &ConsoleInput) -> Result<Option<u64>, RpcError> {
        let guest = {
            let inner = self.inner();
            let is_meant = inner.moves.epoch == epoch;
            inner.guest.clone().filter(|_| is_meant)
        };
        let Some(Guest { vm, console, .. }) = guest else {
            return Ok(None);
        };
        let typed = console.type_in(input, TYPING_PATIENCE, || vm.runs());
        typed.map_err(RpcError::failed)
    }

    fn connect_viewer(&self, epoch: Epoch) -> Result<UnixStream, RpcError> {
        {
            let inner = self.inner();
            if inner.moves.epoch != epoch {
                return Err(RpcError::refused("it runs under another epoch"));
            }
            // QEMU would wait for a page of the screen, and carry out no command meanwhile.
            if inner.incoming.is_some() {
                return Err(RpcError::refused("some of its memory is still to come"));
            }
        }
        self.vm()?.connect_viewer().map_err(RpcError::failed)
    }

    fn activity(&self) -> Result<Activity, RpcError> {
        Ok(Activity {
            populated_bytes: self.vm()?.resident_bytes(),
            volume_bytes: root_disk::occupied_bytes(self.process.folder()),
            written: Vec::new(),
        })
    }

    fn memory(&self) -> Result<Option<GuestMemory>, RpcError> {
        let Some((vm, memory_bytes)) = self.with_balloon()? else {
            return Ok(None);
        };
        if !vm.runs() {
            return Err(RpcError::refused("it stands still"));
        }
        let qmp = vm.qmp().map_err(RpcError::failed)?;
        let memory = self.lock_balloon().memory(qmp, memory_bytes);
        let memory = memory.map_err(RpcError::failed)?;
        self.inner().memory = Some(memory);
        Ok(Some(memory))
    }

    fn give_back(&self, bytes: u64) -> Result<(), RpcError> {
        let Some((vm, memory_bytes)) = self.with_balloon()? else {
            return Err(RpcError::failed("it has no balloon"));
        };
        if bytes >= memory_bytes {
            return Err(RpcError::failed(format!("it has {memory_bytes} bytes")));
        }
        let is_copied = {
            let inner = self.inner();
            inner.moves.is_moving_away() || inner.incoming.is_some()
        };
        if !vm.runs() || is_copied || self.checkpoints.are_made() {
            let why = "it moves, stands still, or a checkpoint of it is made; try again";
            return Err(RpcError::refused(why));
        }
        let qmp = vm.qmp().map_err(RpcError::failed)?;
        let asked = self.lock_balloon().ask(qmp, memory_bytes, bytes);
        asked.map_err(RpcError::failed)
    }
}
