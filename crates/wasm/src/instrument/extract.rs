//! The modules that are compiled from an instrumented module: the hot module, in which threads run,
//! and for each function a *resume module* with its clone and its loop versions.
//!
//! Clones are most of an instrumented module, and few are ever needed: those of functions that
//! stood on the stack of a thread when it was captured. So each is compiled when it is first needed;
//! of a large function only a part, or no more than what one frame executes next (`entry`).
//! An instance of a resume module imports memories, tables, globals and callees from the thread's
//! instance of the hot module, under the names by which that exports them. It has only the types that
//! it uses, because the engine compiles code for each type of a module: 296 functions instead of one
//! for a small function of CPython. All other indices except those of functions are the same.

use super::emit::Written;
use super::entry::{self, Code};
use super::error::InstrumentError;
use super::meta::{self, HOST_MODULE, Meta};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use wasm_encoder::reencode::{self, Reencode, RoundtripReencoder};
use wasm_encoder::{
    BranchHint, BranchHints, CodeSection, EntityType, ExportKind, ExportSection, FunctionSection,
    GlobalType, ImportSection, MemoryType, Module, NameMap, NameSection, RawSection, TableType,
    TypeSection,
};
use wasmparser::{
    BinaryReader, CustomSectionReader, FuncType, FunctionBody, KnownCustom, Parser, Payload,
    TypeRef,
};

/// Writes functions with other indices.
type Write<'a> = dyn Fn(&mut Indices) -> Result<Vec<Written>, InstrumentError> + 'a;

