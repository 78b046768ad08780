//! Replay of recorded decisions by the current code: from the node states and candidates in each
//! decision, the recorded policy and the recorded cost model.

use crate::bad_input::{self, BadInput};
use keel_balance::Name;
use keel_balance::cost::CostModel;
use keel_balance::ledger::{Decision, Line, NoMoveReason};
use keel_balance::policy::Policy;
use keel_balance::round::check_offer;
use keel_balance::select::{CONSIDERED_MAX, Candidate, Considered, NodeState, Verdict, select};
use serde::Serialize;
use std::path::Path;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplayOutcome {
    Same,
    /// Another decision; which, and why.
    Differs(String),
    /// No numeric decision: for example a busy peer, or the end of a move.
    NoDecision,
    /// An input was not recorded; which.
    Unknown(String),
}

/// A decision that differs, or that cannot be replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnmatchedDecision {
    /// Line in the ledger, from 1.
    pub line: usize,
    /// In milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    pub node: String,
    pub was: String,
    #[serde(rename = "again")]
    pub outcome: ReplayOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ReplaySummary {
    pub lines: u64,
    pub same: u64,
    pub differ: u64,
    /// Entries without a numeric decision.
    pub no_decision: u64,
    /// Entries with missing inputs.
    pub unknown: u64,
    /// Entries that differ or cannot be replayed.
    pub others: Vec<UnmatchedDecision>,
}

/// Replays a ledger.
///
/// # Errors
/// The file, line and reason of a parse error.
pub fn replay(path: &Path) -> Result<ReplaySummary, BadInput> {
    let text = bad_input::read(path)?;
    let mut replayed = ReplaySummary::default();
    for (number, text) in text.lines().enumerate() {
        if text.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(text).map_err(|error| {
            let reason = bad_input::sentence(&error.to_string());
            BadInput::line(path, number + 1, reason)
        })?;
        let outcome = outcome(&line);
        replayed.lines += 1;
        match &outcome {
            ReplayOutcome::Same => replayed.same += 1,
            ReplayOutcome::Differs(_) => replayed.differ += 1,
            ReplayOutcome::NoDecision => replayed.no_decision += 1,
            ReplayOutcome::Unknown(_) => replayed.unknown += 1,
        }
        if matches!(
            outcome,
            ReplayOutcome::Differs(_) | ReplayOutcome::Unknown(_)
        ) {
            replayed.others.push(UnmatchedDecision {
                line: number + 1,
                at_unix_ms: line.at_unix_ms,
                node: line.node.to_string(),
                was: line.decision.to_string(),
                outcome,
            });
        }
    }
    if replayed.lines == 0 {
        let reason = "it has no decisions; `keel ledger -o json` writes one on each line";
        return Err(BadInput::file(path, reason));
    }
    Ok(replayed)
}

/// Decides once more.
pub fn outcome(line: &Line) -> ReplayOutcome {
    let policy = line.policy.clone().unwrap_or_default();
    let model = line.model.unwrap_or_default();
    match &line.decision {
        Decision::Move {
            machine,
            here,
            there,
            steady,
            considered,
            ..
        } => {
            // A free target was used because nothing else helped.
            if let Err(why) = check_offer(here, there, (*steady, there.free), &policy) {
                return ReplayOutcome::Differs(format!("nothing would move: {why}"));
            }
            let today = decide(here, there, considered, &model, &policy);
            compare_choice(machine, &today)
        }
        Decision::NoMove {
            why,
            here,
            there,
            considered,
            ..
        } => replay_no_move(why, here, there, considered, &model, &policy),
        // Repairs and plans do not depend on loads.
        Decision::Repair { .. }
        | Decision::Planned { .. }
        | Decision::Ended { .. }
        | Decision::FineGrained { .. }
        | Decision::FineGrainedEnded { .. }
        | Decision::InvalidReport { .. } => ReplayOutcome::NoDecision,
    }
}

fn decide(
    here: &NodeState,
    there: &NodeState,
    considered: &[Considered],
    model: &CostModel,
    policy: &Policy,
) -> Vec<Considered> {
    let candidates: Vec<Candidate> = considered.iter().map(Considered::candidate).collect();
    select(here, there, &candidates, model, policy)
}

fn compare_choice(machine: &Name, today: &[Considered]) -> ReplayOutcome {
    match today.first() {
        Some(first) if first.verdict == Verdict::Chosen => {
            if first.machine == *machine {
                return ReplayOutcome::Same;
            }
            let was = today.iter().find(|it| it.machine == *machine);
            let why = was.map_or("it is not among those considered".to_owned(), |it| {
                it.verdict.to_string()
            });
            ReplayOutcome::Differs(format!("{} would move; of {machine}: {why}", first.machine))
        }
        Some(first) => ReplayOutcome::Differs(format!(
            "nothing would move; of {}: {}",
            first.machine, first.verdict
        )),
        None => ReplayOutcome::Unknown("which machines were considered".into()),
    }
}

fn replay_no_move(
    why: &NoMoveReason,
    here: &Option<NodeState>,
    there: &Option<NodeState>,
    considered: &[Considered],
    model: &CostModel,
    policy: &Policy,
) -> ReplayOutcome {
    let compared = matches!(
        why,
        NoMoveReason::Level
            | NoMoveReason::NoPressure
            | NoMoveReason::Unsteady
            | NoMoveReason::SufficientlyLoaded
            | NoMoveReason::ReservedFree
            | NoMoveReason::NoEligibleMachine { .. }
    );
    if !compared {
        return ReplayOutcome::NoDecision;
    }
    let (Some(here), Some(there)) = (here, there) else {
        return ReplayOutcome::Unknown("the loads of both nodes".into());
    };
    // The sustained difference is recorded for moves only; where it was found sustained, or was not
    // evaluated, it is assumed to be.
    let steady = if matches!(why, NoMoveReason::Unsteady) {
        0.0
    } else {
        f64::INFINITY
    };
    // Whether a free node was allowed is not recorded.
    let offered = |wakes: bool| check_offer(here, there, (steady, wakes), policy);
    if [false, true].map(offered).contains(&Err(why.clone())) {
        return ReplayOutcome::Same;
    }
    match (offered(true), why) {
        (Err(today), _) => {
            ReplayOutcome::Differs(format!("nothing would move, but because {today}"))
        }
        (Ok(()), NoMoveReason::NoEligibleMachine { .. }) => {
            if considered.is_empty() {
                return ReplayOutcome::Unknown("which machines were considered".into());
            }
            let today = decide(here, there, considered, model, policy);
            match today.first() {
                Some(first) if first.verdict == Verdict::Chosen => {
                    ReplayOutcome::Differs(format!("{} would move", first.machine))
                }
                _ if considered.len() >= CONSIDERED_MAX && verdicts_differ(considered, &today) => {
                    ReplayOutcome::Unknown("machines beyond the closest ones".into())
                }
                _ => ReplayOutcome::Same,
            }
        }
        (Ok(()), _) => ReplayOutcome::Differs("the loads would no longer count as level".into()),
    }
}

/// Whether verdicts differ, so that an unrecorded machine might move.
fn verdicts_differ(was: &[Considered], today: &[Considered]) -> bool {
    let reason = |it: &Considered| std::mem::discriminant(&it.verdict);
    was.iter().map(reason).ne(today.iter().map(reason))
}
