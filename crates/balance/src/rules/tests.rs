//! Each rule allows and refuses what it says, is repaired by the fewest moves, and contradictions are
//! found.

use super::*;

fn subject(name: &str, labels: &[(&str, &str)]) -> Subject {
    Subject {
        name: name.into(),
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    }
}

fn rule(name: &str, machines: &str, requirement: Requirement) -> Rule {
    Rule {
        name: name.into(),
        machines: Selector {
            names: vec![machines.to_owned()],
            labels: Labels::new(),
        },
        requirement,
    }
}

fn named(node: &str) -> Selector {
    Selector {
        names: vec![node.to_owned()],
        labels: Labels::new(),
    }
}

fn holders(all: &[(&str, &[&str])]) -> Holders {
    let set = |names: &[&str]| names.iter().map(|name| Name::from(*name)).collect();
    all.iter()
        .map(|(domain, names)| ((*domain).to_owned(), set(names)))
        .collect()
}

fn domains(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|it| (*it).to_owned()).collect()
}

#[test]
fn apart_is_kept_by_domain() {
    let zone = Domain::Label("zone".into());
    let apart = rule("ha", "web-*", Requirement::Apart { per: zone, max: 1 });
    let (a, b) = (
        subject("a", &[("zone", "x")]),
        subject("b", &[("zone", "y")]),
    );
    let held = holders(&[("x", &["web-1"])]);
    let web = subject("web-2", &[]);
    let broken = apart
        .claim(&web, &a, &held, &domains(&["x", "y"]))
        .unwrap_err();
    assert!(broken.why.contains("zone x has 1 already"), "{broken}");
    let claim = apart
        .claim(&web, &b, &held, &domains(&["x", "y"]))
        .unwrap()
        .unwrap();
    assert_eq!(claim.writes, holders(&[("y", &["web-2"])]));
    assert_eq!(claim.reads, domains(&["y"]));
    // On its present node nothing changes; other machines are not affected.
    let there = apart.claim(&subject("web-1", &[]), &a, &held, &domains(&["x"]));
    assert_eq!(there, Ok(None));
    let other = apart.claim(&subject("db", &[]), &a, &held, &domains(&["x"]));
    assert_eq!(other, Ok(None));
    // A move frees what it leaves.
    let moved = apart.claim(&subject("web-1", &[]), &b, &held, &domains(&["x", "y"]));
    let moved = moved.unwrap().unwrap();
    assert_eq!(moved.writes, holders(&[("x", &[]), ("y", &["web-1"])]));
}

#[test]
fn each_rule_says_why() {
    let (a, b) = (subject("a", &[]), subject("b", &[]));
    let held = holders(&[("a", &["m1", "m2"]), ("b", &["m3"])]);
    let all = domains(&["a", "b", "c"]);
    let m = subject("m4", &[]);
    let why = |requirement: Requirement, node: &Subject| {
        let rule = rule("r", "m*", requirement);
        rule.check().unwrap();
        rule.claim(&m, node, &held, &all).map_err(|it| it.why)
    };
    let together = Requirement::Together { per: Domain::Node };
    assert!(
        why(together, &a)
            .unwrap_err()
            .contains("others are on node b")
    );
    let spread = Requirement::Spread {
        per: Domain::Node,
        skew: 1,
    };
    assert!(
        why(spread.clone(), &a)
            .unwrap_err()
            .contains("would have 3")
    );
    assert!(why(spread, &subject("c", &[])).is_ok());
    let licence = Requirement::Licence { nodes_max: 2 };
    assert!(why(licence.clone(), &b).is_ok());
    assert!(
        why(licence, &subject("c", &[]))
            .unwrap_err()
            .contains("2 are in use")
    );
    assert!(why(Requirement::Pin { nodes: named("b") }, &a).is_err());
    assert_eq!(why(Requirement::Pin { nodes: named("a") }, &a), Ok(None));
    assert!(why(Requirement::Avoid { nodes: named("a") }, &a).is_err());
    assert_eq!(why(Requirement::Stay, &a), Ok(None));
}

