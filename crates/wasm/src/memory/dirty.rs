//! Which pages were written since the last look.
//!
//! The fast way needs Linux 6.7: userfaultfd write protection in asynchronous
//! mode (the kernel notes a write and lets it pass, about 1 µs) and the
//! `PAGEMAP_SCAN` ioctl, which reports written pages and protects them again in
//! one step. Where the kernel or the process's rights lack it, every page is
//! hashed at each look and compared with the hash before: slower (about 1 GB/s),
//! but right everywhere.

use super::{GuestMemory, MemoryError, PAGE_BYTES, open_private};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// How writes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Write protection in asynchronous mode.
    WriteProtect,
    /// Hashes of all pages.
    Hash,
}

/// Why the fast way is not to be had: what was missing.
#[derive(Debug, thiserror::Error)]
#[error(
    "{what} is not available ({source}); writes are found by hashing, which is slower. {remedy}"
)]
pub struct TrackError {
    what: &'static str,
    remedy: &'static str,
    source: std::io::Error,
}

/// Finds written pages of one memory while the guest runs.
#[derive(Debug)]
pub struct DirtyTracker {
    memory: Arc<GuestMemory>,
    found: Found,
    missing: Option<TrackError>,
}

#[derive(Debug)]
enum Found {
    Protect { _uffd: OwnedFd, pagemap: OwnedFd },
    Hash(Vec<u64>),
}

impl DirtyTracker {
    /// Starts to watch. Pages written from now on are reported by
    /// [`Self::take`].
    pub fn start(memory: Arc<GuestMemory>) -> Result<Self, MemoryError> {
        match protect(&memory) {
            Ok(found) => {
                let mut tracker = DirtyTracker {
                    memory,
                    found,
                    missing: None,
                };
                // The first look arms what reads as written.
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

    /// As [`Self::start`], by hashing in any case.
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

    /// The way in use.
    pub fn method(&self) -> Method {
        match self.found {
            Found::Protect { .. } => Method::WriteProtect,
            Found::Hash(_) => Method::Hash,
        }
    }

    /// Why it is not the fast way.
    pub fn missing(&self) -> Option<&TrackError> {
        self.missing.as_ref()
    }

    /// Byte ranges written since the last look, rising, in whole pages.
    ///
    /// # Errors
    /// [`MemoryError::System`] if the kernel does not answer.
    pub fn take(&mut self) -> Result<Vec<Range<u64>>, MemoryError> {
        let size = self.memory.size_bytes();
        match &mut self.found {
            Found::Protect { pagemap, .. } => scan(&self.memory, pagemap, size),
            Found::Hash(hashes) => compare(&self.memory, hashes, size),
        }
    }
}

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

// From linux/userfaultfd.h and linux/fs.h; no crate has all of them.
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_WRITEPROTECT: u64 = 0xC018_AA06;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;
const PAGEMAP_SCAN: u64 = 0xC060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}

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

/// # Safety
/// `argument` is the structure that the kernel expects for `request`.
unsafe fn ioctl<T>(fd: &OwnedFd, request: u64, argument: &mut T) -> std::io::Result<i32> {
    // SAFETY: the caller passes the right structure, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn protect(memory: &GuestMemory) -> Result<Found, TrackError> {
    let fail = |what, remedy| {
        move |source| TrackError {
            what,
            remedy,
            source,
        }
    };
    // SAFETY: the system call takes flags only and returns a new descriptor.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_userfaultfd,
            libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY,
        )
    };
    if fd < 0 {
        return Err(
            fail("userfaultfd", "Allow the system call in the sandbox.")(
                std::io::Error::last_os_error(),
            ),
        );
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let newer = "Linux 6.7 or newer has it.";
    let mut api = UffdioApi {
        api: UFFD_API,
        features: UFFD_FEATURE_WP_ASYNC
            | UFFD_FEATURE_WP_UNPOPULATED
            | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
        ioctls: 0,
    };
    // SAFETY: the structure of this request.
    unsafe { ioctl(&uffd, UFFDIO_API, &mut api) }
        .map_err(fail("asynchronous write protection", newer))?;
    let (start, len) = (memory.base() as u64, memory.reserved_bytes() as u64);
    let mut register = UffdioRegister {
        start,
        len,
        mode: UFFDIO_REGISTER_MODE_WP,
        ioctls: 0,
    };
    // SAFETY: the structure of this request; the range is our own mapping.
    unsafe { ioctl(&uffd, UFFDIO_REGISTER, &mut register) }
        .map_err(fail("write protection of shared memory", newer))?;
    let mut arm = UffdioWriteprotect {
        start,
        len: memory.size_bytes(),
        mode: UFFDIO_WRITEPROTECT_MODE_WP,
    };
    if arm.len > 0 {
        // SAFETY: as above.
        unsafe { ioctl(&uffd, UFFDIO_WRITEPROTECT, &mut arm) }
            .map_err(fail("write protection", newer))?;
    }
    let pagemap = open_private("/proc/self/pagemap")
        .map_err(|errno| fail("/proc/self/pagemap", "Mount /proc.")(errno.into()))?;
    let found = Found::Protect {
        _uffd: uffd,
        pagemap,
    };
    if let Found::Protect { pagemap, .. } = &found {
        // An empty look shows whether the kernel knows the request.
        let mut probe = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end: start + PAGE_BYTES,
            ..PmScanArg::default()
        };
        // SAFETY: the structure of this request, without an output vector.
        unsafe { ioctl(pagemap, PAGEMAP_SCAN, &mut probe) }.map_err(fail("PAGEMAP_SCAN", newer))?;
    }
    Ok(found)
}

/// Regions that one call reports.
const REGIONS: usize = 512;

fn scan(
    memory: &GuestMemory,
    pagemap: &OwnedFd,
    size: u64,
) -> Result<Vec<Range<u64>>, MemoryError> {
    let base = memory.base() as u64;
    let end = base + size;
    let mut regions = vec![PageRegion::default(); REGIONS];
    let mut ranges = Vec::new();
    let mut at = base;
    while at < end {
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: PM_SCAN_WP_MATCHING,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..PmScanArg::default()
        };
        // SAFETY: the structure of this request; the vector it names holds
        // `vec_len` regions and outlives the call.
        let filled = unsafe { ioctl(pagemap, PAGEMAP_SCAN, &mut argument) }.map_err(|source| {
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
