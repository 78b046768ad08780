//! Where checkpoints are stored: a directory, or an S3-compatible store.
//!
//! Names are made of machine names and checkpoint ids only, which have no
//! separators. Async; for a worker's own runtime, never for an agent's hot
//! paths: stores may be slow.

use super::format::{CheckpointId, FormatError, Manifest, Pack};
use crate::place::{Place, PlaceError};
use futures::{StreamExt, TryStreamExt};
use keel_cluster::MachineName;
use keel_net::{Bytes, Fingerprint};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};

/// Why a vault cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The URL names no store.
    #[error(transparent)]
    Url(#[from] PlaceError),
    /// The store failed.
    #[error("checkpoint store: {0}")]
    Store(#[from] object_store::Error),
    /// Something stored is not what it should be.
    #[error("checkpoint {id} of machine {machine:?} cannot be used: {part}: {reason}")]
    Part {
        /// The machine.
        machine: MachineName,
        /// The checkpoint.
        id: CheckpointId,
        /// Which part of it.
        part: String,
        /// What is wrong.
        reason: String,
    },
    /// There is none.
    #[error("machine {0:?} has no checkpoint there (`keel checkpoint {0}` makes one)")]
    None(MachineName),
}

/// Which pack of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Pages of memory.
    Pages(usize),
    /// Blocks of volumes.
    Blocks(usize),
}

impl std::fmt::Display for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Piece::Pages(number) => write!(f, "{number}"),
            Piece::Blocks(number) => write!(f, "v{number}"),
        }
    }
}

/// A store of checkpoints.
#[derive(Debug, Clone)]
pub struct Vault {
    place: Place,
}

/// Checkpoints of a machine, newest first.
pub type Candidates = Vec<CheckpointId>;

impl Vault {
    /// Opens a vault and makes its directory where it is missing: for storing.
    /// Reading makes nothing.
    ///
    /// # Errors
    /// [`VaultError::Url`].
    pub fn create(url: &str) -> Result<Self, VaultError> {
        let place = Place::create(url)?;
        Ok(Vault { place })
    }

    /// Opens a vault in a [`Place`].
    ///
    /// # Errors
    /// [`VaultError::Url`].
    pub fn open(url: &str) -> Result<Self, VaultError> {
        let place = Place::open(url)?;
        Ok(Vault { place })
    }

