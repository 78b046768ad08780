//! Times of output: records of a third kind between the text, each with the wall clock of
//! the node where the machine ran (milliseconds since 1970-01-01 UTC, 8 bytes,
//! little-endian) and its own offset in the log (8 bytes; an older version wrote none), by which
//! readers that count bytes know where they are after output that is kept nowhere.
//!
//! They are part of the log, so they move and are removed with it, and can never disagree
//! with it. One precedes text that is written [`EVERY_MS`] or more after the previous
//! one, and is the first record of each file that is created here: at most 210 bytes per
//! second. A search by time reads the kept output, whose size is bounded.

use super::{HEADER_BYTES, Log};

/// The kind of these records.
pub(super) const KIND: u8 = 3;
/// Resolution of times, in milliseconds.
const EVERY_MS: u64 = 100;
/// Bytes read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Whether a time record is due, given the last one.
pub(super) fn is_due(last: Option<u64>, now_unix_ms: u64) -> bool {
    // A clock that was set back starts anew.
    last.is_none_or(|last| now_unix_ms < last || now_unix_ms - last >= EVERY_MS)
}

/// An encoded time record at an offset.
pub(super) fn mark(now_unix_ms: u64, offset: u64) -> [u8; HEADER_BYTES + 16] {
    let mut record = [0; HEADER_BYTES + 16];
    record[0] = KIND;
    record[1..HEADER_BYTES].copy_from_slice(&16u32.to_le_bytes());
    record[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(&now_unix_ms.to_le_bytes());
    record[HEADER_BYTES + 8..].copy_from_slice(&offset.to_le_bytes());
    record
}

/// Offset behind some bytes that begin with a record, if one of their records says where it is.
pub fn offset_behind(bytes: &[u8]) -> Option<u64> {
    let (mut at, mut found) = (0, None);
    while let Some((kind, text, length)) = record(&bytes[at..]) {
        if kind == KIND
            && let Some((_, offset)) = text.split_at_checked(8)
            && let Ok(offset) = offset.try_into().map(u64::from_le_bytes)
        {
            found = offset.checked_add((bytes.len() - at) as u64);
        }
        at += length;
    }
    found
}

impl Log {
    /// Offset of the first output written at a time (milliseconds since 1970-01-01 UTC)
    /// or later, exact to a tenth of a second; the end of what readers may see if there is none.
    /// Rather a little too early than too late.
    ///
    /// # Errors
    /// That of the file system.
    pub fn offset_since(&self, since_unix_ms: u64) -> std::io::Result<u64> {
        // Before: what is shown meanwhile is behind it.
        let limit = self.shown_end();
        Ok(self.any_offset_since(since_unix_ms)?.min(limit))
    }

    fn any_offset_since(&self, since_unix_ms: u64) -> std::io::Result<u64> {
        let mut at = self.base();
        let mut first = true;
        let mut bytes = Vec::new();
        loop {
            let (offset, more) = self.read(at + bytes.len() as u64, CHUNK_BYTES)?;
            if more.is_empty() {
                return Ok(at);
            }
            // The oldest part was dropped meanwhile: the next one begins with a record.
            if offset != at + bytes.len() as u64 {
                bytes.clear();
                at = offset;
                first = true;
            }
            bytes.extend(more);
            let mut taken = 0;
            while let Some((kind, text, length)) = record(&bytes[taken..]) {
                if kind == KIND
                    && let Some(written) = text.first_chunk().copied().map(u64::from_le_bytes)
                {
                    // Text before the first time record is as old as that or older.
                    if std::mem::take(&mut first) && written > since_unix_ms {
                        return Ok(self.base());
                    }
                    if written.saturating_add(EVERY_MS) > since_unix_ms {
                        return Ok(at + taken as u64);
                    }
                }
                taken += length;
            }
            bytes.drain(..taken);
            at += taken as u64;
        }
    }
}

/// The first record of some bytes: its kind, its text, its length.
fn record(bytes: &[u8]) -> Option<(u8, &[u8], usize)> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    Some((header[0], rest.get(..length)?, HEADER_BYTES + length))
}

#[cfg(test)]
mod tests {
    use super::super::{SEGMENT_BYTES_MAX, StreamKind, split_records};
    use super::*;

    fn text_since(log: &Log, since: u64) -> String {
        let mut at = log.offset_since(since).unwrap();
        let mut bytes = Vec::new();
        while let (offset, more) = log.read(at, 1 << 16).unwrap()
            && !more.is_empty()
        {
            at = offset + more.len() as u64;
            bytes.extend(more);
        }
        let records = split_records(&mut bytes);
        assert!(bytes.is_empty());
        let text = records.into_iter().flat_map(|(_, text)| text).collect();
        String::from_utf8(text).unwrap()
    }

