//! A machine's QEMU and its guest: started, stopped, continued, shut down, killed.
//!
//! ```text
//!   launch ──▶ paused ──resume──▶ running ──shutdown, quit, kill──▶ ended
//!                 ▲                  │
//!                 └──────pause───────┘          held: the process itself is stopped (SIGSTOP)
//! ```

use crate::arguments::{AGENT, AGENT_FD, CONSOLE_FD, INTERFACES_FD, Machine, QMP_FD};
use crate::console::Sockets;
use crate::display::Display;
use crate::guest_agent::GuestAgent;
use crate::migration_status::Info;
use crate::network::Taps;
use crate::process::{
    Known, Launched, QEMU, Shared, VmEnd, all_threads_stopped, die_with_parent, resident_bytes,
    supervise,
};
use crate::processor::Accelerator;
use crate::qmp::{PATIENCE, Qmp, QmpError};
use command_fds::{CommandFdExt, FdMapping};
use keel_machine::worker::MoveError;
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::json;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a QEMU on a busy host may take to start.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest may take to heed its power button until its agent is asked too.
const BUTTON_PATIENCE: Duration = Duration::from_secs(5);
/// How long a QEMU that was told to quit may take.
const QUIT_PATIENCE: Duration = Duration::from_secs(5);
/// How often QEMU is asked whether a migration that has ended still keeps its guest stopped.
const SETTLE_POLL: Duration = Duration::from_millis(2);

/// The answer to `query-status`.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct RunState {
    pub(crate) status: String,
}

/// One of the answer to `query-cpus-fast`.
#[derive(Debug, serde::Deserialize)]
struct ProcessorThread {
    #[serde(rename = "thread-id")]
    thread: u32,
}

/// One of the answer to `query-chardev`.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CharacterDevice {
    label: String,
    /// Whether the guest has opened it.
    frontend_open: bool,
}

/// A machine's QEMU. Methods block.
pub(crate) struct Vm {
    pid: u32,
    process: OwnedFd,
    folder: PathBuf,
    shared: Arc<Shared>,
    taps: Taps,
    accelerator: Accelerator,
    /// The last attempt to move the machine; locked while one gives commands.
    attempt: Mutex<u64>,
    /// Locked while the guest is stopped or continued, so that each sees what the other left.
    run: Mutex<()>,
    /// If the guest has a port for one.
    agent: Option<GuestAgent>,
    /// If the guest has one.
    display: Option<Display>,
    qmp: OnceLock<Qmp>,
}

/// The host's ends of what QEMU inherits.
pub(crate) struct Launch {
    pub(crate) vm: Arc<Vm>,
    pub(crate) console: Sockets,
}

