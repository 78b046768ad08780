//! Decisions as they are stored and displayed. A decision records its inputs: the two loads, the
//! candidates with their verdicts, cost and gain, and the rule that decided. Inaction is a decision
//! too: each change of its reason is one entry.

use crate::Name;
use crate::cost::CostModel;
use crate::fine_grained::Choice;
use crate::load::ValidationError;
use crate::policy::{Mode, Policy};
use crate::rules::Violation;
use crate::select::{Considered, Constraint, NodeState, Verdict};
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoMoveReason {
    /// The policy's mode is `off`.
    Off,
    /// No other node is alive.
    #[serde(rename = "alone")]
    NoPeers,
    /// Not enough samples.
    #[serde(rename = "measuring")]
    InsufficientSamples,
    /// Neither node is pressed.
    #[serde(rename = "nobody_pressed")]
    NoPressure,
    /// The loads differ by less than the margin, or this node is the lighter one.
    Level,
    Unsteady,
    /// This node's load is above the policy's `empty_load` (`pack`).
    #[serde(rename = "filled")]
    SufficientlyLoaded,
    /// The other node is free, and `pack` keeps it free.
    #[serde(rename = "kept_free")]
    ReservedFree,
    /// This node has no candidate.
    NoMachines,
    /// No candidate is eligible; the verdict on the closest one.
    #[serde(rename = "none_may_go")]
    NoEligibleMachine {
        #[schema(value_type = String)]
        nearest: Name,
        verdict: Verdict,
    },
    /// The other node did not answer.
    NoAnswer,
    /// The other node expects another machine.
    Busy,
    /// The other node refused the machine.
    Refused {
        why: String,
    },
    /// The other node has another revision of the policy.
    OtherPolicy,
    /// The policy's limit of concurrent moves is reached.
    Capped,
    /// Backoff after a failed move to that node.
    #[serde(rename = "avoided")]
    Backoff {
        /// Remaining milliseconds.
        for_ms: u64,
    },
    /// A concurrent transaction changed the holders of a rule.
    Raced {
        rule: String,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MoveOutcome)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The machine runs at the target.
    Moved {
        /// From the offer to the end.
        duration_ms: f64,
        /// Time during which the guest did not run.
        downtime_ms: f64,
        bytes: u64,
    },
    /// The machine keeps running at the source.
    Stayed { why: String },
    /// Not started: the policy's limit of concurrent moves is reached.
    Capped,
    /// Not started: a concurrent transaction changed the holders of a rule.
    Raced { rule: String },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = BalanceDecision)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Decision {
    Move {
        #[schema(value_type = String)]
        machine: Name,
        #[schema(value_type = String)]
        target: Name,
        /// Degree of automation at that time.
        mode: Mode,
        here: NodeState,
        there: NodeState,
        /// The sustained load difference.
        steady: f64,
        /// All candidates, the selected one first.
        considered: Vec<Considered>,
    },
    /// Nothing moves; recorded when the reason changes.
    #[serde(rename = "stay")]
    NoMove {
        why: NoMoveReason,
        /// The peer of the round, if there was one.
        #[schema(value_type = Option<String>)]
        peer: Option<Name>,
        /// This node, if it was measured.
        here: Option<NodeState>,
        there: Option<NodeState>,
        considered: Vec<Considered>,
    },
    /// A machine moves because its placement violates a rule.
    Repair {
        #[schema(value_type = String)]
        machine: Name,
        /// `None` if no node is allowed.
        #[schema(value_type = Option<String>)]
        target: Option<Name>,
        /// The violated rule.
        broken: Violation,
    },
    /// A machine moves as part of a plan: a user's or a drain's.
    Planned {
        #[schema(value_type = String)]
        machine: Name,
        #[schema(value_type = String)]
        target: Name,
        plan: String,
    },
    /// A move that this balancer decided has ended.
    Ended {
        #[schema(value_type = String)]
        machine: Name,
        #[schema(value_type = String)]
        target: Name,
        outcome: Outcome,
        /// Predicted and actual load of this node.
        load: Option<(f64, f64)>,
    },
    /// A fine-grained action on the threads or memory of a machine.
    #[serde(rename = "grain")]
    FineGrained {
        #[schema(value_type = String)]
        machine: Name,
        /// Degree of automation at that time.
        mode: Mode,
        choice: Choice,
    },
    /// A fine-grained action has ended.
    #[serde(rename = "grain_ended")]
    FineGrainedEnded {
        #[schema(value_type = String)]
        machine: Name,
        outcome: String,
    },
    /// Another node reported invalid numbers.
    #[serde(rename = "absurd")]
    InvalidReport {
        #[schema(value_type = String)]
        peer: Name,
        fields: Vec<ValidationError>,
    },
}

