//! Threads and memory of a machine with parts: their reports, and their moves.

use super::handle::{SPAN_PATIENCE, Spanning, ask, home, may_be_on};
use crate::error::CommandError;
use crate::processes::{COMPILE_PATIENCE, PROMPT, WorkerHandle};
use keel_api::{ObjectInfo, PartInfo, PartMemoryInfo, PartsInfo, ThreadInfo};
use keel_cluster::{MachineName, NodeName};
use keel_kind_wasm::control::{MoveObject, MoveThread, ObjectReport, PartsReport, kind};
use keel_kind_wasm::span::{Heat, HotPage, PartId, Sharing};
use keel_machine::PAGE_BYTES;
use keel_machine::worker::control::Positional;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Parts and threads of the machine.
pub(crate) async fn parts_of(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
) -> Result<PartsInfo, CommandError> {
    let worker = home(spanning, machine)?;
    Ok(info(&parts_report(&worker).await?, &spanning.context.name))
}

fn info(report: &PartsReport, home: &NodeName) -> PartsInfo {
    let mut nodes = report.nodes.clone();
    nodes.entry(PartId::HOME).or_insert_with(|| home.clone());
    let node = |part: PartId| {
        nodes
            .get(&part)
            .map_or("(gone)", NodeName::as_str)
            .to_owned()
    };
    let parts = nodes.iter().map(|(part, node)| {
        let threads = report.threads.iter().filter(|it| it.part == *part);
        PartInfo {
            part: part.number() as u32,
            node: node.to_string(),
            threads: threads.count() as u32,
            silent_ms: report.silent_ms.get(part).copied(),
            memory: report.memory.get(part).map(|memory| PartMemoryInfo {
                resident_bytes: memory.resident_bytes,
                limit_bytes: memory.limit_bytes,
                given_bytes: memory.given_bytes,
                dropped_bytes: memory.dropped_bytes,
            }),
        }
    });
    let threads = report.threads.iter().map(|thread| ThreadInfo {
        tid: thread.tid,
        part: thread.part.number() as u32,
        node: node(thread.part),
        state: match (thread.moves_to, thread.waits) {
            (Some(_), _) => "moving",
            (None, true) => "waiting",
            (None, false) => "running",
        }
        .into(),
        cpu_micros: thread.took.as_ref().map(|took| took.time.run_ns / 1000),
        stalled_micros: {
            let mut by_node: BTreeMap<String, u64> = BTreeMap::new();
            let stalled = thread.took.iter().flat_map(|took| &took.stalled_us);
            for (from, micros) in stalled {
                *by_node.entry(node(*from)).or_default() += micros;
            }
            by_node
        },
        likes: thread.likes.clone(),
    });
    PartsInfo {
        parts: parts.collect(),
        threads: threads.collect(),
        waits: report.waits.clone(),
        downtime_micros: None,
    }
}

/// Its memory as objects, by the part that holds them.
pub(crate) async fn objects(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
) -> Result<Vec<ObjectInfo>, CommandError> {
    let worker = home(spanning, machine)?;
    let report = parts_report(&worker).await?;
    let objects = objects_report(&worker).await?;
    // A worker of an older version does not support the request.
    let heat = heat_of(&worker).await.unwrap_or_else(|error| {
        tracing::debug!(%machine, %error, "the use of its memory is not known");
        Heat::default()
    });
    let node = |part: PartId| match report.nodes.get(&part) {
        Some(node) => node.to_string(),
        // The machine is on one node.
        None => spanning.context.name.to_string(),
    };
    let info = |object: ObjectReport| {
        let hot = hot_in(&heat, &object);
        let idle = idle_in(&heat, &object);
        let count = |of: fn(Sharing) -> bool| {
            let pages = hot.iter().filter(|page| of(page.sharing));
            pages.count() as u32
        };
        ObjectInfo {
            range: keel_api::object_range_name(object.memory, object.start, object.bytes),
            waits: hot.iter().map(|page| page.waits).sum(),
            shared_pages: count(|sharing| sharing != Sharing::Unshared),
            falsely_shared_pages: count(|sharing| sharing == Sharing::False),
            idle_bytes: idle.iter().map(|range| range.end - range.start).sum(),
            name: object.name,
            bytes: object.bytes,
            part: object.owner.number() as u32,
            node: node(object.owner),
            readers: object.readers.iter().map(node).collect(),
            exchanges: object.exchanges,
            directory: node(object.directory),
        }
    };
    Ok(objects.into_iter().map(info).collect())
}

/// Moves an object, given as a range or by its name, to the part on a node; returns the bytes that
/// have moved.
pub(crate) async fn move_object(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    name: &str,
    to: &str,
) -> Result<u64, CommandError> {
    let worker = home(spanning, machine)?;
    let report = parts_report(&worker).await?;
    let to = part_on(
        spanning,
        &info(&report, &spanning.context.name),
        machine,
        to,
    )
    .await?;
    if let Some((memory, start, bytes)) = keel_api::object_range(name) {
        let object = MoveObject {
            memory,
            start,
            bytes,
            to,
        };
        return whole_object_to(&worker, object).await;
    }
    let objects = objects_report(&worker).await?.into_iter();
    let pieces: Vec<ObjectReport> = objects.filter(|object| object.has_name(name)).collect();
    if pieces.is_empty() {
        return Err(CommandError::NotFound(format!(
            "the program {machine:?} calls nothing {name:?}, and it is no range: FIRST-END in hexadecimal bytes, as 0x10000-0x20000 (see `keel objects {machine}`)"
        )));
    }
    let mut moved = 0;
    for piece in pieces {
        let object = MoveObject {
            memory: piece.memory,
            start: piece.start,
            bytes: piece.bytes,
            to,
        };
        moved += whole_object_to(&worker, object).await?;
    }
    Ok(moved)
}

