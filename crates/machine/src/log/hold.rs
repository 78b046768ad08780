//! Output that is held back: it is in the log, but readers do not see it until the state that
//! printed it is safe elsewhere (`ha` with `protect = "output"`). The offset up to which it is
//! shown is in the file `shown` of the log's folder, so that it outlives the process that writes
//! the log.
//!
//! The file is synced when it is made, not when it changes: after a loss of power less may be
//! shown than before, never more.

use super::Log;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const FILE: &str = "shown";

/// Output is held from an offset on.
#[derive(Debug)]
pub(super) struct Hold {
    file: File,
    shown: u64,
}

impl Hold {
    /// Makes the file, or opens one that is there, and holds output from an offset on.
    pub(super) fn begin(folder: &Path, shown: u64) -> io::Result<Self> {
        let mut hold = Hold {
            file: open(folder, true)?,
            shown,
        };
        hold.write(shown)?;
        hold.file.sync_all()?;
        File::open(folder)?.sync_all()?;
        Ok(hold)
    }

    /// What a former process left; `None` if output is not held. An offset that cannot be read
    /// shows nothing.
    pub(super) fn found(folder: &Path, to_change: bool) -> io::Result<Option<Self>> {
        let file = match open_existing(folder, to_change) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = [0; 8];
        let shown = match file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => 0,
            read => read.map(|()| u64::from_le_bytes(bytes))?,
        };
        Ok(Some(Hold { file, shown }))
    }

    /// Removes the file.
    pub(super) fn end(folder: &Path) -> io::Result<()> {
        match std::fs::remove_file(path(folder)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Offset behind the last byte that is shown.
    pub(super) fn shown(&self) -> u64 {
        self.shown
    }

    /// Shows output up to an offset.
    pub(super) fn show(&mut self, offset: u64) -> io::Result<()> {
        if offset > self.shown {
            self.write(offset)?;
        }
        Ok(())
    }

    fn write(&mut self, shown: u64) -> io::Result<()> {
        self.file.write_all_at(&shown.to_le_bytes(), 0)?;
        self.shown = shown;
        Ok(())
    }
}

impl Log {
    /// Holds the output of a log that is to be made in this folder, from an offset on.
    ///
    /// # Errors
    /// That of the file system.
    pub fn hold_before(folder: &Path, offset: u64) -> io::Result<()> {
        Hold::begin(folder, offset).map(drop)
    }

    /// The file that is there while output of the log in this folder is held back.
    pub fn hold_file(folder: &Path) -> PathBuf {
        path(folder)
    }

    /// Holds output back from an offset on: readers see it when [`Self::show`] says so.
    ///
    /// # Errors
    /// That of the file system.
    pub fn hold_from(&self, offset: u64) -> io::Result<()> {
        self.state().hold = Some(Hold::begin(&self.folder, offset)?);
        Ok(())
    }

    /// Holds output back that is written from now on.
    ///
    /// # Errors
    /// That of the file system.
    pub fn hold_from_now(&self) -> io::Result<()> {
        // No output may come between.
        let mut state = self.state();
        state.hold = Some(Hold::begin(&self.folder, state.end)?);
        Ok(())
    }

    /// Holds no output back any more.
    ///
    /// # Errors
    /// That of the file system; output is held as before then.
    pub fn end_hold(&self) -> io::Result<()> {
        let mut state = self.state();
        Hold::end(&self.folder)?;
        state.hold = None;
        self.grown.notify_all();
        Ok(())
    }

    /// Shows output up to an offset, if it is held.
    ///
    /// # Errors
    /// That of the file system; it is shown later then.
    pub fn show(&self, offset: u64) -> io::Result<()> {
        let mut state = self.state();
        if let Some(hold) = &mut state.hold {
            hold.show(offset)?;
            self.grown.notify_all();
        }
        Ok(())
    }

    /// The offset from which output is held; `None` if none is.
    pub fn held_from(&self) -> Option<u64> {
        self.state().hold.as_ref().map(Hold::shown)
    }

    /// Offset behind the last byte that readers may see.
    pub fn shown_end(&self) -> u64 {
        self.state().shown_end()
    }

    /// Bytes that are held.
    pub fn held_bytes(&self) -> u64 {
        let state = self.state();
        state.end - state.shown_end()
    }

    /// As [`Self::read`], of what readers may see.
    ///
    /// # Errors
    /// That of the file system.
    pub fn read_shown(&self, offset: u64, max: usize) -> io::Result<(u64, Vec<u8>)> {
        let limit = self.shown_end();
        if offset >= limit {
            return Ok((offset, Vec::new()));
        }
        let (found, mut bytes) = self.read(offset, max)?;
        let shown = limit.saturating_sub(found);
        bytes.truncate(usize::try_from(shown).unwrap_or(usize::MAX));
        // All that is kept from there on is held: the reader waits at its edge.
        Ok((found.min(limit), bytes))
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

fn open(folder: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .open(path(folder))
}

fn open_existing(folder: &Path, to_change: bool) -> io::Result<File> {
    match to_change {
        true => open(folder, false),
        false => File::open(path(folder)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::StreamKind;
    use super::*;

    #[test]
    fn held_output_is_shown_up_to_where_it_is_safe_and_stays_so_in_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(folder.path(), 0).unwrap();
        log.append_at(StreamKind::Output, b"before", 1).unwrap();
        let begun = log.end();
        log.hold_from(begun).unwrap();
        let mut ends = Vec::new();
        for text in [b"one", b"two"] {
            log.append_at(StreamKind::Output, text, 1).unwrap();
            ends.push(log.end());
        }
        let shown = |log: &Log| log.read_shown(0, 1000).unwrap().1.len() as u64;
        assert_eq!((shown(&log), log.held_bytes()), (begun, ends[1] - begun));
        // A reader at the edge waits, and is not told of offsets behind it.
        assert_eq!(log.read_shown(begun, 9).unwrap(), (begun, Vec::new()));
        assert_eq!(log.read_shown(ends[1], 9).unwrap(), (ends[1], Vec::new()));
        log.show(ends[0]).unwrap();
        log.show(begun).unwrap();
        assert_eq!((shown(&log), log.held_from()), (ends[0], Some(ends[0])));
        drop(log);
        let left = Log::open_read_only(folder.path()).unwrap();
        assert_eq!((shown(&left), left.end()), (ends[0], ends[1]));
        let log = Log::open(folder.path(), 0).unwrap();
        assert_eq!((shown(&log), log.end()), (ends[0], ends[1]));
        // What was not shown is undone, and printed anew at the same offsets.
        log.cut(ends[0]).unwrap();
        assert_eq!((log.held_bytes(), log.shown_end()), (0, ends[0]));
        log.append_at(StreamKind::Output, b"anew", 1).unwrap();
        assert_eq!(shown(&log), ends[0]);
        std::fs::write(folder.path().join("shown"), b"torn").unwrap();
        assert_eq!(shown(&Log::open(folder.path(), 0).unwrap()), 0);
        // A reader from before all that is kept waits at the edge, too.
        let later = tempfile::tempdir().unwrap();
        let kept = Log::open(later.path(), 500).unwrap();
        kept.hold_from_now().unwrap();
        kept.append_at(StreamKind::Output, b"held", 1).unwrap();
        assert_eq!(kept.read_shown(7, 9).unwrap(), (500, Vec::new()));
        log.end_hold().unwrap();
        assert_eq!((shown(&log), log.held_bytes()), (log.end(), 0));
        let left = Log::open_read_only(folder.path()).unwrap();
        assert_eq!(shown(&left), log.end());
    }
}
