//! Scenario files: the bundled ones meet their expectations, errors are reported with their line,
//! and a seed reproduces a run exactly.

use keel_sim::html_report;
use keel_sim::run::{Report, run};
use keel_sim::scenario::{Cluster, Scenario};
use keel_sim::what_if::WhatIf;
use keel_sim::world::World;
use std::path::Path;

fn parse(text: &str) -> Scenario {
    Scenario::parse(Path::new("s.toml"), text).unwrap()
}

fn plain(scenario: &Scenario) -> Report {
    run(scenario, &WhatIf::default(), &mut |_| {}).unwrap()
}

fn error(text: &str) -> String {
    match Scenario::parse(Path::new("s.toml"), text) {
        Err(error) => error.to_string(),
        Ok(scenario) => match run(&scenario, &WhatIf::default(), &mut |_| {}) {
            Err(error) => error.to_string(),
            Ok(_) => "nothing is wrong".into(),
        },
    }
}

const THREE: &str = "\
length_s = 120
[[nodes]]
count = 3
name = \"n{}\"
cores = 4
memory_mib = 8192
[[machines]]
count = 12
name = \"m{}\"
on = \"n1\"
curve = { kind = \"steady\", cores = 1 }
burns = true
";

#[test]
fn those_that_come_along_hold() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let scenario = Scenario::read(&entry.unwrap().path()).unwrap();
        let report = plain(&scenario);
        assert!(!report.expectations.is_empty());
        let missed: Vec<_> = report.expectations.iter().filter(|it| !it.met).collect();
        assert!(missed.is_empty(), "{}: {missed:?}", scenario.about);
        count += 1;
    }
    assert_eq!(count, 4);
}

#[test]
fn a_seed_says_everything() {
    let text = THREE.replace(
        "[[nodes]]",
        "[network]\nlost = 0.1\ndoubled = 0.1\nmoves_failed = 0.2\n[[nodes]]",
    );
    let mut scenario = parse(&text);
    let (once, again) = (plain(&scenario), plain(&scenario));
    assert_eq!(once, again);
    scenario.seed += 1;
    assert_ne!(plain(&scenario).moves, once.moves);
}

/// With any concurrency of two nodes no move is committed that a rule forbids.
#[test]
fn no_move_breaks_a_rule_on_any_seed() {
    let text = include_str!("../scenarios/rules.toml");
    let (mut raced, mut repairs) = (0, 0);
    for seed in 1..=30 {
        let mut scenario = parse(text);
        scenario.seed = seed;
        scenario.network.moves_failed = 0.1;
        scenario.network.lost = 0.05;
        let cluster = Cluster::of(&scenario).unwrap();
        let mut world = World::new(cluster.settings.clone(), &cluster.nodes, &cluster.machines);
        for (at_ms, what) in &cluster.events {
            world.schedule(*at_ms, what.clone());
        }
        let mut before = world.broken().len();
        for s in 1..=900 {
            world.run_until(s * 1000);
            let broken = world.broken().len();
            // Only a new rule or a node failure violates any.
            let comes = (300..=301).contains(&s) || (500..=540).contains(&s);
            assert!(
                broken <= before || comes,
                "seed {seed}, {s} s: {:?}",
                world.broken()
            );
            before = broken;
        }
        assert_eq!(world.broken(), [], "seed {seed}");
        raced += world.raced();
        repairs += world.repairs();
    }
    assert!(repairs >= 150 && raced > 0, "{repairs}, {raced}");
    println!("{repairs} repairs, {raced} moves stopped at their end");
}

