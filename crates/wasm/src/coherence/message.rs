//! What the parts of a machine say to each other of its pages. Each is said under the
//! machine's epoch, which whoever carries it checks; a page's bytes go beside
//! [`Message::Data`].

use super::{Access, PageId, PartId, PartSet, Segment};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Holders {
    /// One part, which may write it.
    Owner(PartId),
    /// Several, which may read it. Some of them may have dropped it.
    Readers {
        /// The one that has it for sure.
        owner: PartId,
        /// All, with the keeper.
        readers: PartSet,
    },
}

/// What is wanted of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Request {
    /// A part wants to use the page.
    Want {
        part: PartId,
        access: Access,
        /// Whether it has a copy, and keeps it until it is answered or told to give it up.
        has: bool,
    },
    /// The page is to be at a part.
    Move { to: PartId },
    /// A part is to have no copy any more.
    Forget {
        part: PartId,
        /// Who gets the page if nobody else has it.
        to: PartId,
    },
}

/// A page, as its next directory gets it: its last transaction, who holds it, what is
/// wanted of it.
pub type PageEntry = (PageId, u64, Holders, Vec<Request>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Txn {
    /// Its number, which rises for each page.
    pub number: u64,
    /// Who is told of its end.
    pub directory: PartId,
    /// Whether who gets the page has asked for it.
    pub is_answer: bool,
}

/// What a part says to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message {
    /// To the directory: the sender wants to use a page.
    Want {
        page: PageId,
        access: Access,
        /// As in [`Request::Want`].
        has: bool,
    },
    /// To the directory: pages in a row are to be at a part.
    Move {
        /// The first.
        page: PageId,
        /// How many they are, [`RUN_PAGES_MAX`] at most.
        pages: u32,
        to: PartId,
    },
    /// To the next directory: what was asked of the one before.
    Forward { page: PageId, request: Request },
    /// From the directory to who holds a page, or some in a row: send it to another part.
    Fetch {
        /// The first page.
        page: PageId,
        /// That page's transaction.
        txn: Txn,
        to: PartId,
        /// What for: to be written, the sender keeps no copy.
        access: Access,
        /// How many [`Message::Ack`] that part gets from others.
        acks: u8,
        /// Numbers of the transactions of the pages that follow; all else is as of the first.
        more: Vec<u64>,
    },
    /// From the directory to a reader: give the copy up, and tell who writes.
    Invalidate {
        page: PageId,
        /// Number of the page's transaction.
        number: u64,
        to: PartId,
    },
    /// From the directory: the copy that is there is right.
    Grant {
        page: PageId,
        txn: Txn,
        access: Access,
        /// How many [`Message::Ack`] come from others.
        acks: u8,
    },
    /// From who holds it: the page, or some in a row.
    Data {
        /// The first page.
        page: PageId,
        /// That page's transaction.
        txn: Txn,
        access: Access,
        /// How many [`Message::Ack`] come from others.
        acks: u8,
        /// As in [`Message::Fetch`].
        more: Vec<u64>,
    },
    /// From a reader: it has no copy any more.
    Ack {
        page: PageId,
        /// Number of the page's transaction.
        number: u64,
    },
    /// To the directory: the transaction is over, of a page, or each of some in a row.
    Done {
        /// The first page.
        page: PageId,
        /// Number of that page's transaction.
        number: u64,
        /// As in [`Message::Fetch`].
        more: Vec<u64>,
    },
    /// To the next directory of a segment: all that is known of it. Pages that are not
    /// named are where they were when the machine began to span.
    Segment {
        segment: Segment,
        /// How often its directory has changed.
        version: u64,
        pages: Vec<PageEntry>,
    },
    /// To a segment's directory: another part is to be it.
    Hand { segment: Segment, to: PartId },
    /// From the home: all segments of which a part is the directory go home.
    Gather,
    /// From a segment's directory to all others, and to who asked another part, or has come.
    SegmentAt {
        segment: Segment,
        /// How often its directory has changed.
        version: u64,
    },
}

impl Message {
    /// The segment that it speaks of.
    pub fn segment(&self) -> Option<Segment> {
        match self {
            Message::Segment { segment, .. }
            | Message::Hand { segment, .. }
            | Message::SegmentAt { segment, .. } => Some(*segment),
            _ => None,
        }
    }

    /// The pages in a row that it speaks of: the first, and how many.
    pub fn run(&self) -> Option<(PageId, usize)> {
        match self {
            Message::Want { page, .. }
            | Message::Forward { page, .. }
            | Message::Invalidate { page, .. }
            | Message::Grant { page, .. }
            | Message::Ack { page, .. } => Some((*page, 1)),
            Message::Move { page, pages, .. } => Some((*page, *pages as usize)),
            Message::Fetch { page, more, .. }
            | Message::Data { page, more, .. }
            | Message::Done { page, more, .. } => Some((*page, 1 + more.len())),
            Message::Segment { .. }
            | Message::Hand { .. }
            | Message::Gather
            | Message::SegmentAt { .. } => None,
        }
    }

    /// The pages that it speaks of; of a row the first and the last.
    pub fn pages(&self) -> impl Iterator<Item = PageId> {
        let row = self.run().map(|(first, count)| {
            let behind = u32::try_from(count.saturating_sub(1)).unwrap_or(u32::MAX);
            let number = first.number.saturating_add(behind);
            [first, PageId { number, ..first }]
        });
        let pages = match self {
            Message::Segment { pages, .. } => &pages[..],
            _ => &[][..],
        };
        let row = row.into_iter().flatten();
        row.chain(pages.iter().map(|(page, ..)| *page))
    }
}

/// The most pages of which is spoken as of a row.
pub const RUN_PAGES_MAX: usize = 1024;
