//! The memory of a machine that spans: this part has some of its pages, may write some
//! of these, and a thread that touches another stands until somebody brings it.
//!
//! ```text
//!   guest thread ── touches a page that is not here, ──▶ stands ──▶ [`Spanning::wait`]
//!                   or writes one that is protected        ▲              │ says which
//!                                                          │              ▼
//!                  goes on ◀── `install`, `allow`, `wake` ─┴── `coherence` decides
//! ```
//!
//! The opposite of [`super::DirtyTracker`]: there the kernel notes a write and lets it
//! pass, here it waits, since another part may be reading. Both use write protection by
//! userfaultfd, whose mode is one for the whole descriptor, so a memory is in one mode
//! or the other. Who brings pages and takes them away goes through the file, as the
//! registered mapping would fault (the descriptor is for user code's faults only, which
//! needs no rights).

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
/// When it is dropped, accesses that wait go on, and find zeros in pages that are not
/// here: end the machine first, or bring all pages.
#[derive(Debug)]
pub struct Spanning {
    memory: Arc<GuestMemory>,
    uffd: OwnedFd,
    uses: AccessTracker,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Offset of the page in the memory.
    pub page: u64,
    /// Of the first byte that it wants, in the page.
    pub byte: u64,
    /// Whether it wants to write.
    pub write: bool,
    /// The OS thread that waits, by its number.
    pub thread: u32,
}

impl Spanning {
    /// From now on accesses to pages that are not here wait, and writes to pages that are
    /// protected. What is here may be written.
    ///
    /// # Errors
    /// [`Unavailable`] where the kernel or the process's rights lack it.
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
        let uses = AccessTracker::of(memory.clone())?;
        Ok(Spanning { memory, uffd, uses })
    }

    /// All pages are here and may be written: no access waits any more.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn stop(&self) -> Result<(), MemoryError> {
        uffd::unregister(&self.uffd, &self.memory).map_err(system("end the serving of page faults"))
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Which pages are used, of those that are here.
    pub fn uses(&self) -> &AccessTracker {
        &self.uses
    }

    /// Can be read when an access waits.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Waits for an access; `None` if there was none in that time, or another thread has
    /// it.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn wait(&self, timeout: Duration) -> Result<Option<Touch>, MemoryError> {
        let word = faults::next_fault_event(&self.uffd, timeout)?;
        Ok(word.map(|word| self.touch(word)))
    }

    /// An access that waits already.
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

    /// Puts whole pages in place that are not here, and wakes who waits for them. To be
    /// read only, they are protected before anybody sees them.
    ///
    /// # Errors
    /// [`MemoryError::Outside`], [`MemoryError::System`]; one that is here already is
    /// such an error.
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
                // Stopped in the middle: again from there.
                (Err(_), Ok(count)) if count > 0 => done += count,
                (Err(error), _) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                (Err(error), _) => return Err(system("put a page in place")(error)),
            }
        }
        Ok(())
    }

    /// Lets pages be written, and wakes who waits for that.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn allow(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.write_protect(offset, bytes, 0, "let a page be written")
    }

    /// Lets pages be read only. When this returns nobody writes them.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn protect(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        // What was never touched is not in the file, and nothing to protect.
        self.allocate(offset, bytes)?;
        self.protect_here(offset, bytes)
    }

    /// As [`Self::protect`], of pages that are in the file: to look whether they are takes
    /// longer than this.
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
                // The mapping is being changed: again.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(system(what)(error)),
            }
        }
    }

    /// Takes pages away. When this returns nobody reads them; the next access waits.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn discard(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.address(offset, bytes)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry_on_intr(|| fallocate(self.memory.file(), flags, offset, bytes))
            .map_err(|errno| system("take a page away")(errno.into()))
    }

    /// Wakes who waits for pages that are here. What was never touched becomes zero.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn wake(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.allocate(offset, bytes)?;
        let mut range = [self.address(offset, bytes)?, bytes];
        // SAFETY: the structure of this request: a range of our own mapping.
        unsafe { uffd::ioctl(&self.uffd, uffd::WAKE, &mut range) }
            .map(drop)
            .map_err(system("wake those who wait for a page"))
    }

    /// Makes pages that the file does not have zero; others stay as they are.
    fn allocate(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        self.address(offset, bytes)?;
        let flags = FallocateFlags::empty();
        retry_on_intr(|| fallocate(self.memory.file(), flags, offset, bytes))
            .map_err(|errno| system("make a page")(errno.into()))
    }

    /// Address of whole pages of the memory.
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

    /// A word of a memory, as guests have it.
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
            // It stands, and nothing is written.
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
        // A second time it is not put in place.
        assert!(spanning.install(PAGE_BYTES, &[8; PAGE], true).is_err());
    }

    /// What a part had when the machine began to span is its own: also what nobody
    /// touched yet.
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

    /// A writer that runs on while its page is protected, read and let go, over and over:
    /// what is read after protecting stays so until it is let go.
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
            // (On a busy computer the writer does not get to it between all of them.)
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
        // And the other way round, from a memory that was tracked.
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
