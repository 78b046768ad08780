//! Metadata of an instrumented module for the runtime: the safepoints, the frame layouts, and the
//! structure of the original module.
//!
//! The metadata is stored in the module's custom section [`SECTION`], so that an instrumented
//! module is one self-contained file named by its hash. The instrumenter produces it once; a newer
//! instrumenter never regenerates it, since frames refer to it by number.
//!
//! The control memory is a private second memory that each thread's instance defines for itself.
//! Its layout is fixed here for both sides. Instances define it twice, as two memories over the
//! same bytes, the second for polls at entries: the compiler keeps a memory's base in a register if
//! it is used again, and so short recursive functions would spend a register for the cold code that
//! saves their frames. (In loops the poll needs that register anyway; two memories would need two.)

use super::error::InstrumentError;
use serde::{Deserialize, Serialize};
use wasmparser::ValType;

/// Name of the custom section that holds the metadata.
pub const SECTION: &str = "keel.meta";

/// Version of the metadata and of the frame format. Incremented when either changes; other versions
/// are refused with an error that names them.
pub const VERSION: u32 = 4;

/// Address of the request word (`u32`): nonzero requests a safepoint.
pub const REQUEST: u32 = 0;
/// Address of the save pointer (`u32`): the next free byte of the save area.
pub const SAVE_POINTER: u32 = 8;
/// Address of the next free index (`u32`) of the references table.
pub const REF_POINTER: u32 = 16;
/// Address of the results of a resumed frame, 16 bytes each.
pub const RESULTS: u32 = 64;
/// Maximum number of results of a function (equal to the engine's limit).
pub const RESULTS_MAX: u32 = 1000;
/// Address of the initial locals of a resumed frame.
pub const RESTORE: u32 = 32 << 10;
/// Address of the save area, which grows upwards.
pub const SAVE: u32 = 2 << 20;
/// Limit of the end of the last saved frame. Saving code checks it only afterwards, so up to the
/// size of the largest frame (the room at [`RESTORE`]) can be written behind it.
pub const SAVE_END: u32 = SAVE + (8 << 20);
/// Size of the control memory in 64 KiB pages (2 GiB), of which only the start is accessible.
pub const CONTROL_PAGES: u32 = 32_768;
/// Header of a saved frame: point (`u32`), zero (`u32`).
pub const FRAME_HEADER_BYTES: u32 = 8;
/// Initial entries of the references table; the first [`RESULTS_MAX`] hold results.
pub const REFS_ENTRIES: u32 = 65_536;
/// Maximum entries of the references table: more than the references in a full save area. No other
/// table of an instrumented module declares this maximum, so the runtime recognises the table by
/// it.
pub const REFS_ENTRIES_MAX: u32 = 2 << 20;
/// Maximum entries of any other table. (Lowering reduces larger declared maxima, which is not
/// observable: `table.grow` may always fail.)
pub const TABLE_ENTRIES_MAX: u64 = 1 << 20;

/// Prefix of all exports and imports that the instrumenter adds. Reserved: guests must not use it.
pub const PREFIX: &str = "keel:";
/// Export name of a clone in its resume module.
pub const RESUME_EXPORT: &str = "keel:resume";
/// Module name of the host functions that lowering uses, and of what resume modules import.
pub const HOST_MODULE: &str = "keel";

/// Export name of a function that clones may call.
pub(crate) fn function_export(index: u32) -> String {
    format!("{PREFIX}f{index}")
}

/// Export name of a memory; the control memories follow the guest's.
pub(crate) fn memory_export(index: u32) -> String {
    format!("{PREFIX}m{index}")
}

/// Export name of a global.
pub(crate) fn global_export(index: u32) -> String {
    format!("{PREFIX}g{index}")
}

/// Export name of a table; the references table and the directory follow the guest's.
pub(crate) fn table_export(index: u32) -> String {
    format!("{PREFIX}t{index}")
}

/// Type of one saved value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SlotType {
    /// 4 bytes.
    I32,
    /// 8 bytes.
    I64,
    /// 4 bytes, the bits as they are.
    F32,
    /// 8 bytes, the bits as they are.
    F64,
    /// 16 bytes.
    V128,
    /// 4 bytes: function index + 1, or 0 for null.
    FuncRef,
}

impl SlotType {
    /// Bytes that a value of this type takes in a frame.
    pub fn bytes(self) -> u32 {
        match self {
            SlotType::I32 | SlotType::F32 | SlotType::FuncRef => 4,
            SlotType::I64 | SlotType::F64 => 8,
            SlotType::V128 => 16,
        }
    }
}

/// The slot type of values of a WebAssembly type.
///
/// # Errors
/// [`InstrumentError::Unsupported`] for references other than `funcref`.
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

/// A safepoint, at which a function can be left and re-entered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Point {
    /// Slots saved here, as positions in [`Function::slots`], in frame order.
    pub saved: Vec<u32>,
    /// Slots that receive the callee's results on resume, in result order.
    pub results: Vec<u32>,
}

/// A function that can be captured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Function {
    pub index: u32,
    /// Function index of its clone.
    pub clone: u32,
    /// Number of loop versions, whose indices follow that of the clone.
    pub loop_versions: u32,
    /// Number of its first point among all points of the module.
    pub first_point: u32,
    /// Types of all values that any of its points saves or receives, in the order in which the
    /// clone loads them from [`RESTORE`].
    pub slots: Vec<SlotType>,
    /// Types of its results.
    pub results: Vec<SlotType>,
    /// Its points, in the order of the code.
    pub points: Vec<Point>,
}

