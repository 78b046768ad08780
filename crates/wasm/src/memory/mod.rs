//! A machine's memory: a memfd that every thread's instance maps at the same address.
//!
//! The guest accesses the mapping at full speed; moves and checkpoints access the file. This module
//! and its children encapsulate all `unsafe` memory code behind safe functions.
//!
//! - `creator`: passes our mappings to wasmtime at instantiation
//! - `dirty`: dirty page tracking
//! - `faults`: serving faults of absent pages
//! - `spanning`: memory of a machine that spans
//! - `access_tracking`: tracking of accessed pages
//! - `probe`: detection of kernel features
//! - `uffd`: the userfaultfd interface
//!
//! The reservation is mapped without access; growth extends the file first and then enables access,
//! so that an access beyond the size always faults and never reads past the file's end.

mod access_tracking;
mod creator;
mod dirty;
mod faults;
mod probe;
mod spanning;
mod uffd;

pub use access_tracking::AccessTracker;
pub use creator::{Control, Creator, with_memories};
pub use dirty::{DirtyTracker, Method};
pub use faults::{Fault, FaultKind, PageFaults};
pub use probe::{HostSupport, probe};
pub use spanning::{Spanning, Touch};
pub use uffd::Unavailable;

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, ftruncate, memfd_create};
use rustix::io::{pread, retry_on_intr};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munmap};
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Name of the memfd in `/proc/PID/maps`.
const FILE_NAME: &str = "keel-guest";
/// Bytes of one WebAssembly page.
pub const WASM_PAGE_BYTES: u64 = 64 << 10;
/// Bytes of one page of the host, the unit of moves.
pub const PAGE_BYTES: u64 = 4096;
/// Address space reserved for a 32-bit memory: the full range of an index.
const RESERVE_32_BYTES: usize = 4 << 30;
/// Address space reserved for a 64-bit memory, which is also its limit.
const RESERVE_64_BYTES: usize = 64 << 30;
/// Bytes zeroed per step.
const CLEAR_BYTES: usize = 16 << 10;
/// Guard region behind a reservation. Generated code elides bounds checks for constant offsets up
/// to this size.
pub(crate) const GUARD_BYTES: usize = 32 << 20;

/// Bytes of the memories of a process (`process` is its folder in `/proc`), mapped or not: pages
/// written through the file and not yet touched are unmapped, and so are pages under access
/// tracking ([`AccessTracker`]). `None` if it has no memory, or its open files cannot be listed.
pub fn bytes_of_process(process: &Path) -> Option<u64> {
    let name = format!("/memfd:{FILE_NAME}");
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(process.join("fd")).ok()?.flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.as_os_str().as_bytes().starts_with(name.as_bytes())
            && let Ok(file) = std::fs::metadata(entry.path())
        {
            // (A file may be open twice. Blocks are 512 bytes: stat(2).)
            files.insert(file.ino(), file.blocks().saturating_mul(512));
        }
    }
    let all = files.values().copied().reduce(u64::saturating_add);
    all.filter(|bytes| *bytes > 0)
}

/// Why a memory cannot be created or accessed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot {what}: {source}")]
    System {
        what: &'static str,
        source: std::io::Error,
    },
    /// The module demands more than its limit.
    #[error(
        "the module starts with {wanted_bytes} bytes of memory, the limit is {limit_bytes} (raise it with --memory)"
    )]
    Limit {
        /// Initial size.
        wanted_bytes: u64,
        /// Limit.
        limit_bytes: u64,
    },
    /// A range outside of the memory.
    #[error("bytes {}..{} are outside a memory of {size_bytes} bytes", range.start, range.end)]
    Outside {
        range: Range<u64>,
        /// Current size.
        size_bytes: u64,
    },
}

fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> MemoryError {
    move |errno| MemoryError::System {
        what,
        source: errno.into(),
    }
}

/// An address range that is unmapped when dropped.
#[derive(Debug)]
struct Reservation {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the range is plain address space; all access to it goes through
// atomic operations, `UnsafeCell`s or the kernel.
unsafe impl Send for Reservation {}
// SAFETY: as above.
unsafe impl Sync for Reservation {}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by this module, and its owner is gone,
        // so nothing refers to it.
        let result = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(result.is_ok());
    }
}

