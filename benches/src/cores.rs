//! CPU affinity of processes: those of different nodes never share a core. The kernel otherwise
//! places two processes that run alternately on the same core if it can.

use anyhow::{Context, Result, ensure};
use std::process::Command;

/// Binds all threads of a process to cores, in the syntax of `taskset -c`; child processes inherit
/// the binding.
pub(crate) fn bind(pid: &str, cores: &str) -> Result<()> {
    let output = Command::new("taskset")
        .args(["-a", "-c", "-p", cores, pid])
        .output()
        .context("taskset (Debian: util-linux)")?;
    ensure!(
        output.status.success(),
        "taskset: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
