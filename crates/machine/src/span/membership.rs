//! Parts that come and go while a machine spans, at its home. All others go on; the
//! machine stands for the moment in which its threads may, or may not, be somewhere.
//!
//! ```text
//!   comes   all others know it ─▶ so does the home ─▶ memories as large as there ─▶ welcome
//!   goes    threads leave ─▶ pages to where most room is ─▶ the rest home ─▶ forgotten
//! ```
//!
//! Who starts parts and connects them is not here.

use super::pages::SpanError;
use super::peer::PeerConnections;
use super::threads::{Home, LOOK_AGAIN, SpanningError, locked};
use keel_wasm::coherence::PartId;
use keel_wasm::runtime::MachineError;
use std::time::{Duration, Instant};

/// While this is not exceeded a part's last pages are brought home.
const LAST_BYTES: u64 = 4 << 20;
/// How long nothing may leave a part that is to go, before the rest is brought home, or it
/// stays, where that is too much.
const STILL: Duration = Duration::from_secs(2);
/// How long its last pages may take at least.
const EMPTY_WITHIN: Duration = Duration::from_secs(10);
/// How long threads may take to a safepoint.
const STAND_WITHIN: Duration = Duration::from_secs(5);

impl Home {
    /// A part that all other members know already is one of them, too; `ends` has the
    /// connections to it. How long the machine stood still.
    ///
    /// # Errors
    /// [`SpanningError`]; it has the members that it had then, unless one was lost.
    pub fn join(
        &self,
        part: PartId,
        ends: PeerConnections,
        patience: Duration,
    ) -> Result<Duration, SpanningError> {
        self.pages().join(part, ends)?;
        // (From here on its end is the machine's: threads may be on their way.)
        let begun = self.pages().await_begun(part, patience);
        let with = self.members().with(part);
        let joined = begun
            .map_err(SpanningError::from)
            .and_then(|()| self.set_members(with, patience));
        match joined {
            Ok(stood) => {
                self.pages().welcome(part)?;
                Ok(stood)
            }
            Err(error) if self.pages().others().contains(part) => {
                self.pages().part_with(part)?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// A part is none any more: its threads go on at the home, or at another part, and so
    /// does its memory, where most room is; it ends. How long the machine stood still.
    ///
    /// # Errors
    /// [`SpanningError`]; it stays then, unless one was lost, with some of its threads and of
    /// its memory elsewhere. Where it was too slow it can only be tried again.
    pub fn part_with(
        &self,
        part: PartId,
        threads_to: PartId,
        patience: Duration,
    ) -> Result<Duration, SpanningError> {
        if !self.members().contains(part) || threads_to == part {
            return Err(MachineError::NoPart(part).into());
        }
        let deadline = Instant::now() + patience;
        self.let_leave(part, true);
        let ready = match locked(&self.emptied).contains(part) {
            true => Ok(()),
            false => self
                .bring_directories(patience)
                .and_then(|()| self.make_ready(part, threads_to, deadline)),
        };
        if let Err(error) = ready {
            self.let_leave(part, false);
            self.pages().keep_directories(false);
            self.pages().welcome(part)?;
            return Err(error);
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        self.empty(part, rest.max(EMPTY_WITHIN))?;
        let stood = self.set_members(self.members().without(part), STAND_WITHIN)?;
        self.let_leave(part, false);
        self.pages().part_with(part)?;
        let mut emptied = locked(&self.emptied);
        *emptied = emptied.without(part);
        Ok(stood)
    }

    /// Has a part's pages come home. It has no way back: what it asks for it does not get.
    ///
    /// # Errors
    /// [`SpanError`].
    pub(super) fn empty(&self, part: PartId, patience: Duration) -> Result<(), SpanError> {
        {
            let mut emptied = locked(&self.emptied);
            *emptied = emptied.with(part);
        }
        self.pages().empty(part, PartId::HOME, patience)
    }

    /// The home is the directory of all from now on, until directories may move again: nobody
    /// asks a part that goes. Where they moved they come while threads run, and then all
    /// stand for some round trips.
    ///
    /// # Errors
    /// [`SpanningError`].
    pub(super) fn bring_directories(&self, patience: Duration) -> Result<(), SpanningError> {
        if !self.pages().keep_directories(true) {
            return Ok(());
        }
        self.pages().call_directories(patience)?;
        self.machine().freeze(patience.min(STAND_WITHIN))?;
        let brought = self.pages().bring_directories(STAND_WITHIN);
        if let Err(error) = self.machine().thaw() {
            // (A thread that could not be launched, or it was ended: then it ends with this.)
            tracing::warn!(%error, "directories were brought");
        }
        Ok(brought?)
    }

    /// Until a part has no threads, and so little memory that the rest can come home.
    fn make_ready(
        &self,
        part: PartId,
        threads_to: PartId,
        deadline: Instant,
    ) -> Result<(), SpanningError> {
        self.send_threads(|at| at == part, threads_to, deadline, &mut || true)?;
        self.pages().give_up(part)?;
        let mut last = (u64::MAX, Instant::now());
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure.into());
            }
            let now = Instant::now();
            let Some(bytes) = self.pages().resident_of(part) else {
                // (It looks through all that it has before it says something.)
                if now >= deadline {
                    let patience = now.duration_since(last.1);
                    return Err(SpanError::Slow { part, patience }.into());
                }
                std::thread::sleep(LOOK_AGAIN);
                continue;
            };
            if bytes <= LAST_BYTES {
                return Ok(());
            }
            if bytes < last.0 {
                last = (bytes, now);
            } else if now >= deadline || now.duration_since(last.1) > STILL {
                // Nobody else takes it. (Copies of what others have do not come.)
                return match self.pages().has_room_for(bytes) {
                    true => Ok(()),
                    false => Err(SpanError::Full { part, bytes }.into()),
                };
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Has threads go on elsewhere, and waits until they have left, as long as it is to.
    ///
    /// # Errors
    /// [`SpanningError`].
    pub(super) fn send_threads(
        &self,
        are_at: impl Fn(PartId) -> bool,
        to: PartId,
        deadline: Instant,
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), SpanningError> {
        loop {
            let threads = self.machine().thread_infos().into_iter();
            // (One that is only on its way there stays where it is.)
            let those = threads.filter(|it| are_at(it.part) || it.moves_to.is_some_and(&are_at));
            let those: Vec<u32> = those.map(|it| it.tid).collect();
            if those.is_empty() {
                return Ok(());
            }
            if let Some(failure) = self.failure() {
                return Err(failure.into());
            }
            if !goes_on() {
                return Err(SpanError::Ended.into());
            }
            if Instant::now() >= deadline {
                return Err(SpanningError::Away(those.len()));
            }
            for tid in those {
                match self.machine().move_thread(tid, to) {
                    Ok(()) | Err(MachineError::NoThread(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}
