//! Gossip of whole clusters with simulated time and network, by seeds. The rules are those of
//! SWIM and of `gossip`'s contract, not of the code:
//!
//! - a node that runs and is heard is never down for long, whatever is lost on the way;
//! - a node that does not answer is down for all in a bounded time;
//! - a node that comes back, by a pause, a restart or a network that is whole again, is alive for
//!   all in a bounded time;
//! - the newest load of each node is known to all in a bounded time, and none older after it.

use keel_cluster::NodeName;
use keel_cluster::gossip::{Event, Gossip, Liveness, Load, Outgoing, Start};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

const SEEDS: u64 = 40;
/// Names the only seed that is to run.
const SEED: &str = "KEEL_SIM_SEED";

/// The seeds of a test. When one fails, it says how to run that one again.
struct Seeds {
    left: std::ops::Range<u64>,
    last: u64,
}

impl Seeds {
    fn first(count: u64) -> Self {
        let only = std::env::var(SEED).ok();
        let only = only.map(|it| it.parse::<u64>().expect("a seed"));
        let left = only.map_or(0..count, |seed| seed..seed + 1);
        Seeds { left, last: 0 }
    }
}

impl Iterator for Seeds {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.last = self.left.next()?;
        Some(self.last)
    }
}

impl Drop for Seeds {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let thread = std::thread::current();
            println!(
                "again: {SEED}={} cargo test -p keel-cluster --test gossip_simulation {}",
                self.last,
                thread.name().unwrap_or_default()
            );
        }
    }
}

/// Which datagrams between two nodes are lost, besides those lost by chance.
type Cut = Box<dyn Fn(usize, usize) -> bool>;

enum What {
    Wake(usize),
    Arrive { to: usize, content: Vec<u8> },
}

/// A cluster in simulated time.
struct World {
    now: Duration,
    nodes: Vec<Option<Gossip>>,
    /// Nodes that run, and do nothing.
    paused: BTreeSet<usize>,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    events: std::collections::HashMap<u64, What>,
    scheduled: u64,
    rng: StdRng,
    seed: u64,
    /// Share of datagrams that are lost, and the delay of the others.
    loss: f64,
    delay_ms: std::ops::Range<u64>,
    cut: Cut,
    sent: u64,
    bytes: u64,
    look_every: Duration,
}

fn name(index: usize) -> NodeName {
    format!("n{index}").parse().expect("a name")
}

fn index(node: &NodeName) -> usize {
    node.as_str()[1..].parse().expect("a number")
}

