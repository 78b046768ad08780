//! Makes the processes of this node equal to its schedule.
//!
//! The schedule in the store is the truth. An entry without a worker is started if its machine was
//! never started. A machine whose worker is lost is reported as failed, or restarted if its
//! restart policy says so. A worker without an entry is ended, unless a move or an arrival is in
//! progress, whose own protocol decides.

use super::handle::{Machines, RestartDecision, Restarts, starts};
use super::record_running::{is_running, lost_on_arrival};
use super::set::apply_record;
use super::start::start;
use super::termination::{named_end, record_end, sweep_ended};
use super::worker_monitor::watch_worker;
use crate::events::Note;
use crate::moves::{is_behind, settle, settle_after_move};
use crate::processes::{PROMPT, WorkerHandle};
use crate::records::{self, RecordError};
use keel_api::EventKind;
use keel_cluster::{Epoch, MachineName};
use keel_machine::failpoint;
use keel_machine::moves::ownership::{self, ResumeDecision};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{State, kind};
use keel_net::RpcError;
use keel_store::clock::unix_ms;
use keel_store::keys::{self, Key};
use std::sync::Arc;
use std::time::Duration;

/// Pause before the schedule is followed again: the store may have a new leader, and machines of the
/// former one may wait to be started here.
const FOLLOW_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Pause between checks of a machine with another operation in progress.
const BUSY_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// The longest delay of a restart, whatever the clock says.
const RESTART_WAIT_MAX: Duration = Duration::from_secs(60);

/// Restarts the ended machines whose policy says so.
pub(crate) async fn follow_restarts(machines: Arc<Machines>, mut restarts: Restarts) {
    while let Some((machine, epoch)) = restarts.recv().await {
        spawn_ensure(&machines, machine, Some(epoch));
    }
}

/// Follows this node's schedule until the agent ends.
pub(crate) async fn follow_schedule(machines: Arc<Machines>) {
    sweep_ended(&machines).await;
    loop {
        if let Err(error) = follow_once(&machines).await {
            tracing::warn!(%error, "the schedule cannot be followed, trying again");
        }
        tokio::time::sleep(FOLLOW_AGAIN_AFTER).await;
    }
}

async fn follow_once(machines: &Arc<Machines>) -> Result<(), RecordError> {
    if machines.epochs_before.get().is_none() {
        let so_far = records::epochs_so_far(&*machines.context.store).await?;
        machines.epochs_before.get_or_init(|| so_far);
    }
    let prefix = keys::schedule_of(&machines.context.name);
    let listing = machines.context.store.list(&prefix).await?;
    let mut scheduled = Vec::new();
    for entry in &listing.entries {
        if let Ok(Key::Schedule(_, machine)) = entry.key.parse() {
            scheduled.push(machine);
        }
    }
    for machine in machines.processes.machines.names() {
        if !scheduled.contains(&machine) {
            settle_unscheduled(machines, &machine).await;
        }
    }
    for machine in scheduled {
        spawn_ensure(machines, machine, None);
    }
    let mut watch = machines
        .context
        .store
        .watch(&prefix, listing.revision + 1)
        .await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            let Ok(Key::Schedule(_, machine)) = change.key().parse() else {
                continue;
            };
            match change {
                keel_store::Change::Put(entry) => {
                    let machines = machines.clone();
                    tokio::spawn(async move {
                        resume_announced(&machines, &machine, &entry.value).await;
                        spawn_ensure(&machines, machine, None);
                    });
                }
                keel_store::Change::Delete { .. } => {
                    let machines = machines.clone();
                    tokio::spawn(async move { settle_unscheduled(&machines, &machine).await });
                }
            }
        }
    }
    Ok(())
}

/// Resumes a machine whose copy is ready here as soon as the commit of its move is seen: the word of
/// its source may take half a round trip more.
async fn resume_announced(machines: &Machines, machine: &MachineName, entry: &[u8]) {
    let Some(worker) = machines.processes.machines.get(machine) else {
        return;
    };
    if let Ok(State::Prepared { offered, .. }) = worker.state().await
        && let Some(epoch) = ownership::announced(offered, entry)
    {
        let go: Result<u64, RpcError> = worker.ask(kind::GO, &epoch, PROMPT).await;
        if let Err(error) = go {
            tracing::info!(%machine, %error, "a committed machine is not resumed yet");
        }
    }
}

