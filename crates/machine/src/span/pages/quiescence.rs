//! That nothing is on its way between parts, while all threads stand: what a cut, a home
//! that moves and a part that goes begin with.
//!
//! ```text
//!   home                                   member
//!     │─── Begin ───────────────────────▶│ moves nothing by itself any more
//!     │◀─────────────── Quiet, with counts ─│ nothing is under way there: what it said to
//!     │◀─────────────── Quiet, with counts ─│ each other, and heard (again, if it hears more)
//!   all agree: nothing is on its way ([`Traffic`])
//!     ┊
//!     │─── Over ────────────────────────▶│
//! ```

use super::super::wire::PeerMessage;
use super::effects::EventContext;
use super::{MOVES_MAX, Pages, Shared, SpanError, State, locked};
use keel_wasm::coherence::{Event, PartId, Segment, Traffic};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Directories that were called have come within that, or are called again: they may have
/// been on their way elsewhere.
const CALLED_WITHIN: Duration = Duration::from_millis(100);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What home and members say to each other of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) enum QuiescenceMessage {
    /// To members: all threads stand.
    Begin,
    /// To the home: nothing is under way at this part, which said and heard so much.
    Quiet(Traffic),
    /// To members: threads go on.
    Over,
}

/// What a part knows of it.
#[derive(Debug)]
pub(super) struct QuiescenceState {
    number: u64,
    /// At a member: what it said last.
    told: Option<Traffic>,
    /// At the home: what the others said last.
    reports: BTreeMap<PartId, Traffic>,
    is_settled: bool,
}

impl QuiescenceState {
    fn new(number: u64) -> Self {
        QuiescenceState {
            number,
            told: None,
            reports: BTreeMap::new(),
            is_settled: false,
        }
    }
}

impl Shared {
    /// Takes note of a word about it; one about an earlier time counts no more.
    ///
    /// # Errors
    /// [`SpanError::Lost`], of a part that cannot say that.
    pub(super) fn hear_settle(
        &self,
        from: PartId,
        number: u64,
        word: QuiescenceMessage,
    ) -> Result<(), SpanError> {
        let to_home = matches!(word, QuiescenceMessage::Quiet(_));
        if to_home != self.is_home() || !to_home && from != PartId::HOME {
            let reason = "it says what only another part can say of what is on its way".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        let mut state = locked(&self.state);
        match word {
            QuiescenceMessage::Begin => {
                self.settles(&mut state, Some(QuiescenceState::new(number)))
            }
            QuiescenceMessage::Over
                if state
                    .settling
                    .as_ref()
                    .is_some_and(|it| it.number == number) =>
            {
                self.settles(&mut state, None);
            }
            QuiescenceMessage::Over => {}
            QuiescenceMessage::Quiet(traffic) => {
                let settling = state.settling.as_mut();
                if let Some(settling) = settling.filter(|it| it.number == number) {
                    settling.reports.insert(from, traffic);
                }
            }
        }
        Ok(())
    }

    fn settles(&self, state: &mut State, settling: Option<QuiescenceState>) {
        self.is_settling.store(settling.is_some(), Ordering::SeqCst);
        state.settling = settling;
        self.changed.notify_all();
        // (Who moves pages may wait for it.)
        self.cuts.changed.notify_all();
    }

    /// Nobody waits for that any more.
    pub(super) fn no_longer_settle(&self, state: &mut State) {
        self.settles(state, None);
    }

    /// Says so when nothing is under way here, if that is waited for; at the home, takes note
    /// of it when that is so everywhere. On the thread that serves: it has done all that it
    /// has heard.
    ///
    /// # Errors
    /// [`SpanError`]; none that there is.
    pub(super) fn settle_some(&self) -> Result<(), SpanError> {
        if !self.is_settling.load(Ordering::SeqCst) {
            return Ok(());
        }
        let (number, traffic) = {
            let mut state = locked(&self.state);
            let State {
                settling,
                coherence,
                traffic,
                ..
            } = &mut *state;
            let Some(settling) = settling.as_mut().filter(|it| !it.is_settled) else {
                return Ok(());
            };
            // (What another thread is about to say is counted, and not said.)
            if self.unsaid.load(Ordering::SeqCst) != 0 || !coherence.is_quiet() {
                return Ok(());
            }
            if self.is_home() {
                settling.reports.insert(PartId::HOME, traffic.clone());
                let all = self.others.parts().with(PartId::HOME);
                settling.reports.retain(|part, _| all.contains(*part));
                settling.is_settled = settling.reports.len() == usize::from(all.len())
                    && Traffic::rests(&settling.reports);
                self.changed.notify_all();
                return Ok(());
            }
            if settling.told.as_ref() == Some(&*traffic) {
                return Ok(());
            }
            settling.told = Some(traffic.clone());
            (settling.number, traffic.clone())
        };
        let word = QuiescenceMessage::Quiet(traffic);
        self.tell_part(PartId::HOME, &PeerMessage::Quiescence { number, word })
    }
}

/// Nothing is on its way, and nothing moves by itself, until it is dropped.
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
                .settling
                .as_ref()
                .is_none_or(|it| it.number != self.number)
            {
                return;
            }
            shared.no_longer_settle(&mut state);
        }
        let (number, word) = (self.number, QuiescenceMessage::Over);
        if !shared.over.load(Ordering::Acquire)
            && let Err(error) = shared.tell_all(&PeerMessage::Quiescence { number, word })
        {
            shared.end(error);
        }
    }
}

