//! The stored form of cluster volumes.
//!
//! ```text
//!  segment, snapshot:  "KVOL" │ version u32 │ body length u64 │ body (postcard) │ BLAKE3 of all before
//!  chunk:              the bytes of a block, up to the end of its file; the name has their BLAKE3
//! ```
//!
//! Numbers are little-endian. [`VERSION`] is raised with every change of the body; other
//! versions are refused with an error that names them.

use keel_cluster::Epoch;
use keel_net::{Bytes, Fingerprint};
use keel_wasi::volume::{BLOCK_BYTES, NodeRecord};
use serde::{Deserialize, Serialize};
use std::fmt;

const MAGIC: [u8; 4] = *b"KVOL";
/// Version of a segment's body.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const HASH_BYTES: usize = 32;

/// Orders all writers of a volume.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct WriterEpoch {
    /// Incremented when the cluster is recovered without a quorum.
    pub incarnation: u32,
    /// Incremented when another machine gets the volume.
    pub holding: u64,
    /// The machine's epoch within the incarnation.
    pub counter: u64,
}

impl WriterEpoch {
    /// That of a machine in an epoch, as the `holding`-th holder of the volume.
    pub fn of(epoch: Epoch, holding: u64) -> Self {
        WriterEpoch {
            incarnation: epoch.incarnation,
            holding,
            counter: epoch.counter,
        }
    }
}

impl WriterEpoch {
    /// Parses the form that [`fmt::Display`] writes.
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('.');
        let epoch = WriterEpoch {
            incarnation: numbers.next()?.parse().ok()?,
            holding: numbers.next()?.parse().ok()?,
            counter: numbers.next()?.parse().ok()?,
        };
        numbers.next().is_none().then_some(epoch)
    }
}

impl fmt::Display for WriterEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.incarnation, self.holding, self.counter)
    }
}

/// Identifies a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkRef {
    /// BLAKE3 of its bytes.
    pub hash: [u8; HASH_BYTES],
    /// Its size in bytes, 1 to 64 KiB.
    pub bytes: u32,
    /// The writer that stored it.
    pub writer: WriterEpoch,
}

impl ChunkRef {
    /// The reference of these bytes.
    pub fn of(bytes: &[u8], writer: WriterEpoch) -> Self {
        ChunkRef {
            hash: *blake3::hash(bytes).as_bytes(),
            bytes: bytes.len() as u32,
            writer,
        }
    }

    /// Whether the reference matches these bytes.
    pub fn describes(&self, bytes: &[u8]) -> bool {
        bytes.len() == self.bytes as usize && blake3::hash(bytes).as_bytes() == &self.hash
    }

    /// The folder and the name that it is stored under.
    pub fn place(&self) -> (String, String) {
        let hash = Fingerprint(self.hash).to_string();
        (hash[..2].to_owned(), format!("{hash}-{}", self.writer))
    }

    /// The writer of the chunk of this name; `None` if it is not a chunk's name.
    pub(super) fn writer_of(name: &str) -> Option<WriterEpoch> {
        let (hash, writer) = name.split_once('-')?;
        let is_hash = hash.len() == 2 * HASH_BYTES && hash.bytes().all(|it| it.is_ascii_hexdigit());
        is_hash.then(|| WriterEpoch::parse(writer))?
    }
}

/// Changed blocks of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileBlocks {
    /// Number of the file.
    pub inode: u64,
    /// Block numbers in order, with their new chunks; `None` for a removed block.
    pub blocks: Vec<(u64, Option<ChunkRef>)>,
}

/// A segment of the log: changes, or the whole volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Id of the volume.
    pub volume: [u8; 16],
    /// Its position in the log.
    pub number: u64,
    /// Its writer.
    pub writer: WriterEpoch,
    /// Distinguishes it from another segment for the same position.
    pub nonce: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub written_unix_ms: u64,
    /// Whether it holds the whole volume rather than changes.
    pub is_base: bool,
    /// Limit of the size of all files, in bytes.
    pub bytes_max: u64,
    /// Limit of the number of files, directories and links.
    pub inodes_max: u64,
    /// Number of the next file.
    pub next_inode: u64,
    /// New and changed files, in order of their numbers.
    pub nodes: Vec<NodeRecord>,
    /// Numbers of removed files, in order.
    pub removed: Vec<u64>,
    /// Changed blocks.
    pub blocks: Vec<FileBlocks>,
}

/// Why bytes are not a segment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Truncated, corrupted, or something else.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// Of another version of this program.
    #[error("it is of version {0}, this program reads version {VERSION}")]
    Version(u32),
}

impl Segment {
    /// The stored form.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] if it cannot be encoded.
    pub fn encode(&self) -> Result<Bytes, FormatError> {
        let body =
            postcard::to_stdvec(self).map_err(|_| FormatError::Damaged("it cannot be encoded"))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len() + HASH_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(body);
        let hash = blake3::hash(&bytes);
        bytes.extend(hash.as_bytes());
        Ok(bytes.into())
    }

