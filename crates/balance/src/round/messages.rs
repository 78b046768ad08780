//! Messages between balancers in rounds.

use crate::Name;
use crate::load::{Capacity, Factors, LOAD_MAX, ValidationError};
use crate::policy::Policy;
use crate::select::NodeState;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A node's view of itself, sent in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// Revision of the policy by which it measures.
    pub policy_revision: u64,
    /// Itself now.
    #[serde(rename = "side")]
    pub state: NodeState,
    /// Loads of its last samples, newest first.
    pub loads: Vec<f64>,
    /// Whether it has granted a reservation.
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
    /// The peer's view.
    View,
    /// The loads that machines with these factors, measured at a node with this capacity, would
    /// have at the peer.
    Weigh {
        capacity: Capacity,
        factors: Vec<Factors>,
    },
    /// Reserve room for a machine now.
    #[serde(rename = "Take")]
    Reserve {
        machine: Name,
        capacity: Capacity,
        factors: Factors,
        /// Load of the requester: the target must stay below it.
        load: f64,
        /// Whether the target, unless free, is filled only up to `fill_load`.
        packs: bool,
    },
    /// The reservation is no longer needed.
    Release { machine: Name },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    View(View),
    /// Not enough samples yet.
    #[serde(rename = "Measuring")]
    NotReady,
    /// Loads of the machines, in the order of the request.
    Weights(Vec<f64>),
    Granted,
    /// Another machine is expected.
    Busy,
    Refused {
        why: String,
    },
    Released,
}

/// The peers of a balancer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Peers {
    nodes: Arc<[Name]>,
    /// Index of the balancer's own node in `nodes`.
    this: Option<usize>,
}

impl Peers {
    /// The live nodes, of which `this` is the balancer's own: thousands of simulated balancers
    /// share one list. An index outside of the list means that the own node is not in it.
    pub fn among(nodes: Arc<[Name]>, this: usize) -> Self {
        let this = (this < nodes.len()).then_some(this);
        Peers { nodes, this }
    }

    pub fn len(&self) -> usize {
        self.nodes.len() - usize::from(self.this.is_some())
    }

    /// Whether there is no peer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = &Name> {
        (0..self.len()).filter_map(|number| self.get(number))
    }

    /// A peer by its index below [`len`](Self::len).
    pub(super) fn get(&self, number: usize) -> Option<&Name> {
        let skips = self.this.is_some_and(|this| number >= this);
        self.nodes.get(number + usize::from(skips))
    }
}

impl From<Vec<Name>> for Peers {
    /// From a list without the balancer's own node.
    fn from(others: Vec<Name>) -> Self {
        Peers {
            nodes: others.into(),
            this: None,
        }
    }
}
