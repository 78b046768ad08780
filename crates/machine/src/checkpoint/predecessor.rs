//! The checkpoint that the next one of a machine continues.

use super::CHAIN_MAX;
use super::format::Manifest;
use super::id::CheckpointId;
use super::repository::{Outline, Repository, RepositoryError};
use keel_cluster::MachineName;

/// The last checkpoint that was made of a machine.
#[derive(Debug)]
pub struct Predecessor {
    repository: String,
    id: CheckpointId,
    /// Its chain, the full checkpoint first.
    chain: Vec<Outline>,
}

impl Predecessor {
    /// A checkpoint that was made, of which `parent` is the predecessor.
    pub fn new(repository: &Repository, parent: Option<Self>, made: &Manifest) -> Self {
        let mut chain = parent.map_or_else(Vec::new, |last| last.chain);
        chain.push(made.outline());
        Predecessor {
            repository: repository.url().to_owned(),
            id: made.id.clone(),
            chain,
        }
    }

    /// The name of the next checkpoint of a machine: names increase, whatever the clocks of the nodes
    /// show. It is above that of `parent` and `after`, and all in the repository.
    ///
    /// # Errors
    /// If the repository cannot be read.
    pub async fn next_id(
        repository: &Repository,
        machine: &MachineName,
        parent: Option<&Self>,
        after: Option<&CheckpointId>,
    ) -> Result<CheckpointId, RepositoryError> {
        let all = repository.list(machine).await?;
        let newest = all.iter().chain(parent.map(Self::id)).chain(after).max();
        Ok(CheckpointId::after(newest))
    }

    /// Its name.
    pub fn id(&self) -> &CheckpointId {
        &self.id
    }

    /// Whether the next checkpoint in a repository may contain only what was written since.
    pub fn is_continued_in(&self, repository: &Repository) -> bool {
        self.repository == repository.url() && self.chain.len() < CHAIN_MAX
    }

    /// This, if its whole chain still exists, by names and sizes: it may have been deleted.
    ///
    /// # Errors
    /// If the repository cannot be read.
    pub async fn if_intact(
        self,
        repository: &Repository,
        machine: &MachineName,
    ) -> Result<Option<Self>, RepositoryError> {
        if repository.check_parts(machine, &self.chain).await.is_ok() {
            return Ok(Some(self));
        }
        // It may have been compacted since and still be intact.
        let chain = match repository.chain(machine, &self.id).await {
            Ok(chain) => {
                let chain: Vec<Outline> = chain.iter().map(Manifest::outline).collect();
                repository
                    .check_parts(machine, &chain)
                    .await
                    .map(|()| chain)
            }
            Err(error) => Err(error),
        };
        match chain {
            Ok(chain) => Ok(Some(Predecessor { chain, ..self })),
            Err(error @ RepositoryError::Part { .. }) => {
                tracing::warn!(%error, "cannot continue the chain: the next checkpoint is a full one");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
