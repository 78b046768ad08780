//! Host calls of a machine: WASI, threads, waiting.

use super::frame::Progress;
use super::hints::{NAME_BYTES_MAX, NamedRange};
use super::host::{Host, HostOutcome, HostThread, ImportKind};
use super::lock::locked;
use super::machine::Shared;
use super::signal::Signal;
use crate::memory::WASM_PAGE_BYTES;
use keel_wasi::{Errno, Outcome as WasiOutcome};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Locks for the addresses of atomic waits and wakes in progress, during which pages may have to be
/// fetched.
#[derive(Debug, Default)]
pub(super) struct AddressLocks {
    busy: Mutex<LockedAddresses>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct LockedAddresses {
    locked: BTreeSet<(u32, u64)>,
    /// Number of threads that wait for a lock.
    waiting: usize,
}

/// A held address lock.
struct AddressLock<'a> {
    locks: &'a AddressLocks,
    place: (u32, u64),
}

impl Drop for AddressLock<'_> {
    fn drop(&mut self) {
        let mut busy = locked(&self.locks.busy);
        busy.locked.remove(&self.place);
        let waiting = busy.waiting;
        drop(busy);
        // (`notify_all` is a system call even without waiters.)
        if waiting > 0 {
            self.locks.released.notify_all();
        }
    }
}

impl Shared {
    fn atomic_wait(
        &self,
        memory: u32,
        wide: bool,
        args: &[u64],
        progress: &mut Progress,
        thread: &HostThread,
    ) -> HostOutcome {
        let address = match self.checked_address(memory, args[0], args[3], wide) {
            Ok(address) => address,
            Err(message) => return HostOutcome::Trap(message),
        };
        if !self.program.meta.memories[memory as usize].shared {
            return HostOutcome::Trap("atomic wait on non-shared memory".into());
        }
        let timeout = match *progress {
            Progress::Waiting { remaining_ns } => remaining_ns,
            _ => {
                let turn = self.lock_address(memory, address);
                let bytes = &self.memories[memory as usize];
                if turn.is_none() {
                    // The page may have to be fetched: done without the lock, so that it is local
                    // under it.
                    let _ = bytes.load_u32(address);
                }
                let held = turn.is_none().then(|| locked(&self.waits));
                let equal = if wide {
                    bytes.load_u64(address) == Some(args[1])
                } else {
                    bytes.load_u32(address) == Some(args[1] as u32)
                };
                if !equal {
                    return HostOutcome::Done(vec![1]);
                }
                let mut waits = held.unwrap_or_else(|| locked(&self.waits));
                waits.enter(memory, address, thread.tid);
                u64::try_from(args[2] as i64).ok()
            }
        };
        let begun = Instant::now();
        let limit = timeout.map(Duration::from_nanos);
        thread
            .signal
            .park(limit, || locked(&self.waits).is_woken(thread.tid));
        let mut waits = locked(&self.waits);
        if waits.take_woken(thread.tid) {
            return HostOutcome::Done(vec![0]);
        }
        let rest = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
        if rest == Some(Duration::ZERO) {
            waits.leave(memory, address, thread.tid);
            return HostOutcome::Done(vec![2]);
        }
        *progress = Progress::Waiting {
            remaining_ns: rest.map(|rest| u64::try_from(rest.as_nanos()).unwrap_or(u64::MAX)),
        };
        HostOutcome::Interrupted
    }

    fn notify(&self, memory: u32, args: &[u64]) -> HostOutcome {
        let address = match self.checked_address(memory, args[0], args[2], false) {
            Ok(address) => address,
            Err(message) => return HostOutcome::Trap(message),
        };
        let turn = self.lock_address(memory, address);
        let woken = locked(&self.waits).notify(memory, address, args[1] as u32);
        drop(turn);
        if woken.is_empty() {
            return HostOutcome::Done(vec![0]);
        }
        let signals: Vec<Arc<Signal>> = {
            let threads = locked(&self.threads);
            woken
                .iter()
                .filter_map(|tid| threads.table.get(tid))
                .map(|thread| thread.signal.clone())
                .collect()
        };
        for signal in signals {
            signal.wake();
        }
        HostOutcome::Done(vec![woken.len() as u64])
    }

