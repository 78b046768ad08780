//! The messages of a move and their encoding: what a frame's payload means. Sending and receiving
//! frames, and the transfer of pages, are left to [`super::Link`].

use super::LinkError;
use crate::moves::FillReport;
use bytes::Bytes;
use keel_cluster::{Epoch, MachineName};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Version of these messages.
pub const HELLO_VERSION: u32 = 7;
/// Maximum functions in one message.
pub const FUNCTIONS_MAX: usize = 4096;

const KIND_HELLO: u16 = 1;
const KIND_SIZE: u16 = 2;
pub(super) const KIND_PAGES: u16 = 3;
const KIND_LOG: u16 = 4;
const KIND_ROUND_END: u16 = 5;
const KIND_ROUND_DONE: u16 = 6;
const KIND_IMAGE: u16 = 7;
const KIND_IMAGE_END: u16 = 8;
const KIND_PREPARED: u16 = 9;
const KIND_GO: u16 = 10;
const KIND_RESUMED: u16 = 11;
const KIND_ABORT: u16 = 12;
const KIND_REMOTE: u16 = 13;
const KIND_PULL: u16 = 14;
const KIND_ALL_SENT: u16 = 15;
const KIND_FILLED: u16 = 16;
const KIND_BLOCK: u16 = 17;
const KIND_CUT: u16 = 18;
const KIND_FROZEN: u16 = 19;
const KIND_PARTS: u16 = 20;
const KIND_LOG_BEGINS: u16 = 21;
const KIND_LOG_RESEND: u16 = 22;
const KIND_FUNCTIONS: u16 = 23;
const KIND_COMPILING: u16 = 24;

/// The source's first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`HELLO_VERSION`].
    pub version: u32,
    pub machine: MachineName,
    /// The epoch under which the source runs it.
    pub epoch: Epoch,
    /// Hash of the program that runs (for `wasm`, the instrumented module), if its kind has
    /// one.
    pub program: Option<[u8; 32]>,
    /// Offset of the first byte of output that the source still has.
    pub log_base: u64,
    /// Whether this is a post-copy move.
    pub post_copy: bool,
    pub purpose: Purpose,
}

impl Hello {
    /// Whether it belongs to the same move.
    pub fn is_like(&self, other: &Hello) -> bool {
        self.machine == other.machine && self.epoch == other.epoch && self.program == other.program
    }
}

/// Purpose of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// The move itself.
    Move,
    /// Memory, beside the first connection or after that was lost.
    Push,
    /// Requests for pages that threads wait for; and the pages, where the source reads them itself.
    Pull,
    /// What is to be read and written of the target's disk.
    DiskRequests,
    /// The answers to that.
    DiskAnswers,
}

/// A message; pages are transferred separately, see [`Link::send_pages`](super::Link::send_pages)
/// and [`Link::receive_pages`](super::Link::receive_pages).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The source's first message.
    Hello(Hello),
    /// A memory's size in 64 KiB pages.
    Size {
        /// Number of the memory.
        memory: u32,
        pages: u64,
    },
    /// A piece of output.
    Log { offset: u64, bytes: Bytes },
    /// Bytes of a file in one of the machine's own volumes.
    Block {
        /// Number of the volume in the spec.
        volume: u32,
        /// Number of the file.
        inode: u64,
        offset: u64,
        bytes: Bytes,
    },
    /// A file was truncated; to 0 bytes: it was removed.
    Cut {
        /// Number of the volume in the spec.
        volume: u32,
        /// Number of the file.
        inode: u64,
        /// Its new size at the most, in bytes.
        bytes: u64,
    },
    /// End of a round.
    RoundEnd,
    /// All data of a round is in place.
    RoundDone,
    /// A piece of the machine's image.
    Image(Bytes),
    /// End of the image.
    ImageEnd,
    /// The target is ready.
    Prepared,
    /// The commit was applied.
    Go(Epoch),
    /// The machine runs at the target.
    Resumed(Epoch),
    /// The sender gives the move up.
    Abort(String),
    /// Names pages that only the source has: bit n, counted from the lowest of each byte,
    /// is page `first_page + n`.
    Remote {
        /// Number of the memory.
        memory: u32,
        /// Page of the first bit.
        first_page: u64,
        bits: Bytes,
    },
    /// Requests a page that a thread waits for.
    Pull {
        /// Number of the memory.
        memory: u32,
        page: u64,
    },
    /// The sender has sent everything.
    AllSent,
    /// The machine is frozen from now on: what follows adds to its downtime.
    Frozen,
    /// The target has everything.
    Filled(FillReport),
    /// A piece of the state that a home passes to its successor.
    Parts(Bytes),
    /// The source no longer has output before an offset; what follows begins there.
    LogBegins { offset: u64 },
    /// The target requests output from an offset on.
    LogResend { offset: u64 },
    /// Functions on the stacks of the machine's threads, by their positions in the metadata of
    /// the program; of large ones also the points at which they are, from the number of all functions
    /// on (older nodes ignore those). At most [`FUNCTIONS_MAX`] in all.
    Functions(BTreeSet<u32>),
    /// All data of a round is in place, but functions are still being compiled.
    Compiling,
}

