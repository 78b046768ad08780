//! Deletes what nothing needs: checkpoints that a retention policy does not keep, parts of
//! checkpoints that were never completed, and programs and images that no checkpoint names.
//!
//! A writer that was killed leaves parts without a manifest. They look like those of one that still
//! writes, which may be slow: only time tells them apart ([`UNFINISHED_MS`]).

use super::compaction::{bytes_of, compact};
use super::id::CheckpointId;
use super::image::INDEX;
use super::packer::PackError;
use super::repository::{READING, Repository, RepositoryError, modified_unix_ms};
use super::retention::Retention;
use crate::spec::Spec;
use futures::{StreamExt, TryStreamExt};
use keel_cluster::MachineName;
use object_store::ObjectMeta;
use std::collections::{BTreeMap, BTreeSet};
use tokio::runtime::Handle;

/// A writer that wrote nothing for so long, in milliseconds, was killed: no checkpoint takes more
/// than an hour.
pub const UNFINISHED_MS: u64 = 24 * 3_600_000;

/// How long a mark of a checkpoint that is read is valid, in milliseconds.
const READ_MS: u64 = 3_600_000;

/// What was deleted, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Complete checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointId>,
    /// Checkpoints that were never completed: volumes may still have their snapshots.
    pub unfinished: Vec<CheckpointId>,
    /// Objects in all, with those of checkpoints that were never completed.
    pub objects: u64,
    /// Their size in bytes.
    pub bytes: u64,
}

/// What was deleted, or would be, of what checkpoints of several machines share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SharedPruned {
    /// Number of programs.
    pub programs: u64,
    /// Their size in bytes.
    pub program_bytes: u64,
    /// Number of images.
    pub images: u64,
    /// Their size in bytes, as they are stored.
    pub image_bytes: u64,
}

/// What nothing needs, in the order in which it is to be deleted.
#[derive(Default)]
struct Superfluous {
    checkpoints: Vec<CheckpointId>,
    unfinished: BTreeSet<CheckpointId>,
    objects: Vec<ObjectMeta>,
}

impl Superfluous {
    fn pruned(&self) -> Pruned {
        Pruned {
            checkpoints: self.checkpoints.clone(),
            unfinished: self.unfinished.iter().cloned().collect(),
            objects: self.objects.len() as u64,
            bytes: self.objects.iter().map(|object| object.size).sum(),
        }
    }
}

impl Repository {
    /// Deletes what [`Self::apply_retention`] would delete, without compacting: a writer of the
    /// machine may work at the same time. With `dry_run` nothing is deleted.
    ///
    /// # Errors
    /// [`RepositoryError`]; also if the required objects cannot be determined.
    pub async fn prune(
        &self,
        machine: &MachineName,
        retention: Retention,
        now_unix_ms: u64,
        dry_run: bool,
    ) -> Result<Pruned, RepositoryError> {
        let all = self.list(machine).await?;
        let wanted = wanted(&all, retention, now_unix_ms);
        let found = self
            .superfluous(machine, &all, &wanted, now_unix_ms)
            .await?;
        let pruned = found.pruned();
        if !dry_run {
            self.delete(found.objects).await?;
        }
        Ok(pruned)
    }

