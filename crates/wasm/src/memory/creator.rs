//! Passes our mappings to wasmtime at instantiation.
//!
//! wasmtime asks a [`MemoryCreator`] for each memory of a module, in order, on the instantiating
//! thread, without identifying the instance. So a thread-local list holds the mappings for the next
//! instance.

use super::{GUARD_BYTES, GuestMemory, Reservation, WASM_PAGE_BYTES, system};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

use super::MemoryError;
use crate::instrument::meta;

/// The private second memory of one instance: the request word, the area
/// through which a frame enters a clone, and the save area.
#[derive(Debug)]
pub struct Control {
    reservation: Reservation,
}

/// Declared size; most of it is inaccessible.
const CONTROL_BYTES: usize = (meta::CONTROL_PAGES as usize) << 16;
const CONTROL_RESERVE_BYTES: usize = (4 << 30) + GUARD_BYTES;

impl Control {
    /// Accessible bytes: the save area, and the largest frame behind it.
    pub const ACCESSIBLE_BYTES: usize = (meta::SAVE_END + meta::SAVE - meta::RESTORE) as usize;

    /// A fresh control memory, zeroed, with the save area empty.
    ///
    /// # Errors
    /// [`MemoryError::System`] without address space.
    pub fn new() -> Result<Self, MemoryError> {
        // SAFETY: a fresh private mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                CONTROL_RESERVE_BYTES,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(system("reserve a control memory"))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(MemoryError::System {
            what: "reserve a control memory",
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        let reservation = Reservation {
            base,
            bytes: CONTROL_RESERVE_BYTES,
        };
        // SAFETY: the range lies in the reservation just made.
        unsafe {
            rustix::mm::mprotect(
                base.as_ptr().cast(),
                Control::ACCESSIBLE_BYTES,
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
            )
        }
        .map_err(system("open a control memory"))?;
        Ok(Control { reservation })
    }

    /// A word of the control memory.
    ///
    /// # Panics
    /// If `address` is not one of the aligned words that [`meta`] names.
    pub fn word(&self, address: u32) -> &AtomicU32 {
        assert!(address.is_multiple_of(4) && (address as usize) < Self::ACCESSIBLE_BYTES);
        // SAFETY: aligned and inside the mapping, which lives as long as
        // `self`; the guest accesses the same words.
        unsafe {
            AtomicU32::from_ptr(
                self.reservation
                    .base
                    .as_ptr()
                    .add(address as usize)
                    .cast::<u32>(),
            )
        }
    }

    /// Sets or clears the safepoint request of the instance that runs on this memory.
    pub fn set_request(&self, request: bool) {
        self.word(meta::REQUEST)
            .store(u32::from(request), Ordering::Release);
    }

    /// Releases the memory from `address` on, which reads as zero afterwards. The instance must not
    /// be running.
    pub fn discard(&self, address: u32) {
        let from = (address as usize).next_multiple_of(WASM_PAGE_BYTES as usize);
        // SAFETY: the range is inside the private mapping, and no instance
        // runs on this memory.
        let result = unsafe {
            rustix::mm::madvise(
                self.reservation.base.as_ptr().add(from).cast(),
                Self::ACCESSIBLE_BYTES.saturating_sub(from),
                rustix::mm::Advice::LinuxDontNeed,
            )
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a save area was not released");
        }
    }

    /// Copies bytes out; the instance must not be running.
    ///
    /// # Panics
    /// If the range is out of bounds: callers pass ranges that [`meta`] fixes, or that are bounded
    /// by the save pointer, which the code maintains.
    pub fn read(&self, address: u32, buffer: &mut [u8]) {
        self.check(address, buffer.len());
        // SAFETY: the range is inside the mapping, as checked, and no instance
        // runs on this memory.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.reservation.base.as_ptr().add(address as usize),
                buffer.as_mut_ptr(),
                buffer.len(),
            );
        }
    }

    /// Copies bytes in; the instance must not be running.
    ///
    /// # Panics
    /// As [`Self::read`].
    pub fn write(&self, address: u32, bytes: &[u8]) {
        self.check(address, bytes.len());
        // SAFETY: as in `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.reservation.base.as_ptr().add(address as usize),
                bytes.len(),
            );
        }
    }

    fn check(&self, address: u32, bytes: usize) {
        assert!(address as usize + bytes <= Self::ACCESSIBLE_BYTES);
    }
}

