//! Keeps a part's memory within its limit: a thread of its own evicts the excess. Copies
//! that other parts hold, too, are dropped first; then pages move to the part with most
//! room ([`super::super::eviction`] selects them).
//!
//! ```text
//!   limit of all parts ── from the home ──▶ own limit ◀── room of this host
//!                                             │
//!   memory of others ── reported ────▶ evicts ◀── resident memory exceeds the limit
//!                                             │
//!   faults ◀── wait for a moment ─────────────┘   while far above it, if others have room
//! ```
//!
//! Where no part has room, the pages stay: the limit never causes data loss. The
//! machine's own limit bounds its memory in total.

use super::super::eviction::EvictionPolicy;
use super::super::messages::PartMemory;
use super::super::wire::PeerMessage;
use super::access_scan::AccessScan;
use super::effects::{Effects, EventContext, PendingEvent};
use super::objects::push_move;
use super::{MOVES_MAX, PAGE, Pages, Shared, SpanError, locked, offset};
use keel_wasm::coherence::{Access, Copy, Event, PageId, PartId};
use keel_wasm::memory::PAGE_BYTES;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// The smallest limit of a part, in bytes: with less it makes no progress.
pub const PART_BYTES_MIN: u64 = 1 << 20;
/// Stands for no limit.
const NONE: u64 = u64::MAX;
/// Once the limit is exceeded, this fraction (1/n) below it is evicted as well, so that
/// eviction does not restart with each page.
const HYSTERESIS_DIVISOR: u64 = 32;
/// Faults wait when memory exceeds the limit by this fraction (1/n). A part receives
/// evicted pages only if it has that much room, or [`PART_BYTES_MIN`] where that is less.
const OVERRUN_DIVISOR: u64 = 16;
/// Prefetches in flight are bounded by this fraction (1/n) of the limit.
const PREFETCH_DIVISOR: u64 = 64;
/// Other parts are informed at once when resident memory changes by this fraction (1/n).
const REPORT_DIVISOR: u64 = 64;
/// How long faults wait for eviction, at most.
pub(super) const FAULT_WAIT_MAX: Duration = Duration::from_millis(20);
/// Intervals of the evictor: while it evicts, while there is a limit, and otherwise.
const EVICTING_INTERVAL: Duration = Duration::from_millis(1);
const LIMITED_INTERVAL: Duration = Duration::from_millis(50);
const UNLIMITED_INTERVAL: Duration = Duration::from_secs(1);
/// A part receives no evicted pages while this many bytes to it are unwritten: pages that
/// threads wait for would queue behind them.
const UNWRITTEN_MAX: usize = 1 << 20;
/// Evicted pages in flight, at most.
const IN_TRANSIT_MAX: usize = 1024;
/// Pages examined per pass: about a millisecond.
const EXAMINED_MAX: usize = 256;
/// Bytes whose accessed bits are cleared by one call.
const CLEAR_BATCH_BYTES: u64 = 4 << 20;
/// How long accesses are observed before a part evicts from memory that it had when the
/// limit was set.
const OBSERVE_FIRST: Duration = Duration::from_millis(100);
/// How long an evicted page may be in flight before it is a candidate again.
const IN_TRANSIT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long [`Pages::await_room`] waits without progress.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(20);

/// The room that a part must have to receive pages from a part with this limit.
fn room_min_bytes(limit: u64) -> u64 {
    (limit / OVERRUN_DIVISOR).min(PART_BYTES_MIN)
}

impl PartMemory {
    /// Bytes that the part can take. Of two parts without limits the one with fewer
    /// resident bytes has more room.
    fn room(&self) -> u64 {
        let limit = self.limit_bytes.unwrap_or(NONE);
        limit.saturating_sub(self.resident_bytes)
    }
}

/// Limits of this part and the reported memory of the others.
#[derive(Debug)]
pub(super) struct Limits {
    /// Bytes for which this host has room.
    room: u64,
    /// The limit in force; [`NONE`] before the home announces one.
    limit: AtomicU64,
    /// At the home: the limit announced last.
    pub(super) of_parts: Mutex<Option<Option<u64>>>,
    /// Whether this part reports its memory. It does once the home has announced a limit:
    /// before, not all parts may know it.
    is_member: AtomicBool,
    /// Report again, even if nothing changed.
    report_pending: AtomicBool,
    /// No limit is in force, whatever is announced.
    keeps_all: AtomicBool,
    /// Resident bytes as reported last.
    reported_bytes: AtomicU64,
    given: AtomicU64,
    dropped: AtomicU64,
    pub(super) peers: Mutex<BTreeMap<PartId, PartMemory>>,
    /// The evictor has work.
    wanted: Mutex<bool>,
    wake_signal: Condvar,
    /// A wake-up is pending.
    wake_pending: AtomicBool,
}