impl Vm {
    /// Starts QEMU with a guest that does not run yet. `folder` is its current directory.
    ///
    /// # Errors
    /// What is missing, or what QEMU says.
    pub(crate) fn launch(folder: &Path, machine: &Machine<'_>) -> Result<Launch, String> {
        let failed = |error: io::Error| format!("{QEMU} cannot be started: {error}");
        let (qmp, qmp_of_qemu) = UnixStream::pair().map_err(failed)?;
        let (console, console_of_qemu) = UnixStream::pair().map_err(failed)?;
        let console = Sockets {
            ours: console,
            of_qemu: console_of_qemu.try_clone().map_err(failed)?,
        };
        let agents = match machine.spec.guest_agent {
            true => Some(UnixStream::pair().map_err(failed)?),
            false => None,
        };
        let (agent, agent_of_qemu) = agents.unzip();
        let agent = agent.map(GuestAgent::new).transpose().map_err(failed)?;
        let (taps, tap_files) = Taps::create(&machine.spec.interfaces)?;
        let mut command = Command::new(QEMU);
        command
            .args(machine.arguments())
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let sockets = [
            (qmp_of_qemu.into(), QMP_FD),
            (console_of_qemu.into(), CONSOLE_FD),
        ];
        let agent_of_qemu = agent_of_qemu.map(|socket| (socket.into(), AGENT_FD));
        let inherited = sockets
            .into_iter()
            .chain(agent_of_qemu)
            .chain(tap_files.into_iter().zip(INTERFACES_FD..));
        let mappings = inherited.map(|(parent_fd, child_fd)| FdMapping {
            parent_fd,
            child_fd,
        });
        command
            .fd_mappings(mappings.collect())
            .map_err(|error| failed(io::Error::other(error)))?;
        die_with_parent(&mut command);
        let shared = Arc::<Shared>::default();
        let (send, launched) = sync_channel(1);
        let waiting = shared.clone();
        std::thread::Builder::new()
            .name("qemu".into())
            .spawn(move || supervise(command, &send, &waiting))
            .map_err(failed)?;
        let launched = launched
            .recv()
            .unwrap_or_else(|_| Err("its thread ended".into()));
        let Launched { pid, process } = launched?;
        let vm = Arc::new(Vm {
            pid,
            process,
            folder: folder.to_owned(),
            shared: shared.clone(),
            taps,
            accelerator: machine.accelerator,
            attempt: Mutex::default(),
            run: Mutex::default(),
            agent,
            display: machine.spec.display.then(Display::default),
            qmp: OnceLock::new(),
        });
        let connected = Qmp::connect(qmp, START_PATIENCE, move |event| shared.take(&event));
        match connected {
            Ok(qmp) => {
                // It is empty until here.
                let _ = vm.qmp.set(qmp);
            }
            Err(error) => {
                let reason = vm.why_it_ended(&error);
                vm.kill(VmEnd::Discarded);
                return Err(reason);
            }
        }
        Ok(Launch { vm, console })
    }

    /// Why QEMU did not start: what it said itself, if it ended.
    fn why_it_ended(&self, error: &QmpError) -> String {
        match self.end_within(QUIT_PATIENCE) {
            Some(VmEnd::Failed(reason)) => reason,
            _ => error.to_string(),
        }
    }

    /// How it ended, if it does so in time.
    pub(crate) fn end_within(&self, patience: Duration) -> Option<VmEnd> {
        let (known, _) = self.shared.wait(patience, |known| known.end.is_some());
        known.end.clone()
    }

