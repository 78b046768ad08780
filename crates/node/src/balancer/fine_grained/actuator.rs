//! Carries out decisions: moves a thread or memory to another part, adds and removes parts.

use super::super::handle::NodeBalancer;
use super::observation::by_use;
use crate::error::CommandError;
use crate::processes::WorkerHandle;
use crate::spanning::{self, PartsQuery};
use keel_api::SpanRequest;
use keel_balance::Name;
use keel_balance::fine_grained::{Action, Object, coldest};
use keel_cluster::MachineName;
use keel_kind_wasm::control::{MoveObject, MoveThread, ObjectReport};
use keel_kind_wasm::span::PartId;
use std::sync::Arc;

/// Removes the parts on these nodes. Their threads and memory move to the other parts, or, if
/// these have no room, to new parts on other nodes.
async fn leave(
    handle: &Arc<NodeBalancer>,
    machine: &MachineName,
    nodes: &[Name],
) -> Result<String, String> {
    let query = PartsQuery {
        machine: machine.clone(),
    };
    let info = handle.spanning.parts_here(query).await.map_err(text)?;
    let leaves = |node: &str| nodes.iter().any(|it| &**it == node);
    let members = info.parts.iter().skip(1);
    let mut keeps: Vec<String> = members
        .filter(|part| !leaves(&part.node))
        .map(|part| part.node.clone())
        .collect();
    let left = match keeps.is_empty() {
        true => spanning::unspan(&handle.spanning, machine).await,
        false => span(handle, machine, &keeps).await,
    };
    let why = match left {
        Ok(downtime_micros) => {
            return Ok(format!("downtime {:.1} ms", downtime_micros as f64 / 1e3));
        }
        Err(error) => text(error),
    };
    let has_part =
        |node: &keel_cluster::NodeName| info.parts.iter().any(|part| part.node == node.as_str());
    let mut rooms = spanning::nodes_with_memory(&handle.spanning, machine).await;
    rooms.retain(|(node, room)| !has_part(node) && *room >= spanning::ROOM_BYTES_MIN);
    rooms.sort_by_key(|(_, room)| std::cmp::Reverse(*room));
    let leaving = info.parts.iter().skip(1).filter(|part| leaves(&part.node));
    let mut needed: u64 = leaving
        .filter_map(|part| part.memory.as_ref())
        .map(|memory| memory.resident_bytes)
        .sum();
    let mut new = Vec::new();
    for (node, room) in rooms {
        if needed == 0 {
            break;
        }
        needed = needed.saturating_sub(room);
        new.push(node.to_string());
    }
    if new.is_empty() {
        return Err(why);
    }
    keeps.extend(new.iter().cloned());
    let downtime_micros = span(handle, machine, &keeps).await.map_err(text)?;
    Ok(format!(
        "{why}; so it has parts on {}; downtime {:.1} ms",
        new.join(", "),
        downtime_micros as f64 / 1e3
    ))
}

fn text(error: CommandError) -> String {
    error.to_string()
}

/// Gives the machine parts on these nodes; returns the downtime in microseconds.
async fn span(
    handle: &Arc<NodeBalancer>,
    machine: &MachineName,
    nodes: &[String],
) -> Result<u64, CommandError> {
    // The first occurrence of its home's node is the home; each further one is a part.
    let home = std::iter::once(handle.context.name.to_string());
    let request = SpanRequest {
        nodes: home.chain(nodes.iter().cloned()).collect(),
        here: false,
    };
    let info = spanning::span(&handle.spanning, machine, &request).await?;
    Ok(info.downtime_micros.unwrap_or(0))
}

pub(super) async fn carry_out(
    handle: &Arc<NodeBalancer>,
    machine: &MachineName,
    worker: &WorkerHandle,
    grain: &Action,
    objects: Option<&[ObjectReport]>,
) -> Result<String, String> {
    let part = |number: u32| {
        PartId::new(number as usize).ok_or_else(|| format!("there is no part {number}"))
    };
    match grain {
        Action::Spread { nodes } => {
            let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
            let downtime_micros = span(handle, machine, &nodes).await.map_err(text)?;
            Ok(format!("downtime {:.1} ms", downtime_micros as f64 / 1e3))
        }
        Action::Leave { nodes } => leave(handle, machine, nodes).await,
        Action::Gather => {
            let downtime_micros = spanning::unspan(&handle.spanning, machine)
                .await
                .map_err(text)?;
            Ok(format!("downtime {:.1} ms", downtime_micros as f64 / 1e3))
        }
        Action::Thread {
            tid,
            part: to,
            to: node,
            ..
        } => {
            let thread = MoveThread {
                tid: *tid,
                to: part(*to)?,
            };
            spanning::thread_to(worker, thread).await.map_err(text)?;
            Ok(format!("thread {tid} continues on {node}"))
        }
        Action::Objects {
            from_part,
            part: to,
            to: node,
            bytes,
            ..
        } => {
            let (from, to) = (part(*from_part)?, part(*to)?);
            // A worker of an older version does not support the request.
            let heat = spanning::heat_of(worker).await;
            if let Err(error) = &heat {
                tracing::warn!(%machine, %error, "the use of its memory is not known: moving the objects with the fewest transfers");
            }
            let by_exchanges = |object: &ObjectReport| Object {
                memory: object.memory,
                start: object.start,
                bytes: object.bytes,
                is_idle: false,
                heat: object.exchanges as f64 / (object.bytes / 4096).max(1) as f64,
            };
            let mine = objects.unwrap_or_default().iter();
            let mine: Vec<Object> = mine
                .filter(|object| object.owner == from)
                .flat_map(|object| match &heat {
                    Ok(heat) => by_use(object, heat),
                    Err(_) => vec![by_exchanges(object)],
                })
                .collect();
            let (mut moved, mut pieces, mut idle) = (0, 0, 0);
            for object in coldest(&mine, *bytes) {
                idle += if object.is_idle { object.bytes } else { 0 };
                let object = MoveObject {
                    memory: object.memory,
                    start: object.start,
                    bytes: object.bytes,
                    to,
                };
                moved += spanning::object_to(worker, object).await.map_err(text)?;
                pieces += 1;
            }
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            Ok(format!(
                "{:.1} MiB in {pieces} pieces are on {node}, {:.1} MiB of which were not used for half a minute",
                mib(moved),
                mib(idle)
            ))
        }
    }
}
