//! A frozen machine without its memories, as plain data.

use super::frame::ThreadState;
use super::hints::Hints;
use super::machine::MachineError;
use super::program::Program;
use super::wait::WaitQueues;
use crate::memory::WASM_PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// First bytes of an encoded image.
const IMAGE_MAGIC: [u8; 4] = *b"KIMG";
/// Version of the format: an [`Image`], then its network. Machines without connections are written
/// as the version before, which older programs read.
const IMAGE_VERSION: u32 = 4;
/// An [`Image`] alone.
const WITHOUT_NETWORK: u32 = 3;
/// Also without hints.
const WITHOUT_HINTS: u32 = 2;

/// Entry point of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Entry {
    Main,
    Spawned { arg: u32 },
}

/// A machine without its memories, as plain data.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Image {
    /// Hash of the instrumented module.
    pub module: [u8; 32],
    pub(super) threads: BTreeMap<u32, (Entry, Option<ThreadState>)>,
    pub(super) next_tid: u32,
    pub(super) waits: WaitQueues,
    /// Size of each memory in 64 KiB pages.
    pub memory_pages: Vec<u64>,
    pub wasi: keel_wasi::Snapshot,
    /// Placement hints. (Must stay the last field: it is absent in [`WITHOUT_HINTS`].)
    pub(super) names: Hints,
}

impl Image {
    /// `"KIMG"`, version (`u32`), then postcard.
    ///
    /// # Errors
    /// [`MachineError::Image`] if it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, MachineError> {
        let mut bytes = IMAGE_MAGIC.to_vec();
        let network = &self.wasi.network;
        let encoded = if network.connections.is_empty() {
            bytes.extend(WITHOUT_NETWORK.to_le_bytes());
            postcard::to_extend(self, bytes)
        } else {
            bytes.extend(IMAGE_VERSION.to_le_bytes());
            postcard::to_extend(&(self, network), bytes)
        };
        encoded.map_err(|error| MachineError::Image(error.to_string()))
    }

    /// Reads an image and checks it against the module.
    ///
    /// # Errors
    /// [`MachineError::Image`], [`MachineError::Frames`].
    pub fn decode(bytes: &[u8], program: &Program) -> Result<Self, MachineError> {
        let bad = |what: &str| MachineError::Image(what.to_owned());
        let (header, body) = bytes.split_at_checked(8).ok_or(bad("it is too short"))?;
        if header[..4] != IMAGE_MAGIC {
            return Err(bad("it does not begin with \"KIMG\""));
        }
        let mut past = Vec::new();
        let version = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let body = match version {
            IMAGE_VERSION | WITHOUT_NETWORK => body,
            WITHOUT_HINTS => {
                past.extend_from_slice(body);
                // No names and no affinities.
                past.extend_from_slice(&[0, 0]);
                &past
            }
            _ => return Err(bad("it is of another version")),
        };
        let damaged = |error: postcard::Error| MachineError::Image(error.to_string());
        let (mut image, mut rest): (Image, _) = postcard::take_from_bytes(body).map_err(damaged)?;
        if version == IMAGE_VERSION {
            (image.wasi.network, rest) = postcard::take_from_bytes(rest).map_err(damaged)?;
        }
        if !rest.is_empty() {
            return Err(bad("it has trailing bytes"));
        }
        if image.module != *program.hash() {
            return Err(bad("it is of another module"));
        }
        if image.memory_pages.len() != program.meta.memories.len() {
            return Err(bad("its memories differ from the module's"));
        }
        let first = image.memory_pages.first();
        let size = first.map_or(0, |pages| pages.saturating_mul(WASM_PAGE_BYTES));
        if !image.names.is_valid(size) {
            return Err(bad("it names ranges outside of memory"));
        }
        for (_, state) in image.threads.values() {
            if let Some(state) = state {
                state.check(&program.meta)?;
            }
        }
        Ok(image)
    }

    pub fn threads(&self) -> usize {
        self.threads.len()
    }
}
