//! Fine-grained balancing: placement of the threads and the memory of one machine that may span
//! several nodes.
//!
//! | pressed | action | why it suffices |
//! |---|---|---|
//! | a node's cores, where any node would be pressed | parts on more nodes | no move helps |
//! | a node's cores | a thread to another part | costs microseconds and a few pages |
//! | a thread, by remote page faults | the thread to its pages | smaller than its pages |
//! | memory of a node or a part | objects, coldest first | costs as much as their bytes |
//! | all threads, by alternating pages | all back to the home | they run faster there |
//!
//! The cheapest sufficient action is chosen: a thread before objects, both before the machine.
//! Where a move of the whole machine suffices, rounds ([`crate::round`]) do it and nothing is
//! split; where none suffices, rounds do not move it ([`crate::select::Verdict::Spreads`]).
//!
//! The machine's home decides alone: only the home knows the threads, and a wrong decision costs
//! microseconds. About other nodes it relies on their view in rounds.
//!
//! - `parts`: creating, adding and removing parts
//! - `threads`: moving threads
//! - `objects`: moving memory

mod objects;
mod parts;
mod threads;

pub use objects::{Object, coldest};
pub use parts::gather_if_slower;

use crate::Name;
use crate::policy::Policy;
use crate::select::NodeState;
use crate::window::{NEWEST, NEWEST_SHOWING};
use serde::{Deserialize, Serialize};
use std::fmt;

/// CPU demand from which a thread counts as CPU-bound, in cores.
const CPU_BOUND_CORES: f64 = 0.9;
/// CPU demand below which a thread is not worth moving, in cores.
const CORES_MIN: f64 = 0.1;
/// Consecutive slow observations after which thread moves are no longer tried before gathering.
const LOSING_OBSERVATIONS_MAX: u32 = 20;

#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// The home has 0.
    pub number: u32,
    pub node: Name,
    /// Bytes of the machine's memory at this part, if known.
    pub memory_bytes: Option<u64>,
    /// It exceeded its limit since the last observation and evicted arbitrary pages.
    pub overflows: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Thread {
    pub tid: u32,
    /// The part at which it is.
    pub part: u32,
    /// CPU demand at that part's node, in cores: running or waiting for a core.
    pub cores: f64,
    /// Part of `cores` for which it ran.
    pub ran_cores: f64,
    /// Whether it must stay: it is moving, or arrived recently.
    pub held: bool,
    pub affinity: Option<Affinity>,
}

/// The part to which a thread has an affinity.
#[derive(Debug, Clone, PartialEq)]
pub struct Affinity {
    pub part: u32,
    pub why: String,
    /// Share of its time stalled on pages of that part; 0 for an affinity that the guest declared.
    /// Of the threads stalled on remote pages only one moves at a time: if two share pages, the
    /// other one is then where the pages are.
    pub stall_share: f64,
}

/// A node with a part, or a candidate for one.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub name: Name,
    pub state: NodeState,
    /// Loads of its last samples, newest first.
    pub loads: Vec<f64>,
    /// Why a part is not allowed there, if it is not.
    pub forbidden: Option<String>,
}

/// Input of a decision. The home's node is the first.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// Maximum number of parts.
    pub parts_max: u32,
    /// Whether the spec demands parts from the start.
    pub from_beginning: bool,
    /// Memory limit of one part, in bytes.
    pub part_memory_bytes: Option<u64>,
    /// The home alone, or with members.
    pub parts: Vec<Part>,
    pub threads: Vec<Thread>,
    /// The home's node first, then those of members, then others.
    pub nodes: Vec<Node>,
    /// Average number of threads stalled on remote pages lately, in cores, if the machine spans.
    pub waited_cores: f64,
    /// Consecutive observations in which it ran slower than at its home alone
    /// ([`gather_if_slower`]).
    pub losing_observations: u32,
    /// It was gathered recently because it ran slower with parts.
    pub recently_gathered: bool,
    /// Recent thread moves, source and target node: the reverse direction is blocked.
    pub recent: Vec<(Name, Name)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = FineGrainedAction)]
