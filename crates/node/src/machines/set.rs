//! Changes the limits, or the policies, of a machine that has not ended.
//!
//! The worker is asked first, because only it knows whether its memories fit. Then the record is
//! changed by compare-and-swap; if that fails, the worker gets the old limits back. Each agent
//! that finds the worker applies the record to it again, so the death of an agent leaves no
//! lasting inconsistency. A concurrent move fails, because a move holds for one revision of the
//! record only.

use super::handle::Machines;
use super::host_files;
use super::spec_check::{
    LIMITED_HAS_NO_PARTS, check_cpu, check_high_availability, check_io_target, check_memory,
    check_part_memory, check_parts,
};
use crate::checkpoints::check_plan;
use crate::error::CommandError;
use crate::events::Note;
use crate::processes::{PROMPT, WorkerHandle, explained, prove_guard};
use crate::records::{self, MachineCommand, RecordError, at_owner};
use keel_api::{CheckpointChange, EventKind, HighAvailabilityChange, SetRequest};
use keel_cluster::MachineName;
use keel_machine::high_availability::Protect;
use keel_machine::kind::Kinds;
use keel_machine::spec::{Balancing, Record, Spec, Status};
use keel_machine::worker::control::kind;
use keel_net::RpcError;
use keel_store::Txn;
use keel_store::keys::Key;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Pause after a failed store access.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Attempts at a change of what is protected, beside checkpoints that are noted.
const ATTEMPTS_MAX: u32 = 20;

/// Changes a machine's limits, or its restart, checkpoint or balancing policy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SetMachine {
    pub(crate) machine: MachineName,
    pub(crate) request: SetRequest,
}

impl MachineCommand for SetMachine {
    const KIND: u16 = 0x032f;
    type Answer = ();

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Machines {
    /// Changes a machine of any node.
    ///
    /// [`CommandError`]; the machine is unchanged then.
    pub(crate) async fn set(self: &Arc<Self>, command: SetMachine) -> Result<(), CommandError> {
        at_owner(&self.context, command, |it| self.set_here(it)).await
    }

    pub(crate) async fn set_here(
        self: &Arc<Self>,
        command: SetMachine,
    ) -> Result<(), CommandError> {
        set(self, &command.machine, &command.request).await
    }
}

/// Changes a machine that this node owns.
async fn set(
    machines: &Arc<Machines>,
    machine: &MachineName,
    request: &SetRequest,
) -> Result<(), CommandError> {
    check(request)?;
    records::settled(&*machines.context.store, machine).await?;
    let checked = checked_elsewhere(machines, machine, request).await?;
    // Serialised: two concurrent changes would undo each other at the worker.
    let _setting = machines.processes.exclusion.changes.lock().await;
    if machines.processes.exclusion.is_moving(machine) {
        return Err(moving(machine));
    }
    // Before the record is read, which says that the machine is this node's.
    let term = *machines.context.lease_term.borrow();
    let before = records::get(&*machines.context.store, machine)
        .await?
        .record;
    can_change(machines, &before)?;
    let spec = changed(&before.spec, request);
    if spec == before.spec {
        return Ok(());
    }
    let kinds = &machines.context.kinds;
    kinds.check(&spec).map_err(CommandError::Invalid)?;
    check_high_availability(kinds, &spec)?;
    if asks_elsewhere(kinds, &before.spec, &spec)? && checked.as_ref() != Some(&spec) {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} is being changed concurrently; try again"
        )));
    }
    if spec.cpu_limit_millis.is_some() && spec.balancing.parts_max.is_some() {
        return Err(CommandError::Invalid(LIMITED_HAS_NO_PARTS.into()));
    }
    let worker = match before.status {
        Status::Running => machines.processes.machines.get(machine),
        // It starts with the limits of the record.
        _ => None,
    };
    check_availability_change(machine, &before.spec, &spec, worker.is_some())?;
    if let Some(worker) = &worker {
        check_room(machines, machine, worker, &before.spec, &spec).await?;
        let guarded = guarded(&before.spec, &spec);
        let told = async {
            ask(worker, &guarded).await?;
            if before.spec.ha.is_none() && spec.ha.is_some() {
                prove_guard(worker, term).await?;
            }
            match protects(&spec) && !protects(&before.spec) {
                // An older worker does not know how to hold output back.
                true => worker.ask(kind::SHOW_OUTPUT, &0u64, PROMPT).await,
                false => Ok(()),
            }
        };
        if let Err(error) = told.await {
            apply_until_done(machines, machine, worker);
            return Err(match error {
                RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => {
                    let reason = explained(reason);
                    CommandError::Conflict(format!("machine {machine:?} stays as it is: {reason}"))
                }
                other => CommandError::Unavailable(other.to_string()),
            });
        }
    }
    let written = write(machines, &before, request).await;
    match written {
        Ok(after) => {
            if let Some(worker) = &worker
                && guarded(&before.spec, &spec) != spec
            {
                apply_until_done(machines, machine, worker);
            }
            let told = Note::machine(
                EventKind::MachineChanged,
                machine,
                text(&before.spec, &spec),
            );
            machines.context.events.record(told.under(after.epoch));
            if let Some(worker) = &worker {
                machines.checkpoints.keep_schedule(machine, worker);
                host_files::keep_members(machines, machine, worker);
            }
            Ok(())
        }
        Err(error) => {
            // The store's version counts, whatever this call wanted to write.
            if let Some(worker) = &worker {
                apply_until_done(machines, machine, worker);
            }
            Err(error)
        }
    }
}