fn load(load: f32) -> Load {
    Load {
        load,
        memory_free_bytes: 1 << 30,
        is_pressed: false,
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

impl World {
    fn new(nodes: usize, seed: u64) -> Self {
        let mut world = World {
            now: Duration::ZERO,
            nodes: (0..nodes).map(|_| None).collect(),
            paused: BTreeSet::new(),
            queue: BinaryHeap::new(),
            events: std::collections::HashMap::new(),
            scheduled: 0,
            rng: StdRng::seed_from_u64(seed),
            seed,
            loss: 0.0,
            delay_ms: 0..2,
            cut: Box::new(|_, _| false),
            sent: 0,
            bytes: 0,
            look_every: Duration::from_millis(50),
        };
        for node in 0..nodes {
            world.start(node, 1 + node as u64);
        }
        world
    }

    fn members(&self) -> BTreeSet<NodeName> {
        (0..self.nodes.len()).map(name).collect()
    }

    /// Starts a node's agent, or starts it anew.
    fn start(&mut self, node: usize, revision: u64) {
        let start = Start {
            incarnation: 1,
            revision,
        };
        let seed = self.rng.random();
        self.nodes[node] = Some(Gossip::new(name(node), start, seed));
        let members = self.members();
        self.step(node, Event::Members(members));
    }

    fn schedule(&mut self, at: Duration, what: What) {
        self.scheduled += 1;
        self.events.insert(self.scheduled, what);
        self.queue.push(Reverse((at, self.scheduled)));
    }

    fn step(&mut self, node: usize, event: Event<'_>) {
        let Some(gossip) = &mut self.nodes[node] else {
            return;
        };
        let sent = gossip.step(event, self.now);
        let wake = gossip.wake_at();
        for Outgoing { to, content } in sent {
            self.send(node, index(&to), content);
        }
        self.schedule(wake.max(self.now), What::Wake(node));
    }

    fn send(&mut self, from: usize, to: usize, content: Vec<u8>) {
        self.sent += 1;
        self.bytes += content.len() as u64;
        if (self.cut)(from, to) || self.rng.random_bool(self.loss) {
            return;
        }
        let delay = Duration::from_millis(self.rng.random_range(self.delay_ms.clone()))
            + Duration::from_micros(self.rng.random_range(50..1000));
        self.schedule(self.now + delay, What::Arrive { to, content });
    }

    /// Lets this much time pass.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        self.run_until(end, |_| false);
    }

    /// Lets time pass until something holds, looked at every [`World::look_every`]; when it did, if
    /// it did.
    fn until(&mut self, limit: Duration, holds: impl Fn(&World) -> bool) -> Option<Duration> {
        let (begin, end) = (self.now, self.now + limit);
        self.run_until(end, &holds).then(|| self.now - begin)
    }

    fn run_until(&mut self, end: Duration, holds: impl Fn(&World) -> bool) -> bool {
        let mut look_at = self.now;
        while let Some(Reverse((at, number))) = self.queue.pop() {
            if at > end {
                self.queue.push(Reverse((at, number)));
                break;
            }
            if at >= look_at {
                look_at = at + self.look_every;
                if holds(self) {
                    self.queue.push(Reverse((at, number)));
                    return true;
                }
            }
            self.now = at;
            let what = self.events.remove(&number).expect("it is scheduled");
            let node = match &what {
                What::Wake(node) => *node,
                What::Arrive { to, .. } => *to,
            };
            if self.paused.contains(&node) {
                continue;
            }
            match what {
                What::Wake(node) => {
                    // Others may have been scheduled since.
                    let is_due = |gossip: &Gossip| gossip.wake_at() <= self.now;
                    if self.nodes[node].as_ref().is_some_and(is_due) {
                        self.step(node, Event::Tick);
                    }
                }
                What::Arrive { to, content } => self.step(to, Event::Received(&content)),
            }
        }
        self.now = end;
        holds(self)
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node] = None;
    }

    fn resume(&mut self, node: usize) {
        self.paused.remove(&node);
        self.step(node, Event::Tick);
    }

    fn sees(&self, node: usize, other: usize) -> Option<Liveness> {
        let gossip = self.nodes[node].as_ref().expect("it runs");
        let seen = gossip.liveness().get(&name(other)).copied();
        let is_silent = seen.is_some_and(|seen| seen != Liveness::Alive);
        assert_eq!(gossip.silent().contains(&name(other)), is_silent);
        seen
    }

    fn running(&self) -> Vec<usize> {
        let running = (0..self.nodes.len()).filter(|it| self.nodes[*it].is_some());
        running.filter(|it| !self.paused.contains(it)).collect()
    }

    /// Whether all running nodes see `other` in this way.
    fn all_see(&self, other: usize, liveness: Liveness) -> bool {
        let mut others = self.running().into_iter().filter(|it| *it != other);
        others.all(|node| self.sees(node, other) == Some(liveness))
    }

    /// Whether all running nodes see each other alive.
    fn is_whole(&self) -> bool {
        let running = self.running();
        let names: Vec<NodeName> = running.iter().map(|it| name(*it)).collect();
        let sees_all = |node: &usize| {
            let seen = self.nodes[*node].as_ref().expect("it runs").liveness();
            let mut others = names.iter().filter(|it| index(it) != *node);
            others.all(|other| seen.get(other) == Some(&Liveness::Alive))
        };
        running.iter().all(sees_all)
    }

    /// A running node that another one sees down: the other one, and it.
    fn is_down_anywhere(&self) -> Option<(usize, usize)> {
        let running = self.running();
        running.iter().find_map(|node| {
            let seen = self.nodes[*node].as_ref().expect("it runs").liveness();
            let mut down = seen.iter().filter(|(_, seen)| **seen == Liveness::Down);
            let down = down.find(|(other, _)| running.contains(&index(other)));
            Some((*node, index(down?.0)))
        })
    }

    /// How often nodes had to begin anew, because others took them to be down.
    fn renewals(&self) -> u32 {
        self.nodes.iter().flatten().map(Gossip::renewals).sum()
    }

    fn form(&mut self) {
        let seed = self.seed;
        let formed = self.until(seconds(60), World::is_whole);
        assert!(
            formed.is_some(),
            "seed {seed}: {} nodes do not find each other",
            self.nodes.len()
        );
    }
}

