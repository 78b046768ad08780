//! A member's node: makes the worker of a part, connects it to the other parts, and cleans up at
//! its end.

use super::handle::{ROOM_BYTES_MIN, SPAN_PATIENCE, Spanning, text};
use super::messages::{PartJoin, PartOffer, ReadyMember};
use crate::host::check_features;
use crate::processes::{COMPILE_PATIENCE, Leftovers, OLDER, PROMPT, WorkerHandle};
use crate::records;
use keel_cluster::{MachineName, NodeName};
use keel_kind_wasm::control::{ConnectParts, PrepareMember, kind};
use keel_kind_wasm::span::PartId;
use keel_machine::worker::control::State;
use keel_net::RpcError;
use std::sync::Arc;
use std::time::Duration;

/// Interval for polling the end of a member's process.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Memory that this node has room for, if that is less than the machine's limit.
async fn room_for_part(spanning: &Spanning, offer: &PartOffer) -> Result<Option<u64>, String> {
    let room = records::free_bytes_for(&spanning.context, &offer.machine).await?;
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
    spanning: &Spanning,
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
            address: spanning.context.worker_address(),
        },
    }
}

/// Starts a member's worker.
pub(crate) async fn ready(
    spanning: &Arc<Spanning>,
    owner: &NodeName,
    offer: PartOffer,
) -> Result<ReadyMember, String> {
    check_features(&offer.features)?;
    let room_bytes = room_for_part(spanning, &offer).await?;
    let program = spanning.images.find_program(owner, &offer.program).await?;
    let name = format!("part-{:016x}", rand::random::<u64>());
    let name = MachineName::new(&name).map_err(|error| error.to_string())?;
    let dir = spanning.context.dir.of_parts();
    let started = spanning
        .processes
        .members
        .start(&dir, &name, &offer.spec.kind, Leftovers::Remove)
        .await;
    let worker = match started {
        Ok(worker) => worker,
        Err(error) => {
            spanning.processes.members.forget(&dir, &name).await;
            return Err(error);
        }
    };
    let ready = ready_part(spanning, offer, program, room_bytes);
    match worker
        .ask(kind::PREPARE_MEMBER, &ready, COMPILE_PATIENCE)
        .await
    {
        Ok(place) => {
            clear_at_end(spanning, &name, worker);
            Ok(ReadyMember {
                worker: name,
                place,
            })
        }
        Err(error) => {
            spanning.processes.members.forget(&dir, &name).await;
            Err(text(error))
        }
    }
}

/// Prepares the worker of an arriving machine to become a part of it first.
pub(crate) async fn ready_arriving(
    spanning: &Arc<Spanning>,
    owner: &NodeName,
    offer: PartOffer,
) -> Result<ReadyMember, String> {
    check_features(&offer.features)?;
    let room_bytes = room_for_part(spanning, &offer).await?;
    let worker = arriving(spanning, &offer.machine).await?;
    let program = spanning.images.find_program(owner, &offer.program).await?;
    let name = offer.machine.clone();
    let ready = ready_part(spanning, offer, program, room_bytes);
    let place = worker
        .ask(kind::PREPARE_MEMBER, &ready, COMPILE_PATIENCE)
        .await;
    Ok(ReadyMember {
        worker: name,
        place: place.map_err(text)?,
    })
}

/// Connects that worker to the other parts. If the migration is cancelled it waits for its source
/// again.
pub(crate) async fn join_arriving(
    spanning: &Arc<Spanning>,
    request: PartJoin,
) -> Result<(), String> {
    let Some(join) = &request.join else {
        return Ok(());
    };
    let worker = arriving(spanning, &request.worker).await?;
    let joined: Result<(), RpcError> = worker.ask(kind::JOIN, join, SPAN_PATIENCE).await;
    joined.map_err(text)?;
    mark(spanning, &request.worker, &worker);
    Ok(())
}

async fn arriving(spanning: &Spanning, machine: &MachineName) -> Result<WorkerHandle, String> {
    let none = || format!("machine {machine:?} does not arrive here");
    let worker = spanning.processes.machines.get(machine).ok_or_else(none)?;
    match worker.state().await {
        Ok(State::Receiving { .. }) => Ok(worker),
        Ok(_) => Err(none()),
        Err(error) => Err(text(error)),
    }
}

/// The part number of an arriving worker, if it has one.
///
/// # Errors
/// If the worker does not answer.
pub(crate) async fn part_of(worker: &WorkerHandle) -> Result<Option<PartId>, String> {
    match worker.ask(kind::IS_PART, &(), PROMPT).await.map_err(text) {
        // A worker of an older version has none.
        Err(why) if why == OLDER => Ok(None),
        answer => answer,
    }
}

/// As [`part_of`], for the worker of an arriving machine here.
pub(crate) async fn arrived_part(
    spanning: &Spanning,
    machine: &MachineName,
) -> Result<Option<PartId>, String> {
    match spanning.processes.machines.get(machine) {
        Some(worker) => part_of(&worker).await,
        None => Ok(None),
    }
}

/// Connects a member to the other parts, or ends it.
pub(crate) async fn join(spanning: &Arc<Spanning>, request: PartJoin) -> Result<(), String> {
    let dir = spanning.context.dir.of_parts();
    let Some(join) = &request.join else {
        spanning
            .processes
            .members
            .forget(&dir, &request.worker)
            .await;
        return Ok(());
    };
    let worker = spanning.processes.members.get(&request.worker);
    let worker = worker.ok_or("it has ended, or the agent of its node was restarted")?;
    match worker.ask(kind::JOIN, join, SPAN_PATIENCE).await {
        Ok(()) => Ok(()),
        Err(error) => {
            spanning
                .processes
                .members
                .forget(&dir, &request.worker)
                .await;
            Err(text(error))
        }
    }
}

/// Removes the remains of a member after the end of its process.
fn clear_at_end(spanning: &Arc<Spanning>, name: &MachineName, worker: WorkerHandle) {
    let (spanning, name) = (spanning.clone(), name.clone());
    tokio::spawn(async move {
        while !worker.gone_within(LOOK_AGAIN).await {}
        spanning
            .processes
            .members
            .forget(&spanning.context.dir.of_parts(), &name)
            .await;
    });
}

/// Records for the balancer that a machine spans, until its worker ends.
pub(super) fn mark(spanning: &Arc<Spanning>, machine: &MachineName, worker: &WorkerHandle) {
    if !spanning.marked().insert(machine.clone()) {
        return;
    }
    let (spanning, machine, worker) = (spanning.clone(), machine.clone(), worker.clone());
    tokio::spawn(async move {
        while !worker.gone_within(LOOK_AGAIN).await {}
        spanning.marked().remove(&machine);
    });
}

/// Finds the members that an earlier agent of this node made, and the spanning machines.
pub(crate) async fn adopt(spanning: &Arc<Spanning>) {
    for machine in spanning.processes.machines.names() {
        let Some(worker) = spanning.processes.machines.get(&machine) else {
            continue;
        };
        if matches!(worker.report().await, Ok(report) if report.parts > 0) {
            mark(spanning, &machine, &worker);
        }
    }
    let dir = spanning.context.dir.of_parts();
    spanning.processes.members.adopt(&dir).await;
    for name in spanning.processes.members.names() {
        if let Some(worker) = spanning.processes.members.get(&name) {
            clear_at_end(spanning, &name, worker);
        }
    }
}
