//! Restores the memory of a machine once it has parts, before it runs: a machine larger
//! than a node is never on one. The caller determines where each piece is written; it
//! moves on according to the parts' limits.

use keel_machine::checkpoint::{
    Layout, Manifest, Repository, RepositoryError, WritePages, read_pages,
};
use tokio::runtime::Handle;

/// Memory that is still to be read. Until it is released ([`Self::release`]), or for an
/// hour, its checkpoints are not deleted.
pub struct SpanningRestore {
    pub(super) repository: Repository,
    pub(super) runtime: Handle,
    pub(super) chain: Vec<Manifest>,
    /// Name of the mark in the store that protects the chain from deletion.
    pub(super) reading: String,
    pub(super) layout: Layout,
}

impl std::fmt::Debug for SpanningRestore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Later").finish_non_exhaustive()
    }
}

impl SpanningRestore {
    /// Bytes of its pages that are not zero.
    pub fn bytes(&self) -> u64 {
        self.layout.bytes()
    }

    /// Reads the memory and passes each piece to `write`, from several threads at once:
    /// the number of the memory, the offset, and the bytes. Blocking, outside of the
    /// runtime.
    ///
    /// # Errors
    /// [`RepositoryError`], or the first error of `write`; some pieces are written then.
    pub fn read_pages<E: From<RepositoryError> + Send>(
        &self,
        write: &WritePages<'_, E>,
    ) -> Result<(), E> {
        read_pages(
            &self.layout,
            &self.chain,
            &self.repository,
            &self.runtime,
            write,
        )
    }

    /// Removes the mark that protects the checkpoints from deletion. Blocking, outside of
    /// the runtime.
    pub fn release(self) {
        let Some(manifest) = self.chain.last() else {
            return;
        };
        let ended = self.repository.end_reading(manifest, &self.reading);
        if let Err(error) = self.runtime.block_on(ended) {
            tracing::debug!(%error, "cannot remove the read mark of a checkpoint: it is kept for an hour");
        }
    }
}
