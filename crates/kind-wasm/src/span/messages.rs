//! What parts tell each other about a machine's pages, besides the messages of the coherence
//! protocol: about their memory, quiescence, consistent cuts, and the home's queries.
//!
//! `wire` encodes them; `pages` sends and handles them.

use super::false_sharing::FaultFootprint;
use super::idle_pages::IdleRange;
use bytes::Bytes;
use keel_wasm::coherence::{PageId, PartId, Placement, Traffic};
use keel_wasm::memory::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::ops::Range;

const PAGE: usize = PAGE_BYTES as usize;
/// The most pages of a cut in one message.
pub(super) const PIECE_PAGES_MAX: usize = 64;
/// Pages examined for one answer: about a millisecond.
pub(super) const EXAMINED_MAX: usize = 8192;

/// Memory of a machine at one part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartMemory {
    /// Resident bytes, with read copies.
    pub resident_bytes: u64,
    /// The limit, which is exceeded where no other part has room; `None` for no limit.
    pub limit_bytes: Option<u64>,
    /// Bytes moved away so far because of the limit.
    pub given_bytes: u64,
    /// Bytes of read copies dropped for the same reason.
    pub dropped_bytes: u64,
}

/// Messages about quiescence between home and members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum QuiescenceMessage {
    /// To members: all threads are stopped.
    Begin,
    /// To the home: no transaction is in progress at this part, whose message counts
    /// these are.
    Quiet(Traffic),
    /// To members: threads go on.
    Over,
}

/// Messages about a cut between home and members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CutMessage {
    /// To members: a cut is prepared. Pages that they sent at the earlier cut `since` and
    /// that are unchanged need not be sent again.
    Prepare { since: Option<u64> },
    /// To the home: almost all owned pages are protected.
    Prepared,
    /// To members: this is the instant of the cut; no message is in flight.
    Mark,
    /// To the home: the cut is marked.
    Marked,
    /// To members: this many further bytes may be sent; all parts have marked.
    More(u32),
    /// To the home: all pages were sent.
    Done,
    /// To the home: too many pages changed before they were requested.
    GaveUp,
    /// To members: the cut is over; pages not sent are not needed.
    End,
}

/// A run of pages as of a cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutPages {
    pub memory: u32,
    /// Number of the first page.
    pub first: u32,
    /// Content of whole pages.
    pub bytes: Bytes,
}

/// A run of pages that are unchanged since the previous cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnchangedPages {
    pub memory: u32,
    /// Number of the first page.
    pub first: u32,
    pub pages: u32,
    /// Digest over the hashes of the pages: a receiver with other content detects the
    /// difference.
    pub digest: u128,
}

/// An element of a cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CutPiece {
    /// Content as of the cut.
    Pages(CutPages),
    /// Unchanged since the previous cut.
    Unchanged(UnchangedPages),
}

impl CutPages {
    /// Whether the content has a valid length for one message.
    pub(super) fn is_whole(&self) -> bool {
        let pages = self.bytes.len() / PAGE;
        self.bytes.len().is_multiple_of(PAGE) && (1..=PIECE_PAGES_MAX).contains(&pages)
    }
}

/// A query of the home about a part's directory or its threads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Question {
    /// Placements of pages, from this page on.
    Placements(PageId),
    /// The first page of a range, of [`EXAMINED_MAX`] at most, that is in transit to a part
    /// or whose directory is elsewhere.
    InTransit {
        memory: u32,
        /// Numbers of the pages.
        pages: Range<u32>,
        to: PartId,
    },
    /// Pages that the part's threads waited for, from this page on.
    FaultWaits(PageId),
    /// Idle ranges of the part, from a byte of a memory on.
    Idle(u32, u64),
}

/// An answer to a query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// The placements, and the page to continue from.
    Placements(Vec<Placement>, Option<PageId>),
    /// The page; `None` if there is none.
    InTransit(Option<u32>),
    /// The pages with the accesses that waited, and the page to continue from.
    FaultWaits(Vec<(PageId, FaultFootprint)>, Option<PageId>),
    /// The ranges, and where to continue.
    Idle(Vec<IdleRange>, Option<(u32, u64)>),
}
