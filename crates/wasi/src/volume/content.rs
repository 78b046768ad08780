//! A file's contents: a sparse backing file on the host, and its block maps.
//!
//! The backing file only contains bytes of the guest, but it may be shorter (missing bytes read as
//! zeros), or missing altogether. The first write creates it.

use super::blocks::{BLOCK_BYTES, BlockSet, UNIT_BYTES, blocks_of};
use super::tree::Times;
use crate::lock::locked;
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Maximum file size in bytes; some host file systems allow no more.
pub(crate) const FILE_BYTES_MAX: u64 = 1 << 43;

/// Byte quota of a volume and its usage.
#[derive(Debug)]
pub(crate) struct Quota {
    pub(crate) bytes_max: u64,
    used: Mutex<u64>,
}

impl Quota {
    pub(crate) fn new(bytes_max: u64, used: u64) -> Self {
        Self {
            bytes_max,
            used: Mutex::new(used),
        }
    }

    pub(crate) fn used(&self) -> u64 {
        *locked(&self.used)
    }

    /// Reserves bytes, all or none.
    fn reserve(&self, bytes: u64) -> bool {
        let mut used = locked(&self.used);
        let fits = used
            .checked_add(bytes)
            .is_some_and(|sum| sum <= self.bytes_max);
        if fits {
            *used += bytes;
        }
        fits
    }

    pub(crate) fn release(&self, bytes: u64) {
        let mut used = locked(&self.used);
        *used = used.saturating_sub(bytes);
    }
}

/// Why a read or write was not performed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum WriteFault {
    Errno(Errno),
    /// The host's disk is full: retry when it is not.
    HostFull,
    /// These blocks are not in the folder yet: retry when they are.
    Absent(Range<u64>),
}

impl From<Errno> for WriteFault {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<io::Error> for WriteFault {
    fn from(error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT) => Self::HostFull,
            Some(errno) => Self::Errno(errno),
            None => Self::Errno(Errno::IO),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) size: u64,
    /// Blocks with data; all others are zeros.
    pub(crate) present: BlockSet,
    /// Those of them whose data is not in the folder yet.
    pub(crate) remote: BlockSet,
    pub(crate) times: Times,
}

impl State {
    /// Its quota usage: its blocks, the last one up to the end of the file.
    pub(crate) fn cost(&self) -> u64 {
        self.cost_after(0, 0)
    }

    /// Quota usage after these bytes are written.
    fn cost_after(&self, offset: u64, length: u64) -> u64 {
        let blocks = blocks_of(offset..offset + length);
        let whole = (self.present.len() + self.present.missing(blocks.clone())) * BLOCK_BYTES;
        let size = match length {
            0 => self.size,
            _ => self.size.max(offset + length),
        };
        let Some(last) = size.checked_sub(1).map(|last| last / BLOCK_BYTES) else {
            return whole;
        };
        if !blocks.contains(&last) && !self.present.contains(last) {
            return whole;
        }
        let tail = size - last * BLOCK_BYTES;
        whole - BLOCK_BYTES + tail.next_multiple_of(UNIT_BYTES)
    }

    /// Remote blocks that a write of these bytes overwrites only partially.
    fn remote_below(&self, offset: u64, length: u64) -> Option<Range<u64>> {
        if self.remote.is_empty() || length == 0 {
            return None;
        }
        let end = offset + length;
        let blocks = blocks_of(offset..end);
        let ends = [blocks.start, blocks.end - 1];
        let partly = |block: &u64| {
            let bytes = block * BLOCK_BYTES..(block * BLOCK_BYTES + BLOCK_BYTES).min(self.size);
            self.remote.contains(*block) && (bytes.start < offset || bytes.end > end)
        };
        let block = ends.into_iter().find(partly)?;
        Some(block..block + 1)
    }

    fn extend(&mut self, offset: u64, length: u64) {
        self.present.insert(blocks_of(offset..offset + length));
        self.size = self.size.max(offset + length);
    }
}

#[derive(Debug)]
pub(crate) struct Content {
    path: PathBuf,
    /// Held during a write or a change of the size.
    write_lock: Mutex<()>,
    state: Mutex<State>,
    backing: Mutex<Backing>,
}

