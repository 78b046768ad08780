//! Tells the workers of machines with high availability until when this node's lease holds; they
//! hold their machines before that (`keel_machine::worker::Guard`).
//!
//! A deadline is sent only for a machine that is known to be this node's. Under an unbroken lease
//! that need not be asked again: nobody restarts the machines of a node whose lease holds. Under
//! another lease than before (the node was cut off, or its agent was restarted) the store is read
//! first. The deadline that is sent afterwards is one of before the read, or of the same lease.

use super::handle::Processes;
use super::workers::{PROMPT, WorkerHandle};
use crate::context::Context;
use crate::lease::LeaseTerm;
use crate::records::{self, Placements};
use keel_cluster::{Epoch, MachineName};
use keel_machine::moves::ownership::{self, ResumeDecision};
use keel_machine::worker::control::{LeaseDeadline, State, kind};
use keel_net::RpcError;
use keel_store::LeaseId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a worker may take: the next deadline follows soon.
const EXTEND_PATIENCE: Duration = Duration::from_millis(300);

/// The leases under which machines are known to be this node's, by worker.
type Known = Arc<Mutex<HashMap<u64, LeaseId>>>;

/// Sends deadlines until the agent ends.
pub(crate) async fn extend_leases(
    context: Arc<Context>,
    processes: Arc<Processes>,
    placements: Arc<Placements>,
) {
    let mut terms = context.lease_term.clone();
    let known = Known::default();
    while terms.changed().await.is_ok() {
        let Some(term) = *terms.borrow_and_update() else {
            continue;
        };
        let mut present = Vec::new();
        for (machine, _) in placements.highly_available() {
            let Some(worker) = processes.machines.get(&machine) else {
                continue;
            };
            present.push(worker.id());
            let is_known = known_lease(&known, &worker) == Some(term.lease);
            let (context, known) = (context.clone(), known.clone());
            tokio::spawn(async move {
                let sent = match is_known {
                    true => send(&worker, term.deadline).await,
                    false => match extend_if_owner(&context, &machine, &worker).await {
                        Ok(lease) => {
                            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
                            known.insert(worker.id(), lease);
                            Ok(())
                        }
                        Err(reason) => Err(reason),
                    },
                };
                if let Err(reason) = sent {
                    tracing::debug!(%machine, reason, "its worker does not get the lease");
                }
            });
        }
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|worker, _| present.contains(worker));
    }
}

fn known_lease(known: &Known, worker: &WorkerHandle) -> Option<LeaseId> {
    let known = known.lock().unwrap_or_else(PoisonError::into_inner);
    known.get(&worker.id()).copied()
}

fn deadline(at: Duration) -> LeaseDeadline {
    LeaseDeadline {
        at_micros: u64::try_from(at.as_micros()).unwrap_or(u64::MAX),
    }
}

async fn send(worker: &WorkerHandle, deadline: Duration) -> Result<(), String> {
    let told: Result<(), RpcError> = worker
        .ask(kind::LEASE, &self::deadline(deadline), EXTEND_PATIENCE)
        .await;
    told.map_err(|error| error.to_string())
}

/// Sends a deadline to a worker if the store says that its machine is this node's, or may become
/// it. Returns the lease under which that was so.
async fn extend_if_owner(
    context: &Context,
    machine: &MachineName,
    worker: &WorkerHandle,
) -> Result<LeaseId, String> {
    // Before the store is read.
    let term = *context.lease_term.borrow();
    let term = term.ok_or("this node has no lease")?;
    match worker.state().await.map_err(|error| error.to_string())? {
        State::Running { epoch } | State::Filling { epoch, .. } | State::Held { epoch } => {
            check_owner(context, machine, epoch).await?;
        }
        State::Receiving { offered } | State::Prepared { offered, .. } => {
            let found = records::get(&*context.store, machine).await;
            let record = found.map_err(|error| error.to_string())?.record;
            if ownership::may_resume(&context.name, offered, Some(&record)) == ResumeDecision::Drop
            {
                return Err(format!("its move under epoch {offered} is over"));
            }
        }
        // Who starts it sends the first deadline.
        State::Empty => return Err("it is being started".into()),
        State::Ended { .. } | State::Dropped { .. } => return Err("it has ended".into()),
    }
    send(worker, term.deadline).await?;
    Ok(term.lease)
}

async fn check_owner(context: &Context, machine: &MachineName, epoch: Epoch) -> Result<(), String> {
    let found = records::get(&*context.store, machine).await;
    let record = found.map_err(|error| error.to_string())?.record;
    let is_here = record.owner == context.name && record.epoch == epoch && !record.status.ended();
    match is_here {
        true => Ok(()),
        false => Err(format!(
            "the machine is {}'s under epoch {}, not this node's under {epoch}",
            record.owner, record.epoch
        )),
    }
}

/// Sends a deadline to a new worker, before its machine starts here under `epoch`. Without one the
/// machine would be held at first.
///
/// # Errors
/// If the machine is another node's by now: it must not be started.
pub(crate) async fn extend_new(
    context: &Context,
    machine: &MachineName,
    worker: &WorkerHandle,
    epoch: Epoch,
) -> Result<(), String> {
    // Before the store is read.
    let term = *context.lease_term.borrow();
    check_owner(context, machine, epoch).await?;
    let Some(term) = term else {
        // It is held until the node has a lease.
        return Ok(());
    };
    if let Err(reason) = send(worker, term.deadline).await {
        tracing::debug!(%machine, reason, "its worker gets the lease later");
    }
    Ok(())
}

/// Checks that a worker whose machine is this node's understands deadlines, by sending one.
/// `term` is one of before the machine's record was read.
///
/// # Errors
/// The worker's: one of an older version knows no such request.
pub(crate) async fn prove_guard(
    worker: &WorkerHandle,
    term: Option<LeaseTerm>,
) -> Result<(), RpcError> {
    let term = term.ok_or_else(|| RpcError::failed("this node has no lease"))?;
    worker
        .ask(kind::LEASE, &deadline(term.deadline), PROMPT)
        .await
}
