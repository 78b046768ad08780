//! The memory of the whole as it is at one instant, read while its threads go on: what a
//! checkpoint keeps of a machine with several parts.
//!
//! ```text
//!   home                                   member
//!   what pages there are
//!     │─── Prepare ─────────────────────▶│ protects what it owns; whoever writes a page
//!     │◀─────────────────────── Prepared ─│ goes on at once, and it counts as another one
//!     │            all threads stand
//!   nothing is on its way ([`super::quiescence`]): the cut
//!     │─── Mark ────────────────────────▶│ protects what was written since, or came
//!     │◀───────────────────────── Marked ─│
//!     │            threads go on
//!     │─── More ────────────────────────▶│ may send so much, and give away again
//!     │◀────────────────────────── pages ─│ as they were; of those that are as they were at
//!     │                                   │ an earlier cut, only that ([`known`])
//!     │◀─────────────────────────── Done ─│
//!     │─── End ─────────────────────────▶│
//! ```
//!
//! While nothing is on its way each page has exactly one owner, so each is kept once. What
//! is protected is copied before somebody writes it or gets it; the rest follows piece by
//! piece (Li, Naughton and Plank, "Low-Latency, Concurrent Checkpointing for Parallel
//! Programs", 1994). Threads stand for two round trips and the protecting of what was
//! written since it was prepared. Members send as much as the home has asked for, so a slow
//! store fills no memory.

use super::super::page_digests::{self, PageDigests};
use super::super::wire::PeerMessage;
use super::effects::Effects;
use super::{PAGE, Pages, Shared, SpanError, State, locked};
use bytes::Bytes;
use keel_wasm::coherence::{Copy, PageId, PartId, PartSet};
use keel_wasm::memory::{MemoryError, PAGE_BYTES, Spanning};
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

/// Pages that are read at once: what waits for the lock meanwhile waits some microseconds.
const PIECE_PAGES: u32 = 16;
/// The most of them that come at once.
const PIECE_PAGES_MAX: usize = 64;
/// Bytes that a member may send before it is asked for more.
const AHEAD_BYTES: u32 = 1 << 20;
/// As so many bytes counts that some pages are as they were.
const SAME_BYTES: u32 = 4096;
/// Pages that are protected, or let go, at once.
const AT_ONCE_PAGES: u32 = 512;
/// When no more are left to be protected it is prepared.
const LEFT_PAGES: u64 = 512;
/// Faults are slowed down while so many bytes that were copied before they changed wait
/// here to be kept; and with so many it is given up: the store is too slow, or hangs.
const COPIED_MANY: usize = 32 << 20;
const COPIED_MAX: usize = 256 << 20;
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What home and members say to each other of a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CutMessage {
    /// To members: there will be a cut. Of pages that they gave at this earlier one, and that
    /// are as they were, it is enough to say so.
    Prepare {
        /// Its number.
        since: Option<u64>,
    },
    /// To the home: almost all that is here is protected.
    Prepared,
    /// To members: the cut is now; nothing is on its way.
    Mark,
    /// To the home: it is.
    Marked,
    /// To members: so many bytes more may be sent; it is marked everywhere.
    More(u32),
    /// To the home: that was all.
    Done,
    /// To the home: what changed is too much to be kept here until it is asked for.
    GaveUp,
    /// To members: what was not sent is not wanted any more.
    End,
}

/// Pages in a row, as they were at a cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutPages {
    /// The machine's memory.
    pub memory: u32,
    /// Number of the first page.
    pub first: u32,
    /// Whole pages.
    pub bytes: Bytes,
}

/// Pages in a row that are as they were at the cut before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnchangedPages {
    /// The machine's memory.
    pub memory: u32,
    /// Number of the first page.
    pub first: u32,
    /// How many there are.
    pub pages: u32,
    /// Of what they hold, page by page: whoever takes them to be
    /// something else finds out.
    pub digest: u128,
}

/// Some of a cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CutPiece {
    /// As they were at the cut.
    Pages(CutPages),
    /// As they were at the cut before.
    Unchanged(UnchangedPages),
}

