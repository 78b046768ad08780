//! Moves of threads: away from pressed nodes, and towards the parts to which they have an affinity.

use super::{
    Action, Affinity, Alternative, CORES_MIN, Choice, Observation, Part, Thread, is_sustained,
    thread_weight,
};
use crate::Name;
use crate::policy::{Policy, Strategy};
use crate::select::{NodeState, lowers};
use crate::window::steady_difference;
use std::collections::BTreeMap;

/// Maximum number of thread moves per decision: their effect is observed before more follow.
const THREADS_AT_ONCE: usize = 4;

/// A thread move that would level two nodes.
struct ThreadMove<'a> {
    thread: &'a Thread,
    part: &'a Part,
    from: usize,
    to: usize,
    /// Load of the thread at both nodes.
    here: f64,
    there: f64,
    /// Decrease of the sum of squares.
    lowers: f64,
    /// Remaining load difference.
    left: f64,
}

/// Thread moves away from pressed nodes, several at once.
pub(super) fn relieve_pressed_nodes(observation: &Observation, policy: &Policy) -> Vec<Choice> {
    let mut observation = observation.clone();
    let mut choices = Vec::new();
    while choices.len() < THREADS_AT_ONCE {
        let Some((choice, index, part, node_loads)) = best_move(&observation, policy) else {
            break;
        };
        choices.push(choice);
        if let Some(thread) = observation.threads.get_mut(index) {
            thread.part = part;
            thread.held = true;
        }
        for (index, by) in node_loads {
            if let Some(node) = observation.nodes.get_mut(index) {
                node.state.load = (node.state.load + by).max(0.0);
                for load in &mut node.loads {
                    *load = (*load + by).max(0.0);
                }
            }
        }
    }
    choices
}

type Moved = (Choice, usize, u32, [(usize, f64); 2]);

fn best_move(observation: &Observation, policy: &Policy) -> Option<Moved> {
    let at = |node: &Name| observation.nodes.iter().position(|it| it.name == *node);
    let node_of = |part: u32| {
        let part = observation.parts.iter().find(|it| it.number == part)?;
        at(&part.node)
    };
    let mut best: Option<ThreadMove<'_>> = None;
    let mut alternatives = Vec::new();
    for thread in &observation.threads {
        let name = || format!("thread {}", thread.tid);
        let Some(from) = node_of(thread.part) else {
            continue;
        };
        let source = &observation.nodes[from];
        let pressed = source.state.pressed && is_sustained(&source.loads, policy.pressed_load);
        if !pressed && policy.strategy != Strategy::Spread {
            continue;
        }
        if thread.held {
            alternatives.push(Alternative {
                option: name(),
                finding: "it arrived recently, or is moving".into(),
            });
            continue;
        }
        if thread.cores < CORES_MIN {
            continue;
        }
        for part in &observation.parts {
            let Some(to) = at(&part.node).filter(|to| *to != from) else {
                continue;
            };
            let target = &observation.nodes[to];
            if target.forbidden.is_some() {
                continue;
            }
            let back = (target.name.clone(), source.name.clone());
            if observation.recent.contains(&back) {
                alternatives.push(Alternative {
                    option: format!("{} to {}", name(), target.name),
                    finding: "threads came from there recently".into(),
                });
                continue;
            }
            let steady = steady_difference(&source.loads, &target.loads);
            let margin = policy.margin_between(source.state.load, target.state.load);
            if steady.is_none_or(|steady| steady < margin) {
                continue;
            }
            let weight =
                |side: &NodeState| thread_weight(thread.cores, &source.state, side, policy);
            let (here, there) = (weight(&source.state), weight(&target.state));
            let gains = lowers(&source.state, &target.state, here, there);
            let before = source.state.load - target.state.load;
            let after = (source.state.load - here) - (target.state.load + there);
            let only_swaps = after < 0.0 && -after > before * (1.0 - policy.shrink_min);
            if gains < policy.gain_min || only_swaps {
                continue;
            }
            let candidate = ThreadMove {
                thread,
                part,
                from,
                to,
                here,
                there,
                lowers: gains,
                left: after.abs(),
            };
            let better = best.as_ref().is_none_or(|best| {
                // (Threads without an affinity to their current part go first.)
                let stays = |it: &ThreadMove<'_>| {
                    let affinity = it.thread.affinity.as_ref();
                    affinity.is_some_and(|affinity| affinity.part == it.thread.part)
                };
                let by_ease = stays(best).cmp(&stays(&candidate));
                let by_gain = candidate.lowers.total_cmp(&best.lowers);
                by_ease
                    .then(by_gain)
                    .then_with(|| best.left.total_cmp(&candidate.left))
                    .is_gt()
            });
            if better {
                best = Some(candidate);
            }
        }
    }
    let ThreadMove {
        thread,
        part,
        from,
        to,
        here,
        there,
        ..
    } = best?;
    let (source, target) = (&observation.nodes[from], &observation.nodes[to]);
    let why = format!(
        "{} is pressed (load {:.2}) and {} is not ({:.2}); the thread takes {:.2} cores: the loads become {:.2} and {:.2}",
        source.name,
        source.state.load,
        target.name,
        target.state.load,
        thread.cores,
        source.state.load - here,
        target.state.load + there
    );
    alternatives.push(Alternative {
        option: "the whole machine".into(),
        finding: "a thread is cheaper to move, and levels the nodes".into(),
    });
    let action = Action::Thread {
        tid: thread.tid,
        from: source.name.clone(),
        part: part.number,
        to: target.name.clone(),
    };
    let index = observation
        .threads
        .iter()
        .position(|it| it.tid == thread.tid)?;
    let moved = [(from, -here), (to, there)];
    Some((
        observation.choice(action, why, alternatives),
        index,
        part.number,
        moved,
    ))
}

