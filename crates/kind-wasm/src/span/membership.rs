//! Adding and removing parts while a machine spans, at its home. Threads of all other
//! parts run on; the machine is stopped only while the set of members changes.
//!
//! ```text
//!   join    all members know it ─▶ the home knows it ─▶ memories grow to size ─▶ welcome
//!   leave   threads leave ─▶ pages to the parts with most room ─▶ the rest home ─▶ removed
//! ```
//!
//! Starting parts and connecting them happens elsewhere.

use super::home_and_member::{Home, POLL_INTERVAL, SpanningError, locked};
use super::pages::SpanError;
use super::peer::PeerConnections;
use keel_wasm::coherence::PartId;
use keel_wasm::runtime::MachineError;
use std::time::{Duration, Instant};

/// At most this many bytes of a leaving part are brought home at the end.
const LAST_BYTES: u64 = 4 << 20;
/// How long a leaving part may make no progress before the rest is brought home, or the
/// part stays because the rest is too much.
const NO_PROGRESS_MAX: Duration = Duration::from_secs(2);
/// Minimum time limit for its last pages.
const EMPTY_TIMEOUT_MIN: Duration = Duration::from_secs(10);
/// Time limit for threads to reach a safepoint.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);

impl Home {
    /// Adds a part that all other members know already; `ends` has the connections to it.
    /// Returns the downtime.
    ///
    /// # Errors
    /// [`SpanningError`]; the members are then as before, unless one was lost.
    pub fn join(
        &self,
        part: PartId,
        ends: PeerConnections,
        patience: Duration,
    ) -> Result<Duration, SpanningError> {
        self.pages().join(part, ends)?;
        // From here on the loss of the part ends the machine: threads may be on their way
        // to it.
        let begun = self.pages().await_started(part, patience);
        let with = self.members().with(part);
        let joined = begun
            .map_err(SpanningError::from)
            .and_then(|()| self.set_members(with, patience));
        match joined {
            Ok(downtime) => {
                self.pages().welcome(part)?;
                Ok(downtime)
            }
            Err(error) if self.pages().others().contains(part) => {
                self.pages().remove_part(part)?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Removes a part: its threads move to the home or another part, its memory to the
    /// parts with most room, and it ends. Returns the downtime.
    ///
    /// # Errors
    /// [`SpanningError`]; the part then stays, unless one was lost, with some of its
    /// threads and memory elsewhere. A part that was too slow can only be removed again.
    pub fn remove_part(
        &self,
        part: PartId,
        threads_to: PartId,
        patience: Duration,
    ) -> Result<Duration, SpanningError> {
        if !self.members().contains(part) || threads_to == part {
            return Err(MachineError::NoPart(part).into());
        }
        let deadline = Instant::now() + patience;
        self.set_leaving(part, true);
        let ready = match locked(&self.emptied).contains(part) {
            true => Ok(()),
            false => self
                .collect_directories(patience)
                .and_then(|()| self.make_ready(part, threads_to, deadline)),
        };
        if let Err(error) = ready {
            self.set_leaving(part, false);
            self.pages().pin_directories(false);
            self.pages().welcome(part)?;
            return Err(error);
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        self.empty(part, rest.max(EMPTY_TIMEOUT_MIN))?;
        let downtime = self.set_members(self.members().without(part), FREEZE_TIMEOUT)?;
        self.set_leaving(part, false);
        self.pages().remove_part(part)?;
        let mut emptied = locked(&self.emptied);
        *emptied = emptied.without(part);
        Ok(downtime)
    }

    /// Brings a part's pages home. This cannot be undone: the part's requests for pages
    /// are no longer served.
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

    /// Makes the home the directory of all pages until directories may move again,
    /// because a leaving part must not be asked. Directories that moved are brought back
    /// while threads run; then all threads stop for some round trips.
    ///
    /// # Errors
    /// [`SpanningError`].
    pub(super) fn collect_directories(&self, patience: Duration) -> Result<(), SpanningError> {
        if !self.pages().pin_directories(true) {
            return Ok(());
        }
        self.pages().recall_directories(patience)?;
        self.machine().freeze(patience.min(FREEZE_TIMEOUT))?;
        let brought = self.pages().collect_directories(FREEZE_TIMEOUT);
        if let Err(error) = self.machine().thaw() {
            // A thread could not be started, or the machine was ended: then it ends with
            // this error.
            tracing::warn!(%error, "cannot resume after collecting directories");
        }
        Ok(brought?)
    }

    /// Waits until a part has no threads and so little memory that the rest can be
    /// brought home.
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
                // The part enumerates its pages before it reports.
                if now >= deadline {
                    let patience = now.duration_since(last.1);
                    return Err(SpanError::Slow { part, patience }.into());
                }
                std::thread::sleep(POLL_INTERVAL);
                continue;
            };
            if bytes <= LAST_BYTES {
                return Ok(());
            }
            if bytes < last.0 {
                last = (bytes, now);
            } else if now >= deadline || now.duration_since(last.1) > NO_PROGRESS_MAX {
                // No other part takes it. Read copies need no room at home.
                return match self.pages().has_room_for(bytes) {
                    true => Ok(()),
                    false => Err(SpanError::Full { part, bytes }.into()),
                };
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Moves threads to another part, and waits until they have left or the deadline
    /// passes.
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
            // A thread that is only on its way there stays where it is.
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
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}