/// Makes a scheduled machine run. `given` is the epoch that this agent assigned to its next life,
/// if any.
fn spawn_ensure(machines: &Arc<Machines>, machine: MachineName, given: Option<Epoch>) {
    let machines = machines.clone();
    tokio::spawn(async move {
        if let Err(error) = ensure(&machines, &machine, given).await {
            tracing::error!(%machine, %error, "a scheduled machine does not run");
        }
    });
}

/// Looks at a machine again after a while.
fn ensure_later(machines: &Arc<Machines>, machine: &MachineName, given: Option<Epoch>) {
    let (machines, machine) = (machines.clone(), machine.clone());
    tokio::spawn(async move {
        tokio::time::sleep(RETRY_AFTER).await;
        spawn_ensure(&machines, machine, given);
    });
}

/// Makes a scheduled machine run, or records in the store why it does not.
async fn ensure(
    machines: &Arc<Machines>,
    machine: &MachineName,
    given: Option<Epoch>,
) -> Result<(), RecordError> {
    // The write of its earlier end may still be in progress.
    while !machines.processes.exclusion.busy().insert(machine.clone()) {
        tokio::time::sleep(BUSY_AGAIN_AFTER).await;
    }
    let result = ensure_guarded(machines, machine, given).await;
    machines.processes.exclusion.busy().remove(machine);
    // It may have been given to another node while it was started here.
    settle_unscheduled(machines, machine).await;
    machines.queue_restart(machine, result)
}

async fn ensure_guarded(
    machines: &Arc<Machines>,
    machine: &MachineName,
    given: Option<Epoch>,
) -> Result<RestartDecision, RecordError> {
    if let Some(worker) = machines.processes.machines.get(machine) {
        let found = records::get(&*machines.context.store, machine).await?;
        let record = &found.record;
        let report = worker.report().await;
        let moving = machines.processes.exclusion.is_moving(machine)
            || report.as_ref().is_ok_and(|report| report.moving_away);
        match report.map(|report| report.state) {
            // The machine arrived and the commit won: the source may be gone before it reports
            // that.
            Ok(State::Prepared { offered, .. })
                if let ResumeDecision::Resume(epoch) =
                    ownership::may_resume(&machines.context.name, offered, Some(record)) =>
            {
                let go: Result<u64, RpcError> = worker.ask(kind::GO, &epoch, PROMPT).await;
                if let Err(error) = go {
                    tracing::info!(%machine, %error, "the source resumed it first");
                }
                return Ok(RestartDecision::No);
            }
            // A copy that arrived for an earlier life of that name never runs.
            Ok(State::Receiving { .. } | State::Prepared { .. } | State::Dropped { .. })
                if starts(&record.status) && record.owner == machines.context.name =>
            {
                machines
                    .processes
                    .machines
                    .forget_exactly(&machines.context.dir, machine, Some(&worker))
                    .await;
            }
            // An earlier agent died while it started the machine.
            Ok(State::Running { epoch }) if starts(&record.status) && record.epoch == epoch => {
                is_running(machines, machine, epoch).await?;
                return Ok(RestartDecision::No);
            }
            Ok(State::Empty | State::Held { .. }) if starts(&record.status) => {
                machines
                    .processes
                    .machines
                    .end(&machines.context.dir, machine)
                    .await;
            }
            // Its limits may have changed while no agent was running.
            Ok(State::Running { epoch })
                if record.owner == machines.context.name && record.epoch == epoch =>
            {
                apply_record(machines, machine, &worker).await;
                return Ok(RestartDecision::No);
            }
            // An earlier agent kept it here, and died before its worker was told.
            Ok(State::Running { epoch })
                if record.owner == machines.context.name && is_behind(epoch, record) && !moving =>
            {
                let (moves, machine) = (machines.moves.clone(), machine.clone());
                tokio::spawn(async move { settle_after_move(&moves, &machine).await });
                return Ok(RestartDecision::No);
            }
            // The machine was given away, and given back for its next life: this one is over.
            Ok(State::Running { epoch } | State::Filling { epoch, .. })
                if starts(&record.status)
                    && record.owner == machines.context.name
                    && epoch < record.epoch
                    && !moving =>
            {
                machines
                    .processes
                    .machines
                    .end(&machines.context.dir, machine)
                    .await;
            }
            // The end of an earlier life is still being handled, or that of its move.
            _ if starts(&record.status) && record.owner == machines.context.name => {
                ensure_later(machines, machine, given);
                return Ok(RestartDecision::No);
            }
            _ => return Ok(RestartDecision::No),
        }
    }
    start_scheduled(machines, machine, given).await
}

