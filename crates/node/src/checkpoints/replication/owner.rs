//! The owner's part: makes a checkpoint of a machine in its own folder, and has other nodes fetch
//! it until enough of them have it.

use super::super::handle::{Checkpoints, PATIENCE, opened, repository_error};
use super::objects::{Object, objects_of};
use super::replica::{DISCARD, Discard, FETCH_CHECKPOINT, FetchCheckpoint};
use crate::context::Context;
use crate::error::CommandError;
use crate::events::Note;
use crate::images::send_file;
use crate::processes::PROMPT;
use crate::records::{self, HeldOutput, InSyncSet};
use keel_api::EventKind;
use keel_cluster::failover::{ReplicaNode, choose_replicas};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::checkpoint::{CheckpointId, Repository, Retention};
use keel_machine::failpoint;
use keel_machine::high_availability::HighAvailability;
use keel_machine::worker::control::{Checkpoint, CheckpointReport, kind, pack};
use keel_net::{Reply, RpcError, coarse_timer};
use keel_store::clock::boottime;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long a node may take to fetch a checkpoint: this long, and as much for each byte as on a slow
/// link. One that hangs must not keep others from having it.
const FETCH_PATIENCE: Duration = Duration::from_secs(20);
const FETCH_BYTES_PER_S: u64 = 4 << 20;
/// How often it is looked whether a node that fetches is alive.
const LEASE_LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a node may take to discard what is not needed any more.
const DISCARD_PATIENCE: Duration = Duration::from_secs(10);

/// A checkpoint in this node's folder, to be copied to others.
#[derive(Debug, Clone)]
pub(in crate::checkpoints) struct Unreplicated {
    id: CheckpointId,
    /// When it was begun, on CLOCK_BOOTTIME.
    begun: Duration,
    /// The life of the machine whose state it has.
    epoch: Epoch,
    created_unix_ms: u64,
    log_end: u64,
    /// When that life began, if its output behind the checkpoint is held back.
    holds_output_of: Option<u64>,
    memory_bytes: u64,
    program: Option<[u8; 32]>,
}

impl Unreplicated {
    /// When it was begun, on CLOCK_BOOTTIME.
    pub(in crate::checkpoints) fn begun(&self) -> Duration {
        self.begun
    }
}

/// Returns when a node has no lease any more: it may not answer for a long time.
async fn lease_ends(context: &Context, node: &NodeName) {
    loop {
        coarse_timer::sleep(LEASE_LOOK_EVERY).await;
        let alive = records::alive(&*context.store).await;
        if alive.is_ok_and(|alive| !alive.contains(node)) {
            return;
        }
    }
}

