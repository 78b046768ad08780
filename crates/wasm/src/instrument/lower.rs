//! First pass: says in plain WebAssembly what the second pass cannot leave in
//! the middle of.
//!
//! - Memories become unshared and defined by the module (every thread's
//!   instance maps the same bytes, so code is as fast as in a single-threaded
//!   module); `memory.grow`, `wait`, `notify` and, where threads may grow the
//!   memory, `memory.size` become host calls.
//! - Bulk operations that may be long run in chunks of 64 KiB inside helper
//!   functions, whose loops then get polls like any other. The bounds of the
//!   whole are checked first.
//! - Active data segments become data of the runtime, which applies them once
//!   per machine; `start` becomes a call of the runtime's; dropped segments are
//!   remembered in globals, so that an instance made later drops them too.

use super::InstrumentError;
use super::meta::{DataSegment, HOST_MODULE, PREFIX};
use super::scan::{Scan, memory_of};
use std::collections::HashMap;
use wasm_encoder::reencode::{Error as ReencodeError, Reencode, utils};
use wasm_encoder::{
    BlockType, CodeSection, ConstExpr, DataCountSection, DataSection, ElementSection, EntityType,
    ExportKind, ExportSection, Function, FunctionSection, GlobalSection, GlobalType, ImportSection,
    Instruction as I, MemorySection, Module, TableSection, TypeSection, ValType,
};
use wasmparser::{DataKind, Operator, Parser, Payload, TypeRef};

/// Bulk operations of up to this many bytes run in one piece.
pub(crate) const CHUNK_BYTES: u64 = 64 << 10;

/// The lowered module, with what its encoding does not say.
pub(crate) struct Lowered {
    pub(crate) bytes: Vec<u8>,
    pub(crate) data: Vec<DataSegment>,
    pub(crate) start: Option<u32>,
    pub(crate) names: Vec<(u32, String)>,
}

/// Host functions that lowered code calls, and helper functions of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Added {
    Grow(u32),
    Size(u32),
    /// Makes this instance see the memory's true size.
    Sync(u32),
    Wait32(u32),
    Wait64(u32),
    Notify(u32),
    Fill(u32),
    Copy(u32, u32),
    Init(u32, u32),
    Redrop,
}

impl Added {
    fn host_name(self) -> Option<String> {
        Some(match self {
            Added::Grow(memory) => format!("grow:{memory}"),
            Added::Size(memory) => format!("size:{memory}"),
            Added::Sync(memory) => format!("sync:{memory}"),
            Added::Wait32(memory) => format!("wait32:{memory}"),
            Added::Wait64(memory) => format!("wait64:{memory}"),
            Added::Notify(memory) => format!("notify:{memory}"),
            Added::Fill(_) | Added::Copy(..) | Added::Init(..) | Added::Redrop => return None,
        })
    }
}

struct Lower<'s> {
    scan: &'s Scan,
    /// In the order of their indices: host functions first.
    added: Vec<Added>,
    index: HashMap<Added, u32>,
    hosts: u32,
    /// First of the globals that remember dropped segments, and which
    /// (data segments, element segments) have one.
    drop_global: HashMap<(bool, u32), u32>,
}

impl Reencode for Lower<'_> {
    type Error = InstrumentError;

    fn function_index(&mut self, index: u32) -> Result<u32, ReencodeError<InstrumentError>> {
        Ok(if index < self.scan.imported_functions {
            index
        } else {
            index + self.hosts
        })
    }
}

fn user(error: ReencodeError<InstrumentError>) -> InstrumentError {
    match error {
        ReencodeError::UserError(error) => error,
        other => InstrumentError::Malformed(other.to_string()),
    }
}

