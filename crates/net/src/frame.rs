//! The envelope of every message between nodes, and its decoder.
//!
//! ```text
//!  0        4         6      8               16       20          20+length
//!  ├ magic ─┼ version ┼ kind ┼─ request id ──┼ length ┼── payload ──┤   little-endian
//! ```
//!
//! Policy: `version` is that of the envelope and of the connection protocol
//! on top of it; payloads carry versions of their own. A peer of another
//! version is refused by name, never guessed at. `kind` 0 is invalid, so
//! zeroed memory is never a frame. Every length is checked against the
//! class's limit before a byte is reserved for it.
//!
//! [`Decoder`] is pure: bytes in, frames out. [`FrameReader`] and
//! [`write_frame`] put it on a stream. An end of stream inside a frame is an
//! error; at a boundary it is not.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Length of the envelope before the payload, in bytes.
pub const HEADER_BYTES: usize = 20;

/// Parameters of one kind of connection: marker, version and length limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// First four bytes of each frame.
    pub magic: u32,
    /// Version of the envelope and connection protocol.
    pub version: u16,
    /// Longest payload, in bytes.
    pub payload_bytes_max: u32,
}

impl Class {
    /// Control connections: requests, answers, watches. Payload up to 4 MiB.
    pub const CONTROL: Class = Class {
        magic: u32::from_le_bytes(*b"KEEL"),
        version: 1,
        payload_bytes_max: 4 << 20,
    };

    /// Bulk connections (moves, checkpoints): payload up to 16 MiB.
    pub const BULK: Class = Class {
        magic: u32::from_le_bytes(*b"KBLK"),
        version: 1,
        payload_bytes_max: 16 << 20,
    };

    /// The same class with another payload limit, in bytes.
    pub const fn with_payload_max(self, payload_bytes_max: u32) -> Class {
        Class {
            payload_bytes_max,
            ..self
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Kind of the payload; never 0.
    pub kind: u16,
    /// The request this belongs to; chosen by the requester.
    pub request: u64,
    pub payload: Bytes,
}

/// Why bytes are not a frame.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The bytes do not begin with the class's marker.
    #[error("not a keel connection: it begins with {found:#010x}, not {expected:#010x}")]
    Magic {
        /// The first four bytes.
        found: u32,
        expected: u32,
    },
    #[error(
        "the peer speaks connection protocol version {found}, this node speaks {ours}: upgrade the older one"
    )]
    Version { found: u16, ours: u16 },
    /// Kind 0.
    #[error("a frame of the invalid kind 0")]
    KindZero,
    /// The payload is over the class's limit.
    #[error("a frame of kind {kind:#06x} has {length} bytes of payload, at most {max} are allowed")]
    TooLong { kind: u16, length: u64, max: u32 },
    /// The stream ended inside a frame.
    #[error("the connection ended inside a frame, after {have} of its bytes")]
    Truncated {
        /// Bytes of the unfinished frame that did arrive.
        have: usize,
    },
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Frame {
    /// Appends the frame's bytes to `out`.
    ///
    /// # Errors
    /// [`FrameError::KindZero`], or [`FrameError::TooLong`] when the payload
    /// is over the class's limit; `out` is then unchanged.
    pub fn encode(&self, class: &Class, out: &mut BytesMut) -> Result<(), FrameError> {
        let header = Header {
            kind: self.kind,
            request: self.request,
            payload_bytes: self.payload.len(),
        };
        header.encode(class, out)?;
        out.extend_from_slice(&self.payload);
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Kind of the payload; never 0.
    pub kind: u16,
    pub request: u64,
    /// Bytes of payload that follow, within the class's limit.
    pub payload_bytes: usize,
}

impl Header {
    /// Appends the header's bytes to `out`; the payload is to follow.
    ///
    /// # Errors
    /// As [`Frame::encode`].
    pub fn encode(&self, class: &Class, out: &mut impl BufMut) -> Result<(), FrameError> {
        if self.kind == 0 {
            return Err(FrameError::KindZero);
        }
        let length = u32::try_from(self.payload_bytes)
            .ok()
            .filter(|length| *length <= class.payload_bytes_max)
            .ok_or(FrameError::TooLong {
                kind: self.kind,
                length: self.payload_bytes as u64,
                max: class.payload_bytes_max,
            })?;
        out.put_u32_le(class.magic);
        out.put_u16_le(class.version);
        out.put_u16_le(self.kind);
        out.put_u64_le(self.request);
        out.put_u32_le(length);
        Ok(())
    }
}

/// Splits a byte stream into frames. Holds no bytes of its own.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    class: Class,
}

