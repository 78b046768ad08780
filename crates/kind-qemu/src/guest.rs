//! The parts of a machine that runs here.

use crate::console::Console;
use crate::vm::Vm;
use keel_machine::log::Log;
use std::sync::Arc;

/// A machine: its QEMU, its console, and what that has printed.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) vm: Arc<Vm>,
    pub(crate) console: Arc<Console>,
    pub(crate) log: Arc<Log>,
}
