//! One QEMU process: its start and its end, and what is known of it in between.
//!
//! The process never outlives its worker: the kernel kills it when the thread that started it
//! ends, which waits for it. What its guest is told is left to [`crate::vm`].

use crate::qmp::QmpEvent;
use rustix::fs::{Access, access};
use rustix::process::set_parent_process_death_signal;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::SyncSender;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The program; which version is the host's affair.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
/// What is kept of what QEMU says on its standard error, in bytes.
const SAID_BYTES_MAX: usize = 2 << 10;

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VmEnd {
    /// Its system shut down.
    ShutDown,
    /// A user stopped it.
    Stopped,
    /// Its system's kernel panicked, QEMU died, or the machine could not run on.
    Failed(String),
    /// It never ran here, and nobody asks how it ended.
    Discarded,
}

/// What is known of a process.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Why it will end: decided before it does.
    pub(crate) wanted: Option<VmEnd>,
    /// Why QEMU says that its guest shuts down.
    reason: Option<String>,
    pub(crate) end: Option<VmEnd>,
    /// Status of a migration, as last told.
    pub(crate) migration: String,
    /// The process is stopped.
    pub(crate) is_held: bool,
    /// How often it was.
    pub(crate) holds: u64,
    /// To be resumed once it is no longer held.
    pub(crate) resumes: bool,
    /// The last command was that the guest runs.
    pub(crate) is_to_run: bool,
    /// QEMU's name of the disk without room for which it has stopped the guest.
    pub(crate) full_disk: Option<String>,
    /// How the last jobs with its disk ended, by QEMU's names for them.
    pub(crate) job_ends: BTreeMap<String, Result<(), String>>,
    /// Since when the guest is stopped, by a command or by a migration.
    pub(crate) stopped: Option<Instant>,
}

/// What is known of a process, for all threads that ask and wait.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    known: Mutex<Known>,
    pub(crate) changed: Condvar,
}

impl Shared {
    pub(crate) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take(&self, event: &QmpEvent) {
        let text = |field: &str| event.data[field].as_str().unwrap_or_default().to_owned();
        let mut known = self.known();
        match event.name.as_str() {
            "MIGRATION" => known.migration = text("status"),
            "STOP" => known.stopped = Some(Instant::now()),
            "RESUME" => known.stopped = None,
            "BLOCK_JOB_COMPLETED" => {
                let error = event.data["error"].as_str();
                let end = error.map_or(Ok(()), |error| Err(error.to_owned()));
                known.job_ends.insert(text("device"), end);
            }
            "BLOCK_JOB_CANCELLED" => {
                let end = Err("it was cancelled".into());
                known.job_ends.insert(text("device"), end);
            }
            "SHUTDOWN" => known.reason = Some(text("reason")),
            "BLOCK_IO_ERROR" => {
                tracing::warn!(data = %event.data, "a disk failed");
                if event.data["action"] == "stop" {
                    known.full_disk = Some(text("node-name"));
                }
            }
            _ => return,
        }
        drop(known);
        self.changed.notify_all();
    }

    /// Waits until something is true; the last state if it is not in time.
    pub(crate) fn wait(
        &self,
        patience: Duration,
        is_there: impl Fn(&Known) -> bool,
    ) -> (MutexGuard<'_, Known>, bool) {
        let waiting = |known: &mut Known| !is_there(known);
        let waited = self
            .changed
            .wait_timeout_while(self.known(), patience, waiting);
        let (known, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let is_there = is_there(&known);
        (known, is_there)
    }
}

/// A QEMU process that was started.
pub(crate) struct Launched {
    pub(crate) pid: u32,
    pub(crate) process: OwnedFd,
}

/// The program's file; `None` if it is not installed.
pub(crate) fn program_file() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut programs = std::env::split_paths(&path).map(|folder| folder.join(QEMU));
    programs.find(|program| access(program, Access::EXEC_OK).is_ok())
}

/// Whether the program is installed.
pub(crate) fn is_installed() -> bool {
    program_file().is_some()
}

/// The version of the program that is installed; `None` if there is none.
pub(crate) fn installed_version() -> Option<String> {
    let said = Command::new(QEMU).arg("--version").output().ok()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    // "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"
    let mut words = said.split_whitespace();
    words.find(|word| *word == "version")?;
    words.next().map(str::to_owned)
}

