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

use crate::Name;
use crate::policy::{Policy, Strategy};
use crate::select::{Side, lowers, presses_any};
use crate::window::{NEWEST, NEWEST_SHOWING, steady_difference};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Most threads that one decision moves: what comes of them is seen before more go.
const THREADS_AT_ONCE: usize = 4;
/// Cores below which a thread is not worth moving.
const CORES_MIN: f64 = 0.1;
/// Most bytes of objects in one decision.
const OBJECT_BYTES_MAX: u64 = 256 << 20;
/// Least bytes that are worth one.
const OBJECT_BYTES_MIN: u64 = 1 << 20;
/// Most pieces of memory in one decision.
const OBJECTS_AT_ONCE: usize = 32;
/// Share of what a part may keep to which it is filled: what it uses next has room.
const FILLED: f64 = 0.9;
/// Of what a part may keep so much is there when some of it is to go: before the part
/// itself has to give away again what comes first to hand.
const FULL: f64 = 0.95;
/// Share of what it would run alone that it must run with its parts: less is a loss, and
/// what is between may be noise.
const WORTH: f64 = 0.9;
/// Looks at which it loses by its parts, after which it does not matter what may help.
const LOSING_MAX: u32 = 20;
/// Bytes of a page.
const PAGE: u64 = 4096;

/// A part of the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its number; the home has 0.
    pub number: u32,
    /// Its node.
    pub node: Name,
    /// Bytes of the machine's memory that it has, where that is known.
    pub memory_bytes: Option<u64>,
    /// It had too much since the last look, and gave away what came first to hand.
    pub overflows: bool,
}

/// A thread of the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Thread {
    /// Its number.
    pub tid: u32,
    /// The part at which it is.
    pub part: u32,
    /// Cores of that part's node that it takes or waits for.
    pub cores: f64,
    /// Of them, those that it gets.
    pub ran: f64,
    /// Whether it must stay: it moves, or came not long ago.
    pub held: bool,
    /// Where it would rather be.
    pub drawn: Option<Drawn>,
}

/// The part that draws a thread.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// Its number.
    pub part: u32,
    /// What the thread wants there.
    pub why: String,
    /// Share of its time that it stands at pages from there; 0 where it is a liking. Of
    /// those that go for their pages one goes at a time: of two that share some the other
    /// one is where they are then.
    pub stands: f64,
}

/// A node that has a part, or may get one.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Its name.
    pub name: Name,
    /// As it tells rounds.
    pub side: Side,
    /// Loads of its last samples, newest first.
    pub loads: Vec<f64>,
    /// Why no part may be there, if none may.
    pub forbidden: Option<String>,
}

/// What is known when it is decided. The home's node is the first.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// Parts that it may have.
    pub parts_max: u32,
    /// It is to have them from its beginning.
    pub from_beginning: bool,
    /// What one part keeps at most.
    pub part_memory_bytes: Option<u64>,
    /// Those that it has: the home alone, or with members.
    pub parts: Vec<Part>,
    /// All its threads.
    pub threads: Vec<Thread>,
    /// The home's node first, then those of members, then others.
    pub nodes: Vec<Node>,
    /// Threads that waited for pages on average lately, in cores, if it spans.
    pub waited_cores: f64,
    /// Looks in a row at which it lost by its parts ([`loses`]).
    pub losing: u32,
    /// It was brought together not long ago, since it lost more than it won.
    pub tried: bool,
    /// From which nodes to which threads went not long ago: none goes back.
    pub recent: Vec<(Name, Name)>,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "grain")]
pub enum Grain {
    /// It gets parts on these nodes.
    Spread {
        /// Beside its home's.
        nodes: Vec<Name>,
    },
    /// A thread goes to another part.
    Thread {
        /// Its number.
        tid: u32,
        /// The node that it leaves.
        from: Name,
        /// The part that it goes to.
        part: u32,
        /// That part's node.
        to: Name,
    },
    /// Objects go to another part, coldest first.
    Objects {
        /// The part that gives.
        from_part: u32,
        /// Its node.
        from: Name,
        /// The part that takes.
        part: u32,
        /// Its node.
        to: Name,
        /// How many bytes.
        bytes: u64,
    },
    /// All of it comes back to its home.
    Gather,
    /// It has no parts on these nodes any more.
    Leave {
        /// Where none may be.
        nodes: Vec<Name>,
    },
}

