//! From any initial state, with every seed, rounds converge within a stated bound: no admissible
//! move is left, and nothing moves any more.

use keel_balance::load::Capacity;
use keel_balance::policy::Policy;
use keel_sim::curve::Curve;
use keel_sim::world::{MachineSpec, Network, NodeSpec, Settings, World};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Seeds of one run; `EVENKEEL_SEEDS=N` for more, `EVENKEEL_SEED=N` for one.
const SEEDS: u64 = 10_000;

fn seeds(usual: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|it| it.parse().ok());
    if let Some(seed) = number("EVENKEEL_SEED") {
        return seed..seed + 1;
    }
    0..number("EVENKEEL_SEEDS").unwrap_or(usual)
}

/// Runs the check with each seed, on two threads; a failure is printed with the command that
/// repeats it.
fn each_seed(test: &str, seeds: std::ops::Range<u64>, check: impl Fn(u64) + Sync) {
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let end = seeds.end;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(seed)));
                    if let Err(panic) = told {
                        eprintln!(
                            "seed {seed}: EVENKEEL_SEED={seed} cargo test --release -p keel-sim {test}"
                        );
                        std::panic::resume_unwind(panic);
                    }
                }
            });
        }
    });
}

/// A random cluster: heterogeneous nodes, machines anywhere (mostly on few nodes), a network with
/// loss, delay and duplication.
fn random_world(seed: u64) -> (World, Policy, usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let node_count = rng.random_range(2..=10usize);
    let nodes: Vec<NodeSpec> = (0..node_count)
        .map(|number| NodeSpec {
            name: format!("n{number}").into(),
            capacity: Capacity {
                cores: [0.5, 1.0, 2.0, 4.0, 8.0][rng.random_range(0..5)],
                speed: [0.5, 1.0, 1.0, 2.0][rng.random_range(0..4)],
                memory_bytes: 64 << 30,
                io_bytes_per_s: 1e9,
            },
            there: true,
        })
        .collect();
    let crowded = rng.random_range(1..=node_count);
    let machines: Vec<MachineSpec> = (0..rng.random_range(0..=8 * node_count))
        .map(|number| MachineSpec {
            name: format!("m{number}").into(),
            node: rng.random_range(0..crowded),
            curve: Curve::Steady {
                cores: [0.05, 0.3, 1.0, 1.0, 2.0][rng.random_range(0..5)],
            },
            burns: rng.random_bool(0.5),
            memory_bytes: rng.random_range(1..512u64) << 20,
            dirty_bytes_per_s: rng.random_range(0.0..100e6),
            io_bytes_per_s: 0.0,
            runs: true,
            balanced: true,
        })
        .collect();
    let rough = rng.random_bool(0.5);
    let network = Network {
        delay_ms: if rough { (1, 900) } else { (1, 3) },
        lost: if rough { 0.1 } else { 0.0 },
        doubled: if rough { 0.1 } else { 0.0 },
        moves_failed: if rough { 0.1 } else { 0.0 },
        ..Network::default()
    };
    let policy = Policy {
        hold_ms: 5_000,
        cool_down_ms: 20_000,
        ..Policy::default()
    };
    let settings = Settings {
        seed,
        network,
        policy: policy.clone(),
        failover_ms: None,
        rules: keel_sim::world::Rulebook::default(),
    };
    (World::new(settings, &nodes, &machines), policy, node_count)
}

/// Seconds within which a cluster of `nodes` converges that has `moves` to make.
///
/// While a move is admissible, some node would make it with some other one; that node
/// asks once a second or so, and picks the other one with a chance of 1 in
/// `nodes - 1`; half of its rounds may find the other one busy or lose a message. So a
/// move comes within `2 (nodes - 1)` rounds on average, and within `-ln p` times that
/// with a chance of all but `p`: 20 times leave 2 in 10^9. Failed moves and hold times
/// add their own seconds.
fn bound_s(nodes: usize, moves: usize, failed: u64) -> u64 {
    let pairs = 2 * (nodes as u64 - 1);
    let sum_of_waits = pairs * (moves as u64 + failed) * 3;
    120 + 20 * pairs + sum_of_waits + failed * 60
}

#[test]
fn it_converges_from_any_start() {
    each_seed("it_converges_from_any_start", seeds(SEEDS), |seed| {
        let (mut world, policy, nodes) = random_world(seed);
        let before = world.sum_of_squares();
        let mut quiet_since_s = 0;
        let mut moves = 0;
        loop {
            world.run_until(world.now_ms() + 1000);
            let now_s = world.now_ms() / 1000;
            let busy = world.moving() > 0 || world.admissible().is_some();
            if world.moves().len() != moves || busy {
                (quiet_since_s, moves) = (now_s, world.moves().len());
            }
            // Longer than any state but backoffs is remembered.
            if now_s - quiet_since_s > 40 {
                break;
            }
            let constraint = bound_s(nodes, moves, world.failed());
            if now_s > constraint {
                for made in world.decisions() {
                    eprintln!("{} n{} {}", made.at_ms, made.node, made.decision);
                }
            }
            assert!(
                quiet_since_s <= constraint,
                "{nodes} nodes, {moves} moves, {} failed: not level after {now_s} s: {:?}; {:?}",
                world.failed(),
                world.admissible(),
                world.loads()
            );
        }
        // Each move decreased the sum by at least the minimum: hence the convergence.
        let most = before / policy.gain_min;
        assert!(moves as f64 <= most, "{moves} moves from {before}");
        assert!(world.sum_of_squares() <= before + 1e-9);
        assert_eq!(world.moves().len(), moves);
    });
}

#[test]
fn no_machine_goes_back_within_its_cool_down() {
    let seeds = seeds(SEEDS / 5);
    each_seed("no_machine_goes_back_within_its_cool_down", seeds, |seed| {
        let (mut world, policy, _) = random_world(seed);
        world.run_until(120_000);
        for (number, there) in world.moves().iter().enumerate() {
            let back = world.moves()[number + 1..].iter().find(|back| {
                back.machine == there.machine
                    && back.target == there.source
                    && back.source == there.target
            });
            if let Some(back) = back {
                assert!(
                    back.at_ms - there.at_ms >= policy.cool_down_ms,
                    "{there:?} {back:?}"
                );
            }
        }
    });
}
