//! What a change must pass.

use crate::command::{cargo, check, has};
use crate::{licences, suite};
use anyhow::Result;

pub(crate) fn run() -> Result<()> {
    check(cargo().args(["fmt", "--all", "--check"]))?;
    check(
        cargo()
            .args(["clippy", "--release", "--workspace", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )?;
    check(
        cargo()
            .args(["clippy", "--release", "--workspace", "--all-targets"])
            .args(suite::FAILPOINTS)
            .args(["--", "-D", "warnings"]),
    )?;
    check(
        cargo()
            .args(["doc", "--release", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    if has("cargo-deny") {
        check(cargo().args(["deny", "check", "licenses", "bans", "sources"]))?;
    } else {
        licences::check()?;
    }
    suite::run(&[])
}
