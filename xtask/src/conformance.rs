//! The public WASI test-suite (WebAssembly/wasi-testsuite, branch prod/testsuite-all): each
//! prebuilt preview-1 module, plain, instrumented and shaken, compared with its expectations.

use crate::command::{self, Finished};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Folders of the suite with preview-1 modules, by their names here.
const FOLDERS: [(&str, &str); 4] = [
    (
        "assemblyscript",
        "tests/assemblyscript/testsuite/wasm32-wasip1",
    ),
    ("c", "tests/c/testsuite/wasm32-wasip1"),
    ("rust", "tests/rust/testsuite/wasm32-wasip1"),
    ("threads", "tests/proposals/wasi-threads"),
];

/// Time limit of one test.
const LIMIT: Duration = Duration::from_secs(60);

/// Requested safepoints a second of a shaken test.
const RATE: &str = "5000";

#[derive(Deserialize)]
struct Deviations {
    #[serde(default)]
    deviation: Vec<Deviation>,
}

#[derive(Deserialize)]
struct Deviation {
    test: String,
    reason: String,
}

/// The older format of the file with a test's expectations.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Expectations {
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    dirs: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    exit_code: i32,
    stdout: Option<String>,
    stderr: Option<String>,
}

struct Test {
    name: String,
    module: PathBuf,
    expectations: Expectations,
}

#[derive(Clone, Copy)]
enum Mode {
    Plain,
    Instrumented,
    Shaken,
}

const MODES: [(Mode, &str); 3] = [
    (Mode::Plain, "plain"),
    (Mode::Instrumented, "instrumented"),
    (Mode::Shaken, "shaken"),
];

/// With `volumes`, tests get copies of their folders in volumes.
pub(crate) fn run(suite: &Path, only: Option<&str>, times: u32, volumes: bool) -> Result<()> {
    let file = command::root().join("xtask/conformance.toml");
    let deviations: Deviations = toml::from_str(&std::fs::read_to_string(file)?)?;
    let reasons: BTreeMap<&str, &str> = deviations
        .deviation
        .iter()
        .map(|deviation| (deviation.test.as_str(), deviation.reason.as_str()))
        .collect();
    let keel = command::keel()?;
    let tests: Vec<Test> = find(suite)?
        .into_iter()
        .filter(|test| only.is_none_or(|only| test.name.contains(only)))
        .collect();
    ensure!(
        !tests.is_empty(),
        "{}: no tests (is it branch prod/testsuite-all?)",
        suite.display()
    );
    let mut tally = Tally::default();
    println!(
        "{:<56} {:<13} {:<13} shaken",
        "test", "plain", "instrumented"
    );
    for test in &tests {
        let mut cells = Vec::new();
        let mut differs = Vec::new();
        let before = tally.captures;
        for (mode, label) in MODES {
            let runs = if matches!(mode, Mode::Shaken) {
                times
            } else {
                1
            };
            let failure = (0..runs).find_map(|seed| {
                differences(&keel, test, (mode, volumes), seed, &mut tally.captures)
                    .unwrap_or_else(|error| Some(format!("{error:#}")))
            });
            let listed = reasons.contains_key(test.name.as_str());
            cells.push(match (&failure, listed) {
                (None, _) => "pass",
                (Some(_), true) => "listed",
                (Some(_), false) => "FAIL",
            });
            tally.count(label, failure.is_none(), listed);
            differs.extend(failure.map(|failure| format!("{label}: {failure}")));
        }
        tally.captured += u32::from(tally.captures > before);
        println!(
            "{:<56} {:<13} {:<13} {}",
            test.name, cells[0], cells[1], cells[2]
        );
        match reasons.get(test.name.as_str()) {
            Some(reason) if !differs.is_empty() => println!("    {reason}"),
            Some(_) => tally.stale.push(test.name.clone()),
            None => differs.iter().for_each(|what| println!("    {what}")),
        }
    }
    if only.is_none() {
        let known: BTreeSet<&str> = tests.iter().map(|test| test.name.as_str()).collect();
        let unknown = reasons.keys().filter(|name| !known.contains(*name));
        tally.stale.extend(unknown.map(|name| (*name).to_owned()));
    }
    tally.report(tests.len())
}

#[derive(Default)]
struct Tally {
    /// By mode: passed, listed, failed.
    counts: BTreeMap<&'static str, [u32; 3]>,
    captures: u64,
    /// Tests that were captured at least once.
    captured: u32,
    /// Listed as different, but equal.
    stale: Vec<String>,
}

