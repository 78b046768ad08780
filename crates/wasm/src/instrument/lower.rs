//! First pass: rewrites in plain WebAssembly what the second pass cannot interrupt.
//!
//! - Memories become unshared and defined by the module (every thread's instance maps the same
//!   bytes, so code is as fast as in a single-threaded module); `memory.grow`, `wait`, `notify`
//!   and, where threads may grow the memory, `memory.size` become host calls.
//! - Long bulk operations on memories and tables run in chunks of 64 KiB inside helper functions,
//!   whose loops then get polls like any other. Their bounds are checked first.
//! - Active data segments move to the runtime, which applies them once per machine; `start` becomes
//!   a call of the runtime; dropped segments are recorded in globals, so that instances created
//!   later drop them too.

use super::error::InstrumentError;
use super::meta::{DataSegment, HOST_MODULE, PREFIX, TABLE_ENTRIES_MAX};
use super::scan::{Scan, Store, memory_of};
use std::collections::HashMap;
use wasm_encoder::reencode::{Error as ReencodeError, Reencode, utils};
use wasm_encoder::{
    BlockType, CodeSection, ConstExpr, DataCountSection, DataSection, ElementSection, EntityType,
    ExportKind, ExportSection, Function, FunctionSection, GlobalSection, GlobalType, ImportSection,
    Instruction as I, MemorySection, Module, TableSection, TableType, TypeSection, ValType,
};
use wasmparser::{DataKind, Operator, Parser, Payload, TypeRef};

/// Maximum bytes, and maximum table entries, of a bulk operation that runs in one piece.
pub(crate) const CHUNK_BYTES: u64 = 64 << 10;
const CHUNK_ENTRIES: u64 = CHUNK_BYTES / 8;

