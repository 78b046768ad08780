//! The part of nodes that are not the machine's: they fetch what they lack of its checkpoints, and
//! delete what is not needed any more. A node on which a machine is to be restarted fetches in the
//! same way, from a member of the in-sync set.

use super::super::handle::{Checkpoints, open};
use super::objects::{NewFile, Object, delete, objects_of, others};
use super::output::{self, OutputLife};
use crate::records::{self, InSyncSet, RecordError};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::checkpoint::{CheckpointId, MemoryRestore, Origin, RepositoryError};
use keel_machine::failpoint;
use keel_machine::high_availability::HighAvailability;
use keel_machine::spec::{Record, Spec};
use keel_machine::worker::control::{pack, unpack};
use keel_net::{Bytes, Fingerprint, RpcError, coarse_timer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Request between agents: `(machine, object)` → stream of the pieces of the object's file.
pub(crate) const OBJECT: u16 = 0x0351;
/// Request between agents: [`FetchCheckpoint`] → `()`: the node has all of it durably.
pub(crate) const FETCH_CHECKPOINT: u16 = 0x0350;
/// Request between agents: [`Discard`] → `()`.
pub(crate) const DISCARD: u16 = 0x0352;
/// Request between agents: `machine` → its objects at a member of the in-sync set.
pub(crate) const OBJECTS: u16 = 0x0353;

/// How long a member may take to list its objects.
const LIST_PATIENCE: Duration = Duration::from_secs(10);
/// Interval at which what no machine needs is deleted.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// How long the folder of a machine must be unchanged before it is swept: a checkpoint may be on
/// its way.
const SETTLED_AFTER: Duration = Duration::from_secs(600);

/// The owner of a machine asks a node to fetch its checkpoints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FetchCheckpoint {
    pub(crate) machine: MachineName,
    /// The epoch under which the machine runs at the owner.
    pub(crate) epoch: Epoch,
    /// Which of the machines that had the name.
    pub(crate) created_unix_ms: u64,
    /// Where its output ended when the checkpoint was made.
    pub(crate) log_end: u64,
    /// When its present life began, if output behind that is held back; in milliseconds since
    /// 1970-01-01 UTC.
    #[serde(default)]
    pub(crate) held_life_unix_ms: Option<u64>,
    pub(crate) objects: Vec<Object>,
}

/// The owner of a machine tells a node what is still needed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Discard {
    pub(crate) machine: MachineName,
    pub(crate) needed: Vec<Object>,
}

impl Checkpoints {
    /// Fetches from the owner of a machine what this node lacks of its checkpoints.
    ///
    /// # Errors
    /// [`RpcError`] if that node is not the owner, or under another epoch; or if not all of it is
    /// durably here.
    pub(crate) async fn fetch_here(
        &self,
        owner: &NodeName,
        request: FetchCheckpoint,
    ) -> Result<(), RpcError> {
        let record = self.owned_by(owner, &request.machine).await?;
        if record.epoch != request.epoch {
            return Err(RpcError::refused(format!(
                "machine {:?} runs under epoch {}, not {}",
                request.machine, record.epoch, request.epoch
            )));
        }
        self.prepare_for(record.spec)
            .await
            .map_err(RpcError::refused)?;
        let life = OutputLife {
            created_unix_ms: request.created_unix_ms,
            held_unix_ms: request.held_life_unix_ms,
        };
        self.fetch_output(owner, &request.machine, life, request.log_end)
            .await
            .map_err(RpcError::failed)?;
        self.fetch_objects(owner, &request.machine, request.objects)
            .await
            .map_err(RpcError::failed)
    }

    /// Makes sure that a machine could go on here from its checkpoint, if it uses more than that.
    async fn prepare_for(&self, spec: Spec) -> Result<(), String> {
        let (kinds, cache) = (self.context.kinds.clone(), self.context.dir.cache());
        let looked = tokio::task::spawn_blocking(move || {
            let kind = kinds.of(&spec)?;
            if !kind.abilities().keeps_images {
                return Ok(Vec::new());
            }
            match kind.lacks_here(&spec, &cache) {
                Some(lacking) => Err(lacking),
                None => kind.images(&spec),
            }
        });
        for image in looked.await.map_err(|error| error.to_string())?? {
            self.fetch_image(image).await?;
        }
        Ok(())
    }

