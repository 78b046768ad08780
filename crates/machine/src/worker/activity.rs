//! What the machine does with its memory, looked at for a moment: what a move of
//! it would have to carry.

use crate::checkpoint::Checkpointer;
use crate::moves::prediction::{Activity, Written};
use keel_wasm::memory::{DirtyTracker, GuestMemory, MemoryError, PAGE_BYTES};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// When it is looked at, from the beginning on: two looks tell whether it writes
/// the same bytes again.
const LOOKS: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(60)];

/// Looks at what is written, by the trackers that checkpoints have, where they
/// have any, else by some of its own.
pub(super) fn sample(
    memories: &[Arc<GuestMemory>],
    taker: Option<&mut Checkpointer>,
    volume_bytes: u64,
) -> Result<Activity, MemoryError> {
    let mut own = Vec::new();
    let mut taker = taker.filter(|taker| taker.tracks());
    if taker.is_none() {
        for memory in memories {
            own.push(DirtyTracker::start(memory.clone())?);
        }
    }
    let mut look = || -> Result<Vec<Vec<Range<u64>>>, MemoryError> {
        match &mut taker {
            // What is found now counts for the next checkpoint all the same.
            Some(taker) => taker.peek(),
            None => own.iter_mut().map(DirtyTracker::take).collect(),
        }
    };
    // What was written before counts for nothing here.
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