#[test]
fn rules_that_make_no_sense_are_named_with_their_line() {
    let begin = "length_s = 10\n[[nodes]]\nname = \"n{}\"\ncount = 2\ncores = 1\nmemory_mib = 64\n\
        [[machines]]\nname = \"m{}\"\ncount = 3\ncurve = { kind = \"steady\", cores = 1 }\n";
    let of = |rule: &str| error(&format!("{begin}{rule}"));
    let said = of("[[rules]]\nname = \"r\"\nmachines = { names = [\"x\"] }\nrule = \"stay\"\n");
    assert!(
        said.contains("line 11") && said.contains("applies to no machine"),
        "{said}"
    );
    let said = of(
        "[[rules]]\nname = \"r\"\nmachines = { names = [\"m*\"] }\nrule = \"pin\"\nnodes = { names = [\"z\"] }\n",
    );
    assert!(said.contains("names no existing node"), "{said}");
    let said = of(
        "[[rules]]\nname = \"one\"\nmachines = { names = [\"m*\"] }\nrule = \"apart\"\n\
         [[rules]]\nname = \"idle\"\nmachines = { names = [\"m1\"] }\nrule = \"stay\"\n",
    );
    // Three machines on two nodes.
    assert!(said.contains("contradictory rules: one"), "{said}");
    let said = of("[[events]]\nkind = \"rule-goes\"\nat_s = 1\nrule = \"r\"\n");
    assert!(said.contains("no rule \"r\""), "{said}");
}

#[test]
fn expectations_that_fail_say_what_came() {
    let scenario = parse(&format!(
        "{THREE}[expect]\nmoves_max = 3\nmoves_min = 100\nunevenness_max = 0.0001\n\
         no_move_after_s = 1\nlevelled_by_s = 1\nuntouched = [\"n2\"]\nfree_min = 1\nalerts_max = 0\n"
    ));
    let report = plain(&scenario);
    assert!(!report.met());
    let missed: Vec<&str> = report
        .expectations
        .iter()
        .filter(|it| !it.met)
        .map(|it| it.expectation.as_str())
        .collect();
    let all = [
        "levelled_by_s",
        "no_move_after_s",
        "moves_max",
        "alerts_max",
        "moves_min",
        "free_min",
        "untouched",
    ];
    assert_eq!(missed, all);
    let moves = &report.expectations[2];
    assert_eq!(
        (moves.expected.as_str(), moves.found.as_str()),
        ("at most 3", "8")
    );
}