impl Decoder {
    /// A decoder for connections of `class`.
    pub const fn new(class: Class) -> Self {
        Self { class }
    }

    /// Reads the header at the front of `bytes`, or `None` when more are
    /// needed. Each field is checked as soon as its bytes are there.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn header(&self, bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let mut header = bytes;
        if header.len() < 4 {
            return Ok(None);
        }
        let magic = header.get_u32_le();
        if magic != self.class.magic {
            return Err(FrameError::Magic {
                found: magic,
                expected: self.class.magic,
            });
        }
        if header.len() < 2 {
            return Ok(None);
        }
        let version = header.get_u16_le();
        if version != self.class.version {
            return Err(FrameError::Version {
                found: version,
                ours: self.class.version,
            });
        }
        if header.len() < HEADER_BYTES - 6 {
            return Ok(None);
        }
        let kind = header.get_u16_le();
        let request = header.get_u64_le();
        let length = header.get_u32_le();
        if kind == 0 {
            return Err(FrameError::KindZero);
        }
        if length > self.class.payload_bytes_max {
            return Err(FrameError::TooLong {
                kind,
                length: u64::from(length),
                max: self.class.payload_bytes_max,
            });
        }
        Ok(Some(Header {
            kind,
            request,
            payload_bytes: length as usize,
        }))
    }

    /// Takes the next whole frame off the front of `buffer`, or `None` when
    /// more bytes are needed.
    ///
    /// # Errors
    /// Any [`FrameError`] but `Truncated` and `Io`. The connection cannot be
    /// used further after one.
    pub fn decode(&self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        let Some(header) = self.header(buffer)? else {
            return Ok(None);
        };
        let whole = HEADER_BYTES + header.payload_bytes;
        if buffer.len() < whole {
            buffer.reserve(whole - buffer.len());
            return Ok(None);
        }
        buffer.advance(HEADER_BYTES);
        Ok(Some(Frame {
            kind: header.kind,
            request: header.request,
            payload: buffer.split_to(header.payload_bytes).freeze(),
        }))
    }

    /// Checks that the stream may end with `rest` left undecoded.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] when `rest` is the beginning of a frame.
    pub fn finish(&self, rest: &BytesMut) -> Result<(), FrameError> {
        match rest.len() {
            0 => Ok(()),
            have => Err(FrameError::Truncated { have }),
        }
    }
}

/// Reads frames off a stream.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    decoder: Decoder,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames of `class` off `stream`.
    pub fn new(stream: R, class: Class) -> Self {
        Self {
            stream,
            decoder: Decoder::new(class),
            buffer: BytesMut::with_capacity(16 << 10),
        }
    }

    /// The next frame, or `None` at the end of the stream. Cancel-safe: bytes
    /// read so far are kept.
    ///
    /// # Errors
    /// Any [`FrameError`].
    pub async fn read(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = self.decoder.decode(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            if self.buffer.capacity() == self.buffer.len() {
                self.buffer.reserve(16 << 10);
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                self.decoder.finish(&self.buffer)?;
                return Ok(None);
            }
        }
    }

    /// Frames already received whole, without touching the stream.
    ///
    /// # Errors
    /// As [`Decoder::decode`].
    pub fn buffered(&mut self) -> Result<Option<Frame>, FrameError> {
        self.decoder.decode(&mut self.buffer)
    }

    /// The stream underneath. Bytes already read into the buffer are lost to it.
    pub fn into_inner(self) -> R {
        self.stream
    }
}

