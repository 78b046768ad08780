//! Compaction: turns an incremental checkpoint into a full one within the store, so that
//! its ancestors need not be kept. The machine is not involved.
//!
//! Only live bytes are copied: the newest copy of each page and of each byte of a file.
//! The checkpoint keeps its name, so later ones still refer to it: its packs are written
//! under names of a new generation, then its manifest is replaced atomically. A reader of
//! the old manifest that misses a pack reads the manifest again.

use super::format::{BLOCK_BYTES, BlockRun, Manifest};
use super::id::CheckpointId;
use super::layout::{Layout, LiveRange};
use super::packer::{PackError, Packer, note_block, note_page};
use super::repository::{PackName, Repository, RepositoryError};
use keel_cluster::MachineName;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::AtomicBool;
use tokio::runtime::Handle;

/// Compacts one checkpoint; returns its new size in bytes, or `None` if it was full.
/// Blocking, outside of the runtime.
///
/// # Errors
/// [`PackError`]; the checkpoint is unchanged then.
pub fn compact(
    repository: &Repository,
    runtime: &Handle,
    machine: &MachineName,
    id: &CheckpointId,
) -> Result<Option<u64>, PackError> {
    let chain = runtime.block_on(repository.chain(machine, id))?;
    match chain.last() {
        Some(newest) if chain.len() > 1 => rewrite(repository, runtime, &chain, newest).map(Some),
        _ => Ok(None),
    }
}

/// Bytes of a chain, and how many of them are live.
pub(super) fn bytes_of(chain: &[Manifest]) -> Result<(u64, u64), &'static str> {
    let stored = chain.iter().map(Manifest::stored_bytes).sum();
    let of_files: u64 = newest_of_files(chain).iter().map(|piece| piece.bytes).sum();
    Ok((stored, Layout::new(chain)?.bytes() + of_files))
}

fn rewrite(
    repository: &Repository,
    runtime: &Handle,
    chain: &[Manifest],
    newest: &Manifest,
) -> Result<u64, PackError> {
    let part = |reason: &str| RepositoryError::Part {
        machine: newest.machine.clone(),
        id: newest.id.clone(),
        part: "its chain".into(),
        reason: reason.to_owned(),
    };
    let layout = Layout::new(chain).map_err(part)?;
    let mut manifest = newest.clone();
    manifest.parent = None;
    manifest.generation = newest
        .generation
        .checked_add(1)
        .ok_or_else(|| part("it was rewritten too often"))?;
    (manifest.runs, manifest.block_runs) = (Vec::new(), Vec::new());
    let packer = |piece: fn(usize) -> PackName| {
        let name = manifest.machine.clone();
        let at = (manifest.id.clone(), manifest.generation);
        Packer::new(repository.clone(), name, at, runtime.clone(), piece)
    };
    // Compaction is never given up: it does not stop the machine.
    let go_on = AtomicBool::new(false);
    let mut pages = packer(PackName::Pages);
    for (number, at) in layout.packs().iter().enumerate() {
        let of = &chain[at.checkpoint];
        let block = |of_pack| super::layout::Block {
            pack: number,
            number: of_pack,
        };
        repository.read_blocks::<PackError>(
            runtime,
            (of, PackName::Pages(at.number)),
            &of.packs[at.number],
            &mut |of_pack| !layout.pieces(block(of_pack)).is_empty(),
            &mut |of_pack, bytes| {
                for piece in layout.pieces(block(of_pack)) {
                    let LiveRange {
                        memory,
                        offset,
                        within,
                    } = piece;
                    let bytes = &bytes[within];
                    pages.add(bytes, &go_on)?;
                    note_page(
                        &mut manifest.runs,
                        memory as u32,
                        offset,
                        bytes.len() as u64,
                    );
                }
                Ok(())
            },
        )?;
    }
    manifest.packs = pages.finish()?;
    let mut files = packer(PackName::Blocks);
    let wanted = newest_of_files(chain);
    let mut wanted = wanted.iter().peekable();
    // Position of the present pack, over all packs of the chain.
    let mut before = 0;
    for of in chain {
        for (number, pack) in of.block_packs.iter().enumerate() {
            let end = before + pack.bytes;
            if wanted.peek().is_none_or(|piece| piece.stored >= end) {
                before = end;
                continue;
            }
            repository.read_blocks::<PackError>(
                runtime,
                (of, PackName::Blocks(number)),
                pack,
                &mut |_| true,
                &mut |of_pack, bytes| {
                    let start = before + (of_pack * BLOCK_BYTES) as u64;
                    let end = start + bytes.len() as u64;
                    while let Some(piece) = wanted.peek() {
                        let piece_end = piece.stored + piece.bytes;
                        if piece.stored >= end {
                            break;
                        }
                        let from = piece.stored.max(start);
                        let to = piece_end.min(end);
                        if from < to {
                            let bytes = &bytes[(from - start) as usize..(to - start) as usize];
                            files.add(bytes, &go_on)?;
                            let at = piece.offset + (from - piece.stored);
                            let runs = &mut manifest.block_runs;
                            note_block(runs, piece.volume, piece.inode, at, bytes.len() as u64);
                        }
                        if piece_end > end {
                            break;
                        }
                        wanted.next();
                    }
                    Ok(())
                },
            )?;
            before = end;
        }
    }
    manifest.block_packs = files.finish()?;
    runtime.block_on(repository.put_manifest(&manifest))?;
    Ok(manifest.stored_bytes())
}

