//! What was written last by a machine that stands: found while the target makes the
//! machine and the store commits, so that nobody waits for it.
//!
//! Its processors are needed: where there are only two, the target of a move between
//! neighbours, the agents and the store want the other one. So the thread of the move
//! looks piece by piece, only after all is sent that the target needs, and stops as soon
//! as the target answers; a thread of its own does what is left then, and names it. Further threads
//! help where there are processors for them, and memory enough.

use keel_wasm::memory::{DirtyTracker, MemoryError, Method};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// Pieces that are worth a further thread: about 256 MiB of memory.
const PIECES_A_THREAD: usize = 8;
/// Further threads at most.
const HELPERS_MAX: usize = 8;
/// Processors that are left to others.
const LEFT: usize = 2;

/// Byte ranges of a memory, by its number.
type Ranges = (usize, Vec<Range<u64>>);
/// Those of all.
pub(super) type Written = Vec<Ranges>;

struct Pieces {
    trackers: Vec<DirtyTracker>,
    pieces: Vec<(usize, Range<u64>)>,
    /// The first piece that nobody looks at yet.
    next: AtomicUsize,
}

impl Pieces {
    /// Looks at the next piece; `None` if there is none left.
    fn look(&self) -> Option<Result<Ranges, MemoryError>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (memory, piece) = self.pieces.get(number)?;
        let found = self.trackers[*memory].take_piece(piece.clone());
        Some(found.map(|ranges| (*memory, ranges)))
    }

    fn look_at_all(&self) -> Result<Written, MemoryError> {
        std::iter::from_fn(|| self.look()).collect()
    }
}

/// The looking.
pub(super) struct Looking {
    pieces: Arc<Pieces>,
    found: Result<Written, MemoryError>,
    helpers: Vec<JoinHandle<Result<Written, MemoryError>>>,
}

impl Looking {
    /// Begins. Nothing may write to these memories any more.
    pub(super) fn begin(mut trackers: Vec<DirtyTracker>) -> Self {
        let mut found = Ok(Vec::new());
        let mut pieces = Vec::new();
        for (number, tracker) in trackers.iter_mut().enumerate() {
            pieces.extend(tracker.pieces().into_iter().map(|piece| (number, piece)));
            // (That is slow in any case.)
            if tracker.method() == Method::Hash {
                found = found.and_then(|mut all: Written| {
                    all.push((number, tracker.take()?));
                    Ok(all)
                });
            }
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let helpers = processors.saturating_sub(LEFT).min(HELPERS_MAX);
        let helpers = helpers.min(pieces.len() / PIECES_A_THREAD);
        let mut looking = Looking {
            pieces: Arc::new(Pieces {
                trackers,
                pieces,
                next: AtomicUsize::new(0),
            }),
            found,
            helpers: Vec::new(),
        };
        for _ in 0..helpers {
            looking.help();
        }
        looking
    }

    /// A thread more; where there are no more threads, whoever waits does all.
    fn help(&mut self) {
        let pieces = self.pieces.clone();
        let helper = std::thread::Builder::new().name("look".into());
        self.helpers
            .extend(helper.spawn(move || pieces.look_at_all()));
    }

    /// Looks at a piece; false if there is none left.
    pub(super) fn look(&mut self) -> bool {
        let looked = self.pieces.look();
        let more = looked.is_some();
        if let Some(looked) = looked
            && let Ok(found) = &mut self.found
        {
            match looked {
                Ok(written) => found.push(written),
                Err(error) => self.found = Err(error),
            }
        }
        more
    }

    /// Waits for all of it.
    ///
    /// # Errors
    /// [`MemoryError`] if a piece could not be looked at: nothing is known then.
    pub(super) fn end(&mut self) -> Result<Written, MemoryError> {
        while self.look() {}
        let mut all = std::mem::replace(&mut self.found, Ok(Vec::new()));
        for helper in self.helpers.drain(..) {
            let found = helper
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            all = all.and_then(|mut all| {
                all.extend(found?);
                Ok(all)
            });
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_wasm::memory::GuestMemory;

    fn memory() -> Arc<GuestMemory> {
        let pages = (1u64 << 30) / (64 << 10);
        Arc::new(GuestMemory::new(pages, Some(pages), false, 1 << 30).unwrap())
    }

    #[test]
    fn whoever_looks_each_piece_is_looked_at_once() {
        let memory = memory();
        for begin_with in [0, 3, 1000] {
            let tracker = DirtyTracker::start(memory.clone()).unwrap();
            if tracker.method() == Method::Hash {
                println!("skipped: written pages are found by hashing here");
                return;
            }
            let mut looking = Looking::begin(vec![tracker]);
            let pieces = looking.pieces.pieces.len();
            assert_eq!(pieces, 32);
            for _ in 0..begin_with {
                looking.look();
            }
            assert_eq!(looking.end().unwrap().len(), pieces, "{begin_with}");
            assert_eq!(looking.end().unwrap(), []);
        }
    }

    #[test]
    fn what_is_hashed_is_found_at_once() {
        let memory = memory();
        let tracker = DirtyTracker::start_hashing(memory.clone()).unwrap();
        memory.write(5 << 20, &[7]).unwrap();
        let mut looking = Looking::begin(vec![tracker]);
        assert!(!looking.look());
        let page = 5 << 20..(5 << 20) + 4096;
        assert_eq!(looking.end().unwrap(), [(0, vec![page])]);
    }
}
