//! What the version before this one wrote: a cluster that is upgraded has its records
//! in the store, and its checkpoints (`checkpoint::previous_version`). They are read, and
//! written anew whenever they change. What is older is refused by name: versions are not
//! skipped.

use crate::checkpoint::origin::Origin;
use crate::moves::MoveReport;
use crate::restart::Restart;
use crate::spec::{BalanceBy, Balancing, CheckpointPlan, Record, Spec, Status, Volume};
use keel_cluster::{Epoch, MachineName, NodeName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The version of records that is read here.
pub(crate) const VERSION: u8 = 6;

/// Reads what stands behind a record's version.
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
    origin: Option<Origin>,
    reports: Vec<MoveReport>,
}

/// Without parts.
#[derive(Deserialize)]
pub(crate) struct PastSpec {
    plain: PlainSpec,
    balancing: PastBalancing,
}

#[derive(Deserialize)]
struct PastBalancing {
    by: BalanceBy,
    cpu_target_millis: Option<u32>,
    memory_target_bytes: Option<u64>,
    io_target_bytes_per_s: Option<u64>,
}

/// Without what balancing makes of it. (Fields stand one behind the other: a struct
/// within another is as if its fields were that one's.)
#[derive(Serialize, Deserialize)]
struct PlainSpec {
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
    checkpoints: Option<CheckpointPlan>,
}

/// A spec in a message to a worker or another node: neither needs to know what balancing makes of the machine.
pub mod spec_for_others {
    use super::*;

    /// Writes it.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(spec: &Spec, serializer: S) -> Result<S::Ok, S::Error> {
        PlainSpec::from(spec.clone()).serialize(serializer)
    }

    /// Reads it.
    ///
    /// # Errors
    /// The deserializer's.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Spec, D::Error> {
        PlainSpec::deserialize(deserializer).map(Spec::from)
    }
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
            origin: past.origin,
            reports: past.reports,
        }
    }
}

impl From<PastSpec> for Spec {
    fn from(past: PastSpec) -> Self {
        let PastBalancing {
            by,
            cpu_target_millis,
            memory_target_bytes,
            io_target_bytes_per_s,
        } = past.balancing;
        Spec {
            balancing: Balancing {
                by,
                cpu_target_millis,
                memory_target_bytes,
                io_target_bytes_per_s,
                ..Balancing::default()
            },
            ..past.plain.into()
        }
    }
}

impl From<PlainSpec> for Spec {
    fn from(past: PlainSpec) -> Self {
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
            checkpoints: past.checkpoints,
            balancing: Balancing::default(),
        }
    }
}

impl From<Spec> for PlainSpec {
    fn from(spec: Spec) -> Self {
        PlainSpec {
            module: spec.module,
            args: spec.args,
            env: spec.env,
            volumes: spec.volumes,
            memory_bytes: spec.memory_bytes,
            threads_max: spec.threads_max,
            cpu_limit_millis: spec.cpu_limit_millis,
            output_bytes_per_s: spec.output_bytes_per_s,
            remove_at_end: spec.remove_at_end,
            restart: spec.restart,
            checkpoints: spec.checkpoints,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A record as a node of that version wrote it.
    const WRITTEN: &str = "\
         0601644030333130663039626265656430656533653163386165343532336264323031366132313139396139\
         32353939376333383261663365343965656539626538383705096469736b2e7761736d042f746d7001320130\
         023230000101808080048008042f746d70008080808010800201dc0b80808008000001d80401072f6261636b\
         7570010300020190030001050161010101f8c9f7d29f34f8c9f7d29f340000a2c8f7d29f340001022f760165\
         00010101016d016e016e00000000000000000000000000000000000000\
         ";
    pub(crate) fn bytes(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.trim().bytes().collect();
        let byte = |pair: &[u8]| {
            let text = std::str::from_utf8(pair).unwrap();
            u8::from_str_radix(text, 16).unwrap()
        };
        digits.chunks(2).map(byte).collect()
    }

    /// What stands in both, the record and the checkpoint.
    pub(crate) fn promised() -> Balancing {
        Balancing {
            by: BalanceBy::Target,
            cpu_target_millis: Some(400),
            io_target_bytes_per_s: Some(5),
            ..Balancing::default()
        }
    }

    #[test]
    fn a_record_of_the_version_before_is_read_and_written_anew() {
        let record = Record::decode(&bytes(WRITTEN)).unwrap();
        assert_eq!((record.name.as_ref(), record.owner.as_ref()), ("d", "a"));
        assert_eq!(record.spec.args, ["disk.wasm", "/tmp", "2", "0", "20"]);
        assert_eq!(record.status, Status::Running);
        assert_eq!(record.spec.own_volumes(), [0]);
        assert_eq!(record.spec.memory_bytes, 4 << 30);
        assert_eq!(record.spec.cpu_limit_millis, Some(1500));
        assert_eq!(record.spec.checkpoints.as_ref().unwrap().every_s, 600);
        let origin = record.origin.as_ref().unwrap();
        assert_eq!(origin.memory, crate::checkpoint::MemoryRestore::Lazy);
        assert_eq!(record.reports.len(), 1);
        assert_eq!(record.spec.balancing, promised());
        let anew = record.encode().unwrap();
        assert_ne!(anew[0], VERSION);
        assert_eq!(Record::decode(&anew).unwrap(), record);
    }

    /// A spec in a message is what every version knows of it, and what follows it is found.
    #[test]
    fn a_spec_in_a_message_is_as_it_was() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Message {
            #[serde(with = "spec_for_others")]
            spec: Spec,
            behind: [u64; 3],
        }
        let mut spec = Record::decode(&bytes(WRITTEN)).unwrap().spec;
        let message = Message {
            spec: spec.clone(),
            behind: [1, 2, 3],
        };
        let written = postcard::to_stdvec(&message).unwrap();
        // A name of one letter stands before the spec in the record.
        let of_past = &bytes(WRITTEN)[1 + 2..];
        let length = written.len() - 3;
        assert_eq!(written[..length], of_past[..length]);
        spec.balancing.cpu_target_millis = Some(1);
        let message = Message { spec, ..message };
        assert_eq!(postcard::to_stdvec(&message).unwrap(), written);
        let read: Message = postcard::from_bytes(&written).unwrap();
        assert_eq!(read.behind, [1, 2, 3]);
    }

    #[test]
    fn cut_anywhere_it_is_no_record_and_older_ones_are_named() {
        let bytes = bytes(WRITTEN);
        for end in 1..bytes.len() {
            assert!(Record::decode(&bytes[..end]).is_err(), "{end}");
        }
        let mut older = bytes;
        older[0] = VERSION - 1;
        let error = Record::decode(&older).unwrap_err();
        assert!(error.contains("one version at a time"), "{error}");
    }
}
