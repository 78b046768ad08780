//! What an agent asks of this kind of machine.

use crate::spec::{THREADS_MAX, WasmSpec};
use keel_machine::kind::{Abilities, Difference, Kind, KindName, WorkerFolders};
use keel_machine::spec::Spec;
use keel_wasm::memory::{DirtyTracker, GuestMemory, PageFaults, bytes_of_process};
use keel_wasm::runtime::program_of_code;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

/// The name of this kind.
const NAME: &str = "wasm";

/// WebAssembly programs.
#[derive(Debug, Clone, Copy, Default)]
pub struct WasmKind;

impl WasmKind {
    /// The name of this kind.
    pub fn kind_name() -> KindName {
        match NAME.parse() {
            Ok(name) => name,
            Err(_) => unreachable!("a valid name"),
        }
    }
}

/// A memory to try the kernel's features with.
fn probe() -> Option<Arc<GuestMemory>> {
    GuestMemory::new(1, Some(1), false, 1 << 16)
        .ok()
        .map(Arc::new)
}

impl Kind for WasmKind {
    fn name(&self) -> KindName {
        WasmKind::kind_name()
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            spans: true,
            post_copy: true,
            compiles: true,
            keeps_images: false,
            checkpoints: true,
            restarts_from_checkpoints: true,
            restores_lazily: true,
            changes_memory: true,
            executes: false,
            has_console: false,
        }
    }

    fn check(&self, spec: &Spec) -> Result<(), String> {
        let own = WasmSpec::of(spec)?;
        if own.threads_max == 0 || own.threads_max > THREADS_MAX {
            return Err(format!(
                "a limit of {} threads: 1 to {THREADS_MAX} are possible",
                own.threads_max
            ));
        }
        if own.args.is_empty() {
            return Err("no program name: the first argument is missing".into());
        }
        Ok(())
    }

    fn images(&self, spec: &Spec) -> Result<Vec<String>, String> {
        Ok(vec![WasmSpec::of(spec)?.module])
    }

    fn image_bytes_max(&self) -> u64 {
        keel_wasm::instrument::MODULE_BYTES_MAX as u64
    }

    fn check_image(&self, beginning: &[u8]) -> Result<(), String> {
        match beginning.starts_with(b"\0asm") {
            true => Ok(()),
            false => Err("that is not a WebAssembly module (it does not begin with \\0asm)".into()),
        }
    }

    fn summary(&self, spec: &Spec) -> String {
        WasmSpec::of(spec).map_or_else(|reason| reason, |own| own.args.join(" "))
    }

    fn shown(&self, spec: &Spec) -> serde_json::Value {
        match WasmSpec::of(spec) {
            Ok(own) => {
                // The values are private to the machine.
                let names: Vec<&str> = own.env.iter().map(|(name, _)| name.as_str()).collect();
                json!({
                    "module": own.module,
                    "args": own.args,
                    "environment": names,
                    "threads_max": own.threads_max,
                })
            }
            Err(reason) => json!({ "unreadable": reason }),
        }
    }

    fn differences(&self, old: &Spec, new: &Spec) -> Vec<Difference> {
        let (old, new) = match (WasmSpec::of(old), WasmSpec::of(new)) {
            (Ok(old), Ok(new)) => (old, new),
            (old, new) => {
                let text = |spec: Result<WasmSpec, String>| match spec {
                    Ok(_) => "readable".to_owned(),
                    Err(reason) => reason,
                };
                return vec![difference("spec", text(old), text(new))];
            }
        };
        let hash = |own: &WasmSpec| own.module.get(..12).unwrap_or(&own.module).to_owned();
        let args = |own: &WasmSpec| format!("{:?}", own.args);
        let threads = |own: &WasmSpec| own.threads_max.to_string();
        let mut differences = vec![
            difference("module", hash(&old), hash(&new)),
            difference("args", args(&old), args(&new)),
        ];
        differences.extend(env_differences(&old.env, &new.env));
        differences.push(difference("threads", threads(&old), threads(&new)));
        differences.retain(|it| it.old != it.new);
        differences
    }

    fn missing_for_moves(&self) -> Option<String> {
        let tracker = DirtyTracker::start(probe()?).ok()?;
        let missing = tracker.missing()?;
        Some(format!(
            "{missing} Until then writes are found by hashing, which is slower."
        ))
    }

    fn missing_for_post_copy(&self) -> Option<String> {
        PageFaults::start(probe()?, true)
            .err()
            .map(|missing| missing.to_string())
    }

    fn memory_bytes(&self, process: &Path) -> Option<u64> {
        bytes_of_process(process)
    }

    fn program_of_code(&self, file_name: &str) -> Option<String> {
        program_of_code(file_name).map(str::to_owned)
    }

    fn compile(&self, cache: &Path, program: &Path, wanted: bool) -> Result<(), String> {
        crate::worker::compile(cache, program, wanted)
    }

    fn run_worker(&self, folders: &WorkerFolders) -> Result<(), String> {
        crate::worker::run(folders)
    }
}

fn difference(field: &str, old: String, new: String) -> Difference {
    Difference {
        field: field.to_owned(),
        old,
        new,
    }
}

/// Differences between two environments, of which only names are shown.
fn env_differences(old: &[(String, String)], new: &[(String, String)]) -> Vec<Difference> {
    let table =
        |env: &[(String, String)]| -> BTreeMap<String, String> { env.iter().cloned().collect() };
    let (old, new) = (table(old), table(new));
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changed = names.into_iter().filter_map(|name| {
        let (before, after) = match (old.get(name), new.get(name)) {
            (Some(old), Some(new)) if old == new => return None,
            (Some(_), Some(_)) => ("a value", "another value"),
            (None, _) => ("none", "a value"),
            (_, None) => ("a value", "none"),
        };
        let field = format!("env {name}");
        Some(difference(&field, before.to_owned(), after.to_owned()))
    });
    changed.collect()
}
