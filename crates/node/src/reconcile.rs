//! Makes what runs here equal to this node's schedule, and writes into the
//! store what became of machines.
//!
//! The schedule in the store is the truth. An entry without a worker is
//! started, if its machine was never started; a machine whose worker is lost is
//! reported as failed, or started again where its restart policy says so. A worker whose entry is gone is ended, unless a move or
//! an arrival is under way, whose own protocol decides.

use crate::agent::Agent;
use crate::events::Note;
use crate::record::{self, RecordError};
use crate::service::kind as node_kind;
use crate::workers::{COMPILE_PATIENCE, Leftovers, Worker};
use keel_api::EventKind;
use keel_cluster::clock::unix_ms;
use keel_cluster::keys::{self, Key};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::checkpoint::{MemoryRestore, Origin};
use keel_machine::failpoint;
use keel_machine::moves::ownership::{self, ArrivalVerdict, EndEffect};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{Start, StartFrom, State, kind, pack, unpack};
use keel_machine::worker::volumes;
use keel_net::RpcError;
use std::sync::Arc;
use std::time::Duration;

/// Pause after the store did not answer.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Pause between looks at a machine that something else is done with.
const BUSY_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// How long a source without a lease may still come back with its copy.
const GONE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a machine that is removed at its end can still be asked about.
const REMOVE_AFTER: Duration = Duration::from_secs(3);
/// The longest that a restart is waited for, whatever the clock says.
const RESTART_WAIT_MAX: Duration = Duration::from_secs(60);

/// Removes a machine that is not wanted any more, a little later: whoever waits for
/// its end wants to know how it ended.
fn remove_later(agent: &Arc<Agent>, record: &Record) {
    let (agent, machine) = (agent.clone(), record.name.clone());
    let (created, epoch) = (record.created_unix_ms, record.epoch);
    tokio::spawn(async move {
        tokio::time::sleep(REMOVE_AFTER).await;
        loop {
            match record::get(&*agent.store, &machine).await {
                // Another of that name is not meant.
                Ok(found)
                    if found.record.created_unix_ms == created && found.record.epoch == epoch => {}
                Ok(_) | Err(RecordError::NoMachine(_)) => return,
                Err(_) => {
                    tokio::time::sleep(RETRY_AFTER).await;
                    continue;
                }
            }
            match crate::operate::remove_here(&agent, &machine).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%machine, %error, "it is not removed yet");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    });
}

/// Removes what an earlier agent was to remove.
async fn sweep_ended(agent: &Arc<Agent>) {
    let all = loop {
        match record::all(&*agent.store).await {
            Ok(all) => break all,
            Err(_) => tokio::time::sleep(RETRY_AFTER).await,
        }
    };
    for record in all {
        if record.spec.remove_at_end && record.status.ended() && record.owner == agent.name {
            remove_later(agent, &record);
        }
    }
}

