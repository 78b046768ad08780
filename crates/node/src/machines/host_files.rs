//! Which nodes can begin a machine anew whose kind does not restart from checkpoints: they have its
//! images and what its kind needs, and see the same files of hosts (disks) as its node. They are the
//! members of its in-sync set, to which alone it goes when its node fails.
//!
//! How files are looked at whose server may hang is left to `looks`.
//!
//! ```text
//!   node of the machine                                     each other node
//!     │ writes a file beside each disk that is written to
//!     │── SEES: spec, what those files have ───────────────────▶│ reads them, fetches images
//!     │◀──────────────────────────────────────── it can run it ─│
//!     │ removes them; compare-and-swap: the set names these nodes
//! ```

use super::handle::Machines;
use crate::error::CommandError;
use crate::events::Note;
use crate::processes::WorkerHandle;
use crate::proof_file::{Proof, ProofFile};
use crate::records::{self, InSyncSet, RecordError};
use futures::future::join_all;
use keel_api::EventKind;
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::kind::HostFile;
use keel_machine::spec::{Record, Spec};
use keel_machine::worker::control::{pack, unpack};
use keel_net::RpcError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Request between agents: [`Sees`] → `()`.
pub(crate) const SEES: u16 = 0x0360;
/// Request between agents: a spec → the other nodes that can run it as the one that is asked.
pub(crate) const SEEN_BY: u16 = 0x0361;

/// How often it is looked who can run a machine, beside when nodes come and go.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Pause before that is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Pause before the store is asked again.
const STORE_RETRY_AFTER: Duration = Duration::from_secs(2);
/// How long a node may take: it may have to fetch images.
const SEES_PATIENCE: Duration = Duration::from_secs(20);
/// How long a node may take that asks the others.
const SEEN_BY_PATIENCE: Duration = Duration::from_secs(30);

/// What a node needs to have for a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sees {
    spec: Spec,
    files: Vec<SeenFile>,
}

/// A file of the asking node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SeenFile {
    path: String,
    /// Its name where it really is.
    name: String,
    /// In the same directory, unless the file is only read.
    proof: Option<Proof>,
}

/// A file of this node that others are to see.
#[derive(Debug)]
struct ShownFile {
    path: String,
    name: String,
    proof: Option<ProofFile>,
}

impl ShownFile {
    /// Writes the proof. Blocks.
    ///
    /// # Errors
    /// Why the file cannot be shown.
    fn of(file: &HostFile) -> Result<Self, String> {
        let (folder, name) = place(&file.path)?;
        let proof = match file.is_written {
            false => None,
            true => Some(ProofFile::write(&folder).map_err(|error| {
                let path = &file.path;
                format!("no file can be written beside {path}, by which other nodes would see that they have it: {error}")
            })?),
        };
        Ok(ShownFile {
            path: file.path.clone(),
            name,
            proof,
        })
    }

    fn seen(&self) -> SeenFile {
        SeenFile {
            path: self.path.clone(),
            name: self.name.clone(),
            proof: self.proof.as_ref().map(|file| file.proof.clone()),
        }
    }
}

impl SeenFile {
    /// # Errors
    /// If it is not this one that is here. Blocks.
    fn check(&self) -> Result<(), String> {
        let (folder, name) = place(&self.path)?;
        match &self.proof {
            Some(proof) if name != self.name || !proof.is_in(&folder) => Err(format!(
                "{} is another file there: both must see the same one (NFS or the like; a device is none)",
                self.path
            )),
            _ => Ok(()),
        }
    }
}

/// The directory of a file, which may be there by a symbolic link, and its name there. Blocks.
fn place(path: &str) -> Result<(PathBuf, String), String> {
    let real = Path::new(path).canonicalize();
    let real = real.map_err(|error| format!("{path} is not there: {error}"))?;
    let name = real.file_name().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    Ok((real.parent().unwrap_or(&real).to_owned(), name))
}

/// Whether this node has what a machine needs.
///
/// # Errors
/// What it lacks.
pub(crate) async fn sees(machines: &Machines, question: Sees) -> Result<(), String> {
    let kinds = machines.context.kinds.clone();
    for image in kinds.of(&question.spec)?.images(&question.spec)? {
        machines.images.find_image(&image).await?;
    }
    let paths = question.files.iter().map(|file| file.path.clone());
    let cache = machines.context.dir.cache();
    let looked = machines.looks.look(paths.collect(), move || {
        let mut files = question.files.iter();
        files.try_for_each(SeenFile::check)?;
        let lacks = kinds.of(&question.spec)?.lacks_here(&question.spec, &cache);
        lacks.map_or(Ok(()), Err)
    });
    looked.await?
}

