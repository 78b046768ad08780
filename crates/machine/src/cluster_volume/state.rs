//! The content of a volume at one instant: names, sizes, and the chunk of each block.
//! Plain data.

use super::format::{ChunkRef, FileBlocks, Segment};
use keel_wasi::volume::{NodeBody, NodeRecord, VolumeLimits, VolumeRecord};
use std::collections::BTreeMap;

/// Chunks of a file's blocks, by block number.
pub(super) type BlockMap = BTreeMap<u64, ChunkRef>;

/// The content of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeState {
    /// Number of the next file.
    pub next_inode: u64,
    /// Files, directories and links, by number.
    pub nodes: BTreeMap<u64, NodeRecord>,
    /// Chunks of each file that has any.
    pub map: BTreeMap<u64, BlockMap>,
}

/// The difference between two states.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference {
    pub(super) next_inode: u64,
    pub(super) nodes: Vec<NodeRecord>,
    pub(super) removed: Vec<u64>,
    pub(super) blocks: Vec<FileBlocks>,
}

impl VolumeState {
    /// These names and sizes with these chunks.
    pub fn new(record: VolumeRecord, map: BTreeMap<u64, BlockMap>) -> Self {
        let nodes = record.nodes.into_iter();
        VolumeState {
            next_inode: record.next_inode,
            nodes: nodes.map(|node| (node.inode, node)).collect(),
            map,
        }
    }

    /// Names and sizes.
    pub fn record(&self) -> VolumeRecord {
        VolumeRecord {
            next_inode: self.next_inode,
            nodes: self.nodes.values().cloned().collect(),
        }
    }

    /// The chunk of a block.
    pub fn chunk(&self, inode: u64, block: u64) -> Option<ChunkRef> {
        self.map.get(&inode)?.get(&block).copied()
    }

    /// All chunks; some may appear twice.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkRef> {
        self.map.values().flat_map(|map| map.values().copied())
    }

    /// Applies the changes of a segment.
    pub fn apply(&mut self, segment: &Segment) {
        if segment.is_base {
            *self = VolumeState::default();
        }
        self.next_inode = segment.next_inode;
        for inode in &segment.removed {
            self.nodes.remove(inode);
            self.map.remove(inode);
        }
        for node in &segment.nodes {
            self.nodes.insert(node.inode, node.clone());
        }
        for file in &segment.blocks {
            let map = self.map.entry(file.inode).or_default();
            for (block, chunk) in &file.blocks {
                match chunk {
                    Some(chunk) => drop(map.insert(*block, *chunk)),
                    None => drop(map.remove(block)),
                }
            }
            if map.is_empty() {
                self.map.remove(&file.inode);
            }
        }
    }

    /// Refuses inconsistent states.
    ///
    /// # Errors
    /// A message that names the inconsistency.
    pub fn check(&self, limits: VolumeLimits) -> Result<(), String> {
        self.record().check(limits)?;
        let empty = BlockMap::new();
        for (inode, node) in &self.nodes {
            let runs = match &node.body {
                NodeBody::File { blocks, .. } => &blocks[..],
                NodeBody::Directory { .. } | NodeBody::Link { .. } => &[],
            };
            let blocks = runs.iter().flat_map(|(first, count)| *first..first + count);
            let map = self.map.get(inode).unwrap_or(&empty);
            if !blocks.eq(map.keys().copied()) {
                return Err(format!("blocks of file {inode} do not match its size"));
            }
        }
        match self
            .map
            .keys()
            .find(|inode| !self.nodes.contains_key(inode))
        {
            Some(inode) => Err(format!(
                "there are blocks of file {inode}, which does not exist"
            )),
            None => Ok(()),
        }
    }

    /// The difference from this state to `to`.
    pub fn difference(&self, to: &VolumeState) -> Difference {
        let nodes = to.nodes.values();
        let nodes = nodes.filter(|node| self.nodes.get(&node.inode) != Some(node));
        let removed = self
            .nodes
            .keys()
            .filter(|inode| !to.nodes.contains_key(inode));
        let empty = BlockMap::new();
        let mut blocks = Vec::new();
        let mut compare = |inode: u64, to: &BlockMap| {
            let from = self.map.get(&inode).unwrap_or(&empty);
            let mut changed: BTreeMap<u64, Option<ChunkRef>> = BTreeMap::new();
            for (block, chunk) in to {
                if from.get(block) != Some(chunk) {
                    changed.insert(*block, Some(*chunk));
                }
            }
            for block in from.keys().filter(|block| !to.contains_key(block)) {
                changed.insert(*block, None);
            }
            if !changed.is_empty() {
                let blocks_of_it = changed.into_iter().collect();
                blocks.push(FileBlocks {
                    inode,
                    blocks: blocks_of_it,
                });
            }
        };
        for (inode, map) in &to.map {
            compare(*inode, map);
        }
        // Blocks of removed files are removed implicitly.
        let emptied = self.map.keys().filter(|inode| !to.map.contains_key(inode));
        for inode in emptied.filter(|inode| to.nodes.contains_key(inode)) {
            compare(*inode, &empty);
        }
        blocks.sort_unstable_by_key(|file| file.inode);
        Difference {
            next_inode: to.next_inode,
            nodes: nodes.cloned().collect(),
            removed: removed.copied().collect(),
            blocks,
        }
    }

    /// The difference from an empty state to this one.
    pub fn whole(&self) -> Difference {
        VolumeState::default().difference(self)
    }
}

impl Difference {
    /// Whether applying it changes nothing.
    pub fn is_empty(&self, from: &VolumeState) -> bool {
        self.next_inode == from.next_inode
            && self.nodes.is_empty()
            && self.removed.is_empty()
            && self.blocks.is_empty()
    }
}
