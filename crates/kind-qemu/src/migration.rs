//! QEMU's migration stream, over the link between the workers of a move.
//!
//! ```text
//!   source                                              target
//!   QEMU ──▶ Unix socket ──▶ worker ══ link, TLS ══▶ worker ──▶ Unix socket ──▶ QEMU
//!            (`migrate`)      IMAGE … IMAGE_END                  (`migrate-incoming`)
//! ```
//!
//! QEMU itself decides what of the memory to send again, and throttles a guest that writes faster
//! than the link (auto-converge). The worker stops the guest; QEMU does so itself only when as good as
//! nothing is left, or in [`CopyMode::OnePass`]; or the memory follows ([`crate::post_copy`]), over a
//! channel of its own. With the guest stopped and its memory sent, QEMU
//! waits (`pause-before-switchover`): what is still in the serial line is printed before the devices
//! are sent, or it would be printed twice.

use crate::channel::Channel;
use crate::console::Console;
use crate::copy_mode::CopyMode;
use crate::disk_copy::OutgoingDisk;
use crate::migration_status::{BEGUN, ENDED, Info, Ram, SWITCHOVER};
use crate::process::VmEnd;
use crate::qmp::{PATIENCE, Qmp, QmpError};
use crate::relay::{self, Relay};
use crate::vm::{RunState, Vm};
use keel_machine::link::{Link, LinkError};
use keel_machine::worker::MoveError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The name of the socket in the worker's folder, which is QEMU's current directory.
const SOCKET: &str = "migration";

/// The most bytes per second, which is no limit: the link has its own.
const BYTES_PER_S_MAX: u64 = 1 << 40;

/// How long QEMU may take, once all has been sent, to say that it is done.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// How long QEMU may take, after it has told the end of a copy from one moment, to let go of the memory
/// for another one, and how often it is tried.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);
const RELEASE_POLL: Duration = Duration::from_millis(10);

/// The most bytes per second until a guest runs that was stopped for the beginning of a migration:
/// the least that is a limit for QEMU, which divides it by ten.
const BYTES_PER_S_BEFORE: u64 = 10;

/// What part of the memory may be left, as a divisor, when the guest goes ahead of it: QEMU sends the
/// rest of a first pass in the background then, with what was written during that.
const REST_OF_MEMORY: u64 = 16;

/// Answers of QEMU after which it has written what it could write before the first: one of the
/// round of its main loop in which that became possible, one of the next, in which it noticed, and
/// one after that.
const SETTLED_ANSWERS: usize = 3;

/// What an outgoing migration uses, given back at its end.
struct Pumped {
    link: Link,
    result: Result<(), MoveError>,
}

/// How what QEMU sends gets to the target.
enum Stream {
    /// By a thread that has the link of the move until all is sent.
    Pumped(JoinHandle<Pumped>),
    /// By a channel, whose target may ask for memory.
    Relayed([Relay; 2]),
}

/// The migration of a machine to another worker.
pub(crate) struct Outgoing {
    vm: Arc<Vm>,
    mode: CopyMode,
    stream: Stream,
}

fn capability(name: &str, state: bool) -> Value {
    json!({ "capability": name, "state": state })
}

/// Prepares QEMU for a copy of its guest from one moment ([`crate::checkpoint`]).
///
/// # Errors
/// If it cannot make one here.
pub(crate) fn set_up_snapshot(vm: &Vm) -> Result<(), QmpError> {
    let capabilities = json!([
        capability("events", true),
        capability("auto-converge", false),
        capability("pause-before-switchover", false),
        capability("late-block-activate", false),
        capability("postcopy-ram", false),
        capability("background-snapshot", true),
    ]);
    let capabilities = json!({ "capabilities": capabilities });
    let deadline = Instant::now() + RELEASE_PATIENCE;
    loop {
        let set = vm
            .qmp()?
            .execute("migrate-set-capabilities", capabilities.clone());
        match set {
            // The memory may be protected still for the copy before.
            Err(QmpError::Refused { .. }) if Instant::now() < deadline => {
                std::thread::sleep(RELEASE_POLL);
            }
            set => break set?,
        }
    }
    set_bytes_per_s(vm, BYTES_PER_S_MAX)
}

/// Takes all that a stopped guest has printed; returns what QEMU says of it then.
///
/// # Errors
/// If QEMU does not answer, or the output cannot be kept.
pub(crate) fn settle_console(vm: &Vm, console: &Console) -> Result<RunState, MoveError> {
    let qmp = vm.qmp()?;
    for _ in 1..SETTLED_ANSWERS {
        console.drain()?;
        let _: RunState = qmp.query("query-status")?;
    }
    console.drain()?;
    let state = qmp.query("query-status")?;
    console.drain()?;
    Ok(state)
}