impl Message {
    /// Whether it belongs to the naming of pages left to post-copy.
    pub fn names_pages(&self) -> bool {
        matches!(
            self,
            Message::Size { .. } | Message::Remote { .. } | Message::RoundEnd
        )
    }

    /// Decodes the payload of a frame.
    ///
    /// # Errors
    /// [`LinkError::Message`].
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Self, LinkError> {
        Ok(match kind {
            KIND_HELLO => {
                let (version, _) = postcard::take_from_bytes::<u32>(payload)
                    .map_err(|error| LinkError::Message(error.to_string()))?;
                if version != HELLO_VERSION {
                    return Err(LinkError::Message(format!(
                        "the source speaks version {version} of moves, this node {HELLO_VERSION}: upgrade the older one"
                    )));
                }
                Message::Hello(plain(payload)?)
            }
            KIND_SIZE => Message::Size {
                memory: number(payload, 0)? as u32,
                pages: number(payload, 8)?,
            },
            KIND_LOG => Message::Log {
                offset: number(payload, 0)?,
                bytes: Bytes::copy_from_slice(&payload[8..]),
            },
            KIND_BLOCK => Message::Block {
                volume: volume_number(payload)?,
                inode: number(payload, 8)?,
                offset: number(payload, 16)?,
                bytes: Bytes::copy_from_slice(&payload[24..]),
            },
            KIND_CUT => Message::Cut {
                volume: volume_number(payload)?,
                inode: number(payload, 8)?,
                bytes: number(payload, 16)?,
            },
            KIND_ROUND_END => Message::RoundEnd,
            KIND_ROUND_DONE => Message::RoundDone,
            KIND_IMAGE => Message::Image(Bytes::copy_from_slice(payload)),
            KIND_IMAGE_END => Message::ImageEnd,
            KIND_PREPARED => Message::Prepared,
            KIND_GO => Message::Go(plain(payload)?),
            KIND_RESUMED => Message::Resumed(plain(payload)?),
            KIND_ABORT => Message::Abort(String::from_utf8_lossy(payload).into_owned()),
            KIND_REMOTE => Message::Remote {
                memory: number(payload, 0)? as u32,
                first_page: number(payload, 8)?,
                bits: Bytes::copy_from_slice(&payload[16..]),
            },
            KIND_PULL => Message::Pull {
                memory: number(payload, 0)? as u32,
                page: number(payload, 8)?,
            },
            KIND_ALL_SENT => Message::AllSent,
            KIND_FROZEN => Message::Frozen,
            KIND_PARTS => Message::Parts(Bytes::copy_from_slice(payload)),
            KIND_FILLED => Message::Filled(plain(payload)?),
            KIND_LOG_BEGINS => Message::LogBegins {
                offset: number(payload, 0)?,
            },
            KIND_LOG_RESEND => Message::LogResend {
                offset: number(payload, 0)?,
            },
            KIND_FUNCTIONS => {
                let functions: BTreeSet<u32> = plain(payload)?;
                if functions.len() > FUNCTIONS_MAX {
                    let count = functions.len();
                    return Err(LinkError::Message(format!("{count} functions at once")));
                }
                Message::Functions(functions)
            }
            KIND_COMPILING => Message::Compiling,
            other => return Err(LinkError::Message(format!("a message of kind {other}"))),
        })
    }