impl Limits {
    /// Limits of a part whose host has room for this many bytes.
    pub(super) fn new(room_bytes: Option<u64>) -> Self {
        let room = room_bytes.map_or(NONE, |room| room.max(PART_BYTES_MIN));
        Limits {
            room,
            limit: AtomicU64::new(NONE),
            of_parts: Mutex::new(None),
            is_member: AtomicBool::new(false),
            report_pending: AtomicBool::new(false),
            keeps_all: AtomicBool::new(false),
            reported_bytes: AtomicU64::new(0),
            given: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            peers: Mutex::default(),
            wanted: Mutex::new(false),
            wake_signal: Condvar::new(),
            wake_pending: AtomicBool::new(false),
        }
    }

    fn get(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Acquire);
        (limit != NONE).then_some(limit)
    }

    /// The most pages to prefetch: they should evict little.
    pub(super) fn ahead_max(&self) -> u32 {
        let most = self.get().unwrap_or(NONE) / PAGE_BYTES / PREFETCH_DIVISOR;
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    pub(super) fn is_set(&self) -> bool {
        self.get().is_some()
    }

    /// Applies the limit announced by the home, bounded by the host's room.
    pub(super) fn set(&self, of_parts: Option<u64>) {
        let reported = of_parts.map_or(NONE, |limit| limit.max(PART_BYTES_MIN));
        let limit = match self.keeps_all.load(Ordering::Acquire) {
            true => NONE,
            false => reported.min(self.room),
        };
        self.limit.store(limit, Ordering::Release);
        self.wake();
    }

    /// Applies a limit announced by the home, which makes this part a member.
    pub(super) fn announce(&self, of_parts: Option<u64>) {
        self.is_member.store(true, Ordering::Release);
        self.set(of_parts);
    }

    /// Whether the home has announced a limit to this part.
    pub(super) fn is_announced(&self) -> bool {
        self.is_member.load(Ordering::Acquire)
    }

    /// A part has joined that does not know this part's memory.
    pub(super) fn report_again(&self) {
        self.report_pending.store(true, Ordering::Release);
        self.wake();
    }

    /// Forgets a part that has left.
    pub(super) fn forget(&self, part: PartId) {
        locked(&self.peers).remove(&part);
    }

    /// Renumbers a part.
    pub(super) fn rename(&self, from: PartId, to: PartId) {
        let mut others = locked(&self.peers);
        others.remove(&to);
        if let Some(memory) = others.remove(&from) {
            others.insert(to, memory);
        }
    }

    /// Records the memory that another part reports.
    pub(super) fn record_peer(&self, from: PartId, memory: PartMemory) {
        locked(&self.peers).insert(from, memory);
    }

    /// Wakes the evictor.
    pub(super) fn wake(&self) {
        if !self.wake_pending.swap(true, Ordering::AcqRel) {
            *locked(&self.wanted) = true;
            self.wake_signal.notify_all();
        }
    }

    fn sleep(&self, most: Duration) {
        let deadline = Instant::now() + most;
        let mut wanted = locked(&self.wanted);
        while !*wanted {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                break;
            }
            wanted = self
                .wake_signal
                .wait_timeout(wanted, rest)
                .unwrap_or_else(|error| error.into_inner())
                .0;
        }
        *wanted = false;
        self.wake_pending.store(false, Ordering::Release);
    }

    /// The permitted part with most room, if it has at least `least`; one page is
    /// deducted from its recorded room.
    fn take_room(&self, least: u64, may: impl Fn(PartId) -> bool) -> Option<PartId> {
        let mut others = locked(&self.peers);
        let most = others
            .iter_mut()
            .filter(|(part, _)| may(**part))
            .max_by_key(|(part, memory)| (memory.room(), std::cmp::Reverse(**part)));
        let (part, memory) = most.filter(|(_, memory)| memory.room() >= least)?;
        memory.resident_bytes = memory.resident_bytes.saturating_add(PAGE_BYTES);
        Some(*part)
    }

    fn has_room(&self, least: u64) -> bool {
        locked(&self.peers)
            .values()
            .any(|memory| memory.room() >= least)
    }
}

