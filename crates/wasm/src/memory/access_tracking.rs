//! Tracking of the resident pages that a guest accesses. The accessed bits of the page table are
//! visible to administrators only. Visible to the process is whether a page is mapped
//! (`/proc/self/pagemap`), and unmapping a file page costs only the minor fault of its next access
//! (below a microsecond, handled by the kernel). So:
//!
//! ```text
//!   unmapped ── no access ──▶ still unmapped: not used since
//!       ▲   └── access ─────▶ mapped: used since, and unmapped again
//!       └───────────────────────────────┘
//! ```
//!
//! (The CLOCK algorithm, with mapping in place of reference bits: Corbató, "A Paging Experiment
//! with the Multics System", 1968.) Protections persist, as the kernel keeps userfaultfd protection
//! for unmapped file pages. Not for a memory with dirty tracking ([`super::DirtyTracker`]), where
//! an unmapped page counts as written.

use super::uffd::{Unavailable, unavailable};
use super::{GuestMemory, MemoryError, PAGE_BYTES, faults, open_private};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Bytes per pagemap entry, and the bit that says that a page is mapped
/// (Documentation/admin-guide/mm/pagemap.rst).
const WORD: usize = 8;
const PRESENT: u64 = 1 << 63;
/// Pages per read of the pagemap.
const PAGES_PER_READ: usize = 512;

/// Tracks accesses to one memory of a part.
#[derive(Debug)]
pub struct AccessTracker {
    memory: Arc<GuestMemory>,
    pagemap: OwnedFd,
}

impl AccessTracker {
    /// A tracker for a memory that spans.
    ///
    /// # Errors
    /// [`Unavailable`] if /proc is not mounted.
    pub(super) fn of(memory: Arc<GuestMemory>) -> Result<Self, Unavailable> {
        let pagemap = open_private("/proc/self/pagemap")
            .map_err(|errno| unavailable("/proc/self/pagemap", "Mount /proc.")(errno.into()))?;
        Ok(AccessTracker { memory, pagemap })
    }

    /// For each of a run of whole pages, whether the guest accessed it since the last call, or it
    /// arrived since. (Host accesses through the file do not count.)
    ///
    /// # Errors
    /// [`MemoryError::Outside`], [`MemoryError::System`].
    pub fn take(&self, offset: u64, bytes: u64) -> Result<Vec<bool>, MemoryError> {
        let range = faults::whole_pages(&self.memory, offset, bytes)?;
        let mut used = Vec::with_capacity((bytes / PAGE_BYTES) as usize);
        let mut words = [0; PAGES_PER_READ * WORD];
        let mut at = range.start;
        while at < range.end {
            let pages = ((range.end - at) / PAGE_BYTES).min(PAGES_PER_READ as u64) as usize;
            let room = &mut words[..pages * WORD];
            let from = at / PAGE_BYTES * WORD as u64;
            let count =
                rustix::io::retry_on_intr(|| rustix::io::pread(&self.pagemap, &mut *room, from))
                    .map_err(|errno| failed(errno.into()))?;
            if count < WORD {
                return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let (exposed, _) = room[..count].as_chunks::<WORD>();
            used.extend(
                exposed
                    .iter()
                    .map(|word| u64::from_ne_bytes(*word) & PRESENT != 0),
            );
            at += exposed.len() as u64 * PAGE_BYTES;
        }
        let mut first = range.start;
        for run in used.chunk_by(|one, other| one == other) {
            let end = first + run.len() as u64 * PAGE_BYTES;
            if run[0] {
                self.unmap(first..end)?;
            }
            first = end;
        }
        Ok(used)
    }

    /// Unmaps pages.
    fn unmap(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let bytes = (range.end - range.start) as usize;
        // SAFETY: whole pages within our own mapping, which is shared and of a file: what
        // is in them stays in the file, and the next access finds it there.
        let result =
            unsafe { libc::madvise(range.start as *mut libc::c_void, bytes, libc::MADV_DONTNEED) };
        match result {
            0 => Ok(()),
            _ => Err(failed(std::io::Error::last_os_error())),
        }
    }
}

fn failed(source: std::io::Error) -> MemoryError {
    MemoryError::System {
        what: "see which pages are used",
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Spanning;
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    const LONG: Duration = Duration::from_secs(20);
    const PAGE: usize = PAGE_BYTES as usize;
    const PAGES: u64 = 8;

    fn word(memory: &GuestMemory, at: usize) -> &AtomicU64 {
        // SAFETY: aligned and within the memory, which is used by atomic operations only.
        unsafe { AtomicU64::from_ptr(memory.cells()[at].get().cast()) }
    }

    fn spanning() -> Spanning {
        let memory = Arc::new(GuestMemory::new(2, Some(8), false, 1 << 30).unwrap());
        let all: Vec<u8> = (0..PAGES as usize * PAGE)
            .map(|at| (at / PAGE) as u8)
            .collect();
        memory.write(0, &all).unwrap();
        Spanning::start(memory).unwrap()
    }

    #[test]
    fn what_is_used_is_seen_once_and_stays_as_it_is() {
        let spanning = spanning();
        let (memory, uses) = (spanning.memory(), spanning.access_tracker());
        let take = || uses.take(0, PAGES * PAGE_BYTES).unwrap();
        let which = |used: Vec<bool>| {
            let pages = used.iter().enumerate().filter(|(_, used)| **used);
            pages.map(|(page, _)| page).collect::<Vec<_>>()
        };
        take();
        assert!(which(take()).is_empty(), "nobody did anything");
        assert_eq!(
            word(memory, 2 * PAGE).load(Ordering::SeqCst),
            0x0202_0202_0202_0202
        );
        word(memory, 5 * PAGE + 8).store(9, Ordering::SeqCst);
        word(memory, 6 * PAGE).fetch_add(1, Ordering::SeqCst);
        assert_eq!(which(take()), [2, 5, 6]);
        assert!(which(take()).is_empty());
        assert_eq!(word(memory, 5 * PAGE + 8).load(Ordering::SeqCst), 9);
        let mut seen = [0; 8];
        memory.read(6 * PAGE_BYTES, &mut seen).unwrap();
        assert_eq!(seen, [7, 6, 6, 6, 6, 6, 6, 6]);
        // (A page that arrives from elsewhere counts as accessed.)
        spanning.discard(PAGE_BYTES, PAGE_BYTES).unwrap();
        take();
        spanning.install(PAGE_BYTES, &[3; PAGE], false).unwrap();
        assert_eq!(which(take()), [1]);
        assert!(uses.take(memory.size_bytes(), PAGE_BYTES).is_err());
        assert!(uses.take(1, PAGE_BYTES).is_err());
        assert_eq!(spanning.wait(Duration::ZERO).unwrap(), None);
    }

    /// Tracking neither removes nor adds a protection.
    #[test]
    fn what_is_protected_stays_protected() {
        let spanning = spanning();
        let (memory, uses) = (spanning.memory(), spanning.access_tracker());
        for page in [0, PAGE_BYTES] {
            spanning.protect(page, PAGE_BYTES).unwrap();
        }
        word(memory, 0).load(Ordering::SeqCst);
        uses.take(0, PAGES * PAGE_BYTES).unwrap();
        // (Read both while mapped and while unmapped.)
        for page in [0, PAGE] {
            std::thread::scope(|scope| {
                let guest = scope.spawn(move || {
                    word(memory, page).load(Ordering::SeqCst);
                    word(memory, page).store(1, Ordering::SeqCst);
                });
                let touch = spanning.wait(LONG).unwrap().expect("it waits");
                assert_eq!((touch.page, touch.write), (page as u64, true));
                uses.take(0, PAGES * PAGE_BYTES).unwrap();
                assert!(!guest.is_finished());
                spanning.allow(page as u64, PAGE_BYTES).unwrap();
                guest.join().unwrap();
            });
        }
        assert_eq!(spanning.wait(Duration::ZERO).unwrap(), None);
    }

    /// Ends the other threads, also on failure.
    struct Ends<'a>(&'a AtomicBool, &'a Spanning);

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
            self.1.stop().unwrap();
        }
    }

