//! Drains a node. A drain is a key in the store, which every placement on the node compares. The
//! node itself moves its machines, so that there is exactly one actor, and none if the node is
//! dead. After the steps of a plan, a new plan is made for the remaining machines, until none
//! remains or the key is deleted.

use super::drain_progress::State;
use super::handle::NodeBalancer;
use super::peers::{DRAIN, ask_node};
use super::plan::{AT_ONCE, View, take_step};
use crate::error::CommandError;
use crate::rules::Drain;
use futures::{StreamExt, stream};
use keel_api::{DrainInfo, DrainRequest, DrainState, LeftBehind, PlanGoal, PlanStep, Urgency};
use keel_balance::ledger::Outcome;
use keel_cluster::NodeName;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use keel_store::{Txn, TxnOutcome};
use std::sync::Arc;
use std::time::Duration;

/// Pause before the next plan, if the last one moved machines.
const NEXT_AFTER: Duration = Duration::from_millis(250);
/// The same if it moved none.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// The longest downtime of a machine close to the deadline.
const HURRIED_STILL: Duration = Duration::from_secs(1);

// ── commands ────────────────────────────────────────────────────────────

/// Starts the drain of a node, or changes its deadline.
pub(crate) async fn begin(
    handle: &Arc<NodeBalancer>,
    node: &NodeName,
    request: &DrainRequest,
) -> Result<(), CommandError> {
    if !handle.context.members.contains(node) {
        let what = format!("there is no node {node:?} (see `keel nodes`)");
        return Err(CommandError::NotFound(what));
    }
    let key = Key::Drain(node.clone());
    let now = unix_ms();
    for _ in 0..8 {
        let found = handle.context.store.get(&key.to_string()).await?;
        let before = found.as_ref().and_then(|entry| {
            let drain: Option<Drain> = serde_json::from_slice(&entry.value).ok();
            drain
        });
        let drain = Drain {
            since_unix_ms: before.map_or(now, |drain| drain.since_unix_ms),
            deadline_unix_ms: request.deadline_ms.map(|ms| now.saturating_add(ms)),
        };
        let value =
            serde_json::to_vec(&drain).map_err(|error| CommandError::Invalid(error.to_string()))?;
        let txn = match found {
            Some(entry) => Txn::new().when_modified_at(key.clone(), entry.modified),
            None => Txn::new().when_absent(key.clone()),
        };
        if handle
            .context
            .store
            .txn(txn.put(key.clone(), value))
            .await?
            .is_committed()
        {
            return Ok(());
        }
    }
    Err(CommandError::Conflict(
        "the drain is being changed concurrently; try again".into(),
    ))
}

/// Ends the drain of a node. Machines that have moved away do not return.
pub(crate) async fn end(handle: &Arc<NodeBalancer>, node: &NodeName) -> Result<(), CommandError> {
    let key = Key::Drain(node.clone()).to_string();
    let txn = Txn::new()
        .when(keel_store::Compare::Exists { key: key.clone() })
        .delete(key);
    match handle.context.store.txn(txn).await? {
        TxnOutcome::Committed { .. } => Ok(()),
        TxnOutcome::Refused { .. } if !handle.context.members.contains(node) => {
            let what = format!("there is no node {node:?} (see `keel nodes`)");
            Err(CommandError::NotFound(what))
        }
        TxnOutcome::Refused { .. } => Err(CommandError::Conflict(format!(
            "node {node:?} is not being drained (see `keel nodes`)"
        ))),
    }
}

/// The progress of a drain, queried from any node.
pub(crate) async fn info(
    handle: &Arc<NodeBalancer>,
    node: &NodeName,
) -> Result<DrainInfo, CommandError> {
    if !handle.context.members.contains(node) {
        let what = format!("there is no node {node:?} (see `keel nodes`)");
        return Err(CommandError::NotFound(what));
    }
    ask_node(handle, node, DRAIN, &(), info_here(handle)).await
}

/// The progress of this node's drain.
pub(super) async fn info_here(handle: &NodeBalancer) -> Result<DrainInfo, String> {
    let node = handle.context.name.to_string();
    let key = Key::Drain(handle.context.name.clone()).to_string();
    let entry = handle.context.store.get(&key).await;
    let entry = entry.map_err(|error| error.to_string())?;
    let drain: Option<Drain> = match &entry {
        Some(entry) => {
            Some(serde_json::from_slice(&entry.value).map_err(|error| format!("{key}: {error}"))?)
        }
        None => None,
    };
    let live = handle.placements.live();
    let here = live.iter().filter(|(_, owner)| **owner == *node).count();
    // Parts are moved away by their homes.
    let parts = handle.processes.members.names().len();
    let state = handle.drain.locked();
    let deadline = drain.as_ref().and_then(|drain| drain.deadline_unix_ms);
    let now = unix_ms();
    Ok(DrainInfo {
        state: match &drain {
            None => DrainState::Open,
            Some(_) if here + parts == 0 => DrainState::Empty,
            Some(_) if deadline.is_some_and(|deadline| deadline <= now) => DrainState::Late,
            Some(_) if state.moving.is_empty() && !state.left.is_empty() => DrainState::Stuck,
            Some(_) => DrainState::Draining,
        },
        node,
        since_unix_ms: drain.as_ref().map(|drain| drain.since_unix_ms),
        deadline_unix_ms: deadline,
        machines: here as u32,
        parts: parts as u32,
        moved: state.moved,
        end_unix_ms: state.rest.map(|(rest, at)| at + rest as u64),
        moving: state.moving.clone(),
        left: state.left.clone(),
    })
}