/// Whether a change depends on what other nodes have.
fn asks_elsewhere(kinds: &Kinds, before: &Spec, after: &Spec) -> Result<bool, CommandError> {
    let kind = kinds.of(after).map_err(CommandError::Invalid)?;
    Ok(before.ha != after.ha && !kind.fails_over_from_checkpoint(after))
}

/// The spec as other nodes can provide for it: they are asked before all other changes of this
/// node's machines wait for this one. `None` if the change does not depend on them.
async fn checked_elsewhere(
    machines: &Arc<Machines>,
    machine: &MachineName,
    request: &SetRequest,
) -> Result<Option<Spec>, CommandError> {
    let before = records::get(&*machines.context.store, machine)
        .await?
        .record;
    let spec = changed(&before.spec, request);
    let kinds = &machines.context.kinds;
    if !asks_elsewhere(kinds, &before.spec, &spec)? {
        return Ok(None);
    }
    kinds.check(&spec).map_err(CommandError::Invalid)?;
    check_high_availability(kinds, &spec)?;
    host_files::check_elsewhere(machines, &before.owner, &spec).await?;
    Ok(Some(spec))
}

/// The spec of a worker until the record is written. One that needs no lease any more, or holds no
/// output back, is told after the record says so.
fn guarded(before: &Spec, after: &Spec) -> Spec {
    let mut ha = after.ha.clone().or_else(|| before.ha.clone());
    if let Some(ha) = &mut ha
        && protects(before)
    {
        ha.protect = Protect::Output;
    }
    Spec {
        ha,
        ..after.clone()
    }
}

fn protects(spec: &Spec) -> bool {
    spec.ha.as_ref().is_some_and(|ha| ha.protects_output())
}

/// Whether what keeps a machine available can be changed in this way, and now.
fn check_availability_change(
    machine: &MachineName,
    before: &Spec,
    after: &Spec,
    runs: bool,
) -> Result<(), CommandError> {
    if before.ha == after.ha {
        return Ok(());
    }
    let conflict =
        |why: &str| CommandError::Conflict(format!("machine {machine:?} stays as it is: {why}"));
    if !runs {
        // Its worker, if there is one, has the settings of before.
        return Err(conflict("it does not run yet; set its ha when it runs"));
    }
    let place = |spec: &Spec| spec.ha.as_ref().map(|ha| ha.to.clone());
    match (place(before), place(after)) {
        (Some(before), Some(after)) if before != after => Err(conflict(
            "its checkpoints are in another place; turn ha off first (--no-ha), and on again with the new place",
        )),
        _ => Ok(()),
    }
}

