//! Selection of the machine that moves from one node to another, with a verdict for every
//! candidate.
//!
//! With `A` and `B` the loads of source and target, `a` the load of a machine at the source and `b`
//! its load at the target, a move results in `A - a` and `B + b`. These are equal when `(a + b)/2 =
//! (A - B)/2`: of all eligible machines, the one closest to that is selected. `a` and `b` differ on
//! heterogeneous nodes; each node computes its own.
//!
//! Every move decreases the sum over all nodes of power times load squared by at least
//! [`Policy::gain_min`](crate::policy::Policy::gain_min). The sum is not negative, so rounds
//! terminate: from a sum `S` there are at most `S / gain_min` moves. The sum is weighted by the
//! nodes' power (cores times speed) because otherwise a small and a large node would have unequal
//! loads at its minimum.
//!
//! A machine that may span nodes and would press the target as well gets parts instead
//! ([`crate::fine_grained`]): moved as a whole, it would be split at the target anyway.
//!
//! Consolidation (`pack`) empties nodes. Its moves have one direction only, from the weaker node to
//! the stronger one, and between equal nodes from the less loaded to the more loaded: each move
//! increases the load of stronger nodes, or the sum of squares of equal ones. So no placement
//! occurs twice, and rounds terminate here too.

use crate::Name;
use crate::cost::{Cost, CostModel, Gain, Link, gain};
use crate::load::{Capacity, Factors};
use crate::policy::{Policy, Strategy};
use serde::{Deserialize, Serialize};

/// Distances that differ by less than this share of half the load difference count as equal: the
/// machine that is cheaper to move is selected.
pub const NEAR_SHARE: f64 = 0.10;
/// Ratio of powers from which a node counts as stronger than another.
const STRONGER: f64 = 1.1;
/// CPU demand above that of a single thread, including the work done on its behalf, in cores.
const SEVERAL_CORES: f64 = 1.5;
/// Maximum number of candidates that a decision records, closest first.
pub const CONSIDERED_MAX: usize = 32;

/// State of a node as its peer in a round sees it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NodeState {
    pub capacity: Capacity,
    /// Load, including moves in flight.
    pub load: f64,
    /// Memory neither used nor reserved, in bytes.
    pub memory_free_bytes: u64,
    /// Whether runnable work waits.
    pub pressed: bool,
    /// Whether the node runs no machine and expects none.
    pub free: bool,
}

impl NodeState {
    /// Absolute load, in cores of the reference speed.
    pub fn absolute_load(&self) -> f64 {
        self.load * self.capacity.power()
    }

    /// Whether its power exceeds the other node's by the factor `STRONGER`.
    pub fn stronger_than(&self, other: &NodeState) -> bool {
        self.capacity.power() > STRONGER * other.capacity.power()
    }
}

/// Objective of a move between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Equal loads.
    Level,
    /// An empty source (`pack`).
    Empty,
    /// Relief of a pressed source; the target is filled no further than `pack` allows.
    Relieve,
}

/// Why a machine must not move, whatever the loads are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = CandidateConstraint)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    Held {
        /// Remaining milliseconds.
        for_ms: u64,
    },
    /// Cool-down: it came from that node.
    CoolDown {
        /// Remaining milliseconds.
        for_ms: u64,
    },
    /// Backoff after a failed move.
    Failed {
        /// Remaining milliseconds.
        for_ms: u64,
    },
    Moving,
    /// The spec excludes it from balancing.
    OptedOut,
    /// It spans several nodes.
    Spans,
    Rule {
        #[schema(value_type = String)]
        rule: Name,
        #[serde(rename = "says")]
        reason: String,
    },
}

/// Verdict on a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = CandidateVerdict)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Chosen,
    /// Another machine is closer to half the difference.
    #[serde(rename = "further")]
    WorseFit,
    /// Another machine is about as close, and cheaper to move.
    #[serde(rename = "dearer")]
    CostsMore,
    #[serde(rename = "bound")]
    Constrained(Constraint),
    NoRoom {
        /// Bytes that it needs.
        needs_bytes: u64,
        /// Free bytes at the target, without the headroom for failovers.
        free_bytes: u64,
    },
    /// The target's load would reach the source's current load.
    Overshoots,
    /// The two nodes would be about as uneven, with roles swapped.
    #[serde(rename = "only_swaps")]
    SwapsImbalance,
    TooLittle {
        /// Decrease of the sum of squares; for [`Objective::Empty`] the share of the source's power
        /// that the move frees.
        lowers: f64,
        least: f64,
    },
    /// The gain does not certainly exceed the cost.
    #[serde(rename = "not_worth")]
    NotWorthwhile,
    /// The target would exceed the policy's `fill_load`.
    Overfills,
    /// The machine gets parts on several nodes instead, or is about to: it exceeds the memory of
    /// one part, or would press the target as well.
    Spreads,
}

