//! A table of workers: starts them, finds those of an earlier agent, and sends them requests.

use super::folder::{self, Leftovers};
use super::image::{own_image, spawn};
use crate::state_dir::StateDir;
use keel_cluster::MachineName;
use keel_machine::cgroup::{Group, OutOfMemory, Slice};
use keel_machine::kind::{KIND_OPTION, KindName};
use keel_machine::spec::Record;
use keel_machine::worker::SOCKET;
use keel_machine::worker::control::{Report, State, kind, pack, unpack};
use keel_net::{Client, Options, RpcError, rpc::StreamReceiver};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Serialize, de::DeserializeOwned};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::net::UnixStream;

/// Prefix of folders whose machine is gone; no machine name has it.
const GRAVE: &str = ".gone-";
/// How long a new worker may take until it answers.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long a worker may take for a request that takes next to no time.
pub(crate) const PROMPT: Duration = Duration::from_secs(10);
/// How long a worker may take to end by itself.
const FORGET_PATIENCE: Duration = Duration::from_secs(2);
/// How long the process of a worker with a lost connection may take to end.
const END_PATIENCE: Duration = Duration::from_millis(500);
/// How long a worker with a lost connection may take to answer a new connection.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long compiling a module may take.
pub(crate) const COMPILE_PATIENCE: Duration = Duration::from_secs(1800);

/// The error of a request that a worker of an older version does not support.
pub(crate) const OLDER: &str = "its worker is of the version before and cannot do that; \
     it can once the machine was moved or started again";

/// Whether an error means that the request is not supported.
pub(crate) fn is_older(reason: &str) -> bool {
    // Text of the error of workers and agents.
    reason.contains("no request of kind")
}

/// What a worker says that did not do what it was asked for, for users.
pub(crate) fn explained(reason: String) -> String {
    match is_older(&reason) {
        true => OLDER.to_owned(),
        false => reason,
    }
}

/// The agent's handle to a worker process that answers: its client and its process.
#[derive(Debug, Clone)]
pub(crate) struct WorkerHandle {
    client: Client,
    /// Distinguishes it from earlier and later workers of the same machine.
    id: u64,
    /// Handle of the process, which the kernel answers for even if the socket does not.
    process: Arc<OwnedFd>,
    /// Process id, for reading counters only: it may be reused.
    pid: u32,
    /// Set once the process is certainly gone, while its entry in the table remains until the end
    /// of its machine is recorded.
    lost: Arc<AtomicBool>,
}

impl WorkerHandle {
    /// Connects to the worker whose folder this is.
    pub(crate) async fn connect(folder: &Path) -> Result<Self, String> {
        let path = folder.join(SOCKET);
        let stream = UnixStream::connect(&path)
            .await
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let place = path.display().to_string();
        let (process, pid) = peer_of(&stream, &place)?;
        let client = Client::over(stream, "worker", &place, Options::default())
            .await
            .map_err(|error| error.to_string())?;
        Ok(WorkerHandle {
            client,
            id: rand::random(),
            process: Arc::new(process),
            pid,
            lost: Arc::default(),
        })
    }

    /// The process that has a socket open, if any.
    async fn process_of(socket: &Path) -> Option<Arc<OwnedFd>> {
        let stream = UnixStream::connect(socket).await.ok()?;
        let place = socket.display().to_string();
        peer_of(&stream, &place)
            .ok()
            .map(|(process, _)| Arc::new(process))
    }