/// A module with the code of one entry of a clone or of a loop version.
#[derive(Debug)]
pub struct EntryModule {
    pub module: Vec<u8>,
    /// Bytes of its code.
    pub bytes: usize,
    /// Points of the loop headers at which it leaves, as far as that is known, by their numbers in
    /// the instrumented module.
    pub next: BTreeSet<u32>,
}

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
        function.clones().map(|index| self.body_bytes(index)).sum()
    }

    /// Bytes of a clone or a loop version, by its function index.
    pub fn body_bytes(&self, index: u32) -> usize {
        self.body(index).map_or(0, |body| body.len())
    }

    /// The loop versions of a function: the point at each loop header, by its position in
    /// the function, and the function index of the version.
    ///
    /// # Errors
    /// [`InstrumentError`] if the module is not the one that was read, or not well-formed.
    pub fn loop_versions(
        &self,
        module: &[u8],
        function: &meta::Function,
    ) -> Result<BTreeMap<u32, u32>, InstrumentError> {
        let versions = self.code(module, function.clone)?.loop_versions();
        let own = versions
            .into_iter()
            .filter(|(_, version)| function.clones().contains(version));
        let points = own.filter_map(|(number, version)| Some((number.checked_sub(1)?, version)));
        Ok(points.collect())
    }

    /// The resume module of a function: its clone and all loop versions. It exports the clone as
    /// [`meta::RESUME_EXPORT`].
    ///
    /// # Errors
    /// [`InstrumentError`] if the module is not the one that was read, or not well-formed.
    pub fn resume_module(
        &self,
        module: &[u8],
        meta: &Meta,
        function: &meta::Function,
    ) -> Result<Vec<u8>, InstrumentError> {
        let all = function.clones().map(|index| self.code(module, index));
        let all: Vec<Code<'_>> = all.collect::<Result<_, _>>()?;
        let write = |indices: &mut Indices| {
            let all = all.iter().map(|code| code.write(indices, true));
            all.collect()
        };
        self.module(meta, function, function.clones(), &write)
    }

    /// A part of a function's resume module as one of its own, which takes less time to compile: the clone
    /// without loop versions, or a single loop version (by its function index).
    ///
    /// # Errors
    /// As [`Self::resume_module`].
    pub fn resume_part(
        &self,
        module: &[u8],
        meta: &Meta,
        function: &meta::Function,
        index: u32,
    ) -> Result<Vec<u8>, InstrumentError> {
        let code = self.code(module, index)?;
        let write = |indices: &mut Indices| Ok(vec![code.write(indices, false)?]);
        self.module(meta, function, index..index.saturating_add(1), &write)
    }

    /// What a frame at a point (by its position in the function) executes of the clone, or of the loop
    /// version `index`, before it leaves for a loop, as a module of its own; `None` if that is no less.
    ///
    /// # Errors
    /// As [`Self::resume_module`].
    pub fn entry_module(
        &self,
        module: &[u8],
        meta: &Meta,
        function: &meta::Function,
        (point, index): (u32, u32),
    ) -> Result<Option<EntryModule>, InstrumentError> {
        let code = self.code(module, index)?;
        let (number, polled) = match index == function.clone {
            true => (Some(point.saturating_add(1)), None),
            false => (None, Some(meta.memories.len() as u32)),
        };
        let own = index..index.saturating_add(1);
        let write = |indices: &mut Indices| entry::of(&code, number, polled, indices);
        let Some(entry) = write(&mut Indices::of(own.clone()))? else {
            return Ok(None);
        };
        let module = self.module(meta, function, own, &|indices| {
            let entry = write(indices)?;
            let entry = entry.ok_or_else(|| malformed("an entry that changes"))?;
            Ok(vec![(entry.function, entry.hints)])
        })?;
        Ok(Some(EntryModule {
            module,
            bytes: entry.function.byte_len(),
            next: entry.next,
        }))
    }

    /// A module of the functions `own`, which `write` writes: the first time to learn what they
    /// call. It exports the first.
    fn module(
        &self,
        meta: &Meta,
        function: &meta::Function,
        own: Range<u32>,
        write: &Write<'_>,
    ) -> Result<Vec<u8>, InstrumentError> {
        let mut indices = Indices::of(own.clone());
        write(&mut indices)?;
        let mut indices = indices.numbered();
        let (mut functions, mut code) = (FunctionSection::new(), CodeSection::new());
        let (mut hints, mut names) = (BranchHints::new(), NameMap::new());
        let name = meta.function_name(function.index);
        let all = write(&mut indices)?;
        for (index, (body, moved)) in own.clone().zip(all) {
            let (number, ty) = (indices.of_function(index), self.function_type(index)?);
            functions.function(indices.of_type(ty));
            if !moved.is_empty() {
                hints.function_hints(number, moved);
            }
            code.function(&body);
            names.append(number, &name);
        }
        let mut exports = ExportSection::new();
        exports.export(
            meta::RESUME_EXPORT,
            ExportKind::Func,
            indices.of_function(own.start),
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

    /// The code of a clone or a loop version.
    fn code<'a>(&self, module: &'a [u8], index: u32) -> Result<Code<'a>, InstrumentError> {
        let body = self
            .body(index)
            .and_then(|range| Some((range.start, module.get(range)?)));
        let (start, bytes) = body.ok_or_else(|| malformed("a clone is missing"))?;
        let body = FunctionBody::new(BinaryReader::new(bytes, start as u64));
        let hints = self.hints.get(&index).map_or(&[][..], Vec::as_slice);
        Code::read(&body, hints)
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

/// Indices of a resume module, by those of the instrumented module.
struct Indices {
    /// The clone and loop versions, which follow the callees.
    own: Range<u32>,
    callees: BTreeMap<u32, u32>,
    /// Types that were used so far, numbered in this order.
    types: BTreeMap<u32, u32>,
}

impl Indices {
    fn of(own: Range<u32>) -> Self {
        Indices {
            own,
            callees: BTreeMap::new(),
            types: BTreeMap::new(),
        }
    }

    /// With the final numbers of all callees that were named so far.
    fn numbered(self) -> Self {
        let callees = self.callees.into_keys();
        Indices {
            callees: callees.zip(0..).collect(),
            ..Self::of(self.own)
        }
    }

    fn of_function(&mut self, function: u32) -> u32 {
        match self.own.contains(&function) {
            true => self.callees.len() as u32 + (function - self.own.start),
            false => *self.callees.entry(function).or_default(),
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

    /// From a point in one of 200 instructions of an interpreter only its rest is executed, until the loop.
    #[test]
    fn an_entry_has_what_its_frame_executes() {
        let mut text = String::from(
            "(module (memory 1) (func $f (export \"f\") (param i32) (result i32)
              (if (result i32) (local.get 0) (then (i32.const 7)) (else (call $run (i32.const 1)))))
            (func $run (export \"run\") (param $at i32) (result i32) (local $sum i32)
              (loop $next ",
        );
        let count = 200;
        for _ in 0..count {
            text.push_str("(block ");
        }
        write!(text, "(br_table").unwrap();
        for number in 0..count {
            write!(text, " {number}").unwrap();
        }
        text.push_str(" (local.get $at)))");
        for number in 0..count {
            write!(
                text,
                "{}
                (local.set $at (call $f (i32.const {number})))
                (br_if $next (i32.load8_u (local.get $sum))) (return (local.get $sum))",
                "(local.set $sum (i32.xor (local.get $sum) (i32.mul (local.get $at) (i32.const 77))))"
                    .repeat(10)
            )
            .unwrap();
            text.push_str(if number + 1 < count {
                ")"
            } else {
                ") (local.get $at))"
            });
        }
        text.push(')');
        let module = instrument(&wat::parse_str(text).unwrap()).unwrap();
        let meta = read_meta(&module).unwrap();
        let layout = Layout::read(&module).unwrap();
        let function = &meta.functions[1];
        let loops = layout.loop_versions(&module, function).unwrap();
        assert_eq!(loops.len(), 1);
        let (header, version) = loops.first_key_value().unwrap();
        for point in 0..function.points.len() as u32 {
            let part = loops.get(&point).copied().unwrap_or(function.clone);
            let entry = layout.entry_module(&module, &meta, function, (point, part));
            let Some(entry) = entry.unwrap() else {
                assert_eq!(part, *version);
                continue;
            };
            wasmparser::validate(&entry.module).unwrap();
            if part == *version {
                continue;
            }
            // (The poll at the function's entry is in front of the loop, too.)
            assert_eq!(entry.next, BTreeSet::from([function.first_point + header]));
            assert!(
                entry.bytes < layout.body_bytes(part) / 10,
                "{}",
                entry.bytes
            );
        }
        let part = layout.resume_part(&module, &meta, function, *version);
        wasmparser::validate(&part.unwrap()).unwrap();
    }

    /// Constructs nest as deep as a module likes, and loops on the way to a point are written twice.
    #[test]
    fn constructs_within_constructs_take_no_stack() {
        let depth = 20_000;
        let mut text = String::from(
            "(module (func $f (export \"f\") (param i32)
              (if (local.get 0) (then (call $nested (i32.const 0)))))
            (func $nested (export \"nested\") (param i32)",
        );
        for kind in ["block", "loop call $inner"] {
            text.push_str(&format!(" {kind} ").repeat(depth / 2));
        }
        text.push_str(" local.get 0 call $f ");
        text.push_str(&" end ".repeat(depth));
        text.push_str(") (func $inner (local i32) loop local.get 0 br_if 0 end))");
        let module = instrument(&wat::parse_str(text).unwrap()).unwrap();
        let meta = read_meta(&module).unwrap();
        let layout = Layout::read(&module).unwrap();
        let function = &meta.functions[1];
        let last = function.points.len() as u32 - 1;
        for point in [0, last / 2, last] {
            let entry = layout.entry_module(&module, &meta, function, (point, function.clone));
            if let Some(entry) = entry.unwrap() {
                assert!(entry.bytes <= layout.body_bytes(function.clone));
                wasmparser::validate(&entry.module).unwrap();
            }
        }
    }
}