fn set_up(vm: &Vm, mode: Option<CopyMode>, post_copy: bool) -> Result<(), QmpError> {
    let is_source = mode.is_some();
    let capabilities = json!([
        capability("events", true),
        capability("auto-converge", is_source),
        capability("pause-before-switchover", is_source),
        // What arrives has no disk before the commit.
        capability("late-block-activate", !is_source),
        capability("postcopy-ram", post_copy),
        capability("background-snapshot", false),
    ]);
    let qmp = vm.qmp()?;
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    )?;
    let limit_ms = mode.map_or(0, CopyMode::downtime_limit_ms);
    let parameters = json!({ "max-bandwidth": BYTES_PER_S_MAX, "downtime-limit": limit_ms });
    qmp.execute("migrate-set-parameters", parameters)
}

fn set_bytes_per_s(vm: &Vm, most: u64) -> Result<(), QmpError> {
    let parameters = json!({ "max-bandwidth": most });
    vm.qmp()?.execute("migrate-set-parameters", parameters)
}

impl Outgoing {
    /// Begins to send the machine over `link`, while it runs.
    ///
    /// # Errors
    /// If QEMU refuses; the link is closed then, and the guest may be stopped.
    pub(crate) fn begin(vm: &Arc<Vm>, link: Link) -> Result<Self, MoveError> {
        Self::begin_with(vm, false, |socket| {
            let thread = std::thread::Builder::new().name("migration".into());
            let pump = thread.spawn(move || {
                let mut link = link;
                let result = relay::send(&socket, &mut link);
                // A QEMU that still sends fails at once.
                let _ = socket.shutdown(Shutdown::Both);
                Pumped { link, result }
            })?;
            Ok(Stream::Pumped(pump))
        })
    }

    /// As [`Self::begin`], so that memory may follow the guest.
    ///
    /// # Errors
    /// If QEMU refuses; the guest may be stopped.
    pub(crate) fn begin_to_follow(vm: &Arc<Vm>, channel: Channel) -> Result<Self, MoveError> {
        Self::begin_with(vm, true, |socket| Stream::relayed(channel, &socket))
    }

    fn begin_with(
        vm: &Arc<Vm>,
        post_copy: bool,
        stream: impl FnOnce(UnixStream) -> Result<Stream, MoveError>,
    ) -> Result<Self, MoveError> {
        let mode = CopyMode::of(vm)?;
        vm.expect_migration();
        set_up(vm, Some(mode), post_copy)?;
        if mode == CopyMode::OnePass {
            // The log of what it writes begins while it writes nothing.
            set_bytes_per_s(vm, BYTES_PER_S_BEFORE)?;
            vm.pause()?;
        }
        let outgoing = Outgoing {
            vm: vm.clone(),
            mode,
            stream: stream(accept(vm, Attempt::First)?)?,
        };
        vm.wait_for_migration(PATIENCE, &BEGUN)
            .ok_or("QEMU does not begin its migration")?;
        if mode == CopyMode::OnePass {
            vm.resume()?;
            set_bytes_per_s(vm, BYTES_PER_S_MAX)?;
        }
        Ok(outgoing)
    }

    /// How far it is.
    ///
    /// # Errors
    /// If it has failed, or would lose what the guest wrote.
    pub(crate) fn info(&self) -> Result<Info, MoveError> {
        let info: Info = self.vm.qmp()?.query("query-migrate")?;
        info.check()?;
        self.mode.check(&info)?;
        Ok(info)
    }

    /// Stops the guest where all but little of its memory has been sent once: the rest follows it, unless
    /// QEMU has stopped it itself since all was sent.
    ///
    /// QEMU lets a guest run on that it has stopped itself if the migration fails, even after its devices
    /// were sent. One that was stopped before by a command it leaves alone.
    ///
    /// # Errors
    /// If QEMU does not.
    pub(crate) fn stop_to_follow(&self) -> Result<Sent, MoveError> {
        self.vm.pause()?;
        let qmp = self.vm.qmp()?;
        // QEMU stops a guest, and says that it waits, in one step.
        let sent = match self.info()?.status.as_str() {
            SWITCHOVER => Sent::All,
            _ => {
                qmp.execute("migrate-start-postcopy", json!({}))?;
                Sent::Most
            }
        };
        set_bytes_per_s(&self.vm, BYTES_PER_S_MAX)?;
        self.wait_for_switchover()?;
        Ok(sent)
    }

