//! The decoding of the messages of a connection from received bytes, in pieces of any size. What a
//! message means is left to its receivers in [`super::super::pages`].

use super::super::messages::CutPages;
use super::{
    CLASS, Hello, KIND_ANSWER, KIND_ASK, KIND_BEGUN, KIND_CUT, KIND_CUT_PAGES, KIND_GONE,
    KIND_GOODBYE, KIND_HELLO, KIND_LIMIT, KIND_MEMORY, KIND_MESSAGES, KIND_NOTE, KIND_PAGES,
    KIND_QUIESCENCE, KIND_SUCCEEDED, KIND_TIME, KIND_UNCHANGED_PAGES, NOTE_BYTES_MAX, PAGE,
    PageBytes, PeerMessage, WireError, pages_with,
};
use bytes::{Buf, Bytes, BytesMut};
use keel_net::frame::{Decoder, HEADER_BYTES};
use keel_wasm::coherence::Message;

/// Buffer size for busy connections: pages in a buffer are installed before more is read,
/// so buffers are reused.
const BUFFER_BYTES: usize = 512 << 10;
/// Buffer size for quiet connections.
const SMALL_BYTES: usize = 4 << 10;

/// Decodes the messages of a connection.
#[derive(Debug, Default)]
pub(in crate::span) struct FrameReader {
    /// Received bytes that are not decoded: the beginning of a frame.
    pub(super) begun: BytesMut,
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
    pub(in crate::span) fn feed_hello(&mut self, bytes: &[u8]) -> Result<Option<Hello>, WireError> {
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
    pub(in crate::span) fn feed(
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
pub(super) fn pages_of(payload: Bytes) -> Result<PeerMessage, WireError> {
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
