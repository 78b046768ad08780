//! The quota of a repository: how many bytes its checkpoints may have in all. It is an object of
//! the repository, so that it counts for all who write there.
//!
//! Whoever creates a checkpoint asks first ([`Repository::quota`], [`Repository::used_bytes`]). A
//! checkpoint that has begun is completed, so the quota can be passed by what is being written.

use super::repository::{Repository, RepositoryError};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use serde::{Deserialize, Serialize};

/// The stored form, JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Quota {
    bytes: u64,
}

impl Repository {
    fn quota_place(&self) -> Path {
        self.place.path(&["quota.json"])
    }

    /// The most bytes that its checkpoints may have; `None` if there is no limit.
    ///
    /// # Errors
    /// [`RepositoryError`]; also if it cannot be understood.
    pub async fn quota(&self) -> Result<Option<u64>, RepositoryError> {
        let got = match self.store().get(&self.quota_place()).await {
            Ok(got) => got,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let text = got.bytes().await?;
        let quota: Quota =
            serde_json::from_slice(&text).map_err(|error| RepositoryError::Quota {
                url: self.url().to_owned(),
                reason: error.to_string(),
            })?;
        Ok(Some(quota.bytes))
    }

    /// Sets or removes the quota. What is stored stays, also if it is more.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn set_quota(&self, bytes: Option<u64>) -> Result<(), RepositoryError> {
        let place = self.quota_place();
        let Some(bytes) = bytes else {
            return match self.store().delete(&place).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(error.into()),
            };
        };
        let text =
            serde_json::to_vec(&Quota { bytes }).map_err(|error| RepositoryError::Quota {
                url: self.url().to_owned(),
                reason: error.to_string(),
            })?;
        self.store().put(&place, PutPayload::from(text)).await?;
        Ok(())
    }

    /// Bytes of all checkpoints, programs and images, and of what killed writers left. Lists all objects.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn used_bytes(&self) -> Result<u64, RepositoryError> {
        let mut used = 0;
        for folder in ["machines", "programs", "images"] {
            let folder = self.place.path(&[folder]);
            let mut objects = self.store().list(Some(&folder));
            while let Some(object) = objects.try_next().await? {
                used += object.size;
            }
        }
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_net::Bytes;

    #[tokio::test]
    async fn a_quota_is_kept_with_the_checkpoints() {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().display().to_string();
        let repository = Repository::create(&url).unwrap();
        assert_eq!(repository.quota().await.unwrap(), None);
        repository.set_quota(None).await.unwrap();
        repository.set_quota(Some(5000)).await.unwrap();
        let another = Repository::open(&url).unwrap();
        assert_eq!(another.quota().await.unwrap(), Some(5000));
        // It is no checkpoint, and does not count.
        assert_eq!(another.used_bytes().await.unwrap(), 0);
        assert!(another.machines().await.unwrap().is_empty());
        let program = Bytes::from_static(&[7; 1000]);
        another.put_program(&[1; 32], program).await.unwrap();
        assert_eq!(another.used_bytes().await.unwrap(), 1000);
        another.set_quota(None).await.unwrap();
        assert_eq!(repository.quota().await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_quota_that_cannot_be_understood_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().display().to_string();
        let repository = Repository::create(&url).unwrap();
        for text in ["", "5", "{\"bytes\":-1}", "{\"bytes\":1,\"objects\":2}"] {
            std::fs::write(folder.path().join("quota.json"), text).unwrap();
            let quota = repository.quota().await;
            assert!(
                matches!(quota, Err(RepositoryError::Quota { .. })),
                "{text}"
            );
        }
        repository.set_quota(Some(1)).await.unwrap();
        assert_eq!(repository.quota().await.unwrap(), Some(1));
    }
}