    /// Under concurrent writes, protection and its removal, no write is lost, and no write passes a
    /// protection.
    #[test]
    fn looking_disturbs_nobody() {
        let spanning = spanning();
        let (memory, uses) = (spanning.memory(), spanning.access_tracker());
        let (over, seen, protected) = (
            AtomicBool::new(false),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        let (over, seen, protected) = (&over, &seen, &protected);
        std::thread::scope(|scope| {
            let ends = Ends(over, &spanning);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let used = uses.take(0, PAGES * PAGE_BYTES).unwrap();
                    let used = used.iter().filter(|used| **used).count();
                    seen.fetch_add(used, Ordering::Relaxed);
                }
            });
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if let Some(touch) = spanning.wait(Duration::from_millis(5)).unwrap() {
                        // (The thread faults until the write is allowed.)
                        assert!(touch.write);
                    }
                }
            });
            let writer = scope.spawn(move || {
                let begun = Instant::now();
                let mut count = 0;
                // (On a busy host other threads run only now and then.)
                while [seen, protected]
                    .iter()
                    .any(|it| it.load(Ordering::Relaxed) < 2000)
                {
                    assert!(begun.elapsed() < LONG, "{seen:?}, {protected:?}");
                    let page = (count % PAGES) as usize;
                    word(memory, page * PAGE + 64).fetch_add(1, Ordering::Relaxed);
                    count += 1;
                }
                count
            });
            let read = |page: u64| {
                let mut bytes = [0; 8];
                memory.read(page * PAGE_BYTES + 64, &mut bytes).unwrap();
                u64::from_ne_bytes(bytes)
            };
            let mut page = 0;
            while !writer.is_finished() {
                page = (page + 1) % PAGES;
                spanning.protect(page * PAGE_BYTES, PAGE_BYTES).unwrap();
                let first = read(page);
                std::thread::yield_now();
                assert_eq!(read(page), first);
                spanning.allow(page * PAGE_BYTES, PAGE_BYTES).unwrap();
                protected.fetch_add(1, Ordering::Relaxed);
            }
            let count = writer.join().unwrap();
            drop(ends);
            for page in 0..PAGES {
                let begun = u64::from_ne_bytes([page as u8; 8]);
                let written = count / PAGES + u64::from(page < count % PAGES);
                assert_eq!(read(page) - begun, written);
            }
        });
    }
}
