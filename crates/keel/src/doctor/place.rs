//! The node's folder, the ports that it listens on, and its agent.

use super::Check;
use crate::output;
use crate::up::DEFAULT_LISTEN;
use keel_api::{Client, ClientError, ClusterInfo};
use keel_node::Addresses;
use procfs::process::{FDTarget, MountInfo, Process, all_processes};
use rustix::fs::{Access, access, statvfs};
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an agent may take to answer.
const AGENT_PATIENCE: Duration = Duration::from_secs(10);
/// Below this room, the store may fail at any time.
const FREE_BYTES_MIN: u64 = 64 << 20;
/// Below this room, space is short for modules, compiled code, output and checkpoints.
const FREE_BYTES_GOOD: u64 = 1 << 30;
/// The most bytes in the path of a Unix socket.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// The most bytes in the name of a machine.
const NAME_BYTES_MAX: usize = 63;

const WHY_FOLDER: &str = "identity, store, modules, output and checkpoints are kept there";

pub(super) fn checks(
    folder: &Path,
    listen: Option<SocketAddr>,
    api: Option<SocketAddr>,
) -> Vec<Check> {
    let mut checks = vec![state_dir(folder), socket_paths(folder)];
    let known = keel_node::addresses(folder);
    if let Err(error) = &known {
        checks.push(Check::fail(
            "settings",
            "the agent does not start without them",
            error.to_string(),
            "Restore the file from a copy, or join the cluster again with an empty folder.",
        ));
    }
    let known = known.ok().flatten();
    let (known_listen, known_api) = match &known {
        Some(Addresses { listen, api }) => (Some(*listen), *api),
        None => (None, None),
    };
    let listen = listen
        .or(known_listen)
        .or_else(|| DEFAULT_LISTEN.parse().ok());
    if let Some(address) = listen {
        checks.push(port(
            "port",
            "other nodes reach this one there",
            address,
            folder,
        ));
    }
    if let Some(address) = api.or(known_api) {
        checks.push(port(
            "api-port",
            "users reach this node there",
            address,
            folder,
        ));
    }
    checks
}

// ── the folder ──────────────────────────────────────────────────────────

fn state_dir(folder: &Path) -> Check {
    let name = "state-dir";
    let shown = folder.display();
    let metadata = match std::fs::metadata(folder) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return absent(folder),
        Err(error) => {
            return Check::fail(
                name,
                WHY_FOLDER,
                format!("{shown}: {error}"),
                "Name another with --state-dir, or run as the user that it belongs to.",
            );
        }
    };
    if !metadata.is_dir() {
        return Check::fail(
            name,
            WHY_FOLDER,
            format!("{shown} is no directory"),
            "Name another with --state-dir.",
        );
    }
    if let Err(error) = try_write(folder) {
        return Check::fail(
            name,
            WHY_FOLDER,
            format!("{shown} cannot be written: {error}"),
            "Run as the user that it belongs to, and see that its filesystem is not read-only or full.",
        );
    }
    let mount = mount_of(folder);
    let kind = mount
        .as_ref()
        .map_or("an unknown filesystem", |mount| mount.fs_type.as_str());
    let free = statvfs(folder).map_or(u64::MAX, |space| {
        space.f_bavail.saturating_mul(space.f_frsize)
    });
    let found = format!("{shown}, {} free on {kind}", output::bytes(free));
    if free < FREE_BYTES_MIN {
        return Check::fail(
            name,
            WHY_FOLDER,
            found,
            "Make room, or name another with --state-dir.",
        );
    }
    if let Some(remedy) = unfit(kind) {
        return Check::warn(name, WHY_FOLDER, found, remedy);
    }
    if free < FREE_BYTES_GOOD {
        return Check::warn(name, WHY_FOLDER, found, "Make room: 1 GiB or more.");
    }
    let others = metadata.mode() & 0o077;
    if others != 0 {
        return Check::warn(
            name,
            WHY_FOLDER,
            format!("{found}; other users can read it"),
            format!(
                "chmod 700 {shown}: it has keys, and its socket gives full control of the node."
            ),
        );
    }
    Check::ok(name, WHY_FOLDER, found)
}

/// Why a filesystem is unsuitable for a node's folder.
fn unfit(kind: &str) -> Option<&'static str> {
    match kind {
        "tmpfs" | "ramfs" => {
            Some("Name a folder on a disk with --state-dir: all of this is gone after a restart.")
        }
        "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "ceph" | "glusterfs" | "fuse.sshfs"
        | "fuse.glusterfs" => Some(
            "Name a folder on a local disk with --state-dir: the store needs locks and writes that last.",
        ),
        _ => None,
    }
}

