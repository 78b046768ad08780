//! The files of events: one line of JSON each, in two files of bounded size. The older file is
//! deleted when the newer is full. An incomplete last line, after a power failure or on a full
//! disk, is truncated; an invalid line is skipped.

use keel_api::Event;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Result, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes of one of the two files.
pub(crate) const FILE_BYTES_MAX: u64 = 4 << 20;
/// Bytes at the end of a file that are searched for the start of its last line. Lines are shorter;
/// see `Note`.
const TAIL_BYTES: u64 = 64 << 10;

const NEWER: &str = "events.jsonl";
const OLDER: &str = "events.1.jsonl";

/// The current file.
#[derive(Debug)]
pub(crate) struct EventFile {
    folder: PathBuf,
    file: File,
    bytes: u64,
    /// Id of the newest event.
    last: u64,
}

impl EventFile {
    /// Opens or creates the files in a folder.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let file = open(&folder.join(NEWER))?;
        let bytes = whole(&file)?;
        file.set_len(bytes)?;
        let mut newest = Newest::new(1, |_| true);
        newest.read(folder)?;
        Ok(EventFile {
            folder: folder.to_owned(),
            file,
            bytes,
            last: newest.events.back().map_or(0, |event| event.id),
        })
    }

    /// Assigns an id to an event and writes it. The id is its time in microseconds, or the last id
    /// plus one if that is greater: so ids increase even if clocks are set back or the files were
    /// deleted.
    ///
    /// # Errors
    /// I/O errors; the event keeps its id, and an incomplete line is truncated.
    pub(crate) fn add(&mut self, event: &mut Event) -> Result<()> {
        self.last = (self.last + 1).max(event.at_unix_ms.saturating_mul(1000));
        event.id = self.last;
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        if self.bytes > 0 && self.bytes + line.len() as u64 > FILE_BYTES_MAX {
            let newer = self.folder.join(NEWER);
            std::fs::rename(&newer, self.folder.join(OLDER))?;
            self.file = open(&newer)?;
            self.bytes = 0;
        }
        if let Err(error) = self.file.write_all_at(&line, self.bytes) {
            // An incomplete line would corrupt the next one.
            self.file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes += line.len() as u64;
        Ok(())
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// Length of the complete lines in a file.
fn whole(mut file: &File) -> Result<u64> {
    let end = file.metadata()?.len();
    let start = end.saturating_sub(TAIL_BYTES);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(start))?;
    file.take(TAIL_BYTES).read_to_end(&mut tail)?;
    Ok(match tail.iter().rposition(|byte| *byte == b'\n') {
        Some(at) => start + at as u64 + 1,
        None => start,
    })
}

/// Reads lines up to the end of a file. One without its own end is being written, or incomplete:
/// nothing is read behind it, or it alone would be missing once the rest has been written.
fn whole_lines(mut lines: impl BufRead, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
        take(&line);
        line.clear();
    }
    Ok(())
}

/// The newest stored events that match.
pub(crate) struct Newest<F> {
    /// Oldest first.
    pub(crate) events: VecDeque<Event>,
    /// Whether there were more.
    pub(crate) left_out: bool,
    count_max: usize,
    fits: F,
}

impl<F: Fn(&Event) -> bool> Newest<F> {
    pub(crate) fn new(count_max: usize, fits: F) -> Self {
        Newest {
            events: VecDeque::new(),
            left_out: false,
            count_max,
            fits,
        }
    }

    /// Reads both files. Safe beside a writer: a concurrent event may or may not be included.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn read(&mut self, folder: &Path) -> Result<()> {
        // The newer one is opened first: if the files rotate now, it is read twice rather than
        // skipped.
        let newer = File::open(folder.join(NEWER));
        let older = File::open(folder.join(OLDER));
        let mut last = 0;
        for file in [older, newer] {
            let file = match file {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            whole_lines(BufReader::new(file), |line| {
                if let Ok(event) = serde_json::from_slice::<Event>(line)
                    && event.id > last
                {
                    last = event.id;
                    self.take(event);
                }
            })?;
        }
        Ok(())
    }

