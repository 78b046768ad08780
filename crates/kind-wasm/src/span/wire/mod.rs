//! The messages between the parts of a machine and their encoding: frames of their own
//! class over TLS with pinned certificates.
//!
//! ```text
//!   dialling part                               listening part
//!     │ HELLO (version, machine, epoch, from, to)  │
//!     │ MESSAGES, PAGES, NOTE … ──────────────────▶│      one way only
//! ```
//!
//! MESSAGES has one or more messages about pages; PAGES has a run of pages, without zero
//! pages, followed by the message about them. A NOTE is a message about threads between
//! home and members ([`keel_wasm::runtime::parts`]), of any length: all pieces but the
//! last are BEGUN frames, and other frames may come between them. MEMORY reports the
//! memory of a part. LIMIT, from the home, sets the limit of parts; GONE, from the home
//! too, removes a part. SUCCEEDED announces a new home. QUIESCENCE is about quiescence, ASK
//! and ANSWER (to and from members) about directories. CUT, CUT_PAGES and UNCHANGED_PAGES are
//! about a consistent cut ([`super::pages::Cut`]). TIME is the first frame of each batch:
//! the guest's clock at the sender, so that no part's clock is behind a message that it
//! has received (Lamport, "Time, Clocks, and the Ordering of Events in a Distributed
//! System", 1978). GOODBYE is the last message of a part that cannot go on: it names the
//! part to blame and the reason, because the parts will lose each other a moment later.
//!
//! Of two parts each dials the other, so that no connection is read and written by the
//! same thread. A connection belongs to an epoch, that of the machine when it was made: a
//! hello with another epoch is refused.
//!
//! Versions: that of the frame is the envelope's, [`VERSION`] that of the messages.
//!
//! - `frame_writer`: encodes messages into batches of frames
//! - `frame_reader`: decodes messages from received bytes
//!
//! The messages, and the kinds of frames, are in this file.

mod frame_reader;
mod frame_writer;
#[cfg(test)]
mod tests;

pub(super) use frame_reader::FrameReader;
pub(super) use frame_writer::{FrameWriter, encode, encode_hello, recycle};

use super::messages::{
    Answer, CutMessage, CutPages, PartMemory, Question, QuiescenceMessage, UnchangedPages,
};
use bytes::Bytes;
use keel_cluster::{Epoch, MachineName};
use keel_net::frame::{Class, FrameError};
use keel_wasm::coherence::{Message, PartId};
use keel_wasm::memory::PAGE_BYTES;
use serde::{Deserialize, Serialize};

/// Version of these messages.
pub(super) const VERSION: u32 = 10;
/// The largest message has the pages of a directory segment.
const CLASS: Class = Class {
    magic: u32::from_le_bytes(*b"KSPN"),
    version: 1,
    payload_bytes_max: 1 << 20,
};
const KIND_HELLO: u16 = 1;
const KIND_MESSAGES: u16 = 2;
const KIND_PAGES: u16 = 3;
const KIND_BEGUN: u16 = 4;
const KIND_NOTE: u16 = 5;
const KIND_GOODBYE: u16 = 6;
const KIND_MEMORY: u16 = 7;
const KIND_LIMIT: u16 = 8;
const KIND_TIME: u16 = 9;
const KIND_CUT: u16 = 10;
const KIND_CUT_PAGES: u16 = 11;
const KIND_GONE: u16 = 12;
const KIND_SUCCEEDED: u16 = 13;
const KIND_QUIESCENCE: u16 = 14;
const KIND_ASK: u16 = 15;
const KIND_ANSWER: u16 = 16;
const KIND_UNCHANGED_PAGES: u16 = 17;
/// The longest note: a thread with the deepest permitted stack.
const NOTE_BYTES_MAX: usize = 512 << 20;
const PAGE: usize = PAGE_BYTES as usize;

/// The first message on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the messages.
    pub(super) version: u32,
    pub machine: MachineName,
    /// The epoch under which it spans these parts.
    pub epoch: Epoch,
    /// The part that dials.
    pub from: PartId,
    /// The part that is dialled.
    pub to: PartId,
}

