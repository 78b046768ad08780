//! Takes QEMU's copy of a guest's memory as it comes, and keeps what is new of it in a file of this
//! node: a slow repository must not hold up QEMU, nor the guest, which waits for each page that it
//! writes and that is not copied yet.

use super::create::CreateError;
use super::ram_stream::{Head, PAGE, Page, Reader, StreamError};
use keel_machine::checkpoint::{PageDigests, page_hash};
use keel_machine::worker::volume_folder::free_bytes;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

/// QEMU's name for the memory that its board has; all of it is zero at first, unlike that of firmware.
const MAIN_MEMORY: &str = "pc.ram";
/// Bytes of QEMU's stream after which it has the state of the devices: more than it begins with.
const BEGINNING_BYTES: u64 = 64 << 10;
/// Bytes that are taken at once.
const PIECE_BYTES: usize = 256 << 10;
/// Pages after which it is looked again whether there is room for more: 16 MiB.
const ROOM_PAGES: u64 = 4096;

/// What is known of a guest's memory from the checkpoint before.
#[derive(Debug, Default)]
pub(super) struct KnownMemory {
    /// Hashes of the pages that it has, or its predecessors.
    digests: PageDigests,
    /// Its blocks; `None` if there is no checkpoint before.
    head: Option<Head>,
}

impl KnownMemory {
    /// Whether a page is to be stored.
    fn is_new(&mut self, block: &str, at: Page, page: &[u8; PAGE]) -> Result<bool, CreateError> {
        let (memory, number) = place(at)?;
        let is_zero = page.iter().all(|byte| *byte == 0);
        // Pages of main memory that nothing is stored of are zero where the system is restored.
        if is_zero && block == MAIN_MEMORY && self.digests.get(memory, number).is_none() {
            return Ok(false);
        }
        let hash = page_hash(page);
        Ok(self.digests.put(memory, number, hash) != Some(hash))
    }
}

/// The numbers of a page's block, and of the page in it.
fn place(at: Page) -> Result<(u32, u32), CreateError> {
    let number = u32::try_from(at.at / PAGE as u64);
    let number = number.map_err(|_| StreamError::Form("a block of memory is too large"))?;
    let block = u32::try_from(at.block);
    let block = block.map_err(|_| StreamError::Form("it has too many blocks of memory"))?;
    Ok((block, number))
}

/// A guest's memory of one moment, less what was known.
pub(super) struct MemoryCopy {
    pub(super) known: KnownMemory,
    pub(super) head: Head,
    /// As QEMU wrote it.
    pub(super) devices: Vec<u8>,
    /// Numbers of block and page, and the page, for each one that is new.
    pages: File,
    count: u64,
}

impl MemoryCopy {
    /// Passes on the pages that are new: number of the block, offset in it in bytes, and the page.
    ///
    /// # Errors
    /// If they cannot be read, or those of `add`.
    pub(super) fn pages(
        &mut self,
        mut add: impl FnMut(u32, u64, &[u8]) -> Result<(), CreateError>,
    ) -> Result<(), CreateError> {
        self.pages.rewind()?;
        let mut pages = BufReader::with_capacity(PIECE_BYTES, &self.pages);
        let (mut word, mut page) = ([0; 4], [0; PAGE]);
        for _ in 0..self.count {
            pages.read_exact(&mut word)?;
            let block = u32::from_le_bytes(word);
            pages.read_exact(&mut word)?;
            let at = u64::from(u32::from_le_bytes(word)) * PAGE as u64;
            pages.read_exact(&mut page)?;
            add(block, at, &page)?;
        }
        Ok(())
    }
}

/// A thread that takes what QEMU sends. It takes all, whatever fails: QEMU's copy would fail
/// otherwise, with what comes of that ([`super::create`]).
pub(super) struct Pump {
    bytes: Arc<AtomicU64>,
    thread: JoinHandle<Result<MemoryCopy, CreateError>>,
}

