//! Requests of users about images of disks that have a name in the cluster.

use super::copies;
use super::files::{ImageError, Images};
use super::records::{ImageRecord, all, encode, record};
use crate::error::CommandError;
use crate::records;
use futures::future::join_all;
use keel_api::{ImageInfo, ImageRequest};
use keel_cluster::MachineName;
use keel_cluster::failover::ReplicaNode;
use keel_machine::kind::{DiskImage, IMAGE_BEGINNING_BYTES, KindName, Kinds};
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use keel_store::{Compare, Txn, TxnOutcome};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

fn image_name(name: &str) -> Result<MachineName, CommandError> {
    MachineName::new(name).map_err(|error| CommandError::Invalid(format!("image: {error}")))
}

fn no_image(name: &MachineName) -> CommandError {
    CommandError::NotFound(format!(
        "there is no image {:?} (see `keel image ls`; `keel image import FILE --name {name}` makes one)",
        name.as_str()
    ))
}

/// The beginning of a file, and its size in bytes. Blocks.
fn beginning(path: &Path) -> std::io::Result<(Vec<u8>, u64)> {
    let file = std::fs::File::open(path)?;
    let mut beginning = Vec::new();
    let most = IMAGE_BEGINNING_BYTES as u64;
    (&file).take(most).read_to_end(&mut beginning)?;
    Ok((beginning, file.metadata()?.len()))
}

/// The disk in the file of an image, and the bytes of the file. Blocks.
fn read_disk(kinds: &Kinds, kind: &KindName, path: &Path) -> Result<(DiskImage, u64), String> {
    let kind = kinds.get(kind)?;
    let (beginning, bytes) = beginning(path).map_err(|error| error.to_string())?;
    Ok((kind.disk_image(&beginning, bytes)?, bytes))
}

impl Images {
    /// Gives an image that was uploaded a name; the nodes that are to keep it then fetch it.
    ///
    /// # Errors
    /// [`CommandError`] if it is not here, is no disk, or the name is that of another image.
    pub(crate) async fn give_name(
        &self,
        name: &str,
        request: ImageRequest,
    ) -> Result<ImageInfo, CommandError> {
        let name = image_name(name)?;
        let path = self.find_image(&request.hash).await?;
        let (kinds, kind) = (self.context.kinds.clone(), request.kind);
        let disk = tokio::task::spawn_blocking(move || read_disk(&kinds, &kind, &path));
        let disk = disk.await.map_err(|error| error.to_string()).flatten();
        let (disk, file_bytes) = disk.map_err(CommandError::Invalid)?;
        let new = ImageRecord {
            hash: request.hash,
            file_bytes,
            format: disk.format.into(),
            disk_bytes: disk.bytes,
            first_on: self.context.name.clone(),
            created_unix_ms: unix_ms(),
        };
        let store = &*self.context.store;
        let key = Key::Image(name.clone()).to_string();
        let damaged = CommandError::Unavailable;
        let txn = match store.get(&key).await? {
            None => Txn::new().when_absent(key.clone()),
            Some(found) => {
                let before = record(&found);
                if before.as_ref().is_ok_and(|it| it.hash == new.hash) {
                    return self.named(name.as_str()).await;
                }
                if !request.replace {
                    before.map_err(damaged)?;
                    return Err(CommandError::Conflict(format!(
                        "{:?} is the name of another image (--replace gives it this one; machines that were made from that one keep it)",
                        name.as_str()
                    )));
                }
                Txn::new().when_modified_at(key.clone(), found.modified)
            }
        };
        let value = encode(&new);
        let value = value.map_err(|error| CommandError::Unavailable(error.to_string()))?;
        match store.txn(txn.put(key, value)).await? {
            TxnOutcome::Committed { .. } => self.named(name.as_str()).await,
            TxnOutcome::Refused { .. } => Err(CommandError::Conflict(format!(
                "others gave the name {:?} to an image at the same time; try again",
                name.as_str()
            ))),
        }
    }

