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
//!
//! - `protection`: the pages of a part that a cut needs
//! - `home`: the home's side
//! - `member`: the member's side
//!
//! The state of a cut at one part, and its messages, are in this file.

mod home;
mod member;
mod protection;

use super::super::messages::{CutMessage, CutPages, CutPiece};
use super::super::wire::PeerMessage;
use super::effects::Effects;
use super::{Shared, SpanError, State, locked};
use keel_wasm::coherence::{PageId, PartId, PartSet};
use keel_wasm::memory::MemoryError;
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar};

/// Bytes that a message about unchanged pages counts as.
const SAME_BYTES: u32 = 4096;
/// Faults are slowed down while more than this many bytes of copied pages are buffered;
/// at the maximum the cut is given up, because the store is too slow or hangs.
const COPIED_BYTES_SLOW: usize = 32 << 20;
const COPIED_BYTES_MAX: usize = 256 << 20;

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
