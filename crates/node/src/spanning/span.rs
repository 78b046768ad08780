//! Has the parts of a machine created, and merges them into the home.

use super::handle::{SPAN_PATIENCE, Spanning, UNSPAN_PATIENCE, ask, home, may_be_on, report, text};
use super::member::mark;
use super::membership::{Changed, SpanningMachine};
use super::messages::{PartJoin, PartOffer, ReadyMember};
use super::parts::{objects_report, parts_of, parts_report};
use super::remote_member::{WorkerKind, join_on, ready_on};
use crate::error::CommandError;
use crate::events::Note;
use crate::host::needed_features;
use crate::processes::{COMPILE_PATIENCE, WorkerHandle};
use crate::records;
use futures::future::{join_all, try_join_all};
use keel_api::{EventKind, PartsInfo, SpanRequest};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_kind_wasm::control::{ConnectParts, Join, PartsReport, Span, kind};
use keel_kind_wasm::span::{PARTS_MAX, PartAddress, PartId, PartSet, SpawnPolicy};
use keel_machine::spec::{Record, Spawn, Spec};
use keel_machine::worker::control::{Report, State};
use keel_net::{Fingerprint, RpcError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The nodes of the members: all named nodes without one occurrence of the owner's.
fn members(
    spanning: &Spanning,
    named: &[String],
) -> Result<BTreeMap<PartId, NodeName>, CommandError> {
    let mut nodes = Vec::new();
    for name in named {
        let node = NodeName::new(name).map_err(|error| CommandError::Invalid(error.to_string()))?;
        if !spanning.context.members.contains(&node) {
            return Err(CommandError::NotFound(format!(
                "there is no node {node:?} (see `keel nodes`)"
            )));
        }
        nodes.push(node);
    }
    // One occurrence is the home itself.
    if let Some(at) = nodes.iter().position(|node| *node == spanning.context.name) {
        nodes.remove(at);
    }
    if nodes.is_empty() {
        return Err(CommandError::Invalid(format!(
            "its home is on {}: name other nodes, or that one twice",
            spanning.context.name
        )));
    }
    let count = nodes.len();
    let parts = (1..).map_while(PartId::new).zip(nodes);
    let members: BTreeMap<PartId, NodeName> = parts.collect();
    match members.len() == count {
        true => Ok(members),
        false => Err(CommandError::Invalid(format!(
            "a machine has at most {PARTS_MAX} parts"
        ))),
    }
}

/// Makes a machine that runs here span nodes; changes the parts of one that spans already.
pub(crate) async fn span(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    request: &SpanRequest,
) -> Result<PartsInfo, CommandError> {
    let members = members(spanning, &request.nodes)?;
    // A concurrent move, or change of limits, would conflict.
    let _setting = spanning.processes.exclusion.changes.lock().await;
    if spanning.processes.exclusion.is_moving(machine) {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} is moving; try again when it is there"
        )));
    }
    let worker = home(spanning, machine)?;
    let found = report(&worker).await?;
    if !matches!(found.state, State::Running { .. }) {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} does not run yet, or is still arriving"
        )));
    };
    let has = parts_of(spanning, machine).await?.parts;
    for node in members.values() {
        // If it spans already, only the change of membership applies.
        if !has.iter().any(|part| part.node == node.as_str()) {
            may_be_on(spanning, machine, node).await?;
        }
    }
    let record = records::get(&*spanning.context.store, machine)
        .await?
        .record;
    if found.parts > 0 && request.here {
        return Err(CommandError::Invalid(format!(
            "machine {machine:?} has parts already: where threads begin is said when it gets the first (`keel unspan {machine}`)"
        )));
    }
    if found.parts > 0 {
        let nodes: Vec<NodeName> = members.into_values().collect();
        let downtime_micros =
            change(spanning, machine, &record.spec, &worker, &found, &nodes).await?;
        let mut info = parts_of(spanning, machine).await?;
        info.downtime_micros = Some(downtime_micros);
        return Ok(info);
    }
    let downtime_micros =
        spread(spanning, &record, &worker, &found, &members, request.here).await?;
    let mut info = parts_of(spanning, machine).await?;
    info.downtime_micros = Some(downtime_micros);
    Ok(info)
}

