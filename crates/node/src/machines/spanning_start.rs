//! Starts machines that have several parts from the beginning. Those created from a checkpoint
//! that is larger than their node get parts before their memory is read, and run once it is
//! complete. Those that spread their threads from the first ([`Spawn::Spread`]) are held at their
//! entry point until they have parts.
//!
//! ```text
//! ```text
//!     │───── as for `keel span` ───────────────▶ parts on other nodes
//!     │───── BRING ─▶ reads, writes, and gives away what is too much ─▶ it runs
//! ```
//!
//! What fails on the way is a start that failed: its worker is ended, and parts end with
//! their home. Only a machine that would run on one node as well does so if it gets no parts.

use super::handle::Machines;
use crate::checkpoints;
use crate::processes::WorkerHandle;
use crate::records::{free_bytes, free_bytes_for};
use crate::spanning::{self, ROOM_BYTES_MIN};
use futures::future::join_all;
use keel_cluster::NodeName;
use keel_kind_wasm::control::kind;
use keel_kind_wasm::span::PARTS_MAX;
use keel_machine::checkpoint::{
    MemoryRestore, Origin, Repository, RepositoryError, memory_bytes as checkpointed_bytes,
};
use keel_machine::failpoint;
use keel_machine::spec::{Record, Spawn};
use keel_net::RpcError;
use std::sync::Arc;

/// Room for growth: one byte more for so many that the machine has.
const SPARE_PART: u64 = 16;

/// The origin of a machine, with the nodes of its parts if it is larger than this node or than the
/// limit of a part.
///
/// # Errors
/// A sentence, if no set of nodes has room.
pub(super) async fn placed(
    machines: &Arc<Machines>,
    record: &Record,
    origin: Origin,
) -> Result<Origin, String> {
    // A user's choice of nodes counts for the first start only: the cluster may differ at a
    // restart.
    match origin.memory {
        MemoryRestore::Spanning(_) if record.restarts == 0 => return Ok(origin),
        _ => {}
    }
    let origin = Origin {
        memory: match origin.memory {
            // A restart has time to check for damage first.
            MemoryRestore::Lazy if record.restarts == 0 => MemoryRestore::Lazy,
            _ => MemoryRestore::Eager,
        },
        ..origin
    };
    let balancing = &record.spec.balancing;
    // A machine with a CPU limit has no parts.
    let may_span = record.spec.cpu_limit_millis.is_none();
    let may_span_by_itself = may_span && balancing.parts_max.is_some();
    let part_bytes = balancing.part_memory_bytes.filter(|_| may_span_by_itself);
    let here = free_bytes_for(&machines.context, &record.name).await;
    let here = here.unwrap_or_else(|error| {
        tracing::warn!(machine = %record.name, error, "the reservations of this node are not known");
        free_bytes()
    });
    let keeps = part_bytes.unwrap_or(u64::MAX).min(here);
    let Some(bytes) = memory_bytes(&origin, keeps).await? else {
        return Ok(origin);
    };
    if !may_span {
        return Err(format!(
            "it has {} MiB in memory, and {} has room for {}: it could have parts on other nodes, but for the limit of its CPU time",
            bytes >> 20,
            machines.context.name,
            here >> 20
        ));
    }
    let wanted = Requirements {
        bytes,
        part_bytes,
        parts_max: balancing.parts_max.map_or(PARTS_MAX, |most| most as usize),
    };
    let others = spanning::nodes_with_memory(&machines.spanning, &record.name).await;
    let nodes = wanted.choose((&machines.context.name, here), others)?;
    Ok(match nodes.is_empty() {
        true => origin,
        false => Origin {
            memory: MemoryRestore::Spanning(nodes),
            ..origin
        },
    })
}