/// The lowered module, with facts that its encoding lacks.
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
    /// Updates this instance's memory size.
    Sync(u32),
    Wait32(u32),
    Wait64(u32),
    Notify(u32),
    Fill(Store),
    Copy(Store, Store),
    Init(u32, Store),
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
    /// First of the globals that record dropped segments, and the segments (data, element) that
    /// have one.
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

    fn table_type(
        &mut self,
        ty: wasmparser::TableType,
    ) -> Result<TableType, ReencodeError<InstrumentError>> {
        let mut ty = utils::table_type(self, ty)?;
        // See `TABLE_ENTRIES_MAX`.
        let most = TABLE_ENTRIES_MAX.max(ty.minimum);
        ty.maximum = ty.maximum.map(|maximum| maximum.min(most));
        Ok(ty)
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
            let uses = &scan.memory_usage[index as usize];
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
        added.extend(scan.fills.iter().map(|store| Added::Fill(*store)));
        added.extend(scan.copies.iter().map(|(to, from)| Added::Copy(*to, *from)));
        added.extend(
            scan.inits
                .iter()
                .map(|(segment, store)| Added::Init(*segment, *store)),
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
                            // A dropped segment has length zero.
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
            let constant = last_const;
            last_const = match op {
                Operator::I32Const { value } => Some(u64::from(value as u32)),
                Operator::I64Const { value } => Some(value as u64),
                _ => None,
            };
            self.op(&mut out, op, constant)?;
        }
        Ok(out)
    }

    fn op(
        &mut self,
        out: &mut Function,
        op: Operator<'_>,
        constant: Option<u64>,
    ) -> Result<(), InstrumentError> {
        let short = constant.is_some_and(|bytes| bytes <= CHUNK_BYTES);
        let few = constant.is_some_and(|entries| entries <= CHUNK_ENTRIES);
        let shared = |memory: u32| self.scan.memories[memory as usize].shared;
        let add = match op {
            Operator::MemoryGrow { mem } => Added::Grow(mem),
            Operator::MemorySize { mem } if shared(mem) => Added::Size(mem),
            Operator::MemoryFill { mem } if !short || shared(mem) => {
                Added::Fill(Store::Memory(mem))
            }
            Operator::MemoryCopy { dst_mem, src_mem }
                if !short || shared(dst_mem) || shared(src_mem) =>
            {
                Added::Copy(Store::Memory(dst_mem), Store::Memory(src_mem))
            }
            Operator::MemoryInit { data_index, mem } if !short || shared(mem) => {
                Added::Init(data_index, Store::Memory(mem))
            }
            Operator::TableFill { table } if !few => Added::Fill(Store::Table(table)),
            Operator::TableCopy {
                dst_table,
                src_table,
            } if !few => Added::Copy(Store::Table(dst_table), Store::Table(src_table)),
            Operator::TableInit { elem_index, table } if !few => {
                Added::Init(elem_index, Store::Table(table))
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

    /// Type of an index into a memory or a table.
    fn place(&self, store: Store) -> ValType {
        match store {
            Store::Memory(memory) => self.address(memory),
            Store::Table(table) if self.scan.tables[table as usize].table64 => ValType::I64,
            Store::Table(_) => ValType::I32,
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
            Added::Fill(store) => {
                let place = self.place(store);
                let value = match store {
                    Store::Memory(_) => I32,
                    Store::Table(_) => ValType::FUNCREF,
                };
                (vec![place, value, place], vec![])
            }
            Added::Copy(to, from) => {
                let (to, from) = (self.place(to), self.place(from));
                let length = if to == I64 && from == I64 { I64 } else { I32 };
                (vec![to, from, length], vec![])
            }
            Added::Init(_, store) => (vec![self.place(store), I32, I32], vec![]),
        }
    }

    fn helper(&self, add: Added) -> Function {
        match add {
            Added::Fill(store) => self.fill(store),
            Added::Copy(to, from) => self.copy(to, from),
            Added::Init(segment, store) => self.init(segment, store),
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

    /// Pushes whether `address + length` exceeds `store` as this instance sees it.
    fn outside(&self, out: &mut Function, store: Store, address: u32, length: (u32, ValType)) {
        let size = |out: &mut Function| match store {
            Store::Memory(memory) => {
                out.instruction(&I::MemorySize(memory));
                widen(out, self.address(memory));
                out.instruction(&I::I64Const(16)).instruction(&I::I64Shl);
            }
            Store::Table(table) => {
                out.instruction(&I::TableSize(table));
                widen(out, self.place(store));
            }
        };
        // length > size || address > size - length
        out.instruction(&I::LocalGet(length.0));
        widen(out, length.1);
        size(out);
        out.instruction(&I::I64GtU);
        out.instruction(&I::LocalGet(address));
        widen(out, self.place(store));
        size(out);
        out.instruction(&I::LocalGet(length.0));
        widen(out, length.1);
        out.instruction(&I::I64Sub)
            .instruction(&I::I64GtU)
            .instruction(&I::I32Or);
    }

    /// Updates this instance's size, if the range seems to be out of bounds.
    fn sync(&self, out: &mut Function, store: Store, address: u32, length: (u32, ValType)) {
        let Store::Memory(memory) = store else {
            return;
        };
        let Some(index) = self.index.get(&Added::Sync(memory)) else {
            return;
        };
        self.outside(out, store, address, length);
        out.instruction(&I::If(BlockType::Empty))
            .instruction(&I::Call(*index))
            .instruction(&I::End);
    }

    /// For a short or out-of-bounds range: one instruction performs it, or traps.
    fn whole(
        &self,
        out: &mut Function,
        ranges: &[(Store, u32)],
        length: (u32, ValType),
        operation: &[I<'_>],
    ) {
        out.instruction(&I::LocalGet(length.0));
        konst(out, length.1, chunk_of(ranges[0].0));
        out.instruction(&match length.1 {
            ValType::I64 => I::I64LeU,
            _ => I::I32LeU,
        });
        for (store, address) in ranges {
            self.outside(out, *store, *address, length);
            out.instruction(&I::I32Or);
        }
        out.instruction(&I::If(BlockType::Empty));
        for instruction in operation {
            out.instruction(instruction);
        }
        out.instruction(&I::Return).instruction(&I::End);
    }

    fn fill(&self, store: Store) -> Function {
        let place = self.place(store);
        let mut out = Function::new([]);
        let length = (2, place);
        self.sync(&mut out, store, 0, length);
        let operation = match store {
            Store::Memory(memory) => I::MemoryFill(memory),
            Store::Table(table) => I::TableFill(table),
        };
        let all = [
            I::LocalGet(0),
            I::LocalGet(1),
            I::LocalGet(2),
            operation.clone(),
        ];
        self.whole(&mut out, &[(store, 0)], length, &all);
        let chunk = chunk_of(store);
        forward(&mut out, &[(0, place)], length, chunk, |out| {
            out.instruction(&I::LocalGet(0))
                .instruction(&I::LocalGet(1));
            konst(out, place, chunk);
            out.instruction(&operation);
        });
        for instruction in &all {
            out.instruction(instruction);
        }
        out.instruction(&I::End);
        out
    }

    fn copy(&self, to: Store, from: Store) -> Function {
        let (to_type, from_type) = (self.place(to), self.place(from));
        let chunk = chunk_of(to);
        let length_type = if (to_type, from_type) == (ValType::I64, ValType::I64) {
            ValType::I64
        } else {
            ValType::I32
        };
        let length = (2, length_type);
        let mut out = Function::new([]);
        self.sync(&mut out, to, 0, length);
        self.sync(&mut out, from, 1, length);
        let operation = match (to, from) {
            (Store::Table(to), Store::Table(from)) => I::TableCopy {
                src_table: from,
                dst_table: to,
            },
            (Store::Memory(to) | Store::Table(to), Store::Memory(from) | Store::Table(from)) => {
                I::MemoryCopy {
                    src_mem: from,
                    dst_mem: to,
                }
            }
        };
        let all = [
            I::LocalGet(0),
            I::LocalGet(1),
            I::LocalGet(2),
            operation.clone(),
        ];
        self.whole(&mut out, &[(to, 0), (from, 1)], length, &all);
        if to == from {
            // A target behind its source is filled from the end; otherwise the first chunks would
            // overwrite the source of later ones.
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
            konst(&mut out, length_type, chunk);
            out.instruction(&sub).instruction(&I::LocalSet(2));
            for base in [0, 1] {
                out.instruction(&I::LocalGet(base))
                    .instruction(&I::LocalGet(2))
                    .instruction(&add);
            }
            konst(&mut out, length_type, chunk);
            out.instruction(&operation);
            out.instruction(&I::LocalGet(2));
            konst(&mut out, length_type, chunk);
            out.instruction(if wide { &I::I64GtU } else { &I::I32GtU })
                .instruction(&I::BrIf(0))
                .instruction(&I::End);
            for instruction in &all {
                out.instruction(instruction);
            }
            out.instruction(&I::Return).instruction(&I::End);
        }
        forward(
            &mut out,
            &[(0, to_type), (1, from_type)],
            length,
            chunk,
            |out| {
                out.instruction(&I::LocalGet(0))
                    .instruction(&I::LocalGet(1));
                konst(out, length_type, chunk);
                out.instruction(&operation);
            },
        );
        for instruction in &all {
            out.instruction(instruction);
        }
        out.instruction(&I::End);
        out
    }

    fn init(&self, segment: u32, store: Store) -> Function {
        let mut out = Function::new([]);
        let length = (2, ValType::I32);
        self.sync(&mut out, store, 0, length);
        let (operation, items) = match store {
            Store::Memory(mem) => (
                I::MemoryInit {
                    mem,
                    data_index: segment,
                },
                self.scan.data_bytes[segment as usize],
            ),
            Store::Table(table) => (
                I::TableInit {
                    elem_index: segment,
                    table,
                },
                self.scan.elem_items[segment as usize],
            ),
        };
        let chunk = chunk_of(store);
        let all = [
            I::LocalGet(0),
            I::LocalGet(1),
            I::LocalGet(2),
            operation.clone(),
        ];
        self.whole(&mut out, &[(store, 0)], length, &all);
        // Out of the segment's bounds: the single instruction traps before any effect. (For a
        // dropped segment the first chunk traps.)
        out.instruction(&I::LocalGet(1))
            .instruction(&I::I64ExtendI32U)
            .instruction(&I::LocalGet(2))
            .instruction(&I::I64ExtendI32U)
            .instruction(&I::I64Add)
            .instruction(&I::I64Const(items as i64))
            .instruction(&I::I64GtU)
            .instruction(&I::If(BlockType::Empty));
        for instruction in &all {
            out.instruction(instruction);
        }
        out.instruction(&I::Return).instruction(&I::End);
        let place = self.place(store);
        forward(
            &mut out,
            &[(0, place), (1, ValType::I32)],
            length,
            chunk,
            |out| {
                out.instruction(&I::LocalGet(0))
                    .instruction(&I::LocalGet(1));
                konst(out, ValType::I32, chunk);
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

/// Bytes of a memory or entries of a table per chunk.
fn chunk_of(store: Store) -> u64 {
    match store {
        Store::Memory(_) => CHUNK_BYTES,
        Store::Table(_) => CHUNK_ENTRIES,
    }
}

/// A loop that performs `piece` of length `chunk` and advances `pointers` and `length`, while more
/// than one chunk is left.
fn forward(
    out: &mut Function,
    pointers: &[(u32, ValType)],
    length: (u32, ValType),
    chunk: u64,
    piece: impl Fn(&mut Function),
) {
    out.instruction(&I::Loop(BlockType::Empty));
    piece(out);
    for (pointer, ty) in pointers {
        out.instruction(&I::LocalGet(*pointer));
        konst(out, *ty, chunk);
        out.instruction(if *ty == ValType::I64 {
            &I::I64Add
        } else {
            &I::I32Add
        })
        .instruction(&I::LocalSet(*pointer));
    }
    let wide = length.1 == ValType::I64;
    out.instruction(&I::LocalGet(length.0));
    konst(out, length.1, chunk);
    out.instruction(if wide { &I::I64Sub } else { &I::I32Sub })
        .instruction(&I::LocalTee(length.0));
    konst(out, length.1, chunk);
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