/// Something that was weighed, and what was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Weighed {
    /// What: a grain, a thread, a node.
    pub what: String,
    /// Why it was taken, or not.
    pub found: String,
}

/// What is done, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// What.
    pub grain: Grain,
    /// The rule that decided.
    pub why: String,
    /// Loads by which it was.
    pub loads: Vec<(Name, f64)>,
    /// What was weighed beside it.
    pub weighed: Vec<Weighed>,
}

impl fmt::Display for Grain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &u64| *bytes as f64 / f64::from(1 << 20);
        match self {
            Grain::Spread { nodes } => write!(f, "gets parts on {}", nodes.join(", ")),
            Grain::Thread { tid, from, to, .. } => {
                write!(f, "thread {tid} moves from {from} to {to}")
            }
            Grain::Objects {
                from, to, bytes, ..
            } => write!(
                f,
                "{:.1} MiB of memory move from {from} to {to}",
                mib(bytes)
            ),
            Grain::Gather => f.write_str("comes back together"),
            Grain::Leave { nodes } => write!(f, "has no part on {} any more", nodes.join(", ")),
        }
    }
}

impl Scene {
    fn node(&self, name: &Name) -> Option<&Node> {
        self.nodes.iter().find(|it| it.name == *name)
    }

    fn spans(&self) -> bool {
        self.parts.len() > 1
    }

    fn loads(&self) -> Vec<(Name, f64)> {
        let nodes = self.nodes.iter();
        nodes.map(|it| (it.name.clone(), it.side.load)).collect()
    }

    /// Loads of nodes with that of some threads elsewhere than where they are.
    fn choice(&self, grain: Grain, why: String, weighed: Vec<Weighed>) -> Choice {
        Choice {
            grain,
            why,
            loads: self.loads(),
            weighed,
        }
    }
}

/// Whether most of the newest samples show that much.
fn steadily(loads: &[f64], least: f64) -> bool {
    let newest = loads.iter().take(NEWEST);
    newest.filter(|load| **load >= least).count() >= NEWEST_SHOWING
}

/// What is to be done with a machine now, and why; nothing where nothing is pressed.
pub fn decide(scene: &Scene, policy: &Policy) -> Vec<Choice> {
    if !scene.spans() {
        return spread(scene, policy).into_iter().collect();
    }
    if let Some(choice) = leaves(scene) {
        return vec![choice];
    }
    if let Some(choice) = loses(scene, policy) {
        // Threads that are together may lose no more.
        let drawn = match scene.losing {
            0..=LOSING_MAX => drawn(scene, policy),
            _ => Vec::new(),
        };
        return if drawn.is_empty() {
            vec![choice]
        } else {
            drawn
        };
    }
    let mut choices = threads(scene, policy);
    if choices.is_empty() {
        choices.extend(widen(scene, policy));
    }
    if choices.is_empty() {
        choices.extend(drawn(scene, policy));
    }
    choices.extend(objects(scene, policy));
    choices
}

// ── parts ───────────────────────────────────────────────────────────────