async fn start_scheduled(
    machines: &Arc<Machines>,
    machine: &MachineName,
    given: Option<Epoch>,
) -> Result<RestartDecision, RecordError> {
    let mut found = records::get(&*machines.context.store, machine).await?;
    if let Status::Restarting { at_unix_ms, .. } = found.record.status {
        let rest = Duration::from_millis(at_unix_ms.saturating_sub(unix_ms()));
        tokio::time::sleep(rest.min(RESTART_WAIT_MAX)).await;
        // It may have been stopped in the meantime.
        found = records::get(&*machines.context.store, machine).await?;
    }
    if found.record.owner != machines.context.name {
        return Ok(RestartDecision::No);
    }
    if found.record.stop_wanted && starts(&found.record.status) {
        return record_end(machines, machine, found.record.epoch, Status::Stopped).await;
    }
    let is_new = machines
        .epochs_before
        .get()
        .is_some_and(|it| found.record.epoch > *it);
    if starts(&found.record.status) && !is_new && given != Some(found.record.epoch) {
        found.record = under_next_epoch(machines, &found.record).await?;
        if found.record.owner != machines.context.name {
            return Ok(RestartDecision::No);
        }
    }
    let epoch = found.record.epoch;
    let failure = match found.record.status {
        Status::Scheduled | Status::Restarting { .. } => match start(machines, &found.record).await
        {
            Ok(()) => {
                // Watch first: the end must be seen, whatever the store does.
                watch_worker(machines, machine);
                let passed = failpoint::pass_async("start.running").await;
                if passed.is_ok() {
                    is_running(machines, machine, found.record.epoch).await?;
                }
                // Otherwise the watch reports it. The machine may have been stopped during its
                // start.
                let now = records::get(&*machines.context.store, machine)
                    .await?
                    .record;
                if now.status.ended() {
                    machines
                        .processes
                        .machines
                        .end(&machines.context.dir, machine)
                        .await;
                } else if now.spec != found.record.spec
                    && let Some(worker) = machines.processes.machines.get(machine)
                {
                    apply_record(machines, machine, &worker).await;
                }
                if now.stop_wanted
                    && !now.status.ended()
                    && let Some(worker) = machines.processes.machines.get(machine)
                {
                    let told: Result<(), RpcError> = worker.ask(kind::STOP, &(), PROMPT).await;
                    if let Err(error) = told {
                        tracing::warn!(%machine, %error, "the machine has not stopped yet");
                    }
                }
                return Ok(RestartDecision::No);
            }
            Err(reason) => reason,
        },
        Status::Running | Status::Filling { .. } => "its worker process was lost".to_owned(),
        Status::Arriving { from } => return lost_on_arrival(machines, machine, &from).await,
        _ => return Ok(RestartDecision::No),
    };
    let reason = named_end(machines, machine).unwrap_or(failure);
    machines
        .processes
        .machines
        .end(&machines.context.dir, machine)
        .await;
    record_end(machines, machine, epoch, Status::Failed { reason }).await
}

/// Raises the epoch of a machine that is to start here and that an earlier agent may have started
/// already. That process is gone, but an epoch names one life only.
async fn under_next_epoch(machines: &Arc<Machines>, found: &Record) -> Result<Record, RecordError> {
    let raise = |record: &mut Record| {
        let same = record.owner == machines.context.name
            && record.epoch == found.epoch
            && starts(&record.status);
        if same {
            record.epoch = record.next_epoch();
        }
        same
    };
    records::update(&*machines.context.store, &found.name, raise, |txn, _| txn).await
}

