//! Finds the pages that a frozen machine wrote last, while the target builds the machine
//! and the store commits, so that the scan adds no downtime.
//!
//! Processors are scarce: where there are only two, the target of a move between
//! neighbours, the agents and the store need the other one. So the move's thread scans
//! piece by piece, only after it has sent all that the target needs, and stops when the
//! target answers; a thread of its own scans the rest and names the pages. Further
//! threads help where processors and memory size justify them.

use keel_wasm::memory::{DirtyTracker, MemoryError, Method};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// Pieces that justify a further thread: about 256 MiB of memory.
const PIECES_A_THREAD: usize = 8;
/// The most further threads.
const HELPERS_MAX: usize = 8;
/// Processors left to other work.
const PROCESSORS_RESERVED: usize = 2;

/// Byte ranges of a memory, by its number.
type MemoryRanges = (usize, Vec<Range<u64>>);
/// Ranges of all memories.
pub(super) type DirtyRanges = Vec<MemoryRanges>;

struct Pieces {
    trackers: Vec<DirtyTracker>,
    pieces: Vec<(usize, Range<u64>)>,
    /// The first piece that no thread scans yet.
    next: AtomicUsize,
}

impl Pieces {
    /// Scans the next piece; `None` if none is left.
    fn scan_piece(&self) -> Option<Result<MemoryRanges, MemoryError>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (memory, piece) = self.pieces.get(number)?;
        let found = self.trackers[*memory].take_piece(piece.clone());
        Some(found.map(|ranges| (*memory, ranges)))
    }

    fn scan_all(&self) -> Result<DirtyRanges, MemoryError> {
        std::iter::from_fn(|| self.scan_piece()).collect()
    }
}

/// A scan in progress.
pub(super) struct ResidualDirtyScan {
    pieces: Arc<Pieces>,
    found: Result<DirtyRanges, MemoryError>,
    helpers: Vec<JoinHandle<Result<DirtyRanges, MemoryError>>>,
}

impl ResidualDirtyScan {
    /// Starts the scan. Nothing may write to these memories any more.
    pub(super) fn begin(mut trackers: Vec<DirtyTracker>) -> Self {
        let mut found = Ok(Vec::new());
        let mut pieces = Vec::new();
        for (number, tracker) in trackers.iter_mut().enumerate() {
            pieces.extend(tracker.pieces().into_iter().map(|piece| (number, piece)));
            // Hashing is slow in any case.
            if tracker.method() == Method::Hash {
                found = found.and_then(|mut all: DirtyRanges| {
                    all.push((number, tracker.take()?));
                    Ok(all)
                });
            }
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let helpers = processors
            .saturating_sub(PROCESSORS_RESERVED)
            .min(HELPERS_MAX);
        let helpers = helpers.min(pieces.len() / PIECES_A_THREAD);
        let mut scan = ResidualDirtyScan {
            pieces: Arc::new(Pieces {
                trackers,
                pieces,
                next: AtomicUsize::new(0),
            }),
            found,
            helpers: Vec::new(),
        };
        for _ in 0..helpers {
            scan.start_helper();
        }
        scan
    }

    /// Starts a further thread; if that fails, the caller scans the rest itself.
    fn start_helper(&mut self) {
        let pieces = self.pieces.clone();
        let helper = std::thread::Builder::new().name("look".into());
        self.helpers.extend(helper.spawn(move || pieces.scan_all()));
    }

    /// Scans a piece; false if none is left.
    pub(super) fn scan_piece(&mut self) -> bool {
        let scanned = self.pieces.scan_piece();
        let more = scanned.is_some();
        if let Some(scanned) = scanned
            && let Ok(found) = &mut self.found
        {
            match scanned {
                Ok(written) => found.push(written),
                Err(error) => self.found = Err(error),
            }
        }
        more
    }

    /// Completes the scan.
    ///
    /// # Errors
    /// [`MemoryError`] if a piece could not be scanned: the result is unknown then.
    pub(super) fn end(&mut self) -> Result<DirtyRanges, MemoryError> {
        while self.scan_piece() {}
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
    fn each_piece_is_scanned_once() {
        let memory = memory();
        for begin_with in [0, 3, 1000] {
            let tracker = DirtyTracker::start(memory.clone()).unwrap();
            if tracker.method() == Method::Hash {
                println!("skipped: dirty pages are found by hashing here");
                return;
            }
            let mut scan = ResidualDirtyScan::begin(vec![tracker]);
            let pieces = scan.pieces.pieces.len();
            assert_eq!(pieces, 32);
            for _ in 0..begin_with {
                scan.scan_piece();
            }
            assert_eq!(scan.end().unwrap().len(), pieces, "{begin_with}");
            assert_eq!(scan.end().unwrap(), []);
        }
    }

    #[test]
    fn hashed_memory_is_scanned_at_once() {
        let memory = memory();
        let tracker = DirtyTracker::start_hashing(memory.clone()).unwrap();
        memory.write(5 << 20, &[7]).unwrap();
        let mut scan = ResidualDirtyScan::begin(vec![tracker]);
        assert!(!scan.scan_piece());
        let page = 5 << 20..(5 << 20) + 4096;
        assert_eq!(scan.end().unwrap(), [(0, vec![page])]);
    }
}