/// Facts about the parts that balancing may give to a machine that has none yet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Spreadable {
    /// The decision is made and being carried out.
    pub is_decided: bool,
    /// The spec demands parts from the start.
    pub from_beginning: bool,
    /// Memory limit of one part, in bytes.
    pub part_memory_bytes: Option<u64>,
}

/// Whether a machine that may span would press any node, given the loads of source and target with
/// it: a move would not relieve the cluster.
pub fn presses_any(here: f64, there: f64, policy: &Policy) -> bool {
    there >= policy.pressed_load.max(here / 2.0)
}

impl Spreadable {
    /// Whether the machine gets parts where it is, or seems about to. This is a guess:
    /// [`crate::fine_grained::decide`] knows its threads and the memory that it has. So the caller
    /// trusts it for a short time only.
    fn is_due(&self, factors: &Factors, source: &NodeState, there: f64, policy: &Policy) -> bool {
        let most = self.part_memory_bytes;
        let is_over = most.is_some_and(|most| factors.memory_bytes > most);
        let presses = source.pressed && factors.cpu_cores >= SEVERAL_CORES;
        self.is_decided
            || self.from_beginning
            || is_over
            || presses && presses_any(source.load, there, policy)
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = Candidate)]
pub struct Considered {
    #[schema(value_type = String)]
    pub machine: Name,
    pub factors: Factors,
    /// Milliseconds for which its load has been about constant.
    pub lasted_ms: u64,
    pub here: f64,
    pub there: f64,
    /// Distance from the objective: half the load difference, unless the policy is `pack`.
    pub distance: f64,
    pub cost: Cost,
    pub gain: Gain,
    /// Compilation of its program at the target, in core-seconds; included in `cost`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub compile_core_s: f64,
    /// The network to the target, if that is far.
    #[serde(default, skip_serializing_if = "Link::is_near")]
    pub link: Link,
    /// Set if the machine may get parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spreadable: Option<Spreadable>,
    pub verdict: Verdict,
}

impl Considered {
    /// The candidate, so that the decision can be replayed.
    pub fn candidate(&self) -> Candidate {
        Candidate {
            machine: self.machine.clone(),
            factors: self.factors,
            there: self.there,
            lasted_ms: self.lasted_ms,
            compile_core_s: self.compile_core_s,
            link: self.link,
            spreadable: self.spreadable,
            constraint: match &self.verdict {
                Verdict::Constrained(constraint) => Some(constraint.clone()),
                _ => None,
            },
        }
    }
}

/// A machine that may be selected.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    pub machine: Name,
    pub factors: Factors,
    /// Its load at the target, as the target computed it.
    pub there: f64,
    /// Milliseconds for which its load has been about constant.
    pub lasted_ms: u64,
    /// Compilation of its program at the target, in core-seconds; 0 if compiled code is cached
    /// there.
    pub compile_core_s: f64,
    /// The network to the target.
    pub link: Link,
    /// Set if the machine may get parts.
    pub spreadable: Option<Spreadable>,
    pub constraint: Option<Constraint>,
}

fn is_zero(seconds: &f64) -> bool {
    *seconds == 0.0
}

/// Decrease of the sum over both nodes of power times load squared.
pub fn lowers(source: &NodeState, target: &NodeState, here: f64, there: f64) -> f64 {
    let square = |side: &NodeState, load: f64| side.capacity.power() * load * load;
    let before = square(source, source.load) + square(target, target.load);
    before - square(source, source.load - here) - square(target, target.load + there)
}

