//! Privileges, limits, clocks, cores and memory.

use super::Check;
use crate::output;
use procfs::Current;
use rustix::fs::{Access, access};
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;
use rustix::time::{ClockId, clock_gettime};

/// Open files of one machine's program, which are open in its worker.
const GUEST_FILES_MAX: u64 = 4096;
/// Further open files of a worker and an agent.
const OWN_FILES: u64 = 256;
/// Memory that a node reserves for itself.
const SPARE_BYTES: u64 = 256 << 20;
/// The nice value is 20 minus the resource limit.
const NICE_LIMIT_OF_MINUS_5: u64 = 25;

pub(super) fn checks() -> Vec<Check> {
    vec![
        rights(),
        files(),
        locked_memory(),
        boot_clock(),
        wall_clock(),
        cores(),
        memory(),
        virtualisation(),
    ]
}

fn rights() -> Check {
    let name = "rights";
    let why = "a node needs no root; the lease that keeps it alive is renewed at raised priority where it may be, so that a busy computer is not taken for a dead one";
    let user = rustix::process::geteuid();
    let who = if user.is_root() {
        "root".to_owned()
    } else {
        format!("user {}", user.as_raw())
    };
    let effective = match rustix::thread::capabilities(None) {
        Ok(sets) => sets.effective,
        Err(error) => {
            return Check::warn(
                name,
                why,
                format!("{who}; its capabilities are not known ({error})"),
                "Allow capget in the sandbox.",
            );
        }
    };
    let useful = [
        (CapabilitySet::SYS_NICE, "CAP_SYS_NICE"),
        (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
        (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
        (CapabilitySet::SYS_RESOURCE, "CAP_SYS_RESOURCE"),
    ];
    let names = |has: bool| {
        let names: Vec<&str> = useful
            .iter()
            .filter(|(capability, _)| effective.contains(*capability) == has)
            .map(|(_, name)| *name)
            .collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    };
    let found = format!("{who}; has {}; lacks {}", names(true), names(false));
    let nice = getrlimit(Resource::Nice)
        .current
        .is_none_or(|limit| limit >= NICE_LIMIT_OF_MINUS_5);
    if nice || effective.contains(CapabilitySet::SYS_NICE) {
        return Check::ok(name, why, found);
    }
    Check::warn(
        name,
        why,
        found,
        "Give it CAP_SYS_NICE, or LimitNICE=-5 in its systemd unit.",
    )
}

fn limit_word(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".into(), |limit| limit.to_string())
}

fn files() -> Check {
    let name = "open-files";
    let why = "each file that a machine's program opens is one of its worker, each machine some of the agent";
    let limit = getrlimit(Resource::Nofile);
    let found = format!(
        "{} (may be raised to {})",
        limit_word(limit.current),
        limit_word(limit.maximum)
    );
    let enough = OWN_FILES + GUEST_FILES_MAX;
    let remedy = format!("ulimit -n {enough}, or LimitNOFILE={enough} in its systemd unit.");
    match limit.current {
        Some(current) if current < OWN_FILES => Check::fail(name, why, found, remedy),
        Some(current) if current < enough => Check::warn(name, why, found, remedy),
        _ => Check::ok(name, why, found),
    }
}

fn locked_memory() -> Check {
    let limit = getrlimit(Resource::Memlock).current;
    Check::ok(
        "locked-memory",
        "an agent keeps its own memory from being taken back by the kernel where it may, so that it never waits for a disk; no WebAssembly machine locks any",
        limit.map_or_else(|| "unlimited".into(), output::bytes),
    )
}

fn boot_clock() -> Check {
    let name = "boot-clock";
    let why = "leases and timers continue while the computer sleeps";
    let seconds = |clock| {
        let now = clock_gettime(clock);
        now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
    };
    let monotonic = seconds(ClockId::Monotonic);
    let asleep = seconds(ClockId::Boottime) - monotonic;
    let found = format!("CLOCK_BOOTTIME; the computer slept {asleep:.0} s since it was started");
    // They are read one after the other, the later one second.
    if asleep >= 0.0 {
        return Check::ok(name, why, found);
    }
    Check::fail(
        name,
        why,
        format!("CLOCK_BOOTTIME is {:.3} s behind CLOCK_MONOTONIC", -asleep),
        "In a time namespace, give both clocks the same offset.",
    )
}

fn wall_clock() -> Check {
    let name = "wall-clock";
    let why = "no decision depends on it, but users compare times of several nodes, and tokens and certificates expire by it";
    let remedy = "Run chrony, systemd-timesyncd or another NTP client.";
    match keel_machine::clock_sync::is_synchronised() {
        Ok(true) => Check::ok(name, why, "synchronised"),
        Ok(false) => Check::warn(name, why, "not synchronised", remedy),
        Err(error) => Check::warn(name, why, format!("adjtimex: {error}"), remedy),
    }
}

fn cores() -> Check {
    Check::ok(
        "cores",
        "a node's capacity",
        std::thread::available_parallelism()
            .map_or_else(|error| error.to_string(), |cores| cores.to_string()),
    )
}

fn memory() -> Check {
    let name = "memory";
    let why = "a node accepts a machine only if 256 MiB remain free";
    match procfs::Meminfo::current() {
        Ok(memory) => {
            let available = memory.mem_available.unwrap_or(memory.mem_free);
            let found = format!(
                "{}, {} available",
                output::bytes(memory.mem_total),
                output::bytes(available)
            );
            if available > SPARE_BYTES {
                Check::ok(name, why, found)
            } else {
                Check::warn(name, why, found, "End what needs it, or add memory.")
            }
        }
        Err(error) => Check::warn(name, why, format!("/proc/meminfo: {error}"), "Mount /proc."),
    }
}

fn virtualisation() -> Check {
    let kvm = match access("/dev/kvm", Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => "/dev/kvm opens".to_owned(),
        Err(error) => format!("no /dev/kvm ({error})"),
    };
    let binary = format!("qemu-system-{}", std::env::consts::ARCH);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let qemu = std::env::split_paths(&path)
        .map(|folder| folder.join(&binary))
        .find(|program| access(program, Access::EXEC_OK).is_ok())
        .map_or_else(
            || format!("no {binary}"),
            |program| program.display().to_string(),
        );
    Check::ok(
        "virtualisation",
        "for your information: WebAssembly machines need neither",
        format!("{kvm}; {qemu}"),
    )
}