/// The nodes of the initial parts of a machine that spreads its threads: the least loaded ones
/// that are allowed and have room. Empty if the machine may have no parts, or no other node may
/// hold one.
pub(super) async fn spread_over(machines: &Arc<Machines>, record: &Record) -> Vec<NodeName> {
    let balancing = &record.spec.balancing;
    let others = balancing.parts_max.map_or(0, |most| most.saturating_sub(1));
    let spreads = balancing.spawn == Spawn::Spread && record.spec.cpu_limit_millis.is_none();
    if !spreads || others == 0 || !machines.balancer.is_automatic().await {
        return Vec::new();
    }
    let rooms = spanning::nodes_with_memory(&machines.spanning, &record.name).await;
    let roomy = rooms
        .into_iter()
        .filter(|(_, room)| *room >= ROOM_BYTES_MIN);
    let loads = roomy.map(|(node, _)| async move {
        let load = machines.balancer.load_of(&node).await;
        (node, load)
    });
    let mut nodes: Vec<(NodeName, Option<f64>)> = join_all(loads).await;
    nodes.sort_by(|(one, of_one), (other, of_other)| {
        // A node that has just joined has no measurements yet.
        let load = |load: &Option<f64>| load.unwrap_or(f64::MAX);
        let by_load = load(of_one).total_cmp(&load(of_other));
        by_load.then_with(|| one.cmp(other))
    });
    nodes.truncate(others as usize);
    if !nodes.is_empty() {
        machines.balancer.record_spread_start(record, &nodes);
    }
    nodes.into_iter().map(|(node, _)| node).collect()
}

/// Size in memory of a machine created from a checkpoint, if it exceeds `most` bytes. Also `None`
/// if there is no complete checkpoint, which its worker reports.
async fn memory_bytes(origin: &Origin, most: u64) -> Result<Option<u64>, String> {
    let url = origin.repository.clone();
    let repository = checkpoints::opened(move || Repository::open(&url)).await;
    let repository = repository.map_err(|error| error.to_string())?;
    match checkpointed_bytes(&repository, origin, most).await {
        Ok(bytes) => Ok(Some(bytes).filter(|bytes| *bytes > most)),
        Err(error @ RepositoryError::Store(_)) => Err(error.to_string()),
        Err(error) => {
            tracing::debug!(%error, "the size of the checkpoint is not known");
            Ok(None)
        }
    }
}

/// Requirements of a machine that is larger than a node.
#[derive(Debug, Clone, Copy)]
struct Requirements {
    /// Its bytes in memory.
    bytes: u64,
    /// The most that a part keeps.
    part_bytes: Option<u64>,
    /// The most parts that it may have, including the home.
    parts_max: usize,
}

impl Requirements {
    /// The nodes with most room, until the total has room for the machine and its growth. Only the
    /// home exceeds the limit of a part, and only if the others have no room.
    fn choose(
        self,
        home: (&NodeName, u64),
        mut others: Vec<(NodeName, u64)>,
    ) -> Result<Vec<NodeName>, String> {
        let keeps = |room: u64| self.part_bytes.map_or(room, |most| most.min(room));
        let spare = self.bytes.saturating_add(self.bytes / SPARE_PART);
        others.sort_by(|(one, of_one), (other, of_other)| {
            of_other.cmp(of_one).then_with(|| one.cmp(other))
        });
        let mut kept = keeps(home.1);
        let mut room = home.1;
        let mut chosen = Vec::new();
        for (node, has) in &others {
            if kept >= spare || chosen.len() + 1 >= self.parts_max {
                break;
            }
            if *has < ROOM_BYTES_MIN {
                break;
            }
            kept = kept.saturating_add(keeps(*has));
            room = room.saturating_add(keeps(*has));
            chosen.push(node.clone());
        }
        if room >= self.bytes {
            return Ok(chosen);
        }
        let mib = |bytes: u64| bytes >> 20;
        let rooms = others
            .iter()
            .map(|(node, has)| format!("{node} {}", mib(*has)));
        let rooms: Vec<String> = std::iter::once(format!("{} {}", home.0, mib(home.1)))
            .chain(rooms)
            .collect();
        let parts = match self.part_bytes {
            Some(most) => format!(", and a part keeps {}", mib(most)),
            None => String::new(),
        };
        Err(format!(
            "it has {} MiB in memory, more than its {} parts at most have room for (MiB: {}{parts}): nodes with more memory would have it",
            mib(self.bytes),
            self.parts_max,
            rooms.join(", ")
        ))
    }
}

