//! What a checkpoint has of a system beside its memory and its disk: the state of its devices, and
//! what is needed to read the rest.

use super::disk::Zeroes;
use super::ram_stream::Head;
use serde::{Deserialize, Serialize};

/// Version of this form.
const VERSION: u8 = 1;

/// A system, less the pages of its memory and the blocks of its disk.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SystemState {
    pub(super) head: Head,
    /// As QEMU wrote it.
    #[serde(with = "serde_bytes")]
    pub(super) devices: Vec<u8>,
    /// Which clusters of its own disk read as zeroes, in the portable format of Roaring bitmaps.
    #[serde(with = "serde_bytes")]
    zeroes: Vec<u8>,
}

impl SystemState {
    /// # Errors
    /// If the zeroes cannot be encoded.
    pub(super) fn new(head: Head, devices: Vec<u8>, zeroes: &Zeroes) -> std::io::Result<Self> {
        let mut bytes = Vec::with_capacity(zeroes.serialized_size());
        zeroes.serialize_into(&mut bytes)?;
        Ok(SystemState {
            head,
            devices,
            zeroes: bytes,
        })
    }

    /// # Errors
    /// A message, if it cannot be encoded.
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        postcard::to_extend(self, vec![VERSION]).map_err(|error| error.to_string())
    }

    /// Decodes it; with it the zeroes of the disk.
    ///
    /// # Errors
    /// A message, if it is damaged or of another version.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, Zeroes), String> {
        let (version, body) = bytes.split_first().ok_or("it is empty")?;
        if *version != VERSION {
            return Err(format!(
                "it is of version {version}, this program reads version {VERSION}"
            ));
        }
        let state: SystemState =
            postcard::from_bytes(body).map_err(|_| "it cannot be decoded".to_owned())?;
        state.head.check().map_err(|error| error.to_string())?;
        let zeroes = Zeroes::deserialize_from(&state.zeroes[..])
            .map_err(|_| "the zeroes of its disk cannot be decoded".to_owned())?;
        Ok((state, zeroes))
    }

    /// The sizes of its blocks of memory, in 64 KiB pages.
    pub(super) fn memory_pages(&self) -> Vec<u64> {
        let blocks = self.head.blocks.iter();
        blocks.map(|block| block.bytes.div_ceil(1 << 16)).collect()
    }
}

/// Whether bytes are the state of a system.
pub(crate) fn is_system_state(bytes: &[u8]) -> bool {
    SystemState::decode(bytes).is_ok_and(|(state, _)| state.encode().is_ok())
}