/// A stored decision, with all inputs that are needed to replay it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = LedgerLine)]
pub struct Line {
    /// In milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    #[schema(value_type = String)]
    pub node: Name,
    /// The policy in force.
    #[serde(default)]
    pub policy: Option<Policy>,
    /// The learned cost model.
    #[serde(default)]
    pub model: Option<CostModel>,
    pub decision: Decision,
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = |ms: &u64| *ms as f64 / 1e3;
        match self {
            Constraint::Held { for_ms } => {
                write!(
                    f,
                    "it arrived recently and stays for another {:.0} s",
                    s(for_ms)
                )
            }
            Constraint::CoolDown { for_ms } => write!(
                f,
                "it came from there, and does not return for another {:.0} s",
                s(for_ms)
            ),
            Constraint::Failed { for_ms } => write!(
                f,
                "its last move failed; the next attempt is in {:.0} s",
                s(for_ms)
            ),
            Constraint::Moving => f.write_str("it is moving already"),
            Constraint::OptedOut => f.write_str("its spec excludes it from balancing"),
            Constraint::Spans => f.write_str("it has parts on several nodes (`keel unspan`)"),
            Constraint::Rule { rule, reason } => write!(f, "rule {rule:?}: {reason}"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: &u64| *bytes as f64 / f64::from(1 << 30);
        match self {
            Verdict::Chosen => f.write_str("it levels the two nodes best"),
            Verdict::WorseFit => f.write_str("another machine levels the two nodes better"),
            Verdict::CostsMore => {
                f.write_str("another machine levels about as well and costs less to move")
            }
            Verdict::Constrained(bound) => bound.fmt(f),
            Verdict::NoRoom {
                needs_bytes,
                free_bytes,
            } => write!(
                f,
                "it needs {:.1} GiB, and {:.1} GiB are free there without the headroom for failovers",
                gib(needs_bytes),
                gib(free_bytes)
            ),
            Verdict::Overshoots => {
                f.write_str("the target would be as loaded as the source is now")
            }
            Verdict::SwapsImbalance => {
                f.write_str("the two nodes would be about as uneven as they are")
            }
            Verdict::TooLittle { lowers, least } => write!(
                f,
                "its gain is too small ({lowers:.3}, the minimum is {least:.3})"
            ),
            Verdict::NotWorthwhile => {
                f.write_str("its gain does not certainly exceed the cost of the move")
            }
            Verdict::Overfills => {
                f.write_str("the target would be filled beyond the policy's fill_load")
            }
            Verdict::Spreads => {
                f.write_str("it gets parts on several nodes instead, or is about to (max_parts)")
            }
        }
    }
}

impl fmt::Display for NoMoveReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoMoveReason::Off => f.write_str("balancing is off"),
            NoMoveReason::NoPeers => f.write_str("there is no other node"),
            NoMoveReason::InsufficientSamples => {
                f.write_str("loads have not been measured for long enough")
            }
            NoMoveReason::NoPressure => {
                f.write_str("no node is pressed: a move would speed up nothing")
            }
            NoMoveReason::Level => f.write_str("the loads are level"),
            NoMoveReason::Unsteady => f.write_str("the difference has not lasted"),
            NoMoveReason::SufficientlyLoaded => {
                f.write_str("this node's load is above the policy's empty_load")
            }
            NoMoveReason::ReservedFree => f.write_str("the other node is free, and is kept free"),
            NoMoveReason::NoMachines => f.write_str("no machine runs here"),
            NoMoveReason::NoEligibleMachine { nearest, verdict } => {
                write!(
                    f,
                    "no machine is eligible; the closest one, {nearest:?}: {verdict}"
                )
            }
            NoMoveReason::NoAnswer => f.write_str("the other node did not answer"),
            NoMoveReason::Busy => f.write_str("the other node is busy with another move"),
            NoMoveReason::Refused { why } => write!(f, "the other node refused it: {why}"),
            NoMoveReason::OtherPolicy => f.write_str("the other node still has another policy"),
            NoMoveReason::Capped => {
                f.write_str("the policy's limit of concurrent moves is reached")
            }
            NoMoveReason::Backoff { for_ms } => write!(
                f,
                "a move to that node failed; the next attempt is in {:.0} s",
                *for_ms as f64 / 1e3
            ),
            NoMoveReason::Raced { rule } => {
                write!(f, "conflict with a concurrent change of rule {rule:?}")
            }
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Moved {
                duration_ms,
                downtime_ms,
                ..
            } => write!(
                f,
                "moved in {:.2} s, downtime {downtime_ms:.1} ms",
                duration_ms / 1e3
            ),
            Outcome::Stayed { why } => write!(f, "stayed: {why}"),
            Outcome::Capped => NoMoveReason::Capped.fmt(f),
            Outcome::Raced { rule } => NoMoveReason::Raced { rule: rule.clone() }.fmt(f),
        }
    }
}

