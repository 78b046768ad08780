//! Places outside the cluster where things are kept: a directory that all nodes
//! see, or an S3-compatible store. What is kept there is left to `checkpoint`
//! and `cluster_volume`.

use keel_net::Bytes;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, RetryConfig};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long one request to a store may be repeated, if nothing else is said.
pub const RETRY_FOR: Duration = Duration::from_secs(30);
/// The most bytes of one object that is read.
const READ_BYTES_MAX: u64 = 1 << 30;

/// A URL that names no store, or one that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "{url:?} is no place for checkpoints or volumes: {reason} (use /a/directory, file:///a/directory or s3://bucket/prefix)"
)]
pub struct StorageLocationError {
    /// What was given.
    pub url: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A place, open.
#[derive(Debug, Clone)]
pub struct StorageLocation {
    store: Arc<dyn ObjectStore>,
    /// The same, if it is a directory.
    folder: Option<Arc<LocalFileSystem>>,
    prefix: Path,
    url: String,
}

/// The directory that a URL names, if it names one.
fn directory(url: &str) -> Option<&str> {
    let folder = url.strip_prefix("file://").unwrap_or(url);
    folder.starts_with('/').then_some(folder)
}

impl StorageLocation {
    /// Opens a place and makes its directory where it is missing: for storing.
    /// Reading makes nothing. Blocking.
    ///
    /// # Errors
    /// [`StorageLocationError`].
    pub fn create(url: &str) -> Result<Self, StorageLocationError> {
        if let Some(folder) = directory(url) {
            std::fs::create_dir_all(folder).map_err(|error| StorageLocationError {
                url: url.to_owned(),
                reason: error.to_string(),
            })?;
        }
        Self::open(url)
    }

    /// Opens a place: `/a/directory`, `file:///a/directory` (which must exist),
    /// or `s3://bucket/prefix` with the usual `AWS_…` variables
    /// (`AWS_ENDPOINT_URL` for stores that are not Amazon's). Blocking.
    ///
    /// # Errors
    /// [`StorageLocationError`].
    pub fn open(url: &str) -> Result<Self, StorageLocationError> {
        let settings = std::env::vars().filter(|(name, _)| name.starts_with("AWS_"));
        Self::open_with(url, settings, RETRY_FOR)
    }

    /// As [`Self::open`], with these in place of the environment's variables, and so
    /// long for one request to be repeated.
    ///
    /// # Errors
    /// [`StorageLocationError`].
    pub fn open_with(
        url: &str,
        settings: impl IntoIterator<Item = (String, String)>,
        retry_for: Duration,
    ) -> Result<Self, StorageLocationError> {
        let bad = |reason: String| StorageLocationError {
            url: url.to_owned(),
            reason,
        };
        if let Some(folder) = directory(url) {
            // The store's own error does not say why.
            std::fs::metadata(folder).map_err(|error| bad(error.to_string()))?;
            let store = LocalFileSystem::new_with_prefix(folder)
                .map_err(|error| bad(error.to_string()))?
                .with_fsync(true);
            let store = Arc::new(store);
            return Ok(StorageLocation {
                folder: Some(store.clone()),
                ..Self::of(store, Path::default(), url)
            });
        }
        let Some(rest) = url.strip_prefix("s3://") else {
            return Err(bad("neither a directory nor s3://".into()));
        };
        // Whoever came first has installed the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let retry = RetryConfig {
            retry_timeout: retry_for,
            ..RetryConfig::default()
        };
        let mut builder = AmazonS3Builder::new();
        for (name, value) in settings {
            // Others are for other programs.
            if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        let store = builder
            .with_bucket_name(bucket)
            .with_allow_http(true)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_retry(retry)
            .build()
            .map_err(|error| bad(error.to_string()))?;
        let prefix = Path::parse(prefix).map_err(|error| bad(error.to_string()))?;
        Ok(Self::of(Arc::new(store), prefix, url))
    }

    /// A place in any object store, by the name that people know it by.
    pub fn of(store: Arc<dyn ObjectStore>, prefix: Path, url: &str) -> Self {
        StorageLocation {
            store,
            folder: None,
            prefix,
            url: url.to_owned(),
        }
    }

    /// Its URL, as it was given.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The store behind it.
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// Where a thing is in the store; no part has a separator.
    pub fn path(&self, parts: &[&str]) -> Path {
        let mut path = self.prefix.clone();
        for part in parts {
            path = path.join(*part);
        }
        path
    }

    /// The file that an object is; `None` if the place is no directory.
    ///
    /// # Errors
    /// For names that no file can have.
    pub fn file(&self, path: &Path) -> Result<Option<PathBuf>, object_store::Error> {
        let folder = self.folder.as_ref();
        folder
            .map(|folder| folder.path_to_filesystem(path))
            .transpose()
    }

    /// Reads an object of at most a GiB.
    ///
    /// # Errors
    /// The store's.
    pub async fn read(&self, path: &Path) -> Result<Bytes, object_store::Error> {
        let got = self.store.get(path).await?;
        if got.meta.size > READ_BYTES_MAX {
            return Err(object_store::Error::Generic {
                store: "place",
                source: format!("{path} has {} bytes", got.meta.size).into(),
            });
        }
        got.bytes().await
    }
}
