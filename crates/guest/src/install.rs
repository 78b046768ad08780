//! Makes the agent a service of the system in which it runs: of systemd or OpenRC. In a system that
//! has neither it is only started.

use crate::programs;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where the program is kept.
const PROGRAM: &str = "/usr/local/sbin/keel-guest";

/// Its service in systemd, with the place.
const SYSTEMD_UNIT: (&str, &str) = (
    "/etc/systemd/system/keel-guest.service",
    "[Unit]
Description=Guest agent of Evenkeel

[Service]
ExecStart=/usr/local/sbin/keel-guest run
# What it has started goes on without it.
KillMode=process
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
",
);

/// Its service in OpenRC, with the place.
const OPENRC_SCRIPT: (&str, &str) = (
    "/etc/init.d/keel-guest",
    "#!/sbin/openrc-run
description=\"Guest agent of Evenkeel\"
supervisor=supervise-daemon
command=/usr/local/sbin/keel-guest
command_args=run
",
);

/// Copies this program into the system, and has it run from now on.
///
/// # Errors
/// If a file cannot be written, or the system's manager of services refuses.
pub fn install() -> Result<()> {
    copy_program(Path::new(PROGRAM))?;
    // Where SELinux is, a program needs the label of its place.
    if programs::find("restorecon").is_some() {
        check(&["restorecon", PROGRAM])?;
    }
    if Path::new("/run/systemd/system").is_dir() {
        let (path, text) = SYSTEMD_UNIT;
        write(Path::new(path), text.as_bytes(), 0o644)?;
        check(&["systemctl", "daemon-reload"])?;
        check(&["systemctl", "enable", "keel-guest.service"])?;
        check(&["systemctl", "restart", "keel-guest.service"])
    } else if Path::new("/sbin/openrc-run").exists() {
        let (path, text) = OPENRC_SCRIPT;
        write(Path::new(path), text.as_bytes(), 0o755)?;
        check(&["rc-update", "add", "keel-guest", "default"])?;
        check(&["rc-service", "keel-guest", "restart"])
    } else {
        let mut command = Command::new(PROGRAM);
        command.arg("run").stdin(Stdio::null());
        command.spawn().context(PROGRAM)?;
        println!(
            "keel-guest: this system has neither systemd nor OpenRC: `{PROGRAM} run` was started, and \
             nothing starts it at the next boot"
        );
        Ok(())
    }
}

fn copy_program(to: &Path) -> Result<()> {
    let program = fs::read("/proc/self/exe").context("cannot read this program")?;
    write(to, &program, 0o755)
}

/// Replaces a file at once, for it may run, and so that a loss of power leaves one or the other: cloud-init
/// does not install it again.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let folder = path.parent().context("a file has a folder")?;
    let fresh = path.with_extension("new");
    let replace = || {
        fs::create_dir_all(folder)?;
        let mut file = File::create(&fresh)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        drop(file);
        fs::rename(&fresh, path)?;
        File::open(folder)?.sync_all()
    };
    replace().with_context(|| format!("cannot write {}", path.display()))
}

fn check(words: &[&str]) -> Result<()> {
    let (program, arguments) = words.split_first().context("a program")?;
    let status = Command::new(program).args(arguments).status();
    let status = status.with_context(|| format!("cannot start {program}"))?;
    if !status.success() {
        bail!("`{}` fails: {status}", words.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_replaced_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sbin/keel-guest");
        for _ in 0..2 {
            copy_program(&path).unwrap();
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o755);
            let own = fs::read("/proc/self/exe").unwrap();
            assert!(fs::read(&path).unwrap() == own);
        }
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn services_start_what_was_copied() {
        for (_, text) in [SYSTEMD_UNIT, OPENRC_SCRIPT] {
            assert!(text.contains(PROGRAM), "{text}");
        }
    }
}