/// Applies a machine's record to its worker in the background, until the store has answered: the
/// worker may wait for it.
fn apply_until_done(machines: &Arc<Machines>, machine: &MachineName, worker: &WorkerHandle) {
    let (machines, machine, worker) = (machines.clone(), machine.clone(), worker.clone());
    tokio::spawn(async move {
        loop {
            let setting = machines.processes.exclusion.changes.lock().await;
            let workers = &machines.processes.machines;
            if !workers.get(&machine).is_some_and(|now| now.is(&worker)) {
                return;
            }
            match records::get(&*machines.context.store, &machine).await {
                Ok(found) if found.record.owner == machines.context.name => {
                    worker.apply_limits(&found.record).await;
                    return;
                }
                Ok(_) | Err(RecordError::NoMachine(_)) => return,
                Err(error) => tracing::warn!(%machine, %error, "its worker waits for its record"),
            }
            drop(setting);
            tokio::time::sleep(RETRY_AFTER).await;
        }
    });
}

/// Applies a machine's record to its worker. If the limits no longer fit because the machine has
/// grown, it keeps its current ones.
pub(super) async fn apply_record(
    machines: &Machines,
    machine: &MachineName,
    worker: &WorkerHandle,
) {
    let _setting = machines.processes.exclusion.changes.lock().await;
    match records::get(&*machines.context.store, machine).await {
        Ok(found) if found.record.owner == machines.context.name => {
            worker.apply_limits(&found.record).await
        }
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(%machine, %error, "the worker's limits may differ from the record")
        }
    }
}

async fn ask(worker: &WorkerHandle, spec: &Spec) -> Result<(), RpcError> {
    worker.ask(kind::SET, spec, PROMPT).await
}

fn check(request: &SetRequest) -> Result<(), CommandError> {
    if *request == SetRequest::default() {
        let what = "nothing to set: name a limit, a target, a restart policy, checkpoints or how it is balanced";
        return Err(CommandError::Invalid(what.into()));
    }
    if let Some(bytes) = request.memory_bytes {
        check_memory("limit", bytes)?;
    }
    if let Some(CheckpointChange::Plan(plan)) = &request.checkpoints {
        check_plan(plan)?;
    }
    let cores = [
        ("limit", request.cpu_limit_millis),
        ("target", request.cpu_target_millis),
    ];
    for (what, millis) in cores {
        if let Some(millis) = millis.filter(|millis| *millis != 0) {
            check_cpu(what, millis)?;
        }
    }
    if let Some(bytes) = request.memory_target_bytes.filter(|bytes| *bytes != 0) {
        check_memory("target", bytes)?;
    }
    if let Some(rate) = request.io_target_bytes_per_s.filter(|rate| *rate != 0) {
        check_io_target(rate)?;
    }
    if let Some(most) = request.parts_max.filter(|most| *most != 0) {
        check_parts(most)?;
    }
    if let Some(bytes) = request.part_memory_bytes.filter(|bytes| *bytes != 0) {
        check_part_memory(bytes)?;
    }
    Ok(())
}

fn moving(machine: &MachineName) -> CommandError {
    CommandError::Conflict(format!(
        "machine {machine:?} is moving: try again when it has arrived, or cancel that first (`keel move {machine} --cancel`)"
    ))
}

/// Whether a machine can be changed in its present state.
fn can_change(machines: &Machines, record: &Record) -> Result<(), CommandError> {
    let machine = &record.name;
    if record.owner != machines.context.name {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} just moved to {}; try again",
            record.owner
        )));
    }
    match record.status {
        Status::Running | Status::Scheduled | Status::Restarting { .. } => Ok(()),
        Status::Arriving { .. } | Status::Filling { .. } => Err(moving(machine)),
        Status::Exited { .. }
        | Status::Trapped { .. }
        | Status::Stopped
        | Status::Failed { .. } => Err(CommandError::Conflict(format!(
            "machine {machine:?} has ended ({}): only one that runs, or is to run, can be changed",
            record.status.word()
        ))),
    }
}

