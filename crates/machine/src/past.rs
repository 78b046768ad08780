//! Records as the version before this one wrote them: a cluster that is upgraded has
//! them in its store. They are read, and written anew whenever they change. What is
//! older is refused by name: versions are not skipped.

use crate::checkpoint::{CheckpointId, Origin};
use crate::moves::{Ending, FillReport, MoveReport, Round};
use crate::restart::Restart;
use crate::spec::{Record, Spec, Status, Volume};
use keel_cluster::{Epoch, MachineName, NodeName};
use serde::Deserialize;

/// The version that is read here.
pub(crate) const VERSION: u8 = 4;

/// Reads what stands behind the version.
pub(crate) fn decode(body: &[u8]) -> Result<Record, postcard::Error> {
    postcard::from_bytes::<PastRecord>(body).map(Record::from)
}

#[derive(Deserialize)]
struct PastRecord {
    name: MachineName,
    spec: PastSpec,
    owner: NodeName,
    epoch: Epoch,
    status: Status,
    since_unix_ms: u64,
    started_unix_ms: u64,
    stop_wanted: bool,
    restarts: u32,
    created_unix_ms: u64,
    paused: Option<String>,
    origin: Option<PastOrigin>,
    reports: Vec<PastReport>,
}

/// Without checkpoints that are made by themselves.
#[derive(Deserialize)]
struct PastSpec {
    module: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    volumes: Vec<Volume>,
    memory_bytes: u64,
    threads_max: u32,
    cpu_limit_millis: Option<u32>,
    output_bytes_per_s: u64,
    remove_at_end: bool,
    restart: Restart,
}

/// Without warm starts.
#[derive(Deserialize)]
struct PastOrigin {
    vault: String,
    machine: MachineName,
    id: Option<CheckpointId>,
    is_clone: bool,
}

/// Without what was foretold.
#[derive(Deserialize)]
struct PastReport {
    machine: MachineName,
    source: NodeName,
    target: NodeName,
    epoch: Epoch,
    started_unix_ms: u64,
    ending: Ending,
    offer_micros: u64,
    copy_micros: u64,
    rounds: Vec<Round>,
    slowed: bool,
    freeze_micros: u64,
    last_pages_micros: u64,
    last_bytes: u64,
    state_micros: u64,
    commit_micros: u64,
    resume_micros: u64,
    downtime_micros: u64,
    bytes: u64,
    total_micros: u64,
    fill: Option<FillReport>,
}

impl From<PastRecord> for Record {
    fn from(past: PastRecord) -> Self {
        Record {
            name: past.name,
            spec: past.spec.into(),
            owner: past.owner,
            epoch: past.epoch,
            status: past.status,
            since_unix_ms: past.since_unix_ms,
            started_unix_ms: past.started_unix_ms,
            stop_wanted: past.stop_wanted,
            restarts: past.restarts,
            created_unix_ms: past.created_unix_ms,
            paused: past.paused,
            origin: past.origin.map(Origin::from),
            reports: past.reports.into_iter().map(MoveReport::from).collect(),
        }
    }
}

impl From<PastSpec> for Spec {
    fn from(past: PastSpec) -> Self {
        Spec {
            module: past.module,
            args: past.args,
            env: past.env,
            volumes: past.volumes,
            memory_bytes: past.memory_bytes,
            threads_max: past.threads_max,
            cpu_limit_millis: past.cpu_limit_millis,
            output_bytes_per_s: past.output_bytes_per_s,
            remove_at_end: past.remove_at_end,
            restart: past.restart,
            checkpoints: None,
        }
    }
}

impl From<PastOrigin> for Origin {
    fn from(past: PastOrigin) -> Self {
        Origin {
            vault: past.vault,
            machine: past.machine,
            id: past.id,
            is_clone: past.is_clone,
            warm: false,
        }
    }
}

impl From<PastReport> for MoveReport {
    fn from(past: PastReport) -> Self {
        MoveReport {
            machine: past.machine,
            source: past.source,
            target: past.target,
            epoch: past.epoch,
            started_unix_ms: past.started_unix_ms,
            ending: past.ending,
            offer_micros: past.offer_micros,
            copy_micros: past.copy_micros,
            rounds: past.rounds,
            slowed: past.slowed,
            freeze_micros: past.freeze_micros,
            last_pages_micros: past.last_pages_micros,
            last_bytes: past.last_bytes,
            state_micros: past.state_micros,
            commit_micros: past.commit_micros,
            resume_micros: past.resume_micros,
            downtime_micros: past.downtime_micros,
            bytes: past.bytes,
            total_micros: past.total_micros,
            fill: past.fill,
            predicted: None,
        }
    }
}