/// The longest time in which all see that a node does not answer: each node is probed once in
/// every two turns through all members, then the suspicion stands, then everybody hears of it.
fn detection_max(nodes: usize) -> Duration {
    let suspicion = 4.0 * (nodes as f64).log10().max(1.0);
    seconds(2 * nodes as u64 + 10) + Duration::from_secs_f64(suspicion)
}

#[test]
fn a_cluster_without_faults_suspects_nobody() {
    for seed in Seeds::first(SEEDS) {
        let mut world = World::new(3 + (seed as usize % 20), seed);
        world.delay_ms = 0..1 + seed * 4 % 120;
        world.form();
        for _ in 0..60 {
            world.run(seconds(1));
            assert!(world.is_whole(), "seed {seed}");
        }
    }
}

#[test]
fn whoever_does_not_answer_is_down_for_all_and_comes_back() {
    for seed in Seeds::first(SEEDS) {
        let nodes = 3 + (seed as usize % 20);
        let mut world = World::new(nodes, seed);
        world.loss = seed as f64 % 4.0 * 0.02;
        world.form();
        let node = world.rng.random_range(0..nodes);
        let is_paused = seed % 2 == 0;
        if is_paused {
            world.paused.insert(node);
        } else {
            world.kill(node);
        }
        let down = world.until(detection_max(nodes), |world| {
            world.all_see(node, Liveness::Down)
        });
        assert!(
            down.is_some(),
            "seed {seed}: {node} of {nodes} is not seen to be gone"
        );
        let away = world.rng.random_range(0..100);
        world.run(seconds(away));
        if is_paused {
            world.resume(node);
        } else {
            world.start(node, 1000);
        }
        let back = world.until(seconds(60), World::is_whole);
        assert!(
            back.is_some(),
            "seed {seed}: {node} of {nodes} is not seen to be back"
        );
    }
}

#[test]
fn lost_datagrams_bring_nobody_down() {
    let mut suspicions = 0;
    for seed in Seeds::first(SEEDS) {
        let mut world = World::new(4 + (seed as usize % 20), seed);
        world.form();
        world.loss = 0.1;
        for _ in 0..120 {
            world.run(seconds(1));
            assert_eq!(world.is_down_anywhere(), None, "seed {seed}");
            suspicions += usize::from(!world.is_whole());
        }
        assert_eq!(
            world.renewals(),
            0,
            "seed {seed}: somebody was told that it is down"
        );
    }
    println!(
        "with a tenth lost, somebody was suspected in {suspicions} of {} looks",
        SEEDS * 120
    );
}

/// One node hears another no more, and the others do: they tell it.
#[test]
fn a_broken_path_between_two_nodes_brings_none_of_them_down() {
    for seed in Seeds::first(SEEDS) {
        let nodes = 4 + (seed as usize % 20);
        let mut world = World::new(nodes, seed);
        world.form();
        let is_one_way = seed % 2 == 0;
        world.cut =
            Box::new(move |from, to| (from, to) == (0, 1) || !is_one_way && (from, to) == (1, 0));
        for _ in 0..60 {
            world.run(seconds(1));
            assert_eq!(world.is_down_anywhere(), None, "seed {seed}");
        }
    }
}

