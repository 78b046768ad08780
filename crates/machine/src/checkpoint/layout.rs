//! Location of each page of a machine in a chain of checkpoints: of a page that was
//! stored several times only the newest copy is live, so each page is read once, in any
//! order and by several threads.

use super::format::{BLOCK_BYTES, Manifest};
use crate::PAGE_BYTES;
use std::ops::Range;

/// Pages that share a checksum.
const BLOCK_PAGES: u32 = (BLOCK_BYTES as u64 / PAGE_BYTES) as u32;
/// The largest memory, in 64 KiB pages: 64 GiB.
const SIZE_MAX: u64 = 1 << 20;
/// The most memory of a machine, in 64 KiB pages: each of its pages has an entry here.
const ALL_MAX: u64 = 4 * SIZE_MAX;
/// Marks a page that is in no pack and therefore zero.
const NOWHERE: u32 = u32::MAX;

/// A MiB of a pack: the unit of reading and verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block {
    /// Number of the pack in the layout.
    pub pack: usize,
    /// Number of the block in the pack.
    pub number: usize,
}

/// A pack of one of the chain's checkpoints.
#[derive(Debug, Clone, Copy)]
pub struct PackAt {
    /// Number of the checkpoint in the chain.
    pub checkpoint: usize,
    /// Number of the pack in the checkpoint.
    pub number: usize,
    /// Its first page, counted over the whole chain.
    first: u32,
    pages: u32,
}

/// A run of stored pages.
#[derive(Debug, Clone, Copy)]
struct Stored {
    /// Its first page, counted over the whole chain.
    first: u32,
    pages: u32,
    memory: u32,
    /// Its first page in the memory.
    to: u32,
}

/// A run of live pages in a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveRange {
    pub memory: usize,
    /// Offset in the memory, in bytes.
    pub offset: u64,
    /// Byte range in the block.
    pub within: Range<usize>,
}

/// All pages of a chain, whose first checkpoint is the full one.
#[derive(Debug)]
pub struct Layout {
    packs: Vec<PackAt>,
    stored: Vec<Stored>,
    /// For each memory and page, its live copy.
    newest: Vec<Vec<u32>>,
}