    /// Has an image fetched that is not here, by a task of its own: the owner may not wait as long.
    async fn fetch_image(&self, hash: String) -> Result<(), String> {
        let Some(fetch) = ImageFetch::begin(&self.image_fetches, &hash) else {
            return Err(format!("image {hash} is still being fetched"));
        };
        let images = self.images.clone();
        let task = tokio::spawn(async move {
            let found = images.find_image(&hash).await;
            drop(fetch);
            found
        });
        let found = task.await.map_err(|error| error.to_string())?;
        found.map(drop).map_err(|error| error.to_string())
    }

    /// The record of a machine of this owner.
    async fn owned_by(&self, owner: &NodeName, machine: &MachineName) -> Result<Record, RpcError> {
        let found = records::get(&*self.context.store, machine).await;
        let record = found.map_err(RpcError::failed)?.record;
        match record.owner == *owner {
            true => Ok(record),
            false => Err(RpcError::refused(format!(
                "machine {machine:?} belongs to {}, not to {owner}",
                record.owner
            ))),
        }
    }

    async fn fetch_objects(
        &self,
        from: &NodeName,
        machine: &MachineName,
        objects: Vec<Object>,
    ) -> Result<(), String> {
        if let Some(object) = objects.iter().find(|object| !object.is_valid()) {
            return Err(format!("{:?} is no object of a checkpoint", object.name));
        }
        let (folder, name) = (self.context.dir.replicas(), machine.clone());
        let lacking = tokio::task::spawn_blocking(move || {
            let lacks = |object: &Object| !object.is_there(&folder, &name);
            objects.into_iter().filter(lacks).collect::<Vec<_>>()
        });
        let lacking = lacking.await.map_err(|error| error.to_string())?;
        for object in lacking {
            failpoint::pass_async("replication.object")
                .await
                .map_err(|injected| injected.to_string())?;
            self.fetch_object(from, machine, &object)
                .await
                .map_err(|error| format!("{} from {from}: {error}", object.name))?;
        }
        Ok(())
    }

    async fn fetch_object(
        &self,
        from: &NodeName,
        machine: &MachineName,
        object: &Object,
    ) -> Result<(), String> {
        let question = pack(&(machine, object)).map_err(|error| error.to_string())?;
        let peers = &self.context.peers;
        let stream = peers.bulk_stream(from, OBJECT, question).await;
        let mut stream = stream.map_err(|error| error.to_string())?;
        let (send, mut pieces) = mpsc::channel::<Bytes>(4);
        let path = object.path(&self.context.dir.replicas(), machine);
        let (bytes, hash) = (object.bytes, object.hash);
        // Pieces are written as they come; what is not all there gets no name.
        let writing = tokio::task::spawn_blocking(move || -> Result<(), String> {
            let text = |error: std::io::Error| format!("{}: {error}", path.display());
            let mut file = NewFile::create(path.clone()).map_err(text)?;
            let (mut written, mut hasher) = (0, blake3::Hasher::new());
            while let Some(piece) = pieces.blocking_recv() {
                file.write(&piece).map_err(text)?;
                hasher.update(&piece);
                written += piece.len() as u64;
                if written > bytes {
                    return Err(format!("it has more than {bytes} bytes"));
                }
            }
            if written != bytes {
                return Err(format!("it broke off after {written} of {bytes} bytes"));
            }
            if hash.is_some_and(|hash| hash != *hasher.finalize().as_bytes()) {
                return Err("its content changed meanwhile".into());
            }
            file.finish().map_err(text)
        });
        let mut lost = None;
        while let Some(piece) = stream.recv().await {
            match piece {
                Ok(piece) => {
                    // A writer that failed says why below.
                    if send.send(piece).await.is_err() {
                        break;
                    }
                }
                Err(error) => {
                    lost = Some(error.to_string());
                    break;
                }
            }
        }
        drop(send);
        let written = writing.await.map_err(|error| error.to_string())?;
        match lost {
            Some(error) => Err(error),
            None => written,
        }
    }

    /// Deletes what is not needed any more of a machine's checkpoints here.
    ///
    /// # Errors
    /// [`RpcError`] if that node is not the machine's owner, or files cannot be deleted.
    pub(crate) async fn discard_here(
        &self,
        owner: &NodeName,
        request: Discard,
    ) -> Result<(), RpcError> {
        let machine = request.machine;
        let of_manifest = |object: &Object| Some(object.checkpoint()?.to_owned());
        let needs: Vec<String> = request.needed.iter().filter_map(of_manifest).collect();
        let (folder, name) = (self.context.dir.replicas(), machine.clone());
        let listed = tokio::task::spawn_blocking(move || others(&folder, &name, &request.needed));
        let gone = listed
            .await
            .map_err(RpcError::failed)?
            .map_err(RpcError::failed)?;
        // After the list: what this node makes once the machine is its own is not in it.
        self.owned_by(owner, &machine).await?;
        // The request may be late.
        let set = records::in_sync_set(&*self.context.store, &machine).await;
        let named = set
            .map_err(RpcError::failed)?
            .and_then(|(set, _)| set.checkpoint);
        if named.is_some_and(|named| !needs.contains(&named.to_string())) {
            return Err(RpcError::refused("a newer checkpoint is needed by now"));
        }
        self.delete_here(machine, gone)
            .await
            .map_err(RpcError::failed)
    }

