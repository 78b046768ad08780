//! Accesses of the host to a machine's memory: a page stays present while it is copied.

use super::effects::{Effects, EventContext};
use super::{PAGE, REQUEST_INTERVAL, Shared, SpanError, State, locked};
use keel_wasm::coherence::{Access, Event, PageId};
use keel_wasm::memory::{MemoryError, PAGE_BYTES};
use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Splits a range at page boundaries: the offset in memory, and the range of the buffer.
pub(super) fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset.saturating_add(done as u64);
        let left = PAGE - (at % PAGE_BYTES) as usize;
        let end = length.min(done + left);
        Some((at, std::mem::replace(&mut done, end)..end))
    })
}

pub(super) fn page_of(memory: u32, offset: u64) -> Result<PageId, SpanError> {
    match u32::try_from(offset / PAGE_BYTES) {
        Ok(number) => Ok(PageId { memory, number }),
        Err(_) => Err(SpanError::Memory(format!("there is no byte {offset}"))),
    }
}

impl Shared {
    /// Pins a page that has arrived for waiting host accesses. Otherwise it could leave
    /// again before their threads run, repeatedly.
    pub(super) fn grant(&self, state: &mut State, page: PageId) {
        let has = state.coherence.access(page);
        if state.coherence.is_deferred(page) {
            return;
        }
        for access in [Access::Read, Access::Write] {
            if has.is_none_or(|has| has < access) {
                continue;
            }
            let Some(count) = state.waiting.remove(&(page, access)) else {
                continue;
            };
            for _ in 0..count {
                // Pinning has no effects to apply.
                state.coherence.step(Event::Pin { page }, self.now());
            }
            *state.granted.entry((page, access)).or_default() += count;
        }
    }

    /// Runs a function while a page is present and pinned.
    pub(super) fn with_page(
        &self,
        page: PageId,
        access: Access,
        patience: Duration,
        run: impl FnOnce() -> Result<(), MemoryError>,
    ) -> Result<(), SpanError> {
        self.pin(page, access, patience)?;
        let result = match access {
            Access::Write => self.before_host_write(page, run),
            Access::Read => run().map_err(|error| SpanError::Memory(error.to_string())),
        };
        self.step(vec![(Event::Unpin { page }, EventContext::Nothing)]);
        result
    }

    fn pin(&self, page: PageId, access: Access, patience: Duration) -> Result<(), SpanError> {
        // A patience beyond the clock's range means no deadline.
        let deadline = Instant::now().checked_add(patience);
        let key = (page, access);
        let mut state = locked(&self.state);
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        let has = state.coherence.access(page);
        if has.is_some_and(|has| has >= access) && !state.coherence.is_deferred(page) {
            state.coherence.step(Event::Pin { page }, self.now());
            return Ok(());
        }
        *state.waiting.entry(key).or_default() += 1;
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if take_one(&mut state.granted, key) {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                take_one(&mut state.waiting, key);
                return Err(SpanError::Late { page, patience });
            }
            // Requested again in each iteration: the page may have arrived and left.
            let mut work = Effects::default();
            let event = (Event::Fault { page, access }, EventContext::Nothing);
            let done = self.step_locked(&mut state, vec![event], &mut work);
            drop(state);
            let is_ahead = work.is_ahead;
            self.dispatch(done, work);
            if is_ahead {
                self.wake();
            }
            state = locked(&self.state);
            if state.failure.is_none() && !state.granted.contains_key(&key) {
                state = self
                    .changed
                    .wait_timeout(state, REQUEST_INTERVAL.min(patience))
                    .unwrap_or_else(|error| error.into_inner())
                    .0;
            }
        }
    }
}

/// Decrements a count; false if it was zero.
fn take_one(counts: &mut HashMap<(PageId, Access), u32>, key: (PageId, Access)) -> bool {
    let Some(count) = counts.get_mut(&key) else {
        return false;
    };
    *count -= 1;
    if *count == 0 {
        counts.remove(&key);
    }
    true
}
