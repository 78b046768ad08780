//! A volume's names, sizes and links as plain data: part of the snapshot. Untrusted; inconsistent
//! data is refused.

use super::backing::Backed;
use super::blocks::{BLOCK_BYTES, BlockSet};
use super::change_tracking::Trackers;
use super::content::{Content, FILE_BYTES_MAX, Quota, State};
use super::stall::Stalls;
use super::tree::{Body, LINK_BYTES_MAX, NAME_BYTES_MAX, ROOT, TEXT_BYTES_MAX, Times, Tree};
use super::{Volume, VolumeLimits};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};

/// A volume without its files' bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The number of the next file.
    pub next_inode: u64,
    /// All nodes, by inode number; the root is 1.
    pub nodes: Vec<NodeRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    pub inode: u64,
    /// Last access, in nanoseconds since 1970-01-01 UTC.
    pub access_ns: u64,
    /// Last change of its contents.
    pub modification_ns: u64,
    /// Last change of its contents or attributes.
    pub change_ns: u64,
    pub body: NodeBody,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeBody {
    File {
        size: u64,
        /// First block and number of blocks of 64 KiB with data, in order.
        blocks: Vec<(u64, u64)>,
    },
    Directory {
        /// Its parent directory, or the last one before it was removed.
        parent: u64,
        /// Names and inode numbers, by name.
        entries: Vec<(String, u64)>,
    },
    Link {
        contents: String,
    },
}

impl VolumeRecord {
    pub fn empty(now_ns: u64) -> Self {
        VolumeRecord {
            next_inode: ROOT + 1,
            nodes: vec![NodeRecord {
                inode: ROOT,
                access_ns: now_ns,
                modification_ns: now_ns,
                change_ns: now_ns,
                body: NodeBody::Directory {
                    parent: ROOT,
                    entries: Vec::new(),
                },
            }],
        }
    }

    /// Refuses inconsistent data, and data beyond the limits.
    ///
    /// # Errors
    /// A sentence about the inconsistency.
    pub fn check(&self, limits: VolumeLimits) -> Result<(), String> {
        check(self, limits)
    }
}

impl Volume {
    /// Captures the volume without the bytes of its files. The guest must not change it meanwhile
    /// ([`Volume::block_changes`]).
    pub fn record(&self) -> VolumeRecord {
        let tree = self.tree();
        let record = |(inode, node): (u64, &super::tree::Node)| {
            let (times, body) = match &node.body {
                Body::File(content) => {
                    let state = content.state();
                    let runs = state.present.runs().into_iter();
                    let body = NodeBody::File {
                        size: state.size,
                        blocks: runs.map(|run| (run.start, run.end - run.start)).collect(),
                    };
                    (state.times, body)
                }
                Body::Directory {
                    parent,
                    entries,
                    times,
                } => {
                    let entries = entries.iter().map(|(name, inode)| (name.clone(), *inode));
                    let body = NodeBody::Directory {
                        parent: *parent,
                        entries: entries.collect(),
                    };
                    (*times, body)
                }
                Body::Link { contents, times } => {
                    let contents = contents.clone();
                    (*times, NodeBody::Link { contents })
                }
            };
            NodeRecord {
                inode,
                access_ns: times.access,
                modification_ns: times.modification,
                change_ns: times.change,
                body,
            }
        };
        let mut nodes = tree.nodes().map(record).collect::<Vec<_>>();
        nodes.sort_unstable_by_key(|node| node.inode);
        VolumeRecord {
            next_inode: self.trackers.next_inode(),
            nodes,
        }
    }

    /// Restores a captured volume. Its files' bytes are in `folder`, or will be before they are
    /// read.
    ///
    /// # Errors
    /// A sentence about the inconsistency.
    pub(crate) fn restore(
        record: VolumeRecord,
        folder: &Path,
        limits: VolumeLimits,
        stalls: Arc<Stalls>,
        backed: Option<&Backed>,
    ) -> Result<Arc<Self>, String> {
        check(&record, limits)?;
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut tree = Tree::empty(limits.inodes_max);
        let mut links: HashMap<u64, u64> = HashMap::new();
        let mut used = 0_u64;
        for node in &record.nodes {
            if let NodeBody::Directory { entries, .. } = &node.body {
                for (_, inode) in entries {
                    *links.entry(*inode).or_insert(0) += 1;
                }
            }
        }
        for node in record.nodes {
            let times = Times {
                access: node.access_ns,
                modification: node.modification_ns,
                change: node.change_ns,
            };
            let body = match node.body {
                NodeBody::File { size, blocks } => {
                    let mut present = BlockSet::default();
                    for (first, count) in blocks {
                        present.insert(first..first + count);
                    }
                    let mut remote = BlockSet::default();
                    if let Some(backed) = backed {
                        remote = present.clone();
                        for run in backed
                            .local
                            .of(node.inode)
                            .into_iter()
                            .flat_map(BlockSet::runs)
                        {
                            remote.remove(run);
                        }
                    }
                    let state = State {
                        size,
                        present,
                        remote,
                        times,
                    };
                    used = used.saturating_add(state.cost());
                    Body::File(Arc::new(Content::new(folder, node.inode, state)))
                }
                NodeBody::Directory { parent, entries } => Body::Directory {
                    parent,
                    entries: entries.into_iter().collect(),
                    times,
                },
                NodeBody::Link { contents } => Body::Link { contents, times },
            };
            tree.put(node.inode, body);
            if let Ok(put) = tree.node_mut(node.inode) {
                put.links += links.get(&node.inode).copied().unwrap_or(0);
            }
        }
        Ok(Arc::new(Self {
            folder: folder.to_owned(),
            quota: Quota::new(limits.bytes_max, used),
            tree: Mutex::new(tree),
            trackers: Trackers::new(record.next_inode),
            stalls,
            backing: backed.map(|backed| backed.backing.clone()),
            change_lock: RwLock::default(),
            changes: std::sync::atomic::AtomicU64::new(0),
        }))
    }

