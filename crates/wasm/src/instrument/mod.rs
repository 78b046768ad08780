//! Rewrites a module so that any of its threads can be captured as plain data
//! at a *safepoint* and resumed elsewhere.
//!
//! A running WebAssembly stack cannot be read from outside. So the code leaves
//! by itself when asked: at a poll or behind a call it saves what is live and
//! returns with a status set, frame by frame, to the runtime. It never comes
//! back into the code that it left (a cold path that rejoined would force every
//! live value through it); a *clone* of the function, entered at that point,
//! goes on in its place.
//!
//! Two passes: `lower` says in plain WebAssembly what cannot be left in the
//! middle of (long bulk operations, waiting, growing); `relocate` adds polls,
//! status results, saving and clones. Each pass reads and writes a whole module.
//!
//! - `scan`: validates, refuses by name, notes what lowering needs
//! - `lower`: the first pass
//! - `callgraph`: who may unwind, who carries a status, who polls at entry
//! - `body`: one function's operators, constructs and points
//! - `liveness`: which locals matter at a point
//! - `plan`: what a function's frames hold, and where
//! - `emit`: writes the hot version and the clone
//! - `relocate`: the second pass
//! - `meta`: what the runtime needs to know; travels in the module
//! - `strip`: the module without its clones, with which a program starts

mod body;
mod callgraph;
mod emit;
mod liveness;
mod lower;
pub mod meta;
mod plan;
mod relocate;
mod scan;
mod strip;

pub use strip::without_clones;

use meta::SlotType;
use wasmparser::ValType;

/// The largest module that is accepted, in bytes.
pub const MODULE_BYTES_MAX: usize = 256 << 20;

/// Raised when the same module becomes another one than before, of the same
/// [`meta::VERSION`]: what was instrumented before is of use still, but not made any more.
pub const REVISION: u32 = 1;

/// Why a module cannot become a machine.
#[derive(Debug, thiserror::Error)]
pub enum InstrumentError {
    /// It is no valid WebAssembly, or uses a proposal that is not supported.
    #[error("the module is not valid here: {0}")]
    Invalid(#[from] wasmparser::BinaryReaderError),
    /// It uses something that machines do not support.
    #[error("the module uses {what} ({place}), which machines do not support")]
    Unsupported {
        what: String,
        /// Where, or what to do instead.
        place: String,
    },
    #[error("the module is malformed: {0}")]
    Malformed(String),
}

impl From<wasm_encoder::reencode::Error> for InstrumentError {
    fn from(error: wasm_encoder::reencode::Error) -> Self {
        InstrumentError::Malformed(error.to_string())
    }
}

/// Rewrites a module. The result is a valid module that carries its own
/// [`meta::Meta`]; the same input gives the same bytes.
///
/// # Errors
/// [`InstrumentError`], naming what is wrong and where.
pub fn instrument(module: &[u8]) -> Result<Vec<u8>, InstrumentError> {
    scan::looks_like_module(module)?;
    let scanned = scan::scan(module)?;
    let lowered = lower::lower(module, &scanned)?;
    relocate::relocate(lowered, &scanned, *blake3::hash(module).as_bytes())
}

/// Reads the metadata of an instrumented module.
///
/// # Errors
/// [`InstrumentError::Malformed`] for a module without metadata or with that
/// of another version.
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

pub(crate) fn slot_type(ty: ValType) -> Result<SlotType, InstrumentError> {
    Ok(match ty {
        ValType::I32 => SlotType::I32,
        ValType::I64 => SlotType::I64,
        ValType::F32 => SlotType::F32,
        ValType::F64 => SlotType::F64,
        ValType::V128 => SlotType::V128,
        ValType::Ref(reference) if reference == wasmparser::RefType::FUNCREF => SlotType::FuncRef,
        ValType::Ref(other) => {
            return Err(InstrumentError::Unsupported {
                what: format!("values of type {other}"),
                place: "a function's locals, operands or results".into(),
            });
        }
    })
}
