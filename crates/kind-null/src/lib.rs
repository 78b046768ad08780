//! Machines of kind `null`: each counts, and writes a line for each number. A move sends the
//! number. They are the smallest machines that there can be, for tests of what every kind shares:
//! life cycle, moves, ownership, checkpoints, drains and balancing.
//!
//! - `counter`: the machine itself
//! - `worker`: the process around it
//! - `session`: its moves, at the source
//! - `keel-null` (`main.rs`): the executable of Evenkeel with this kind registered

#![forbid(unsafe_code)]

mod counter;
mod session;
mod worker;

use keel_machine::kind::{Abilities, Difference, Kind, KindName, KindSpec, WorkerFolders};
use keel_machine::spec::Spec;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The part of a spec that only this kind understands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NullSpec {
    /// A file to which each line is appended too, which every node sees.
    #[serde(default)]
    pub file: Option<String>,
    /// Time between two lines, in microseconds.
    #[serde(default)]
    pub pause_us: u64,
    /// The number at which the machine ends; without it, it counts until it is stopped.
    #[serde(default)]
    pub last: Option<u64>,
    /// Whether it keeps a processor busy between two lines.
    #[serde(default)]
    pub is_busy: bool,
}

impl NullSpec {
    /// The part of a spec.
    ///
    /// # Errors
    /// A message that names the field that is unknown or wrong.
    pub fn of(spec: &Spec) -> Result<Self, String> {
        spec.kind_spec
            .decode()
            .map_err(|error| format!("the spec of a machine of kind null: {error}"))
    }

    /// The part for a spec.
    ///
    /// # Errors
    /// Never for a value of this type; the message of the encoder.
    pub fn to_kind_spec(&self) -> Result<KindSpec, String> {
        KindSpec::new(self)
    }
}

/// Machines that count.
#[derive(Debug, Clone, Copy, Default)]
pub struct NullKind;

impl NullKind {
    /// The name of this kind.
    pub fn kind_name() -> KindName {
        match "null".parse() {
            Ok(name) => name,
            Err(_) => unreachable!("a valid name"),
        }
    }
}

impl Kind for NullKind {
    fn name(&self) -> KindName {
        NullKind::kind_name()
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            checkpoints: true,
            restarts_from_checkpoints: true,
            changes_memory: true,
            ..Abilities::default()
        }
    }

    fn check(&self, spec: &Spec) -> Result<(), String> {
        NullSpec::of(spec)?;
        let field = match spec {
            Spec { volumes, .. } if !volumes.is_empty() => "volume",
            Spec {
                cpu_limit_millis: Some(_),
                ..
            } => "cpu-limit",
            _ => return Ok(()),
        };
        Err(format!("{field} means nothing to a machine of kind null"))
    }

    fn images(&self, _spec: &Spec) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }

    fn summary(&self, _spec: &Spec) -> String {
        "count".into()
    }

    fn shown(&self, spec: &Spec) -> serde_json::Value {
        match NullSpec::of(spec) {
            Ok(own) => json!(own),
            Err(reason) => json!({ "unreadable": reason }),
        }
    }

    fn differences(&self, old: &Spec, new: &Spec) -> Vec<Difference> {
        let (old, new) = (self.shown(old).to_string(), self.shown(new).to_string());
        let field = "count".to_owned();
        let differs = old != new;
        differs
            .then_some(Difference { field, old, new })
            .into_iter()
            .collect()
    }

    fn run_worker(&self, folders: &WorkerFolders) -> Result<(), String> {
        worker::run(folders)
    }
}
