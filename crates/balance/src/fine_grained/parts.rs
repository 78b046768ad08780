//! Creating, adding and removing parts, and gathering a machine at its home.

use super::{
    Action, Alternative, CORES_MIN, Choice, Node, Observation, Thread, is_sustained, mib,
    thread_weight,
};
use crate::Name;
use crate::policy::Policy;
use crate::select::presses_any;
use crate::window::steady_difference;

/// Share of the throughput at the home alone below which spanning counts as a loss; the remaining
/// difference may be noise.
const BENEFIT_MIN: f64 = 0.9;

pub(super) fn create(observation: &Observation, policy: &Policy) -> Option<Choice> {
    let home = observation.nodes.first()?;
    if observation.recently_gathered {
        return None;
    }
    let busy: Vec<&Thread> = observation
        .threads
        .iter()
        .filter(|it| it.cores >= CORES_MIN)
        .collect();
    let memory = observation.parts.first().and_then(|part| part.memory_bytes);
    let over = match (memory, observation.part_memory_bytes) {
        (Some(has), Some(most)) if has > most => Some((has, most)),
        _ => None,
    };
    let pressed = is_sustained(&home.loads, policy.pressed_load) && home.state.pressed;
    let mut alternatives = Vec::new();
    let why = if observation.from_beginning {
        "its threads begin on all of its nodes (spawn = spread)".to_owned()
    } else if let Some((has, most)) = over {
        format!(
            "it has {:.1} MiB on {}, where the limit of a part is {:.1} MiB",
            mib(has),
            home.name,
            mib(most)
        )
    } else if pressed && busy.len() > 1 {
        let others = observation.nodes.iter().skip(1);
        let lightest = others
            .filter(|it| it.forbidden.is_none())
            .min_by(|one, other| one.state.load.total_cmp(&other.state.load))?;
        let threads = observation.threads.iter();
        let there = lightest.state.load
            + threads
                .map(|it| thread_weight(it.cores, &home.state, &lightest.state, policy))
                .sum::<f64>();
        let machine = Alternative {
            option: format!("the whole machine to {}", lightest.name),
            finding: format!("that node's load would be {there:.2}"),
        };
        if !presses_any(home.state.load, there, policy) {
            // A move of the whole machine is cheaper: rounds do that.
            return None;
        }
        alternatives.push(machine);
        format!(
            "its {} busy threads press {} alone (load {:.2}), and would press any other node",
            busy.len(),
            home.name,
            home.state.load
        )
    } else {
        return None;
    };
    let mut others: Vec<&Node> = Vec::new();
    for node in observation.nodes.iter().skip(1) {
        let found = match &node.forbidden {
            Some(why) => why.clone(),
            None if !observation.from_beginning
                && over.is_none()
                && node.state.load + policy.margin_between(home.state.load, node.state.load)
                    > home.state.load =>
            {
                format!("load {:.2}: not clearly less loaded", node.state.load)
            }
            None => {
                others.push(node);
                continue;
            }
        };
        alternatives.push(Alternative {
            option: node.name.to_string(),
            finding: found,
        });
    }
    others.sort_by(|one, other| {
        let by_load = one.state.load.total_cmp(&other.state.load);
        by_load.then_with(|| one.name.cmp(&other.name))
    });
    let nodes: Vec<Name> = others
        .into_iter()
        .take(observation.parts_max.saturating_sub(1) as usize)
        .map(|it| it.name.clone())
        .collect();
    if nodes.is_empty() {
        return None;
    }
    Some(observation.choice(Action::Spread { nodes }, why, alternatives))
}