    pub(crate) async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: u16,
        question: &Q,
        patience: Duration,
    ) -> Result<A, RpcError> {
        match self.client.call(kind, pack(question)?, patience).await {
            Ok(answer) => unpack(&answer),
            Err(RpcError::Unknown { .. }) if self.gone_within(END_PATIENCE).await => {
                Err(RpcError::Unknown {
                    peer: "the machine's process here".into(),
                    reason: "it has ended meanwhile (`keel describe` says how)".into(),
                })
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn stream<Q: Serialize>(
        &self,
        kind: u16,
        question: &Q,
    ) -> Result<StreamReceiver, RpcError> {
        self.client.stream(kind, pack(question)?).await
    }

    pub(crate) async fn report(&self) -> Result<Report, RpcError> {
        self.ask(kind::REPORT, &(), PROMPT).await
    }

    pub(crate) async fn state(&self) -> Result<State, RpcError> {
        Ok(self.report().await?.state)
    }

    /// Applies the limits of its machine's record. If they no longer fit because the machine has
    /// grown, the worker keeps its current ones.
    pub(crate) async fn apply_limits(&self, record: &Record) {
        let applied: Result<(), RpcError> = self.ask(kind::SET, &record.spec, PROMPT).await;
        if let Err(error) = applied {
            tracing::warn!(machine = %record.name, %error, "its limits are not those of its record");
        }
    }

    /// Whether these are the same process.
    pub(crate) fn is(&self, other: &WorkerHandle) -> bool {
        self.id == other.id
    }

    /// Whether it is certain that its process is gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Marks the process as gone, which ends all waits for its answers.
    pub(crate) fn mark_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Identifies this connection to a process.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Ends the process; returns when it is gone.
    pub(crate) async fn forget(&self) {
        // It may have ended already, or be unable to answer.
        let _: Result<(), _> = self.ask(kind::FORGET, &(), FORGET_PATIENCE).await;
        if !self.gone_within(FORGET_PATIENCE).await {
            self.kill().await;
        }
    }

    /// Kills the process; returns when it is gone. From then on no process of its machine runs
    /// here.
    pub(crate) async fn kill(&self) {
        // An error means that it is gone already.
        let _ = pidfd_send_signal(&*self.process, Signal::KILL);
        while !self.gone_within(PROMPT).await {
            tracing::error!("a worker cannot be killed: is its disk stuck?");
        }
    }

    /// Whether the process ends within this time.
    pub(crate) async fn gone_within(&self, patience: Duration) -> bool {
        gone_within(&self.process, patience).await
    }
}

/// The process at the other end of a worker's socket.
fn peer_of(stream: &UnixStream, place: &str) -> Result<(OwnedFd, u32), String> {
    let peer = stream.peer_cred().ok();
    peer.and_then(|peer| Pid::from_raw(peer.pid()?))
        .ok_or_else(|| format!("{place}: the peer process is not known"))
        .and_then(|pid| {
            let process = pidfd_open(pid, PidfdFlags::empty())
                .map_err(|error| format!("{place}: {error}"))?;
            Ok((process, pid.as_raw_nonzero().get().unsigned_abs()))
        })
}

async fn gone_within(process: &Arc<OwnedFd>, patience: Duration) -> bool {
    let process = process.clone();
    let waited = tokio::task::spawn_blocking(move || {
        // The handle of an ended process is readable.
        let mut ended = [PollFd::new(&*process, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        };
        poll(&mut ended, Some(&patience))
    });
    matches!(waited.await, Ok(Ok(1..)))
}

/// All workers of this node.
#[derive(Debug)]
pub(crate) struct Workers {
    table: Mutex<HashMap<MachineName, WorkerHandle>>,
    /// Parent of their cgroups.
    slice: Arc<Slice>,
}

impl Workers {
    pub(crate) fn new(slice: Arc<Slice>) -> Self {
        Workers {
            table: Mutex::default(),
            slice,
        }
    }

    pub(crate) fn slice(&self) -> &Slice {
        &self.slice
    }

    fn table(&self) -> MutexGuard<'_, HashMap<MachineName, WorkerHandle>> {
        self.table.lock().unwrap_or_else(|error| error.into_inner())
    }

    pub(crate) fn get(&self, machine: &MachineName) -> Option<WorkerHandle> {
        self.table().get(machine).cloned()
    }

    pub(crate) fn names(&self) -> Vec<MachineName> {
        self.table().keys().cloned().collect()
    }

    /// The process ids of all machines.
    pub(crate) fn processes(&self) -> Vec<(MachineName, u32)> {
        let table = self.table();
        let processes = table.iter();
        processes
            .map(|(machine, worker)| (machine.clone(), worker.pid))
            .collect()
    }

    fn remove(&self, machine: &MachineName) -> Option<WorkerHandle> {
        self.table().remove(machine)
    }

    /// Removes exactly this worker: a machine that left and returned has another one. False if it
    /// was not in the table any more.
    pub(crate) fn remove_exactly(&self, machine: &MachineName, worker: &WorkerHandle) -> bool {
        let mut table = self.table();
        let same = table.get(machine).is_some_and(|known| known.is(worker));
        if same {
            table.remove(machine);
        }
        same
    }

    /// Finds the workers that an earlier agent started.
    pub(crate) async fn adopt(&self, dir: &StateDir) {
        for path in folder::folders_in(dir.workers()).await {
            let name = path.file_name().unwrap_or_default();
            if name.to_str().is_some_and(|name| name.starts_with(GRAVE)) {
                // An earlier agent was removing it.
                if let Ok(worker) = WorkerHandle::connect(&path).await {
                    worker.forget().await;
                }
                folder::remove_remains(path).await;
                continue;
            }
            let Some(machine) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            match WorkerHandle::connect(&path).await {
                Ok(worker) => {
                    tracing::info!(%machine, "found its worker running");
                    self.table().insert(machine, worker);
                }
                Err(error) => match self.silent(&path).await {
                    Some(worker) => {
                        tracing::info!(%machine, "found its worker running, late");
                        self.table().insert(machine, worker);
                    }
                    None => tracing::debug!(%machine, error, "no worker runs in its folder"),
                },
            }
        }
        let (slice, workers) = (self.slice.clone(), dir.workers());
        // A panic in the task removes nothing; the next agent does.
        let _ = tokio::task::spawn_blocking(move || slice.sweep(&workers)).await;
    }

    /// A process that has a worker's socket open but does not answer may be stopped: it gets some
    /// time, and is then killed. `None` once no process runs there.
    async fn silent(&self, folder: &Path) -> Option<WorkerHandle> {
        let deadline = tokio::time::Instant::now() + RECONNECT_PATIENCE;
        let process = WorkerHandle::process_of(&folder.join(SOCKET)).await?;
        while tokio::time::Instant::now() < deadline {
            let connected = tokio::time::timeout_at(deadline, WorkerHandle::connect(folder)).await;
            if let Ok(Ok(worker)) = connected {
                return Some(worker);
            }
            if gone_within(&process, Duration::from_millis(100)).await {
                return None;
            }
        }
        tracing::error!(folder = %folder.display(), "killing a worker that does not answer");
        // An error means that it is gone already.
        let _ = pidfd_send_signal(&*process, Signal::KILL);
        while !gone_within(&process, PROMPT).await {
            tracing::error!("a worker cannot be killed: is its disk stuck?");
        }
        None
    }

    /// Reconnects to a worker whose connection was lost, which does not imply the end of its
    /// process. If it does not answer it is killed, so that it is certainly lost.
    pub(crate) async fn reconnect(
        &self,
        dir: &StateDir,
        machine: &MachineName,
        worker: &WorkerHandle,
    ) -> bool {
        let folder = dir.worker(machine);
        let deadline = tokio::time::Instant::now() + RECONNECT_PATIENCE;
        while !worker.gone_within(Duration::from_millis(20)).await
            && tokio::time::Instant::now() < deadline
        {
            let connected = tokio::time::timeout_at(deadline, WorkerHandle::connect(&folder)).await;
            if let Ok(Ok(anew)) = connected {
                let anew = WorkerHandle {
                    id: worker.id,
                    lost: worker.lost.clone(),
                    ..anew
                };
                let mut table = self.table();
                if table.get(machine).is_some_and(|known| known.is(worker)) {
                    table.insert(machine.clone(), anew);
                }
                return true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        worker.kill().await;
        false
    }

    /// Starts a worker for a machine that has none here.
    pub(crate) async fn start(
        self: &Arc<Self>,
        dir: &StateDir,
        machine: &MachineName,
        kind: &KindName,
        leftovers: Leftovers,
    ) -> Result<WorkerHandle, String> {
        if self.get(machine).is_some() {
            return Err(format!(
                "machine {machine:?} has a worker on this node already"
            ));
        }
        let folder = dir.worker(machine);
        self.drop_group(dir, machine).await;
        let log = {
            let (slice, machine, folder) = (self.slice.clone(), machine.clone(), folder.clone());
            tokio::task::spawn_blocking(move || {
                folder::prepare(&slice, &machine, &folder, leftovers)
            })
            .await
            .map_err(|error| format!("preparing the machine's folder failed: {error}"))??
        };
        // The installed file may be of another version by now, or missing.
        let mut command = tokio::process::Command::new(own_image());
        command
            .arg0("keel")
            .arg("worker")
            .arg(KIND_OPTION)
            .arg(kind.as_str())
            .arg("--folder")
            .arg(&folder)
            .arg("--cache")
            .arg(dir.cache())
            .arg("--images")
            .arg(dir.images())
            .arg("--programs")
            .arg(dir.programs())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // It outlives the agent, and Ctrl-C at the agent's terminal.
            .process_group(0);
        let injections = super::injections_for_new_workers::for_new_worker();
        command.env(keel_machine::failpoint::ENVIRONMENT, &injections);
        let mut child = spawn(command).await.map_err(|error| {
            let image = own_image().display();
            format!(
                "its worker process cannot be started from this agent's image ({image}): {error}"
            )
        })?;
        let deadline = tokio::time::Instant::now() + START_PATIENCE;
        let worker = loop {
            match WorkerHandle::connect(&folder).await {
                Ok(worker) => break worker,
                Err(error) if tokio::time::Instant::now() > deadline => {
                    // A process that is not in the table must not run; an error means that it has
                    // ended.
                    let _ = child.kill().await;
                    return Err(error);
                }
                Err(_) => {}
            }
            if let Ok(Some(status)) = child.try_wait() {
                let log = tokio::fs::read_to_string(folder.join(folder::LOG)).await;
                let log = log.unwrap_or_default();
                return Err(format!(
                    "the worker ended at once ({status}): {}",
                    log.trim()
                ));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        tokio::spawn(async move {
            // Reaped here while this agent lives, afterwards by init.
            let _ = child.wait().await;
        });
        self.table().insert(machine.clone(), worker.clone());
        refresh_failpoints(&worker, &injections).await;
        Ok(worker)
    }

    /// Whether the kernel killed a machine's process for lack of memory; to be called before
    /// [`Self::drop_group`].
    pub(crate) fn out_of_memory(
        &self,
        dir: &StateDir,
        machine: &MachineName,
    ) -> Option<OutOfMemory> {
        Group::load(&dir.worker(machine))?.out_of_memory()
    }

    /// Removes the cgroup of a worker that has ended.
    pub(crate) async fn drop_group(&self, dir: &StateDir, machine: &MachineName) {
        let folder = dir.worker(machine);
        // A panic in the task removes nothing; the next agent does.
        let _ = tokio::task::spawn_blocking(move || Group::remove_saved(&folder)).await;
    }

    /// Ends a machine's worker; its output stays in its folder.
    pub(crate) async fn end(&self, dir: &StateDir, machine: &MachineName) {
        if let Some(worker) = self.remove(machine) {
            worker.forget().await;
        }
        self.drop_group(dir, machine).await;
    }

    /// Ends a machine's worker and removes its folder; returns when no process of it runs here any
    /// more.
    pub(crate) async fn forget(&self, dir: &StateDir, machine: &MachineName) {
        let worker = self.get(machine);
        self.forget_exactly(dir, machine, worker.as_ref()).await;
    }

    /// As [`Self::forget`], if the machine still has this worker, or none: another life of that
    /// name is not affected.
    pub(crate) async fn forget_exactly(
        &self,
        dir: &StateDir,
        machine: &MachineName,
        worker: Option<&WorkerHandle>,
    ) {
        if let Some(grave) = self.bury(dir, machine, worker) {
            if let Some(worker) = worker {
                worker.forget().await;
            }
            folder::remove_remains(grave).await;
        }
    }

    /// As [`Self::forget_exactly`] in the background, for a machine that is frozen for good.
    pub(crate) fn forget_later(
        &self,
        dir: &StateDir,
        machine: &MachineName,
        worker: &WorkerHandle,
    ) {
        let Some(grave) = self.bury(dir, machine, Some(worker)) else {
            return;
        };
        let worker = worker.clone();
        tokio::spawn(async move {
            worker.forget().await;
            folder::remove_remains(grave).await;
        });
    }

    /// Removes a worker from the table and renames its folder first, because a new worker of that
    /// name may start at once. `None` if the machine has another worker than the given one.
    fn bury(
        &self,
        dir: &StateDir,
        machine: &MachineName,
        worker: Option<&WorkerHandle>,
    ) -> Option<PathBuf> {
        // Held during the renaming: a starting worker waits for it.
        let mut table = self.table();
        match (table.get(machine), worker) {
            (Some(known), Some(meant)) if known.is(meant) => {}
            (None, None) => {}
            // The caller that removed it from the table handles its folder.
            _ => return None,
        }
        let folder = dir.worker(machine);
        let grave = folder.with_file_name(format!("{GRAVE}{:016x}", rand::random::<u64>()));
        if let Err(error) = std::fs::rename(&folder, &grave)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, folder = %folder.display(), "cannot remove a machine's folder");
        }
        table.remove(machine);
        Some(grave)
    }
}

/// Clears in a new worker, which is in the table now, the failpoints that were cleared during its
/// start.
async fn refresh_failpoints(worker: &WorkerHandle, given: &str) {
    for (name, _) in given.split(';').filter_map(|part| part.split_once('=')) {
        if !super::injections_for_new_workers::injections().contains_key(name) {
            let question = (name.to_owned(), None::<String>);
            let told: Result<(), _> = worker.ask(kind::FAILPOINT, &question, PROMPT).await;
            if let Err(error) = told {
                tracing::debug!(%error, "cannot update the failpoints of a worker");
            }
        }
    }
}