/// Writes one frame and flushes.
///
/// # Errors
/// As [`Frame::encode`] (nothing is written then), or the stream's.
pub async fn write_frame<W: AsyncWrite + Unpin>(
    stream: &mut W,
    class: &Class,
    frame: &Frame,
) -> Result<(), FrameError> {
    let mut bytes = BytesMut::new();
    frame.encode(class, &mut bytes)?;
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CLASS: Class = Class::CONTROL.with_payload_max(1000);

    fn decode_all(bytes: &[u8], step: usize) -> Result<Vec<Frame>, FrameError> {
        let decoder = Decoder::new(CLASS);
        let mut buffer = BytesMut::new();
        let mut frames = Vec::new();
        for chunk in bytes.chunks(step.max(1)) {
            buffer.extend_from_slice(chunk);
            while let Some(frame) = decoder.decode(&mut buffer)? {
                frames.push(frame);
            }
        }
        decoder.finish(&buffer)?;
        Ok(frames)
    }

    fn bytes_of(frames: &[Frame]) -> Result<BytesMut, FrameError> {
        let mut bytes = BytesMut::new();
        for frame in frames {
            frame.encode(&CLASS, &mut bytes)?;
        }
        Ok(bytes)
    }

    /// Version 1 as it went over the wire when it was fixed. When the version
    /// is raised, keep these bytes and either read them or refuse them by name.
    const VERSION_1: &[u8] =
        b"KEEL\x01\x00\x34\x12\x08\x07\x06\x05\x04\x03\x02\x01\x03\x00\x00\x00abc";

    #[test]
    fn version_1_is_read() -> Result<(), FrameError> {
        let frame = Frame {
            kind: 0x1234,
            request: 0x0102_0304_0506_0708,
            payload: Bytes::from_static(b"abc"),
        };
        assert_eq!(&bytes_of(std::slice::from_ref(&frame))?[..], VERSION_1);
        assert_eq!(decode_all(VERSION_1, 1)?, vec![frame]);
        Ok(())
    }

    #[test]
    fn other_versions_are_refused_by_name() {
        for version in [0u8, 2, 255] {
            let mut bytes = VERSION_1.to_vec();
            bytes[4] = version;
            let message = decode_all(&bytes, 100)
                .map_err(|e| e.to_string())
                .unwrap_err();
            assert!(
                message.contains(&format!("version {version}, this node speaks 1")),
                "{message}"
            );
            // The version alone suffices: nothing after it is read.
            assert!(decode_all(&bytes[..6], 6).is_err_and(|e| matches!(
                e,
                FrameError::Version { found, ours: 1 } if found == u16::from(version)
            )));
        }
    }

    #[test]
    fn bad_headers_are_refused_before_the_payload_comes() {
        let mut kind_zero = VERSION_1.to_vec();
        kind_zero[6..8].fill(0);
        assert!(matches!(
            decode_all(&kind_zero[..20], 20),
            Err(FrameError::KindZero)
        ));
        let mut long = VERSION_1.to_vec();
        long[16..20].copy_from_slice(&1001u32.to_le_bytes());
        assert!(matches!(
            decode_all(&long[..20], 20),
            Err(FrameError::TooLong {
                length: 1001,
                max: 1000,
                ..
            })
        ));
        assert!(matches!(
            decode_all(b"GET ", 4),
            Err(FrameError::Magic { .. })
        ));
    }

    #[test]
    fn the_end_is_an_error_only_inside_a_frame() {
        assert!(decode_all(b"", 1).is_ok_and(|frames| frames.is_empty()));
        for cut in 1..VERSION_1.len() {
            assert!(
                matches!(decode_all(&VERSION_1[..cut], 7), Err(FrameError::Truncated { have }) if have == cut)
            );
        }
    }

    #[test]
    fn encoding_refuses_what_decoding_would() {
        let mut out = BytesMut::new();
        let frame = |kind, length| Frame {
            kind,
            request: 0,
            payload: Bytes::from(vec![0; length]),
        };
        assert!(frame(0, 0).encode(&CLASS, &mut out).is_err());
        assert!(frame(1, 1001).encode(&CLASS, &mut out).is_err());
        assert!(out.is_empty());
        assert!(frame(1, 1000).encode(&CLASS, &mut out).is_ok());
    }

    proptest! {
        #[test]
        fn whatever_is_encoded_is_decoded(
            parts in prop::collection::vec((1u16.., any::<u64>(), prop::collection::vec(any::<u8>(), 0..200)), 0..8),
            step in 1usize..64,
        ) {
            let frames: Vec<Frame> = parts
                .into_iter()
                .map(|(kind, request, payload)| Frame { kind, request, payload: payload.into() })
                .collect();
            let bytes = bytes_of(&frames).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(decode_all(&bytes, step).map_err(|e| TestCaseError::fail(e.to_string()))?, frames);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1usize..40) {
            let _ = decode_all(&bytes, step);
        }

        /// Valid frames with a few bytes changed: decoded or refused, no panic
        /// and never a payload over the limit.
        #[test]
        fn damaged_frames_never_panic(
            payload in prop::collection::vec(any::<u8>(), 0..60),
            damage in prop::collection::vec((0usize..200, any::<u8>()), 0..6),
            step in 1usize..40,
        ) {
            let frame = Frame { kind: 7, request: 9, payload: payload.into() };
            let mut bytes = bytes_of(&[frame.clone(), frame]).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let length = bytes.len();
            for (at, byte) in damage {
                bytes[at % length] = byte;
            }
            if let Ok(frames) = decode_all(&bytes, step) {
                prop_assert!(frames.iter().all(|f| f.payload.len() <= 1000 && f.kind != 0));
            }
        }
    }
}
