//! Checks the licences of dependencies against `deny.toml`, in the format of cargo-deny, but
//! without that tool.

use crate::command::{cargo, root};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::collections::BTreeSet;

#[derive(Deserialize)]
struct Deny {
    licenses: Licences,
}

#[derive(Deserialize)]
struct Licences {
    allow: Vec<String>,
    #[serde(default)]
    exceptions: Vec<Exception>,
}

/// What is allowed for one crate besides.
#[derive(Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    package: String,
    allow: Vec<String>,
}

impl Licences {
    /// What is allowed for a package: its name and version, as `cargo tree` prints them.
    fn allowed(&self, package: &str) -> Vec<String> {
        let name = package.split_whitespace().next();
        let exceptions = self.exceptions.iter();
        let exceptions = exceptions.filter(|it| name == Some(it.package.as_str()));
        let exceptions = exceptions.flat_map(|it| &it.allow);
        self.allow.iter().chain(exceptions).cloned().collect()
    }
}

pub(crate) fn check() -> Result<()> {
    let deny: Deny = toml::from_str(&std::fs::read_to_string(root().join("deny.toml"))?)?;
    // Packages that are built here: the lock file also lists those that no enabled feature needs.
    let output = cargo()
        .args(["tree", "--workspace", "--quiet", "--edges", "all"])
        .args(["--prefix", "none", "--format", "{p}|{l}"])
        .output()?;
    ensure!(
        output.status.success(),
        "cargo tree: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    let packages: BTreeSet<&str> = text
        .lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| line.contains('|'))
        .collect();
    let mut refused = Vec::new();
    for (package, licence) in packages.iter().filter_map(|line| line.rsplit_once('|')) {
        if !allows(licence, &deny.licenses.allowed(package)).with_context(|| package.to_owned())? {
            refused.push(format!("{package}: {licence}"));
        }
    }
    ensure!(!packages.is_empty(), "cargo tree names no packages");
    if refused.is_empty() {
        println!("licences of {} packages are allowed", packages.len());
        return Ok(());
    }
    bail!("not allowed by deny.toml:\n  {}", refused.join("\n  "))
}

/// Whether an SPDX expression can be satisfied. `A/B` is an old form of `OR`.
fn allows(expression: &str, allowed: &[String]) -> Result<bool> {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let mut words: Vec<&str> = spaced.split_whitespace().rev().collect();
    let met = any(&mut words, allowed)?;
    ensure!(words.is_empty(), "licence {expression:?} cannot be read");
    Ok(met)
}

fn any(words: &mut Vec<&str>, allowed: &[String]) -> Result<bool> {
    let mut met = all(words, allowed)?;
    while words.last() == Some(&"OR") {
        words.pop();
        met |= all(words, allowed)?;
    }
    Ok(met)
}

fn all(words: &mut Vec<&str>, allowed: &[String]) -> Result<bool> {
    let mut met = one(words, allowed)?;
    while words.last() == Some(&"AND") {
        words.pop();
        met &= one(words, allowed)?;
    }
    Ok(met)
}

fn one(words: &mut Vec<&str>, allowed: &[String]) -> Result<bool> {
    let word = words.pop().context("a licence ends early")?;
    if word == "(" {
        let met = any(words, allowed)?;
        ensure!(words.pop() == Some(")"), "a licence lacks a parenthesis");
        return Ok(met);
    }
    let mut name = word.to_owned();
    if words.last() == Some(&"WITH") {
        words.pop();
        let exception = words.pop().context("a licence ends early")?;
        name = format!("{name} WITH {exception}");
    }
    Ok(allowed.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::allows;

    #[test]
    fn an_exception_is_for_one_crate() {
        let text = r#"
            [licenses]
            allow = ["MIT"]
            exceptions = [{ crate = "foca", allow = ["MPL-2.0"] }]
        "#;
        let deny: super::Deny = toml::from_str(text).expect("valid");
        let of = |package: &str| deny.licenses.allowed(package);
        assert_eq!(of("foca v2.0.0"), ["MIT", "MPL-2.0"]);
        assert_eq!(of("focal v2.0.0"), ["MIT"]);
    }

    #[test]
    fn reads_expressions() {
        let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        for (expression, met) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("GPL-3.0 OR MIT", true),
            ("GPL-3.0/MIT", true),
            ("GPL-3.0 AND MIT", false),
            ("(GPL-3.0 OR MIT) AND ISC", true),
            ("Apache-2.0", false),
            ("Apache-2.0 WITH LLVM-exception OR GPL-3.0", true),
        ] {
            assert_eq!(allows(expression, &allowed).ok(), Some(met), "{expression}");
        }
        for bad in ["MIT OR", "(MIT", "MIT MIT", ""] {
            assert!(allows(bad, &allowed).is_err(), "{bad}");
        }
    }
}