impl Function {
    /// Indices of its clone and its loop versions.
    pub fn clones(&self) -> std::ops::Range<u32> {
        self.clone
            ..self
                .clone
                .saturating_add(self.loop_versions)
                .saturating_add(1)
    }

    fn check(&self) -> Result<(), &'static str> {
        let bytes: u64 = self.slots.iter().map(|ty| u64::from(ty.bytes())).sum();
        let is_reference = |ty: &&SlotType| **ty == SlotType::FuncRef;
        let references = self.slots.iter().filter(is_reference).count();
        if bytes > u64::from(SAVE - RESTORE)
            || references > (REFS_ENTRIES - RESULTS_MAX) as usize
            || self.results.len() > RESULTS_MAX as usize
        {
            return Err("a function has too many values");
        }
        let has_slot = |slot: &u32| (*slot as usize) < self.slots.len();
        let fits = |point: &Point| point.saved.iter().chain(&point.results).all(has_slot);
        if !self.points.iter().all(fits) {
            return Err("a point names a slot that its function does not have");
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Initial size in 64 KiB pages.
    pub minimum_pages: u64,
    /// Limit in 64 KiB pages, as the module declares it.
    pub maximum_pages: Option<u64>,
    /// Whether addresses are 64 bits wide.
    pub memory64: bool,
    /// Whether the module declared it shared (`wait` traps where it did not).
    pub shared: bool,
}

/// A mutable global, part of a thread's state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Global {
    /// Name of its export in the instrumented module.
    pub export: String,
    pub ty: SlotType,
}

/// An active data segment: applied once per machine, by the runtime.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DataSegment {
    /// Memory that it fills.
    pub memory: u32,
    /// Byte offset in that memory.
    pub offset: u64,
    pub bytes: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// Module name.
    pub module: String,
    /// Field name.
    pub name: String,
    /// Parameter types.
    pub params: Vec<SlotType>,
    /// Result types, without the status.
    pub results: Vec<SlotType>,
}

/// All of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Meta {
    /// [`VERSION`].
    pub version: u32,
    /// Hash (BLAKE3) of the module before instrumentation.
    pub original: [u8; 32],
    /// Imported functions in the order of their indices.
    pub imports: Vec<Import>,
    /// Functions that can be captured, by rising `first_point`.
    pub functions: Vec<Function>,
    /// Number of all points.
    pub points: u32,
    /// The machine's memories; the control memory follows them.
    pub memories: Vec<Memory>,
    /// Mutable globals.
    pub globals: Vec<Global>,
    /// Tables whose content can change: index and export name.
    pub tables: Vec<(u32, String)>,
    /// Active data segments in order.
    pub data: Vec<DataSegment>,
    /// Functions whose reference can be taken, in the order of the directory
    /// table.
    pub directory: Vec<u32>,
    pub start: Option<u32>,
    /// Names of functions by index, from the name section.
    pub names: Vec<(u32, String)>,
}

impl Meta {
    /// The function of a point, and the point; `None` for an unknown number.
    pub fn point(&self, number: u32) -> Option<(usize, &Function, &Point)> {
        let after = self
            .functions
            .partition_point(|function| function.first_point <= number);
        let position = after.checked_sub(1)?;
        let function = self.functions.get(position)?;
        let point = function
            .points
            .get((number - function.first_point) as usize)?;
        Some((position, function, point))
    }

    /// Validates internal consistency, so that every index in it is in range. (Consistency with the
    /// module is checked when that is linked; the code itself runs in a sandbox.)
    ///
    /// # Errors
    /// The inconsistency.
    pub fn check(&self) -> Result<(), &'static str> {
        let mut points = 0_u32;
        for function in &self.functions {
            if function.first_point != points {
                return Err("points are not numbered in order");
            }
            points = u32::try_from(function.points.len())
                .ok()
                .and_then(|count| points.checked_add(count))
                .ok_or("too many points")?;
            function.check()?;
        }
        if points != self.points {
            return Err("the number of points is wrong");
        }
        let has_memory = |segment: &DataSegment| (segment.memory as usize) < self.memories.len();
        if !self.data.iter().all(has_memory) {
            return Err("a data segment has no memory");
        }
        if !self.directory.is_sorted_by(|one, next| one < next)
            || !self.names.is_sorted_by_key(|(index, _)| *index)
        {
            return Err("indices are out of order");
        }
        Ok(())
    }

    /// A function's index in the original module: without the imports that the instrumenter added
    /// behind the original ones.
    pub fn original_index(&self, index: u32) -> u32 {
        let is_added = |import: &&Import| import.module == HOST_MODULE;
        let added = self.imports.iter().filter(is_added).count() as u32;
        if (index as usize) < self.imports.len() {
            index
        } else {
            index - added
        }
    }

    /// The human-readable name of a function.
    pub fn function_name(&self, index: u32) -> String {
        match self.names.binary_search_by_key(&index, |(at, _)| *at) {
            Ok(at) => self.names[at].1.clone(),
            Err(_) => format!("function {}", self.original_index(index)),
        }
    }
}
