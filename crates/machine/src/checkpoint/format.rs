//! The stored form of checkpoints.
//!
//! ```text
//!  manifest:  "KCKP" │ version u32 │ body length u64 │ body (postcard) │ BLAKE3 of all before
//!  pack:      pages without framing; the manifest has a BLAKE3 of each MiB
//! ```
//!
//! Numbers are little-endian. The machine's spec within the body is CBOR, so that fields can
//! be added to specs; [`VERSION`] is raised with every other change of the body. Other
//! versions are refused with an error that names them.

use super::id::CheckpointId;
use super::repository::{Outline, PackName};
use crate::spec::Spec;
use keel_cluster::{Epoch, MachineName};
use serde::{Deserialize, Serialize};
use std::ops::Range;

const MAGIC: [u8; 4] = *b"KCKP";
/// Version of the manifest's body.
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 16;
const HASH_BYTES: usize = 32;
/// Bytes of a pack that share a checksum.
pub const BLOCK_BYTES: usize = 1 << 20;

/// The number of a machine's own disk, where others are those of volumes in its spec. The disk is
/// its file 0.
pub const OWN_DISK: u32 = u32::MAX;

/// Pages of one memory, in the order of the packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub memory: u32,
    /// Number of the first 4 KiB page.
    pub first: u32,
    pub pages: u32,
}

/// A change of the machine's own volumes, or of its own disk, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockRun {
    /// A file was truncated; to 0 bytes: it was removed.
    Cut {
        /// Number of the volume in the spec, or [`OWN_DISK`].
        volume: u32,
        /// Number of the file.
        inode: u64,
        /// Its new size at the most, in bytes.
        bytes: u64,
    },
    /// Bytes of a file, which are the next ones in the packs.
    Blocks {
        /// Number of the volume in the spec, or [`OWN_DISK`].
        volume: u32,
        /// Number of the file.
        inode: u64,
        offset: u64,
        bytes: u64,
    },
}

/// Description of a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pack {
    /// Its size in bytes.
    pub bytes: u64,
    /// BLAKE3 of each MiB of it.
    pub blocks: Vec<[u8; HASH_BYTES]>,
}

impl Pack {
    /// The description of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Pack {
            bytes: bytes.len() as u64,
            blocks: bytes
                .chunks(BLOCK_BYTES)
                .map(|block| *blake3::hash(block).as_bytes())
                .collect(),
        }
    }

    /// Whether these are the bytes of one of its blocks.
    pub fn has_block(&self, number: usize, bytes: &[u8]) -> bool {
        self.blocks
            .get(number)
            .is_some_and(|hash| blake3::hash(bytes).as_bytes() == hash)
    }

    /// Byte range of a block.
    pub fn block_range(&self, number: usize) -> Range<u64> {
        let start = (number * BLOCK_BYTES) as u64;
        start.min(self.bytes)..(start + BLOCK_BYTES as u64).min(self.bytes)
    }
}

/// A checkpoint's manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub id: CheckpointId,
    pub machine: MachineName,
    /// The parent of an incremental checkpoint.
    pub parent: Option<CheckpointId>,
    /// Number of compactions: part of its packs' names.
    pub generation: u32,
    /// The epoch under which the machine ran.
    pub epoch: Epoch,
    /// Time of the freeze, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    #[serde(with = "crate::spec::as_cbor")]
    pub spec: Spec,
    /// Hash of the program that runs (for `wasm`, the instrumented module), if its kind has
    /// one.
    pub program: Option<[u8; 32]>,
    /// Bytes of output before the freeze.
    pub log_end: u64,
    /// Size of each memory in 64 KiB pages; for `qemu`, of each block of RAM.
    pub memory_pages: Vec<u64>,
    /// Pages in the packs, in order; the last copy of a page is the valid one.
    pub runs: Vec<Run>,
    /// The packs, in order.
    pub packs: Vec<Pack>,
    /// Changes of the machine's own volumes and disk since the parent.
    pub block_runs: Vec<BlockRun>,
    /// The packs with their blocks, in order.
    pub block_packs: Vec<Pack>,
    /// The machine's state beside its memory; for `wasm`, threads and WASI state, for `qemu`, the
    /// state of its devices.
    pub image: Vec<u8>,
}

/// Why bytes are not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Truncated, corrupted, or something else.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// Of another version of this program.
    #[error("it is of version {0}, this program reads version {VERSION}")]
    Version(u32),
}

