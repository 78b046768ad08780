//! Collects the bytes of a checkpoint into packs, and stores full packs meanwhile.

use super::direct_io::AlignedBuffer;
use super::format::{BLOCK_BYTES, BlockRun, Pack, Run};
use super::id::CheckpointId;
use super::repository::{PackName, Repository, RepositoryError};
use crate::PAGE_BYTES;
use keel_cluster::MachineName;
use keel_net::Bytes;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Bytes of a pack.
const PACK_BYTES: usize = 16 << 20;
/// Packs stored concurrently.
const IN_FLIGHT_MAX: usize = 4;
/// Space reserved for what is copied after the last pack is stored.
const LAST_ROOM_BYTES: usize = 16 << 20;

/// Why bytes were not stored.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("there is no memory for a checkpoint's bytes: {0}")]
    Memory(std::io::Error),
    /// Another operation takes precedence.
    #[error("storing was given up")]
    GivenUp,
    /// A task of this process panicked.
    #[error("storing was interrupted")]
    Interrupted,
}

/// Collects bytes into packs and stores them meanwhile.
#[derive(Debug)]
pub struct Packer {
    repository: Repository,
    machine: MachineName,
    /// The checkpoint and its generation.
    of: (CheckpointId, u32),
    runtime: Handle,
    piece: fn(usize) -> PackName,
    buffer: Buffer,
    /// Buffers of stored packs, for reuse: new ones would cost a page fault per page.
    spare: Spare,
    packs: Vec<Pack>,
    storing: VecDeque<JoinHandle<Result<(), RepositoryError>>>,
    /// Number of packs begun.
    count: usize,
}

type Spare = Arc<Mutex<Vec<AlignedBuffer>>>;

/// A pack being filled.
#[derive(Debug, Default)]
struct Buffer {
    /// Never shrinks; only the first `used` bytes are valid.
    bytes: AlignedBuffer,
    used: usize,
    /// Checksums of full blocks, as far as they are computed.
    hashed: Vec<[u8; 32]>,
}

impl Buffer {
    /// Space for this many further bytes.
    fn room(&mut self, count: usize) -> Result<&mut [u8], PackError> {
        let end = self.used + count;
        // A large pack grows in large steps.
        if self.bytes.len() < end {
            let length = end.max(PACK_BYTES).next_multiple_of(PACK_BYTES);
            let grown = self.bytes.grow(length, self.used);
            grown.map_err(PackError::Memory)?;
        }
        Ok(&mut self.bytes[self.used..end])
    }

    /// Hashes full blocks, which are still in the processor's cache.
    fn hash_full(&mut self) {
        while (self.hashed.len() + 1) * BLOCK_BYTES <= self.used {
            let at = self.hashed.len() * BLOCK_BYTES;
            let block = &self.bytes[at..at + BLOCK_BYTES];
            self.hashed.push(*blake3::hash(block).as_bytes());
        }
    }

    /// The pack's description; hashes the rest.
    fn describe(&mut self) -> Pack {
        self.hash_full();
        let rest = self.hashed.len() * BLOCK_BYTES;
        if rest < self.used {
            let block = &self.bytes[rest..self.used];
            self.hashed.push(*blake3::hash(block).as_bytes());
        }
        Pack {
            bytes: self.used as u64,
            blocks: std::mem::take(&mut self.hashed),
        }
    }
}

/// A pack's bytes while they are stored; the buffer is returned for reuse afterwards.
struct LentBuffer {
    buffer: AlignedBuffer,
    used: usize,
    spare: Spare,
}

impl AsRef<[u8]> for LentBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.used]
    }
}

impl Drop for LentBuffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut spare = self.spare.lock().unwrap_or_else(|error| error.into_inner());
        spare.push(buffer);
    }
}

/// Records pages that were added to a pack.
pub fn note_page(runs: &mut Vec<Run>, memory: u32, at: u64, bytes: u64) {
    // Memories have at most 64 GiB, which is 2^24 pages.
    let (first, pages) = ((at / PAGE_BYTES) as u32, (bytes / PAGE_BYTES) as u32);
    match runs.last_mut() {
        Some(run) if run.memory == memory && run.first + run.pages == first => {
            run.pages += pages;
        }
        _ => runs.push(Run {
            memory,
            first,
            pages,
        }),
    }
}