#[test]
fn halves_that_were_apart_find_each_other() {
    for seed in Seeds::first(SEEDS) {
        let nodes = 4 + (seed as usize % 20);
        let mut world = World::new(nodes, seed);
        world.form();
        let half = world.rng.random_range(1..nodes);
        world.cut = Box::new(move |from, to| (from < half) != (to < half));
        world.run(detection_max(nodes) + seconds(30));
        for node in 0..nodes {
            for other in (0..nodes).filter(|it| *it != node) {
                let together = (node < half) == (other < half);
                let expected = if together {
                    Liveness::Alive
                } else {
                    Liveness::Down
                };
                assert_eq!(world.sees(node, other), Some(expected), "seed {seed}");
            }
        }
        world.cut = Box::new(|_, _| false);
        let whole = world.until(seconds(90), World::is_whole);
        assert!(whole.is_some(), "seed {seed}: {half} of {nodes} stay apart");
    }
}

/// Too short for all to notice, and long enough for some: whoever is accused afterwards for what it
/// did not hear then has to be cleared.
#[test]
fn nobody_stays_accused_after_a_short_isolation() {
    for seed in Seeds::first(4 * SEEDS) {
        let nodes = 2 + (seed as usize % 10);
        let mut world = World::new(nodes, seed);
        world.form();
        world.cut = Box::new(|from, to| (from == 0) != (to == 0));
        world.run(Duration::from_millis(1000 + seed * 77 % 12_000));
        world.cut = Box::new(|_, _| false);
        let whole = world.until(seconds(60), World::is_whole);
        assert!(whole.is_some(), "seed {seed}: {nodes} nodes");
        world.run(seconds(30));
        assert!(world.is_whole(), "seed {seed}: {nodes} nodes");
    }
}

/// What one node knows of another by gossip alone is not undone by a node whose list is older.
#[test]
fn a_list_of_members_that_is_behind_accuses_nobody() {
    for seed in Seeds::first(SEEDS) {
        let nodes = 4 + (seed as usize % 10);
        let mut world = World::new(nodes, seed);
        world.form();
        let mut behind = world.members();
        behind.remove(&name(nodes - 1));
        // It knows the others by the store, and the last one by gossip.
        let start = Start {
            incarnation: 1,
            revision: 500,
        };
        world.nodes[0] = Some(Gossip::new(name(0), start, seed));
        world.step(0, Event::Members(behind.clone()));
        world.run(seconds(20));
        behind.remove(&name(nodes - 2));
        world.step(0, Event::Members(behind));
        for _ in 0..50 {
            world.run(Duration::from_millis(100));
            for node in 1..nodes - 2 {
                let seen = world.sees(node, nodes - 1);
                assert_eq!(seen, Some(Liveness::Alive), "seed {seed}");
            }
        }
        let last = world.nodes[nodes - 1].as_ref().expect("it runs");
        assert_eq!(last.renewals(), 0, "seed {seed}");
    }
}

#[test]
fn whoever_stops_in_order_is_down_at_once() {
    for seed in Seeds::first(SEEDS) {
        let nodes = 3 + (seed as usize % 20);
        let mut world = World::new(nodes, seed);
        world.form();
        world.step(0, Event::Stop);
        world.kill(0);
        let down = world.until(seconds(6), |world| world.all_see(0, Liveness::Down));
        assert!(down.is_some(), "seed {seed}: others wait for it");
    }
}

#[test]
fn nodes_that_were_removed_are_forgotten_and_those_that_were_added_found() {
    for seed in Seeds::first(SEEDS) {
        let nodes = 4 + (seed as usize % 20);
        let mut world = World::new(nodes, seed);
        world.form();
        world.kill(0);
        let mut members = world.members();
        members.remove(&name(0));
        // The store tells everybody, at different times.
        for node in 1..nodes {
            world.run(Duration::from_millis(200));
            world.step(node, Event::Members(members.clone()));
            assert_eq!(world.sees(node, 0), None, "seed {seed}");
        }
        world.run(seconds(20));
        for node in 1..nodes {
            assert_eq!(world.sees(node, 0), None, "seed {seed}");
        }
        assert_eq!(world.is_down_anywhere(), None, "seed {seed}");
        // It joins again.
        world.start(0, 2000);
        for node in 1..nodes {
            let members = world.members();
            world.step(node, Event::Members(members));
        }
        world.form();
    }
}

