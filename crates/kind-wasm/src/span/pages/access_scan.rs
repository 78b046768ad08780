//! Scans which of a part's pages are accessed ([`super::super::idle_pages`] keeps the
//! results and explains why): a few milliseconds every five seconds, for any size of
//! memory. Where accesses cannot be observed, nothing is recorded and nothing fails.

use super::super::idle_pages::SAMPLE_BYTES;
use super::{Shared, locked};
use keel_wasm::memory::{MemoryError, Spanning};
use rand::RngExt;
use std::time::{Duration, Instant};

/// Interval between two passes.
const SCAN_INTERVAL: Duration = Duration::from_secs(5);
/// Regions scanned per pass: 64 MiB of a memory that is not large. The next pass
/// continues.
const REGIONS: usize = 1024;

/// Position of the scan.
#[derive(Debug, Default)]
pub(super) struct AccessScan {
    memory: u32,
    /// End of the last region scanned.
    at: u64,
    last: Option<Instant>,
}

impl Shared {
    /// Scans a batch of regions, if a pass is due.
    pub(super) fn scan_accesses(&self, scan: &mut AccessScan) {
        if scan.last.is_some_and(|at| at.elapsed() < SCAN_INTERVAL) {
            return;
        }
        scan.last = Some(Instant::now());
        for _ in 0..REGIONS {
            let Some(spanning) = self.memories.get(scan.memory as usize) else {
                // The end of the last memory.
                (scan.memory, scan.at) = (0, 0);
                return;
            };
            match self.scan_region(spanning, scan.memory, scan.at) {
                Ok(Some(end)) => scan.at = end,
                Ok(None) => (scan.memory, scan.at) = (scan.memory + 1, 0),
                Err(error) => {
                    tracing::debug!(%error, at = scan.at, "cannot read accessed bits");
                    // Outdated results would stay otherwise.
                    locked(&self.idle).record_absent(scan.memory, scan.at..u64::MAX);
                    (scan.memory, scan.at) = (scan.memory + 1, 0);
                }
            }
        }
    }

    /// Scans the first populated region at or behind `from`; returns its end.
    fn scan_region(
        &self,
        spanning: &Spanning,
        number: u32,
        from: u64,
    ) -> Result<Option<u64>, MemoryError> {
        let memory = spanning.memory();
        let here = memory.populated_from(from)?;
        // Read after `populated_from`, because memories grow.
        let size = memory.size_bytes();
        let Some(here) = here.filter(|here| *here < size) else {
            locked(&self.idle).record_absent(number, from..size);
            return Ok(None);
        };
        let (region, known) = locked(&self.idle).region(number, size, here);
        // The page may leave during the scan: then it counts as not accessed, and another
        // is sampled next.
        let is_used = |start: u64| -> Result<bool, MemoryError> {
            let end = start.saturating_add(SAMPLE_BYTES).min(size);
            let used = spanning
                .access_tracker()
                .take(start, end.saturating_sub(start))?;
            Ok(used.contains(&true))
        };
        let used = known.map(is_used).transpose()?.unwrap_or(false);
        let places = (region.end.min(size).saturating_sub(region.start)).div_ceil(SAMPLE_BYTES);
        let any = region.start + rand::rng().random_range(0..places.max(1)) * SAMPLE_BYTES;
        let next = memory.populated_from(any)?;
        let next = next.filter(|next| *next < region.end.min(size));
        let next = next.unwrap_or(here) / SAMPLE_BYTES * SAMPLE_BYTES;
        if Some(next) != known {
            // Accesses before this sample do not count.
            is_used(next)?;
        }
        let gap = from.min(region.start)..region.start;
        locked(&self.idle).record_scan(number, gap, (next, used), self.now());
        Ok(Some(region.end))
    }
}
