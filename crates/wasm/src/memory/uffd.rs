//! Bindings of userfaultfd: opening, registering, and the structures and numbers of its requests,
//! which no crate covers completely. The users are `dirty`, `faults` and `spanning`.

use super::GuestMemory;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

// From linux/userfaultfd.h.
pub(super) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(super) const FEATURE_THREAD_ID: u64 = 1 << 8;
pub(super) const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub(super) const FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
pub(super) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(super) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(super) const FEATURE_WP_ASYNC: u64 = 1 << 15;
pub(super) const MODE_MISSING: u64 = 1;
pub(super) const MODE_WP: u64 = 1 << 1;
pub(super) const MODE_MINOR: u64 = 1 << 2;
pub(super) const COPY: u64 = 0xC028_AA03;
pub(super) const ZEROPAGE: u64 = 0xC020_AA04;
pub(super) const WRITEPROTECT: u64 = 0xC018_AA06;
pub(super) const CONTINUE: u64 = 0xC020_AA07;
pub(super) const WAKE: u64 = 0x8010_AA02;
pub(super) const COPY_MODE_WP: u64 = 1 << 1;
pub(super) const WRITEPROTECT_MODE_WP: u64 = 1;
const USER_MODE_ONLY: i32 = 1;
const API: u64 = 0xAA;
const API_REQUEST: u64 = 0xC018_AA3F;
const REGISTER: u64 = 0xC020_AA00;
const UNREGISTER: u64 = 0x8010_AA01;

/// A missing kernel feature.
#[derive(Debug, thiserror::Error)]
#[error("{what} is not available ({source}). {remedy}")]
pub struct Unavailable {
    pub(super) what: &'static str,
    pub(super) remedy: &'static str,
    pub(super) source: std::io::Error,
}

impl Unavailable {
    pub fn remedy(&self) -> &'static str {
        self.remedy
    }
}

pub(super) fn unavailable(
    what: &'static str,
    remedy: &'static str,
) -> impl FnOnce(std::io::Error) -> Unavailable {
    move |source| Unavailable {
        what,
        remedy,
        source,
    }
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// A range, a mode, and the result: the form of most requests.
#[repr(C)]
#[derive(Default)]
pub(super) struct Request {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) done: i64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct CopyRequest {
    pub(super) to: u64,
    pub(super) from: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) done: i64,
}

/// # Safety
/// `argument` is the structure that the kernel expects for `request`.
pub(super) unsafe fn ioctl<T>(
    fd: &OwnedFd,
    request: u64,
    argument: &mut T,
) -> std::io::Result<i32> {
    // SAFETY: the caller passes the right structure, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Opens a descriptor for user-mode faults (which needs no privileges), and requests features,
/// which `what` describes.
pub(super) fn open(
    features: u64,
    what: &'static str,
    remedy: &'static str,
) -> Result<OwnedFd, Unavailable> {
    // SAFETY: the system call takes flags only and returns a new descriptor.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_userfaultfd,
            libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY,
        )
    };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        let remedy = "Allow the system call in the sandbox.";
        return Err(unavailable("userfaultfd", remedy)(error));
    }
    // SAFETY: the descriptor was just created and has no other owner.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = Api {
        api: API,
        features,
        ioctls: 0,
    };
    // SAFETY: the structure of this request.
    unsafe { ioctl(&uffd, API_REQUEST, &mut api) }.map_err(unavailable(what, remedy))?;
    Ok(uffd)
}

/// Registers the whole reservation of a memory, including room for growth.
pub(super) fn register(uffd: &OwnedFd, memory: &GuestMemory, mode: u64) -> std::io::Result<()> {
    let mut register = Register {
        start: memory.base() as u64,
        len: memory.reserved_bytes() as u64,
        mode,
        ioctls: 0,
    };
    // SAFETY: the structure of this request; the range is our own mapping.
    unsafe { ioctl(uffd, REGISTER, &mut register) }.map(drop)
}

/// Unregisters; waiting accesses continue.
pub(super) fn unregister(uffd: &OwnedFd, memory: &GuestMemory) -> std::io::Result<()> {
    let mut range = [memory.base() as u64, memory.reserved_bytes() as u64];
    // SAFETY: the structure of this request; the range is our own mapping.
    unsafe { ioctl(uffd, UNREGISTER, &mut range) }.map(drop)
}
