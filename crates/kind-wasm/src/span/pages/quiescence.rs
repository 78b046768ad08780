//! Quiescence: no message is in flight between parts while all threads are stopped. A
//! cut, a home migration and the removal of a part start from it.
//!
//! ```text
//!   home                                   member
//!     │─── Begin ───────────────────────▶│ starts no background moves
//!     │◀─────────────── Quiet, with counts ─│ no transaction in progress; messages sent to
//!     │◀─────────────── Quiet, with counts ─│ and received from each part (again on change)
//!   all counts agree: no message is in flight ([`Traffic`])
//!     ┊
//!     │─── Over ────────────────────────▶│
//! ```

use super::super::messages::QuiescenceMessage;
use super::super::wire::PeerMessage;
use super::effects::EventContext;
use super::{MOVES_MAX, Pages, Shared, SpanError, State, locked};
use keel_wasm::coherence::{Event, PartId, Segment, Traffic};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Recalled directories arrive within this time or are recalled again: they may have been
/// in transit to another part.
const RECALL_TIMEOUT: Duration = Duration::from_millis(100);
/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// State of a quiescence at one part.
#[derive(Debug)]
pub(super) struct QuiescenceState {
    number: u64,
    /// At a member: the counts reported last.
    reported: Option<Traffic>,
    /// At the home: the counts that the others reported last.
    reports: BTreeMap<PartId, Traffic>,
    is_settled: bool,
}

impl QuiescenceState {
    fn new(number: u64) -> Self {
        QuiescenceState {
            number,
            reported: None,
            reports: BTreeMap::new(),
            is_settled: false,
        }
    }
}

impl Shared {
    /// Handles a message about quiescence; messages about an earlier one are ignored.
    ///
    /// # Errors
    /// [`SpanError::Lost`] if the sender may not send it.
    pub(super) fn handle_quiescence(
        &self,
        from: PartId,
        number: u64,
        word: QuiescenceMessage,
    ) -> Result<(), SpanError> {
        let to_home = matches!(word, QuiescenceMessage::Quiet(_));
        if to_home != self.is_home() || !to_home && from != PartId::HOME {
            let reason =
                "it sent a message about quiescence that only another part may send".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        let mut state = locked(&self.state);
        match word {
            QuiescenceMessage::Begin => {
                self.set_quiescence(&mut state, Some(QuiescenceState::new(number)))
            }
            QuiescenceMessage::Over
                if state
                    .quiescence
                    .as_ref()
                    .is_some_and(|it| it.number == number) =>
            {
                self.set_quiescence(&mut state, None);
            }
            QuiescenceMessage::Over => {}
            QuiescenceMessage::Quiet(traffic) => {
                let quiescence = state.quiescence.as_mut();
                if let Some(quiescence) = quiescence.filter(|it| it.number == number) {
                    quiescence.reports.insert(from, traffic);
                }
            }
        }
        Ok(())
    }

    fn set_quiescence(&self, state: &mut State, quiescence: Option<QuiescenceState>) {
        self.is_quiescing
            .store(quiescence.is_some(), Ordering::SeqCst);
        state.quiescence = quiescence;
        self.changed.notify_all();
        // A move of pages may wait for it.
        self.cuts.changed.notify_all();
    }

    /// Ends the quiescence.
    pub(super) fn end_quiescence(&self, state: &mut State) {
        self.set_quiescence(state, None);
    }

    /// A member reports its counts once no transaction is in progress; the home checks
    /// whether all counts agree. Runs on the serving thread, which has processed all
    /// messages that it read.
    ///
    /// # Errors
    /// [`SpanError::Inconsistent`] if the report cannot be encoded, which does not occur.
    pub(super) fn check_quiescence(&self) -> Result<(), SpanError> {
        if !self.is_quiescing.load(Ordering::SeqCst) {
            return Ok(());
        }
        let (number, traffic) = {
            let mut state = locked(&self.state);
            let State {
                quiescence,
                coherence,
                traffic,
                ..
            } = &mut *state;
            let Some(quiescence) = quiescence.as_mut().filter(|it| !it.is_settled) else {
                return Ok(());
            };
            // Messages that another thread is about to send are counted already.
            if self.unsent_steps.load(Ordering::SeqCst) != 0 || !coherence.is_quiescent() {
                return Ok(());
            }
            if self.is_home() {
                quiescence.reports.insert(PartId::HOME, traffic.clone());
                let all = self.peers.parts().with(PartId::HOME);
                quiescence.reports.retain(|part, _| all.contains(*part));
                quiescence.is_settled = quiescence.reports.len() == usize::from(all.len())
                    && Traffic::is_quiescent(&quiescence.reports);
                self.changed.notify_all();
                return Ok(());
            }
            if quiescence.reported.as_ref() == Some(&*traffic) {
                return Ok(());
            }
            quiescence.reported = Some(traffic.clone());
            (quiescence.number, traffic.clone())
        };
        let word = QuiescenceMessage::Quiet(traffic);
        self.send_to(PartId::HOME, &PeerMessage::Quiescence { number, word })
    }
}

/// A guard: no message is in flight and no background move starts until it is dropped.
pub(super) struct QuiescenceGuard {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for QuiescenceGuard {
    fn drop(&mut self) {
        let shared = &self.shared;
        {
            let mut state = locked(&shared.state);
            if state
                .quiescence
                .as_ref()
                .is_none_or(|it| it.number != self.number)
            {
                return;
            }
            shared.end_quiescence(&mut state);
        }
        let (number, word) = (self.number, QuiescenceMessage::Over);
        if !shared.over.load(Ordering::Acquire)
            && let Err(error) = shared.broadcast(&PeerMessage::Quiescence { number, word })
        {
            shared.end(error);
        }
    }
}

impl Shared {
    /// Waits for quiescence and keeps it. All threads must be stopped and the host must
    /// not write. Called at the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] at the deadline.
    pub(super) fn quiesce(
        self: &Arc<Self>,
        patience: Duration,
    ) -> Result<QuiescenceGuard, SpanError> {
        let deadline = Instant::now() + patience;
        let mut state = locked(&self.state);
        let number = loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if !self.is_home() {
                return Err(SpanError::CutUnavailable);
            }
            if state.quiescence.is_none() {
                state.quiescence_count += 1;
                let number = state.quiescence_count;
                self.set_quiescence(&mut state, Some(QuiescenceState::new(number)));
                break number;
            }
            // Another quiescence is in progress.
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
            state = self.wait_changed(state, POLL_INTERVAL);
        };
        drop(state);
        let settled = QuiescenceGuard {
            shared: self.clone(),
            number,
        };
        let word = QuiescenceMessage::Begin;
        self.broadcast(&PeerMessage::Quiescence { number, word })?;
        loop {
            // Only the serving thread knows whether it has processed what it read.
            self.wake();
            let state = locked(&self.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.quiescence.as_ref().is_some_and(|it| it.is_settled) {
                return Ok(settled);
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
            drop(self.wait_changed(state, POLL_INTERVAL));
        }
    }

    pub(super) fn directories(&self) -> Vec<(Segment, PartId)> {
        locked(&self.state).coherence.directories().collect()
    }

    /// As [`Self::quiesce`], after which this part is the directory of all pages.
    ///
    /// # Errors
    /// As there.
    pub(super) fn quiesce_with_directories(
        self: &Arc<Self>,
        patience: Duration,
    ) -> Result<QuiescenceGuard, SpanError> {
        let deadline = Instant::now() + patience;
        loop {
            let moved = {
                let state = locked(&self.state);
                state.directories_moved || state.coherence.directories().next().is_some()
            };
            if moved {
                self.step(vec![(Event::Gather, EventContext::Nothing)]);
            }
            let settled = self.quiesce(deadline.saturating_duration_since(Instant::now()))?;
            // One may have been in transit to another part.
            let mut state = locked(&self.state);
            if state.coherence.directories().next().is_none() {
                state.directories_moved = false;
                return Ok(settled);
            }
        }
    }
}

impl Pages {
    /// Segments whose directory is at another part, as far as this one knows.
    pub fn directories(&self) -> Vec<(Segment, PartId)> {
        self.shared.directories()
    }

