//! Second pass: polls, status results, saved frames, and clones with entries at every point. Input
//! is a lowered module; see [`super::lower`]. The functions of the output are, in this order: imports,
//! hot versions, the functions of [`Callees`], and clones, each followed by its loop versions.

use super::body;
use super::callees::{Callees, SegmentOp};
use super::callgraph::{self, CallGraph, Calls};
use super::emit::Written;
use super::error::InstrumentError;
use super::lower::Lowered;
use super::meta::{self, Global, Import, Meta, PREFIX, slot_type};
use super::plan::{BlockTypes, Plan, PlanContext};
use super::scan::{self, Scan};
use std::collections::BTreeSet;
use wasm_encoder::reencode::{Reencode, RoundtripReencoder, utils};
use wasm_encoder::{
    BranchHints, CodeSection, ConstExpr, CustomSection, DataCountSection, DataSection,
    ElementSection, Elements, EntityType, ExportKind, ExportSection, FunctionSection,
    GlobalSection, ImportSection, IndirectNameMap, MemorySection, MemoryType, Module, NameMap,
    NameSection, RefType, TableSection, TableType, TypeSection,
};
use wasmparser::{
    FuncToValidate, FuncType, FuncValidatorAllocations, FunctionBody, Operator, Parser, Payload,
    TypeRef, ValidPayload, Validator, ValidatorResources,
};

/// The parts of the lowered module that the second pass reads.
struct Input<'a> {
    types: Vec<FuncType>,
    functions: Vec<u32>,
    imports: Vec<(&'a str, &'a str)>,
    bodies: Vec<(FuncToValidate<ValidatorResources>, FunctionBody<'a>)>,
    calls: Vec<Calls>,
    /// Functions whose reference can be taken or that the host may call.
    referenced: BTreeSet<u32>,
    mutable_globals: Vec<(u32, wasmparser::ValType)>,
    tables: u32,
    changing_tables: BTreeSet<u32>,
    segment_ops: Vec<SegmentOp>,
    tables64: Vec<bool>,
    memories: MemorySection,
    memories64: Vec<bool>,
    memory_count: u32,
    table_section: TableSection,
    globals: GlobalSection,
    exports: ExportSection,
    elements: ElementSection,
    element_count: u32,
    data: DataSection,
    data_count: Option<u32>,
}

pub(crate) fn relocate(
    lowered: Lowered,
    scan: &Scan,
    original: [u8; 32],
) -> Result<Vec<u8>, InstrumentError> {
    let mut input = read(&lowered.bytes, lowered.start)?;
    let imported = input.imports.len() as u32;
    let referenced: Vec<u32> = input.referenced.iter().copied().collect();
    let graph = CallGraph::new(
        std::mem::take(&mut input.types),
        std::mem::take(&mut input.functions),
        imported,
        &referenced,
        std::mem::take(&mut input.calls),
    );
    let mut written = write_functions(&mut input, &graph, &referenced, scan)?;

    let mut meta = Meta {
        version: meta::VERSION,
        original,
        imports: imports(&input, &graph)?,
        points: written
            .functions
            .last()
            .map_or(0, |last| last.first_point + last.points.len() as u32),
        functions: std::mem::take(&mut written.functions),
        memories: scan.memories.clone(),
        globals: Vec::new(),
        tables: Vec::new(),
        data: lowered.data,
        directory: referenced,
        start: lowered.start,
        names: lowered.names,
    };
    let mut out = Output {
        types: types(&graph, &written.block_types)?,
        clone_type: written.clone_type,
        ..Output::default()
    };
    out.functions(&input, &graph, &written);
    out.hidden(&mut input, &mut meta, &written.callees)?;
    for (function, _) in &written.hot {
        out.code.function(function);
    }
    for (_, function) in written.callees.functions() {
        out.code.function(&function);
    }
    for (function, _) in &written.clones {
        out.code.function(function);
    }
    let hints = |functions: &[Written], first: u32, out: &mut BranchHints| {
        for (at, function) in (first..).zip(functions) {
            if !function.1.is_empty() {
                out.function_hints(at, function.1.iter().copied());
            }
        }
    };
    hints(&written.hot, imported, &mut out.hints);
    hints(&written.clones, written.callees.end(), &mut out.hints);
    out.names(&meta, &graph, &written.callees);
    out.finish(&input, &meta)
}

