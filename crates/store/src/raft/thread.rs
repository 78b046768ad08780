//! The thread on which all tasks of a voter run, at raised priority.
//!
//! Its runtime has no other thread. A multi-threaded one, even with a single worker, wakes itself
//! once more whenever two of its tasks become ready at once, several times a second.

use std::time::Duration;

use keel_net::coarse_timer;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Priority of the thread; lower is more urgent. Kept where it is permitted.
const NICE: i32 = -5;
/// How long the last task of a voter may take.
const LAST_TASK_WITHIN: Duration = Duration::from_secs(5);

/// The running thread. It ends once this is dropped, and all of its tasks with it.
pub(super) struct StoreThread {
    tasks: Handle,
    _end: oneshot::Sender<()>,
}

impl StoreThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system's, if it has no thread for it.
    pub(super) fn start() -> std::io::Result<Self> {
        let origin = Instant::now();
        let runtime = Builder::new_current_thread()
            .thread_name("keel-raft")
            .enable_all()
            .build()?;
        let tasks = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        std::thread::Builder::new()
            .name("keel-raft".into())
            .spawn(move || {
                coarse_timer::set_origin(origin);
                // Without the privilege it runs at normal priority.
                let _ = rustix::process::nice(NICE);
                // (An error, since nothing is ever sent.)
                let _ = runtime.block_on(ended);
                // A snapshot may be being written: nobody waits for it.
                runtime.shutdown_background();
            })?;
        Ok(Self { tasks, _end: end })
    }

    /// Runs `task` on the thread. `None` if it panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        self.tasks.spawn(task).await.ok()
    }

    /// Runs `task` on the thread and blocks the caller until it is done, for at most some seconds.
    pub(super) fn run_last(&self, task: impl Future<Output = ()> + Send + 'static) {
        let (done, wait) = std::sync::mpsc::channel();
        self.tasks.spawn(async move {
            task.await;
            done.send(()).ok();
        });
        wait.recv_timeout(LAST_TASK_WITHIN).ok();
    }
}
