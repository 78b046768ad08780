//! Grains finer than a machine: what is done with the threads and the memory of one
//! machine that may have parts on several nodes.
//!
//! | pressed | grain | cures |
//! |---|---|---|
//! | a node's cores, by a machine that would press any other as well | parts on more nodes | no whole move would |
//! | a node's cores | a thread to another part | takes microseconds, and a few pages |
//! | a thread, by what it waits for | it to where that is, if there is room | a thread is less than its pages |
//! | a node's memory, or what a part may keep | objects, coldest first | takes as long as their bytes |
//! | everything, by pages that go to and fro | all of it back together | its threads run less than they would at its home alone |
//!
//! The cheapest that cures is taken: a thread before objects, both before the machine.
//! Where a whole machine may cure it, that is the business of the rounds
//! ([`crate::round`]), and nothing is spread; where none may, rounds move nothing
//! ([`crate::select::Verdict::Spreads`]).
//!
//! The machine's home decides, alone: it is the only one that knows the threads, and a
//! wrong decision costs microseconds. Of other nodes it believes what they tell rounds.
//!
//! - `parts`: whether it gets some, or more, or loses some, or all
//! - `threads`: which of its threads go elsewhere
//! - `objects`: what of its memory does

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

/// Cores of a thread that takes one all the time.
const CPU_BOUND_CORES: f64 = 0.9;
/// Cores below which a thread is not worth moving.
const CORES_MIN: f64 = 0.1;
/// Looks at which it loses by its parts, after which it does not matter what may help.
const LOSING_OBSERVATIONS_MAX: u32 = 20;

#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its number; the home has 0.
    pub number: u32,
    pub node: Name,
    /// Bytes of the machine's memory that it has, where that is known.
    pub memory_bytes: Option<u64>,
    /// It had too much since the last look, and gave away what came first to hand.
    pub overflows: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Thread {
    pub tid: u32,
    /// The part at which it is.
    pub part: u32,
    /// Cores of that part's node that it takes or waits for.
    pub cores: f64,
    /// Of them, those that it gets.
    pub ran_cores: f64,
    /// Whether it must stay: it moves, or came not long ago.
    pub held: bool,
    pub affinity: Option<Affinity>,
}

/// The part that draws a thread.
#[derive(Debug, Clone, PartialEq)]
pub struct Affinity {
    pub part: u32,
    pub why: String,
    /// Share of its time that it stands at pages from there; 0 where it is a liking. Of
    /// those that go for their pages one goes at a time: of two that share some the other
    /// one is where they are then.
    pub stall_share: f64,
}

/// A node that has a part, or may get one.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub name: Name,
    pub state: NodeState,
    /// Loads of its last samples, newest first.
    pub loads: Vec<f64>,
    /// Why no part may be there, if none may.
    pub forbidden: Option<String>,
}

/// What is known when it is decided. The home's node is the first.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// Parts that it may have.
    pub parts_max: u32,
    /// It is to have them from its beginning.
    pub from_beginning: bool,
    /// What one part keeps at most.
    pub part_memory_bytes: Option<u64>,
    /// Those that it has: the home alone, or with members.
    pub parts: Vec<Part>,
    pub threads: Vec<Thread>,
    /// The home's node first, then those of members, then others.
    pub nodes: Vec<Node>,
    /// Threads that waited for pages on average lately, in cores, if it spans.
    pub waited_cores: f64,
    /// Looks in a row at which it lost by its parts ([`gather_if_slower`]).
    pub losing_observations: u32,
    /// It was brought together not long ago, since it lost more than it won.
    pub recently_gathered: bool,
    /// From which nodes to which threads went not long ago: none goes back.
    pub recent: Vec<(Name, Name)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "grain")]
pub enum Action {
    /// It gets parts on these nodes.
    Spread {
        /// Beside its home's.
        nodes: Vec<Name>,
    },
    /// A thread goes to another part.
    Thread {
        tid: u32,
        from: Name,
        /// The part that it goes to.
        part: u32,
        to: Name,
    },
    /// Objects go to another part, coldest first.
    Objects {
        from_part: u32,
        from: Name,
        part: u32,
        to: Name,
        bytes: u64,
    },
    /// All of it comes back to its home.
    Gather,
    /// It has no parts on these nodes any more.
    Leave { nodes: Vec<Name> },
}

/// Something that was weighed, and what was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// What: a grain, a thread, a node.
    #[serde(rename = "what")]
    pub option: String,
    /// Why it was taken, or not.
    #[serde(rename = "found")]
    pub finding: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    #[serde(rename = "grain")]
    pub action: Action,
    pub why: String,
    /// Loads by which it was.
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
            Action::Gather => f.write_str("comes back together"),
            Action::Leave { nodes } => write!(f, "has no part on {} any more", nodes.join(", ")),
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

    /// Loads of nodes with that of some threads elsewhere than where they are.
    fn choice(&self, action: Action, why: String, alternatives: Vec<Alternative>) -> Choice {
        Choice {
            action,
            why,
            loads: self.loads(),
            alternatives,
        }
    }
}

/// What a thread that takes so many cores of one node weighs on a node: one that takes a whole
/// core does so anywhere, what others do takes less time on a faster one. As machines weigh
/// ([`crate::load::Factors::on`]).
fn thread_weight(cores: f64, on: &NodeState, there: &NodeState, policy: &Policy) -> f64 {
    let is_bound = cores >= CPU_BOUND_CORES;
    let faster = there.capacity.speed / on.capacity.speed;
    let cores = if is_bound { cores } else { cores / faster };
    policy.weights.cpu * cores / there.capacity.cores
}

/// Whether most of the newest samples show that much.
fn is_sustained(loads: &[f64], least: f64) -> bool {
    let newest = loads.iter().take(NEWEST);
    newest.filter(|load| **load >= least).count() >= NEWEST_SHOWING
}

/// What is to be done with a machine now, and why; nothing where nothing is pressed.
pub fn decide(observation: &Observation, policy: &Policy) -> Vec<Choice> {
    if !observation.spans() {
        return parts::create(observation, policy).into_iter().collect();
    }
    if let Some(choice) = parts::leave_forbidden_nodes(observation) {
        return vec![choice];
    }
    if let Some(choice) = gather_if_slower(observation, policy) {
        // Threads that are together may lose no more.
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