/// One linear memory of a machine.
#[derive(Debug)]
pub struct GuestMemory {
    file: std::fs::File,
    reservation: Reservation,
    /// Bytes that the guest may access.
    size: AtomicUsize,
    /// Bytes accessible through the guest's mapping: more than the size while it grows at all parts
    /// of a machine.
    mapped: AtomicUsize,
    /// Bytes accessible to the host, and the file's length: the maximum of all mapped sizes.
    accessible: AtomicUsize,
    /// The largest size that an instance has seen. Instances do not forget it: the engine's own
    /// code would not survive a fault below it.
    exposed: AtomicUsize,
    /// Growth limit in bytes, by module and spec.
    limit: AtomicU64,
    /// Growth limit in bytes by module and reservation, independent of the spec.
    maximum: u64,
    memory64: bool,
    growing: Mutex<()>,
}

impl GuestMemory {
    /// A zeroed memory of `minimum_pages` that may grow to `maximum_pages` (as
    /// far as `limit_bytes` allows); both in units of 64 KiB.
    ///
    /// # Errors
    /// [`MemoryError::Limit`] if it does not fit, [`MemoryError::System`] if
    /// the kernel gives no memfd or no address space.
    pub fn new(
        minimum_pages: u64,
        maximum_pages: Option<u64>,
        memory64: bool,
        limit_bytes: u64,
    ) -> Result<Self, MemoryError> {
        let reserve = if memory64 {
            RESERVE_64_BYTES
        } else {
            RESERVE_32_BYTES
        };
        let maximum = maximum_pages
            .map_or(u64::MAX, |pages| pages.saturating_mul(WASM_PAGE_BYTES))
            .min(reserve as u64);
        let minimum = minimum_pages.saturating_mul(WASM_PAGE_BYTES);
        let limit = maximum.min(limit_bytes / WASM_PAGE_BYTES * WASM_PAGE_BYTES);
        if minimum > limit {
            return Err(MemoryError::Limit {
                wanted_bytes: minimum,
                limit_bytes: limit,
            });
        }
        let fd = memfd_create(FILE_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(system("make a memfd"))?;
        // The seal prevents truncation under the guest.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(system("seal a memfd"))?;
        let bytes = reserve + GUARD_BYTES;
        // SAFETY: a fresh mapping at an address of the kernel's choice, without
        // access; nothing else knows it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::empty(),
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )
        }
        .map_err(system("reserve address space"))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(MemoryError::System {
            what: "reserve address space",
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        let memory = GuestMemory {
            file: fd.into(),
            reservation: Reservation { base, bytes },
            size: AtomicUsize::new(0),
            mapped: AtomicUsize::new(0),
            accessible: AtomicUsize::new(0),
            exposed: AtomicUsize::new(0),
            limit: AtomicU64::new(limit),
            maximum,
            memory64,
            growing: Mutex::new(()),
        };
        memory.open(minimum)?;
        Ok(memory)
    }

    /// Current size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size.load(Ordering::Acquire) as u64
    }