/// State of the evictor between passes.
#[derive(Debug)]
struct EvictorState {
    reported: Option<(PartMemory, Instant)>,
    /// Pages in flight, and since when the number is unchanged.
    in_transit: (usize, Instant),
    /// Since when accesses are observed, and the resident bytes then.
    adopted: (Instant, u64),
}

impl Shared {
    /// Resident bytes of the machine's memory.
    pub(super) fn resident(&self) -> Result<u64, SpanError> {
        let mut bytes = 0;
        for memory in &self.memories {
            let of = memory.memory().resident_bytes();
            bytes += of.map_err(|error| SpanError::Memory(error.to_string()))?;
        }
        Ok(bytes)
    }

    fn own_memory(&self) -> Result<PartMemory, SpanError> {
        Ok(PartMemory {
            resident_bytes: self.resident()?,
            limit_bytes: self.limits.get(),
            given_bytes: self.limits.given.load(Ordering::Relaxed),
            dropped_bytes: self.limits.dropped.load(Ordering::Relaxed),
        })
    }

    /// Whether the limit is exceeded so far that faults should wait. Wakes the evictor
    /// where it has work.
    pub(super) fn is_full(&self) -> bool {
        let Some(limit) = self.limits.get() else {
            return false;
        };
        let resident = self.resident().unwrap_or(0);
        let reported = self.limits.reported_bytes.load(Ordering::Relaxed);
        if resident > limit || resident.abs_diff(reported) > limit / REPORT_DIVISOR {
            self.limits.wake();
        }
        resident > limit.saturating_add(limit / OVERRUN_DIVISOR)
            && self.limits.has_room(room_min_bytes(limit))
    }

    /// The evictor's thread: evicts the excess and reports this part's memory, until the
    /// end.
    pub(super) fn run_evictor(&self) {
        let mut seen = EvictorState {
            reported: None,
            in_transit: (0, Instant::now()),
            adopted: (Instant::now(), 0),
        };
        let mut looking = AccessScan::default();
        while !self.over.load(Ordering::Acquire) {
            self.scan_accesses(&mut looking);
            let gives = match self.limits.get() {
                Some(limit) => self.evict_some(limit, &mut seen),
                None => {
                    locked(&self.state).eviction = None;
                    Ok(false)
                }
            };
            let reported = gives.and_then(|gives| self.report_memory(&mut seen).map(|()| gives));
            let pause = match reported {
                Ok(true) => EVICTING_INTERVAL,
                Ok(false) if self.limits.get().is_some() => LIMITED_INTERVAL,
                Ok(false) => UNLIMITED_INTERVAL,
                Err(error) => return self.end(error),
            };
            self.limits.sleep(pause);
        }
    }

    /// Reports this part's memory to the others, if it changed.
    fn report_memory(&self, seen: &mut EvictorState) -> Result<(), SpanError> {
        if !self.limits.is_announced() {
            return Ok(());
        }
        if self.limits.report_pending.swap(false, Ordering::AcqRel) {
            seen.reported = None;
        }
        let now = self.own_memory()?;
        let is_news = match &seen.reported {
            None => true,
            // The others have counted pages in flight and may be wrong.
            Some((reported, at)) if *reported == now => {
                now.limit_bytes.is_some() && at.elapsed() >= UNLIMITED_INTERVAL
            }
            Some((reported, at)) => {
                let most = now.limit_bytes.unwrap_or(reported.resident_bytes);
                reported.limit_bytes != now.limit_bytes
                    || reported.resident_bytes.abs_diff(now.resident_bytes) > most / REPORT_DIVISOR
                    || at.elapsed() >= UNLIMITED_INTERVAL
            }
        };
        if !is_news {
            return Ok(());
        }
        seen.reported = Some((now, Instant::now()));
        self.limits
            .reported_bytes
            .store(now.resident_bytes, Ordering::Relaxed);
        self.broadcast(&PeerMessage::Memory(now))
    }

    pub(super) fn broadcast(&self, message: &PeerMessage) -> Result<(), SpanError> {
        let mut work = Effects::default();
        for part in self.peers.parts().iter() {
            work.put(part, message)?;
        }
        self.dispatch(Ok(()), work);
        Ok(())
    }