    /// As [`Self::open`], with these in place of the environment's variables.
    ///
    /// # Errors
    /// [`VaultError::Url`].
    pub fn open_with(
        url: &str,
        settings: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, VaultError> {
        let place = Place::open_with(url, settings)?;
        Ok(Vault { place })
    }

    /// Its URL, as it was given.
    pub fn url(&self) -> &str {
        self.place.url()
    }

    fn store(&self) -> &dyn ObjectStore {
        &**self.place.store()
    }

    fn pack_place(&self, machine: &MachineName, id: &CheckpointId, piece: Piece) -> Path {
        self.place
            .path(&["machines", machine.as_ref(), &format!("{id}.{piece}.pack")])
    }

    fn manifest_place(&self, machine: &MachineName, id: &CheckpointId) -> Path {
        self.place
            .path(&["machines", machine.as_ref(), &format!("{id}.manifest")])
    }

    fn program_place(&self, program: &[u8; 32]) -> Path {
        self.place
            .path(&["programs", &format!("{}.wasm", Fingerprint(*program))])
    }

    /// Stores a pack.
    ///
    /// # Errors
    /// [`VaultError::Store`].
    pub async fn put_pack(
        &self,
        machine: &MachineName,
        id: &CheckpointId,
        piece: Piece,
        bytes: Bytes,
    ) -> Result<(), VaultError> {
        let place = self.pack_place(machine, id, piece);
        self.store().put(&place, PutPayload::from(bytes)).await?;
        Ok(())
    }

    /// Reads a pack and checks it.
    ///
    /// # Errors
    /// [`VaultError`].
    pub async fn pack(
        &self,
        machine: &MachineName,
        id: &CheckpointId,
        piece: Piece,
        expected: &Pack,
    ) -> Result<Bytes, VaultError> {
        let part = |reason: String| VaultError::Part {
            machine: machine.clone(),
            id: id.clone(),
            part: format!("pack {piece}"),
            reason,
        };
        let place = self.pack_place(machine, id, piece);
        let bytes = match self.place.read(&place).await {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => return Err(part("it is missing".into())),
            Err(error) => return Err(error.into()),
        };
        if expected.describes(&bytes) {
            Ok(bytes)
        } else {
            Err(part("it is damaged: its checksum is wrong".into()))
        }
    }

    /// Stores a manifest: from now on the checkpoint is there.
    ///
    /// # Errors
    /// [`VaultError`].
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<(), VaultError> {
        let bytes = manifest.encode().map_err(|error| VaultError::Part {
            machine: manifest.machine.clone(),
            id: manifest.id.clone(),
            part: "its manifest".into(),
            reason: error.to_string(),
        })?;
        let place = self.manifest_place(&manifest.machine, &manifest.id);
        self.store().put(&place, PutPayload::from(bytes)).await?;
        Ok(())
    }

    /// Reads a manifest and checks it.
    ///
    /// # Errors
    /// [`VaultError`].
    pub async fn manifest(
        &self,
        machine: &MachineName,
        id: &CheckpointId,
    ) -> Result<Manifest, VaultError> {
        let part = |reason: String| VaultError::Part {
            machine: machine.clone(),
            id: id.clone(),
            part: "its manifest".into(),
            reason,
        };
        let bytes = match self.place.read(&self.manifest_place(machine, id)).await {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => return Err(part("it is missing".into())),
            Err(error) => return Err(error.into()),
        };
        let manifest =
            Manifest::decode(&bytes).map_err(|error: FormatError| part(error.to_string()))?;
        if manifest.machine != *machine || manifest.id != *id {
            return Err(part(format!(
                "it is of checkpoint {} of machine {:?}",
                manifest.id, manifest.machine
            )));
        }
        Ok(manifest)
    }

    /// A checkpoint and those that it stands on, the full one first.
    ///
    /// # Errors
    /// [`VaultError`], also where a chain is longer than it can be.
    pub async fn chain(
        &self,
        machine: &MachineName,
        id: &CheckpointId,
    ) -> Result<Vec<Manifest>, VaultError> {
        let mut chain = vec![self.manifest(machine, id).await?];
        while let Some(parent) = chain.last().and_then(|manifest| manifest.parent.clone()) {
            let last = chain.last().map(|manifest| manifest.id.clone());
            if chain.len() >= super::CHAIN_MAX || last.is_some_and(|last| parent >= last) {
                return Err(VaultError::Part {
                    machine: machine.clone(),
                    id: id.clone(),
                    part: "its chain".into(),
                    reason: "it does not end".into(),
                });
            }
            chain.push(self.manifest(machine, &parent).await?);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Names of a machine's checkpoints, newest first.
    ///
    /// # Errors
    /// [`VaultError::Store`].
    pub async fn list(&self, machine: &MachineName) -> Result<Candidates, VaultError> {
        let folder = self.place.path(&["machines", machine.as_ref()]);
        let mut found: Candidates = self
            .store()
            .list(Some(&folder))
            .try_filter_map(|object| async move {
                let name = object.location.filename().unwrap_or_default();
                Ok(name
                    .strip_suffix(".manifest")
                    .and_then(|id| id.parse().ok()))
            })
            .try_collect()
            .await?;
        found.sort_unstable_by(|a, b| b.cmp(a));
        Ok(found)
    }

    /// Machines that have something here, by name.
    ///
    /// # Errors
    /// [`VaultError::Store`].
    pub async fn machines(&self) -> Result<Vec<MachineName>, VaultError> {
        let folder = self.place.path(&["machines"]);
        let listing = self.store().list_with_delimiter(Some(&folder)).await?;
        let mut names: Vec<MachineName> = listing
            .common_prefixes
            .iter()
            .filter_map(|place| place.filename()?.parse().ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Stores an instrumented module, unless it is there.
    ///
    /// # Errors
    /// [`VaultError::Store`].
    pub async fn put_program(&self, hash: &[u8; 32], bytes: Bytes) -> Result<(), VaultError> {
        let place = self.program_place(hash);
        match self.store().head(&place).await {
            Ok(meta) if meta.size == bytes.len() as u64 => return Ok(()),
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.store().put(&place, PutPayload::from(bytes)).await?;
        Ok(())
    }

    /// Reads a checkpoint's instrumented module and checks it.
    ///
    /// # Errors
    /// [`VaultError`].
    pub async fn program(&self, manifest: &Manifest) -> Result<Bytes, VaultError> {
        let part = |reason: &str| VaultError::Part {
            machine: manifest.machine.clone(),
            id: manifest.id.clone(),
            part: "its program".into(),
            reason: reason.into(),
        };
        let bytes = match self
            .place
            .read(&self.program_place(&manifest.program))
            .await
        {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => return Err(part("it is missing")),
            Err(error) => return Err(error.into()),
        };
        if *blake3::hash(&bytes).as_bytes() == manifest.program {
            Ok(bytes)
        } else {
            Err(part("it is damaged: its checksum is wrong"))
        }
    }

    /// Deletes a machine's checkpoints but the newest `keep` and those that they
    /// stand on, and pieces of checkpoints that were never finished. Which
    /// checkpoints went.
    ///
    /// # Errors
    /// [`VaultError`]; nothing that is needed is gone then.
    pub async fn keep_newest(
        &self,
        machine: &MachineName,
        keep: usize,
    ) -> Result<Vec<CheckpointId>, VaultError> {
        let all = self.list(machine).await?;
        let mut needed = std::collections::BTreeSet::new();
        for id in all.iter().take(keep.max(1)) {
            // One that cannot be read is kept: it may be readable tomorrow.
            needed.insert(id.clone());
            if let Ok(chain) = self.chain(machine, id).await {
                needed.extend(chain.into_iter().map(|manifest| manifest.id));
            }
        }
        let newest = all.first().cloned();
        let folder = self.place.path(&["machines", machine.as_ref()]);
        let objects: Vec<Path> = self
            .store()
            .list(Some(&folder))
            .map_ok(|object| object.location)
            .try_collect()
            .await?;
        let id_of = |place: &Path| -> Option<CheckpointId> {
            place.filename()?.split_once('.')?.0.parse().ok()
        };
        let mut gone = std::collections::BTreeSet::new();
        let (mut manifests, mut packs) = (Vec::new(), Vec::new());
        for place in objects {
            // What is newer than the newest may just be in the making.
            let Some(id) =
                id_of(&place).filter(|id| newest.as_ref().is_some_and(|newest| id < newest))
            else {
                continue;
            };
            if needed.contains(&id) {
                continue;
            }
            let is_manifest = place.extension() == Some("manifest");
            if is_manifest {
                gone.insert(id);
                manifests.push(Ok(place));
            } else {
                packs.push(Ok(place));
            }
        }
        // Without its manifest a checkpoint is not there: it never lacks a part.
        for places in [manifests, packs] {
            let places = futures::stream::iter(places).boxed();
            self.store()
                .delete_stream(places)
                .try_collect::<Vec<_>>()
                .await?;
        }
        Ok(gone.into_iter().collect())
    }
}