    fn take(&mut self, event: Event) {
        if !(self.fits)(&event) {
            return;
        }
        if self.events.len() == self.count_max {
            self.events.pop_front();
            self.left_out = true;
        }
        self.events.push_back(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_api::EventKind;
    use std::io::Write;

    fn event(number: u64) -> Event {
        Event {
            id: 0,
            at_unix_ms: 1000,
            node: "a".into(),
            machine: (number % 2 == 1).then(|| "odd".into()),
            epoch: None,
            kind: EventKind::NodeStarted,
            text: format!("event {number}"),
            fields: [("number".to_owned(), number.to_string())].into(),
        }
    }

    fn numbers(folder: &Path) -> Vec<u64> {
        let mut newest = Newest::new(usize::MAX, |_| true);
        newest.read(folder).unwrap();
        newest
            .events
            .iter()
            .map(|event| event.fields["number"].parse().unwrap())
            .collect()
    }

    /// A file to which more is written each time its end is reached.
    struct Growing<'a>(VecDeque<&'a [u8]>);

    impl std::io::Read for Growing<'_> {
        fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
            let piece = self.0.pop_front().unwrap_or_default();
            bytes[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        }
    }

    #[test]
    fn a_line_that_is_being_written_is_not_skipped_for_later_ones() {
        let file = Growing([&b"a\nbb\nc"[..], b"", b"cc\nd\n"].into());
        let mut found = Vec::new();
        whole_lines(BufReader::new(file), |line| found.push(line.to_vec())).unwrap();
        assert_eq!(found, [&b"a\n"[..], b"bb\n"]);
    }

    #[test]
    fn ids_rise_over_restarts_and_clocks_set_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut ids = Vec::new();
        for (number, at) in [(0, 5000), (1, 5000), (2, 10), (3, 6000)] {
            let mut file = EventFile::open(folder.path()).unwrap();
            let mut event = Event {
                at_unix_ms: at,
                ..event(number)
            };
            file.add(&mut event).unwrap();
            ids.push(event.id);
        }
        assert_eq!(ids, [5_000_000, 5_000_001, 5_000_002, 6_000_000]);
        assert_eq!(numbers(folder.path()), [0, 1, 2, 3]);
    }

    #[test]
    fn the_newest_that_fit_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path()).unwrap();
        for number in 0..10 {
            file.add(&mut event(number)).unwrap();
        }
        let mut odd = Newest::new(3, |event| event.machine.is_some());
        odd.read(folder.path()).unwrap();
        let texts: Vec<&str> = odd.events.iter().map(|event| event.text.as_str()).collect();
        assert_eq!(texts, ["event 5", "event 7", "event 9"]);
        assert!(odd.left_out);
        let mut five = Newest::new(5, |event| event.machine.is_some());
        five.read(folder.path()).unwrap();
        assert!(!five.left_out);
    }

    #[test]
    fn a_line_that_is_cut_off_anywhere_costs_only_itself() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path()).unwrap();
        file.add(&mut event(0)).unwrap();
        let first = file.bytes;
        file.add(&mut event(1)).unwrap();
        let all = std::fs::read(folder.path().join(NEWER)).unwrap();
        for cut in first as usize..all.len() {
            std::fs::write(folder.path().join(NEWER), &all[..cut]).unwrap();
            assert_eq!(numbers(folder.path()), [0], "cut at {cut}");
            let mut file = EventFile::open(folder.path()).unwrap();
            file.add(&mut event(2)).unwrap();
            assert_eq!(numbers(folder.path()), [0, 2], "cut at {cut}");
        }
    }

    #[test]
    fn lines_that_make_no_sense_are_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path()).unwrap();
        file.add(&mut event(0)).unwrap();
        let mut raw = OpenOptions::new()
            .append(true)
            .open(folder.path().join(NEWER))
            .unwrap();
        raw.write_all(b"\xff\xfe not json\n{\"id\":3}\n\n").unwrap();
        let mut file = EventFile::open(folder.path()).unwrap();
        file.add(&mut event(1)).unwrap();
        assert_eq!(numbers(folder.path()), [0, 1]);
    }

    #[test]
    fn two_files_of_bounded_size_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(folder.path()).unwrap();
        let written = 30_000;
        for number in 0..written {
            let mut event = event(number);
            event.text = "x".repeat(500);
            file.add(&mut event).unwrap();
        }
        for name in [OLDER, NEWER] {
            let bytes = std::fs::metadata(folder.path().join(name)).unwrap().len();
            assert!((1..=FILE_BYTES_MAX).contains(&bytes), "{name}: {bytes}");
        }
        let kept = numbers(folder.path());
        let first = kept[0];
        assert!(first > 0 && kept == (first..written).collect::<Vec<_>>());
    }
}
