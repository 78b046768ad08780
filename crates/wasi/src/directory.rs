//! `fd_readdir`: a listing is taken when a guest starts at cookie 0 and kept with the descriptor,
//! so that cookies stay valid while entries change and over a move.

use crate::abi::{Result, types};
use crate::descriptor::{OpenDirectory, Place};
use crate::listing::{Entry, Listing};
use crate::lock::locked;
use crate::unlinked_open::is_hidden_name;
use cap_std::fs::Dir;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno as HostErrno;
use types::{Errno, Filetype};

/// Bytes of a `dirent` before the name.
const HEAD_BYTES: usize = 24;

/// Lists `directory` from `cookie` on into at most `length` bytes. The last
/// entry may be cut off; a result shorter than `length` means the end.
pub(crate) fn read(
    directory: &OpenDirectory,
    length: usize,
    cookie: u64,
    entries_max: usize,
) -> Result<Vec<u8>> {
    let mut kept = locked(&directory.listing);
    if cookie == 0 || kept.is_none() {
        *kept = None;
        *kept = Some(match &directory.place {
            Place::Host { dir, .. } => list(dir, entries_max)?,
            Place::Volume(node) => node.volume.list(node.inode, entries_max)?,
        });
    }
    let Some(listing) = kept.as_ref() else {
        return Err(Errno::Io.into());
    };
    let own = match &directory.place {
        Place::Host { id, .. } => id.inode,
        Place::Volume(node) => node.inode,
    };
    let mut bytes = Vec::new();
    let skip = usize::try_from(cookie).unwrap_or(usize::MAX);
    // wasmtime, too, gives `..` the number of the directory itself.
    let heads = [(".", own), ("..", own)]
        .map(|(name, inode)| (name, inode, Filetype::Directory as u8))
        .into_iter();
    let rest = listing
        .iter()
        .map(|entry| (entry.name.as_str(), entry.inode, entry.filetype));
    for ((name, inode, filetype), next) in heads.chain(rest).zip(1_u64..).skip(skip) {
        let mut head = [0; HEAD_BYTES];
        head[0..8].copy_from_slice(&next.to_le_bytes());
        head[8..16].copy_from_slice(&inode.to_le_bytes());
        head[16..20].copy_from_slice(&u32::try_from(name.len())?.to_le_bytes());
        head[20] = filetype;
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(name.as_bytes());
        if bytes.len() >= length {
            bytes.truncate(length);
            break;
        }
    }
    Ok(bytes)
}

/// The entries, sorted by name so that all hosts agree on the order.
fn list(dir: &Dir, entries_max: usize) -> Result<Listing> {
    let mut listing = Listing::new();
    for entry in entries(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." || is_hidden_name(name) {
            continue;
        }
        if listing.len() >= entries_max {
            return Err(Errno::Nomem.into());
        }
        let name = str::from_utf8(name).map_err(|_| Errno::Ilseq)?.to_owned();
        let filetype = match entry.file_type() {
            // Some file systems do not report the type.
            FileType::Unknown => match dir.symlink_metadata(&name) {
                Ok(metadata) => filetype_of_path(&metadata),
                Err(_) => Filetype::Unknown,
            },
            known => filetype_of(known),
        };
        listing.push(Entry {
            name,
            inode: entry.ino(),
            filetype: filetype as u8,
        });
    }
    listing.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(listing)
}

/// All entries of a directory, from the start.
pub(crate) fn entries(dir: &Dir) -> Result<rustix::fs::Dir, HostErrno> {
    // A fresh descriptor: `dir` may be `O_PATH`, and has a position.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::Dir::new(rustix::fs::openat(dir, ".", flags, Mode::empty())?)
}

/// The guest's type; preview 1 has none for a fifo.
pub(crate) fn filetype_of(filetype: FileType) -> Filetype {
    match filetype {
        FileType::RegularFile => Filetype::RegularFile,
        FileType::Directory => Filetype::Directory,
        FileType::Symlink => Filetype::SymbolicLink,
        FileType::BlockDevice => Filetype::BlockDevice,
        FileType::CharacterDevice => Filetype::CharacterDevice,
        FileType::Socket => Filetype::SocketStream,
        FileType::Fifo | FileType::Unknown => Filetype::Unknown,
    }
}

pub(crate) fn filetype_of_path(metadata: &cap_std::fs::Metadata) -> Filetype {
    use cap_std::fs::MetadataExt;
    filetype_of(FileType::from_raw_mode(metadata.mode()))
}