#[test]
fn what_if_compares_with_a_change() {
    let scenario = parse(THREE);
    let changed = |changes: &[&str]| {
        let changes = changes.iter().map(|it| it.parse().unwrap()).collect();
        run(&scenario, &WhatIf { changes }, &mut |_| {})
    };
    let less = changed(&["remove-node=n3"]).unwrap();
    assert_eq!((less.end.alive, less.end.machines), (2, 12));
    assert!(
        (less.end.load_max - 1.5).abs() < 0.02,
        "{}",
        less.end.load_max
    );
    let more = changed(&["add-node=1"]).unwrap();
    assert!(
        (more.end.load_max - 0.75).abs() < 0.02,
        "{}",
        more.end.load_max
    );
    // The node with all machines: they start on the others.
    let hot = changed(&["remove-node=n1"]).unwrap();
    assert_eq!(
        (hot.end.alive, hot.end.machines, hot.moves.len()),
        (2, 12, 0)
    );
    let off = changed(&["policy.mode=off"]).unwrap();
    assert_eq!(off.moves.len(), 0);
    // Either of the two alone contradicts the other's default.
    let both = [
        "policy.strategy=pack",
        "policy.fill_load=0.9",
        "policy.pressed_load=0.95",
    ];
    assert!(changed(&both).is_ok());
    for (change, says) in [
        (
            "remove-node=n4",
            "s.toml: there is no node \"n4\"; known are n1, n2, n3",
        ),
        (
            "policy.margn=0.2",
            "there is no key \"margn\" here; did you mean \"margin\"?",
        ),
        ("policy.margin=-1", "balance.margin is -1"),
        ("policy.mode=on", "there is no kind \"on\" here"),
    ] {
        let error = changed(&[change]).unwrap_err().to_string();
        assert!(error.contains(says), "{change}: {error}");
    }
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    let with = |more: &str| format!("{THREE}{more}");
    for (text, says) in [
        (String::new(), "s.toml, line 1: missing field `length_s`"),
        ("length_s = 0".into(), "s.toml: length_s is 0; 1 to"),
        ("length_s = 5\n".into(), "s.toml: it has no nodes"),
        (
            "length_s = 5\nsed = 1\n".into(),
            "s.toml, line 2: there is no key \"sed\" here; did you mean \"seed\"?",
        ),
        (
            "length_s = 5\n[policy]\nmargn = 1\n".into(),
            "s.toml, line 3: there is no key \"margn\" here; did you mean \"margin\"?",
        ),
        (
            "length_s = 5\n[policy]\nmargin = 0\n".into(),
            "s.toml: balance.margin is 0; it must be",
        ),
        (
            "length_s = 5\n[network]\nlost = 2\n".into(),
            "s.toml: network.lost is 2; 0 to 1",
        ),
        (
            "length_s = 5\n[network]\ndelay_ms = [9, 2]\n".into(),
            "s.toml: network.delay_ms is [9, 2]",
        ),
        ("length_s =\n".into(), "s.toml, line 1: "),
        (
            THREE.replace("cores = 4", "cores = nan"),
            "s.toml, line 2: cores is NaN; 0.01 to",
        ),
        (
            THREE.replace("cores = 4", "coers = 4"),
            "s.toml, line 5: there is no key \"coers\" here; did you mean \"cores\"?",
        ),
        (
            THREE.replace("n{}", "n"),
            "s.toml, line 2: 3 nodes have one name: \"n\" needs a {}",
        ),
        (
            THREE.replace("m{}", "m"),
            "s.toml, line 7: several machines have one name",
        ),
        (
            THREE.replace("m{}", "n{}"),
            "s.toml, line 7: there is a \"n1\" already",
        ),
        (
            THREE.replace("\"n1\"", "\"n9\""),
            "s.toml, line 7: there is no node \"n9\"; known are n1, n2, n3",
        ),
        (
            THREE.replace("on = \"n1\"", "labels = { rack = \"a\" }"),
            "s.toml, line 7: no node has all of these labels",
        ),
        (
            THREE.replace("steady", "stedy"),
            "s.toml, line 11: there is no kind \"stedy\" here; did you mean \"steady\"?",
        ),
        (
            THREE.replace("cores = 1 }", "core = 1 }"),
            "s.toml, line 11: there is no key \"core\" here; did you mean \"cores\"?",
        ),
        (
            THREE
                .replace("curve = {", "traces = {")
                .replace("kind = \"steady\", ", ""),
            "s.toml, line 7: traces are either planetlab",
        ),
        (
            with("[[events]]\nkind = \"node-dies\"\nat_s = 5\nnode = \"n7\"\n"),
            "s.toml, line 13: there is no node \"n7\"",
        ),
        (
            with("[[events]]\nkind = \"node-dies\"\nat_s = 500\nnode = \"n1\"\n"),
            "s.toml, line 13: at_s is 500; the scenario lasts for 120 s",
        ),
        (
            with("[[events]]\nkind = \"node-dys\"\nat_s = 5\nnode = \"n1\"\n"),
            "did you mean \"node-dies\"?",
        ),
        (
            with("[[events]]\nkind = \"machine-ends\"\nat_s = 5\nmachine = \"web-*\"\n"),
            "s.toml, line 13: there is no machine \"web-*\"",
        ),
        (
            with("[[events]]\nkind = \"policy\"\nat_s = 5\nchange = { hold = 5 }\n"),
            "s.toml, line 13: there is no key \"hold\" here; did you mean \"hold_ms\"?",
        ),
        (
            with("[expect]\nmoves = 5\n"),
            "s.toml, line 14: there is no key \"moves\" here; did you mean \"moves_m",
        ),
        (
            with("[expect]\nuntouched = [\"n5\"]\n"),
            "s.toml: expect.untouched: there is no node \"n5\"",
        ),
    ] {
        let error = error(&text);
        assert!(
            error.starts_with(says) || error.contains(says) && says.starts_with("did"),
            "{text}\n{says}\n{error}"
        );
    }
}

