//! Quotas of repositories: shown, set, and kept when a checkpoint is to be created.

use super::handle::{Checkpoints, open, opened, place, repository_error};
use crate::error::CommandError;
use keel_api::{QuotaInfo, QuotaRequest};
use keel_machine::checkpoint::Repository;

impl Checkpoints {
    /// The quota of a repository, and how much of it is used.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn quota(&self, from: Option<&str>) -> Result<QuotaInfo, CommandError> {
        self.quota_of(&open(place(&self.context, from)).await?)
            .await
    }

    /// Sets or removes the quota of a repository, whose directory is created if it is missing.
    ///
    /// # Errors
    /// [`CommandError`].
    pub(crate) async fn set_quota(&self, request: QuotaRequest) -> Result<QuotaInfo, CommandError> {
        let url = place(&self.context, request.from.as_deref());
        let repository = opened(move || Repository::create(&url)).await?;
        let set = repository.set_quota(request.bytes).await;
        set.map_err(|error| repository_error(&error))?;
        self.quota_of(&repository).await
    }

    async fn quota_of(&self, repository: &Repository) -> Result<QuotaInfo, CommandError> {
        let quota = repository.quota().await;
        let used = repository.used_bytes().await;
        let used_bytes = used.map_err(|error| repository_error(&error))?;
        self.usage.counted(repository.url(), used_bytes);
        Ok(QuotaInfo {
            repository: repository.url().to_owned(),
            used_bytes,
            quota_bytes: quota.map_err(|error| repository_error(&error))?,
        })
    }

    /// Refuses another checkpoint in a repository whose quota is used up.
    pub(super) async fn check_quota(&self, repository: &Repository) -> Result<(), CommandError> {
        let failed = |error| repository_error(&error);
        let Some(quota) = repository.quota().await.map_err(failed)? else {
            return Ok(());
        };
        let url = repository.url();
        if self.usage.recent(url).is_some_and(|used| used < quota) {
            return Ok(());
        }
        // What used it up may have been deleted.
        let used = repository.used_bytes().await.map_err(failed)?;
        self.usage.counted(url, used);
        match used < quota {
            true => Ok(()),
            false => Err(CommandError::Conflict(format!(
                "the checkpoints in {url} have {used} bytes, and their quota is {quota}: delete some \
                 (`keel checkpoint prune`), or raise it (`keel checkpoint quota`)"
            ))),
        }
    }
}
