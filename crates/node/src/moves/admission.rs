//! Target of a move: checks an offer, fetches and compiles the module, reserves room, and starts a
//! worker that receives. A failure undoes every completed step.

use super::handle::Moves;
use super::offer::{Offer, passed};
use crate::host::cpu_features;
use crate::processes::{COMPILE_PATIENCE, Leftovers};
use crate::proof_file::Proof;
use crate::records::{Reservation, check_free_memory};
use crate::spanning::part_of;
use keel_cluster::{MachineName, NodeName};
use keel_machine::log::Log;
use keel_machine::spec::VolumeKind;
use keel_machine::worker::control::{MoveEndpoint, Receive, State, kind};
use keel_machine::worker::volume_folder;
use keel_net::RpcError;
use keel_store::keys::Key;
use keel_store::{Txn, TxnOutcome};
use std::sync::Arc;
use std::time::Duration;

/// How long an offer waits for this node's lease.
const LEASE_PATIENCE: Duration = Duration::from_secs(2);

/// Answers an offer. A failure undoes every completed step.
pub(crate) async fn accept(
    moves: &Arc<Moves>,
    source: NodeName,
    offer: Offer,
) -> Result<MoveEndpoint, String> {
    let traces = &moves.context.traces;
    let trace = traces.follow("arrive", offer.traceparent.as_deref());
    trace.set("keel.machine", offer.machine.to_string());
    let machine = offer.machine.clone();
    let accepted = {
        let _accept = trace.child("accept");
        accept_alone(moves, source, offer).await
    };
    match &accepted {
        Ok(_) => moves.trace_arrival(&machine, trace),
        Err(reason) => trace.fail(reason.as_str()),
    }
    accepted
}

/// The same, unless the machine is arriving already.
async fn accept_alone(
    moves: &Arc<Moves>,
    source: NodeName,
    offer: Offer,
) -> Result<MoveEndpoint, String> {
    let machine = offer.machine.clone();
    check(moves, &offer).await?;
    passed("offer.checked").await?;
    if !moves.processes.exclusion.busy().insert(machine.clone()) {
        return Err(format!("machine {machine:?} is arriving here already"));
    }
    let result = admit(moves, source, offer).await;
    if result.is_err() {
        drop_reservation(moves, &machine).await;
    }
    moves.processes.exclusion.busy().remove(&machine);
    result
}

/// Whether an offer would be accepted, by the checks that change nothing.
pub(crate) async fn would_accept(
    moves: &Moves,
    source: &NodeName,
    offer: &Offer,
) -> Result<(), String> {
    check(moves, offer).await?;
    let source = Some(source);
    check_free_memory(&moves.context, &offer.machine, &offer.memory_pages, source).await
}

async fn check(moves: &Moves, offer: &Offer) -> Result<(), String> {
    moves.context.kinds.check(&offer.spec)?;
    let here = cpu_features();
    let missing: Vec<&str> = offer
        .features
        .iter()
        .filter(|feature| !here.contains(feature))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        return Err(format!("this node's CPU lacks {}", missing.join(", ")));
    }
    let (kinds, spec) = (moves.context.kinds.clone(), offer.spec.clone());
    let (cache, post_copy) = (moves.context.dir.cache(), offer.post_copy);
    let looked = tokio::task::spawn_blocking(move || {
        let kind = kinds.of(&spec)?;
        if post_copy && let Some(missing) = kind.missing_for_post_copy() {
            return Err(format!(
                "memory cannot come after a machine here: {missing}"
            ));
        }
        kind.lacks_here(&spec, &cache).map_or(Ok(()), Err)
    });
    looked.await.map_err(|error| error.to_string())??;
    check_room(moves, offer.volume_bytes).await?;
    let (spec_volumes, proofs) = (offer.spec.volumes.clone(), offer.proofs.clone());
    tokio::task::spawn_blocking(move || {
        for (volume, proof) in spec_volumes.iter().zip(&proofs) {
            let VolumeKind::Host { path } = &volume.kind else {
                continue;
            };
            let folder = std::path::Path::new(path);
            if !folder.is_dir() {
                return Err(format!("volume {path} is no directory here"));
            }
            let Some(proof) = proof else {
                continue;
            };
            if !Proof::of(proof.clone()).is_in(folder) {
                return Err(format!(
                    "volume {path} is another directory here: every node must see the same one (NFS or the like)"
                ));
            }
        }
        Ok(())
    })
    .await
    .map_err(|error| error.to_string())?
}

/// Whether this node has room for the files that a machine brings along.
async fn check_room(moves: &Moves, bytes: u64) -> Result<(), String> {
    if bytes == 0 {
        return Ok(());
    }
    let workers = moves.context.dir.workers();
    let looked = tokio::task::spawn_blocking(move || {
        let free = volume_folder::free_bytes(&workers);
        let free = free.map_err(|error| format!("{}: {error}", workers.display()))?;
        match bytes > free {
            true => Err(volume_folder::no_room(bytes, free, &workers)),
            false => Ok(()),
        }
    });
    looked.await.map_err(|error| error.to_string())?
}

