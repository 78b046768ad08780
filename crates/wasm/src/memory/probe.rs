//! Detection of the kernel features for machines' memories, by trying each on a small memory of its
//! own: the kernel allows one userfaultfd per range.

use super::dirty::{open_pagemap, open_protection};
use super::{GuestMemory, MemoryError, PageFaults, Unavailable, WASM_PAGE_BYTES, uffd};
use std::sync::Arc;

/// Kernel features, each with what is missing and the remedy.
#[derive(Debug)]
pub struct HostSupport {
    /// userfaultfd for user-mode faults, which needs no privileges.
    pub userfaultfd: Result<(), Unavailable>,
    /// Write protection of shared memory in asynchronous mode.
    pub write_protection: Result<(), Unavailable>,
    /// `PAGEMAP_SCAN`, which reports written pages.
    pub pagemap_scan: Result<(), Unavailable>,
    /// Missing-page faults.
    pub missing_faults: Result<(), Unavailable>,
    /// Minor faults.
    pub minor_faults: Result<(), Unavailable>,
}

/// Tests the features that moves and spanning need.
///
/// # Errors
/// [`MemoryError`] if no memory can be created: no memfd, or no address space.
pub fn probe() -> Result<HostSupport, MemoryError> {
    let memory = || GuestMemory::new(1, Some(1), false, WASM_PAGE_BYTES).map(Arc::new);
    Ok(HostSupport {
        userfaultfd: uffd::open(0, "userfaultfd", "Linux 5.11 or newer has it.").map(drop),
        write_protection: open_protection(&*memory()?).map(drop),
        pagemap_scan: open_pagemap(&*memory()?).map(drop),
        missing_faults: PageFaults::start(memory()?, false).map(drop),
        minor_faults: PageFaults::start(memory()?, true).map(drop),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{DirtyTracker, Method};

    /// The detected features are those that tracker and fault serving use.
    #[test]
    fn what_is_offered_is_what_is_used() {
        let offered = probe().unwrap();
        let memory = Arc::new(GuestMemory::new(1, Some(1), false, WASM_PAGE_BYTES).unwrap());
        let tracker = DirtyTracker::start(memory).unwrap();
        let fast = offered.write_protection.is_ok() && offered.pagemap_scan.is_ok();
        assert_eq!(fast, tracker.method() == Method::WriteProtect);
        if let Err(missing) = &offered.userfaultfd {
            assert!(offered.missing_faults.is_err(), "{missing}");
            assert!(!missing.remedy().is_empty());
        }
    }
}
