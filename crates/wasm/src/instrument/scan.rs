//! Validates a module and collects what lowering needs.
//!
//! Modules are refused here: by the WebAssembly validator, for unsupported proposals, and for
//! imports that only another instance could provide.

use super::error::InstrumentError;
use super::meta::{DataSegment, Memory, PREFIX};
use std::collections::{BTreeMap, BTreeSet};
use wasmparser::{
    BinaryReader, DataKind, ElementItems, ElementKind, FuncType, KnownCustom, Name, Operator,
    Parser, Payload, TypeRef, Validator, WasmFeatures,
};

/// Maximum size of a module, in bytes.
pub const MODULE_BYTES_MAX: usize = 256 << 20;

/// Uses of one memory by the code.
#[derive(Debug, Default, Clone)]
pub(crate) struct MemoryUsage {
    pub(crate) grow: bool,
    pub(crate) size: bool,
    pub(crate) bulk: bool,
    pub(crate) wait32: bool,
    pub(crate) wait64: bool,
    pub(crate) notify: bool,
}

/// Operand of a bulk operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Store {
    Memory(u32),
    Table(u32),
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    pub(crate) table64: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) types: Vec<FuncType>,
    /// Type index of each function, imported ones first.
    pub(crate) functions: Vec<u32>,
    pub(crate) imported_functions: u32,
    pub(crate) memories: Vec<Memory>,
    pub(crate) memory_usage: Vec<MemoryUsage>,
    pub(crate) globals: u32,
    pub(crate) start: Option<u32>,
    pub(crate) active_data: Vec<DataSegment>,
    /// Bytes of each data segment.
    pub(crate) data_bytes: Vec<u64>,
    pub(crate) tables: Vec<Table>,
    /// Items of each element segment.
    pub(crate) elem_items: Vec<u64>,
    pub(crate) fills: BTreeSet<Store>,
    /// Target and source.
    pub(crate) copies: BTreeSet<(Store, Store)>,
    /// Segment and target.
    pub(crate) inits: BTreeSet<(u32, Store)>,
    /// Segments that code drops: (is an element segment, index).
    pub(crate) drops: Vec<(bool, u32)>,
    /// Offset of each defined function's body in the module.
    pub(crate) bodies: Vec<u64>,
    /// Names of functions by index.
    pub(crate) names: BTreeMap<u32, String>,
}

/// Supported features: WebAssembly 2.0 without `externref`, plus tail calls, threads, relaxed SIMD,
/// multiple memories, 64-bit memories, extended constant expressions.
pub(crate) fn features() -> WasmFeatures {
    WasmFeatures::MUTABLE_GLOBAL
        | WasmFeatures::SATURATING_FLOAT_TO_INT
        | WasmFeatures::SIGN_EXTENSION
        | WasmFeatures::REFERENCE_TYPES
        | WasmFeatures::CALL_INDIRECT_OVERLONG
        | WasmFeatures::MULTI_VALUE
        | WasmFeatures::BULK_MEMORY
        | WasmFeatures::BULK_MEMORY_OPT
        | WasmFeatures::SIMD
        | WasmFeatures::RELAXED_SIMD
        | WasmFeatures::THREADS
        | WasmFeatures::TAIL_CALL
        | WasmFeatures::FLOATS
        | WasmFeatures::MULTI_MEMORY
        | WasmFeatures::MEMORY64
        | WasmFeatures::EXTENDED_CONST
}

pub(crate) fn scan(bytes: &[u8]) -> Result<Scan, InstrumentError> {
    if bytes.len() > MODULE_BYTES_MAX {
        return Err(InstrumentError::Unsupported {
            what: format!("a module of {} bytes", bytes.len()),
            place: format!("at most {MODULE_BYTES_MAX} bytes are accepted"),
        });
    }
    if Parser::is_component(bytes) {
        return Err(InstrumentError::Unsupported {
            what: "a component".into(),
            place: "only core modules (WASI preview 1) are machines; build for wasm32-wasip1"
                .into(),
        });
    }
    Validator::new_with_features(features()).validate_all(bytes)?;
    let mut scan = Scan::default();
    let mut globals = Vec::new();
    for payload in Parser::new(0).parse_all(bytes) {
        scan.payload(payload?, &mut globals)?;
    }
    for (index, memory) in scan.memories.iter().enumerate() {
        if memory.shared && memory.memory64 {
            return Err(InstrumentError::Unsupported {
                what: "a shared 64-bit memory".into(),
                place: format!("memory {index}"),
            });
        }
    }
    Ok(scan)
}