/// One more part, if threads still press a node and another node is less loaded.
pub(super) fn add_part(observation: &Observation, policy: &Policy) -> Option<Choice> {
    // (The effect of recently moved threads is not visible yet.)
    let settles = observation.threads.iter().any(|thread| thread.held);
    if settles || observation.parts.len() >= observation.parts_max as usize {
        return None;
    }
    let has_part = |node: &Node| observation.parts.iter().any(|part| part.node == node.name);
    let busy = |node: &Node| {
        let here = |thread: &&Thread| {
            let mut parts = observation.parts.iter();
            let part = parts.find(|part| part.number == thread.part);
            thread.cores >= CORES_MIN && part.is_some_and(|part| part.node == node.name)
        };
        observation.threads.iter().filter(here).count()
    };
    let pressed = observation.nodes.iter().find(|node| {
        let is_sustained = is_sustained(&node.loads, policy.pressed_load);
        has_part(node) && node.state.pressed && is_sustained && busy(node) > 1
    })?;
    let others = observation.nodes.iter();
    let lightest = others
        .filter(|node| !has_part(node) && node.forbidden.is_none())
        .min_by(|one, other| one.state.load.total_cmp(&other.state.load))?;
    let steady = steady_difference(&pressed.loads, &lightest.loads)?;
    if steady < policy.margin_between(pressed.state.load, lightest.state.load) {
        return None;
    }
    let members = observation
        .parts
        .iter()
        .skip(1)
        .map(|part| part.node.clone());
    let nodes: Vec<Name> = members.chain([lightest.name.clone()]).collect();
    let why = format!(
        "{} of its busy threads press {} (load {:.2}), none of its nodes can take more of them, and {} is less loaded ({:.2})",
        busy(pressed),
        pressed.name,
        pressed.state.load,
        lightest.name,
        lightest.state.load
    );
    Some(observation.choice(Action::Spread { nodes }, why, Vec::new()))
}

/// Removes parts on nodes where they are not allowed.
pub(super) fn leave_forbidden_nodes(observation: &Observation) -> Option<Choice> {
    let (mut nodes, mut why) = (Vec::new(), Vec::new());
    for part in observation.parts.iter().skip(1) {
        let forbidden = observation
            .node(&part.node)
            .and_then(|it| it.forbidden.as_ref());
        if let Some(reason) = forbidden.filter(|_| !nodes.contains(&part.node)) {
            nodes.push(part.node.clone());
            why.push(format!("its part on {} must go: {reason}", part.node));
        }
    }
    if nodes.is_empty() {
        return None;
    }
    Some(observation.choice(Action::Leave { nodes }, why.join("; "), Vec::new()))
}

/// Gathers a machine whose throughput is below that of its home alone, as its threads wait for
/// remote pages.
///
/// The waits must be a good part of what its threads would use. Otherwise it is slow because its
/// nodes are busy, which moves of single threads mend, or nothing does: nodes that share a host
/// with each other have fewer cores than each of them counts.
pub fn gather_if_slower(observation: &Observation, policy: &Policy) -> Option<Choice> {
    if observation.from_beginning || observation.part_memory_bytes.is_some() {
        return None;
    }
    let waited = observation.waited_cores;
    if waited < CORES_MIN || waited < demand(observation) * (1.0 - BENEFIT_MIN) {
        return None;
    }
    let runs = throughput(observation);
    let alone = throughput_at_home(observation, policy)?;
    if runs >= alone * BENEFIT_MIN {
        return None;
    }
    let why = format!(
        "its threads stall on remote pages for {waited:.2} cores and run {runs:.2} cores in total; at its home alone they would run {alone:.2}"
    );
    Some(observation.choice(Action::Gather, why, Vec::new()))
}

/// Throughput of all threads, in cores of speed 1.
fn throughput(observation: &Observation) -> f64 {
    let ran_cores = observation.threads.iter().map(|thread| {
        let mut parts = observation.parts.iter();
        let part = parts.find(|part| part.number == thread.part);
        let node = part.and_then(|part| observation.node(&part.node));
        thread.ran_cores * node.map_or(1.0, |node| node.state.capacity.speed)
    });
    ran_cores.sum()
}

/// CPU demand of all threads if none waited for remote pages, in cores.
fn demand(observation: &Observation) -> f64 {
    let demand: f64 = observation.threads.iter().map(|it| it.cores).sum();
    demand + observation.waited_cores
}

/// Throughput at the home alone, in cores of speed 1, where no thread waits for remote pages: the
/// total demand, or the machine's share of a node with less capacity.
fn throughput_at_home(observation: &Observation, policy: &Policy) -> Option<f64> {
    let home = &observation.nodes.first()?.state;
    let (cores, speed) = (home.capacity.cores, home.capacity.speed);
    let wants = demand(observation).min(observation.threads.len() as f64);
    let here = observation.threads.iter().filter(|it| it.part == 0);
    let here: f64 = here.map(|it| it.cores).sum();
    let others = (home.load * cores / policy.weights.cpu - here).max(0.0);
    let share = cores * wants / (wants + others).max(f64::MIN_POSITIVE);
    Some(wants.min(share.max(cores - others)) * speed)
}
