//! Packs in a directory of the host, written past the page cache with direct I/O, because
//! most are never read: writing a machine's memory through the cache would cost more than
//! the disk does and evict other programs' pages. Where the file system does not support
//! this, packs are written through the cache.
//!
//! Names follow `object_store`, which reads and lists the packs: a file gets its name
//! only when its bytes are durable, and is called `NAME#DIGITS` before, which listings
//! omit. The folder's entries are synced once, before the manifest is written.

use keel_net::Bytes;
use memmap2::MmapMut;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Alignment of addresses, offsets and lengths for direct I/O: sufficient for all disks.
const ALIGN: usize = 4096;

/// A buffer whose first byte is aligned for direct I/O. It is mapped, and so the kernel has its
/// memory back at once when it is dropped: an allocator would keep some of this size for each of
/// its arenas, which is more than most machines have.
#[derive(Debug, Default)]
pub struct AlignedBuffer {
    /// `None` while it is empty.
    map: Option<MmapMut>,
}

impl AlignedBuffer {
    /// Grows it to at least this length; the first `kept` bytes are preserved.
    ///
    /// # Errors
    /// If there is no memory for it; the buffer is as it was.
    pub fn grow(&mut self, length: usize, kept: usize) -> io::Result<()> {
        if self.len() >= length {
            return Ok(());
        }
        let mut map = MmapMut::map_anon(length)?;
        map[..kept].copy_from_slice(&self[..kept]);
        self.map = Some(map);
        Ok(())
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }
}

/// A file written with or without the page cache.
struct DirectFile {
    file: File,
    is_direct: bool,
}

impl DirectFile {
    fn new(file: File) -> Self {
        let mut file = DirectFile {
            file,
            is_direct: false,
        };
        file.is_direct = file.switch(true).is_ok();
        file
    }

    fn switch(&self, is_direct: bool) -> io::Result<()> {
        let mut flags = fcntl_getfl(&self.file)?;
        flags.set(OFlags::DIRECT, is_direct);
        Ok(fcntl_setfl(&self.file, flags)?)
    }

    /// Switches to the page cache after a failed direct write.
    fn fall_back(&mut self, error: io::Error) -> io::Result<()> {
        if !self.is_direct || error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        self.switch(false)?;
        self.is_direct = false;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let whole = if self.is_direct && bytes.as_ptr().align_offset(ALIGN) == 0 {
            bytes.len() - bytes.len() % ALIGN
        } else {
            0
        };
        let mut at = 0;
        while at < bytes.len() {
            if self.is_direct && at >= whole {
                self.switch(false)?;
                self.is_direct = false;
            }
            let end = if self.is_direct { whole } else { bytes.len() };
            match self.file.write_at(&bytes[at..end], at as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => at += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.fall_back(error)?,
            }
            // A short write may have ended anywhere.
            if self.is_direct && at % ALIGN != 0 {
                self.switch(false)?;
                self.is_direct = false;
            }
        }
        self.file.sync_data()
    }
}

/// Writes a file as a whole and makes its bytes durable. Blocking.
///
/// # Errors
/// That of the host, with the file's name; nothing is left then.
pub(super) fn write(path: &Path, bytes: &Bytes) -> io::Result<()> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(format!("#{}", rand::random::<u32>()));
    let staged = PathBuf::from(staged);
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let open = || {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).open(&staged)
    };
    let file = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make_parents(path).and_then(|()| open())
        }
        other => other,
    };
    let written = DirectFile::new(file.map_err(named)?).write(bytes);
    let written = written.and_then(|()| std::fs::rename(&staged, path));
    written.map_err(|error| {
        // Listings omit what is left of it.
        let _ = std::fs::remove_file(&staged);
        named(error)
    })
}

/// Creates the folders of a path durably.
fn make_parents(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent() else {
        return Ok(());
    };
    let first_there = folder.ancestors().find(|folder| folder.is_dir());
    std::fs::create_dir_all(folder)?;
    for folder in folder.ancestors() {
        sync(folder)?;
        if first_there.is_some_and(|there| folder == there) {
            break;
        }
    }
    Ok(())
}

