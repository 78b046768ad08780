//! Where records end in output that comes in pieces of any size: a file of the log
//! begins with a record, or nothing in it could be found again.

use super::{HEADER_BYTES, RECORD_BYTES_MAX};

/// Follows bytes of records, from the beginning of one.
#[derive(Debug, Default)]
pub(super) struct Boundary {
    /// What has come of a record's header.
    header: Vec<u8>,
    /// Bytes of its text that are still to come.
    text: usize,
}

impl Boundary {
    /// Whether a record ends here.
    pub(super) fn is_here(&self) -> bool {
        self.header.is_empty() && self.text == 0
    }

    /// Goes on behind `bytes`.
    pub(super) fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = self.pass_some(bytes);
        }
    }

    /// How many of `bytes` belong to the record that has begun; all, if it goes on behind
    /// them. A length that no writer makes ends at once: what it counts is damaged anyway.
    pub(super) fn rest(&self, bytes: &[u8]) -> usize {
        let mut ahead = Boundary {
            header: self.header.clone(),
            text: self.text,
        };
        let mut left = bytes;
        while !left.is_empty() && !ahead.is_here() {
            left = ahead.pass_some(left);
        }
        bytes.len() - left.len()
    }

    /// Passes the rest of a text, or bytes of a header.
    fn pass_some<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
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
    fn records_end_where_they_do_however_they_are_cut() {
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
                boundary.pass(piece);
                passed += piece.len();
                assert_eq!(boundary.is_here(), ends.contains(&passed), "{size}");
            }
        }
    }

    #[test]
    fn a_length_that_no_writer_makes_counts_nothing() {
        let mut boundary = Boundary::default();
        boundary.pass(&[1, 255, 255, 255, 255]);
        assert!(boundary.is_here());
    }
}
