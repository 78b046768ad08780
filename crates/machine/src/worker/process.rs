//! What the process of every kind of machine has: its socket, its cgroup, its state, its
//! machine's output, and the locks of its moves.

use super::control::{LogChunk, ReadLog, Report, State, pack};
use super::requests::Service;
use super::viewers::Viewers;
use super::{Guard, SOCKET, Worker};
use crate::cgroup::{self, Group};
use crate::checkpoint::Manifest;
use crate::log::{Log, StreamKind};
use keel_net::rpc::everyone_is_member;
use keel_net::{Bytes, Fingerprint, Options as RpcOptions, PeerId, Server};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Bytes of output in one answer.
const LOG_CHUNK_BYTES: usize = 64 << 10;

/// How far the memory is of a machine that runs here before all of it has arrived (post-copy).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostCopyStatus {
    /// Pages are arriving.
    Receiving,
    /// The source is disconnected.
    SourceLost,
    /// All pages have arrived.
    Done,
}

/// The part of a worker that does not depend on the kind of its machine.
#[derive(Debug)]
pub struct Process {
    folder: PathBuf,
    /// The state that the agent follows.
    pub state: watch::Sender<State>,
    /// Why the machine waits for disk space, if it does.
    pub paused: watch::Sender<Option<String>>,
    /// The cgroup of this process, if it has its own.
    group: Option<Group>,
    log: Mutex<Option<Arc<Log>>>,
    freezing: Mutex<()>,
    lease: Guard,
    pub(super) viewers: Arc<Viewers>,
    /// Held during a step of the target's state machine.
    pub(super) stepping: Mutex<()>,
}

