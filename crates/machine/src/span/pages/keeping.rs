//! What a part keeps of a machine's memory, at most: a thread of its own gives away what
//! is too much. Copies that others have, too, are dropped first; then pages go to the part
//! with most room ([`super::super::keep`] says which).
//!
//! ```text
//!   limit of all parts ── from the home ──▶ own limit ◀── what this host has room for
//!                                             │
//!   memory of others ── told as it changes ──▶ gives away ◀── more is here than that
//!                                             │
//!   faults ◀── wait for a moment ─────────────┘   while it is far over, and others have room
//! ```
//!
//! Where no part has room, it keeps what it has: nothing that the guest wrote is ever
//! lost for it. How much memory the machine may have in all, its own limit says.

use super::super::keep::Keep;
use super::super::wire::Parcel;
use super::looking::Looking;
use super::objects::push_move;
use super::work::{Beside, Happened, Work};
use super::{MOVES_MAX, PAGE, Pages, Shared, SpanError, locked, offset};
use keel_wasm::coherence::{Access, Copy, Event, PageId, PartId};
use keel_wasm::memory::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// The least that a part keeps, whatever it is told: below that it does not get on.
pub const PART_BYTES_MIN: u64 = 1 << 20;
/// No limit.
const NONE: u64 = u64::MAX;
/// When there is too much, one in so many of what may stay goes, too: so it is not begun
/// anew with each page.
const BELOW_PART: u64 = 32;
/// Faults wait when so much of the limit is there beyond it; so much room another part has
/// at least that gets something, or [`PART_BYTES_MIN`] where that is less.
const FAR_PART: u64 = 16;
/// So much of what may be here is asked for ahead of a thread at most.
const AHEAD_PART: u64 = 64;
/// How much what is there changes before others are told at once.
const TOLD_PART: u64 = 64;
/// How long faults wait, at most, for room to be made.
pub(super) const FAULTS_WAIT: Duration = Duration::from_millis(20);
/// Between two looks while something is given away, while there is a limit, and else.
const GIVING: Duration = Duration::from_millis(1);
const LIMITED: Duration = Duration::from_millis(50);
const UNLIMITED: Duration = Duration::from_secs(1);
/// A part gets nothing while so much is not written to it yet: what threads wait for there
/// would come behind it.
const UNWRITTEN_MAX: usize = 1 << 20;
/// Pages that were asked away from here and have not left, at most.
const GOING_MAX: usize = 1024;
/// Pages that are looked at, whether they are used, before some are given away: a
/// millisecond.
const LOOKS_MAX: usize = 256;
/// Bytes of which it is forgotten at once that they were used.
const TAKEN_BYTES: u64 = 4 << 20;
/// How long a part that has too much from the beginning looks what it uses of it.
const ADOPTED_RESTS: Duration = Duration::from_millis(100);
/// How long a page that was chosen may take to leave before it is one as others again.
const LEAVES_WITHIN: Duration = Duration::from_secs(1);

/// How long nothing may leave while the host waits for room.
const ROOM_WITHIN: Duration = Duration::from_secs(20);

/// Room that a part has at least which gets something of one with such a limit.
fn least_room(limit: u64) -> u64 {
    (limit / FAR_PART).min(PART_BYTES_MIN)
}

/// What a part has of a machine's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartMemory {
    /// Bytes that are there, with copies of what others have.
    pub resident_bytes: u64,
    /// What it keeps at most, while others have room; `None`: whatever is there.
    pub limit_bytes: Option<u64>,
    /// Bytes that it gave away so far because they were too much.
    pub given_bytes: u64,
    /// Bytes of copies that it dropped for the same reason.
    pub dropped_bytes: u64,
}

impl PartMemory {
    /// Bytes that it can take. (Of two without limits, the one with less has more room.)
    fn room(&self) -> u64 {
        let limit = self.limit_bytes.unwrap_or(NONE);
        limit.saturating_sub(self.resident_bytes)
    }
}

