//! Adds and removes parts while the machine runs: the messages of its owner's agent, in order.
//!
//! ```text
//!   owner's agent        new part's node     other members' nodes     home's worker
//!       │─── PART ────────────▶│ listens for all   │                      │
//!       │─── CONNECT_NEW_PART ─┼──────────────────▶│ listens for it       │
//!       │ CONNECT_NEW_PART ────┼───────────────────┼─────────────────────▶│
//!       │─── PART_JOIN ───────▶│ connects          │                      │
//!       │─── ADD_PART ─────────┼──────────────────▶│ adds it              │
//!       │ ADD_PART, the last ──┼───────────────────┼─────────────────────▶│ adds it
//! ```
//!
//! Until the home adds it, a new part holds nothing: on a failure its process is ended, and the
//! other parts forget it. To remove a part, the home empties it and drops it
//! ([`kind::REMOVE_PART`]); its process ends then.

use super::handle::{SPAN_PATIENCE, Spanning, UNSPAN_PATIENCE, text};
use super::messages::{self, PartJoin, PartOffer};
use super::parts::parts_report;
use super::remote_member::{WorkerKind, join_on, ready_on};
use crate::error::CommandError;
use crate::host::needed_features;
use crate::processes::{COMPILE_PATIENCE, PROMPT, WorkerHandle};
use futures::future::{Either, select};
use futures::stream::{FuturesUnordered, StreamExt};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_kind_wasm::control::{AddPart, ConnectNewPart, Join, RemovePart, kind};
use keel_kind_wasm::span::{PARTS_MAX, PartAddress, PartId, PartSet};
use keel_machine::failpoint;
use keel_machine::spec::Spec;
use keel_machine::worker::control::{pack, unpack};
use keel_net::{Fingerprint, RpcError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

// ── a member's node ─────────────────────────────────────────────────────

/// Asks the process here that is the given part.
async fn ask_member<A: DeserializeOwned>(
    spanning: &Spanning,
    machine: &MachineName,
    kind: u16,
    question: &impl Serialize,
    patience: Duration,
) -> Result<A, String> {
    // All at once, so that one that hangs does not delay the others. The arriving worker is last.
    let workers = spanning.processes.members.names().into_iter();
    let workers = workers.filter_map(|name| spanning.processes.members.get(&name));
    let workers = workers.chain(spanning.processes.machines.get(machine));
    let mut answers: FuturesUnordered<_> = workers
        .map(|worker| async move { worker.ask(kind, question, patience).await })
        .collect();
    let mut why = "that part is not here".to_owned();
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(answer) => return Ok(answer),
            // This worker is another part.
            Err(RpcError::Refused { .. }) => {}
            Err(error) => why = text(error),
        }
    }
    Err(why)
}

/// A member here prepares to accept a connection from a new part.
pub(crate) async fn meet_new(
    spanning: &Spanning,
    request: &ConnectNewPart,
) -> Result<PartAddress, String> {
    let request = ConnectNewPart {
        address: spanning.context.worker_address(),
        ..request.clone()
    };
    ask_member(
        spanning,
        &request.machine,
        kind::CONNECT_NEW_PART,
        &request,
        PROMPT,
    )
    .await
}

/// The member accepts the connection and adds the new part.
pub(crate) async fn join_new(spanning: &Spanning, request: &AddPart) -> Result<u64, String> {
    ask_member(
        spanning,
        &request.machine,
        kind::ADD_PART,
        request,
        SPAN_PATIENCE,
    )
    .await
}

// ── the owner ───────────────────────────────────────────────────────────

/// A spanning machine that runs here.
pub(super) struct SpanningMachine<'a> {
    pub(super) spanning: &'a Arc<Spanning>,
    pub(crate) machine: &'a MachineName,
    pub(crate) spec: &'a Spec,
    pub(crate) worker: &'a WorkerHandle,
    pub(crate) program: Fingerprint,
    pub(crate) epoch: Epoch,
}