/// Gives a spanning machine parts on exactly these nodes and its home. Returns the downtime in
/// microseconds.
async fn change(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    spec: &Spec,
    worker: &WorkerHandle,
    found: &Report,
    nodes: &[NodeName],
) -> Result<u64, CommandError> {
    let (State::Running { epoch }, Some(program)) = (&found.state, found.program) else {
        return Err(CommandError::Conflict("it has no module".into()));
    };
    let parts = SpanningMachine {
        spanning,
        machine,
        spec,
        worker,
        program: Fingerprint(program),
        epoch: *epoch,
    };
    let mut changed = Changed::default();
    let done = parts.change(nodes, &mut changed).await;
    let named = |nodes: &[NodeName]| {
        let nodes: Vec<&str> = nodes.iter().map(NodeName::as_str).collect();
        nodes.join(", ")
    };
    let what = match (&changed.came[..], &changed.went[..]) {
        ([], []) => return done.map(|()| 0),
        (came, []) => format!("has parts on {}, too", named(came)),
        ([], went) => format!("no longer has a part on {}", named(went)),
        (came, went) => format!("has parts on {}, and none on {}", named(came), named(went)),
    };
    let downtime_ms = changed.downtime_micros as f64 / 1000.0;
    let what = format!("{what}; downtime {downtime_ms:.1} ms");
    let note = Note::machine(EventKind::MachineSpans, machine, what);
    spanning.context.events.record(note.under(*epoch));
    done.map(|()| changed.downtime_micros)
}

/// Gives a held machine parts on these nodes, besides its home.
pub(crate) async fn span_held(
    spanning: &Arc<Spanning>,
    record: &Record,
    worker: &WorkerHandle,
    nodes: &[NodeName],
) -> Result<(), CommandError> {
    for node in nodes {
        may_be_on(spanning, &record.name, node).await?;
    }
    let _setting = spanning.processes.exclusion.changes.lock().await;
    let members = (1..).map_while(PartId::new).zip(nodes.iter().cloned());
    let members = members.collect();
    let found = report(worker).await?;
    spread(spanning, record, worker, &found, &members, false).await?;
    Ok(())
}

/// Creates and connects all parts, or undoes everything. Returns the downtime in microseconds.
async fn spread(
    spanning: &Arc<Spanning>,
    record: &Record,
    worker: &WorkerHandle,
    found: &Report,
    members: &BTreeMap<PartId, NodeName>,
    here: bool,
) -> Result<u64, CommandError> {
    let (machine, spec) = (&record.name, &record.spec);
    let (State::Running { epoch } | State::Held { epoch }) = found.state else {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} no longer runs"
        )));
    };
    let program = found.program.map(Fingerprint);
    let program = program.ok_or_else(|| CommandError::Conflict("it has no module".into()))?;
    // Its limits may have been changed since its worker was started.
    worker.apply_limits(record).await;
    let spawning = match spec.balancing.spawn {
        _ if here => SpawnPolicy::Here,
        Spawn::Here => SpawnPolicy::Here,
        Spawn::Spread => SpawnPolicy::Even,
        Spawn::Auto => SpawnPolicy::Room,
    };
    let parts: PartSet = members
        .keys()
        .copied()
        .collect::<PartSet>()
        .with(PartId::HOME);
    // Parts on one node share its free memory.
    let sharing = |node: &NodeName| {
        let members = members.values().filter(|it| *it == node).count();
        members as u32 + u32::from(*node == spanning.context.name)
    };
    let offer = |me: PartId, node: &NodeName| PartOffer {
        sharing: sharing(node),
        machine: machine.clone(),
        spec: spec.clone(),
        program,
        me,
        parts,
        features: needed_features(),
    };
    let offers = members.iter().map(|(part, node)| {
        let offer = offer(*part, node);
        async move {
            let ready = ready_on(spanning, node, offer, WorkerKind::New).await;
            let ready = ready.map_err(|why| format!("no part on {node}: {why}"));
            ready.map(|ready| (*part, ready))
        }
    });
    let offered = join_all(offers).await;
    let mut ready: BTreeMap<PartId, ReadyMember> = BTreeMap::new();
    let mut refused = None;
    for outcome in offered {
        match outcome {
            Ok((part, member)) => drop(ready.insert(part, member)),
            Err(why) => refused = refused.or(Some(why)),
        }
    }
    let spans = match refused {
        Some(why) => Err(SpanFailure::certain(CommandError::Conflict(why))),
        None => {
            // A held machine has no memory yet, however large it is.
            let has_bytes = match found.state {
                State::Held { .. } => 0,
                _ => found.memory_bytes,
            };
            let own = own_room(
                spanning,
                machine,
                spec,
                has_bytes,
                sharing(&spanning.context.name),
            )
            .await;
            let options = SpanOptions {
                spawning,
                room_bytes: own,
            };
            meet(spanning, worker, epoch, members, &ready, options).await
        }
    };
    let downtime_micros = match spans {
        Ok(downtime_micros) => downtime_micros,
        Err(SpanFailure { error, in_doubt }) => {
            // The home may span with only its answer lost or late, so it is merged before its
            // members are ended; not if it answered that it does not span, since it may then span
            // by another operation.
            // A held machine is ended by its caller: it must not run as it is.
            let is_held = matches!(found.state, State::Held { .. });
            if in_doubt && !is_held {
                let alone = worker
                    .ask::<_, u64>(kind::UNSPAN, &(), UNSPAN_PATIENCE)
                    .await;
                if let Err(RpcError::Failed { reason, .. }) = &alone {
                    tracing::debug!(reason, "the machine does not span");
                }
            }
            let ends = members.iter().filter_map(|(part, node)| {
                let member = ready.get(part)?;
                let request = PartJoin {
                    worker: member.worker.clone(),
                    join: None,
                };
                Some(join_on(spanning, node, request, WorkerKind::New))
            });
            // A member that cannot be reached ends by itself, since nothing connects to it in
            // time.
            join_all(ends).await;
            return Err(error);
        }
    };
    let nodes: Vec<&str> = members.values().map(NodeName::as_str).collect();
    let what = format!(
        "spans {} and {}; downtime {:.1} ms",
        spanning.context.name,
        nodes.join(", "),
        downtime_micros as f64 / 1000.0
    );
    mark(spanning, machine, worker);
    let note = Note::machine(EventKind::MachineSpans, machine, what);
    spanning.context.events.record(note.under(epoch));
    Ok(downtime_micros)
}