/// Lowers a validated module.
pub(crate) fn lower(bytes: &[u8], scan: &Scan) -> Result<Lowered, InstrumentError> {
    let mut lower = Lower::new(scan);
    let mut sections = Sections::default();
    lower.read(bytes, &mut sections)?;
    lower.add(&mut sections)?;
    let start = scan
        .start
        .map(|index| lower.function_index(index).map_err(user))
        .transpose()?;
    let mut names = Vec::new();
    for (index, name) in &scan.names {
        names.push((lower.function_index(*index).map_err(user)?, name.clone()));
    }
    Ok(Lowered {
        bytes: sections.module(),
        data: scan.active_data.clone(),
        start,
        names,
    })
}

#[derive(Default)]
struct Sections {
    types: TypeSection,
    imports: ImportSection,
    functions: FunctionSection,
    tables: TableSection,
    memories: MemorySection,
    globals: GlobalSection,
    exports: ExportSection,
    elements: ElementSection,
    data_count: Option<u32>,
    code: CodeSection,
    data: DataSection,
}

impl Sections {
    fn module(&self) -> Vec<u8> {
        let mut module = Module::new();
        module
            .section(&self.types)
            .section(&self.imports)
            .section(&self.functions)
            .section(&self.tables)
            .section(&self.memories)
            .section(&self.globals)
            .section(&self.exports)
            .section(&self.elements);
        if let Some(count) = self.data_count {
            module.section(&DataCountSection { count });
        }
        module.section(&self.code).section(&self.data);
        module.finish()
    }
}

impl<'s> Lower<'s> {
    fn new(scan: &'s Scan) -> Self {
        let mut added = Vec::new();
        for (index, memory) in (0u32..).zip(&scan.memories) {
            let uses = &scan.memory_uses[index as usize];
            let wanted = [
                (uses.grow, Added::Grow(index)),
                (uses.size && memory.shared, Added::Size(index)),
                (uses.bulk && memory.shared, Added::Sync(index)),
                (uses.wait32, Added::Wait32(index)),
                (uses.wait64, Added::Wait64(index)),
                (uses.notify, Added::Notify(index)),
            ];
            added.extend(wanted.iter().filter(|(used, _)| *used).map(|(_, add)| *add));
        }
        let hosts = added.len() as u32;
        added.extend(scan.fills.iter().map(|memory| Added::Fill(*memory)));
        added.extend(scan.copies.iter().map(|(to, from)| Added::Copy(*to, *from)));
        added.extend(
            scan.inits
                .iter()
                .map(|(data, mem)| Added::Init(*data, *mem)),
        );
        if !scan.drops.is_empty() {
            added.push(Added::Redrop);
        }
        let defined = scan.functions.len() as u32 - scan.imported_functions;
        let index = (0u32..)
            .zip(&added)
            .map(|(at, add)| {
                let index = scan.imported_functions + at;
                let index = if at < hosts { index } else { index + defined };
                (*add, index)
            })
            .collect();
        let drop_global = (0u32..)
            .zip(&scan.drops)
            .map(|(at, key)| (*key, scan.globals + at))
            .collect();
        Lower {
            scan,
            added,
            index,
            hosts,
            drop_global,
        }
    }