impl Manifest {
    /// The stored form.
    ///
    /// # Errors
    /// [`FormatError::Damaged`] if it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let body =
            postcard::to_stdvec(self).map_err(|_| FormatError::Damaged("it cannot be encoded"))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(body);
        let hash = blake3::hash(&bytes);
        bytes.extend(hash.as_bytes());
        Ok(bytes)
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
            return Err(damaged("it does not begin with \"KCKP\""));
        }
        let version = u32::from_le_bytes(word(4));
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let length = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
        if usize::try_from(length)
            .ok()
            .and_then(|length| length.checked_add(HASH_BYTES))
            != Some(rest.len())
        {
            return Err(damaged("its length is wrong"));
        }
        let (content, hash) = bytes.split_at(bytes.len() - HASH_BYTES);
        if blake3::hash(content).as_bytes() != hash {
            return Err(damaged("its checksum is wrong"));
        }
        let body = &content[HEADER_BYTES..];
        let manifest: Manifest =
            postcard::from_bytes(body).map_err(|_| damaged("its body cannot be decoded"))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Validates what decoding does not.
    fn check(&self) -> Result<(), FormatError> {
        let damaged = FormatError::Damaged;
        let mut stored: u64 = 0;
        for run in &self.runs {
            let size = self
                .memory_pages
                .get(run.memory as usize)
                .ok_or(damaged("it has pages of a memory that does not exist"))?;
            let end = u64::from(run.first) + u64::from(run.pages);
            if run.pages == 0 || end > size.saturating_mul(16) {
                return Err(damaged("it has pages outside its memory"));
            }
            stored += u64::from(run.pages) * crate::PAGE_BYTES;
        }
        if sum_of(&self.packs) != Some(stored) {
            return Err(damaged("its packs are not as long as its pages"));
        }
        for pack in self.packs.iter().chain(&self.block_packs) {
            if pack.bytes.div_ceil(BLOCK_BYTES as u64) != pack.blocks.len() as u64 {
                return Err(damaged("a pack has too few or too many checksums"));
            }
        }
        self.check_volumes()
    }

    fn check_volumes(&self) -> Result<(), FormatError> {
        let damaged = FormatError::Damaged;
        let own = self.spec.own_volumes();
        let mut stored: u64 = 0;
        for run in &self.block_runs {
            let (volume, end) = match *run {
                BlockRun::Cut { volume, bytes, .. } => (volume, Some(bytes)),
                BlockRun::Blocks {
                    volume,
                    offset,
                    bytes,
                    ..
                } => {
                    stored = stored
                        .checked_add(bytes)
                        .ok_or(damaged("it has too many blocks"))?;
                    (volume, offset.checked_add(bytes).filter(|_| bytes > 0))
                }
            };
            if !(own.contains(&volume) || volume == OWN_DISK) || end.is_none() {
                return Err(damaged("it has blocks of a volume that does not exist"));
            }
        }
        if sum_of(&self.block_packs) != Some(stored) {
            return Err(damaged("its packs are not as long as its blocks"));
        }
        Ok(())
    }

    /// The objects that it consists of.
    pub fn outline(&self) -> Outline {
        let pieces = self.pieces();
        Outline {
            id: self.id.clone(),
            generation: self.generation,
            packs: pieces.map(|(piece, pack)| (piece, pack.bytes)).collect(),
        }
    }

    /// Its packs.
    pub fn pieces(&self) -> impl Iterator<Item = (PackName, &Pack)> {
        let pages = self.packs.iter().enumerate();
        let blocks = self.block_packs.iter().enumerate();
        pages
            .map(|(number, pack)| (PackName::Pages(number), pack))
            .chain(blocks.map(|(number, pack)| (PackName::Blocks(number), pack)))
    }

    /// Bytes of its pages and blocks.
    pub fn stored_bytes(&self) -> u64 {
        let packs = self.packs.iter().chain(&self.block_packs);
        packs.map(|pack| pack.bytes).sum()
    }
}