    /// Clears the accessed bits, so that [`Self::was_accessed`] reports later accesses
    /// only.
    fn clear_accessed_bits(&self) {
        for memory in &self.memories {
            let here = memory.memory().populated().unwrap_or_default();
            for range in here {
                let pieces = (range.start..range.end).step_by(CLEAR_BATCH_BYTES as usize);
                for start in pieces {
                    if self.over.load(Ordering::Acquire) {
                        return;
                    }
                    let bytes = CLEAR_BATCH_BYTES.min(range.end - start);
                    let whole = bytes.next_multiple_of(PAGE_BYTES);
                    if let Err(error) = memory.access_tracker().take(start, whole) {
                        tracing::debug!(%error, start, "cannot read accessed bits");
                    }
                }
            }
        }
    }

    /// Whether the guest accessed a page since the last query, or since it arrived. A
    /// page whose accesses cannot be observed counts as not accessed.
    fn was_accessed(&self, page: PageId) -> bool {
        let memory = self.memories.get(page.memory as usize);
        let used = memory.map(|it| it.access_tracker().take(offset(page), PAGE_BYTES));
        let used = matches!(used, Some(Ok(used)) if used == [true]);
        let (memory, at) = (page.memory, offset(page));
        used || locked(&self.idle).was_just_used(memory, at, self.now())
    }

    /// Evicts part of the excess; whether to go on at once.
    fn evict_some(&self, limit: u64, seen: &mut EvictorState) -> Result<bool, SpanError> {
        let resident = self.resident()?;
        let begins = {
            let state = locked(&self.state);
            state.eviction.is_none() && state.failure.is_none() && !self.is_paused(&state)
        };
        if begins {
            // Earlier accesses do not count. This takes a while with much memory.
            self.clear_accessed_bits();
            seen.adopted = (Instant::now(), resident);
        }
        let mut guard = locked(&self.state);
        let rests = self.is_paused(&guard);
        if guard.failure.is_some() || rests {
            return Ok(rests);
        }
        let state = &mut *guard;
        let policy = match &mut state.eviction {
            Some(policy) => policy,
            none => {
                // Pages that were present at the start, or before there was a limit.
                let policy = none.insert(EvictionPolicy::default());
                adopt(&self.memories, policy, |page| state.coherence.copy(page))?;
                policy
            }
        };
        let evicted_pages = policy.take_evicted();
        self.limits
            .given
            .fetch_add(evicted_pages * PAGE_BYTES, Ordering::Relaxed);
        if seen.in_transit.0 != policy.departing() || evicted_pages > 0 {
            seen.in_transit = (policy.departing(), Instant::now());
        } else if policy.departing() > 0 && seen.in_transit.1.elapsed() > IN_TRANSIT_TIMEOUT {
            policy.reconsider_departing();
        }
        if resident <= limit && policy.departing() == 0 {
            return Ok(false);
        }
        // Before that, accesses are unknown. Memory must not grow meanwhile.
        let (adopted, bytes) = seen.adopted;
        let rests_below = bytes.max(limit).saturating_add(limit / OVERRUN_DIVISOR);
        if adopted.elapsed() < OBSERVE_FIRST && resident <= rests_below {
            return Ok(false);
        }
        let goal = limit - limit / HYSTERESIS_DIVISOR;
        let too_much = (resident.saturating_sub(goal) / PAGE_BYTES) as usize;
        let mut excess = too_much.saturating_sub(policy.departing());
        let mut events: Vec<PendingEvent> = Vec::new();
        let coherence = &state.coherence;
        let copies = policy.copies(excess.min(MOVES_MAX), |page| coherence.can_drop(page));
        excess -= copies.len();
        let bytes = (copies.len() * PAGE) as u64;
        self.limits.dropped.fetch_add(bytes, Ordering::Relaxed);
        let drops = copies.into_iter().map(|page| Event::Drop { page });
        events.extend(drops.map(|event| (event, EventContext::Nothing)));
        let may_keep = limit / PAGE_BYTES;
        let may = |part: PartId| {
            let reported = self.peers.outbound(part);
            reported.is_some_and(|reported| reported.unwritten_bytes() <= UNWRITTEN_MAX)
        };
        // Faults wait for the lock meanwhile.
        let looks = Cell::new(0);
        let is_used = |page: PageId| {
            looks.set(looks.get() + 1);
            self.was_accessed(page)
        };
        let mut count = events.len();
        while excess > 0
            && count < MOVES_MAX
            && policy.departing() < IN_TRANSIT_MAX
            && policy.owned() > 0
        {
            // The next pass continues.
            if looks.get() >= EXAMINED_MAX {
                break;
            }
            let Some(to) = self.limits.take_room(room_min_bytes(limit), may) else {
                break;
            };
            let Some(page) = policy.next(may_keep, is_used) else {
                break;
            };
            push_move(&mut events, page, to);
            count += 1;
            excess -= 1;
        }
        let goes_on = !events.is_empty() || policy.departing() > 0;
        let mut work = Effects::default();
        let done = self.step_locked(&mut guard, events, &mut work);
        drop(guard);
        self.dispatch(done, work);
        Ok(goes_on)
    }
}