impl Layout {
    /// The layout of a chain whose manifests are valid each.
    ///
    /// # Errors
    /// A message, if they do not belong together.
    pub fn new(chain: &[Manifest]) -> Result<Self, &'static str> {
        let last = chain.last().ok_or("it is empty")?;
        let all = last.memory_pages.iter().try_fold(0_u64, |all, size| {
            let all = all.checked_add(*size)?;
            (*size <= SIZE_MAX && all <= ALL_MAX).then_some(all)
        });
        if all.is_none() {
            return Err("it is larger than any machine");
        }
        let mut newest: Vec<Vec<u32>> = last
            .memory_pages
            .iter()
            .map(|size| vec![NOWHERE; *size as usize * 16])
            .collect();
        let (mut packs, mut stored) = (Vec::new(), Vec::new());
        let (mut next, mut pack_next) = (0u32, 0u32);
        let add = |a: u32, b: u32| a.checked_add(b).ok_or("it has too many pages");
        for (checkpoint, manifest) in chain.iter().enumerate() {
            for run in &manifest.runs {
                let (from, to) = (run.first as usize, (run.first + run.pages) as usize);
                let places = newest
                    .get_mut(run.memory as usize)
                    .and_then(|memory| memory.get_mut(from..to))
                    .ok_or("an ancestor belongs to a larger machine")?;
                for (at, place) in (next..).zip(places) {
                    *place = at;
                }
                stored.push(Stored {
                    first: next,
                    pages: run.pages,
                    memory: run.memory,
                    to: run.first,
                });
                next = add(next, run.pages)?;
            }
            for (number, pack) in manifest.packs.iter().enumerate() {
                if !pack.bytes.is_multiple_of(PAGE_BYTES) {
                    return Err("a pack ends in the middle of a page");
                }
                let pages =
                    u32::try_from(pack.bytes / PAGE_BYTES).map_err(|_| "a pack is too large")?;
                packs.push(PackAt {
                    checkpoint,
                    number,
                    first: pack_next,
                    pages,
                });
                pack_next = add(pack_next, pages)?;
            }
        }
        Ok(Layout {
            packs,
            stored,
            newest,
        })
    }

    /// The packs, by their numbers.
    pub fn packs(&self) -> &[PackAt] {
        &self.packs
    }

    /// Blocks of a pack.
    pub fn blocks(&self, pack: usize) -> impl Iterator<Item = Block> + use<> {
        let pages = self.packs.get(pack).map_or(0, |pack| pack.pages);
        (0..pages.div_ceil(BLOCK_PAGES) as usize).map(move |number| Block { pack, number })
    }

    /// The block of a page; `None` if the page is zero.
    pub fn find(&self, memory: usize, page: u64) -> Option<Block> {
        let at = *self
            .newest
            .get(memory)?
            .get(usize::try_from(page).ok()?)
            .filter(|at| **at != NOWHERE)?;
        let pack = self.packs.partition_point(|pack| pack.first <= at) - 1;
        let number = ((at - self.packs[pack].first) / BLOCK_PAGES) as usize;
        Some(Block { pack, number })
    }

    /// Live pages of a block.
    pub fn pieces(&self, block: Block) -> Vec<LiveRange> {
        let mut pieces: Vec<LiveRange> = Vec::new();
        let Some(pack) = self.packs.get(block.pack) else {
            return pieces;
        };
        let from = pack.first + block.number as u32 * BLOCK_PAGES;
        let end = (from + BLOCK_PAGES).min(pack.first + pack.pages);
        let mut at = self
            .stored
            .partition_point(|stored| stored.first + stored.pages <= from);
        while let Some(stored) = self.stored.get(at).filter(|stored| stored.first < end) {
            at += 1;
            let memory = stored.memory as usize;
            for page in stored.first.max(from)..(stored.first + stored.pages).min(end) {
                let to = stored.to + (page - stored.first);
                if self.newest[memory][to as usize] != page {
                    continue;
                }
                let offset = u64::from(to) * PAGE_BYTES;
                let start = ((page - from) as u64 * PAGE_BYTES) as usize;
                let bytes = start..start + PAGE_BYTES as usize;
                match pieces.last_mut() {
                    Some(last)
                        if last.memory == memory
                            && last.within.end == bytes.start
                            && last.offset + last.within.len() as u64 == offset =>
                    {
                        last.within.end = bytes.end;
                    }
                    _ => pieces.push(LiveRange {
                        memory,
                        offset,
                        within: bytes,
                    }),
                }
            }
        }
        pieces
    }

    /// Bytes of live pages.
    pub fn bytes(&self) -> u64 {
        let pages = self.newest.iter().flatten();
        pages.filter(|at| **at != NOWHERE).count() as u64 * PAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::format::tests::example;
    use crate::checkpoint::format::{Pack, Run};

    /// Random chains, compared with a literal replay of the format.
    #[test]
    fn the_newest_copy_of_each_page_is_live() {
        let mut random = 7u64;
        let mut below = move |limit: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
            (random >> 33) % limit
        };
        for _ in 0..50 {
            let sizes = [1 + below(40), 1 + below(4)];
            let mut chain = Vec::new();
            let mut expected = [vec![], vec![]];
            for (memory, size) in sizes.iter().enumerate() {
                expected[memory] = vec![None; *size as usize * 16];
            }
            for checkpoint in 0..1 + below(4) as usize {
                let mut manifest = example();
                manifest.memory_pages = sizes.to_vec();
                (manifest.runs, manifest.packs) = (Vec::new(), Vec::new());
                let mut pages = 0;
                for _ in 0..below(30) {
                    let memory = below(2);
                    let all = sizes[memory as usize] * 16;
                    let first = below(all);
                    let count = 1 + below((all - first).min(90));
                    for page in first..first + count {
                        expected[memory as usize][page as usize] = Some((checkpoint, pages));
                        pages += 1;
                    }
                    manifest.runs.push(Run {
                        memory: memory as u32,
                        first: first as u32,
                        pages: count as u32,
                    });
                }
                let mut left = pages;
                while left > 0 {
                    let now = (1 + below(600)).min(left);
                    left -= now;
                    manifest.packs.push(Pack {
                        bytes: now * PAGE_BYTES,
                        blocks: Vec::new(),
                    });
                }
                chain.push(manifest);
            }
            let layout = Layout::new(&chain).unwrap();
            let mut found = [vec![None; expected[0].len()], vec![None; expected[1].len()]];
            let mut bytes = 0;
            for (number, pack) in layout.packs().iter().enumerate() {
                let before: u64 = chain[pack.checkpoint].packs[..pack.number]
                    .iter()
                    .map(|pack| pack.bytes / PAGE_BYTES)
                    .sum();
                for block in layout.blocks(number) {
                    for piece in layout.pieces(block) {
                        bytes += piece.within.len() as u64;
                        for at in piece.within.clone().step_by(PAGE_BYTES as usize) {
                            let to = piece.offset + (at - piece.within.start) as u64;
                            let page = before + block.number as u64 * 256 + at as u64 / PAGE_BYTES;
                            let place = &mut found[piece.memory][(to / PAGE_BYTES) as usize];
                            assert_eq!(place.replace((pack.checkpoint, page)), None);
                            let at = layout.find(piece.memory, to / PAGE_BYTES);
                            assert_eq!(at, Some(block));
                        }
                    }
                }
            }
            assert_eq!(found, expected);
            assert_eq!(bytes, layout.bytes());
            let nowhere = expected[1].iter().position(Option::is_none);
            if let Some(page) = nowhere {
                assert_eq!(layout.find(1, page as u64), None);
            }
            assert_eq!(layout.find(1, 1 << 40), None);
            assert_eq!(layout.find(2, 0), None);
        }
    }

    #[test]
    fn chains_of_other_machines_are_refused() {
        let mut old = example();
        old.memory_pages = vec![4];
        old.runs = vec![Run {
            memory: 0,
            first: 40,
            pages: 2,
        }];
        let mut new = old.clone();
        new.memory_pages = vec![2];
        new.runs.clear();
        assert!(Layout::new(&[old, new]).is_err());
        assert!(Layout::new(&[]).is_err());
    }
}