/// The nodes that can run a machine.
struct Able {
    nodes: BTreeSet<NodeName>,
    /// Why others cannot, each in a sentence.
    refusals: Vec<String>,
}

/// The other nodes that are alive and can run a machine with this spec as this one can.
async fn able(machines: &Machines, spec: &Spec) -> Result<Able, String> {
    let files = machines.context.kinds.of(spec)?.host_files(spec);
    let paths = files.iter().map(|file| file.path.clone()).collect();
    let shown = machines.looks.look(paths, move || {
        let shown = files.iter().map(ShownFile::of);
        shown.collect::<Result<Vec<ShownFile>, String>>()
    });
    // Dropped, and with them the proofs, once all have answered.
    let shown = shown.await??;
    let question = Sees {
        spec: spec.clone(),
        files: shown.iter().map(ShownFile::seen).collect(),
    };
    ask_all(machines, &question).await
}

async fn ask_all(machines: &Machines, question: &Sees) -> Result<Able, String> {
    let context = &machines.context;
    let payload = pack(question).map_err(|error| error.to_string())?;
    let alive = records::alive(&*context.store).await;
    let alive = alive.map_err(|error| error.to_string())?;
    let others = alive.into_iter().filter(|node| *node != context.name);
    let asked = others.map(|node| {
        let payload = payload.clone();
        async move {
            let answer = context
                .peers
                .call(&node, SEES, payload, SEES_PATIENCE)
                .await;
            (node, answer.and_then(|bytes| unpack::<()>(&bytes)))
        }
    });
    let mut able = Able {
        nodes: BTreeSet::new(),
        refusals: Vec::new(),
    };
    for (node, answer) in join_all(asked).await {
        match answer {
            Ok(()) => {
                able.nodes.insert(node);
            }
            Err(RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. }) => {
                able.refusals.push(format!("{node}: {reason}"));
            }
            Err(error) => able.refusals.push(format!("{node}: {error}")),
        }
    }
    Ok(able)
}

/// Answers [`SEEN_BY`].
///
/// # Errors
/// If this node itself lacks a file, or other nodes are there and none of them can run it: why.
pub(crate) async fn seen_by(machines: &Machines, spec: &Spec) -> Result<Vec<NodeName>, String> {
    let able = able(machines, spec).await?;
    if able.nodes.is_empty() && !able.refusals.is_empty() {
        return Err(able.refusals.join("; "));
    }
    Ok(able.nodes.into_iter().collect())
}

/// Refuses high availability for a machine on `node` that no other node could begin anew.
///
/// # Errors
/// [`CommandError::Conflict`], with what they lack; [`CommandError::Unavailable`] if the node does
/// not answer.
pub(super) async fn check_elsewhere(
    machines: &Machines,
    node: &NodeName,
    spec: &Spec,
) -> Result<(), CommandError> {
    let kind = machines.context.kinds.of(spec);
    let kind = kind.map_err(CommandError::Invalid)?;
    if spec.ha.is_none() || kind.fails_over_from_checkpoint(spec) {
        return Ok(());
    }
    let refused = |reason: String| {
        CommandError::Conflict(format!(
            "no other node could go on with it when {node} fails (ha): {reason}"
        ))
    };
    if *node == machines.context.name {
        return seen_by(machines, spec).await.map(drop).map_err(refused);
    }
    let unavailable = |error: RpcError| CommandError::Unavailable(error.to_string());
    let payload = pack(spec).map_err(unavailable)?;
    let peers = &machines.context.peers;
    match peers.call(node, SEEN_BY, payload, SEEN_BY_PATIENCE).await {
        Ok(_) => Ok(()),
        Err(RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. }) => {
            Err(refused(reason))
        }
        Err(error) => Err(unavailable(error)),
    }
}

/// Keeps the in-sync set of a machine without checkpoints up to date until its worker is gone, or
/// its availability is off: to be called when either changes.
pub(super) fn keep_members(machines: &Arc<Machines>, machine: &MachineName, worker: &WorkerHandle) {
    let (machines, machine, worker) = (machines.clone(), machine.clone(), worker.clone());
    // One task for each worker; one that is about to end looks again.
    if !machines.member_tasks.begin(worker.id()) {
        return;
    }
    tokio::spawn(async move {
        loop {
            keep_while_available(&machines, &machine, &worker).await;
            if machines.member_tasks.end(worker.id()) {
                return;
            }
        }
    });
}

