//! Repositories of checkpoints: a directory, or an S3-compatible store.
//!
//! Object names consist of machine names and checkpoint ids, which contain no separators.
//! Async; for a worker's own runtime, not for an agent's latency-critical tasks: stores
//! may be slow.
//!
//! This file decides which objects there are and what they contain. Their location, a
//! directory or a bucket, is a [`crate::object_storage::ObjectStorage`]; `direct_io.rs`
//! writes packs into a directory.

use super::direct_io;
use super::format::{BLOCK_BYTES, FormatError, Manifest, Pack};
use super::id::CheckpointId;
use crate::object_storage::{ObjectStorage, StorageLocationError};
use futures::{StreamExt, TryStreamExt};
use keel_cluster::MachineName;
use keel_net::{Bytes, Fingerprint};
use keel_store::clock::unix_ms;
use object_store::path::Path;
use object_store::{GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio::runtime::Handle;

/// Name suffix of the marks of checkpoints being read.
pub(super) const READING: &str = "reading";

/// Why a repository cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error(transparent)]
    Url(#[from] StorageLocationError),
    #[error("checkpoint store: {0}")]
    Store(#[from] object_store::Error),
    /// An object is missing or damaged.
    #[error("checkpoint {id} of machine {machine:?} cannot be used: {part}: {reason}")]
    Part {
        machine: MachineName,
        id: CheckpointId,
        part: String,
        reason: String,
    },
    /// Its quota cannot be read or written.
    #[error(
        "the quota in {url} cannot be used: {reason} (`keel checkpoint quota` sets another one)"
    )]
    Quota { url: String, reason: String },
    /// An image is damaged, or cannot be read where it comes from.
    #[error("image {hash} cannot be used in {url}: {reason}")]
    Image {
        hash: Fingerprint,
        url: String,
        reason: String,
    },
    /// The machine has no checkpoint.
    #[error("machine {0:?} has no checkpoint there (`keel checkpoint {0}` makes one)")]
    None(MachineName),
    /// All of the machine's checkpoints are damaged.
    #[error("no checkpoint of machine {machine:?} is intact: {}", reasons.join("; "))]
    NoneIntact {
        machine: MachineName,
        /// What is wrong with each, newest first.
        reasons: Vec<String>,
    },
}

/// Names a pack of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackName {
    /// Pages of memory.
    Pages(usize),
    /// Blocks of volumes.
    Blocks(usize),
}

impl std::fmt::Display for PackName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PackName::Pages(number) => write!(f, "{number}"),
            PackName::Blocks(number) => write!(f, "v{number}"),
        }
    }
}

/// The objects that a checkpoint consists of, beside its manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    pub id: CheckpointId,
    /// Number of compactions.
    pub generation: u32,
    /// Its packs, with their sizes in bytes.
    pub packs: Vec<(PackName, u64)>,
}

/// A repository of checkpoints.
#[derive(Debug, Clone)]
pub struct Repository {
    pub(super) place: ObjectStorage,
}

/// Receives a verified block with its number.
pub type BlockSink<'a, E> = dyn FnMut(usize, &[u8]) -> Result<(), E> + 'a;

/// Checkpoints of a machine, newest first.
pub type Candidates = Vec<CheckpointId>;

impl Repository {
    /// Opens a repository for writing; creates its directory if it is missing.
    ///
    /// # Errors
    /// [`RepositoryError::Url`].
    pub fn create(url: &str) -> Result<Self, RepositoryError> {
        let place = ObjectStorage::create(url)?;
        Ok(Repository { place })
    }

    /// Opens the repository in a [`ObjectStorage`].
    ///
    /// # Errors
    /// [`RepositoryError::Url`].
    pub fn open(url: &str) -> Result<Self, RepositoryError> {
        let place = ObjectStorage::open(url)?;
        Ok(Repository { place })
    }

    /// As [`Self::open`], with these settings in place of environment variables, and this
    /// time limit for the retries of a request.
    ///
    /// # Errors
    /// [`RepositoryError::Url`].
    pub fn open_with(
        url: &str,
        settings: impl IntoIterator<Item = (String, String)>,
        retry_for: Duration,
    ) -> Result<Self, RepositoryError> {
        let place = ObjectStorage::open_with(url, settings, retry_for)?;
        Ok(Repository { place })
    }

    /// Its URL, as given.
    pub fn url(&self) -> &str {
        self.place.url()
    }

    pub(super) fn store(&self) -> &dyn ObjectStore {
        &**self.place.store()
    }

