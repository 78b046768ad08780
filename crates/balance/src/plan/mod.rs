//! Plans for a whole cluster: an ordered set of moves after which all nodes are level, packed, or
//! some of them empty. Rounds converge to the same state; a plan considers all nodes at once, needs
//! fewer moves, and can be reviewed before anything moves.
//!
//! Unevenness is the weighted sum, over resources, of the standard deviation of the nodes'
//! utilisation: the measure of Ganeti's `hbal` (htools), so that the two can be compared.
//!
//! Planning has three phases. *Descent*: repeatedly the move that decreases the unevenness most
//! (steepest descent). *Refinement*: a moved machine is redirected, moved back, or replaced by
//! another one, wherever that is better; this undoes early moves that later ones made redundant.
//! *Ordering*: waves of concurrent moves, memory first freed then used, with an intermediate stop
//! at a third node where a cycle allows no other order.
//!
//! - `state`: the placement while a plan is made
//! - `rule_counter`: the machines of a rule in each of its domains
//! - `local_search`: descent and refinement
//! - `evacuation`: emptying sites
//! - `waves`: ordering

mod evacuation;
mod local_search;
mod rule_counter;
mod state;
mod waves;

use crate::Name;
use crate::rules::{Labels, Rule};
use evacuation::{drain, pack};
use local_search::{descend, refine};
use serde::{Deserialize, Serialize};
use state::State;
use waves::order;

/// Number of resources.
pub const RESOURCES: usize = 7;
/// Amounts of each resource.
pub type Amounts = [f64; RESOURCES];

#[derive(Debug, Clone)]
pub struct Site {
    pub name: Name,
    pub labels: Labels,
    /// Capacity per resource; 0 if the resource does not count.
    pub capacity: Amounts,
    /// Usage of others than these machines.
    pub base: Amounts,
    /// Whether it accepts machines.
    pub open: bool,
}

#[derive(Debug, Clone)]
pub struct Workload {
    pub name: Name,
    pub labels: Labels,
    pub site: usize,
    /// Usage per resource.
    pub demand: Amounts,
    /// Whether it must stay.
    pub fixed: bool,
    /// Bytes that a move of it sends.
    pub bytes: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    /// All sites level.
    Level {
        /// Maximum number of moves: those with the largest effect.
        moves_max: Option<usize>,
    },
    /// As few sites as carry the load, none filled beyond this utilisation.
    Pack {
        /// The share.
        fill: f64,
    },
    /// Empty these sites, by number.
    Drain(Vec<usize>),
}

/// Input of the planner.
#[derive(Debug, Clone)]
pub struct Problem {
    pub sites: Vec<Site>,
    pub loads: Vec<Workload>,
    /// Weight of each resource.
    pub weights: Amounts,
    /// Resources whose capacity must not be exceeded.
    pub hard: [bool; RESOURCES],
    pub rules: Vec<Rule>,
    /// Minimum decrease of the unevenness per move.
    pub gain_min: f64,
    /// Maximum number of machines that leave a site, and that arrive at a site, in one wave; at
    /// least one.
    pub at_once: (usize, usize),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub load: usize,
    pub from: usize,
    pub to: usize,
    /// Moves of one wave run concurrently, after those of the previous wave.
    pub wave: usize,
    /// Whether it is an intermediate stop: another step moves the machine on.
    pub hop: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    pub before: f64,
    pub after: f64,
    pub bytes: f64,
    /// Machines that should move and cannot, by number, with the reason.
    pub left: Vec<(usize, String)>,
}

pub fn plan(problem: &Problem, goal: &Goal) -> Plan {
    let mut state = State::new(problem);
    let before = state.unevenness();
    let mut left = Vec::new();
    match goal {
        Goal::Level { moves_max } => {
            level(&mut state, moves_max.unwrap_or(usize::MAX));
            // A limit changes the choice of moves. If levelling without a limit needs no more moves
            // than allowed, its result may be better.
            if let Some(most) = *moves_max {
                let mut free = State::new(problem);
                level(&mut free, usize::MAX);
                let loads = problem.loads.iter().zip(&free.at);
                let moved = loads.filter(|(load, at)| load.site != **at).count();
                if moved <= most && free.unevenness() < state.unevenness() {
                    state = free;
                }
            }
        }
        Goal::Pack { fill } => pack(&mut state, *fill),
        Goal::Drain(sites) => left = drain(&mut state, sites),
    }
    let after = state.unevenness();
    let (steps, stuck) = order(problem, &state.at);
    left.extend(stuck);
    let bytes = steps
        .iter()
        .map(|step| problem.loads[step.load].bytes)
        .sum();
    Plan {
        steps,
        before,
        after,
        bytes,
        left,
    }
}

