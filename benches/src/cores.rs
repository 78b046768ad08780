//! Which cores processes run on: what is on two nodes never shares one, and the kernel puts
//! two processes that take turns on the same core where it can.

use anyhow::{Context, Result, ensure};
use std::process::Command;

/// Binds all threads of a process to cores, as `taskset -c` names them; what it starts later
/// is bound as it is.
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
