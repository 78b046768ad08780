//! Compares a machine with a request for a new one. Nothing is changed, and nothing is disclosed
//! that only the machine's own node may know: of environment variables only the names.

use super::handle::Machines;
use super::spec_check::spec;
use crate::error::CommandError;
use crate::records::{self, RecordError};
use keel_api::{FieldChange, MachineDiff, RunRequest};
use keel_cluster::{MachineName, NodeName};
use keel_machine::kind::Kinds;
use keel_machine::spec::{Balancing, Spec, Volume, VolumeKind};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Compares a machine with a request.
pub(crate) async fn diff(
    machines: &Arc<Machines>,
    machine: &MachineName,
    request: &RunRequest,
) -> Result<MachineDiff, CommandError> {
    let wanted = spec(&machines.context.kinds, request)?;
    if let Some(node) = &request.on {
        let node = NodeName::new(node).map_err(|error| CommandError::Invalid(error.to_string()))?;
        if !machines.context.members.contains(&node) {
            return Err(CommandError::NotFound(format!(
                "there is no node {node:?} (see `keel nodes`)"
            )));
        }
    }
    match records::get(&*machines.context.store, machine).await {
        Ok(found) => {
            let record = found.record;
            let live = !record.status.ended();
            Ok(MachineDiff {
                node: Some(record.owner.to_string()),
                live,
                changes: changes(&machines.context.kinds, &record.spec, &wanted, live),
            })
        }
        Err(RecordError::NoMachine(_)) => Ok(MachineDiff {
            node: None,
            live: false,
            changes: Vec::new(),
        }),
        Err(error) => Err(error.into()),
    }
}

/// The differences, in the terms of a machine file. Some fields of a running machine can be
/// changed live.
fn changes(kinds: &Kinds, old: &Spec, new: &Spec, runs: bool) -> Vec<FieldChange> {
    let mut changes = Vec::new();
    let mut compare = |field: &str, old: String, new: String, live: bool| {
        if old != new {
            changes.push(FieldChange {
                field: field.to_owned(),
                old,
                new,
                live: live && runs,
            });
        }
    };
    compare("kind", old.kind.to_string(), new.kind.to_string(), false);
    if old.kind == new.kind
        && let Ok(kind) = kinds.of(new)
    {
        for difference in kind.differences(old, new) {
            compare(&difference.field, difference.old, difference.new, false);
        }
    }
    let (old_volumes, new_volumes) = (volumes(old), volumes(new));
    let guests: BTreeSet<&str> = old_volumes
        .keys()
        .chain(new_volumes.keys())
        .copied()
        .collect();
    for guest in guests {
        let text = |volumes: &BTreeMap<&str, String>| {
            volumes.get(guest).cloned().unwrap_or_else(|| "none".into())
        };
        let field = format!("volume {guest}");
        compare(&field, text(&old_volumes), text(&new_volumes), false);
    }
    let kind = kinds.of(old);
    compare(
        "memory",
        size(old.memory_bytes),
        size(new.memory_bytes),
        kind.is_ok_and(|kind| kind.abilities().changes_memory),
    );
    compare("cpu-limit", cores(old), cores(new), true);
    let rate = |spec: &Spec| size(spec.output_bytes_per_s);
    compare("output-rate", rate(old), rate(new), false);
    let rm = |spec: &Spec| spec.remove_at_end.to_string();
    compare("rm", rm(old), rm(new), false);
    let restart = |spec: &Spec| spec.restart.word().to_owned();
    compare("restart", restart(old), restart(new), true);
    let checkpoints = |spec: &Spec| match &spec.checkpoints {
        Some(plan) => plan.line(),
        None => "none".to_owned(),
    };
    compare("checkpoints", checkpoints(old), checkpoints(new), true);
    let ha = |spec: &Spec| match &spec.ha {
        Some(ha) => ha.line(),
        None => "off".to_owned(),
    };
    compare("ha", ha(old), ha(new), true);
    let none = || "none".to_owned();
    let (was, will) = (&old.balancing, &new.balancing);
    let by = |it: &Balancing| it.by.word().to_owned();
    compare("balance", by(was), by(will), true);
    let cpu = |it: &Balancing| it.cpu_target_millis.map_or_else(none, in_cores);
    compare("cpu-target", cpu(was), cpu(will), true);
    let memory = |it: &Balancing| it.memory_target_bytes.map_or_else(none, size);
    compare("memory-target", memory(was), memory(will), true);
    let io = |it: &Balancing| it.io_target_bytes_per_s.map_or_else(none, size);
    compare("io-target", io(was), io(will), true);
    let parts = |it: &Balancing| it.parts_max.map_or_else(none, |most| most.to_string());
    compare("max-parts", parts(was), parts(will), true);
    let spawn = |it: &Balancing| it.spawn.word().to_owned();
    compare("spawn", spawn(was), spawn(will), true);
    let memory = |it: &Balancing| it.part_memory_bytes.map_or_else(none, size);
    compare("part-memory", memory(was), memory(will), true);
    changes
}