    /// Takes the name of an image away. Its file stays for as long as machines need it.
    ///
    /// # Errors
    /// [`CommandError`] if there is no such name.
    pub(crate) async fn remove_name(&self, name: &str) -> Result<(), CommandError> {
        let name = image_name(name)?;
        let key = Key::Image(name.clone()).to_string();
        let exists = Compare::Exists { key: key.clone() };
        match self
            .context
            .store
            .txn(Txn::new().when(exists).delete(key))
            .await?
        {
            TxnOutcome::Committed { .. } => Ok(()),
            TxnOutcome::Refused { .. } => Err(no_image(&name)),
        }
    }

    /// The image of a name.
    ///
    /// # Errors
    /// [`CommandError`] if there is none.
    pub(crate) async fn named(&self, name: &str) -> Result<ImageInfo, CommandError> {
        let name = image_name(name)?;
        let store = &*self.context.store;
        let found = store.get(&Key::Image(name.clone()).to_string()).await?;
        let found = found.ok_or_else(|| no_image(&name))?;
        let image = record(&found).map_err(CommandError::Unavailable)?;
        let known = self.users_and_candidates().await?;
        Ok(self.describe(&name, &image, &known).await)
    }

    /// All images that have a name, in its order.
    ///
    /// # Errors
    /// [`CommandError`] if the store does not answer.
    pub(crate) async fn all_named(&self) -> Result<Vec<ImageInfo>, CommandError> {
        let all = all(&*self.context.store).await?;
        let known = self.users_and_candidates().await?;
        let images = all.images.iter();
        let described = images.map(|(name, image)| self.describe(name, image, &known));
        Ok(join_all(described).await)
    }

    async fn users_and_candidates(&self) -> Result<UsersAndCandidates, CommandError> {
        let store = &*self.context.store;
        let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for record in records::all(store).await? {
            let kind = self.context.kinds.of(&record.spec);
            let images = kind.and_then(|kind| kind.images(&record.spec));
            for image in images.unwrap_or_default() {
                users
                    .entry(image)
                    .or_default()
                    .push(record.name.to_string());
            }
        }
        Ok(UsersAndCandidates {
            users,
            candidates: copies::candidates(store).await?,
        })
    }

    async fn describe(
        &self,
        name: &MachineName,
        image: &ImageRecord,
        known: &UsersAndCandidates,
    ) -> ImageInfo {
        let keepers = copies::keepers(name, &known.candidates);
        ImageInfo {
            name: name.to_string(),
            hash: image.hash.clone(),
            file_bytes: image.file_bytes,
            format: image.format.clone(),
            disk_bytes: image.disk_bytes,
            created_unix_ms: image.created_unix_ms,
            keepers: self.copies_at(&image.hash, keepers).await,
            machines: known.users.get(&image.hash).cloned().unwrap_or_default(),
        }
    }

    /// Whether an image need not be uploaded for machines of a kind: this node has it, or has
    /// fetched it now from the nodes that keep it.
    ///
    /// # Errors
    /// [`CommandError`] if that is no hash, no machine of the kind starts from it, or the store does
    /// not answer.
    pub(crate) async fn is_known(
        &self,
        kind: Option<&KindName>,
        hash: &str,
    ) -> Result<bool, CommandError> {
        let path = self.image_path(hash)?;
        if !self.keep_longer(&path).await {
            let store = &*self.context.store;
            let all = all(store).await?;
            let Some((name, _)) = all.images.iter().find(|(_, it)| it.hash == hash) else {
                return Ok(false);
            };
            let keepers = copies::keepers(name, &copies::candidates(store).await?);
            match self.find_image_at(hash, keepers).await {
                Err(ImageError::Nowhere(_)) => return Ok(false),
                found => found?,
            };
        }
        let beginning =
            tokio::task::spawn_blocking(move || beginning(&path).map(|(bytes, _)| bytes));
        let beginning = beginning.await.map_err(std::io::Error::other).flatten();
        let beginning = beginning.map_err(|error| CommandError::Unavailable(error.to_string()))?;
        let checked = self.context.kinds.check_image(kind, &beginning);
        checked.map(|_| true).map_err(CommandError::Invalid)
    }
}

/// What is said of an image beside its record.
struct UsersAndCandidates {
    /// The machines that need it, by hash.
    users: BTreeMap<String, Vec<String>>,
    /// The nodes that may keep it.
    candidates: Vec<ReplicaNode>,
}
