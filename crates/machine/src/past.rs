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

#[cfg(test)]
mod tests {
    use super::*;

    /// A record as a node of that version wrote it.
    const WRITTEN: &str = "\
         0164403033313066303962626565643065653365316338616534353233626432303136613231313939613932\
         353939376333383261663365343965656539626538383705096469736b2e7761736d042f746d700132013002\
         3230000101808080048008042f746d700080808080108002008080800800000161010101f8c9f7d29f34f8c9\
         f7d29f340000a2c8f7d29f34000000\
         ";

    fn bytes() -> Vec<u8> {
        let digits: Vec<u8> = WRITTEN.trim().bytes().collect();
        let byte = |pair: &[u8]| {
            let text = std::str::from_utf8(pair).unwrap();
            u8::from_str_radix(text, 16).unwrap()
        };
        let mut bytes = vec![VERSION];
        bytes.extend(digits.chunks(2).map(byte));
        bytes
    }

    #[test]
    fn a_record_of_the_version_before_is_read_and_written_anew() {
        let record = Record::decode(&bytes()).unwrap();
        assert_eq!((record.name.as_ref(), record.owner.as_ref()), ("d", "a"));
        assert_eq!(record.spec.args, ["disk.wasm", "/tmp", "2", "0", "20"]);
        assert_eq!(record.status, Status::Running);
        assert_eq!(record.spec.own_volumes(), [0]);
        assert_eq!(record.spec.memory_bytes, 4 << 30);
        assert_eq!(
            (record.spec.checkpoints.clone(), record.origin.clone()),
            (None, None)
        );
        let anew = record.encode().unwrap();
        assert_ne!(anew[0], VERSION);
        assert_eq!(Record::decode(&anew).unwrap(), record);
    }

    #[test]
    fn cut_anywhere_it_is_no_record_and_older_ones_are_named() {
        let bytes = bytes();
        for end in 1..bytes.len() {
            assert!(Record::decode(&bytes[..end]).is_err(), "{end}");
        }
        let mut older = bytes;
        older[0] = VERSION - 1;
        let error = Record::decode(&older).unwrap_err();
        assert!(error.contains("one version at a time"), "{error}");
    }
}