/// Holds the output of a machine back as its source does, if its spec says so.
async fn hold_output(moves: &Moves, offer: &Offer) -> Result<(), String> {
    let ha = offer.spec.ha.as_ref();
    if !ha.is_some_and(|ha| ha.protects_output()) {
        return Ok(());
    }
    let (folder, shown) = (moves.context.dir.worker(&offer.machine), offer.shown_output);
    let held = tokio::task::spawn_blocking(move || Log::hold_before(&folder, shown)).await;
    let held = held.map_err(|error| error.to_string())?;
    held.map_err(|error| format!("its output cannot be held back: {error}"))
}

async fn admit(moves: &Arc<Moves>, source: NodeName, offer: Offer) -> Result<MoveEndpoint, String> {
    let machine = &offer.machine;
    if let Some(worker) = moves.processes.machines.get(machine) {
        match worker.state().await {
            Ok(State::Ended { .. } | State::Dropped { .. } | State::Empty) | Err(_) => {
                moves
                    .processes
                    .machines
                    .forget(&moves.context.dir, machine)
                    .await;
            }
            Ok(_) if part_of(&worker).await?.is_some() => {
                return Err(format!(
                    "a part of machine {machine:?} is still here that an earlier move made; try again"
                ));
            }
            Ok(_) => return Err(format!("machine {machine:?} has a worker here already")),
        }
    }
    let program = match &offer.program {
        Some(program) => Some(moves.images.find_program(&source, program).await?),
        None => None,
    };
    let kind = moves.context.kinds.of(&offer.spec)?;
    if kind.abilities().keeps_images {
        for image in kind.images(&offer.spec)? {
            moves.images.find_image(&image).await?;
        }
    }
    passed("offer.fetched").await?;
    {
        // Serialised: two machines that each fit may not fit together.
        let _reserving = moves.reserving.lock().await;
        // Its images may have taken what there was.
        check_room(moves, offer.volume_bytes).await?;
        check_free_memory(&moves.context, machine, &offer.memory_pages, Some(&source)).await?;
        reserve(moves, &source, &offer).await?;
    }
    passed("offer.reserved").await?;
    let worker = match moves
        .processes
        .machines
        .start(
            &moves.context.dir,
            machine,
            &offer.spec.kind,
            Leftovers::Remove,
        )
        .await
    {
        Ok(worker) => worker,
        Err(error) => {
            moves
                .processes
                .machines
                .forget(&moves.context.dir, machine)
                .await;
            return Err(error);
        }
    };
    let started = async {
        hold_output(moves, &offer).await?;
        passed("offer.started").await
    };
    if let Err(reason) = started.await {
        moves
            .processes
            .machines
            .forget(&moves.context.dir, machine)
            .await;
        return Err(reason);
    }
    let request = Receive {
        machine: machine.clone(),
        spec: offer.spec.clone(),
        program,
        program_hash: offer.program.map(|hash| hash.0),
        offered: offer.epoch,
        source: offer.worker,
        address: moves.context.worker_address(),
        memory_pages: offer.memory_pages.clone(),
        post_copy: offer.post_copy,
        volume_bytes: offer.volume_bytes,
    };
    match worker.ask(kind::RECEIVE, &request, COMPILE_PATIENCE).await {
        Ok(receiving) => {
            moves.processes.announce_arrival(machine);
            if let Err(reason) = passed("offer.accepted").await {
                moves
                    .processes
                    .machines
                    .forget(&moves.context.dir, machine)
                    .await;
                return Err(reason);
            }
            Ok(receiving)
        }
        Err(error) => {
            moves
                .processes
                .machines
                .forget(&moves.context.dir, machine)
                .await;
            Err(match error {
                RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
                other => other.to_string(),
            })
        }
    }
}

/// Reserves room in the store. The commit compares the reservation, so that deleting it makes the
/// commit impossible.
async fn reserve(moves: &Arc<Moves>, source: &NodeName, offer: &Offer) -> Result<(), String> {
    // An agent that has just begun gets one in a moment.
    let mut lease = moves.context.lease.clone();
    let held = tokio::time::timeout(LEASE_PATIENCE, lease.wait_for(Option::is_some)).await;
    let lease = held.ok().and_then(|held| *held.ok()?);
    let lease = lease.ok_or("this node has no lease in the store at present; try again")?;
    let reservation = Reservation {
        source: source.clone(),
        bytes: offer.memory_pages.iter().sum::<u64>() << 16,
    };
    let value = keel_store::encoding::encode("a reservation", &reservation)
        .map_err(|error| error.to_string())?;
    let key = Key::Reservation(moves.context.name.clone(), offer.machine.clone());
    let txn = Txn::new()
        .when_modified_at(Key::Machine(offer.machine.clone()), offer.revision)
        .put_leased(key, value, lease);
    match moves.context.store.txn(txn).await {
        Ok(TxnOutcome::Committed { .. }) => Ok(()),
        Ok(TxnOutcome::Refused { .. }) => {
            Err("the machine changed meanwhile; try again".to_owned())
        }
        Err(error) => Err(format!("room cannot be reserved: {error}")),
    }
}

pub(crate) async fn drop_reservation(moves: &Arc<Moves>, machine: &MachineName) {
    let key = Key::Reservation(moves.context.name.clone(), machine.clone());
    if let Err(error) = moves.context.store.txn(Txn::new().delete(key)).await {
        // It ends with this node's lease at the latest.
        tracing::warn!(%machine, %error, "cannot delete the reservation; it ends with the lease");
    }
}
