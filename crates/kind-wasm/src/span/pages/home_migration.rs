//! Home migration at the level of pages: another part becomes the home while all threads
//! are stopped.
//!
//! ```text
//!   home                            successor                        others
//!     sends its pages away
//!     is the directory of all pages; no message is in flight ([`super::quiescence`])
//!     │─── directory (not here) ───────▶│                             │                    │
//!     │    … commit …                   │ is the home                 │                    │
//!     │                                 │─── Succeeded ──────────────▶│ its number is the
//!     │◀─────────── closed ─────────────│◀── Succeeded ───────────────│ home's
//! ```
//!
//! Until the successor announces itself nothing has changed, and the home may resume
//! ([`DrainedHome::cancel`]). A part that has heard the announcement forgets the former
//! home; a home that resumes nevertheless has lost a part and ends. So two homes never
//! run.
//!
//! The decision and the transfer of the machine's image happen elsewhere.

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

/// Pages that were sent away have left within this time, or are sent again.
const SEND_TIMEOUT: Duration = Duration::from_millis(50);
/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_micros(500);

/// A home that holds no pages, with no message in flight. Dropping it lets all parts go
/// on.
pub struct DrainedHome {
    shared: Arc<Shared>,
    _settled: QuiescenceGuard,
    holdings: Holdings,
}

impl std::fmt::Debug for DrainedHome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Left");
        debug
            .field("rows", &self.holdings.rows.len())
            .finish_non_exhaustive()
    }
}

impl DrainedHome {
    /// The directory state for the successor; can be taken once.
    pub fn take_holdings(&mut self) -> Holdings {
        std::mem::take(&mut self.holdings)
    }

    /// Another part may become the home from now on: closed connections are not a loss
    /// unless [`Self::cancel`] is called.
    pub fn release(&self) {
        self.shared.is_alone.store(true, Ordering::Release);
    }

    /// Cancels the migration: no other part is the home or will be, and this part goes
    /// on.
    ///
    /// # Errors
    /// [`SpanError`] if a part was lost meanwhile, or another part is the home.
    pub fn cancel(self) -> Result<(), SpanError> {
        let shared = &self.shared;
        let ignored_loss = {
            let mut ignored_loss = locked(&shared.ignored_loss);
            shared.is_alone.store(false, Ordering::Release);
            ignored_loss.take()
        };
        let failure = locked(&shared.state).failure.clone().or(ignored_loss);
        let Some(failure) = failure else {
            return Ok(());
        };
        shared.end(failure.clone());
        // The part may have ended earlier, when the listener was not told.
        shared.listener().over(&failure);
        Err(failure)
    }
}

impl Pages {
    /// Moves all pages to a part and waits for quiescence. All threads must be stopped,
    /// and the host must not access memory. Called at the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] at the deadline. The home then goes on
    /// as before.
    pub fn leave(&self, to: PartId, patience: Duration) -> Result<DrainedHome, SpanError> {
        let shared = &self.shared;
        if !self.others().contains(to) {
            return Err(SpanError::Memory(format!("there is no part {to}")));
        }
        let deadline = Instant::now() + patience;
        loop {
            let (mut rest, mut sent) = (shared.send_remaining(to)?, Instant::now());
            while !rest.is_empty() {
                if let Some(failure) = self.failure() {
                    return Err(failure);
                }
                if Instant::now() >= deadline {
                    return Err(SpanError::NotQuiescent { patience });
                }
                std::thread::sleep(POLL_INTERVAL);
                // Enumerating all pages takes a while.
                let state = locked(&shared.state);
                let coherence = &state.coherence;
                rest.retain(|page| coherence.copy(*page) != Copy::Invalid);
                if rest.is_empty() || sent.elapsed() > SEND_TIMEOUT {
                    // A page may have been sent back here.
                    drop(state);
                    (rest, sent) = (shared.send_remaining(to)?, Instant::now());
                }
            }
            let settled = shared
                .quiesce_with_directories(deadline.saturating_duration_since(Instant::now()))?;
            // Other parts may have sent pages here before they knew.
            let holdings = {
                let state = locked(&shared.state);
                if state.cut_state.is_some() {
                    return Err(SpanError::CutUnavailable);
                }
                state.coherence.holdings()
            };
            match holdings {
                Ok(holdings) if shared.populated()?.is_empty() => {
                    return Ok(DrainedHome {
                        shared: shared.clone(),
                        _settled: settled,
                        holdings,
                    });
                }
                _ if Instant::now() < deadline => {}
                Ok(_) => return Err(SpanError::NotQuiescent { patience }),
                Err(reason) => return Err(SpanError::Inconsistent(reason)),
            }
        }
    }

    /// Makes this part move its pages to the parts with most room, or restores its limit.
    /// Called at the home.
    pub fn drain_self(&self, gives_up: bool) {
        let keeps = if gives_up { Some(0) } else { self.part_limit() };
        self.shared.limits.set(keeps);
    }