    /// The directory in which QEMU finds sockets by their names.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn qmp(&self) -> Result<&Qmp, QmpError> {
        let qmp = self.qmp.get();
        qmp.ok_or_else(|| QmpError::Lost("QEMU was not started".into()))
    }

    /// The threads of the process that execute the guest, one for each of its processors (or one
    /// for all), by their numbers on this host.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn processor_threads(&self) -> Result<Vec<u32>, QmpError> {
        let processors: Vec<ProcessorThread> = self.qmp()?.query("query-cpus-fast")?;
        let threads: BTreeSet<u32> = processors.into_iter().map(|it| it.thread).collect();
        Ok(threads.into_iter().collect())
    }

    /// The agent in the guest; `None` if the guest has no port for one.
    pub(crate) fn agent(&self) -> Option<&GuestAgent> {
        self.agent.as_ref()
    }

    /// Whether a program in the guest has the port of its agent open; true if it has no port.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn is_agent_connected(&self) -> Result<bool, QmpError> {
        let ports: Vec<CharacterDevice> = self.qmp()?.query("query-chardev")?;
        let mut ports = ports.iter().filter(|port| port.label == AGENT);
        Ok(ports.all(|port| port.frontend_open))
    }

    /// A new viewer's connection to the guest's display.
    ///
    /// # Errors
    /// If it has none, or what QEMU says.
    pub(crate) fn connect_viewer(&self) -> Result<UnixStream, String> {
        let display = self.display.as_ref();
        let display = display.ok_or("it has no display (run it again, with display = true)")?;
        let connected = self.qmp().and_then(|qmp| display.connect(qmp));
        connected.map_err(|error| error.to_string())
    }

    /// What executes the guest.
    pub(crate) fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// Connects the guest to its networks. To be done before it runs here.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn connect(&self) -> Result<(), String> {
        self.taps.go_up()
    }

    /// Tells the networks that the guest is here now, several times: bridges and switches learn
    /// its addresses from that.
    pub(crate) fn announce(&self) {
        let times_ms = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 50 });
        let told = self
            .qmp()
            .and_then(|qmp| qmp.execute("announce-self", times_ms));
        if let Err(error) = told {
            tracing::warn!(%error, "the machine's new place is not announced to its networks");
        }
    }

    /// Stops the guest; no effect if it is stopped.
    pub(crate) fn pause(&self) -> Result<(), QmpError> {
        let _run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut known = self.shared.known();
            known.resumes = false;
            known.is_to_run = false;
        }
        self.qmp()?.execute("stop", json!({}))
    }

    /// Lets the guest run, once the process is not held.
    pub(crate) fn resume(&self) -> Result<(), QmpError> {
        let _run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        self.resume_in_turn()
    }

    /// Lets the guest run that was to run once the process is not held, unless it was stopped
    /// since.
    fn resume_released(&self) {
        let _run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.known().resumes
            && let Err(error) = self.resume_in_turn()
        {
            self.kill(VmEnd::Failed(format!("it cannot run on: {error}")));
        }
    }

    fn resume_in_turn(&self) -> Result<(), QmpError> {
        {
            let mut known = self.shared.known();
            known.is_to_run = true;
            known.resumes = known.is_held;
            if known.is_held {
                return Ok(());
            }
        }
        let resumed = continue_guest(self.qmp()?);
        if let Err(QmpError::Silent { .. }) = resumed {
            // It may have been held meanwhile.
            let mut known = self.shared.known();
            known.resumes = known.is_held;
            if known.is_held {
                return Ok(());
            }
        }
        resumed
    }

    /// Waits until QEMU has stopped the guest because a disk has no room, and says which; `None` if
    /// it does not in time, or the process has ended.
    pub(crate) fn full_disk_within(&self, patience: Duration) -> Option<String> {
        let (known, _) = self.shared.wait(patience, |known| {
            known.full_disk.is_some() || known.end.is_some()
        });
        known.full_disk.clone()
    }

    /// Lets a guest try again that QEMU has stopped because a disk had no room: what it was to write
    /// is written now. A guest that was told to stop since stays so.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn retry_full_disk(&self) -> Result<(), QmpError> {
        let _run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let known = self.shared.known();
            if !known.is_to_run || known.is_held {
                return Ok(());
            }
        }
        let qmp = self.qmp()?;
        let now: RunState = qmp.query("query-status")?;
        self.shared.known().full_disk = None;
        match now.status.as_str() {
            "io-error" => qmp.execute("cont", json!({})),
            _ => Ok(()),
        }
    }

    /// How often the process was held.
    pub(crate) fn holds(&self) -> u64 {
        self.shared.known().holds
    }

    /// Whether the process was held since `holds` was counted, and waits until it is not: what did
    /// not happen in time may happen yet. False if it has ended.
    pub(crate) fn was_held_since(&self, holds: u64) -> bool {
        let mut known = self.shared.known();
        if !known.is_held && known.holds == holds {
            return false;
        }
        let goes_on = |known: &Known| !known.is_held || known.end.is_some();
        while !goes_on(&known) {
            drop(known);
            known = self.shared.wait(PATIENCE, goes_on).0;
        }
        known.end.is_none()
    }

    /// Ends a migration, if there is one; the guest is left as it is, paused or running. If the
    /// process is held it takes as long as that.
    ///
    /// # Errors
    /// If QEMU does not end it; it may yet.
    pub(crate) fn cancel_migration(&self) -> Result<(), QmpError> {
        let within = |step: &dyn Fn() -> Result<(), QmpError>| loop {
            let holds = self.holds();
            match step() {
                Err(QmpError::Silent { .. }) if self.was_held_since(holds) => {}
                result => return result,
            }
        };
        let command = "migrate_cancel";
        within(&|| self.qmp()?.execute(command, json!({})))?;
        within(&|| {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let now: Info = self.qmp()?.query("query-migrate")?;
                // There may have been none.
                if now.status.is_empty() || now.has_ended() {
                    return Ok(());
                }
                if Instant::now() > deadline {
                    return Err(QmpError::Silent {
                        command: command.to_owned(),
                        patience: PATIENCE,
                    });
                }
                std::thread::sleep(SETTLE_POLL);
            }
        })
    }

    /// Whether the last command was that the guest runs, and it is not held.
    pub(crate) fn is_to_run(&self) -> bool {
        let known = self.shared.known();
        known.is_to_run && !known.is_held
    }

    /// Whether the guest was let run here, and nothing has stopped it since.
    pub(crate) fn runs(&self) -> bool {
        let known = self.shared.known();
        known.is_to_run && !known.is_held && known.stopped.is_none() && known.end.is_none()
    }

    /// How long the guest has been stopped, if it is.
    pub(crate) fn stopped_for(&self) -> Option<Duration> {
        self.shared.known().stopped.map(|since| since.elapsed())
    }

    /// Begins an attempt to move the machine: earlier ones command nothing any more.
    pub(crate) fn begin_attempt(&self) -> u64 {
        let mut last = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        *last += 1;
        *last
    }

    /// Whether no later attempt has begun.
    pub(crate) fn is_last_attempt(&self, attempt: u64) -> bool {
        let last = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        *last == attempt
    }

    /// Lets an attempt give commands to QEMU, unless a later one has begun: the end of an attempt
    /// that was given up must not continue a guest that the next one has stopped.
    ///
    /// # Errors
    /// If a later one has begun.
    pub(crate) fn during<T>(
        &self,
        attempt: u64,
        commands: impl FnOnce() -> Result<T, MoveError>,
    ) -> Result<T, MoveError> {
        let last = self.attempt.lock().unwrap_or_else(PoisonError::into_inner);
        match *last == attempt {
            true => commands(),
            false => Err("another move or checkpoint of the machine has begun".into()),
        }
    }

    /// Stops the process itself where it is. Does not wait: true once all its threads are
    /// stopped.
    pub(crate) fn hold(&self) -> bool {
        {
            let mut known = self.shared.known();
            known.holds += u64::from(!known.is_held);
            known.is_held = true;
        }
        self.signal(Signal::STOP);
        self.shared.known().end.is_some() || all_threads_stopped(self.pid)
    }

    /// Lets the process go on. Does not wait.
    pub(crate) fn release(self: &Arc<Self>) {
        let resumes = {
            let mut known = self.shared.known();
            known.is_held = false;
            known.resumes
        };
        self.signal(Signal::CONT);
        self.shared.changed.notify_all();
        if !resumes {
            return;
        }
        let vm = self.clone();
        let thread = std::thread::Builder::new().name("resume".into());
        let started = thread.spawn(move || vm.resume_released());
        if let Err(error) = started {
            self.kill(VmEnd::Failed(format!("it cannot run on: {error}")));
        }
    }

    /// Asks the guest to shut down, by its power button, and a while later by its agent if it does not
    /// heed that; and cuts its power after a time. Does not wait.
    pub(crate) fn shut_down(self: &Arc<Self>, patience: Duration) {
        self.want(VmEnd::Stopped);
        let vm = self.clone();
        let thread = std::thread::Builder::new().name("shut-down".into());
        let started = thread.spawn(move || {
            let deadline = Instant::now() + patience;
            let ends_before = |deadline: Instant| {
                let rest = deadline.saturating_duration_since(Instant::now());
                vm.shared.wait(rest, |known| known.end.is_some()).1
            };
            let asked = vm
                .qmp()
                .and_then(|qmp| qmp.execute("system_powerdown", json!({})));
            if asked.is_ok() {
                if let Some(agent) = vm.agent() {
                    if ends_before(deadline.min(Instant::now() + BUTTON_PATIENCE)) {
                        return;
                    }
                    if let Err(error) = agent.shut_down(deadline) {
                        tracing::info!(%error, "its guest agent does not shut it down");
                    }
                }
                if ends_before(deadline) {
                    return;
                }
            }
            vm.quit();
        });
        if let Err(error) = started {
            tracing::warn!(%error, "its system cannot be asked to shut down");
            self.kill(VmEnd::Stopped);
        }
    }

    /// Ends QEMU, which closes its disks properly.
    fn quit(&self) {
        let told = self.qmp().and_then(|qmp| qmp.execute("quit", json!({})));
        let ended = |known: &Known| known.end.is_some();
        if told.is_err() || !self.shared.wait(QUIT_PATIENCE, ended).1 {
            self.signal(Signal::KILL);
        }
    }

    /// Ends the process at once.
    pub(crate) fn kill(&self, end: VmEnd) {
        self.want(end);
        self.signal(Signal::KILL);
    }

    /// The first reason counts.
    fn want(&self, end: VmEnd) {
        self.shared.known().wanted.get_or_insert(end);
    }

    fn signal(&self, signal: Signal) {
        match pidfd_send_signal(&self.process, signal) {
            // It has ended.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(%error, "QEMU cannot be signalled"),
        }
    }

    /// Waits for the end.
    pub(crate) fn wait(&self) -> VmEnd {
        loop {
            if let Some(end) = self.end_within(PATIENCE) {
                return end;
            }
        }
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.shared.known().end.is_some()
    }

    /// Forgets how an earlier job of this name ended.
    pub(crate) fn forget_job(&self, id: &str) {
        self.shared.known().job_ends.remove(id);
    }

    /// How the job of this name ended, if it does so in time.
    pub(crate) fn job_end_within(
        &self,
        id: &str,
        patience: Duration,
    ) -> Option<Result<(), String>> {
        let (known, _) = self.shared.wait(patience, |known| {
            known.job_ends.contains_key(id) || known.end.is_some()
        });
        known.job_ends.get(id).cloned()
    }

    /// Forgets how an earlier migration ended.
    pub(crate) fn expect_migration(&self) {
        self.shared.known().migration.clear();
    }

    /// The status of the migration, once it is one of `statuses`; `None` if it is not in time, or
    /// the process ends.
    pub(crate) fn wait_for_migration(
        &self,
        patience: Duration,
        statuses: &[&str],
    ) -> Option<String> {
        let is_there = |known: &Known| statuses.contains(&known.migration.as_str());
        let over = |known: &Known| known.end.is_some() || is_there(known);
        let (known, _) = self.shared.wait(patience, over);
        is_there(&known).then(|| known.migration.clone())
    }

    /// Bytes of memory that the process occupies.
    pub(crate) fn resident_bytes(&self) -> u64 {
        resident_bytes(&PathBuf::from(format!("/proc/{}", self.pid)))
    }
}

