//! A machine's output: every byte has a permanent offset, so that moves preserve order
//! without duplicates or losses, and readers can continue at their offset.
//!
//! Format: consecutive records of `stream (u8: 1 output, 2 error, 3 time), length (u32,
//! little-endian), bytes`. The newest [`SEGMENT_BYTES_MAX`] to twice that are kept, in
//! two files. See `time` for time records.

mod hold;
mod record_boundary;
mod sink;
mod time;

use hold::Hold;
use keel_store::clock::unix_ms;
use record_boundary::Boundary;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub use sink::{LogSink, OutputRate, delay_of_held_output};
pub use time::offset_behind;

/// Size limit of one file of the log.
pub const SEGMENT_BYTES_MAX: u64 = 32 << 20;
/// Files of one log.
const SEGMENTS_MAX: usize = 2;
/// Size of a record's header.
pub const HEADER_BYTES: usize = 5;
/// Offsets of the output of one life of a machine: after a failover output begins at the next
/// multiple, so that offsets of output that was not copied from the failed node are never used
/// again. 1 TiB.
pub const LIFE_BYTES: u64 = 1 << 40;
/// Maximum size of a record's text.
const RECORD_BYTES_MAX: usize = 64 << 10;

/// The stream of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum StreamKind {
    /// Standard output.
    Output = 1,
    /// Standard error.
    Error = 2,
}

#[derive(Debug)]
struct Segment {
    base: u64,
    file: File,
    path: PathBuf,
}

impl Segment {
    /// Offset behind the last byte of one that is complete.
    fn end(&self) -> std::io::Result<u64> {
        Ok(self.base + self.file.metadata()?.len())
    }
}

#[derive(Debug)]
struct State {
    /// Oldest first; at most [`SEGMENTS_MAX`]. There may be gaps between them.
    segments: Vec<Segment>,
    end: u64,
    /// Tracks record ends: output from another node arrives in pieces of any size.
    boundary: Boundary,
    /// Output that readers do not see yet.
    hold: Option<Hold>,
    closed: bool,
    /// The last time record written here, in milliseconds since 1970-01-01 UTC.
    marked: Option<u64>,
}

impl State {
    /// Offset behind the last byte that readers may see.
    fn shown_end(&self) -> u64 {
        let held = self.hold.as_ref().map(Hold::shown);
        held.map_or(self.end, |shown| shown.min(self.end))
    }

    /// Whether the next bytes go into a new file.
    fn segment_is_full(&self) -> bool {
        let last = self.segments.last();
        last.is_some_and(|last| self.end - last.base >= SEGMENT_BYTES_MAX)
    }
}

/// The log of one machine on one node.
#[derive(Debug)]
pub struct Log {
    folder: PathBuf,
    /// The folder as text.
    place: String,
    state: Mutex<State>,
    grown: Condvar,
}