/// What is known of limits.
#[derive(Debug)]
pub(super) struct Limits {
    /// What this host has room for.
    room: u64,
    /// What may be here; [`NONE`], as it is before the first word of it.
    limit: AtomicU64,
    /// What the home said last, if this is the home and it said something.
    pub(super) of_parts: Mutex<Option<Option<u64>>>,
    /// Others are told what is here: not before the home has said what a part keeps, as
    /// they do not all know this part until then.
    tells: AtomicBool,
    /// They are told once more, whatever they were told.
    again: AtomicBool,
    /// All that comes stays, whatever is said.
    keeps_all: AtomicBool,
    /// What others believe to be here.
    told_bytes: AtomicU64,
    given: AtomicU64,
    dropped: AtomicU64,
    pub(super) others: Mutex<BTreeMap<PartId, PartMemory>>,
    /// There is something to do.
    wanted: Mutex<bool>,
    bell: Condvar,
    /// It has been asked to look, and did not yet.
    is_rung: AtomicBool,
}

impl Limits {
    /// Of a part whose host has room for so many bytes.
    pub(super) fn new(room_bytes: Option<u64>) -> Self {
        let room = room_bytes.map_or(NONE, |room| room.max(PART_BYTES_MIN));
        Limits {
            room,
            limit: AtomicU64::new(NONE),
            of_parts: Mutex::new(None),
            tells: AtomicBool::new(false),
            again: AtomicBool::new(false),
            keeps_all: AtomicBool::new(false),
            told_bytes: AtomicU64::new(0),
            given: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            others: Mutex::default(),
            wanted: Mutex::new(false),
            bell: Condvar::new(),
            is_rung: AtomicBool::new(false),
        }
    }

    fn get(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Acquire);
        (limit != NONE).then_some(limit)
    }

    /// Pages that are asked for ahead at most: what comes so is to drive out little.
    pub(super) fn ahead_max(&self) -> u32 {
        let most = self.get().unwrap_or(NONE) / PAGE_BYTES / AHEAD_PART;
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    /// Whether there is a limit.
    pub(super) fn is_set(&self) -> bool {
        self.get().is_some()
    }

    /// The most that a part may have, as the home says, and what its host has room for, from
    /// now on.
    pub(super) fn set(&self, of_parts: Option<u64>) {
        let told = of_parts.map_or(NONE, |limit| limit.max(PART_BYTES_MIN));
        let limit = match self.keeps_all.load(Ordering::Acquire) {
            true => NONE,
            false => told.min(self.room),
        };
        self.limit.store(limit, Ordering::Release);
        self.ring();
    }

    /// The home says what a part keeps: this one is one of them.
    pub(super) fn told(&self, of_parts: Option<u64>) {
        self.tells.store(true, Ordering::Release);
        self.set(of_parts);
    }

    /// Whether the home has said that this part is one of them.
    pub(super) fn are_told(&self) -> bool {
        self.tells.load(Ordering::Acquire)
    }

    /// Somebody has come who knows nothing of what is here.
    pub(super) fn tell_again(&self) {
        self.again.store(true, Ordering::Release);
        self.ring();
    }

    /// A part is none any more.
    pub(super) fn forget(&self, part: PartId) {
        locked(&self.others).remove(&part);
    }

    /// A part has another number from now on.
    pub(super) fn rename(&self, from: PartId, to: PartId) {
        let mut others = locked(&self.others);
        others.remove(&to);
        if let Some(memory) = others.remove(&from) {
            others.insert(to, memory);
        }
    }

    /// Another part tells what it has.
    pub(super) fn heard(&self, from: PartId, memory: PartMemory) {
        locked(&self.others).insert(from, memory);
    }

    /// Has the thread that gives away look at once.
    pub(super) fn ring(&self) {
        if !self.is_rung.swap(true, Ordering::AcqRel) {
            *locked(&self.wanted) = true;
            self.bell.notify_all();
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
                .bell
                .wait_timeout(wanted, rest)
                .unwrap_or_else(|error| error.into_inner())
                .0;
        }
        *wanted = false;
        self.is_rung.store(false, Ordering::Release);
    }

    /// Of those that may get something the part with most room, if it has enough of it; it
    /// has a page less from now on, as far as is known here.
    fn take_room(&self, least: u64, may: impl Fn(PartId) -> bool) -> Option<PartId> {
        let mut others = locked(&self.others);
        let most = others
            .iter_mut()
            .filter(|(part, _)| may(**part))
            .max_by_key(|(part, memory)| (memory.room(), std::cmp::Reverse(**part)));
        let (part, memory) = most.filter(|(_, memory)| memory.room() >= least)?;
        memory.resident_bytes = memory.resident_bytes.saturating_add(PAGE_BYTES);
        Some(*part)
    }

    fn has_room(&self, least: u64) -> bool {
        locked(&self.others)
            .values()
            .any(|memory| memory.room() >= least)
    }
}

