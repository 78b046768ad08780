//! Makes what runs here equal to this node's schedule, and writes into the
//! store what became of machines.
//!
//! The schedule in the store is the truth. An entry without a worker is
//! started, if its machine was never started; a machine whose worker is lost is
//! reported as failed. A worker whose entry is gone is ended, unless a move or
//! an arrival is under way, whose own protocol decides.

use crate::agent::Agent;
use crate::record::{self, RecordError};
use crate::service::kind as node_kind;
use crate::workers::{COMPILE_PATIENCE, Worker};
use keel_cluster::keys::{self, Key};
use keel_cluster::{MachineName, NodeName, StoreError};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{Start, StartFrom, State, kind, pack, unpack};
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
        let found = record::get(&*agent.store, machine).await?;
        let record = &found.record;
        match worker.state().await {
            // It arrived, and the commit won: the source may not live to say so.
            Ok(State::Prepared { offered, .. })
                if record.owner == agent.name && record.epoch > offered =>
            {
                let go: Result<u64, RpcError> = worker
                    .ask(kind::GO, &record.epoch, crate::workers::PROMPT)
                    .await;
                if let Err(error) = go {
                    tracing::info!(%machine, %error, "it was told to go on by its source first");
                }
                return Ok(());
            }
            // An earlier agent died while it started the machine.
            Ok(State::Running { epoch })
                if record.status == Status::Scheduled && record.epoch == epoch =>
            {
                return is_running(agent, machine).await;
            }
            Ok(State::Empty)
                if record.status == Status::Scheduled && !agent.busy().contains(machine) =>
            {
                agent.workers.forget(&agent.dir, machine).await;
            }
            _ => return Ok(()),
        }
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
                // First: its end must be seen, whatever the store does.
                watch_worker(agent, machine);
                return is_running(agent, machine).await;
            }
            Err(reason) => reason,
        },
        Status::Running => "its worker process was lost".to_owned(),
        Status::Arriving { from } => return lost_on_arrival(agent, machine, &from).await,
        _ => return Ok(()),
    };
    agent.workers.forget(&agent.dir, machine).await;
    finish(agent, machine, Status::Failed { reason: failure }).await
}

