//! Which pages a guest uses, of those that are here. The processor notes an access in the
//! page table, and the kernel shows that to nobody but the administrator. What it does
//! show is whether a page is in the process's page table at all (`/proc/self/pagemap`),
//! and taking it out of there costs a page of a file nothing but the next access's time
//! to put it back (below a microsecond; no thread of ours is asked). So:
//!
//! ```text
//!   taken out ── nobody touches it ──▶ is not in the page table: not used since
//!       ▲    └── somebody does ──────▶ is in it: used since, and taken out again
//!       └──────────────────────────────────────────────┘
//! ```
//!
//! (As the clock algorithm looks at reference bits and clears them: Corbató, "A Paging
//! Experiment with the Multics System", 1968.) Protections stay, as the kernel keeps
//! userfaultfd's for pages of files that are not in the table. Not for a memory whose
//! writes are tracked ([`super::DirtyTracker`]): there what is not in the table counts as
//! written.

use super::uffd::{Unavailable, unavailable};
use super::{GuestMemory, MemoryError, PAGE_BYTES, faults, open_private};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Bytes that the kernel says of each page, and the bit that says that it is in the table
/// (Documentation/admin-guide/mm/pagemap.rst).
const WORD: usize = 8;
const PRESENT: u64 = 1 << 63;
/// Pages that are looked at by one call.
const PAGES_PER_READ: usize = 512;

/// Sees the uses of one memory of a part.
#[derive(Debug)]
pub struct AccessTracker {
    memory: Arc<GuestMemory>,
    pagemap: OwnedFd,
}

impl AccessTracker {
    /// Of a memory that spans.
    ///
    /// # Errors
    /// [`Unavailable`] where /proc is not mounted.
    pub(super) fn of(memory: Arc<GuestMemory>) -> Result<Self, Unavailable> {
        let pagemap = open_private("/proc/self/pagemap")
            .map_err(|errno| unavailable("/proc/self/pagemap", "Mount /proc.")(errno.into()))?;
        Ok(AccessTracker { memory, pagemap })
    }

    /// Of each of some whole pages in a row whether it was used since it was looked at
    /// last, or came. (What the host does through the file is no use.)
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

    /// Takes pages out of the page table.
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
        let (memory, uses) = (spanning.memory(), spanning.uses());
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
        // (A page that comes from elsewhere is one that is used.)
        spanning.discard(PAGE_BYTES, PAGE_BYTES).unwrap();
        take();
        spanning.install(PAGE_BYTES, &[3; PAGE], false).unwrap();
        assert_eq!(which(take()), [1]);
        assert!(uses.take(memory.size_bytes(), PAGE_BYTES).is_err());
        assert!(uses.take(1, PAGE_BYTES).is_err());
        assert_eq!(spanning.wait(Duration::ZERO).unwrap(), None);
    }

    /// Being looked at takes no protection away, and adds none.
    #[test]
    fn what_is_protected_stays_protected() {
        let spanning = spanning();
        let (memory, uses) = (spanning.memory(), spanning.uses());
        for page in [0, PAGE_BYTES] {
            spanning.protect(page, PAGE_BYTES).unwrap();
        }
        word(memory, 0).load(Ordering::SeqCst);
        uses.take(0, PAGES * PAGE_BYTES).unwrap();
        // (Once it is, once it was not in the table when it is read.)
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

    /// Ends the other threads, also where one fails.
    struct Ends<'a>(&'a AtomicBool, &'a Spanning);

    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
            self.1.stop().unwrap();
        }
    }

    /// While others write, protect and allow, nothing that was written is lost, and
    /// nobody writes what is protected.
    #[test]
    fn looking_disturbs_nobody() {
        let spanning = spanning();
        let (memory, uses) = (spanning.memory(), spanning.uses());
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
                        // (It stands until what protected it allows it.)
                        assert!(touch.write);
                    }
                }
            });
            let writer = scope.spawn(move || {
                let begun = Instant::now();
                let mut count = 0;
                // (On a busy computer the others get to it now and then.)
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