    pub(super) fn encode(&self) -> Result<(u16, Vec<u8>), LinkError> {
        let pack = |value: &Epoch| {
            postcard::to_stdvec(value).map_err(|error| LinkError::Message(error.to_string()))
        };
        Ok(match self {
            Message::Hello(hello) => (
                KIND_HELLO,
                postcard::to_stdvec(hello)
                    .map_err(|error| LinkError::Message(error.to_string()))?,
            ),
            Message::Size { memory, pages } => {
                let mut bytes = u64::from(*memory).to_le_bytes().to_vec();
                bytes.extend(pages.to_le_bytes());
                (KIND_SIZE, bytes)
            }
            Message::Log { offset, bytes } => {
                let mut out = offset.to_le_bytes().to_vec();
                out.extend(bytes);
                (KIND_LOG, out)
            }
            Message::Block {
                volume,
                inode,
                offset,
                bytes,
            } => {
                let mut out = Vec::with_capacity(24 + bytes.len());
                for word in [u64::from(*volume), *inode, *offset] {
                    out.extend(word.to_le_bytes());
                }
                out.extend(bytes);
                (KIND_BLOCK, out)
            }
            Message::Cut {
                volume,
                inode,
                bytes,
            } => {
                let words = [u64::from(*volume), *inode, *bytes];
                let words = words.iter().flat_map(|word| word.to_le_bytes());
                (KIND_CUT, words.collect())
            }
            Message::RoundEnd => (KIND_ROUND_END, Vec::new()),
            Message::RoundDone => (KIND_ROUND_DONE, Vec::new()),
            Message::Image(bytes) => (KIND_IMAGE, bytes.to_vec()),
            Message::ImageEnd => (KIND_IMAGE_END, Vec::new()),
            Message::Prepared => (KIND_PREPARED, Vec::new()),
            Message::Go(epoch) => (KIND_GO, pack(epoch)?),
            Message::Resumed(epoch) => (KIND_RESUMED, pack(epoch)?),
            Message::Abort(reason) => (KIND_ABORT, reason.as_bytes().to_vec()),
            Message::Remote {
                memory,
                first_page,
                bits,
            } => {
                let mut bytes = u64::from(*memory).to_le_bytes().to_vec();
                bytes.extend(first_page.to_le_bytes());
                bytes.extend(bits);
                (KIND_REMOTE, bytes)
            }
            Message::Pull { memory, page } => {
                let mut bytes = u64::from(*memory).to_le_bytes().to_vec();
                bytes.extend(page.to_le_bytes());
                (KIND_PULL, bytes)
            }
            Message::AllSent => (KIND_ALL_SENT, Vec::new()),
            Message::Frozen => (KIND_FROZEN, Vec::new()),
            Message::Parts(bytes) => (KIND_PARTS, bytes.to_vec()),
            Message::LogBegins { offset } => (KIND_LOG_BEGINS, offset.to_le_bytes().to_vec()),
            Message::LogResend { offset } => (KIND_LOG_RESEND, offset.to_le_bytes().to_vec()),
            Message::Functions(functions) => (
                KIND_FUNCTIONS,
                postcard::to_stdvec(functions)
                    .map_err(|error| LinkError::Message(error.to_string()))?,
            ),
            Message::Compiling => (KIND_COMPILING, Vec::new()),
            Message::Filled(report) => (
                KIND_FILLED,
                postcard::to_stdvec(report)
                    .map_err(|error| LinkError::Message(error.to_string()))?,
            ),
        })
    }
}

pub(super) fn number(bytes: &[u8], at: usize) -> Result<u64, LinkError> {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes)
        .ok_or_else(|| LinkError::Message("a message is too short".into()))
}

fn volume_number(payload: &[u8]) -> Result<u32, LinkError> {
    let volume = number(payload, 0)?;
    u32::try_from(volume).map_err(|_| LinkError::Message(format!("volume {volume}")))
}