/// Between two looks of the thread that gives away.
#[derive(Debug)]
struct Seen {
    told: Option<(PartMemory, Instant)>,
    /// Pages on their way, since when they are so many.
    going: (usize, Instant),
    /// Since when it is seen which pages are used, and bytes that were here then.
    adopted: (Instant, u64),
}

impl Shared {
    /// Bytes of the machine's memory that are here.
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

    /// Whether there is so much too much here that nothing more is to come for a moment.
    /// Who gives away, and tells others, is woken where it has something to do.
    pub(super) fn is_full(&self) -> bool {
        let Some(limit) = self.limits.get() else {
            return false;
        };
        let resident = self.resident().unwrap_or(0);
        let told = self.limits.told_bytes.load(Ordering::Relaxed);
        if resident > limit || resident.abs_diff(told) > limit / TOLD_PART {
            self.limits.ring();
        }
        resident > limit.saturating_add(limit / FAR_PART) && self.limits.has_room(least_room(limit))
    }

    /// Until the end: gives away what is too much here, and tells others what there is.
    pub(super) fn keep_within(&self) {
        let mut seen = Seen {
            told: None,
            going: (0, Instant::now()),
            adopted: (Instant::now(), 0),
        };
        let mut looking = Looking::default();
        while !self.over.load(Ordering::Acquire) {
            self.look_at_uses(&mut looking);
            let gives = match self.limits.get() {
                Some(limit) => self.give_away(limit, &mut seen),
                None => {
                    locked(&self.state).keep = None;
                    Ok(false)
                }
            };
            let told = gives.and_then(|gives| self.tell_memory(&mut seen).map(|()| gives));
            let pause = match told {
                Ok(true) => GIVING,
                Ok(false) if self.limits.get().is_some() => LIMITED,
                Ok(false) => UNLIMITED,
                Err(error) => return self.end(error),
            };
            self.limits.sleep(pause);
        }
    }

    /// Tells the others what is here, if that is news.
    fn tell_memory(&self, seen: &mut Seen) -> Result<(), SpanError> {
        if !self.limits.are_told() {
            return Ok(());
        }
        if self.limits.again.swap(false, Ordering::AcqRel) {
            seen.told = None;
        }
        let now = self.own_memory()?;
        let is_news = match &seen.told {
            None => true,
            // (They counted what was to come, and may be wrong.)
            Some((told, at)) if *told == now => {
                now.limit_bytes.is_some() && at.elapsed() >= UNLIMITED
            }
            Some((told, at)) => {
                let most = now.limit_bytes.unwrap_or(told.resident_bytes);
                told.limit_bytes != now.limit_bytes
                    || told.resident_bytes.abs_diff(now.resident_bytes) > most / TOLD_PART
                    || at.elapsed() >= UNLIMITED
            }
        };
        if !is_news {
            return Ok(());
        }
        seen.told = Some((now, Instant::now()));
        self.limits
            .told_bytes
            .store(now.resident_bytes, Ordering::Relaxed);
        self.tell_all(&Parcel::Memory(now))
    }

    pub(super) fn tell_all(&self, parcel: &Parcel) -> Result<(), SpanError> {
        let mut work = Work::default();
        for part in self.others.parts().iter() {
            work.put(part, parcel)?;
        }
        self.say(Ok(()), work);
        Ok(())
    }