/// The worker's report of parts and of the CPU time of each thread.
pub(crate) async fn parts_report(worker: &WorkerHandle) -> Result<PartsReport, CommandError> {
    ask(worker, kind::PARTS, &(), PROMPT).await
}

/// Pages of an object for which threads waited.
pub(crate) fn hot_in<'a>(heat: &'a Heat, object: &ObjectReport) -> &'a [HotPage] {
    let end = object.start.saturating_add(object.bytes);
    let before = |at: u64| {
        let is_before = |page: &HotPage| (page.memory, page.start()) < (object.memory, at);
        heat.hot.partition_point(is_before)
    };
    let within = before(object.start)..before(end);
    heat.hot.get(within).unwrap_or_default()
}

/// Pages of an object that the part which holds it does not use.
pub(crate) fn idle_in(heat: &Heat, object: &ObjectReport) -> Vec<Range<u64>> {
    let end = object.start.saturating_add(object.bytes);
    let all = heat.idle.get(&object.owner).map_or(&[][..], Vec::as_slice);
    let first = all.partition_point(|range| {
        (range.memory, range.start.saturating_add(range.bytes)) <= (object.memory, object.start)
    });
    let behind = all[first..].iter();
    let within = behind.take_while(|range| range.memory == object.memory && range.start < end);
    within
        .map(|range| {
            let until = range.start.saturating_add(range.bytes);
            range.start.max(object.start)..until.min(end)
        })
        .filter(|range| range.start < range.end)
        .collect()
}

/// Recent use of its memory.
pub(crate) async fn heat_of(worker: &WorkerHandle) -> Result<Heat, CommandError> {
    let Positional(heat) = ask(worker, kind::HEAT, &(), PROMPT).await?;
    Ok(heat)
}

/// The worker's report of its memory as objects.
pub(crate) async fn objects_report(
    worker: &WorkerHandle,
) -> Result<Vec<ObjectReport>, CommandError> {
    let Positional(objects) = ask(worker, kind::OBJECTS, &(), PROMPT).await?;
    Ok(objects)
}

/// Moves a thread to a part.
pub(crate) async fn thread_to(
    worker: &WorkerHandle,
    thread: MoveThread,
) -> Result<(), CommandError> {
    ask(worker, kind::MOVE_THREAD, &thread, COMPILE_PATIENCE).await
}

/// As [`object_to`], repeated as long as it makes progress.
async fn whole_object_to(worker: &WorkerHandle, object: MoveObject) -> Result<u64, CommandError> {
    let (start, bytes) = (object.start / PAGE_BYTES * PAGE_BYTES, object.bytes);
    let end = object.start.saturating_add(bytes);
    let mut done = 0;
    loop {
        let from = start.saturating_add(done);
        let rest = MoveObject {
            start: from,
            bytes: end.saturating_sub(from),
            ..object
        };
        done += match object_to(worker, rest).await {
            Ok(moved) => moved,
            Err(error) if done == 0 => return Err(error),
            Err(error) => {
                return Err(CommandError::Conflict(format!(
                    "{done} of {bytes} bytes are there, the rest is not: {error}"
                )));
            }
        };
        if start.saturating_add(done) >= end {
            return Ok(done);
        }
    }
}

/// Moves an object to a part; returns the bytes that have moved, from the first on, before the
/// time limit.
pub(crate) async fn object_to(
    worker: &WorkerHandle,
    object: MoveObject,
) -> Result<u64, CommandError> {
    ask(worker, kind::MOVE_OBJECT, &object, SPAN_PATIENCE).await
}

/// Reports the free cores of each part: new threads start where most are.
pub(crate) async fn tell_room(
    worker: &WorkerHandle,
    room: &BTreeMap<PartId, f64>,
) -> Result<(), CommandError> {
    ask(worker, kind::ROOM, room, PROMPT).await
}

/// The part of a machine on a node; of several the one with the fewest threads.
async fn part_on(
    spanning: &Spanning,
    found: &PartsInfo,
    machine: &MachineName,
    node: &str,
) -> Result<PartId, CommandError> {
    let there = found.parts.iter().filter(|part| part.node == node);
    let part = there.min_by_key(|part| part.threads);
    let part = part.and_then(|part| PartId::new(part.part as usize));
    let part = part.ok_or_else(|| {
        CommandError::NotFound(format!(
            "machine {machine:?} has no part on {node:?} (`keel parts {machine}` lists them, `keel span` makes them)"
        ))
    })?;
    // A part that is no longer allowed is about to be removed.
    if let Some(node) = spanning
        .context
        .members
        .all()
        .keys()
        .find(|it| it.as_str() == node)
        && *node != spanning.context.name
    {
        may_be_on(spanning, machine, node).await?;
    }
    Ok(part)
}

/// Moves a thread to the part on a node.
pub(crate) async fn move_thread(
    spanning: &Arc<Spanning>,
    machine: &MachineName,
    tid: u32,
    to: &str,
) -> Result<(), CommandError> {
    let worker = home(spanning, machine)?;
    let report = parts_report(&worker).await?;
    let part = part_on(
        spanning,
        &info(&report, &spanning.context.name),
        machine,
        to,
    )
    .await?;
    if !report.threads.iter().any(|thread| thread.tid == tid) {
        return Err(CommandError::NotFound(format!(
            "machine {machine:?} has no thread {tid} (see `keel threads {machine}`)"
        )));
    }
    thread_to(&worker, MoveThread { tid, to: part }).await
}
