//! Validates specs.

use crate::balancer::IO_TARGET_MAX;
use crate::checkpoints::check_plan;
use crate::error::CommandError;
use keel_api::{RunRequest, VolumeRequest};
use keel_cluster::MachineName;
use keel_kind_wasm::span::{PART_BYTES_MIN, PARTS_MAX};
use keel_machine::high_availability::Fence;
use keel_machine::kind::Kinds;
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Spec, Volume, VolumeKind};
use keel_wasi::volume::VolumeLimits;

/// The largest memory limit of a machine.
const MEMORY_BYTES_MAX: u64 = 64 << 30;
/// Volumes of one machine, and the size of its own ones.
const VOLUMES_MAX: usize = 64;
const VOLUME_BYTES_MIN: u64 = 64 << 10;
const VOLUME_BYTES_MAX: u64 = 8 << 40;
/// The smallest and largest `cpu.limit`, in thousandths of a core.
const CPU_LIMIT_MILLIS_MIN: u32 = 10;
const CPU_LIMIT_MILLIS_MAX: u32 = 1_000_000;

/// Why a CPU limit excludes parts.
pub(super) const LIMITED_HAS_NO_PARTS: &str =
    "a limit of its CPU time applies on one node only: a machine with one has no parts (max parts)";

/// Builds a validated spec from a request.
pub(super) fn spec(kinds: &Kinds, request: &RunRequest) -> Result<Spec, CommandError> {
    let bad = |what: String| Err(CommandError::Invalid(what));
    check_memory("limit", request.memory_bytes)?;
    if let Some(millis) = request.cpu_limit_millis {
        check_cpu("limit", millis)?;
    }
    if let Some(millis) = request.balancing.cpu_target_millis {
        check_cpu("target", millis)?;
    }
    if let Some(bytes) = request.balancing.memory_target_bytes {
        check_memory("target", bytes)?;
    }
    if let Some(rate) = request.balancing.io_target_bytes_per_s {
        check_io_target(rate)?;
    }
    if let Some(most) = request.balancing.parts_max {
        check_parts(most)?;
        if request.cpu_limit_millis.is_some() {
            return bad(LIMITED_HAS_NO_PARTS.into());
        }
    }
    if let Some(bytes) = request.balancing.part_memory_bytes {
        check_part_memory(bytes)?;
    }
    if request.remove_at_end && request.restart != Restart::No {
        return bad(format!(
            "a machine that is removed when it ends cannot be restarted too (restart = {:?})",
            request.restart.word()
        ));
    }
    if let Some(plan) = &request.checkpoints {
        check_plan(plan)?;
    }
    let volumes = volumes(&request.volumes)?;
    let spec = Spec {
        kind: request.kind.clone(),
        kind_spec: request.kind_spec.clone(),
        volumes,
        memory_bytes: request.memory_bytes,
        cpu_limit_millis: request.cpu_limit_millis,
        output_bytes_per_s: request.output_bytes_per_s,
        remove_at_end: request.remove_at_end,
        restart: request.restart,
        checkpoints: request.checkpoints.clone(),
        ha: request.ha.clone(),
        balancing: request.balancing,
    };
    kinds.check(&spec).map_err(CommandError::Invalid)?;
    check_high_availability(kinds, &spec)?;
    Ok(spec)
}

/// Checks what keeps a machine available, together with what else is specified.
pub(super) fn check_high_availability(kinds: &Kinds, spec: &Spec) -> Result<(), CommandError> {
    let Some(ha) = &spec.ha else {
        return Ok(());
    };
    ha.check().map_err(CommandError::Invalid)?;
    let refused = |why: &str| Err(CommandError::Invalid(why.to_owned()));
    if spec.checkpoints.is_some() {
        return refused(
            "a machine with ha has its own checkpoints: name their interval and place there (ha: checkpoint, to), or leave ha out",
        );
    }
    if spec.remove_at_end && spec.restart == Restart::No {
        return refused(
            "a machine with ha is restarted when its node fails, and one that is removed when it ends (rm) is not restarted",
        );
    }
    let is_written_to =
        |volume: &Volume| matches!(volume.kind, VolumeKind::Host { .. }) && !volume.read_only;
    let written = spec.volumes.iter().find(|volume| is_written_to(volume));
    if let Some(volume) = written
        && ha.protects_output()
    {
        return Err(CommandError::Invalid(format!(
            "it writes to a directory of hosts at {}, which others see at once, and its output is to wait for a checkpoint (ha: protect): make the volume read-only, or use a cluster volume",
            volume.guest
        )));
    }
    let unfenced = match written {
        Some(volume) => Some(format!("a directory of hosts at {}", volume.guest)),
        None => {
            let kind = kinds.of(spec).map_err(CommandError::Invalid)?;
            kind.unfenced(spec)
        }
    };
    if let Some(what) = unfenced
        && ha.fence == Fence::None
    {
        return Err(CommandError::Invalid(format!(
            "it uses {what}, and nothing there refuses a node that was cut off and goes on writing: accept the kernel's timer by ha: fence = \"timer\", let a program of yours switch the node off (fence = \"hook\"), or do without it (a volume or a disk may be read-only)"
        )));
    }
    Ok(())
}