    /// Pins directories where they are, or lets them move again; whether any moved since
    /// all were last collected ([`Self::collect_directories`]). Called at the home.
    pub fn pin_directories(&self, stay: bool) -> bool {
        let mut state = locked(&self.shared.state);
        state.directories_pinned = stay;
        state.directories_moved
    }

    /// Recalls directories in batches while threads run, so that little is left to
    /// collect ([`Self::collect_directories`]). They are pinned
    /// ([`Self::pin_directories`]). Called at the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] at the deadline.
    pub fn recall_directories(&self, patience: Duration) -> Result<(), SpanError> {
        let deadline = Instant::now() + patience;
        loop {
            let elsewhere = self.directories();
            if elsewhere.is_empty() {
                return Ok(());
            }
            for some in elsewhere.chunks(MOVES_MAX) {
                let events = some.iter().map(|(segment, _)| {
                    let (segment, to) = (*segment, PartId::HOME);
                    (Event::MoveDirectory { segment, to }, EventContext::Nothing)
                });
                self.shared.step(events.collect());
            }
            let sent = Instant::now();
            while sent.elapsed() < RECALL_TIMEOUT && !self.directories().is_empty() {
                if let Some(failure) = self.failure() {
                    return Err(failure);
                }
                if Instant::now() >= deadline {
                    return Err(SpanError::NotQuiescent { patience });
                }
                std::thread::sleep(POLL_INTERVAL);
            }
        }
    }

    /// Makes this part the directory of all pages, known to all others. All threads must
    /// be stopped, and the host must not access memory. Called at the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] at the deadline.
    pub fn collect_directories(&self, patience: Duration) -> Result<(), SpanError> {
        self.shared.quiesce_with_directories(patience).map(drop)
    }
}
