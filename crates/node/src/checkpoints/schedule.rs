//! Periodic checkpoints by a machine's spec: each a fixed interval after the one before, on
//! whichever node the machine is.
//!
//! The interval starts at the newest checkpoint in the store, so that neither a move nor a new
//! agent adds or skips one. From there on it is measured on CLOCK_BOOTTIME: a wall clock that was
//! ahead for a moment would put off the next checkpoint, and with it the output that waits for it,
//! until that time has come.
//!
//! With high availability an interval is what a failure may undo, so that a checkpoint has to be
//! safe when it is over: it begins earlier by as long as the last ones took.

use super::handle::Checkpoints;
use super::replication::Unreplicated;
use crate::error::CommandError;
use crate::events::Note;
use crate::processes::WorkerHandle;
use crate::records::{self, InSyncSet, RecordError};
use keel_api::CheckpointRequest;
use keel_cluster::{Epoch, MachineName};
use keel_machine::checkpoint::Retention;
use keel_machine::high_availability::HighAvailability;
use keel_machine::kind::Kinds;
use keel_machine::spec::{Record, Spec, Status};
use keel_store::clock::{boottime, unix_ms};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// The longest pause between two checks of a machine.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Checkpoints that are kept in a repository for a machine with high availability.
const HA_KEPT: u32 = 2;
/// Attempts in a row to have a checkpoint on other nodes that fail until users are told.
const FAILURES_TOLD: u32 = 5;
/// The longest pause after a failed checkpoint.
const RETRY_MAX: Duration = Duration::from_secs(60);

impl Checkpoints {
    /// Creates a machine's periodic checkpoints until its worker is gone.
    pub(crate) fn keep_schedule(self: &Arc<Self>, machine: &MachineName, worker: &WorkerHandle) {
        let (checkpoints, machine, worker) = (self.clone(), machine.clone(), worker.clone());
        // One task for each connection to a process: a new connection gets a new one.
        let Some(watching) = Watching::begin(&checkpoints, &worker) else {
            return;
        };
        tokio::spawn(async move {
            let mut watching = Some(watching);
            // When the next one is due, on CLOCK_BOOTTIME.
            let mut next: Option<Duration> = None;
            let mut interval: Option<Duration> = None;
            let mut lead = Lead::default();
            let mut failed = 0;
            let mut unreplicated = None;
            let mut settings = None;
            let mut is_shown = false;
            while checkpoints
                .processes
                .machines
                .get(&machine)
                .is_some_and(|now| now.is(&worker))
            {
                let record = match records::get(&*checkpoints.context.store, &machine).await {
                    Ok(found) => found.record,
                    Err(RecordError::NoMachine(_)) => return,
                    Err(_) => {
                        tokio::time::sleep(LOOK_EVERY).await;
                        continue;
                    }
                };
                let replicated = record.spec.ha.as_ref().filter(|ha| ha.to.is_none());
                let Some(plan) = &plan_of(&checkpoints.context.kinds, &record.spec) else {
                    // A change of the spec starts a new task; a very recent change finds this one
                    // still active.
                    if watching.take().is_none() {
                        return;
                    }
                    continue;
                };
                if watching.is_none() {
                    watching = Watching::begin(&checkpoints, &worker);
                    if watching.is_none() {
                        return;
                    }
                }
                if settings != record.spec.ha {
                    settings = record.spec.ha.clone();
                    (next, unreplicated) = (None, None);
                }
                // The first checkpoint of a machine with high availability is made at once: after
                // a start there is none, and after a move only where it was.
                if interval != Some(plan.every) {
                    let before = interval.replace(plan.every).unwrap_or(plan.every);
                    next = next.map(|at| at.saturating_sub(before).saturating_add(plan.every));
                }
                if next.is_none() && record.spec.ha.is_none() {
                    let made = checkpoints.newest_ms(&machine, plan.to.as_deref()).await;
                    // The clock of another node may have been ahead.
                    let since = made.unwrap_or(record.started_unix_ms);
                    let age = Duration::from_millis(unix_ms().saturating_sub(since));
                    next = Some(boottime().saturating_add(plan.every.saturating_sub(age)));
                }
                let now = boottime();
                let due = next.unwrap_or(now);
                let runs =
                    record.owner == checkpoints.context.name && record.status == Status::Running;
                if !runs || due > now {
                    let rest = due.saturating_sub(now);
                    // An arriving machine is about to run.
                    let least = Duration::from_millis(if runs { 1 } else { 500 });
                    tokio::time::sleep(rest.clamp(least, LOOK_EVERY)).await;
                    continue;
                }
                if !is_shown && replicated.is_some_and(|ha| ha.protects_output()) {
                    is_shown = checkpoints.show_what_is_safe(&machine, &record).await;
                }
                if let Some(ha) = replicated {
                    let made = checkpoints
                        .replicate_next(&machine, ha, &mut unreplicated)
                        .await;
                    match made {
                        Ok(begun) => {
                            let took = boottime().saturating_sub(begun);
                            next = Some(begun.saturating_add(match ha.protects_output() {
                                // Nothing that was seen is undone.
                                true => plan.every,
                                false => lead.pause(plan.every, took),
                            }));
                            failed = 0;
                        }
                        Err(error) => {
                            // Once: with a short interval, a move alone would say it many times.
                            match failed {
                                0 => {
                                    tracing::warn!(%machine, %error, "no checkpoint on other nodes")
                                }
                                _ => {
                                    tracing::debug!(%machine, %error, "still no checkpoint on other nodes")
                                }
                            }
                            failed += 1;
                            next = Some(boottime() + pause(plan.every, failed));
                            if failed == FAILURES_TOLD {
                                let told = Note::checkpoint(&machine, &Err(error));
                                checkpoints.context.events.record(told);
                            }
                        }
                    }
                    continue;
                }
                let request = CheckpointRequest {
                    to: plan.to.clone(),
                    full: false,
                    keep: plan.retention.newest,
                    keep_for_s: plan.retention.for_s,
                };
                match checkpoints.create_here(&machine, request).await {
                    Ok(taken) => {
                        failed = 0;
                        let pause = match record.spec.ha {
                            Some(_) => {
                                checkpoints
                                    .note_shared(&machine, record.epoch, &taken.id)
                                    .await;
                                let took = boottime().saturating_sub(now);
                                lead.pause(plan.every, took).saturating_sub(took)
                            }
                            None => plan.every,
                        };
                        next = Some(boottime().saturating_add(pause));
                    }
                    Err(error) => {
                        tracing::warn!(%machine, %error, "cannot create a scheduled checkpoint");
                        failed += 1;
                        next = Some(boottime() + pause(plan.every, failed));
                    }
                }
            }
        });
    }
}

