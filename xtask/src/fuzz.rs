//! Fuzzing of all decoders by libFuzzer, with coverage feedback, without `cargo-fuzz`: the stable
//! compiler instruments with the same passes.

use crate::command::{cargo, check, root};
use anyhow::{Result, bail, ensure};
use std::path::Path;
use std::process::Command;

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// As `cargo-fuzz` sets them: counters, table of places, values of comparisons.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 -Cdebug-assertions";

/// Inputs of the corpus are at most this long, so that it stays small.
const KEPT_BYTES_MAX: u32 = 192;

/// Fuzzes targets, or all, each for some minutes, two at a time. With `keep`, adds what covers more
/// to the corpus.
pub(crate) fn run(names: &[String], minutes: u64, keep: bool) -> Result<()> {
    let folder = root().join("target/fuzz");
    let seeds = folder.join("seeds");
    // Of the whole workspace: so nothing is compiled again for other features.
    let mut plain = cargo();
    plain.args(["build", "--release", "--workspace", "--bin", "keel-fuzz"]);
    check(&mut plain)?;
    let plain = root().join("target/release/keel-fuzz");
    check(Command::new(plain).arg("--seeds").arg(&seeds))?;
    let mut build = cargo();
    build
        .args([
            "build",
            "--release",
            "--package",
            "keel-fuzz",
            "--bin",
            "keel-fuzz",
        ])
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(&folder)
        .env("RUSTFLAGS", FLAGS)
        .env("CARGO_INCREMENTAL", "0");
    check(&mut build)?;
    let program = folder.join(TRIPLE).join("release/keel-fuzz");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&seeds)? {
        all.push(entry?.file_name().to_string_lossy().into_owned());
    }
    all.sort();
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        bail!(
            "there is no target {unknown:?}; there are {}",
            all.join(", ")
        );
    }
    let chosen = if names.is_empty() { &all[..] } else { names };
    let mut failed = Vec::new();
    for pair in chosen.chunks(2) {
        let mut running = Vec::new();
        for name in pair {
            let found = folder.join("found").join(name);
            std::fs::create_dir_all(&found)?;
            let mut fuzz = fuzzer(&program, name, &folder)?;
            fuzz.arg(seeds.join(name))
                .arg(corpus(name)?)
                .arg(format!("-max_total_time={}", minutes * 60))
                .arg(format!("-artifact_prefix={}/", found.display()))
                .args(["-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=256"])
                .args(["-print_final_stats=1", "-verbosity=0"]);
            println!("fuzzing {name} for {minutes} min");
            running.push((name, fuzz.spawn()?));
        }
        for (name, mut child) in running {
            if !child.wait()?.success() {
                failed.push(name.clone());
            }
        }
    }
    if keep {
        for name in chosen {
            let mut merge = Command::new(&program);
            merge
                .env("KEEL_FUZZ_TARGET", name)
                .args(["-merge=1", "-verbosity=0"])
                .arg(format!("-max_len={KEPT_BYTES_MAX}"))
                .arg(corpus(name)?)
                .arg(seeds.join(name))
                .arg(work(&folder, name)?);
            check(&mut merge)?;
        }
    }
    ensure!(
        failed.is_empty(),
        "inputs that fail are in {}: {}",
        folder.join("found").display(),
        failed.join(", ")
    );
    println!(
        "{} targets, each for {minutes} min: no input fails",
        chosen.len()
    );
    Ok(())
}

/// The fuzzer of a target, which adds what it finds to a folder of its own.
fn fuzzer(program: &Path, name: &str, folder: &Path) -> Result<Command> {
    let mut fuzz = Command::new(program);
    fuzz.env("KEEL_FUZZ_TARGET", name).arg(work(folder, name)?);
    Ok(fuzz)
}

fn work(folder: &Path, name: &str) -> Result<std::path::PathBuf> {
    let work = folder.join("work").join(name);
    std::fs::create_dir_all(&work)?;
    Ok(work)
}

fn corpus(name: &str) -> Result<std::path::PathBuf> {
    let corpus = root().join("fuzz/corpus").join(name);
    std::fs::create_dir_all(&corpus)?;
    Ok(corpus)
}