/// Settles a worker whose machine is not in this node's schedule. One that a move or another
/// operation holds is looked at again: it may be left over when that ends, as after a failover of a
/// machine that was on its way from here.
async fn settle_unscheduled(machines: &Arc<Machines>, machine: &MachineName) {
    if is_settled(machines, machine).await {
        return;
    }
    let (machines, machine) = (machines.clone(), machine.clone());
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(RETRY_AFTER).await;
            if is_settled(&machines, &machine).await {
                return;
            }
        }
    });
}

/// Ends the worker of a machine that is not in this node's schedule, if that can be decided now.
async fn is_settled(machines: &Arc<Machines>, machine: &MachineName) -> bool {
    if failpoint::pass_async("unscheduled.found").await.is_err() {
        return false;
    }
    let Some(worker) = machines.processes.machines.get(machine) else {
        return true;
    };
    // The order matters. A worker that runs before its entry is looked up, and has none then, is
    // not scheduled here. An empty worker is in use by the arrival or the start that made it, unless
    // that is over before the worker is asked.
    if is_in_operation(machines, machine) {
        return false;
    }
    let report = worker.report().await;
    let moving_away = report.as_ref().is_ok_and(|report| report.moving_away);
    let state = report.map(|report| report.state);
    if failpoint::pass_async("unscheduled.reported").await.is_err() {
        return false;
    }
    let entry = Key::Schedule(machines.context.name.clone(), machine.clone()).to_string();
    match machines.context.store.get(&entry).await {
        Ok(None) => {}
        Ok(Some(_)) => return true,
        Err(error) => {
            // It is asked again soon, and that the store is away is said once, of the lease.
            tracing::debug!(%machine, %error, "cannot read whether it is scheduled here");
            return false;
        }
    }
    // A worker that sends its machine belongs to its move, or to the recovery after the death of
    // the agent that began the move.
    if moving_away || is_in_operation(machines, machine) {
        return false;
    }
    if !machines
        .processes
        .machines
        .get(machine)
        .is_some_and(|now| now.is(&worker))
    {
        return false;
    }
    match state {
        // The write of its end is in progress.
        Ok(State::Ended { .. }) => {}
        // An arriving machine has no entry yet. Its worker detects the loss of the source.
        Ok(
            State::Receiving { .. }
            | State::Prepared {
                source_lost: false, ..
            },
        ) => {}
        Ok(State::Prepared { .. } | State::Dropped { .. }) => {
            settle(&machines.moves, machine).await;
        }
        // The watch detects whether it is lost; one that stands still may go on.
        Err(error) => {
            tracing::debug!(%machine, %error, "its worker does not answer");
            return false;
        }
        Ok(State::Empty | State::Running { .. } | State::Filling { .. } | State::Held { .. }) => {
            // One that was given up has ended here: its output and its own disk stay.
            let is_own = match records::get(&*machines.context.store, machine).await {
                Ok(found) => found.record.owner == machines.context.name,
                Err(RecordError::NoMachine(_)) => false,
                Err(_) => return false,
            };
            // Nobody starts it in the same folder meanwhile.
            if !machines.processes.exclusion.busy().insert(machine.clone()) {
                return false;
            }
            end_unscheduled(machines, machine, &worker, is_own).await;
            machines.processes.exclusion.busy().remove(machine);
        }
    }
    true
}

async fn end_unscheduled(
    machines: &Machines,
    machine: &MachineName,
    worker: &WorkerHandle,
    is_own: bool,
) {
    let (workers, dir) = (&machines.processes.machines, &machines.context.dir);
    if !workers.get(machine).is_some_and(|now| now.is(worker)) {
        return;
    }
    tracing::warn!(%machine, "no longer scheduled here, ending its worker");
    let text = "is no longer scheduled here; its process is ended";
    let told = Note::machine(EventKind::WorkerEnded, machine, text);
    machines.context.events.record(told);
    match is_own {
        true => workers.end(dir, machine).await,
        false => workers.forget_exactly(dir, machine, Some(worker)).await,
    }
}

/// Whether a machine moves away, arrives, is started, ended or removed at this moment.
fn is_in_operation(machines: &Machines, machine: &MachineName) -> bool {
    let exclusion = &machines.processes.exclusion;
    exclusion.is_moving(machine) || exclusion.busy().contains(machine)
}
