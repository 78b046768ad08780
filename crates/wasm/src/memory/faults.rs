//! Serving of faults on absent pages: an access of the guest waits until the page is provided.
//!
//! ```text
//!   guest thread ── accesses a page ──▶ faults ──▶ [`PageFaults::wait`] returns the page
//!                                          ▲                     │
//!                                          └── resumes ◀── `provide`, `provide_zeros`, `map`
//! ```
//!
//! A *missing* page is in neither file nor mapping; a *minor* fault concerns a page of the file
//! that is not mapped. Guests and the WASI layer access the mapping and wait; accesses through the
//! file ([`GuestMemory::read`], [`GuestMemory::write`]) do not fault, and serve the code that
//! provides pages. A memory has either dirty tracking ([`super::DirtyTracker`]) or fault serving:
//! the kernel allows one userfaultfd per range.
//!
//! If the kernel lacks support, [`PageFaults::start`] says what is missing: then all pages must be
//! present before the guest runs.

use super::uffd::{self, Unavailable, unavailable};
use super::{GuestMemory, MemoryError, PAGE_BYTES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// The kernel's event for a page fault, and its flags.
const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const FLAG_WRITE: u64 = 1;
pub(super) const FLAG_WP: u64 = 1 << 1;
const FLAG_MINOR: u64 = 1 << 2;
const MESSAGE_BYTES: usize = 32;

/// Kind of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The page is in neither file nor mapping.
    Missing,
    /// The page is in the file; [`PageFaults::map`] maps it.
    Minor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Byte offset of the page in the memory.
    pub page: u64,
    pub kind: FaultKind,
    /// Whether it is a write.
    pub write: bool,
}

/// Serves the faults of one memory.
///
/// When it is dropped, waiting accesses continue, and missing pages read as zero: end the machine
/// first, or provide all pages.
#[derive(Debug)]
pub struct PageFaults {
    memory: Arc<GuestMemory>,
    uffd: OwnedFd,
}

impl PageFaults {
    /// Starts serving: accesses to unmapped pages wait; missing ones, and with `minor` also those
    /// that are only in the file.
    ///
    /// # Errors
    /// [`Unavailable`] if the kernel or the process's privileges lack it.
    pub fn start(memory: Arc<GuestMemory>, minor: bool) -> Result<Self, Unavailable> {
        let remedy = "Linux 5.13 or newer has it.";
        let (features, mode) = if minor {
            (
                uffd::FEATURE_MISSING_SHMEM | uffd::FEATURE_MINOR_SHMEM,
                uffd::MODE_MISSING | uffd::MODE_MINOR,
            )
        } else {
            (uffd::FEATURE_MISSING_SHMEM, uffd::MODE_MISSING)
        };
        let what = "serving page faults of shared memory";
        let uffd = uffd::open(features, what, remedy)?;
        uffd::register(&uffd, &memory, mode).map_err(unavailable(what, remedy))?;
        Ok(PageFaults { memory, uffd })
    }

