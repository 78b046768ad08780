//! Parts: whether a machine gets some, or more, or loses some, or all.

use super::{CORES_MIN, Choice, Grain, Node, Scene, Thread, Weighed, mib, steadily, weigh};
use crate::Name;
use crate::policy::Policy;
use crate::select::presses_any;
use crate::window::steady_difference;

/// Share of what it would run alone that it must run with its parts: less is a loss, and
/// what is between may be noise.
const WORTH: f64 = 0.9;

pub(super) fn spread(scene: &Scene, policy: &Policy) -> Option<Choice> {
    let home = scene.nodes.first()?;
    if scene.tried {
        return None;
    }
    let busy: Vec<&Thread> = scene
        .threads
        .iter()
        .filter(|it| it.cores >= CORES_MIN)
        .collect();
    let memory = scene.parts.first().and_then(|part| part.memory_bytes);
    let over = match (memory, scene.part_memory_bytes) {
        (Some(has), Some(most)) if has > most => Some((has, most)),
        _ => None,
    };
    let pressed = steadily(&home.loads, policy.pressed_load) && home.side.pressed;
    let mut weighed = Vec::new();
    let why = if scene.from_beginning {
        "its threads begin on all of its nodes (spawn = spread)".to_owned()
    } else if let Some((has, most)) = over {
        format!(
            "it has {:.1} MiB on {}, where a part keeps {:.1} MiB at most",
            mib(has),
            home.name,
            mib(most)
        )
    } else if pressed && busy.len() > 1 {
        let others = scene.nodes.iter().skip(1);
        let lightest = others
            .filter(|it| it.forbidden.is_none())
            .min_by(|one, other| one.side.load.total_cmp(&other.side.load))?;
        let threads = scene.threads.iter();
        let there = lightest.side.load
            + threads
                .map(|it| weigh(it.cores, &home.side, &lightest.side, policy))
                .sum::<f64>();
        let machine = Weighed {
            what: format!("the whole machine to {}", lightest.name),
            found: format!("that node would be at {there:.2} then"),
        };
        if !presses_any(home.side.load, there, policy) {
            // That is cheaper: rounds see to it.
            return None;
        }
        weighed.push(machine);
        format!(
            "its {} busy threads press {} alone (load {:.2}), and would press any other node",
            busy.len(),
            home.name,
            home.side.load
        )
    } else {
        return None;
    };
    let mut others: Vec<&Node> = Vec::new();
    for node in scene.nodes.iter().skip(1) {
        let found = match &node.forbidden {
            Some(why) => why.clone(),
            None if !scene.from_beginning
                && over.is_none()
                && node.side.load + policy.margin_between(home.side.load, node.side.load)
                    > home.side.load =>
            {
                format!("load {:.2}: not clearly lighter", node.side.load)
            }
            None => {
                others.push(node);
                continue;
            }
        };
        weighed.push(Weighed {
            what: node.name.to_string(),
            found,
        });
    }
    others.sort_by(|one, other| {
        let by_load = one.side.load.total_cmp(&other.side.load);
        by_load.then_with(|| one.name.cmp(&other.name))
    });
    let nodes: Vec<Name> = others
        .into_iter()
        .take(scene.parts_max.saturating_sub(1) as usize)
        .map(|it| it.name.clone())
        .collect();
    if nodes.is_empty() {
        return None;
    }
    Some(scene.choice(Grain::Spread { nodes }, why, weighed))
}

