//! Guest programs: built from `guests/` by zig, and stored beside their sources.
//!
//! `guests/MANIFEST` has a line for each: its name, the BLAKE3 hash of its module and that of all
//! its sources. A test compares them, and so detects a changed source without a new build, or a
//! changed module. Only a build can prove that the module comes from the sources; the test makes
//! one if this version of zig is installed.

use crate::command::{check, root};
use anyhow::{Context, Result, ensure};
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// The compiler (PyPI `ziglang`) that made the modules.
const ZIG: &str = "0.17.0";

/// The largest module that is stored in the repository.
const BYTES_MAX: u64 = 300 << 10;

const SHIM: [&str; 3] = ["shim/pthread.h", "shim/pthread.c", "shim/start.S"];

/// Name of each guest, and sources beside `build.sh` and `NAME.c`.
fn guests() -> Vec<(&'static str, Vec<&'static str>)> {
    let with_shim = |more: &[&'static str]| SHIM.iter().chain(more).copied().collect();
    vec![
        ("counter", vec!["counter.c"]),
        ("disk", vec!["disk.c"]),
        ("echo", vec!["echo.c"]),
        ("ep", with_shim(&["ep.c"])),
        ("files", vec!["files.c"]),
        ("hostile", vec!["hostile.c", "keep_names.py"]),
        ("hot", vec!["hot.c"]),
        ("ledger", vec!["ledger.c"]),
        ("mapreduce", with_shim(&["mapreduce.c"])),
        ("matrix", with_shim(&["matrix.c"])),
        ("pipeline", with_shim(&["pipeline.c"])),
        ("render", with_shim(&["render.c"])),
        ("spinner", vec!["spinner.c"]),
        ("stamp", vec!["stamp.c"]),
        ("stencil", with_shim(&["stencil.c"])),
        ("store", with_shim(&["store.c"])),
        ("threads", with_shim(&["threads.c"])),
        ("witness", vec!["witness.c", "evenkeel.h"]),
        ("writer", vec!["writer.c"]),
        ("zstd", with_shim(&["zstd/main.c", "zstd/build.sh"])),
    ]
}

/// Builds guests and writes the manifest.
pub(crate) fn build(names: &[String]) -> Result<()> {
    let folder = root().join("guests");
    for name in names {
        ensure!(
            guests().iter().any(|(guest, _)| guest == name),
            "there is no guest {name:?}"
        );
    }
    ensure!(
        zig_version().as_deref() == Some(ZIG),
        "the guests are built by zig {ZIG}: pip install ziglang=={ZIG}"
    );
    check(Command::new(folder.join("build.sh")).args(names))?;
    for (name, _) in guests() {
        let bytes = std::fs::metadata(folder.join(name).with_extension("wasm"))?.len();
        ensure!(bytes <= BYTES_MAX, "{name}.wasm has {bytes} bytes");
    }
    std::fs::write(folder.join("MANIFEST"), manifest(&folder)?)?;
    Ok(())
}

/// Version of the installed zig, if any.
fn zig_version() -> Option<String> {
    let output = Command::new("python3")
        .args(["-m", "ziglang", "version"])
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn manifest(folder: &Path) -> Result<String> {
    let read = |name: &str| {
        std::fs::read(folder.join(name)).with_context(|| format!("cannot read guests/{name}"))
    };
    let mut text = String::from("# guest, BLAKE3 of its module, BLAKE3 of its sources\n");
    for (name, sources) in guests() {
        let mut hasher = blake3::Hasher::new();
        hasher.update(ZIG.as_bytes());
        for source in std::iter::once("build.sh").chain(sources) {
            let bytes = read(source)?;
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(&bytes);
        }
        let module = blake3::hash(&read(&format!("{name}.wasm"))?);
        writeln!(text, "{name} {module} {}", hasher.finalize())?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_belong_to_their_sources() -> Result<()> {
        let folder = root().join("guests");
        let noted = std::fs::read_to_string(folder.join("MANIFEST"))?;
        assert_eq!(
            noted,
            manifest(&folder)?,
            "guests/MANIFEST is out of date: run `cargo xtask guests`"
        );
        Ok(())
    }

    #[test]
    fn a_build_gives_the_same_modules() -> Result<()> {
        if zig_version().as_deref() != Some(ZIG) {
            println!("zig {ZIG} is not installed: only the manifest was compared");
            return Ok(());
        }
        let (kept, built) = (root().join("guests"), tempfile::tempdir()?);
        check(Command::new(kept.join("build.sh")).env("OUT", built.path()))?;
        for (name, _) in guests() {
            let module = format!("{name}.wasm");
            let (kept, built) = (kept.join(&module), built.path().join(&module));
            assert!(
                std::fs::read(kept)? == std::fs::read(built)?,
                "{module} differs from a build of its sources"
            );
        }
        Ok(())
    }
}
