//! What this host offers to machines' memories, found by trying each on a small
//! memory of its own: the kernel has one descriptor for a range.

use super::dirty::{open_pagemap, open_protection};
use super::{GuestMemory, MemoryError, PageFaults, Unavailable, WASM_PAGE_BYTES, uffd};
use std::sync::Arc;

/// What this host offers, each with what is missing and the remedy.
#[derive(Debug)]
pub struct HostSupport {
    /// userfaultfd for faults of user code, which needs no rights.
    pub userfaultfd: Result<(), Unavailable>,
    /// Write protection of shared memory in asynchronous mode.
    pub write_protection: Result<(), Unavailable>,
    /// `PAGEMAP_SCAN`, which tells what was written.
    pub pagemap_scan: Result<(), Unavailable>,
    /// Faults of pages that nobody has.
    pub missing_faults: Result<(), Unavailable>,
    /// Faults of pages that only the file has.
    pub minor_faults: Result<(), Unavailable>,
}

/// Tries what moves and memory on several nodes need.
///
/// # Errors
/// [`MemoryError`] if there can be no memory at all: no memfd, or no address
/// space.
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

    /// What is said to be there is what the tracker and the faults find.
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