/// A folder that `keel up` would create.
fn absent(folder: &Path) -> Check {
    let name = "state-dir";
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    let parent = absolute
        .ancestors()
        .find(|ancestor| ancestor.exists())
        .unwrap_or(Path::new("/"));
    let shown = folder.display();
    match access(parent, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) if parent.is_dir() => Check::ok(
            name,
            WHY_FOLDER,
            format!("{shown} does not exist yet; `keel up` makes it"),
        ),
        _ => Check::fail(
            name,
            WHY_FOLDER,
            format!(
                "{shown} does not exist, and {} cannot be written",
                parent.display()
            ),
            "Name another with --state-dir.",
        ),
    }
}

fn try_write(folder: &Path) -> std::io::Result<()> {
    let mut file = tempfile::Builder::new()
        .prefix(".keel-doctor-")
        .tempfile_in(folder)?;
    file.write_all(b"written by keel doctor\n")?;
    file.as_file().sync_all()
}

/// The mount of a folder: the one with the longest matching path, and of several the last, which
/// covers the others.
fn mount_of(folder: &Path) -> Option<MountInfo> {
    let folder = folder.canonicalize().ok()?;
    let mounts = Process::myself().and_then(|me| me.mountinfo()).ok()?;
    mounts
        .into_iter()
        .filter(|mount| folder.starts_with(&mount.mount_point))
        .max_by_key(|mount| mount.mount_point.as_os_str().len())
}

fn socket_paths(folder: &Path) -> Check {
    let name = "socket-paths";
    let why =
        "each machine has a socket below the node's folder, and the kernel bounds their paths";
    let root = folder
        .canonicalize()
        .or_else(|_| std::path::absolute(folder))
        .unwrap_or_else(|_| folder.to_owned());
    let around = root
        .join("workers")
        .join("x")
        .join(keel_machine::worker::SOCKET);
    let room = (SOCKET_PATH_BYTES_MAX + 1).saturating_sub(around.as_os_str().len());
    let found = format!(
        "names of machines may have {} bytes",
        room.min(NAME_BYTES_MAX)
    );
    let remedy = "Name a folder with a shorter path with --state-dir.";
    match room {
        0..=10 => Check::fail(name, why, found, remedy),
        _ if room < NAME_BYTES_MAX => Check::warn(name, why, found, remedy),
        _ => Check::ok(name, why, found),
    }
}

// ── ports ───────────────────────────────────────────────────────────────

fn port(name: &'static str, why: &'static str, address: SocketAddr, folder: &Path) -> Check {
    let error = match TcpListener::bind(address) {
        Ok(_) => return Check::ok(name, why, format!("{address} is free")),
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::AddrInUse => held(name, why, address, folder),
        ErrorKind::AddrNotAvailable => Check::fail(
            name,
            why,
            format!("{address}: this computer does not have that address"),
            "Name one that it has with --listen or --api (see `ip address`).",
        ),
        ErrorKind::PermissionDenied => Check::fail(
            name,
            why,
            format!("{address}: this user may not listen there"),
            "Take a port above 1023, or give the node CAP_NET_BIND_SERVICE.",
        ),
        _ => Check::fail(
            name,
            why,
            format!("{address}: {error}"),
            "Name another with --listen or --api.",
        ),
    }
}