    fn pack_place(
        &self,
        machine: &MachineName,
        (id, generation): (&CheckpointId, u32),
        piece: PackName,
    ) -> Path {
        let name = match generation {
            0 => format!("{id}.{piece}.pack"),
            _ => format!("{id}.g{generation}.{piece}.pack"),
        };
        self.place.path(&["machines", machine.as_ref(), &name])
    }

    pub(super) fn manifest_place(&self, machine: &MachineName, id: &CheckpointId) -> Path {
        self.place
            .path(&["machines", machine.as_ref(), &format!("{id}.manifest")])
    }

    pub(super) fn program_place(&self, program: &[u8; 32]) -> Path {
        self.place
            .path(&["programs", &format!("{}.wasm", Fingerprint(*program))])
    }

    /// Stores a pack of a checkpoint's generation.
    ///
    /// # Errors
    /// [`RepositoryError::Store`].
    pub async fn put_pack(
        &self,
        machine: &MachineName,
        of: (&CheckpointId, u32),
        piece: PackName,
        bytes: Bytes,
    ) -> Result<(), RepositoryError> {
        let place = self.pack_place(machine, of, piece);
        match self.place.file(&place)? {
            Some(path) => in_folder(move || direct_io::write(&path, &bytes)).await?,
            None => drop(self.store().put(&place, PutPayload::from(bytes)).await?),
        }
        Ok(())
    }