    async fn delete_here(&self, machine: MachineName, files: Vec<PathBuf>) -> Result<(), String> {
        let folder = self.context.dir.replicas();
        let deleted = tokio::task::spawn_blocking(move || delete(&folder, &machine, &files)).await;
        let deleted = deleted.map_err(|error| error.to_string())?;
        deleted.map_err(|error| error.to_string())
    }

    /// What this node has of a machine's checkpoints.
    ///
    /// # Errors
    /// [`RpcError`] if it has none.
    pub(crate) async fn objects_here(&self, machine: MachineName) -> Result<Vec<Object>, RpcError> {
        let set = records::in_sync_set(&*self.context.store, &machine).await;
        let set = set.map_err(RpcError::failed)?;
        let Some((set, _)) = set.filter(|(set, _)| set.members.contains(&self.context.name)) else {
            return Err(RpcError::refused("this node does not have its checkpoint"));
        };
        let none = || RpcError::refused("the machine has no checkpoints");
        let checkpoint = set.checkpoint.ok_or_else(none)?;
        let url = self.context.dir.replicas().display().to_string();
        let repository = open(url).await.map_err(RpcError::failed)?;
        let manifest = repository.manifest(&machine, &checkpoint).await;
        let program = manifest.map_err(RpcError::failed)?.program;
        let folder = self.context.dir.replicas();
        tokio::task::spawn_blocking(move || objects_of(&folder, &machine, program))
            .await
            .map_err(RpcError::failed)?
            .map_err(RpcError::failed)
    }

    /// The checkpoint from which a machine with high availability is restarted here, fetched if
    /// this node lacks it; `None` if it has none yet.
    ///
    /// # Errors
    /// If none of the nodes that have it answers, in a sentence.
    pub(crate) async fn in_sync(
        &self,
        machine: &MachineName,
        ha: &HighAvailability,
    ) -> Result<Option<Origin>, String> {
        let set = records::in_sync_set(&*self.context.store, machine).await;
        let Some((set, _)) = set.map_err(|error| error.to_string())? else {
            return Ok(None);
        };
        let Some(checkpoint) = &set.checkpoint else {
            return Ok(None);
        };
        if ha.to.is_none() && !self.has_whole(machine, checkpoint).await {
            self.fetch_from_member(machine, &set, checkpoint).await?;
        }
        let own = || self.context.dir.replicas().display().to_string();
        Ok(Some(Origin {
            repository: ha.to.clone().unwrap_or_else(own),
            machine: machine.clone(),
            id: set.checkpoint,
            is_clone: false,
            memory: MemoryRestore::Eager,
        }))
    }

    /// Whether a checkpoint is here with all that it depends on. (Its content is verified
    /// when it is read.)
    async fn has_whole(&self, machine: &MachineName, checkpoint: &CheckpointId) -> bool {
        let url = self.context.dir.replicas().display().to_string();
        let Ok(repository) = open(url).await else {
            return false;
        };
        let Ok(chain) = repository.chain(machine, checkpoint).await else {
            return false;
        };
        let outlines: Vec<_> = chain.iter().map(|manifest| manifest.outline()).collect();
        repository.check_parts(machine, &outlines).await.is_ok()
    }

    async fn fetch_from_member(
        &self,
        machine: &MachineName,
        set: &InSyncSet,
        checkpoint: &CheckpointId,
    ) -> Result<(), String> {
        let mut failures = Vec::new();
        for member in set
            .members
            .iter()
            .filter(|node| **node != self.context.name)
        {
            let fetched = async {
                let payload = pack(machine).map_err(|error| error.to_string())?;
                let call = self
                    .context
                    .peers
                    .call(member, OBJECTS, payload, LIST_PATIENCE);
                let answer = call.await.map_err(|error| error.to_string())?;
                let objects: Vec<Object> =
                    unpack(&answer).map_err(|error: RpcError| error.to_string())?;
                self.fetch_objects(member, machine, objects).await
            };
            match fetched.await {
                Ok(()) => return Ok(()),
                Err(error) => failures.push(format!("{member}: {error}")),
            }
        }
        Err(format!(
            "its checkpoint {checkpoint} cannot be fetched: {}",
            match failures.is_empty() {
                true => "no other node has it".to_owned(),
                false => failures.join("; "),
            }
        ))
    }

