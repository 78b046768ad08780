//! Questions to this host's QEMU: one without a machine is started for each, and answers in less than
//! 100 ms.

use crate::arguments::{QMP_FD, SANDBOX};
use crate::process::{QEMU, die_with_parent};
use crate::qmp::{PATIENCE, Qmp, QmpError};
use command_fds::{CommandFdExt, FdMapping};
use serde_json::json;
use std::io;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

/// Asks a QEMU that is started with these arguments. Blocks.
///
/// # Errors
/// If it cannot be started, or what it says.
pub(crate) fn ask<T>(
    arguments: &[&str],
    question: impl FnOnce(&Qmp) -> Result<T, QmpError>,
) -> Result<T, String> {
    let failed = |error: io::Error| format!("{QEMU} cannot be started: {error}");
    let (ours, of_qemu) = UnixStream::pair().map_err(failed)?;
    let mut command = Command::new(QEMU);
    command
        .args(SANDBOX)
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-S"])
        .args(["-machine", "none"])
        .args(arguments)
        .args(["-chardev", &format!("socket,id=qmp,fd={QMP_FD}")])
        .args(["-mon", "chardev=qmp,mode=control"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .fd_mappings(vec![FdMapping {
            parent_fd: of_qemu.into(),
            child_fd: QMP_FD,
        }])
        .map_err(|error| failed(io::Error::other(error)))?;
    die_with_parent(&mut command);
    let mut qemu = command.spawn().map_err(failed)?;
    // QEMU alone keeps its end open.
    drop(command);
    let answer = Qmp::connect(ours, PATIENCE, |_| {}).and_then(|qmp| question(&qmp));
    let _ = qemu.kill();
    let _ = qemu.wait();
    answer.map_err(|error| error.to_string())
}

/// Checks that the memory of a guest may come after it on this host, which needs the kernel's
/// `userfaultfd`. Blocks.
///
/// # Errors
/// What is missing, and the remedy.
pub(crate) fn check_post_copy() -> Result<(), String> {
    let capability = json!([{ "capability": "postcopy-ram", "state": true }]);
    let capabilities = json!({ "capabilities": capability });
    // It looks what the host has where it is the target.
    let set = ask(&["-accel", "tcg", "-incoming", "defer"], |qmp| {
        qmp.execute("migrate-set-capabilities", capabilities)
    });
    set.map_err(|error| {
        format!("{error}; userfaultfd is needed (as root, or with vm.unprivileged_userfaultfd=1)")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::is_installed;

    #[test]
    fn an_answer_is_of_this_hosts_qemu() {
        if !is_installed() {
            eprintln!("skipped: {QEMU} is not installed");
            return;
        }
        let version: serde_json::Value =
            ask(&["-accel", "tcg"], |qmp| qmp.query("query-version")).unwrap();
        assert!(version["qemu"]["major"].as_u64().unwrap() >= 7);
        let refused = ask(&["-accel", "tcg"], |qmp| {
            qmp.execute("no-command", json!({}))
        });
        assert!(refused.unwrap_err().contains("no-command"));
        // Tests run where moves do.
        if let Err(missing) = check_post_copy() {
            assert!(missing.contains("userfaultfd"), "{missing}");
        }
    }
}