    /// From now on [`Self::is_used`] is of what the guest does from now on.
    fn take_all_uses(&self) {
        for memory in &self.memories {
            let here = memory.memory().populated().unwrap_or_default();
            for range in here {
                let pieces = (range.start..range.end).step_by(TAKEN_BYTES as usize);
                for start in pieces {
                    if self.over.load(Ordering::Acquire) {
                        return;
                    }
                    let bytes = TAKEN_BYTES.min(range.end - start);
                    let whole = bytes.next_multiple_of(PAGE_BYTES);
                    if let Err(error) = memory.access_tracker().take(start, whole) {
                        tracing::debug!(%error, start, "which of its memory is used");
                    }
                }
            }
        }
    }

    /// Whether the guest used a page since this was asked of it last, or it came. (Of one of
    /// which that cannot be seen it is not known, and it goes in its turn.)
    fn is_used(&self, page: PageId) -> bool {
        let memory = self.memories.get(page.memory as usize);
        let used = memory.map(|it| it.access_tracker().take(offset(page), PAGE_BYTES));
        let used = matches!(used, Some(Ok(used)) if used == [true]);
        let (memory, at) = (page.memory, offset(page));
        used || locked(&self.idle).was_just_used(memory, at, self.now())
    }

    /// Gives away some of what is too much; whether there is more to do at once.
    fn give_away(&self, limit: u64, seen: &mut Seen) -> Result<bool, SpanError> {
        let resident = self.resident()?;
        let begins = {
            let state = locked(&self.state);
            state.keep.is_none() && state.failure.is_none() && !self.must_rest(&state)
        };
        if begins {
            // (What was used before counts no more. It takes a while, of much memory.)
            self.take_all_uses();
            seen.adopted = (Instant::now(), resident);
        }
        let mut guard = locked(&self.state);
        let rests = self.must_rest(&guard);
        if guard.failure.is_some() || rests {
            return Ok(rests);
        }
        let state = &mut *guard;
        let keep = match &mut state.keep {
            Some(keep) => keep,
            none => {
                // What was here at its beginning, or before there was a limit.
                let keep = none.insert(Keep::default());
                adopt(&self.memories, keep, |page| state.coherence.copy(page))?;
                keep
            }
        };
        let given = keep.take_given();
        self.limits
            .given
            .fetch_add(given * PAGE_BYTES, Ordering::Relaxed);
        if seen.going.0 != keep.going() || given > 0 {
            seen.going = (keep.going(), Instant::now());
        } else if keep.going() > 0 && seen.going.1.elapsed() > LEAVES_WITHIN {
            keep.give_up_waiting();
        }
        if resident <= limit && keep.going() == 0 {
            return Ok(false);
        }
        // (Before, nobody knows what of it is used. No more is to come for that.)
        let (adopted, bytes) = seen.adopted;
        let rests_below = bytes.max(limit).saturating_add(limit / FAR_PART);
        if adopted.elapsed() < ADOPTED_RESTS && resident <= rests_below {
            return Ok(false);
        }
        let goal = limit - limit / BELOW_PART;
        let too_much = (resident.saturating_sub(goal) / PAGE_BYTES) as usize;
        let mut excess = too_much.saturating_sub(keep.going());
        let mut events: Vec<Happened> = Vec::new();
        let coherence = &state.coherence;
        let copies = keep.copies(excess.min(MOVES_MAX), |page| coherence.can_drop(page));
        excess -= copies.len();
        let bytes = (copies.len() * PAGE) as u64;
        self.limits.dropped.fetch_add(bytes, Ordering::Relaxed);
        let drops = copies.into_iter().map(|page| Event::Drop { page });
        events.extend(drops.map(|event| (event, Beside::Nothing)));
        let may_keep = limit / PAGE_BYTES;
        let may = |part: PartId| {
            let told = self.others.told(part);
            told.is_some_and(|told| told.unwritten_bytes() <= UNWRITTEN_MAX)
        };
        // (Who waits for a page meanwhile waits for this.)
        let looks = Cell::new(0);
        let is_used = |page: PageId| {
            looks.set(looks.get() + 1);
            self.is_used(page)
        };
        let mut count = events.len();
        while excess > 0 && count < MOVES_MAX && keep.going() < GOING_MAX && keep.owned() > 0 {
            // (The rest has its turn in a moment.)
            if looks.get() >= LOOKS_MAX {
                break;
            }
            let Some(to) = self.limits.take_room(least_room(limit), may) else {
                break;
            };
            let Some(page) = keep.next(may_keep, is_used) else {
                break;
            };
            push_move(&mut events, page, to);
            count += 1;
            excess -= 1;
        }
        let goes_on = !events.is_empty() || keep.going() > 0;
        let mut work = Work::default();
        let done = self.step_in(&mut guard, events, &mut work);
        drop(guard);
        self.say(done, work);
        Ok(goes_on)
    }
}

