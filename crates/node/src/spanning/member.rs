//! A member's node: the worker that is a part is made there, meets the others, and ends.

use super::homes::let_successors_go;
use super::{PartJoin, PartOffer, ROOM_BYTES_MIN, ReadyMember, SPAN_PATIENCE, text};
use crate::agent::Agent;
use crate::workers::{COMPILE_PATIENCE, Leftovers, OLDER, PROMPT, Worker};
use keel_cluster::{MachineName, NodeName};
use keel_machine::span::PartId;
use keel_machine::worker::control::{ConnectParts, PrepareMember, State, kind};
use keel_net::RpcError;
use std::sync::Arc;
use std::time::Duration;

/// How long a member's process is waited for at a time.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Whether this node's CPU has what a machine needs.
pub(crate) fn has_features(needed: &[String]) -> Result<(), String> {
    let here = crate::agent::cpu_features();
    let missing = needed.iter().filter(|it| !here.contains(it));
    let missing: Vec<&str> = missing.map(String::as_str).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("this node's CPU lacks {}", missing.join(", "))),
    }
}

/// What this node has room for, if that is less than the machine may have.
async fn room_for_part(agent: &Agent, offer: &PartOffer) -> Result<Option<u64>, String> {
    let room = crate::offer::room_bytes(agent, &offer.machine).await?;
    let room = room / u64::from(offer.sharing.max(1));
    match room < ROOM_BYTES_MIN {
        true => Err(format!(
            "it has room for {} MiB of memory, and a part begins with {} MiB",
            room >> 20,
            ROOM_BYTES_MIN >> 20
        )),
        false => Ok((room < offer.spec.memory_bytes).then_some(room)),
    }
}

fn ready_part(
    agent: &Agent,
    offer: PartOffer,
    program: std::path::PathBuf,
    room_bytes: Option<u64>,
) -> PrepareMember {
    PrepareMember {
        machine: offer.machine,
        room_bytes,
        spec: offer.spec,
        program,
        me: offer.me,
        meet: ConnectParts {
            parts: offer.parts,
            address: agent.settings.listen.ip().to_string(),
        },
    }
}

/// Makes a member's worker.
pub(crate) async fn ready(
    agent: &Arc<Agent>,
    owner: &NodeName,
    offer: PartOffer,
) -> Result<ReadyMember, String> {
    has_features(&offer.features)?;
    let room_bytes = room_for_part(agent, &offer).await?;
    let program = crate::service::find_program(agent, owner, &offer.program).await?;
    let name = format!("part-{:016x}", rand::random::<u64>());
    let name = MachineName::new(&name).map_err(|error| error.to_string())?;
    let dir = agent.dir.of_parts();
    let started = agent.parts.start(&dir, &name, Leftovers::Remove).await;
    let worker = match started {
        Ok(worker) => worker,
        Err(error) => {
            agent.parts.forget(&dir, &name).await;
            return Err(error);
        }
    };
    let ready = ready_part(agent, offer, program, room_bytes);
    match worker
        .ask(kind::PREPARE_MEMBER, &ready, COMPILE_PATIENCE)
        .await
    {
        Ok(place) => {
            clear_at_end(agent, &name, worker);
            Ok(ReadyMember {
                worker: name,
                place,
            })
        }
        Err(error) => {
            agent.parts.forget(&dir, &name).await;
            Err(text(error))
        }
    }
}

/// The worker here to which a machine moves is to be a part of it first.
pub(crate) async fn ready_arriving(
    agent: &Arc<Agent>,
    owner: &NodeName,
    offer: PartOffer,
) -> Result<ReadyMember, String> {
    has_features(&offer.features)?;
    let room_bytes = room_for_part(agent, &offer).await?;
    let worker = arriving(agent, &offer.machine).await?;
    let program = crate::service::find_program(agent, owner, &offer.program).await?;
    let name = offer.machine.clone();
    let ready = ready_part(agent, offer, program, room_bytes);
    let place = worker
        .ask(kind::PREPARE_MEMBER, &ready, COMPILE_PATIENCE)
        .await;
    Ok(ReadyMember {
        worker: name,
        place: place.map_err(text)?,
    })
}

