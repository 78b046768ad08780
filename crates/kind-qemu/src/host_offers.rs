//! The processors that this host can give to systems, and whether it can give them a display: its QEMU
//! says it, for each accelerator.
//!
//! It is asked once for each version of the program and each start of the host, in less than 100 ms;
//! the answer is kept in a file, which the workers read. Whether KVM works at all is found by
//! [`crate::accelerator`].

use crate::accelerator::boot_id;
use crate::bare_qemu::ask;
use crate::display;
use crate::process::{QEMU, program_file};
use crate::processor::{Accelerator, Processor, is_vendor, known_features};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The file, among compiled code, that has the answer.
const CACHED: &str = "qemu-offers.json";

/// The answer, and what it holds for.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    of: Program,
    offers: Offers,
}

/// What this host can give to systems.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offers {
    pub(crate) processors: Vec<Processor>,
    pub(crate) has_display: bool,
}

/// One version of the program, on a host that was started once.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Program {
    boot: String,
    file: (u64, u64, i64, i64, u64),
    accelerator: Accelerator,
}

/// The answer to `query-cpu-model-expansion`.
#[derive(Debug, Deserialize)]
struct Expansion {
    model: Model,
}

/// A part of the answer to `qom-list-types`.
#[derive(Debug, Deserialize)]
struct Type {}

#[derive(Debug, Deserialize)]
struct Model {
    props: Map<String, Value>,
}

/// What this host can give: with KVM, if guests run with it, and translated. Blocks; `cache` keeps
/// the answer.
///
/// # Errors
/// If QEMU is not installed, or does not say it.
pub(crate) fn of_host(cache: &Path) -> Result<Offers, String> {
    let program = program_file().ok_or_else(|| format!("{QEMU} is not installed"))?;
    let file = fs::metadata(&program).map_err(|error| format!("{}: {error}", program.display()))?;
    let best = Accelerator::of_host(cache);
    let of = Program {
        boot: boot_id(),
        file: (
            file.dev(),
            file.ino(),
            file.mtime(),
            file.mtime_nsec(),
            file.size(),
        ),
        accelerator: best,
    };
    let path = cache.join(CACHED);
    let kept = fs::read(&path).ok();
    let kept: Option<Kept> = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if let Some(kept) = kept.filter(|kept| kept.of == of) {
        return Ok(kept.offers);
    }
    let mut processors = vec![asked(Accelerator::Tcg)?];
    if best == Accelerator::Kvm {
        processors.insert(0, asked(Accelerator::Kvm)?);
    }
    let has_display = has_display()?;
    let offers = Offers {
        processors,
        has_display,
    };
    let kept = Kept { of, offers };
    if let Err(error) = keep(&path, &kept) {
        tracing::warn!(%error, "{} cannot be written", path.display());
    }
    Ok(kept.offers)
}

/// Checks that this host can give a processor. Blocks, as [`of_host`].
///
/// # Errors
/// What it lacks, in a sentence.
pub(crate) fn check(processor: &Processor, cache: &Path) -> Result<(), String> {
    match processor.lacking_in(&of_host(cache)?.processors) {
        Some(lacking) => Err(lacking),
        None => Ok(()),
    }
}

/// Writes a file that others may read meanwhile.
fn keep(path: &Path, kept: &Kept) -> io::Result<()> {
    let mut new = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(path))?;
    new.write_all(&serde_json::to_vec(kept)?)?;
    new.persist(path)?;
    Ok(())
}

/// What QEMU can give with an accelerator.
fn asked(accelerator: Accelerator) -> Result<Processor, String> {
    let told = ask(&["-accel", accelerator.word()], |qmp| {
        // All that can be moved, by its migration-safe names.
        let all = json!({ "type": "static", "model": { "name": "max" } });
        qmp.query_with::<Expansion>("query-cpu-model-expansion", all)
    });
    let told = told.map_err(|error| format!("{QEMU} does not say its processors: {error}"))?;
    Ok(processor(accelerator, &told.model.props))
}

/// Whether QEMU has a graphics card and a server for viewers: distributions leave them out of some.
fn has_display() -> Result<bool, String> {
    ask(&["-accel", Accelerator::Tcg.word()], |qmp| {
        let card = json!({ "implements": display::CARD });
        let cards: Vec<Type> = qmp.query_with("qom-list-types", card)?;
        let server = qmp.query::<Value>("query-vnc");
        Ok(!cards.is_empty() && server.is_ok())
    })
}

/// A processor, from the properties that QEMU tells.
fn processor(accelerator: Accelerator, props: &Map<String, Value>) -> Processor {
    let is_there = |name: &&str| props.get(*name) == Some(&Value::Bool(true));
    let vendor = props.get("vendor").and_then(Value::as_str);
    // Some are padded.
    let vendor = vendor.map(str::trim).filter(|vendor| is_vendor(vendor));
    Processor {
        accelerator,
        vendor: match accelerator {
            Accelerator::Kvm => vendor.map(str::to_owned),
            // That of QEMU's models.
            Accelerator::Tcg => None,
        },
        features: known_features()
            .filter(is_there)
            .map(str::to_owned)
            .collect(),
    }
}

/// Lets a host offer this, for tests.
#[cfg(test)]
pub(crate) fn replace(cache: &Path, offers: Offers) {
    let path = cache.join(CACHED);
    let kept: Kept = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    keep(&path, &Kept { offers, ..kept }).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::is_installed;

    #[test]
    fn the_answer_is_kept_until_the_program_is_another_one() {
        if !is_installed() {
            eprintln!("skipped: {QEMU} is not installed");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        // (KVM is looked up in a folder of its own: what is known of it is kept there.)
        let found = of_host(folder.path()).unwrap();
        // That of Debian has one.
        assert!(found.has_display);
        let translated = found.processors.last().unwrap();
        assert_eq!(translated.accelerator, Accelerator::Tcg);
        // Since QEMU 7.2, and never: see "TCG: AVX" in its change log.
        assert!(translated.features.contains("avx2"), "{translated:?}");
        assert!(!translated.features.contains("avx512f"), "{translated:?}");
        translated.check().unwrap();
        let path = folder.path().join(CACHED);
        let mut kept: Kept = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        kept.offers = Offers::default();
        keep(&path, &kept).unwrap();
        let read = of_host(folder.path());
        assert_eq!(read, Ok(Offers::default()), "the file is read");
        kept.of.file.2 += 1;
        keep(&path, &kept).unwrap();
        assert_eq!(of_host(folder.path()).as_ref(), Ok(&found));
        fs::write(&path, "{").unwrap();
        assert_eq!(of_host(folder.path()).as_ref(), Ok(&found));
    }

    #[test]
    fn properties_become_features_if_they_are_known_and_true() {
        let props = json!({
            "avx": true, "avx2": false, "vmx": true, "family": 15, "vendor": "GenuineIntel",
        });
        let props = props.as_object().unwrap();
        let found = processor(Accelerator::Kvm, props);
        assert_eq!(found.vendor.as_deref(), Some("GenuineIntel"));
        assert_eq!(found.features.into_iter().collect::<Vec<_>>(), ["avx"]);
        assert_eq!(processor(Accelerator::Tcg, props).vendor, None);
        for (told, vendor) in [("  Shanghai  ", Some("Shanghai")), ("VIA VIA VIA ", None)] {
            let props = json!({ "vendor": told });
            let found = processor(Accelerator::Kvm, props.as_object().unwrap());
            assert_eq!(found.vendor.as_deref(), vendor);
            found.check().unwrap();
        }
    }
}
