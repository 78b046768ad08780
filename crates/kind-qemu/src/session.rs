//! A move, at its source: QEMU's migration while the guest runs, then the rest of it with the
//! guest stopped, and the output.

use crate::attempt::{undo, undo_later};
use crate::channel::{Channel, Use};
use crate::disk_copy::{DiskProgress, OutgoingDisk};
use crate::guest::Guest;
use crate::migration::{Outgoing, Sent};
use crate::migration_status::{Ram, SWITCHOVER};
use crate::post_copy;
use crate::process::VmEnd;
use crate::qmp::QmpError;
use keel_cluster::{Epoch, MachineName};
use keel_machine::failpoint;
use keel_machine::link::{
    HELLO_VERSION, Hello, Link, LinkError, Message, Purpose, TargetEndpoint, use_frozen_timeout,
};
use keel_machine::moves::convergence::{self, CopyDecision};
use keel_machine::moves::{FillReport, Phase, Progress, Round};
use keel_machine::worker::control::{Copy, CopyEvent, Frozen};
use keel_machine::worker::{LogSource, MoveError, SourceSession};
use keel_net::PinnedIdentity;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

/// How long a freeze waits for the answer of a guest agent that is on its way.
const QUIET_PATIENCE: Duration = Duration::from_millis(200);

/// What may always be left of a disk when the guest is stopped, in bytes.
const DISK_REST_BYTES: u64 = 1 << 20;
/// How long it may take until less is left of a disk than ever before.
const DISK_PATIENCE: Duration = Duration::from_secs(60);
/// How long the target's disk may take until it has what was written to it.
const FLUSH_PATIENCE: Duration = Duration::from_secs(600);
/// How often output is sent while a disk is copied.
const OUTPUT_INTERVAL: Duration = Duration::from_secs(1);
/// Why an attempt ends that its agent has left.
const NOBODY_WAITS: &str = "nobody waits for this move any more";

/// How often QEMU is asked how far it is.
const POLL: Duration = Duration::from_millis(20);
/// How often, where memory is to follow the guest and a part of it is left (a divisor): a fast link sends
/// the rest in little time, and what follows must not be sent before.
const NEAR_POLL: Duration = Duration::from_millis(2);
const NEAR_THE_END: u64 = 4;
/// One attempt to move a machine.
pub(crate) struct QemuSession {
    guest: Guest,
    output: LogSource,
    /// Unless the migration has it.
    link: Option<Link>,
    target: TargetEndpoint,
    has_root_disk: bool,
    /// Whether memory may follow the guest.
    post_copy: bool,
    disk: Option<CopiedDisk>,
    closer: TcpStream,
    outgoing: Option<Outgoing>,
    budget: Duration,
    /// Its number, of the attempts with this guest.
    attempt: u64,
    /// The guest was stopped for the commit: whoever settles that lets it run on.
    is_frozen: bool,
    /// Nothing of it is left in QEMU.
    is_cancelled: bool,
    /// QEMU was told to let the guest go ahead of its memory: it cannot run here any more.
    has_gone_ahead: bool,
}

impl QemuSession {
    /// Connects to the target.
    pub(crate) fn connect(
        name: MachineName,
        epoch: Epoch,
        guest: Guest,
        has_root_disk: bool,
        identity: &PinnedIdentity,
        copy: &Copy,
    ) -> Result<Self, MoveError> {
        failpoint::pass("source.connect")?;
        let hello = Hello {
            version: HELLO_VERSION,
            machine: name,
            epoch,
            program: None,
            log_base: guest.log.base(),
            post_copy: copy.post_copy,
            purpose: Purpose::Move,
        };
        let target = copy.target.target(identity, hello)?;
        let link = target.connect(Purpose::Move)?;
        let closer = link.closer()?;
        // From here on this attempt undoes what it and earlier ones do.
        let attempt = guest.vm.begin_attempt();
        Ok(QemuSession {
            output: LogSource::new(guest.log.clone()),
            closer,
            guest,
            link: Some(link),
            target,
            has_root_disk,
            post_copy: copy.post_copy,
            disk: None,
            outgoing: None,
            budget: Duration::from_micros(copy.budget_micros),
            attempt,
            is_frozen: false,
            is_cancelled: false,
            has_gone_ahead: false,
        })
    }

