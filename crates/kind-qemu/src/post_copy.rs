//! Post-copy: the guest runs at the target before all of its memory has arrived, by QEMU's own means.
//!
//! ```text
//!   source                                                                    target
//!   QEMU ──▶ Unix socket ──▶ worker ══ PUSH: memory, devices ══▶ worker ──▶ Unix socket ──▶ QEMU
//!        ◀──             ◀──        ◀═ PULL: wanted pages ══════        ◀──             ◀──
//!     │                                                                          │
//!     │ nearly all memory, once; the guest stops ───────────────────────────────▶│ PREPARED
//!     │  commit in the store                                                     │
//!     │ devices, GO ────────────────────────────────────────────────────────────▶│ runs
//!     │◀───────────────────────────────── pages for which it waits, first ───────│
//!     │ all pages that it lacks, or that were written during the first pass ────▶│
//! ```
//!
//! QEMU cannot take a guest back once it has sent the devices, so it sends them after the commit: until
//! then a move that fails leaves the guest running at its source. From then on the machine is lost with
//! either node, until all has arrived; its system boots again then, with its disks as they are.
//!
//! When a connection is lost, QEMU waits at both ends (`postcopy-paused`), and the guest goes on until it
//! needs a page that is not there. The source connects again, and QEMU resumes (`migrate-recover`,
//! `migrate` with `resume`). If the source is lost for good, the agents decide: the machine cannot go on.

use crate::channel::{Channel, IncomingChannels, Use};
use crate::migration::{Outgoing, listen_again, listen_to_follow};
use crate::migration_status::{ENDED, FOLLOWS, INTERRUPTED, Info, RECOVERY};
use crate::qmp::{PATIENCE, QmpError};
use crate::relay::Relay;
use crate::vm::{RunState, Vm};
use keel_machine::failpoint;
use keel_machine::link::TargetEndpoint;
use keel_machine::moves::FillReport;
use keel_machine::worker::{MoveError, PostCopyStatus};
use serde_json::json;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Pause before the source connects again.
const RECONNECT_DELAY: Duration = Duration::from_millis(100);
/// How often it is looked how far it is.
const POLL: Duration = Duration::from_millis(50);
/// How long the devices of a guest may take to arrive after the commit.
const DEVICES_PATIENCE: Duration = Duration::from_secs(20);
/// How often QEMU is asked whether it has them all.
const DEVICES_POLL: Duration = Duration::from_millis(1);
/// How long QEMU may take to say how far it is. It may wait for a page itself, and a source that is
/// connected again gives up long before other questions do.
const ASK_PATIENCE: Duration = Duration::from_secs(1);
/// How long QEMU may take, once it has a connection again, until it goes on.
const RESUME_PATIENCE: Duration = Duration::from_secs(10);

/// How long QEMU may take, once it has all memory, to tell the source and to close its connection.
const LAST_WORD_PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of a page, in reports.
const PAGE_BYTES: u64 = 4096;

/// At the source of a guest that runs at the target: follows the memory until all of it is there, over as
/// many connections as needed. `unsent` is set to the bytes that are left.
pub(crate) fn follow(
    mut outgoing: Outgoing,
    target: &TargetEndpoint,
    unsent: &AtomicU64,
) -> FillReport {
    let begun = Instant::now();
    let mut reconnects = 0;
    loop {
        match follow_once(&outgoing, unsent) {
            Ok(Followed::All(info)) => {
                return FillReport {
                    micros: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
                    pushed_pages: (info.ram.followed / PAGE_BYTES)
                        .saturating_sub(info.ram.requests),
                    pulled_pages: info.ram.requests,
                    reconnects,
                    ..FillReport::default()
                };
            }
            Ok(Followed::Interrupted) => match reconnect(&mut outgoing, target) {
                Ok(()) => reconnects += 1,
                Err(error) => tracing::warn!(%error, "cannot send memory; retrying"),
            },
            Ok(Followed::Lost(reason)) => {
                // Agents take a worker that is there for a copy of the memory, and the target would wait
                // for it.
                tracing::error!(reason, "memory of a guest that has gone ahead is lost");
                std::process::exit(1);
            }
            // A QEMU that stands still may answer again.
            Err(error) => tracing::warn!(%error, "not all memory has followed its guest yet"),
        }
        std::thread::sleep(RECONNECT_DELAY);
    }
}

