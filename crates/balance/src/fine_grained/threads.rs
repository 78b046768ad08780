//! Which threads go to other parts: from pressed nodes, and to what draws them.

use super::{CORES_MIN, Choice, Drawn, Grain, Part, Scene, Thread, Weighed, steadily, weigh};
use crate::Name;
use crate::policy::{Policy, Strategy};
use crate::select::{Side, lowers};
use crate::window::steady_difference;
use std::collections::BTreeMap;

/// Most threads that one decision moves: what comes of them is seen before more go.
const THREADS_AT_ONCE: usize = 4;

/// A move of a thread that would level two nodes.
struct Levelling<'a> {
    thread: &'a Thread,
    part: &'a Part,
    from: usize,
    to: usize,
    /// What the thread weighs at both.
    here: f64,
    there: f64,
    /// By how much it lowers the sum of squares.
    lowers: f64,
    /// How far from level it leaves the two.
    left: f64,
}

/// Threads that leave pressed nodes, some at once.
pub(super) fn from_pressed(scene: &Scene, policy: &Policy) -> Vec<Choice> {
    let mut scene = scene.clone();
    let mut choices = Vec::new();
    while choices.len() < THREADS_AT_ONCE {
        let Some((choice, index, part, node_loads)) = one_thread(&scene, policy) else {
            break;
        };
        choices.push(choice);
        if let Some(thread) = scene.threads.get_mut(index) {
            thread.part = part;
            thread.held = true;
        }
        for (index, by) in node_loads {
            if let Some(node) = scene.nodes.get_mut(index) {
                node.side.load = (node.side.load + by).max(0.0);
                for load in &mut node.loads {
                    *load = (*load + by).max(0.0);
                }
            }
        }
    }
    choices
}

type Moved = (Choice, usize, u32, [(usize, f64); 2]);

fn one_thread(scene: &Scene, policy: &Policy) -> Option<Moved> {
    let at = |node: &Name| scene.nodes.iter().position(|it| it.name == *node);
    let node_of = |part: u32| {
        let part = scene.parts.iter().find(|it| it.number == part)?;
        at(&part.node)
    };
    let mut best: Option<Levelling<'_>> = None;
    let mut weighed = Vec::new();
    for thread in &scene.threads {
        let name = || format!("thread {}", thread.tid);
        let Some(from) = node_of(thread.part) else {
            continue;
        };
        let source = &scene.nodes[from];
        let pressed = source.side.pressed && steadily(&source.loads, policy.pressed_load);
        if !pressed && policy.strategy != Strategy::Spread {
            continue;
        }
        if thread.held {
            weighed.push(Weighed {
                what: name(),
                found: "it came not long ago, or moves".into(),
            });
            continue;
        }
        if thread.cores < CORES_MIN {
            continue;
        }
        for part in &scene.parts {
            let Some(to) = at(&part.node).filter(|to| *to != from) else {
                continue;
            };
            let target = &scene.nodes[to];
            if target.forbidden.is_some() {
                continue;
            }
            let back = (target.name.clone(), source.name.clone());
            if scene.recent.contains(&back) {
                weighed.push(Weighed {
                    what: format!("{} to {}", name(), target.name),
                    found: "threads came from there not long ago".into(),
                });
                continue;
            }
            let steady = steady_difference(&source.loads, &target.loads);
            let margin = policy.margin_between(source.side.load, target.side.load);
            if steady.is_none_or(|steady| steady < margin) {
                continue;
            }
            let weight = |side: &Side| weigh(thread.cores, &source.side, side, policy);
            let (here, there) = (weight(&source.side), weight(&target.side));
            let gains = lowers(&source.side, &target.side, here, there);
            let before = source.side.load - target.side.load;
            let after = (source.side.load - here) - (target.side.load + there);
            let only_swaps = after < 0.0 && -after > before * (1.0 - policy.shrink_min);
            if gains < policy.gain_min || only_swaps {
                continue;
            }
            let levelling = Levelling {
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
                // (Those go first that do not want to be where they are.)
                let stays = |it: &Levelling<'_>| {
                    let drawn = it.thread.drawn.as_ref();
                    drawn.is_some_and(|drawn| drawn.part == it.thread.part)
                };
                let by_ease = stays(best).cmp(&stays(&levelling));
                let by_gain = levelling.lowers.total_cmp(&best.lowers);
                by_ease
                    .then(by_gain)
                    .then_with(|| best.left.total_cmp(&levelling.left))
                    .is_gt()
            });
            if better {
                best = Some(levelling);
            }
        }
    }
    let Levelling {
        thread,
        part,
        from,
        to,
        here,
        there,
        ..
    } = best?;
    let (source, target) = (&scene.nodes[from], &scene.nodes[to]);
    let why = format!(
        "{} is pressed (load {:.2}) and {} is not ({:.2}); the thread takes {:.2} cores: {:.2} and {:.2} are left",
        source.name,
        source.side.load,
        target.name,
        target.side.load,
        thread.cores,
        source.side.load - here,
        target.side.load + there
    );
    weighed.push(Weighed {
        what: "the whole machine".into(),
        found: "a thread costs less to move, and levels them".into(),
    });
    let grain = Grain::Thread {
        tid: thread.tid,
        from: source.name.clone(),
        part: part.number,
        to: target.name.clone(),
    };
    let index = scene.threads.iter().position(|it| it.tid == thread.tid)?;
    let moved = [(from, -here), (to, there)];
    Some((scene.choice(grain, why, weighed), index, part.number, moved))
}

/// Threads that would rather be elsewhere, where that presses nobody.
pub(super) fn drawn(scene: &Scene, policy: &Policy) -> Vec<Choice> {
    let mut loads: BTreeMap<&Name, f64> = scene
        .nodes
        .iter()
        .map(|node| (&node.name, node.side.load))
        .collect();
    let mut choices = Vec::new();
    let free = scene.threads.iter().filter(|thread| !thread.held);
    let mut drawn: Vec<(&Thread, &Drawn)> = free
        .filter_map(|thread| Some((thread, thread.drawn.as_ref()?)))
        .filter(|(thread, drawn)| drawn.part != thread.part)
        .collect();
    drawn.sort_by(|(_, one), (_, other)| other.stands.total_cmp(&one.stands));
    let mut has_followed = false;
    for (thread, drawn) in drawn {
        if drawn.stands > 0.0 && has_followed {
            continue;
        }
        let part = |number: u32| scene.parts.iter().find(|it| it.number == number);
        let (Some(from), Some(to)) = (part(thread.part), part(drawn.part)) else {
            continue;
        };
        let (Some(source), Some(target)) = (scene.node(&from.node), scene.node(&to.node)) else {
            continue;
        };
        let back = (target.name.clone(), source.name.clone());
        if target.forbidden.is_some() || source.name == target.name || scene.recent.contains(&back)
        {
            continue;
        }
        let weight = |side: &Side| weigh(thread.cores, &source.side, side, policy);
        let load = |name: &Name| loads.get(name).copied().unwrap_or(f64::MAX);
        let there = load(&target.name) + weight(&target.side);
        // (Where a node is pressed that it leaves, it may go to one that is less so.)
        if there >= policy.pressed_load && there >= load(&source.name) {
            continue;
        }
        let why = format!("{}; {} is at {there:.2} with it", drawn.why, target.name);
        let grain = Grain::Thread {
            tid: thread.tid,
            from: source.name.clone(),
            part: to.number,
            to: target.name.clone(),
        };
        choices.push(scene.choice(grain, why, Vec::new()));
        has_followed |= drawn.stands > 0.0;
        let here = weight(&source.side);
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
