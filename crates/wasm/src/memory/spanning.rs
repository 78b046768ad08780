//! The memory of a machine that spans: this part has some of its pages, may write some of these,
//! and a thread that accesses another page waits until it is installed.
//!
//! ```text
//!   guest thread ── accesses an absent page, or ──▶ faults ──▶ [`Spanning::wait`]
//!                   writes a protected one            ▲              │ returns the page
//!                                                     │              ▼
//!             resumes ◀── `install`, `allow`, `wake` ─┴── `coherence` decides
//! ```
//!
//! The counterpart of [`super::DirtyTracker`], where the kernel records a write and lets it pass;
//! here the write waits, since another part may be reading. Both use userfaultfd write protection,
//! whose mode applies to the whole descriptor, so a memory is in one mode or the other. Pages are
//! installed and discarded through the file, as accesses through the registered mapping would fault
//! (the descriptor covers user-mode faults only, which needs no privileges).

use super::access_tracking::AccessTracker;
use super::uffd::{self, Unavailable, unavailable};
use super::{GuestMemory, MemoryError, PAGE_BYTES, faults};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::retry_on_intr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// One memory of a part.
///
/// When it is dropped, waiting accesses continue, and absent pages read as zero: end the machine
/// first, or install all pages.
#[derive(Debug)]
pub struct Spanning {
    memory: Arc<GuestMemory>,
    uffd: OwnedFd,
    access_tracker: AccessTracker,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Byte offset of the page in the memory.
    pub page: u64,
    /// Offset of the accessed byte in the page.
    pub byte: u64,
    /// Whether it is a write.
    pub write: bool,
    /// ID of the waiting OS thread.
    pub thread: u32,
}

impl Spanning {
    /// Starts: accesses to absent pages and writes to protected pages wait. Present pages are
    /// writable.
    ///
    /// # Errors
    /// [`Unavailable`] if the kernel or the process's privileges lack it.
    pub fn start(memory: Arc<GuestMemory>) -> Result<Self, Unavailable> {
        let (what, remedy) = (
            "write protection of shared memory",
            "Linux 5.19 or newer has it: without it no part of a machine can run here.",
        );
        let features = uffd::FEATURE_MISSING_SHMEM
            | uffd::FEATURE_WP_HUGETLBFS_SHMEM
            | uffd::FEATURE_THREAD_ID
            | uffd::FEATURE_EXACT_ADDRESS;
        let uffd = uffd::open(features, what, remedy)?;
        uffd::register(&uffd, &memory, uffd::MODE_MISSING | uffd::MODE_WP)
            .map_err(unavailable(what, remedy))?;
        let access_tracker = AccessTracker::of(memory.clone())?;
        Ok(Spanning {
            memory,
            uffd,
            access_tracker,
        })
    }

    /// Stops once all pages are present and writable: no access waits any more.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn stop(&self) -> Result<(), MemoryError> {
        uffd::unregister(&self.uffd, &self.memory).map_err(system("stop serving page faults"))
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The access tracker of its resident pages.
    pub fn access_tracker(&self) -> &AccessTracker {
        &self.access_tracker
    }