#[test]
fn recorded_loads_are_read_from_files_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("day")).unwrap();
    for (name, percent) in [("b", 50), ("a", 100), ("c", 0)] {
        let lines = format!("{percent}\n").repeat(288);
        std::fs::write(folder.path().join("day").join(name), lines).unwrap();
    }
    std::fs::write(folder.path().join("l.csv"), "at_s,web\n0,0.5\n60,1.5\n").unwrap();
    let text = "length_s = 100\n[[nodes]]\nname = \"n\"\ncores = 4\nmemory_mib = 4096\n\
                power = \"hp-ml110-g5\"\n\
                [[machines]]\ntraces = { planetlab = \"day\", cores = 2 }\n\
                [[machines]]\ntraces = { csv = \"l.csv\" }\n[policy.weights]\nmemory = 0\n";
    let place = folder.path().join("s.toml");
    std::fs::write(&place, text).unwrap();
    let mut scenario = Scenario::read(&place).unwrap();
    let report = plain(&scenario);
    assert_eq!(report.start.load_max, (1.0 + 2.0 + 0.5) / 4.0);
    assert_eq!(report.end.load_max, (1.0 + 2.0 + 1.5) / 4.0);
    // 87.5 % of the CPU for a minute, 100 % for 40 s.
    let watt_s = report.energy_kwh.unwrap() * 3.6e6;
    assert!(
        (watt_s - (132.0 * 60.0 + 135.0 * 40.0)).abs() < 150.0,
        "{watt_s}"
    );
    // From elsewhere, and what is wrong there.
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    scenario.use_planetlab(&other).unwrap();
    let message = |scenario: &Scenario| {
        let run = run(scenario, &WhatIf::default(), &mut |_| {});
        run.unwrap_err().to_string()
    };
    assert!(message(&scenario).contains("other: there are no files"));
    for (text, says) in [
        ("", "vm: it is empty"),
        ("5\nx\n", "vm, line 2: \"x\" is not a percentage"),
        ("5\n101\n", "vm, line 2: \"101\" is not a percentage"),
        ("-1\n", "vm, line 1: \"-1\" is not a percentage"),
        ("NaN\n", "vm, line 1: \"NaN\" is not a percentage"),
    ] {
        std::fs::write(other.join("vm"), text).unwrap();
        let error = message(&scenario);
        assert!(error.contains(says), "{error}");
    }
    scenario.use_planetlab(Path::new("/nowhere")).unwrap();
    assert!(message(&scenario).starts_with("/nowhere: "));
    assert!(parse(THREE).use_csv(&place).is_err());
}

#[test]
fn a_cluster_of_ganeti_runs() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("c.data");
    let mut text = String::from("g|u|preferred||\n\n");
    for node in ["a", "b", "c"] {
        text += &format!("{node}|8192|0|8192|1000|1000|4|N|u|1\n");
    }
    text += "\n";
    for number in 0..8 {
        text += &format!("i{number}|256|0|1|running|Y|a||plain|\n");
    }
    text += "\n\n";
    std::fs::write(&place, text).unwrap();
    let used = folder.path().join("used");
    std::fs::write(&used, "i0 0 0 0 0\ni1 0 0 0 0\n").unwrap();
    let report = plain(&Scenario::from_ganeti(place, Some(used)));
    assert_eq!(report.end.machines, 8);
    assert!(
        report.start.load_max > 1.4 && report.end.load_max < 0.8,
        "{report:?}"
    );
}

#[test]
fn a_picture_has_each_node_and_nothing_from_elsewhere() {
    let scenario = parse(
        &THREE
            .replace("n{}", "<n&{}>")
            .replace("\"n1\"", "\"<n&1>\""),
    );
    let page = html_report::page("lines", &plain(&scenario));
    assert_eq!(page.matches("<path").count(), 3);
    assert_eq!(page.matches("<circle").count(), 8);
    assert!(page.contains("&lt;n&amp;1&gt;") && !page.contains("<n&"));
    let many = parse(&THREE.replace("count = 3", "count = 300"));
    let page = html_report::page("rows", &plain(&many));
    assert!(page.matches("<rect").count() >= 200 && page.len() < 2_000_000);
    for foreign in ["<script", "http:", "https:", "src="] {
        assert!(!page.contains(foreign), "{foreign}");
    }
}
