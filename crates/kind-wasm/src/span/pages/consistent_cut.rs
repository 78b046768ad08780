//! The machine's memory at one instant, read while its threads run: the memory in a
//! checkpoint of a machine with several parts.
//!
//! ```text
//!   home                                   member
//!   determines the pages that exist
//!     │─── Prepare ─────────────────────▶│ protects the pages that it owns; a page that
//!     │◀─────────────────────── Prepared ─│ is written meanwhile is protected again later
//!     │            all threads are stopped
//!   no message is in flight ([`super::quiescence`]): the cut
//!     │─── Mark ────────────────────────▶│ protects pages written or received since
//!     │◀───────────────────────── Marked ─│
//!     │            threads go on
//!     │─── More ────────────────────────▶│ may send this many bytes, and move pages again
//!     │◀────────────────────────── pages ─│ as of the cut; for pages unchanged since an
//!     │                                   │ earlier cut, only that ([`page_digests`])
//!     │◀─────────────────────────── Done ─│
//!     │─── End ─────────────────────────▶│
//! ```
//!
//! While no message is in flight each page has exactly one owner, so each page is stored
//! once. A protected page is copied before it is written or moved; the rest is read batch
//! by batch (Li, Naughton and Plank, "Low-Latency, Concurrent Checkpointing for Parallel
//! Programs", 1994). Threads are stopped for two round trips and for protecting the pages
//! written since the preparation. Members send as many bytes as the home has requested,
//! so a slow store fills no memory.

use super::super::messages::{CutMessage, CutPages, CutPiece, PIECE_PAGES_MAX, UnchangedPages};
use super::super::page_digests::{self, PageDigests};
use super::super::wire::PeerMessage;
use super::effects::Effects;
use super::{PAGE, Pages, Shared, SpanError, State, locked};
use keel_wasm::coherence::{Copy, PageId, PartId, PartSet};
use keel_wasm::memory::{MemoryError, PAGE_BYTES, Spanning};
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

/// Pages read while holding the lock once: other users of the lock wait for some
/// microseconds.
const PIECE_PAGES: u32 = 16;
/// Bytes that a member may send ahead of the home's requests.
const AHEAD_BYTES: u32 = 1 << 20;
/// Bytes that a message about unchanged pages counts as.
const SAME_BYTES: u32 = 4096;
/// Pages that one call protects or releases.
const BATCH_PAGES: u32 = 512;
/// The preparation ends when at most this many pages are unprotected.
const UNPROTECTED_PAGES_MAX: u64 = 512;
/// Faults are slowed down while more than this many bytes of copied pages are buffered;
/// at the maximum the cut is given up, because the store is too slow or hangs.
const COPIED_BYTES_SLOW: usize = 32 << 20;
const COPIED_BYTES_MAX: usize = 256 << 20;
/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Owned pages are determined and protected.
    Preparing,
    /// The instant of the cut has passed.
    Marked,
}

/// State of a cut at one part.
#[derive(Debug)]
pub(super) struct CutState {
    number: u64,
    /// Counts the cuts that this part has taken part in; unlike `number` it does not
    /// restart with another home.
    sequence: u64,
    /// An earlier cut whose pages were all read and stored.
    since: Option<u64>,
    stage: Stage,
    /// For each memory, the pages protected for the cut; once marked, those that are not
    /// read yet.
    pages: Vec<RoaringBitmap>,
    /// Before the mark: pages that this part may own and that are not protected yet.
    wanted: Vec<RoaringBitmap>,
    /// At a member: where the scan for owned pages continues; `None` once it is complete.
    scan_position: Option<PageId>,
    /// Old content of pages that changed since.
    copied: VecDeque<CutPages>,
    /// At a member: bytes that the home has requested; whether the member reported that
    /// it is prepared or, once marked, done; whether the cut is over.
    requested_bytes: i64,
    is_done: bool,
    is_over: bool,
    /// Too many pages changed before they were read.
    gave_up: bool,
    /// At the home: the members that have answered, and the elements received.
    prepared: PartSet,
    marked: PartSet,
    done: PartSet,
    received: VecDeque<(PartId, CutPiece)>,
}