    /// Whether what QEMU sends gets to the target, as far as it is known.
    pub(crate) fn is_connected(&self) -> bool {
        match &self.stream {
            Stream::Pumped(pump) => !pump.is_finished(),
            Stream::Relayed(relays) => !relays.iter().any(Relay::has_ended),
        }
    }

    /// Whether all but little of the memory has been sent once; QEMU does not go on then, so that the
    /// guest need not stop for the rest.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub(crate) fn waits_to_follow(&self, ram: Ram) -> Result<bool, MoveError> {
        let is_little = ram.total > 0 && ram.remaining <= ram.total / REST_OF_MEMORY;
        if is_little {
            set_bytes_per_s(&self.vm, BYTES_PER_S_BEFORE)?;
        }
        Ok(is_little)
    }

    fn wait_for_switchover(&self) -> Result<(), MoveError> {
        let ends = [&[SWITCHOVER], &ENDED[..]].concat();
        let status = self.vm.wait_for_migration(END_PATIENCE, &ends);
        self.info()?;
        match status.as_deref() {
            Some(SWITCHOVER) => Ok(()),
            _ => Err("QEMU does not finish with the machine's memory".into()),
        }
    }

    /// Waits until QEMU is about to send the devices of a stopped guest, the console has all that was
    /// printed, and the target all of its own disk.
    ///
    /// # Errors
    /// If the migration fails, or the output cannot be kept.
    pub(crate) fn reach_devices(
        &self,
        console: &Console,
        disk: Option<&OutgoingDisk>,
    ) -> Result<(), MoveError> {
        self.wait_for_switchover()?;
        settle_console(&self.vm, console)?;
        if let Some(disk) = disk {
            disk.finish()?;
        }
        Ok(())
    }

    /// Lets QEMU send the devices.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn send_devices(&self) -> Result<(), QmpError> {
        let waits = json!({ "state": SWITCHOVER });
        self.vm.qmp()?.execute("migrate-continue", waits)
    }

    /// Waits until all of a stopped guest has been sent; gives the link back, if it had it.
    pub(crate) fn finish(self) -> (Option<Link>, Result<(), MoveError>) {
        // A channel is needed until QEMU has ended; a link is free once QEMU has no more for it.
        let (stream, pumped) = match self.stream {
            Stream::Pumped(_) => (None, Some(self.stream.end())),
            Stream::Relayed(_) => (Some(self.stream), None),
        };
        let has_ended = self.vm.wait_for_migration(END_PATIENCE, &ENDED).is_some();
        let (link, result) = pumped.unwrap_or((None, Ok(())));
        drop(stream);
        let info = self.vm.qmp().and_then(|qmp| qmp.query("query-migrate"));
        let checked = match info {
            // What QEMU says of it would only follow from this.
            _ if result.is_err() => result,
            Ok(_) if !has_ended => Err("QEMU's migration does not end".into()),
            Ok(info) => Info::check(&info),
            Err(error) => Err(error.into()),
        };
        (link, checked)
    }

    /// The link of a migration that was cancelled, if it had it.
    pub(crate) fn into_link(self) -> Option<Link> {
        self.stream.end().0
    }

    /// What follows the guest, over another channel after a connection was lost.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub(crate) fn go_on(&mut self, channel: Channel) -> Result<(), MoveError> {
        let socket = accept(&self.vm, Attempt::Again)?;
        self.stream = Stream::relayed(channel, &socket)?;
        Ok(())
    }

    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// As a network does that fails.
    #[cfg(test)]
    pub(crate) fn cut(&mut self, channel: Channel) {
        let (socket, _) = UnixStream::pair().unwrap();
        self.stream = Stream::relayed(channel, &socket).unwrap();
    }
}

impl Stream {
    fn relayed(channel: Channel, socket: &UnixStream) -> Result<Self, MoveError> {
        // QEMU says nothing while it waits for the commit, or for somebody who needs a page.
        socket.set_read_timeout(None)?;
        Ok(Stream::Relayed(channel.at_source(socket)?))
    }

    /// Waits until a migration that has ended, or is about to, sends nothing any more.
    fn end(self) -> (Option<Link>, Result<(), MoveError>) {
        match self {
            Stream::Pumped(pump) => {
                let Pumped { link, result } = pump
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                (Some(link), result)
            }
            Stream::Relayed(_) => (None, Ok(())),
        }
    }
}

/// How much of the memory of a guest has been sent when it stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    All,
    /// The rest follows.
    Most,
}

/// Whether a migration begins, or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attempt {
    First,
    /// One that was interrupted while memory followed the guest.
    Again,
}