    /// Deletes the checkpoints of machines that are gone, or that have theirs elsewhere now.
    async fn sweep_once(&self) -> Result<(), String> {
        let machines = self.context.dir.replicas().join("machines");
        let output = output::all(&self.context.dir);
        let listed =
            tokio::task::spawn_blocking(move || [settled(&machines), settled(&output)].concat());
        for folder in listed.await.map_err(|error| error.to_string())? {
            let name = folder.file_name().and_then(|name| name.to_str());
            let Some(machine) = name.and_then(|name| name.parse::<MachineName>().ok()) else {
                continue;
            };
            let record = records::get(&*self.context.store, &machine).await;
            let is_needed = match record {
                Ok(found) if found.record.owner == self.context.name => true,
                Ok(_) => {
                    let set = records::in_sync_set(&*self.context.store, &machine).await;
                    let set = set.map_err(|error| error.to_string())?;
                    // An older one is kept as long as only one node has the newest.
                    set.is_some_and(|(set, _)| {
                        set.members.contains(&self.context.name) || set.members.len() == 1
                    })
                }
                Err(RecordError::NoMachine(_)) => false,
                Err(error) => return Err(error.to_string()),
            };
            if is_needed {
                continue;
            }
            tracing::info!(%machine, "its checkpoints are not needed here any more");
            let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder));
            let removed = removed.await.map_err(|error| error.to_string())?;
            removed.map_err(|error| format!("{machine}: {error}"))?;
        }
        self.sweep_programs().await
    }

    /// Deletes the programs of which there is no checkpoint here any more.
    async fn sweep_programs(&self) -> Result<(), String> {
        let programs = self.context.dir.replicas().join("programs");
        let listed = tokio::task::spawn_blocking(move || settled(&programs)).await;
        let listed = listed.map_err(|error| error.to_string())?;
        if listed.is_empty() {
            return Ok(());
        }
        let url = self.context.dir.replicas().display().to_string();
        let repository = open(url).await.map_err(|error| error.to_string())?;
        let mut used = BTreeSet::new();
        let text = |error: RepositoryError| error.to_string();
        for machine in repository.machines().await.map_err(text)? {
            for id in repository.list(&machine).await.map_err(text)? {
                // One that cannot be read may need any of them.
                let manifest = repository.manifest(&machine, &id).await.map_err(text)?;
                used.extend(manifest.program.map(Fingerprint));
            }
        }
        for path in listed {
            let name = path.file_stem().and_then(|name| name.to_str());
            let program: Option<Fingerprint> = name.and_then(|name| name.parse().ok());
            if program.is_none_or(|program| !used.contains(&program)) {
                let removed = tokio::task::spawn_blocking(move || std::fs::remove_file(path)).await;
                let removed = removed.map_err(|error| error.to_string())?;
                removed.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }
}

/// An image that is being fetched, until it is dropped.
struct ImageFetch {
    all: Arc<Mutex<BTreeSet<String>>>,
    hash: String,
}

impl ImageFetch {
    /// `None` if it is being fetched already.
    fn begin(all: &Arc<Mutex<BTreeSet<String>>>, hash: &str) -> Option<Self> {
        let mut fetched = all.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.insert(hash.to_owned()).then(|| ImageFetch {
            all: all.clone(),
            hash: hash.to_owned(),
        })
    }
}

impl Drop for ImageFetch {
    fn drop(&mut self) {
        let mut fetched = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.remove(&self.hash);
    }
}

/// The entries of a folder that have not changed for long. Blocking.
fn settled(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let settled = entries.filter_map(|entry| {
        let changed = entry.metadata().ok()?.modified().ok()?;
        let unchanged = SystemTime::now().duration_since(changed).ok()?;
        (unchanged > SETTLED_AFTER).then(|| entry.path())
    });
    settled.collect()
}

/// Deletes what no machine needs, until the agent ends.
pub(crate) async fn sweep(checkpoints: Arc<Checkpoints>) {
    loop {
        coarse_timer::sleep(SWEEP_EVERY).await;
        if let Err(error) = checkpoints.sweep_once().await {
            tracing::warn!(
                error,
                "checkpoints that are not needed stay until the next sweep"
            );
        }
    }
}
