//! Another part becomes the home, while all threads stand.
//!
//! ```text
//!   home                            successor                        others
//!     what is here goes there
//!     it is the directory of all, and nothing is on its way ([`super::quiescence`])
//!     │─── who holds what (not here) ──▶│                             │                    │
//!     │    … it is decided …            │ is the home                 │                    │
//!     │                                 │─── Succeeded ──────────────▶│ its number is the
//!     │◀─────────── closed ─────────────│◀── Succeeded ───────────────│ home's
//! ```
//!
//! Until the successor says so nothing has changed, and the home may go on
//! ([`DrainedHome::stay`]). Who has heard of it forgets the home that was; so a home that goes on
//! all the same has lost a part, and ends: never do two of them go on.
//!
//! How it is decided, and how the rest of the machine comes to the successor, is not here.

use super::super::peer::Inbound;
use super::super::wire::PeerMessage;
use super::effects::EventContext;
use super::objects::push_move;
use super::quiescence::QuiescenceGuard;
use super::{Listener, MOVES_MAX, Pages, Shared, SpanError, locked};
use keel_wasm::coherence::{Copy, Event, Holdings, PageId, PartId};
use keel_wasm::memory::PAGE_BYTES;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// What was sent away has left within that, or is sent again.
const SENT_WITHIN: Duration = Duration::from_millis(50);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_micros(500);

/// A home that has nothing any more, and where nothing is on its way. Dropping it lets
/// everything go on.
pub struct DrainedHome {
    shared: Arc<Shared>,
    _settled: QuiescenceGuard,
    legacy: Holdings,
}

impl std::fmt::Debug for DrainedHome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Left");
        debug
            .field("rows", &self.legacy.rows.len())
            .finish_non_exhaustive()
    }
}

impl DrainedHome {
    /// Who holds what: for the successor; once.
    pub fn take_legacy(&mut self) -> Holdings {
        std::mem::take(&mut self.legacy)
    }

    /// Another part may be the home from now on: that others end what they have with this
    /// one is no loss, until it is to [`Self::stay`].
    pub fn let_go(&self) {
        self.shared.is_alone.store(true, Ordering::Release);
    }

    /// No other part is the home, nor ever will be: it goes on here.
    ///
    /// # Errors
    /// [`SpanError`], if a part was lost meanwhile, or another one is the home.
    pub fn stay(self) -> Result<(), SpanError> {
        let shared = &self.shared;
        let missed = {
            let mut missed = locked(&shared.missed);
            shared.is_alone.store(false, Ordering::Release);
            missed.take()
        };
        let failure = locked(&shared.state).failure.clone().or(missed);
        let Some(failure) = failure else {
            return Ok(());
        };
        shared.end(failure.clone());
        // (It may have been over already, when nobody was told.)
        shared.listener().over(&failure);
        Err(failure)
    }
}

impl Pages {
    /// What is here goes to a part, and nothing is on its way any more when this returns.
    /// All threads stand, and nobody reads or writes for the host. Only of the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if that takes longer. It goes on as before
    /// then.
    pub fn leave(&self, to: PartId, patience: Duration) -> Result<DrainedHome, SpanError> {
        let shared = &self.shared;
        if !self.others().contains(to) {
            return Err(SpanError::Memory(format!("there is no part {to}")));
        }
        let deadline = Instant::now() + patience;
        loop {
            let (mut rest, mut sent) = (shared.send_rest(to)?, Instant::now());
            while !rest.is_empty() {
                if let Some(failure) = self.failure() {
                    return Err(failure);
                }
                if Instant::now() >= deadline {
                    return Err(SpanError::NotQuiescent { patience });
                }
                std::thread::sleep(LOOK_AGAIN);
                // (To look at all that there is takes a while.)
                let state = locked(&shared.state);
                let coherence = &state.coherence;
                rest.retain(|page| coherence.copy(*page) != Copy::Invalid);
                if rest.is_empty() || sent.elapsed() > SENT_WITHIN {
                    // (Somebody may have sent one here again.)
                    drop(state);
                    (rest, sent) = (shared.send_rest(to)?, Instant::now());
                }
            }
            let settled =
                shared.settle_with_all(deadline.saturating_duration_since(Instant::now()))?;
            // (Others may have sent something here before they heard of it.)
            let legacy = {
                let state = locked(&shared.state);
                if state.cutting.is_some() {
                    return Err(SpanError::CutUnavailable);
                }
                state.coherence.legacy()
            };
            match legacy {
                Ok(legacy) if shared.populated()?.is_empty() => {
                    return Ok(DrainedHome {
                        shared: shared.clone(),
                        _settled: settled,
                        legacy,
                    });
                }
                _ if Instant::now() < deadline => {}
                Ok(_) => return Err(SpanError::NotQuiescent { patience }),
                Err(reason) => return Err(SpanError::Inconsistent(reason)),
            }
        }
    }

    /// This part gives away what it has, to those with most room, or keeps again what parts
    /// keep. Only of the home.
    pub fn give_up_own(&self, gives_up: bool) {
        let keeps = if gives_up { Some(0) } else { self.part_limit() };
        self.shared.limits.set(keeps);
    }

    /// Bytes that are here, with copies of what others have.
    ///
    /// # Errors
    /// [`SpanError::Memory`].
    pub fn resident_bytes(&self) -> Result<u64, SpanError> {
        self.shared.resident()
    }

