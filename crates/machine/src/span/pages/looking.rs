//! Looks which of a part's pages are used ([`super::super::idle`] says why, and remembers):
//! a few milliseconds every five seconds, whatever the memory. What cannot be seen is not
//! known; nothing ends for it.

use super::super::idle::LOOKED_BYTES;
use super::{Shared, locked};
use keel_wasm::memory::{MemoryError, Spanning};
use rand::RngExt;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Regions that are looked at by one: 64 MiB of a memory that is not large. What is left is
/// for the next.
const REGIONS: usize = 1024;

/// Where a look goes on.
#[derive(Debug, Default)]
pub(super) struct Looking {
    memory: u32,
    /// End of the last region that was looked at.
    at: u64,
    last: Option<Instant>,
}

impl Shared {
    /// Looks at some memory, if it is time.
    pub(super) fn look_at_uses(&self, looking: &mut Looking) {
        if looking.last.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return;
        }
        looking.last = Some(Instant::now());
        for _ in 0..REGIONS {
            let Some(spanning) = self.memories.get(looking.memory as usize) else {
                // All of it was looked at.
                (looking.memory, looking.at) = (0, 0);
                return;
            };
            match self.look_at_region(spanning, looking.memory, looking.at) {
                Ok(Some(end)) => looking.at = end,
                Ok(None) => (looking.memory, looking.at) = (looking.memory + 1, 0),
                Err(error) => {
                    tracing::debug!(%error, at = looking.at, "which of its memory is used");
                    // (What was known of the rest would never change.)
                    locked(&self.idle).is_not_here(looking.memory, looking.at..u64::MAX);
                    (looking.memory, looking.at) = (looking.memory + 1, 0);
                }
            }
        }
    }

    /// Looks at the first region from a byte on of which something is here; its end.
    fn look_at_region(
        &self,
        spanning: &Spanning,
        number: u32,
        from: u64,
    ) -> Result<Option<u64>, MemoryError> {
        let memory = spanning.memory();
        let here = memory.populated_from(from)?;
        // (After it: memories grow.)
        let size = memory.size_bytes();
        let Some(here) = here.filter(|here| *here < size) else {
            locked(&self.idle).is_not_here(number, from..size);
            return Ok(None);
        };
        let (region, known) = locked(&self.idle).region(number, size, here);
        // (It may leave while it is looked at: then it is not used, and another is next.)
        let is_used = |start: u64| -> Result<bool, MemoryError> {
            let end = start.saturating_add(LOOKED_BYTES).min(size);
            let used = spanning
                .access_tracker()
                .take(start, end.saturating_sub(start))?;
            Ok(used.contains(&true))
        };
        let used = known.map(is_used).transpose()?.unwrap_or(false);
        let places = (region.end.min(size).saturating_sub(region.start)).div_ceil(LOOKED_BYTES);
        let any = region.start + rand::rng().random_range(0..places.max(1)) * LOOKED_BYTES;
        let next = memory.populated_from(any)?;
        let next = next.filter(|next| *next < region.end.min(size));
        let next = next.unwrap_or(here) / LOOKED_BYTES * LOOKED_BYTES;
        if Some(next) != known {
            // (What was done to it before says nothing of what comes.)
            is_used(next)?;
        }
        let gap = from.min(region.start)..region.start;
        locked(&self.idle).looked(number, gap, (next, used), self.now());
        Ok(Some(region.end))
    }
}
