//! The small parent process of an agent: restarts it when it dies, and forwards the signals to
//! stop. Machines are not affected, because they run in workers of their own. A lock on the node's
//! folder keeps it the only one.

use crate::processes::own_image;
use crate::state_dir::StateDir;
use std::fs::{File, TryLockError};
use std::io::Write as _;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// An agent that lived this long is restarted at once.
const GOOD_LIFE: Duration = Duration::from_secs(1);
/// The longest pause before a restart: a machine that is frozen for a move waits for the agent,
/// and the node counts as dead when its lease ends.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long a supervisor that was told to stop may take to end.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(6);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Exit code of an agent that is to be started again at once: EX_TEMPFAIL of sysexits.h.
const RESTART_CODE: u8 = 75;
/// Exit code of an agent that another start would not help: EX_CONFIG of sysexits.h.
pub const REFUSED_CODE: u8 = 78;

/// Why an agent ended in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentEnd {
    /// It was told to stop.
    Stopped,
    /// It was asked to restart.
    Restart,
}

impl AgentEnd {
    /// The exit code that tells [`supervise`].
    pub fn exit_code(self) -> u8 {
        match self {
            AgentEnd::Stopped => 0,
            AgentEnd::Restart => RESTART_CODE,
        }
    }
}

/// How the end of an agent is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// It ended on purpose.
    No,
    /// It cannot run, and has said why.
    Never,
    /// It did not.
    After(Duration),
}

/// Whether, and when, to restart an agent that lived for `life`.
fn decide(status: ExitStatus, life: Duration, failures: u32) -> Restart {
    let is_wanted = status.code() == Some(RESTART_CODE.into());
    if status.success() {
        Restart::No
    } else if status.code() == Some(REFUSED_CODE.into()) {
        Restart::Never
    } else if is_wanted || life >= GOOD_LIFE {
        Restart::After(Duration::ZERO)
    } else {
        // A first early death may be an accident; further ones increase the pause.
        Restart::After((Duration::from_millis(20) * 2u32.pow(failures.min(8))).min(PAUSE_MAX))
    }
}

/// Passes the parent's process id to its agent, which may be of a newer version.
pub const PARENT_ENVIRONMENT: &str = "KEEL_AGENT_PARENT";

/// Why there is no agent, or why it cannot be supervised.
#[derive(Debug, thiserror::Error)]
pub enum ParentError {
    /// Neither the installed file nor this process's own can be started.
    #[error("the agent cannot be started from {program}: {error}; install keel there again")]
    Start {
        /// The installed file.
        program: String,
        /// The error of the kernel.
        error: std::io::Error,
    },
    /// The agent cannot run as it is.
    #[error("the node is not started, for the reason above")]
    Refused,
    /// No agent ran for long.
    #[error("the node is not started: its agent ended {0} times, for the reasons above")]
    NeverRan(u32),
    /// Another process supervises the agent of the folder.
    #[error(
        "process {pid} runs the node in {folder} already; end it with `keel down` or `kill {pid}`"
    )]
    Runs {
        /// The node's folder.
        folder: String,
        /// The other process.
        pid: String,
    },
    /// Signals cannot be caught, or the agent's end cannot be seen.
    #[error("the agent cannot be watched: {0}")]
    Watch(#[from] std::io::Error),
}

/// Runs the agent of the node in `folder` until it ends on purpose, or this process gets a signal
/// to stop. `agent` builds the command from a path: from `installed` first, which may be a newer
/// version, and from this process's own image if that fails. With `start_within` it gives up when
/// all agents of that time ended early; without, it tries for ever.
///
/// # Errors
/// If the agent cannot be started or run, if the folder has another supervisor, or if signals cannot
/// be caught.
pub async fn supervise(
    folder: &Path,
    installed: &Path,
    start_within: Option<Duration>,
    mut agent: impl FnMut(&Path) -> Command,
) -> Result<(), ParentError> {
    let _lock = lock(folder).await?;
    let mut give_up_at = start_within.map(|within| Instant::now() + within);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut failures = 0;
    // The agent inherits it.
    keel_machine::cgroup::protect_agent_from_oom();
    keel_machine::cgroup::raise_priority();
    loop {
        let begun = Instant::now();
        let mut child = start(installed, &mut agent)?;
        let status = tokio::select! {
            status = child.wait() => status?,
            _ = terminate.recv() => return Ok(stop(child).await?),
            _ = interrupt.recv() => return Ok(stop(child).await?),
        };
        if begun.elapsed() >= GOOD_LIFE {
            failures = 0;
            give_up_at = None;
        }
        match decide(status, begun.elapsed(), failures) {
            Restart::No => return Ok(()),
            Restart::Never => return Err(ParentError::Refused),
            Restart::After(pause) => {
                tracing::warn!(%status, "the agent ended, restarting it");
                failures += 1;
                if give_up_at.is_some_and(|at| Instant::now() + pause > at) {
                    return Err(ParentError::NeverRan(failures));
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = terminate.recv() => return Ok(()),
                    _ = interrupt.recv() => return Ok(()),
                }
            }
        }
    }
}

