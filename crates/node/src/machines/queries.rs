//! Queries for machines, in the form that users see.

use super::handle::Machines;
use crate::error::CommandError;
use crate::events::Note;
use crate::records::{self, MachineCommand, at_owner};
use keel_api::{MachineInfo, StartPhaseInfo, VolumeInfo};
use keel_cluster::MachineName;
use keel_machine::kind::Kinds;
use keel_machine::log::LIFE_BYTES;
use keel_machine::spec::{Record, Status, Volume, VolumeKind};
use keel_machine::worker::control::{Report, StartProgress, State};
use keel_net::Fingerprint;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// How long a list waits for the progress report of a starting machine's worker.
const LIST_PATIENCE: Duration = Duration::from_millis(500);

/// Asks for the report of a machine's worker, if it has one that answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReportQuery {
    pub(crate) machine: MachineName,
}

impl MachineCommand for ReportQuery {
    const KIND: u16 = 0x032e;
    /// What users see without it is enough, and the node may have failed a moment ago.
    const PATIENCE: Duration = Duration::from_secs(3);
    type Answer = Option<Report>;

    fn machine(&self) -> &MachineName {
        &self.machine
    }
}

impl Machines {
    async fn report(&self, query: ReportQuery) -> Result<Option<Report>, CommandError> {
        at_owner(&self.context, query, |it| self.report_here(it)).await
    }

    pub(crate) async fn report_here(
        &self,
        query: ReportQuery,
    ) -> Result<Option<Report>, CommandError> {
        let worker = self.processes.machines.get(&query.machine);
        Ok(match worker {
            Some(worker) => worker.report().await.ok(),
            None => None,
        })
    }

    /// One machine, with the report of its worker.
    ///
    /// # Errors
    /// [`CommandError`] if there is no such machine.
    pub(crate) async fn inspect(
        self: &Arc<Self>,
        machine: &MachineName,
    ) -> Result<MachineInfo, CommandError> {
        inspect(self, machine).await
    }

    /// All machines; starting ones with the progress of their workers.
    ///
    /// # Errors
    /// [`CommandError`] if the store does not answer.
    pub(crate) async fn list(self: &Arc<Self>) -> Result<Vec<MachineInfo>, CommandError> {
        list(self).await
    }
}

/// A machine's volumes, with their contents while it runs.
fn volume_infos(record: &Record, report: Option<&Report>) -> Vec<VolumeInfo> {
    let held = |number: u32| {
        let volumes = report.map_or(&[][..], |report| &report.volumes);
        volumes.iter().find(|volume| volume.number == number)
    };
    let info = |(number, volume): (u32, &Volume)| VolumeInfo {
        guest: volume.guest.clone(),
        read_only: volume.read_only,
        kind: match &volume.kind {
            VolumeKind::Host { path } => path.clone(),
            VolumeKind::Tmp { .. } => "tmp".into(),
            VolumeKind::Cluster { name, .. } => format!("cluster:{name}"),
        },
        bytes_max: match volume.kind {
            VolumeKind::Tmp { bytes, .. } | VolumeKind::Cluster { bytes, .. } => Some(bytes),
            VolumeKind::Host { .. } => None,
        },
        bytes: held(number).map(|held| held.bytes),
        inodes: held(number).map(|held| held.inodes),
    };
    (0..).zip(&record.spec.volumes).map(info).collect()
}

