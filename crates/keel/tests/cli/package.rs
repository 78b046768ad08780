//! Contents of the package besides the binary: a page of the manual for each command, completions,
//! and a valid systemd service.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

fn text(args: &[&str]) -> String {
    let output = Command::new(KEEL).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Commands that the help of a command lists: all of `keel` in groups, others under one title.
fn commands(of: &[&str]) -> Vec<String> {
    let help = text(&[of, &["-h"]].concat());
    let title = if of.is_empty() {
        "Machines:\n"
    } else {
        "Commands:\n"
    };
    let list = help.split_once(title).map_or("", |(_, list)| list);
    let ends = ["Arguments:", "Options:", "`"];
    list.lines()
        .take_while(|line| !ends.iter().any(|end| line.starts_with(end)))
        // Titles are not indented; a deeper indentation continues the line above.
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_command_has_its_page() {
    let folder = tempfile::tempdir().unwrap();
    text(&["man", folder.path().to_str().unwrap()]);
    let top = commands(&[]);
    for expected in ["run", "move", "set", "cp", "apply", "logs", "doctor", "man"] {
        assert!(top.iter().any(|name| name == expected), "{top:?}");
    }
    let mut expected = BTreeSet::from(["keel.1".to_owned()]);
    for name in &top {
        expected.insert(format!("keel-{name}.1"));
        for inner in commands(&[name]) {
            expected.insert(format!("keel-{name}-{inner}.1"));
        }
    }
    let found: BTreeSet<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with("help.1") && !name.contains("-help-"))
        .collect();
    assert_eq!(found, expected);
    for name in &found {
        let page = std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(page.contains(".TH ") && page.contains(".SH NAME"), "{name}");
        // Internal commands have no pages.
        assert!(!page.contains("keel\\-worker"), "{name}");
    }
    let refused = Command::new(KEEL)
        .args(["man", "/no/such/folder"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && error.contains("/no/such/folder"),
        "{error}"
    );
}

#[test]
fn completions_know_each_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&["completions", shell]);
        for name in commands(&[]) {
            assert!(script.contains(&name), "{shell}: {name}");
        }
    }
}

#[test]
fn the_service_is_one_that_systemd_understands() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/keel.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    for line in [
        // Machines outlive the agent, in groups of their own, which it must be able to create.
        "KillMode=process",
        "Delegate=yes",
        "DelegateSubgroup=keel-agent",
        "OOMPolicy=continue",
        "Restart=always",
    ] {
        assert!(unit.lines().any(|found| found == line), "{line}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keel.service");
    std::fs::write(&path, unit.replace("/usr/bin/keel", KEEL)).unwrap();
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&path)
        .output();
    let Ok(verified) = verified else {
        eprintln!("not tested: systemd-analyze is not here");
        return;
    };
    let said = String::from_utf8_lossy(&verified.stderr);
    // It succeeds even if it ignores settings; it may not know newer ones of this unit.
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("keel.service"))
        .filter(|line| !line.contains("Unknown key 'DelegateSubgroup'"))
        .collect();
    assert!(verified.status.success() && complaints.is_empty(), "{said}");
}