/// Evaluates each of the source's machines for the target; the selected one comes first, then by
/// distance.
pub fn select(
    source: &NodeState,
    target: &NodeState,
    candidates: &[Candidate],
    model: &CostModel,
    policy: &Policy,
) -> Vec<Considered> {
    let objective = objective(source, target, policy);
    let wanted = match objective {
        Objective::Level => (source.load - target.load) / 2.0,
        // The largest first: fewest moves empty a node.
        Objective::Empty => source.load,
        // The smallest that suffices: a larger one would press the target.
        Objective::Relieve => source.load - policy.fill_load,
    };
    let mut considered: Vec<Considered> = candidates
        .iter()
        .map(|it| evaluate(it, source, target, (objective, wanted), model, policy))
        .collect();
    choose(&mut considered, wanted.abs());
    let rank = |it: &Considered| match it.verdict {
        Verdict::Chosen => 0,
        Verdict::CostsMore | Verdict::WorseFit => 1,
        _ => 2,
    };
    considered.sort_by(|one, other| {
        rank(one)
            .cmp(&rank(other))
            .then(one.distance.total_cmp(&other.distance))
            .then(one.machine.cmp(&other.machine))
    });
    considered
}

/// The objective of a move between two nodes.
pub fn objective(source: &NodeState, target: &NodeState, policy: &Policy) -> Objective {
    match policy.strategy {
        Strategy::Level | Strategy::Spread => Objective::Level,
        Strategy::Pack if source.pressed => Objective::Relieve,
        Strategy::Pack if target.pressed => Objective::Level,
        Strategy::Pack => Objective::Empty,
    }
}

fn evaluate(
    candidate: &Candidate,
    source: &NodeState,
    target: &NodeState,
    (objective, wanted): (Objective, f64),
    model: &CostModel,
    policy: &Policy,
) -> Considered {
    let here = candidate.factors.weigh(&source.capacity, &policy.weights);
    let there = candidate.there;
    let lowers = lowers(source, target, here, there);
    let cost = model
        .predict(&candidate.factors, &candidate.link)
        .after_compilation(candidate.compile_core_s);
    // The gain of packing is the freed capacity, not the levelling.
    let worth = match objective {
        // The machine's share of the power of the node that becomes free.
        Objective::Empty if source.load > 0.0 => source.capacity.power() * here / source.load,
        Objective::Empty => source.capacity.power(),
        Objective::Level | Objective::Relieve => lowers,
    };
    let gain = gain(
        worth,
        candidate.lasted_ms,
        policy.horizon_s,
        &candidate.factors,
        &candidate.link,
    );
    let distance = match objective {
        Objective::Level => ((here + there) / 2.0 - wanted).abs(),
        Objective::Empty | Objective::Relieve => (here - wanted).abs(),
    };
    let kept = (target.capacity.memory_bytes as f64 * policy.memory_headroom) as u64;
    let free_bytes = target.memory_free_bytes.saturating_sub(kept);
    let needs_bytes = candidate.factors.memory_bytes;
    let is_due = |it: Spreadable| {
        let there = target.load + there;
        it.is_due(&candidate.factors, source, there, policy)
    };
    let verdict = if let Some(constraint) = &candidate.constraint {
        Verdict::Constrained(constraint.clone())
    } else if needs_bytes > free_bytes {
        Verdict::NoRoom {
            needs_bytes,
            free_bytes,
        }
    } else if objective != Objective::Level
        && !target.free
        && target.load + there > policy.fill_load
    {
        Verdict::Overfills
    } else if objective != Objective::Empty && target.load + there >= source.load {
        Verdict::Overshoots
    } else if objective == Objective::Level
        && reversed_share(source, target, here + there) > 1.0 - policy.shrink_min
    {
        Verdict::SwapsImbalance
    } else if worth < policy.gain_min {
        Verdict::TooLittle {
            lowers: worth,
            least: policy.gain_min,
        }
    } else if candidate.spreadable.is_some_and(is_due) {
        Verdict::Spreads
    } else if gain.core_s.low <= cost.core_s.high {
        Verdict::NotWorthwhile
    } else {
        Verdict::WorseFit
    };
    Considered {
        machine: candidate.machine.clone(),
        factors: candidate.factors,
        lasted_ms: candidate.lasted_ms,
        here,
        there,
        distance,
        cost,
        gain,
        compile_core_s: candidate.compile_core_s,
        link: candidate.link,
        spreadable: candidate.spreadable,
        verdict,
    }
}

/// Amount by which the target would exceed the source after the move, as a share of the present
/// difference; negative if it would not.
fn reversed_share(source: &NodeState, target: &NodeState, moved: f64) -> f64 {
    let difference = source.load - target.load;
    (moved - difference) / difference
}

