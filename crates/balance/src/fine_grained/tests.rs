//! Scenes, and what is decided in them.

use super::*;
use crate::load::Capacity;

const MIB: u64 = 1 << 20;

fn node(name: &str, load: f64) -> Node {
    Node {
        name: name.into(),
        state: NodeState {
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
        ran_cores: cores,
        held: false,
        affinity: None,
    }
}

/// Six CPU-bound threads on the first of three nodes.
fn observation(parts: &[&str]) -> Observation {
    Observation {
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
        losing_observations: 0,
        recently_gathered: false,
        recent: Vec::new(),
    }
}

fn moves(choices: &[Choice]) -> Vec<(u32, u32)> {
    let moves = choices.iter().filter_map(|it| match it.action {
        Action::Thread { tid, part, .. } => Some((tid, part)),
        _ => None,
    });
    moves.collect()
}

#[test]
fn a_machine_that_presses_any_node_gets_parts_and_its_threads_are_dealt_out() {
    let policy = Policy::default();
    let alone = observation(&["a"]);
    let choices = decide(&alone, &policy);
    let [choice] = &choices[..] else {
        panic!("{choices:?}")
    };
    let nodes: Vec<Name> = ["c", "b"].map(Name::from).to_vec();
    assert_eq!(choice.action, Action::Spread { nodes });
    assert!(choice.why.contains("6 busy threads"), "{}", choice.why);
    assert_eq!(choice.loads.len(), 3);

    let mut spans = observation(&["a", "c", "b"]);
    let choices = decide(&spans, &policy);
    let dealt = moves(&choices);
    assert_eq!(dealt.len(), 4, "{choices:?}");
    let to = |part: u32| dealt.iter().filter(|(_, to)| *to == part).count();
    assert_eq!((to(1), to(2)), (2, 2));
    // The loads are level then, and nothing more is done.
    for (tid, part) in dealt {
        spans.threads[tid as usize].part = part;
    }
    for (number, load) in [2.0, 2.1, 2.0].into_iter().enumerate() {
        let one = &mut spans.nodes[number];
        one.state.load = load;
        one.state.pressed = true;
        one.loads = vec![load; 8];
    }
    assert_eq!(decide(&spans, &policy), []);
}

#[test]
fn what_does_not_press_or_may_go_whole_is_left_alone() {
    let policy = Policy::default();
    let nothing =
        |observation: &Observation| assert_eq!(decide(observation, &policy), [], "{observation:?}");
    // No pressure.
    let mut calm = observation(&["a"]);
    calm.nodes[0] = node("a", 0.7);
    nothing(&calm);
    // It has not lasted.
    let mut short = observation(&["a"]);
    short.nodes[0].loads = vec![6.0, 6.0, 6.0, 0.1, 0.1, 0.1];
    nothing(&short);
    // One of many machines, and another node would stay light with it.
    let mut small = observation(&["a"]);
    small.threads = vec![thread(0, 0, 0.2), thread(1, 0, 0.2)];
    nothing(&small);
    // A single busy thread cannot be split.
    let mut one = observation(&["a"]);
    one.threads = vec![thread(0, 0, 1.0), thread(1, 0, 0.0)];
    nothing(&one);
    // All others are as heavy.
    let mut heavy = observation(&["a"]);
    heavy.nodes[1] = node("b", 6.0);
    heavy.nodes[2] = node("c", 5.9);
    nothing(&heavy);
    // It ran slower with parts before.
    let mut recently_gathered = observation(&["a"]);
    recently_gathered.recently_gathered = true;
    nothing(&recently_gathered);
    // Its threads arrived recently.
    let mut held = observation(&["a", "b"]);
    for thread in &mut held.threads {
        thread.held = true;
    }
    nothing(&held);
}

#[test]
fn a_part_goes_from_where_none_may_be_and_parts_that_lose_come_together() {
    let policy = Policy::default();
    let mut drained = observation(&["a", "b", "c"]);
    drained.nodes[2].forbidden = Some("c is being drained".into());
    let choices = decide(&drained, &policy);
    assert_eq!(choices.len(), 1);
    let nodes = vec![drained.nodes[2].name.clone()];
    assert_eq!(choices[0].action, Action::Leave { nodes });
    assert!(choices[0].why.contains("drained"), "{}", choices[0].why);

    // Two threads alternate on a page.
    let gathers = |observation: &Observation| {
        let choices = decide(observation, &policy);
        choices.iter().any(|it| it.action == Action::Gather)
    };
    let mut losing = observation(&["a", "b", "c"]);
    losing.threads = vec![thread(0, 0, 0.2), thread(1, 1, 0.2)];
    losing.nodes[0] = node("a", 0.2);
    losing.waited_cores = 0.8;
    let choices = decide(&losing, &policy);
    assert_eq!(choices[0].action, Action::Gather);
    assert!(
        choices[0].why.contains("0.40 cores in total"),
        "{choices:?}"
    );
    assert!(choices[0].why.contains("would run 1.00"), "{choices:?}");
    // Its home has half a core for it: others demand as much.
    losing.nodes[0] = node("a", 1.4);
    assert!(gathers(&losing));
    losing.nodes[0] = node("a", 2.4);
    assert!(!gathers(&losing));
    // A faster node's cores count for more.
    losing.nodes[0] = node("a", 1.4);
    losing.nodes[1].state.capacity.speed = 1.6;
    assert!(!gathers(&losing));
    losing.nodes[1].state.capacity.speed = 1.0;
    // The spec demands parts at all times.
    losing.from_beginning = true;
    assert!(!gathers(&losing));
    losing.from_beginning = false;
    // No thread waits for pages: its low throughput has other causes.
    losing.waited_cores = 0.05;
    assert!(!gathers(&losing));
}

#[test]
fn threads_go_to_what_draws_them_where_that_presses_nobody() {
    let policy = Policy::default();
    let mut calm = observation(&["a", "b", "c"]);
    calm.threads = vec![thread(0, 0, 0.2), thread(1, 0, 0.2), thread(2, 1, 0.2)];
    calm.nodes[0] = node("a", 0.4);
    calm.nodes[1] = node("b", 0.2);
    for tid in [0, 2] {
        calm.threads[tid].affinity = Some(Affinity {
            part: 1,
            why: "it likes to be near cache".into(),
            stall_share: 0.0,
        });
    }
    let choices = decide(&calm, &policy);
    assert_eq!(moves(&choices), [(0, 1)]);
    assert!(choices[0].why.contains("near cache"), "{choices:?}");
    assert!(choices[0].why.contains("b has load 0.40"), "{choices:?}");
    // Not to a node that it would press, that is forbidden, from which threads came, or all at
    // once.
    let nothing = |observation: &Observation| assert_eq!(decide(observation, &policy), []);
    let mut pressed = calm.clone();
    pressed.nodes[1] = node("b", 0.95);
    nothing(&pressed);
    let mut back = calm.clone();
    back.recent = vec![("b".into(), "a".into())];
    nothing(&back);
    let mut held = calm.clone();
    held.threads[0].held = true;
    nothing(&held);
    // Of the threads stalled on remote pages one moves at a time: the one that stalls most and can
    // move.
    let mut pages = calm.clone();
    for (tid, stall_share) in [(0, 0.3), (1, 0.7), (2, 0.9)] {
        pages.threads[tid].affinity = Some(Affinity {
            part: if tid == 2 { 2 } else { 1 },
            why: String::new(),
            stall_share,
        });
    }
    pages.nodes[2] = node("c", 0.95);
    assert_eq!(moves(&decide(&pages, &policy)), [(1, 1)]);
    // Before gathering, but not forever.
    let mut losing = pages.clone();
    losing.waited_cores = 2.0;
    assert_eq!(moves(&decide(&losing, &policy)), [(1, 1)]);
    losing.losing_observations = LOSING_OBSERVATIONS_MAX + 1;
    assert_eq!(decide(&losing, &policy)[0].action, Action::Gather);
    // A thread at its part of affinity moves last.
    let mut level = observation(&["a", "b", "c"]);
    for tid in [0, 1, 2, 3] {
        level.threads[tid].affinity = Some(Affinity {
            part: 0,
            why: String::new(),
            stall_share: 0.0,
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
    // As observed: one remote thread of six, stalled on pages of a node of half a core that five
    // others press; together they would have that half core alone.
    let mut spans = observation(&["a", "b", "c"]);
    spans.nodes[0] = node("a", 10.0);
    spans.nodes[0].state.capacity.cores = 0.5;
    for thread in &mut spans.threads {
        thread.ran_cores = 0.1;
        thread.held = true;
    }
    spans.threads[5].part = 1;
    (spans.threads[5].cores, spans.threads[5].ran_cores) = (0.24, 0.24);
    spans.waited_cores = 0.79;
    assert_eq!(decide(&spans, &Policy::default()), []);
}

#[test]
fn few_waits_for_pages_are_no_reason_to_come_home() {
    // As observed on three nodes of one host, which have its two cores together: six busy threads,
    // three of them remote, that wait for pages for an eighth of a core in total.
    let mut spans = observation(&["a", "b"]);
    spans.nodes[0] = node("a", 1.7);
    spans.nodes[1] = node("b", 1.7);
    for node in &mut spans.nodes {
        node.state.capacity.cores = 2.0;
    }
    for thread in &mut spans.threads {
        thread.ran_cores = 0.24;
        thread.held = true;
    }
    for tid in 3..6 {
        spans.threads[tid].part = 1;
    }
    spans.waited_cores = 0.12;
    assert_eq!(decide(&spans, &Policy::default()), []);
    // Where the waits cost that much, it is.
    spans.waited_cores = 1.2;
    let choices = decide(&spans, &Policy::default());
    assert_eq!(choices[0].action, Action::Gather);
}

#[test]
fn more_parts_are_made_where_those_that_it_has_are_pressed_and_none_goes_back() {
    let policy = Policy::default();
    let mut two = observation(&["a", "b"]);
    for tid in 3..6 {
        two.threads[tid].part = 1;
    }
    two.nodes[0] = node("a", 3.0);
    two.nodes[1] = node("b", 3.0);
    let choices = decide(&two, &policy);
    let nodes: Vec<Name> = ["b", "c"].map(Name::from).to_vec();
    assert_eq!(choices[0].action, Action::Spread { nodes });
    // A thread moves first, if one can; but not back.
    two.nodes[1] = node("b", 1.5);
    assert_eq!(moves(&decide(&two, &policy)).len(), 1);
    two.recent = vec![("b".into(), "a".into())];
    let choices = decide(&two, &policy);
    assert!(
        matches!(choices[0].action, Action::Spread { .. }),
        "{choices:?}"
    );
    // No more than it may have.
    two.parts_max = 2;
    assert_eq!(decide(&two, &policy), []);
}

#[test]
fn a_part_that_has_too_much_gives_to_those_with_room() {
    let policy = Policy::default();
    let mut full = observation(&["a", "b", "c"]);
    full.threads.clear();
    full.part_memory_bytes = Some(100 * MIB);
    full.parts = vec![part(0, "a", 200), part(1, "b", 60), part(2, "c", 5)];
    let given = |observation: &Observation| -> Vec<(u32, u64)> {
        let choices = decide(observation, &policy);
        let given = choices.iter().map(|it| match &it.action {
            Action::Objects {
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
    // Its own eviction suffices while nothing more arrives.
    full.parts[0].memory_bytes = Some(98 * MIB);
    assert_eq!(given(&full), []);
    full.parts[0].overflows = true;
    assert_eq!(given(&full), [(2, 8)]);
    full.parts[0] = part(0, "a", 200);
    // A node short of memory accepts none, and one above the headroom gives.
    full.nodes[2].state.memory_free_bytes = 60 * MIB;
    assert_eq!(given(&full), [(1, 30)]);
    full.part_memory_bytes = None;
    full.nodes[0].state.memory_free_bytes = 20 * MIB;
    assert_eq!(given(&full), [(1, 30)]);
    // (The headroom is 50 of 1,000.)
    full.nodes[0].state.memory_free_bytes = 51 * MIB;
    assert_eq!(given(&full), []);
}

#[test]
fn a_machine_with_more_memory_than_a_part_keeps_gets_parts() {
    let mut large = observation(&["a"]);
    large.nodes[0] = node("a", 0.2);
    large.parts = vec![part(0, "a", 200)];
    large.part_memory_bytes = Some(100 * MIB);
    let choices = decide(&large, &Policy::default());
    assert!(matches!(choices[0].action, Action::Spread { .. }));
    assert!(choices[0].why.contains("200.0 MiB"), "{}", choices[0].why);
}