/// Makes QEMU begin a migration, for which it connects to this worker.
///
/// # Errors
/// If it does not.
pub(crate) fn accept(vm: &Vm, attempt: Attempt) -> Result<UnixStream, MoveError> {
    let path = vm.folder().join(SOCKET);
    // Of an earlier move.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    let migrate = match attempt {
        Attempt::First => json!({ "uri": format!("unix:{SOCKET}") }),
        Attempt::Again => json!({ "uri": format!("unix:{SOCKET}"), "resume": true }),
    };
    vm.qmp()?.execute("migrate", migrate)?;
    let mut wait = [PollFd::new(&listener, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    if poll(&mut wait, Some(&patience)).map_err(io::Error::from)? == 0 {
        return Err("QEMU does not begin its migration".into());
    }
    let (socket, _) = listener.accept()?;
    let _ = fs::remove_file(&path);
    // A QEMU that hangs must not hold up whoever waits for the end of its stream.
    socket.set_read_timeout(Some(END_PATIENCE))?;
    Ok(socket)
}

/// Prepares QEMU, which was started for this, for a machine whose memory may follow it; returns its
/// end of the channel.
///
/// # Errors
/// If it refuses.
pub(crate) fn listen_to_follow(vm: &Vm) -> Result<UnixStream, MoveError> {
    set_up(vm, None, true)?;
    connect(vm, begin)
}

fn begin(qmp: &Qmp, at: Value) -> Result<(), QmpError> {
    qmp.execute("migrate-incoming", at)
}

/// The same again, after a connection was lost. QEMU may be waiting for what was to come over it.
///
/// # Errors
/// If it refuses.
pub(crate) fn listen_again(vm: &Vm) -> Result<UnixStream, MoveError> {
    connect(vm, |qmp, at| qmp.execute_at_once("migrate-recover", at))
}

/// Makes QEMU listen by a command, and connects to it.
fn connect(
    vm: &Vm,
    execute: impl FnOnce(&Qmp, Value) -> Result<(), QmpError>,
) -> Result<UnixStream, MoveError> {
    let path = vm.folder().join(SOCKET);
    let _ = fs::remove_file(&path);
    execute(vm.qmp()?, json!({ "uri": format!("unix:{SOCKET}") }))?;
    let socket = UnixStream::connect(&path)?;
    let _ = fs::remove_file(&path);
    Ok(socket)
}

/// The migration of a machine from another worker.
pub(crate) struct Incoming {
    vm: Arc<Vm>,
    socket: UnixStream,
}

impl Incoming {
    /// Prepares QEMU, which was started for this.
    ///
    /// # Errors
    /// If it refuses.
    pub(crate) fn begin(vm: &Arc<Vm>) -> Result<Self, MoveError> {
        set_up(vm, None, false)?;
        Ok(Incoming {
            vm: vm.clone(),
            socket: connect(vm, begin)?,
        })
    }

    /// Passes a piece on.
    ///
    /// # Errors
    /// If QEMU does not take it: why, if it says so.
    pub(crate) fn take(&mut self, piece: &[u8]) -> Result<(), MoveError> {
        let written = self.socket.write_all(piece);
        written.map_err(|error| self.why(&error.to_string()))
    }

    /// Everything was passed on: waits until QEMU has the whole machine, paused.
    ///
    /// # Errors
    /// If it does not.
    pub(crate) fn finish(self) -> Result<(), MoveError> {
        self.socket.shutdown(Shutdown::Write)?;
        let status = self.vm.wait_for_migration(END_PATIENCE, &ENDED);
        match status.as_deref() {
            Some("completed") => Ok(()),
            Some(other) => Err(self.why(other)),
            None => Err(self.why("it does not end")),
        }
    }

    fn why(&self, seen: &str) -> MoveError {
        let end = self.vm.end_within(Duration::from_secs(1));
        match end {
            Some(VmEnd::Failed(reason)) => LinkError::Aborted(reason).into(),
            _ => LinkError::Aborted(format!("QEMU does not take the machine: {seen}")).into(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::arguments::Machine;
    use crate::processor::Accelerator;
    use crate::relay::tests::links;
    use crate::spec::{Kernel, QemuSpec};
    use crate::vm::Launch;
    use keel_machine::link::Message;
    use keel_machine::log::Log;
    use keel_testkit::bare_system::qemu_is_installed;
    use keel_testkit::linux_system::LinuxSystem;
    use std::path::Path;

    pub(crate) const MEMORY_BYTES: u64 = 128 << 20;
    pub(crate) const PAGE_BYTES: usize = 4096;

    pub(crate) struct System {
        pub(crate) vm: Arc<Vm>,
        pub(crate) console: Arc<Console>,
        log: Arc<Log>,
    }

    /// A busy Linux that does not run yet.
    pub(crate) fn launched(images: &Path, folder: &Path, is_incoming: bool) -> System {
        let spec = QemuSpec {
            kernel: Some(Kernel {
                image: "kernel".into(),
                initrd: Some("initrd".into()),
                append: "console=ttyS0 quiet loglevel=0 panic=-1 keel.busy".into(),
            }),
            ..QemuSpec::default()
        };
        let machine = Machine {
            name: "s",
            spec: &spec,
            memory_bytes: MEMORY_BYTES,
            images,
            accelerator: Accelerator::Tcg,
            is_incoming,
        };
        std::fs::create_dir_all(folder).unwrap();
        let Launch { vm, console } = Vm::launch(folder, &machine).unwrap();
        let log = Arc::new(Log::open(folder, 0).unwrap());
        let console = Console::follow(console, log.clone(), u64::MAX).unwrap();
        System { vm, console, log }
    }

    /// Waits until it has printed something more.
    pub(crate) fn wait_output(system: &System) {
        let before = system.log.end();
        let deadline = Instant::now() + Duration::from_secs(60);
        while system.log.end() < before + 200 {
            assert!(system.vm.end_within(Duration::from_millis(10)).is_none());
            assert!(Instant::now() < deadline, "it prints nothing more");
        }
    }

    fn receive_all(vm: &Arc<Vm>, mut link: Link) {
        let mut incoming = Incoming::begin(vm).unwrap();
        loop {
            match link.receive().unwrap() {
                Message::Image(bytes) => incoming.take(&bytes).unwrap(),
                Message::ImageEnd => return incoming.finish().unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The memory of a stopped guest.
    pub(crate) fn memory(vm: &Vm) -> Vec<u8> {
        let path = vm.folder().join("memory");
        let arguments = json!({ "val": 0, "size": MEMORY_BYTES, "filename": "memory" });
        vm.qmp().unwrap().execute("pmemsave", arguments).unwrap();
        std::fs::read(path).unwrap()
    }

    /// How many pages of two memories differ.
    pub(crate) fn different(one: &[u8], other: &[u8]) -> usize {
        assert_eq!(one.len(), other.len());
        let pages = one.chunks(PAGE_BYTES).zip(other.chunks(PAGE_BYTES));
        pages.filter(|(one, other)| one != other).count()
    }

    /// A Linux whose kernel and first file system are in this folder; false if there is none here.
    pub(crate) fn make_linux(folder: &Path) -> bool {
        let linux = LinuxSystem::make(&folder.join("parts")).unwrap();
        let Some(linux) = linux.filter(|_| qemu_is_installed()) else {
            return false;
        };
        std::fs::write(folder.join("kernel"), linux.kernel).unwrap();
        std::fs::write(folder.join("initrd"), linux.initrd).unwrap();
        true
    }

    /// Compares each page, after several rounds while a system is busy.
    #[test]
    fn the_target_has_all_that_a_busy_system_wrote() {
        let folder = tempfile::tempdir().unwrap();
        if !make_linux(folder.path()) {
            return;
        }
        let place = |number: usize| folder.path().join(format!("place-{number}"));
        let mut source = launched(folder.path(), &place(0), false);
        source.vm.resume().unwrap();
        wait_output(&source);
        for number in 1..=4 {
            let target = launched(folder.path(), &place(number), true);
            let (ours, theirs) = links();
            let receiver = target.vm.clone();
            let receiving = std::thread::spawn(move || receive_all(&receiver, theirs));
            let outgoing = Outgoing::begin(&source.vm, ours).unwrap();
            let patience = Duration::from_millis(20);
            while outgoing.info().unwrap().ram.rounds < 4
                && source
                    .vm
                    .wait_for_migration(patience, &[SWITCHOVER])
                    .is_none()
            {}
            source.vm.pause().unwrap();
            outgoing.reach_devices(&source.console, None).unwrap();
            outgoing.send_devices().unwrap();
            let (link, finished) = outgoing.finish();
            finished.unwrap();
            let mut link = link.unwrap();
            link.send(&Message::ImageEnd).unwrap();
            link.flush().unwrap();
            receiving.join().unwrap();
            let (sent, arrived) = (memory(&source.vm), memory(&target.vm));
            assert_eq!(different(&sent, &arrived), 0, "pages, after move {number}");
            source.vm.kill(VmEnd::Discarded);
            target.vm.resume().unwrap();
            wait_output(&target);
            source = target;
        }
        source.vm.kill(VmEnd::Discarded);
        source.vm.wait();
    }
}