#[test]
fn hours_may_pass_midnight() {
    let night = Requirement::Hours {
        from_minute: 22 * 60,
        to_minute: 6 * 60,
    };
    let night = rule("night", "*", night);
    let machine = subject("m", &[]);
    assert!(night.forbids_moving(&machine, 23 * 60).is_none());
    assert!(night.forbids_moving(&machine, 0).is_none());
    let noon = night.forbids_moving(&machine, 12 * 60).unwrap();
    assert!(noon.why.contains("22:00 to 06:00") && noon.why.contains("it is 12:00"));
    assert!(
        rule("s", "m", Requirement::Stay)
            .forbids_moving(&machine, 0)
            .is_some()
    );
}

#[test]
fn the_smallest_conflict_is_named() {
    let nodes = [subject("a", &[]), subject("b", &[]), subject("c", &[])];
    let machines: Vec<Subject> = ["m1", "m2"].iter().map(|it| subject(it, &[])).collect();
    let per = Domain::Node;
    let apart = rule("apart", "m*", Requirement::Apart { per, max: 1 });
    let pin = rule("pin", "m*", Requirement::Pin { nodes: named("a") });
    let harmless = rule("harmless", "m1", Requirement::Avoid { nodes: named("c") });
    let rules = [harmless.clone(), apart.clone(), pin.clone()];
    let found = conflict(&rules, &machines, &nodes).unwrap();
    assert_eq!(found, [apart.name.clone(), pin.name]);
    assert_eq!(
        conflict(&[harmless, apart.clone()], &machines, &nodes),
        None
    );
    // Four machines apart on three nodes: one rule is enough for a conflict.
    let four: Vec<Subject> = (1..=4).map(|it| subject(&format!("m{it}"), &[])).collect();
    assert_eq!(
        conflict(std::slice::from_ref(&apart), &four, &nodes),
        Some(vec![apart.name])
    );
}

#[test]
fn a_broken_rule_is_repaired_by_the_fewest_moves() {
    let nodes = [subject("a", &[]), subject("b", &[]), subject("c", &[])];
    let placed: Vec<(Subject, Name)> = [("m1", "a"), ("m2", "a"), ("m3", "a"), ("m4", "b")]
        .iter()
        .map(|(machine, node)| (subject(machine, &[]), (*node).into()))
        .collect();
    let movers = |requirement: Requirement| {
        let found = violations_of(&[rule("r", "m*", requirement)], &placed, &nodes);
        let names = found.into_iter().map(|(machine, _)| machine.to_string());
        names.collect::<Vec<_>>()
    };
    let per = Domain::Node;
    let apart = |max| Requirement::Apart {
        per: Domain::Node,
        max,
    };
    assert_eq!(movers(apart(1)), ["m2", "m3"]);
    assert_eq!(movers(apart(3)), [""; 0]);
    assert_eq!(movers(Requirement::Together { per: per.clone() }), ["m4"]);
    assert_eq!(movers(Requirement::Licence { nodes_max: 1 }), ["m4"]);
    assert_eq!(movers(Requirement::Spread { per, skew: 1 }), ["m3"]);
    assert_eq!(movers(Requirement::Pin { nodes: named("a") }), ["m4"]);
    assert_eq!(movers(Requirement::Avoid { nodes: named("b") }), ["m4"]);
}

#[test]
fn nonsense_is_refused_and_toml_is_read() {
    let no_holders = Rule {
        machines: Selector::default(),
        ..rule("r", "m", Requirement::Stay)
    };
    assert!(
        no_holders
            .check()
            .unwrap_err()
            .contains("names no machines")
    );
    let per = Domain::Node;
    assert!(
        rule("r", "m", Requirement::Apart { per, max: 0 })
            .check()
            .is_err()
    );
    let text = "name = \"ha\"\nrule = \"apart\"\nper = { label = \"zone\" }\n\
                [machines]\nlabels = { app = \"web\" }\n";
    let read: Rule = toml::from_str(text).unwrap();
    let per = Domain::Label("zone".into());
    assert_eq!(read.requirement, Requirement::Apart { per, max: 1 });
    assert!(read.applies_to(&subject("x", &[("app", "web")])));
    assert!(!read.applies_to(&subject("x", &[("app", "db")])));
}
