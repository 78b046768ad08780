//! The modules that are compiled from an instrumented module: the hot module, in which threads run,
//! and for each function a *resume module* with its clone and its loop versions.
//!
//! Clones are most of an instrumented module, and few are ever needed: those of functions that
//! stood on the stack of a thread when it was captured. So each is compiled when it is first needed.
//! An instance of a resume module imports memories, tables, globals and callees from the thread's
//! instance of the hot module, under the names by which that exports them. It has only the types that
//! it uses, because the engine compiles code for each type of a module: 296 functions instead of one
//! for a small function of CPython. All other indices except those of functions are the same.

use super::error::InstrumentError;
use super::meta::{self, HOST_MODULE, Meta};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use wasm_encoder::reencode::{self, Reencode, RoundtripReencoder};
use wasm_encoder::{
    BranchHint, BranchHints, CodeSection, EntityType, ExportKind, ExportSection, Function,
    FunctionSection, GlobalType, ImportSection, MemoryType, Module, NameMap, NameSection,
    RawSection, TableType, TypeSection,
};
use wasmparser::{
    BinaryReader, CustomSectionReader, FuncType, FunctionBody, KnownCustom, Operator, Parser,
    Payload, TypeRef,
};

/// Where the parts of an instrumented module are that resume modules need.
#[derive(Debug, Default)]
pub struct Layout {
    types: Vec<FuncType>,
    imported: u32,
    /// Type of each function, imported ones first.
    function_types: Vec<u32>,
    /// Body of each function that is not imported.
    bodies: Vec<Range<usize>>,
    tables: Vec<TableType>,
    memories: Vec<MemoryType>,
    globals: Vec<GlobalType>,
    /// Hints for branches by function: the offset in its body, and whether the branch is likely.
    hints: HashMap<u32, Vec<(u32, bool)>>,
}

impl Layout {
    /// Reads an instrumented module.
    ///
    /// # Errors
    /// [`InstrumentError`] if the module is not well-formed.
    pub fn read(module: &[u8]) -> Result<Self, InstrumentError> {
        let mut layout = Layout::default();
        for payload in Parser::new(0).parse_all(module) {
            match payload? {
                Payload::TypeSection(section) => {
                    for ty in section.into_iter_err_on_gc_types() {
                        layout.types.push(ty?);
                    }
                }
                Payload::ImportSection(section) => {
                    for import in section.into_imports() {
                        let TypeRef::Func(ty) = import?.ty else {
                            return Err(malformed("it imports what is not a function"));
                        };
                        layout.function_types.push(ty);
                        layout.imported += 1;
                    }
                }
                Payload::FunctionSection(section) => {
                    for ty in section {
                        layout.function_types.push(ty?);
                    }
                }
                Payload::TableSection(section) => {
                    for table in section {
                        layout
                            .tables
                            .push(RoundtripReencoder.table_type(table?.ty)?);
                    }
                }
                Payload::MemorySection(section) => {
                    for memory in section {
                        layout
                            .memories
                            .push(RoundtripReencoder.memory_type(memory?)?);
                    }
                }
                Payload::GlobalSection(section) => {
                    for global in section {
                        layout
                            .globals
                            .push(RoundtripReencoder.global_type(global?.ty)?);
                    }
                }
                Payload::CustomSection(section) => {
                    if let KnownCustom::BranchHints(reader) = section.as_known() {
                        for function in reader {
                            let function = function?;
                            let hints = function.hints.into_iter();
                            let hints = hints.map(|hint| hint.map(|it| (it.func_offset, it.taken)));
                            let hints = hints.collect::<Result<_, _>>()?;
                            layout.hints.insert(function.func, hints);
                        }
                    }
                }
                Payload::CodeSectionEntry(body) => layout.bodies.push(range(body.range())),
                _ => {}
            }
        }
        Ok(layout)
    }

