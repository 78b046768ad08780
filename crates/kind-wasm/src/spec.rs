//! The part of a machine's spec that only this kind understands.

use keel_machine::kind::KindSpec;
use keel_machine::spec::Spec;
use keel_wasm::runtime::Limits;
use serde::{Deserialize, Serialize};

/// The most threads of a machine.
pub const THREADS_MAX: u32 = 16_384;

/// A WebAssembly program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WasmSpec {
    /// Hash (BLAKE3, hex) of the module as its author built it.
    pub module: String,
    /// The program's name and arguments.
    pub args: Vec<String>,
    /// Its environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Limit of its threads, 1 to [`THREADS_MAX`].
    pub threads_max: u32,
}

impl WasmSpec {
    /// The part of a spec.
    ///
    /// # Errors
    /// A message that names the field that is missing, unknown or wrong.
    pub fn of(spec: &Spec) -> Result<Self, String> {
        spec.kind_spec
            .decode()
            .map_err(|error| format!("the spec of a machine of kind wasm: {error}"))
    }

    /// The part for a spec.
    ///
    /// # Errors
    /// Never for a value of this type; the message of the encoder.
    pub fn to_kind_spec(&self) -> Result<KindSpec, String> {
        KindSpec::new(self)
    }

    /// Limits that the runtime enforces.
    pub fn limits(&self, spec: &Spec) -> Limits {
        Limits {
            memory_bytes: spec.memory_bytes,
            threads_max: self.threads_max,
            cpu_millis: spec.cpu_limit_millis,
        }
    }
}
