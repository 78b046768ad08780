//! Records of machines.

use keel_cluster::{Epoch, MachineName, NodeName};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Balancing, Record, Spec, Status};

/// A record as written at creation.
pub(crate) fn new(name: MachineName, owner: NodeName, restart: Restart) -> Record {
    Record {
        name,
        spec: Spec {
            module: String::new(),
            args: vec!["m".into()],
            env: Vec::new(),
            volumes: Vec::new(),
            memory_bytes: 1 << 20,
            threads_max: 1,
            cpu_limit_millis: None,
            output_bytes_per_s: 1 << 20,
            remove_at_end: false,
            restart,
            checkpoints: None,
            balancing: Balancing::default(),
        },
        owner,
        epoch: Epoch {
            incarnation: 1,
            counter: 0,
        },
        status: Status::Scheduled,
        since_unix_ms: 0,
        started_unix_ms: 0,
        stop_wanted: false,
        restarts: 0,
        created_unix_ms: 0,
        paused: None,
        origin: None,
        reports: Vec::new(),
    }
}
