//! Carries out the balancer's moves.

use super::handle::{Input, NodeBalancer};
use super::move_tokens;
use crate::moves::{MoveOrder, RACED};
use keel_api::{MoveLine, Urgency};
use keel_balance::Name;
use keel_balance::ledger::{Decision, Outcome};
use keel_balance::rules::Violation;
use keel_cluster::{MachineName, NodeName};
use keel_machine::moves::{Ending, MoveReport};
use std::sync::Arc;

/// Moves a machine that violates a rule on its present node.
pub(super) async fn repair_now(
    handle: &Arc<NodeBalancer>,
    machine: Name,
    target: Name,
    broken: Violation,
) {
    let outcome = match run_move(handle, &machine, &target, Urgency::High, None).await {
        Ok(report) => ended(&report),
        Err(why) => Outcome::Stayed { why },
    };
    tracing::info!(%machine, %target, %broken, %outcome, "repair");
    handle.keep(Decision::Ended {
        machine,
        target,
        outcome,
        load: None,
    });
    // The balancer ends with the agent.
    let _ = handle.inputs.send(Input::RepairOver);
}

/// Moves a machine with a token; returns the outcome.
pub(super) async fn carry_out_move(
    handle: &Arc<NodeBalancer>,
    machine: &str,
    target: &str,
    slots_max: u32,
) -> Outcome {
    let stayed = |why: String| Outcome::Stayed { why };
    // The target's promise expires before a queued move would start, so the move does not wait in
    // the queue.
    let worker = MachineName::new(machine).map(|machine| handle.processes.machines.get(&machine));
    if let Ok(Some(worker)) = worker {
        let bytes = worker.report().await.map_or(0, |it| it.memory_bytes);
        if handle.moves.queue.is_full(bytes) {
            return Outcome::Capped;
        }
    }
    let slot = match move_tokens::take(handle, slots_max).await {
        Ok(Some(slot)) => slot,
        Ok(None) => return Outcome::Capped,
        Err(error) => return stayed(error.to_string()),
    };
    let report = run_move(handle, machine, target, Urgency::Low, None).await;
    move_tokens::give_back(handle, slot).await;
    report.map_or_else(stayed, |report| ended(&report))
}

pub(super) fn ended(report: &MoveReport) -> Outcome {
    match &report.ending {
        Ending::Moved => Outcome::Moved {
            duration_ms: report.total_micros as f64 / 1e3,
            downtime_ms: report.downtime_micros as f64 / 1e3,
            bytes: report.bytes,
        },
        Ending::Stayed { reason } if reason.contains(RACED) => Outcome::Raced {
            rule: reason.rsplit('"').nth(1).unwrap_or_default().to_owned(),
        },
        Ending::Stayed { .. } => Outcome::Stayed { why: report.line() },
    }
}

pub(super) async fn run_move(
    handle: &Arc<NodeBalancer>,
    machine: &str,
    target: &str,
    urgency: Urgency,
    budget_micros: Option<u64>,
) -> Result<MoveReport, String> {
    let order = MoveOrder {
        machine: MachineName::new(machine).map_err(|error| error.to_string())?,
        target: NodeName::new(target).map_err(|error| error.to_string())?,
        post_copy: false,
        checkpoint_to: None,
        urgency,
        budget_micros,
    };
    let lines = handle.moves.move_machine(&order).await;
    let mut lines = lines.map_err(|error| error.to_string())?;
    while let Some(line) = lines.recv().await {
        match line {
            MoveLine::Progress(_) => {}
            MoveLine::Report(report) => return Ok(*report),
            MoveLine::Error(error) => return Err(error),
        }
    }
    Err("it was interrupted".into())
}