fn changed(spec: &Spec, request: &SetRequest) -> Spec {
    let balancing = &spec.balancing;
    Spec {
        memory_bytes: request.memory_bytes.unwrap_or(spec.memory_bytes),
        cpu_limit_millis: or_none(request.cpu_limit_millis, spec.cpu_limit_millis),
        restart: request.restart.unwrap_or(spec.restart),
        checkpoints: match &request.checkpoints {
            None => spec.checkpoints.clone(),
            Some(CheckpointChange::None) => None,
            Some(CheckpointChange::Plan(plan)) => Some(plan.clone()),
        },
        ha: match &request.ha {
            None => spec.ha.clone(),
            Some(HighAvailabilityChange::Off) => None,
            Some(HighAvailabilityChange::On(ha)) => Some(ha.clone()),
        },
        balancing: Balancing {
            by: request.balance.unwrap_or(balancing.by),
            cpu_target_millis: or_none(request.cpu_target_millis, balancing.cpu_target_millis),
            memory_target_bytes: or_none(
                request.memory_target_bytes,
                balancing.memory_target_bytes,
            ),
            io_target_bytes_per_s: or_none(
                request.io_target_bytes_per_s,
                balancing.io_target_bytes_per_s,
            ),
            parts_max: or_none(request.parts_max, balancing.parts_max),
            spawn: request.spawn.unwrap_or(balancing.spawn),
            part_memory_bytes: or_none(request.part_memory_bytes, balancing.part_memory_bytes),
        },
        ..spec.clone()
    }
}

/// The requested value, 0 meaning none; the present value if nothing is requested.
fn or_none<T: PartialEq + Default>(asked: Option<T>, there: Option<T>) -> Option<T> {
    match asked {
        None => there,
        Some(none) if none == T::default() => None,
        some => some,
    }
}

/// Whether this node has room for the increase of its memory limits.
async fn check_room(
    machines: &Machines,
    machine: &MachineName,
    worker: &WorkerHandle,
    before: &Spec,
    after: &Spec,
) -> Result<(), CommandError> {
    let more = after.memory_bytes.saturating_sub(before.memory_bytes) >> 16;
    if more == 0 {
        return Ok(());
    }
    let report = worker
        .report()
        .await
        .map_err(|error| CommandError::Unavailable(error.to_string()))?;
    let pages = vec![more; report.memory_pages.len()];
    records::check_free_memory(&machines.context, machine, &pages, None)
        .await
        .map_err(|reason| {
            CommandError::Conflict(format!(
                "machine {machine:?} stays as it is: {reason} (move it to a node with more, or others away)"
            ))
        })
}

/// Writes the change into the record that was checked, or into a newer revision with no relevant
/// difference.
async fn write(
    machines: &Machines,
    before: &Record,
    request: &SetRequest,
) -> Result<Record, CommandError> {
    let store = &*machines.context.store;
    let after = changed(&before.spec, request);
    let is_off = after.ha.is_none();
    let changes_protection = !is_off && protects(&before.spec) != protects(&after);
    let set = Key::InSync(before.name.clone()).to_string();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let mut refused = None;
        let change = |record: &mut Record| {
            refused = can_change(machines, record).err();
            let same = record.epoch == before.epoch && record.spec == before.spec;
            if refused.is_none() && !same {
                refused = Some(CommandError::Conflict(format!(
                    "machine {:?} was changed by another; try again",
                    record.name
                )));
            }
            if refused.is_some() {
                return false;
            }
            record.spec = changed(&record.spec, request);
            true
        };
        // Output behind the present checkpoint is seen, or was.
        let found = match changes_protection {
            true => records::in_sync_set(store, &before.name).await?,
            false => None,
        };
        let unheld = match found {
            Some((set, revision)) => {
                let value = records::encode_in_sync_set(&set.without_held_output())?;
                Some((value, revision))
            }
            None => None,
        };
        let more = |txn: Txn, _: &Record| match &unheld {
            // A later checkpoint of the same machine must not be taken for the newest.
            _ if is_off => txn.delete(set.clone()),
            _ if !changes_protection => txn,
            Some((value, revision)) => txn
                .when_modified_at(set.clone(), *revision)
                .put(set.clone(), value.clone()),
            None => txn.when_absent(set.clone()),
        };
        let written = records::update(store, &before.name, change, more).await;
        return match (refused, written) {
            // An earlier write succeeded and its answer was lost.
            (Some(_), Ok(record)) if record.spec == after => Ok(record),
            (Some(error), Ok(_)) => Err(error),
            // The next checkpoint was noted meanwhile.
            (_, Err(RecordError::Contended(_)))
                if changes_protection && attempts < ATTEMPTS_MAX =>
            {
                continue;
            }
            (_, written) => Ok(written?),
        };
    }
}

