//! `keel-null`: the executable of Evenkeel with one more kind of machines, for tests.

use keel_kind_null::NullKind;
use keel_kind_wasm::WasmKind;
use keel_machine::kind::{Kind, Kinds};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    let kinds: [Arc<dyn Kind>; 2] = [Arc::new(WasmKind), Arc::new(NullKind)];
    keel::run(Kinds::new(kinds))
}