/// The result of a change of membership.
#[derive(Debug, Default)]
pub(super) struct Changed {
    /// Nodes that gained a part.
    pub(crate) came: Vec<NodeName>,
    /// Nodes that lost a part.
    pub(crate) went: Vec<NodeName>,
    /// Total downtime in microseconds.
    pub(crate) downtime_micros: u64,
}

impl SpanningMachine<'_> {
    /// Gives the machine parts on exactly these nodes, besides its home: first adds the missing
    /// ones, then removes the others.
    ///
    /// # Errors
    /// [`CommandError`]: if a part cannot be added, those added before are removed again; a part
    /// that cannot be removed stays.
    pub(super) async fn change(
        &self,
        wanted: &[NodeName],
        changed: &mut Changed,
    ) -> Result<(), CommandError> {
        let has = self.nodes().await?;
        let mut comes = wanted.to_vec();
        let mut goes = Vec::new();
        for (part, node) in has.iter().filter(|(part, _)| **part != PartId::HOME) {
            match comes.iter().position(|it| it == node) {
                Some(at) => drop(comes.remove(at)),
                None => goes.push((*part, node.clone())),
            }
        }
        let mut new = Vec::new();
        for node in comes {
            match self.add(&node, WorkerKind::New).await {
                Ok((part, downtime_micros)) => {
                    new.push(part);
                    changed.downtime_micros += downtime_micros;
                    changed.came.push(node);
                }
                Err(error) => {
                    for part in new {
                        match self.part_with(part, PartId::HOME).await {
                            Ok(_) => drop(changed.came.pop()),
                            Err(error) => {
                                let machine = self.machine;
                                tracing::warn!(%machine, %part, %error, "cannot remove the part");
                            }
                        }
                    }
                    return Err(error);
                }
            }
        }
        // Threads go to an added part, which was most likely made for them.
        let mut threads_to = new.iter().copied().cycle();
        for (part, node) in goes {
            let to = threads_to.next().unwrap_or(PartId::HOME);
            changed.downtime_micros += self.part_with(part, to).await?;
            changed.went.push(node);
        }
        Ok(())
    }

    /// The node of each part.
    async fn nodes(&self) -> Result<BTreeMap<PartId, NodeName>, CommandError> {
        let nodes = parts_report(self.worker).await?.nodes;
        match nodes.contains_key(&PartId::HOME) {
            true => Ok(nodes),
            false => Err(CommandError::Conflict(format!(
                "machine {:?} was brought together meanwhile; try again",
                self.machine
            ))),
        }
    }

    /// Adds a part; returns its number, and the downtime in microseconds.
    pub(super) async fn add(
        &self,
        node: &NodeName,
        kind: WorkerKind,
    ) -> Result<(PartId, u64), CommandError> {
        let (spanning, machine) = (self.spanning, self.machine);
        let has = self.nodes().await?;
        let mut free = (1..).map_while(PartId::new);
        let new = free.find(|part| !has.contains_key(part)).ok_or_else(|| {
            CommandError::Invalid(format!("a machine has at most {PARTS_MAX} parts"))
        })?;
        let parts: PartSet = has.keys().copied().collect();
        let offer = PartOffer {
            machine: machine.clone(),
            spec: self.spec.clone(),
            program: self.program,
            me: new,
            parts: parts.with(new),
            features: needed_features(),
            // Memory reserved by other machines there is not free.
            sharing: 1,
        };
        let on_node = |why| CommandError::Conflict(format!("no part on {node}: {why}"));
        let ready = ready_on(spanning, node, offer, kind)
            .await
            .map_err(on_node)?;
        let ends = |join| PartJoin {
            worker: ready.worker.clone(),
            join,
        };
        let met = self
            .meet(new, node, &has, &ready.place, (&ends, kind))
            .await;
        match met {
            Ok(downtime_micros) => Ok((new, downtime_micros)),
            Err(error) => {
                // Its answer may be lost or late.
                match parts_report(self.worker).await {
                    Ok(report) if report.nodes.contains_key(&new) => return Ok((new, 0)),
                    Ok(_) => drop(join_on(spanning, node, ends(None), kind).await),
                    // No part has been told of it: if it does not join, it ends by itself.
                    Err(_) => {}
                }
                Err(error)
            }
        }
    }

    /// Connects all parts to the new one, the home last.
    async fn meet(
        &self,
        new: PartId,
        node: &NodeName,
        has: &BTreeMap<PartId, NodeName>,
        place: &PartAddress,
        (ends, kind): (&impl Fn(Option<Join>) -> PartJoin, WorkerKind),
    ) -> Result<u64, CommandError> {
        let spanning = self.spanning;
        let mut places = BTreeMap::from([(new, place.clone())]);
        for (me, at) in has {
            let meet = ConnectNewPart {
                machine: self.machine.clone(),
                me: *me,
                new,
                address: spanning.context.worker_address(),
            };
            let kinds = (messages::CONNECT_NEW_PART, kind::CONNECT_NEW_PART);
            let place = self
                .ask_part(*me, at, kinds, &meet, COMPILE_PATIENCE)
                .await?;
            places.insert(*me, place);
        }
        let join = Join {
            epoch: self.epoch,
            places,
        };
        let known = async {
            let mut downtime_micros = 0;
            // The home is the first by number, and the last to be informed.
            for (me, at) in has.iter().rev() {
                if *me == PartId::HOME {
                    let passed = failpoint::pass_async("parts.known").await;
                    passed.map_err(|injected| CommandError::Conflict(injected.to_string()))?;
                }
                let new = AddPart {
                    machine: self.machine.clone(),
                    me: *me,
                    new,
                    join: join.clone(),
                    node: node.clone(),
                };
                let kinds = (messages::ADD_PART, kind::ADD_PART);
                downtime_micros = self.ask_part(*me, at, kinds, &new, SPAN_PATIENCE).await?;
            }
            Ok::<u64, CommandError>(downtime_micros)
        };
        let joined = join_on(spanning, node, ends(Some(join.clone())), kind);
        // The side with the cause fails first; the other one then waits in vain.
        match select(pin!(joined), pin!(known)).await {
            Either::Right((known, _)) => known,
            Either::Left((joined, known)) => known.await.map_err(|error| match joined {
                Ok(()) => error,
                Err(why) => CommandError::Conflict(format!("no part on {node}: {why}")),
            }),
        }
    }

    /// Asks a part: the home, or a member on its node.
    async fn ask_part<A: DeserializeOwned>(
        &self,
        part: PartId,
        node: &NodeName,
        (node_kind, worker_kind): (u16, u16),
        question: &impl Serialize,
        patience: Duration,
    ) -> Result<A, CommandError> {
        let why = |why| CommandError::Conflict(format!("the part on {node}: {why}"));
        if part == PartId::HOME {
            let answer = self.worker.ask(worker_kind, question, patience).await;
            return answer.map_err(|error| why(text(error)));
        }
        if *node == self.spanning.context.name {
            let answer =
                ask_member(self.spanning, self.machine, worker_kind, question, patience).await;
            return answer.map_err(why);
        }
        let bytes = |error: &dyn std::fmt::Display| why(error.to_string());
        let payload = pack(question).map_err(|error| bytes(&error))?;
        let peers = &self.spanning.context.peers;
        let answer = peers.call(node, node_kind, payload, patience).await;
        let answer = answer.map_err(|error| why(text(error)))?;
        unpack(&answer).map_err(|error| bytes(&error))
    }

    /// Removes a part; returns the downtime in microseconds.
    async fn part_with(&self, part: PartId, threads_to: PartId) -> Result<u64, CommandError> {
        let with = RemovePart { part, threads_to };
        let answer = self
            .worker
            .ask(kind::REMOVE_PART, &with, UNSPAN_PATIENCE)
            .await;
        answer.map_err(|error| CommandError::Conflict(text(error)))
    }
}