    /// A log with a word at each of these times.
    fn log(folder: &std::path::Path, words: &[(u64, &str)]) -> Log {
        let log = Log::open(folder, 0).unwrap();
        for (now, word) in words {
            log.append_at(StreamKind::Output, word.as_bytes(), *now)
                .unwrap();
        }
        log
    }

    #[test]
    fn output_is_found_by_time() {
        let folder = tempfile::tempdir().unwrap();
        let words = [
            (1000, "a"),
            (1050, "b"),
            (1100, "c"),
            (9000, "d"),
            (9050, "e"),
        ];
        let log = log(folder.path(), &words);
        for (since, text) in [
            (0, "abcde"),
            (1000, "abcde"),
            // Exact to a tenth of a second, and never too late.
            (1099, "abcde"),
            (1101, "cde"),
            (1300, "de"),
            (9000, "de"),
            (9099, "de"),
            (9101, ""),
            (u64::MAX, ""),
        ] {
            assert_eq!(text_since(&log, since), text, "{since}");
        }
        // After reopening there is a time record at once.
        drop(log);
        let log = Log::open(folder.path(), 0).unwrap();
        log.append_at(StreamKind::Error, b"f", 9060).unwrap();
        assert_eq!(text_since(&log, 1300), "def");
        // A clock that was set back has its own times.
        log.append_at(StreamKind::Error, b"g", 500).unwrap();
        log.append_at(StreamKind::Error, b"h", 20_000).unwrap();
        assert_eq!(text_since(&log, 10_000), "h");
    }

    /// A reader that lost output, or began with the oldest that is kept, knows where it is.
    #[test]
    fn readers_learn_their_offset() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 500).unwrap();
        for now in [1000, 1010, 5000] {
            log.append_at(StreamKind::Output, b"text", now).unwrap();
        }
        log.begin_at(9000).unwrap();
        log.append_at(StreamKind::Output, b"later", 9000).unwrap();
        let mut at = 0;
        let mut told = Vec::new();
        while let (offset, bytes) = log.read(at, 1 << 16).unwrap()
            && !bytes.is_empty()
        {
            at = offset + bytes.len() as u64;
            assert_eq!(offset_behind(&bytes), Some(at));
            // Up to within a record, too.
            assert_eq!(offset_behind(&bytes[..bytes.len() - 2]), Some(at - 2));
            told.push(at);
        }
        assert_eq!(told.last(), Some(&log.end()));
        assert_eq!(offset_behind(b""), None);
        assert_eq!(offset_behind(b"\x01\x02\0\0\0ab"), None);
        // Of an older version.
        assert_eq!(offset_behind(b"\x03\x08\0\0\0\0\0\0\0\0\0\0\0"), None);
        assert_eq!(offset_behind(&[KIND, 0xff, 0xff, 0xff, 0xff, 1]), None);
    }

    #[test]
    fn times_move_with_the_log() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = log(here.path(), &[(1000, "a"), (5000, "b")]);
        let target = Log::open(there.path(), 0).unwrap();
        let (offset, bytes) = source.read(0, 1 << 16).unwrap();
        target.write_at(offset, &bytes).unwrap();
        target.append_at(StreamKind::Output, b"c", 5010).unwrap();
        assert_eq!(text_since(&target, 3000), "bc");
        assert_eq!(
            target.offset_since(3000).unwrap(),
            source.offset_since(3000).unwrap()
        );
    }

    #[test]
    fn times_survive_dropped_output() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        let text = vec![b'x'; 1 << 20];
        let count = (3 * SEGMENT_BYTES_MAX) >> 20;
        for number in 0..count {
            log.append_at(StreamKind::Output, &text, 1000 + number)
                .unwrap();
        }
        assert!(log.base() > 0);
        let (offset, first) = log.read(0, HEADER_BYTES).unwrap();
        assert_eq!((offset, first[0]), (log.base(), KIND));
        assert_eq!(log.offset_since(0).unwrap(), log.base());
        assert_eq!(log.offset_since(5000).unwrap(), log.end());
    }

    #[test]
    fn output_without_times_is_included_with_newer_output() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        let mut old = vec![StreamKind::Output as u8];
        old.extend(3u32.to_le_bytes());
        old.extend(b"old");
        log.write_at(0, &old).unwrap();
        assert_eq!(text_since(&log, 500), "");
        log.append_at(StreamKind::Output, b"new", 1000).unwrap();
        assert_eq!(text_since(&log, 500), "oldnew");
        assert_eq!(text_since(&log, 1000), "new");
    }
}