impl Log {
    /// Opens the log in a folder, or creates one whose first byte has offset `base`. An
    /// incomplete record of a dead process is truncated.
    ///
    /// # Errors
    /// That of the file system.
    pub fn open(folder: &Path, base: u64) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut segments = segments_of(folder, open_file)?;
        if segments.is_empty() {
            segments.push(new_segment(folder, base)?);
        }
        let end = match segments.last() {
            Some(last) => {
                let whole = whole_records(&last.file)?;
                last.file.set_len(whole)?;
                last.base + whole
            }
            None => base,
        };
        let hold = Hold::found(folder, true)?;
        Ok(Log::of(folder, segments, end, hold))
    }

    /// The present content of a log that another process may be writing or creating:
    /// nothing is changed, and nothing can be added. Empty if the log does not exist.
    ///
    /// # Errors
    /// That of the file system.
    pub fn open_read_only(folder: &Path) -> std::io::Result<Self> {
        let segments = match segments_of(folder, |path| File::open(path)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !folder.exists() => {
                Vec::new()
            }
            segments => segments?,
        };
        let end = match segments.last() {
            Some(last) => last.base + whole_records(&last.file)?,
            None => 0,
        };
        let hold = Hold::found(folder, false)?;
        let log = Log::of(folder, segments, end, hold);
        log.close();
        Ok(log)
    }

    fn of(folder: &Path, segments: Vec<Segment>, end: u64, hold: Option<Hold>) -> Self {
        Log {
            folder: folder.to_owned(),
            place: folder.display().to_string(),
            state: Mutex::new(State {
                segments,
                end,
                boundary: Boundary::default(),
                hold,
                closed: false,
                marked: None,
            }),
            grown: Condvar::new(),
        }
    }

    /// Its folder, as text.
    pub fn place(&self) -> &str {
        &self.place
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|error| error.into_inner())
    }

    /// Offset of the first byte that is kept.
    pub fn base(&self) -> u64 {
        self.state().segments.first().map_or(0, |first| first.base)
    }

    /// Offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.state().end
    }

    /// Appends a record.
    ///
    /// # Errors
    /// That of the file system; nothing was appended then.
    pub fn append(&self, stream: StreamKind, text: &[u8]) -> std::io::Result<()> {
        self.append_at(stream, text, unix_ms())
    }

    /// As [`Self::append`], at a time in milliseconds since 1970-01-01 UTC.
    fn append_at(&self, stream: StreamKind, text: &[u8], now: u64) -> std::io::Result<()> {
        if let Some((first, rest)) = text.split_at_checked(RECORD_BYTES_MAX)
            && !rest.is_empty()
        {
            self.append_at(stream, first, now)?;
            return self.append_at(stream, rest, now);
        }
        let mut record = Vec::with_capacity(2 * HEADER_BYTES + 16 + text.len());
        // Two streams write concurrently: the end is determined under the lock.
        let mut state = self.state();
        let marks = state.segment_is_full() || time::is_due(state.marked, now);
        if marks {
            record.extend(time::mark(now, state.end));
        }
        record.push(stream as u8);
        record.extend((text.len() as u32).to_le_bytes());
        record.extend(text);
        self.add(&mut state, &record)?;
        if marks {
            state.marked = Some(now);
        }
        Ok(())
    }

    /// Writes bytes of whole records at an offset: at the end, or before it if they are
    /// known already (a move resends what it is unsure of).
    ///
    /// # Errors
    /// `InvalidInput` for an offset behind the end, and those of the file system.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let mut state = self.state();
        if offset > state.end {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                format!("output has a gap from {} to {offset}", state.end),
            ));
        }
        let known = usize::try_from(state.end - offset).unwrap_or(usize::MAX);
        let Some(new) = bytes.get(known..).filter(|new| !new.is_empty()) else {
            return Ok(());
        };
        self.add(&mut state, new)
    }

    /// Continues the log at an offset, which is the start of a record: output between its
    /// end and there is kept nowhere. Its content stays, unless it ends within a record. No effect
    /// if the log extends beyond the offset.
    ///
    /// # Errors
    /// That of the file system; nothing changed then.
    pub fn begin_at(&self, offset: u64) -> std::io::Result<()> {
        let mut state = self.state();
        if offset <= state.end {
            return Ok(());
        }
        let segment = new_segment(&self.folder, offset)?;
        let kept = match state.boundary.is_here() {
            true => state.segments.len().min(SEGMENTS_MAX - 1),
            false => 0,
        };
        let dropped = state.segments.len() - kept;
        for old in state.segments.drain(..dropped) {
            remove_segment(&old);
        }
        state.segments.push(segment);
        state.end = offset;
        state.boundary = Boundary::default();
        self.grown.notify_all();
        Ok(())
    }

    /// Appends bytes, in a new file if the last one is full and a record ends.
    fn add(&self, state: &mut State, new: &[u8]) -> std::io::Result<()> {
        if state.segment_is_full() && !state.boundary.is_here() {
            let (rest, new) = new.split_at(state.boundary.rest(new));
            self.add_to_last(state, rest)?;
            return match new.is_empty() {
                true => Ok(()),
                false => self.add(state, new),
            };
        }
        if state.segment_is_full() {
            let segment = new_segment(&self.folder, state.end)?;
            state.segments.push(segment);
            if state.segments.len() > SEGMENTS_MAX {
                remove_segment(&state.segments.remove(0));
            }
        }
        self.add_to_last(state, new)
    }

    fn add_to_last(&self, state: &mut State, new: &[u8]) -> std::io::Result<()> {
        let end = state.end;
        if let Some(last) = state.segments.last()
            && let Err(error) = last.file.write_all_at(new, end - last.base)
        {
            // Part of it may have been written: a later process takes the file's length
            // as the end.
            let _ = last.file.set_len(end - last.base);
            return Err(error);
        }
        state.end = end + new.len() as u64;
        state.boundary.advance(new);
        self.grown.notify_all();
        Ok(())
    }

    /// Drops all output from an offset on, which is the start of a record or the end of one. No
    /// effect if the log ends before it.
    ///
    /// # Errors
    /// That of the file system.
    pub fn cut(&self, offset: u64) -> std::io::Result<()> {
        let mut state = self.state();
        if offset >= state.end {
            return Ok(());
        }
        while state.segments.len() > 1
            && let Some(last) = state.segments.pop_if(|last| last.base >= offset)
        {
            remove_segment(&last);
        }
        if let Some(last) = state.segments.last() {
            let end = offset.max(last.base).min(last.end()?);
            last.file.set_len(end - last.base)?;
            state.end = end;
        }
        state.boundary = Boundary::default();
        Ok(())
    }

    /// Writes all of it to the disk.
    ///
    /// # Errors
    /// That of the file system.
    pub fn sync(&self) -> std::io::Result<()> {
        let state = self.state();
        for segment in &state.segments {
            segment.file.sync_data()?;
        }
        File::open(&self.folder)?.sync_all()
    }

    /// Bytes from `offset` on, at most `max`; empty at the end. For an offset that is not
    /// kept, reading starts at the next one that is. Returns the offset, too.
    ///
    /// # Errors
    /// That of the file system.
    pub fn read(&self, offset: u64, max: usize) -> std::io::Result<(u64, Vec<u8>)> {
        let state = self.state();
        let mut offset = offset.max(state.segments.first().map_or(0, |first| first.base));
        let position = state
            .segments
            .iter()
            .rposition(|segment| segment.base <= offset);
        let Some(position) = position else {
            return Ok((offset, Vec::new()));
        };
        let mut segment = &state.segments[position];
        let mut limit = state.end;
        if let Some(next) = state.segments.get(position + 1) {
            limit = segment.end()?.min(next.base);
            // Behind it is a gap.
            if offset >= limit {
                offset = next.base;
                segment = next;
                limit = match state.segments.get(position + 2) {
                    Some(_) => next.end()?,
                    None => state.end,
                };
            }
        }
        let count = usize::try_from(limit.saturating_sub(offset))
            .unwrap_or(max)
            .min(max);
        let mut bytes = vec![0; count];
        segment
            .file
            .read_exact_at(&mut bytes, offset - segment.base)?;
        Ok((offset, bytes))
    }

    /// Waits until readers may see bytes at `offset`, the log is closed, or the timeout
    /// expires.
    pub fn wait(&self, offset: u64, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        while state.shown_end() <= offset && !state.closed {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return;
            }
            state = self
                .grown
                .wait_timeout(state, rest)
                .unwrap_or_else(|error| error.into_inner())
                .0;
        }
    }

    /// Whether no further output is written here.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Further output is written here after all.
    pub fn open_again(&self) {
        self.state().closed = false;
    }

    /// Wakes waiting readers: no further output is written here.
    pub fn close(&self) {
        self.state().closed = true;
        self.grown.notify_all();
    }
}