/// Follows this node's schedule for ever.
pub(crate) async fn follow_schedule(agent: Arc<Agent>) {
    sweep_ended(&agent).await;
    loop {
        if let Err(error) = follow_once(&agent).await {
            tracing::warn!(%error, "the schedule cannot be followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(agent: &Arc<Agent>) -> Result<(), RecordError> {
    if agent.epochs_before.get().is_none() {
        let so_far = record::epochs_so_far(&*agent.store).await?;
        agent.epochs_before.get_or_init(|| so_far);
    }
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
        spawn_ensure(agent, machine, None);
    }
    let mut watch = agent.store.watch(&prefix, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            let Ok(Key::Schedule(_, machine)) = change.key().parse() else {
                continue;
            };
            match change {
                keel_cluster::store::Change::Put(_) => spawn_ensure(agent, machine, None),
                keel_cluster::store::Change::Delete { .. } => {
                    let agent = agent.clone();
                    tokio::spawn(async move { settle_unscheduled(&agent, &machine).await });
                }
            }
        }
    }
    Ok(())
}

/// Makes a scheduled machine run. `given` is the epoch that this agent gave it for its
/// next life, if it did.
fn spawn_ensure(agent: &Arc<Agent>, machine: MachineName, given: Option<Epoch>) {
    let agent = agent.clone();
    tokio::spawn(async move {
        if let Err(error) = ensure(&agent, &machine, given).await {
            tracing::error!(%machine, %error, "a scheduled machine does not run");
        }
    });
}

/// Makes a scheduled machine run, or says in the store why it does not.
async fn ensure(
    agent: &Arc<Agent>,
    machine: &MachineName,
    given: Option<Epoch>,
) -> Result<(), RecordError> {
    // Its earlier end may still be being written.
    while !agent.busy().insert(machine.clone()) {
        tokio::time::sleep(BUSY_AGAIN_AFTER).await;
    }
    let result = ensure_guarded(agent, machine, given).await;
    agent.busy().remove(machine);
    start_again(agent, machine, result)
}

async fn ensure_guarded(
    agent: &Arc<Agent>,
    machine: &MachineName,
    given: Option<Epoch>,
) -> Result<Again, RecordError> {
    if let Some(worker) = agent.workers.get(machine) {
        let found = record::get(&*agent.store, machine).await?;
        let record = &found.record;
        match worker.state().await {
            // It arrived, and the commit won: the source may not live to say so.
            Ok(State::Prepared { offered, .. })
                if let ArrivalVerdict::Goes(epoch) =
                    ownership::arrival(&agent.name, offered, Some(record)) =>
            {
                let go: Result<u64, RpcError> =
                    worker.ask(kind::GO, &epoch, crate::workers::PROMPT).await;
                if let Err(error) = go {
                    tracing::info!(%machine, %error, "it was told to go on by its source first");
                }
                return Ok(Again::No);
            }
            // What arrived of an earlier life of that name will never go on.
            Ok(State::Receiving { .. } | State::Prepared { .. } | State::Dropped { .. })
                if starts(&record.status) && record.owner == agent.name =>
            {
                agent
                    .workers
                    .forget_exactly(&agent.dir, machine, Some(&worker))
                    .await;
            }
            // An earlier agent died while it started the machine.
            Ok(State::Running { epoch }) if starts(&record.status) && record.epoch == epoch => {
                is_running(agent, machine, epoch).await?;
                return Ok(Again::No);
            }
            Ok(State::Empty | State::Held { .. }) if starts(&record.status) => {
                agent.workers.end(&agent.dir, machine).await;
            }
            // Its limits may have been changed while no agent told it.
            Ok(State::Running { epoch }) if record.owner == agent.name && record.epoch == epoch => {
                crate::set::tell(agent, machine, &worker).await;
                return Ok(Again::No);
            }
            _ => return Ok(Again::No),
        }
    }
    start_scheduled(agent, machine, given).await
}

/// Whether a machine is to be started again after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Again {
    /// Under this epoch, which it was just given.
    Under(Epoch),
    No,
}

/// Acts on the answer, once the machine is no longer busy with its end.
fn start_again(
    agent: &Arc<Agent>,
    machine: &MachineName,
    end: Result<Again, RecordError>,
) -> Result<(), RecordError> {
    if let Again::Under(epoch) = end? {
        spawn_ensure(agent, machine.clone(), Some(epoch));
    }
    Ok(())
}