fn volumes(spec: &Spec) -> BTreeMap<&str, String> {
    let text = |volume: &Volume| {
        let text = match &volume.kind {
            VolumeKind::Host { path } => path.clone(),
            VolumeKind::Tmp { bytes, .. } => format!("tmp:{}", size(*bytes)),
            VolumeKind::Cluster { name, .. } => format!("cluster:{name}"),
        };
        match volume.read_only {
            true => format!("{text} (read only)"),
            false => text,
        }
    };
    let volumes = spec.volumes.iter();
    volumes
        .map(|volume| (volume.guest.as_str(), text(volume)))
        .collect()
}

/// A size with the precision in which it was written.
fn size(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

fn cores(spec: &Spec) -> String {
    spec.cpu_limit_millis
        .map_or_else(|| "none".to_owned(), in_cores)
}

fn in_cores(millis: u32) -> String {
    (f64::from(millis) / 1000.0).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_kind_wasm::{WasmKind, WasmSpec};
    use keel_machine::checkpoint::Retention;
    use keel_machine::kind::Kind;
    use keel_machine::restart_policy::Restart;
    use keel_machine::spec::CheckpointPlan;

    fn kinds() -> Kinds {
        Kinds::new([Arc::new(WasmKind) as Arc<dyn Kind>])
    }

    fn own() -> WasmSpec {
        WasmSpec {
            module: "0123456789abcdef".into(),
            args: vec!["app".into(), "x y".into()],
            env: vec![("A".into(), "1".into()), ("B".into(), "secret".into())],
            threads_max: 4,
        }
    }

    fn example() -> Spec {
        Spec {
            kind: WasmKind::kind_name(),
            kind_spec: own().to_kind_spec().unwrap(),
            volumes: vec![Volume {
                kind: VolumeKind::Tmp {
                    bytes: 1 << 30,
                    inodes: 1024,
                },
                guest: "/scratch".into(),
                read_only: false,
            }],
            memory_bytes: 1 << 30,
            cpu_limit_millis: None,
            output_bytes_per_s: 1 << 20,
            remove_at_end: false,
            restart: Restart::No,
            checkpoints: None,
            ha: None,
            balancing: Balancing::default(),
        }
    }

    fn lines(old: &Spec, new: &Spec, runs: bool) -> Vec<String> {
        let line = |change: FieldChange| {
            let live = if change.live { " (live)" } else { "" };
            format!("{}: {} → {}{live}", change.field, change.old, change.new)
        };
        changes(&kinds(), old, new, runs)
            .into_iter()
            .map(line)
            .collect()
    }

    #[test]
    fn the_same_has_no_changes_whatever_the_order() {
        let mut other = example();
        let mut own = own();
        own.env.reverse();
        other.kind_spec = own.to_kind_spec().unwrap();
        assert_eq!(lines(&example(), &other, true), Vec::<String>::new());
    }

    #[test]
    fn each_field_is_compared_and_no_secret_told() {
        let own = WasmSpec {
            module: "f".repeat(64),
            args: vec!["app".into()],
            env: vec![("B".into(), "other".into()), ("C".into(), "2".into())],
            threads_max: 8,
        };
        let new = Spec {
            kind: WasmKind::kind_name(),
            kind_spec: own.to_kind_spec().unwrap(),
            volumes: vec![Volume {
                kind: VolumeKind::Host {
                    path: "/srv".into(),
                },
                guest: "/data".into(),
                read_only: true,
            }],
            memory_bytes: 3 << 29,
            cpu_limit_millis: Some(500),
            output_bytes_per_s: 1000,
            remove_at_end: true,
            restart: Restart::Always,
            ha: None,
            checkpoints: Some(CheckpointPlan {
                every_s: 600,
                to: Some("/kept".into()),
                retention: Retention {
                    newest: Some(3),
                    for_s: Some(7 * 86_400),
                },
            }),
            balancing: Balancing {
                cpu_target_millis: Some(250),
                ..Balancing::default()
            },
        };
        let found = lines(&example(), &new, true);
        assert_eq!(
            found,
            [
                "module: 0123456789ab → ffffffffffff",
                "args: [\"app\", \"x y\"] → [\"app\"]",
                "env A: a value → none",
                "env B: a value → another value",
                "env C: none → a value",
                "threads: 4 → 8",
                "volume /data: none → /srv (read only)",
                "volume /scratch: tmp:1G → none",
                "memory: 1G → 1536M (live)",
                "cpu-limit: none → 0.5 (live)",
                "output-rate: 1M → 1000",
                "rm: false → true",
                "restart: no → always (live)",
                "checkpoints: none → every 10m, to /kept; kept: the newest 3 and those of the last 7d (live)",
                "cpu-target: none → 0.25 (live)",
            ]
        );
        // No field of an ended machine can be changed live.
        assert!(
            changes(&kinds(), &example(), &new, false)
                .iter()
                .all(|change| !change.live)
        );
    }
}
