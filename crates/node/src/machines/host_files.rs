//! Which nodes can begin a machine anew whose kind has no checkpoints: they have its images, and see
//! the same files of hosts (disks) as its node. They are the members of its in-sync set, to which
//! alone it goes when its node fails.
//!
//! ```text
//!   node of the machine                                     each other node
//!     │ writes a file beside each disk that is written to
//!     │── SEES: files, what those files have, images ──────────▶│ reads them, fetches images
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
use keel_machine::spec::{Record, Spec, Status};
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
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// How long a node may take: it may have to fetch images.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a node needs to have for a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sees {
    /// Hashes of images.
    images: Vec<String>,
    files: Vec<SeenFile>,
}

/// A file of the asking node.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct SeenFile {
    path: String,
    /// In the same directory, unless the file is only read.
    proof: Option<Proof>,
}

impl SeenFile {
    /// # Errors
    /// If it is not this one that is here. Blocks.
    fn check(&self) -> Result<(), String> {
        let folder = folder_of(&self.path)?;
        match &self.proof {
            Some(proof) if !proof.is_in(&folder) => Err(format!(
                "{} is another file there: both must see the same one (NFS or the like)",
                self.path
            )),
            _ => Ok(()),
        }
    }
}

/// The directory of a file, which may be there by a symbolic link. Blocks.
fn folder_of(path: &str) -> Result<PathBuf, String> {
    let real = Path::new(path).canonicalize();
    let real = real.map_err(|error| format!("{path} is not there: {error}"))?;
    Ok(real.parent().unwrap_or(&real).to_owned())
}

/// Writes proofs beside files. Blocks.
fn prove(files: &[HostFile]) -> Result<Vec<Option<ProofFile>>, String> {
    let proofs = files.iter().map(|file| {
        let folder = folder_of(&file.path)?;
        if !file.is_written {
            return Ok(None);
        }
        let written = ProofFile::write(&folder);
        written.map(Some).map_err(|error| {
            format!("no other file can be written beside {}, by which other nodes would see that they have it: {error}", file.path)
        })
    });
    proofs.collect()
}

/// Whether this node has what a machine needs.
///
/// # Errors
/// What it lacks.
pub(crate) async fn sees(machines: &Machines, question: Sees) -> Result<(), String> {
    for image in &question.images {
        machines.images.find_image(image).await?;
    }
    let looked = tokio::task::spawn_blocking(move || {
        let mut files = question.files.iter();
        files.try_for_each(SeenFile::check)
    });
    looked.await.map_err(|error| error.to_string())?
}

/// The nodes that can run a machine.
struct Able {
    nodes: BTreeSet<NodeName>,
    /// Why others cannot, each in a sentence.
    refusals: Vec<String>,
}

/// The other nodes that are alive and can run a machine with this spec as this one can.
async fn able(machines: &Machines, spec: &Spec) -> Result<Able, String> {
    let kind = machines.context.kinds.of(spec)?;
    let files = kind.host_files(spec);
    let listed = files.clone();
    let written = tokio::task::spawn_blocking(move || prove(&listed)).await;
    let proofs = written.map_err(|error| error.to_string())??;
    let seen = files
        .into_iter()
        .zip(&proofs)
        .map(|(file, proof)| SeenFile {
            path: file.path,
            proof: proof.as_ref().map(|file| file.proof.clone()),
        });
    let question = Sees {
        images: kind.images(spec),
        files: seen.collect(),
    };
    let asked = ask_all(machines, &question).await;
    let removed = tokio::task::spawn_blocking(move || {
        proofs.into_iter().flatten().for_each(ProofFile::remove);
    });
    // A panic removes nothing; the names of the files identify the leftovers.
    let _ = removed.await;
    asked
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
            let answer = context.peers.call(&node, SEES, payload, PATIENCE).await;
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
    if spec.ha.is_none() || kind.abilities().checkpoints {
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
    match peers.call(node, SEEN_BY, payload, PATIENCE).await {
        Ok(_) => Ok(()),
        Err(RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. }) => {
            Err(refused(reason))
        }
        Err(error) => Err(unavailable(error)),
    }
}

/// Keeps the in-sync set of a machine without checkpoints up to date until its worker is gone.
pub(super) fn keep_members(machines: &Arc<Machines>, machine: &MachineName, worker: &WorkerHandle) {
    let (machines, machine, worker) = (machines.clone(), machine.clone(), worker.clone());
    tokio::spawn(async move {
        let is_here = || {
            let now = machines.processes.machines.get(&machine);
            now.is_some_and(|now| now.is(&worker))
        };
        let mut alive = machines.failover.alive.changes();
        while is_here() {
            alive.mark_unchanged();
            let record = match records::get(&*machines.context.store, &machine).await {
                Ok(found) => found.record,
                Err(RecordError::NoMachine(_)) => return,
                Err(_) => {
                    tokio::time::sleep(RETRY_AFTER).await;
                    continue;
                }
            };
            let kind = machines.context.kinds.of(&record.spec);
            if kind.is_ok_and(|kind| kind.abilities().checkpoints) {
                return;
            }
            let runs = record.owner == machines.context.name && record.status == Status::Running;
            let pause = match runs && record.spec.ha.is_some() {
                false => RETRY_AFTER,
                true => match renew_members(&machines, &record).await {
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
    });
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

    fn seen(file: &HostFile, proof: Option<&ProofFile>) -> SeenFile {
        SeenFile {
            path: file.path.clone(),
            proof: proof.map(|written| written.proof.clone()),
        }
    }

    #[test]
    fn a_file_is_seen_where_its_directory_is_the_same() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let [real, link, elsewhere] = [
            one.path().join("real"),
            other.path().join("link"),
            other.path().join("elsewhere"),
        ];
        std::fs::write(&real, "").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let files = [file(&real, true), file(&link, false)];
        let proofs = prove(&files).unwrap();
        // What is only read need not be the same file.
        assert!(proofs[1].is_none());
        assert_eq!(seen(&files[0], proofs[0].as_ref()).check(), Ok(()));
        let by_link = file(&link, true);
        assert_eq!(seen(&by_link, proofs[0].as_ref()).check(), Ok(()));
        let missing = file(&elsewhere, true);
        for proof in [proofs[0].as_ref(), None] {
            let said = seen(&missing, proof).check().unwrap_err();
            assert!(said.contains("elsewhere is not there"), "{said}");
        }
        std::fs::write(&elsewhere, "").unwrap();
        let said = seen(&missing, proofs[0].as_ref()).check().unwrap_err();
        assert!(said.contains("another file there"), "{said}");
        assert_eq!(seen(&missing, None).check(), Ok(()));
    }

    #[test]
    fn nothing_is_proved_of_a_file_that_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        for is_written in [true, false] {
            let said = prove(&[file(&missing, is_written)]).unwrap_err();
            assert!(said.contains("missing is not there"), "{said}");
        }
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }
}
