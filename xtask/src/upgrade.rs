//! Builds an earlier revision and runs the tests of a cluster in which it and this one work
//! together: `crates/keel/tests/cluster/upgrade.rs`, with `KEEL_OLDER`.

use crate::command::{cargo, check, root};
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// The test that needs an earlier binary.
const TEST: &str = "upgrade::an_earlier_version_works_beside_this_one";

pub(crate) fn run(from: &str) -> Result<()> {
    let root = root();
    let folder = root.join("target/older");
    let source = folder.join("source");
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        command.current_dir(&root).args(args);
        command
    };
    let named = source.to_str().context("a path that is no text")?;
    if source.exists() {
        check(&mut git(&["worktree", "remove", "--force", named]))?;
    }
    check(&mut git(&["worktree", "add", "--detach", named, from]))?;
    // Of its own: cargo takes crates of the same name in another work tree for these.
    let target = folder.join("target");
    let build = ["build", "--release", "--workspace"];
    let mut older = cargo();
    older.current_dir(&source).env("CARGO_TARGET_DIR", &target);
    check(older.args(build))?;
    let keel = folder.join("keel");
    std::fs::copy(target.join("release/keel"), &keel).context("the earlier binary")?;
    check(&mut git(&["worktree", "remove", "--force", named]))?;
    ensure!(keel.exists(), "there is no earlier binary");
    check(cargo().args(build))?;
    let filter = format!("test(={TEST})");
    let run = ["nextest", "run", "--release", "--workspace", "-E", &filter];
    check(cargo().args(run).env("KEEL_OLDER", &keel))
}