    /// Stops serving once all pages are present, even while other threads hold this. Missing pages
    /// read as zero.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn stop(&self) -> Result<(), MemoryError> {
        uffd::unregister(&self.uffd, &self.memory).map_err(|source| MemoryError::System {
            what: "stop serving page faults",
            source,
        })
    }

    /// Waits for a fault; `None` on time-out. Several threads may wait.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn wait(&self, timeout: Duration) -> Result<Option<Fault>, MemoryError> {
        let Some(FaultEvent { flags, address, .. }) = next_fault_event(&self.uffd, timeout)? else {
            return Ok(None);
        };
        Ok(Some(Fault {
            page: (address - self.memory.base() as u64) / PAGE_BYTES * PAGE_BYTES,
            kind: if flags & FLAG_MINOR == 0 {
                FaultKind::Missing
            } else {
                FaultKind::Minor
            },
            write: flags & FLAG_WRITE != 0,
        }))
    }

    /// Provides whole pages. `false` if the first that could not be provided was present already:
    /// its waiter continues with that.
    ///
    /// # Errors
    /// [`MemoryError::Outside`], [`MemoryError::System`].
    pub fn provide(&self, offset: u64, bytes: &[u8]) -> Result<bool, MemoryError> {
        let range = self.pages(offset, bytes.len() as u64)?;
        let mut done = 0;
        while done < bytes.len() {
            let mut request = uffd::CopyRequest {
                to: range.start + done as u64,
                from: bytes[done..].as_ptr() as u64,
                len: (bytes.len() - done) as u64,
                ..uffd::CopyRequest::default()
            };
            // SAFETY: the structure of this request; the source is a slice of
            // that length, the target whole pages within our own mapping, which
            // the kernel fills only where nothing is.
            let result = unsafe { uffd::ioctl(&self.uffd, uffd::COPY, &mut request) };
            match (result, usize::try_from(request.done)) {
                (Ok(_), _) => return Ok(true),
                // Interrupted: continue from there.
                (Err(_), Ok(count)) if count > 0 => done += count,
                (Err(error), _) => return self.already_present(error, range.start + done as u64),
            }
        }
        Ok(true)
    }

    /// Provides zero pages. `false` as in [`Self::provide`].
    ///
    /// # Errors
    /// As there.
    pub fn provide_zeros(&self, offset: u64, bytes: u64) -> Result<bool, MemoryError> {
        self.range_request(uffd::ZEROPAGE, offset, bytes)
    }

    /// Maps pages of the file: resolves minor faults. `false` as in [`Self::provide`].
    ///
    /// # Errors
    /// As there.
    pub fn map(&self, offset: u64, bytes: u64) -> Result<bool, MemoryError> {
        self.range_request(uffd::CONTINUE, offset, bytes)
    }

    /// Maps all pages of a range that are not yet mapped. The file must contain the whole range.
    ///
    /// # Errors
    /// As [`Self::provide`].
    pub fn map_rest(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        let range = self.pages(offset, bytes)?;
        let mut at = range.start;
        while at < range.end {
            let mut request = uffd::Request {
                start: at,
                len: range.end - at,
                ..uffd::Request::default()
            };
            // SAFETY: the structure of this request, whole pages within our own
            // mapping.
            let result = unsafe { uffd::ioctl(&self.uffd, uffd::CONTINUE, &mut request) };
            match (result, u64::try_from(request.done)) {
                (Ok(_), _) => break,
                (Err(_), Ok(count)) if count > 0 => at += count,
                (Err(error), _) => {
                    self.already_present(error, at)?;
                    at += PAGE_BYTES;
                }
            }
        }
        Ok(())
    }

    fn range_request(&self, what: u64, offset: u64, bytes: u64) -> Result<bool, MemoryError> {
        let range = self.pages(offset, bytes)?;
        let mut at = range.start;
        while at < range.end {
            let mut request = uffd::Request {
                start: at,
                len: range.end - at,
                ..uffd::Request::default()
            };
            // SAFETY: the structure of these requests, whole pages within our
            // own mapping.
            let result = unsafe { uffd::ioctl(&self.uffd, what, &mut request) };
            match (result, u64::try_from(request.done)) {
                (Ok(_), _) => return Ok(true),
                (Err(_), Ok(count)) if count > 0 => at += count,
                (Err(error), _) => return self.already_present(error, at),
            }
        }
        Ok(true)
    }

    /// The page is already present: wakes its waiters, since the kernel does not do it in this
    /// case.
    fn already_present(&self, error: std::io::Error, at: u64) -> Result<bool, MemoryError> {
        if error.raw_os_error() != Some(libc::EEXIST) {
            return Err(MemoryError::System {
                what: "bring pages",
                source: error,
            });
        }
        let mut range = [at, PAGE_BYTES];
        // SAFETY: the structure of this request: a range of our own mapping.
        unsafe { uffd::ioctl(&self.uffd, uffd::WAKE, &mut range) }.map_err(|source| {
            MemoryError::System {
                what: "wake the waiters of a page",
                source,
            }
        })?;
        Ok(false)
    }

    /// Addresses of whole pages of the memory.
    fn pages(&self, offset: u64, bytes: u64) -> Result<Range<u64>, MemoryError> {
        whole_pages(&self.memory, offset, bytes)
    }
}

fn wait_failed(source: std::io::Error) -> MemoryError {
    MemoryError::System {
        what: "wait for page faults",
        source,
    }
}

/// A page fault event of the kernel.
pub(super) struct FaultEvent {
    pub(super) flags: u64,
    pub(super) address: u64,
    /// ID of the OS thread; 0 where it was not requested.
    pub(super) thread: u32,
}

/// Waits for a page fault event. `None` on time-out, or if another thread was faster.
pub(super) fn next_fault_event(
    uffd: &OwnedFd,
    timeout: Duration,
) -> Result<Option<FaultEvent>, MemoryError> {
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let mut ready = [PollFd::new(uffd, PollFlags::IN)];
    match poll(&mut ready, Some(&timeout)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(None),
        Ok(_) => pending_fault_event(uffd),
        Err(errno) => Err(wait_failed(errno.into())),
    }
}