    /// Bytes of the clone of a function and of its loop versions.
    pub fn clone_bytes(&self, function: &meta::Function) -> usize {
        let clones = function.clones().map(|index| self.body(index));
        clones.map(|body| body.map_or(0, |it| it.len())).sum()
    }

    /// The resume module of a function. It exports the clone as [`meta::RESUME_EXPORT`].
    ///
    /// # Errors
    /// [`InstrumentError`] if the module is not the one that was read, or not well-formed.
    pub fn resume_module(
        &self,
        module: &[u8],
        meta: &Meta,
        function: &meta::Function,
    ) -> Result<Vec<u8>, InstrumentError> {
        let clones = function.clones();
        let mut bodies = Vec::new();
        for index in clones.clone() {
            let body = self
                .body(index)
                .and_then(|range| Some((range.start, module.get(range)?)));
            let (start, bytes) = body.ok_or_else(|| malformed("a clone is missing"))?;
            bodies.push(FunctionBody::new(BinaryReader::new(bytes, start as u64)));
        }
        let callees = callees(&bodies, &clones)?;
        let mut indices = Indices {
            own: clones.clone(),
            callees,
            types: BTreeMap::new(),
        };

        let mut functions = FunctionSection::new();
        let (mut code, mut hints) = (CodeSection::new(), BranchHints::new());
        let mut names = NameMap::new();
        let name = meta.function_name(function.index);
        for (clone, body) in clones.clone().zip(&bodies) {
            let (number, ty) = (indices.of_function(clone), self.function_type(clone)?);
            functions.function(indices.of_type(ty));
            let known = self.hints.get(&clone).map_or(&[][..], Vec::as_slice);
            let (function, moved) = with_indices(body, known, &mut indices)?;
            if !moved.is_empty() {
                hints.function_hints(number, moved);
            }
            code.function(&function);
            names.append(number, &name);
        }
        let mut exports = ExportSection::new();
        exports.export(
            meta::RESUME_EXPORT,
            ExportKind::Func,
            indices.of_function(clones.start),
        );
        // Host functions find the memories at the instance that calls them.
        for memory in 0..meta.memories.len() as u32 {
            exports.export(&meta::memory_export(memory), ExportKind::Memory, memory);
        }
        let mut name_section = NameSection::new();
        name_section.functions(&names);
        let imports = self.imports(&mut indices)?;
        let mut out = Module::new();
        out.section(&self.types(&indices)?)
            .section(&imports)
            .section(&functions)
            .section(&exports)
            .section(&hints)
            .section(&code)
            .section(&name_section);
        Ok(out.finish())
    }

    /// The types used, in their new order.
    fn types(&self, indices: &Indices) -> Result<TypeSection, InstrumentError> {
        let mut used: Vec<(u32, u32)> = indices
            .types
            .iter()
            .map(|(old, new)| (*new, *old))
            .collect();
        used.sort_unstable();
        let mut section = TypeSection::new();
        for (_, old) in used {
            let ty = self.types.get(old as usize);
            let ty = ty.ok_or_else(|| malformed("a type is missing that a clone uses"))?;
            section
                .ty()
                .func_type(&RoundtripReencoder.func_type(ty.clone())?);
        }
        Ok(section)
    }

    /// The functions called, and everything else that the hot module has.
    fn imports(&self, indices: &mut Indices) -> Result<ImportSection, InstrumentError> {
        let mut imports = ImportSection::new();
        let callees: Vec<u32> = indices.callees.keys().copied().collect();
        for function in callees {
            let ty = indices.of_type(self.function_type(function)?);
            let name = meta::function_export(function);
            imports.import(HOST_MODULE, &name, EntityType::Function(ty));
        }
        for (table, ty) in (0..).zip(&self.tables) {
            imports.import(HOST_MODULE, &meta::table_export(table), *ty);
        }
        for (memory, ty) in (0..).zip(&self.memories) {
            imports.import(HOST_MODULE, &meta::memory_export(memory), *ty);
        }
        for (global, ty) in (0..).zip(&self.globals) {
            imports.import(HOST_MODULE, &meta::global_export(global), *ty);
        }
        Ok(imports)
    }