    /// Removes nodes without name and descriptor: the snapshot may be of a machine that ended.
    pub(crate) fn drop_orphans(&self) {
        let unused = |(inode, node): (u64, &super::tree::Node)| {
            (node.links == 0 && node.open == 0).then_some(inode)
        };
        let orphans = self.tree().nodes().filter_map(unused).collect::<Vec<_>>();
        for inode in orphans {
            self.drop_unused(inode);
        }
    }
}

fn check(record: &VolumeRecord, limits: VolumeLimits) -> Result<(), String> {
    let inodes = record.nodes.len() as u64;
    if inodes > limits.inodes_max {
        return Err(format!("{inodes} files, {} are allowed", limits.inodes_max));
    }
    let mut nodes: HashMap<u64, &NodeRecord> = HashMap::new();
    let (mut names, mut text_bytes, mut blocks) = (0_u64, 0_u64, 0_u64);
    for node in &record.nodes {
        if node.inode < ROOT || node.inode >= record.next_inode {
            return Err(format!("inode {} is invalid", node.inode));
        }
        if nodes.insert(node.inode, node).is_some() {
            return Err(format!("inode {} occurs twice", node.inode));
        }
        match &node.body {
            NodeBody::File {
                size,
                blocks: present,
            } => blocks += check_file(node.inode, *size, present)?,
            NodeBody::Directory { entries, .. } => {
                names += entries.len() as u64;
                for pair in entries.windows(2) {
                    if pair[0].0 >= pair[1].0 {
                        return Err(format!("directory {} is not sorted", node.inode));
                    }
                }
                for (name, _) in entries {
                    text_bytes += name.len() as u64;
                    let bad = matches!(name.as_str(), "" | "." | "..")
                        || name.len() > NAME_BYTES_MAX
                        || name.contains(['/', '\0']);
                    if bad {
                        return Err(format!("the name {name:?} is invalid"));
                    }
                }
            }
            NodeBody::Link { contents } => {
                text_bytes += contents.len() as u64;
                let length = 1..=LINK_BYTES_MAX;
                if !length.contains(&contents.len()) || contents.contains('\0') {
                    return Err(format!("link {} cannot be", node.inode));
                }
            }
        }
    }
    if names > limits.inodes_max.saturating_mul(2) || text_bytes > TEXT_BYTES_MAX {
        return Err(format!("{names} names of {text_bytes} bytes are too many"));
    }
    if blocks > limits.bytes_max / super::blocks::UNIT_BYTES {
        return Err(format!("{blocks} blocks are more than its quota"));
    }
    check_directories(&nodes)
}

fn check_file(inode: u64, size: u64, present: &[(u64, u64)]) -> Result<u64, String> {
    if size > FILE_BYTES_MAX {
        return Err(format!("file {inode} of {size} bytes is too large"));
    }
    let mut end = 0;
    let mut blocks = 0;
    for (first, count) in present {
        let run_end = first.checked_add(*count).filter(|_| *count > 0);
        let run_end = run_end.filter(|run_end| *run_end <= size.div_ceil(BLOCK_BYTES));
        match run_end {
            Some(run_end) if *first >= end => end = run_end,
            _ => return Err(format!("file {inode} has invalid blocks")),
        }
        blocks += count;
    }
    Ok(blocks)
}

/// Checks that all entries exist, and that directories form a tree.
fn check_directories(nodes: &HashMap<u64, &NodeRecord>) -> Result<(), String> {
    let mut parents: BTreeMap<u64, u64> = BTreeMap::new();
    for (inode, node) in nodes {
        let NodeBody::Directory { entries, .. } = &node.body else {
            continue;
        };
        for (name, entry) in entries {
            let Some(found) = nodes.get(entry) else {
                return Err(format!("{name:?} refers to a missing inode"));
            };
            if let NodeBody::Directory { parent, .. } = &found.body {
                let second = parents.insert(*entry, *inode).is_some();
                if second || *entry == ROOT || parent != inode {
                    return Err(format!("directory {entry} is in several places"));
                }
            }
        }
    }
    match nodes.get(&ROOT).map(|root| &root.body) {
        Some(NodeBody::Directory { parent: ROOT, .. }) => {}
        _ => return Err("it has no root".into()),
    }
    // From the root down: unreachable directories must be removed ones, hence empty.
    let mut reached = HashSet::new();
    let mut todo = vec![ROOT];
    while let Some(inode) = todo.pop() {
        if !reached.insert(inode) {
            return Err(format!("directory {inode} is within itself"));
        }
        if let Some(NodeBody::Directory { entries, .. }) = nodes.get(&inode).map(|node| &node.body)
        {
            let below = entries.iter().map(|(_, inode)| *inode);
            todo.extend(below.filter(|inode| parents.contains_key(inode)));
        }
    }
    for (inode, node) in nodes {
        if let NodeBody::Directory { entries, .. } = &node.body
            && !reached.contains(inode)
            && (!entries.is_empty() || parents.contains_key(inode))
        {
            return Err(format!("directory {inode} is unreachable"));
        }
    }
    Ok(())
}
