//! Samples a machine's memory writes for a moment, to predict what a move would carry.

use crate::checkpoint::Checkpointer;
use keel_machine::moves::prediction::{Activity, Written};
use keel_wasm::memory::{DirtyTracker, GuestMemory, MemoryError, PAGE_BYTES};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Times of the two samples, from the start: together they show whether the machine
/// writes the same bytes again.
const LOOKS: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(60)];

/// Samples the dirty pages, with the trackers of checkpoints if there are any, otherwise
/// with temporary ones.
pub(super) fn sample(
    memories: &[Arc<GuestMemory>],
    checkpointer: Option<&mut Checkpointer>,
    volume_bytes: u64,
) -> Result<Activity, MemoryError> {
    let mut own = Vec::new();
    let mut checkpointer = checkpointer.filter(|checkpointer| checkpointer.tracks());
    if checkpointer.is_none() {
        for memory in memories {
            own.push(DirtyTracker::start(memory.clone())?);
        }
    }
    let mut look = || -> Result<Vec<Vec<Range<u64>>>, MemoryError> {
        match &mut checkpointer {
            // Pages found now still count for the next checkpoint.
            Some(checkpointer) => checkpointer.peek(),
            None => own.iter_mut().map(DirtyTracker::take).collect(),
        }
    };
    // Earlier writes do not count.
    look()?;
    let begun = Instant::now();
    let mut pages: HashSet<(usize, u64)> = HashSet::new();
    let mut written = Vec::new();
    for at in LOOKS {
        std::thread::sleep(at.saturating_sub(begun.elapsed()));
        let found = look()?;
        let micros = begun.elapsed().as_micros();
        for (memory, ranges) in found.iter().enumerate() {
            for range in ranges {
                let of = range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES);
                pages.extend(of.map(|page| (memory, page)));
            }
        }
        written.push(Written {
            micros: u64::try_from(micros).unwrap_or(u64::MAX),
            bytes: pages.len() as u64 * PAGE_BYTES,
        });
    }
    let mut populated_bytes = 0;
    for memory in memories {
        let ranges = memory.populated()?;
        populated_bytes += ranges.iter().map(|it| it.end - it.start).sum::<u64>();
    }
    Ok(Activity {
        populated_bytes,
        volume_bytes,
        written,
    })
}