// ── draining ────────────────────────────────────────────────────────────

/// Drains this node whenever the store requires it.
pub(super) async fn follow(handle: Arc<NodeBalancer>) {
    let ordered = |handle: &NodeBalancer| handle.rules.cache.drain_of(handle.context.name.as_str());
    loop {
        let Some(drain) = ordered(&handle) else {
            // The machines that stayed, or left, belong to an earlier drain.
            *handle.drain.locked() = State::default();
            handle.rules.cache.drains_changed().await;
            continue;
        };
        let late = drain.deadline_unix_ms.is_some_and(|at| at <= unix_ms());
        let moved = if late {
            0
        } else {
            empty(&handle, &drain).await
        };
        let pause = if moved > 0 { NEXT_AFTER } else { AGAIN_AFTER };
        tokio::time::sleep(pause).await;
    }
}

/// Makes a plan and carries it out; returns the number of machines that left.
async fn empty(handle: &Arc<NodeBalancer>, drain: &Drain) -> u32 {
    let progress = &handle.drain;
    let goal = PlanGoal::Drain {
        node: handle.context.name.to_string(),
    };
    let planned = match View::gather(handle, &goal).await {
        Ok(view) if view.machines_on(handle.context.name.as_str()) == 0 => {
            let mut state = progress.locked();
            (state.left, state.rest) = (Vec::new(), None);
            return 0;
        }
        Ok(view) => view.plan(goal).await,
        Err(error) => Err(error),
    };
    let plan = match planned {
        Ok(plan) => plan,
        Err(error) => {
            tracing::warn!(%error, "no plan to empty this node; trying again");
            return 0;
        }
    };
    {
        let mut state = progress.locked();
        state.left = plan.left;
        state.rest = Some((plan.duration_ms, unix_ms()));
    }
    let (urgency, budget_micros) = hurry(drain, plan.duration_ms);
    // Steps of one machine run one after the other, those of different machines concurrently.
    let mut of_machines: Vec<Vec<PlanStep>> = Vec::new();
    for step in plan.steps {
        let known = of_machines
            .iter_mut()
            .find(|steps| steps[0].machine == step.machine);
        match known {
            Some(steps) => steps.push(step),
            None => of_machines.push(vec![step]),
        }
    }
    let moves = stream::iter(of_machines)
        .map(|steps| async move { go(handle, &steps, urgency, budget_micros).await });
    let ended: Vec<bool> = moves.buffer_unordered(AT_ONCE.0).collect().await;
    ended.into_iter().filter(|went| *went).count() as u32
}

/// Moves one machine away, unless the drain has ended; returns whether it left.
async fn go(
    handle: &Arc<NodeBalancer>,
    steps: &[PlanStep],
    urgency: Urgency,
    budget_micros: Option<u64>,
) -> bool {
    let progress = &handle.drain;
    let why = format!("{} is being drained", handle.context.name);
    for step in steps {
        if handle
            .rules
            .cache
            .drain_of(handle.context.name.as_str())
            .is_none()
        {
            return false;
        }
        progress.locked().moving.push(step.clone());
        let outcome = take_step(handle, step, &why, urgency, budget_micros).await;
        let mut state = progress.locked();
        state.moving.retain(|it| it != step);
        if let Outcome::Moved { .. } = outcome {
            state.moved += 1;
        } else {
            state.left.push(LeftBehind {
                machine: step.machine.clone(),
                node: handle.context.name.to_string(),
                reason: outcome.to_string(),
            });
            return false;
        }
    }
    true
}

/// If the remaining time is less than twice the prediction, moves become urgent and the downtime
/// limit is raised.
fn hurry(drain: &Drain, rest_ms: f64) -> (Urgency, Option<u64>) {
    let Some(deadline) = drain.deadline_unix_ms else {
        return (Urgency::Normal, None);
    };
    let left_ms = deadline.saturating_sub(unix_ms()) as f64;
    if left_ms > 2.0 * rest_ms {
        return (Urgency::Normal, None);
    }
    let still = u64::try_from(HURRIED_STILL.as_micros()).ok();
    (Urgency::High, still)
}
