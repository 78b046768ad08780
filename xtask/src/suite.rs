//! The whole test-suite, and what it needs from the system.

use crate::command::{cargo, check, has};
use anyhow::{Result, bail};
use std::process::Command;

/// Programs that tests or builds need, and the Debian packages that have them.
const NEEDED: [(&str, &str); 1] = [("cc", "gcc")];

/// Nodes in tests can be made to fail at any step.
pub(crate) const FAILPOINTS: [&str; 2] = ["--features", "keel/failpoints"];

/// Tests of several nodes, which must hold on slow networks too, and how late each
/// message is there.
const NODES: &str = "t30_cluster";
const DELAY_MS: &str = "30";

/// All tests, or those that the arguments name. Without any, the tests of several
/// nodes come first with every message delayed.
pub(crate) fn run(args: &[String]) -> Result<()> {
    // Of a whole run what failed and why is to be seen at its end, not frames.
    let backtraces = match args.is_empty() {
        true => Some("0".into()),
        false => std::env::var_os("RUST_BACKTRACE"),
    };
    let cargo = || {
        let mut cargo = cargo();
        cargo.envs(backtraces.iter().map(|it| ("RUST_BACKTRACE", it)));
        cargo
    };
    provide()?;
    if args.is_empty() {
        let mut delayed = cargo();
        match has("cargo-nextest") {
            true => delayed
                .args(["nextest", "run", "--release", "--workspace"])
                .args(FAILPOINTS)
                .args(["-E", &format!("binary({NODES})")]),
            false => delayed
                .args(["test", "--release", "--workspace"])
                .args(FAILPOINTS)
                .args(["--test", NODES]),
        };
        check(delayed.env("KEEL_NET_DELAY_MS", DELAY_MS))?;
    }
    if has("cargo-nextest") {
        check(
            cargo()
                .args(["nextest", "run", "--release", "--workspace"])
                .args(FAILPOINTS)
                .args(args),
        )
    } else {
        check(
            cargo()
                .args(["test", "--release", "--workspace"])
                .args(FAILPOINTS)
                .args(args),
        )
    }
}

/// Installs what is missing, or names it.
fn provide() -> Result<()> {
    let packages: Vec<&str> = NEEDED
        .iter()
        .filter(|(program, _)| !has(program))
        .map(|(_, package)| *package)
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    let id = Command::new("id").arg("-u").output()?;
    let is_root = id.stdout.trim_ascii() == b"0";
    if !(is_root && has("apt-get")) {
        bail!("missing: {0} (apt-get install {0})", packages.join(" "));
    }
    check(
        Command::new("apt-get")
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages),
    )
}
