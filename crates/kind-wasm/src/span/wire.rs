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

use super::messages::{
    Answer, CutMessage, CutPages, PartMemory, Question, QuiescenceMessage, UnchangedPages,
};
use bytes::{Buf, Bytes, BytesMut};
use keel_cluster::{Epoch, MachineName};
use keel_net::frame::{Class, Decoder, FrameError, HEADER_BYTES, Header};
use keel_wasm::coherence::{Message, PartId};
use keel_wasm::memory::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

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
/// Bytes of a note per frame, so that pages need not wait for long notes.
const PIECE_BYTES: usize = 128 << 10;
/// The longest note: a thread with the deepest permitted stack.
const NOTE_BYTES_MAX: usize = 512 << 20;
const PAGE: usize = PAGE_BYTES as usize;
/// Bytes of messages in one frame; the last message may exceed it.
const MESSAGES_BYTES: usize = 32 << 10;
/// Chunk that pages are compared with.
const ZEROS: [u8; 128] = [0; 128];

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

/// Encodes the first frame.
///
/// # Errors
/// [`WireError`]; does not occur for a hello from [`Hello::new`].
pub(super) fn encode_hello(hello: &Hello) -> Result<Vec<u8>, WireError> {
    let mut frame = Vec::new();
    frame_of(KIND_HELLO, &postcard::to_stdvec(hello)?, &[], &mut frame)?;
    Ok(frame)
}

/// Appends a frame.
///
/// # Errors
/// [`WireError`] if the frame would be too long; nothing is appended then.
pub(super) fn encode(parcel: &PeerMessage, frames: &mut Vec<u8>) -> Result<(), WireError> {
    match parcel {
        PeerMessage::Coherence(message) => {
            frame_of(KIND_MESSAGES, &postcard::to_stdvec(message)?, &[], frames)
        }
        PeerMessage::Pages(message, pages) => {
            let read = |_: usize, frames: &mut Vec<u8>| {
                for (count, bytes) in pages.pieces() {
                    match bytes {
                        Some(bytes) => frames.extend_from_slice(bytes),
                        None => frames.resize(frames.len() + count * PAGE, 0),
                    }
                }
                Ok::<(), WireError>(())
            };
            encode_pages(message, frames, read)
        }
        PeerMessage::Note(note) => encode_note(note, frames),
        PeerMessage::Time(guest_ns) => frame_of(KIND_TIME, &guest_ns.to_le_bytes(), &[], frames),
        PeerMessage::Memory(memory) => {
            frame_of(KIND_MEMORY, &postcard::to_stdvec(memory)?, &[], frames)
        }
        PeerMessage::Limit(limit) => {
            frame_of(KIND_LIMIT, &postcard::to_stdvec(limit)?, &[], frames)
        }
        PeerMessage::Cut { number, word } => {
            let payload = postcard::to_stdvec(&(number, word))?;
            frame_of(KIND_CUT, &payload, &[], frames)
        }
        PeerMessage::Quiescence { number, word } => {
            let payload = postcard::to_stdvec(&(number, word))?;
            frame_of(KIND_QUIESCENCE, &payload, &[], frames)
        }
        PeerMessage::Ask(number, question) => {
            let payload = postcard::to_stdvec(&(number, question))?;
            frame_of(KIND_ASK, &payload, &[], frames)
        }
        PeerMessage::Answer(number, answer) => {
            let payload = postcard::to_stdvec(&(number, answer))?;
            frame_of(KIND_ANSWER, &payload, &[], frames)
        }
        PeerMessage::CutPages { number, pages } => {
            let which = postcard::to_stdvec(&(number, pages.memory, pages.first))?;
            frame_of(KIND_CUT_PAGES, &which, &pages.bytes, frames)
        }
        PeerMessage::UnchangedPages(number, same) => {
            let payload = postcard::to_stdvec(&(number, same))?;
            frame_of(KIND_UNCHANGED_PAGES, &payload, &[], frames)
        }
        PeerMessage::Gone(part) => frame_of(KIND_GONE, &postcard::to_stdvec(part)?, &[], frames),
        PeerMessage::Succeeded => frame_of(KIND_SUCCEEDED, &[], &[], frames),
        PeerMessage::Goodbye { part, reason } => {
            let payload = postcard::to_stdvec(&(part, reason))?;
            frame_of(KIND_GOODBYE, &payload, &[], frames)
        }
    }
}