/// By how much the checkpoints of a machine with high availability begin earlier.
#[derive(Default)]
struct Lead(Duration);

impl Lead {
    /// Time from the beginning of a checkpoint, which took so long until it was safe, to that of
    /// the next one: a quarter more than the longest, of which older ones count for less and less.
    fn pause(&mut self, every: Duration, took: Duration) -> Duration {
        self.0 = (took * 5 / 4).max(self.0 * 7 / 8);
        // Where it takes that long, the machine would do nothing else.
        every - self.0.min(every / 2)
    }
}

/// A machine's automatic checkpoints.
struct Plan {
    every: Duration,
    to: Option<String>,
    retention: Retention,
}

fn plan_of(kinds: &Kinds, spec: &Spec) -> Option<Plan> {
    let ha = spec.ha.as_ref();
    let Some(ha) = ha.filter(|_| kinds.fails_over_from_checkpoint(spec)) else {
        let plan = spec.checkpoints.clone()?;
        return Some(Plan {
            every: Duration::from_secs(plan.every_s),
            to: plan.to,
            retention: plan.retention,
        });
    };
    Some(Plan {
        every: ha.checkpoint_every(),
        to: ha.to.clone(),
        retention: Retention {
            newest: Some(HA_KEPT),
            for_s: None,
        },
    })
}