/// The offset at which the output of a machine begins that goes on on another node after so many
/// failures of its nodes, from a checkpoint whose output ended at `offset` (0 if it begins anew). No
/// earlier life used it or one behind it: each began at its own multiple, at most.
pub fn next_life(offset: u64, failovers: u32) -> u64 {
    let lives = (offset / LIFE_BYTES + 1).max(failovers.into());
    lives.saturating_mul(LIFE_BYTES)
}

fn remove_segment(segment: &Segment) {
    if let Err(error) = std::fs::remove_file(&segment.path) {
        tracing::warn!(%error, path = %segment.path.display(), "cannot remove old output");
    }
}

/// Segments in a folder, in order.
fn segments_of(
    folder: &Path,
    open: impl Fn(&Path) -> std::io::Result<File>,
) -> std::io::Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let found = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix("log."))
            .and_then(|base| base.parse().ok());
        if let Some(base) = found {
            let file = open(&path)?;
            segments.push(Segment { base, file, path });
        }
    }
    segments.sort_by_key(|segment| segment.base);
    Ok(segments)
}

/// Bytes of the complete records in a segment, which starts with one.
fn whole_records(file: &File) -> std::io::Result<u64> {
    let length = file.metadata()?.len();
    let mut at = 0;
    let mut header = [0; HEADER_BYTES];
    while at + HEADER_BYTES as u64 <= length {
        file.read_exact_at(&mut header, at)?;
        let text = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
        let next = at + HEADER_BYTES as u64 + u64::from(text);
        if next > length {
            break;
        }
        at = next;
    }
    Ok(at)
}

