//! The home's side of a cut: opens, prepares and marks it, and collects the pages of all parts. Where
//! they are stored is left to the caller.

use super::super::{PAGE, Pages, Shared, SpanError, State, locked};
use super::{Cut, CutState, SAME_BYTES, failed};
use crate::span::messages::{CutMessage, CutPages, CutPiece, PIECE_PAGES_MAX, UnchangedPages};
use crate::span::wire::PeerMessage;
use keel_wasm::coherence::{PageId, PartId};
use keel_wasm::memory::PAGE_BYTES;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Bytes that a member may send ahead of the home's requests.
const AHEAD_BYTES: u32 = 1 << 20;
/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

impl Pages {
    /// Creates a cut with nothing prepared.
    fn open_cut(&self, since: Option<u64>) -> Result<Cut, SpanError> {
        let shared = self.shared.clone();
        let number = shared.cuts.count.fetch_add(1, Ordering::Relaxed) + 1;
        {
            let mut state = locked(&shared.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let leave = state.coherence.has_leaving_parts();
            let is_taken = state.cut_state.is_some() || state.quiescence.is_some();
            if is_taken || leave || !shared.is_home() {
                return Err(SpanError::CutUnavailable);
            }
            let cut_state = CutState::new((number, 0), since, shared.memories.len());
            state.cut_state = Some(cut_state);
            shared.cuts.is_on.store(true, Ordering::Release);
        }
        Ok(Cut { shared, number })
    }

    /// Prepares a cut while threads run: determines the pages of all parts and protects
    /// them. Called at the home; one cut at a time. For pages that members sent at the
    /// cut `since` ([`Cut::number`]), all of which was read, they report only that they
    /// are unchanged, where that is so.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::CutUnavailable`] if a cut is in progress or parts
    /// leave; [`SpanError::NotQuiescent`] at the deadline.
    pub fn prepare_cut(&self, since: Option<u64>, patience: Duration) -> Result<Cut, SpanError> {
        let cut = self.open_cut(since)?;
        for (at, memory) in cut.shared.memories.iter().enumerate() {
            // Takes long; pages that appear meanwhile are recorded.
            let here = memory.memory().populated().map_err(failed)?;
            let mut guard = locked(&cut.shared.state);
            let State {
                cut_state, woken, ..
            } = &mut *guard;
            let wanted = cut_state.as_mut().and_then(|it| it.wanted.get_mut(at));
            if let (Some(wanted), Some(woken)) = (wanted, woken.get(at)) {
                *wanted |= woken;
                for range in here {
                    let last = range.end.div_ceil(PAGE_BYTES);
                    wanted.insert_range((range.start / PAGE_BYTES) as u32..last as u32);
                }
            }
        }
        cut.tell_all(CutMessage::Prepare { since })?;
        let deadline = Instant::now() + patience;
        loop {
            let state = &mut *locked(&cut.shared.state);
            if !cut.shared.has_many_unprotected(state) || !cut.shared.protect_batch(state)? {
                break;
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
        }
        let others = cut.shared.peers.count();
        cut.await_all(deadline, patience, |cut_state| {
            cut_state.prepared.len() == others
        })?;
        Ok(cut)
    }
}

impl Cut {
    /// Its number among all cuts.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Marks the instant of the cut. All threads must be stopped and the host must not
    /// write; both may go on when this returns.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] at the deadline. There is no cut then.
    pub fn mark(&self, patience: Duration) -> Result<(), SpanError> {
        let shared = &self.shared;
        let deadline = Instant::now() + patience;
        // No page may move before all parts have marked: it could be missed at both.
        let settled = shared.quiesce(patience)?;
        self.tell_all(CutMessage::Mark)?;
        shared.mark(&mut locked(&shared.state))?;
        let others = shared.peers.count();
        self.await_all(deadline, patience, |cut_state| {
            cut_state.marked.len() == others
        })?;
        drop(settled);
        self.tell_all(CutMessage::More(AHEAD_BYTES))
    }

    fn tell_all(&self, word: CutMessage) -> Result<(), SpanError> {
        let number = self.number;
        for part in self.shared.peers.parts().iter() {
            self.shared
                .send_to(part, &PeerMessage::Cut { number, word })?;
        }
        Ok(())
    }

    fn await_all(
        &self,
        deadline: Instant,
        patience: Duration,
        is_so: impl Fn(&CutState) -> bool,
    ) -> Result<(), SpanError> {
        loop {
            let state = locked(&self.shared.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            match &state.cut_state {
                Some(cut_state) if is_so(cut_state) => return Ok(()),
                Some(_) if Instant::now() < deadline => {}
                Some(_) => return Err(SpanError::NotQuiescent { patience }),
                None => return Err(SpanError::Ended),
            }
            drop(self.shared.cuts.changed.wait_timeout(state, POLL_INTERVAL));
        }
    }

    /// The next pages of the machine as of the cut, each once; `None` at the end. Pages
    /// that never appear are zero. This part's own pages are always sent with content.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if nothing arrives in time,
    /// [`SpanError::CutTooSlow`] if too many pages changed before they were read.
    pub fn next(&self, patience: Duration) -> Result<Option<CutPiece>, SpanError> {
        let shared = &self.shared;
        let deadline = Instant::now() + patience;
        loop {
            let mut guard = locked(&shared.state);
            if let Some(failure) = &guard.failure {
                return Err(failure.clone());
            }
            let state = &mut *guard;
            let Some(cut_state) = &mut state.cut_state else {
                return Err(SpanError::Ended);
            };
            if cut_state.gave_up {
                return Err(SpanError::CutTooSlow);
            }
            if let Some((from, piece)) = cut_state.received.pop_front() {
                drop(guard);
                let more = match &piece {
                    CutPiece::Pages(pages) => {
                        u32::try_from(pages.bytes.len()).unwrap_or(AHEAD_BYTES)
                    }
                    CutPiece::Unchanged(_) => SAME_BYTES,
                };
                let (number, word) = (self.number, CutMessage::More(more));
                shared.send_to(from, &PeerMessage::Cut { number, word })?;
                return Ok(Some(piece));
            }
            if let Some(pages) = shared.read_cut_batch(state)? {
                return Ok(Some(CutPiece::Pages(pages)));
            }
            let others = shared.peers.count();
            let done = state
                .cut_state
                .as_ref()
                .map(|cut_state| cut_state.done.len());
            if done == Some(others) {
                return Ok(None);
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
            drop(shared.cuts.changed.wait_timeout(guard, POLL_INTERVAL * 50));
        }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        let over = &self.shared.over;
        let told = match over.load(Ordering::Acquire) {
            true => Ok(()),
            false => self.tell_all(CutMessage::End),
        };
        let ended = told.and_then(|()| {
            while !over.load(Ordering::Acquire)
                && self.shared.release_batch(&mut locked(&self.shared.state))?
            {}
            Ok(())
        });
        if let Err(error) = ended {
            self.shared.end(error);
        }
    }
}

impl Shared {
    /// Handles pages of a cut from a member.
    ///
    /// # Errors
    /// As [`Self::handle_cut_message`].
    pub(in crate::span::pages) fn handle_cut_pages(
        &self,
        from: PartId,
        number: u64,
        pages: CutPages,
    ) -> Result<(), SpanError> {
        let last = (pages.bytes.len() / PAGE) as u32 - 1;
        let last = pages.first.checked_add(last).map(|number| PageId {
            memory: pages.memory,
            number,
        });
        if !self.is_home() || !last.is_some_and(|last| self.has(last)) {
            let reason = "it sent invalid pages of a cut".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        let mut state = locked(&self.state);
        if let Some(cut_state) = state.cut_state.as_mut().filter(|it| it.number == number) {
            cut_state.received.push_back((from, CutPiece::Pages(pages)));
            self.cuts.changed.notify_all();
        }
        Ok(())
    }

    /// As [`Self::handle_cut_pages`], for unchanged pages.
    ///
    /// # Errors
    /// As there.
    pub(in crate::span::pages) fn handle_unchanged_pages(
        &self,
        from: PartId,
        number: u64,
        same: UnchangedPages,
    ) -> Result<(), SpanError> {
        let last = same.pages.checked_sub(1);
        let last = last.and_then(|more| same.first.checked_add(more));
        let memory = same.memory;
        let can_be = last.is_some_and(|number| self.has(PageId { memory, number }))
            && same.pages as usize <= PIECE_PAGES_MAX;
        let mut state = locked(&self.state);
        let cut_state = state.cut_state.as_mut().filter(|it| it.number == number);
        let since = cut_state.as_ref().is_none_or(|it| it.since.is_some());
        if !self.is_home() || !can_be || !since {
            let reason = "it sent invalid unchanged pages of a cut".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        if let Some(cut_state) = cut_state {
            cut_state
                .received
                .push_back((from, CutPiece::Unchanged(same)));
            self.cuts.changed.notify_all();
        }
        Ok(())
    }
}