/// Bytes of memory that a process occupies; 0 if it has ended. `process` is its folder in `/proc`.
pub(crate) fn resident_bytes(process: &Path) -> u64 {
    let statm = fs::read_to_string(process.join("statm")).unwrap_or_default();
    let pages = statm
        .split_whitespace()
        .nth(1)
        .and_then(|it| it.parse::<u64>().ok());
    let page_bytes = rustix::param::page_size() as u64;
    pages.unwrap_or(0).saturating_mul(page_bytes)
}

/// Whether no thread of a process runs: proc_pid_stat(5), field 3.
pub(crate) fn all_threads_stopped(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        // It has ended.
        return true;
    };
    tasks.flatten().all(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let state = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest.trim_start());
        // A thread that has ended has no state.
        state.is_empty() || state.starts_with(['T', 't', 'Z', 'X'])
    })
}

/// The kernel kills the process when the thread that starts it ends.
#[allow(unsafe_code)]
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let prepare = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have ended before.
        match getppid() == Some(parent) {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    };
    // SAFETY: `prepare` makes two system calls, allocates nothing and takes no lock, so it may run
    // between fork and exec of a process with threads (signal-safety(7)).
    unsafe { command.pre_exec(prepare) };
}

/// Starts QEMU and waits for its end, on a thread that lives as long.
pub(crate) fn supervise(
    mut command: Command,
    launched: &SyncSender<Result<Launched, String>>,
    shared: &Shared,
) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => " (on Debian: apt-get install qemu-system-x86)",
                _ => "",
            };
            let reason = format!("{QEMU} cannot be started: {error}{hint}");
            let _ = launched.send(Err(reason));
            return;
        }
    };
    // Ends of sockets that QEMU has inherited: it alone keeps them open.
    drop(command);
    let opened = Pid::from_raw(child.id().cast_signed())
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let process = match opened {
        Ok(process) => process,
        Err(error) => {
            // Nobody else knows of it yet.
            let _ = child.kill();
            let _ = child.wait();
            let _ = launched.send(Err(format!("no handle of the process of QEMU: {error}")));
            return;
        }
    };
    let pid = child.id();
    if launched.send(Ok(Launched { pid, process })).is_err() {
        let _ = child.kill();
    }
    let said = read_said(&mut child);
    let status = child.wait();
    let mut known = shared.known();
    let end = known
        .wanted
        .clone()
        .unwrap_or_else(|| end_of(known.reason.as_deref(), status, &said));
    known.end = Some(end);
    drop(known);
    shared.changed.notify_all();
}

/// What QEMU says on its standard error, until it ends; the last of it.
fn read_said(child: &mut Child) -> String {
    let mut said = String::new();
    let Some(stderr) = child.stderr.take() else {
        return said;
    };
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut lines)
            .take(SAID_BYTES_MAX as u64)
            .read_until(b'\n', &mut line);
        if !read.is_ok_and(|count| count > 0) {
            return said;
        }
        let text = String::from_utf8_lossy(&line);
        tracing::info!("QEMU says: {}", text.trim_end());
        if said.len() + text.len() > SAID_BYTES_MAX {
            said.clear();
        }
        said.push_str(&text);
    }
}

/// How a machine ended whose end nobody asked for.
fn end_of(reason: Option<&str>, status: io::Result<ExitStatus>, said: &str) -> VmEnd {
    match reason {
        Some("guest-shutdown") => return VmEnd::ShutDown,
        Some("guest-panic") => return VmEnd::Failed("the kernel of its system panicked".into()),
        _ => {}
    }
    let status = match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    let mut text = format!("QEMU ended ({status})");
    let said = said.trim();
    if !said.is_empty() {
        text.push_str(": ");
        text.push_str(said);
    }
    if said.contains("unsupported machine type") {
        text.push_str(" (QEMU 7.2 or newer is needed)");
    }
    VmEnd::Failed(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn an_end_names_its_cause() {
        let status = |code: i32| Ok(ExitStatus::from_raw(code));
        assert_eq!(
            end_of(Some("guest-shutdown"), status(0), ""),
            VmEnd::ShutDown
        );
        let failed = |reason, code, said| match end_of(reason, status(code), said) {
            VmEnd::Failed(reason) => reason,
            other => panic!("{other:?}"),
        };
        assert!(failed(Some("guest-panic"), 0, "").contains("panicked"));
        let killed = failed(None, 9, "");
        assert!(killed.contains("signal: 9"), "{killed}");
        let old = failed(None, 256, "qemu: unsupported machine type\n");
        assert!(old.contains("7.2 or newer"), "{old}");
    }
}