    /// Resident bytes, with read copies.
    ///
    /// # Errors
    /// [`SpanError::Memory`].
    pub fn resident_bytes(&self) -> Result<u64, SpanError> {
        self.shared.resident()
    }

    /// Makes this part the home, with `listener` for its messages. All threads are
    /// stopped, and the home has [left](Self::leave) with this directory state. Returns
    /// when all other parts know.
    ///
    /// # Errors
    /// [`SpanError`]; the part has ended then.
    pub fn become_home(
        &self,
        holdings: &Holdings,
        listener: Arc<dyn Listener>,
        patience: Duration,
    ) -> Result<(), SpanError> {
        let succeeded = self.try_become_home(holdings, listener, patience);
        if let Err(error) = &succeeded {
            self.shared.end(error.clone());
        }
        succeeded
    }

    fn try_become_home(
        &self,
        holdings: &Holdings,
        listener: Arc<dyn Listener>,
        patience: Duration,
    ) -> Result<(), SpanError> {
        let shared = &self.shared;
        {
            let state = &mut *locked(&shared.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let unknown = holdings.rows.iter().any(|held| {
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
            shared.is_changing_home.store(true, Ordering::Release);
            while shared.release_batch(state)? {}
            shared.end_quiescence(state);
            state.traffic.forget(PartId::HOME);
            state
                .coherence
                .take_over_home(holdings)
                .map_err(SpanError::Inconsistent)?;
            // Eviction starts anew: this part holds more pages than before.
            state.eviction = None;
            *shared
                .listener
                .write()
                .unwrap_or_else(PoisonError::into_inner) = listener;
            shared
                .me
                .store(PartId::HOME.number() as u8, Ordering::Release);
        }
        // Its thread that sent cuts ends.
        shared.cuts.changed.notify_all();
        shared.peers.forget_home();
        shared.limits.forget(PartId::HOME);
        shared.wake();
        shared.broadcast(&PeerMessage::Succeeded)?;
        let others = self.others();
        let deadline = Instant::now() + patience;
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            let heard = shared.peers.acknowledged_home();
            let Some(part) = others.iter().find(|part| !heard.contains(*part)) else {
                shared.is_changing_home.store(false, Ordering::Release);
                return Ok(());
            };
            if Instant::now() >= deadline {
                return Err(SpanError::Slow { part, patience });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

impl Shared {
    /// Pages that this part holds or is recorded to hold: pages that were never written
    /// may not be populated.
    fn resident_pages(&self) -> Result<BTreeMap<PageId, Copy>, SpanError> {
        let mut here = self.populated()?;
        let coherence = &locked(&self.state).coherence;
        let own = coherence.pages_in_use();
        here.extend(own.map(|page| (page, coherence.copy(page))));
        Ok(here)
    }

    /// Pages that this part holds and that are populated.
    fn populated(&self) -> Result<BTreeMap<PageId, Copy>, SpanError> {
        let mut here = BTreeMap::new();
        for (memory, of) in (0..).zip(&self.memories) {
            let ranges = of.memory().populated();
            let ranges = ranges.map_err(|error| SpanError::Memory(error.to_string()))?;
            let state = locked(&self.state);
            for range in ranges {
                let numbers = range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES);
                for number in numbers {
                    // A memory of 64 GiB has 16 Mi pages.
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

    /// Sends the remaining pages to a part; returns them.
    fn send_remaining(&self, to: PartId) -> Result<Vec<PageId>, SpanError> {
        let here: Vec<(PageId, Copy)> = self.resident_pages()?.into_iter().collect();
        for some in here.chunks(MOVES_MAX) {
            let mut events = Vec::new();
            for (page, copy) in some {
                match copy {
                    // Other parts hold them.
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

    /// Handles the announcement of a new home or, at the new home, its acknowledgement.
    /// The former home's messages are ignored from now on.
    pub(super) fn handle_new_home(&self, heard: &mut Inbound) -> Result<(), SpanError> {
        let from = heard.part();
        if self.is_home() {
            self.peers.acknowledge_home(from);
            return Ok(());
        }
        if from == PartId::HOME {
            let reason = "it announced itself as its own successor".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        // Until the new home announces limits: other parts may not know it yet.
        self.is_changing_home.store(true, Ordering::Release);
        self.step(vec![(
            Event::HomeMigrated { new_home: from },
            EventContext::Nothing,
        )]);
        self.peers.replace_home(from);
        self.end_cut();
        heard.is_now(PartId::HOME);
        self.limits.rename(from, PartId::HOME);
        // It does not know the memory of this part.
        self.limits.report_again();
        self.send_to(PartId::HOME, &PeerMessage::Succeeded)
    }
}