    /// Deletes programs and images that no checkpoint here names. `images_of` tells which images
    /// (BLAKE3, hex) a machine with this spec uses. With `dry_run` nothing is deleted.
    ///
    /// # Errors
    /// [`RepositoryError`]; also if a manifest cannot be read, as it may name any of them.
    pub async fn prune_shared(
        &self,
        now_unix_ms: u64,
        images_of: impl Fn(&Spec) -> Result<Vec<String>, String>,
        dry_run: bool,
    ) -> Result<SharedPruned, RepositoryError> {
        // Listed before the manifests: what one names that is written meanwhile is young here.
        let mut programs = self.objects(&["programs"]).await?;
        programs.retain(|object| is_over(object, UNFINISHED_MS, now_unix_ms));
        let mut images: BTreeMap<String, Vec<ObjectMeta>> = BTreeMap::new();
        for object in self.objects(&["images"]).await? {
            if let Some(hash) = image_of(&object) {
                images.entry(hash).or_default().push(object);
            }
        }
        // Of one that is being written, or was put again, something is young.
        let is_old = |object: &ObjectMeta| is_over(object, UNFINISHED_MS, now_unix_ms);
        images.retain(|_, objects| objects.iter().all(is_old));
        if programs.is_empty() && images.is_empty() {
            return Ok(SharedPruned::default());
        }
        let mut named = BTreeSet::new();
        for machine in self.machines().await? {
            for id in self.list(&machine).await? {
                let manifest = self.manifest(&machine, &id).await?;
                let used = images_of(&manifest.spec).map_err(|reason| RepositoryError::Part {
                    machine: machine.clone(),
                    id,
                    part: "its spec".into(),
                    reason,
                })?;
                named.extend(manifest.program.map(|program| self.program_place(&program)));
                images.retain(|hash, _| !used.contains(hash));
            }
        }
        programs.retain(|object| !named.contains(&object.location));
        let bytes = |objects: &[ObjectMeta]| objects.iter().map(|object| object.size).sum();
        let mut pruned = SharedPruned {
            programs: programs.len() as u64,
            program_bytes: bytes(&programs),
            ..SharedPruned::default()
        };
        if !dry_run {
            self.delete(programs).await?;
        }
        for (hash, image) in images {
            if dry_run || self.delete_image(&hash, now_unix_ms).await? {
                pruned.images += 1;
                pruned.image_bytes += bytes(&image);
            }
        }
        Ok(pruned)
    }

    /// Deletes an old image, unless a writer has put it again since it was listed; false then. The
    /// index goes first, so that an image does not lack a piece while it has one. (A writer that puts
    /// the index of an old image looks again later whether all is there.)
    async fn delete_image(&self, hash: &str, now_unix_ms: u64) -> Result<bool, RepositoryError> {
        for only_index in [true, false] {
            let mut objects = self.objects(&["images", hash]).await?;
            let is_old = |object: &ObjectMeta| is_over(object, UNFINISHED_MS, now_unix_ms);
            if !objects.iter().all(is_old) {
                return Ok(false);
            }
            objects.retain(|it| !only_index || it.location.filename() == Some(INDEX));
            self.delete(objects).await?;
        }
        Ok(true)
    }

    async fn objects(&self, folder: &[&str]) -> Result<Vec<ObjectMeta>, RepositoryError> {
        let folder = self.place.path(folder);
        Ok(self.store().list(Some(&folder)).try_collect().await?)
    }