/// Lets a guest run. QEMU tells the end of a migration a moment before it lets go of the guest, and
/// refuses until then.
fn continue_guest(qmp: &Qmp) -> Result<(), QmpError> {
    let deadline = Instant::now() + PATIENCE;
    let mut has_settled = false;
    loop {
        let result = qmp.execute("cont", json!({}));
        let is_final = has_settled || Instant::now() > deadline;
        if is_final || !matches!(result, Err(QmpError::Refused { .. })) {
            return result;
        }
        let now: RunState = qmp.query("query-status")?;
        match now.status.as_str() {
            "finish-migrate" => std::thread::sleep(SETTLE_POLL),
            // It may have let go between the two answers: a last time.
            _ => has_settled = true,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::qmp::tests::{answer, connect};
    use crate::spec::QemuSpec;
    use keel_testkit::bare_system::{counting_system, qemu_is_installed};
    use std::fs;

    const REFUSED: &str = r#""error": {"class": "GenericError", "desc": "not now"}"#;
    const DONE: &str = r#""return": {}"#;

    /// What becomes of a command to continue if QEMU answers so, in turn.
    fn continued(answers: &[(&'static str, &'static str)]) -> Result<(), QmpError> {
        let answers = answers.to_vec();
        let (qmp, _events) = connect(move |reader, writer| {
            for (command, with) in answers {
                assert_eq!(answer(reader, writer, with)["execute"], command);
            }
        });
        continue_guest(&qmp.unwrap())
    }

    #[test]
    fn a_guest_goes_on_once_its_migration_has_let_go() {
        let finishing = r#""return": {"status": "finish-migrate"}"#;
        let gone = r#""return": {"status": "postmigrate"}"#;
        let late = continued(&[
            ("cont", REFUSED),
            ("query-status", finishing),
            ("cont", REFUSED),
            ("query-status", finishing),
            ("cont", DONE),
        ]);
        late.unwrap();
        // It lets go between the refusal and the question.
        continued(&[("cont", REFUSED), ("query-status", gone), ("cont", DONE)]).unwrap();
        let refused = continued(&[("cont", REFUSED), ("query-status", gone), ("cont", REFUSED)]);
        let refused = refused.unwrap_err().to_string();
        assert_eq!(refused, "QEMU refuses `cont`: not now");
    }

    /// A guest that does not run yet; none if this computer has no QEMU.
    pub(crate) fn launched(folder: &Path) -> Option<Arc<Vm>> {
        if !qemu_is_installed() {
            return None;
        }
        let system = counting_system(folder, None).unwrap();
        fs::write(folder.join("kernel"), system).unwrap();
        let spec = QemuSpec::of_kernel("kernel".into());
        let machine = Machine {
            name: "s",
            spec: &spec,
            memory_bytes: 32 << 20,
            images: folder,
            accelerator: Accelerator::Tcg,
            is_incoming: false,
        };
        Some(Vm::launch(folder, &machine).unwrap().vm)
    }

    pub(crate) fn is_running(vm: &Vm) -> bool {
        let now: RunState = vm.qmp().unwrap().query("query-status").unwrap();
        now.status == "running"
    }

    /// The end of an attempt that was given up comes while the next one has stopped the guest.
    #[test]
    fn a_late_attempt_does_not_continue_a_guest() {
        let folder = tempfile::tempdir().unwrap();
        let Some(vm) = launched(folder.path()) else {
            return;
        };
        vm.resume().unwrap();
        assert!(is_running(&vm));
        let (first, second) = (vm.begin_attempt(), vm.begin_attempt());
        vm.during(second, || Ok(vm.pause()?)).unwrap();
        let late = vm.during(first, || Ok(vm.resume()?));
        assert!(late.unwrap_err().to_string().contains("another move"));
        assert!(!is_running(&vm));
        vm.during(second, || Ok(vm.resume()?)).unwrap();
        assert!(is_running(&vm));
        vm.kill(VmEnd::Discarded);
        vm.wait();
    }

    #[test]
    fn what_a_held_process_did_not_do_may_happen_once_it_is_released() {
        let folder = tempfile::tempdir().unwrap();
        let Some(vm) = launched(folder.path()) else {
            return;
        };
        let before = vm.holds();
        assert!(!vm.was_held_since(before));
        vm.hold();
        // It runs once it is released, whoever asks meanwhile.
        vm.resume().unwrap();
        let waiting = vm.clone();
        let waits = std::thread::spawn(move || waiting.was_held_since(before));
        vm.release();
        assert!(waits.join().unwrap());
        assert!(!vm.was_held_since(vm.holds()));
        let deadline = Instant::now() + PATIENCE;
        while !is_running(&vm) {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        vm.hold();
        vm.kill(VmEnd::Discarded);
        assert!(!vm.was_held_since(before), "it has ended");
        vm.wait();
    }
}