impl Tally {
    fn count(&mut self, mode: &'static str, passed: bool, listed: bool) {
        let place = match (passed, listed) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        };
        self.counts.entry(mode).or_default()[place] += 1;
    }

    fn report(&self, tests: usize) -> Result<()> {
        println!();
        for (_, mode) in MODES {
            let [passed, listed, failed] = self.counts.get(mode).copied().unwrap_or_default();
            println!(
                "{mode:<13} {passed} of {tests} pass, {listed} differ as listed, {failed} fail"
            );
        }
        println!("{} captures, in {} tests", self.captures, self.captured);
        let failed: u32 = self.counts.values().map(|counts| counts[2]).sum();
        if !self.stale.is_empty() {
            bail!(
                "listed in xtask/conformance.toml but not different: {}",
                self.stale.join(", ")
            );
        }
        ensure!(
            failed == 0,
            "{failed} runs differ from the suite's expectations"
        );
        Ok(())
    }
}

fn find(suite: &Path) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for (label, folder) in FOLDERS {
        let folder = suite.join(folder);
        let entries = std::fs::read_dir(&folder)
            .with_context(|| format!("no folder {} in the suite", folder.display()))?;
        let mut modules = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "wasm") {
                modules.push(path);
            }
        }
        modules.sort();
        for module in modules {
            let name = module.file_stem().unwrap_or_default().to_string_lossy();
            let specification = module.with_extension("json");
            let expectations = if specification.exists() {
                serde_json::from_slice(&std::fs::read(&specification)?)
                    .with_context(|| format!("{}", specification.display()))?
            } else {
                Expectations::default()
            };
            tests.push(Test {
                name: format!("{label}/{name}"),
                module,
                expectations,
            });
        }
    }
    Ok(tests)
}

/// Runs a test in a fresh copy of its folders; `None` if the results are as expected.
fn differences(
    keel: &Path,
    test: &Test,
    (mode, volumes): (Mode, bool),
    seed: u32,
    captures: &mut u64,
) -> Result<Option<String>> {
    let scratch = tempfile::tempdir()?;
    let wanted = &test.expectations;
    let mut command = Command::new(keel);
    command.arg("wasm");
    match mode {
        Mode::Plain => {
            command.arg("--plain");
        }
        Mode::Instrumented => {}
        Mode::Shaken => {
            command.args(["--shake", RATE, "--seed", &seed.to_string()]);
        }
    }
    for (name, value) in &wanted.env {
        command.arg("--env").arg(format!("{name}={value}"));
    }
    for name in &wanted.dirs {
        let host = scratch.path().join(name);
        let original = test.module.with_file_name(name);
        copy(&original, &host).with_context(|| format!("{}", original.display()))?;
        command
            .arg(if volumes { "--copy" } else { "--dir" })
            .arg(format!("{}::{name}", host.display()));
    }
    command.arg(&test.module).args(&wanted.args);
    let finished = command::finish(&mut command, LIMIT)?;
    Ok(compare(wanted, &finished, captures))
}

fn compare(wanted: &Expectations, finished: &Finished, captures: &mut u64) -> Option<String> {
    // The summary of `--shake` is not output of the program.
    let (ours, theirs): (Vec<&str>, Vec<&str>) = finished
        .stderr
        .split_inclusive('\n')
        .partition(|line| line.starts_with("keel: ") && line.contains(" captures, "));
    let count = |line: &&str| {
        line.split(' ')
            .nth(1)
            .and_then(|word| word.parse::<u64>().ok())
    };
    *captures += ours.iter().filter_map(count).sum::<u64>();
    let stderr = theirs.concat();
    if finished.code != Some(wanted.exit_code) {
        return Some(format!(
            "exit code {:?}, not {}: {}",
            finished.code,
            wanted.exit_code,
            stderr.trim_end()
        ));
    }
    let stdout = String::from_utf8_lossy(&finished.stdout);
    for (what, wanted, is) in [
        ("output", &wanted.stdout, &*stdout),
        ("error output", &wanted.stderr, &*stderr),
    ] {
        if let Some(wanted) = wanted
            && wanted != is
        {
            return Some(format!("{what} {is:?}, not {wanted:?}"));
        }
    }
    None
}

/// Copies a folder, without the remains of earlier runs (`*.cleanup`).
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&source, &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(&source)?, &target)?;
        } else if source.extension().is_none_or(|end| end != "cleanup") {
            std::fs::copy(&source, &target)?;
        }
    }
    Ok(())
}