    fn body(&self, function: u32) -> Option<Range<usize>> {
        let defined = function.checked_sub(self.imported)?;
        self.bodies.get(defined as usize).cloned()
    }

    fn function_type(&self, function: u32) -> Result<u32, InstrumentError> {
        let ty = self.function_types.get(function as usize);
        ty.copied()
            .ok_or_else(|| malformed("a function is missing that a clone calls"))
    }
}

/// The functions outside of `own` that the bodies call, with their indices as imports.
fn callees(
    bodies: &[FunctionBody<'_>],
    own: &Range<u32>,
) -> Result<BTreeMap<u32, u32>, InstrumentError> {
    let mut callees = BTreeMap::new();
    for body in bodies {
        for op in body.get_operators_reader()? {
            match op? {
                Operator::Call { function_index } | Operator::ReturnCall { function_index }
                    if !own.contains(&function_index) =>
                {
                    callees.insert(function_index, 0);
                }
                Operator::RefFunc { .. } => return Err(malformed("a clone names a reference")),
                _ => {}
            }
        }
    }
    for (number, index) in (0..).zip(callees.values_mut()) {
        *index = number;
    }
    Ok(callees)
}

/// Indices of a resume module, by those of the instrumented module.
struct Indices {
    /// The clones, which follow the callees.
    own: Range<u32>,
    callees: BTreeMap<u32, u32>,
    /// Types that were used so far, numbered in this order.
    types: BTreeMap<u32, u32>,
}

impl Indices {
    fn of_function(&self, function: u32) -> u32 {
        match self.own.contains(&function) {
            true => self.callees.len() as u32 + (function - self.own.start),
            false => self.callees.get(&function).copied().unwrap_or_default(),
        }
    }

    fn of_type(&mut self, ty: u32) -> u32 {
        let next = self.types.len() as u32;
        *self.types.entry(ty).or_insert(next)
    }
}

impl Reencode for Indices {
    type Error = std::convert::Infallible;

    fn function_index(&mut self, function: u32) -> Result<u32, reencode::Error> {
        Ok(self.of_function(function))
    }

    fn type_index(&mut self, ty: u32) -> Result<u32, reencode::Error> {
        Ok(self.of_type(ty))
    }
}

/// A body with other indices, and its hints.
fn with_indices(
    body: &FunctionBody<'_>,
    hints: &[(u32, bool)],
    indices: &mut Indices,
) -> Result<(Function, Vec<BranchHint>), InstrumentError> {
    let mut locals = Vec::new();
    for local in body.get_locals_reader()? {
        let (count, ty) = local?;
        locals.push((count, indices.val_type(ty)?));
    }
    let mut out = Function::new(locals);
    let mut moved = Vec::new();
    let mut hints = hints.iter().peekable();
    let start = body.range().start;
    for op in body.get_operators_reader()?.into_iter_with_offsets() {
        let (op, offset) = op?;
        if let Some((_, taken)) = hints.next_if(|(at, _)| u64::from(*at) == offset - start) {
            moved.push(BranchHint {
                branch_func_offset: out.byte_len() as u32,
                branch_hint_value: u32::from(*taken),
            });
        }
        out.instruction(&indices.instruction(op)?);
    }
    Ok((out, moved))
}

/// The hot module: without the clones, and without the metadata. All indices are those of the whole
/// module.
///
/// # Errors
/// [`InstrumentError`] if the module is not well-formed, or its metadata are of another.
pub fn hot_module(module: &[u8], meta: &Meta) -> Result<Vec<u8>, InstrumentError> {
    let imported = meta.imports.len() as u32;
    let first_clone = meta.functions.first().map(|function| function.clone);
    let mut out = Module::new();
    let mut kept = u32::MAX;
    let mut code = CodeSection::new();
    let mut left = 0;
    for payload in Parser::new(0).parse_all(module) {
        let payload = payload?;
        match &payload {
            Payload::FunctionSection(section) => {
                let first_clone = first_clone.unwrap_or(imported + section.count());
                kept = first_clone.checked_sub(imported).unwrap_or(u32::MAX);
                if kept > section.count() {
                    return Err(malformed("it has fewer functions than its metadata"));
                }
                let mut functions = FunctionSection::new();
                for ty in section.clone().into_iter().take(kept as usize) {
                    functions.function(ty?);
                }
                out.section(&functions);
            }
            Payload::CodeSectionStart { .. } => left = kept,
            Payload::CodeSectionEntry(body) => {
                if left > 0 {
                    code.raw(bytes(module, body.range())?);
                    left -= 1;
                    if left == 0 {
                        out.section(&code);
                    }
                }
            }
            Payload::CustomSection(section) => {
                custom(&mut out, section, imported.saturating_add(kept))?;
            }
            other => {
                if let Some((id, range)) = other.as_section() {
                    let data = bytes(module, range)?;
                    out.section(&RawSection { id, data });
                }
            }
        }
    }
    Ok(out.finish())
}

/// Branch hints of the functions below an index, and names.
fn custom(
    out: &mut Module,
    section: &CustomSectionReader<'_>,
    functions: u32,
) -> Result<(), InstrumentError> {
    match section.as_known() {
        KnownCustom::BranchHints(reader) => {
            let mut hints = BranchHints::new();
            for function in reader {
                let function = function?;
                if function.func < functions {
                    let list = function
                        .hints
                        .into_iter()
                        .map(|hint| {
                            hint.map(|hint| BranchHint {
                                branch_func_offset: hint.func_offset,
                                branch_hint_value: u32::from(hint.taken),
                            })
                        })
                        .collect::<Result<Vec<_>, _>>()?;
                    hints.function_hints(function.func, list);
                }
            }
            out.section(&hints);
        }
        KnownCustom::Name(_) => {
            out.section(&RoundtripReencoder.custom_section(section.clone())?);
        }
        _ => {}
    }
    Ok(())
}

fn bytes(module: &[u8], range: Range<u64>) -> Result<&[u8], InstrumentError> {
    module
        .get(self::range(range))
        .ok_or_else(|| malformed("a section is cut off"))
}

fn range(range: Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

fn malformed(what: &str) -> InstrumentError {
    InstrumentError::Malformed(what.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instrument::{instrument, read_meta};
    use std::fmt::Write;

    /// The engine compiles code for each type of a module, whether it is used or not.
    #[test]
    fn a_resume_module_has_the_types_that_it_uses() {
        let mut text = String::from(
            "(module (type $used (func (param i64) (result i32)))
            (table 1 funcref)
            (func (export \"f\") (param i32) (result i32)
              (loop (br_if 0 (call_indirect (type $used) (i64.const 7) (i32.const 0))))
              (local.get 0))",
        );
        for number in 0..100 {
            let params = "i32 ".repeat(number + 3);
            write!(text, "(type (func (param {params})))").unwrap();
        }
        text.push(')');
        let module = instrument(&wat::parse_str(text).unwrap()).unwrap();
        let meta = read_meta(&module).unwrap();
        let layout = Layout::read(&module).unwrap();
        assert!(layout.types.len() > 100);
        let function = &meta.functions[0];
        let resume = layout.resume_module(&module, &meta, function).unwrap();
        wasmparser::validate(&resume).unwrap();
        let types = Parser::new(0).parse_all(&resume).find_map(|payload| {
            let Ok(Payload::TypeSection(section)) = payload else {
                return None;
            };
            Some(section.count())
        });
        assert!(matches!(types, Some(2..10)), "{types:?}");
    }
}
