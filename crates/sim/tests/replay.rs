//! Replay of decisions: the same code reproduces them, another policy does not, with the difference
//! and its reason.

use keel_balance::ledger::{Decision, Line};
use keel_balance::policy::Policy;
use keel_sim::replay::{ReplayOutcome, ReplaySummary, replay};
use keel_sim::run::run_recorded;
use keel_sim::scenario::Scenario;
use keel_sim::what_if::WhatIf;
use std::path::Path;

/// A variable day of heterogeneous nodes that pack or level.
fn recorded(strategy: &str) -> Vec<Line> {
    let text = format!(
        "length_s = 1200\nseed = 5\n\
         [policy]\nstrategy = \"{strategy}\"\nhold_ms = 5000\n\
         [network]\nlost = 0.02\nmoves_failed = 0.1\n\
         [[nodes]]\ncount = 4\nname = \"a{{}}\"\ncores = 4\nmemory_mib = 8192\n\
         [[nodes]]\ncount = 3\nname = \"b{{}}\"\ncores = 2\nspeed = 2.0\nmemory_mib = 4096\n\
         [[machines]]\ncount = 24\nname = \"m{{}}\"\nplace = \"random\"\nmemory_mib = 512\n\
         curve = {{ kind = \"bursts\", quiet = 0.1, burst = 1.5, share = 0.3, length_s = 90 }}\n\
         [[machines]]\ncount = 8\nname = \"s{{}}\"\nplace = \"random\"\n\
         curve = {{ kind = \"steady\", cores = 0.5 }}\nburns = true\n\
         [[events]]\nkind = \"policy\"\nat_s = 600\nchange = {{ margin = 0.2 }}\n"
    );
    let scenario = Scenario::parse(Path::new("s.toml"), &text).unwrap();
    let (_, lines) = run_recorded(&scenario, &WhatIf::default(), &mut |_| {}).unwrap();
    lines
}

fn replayed(lines: &[Line]) -> ReplaySummary {
    let file = tempfile::NamedTempFile::new().unwrap();
    let lines: Vec<String> = lines
        .iter()
        .map(|line| serde_json::to_string(line).unwrap())
        .collect();
    std::fs::write(file.path(), lines.join("\n")).unwrap();
    replay(file.path()).unwrap()
}

fn moves(lines: &[Line]) -> usize {
    let moves = lines
        .iter()
        .filter(|line| matches!(line.decision, Decision::Move { .. }));
    moves.count()
}

#[test]
fn the_same_code_decides_the_same() {
    for strategy in ["level", "pack", "spread"] {
        let lines = recorded(strategy);
        assert!(moves(&lines) > 10, "{strategy}: {}", moves(&lines));
        let replayed = replayed(&lines);
        assert_eq!(replayed.others, [], "{strategy}");
        assert_eq!(replayed.lines as usize, lines.len());
        assert!(replayed.same as usize > 2 * moves(&lines));
    }
}

#[test]
fn another_policy_decides_otherwise_and_says_why() {
    let mut lines = recorded("level");
    let made = moves(&lines);
    for line in &mut lines {
        line.policy = Some(Policy {
            gain_min: 1e6,
            ..Policy::default()
        });
    }
    let replayed = replayed(&lines);
    assert!(replayed.differ as usize >= made, "{replayed:?}");
    let first = &replayed.others[0];
    let ReplayOutcome::Differs(why) = &first.outcome else {
        panic!("{first:?}");
    };
    assert!(why.contains("nothing would move"), "{why}");
    assert!(replayed.others.iter().any(|it| {
        matches!(&it.outcome, ReplayOutcome::Differs(why) if why.contains("its gain is too small"))
    }));
}

#[test]
fn what_was_recorded_otherwise_is_found() {
    let mut lines = recorded("level");
    let line = lines
        .iter()
        .position(|line| match &line.decision {
            Decision::Move { considered, .. } => considered.len() > 1,
            _ => false,
        })
        .unwrap();
    let Decision::Move {
        machine,
        considered,
        ..
    } = &mut lines[line].decision
    else {
        panic!("no move");
    };
    let right = machine.clone();
    *machine = considered[1].machine.clone();
    let wrong = machine.clone();
    let replayed = replayed(&lines);
    assert_eq!((replayed.differ, replayed.others.len()), (1, 1));
    assert_eq!(replayed.others[0].line, line + 1);
    let ReplayOutcome::Differs(why) = &replayed.others[0].outcome else {
        panic!("{replayed:?}");
    };
    assert!(
        why.starts_with(&format!("{right} would move; of {wrong}: another machine")),
        "{why}"
    );
}

#[test]
fn a_ledger_with_errors_is_refused_with_its_line() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let good = serde_json::to_string(&recorded("level")[0]).unwrap();
    for (text, says) in [
        (String::new(), "it has no decisions"),
        ("\n\n".into(), "it has no decisions"),
        (format!("{good}\n{{\n"), ", line 2: EOF"),
        (format!("{good}\n\n[1]\n"), ", line 3: invalid"),
        (
            good.replace("\"kind\":\"stay\"", "\"kind\":\"stray\""),
            ", line 1: there is no kind \"stray\" here; did you mean \"stay\"?",
        ),
        (good[..good.len() / 2].to_owned(), ", line 1: EOF"),
        (
            good.replace("at_unix_ms", "at"),
            ", line 1: missing field `at_unix_ms`",
        ),
    ] {
        std::fs::write(file.path(), &text).unwrap();
        let error = replay(file.path()).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
    assert!(replay(Path::new("/nowhere")).is_err());
}
