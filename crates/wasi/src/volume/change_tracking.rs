//! Tracking of changes to a volume, for moves and checkpoints.
//!
//! A write is recorded *after* it reached the backing file: taking the record and then reading
//! yields the new bytes. (A record taken before would be gone when the bytes arrive.) Truncation
//! removes records behind the new end and is itself recorded; so truncations must be applied before
//! bytes are copied. Truncations of files created since the last call are not recorded: a program
//! that creates and removes files all day produces no records.

use super::blocks::{BLOCK_BYTES, BlockSet, UNIT_BYTES, units_of};
use crate::lock::locked;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

/// Changes of one volume. Truncations apply first, then bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Inode number, and the byte from which on all was removed.
    pub cuts: Vec<(u64, u64)>,
    /// Inode number and bytes that may be new, in order; they may extend behind the file's end.
    pub bytes: Vec<(u64, Range<u64>)>,
}

impl Changes {
    /// Upper bound of the number of bytes.
    pub fn bytes(&self) -> u64 {
        let runs = self.bytes.iter();
        runs.map(|(_, run)| run.end - run.start).sum()
    }

    /// Extended to whole blocks, in order; the input may be unordered.
    #[must_use]
    pub fn whole_blocks(mut self) -> Changes {
        // Runs can be merged by their ends only if sorted.
        self.bytes
            .sort_unstable_by_key(|(inode, run)| (*inode, run.start));
        let mut bytes: Vec<(u64, Range<u64>)> = Vec::with_capacity(self.bytes.len());
        for (inode, run) in self.bytes {
            let start = run.start / BLOCK_BYTES * BLOCK_BYTES;
            let end = run.end.next_multiple_of(BLOCK_BYTES);
            match bytes.last_mut() {
                Some((last, run)) if *last == inode && start <= run.end => {
                    run.end = end.max(run.end);
                }
                _ => bytes.push((inode, start..end)),
            }
        }
        let cuts = self.cuts;
        Changes { cuts, bytes }
    }

    /// The bytes in pieces of at most [`BLOCK_BYTES`].
    pub fn pieces(&self) -> impl Iterator<Item = (u64, Range<u64>)> {
        self.bytes.iter().flat_map(|(inode, run)| {
            let starts = (run.start..run.end).step_by(BLOCK_BYTES as usize);
            starts.map(|start| (*inode, start..run.end.min(start + BLOCK_BYTES)))
        })
    }
}

#[derive(Debug, Default)]
struct Notes {
    cuts: BTreeMap<u64, u64>,
    /// Units of 4 KiB.
    units: BTreeMap<u64, BlockSet>,
    /// The consumer knows only inodes below this number.
    known_below: u64,
}

/// Collects the changes of one volume until they are taken. Trackers are independent; a dropped one
/// stops.
#[derive(Debug)]
pub struct Tracker {
    notes: Arc<Mutex<Notes>>,
    next_inode: Arc<AtomicU64>,
}

impl Tracker {
    /// All changes since the tracker started, or since the last call. The first call returns all
    /// existing data.
    pub fn take(&self) -> Changes {
        let notes = {
            let mut notes = locked(&self.notes);
            let fresh = Notes {
                known_below: self.next_inode.load(Ordering::Acquire),
                ..Notes::default()
            };
            std::mem::replace(&mut *notes, fresh)
        };
        changes_of(&notes)
    }
}

impl Tracker {
    /// The changes so far, without taking them.
    pub fn peek(&self) -> Changes {
        changes_of(&locked(&self.notes))
    }

    /// Number of recorded bytes.
    pub fn noted_bytes(&self) -> u64 {
        let notes = locked(&self.notes);
        notes.units.values().map(|set| set.len() * UNIT_BYTES).sum()
    }

    /// Records changes from before the start, or that were taken but not transferred.
    pub fn note(&self, bytes: &[(u64, Range<u64>)]) {
        let mut notes = locked(&self.notes);
        for (inode, bytes) in bytes {
            notes.written(*inode, bytes.clone());
        }
    }
}

fn changes_of(notes: &Notes) -> Changes {
    let runs = |(inode, set): (&u64, &BlockSet)| {
        let inode = *inode;
        let runs = set.runs().into_iter();
        runs.map(move |run| (inode, run.start * UNIT_BYTES..run.end * UNIT_BYTES))
    };
    Changes {
        cuts: notes
            .cuts
            .iter()
            .map(|(inode, from)| (*inode, *from))
            .collect(),
        bytes: notes.units.iter().flat_map(runs).collect(),
    }
}

#[derive(Debug, Default)]
pub(crate) struct Trackers {
    all: RwLock<Vec<Weak<Mutex<Notes>>>>,
    next_inode: Arc<AtomicU64>,
}

impl Trackers {
    /// Trackers of a volume whose next file gets this inode number.
    pub(crate) fn new(next_inode: u64) -> Self {
        Self {
            all: RwLock::default(),
            next_inode: Arc::new(AtomicU64::new(next_inode)),
        }
    }

