//! Names, directories and links of a volume: plain data in memory.
//!
//! Paths are resolved as by Linux with `RESOLVE_BENEATH`, which `cap-std` uses on the host: `..`
//! never leaves the start directory, and links that would are refused. Operations such as removal
//! resolve the directory first and act on the last name, as `cap-std` does.

use super::content::Content;
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

pub(crate) const ROOT: u64 = 1;
/// Bytes of a name.
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// Bytes of a link's contents.
pub(crate) const LINK_BYTES_MAX: usize = 4095;
/// Names that one file may have.
const LINKS_MAX: u64 = 65_000;
/// Links followed in one path.
const FOLLOWS_MAX: u32 = 40;
/// Maximum bytes of all names and links of a volume: they are held in memory, and transferred
/// during the downtime of a move.
pub(crate) const TEXT_BYTES_MAX: u64 = 64 << 20;

type Result<T> = std::result::Result<T, Errno>;

/// Times of a directory or link, in nanoseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) access: u64,
    pub(crate) modification: u64,
    pub(crate) change: u64,
}

impl Times {
    pub(crate) fn at(now: u64) -> Self {
        Self {
            access: now,
            modification: now,
            change: now,
        }
    }
}

#[derive(Debug)]
pub(crate) enum Body {
    File(Arc<Content>),
    Directory {
        parent: u64,
        entries: BTreeMap<String, u64>,
        times: Times,
    },
    Link {
        contents: String,
        times: Times,
    },
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) body: Body,
    /// Number of its names; for a directory 1 or, once removed, 0.
    pub(crate) links: u64,
    /// Number of its descriptors.
    pub(crate) open: u64,
}

/// The last part of a path whose directory was resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    Dot,
    Name(String),
}

/// Treatment of the last component by `walk`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Final {
    Keep,
    Follow,
    /// As `Keep`; a missing non-directory may be created.
    MakeKeep,
    /// As `Follow`; a missing node may be created.
    MakeFollow,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Walked {
    Found(u64),
    /// Missing; only for creation.
    Missing {
        directory: u64,
        name: String,
    },
}

/// All names of a volume.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: HashMap<u64, Node>,
    pub(crate) inodes_max: u64,
    /// Bytes of names and links.
    text_bytes: u64,
    /// Entries of all directories.
    names: u64,
}

impl Tree {
    pub(crate) fn new(inodes_max: u64, now: u64) -> Self {
        let mut tree = Self::empty(inodes_max);
        let root = Body::Directory {
            parent: ROOT,
            entries: BTreeMap::new(),
            times: Times::at(now),
        };
        tree.put(ROOT, root);
        tree
    }

    pub(crate) fn empty(inodes_max: u64) -> Self {
        Self {
            nodes: HashMap::new(),
            inodes_max,
            text_bytes: 0,
            names: 0,
        }
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.nodes.iter().map(|(inode, node)| (*inode, node))
    }