    /// Readable when an access waits.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Waits for a fault; `None` on time-out, or if another thread takes it.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn wait(&self, timeout: Duration) -> Result<Option<Touch>, MemoryError> {
        let word = faults::next_fault_event(&self.uffd, timeout)?;
        Ok(word.map(|word| self.touch(word)))
    }

    /// Returns a pending fault without waiting.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn next(&self) -> Result<Option<Touch>, MemoryError> {
        let word = faults::pending_fault_event(&self.uffd)?;
        Ok(word.map(|word| self.touch(word)))
    }

    fn touch(&self, word: faults::FaultEvent) -> Touch {
        let at = word.address - self.memory.base() as u64;
        Touch {
            page: at / PAGE_BYTES * PAGE_BYTES,
            byte: at % PAGE_BYTES,
            write: word.flags & (faults::FLAG_WRITE | faults::FLAG_WP) != 0,
            thread: word.thread,
        }
    }

    /// Installs whole absent pages, and wakes their waiters. Read-only pages are protected before
    /// they become visible.
    ///
    /// # Errors
    /// [`MemoryError::Outside`], [`MemoryError::System`]; also for a page that is present.
    pub fn install(&self, offset: u64, bytes: &[u8], write: bool) -> Result<(), MemoryError> {
        let start = self.address(offset, bytes.len() as u64)?;
        let mut done = 0;
        while done < bytes.len() {
            let mut request = uffd::CopyRequest {
                to: start + done as u64,
                from: bytes[done..].as_ptr() as u64,
                len: (bytes.len() - done) as u64,
                mode: if write { 0 } else { uffd::COPY_MODE_WP },
                ..uffd::CopyRequest::default()
            };
            // SAFETY: the structure of this request; the source is a slice of that
            // length, the target whole pages within our own mapping, which the kernel
            // fills only where nothing is.
            let result = unsafe { uffd::ioctl(&self.uffd, uffd::COPY, &mut request) };
            match (result, usize::try_from(request.done)) {
                (Ok(_), _) => return Ok(()),
                // Interrupted: continue from there.
                (Err(_), Ok(count)) if count > 0 => done += count,
                (Err(error), _) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                (Err(error), _) => return Err(system("install a page")(error)),
            }
        }
        Ok(())
    }

    /// Makes pages writable, and wakes their waiters.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn allow(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.write_protect(offset, bytes, 0, "let a page be written")
    }

    /// Write-protects pages. When this returns no thread writes them.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn protect(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        // An untouched page is not in the file, and cannot be protected.
        self.allocate(offset, bytes)?;
        self.protect_here(offset, bytes)
    }

    /// As [`Self::protect`], for pages known to be in the file: checking takes longer than this.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn protect_here(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.write_protect(offset, bytes, uffd::WRITEPROTECT_MODE_WP, "protect a page")
    }

    fn write_protect(
        &self,
        offset: u64,
        bytes: u64,
        mode: u64,
        what: &'static str,
    ) -> Result<(), MemoryError> {
        let mut request = [self.address(offset, bytes)?, bytes, mode];
        loop {
            // SAFETY: the structure of this request (a range, a mode): whole pages within
            // our own mapping.
            match unsafe { uffd::ioctl(&self.uffd, uffd::WRITEPROTECT, &mut request) } {
                Ok(_) => return Ok(()),
                // The mapping is being changed: retry.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(system(what)(error)),
            }
        }
    }

    /// Discards pages. When this returns no thread reads them; the next access waits.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn discard(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.address(offset, bytes)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry_on_intr(|| fallocate(self.memory.file(), flags, offset, bytes))
            .map_err(|errno| system("take a page away")(errno.into()))
    }

    /// Wakes the waiters of present pages. Untouched pages become zero.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn wake(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.allocate(offset, bytes)?;
        let mut range = [self.address(offset, bytes)?, bytes];
        // SAFETY: the structure of this request: a range of our own mapping.
        unsafe { uffd::ioctl(&self.uffd, uffd::WAKE, &mut range) }
            .map(drop)
            .map_err(system("wake the waiters of a page"))
    }

    /// Allocates zero pages where the file has none; others are unchanged.
    fn allocate(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.address(offset, bytes)?;
        let flags = FallocateFlags::empty();
        retry_on_intr(|| fallocate(self.memory.file(), flags, offset, bytes))
            .map_err(|errno| system("make a page")(errno.into()))
    }

    /// Address of a run of whole pages.
    fn address(&self, offset: u64, bytes: u64) -> Result<u64, MemoryError> {
        faults::whole_pages(&self.memory, offset, bytes).map(|range| range.start)
    }
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> MemoryError {
    move |source| MemoryError::System { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const PAGE: usize = PAGE_BYTES as usize;
    const LONG: Duration = Duration::from_secs(20);

    fn spanning() -> Spanning {
        let memory = Arc::new(GuestMemory::new(2, Some(8), false, 1 << 30).unwrap());
        Spanning::start(memory).unwrap()
    }

    /// A word of a memory, accessed like a guest does.
    fn word(memory: &GuestMemory, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8));
        // SAFETY: aligned and within the memory, which is used by atomic operations only.
        unsafe { AtomicU64::from_ptr(memory.cells()[at].get().cast()) }
    }

    fn expect(memory: &Spanning) -> Touch {
        memory.wait(LONG).unwrap().expect("an access")
    }

    #[test]
    fn pages_come_to_be_read_and_then_to_be_written() {
        let spanning = spanning();
        let at = 3 * PAGE + 16;
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let word = word(spanning.memory(), at);
                let read = word.load(Ordering::SeqCst);
                word.store(read + 1, Ordering::SeqCst);
                word.load(Ordering::SeqCst)
            });
            let page = 3 * PAGE_BYTES;
            let touch = expect(&spanning);
            assert_eq!((touch.page, touch.byte, touch.write), (page, 16, false));
            assert_ne!(touch.thread, 0);
            let mut bytes = vec![0; PAGE];
            bytes[16] = 41;
            spanning.install(page, &bytes, false).unwrap();
            let touch = expect(&spanning);
            assert_eq!((touch.page, touch.byte, touch.write), (page, 16, true));
            assert_ne!(touch.thread, 0);
            // The thread waits, and nothing is written.
            let mut seen = [0; 8];
            spanning.memory().read(at as u64, &mut seen).unwrap();
            assert_eq!(seen[0], 41);
            spanning.allow(page, PAGE_BYTES).unwrap();
            assert_eq!(guest.join().unwrap(), 42);
        });
        assert_eq!(spanning.wait(Duration::ZERO).unwrap(), None);
    }

    #[test]
    fn what_comes_to_be_written_is_written_at_once() {
        let spanning = spanning();
        std::thread::scope(|scope| {
            let guest =
                scope.spawn(|| word(spanning.memory(), PAGE).fetch_add(1, Ordering::SeqCst));
            let touch = expect(&spanning);
            assert!(touch.write);
            spanning.install(touch.page, &[7; PAGE], true).unwrap();
            assert_eq!(guest.join().unwrap(), u64::from_ne_bytes([7; 8]));
        });
        assert_eq!(spanning.wait(Duration::ZERO).unwrap(), None);
        // A second install fails.
        assert!(spanning.install(PAGE_BYTES, &[8; PAGE], true).is_err());
    }

    /// Pages present when the machine started to span stay, also untouched ones.
    #[test]
    fn what_was_here_is_written_and_given_away() {
        let memory = Arc::new(GuestMemory::new(2, Some(8), false, 1 << 30).unwrap());
        memory.write(0, &[5; PAGE]).unwrap();
        let spanning = Spanning::start(memory.clone()).unwrap();
        assert_eq!(word(&memory, 8).fetch_add(1, Ordering::SeqCst) as u8, 5);
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| word(&memory, PAGE).fetch_add(9, Ordering::SeqCst));
            let touch = expect(&spanning);
            assert_eq!(touch.page, PAGE_BYTES);
            spanning.wake(touch.page, PAGE_BYTES).unwrap();
            assert_eq!(guest.join().unwrap(), 0);
        });
        for (page, first) in [(0, 5), (PAGE_BYTES, 9), (2 * PAGE_BYTES, 0)] {
            spanning.protect(page, PAGE_BYTES).unwrap();
            let mut seen = [0];
            memory.read(page, &mut seen).unwrap();
            assert_eq!(seen[0], first);
            spanning.discard(page, PAGE_BYTES).unwrap();
        }
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| word(&memory, 0).load(Ordering::SeqCst));
            let touch = expect(&spanning);
            spanning.install(touch.page, &[1; PAGE], false).unwrap();
            assert_eq!(guest.join().unwrap(), u64::from_ne_bytes([1; 8]));
        });
    }

    /// A writer runs while its page is repeatedly protected, read and released: the contents do not
    /// change while it is protected.
    #[test]
    fn nobody_writes_what_is_protected() {
        let spanning = spanning();
        let memory = spanning.memory();
        let stop = AtomicBool::new(false);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if let Some(touch) = spanning.wait(Duration::from_millis(5)).unwrap()
                        && !touch.write
                    {
                        spanning.wake(touch.page, PAGE_BYTES).unwrap();
                    }
                }
            });
            spanning.wake(0, PAGE_BYTES).unwrap();
            let writer = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    word(memory, 64).fetch_add(1, Ordering::Relaxed);
                }
            });
            let read = || {
                let mut bytes = [0; 8];
                memory.read(64, &mut bytes).unwrap();
                u64::from_ne_bytes(bytes)
            };
            let (mut last, mut rounds, mut changes) = (0, 0, 0);
            let begun = std::time::Instant::now();
            // (On a busy host the writer does not run between all rounds.)
            while rounds < 2000 || changes < 50 {
                assert!(begun.elapsed() < LONG, "{changes} changes");
                spanning.protect(0, PAGE_BYTES).unwrap();
                let first = read();
                std::hint::spin_loop();
                assert_eq!(read(), first);
                assert!(first >= last);
                (rounds, changes) = (rounds + 1, changes + u32::from(first > last));
                last = first;
                spanning.allow(0, PAGE_BYTES).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            spanning.allow(0, PAGE_BYTES).unwrap();
            writer.join().unwrap();
            over.store(true, Ordering::Relaxed);
            serving.join().unwrap();
        });
    }

    #[test]
    fn afterwards_nothing_waits_and_writes_can_be_tracked() {
        let spanning = spanning();
        let memory = spanning.memory().clone();
        spanning.install(0, &[3; PAGE], false).unwrap();
        spanning.allow(0, PAGE_BYTES).unwrap();
        spanning.stop().unwrap();
        word(&memory, 0).store(1, Ordering::SeqCst);
        word(&memory, 5 * PAGE).store(1, Ordering::SeqCst);
        drop(spanning);
        let mut tracker = crate::memory::DirtyTracker::start(memory.clone()).unwrap();
        word(&memory, 5 * PAGE).store(2, Ordering::SeqCst);
        let written = tracker.take().unwrap();
        assert_eq!(written.len(), 1);
        assert_eq!(written[0], 5 * PAGE_BYTES..6 * PAGE_BYTES);
        // The reverse: from a memory with dirty tracking.
        drop(tracker);
        let spanning = Spanning::start(memory.clone()).unwrap();
        word(&memory, 5 * PAGE).store(3, Ordering::SeqCst);
        assert_eq!(spanning.wait(Duration::ZERO).unwrap(), None);
    }

    #[test]
    fn nothing_outside_is_touched() {
        let spanning = spanning();
        let size = spanning.memory().size_bytes();
        for (offset, bytes) in [(size, PAGE_BYTES), (1, PAGE_BYTES), (0, 5)] {
            let outside = |result: Result<(), MemoryError>| {
                assert!(
                    matches!(result, Err(MemoryError::Outside { .. })),
                    "{offset}"
                );
            };
            outside(spanning.protect(offset, bytes));
            outside(spanning.allow(offset, bytes));
            outside(spanning.discard(offset, bytes));
            outside(spanning.wake(offset, bytes));
            outside(spanning.install(offset, &vec![0; bytes as usize], true));
        }
    }
}