/// Runs a worker until its agent ends it. `folder` has its socket and output; `make` makes
/// the kind's part.
///
/// # Errors
/// If its folder or socket cannot be used.
pub fn run<W: Worker>(
    folder: &Path,
    make: impl FnOnce(Process) -> Result<W, String>,
) -> Result<(), String> {
    crate::failpoint::set_from_environment();
    cgroup::expose_worker_to_oom();
    // First, so that all further allocations are counted in the cgroup.
    let group = Group::load(folder).filter(|group| {
        let joined = group.join();
        if let Err(error) = &joined {
            tracing::warn!(error, "this worker has no cgroup of its own");
        }
        joined.is_ok()
    });
    let worker = make(Process {
        folder: folder.to_owned(),
        state: watch::Sender::new(State::Empty),
        paused: watch::Sender::new(None),
        group,
        log: Mutex::default(),
        freezing: Mutex::default(),
        lease: Guard::default(),
        viewers: Arc::default(),
        stepping: Mutex::default(),
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime: {error}"))?;
    runtime.block_on(serve(Arc::new(worker)))
}

async fn serve<W: Worker>(worker: Arc<W>) -> Result<(), String> {
    let folder = &worker.process().folder;
    let path = folder.join(SOCKET);
    let temporary = folder.join("socket.new");
    // A socket that exists accepts connections: it is renamed into place once it listens.
    let _ = std::fs::remove_file(&temporary);
    let listener = tokio::net::UnixListener::bind(&temporary)
        .and_then(|listener| std::fs::rename(&temporary, &path).map(|()| listener))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let handler = Arc::new(Service(worker));
    loop {
        let (stream, _) = listener
            .accept()
            .await
            .map_err(|error| format!("{}: {error}", path.display()))?;
        tokio::spawn(Server::serve_connection(
            stream,
            // Only this user can enter the socket's folder.
            PeerId::Pinned(Fingerprint([0; 32])),
            everyone_is_member(),
            handler.clone(),
            RpcOptions::default(),
        ));
    }
}

impl Process {
    /// Publishes how far the memory of the machine is, if some of it was to come.
    pub fn publish_post_copy(&self, now: PostCopyStatus) {
        self.state.send_if_modified(|state| {
            let State::Filling { epoch, .. } = *state else {
                return false;
            };
            let next = match now {
                PostCopyStatus::Done => State::Running { epoch },
                PostCopyStatus::Receiving | PostCopyStatus::SourceLost => State::Filling {
                    epoch,
                    source_lost: now == PostCopyStatus::SourceLost,
                },
            };
            let changes = *state != next;
            *state = next;
            changes
        });
    }

    /// The worker's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The cgroup of this process, if it has its own.
    pub fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// Keeps the machine from running without a lease, if it needs one.
    pub fn lease(&self) -> &Guard {
        &self.lease
    }

    /// Held while the machine is being frozen and sent, or thawed.
    pub fn freezing(&self) -> MutexGuard<'_, ()> {
        self.freezing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine's output; `None` before it has some here.
    pub fn log(&self) -> Option<Arc<Log>> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.clone()
    }

    /// Sets the machine's output.
    pub fn set_log(&self, log: Arc<Log>) {
        *self.log.lock().unwrap_or_else(PoisonError::into_inner) = Some(log);
    }

    /// Writes a notice of the system to the machine's error output, if it has one.
    pub fn notice(&self, text: &str) {
        if let Some(log) = self.log() {
            write_notice(&log, text);
        }
    }

    /// What a report says for every kind.
    pub(super) fn report<W: Worker>(&self, worker: &W) -> Report {
        let log = self.log();
        let (moving_away, post_copy, unsent_bytes, fill) = worker.moves(|moves| {
            (
                moves.moving_away,
                moves.post_copy,
                moves.unsent.load(Ordering::Relaxed),
                moves.fill.clone(),
            )
        });
        let mut report = Report {
            state: self.state.borrow().clone(),
            pid: std::process::id(),
            moving_away,
            post_copy,
            unsent_bytes,
            fill,
            program: None,
            threads: 0,
            memory_bytes: 0,
            memory_pages: Vec::new(),
            cpu_micros: cpu_micros(),
            log: log
                .as_ref()
                .map_or((0, 0), |log| (log.base(), log.shown_end())),
            held_bytes: log.map_or(0, |log| log.held_bytes()),
            volumes: Vec::new(),
            paused: self.paused.borrow().clone(),
            group: self.group.as_ref().map(Group::usage),
            parts: 0,
            start: None,
            guest_memory: None,
        };
        worker.describe(&mut report);
        report
    }

    /// Sends output from an offset on.
    pub(super) fn read_log(&self, read: &ReadLog, chunks: &mpsc::Sender<Bytes>) {
        let send = |offset: u64, bytes: Vec<u8>| {
            pack(&LogChunk { offset, bytes })
                .ok()
                .is_some_and(|bytes| chunks.blocking_send(bytes).is_ok())
        };
        let Some(log) = self.log() else {
            // The log does not exist yet. A missing receiver does not matter here or
            // below.
            let _ = send(read.from, Vec::new());
            return;
        };
        let mut at = read.from;
        loop {
            let found = match read.whole {
                true => log.read(at, LOG_CHUNK_BYTES),
                false => log.read_shown(at, LOG_CHUNK_BYTES),
            };
            let (offset, bytes) = match found {
                Ok(read) => read,
                Err(error) => {
                    tracing::warn!(%error, "cannot read output");
                    return;
                }
            };
            if bytes.is_empty() {
                let over = log.is_closed()
                    || matches!(
                        *self.state.borrow(),
                        State::Ended { .. } | State::Dropped { .. }
                    );
                if !read.follow || over || chunks.is_closed() {
                    let _ = send(at, Vec::new());
                    return;
                }
                log.wait(offset, Duration::from_millis(500));
                continue;
            }
            at = offset + bytes.len() as u64;
            if !send(offset, bytes) {
                return;
            }
        }
    }
}

/// Writes a notice of the system to a machine's error output.
pub fn write_notice(log: &Log, text: &str) {
    if let Err(error) = log.append(StreamKind::Error, format!("keel: {text}\n").as_bytes()) {
        tracing::warn!(%error, "cannot write a notice to the output");
    }
}

/// Says in a machine's error output from which checkpoint it was restored, and why not from newer
/// ones; `notice` goes before.
pub fn write_restored(
    log: &Log,
    notice: Option<&str>,
    passed_over: &[String],
    manifest: &Manifest,
) {
    if let Some(notice) = notice {
        write_notice(log, notice);
    }
    for why in passed_over {
        write_notice(log, &format!("passed over: {why}"));
    }
    write_notice(
        log,
        &format!(
            "restored from checkpoint {} of machine {}; later changes are discarded",
            manifest.id, manifest.machine
        ),
    );
}

/// CPU time of this process so far.
fn cpu_micros() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0) / 1000;
    seconds.saturating_mul(1_000_000).saturating_add(rest)
}

/// Publishes the state of a machine that was resumed, unless it has ended since: the
/// thread that watches for the end may have been faster.
pub fn publish_resumed(shown: &watch::Sender<State>, log: Option<&Log>, state: State) {
    // The log was closed for the move.
    if let Some(log) = log {
        log.open_again();
    }
    let goes_on = shown.send_if_modified(|now| {
        let goes_on = !matches!(now, State::Ended { .. });
        if goes_on {
            *now = state;
        }
        goes_on
    });
    if let Some(log) = log.filter(|_| !goes_on) {
        log.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Status;
    use keel_cluster::Epoch;

    #[test]
    fn ended_machines_are_not_published_as_running() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        let epoch = Epoch::default();
        let running = State::Running { epoch };
        // State during a move; the target was told.
        let shown = watch::Sender::new(running.clone());
        log.close();
        publish_resumed(&shown, Some(&log), running.clone());
        assert_eq!(*shown.borrow(), running);
        assert!(!log.is_closed());
        // The machine runs and ends before its state is published.
        let status = Status::Exited { code: 0 };
        let ended = State::Ended { epoch, status };
        shown.send_replace(ended.clone());
        log.close();
        publish_resumed(&shown, Some(&log), running);
        assert_eq!(*shown.borrow(), ended);
        assert!(log.is_closed());
    }
}
