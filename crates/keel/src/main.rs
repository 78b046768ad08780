//! `keel`: the executable of Evenkeel.

use keel_kind_wasm::WasmKind;
use keel_machine::kind::{Kind, Kinds};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    // All kinds of machines that nodes run.
    let kinds: [Arc<dyn Kind>; 1] = [Arc::new(WasmKind)];
    keel::run(Kinds::new(kinds))
}