async fn start_scheduled(
    agent: &Arc<Agent>,
    machine: &MachineName,
    given: Option<Epoch>,
) -> Result<Again, RecordError> {
    let mut found = record::get(&*agent.store, machine).await?;
    if let Status::Restarting { at_unix_ms, .. } = found.record.status {
        let rest = Duration::from_millis(at_unix_ms.saturating_sub(unix_ms()));
        tokio::time::sleep(rest.min(RESTART_WAIT_MAX)).await;
        // It may have been stopped meanwhile.
        found = record::get(&*agent.store, machine).await?;
    }
    if found.record.owner != agent.name {
        return Ok(Again::No);
    }
    if found.record.stop_wanted && starts(&found.record.status) {
        return finish(agent, machine, found.record.epoch, Status::Stopped).await;
    }
    let is_new = agent
        .epochs_before
        .get()
        .is_some_and(|it| found.record.epoch > *it);
    if starts(&found.record.status) && !is_new && given != Some(found.record.epoch) {
        found.record = under_next_epoch(agent, &found.record).await?;
        if found.record.owner != agent.name {
            return Ok(Again::No);
        }
    }
    let epoch = found.record.epoch;
    let failure = match found.record.status {
        Status::Scheduled | Status::Restarting { .. } => match start(agent, &found.record).await {
            Ok(()) => {
                // First: its end must be seen, whatever the store does.
                watch_worker(agent, machine);
                let passed = failpoint::pass_async("start.running").await;
                if passed.is_ok() {
                    is_running(agent, machine, found.record.epoch).await?;
                }
                // (Else the watch says it.) It may have been stopped while it
                // was started.
                let now = record::get(&*agent.store, machine).await?.record;
                if now.status.ended() {
                    agent.workers.end(&agent.dir, machine).await;
                } else if now.spec != found.record.spec
                    && let Some(worker) = agent.workers.get(machine)
                {
                    crate::set::tell(agent, machine, &worker).await;
                }
                if now.stop_wanted
                    && !now.status.ended()
                    && let Some(worker) = agent.workers.get(machine)
                {
                    let told: Result<(), RpcError> =
                        worker.ask(kind::STOP, &(), crate::workers::PROMPT).await;
                    if let Err(error) = told {
                        tracing::warn!(%machine, %error, "it is not stopped yet");
                    }
                }
                return Ok(Again::No);
            }
            Err(reason) => reason,
        },
        Status::Running | Status::Filling { .. } => "its worker process was lost".to_owned(),
        Status::Arriving { from } => return lost_on_arrival(agent, machine, &from).await,
        _ => return Ok(Again::No),
    };
    let reason = named_end(agent, machine).unwrap_or(failure);
    agent.workers.end(&agent.dir, machine).await;
    finish(agent, machine, epoch, Status::Failed { reason }).await
}

/// Raises the epoch of a machine that is to be started here and that an earlier agent
/// may have started already: that process is gone, but an epoch names one life only.
async fn under_next_epoch(agent: &Arc<Agent>, found: &Record) -> Result<Record, RecordError> {
    let raise = |record: &mut Record| {
        let same =
            record.owner == agent.name && record.epoch == found.epoch && starts(&record.status);
        if same {
            record.epoch = record.epoch.next();
        }
        same
    };
    record::update(&*agent.store, &found.name, raise, |txn, _| txn).await
}

/// Why the kernel ended a machine's process, if it did for want of memory.
fn named_end(agent: &Agent, machine: &MachineName) -> Option<String> {
    let reason = agent
        .workers
        .out_of_memory(&agent.dir, machine)?
        .to_string();
    tracing::error!(%machine, reason, "the kernel ended its process");
    let told = Note::machine(EventKind::OutOfMemory, machine, &reason);
    agent.events.record(told);
    Some(reason)
}

/// Whether a machine of this status is to be started where it is scheduled.
fn starts(status: &Status) -> bool {
    matches!(status, Status::Scheduled | Status::Restarting { .. })
}

/// Writes that a machine which was started here, or arrived here, runs, until
/// the store has it.
async fn is_running(
    agent: &Arc<Agent>,
    machine: &MachineName,
    epoch: Epoch,
) -> Result<(), RecordError> {
    runs(agent, machine, epoch, false).await
}