#[derive(Debug, Default)]
struct Backing {
    /// Open while a descriptor is.
    file: Option<Arc<File>>,
    /// After a move the last block may be too long. It is truncated when the file is first opened,
    /// before any write.
    trimmed: bool,
}

pub(crate) fn data_path(folder: &Path, inode: u64) -> PathBuf {
    folder.join(inode.to_string())
}

impl Content {
    pub(crate) fn new(folder: &Path, inode: u64, state: State) -> Self {
        Self {
            path: data_path(folder, inode),
            write_lock: Mutex::new(()),
            state: Mutex::new(state),
            backing: Mutex::default(),
        }
    }

    /// Held briefly, never during disk operations.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    pub(crate) fn changed(&self, now: u64) {
        self.state().times.change = now;
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The backing file; `None` if there is none and `make` is false.
    fn file(&self, make: bool) -> io::Result<Option<Arc<File>>> {
        let mut backing = locked(&self.backing);
        if let Some(file) = &backing.file {
            return Ok(Some(file.clone()));
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(make)
            .truncate(false)
            .mode(0o600)
            .open(&self.path);
        let file = match opened {
            Err(error) if !make && error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => Arc::new(opened?),
        };
        let size = self.state().size;
        if !backing.trimmed && file.metadata()?.len() > size {
            file.set_len(size)?;
        }
        backing.trimmed = true;
        backing.file = Some(file.clone());
        Ok(Some(file))
    }

    /// Closes the backing file; it is reopened when needed.
    pub(crate) fn close(&self) {
        locked(&self.backing).file = None;
    }

    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<usize, WriteFault> {
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL.into());
        }
        let length = {
            let state = self.state();
            let room = usize::try_from(state.size.saturating_sub(offset)).unwrap_or(usize::MAX);
            let length = room.min(buffer.len());
            let blocks = blocks_of(offset..offset.saturating_add(length as u64));
            if let Some(absent) = state.remote.first_run(blocks) {
                return Err(WriteFault::Absent(absent));
            }
            length
        };
        let buffer = &mut buffer[..length];
        let file = self
            .file(false)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let mut done = 0;
        while let Some(file) = file.as_ref().filter(|_| done < length) {
            match file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO).into()),
            }
        }
        buffer[done..].fill(0);
        Ok(length)
    }

    /// Stores a fetched block in the folder, unless it was overwritten or truncated meanwhile.
    /// Missing bytes at the end are zeros.
    pub(crate) fn fill(&self, block: u64, bytes: &[u8]) -> io::Result<()> {
        let _turn = locked(&self.write_lock);
        let start = block * BLOCK_BYTES;
        let length = {
            let state = self.state();
            if !state.remote.contains(block) {
                return Ok(());
            }
            state.size.saturating_sub(start).min(BLOCK_BYTES)
        };
        let mut whole = bytes.to_vec();
        // (Its length is at most that of a block.)
        whole.resize(usize::try_from(length).unwrap_or(0), 0);
        let file = self.file(true)?;
        let file = file.ok_or_else(|| io::Error::other("no backing file was made"))?;
        file.write_all_at(&whole, start)?;
        self.state().remote.remove(block..block + 1);
        Ok(())
    }

    /// Writes some of `bytes`, all unless the quota or the disk is nearly full; at the end if there
    /// is no offset. `written` is called with the new bytes. Returns their offset and number.
    pub(crate) fn write_at(
        &self,
        bytes: &[u8],
        offset: Option<u64>,
        quota: &Quota,
        now: u64,
        written: &dyn Fn(std::ops::Range<u64>),
    ) -> Result<(u64, usize), WriteFault> {
        let _turn = locked(&self.write_lock);
        let offset = offset.unwrap_or_else(|| self.state().size);
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL.into());
        }
        if bytes.is_empty() {
            return Ok((offset, 0));
        }
        let room = FILE_BYTES_MAX.saturating_sub(offset);
        if room == 0 {
            return Err(Errno::FBIG.into());
        }
        let wanted = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        let (count, taken) = self.admit(offset, wanted, quota)?;
        let absent = self.state().remote_below(offset, count as u64);
        if let Some(absent) = absent {
            quota.release(taken);
            return Err(WriteFault::Absent(absent));
        }
        let file = self.file(true);
        let result = file.and_then(|file| match file {
            Some(file) => write_some(&file, &bytes[..count], offset),
            None => Err(io::Error::other("no backing file was made")),
        });
        let count = match result {
            Ok(count) => count,
            Err(error) => {
                quota.release(taken);
                return Err(error.into());
            }
        };
        let count = {
            let mut state = self.state();
            // The disk may have accepted less: a remote block that is not completely written does
            // not count.
            let count = match state.remote_below(offset, count as u64) {
                Some(absent) => (absent.start * BLOCK_BYTES).saturating_sub(offset) as usize,
                None => count,
            };
            if count == 0 {
                quota.release(taken);
                return Err(WriteFault::HostFull);
            }
            let before = state.cost();
            state.extend(offset, count as u64);
            let written = blocks_of(offset..offset + count as u64);
            state.remote.remove(written);
            (state.times.modification, state.times.change) = (now, now);
            // Release the reservation of bytes that were not written.
            quota.release((before + taken).saturating_sub(state.cost()));
            count
        };
        written(offset..offset + count as u64);
        Ok((offset, count))
    }

    /// Reserves quota for a write of up to `wanted` bytes; returns the admitted bytes and their
    /// cost.
    fn admit(&self, offset: u64, wanted: usize, quota: &Quota) -> Result<(usize, u64), WriteFault> {
        let state = self.state();
        let cost = |length: usize| {
            let after = state.cost_after(offset, length as u64);
            after.saturating_sub(state.cost())
        };
        let mut length = wanted;
        loop {
            let more = cost(length);
            if quota.reserve(more) {
                return Ok((length, more));
            }
            // One unit less: at most 256 steps, as writes are at most 1 MiB.
            let end = offset + length as u64;
            let shorter = (end - 1) / UNIT_BYTES * UNIT_BYTES;
            if shorter <= offset {
                return Err(Errno::NOSPC.into());
            }
            length = usize::try_from(shorter - offset).map_err(|_| Errno::FBIG)?;
        }
    }

    /// Sets the size; `cut` is called with the truncation point.
    pub(crate) fn set_size(
        &self,
        size: u64,
        quota: &Quota,
        now: u64,
        cut: &dyn Fn(u64),
    ) -> Result<(), WriteFault> {
        if i64::try_from(size).is_err() {
            return Err(Errno::INVAL.into());
        }
        if size > FILE_BYTES_MAX {
            return Err(Errno::FBIG.into());
        }
        let _turn = locked(&self.write_lock);
        let before = self.state().size;
        if size < before {
            // The rest of a partial block becomes zeros, so the block is needed.
            let block = size / BLOCK_BYTES;
            if !size.is_multiple_of(BLOCK_BYTES) && self.state().remote.contains(block) {
                return Err(WriteFault::Absent(block..block + 1));
            }
            let file = self.file(false);
            let file = file.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            if let Some(file) = file {
                file.set_len(size.min(file_length(&file)?))
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            }
        }
        let mut state = self.state();
        let old = state.cost();
        state.size = size;
        state.present.remove_from(size.div_ceil(BLOCK_BYTES));
        state.remote.remove_from(size.div_ceil(BLOCK_BYTES));
        let new = state.cost();
        // Only growth can cost more: nothing was released then.
        if new > old && !quota.reserve(new - old) {
            state.size = before;
            return Err(Errno::NOSPC.into());
        }
        quota.release(old.saturating_sub(new));
        (state.times.modification, state.times.change) = (now, now);
        drop(state);
        if size < before {
            cut(size);
        }
        Ok(())
    }

    /// Flushes written bytes to the disk.
    pub(crate) fn sync(&self, data_only: bool) -> Result<(), Errno> {
        let synced = self.file(false).and_then(|file| match file {
            Some(file) if data_only => file.sync_data(),
            Some(file) => file.sync_all(),
            None => Ok(()),
        });
        synced.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

fn file_length(file: &File) -> Result<u64, Errno> {
    let metadata = file.metadata();
    metadata
        .map(|metadata| metadata.len())
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Some bytes, at least one.
fn write_some(file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.write_at(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