/// Live bytes of a file, and their location over all packs of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FilePiece {
    stored: u64,
    bytes: u64,
    volume: u32,
    inode: u64,
    offset: u64,
}

/// Live bytes of all files of a chain, in the order of storing.
fn newest_of_files(chain: &[Manifest]) -> Vec<FilePiece> {
    // For each file, by end offset: start offset and location.
    type Pieces = BTreeMap<u64, (u64, u64)>;
    let mut files: HashMap<(u32, u64), Pieces> = HashMap::new();
    let mut stored = 0;
    for run in chain.iter().flat_map(|manifest| &manifest.block_runs) {
        match *run {
            BlockRun::Cut {
                volume,
                inode,
                bytes,
            } => {
                if let Some(pieces) = files.get_mut(&(volume, inode)) {
                    remove(pieces, bytes, u64::MAX);
                }
            }
            BlockRun::Blocks {
                volume,
                inode,
                offset,
                bytes,
            } => {
                let pieces = files.entry((volume, inode)).or_default();
                remove(pieces, offset, offset + bytes);
                pieces.insert(offset + bytes, (offset, stored));
                stored += bytes;
            }
        }
    }
    let mut found: Vec<FilePiece> = files
        .into_iter()
        .flat_map(|((volume, inode), pieces)| {
            pieces
                .into_iter()
                .map(move |(end, (offset, stored))| FilePiece {
                    stored,
                    bytes: end - offset,
                    volume,
                    inode,
                    offset,
                })
        })
        .collect();
    found.sort_unstable_by_key(|piece| piece.stored);
    found
}

/// Removes a range from a file's live bytes.
fn remove(pieces: &mut BTreeMap<u64, (u64, u64)>, from: u64, to: u64) {
    let touched: Vec<u64> = pieces
        .range(from + 1..)
        .take_while(|(_, (begin, _))| *begin < to)
        .map(|(end, _)| *end)
        .collect();
    for end in touched {
        let Some((begin, stored)) = pieces.remove(&end) else {
            continue;
        };
        if begin < from {
            pieces.insert(from, (begin, stored));
        }
        if end > to {
            pieces.insert(end, (to, stored + (to - begin)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::format::tests::example;

    /// Random writes and truncations, compared with a file in memory.
    #[test]
    fn the_newest_copy_of_each_byte_is_live() {
        let mut random = 11u64;
        let mut below = move |limit: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
            (random >> 33) % limit
        };
        for _ in 0..300 {
            let mut manifest = example();
            manifest.block_runs.clear();
            let mut expected: HashMap<(u64, u64), u64> = HashMap::new();
            let mut stored = 0;
            for _ in 0..below(40) {
                let (inode, at) = (below(2), below(60));
                if below(5) == 0 {
                    expected.retain(|(of, byte), _| *of != inode || *byte < at);
                    manifest.block_runs.push(BlockRun::Cut {
                        volume: 0,
                        inode,
                        bytes: at,
                    });
                    continue;
                }
                let bytes = 1 + below(20);
                for byte in at..at + bytes {
                    expected.insert((inode, byte), stored);
                    stored += 1;
                }
                manifest.block_runs.push(BlockRun::Blocks {
                    volume: 0,
                    inode,
                    offset: at,
                    bytes,
                });
            }
            let half = manifest.block_runs.len() / 2;
            let mut second = manifest.clone();
            second.block_runs = manifest.block_runs.split_off(half);
            let mut found = HashMap::new();
            let mut last = 0;
            for piece in newest_of_files(&[manifest, second]) {
                assert!(piece.stored >= last);
                last = piece.stored + piece.bytes;
                for byte in 0..piece.bytes {
                    let key = (piece.inode, piece.offset + byte);
                    assert_eq!(found.insert(key, piece.stored + byte), None);
                }
            }
            assert_eq!(found, expected);
        }
    }
}