fn held(name: &'static str, why: &'static str, address: SocketAddr, folder: &Path) -> Check {
    let Some(holder) = holder(address) else {
        return Check::fail(
            name,
            why,
            format!("{address} is held by a process that this user cannot see"),
            format!(
                "`ss -ltnp sport = :{}` as root names it; end it, or name another port.",
                address.port()
            ),
        );
    };
    let line = holder.cmdline().unwrap_or_default();
    let root = folder.canonicalize().ok();
    let ours = line.iter().any(|word| word == "agent")
        && line
            .iter()
            .any(|word| Path::new(word).canonicalize().ok() == root && root.is_some());
    let process = format!(
        "process {} ({})",
        holder.pid,
        line.first()
            .map(PathBuf::from)
            .and_then(|program| Some(program.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_else(|| "?".into())
    );
    if ours {
        return Check::ok(
            name,
            why,
            format!("{address} is held by this node's agent, {process}"),
        );
    }
    Check::fail(
        name,
        why,
        format!("{address} is held by {process}"),
        "End it, or name another port with --listen or --api.",
    )
}

/// The process that listens at an address, or at all addresses on its port.
fn holder(address: SocketAddr) -> Option<Process> {
    let anywhere = |ip: IpAddr| ip.is_unspecified() || address.ip().is_unspecified();
    let sockets = procfs::net::tcp()
        .into_iter()
        .chain(procfs::net::tcp6())
        .flatten();
    let inodes: Vec<u64> = sockets
        .filter(|socket| {
            let local = socket.local_address;
            socket.state == procfs::net::TcpState::Listen
                && local.port() == address.port()
                && (local.ip() == address.ip() || anywhere(local.ip()))
        })
        .map(|socket| socket.inode)
        .collect();
    // Processes may end during the scan, and those of other users cannot be inspected.
    all_processes().ok()?.flatten().find(|process| {
        process.fd().is_ok_and(|files| {
            files.flatten().any(
                |file| matches!(file.target, FDTarget::Socket(inode) if inodes.contains(&inode)),
            )
        })
    })
}

// ── the agent ───────────────────────────────────────────────────────────

/// Queries the agent of the node in a folder, if one runs.
pub(super) async fn agent(folder: &Path) -> Check {
    let name = "agent";
    let why = "without it no machine is started, moved or reported; running machines continue";
    match keel_node::addresses(folder) {
        Ok(Some(_)) => {}
        Ok(None) | Err(_) => {
            return Check::ok(
                name,
                why,
                "no node yet: `keel up` makes a cluster, `keel join` joins one",
            );
        }
    }
    let client = Client::socket(folder.join("api.socket"));
    let answer = tokio::time::timeout(AGENT_PATIENCE, client.get::<ClusterInfo>("/v1/status"));
    let log = format!("see {}", folder.join("agent.log").display());
    match answer.await {
        Ok(Ok(info)) => healthy(name, why, &info),
        Ok(Err(ClientError::Connect { reason, .. })) => Check::warn(
            name,
            why,
            format!("this node's agent does not run ({reason})"),
            "Start it: `keel up`.",
        ),
        Ok(Err(error)) => Check::fail(
            name,
            why,
            error.to_string(),
            format!("See that the nodes with the store run and are reached; {log}."),
        ),
        Err(_) => Check::fail(
            name,
            why,
            format!("it does not answer within {} s", AGENT_PATIENCE.as_secs()),
            format!("End its process (its parent starts it again); {log}."),
        ),
    }
}

fn healthy(name: &'static str, why: &'static str, info: &ClusterInfo) -> Check {
    let found = format!(
        "node {} (keel {}), store on {} {}, {} of {} node(s) alive, {} machine(s) running",
        info.node,
        info.version,
        info.voters.join(", "),
        info.store,
        info.nodes_alive,
        info.nodes,
        info.machines_running
    );
    if info.version != env!("CARGO_PKG_VERSION") {
        let here = env!("CARGO_PKG_VERSION");
        return Check::warn(
            name,
            why,
            found,
            format!("Restart the node, so that it runs this keel ({here}) too."),
        );
    }
    if info.nodes_alive < info.nodes {
        return Check::warn(
            name,
            why,
            found,
            "`keel nodes` tells which are away; start them.",
        );
    }
    Check::ok(name, why, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_do_not_last_are_named() {
        for kind in ["tmpfs", "nfs4", "fuse.sshfs"] {
            assert!(unfit(kind).is_some(), "{kind}");
        }
        for kind in ["ext4", "xfs", "btrfs", "overlay"] {
            assert_eq!(unfit(kind), None, "{kind}");
        }
    }

    #[test]
    fn long_folders_leave_little_for_names() {
        use super::super::Outcome;
        let outcome = |length: usize| {
            let check = socket_paths(Path::new(&format!("/{}", "f".repeat(length - 1))));
            (check.outcome, check.found)
        };
        let said = |bytes: usize| format!("names of machines may have {bytes} bytes");
        // Root, "/workers/", name, "/socket".
        assert_eq!(outcome(107 - 16 - 63), (Outcome::Ok, said(63)));
        assert_eq!(outcome(107 - 16 - 62), (Outcome::Warn, said(62)));
        assert_eq!(outcome(107 - 16 - 10), (Outcome::Fail, said(10)));
        assert_eq!(outcome(200), (Outcome::Fail, said(0)));
    }

    #[test]
    fn whoever_holds_a_port_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let process = holder(address).unwrap();
        assert_eq!(process.pid as u32, std::process::id());
        let check = port("port", "it matters", address, Path::new("/nonexistent"));
        assert_eq!(check.outcome, super::super::Outcome::Fail);
        assert!(
            check
                .found
                .contains(&format!("process {}", std::process::id()))
        );
        drop(listener);
        let check = port("port", "it matters", address, Path::new("/nonexistent"));
        assert_eq!(check.found, format!("{address} is free"));
    }
}