/// What became of memory that follows its guest.
enum Followed {
    All(Info),
    Interrupted,
    Lost(String),
}

/// Waits until all memory has followed, or something keeps it from that.
fn follow_once(outgoing: &Outgoing, unsent: &AtomicU64) -> Result<Followed, MoveError> {
    failpoint::pass("post-copy.serve")?;
    let mut recovers: Option<Instant> = None;
    loop {
        if outgoing.vm().has_ended() {
            return Ok(Followed::Lost("its QEMU has ended".into()));
        }
        let info: Info = outgoing.vm().qmp()?.query("query-migrate")?;
        unsent.store(info.ram.remaining, Ordering::Relaxed);
        match info.status.as_str() {
            "completed" => return Ok(Followed::All(info)),
            INTERRUPTED => return Ok(Followed::Interrupted),
            _ if info.has_ended() => {
                let reason = info.check().err().map(|error| error.to_string());
                return Ok(Followed::Lost(reason.unwrap_or_default()));
            }
            // Before 8.2 QEMU does not give up a connection that is lost again meanwhile.
            recovery if recovery.starts_with(RECOVERY) => {
                if recovers.get_or_insert_with(Instant::now).elapsed() > RESUME_PATIENCE {
                    return Ok(Followed::Lost("QEMU does not go on with it".into()));
                }
            }
            _ => recovers = None,
        }
        let ends = [&[INTERRUPTED], &ENDED[..]].concat();
        outgoing.vm().wait_for_migration(POLL, &ends);
    }
}

/// Connects again after the connection was lost.
fn reconnect(outgoing: &mut Outgoing, target: &TargetEndpoint) -> Result<(), MoveError> {
    let channel = Channel::connect(target, Use::Memory)?;
    outgoing.vm().expect_migration();
    outgoing.go_on(channel)?;
    let goes_on = [&[FOLLOWS, INTERRUPTED], &ENDED[..]].concat();
    let status = outgoing.vm().wait_for_migration(RESUME_PATIENCE, &goes_on);
    match status.as_deref() {
        Some(INTERRUPTED) => Err("the connection is lost again".into()),
        Some(_) => Ok(()),
        None => Err("QEMU does not go on yet".into()),
    }
}

/// A guest that arrives, and whose memory may follow it.
pub(crate) struct IncomingMemory {
    vm: Arc<Vm>,
    channels: Arc<IncomingChannels>,
    relays: Arc<Mutex<Option<[Relay; 2]>>>,
}

impl IncomingMemory {
    /// Prepares QEMU, which was started for this: it takes what comes once the source has connected.
    ///
    /// # Errors
    /// If it refuses.
    pub(crate) fn begin(vm: &Arc<Vm>, channels: Arc<IncomingChannels>) -> Result<Self, MoveError> {
        let socket = listen_to_follow(vm)?;
        let incoming = IncomingMemory {
            vm: vm.clone(),
            channels,
            relays: Arc::default(),
        };
        let (relays, channels) = (incoming.relays.clone(), incoming.channels.clone());
        let vm = vm.clone();
        let thread = std::thread::Builder::new().name("memory".into());
        thread.spawn(move || {
            // A disk comes before it, which takes its time.
            let channel = loop {
                match channels.memory.within(POLL) {
                    Some(channel) => break channel,
                    None if vm.has_ended() => return,
                    None => {}
                }
            };
            match channel.at_target(&socket) {
                Ok(started) => put(&relays, Some(started)),
                // QEMU notices that its socket is closed.
                Err(error) => tracing::warn!(%error, "a guest cannot arrive"),
            }
        })?;
        Ok(incoming)
    }