    async fn delete(&self, objects: Vec<ObjectMeta>) -> Result<(), RepositoryError> {
        let places = objects.into_iter().map(|object| Ok(object.location));
        let places = futures::stream::iter(places).boxed();
        let mut deleted = self.store().delete_stream(places);
        while let Some(outcome) = deleted.next().await {
            match outcome {
                // Another one deletes the same.
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Applies a retention policy: deletes a machine's checkpoints except those to keep
    /// and their ancestors, and parts of unfinished checkpoints. If the ancestors are
    /// mostly superseded, the oldest checkpoint to keep is compacted first. Returns the deleted
    /// checkpoints, also those that were never completed. Blocking, outside of the runtime.
    ///
    /// # Errors
    /// [`PackError`], also if the required objects cannot be determined; none of them
    /// is deleted then.
    pub fn apply_retention(
        &self,
        runtime: &Handle,
        machine: &MachineName,
        retention: Retention,
        now_unix_ms: u64,
    ) -> Result<Vec<CheckpointId>, PackError> {
        let all = runtime.block_on(self.list(machine))?;
        let wanted = wanted(&all, retention, now_unix_ms);
        if let Some(oldest) = wanted.last() {
            // An unreadable checkpoint is kept: it may be readable later.
            let chain = runtime.block_on(self.chain(machine, oldest));
            if let Ok(chain) = chain
                && chain.len() > 1
                && let Ok((stored, counts)) = bytes_of(&chain)
                && stored - counts >= counts
            {
                let bytes = compact(self, runtime, machine, oldest)?;
                tracing::info!(%machine, %oldest, stored, ?bytes, "compacted a checkpoint");
            }
        }
        let found = self.superfluous(machine, &all, &wanted, now_unix_ms);
        let found = runtime.block_on(found)?;
        let deleted = found.checkpoints.iter().chain(&found.unfinished);
        let deleted = deleted.cloned().collect();
        runtime.block_on(self.delete(found.objects))?;
        Ok(deleted)
    }

    async fn superfluous(
        &self,
        machine: &MachineName,
        all: &[CheckpointId],
        wanted: &[&CheckpointId],
        now_unix_ms: u64,
    ) -> Result<Superfluous, RepositoryError> {
        let objects = self.objects(&["machines", machine.as_ref()]).await?;
        // Checkpoints being read are kept with their generations.
        let mut read = BTreeSet::new();
        let mut marks = Vec::new();
        for object in &objects {
            let place = &object.location;
            if place.extension() != Some(READING) {
                continue;
            }
            let is_valid = !is_over(object, READ_MS, now_unix_ms);
            match place.filename().and_then(id_of).filter(|_| is_valid) {
                Some((id, _)) => drop(read.insert(id)),
                None => marks.push(object.clone()),
            }
        }
        // With its generation, if its manifest can be read.
        let mut needed: BTreeMap<CheckpointId, Option<u32>> = BTreeMap::new();
        // Objects not newer than an unreadable checkpoint may belong to it.
        let mut below = None;
        for id in wanted.iter().copied().chain(&read) {
            needed.entry(id.clone()).or_insert(None);
            match self.chain(machine, id).await {
                Ok(chain) => {
                    for manifest in chain {
                        let now = (!read.contains(id)).then_some(manifest.generation);
                        let known = needed.entry(manifest.id).or_insert(now);
                        *known = (*known).and(now);
                    }
                }
                Err(RepositoryError::Part { .. }) => below = below.max(Some(id.clone())),
                Err(error) => return Err(error),
            }
        }
        // When anything of a checkpoint was written last.
        let mut written: BTreeMap<CheckpointId, u64> = BTreeMap::new();
        for object in &objects {
            if let Some((id, _)) = object.location.filename().and_then(id_of) {
                let last = written.entry(id).or_default();
                *last = (*last).max(modified_unix_ms(object));
            }
        }
        let newest = all.first();
        let complete: BTreeSet<&CheckpointId> = all.iter().collect();
        let (mut gone, mut unfinished) = (BTreeSet::new(), BTreeSet::new());
        let (mut manifests, mut packs) = (Vec::new(), Vec::new());
        for object in objects {
            let place = &object.location;
            if place.extension() == Some(READING) {
                continue;
            }
            let Some((id, generation)) = place.filename().and_then(id_of) else {
                continue;
            };
            if below.as_ref().is_some_and(|below| id <= *below) {
                continue;
            }
            // What is newer than the newest checkpoint may belong to one in progress.
            if newest.is_none_or(|newest| id > *newest) {
                let last = written.get(&id).copied().unwrap_or(now_unix_ms);
                if now_unix_ms.saturating_sub(last) >= UNFINISHED_MS {
                    unfinished.insert(id);
                    packs.push(object);
                }
                continue;
            }
            let is_manifest = place.extension() == Some("manifest");
            match needed.get(&id) {
                // Packs of earlier generations.
                Some(Some(now)) if !is_manifest && generation < *now => packs.push(object),
                Some(_) => {}
                None if newest == Some(&id) => {}
                None if is_manifest => {
                    gone.insert(id);
                    manifests.push(object);
                }
                None => {
                    if !complete.contains(&id) {
                        unfinished.insert(id);
                    }
                    packs.push(object);
                }
            }
        }
        // Manifests first: a checkpoint never lacks a part while its manifest exists.
        Ok(Superfluous {
            checkpoints: gone.into_iter().collect(),
            unfinished,
            objects: [manifests, packs, marks].concat(),
        })
    }
}

/// Those that a policy keeps, newest first.
fn wanted(all: &[CheckpointId], retention: Retention, now_unix_ms: u64) -> Vec<&CheckpointId> {
    let numbered = (0..).zip(all);
    let kept = numbered.filter(|(newer, id)| retention.keeps(*newer, id, now_unix_ms));
    kept.map(|(_, id)| id).collect()
}

/// Whether an object was written longer ago than this.
fn is_over(object: &ObjectMeta, ms: u64, now_unix_ms: u64) -> bool {
    now_unix_ms.saturating_sub(modified_unix_ms(object)) >= ms
}

/// The hash of the image that an object belongs to.
fn image_of(object: &ObjectMeta) -> Option<String> {
    let hash = object.location.parts().nth_back(1)?;
    Some(hash.as_ref().to_owned())
}

/// The checkpoint and generation that an object belongs to.
fn id_of(name: &str) -> Option<(CheckpointId, u32)> {
    let (id, rest) = name.split_once('.')?;
    let generation = rest
        .strip_prefix('g')
        .and_then(|rest| rest.split_once('.')?.0.parse().ok());
    Some((id.parse().ok()?, generation.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::format::tests::example;
    use crate::checkpoint::{Manifest, PackName};
    use keel_net::Bytes;
    use keel_store::clock::unix_ms;

    const KEEP_ONE: Retention = Retention {
        newest: Some(1),
        for_s: None,
    };

    fn repository() -> (tempfile::TempDir, Repository) {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().display().to_string();
        let repository = Repository::create(&url).unwrap();
        (folder, repository)
    }

    fn name() -> MachineName {
        example().machine
    }

    /// A full checkpoint; its parts need not be real ones.
    async fn put(repository: &Repository, id: &CheckpointId, program: Option<[u8; 32]>) {
        put_part(repository, id).await;
        let manifest = Manifest {
            id: id.clone(),
            parent: None,
            generation: 0,
            program,
            ..example()
        };
        repository.put_manifest(&manifest).await.unwrap();
    }

    async fn put_part(repository: &Repository, id: &CheckpointId) {
        let bytes = Bytes::from_static(&[7; 4096]);
        let of = (id, 0);
        let name = name();
        let put = repository.put_pack(&name, of, PackName::Pages(0), bytes);
        put.await.unwrap();
    }

    /// Of machines without images.
    async fn prune_shared(
        repository: &Repository,
        now_unix_ms: u64,
        dry_run: bool,
    ) -> Result<SharedPruned, RepositoryError> {
        let none = |_: &Spec| Ok(Vec::new());
        repository.prune_shared(now_unix_ms, none, dry_run).await
    }

    /// Ids in ascending order.
    fn ids<const N: usize>() -> [CheckpointId; N] {
        let now = unix_ms();
        std::array::from_fn(|at| CheckpointId::new(now + at as u64))
    }

    fn left(folder: &tempfile::TempDir, kind: &str) -> usize {
        let folder = folder.path().join(kind);
        let folders = std::fs::read_dir(folder).into_iter().flatten();
        folders
            .map(|entry| entry.unwrap().path())
            .map(|path| match path.is_dir() {
                true => std::fs::read_dir(path).unwrap().count(),
                false => 1,
            })
            .sum()
    }

    #[tokio::test]
    async fn a_policy_is_applied_and_a_dry_run_deletes_nothing() {
        let (folder, repository) = repository();
        let [first, second, third] = ids();
        for id in [&first, &second, &third] {
            put(&repository, id, None).await;
        }
        let all = Retention::default();
        let kept = repository.prune(&name(), all, unix_ms(), false).await;
        assert_eq!(kept.unwrap(), Pruned::default());
        let seen = repository.prune(&name(), KEEP_ONE, unix_ms(), true).await;
        assert_eq!(left(&folder, "machines"), 6);
        let done = repository.prune(&name(), KEEP_ONE, unix_ms(), false).await;
        let done = done.unwrap();
        assert_eq!(seen.unwrap(), done);
        assert_eq!(done.checkpoints, [first, second]);
        assert_eq!(done.objects, 4);
        assert!(done.bytes > 2 * 4096, "{done:?}");
        assert_eq!(repository.list(&name()).await.unwrap(), [third]);
        assert_eq!(left(&folder, "machines"), 2);
    }

    #[tokio::test]
    async fn what_a_killed_writer_left_goes_when_it_is_old() {
        for has_checkpoint in [true, false] {
            let (folder, repository) = repository();
            let [first, killed] = ids();
            if has_checkpoint {
                put(&repository, &first, None).await;
            }
            put_part(&repository, &killed).await;
            let all = Retention::default();
            let later = unix_ms() + UNFINISHED_MS;
            for (now, expected) in [(unix_ms(), 0), (later, 1), (later, 0)] {
                let pruned = repository.prune(&name(), all, now, false).await.unwrap();
                assert_eq!(pruned.objects, expected, "{has_checkpoint}, {now}");
                assert_eq!(pruned.checkpoints, []);
                // Its snapshots of volumes would keep their chunks for ever.
                let of = (expected > 0).then(|| killed.clone());
                assert_eq!(pruned.unfinished, Vec::from_iter(of));
            }
            let kept = if has_checkpoint { 2 } else { 0 };
            assert_eq!(left(&folder, "machines"), kept);
        }
    }

    #[tokio::test]
    async fn programs_stay_while_anything_may_need_them() {
        let (folder, repository) = repository();
        let [first, second] = ids();
        for number in [1, 2] {
            let bytes = Bytes::from_static(b"a program");
            repository.put_program(&[number; 32], bytes).await.unwrap();
        }
        put(&repository, &first, Some([1; 32])).await;
        let later = unix_ms() + UNFINISHED_MS;
        let young = prune_shared(&repository, unix_ms(), false).await.unwrap();
        assert_eq!(young, SharedPruned::default());
        // A manifest that cannot be read may name any.
        put(&repository, &second, None).await;
        let place = repository.manifest_place(&name(), &second);
        let place = repository.place.file(&place).unwrap().unwrap();
        let manifest = std::fs::read(&place).unwrap();
        std::fs::write(&place, b"?").unwrap();
        let unknown = prune_shared(&repository, later, false).await;
        assert!(matches!(unknown, Err(RepositoryError::Part { .. })));
        std::fs::write(&place, manifest).unwrap();
        assert_eq!(left(&folder, "programs"), 2);
        let seen = prune_shared(&repository, later, true).await.unwrap();
        let done = prune_shared(&repository, later, false).await.unwrap();
        assert_eq!(seen, done);
        assert_eq!((done.programs, done.images), (1, 0));
        let rest = repository.objects(&["programs"]).await.unwrap();
        let kept = repository.program_place(&[1; 32]);
        let places: Vec<_> = rest.into_iter().map(|object| object.location).collect();
        assert_eq!(places, [kept]);
    }

    /// A checkpoint in progress relies on a program that is there already.
    #[tokio::test]
    async fn an_old_program_is_young_again_when_it_is_put() {
        let (folder, repository) = repository();
        let put = async || {
            let bytes = Bytes::from_static(b"a program");
            repository.put_program(&[1; 32], bytes).await.unwrap();
        };
        put().await;
        let path = std::fs::read_dir(folder.path().join("programs"));
        let path = path.unwrap().next().unwrap().unwrap().path();
        let old = std::time::SystemTime::now() - std::time::Duration::from_millis(UNFINISHED_MS);
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(old).unwrap();
        put().await;
        let pruned = prune_shared(&repository, unix_ms(), false).await.unwrap();
        assert_eq!(pruned, SharedPruned::default());
        assert_eq!(left(&folder, "programs"), 1);
    }

    #[tokio::test]
    async fn images_stay_while_a_machine_with_a_checkpoint_uses_them() {
        let (folder, repository) = repository();
        let file = folder.path().join("file");
        let mut hashes = Vec::new();
        for content in [b"used", b"left"] {
            std::fs::write(&file, content).unwrap();
            let hash = keel_net::Fingerprint(*blake3::hash(content).as_bytes());
            repository.put_image(&hash, file.clone()).await.unwrap();
            hashes.push(hash);
        }
        // An upload that was cut off has no index.
        let cut_off = folder.path().join("images").join(hashes[1].to_string());
        std::fs::remove_file(cut_off.join(INDEX)).unwrap();
        let [id] = ids();
        put(&repository, &id, None).await;
        let used = vec![hashes[0].to_string()];
        let prune = async |now, dry_run| {
            let images_of = |_: &Spec| Ok(used.clone());
            repository.prune_shared(now, images_of, dry_run).await
        };
        let later = unix_ms() + UNFINISHED_MS;
        assert_eq!(
            prune(unix_ms(), false).await.unwrap(),
            SharedPruned::default()
        );
        let seen = prune(later, true).await.unwrap();
        let done = prune(later, false).await.unwrap();
        assert_eq!(seen, done);
        assert_eq!((done.programs, done.images), (0, 1));
        assert!(done.image_bytes > 0);
        assert!(repository.image(&hashes[0]).await.unwrap().is_some());
        assert_eq!(prune(later, false).await.unwrap(), SharedPruned::default());
        // Whose images are not known may use any.
        let unknown = |_: &Spec| Err("its kind is not known".to_owned());
        let unknown = repository.prune_shared(later, unknown, false).await;
        assert!(matches!(unknown, Err(RepositoryError::Part { .. })));
        let manifest = repository.manifest_place(&name(), &id);
        let manifest = repository.place.file(&manifest).unwrap().unwrap();
        std::fs::remove_file(manifest).unwrap();
        assert_eq!(prune(later, false).await.unwrap().images, 1);
        assert!(repository.image(&hashes[0]).await.unwrap().is_none());
    }
}
