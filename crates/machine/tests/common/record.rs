//! Records of machines.

use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::kind::KindSpec;
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Balancing, Record, Spec, Status};

/// The memory limit of a new machine.
pub(crate) const MEMORY_BYTES: u64 = 1 << 20;

/// A record as written at creation.
pub(crate) fn new(name: MachineName, owner: NodeName, restart: Restart) -> Record {
    Record {
        name,
        spec: Spec {
            kind: "wasm".parse().unwrap(),
            kind_spec: KindSpec::default(),
            volumes: Vec::new(),
            memory_bytes: MEMORY_BYTES,
            cpu_limit_millis: None,
            output_bytes_per_s: 1 << 20,
            remove_at_end: false,
            restart,
            checkpoints: None,
            ha: None,
            balancing: Balancing::default(),
        },
        owner,
        epoch: Epoch {
            incarnation: 1,
            counter: 0,
        },
        incarnation: 0,
        status: Status::Scheduled,
        since_unix_ms: 0,
        started_unix_ms: 0,
        stop_wanted: false,
        restarts: 0,
        failovers: 0,
        left_elsewhere: false,
        created_unix_ms: 0,
        paused: None,
        origin: None,
        reports: Vec::new(),
    }
}