    /// # Errors
    /// If what came so far is of no use.
    pub(crate) fn check(&self) -> Result<(), MoveError> {
        let info: Info = self.vm.qmp()?.query("query-migrate")?;
        info.check()
    }

    /// Waits for the devices, after the commit. The guest can run then.
    ///
    /// # Errors
    /// If they do not come: the guest never ran here.
    pub(crate) fn wait_for_devices(&self) -> Result<(), MoveError> {
        // The connection may be lost by now; the source connects again.
        let arrived = [&[FOLLOWS, INTERRUPTED], &ENDED[..]].concat();
        let status = self.vm.wait_for_migration(DEVICES_PATIENCE, &arrived);
        if !matches!(status.as_deref(), Some(FOLLOWS | INTERRUPTED | "completed")) {
            return Err("its devices do not arrive".into());
        }
        let deadline = Instant::now() + DEVICES_PATIENCE;
        loop {
            let holds = self.vm.holds();
            let now = self.vm.qmp()?.query::<RunState>("query-status");
            match now {
                Ok(now) if now.status != "inmigrate" => return Ok(()),
                Ok(_) if Instant::now() > deadline => {
                    return Err("not all of its devices arrive".into());
                }
                Ok(_) => std::thread::sleep(DEVICES_POLL),
                // Its node had no lease for a while.
                Err(QmpError::Silent { .. }) if self.vm.was_held_since(holds) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether all memory is there, if QEMU says so.
    pub(crate) fn is_complete(&self) -> bool {
        self.status(PATIENCE)
            .is_ok_and(|status| status == "completed")
    }

    fn status(&self, patience: Duration) -> Result<String, QmpError> {
        let qmp = self.vm.qmp()?;
        let told = qmp.execute_within("query-migrate", json!({}), patience)?;
        Ok(told["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Follows the memory of a guest that runs here until all of it is there, or the guest has ended.
    /// `tell` is called with each change.
    pub(crate) fn follow(&self, tell: &dyn Fn(PostCopyStatus)) {
        let changes = [&[INTERRUPTED], &ENDED[..]].concat();
        let (mut newer, mut is_interrupted) = (None, false);
        while !self.vm.has_ended() {
            let seen = self.vm.wait_for_migration(POLL, &changes);
            // It may answer nothing then, for it may wait for a page itself; and an answer may be ahead of
            // the event, which would be taken for that of another connection.
            is_interrupted |= seen.as_deref() == Some(INTERRUPTED);
            if !is_interrupted {
                match self.status(ASK_PATIENCE).unwrap_or_default().as_str() {
                    "completed" => {
                        tell(PostCopyStatus::Done);
                        self.await_last_word();
                        put(&self.relays, None);
                        return;
                    }
                    // A source that connects again has lost the connection before, whatever this side
                    // sees.
                    _ => {
                        if let Some(channel) = self.channels.memory.within(Duration::ZERO) {
                            put(&self.relays, None);
                            newer = Some(channel);
                        }
                    }
                }
            }
            if is_interrupted {
                put(&self.relays, None);
                tell(PostCopyStatus::SourceLost);
                let channel = newer.take().or_else(|| self.channels.memory.within(POLL));
                let Some(channel) = channel else { continue };
                match self.go_on(channel) {
                    Ok(()) => {
                        is_interrupted = false;
                        tell(PostCopyStatus::Receiving);
                    }
                    Err(error) => tracing::warn!(%error, "memory does not arrive yet"),
                }
            }
        }
    }

    /// Waits until QEMU has told the source that it has all: it is complete a moment before.
    fn await_last_word(&self) {
        let deadline = Instant::now() + LAST_WORD_PATIENCE;
        let has_said = || {
            let relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner);
            let mut relays = relays.iter().flatten();
            relays.any(Relay::has_ended)
        };
        while !has_said() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }

    fn go_on(&self, channel: Channel) -> Result<(), MoveError> {
        self.vm.expect_migration();
        let socket: UnixStream = listen_again(&self.vm)?;
        put(&self.relays, Some(channel.at_target(&socket)?));
        Ok(())
    }
}

/// Replaces relays; those before end.
fn put(relays: &Mutex<Option<[Relay; 2]>>, by: Option<[Relay; 2]>) {
    let before = {
        let mut relays = relays.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *relays, by)
    };
    drop(before);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::tests::{channels, incoming};
    use crate::migration::Sent;
    use crate::migration::tests::{
        MEMORY_BYTES, System, different, launched, make_linux, memory, wait_output,
    };
    use crate::migration_status::SWITCHOVER;
    use crate::process::VmEnd;
    use std::sync::mpsc::Sender;

    fn set_bytes_per_s(vm: &Vm, most: u64) {
        let parameters = json!({ "max-postcopy-bandwidth": most });
        let qmp = vm.qmp().unwrap();
        qmp.execute("migrate-set-parameters", parameters).unwrap();
    }

    /// So slowly nearly all that follows is left when a connection is lost.
    const SLOW_BYTES_PER_S: u64 = 1 << 17;

    /// The guest goes ahead, `early` before most of its memory.
    fn go_ahead(
        source: &System,
        opened: &Sender<Channel>,
        arriving: &IncomingMemory,
        early: bool,
    ) -> (Outgoing, Sent) {
        let (ours, theirs) = channels();
        opened.send(theirs).unwrap();
        let outgoing = Outgoing::begin_to_follow(&source.vm, ours).unwrap();
        let patience = Duration::from_millis(2);
        while !early
            && !outgoing
                .waits_to_follow(outgoing.info().unwrap().ram)
                .unwrap()
            && source
                .vm
                .wait_for_migration(patience, &[SWITCHOVER])
                .is_none()
        {}
        let sent = outgoing.stop_to_follow().unwrap();
        outgoing.reach_devices(&source.console, None).unwrap();
        arriving.check().unwrap();
        outgoing.send_devices().unwrap();
        arriving.wait_for_devices().unwrap();
        (outgoing, sent)
    }

    struct KilledOnDrop<'a>(&'a Vm);

    impl Drop for KilledOnDrop<'_> {
        fn drop(&mut self) {
            self.0.kill(VmEnd::Discarded);
        }
    }

    fn cut(outgoing: &mut Outgoing) {
        outgoing.cut(channels().0);
        let paused = outgoing
            .vm()
            .wait_for_migration(RESUME_PATIENCE, &[INTERRUPTED]);
        assert_eq!(paused.as_deref(), Some(INTERRUPTED));
    }

    /// Over another connection, and fast.
    fn go_on(outgoing: &mut Outgoing, opened: &Sender<Channel>) {
        set_bytes_per_s(outgoing.vm(), 0);
        let (ours, theirs) = channels();
        opened.send(theirs).unwrap();
        outgoing.vm().expect_migration();
        outgoing.go_on(ours).unwrap();
    }

    /// Each page of a busy system, of which some follow it, also over a second connection.
    #[test]
    fn what_follows_a_guest_is_what_it_had() {
        let folder = tempfile::tempdir().unwrap();
        if check_here().is_err() || !make_linux(folder.path()) {
            return;
        }
        let place = |number: usize| folder.path().join(format!("place-{number}"));
        let mut source = launched(folder.path(), &place(0), false);
        source.vm.resume().unwrap();
        wait_output(&source);
        let mut cuts = 0;
        for number in 1..=4 {
            let is_early = number > 1;
            let target = launched(folder.path(), &place(number), true);
            let (arriving, opened) = incoming();
            let arriving = IncomingMemory::begin(&target.vm, arriving).unwrap();
            set_bytes_per_s(&source.vm, if is_early { SLOW_BYTES_PER_S } else { 0 });
            let (mut outgoing, sent) = go_ahead(&source, &opened, &arriving, is_early);
            let is_cut = is_early && sent == Sent::Most;
            cuts += u64::from(is_cut);
            let statuses = Mutex::new(Vec::new());
            let tell = |status| statuses.lock().unwrap().push(status);
            std::thread::scope(|scope| {
                scope.spawn(|| arriving.follow(&tell));
                if is_cut {
                    cut(&mut outgoing);
                    go_on(&mut outgoing, &opened);
                }
                let completed = source.vm.wait_for_migration(RESUME_PATIENCE, &ENDED);
                assert_eq!(completed.as_deref(), Some("completed"));
            });
            let statuses = statuses.into_inner().unwrap();
            assert_eq!(statuses.last(), Some(&PostCopyStatus::Done));
            assert_eq!(statuses.contains(&PostCopyStatus::SourceLost), is_cut);
            let pages = different(&memory(&source.vm), &memory(&target.vm));
            assert_eq!(pages, 0, "pages differ after move {number}");
            source.vm.kill(VmEnd::Discarded);
            target.vm.resume().unwrap();
            wait_output(&target);
            source = target;
        }
        assert!(cuts > 0, "nothing was left to follow, three times");
        source.vm.kill(VmEnd::Discarded);
        source.vm.wait();
    }

    /// QEMU itself waits for pages that do not come, and so answers nothing: it is told all the same
    /// that its memory comes over another connection.
    #[test]
    fn memory_follows_to_a_qemu_that_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        if check_here().is_err() || !make_linux(folder.path()) {
            return;
        }
        let place = |name: String| folder.path().join(name);
        // All may be there before it is stopped, on a busy host.
        let mut attempts = (1..=5).filter_map(|number| {
            let source = launched(folder.path(), &place(format!("source-{number}")), false);
            source.vm.resume().unwrap();
            wait_output(&source);
            let target = launched(folder.path(), &place(format!("target-{number}")), true);
            let (arriving, opened) = incoming();
            let arriving = IncomingMemory::begin(&target.vm, arriving).unwrap();
            set_bytes_per_s(&source.vm, SLOW_BYTES_PER_S);
            let (outgoing, sent) = go_ahead(&source, &opened, &arriving, true);
            let is_left = sent == Sent::Most;
            if !is_left {
                source.vm.kill(VmEnd::Discarded);
                target.vm.kill(VmEnd::Discarded);
            }
            is_left.then_some((source, target, arriving, opened, outgoing))
        });
        let (source, target, arriving, opened, mut outgoing) = attempts.next().unwrap();
        cut(&mut outgoing);
        let lost = target
            .vm
            .wait_for_migration(RESUME_PATIENCE, &[INTERRUPTED]);
        assert_eq!(lost.as_deref(), Some(INTERRUPTED));
        std::thread::scope(|scope| {
            // Whoever waits for it goes on, if this fails.
            let source_end = KilledOnDrop(&source.vm);
            let target_end = KilledOnDrop(&target.vm);
            // All of the guest's memory.
            let whole = json!({ "val": 0, "size": MEMORY_BYTES, "filename": "/dev/null" });
            let qmp = target.vm.qmp().unwrap();
            scope.spawn(|| qmp.execute("pmemsave", whole));
            let deadline = Instant::now() + Duration::from_secs(60);
            let answers = || qmp.execute_within("query-status", json!({}), ASK_PATIENCE);
            while !matches!(answers(), Err(QmpError::Silent { .. })) {
                assert!(Instant::now() < deadline, "it does not wait for a page");
            }
            scope.spawn(|| arriving.follow(&|_| {}));
            go_on(&mut outgoing, &opened);
            let completed = source.vm.wait_for_migration(RESUME_PATIENCE, &ENDED);
            assert_eq!(completed.as_deref(), Some("completed"));
            std::mem::forget(target_end);
            drop(source_end);
        });
        target.vm.resume().unwrap();
        wait_output(&target);
        target.vm.kill(VmEnd::Discarded);
        target.vm.wait();
    }

    fn check_here() -> Result<(), String> {
        crate::bare_qemu::check_post_copy().inspect_err(|missing| eprintln!("skipped: {missing}"))
    }
}
