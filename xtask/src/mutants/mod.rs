//! Mutants of what decides which node owns a machine: the commit rule and the voters of the store.
//! Each is one change of the code, for which tests must fail. What can be changed without any test
//! to detect it is not tested.
//!
//! Files are changed in place and restored, so that the rest is compiled once.

mod ownership;
mod voters;

use crate::command::{cargo, root};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;
use std::process::Stdio;

/// One change of a file.
struct Mutant {
    name: &'static str,
    file: &'static str,
    text: &'static str,
    /// Which occurrence of the text, from 0.
    at: usize,
    becomes: &'static str,
}

/// What is changed, and what must detect it.
struct Subject {
    /// The package of the files. It is compiled for each mutant, with little optimisation: that
    /// takes longer than the seeds.
    package: &'static str,
    /// Names of tests, and the arguments of `cargo test` that run them.
    tests: &'static [(&'static str, &'static [&'static str])],
    /// Seeds of a simulation for each mutant.
    seeds: &'static str,
    mutants: &'static [Mutant],
}

const SUBJECTS: [Subject; 2] = [ownership::OWNERSHIP, voters::VOTERS];

/// Restores a file when it is dropped, also after a panic.
struct Original {
    file: &'static str,
    content: String,
}

impl Drop for Original {
    fn drop(&mut self) {
        let file = self.file;
        if let Err(error) = fs::write(file, &self.content) {
            eprintln!("{file} could not be restored ({error}): `git checkout {file}`");
        }
    }
}

/// Runs all mutants, or those whose name contains `only`.
pub(crate) fn run(only: Option<&str>) -> Result<()> {
    // Files are changed here, and tests built where this program was: if that were not the same
    // place, no mutant would be caught.
    let (here, built) = (std::env::current_dir()?, root().canonicalize()?);
    ensure!(
        here.canonicalize()? == built,
        "this program was built in {}: run `cargo xtask mutants` there, or build it here",
        built.display()
    );
    let mut survivors = Vec::new();
    let chosen = |name: &str| only.is_none_or(|part| name.contains(part));
    for subject in &SUBJECTS {
        for mutant in subject.mutants.iter().filter(|it| chosen(it.name)) {
            let caught = subject.caught_by(mutant)?;
            println!(
                "{:<34} {}",
                mutant.name,
                caught.as_deref().unwrap_or("SURVIVES")
            );
            if caught.is_none() {
                survivors.push(mutant.name);
            }
        }
    }
    ensure!(survivors.is_empty(), "not caught: {}", survivors.join(", "));
    Ok(())
}

/// Checks that every mutant can still be applied: one whose text is gone tests nothing.
///
/// # Errors
/// Which cannot, and why.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut gone = Vec::new();
    for mutant in SUBJECTS.iter().flat_map(|subject| subject.mutants) {
        let path = root.join(mutant.file);
        let content = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if let Err(error) = mutant.changed(&content) {
            gone.push(error.to_string());
        }
    }
    ensure!(gone.is_empty(), "mutants: {}", gone.join("; "));
    Ok(())
}

impl Mutant {
    /// The content of its file with the change.
    fn changed(&self, content: &str) -> Result<String> {
        let Mutant {
            name, file, text, ..
        } = self;
        ensure!(*text != self.becomes, "{name} changes nothing");
        let (from, _) = content
            .match_indices(text)
            .nth(self.at)
            .with_context(|| format!("{name}: {text:?} is not in {file} any more"))?;
        let mut changed = content.to_owned();
        changed.replace_range(from..from + text.len(), self.becomes);
        Ok(changed)
    }

    /// Changes its file, until the original is dropped.
    fn apply(&self) -> Result<Original> {
        let file = self.file;
        let content = fs::read_to_string(file)?;
        let changed = self.changed(&content)?;
        let original = Original { file, content };
        fs::write(file, changed)?;
        Ok(original)
    }
}

impl Subject {
    /// The tests that a mutant fails; `None` if all pass.
    fn caught_by(&self, mutant: &Mutant) -> Result<Option<String>> {
        let _original = mutant.apply()?;
        let mut failed = Vec::new();
        for (what, args) in self.tests {
            let mut test = cargo();
            let package = self.package;
            test.args([
                "--config",
                &format!("profile.release.package.{package}.opt-level=1"),
            ])
            .args(["test", "--release"])
            .args(*args)
            .env("KEEL_SIM_SEEDS", self.seeds)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
            let output = test.output()?;
            let said = String::from_utf8_lossy(&output.stdout);
            if said.contains("running 0 tests") && !said.contains("running 1") {
                bail!("{what}: no test ran");
            }
            let said_of_build = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() && said_of_build.contains("could not compile") {
                bail!("{}: it does not compile:\n{said_of_build}", mutant.name);
            }
            if !output.status.success() {
                failed.push(*what);
            }
        }
        Ok((!failed.is_empty()).then(|| failed.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mutant_whose_text_is_gone_is_refused_by_name() {
        let mutant = Mutant {
            name: "older accepted",
            file: "rule.rs",
            text: "a < b",
            at: 1,
            becomes: "a <= b",
        };
        let changed = mutant.changed("a < b; a < b; a < b").unwrap();
        assert_eq!(changed, "a < b; a <= b; a < b");
        let refused = mutant.changed("a < b").unwrap_err().to_string();
        assert!(refused.contains("older accepted"), "{refused}");
        let same = Mutant {
            becomes: "a < b",
            ..mutant
        };
        assert!(same.changed("a < b; a < b").is_err());
    }
}
