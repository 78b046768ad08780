//! Images in repositories of checkpoints: a machine that uses its images wherever it runs has them in
//! every repository that has a checkpoint of it. So a repository alone brings it back.

use super::files::{ImageError, Images};
use super::writer::ImageWriter;
use crate::error::CommandError;
use futures::StreamExt;
use keel_machine::checkpoint::{KeptImage, Repository, RepositoryError};
use keel_machine::spec::Spec;
use keel_net::Fingerprint;
use std::path::{Path, PathBuf};

fn fingerprint(hash: &str) -> Result<Fingerprint, ImageError> {
    hash.parse()
        .map_err(|_| ImageError::NoHash(hash.to_owned()))
}

fn unavailable(error: RepositoryError) -> CommandError {
    CommandError::Unavailable(error.to_string())
}

/// What was done for the images of a machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StoredImages {
    /// Bytes that were stored.
    pub(crate) bytes: u64,
    /// Whether somebody may have begun to delete one of them: it was old, or perhaps what is left of an
    /// earlier upload was.
    may_go: bool,
}

impl Images {
    /// The images that a machine uses wherever it runs.
    pub(super) fn used(&self, spec: &Spec) -> Result<Vec<String>, String> {
        let kind = self.context.kinds.of(spec)?;
        match kind.abilities().keeps_images {
            true => kind.images(spec),
            false => Ok(Vec::new()),
        }
    }

    /// Stores the images that a machine uses wherever it runs in a repository, unless they are there.
    /// For the first checkpoint there it may take long.
    ///
    /// # Errors
    /// [`CommandError`] if one cannot be read or written.
    pub(crate) async fn store_in(
        &self,
        repository: &Repository,
        spec: &Spec,
    ) -> Result<StoredImages, CommandError> {
        let mut stored = StoredImages::default();
        for hash in self.used(spec).map_err(CommandError::Unavailable)? {
            match repository.keep_image(&fingerprint(&hash)?).await {
                Ok(KeptImage::Young) => {}
                Ok(KeptImage::Renewed) => stored.may_go = true,
                Ok(KeptImage::Absent) => {
                    stored.may_go = true;
                    stored.bytes += self.put_in(repository, &hash).await?;
                }
                Err(error) => return Err(unavailable(error)),
            }
        }
        Ok(stored)
    }

    /// Stores an image in a repository that lacks it; the bytes that were stored.
    async fn put_in(&self, repository: &Repository, hash: &str) -> Result<u64, CommandError> {
        let file = self.find_image(hash).await?;
        let put = repository.put_image(&fingerprint(hash)?, file).await;
        put.map_err(unavailable)
    }

    /// Looks again whether a repository has the images of a machine that has a checkpoint there now,
    /// and stores what somebody has deleted meanwhile.
    ///
    /// # Errors
    /// [`CommandError`] as [`Self::store_in`].
    pub(crate) async fn store_again(
        &self,
        repository: &Repository,
        spec: &Spec,
        before: StoredImages,
    ) -> Result<(), CommandError> {
        if !before.may_go {
            return Ok(());
        }
        for hash in self.used(spec).map_err(CommandError::Unavailable)? {
            let is_there = repository.has_image(&fingerprint(&hash)?).await;
            if !is_there.map_err(unavailable)? {
                self.put_in(repository, &hash).await?;
            }
        }
        Ok(())
    }

    /// As [`Self::find_image`]; if no node has it, it is read from the repository at this URL, if any.
    pub(crate) async fn find_image_or_in(
        &self,
        hash: &str,
        repository: Option<&str>,
    ) -> Result<PathBuf, ImageError> {
        let nowhere = match self.find_image(hash).await {
            Err(error @ ImageError::Nowhere(_)) => error,
            found => return found,
        };
        let Some(url) = repository.map(str::to_owned) else {
            return Err(nowhere);
        };
        let opened = tokio::task::spawn_blocking(move || Repository::open(&url)).await;
        let repository = opened
            .map_err(|error| ImageError::Unwritten(error.to_string()))?
            .map_err(ImageError::Repository)?;
        let (hash, path) = (fingerprint(hash)?, self.image_path(hash)?);
        // Machines that are restored together need the same ones.
        let _turn = self.reading.lock().await;
        if self.keep_longer(&path).await {
            return Ok(path);
        }
        match self.read_from(&repository, &hash, &path).await? {
            true => Ok(path),
            false => Err(nowhere),
        }
    }

    /// Reads an image from a repository; false if it is not there.
    async fn read_from(
        &self,
        repository: &Repository,
        hash: &Fingerprint,
        path: &Path,
    ) -> Result<bool, ImageError> {
        let image = repository.image(hash).await;
        let Some(image) = image.map_err(ImageError::Repository)? else {
            return Ok(false);
        };
        let damaged = |reason: &str| {
            ImageError::Repository(RepositoryError::Image {
                hash: *hash,
                url: repository.url().to_owned(),
                reason: reason.into(),
            })
        };
        if image.bytes() > self.context.kinds.file_bytes_max() {
            return Err(damaged("it is too large"));
        }
        let writer = ImageWriter::new(path.parent().unwrap_or(path));
        let mut pieces = image.pieces();
        while let Some(piece) = pieces.next().await {
            if !writer.add(piece.map_err(ImageError::Repository)?).await {
                break;
            }
        }
        let written = writer.finish().await.map_err(ImageError::Unwritten)?;
        if written.hash != hash.to_string() {
            return Err(damaged("it does not match its hash"));
        }
        let kept = self.keep_file(written, path.to_owned()).await;
        kept.map_err(ImageError::Unwritten)?;
        tracing::info!(%hash, "read an image from {}", repository.url());
        Ok(true)
    }
}
