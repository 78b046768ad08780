//! Removes images that nothing needs. A machine needs those of its spec, on every node, since it may
//! go anywhere; a name needs the copies of the nodes that keep them. Whatever else is here stays for
//! [`KEPT_FOR`] after it was last needed or looked for: what is uploaded now is started from in a
//! moment.

use super::copies;
use super::files::{Images, renew};
use super::records::all_hashes;
use crate::records;
use crate::state_dir::is_hash;
use keel_api::ImageCopy;
use keel_cluster::NodeName;
use keel_machine::checkpoint::{Repository, RepositoryError};
use keel_machine::kind::Kinds;
use keel_machine::spec::Record;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// How long an image stays that nothing needs.
const KEPT_FOR: Duration = Duration::from_secs(24 * 3600);
/// Pause before the first look of an agent, and after one that failed.
const LOOK_SOON: Duration = Duration::from_secs(10);
/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// Removes them, until the agent ends.
pub(crate) async fn remove_unused(images: Arc<Images>) {
    let mut pause = LOOK_SOON;
    loop {
        tokio::time::sleep(pause).await;
        pause = match images.remove_unused().await {
            Ok(()) => LOOK_EVERY,
            Err(error) => {
                tracing::warn!(error, "images that nothing needs stay here");
                LOOK_SOON
            }
        };
    }
}

impl Images {
    async fn remove_unused(&self) -> Result<(), String> {
        let store = &*self.context.store;
        let records = records::all_or_none(store).await;
        let records = records.map_err(|error| error.to_string())?;
        let mut needed = of_machines(&self.context.kinds, &records)?;
        let candidates = copies::candidates(store).await;
        let candidates = candidates.map_err(|error| error.to_string())?;
        for (name, hash) in all_hashes(store).await? {
            let keepers = copies::keepers(&name, &candidates);
            let copies = self.copies_at(&hash, keepers).await;
            if !is_kept_elsewhere(&self.context.name, &copies) {
                needed.insert(hash);
            }
        }
        needed.extend(self.of_own_checkpoints().await?);
        let (ages, folder) = (self.ages.clone(), self.context.dir.images());
        let removing = tokio::task::spawn_blocking(move || {
            remove_old(&ages, &folder, &needed, SystemTime::now())
        });
        let removed = removing.await.map_err(io::Error::other).flatten();
        for path in removed.map_err(|error| error.to_string())? {
            tracing::info!("removed {}, which nothing needed", path.display());
        }
        Ok(())
    }
}

impl Images {
    /// What machines need that have checkpoints in this node's own folder.
    ///
    /// # Errors
    /// If that cannot be read, or is not known of one of them.
    async fn of_own_checkpoints(&self) -> Result<BTreeSet<String>, String> {
        let place = self.context.dir.checkpoints().display().to_string();
        let opened = tokio::task::spawn_blocking(move || Repository::open(&place)).await;
        let opened = opened.map_err(|error| error.to_string())?;
        // There may be none yet.
        let Ok(repository) = opened else {
            return Ok(BTreeSet::new());
        };
        let text = |error: RepositoryError| error.to_string();
        let mut needed = BTreeSet::new();
        for machine in repository.machines().await.map_err(text)? {
            for id in repository.list(&machine).await.map_err(text)? {
                match repository.manifest(&machine, &id).await {
                    Ok(manifest) => needed.extend(self.used(&manifest.spec)?),
                    // Nothing is restored from it.
                    Err(RepositoryError::Part { .. }) => {}
                    Err(error) => return Err(text(error)),
                }
            }
        }
        Ok(needed)
    }
}

/// What machines need.
///
/// # Errors
/// If that is not known of one of them, as of a kind or a spec of a later version.
fn of_machines(kinds: &Kinds, records: &[Record]) -> Result<BTreeSet<String>, String> {
    let mut needed = BTreeSet::new();
    for record in records {
        let kind = kinds.of(&record.spec);
        let images = kind.and_then(|kind| kind.images(&record.spec));
        let of = |error| format!("what machine {:?} needs is not known: {error}", record.name);
        needed.extend(images.map_err(of)?);
    }
    Ok(needed)
}

