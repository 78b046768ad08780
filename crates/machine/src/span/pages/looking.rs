//! Looks which of a part's pages are used ([`super::super::idle`] says why, and remembers):
//! a few milliseconds every five seconds, whatever the memory.

use super::{Shared, SpanError, locked};
use keel_wasm::memory::{MemoryError, PAGE_BYTES};
use rand::RngExt;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Regions that are looked at by one; what is left is for the next.
const REGIONS: usize = 2048;

/// Where a look goes on.
#[derive(Debug, Default)]
pub(super) struct Looking {
    memory: u32,
    /// End of the last region that was looked at.
    at: u64,
    last: Option<Instant>,
}

impl Shared {
    /// Looks at some pages, if it is time.
    pub(super) fn look_at_uses(&self, looking: &mut Looking) -> Result<(), SpanError> {
        if looking.last.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return Ok(());
        }
        looking.last = Some(Instant::now());
        let mut random = rand::rng();
        for _ in 0..REGIONS {
            let Some(spanning) = self.memories.get(looking.memory as usize) else {
                // All of it was looked at.
                (looking.memory, looking.at) = (0, 0);
                break;
            };
            let failed = |error: MemoryError| SpanError::Memory(error.to_string());
            let memory = spanning.memory();
            let (number, size) = (looking.memory, memory.size_bytes());
            let Some(here) = memory.populated_from(looking.at).map_err(failed)? else {
                locked(&self.idle).is_not_here(number, looking.at..size);
                (looking.memory, looking.at) = (number + 1, 0);
                continue;
            };
            let (region, known) = locked(&self.idle).region(number, size, here);
            // (It may leave while it is looked at: then it is not used, and another is next.)
            let is_used = |page: u64| match spanning.uses().take(page, PAGE_BYTES) {
                Ok(used) => used == [true],
                Err(error) => {
                    tracing::debug!(%error, page, "whether it is used");
                    false
                }
            };
            let used = known.is_some_and(is_used);
            let pages = (region.end.min(size) - region.start) / PAGE_BYTES;
            let any = region.start + random.random_range(0..pages.max(1)) * PAGE_BYTES;
            let next = memory.populated_from(any.max(here)).map_err(failed)?;
            let next = next.filter(|next| *next < region.end).unwrap_or(here);
            let next = next / PAGE_BYTES * PAGE_BYTES;
            if Some(next) != known {
                // (What was done to it before says nothing of what comes.)
                is_used(next);
            }
            let gap = looking.at.min(region.start)..region.start;
            locked(&self.idle).looked(number, gap, (next, used), self.now());
            looking.at = region.end;
        }
        Ok(())
    }
}
