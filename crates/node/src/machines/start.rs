//! Starts a machine's worker: from its beginning, or from a checkpoint.

use super::handle::Machines;
use super::spanning_start;
use crate::processes::{COMPILE_PATIENCE, Leftovers, extend_new};
use keel_machine::checkpoint::{MemoryRestore, Origin};
use keel_machine::failpoint;
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{Start, StartFrom, kind};
use keel_net::RpcError;
use std::sync::Arc;

pub(super) async fn start(machines: &Arc<Machines>, record: &Record) -> Result<(), String> {
    let kind = machines.context.kinds.of(&record.spec)?;
    let abilities = kind.abilities();
    let (kept, leftovers) = match &record.status {
        Status::Restarting {
            from_checkpoint,
            elsewhere,
            ..
        } => {
            let restarts = *from_checkpoint && abilities.restarts_from_checkpoints;
            // Its disk is nowhere else, whether its next life begins anew or not.
            let fails_over = *elsewhere
                && !abilities.restarts_from_checkpoints
                && kind.fails_over_from_checkpoint(&record.spec);
            // Its earlier output stays.
            let kept = match &record.spec.ha {
                Some(ha) if restarts || fails_over => {
                    machines.checkpoints.in_sync(&record.name, ha).await?
                }
                None if restarts => machines.checkpoints.newest(&record.name).await?,
                _ => None,
            };
            if kept.is_none() && fails_over {
                return Err(
                    "its disk is on a node that is lost, and no checkpoint of it is known".into(),
                );
            }
            let leftovers = match elsewhere {
                // Of a time before the machine was on the node that failed.
                true => Leftovers::Remove,
                false => Leftovers::KeepOutput,
            };
            (kept, leftovers)
        }
        _ => (None, Leftovers::Remove),
    };
    if leftovers == Leftovers::KeepOutput && record.started_unix_ms > 0 {
        let (kinds, spec) = (machines.context.kinds.clone(), record.spec.clone());
        let folder = machines.context.dir.worker(&record.name);
        let looked = tokio::task::spawn_blocking(move || {
            let kind = kinds.of(&spec)?;
            Ok::<_, String>(kind.missing_of_earlier_life(&spec, &folder))
        });
        let missing = looked.await.map_err(|error| error.to_string()).flatten()?;
        if let Some(missing) = missing {
            return Err(format!(
                "{missing} is gone from its node: remove the machine and run it again to begin with a new one"
            ));
        }
    }
    let is_kept = kept.is_some();
    // A machine that has run begins anew with what is on its disks, and not with what it had once.
    let begins_from_origin = abilities.restarts_from_checkpoints || record.started_unix_ms == 0;
    let origin = record.origin.clone().filter(|_| begins_from_origin);
    let origin = kept.or(origin);
    if origin.is_none() || abilities.keeps_images {
        let stored = origin.as_ref().or(record.origin.as_ref());
        let stored = stored.map(|origin| origin.repository.as_str());
        for image in kind.images(&record.spec)? {
            machines.images.find_image_or_in(&image, stored).await?;
        }
    }
    let mut spread = Vec::new();
    let from = match origin {
        Some(origin) => {
            StartFrom::Checkpoint(spanning_start::placed(machines, record, origin).await?)
        }
        None => {
            spread = spanning_start::spread_over(machines, record).await;
            StartFrom::Beginning {
                is_held: !spread.is_empty(),
            }
        }
    };
    let worker = machines
        .processes
        .machines
        .start(
            &machines.context.dir,
            &record.name,
            &record.spec.kind,
            leftovers,
        )
        .await?;
    let origin = match &from {
        StartFrom::Checkpoint(origin) => Some(origin),
        StartFrom::Beginning { .. } => None,
    };
    machines
        .checkpoints
        .place_output(record, origin, is_kept)
        .await?;
    failpoint::pass_async("start.worker")
        .await
        .map_err(|injected| injected.to_string())?;
    let apart = match &from {
        StartFrom::Checkpoint(Origin {
            memory: MemoryRestore::Spanning(nodes),
            ..
        }) => nodes.clone(),
        _ => spread,
    };
    let runs_alone = matches!(from, StartFrom::Beginning { is_held: true, .. });
    let start = Start {
        machine: record.name.clone(),
        spec: record.spec.clone(),
        from,
        epoch: record.epoch,
        notice: match &record.status {
            Status::Restarting { reason, .. } => Some(format!(
                "restart {} under epoch {}, since {reason}",
                record.restarts, record.epoch
            )),
            _ => None,
        },
    };
    if record.spec.ha.is_some() {
        extend_new(&machines.context, &record.name, &worker, record.epoch).await?;
    }
    let started: Result<(), RpcError> = worker.ask(kind::START, &start, COMPILE_PATIENCE).await;
    match started {
        Ok(()) => {}
        Err(RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. }) => {
            if let (true, Some(ha)) = (is_kept, &record.spec.ha) {
                machines
                    .checkpoints
                    .put_damage_aside(&record.name, ha)
                    .await;
            }
            return Err(reason);
        }
        Err(other) => return Err(other.to_string()),
    }
    if apart.is_empty() {
        return Ok(());
    }
    spanning_start::begin(machines, record, &worker, &apart, runs_alone).await
}