/// One more part, where threads still press a node and another one is lighter.
pub(super) fn widen(scene: &Scene, policy: &Policy) -> Option<Choice> {
    // (What threads that came not long ago make of it is not seen yet.)
    let settles = scene.threads.iter().any(|thread| thread.held);
    if settles || scene.parts.len() >= scene.parts_max as usize {
        return None;
    }
    let has_part = |node: &Node| scene.parts.iter().any(|part| part.node == node.name);
    let busy = |node: &Node| {
        let here = |thread: &&Thread| {
            let mut parts = scene.parts.iter();
            let part = parts.find(|part| part.number == thread.part);
            thread.cores >= CORES_MIN && part.is_some_and(|part| part.node == node.name)
        };
        scene.threads.iter().filter(here).count()
    };
    let pressed = scene.nodes.iter().find(|node| {
        let steadily = steadily(&node.loads, policy.pressed_load);
        has_part(node) && node.side.pressed && steadily && busy(node) > 1
    })?;
    let others = scene.nodes.iter();
    let lightest = others
        .filter(|node| !has_part(node) && node.forbidden.is_none())
        .min_by(|one, other| one.side.load.total_cmp(&other.side.load))?;
    let steady = steady_difference(&pressed.loads, &lightest.loads)?;
    if steady < policy.margin_between(pressed.side.load, lightest.side.load) {
        return None;
    }
    let members = scene.parts.iter().skip(1).map(|part| part.node.clone());
    let nodes: Vec<Name> = members.chain([lightest.name.clone()]).collect();
    let why = format!(
        "{} of its busy threads press {} (load {:.2}), none of its nodes takes more of them, and {} is lighter ({:.2})",
        busy(pressed),
        pressed.name,
        pressed.side.load,
        lightest.name,
        lightest.side.load
    );
    Some(scene.choice(Grain::Spread { nodes }, why, Vec::new()))
}

/// Parts are where none may be.
pub(super) fn leaves(scene: &Scene) -> Option<Choice> {
    let (mut nodes, mut why) = (Vec::new(), Vec::new());
    for part in scene.parts.iter().skip(1) {
        let forbidden = scene.node(&part.node).and_then(|it| it.forbidden.as_ref());
        if let Some(reason) = forbidden.filter(|_| !nodes.contains(&part.node)) {
            nodes.push(part.node.clone());
            why.push(format!("its part on {} must go: {reason}", part.node));
        }
    }
    if nodes.is_empty() {
        return None;
    }
    Some(scene.choice(Grain::Leave { nodes }, why.join("; "), Vec::new()))
}

/// Whether it runs less than it would at its home alone, as it waits for pages; then that
/// it comes together.
pub fn loses(scene: &Scene, policy: &Policy) -> Option<Choice> {
    if scene.from_beginning || scene.part_memory_bytes.is_some() {
        return None;
    }
    if scene.waited_cores < CORES_MIN {
        return None;
    }
    let runs = runs(scene);
    let alone = alone(scene, policy)?;
    if runs >= alone * WORTH {
        return None;
    }
    let why = format!(
        "its threads wait {:.2} cores' time for pages and run {runs:.2} cores in all, where its home alone would run {alone:.2}",
        scene.waited_cores
    );
    Some(scene.choice(Grain::Gather, why, Vec::new()))
}

/// What all its threads run together, in cores of speed 1.
fn runs(scene: &Scene) -> f64 {
    let ran = scene.threads.iter().map(|thread| {
        let mut parts = scene.parts.iter();
        let part = parts.find(|part| part.number == thread.part);
        let node = part.and_then(|part| scene.node(&part.node));
        thread.ran * node.map_or(1.0, |node| node.side.capacity.speed)
    });
    ran.sum()
}

/// What they would run at their home alone, in cores of speed 1, where nobody waits for pages: all that they
/// want, or the machine's share of a node that has less than is wanted there.
fn alone(scene: &Scene, policy: &Policy) -> Option<f64> {
    let home = &scene.nodes.first()?.side;
    let (cores, speed) = (home.capacity.cores, home.capacity.speed);
    let all: f64 = scene.threads.iter().map(|it| it.cores).sum();
    let wants = (all + scene.waited_cores).min(scene.threads.len() as f64);
    let here = scene.threads.iter().filter(|it| it.part == 0);
    let here: f64 = here.map(|it| it.cores).sum();
    let others = (home.load * cores / policy.weights.cpu - here).max(0.0);
    let share = cores * wants / (wants + others).max(f64::MIN_POSITIVE);
    Some(wants.min(share.max(cores - others)) * speed)
}