    /// Growth limit in bytes.
    pub fn limit_bytes(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Sets the growth limit, as far as the module allows it.
    ///
    /// # Errors
    /// The present size if it is larger; nothing changes then.
    pub fn set_limit(&self, limit_bytes: u64) -> Result<(), u64> {
        let _growing = self
            .growing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let limit = self
            .maximum
            .min(limit_bytes / WASM_PAGE_BYTES * WASM_PAGE_BYTES);
        let size = self.size_bytes();
        if size > limit {
            return Err(size);
        }
        self.limit.store(limit, Ordering::Relaxed);
        Ok(())
    }

    /// Grows by `delta_pages` of 64 KiB; returns the previous size in pages, or `None` if the limit
    /// or the host forbids it.
    pub fn grow(&self, delta_pages: u64) -> Option<u64> {
        self.grow_with(delta_pages, |_| true)
    }

    /// As [`Self::grow`]; `others` grows the other mappings of the memory after this one and before
    /// any instance sees the new size. If that fails it is called again with the old size.
    pub(crate) fn grow_with(&self, delta_pages: u64, others: impl Fn(u64) -> bool) -> Option<u64> {
        let _growing = self
            .growing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let before = self.size_bytes();
        let wanted = delta_pages
            .checked_mul(WASM_PAGE_BYTES)
            .and_then(|bytes| bytes.checked_add(before))?;
        if wanted > self.limit_bytes() {
            return None;
        }
        if let Err(error) = self.make_accessible(wanted) {
            tracing::warn!(%error, wanted, "guest memory cannot grow");
            return None;
        }
        if wanted > before && !others(wanted) {
            self.close();
            others(before);
            return None;
        }
        self.size.store(wanted as usize, Ordering::Release);
        Some(before / WASM_PAGE_BYTES)
    }

    /// Adopts the size of another part of the same machine; smaller only where growth failed at
    /// another part.
    ///
    /// # Errors
    /// [`MemoryError::Limit`], [`MemoryError::System`].
    pub fn open_to(&self, bytes: u64) -> Result<(), MemoryError> {
        let _growing = self
            .growing
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        if bytes > self.limit_bytes() {
            return Err(MemoryError::Limit {
                wanted_bytes: bytes,
                limit_bytes: self.limit_bytes(),
            });
        }
        if bytes > self.size_bytes() {
            self.open(bytes)?;
        } else if bytes < self.size_bytes() {
            self.size.store(bytes as usize, Ordering::Release);
            self.close();
        }
        Ok(())
    }

    /// Makes it so large.
    fn open(&self, bytes: u64) -> Result<(), MemoryError> {
        self.make_accessible(bytes)?;
        self.size.store(bytes as usize, Ordering::Release);
        Ok(())
    }

    /// Makes the first `bytes` accessible, zeroed behind the present size: first the file, then the
    /// mapping.
    fn make_accessible(&self, bytes: u64) -> Result<(), MemoryError> {
        let accessible = self.accessible_bytes();
        if bytes > self.size_bytes() {
            self.clear(self.size_bytes()..accessible.min(bytes))?;
        }
        if bytes > accessible {
            ftruncate(&self.file, bytes).map_err(system("make the memory longer"))?;
        }
        if bytes > self.mapped.load(Ordering::Acquire) as u64 {
            // SAFETY: the range lies in our own reservation, and the file
            // reaches to its end.
            unsafe {
                mprotect(
                    self.reservation.base.as_ptr().cast(),
                    bytes as usize,
                    MprotectFlags::READ | MprotectFlags::WRITE,
                )
            }
            .map_err(system("open the memory"))?;
            self.mapped.store(bytes as usize, Ordering::Release);
            self.accessible
                .store(bytes.max(accessible) as usize, Ordering::Release);
        }
        Ok(())
    }

    /// Reverts [`Self::make_accessible`] after failed growth: accesses behind the size trap again.
    /// Bytes written there meanwhile are lost. (Pages keep their mapping and protection: other
    /// parts may be about to receive them.)
    fn close(&self) {
        let size = self.size.load(Ordering::Acquire);
        let from = size.max(self.exposed.load(Ordering::Acquire));
        let opened = self.mapped.load(Ordering::Acquire);
        if from < opened {
            // SAFETY: the range lies in our own reservation, behind all that any instance
            // takes for its memory.
            let closed = unsafe {
                mprotect(
                    self.reservation.base.as_ptr().add(from).cast(),
                    opened - from,
                    MprotectFlags::empty(),
                )
            };
            match closed {
                Ok(()) => self.mapped.store(from, Ordering::Release),
                Err(error) => {
                    tracing::warn!(%error, "guest memory stays accessible behind its end")
                }
            }
        }
        if let Err(error) = self.clear(size as u64..self.accessible_bytes()) {
            // (Retried before any access to the range.)
            tracing::warn!(%error, "guest memory behind its end is not cleared");
        }
    }

    /// Zeroes the existing part of a range, through the file.
    fn clear(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let zeros = [0; CLEAR_BYTES];
        let mut at = range.start;
        while at < range.end {
            at = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => return Ok(()),
                Err(errno) => return Err(system("find populated pages")(errno)),
            };
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(at))
                .map_err(system("find populated pages"))?;
            while at < hole.min(range.end) {
                let count = (hole.min(range.end) - at).min(CLEAR_BYTES as u64);
                self.write(at, &zeros[..count as usize])?;
                at += count;
            }
        }
        Ok(())
    }

    /// Records that an instance has seen this size.
    fn expose(&self, bytes: usize) {
        self.exposed.fetch_max(bytes, Ordering::AcqRel);
    }

    /// Bytes accessible to the host: more than the size while it grows at all parts of a machine,
    /// and after failed growth.
    pub(crate) fn accessible_bytes(&self) -> u64 {
        self.accessible.load(Ordering::Acquire) as u64
    }

    /// The bytes, as cells that guest threads may change at any time.
    pub fn cells(&self) -> &[UnsafeCell<u8>] {
        let size = self.size.load(Ordering::Acquire);
        // SAFETY: the first `size` bytes are mapped readable and writable for
        // as long as `self` lives, and never shrink. `UnsafeCell` allows that
        // others write them meanwhile.
        unsafe {
            std::slice::from_raw_parts(
                self.reservation.base.as_ptr().cast::<UnsafeCell<u8>>(),
                size,
            )
        }
    }

    /// A 32-bit word, for the comparison in `wait`. `None` outside the memory or unaligned.
    pub fn load_u32(&self, address: u64) -> Option<u32> {
        let pointer = self.word(address, 4)?.cast::<u32>();
        // SAFETY: `word` checked bounds and alignment; the guest accesses the
        // word atomically or races, which WebAssembly defines.
        let value = unsafe { std::sync::atomic::AtomicU32::from_ptr(pointer) };
        Some(value.load(Ordering::SeqCst))
    }

    /// A 64-bit word; see [`Self::load_u32`].
    pub fn load_u64(&self, address: u64) -> Option<u64> {
        let pointer = self.word(address, 8)?.cast::<u64>();
        // SAFETY: as in `load_u32`.
        let value = unsafe { AtomicU64::from_ptr(pointer) };
        Some(value.load(Ordering::SeqCst))
    }

    fn word(&self, address: u64, bytes: u64) -> Option<*mut u8> {
        let end = address.checked_add(bytes)?;
        if end > self.size_bytes() || !address.is_multiple_of(bytes) {
            return None;
        }
        // SAFETY: within the mapping, as just checked.
        Some(unsafe { self.reservation.base.as_ptr().add(address as usize) })
    }

    /// Copies bytes out through the file. Concurrent writes of guest threads may or may not be
    /// visible, byte by byte.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] for an inaccessible range.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
        self.check(offset, buffer.len())?;
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| MemoryError::System {
                what: "read guest memory",
                source,
            })
    }

    /// As [`Self::read`], appending to a buffer.
    ///
    /// # Errors
    /// As there; the buffer is unchanged then.
    pub fn append(
        &self,
        offset: u64,
        bytes: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<(), MemoryError> {
        self.check(offset, bytes)?;
        buffer.reserve(bytes);
        let room = &mut buffer.spare_capacity_mut()[..bytes];
        let mut done = 0;
        while done < bytes {
            let read = retry_on_intr(|| {
                let (read, _) = pread(&self.file, &mut room[done..], offset + done as u64)?;
                Ok(read.len())
            });
            let failed = match read {
                Ok(0) => std::io::ErrorKind::UnexpectedEof.into(),
                Ok(count) => {
                    done += count;
                    continue;
                }
                Err(errno) => errno.into(),
            };
            return Err(MemoryError::System {
                what: "read guest memory",
                source: failed,
            });
        }
        // SAFETY: so many bytes behind its length were reserved, and written by the kernel.
        unsafe { buffer.set_len(buffer.len() + bytes) };
        Ok(())
    }

    /// Copies bytes in through the file; only for a machine that is not running (such writes are
    /// invisible to a [`DirtyTracker`]).
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.check(offset, bytes.len())?;
        self.file
            .write_all_at(bytes, offset)
            .map_err(|source| MemoryError::System {
                what: "write guest memory",
                source,
            })
    }

    fn check(&self, offset: u64, bytes: usize) -> Result<(), MemoryError> {
        let size = self.accessible_bytes();
        match offset.checked_add(bytes as u64) {
            Some(end) if end <= size => Ok(()),
            end => Err(MemoryError::Outside {
                range: offset..end.unwrap_or(u64::MAX),
                size_bytes: size,
            }),
        }
    }

    /// Ranges that were ever touched, ascending, in whole host pages. Everything else is zero.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn populated(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        let size = self.size_bytes();
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < size {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => break,
                Err(errno) => return Err(system("find populated pages")(errno)),
            };
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data))
                .map_err(system("find populated pages"))?;
            if data >= size {
                break;
            }
            ranges.push(data..hole.min(size));
            at = hole;
        }
        Ok(ranges)
    }

    /// Resident bytes on the host, in whole pages.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn resident_bytes(&self) -> Result<u64, MemoryError> {
        let stat = rustix::fs::fstat(&self.file).map_err(system("query the size of a memory"))?;
        // (Units of 512 bytes, independent of the block size: stat(2).)
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    /// Offset of the first host page at or behind `at` that was ever touched;
    /// `None` if all behind it is zero.
    ///
    /// # Errors
    /// [`MemoryError::System`].
    pub fn populated_from(&self, at: u64) -> Result<Option<u64>, MemoryError> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) if data < self.size_bytes() => Ok(Some(data)),
            Ok(_) | Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(errno) => Err(system("find populated pages")(errno)),
        }
    }

    /// Whether addresses are 64 bits wide.
    pub fn memory64(&self) -> bool {
        self.memory64
    }

    /// The file behind the memory, for mapping or sending it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.reservation.base.as_ptr()
    }

    pub(crate) fn reserved_bytes(&self) -> usize {
        self.reservation.bytes - GUARD_BYTES
    }
}

#[cfg(test)]
mod tests;

/// Opens a file of this process only.
fn open_private(path: &str) -> Result<OwnedFd, rustix::io::Errno> {
    rustix::fs::open(
        path,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
}
