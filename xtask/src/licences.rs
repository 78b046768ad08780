//! Which licences dependencies may have: `deny.toml` says, as for cargo-deny;
//! this checks without it.

use crate::command::{cargo, root};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

#[derive(Deserialize)]
struct Deny {
    licenses: Licences,
}

#[derive(Deserialize)]
struct Licences {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

pub(crate) fn check() -> Result<()> {
    let deny: Deny = toml::from_str(&std::fs::read_to_string(root().join("deny.toml"))?)?;
    let output = cargo()
        .args(["metadata", "--format-version", "1", "--quiet"])
        .output()?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Metadata = serde_json::from_slice(&output.stdout)?;
    let mut refused = Vec::new();
    for package in &metadata.packages {
        let licence = package.license.as_deref().unwrap_or("none named");
        let allowed = allows(licence, &deny.licenses.allow)
            .with_context(|| format!("{} {}", package.name, package.version))?;
        if !allowed {
            refused.push(format!("{} {}: {licence}", package.name, package.version));
        }
    }
    if refused.is_empty() {
        println!(
            "licences of {} packages are allowed",
            metadata.packages.len()
        );
        return Ok(());
    }
    bail!("not allowed by deny.toml:\n  {}", refused.join("\n  "))
}

/// Whether an SPDX expression can be met. (`A/B` is an old way to write `OR`.)
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