/// As [`is_running`]; of a machine that is `filling` a part of the memory is still
/// to come.
async fn runs(
    agent: &Arc<Agent>,
    machine: &MachineName,
    epoch: Epoch,
    filling: bool,
) -> Result<(), RecordError> {
    let mut before = None;
    loop {
        if failpoint::pass_async("arrived.running").await.is_err() {
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        let running = |record: &mut Record| {
            // A word that comes late must not count for its next life.
            let next = ownership::running(record, &agent.name, epoch, filling);
            // Of two that are here at once, the one that writes it tells it.
            before = next.is_some().then(|| record.status.clone());
            let Some(next) = next else { return false };
            if starts(&record.status) {
                record.started_unix_ms = unix_ms();
            }
            record.enter(next, unix_ms());
            true
        };
        let written = record::update(&*agent.store, machine, running, |txn, _| txn).await;
        if let (Ok(record), Some(before)) = (&written, &before) {
            agent.events.record(Note::status(record, before));
        }
        match written {
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
) -> Result<Again, RecordError> {
    let mut gone_since = None;
    loop {
        let waits = |record: &Record| {
            record.owner == agent.name && matches!(record.status, Status::Arriving { .. })
        };
        let epoch = match record::get(&*agent.store, machine).await {
            Ok(found) if waits(&found.record) => found.record.epoch,
            Ok(_) | Err(RecordError::NoMachine(_)) => return Ok(Again::No),
            Err(error) => {
                tracing::warn!(%machine, %error, "not known yet who has it");
                tokio::time::sleep(RETRY_AFTER).await;
                continue;
            }
        };
        let alive = record::alive(&*agent.store).await;
        let gone = alive.is_ok_and(|alive| !alive.contains(from));
        let since = gone.then(|| gone_since.unwrap_or_else(tokio::time::Instant::now));
        gone_since = since;
        // An agent that is only away for a moment still has the copy.
        let gone = since.is_some_and(|since| since.elapsed() > GONE_PATIENCE);
        if gone || source_holds(agent, machine, from).await == Some(false) {
            let reason = format!(
                "its worker process was lost just after it arrived, and {from} has no copy any more"
            );
            return finish(agent, machine, epoch, Status::Failed { reason }).await;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

/// A machine runs here whose memory is not all here, and its source is not
/// connected: waits for it. When the source is gone for good, so are pages of the
/// machine, and it can only go on from its checkpoint.
async fn await_source(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker) {
    let mut gone_since = None;
    loop {
        match worker.state().await {
            Ok(State::Filling {
                source_lost: true, ..
            }) => {}
            // It came back, or all is there.
            Ok(_) => return,
            // Busy, or lost, which is seen to elsewhere.
            Err(_) => {
                if !agent.workers.get(machine).is_some_and(|now| now.is(worker)) {
                    return;
                }
            }
        }
        if let Ok(found) = record::get(&*agent.store, machine).await
            && let Status::Filling { from } = &found.record.status
        {
            let alive = record::alive(&*agent.store).await;
            let gone = alive.is_ok_and(|alive| !alive.contains(from));
            let since = gone.then(|| gone_since.unwrap_or_else(tokio::time::Instant::now));
            gone_since = since;
            let gone = since.is_some_and(|since| since.elapsed() > GONE_PATIENCE);
            if gone || source_holds(agent, machine, from).await == Some(false) {
                tracing::error!(%machine, %from, "a part of its memory is lost with its source");
                // What follows is seen as a lost worker.
                worker.kill().await;
                return;
            }
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
    let (kept, leftovers) = match &record.status {
        Status::Restarting {
            from_checkpoint, ..
        } => {
            // What it said before stays.
            let kept = match from_checkpoint {
                true => crate::keep::newest(agent, &record.name).await?,
                false => None,
            };
            (kept, Leftovers::KeepOutput)
        }
        _ => (None, Leftovers::Remove),
    };
    let mut spread = Vec::new();
    let from = match kept.or_else(|| record.origin.clone()) {
        Some(origin) => StartFrom::Checkpoint(crate::apart::placed(agent, record, origin).await?),
        None => {
            let module = crate::service::find_module(agent, &record.spec.module).await?;
            spread = crate::apart::spread_over(agent, record).await;
            match spread.is_empty() {
                true => StartFrom::Module(module),
                false => StartFrom::HeldModule(module),
            }
        }
    };
    let worker = agent
        .workers
        .start(&agent.dir, &record.name, leftovers)
        .await?;
    failpoint::pass_async("start.worker")
        .await
        .map_err(|injected| injected.to_string())?;
    let apart = match &from {
        StartFrom::Checkpoint(Origin {
            memory: MemoryRestore::Spanning(nodes),
            ..
        }) => nodes.clone(),
        _ => spread,
    };
    let runs_alone = matches!(from, StartFrom::HeldModule(_));
    let start = Start {
        machine: record.name.clone(),
        spec: record.spec.clone(),
        from,
        epoch: record.epoch,
        notice: match &record.status {
            Status::Restarting { reason, .. } => Some(format!(
                "restart {} under epoch {}, since {reason}",
                record.restarts, record.epoch
            )),
            _ => None,
        },
    };
    let started: Result<(), RpcError> = worker.ask(kind::START, &start, COMPILE_PATIENCE).await;
    match started {
        Ok(()) => {}
        Err(RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. }) => {
            return Err(reason);
        }
        Err(other) => return Err(other.to_string()),
    }
    if apart.is_empty() {
        return Ok(());
    }
    crate::apart::begin(agent, record, &worker, &apart, runs_alone).await
}

/// Takes up a machine that an earlier agent was giving away when it died: the
/// machine may be frozen, and the commit may have been sent. A write of this
/// node's own, under a new epoch, makes that commit impossible; where it had won
/// already, the machine is not this node's any more.
pub(crate) async fn resume_after_move(agent: &Arc<Agent>, machine: &MachineName) {
    let Some(worker) = agent.workers.get(machine) else {
        return;
    };
    // What moves it, ends it or starts it anew waits: its epoch is about to be raised.
    if worker.report().await.is_ok_and(|report| report.moving_away)
        && let Some(held) = crate::moving::hold(agent, machine)
    {
        settle_after_move(agent, machine).await;
        held.release(agent, machine);
    }
}

async fn settle_after_move(agent: &Arc<Agent>, machine: &MachineName) {
    loop {
        // (Each time: another machine of its name may have come, and be moving.)
        let Some(worker) = agent.workers.get(machine) else {
            return;
        };
        match worker.report().await {
            Ok(report) if report.moving_away => {}
            _ => return,
        }
        let mut mine = false;
        let mut raised = None;
        let claim = |record: &mut Record| {
            mine = record.owner == agent.name && !record.status.ended();
            // Once, also where the answer to it was lost.
            let raises = mine && raised != Some(record.epoch);
            if raises {
                record.epoch = record.epoch.next();
                raised = Some(record.epoch);
            }
            raises
        };
        match record::update(&*agent.store, machine, claim, |txn, _| txn).await {
            Ok(record) if mine => {
                tracing::warn!(%machine, "a move was cut off by the agent's end; it goes on here");
                let text = "its move was cut off by the agent's end; it goes on here";
                let taken_up = Note::machine(EventKind::MoveTakenUp, machine, text);
                agent.events.record(taken_up.under(record.epoch));
                let thawed: Result<(), RpcError> = worker
                    .ask(kind::THAW, &record.epoch, crate::workers::PROMPT)
                    .await;
                match thawed {
                    Ok(()) => return,
                    // It ended, or its worker is lost: others see to that.
                    Err(error) if !worker.report().await.is_ok_and(|it| it.moving_away) => {
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
            Ok(record) if needs_copy(agent, &record.status) => {
                let text = "its move was committed when the agent ended; it is taken up";
                let taken_up = Note::machine(EventKind::MoveTakenUp, machine, text);
                agent.events.record(taken_up.under(record.epoch));
                let post_copy = worker.report().await.is_ok_and(|report| report.post_copy);
                crate::moving::take_up(agent, record, worker, post_copy).await;
                return;
            }
            // It runs elsewhere, or ended: the frozen copy is of no use.
            Ok(_) | Err(RecordError::NoMachine(_)) => {
                agent
                    .workers
                    .forget_exactly(&agent.dir, machine, Some(&worker))
                    .await;
                return;
            }
            Err(error) => {
                tracing::warn!(%machine, %error, "whose it is is not settled yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

/// Whether a machine of this status still needs the frozen copy that is here.
pub(crate) fn needs_copy(agent: &Agent, status: &Status) -> bool {
    match status {
        Status::Arriving { from } | Status::Filling { from } => *from == agent.name,
        _ => false,
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
    let giving_away = report.as_ref().is_ok_and(|report| report.moving_away);
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
        Ok(State::Empty | State::Running { .. } | State::Filling { .. } | State::Held { .. }) => {
            tracing::warn!(%machine, "it is not in the schedule here any more, ending its worker");
            let text = "is not to run here any more; its process is ended";
            agent
                .events
                .record(Note::machine(EventKind::WorkerEnded, machine, text));
            agent
                .workers
                .forget_exactly(&agent.dir, machine, Some(&worker))
                .await;
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
        crate::pauses::watch(&agent, &machine, &worker);
        crate::regular::watch(&agent, &machine, &worker);
        let mut lost = "it does not answer".to_owned();
        if let Ok(mut states) = worker.stream(kind::STATES, &()).await {
            while let Some(item) = states.recv().await {
                let state: Result<State, _> = item.and_then(|bytes| unpack(&bytes));
                match state {
                    Ok(State::Ended { epoch, status }) => {
                        ended(&agent, &machine, &worker, epoch, status).await;
                        return;
                    }
                    Ok(State::Dropped { reason }) => {
                        tracing::info!(%machine, reason, "an arriving machine was dropped");
                        let text = format!("what had arrived of it was dropped: {reason}");
                        let dropped = Note::machine(EventKind::ArrivalDropped, &machine, text);
                        agent.events.record(dropped);
                        crate::offer::settle(&agent, &machine).await;
                        return;
                    }
                    Ok(State::Prepared {
                        source_lost: true, ..
                    }) => crate::offer::settle(&agent, &machine).await,
                    Ok(State::Running { epoch }) => {
                        if let Err(error) = is_running(&agent, &machine, epoch).await {
                            tracing::warn!(%machine, %error, "that it runs is not in the store");
                        }
                        let (agent, machine) = (agent.clone(), machine.clone());
                        let worker = worker.clone();
                        tokio::spawn(async move {
                            crate::spanning::runs_here(&agent, &machine, &worker).await;
                        });
                    }
                    Ok(State::Filling { epoch, source_lost }) => {
                        if let Err(error) = runs(&agent, &machine, epoch, true).await {
                            tracing::warn!(%machine, %error, "that it runs is not in the store");
                        }
                        if source_lost {
                            let (agent, machine) = (agent.clone(), machine.clone());
                            let worker = worker.clone();
                            tokio::spawn(async move {
                                await_source(&agent, &machine, &worker).await;
                            });
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

async fn ended(
    agent: &Arc<Agent>,
    machine: &MachineName,
    worker: &Worker,
    epoch: Epoch,
    status: Status,
) {
    if failpoint::pass_async("end.seen").await.is_err() {
        tokio::time::sleep(RETRY_AFTER).await;
    }
    crate::moving::machine_ended(agent, machine);
    let handle = agent.moves().get(machine).cloned();
    if let Some(handle) = handle {
        handle.over().await;
    }
    // Its output stays in its folder; nobody needs the process any more, and
    // where the machine is started again it must be gone.
    let guarded = agent.busy().insert(machine.clone());
    // It stays in the table until its end is written: a source that asks what
    // became of it must not be told that it never ran.
    worker.forget().await;
    // Where it is not in the table any more, another has come in its place.
    let end = match agent.workers.get(machine).is_some_and(|now| now.is(worker)) {
        true => {
            agent.workers.drop_group(&agent.dir, machine).await;
            let epoch = epoch_of_life(agent, machine, epoch).await;
            finish(agent, machine, epoch, status).await
        }
        false => Ok(Again::No),
    };
    agent.workers.remove_exactly(machine, worker);
    settled(agent, machine, guarded, end);
}

/// The epoch under which the store has the life of a machine whose worker here ran
/// under `epoch` when it ended. It was raised meanwhile where the worker ended before
/// it was told of a write that keeps the machine here.
async fn epoch_of_life(agent: &Arc<Agent>, machine: &MachineName, epoch: Epoch) -> Epoch {
    loop {
        match record::get(&*agent.store, machine).await {
            Ok(found) => {
                let record = found.record;
                let raised = record.owner == agent.name
                    && record.epoch > epoch
                    && record.status == Status::Running;
                return if raised { record.epoch } else { epoch };
            }
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "its end is not in the store yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(_) => return epoch,
        }
    }
}

/// After a machine's end was written, or not.
fn settled(
    agent: &Arc<Agent>,
    machine: &MachineName,
    guarded: bool,
    end: Result<Again, RecordError>,
) {
    if guarded {
        agent.busy().remove(machine);
    }
    if let Err(error) = start_again(agent, machine, end) {
        tracing::error!(%machine, %error, "its end is not in the store");
    }
}

async fn worker_lost(agent: &Arc<Agent>, machine: &MachineName, worker: &Worker, reason: &str) {
    // A worker that was told to go away is not in the table any more.
    if !agent.workers.get(machine).is_some_and(|now| now.is(worker)) {
        return;
    }
    tracing::warn!(%machine, reason, "the connection to its worker was lost");
    let text = format!("the connection to its process was lost ({reason})");
    agent
        .events
        .record(Note::machine(EventKind::WorkerSilent, machine, text));
    if agent.workers.reconnect(&agent.dir, machine, worker).await {
        watch_worker(agent, machine);
        return;
    }
    // From here on it is certain that nothing of it runs here.
    worker.mark_lost();
    let reason = named_end(agent, machine)
        .unwrap_or_else(|| format!("its worker process was lost ({reason})"));
    agent.workers.drop_group(&agent.dir, machine).await;
    // Whose the machine is then, only its move knows: its commit may be under way, and
    // what had been sent may go on at the target.
    crate::moving::machine_ended(agent, machine);
    let handle = agent.moves().get(machine).cloned();
    if let Some(handle) = handle {
        handle.over().await;
    }
    // The move may have dropped it, and another life of that name may have its folder.
    if !agent.workers.get(machine).is_some_and(|now| now.is(worker)) {
        return;
    }
    let folder = agent.dir.worker(machine);
    // Its volumes are lost with its memory. (A panic in it removes nothing.)
    let _ = tokio::task::spawn_blocking(move || volumes::remove(&folder)).await;
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
            let guarded = agent.busy().insert(machine.clone());
            agent.workers.remove_exactly(machine, worker);
            let end = match record.status {
                Status::Arriving { from } => lost_on_arrival(agent, machine, &from).await,
                _ => finish(agent, machine, record.epoch, Status::Failed { reason }).await,
            };
            settled(agent, machine, guarded, end);
        }
        _ => {
            // It was only arriving, or has left.
            agent
                .workers
                .forget_exactly(&agent.dir, machine, Some(worker))
                .await;
            crate::offer::drop_reservation(agent, machine).await;
        }
    }
}

/// Writes the end of the life that a machine had here under `epoch`, and takes it out
/// of the schedule, until the store has it; removes the machine if it was to be. Where
/// its policy says so, it stays scheduled under its next epoch instead, and is started
/// again.
async fn finish(
    agent: &Arc<Agent>,
    machine: &MachineName,
    epoch: Epoch,
    status: Status,
) -> Result<Again, RecordError> {
    let mut before = None;
    let mut effect = EndEffect::None;
    loop {
        let entry = Key::Schedule(agent.name.clone(), machine.clone()).to_string();
        let end = |record: &mut Record| {
            let was = record.status.clone();
            effect = ownership::end(record, &agent.name, epoch, &status, unix_ms());
            if effect == EndEffect::Changed {
                before = Some(was);
            }
            effect == EndEffect::Changed
        };
        let written = record::update(&*agent.store, machine, end, |txn, record| {
            match record.status.ended() {
                true => txn.delete(entry.clone()),
                false => txn,
            }
        })
        .await;
        if let (Ok(record), Some(before)) = (&written, &before) {
            agent.events.record(Note::status(record, before));
        }
        match written {
            // (An earlier attempt may have written it, whose answer was lost.)
            Ok(record) if effect == EndEffect::None && !record.status.ended() => {
                return Ok(Again::No);
            }
            Ok(record) if matches!(record.status, Status::Restarting { .. }) => {
                let reason = status.end().unwrap_or_default();
                tracing::info!(%machine, restarts = record.restarts, reason, "it is started again");
                return Ok(Again::Under(record.epoch));
            }
            Ok(record) => {
                if record.spec.remove_at_end && record.status.ended() && record.owner == agent.name
                {
                    remove_later(agent, &record);
                }
                return Ok(Again::No);
            }
            Err(RecordError::Store(error)) => {
                tracing::warn!(%machine, %error, "its end is not in the store yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            Err(RecordError::NoMachine(_)) => return Ok(Again::No),
            Err(error) => return Err(error),
        }
    }
}
