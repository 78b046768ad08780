//! Requests as they come from a port: lines of JSON, in pieces of any size.
//!
//! A host cannot know what was sent before it was there: an earlier one may have stopped in the
//! middle of a line. So a byte that no JSON has makes the agent forget what it has read of a line
//! (`guest-sync-delimited` in docs/interop/qemu-ga-ref.rst of QEMU).

/// The byte: none of UTF-8.
pub(crate) const DELIMITER: u8 = 0xff;

/// The longest line that is accepted, in bytes: a host sends 1 MiB of a process's input, which Base64
/// makes a third longer, and its words.
const LINE_BYTES_MAX: usize = 8 << 20;

/// A line, as far as it was read.
#[derive(Debug, Default)]
pub struct Requests {
    line: Vec<u8>,
    /// Whether the line is longer than is accepted. It is not kept then.
    is_too_long: bool,
}

impl Requests {
    /// Reads a piece. `on_line` is called with each line that ends in it, without its end; `None` is
    /// one that was too long.
    pub fn read(&mut self, mut piece: &[u8], mut on_line: impl FnMut(Option<&[u8]>)) {
        while let Some(at) = piece
            .iter()
            .position(|byte| [b'\n', DELIMITER].contains(byte))
        {
            self.append(&piece[..at]);
            if piece[at] == b'\n' {
                if self.is_too_long {
                    on_line(None);
                } else if !self.line.iter().all(u8::is_ascii_whitespace) {
                    on_line(Some(&self.line));
                }
            }
            self.forget();
            piece = &piece[at + 1..];
        }
        self.append(piece);
    }

    fn append(&mut self, bytes: &[u8]) {
        self.is_too_long |= self.line.len() + bytes.len() > LINE_BYTES_MAX;
        match self.is_too_long {
            true => self.line = Vec::new(),
            false => self.line.extend_from_slice(bytes),
        }
    }

    fn forget(&mut self) {
        self.is_too_long = false;
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&[u8]]) -> Vec<Option<Vec<u8>>> {
        let (mut requests, mut lines) = (Requests::default(), Vec::new());
        for piece in pieces {
            requests.read(piece, |line| lines.push(line.map(<[u8]>::to_vec)));
        }
        lines
    }

    #[test]
    fn lines_come_in_pieces_of_any_size() {
        let text = b"{\"a\": 1}\n\n  \r\n{\"b\": 2}\n{\"half";
        let whole = read(&[text]);
        assert_eq!(
            whole,
            [Some(b"{\"a\": 1}".to_vec()), Some(b"{\"b\": 2}".to_vec())]
        );
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(read(&bytes), whole);
    }

    #[test]
    fn a_delimiter_takes_back_what_was_before_it() {
        let lines = read(&[b"{\"lost", b"\xff{\"a\": 1}\n\xff\xff", b"\n{}\n"]);
        assert_eq!(lines, [Some(b"{\"a\": 1}".to_vec()), Some(b"{}".to_vec())]);
    }

    #[test]
    fn a_line_that_is_too_long_is_not_kept() {
        let long = vec![b'x'; LINE_BYTES_MAX / 2 + 1];
        let lines = read(&[&long, &long, &long, b"\n{}\n"]);
        assert_eq!(lines, [None, Some(b"{}".to_vec())]);
        let lines = read(&[&long, &long, b"\xff{}\n"]);
        assert_eq!(lines, [Some(b"{}".to_vec())]);
    }
}