async fn keep_while_available(
    machines: &Arc<Machines>,
    machine: &MachineName,
    worker: &WorkerHandle,
) {
    let is_here = || {
        let now = machines.processes.machines.get(machine);
        now.is_some_and(|now| now.is(worker))
    };
    let mut alive = machines.failover.alive.changes();
    while is_here() {
        alive.mark_unchanged();
        let record = match records::get(&*machines.context.store, machine).await {
            Ok(found) => found.record,
            Err(RecordError::NoMachine(_)) => return,
            Err(_) => {
                tokio::time::sleep(STORE_RETRY_AFTER).await;
                continue;
            }
        };
        let kinds = &machines.context.kinds;
        if record.spec.ha.is_none() || kinds.fails_over_from_checkpoint(&record.spec) {
            return;
        }
        let is_own = record.owner == machines.context.name && !record.status.ended();
        let pause = match is_own {
            // It arrives.
            false => STORE_RETRY_AFTER,
            true => match renew_members(machines, &record).await {
                Ok(()) => LOOK_EVERY,
                Err(error) => {
                    tracing::warn!(%machine, error, "it is not known who can go on with it");
                    RETRY_AFTER
                }
            },
        };
        // (An error means that the agent ends.)
        let _ = tokio::time::timeout(pause, alive.changed()).await;
    }
}

async fn renew_members(machines: &Arc<Machines>, record: &Record) -> Result<(), String> {
    let (context, machine) = (&machines.context, &record.name);
    let before = records::in_sync_set(&*context.store, machine).await;
    let before = before.map_err(|error| error.to_string())?;
    let mut able = able(machines, &record.spec).await?;
    able.nodes.insert(context.name.clone());
    let set = InSyncSet {
        checkpoint: None,
        members: able.nodes,
        memory_bytes: record.spec.memory_bytes,
        held_output: None,
    };
    if before.as_ref().is_some_and(|(before, _)| *before == set) {
        return Ok(());
    }
    let epoch: Epoch = record.epoch;
    let revision = before.map(|(_, revision)| revision);
    let replaced = records::replace_in_sync_set(context, machine, epoch, revision, &set).await;
    replaced.map_err(|error| error.to_string())?;
    let nodes: Vec<&str> = set.members.iter().map(NodeName::as_str).collect();
    let text = match nodes.len() {
        1 => format!(
            "it can run on {} only{}{}",
            nodes[0],
            if able.refusals.is_empty() { "" } else { ": " },
            able.refusals.join("; ")
        ),
        _ => format!("it can run on {}", nodes.join(", ")),
    };
    let told = Note::machine(EventKind::CheckpointReplicated, machine, text);
    context.events.record(told.under(epoch));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &Path, is_written: bool) -> HostFile {
        HostFile {
            path: path.display().to_string(),
            is_written,
        }
    }

    #[test]
    fn a_file_is_seen_where_it_is_the_same() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |folder: &tempfile::TempDir, name: &str| folder.path().join(name);
        let (real, second) = (at(&one, "real"), at(&one, "second"));
        let (link, wrong) = (at(&other, "link"), at(&other, "wrong"));
        for path in [&real, &second] {
            std::fs::write(path, "").unwrap();
        }
        std::os::unix::fs::symlink(&real, &link).unwrap();
        std::os::unix::fs::symlink(&second, &wrong).unwrap();
        let shown = ShownFile::of(&file(&real, true)).unwrap();
        let seen_as = |path: &Path| SeenFile {
            path: path.display().to_string(),
            ..shown.seen()
        };
        assert_eq!(seen_as(&real).check(), Ok(()));
        assert_eq!(seen_as(&link).check(), Ok(()));
        // In the same directory, but another file.
        let said = seen_as(&wrong).check().unwrap_err();
        assert!(said.contains("another file there"), "{said}");
        // Of the same name, but in another directory.
        let elsewhere = at(&other, "real");
        let said = seen_as(&elsewhere).check().unwrap_err();
        assert!(said.contains("is not there"), "{said}");
        std::fs::write(&elsewhere, "").unwrap();
        let said = seen_as(&elsewhere).check().unwrap_err();
        assert!(said.contains("another file there"), "{said}");
        // What is only read need not be the same one.
        let read = ShownFile::of(&file(&real, false)).unwrap().seen();
        assert_eq!(read.proof, None);
        let read = SeenFile {
            path: elsewhere.display().to_string(),
            ..read
        };
        assert_eq!(read.check(), Ok(()));
    }

    #[test]
    fn nothing_is_written_beside_a_file_that_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        for is_written in [true, false] {
            let said = ShownFile::of(&file(&missing, is_written)).unwrap_err();
            assert!(said.contains("missing is not there"), "{said}");
        }
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }
}