impl CutPages {
    /// Whether they are what can be sent at once.
    pub(in super::super) fn is_whole(&self) -> bool {
        let pages = self.bytes.len() / PAGE;
        self.bytes.len().is_multiple_of(PAGE) && (1..=PIECE_PAGES_MAX).contains(&pages)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// What there is is found out and protected.
    Preparing,
    /// The cut was.
    Marked,
}

/// What a part knows of a cut.
#[derive(Debug)]
pub(super) struct CutState {
    number: u64,
    /// Which it is of all that this part has heard of: another home counts anew.
    heard: u64,
    /// An earlier cut of which all was taken, and kept.
    since: Option<u64>,
    stage: Stage,
    /// Of each memory the pages that are protected for it; once marked those of which nobody
    /// has read yet what they were.
    pages: Vec<RoaringBitmap>,
    /// Before it is marked: pages that this part may own, and that are not protected for it.
    wanted: Vec<RoaringBitmap>,
    /// At a member: up to which page it was looked what this part owns; `None`: all.
    looked: Option<PageId>,
    /// Pages that changed since, as they were.
    copied: VecDeque<CutPages>,
    /// At a member: bytes that the home waits for, whether it was told that it is prepared,
    /// or, once marked, that there are no more, and whether it wants none.
    asked: i64,
    is_done: bool,
    is_over: bool,
    /// Too much changed before it was read.
    gave_up: bool,
    /// At the home: who said what, and what came.
    prepared: PartSet,
    marked: PartSet,
    done: PartSet,
    came: VecDeque<(PartId, CutPiece)>,
}

impl CutState {
    fn new((number, heard): (u64, u64), since: Option<u64>, memories: usize) -> Self {
        CutState {
            number,
            heard,
            since,
            stage: Stage::Preparing,
            pages: vec![RoaringBitmap::new(); memories],
            wanted: vec![RoaringBitmap::new(); memories],
            looked: Some(PageId {
                memory: 0,
                number: 0,
            }),
            copied: VecDeque::new(),
            asked: 0,
            is_done: false,
            is_over: false,
            gave_up: false,
            prepared: PartSet::default(),
            marked: PartSet::default(),
            done: PartSet::default(),
            came: VecDeque::new(),
        }
    }
}

/// What is known of cuts without the lock.
#[derive(Debug, Default)]
pub(super) struct CutStatus {
    /// Numbers of those that there were, at the home.
    count: AtomicU64,
    /// How many a member has heard of.
    heard: AtomicU64,
    /// There is one.
    is_on: AtomicBool,
    copied_bytes: AtomicUsize,
    pub(super) changed: Condvar,
}

impl CutStatus {
    /// Whether so much was copied that whoever writes waits for a moment.
    pub(super) fn are_behind(&self) -> bool {
        self.copied_bytes.load(Ordering::Relaxed) > COPIED_MANY
    }
}

fn failed(error: MemoryError) -> SpanError {
    SpanError::Memory(error.to_string())
}

/// The pages that the set begins with, in a row, at most so many.
fn first_run(set: &RoaringBitmap, most: u32) -> Option<(u32, u32)> {
    let mut pages = set.iter();
    let first = pages.next()?;
    let count = 1
        + (first + 1..)
            .zip(pages)
            .take(most as usize - 1)
            .take_while(|(next, page)| next == page)
            .count() as u32;
    Some((first, count))
}

/// Of so many pages from one on those for which it is so, in rows.
fn runs_of((first, count): (u32, u32), is_so: impl Fn(u32) -> bool) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in (first..first + count).filter(|number| is_so(*number)) {
        match runs.last_mut() {
            Some((start, count)) if *start + *count == number => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

/// Lets those of some pages be written that this part may write.
fn let_go(
    memory: &Spanning,
    copy: impl Fn(u32) -> Copy,
    pages: (u32, u32),
) -> Result<(), SpanError> {
    for (first, count) in runs_of(pages, |number| copy(number) == Copy::Modified) {
        let (at, bytes) = (u64::from(first), u64::from(count) * PAGE_BYTES);
        memory.allow(at * PAGE_BYTES, bytes).map_err(failed)?;
    }
    Ok(())
}

impl Shared {
    pub(super) fn is_home(&self) -> bool {
        self.me() == PartId::HOME
    }

    pub(super) fn tell_part(&self, to: PartId, parcel: &PeerMessage) -> Result<(), SpanError> {
        let mut work = Effects::default();
        work.put(to, parcel)?;
        self.say(Ok(()), work);
        Ok(())
    }

    /// Takes note of a word about a cut; one about an earlier one counts no more.
    ///
    /// # Errors
    /// [`SpanError::Lost`], of a part that cannot say that; others, of this one.
    pub(super) fn hear_cut(
        &self,
        from: PartId,
        number: u64,
        word: CutMessage,
    ) -> Result<(), SpanError> {
        let to_home = matches!(
            word,
            CutMessage::Prepared | CutMessage::Marked | CutMessage::Done | CutMessage::GaveUp
        );
        if to_home != self.is_home() || !to_home && from != PartId::HOME {
            let reason = "it says of a cut what only another part can say".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        self.note_cut(from, number, word)
    }

    fn note_cut(&self, from: PartId, number: u64, word: CutMessage) -> Result<(), SpanError> {
        let mut guard = locked(&self.state);
        let state = &mut *guard;
        if let CutMessage::Prepare { since } = word {
            // (Of an earlier one there may be something left.)
            while self.let_some_go(state)? {}
            let heard = self.cuts.heard.fetch_add(1, Ordering::Relaxed);
            let cutting = CutState::new((number, heard), since, self.memories.len());
            state.cutting = Some(cutting);
            self.cuts.is_on.store(true, Ordering::Release);
        }
        let Some(cutting) = state.cutting.as_mut().filter(|it| it.number == number) else {
            return Ok(());
        };
        match word {
            CutMessage::Prepare { .. } => {}
            CutMessage::Prepared => cutting.prepared = cutting.prepared.with(from),
            CutMessage::Marked => cutting.marked = cutting.marked.with(from),
            CutMessage::Done => cutting.done = cutting.done.with(from),
            CutMessage::More(bytes) => cutting.asked = cutting.asked.saturating_add(bytes.into()),
            CutMessage::GaveUp => cutting.gave_up = true,
            CutMessage::End => cutting.is_over = true,
            CutMessage::Mark => {
                self.mark(state)?;
                drop(guard);
                let word = CutMessage::Marked;
                self.tell_part(from, &PeerMessage::Cut { number, word })?;
            }
        }
        self.cuts.changed.notify_all();
        Ok(())
    }

    /// Takes note of pages that a member had at a cut.
    ///
    /// # Errors
    /// As [`Self::hear_cut`].
    pub(super) fn hear_cut_pages(
        &self,
        from: PartId,
        number: u64,
        pages: CutPages,
    ) -> Result<(), SpanError> {
        let last = (pages.bytes.len() / PAGE) as u32 - 1;
        let last = pages.first.checked_add(last).map(|number| PageId {
            memory: pages.memory,
            number,
        });
        if !self.is_home() || !last.is_some_and(|last| self.has(last)) {
            let reason = "it sends pages of a cut that cannot be".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        let mut state = locked(&self.state);
        if let Some(cutting) = state.cutting.as_mut().filter(|it| it.number == number) {
            cutting.came.push_back((from, CutPiece::Pages(pages)));
            self.cuts.changed.notify_all();
        }
        Ok(())
    }

    /// As [`Self::hear_cut_pages`], of such as are as they were.
    ///
    /// # Errors
    /// As there.
    pub(super) fn hear_cut_same(
        &self,
        from: PartId,
        number: u64,
        same: UnchangedPages,
    ) -> Result<(), SpanError> {
        let last = same.pages.checked_sub(1);
        let last = last.and_then(|more| same.first.checked_add(more));
        let memory = same.memory;
        let can_be = last.is_some_and(|number| self.has(PageId { memory, number }))
            && same.pages as usize <= PIECE_PAGES_MAX;
        let mut state = locked(&self.state);
        let cutting = state.cutting.as_mut().filter(|it| it.number == number);
        let since = cutting.as_ref().is_none_or(|it| it.since.is_some());
        if !self.is_home() || !can_be || !since {
            let reason = "it says of a cut before what cannot be".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        if let Some(cutting) = cutting {
            cutting.came.push_back((from, CutPiece::Unchanged(same)));
            self.cuts.changed.notify_all();
        }
        Ok(())
    }

    /// Whoever wanted a cut does not want it any more, nor that nothing is on its way.
    pub(super) fn end_cut(&self) {
        let mut state = locked(&self.state);
        if let Some(cutting) = &mut state.cutting {
            cutting.is_over = true;
        }
        self.no_longer_settle(&mut state);
    }

    /// The cut is now: all that this part owns is protected.
    fn mark(&self, state: &mut State) -> Result<(), SpanError> {
        let is_prepared = state.cutting.as_ref().map(|it| it.stage) == Some(Stage::Preparing);
        if !is_prepared || state.settling.is_none() {
            return Err(SpanError::Inconsistent(
                "a cut that nothing is ready for".into(),
            ));
        }
        while self.look_at_some(state) {}
        while self.protect_some(state)? {}
        if let Some(cutting) = &mut state.cutting {
            cutting.stage = Stage::Marked;
            cutting.is_done = false;
        }
        Ok(())
    }

    /// Looks what a member owns, some of it; false when it has. (The home has what nobody
    /// else has, and asks its memories.)
    fn look_at_some(&self, state: &mut State) -> bool {
        let State {
            cutting, coherence, ..
        } = state;
        let from = cutting.as_ref().and_then(|it| it.looked);
        let (Some(cutting), Some(from), false) = (cutting, from, self.is_home()) else {
            return false;
        };
        cutting.looked = None;
        for (count, (page, copy)) in (0..).zip(coherence.changed_from(from)) {
            if count == AT_ONCE_PAGES {
                cutting.looked = Some(page);
                break;
            }
            if let (Copy::Kept | Copy::Modified, Some(wanted)) =
                (copy, cutting.wanted.get_mut(page.memory as usize))
            {
                wanted.insert(page.number);
            }
        }
        cutting.looked.is_some()
    }

    /// Whether more is to be protected than is little enough.
    fn is_much_left(&self, state: &State) -> bool {
        let wanted = state.cutting.iter().flat_map(|it| &it.wanted);
        wanted.map(RoaringBitmap::len).sum::<u64>() > LEFT_PAGES
    }

    /// Protects some of what is not protected yet; false if there is no more.
    fn protect_some(&self, state: &mut State) -> Result<bool, SpanError> {
        let State {
            cutting, coherence, ..
        } = state;
        let Some(cutting) = cutting else {
            return Ok(false);
        };
        let all = cutting.wanted.iter_mut().zip(&mut cutting.pages);
        for (number, (wanted, pages)) in (0..).zip(all) {
            let Some((first, count)) = first_run(wanted, AT_ONCE_PAGES) else {
                continue;
            };
            wanted.remove_range(first..first + count);
            let memory = self.memory(number)?;
            let owned = |page| {
                let copy = coherence.copy(PageId {
                    memory: number,
                    number: page,
                });
                matches!(copy, Copy::Kept | Copy::Modified)
            };
            for (first, count) in runs_of((first, count), owned) {
                let (at, bytes) = (u64::from(first), u64::from(count) * PAGE_BYTES);
                let done = memory.protect_here(at * PAGE_BYTES, bytes);
                done.map_err(failed)?;
                pages.insert_range(first..first + count);
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// A page is about to change, or to leave, or has just come: what it was is copied if
    /// that is still wanted. Before a cut it is to be looked at once more.
    pub(super) fn changes(&self, state: &mut State, page: PageId) -> Result<(), SpanError> {
        if !self.cuts.is_on.load(Ordering::Acquire) {
            return Ok(());
        }
        let State {
            cutting, coherence, ..
        } = state;
        let Some(cutting) = cutting else {
            return Ok(());
        };
        let at = page.memory as usize;
        let Some(pages) = cutting.pages.get_mut(at) else {
            return Ok(());
        };
        let was_protected = pages.remove(page.number);
        let is_marked = cutting.stage == Stage::Marked;
        if let (false, Some(wanted)) = (is_marked, cutting.wanted.get_mut(at)) {
            wanted.insert(page.number);
        }
        if !was_protected {
            return Ok(());
        }
        let memory = self.memory(page.memory)?;
        if is_marked && !cutting.is_over && !cutting.gave_up {
            let mut bytes = vec![0; PAGE];
            let at = u64::from(page.number) * PAGE_BYTES;
            memory.memory().read(at, &mut bytes).map_err(failed)?;
            cutting.copied.push_back(CutPages {
                memory: page.memory,
                first: page.number,
                bytes: bytes.into(),
            });
            let before = self.cuts.copied_bytes.fetch_add(PAGE, Ordering::Relaxed);
            if before >= COPIED_MAX {
                cutting.gave_up = true;
                cutting.copied.clear();
                self.cuts.copied_bytes.store(0, Ordering::Relaxed);
            }
            self.cuts.changed.notify_all();
        }
        let copy = |number| coherence.copy(PageId { number, ..page });
        let_go(memory, copy, (page.number, 1))
    }

    /// The host writes a page that is pinned.
    pub(super) fn host_writes(
        &self,
        page: PageId,
        write: impl FnOnce() -> Result<(), MemoryError>,
    ) -> Result<(), SpanError> {
        if self.cuts.is_on.load(Ordering::Acquire) {
            self.changes(&mut locked(&self.state), page)?;
        }
        write().map_err(failed)?;
        // It may be the first time that anybody touches it: no fault tells of that.
        if self.limits.is_set() {
            let mut state = locked(&self.state);
            let access = state.coherence.access(page);
            if let (Some(keep), Some(access)) = (&mut state.keep, access)
                && !keep.knows(page)
            {
                keep.came(page, access);
            }
        }
        if self.cuts.is_on.load(Ordering::Acquire) {
            // There may have been no such page when it was looked what there are, and a cut
            // no sooner than that.
            let mut state = locked(&self.state);
            let preparing = state.cutting.as_mut();
            let preparing = preparing.filter(|it| it.stage != Stage::Marked);
            let wanted = preparing.and_then(|it| it.wanted.get_mut(page.memory as usize));
            if let Some(wanted) = wanted {
                wanted.insert(page.number);
            }
        }
        Ok(())
    }

    /// Some of this part's pages as they were at the cut; `None` if there are no more.
    fn take_piece(&self, state: &mut State) -> Result<Option<CutPages>, SpanError> {
        let State {
            cutting, coherence, ..
        } = state;
        let Some(cutting) = cutting.as_mut().filter(|it| it.stage == Stage::Marked) else {
            return Ok(None);
        };
        if let Some(copied) = cutting.copied.pop_front() {
            self.cuts.copied_bytes.fetch_sub(PAGE, Ordering::Relaxed);
            return Ok(Some(copied));
        }
        for (number, pages) in (0..).zip(&mut cutting.pages) {
            let Some((first, count)) = first_run(pages, PIECE_PAGES) else {
                continue;
            };
            let memory = self.memory(number)?;
            let mut bytes = vec![0; count as usize * PAGE];
            let at = u64::from(first) * PAGE_BYTES;
            memory.memory().read(at, &mut bytes).map_err(failed)?;
            pages.remove_range(first..first + count);
            let copy = |page| {
                coherence.copy(PageId {
                    memory: number,
                    number: page,
                })
            };
            let_go(memory, copy, (first, count))?;
            return Ok(Some(CutPages {
                memory: number,
                first,
                bytes: bytes.into(),
            }));
        }
        Ok(None)
    }

    /// Lets some of the pages go that nobody wants any more; false when the cut is over.
    pub(super) fn let_some_go(&self, state: &mut State) -> Result<bool, SpanError> {
        let State {
            cutting, coherence, ..
        } = state;
        let pages = cutting.iter_mut().flat_map(|it| &mut it.pages);
        for (number, pages) in (0..).zip(pages) {
            let Some((first, count)) = first_run(pages, AT_ONCE_PAGES) else {
                continue;
            };
            pages.remove_range(first..first + count);
            let copy = |page| {
                coherence.copy(PageId {
                    memory: number,
                    number: page,
                })
            };
            let_go(self.memory(number)?, copy, (first, count))?;
            return Ok(true);
        }
        if cutting.is_none() {
            return Ok(false);
        }
        *cutting = None;
        self.cuts.copied_bytes.store(0, Ordering::Relaxed);
        self.cuts.is_on.store(false, Ordering::Release);
        // (Who moves pages may wait for it.)
        self.cuts.changed.notify_all();
        Ok(false)
    }

    /// A member's thread that sends what there was at cuts, until the end.
    pub(super) fn give_cuts(&self) {
        let mut given = DigestHistory::default();
        // (A home gives none: whoever takes one does.)
        while !self.over.load(Ordering::Acquire) && !self.is_home() {
            if let Err(error) = self.give_some(&mut given) {
                return self.end(error);
            }
        }
    }

    fn give_some(&self, given: &mut DigestHistory) -> Result<(), SpanError> {
        let mut guard = locked(&self.state);
        let state = &mut *guard;
        let parcel = match &state.cutting {
            Some(cutting) if cutting.is_over => return self.let_some_go(state).map(drop),
            Some(cutting) if cutting.gave_up => {
                let (number, word) = (cutting.number, CutMessage::GaveUp);
                if let Some(cutting) = &mut state.cutting {
                    cutting.is_over = true;
                }
                Some(PeerMessage::Cut { number, word })
            }
            Some(cutting) if cutting.stage == Stage::Preparing && !cutting.is_done => {
                let number = cutting.number;
                if self.look_at_some(state) || self.is_much_left(state) {
                    return self.protect_some(state).map(drop);
                }
                if let Some(cutting) = &mut state.cutting {
                    cutting.is_done = true;
                }
                let word = CutMessage::Prepared;
                Some(PeerMessage::Cut { number, word })
            }
            Some(cutting)
                if cutting.stage == Stage::Marked && !cutting.is_done && cutting.asked > 0 =>
            {
                let (number, heard, since) = (cutting.number, cutting.heard, cutting.since);
                if let Some(pages) = self.take_piece(state)? {
                    drop(guard);
                    return self.give(number, given.split_unchanged(heard, since, &pages));
                }
                if let Some(cutting) = &mut state.cutting {
                    cutting.is_done = true;
                }
                given.all_is(number, heard);
                let word = CutMessage::Done;
                Some(PeerMessage::Cut { number, word })
            }
            _ => None,
        };
        match parcel {
            Some(parcel) => {
                drop(guard);
                self.tell_part(PartId::HOME, &parcel)
            }
            None => {
                // (Whoever ends it rings; a lost ring costs a second.)
                let rest = super::SLEEP_MAX;
                drop(self.cuts.changed.wait_timeout(guard, rest));
                Ok(())
            }
        }
    }
}

/// What a member gave.
#[derive(Debug, Default)]
struct DigestHistory {
    /// At the last cut of which it gave all; its number, at the home of then.
    before: Option<(u64, PageDigests)>,
    /// At the one that it gives, and which that is of those it has heard of.
    now: Option<(u64, PageDigests)>,
}

impl DigestHistory {
    /// What of some pages is as it was at an earlier cut.
    fn split_unchanged(
        &mut self,
        heard: u64,
        since: Option<u64>,
        pages: &CutPages,
    ) -> Vec<CutPiece> {
        self.before.take_if(|(number, _)| since != Some(*number));
        let (_, now) = match self.now.take_if(|(now, _)| *now == heard) {
            Some(now) => self.now.insert(now),
            None => self.now.insert((heard, PageDigests::default())),
        };
        let before = self.before.as_ref().map(|(_, known)| known);
        page_digests::split_unchanged(pages, |memory, number, hash| {
            now.put(memory, number, hash);
            before.is_some_and(|it| it.get(memory, number) == Some(hash))
        })
    }

    /// All of a cut was given.
    fn all_is(&mut self, number: u64, heard: u64) {
        let now = self.now.take();
        // (It may have had nothing.)
        let known = now.filter(|(now, _)| *now == heard);
        let known = known.map_or_else(PageDigests::default, |(_, known)| known);
        self.before = Some((number, known));
    }
}

impl Shared {
    fn give(&self, number: u64, pieces: Vec<CutPiece>) -> Result<(), SpanError> {
        let mut bytes = 0;
        let mut parcels = Vec::new();
        for piece in pieces {
            parcels.push(match piece {
                CutPiece::Pages(pages) => {
                    bytes += pages.bytes.len();
                    PeerMessage::CutPages { number, pages }
                }
                CutPiece::Unchanged(same) => {
                    bytes += SAME_BYTES as usize;
                    PeerMessage::UnchangedPages(number, same)
                }
            });
        }
        {
            let mut state = locked(&self.state);
            let cutting = state.cutting.as_mut().filter(|it| it.number == number);
            if let Some(cutting) = cutting {
                cutting.asked -= bytes as i64;
            }
        }
        for parcel in parcels {
            self.tell_part(PartId::HOME, &parcel)?;
        }
        Ok(())
    }
}

/// A cut through the memory of a machine, at its home. Dropping it ends it: what was not
/// taken is not to be had any more.
pub struct Cut {
    shared: Arc<Shared>,
    number: u64,
}

impl std::fmt::Debug for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Cut");
        debug.field("number", &self.number).finish_non_exhaustive()
    }
}

impl Pages {
    /// A cut of which nothing is prepared yet.
    fn open_cut(&self, since: Option<u64>) -> Result<Cut, SpanError> {
        let shared = self.shared.clone();
        let number = shared.cuts.count.fetch_add(1, Ordering::Relaxed) + 1;
        {
            let mut state = locked(&shared.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let leave = state.coherence.are_leaving();
            let is_taken = state.cutting.is_some() || state.settling.is_some();
            if is_taken || leave || !shared.is_home() {
                return Err(SpanError::CutUnavailable);
            }
            let cutting = CutState::new((number, 0), since, shared.memories.len());
            state.cutting = Some(cutting);
            shared.cuts.is_on.store(true, Ordering::Release);
        }
        Ok(Cut { shared, number })
    }

    /// Prepares a cut while threads run: finds out what pages there are, and has them
    /// protected. Only at the home, which was the origin; one at a time. Of pages that members
    /// gave at an earlier one ([`Cut::number`]), of which all was taken, they say only that
    /// they are as they were, where that is so.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::CutUnavailable`] if there is one already, or parts leave;
    /// [`SpanError::NotQuiescent`] if that takes longer.
    pub fn prepare_cut(&self, since: Option<u64>, patience: Duration) -> Result<Cut, SpanError> {
        let cut = self.open_cut(since)?;
        for (at, memory) in cut.shared.memories.iter().enumerate() {
            // It takes long; what comes to be meanwhile is noted.
            let here = memory.memory().populated().map_err(failed)?;
            let mut guard = locked(&cut.shared.state);
            let State { cutting, woken, .. } = &mut *guard;
            let wanted = cutting.as_mut().and_then(|it| it.wanted.get_mut(at));
            if let (Some(wanted), Some(woken)) = (wanted, woken.get(at)) {
                *wanted |= woken;
                for range in here {
                    let last = range.end.div_ceil(PAGE_BYTES);
                    wanted.insert_range((range.start / PAGE_BYTES) as u32..last as u32);
                }
            }
        }
        cut.tell_all(CutMessage::Prepare { since })?;
        let deadline = Instant::now() + patience;
        loop {
            let state = &mut *locked(&cut.shared.state);
            if !cut.shared.is_much_left(state) || !cut.shared.protect_some(state)? {
                break;
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
        }
        let others = cut.shared.others.count();
        cut.await_all(deadline, patience, |cutting| {
            cutting.prepared.len() == others
        })?;
        Ok(cut)
    }
}

impl Cut {
    /// Its number, of those that there were.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The cut is now. All threads stand, and nobody writes for the host; when this returns
    /// they may go on.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if that takes longer. There is no cut then.
    pub fn mark(&self, patience: Duration) -> Result<(), SpanError> {
        let shared = &self.shared;
        let deadline = Instant::now() + patience;
        // (Nobody moves anything before all have marked: a page could come where it is not,
        // and be at neither.)
        let settled = shared.settle(patience)?;
        self.tell_all(CutMessage::Mark)?;
        shared.mark(&mut locked(&shared.state))?;
        let others = shared.others.count();
        self.await_all(deadline, patience, |cutting| cutting.marked.len() == others)?;
        drop(settled);
        self.tell_all(CutMessage::More(AHEAD_BYTES))
    }

    fn tell_all(&self, word: CutMessage) -> Result<(), SpanError> {
        let number = self.number;
        for part in self.shared.others.parts().iter() {
            self.shared
                .tell_part(part, &PeerMessage::Cut { number, word })?;
        }
        Ok(())
    }

    fn await_all(
        &self,
        deadline: Instant,
        patience: Duration,
        is_so: impl Fn(&CutState) -> bool,
    ) -> Result<(), SpanError> {
        loop {
            let state = locked(&self.shared.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            match &state.cutting {
                Some(cutting) if is_so(cutting) => return Ok(()),
                Some(_) if Instant::now() < deadline => {}
                Some(_) => return Err(SpanError::NotQuiescent { patience }),
                None => return Err(SpanError::Ended),
            }
            drop(self.shared.cuts.changed.wait_timeout(state, LOOK_AGAIN));
        }
    }

    /// Pages of the machine as they were at the cut, each once; `None` when all were taken.
    /// What is not among them was zero. What this part has it gives in any case.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if nothing comes for so long,
    /// [`SpanError::CutTooSlow`] if too much changed before it was taken.
    pub fn next(&self, patience: Duration) -> Result<Option<CutPiece>, SpanError> {
        let shared = &self.shared;
        let deadline = Instant::now() + patience;
        loop {
            let mut guard = locked(&shared.state);
            if let Some(failure) = &guard.failure {
                return Err(failure.clone());
            }
            let state = &mut *guard;
            let Some(cutting) = &mut state.cutting else {
                return Err(SpanError::Ended);
            };
            if cutting.gave_up {
                return Err(SpanError::CutTooSlow);
            }
            if let Some((from, piece)) = cutting.came.pop_front() {
                drop(guard);
                let more = match &piece {
                    CutPiece::Pages(pages) => {
                        u32::try_from(pages.bytes.len()).unwrap_or(AHEAD_BYTES)
                    }
                    CutPiece::Unchanged(_) => SAME_BYTES,
                };
                let (number, word) = (self.number, CutMessage::More(more));
                shared.tell_part(from, &PeerMessage::Cut { number, word })?;
                return Ok(Some(piece));
            }
            if let Some(pages) = shared.take_piece(state)? {
                return Ok(Some(CutPiece::Pages(pages)));
            }
            let others = shared.others.count();
            let done = state.cutting.as_ref().map(|cutting| cutting.done.len());
            if done == Some(others) {
                return Ok(None);
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
            drop(shared.cuts.changed.wait_timeout(guard, LOOK_AGAIN * 50));
        }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        let over = &self.shared.over;
        let told = match over.load(Ordering::Acquire) {
            true => Ok(()),
            false => self.tell_all(CutMessage::End),
        };
        let ended = told.and_then(|()| {
            while !over.load(Ordering::Acquire)
                && self.shared.let_some_go(&mut locked(&self.shared.state))?
            {}
            Ok(())
        });
        if let Err(error) = ended {
            self.shared.end(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a cut that was given up nothing is left, also where the next one, of another home,
    /// has the same number.
    #[test]
    fn what_was_given_before_is_of_one_cut() {
        let pages = |byte: u8| CutPages {
            memory: 0,
            first: 7,
            bytes: vec![byte; PAGE].into(),
        };
        let is_same = |pieces: Vec<CutPiece>| matches!(pieces[..], [CutPiece::Unchanged(_)]);
        let mut given = DigestHistory::default();
        assert!(!is_same(given.split_unchanged(0, None, &pages(1))));
        // The first of another home, which takes the page from elsewhere.
        given.all_is(1, 1);
        assert!(!is_same(given.split_unchanged(2, Some(1), &pages(1))));
        given.all_is(2, 2);
        // The one before, and only that.
        assert!(is_same(given.split_unchanged(3, Some(2), &pages(1))));
        given.all_is(3, 3);
        assert!(!is_same(given.split_unchanged(4, Some(2), &pages(1))));
        given.all_is(4, 4);
        assert!(!is_same(given.split_unchanged(5, Some(4), &pages(2))));
        assert!(!is_same(given.split_unchanged(6, None, &pages(2))));
    }

    #[test]
    fn runs_begin_with_the_first_page() {
        let set = |pages: &[u32]| pages.iter().copied().collect::<RoaringBitmap>();
        assert_eq!(first_run(&set(&[]), 16), None);
        assert_eq!(first_run(&set(&[7]), 16), Some((7, 1)));
        assert_eq!(first_run(&set(&[3, 4, 5, 7]), 16), Some((3, 3)));
        assert_eq!(first_run(&set(&[3, 4, 5, 7]), 2), Some((3, 2)));
        assert_eq!(first_run(&set(&[3, 4]), 1), Some((3, 1)));
    }
}