/// Writes that a machine which was started here, or arrived here, runs, until
/// the store has it.
async fn is_running(agent: &Arc<Agent>, machine: &MachineName) -> Result<(), RecordError> {
    let running = |record: &mut Record| {
        let expected = matches!(record.status, Status::Scheduled | Status::Arriving { .. });
        let mine = expected && record.owner == agent.name;
        if mine {
            record.status = Status::Running;
        }
        mine
    };
    loop {
        match record::update(&*agent.store, machine, running, |txn, _| txn).await {
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "that it runs is not in the store yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Ok(_) | Err(RecordError::NoMachine(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// A machine whose move was committed, but whose worker here was lost before it
/// was known to go on. Its source has the frozen copy and takes it back. It is
/// lost only when the source has none any more (it was told that the machine
/// runs here, which then was true), or its node is gone too.
async fn lost_on_arrival(
    agent: &Arc<Agent>,
    machine: &MachineName,
    from: &NodeName,
) -> Result<(), RecordError> {
    loop {
        let waits = |record: &Record| {
            record.owner == agent.name && matches!(record.status, Status::Arriving { .. })
        };
        let still = match record::get(&*agent.store, machine).await {
            Ok(found) => waits(&found.record),
            Err(RecordError::NoMachine(_)) => return Ok(()),
            Err(error) => {
                tracing::warn!(%machine, %error, "not known yet who has it");
                true
            }
        };
        if !still {
            return Ok(());
        }
        let alive = record::alive(&*agent.store).await;
        let gone = alive.is_ok_and(|alive| !alive.contains(from));
        if gone || source_holds(agent, machine, from).await == Some(false) {
            let reason = format!(
                "its worker process was lost just after it arrived, and {from} has no copy any more"
            );
            return finish(agent, machine, Status::Failed { reason }).await;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// Whether a source has the frozen copy; `None` if it does not say.
async fn source_holds(
    agent: &Arc<Agent>,
    machine: &MachineName,
    source: &NodeName,
) -> Option<bool> {
    let payload = pack(machine).ok()?;
    let answer = agent
        .peers
        .call(source, node_kind::HELD, payload, crate::workers::PROMPT)
        .await
        .ok()?;
    unpack(&answer).ok()
}

async fn start(agent: &Arc<Agent>, record: &Record) -> Result<(), String> {
    let from = match &record.origin {
        Some(origin) => StartFrom::Checkpoint(origin.clone()),
        None => StartFrom::Module(crate::service::find_module(agent, &record.spec.module).await?),
    };
    let worker = agent.workers.start(&agent.dir, &record.name).await?;
    let start = Start {
        machine: record.name.clone(),
        spec: record.spec.clone(),
        from,
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
                match thawed {
                    Ok(()) => return,
                    // It ended, or its worker is lost: others see to that.
                    Err(error) if !worker.report().await.is_ok_and(|it| it.giving_away) => {
                        tracing::warn!(%machine, %error, "it does not go on");
                        return;
                    }
                    Err(error) => {
                        tracing::error!(%machine, %error, "it does not go on yet");
                        tokio::time::sleep(RETRY_AFTER).await;
                    }
                }
            }
            // The commit had won, and the target may not live to go on.
            Ok(record) if record.status == arriving_from(agent) => {
                crate::moving::take_up(agent, record, worker).await;
                return;
            }
            // It runs elsewhere, or ended: the frozen copy is of no use.
            Ok(_) | Err(RecordError::NoMachine(_)) => {
                agent.workers.forget(&agent.dir, machine).await;
                return;
            }
            Err(error) => {
                tracing::warn!(%machine, %error, "whose it is is not settled yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

fn arriving_from(agent: &Agent) -> Status {
    Status::Arriving {
        from: agent.name.clone(),
    }
}

/// A worker whose machine is not in this node's schedule.
async fn settle_unscheduled(agent: &Arc<Agent>, machine: &MachineName) {
    let Some(worker) = agent.workers.get(machine) else {
        return;
    };
    // In this order: what runs before its entry is looked for, and has none
    // then, is not to run.
    let report = worker.report().await;
    let giving_away = report.as_ref().is_ok_and(|report| report.giving_away);
    let state = report.map(|report| report.state);
    let entry = Key::Schedule(agent.name.clone(), machine.clone()).to_string();
    match agent.store.get(&entry).await {
        Ok(None) => {}
        Ok(Some(_)) => return,
        Err(error) => {
            tracing::warn!(%machine, %error, "not known whether it is to run here");
            return;
        }
    }
    // What gives its machine away is the move's, or is taken up after the death
    // of the agent that began the move.
    if giving_away || agent.moves().contains_key(machine) || agent.busy().contains(machine) {
        return;
    }
    if !agent
        .workers
        .get(machine)
        .is_some_and(|now| now.is(&worker))
    {
        return;
    }
    match state {
        // Its end is on its way into the store.
        Ok(State::Ended { .. }) => {}
        // What arrives has no entry yet. Its worker sees when the source is
        // lost.
        Ok(
            State::Receiving { .. }
            | State::Prepared {
                source_lost: false, ..
            },
        ) => {}
        Ok(State::Prepared { .. } | State::Dropped { .. }) => {
            crate::offer::settle(agent, machine).await;
        }
        // Whether it is lost is found out where it is watched.
        Err(error) => tracing::warn!(%machine, %error, "its worker does not answer"),
        Ok(State::Empty | State::Running { .. }) => {
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
                    Ok(State::Running { .. }) => {
                        if let Err(error) = is_running(&agent, &machine).await {
                            tracing::warn!(%machine, %error, "that it runs is not in the store");
                        }
                    }
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
    if !agent.workers.get(machine).is_some_and(|now| now.is(worker)) {
        return;
    }
    tracing::warn!(%machine, reason, "the connection to its worker was lost");
    if agent.workers.reconnect(&agent.dir, machine, worker).await {
        watch_worker(agent, machine);
        return;
    }
    // From here on it is certain that nothing of it runs here.
    crate::moving::machine_ended(agent, machine);
    let found = loop {
        match record::get(&*agent.store, machine).await {
            Ok(found) => break Some(found.record),
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "not known yet whose it is");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(_) => break None,
        }
    };
    // Another may have come meanwhile.
    if !agent.workers.get(machine).is_some_and(|now| now.is(worker)) {
        return;
    }
    match found {
        Some(record) if record.owner == agent.name => {
            // Its output stays.
            agent.workers.remove_exactly(machine, worker);
            if let Status::Arriving { from } = record.status {
                if let Err(error) = lost_on_arrival(agent, machine, &from).await {
                    tracing::error!(%machine, %error, "what became of it is not in the store");
                }
                return;
            }
        }
        _ => {
            // It was only arriving.
            agent.workers.forget(&agent.dir, machine).await;
            crate::offer::drop_reservation(agent, machine).await;
            return;
        }
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