impl Checkpoints {
    /// Makes a checkpoint of a machine that runs here in this node's folder of replicas.
    pub(in crate::checkpoints) async fn make_for_replication(
        &self,
        machine: &MachineName,
    ) -> Result<Unreplicated, CommandError> {
        let conflict = |what: String| CommandError::Conflict(what);
        let worker = self.processes.machines.get(machine);
        let worker = worker.ok_or_else(|| conflict(format!("machine {machine:?} does not run")))?;
        let before = records::get(&*self.context.store, machine).await?.record;
        let set = records::in_sync_set(&*self.context.store, machine).await?;
        let counts = set.and_then(|(set, _)| set.checkpoint);
        let question = Checkpoint {
            repository: self.context.dir.replicas().display().to_string(),
            full: false,
            keep: Retention {
                newest: Some(self.needed(machine, counts.as_ref()).await?),
                for_s: None,
            },
            after: counts,
        };
        let text = |error: RpcError| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                conflict(format!("no checkpoint of machine {machine:?}: {reason}"))
            }
            other => CommandError::Unavailable(other.to_string()),
        };
        let begun = boottime();
        let made: CheckpointReport = worker
            .ask(kind::CHECKPOINT, &question, PATIENCE)
            .await
            .map_err(text)?;
        self.context.metrics.checkpoint_made(made.pause_micros);
        let report = worker.report().await.map_err(text)?;
        Ok(Unreplicated {
            id: made.id,
            begun,
            epoch: before.epoch,
            created_unix_ms: before.created_unix_ms,
            log_end: made.log_end,
            holds_output_of: made.holds_output.then_some(before.started_unix_ms),
            memory_bytes: report.memory_bytes,
            program: report.program,
        })
    }

    /// How many of a machine's checkpoints in this node's folder must be kept with the next one: down
    /// to the one that counts, by the in-sync set. Newer ones were made in vain.
    async fn needed(
        &self,
        machine: &MachineName,
        counts: Option<&CheckpointId>,
    ) -> Result<u32, CommandError> {
        let url = self.context.dir.replicas().display().to_string();
        let repository = opened(move || Repository::create(&url)).await?;
        let all = repository.list(machine).await;
        let all = all.map_err(|error| repository_error(&error))?;
        let newer = match counts {
            Some(counts) => all.iter().filter(|id| *id > counts).count(),
            None => 0,
        };
        Ok(u32::try_from(newer).unwrap_or(u32::MAX).saturating_add(2))
    }

    /// Has other nodes fetch a checkpoint, and records who has it.
    ///
    /// # Errors
    /// If nodes are there and none of them got it, or the machine is not this node's any more: the
    /// in-sync set stays as it was.
    pub(in crate::checkpoints) async fn replicate(
        &self,
        machine: &MachineName,
        ha: &HighAvailability,
        checkpoint: &Unreplicated,
    ) -> Result<(), CommandError> {
        let unavailable = |error: String| CommandError::Unavailable(error);
        let (folder, name) = (self.context.dir.replicas(), machine.clone());
        let program = checkpoint.program;
        let listed = tokio::task::spawn_blocking(move || objects_of(&folder, &name, program))
            .await
            .map_err(|error| unavailable(error.to_string()))?;
        let objects = listed.map_err(|error| {
            unavailable(format!(
                "the checkpoints of {machine:?} cannot be read: {error}"
            ))
        })?;
        let before = records::in_sync_set(&*self.context.store, machine).await?;
        let (candidates, home) = self.candidates(before.as_ref().map(|(set, _)| set)).await?;
        let fetch = FetchCheckpoint {
            machine: machine.clone(),
            epoch: checkpoint.epoch,
            created_unix_ms: checkpoint.created_unix_ms,
            log_end: checkpoint.log_end,
            held_life_unix_ms: checkpoint.holds_output_of,
            objects: objects.clone(),
        };
        let (has, failures) = self.fetched_by(ha, &fetch, home, candidates).await;
        if has.is_empty() && !failures.is_empty() {
            return Err(unavailable(format!(
                "no other node has checkpoint {} of machine {machine:?}: {}",
                checkpoint.id,
                failures.join("; ")
            )));
        }
        failpoint::pass_async("replication.fetched")
            .await
            .map_err(|injected| unavailable(injected.to_string()))?;
        let mut members = has;
        members.insert(self.context.name.clone());
        let set = InSyncSet {
            checkpoint: Some(checkpoint.id.clone()),
            members,
            memory_bytes: checkpoint.memory_bytes,
            held_output: checkpoint.holds_output_of.map(|life_unix_ms| HeldOutput {
                end: checkpoint.log_end,
                life_unix_ms,
            }),
        };
        let revision = before.as_ref().map(|(_, revision)| *revision);
        records::replace_in_sync_set(&self.context, machine, checkpoint.epoch, revision, &set)
            .await?;
        self.tell(machine, before.as_ref().map(|(set, _)| set), &set);
        self.show_safe_output(machine, &set).await;
        // What other nodes have is kept as long as only this one has the newest.
        if set.members.len() > 1 {
            let mut all = set.members;
            all.extend(before.into_iter().flat_map(|(set, _)| set.members));
            self.discard_elsewhere(machine, &all, objects);
        }
        Ok(())
    }

    /// Shows the output that the checkpoint of a set covers, if it is on another node: nothing
    /// undoes it any more.
    pub(in crate::checkpoints) async fn show_safe_output(
        &self,
        machine: &MachineName,
        set: &InSyncSet,
    ) {
        let (Some(held), true) = (set.held_output, set.members.len() > 1) else {
            return;
        };
        let Some(worker) = self.processes.machines.get(machine) else {
            return;
        };
        let shown: Result<(), RpcError> = worker.ask(kind::SHOW_OUTPUT, &held.end, PROMPT).await;
        if let Err(error) = shown {
            tracing::warn!(%machine, %error, "its output waits for the next checkpoint");
        }
    }

    /// An event where the nodes that have the checkpoint changed: users plan with them.
    fn tell(&self, machine: &MachineName, before: Option<&InSyncSet>, set: &InSyncSet) {
        if before.is_some_and(|before| before.members == set.members) {
            return;
        }
        let nodes: Vec<&str> = set.members.iter().map(NodeName::as_str).collect();
        let waits = match set.held_output {
            Some(_) => "; its output waits for one",
            None => "",
        };
        let text = match nodes.len() {
            1 => format!(
                "its checkpoint is on {} only: no other node is there{waits}",
                nodes[0]
            ),
            _ => format!("its checkpoint is on {}", nodes.join(", ")),
        };
        let told = Note::machine(EventKind::CheckpointReplicated, machine, text);
        self.context.events.record(told);
    }

    /// The other nodes that may have copies, and this node's failure domain.
    async fn candidates(
        &self,
        set: Option<&InSyncSet>,
    ) -> Result<(Vec<ReplicaNode>, Option<String>), CommandError> {
        let store = &*self.context.store;
        let alive = records::alive(store).await?;
        let draining = records::draining(store).await?;
        let mut zones = records::zones(store).await?;
        let others = alive
            .into_iter()
            .filter(|node| *node != self.context.name && !draining.contains(node));
        let candidates = others
            .map(|node| ReplicaNode {
                zone: zones.remove(&node),
                has_earlier: set.is_some_and(|set| set.members.contains(&node)),
                node,
            })
            .collect();
        Ok((candidates, zones.remove(&self.context.name)))
    }

    /// Has candidates fetch, the best ones first, until enough have all. Returns those, and why
    /// others have not.
    async fn fetched_by(
        &self,
        ha: &HighAvailability,
        fetch: &FetchCheckpoint,
        home: Option<String>,
        mut candidates: Vec<ReplicaNode>,
    ) -> (BTreeSet<NodeName>, Vec<String>) {
        let (mut has, mut failures) = (BTreeSet::new(), Vec::new());
        loop {
            let lacking = (ha.replicas as usize).saturating_sub(has.len());
            let chosen = choose_replicas(&fetch.machine, home.as_deref(), lacking, &candidates);
            if chosen.is_empty() {
                return (has, failures);
            }
            candidates.retain(|candidate| !chosen.contains(&candidate.node));
            let mut fetches = JoinSet::new();
            for node in chosen {
                let (peers, payload) = (self.context.peers.clone(), pack(fetch));
                let bytes: u64 = fetch.objects.iter().map(Object::bytes).sum();
                let patience = FETCH_PATIENCE + Duration::from_secs(bytes / FETCH_BYTES_PER_S);
                let context = self.context.clone();
                fetches.spawn(async move {
                    let fetched = match payload {
                        Ok(payload) => tokio::select! {
                            answer = peers.call(&node, FETCH_CHECKPOINT, payload, patience) => {
                                answer.map(drop)
                            }
                            () = lease_ends(&context, &node) => {
                                Err(RpcError::unknown("its lease ended"))
                            }
                        },
                        Err(error) => Err(error),
                    };
                    (node, fetched)
                });
            }
            while let Some(Ok((node, fetched))) = fetches.join_next().await {
                match fetched {
                    Ok(()) => drop(has.insert(node)),
                    Err(error) => failures.push(format!("{node}: {error}")),
                }
            }
        }
    }

    /// Lets other nodes delete what is not needed any more. One that does not answer does it after
    /// the next checkpoint.
    fn discard_elsewhere(
        &self,
        machine: &MachineName,
        nodes: &BTreeSet<NodeName>,
        needed: Vec<Object>,
    ) {
        let Ok(payload) = pack(&Discard {
            machine: machine.clone(),
            needed,
        }) else {
            return;
        };
        for node in nodes.iter().filter(|node| **node != self.context.name) {
            let (peers, node) = (self.context.peers.clone(), node.clone());
            let (payload, machine) = (payload.clone(), machine.clone());
            tokio::spawn(async move {
                let call = peers.call(&node, DISCARD, payload, DISCARD_PATIENCE);
                if let Err(error) = call.await {
                    tracing::debug!(%machine, %node, %error, "old checkpoints stay there until the next one");
                }
            });
        }
    }

    /// Sends an object of a machine's checkpoints to another node.
    ///
    /// # Errors
    /// [`RpcError`] if that is no object, or it is not here.
    pub(crate) async fn send_object(
        &self,
        machine: &MachineName,
        object: &Object,
    ) -> Result<Reply, RpcError> {
        if !object.is_valid() {
            return Err(RpcError::refused("that is no object of a checkpoint"));
        }
        send_file(object.path(&self.context.dir.replicas(), machine)).await
    }
}
