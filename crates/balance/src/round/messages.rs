//! What balancers tell each other in rounds.

use crate::Name;
use crate::load::{Capacity, Factors, LOAD_MAX, ValidationError};
use crate::policy::Policy;
use crate::select::NodeState;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a node tells of itself in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// The policy by which it measures.
    pub policy_revision: u64,
    /// Itself now.
    #[serde(rename = "side")]
    pub state: NodeState,
    /// Loads of its last samples, newest first.
    pub loads: Vec<f64>,
    /// Whether it has promised its room to another machine.
    pub busy: bool,
}

impl View {
    pub(super) fn sanitise(&mut self) -> Vec<ValidationError> {
        let mut errors = self.state.capacity.sanitise();
        self.loads
            .truncate(Policy::default().window_samples.max(120));
        for load in self.loads.iter_mut().chain([&mut self.state.load]) {
            if !(0.0..=LOAD_MAX).contains(load) {
                errors.push(ValidationError {
                    field: "load".into(),
                    found: load.to_string(),
                });
                *load = 0.0;
            }
        }
        if self.state.memory_free_bytes > self.state.capacity.memory_bytes {
            errors.push(ValidationError {
                field: "memory_free_bytes".into(),
                found: self.state.memory_free_bytes.to_string(),
            });
            self.state.memory_free_bytes = 0;
        }
        errors
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// For its view.
    View,
    /// What machines with such factors, measured at a node with such a capacity,
    /// would weigh there.
    Weigh {
        capacity: Capacity,
        factors: Vec<Factors>,
    },
    /// Whether it takes a machine now.
    #[serde(rename = "Take")]
    Reserve {
        machine: Name,
        capacity: Capacity,
        factors: Factors,
        /// The load of who asks: the target must stay below it.
        load: f64,
        /// Whether it is to be filled no further than `pack` allows, unless it is free.
        packs: bool,
    },
    /// What was granted is not needed.
    Release { machine: Name },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    View(View),
    /// It has not measured for long enough.
    #[serde(rename = "Measuring")]
    NotReady,
    /// What the machines would weigh, in the order asked.
    Weights(Vec<f64>),
    Granted,
    /// It takes part in another move.
    Busy,
    Refused {
        why: String,
    },
    Released,
}

/// The nodes that a balancer may ask.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Peers {
    nodes: Arc<[Name]>,
    /// Which of them is the balancer's own.
    this: Option<usize>,
}

impl Peers {
    /// Those that are alive, of which one is the balancer's own: so thousands of
    /// simulated balancers share one list. A number that is none of theirs counts as
    /// none.
    pub fn among(nodes: Arc<[Name]>, this: usize) -> Self {
        let this = (this < nodes.len()).then_some(this);
        Peers { nodes, this }
    }

    pub fn len(&self) -> usize {
        self.nodes.len() - usize::from(self.this.is_some())
    }

    /// Whether there are no others.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = &Name> {
        (0..self.len()).filter_map(|number| self.get(number))
    }

    /// One of the others, by its number from 0 to [`len`](Self::len).
    pub(super) fn get(&self, number: usize) -> Option<&Name> {
        let skips = self.this.is_some_and(|this| number >= this);
        self.nodes.get(number + usize::from(skips))
    }
}

impl From<Vec<Name>> for Peers {
    /// Of the others, without the balancer's own.
    fn from(others: Vec<Name>) -> Self {
        Peers {
            nodes: others.into(),
            this: None,
        }
    }
}