impl Decision {
    /// The machine concerned, if there is one.
    pub fn machine(&self) -> Option<&Name> {
        match self {
            Decision::Move { machine, .. }
            | Decision::Repair { machine, .. }
            | Decision::Planned { machine, .. }
            | Decision::FineGrained { machine, .. }
            | Decision::FineGrainedEnded { machine, .. }
            | Decision::Ended { machine, .. } => Some(machine),
            Decision::NoMove { .. } | Decision::InvalidReport { .. } => None,
        }
    }

    /// The evaluation of a machine in this decision.
    pub fn considered(&self, machine: &str) -> Option<&Considered> {
        match self {
            Decision::Move { considered, .. } | Decision::NoMove { considered, .. } => {
                considered.iter().find(|it| &*it.machine == machine)
            }
            Decision::Repair { .. }
            | Decision::Planned { .. }
            | Decision::Ended { .. }
            | Decision::FineGrained { .. }
            | Decision::FineGrainedEnded { .. }
            | Decision::InvalidReport { .. } => None,
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::Move {
                machine,
                target,
                mode,
                here,
                there,
                considered,
                ..
            } => {
                let would = match mode {
                    Mode::Automatic => "moves",
                    Mode::Confirm => "will move, once confirmed,",
                    Mode::Suggest | Mode::Off => "would move",
                };
                write!(
                    f,
                    "{machine} {would} to {target}: load {:.2} here, {:.2} there",
                    here.load, there.load
                )?;
                if let Some(chosen) = considered.first() {
                    write!(
                        f,
                        "; its load is {:.2} here and {:.2} there, which results in {:.2} and {:.2}; \
                         gain {:.1} core-s, cost {:.2}",
                        chosen.here,
                        chosen.there,
                        here.load - chosen.here,
                        there.load + chosen.there,
                        chosen.gain.core_s.mid,
                        chosen.cost.core_s.mid
                    )?;
                    if chosen.link.is_far() {
                        write!(
                            f,
                            ", over a link of {:.0} ms and {:.1} MB/s",
                            chosen.link.round_trip_ms,
                            chosen.link.bytes_per_s / 1e6
                        )?;
                    }
                }
                Ok(())
            }
            Decision::NoMove {
                why,
                peer,
                here,
                there,
                ..
            } => {
                write!(f, "nothing moves: {why}")?;
                match (peer, here, there) {
                    (Some(peer), Some(here), Some(there)) => write!(
                        f,
                        " (load {:.2} here, {:.2} on {peer})",
                        here.load, there.load
                    ),
                    (Some(peer), ..) => write!(f, " (asked: {peer})"),
                    _ => Ok(()),
                }
            }
            Decision::Repair {
                machine,
                target: Some(target),
                broken,
            } => write!(
                f,
                "{machine} moves to {target} because its placement violates rule {:?}: {}",
                &*broken.rule, broken.why
            ),
            Decision::Repair {
                machine, broken, ..
            } => write!(
                f,
                "{machine} violates rule {:?}, and no node is allowed: {}",
                &*broken.rule, broken.why
            ),
            Decision::Planned {
                machine,
                target,
                plan,
            } => write!(f, "{machine} moves to {target}: {plan}"),
            Decision::Ended {
                machine,
                target,
                outcome,
                load,
            } => {
                write!(f, "{machine} to {target}: {outcome}")?;
                if let Some((predicted, actual)) = load {
                    write!(f, "; load here {actual:.2}, predicted {predicted:.2}")?;
                }
                Ok(())
            }
            Decision::FineGrained {
                machine,
                mode,
                choice,
            } => {
                let would = match mode {
                    Mode::Automatic => "",
                    Mode::Confirm | Mode::Suggest | Mode::Off => " (only suggested)",
                };
                write!(f, "{machine}: {}{would}: {}", choice.action, choice.why)
            }
            Decision::FineGrainedEnded { machine, outcome } => write!(f, "{machine}: {outcome}"),
            Decision::InvalidReport { peer, fields } => {
                write!(f, "invalid numbers of {peer}:")?;
                for field in fields.iter().take(4) {
                    write!(f, " {field};")?;
                }
                Ok(())
            }
        }
    }
}
