//! Tracks record ends in output that arrives in pieces of any size: each file of the log
//! must begin with a record, or its content could not be parsed.

use super::{HEADER_BYTES, RECORD_BYTES_MAX};

/// Follows the bytes of records, from the start of one.
#[derive(Debug, Default)]
pub(super) struct Boundary {
    /// Bytes of an incomplete record header.
    header: Vec<u8>,
    /// Bytes of the record's text that have not arrived.
    text: usize,
}

impl Boundary {
    /// Whether a record ends here.
    pub(super) fn is_here(&self) -> bool {
        self.header.is_empty() && self.text == 0
    }

    /// Advances by `bytes`.
    pub(super) fn advance(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = self.advance_some(bytes);
        }
    }

    /// How many of `bytes` belong to the present record; all if it extends beyond them.
    /// An impossible length ends the record at once: its content is damaged anyway.
    pub(super) fn rest(&self, bytes: &[u8]) -> usize {
        let mut ahead = Boundary {
            header: self.header.clone(),
            text: self.text,
        };
        let mut left = bytes;
        while !left.is_empty() && !ahead.is_here() {
            left = ahead.advance_some(left);
        }
        bytes.len() - left.len()
    }

    /// Consumes the rest of a text, or bytes of a header.
    fn advance_some<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        if self.text > 0 {
            let count = self.text.min(bytes.len());
            self.text -= count;
            return &bytes[count..];
        }
        let count = (HEADER_BYTES - self.header.len()).min(bytes.len());
        self.header.extend_from_slice(&bytes[..count]);
        if let [_, a, b, c, d] = self.header[..] {
            let text = u32::from_le_bytes([a, b, c, d]) as usize;
            self.text = if text > RECORD_BYTES_MAX { 0 } else { text };
            self.header.clear();
        }
        &bytes[count..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(text: usize) -> Vec<u8> {
        let mut record = vec![1];
        record.extend((text as u32).to_le_bytes());
        record.resize(HEADER_BYTES + text, b'x');
        record
    }

    #[test]
    fn record_ends_are_found_in_any_pieces() {
        let bytes = [record(3), record(0), record(70)].concat();
        let ends = [8, 13, 88];
        for size in 1..=bytes.len() {
            let mut boundary = Boundary::default();
            let mut passed = 0;
            for piece in bytes.chunks(size) {
                let rest = boundary.rest(piece);
                let inside = !boundary.is_here();
                if inside && rest < piece.len() {
                    assert!(ends.contains(&(passed + rest)), "{size}");
                }
                assert!(inside || rest == 0, "{size}");
                boundary.advance(piece);
                passed += piece.len();
                assert_eq!(boundary.is_here(), ends.contains(&passed), "{size}");
            }
        }
    }

    #[test]
    fn impossible_lengths_are_ignored() {
        let mut boundary = Boundary::default();
        boundary.advance(&[1, 255, 255, 255, 255]);
        assert!(boundary.is_here());
    }
}
