//! What a test starts as a machine.

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
}