    /// Reads the wanted blocks of a pack in order, one at a time, and passes on those
    /// whose checksum is correct. Blocking, outside of the runtime.
    ///
    /// # Errors
    /// [`RepositoryError`], or the error of `take`; earlier blocks were intact.
    pub fn read_blocks<E: From<RepositoryError>>(
        &self,
        runtime: &Handle,
        (manifest, piece): (&Manifest, PackName),
        expected: &Pack,
        wanted: &mut dyn FnMut(usize) -> bool,
        take: &mut BlockSink<'_, E>,
    ) -> Result<(), E> {
        let part = |reason: String| -> E { Self::part(manifest, piece, reason).into() };
        let store = |error: object_store::Error| -> E { RepositoryError::Store(error).into() };
        let place = self.pack_place(
            &manifest.machine,
            (&manifest.id, manifest.generation),
            piece,
        );
        let got = match runtime.block_on(self.store().get(&place)) {
            Ok(got) => got,
            Err(object_store::Error::NotFound { .. }) => {
                return Err(part("it is missing".into()));
            }
            Err(error) => return Err(store(error)),
        };
        if got.meta.size != expected.bytes {
            return Err(part(format!(
                "it is damaged: it has {} bytes instead of {}",
                got.meta.size, expected.bytes
            )));
        }
        let damaged = |number: usize| {
            part(format!(
                "it is damaged: the checksum of its MiB {number} is wrong"
            ))
        };
        match got.payload {
            GetResultPayload::File(file, _) => {
                let mut reader = direct_io::Reader::new(file);
                for number in 0..expected.blocks.len() {
                    if !wanted(number) {
                        continue;
                    }
                    let bytes = reader
                        .read(expected.block_range(number))
                        .map_err(|error| part(error.to_string()))?;
                    if !expected.has_block(number, bytes) {
                        return Err(damaged(number));
                    }
                    take(number, bytes)?;
                }
            }
            GetResultPayload::Stream(mut stream) => {
                let mut buffer = Vec::with_capacity(BLOCK_BYTES);
                let mut number = 0;
                while number < expected.blocks.len() {
                    let mut bytes = match runtime.block_on(stream.next()) {
                        Some(bytes) => bytes.map_err(store)?,
                        None => return Err(part("it ends too early".into())),
                    };
                    while !bytes.is_empty() && number < expected.blocks.len() {
                        let range = expected.block_range(number);
                        let length = (range.end - range.start) as usize;
                        let now = bytes.split_to((length - buffer.len()).min(bytes.len()));
                        buffer.extend_from_slice(&now);
                        if buffer.len() < length {
                            continue;
                        }
                        if wanted(number) {
                            if !expected.has_block(number, &buffer) {
                                return Err(damaged(number));
                            }
                            take(number, &buffer)?;
                        }
                        buffer.clear();
                        number += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads all of a checkpoint and of those that it depends on; returns the files that are missing
    /// or damaged. For a repository in a directory. Blocking, outside of the runtime.
    ///
    /// # Errors
    /// [`RepositoryError`], also if a manifest is damaged.
    pub fn damaged_files(
        &self,
        runtime: &Handle,
        machine: &MachineName,
        id: &CheckpointId,
    ) -> Result<Vec<PathBuf>, RepositoryError> {
        let mut damaged = Vec::new();
        for manifest in runtime.block_on(self.chain(machine, id))? {
            let pages = (0..).zip(&manifest.packs);
            let pages = pages.map(|(number, pack)| (PackName::Pages(number), pack));
            let blocks = (0..).zip(&manifest.block_packs);
            let blocks = blocks.map(|(number, pack)| (PackName::Blocks(number), pack));
            let mut is_intact = |place: &Path, read| match read {
                Err(RepositoryError::Part { .. }) => {
                    damaged.extend(self.place.file(place)?);
                    Ok(())
                }
                read => read,
            };
            for (piece, pack) in pages.chain(blocks) {
                let of = (&manifest.id, manifest.generation);
                let place = self.pack_place(machine, of, piece);
                let (mut all, mut take) = (|_| true, |_, _: &[u8]| Ok(()));
                let read = self.read_blocks(runtime, (&manifest, piece), pack, &mut all, &mut take);
                is_intact(&place, read)?;
            }
            if let Some(program) = &manifest.program {
                let read = runtime.block_on(self.program(&manifest));
                is_intact(&self.program_place(program), read.map(drop))?;
            }
        }
        Ok(damaged)
    }

    /// Checks that all parts of a machine's checkpoints exist, by name and size.
    ///
    /// # Errors
    /// [`RepositoryError::Part`] for a missing or truncated part,
    /// [`RepositoryError::Store`].
    pub async fn check_parts(
        &self,
        machine: &MachineName,
        chain: &[Outline],
    ) -> Result<(), RepositoryError> {
        let folder = self.place.path(&["machines", machine.as_ref()]);
        let there: HashMap<Path, u64> = self
            .store()
            .list(Some(&folder))
            .map_ok(|object| (object.location, object.size))
            .try_collect()
            .await?;
        for outline in chain {
            let part = |part: String, reason: String| RepositoryError::Part {
                machine: machine.clone(),
                id: outline.id.clone(),
                part,
                reason,
            };
            let manifest = self.manifest_place(machine, &outline.id);
            if !there.contains_key(&manifest) && self.size(&manifest).await?.is_none() {
                return Err(part("its manifest".into(), "it is missing".into()));
            }
            for (piece, expected) in &outline.packs {
                let of = (&outline.id, outline.generation);
                let place = self.pack_place(machine, of, *piece);
                if there.get(&place) == Some(expected) {
                    continue;
                }
                // Listings may be outdated: the object itself decides.
                let reason = match self.size(&place).await? {
                    Some(bytes) if bytes == *expected => continue,
                    Some(bytes) => {
                        format!("it is damaged: it has {bytes} bytes instead of {expected}")
                    }
                    None => "it is missing".into(),
                };
                return Err(part(format!("pack {piece}"), reason));
            }
        }
        Ok(())
    }

    /// Size of an object in bytes; `None` if it is missing.
    async fn size(&self, place: &Path) -> Result<Option<u64>, RepositoryError> {
        match self.store().head(place).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads one block of a pack and verifies it.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn block(
        &self,
        manifest: &Manifest,
        piece: PackName,
        expected: &Pack,
        number: usize,
    ) -> Result<Bytes, RepositoryError> {
        let place = self.pack_place(
            &manifest.machine,
            (&manifest.id, manifest.generation),
            piece,
        );
        let range = expected.block_range(number);
        let bytes = match self.store().get_range(&place, range).await {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => {
                return Err(Self::part(manifest, piece, "it is missing".into()));
            }
            Err(error) => return Err(error.into()),
        };
        if expected.has_block(number, &bytes) {
            Ok(bytes)
        } else {
            let reason = format!("it is damaged: the checksum of its MiB {number} is wrong");
            Err(Self::part(manifest, piece, reason))
        }
    }

    fn part(manifest: &Manifest, piece: PackName, reason: String) -> RepositoryError {
        RepositoryError::Part {
            machine: manifest.machine.clone(),
            id: manifest.id.clone(),
            part: format!("pack {piece}"),
            reason,
        }
    }

    /// Stores a manifest, which completes the checkpoint.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<(), RepositoryError> {
        let bytes = manifest.encode().map_err(|error| RepositoryError::Part {
            machine: manifest.machine.clone(),
            id: manifest.id.clone(),
            part: "its manifest".into(),
            reason: error.to_string(),
        })?;
        let place = self.manifest_place(&manifest.machine, &manifest.id);
        // The names of its packs must be durable before it is.
        let folder = self.place.file(&place)?;
        let folder = folder.as_deref().and_then(std::path::Path::parent);
        if let Some(folder) = folder.map(std::path::Path::to_owned) {
            in_folder(move || match direct_io::sync(&folder) {
                // It has no packs.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                synced => synced,
            })
            .await?;
        }
        self.store().put(&place, PutPayload::from(bytes)).await?;
        Ok(())
    }

    /// Marks a checkpoint as being read, so that it is not deleted for at most an hour;
    /// returns the name of the mark.
    ///
    /// # Errors
    /// [`RepositoryError::Store`].
    pub async fn begin_reading(&self, manifest: &Manifest) -> Result<String, RepositoryError> {
        let name = format!("{}.{:016x}.{READING}", manifest.id, rand::random::<u64>());
        let place = self
            .place
            .path(&["machines", manifest.machine.as_ref(), &name]);
        self.store().put(&place, PutPayload::new()).await?;
        Ok(name)
    }

    /// Removes such a mark.
    ///
    /// # Errors
    /// [`RepositoryError::Store`].
    pub async fn end_reading(
        &self,
        manifest: &Manifest,
        name: &str,
    ) -> Result<(), RepositoryError> {
        let place = self
            .place
            .path(&["machines", manifest.machine.as_ref(), name]);
        Ok(self.store().delete(&place).await?)
    }

    /// Reads a manifest and validates it.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn manifest(
        &self,
        machine: &MachineName,
        id: &CheckpointId,
    ) -> Result<Manifest, RepositoryError> {
        let part = |reason: String| RepositoryError::Part {
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

    /// A checkpoint and its ancestors, the full one first.
    ///
    /// # Errors
    /// [`RepositoryError`], also if the chain is too long.
    pub async fn chain(
        &self,
        machine: &MachineName,
        id: &CheckpointId,
    ) -> Result<Vec<Manifest>, RepositoryError> {
        let mut chain = vec![self.manifest(machine, id).await?];
        while let Some(parent) = chain.last().and_then(|manifest| manifest.parent.clone()) {
            let last = chain.last().map(|manifest| manifest.id.clone());
            if chain.len() >= super::CHAIN_MAX || last.is_some_and(|last| parent >= last) {
                return Err(RepositoryError::Part {
                    machine: machine.clone(),
                    id: id.clone(),
                    part: "its chain".into(),
                    reason: "its chain of ancestors does not end".into(),
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
    /// [`RepositoryError::Store`].
    pub async fn list(&self, machine: &MachineName) -> Result<Candidates, RepositoryError> {
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

    /// Names of machines that have objects here.
    ///
    /// # Errors
    /// [`RepositoryError::Store`].
    pub async fn machines(&self) -> Result<Vec<MachineName>, RepositoryError> {
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

    /// Stores a program (for `wasm`, the instrumented module), unless it exists and is young: one
    /// that no checkpoint names yet may be deleted when it is old (`collection`).
    ///
    /// # Errors
    /// [`RepositoryError::Store`].
    pub async fn put_program(&self, hash: &[u8; 32], bytes: Bytes) -> Result<(), RepositoryError> {
        let place = self.program_place(hash);
        let is_young = |meta: &ObjectMeta| {
            let age = unix_ms().saturating_sub(modified_unix_ms(meta));
            age < super::collection::UNFINISHED_MS / 2
        };
        match self.store().head(&place).await {
            Ok(meta) if meta.size == bytes.len() as u64 && is_young(&meta) => return Ok(()),
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.store().put(&place, PutPayload::from(bytes)).await?;
        Ok(())
    }

    /// Reads a checkpoint's program and verifies it.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn program(&self, manifest: &Manifest) -> Result<Bytes, RepositoryError> {
        let part = |reason: &str| RepositoryError::Part {
            machine: manifest.machine.clone(),
            id: manifest.id.clone(),
            part: "its program".into(),
            reason: reason.into(),
        };
        let hash = manifest.program.ok_or_else(|| part("it names none"))?;
        let bytes = match self.place.read(&self.program_place(&hash)).await {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => return Err(part("it is missing")),
            Err(error) => return Err(error.into()),
        };
        if *blake3::hash(&bytes).as_bytes() == hash {
            Ok(bytes)
        } else {
            Err(part("it is damaged: its checksum is wrong"))
        }
    }
}

/// Runs file operations on threads beside the runtime's own.
async fn in_folder(
    work: impl FnOnce() -> std::io::Result<()> + Send + 'static,
) -> Result<(), RepositoryError> {
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    Ok(done.map_err(|error| object_store::Error::Generic {
        store: "directory",
        source: error.into(),
    })?)
}

/// When an object was written, in milliseconds since 1970-01-01 UTC by its store's clock.
pub(super) fn modified_unix_ms(meta: &ObjectMeta) -> u64 {
    u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0)
}