    fn link(&mut self) -> Result<&mut Link, MoveError> {
        let link = self.link.as_mut();
        link.ok_or_else(|| "the migration has the connection".into())
    }

    /// Sends the output that there is.
    fn send_output(&mut self) -> Result<(), MoveError> {
        let link = self.link.as_mut().ok_or("there is no connection")?;
        self.output.send(link)?;
        link.send(&Message::RoundEnd)?;
        link.flush()?;
        failpoint::pass("source.round")?;
        match self.output.round_answer(link)? {
            Message::RoundDone => Ok(()),
            other => Err(LinkError::Message(format!("{other:?} out of turn")).into()),
        }
    }

    /// Copies the machine's own disk until what is left can be copied while it stands still.
    fn copy_disk(
        &mut self,
        channel: Channel,
        tell: &mut dyn FnMut(CopyEvent) -> bool,
    ) -> Result<(), MoveError> {
        let vm = &self.guest.vm;
        let disk = vm.during(self.attempt, || OutgoingDisk::begin(vm, channel))?;
        self.disk = Some(CopiedDisk::new(disk, self.budget));
        let mut said = Instant::now();
        while let Some(disk) = &mut self.disk
            && !disk.fits()?
        {
            let (copied, bytes_per_s) = (disk.progress, disk.bytes_per_s());
            let told = tell(CopyEvent::Progress(Progress {
                sent_bytes: copied.copied_bytes,
                remaining_bytes: copied.left_bytes,
                bytes_per_s: bytes_per_s as u64,
                ..Progress::of(Phase::Copy)
            }));
            if !told {
                return Err(NOBODY_WAITS.into());
            }
            // The target waits for a few seconds until it takes a silent source for lost.
            if said.elapsed() > OUTPUT_INTERVAL {
                self.send_output()?;
                said = Instant::now();
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Copies output, disk and memory.
    fn copy_all(
        &mut self,
        tell: &mut dyn FnMut(CopyEvent) -> bool,
    ) -> Result<Vec<Round>, MoveError> {
        failpoint::pass("source.hello")?;
        let channel = match self.has_root_disk {
            true => Some(Channel::connect(&self.target, Use::Disk)?),
            false => None,
        };
        self.send_output()?;
        if let Some(channel) = channel {
            self.copy_disk(channel, tell)?;
            self.send_output()?;
        }
        let rounds = self.copy_rounds(tell)?;
        failpoint::pass("source.converged")?;
        Ok(rounds)
    }

    /// Begins the migration of memory and devices.
    fn begin_migration(&mut self) -> Result<Outgoing, MoveError> {
        if self.post_copy {
            let channel = Channel::connect(&self.target, Use::Memory)?;
            let vm = &self.guest.vm;
            return vm.during(self.attempt, || Outgoing::begin_to_follow(vm, channel));
        }
        let link = self.link.take().ok_or("the connection is in use")?;
        let vm = &self.guest.vm;
        vm.during(self.attempt, || Outgoing::begin(vm, link))
    }

    /// Copies until little is left; or, if memory may follow the guest, all but little of it once.
    fn copy_rounds(
        &mut self,
        tell: &mut dyn FnMut(CopyEvent) -> bool,
    ) -> Result<Vec<Round>, MoveError> {
        let outgoing = self.begin_migration()?;
        self.outgoing = Some(outgoing);
        let mut rounds = Rounds::default();
        let mut said = Instant::now();
        let mut poll = POLL;
        loop {
            let outgoing = self.outgoing.as_ref().ok_or("there is no migration")?;
            let is_over = self
                .guest
                .vm
                .wait_for_migration(poll, &[SWITCHOVER, "failed"]);
            let info = outgoing.info()?;
            if is_over.is_some() {
                // QEMU has stopped the guest itself.
                return Ok(rounds.done);
            }
            let disk_fits = self.disk.as_mut().map_or(Ok(true), CopiedDisk::fits)?;
            let has_ended = rounds.take(info.ram);
            if self.post_copy && info.ram.remaining < info.ram.total / NEAR_THE_END {
                poll = NEAR_POLL;
            }
            if self.post_copy && disk_fits && (has_ended || outgoing.waits_to_follow(info.ram)?) {
                return Ok(rounds.done);
            }
            // The target waits for a few seconds until it takes a silent source for lost; where memory
            // has a channel of its own, this connection is silent.
            let is_time = self.post_copy && said.elapsed() > OUTPUT_INTERVAL;
            if is_time {
                said = Instant::now();
                self.send_output()?;
            }
            if !has_ended && !is_time {
                continue;
            }
            let memory = convergence::next(&rounds.done, info.ram.remaining, self.budget);
            if has_ended && memory == CopyDecision::Freeze && disk_fits {
                return Ok(rounds.done);
            }
            let told = tell(CopyEvent::Progress(Progress {
                round: u32::try_from(rounds.done.len()).unwrap_or(u32::MAX),
                sent_bytes: info.ram.transferred,
                remaining_bytes: info.ram.remaining,
                bytes_per_s: convergence::best_rate(&rounds.done) as u64,
                ..Progress::of(Phase::Copy)
            }));
            if !told {
                return Err(NOBODY_WAITS.into());
            }
        }
    }
}

/// A disk that is copied while the machine runs, and whether that has a purpose.
struct CopiedDisk {
    disk: OutgoingDisk,
    budget: Duration,
    begun: Instant,
    progress: DiskProgress,
    /// When less was left than ever before, how much, and how much was copied.
    best: (Instant, u64, u64),
}

impl CopiedDisk {
    fn new(disk: OutgoingDisk, budget: Duration) -> Self {
        let begun = Instant::now();
        CopiedDisk {
            disk,
            budget,
            begun,
            progress: DiskProgress::default(),
            best: (begun, u64::MAX, 0),
        }
    }

    fn bytes_per_s(&self) -> f64 {
        self.progress.copied_bytes as f64 / self.begun.elapsed().as_secs_f64()
    }

    /// Whether what is left can be copied while the machine stands still.
    ///
    /// # Errors
    /// If the copy has failed, or does not come to an end.
    fn fits(&mut self) -> Result<bool, MoveError> {
        let before = std::mem::replace(&mut self.progress, self.disk.progress()?);
        let now = self.progress;
        let rest_max = (self.bytes_per_s() * self.budget.as_secs_f64()) as u64;
        if now.is_copied && now.left_bytes <= rest_max.max(DISK_REST_BYTES) {
            self.best = (Instant::now(), u64::MAX, now.copied_bytes);
            return Ok(true);
        }
        let (since, least_bytes, copied_bytes) = self.best;
        if now.left_bytes < least_bytes || now.is_copied && !before.is_copied {
            self.best = (Instant::now(), now.left_bytes, now.copied_bytes);
            return Ok(false);
        }
        // The target's disk has to take what is on its way, before all was copied once.
        let patience = match now.left_bytes == 0 && !now.is_copied {
            true => FLUSH_PATIENCE,
            false => DISK_PATIENCE,
        };
        match since.elapsed() > patience {
            false => Ok(false),
            true if now.copied_bytes > copied_bytes => {
                Err("its system writes its disk faster than it is copied".into())
            }
            true => Err("its disk is not copied any further".into()),
        }
    }
}

/// The rounds of a migration: each ends when QEMU looks up what was written meanwhile.
#[derive(Default)]
struct Rounds {
    done: Vec<Round>,
    seen: Option<(Ram, Instant)>,
}

impl Rounds {
    /// Whether a round has ended.
    fn take(&mut self, ram: Ram) -> bool {
        let now = Instant::now();
        let Some((before, since)) = self.seen else {
            self.seen = Some((ram, now));
            return false;
        };
        if ram.rounds == before.rounds {
            return false;
        }
        self.done.push(Round {
            bytes: ram.transferred.saturating_sub(before.transferred),
            micros: micros(now - since),
        });
        self.seen = Some((ram, now));
        true
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl SourceSession for QemuSession {
    fn closer(&self) -> Result<TcpStream, MoveError> {
        Ok(self.closer.try_clone()?)
    }

    fn copy(&mut self, tell: &mut dyn FnMut(CopyEvent) -> bool) -> Result<(), MoveError> {
        match self.copy_all(tell) {
            Ok(rounds) => {
                tell(CopyEvent::Converged {
                    rounds,
                    slowed: false,
                });
                Ok(())
            }
            Err(error) => {
                if let Err(later) = self.cancel() {
                    tracing::warn!(error = %later, "a failed move is not undone yet");
                    undo_later(self.guest.vm.clone(), self.attempt, self.is_frozen);
                }
                Err(error)
            }
        }
    }

    fn freeze_and_send(&mut self) -> Result<Frozen, MoveError> {
        failpoint::pass("source.freeze")?;
        // An answer that is on its way when the guest stops would get lost; the next request finds the
        // agent at the target.
        let agent = self.guest.vm.agent();
        let quiet = agent.and_then(|agent| agent.quiet(QUIET_PATIENCE));
        // What is typed from here on is refused, and typed at the target.
        let untyped = self.guest.console.quiet();
        let begun = Instant::now();
        let outgoing = self.outgoing.take().ok_or("nothing was copied")?;
        let ram = outgoing.info().map(|info| info.ram).unwrap_or_default();
        let vm = &self.guest.vm;
        self.is_frozen = true;
        let paused = vm.during(self.attempt, || match self.post_copy {
            true => outgoing.stop_to_follow(),
            false => Ok(vm.pause().map(|()| Sent::All)?),
        });
        drop((quiet, untyped));
        let sent = match paused {
            Ok(sent) => sent,
            Err(error) => {
                self.outgoing = Some(outgoing);
                return Err(match vm.has_ended() {
                    true => "the machine has ended".into(),
                    false => error,
                });
            }
        };
        // QEMU may have stopped it itself, a while ago.
        let freeze_micros = micros(vm.stopped_for().unwrap_or_default().max(begun.elapsed()));
        if let Err(error) = failpoint::pass("source.frozen") {
            self.outgoing = Some(outgoing);
            return Err(error.into());
        }
        use_frozen_timeout(&self.closer)?;
        let begun_rest = Instant::now();
        let disk = self.disk.as_ref().map(|it| &it.disk);
        if let Err(error) = outgoing.reach_devices(&self.guest.console, disk) {
            self.outgoing = Some(outgoing);
            return Err(error);
        }
        if sent == Sent::Most {
            if !outgoing.is_connected() {
                self.outgoing = Some(outgoing);
                return Err("the connection for its memory is lost".into());
            }
            // The devices go with the guest: from then on it cannot run here any more.
            self.outgoing = Some(outgoing);
        } else if let Err(error) = outgoing.send_devices() {
            self.outgoing = Some(outgoing);
            return Err(error.into());
        } else {
            let (link, finished) = outgoing.finish();
            self.link = link.or(self.link.take());
            finished?;
        }
        let beside_bytes = match self.post_copy {
            true => ram.transferred,
            false => 0,
        };
        let link = self.link.as_mut().ok_or("there is no connection")?;
        failpoint::pass("source.last-pages")?;
        let last_pages_micros = micros(begun_rest.elapsed());
        let state = Instant::now();
        link.send(&Message::Frozen)?;
        self.output.send(link)?;
        link.send(&Message::ImageEnd)?;
        link.flush()?;
        failpoint::pass("source.image")?;
        self.output.wait_prepared(link)?;
        failpoint::pass("source.prepared")?;
        // From here on the store decides, however long that takes.
        link.wait_without_timeout()?;
        Ok(Frozen {
            freeze_micros,
            last_pages_micros,
            last_bytes: ram.remaining,
            state_micros: micros(state.elapsed()),
            bytes: link.sent_bytes().saturating_add(beside_bytes),
        })
    }

    fn go(&mut self, epoch: Epoch) -> Result<(), MoveError> {
        failpoint::pass("source.go")?;
        if let Some(outgoing) = &self.outgoing
            && !self.has_gone_ahead
        {
            if !outgoing.is_connected() {
                return Err("the connection for its memory is lost".into());
            }
            let vm = &self.guest.vm;
            let sent = vm.during(self.attempt, || Ok(outgoing.send_devices()))?;
            // What was refused was not done.
            self.has_gone_ahead = !matches!(sent, Err(QmpError::Refused { .. }));
            sent?;
        }
        let link = self.link()?;
        link.send(&Message::Go(epoch))?;
        link.flush()?;
        match link.receive()? {
            Message::Resumed(_) => Ok(failpoint::pass("source.gone")?),
            other => Err(LinkError::Message(format!("{other:?} out of turn")).into()),
        }
    }

    fn serve(mut self, unsent: &AtomicU64) -> FillReport {
        match self.outgoing.take() {
            Some(outgoing) => post_copy::follow(outgoing, &self.target, unsent),
            // Everything was sent before the machine resumed.
            None => FillReport::default(),
        }
    }

    fn cancel(&mut self) -> Result<(), MoveError> {
        if self.is_cancelled {
            return Ok(());
        }
        if self.has_gone_ahead {
            let reason = "it went ahead of its memory to a node that lost it (post-copy)";
            self.guest.vm.kill(VmEnd::Failed(reason.into()));
            return Err("the machine has ended".into());
        }
        // What is on its way to a target that does not answer ends with an error.
        self.disk = None;
        undo(&self.guest.vm, self.attempt, self.is_frozen)?;
        self.is_cancelled = true;
        Ok(())
    }

    fn abort(mut self, reason: &str) {
        self.disk = None;
        if !self.is_cancelled && !self.has_gone_ahead {
            undo_later(self.guest.vm.clone(), self.attempt, self.is_frozen);
        }
        if let Some(outgoing) = self.outgoing.take() {
            // It was cancelled.
            self.link = outgoing.into_link().or(self.link.take());
        }
        // The target notices in any case when the connection closes.
        if let Some(link) = &mut self.link {
            let _ = link.send(&Message::Abort(reason.to_owned()));
            let _ = link.flush();
        }
        let _ = self.closer.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration_status::Info;
    use crate::vm::tests::{is_running, launched};
    use serde_json::json;
    use std::os::unix::net::UnixListener;

    /// An attempt that was given up late cannot undo what it did, since another one has begun; that
    /// one does.
    #[test]
    fn the_next_attempt_undoes_what_the_last_one_left() {
        let folder = tempfile::tempdir().unwrap();
        let Some(vm) = launched(folder.path()) else {
            return;
        };
        vm.resume().unwrap();
        let first = vm.begin_attempt();
        // Its stream is not read, so it goes on.
        let listener = UnixListener::bind(folder.path().join("stream")).unwrap();
        let qmp = vm.qmp().unwrap();
        qmp.execute("migrate", json!({ "uri": "unix:stream" }))
            .unwrap();
        let _stream = listener.accept().unwrap();
        vm.pause().unwrap();
        let second = vm.begin_attempt();
        assert!(undo(&vm, first, false).is_err());
        assert!(!is_running(&vm));
        undo(&vm, second, false).unwrap();
        assert!(is_running(&vm));
        let info: Info = qmp.query("query-migrate").unwrap();
        assert_eq!(info.status, "cancelled");
        // Where nothing is left to undo, nothing happens.
        undo(&vm, second, false).unwrap();
        assert!(is_running(&vm));
        vm.kill(VmEnd::Discarded);
        vm.wait();
    }
}