fn spread(scene: &Scene, policy: &Policy) -> Option<Choice> {
    let home = scene.nodes.first()?;
    if scene.tried {
        return None;
    }
    let cores: f64 = scene.threads.iter().map(|it| it.cores).sum();
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
        let there =
            lightest.side.load + cores * policy.weights.cpu / lightest.side.capacity.power();
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
fn widen(scene: &Scene, policy: &Policy) -> Option<Choice> {
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
fn leaves(scene: &Scene) -> Option<Choice> {
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

/// What they would run at their home alone, where nobody waits for pages: all that they
/// want, or the machine's share of a node that has less than is wanted there.
fn alone(scene: &Scene, policy: &Policy) -> Option<f64> {
    let home = &scene.nodes.first()?.side;
    let power = home.capacity.power();
    let all: f64 = scene.threads.iter().map(|it| it.cores).sum();
    let wants = (all + scene.waited_cores).min(scene.threads.len() as f64) * home.capacity.speed;
    let here = scene.threads.iter().filter(|it| it.part == 0);
    let here: f64 = here.map(|it| it.cores).sum();
    let others = (home.load * power / policy.weights.cpu - here).max(0.0);
    let share = power * wants / (wants + others).max(f64::MIN_POSITIVE);
    Some(wants.min(share.max(power - others)))
}

// ── threads ─────────────────────────────────────────────────────────────

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

fn threads(scene: &Scene, policy: &Policy) -> Vec<Choice> {
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
            let weight = |side: &Side| thread.cores * policy.weights.cpu / side.capacity.power();
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
fn drawn(scene: &Scene, policy: &Policy) -> Vec<Choice> {
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
        let weight = |side: &Side| thread.cores * policy.weights.cpu / side.capacity.power();
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

// ── objects ─────────────────────────────────────────────────────────────

/// Whether a part has about as much as it may keep.
fn is_full(has_bytes: u64, most_bytes: u64) -> bool {
    has_bytes as f64 > most_bytes as f64 * FULL
}

/// Bytes that a part is to give away, and why.
fn surplus(scene: &Scene, part: &Part, policy: &Policy) -> Option<(u64, String)> {
    let has = part.memory_bytes?;
    let most = scene.part_memory_bytes;
    if let Some(most) = most.filter(|most| has > *most || part.overflows && is_full(has, *most)) {
        let rest = (most as f64 * FILLED) as u64;
        let why = format!(
            "the part on {} has {:.1} MiB, and keeps {:.1} MiB at most",
            part.node,
            mib(has),
            mib(most)
        );
        return Some((has - rest, why));
    }
    let side = &scene.node(&part.node)?.side;
    let kept = (side.capacity.memory_bytes as f64 * policy.memory_headroom) as u64;
    if side.memory_free_bytes >= kept {
        return None;
    }
    let why = format!(
        "{} has {:.1} MiB of memory free, and {:.1} MiB are kept free",
        part.node,
        mib(side.memory_free_bytes),
        mib(kept)
    );
    Some((has.min(kept - side.memory_free_bytes), why))
}

/// Bytes that a part may take without being pressed itself.
fn room(scene: &Scene, part: &Part, policy: &Policy) -> u64 {
    let Some(node) = scene.node(&part.node) else {
        return 0;
    };
    if node.forbidden.is_some() {
        return 0;
    }
    let kept = (node.side.capacity.memory_bytes as f64 * policy.memory_headroom) as u64;
    // Once more as much: nodes tell what was some time ago.
    let of_node = node.side.memory_free_bytes.saturating_sub(2 * kept);
    let of_part = match (part.memory_bytes, scene.part_memory_bytes) {
        (Some(has), Some(most)) => ((most as f64 * FILLED) as u64).saturating_sub(has),
        (None, Some(_)) => 0,
        _ => u64::MAX,
    };
    of_node.min(of_part)
}

fn objects(scene: &Scene, policy: &Policy) -> Vec<Choice> {
    let mut rooms: BTreeMap<u32, u64> = scene
        .parts
        .iter()
        .map(|part| (part.number, room(scene, part, policy)))
        .collect();
    let mut choices = Vec::new();
    for from in &scene.parts {
        let Some((mut bytes, why)) = surplus(scene, from, policy) else {
            continue;
        };
        bytes = bytes.min(OBJECT_BYTES_MAX);
        while bytes >= OBJECT_BYTES_MIN {
            let others = scene
                .parts
                .iter()
                .filter(|it| it.number != from.number && it.node != from.node);
            let most = others.max_by_key(|it| {
                let room = rooms.get(&it.number).copied().unwrap_or(0);
                (room, std::cmp::Reverse(it.number))
            });
            let Some(to) = most else { break };
            let room = rooms.entry(to.number).or_default();
            let given = bytes.min(*room) / PAGE * PAGE;
            if given < OBJECT_BYTES_MIN {
                break;
            }
            *room -= given;
            bytes -= given;
            let grain = Grain::Objects {
                from_part: from.number,
                from: from.node.clone(),
                part: to.number,
                to: to.node.clone(),
                bytes: given,
            };
            let weighed = vec![Weighed {
                what: "the whole machine".into(),
                found: "its coldest objects are fewer bytes".into(),
            }];
            choices.push(scene.choice(grain, why.clone(), weighed));
        }
    }
    choices
}

/// A piece of memory that one part has.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// The machine's memory.
    pub memory: u32,
    /// Its first byte.
    pub start: u64,
    /// How many.
    pub bytes: u64,
    /// Whether its part did not use it of late.
    pub is_idle: bool,
    /// How often threads waited of late for each of its pages, on average.
    pub heat: f64,
}

/// The coldest pieces that are so many bytes together, of pages of 4 KiB: what nobody uses
/// where it is, the largest first, as far as it fills what is wanted in so few pieces as are
/// moved at once; then what is waited for least, of equals the largest.
pub fn coldest(objects: &[Object], bytes: u64) -> Vec<Object> {
    let (mut taken, mut rest) = (Vec::new(), bytes / PAGE * PAGE);
    let mut take = |object: &Object, rest: &mut u64| {
        let bytes = object.bytes.min(*rest);
        *rest -= bytes;
        taken.push(Object {
            bytes,
            ..object.clone()
        });
    };
    let mut places = OBJECTS_AT_ONCE as u64;
    let (mut idle, mut others): (Vec<&Object>, Vec<&Object>) =
        objects.iter().partition(|object| object.is_idle);
    idle.sort_by_key(|object| std::cmp::Reverse(object.bytes));
    for object in idle {
        // (Crumbs would take the place of what is enough.)
        let would_fill = object.bytes > 0 && rest.div_ceil(object.bytes) <= places;
        match rest > 0 && would_fill {
            true => {
                take(object, &mut rest);
                places -= 1;
            }
            false => others.push(object),
        }
    }
    others.sort_by(|one, other| {
        let by_heat = one.heat.total_cmp(&other.heat);
        by_heat.then_with(|| other.bytes.cmp(&one.bytes))
    });
    for object in others {
        if rest == 0 || places == 0 {
            break;
        }
        take(object, &mut rest);
        places -= 1;
    }
    taken
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Capacity;

    const MIB: u64 = 1 << 20;

    fn node(name: &str, load: f64) -> Node {
        Node {
            name: name.into(),
            side: Side {
                capacity: Capacity {
                    cores: 1.0,
                    speed: 1.0,
                    memory_bytes: 1000 * MIB,
                    io_bytes_per_s: 1e9,
                },
                load,
                memory_free_bytes: 900 * MIB,
                pressed: load > 1.0,
                free: false,
            },
            loads: vec![load; 8],
            forbidden: None,
        }
    }

    fn part(number: u32, node: &str, mib: u64) -> Part {
        Part {
            number,
            node: node.into(),
            memory_bytes: Some(mib * MIB),
            overflows: false,
        }
    }

    fn thread(tid: u32, part: u32, cores: f64) -> Thread {
        Thread {
            tid,
            part,
            cores,
            ran: cores,
            held: false,
            drawn: None,
        }
    }

    /// Six burners on the first of three nodes.
    fn scene(parts: &[&str]) -> Scene {
        Scene {
            parts_max: 3,
            from_beginning: false,
            part_memory_bytes: None,
            parts: (0..)
                .zip(parts)
                .map(|(number, node)| part(number, node, 10))
                .collect(),
            threads: (0..6).map(|tid| thread(tid, 0, 1.0)).collect(),
            nodes: vec![node("a", 6.0), node("b", 0.1), node("c", 0.0)],
            waited_cores: 0.0,
            losing: 0,
            tried: false,
            recent: Vec::new(),
        }
    }

    fn moves(choices: &[Choice]) -> Vec<(u32, u32)> {
        let moves = choices.iter().filter_map(|it| match it.grain {
            Grain::Thread { tid, part, .. } => Some((tid, part)),
            _ => None,
        });
        moves.collect()
    }

    #[test]
    fn a_machine_that_presses_any_node_gets_parts_and_its_threads_are_dealt_out() {
        let policy = Policy::default();
        let alone = scene(&["a"]);
        let choices = decide(&alone, &policy);
        let [choice] = &choices[..] else {
            panic!("{choices:?}")
        };
        let nodes: Vec<Name> = ["c", "b"].map(Name::from).to_vec();
        assert_eq!(choice.grain, Grain::Spread { nodes });
        assert!(choice.why.contains("6 busy threads"), "{}", choice.why);
        assert_eq!(choice.loads.len(), 3);

        let mut spans = scene(&["a", "c", "b"]);
        let choices = decide(&spans, &policy);
        let dealt = moves(&choices);
        assert_eq!(dealt.len(), 4, "{choices:?}");
        let to = |part: u32| dealt.iter().filter(|(_, to)| *to == part).count();
        assert_eq!((to(1), to(2)), (2, 2));
        // Then it is level, and nothing more is done.
        for (tid, part) in dealt {
            spans.threads[tid as usize].part = part;
        }
        for (number, load) in [2.0, 2.1, 2.0].into_iter().enumerate() {
            let one = &mut spans.nodes[number];
            one.side.load = load;
            one.side.pressed = true;
            one.loads = vec![load; 8];
        }
        assert_eq!(decide(&spans, &policy), []);
    }

    #[test]
    fn what_does_not_press_or_may_go_whole_is_left_alone() {
        let policy = Policy::default();
        let nothing = |scene: &Scene| assert_eq!(decide(scene, &policy), [], "{scene:?}");
        // Nobody waits.
        let mut calm = scene(&["a"]);
        calm.nodes[0] = node("a", 0.7);
        nothing(&calm);
        // It has not lasted.
        let mut short = scene(&["a"]);
        short.nodes[0].loads = vec![6.0, 6.0, 6.0, 0.1, 0.1, 0.1];
        nothing(&short);
        // It is one of many, and there is a node that would be light with it.
        let mut small = scene(&["a"]);
        small.threads = vec![thread(0, 0, 0.2), thread(1, 0, 0.2)];
        nothing(&small);
        // One busy thread cannot be divided.
        let mut one = scene(&["a"]);
        one.threads = vec![thread(0, 0, 1.0), thread(1, 0, 0.0)];
        nothing(&one);
        // All others are as heavy.
        let mut heavy = scene(&["a"]);
        heavy.nodes[1] = node("b", 6.0);
        heavy.nodes[2] = node("c", 5.9);
        nothing(&heavy);
        // It was tried, and lost by it.
        let mut tried = scene(&["a"]);
        tried.tried = true;
        nothing(&tried);
        // Its threads came not long ago.
        let mut held = scene(&["a", "b"]);
        for thread in &mut held.threads {
            thread.held = true;
        }
        nothing(&held);
    }

    #[test]
    fn a_part_goes_from_where_none_may_be_and_parts_that_lose_come_together() {
        let policy = Policy::default();
        let mut drained = scene(&["a", "b", "c"]);
        drained.nodes[2].forbidden = Some("c is being drained".into());
        let choices = decide(&drained, &policy);
        assert_eq!(choices.len(), 1);
        let nodes = vec![drained.nodes[2].name.clone()];
        assert_eq!(choices[0].grain, Grain::Leave { nodes });
        assert!(choices[0].why.contains("drained"), "{}", choices[0].why);

        // Two threads hand a page to and fro.
        let gathers = |scene: &Scene| {
            let choices = decide(scene, &policy);
            choices.iter().any(|it| it.grain == Grain::Gather)
        };
        let mut losing = scene(&["a", "b", "c"]);
        losing.threads = vec![thread(0, 0, 0.2), thread(1, 1, 0.2)];
        losing.nodes[0] = node("a", 0.2);
        losing.waited_cores = 0.8;
        let choices = decide(&losing, &policy);
        assert_eq!(choices[0].grain, Grain::Gather);
        assert!(choices[0].why.contains("0.40 cores in all"), "{choices:?}");
        assert!(choices[0].why.contains("would run 1.00"), "{choices:?}");
        // Its home has half a core for it: others want as much as it does.
        losing.nodes[0] = node("a", 1.4);
        assert!(gathers(&losing));
        losing.nodes[0] = node("a", 2.4);
        assert!(!gathers(&losing));
        // A faster node's cores count for more.
        losing.nodes[0] = node("a", 1.4);
        losing.nodes[1].side.capacity.speed = 1.6;
        assert!(!gathers(&losing));
        losing.nodes[1].side.capacity.speed = 1.0;
        // A person wants it to have them all the time.
        losing.from_beginning = true;
        assert!(!gathers(&losing));
        losing.from_beginning = false;
        // Nobody waits for pages: that it runs little has other reasons.
        losing.waited_cores = 0.05;
        assert!(!gathers(&losing));
    }

    #[test]
    fn threads_go_to_what_draws_them_where_that_presses_nobody() {
        let policy = Policy::default();
        let mut calm = scene(&["a", "b", "c"]);
        calm.threads = vec![thread(0, 0, 0.2), thread(1, 0, 0.2), thread(2, 1, 0.2)];
        calm.nodes[0] = node("a", 0.4);
        calm.nodes[1] = node("b", 0.2);
        for tid in [0, 2] {
            calm.threads[tid].drawn = Some(Drawn {
                part: 1,
                why: "it likes to be near cache".into(),
                stands: 0.0,
            });
        }
        let choices = decide(&calm, &policy);
        assert_eq!(moves(&choices), [(0, 1)]);
        assert!(choices[0].why.contains("near cache"), "{choices:?}");
        assert!(choices[0].why.contains("b is at 0.40"), "{choices:?}");
        // Not where it would press, where none may be, whence threads came, or at once.
        let nothing = |scene: &Scene| assert_eq!(decide(scene, &policy), []);
        let mut pressed = calm.clone();
        pressed.nodes[1] = node("b", 0.95);
        nothing(&pressed);
        let mut back = calm.clone();
        back.recent = vec![("b".into(), "a".into())];
        nothing(&back);
        let mut held = calm.clone();
        held.threads[0].held = true;
        nothing(&held);
        // Of those that go for their pages one goes at a time: the one that waits for most
        // and can.
        let mut pages = calm.clone();
        for (tid, stands) in [(0, 0.3), (1, 0.7), (2, 0.9)] {
            pages.threads[tid].drawn = Some(Drawn {
                part: if tid == 2 { 2 } else { 1 },
                why: String::new(),
                stands,
            });
        }
        pages.nodes[2] = node("c", 0.95);
        assert_eq!(moves(&decide(&pages, &policy)), [(1, 1)]);
        // Before all of it is brought together, but not for ever.
        let mut losing = pages.clone();
        losing.waited_cores = 2.0;
        assert_eq!(moves(&decide(&losing, &policy)), [(1, 1)]);
        losing.losing = LOSING_MAX + 1;
        assert_eq!(decide(&losing, &policy)[0].grain, Grain::Gather);
        // Who is where it wants to be goes last.
        let mut level = scene(&["a", "b", "c"]);
        for tid in [0, 1, 2, 3] {
            level.threads[tid].drawn = Some(Drawn {
                part: 0,
                why: String::new(),
                stands: 0.0,
            });
        }
        let first: Vec<u32> = moves(&decide(&level, &policy))
            .into_iter()
            .map(|(tid, _)| tid)
            .take(2)
            .collect();
        assert_eq!(first, [4, 5]);
    }

    #[test]
    fn a_home_that_is_pressed_is_no_reason_to_come_back_to_it() {
        // As was seen: one thread of six away, which waits for pages of a node of half a
        // core that five others press; together they would have that half core alone.
        let mut spans = scene(&["a", "b", "c"]);
        spans.nodes[0] = node("a", 10.0);
        spans.nodes[0].side.capacity.cores = 0.5;
        for thread in &mut spans.threads {
            thread.ran = 0.1;
            thread.held = true;
        }
        spans.threads[5].part = 1;
        (spans.threads[5].cores, spans.threads[5].ran) = (0.24, 0.24);
        spans.waited_cores = 0.79;
        assert_eq!(decide(&spans, &Policy::default()), []);
    }

    #[test]
    fn more_parts_are_made_where_those_that_it_has_are_pressed_and_none_goes_back() {
        let policy = Policy::default();
        let mut two = scene(&["a", "b"]);
        for tid in 3..6 {
            two.threads[tid].part = 1;
        }
        two.nodes[0] = node("a", 3.0);
        two.nodes[1] = node("b", 3.0);
        let choices = decide(&two, &policy);
        let nodes: Vec<Name> = ["b", "c"].map(Name::from).to_vec();
        assert_eq!(choices[0].grain, Grain::Spread { nodes });
        // Before that a thread goes, if one can; but not back.
        two.nodes[1] = node("b", 1.5);
        assert_eq!(moves(&decide(&two, &policy)).len(), 1);
        two.recent = vec![("b".into(), "a".into())];
        let choices = decide(&two, &policy);
        assert!(
            matches!(choices[0].grain, Grain::Spread { .. }),
            "{choices:?}"
        );
        // No more than it may have.
        two.parts_max = 2;
        assert_eq!(decide(&two, &policy), []);
    }

    #[test]
    fn a_part_that_has_too_much_gives_to_those_with_room() {
        let policy = Policy::default();
        let mut full = scene(&["a", "b", "c"]);
        full.threads.clear();
        full.part_memory_bytes = Some(100 * MIB);
        full.parts = vec![part(0, "a", 200), part(1, "b", 60), part(2, "c", 5)];
        let given = |scene: &Scene| -> Vec<(u32, u64)> {
            let choices = decide(scene, &policy);
            let given = choices.iter().map(|it| match &it.grain {
                Grain::Objects {
                    from_part,
                    part,
                    bytes,
                    ..
                } => {
                    assert_eq!(*from_part, 0);
                    (*part, bytes / MIB)
                }
                other => panic!("{other:?}"),
            });
            given.collect()
        };
        // 110 go: as much as there is room, where most is first.
        assert_eq!(given(&full), [(2, 85), (1, 25)]);
        // What it keeps by itself is let be while nothing more comes.
        full.parts[0].memory_bytes = Some(98 * MIB);
        assert_eq!(given(&full), []);
        full.parts[0].overflows = true;
        assert_eq!(given(&full), [(2, 8)]);
        full.parts[0] = part(0, "a", 200);
        // A node that is short of memory takes none, and one that is gives.
        full.nodes[2].side.memory_free_bytes = 60 * MIB;
        assert_eq!(given(&full), [(1, 30)]);
        full.part_memory_bytes = None;
        full.nodes[0].side.memory_free_bytes = 20 * MIB;
        assert_eq!(given(&full), [(1, 30)]);
        // (50 are kept free of 1,000.)
        full.nodes[0].side.memory_free_bytes = 51 * MIB;
        assert_eq!(given(&full), []);
    }

    #[test]
    fn a_machine_with_more_memory_than_a_part_keeps_gets_parts() {
        let mut large = scene(&["a"]);
        large.nodes[0] = node("a", 0.2);
        large.parts = vec![part(0, "a", 200)];
        large.part_memory_bytes = Some(100 * MIB);
        let choices = decide(&large, &Policy::default());
        assert!(matches!(choices[0].grain, Grain::Spread { .. }));
        assert!(choices[0].why.contains("200.0 MiB"), "{}", choices[0].why);
    }

    #[test]
    fn the_coldest_go_first_and_no_more_than_is_wanted() {
        let object = |start: u64, bytes: u64, heat: f64| Object {
            memory: 0,
            start,
            bytes,
            is_idle: false,
            heat,
        };
        let all = [
            object(0, 4 * PAGE, 3.0),
            object(1 << 20, 2 * PAGE, 0.0),
            object(2 << 20, 8 * PAGE, 0.0),
        ];
        let taken = coldest(&all, 9 * PAGE + 7);
        let taken: Vec<_> = taken.iter().map(|it| (it.start >> 20, it.bytes)).collect();
        assert_eq!(taken, [(2, 8 * PAGE), (1, PAGE)]);
        assert_eq!(coldest(&all, PAGE - 1), []);
        assert_eq!(coldest(&all, u64::MAX).len(), 3);
        // Before what nobody waits for, as it is used here all the time, goes what is not.
        let mut idle = object(3 << 20, PAGE, 0.5);
        idle.is_idle = true;
        let with = [all.to_vec(), vec![idle]].concat();
        let taken = coldest(&with, 3 * PAGE);
        let taken: Vec<_> = taken.iter().map(|it| (it.start >> 20, it.bytes)).collect();
        assert_eq!(taken, [(3, PAGE), (2, 2 * PAGE)]);
        // Crumbs that nobody uses do not keep what is enough from going.
        let mut many: Vec<Object> = (10..200).map(|at| object(at << 20, PAGE, 0.0)).collect();
        many.iter_mut().for_each(|it| it.is_idle = true);
        many.push(object(500 << 20, 4096 * PAGE, 0.1));
        many.push(object(600 << 20, 2048 * PAGE, 0.0));
        let taken = coldest(&many, 3000 * PAGE);
        let bytes: Vec<u64> = taken.iter().map(|it| it.bytes / PAGE).collect();
        // (Those of no heat go first, of which so many are let in as are moved at once.)
        assert_eq!(bytes[0], 2048);
        assert_eq!(taken.len(), OBJECTS_AT_ONCE);
        // What is left of it is filled with them, where they are enough.
        many[0].bytes = 2990 * PAGE;
        let taken = coldest(&many, 3000 * PAGE);
        let bytes: Vec<u64> = taken.iter().map(|it| it.bytes / PAGE).collect();
        assert_eq!(bytes[0], 2990);
        assert!(bytes[1..] == [1; 10], "{bytes:?}");
    }
}