impl CutState {
    fn new((number, sequence): (u64, u64), since: Option<u64>, memories: usize) -> Self {
        CutState {
            number,
            sequence,
            since,
            stage: Stage::Preparing,
            pages: vec![RoaringBitmap::new(); memories],
            wanted: vec![RoaringBitmap::new(); memories],
            scan_position: Some(PageId {
                memory: 0,
                number: 0,
            }),
            copied: VecDeque::new(),
            requested_bytes: 0,
            is_done: false,
            is_over: false,
            gave_up: false,
            prepared: PartSet::default(),
            marked: PartSet::default(),
            done: PartSet::default(),
            received: VecDeque::new(),
        }
    }
}

/// Cut state that is read without the lock.
#[derive(Debug, Default)]
pub(super) struct CutStatus {
    /// At the home: number of cuts so far.
    count: AtomicU64,
    /// At a member: number of cuts so far.
    sequence: AtomicU64,
    /// A cut is in progress.
    is_on: AtomicBool,
    copied_bytes: AtomicUsize,
    pub(super) changed: Condvar,
}

impl CutStatus {
    /// Whether the buffered bytes exceed the threshold at which writers wait.
    pub(super) fn are_behind(&self) -> bool {
        self.copied_bytes.load(Ordering::Relaxed) > COPIED_BYTES_SLOW
    }
}

fn failed(error: MemoryError) -> SpanError {
    SpanError::Memory(error.to_string())
}

/// The first run of pages in the set, limited to `most`.
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

/// Runs of the pages in a range that satisfy a predicate.
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

