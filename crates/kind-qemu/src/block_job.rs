//! QEMU's jobs that copy a machine's own disk: to the target of a move, or for a checkpoint.

use crate::qmp::{PATIENCE, QmpError};
use crate::vm::Vm;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How often QEMU is asked whether a job is gone.
const POLL: Duration = Duration::from_millis(5);

/// A job, with what it writes to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockJob {
    /// QEMU's name for the job.
    pub(crate) id: &'static str,
    /// QEMU's name for the disk that it writes.
    pub(crate) target: &'static str,
    /// QEMU's name for what the guest's writes pass while it runs.
    pub(crate) filter: &'static str,
}

/// The copy for the target of a move.
pub(crate) const COPY: BlockJob = BlockJob {
    id: "copy",
    target: "root-copy",
    filter: "root-mirror",
};

/// The copy for a checkpoint.
pub(crate) const BACKUP: BlockJob = BlockJob {
    id: "backup",
    target: "root-backup",
    filter: "root-before-write",
};

/// One of the answer to `query-block-jobs`.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct JobState {
    device: String,
    pub(crate) len: u64,
    pub(crate) offset: u64,
    pub(crate) ready: bool,
}

impl BlockJob {
    /// How far it is; `None` if it has ended.
    ///
    /// # Errors
    /// What QEMU says.
    pub(crate) fn state(&self, vm: &Vm) -> Result<Option<JobState>, QmpError> {
        let jobs: Vec<JobState> = vm.qmp()?.query("query-block-jobs")?;
        Ok(jobs.into_iter().find(|job| job.device == self.id))
    }

    /// Ends what is left of it, if there is something, and lets go of its target.
    ///
    /// # Errors
    /// If QEMU does not end it; it may yet.
    pub(crate) fn cancel(&self, vm: &Vm) -> Result<(), QmpError> {
        let qmp = vm.qmp()?;
        let deadline = Instant::now() + PATIENCE;
        while self.state(vm)?.is_some() {
            // It may have ended meanwhile.
            let _ = qmp.execute(
                "block-job-cancel",
                json!({ "device": self.id, "force": true }),
            );
            if Instant::now() > deadline {
                return Err(QmpError::Silent {
                    command: "block-job-cancel".into(),
                    patience: PATIENCE,
                });
            }
            std::thread::sleep(POLL);
        }
        let nodes: Vec<Value> = qmp.query("query-named-block-nodes")?;
        match nodes.iter().any(|node| node["node-name"] == self.target) {
            true => qmp.execute("blockdev-del", json!({ "node-name": self.target })),
            false => Ok(()),
        }
    }
}