/// Checks a limit for each memory of a machine.
pub(super) fn check_memory(what: &str, bytes: u64) -> Result<(), CommandError> {
    if (1 << 16..=MEMORY_BYTES_MAX).contains(&bytes) {
        return Ok(());
    }
    Err(CommandError::Invalid(format!(
        "a memory {what} of {bytes} bytes: 64 KiB to 64 GiB are possible"
    )))
}

/// Checks the memory limit of a part.
pub(super) fn check_part_memory(bytes: u64) -> Result<(), CommandError> {
    if (PART_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) {
        return Ok(());
    }
    Err(CommandError::Invalid(format!(
        "parts that keep {bytes} bytes each: 1 MiB to 64 GiB are possible"
    )))
}

/// Checks a `cpu.limit`.
pub(super) fn check_cpu(what: &str, millis: u32) -> Result<(), CommandError> {
    if (CPU_LIMIT_MILLIS_MIN..=CPU_LIMIT_MILLIS_MAX).contains(&millis) {
        return Ok(());
    }
    Err(CommandError::Invalid(format!(
        "a cpu {what} of {millis} thousandths of a core: {CPU_LIMIT_MILLIS_MIN} to {CPU_LIMIT_MILLIS_MAX} are possible"
    )))
}

/// Checks a limit of the number of parts.
pub(super) fn check_parts(most: u32) -> Result<(), CommandError> {
    if (2..=PARTS_MAX as u32).contains(&most) {
        return Ok(());
    }
    Err(CommandError::Invalid(format!(
        "a limit of {most} parts: 2 to {PARTS_MAX} are possible"
    )))
}

/// Checks a target of disk traffic.
pub(super) fn check_io_target(rate: u64) -> Result<(), CommandError> {
    if (1..=IO_TARGET_MAX).contains(&rate) {
        return Ok(());
    }
    Err(CommandError::Invalid(format!(
        "an io target of {rate} bytes a second: 1 byte to 1 TiB are possible"
    )))
}

/// Builds the validated volumes of a request.
fn volumes(requests: &[VolumeRequest]) -> Result<Vec<Volume>, CommandError> {
    let bad = |what: String| Err(CommandError::Invalid(what));
    if requests.len() > VOLUMES_MAX {
        return bad(format!("more than {VOLUMES_MAX} volumes"));
    }
    let mut volumes: Vec<Volume> = Vec::with_capacity(requests.len());
    for request in requests {
        let volume = match request {
            VolumeRequest::Host {
                host,
                guest,
                read_only,
            } => {
                if !host.starts_with('/') {
                    return bad(format!("volume {host:?}: the path must be absolute"));
                }
                Volume {
                    kind: VolumeKind::Host { path: host.clone() },
                    guest: guest.clone(),
                    read_only: *read_only,
                }
            }
            VolumeRequest::Tmp {
                bytes,
                inodes,
                guest,
            } => {
                let usual = VolumeLimits::of_bytes(*bytes);
                let inodes = inodes.unwrap_or(usual.inodes_max);
                if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(bytes) {
                    return bad(format!(
                        "volume {guest:?} of {bytes} bytes: 64 KiB to 8 TiB are possible"
                    ));
                }
                if !(1..=VolumeLimits::INODES_MAX).contains(&inodes) {
                    return bad(format!(
                        "volume {guest:?} for {inodes} files: 1 to {} are possible",
                        VolumeLimits::INODES_MAX
                    ));
                }
                Volume {
                    kind: VolumeKind::Tmp {
                        bytes: *bytes,
                        inodes,
                    },
                    guest: guest.clone(),
                    read_only: false,
                }
            }
            // The other fields are set when the machine acquires it.
            VolumeRequest::Cluster {
                name,
                guest,
                read_only,
            } => Volume {
                kind: VolumeKind::Cluster {
                    name: MachineName::new(name)
                        .map_err(|error| CommandError::Invalid(format!("volume: {error}")))?,
                    id: [0; 16],
                    place: String::new(),
                    bytes: 0,
                    inodes: 0,
                    holding: 0,
                },
                guest: guest.clone(),
                read_only: *read_only,
            },
        };
        if volumes.iter().any(|other| other.guest == volume.guest) {
            return bad(format!("two volumes are named {:?}", volume.guest));
        }
        volumes.push(volume);
    }
    Ok(volumes)
}
