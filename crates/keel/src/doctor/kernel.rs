//! Kernel features. Each is tried where possible: version numbers say little about kernels with
//! patches, sandboxes and containers.

use super::Check;
use keel_wasm::memory::Unavailable;
use nix::sys::signal::{SigEvent, SigevNotify};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::time::Duration;

/// The oldest kernel with all required features (pidfd_open).
const VERSION_MIN: (u32, u32) = (5, 3);
/// The first kernel with all features for fast moves.
const VERSION_FULL: (u32, u32) = (6, 7);

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![version()];
    checks.extend(memory());
    checks.extend([pidfd(), timers(), pressure()]);
    checks
}

fn version() -> Check {
    let why = "Linux 6.7 added fast detection of written pages";
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let found = format!("{} {release}", uname.sysname().to_string_lossy());
    match parse_version(&release) {
        Some(version) if version >= VERSION_FULL => Check::ok("kernel", why, found),
        Some(version) if version < VERSION_MIN => {
            Check::fail("kernel", why, found, "Use Linux 5.3 or newer.")
        }
        _ => Check::warn(
            "kernel",
            why,
            found,
            "Use Linux 6.7 or newer; older ones work, with longer moves.",
        ),
    }
}

/// Major and minor version of a release such as `6.1.0-18-amd64`.
fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// memfd, and the features of userfaultfd.
fn memory() -> Vec<Check> {
    let memory = "each memory of a machine is one";
    let offered = match keel_wasm::memory::probe() {
        Ok(offered) => offered,
        Err(error) => {
            return vec![Check::fail(
                "memfd",
                memory,
                error.to_string(),
                "Allow memfd_create in the sandbox, and some GiB of address space (ulimit -v).",
            )];
        }
    };
    let moves =
        "without it, moves and checkpoints find written pages by hashing: correct, but slower";
    let parts = "spanning machines and post-copy moves need it";
    vec![
        Check::ok("memfd", memory, "memfd_create works"),
        tried(
            "userfaultfd",
            moves,
            "opens for user code",
            offered.userfaultfd,
        ),
        tried(
            "write-protection",
            moves,
            "asynchronous, on shared memory",
            offered.write_protection,
        ),
        tried("pagemap-scan", moves, "answers", offered.pagemap_scan),
        tried(
            "missing-faults",
            parts,
            "served on shared memory",
            offered.missing_faults,
        ),
        tried(
            "minor-faults",
            parts,
            "served on shared memory",
            offered.minor_faults,
        ),
    ]
}

fn tried(
    name: &'static str,
    why: &'static str,
    works: &str,
    result: Result<(), Unavailable>,
) -> Check {
    match result {
        Ok(()) => Check::ok(name, why, works),
        Err(missing) => Check::warn(name, why, missing.to_string(), missing.remedy()),
    }
}

fn pidfd() -> Check {
    let why = "the agent must know for certain that a machine's process is gone";
    let tried = pidfd_open(getpid(), PidfdFlags::empty()).and_then(|process| {
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        poll(&mut ended, Some(&Timespec::default()))
    });
    match tried {
        // This process is alive, so there is nothing to read.
        Ok(0) => Check::ok("pidfd", why, "opens and is polled"),
        Ok(_) => Check::fail(
            "pidfd",
            why,
            "reports a live process as ended",
            "Use another kernel.",
        ),
        Err(error) => Check::fail(
            "pidfd",
            why,
            format!("pidfd_open: {error}"),
            "Allow it in the sandbox; Linux 5.3 or newer has it.",
        ),
    }
}

fn timers() -> Check {
    let name = "boot-timers";
    let why = "a machine that may be started elsewhere must end on time here, even when it is stopped or the computer slept";
    let event = SigEvent::new(SigevNotify::SigevNone);
    let tried = Timer::new(ClockId::CLOCK_BOOTTIME, event).and_then(|mut timer| {
        let hour = Duration::from_secs(3600);
        timer.set(Expiration::OneShot(hour.into()), TimerSetTimeFlags::empty())?;
        timer.get()
    });
    match tried {
        Ok(Some(_)) => Check::ok(name, why, "CLOCK_BOOTTIME timers are armed"),
        Ok(None) => Check::warn(
            name,
            why,
            "a timer was not armed",
            "Use another kernel before machines are to be restarted elsewhere.",
        ),
        Err(error) => Check::warn(
            name,
            why,
            format!("timer_create: {error}"),
            "Allow POSIX timers on CLOCK_BOOTTIME in the sandbox.",
        ),
    }
}

fn pressure() -> Check {
    let name = "pressure";
    let why = "load includes pressure: without it a node that waits for memory or disks seems idle";
    let missing: Vec<&str> = ["cpu", "memory", "io"]
        .into_iter()
        .filter(|what| std::fs::read_to_string(format!("/proc/pressure/{what}")).is_err())
        .collect();
    if missing.is_empty() {
        return Check::ok(name, why, "cpu, memory, io");
    }
    Check::warn(
        name,
        why,
        format!("/proc/pressure lacks {}", missing.join(", ")),
        "Boot a kernel with CONFIG_PSI, with psi=1 on its command line.",
    )
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn reads_versions() {
        assert_eq!(parse_version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse_version("6.18.44-custom"), Some((6, 18)));
        assert_eq!(parse_version("5.3"), Some((5, 3)));
        for odd in ["", "six", "6", "v6.1"] {
            assert_eq!(parse_version(odd), None, "{odd}");
        }
    }
}