impl Scan {
    fn payload(
        &mut self,
        payload: Payload<'_>,
        globals: &mut Vec<Option<u64>>,
    ) -> Result<(), InstrumentError> {
        match payload {
            Payload::TypeSection(section) => {
                for ty in section.into_iter_err_on_gc_types() {
                    self.types.push(ty?);
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import?;
                    match import.ty {
                        TypeRef::Func(ty) => {
                            self.functions.push(ty);
                            self.imported_functions += 1;
                        }
                        TypeRef::Memory(ty) => self.memory(ty),
                        other => {
                            let what = match other {
                                TypeRef::Global(_) => "an imported global",
                                TypeRef::Table(_) => "an imported table",
                                _ => "an import that is neither function nor memory",
                            };
                            return Err(InstrumentError::Unsupported {
                                what: what.into(),
                                place: format!("import {}.{}", import.module, import.name),
                            });
                        }
                    }
                }
            }
            Payload::FunctionSection(section) => {
                for ty in section {
                    self.functions.push(ty?);
                }
            }
            Payload::MemorySection(section) => {
                for ty in section {
                    self.memory(ty?);
                }
            }
            Payload::TableSection(section) => {
                for table in section {
                    self.tables.push(Table {
                        table64: table?.ty.table64,
                    });
                }
            }
            Payload::ElementSection(section) => {
                for element in section {
                    let element = element?;
                    let items = match &element.items {
                        ElementItems::Functions(items) => items.count(),
                        ElementItems::Expressions(_, items) => items.count(),
                    };
                    let passive = matches!(element.kind, ElementKind::Passive);
                    self.elem_items
                        .push(if passive { u64::from(items) } else { 0 });
                }
            }
            Payload::GlobalSection(section) => {
                for global in section {
                    let global = global?;
                    globals.push(evaluate(global.init_expr.get_operators_reader(), globals)?);
                    self.globals += 1;
                }
            }
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export?;
                    if export.name.starts_with(PREFIX) {
                        return Err(InstrumentError::Unsupported {
                            what: format!("an export whose name begins with {PREFIX:?}"),
                            place: format!("export {:?}", export.name),
                        });
                    }
                }
            }
            Payload::StartSection { func, .. } => self.start = Some(func),
            Payload::DataSection(section) => {
                for data in section {
                    let data = data?;
                    let passive = matches!(data.kind, DataKind::Passive);
                    self.data_bytes
                        .push(if passive { data.data.len() as u64 } else { 0 });
                    if let DataKind::Active {
                        memory_index,
                        offset_expr,
                    } = data.kind
                    {
                        let offset = evaluate(offset_expr.get_operators_reader(), globals)?;
                        self.active_data.push(DataSegment {
                            memory: memory_index,
                            offset: offset.ok_or_else(|| {
                                InstrumentError::Malformed(
                                    "offset of a data segment is no integer".into(),
                                )
                            })?,
                            bytes: data.data.to_vec(),
                        });
                    }
                }
            }
            Payload::CodeSectionEntry(body) => {
                self.bodies.push(body.range().start);
                for op in body.get_operators_reader()? {
                    self.op(&op?)?;
                }
            }
            Payload::CustomSection(section) => {
                if let KnownCustom::Name(names) = section.as_known() {
                    // An invalid name section is no reason to refuse a module.
                    for name in names.into_iter().flatten() {
                        if let Name::Function(map) = name {
                            self.names.extend(
                                map.into_iter()
                                    .flatten()
                                    .map(|naming| (naming.index, naming.name.to_owned())),
                            );
                        }
                    }
                    let count = self.functions.len() as u32;
                    self.names.retain(|index, _| *index < count);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The place of a defined function in the original module: counted from the first one.
    /// (Functions added by lowering follow.)
    pub(crate) fn place(&self, defined: usize) -> String {
        let Some(offset) = self.bodies.get(defined) else {
            return "a bulk operation".into();
        };
        let index = self.imported_functions + defined as u32;
        match self.names.get(&index) {
            Some(name) => format!("function {index}, {name:?}, at offset {offset:#x}"),
            None => format!("function {index} at offset {offset:#x}"),
        }
    }

    fn memory(&mut self, ty: wasmparser::MemoryType) {
        self.memories.push(Memory {
            minimum_pages: ty.initial,
            maximum_pages: ty.maximum,
            memory64: ty.memory64,
            shared: ty.shared,
        });
        self.memory_usage.push(MemoryUsage::default());
    }

    fn op(&mut self, op: &Operator<'_>) -> Result<(), InstrumentError> {
        match *op {
            Operator::MemoryGrow { mem } => self.memory_usage[mem as usize].grow = true,
            Operator::MemorySize { mem } => self.memory_usage[mem as usize].size = true,
            Operator::MemoryFill { mem } => {
                self.memory_usage[mem as usize].bulk = true;
                self.fills.insert(Store::Memory(mem));
            }
            Operator::MemoryCopy { dst_mem, src_mem } => {
                self.memory_usage[dst_mem as usize].bulk = true;
                self.memory_usage[src_mem as usize].bulk = true;
                self.copies
                    .insert((Store::Memory(dst_mem), Store::Memory(src_mem)));
            }
            Operator::MemoryInit { data_index, mem } => {
                self.memory_usage[mem as usize].bulk = true;
                self.inits.insert((data_index, Store::Memory(mem)));
            }
            Operator::TableFill { table } => {
                self.fills.insert(Store::Table(table));
            }
            Operator::TableCopy {
                dst_table,
                src_table,
            } => {
                self.copies
                    .insert((Store::Table(dst_table), Store::Table(src_table)));
            }
            Operator::TableInit { elem_index, table } => {
                self.inits.insert((elem_index, Store::Table(table)));
            }
            Operator::MemoryAtomicWait32 { memarg } => {
                self.memory_usage[memory_of(memarg)? as usize].wait32 = true;
            }
            Operator::MemoryAtomicWait64 { memarg } => {
                self.memory_usage[memory_of(memarg)? as usize].wait64 = true;
            }
            Operator::MemoryAtomicNotify { memarg } => {
                self.memory_usage[memory_of(memarg)? as usize].notify = true;
            }
            Operator::DataDrop { data_index } => self.note_drop((false, data_index)),
            Operator::ElemDrop { elem_index } => self.note_drop((true, elem_index)),
            _ => {}
        }
        Ok(())
    }

    fn note_drop(&mut self, key: (bool, u32)) {
        if let Err(at) = self.drops.binary_search(&key) {
            self.drops.insert(at, key);
        }
    }
}

/// Value of a constant expression of integer type; `None` for another type.
fn evaluate(
    reader: wasmparser::OperatorsReader<'_>,
    globals: &[Option<u64>],
) -> Result<Option<u64>, InstrumentError> {
    let mut stack: Vec<Option<u64>> = Vec::new();
    for op in reader {
        let op = op?;
        let value = match op {
            Operator::I32Const { value } => Some(u64::from(value as u32)),
            Operator::I64Const { value } => Some(value as u64),
            Operator::GlobalGet { global_index } => {
                globals.get(global_index as usize).copied().flatten()
            }
            Operator::End => break,
            _ => {
                let binary: Option<fn(u64, u64) -> u64> = match op {
                    Operator::I32Add => Some(|a, b| u64::from((a as u32).wrapping_add(b as u32))),
                    Operator::I32Sub => Some(|a, b| u64::from((a as u32).wrapping_sub(b as u32))),
                    Operator::I32Mul => Some(|a, b| u64::from((a as u32).wrapping_mul(b as u32))),
                    Operator::I64Add => Some(u64::wrapping_add),
                    Operator::I64Sub => Some(u64::wrapping_sub),
                    Operator::I64Mul => Some(u64::wrapping_mul),
                    _ => None,
                };
                match binary {
                    Some(function) => {
                        let (b, a) = (stack.pop().flatten(), stack.pop().flatten());
                        a.zip(b).map(|(a, b)| function(a, b))
                    }
                    None => None,
                }
            }
        };
        stack.push(value);
    }
    Ok(stack.pop().flatten())
}

/// Refuses bytes that are not a module, with a specific error.
pub(crate) fn looks_like_module(bytes: &[u8]) -> Result<(), InstrumentError> {
    let mut reader = BinaryReader::new(bytes, 0);
    match reader.read_bytes(4) {
        Ok(b"\0asm") => Ok(()),
        _ => Err(InstrumentError::Malformed(
            "not a WebAssembly module (it does not begin with \\0asm)".into(),
        )),
    }
}

/// The memory that an instruction works on.
pub(crate) fn memory_of(arg: wasmparser::MemArg) -> Result<u32, InstrumentError> {
    match arg.target {
        wasmparser::MemArgTarget::Memory(memory) => Ok(memory),
        wasmparser::MemArgTarget::Array(_) => Err(InstrumentError::Unsupported {
            what: "access to a GC array".into(),
            place: "a memory instruction".into(),
        }),
    }
}
