//! `keel`: the executable of Evenkeel.

use keel_kind_qemu::QemuKind;
use keel_kind_wasm::WasmKind;
use keel_machine::kind::{Kind, Kinds};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    // All kinds of machines that nodes run.
    let kinds: [Arc<dyn Kind>; 2] = [Arc::new(WasmKind), Arc::new(QemuKind)];
    keel::run(Kinds::new(kinds))
}