fn open_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn new_segment(folder: &Path, base: u64) -> std::io::Result<Segment> {
    let path = folder.join(format!("log.{base}"));
    Ok(Segment {
        base,
        file: open_file(&path)?,
        path,
    })
}

/// Removes complete records from the front of `bytes`; time records are omitted.
pub fn split_records(bytes: &mut Vec<u8>) -> Vec<(StreamKind, Vec<u8>)> {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some(header) = bytes.get(at..at + HEADER_BYTES) {
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let Some(text) = bytes.get(at + HEADER_BYTES..at + HEADER_BYTES + length) else {
            break;
        };
        let stream = match header[0] {
            kind if kind == StreamKind::Error as u8 => Some(StreamKind::Error),
            time::KIND => None,
            _ => Some(StreamKind::Output),
        };
        if let Some(stream) = stream {
            records.push((stream, text.to_vec()));
        }
        at += HEADER_BYTES + length;
    }
    bytes.drain(..at);
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_records_are_truncated() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 7).unwrap();
        log.append_at(StreamKind::Output, b"one\n", 1000).unwrap();
        let whole = log.end();
        log.append_at(StreamKind::Output, b"two\n", 1000).unwrap();
        let path = folder.path().join("log.7");
        let bytes = std::fs::read(&path).unwrap();
        for length in whole - 7..bytes.len() as u64 {
            std::fs::write(&path, &bytes[..length as usize]).unwrap();
            let log = Log::open(folder.path(), 0).unwrap();
            assert_eq!((log.base(), log.end()), (7, whole), "{length}");
            log.append(StreamKind::Error, b"3\n").unwrap();
            let (_, mut text) = log.read(7, 1000).unwrap();
            let records = split_records(&mut text);
            assert_eq!(records.len(), 2, "{length}");
            assert_eq!(records[1], (StreamKind::Error, b"3\n".to_vec()));
        }
    }

    /// A move's target receives pieces of any size; a file that began within a record
    /// would be truncated at its beginning when reopened.
    #[test]
    fn files_begin_with_a_record() {
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let log = Log::open(source.path(), 0).unwrap();
        let text = [b'x'; 60_001];
        while log.end() < SEGMENT_BYTES_MAX + (3 << 20) {
            log.append_at(StreamKind::Output, &text, 1000).unwrap();
        }
        let copy = Log::open(target.path(), 0).unwrap();
        while copy.end() < log.end() {
            let (offset, bytes) = log.read(copy.end(), 64 << 10).unwrap();
            copy.write_at(offset, &bytes).unwrap();
        }
        assert_eq!(copy.state().segments.len(), 2);
        drop(copy);
        let (left, opened) = (
            Log::open_read_only(target.path()).unwrap(),
            Log::open(target.path(), 0).unwrap(),
        );
        assert_eq!((left.end(), opened.end()), (log.end(), log.end()));
    }

    #[test]
    fn reading_a_log_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        // The log is created with a base other than the machine's first byte.
        let there = folder.path().join("m");
        assert_eq!(Log::open_read_only(&there).unwrap().end(), 0);
        assert!(!there.exists());
        std::fs::create_dir(&there).unwrap();
        assert_eq!(Log::open_read_only(&there).unwrap().end(), 0);
        assert_eq!(std::fs::read_dir(&there).unwrap().count(), 0);
        let log = Log::open(&there, 500).unwrap();
        let texts: Vec<String> = (0..20_000).map(|it| format!("line {it}\n")).collect();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut seen = 500;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let left = Log::open_read_only(&there).unwrap();
                    assert!(left.is_closed() && left.end() >= seen);
                    seen = left.end();
                    let (offset, mut bytes) = left.read(0, 1 << 30).unwrap();
                    assert_eq!((offset, offset + bytes.len() as u64), (500, seen));
                    split_records(&mut bytes);
                    assert!(bytes.is_empty(), "whole records");
                    assert!(left.append(StreamKind::Output, b"no").is_err());
                }
            });
            for text in &texts {
                log.append(StreamKind::Output, text.as_bytes()).unwrap();
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let (_, mut bytes) = Log::open_read_only(&there)
            .unwrap()
            .read(500, 1 << 30)
            .unwrap();
        let written: Vec<u8> = split_records(&mut bytes)
            .into_iter()
            .flat_map(|(_, text)| text)
            .collect();
        assert!(written == texts.concat().into_bytes());
    }

    #[test]
    fn concurrent_streams_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        std::thread::scope(|scope| {
            for (stream, letter) in [(StreamKind::Output, b'o'), (StreamKind::Error, b'e')] {
                let log = &log;
                scope.spawn(move || {
                    for round in 0..5000usize {
                        log.append(stream, &vec![letter; 1 + round % 40]).unwrap();
                    }
                });
            }
        });
        let mut bytes = Vec::new();
        while let (_, piece) = log.read(bytes.len() as u64, 1 << 16).unwrap()
            && !piece.is_empty()
        {
            bytes.extend(piece);
        }
        for (stream, letter) in [(StreamKind::Output, b'o'), (StreamKind::Error, b'e')] {
            let records = split_records(&mut bytes.clone());
            let lengths: Vec<usize> = records
                .iter()
                .filter(|(kind, _)| *kind == stream)
                .map(|(_, text)| {
                    assert!(text.iter().all(|byte| *byte == letter));
                    text.len()
                })
                .collect();
            let expected: Vec<usize> = (0..5000).map(|round| 1 + round % 40).collect();
            assert_eq!(lengths, expected);
        }
    }

    #[test]
    fn offsets_survive_segments_and_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 100).unwrap();
        log.append_at(StreamKind::Output, b"one", 1000).unwrap();
        log.append_at(StreamKind::Error, b"two", 1000).unwrap();
        let end = log.end();
        // One time record, two text records.
        assert_eq!(end, 100 + 21 + 16);
        drop(log);
        let log = Log::open(folder.path(), 0).unwrap();
        assert_eq!((log.base(), log.end()), (100, end));
        let (offset, mut bytes) = log.read(0, 1000).unwrap();
        assert_eq!(offset, 100);
        assert_eq!(
            split_records(&mut bytes),
            [
                (StreamKind::Output, b"one".to_vec()),
                (StreamKind::Error, b"two".to_vec())
            ]
        );
        // Known bytes are not added again, a gap is refused.
        let (_, again) = log.read(121, 8).unwrap();
        log.write_at(121, &again).unwrap();
        assert_eq!(log.end(), end);
        assert!(log.write_at(end + 1, b"x").is_err());
    }

    /// All output, and the offsets at which it begins anew.
    fn pieces(log: &Log) -> Vec<(u64, Vec<u8>)> {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut at = 0;
        loop {
            let (offset, bytes) = log.read(at, 7).unwrap();
            if bytes.is_empty() {
                return pieces;
            }
            match pieces.last_mut() {
                Some((_, last)) if offset == at => last.extend(&bytes),
                _ => pieces.push((offset, bytes.clone())),
            }
            at = offset + bytes.len() as u64;
        }
    }

    #[test]
    fn output_of_the_next_life_begins_behind_a_gap_and_the_older_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        log.append_at(StreamKind::Output, b"kept", 1).unwrap();
        let end = log.end();
        log.append_at(StreamKind::Output, b"undone", 2).unwrap();
        log.cut(end).unwrap();
        assert_eq!(log.end(), end);
        let before = pieces(&log);
        let next = next_life(end, 1);
        assert_eq!(next, LIFE_BYTES);
        // It began anew, twice: the second time not where the first one did.
        assert_eq!(
            (next_life(0, 1), next_life(0, 2)),
            (LIFE_BYTES, 2 * LIFE_BYTES)
        );
        assert_eq!(next_life(LIFE_BYTES + 7, 2), 2 * LIFE_BYTES);
        log.begin_at(next).unwrap();
        log.append_at(StreamKind::Output, b"new", 3).unwrap();
        let expected = [&before[..], &[(next, log.read(next, 99).unwrap().1)]].concat();
        assert_eq!(pieces(&log), expected);
        // A reader that saw what is undone goes on with what is new.
        assert_eq!(log.read(end + 3, 99).unwrap().0, next);
        drop(log);
        let log = Log::open(folder.path(), 0).unwrap();
        assert_eq!(pieces(&log), expected);
        assert_eq!(Log::open_read_only(folder.path()).unwrap().end(), log.end());
        // The second failover: the oldest goes.
        let end = log.end();
        log.begin_at(next_life(end, 2)).unwrap();
        log.append_at(StreamKind::Output, b"newest", 4).unwrap();
        assert_eq!(pieces(&log).len(), 2);
        assert_eq!(log.base(), next);
        assert_eq!(pieces(&log)[1].0, 2 * LIFE_BYTES);
        log.sync().unwrap();
        // Cut down to the life before, and to nothing.
        log.cut(end).unwrap();
        assert_eq!((pieces(&log).len(), log.end()), (1, end));
        log.cut(0).unwrap();
        assert_eq!((pieces(&log).len(), log.end()), (0, next));
    }

    #[test]
    fn old_segments_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        let text = vec![b'x'; 1 << 20];
        for _ in 0..80 {
            log.append(StreamKind::Output, &text).unwrap();
        }
        assert!(log.base() > 0 && log.end() - log.base() <= 3 * SEGMENT_BYTES_MAX);
        let mut at = log.base();
        let mut rest = Vec::new();
        let mut records = 0;
        while at < log.end() {
            let (offset, bytes) = log.read(at, 1 << 20).unwrap();
            assert_eq!(offset, at);
            at += bytes.len() as u64;
            rest.extend(bytes);
            for (_, record) in split_records(&mut rest) {
                // Long records are split.
                assert!(record == text[..RECORD_BYTES_MAX]);
                records += 1;
            }
        }
        assert!(rest.is_empty() && records >= 32 * 16);
    }
}