/// As [`encode`], for a note.
///
/// # Errors
/// As there; [`WireError::Long`].
pub(super) fn encode_note(note: &[u8], frames: &mut Vec<u8>) -> Result<(), WireError> {
    if note.len() > NOTE_BYTES_MAX {
        return Err(WireError::Long);
    }
    let mut rest = note;
    while let Some((piece, after)) = rest.split_at_checked(PIECE_BYTES)
        && !after.is_empty()
    {
        frame_of(KIND_BEGUN, &[], piece, frames)?;
        rest = after;
    }
    frame_of(KIND_NOTE, &[], rest, frames)
}

/// Appends a run of pages and their message, [`Message::Data`]. `read` appends the
/// content of this many pages.
///
/// # Errors
/// [`WireError`], or that of `read`; nothing is appended then.
pub(super) fn encode_pages<E: From<WireError>>(
    message: &Message,
    frames: &mut Vec<u8>,
    read: impl FnOnce(usize, &mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let start = frames.len();
    let put = put_pages(message, frames, read);
    if put.is_err() {
        frames.truncate(start);
    }
    put
}

/// The number of pages that accompany a message.
fn pages_with(message: &Message) -> Result<usize, WireError> {
    match (message, message.run()) {
        (Message::Data { .. }, Some((_, count))) if count <= ROW_PAGES_MAX => Ok(count),
        _ => Err(WireError::Page),
    }
}

fn put_pages<E: From<WireError>>(
    message: &Message,
    frames: &mut Vec<u8>,
    read: impl FnOnce(usize, &mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let count = pages_with(message)?;
    let start = frames.len();
    let first = start + HEADER_BYTES;
    // The length in the header is known only afterwards.
    frames.resize(first, 0);
    read(count, frames)?;
    if frames.len() != first + count * PAGE {
        return Err(WireError::Page.into());
    }
    let (mut to, mut zeros) = (first, 0_u64);
    for at in 0..count {
        let from = first + at * PAGE;
        if is_zero(&frames[from..from + PAGE]) {
            zeros |= 1 << at;
            continue;
        }
        if to != from {
            frames.copy_within(from..from + PAGE, to);
        }
        to += PAGE;
    }
    frames.truncate(to);
    let encoded = postcard::to_stdvec(&(message, zeros)).map_err(WireError::from)?;
    frames.extend_from_slice(&encoded);
    let header = Header {
        kind: KIND_PAGES,
        request: 0,
        payload_bytes: frames.len() - first,
    };
    let mut bytes = &mut frames[start..first];
    let encoded = header.encode(&CLASS, &mut bytes);
    Ok(encoded.map_err(WireError::from)?)
}

/// Most pages that are not zero differ in their first words.
fn is_zero(page: &[u8]) -> bool {
    let mut words = page.chunks(ZEROS.len());
    words.all(|words| *words == ZEROS[..words.len()])
}

/// A batch of frames for a part; the first is [`PeerMessage::Time`].
#[derive(Debug)]
pub(super) struct FrameWriter {
    bytes: Vec<u8>,
    /// Messages about pages that are not in a frame yet.
    messages: Vec<u8>,
}

/// Buffers of written batches, for reuse: new ones of this size would be mapped by the
/// kernel each time.
static RECYCLED: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
/// The number of buffers kept, and their sizes: the pages of one step with their message.
const RECYCLED_MAX: usize = 8;
const RECYCLED_BYTES: Range<usize> = 640 << 10..2 << 20;
/// Shorter batches start with small buffers.
const SHORT_BYTES: usize = 64 << 10;

/// Returns a buffer for reuse after it was written.
pub(super) fn recycle(mut frames: Vec<u8>) {
    if RECYCLED_BYTES.contains(&frames.capacity()) {
        frames.clear();
        let mut encoded = RECYCLED.lock().unwrap_or_else(PoisonError::into_inner);
        if encoded.len() < RECYCLED_MAX {
            encoded.push(frames);
        }
    }
}

impl FrameWriter {
    /// An empty batch.
    ///
    /// # Errors
    /// [`WireError`]; does not occur.
    pub(super) fn new() -> Result<Self, WireError> {
        let mut bytes = Vec::new();
        encode(&PeerMessage::Time(0), &mut bytes)?;
        Ok(FrameWriter {
            bytes,
            messages: Vec::new(),
        })
    }

    /// Reserves room for this many bytes.
    pub(super) fn reserve(&mut self, bytes: usize) {
        if bytes <= SHORT_BYTES || self.bytes.capacity() >= RECYCLED_BYTES.start {
            return;
        }
        let encoded = RECYCLED
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut longer = encoded.unwrap_or_else(|| Vec::with_capacity(RECYCLED_BYTES.start));
        longer.extend_from_slice(&self.bytes);
        self.bytes = longer;
    }

    /// Appends a message.
    ///
    /// # Errors
    /// As [`encode`].
    pub(super) fn put(&mut self, parcel: &PeerMessage) -> Result<(), WireError> {
        let PeerMessage::Coherence(message) = parcel else {
            self.end_messages()?;
            return encode(parcel, &mut self.bytes);
        };
        let messages = std::mem::take(&mut self.messages);
        self.messages = postcard::to_extend(message, messages)?;
        match self.messages.len() < MESSAGES_BYTES {
            true => Ok(()),
            false => self.end_messages(),
        }
    }

    /// As [`encode_note`].
    ///
    /// # Errors
    /// As there.
    pub(super) fn put_note(&mut self, note: &[u8]) -> Result<(), WireError> {
        self.end_messages()?;
        encode_note(note, &mut self.bytes)
    }

    /// As [`encode_pages`].
    ///
    /// # Errors
    /// As there.
    pub(super) fn put_pages<E: From<WireError>>(
        &mut self,
        message: &Message,
        read: impl FnOnce(usize, &mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.end_messages()?;
        encode_pages(message, &mut self.bytes, read)
    }

    fn end_messages(&mut self) -> Result<(), WireError> {
        if !self.messages.is_empty() {
            frame_of(KIND_MESSAGES, &self.messages, &[], &mut self.bytes)?;
            self.messages.clear();
        }
        Ok(())
    }

    /// The encoded batch, with the guest's clock in nanoseconds.
    ///
    /// # Errors
    /// [`WireError`]; does not occur.
    pub(super) fn finish(mut self, guest_ns: u64) -> Result<Vec<u8>, WireError> {
        self.end_messages()?;
        if let Some(time) = self.bytes.get_mut(HEADER_BYTES..HEADER_BYTES + 8) {
            time.copy_from_slice(&guest_ns.to_le_bytes());
        }
        Ok(self.bytes)
    }
}

fn frame_of(kind: u16, message: &[u8], page: &[u8], frames: &mut Vec<u8>) -> Result<(), WireError> {
    let payload_bytes = message.len() + page.len();
    frames.reserve(HEADER_BYTES + payload_bytes);
    let header = Header {
        kind,
        request: 0,
        payload_bytes,
    };
    header.encode(&CLASS, frames)?;
    frames.extend_from_slice(message);
    frames.extend_from_slice(page);
    Ok(())
}

/// Buffer size for busy connections: pages in a buffer are installed before more is read,
/// so buffers are reused.
const BUFFER_BYTES: usize = 512 << 10;
/// Buffer size for quiet connections.
const SMALL_BYTES: usize = 4 << 10;

/// Decodes the messages of a connection.
#[derive(Debug, Default)]
pub(super) struct FrameReader {
    /// Received bytes that are not decoded: the beginning of a frame.
    begun: BytesMut,
    /// The previous buffer, which decoded messages may still refer to.
    before: BytesMut,
    /// Pieces of an incomplete note.
    note: Vec<u8>,
}

impl FrameReader {
    /// Reads bytes until the first frame is complete, which must be a hello; further
    /// bytes are decoded by the next call.
    ///
    /// # Errors
    /// [`WireError`].
    pub(super) fn feed_hello(&mut self, bytes: &[u8]) -> Result<Option<Hello>, WireError> {
        self.extend(bytes);
        let Some(header) = Decoder::new(CLASS).header(&self.begun)? else {
            return Ok(None);
        };
        if header.kind != KIND_HELLO {
            return Err(WireError::Nameless);
        }
        let end = HEADER_BYTES + header.payload_bytes;
        let Some(payload) = self.begun.get(HEADER_BYTES..end) else {
            return Ok(None);
        };
        let hello = postcard::from_bytes(payload)?;
        self.begun.advance(end);
        Ok(Some(hello))
    }

    fn extend(&mut self, bytes: &[u8]) {
        let room = self.begun.capacity() - self.begun.len();
        if room < bytes.len() && !self.begun.try_reclaim(bytes.len()) {
            let needed = self.begun.len() + bytes.len();
            let mut next = std::mem::take(&mut self.before);
            next.clear();
            if !next.try_reclaim(needed) {
                next = BytesMut::with_capacity(match needed <= SMALL_BYTES {
                    true => SMALL_BYTES,
                    false => needed.max(BUFFER_BYTES),
                });
            }
            next.extend_from_slice(&self.begun);
            self.before = std::mem::replace(&mut self.begun, next);
        }
        self.begun.extend_from_slice(bytes);
    }

    /// Reads bytes and appends the messages that are complete.
    ///
    /// # Errors
    /// [`WireError`]; the connection is unusable then.
    pub(super) fn feed(
        &mut self,
        bytes: &[u8],
        parcels: &mut Vec<PeerMessage>,
    ) -> Result<(), WireError> {
        self.extend(bytes);
        while let Some(header) = Decoder::new(CLASS).header(&self.begun)? {
            if self.begun.len() < HEADER_BYTES + header.payload_bytes {
                break;
            }
            self.begun.advance(HEADER_BYTES);
            let payload = self.begun.split_to(header.payload_bytes);
            match header.kind {
                KIND_BEGUN | KIND_NOTE => {
                    if self.note.len() + payload.len() > NOTE_BYTES_MAX {
                        return Err(WireError::Long);
                    }
                    self.note.extend_from_slice(&payload);
                    if header.kind == KIND_NOTE {
                        parcels.push(PeerMessage::Note(std::mem::take(&mut self.note)));
                    }
                }
                KIND_MESSAGES => messages_of(&payload, parcels)?,
                KIND_PAGES => parcels.push(pages_of(payload.freeze())?),
                kind => parcels.push(parcel(kind, payload.freeze())?),
            }
        }
        Ok(())
    }
}

/// Decodes one or more messages.
fn messages_of(mut payload: &[u8], parcels: &mut Vec<PeerMessage>) -> Result<(), WireError> {
    loop {
        let (message, rest) = postcard::take_from_bytes(payload)?;
        if matches!(message, Message::Data { .. }) {
            return Err(WireError::Page);
        }
        parcels.push(PeerMessage::Coherence(message));
        payload = rest;
        if payload.is_empty() {
            return Ok(());
        }
    }
}

/// Decodes a run of pages and its message, which is shorter than a page.
fn pages_of(payload: Bytes) -> Result<PeerMessage, WireError> {
    let length = payload.len() / PAGE * PAGE;
    let ((message, zeros), rest): ((Message, u64), &[u8]) =
        postcard::take_from_bytes(&payload[length..])?;
    let pages = pages_with(&message)?;
    let there = pages.saturating_sub(zeros.count_ones() as usize);
    let beyond = zeros.checked_shr(pages as u32).unwrap_or(0);
    if !rest.is_empty() || beyond != 0 || there * PAGE != length {
        return Err(WireError::Page);
    }
    let bytes = payload.slice(..length);
    let pages = PageBytes {
        bytes,
        zeros,
        pages,
    };
    Ok(PeerMessage::Pages(message, pages))
}

fn parcel(kind: u16, payload: Bytes) -> Result<PeerMessage, WireError> {
    match kind {
        KIND_TIME => match payload[..].try_into() {
            Ok(bytes) => Ok(PeerMessage::Time(u64::from_le_bytes(bytes))),
            Err(_) => Err(WireError::Time),
        },
        KIND_MEMORY => Ok(PeerMessage::Memory(postcard::from_bytes(&payload)?)),
        KIND_LIMIT => Ok(PeerMessage::Limit(postcard::from_bytes(&payload)?)),
        KIND_CUT => {
            let (number, word) = postcard::from_bytes(&payload)?;
            Ok(PeerMessage::Cut { number, word })
        }
        KIND_QUIESCENCE => {
            let (number, word) = postcard::from_bytes(&payload)?;
            Ok(PeerMessage::Quiescence { number, word })
        }
        KIND_ASK => {
            let (number, question) = postcard::from_bytes(&payload)?;
            Ok(PeerMessage::Ask(number, question))
        }
        KIND_ANSWER => {
            let (number, answer) = postcard::from_bytes(&payload)?;
            Ok(PeerMessage::Answer(number, answer))
        }
        KIND_CUT_PAGES => {
            let ((number, memory, first), bytes): ((u64, u32, u32), &[u8]) =
                postcard::take_from_bytes(&payload)?;
            let pages = CutPages {
                memory,
                first,
                bytes: payload.slice_ref(bytes),
            };
            match pages.is_whole() {
                true => Ok(PeerMessage::CutPages { number, pages }),
                false => Err(WireError::Page),
            }
        }
        KIND_UNCHANGED_PAGES => {
            let (number, same) = postcard::from_bytes(&payload)?;
            Ok(PeerMessage::UnchangedPages(number, same))
        }
        KIND_GONE => match postcard::take_from_bytes(&payload)? {
            (part, []) => Ok(PeerMessage::Gone(part)),
            _ => Err(postcard::Error::DeserializeBadEncoding.into()),
        },
        KIND_SUCCEEDED if payload.is_empty() => Ok(PeerMessage::Succeeded),
        KIND_SUCCEEDED => Err(postcard::Error::DeserializeBadEncoding.into()),
        KIND_GOODBYE => {
            let (part, reason) = postcard::from_bytes(&payload)?;
            Ok(PeerMessage::Goodbye { part, reason })
        }
        other => Err(WireError::Kind(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::span::false_sharing::FaultFootprint;
    use crate::span::idle_pages::IdleRange;
    use keel_wasm::coherence::{Access, Holders, PageId, Placement, Segment, Traffic, Txn};
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    fn samples() -> Vec<PeerMessage> {
        let page = PageId {
            memory: 1,
            number: 77,
        };
        let part = |number| PartId::new(number).unwrap();
        let txn = Txn {
            number: 1 << 40,
            directory: part(2),
            is_answer: true,
        };
        let data = Message::Data {
            page,
            txn,
            access: Access::Write,
            acks: 3,
            more: Vec::new(),
        };
        let segment = Segment {
            memory: 0,
            number: 9,
        };
        vec![
            PeerMessage::Coherence(Message::Want {
                page,
                access: Access::Read,
                has: false,
            }),
            PeerMessage::Pages(
                data.clone(),
                PageBytes {
                    bytes: Bytes::new(),
                    zeros: 1,
                    pages: 1,
                },
            ),
            PeerMessage::Pages(
                data.clone(),
                PageBytes {
                    bytes: Bytes::from_static(&[7; PAGE]),
                    zeros: 0,
                    pages: 1,
                },
            ),
            PeerMessage::Coherence(Message::SegmentAt {
                segment,
                version: 4,
            }),
            PeerMessage::Note(Vec::new()),
            PeerMessage::Memory(PartMemory {
                resident_bytes: 1 << 33,
                limit_bytes: Some(1 << 30),
                given_bytes: 4096,
                dropped_bytes: 0,
            }),
            PeerMessage::Time(1 << 40),
            PeerMessage::Limit(None),
            PeerMessage::Limit(Some(u64::MAX)),
            PeerMessage::Cut {
                number: 7,
                word: CutMessage::More(1 << 20),
            },
            PeerMessage::Quiescence {
                number: 3,
                word: QuiescenceMessage::Quiet({
                    let mut traffic = Traffic::default();
                    traffic.count_sent(part(3));
                    traffic.count_received(part(63));
                    traffic
                }),
            },
            PeerMessage::Quiescence {
                number: 4,
                word: QuiescenceMessage::Over,
            },
            PeerMessage::Ask(
                5,
                Question::InTransit {
                    memory: 0,
                    pages: 16..32,
                    to: part(2),
                },
            ),
            PeerMessage::Ask(6, Question::Placements(page)),
            PeerMessage::Ask(7, Question::FaultWaits(page)),
            PeerMessage::Ask(8, Question::Idle(1, 4096)),
            PeerMessage::Answer(
                8,
                Answer::Idle(
                    vec![IdleRange {
                        memory: 1,
                        start: 1 << 16,
                        bytes: 1 << 20,
                    }],
                    Some((2, 0)),
                ),
            ),
            PeerMessage::Answer(
                7,
                Answer::FaultWaits(vec![(page, FaultFootprint::default())], Some(page)),
            ),
            PeerMessage::Answer(5, Answer::InTransit(Some(7))),
            PeerMessage::Answer(
                6,
                Answer::Placements(
                    vec![Placement {
                        memory: 1,
                        first: 77,
                        pages: 2,
                        holders: Holders::Owner(part(1)),
                        exchanges: 9,
                        directory: part(2),
                    }],
                    Some(page),
                ),
            ),
            PeerMessage::Coherence(Message::Gather),
            PeerMessage::Coherence(Message::Hand {
                segment,
                to: part(1),
            }),
            PeerMessage::CutPages {
                number: 7,
                pages: CutPages {
                    memory: 1,
                    first: 40,
                    bytes: Bytes::from_static(&[9; 2 * PAGE]),
                },
            },
            PeerMessage::UnchangedPages(
                7,
                UnchangedPages {
                    memory: 0,
                    first: 1 << 20,
                    pages: 16,
                    digest: u128::MAX - 1,
                },
            ),
            PeerMessage::Gone(part(5)),
            PeerMessage::Succeeded,
            PeerMessage::Goodbye {
                part: part(3),
                reason: "its process is gone".into(),
            },
            PeerMessage::Note((0..300 << 10).map(|at| at as u8).collect()),
        ]
    }

    fn frame(parcel: &PeerMessage) -> Vec<u8> {
        let mut frame = Vec::new();
        encode(parcel, &mut frame).unwrap();
        frame
    }

    fn stream() -> Vec<u8> {
        samples().iter().flat_map(frame).collect()
    }

    #[test]
    fn the_hello_comes_first() {
        let hello = Hello::new(
            "m".parse().unwrap(),
            Epoch::default(),
            PartId::new(0).unwrap(),
            PartId::new(63).unwrap(),
        );
        let bytes = [encode_hello(&hello).unwrap(), stream()].concat();
        for piece in [1, 7, bytes.len()] {
            let (mut unpacker, mut parcels, mut found) = (FrameReader::default(), Vec::new(), None);
            for piece in bytes.chunks(piece) {
                match &found {
                    None => found = unpacker.feed_hello(piece).unwrap(),
                    Some(_) => unpacker.feed(piece, &mut parcels).unwrap(),
                }
            }
            unpacker.feed(&[], &mut parcels).unwrap();
            assert_eq!(
                (found.as_ref(), &parcels[..]),
                (Some(&hello), &samples()[..])
            );
        }
        let nameless = FrameReader::default().feed_hello(&stream());
        assert!(matches!(nameless, Err(WireError::Nameless)), "{nameless:?}");
        // A second hello is not a message.
        assert!(
            FrameReader::default()
                .feed(&bytes, &mut Vec::new())
                .is_err()
        );
    }

    #[test]
    fn messages_are_decoded_from_pieces_of_any_size() {
        let bytes = stream();
        for piece in [1, 2, 19, 20, 21, 4096, bytes.len()] {
            let (mut unpacker, mut parcels) = (FrameReader::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                unpacker.feed(piece, &mut parcels).unwrap();
            }
            assert_eq!(parcels, samples(), "{piece}");
            assert!(unpacker.begun.is_empty());
        }
    }

    #[test]
    fn inconsistent_frames_are_refused() {
        let [_, zeros, page, ..] = &samples()[..] else {
            unreachable!("seven of them");
        };
        let (zeros, page) = (frame(zeros), frame(page));
        let want = frame(&samples()[0]);
        let with_kind = |frame: &[u8], kind: u16| {
            let mut frame = frame.to_vec();
            frame[6..8].copy_from_slice(&kind.to_le_bytes());
            let mut parcels = Vec::new();
            FrameReader::default().feed(&frame, &mut parcels)
        };
        // Data without a page, a page without content, pages of other messages, unknown
        // kinds.
        for (frame, kind) in [
            (&zeros, KIND_MESSAGES),
            (&page, KIND_MESSAGES),
            (&want, KIND_PAGES),
            (&want, KIND_HELLO),
            (&want, KIND_UNCHANGED_PAGES + 1),
            (&want, KIND_QUIESCENCE),
            (&want, KIND_SUCCEEDED),
            (&want, KIND_GONE),
            (&want, KIND_CUT_PAGES),
            (&want, KIND_TIME),
        ] {
            assert!(with_kind(frame, kind).is_err(), "{kind}");
        }
        let part = postcard::to_stdvec(&200u8).unwrap();
        assert!(postcard::from_bytes::<PartId>(&part).is_err());
    }

    fn data(number: u32, more: Vec<u64>) -> Message {
        let page = PageId { memory: 1, number };
        Message::Data {
            page,
            txn: Txn {
                number: 1,
                directory: PartId::HOME,
                is_answer: false,
            },
            access: Access::Write,
            acks: 0,
            more,
        }
    }

    /// A run of pages is one message, and its adjacent pages are installed together;
    /// other messages share a frame.
    #[test]
    fn pages_are_sent_in_runs_and_messages_in_batches() {
        let mut bytes = vec![0; ROW_PAGES_MAX * PAGE];
        for at in (0..ROW_PAGES_MAX).filter(|at| ![1, 5, 6].contains(at)) {
            bytes[at * PAGE + 4000] = at as u8 + 1;
        }
        let message = data(100, (1..64).map(|at| 1 << at).collect());
        let mut frames = FrameWriter::new().unwrap();
        let read = |count: usize, frames: &mut Vec<u8>| {
            frames.extend_from_slice(&bytes[..count * PAGE]);
            Ok::<(), WireError>(())
        };
        frames.put_pages(&message, read).unwrap();
        let gather = || PeerMessage::Coherence(Message::Gather);
        for parcel in [gather(), gather(), PeerMessage::Succeeded, gather()] {
            frames.put(&parcel).unwrap();
        }
        // A message that is too long or has other pages is not encoded.
        let long = data(0, vec![1; ROW_PAGES_MAX]);
        assert!(frames.put_pages(&long, read).is_err());
        let none = |_: usize, _: &mut Vec<u8>| Ok::<(), WireError>(());
        assert!(frames.put_pages(&message, none).is_err());
        let encoded = frames.finish(77).unwrap();
        let (mut unpacker, mut parcels) = (FrameReader::default(), Vec::new());
        unpacker.feed(&encoded, &mut parcels).unwrap();
        assert_eq!(parcels.remove(0), PeerMessage::Time(77));
        let rest = parcels.split_off(1);
        assert_eq!(rest, [gather(), gather(), PeerMessage::Succeeded, gather()]);
        // Time, a run, two messages in one frame, and the rest.
        let ours = encoded.windows(4).filter(|it| *it == b"KSPN");
        assert_eq!(ours.count(), 5);
        let Some(PeerMessage::Pages(found, pages)) = parcels.pop() else {
            panic!("{parcels:?}");
        };
        assert_eq!((found, pages.pages()), (message, ROW_PAGES_MAX));
        let (mut at, mut rows) = (0, Vec::new());
        for (count, piece) in pages.pieces() {
            let expected = &bytes[at * PAGE..(at + count) * PAGE];
            match piece {
                Some(piece) => assert!(piece == expected, "{at}"),
                None => assert!(is_zero(expected), "{at}"),
            }
            for number in at..at + count {
                let one = pages.page(number);
                let expected = piece.map(|piece| &piece[(number - at) * PAGE..][..PAGE]);
                assert_eq!(one.pieces().collect::<Vec<_>>(), [(1, expected)]);
            }
            rows.push(count);
            at += count;
        }
        assert_eq!(rows, [1, 1, 3, 2, 57]);
    }

    #[test]
    fn runs_have_the_stated_length() {
        let row = |message: Message, zeros: u64, pages: usize| {
            let encoded = postcard::to_stdvec(&(message, zeros)).unwrap();
            let mut payload = vec![1; pages * PAGE];
            payload.extend(encoded);
            pages_of(payload.into()).map(|parcel| match parcel {
                PeerMessage::Pages(_, pages) => pages.pages(),
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(row(data(7, vec![3; 2]), 0b010, 2).unwrap(), 3);
        assert_eq!(row(data(7, vec![3; 63]), u64::MAX, 0).unwrap(), 64);
        for (message, zeros, pages) in [
            (data(7, vec![3; 2]), 0b010, 3),
            (data(7, vec![3; 2]), 0b010, 1),
            // More pages or zero pages than the message has; no page.
            (data(7, vec![3; 64]), u64::MAX, 1),
            (data(7, vec![3; 2]), 0b1010, 1),
            (data(7, vec![3; 2]), 0b1000, 3),
            (Message::Gather, 0, 1),
        ] {
            let refused = row(message, zeros, pages);
            assert!(refused.is_err(), "{zeros} {pages}: {refused:?}");
        }
    }

    /// Arbitrary bytes are decoded or refused.
    #[test]
    fn damaged_bytes_are_errors_or_messages() {
        // Damage in a long note has no effect.
        let samples: Vec<PeerMessage> = samples()
            .into_iter()
            .filter(|it| frame(it).len() < 9000)
            .collect();
        let bytes: Vec<u8> = samples.iter().flat_map(frame).collect();
        let mut rng = SmallRng::seed_from_u64(3);
        let mut refused = 0;
        for _ in 0..20_000 {
            let mut damaged = bytes.clone();
            for _ in 0..rng.random_range(1..4) {
                // Mostly headers and messages are damaged, not pages.
                let at = rng.random_range(0..bytes.len());
                damaged[at] = rng.random();
            }
            damaged.truncate(rng.random_range(0..=bytes.len()));
            let mut parcels = Vec::new();
            let fed = FrameReader::default().feed(&damaged, &mut parcels);
            refused += u32::from(fed.is_err());
            assert!(parcels.len() <= samples.len());
        }
        assert!(refused > 100, "{refused}");
    }
}
