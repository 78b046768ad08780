//! Predicts a move: whether the target would accept the machine, the duration and the downtime.
//! Nothing is reserved or changed.
//!
//! `keel-machine` computes the figures ([`predict`]). This file gathers the inputs: the machine's
//! dirty rate, sampled briefly, and the throughput of the link, known from earlier moves or else
//! measured by a trial of at most a few hundred milliseconds.

use super::directory_proofs::Proofs;
use super::handle::Moves;
use super::offer::{self, TRIAL, WOULD_ACCEPT};
use crate::error::CommandError;
use crate::processes::{PROMPT, WorkerHandle, explained};
use crate::records;
use keel_api::DryRun;
use keel_cluster::{MachineName, NodeName};
use keel_machine::moves::MoveReport;
use keel_machine::moves::convergence::LAST_PAGES_BUDGET;
use keel_machine::moves::prediction::{Activity, Prediction, PredictionInput, predict};
use keel_machine::spec::{Record, Status};
use keel_machine::worker::control::{kind, pack};
use keel_net::{Bytes, Fingerprint, RpcError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of one message of a trial, and the number of messages.
const TRIAL_BYTES: usize = 256 << 10;
const TRIAL_MESSAGES: usize = 8;
/// How long a move waits for its prediction during its offer.
const PATIENCE: Duration = Duration::from_millis(500);

/// Predicts a user's move of a machine that runs here.
pub(crate) async fn dry_run(
    moves: &Arc<Moves>,
    machine: &MachineName,
    target: &NodeName,
    budget: Option<Duration>,
) -> Result<DryRun, CommandError> {
    let found = records::settled(&*moves.context.store, machine).await?;
    let record = found.record;
    if record.status != Status::Running {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} is {}, only a running one can move",
            record.status.word()
        )));
    }
    if *target == moves.context.name {
        return Err(CommandError::Conflict(format!(
            "machine {machine:?} is on {target} already"
        )));
    }
    if !moves.context.members.contains(target) {
        return Err(CommandError::NotFound(format!(
            "there is no node {target:?} (see `keel nodes`)"
        )));
    }
    let worker = moves.processes.machines.get(machine).ok_or_else(|| {
        CommandError::Conflict(format!("machine {machine:?} has no worker here; try again"))
    })?;
    let away = |reason: String| CommandError::Unavailable(format!("machine {machine:?}: {reason}"));
    let history = history(moves, &record, target);
    let (activity, trial) = look(moves, &worker, target, &history).await.map_err(away)?;
    let known = PredictionInput {
        activity: &activity,
        trial_bytes_per_s: trial,
        history: &history,
        budget: budget.unwrap_or(LAST_PAGES_BUDGET),
    };
    let unknown = || {
        away(format!(
            "the throughput of the link to {target} is not known"
        ))
    };
    let pre_copy = predict(&known, false).ok_or_else(unknown)?;
    let post_copy = predict(&known, true).ok_or_else(unknown)?;
    // In a task of its own, so that the proof files are removed even if the client disconnects.
    let (asking, to) = (moves.clone(), target.clone());
    let asked =
        tokio::spawn(
            async move { would_accept(&asking, &record, found.revision, &worker, &to).await },
        );
    let refusal = match asked.await {
        Ok(would) => would.err(),
        Err(error) => return Err(CommandError::Unavailable(error.to_string())),
    };
    Ok(DryRun {
        machine: machine.to_string(),
        source: moves.context.name.to_string(),
        target: target.to_string(),
        refusal,
        memory_bytes: activity.populated_bytes,
        volume_bytes: activity.volume_bytes,
        pre_copy,
        post_copy,
    })
}

/// The prediction for a move that begins; `None` if it is not available soon.
pub(crate) async fn before_move(
    moves: Arc<Moves>,
    record: Record,
    worker: WorkerHandle,
    target: NodeName,
    post_copy: bool,
    budget: Duration,
) -> Option<Prediction> {
    let history = history(&moves, &record, &target);
    let looked = look(&moves, &worker, &target, &history);
    let (activity, trial) = match tokio::time::timeout(PATIENCE, looked).await {
        Ok(Ok(looked)) => looked,
        Ok(Err(reason)) => {
            tracing::debug!(machine = %record.name, reason, "no prediction of its move");
            return None;
        }
        Err(_) => return None,
    };
    let known = PredictionInput {
        activity: &activity,
        trial_bytes_per_s: trial,
        history: &history,
        budget,
    };
    predict(&known, post_copy)
}

fn history(moves: &Moves, record: &Record, target: &NodeName) -> Vec<MoveReport> {
    moves.history().of(record, &moves.context.name, target)
}

/// Samples the machine's dirty rate, and measures the link if no earlier move did.
async fn look(
    moves: &Moves,
    worker: &WorkerHandle,
    target: &NodeName,
    history: &[MoveReport],
) -> Result<(Activity, Option<u64>), String> {
    let activity = async {
        let looked: Result<Activity, RpcError> = worker.ask(kind::ACTIVITY, &(), PROMPT).await;
        looked.map_err(|error| match error {
            RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => explained(reason),
            other => other.to_string(),
        })
    };
    let trial = async {
        match history.is_empty() {
            true => trial(moves, target).await.ok(),
            false => None,
        }
    };
    // One after the other: a trial would take the processor from the guest.
    let activity = activity.await?;
    Ok((activity, trial.await))
}

/// Throughput of a link in bytes a second.
async fn trial(moves: &Moves, target: &NodeName) -> Result<u64, RpcError> {
    let payload = Bytes::from(vec![0x5a; TRIAL_BYTES]);
    // Establishes the connection and measures the round trip.
    let call = |payload: Bytes| moves.context.peers.call(target, TRIAL, payload, PROMPT);
    call(Bytes::new()).await?;
    let begun = Instant::now();
    call(Bytes::new()).await?;
    let there_and_back = begun.elapsed();
    let begun = Instant::now();
    let calls = (0..TRIAL_MESSAGES).map(|_| call(payload.clone()));
    for answer in futures::future::join_all(calls).await {
        answer?;
    }
    let took = begun.elapsed().saturating_sub(there_and_back);
    let bytes = (TRIAL_BYTES * TRIAL_MESSAGES) as f64;
    Ok((bytes / took.as_secs_f64().max(1e-6)) as u64)
}

/// Whether the target would accept the machine.
async fn would_accept(
    moves: &Moves,
    record: &Record,
    revision: u64,
    worker: &WorkerHandle,
    target: &NodeName,
) -> Result<(), String> {
    let text = |error: RpcError| match error {
        RpcError::Failed { reason, .. } | RpcError::Refused { reason, .. } => reason,
        other => other.to_string(),
    };
    let report = worker.report().await.map_err(text)?;
    let proofs = Proofs::make(&record.spec).await?;
    let no_worker = Fingerprint([0; 32]);
    let context = &moves.context;
    let offer = offer::offer_of(
        context, record, revision, &report, no_worker, &proofs, false,
    );
    let answer = match offer.await.and_then(|offer| pack(&offer).map_err(text)) {
        Ok(payload) => moves
            .context
            .peers
            .call(target, WOULD_ACCEPT, payload, PROMPT)
            .await
            .map(drop)
            .map_err(text),
        Err(reason) => Err(reason),
    };
    proofs.remove().await;
    answer
}