    /// Locks an address for an atomic wait or wake: comparing and queueing must be atomic with
    /// respect to wakes, and no other lock may be held while a page is fetched. `None` where all
    /// pages are local: there the lock of the queues suffices.
    fn lock_address(&self, memory: u32, address: u64) -> Option<AddressLock<'_>> {
        if self.parts.is_alone() {
            return None;
        }
        let place = (memory, address);
        let mut busy = locked(&self.address_locks.busy);
        while !busy.locked.insert(place) {
            busy.waiting += 1;
            busy = self
                .address_locks
                .released
                .wait(busy)
                .unwrap_or_else(|error| error.into_inner());
            busy.waiting -= 1;
        }
        Some(AddressLock {
            locks: &self.address_locks,
            place,
        })
    }

    fn grow(&self, memory: u32, delta_pages: u64) -> HostOutcome {
        let grown = self.memories[memory as usize]
            .grow_with(delta_pages, |bytes| self.parts.open(memory, bytes));
        HostOutcome::Done(vec![grown.unwrap_or(u64::MAX)])
    }

    /// The effective address of an atomic operation, with the checks of the instruction.
    fn checked_address(
        &self,
        memory: u32,
        base: u64,
        offset: u64,
        wide: bool,
    ) -> Result<u64, String> {
        let bytes = if wide { 8 } else { 4 };
        let size = self.memories[memory as usize].size_bytes();
        let address = base
            .checked_add(offset)
            .filter(|address| self.memories[memory as usize].memory64() || *address >> 32 == 0)
            .ok_or("out of bounds memory access")?;
        // In the engine's order of checks.
        if !address.is_multiple_of(bytes) {
            return Err("unaligned atomic".into());
        }
        if address.checked_add(bytes).is_none_or(|end| end > size) {
            return Err("out of bounds memory access".into());
        }
        Ok(address)
    }

    /// A name in the first memory.
    fn name_at(&self, address: u64, length: u64) -> Result<String, Errno> {
        let length = length as u32;
        if length as usize > NAME_BYTES_MAX {
            return Err(Errno::Inval);
        }
        let cells = self
            .memories
            .first()
            .map_or(&[][..], |memory| memory.cells());
        let memory = wiggle::GuestMemory::Shared(cells);
        let range = wiggle::GuestPtr::<u8>::new(address as u32).as_array(length);
        let bytes = memory.to_vec(range).map_err(|_| Errno::Fault)?;
        String::from_utf8(bytes).map_err(|_| Errno::Inval)
    }

    fn name_object(&self, args: &[u64]) -> HostOutcome {
        let piece = NamedRange {
            start: u64::from(args[2] as u32),
            bytes: u64::from(args[3] as u32),
        };
        let size = self
            .memories
            .first()
            .map_or(0, |memory| memory.size_bytes());
        let done = self
            .name_at(args[0], args[1])
            .and_then(|name| locked(&self.names).name(&name, piece, size));
        errno(done)
    }

    fn prefer(&self, args: &[u64], tid: u32) -> HostOutcome {
        let done = self
            .name_at(args[0], args[1])
            .and_then(|name| locked(&self.names).set_preference(tid, &name));
        errno(done)
    }

    fn wasi_call(
        &self,
        function: keel_wasi::Function,
        args: &[u64],
        progress: &mut Progress,
        thread: &HostThread,
    ) -> HostOutcome {
        let cells = self
            .memories
            .first()
            .map_or(&[][..], |memory| memory.cells());
        let mut memory = wiggle::GuestMemory::Shared(cells);
        let mut state = wasi_state(progress);
        let outcome = self.wasi.call(
            function,
            args,
            &mut memory,
            &mut state,
            thread.tid,
            &*thread.signal,
        );
        wasi_outcome(function, outcome, state, progress)
    }
}

fn errno(done: Result<(), Errno>) -> HostOutcome {
    let errno = done.err().unwrap_or(Errno::Success);
    HostOutcome::Done(vec![u64::from(errno as u16)])
}

/// Progress of a WASI call.
fn wasi_state(progress: &mut Progress) -> keel_wasi::CallState {
    match std::mem::take(progress) {
        Progress::Wasi(state) => state,
        _ => keel_wasi::CallState::default(),
    }
}

fn wasi_outcome(
    function: keel_wasi::Function,
    outcome: WasiOutcome,
    state: keel_wasi::CallState,
    progress: &mut Progress,
) -> HostOutcome {
    match outcome {
        WasiOutcome::Done(errno) if function.has_result() => {
            HostOutcome::Done(vec![u64::from(errno as u32)])
        }
        WasiOutcome::Done(_) => HostOutcome::Done(Vec::new()),
        WasiOutcome::Interrupted => {
            *progress = Progress::Wasi(state);
            HostOutcome::Interrupted
        }
        WasiOutcome::Exit(code) => HostOutcome::Exit(code),
        WasiOutcome::Trap(message) => HostOutcome::Trap(message),
    }
}

/// Host calls of a machine, shared by its threads.
impl Host for Arc<Shared> {
    fn call(
        &self,
        import: u32,
        args: &[u64],
        progress: &mut Progress,
        thread: &HostThread,
    ) -> HostOutcome {
        if self.over.load(Ordering::Acquire) {
            // The machine has ended: the thread leaves without further effects.
            return HostOutcome::Interrupted;
        }
        match self.program.kinds[import as usize] {
            ImportKind::Wasi(function) => self.wasi_call(function, args, progress, thread),
            ImportKind::ThreadSpawn => {
                HostOutcome::Done(vec![u64::from(self.spawn(args[0] as u32) as u32)])
            }
            ImportKind::Object => self.name_object(args),
            ImportKind::Prefer => self.prefer(args, thread.tid),
            ImportKind::Epoch => HostOutcome::Done(vec![self.epoch.load(Ordering::Acquire)]),
            ImportKind::Wait32(memory) => self.atomic_wait(memory, false, args, progress, thread),
            ImportKind::Wait64(memory) => self.atomic_wait(memory, true, args, progress, thread),
            ImportKind::Notify(memory) => self.notify(memory, args),
            ImportKind::Grow(memory) => self.grow(memory, args[0]),
            ImportKind::Size(memory) => {
                let size = self.memories[memory as usize].size_bytes();
                HostOutcome::Done(vec![size / WASM_PAGE_BYTES])
            }
            ImportKind::Print | ImportKind::Sync(_) => HostOutcome::Done(Vec::new()),
        }
    }

    fn call_packed(
        &self,
        import: u32,
        call: &keel_wasi::PackedCall,
        progress: &mut Progress,
        thread: &HostThread,
    ) -> (HostOutcome, Vec<u8>) {
        if self.over.load(Ordering::Acquire) {
            return (HostOutcome::Interrupted, Vec::new());
        }
        let Some(ImportKind::Wasi(function)) = self.program.kinds.get(import as usize).copied()
        else {
            let what = "a call with its buffers is none of WASI";
            return (HostOutcome::Trap(what.into()), Vec::new());
        };
        let mut state = wasi_state(progress);
        let (tid, signal) = (thread.tid, &*thread.signal);
        let (outcome, output) = self
            .wasi
            .call_packed(function, call, &mut state, tid, signal);
        (wasi_outcome(function, outcome, state, progress), output)
    }
}