    pub(crate) fn inodes(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// Inserts a node without a name.
    pub(crate) fn put(&mut self, inode: u64, body: Body) {
        self.text_bytes += text_of(&body);
        if let Body::Directory { entries, .. } = &body {
            self.names += entries.len() as u64;
        }
        let links = u64::from(inode == ROOT);
        let node = Node {
            body,
            links,
            open: 0,
        };
        self.nodes.insert(inode, node);
    }

    pub(crate) fn node(&self, inode: u64) -> Result<&Node> {
        self.nodes.get(&inode).ok_or(Errno::STALE)
    }

    pub(crate) fn node_mut(&mut self, inode: u64) -> Result<&mut Node> {
        self.nodes.get_mut(&inode).ok_or(Errno::STALE)
    }

    pub(crate) fn is_directory(&self, inode: u64) -> bool {
        let node = self.nodes.get(&inode);
        node.is_some_and(|node| matches!(node.body, Body::Directory { .. }))
    }

    pub(crate) fn entries(&self, directory: u64) -> Result<&BTreeMap<String, u64>> {
        match &self.node(directory)?.body {
            Body::Directory { entries, .. } => Ok(entries),
            Body::File(_) | Body::Link { .. } => Err(Errno::NOTDIR),
        }
    }

    fn parent(&self, directory: u64) -> Result<u64> {
        match &self.node(directory)?.body {
            Body::Directory { parent, .. } => Ok(*parent),
            Body::File(_) | Body::Link { .. } => Err(Errno::NOTDIR),
        }
    }

    pub(crate) fn lookup(&self, directory: u64, name: &str) -> Result<Option<u64>> {
        if name.len() > NAME_BYTES_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        Ok(self.entries(directory)?.get(name).copied())
    }

    /// The contents of a link, if it is one.
    fn link(&self, inode: u64) -> Result<Option<&str>> {
        match &self.node(inode)?.body {
            Body::Link { contents, .. } => Ok(Some(contents)),
            Body::File(_) | Body::Directory { .. } => Ok(None),
        }
    }

    /// Resolves a path beneath `start`.
    ///
    /// # Errors
    /// Linux's, with `PERM` for paths that leave `start`.
    pub(crate) fn walk(&self, start: u64, path: &str, last: Final) -> Result<Walked> {
        if path.contains('\0') {
            return Err(Errno::INVAL);
        }
        if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let makes = matches!(last, Final::MakeKeep | Final::MakeFollow);
        let follows = matches!(last, Final::Follow | Final::MakeFollow);
        let mut at = start;
        let mut rest = path.to_owned();
        let mut followed = 0;
        loop {
            if rest.starts_with('/') {
                return Err(Errno::PERM);
            }
            let (part, after) = match rest.split_once('/') {
                Some((part, after)) => (part, Some(after.trim_start_matches('/'))),
                None => (&*rest, None),
            };
            let is_last = after.is_none_or(str::is_empty);
            // A trailing slash requires a directory, and follows links.
            let slash = after.is_some();
            let next = match part {
                "." => at,
                ".." if at == start => return Err(Errno::PERM),
                ".." => self.parent(at)?,
                name => {
                    if is_last && slash && makes {
                        return Err(Errno::ISDIR);
                    }
                    match self.lookup(at, name)? {
                        Some(inode) => inode,
                        None if is_last && makes => {
                            let name = name.to_owned();
                            return Ok(Walked::Missing {
                                directory: at,
                                name,
                            });
                        }
                        None => return Err(Errno::NOENT),
                    }
                }
            };
            if let Some(contents) = self.link(next)?
                && (!is_last || slash || follows)
            {
                followed += 1;
                if followed > FOLLOWS_MAX {
                    return Err(Errno::LOOP);
                }
                rest = match after {
                    Some(after) => format!("{contents}/{after}"),
                    None => contents.to_owned(),
                };
                continue;
            }
            if slash && !self.is_directory(next) {
                return Err(Errno::NOTDIR);
            }
            if is_last {
                return Ok(Walked::Found(next));
            }
            at = next;
            rest = after.unwrap_or_default().to_owned();
        }
    }

    /// The node at a path; a link at the end is followed if `follow`.
    pub(crate) fn find(&self, start: u64, path: &str, follow: bool) -> Result<u64> {
        let last = if follow { Final::Follow } else { Final::Keep };
        match self.walk(start, path, last)? {
            Walked::Found(inode) => Ok(inode),
            Walked::Missing { .. } => Err(Errno::NOENT),
        }
    }

    fn find_directory(&self, start: u64, path: &str) -> Result<u64> {
        let inode = self.find(start, path, true)?;
        if self.is_directory(inode) {
            Ok(inode)
        } else {
            Err(Errno::NOTDIR)
        }
    }

    /// The directory of a path and its last component. A path that ends in a slash, `/.` or `..` is
    /// the directory itself.
    pub(crate) fn split(&self, start: u64, path: &str) -> Result<(u64, Last)> {
        if path.contains('\0') {
            return Err(Errno::INVAL);
        }
        if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let (before, name) = match path.rsplit_once('/') {
            Some((before, name)) => (Some(before), name),
            None => (None, path),
        };
        match (before, name) {
            (None, ".") => Ok((start, Last::Dot)),
            (_, "" | "." | "..") => Ok((self.find_directory(start, path)?, Last::Dot)),
            (None, name) => Ok((start, Last::Name(name.to_owned()))),
            (Some(""), _) => Err(Errno::PERM),
            (Some(before), name) => {
                let directory = self.find_directory(start, before)?;
                Ok((directory, Last::Name(name.to_owned())))
            }
        }
    }

    /// As `split`, but slashes at the end are ignored.
    pub(crate) fn split_trimmed(&self, start: u64, path: &str) -> Result<(u64, Last)> {
        self.split(start, trimmed(path))
    }

    /// Refuses an existing name, or one in a removed directory.
    fn check_free(&self, directory: u64, name: &str) -> Result<()> {
        if self.lookup(directory, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        if self.node(directory)?.links == 0 {
            return Err(Errno::NOENT);
        }
        Ok(())
    }

    /// As `check_free`, and refuses an excess name.
    pub(crate) fn check_new(&self, directory: u64, name: &str) -> Result<()> {
        self.check_free(directory, name)?;
        let text = self.text_bytes + name.len() as u64;
        if self.names >= self.inodes_max.saturating_mul(2) || text > TEXT_BYTES_MAX {
            return Err(Errno::NOSPC);
        }
        Ok(())
    }

    /// Refuses an excess inode.
    pub(crate) fn check_room(&self, link_bytes: usize) -> Result<()> {
        let text = self.text_bytes + link_bytes as u64;
        if self.inodes() >= self.inodes_max || text > TEXT_BYTES_MAX {
            return Err(Errno::NOSPC);
        }
        Ok(())
    }

    /// Adds a name to a node, after the checks.
    pub(crate) fn enter(&mut self, directory: u64, name: String, inode: u64, now: u64) {
        self.text_bytes += name.len() as u64;
        self.names += 1;
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.links += 1;
            if let Body::Directory { parent, .. } = &mut node.body {
                *parent = directory;
            }
            node.changed(now);
        }
        if let Some(Node {
            body: Body::Directory { entries, times, .. },
            ..
        }) = self.nodes.get_mut(&directory)
        {
            entries.insert(name, inode);
            (times.modification, times.change) = (now, now);
        }
    }

    /// Removes a name; the node stays until `drop_unused`.
    pub(crate) fn leave(&mut self, directory: u64, name: &str, now: u64) -> Option<u64> {
        let Some(Node {
            body: Body::Directory { entries, times, .. },
            ..
        }) = self.nodes.get_mut(&directory)
        else {
            return None;
        };
        let inode = entries.remove(name)?;
        (times.modification, times.change) = (now, now);
        self.names -= 1;
        self.text_bytes -= name.len() as u64;
        if let Some(node) = self.nodes.get_mut(&inode) {
            node.links = node.links.saturating_sub(1);
            node.changed(now);
        }
        Some(inode)
    }

    /// Removes a node without names and descriptors; the caller removes a file's content.
    pub(crate) fn drop_unused(&mut self, inode: u64) -> Option<Arc<Content>> {
        let node = self.nodes.get(&inode)?;
        if node.links > 0 || node.open > 0 {
            return None;
        }
        let node = self.nodes.remove(&inode)?;
        self.text_bytes -= text_of(&node.body);
        match node.body {
            Body::File(content) => Some(content),
            Body::Directory { .. } | Body::Link { .. } => None,
        }
    }

    /// Whether another name is allowed.
    pub(crate) fn check_linkable(&self, inode: u64) -> Result<()> {
        let node = self.node(inode)?;
        match &node.body {
            Body::Directory { .. } => Err(Errno::PERM),
            _ if node.links == 0 => Err(Errno::NOENT),
            _ if node.links >= LINKS_MAX => Err(Errno::MLINK),
            _ => Ok(()),
        }
    }

    /// Whether `inode` is `below` or above it.
    fn holds(&self, inode: u64, below: u64) -> bool {
        let mut at = below;
        loop {
            if at == inode {
                return true;
            }
            if at == ROOT {
                return false;
            }
            // The parent of a removed directory may be gone.
            let Ok(parent) = self.parent(at) else {
                return false;
            };
            at = parent;
        }
    }

    /// `rename`, after both directories were resolved; the node that lost its
    /// name, if any. `slashes` are those at the ends of the two paths.
    pub(crate) fn rename(
        &mut self,
        (source_dir, source): (u64, Last),
        (target_dir, target): (u64, Last),
        slashes: bool,
        now: u64,
    ) -> Result<Option<u64>> {
        let (Last::Name(source), Last::Name(target)) = (source, target) else {
            return Err(Errno::BUSY);
        };
        let moved = self.lookup(source_dir, &source)?.ok_or(Errno::NOENT)?;
        let victim = self.lookup(target_dir, &target)?;
        let is_directory = self.is_directory(moved);
        if slashes && !is_directory {
            return Err(Errno::NOTDIR);
        }
        if is_directory && self.holds(moved, target_dir) {
            return Err(Errno::INVAL);
        }
        if let Some(victim) = victim
            && self.is_directory(victim)
            && self.holds(victim, source_dir)
        {
            return Err(Errno::NOTEMPTY);
        }
        if victim == Some(moved) {
            return Ok(None);
        }
        match victim {
            None => {
                self.check_free(target_dir, &target)?;
                let longer = target.len().saturating_sub(source.len()) as u64;
                if self.text_bytes + longer > TEXT_BYTES_MAX {
                    return Err(Errno::NOSPC);
                }
            }
            Some(victim) => match (is_directory, self.is_directory(victim)) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                (true, true) if !self.entries(victim)?.is_empty() => return Err(Errno::NOTEMPTY),
                _ => {}
            },
        }
        self.leave(source_dir, &source, now);
        let replaced = self.leave(target_dir, &target, now);
        self.enter(target_dir, target, moved, now);
        Ok(replaced)
    }

    /// Sub-directories of a directory.
    pub(crate) fn directories_in(&self, directory: u64) -> u64 {
        let Ok(entries) = self.entries(directory) else {
            return 0;
        };
        let inodes = entries.values();
        inodes.filter(|inode| self.is_directory(**inode)).count() as u64
    }
}

/// A path without the slashes at its end.
pub(crate) fn trimmed(path: &str) -> &str {
    let short = path.trim_end_matches('/');
    if short.is_empty() && !path.is_empty() {
        "/"
    } else {
        short
    }
}

fn text_of(body: &Body) -> u64 {
    match body {
        Body::File(_) => 0,
        Body::Link { contents, .. } => contents.len() as u64,
        Body::Directory { entries, .. } => entries.keys().map(|name| name.len() as u64).sum(),
    }
}

impl Node {
    /// Records a change of the node's attributes.
    pub(crate) fn changed(&mut self, now: u64) {
        match &mut self.body {
            Body::File(content) => content.changed(now),
            Body::Directory { times, .. } | Body::Link { times, .. } => times.change = now,
        }
    }
}
