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
use crate::records::{self, Placements, RecordError};
use keel_cluster::{Epoch, MachineName};
use keel_machine::moves::ownership::{self, ResumeDecision};
use keel_machine::worker::control::{LeaseDeadline, State, kind};
use keel_net::RpcError;
use keel_store::LeaseId;
use keel_store::clock::boottime;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A deadline is not sent when less is left: the machine would be held at once.
const LEFT_MIN: Duration = Duration::from_millis(400);
/// How long a worker may take: the next deadline follows soon.
const EXTEND_PATIENCE: Duration = Duration::from_millis(300);

/// Tells workers of deadlines.
pub(crate) struct LeaseExtension {
    pub(super) context: Arc<Context>,
    pub(super) processes: Arc<Processes>,
    placements: Arc<Placements>,
    /// The leases under which machines are known to be this node's, by worker.
    known: Mutex<HashMap<u64, LeaseId>>,
}

impl LeaseExtension {
    pub(crate) fn new(
        context: Arc<Context>,
        processes: Arc<Processes>,
        placements: Arc<Placements>,
    ) -> Self {
        Self {
            context,
            processes,
            placements,
            known: Mutex::default(),
        }
    }

    /// Sends deadlines until the agent ends.
    pub(crate) async fn follow(self: Arc<Self>) {
        let mut terms = self.context.lease_term.clone();
        while terms.changed().await.is_ok() {
            let Some(term) = *terms.borrow_and_update() else {
                continue;
            };
            let workers = self.highly_available();
            let present: Vec<u64> = workers.iter().map(|(_, worker)| worker.id()).collect();
            for (machine, worker) in workers {
                let extension = self.clone();
                tokio::spawn(async move {
                    if let Err(reason) = extension.extend(&machine, &worker, term).await {
                        tracing::debug!(%machine, reason, "its worker does not get the lease");
                    }
                });
            }
            self.known().retain(|worker, _| present.contains(worker));
        }
    }

    /// Sends one deadline to all workers that are known to be this node's under the lease. Returns
    /// the machines whose workers have it.
    pub(super) async fn extend_known(&self, term: LeaseTerm) -> Vec<MachineName> {
        let known = self.known().clone();
        let workers = self.highly_available().into_iter();
        let workers = workers.filter(|(_, worker)| known.get(&worker.id()) == Some(&term.lease));
        let told = workers.map(async |(machine, worker)| {
            let sent = send(&worker, term).await;
            if let Err(reason) = &sent {
                tracing::warn!(%machine, reason, "its worker does not get the longer lease");
            }
            sent.ok().map(|()| machine)
        });
        let told = futures::future::join_all(told).await;
        told.into_iter().flatten().collect()
    }

    /// Sends a deadline of the present lease to all workers, also to those that relied on another
    /// one. Whether none is left that may have a later one.
    pub(super) async fn extend_all(&self) -> bool {
        let names = self.processes.machines.names().into_iter();
        let workers = names.filter_map(|name| {
            let worker = self.processes.machines.get(&name)?;
            Some((name, worker))
        });
        let told = workers.map(async |(machine, worker)| {
            match self.extend_if_owner(&machine, &worker).await {
                Ok(()) => true,
                Err(reason) => {
                    let is_free = needs_no_lease(&self.context, &machine, &worker).await;
                    if !is_free {
                        tracing::debug!(%machine, reason, "its worker may rely on the hold");
                    }
                    is_free
                }
            }
        });
        futures::future::join_all(told)
            .await
            .into_iter()
            .all(|it| it)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<u64, LeaseId>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn highly_available(&self) -> Vec<(MachineName, WorkerHandle)> {
        let machines = self.placements.highly_available().into_iter();
        machines
            .filter_map(|(machine, _)| {
                let worker = self.processes.machines.get(&machine)?;
                Some((machine, worker))
            })
            .collect()
    }

    async fn extend(
        &self,
        machine: &MachineName,
        worker: &WorkerHandle,
        term: LeaseTerm,
    ) -> Result<(), String> {
        let known = self.known().get(&worker.id()).copied();
        match known == Some(term.lease) {
            true => send(worker, term).await,
            false => self.extend_if_owner(machine, worker).await,
        }
    }

    /// Sends a deadline to a worker if the store says that its machine is this node's, or may
    /// become it.
    async fn extend_if_owner(
        &self,
        machine: &MachineName,
        worker: &WorkerHandle,
    ) -> Result<(), String> {
        // Before the store is read.
        let term = *self.context.lease_term.borrow();
        let term = term.ok_or("this node has no lease")?;
        match worker.state().await.map_err(|error| error.to_string())? {
            State::Running { epoch } | State::Filling { epoch, .. } | State::Held { epoch } => {
                check_owner(&self.context, machine, epoch).await?;
            }
            State::Receiving { offered } | State::Prepared { offered, .. } => {
                let context = &self.context;
                let found = records::get(&*context.store, machine).await;
                let record = found.map_err(|error| error.to_string())?.record;
                if ownership::may_resume(&context.name, offered, Some(&record))
                    == ResumeDecision::Drop
                {
                    return Err(format!("its move under epoch {offered} is over"));
                }
            }
            // Who starts it sends the first deadline.
            State::Empty => return Err("it is being started".into()),
            State::Ended { .. } | State::Dropped { .. } => return Err("it has ended".into()),
        }
        // The answers may have taken long. Under the same lease the newest deadline is as good.
        let newest = *self.context.lease_term.borrow();
        let term = newest.filter(|it| it.lease == term.lease).unwrap_or(term);
        if term.deadline < boottime() + LEFT_MIN {
            return Err("the lease ends before its worker can be told".into());
        }
        send(worker, term).await?;
        self.known().insert(worker.id(), term.lease);
        Ok(())
    }
}

/// Whether a worker runs nothing that a lease guards, and will not before its agent orders it.
async fn needs_no_lease(context: &Context, machine: &MachineName, worker: &WorkerHandle) -> bool {
    if worker.is_lost() {
        return true;
    }
    let record = match records::get(&*context.store, machine).await {
        Ok(found) => Some(found.record),
        Err(RecordError::NoMachine(_)) => None,
        Err(_) => return false,
    };
    if record
        .as_ref()
        .is_some_and(|record| record.spec.ha.is_none())
    {
        return true;
    }
    let Ok(report) = worker.report().await else {
        return false;
    };
    match report.state {
        State::Empty | State::Ended { .. } | State::Dropped { .. } => true,
        State::Receiving { offered } | State::Prepared { offered, .. } => {
            let decision = ownership::may_resume(&context.name, offered, record.as_ref());
            decision == ResumeDecision::Drop
        }
        // The frozen source of a move that was committed: it may still send memory.
        State::Running { .. } | State::Filling { .. } | State::Held { .. } => {
            report.moving_away && record.is_some_and(|record| record.owner != context.name)
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn deadline(term: LeaseTerm) -> LeaseDeadline {
    LeaseDeadline {
        at_micros: micros(term.deadline),
        sent_micros: micros(term.sent),
    }
}

async fn send(worker: &WorkerHandle, term: LeaseTerm) -> Result<(), String> {
    let told: Result<(), RpcError> = worker
        .ask(kind::LEASE, &deadline(term), EXTEND_PATIENCE)
        .await;
    told.map_err(|error| error.to_string())
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
    if let Err(reason) = send(worker, term).await {
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
    worker.ask(kind::LEASE, &deadline(term), PROMPT).await
}