/// The differences as text for users.
fn text(before: &Spec, after: &Spec) -> String {
    let mut parts = Vec::new();
    if before.memory_bytes != after.memory_bytes {
        let (before, after) = (before.memory_bytes, after.memory_bytes);
        parts.push(format!("memory limit {before} → {after} bytes"));
    }
    if before.cpu_limit_millis != after.cpu_limit_millis {
        let cores = |millis: Option<u32>| match millis {
            Some(millis) => (f64::from(millis) / 1000.0).to_string(),
            None => "none".to_owned(),
        };
        let (before, after) = (
            cores(before.cpu_limit_millis),
            cores(after.cpu_limit_millis),
        );
        parts.push(format!("cpu limit {before} → {after}"));
    }
    if before.restart != after.restart {
        let (before, after) = (before.restart.word(), after.restart.word());
        parts.push(format!("restart {before} → {after}"));
    }
    if before.ha != after.ha {
        parts.push(match &after.ha {
            Some(ha) => format!("ha {}", ha.line()),
            None => "ha off".to_owned(),
        });
    }
    if before.checkpoints != after.checkpoints {
        parts.push(match &after.checkpoints {
            Some(plan) => format!("checkpoints {}", plan.line()),
            None => "checkpoints none".to_owned(),
        });
    }
    if before.balancing != after.balancing {
        let line = |spec: &Spec| spec.balancing.line().unwrap_or_else(|| "by policy".into());
        parts.push(format!("balanced {} → {}", line(before), line(after)));
    }
    format!("was changed: {}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::kind::KindSpec;
    use keel_machine::restart_policy::Restart;

    fn spec() -> Spec {
        Spec {
            kind: "wasm".parse().unwrap(),
            kind_spec: KindSpec::default(),
            volumes: Vec::new(),
            memory_bytes: 1 << 20,
            cpu_limit_millis: None,
            output_bytes_per_s: 1,
            remove_at_end: false,
            restart: Restart::No,
            checkpoints: None,
            ha: None,
            balancing: Balancing::default(),
        }
    }

    #[test]
    fn what_is_left_out_stays_and_zero_is_no_limit() {
        let request = SetRequest {
            cpu_limit_millis: Some(1500),
            ..SetRequest::default()
        };
        let limited = changed(&spec(), &request);
        assert_eq!(limited.cpu_limit_millis, Some(1500));
        assert_eq!(limited.memory_bytes, spec().memory_bytes);
        assert_eq!(text(&spec(), &limited), "was changed: cpu limit none → 1.5");
        let request = SetRequest {
            cpu_limit_millis: Some(0),
            memory_bytes: Some(1 << 21),
            restart: Some(Restart::Always),
            balance: Some(keel_machine::spec::BalanceBy::Target),
            cpu_target_millis: Some(250),
            ..SetRequest::default()
        };
        let free = changed(&limited, &request);
        assert_eq!(free.cpu_limit_millis, None);
        assert_eq!(
            text(&limited, &free),
            "was changed: memory limit 1048576 → 2097152 bytes, cpu limit 1.5 → none, restart no → always, balanced by policy → by target, cpu.target 0.25"
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(check(&SetRequest::default()).is_err());
        for (memory_bytes, cpu_limit_millis) in [
            (Some(0), None),
            (Some(u64::MAX), None),
            (None, Some(1)),
            (None, Some(u32::MAX)),
        ] {
            let request = SetRequest {
                memory_bytes,
                cpu_limit_millis,
                ..SetRequest::default()
            };
            assert!(check(&request).is_err(), "{request:?}");
        }
    }
}