impl Pump {
    /// Begins; `file` is an empty one in `folder`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(super) fn start(
        socket: UnixStream,
        file: File,
        folder: &Path,
        known: KnownMemory,
    ) -> Result<Self, CreateError> {
        // A process that is held sends nothing for as long as that takes.
        socket.set_read_timeout(None)?;
        let bytes = Arc::<AtomicU64>::default();
        let mut counted = Counted(socket, bytes.clone());
        let folder = folder.to_owned();
        let thread = std::thread::Builder::new().name("snapshot".into());
        let thread = thread.spawn(move || {
            let copied = take(&mut counted, file, &folder, known);
            let rest = io::copy(&mut counted, &mut io::sink());
            copied.and_then(|copied| rest.map(|_| copied).map_err(CreateError::Io))
        })?;
        Ok(Pump { bytes, thread })
    }

    /// Whether QEMU has the state of the devices: it sends memory, or has failed.
    pub(super) fn has_devices(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) >= BEGINNING_BYTES || self.thread.is_finished()
    }

    /// Waits until QEMU has sent all.
    ///
    /// # Errors
    /// If it is not as expected, or could not be kept.
    pub(super) fn finish(self) -> Result<MemoryCopy, CreateError> {
        let copied = self.thread.join();
        copied.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

struct Counted(UnixStream, Arc<AtomicU64>);

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Reads QEMU's stream to its end.
fn take(
    input: impl Read,
    file: File,
    folder: &Path,
    mut known: KnownMemory,
) -> Result<MemoryCopy, CreateError> {
    let mut stream = Reader::begin(BufReader::with_capacity(PIECE_BYTES, input))?;
    let head = stream.head().clone();
    if known.head.as_ref().is_some_and(|before| *before != head) {
        return Err(CreateError::OtherMemory);
    }
    let mut pages = BufWriter::with_capacity(PIECE_BYTES, file);
    let (mut count, mut page) = (0, [0; PAGE]);
    while let Some(at) = stream.page(&mut page)? {
        if !known.is_new(&head.blocks[at.block].name, at, &page)? {
            continue;
        }
        if count % ROOM_PAGES == 0 {
            check_room(folder, ROOM_PAGES * PAGE as u64)?;
        }
        let (block, number) = place(at)?;
        pages.write_all(&block.to_le_bytes())?;
        pages.write_all(&number.to_le_bytes())?;
        pages.write_all(&page)?;
        count += 1;
    }
    known.head = Some(head.clone());
    Ok(MemoryCopy {
        known,
        head,
        devices: stream.devices()?,
        pages: pages.into_inner().map_err(io::IntoInnerError::into_error)?,
        count,
    })
}

/// Checks that a file system has room for so many bytes more.
///
/// # Errors
/// If it has not.
pub(super) fn check_room(folder: &Path, bytes: u64) -> Result<(), CreateError> {
    match bytes <= free_bytes(folder)? {
        true => Ok(()),
        false => Err(CreateError::NoRoom(PathBuf::from(folder))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::ram_stream::{Block, Writer};
    use super::*;

    /// A stream of the pages of a guest, by block, number and content.
    fn stream(blocks: &[(&str, u64)], pages: &[(usize, u64, u8)]) -> Vec<u8> {
        let blocks = blocks.iter().map(|(name, pages)| Block {
            name: (*name).to_owned(),
            bytes: pages * PAGE as u64,
        });
        let head = Head::new("q35", blocks.collect());
        let mut bytes = Vec::new();
        let mut writer = Writer::begin(&mut bytes, &head).unwrap();
        for (block, number, byte) in pages {
            let at = number * PAGE as u64;
            writer.pages(*block, at, &[*byte; PAGE]).unwrap();
        }
        writer.finish(b"\x04devices").unwrap();
        bytes
    }

    const BLOCKS: &[(&str, u64)] = &[(MAIN_MEMORY, 8), ("firmware", 2)];

    fn taken(bytes: &[u8], known: KnownMemory) -> Result<MemoryCopy, CreateError> {
        let file = tempfile::tempfile().unwrap();
        take(bytes, file, Path::new("/"), known)
    }

    fn new_pages(copy: &mut MemoryCopy) -> Vec<(u32, u64, u8)> {
        let mut found = Vec::new();
        let add = |block, at, page: &[u8]| {
            assert!(page.iter().all(|byte| *byte == page[0]));
            found.push((block, at / PAGE as u64, page[0]));
            Ok(())
        };
        copy.pages(add).unwrap();
        found
    }

    #[test]
    fn only_what_changed_is_kept() {
        let first = [(0, 1, 0), (0, 2, 7), (0, 3, 8), (1, 0, 0), (1, 1, 9)];
        let mut copy = taken(&stream(BLOCKS, &first), KnownMemory::default()).unwrap();
        // Zeroes of firmware count: it has something there where the system is restored.
        let expected = [(0, 2, 7), (0, 3, 8), (1, 0, 0), (1, 1, 9)];
        assert_eq!(new_pages(&mut copy), expected);
        assert_eq!(copy.devices, b"\x04devices");
        // A page that became zero is stored, one that never was anything is not.
        let second = [
            (0, 1, 0),
            (0, 2, 0),
            (0, 3, 8),
            (0, 4, 5),
            (1, 0, 0),
            (1, 1, 9),
        ];
        let mut copy = taken(&stream(BLOCKS, &second), copy.known).unwrap();
        assert_eq!(new_pages(&mut copy), [(0, 2, 0), (0, 4, 5)]);
        let mut copy = taken(&stream(BLOCKS, &second), copy.known).unwrap();
        assert_eq!(new_pages(&mut copy), []);
    }

    #[test]
    fn an_increment_is_of_the_same_memory() {
        let copy = taken(&stream(BLOCKS, &[(0, 2, 7)]), KnownMemory::default()).unwrap();
        let other = stream(&[(MAIN_MEMORY, 8), ("firmware", 1)], &[]);
        let refused = taken(&other, copy.known).err();
        assert!(
            matches!(refused, Some(CreateError::OtherMemory)),
            "{refused:?}"
        );
    }

    /// QEMU can always send the rest.
    #[test]
    fn what_fails_takes_the_rest_all_the_same() {
        let (mut qemu, ours) = UnixStream::pair().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile().unwrap();
        let pump = Pump::start(ours, file, folder.path(), KnownMemory::default()).unwrap();
        qemu.write_all(b"something else").unwrap();
        // More than a socket holds.
        qemu.write_all(&vec![7; 16 << 20]).unwrap();
        drop(qemu);
        assert!(matches!(pump.finish(), Err(CreateError::Stream(_))));
    }
}