enum Next {
    Guest(Arc<GuestMemory>),
    Control(Arc<Control>),
}

thread_local! {
    static NEXT: RefCell<Vec<Next>> = const { RefCell::new(Vec::new()) };
}

/// Runs `instantiate` with these mappings for the instance that it creates.
pub fn with_memories<R>(
    memories: &[Arc<GuestMemory>],
    control: &Arc<Control>,
    instantiate: impl FnOnce() -> R,
) -> R {
    NEXT.with_borrow_mut(|next| {
        next.clear();
        // Two memories over the same bytes, see `instrument::meta`.
        next.push(Next::Control(control.clone()));
        next.push(Next::Control(control.clone()));
        next.extend(memories.iter().rev().cloned().map(Next::Guest));
    });
    let result = instantiate();
    NEXT.with_borrow_mut(Vec::clear);
    result
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Creator;

// SAFETY: both kinds of memory reserve at least 4 GiB and the guard behind it,
// are zeroed when first handed out, never move, and live as long as the box.
unsafe impl MemoryCreator for Creator {
    fn new_memory(
        &self,
        _ty: MemoryType,
        minimum: usize,
        _maximum: Option<usize>,
        reserved_size_in_bytes: Option<usize>,
        guard_size_in_bytes: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        let next = NEXT
            .with_borrow_mut(Vec::pop)
            .ok_or("an instance was made outside `with_memories`")?;
        let memory = match next {
            Next::Guest(memory) => {
                let seen_bytes = memory.size_bytes() as usize;
                memory.expose(seen_bytes);
                Mapped::Guest { memory, seen_bytes }
            }
            Next::Control(memory) => Mapped::Control(memory),
        };
        if memory.byte_size() < minimum
            || reserved_size_in_bytes > Some(memory.byte_capacity())
            || guard_size_in_bytes > GUARD_BYTES
        {
            return Err("a mapping does not fit the memory that the module defines".into());
        }
        Ok(Box::new(memory))
    }
}

enum Mapped {
    Guest {
        memory: Arc<GuestMemory>,
        /// The size as known to this instance: other instances, or the machine, may have grown the
        /// memory since.
        seen_bytes: usize,
    },
    Control(Arc<Control>),
}

// SAFETY: size, capacity and pointer describe a mapping that the `Arc` keeps.
// `grow_to` succeeds only up to the size that is already accessible.
unsafe impl LinearMemory for Mapped {
    fn byte_size(&self) -> usize {
        match self {
            Mapped::Guest { seen_bytes, .. } => *seen_bytes,
            Mapped::Control(_) => CONTROL_BYTES,
        }
    }

    fn byte_capacity(&self) -> usize {
        match self {
            Mapped::Guest { memory, .. } => memory.reserved_bytes(),
            Mapped::Control(_) => CONTROL_RESERVE_BYTES - GUARD_BYTES,
        }
    }

    fn grow_to(&mut self, new_size: usize) -> wasmtime::Result<()> {
        match self {
            Mapped::Guest { memory, seen_bytes } if new_size as u64 <= memory.size_bytes() => {
                memory.expose(new_size);
                *seen_bytes = new_size;
                Ok(())
            }
            _ => wasmtime::bail!("a memory grows through the machine, not through an instance"),
        }
    }

    fn as_ptr(&self) -> *mut u8 {
        match self {
            Mapped::Guest { memory, .. } => memory.base(),
            Mapped::Control(memory) => memory.reservation.base.as_ptr(),
        }
    }
}