fn plain<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, LinkError> {
    postcard::from_bytes(bytes).map_err(|error| LinkError::Message(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages as version 7 writes them. Postcard names no fields: whoever changes what one
    /// of them is raises [`HELLO_VERSION`], and refuses older ones by name.
    #[test]
    fn messages_of_this_version_stay_what_they_are() -> Result<(), LinkError> {
        let machine: MachineName = "m".parse().expect("a name");
        let epoch = Epoch {
            incarnation: 1,
            counter: 300,
        };
        let hello = Hello {
            version: HELLO_VERSION,
            machine,
            epoch,
            program: Some([7; 32]),
            log_base: 5,
            post_copy: true,
            purpose: Purpose::Pull,
        };
        let report = FillReport {
            micros: 1,
            pushed_pages: 2,
            pulled_pages: 3,
            local_faults: 4,
            reconnects: 5,
            latency_log2_micros: vec![6, 300],
        };
        let bytes = Bytes::from_static(b"ab");
        let program = "07".repeat(32);
        let hello_bytes = format!("07016d01ac0201{program}050102");
        let words = |numbers: &[u64]| -> String {
            let words = numbers.iter().map(|it| it.swap_bytes());
            words.map(|it| format!("{it:016x}")).collect()
        };
        let all = [
            (Message::Hello(hello), 1, hello_bytes),
            (
                Message::Size {
                    memory: 1,
                    pages: 2,
                },
                2,
                words(&[1, 2]),
            ),
            (
                Message::Log {
                    offset: 3,
                    bytes: bytes.clone(),
                },
                4,
                words(&[3]) + "6162",
            ),
            (Message::RoundEnd, 5, String::new()),
            (Message::RoundDone, 6, String::new()),
            (Message::Image(bytes.clone()), 7, "6162".into()),
            (Message::ImageEnd, 8, String::new()),
            (Message::Prepared, 9, String::new()),
            (Message::Go(epoch), 10, "01ac02".into()),
            (Message::Resumed(epoch), 11, "01ac02".into()),
            (Message::Abort("ab".into()), 12, "6162".into()),
            (
                Message::Remote {
                    memory: 1,
                    first_page: 2,
                    bits: bytes.clone(),
                },
                13,
                words(&[1, 2]) + "6162",
            ),
            (Message::Pull { memory: 1, page: 2 }, 14, words(&[1, 2])),
            (Message::AllSent, 15, String::new()),
            (Message::Filled(report), 16, "01020304050206ac02".into()),
            (
                Message::Block {
                    volume: 1,
                    inode: 2,
                    offset: 3,
                    bytes: bytes.clone(),
                },
                17,
                words(&[1, 2, 3]) + "6162",
            ),
            (
                Message::Cut {
                    volume: 1,
                    inode: 2,
                    bytes: 3,
                },
                18,
                words(&[1, 2, 3]),
            ),
            (Message::Frozen, 19, String::new()),
            (Message::Parts(bytes), 20, "6162".into()),
            (Message::LogBegins { offset: 3 }, 21, words(&[3])),
            (Message::LogResend { offset: 3 }, 22, words(&[3])),
            (
                Message::Functions(BTreeSet::from([1, 300])),
                23,
                "0201ac02".into(),
            ),
            (Message::Compiling, 24, String::new()),
        ];
        for (message, kind, bytes) in all {
            let (encoded_kind, encoded) = message.encode()?;
            let hexadecimal: String = encoded.iter().map(|it| format!("{it:02x}")).collect();
            assert_eq!((encoded_kind, hexadecimal), (kind, bytes), "{message:?}");
            assert_eq!(Message::decode(kind, &encoded)?, message);
        }
        Ok(())
    }

    #[test]
    fn random_payloads_never_panic() {
        use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
        for seed in 0..20_000 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut payload = vec![0; random.random_range(0..64)];
            random.fill_bytes(&mut payload);
            // Either a message or an error with a reason.
            let _ = Message::decode(random.random_range(0..=KIND_COMPILING), &payload);
        }
    }
}