#[serde(rename_all = "snake_case", tag = "grain")]
pub enum Action {
    /// Creates parts on these nodes.
    Spread {
        /// In addition to the home's node.
        #[schema(value_type = Vec<String>)]
        nodes: Vec<Name>,
    },
    /// Moves a thread to another part.
    Thread {
        tid: u32,
        #[schema(value_type = String)]
        from: Name,
        /// The target part.
        part: u32,
        #[schema(value_type = String)]
        to: Name,
    },
    /// Moves objects to another part, coldest first.
    Objects {
        from_part: u32,
        #[schema(value_type = String)]
        from: Name,
        part: u32,
        #[schema(value_type = String)]
        to: Name,
        bytes: u64,
    },
    /// Moves everything back to the home.
    Gather,
    /// Removes the parts on these nodes.
    Leave {
        #[schema(value_type = Vec<String>)]
        nodes: Vec<Name>,
    },
}

/// An alternative that was evaluated, with the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = FineGrainedAlternative)]
pub struct Alternative {
    /// An action, a thread or a node.
    #[serde(rename = "what")]
    pub option: String,
    /// Why it was chosen, or not.
    #[serde(rename = "found")]
    pub finding: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = FineGrainedChoice)]
pub struct Choice {
    #[serde(rename = "grain")]
    pub action: Action,
    pub why: String,
    /// Loads of the nodes at that time.
    #[schema(value_type = Vec<(String, f64)>)]
    pub loads: Vec<(Name, f64)>,
    #[serde(rename = "weighed")]
    pub alternatives: Vec<Alternative>,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &u64| *bytes as f64 / f64::from(1 << 20);
        match self {
            Action::Spread { nodes } => write!(f, "gets parts on {}", nodes.join(", ")),
            Action::Thread { tid, from, to, .. } => {
                write!(f, "thread {tid} moves from {from} to {to}")
            }
            Action::Objects {
                from, to, bytes, ..
            } => write!(
                f,
                "{:.1} MiB of memory move from {from} to {to}",
                mib(bytes)
            ),
            Action::Gather => f.write_str("returns to its home"),
            Action::Leave { nodes } => write!(f, "removes its parts on {}", nodes.join(", ")),
        }
    }
}

impl Observation {
    fn node(&self, name: &Name) -> Option<&Node> {
        self.nodes.iter().find(|it| it.name == *name)
    }

    fn spans(&self) -> bool {
        self.parts.len() > 1
    }

    fn loads(&self) -> Vec<(Name, f64)> {
        let nodes = self.nodes.iter();
        nodes.map(|it| (it.name.clone(), it.state.load)).collect()
    }

    /// Builds a choice with the current loads.
    fn choice(&self, action: Action, why: String, alternatives: Vec<Alternative>) -> Choice {
        Choice {
            action,
            why,
            loads: self.loads(),
            alternatives,
        }
    }
}

/// Load of a thread with this CPU demand on a node: a CPU-bound thread takes a whole core anywhere,
/// others take less time on a faster one. As for machines ([`crate::load::Factors::on`]).
fn thread_weight(cores: f64, on: &NodeState, there: &NodeState, policy: &Policy) -> f64 {
    let is_bound = cores >= CPU_BOUND_CORES;
    let faster = there.capacity.speed / on.capacity.speed;
    let cores = if is_bound { cores } else { cores / faster };
    policy.weights.cpu * cores / there.capacity.cores
}

/// Whether most of the newest samples are at least `least`.
fn is_sustained(loads: &[f64], least: f64) -> bool {
    let newest = loads.iter().take(NEWEST);
    newest.filter(|load| **load >= least).count() >= NEWEST_SHOWING
}

/// The actions for a machine now, with reasons; empty if nothing is pressed.
pub fn decide(observation: &Observation, policy: &Policy) -> Vec<Choice> {
    if !observation.spans() {
        return parts::create(observation, policy).into_iter().collect();
    }
    if let Some(choice) = parts::leave_forbidden_nodes(observation) {
        return vec![choice];
    }
    if let Some(choice) = gather_if_slower(observation, policy) {
        // Collocated threads may run fast enough.
        let affinity = match observation.losing_observations {
            0..=LOSING_OBSERVATIONS_MAX => threads::follow_affinity(observation, policy),
            _ => Vec::new(),
        };
        return if affinity.is_empty() {
            vec![choice]
        } else {
            affinity
        };
    }
    let mut choices = threads::relieve_pressed_nodes(observation, policy);
    if choices.is_empty() {
        choices.extend(parts::add_part(observation, policy));
    }
    if choices.is_empty() {
        choices.extend(threads::follow_affinity(observation, policy));
    }
    choices.extend(objects::relieve_memory(observation, policy));
    choices
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests;
