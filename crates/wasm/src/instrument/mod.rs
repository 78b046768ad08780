//! Rewrites a module so that any of its threads can be captured as plain data
//! at a *safepoint* and resumed elsewhere.
//!
//! A running WebAssembly stack cannot be read from outside. So on request the code unwinds itself:
//! at a poll or after a call it saves its live values and returns with a status set, frame by
//! frame, to the runtime. It never re-enters the code that it left (a cold path that rejoined would
//! force every live value through it); a *clone* of the function, entered at that point, continues
//! in its place.
//!
//! Two passes: `lower` rewrites operations that cannot be left in the middle (long bulk operations,
//! waiting, growing) in plain WebAssembly; `relocate` adds polls, status results, saving and
//! clones. Each pass reads and writes a whole module.
//!
//! - `scan`: validates, refuses unsupported modules, collects what lowering needs
//! - `lower`: the first pass
//! - `callgraph`: functions that may unwind, carry a status, or poll at entry
//! - `body`: one function's operators, constructs and points
//! - `liveness`: live locals at each point
//! - `plan`: frame layout of a function
//! - `emit`: writes the hot version and the clone
//! - `callees`: how clones reach what they call
//! - `relocate`: the second pass
//! - `meta`: metadata for the runtime, stored in the module
//! - `error`: why a module is refused
//! - `extract`: the modules that are compiled: the hot one, and one for each clone
//! - `entry`: of a large clone, what is executed from one of its points
//!
//! `docs/instrumentation.md` explains rewriting, capture, resume and compilation.

mod body;
mod callees;
mod callgraph;
mod emit;
mod entry;
mod error;
mod extract;
mod liveness;
mod lower;
pub mod meta;
mod plan;
mod relocate;
mod scan;

pub use error::InstrumentError;
pub use extract::{EntryModule, Layout, hot_module};
pub use scan::MODULE_BYTES_MAX;

/// Incremented when the same module is instrumented differently than before with the same
/// [`meta::VERSION`]: modules instrumented before remain usable, but are no longer produced.
pub const REVISION: u32 = 1;

/// Rewrites a module. The result is a valid module that carries its own
/// [`meta::Meta`]; the same input gives the same bytes.
///
/// # Errors
/// [`InstrumentError`], with the reason and the place.
pub fn instrument(module: &[u8]) -> Result<Vec<u8>, InstrumentError> {
    scan::looks_like_module(module)?;
    let scanned = scan::scan(module)?;
    let lowered = lower::lower(module, &scanned)?;
    relocate::relocate(lowered, &scanned, *blake3::hash(module).as_bytes())
}

/// Reads the metadata of an instrumented module.
///
/// # Errors
/// [`InstrumentError::Malformed`] without metadata or with another version of it.
pub fn read_meta(module: &[u8]) -> Result<meta::Meta, InstrumentError> {
    for payload in wasmparser::Parser::new(0).parse_all(module) {
        if let wasmparser::Payload::CustomSection(section) = payload?
            && section.name() == meta::SECTION
        {
            let (version, _) = postcard::take_from_bytes::<u32>(section.data())
                .map_err(|error| InstrumentError::Malformed(error.to_string()))?;
            if version != meta::VERSION {
                return Err(InstrumentError::Malformed(format!(
                    "instrumented for version {version}, this is version {}",
                    meta::VERSION
                )));
            }
            let meta: meta::Meta = postcard::from_bytes(section.data())
                .map_err(|error| InstrumentError::Malformed(error.to_string()))?;
            meta.check()
                .map_err(|what| InstrumentError::Malformed(format!("its metadata: {what}")))?;
            return Ok(meta);
        }
    }
    Err(InstrumentError::Malformed(format!(
        "it has no section {:?}: not an instrumented module",
        meta::SECTION
    )))
}