/// As [`next_fault_event`], without waiting.
pub(super) fn pending_fault_event(uffd: &OwnedFd) -> Result<Option<FaultEvent>, MemoryError> {
    let mut message = [0u8; MESSAGE_BYTES];
    match rustix::io::read(uffd, &mut message) {
        Ok(MESSAGE_BYTES) => {}
        // Another thread was faster.
        Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Err(errno) => return Err(wait_failed(errno.into())),
    }
    let word = |at: usize| {
        let bytes: [u8; 8] = message[at..at + 8].try_into().unwrap_or_default();
        u64::from_ne_bytes(bytes)
    };
    if message[0] != EVENT_PAGEFAULT {
        return Ok(None);
    }
    Ok(Some(FaultEvent {
        flags: word(8),
        address: word(16),
        // (The lower 32 bits.)
        thread: word(24) as u32,
    }))
}

/// Addresses of a run of whole accessible pages.
pub(super) fn whole_pages(
    memory: &GuestMemory,
    offset: u64,
    bytes: u64,
) -> Result<Range<u64>, MemoryError> {
    let size = memory.accessible_bytes();
    let end = offset.checked_add(bytes).filter(|end| {
        *end <= size && offset.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES)
    });
    match end {
        Some(end) => {
            let base = memory.base() as u64;
            Ok(base + offset..base + end)
        }
        None => Err(MemoryError::Outside {
            range: offset..offset.saturating_add(bytes),
            size_bytes: size,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;
    const LONG: Duration = Duration::from_secs(20);

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::new(2, Some(8), false, 1 << 30).unwrap())
    }

    fn load(memory: &GuestMemory, at: usize) -> u8 {
        // SAFETY: within the memory; no concurrent write to this byte.
        unsafe { std::ptr::read_volatile(memory.cells()[at].get()) }
    }

    fn store(memory: &GuestMemory, at: usize, byte: u8) {
        // SAFETY: as in `load`.
        unsafe { std::ptr::write_volatile(memory.cells()[at].get(), byte) }
    }

    /// Reads a byte on a separate thread while `serve` resolves its faults.
    fn served(memory: &Arc<GuestMemory>, at: usize, serve: impl FnOnce()) -> u8 {
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| load(memory, at));
            serve();
            reading.join().unwrap()
        })
    }

    fn expect(faults: &PageFaults) -> Fault {
        faults.wait(LONG).unwrap().expect("an access")
    }

    #[test]
    fn missing_pages_come_when_they_are_touched() {
        let memory = memory();
        let faults = PageFaults::start(memory.clone(), false).unwrap();
        let byte = served(&memory, 3 * PAGE + 17, || {
            let fault = expect(&faults);
            let expected = Fault {
                page: 3 * PAGE_BYTES,
                kind: FaultKind::Missing,
                write: false,
            };
            assert_eq!(fault, expected);
            assert!(faults.provide(fault.page, &[42; PAGE]).unwrap());
        });
        assert_eq!(byte, 42);
        // It is present now; providing it again has no effect.
        assert!(!faults.provide(3 * PAGE_BYTES, &[9; PAGE]).unwrap());
        assert_eq!(load(&memory, 3 * PAGE), 42);
        // No further access waits for it.
        assert_eq!(faults.wait(Duration::ZERO).unwrap(), None);
    }

    #[test]
    fn runs_of_pages_and_zeros_can_be_brought_ahead() {
        let memory = memory();
        let faults = PageFaults::start(memory.clone(), false).unwrap();
        let bytes: Vec<u8> = (0..4 * PAGE).map(|at| (at / PAGE) as u8 + 1).collect();
        assert!(faults.provide(0, &bytes).unwrap());
        assert!(
            faults
                .provide_zeros(4 * PAGE_BYTES, 2 * PAGE_BYTES)
                .unwrap()
        );
        for page in 0..6 {
            let expected = [1, 2, 3, 4, 0, 0][page];
            assert_eq!(load(&memory, page * PAGE + 5), expected);
        }
        assert!(!faults.provide_zeros(0, PAGE_BYTES).unwrap());
        assert_eq!(faults.wait(Duration::ZERO).unwrap(), None);
    }

    #[test]
    fn writes_are_told_from_reads_and_kept() {
        let memory = memory();
        let faults = PageFaults::start(memory.clone(), false).unwrap();
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| store(&memory, PAGE + 1, 7));
            let fault = expect(&faults);
            assert!(fault.write);
            faults.provide(fault.page, &[1; PAGE]).unwrap();
            writing.join().unwrap();
        });
        assert_eq!((load(&memory, PAGE), load(&memory, PAGE + 1)), (1, 7));
    }

    #[test]
    fn what_the_file_has_is_shown_when_it_is_asked_for() {
        let memory = memory();
        memory.write(2 * PAGE_BYTES, &[5; PAGE]).unwrap();
        let faults = PageFaults::start(memory.clone(), true).unwrap();
        let byte = served(&memory, 2 * PAGE, || {
            let fault = expect(&faults);
            assert_eq!((fault.page, fault.kind), (2 * PAGE_BYTES, FaultKind::Minor));
            // Newer content, before the old one is visible.
            memory.write(2 * PAGE_BYTES, &[6; PAGE]).unwrap();
            assert!(faults.map(fault.page, PAGE_BYTES).unwrap());
        });
        assert_eq!(byte, 6);
        assert!(!faults.map(2 * PAGE_BYTES, PAGE_BYTES).unwrap());
        // A page in neither is still missing.
        let byte = served(&memory, 7 * PAGE, || {
            let fault = expect(&faults);
            assert_eq!(fault.kind, FaultKind::Missing);
            faults.provide_zeros(fault.page, PAGE_BYTES).unwrap();
        });
        assert_eq!(byte, 0);
    }

    #[test]
    fn what_is_shown_already_is_left_out() {
        let memory = memory();
        let bytes: Vec<u8> = (0..8 * PAGE).map(|at| (at / PAGE) as u8 + 1).collect();
        memory.write(0, &bytes).unwrap();
        let faults = PageFaults::start(memory.clone(), true).unwrap();
        for page in [0, 3, 4, 7] {
            assert!(faults.map(page * PAGE_BYTES, PAGE_BYTES).unwrap());
        }
        faults.map_rest(0, 8 * PAGE_BYTES).unwrap();
        for page in 0..8 {
            assert_eq!(load(&memory, page * PAGE + 9), page as u8 + 1);
        }
        assert_eq!(faults.wait(Duration::ZERO).unwrap(), None);
        assert_eq!(memory.populated_from(0).unwrap(), Some(0));
        assert_eq!(memory.populated_from(8 * PAGE_BYTES).unwrap(), None);
    }

    #[test]
    fn all_who_wait_for_a_page_go_on() {
        let memory = memory();
        let faults = PageFaults::start(memory.clone(), false).unwrap();
        std::thread::scope(|scope| {
            let reading: Vec<_> = (0..4)
                .map(|number| {
                    let memory = &memory;
                    scope.spawn(move || load(memory, 9 * PAGE + number))
                })
                .collect();
            let mut provided = false;
            while !reading.iter().all(|thread| thread.is_finished()) {
                if let Some(fault) = faults.wait(Duration::from_millis(10)).unwrap() {
                    // Later faults may be for a page that is present by now.
                    let first = faults.provide(fault.page, &[3; PAGE]).unwrap();
                    assert_eq!(first, !std::mem::replace(&mut provided, true));
                }
            }
            assert!(
                reading
                    .into_iter()
                    .all(|thread| thread.join().unwrap() == 3)
            );
        });
    }

    #[test]
    fn after_the_end_nothing_waits_and_writes_can_be_tracked() {
        let memory = memory();
        let faults = PageFaults::start(memory.clone(), false).unwrap();
        let byte = served(&memory, 5 * PAGE, || {
            expect(&faults);
            // Waiting accesses continue, with zeros.
            faults.stop().unwrap();
        });
        assert_eq!(byte, 0);
        assert_eq!(load(&memory, 6 * PAGE), 0);
        let mut tracker = crate::memory::DirtyTracker::start(memory.clone()).unwrap();
        store(&memory, 7 * PAGE, 1);
        let written = tracker.take().unwrap();
        assert_eq!(written.len(), 1);
        assert_eq!(written[0], 7 * PAGE_BYTES..8 * PAGE_BYTES);
    }

    #[test]
    fn grown_memory_is_served_too_and_nothing_outside_it() {
        let memory = memory();
        let faults = PageFaults::start(memory.clone(), false).unwrap();
        let outside = memory.size_bytes();
        for (offset, bytes) in [(outside, PAGE), (1, PAGE), (0, 5), (u64::MAX - 4095, PAGE)] {
            let error = faults.provide(offset, &vec![0; bytes]).unwrap_err();
            assert!(matches!(error, MemoryError::Outside { .. }), "{offset}");
        }
        memory.grow(1).unwrap();
        let byte = served(&memory, outside as usize, || {
            let fault = expect(&faults);
            assert_eq!(fault.page, outside);
            faults.provide(fault.page, &[8; PAGE]).unwrap();
        });
        assert_eq!(byte, 8);
    }
}