impl Shared {
    /// Waits until nothing is on its way, and lets nothing begin. All threads stand, and
    /// nobody writes for the host. Only of the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if that takes longer.
    pub(super) fn settle(
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
            if state.settling.is_none() {
                state.settled += 1;
                let number = state.settled;
                self.settles(&mut state, Some(QuiescenceState::new(number)));
                break number;
            }
            // (Another one is at it.)
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
            state = self.wait_changed(state, LOOK_AGAIN);
        };
        drop(state);
        let settled = QuiescenceGuard {
            shared: self.clone(),
            number,
        };
        let word = QuiescenceMessage::Begin;
        self.tell_all(&PeerMessage::Quiescence { number, word })?;
        loop {
            // (What it has heard and not done yet only the thread that serves knows.)
            self.ring();
            let state = locked(&self.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.settling.as_ref().is_some_and(|it| it.is_settled) {
                return Ok(settled);
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
            drop(self.wait_changed(state, LOOK_AGAIN));
        }
    }

    pub(super) fn directories(&self) -> Vec<(Segment, PartId)> {
        locked(&self.state).coherence.directories().collect()
    }

    /// As [`Self::settle`], and this part is the directory of all pages then.
    ///
    /// # Errors
    /// As there.
    pub(super) fn settle_with_all(
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
            let settled = self.settle(deadline.saturating_duration_since(Instant::now()))?;
            // (One may have been on its way elsewhere.)
            let mut state = locked(&self.state);
            if state.coherence.directories().next().is_none() {
                state.directories_moved = false;
                return Ok(settled);
            }
        }
    }
}

impl Pages {
    /// Of which segments another part is the directory, as far as this one knows.
    pub fn directories(&self) -> Vec<(Segment, PartId)> {
        self.shared.directories()
    }

    /// Directories stay where they are from now on, or need not any more; whether any moved
    /// since all were brought here ([`Self::bring_directories`]). Only of the home.
    pub fn keep_directories(&self, stay: bool) -> bool {
        let mut state = locked(&self.shared.state);
        state.directories_stay = stay;
        state.directories_moved
    }

    /// Directories come here, some at a time while threads run: what is to be brought
    /// ([`Self::bring_directories`]) is little when this returns. They stay
    /// ([`Self::keep_directories`]). Only of the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if that takes longer.
    pub fn call_directories(&self, patience: Duration) -> Result<(), SpanError> {
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
            while sent.elapsed() < CALLED_WITHIN && !self.directories().is_empty() {
                if let Some(failure) = self.failure() {
                    return Err(failure);
                }
                if Instant::now() >= deadline {
                    return Err(SpanError::NotQuiescent { patience });
                }
                std::thread::sleep(LOOK_AGAIN);
            }
        }
    }

    /// This part is the directory of all pages when this returns, and all others know; all
    /// threads stand, and nobody reads or writes for the host. Only of the home.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if that takes longer.
    pub fn bring_directories(&self, patience: Duration) -> Result<(), SpanError> {
        self.shared.settle_with_all(patience).map(drop)
    }
}