impl Hello {
    /// A hello of one part to another.
    pub fn new(machine: MachineName, epoch: Epoch, from: PartId, to: PartId) -> Self {
        Hello {
            version: VERSION,
            machine,
            epoch,
            from,
            to,
        }
    }
}

/// A run of pages that accompanies a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PageBytes {
    /// Content of the pages that are not zero.
    bytes: Bytes,
    /// Zero pages, as a bit set.
    zeros: u64,
    pages: usize,
}

/// The longest run of pages.
pub(super) const ROW_PAGES_MAX: usize = 64;

impl PageBytes {
    pub(super) fn pages(&self) -> usize {
        self.pages
    }

    fn is_zero(&self, at: usize) -> bool {
        self.zeros & 1 << at != 0
    }

    /// Offset of a page's content, were it not zero.
    fn start(&self, at: usize) -> usize {
        let zeros_before = self.zeros & ((1 << at) - 1);
        (at - zeros_before.count_ones() as usize) * PAGE
    }

    /// One page of the run.
    pub(super) fn page(&self, at: usize) -> PageBytes {
        let (start, is_zero) = (self.start(at), self.is_zero(at));
        let length = if is_zero { 0 } else { PAGE };
        PageBytes {
            bytes: self.bytes.slice(start..start + length),
            zeros: u64::from(is_zero),
            pages: 1,
        }
    }

    /// Sub-runs that are zero or not, with their lengths and contents.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (usize, Option<&[u8]>)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (first, is_zero) = (at, self.is_zero(at.min(ROW_PAGES_MAX - 1)));
            while at < self.pages && self.is_zero(at) == is_zero {
                at += 1;
            }
            let count = at - first;
            let start = self.start(first.min(ROW_PAGES_MAX - 1));
            let bytes = (!is_zero).then(|| self.bytes.get(start..start + count * PAGE));
            (count > 0).then(|| (count, bytes.flatten()))
        })
    }
}

/// A message on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PeerMessage {
    Coherence(Message),
    /// [`Message::Data`] and its pages.
    Pages(Message, PageBytes),
    /// A message about threads.
    Note(Vec<u8>),
    /// The memory of the sending part.
    Memory(PartMemory),
    /// The guest's clock at the sender, in nanoseconds.
    Time(u64),
    /// From the home: the limit of a part, in bytes.
    Limit(Option<u64>),
    /// A message about a consistent cut.
    Cut {
        /// Number of the cut.
        number: u64,
        word: CutMessage,
    },
    /// A message about quiescence.
    Quiescence {
        /// Number of the quiescence.
        number: u64,
        word: QuiescenceMessage,
    },
    /// From the home: a numbered query.
    Ask(u64, Question),
    /// To the home: the answer to that query.
    Answer(u64, Answer),
    /// To the home: pages as of a cut.
    CutPages {
        /// Number of the cut.
        number: u64,
        pages: CutPages,
    },
    /// To the home: pages that are unchanged since the previous cut.
    UnchangedPages(u64, UnchangedPages),
    /// From the home: a part has left; possibly the receiver.
    Gone(PartId),
    /// The sender is the home from now on; sent to the new home, an acknowledgement.
    Succeeded,
    /// The sender cannot go on.
    Goodbye {
        /// The part to blame.
        part: PartId,
        reason: String,
    },
}

/// Why received bytes are invalid.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame's payload cannot be decoded.
    #[error("a message cannot be decoded ({0})")]
    Message(#[from] postcard::Error),
    /// A message without its pages, or pages without a message.
    #[error("a page does not match its message")]
    Page,
    /// A TIME frame of another length.
    #[error("a time that does not have 8 bytes")]
    Time,
    /// A note longer than that of the largest thread.
    #[error("a note of more than {NOTE_BYTES_MAX} bytes")]
    Long,
    /// The first frame is not a hello.
    #[error("the first frame is not a hello")]
    Nameless,
    /// An unknown kind of frame.
    #[error("frames of kind {0} are unknown")]
    Kind(u16),
}

/// The number of pages that accompany a message.
fn pages_with(message: &Message) -> Result<usize, WireError> {
    match (message, message.run()) {
        (Message::Data { .. }, Some((_, count))) if count <= ROW_PAGES_MAX => Ok(count),
        _ => Err(WireError::Page),
    }
}
