//! The worker process of a machine that counts.

use crate::NullSpec;
use crate::counter::{Counter, Ending};
use crate::session::NullSession;
use keel_cluster::{Epoch, MachineName};
use keel_machine::checkpoint::{CheckpointId, Manifest, Origin, Repository};
use keel_machine::failpoint;
use keel_machine::kind::{GUEST_THREAD_PREFIX, WorkerFolders};
use keel_machine::link::{ImageBytes, Link, LinkError, Message};
use keel_machine::log::Log;
use keel_machine::moves::prediction::Activity;
use keel_machine::spec::{Spec, Status};
use keel_machine::worker::control::{
    Checkpoint, CheckpointReport, Copy, Receive, Report, Start, StartFrom, State,
};
use keel_machine::worker::{
    Connect, LogTarget, MoveError, MoveState, Process, Receiver, Worker, write_notice,
};
use keel_net::RpcError;
use keel_store::clock::unix_ms;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::runtime::Handle;

/// What the node reserves for a machine of this kind, in pages of 64 KiB.
const RESERVED_PAGES: u64 = 1;

struct NullWorker {
    process: Process,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    moves: MoveState<NullSession>,
    name: Option<MachineName>,
    spec: Option<Spec>,
    counter: Option<Arc<Counter>>,
}

/// Runs a worker until its agent ends it.
pub(crate) fn run(folders: &WorkerFolders) -> Result<(), String> {
    keel_machine::worker::run(&folders.folder, |process| {
        Ok(NullWorker {
            process,
            inner: Mutex::default(),
        })
    })
}

/// The number in an image.
fn number(image: &[u8]) -> Result<u64, String> {
    let bytes = image.try_into();
    let bytes = bytes.map_err(|_| format!("an image of {} bytes is no number", image.len()))?;
    Ok(u64::from_le_bytes(bytes))
}

impl NullWorker {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine of this worker.
    fn counter(&self) -> Result<Arc<Counter>, RpcError> {
        let counter = self.inner().counter.clone();
        counter.ok_or_else(|| RpcError::failed("no machine runs here"))
    }

    /// Starts the thread of a frozen machine, and reports its end.
    fn begin(self: &Arc<Self>, counter: Arc<Counter>) -> std::io::Result<()> {
        let worker = self.clone();
        std::thread::Builder::new()
            .name(format!("{GUEST_THREAD_PREFIX}count"))
            .spawn(move || {
                let status = match counter.run() {
                    Ending::Complete => Status::Exited { code: 0 },
                    Ending::Stopped => Status::Stopped,
                    Ending::Failed(reason) => Status::Failed { reason },
                    Ending::Discarded => return,
                };
                let epoch = worker.inner().moves.epoch;
                let ended = State::Ended { epoch, status };
                worker.process.state.send_replace(ended);
                if let Some(log) = worker.process.log() {
                    log.close();
                }
            })
            .map(drop)
    }

    /// The number at which a restored machine continues, and the end of its output then.
    fn restore(origin: &Origin, runtime: &Handle) -> Result<(u64, Manifest), String> {
        let repository = Repository::open(&origin.repository).map_err(|error| error.to_string())?;
        let id = match &origin.id {
            Some(id) => id.clone(),
            None => {
                let all = runtime.block_on(repository.list(&origin.machine));
                let all = all.map_err(|error| error.to_string())?;
                let newest = all.first().cloned();
                newest.ok_or_else(|| format!("machine {} has no checkpoint", origin.machine))?
            }
        };
        let manifest = runtime
            .block_on(repository.manifest(&origin.machine, &id))
            .map_err(|error| error.to_string())?;
        failpoint::pass("restore.manifest").map_err(|error| error.to_string())?;
        let next = number(&manifest.image)?;
        failpoint::pass("restore.pages").map_err(|error| error.to_string())?;
        Ok((next, manifest))
    }