#[test]
fn all_know_the_newest_load_of_each() {
    for seed in Seeds::first(SEEDS) {
        let nodes = 3 + (seed as usize % 20);
        let mut world = World::new(nodes, seed);
        world.loss = seed as f64 % 4.0 * 0.02;
        world.form();
        let mut told = vec![0.0; nodes];
        for turn in 1..40 {
            for (node, told) in told.iter_mut().enumerate() {
                // Some change now and then, as loads do.
                if (turn + node) % 3 == 0 {
                    *told = (turn * 10 + node) as f32;
                }
                world.step(node, Event::Measured(load(*told)));
            }
            world.run(seconds(1));
        }
        for (node, told) in told.iter().enumerate() {
            world.run(seconds(3));
            world.step(node, Event::Measured(load(*told)));
        }
        let known = world.until(seconds(40), |world| {
            world.nodes.iter().flatten().all(|gossip| {
                let heard = gossip.loads();
                (0..nodes).all(|node| {
                    heard
                        .get(&name(node))
                        .is_some_and(|it| it.load.load == told[node])
                })
            })
        });
        assert!(known.is_some(), "seed {seed}: {nodes} nodes");
    }
}

/// The same seed gives the same run.
#[test]
fn a_run_is_decided_by_its_seed() {
    let run = |seed| {
        let mut world = World::new(10, seed);
        world.loss = 0.1;
        world.run(seconds(60));
        (world.sent, world.bytes)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

/// What a cluster of a thousand costs each of its nodes, and how soon a failure is seen. Loads of
/// a tenth of the nodes change each second.
#[test]
fn a_thousand_nodes_in_figures() {
    let nodes = 1000;
    let mut world = World::new(nodes, 1);
    world.look_every = seconds(1);
    let begun = std::time::Instant::now();
    let formed = world
        .until(seconds(120), World::is_whole)
        .expect("it forms");
    println!("in {:.1} s of real time:", begun.elapsed().as_secs_f64());
    println!(
        "{nodes} nodes found each other in {:.1} s",
        formed.as_secs_f64()
    );
    let measure = |world: &mut World, turns: u64| {
        let (sent, bytes) = (world.sent, world.bytes);
        for turn in 0..turns {
            for node in world.running() {
                let changes = (node as u64 + turn).is_multiple_of(10);
                let value = if changes {
                    turn as f32
                } else {
                    (turn / 10 * 10) as f32
                };
                world.step(node, Event::Measured(load(value)));
            }
            world.run(seconds(1));
        }
        let each = (turns * nodes as u64) as f64;
        (
            (world.sent - sent) as f64 / each,
            (world.bytes - bytes) as f64 / each,
        )
    };
    let (messages, bytes) = measure(&mut world, 30);
    println!("each sends {messages:.1} datagrams and {bytes:.0} bytes a second");
    assert_eq!(world.is_down_anywhere(), None);
    world.kill(500);
    world.look_every = Duration::from_millis(200);
    let seen = |liveness| {
        move |world: &World| {
            let running = world.running();
            running
                .iter()
                .any(|node| world.sees(*node, 500) == Some(liveness))
        }
    };
    let suspected = world
        .until(seconds(60), seen(Liveness::Suspected))
        .expect("suspected");
    let first = world
        .until(seconds(60), seen(Liveness::Down))
        .expect("down");
    let all = world.until(seconds(60), |world| world.all_see(500, Liveness::Down));
    let all = all.expect("down for all");
    let sum = |times: &[Duration]| times.iter().sum::<Duration>().as_secs_f64();
    println!(
        "a node that fails is suspected after {:.1} s, down after {:.1} s, for all after {:.1} s",
        sum(&[suspected]),
        sum(&[suspected, first]),
        sum(&[suspected, first, all]),
    );
    println!("simulated in {:.1} s", begun.elapsed().as_secs_f64());
}