    fn read(&mut self, bytes: &[u8], out: &mut Sections) -> Result<(), InstrumentError> {
        for payload in Parser::new(0).parse_all(bytes) {
            match payload? {
                Payload::TypeSection(section) => {
                    utils::parse_type_section(self, &mut out.types, section).map_err(user)?;
                }
                Payload::ImportSection(section) => {
                    for import in section.into_imports() {
                        let import = import?;
                        match import.ty {
                            TypeRef::Func(ty) => {
                                out.imports.import(
                                    import.module,
                                    import.name,
                                    EntityType::Function(ty),
                                );
                            }
                            TypeRef::Memory(ty) => {
                                let ty = self.memory_type(unshared(ty)).map_err(user)?;
                                out.memories.memory(ty);
                            }
                            // Scanning refused the others.
                            _ => {}
                        }
                    }
                }
                Payload::FunctionSection(section) => {
                    utils::parse_function_section(self, &mut out.functions, section)
                        .map_err(user)?;
                }
                Payload::TableSection(section) => {
                    utils::parse_table_section(self, &mut out.tables, section).map_err(user)?;
                }
                Payload::MemorySection(section) => {
                    for ty in section {
                        let ty = self.memory_type(unshared(ty?)).map_err(user)?;
                        out.memories.memory(ty);
                    }
                }
                Payload::GlobalSection(section) => {
                    utils::parse_global_section(self, &mut out.globals, section).map_err(user)?;
                }
                Payload::ExportSection(section) => {
                    utils::parse_export_section(self, &mut out.exports, section).map_err(user)?;
                }
                Payload::ElementSection(section) => {
                    utils::parse_element_section(self, &mut out.elements, section).map_err(user)?;
                }
                Payload::DataCountSection { count, .. } => out.data_count = Some(count),
                Payload::DataSection(section) => {
                    for data in section {
                        let data = data?;
                        match data.kind {
                            DataKind::Passive => out.data.passive(data.data.iter().copied()),
                            // A dropped segment is one of no bytes.
                            DataKind::Active { .. } => out.data.passive([]),
                        };
                    }
                }
                Payload::CodeSectionEntry(body) => {
                    let function = self.body(&body)?;
                    out.code.function(&function);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn body(&mut self, body: &wasmparser::FunctionBody<'_>) -> Result<Function, InstrumentError> {
        let mut out = self.new_function_with_parsed_locals(body).map_err(user)?;
        let mut last_const = None;
        for op in body.get_operators_reader()? {
            let op = op?;
            let short = last_const.is_some_and(|bytes: u64| bytes <= CHUNK_BYTES);
            last_const = match op {
                Operator::I32Const { value } => Some(u64::from(value as u32)),
                Operator::I64Const { value } => Some(value as u64),
                _ => None,
            };
            self.op(&mut out, op, short)?;
        }
        Ok(out)
    }

    fn op(
        &mut self,
        out: &mut Function,
        op: Operator<'_>,
        short: bool,
    ) -> Result<(), InstrumentError> {
        let shared = |memory: u32| self.scan.memories[memory as usize].shared;
        let add = match op {
            Operator::MemoryGrow { mem } => Added::Grow(mem),
            Operator::MemorySize { mem } if shared(mem) => Added::Size(mem),
            Operator::MemoryFill { mem } if !short || shared(mem) => Added::Fill(mem),
            Operator::MemoryCopy { dst_mem, src_mem }
                if !short || shared(dst_mem) || shared(src_mem) =>
            {
                Added::Copy(dst_mem, src_mem)
            }
            Operator::MemoryInit { data_index, mem } if !short || shared(mem) => {
                Added::Init(data_index, mem)
            }
            Operator::MemoryAtomicWait32 { memarg } => {
                out.instruction(&I::I64Const(memarg.offset as i64));
                Added::Wait32(memory_of(memarg)?)
            }
            Operator::MemoryAtomicWait64 { memarg } => {
                out.instruction(&I::I64Const(memarg.offset as i64));
                Added::Wait64(memory_of(memarg)?)
            }
            Operator::MemoryAtomicNotify { memarg } => {
                out.instruction(&I::I64Const(memarg.offset as i64));
                Added::Notify(memory_of(memarg)?)
            }
            Operator::DataDrop { data_index } => {
                out.instruction(&I::DataDrop(data_index));
                self.remember_drop(out, (false, data_index));
                return Ok(());
            }
            Operator::ElemDrop { elem_index } => {
                out.instruction(&I::ElemDrop(elem_index));
                self.remember_drop(out, (true, elem_index));
                return Ok(());
            }
            other => {
                let instruction = self.instruction(other).map_err(user)?;
                out.instruction(&instruction);
                return Ok(());
            }
        };
        out.instruction(&I::Call(self.index[&add]));
        Ok(())
    }

    fn remember_drop(&self, out: &mut Function, key: (bool, u32)) {
        out.instruction(&I::I32Const(1))
            .instruction(&I::GlobalSet(self.drop_global[&key]));
    }

    fn address(&self, memory: u32) -> ValType {
        if self.scan.memories[memory as usize].memory64 {
            ValType::I64
        } else {
            ValType::I32
        }
    }

    /// Adds types, imports, helper functions and globals.
    fn add(&mut self, out: &mut Sections) -> Result<(), InstrumentError> {
        for (ty, add) in (self.scan.types.len() as u32..).zip(self.added.clone()) {
            let (params, results) = self.signature(add);
            out.types.ty().function(params, results);
            match add.host_name() {
                Some(name) => {
                    out.imports
                        .import(HOST_MODULE, &name, EntityType::Function(ty));
                }
                None => {
                    out.functions.function(ty);
                    let body = self.helper(add);
                    out.code.function(&body);
                }
            }
            if add == Added::Redrop {
                out.exports.export(
                    &format!("{PREFIX}redrop"),
                    ExportKind::Func,
                    self.index[&add],
                );
            }
        }
        for _ in &self.scan.drops {
            out.globals.global(
                GlobalType {
                    val_type: ValType::I32,
                    mutable: true,
                    shared: false,
                },
                &ConstExpr::i32_const(0),
            );
        }
        Ok(())
    }

    fn signature(&self, add: Added) -> (Vec<ValType>, Vec<ValType>) {
        use ValType::{I32, I64};
        match add {
            Added::Grow(memory) => (vec![self.address(memory)], vec![self.address(memory)]),
            Added::Size(memory) => (vec![], vec![self.address(memory)]),
            Added::Sync(_) | Added::Redrop => (vec![], vec![]),
            Added::Wait32(memory) => (vec![self.address(memory), I32, I64, I64], vec![I32]),
            Added::Wait64(memory) => (vec![self.address(memory), I64, I64, I64], vec![I32]),
            Added::Notify(memory) => (vec![self.address(memory), I32, I64], vec![I32]),
            Added::Fill(memory) => {
                let address = self.address(memory);
                (vec![address, I32, address], vec![])
            }
            Added::Copy(to, from) => {
                let (to, from) = (self.address(to), self.address(from));
                let length = if to == I64 && from == I64 { I64 } else { I32 };
                (vec![to, from, length], vec![])
            }
            Added::Init(_, memory) => (vec![self.address(memory), I32, I32], vec![]),
        }
    }

    fn helper(&self, add: Added) -> Function {
        match add {
            Added::Fill(memory) => self.fill(memory),
            Added::Copy(to, from) => self.copy(to, from),
            Added::Init(data, memory) => self.init(data, memory),
            _ => self.redrop(),
        }
    }

    fn redrop(&self) -> Function {
        let mut out = Function::new([]);
        for ((is_elem, segment), global) in self
            .scan
            .drops
            .iter()
            .map(|key| (*key, self.drop_global[key]))
        {
            out.instruction(&I::GlobalGet(global))
                .instruction(&I::If(BlockType::Empty))
                .instruction(&if is_elem {
                    I::ElemDrop(segment)
                } else {
                    I::DataDrop(segment)
                })
                .instruction(&I::End);
        }
        out.instruction(&I::End);
        out
    }

    /// Leaves on the stack whether `address + length` is outside `memory` as
    /// this instance sees it.
    fn outside(&self, out: &mut Function, memory: u32, address: u32, length: (u32, ValType)) {
        let size = |out: &mut Function| {
            out.instruction(&I::MemorySize(memory));
            widen(out, self.address(memory));
            out.instruction(&I::I64Const(16)).instruction(&I::I64Shl);
        };
        // length > size || address > size - length
        out.instruction(&I::LocalGet(length.0));
        widen(out, length.1);
        size(out);
        out.instruction(&I::I64GtU);
        out.instruction(&I::LocalGet(address));
        widen(out, self.address(memory));
        size(out);
        out.instruction(&I::LocalGet(length.0));
        widen(out, length.1);
        out.instruction(&I::I64Sub)
            .instruction(&I::I64GtU)
            .instruction(&I::I32Or);
    }

    /// Lets this instance see the true size, if the range seems to be outside.
    fn sync(&self, out: &mut Function, memory: u32, address: u32, length: (u32, ValType)) {
        let Some(index) = self.index.get(&Added::Sync(memory)) else {
            return;
        };
        self.outside(out, memory, address, length);
        out.instruction(&I::If(BlockType::Empty))
            .instruction(&I::Call(*index))
            .instruction(&I::End);
    }

    /// If the range is short, or outside: one instruction does it, or traps.
    fn whole(
        &self,
        out: &mut Function,
        ranges: &[(u32, u32)],
        length: (u32, ValType),
        operation: &[I<'_>],
    ) {
        out.instruction(&I::LocalGet(length.0));
        konst(out, length.1, CHUNK_BYTES);
        out.instruction(&match length.1 {
            ValType::I64 => I::I64LeU,
            _ => I::I32LeU,
        });
        for (memory, address) in ranges {
            self.outside(out, *memory, *address, length);
            out.instruction(&I::I32Or);
        }
        out.instruction(&I::If(BlockType::Empty));
        for instruction in operation {
            out.instruction(instruction);
        }
        out.instruction(&I::Return).instruction(&I::End);
    }

    fn fill(&self, memory: u32) -> Function {
        let address = self.address(memory);
        let mut out = Function::new([]);
        let length = (2, address);
        self.sync(&mut out, memory, 0, length);
        let all = [
            I::LocalGet(0),
            I::LocalGet(1),
            I::LocalGet(2),
            I::MemoryFill(memory),
        ];
        self.whole(&mut out, &[(memory, 0)], length, &all);
        forward(&mut out, &[(0, address)], length, |out| {
            out.instruction(&I::LocalGet(0))
                .instruction(&I::LocalGet(1));
            konst(out, address, CHUNK_BYTES);
            out.instruction(&I::MemoryFill(memory));
        });
        for instruction in &all {
            out.instruction(instruction);
        }
        out.instruction(&I::End);
        out
    }

    fn copy(&self, to: u32, from: u32) -> Function {
        let (to_type, from_type) = (self.address(to), self.address(from));
        let length_type = if (to_type, from_type) == (ValType::I64, ValType::I64) {
            ValType::I64
        } else {
            ValType::I32
        };
        let length = (2, length_type);
        let mut out = Function::new([]);
        self.sync(&mut out, to, 0, length);
        self.sync(&mut out, from, 1, length);
        let operation = I::MemoryCopy {
            src_mem: from,
            dst_mem: to,
        };
        let all = [
            I::LocalGet(0),
            I::LocalGet(1),
            I::LocalGet(2),
            operation.clone(),
        ];
        self.whole(&mut out, &[(to, 0), (from, 1)], length, &all);
        if to == from {
            // A target behind its source is filled from the end, or the first
            // chunks would overwrite what the later ones read.
            let wide = to_type == ValType::I64;
            out.instruction(&I::LocalGet(0))
                .instruction(&I::LocalGet(1))
                .instruction(if wide { &I::I64GtU } else { &I::I32GtU })
                .instruction(&I::If(BlockType::Empty))
                .instruction(&I::Loop(BlockType::Empty));
            let (sub, add) = if wide {
                (I::I64Sub, I::I64Add)
            } else {
                (I::I32Sub, I::I32Add)
            };
            out.instruction(&I::LocalGet(2));
            konst(&mut out, length_type, CHUNK_BYTES);
            out.instruction(&sub).instruction(&I::LocalSet(2));
            for base in [0, 1] {
                out.instruction(&I::LocalGet(base))
                    .instruction(&I::LocalGet(2))
                    .instruction(&add);
            }
            konst(&mut out, length_type, CHUNK_BYTES);
            out.instruction(&operation);
            out.instruction(&I::LocalGet(2));
            konst(&mut out, length_type, CHUNK_BYTES);
            out.instruction(if wide { &I::I64GtU } else { &I::I32GtU })
                .instruction(&I::BrIf(0))
                .instruction(&I::End);
            for instruction in &all {
                out.instruction(instruction);
            }
            out.instruction(&I::Return).instruction(&I::End);
        }
        forward(&mut out, &[(0, to_type), (1, from_type)], length, |out| {
            out.instruction(&I::LocalGet(0))
                .instruction(&I::LocalGet(1));
            konst(out, length_type, CHUNK_BYTES);
            out.instruction(&operation);
        });
        for instruction in &all {
            out.instruction(instruction);
        }
        out.instruction(&I::End);
        out
    }

    fn init(&self, data: u32, memory: u32) -> Function {
        let mut out = Function::new([]);
        let length = (2, ValType::I32);
        self.sync(&mut out, memory, 0, length);
        let operation = I::MemoryInit {
            mem: memory,
            data_index: data,
        };
        let all = [
            I::LocalGet(0),
            I::LocalGet(1),
            I::LocalGet(2),
            operation.clone(),
        ];
        self.whole(&mut out, &[(memory, 0)], length, &all);
        // Out of the segment: let the one instruction trap before any effect.
        // (Of a dropped segment the first chunk traps.)
        out.instruction(&I::LocalGet(1))
            .instruction(&I::I64ExtendI32U)
            .instruction(&I::LocalGet(2))
            .instruction(&I::I64ExtendI32U)
            .instruction(&I::I64Add)
            .instruction(&I::I64Const(self.scan.data_bytes[data as usize] as i64))
            .instruction(&I::I64GtU)
            .instruction(&I::If(BlockType::Empty));
        for instruction in &all {
            out.instruction(instruction);
        }
        out.instruction(&I::Return).instruction(&I::End);
        let address = self.address(memory);
        forward(
            &mut out,
            &[(0, address), (1, ValType::I32)],
            length,
            |out| {
                out.instruction(&I::LocalGet(0))
                    .instruction(&I::LocalGet(1));
                konst(out, ValType::I32, CHUNK_BYTES);
                out.instruction(&operation);
            },
        );
        for instruction in &all {
            out.instruction(instruction);
        }
        out.instruction(&I::End);
        out
    }
}

/// A loop that does `chunk` and steps `pointers` and `length`, while more than
/// one chunk is left.
fn forward(
    out: &mut Function,
    pointers: &[(u32, ValType)],
    length: (u32, ValType),
    chunk: impl Fn(&mut Function),
) {
    out.instruction(&I::Loop(BlockType::Empty));
    chunk(out);
    for (pointer, ty) in pointers {
        out.instruction(&I::LocalGet(*pointer));
        konst(out, *ty, CHUNK_BYTES);
        out.instruction(if *ty == ValType::I64 {
            &I::I64Add
        } else {
            &I::I32Add
        })
        .instruction(&I::LocalSet(*pointer));
    }
    let wide = length.1 == ValType::I64;
    out.instruction(&I::LocalGet(length.0));
    konst(out, length.1, CHUNK_BYTES);
    out.instruction(if wide { &I::I64Sub } else { &I::I32Sub })
        .instruction(&I::LocalTee(length.0));
    konst(out, length.1, CHUNK_BYTES);
    out.instruction(if wide { &I::I64GtU } else { &I::I32GtU })
        .instruction(&I::BrIf(0))
        .instruction(&I::End);
}

fn konst(out: &mut Function, ty: ValType, value: u64) {
    out.instruction(&match ty {
        ValType::I64 => I::I64Const(value as i64),
        _ => I::I32Const(value as i32),
    });
}

fn widen(out: &mut Function, ty: ValType) {
    if ty == ValType::I32 {
        out.instruction(&I::I64ExtendI32U);
    }
}

fn unshared(ty: wasmparser::MemoryType) -> wasmparser::MemoryType {
    wasmparser::MemoryType {
        shared: false,
        ..ty
    }
}