    /// This part is the home from now on, and this hears what others say to it; all
    /// threads stand, and the home has [left](Self::leave) with this legacy. Returns when
    /// all others know it.
    ///
    /// # Errors
    /// [`SpanError`]; it has ended then.
    pub fn succeed(
        &self,
        legacy: &Holdings,
        listener: Arc<dyn Listener>,
        patience: Duration,
    ) -> Result<(), SpanError> {
        let succeeded = self.try_succeed(legacy, listener, patience);
        if let Err(error) = &succeeded {
            self.shared.end(error.clone());
        }
        succeeded
    }

    fn try_succeed(
        &self,
        legacy: &Holdings,
        listener: Arc<dyn Listener>,
        patience: Duration,
    ) -> Result<(), SpanError> {
        let shared = &self.shared;
        {
            let state = &mut *locked(&shared.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let unknown = legacy.rows.iter().any(|held| {
                !shared.has(PageId {
                    memory: held.memory,
                    number: held.first.saturating_add(held.pages.saturating_sub(1)),
                })
            });
            if unknown {
                return Err(SpanError::Inconsistent(
                    "there are no such pages here".into(),
                ));
            }
            shared.is_succeeding.store(true, Ordering::Release);
            while shared.let_some_go(state)? {}
            shared.no_longer_settle(state);
            state.traffic.forget(PartId::HOME);
            state
                .coherence
                .succeed(legacy)
                .map_err(SpanError::Inconsistent)?;
            // (What may leave from now on is looked up anew: it has more than it had.)
            state.keep = None;
            *shared
                .listener
                .write()
                .unwrap_or_else(PoisonError::into_inner) = listener;
            shared
                .me
                .store(PartId::HOME.number() as u8, Ordering::Release);
        }
        // (Its thread that gave cuts ends.)
        shared.cuts.changed.notify_all();
        shared.others.forget_home();
        shared.limits.forget(PartId::HOME);
        shared.ring();
        shared.tell_all(&PeerMessage::Succeeded)?;
        let others = self.others();
        let deadline = Instant::now() + patience;
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            let heard = shared.others.heard_of_succession();
            let Some(part) = others.iter().find(|part| !heard.contains(*part)) else {
                shared.is_succeeding.store(false, Ordering::Release);
                return Ok(());
            };
            if Instant::now() >= deadline {
                return Err(SpanError::Slow { part, patience });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Shared {
    /// Pages of which something is here, or is said to be: of what nobody has written there
    /// may be nothing in memory.
    fn pages_here(&self) -> Result<BTreeMap<PageId, Copy>, SpanError> {
        let mut here = self.populated()?;
        let coherence = &locked(&self.state).coherence;
        let own = coherence.own();
        here.extend(own.map(|page| (page, coherence.copy(page))));
        Ok(here)
    }

    /// Pages that are here, and in memory.
    fn populated(&self) -> Result<BTreeMap<PageId, Copy>, SpanError> {
        let mut here = BTreeMap::new();
        for (memory, of) in (0..).zip(&self.memories) {
            let ranges = of.memory().populated();
            let ranges = ranges.map_err(|error| SpanError::Memory(error.to_string()))?;
            let state = locked(&self.state);
            for range in ranges {
                let numbers = range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES);
                for number in numbers {
                    // (A memory of 64 GiB has 16 million.)
                    let number = number as u32;
                    let page = PageId { memory, number };
                    match state.coherence.copy(page) {
                        Copy::Invalid => {}
                        copy => drop(here.insert(page, copy)),
                    }
                }
            }
        }
        Ok(here)
    }

    /// What is still here goes to a part; which pages those are.
    fn send_rest(&self, to: PartId) -> Result<Vec<PageId>, SpanError> {
        let here: Vec<(PageId, Copy)> = self.pages_here()?.into_iter().collect();
        for some in here.chunks(MOVES_MAX) {
            let mut events = Vec::new();
            for (page, copy) in some {
                match copy {
                    // (Others have it.)
                    Copy::Shared => {
                        let page = *page;
                        events.push((Event::Drop { page }, EventContext::Nothing));
                    }
                    _ => push_move(&mut events, *page, to),
                }
            }
            self.step(events);
        }
        Ok(here.into_iter().map(|(page, _)| page).collect())
    }

    /// A part says that it is the home; or, to the home, that it knows it is. Who was it is
    /// not heard any more.
    pub(super) fn hear_succeeded(&self, heard: &mut Inbound) -> Result<(), SpanError> {
        let from = heard.part();
        if self.is_home() {
            self.others.knows_succession(from);
            return Ok(());
        }
        if from == PartId::HOME {
            let reason = "it says that it succeeds itself".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        // (Until the new home says what parts keep: others may not have heard of it.)
        self.is_succeeding.store(true, Ordering::Release);
        self.step(vec![(Event::Succeeded { by: from }, EventContext::Nothing)]);
        self.others.succeed_home(from);
        self.end_cut();
        heard.is_now(PartId::HOME);
        self.limits.rename(from, PartId::HOME);
        // (It does not know what is here.)
        self.limits.tell_again();
        self.tell_part(PartId::HOME, &PeerMessage::Succeeded)
    }
}
