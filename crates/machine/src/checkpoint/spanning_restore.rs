//! The memory of a machine made of a checkpoint that comes when it has parts, before it
//! runs: what is larger than a node never is on one. Who has it read says where it goes;
//! each piece goes on from there as the parts' limits have it.

use super::format::Manifest;
use super::layout::Layout;
use super::repository::{Repository, RepositoryError};
use super::restore::{Write, bring};
use tokio::runtime::Handle;

/// What is to come. Until it is let go ([`Self::let_go`]), or for an hour, nobody deletes
/// what it is made of.
pub struct SpanningRestore {
    pub(super) vault: Repository,
    pub(super) runtime: Handle,
    pub(super) chain: Vec<Manifest>,
    /// Says in the store that the chain is being read.
    pub(super) reading: String,
    pub(super) layout: Layout,
}

impl std::fmt::Debug for SpanningRestore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Later").finish_non_exhaustive()
    }
}

impl SpanningRestore {
    /// Bytes of it; all else is zero.
    pub fn bytes(&self) -> u64 {
        self.layout.bytes()
    }

    /// Reads it, and has each piece written: the number of its memory, where, and its
    /// bytes, from several threads at once. Blocking, outside of the runtime.
    ///
    /// # Errors
    /// [`RepositoryError`], or the first that `write` answers; some of it is written then.
    pub fn bring<E: From<RepositoryError> + Send>(&self, write: &Write<'_, E>) -> Result<(), E> {
        bring(&self.layout, &self.chain, &self.vault, &self.runtime, write)
    }

    /// What it is made of need not be kept any longer for this. Blocking, outside of the
    /// runtime.
    pub fn let_go(self) {
        let Some(manifest) = self.chain.last() else {
            return;
        };
        let ended = self.vault.end_reading(manifest, &self.reading);
        if let Err(error) = self.runtime.block_on(ended) {
            tracing::debug!(%error, "a checkpoint is kept for an hour that was read");
        }
    }
}