/// It meets the others; where that is not wanted any more it goes on waiting for its source.
pub(crate) async fn join_arriving(agent: &Arc<Agent>, request: PartJoin) -> Result<(), String> {
    let Some(join) = &request.join else {
        return Ok(());
    };
    let worker = arriving(agent, &request.worker).await?;
    let joined: Result<(), RpcError> = worker.ask(kind::JOIN, join, SPAN_PATIENCE).await;
    joined.map_err(text)?;
    mark(agent, &request.worker, &worker);
    Ok(())
}

async fn arriving(agent: &Agent, machine: &MachineName) -> Result<Worker, String> {
    let none = || format!("machine {machine:?} does not arrive here");
    let worker = agent.workers.get(machine).ok_or_else(none)?;
    match worker.state().await {
        Ok(State::Receiving { .. }) => Ok(worker),
        Ok(_) => Err(none()),
        Err(error) => Err(text(error)),
    }
}

/// The part of a machine that a worker is to which it moves, or was to move.
///
/// # Errors
/// Where that is not known.
pub(crate) async fn part_of(worker: &Worker) -> Result<Option<PartId>, String> {
    match worker.ask(kind::IS_PART, &(), PROMPT).await.map_err(text) {
        // (One of an older version is none.)
        Err(why) if why == OLDER => Ok(None),
        answer => answer,
    }
}

/// As [`part_of`], of the worker here to which a machine was to move.
pub(crate) async fn arrived_part(
    agent: &Agent,
    machine: &MachineName,
) -> Result<Option<PartId>, String> {
    match agent.workers.get(machine) {
        Some(worker) => part_of(&worker).await,
        None => Ok(None),
    }
}

/// A member meets the others, or ends.
pub(crate) async fn join(agent: &Arc<Agent>, request: PartJoin) -> Result<(), String> {
    let dir = agent.dir.of_parts();
    let Some(join) = &request.join else {
        agent.parts.forget(&dir, &request.worker).await;
        return Ok(());
    };
    let worker = agent.parts.get(&request.worker);
    let worker = worker.ok_or("it has ended, or its node's agent is another one")?;
    match worker.ask(kind::JOIN, join, SPAN_PATIENCE).await {
        Ok(()) => Ok(()),
        Err(error) => {
            agent.parts.forget(&dir, &request.worker).await;
            Err(text(error))
        }
    }
}

/// Removes what is left of a member when its process has ended.
fn clear_at_end(agent: &Arc<Agent>, name: &MachineName, worker: Worker) {
    let (agent, name) = (agent.clone(), name.clone());
    tokio::spawn(async move {
        while !worker.gone_within(LOOK_AGAIN).await {}
        agent.parts.forget(&agent.dir.of_parts(), &name).await;
    });
}

/// Notes for the balancer that a machine spans, until its worker has ended.
pub(super) fn mark(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker) {
    if !agent.spanning().insert(machine.clone()) {
        return;
    }
    let (agent, machine, worker) = (agent.clone(), machine.clone(), worker.clone());
    tokio::spawn(async move {
        while !worker.gone_within(LOOK_AGAIN).await {}
        agent.spanning().remove(&machine);
    });
}

/// A machine runs here: where it spans the balancer knows, and what moves of its home that
/// failed have left is let go.
pub(crate) async fn runs_here(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker) {
    if matches!(worker.report().await, Ok(report) if report.parts > 0) {
        mark(agent, machine, worker);
        let_successors_go(agent, machine).await;
    }
}

/// Finds the members that an earlier agent of this node made, and the machines that span.
pub(crate) async fn adopt(agent: &Arc<Agent>) {
    for machine in agent.workers.names() {
        let Some(worker) = agent.workers.get(&machine) else {
            continue;
        };
        if matches!(worker.report().await, Ok(report) if report.parts > 0) {
            mark(agent, &machine, &worker);
        }
    }
    let dir = agent.dir.of_parts();
    agent.parts.adopt(&dir).await;
    for name in agent.parts.names() {
        if let Some(worker) = agent.parts.get(&name) {
            clear_at_end(agent, &name, worker);
        }
    }
}