/// Selects the closest eligible machine; among those about as close, the cheapest.
fn choose(considered: &mut [Considered], half: f64) {
    let may_go = |it: &Considered| it.verdict == Verdict::WorseFit;
    let nearest = considered
        .iter()
        .filter(|it| may_go(it))
        .map(|it| it.distance)
        .min_by(f64::total_cmp);
    let Some(nearest) = nearest else { return };
    let near = nearest + NEAR_SHARE * half;
    let mut best: Option<usize> = None;
    for (number, it) in considered.iter().enumerate() {
        if !may_go(it) || it.distance > near {
            continue;
        }
        let better = best.is_none_or(|best| {
            let other = &considered[best];
            it.cost
                .core_s
                .mid
                .total_cmp(&other.cost.core_s.mid)
                .then(it.distance.total_cmp(&other.distance))
                .then(it.machine.cmp(&other.machine))
                .is_lt()
        });
        if better {
            best = Some(number);
        }
    }
    for it in considered.iter_mut() {
        if may_go(it) && it.distance <= near {
            it.verdict = Verdict::CostsMore;
        }
    }
    if let Some(best) = best {
        considered[best].verdict = Verdict::Chosen;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Strategy;
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    fn side(cores: f64, load: f64) -> NodeState {
        NodeState {
            capacity: Capacity {
                cores,
                speed: 1.0,
                memory_bytes: 16 << 30,
                io_bytes_per_s: 1e9,
            },
            load,
            memory_free_bytes: 8 << 30,
            pressed: load > 0.8,
            free: false,
        }
    }

    fn burner(name: &str, cores: f64, target: &NodeState) -> Candidate {
        let factors = Factors {
            cpu_cores: cores,
            cpu_bound_cores: cores,
            ..Factors::default()
        };
        Candidate {
            machine: name.into(),
            there: factors.weigh(&target.capacity, &Policy::default().weights),
            factors,
            lasted_ms: 60_000,
            compile_core_s: 0.0,
            link: Link::NEAR,
            spreadable: None,
            constraint: None,
        }
    }

    fn decide(source: &NodeState, target: &NodeState, candidates: &[Candidate]) -> Vec<Considered> {
        select(
            source,
            target,
            candidates,
            &CostModel::default(),
            &Policy::default(),
        )
    }

    fn verdict(considered: &[Considered], machine: &str) -> Verdict {
        let found = considered.iter().find(|it| &*it.machine == machine);
        found.unwrap().verdict.clone()
    }

    #[test]
    fn the_nearest_to_half_the_difference_goes() {
        let (source, target) = (side(1.0, 5.0), side(1.0, 1.0));
        let candidates = [
            burner("small", 0.5, &target),
            burner("right", 2.0, &target),
            burner("large", 2.5, &target),
        ];
        let considered = decide(&source, &target, &candidates);
        assert_eq!(&*considered[0].machine, "right");
        assert_eq!(considered[0].verdict, Verdict::Chosen);
        assert_eq!(verdict(&considered, "large"), Verdict::WorseFit);
        assert_eq!(verdict(&considered, "small"), Verdict::WorseFit);
    }

    #[test]
    fn among_equals_the_cheaper_goes() {
        let (source, target) = (side(1.0, 5.0), side(1.0, 1.0));
        let mut heavy = burner("a-heavy", 2.0, &target);
        heavy.factors.memory_bytes = 1 << 30;
        let light = burner("b-light", 1.9, &target);
        let considered = decide(&source, &target, &[heavy, light]);
        assert_eq!(&*considered[0].machine, "b-light");
        assert_eq!(verdict(&considered, "a-heavy"), Verdict::CostsMore);
    }

    #[test]
    fn between_unlike_nodes_both_numbers_count() {
        // One core against four: 5 CPU-bound machines on one, none on the other.
        let (source, target) = (side(1.0, 5.0), side(4.0, 0.0));
        let one = burner("one", 1.0, &target);
        let considered = decide(&source, &target, &[one]);
        assert_eq!((considered[0].here, considered[0].there), (1.0, 0.25));
        assert_eq!(considered[0].verdict, Verdict::Chosen);
        // Equal relative load: nothing moves, in either direction.
        let (small, large) = (side(1.0, 1.0), side(4.0, 1.0));
        let to_large = decide(&small, &large, &[burner("one", 1.0, &large)]);
        assert_eq!(to_large[0].verdict, Verdict::Overshoots);
        let to_small = decide(&large, &small, &[burner("one", 1.0, &small)]);
        assert_eq!(to_small[0].verdict, Verdict::Overshoots);
    }

    /// Loads of three nodes with 5, 3 and 4 equal machines, as measured once. To the node with 4
    /// nothing moves though it seems lighter by a fifth more than a machine: 4, 3 and 5 machines
    /// can become 3, 4 and 5, which cool-downs keep.
    #[test]
    fn nodes_that_differ_by_one_machine_do_not_swap() {
        let (five, three, four) = (side(1.0, 6.66), side(1.0, 3.83), side(1.0, 5.10));
        let machine = |target: &NodeState| [burner("one", 1.28, target)];
        let considered = decide(&five, &four, &machine(&four));
        assert_eq!(considered[0].verdict, Verdict::SwapsImbalance);
        let considered = decide(&five, &three, &machine(&three));
        assert_eq!(considered[0].verdict, Verdict::Chosen);
    }

    #[test]
    fn each_reason_has_its_name() {
        let (source, target) = (side(1.0, 3.0), side(1.0, 0.5));
        let mut roomy = burner("roomy", 1.0, &target);
        roomy.factors.memory_bytes = 9 << 30;
        let mut held = burner("held", 1.0, &target);
        held.constraint = Some(Constraint::Held { for_ms: 5 });
        let mut fresh = burner("fresh", 1.0, &target);
        fresh.lasted_ms = 10;
        let large = burner("large", 2.6, &target);
        let wide = burner("wide", 2.3, &target);
        let idle = burner("idle", 0.0, &target);
        let considered = decide(&source, &target, &[roomy, held, fresh, large, wide, idle]);
        assert!(matches!(
            verdict(&considered, "roomy"),
            Verdict::NoRoom { .. }
        ));
        assert!(matches!(
            verdict(&considered, "held"),
            Verdict::Constrained(_)
        ));
        assert_eq!(verdict(&considered, "fresh"), Verdict::NotWorthwhile);
        assert_eq!(verdict(&considered, "large"), Verdict::Overshoots);
        assert_eq!(verdict(&considered, "wide"), Verdict::SwapsImbalance);
        assert!(matches!(
            verdict(&considered, "idle"),
            Verdict::TooLittle { .. }
        ));
    }

    /// Of two machines with equal gain the one with compiled code at the target is selected; a
    /// large program does not move at all where its compilation costs more than the gain.
    #[test]
    fn code_that_is_not_ready_costs_its_compilation() {
        let (source, target) = (side(4.0, 6.0), side(4.0, 0.0));
        let ready = burner("ready", 3.0, &target);
        let not_ready = |name: &str, compile_core_s: f64| Candidate {
            compile_core_s,
            ..burner(name, 3.0, &target)
        };
        let cheap = not_ready("a-little", 0.5);
        let considered = decide(&source, &target, &[cheap.clone(), ready.clone()]);
        assert_eq!(verdict(&considered, "ready"), Verdict::Chosen);
        assert_eq!(verdict(&considered, "a-little"), Verdict::CostsMore);
        let considered = decide(&source, &target, &[cheap]);
        assert_eq!(considered[0].verdict, Verdict::Chosen);
        let dear = not_ready("large", 1e6);
        let considered = decide(&source, &target, &[dear]);
        assert_eq!(considered[0].verdict, Verdict::NotWorthwhile);
        let cost = considered[0].cost;
        assert!(cost.core_s.low >= 1e6 && cost.duration_ms.low >= 1e9);
        assert_eq!(considered[0].candidate().compile_core_s, 1e6);
    }

    #[test]
    fn what_would_press_any_node_is_spread_instead() {
        let (source, target) = (side(1.0, 5.0), side(1.0, 1.0));
        let spreadable = Spreadable {
            is_decided: false,
            from_beginning: false,
            part_memory_bytes: Some(1 << 30),
        };
        let may = |name: &str, cores: f64| Candidate {
            spreadable: Some(spreadable),
            ..burner(name, cores, &target)
        };
        let mut over = may("over", 0.5);
        over.factors.memory_bytes = 2 << 30;
        // Half of the load would press the target too, and it belongs to one thread.
        let candidates = [may("wide", 2.0), may("narrow", 1.2), over];
        let considered = decide(&source, &target, &candidates);
        assert_eq!(verdict(&considered, "wide"), Verdict::Spreads);
        assert_eq!(verdict(&considered, "narrow"), Verdict::Chosen);
        assert_eq!(verdict(&considered, "over"), Verdict::Spreads);
        // A machine that may not span, or would press no other node, moves.
        let considered = decide(&source, &target, &[burner("wide", 2.0, &target)]);
        assert_eq!(considered[0].verdict, Verdict::Chosen);
        let (source, roomy) = (side(2.0, 2.0), side(8.0, 0.0));
        let fits = Candidate {
            there: 0.25,
            ..may("fits", 2.0)
        };
        let considered = decide(&source, &roomy, &[fits]);
        assert_eq!(considered[0].verdict, Verdict::Chosen);
        // A decided split is not evaluated again.
        let decided = Candidate {
            spreadable: Some(Spreadable {
                is_decided: true,
                ..spreadable
            }),
            ..burner("decided", 0.9, &target)
        };
        let (source, target) = (side(1.0, 5.0), side(1.0, 1.0));
        let considered = decide(&source, &target, &[decided]);
        assert_eq!(considered[0].verdict, Verdict::Spreads);
        // Parts from the start come before any move.
        let mut early = may("early", 0.5);
        early.spreadable = Some(Spreadable {
            from_beginning: true,
            ..spreadable
        });
        let considered = decide(&source, &target, &[early]);
        assert_eq!(considered[0].verdict, Verdict::Spreads);
        assert_eq!(
            considered[0]
                .candidate()
                .spreadable
                .map(|it| it.from_beginning),
            Some(true)
        );
    }

    #[test]
    fn packing_fills_and_never_presses() {
        let policy = Policy {
            strategy: Strategy::Pack,
            ..Policy::default()
        };
        let (source, target) = (side(1.0, 0.3), side(1.0, 0.5));
        let candidates = [
            burner("small", 0.1, &target),
            burner("fits", 0.2, &target),
            burner("large", 0.25, &target),
        ];
        let considered = select(
            &source,
            &target,
            &candidates,
            &CostModel::default(),
            &policy,
        );
        assert_eq!(&*considered[0].machine, "fits");
        assert_eq!(considered[0].verdict, Verdict::Chosen);
        assert_eq!(verdict(&considered, "large"), Verdict::Overfills);
    }

    #[test]
    fn packing_relieves_by_just_enough_and_fills_no_node_beyond() {
        let policy = Policy {
            strategy: Strategy::Pack,
            ..Policy::default()
        };
        let decide = |source: &NodeState, target: &NodeState, cores: &[f64]| {
            let candidates: Vec<Candidate> = cores
                .iter()
                .enumerate()
                .map(|(number, &cores)| burner(&format!("m{number}"), cores, target))
                .collect();
            let model = CostModel::default();
            select(source, target, &candidates, &model, &policy)
        };
        // 0.9 is 0.2 above the fill load.
        let (source, target) = (side(1.0, 0.9), side(1.0, 0.3));
        let considered = decide(&source, &target, &[0.05, 0.21, 0.4, 0.24]);
        assert_eq!(&*considered[0].machine, "m1");
        assert_eq!(considered[0].verdict, Verdict::Chosen);
        // Levelling would have moved this one; it would press the target.
        let target = side(1.0, 0.6);
        let considered = decide(&source, &target, &[0.15]);
        assert_eq!(considered[0].verdict, Verdict::Overfills);
        // A free node accepts a machine that fits nowhere else.
        let free = NodeState {
            free: true,
            ..side(1.0, 0.0)
        };
        let considered = decide(&source, &free, &[0.75]);
        assert_eq!(considered[0].verdict, Verdict::Chosen);
    }

    proptest! {
        #[test]
        fn what_is_chosen_levels(
            powers in (0.1f64..8.0, 0.1f64..8.0),
            loads in (0.0f64..10.0, 0.0f64..10.0),
            cores in proptest::collection::vec(0.0f64..6.0, 0..8),
        ) {
            let (source, target) = (side(powers.0, loads.0), side(powers.1, loads.1));
            let candidates: Vec<Candidate> = cores
                .iter()
                .enumerate()
                .map(|(number, &cores)| burner(&format!("m{number}"), cores, &target))
                .collect();
            let considered = decide(&source, &target, &candidates);
            prop_assert_eq!(considered.len(), candidates.len());
            let chosen: Vec<_> = considered
                .iter()
                .filter(|it| it.verdict == Verdict::Chosen)
                .collect();
            prop_assert!(chosen.len() <= 1);
            for it in chosen {
                prop_assert!(it.gain.lowers >= Policy::default().gain_min);
                prop_assert!(target.load + it.there < source.load);
                // The reverse move would not be made.
                let left = NodeState { load: source.load - it.here, ..source };
                let came = NodeState { load: target.load + it.there, ..target };
                prop_assert!(lowers(&came, &left, it.there, it.here) < 0.0);
            }
        }
    }
}
