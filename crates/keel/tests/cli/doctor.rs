//! `keel doctor` on this computer: deliberate faults are found and reported.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

fn doctor(state_dir: &Path, args: &[&str]) -> Output {
    Command::new(KEEL)
        .arg("--state-dir")
        .arg(state_dir)
        .args(["doctor", "-o", "json"])
        .args(args)
        .output()
        .unwrap()
}

fn findings(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error} in {}", String::from_utf8_lossy(&output.stdout)))
}

fn check(output: &Output, name: &str) -> (String, String) {
    let findings = findings(output);
    let check = findings["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|check| check["name"] == name)
        .unwrap_or_else(|| panic!("no check {name}"));
    let text = |field: &str| check[field].as_str().unwrap().to_owned();
    assert!(!text("why").is_empty());
    assert_eq!(
        check["outcome"] == "ok",
        check["remedy"].is_null(),
        "{check}"
    );
    (text("outcome"), text("found"))
}

/// An unused address on loopback.
fn free() -> String {
    let [a, b]: [u8; 2] = rand::random();
    format!("127.{}.{b}.77:7070", a.max(1))
}

#[test]
fn a_fresh_computer_is_looked_at_without_an_agent() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("new");
    let output = doctor(&state, &["--listen", &free()]);
    for name in [
        "kernel",
        "memfd",
        "userfaultfd",
        "write-protection",
        "pagemap-scan",
        "missing-faults",
        "minor-faults",
        "pidfd",
        "boot-timers",
        "pressure",
        "cgroups",
        "rights",
        "open-files",
        "locked-memory",
        "boot-clock",
        "wall-clock",
        "cores",
        "memory",
        "virtualisation",
        "socket-paths",
    ] {
        check(&output, name);
    }
    let (outcome, found) = check(&output, "state-dir");
    assert_eq!(outcome, "ok");
    assert!(found.ends_with("new does not exist yet; `keel up` makes it"));
    assert_eq!(check(&output, "agent").0, "ok");
    assert_eq!(check(&output, "port").0, "ok");
    // No folder was created.
    assert!(!state.exists());
    let failed = findings(&output)["failed"].as_u64().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(failed > 0)));
}

#[test]
fn what_is_broken_is_named_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let held = listener.local_addr().unwrap().to_string();
    let output = doctor(folder.path(), &["--listen", &held]);
    let mine = format!("{held} is held by process {}", std::process::id());
    let (outcome, found) = check(&output, "port");
    assert!(outcome == "fail" && found.starts_with(&mine), "{found}");
    assert_eq!(output.status.code(), Some(1));

    // An address that this host does not have (TEST-NET-1).
    let output = doctor(
        folder.path(),
        &["--listen", &free(), "--api", "192.0.2.1:7071"],
    );
    let (outcome, found) = check(&output, "api-port");
    assert!(outcome == "fail" && found.contains("does not have that address"));

    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = doctor(&file, &["--listen", &free()]);
    let (outcome, found) = check(&output, "state-dir");
    assert!(outcome == "fail" && found.ends_with("file is no directory"));
    assert_eq!(output.status.code(), Some(1));

    std::fs::write(folder.path().join("node.json"), "{ \"listen\": 7").unwrap();
    let output = doctor(folder.path(), &["--listen", &free()]);
    let (outcome, found) = check(&output, "settings");
    assert!(
        outcome == "fail" && found.contains("node.json is damaged"),
        "{found}"
    );
}

#[test]
fn limits_that_are_too_low_are_seen() {
    let folder = tempfile::tempdir().unwrap();
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            "ulimit -n 200; exec \"$0\" \"$@\"",
            KEEL,
            "--state-dir",
        ])
        .arg(folder.path())
        .args(["doctor", "--listen", &free()]);
    let output = shell.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let page = String::from_utf8_lossy(&output.stdout);
    assert!(page.contains("FAIL  open-files        200 "), "{page}");
    assert!(
        page.contains("do:  ulimit -n 4352, or LimitNOFILE=4352"),
        "{page}"
    );
}