/// Adds all present pages.
fn adopt(
    memories: &[keel_wasm::memory::Spanning],
    policy: &mut EvictionPolicy,
    copy: impl Fn(PageId) -> Copy,
) -> Result<(), SpanError> {
    for (number, memory) in (0..).zip(memories) {
        let here = memory.memory().populated();
        for range in here.map_err(|error| SpanError::Memory(error.to_string()))? {
            for at in range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES) {
                // A memory of 64 GiB has 16 Mi pages.
                let page = PageId {
                    memory: number,
                    number: at as u32,
                };
                match copy(page) {
                    Copy::Shared => policy.arrived(page, Access::Read),
                    Copy::Owned | Copy::Modified => policy.adopt(page),
                    Copy::Invalid => {}
                }
            }
        }
    }
    Ok(())
}

impl Pages {
    /// Waits until this part has room for what the host writes next, while the excess
    /// moves to other parts. Where no part has room, the pages stay, as while the machine
    /// runs; but never more than this host has room for.
    ///
    /// # Errors
    /// [`SpanError::NoRoom`], [`SpanError::NotQuiescent`] without progress, and
    /// [`SpanError`] if the part has ended.
    pub fn await_room(&self) -> Result<(), SpanError> {
        let shared = &self.shared;
        let limits = &shared.limits;
        let mut last = (0, Instant::now());
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            let Some(limit) = limits.get() else {
                return Ok(());
            };
            let resident_bytes = shared.resident()?;
            let room_bytes = limits.room;
            if resident_bytes
                <= limit
                    .saturating_add(limit / OVERRUN_DIVISOR)
                    .min(room_bytes)
            {
                return Ok(());
            }
            let all_told = locked(&limits.peers).len() == usize::from(shared.peers.count());
            if all_told && !limits.has_room(room_min_bytes(limit)) {
                return match resident_bytes <= room_bytes {
                    true => Ok(()),
                    false => Err(SpanError::NoRoom {
                        resident_bytes,
                        room_bytes,
                    }),
                };
            }
            if resident_bytes != last.0 {
                last = (resident_bytes, Instant::now());
            } else if last.1.elapsed() > PROGRESS_TIMEOUT {
                let patience = PROGRESS_TIMEOUT;
                return Err(SpanError::NotQuiescent { patience });
            }
            limits.wake();
            std::thread::sleep(EVICTING_INTERVAL);
        }
    }

    /// Sets the limit of each part in bytes, at least [`PART_BYTES_MIN`]; a part may
    /// exceed it where no other has room. Called at the home, which evicts nothing
    /// before: the machine must depend on its members by then.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn limit_parts(&self, limit_bytes: Option<u64>) -> Result<(), SpanError> {
        // Held while announcing, so that two limits are not announced out of order.
        let mut reported = locked(&self.shared.limits.of_parts);
        if *reported == Some(limit_bytes) {
            return Ok(());
        }
        *reported = Some(limit_bytes);
        self.shared.limits.announce(limit_bytes);
        self.shared.broadcast(&PeerMessage::Limit(limit_bytes))
    }

    /// The limit set by [`Self::limit_parts`].
    pub fn part_limit(&self) -> Option<u64> {
        locked(&self.shared.limits.of_parts).flatten()
    }

    /// Whether this host has room for this many more bytes, whatever the limit.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        let resident = self.shared.resident().unwrap_or(u64::MAX);
        resident.saturating_add(bytes) <= self.shared.limits.room
    }

    /// Removes the limit of this part.
    pub fn keep_all(&self) {
        let limits = &self.shared.limits;
        limits.keeps_all.store(true, Ordering::Release);
        limits.set(None);
    }

    /// The memory of each part, as reported last.
    pub fn memory_of_parts(&self) -> BTreeMap<PartId, PartMemory> {
        let mut memory = locked(&self.shared.limits.peers).clone();
        if let Ok(own) = self.shared.own_memory() {
            memory.insert(self.shared.me(), own);
        }
        memory
    }
}
