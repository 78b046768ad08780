//! What a test starts as a machine.

use keel_api::{RunRequest, VolumeRequest};
use keel_machine::high_availability::HighAvailability;
use keel_machine::kind::{KindName, KindSpec};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Balancing, CheckpointPlan};
use std::path::Path;

/// A machine to start.
#[derive(Debug, Clone)]
pub struct Guest<'a> {
    /// Its name.
    pub name: &'a str,
    /// The node to start it on.
    pub node: &'a str,
    /// The module.
    pub module: &'a [u8],
    /// The program's arguments, without its name.
    pub args: &'a [&'a str],
    /// Limit of its memory, in bytes.
    pub memory_bytes: u64,
    /// A directory that it can reach, under the same name.
    pub volume: Option<&'a Path>,
    /// When it is restarted after its end.
    pub restart: Restart,
    /// Periodic checkpoints.
    pub checkpoints: Option<CheckpointPlan>,
    /// How it is kept available when its node fails.
    pub ha: Option<HighAvailability>,
    /// Its balancing policy.
    pub balancing: Balancing,
    /// Size of a volume of its own at `/tmp`.
    pub tmp_bytes: Option<u64>,
    /// The kind of another machine than a WebAssembly program, and its spec; module and arguments
    /// mean nothing then.
    pub kind: Option<(KindName, KindSpec)>,
}

impl<'a> Guest<'a> {
    /// A machine with the usual limits.
    pub fn new(name: &'a str, node: &'a str, module: &'a [u8], args: &'a [&'a str]) -> Self {
        Guest {
            name,
            node,
            module,
            args,
            memory_bytes: 4 << 30,
            volume: None,
            restart: Restart::No,
            checkpoints: None,
            ha: None,
            balancing: Balancing::default(),
            tmp_bytes: None,
            kind: None,
        }
    }

    /// The request that starts it, with its kind and the kind's spec.
    pub fn request(&self, (kind, kind_spec): (KindName, KindSpec)) -> RunRequest {
        RunRequest {
            name: Some(self.name.to_owned()),
            on: Some(self.node.to_owned()),
            kind,
            kind_spec,
            volumes: self
                .volume
                .iter()
                .map(|volume| VolumeRequest::Host {
                    host: volume.display().to_string(),
                    guest: volume.display().to_string(),
                    read_only: false,
                })
                .chain(self.tmp_bytes.map(|bytes| VolumeRequest::Tmp {
                    bytes,
                    inodes: None,
                    guest: "/tmp".into(),
                }))
                .collect(),
            memory_bytes: self.memory_bytes,
            cpu_limit_millis: None,
            output_bytes_per_s: 16 << 20,
            remove_at_end: false,
            restart: self.restart,
            checkpoints: self.checkpoints.clone(),
            ha: self.ha.clone(),
            balancing: self.balancing,
        }
    }
}
