//! Dirty page tracking.
//!
//! The fast method needs Linux 6.7: userfaultfd write protection in asynchronous mode (the kernel
//! records a write and lets it pass, about 1 µs) and the `PAGEMAP_SCAN` ioctl, which reports
//! written pages and re-protects them atomically. If the kernel or the process's privileges lack
//! it, every page is hashed at each scan and compared with its previous hash: slower (about 1
//! GB/s), but always available.

use super::uffd::{self, Unavailable, unavailable};
use super::{GuestMemory, MemoryError, PAGE_BYTES, open_private};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Write protection in asynchronous mode.
    WriteProtect,
    /// Hashes of all pages.
    Hash,
}

/// Tracks dirty pages of one memory while the guest runs.
#[derive(Debug)]
pub struct DirtyTracker {
    memory: Arc<GuestMemory>,
    found: Found,
    missing: Option<Unavailable>,
}

#[derive(Debug)]
enum Found {
    Protect { _uffd: OwnedFd, pagemap: OwnedFd },
    Hash(Vec<u64>),
}

impl DirtyTracker {
    /// Starts tracking. [`Self::take`] reports pages written from now on.
    pub fn start(memory: Arc<GuestMemory>) -> Result<Self, MemoryError> {
        match protect(&memory) {
            Ok(found) => {
                let mut tracker = DirtyTracker {
                    memory,
                    found,
                    missing: None,
                };
                // The first scan re-protects everything: it all reads as written.
                tracker.take()?;
                Ok(tracker)
            }
            Err(missing) => {
                let mut tracker = Self::start_hashing(memory)?;
                tracker.missing = Some(missing);
                Ok(tracker)
            }
        }
    }

    /// As [`Self::start`], always by hashing.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn start_hashing(memory: Arc<GuestMemory>) -> Result<Self, MemoryError> {
        let mut tracker = DirtyTracker {
            memory,
            found: Found::Hash(Vec::new()),
            missing: None,
        };
        tracker.take()?;
        Ok(tracker)
    }

    pub fn method(&self) -> Method {
        match self.found {
            Found::Protect { .. } => Method::WriteProtect,
            Found::Hash(_) => Method::Hash,
        }
    }

    /// Why the fast method is unavailable.
    pub fn missing(&self) -> Option<&Unavailable> {
        self.missing.as_ref()
    }

    /// Byte ranges written since the last scan, ascending, in whole pages.
    ///
    /// # Errors
    /// [`MemoryError::System`] if a system call fails.
    pub fn take(&mut self) -> Result<Vec<Range<u64>>, MemoryError> {
        let size = self.memory.size_bytes();
        match &mut self.found {
            Found::Protect { pagemap, .. } => scan(&self.memory, pagemap, 0..size),
            Found::Hash(hashes) => compare(&self.memory, hashes, size),
        }
    }

    /// Splits the memory into pieces, each of which [`Self::take_piece`] scans in about 50 µs;
    /// empty if pages are hashed.
    pub fn pieces(&self) -> Vec<Range<u64>> {
        let size = self.memory.size_bytes();
        match self.found {
            Found::Hash(_) => Vec::new(),
            Found::Protect { .. } => (0..size)
                .step_by(SCAN_BYTES as usize)
                .map(|start| start..size.min(start + SCAN_BYTES))
                .collect(),
        }
    }

    /// As [`Self::take`], for one piece: several threads can each take the next one. Empty if pages
    /// are hashed: [`Self::take`] handles them.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_piece(&self, piece: Range<u64>) -> Result<Vec<Range<u64>>, MemoryError> {
        match &self.found {
            Found::Protect { pagemap, .. } => scan(&self.memory, pagemap, piece),
            Found::Hash(_) => Ok(Vec::new()),
        }
    }

    /// As [`Self::take`], by several threads if the memory is large: for a frozen machine, while
    /// processors are idle.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_at_once(&mut self) -> Result<Vec<Range<u64>>, MemoryError> {
        let size = self.memory.size_bytes();
        let Found::Protect { pagemap, .. } = &self.found else {
            return self.take();
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let most = usize::try_from(size / BYTES_PER_THREAD_MIN).unwrap_or(THREADS_MAX);
        let shares = threads.min(THREADS_MAX).min(most).max(1) as u64;
        let memory = &self.memory;
        let share = size.div_ceil(shares).next_multiple_of(PAGE_BYTES);
        let look = move |number: u64| {
            let start = (number * share).min(size);
            scan(memory, pagemap, start..(start + share).min(size))
        };
        let mut found = std::thread::scope(|scope| {
            let others: Vec<_> = (1..shares)
                .map(|number| {
                    // (If no thread can be spawned, this one does all.)
                    std::thread::Builder::new().spawn_scoped(scope, move || look(number))
                })
                .collect();
            let mut found = vec![look(0)];
            for (number, other) in (1..).zip(others) {
                found.push(match other {
                    Ok(thread) => thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    Err(_) => look(number),
                });
            }
            found.into_iter()
        });
        let mut ranges = Vec::new();
        found.try_for_each(|found| {
            found?
                .into_iter()
                .for_each(|range| push(&mut ranges, range));
            Ok(())
        })?;
        Ok(ranges)
    }
}

