//! A store begun anew with older content, by one voter: from a backup, or from what the last voter
//! has when the others are lost for good. The agent does not run meanwhile.
//!
//! The new copy is complete before it takes the place of the old one, which is kept beside it. Its
//! voter has a number that no voter of the old group had: what others of that group may still send
//! is refused. Revisions go on from the content's; leases do not survive.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::storage::{RaftLogStorage, RaftStateMachine};
use openraft::{CommittedLeaderId, Membership, RaftLogReader};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::log::{Log, Opened};
use super::open_error::IN_USE;
use super::snapshot::{self, SnapshotFile};
use super::start::{Loaded, load};
use super::state_machine::{Shared, StateMachine};
use super::types::{LogId, SnapshotMeta, Voter};
use crate::clock::unix_ms;
use crate::interface::{KeyValue, Listing, StoreError};
use crate::model::Model;
use crate::view::View;

fn fail(folder: &Path, reason: impl ToString) -> StoreError {
    StoreError::Open {
        path: folder.display().to_string(),
        reason: reason.to_string(),
    }
}

/// What a copy of the store has. As long as it lives, no voter can run on the copy.
pub struct Copy {
    /// All entries that do not belong to leases, also what no quorum is known to have: some of it
    /// may have been answered.
    pub content: Listing,
    /// The nodes of the voters, as the copy knows them.
    pub voters: Vec<Voter>,
    folder: PathBuf,
    opened: Opened,
}

impl Copy {
    /// Puts the copy aside, for good; where it is then.
    ///
    /// # Errors
    /// [`StoreError::Open`]; then it stays.
    pub async fn put_aside(self) -> Result<PathBuf, StoreError> {
        let old = self.folder.with_extension(format!("{}.old", unix_ms()));
        let rename = || {
            std::fs::rename(&self.folder, &old)?;
            sync_parent(&self.folder)
        };
        rename().map_err(|error| fail(&self.folder, error))?;
        drop(self.opened);
        Ok(old)
    }
}

impl std::fmt::Debug for Copy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copy")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// Makes a renaming beside a path durable.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(parent) => std::fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Reads the copy in `folder`.
///
/// # Errors
/// [`StoreError::Damaged`] and [`StoreError::Open`].
pub(super) async fn read(folder: &Path, bytes_max: u64) -> Result<Copy, StoreError> {
    let path = folder.to_path_buf();
    let loading = tokio::task::spawn_blocking(move || load(&path, None, bytes_max)).await;
    let loaded = loading.map_err(|error| fail(folder, error))?;
    let Loaded {
        mut opened,
        file,
        model,
        meta,
    } = loaded.map_err(|error| error.at(folder))?;
    let view = Arc::new(View::new(model.revision, model.entries.clone(), 0, 0));
    let applied = meta.as_ref().and_then(|meta| meta.last_log_id);
    let mut machine = StateMachine::new(
        model,
        meta,
        Shared {
            view: view.clone(),
            deadlines: Arc::default(),
            file,
            bytes: Arc::default(),
        },
    );
    let first = applied.map_or(0, |applied| applied.index + 1);
    let entries = opened.log.try_get_log_entries(first..).await;
    let entries = entries.map_err(|error| fail(folder, error))?;
    let replayed = machine.apply(entries).await;
    replayed.map_err(|error| fail(folder, error))?;
    let entries = machine.entries().filter(|entry| entry.lease.is_none());
    let content = Listing {
        revision: view.revision()?,
        entries: entries.cloned().collect(),
    };
    let (_, membership) = machine
        .applied_state()
        .await
        .map_err(|error| fail(folder, error))?;
    let voters = membership
        .voter_ids()
        .filter_map(|id| membership.membership().get_node(&id));
    Ok(Copy {
        content,
        voters: voters.cloned().collect(),
        folder: folder.to_owned(),
        opened,
    })
}

/// Whether no process has the copy in `folder` open.
///
/// # Errors
/// [`StoreError::Open`] if one has.
pub(super) async fn check_unused(folder: &Path) -> Result<(), StoreError> {
    let path = folder.join("log.redb");
    let opening = tokio::task::spawn_blocking(move || Log::is_in_use(&path)).await;
    match opening {
        Ok(true) => Err(fail(folder, IN_USE)),
        _ => Ok(()),
    }
}

/// Puts a new store with `content` in the place of that in `folder`; where the old one is now.
///
/// # Errors
/// [`StoreError::Open`]; then the old one stays.
pub(super) async fn replace(
    folder: &Path,
    voter: Voter,
    content: Listing,
) -> Result<Option<PathBuf>, StoreError> {
    // Above each number that was ever counted up, of voters and of leases.
    let unused = unix_ms();
    let new = folder.with_extension(format!("{unused}.new"));
    let built = build(&new, unused, voter, content).await;
    if let Err(error) = built {
        std::fs::remove_dir_all(&new).ok();
        return Err(error);
    }
    let swap = || {
        let old = folder.with_extension(format!("{unused}.old"));
        let had_one = folder.exists();
        if had_one {
            // At no moment is there no store: a first node would begin an empty one.
            renameat_with(CWD, &new, CWD, folder, RenameFlags::EXCHANGE)?;
            std::fs::rename(&new, &old)?;
        } else {
            std::fs::rename(&new, folder)?;
        }
        sync_parent(folder)?;
        Ok::<_, std::io::Error>(had_one.then_some(old))
    };
    swap().map_err(|error| fail(folder, error))
}

async fn build(
    folder: &Path,
    unused: u64,
    voter: Voter,
    content: Listing,
) -> Result<(), StoreError> {
    std::fs::create_dir_all(folder).map_err(|error| fail(folder, error))?;
    let mut model = Model {
        revision: content.revision,
        lease_next: unused,
        ..Model::default()
    };
    for entry in content.entries {
        model.load(KeyValue {
            lease: None,
            ..entry
        });
    }
    // The first entry of a log that begins here.
    let last = LogId::new(CommittedLeaderId::new(1, unused), 1);
    let nodes = std::collections::BTreeMap::from([(unused, voter)]);
    let group = Membership::new(vec![std::collections::BTreeSet::from([unused])], nodes);
    let meta = SnapshotMeta {
        last_log_id: Some(last),
        last_membership: openraft::StoredMembership::new(Some(last), group),
        snapshot_id: format!("rebuilt-{unused}"),
    };
    let state = snapshot::encode(&model).map_err(|error| fail(folder, error))?;
    let file = SnapshotFile::new(folder.join("snapshot"));
    file.save(&meta, &state)
        .map_err(|error| fail(folder, error))?;
    let opened = Log::open(&folder.join("log.redb"), Some(unused), file.saved());
    let mut opened = opened.map_err(|error| fail(folder, error))?;
    let writer = opened.disk.write_on_thread(&opened.log, opened.writes);
    let writer = writer.map_err(|error| fail(folder, error))?;
    let purged = opened.log.purge(last).await;
    drop(writer);
    purged.map_err(|error| fail(folder, error))
}