/// Locks the folder for this supervisor; waits for one that is about to end. `None` where files cannot
/// be locked, or not even opened: the agent says what is wrong with the folder.
///
/// # Errors
/// [`ParentError::Runs`].
async fn lock(folder: &Path) -> Result<Option<File>, ParentError> {
    let path = StateDir::supervisor_lock_in(folder);
    let unlocked = |error: std::io::Error| {
        tracing::warn!(file = %path.display(), %error, "cannot lock the node's folder");
        Ok(None)
    };
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    let mut file = match options.open(&path) {
        Ok(file) => file,
        Err(error) => return unlocked(error),
    };
    let deadline = Instant::now() + PREDECESSOR_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(ParentError::Runs {
                    folder: folder.display().to_string(),
                    pid: std::fs::read_to_string(&path).unwrap_or_default(),
                });
            }
            Err(TryLockError::Error(error)) => return unlocked(error),
        }
    }
    let written = file
        .set_len(0)
        .and_then(|()| write!(file, "{}", std::process::id()));
    if let Err(error) = written {
        // A full disk. It is locked all the same.
        tracing::warn!(file = %path.display(), %error, "the lock does not say whose it is");
    }
    Ok(Some(file))
}

fn start(installed: &Path, agent: &mut impl FnMut(&Path) -> Command) -> Result<Child, ParentError> {
    let mut spawn = |program: &Path| {
        agent(program)
            .env(PARENT_ENVIRONMENT, std::process::id().to_string())
            .kill_on_drop(true)
            .spawn()
    };
    spawn(installed).or_else(|error| {
        let program = installed.display().to_string();
        tracing::warn!(program, %error, "the installed agent cannot be started, using this process's image");
        spawn(own_image()).map_err(|_| ParentError::Start { program, error })
    })
}

async fn stop(mut child: Child) -> std::io::Result<()> {
    if let Some(pid) = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(rustix::process::Pid::from_raw)
    {
        // It may have ended at this moment.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    child.wait().await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[tokio::test]
    async fn a_folder_that_cannot_be_locked_keeps_no_agent_from_starting() {
        let folder = tempfile::tempdir().unwrap();
        assert!(lock(folder.path()).await.unwrap().is_some());
        let path = StateDir::supervisor_lock_in(folder.path());
        let said = std::fs::read_to_string(&path).unwrap();
        assert_eq!(said, std::process::id().to_string());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(lock(folder.path()).await.unwrap().is_none());
        std::fs::remove_dir(&path).unwrap();
        // All writes to it fail as on a full disk.
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        assert!(lock(folder.path()).await.unwrap().is_some());
    }

    #[test]
    fn an_agent_that_is_asked_to_restart_is_started_at_once() {
        let code = i32::from(AgentEnd::Restart.exit_code());
        let ended = ExitStatus::from_raw(code << 8);
        let at_once = Restart::After(Duration::ZERO);
        assert_eq!(decide(ended, Duration::ZERO, 7), at_once);
    }

    #[test]
    fn only_a_purposeful_end_is_final() {
        let killed = ExitStatus::from_raw(9);
        assert_eq!(decide(ExitStatus::from_raw(0), GOOD_LIFE, 0), Restart::No);
        let refused = ExitStatus::from_raw(i32::from(REFUSED_CODE) << 8);
        assert_eq!(decide(refused, GOOD_LIFE, 0), Restart::Never);
        assert_eq!(decide(killed, GOOD_LIFE, 7), Restart::After(Duration::ZERO));
        let Restart::After(first) = decide(killed, Duration::ZERO, 0) else {
            panic!("not restarted");
        };
        assert!(first <= Duration::from_millis(20));
        assert_eq!(
            decide(killed, Duration::ZERO, 60),
            Restart::After(PAUSE_MAX)
        );
    }
}