/// Takes note of all pages that are here.
fn adopt(
    memories: &[keel_wasm::memory::Spanning],
    keep: &mut Keep,
    copy: impl Fn(PageId) -> Copy,
) -> Result<(), SpanError> {
    for (number, memory) in (0..).zip(memories) {
        let here = memory.memory().populated();
        for range in here.map_err(|error| SpanError::Memory(error.to_string()))? {
            for at in range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES) {
                // (A memory of 64 GiB has 16 million.)
                let page = PageId {
                    memory: number,
                    number: at as u32,
                };
                match copy(page) {
                    Copy::Shared => keep.came(page, Access::Read),
                    Copy::Owned | Copy::Modified => keep.is_here(page),
                    Copy::Invalid => {}
                }
            }
        }
    }
    Ok(())
}

impl Pages {
    /// Waits until what the host writes next has room here, as pages that are too much
    /// leave for other parts. Where none has room for them it is as while the machine runs:
    /// they stay, whatever a part is to keep; but never more than this host has room for.
    ///
    /// # Errors
    /// [`SpanError::NoRoom`], [`SpanError::Unsettled`] where nothing leaves for long, and
    /// [`SpanError`] where it is over.
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
            if resident_bytes <= limit.saturating_add(limit / FAR_PART).min(room_bytes) {
                return Ok(());
            }
            let all_told = locked(&limits.others).len() == usize::from(shared.others.count());
            if all_told && !limits.has_room(least_room(limit)) {
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
            } else if last.1.elapsed() > ROOM_WITHIN {
                let patience = ROOM_WITHIN;
                return Err(SpanError::Unsettled { patience });
            }
            limits.ring();
            std::thread::sleep(GIVING);
        }
    }

    /// The most that each part may keep from now on, in bytes, while others have room for
    /// what is beyond; at least [`PART_BYTES_MIN`]. Only of the home, which gives nothing
    /// away before this is said: not before the machine depends on its members.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn limit_parts(&self, limit_bytes: Option<u64>) -> Result<(), SpanError> {
        // (Two do not contradict each other: who holds this tells.)
        let mut told = locked(&self.shared.limits.of_parts);
        if *told == Some(limit_bytes) {
            return Ok(());
        }
        *told = Some(limit_bytes);
        self.shared.limits.told(limit_bytes);
        self.shared.tell_all(&Parcel::Limit(limit_bytes))
    }

    /// What [`Self::limit_parts`] said last.
    pub fn part_limit(&self) -> Option<u64> {
        locked(&self.shared.limits.of_parts).flatten()
    }

    /// Whether this host has room for so much more, whatever a part is to keep.
    pub fn has_room_for(&self, bytes: u64) -> bool {
        let resident = self.shared.resident().unwrap_or(u64::MAX);
        resident.saturating_add(bytes) <= self.shared.limits.room
    }

    /// This part keeps all that comes from now on.
    pub fn keep_all(&self) {
        let limits = &self.shared.limits;
        limits.keeps_all.store(true, Ordering::Release);
        limits.set(None);
    }

    /// What each part has of the memory, as it told last.
    pub fn memory_of_parts(&self) -> BTreeMap<PartId, PartMemory> {
        let mut memory = locked(&self.shared.limits.others).clone();
        if let Ok(own) = self.shared.own_memory() {
            memory.insert(self.shared.me(), own);
        }
        memory
    }
}