    /// Decodes the stored form after verifying its checksum.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let damaged = FormatError::Damaged;
        let (header, rest) = bytes
            .split_at_checked(HEADER_BYTES)
            .ok_or(damaged("its header is cut"))?;
        let word = |at: usize| -> [u8; 4] { header[at..at + 4].try_into().unwrap_or_default() };
        if word(0) != MAGIC {
            return Err(damaged("it does not begin with \"KVOL\""));
        }
        let version = u32::from_le_bytes(word(4));
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let length = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
        let length = usize::try_from(length).ok();
        let (body, hash) = match length.and_then(|length| rest.split_at_checked(length)) {
            Some((body, hash)) if hash.len() == HASH_BYTES => (body, hash),
            _ => return Err(damaged("its length is wrong")),
        };
        if blake3::hash(&bytes[..HEADER_BYTES + body.len()]).as_bytes() != hash {
            return Err(damaged("its checksum is wrong"));
        }
        let segment: Segment = match postcard::take_from_bytes(body) {
            Ok((segment, [])) => segment,
            _ => return Err(damaged("its body cannot be decoded")),
        };
        segment.check()?;
        Ok(segment)
    }

    /// Validates what decoding does not.
    fn check(&self) -> Result<(), FormatError> {
        let rising = |mut numbers: std::slice::Iter<'_, u64>| {
            let mut last = None;
            numbers.all(|number| last.replace(*number) < Some(*number))
        };
        let files = self
            .blocks
            .iter()
            .map(|file| file.inode)
            .collect::<Vec<_>>();
        let nodes = self.nodes.iter().map(|node| node.inode).collect::<Vec<_>>();
        if !rising(files.iter()) || !rising(nodes.iter()) || !rising(self.removed.iter()) {
            return Err(FormatError::Damaged("it is not in order"));
        }
        for file in &self.blocks {
            let numbers = file
                .blocks
                .iter()
                .map(|(block, _)| *block)
                .collect::<Vec<_>>();
            let sizes = file.blocks.iter().filter_map(|(_, chunk)| *chunk);
            let mut sizes = sizes.map(|chunk| u64::from(chunk.bytes));
            if !rising(numbers.iter()) || !sizes.all(|bytes| (1..=BLOCK_BYTES).contains(&bytes)) {
                return Err(FormatError::Damaged("it has invalid blocks"));
            }
        }
        if self.is_base && !self.removed.is_empty() {
            return Err(FormatError::Damaged("it removes files that never existed"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_wasi::volume::{NodeBody, VolumeRecord};

    fn segment() -> Segment {
        let writer = WriterEpoch {
            incarnation: 1,
            holding: 2,
            counter: 3,
        };
        let mut nodes = VolumeRecord::empty(7).nodes;
        nodes.push(NodeRecord {
            inode: 2,
            body: NodeBody::File {
                size: 70_000,
                blocks: vec![(0, 2)],
            },
            ..nodes[0].clone()
        });
        let chunk = |byte| Some(ChunkRef::of(&[byte; 9], writer));
        Segment {
            volume: [5; 16],
            number: 8,
            writer,
            nonce: 1,
            written_unix_ms: 2,
            is_base: false,
            bytes_max: 1 << 20,
            inodes_max: 100,
            next_inode: 3,
            nodes,
            removed: vec![4, 5],
            blocks: vec![FileBlocks {
                inode: 2,
                blocks: vec![(0, chunk(1)), (1, chunk(2)), (7, None)],
            }],
        }
    }

    #[test]
    fn truncation_and_corruption_are_detected() {
        let good = segment();
        let bytes = good.encode().unwrap();
        assert_eq!(Segment::decode(&bytes).unwrap(), good);
        for length in 0..bytes.len() {
            let cut = Segment::decode(&bytes[..length]);
            assert!(matches!(cut, Err(FormatError::Damaged(_))), "{length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(Segment::decode(&longer).is_err());
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.to_vec();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Segment::decode(&changed).is_err(), "bit {bit}");
        }
        let mut future = bytes.to_vec();
        future[4] = 9;
        assert_eq!(Segment::decode(&future), Err(FormatError::Version(9)));
    }

    #[test]
    fn inconsistent_segments_are_refused() {
        type Damage = fn(&mut Segment);
        let damages: &[Damage] = &[
            |it| it.nodes.swap(0, 1),
            |it| it.nodes.push(it.nodes[0].clone()),
            |it| it.removed = vec![4, 4],
            |it| it.removed.reverse(),
            |it| it.blocks.push(it.blocks[0].clone()),
            |it| it.blocks[0].blocks.swap(0, 1),
            |it| it.is_base = true,
            |it| it.blocks[0].blocks[0].1.as_mut().unwrap().bytes = 0,
            |it| it.blocks[0].blocks[0].1.as_mut().unwrap().bytes = 65_537,
        ];
        for (index, damage) in damages.iter().enumerate() {
            let mut bad = segment();
            damage(&mut bad);
            let bytes = bad.encode().unwrap();
            let decoded = Segment::decode(&bytes);
            assert!(matches!(decoded, Err(FormatError::Damaged(_))), "{index}");
        }
    }

    #[test]
    fn writers_are_ordered() {
        let of = |incarnation, holding, counter| WriterEpoch {
            incarnation,
            holding,
            counter,
        };
        assert!(of(1, 1, 9) < of(1, 2, 1));
        assert!(of(1, 9, 9) < of(2, 1, 1));
        assert!(of(1, 2, 1) < of(1, 2, 2));
        assert_eq!(of(1, 2, 3).to_string(), "1.2.3");
    }
}