impl Checkpoints {
    /// Records the checkpoint of a machine in a repository that all nodes reach. If that fails, the
    /// one before counts.
    async fn note_shared(&self, machine: &MachineName, epoch: Epoch, id: &str) {
        let noted = async {
            let worker = self.processes.machines.get(machine);
            let worker = worker.ok_or_else(|| "it does not run".to_owned())?;
            let report = worker.report().await.map_err(|error| error.to_string())?;
            let store = &*self.context.store;
            let before = records::in_sync_set(store, machine).await;
            let before = before.map_err(|error| error.to_string())?;
            let set = InSyncSet {
                checkpoint: Some(id.parse()?),
                members: BTreeSet::new(),
                memory_bytes: report.memory_bytes,
                held_output: None,
            };
            let revision = before.map(|(_, revision)| revision);
            records::replace_in_sync_set(&self.context, machine, epoch, revision, &set)
                .await
                .map_err(|error| error.to_string())
        };
        if let Err(error) = noted.await {
            tracing::warn!(%machine, error, "a checkpoint does not count for failovers");
        }
    }

    /// Shows the output that the machine's last checkpoint covers: a process in which it has just
    /// arrived, or one that did not hear it from a former agent, shows less. Whether that is known.
    async fn show_what_is_safe(&self, machine: &MachineName, record: &Record) -> bool {
        match records::in_sync_set(&*self.context.store, machine).await {
            Ok(Some((set, _)))
                if set
                    .held_output
                    .is_some_and(|held| held.life_unix_ms == record.started_unix_ms) =>
            {
                self.show_safe_output(machine, &set).await;
                true
            }
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(%machine, %error, "its output waits for a checkpoint");
                false
            }
        }
    }

    /// Makes a checkpoint and has other nodes fetch it; one that they could not fetch before is
    /// tried again first. Returns when it was begun, on CLOCK_BOOTTIME.
    async fn replicate_next(
        &self,
        machine: &MachineName,
        ha: &HighAvailability,
        unreplicated: &mut Option<Unreplicated>,
    ) -> Result<Duration, CommandError> {
        let next = match unreplicated.take() {
            Some(next) => next,
            None => self.make_for_replication(machine).await?,
        };
        let begun = next.begun();
        match self.replicate(machine, ha, &next).await {
            Ok(()) => Ok(begun),
            // The machine has another life: its checkpoint is of no use.
            Err(error @ CommandError::Conflict(_)) => Err(error),
            Err(error) => {
                *unreplicated = Some(next);
                Err(error)
            }
        }
    }
}

/// Marks a worker as watched until it is dropped.
struct Watching {
    checkpoints: Arc<Checkpoints>,
    worker: u64,
}

impl Watching {
    fn begin(checkpoints: &Arc<Checkpoints>, worker: &WorkerHandle) -> Option<Self> {
        let worker = worker.id();
        let mut all = checkpoints.scheduled();
        all.insert(worker).then(|| Watching {
            checkpoints: checkpoints.clone(),
            worker,
        })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.checkpoints.scheduled().remove(&self.worker);
    }
}

/// How long after a failed attempt the next one is made.
fn pause(every: Duration, failed: u32) -> Duration {
    // Doubles, so that an unreachable store is not asked each second.
    Duration::from_secs(1)
        .saturating_mul(2u32.saturating_pow(failed))
        .min(RETRY_MAX)
        .min(every)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a failure undoes is the time since the newest checkpoint that is safe began.
    #[test]
    fn no_more_than_an_interval_is_undone() {
        let ms = Duration::from_millis;
        let (every, mut lead) = (ms(1000), Lead::default());
        let mut pause = lead.pause(every, ms(100));
        for took in [100, 80, 100, 20, 74, 10, 10, 10, 300, 200] {
            // It fails just before the next one is safe.
            let undone = pause + ms(took);
            assert!(undone <= every || took == 300, "{undone:?}");
            assert!(undone >= ms(300));
            pause = lead.pause(every, ms(took));
        }
        assert_eq!(lead.pause(every, ms(5000)), ms(500));
        assert_eq!(Lead::default().pause(every, ms(0)), every);
    }

    #[test]
    fn failures_are_spaced() {
        let s = Duration::from_secs;
        assert_eq!(pause(s(600), 1), s(2));
        assert_eq!(pause(s(600), 3), s(8));
        assert_eq!(pause(s(600), 99), s(60));
        // The pause skips at most one checkpoint.
        assert_eq!(pause(s(2), 99), s(2));
    }
}
