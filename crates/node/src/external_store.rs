//! A store outside of the cluster's nodes: where it is, and how this node gets in.

use keel_store::{EtcdOptions, EtcdStore, EtcdTls, StoreError};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Pause between two attempts to reach the store.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// An etcd that has the cluster's store, and this node's way in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalStore {
    /// `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`
    pub address: String,
    /// The authority of etcd's certificates, PEM; with it connections are encrypted.
    pub authority: Option<PathBuf>,
    /// This node's certificate and key for etcd, PEM.
    pub client: Option<(PathBuf, PathBuf)>,
    /// The user, and the file with the password.
    pub user: Option<(String, PathBuf)>,
}

impl ExternalStore {
    fn options(&self) -> Result<EtcdOptions, StoreError> {
        let invalid = |reason: String| StoreError::Invalid { reason };
        let mut options = EtcdOptions::from_address(&self.address).map_err(invalid)?;
        if let Some(authority) = &self.authority {
            options.tls = Some(EtcdTls {
                authority: authority.clone(),
                client: self.client.clone(),
            });
        } else if self.client.is_some() {
            let reason = "a certificate for etcd needs the authority of etcd's certificates, too";
            return Err(invalid(reason.into()));
        }
        if let Some((user, file)) = &self.user {
            let password = std::fs::read_to_string(file).map_err(|error| {
                invalid(format!(
                    "cannot read the password in {}: {error}",
                    file.display()
                ))
            })?;
            let password = password.trim_end_matches(['\r', '\n']);
            options.user = Some((user.clone(), password.to_owned()));
        }
        Ok(options)
    }

    /// Connects once.
    ///
    /// # Errors
    /// [`StoreError`] if no member answers, or it is not as needed.
    pub(crate) async fn connect(&self) -> Result<EtcdStore, StoreError> {
        let own = self.clone();
        let options = tokio::task::spawn_blocking(move || own.options()).await;
        let options = options.map_err(StoreError::unavailable)??;
        EtcdStore::connect(&options).await
    }

    /// Connects, and waits for as long as it takes: machines run on without the store.
    pub(crate) async fn reach(&self) -> EtcdStore {
        loop {
            match self.connect().await {
                Ok(store) => return store,
                Err(error) => {
                    tracing::error!(%error, store = self.address, "the store is not reached yet");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }
}
