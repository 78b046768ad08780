//! The encoding of messages between parts into batches of frames. Sending a batch is left to
//! [`super::super::peer`].

use super::{
    CLASS, Hello, KIND_ANSWER, KIND_ASK, KIND_BEGUN, KIND_CUT, KIND_CUT_PAGES, KIND_GONE,
    KIND_GOODBYE, KIND_HELLO, KIND_LIMIT, KIND_MEMORY, KIND_MESSAGES, KIND_NOTE, KIND_PAGES,
    KIND_QUIESCENCE, KIND_SUCCEEDED, KIND_TIME, KIND_UNCHANGED_PAGES, NOTE_BYTES_MAX, PAGE,
    PeerMessage, WireError, pages_with,
};
use keel_net::frame::{HEADER_BYTES, Header};
use keel_wasm::coherence::Message;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Bytes of a note per frame, so that pages need not wait for long notes.
const PIECE_BYTES: usize = 128 << 10;
/// Bytes of messages in one frame; the last message may exceed it.
const MESSAGES_BYTES: usize = 32 << 10;
/// Chunk that pages are compared with.
const ZEROS: [u8; 128] = [0; 128];

/// Encodes the first frame.
///
/// # Errors
/// [`WireError`]; does not occur for a hello from [`Hello::new`].
pub(in crate::span) fn encode_hello(hello: &Hello) -> Result<Vec<u8>, WireError> {
    let mut frame = Vec::new();
    frame_of(KIND_HELLO, &postcard::to_stdvec(hello)?, &[], &mut frame)?;
    Ok(frame)
}

/// Appends a frame.
///
/// # Errors
/// [`WireError`] if the frame would be too long; nothing is appended then.
pub(in crate::span) fn encode(parcel: &PeerMessage, frames: &mut Vec<u8>) -> Result<(), WireError> {
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
pub(in crate::span) fn encode_note(note: &[u8], frames: &mut Vec<u8>) -> Result<(), WireError> {
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
pub(in crate::span) fn encode_pages<E: From<WireError>>(
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
pub(super) fn is_zero(page: &[u8]) -> bool {
    let mut words = page.chunks(ZEROS.len());
    words.all(|words| *words == ZEROS[..words.len()])
}

/// A batch of frames for a part; the first is [`PeerMessage::Time`].
#[derive(Debug)]
pub(in crate::span) struct FrameWriter {
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
pub(in crate::span) fn recycle(mut frames: Vec<u8>) {
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
    pub(in crate::span) fn new() -> Result<Self, WireError> {
        let mut bytes = Vec::new();
        encode(&PeerMessage::Time(0), &mut bytes)?;
        Ok(FrameWriter {
            bytes,
            messages: Vec::new(),
        })
    }

    /// Reserves room for this many bytes.
    pub(in crate::span) fn reserve(&mut self, bytes: usize) {
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
    pub(in crate::span) fn put(&mut self, parcel: &PeerMessage) -> Result<(), WireError> {
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
    pub(in crate::span) fn put_note(&mut self, note: &[u8]) -> Result<(), WireError> {
        self.end_messages()?;
        encode_note(note, &mut self.bytes)
    }

    /// As [`encode_pages`].
    ///
    /// # Errors
    /// As there.
    pub(in crate::span) fn put_pages<E: From<WireError>>(
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
    pub(in crate::span) fn finish(mut self, guest_ns: u64) -> Result<Vec<u8>, WireError> {
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
