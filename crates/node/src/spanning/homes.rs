//! The home of a machine moves: who takes its place, and what a move that failed leaves.

use super::grains::parts_report;
use super::{UNSPAN_PATIENCE, ask, report, text};
use crate::agent::Agent;
use crate::changing::{Comes, Spanning};
use crate::events::Note;
use crate::operate::{self, OperateError, Operation};
use crate::service::kind as node_kind;
use crate::workers::{COMPILE_PATIENCE, OLDER, PROMPT, Worker};
use keel_api::{EventKind, SpanRequest};
use keel_cluster::{MachineName, NodeName};
use keel_machine::span::PartId;
use keel_machine::spec::Record;
use keel_machine::worker::control::{RemovePart, kind, pack, unpack};
use keel_net::Fingerprint;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Tries to let a machine have its parts where they were after a move, and the pause between two:
/// it may be arriving, or a part of its memory may still be to come.
const APART_TRIES: u32 = 60;
const APART_AGAIN: Duration = Duration::from_secs(1);

/// Where a machine's parts and threads were before its home moved.
#[derive(Debug, Clone)]
pub(crate) struct Apart {
    /// The node of each part, its home's first.
    nodes: Vec<NodeName>,
    /// Threads that were not at the home, and their nodes.
    threads: Vec<(u32, NodeName)>,
}

/// The part by which a machine's home moves.
pub(crate) struct Successor {
    /// Which.
    pub(crate) part: PartId,
    /// At which part the home's threads are meanwhile.
    pub(crate) threads_to: PartId,
    /// Where all was before.
    pub(crate) before: Apart,
}

/// Of a machine that spans: where it moves, its worker becomes one more part, to take the
/// home's place. `None` of one that is on one node.
pub(crate) async fn successor(
    agent: &Arc<Agent>,
    record: &Record,
    worker: &Worker,
    target: &NodeName,
) -> Result<Option<Successor>, OperateError> {
    let found = report(worker).await?;
    if found.parts == 0 {
        return Ok(None);
    }
    // (What others began of its parts is done first.)
    let _setting = agent.setting.lock().await;
    let report = parts_report(worker).await?;
    let members = report
        .nodes
        .iter()
        .filter(|(part, _)| **part != PartId::HOME);
    let threads = |part: PartId| report.threads.iter().filter(|it| it.part == part).count();
    // Best where they go in the end.
    let threads_to = members.min_by_key(|(part, node)| (*node != target, threads(**part)));
    let threads_to = threads_to.map(|(part, _)| *part);
    let threads_to =
        threads_to.ok_or_else(|| OperateError::Conflict("it has no other part".into()))?;
    let node = |part: &PartId| report.nodes.get(part).cloned();
    let away = report.threads.iter().filter(|it| it.part != PartId::HOME);
    let before = Apart {
        nodes: report.nodes.values().cloned().collect(),
        threads: away
            .filter_map(|thread| Some((thread.tid, node(&thread.part)?)))
            .collect(),
    };
    let program = found.program.map(Fingerprint);
    let spanning = Spanning {
        agent,
        machine: &record.name,
        spec: &record.spec,
        worker,
        program: program.ok_or_else(|| OperateError::Conflict("it has no module".into()))?,
        epoch: record.epoch,
    };
    // (Nothing of it may be kept while its home changes: a move comes first.)
    let _: () = ask(worker, kind::END_CHECKPOINT, &(), COMPILE_PATIENCE).await?;
    let (part, _) = spanning.add(target, Comes::Arriving).await?;
    Ok(Some(Successor {
        part,
        threads_to,
        before,
    }))
}

/// Parts with what was to be the home of a machine that stays here: also after an agent that
/// has died since. It needs nothing of them, and they would take part for ever.
pub(crate) async fn let_successors_go(agent: &Arc<Agent>, machine: &MachineName) {
    for _ in 0..APART_TRIES {
        match try_let_go(agent, machine).await {
            Ok(()) => return,
            Err(error) => tracing::debug!(%machine, %error, "it has a part too many"),
        }
        tokio::time::sleep(APART_AGAIN).await;
    }
}