/// Makes those of some pages writable that this part may write.
fn unprotect(
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

    pub(super) fn send_to(&self, to: PartId, message: &PeerMessage) -> Result<(), SpanError> {
        let mut work = Effects::default();
        work.put(to, message)?;
        self.dispatch(Ok(()), work);
        Ok(())
    }

    /// Handles a message about a cut; messages about an earlier cut are ignored.
    ///
    /// # Errors
    /// [`SpanError::Lost`] if the sender may not send it; other errors concern this part.
    pub(super) fn handle_cut_message(
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
            let reason = "it sent a message about a cut that only another part may send".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        self.apply_cut_message(from, number, word)
    }

    fn apply_cut_message(
        &self,
        from: PartId,
        number: u64,
        word: CutMessage,
    ) -> Result<(), SpanError> {
        let mut guard = locked(&self.state);
        let state = &mut *guard;
        if let CutMessage::Prepare { since } = word {
            // An earlier cut may not be released yet.
            while self.release_batch(state)? {}
            let sequence = self.cuts.sequence.fetch_add(1, Ordering::Relaxed);
            let cut_state = CutState::new((number, sequence), since, self.memories.len());
            state.cut_state = Some(cut_state);
            self.cuts.is_on.store(true, Ordering::Release);
        }
        let Some(cut_state) = state.cut_state.as_mut().filter(|it| it.number == number) else {
            return Ok(());
        };
        match word {
            CutMessage::Prepare { .. } => {}
            CutMessage::Prepared => cut_state.prepared = cut_state.prepared.with(from),
            CutMessage::Marked => cut_state.marked = cut_state.marked.with(from),
            CutMessage::Done => cut_state.done = cut_state.done.with(from),
            CutMessage::More(bytes) => {
                cut_state.requested_bytes = cut_state.requested_bytes.saturating_add(bytes.into())
            }
            CutMessage::GaveUp => cut_state.gave_up = true,
            CutMessage::End => cut_state.is_over = true,
            CutMessage::Mark => {
                self.mark(state)?;
                drop(guard);
                let word = CutMessage::Marked;
                self.send_to(from, &PeerMessage::Cut { number, word })?;
            }
        }
        self.cuts.changed.notify_all();
        Ok(())
    }

    /// Handles pages of a cut from a member.
    ///
    /// # Errors
    /// As [`Self::handle_cut_message`].
    pub(super) fn handle_cut_pages(
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
            let reason = "it sent invalid pages of a cut".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        let mut state = locked(&self.state);
        if let Some(cut_state) = state.cut_state.as_mut().filter(|it| it.number == number) {
            cut_state.received.push_back((from, CutPiece::Pages(pages)));
            self.cuts.changed.notify_all();
        }
        Ok(())
    }

    /// As [`Self::handle_cut_pages`], for unchanged pages.
    ///
    /// # Errors
    /// As there.
    pub(super) fn handle_unchanged_pages(
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
        let cut_state = state.cut_state.as_mut().filter(|it| it.number == number);
        let since = cut_state.as_ref().is_none_or(|it| it.since.is_some());
        if !self.is_home() || !can_be || !since {
            let reason = "it sent invalid unchanged pages of a cut".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        if let Some(cut_state) = cut_state {
            cut_state
                .received
                .push_back((from, CutPiece::Unchanged(same)));
            self.cuts.changed.notify_all();
        }
        Ok(())
    }

    /// Ends the cut and the quiescence.
    pub(super) fn end_cut(&self) {
        let mut state = locked(&self.state);
        if let Some(cut_state) = &mut state.cut_state {
            cut_state.is_over = true;
        }
        self.end_quiescence(&mut state);
    }

    /// Marks the cut: all pages that this part owns are protected.
    fn mark(&self, state: &mut State) -> Result<(), SpanError> {
        let is_prepared = state.cut_state.as_ref().map(|it| it.stage) == Some(Stage::Preparing);
        if !is_prepared || state.quiescence.is_none() {
            return Err(SpanError::Inconsistent(
                "a cut was marked before it was prepared".into(),
            ));
        }
        while self.scan_owned_batch(state) {}
        while self.protect_batch(state)? {}
        if let Some(cut_state) = &mut state.cut_state {
            cut_state.stage = Stage::Marked;
            cut_state.is_done = false;
        }
        Ok(())
    }

    /// Scans some of a member's pages for owned ones; false once the scan is complete.
    /// The home determines its pages from its memories.
    fn scan_owned_batch(&self, state: &mut State) -> bool {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let from = cut_state.as_ref().and_then(|it| it.scan_position);
        let (Some(cut_state), Some(from), false) = (cut_state, from, self.is_home()) else {
            return false;
        };
        cut_state.scan_position = None;
        for (count, (page, copy)) in (0..).zip(coherence.entries_from(from)) {
            if count == BATCH_PAGES {
                cut_state.scan_position = Some(page);
                break;
            }
            if let (Copy::Owned | Copy::Modified, Some(wanted)) =
                (copy, cut_state.wanted.get_mut(page.memory as usize))
            {
                wanted.insert(page.number);
            }
        }
        cut_state.scan_position.is_some()
    }

    /// Whether too many pages are unprotected to end the preparation.
    fn has_many_unprotected(&self, state: &State) -> bool {
        let wanted = state.cut_state.iter().flat_map(|it| &it.wanted);
        wanted.map(RoaringBitmap::len).sum::<u64>() > UNPROTECTED_PAGES_MAX
    }

    /// Protects a batch of the remaining pages; false if none remain.
    fn protect_batch(&self, state: &mut State) -> Result<bool, SpanError> {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let Some(cut_state) = cut_state else {
            return Ok(false);
        };
        let all = cut_state.wanted.iter_mut().zip(&mut cut_state.pages);
        for (number, (wanted, pages)) in (0..).zip(all) {
            let Some((first, count)) = first_run(wanted, BATCH_PAGES) else {
                continue;
            };
            wanted.remove_range(first..first + count);
            let memory = self.memory(number)?;
            let owned = |page| {
                let copy = coherence.copy(PageId {
                    memory: number,
                    number: page,
                });
                matches!(copy, Copy::Owned | Copy::Modified)
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

    /// Called before a page changes or leaves, and after it arrives: copies the old
    /// content if the cut still needs it. Before the mark the page is scanned once more.
    pub(super) fn before_change(&self, state: &mut State, page: PageId) -> Result<(), SpanError> {
        if !self.cuts.is_on.load(Ordering::Acquire) {
            return Ok(());
        }
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let Some(cut_state) = cut_state else {
            return Ok(());
        };
        let at = page.memory as usize;
        let Some(pages) = cut_state.pages.get_mut(at) else {
            return Ok(());
        };
        let was_protected = pages.remove(page.number);
        let is_marked = cut_state.stage == Stage::Marked;
        if let (false, Some(wanted)) = (is_marked, cut_state.wanted.get_mut(at)) {
            wanted.insert(page.number);
        }
        if !was_protected {
            return Ok(());
        }
        let memory = self.memory(page.memory)?;
        if is_marked && !cut_state.is_over && !cut_state.gave_up {
            let mut bytes = vec![0; PAGE];
            let at = u64::from(page.number) * PAGE_BYTES;
            memory.memory().read(at, &mut bytes).map_err(failed)?;
            cut_state.copied.push_back(CutPages {
                memory: page.memory,
                first: page.number,
                bytes: bytes.into(),
            });
            let before = self.cuts.copied_bytes.fetch_add(PAGE, Ordering::Relaxed);
            if before >= COPIED_BYTES_MAX {
                cut_state.gave_up = true;
                cut_state.copied.clear();
                self.cuts.copied_bytes.store(0, Ordering::Relaxed);
            }
            self.cuts.changed.notify_all();
        }
        let copy = |number| coherence.copy(PageId { number, ..page });
        unprotect(memory, copy, (page.number, 1))
    }

    /// Called before the host writes to a pinned page.
    pub(super) fn before_host_write(
        &self,
        page: PageId,
        write: impl FnOnce() -> Result<(), MemoryError>,
    ) -> Result<(), SpanError> {
        if self.cuts.is_on.load(Ordering::Acquire) {
            self.before_change(&mut locked(&self.state), page)?;
        }
        write().map_err(failed)?;
        // The first access to the page may be this one, and host accesses cause no fault.
        if self.limits.is_set() {
            let mut state = locked(&self.state);
            let access = state.coherence.access(page);
            if let (Some(keep), Some(access)) = (&mut state.eviction, access)
                && !keep.knows(page)
            {
                keep.arrived(page, access);
            }
        }
        if self.cuts.is_on.load(Ordering::Acquire) {
            // The page may not have existed during the scan. The cut is not marked while
            // this lock is held.
            let mut state = locked(&self.state);
            let preparing = state.cut_state.as_mut();
            let preparing = preparing.filter(|it| it.stage != Stage::Marked);
            let wanted = preparing.and_then(|it| it.wanted.get_mut(page.memory as usize));
            if let Some(wanted) = wanted {
                wanted.insert(page.number);
            }
        }
        Ok(())
    }

    /// Reads a batch of this part's pages as of the cut; `None` if none remain.
    fn read_cut_batch(&self, state: &mut State) -> Result<Option<CutPages>, SpanError> {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let Some(cut_state) = cut_state.as_mut().filter(|it| it.stage == Stage::Marked) else {
            return Ok(None);
        };
        if let Some(copied) = cut_state.copied.pop_front() {
            self.cuts.copied_bytes.fetch_sub(PAGE, Ordering::Relaxed);
            return Ok(Some(copied));
        }
        for (number, pages) in (0..).zip(&mut cut_state.pages) {
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
            unprotect(memory, copy, (first, count))?;
            return Ok(Some(CutPages {
                memory: number,
                first,
                bytes: bytes.into(),
            }));
        }
        Ok(None)
    }

    /// Releases a batch of protected pages that are no longer needed; false once the cut
    /// is over.
    pub(super) fn release_batch(&self, state: &mut State) -> Result<bool, SpanError> {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let pages = cut_state.iter_mut().flat_map(|it| &mut it.pages);
        for (number, pages) in (0..).zip(pages) {
            let Some((first, count)) = first_run(pages, BATCH_PAGES) else {
                continue;
            };
            pages.remove_range(first..first + count);
            let copy = |page| {
                coherence.copy(PageId {
                    memory: number,
                    number: page,
                })
            };
            unprotect(self.memory(number)?, copy, (first, count))?;
            return Ok(true);
        }
        if cut_state.is_none() {
            return Ok(false);
        }
        *cut_state = None;
        self.cuts.copied_bytes.store(0, Ordering::Relaxed);
        self.cuts.is_on.store(false, Ordering::Release);
        // A move of pages may wait for it.
        self.cuts.changed.notify_all();
        Ok(false)
    }

    /// A member's thread that sends the pages of cuts, until the end.
    pub(super) fn send_cuts(&self) {
        let mut history = DigestHistory::default();
        // A home sends none: it reads its own cut.
        while !self.over.load(Ordering::Acquire) && !self.is_home() {
            if let Err(error) = self.send_cut_batch(&mut history) {
                return self.end(error);
            }
        }
    }

    fn send_cut_batch(&self, history: &mut DigestHistory) -> Result<(), SpanError> {
        let mut guard = locked(&self.state);
        let state = &mut *guard;
        let message = match &state.cut_state {
            Some(cut_state) if cut_state.is_over => return self.release_batch(state).map(drop),
            Some(cut_state) if cut_state.gave_up => {
                let (number, word) = (cut_state.number, CutMessage::GaveUp);
                if let Some(cut_state) = &mut state.cut_state {
                    cut_state.is_over = true;
                }
                Some(PeerMessage::Cut { number, word })
            }
            Some(cut_state) if cut_state.stage == Stage::Preparing && !cut_state.is_done => {
                let number = cut_state.number;
                if self.scan_owned_batch(state) || self.has_many_unprotected(state) {
                    return self.protect_batch(state).map(drop);
                }
                if let Some(cut_state) = &mut state.cut_state {
                    cut_state.is_done = true;
                }
                let word = CutMessage::Prepared;
                Some(PeerMessage::Cut { number, word })
            }
            Some(cut_state)
                if cut_state.stage == Stage::Marked
                    && !cut_state.is_done
                    && cut_state.requested_bytes > 0 =>
            {
                let (number, sequence, since) =
                    (cut_state.number, cut_state.sequence, cut_state.since);
                if let Some(pages) = self.read_cut_batch(state)? {
                    drop(guard);
                    return self
                        .send_cut_pieces(number, history.split_unchanged(sequence, since, &pages));
                }
                if let Some(cut_state) = &mut state.cut_state {
                    cut_state.is_done = true;
                }
                history.complete(number, sequence);
                let word = CutMessage::Done;
                Some(PeerMessage::Cut { number, word })
            }
            _ => None,
        };
        match message {
            Some(message) => {
                drop(guard);
                self.send_to(PartId::HOME, &message)
            }
            None => {
                // Ending the cut wakes this thread; a missed wake-up costs a second.
                let rest = super::SLEEP_MAX;
                drop(self.cuts.changed.wait_timeout(guard, rest));
                Ok(())
            }
        }
    }
}

/// Page digests of the cuts that a member has sent.
#[derive(Debug, Default)]
struct DigestHistory {
    /// The last cut that was sent completely, by its number at the home of that time.
    before: Option<(u64, PageDigests)>,
    /// The cut being sent, by its count at this part.
    now: Option<(u64, PageDigests)>,
}

impl DigestHistory {
    /// Splits pages into those unchanged since an earlier cut and the others.
    fn split_unchanged(
        &mut self,
        sequence: u64,
        since: Option<u64>,
        pages: &CutPages,
    ) -> Vec<CutPiece> {
        self.before.take_if(|(number, _)| since != Some(*number));
        let (_, now) = match self.now.take_if(|(now, _)| *now == sequence) {
            Some(now) => self.now.insert(now),
            None => self.now.insert((sequence, PageDigests::default())),
        };
        let before = self.before.as_ref().map(|(_, known)| known);
        page_digests::split_unchanged(pages, |memory, number, hash| {
            now.put(memory, number, hash);
            before.is_some_and(|it| it.get(memory, number) == Some(hash))
        })
    }

    /// Records that a cut was sent completely.
    fn complete(&mut self, number: u64, sequence: u64) {
        let now = self.now.take();
        // The member may have had no pages.
        let known = now.filter(|(now, _)| *now == sequence);
        let known = known.map_or_else(PageDigests::default, |(_, known)| known);
        self.before = Some((number, known));
    }
}

impl Shared {
    fn send_cut_pieces(&self, number: u64, pieces: Vec<CutPiece>) -> Result<(), SpanError> {
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
            let cut_state = state.cut_state.as_mut().filter(|it| it.number == number);
            if let Some(cut_state) = cut_state {
                cut_state.requested_bytes -= bytes as i64;
            }
        }
        for message in parcels {
            self.send_to(PartId::HOME, &message)?;
        }
        Ok(())
    }
}

/// A cut through the memory of a machine, at its home. Dropping it ends the cut; pages
/// that were not read are then unavailable.
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
    /// Creates a cut with nothing prepared.
    fn open_cut(&self, since: Option<u64>) -> Result<Cut, SpanError> {
        let shared = self.shared.clone();
        let number = shared.cuts.count.fetch_add(1, Ordering::Relaxed) + 1;
        {
            let mut state = locked(&shared.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let leave = state.coherence.has_leaving_parts();
            let is_taken = state.cut_state.is_some() || state.quiescence.is_some();
            if is_taken || leave || !shared.is_home() {
                return Err(SpanError::CutUnavailable);
            }
            let cut_state = CutState::new((number, 0), since, shared.memories.len());
            state.cut_state = Some(cut_state);
            shared.cuts.is_on.store(true, Ordering::Release);
        }
        Ok(Cut { shared, number })
    }

    /// Prepares a cut while threads run: determines the pages of all parts and protects
    /// them. Called at the home; one cut at a time. For pages that members sent at the
    /// cut `since` ([`Cut::number`]), all of which was read, they report only that they
    /// are unchanged, where that is so.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::CutUnavailable`] if a cut is in progress or parts
    /// leave; [`SpanError::NotQuiescent`] at the deadline.
    pub fn prepare_cut(&self, since: Option<u64>, patience: Duration) -> Result<Cut, SpanError> {
        let cut = self.open_cut(since)?;
        for (at, memory) in cut.shared.memories.iter().enumerate() {
            // Takes long; pages that appear meanwhile are recorded.
            let here = memory.memory().populated().map_err(failed)?;
            let mut guard = locked(&cut.shared.state);
            let State {
                cut_state, woken, ..
            } = &mut *guard;
            let wanted = cut_state.as_mut().and_then(|it| it.wanted.get_mut(at));
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
            if !cut.shared.has_many_unprotected(state) || !cut.shared.protect_batch(state)? {
                break;
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
        }
        let others = cut.shared.peers.count();
        cut.await_all(deadline, patience, |cut_state| {
            cut_state.prepared.len() == others
        })?;
        Ok(cut)
    }
}

impl Cut {
    /// Its number among all cuts.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Marks the instant of the cut. All threads must be stopped and the host must not
    /// write; both may go on when this returns.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] at the deadline. There is no cut then.
    pub fn mark(&self, patience: Duration) -> Result<(), SpanError> {
        let shared = &self.shared;
        let deadline = Instant::now() + patience;
        // No page may move before all parts have marked: it could be missed at both.
        let settled = shared.quiesce(patience)?;
        self.tell_all(CutMessage::Mark)?;
        shared.mark(&mut locked(&shared.state))?;
        let others = shared.peers.count();
        self.await_all(deadline, patience, |cut_state| {
            cut_state.marked.len() == others
        })?;
        drop(settled);
        self.tell_all(CutMessage::More(AHEAD_BYTES))
    }

    fn tell_all(&self, word: CutMessage) -> Result<(), SpanError> {
        let number = self.number;
        for part in self.shared.peers.parts().iter() {
            self.shared
                .send_to(part, &PeerMessage::Cut { number, word })?;
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
            match &state.cut_state {
                Some(cut_state) if is_so(cut_state) => return Ok(()),
                Some(_) if Instant::now() < deadline => {}
                Some(_) => return Err(SpanError::NotQuiescent { patience }),
                None => return Err(SpanError::Ended),
            }
            drop(self.shared.cuts.changed.wait_timeout(state, POLL_INTERVAL));
        }
    }

    /// The next pages of the machine as of the cut, each once; `None` at the end. Pages
    /// that never appear are zero. This part's own pages are always sent with content.
    ///
    /// # Errors
    /// [`SpanError`]; [`SpanError::NotQuiescent`] if nothing arrives in time,
    /// [`SpanError::CutTooSlow`] if too many pages changed before they were read.
    pub fn next(&self, patience: Duration) -> Result<Option<CutPiece>, SpanError> {
        let shared = &self.shared;
        let deadline = Instant::now() + patience;
        loop {
            let mut guard = locked(&shared.state);
            if let Some(failure) = &guard.failure {
                return Err(failure.clone());
            }
            let state = &mut *guard;
            let Some(cut_state) = &mut state.cut_state else {
                return Err(SpanError::Ended);
            };
            if cut_state.gave_up {
                return Err(SpanError::CutTooSlow);
            }
            if let Some((from, piece)) = cut_state.received.pop_front() {
                drop(guard);
                let more = match &piece {
                    CutPiece::Pages(pages) => {
                        u32::try_from(pages.bytes.len()).unwrap_or(AHEAD_BYTES)
                    }
                    CutPiece::Unchanged(_) => SAME_BYTES,
                };
                let (number, word) = (self.number, CutMessage::More(more));
                shared.send_to(from, &PeerMessage::Cut { number, word })?;
                return Ok(Some(piece));
            }
            if let Some(pages) = shared.read_cut_batch(state)? {
                return Ok(Some(CutPiece::Pages(pages)));
            }
            let others = shared.peers.count();
            let done = state
                .cut_state
                .as_ref()
                .map(|cut_state| cut_state.done.len());
            if done == Some(others) {
                return Ok(None);
            }
            if Instant::now() >= deadline {
                return Err(SpanError::NotQuiescent { patience });
            }
            drop(shared.cuts.changed.wait_timeout(guard, POLL_INTERVAL * 50));
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
                && self.shared.release_batch(&mut locked(&self.shared.state))?
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

    /// An abandoned cut leaves nothing behind, even if the next cut, of another home, has
    /// the same number.
    #[test]
    fn digests_belong_to_one_cut() {
        let pages = |byte: u8| CutPages {
            memory: 0,
            first: 7,
            bytes: vec![byte; PAGE].into(),
        };
        let is_same = |pieces: Vec<CutPiece>| matches!(pieces[..], [CutPiece::Unchanged(_)]);
        let mut history = DigestHistory::default();
        assert!(!is_same(history.split_unchanged(0, None, &pages(1))));
        // The first cut of another home, which takes the page from another part.
        history.complete(1, 1);
        assert!(!is_same(history.split_unchanged(2, Some(1), &pages(1))));
        history.complete(2, 2);
        // Only the previous cut counts.
        assert!(is_same(history.split_unchanged(3, Some(2), &pages(1))));
        history.complete(3, 3);
        assert!(!is_same(history.split_unchanged(4, Some(2), &pages(1))));
        history.complete(4, 4);
        assert!(!is_same(history.split_unchanged(5, Some(4), &pages(2))));
        assert!(!is_same(history.split_unchanged(6, None, &pages(2))));
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