/// A machine in the form that users see.
pub(super) fn info(kinds: &Kinds, record: &Record, report: Option<&Report>) -> MachineInfo {
    // A machine of a kind that this node lacks runs elsewhere.
    let kind = kinds.of(&record.spec).ok();
    let running = report
        .filter(|report| matches!(report.state, State::Running { .. } | State::Filling { .. }));
    let guest_memory = running.and_then(|report| report.guest_memory);
    MachineInfo {
        name: record.name.to_string(),
        node: record.owner.to_string(),
        status: match record.status {
            // Users need not see the difference: the agent's preparation is internal.
            Status::Scheduled => "starting".into(),
            _ => record.word(),
        },
        phase: report.and_then(|report| report.start).map(phase),
        started_unix_ms: record.started_unix_ms,
        exit_code: match record.status {
            Status::Exited { code } => Some(code),
            _ => None,
        },
        message: match &record.status {
            Status::Trapped { message } => Some(message.clone()),
            Status::Failed { reason } | Status::Restarting { reason, .. } => Some(reason.clone()),
            Status::Running => record.paused.clone(),
            _ => None,
        },
        epoch: record.epoch.to_string(),
        created_unix_ms: record.created_unix_ms,
        kind: record.spec.kind.clone(),
        program: kind.map_or_else(String::new, |kind| kind.summary(&record.spec)),
        kind_spec: kind.map_or(serde_json::Value::Null, |kind| kind.shown(&record.spec)),
        ready_on: Vec::new(),
        volumes: volume_infos(record, running),
        memory_limit_bytes: record.spec.memory_bytes,
        output_bytes_per_s: record.spec.output_bytes_per_s,
        remove_at_end: record.spec.remove_at_end,
        created_from: record.origin.as_ref().map(Note::origin),
        cpu_limit_millis: record.spec.cpu_limit_millis,
        restart: record.spec.restart,
        checkpoints: record.spec.checkpoints.clone(),
        ha: record.spec.ha.clone(),
        in_sync: Vec::new(),
        balancing: record.spec.balancing,
        restarts: record.restarts,
        since_unix_ms: record.since_unix_ms,
        memory_bytes: running.map(|report| report.memory_bytes),
        memory_available_bytes: guest_memory.and_then(|it| it.available_bytes),
        memory_given_back_bytes: guest_memory.map(|it| it.given_back_bytes),
        threads: running.map(|report| report.threads),
        cpu_micros: running.map(|report| report.cpu_micros),
        pid: running.map(|report| report.pid),
        output_bytes: running.map(|report| report.log.1 % LIFE_BYTES),
        held_output_bytes: running.map(|report| report.held_bytes),
        cgroup: running.and_then(|report| report.group.clone()),
        moves: record.reports.clone(),
    }
}

fn phase(start: StartProgress) -> StartPhaseInfo {
    StartPhaseInfo {
        name: start.phase.word().into(),
        percent: start.percent,
        elapsed_ms: start.elapsed_ms,
    }
}

async fn inspect(
    machines: &Arc<Machines>,
    machine: &MachineName,
) -> Result<MachineInfo, CommandError> {
    let record = records::get(&*machines.context.store, machine)
        .await?
        .record;
    let report = report(machines, machine).await;
    let mut info = info(&machines.context.kinds, &record, report.as_ref());
    if let Some((set, _)) = records::in_sync_set(&*machines.context.store, machine).await? {
        info.in_sync = set.members.iter().map(ToString::to_string).collect();
    }
    if let Some(program) = report.and_then(|report| report.program) {
        let nodes = machines.code.locations.nodes_with(&Fingerprint(program));
        info.ready_on = nodes.iter().map(ToString::to_string).collect();
    }
    Ok(info)
}

/// The report of a machine's worker; `None` if its node does not answer in time.
async fn report(machines: &Arc<Machines>, machine: &MachineName) -> Option<Report> {
    let machine = machine.clone();
    let report = machines.report(ReportQuery { machine }).await;
    report.unwrap_or_default()
}

/// All machines; starting ones with the reports of their workers.
async fn list(machines: &Arc<Machines>) -> Result<Vec<MachineInfo>, CommandError> {
    let records = records::all(&*machines.context.store).await?;
    let infos = records.iter().map(|record| async move {
        let starts = matches!(record.status, Status::Scheduled | Status::Restarting { .. });
        let asked = report(machines, &record.name);
        let report = match starts {
            true => tokio::time::timeout(LIST_PATIENCE, asked).await,
            false => Ok(None),
        };
        info(
            &machines.context.kinds,
            record,
            report.ok().flatten().as_ref(),
        )
    });
    Ok(futures::future::join_all(infos).await)
}