async fn try_let_go(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), OperateError> {
    let Some(worker) = agent.workers.get(machine) else {
        return Ok(());
    };
    if agent.moves().contains_key(machine) {
        return Err(OperateError::Conflict("it is moving again".into()));
    }
    let nodes = parts_report(&worker).await?.nodes;
    let others: BTreeSet<&NodeName> = nodes.values().filter(|it| **it != agent.name).collect();
    for node in others {
        let payload = pack(machine).map_err(|error| OperateError::Away(error.to_string()))?;
        let peers = &agent.peers;
        let answer = peers.call(node, node_kind::ARRIVED_PART, payload, PROMPT);
        let part: Option<PartId> = match answer.await.map_err(text) {
            Ok(answer) => unpack(&answer).map_err(|error| OperateError::Away(error.to_string()))?,
            // (Then nothing of the kind is there.)
            Err(why) if why == OLDER => None,
            Err(why) => return Err(OperateError::Away(why)),
        };
        let Some(part) = part.filter(|part| nodes.get(part) == Some(node)) else {
            continue;
        };
        let _setting = agent.setting.lock().await;
        if agent.moves().contains_key(machine) {
            return Err(OperateError::Conflict("it is moving again".into()));
        }
        let with = RemovePart {
            part,
            threads_to: PartId::HOME,
        };
        let _: u64 = ask(&worker, kind::REMOVE_PART, &with, UNSPAN_PATIENCE).await?;
    }
    Ok(())
}

/// Lets a machine whose home moved, or was to, have parts where it had them, wherever its
/// home is now, in the background: it runs meanwhile, and where that cannot be it is said.
pub(crate) fn apart_again(agent: &Arc<Agent>, machine: &MachineName, before: Apart) {
    let (agent, machine) = (agent.clone(), machine.clone());
    tokio::spawn(async move {
        let mut last = String::new();
        for _ in 0..APART_TRIES {
            match try_apart(&agent, &machine, &before).await {
                Ok(()) => return,
                // It ended, or somebody else let it span.
                Err(OperateError::Missing(_)) => return,
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(APART_AGAIN).await;
        }
        let what = format!("its parts are not where they were before it moved: {last}");
        tracing::warn!(%machine, what, "spanning");
        agent
            .events
            .record(Note::machine(EventKind::MachineSpans, &machine, what));
    });
}

/// Threads go where they were.
async fn send_back(agent: &Arc<Agent>, machine: &MachineName, before: &Apart, nodes: &[String]) {
    for (tid, node) in &before.threads {
        if !nodes.iter().any(|it| *it == node.as_str()) {
            continue;
        }
        let thread = Operation::MoveThread {
            machine: machine.clone(),
            tid: *tid,
            to: node.to_string(),
        };
        // (One that has ended meanwhile.)
        if let Err(error) = operate::anywhere(agent, thread).await {
            tracing::debug!(%machine, tid, %error, "a thread stays at its home");
        }
    }
}

async fn try_apart(
    agent: &Arc<Agent>,
    machine: &MachineName,
    before: &Apart,
) -> Result<(), OperateError> {
    let record = crate::record::get(&*agent.store, machine).await?.record;
    if record.status.ended() {
        return Err(OperateError::Missing("it has ended".into()));
    }
    // A home that went where no part was takes its old home's place.
    let stays = before.nodes.contains(&record.owner);
    let nodes = before.nodes.iter().skip(usize::from(!stays));
    let mut wanted = Vec::new();
    for node in nodes {
        if crate::balancer::forbidden(agent, machine, node)
            .await
            .is_none()
        {
            wanted.push(node.to_string());
        }
    }
    if wanted.iter().all(|node| *node == record.owner.as_str()) {
        return Err(OperateError::Missing("no part may be anywhere else".into()));
    }
    let span = Operation::Span {
        machine: machine.clone(),
        request: SpanRequest {
            nodes: wanted.clone(),
            here: false,
        },
    };
    operate::anywhere(agent, span).await?;
    send_back(agent, machine, before, &wanted).await;
    Ok(())
}