/// Whether a node need not have an image whose keepers have these copies.
fn is_kept_elsewhere(node: &NodeName, copies: &[ImageCopy]) -> bool {
    copies.len() >= copies::COPIES
        && copies
            .iter()
            .all(|copy| copy.is_there && copy.node != node.as_str())
}

/// Removes the images in a folder that are old and not among those that are needed; returns them.
/// What is needed is young again. Blocks.
fn remove_old(
    ages: &Mutex<()>,
    folder: &Path,
    needed: &BTreeSet<String>,
    now: SystemTime,
) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !is_hash(&name) {
            continue;
        }
        let done = match needed.contains(&*name) {
            true => renew(ages, &path, now).map(|()| false),
            false => remove_if_old(ages, &path, now),
        };
        match done {
            Ok(true) => removed.push(path),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "{} stays as it is", path.display()),
        }
    }
    Ok(removed)
}

/// Removes a file if it is old; whether it was.
fn remove_if_old(ages: &Mutex<()>, path: &Path, now: SystemTime) -> io::Result<bool> {
    let _held = ages.lock().unwrap_or_else(PoisonError::into_inner);
    let modified = std::fs::metadata(path)?.modified()?;
    // One of the future is younger than any.
    let is_old = now.duration_since(modified).unwrap_or_default() > KEPT_FOR;
    if is_old {
        std::fs::remove_file(path)?;
    }
    Ok(is_old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn an_image_is_kept_elsewhere_only_if_all_its_keepers_have_it() {
        let node = NodeName::new("a").unwrap();
        let kept = |copies: &[(&str, bool)]| {
            let copies = copies.iter().map(|(node, is_there)| ImageCopy {
                node: (*node).into(),
                is_there: *is_there,
                problem: None,
            });
            is_kept_elsewhere(&node, &Vec::from_iter(copies))
        };
        assert!(kept(&[("b", true), ("c", true)]));
        assert!(!kept(&[("b", true), ("c", false)]));
        assert!(!kept(&[("b", true), ("a", true)]));
        // As many as there are: too few, or none at all while no node is alive.
        assert!(!kept(&[("b", true)]));
        assert!(!kept(&[]));
    }

    #[test]
    fn what_nothing_needs_goes_once_it_is_old() {
        let folder = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let names = ["a", "b", "c", "d"].map(|digit| digit.repeat(64));
        let [needed, old, young, looked_for] = names.each_ref();
        let at = |name: &str| folder.path().join(name);
        let make = |name: &str, age: Duration| {
            let file = File::create(at(name)).unwrap();
            file.set_modified(now.checked_sub(age).unwrap()).unwrap();
        };
        let (day, hour) = (KEPT_FOR + Duration::from_secs(1), Duration::from_secs(3600));
        for name in [needed, old, looked_for, "other-file"] {
            make(name, day);
        }
        make(young, hour);
        let ages = Mutex::default();
        renew(&ages, &at(looked_for), now).unwrap();
        let all_needed = BTreeSet::from([needed.clone()]);
        let removed = remove_old(&ages, folder.path(), &all_needed, now).unwrap();
        assert_eq!(removed, [at(old)]);
        for name in [needed, young, looked_for, "other-file"] {
            assert!(at(name).exists(), "{name}");
        }
        // What was needed until now is as young as what was made now.
        let later = now.checked_add(KEPT_FOR).unwrap();
        let removed = remove_old(&ages, folder.path(), &BTreeSet::new(), later).unwrap();
        assert_eq!(removed, [at(young)]);
        let later = later.checked_add(hour).unwrap();
        let mut removed = remove_old(&ages, folder.path(), &BTreeSet::new(), later).unwrap();
        removed.sort();
        assert_eq!(removed, [at(needed), at(looked_for)]);
        assert!(renew(&ages, &at(old), now).is_err());
    }
}