/// Why parts did not connect.
struct SpanFailure {
    error: CommandError,
    /// Whether the machine may span all the same, because no answer excludes it.
    in_doubt: bool,
}

impl SpanFailure {
    fn certain(error: CommandError) -> SpanFailure {
        SpanFailure {
            error,
            in_doubt: false,
        }
    }
}

/// Options of spanning.
struct SpanOptions {
    spawning: SpawnPolicy,
    room_bytes: Option<u64>,
}

/// Memory that the home can keep here: its own and the free bytes; `None` if that is all that the
/// machine may have, or is not known.
async fn own_room(
    spanning: &Spanning,
    machine: &MachineName,
    spec: &Spec,
    has_bytes: u64,
    sharing: u32,
) -> Option<u64> {
    let free = records::free_bytes_for(&spanning.context, machine).await;
    let free = free
        .inspect_err(|error| tracing::warn!(%machine, error, "the room of its home is not known; it gets no limit"))
        .ok()?;
    home_room(has_bytes, free, sharing, spec.memory_bytes)
}

/// Memory that the home of a machine with the limit `most` can keep, if that is less.
fn home_room(has_bytes: u64, free: u64, sharing: u32, most: u64) -> Option<u64> {
    let room = has_bytes.saturating_add(free / u64::from(sharing.max(1)));
    (room < most).then_some(room)
}

/// Connects all parts; returns the downtime in microseconds.
async fn meet(
    spanning: &Arc<Spanning>,
    worker: &WorkerHandle,
    epoch: Epoch,
    members: &BTreeMap<PartId, NodeName>,
    ready: &BTreeMap<PartId, ReadyMember>,
    options: SpanOptions,
) -> Result<u64, SpanFailure> {
    let parts = members
        .keys()
        .copied()
        .collect::<PartSet>()
        .with(PartId::HOME);
    let address = spanning.context.worker_address();
    let own: PartAddress = ask(
        worker,
        kind::SPAN_READY,
        &ConnectParts { parts, address },
        COMPILE_PATIENCE,
    )
    .await
    .map_err(SpanFailure::certain)?;
    let mut places: BTreeMap<PartId, PartAddress> = ready
        .iter()
        .map(|(part, it)| (*part, it.place.clone()))
        .collect();
    places.insert(PartId::HOME, own);
    let join = Join { epoch, places };
    let mut nodes = members.clone();
    nodes.insert(PartId::HOME, spanning.context.name.clone());
    let span = Span {
        join: join.clone(),
        nodes,
        spawning: options.spawning,
        room_bytes: options.room_bytes,
    };
    let joins = ready.iter().filter_map(|(part, member)| {
        let node = members.get(part)?;
        let request = PartJoin {
            worker: member.worker.clone(),
            join: Some(join.clone()),
        };
        Some(async move {
            let joined = join_on(spanning, node, request, WorkerKind::New).await;
            joined.map_err(|why| CommandError::Conflict(format!("no part on {node}: {why}")))
        })
    });
    let (downtime_micros, joined) = tokio::join!(
        worker.ask::<_, u64>(kind::SPAN, &span, SPAN_PATIENCE),
        try_join_all(joins)
    );
    // If the home spans, all have joined, whatever happened to their answers. Otherwise the member
    // that did not join is the cause.
    match (downtime_micros, joined) {
        (Ok(downtime_micros), _) => Ok(downtime_micros),
        (Err(error), joined) => {
            let answered = matches!(error, RpcError::Failed { .. } | RpcError::Refused { .. });
            let why = CommandError::Conflict(text(error));
            Err(SpanFailure {
                error: joined.err().unwrap_or(why),
                in_doubt: !answered,
            })
        }
    }
}

