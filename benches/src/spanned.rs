//! Runs a program in text format that spans parts in this process, without a worker or a cluster.

use anyhow::{Context, Result};
use keel_kind_wasm::span::{InProcess, PartLimits, SpanConfig};
use keel_wasi::{Config, Wasi};
use keel_wasm::runtime::parts::SpawnPolicy;
use keel_wasm::runtime::{Engine, Limits, Machine, Options};
use std::time::Duration;

/// Time limit after which an operation counts as blocked.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A spanning program.
pub(crate) struct Spanned {
    pub(crate) machine: Machine,
    pub(crate) parts: InProcess,
}

impl Spanned {
    /// Starts the program and makes it span this number of parts.
    pub(crate) fn begin(
        text: &str,
        parts: usize,
        spawning: SpawnPolicy,
        part_limits: PartLimits,
    ) -> Result<Self> {
        let program = Engine::new(Options::default())?.load(&wat::parse_str(text)?)?;
        let limits = Limits::default();
        let machine = Machine::ready_under(0, program, Wasi::new(Config::default())?, limits)?;
        let how = SpanConfig {
            spawning,
            patience: LIMIT,
            limits: part_limits,
            stays_stopped: false,
        };
        let parts = InProcess::begin(&machine, parts, limits.memory_bytes, how)?;
        Ok(Spanned { machine, parts })
    }

    /// Ends it.
    pub(crate) fn end(self) -> Result<()> {
        self.machine.stop();
        self.machine.wait(Some(LIMIT)).context("its end")?;
        Ok(())
    }
}