/// Bytes per additional scanning thread: scanning this takes about 0.25 ms.
const BYTES_PER_THREAD_MIN: u64 = 256 << 20;
const THREADS_MAX: usize = 8;

fn compare(
    memory: &GuestMemory,
    hashes: &mut Vec<u64>,
    size: u64,
) -> Result<Vec<Range<u64>>, MemoryError> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let pages = (size / PAGE_BYTES) as usize;
    let zero = page_hash(&[0; PAGE_BYTES as usize]);
    hashes.resize(pages, zero);
    let mut page = vec![0; PAGE_BYTES as usize];
    for range in memory.populated()? {
        for at in (range.start..range.end).step_by(PAGE_BYTES as usize) {
            let number = (at / PAGE_BYTES) as usize;
            if number >= pages {
                break;
            }
            memory.read(at, &mut page)?;
            let hash = page_hash(&page);
            if std::mem::replace(&mut hashes[number], hash) != hash {
                push(&mut ranges, at..at + PAGE_BYTES);
            }
        }
    }
    Ok(ranges)
}

fn page_hash(page: &[u8]) -> u64 {
    let hash = blake3::hash(page);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap_or_default())
}

fn push(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

// From linux/fs.h.
const PAGEMAP_SCAN: u64 = 0xC060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Remedy if the fast method is missing.
const NEWER: &str = "Linux 6.7 or newer has it.";

fn protect(memory: &GuestMemory) -> Result<Found, Unavailable> {
    Ok(Found::Protect {
        _uffd: open_protection(memory)?,
        pagemap: open_pagemap(memory)?,
    })
}

/// Enables asynchronous write protection for the whole memory.
pub(super) fn open_protection(memory: &GuestMemory) -> Result<OwnedFd, Unavailable> {
    let features =
        uffd::FEATURE_WP_ASYNC | uffd::FEATURE_WP_UNPOPULATED | uffd::FEATURE_WP_HUGETLBFS_SHMEM;
    let uffd = uffd::open(features, "asynchronous write protection", NEWER)?;
    uffd::register(&uffd, memory, uffd::MODE_WP)
        .map_err(unavailable("write protection of shared memory", NEWER))?;
    let start = memory.base() as u64;
    let mut arm = uffd::Request {
        start,
        len: memory.size_bytes(),
        mode: uffd::WRITEPROTECT_MODE_WP,
        ..uffd::Request::default()
    };
    if arm.len > 0 {
        // SAFETY: the structure of this request begins so; the range is our own
        // mapping.
        unsafe { uffd::ioctl(&uffd, uffd::WRITEPROTECT, &mut arm) }
            .map_err(unavailable("write protection", NEWER))?;
    }
    Ok(uffd)
}

/// Opens the pagemap, if the kernel supports `PAGEMAP_SCAN`.
pub(super) fn open_pagemap(memory: &GuestMemory) -> Result<OwnedFd, Unavailable> {
    let pagemap = open_private("/proc/self/pagemap")
        .map_err(|errno| unavailable("/proc/self/pagemap", "Mount /proc.")(errno.into()))?;
    let start = memory.base() as u64;
    // An empty scan tests whether the kernel supports the request.
    let mut probe = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start,
        end: start + PAGE_BYTES,
        ..PmScanArg::default()
    };
    // SAFETY: the structure of this request, without an output vector.
    unsafe { uffd::ioctl(&pagemap, PAGEMAP_SCAN, &mut probe) }
        .map_err(unavailable("PAGEMAP_SCAN", NEWER))?;
    Ok(pagemap)
}