fn read(bytes: &[u8], start: Option<u32>) -> Result<Input<'_>, InstrumentError> {
    let mut validator = Validator::new_with_features(scan::features());
    let mut input = Input {
        types: Vec::new(),
        functions: Vec::new(),
        imports: Vec::new(),
        bodies: Vec::new(),
        calls: Vec::new(),
        referenced: start.into_iter().collect(),
        mutable_globals: Vec::new(),
        tables: 0,
        changing_tables: BTreeSet::new(),
        segment_ops: Vec::new(),
        tables64: Vec::new(),
        memories: MemorySection::new(),
        memories64: Vec::new(),
        memory_count: 0,
        table_section: TableSection::new(),
        globals: GlobalSection::new(),
        exports: ExportSection::new(),
        elements: ElementSection::new(),
        element_count: 0,
        data: DataSection::new(),
        data_count: None,
    };
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        if let ValidPayload::Func(function, body) = validator.payload(&payload)? {
            let mut calls = Calls::default();
            for op in body.get_operators_reader()? {
                let op = op?;
                callgraph::note(&mut calls, &op);
                input.note(&op);
            }
            input.calls.push(calls);
            input.bodies.push((function, body));
        }
        input.section(payload)?;
    }
    Ok(input)
}

impl<'a> Input<'a> {
    fn section(&mut self, payload: Payload<'a>) -> Result<(), InstrumentError> {
        let mut same = Collect(&mut self.referenced);
        match payload {
            Payload::TypeSection(section) => {
                for ty in section.into_iter_err_on_gc_types() {
                    self.types.push(ty?);
                }
            }
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import?;
                    if let TypeRef::Func(ty) = import.ty {
                        self.functions.push(ty);
                        self.imports.push((import.module, import.name));
                    }
                }
            }
            Payload::FunctionSection(section) => {
                for ty in section {
                    self.functions.push(ty?);
                }
            }
            Payload::TableSection(section) => {
                self.tables = section.count();
                for table in section.clone() {
                    self.tables64.push(table?.ty.table64);
                }
                utils::parse_table_section(&mut same, &mut self.table_section, section)?;
            }
            Payload::MemorySection(section) => {
                self.memory_count = section.count();
                for memory in section.clone() {
                    self.memories64.push(memory?.memory64);
                }
                utils::parse_memory_section(&mut same, &mut self.memories, section)?;
            }
            Payload::GlobalSection(section) => {
                for (index, global) in (0..).zip(section.clone()) {
                    let ty = global?.ty;
                    if ty.mutable {
                        self.mutable_globals.push((index, ty.content_type));
                    }
                }
                utils::parse_global_section(&mut same, &mut self.globals, section)?;
            }
            Payload::ExportSection(section) => {
                utils::parse_export_section(&mut same, &mut self.exports, section)?;
            }
            Payload::ElementSection(section) => {
                self.element_count = section.count();
                utils::parse_element_section(&mut same, &mut self.elements, section)?;
            }
            Payload::DataCountSection { count, .. } => self.data_count = Some(count),
            Payload::DataSection(section) => {
                utils::parse_data_section(&mut same, &mut self.data, section)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn note(&mut self, op: &Operator<'_>) {
        if let Some(op) = SegmentOp::of(op)
            && !self.segment_ops.contains(&op)
        {
            self.segment_ops.push(op);
        }
        match *op {
            Operator::RefFunc { function_index } => {
                self.referenced.insert(function_index);
            }
            Operator::TableSet { table }
            | Operator::TableFill { table }
            | Operator::TableGrow { table }
            | Operator::TableInit { table, .. }
            | Operator::TableCopy {
                dst_table: table, ..
            } => {
                self.changing_tables.insert(table);
            }
            _ => {}
        }
    }
}

/// Re-encodes unchanged, and collects every function that a section names: in exports, elements and
/// initialisers a name is a reference.
struct Collect<'a>(&'a mut BTreeSet<u32>);

impl Reencode for Collect<'_> {
    type Error = std::convert::Infallible;

    fn function_index(
        &mut self,
        index: u32,
    ) -> Result<u32, wasm_encoder::reencode::Error<Self::Error>> {
        self.0.insert(index);
        Ok(index)
    }
}

struct Functions {
    hot: Vec<Written>,
    /// Clones, each followed by its loop versions.
    clones: Vec<Written>,
    callees: Callees,
    functions: Vec<meta::Function>,
    block_types: BlockTypes,
    clone_type: u32,
}