/// Gives a held machine its parts and its memory, and runs it. With `runs_alone` it also runs if
/// it gets no parts.
///
/// # Errors
/// A sentence; the worker is to be ended then.
pub(super) async fn begin(
    machines: &Arc<Machines>,
    record: &Record,
    worker: &WorkerHandle,
    nodes: &[NodeName],
    runs_alone: bool,
) -> Result<(), String> {
    let injected = |injected: failpoint::Injected| injected.to_string();
    failpoint::pass_async("spanning-start.held")
        .await
        .map_err(injected)?;
    match spanning::span_held(&machines.spanning, record, worker, nodes).await {
        Ok(()) => {}
        Err(error) if runs_alone => {
            tracing::warn!(machine = %record.name, %error, "starting on one node");
        }
        Err(error) => return Err(error.to_string()),
    }
    failpoint::pass_async("spanning-start.spans")
        .await
        .map_err(injected)?;
    let brought: Result<u64, RpcError> = worker
        .ask(kind::RESTORE_SPANNING, &(), checkpoints::PATIENCE)
        .await;
    match brought {
        Ok(bytes) => {
            tracing::info!(machine = %record.name, bytes, "memory distributed to the parts");
            Ok(())
        }
        Err(RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. }) => Err(reason),
        Err(other) => Err(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn chosen(
        wanted: Requirements,
        home: u64,
        others: &[(&str, u64)],
    ) -> Result<Vec<String>, String> {
        let name = |text: &str| NodeName::new(text).unwrap();
        let others = others.iter().map(|(node, room)| (name(node), room * MIB));
        let chosen = wanted.choose((&name("a"), home * MIB), others.collect());
        chosen.map(|nodes| nodes.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_nodes_with_most_room_are_taken_until_there_is_some_more() {
        let wanted = Requirements {
            bytes: 320 * MIB,
            part_bytes: None,
            parts_max: PARTS_MAX,
        };
        let others = [("b", 100), ("c", 200), ("d", 50), ("e", 100)];
        let of = |home| chosen(wanted, home, &others);
        assert_eq!(of(140).unwrap(), ["c"]);
        // 320 leaves too little room for growth.
        assert_eq!(of(120).unwrap(), ["c", "b"]);
        assert_eq!(of(20).unwrap(), ["c", "b", "e"]);
        assert_eq!(of(340).unwrap(), Vec::<String>::new());
        let all = [("b", 100), ("c", 15), ("d", 100)];
        assert_eq!(chosen(wanted, 150, &all).unwrap(), ["b", "d"]);
        let why = chosen(wanted, 100, &all).unwrap_err();
        assert_eq!(
            why,
            "it has 320 MiB in memory, more than its 64 parts at most have room for (MiB: a 100, b 100, d 100, c 15): nodes with more memory would have it"
        );
    }

    #[test]
    fn what_parts_are_to_keep_is_no_bound_but_their_number_and_room_are() {
        let wanted = Requirements {
            bytes: 100 * MIB,
            part_bytes: Some(20 * MIB),
            parts_max: 3,
        };
        let others = [("b", 1000), ("c", 1000), ("d", 1000)];
        assert_eq!(chosen(wanted, 1000, &others).unwrap(), ["b", "c"]);
        // Of other nodes only the limit of a part counts.
        let all = [("b", 40), ("c", 20), ("d", 40)];
        let why = chosen(wanted, 50, &all).unwrap_err();
        assert!(why.contains("its 3 parts at most"), "{why}");
        assert!(why.contains("a part keeps 20"), "{why}");
        let wider = Requirements {
            parts_max: 4,
            ..wanted
        };
        assert_eq!(chosen(wider, 50, &all).unwrap(), ["b", "d", "c"]);
    }
}