/// Thread moves to parts of affinity, where that presses no node.
pub(super) fn follow_affinity(observation: &Observation, policy: &Policy) -> Vec<Choice> {
    let mut loads: BTreeMap<&Name, f64> = observation
        .nodes
        .iter()
        .map(|node| (&node.name, node.state.load))
        .collect();
    let mut choices = Vec::new();
    let free = observation.threads.iter().filter(|thread| !thread.held);
    let mut affinity: Vec<(&Thread, &Affinity)> = free
        .filter_map(|thread| Some((thread, thread.affinity.as_ref()?)))
        .filter(|(thread, affinity)| affinity.part != thread.part)
        .collect();
    affinity.sort_by(|(_, one), (_, other)| other.stall_share.total_cmp(&one.stall_share));
    let mut has_followed = false;
    for (thread, affinity) in affinity {
        if affinity.stall_share > 0.0 && has_followed {
            continue;
        }
        let part = |number: u32| observation.parts.iter().find(|it| it.number == number);
        let (Some(from), Some(to)) = (part(thread.part), part(affinity.part)) else {
            continue;
        };
        let (Some(source), Some(target)) =
            (observation.node(&from.node), observation.node(&to.node))
        else {
            continue;
        };
        let back = (target.name.clone(), source.name.clone());
        if target.forbidden.is_some()
            || source.name == target.name
            || observation.recent.contains(&back)
        {
            continue;
        }
        let weight = |side: &NodeState| thread_weight(thread.cores, &source.state, side, policy);
        let load = |name: &Name| loads.get(name).copied().unwrap_or(f64::MAX);
        let there = load(&target.name) + weight(&target.state);
        // (A thread may leave a pressed node for a less loaded one.)
        if there >= policy.pressed_load && there >= load(&source.name) {
            continue;
        }
        let why = format!(
            "{}; {} has load {there:.2} with it",
            affinity.why, target.name
        );
        let action = Action::Thread {
            tid: thread.tid,
            from: source.name.clone(),
            part: to.number,
            to: target.name.clone(),
        };
        choices.push(observation.choice(action, why, Vec::new()));
        has_followed |= affinity.stall_share > 0.0;
        let here = weight(&source.state);
        loads.insert(&target.name, there);
        let left = load_after(loads.get(&source.name).copied(), here);
        loads.insert(&source.name, left);
        if choices.len() == THREADS_AT_ONCE {
            break;
        }
    }
    choices
}

fn load_after(load: Option<f64>, less: f64) -> f64 {
    (load.unwrap_or(0.0) - less).max(0.0)
}