    /// Allocates the next inode number; numbers are never reused.
    pub(crate) fn take_inode(&self) -> u64 {
        self.next_inode.fetch_add(1, Ordering::AcqRel)
    }

    pub(crate) fn next_inode(&self) -> u64 {
        self.next_inode.load(Ordering::Acquire)
    }

    /// A new tracker without records.
    pub(crate) fn add(&self) -> Tracker {
        let notes = Arc::default();
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&notes));
        Tracker {
            notes,
            next_inode: self.next_inode.clone(),
        }
    }

    fn each(&self, note: impl Fn(&mut Notes)) {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        for tracker in all.iter().filter_map(Weak::upgrade) {
            note(&mut locked(&tracker));
        }
    }

    /// Records new bytes.
    pub(crate) fn written(&self, inode: u64, bytes: Range<u64>) {
        self.each(|notes| notes.written(inode, bytes.clone()));
    }

    /// Records a truncation.
    pub(crate) fn cut(&self, inode: u64, from: u64) {
        self.each(|notes| {
            if inode < notes.known_below {
                let cut = notes.cuts.entry(inode).or_insert(from);
                *cut = from.min(*cut);
            }
            if let Some(set) = notes.units.get_mut(&inode) {
                set.remove_from(from.div_ceil(UNIT_BYTES));
                if set.is_empty() {
                    notes.units.remove(&inode);
                }
            }
        });
    }
}

impl Notes {
    fn written(&mut self, inode: u64, bytes: Range<u64>) {
        if !bytes.is_empty() {
            let units = units_of(bytes);
            self.units.entry(inode).or_default().insert(units);
        }
    }
}

impl Tracker {
    /// Records data from before its start.
    pub(crate) fn seed(&self, inode: u64, bytes: Range<u64>) {
        locked(&self.notes).written(inode, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = UNIT_BYTES;

    #[test]
    fn notes_are_taken_once_by_each() {
        let trackers = Trackers::new(3);
        let first = trackers.add();
        trackers.written(1, 0..3 * UNIT);
        assert_eq!(first.take().bytes, [(1, 0..3 * UNIT)]);
        let second = trackers.add();
        trackers.written(1, 2 * UNIT + 1..4 * UNIT + 1);
        trackers.written(2, 7 * UNIT..7 * UNIT + 1);
        trackers.cut(1, 4 * UNIT - 9);
        trackers.cut(1, 6 * UNIT);
        let bytes = vec![(1, 2 * UNIT..4 * UNIT), (2, 7 * UNIT..8 * UNIT)];
        let expected = Changes {
            cuts: vec![(1, 4 * UNIT - 9)],
            bytes: bytes.clone(),
        };
        assert_eq!(expected.bytes(), 3 * UNIT);
        assert_eq!(first.take(), expected);
        assert_eq!(first.take(), Changes::default());
        // An unknown inode needs no truncation.
        let cuts = Vec::new();
        assert_eq!(second.take(), Changes { cuts, bytes });
        drop(second);
        // Removed.
        trackers.cut(2, 0);
        trackers.written(1, 9..9);
        assert_eq!(first.take().cuts, [(2, 0)]);
        // Created and removed between two calls.
        assert_eq!((trackers.take_inode(), trackers.next_inode()), (3, 4));
        trackers.written(3, 0..1);
        trackers.cut(3, 0);
        assert_eq!(first.take(), Changes::default());
        trackers.cut(3, 0);
        assert_eq!(first.take().cuts, [(3, 0)]);
    }

    #[test]
    fn pieces_are_not_too_long() {
        let changes = Changes {
            cuts: Vec::new(),
            bytes: vec![(1, UNIT..2 * BLOCK_BYTES), (2, 0..UNIT)],
        };
        let pieces = changes.pieces().collect::<Vec<_>>();
        let expected = [
            (1, UNIT..BLOCK_BYTES + UNIT),
            (1, BLOCK_BYTES + UNIT..2 * BLOCK_BYTES),
            (2, 0..UNIT),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn whole_blocks_of_runs_in_any_order_miss_none() {
        let runs = vec![
            (7, 10 * BLOCK_BYTES..11 * BLOCK_BYTES),
            (9, UNIT..2 * UNIT),
            (7, UNIT..9 * BLOCK_BYTES + 1),
            (7, 12 * BLOCK_BYTES..12 * BLOCK_BYTES + UNIT),
            (7, 2 * UNIT..3 * UNIT),
        ];
        let changes = Changes {
            cuts: vec![(7, 5)],
            bytes: runs,
        };
        let expected = Changes {
            cuts: vec![(7, 5)],
            bytes: vec![
                (7, 0..11 * BLOCK_BYTES),
                (7, 12 * BLOCK_BYTES..13 * BLOCK_BYTES),
                (9, 0..BLOCK_BYTES),
            ],
        };
        assert_eq!(changes.whole_blocks(), expected);
    }
}
