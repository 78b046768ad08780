//! `keel sim`: needs no node; prints results in tables, JSON and a page; and exits with 1 if an
//! expectation fails.

use std::path::Path;
use std::process::{Command, Output};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

fn keel(folder: &Path, args: &[&str]) -> Output {
    Command::new(KEEL)
        .current_dir(folder)
        .args(args)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const HOT: &str = "\
about = \"a hot node\"
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
[expect]
moves_max = 10
";

#[test]
fn a_scenario_is_run_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    std::fs::write(place.join("hot.toml"), HOT).unwrap();
    let out = keel(place, &["sim", "hot.toml", "--html", "hot.html"]);
    let told = text(&out.stdout);
    assert!(out.status.success(), "{told}{}", text(&out.stderr));
    assert!(
        told.starts_with("a hot node\n") && told.contains("moves_max"),
        "{told}"
    );
    let page = std::fs::read_to_string(place.join("hot.html")).unwrap();
    assert!(
        page.contains("<svg") && page.contains("keel sim: hot"),
        "{page}"
    );

    let out = keel(
        place,
        &[
            "sim",
            "hot.toml",
            "-o",
            "json",
            "--what-if",
            "remove-node=n3",
        ],
    );
    let both: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(both["as_it_is"]["end"]["alive"], 3);
    assert_eq!(both["what_if"]["end"]["alive"], 2);
    let moves = both["as_it_is"]["moves"].as_array().unwrap();
    assert!(moves.iter().all(|it| it["source"] == "n1"), "{moves:?}");

    // Another seed, and an expectation that fails.
    std::fs::write(
        place.join("no.toml"),
        HOT.replace("moves_max = 10", "moves_max = 2"),
    )
    .unwrap();
    let out = keel(place, &["sim", "no.toml", "--seed", "5"]);
    assert_eq!(out.status.code(), Some(1));
    let said = text(&out.stderr);
    assert!(
        said.contains("moves_max not met: expected at most 2, found "),
        "{said}"
    );
}

#[test]
fn what_was_decided_is_decided_again() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    std::fs::write(place.join("hot.toml"), HOT).unwrap();
    let out = keel(place, &["sim", "hot.toml", "--ledger", "l.jsonl"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let out = keel(place, &["sim", "--replay", "l.jsonl", "-o", "json"]);
    assert!(out.status.success(), "{}", text(&out.stdout));
    let replayed: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(replayed["differ"], 0);
    assert!(replayed["same"].as_u64().unwrap() >= 8, "{replayed}");
    // With another policy the decision differs.
    let lines = std::fs::read_to_string(place.join("l.jsonl")).unwrap();
    let other = lines.replace("\"gain_min\":0.01", "\"gain_min\":1000.0");
    std::fs::write(place.join("l.jsonl"), other).unwrap();
    let out = keel(place, &["sim", "--replay", "l.jsonl"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text(&out.stdout).contains("today: nothing would move"),
        "{}",
        text(&out.stdout)
    );
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    std::fs::write(place.join("hot.toml"), HOT).unwrap();
    std::fs::write(place.join("bad.toml"), HOT.replace("[expect]", "[expct]")).unwrap();
    std::fs::write(place.join("bad.data"), "g|u|preferred||\n").unwrap();
    for (args, says) in [
        (vec!["sim"], "SCENARIO"),
        (vec!["sim", "none.toml"], "none.toml: No such file"),
        (
            vec!["sim", "bad.toml"],
            "line 14: there is no key \"expct\" here; did you mean \"expect\"?",
        ),
        (
            vec!["sim", "-t", "bad.data"],
            "bad.data: 1 sections instead of",
        ),
        (
            vec!["sim", "hot.toml", "--what-if", "remove-nod=n1"],
            "did you mean \"remove-node\"?",
        ),
        (
            vec!["sim", "hot.toml", "--what-if", "remove-node=n9"],
            "there is no node \"n9\"",
        ),
        (
            vec!["sim", "hot.toml", "--planetlab", "."],
            "it has no machines with traces",
        ),
        (
            vec!["sim", "hot.toml", "--html", "none/page.html"],
            "none/page.html: No such file",
        ),
        (
            vec!["sim", "--replay", "hot.toml"],
            "hot.toml, line 1: expected value",
        ),
        (
            vec!["sim", "hot.toml", "-o", "name"],
            "a simulation has no names",
        ),
    ] {
        let out = keel(place, &args);
        let said = text(&out.stderr);
        assert!(
            !out.status.success() && said.contains(says),
            "{args:?}: {said}"
        );
    }
}
