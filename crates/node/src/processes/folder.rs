//! The folder of a worker: created before its process, removed after it. All functions block, for
//! as long as a large tree takes, and run on blocking threads.

use keel_cluster::MachineName;
use keel_machine::cgroup::{Group, Slice};
use keel_machine::worker::SOCKET;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The log of a worker's process, without its machine's output.
pub(super) const LOG: &str = "worker.log";
/// The same, of the process before.
const OLD_LOG: &str = "worker.log.old";

/// Content that an earlier worker left in its folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leftovers {
    /// Belongs to another machine, which had the name.
    Remove,
    /// Belongs to this machine: its output stays.
    KeepOutput,
}

/// Creates the folder of a new worker, with its cgroup and its log file; removes what an earlier
/// one left. Blocks.
///
/// # Errors
/// The operation that failed, with its path.
pub(super) fn prepare(
    slice: &Slice,
    machine: &MachineName,
    folder: &Path,
    leftovers: Leftovers,
) -> Result<File, String> {
    let fail = |what: &str, error: io::Error| format!("{what} {}: {error}", folder.display());
    clear(folder, leftovers).map_err(|error| fail("cannot remove what is left in", error))?;
    std::fs::create_dir_all(folder).map_err(|error| fail("cannot make folder", error))?;
    if let Err(error) = make_group(slice, machine, folder) {
        tracing::warn!(%machine, error, "its worker gets no cgroup of its own");
    }
    match std::fs::rename(folder.join(LOG), folder.join(OLD_LOG)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(fail("cannot keep the old worker's log in", error));
        }
        _ => {}
    }
    File::create(folder.join(LOG)).map_err(|error| fail("cannot make the worker's log in", error))
}

/// Creates the cgroup of a new worker, linked from its folder.
fn make_group(slice: &Slice, machine: &MachineName, folder: &Path) -> Result<(), String> {
    let Some(group) = slice.make(machine.as_str())? else {
        return Ok(());
    };
    group.save(folder).inspect_err(|_| group.remove())
}

/// Removes the content that an earlier worker left.
fn clear(folder: &Path, leftovers: Leftovers) -> io::Result<()> {
    let found = match leftovers {
        Leftovers::Remove => std::fs::remove_dir_all(folder),
        // An old socket would be mistaken for the new worker's.
        Leftovers::KeepOutput => std::fs::remove_file(folder.join(SOCKET)),
    };
    match found {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The folders of all workers; empty if they cannot be listed.
pub(super) async fn folders_in(workers: PathBuf) -> Vec<PathBuf> {
    let listed = tokio::task::spawn_blocking(move || {
        let entries = std::fs::read_dir(workers).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    });
    listed.await.unwrap_or_default()
}

/// Removes the folder of a worker that has ended, and its cgroup.
pub(super) async fn remove_remains(folder: PathBuf) {
    // A panic in the task removes nothing; the next agent does.
    let _ = tokio::task::spawn_blocking(move || {
        Group::remove_saved(&folder);
        remove_folder(&folder);
    })
    .await;
}

fn remove_folder(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, folder = %folder.display(), "cannot remove a machine's folder");
    }
}

#[cfg(test)]
mod tests {
    use crate::processes::{Leftovers, Workers};
    use crate::state_dir::StateDir;
    use keel_machine::cgroup::Slice;
    use std::sync::Arc;

    const FILES: usize = 20_000;

    /// On a single-threaded runtime another task observes a large tree during its removal, which
    /// would be impossible if the runtime's thread removed it.
    #[tokio::test(flavor = "current_thread")]
    async fn other_tasks_run_while_a_large_tree_is_removed() {
        let root = tempfile::tempdir().expect("a folder");
        let dir = StateDir::open(root.path()).expect("a node's folder");
        let machine = "large".parse().expect("a name");
        let folder = dir.worker(&machine);
        std::fs::create_dir_all(&folder).expect("a folder");
        for number in 0..FILES {
            std::fs::File::create(folder.join(number.to_string())).expect("a file");
        }
        let watched = folder.clone();
        let watcher = tokio::spawn(async move {
            loop {
                let left = std::fs::read_dir(&watched).map_or(0, Iterator::count);
                if left < FILES {
                    return left;
                }
                tokio::task::yield_now().await;
            }
        });
        let workers = Arc::new(Workers::new(Arc::new(Slice::default())));
        // The test's own image is started here, which is no worker.
        let kind = "wasm".parse().expect("a name");
        let started = workers
            .start(&dir, &machine, &kind, Leftovers::Remove)
            .await;
        let error = started.expect_err("no worker");
        assert!(error.contains("ended at once"), "{error}");
        let left = watcher.await.expect("it has seen the tree");
        assert!(left > 1, "the tree was there, and then gone: {left}");
    }
}