/// Bytes per scan request: the kernel does not preempt a request, and downtime has priority.
const SCAN_BYTES: u64 = 32 << 20;
/// Regions reported per call.
const REGIONS: usize = 512;

fn scan(
    memory: &GuestMemory,
    pagemap: &OwnedFd,
    range: Range<u64>,
) -> Result<Vec<Range<u64>>, MemoryError> {
    let base = memory.base() as u64;
    let end = base + range.end;
    let mut regions = vec![PageRegion::default(); REGIONS];
    let mut ranges = Vec::new();
    let mut at = base + range.start;
    while at < end {
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: PM_SCAN_WP_MATCHING,
            start: at,
            end: end.min(at + SCAN_BYTES),
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..PmScanArg::default()
        };
        // SAFETY: the structure of this request; the vector it names holds
        // `vec_len` regions and outlives the call.
        let filled =
            unsafe { uffd::ioctl(pagemap, PAGEMAP_SCAN, &mut argument) }.map_err(|source| {
                MemoryError::System {
                    what: "scan for written pages",
                    source,
                }
            })?;
        for region in &regions[..filled as usize] {
            push(&mut ranges, region.start - base..region.end - base);
        }
        if argument.walk_end <= at {
            break;
        }
        at = argument.walk_end;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::WASM_PAGE_BYTES;

    /// Writes like a guest, through the mapping.
    fn store(memory: &GuestMemory, offset: u64, byte: u8) {
        // SAFETY: the cell belongs to this memory, without concurrent accesses.
        unsafe { std::ptr::write_volatile(memory.cells()[offset as usize].get(), byte) };
    }

    /// Large enough for several threads; includes the bounds of their shares.
    #[test]
    fn several_threads_find_what_one_finds() {
        let pages = 5 * BYTES_PER_THREAD_MIN / WASM_PAGE_BYTES + 3;
        let size = pages * WASM_PAGE_BYTES;
        let memory = GuestMemory::new(pages, Some(pages), false, size).unwrap();
        let memory = Arc::new(memory);
        let mut byte = 0;
        for start in [DirtyTracker::start, DirtyTracker::start_hashing] {
            let mut tracker = start(memory.clone()).unwrap();
            for round in 1..4 {
                // Hashes only detect changes.
                byte += 1;
                let mut expected: Vec<Range<u64>> = Vec::new();
                for at in (0..size).step_by((17 << 20) + round * 4096) {
                    store(&memory, at, byte);
                    let page = at - at % PAGE_BYTES;
                    push(&mut expected, page..page + PAGE_BYTES);
                }
                for share in 1..=THREADS_MAX as u64 {
                    let bound = (size / share).next_multiple_of(PAGE_BYTES);
                    for at in [bound.saturating_sub(1), bound.min(size - 1)] {
                        store(&memory, at, byte);
                        let page = at - at % PAGE_BYTES;
                        expected.push(page..page + PAGE_BYTES);
                    }
                }
                expected.sort_unstable_by_key(|range| range.start);
                expected.dedup();
                let mut pages = Vec::new();
                for range in expected {
                    push(&mut pages, range);
                }
                let found = if round == 2 && tracker.method() == Method::WriteProtect {
                    let mut found = Vec::new();
                    for piece in tracker.pieces() {
                        for range in tracker.take_piece(piece).unwrap() {
                            push(&mut found, range);
                        }
                    }
                    found
                } else {
                    tracker.take_at_once().unwrap()
                };
                assert_eq!(found, pages, "{round}");
                assert_eq!(tracker.take_at_once().unwrap(), [], "{round}");
                assert_eq!(tracker.take().unwrap(), [], "{round}");
            }
        }
    }
}