fn write_functions(
    input: &mut Input<'_>,
    graph: &CallGraph,
    referenced: &[u32],
    scan: &Scan,
) -> Result<Functions, InstrumentError> {
    let types = graph.types().len() as u32;
    let mut block_types = BlockTypes::new(2 * types);
    let i32 = wasmparser::ValType::I32;
    let clone_type = block_types.function(&[i32], &[i32]);
    let callees = Callees::new(
        graph,
        referenced,
        &input.segment_ops,
        (&input.tables64, &input.memories64),
        &mut block_types,
    );
    let (mut hot, mut clones, mut functions) = (Vec::new(), Vec::new(), Vec::new());
    let context = PlanContext {
        graph,
        callees: &callees,
        control: input.memory_count,
        refs: input.tables,
        status_types: types,
    };
    let mut allocations = FuncValidatorAllocations::default();
    let mut next_point = 0;
    for (function, (to_validate, code)) in
        (graph.imported()..).zip(std::mem::take(&mut input.bodies))
    {
        let mut validator = to_validate.into_validator(allocations);
        let body = body::read(&code, &mut validator, graph, function)?;
        allocations = validator.into_allocations();
        let place = scan.place((function - graph.imported()) as usize);
        let plan = Plan::new(&body, &context, function, next_point, &place)?;
        hot.push(plan.hot(&mut block_types)?);
        let first = clones.len();
        let index = callees.end() + first as u32;
        if let Some(mut meta) = plan.meta(index)? {
            next_point += meta.points.len() as u32;
            let hot_bytes = hot.last().map_or(0, |hot: &Written| hot.0.byte_len());
            let versions = plan.loop_versions(&mut block_types, hot_bytes)?;
            let first_loop = versions.is_some().then_some(index + 1);
            clones.push(plan.clone_version(&mut block_types, first_loop)?);
            let versions = versions.unwrap_or_default();
            meta.loop_versions = versions.len() as u32;
            clones.extend(versions);
            functions.push(meta);
        }
        check_sizes(hot.last().into_iter().chain(&clones[first..]), &place)?;
    }
    Ok(Functions {
        hot,
        clones,
        callees,
        functions,
        block_types,
        clone_type,
    })
}

/// Maximum bytes of a function's body (an implementation limit).
const BODY_BYTES_MAX: usize = 7_654_321;

/// Refuses a function one of whose versions became too large, with its place.
fn check_sizes<'a>(
    versions: impl Iterator<Item = &'a Written>,
    place: &str,
) -> Result<(), InstrumentError> {
    let sizes = versions.map(|written| written.0.byte_len());
    let largest = sizes.max().unwrap_or(0);
    if largest <= BODY_BYTES_MAX {
        return Ok(());
    }
    Err(InstrumentError::Unsupported {
        what: format!("a function that takes {largest} bytes of code when it can be captured"),
        place: format!("{place}; a function has at most {BODY_BYTES_MAX}"),
    })
}

fn imports(input: &Input<'_>, graph: &CallGraph) -> Result<Vec<Import>, InstrumentError> {
    (0u32..)
        .zip(&input.imports)
        .map(|(function, (module, name))| {
            let ty = graph.function_type(function);
            let slots = |types: &[wasmparser::ValType]| {
                types
                    .iter()
                    .map(|ty| slot_type(*ty))
                    .collect::<Result<_, _>>()
            };
            Ok(Import {
                module: (*module).into(),
                name: (*name).into(),
                params: slots(ty.params())?,
                results: slots(ty.results())?,
            })
        })
        .collect()
}

/// The module's own types, the same with a status, and block types.
fn types(graph: &CallGraph, blocks: &BlockTypes) -> Result<TypeSection, InstrumentError> {
    let mut section = TypeSection::new();
    let mut add = |params: &[wasmparser::ValType],
                   results: &[wasmparser::ValType],
                   status: bool|
     -> Result<(), InstrumentError> {
        let convert = |types: &[wasmparser::ValType]| {
            types
                .iter()
                .map(|ty| RoundtripReencoder.val_type(*ty))
                .collect::<Result<Vec<_>, _>>()
        };
        let mut results = convert(results)?;
        results.extend(status.then_some(wasm_encoder::ValType::I32));
        section.ty().function(convert(params)?, results);
        Ok(())
    };
    for status in [false, true] {
        for ty in graph.types() {
            if ty.results().len() >= meta::RESULTS_MAX as usize {
                return Err(InstrumentError::Unsupported {
                    what: format!("a function type with {} results", ty.results().len()),
                    place: format!("fewer than {} are accepted", meta::RESULTS_MAX),
                });
            }
            add(ty.params(), ty.results(), status)?;
        }
    }
    for (params, results) in &blocks.list {
        add(params, results, false)?;
    }
    Ok(section)
}

#[derive(Default)]
struct Output {
    types: TypeSection,
    clone_type: u32,
    imports: ImportSection,
    functions: FunctionSection,
    hints: BranchHints,
    code: CodeSection,
    names: NameSection,
}