    /// Receives the machine from a source that has connected.
    fn take_over(
        self: &Arc<Self>,
        request: &Receive,
        log_base: u64,
        link: &mut Link,
    ) -> Result<(), MoveError> {
        let log = Arc::new(Log::open(self.process.folder(), log_base)?);
        let mut output = LogTarget::new(log.clone());
        let mut image = ImageBytes::default();
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
                Message::Image(bytes) => image.add(&bytes)?,
                Message::ImageEnd => match output.request_missing(link)? {
                    true => link.flush()?,
                    false => break,
                },
                other => {
                    return Err(LinkError::Message(format!("{other:?} out of turn")).into());
                }
            }
        }
        failpoint::pass("target.image")?;
        let next = number(&image.take())?;
        let spec = NullSpec::of(&request.spec)?;
        let counter = Counter::new(spec, log.clone(), next, request.offered.token());
        failpoint::pass("target.ready")?;
        self.process.set_log(log);
        self.inner().counter = Some(counter.clone());
        // Frozen until the store has decided.
        self.begin(counter)?;
        Ok(())
    }
}

impl Worker for NullWorker {
    type Session = NullSession;

    fn process(&self) -> &Process {
        &self.process
    }

    fn moves<R>(&self, access: impl FnOnce(&mut MoveState<NullSession>) -> R) -> R {
        access(&mut self.inner().moves)
    }

    fn start(self: &Arc<Self>, start: Start, runtime: &Handle) -> Result<(), RpcError> {
        let spec = NullSpec::of(&start.spec).map_err(RpcError::failed)?;
        let (next, log_base, origin) = match &start.from {
            StartFrom::Beginning { .. } => (0, 0, None),
            StartFrom::Checkpoint(origin) => {
                let (next, manifest) = Self::restore(origin, runtime).map_err(RpcError::failed)?;
                let base = if origin.is_clone { 0 } else { manifest.log_end };
                (next, base, Some(manifest))
            }
        };
        let log = Log::open(self.process.folder(), log_base);
        let log = Arc::new(log.map_err(RpcError::failed)?);
        if let Some(notice) = &start.notice {
            write_notice(&log, notice);
        }
        if let Some(manifest) = origin {
            let text = format!("restored from checkpoint {}", manifest.id);
            write_notice(&log, &text);
        }
        let counter = Counter::new(spec, log.clone(), next, start.epoch.token());
        self.process.set_log(log);
        {
            let mut inner = self.inner();
            inner.name = Some(start.machine);
            inner.spec = Some(start.spec);
            inner.moves.epoch = start.epoch;
            inner.counter = Some(counter.clone());
        }
        let running = State::Running { epoch: start.epoch };
        self.process.state.send_replace(running);
        self.begin(counter.clone()).map_err(RpcError::failed)?;
        let lease = self.process.lease();
        lease.resume(|| counter.hold(true), || counter.thaw());
        lease.machine_changed(&**self);
        Ok(())
    }

    fn describe(&self, report: &mut Report) {
        if self.inner().counter.is_some() {
            report.threads = 1;
            report.memory_pages = vec![RESERVED_PAGES];
            report.memory_bytes = RESERVED_PAGES << 16;
        }
    }

    fn stop(&self) {
        if let Ok(counter) = self.counter() {
            counter.end(Ending::Stopped);
        }
    }

    fn set(&self, spec: Spec) -> Result<(), RpcError> {
        self.inner().spec = Some(spec);
        Ok(())
    }

    fn begin_move(self: &Arc<Self>, copy: &Copy) -> Result<Connect<NullSession>, String> {
        let log = self.process.log();
        let inner = self.inner();
        let (Some(counter), Some(name), Some(log)) = (&inner.counter, &inner.name, log) else {
            return Err("this worker has no machine to move".into());
        };
        let (counter, name, epoch) = (counter.clone(), name.clone(), inner.moves.epoch);
        let copy = copy.clone();
        Ok(Connect {
            give_up: None,
            connect: Box::new(move |identity| {
                NullSession::connect(name, epoch, counter, log, identity, &copy)
            }),
        })
    }

    fn stay_under(&self, epoch: Epoch) {
        if let Ok(counter) = self.counter() {
            counter.set_epoch(epoch.token());
        }
    }

    fn thaw(&self) -> Result<(), RpcError> {
        self.counter()?.thaw();
        Ok(())
    }

    fn hold_for_lease(&self) -> bool {
        if let Ok(counter) = self.counter() {
            counter.hold(true);
        }
        true
    }

    fn release_for_lease(&self) {
        if let Ok(counter) = self.counter() {
            counter.hold(false);
        }
    }

