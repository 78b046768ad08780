//! Reads checkpoints back: the newest intact one, its pages, and the blocks of its files.

use super::format::{BlockRun, Manifest};
use super::id::CheckpointId;
use super::layout::{Block, Layout};
use super::origin::Origin;
use super::repository::{PackName, Repository, RepositoryError};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::runtime::Handle;

/// Threads that read packs, at most.
const READERS_MAX: usize = 4;

/// Restores the checkpoint that an origin names with `one`, or the newest one that is intact;
/// returns with it why newer ones were passed over, which are damaged according to `is_damaged`. It
/// blocks for as long as `one` does.
///
/// # Errors
/// Those of `one`; or no checkpoint is intact.
pub fn restore_newest_intact<T, E: From<RepositoryError> + std::fmt::Display>(
    origin: &Origin,
    repository: &Repository,
    runtime: &Handle,
    one: impl Fn(&CheckpointId) -> Result<T, E>,
    is_damaged: impl Fn(&E) -> bool,
) -> Result<(T, Vec<String>), E> {
    let generation = |id: &CheckpointId| {
        let manifest = runtime.block_on(repository.manifest(&origin.machine, id));
        manifest.ok().map(|manifest| manifest.generation)
    };
    // Again if it was compacted meanwhile.
    let restore = |id: &CheckpointId| loop {
        let before = generation(id);
        match one(id) {
            Err(error) if is_damaged(&error) && generation(id) != before => {}
            other => return other,
        }
    };
    if let Some(id) = &origin.id {
        return restore(id).map(|restored| (restored, Vec::new()));
    }
    let candidates = runtime.block_on(repository.list(&origin.machine))?;
    if candidates.is_empty() {
        return Err(RepositoryError::None(origin.machine.clone()).into());
    }
    let mut passed_over = Vec::new();
    for id in &candidates {
        match restore(id) {
            Ok(restored) => return Ok((restored, passed_over)),
            Err(error) if is_damaged(&error) => {
                tracing::warn!(%error, "using an older checkpoint");
                passed_over.push(error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    Err(RepositoryError::NoneIntact {
        machine: origin.machine.clone(),
        reasons: passed_over,
    }
    .into())
}

/// Receives restored pages: number of the memory, offset, and bytes.
pub type WritePages<'a, E> = dyn Fn(usize, u64, &[u8]) -> Result<(), E> + Sync + 'a;

/// Reads the pages of a chain, several packs at a time, each page once. Blocking.
///
/// # Errors
/// A missing or damaged part, or the first error of `write`; some pages are written then.
pub fn read_pages<E: From<RepositoryError> + Send>(
    layout: &Layout,
    chain: &[Manifest],
    repository: &Repository,
    runtime: &Handle,
    write: &WritePages<'_, E>,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let read = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(at) = layout.packs().get(number) else {
                return;
            };
            let manifest = &chain[at.checkpoint];
            let block = |of_pack| Block {
                pack: number,
                number: of_pack,
            };
            let result = repository.read_blocks::<E>(
                runtime,
                (manifest, PackName::Pages(at.number)),
                &manifest.packs[at.number],
                &mut |of_pack| !layout.pieces(block(of_pack)).is_empty(),
                &mut |of_pack, bytes| {
                    for piece in layout.pieces(block(of_pack)) {
                        write(piece.memory, piece.offset, &bytes[piece.within])?;
                    }
                    Ok(())
                },
            );
            if let Err(error) = result {
                next.store(layout.packs().len(), Ordering::Relaxed);
                failure
                    .lock()
                    .unwrap_or_else(|error| error.into_inner())
                    .get_or_insert(error);
                return;
            }
        }
    };
    // Threads mostly wait for the store, however few processors there are.
    std::thread::scope(|scope| {
        for _ in 1..READERS_MAX.min(layout.packs().len()) {
            scope.spawn(read);
        }
        read();
    });
    match failure
        .into_inner()
        .unwrap_or_else(|error| error.into_inner())
    {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Receives the changes of files, in order.
pub trait BlockTarget {
    /// Why something was not written.
    type Error: From<RepositoryError>;

    /// Truncates a file.
    ///
    /// # Errors
    /// [`Self::Error`].
    fn cut(&mut self, volume: u32, inode: u64, bytes: u64) -> Result<(), Self::Error>;

    /// Writes bytes of a file.
    ///
    /// # Errors
    /// [`Self::Error`].
    fn write(
        &mut self,
        volume: u32,
        inode: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Self::Error>;
}

/// Repeats the changes of files that one checkpoint of a chain has. Blocking.
///
/// # Errors
/// A missing or damaged part, or the first error of `target`.
pub fn replay_blocks<T: BlockTarget>(
    manifest: &Manifest,
    repository: &Repository,
    runtime: &Handle,
    target: &mut T,
) -> Result<(), T::Error> {
    let mut replay = BlockReplay {
        runs: manifest.block_runs.iter(),
        now: None,
        target,
    };
    replay.cuts()?;
    for (number, pack) in manifest.block_packs.iter().enumerate() {
        repository.read_blocks(
            runtime,
            (manifest, PackName::Blocks(number)),
            pack,
            &mut |_| true,
            &mut |_, bytes| replay.add(bytes),
        )?;
    }
    Ok(())
}

struct BlockReplay<'a, T> {
    runs: std::slice::Iter<'a, BlockRun>,
    /// Destination of the next bytes: volume, file, offset, and length.
    now: Option<(u32, u64, u64, u64)>,
    target: &'a mut T,
}

impl<T: BlockTarget> BlockReplay<'_, T> {
    /// Advances to the next run that has bytes.
    fn cuts(&mut self) -> Result<(), T::Error> {
        for run in self.runs.by_ref() {
            match *run {
                BlockRun::Cut {
                    volume,
                    inode,
                    bytes,
                } => self.target.cut(volume, inode, bytes)?,
                BlockRun::Blocks {
                    volume,
                    inode,
                    offset,
                    bytes,
                } => {
                    self.now = Some((volume, inode, offset, bytes));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, mut bytes: &[u8]) -> Result<(), T::Error> {
        while !bytes.is_empty() {
            // The manifest's validation ensures that they fit.
            let Some((volume, inode, offset, left)) = self.now.take() else {
                return Ok(());
            };
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            let (piece, rest) = bytes.split_at(count);
            self.target.write(volume, inode, offset, piece)?;
            bytes = rest;
            let count = count as u64;
            if count < left {
                self.now = Some((volume, inode, offset + count, left - count));
            } else {
                self.cuts()?;
            }
        }
        Ok(())
    }
}