/// Records file bytes that were added to a pack.
pub fn note_block(runs: &mut Vec<BlockRun>, number: u32, file: u64, at: u64, length: u64) {
    if length == 0 {
        return;
    }
    match runs.last_mut() {
        Some(BlockRun::Blocks {
            volume,
            inode,
            offset,
            bytes,
        }) if *volume == number && *inode == file && *offset + *bytes == at => *bytes += length,
        _ => runs.push(BlockRun::Blocks {
            volume: number,
            inode: file,
            offset: at,
            bytes: length,
        }),
    }
}

impl Packer {
    /// An empty packer.
    pub fn new(
        repository: Repository,
        machine: MachineName,
        of: (CheckpointId, u32),
        runtime: Handle,
        piece: fn(usize) -> PackName,
    ) -> Self {
        Packer {
            repository,
            machine,
            of,
            runtime,
            piece,
            buffer: Buffer::default(),
            spare: Spare::default(),
            packs: Vec::new(),
            storing: VecDeque::new(),
            count: 0,
        }
    }

    /// Adds bytes, and stores full packs.
    ///
    /// # Errors
    /// [`PackError`].
    pub fn add(&mut self, bytes: &[u8], give_up: &AtomicBool) -> Result<(), PackError> {
        let copy = |buffer: &mut [u8]| -> Result<usize, PackError> {
            buffer.copy_from_slice(bytes);
            Ok(bytes.len())
        };
        self.add_bytes(bytes.len(), Some(give_up), copy).map(drop)
    }

    /// Adds up to `count` bytes that `read` writes into a buffer; returns their number.
    /// With `give_up`, full packs are stored, and the call waits for a slow store; without,
    /// neither happens, and the last pack grows.
    ///
    /// # Errors
    /// [`PackError`], or that of `read`.
    pub fn add_bytes<E>(
        &mut self,
        count: usize,
        give_up: Option<&AtomicBool>,
        read: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E>
    where
        E: From<PackError>,
    {
        if give_up.is_some_and(|give_up| give_up.load(Ordering::Relaxed)) {
            return Err(PackError::GivenUp.into());
        }
        if self.buffer.bytes.is_empty() {
            self.buffer.bytes = self.spare_buffer();
        }
        let added = read(self.buffer.room(count)?)?;
        self.buffer.used += added;
        if give_up.is_some() {
            self.buffer.hash_full();
            if self.buffer.used >= PACK_BYTES {
                self.store_pack();
                self.wait_below(IN_FLIGHT_MAX)?;
            }
        }
        Ok(added)
    }

    fn spare_buffer(&self) -> AlignedBuffer {
        let mut spare = self.spare.lock().unwrap_or_else(|error| error.into_inner());
        spare.pop().unwrap_or_default()
    }

    /// Stores all that was collected, and reserves space for the last pages, so that they
    /// need no allocation.
    ///
    /// # Errors
    /// [`PackError`].
    pub fn settle(&mut self) -> Result<(), PackError> {
        self.store_pack();
        self.wait_below(1)?;
        self.buffer.bytes = self.spare_buffer();
        let grown = self.buffer.bytes.grow(LAST_ROOM_BYTES, 0);
        grown.map_err(PackError::Memory)?;
        // The kernel allocates memory only when it is written.
        self.buffer.bytes[..LAST_ROOM_BYTES].fill(0);
        Ok(())
    }

    fn store_pack(&mut self) {
        if self.buffer.used == 0 {
            return;
        }
        self.packs.push(self.buffer.describe());
        let Buffer { bytes, used, .. } = std::mem::take(&mut self.buffer);
        let lent = Bytes::from_owner(LentBuffer {
            buffer: bytes,
            used,
            spare: self.spare.clone(),
        });
        let piece = (self.piece)(self.count);
        self.count += 1;
        let (repository, machine) = (self.repository.clone(), self.machine.clone());
        let (id, generation) = self.of.clone();
        let store = async move {
            repository
                .put_pack(&machine, (&id, generation), piece, lent)
                .await
        };
        self.storing.push_back(self.runtime.spawn(store));
    }

    fn wait_below(&mut self, limit: usize) -> Result<(), PackError> {
        while self.storing.len() >= limit.max(1) {
            let Some(task) = self.storing.pop_front() else {
                break;
            };
            let stored = self.runtime.block_on(task);
            stored.map_err(|_| PackError::Interrupted)??;
        }
        Ok(())
    }

    /// Stores the rest and waits until all packs are stored.
    ///
    /// # Errors
    /// [`PackError`].
    pub fn finish(mut self) -> Result<Vec<Pack>, PackError> {
        self.store_pack();
        self.wait_below(1)?;
        Ok(std::mem::take(&mut self.packs))
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        // Packs of a checkpoint that was given up need not be stored.
        for task in &self.storing {
            task.abort();
        }
    }
}
