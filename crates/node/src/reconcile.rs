//! Makes what runs here equal to this node's schedule, and writes into the
//! store what became of machines.
//!
//! The schedule in the store is the truth. An entry without a worker is
//! started, if its machine was never started; a machine whose worker is lost is
//! reported as failed. A worker whose entry is gone is ended, unless a move or
//! an arrival is under way, whose own protocol decides.

use crate::agent::Agent;
use crate::record::{self, RecordError};
use crate::workers::{COMPILE_PATIENCE, Worker};
use keel_cluster::keys::{self, Key};
use keel_cluster::{MachineName, StoreError};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{Start, State, kind, unpack};
use keel_net::RpcError;
use std::sync::Arc;
use std::time::Duration;

/// Pause after the store did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Follows this node's schedule for ever.
pub(crate) async fn follow_schedule(agent: Arc<Agent>) {
    loop {
        if let Err(error) = follow_once(&agent).await {
            tracing::warn!(%error, "the schedule cannot be followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(agent: &Arc<Agent>) -> Result<(), StoreError> {
    let prefix = keys::schedule_of(&agent.name);
    let listing = agent.store.list(&prefix).await?;
    let mut scheduled = Vec::new();
    for entry in &listing.entries {
        if let Ok(Key::Schedule(_, machine)) = entry.key.parse() {
            scheduled.push(machine);
        }
    }
    for machine in agent.workers.names() {
        if !scheduled.contains(&machine) {
            settle_unscheduled(agent, &machine).await;
        }
    }
    for machine in scheduled {
        spawn_ensure(agent, machine);
    }
    let mut watch = agent.store.watch(&prefix, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            let Ok(Key::Schedule(_, machine)) = change.key().parse() else {
                continue;
            };
            match change {
                keel_cluster::store::Change::Put(_) => spawn_ensure(agent, machine),
                keel_cluster::store::Change::Delete { .. } => {
                    let agent = agent.clone();
                    tokio::spawn(async move { settle_unscheduled(&agent, &machine).await });
                }
            }
        }
    }
    Ok(())
}

fn spawn_ensure(agent: &Arc<Agent>, machine: MachineName) {
    let agent = agent.clone();
    tokio::spawn(async move {
        if let Err(error) = ensure(&agent, &machine).await {
            tracing::error!(%machine, %error, "a scheduled machine does not run");
        }
    });
}

/// Makes a scheduled machine run, or says in the store why it does not.
async fn ensure(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), RecordError> {
    if let Some(worker) = agent.workers.get(machine) {
        // It arrived, and the commit won: the source may not live to say so.
        let found = record::get(&*agent.store, machine).await?;
        if let Ok(State::Prepared { offered, .. }) = worker.state().await
            && found.record.owner == agent.name
            && found.record.epoch > offered
        {
            let go: Result<u64, RpcError> = worker
                .ask(kind::GO, &found.record.epoch, crate::workers::PROMPT)
                .await;
            if let Err(error) = go {
                tracing::info!(%machine, %error, "it was told to go on by its source first");
            }
        }
        return Ok(());
    }
    if !agent.busy().insert(machine.clone()) {
        return Ok(());
    }
    let result = start_scheduled(agent, machine).await;
    agent.busy().remove(machine);
    result
}

async fn start_scheduled(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), RecordError> {
    let found = record::get(&*agent.store, machine).await?;
    if found.record.owner != agent.name {
        return Ok(());
    }
    let failure = match found.record.status {
        Status::Scheduled => match start(agent, &found.record).await {
            Ok(()) => {
                let running = |record: &mut Record| {
                    let scheduled = record.status == Status::Scheduled;
                    record.status = Status::Running;
                    scheduled
                };
                record::update(&*agent.store, machine, running, |txn, _| txn).await?;
                watch_worker(agent, machine);
                return Ok(());
            }
            Err(reason) => reason,
        },
        Status::Running => "its worker process was lost".to_owned(),
        _ => return Ok(()),
    };
    agent.workers.forget(&agent.dir, machine).await;
    finish(agent, machine, Status::Failed { reason: failure }).await
}

async fn start(agent: &Arc<Agent>, record: &Record) -> Result<(), String> {
    let module = crate::service::find_module(agent, &record.spec.module).await?;
    let worker = agent.workers.start(&agent.dir, &record.name).await?;
    let start = Start {
        machine: record.name.clone(),
        spec: record.spec.clone(),
        module,
        epoch: record.epoch,
    };
    worker
        .ask(kind::START, &start, COMPILE_PATIENCE)
        .await
        .map_err(|error| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
            other => other.to_string(),
        })
}

/// Takes up a machine that an earlier agent was giving away when it died: the
/// machine may be frozen, and the commit may have been sent. A write of this
/// node's own, under a new epoch, makes that commit impossible; where it had won
/// already, the machine is not this node's any more.
pub(crate) async fn resume_after_move(agent: &Arc<Agent>, machine: &MachineName) {
    let Some(worker) = agent.workers.get(machine) else {
        return;
    };
    match worker.report().await {
        Ok(report) if report.giving_away => {}
        _ => return,
    }
    loop {
        let mut mine = false;
        let claim = |record: &mut Record| {
            mine = record.owner == agent.name && !record.status.ended();
            if mine {
                record.epoch = record.epoch.next();
            }
            mine
        };
        match record::update(&*agent.store, machine, claim, |txn, _| txn).await {
            Ok(record) if mine => {
                tracing::warn!(%machine, "a move was cut off by the agent's end; it goes on here");
                let thawed: Result<(), RpcError> = worker
                    .ask(kind::THAW, &record.epoch, crate::workers::PROMPT)
                    .await;
                if let Err(error) = thawed {
                    tracing::error!(%machine, %error, "it stays frozen");
                }
                return;
            }
            // The commit had won: the schedule says that it is not here.
            Ok(_) | Err(RecordError::NoMachine(_)) => return,
            Err(error) => {
                tracing::warn!(%machine, %error, "whose it is is not settled yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// A worker whose machine is not in this node's schedule.
async fn settle_unscheduled(agent: &Arc<Agent>, machine: &MachineName) {
    let Some(worker) = agent.workers.get(machine) else {
        return;
    };
    // What was seen may be long past: the machine may have come back since.
    let entry = Key::Schedule(agent.name.clone(), machine.clone()).to_string();
    match agent.store.get(&entry).await {
        Ok(None) => {}
        Ok(Some(_)) => return,
        Err(error) => {
            tracing::warn!(%machine, %error, "not known whether it is to run here");
            return;
        }
    }
    if agent.moves().contains_key(machine) || agent.busy().contains(machine) {
        return;
    }
    match worker.state().await {
        // Its end is on its way into the store.
        Ok(State::Ended { .. }) => {}
        Ok(State::Receiving { .. } | State::Prepared { .. }) => {
            crate::offer::settle(agent, machine).await;
        }
        _ => {
            tracing::warn!(%machine, "it is not in the schedule here any more, ending its worker");
            agent.workers.forget(&agent.dir, machine).await;
        }
    }
}

/// Follows a worker's state, and tells the store of its end.
pub(crate) fn watch_worker(agent: &Arc<Agent>, machine: &MachineName) {
    let (agent, machine) = (agent.clone(), machine.clone());
    tokio::spawn(async move {
        let Some(worker) = agent.workers.get(&machine) else {
            return;
        };
        let mut lost = "it does not answer".to_owned();
        if let Ok(mut states) = worker.stream(kind::STATES, &()).await {
            while let Some(item) = states.recv().await {
                let state: Result<State, _> = item.and_then(|bytes| unpack(&bytes));
                match state {
                    Ok(State::Ended { status, .. }) => {
                        ended(&agent, &machine, &worker, status).await;
                        return;
                    }
                    Ok(State::Dropped { reason }) => {
                        tracing::info!(%machine, reason, "an arriving machine was dropped");
                        crate::offer::settle(&agent, &machine).await;
                        return;
                    }
                    Ok(State::Prepared {
                        source_lost: true, ..
                    }) => crate::offer::settle(&agent, &machine).await,
                    Ok(_) => {}
                    Err(error) => {
                        lost = error.to_string();
                        break;
                    }
                }
            }
        }
        worker_lost(&agent, &machine, &worker, &lost).await;
    });
}

async fn ended(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker, status: Status) {
    crate::moving::machine_ended(agent, machine);
    let handle = agent.moves().get(machine).cloned();
    if let Some(handle) = handle {
        handle.over().await;
    }
    if let Err(error) = finish(agent, machine, status).await {
        tracing::error!(%machine, %error, "its end is not in the store");
    }
    // Its output stays in its folder; nobody needs the process any more.
    if agent.workers.remove_exactly(machine, worker) {
        worker.forget().await;
    }
}

async fn worker_lost(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker, reason: &str) {
    // A worker that was told to go away is not in the table any more.
    if !agent.workers.remove_exactly(machine, worker) {
        return;
    }
    tracing::warn!(%machine, reason, "its worker was lost");
    crate::moving::machine_ended(agent, machine);
    if !crate::offer::is_owner(agent, machine).await {
        // It was only arriving.
        crate::offer::drop_reservation(agent, machine).await;
        agent.workers.forget(&agent.dir, machine).await;
        return;
    }
    let status = Status::Failed {
        reason: format!("its worker process was lost ({reason})"),
    };
    if let Err(error) = finish(agent, machine, status).await {
        tracing::error!(%machine, %error, "its end is not in the store");
    }
}

/// Writes a machine's end, and takes it out of the schedule, until the store
/// has it; removes the machine if it was to be.
async fn finish(
    agent: &Arc<Agent>,
    machine: &MachineName,
    status: Status,
) -> Result<(), RecordError> {
    loop {
        let entry = Key::Schedule(agent.name.clone(), machine.clone()).to_string();
        let end = |record: &mut Record| {
            let mine = record.owner == agent.name && !record.status.ended();
            if mine {
                record.status = status.clone();
            }
            mine
        };
        let written = record::update(&*agent.store, machine, end, |txn, _| {
            txn.delete(entry.clone())
        })
        .await;
        match written {
            Ok(record) => {
                if record.spec.remove_at_end && record.status.ended() && record.owner == agent.name
                {
                    return crate::operate::remove_here(agent, machine).await;
                }
                return Ok(());
            }
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "its end is not in the store yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(RecordError::NoMachine(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