fn sum_of(packs: &[Pack]) -> Option<u64> {
    packs
        .iter()
        .try_fold(0u64, |sum, pack| sum.checked_add(pack.bytes))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kind::KindSpec;
    use crate::spec::{Balancing, Volume, VolumeKind};
    use std::collections::BTreeMap;

    pub(crate) fn example() -> Manifest {
        let pages = vec![7u8; 3 * 4096];
        let volume = |kind| Volume {
            kind,
            guest: "/data".into(),
            read_only: false,
        };
        Manifest {
            id: CheckpointId::new(1_700_000_000_000),
            machine: "web-1".parse().unwrap(),
            parent: None,
            generation: 0,
            epoch: Epoch {
                incarnation: 1,
                counter: 5,
            },
            created_unix_ms: 1_700_000_000_000,
            spec: Spec {
                kind: "wasm".parse().unwrap(),
                kind_spec: KindSpec::new(&BTreeMap::from([("module", "ab".repeat(32))])).unwrap(),
                volumes: vec![
                    volume(VolumeKind::Host { path: "/a".into() }),
                    volume(VolumeKind::Tmp {
                        bytes: 1 << 30,
                        inodes: 1000,
                    }),
                ],
                memory_bytes: 1 << 20,
                cpu_limit_millis: None,
                output_bytes_per_s: 1000,
                remove_at_end: false,
                restart: crate::restart_policy::Restart::No,
                checkpoints: None,
                ha: None,
                balancing: Balancing::default(),
            },
            program: Some([3; 32]),
            log_end: 77,
            memory_pages: vec![2],
            runs: vec![
                Run {
                    memory: 0,
                    first: 0,
                    pages: 2,
                },
                Run {
                    memory: 0,
                    first: 31,
                    pages: 1,
                },
            ],
            packs: vec![Pack::of(&pages)],
            block_runs: vec![
                BlockRun::Cut {
                    volume: 1,
                    inode: 3,
                    bytes: 0,
                },
                BlockRun::Blocks {
                    volume: 1,
                    inode: 4,
                    offset: 65536,
                    bytes: 5,
                },
            ],
            block_packs: vec![Pack::of(b"block")],
            image: vec![1, 2, 3],
        }
    }

    #[test]
    fn encoding_is_reversible() {
        let manifest = example();
        let bytes = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
    }

    #[test]
    fn truncation_is_detected() {
        let bytes = example().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(
                matches!(
                    Manifest::decode(&bytes[..length]),
                    Err(FormatError::Damaged(_))
                ),
                "{length}"
            );
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(Manifest::decode(&longer).is_err());
    }

    #[test]
    fn a_flipped_bit_is_detected() {
        let bytes = example().encode().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::decode(&changed).is_err(), "{bit}");
        }
    }

    #[test]
    fn other_versions_are_named() {
        let mut bytes = example().encode().unwrap();
        bytes[4] = 9;
        assert_eq!(Manifest::decode(&bytes), Err(FormatError::Version(9)));
    }

    /// Even with a correct checksum pages outside of a memory are refused.
    #[test]
    fn inconsistencies_are_detected() {
        let blocks = |volume, offset, bytes| BlockRun::Blocks {
            volume,
            inode: 4,
            offset,
            bytes,
        };
        for run in [
            blocks(0, 0, 5),
            blocks(2, 0, 5),
            blocks(1, u64::MAX, 5),
            blocks(1, 0, 0),
            blocks(1, 0, 4),
            blocks(1, 0, u64::MAX),
            BlockRun::Cut {
                volume: 0,
                inode: 4,
                bytes: 5,
            },
        ] {
            let mut manifest = example();
            manifest.block_runs[1] = run;
            let bytes = manifest.encode().unwrap();
            let decoded = Manifest::decode(&bytes);
            assert!(matches!(decoded, Err(FormatError::Damaged(_))), "{run:?}");
        }
        let changes: [fn(&mut Manifest); 6] = [
            |manifest| manifest.block_packs.clear(),
            |manifest| manifest.runs[0].memory = 1,
            |manifest| manifest.runs[1].first = 32,
            |manifest| manifest.runs[0].pages = 0,
            |manifest| manifest.packs[0].bytes += 1,
            |manifest| manifest.packs.clear(),
        ];
        for change in changes {
            let mut manifest = example();
            change(&mut manifest);
            let bytes = manifest.encode().unwrap();
            assert!(matches!(
                Manifest::decode(&bytes),
                Err(FormatError::Damaged(_))
            ));
        }
    }

    #[test]
    fn a_pack_describes_its_bytes() {
        let bytes: Vec<u8> = (0..3 * BLOCK_BYTES + 5)
            .map(|at| (at % 250) as u8)
            .collect();
        let pack = Pack::of(&bytes);
        assert_eq!(pack.blocks.len(), 4);
        let block = |number, bytes: &[u8]| {
            let range = pack.block_range(number);
            pack.has_block(number, &bytes[range.start as usize..range.end as usize])
        };
        assert!((0..4).all(|number| block(number, &bytes)));
        assert!(!pack.has_block(0, &bytes[1..=BLOCK_BYTES]) && !pack.has_block(4, &[]));
        assert!(pack.block_range(4).is_empty());
        for at in [0, BLOCK_BYTES, bytes.len() - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let wrong: Vec<usize> = (0..4).filter(|number| !block(*number, &changed)).collect();
            assert_eq!(wrong, [at / BLOCK_BYTES]);
        }
    }

    #[test]
    fn names_are_in_order_of_time() {
        let (early, late) = (CheckpointId::new(999), CheckpointId::new(1_700_000_000_000));
        assert!(early < late);
        assert_eq!(late.to_string().parse(), Ok(late));
        for bad in [
            "",
            "x",
            "1700000000000-xyz",
            "../../../etc-12345678",
            "170000000000-00000000",
        ] {
            assert!(bad.parse::<CheckpointId>().is_err(), "{bad}");
        }
    }
}
