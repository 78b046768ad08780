//! Reasons why users disable balancers: oscillating machines, useless moves, and trust in invalid
//! numbers.

use keel_balance::load::Capacity;
use keel_balance::policy::{Policy, Strategy};
use keel_sim::curve::Curve;
use keel_sim::run::returns;
use keel_sim::world::{
    ExternalEvent, InvalidReport, MachineSpec, Network, NodeSpec, Settings, World,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const MIB: u64 = 1 << 20;

fn node(number: usize, cores: f64) -> NodeSpec {
    NodeSpec {
        name: format!("n{number}").into(),
        capacity: Capacity {
            cores,
            speed: 1.0,
            memory_bytes: 16_384 * MIB,
            io_bytes_per_s: 5e8,
        },
        there: true,
    }
}

fn machine(number: usize, on: usize, curve: Curve, memory_bytes: u64) -> MachineSpec {
    MachineSpec {
        name: format!("m{number}").into(),
        node: on,
        curve,
        burns: true,
        memory_bytes,
        dirty_bytes_per_s: 0.0,
        io_bytes_per_s: 0.0,
        runs: true,
        balanced: true,
    }
}

fn settings(seed: u64, policy: Policy) -> Settings {
    Settings {
        seed,
        network: Network::default(),
        policy,
        failover_ms: None,
        rules: keel_sim::world::Rulebook::default(),
    }
}

fn steady(cores: f64) -> Curve {
    Curve::Steady { cores }
}

/// A curve of one of the kinds that make balancers oscillate.
fn restless(kind: u64, rng: &mut SmallRng) -> Curve {
    let (least, most) = (rng.random_range(0.0..0.4), rng.random_range(0.6..2.0));
    let ahead_s = rng.random_range(0.0..600.0);
    match kind % 5 {
        0 => Curve::Step {
            before: least,
            after: most,
            at_s: rng.random_range(30.0..900.0),
        },
        1 => Curve::Sawtooth {
            least,
            most,
            period_s: rng.random_range(20.0..600.0),
            ahead_s,
        },
        2 => Curve::Bursts {
            quiet: least,
            burst: most,
            share: rng.random_range(0.1..0.6),
            length_s: rng.random_range(2.0..120.0),
            seed: rng.random(),
        },
        3 => Curve::Wave {
            least,
            most,
            period_s: rng.random_range(200.0..1800.0),
            ahead_s,
        },
        _ => Curve::Noise {
            mean: most,
            spread: most - least,
            seed: rng.random(),
        },
    }
}

/// 100 runs, 20 of each kind of curve, half of them packing.
#[test]
fn nothing_goes_to_and_fro() {
    let (mut moves, mut moving_runs) = (0, 0);
    for run in 0..100u64 {
        let mut rng = SmallRng::seed_from_u64(run);
        let strategy = match run / 5 % 3 {
            0 => Strategy::Level,
            1 => Strategy::Pack,
            _ => Strategy::Spread,
        };
        let policy = Policy {
            strategy,
            ..Policy::default()
        };
        let nodes: Vec<NodeSpec> = (0..4).map(|number| node(number, 2.0)).collect();
        let machines: Vec<MachineSpec> = (0..16)
            .map(|number| {
                let curve = restless(run, &mut rng);
                machine(number, rng.random_range(0..4), curve, 64 * MIB)
            })
            .collect();
        let mut world = World::new(settings(run, policy.clone()), &nodes, &machines);
        world.discard_decisions();
        world.run_until(1_800_000);
        assert_eq!(returns(&world), 0, "run {run}");
        // Nor over a third node: a machine stays for its minimum time wherever it is.
        for (number, it) in world.moves().iter().enumerate() {
            let next = world.moves()[number + 1..]
                .iter()
                .find(|next| next.machine == it.machine);
            if let Some(next) = next {
                assert!(
                    next.at_ms - it.at_ms >= policy.hold_ms,
                    "run {run}: {it:?} {next:?}"
                );
            }
        }
        moves += world.moves().len();
        moving_runs += usize::from(!world.moves().is_empty());
    }
    // Moves were possible.
    assert!(
        moves > 100 && moving_runs > 50,
        "{moves} moves in {moving_runs} runs"
    );
}

#[test]
fn nothing_moves_in_a_level_cluster_in_a_week() {
    let week_ms = 7 * 86_400_000;
    for (strategy, demand) in [(Strategy::Level, 1.9), (Strategy::Spread, 0.8)] {
        let policy = Policy {
            strategy,
            // A week at one sample a second is many; every fifth shows the same.
            sample_ms: 5_000,
            interval_ms: 5_000,
            ..Policy::default()
        };
        let nodes: Vec<NodeSpec> = (0..4).map(|number| node(number, 4.0)).collect();
        let machines: Vec<MachineSpec> = (0..8)
            .map(|number| {
                let curve = Curve::Noise {
                    mean: demand,
                    spread: 0.05,
                    seed: number as u64,
                };
                machine(number, number % 4, curve, 64 * MIB)
            })
            .collect();
        let mut world = World::new(settings(1, policy), &nodes, &machines);
        world.discard_decisions();
        world.run_until(week_ms);
        assert_eq!(world.moves(), [], "{strategy:?}");
        assert!(world.rounds() > 300_000);
    }
}

/// A target that fails during a move: the machine stays, and the balancer neither retries the
/// failed node continuously nor moves everything to the other one.
#[test]
fn it_does_not_pile_on_when_a_target_dies() {
    let nodes: Vec<NodeSpec> = (0..3).map(|number| node(number, 4.0)).collect();
    // Moves take ten seconds: 8 GiB.
    let machines: Vec<MachineSpec> = (0..2)
        .map(|number| machine(number, 0, steady(3.0), 7_400 * MIB))
        .collect();
    let mut world = World::new(settings(5, Policy::default()), &nodes, &machines);
    while world.moving() == 0 {
        let next_ms = world.now_ms() + 100;
        world.run_until(next_ms);
        assert!(next_ms < 60_000, "nothing moves");
    }
    let started_ms = world.now_ms();
    world.schedule(started_ms + 1_000, ExternalEvent::NodeFails(1));
    world.schedule(started_ms + 1_000, ExternalEvent::NodeFails(2));
    world.run_until(started_ms + 30_000);
    assert_eq!((world.failed(), world.moves().len()), (1, 0));
    assert_eq!(world.machines_of(0).len(), 2);
    // They come back: after a while one of them gets one machine, once.
    let back_ms = world.now_ms() + 1_000;
    world.schedule(back_ms, ExternalEvent::NodeStarts(1));
    world.schedule(back_ms, ExternalEvent::NodeStarts(2));
    world.run_until(back_ms + 300_000);
    assert_eq!((world.failed(), world.moves().len()), (1, 1));
    let moved = &world.moves()[0];
    // A failed machine is left alone for some time.
    assert!(moved.at_ms - started_ms > 15_000, "{moved:?}");
}

#[test]
fn where_all_nodes_are_full_nothing_moves_and_somebody_is_told() {
    let nodes: Vec<NodeSpec> = (0..3).map(|number| node(number, 2.0)).collect();
    let memory_full = 7_900 * MIB;
    // The memory of all nodes is full: the pressing machines fit nowhere else.
    let mut machines: Vec<MachineSpec> = (0..6)
        .map(|number| machine(number, number / 2, steady(0.2), memory_full))
        .collect();
    machines[0].curve = steady(3.0);
    let mut world = World::new(settings(9, Policy::default()), &nodes, &machines);
    world.run_until(600_000);
    assert_eq!(world.moves(), []);
    assert_eq!(world.alerts().len(), 1, "{:?}", world.alerts());
    assert_eq!(world.alerts()[0].1, 0);
}

#[test]
fn clocks_that_jump_stop_nobody() {
    for by_ms in [-86_400_000i64, -5_000, 5_000, 3_600_000, 86_400_000] {
        let nodes: Vec<NodeSpec> = (0..3).map(|number| node(number, 4.0)).collect();
        let machines: Vec<MachineSpec> = (0..12)
            .map(|number| machine(number, 0, steady(1.0), 64 * MIB))
            .collect();
        let mut world = World::new(settings(3, Policy::default()), &nodes, &machines);
        // Before, while and after it decides.
        for (node, at_ms) in [(0, 2_000), (1, 5_100), (2, 5_400), (0, 5_700)] {
            world.schedule(at_ms, ExternalEvent::ClockJumps { node, by_ms });
        }
        world.run_until(120_000);
        let loads = world.loads();
        assert!(
            loads.iter().all(|it| (it - 1.0).abs() < 0.02),
            "{by_ms}: {loads:?}"
        );
        assert_eq!(returns(&world), 0);
        assert!(world.moves().len() <= 9, "{by_ms}: {}", world.moves().len());
    }
}

#[test]
fn late_and_doubled_answers_change_nothing_but_time() {
    let nodes: Vec<NodeSpec> = (0..3).map(|number| node(number, 4.0)).collect();
    let machines: Vec<MachineSpec> = (0..12)
        .map(|number| machine(number, 0, steady(1.0), 64 * MIB))
        .collect();
    // Later than the response timeout, just in time, and duplicated.
    for (by_ms, doubled) in [(2_500, 0.0), (1_500, 1.0), (0, 1.0)] {
        let mut world = World::new(settings(4, Policy::default()), &nodes, &machines);
        world.schedule(
            0,
            ExternalEvent::SlowResponses {
                node: 1,
                by_ms,
                doubled,
            },
        );
        world.run_until(300_000);
        let loads = world.loads();
        if by_ms > 2_000 {
            // It never answers in time; the other two are level without it.
            assert_eq!(world.machines_of(1).len(), 0);
            assert!((loads[0] - loads[2]).abs() < 0.02, "{loads:?}");
        } else {
            assert!(loads.iter().all(|it| (it - 1.0).abs() < 0.02), "{loads:?}");
        }
        assert_eq!(returns(&world), 0);
        assert!(world.moves().len() <= 9);
    }
}

#[test]
fn numbers_that_cannot_be_are_never_followed() {
    for lie in [
        InvalidReport::Nan,
        InvalidReport::Negative,
        InvalidReport::Infinite,
        InvalidReport::Huge,
    ] {
        for measures in [false, true] {
            let nodes: Vec<NodeSpec> = (0..4).map(|number| node(number, 4.0)).collect();
            let machines: Vec<MachineSpec> = (0..12)
                .map(|number| machine(number, number % 2, steady(1.0), 64 * MIB))
                .collect();
            let mut world = World::new(settings(6, Policy::default()), &nodes, &machines);
            // A node as loaded as the other: it would give, and by its numbers it would accept.
            let what = if measures {
                ExternalEvent::MeasurementFault(1, Some(lie))
            } else {
                ExternalEvent::ReportFault(1, Some(lie))
            };
            world.schedule(0, what);
            world.run_until(120_000);
            let of_liar = world
                .moves()
                .iter()
                .filter(|it| it.source == 1 || it.target == 1)
                .count();
            assert_eq!(of_liar, 0, "{lie:?} {measures}");
            assert_eq!(world.machines_of(1).len(), 6);
            let loads = world.loads();
            // The other nodes continue among themselves, until none is pressed.
            let honest = [loads[0], loads[2], loads[3]];
            assert!(honest.iter().all(|it| *it < 0.8), "{lie:?}: {loads:?}");
            let told = world.decisions().iter().any(|it| {
                matches!(
                    it.decision,
                    keel_balance::ledger::Decision::InvalidReport { .. }
                )
            });
            assert!(told, "{lie:?} {measures}");
            // Once its numbers are valid, it takes part.
            world.schedule(120_000, ExternalEvent::ReportFault(1, None));
            world.schedule(120_000, ExternalEvent::MeasurementFault(1, None));
            world.run_until(400_000);
            assert!(world.machines_of(1).len() < 6, "{lie:?} {measures}");
        }
    }
}
