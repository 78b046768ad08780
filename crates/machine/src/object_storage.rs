//! Storage outside the cluster: a directory that all nodes see, or an S3-compatible
//! store. `checkpoint` and `cluster_volume` define what is stored.

use keel_net::Bytes;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, RetryConfig};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Default time limit for the retries of one request.
pub const RETRY_FOR: Duration = Duration::from_secs(30);
/// The largest object that is read, in bytes.
const READ_BYTES_MAX: u64 = 1 << 30;

/// A URL that does not name a store, or a store that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "{url:?} is not a location for checkpoints or volumes: {reason} (use /a/directory, file:///a/directory or s3://bucket/prefix)"
)]
pub struct StorageLocationError {
    pub url: String,
    pub reason: String,
}

/// An open storage location.
#[derive(Debug, Clone)]
pub struct ObjectStorage {
    store: Arc<dyn ObjectStore>,
    /// The same store, if it is a directory.
    folder: Option<Arc<LocalFileSystem>>,
    prefix: Path,
    url: String,
}

/// The directory that a URL names, if it does.
fn directory(url: &str) -> Option<&str> {
    let folder = url.strip_prefix("file://").unwrap_or(url);
    folder.starts_with('/').then_some(folder)
}

impl ObjectStorage {
    /// Opens a location for writing; creates its directory if it is missing. Blocking.
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

    /// Opens a location: `/a/directory`, `file:///a/directory` (which must exist), or
    /// `s3://bucket/prefix` with the usual `AWS_…` variables (`AWS_ENDPOINT_URL` for
    /// stores other than Amazon's). Blocking.
    ///
    /// # Errors
    /// [`StorageLocationError`].
    pub fn open(url: &str) -> Result<Self, StorageLocationError> {
        let settings = std::env::vars().filter(|(name, _)| name.starts_with("AWS_"));
        Self::open_with(url, settings, RETRY_FOR)
    }

    /// As [`Self::open`], with these settings in place of environment variables, and this
    /// time limit for the retries of a request.
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
            // The store's own error does not contain the reason.
            std::fs::metadata(folder).map_err(|error| bad(error.to_string()))?;
            let store = LocalFileSystem::new_with_prefix(folder)
                .map_err(|error| bad(error.to_string()))?
                .with_fsync(true);
            let store = Arc::new(store);
            return Ok(ObjectStorage {
                folder: Some(store.clone()),
                ..Self::of(store, Path::default(), url)
            });
        }
        let Some(rest) = url.strip_prefix("s3://") else {
            return Err(bad("neither a directory nor s3://".into()));
        };
        // An installed provider is the same one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let retry = RetryConfig {
            retry_timeout: retry_for,
            ..RetryConfig::default()
        };
        let mut builder = AmazonS3Builder::new();
        for (name, value) in settings {
            // Other settings are for other programs.
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

    /// A location in any object store; `url` is its name for users.
    pub fn of(store: Arc<dyn ObjectStore>, prefix: Path, url: &str) -> Self {
        ObjectStorage {
            store,
            folder: None,
            prefix,
            url: url.to_owned(),
        }
    }

    /// Its URL, as given.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The underlying store.
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }

    /// Path of an object; its components contain no separators.
    pub fn path(&self, parts: &[&str]) -> Path {
        let mut path = self.prefix.clone();
        for part in parts {
            path = path.join(*part);
        }
        path
    }

    /// The file of an object; `None` if the location is not a directory.
    ///
    /// # Errors
    /// For names that no file can have.
    pub fn file(&self, path: &Path) -> Result<Option<PathBuf>, object_store::Error> {
        let folder = self.folder.as_ref();
        folder
            .map(|folder| folder.path_to_filesystem(path))
            .transpose()
    }

    /// Reads an object of at most 1 GiB.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn read(&self, path: &Path) -> Result<Bytes, object_store::Error> {
        self.read_at_most(path, READ_BYTES_MAX).await
    }

    /// Reads an object of at most so many bytes.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn read_at_most(
        &self,
        path: &Path,
        bytes_max: u64,
    ) -> Result<Bytes, object_store::Error> {
        let got = self.store.get(path).await?;
        if got.meta.size > bytes_max {
            return Err(object_store::Error::Generic {
                store: "place",
                source: format!("{path} has {} bytes", got.meta.size).into(),
            });
        }
        got.bytes().await
    }
}