    fn begin_receive(
        self: &Arc<Self>,
        request: Receive,
        _runtime: &Handle,
    ) -> Result<Receiver, RpcError> {
        NullSpec::of(&request.spec).map_err(RpcError::failed)?;
        {
            let mut inner = self.inner();
            inner.name = Some(request.machine.clone());
            inner.spec = Some(request.spec.clone());
        }
        let worker = self.clone();
        Ok(Box::new(move |link, accepted| {
            worker.take_over(&request, accepted.hello.log_base, link)
        }))
    }

    fn resume(self: &Arc<Self>, epoch: Epoch) -> Result<(), String> {
        let counter = self.counter().map_err(|error| error.to_string())?;
        counter.set_epoch(epoch.token());
        let lease = self.process.lease();
        lease.resume(|| counter.hold(true), || counter.thaw());
        lease.machine_changed(&**self);
        Ok(())
    }

    fn resumed(self: &Arc<Self>, epoch: Epoch) -> State {
        State::Running { epoch }
    }

    fn drop_received(&self, reason: &str) {
        if let Some(counter) = self.inner().counter.take() {
            counter.end(Ending::Discarded);
        }
        let reason = reason.to_owned();
        self.process.state.send_replace(State::Dropped { reason });
    }

    fn checkpoint(
        &self,
        request: &Checkpoint,
        runtime: &Handle,
    ) -> Result<CheckpointReport, RpcError> {
        let begun = Instant::now();
        let repository = Repository::create(&request.repository).map_err(RpcError::failed)?;
        let log = self.process.log();
        let log = log.ok_or_else(|| RpcError::failed("no machine runs here"))?;
        let counter = self.counter()?;
        let manifest = {
            // Nothing freezes or thaws it meanwhile.
            let _freezing = self.process.freezing();
            let inner = self.inner();
            if inner.moves.is_moving_away() {
                return Err(RpcError::failed("the machine is moving; try again"));
            }
            if !matches!(*self.process.state.borrow(), State::Running { .. }) {
                return Err(RpcError::failed("no machine runs here"));
            }
            let (Some(name), Some(spec)) = (&inner.name, &inner.spec) else {
                return Err(RpcError::failed("no machine runs here"));
            };
            let now = unix_ms();
            let next = counter.freeze().map_err(RpcError::failed)?;
            let log_end = log.end();
            let frozen = failpoint::pass("checkpoint.worker.frozen");
            counter.thaw();
            frozen.map_err(RpcError::failed)?;
            Manifest {
                id: CheckpointId::after(request.after.as_ref()),
                machine: name.clone(),
                parent: None,
                generation: 0,
                epoch: inner.moves.epoch,
                created_unix_ms: now,
                spec: spec.clone(),
                program: None,
                log_end,
                memory_pages: Vec::new(),
                runs: Vec::new(),
                packs: Vec::new(),
                block_runs: Vec::new(),
                block_packs: Vec::new(),
                image: next.to_le_bytes().to_vec(),
            }
        };
        let pause = begun.elapsed();
        failpoint::pass("checkpoint.worker.manifest").map_err(RpcError::failed)?;
        runtime
            .block_on(repository.put_manifest(&manifest))
            .map_err(RpcError::failed)?;
        failpoint::pass("checkpoint.worker.stored").map_err(RpcError::failed)?;
        let kept = repository.apply_retention(runtime, &manifest.machine, request.keep, unix_ms());
        let deleted = kept.map_or_else(
            |error| {
                tracing::warn!(%error, "cannot delete old checkpoints");
                0
            },
            |gone| gone.len() as u32,
        );
        let micros =
            |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Ok(CheckpointReport {
            stored_bytes: manifest.stored_bytes(),
            id: manifest.id,
            parent: None,
            pause_micros: micros(pause),
            total_micros: micros(begun.elapsed()),
            deleted,
            log_end: manifest.log_end,
            holds_output: log.held_from().is_some_and(|from| from <= manifest.log_end),
        })
    }

    fn activity(&self) -> Result<Activity, RpcError> {
        self.counter()?;
        Ok(Activity {
            populated_bytes: 0,
            volume_bytes: 0,
            written: Vec::new(),
        })
    }
}