/// Why a machine cannot be merged here, if its other parts hold more than there is room for: no
/// limit bounds that transfer, and the kernel would kill the process.
async fn too_large(
    spanning: &Spanning,
    machine: &MachineName,
    worker: &WorkerHandle,
) -> Result<Option<String>, CommandError> {
    let room = records::free_bytes_for(&spanning.context, machine).await;
    let room = room.map_err(CommandError::Unavailable)?;
    let others = |parts: &PartsReport| {
        let others = parts
            .memory
            .iter()
            .filter(|(part, _)| **part != PartId::HOME);
        others.map(|(_, memory)| memory.resident_bytes).sum::<u64>()
    };
    let mut wanted = others(&parts_report(worker).await?);
    if wanted > room {
        // Copies of a page in several parts count once.
        let objects = objects_report(worker).await?.into_iter();
        let away = objects.filter(|object| object.owner != PartId::HOME);
        wanted = away.map(|object| object.bytes).sum();
    }
    Ok(does_not_fit(machine, &spanning.context.name, wanted, room))
}

fn does_not_fit(machine: &MachineName, node: &NodeName, wanted: u64, room: u64) -> Option<String> {
    (wanted > room).then(|| {
        format!(
            "machine {machine:?} is larger than its node: its other parts have {} MiB, and {node} has room for {}; `keel checkpoint {machine} --to PLACE` keeps it as it is, and `keel restore {machine} --from PLACE --nodes ...` lets it begin on other nodes",
            wanted >> 20,
            room >> 20
        )
    })
}

/// Moves a machine's threads and pages home.
pub(crate) async fn unspan(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
) -> Result<u64, CommandError> {
    let worker = home(spanning, machine)?;
    if let Some(why) = too_large(spanning, machine, &worker).await? {
        return Err(CommandError::Conflict(why));
    }
    let downtime_micros: u64 = ask(&worker, kind::UNSPAN, &(), UNSPAN_PATIENCE).await?;
    spanning.marked().remove(machine);
    let what = format!(
        "is on {} alone; downtime {:.1} ms",
        spanning.context.name,
        downtime_micros as f64 / 1000.0
    );
    spanning
        .context
        .events
        .record(Note::machine(EventKind::MachineAlone, machine, what));
    Ok(downtime_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_keeps_what_it_has_and_its_share_of_what_is_free() {
        const GIB: u64 = 1 << 30;
        assert_eq!(home_room(GIB, 8 * GIB, 1, 64 * GIB), Some(9 * GIB));
        assert_eq!(home_room(0, 8 * GIB, 2, 64 * GIB), Some(4 * GIB));
        assert_eq!(home_room(0, 8 * GIB, 1, 8 * GIB), None);
    }

    #[test]
    fn what_does_not_fit_is_not_brought_together_and_what_to_do_is_said() {
        let machine: MachineName = "big".parse().unwrap();
        let node = NodeName::new("a").unwrap();
        assert_eq!(does_not_fit(&machine, &node, 5 << 20, 5 << 20), None);
        let why = does_not_fit(&machine, &node, 700 << 20, 100 << 20).unwrap();
        for part in [
            "700 MiB",
            "a has room for 100",
            "keel checkpoint big",
            "--nodes",
        ] {
            assert!(why.contains(part), "{why}");
        }
    }
}