/// Makes a folder's entries durable. Blocking.
///
/// # Errors
/// That of the host.
pub(super) fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Reads a file block by block through the page cache: the kernel reads ahead in larger
/// units than requested here, and restoring many machines from one checkpoint reads it
/// once.
pub(super) struct Reader {
    file: File,
    room: Vec<u8>,
}

impl Reader {
    pub(super) fn new(file: File) -> Self {
        // A hint: without it less is read ahead.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
        Reader {
            file,
            room: Vec::new(),
        }
    }

    /// Reads a range.
    ///
    /// # Errors
    /// That of the host; [`io::ErrorKind::UnexpectedEof`] if the file is shorter.
    pub(super) fn read(&mut self, range: Range<u64>) -> io::Result<&[u8]> {
        let length = (range.end - range.start) as usize;
        if self.room.len() < length {
            self.room.resize(length, 0);
        }
        let room = &mut self.room[..length];
        self.file.read_exact_at(room, range.start)?;
        Ok(room)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|at| (at * 7 + at / 999) as u8).collect()
    }

    /// Lengths around the alignment, from aligned and unaligned addresses.
    #[test]
    fn any_length_and_address_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/pack");
        for length in [0, 1, ALIGN - 1, ALIGN, ALIGN + 1, 5 * ALIGN, (1 << 20) + 77] {
            for shift in [0, 1, 512] {
                let mut room = AlignedBuffer::default();
                room.grow(shift + length, 0).unwrap();
                room[shift..shift + length].copy_from_slice(&bytes(length));
                let written = Bytes::copy_from_slice(&room[shift..shift + length]);
                write(&path, &written).unwrap();
                let mut file = DirectFile::new(File::create(folder.path().join("c")).unwrap());
                file.write(&room[shift..shift + length]).unwrap();
                for path in [&path, &folder.path().join("c")] {
                    assert_eq!(std::fs::read(path).unwrap(), bytes(length));
                    let mut reader = Reader::new(File::open(path).unwrap());
                    let read = reader.read(0..length as u64).unwrap();
                    assert_eq!(read, bytes(length));
                    let cut = reader.read(0..length as u64 + 1);
                    assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
                }
            }
        }
        // No other file is left.
        let names = std::fs::read_dir(path.parent().unwrap()).unwrap();
        assert_eq!(names.count(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        // A directory has its name, which no file can replace.
        let path = folder.path().join("pack");
        std::fs::create_dir_all(path.join("in it")).unwrap();
        let error = write(&path, &Bytes::from(bytes(10))).unwrap_err();
        assert!(error.to_string().contains("pack: "), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn growing_preserves_content() {
        let mut room = AlignedBuffer::default();
        room.grow(10, 0).unwrap();
        room[..10].copy_from_slice(&bytes(10));
        room.grow(3 << 20, 10).unwrap();
        assert_eq!(room[..10], bytes(10));
        assert_eq!(room.as_ptr().align_offset(ALIGN), 0);
        assert!(room.len() >= 3 << 20);
        // A length that no address space has.
        assert!(room.grow(usize::MAX / 2, 10).is_err());
        assert_eq!(room[..10], bytes(10));
    }

    /// Threads that made checkpoints kept the memory of their buffers.
    #[test]
    fn the_kernel_has_the_memory_of_a_dropped_buffer() {
        const BYTES: usize = 16 << 20;
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let mut lines = status.lines();
            let line = lines.find_map(|it| it.strip_prefix("RssAnon:")).unwrap();
            line.trim_end_matches("kB").trim().parse::<usize>().unwrap() << 10
        };
        let before = resident();
        // An allocator learns from what is freed, and has an arena for each thread.
        let all_filled = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..3 {
                        let mut room = AlignedBuffer::default();
                        room.grow(BYTES, 0).unwrap();
                        room.fill(1);
                        all_filled.wait();
                        drop(room);
                        let small = std::hint::black_box(vec![1_u8; 100]);
                        std::mem::forget(small);
                    }
                });
            }
        });
        let kept = resident().saturating_sub(before);
        assert!(kept < 2 * BYTES, "{kept} bytes are still there");
    }
}
