//! Messages between the parts of a machine about its pages. The transport carries and checks the
//! machine's epoch, and transfers the bytes of pages with [`Message::Data`].

use super::{Access, PageId, PartId, PartSet, Segment};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Holders {
    /// One part, with write access.
    Owner(PartId),
    /// Several parts, with read access. Some may have dropped their copy.
    Readers {
        /// The part that certainly has a copy, and supplies it.
        owner: PartId,
        /// All of them, the owner included.
        readers: PartSet,
    },
}

/// A request to a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Request {
    /// A part requests access to the page.
    Want {
        part: PartId,
        access: Access,
        /// Whether it has a copy, which it keeps until the answer or an invalidation.
        has: bool,
    },
    /// Moves the page to a part.
    Move { to: PartId },
    /// Removes the copy of a part.
    Forget {
        part: PartId,
        /// Receives the page if no other part has it.
        to: PartId,
    },
}

/// State of a page for its next directory: last transaction, holders, queued requests.
pub type PageEntry = (PageId, u64, Holders, Vec<Request>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Txn {
    /// Increases for each page.
    pub number: u64,
    /// The directory, which is informed of its end.
    pub directory: PartId,
    /// Whether the receiver has requested the page.
    pub is_answer: bool,
}

/// A message from one part to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message {
    /// To the directory: the sender requests access to a page.
    Want {
        page: PageId,
        access: Access,
        /// As in [`Request::Want`].
        has: bool,
    },
    /// To the directory: move a run of pages to a part.
    Move {
        /// The first.
        page: PageId,
        /// How many they are, [`RUN_PAGES_MAX`] at most.
        pages: u32,
        to: PartId,
    },
    /// To the next directory: a request sent to the previous one.
    Forward { page: PageId, request: Request },
    /// From the directory to a holder of a page or a run: send it to another part.
    Fetch {
        /// The first page.
        page: PageId,
        /// That page's transaction.
        txn: Txn,
        to: PartId,
        /// Write: the sender keeps no copy.
        access: Access,
        /// Number of [`Message::Ack`] that the receiver gets from others.
        acks: u8,
        /// Transaction numbers of the following pages; all else is as for the first.
        more: Vec<u64>,
    },
    /// From the directory to a reader: drop the copy, and acknowledge to the writer.
    Invalidate {
        page: PageId,
        /// Number of the page's transaction.
        number: u64,
        to: PartId,
    },
    /// From the directory: the present copy is valid for this access.
    Grant {
        page: PageId,
        txn: Txn,
        access: Access,
        /// Number of [`Message::Ack`] from others.
        acks: u8,
    },
    /// From a holder: a page or a run.
    Data {
        /// The first page.
        page: PageId,
        /// That page's transaction.
        txn: Txn,
        access: Access,
        /// Number of [`Message::Ack`] from others.
        acks: u8,
        /// As in [`Message::Fetch`].
        more: Vec<u64>,
    },
    /// From a reader: its copy is dropped.
    Ack {
        page: PageId,
        /// Number of the page's transaction.
        number: u64,
    },
    /// To the directory: the transaction of a page, or of each page of a run, is complete.
    Done {
        /// The first page.
        page: PageId,
        /// Number of that page's transaction.
        number: u64,
        /// As in [`Message::Fetch`].
        more: Vec<u64>,
    },
    /// To the next directory of a segment: its complete state. Omitted pages are in their initial
    /// place.
    Segment {
        segment: Segment,
        /// Number of times that its directory changed.
        version: u64,
        pages: Vec<PageEntry>,
    },
    /// To a segment's directory: hand it over to another part.
    Hand { segment: Segment, to: PartId },
    /// From the home: all segments of a part return to the home.
    Gather,
    /// From a segment's directory to all others: its new location. Also to requesters that used a
    /// stale location, and to new parts.
    SegmentAt {
        segment: Segment,
        /// Number of times that its directory changed.
        version: u64,
    },
}

impl Message {
    /// The segment concerned.
    pub fn segment(&self) -> Option<Segment> {
        match self {
            Message::Segment { segment, .. }
            | Message::Hand { segment, .. }
            | Message::SegmentAt { segment, .. } => Some(*segment),
            _ => None,
        }
    }

    /// The run of pages concerned: the first, and their number.
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

    /// The pages concerned; of a run the first and the last.
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

/// Maximum pages of a run in one message.
pub const RUN_PAGES_MAX: usize = 1024;