impl Output {
    fn functions(&mut self, input: &Input<'_>, graph: &CallGraph, written: &Functions) {
        let status = graph.types().len() as u32;
        for (function, (module, name)) in (0u32..).zip(&input.imports) {
            let ty = EntityType::Function(status + graph.type_index(function));
            self.imports.import(module, name, ty);
        }
        for function in graph.imported()..graph.functions() {
            let ty = graph.type_index(function);
            self.functions.function(if graph.has_status(function) {
                status + ty
            } else {
                ty
            });
        }
        for (ty, _) in written.callees.functions() {
            self.functions.function(ty);
        }
        for _ in &written.clones {
            self.functions.function(self.clone_type);
        }
    }

    /// Adds the control memory, the hidden tables and the hidden exports.
    fn hidden(
        &mut self,
        input: &mut Input<'_>,
        meta: &mut Meta,
        callees: &Callees,
    ) -> Result<(), InstrumentError> {
        // Twice, see `meta`.
        for _ in 0..2 {
            input.memories.memory(MemoryType {
                minimum: meta::CONTROL_PAGES.into(),
                maximum: Some(meta::CONTROL_PAGES.into()),
                memory64: false,
                shared: false,
                page_size_log2: None,
            });
        }
        let directory = meta.directory.len() as u32;
        let lengths = [
            (meta::REFS_ENTRIES, meta::REFS_ENTRIES_MAX),
            (directory, directory),
        ];
        for (length, maximum) in lengths {
            input.table_section.table(TableType {
                element_type: RefType::FUNCREF,
                table64: false,
                minimum: length.into(),
                maximum: Some(maximum.into()),
                shared: false,
            });
        }
        input.elements.active(
            Some(input.tables + 1),
            &ConstExpr::i32_const(0),
            Elements::Functions((&meta.directory).into()),
        );
        let exports = &mut input.exports;
        for (table, name) in ["refs", "dir"].iter().enumerate() {
            exports.export(
                &format!("{PREFIX}{name}"),
                ExportKind::Table,
                input.tables + table as u32,
            );
        }
        // (With the control memories, the references table and the directory.)
        for memory in 0..input.memory_count + 2 {
            exports.export(&meta::memory_export(memory), ExportKind::Memory, memory);
        }
        for table in 0..input.tables + 2 {
            exports.export(&meta::table_export(table), ExportKind::Table, table);
        }
        for global in 0..input.globals.len() {
            exports.export(&meta::global_export(global), ExportKind::Global, global);
        }
        for function in callees.exported() {
            exports.export(&meta::function_export(function), ExportKind::Func, function);
        }
        for (index, ty) in &input.mutable_globals {
            meta.globals.push(Global {
                export: meta::global_export(*index),
                ty: slot_type(*ty)?,
            });
        }
        for table in &input.changing_tables {
            meta.tables.push((*table, meta::table_export(*table)));
        }
        if let Some(start) = meta.start {
            exports.export(&format!("{PREFIX}start"), ExportKind::Func, start);
        }
        Ok(())
    }

    fn names(&mut self, meta: &Meta, graph: &CallGraph, callees: &Callees) {
        let mut names = NameMap::new();
        for (index, name) in &meta.names {
            names.append(*index, name);
        }
        // By their names, backtraces omit them.
        for function in graph.functions()..callees.end() {
            names.append(function, &meta::function_export(function));
        }
        for function in &meta.functions {
            let name = meta.function_name(function.index);
            for index in function.clones() {
                names.append(index, &name);
            }
        }
        self.names.functions(&names);
        self.names.locals(&IndirectNameMap::new());
    }

    fn finish(self, input: &Input<'_>, meta: &Meta) -> Result<Vec<u8>, InstrumentError> {
        let encoded = postcard::to_stdvec(meta)
            .map_err(|error| InstrumentError::Malformed(error.to_string()))?;
        let mut module = Module::new();
        module
            .section(&CustomSection {
                name: meta::SECTION.into(),
                data: (&encoded).into(),
            })
            .section(&self.types)
            .section(&self.imports)
            .section(&self.functions)
            .section(&input.table_section)
            .section(&input.memories)
            .section(&input.globals)
            .section(&input.exports)
            .section(&input.elements);
        if let Some(count) = input.data_count {
            module.section(&DataCountSection { count });
        }
        module
            .section(&self.hints)
            .section(&self.code)
            .section(&input.data)
            .section(&self.names);
        let bytes = module.finish();
        Validator::new_with_features(scan::features()).validate_all(&bytes)?;
        Ok(bytes)
    }
}