fn level(state: &mut State<'_>, moves_max: usize) {
    descend(state, moves_max);
    refine(state, moves_max);
}

/// The current unevenness.
pub fn unevenness(problem: &Problem) -> f64 {
    State::new(problem).unevenness()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{Domain, Requirement, Selector};
    use proptest::prelude::{prop_assert, proptest};

    /// Resources 0 (CPU, soft) and 1 (memory, hard).
    fn problem(sites: &[(f64, f64)], loads: &[(usize, f64, f64)]) -> Problem {
        let amounts = |cpu: f64, memory: f64| {
            let mut amounts = [0.0; RESOURCES];
            (amounts[0], amounts[1]) = (cpu, memory);
            amounts
        };
        Problem {
            sites: sites
                .iter()
                .enumerate()
                .map(|(number, &(cpu, memory))| Site {
                    name: format!("n{number}").into(),
                    labels: Labels::new(),
                    capacity: amounts(cpu, memory),
                    base: [0.0; RESOURCES],
                    open: true,
                })
                .collect(),
            loads: loads
                .iter()
                .enumerate()
                .map(|(number, &(site, cpu, memory))| Workload {
                    name: format!("m{number}").into(),
                    labels: Labels::new(),
                    site,
                    demand: amounts(cpu, memory),
                    fixed: false,
                    bytes: memory,
                })
                .collect(),
            weights: amounts(1.0, 1.0),
            hard: [false, true, false, false, false, false, false],
            rules: Vec::new(),
            gain_min: 0.001,
            at_once: (1, 1),
        }
    }

    fn rule(name: &str, machines: &[&str], requirement: Requirement) -> Rule {
        Rule {
            name: name.into(),
            machines: Selector {
                names: machines.iter().map(|it| (*it).to_owned()).collect(),
                labels: Labels::new(),
            },
            requirement,
        }
    }

    fn ends(problem: &Problem, plan: &Plan) -> Vec<usize> {
        let mut at: Vec<usize> = problem.loads.iter().map(|load| load.site).collect();
        for step in &plan.steps {
            assert_eq!(at[step.load], step.from);
            at[step.load] = step.to;
        }
        at
    }

    const LEVEL: Goal = Goal::Level { moves_max: None };

    #[test]
    fn a_crowd_is_spread_by_no_more_moves_than_needed() {
        let problem = problem(&[(4.0, 64.0); 3], &[(0, 1.0, 4.0); 12]);
        let plan = plan(&problem, &LEVEL);
        assert_eq!(plan.steps.len(), 8);
        assert!(plan.after < 1e-6 && plan.before > 1.0, "{plan:?}");
        let ends = ends(&problem, &plan);
        for site in 0..3 {
            assert_eq!(ends.iter().filter(|it| **it == site).count(), 4);
        }
        // One leaves at a time: eight waves.
        assert_eq!(plan.steps.last().unwrap().wave, 7);
    }

    #[test]
    fn a_full_cluster_moves_by_a_third_node() {
        // Two full nodes whose machines swap places, and a third with room for one; enforced by
        // rules, since load alone would not require it.
        let mut problem = problem(&[(9.0, 10.0); 3], &[(0, 1.0, 8.0), (1, 1.0, 8.0)]);
        let named = |name: &str| Selector {
            names: vec![name.to_owned()],
            labels: Labels::new(),
        };
        problem.rules = vec![
            rule("one", &["m0"], Requirement::Avoid { nodes: named("n9") }),
            rule("two", &["m1"], Requirement::Avoid { nodes: named("n9") }),
        ];
        let (steps, stuck) = order(&problem, &[1, 0]);
        assert!(stuck.is_empty());
        assert_eq!(steps.len(), 3);
        assert!(steps[0].hop && steps[0].to == 2);
        problem.sites[2].open = false;
        let (steps, stuck) = order(&problem, &[1, 0]);
        assert!(steps.is_empty() && stuck.len() == 2, "{stuck:?}");
    }

    #[test]
    fn a_drain_says_what_cannot_go() {
        let mut problem = problem(
            &[(4.0, 16.0), (4.0, 16.0), (4.0, 4.0)],
            &[(0, 1.0, 12.0), (0, 1.0, 12.0), (0, 0.5, 2.0), (0, 0.1, 1.0)],
        );
        problem.loads[3].fixed = true;
        let plan = plan(&problem, &Goal::Drain(vec![0]));
        let ends = ends(&problem, &plan);
        assert_eq!(ends[0], 1);
        assert_ne!(ends[2], 0);
        let left: Vec<usize> = plan.left.iter().map(|(load, _)| *load).collect();
        assert_eq!(left, [1, 3], "{:?}", plan.left);
    }

    #[test]
    fn packing_empties_nodes_and_keeps_to_the_fill() {
        let problem = problem(
            &[(4.0, 16.0); 4],
            &[(0, 1.0, 2.0), (1, 1.0, 2.0), (2, 1.0, 2.0), (3, 1.0, 2.0)],
        );
        let plan = plan(&problem, &Goal::Pack { fill: 0.8 });
        let ends = ends(&problem, &plan);
        let used: std::collections::BTreeSet<usize> = ends.iter().copied().collect();
        assert_eq!(used.len(), 2, "three of four cores are 0.75: {ends:?}");
    }

    #[test]
    fn rules_are_kept_on_the_way() {
        let mut problem = problem(&[(4.0, 64.0); 3], &[(0, 1.0, 4.0); 6]);
        let per = Domain::Node;
        problem.rules = vec![
            rule("stay", &["m0"], Requirement::Stay),
            rule("pair", &["m1", "m2"], Requirement::Apart { per, max: 1 }),
        ];
        let plan = plan(&problem, &LEVEL);
        let ends = ends(&problem, &plan);
        assert_eq!(ends[0], 0);
        assert_ne!(ends[1], ends[2]);
    }

    proptest! {
        #[test]
        fn no_plan_makes_anything_worse(
            loads in proptest::collection::vec((0usize..5, 0.01f64..2.0, 0.1f64..6.0), 0..40),
        ) {
            let problem = problem(&[(4.0, 48.0), (8.0, 48.0), (2.0, 24.0), (4.0, 96.0), (4.0, 48.0)], &loads);
            let before = State::new(&problem);
            let plan = plan(&problem, &LEVEL);
            prop_assert!(plan.after <= plan.before + 1e-9);
            prop_assert!(plan.left.is_empty());
            // At no step is a node filled beyond what it has, unless it was before.
            let mut state = State::new(&problem);
            for step in &plan.steps {
                state.relocate(step.load, step.to);
                let most = before.used[step.to][1].max(problem.sites[step.to].capacity[1]);
                prop_assert!(state.used[step.to][1] <= most + 1e-9);
            }
            prop_assert!((state.unevenness() - plan.after).abs() < 1e-6);
        }

        #[test]
        fn fewer_moves_are_those_that_level_most(
            loads in proptest::collection::vec((0usize..5, 0.01f64..2.0, 0.1f64..6.0), 0..40),
        ) {
            let problem = problem(&[(4.0, 96.0), (8.0, 96.0), (2.0, 96.0), (4.0, 96.0), (4.0, 96.0)], &loads);
            let whole = plan(&problem, &LEVEL);
            let mut least = whole.before;
            for moves_max in 0..=whole.steps.len() {
                let few = plan(&problem, &Goal::Level { moves_max: Some(moves_max) });
                let moved = few.steps.iter().filter(|step| !step.hop).count();
                prop_assert!(moved <= moves_max, "{moved} of {moves_max}");
                if moves_max == 1 {
                    // No single move is better.
                    let state = State::new(&problem);
                    for (load, it) in problem.loads.iter().enumerate() {
                        for to in (0..problem.sites.len()).filter(|to| state.can_relocate(load, *to)) {
                            let single = state.unevenness_if_moved(&it.demand, it.site, to);
                            let gains = single < whole.before - problem.gain_min;
                            prop_assert!(!gains || few.after <= single + 1e-9);
                        }
                    }
                }
                prop_assert!(few.after <= whole.before + 1e-9);
                least = least.min(few.after);
            }
            prop_assert!(least <= whole.after + 1e-9);
        }
    }
}
