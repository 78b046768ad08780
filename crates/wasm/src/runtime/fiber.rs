//! One guest thread: an instance of its own, run, captured, resumed.
//!
//! ```text
//!           call                    request seen
//!   Idle ─────────▶ running ───────────────────────▶ frames + pending
//!    ▲                 │ returned, trapped, exited          │ resume
//!    └─────────────────┘◀───────────────────────────────────┘
//! ```
//!
//! Resuming calls one clone at a time, innermost frame first, and hands each
//! the results of the one before: the native stack never holds more than what
//! the thread called since it was resumed.
//!
//! A clone is a module of its own, compiled when the first thread is resumed in it. Its instance
//! imports memories, tables, globals and callees from the thread's instance of the hot module.

use super::frame::{Frame, Pending, ThreadState, Value};
use super::host::{Exited, Host, HostThread, HostTrap, ThreadContext, host_call, to_val, typed};
use super::program::{Program, ProgramError};
use super::resume_code::CodeKey;
use super::signal::Signal;
use super::tables::TableLimits;
use crate::instrument::meta::{self, PREFIX, SlotType};
use crate::memory::{Control, MemoryError, WASM_PAGE_BYTES, with_memories};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use wasmtime::{Func, Global, Instance, Module, Ref, Store, Table, TypedFunc, Val};

/// How a run ended finally.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stop {
    Exit(u32),
    Trap(Trap),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trap {
    pub message: String,
    /// Names of the functions on the stack, innermost first.
    pub backtrace: Vec<String>,
}

impl std::fmt::Display for Trap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "trap: {}", self.message)?;
        for (depth, name) in self.backtrace.iter().enumerate() {
            write!(f, "\n  {depth}: {name}")?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Run {
    Finished(Vec<Value>),
    /// The thread reached a safepoint on request.
    Captured,
}

/// Why an instance cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum FiberError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error("cannot make an instance: {0:#}")]
    Engine(#[from] wasmtime::Error),
    /// The module has no such function.
    #[error("the module exports no function {0:?}")]
    NoExport(String),
}

/// Maximum length of a backtrace, innermost first.
const BACKTRACE_MAX: usize = 64;

/// Size above which a save area is returned to the system.
const SAVED_KEPT_BYTES: usize = 1 << 20;

pub struct Fiber {
    program: Arc<Program>,
    store: Store<ThreadContext>,
    instance: Instance,
    control: Arc<Control>,
    refs: Table,
    directory: Table,
    /// Clones by the position of their function in the metadata.
    clones: HashMap<CodeKey, TypedFunc<u32, u32>>,
    globals: Vec<Global>,
    tables: Vec<Table>,
    /// Raw function references back to indices; filled when first needed.
    indices: Option<HashMap<usize, u32>>,
    frames: Vec<Frame>,
    pending: Pending,
    restore: Vec<u8>,
    /// No code has run in it.
    fresh: bool,
}

/// Runs code. If the engine detects inconsistent code (a tampered instrumented module that accesses
/// memory behind its control memory, which the engine has twice), its assertion ends this code, not
/// the waiting thread.
fn catch_engine_panic<T>(run: impl FnOnce() -> wasmtime::Result<T>) -> wasmtime::Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let why = panic.downcast_ref::<&str>().map(|why| (*why).to_owned());
        let why = why.or_else(|| panic.downcast_ref::<String>().cloned());
        let why = why.unwrap_or_else(|| "an assertion".into());
        Err(wasmtime::Error::msg(format!(
            "the engine, or its host, failed: {why}"
        )))
    })
}

impl Fiber {
    /// A fresh instance for a thread.
    ///
    /// # Errors
    /// [`FiberError`].
    pub fn new(
        program: Arc<Program>,
        host: Arc<dyn Host>,
        thread: HostThread,
    ) -> Result<Self, FiberError> {
        let linked = program.linked().clone();
        let control = Arc::new(Control::new()?);
        let memories = thread.memories.clone();
        let signal = thread.signal.clone();
        let limits = TableLimits::new(thread.tables.clone());
        let mut store = Store::new(
            program.wasmtime(),
            ThreadContext {
                host,
                thread,
                pending: Pending::Nothing,
                limits,
            },
        );
        store.limiter(|context| &mut context.limits);
        let instance = with_memories(&memories, &control, || linked.instantiate(&mut store))?;
        store.data_mut().limits.count(false);
        let table = |store: &mut Store<ThreadContext>, name: &str| {
            instance
                .get_table(&mut *store, name)
                .ok_or_else(|| FiberError::NoExport(name.to_owned()))
        };
        let refs = table(&mut store, &format!("{PREFIX}refs"))?;
        let directory = table(&mut store, &format!("{PREFIX}dir"))?;
        let mut tables = Vec::new();
        for (_, name) in &program.meta.tables {
            tables.push(table(&mut store, name)?);
        }
        let mut globals = Vec::new();
        for global in &program.meta.globals {
            globals.push(
                instance
                    .get_global(&mut store, &global.export)
                    .ok_or_else(|| FiberError::NoExport(global.export.clone()))?,
            );
        }
        signal.attach(&control);
        Ok(Fiber {
            program,
            store,
            instance,
            control,
            refs,
            directory,
            clones: HashMap::new(),
            globals,
            tables,
            indices: None,
            frames: Vec::new(),
            pending: Pending::Nothing,
            restore: Vec::new(),
            fresh: true,
        })
    }

    /// Calls an exported function in an idle thread.
    ///
    /// # Errors
    /// [`Stop`] if it does not return.
    pub fn call(&mut self, export: &str, args: &[Value]) -> Result<Run, Stop> {
        let function = self
            .instance
            .get_func(&mut self.store, export)
            .ok_or_else(|| plain_trap(format!("no exported function {export:?}")))?;
        let ty = function.ty(&self.store);
        let mut params = Vec::with_capacity(args.len());
        for arg in args {
            params.push(self.to_val(*arg)?);
        }
        let mut results: Vec<Val> = ty
            .results()
            .map(|ty| Val::default_for_ty(&ty).unwrap_or(Val::I32(0)))
            .collect();
        // Left over from a trapped call.
        self.frames.clear();
        self.pending = Pending::Nothing;
        self.store.data_mut().pending = Pending::Nothing;
        self.enter();
        let outcome = catch_engine_panic(|| function.call(&mut self.store, &params, &mut results));
        if let Err(error) = outcome {
            return Err(self.stop(error));
        }
        if matches!(results.pop(), Some(Val::I32(0))) {
            let mut values = Vec::with_capacity(results.len());
            for val in &results {
                values.push(self.from_val(val)?);
            }
            return Ok(Run::Finished(values));
        }
        self.collect()?;
        if self.signal().leave() {
            return Ok(Run::Captured);
        }
        self.resume()
    }

    /// Resumes from the frames.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn resume(&mut self) -> Result<Run, Stop> {
        loop {
            if self.signal().is_requested() {
                return Ok(Run::Captured);
            }
            if !self.pending_call()? {
                return Ok(Run::Captured);
            }
            let Some(frame) = self.frames.pop() else {
                return Ok(Run::Finished(match std::mem::take(&mut self.pending) {
                    Pending::Results(values) => values,
                    _ => Vec::new(),
                }));
            };
            if self.enter_frame(&frame)? && self.signal().leave() {
                return Ok(Run::Captured);
            }
        }
    }

    /// Performs the pending host call, if there is one. False if it was interrupted again.
    fn pending_call(&mut self) -> Result<bool, Stop> {
        let (import, args, mut progress) = match std::mem::take(&mut self.pending) {
            Pending::Call {
                import,
                args,
                progress,
            } => (import, args, progress),
            other => {
                self.pending = other;
                return Ok(true);
            }
        };
        let kind = self.program.kinds[import as usize];
        let done = host_call(&mut self.store, import, kind, &args, &mut progress)
            .map_err(|error| self.stop(error))?;
        match done {
            Some(bits) => {
                let types = &self.program.meta.imports[import as usize].results;
                self.pending = Pending::Results(typed(types, &bits));
                Ok(true)
            }
            None => {
                self.pending = Pending::Call {
                    import,
                    args,
                    progress,
                };
                Ok(false)
            }
        }
    }

    /// Runs one frame's clone to its end, or until it is captured again (true).
    fn enter_frame(&mut self, frame: &Frame) -> Result<bool, Stop> {
        let program = self.program.clone();
        let (_, function, point) = program
            .meta
            .point(frame.point)
            .ok_or_else(|| plain_trap("a frame names no point".into()))?;
        let values = match std::mem::take(&mut self.pending) {
            Pending::Results(values) => values,
            _ => Vec::new(),
        };
        let clone = self.clone_of(frame.point)?;
        self.enter();
        self.fill_restore_area(frame, function, point, &values)?;
        let number = frame.point - function.first_point + 1;
        match catch_engine_panic(|| clone.call(&mut self.store, number)) {
            Err(error) => Err(self.stop(error)),
            Ok(0) => {
                self.pending = Pending::Results(self.results(&function.results)?);
                Ok(false)
            }
            Ok(_) => self.collect().map(|()| true),
        }
    }

    /// The code in which a frame at a point is resumed.
    fn clone_of(&mut self, point: u32) -> Result<TypedFunc<u32, u32>, Stop> {
        let code = self.program.resume_code(point);
        let (key, module) = code.map_err(|error| plain_trap(error.to_string()))?;
        if let Some(clone) = self.clones.get(&key) {
            return Ok(clone.clone());
        }
        let clone = self.link_clone(&module);
        let clone = clone.map_err(|error| plain_trap(error.to_string()))?;
        self.clones.insert(key, clone.clone());
        Ok(clone)
    }

    fn link_clone(&mut self, module: &Module) -> Result<TypedFunc<u32, u32>, FiberError> {
        let mut imports = Vec::with_capacity(module.imports().len());
        for import in module.imports() {
            let export = self.instance.get_export(&mut self.store, import.name());
            imports.push(export.ok_or_else(|| FiberError::NoExport(import.name().to_owned()))?);
        }
        let instance = Instance::new(&mut self.store, module, &imports)?;
        Ok(instance.get_typed_func(&mut self.store, meta::RESUME_EXPORT)?)
    }

    /// Prepares the control memory for running code.
    fn enter(&mut self) {
        self.fresh = false;
        let set = |address, value| self.control.word(address).store(value, Ordering::Relaxed);
        set(meta::SAVE_POINTER, meta::SAVE);
        set(meta::REF_POINTER, meta::RESULTS_MAX);
        self.signal().note_entered();
    }

    fn fill_restore_area(
        &mut self,
        frame: &Frame,
        function: &meta::Function,
        point: &meta::Point,
        values: &[Value],
    ) -> Result<(), Stop> {
        let mut offsets = Vec::with_capacity(function.slots.len());
        let mut total = 0;
        for ty in &function.slots {
            offsets.push(total);
            total += ty.bytes() as usize;
        }
        let mut area = std::mem::take(&mut self.restore);
        area.clear();
        area.resize(total, 0);
        let mut rest = frame.payload.as_slice();
        let mut references = Vec::new();
        for slot in &point.saved {
            let (ty, at) = (function.slots[*slot as usize], offsets[*slot as usize]);
            let (bytes, after) = rest.split_at(ty.bytes() as usize);
            area[at..at + bytes.len()].copy_from_slice(bytes);
            if let Value::FuncRef(index) = Value::read(ty, bytes) {
                references.push((at, index));
            }
            rest = after;
        }
        for (slot, value) in point.results.iter().zip(values) {
            let at = offsets[*slot as usize];
            if function.slots[*slot as usize] != value.ty() {
                return Err(plain_trap(
                    "a frame waits for other results than it got".into(),
                ));
            }
            let bytes = value.bits().to_le_bytes();
            let count = value.ty().bytes() as usize;
            area[at..at + count].copy_from_slice(&bytes[..count]);
            if let Value::FuncRef(index) = value {
                references.push((at, *index));
            }
        }
        // Slots of references hold the index of an entry of the references
        // table; null ones that no point saved here must name a null entry.
        let mut entry = meta::RESULTS_MAX;
        for (slot, ty) in function.slots.iter().enumerate() {
            if *ty == SlotType::FuncRef {
                let at = offsets[slot];
                let index = references.iter().find(|(place, _)| *place == at);
                let reference = self.reference(index.map_or(0, |(_, index)| *index))?;
                self.set_table(self.refs, entry, reference)?;
                area[at..at + 4].copy_from_slice(&entry.to_le_bytes());
                entry += 1;
            }
        }
        self.control.write(meta::RESTORE, &area);
        self.restore = area;
        Ok(())
    }

    /// Results of a clone.
    fn results(&mut self, types: &[SlotType]) -> Result<Vec<Value>, Stop> {
        let mut values = Vec::with_capacity(types.len());
        let mut bytes = [0; 16];
        for (at, ty) in (0u32..).zip(types) {
            if *ty == SlotType::FuncRef {
                values.push(Value::FuncRef(self.index_in(self.refs, at)?));
            } else {
                self.control.read(meta::RESULTS + 16 * at, &mut bytes);
                values.push(Value::read(*ty, &bytes));
            }
        }
        Ok(values)
    }

    /// Collects the frames saved by the code, and the pending operation.
    fn collect(&mut self) -> Result<(), Stop> {
        self.signal().note_left();
        let end = self
            .control
            .word(meta::SAVE_POINTER)
            .load(Ordering::Relaxed);
        // (The code has left: later errors are not errors of saving.)
        self.control
            .word(meta::SAVE_POINTER)
            .store(meta::SAVE, Ordering::Relaxed);
        // The pointer and the saved frames come from guest code, and are not trusted.
        let damaged = || plain_trap("code saved a damaged frame".into());
        if end as usize > Control::ACCESSIBLE_BYTES {
            return Err(damaged());
        }
        let mut saved = vec![0; end.saturating_sub(meta::SAVE) as usize];
        self.control.read(meta::SAVE, &mut saved);
        if saved.len() > SAVED_KEPT_BYTES {
            self.control.discard(meta::SAVE);
        }
        let program = self.program.clone();
        let first = self.frames.len();
        let mut at = 0;
        while at + meta::FRAME_HEADER_BYTES as usize <= saved.len() {
            let number =
                u32::from_le_bytes([saved[at], saved[at + 1], saved[at + 2], saved[at + 3]]);
            let (_, function, point) = program.meta.point(number).ok_or_else(damaged)?;
            let mut length = 0;
            let start = at + meta::FRAME_HEADER_BYTES as usize;
            for slot in &point.saved {
                let ty = function.slots[*slot as usize];
                if ty == SlotType::FuncRef {
                    let place = start + length..start + length + 4;
                    let bytes = saved.get(place.clone()).ok_or_else(damaged)?;
                    let mut entry = [0; 4];
                    entry.copy_from_slice(bytes);
                    let index = self.index_in(self.refs, u32::from_le_bytes(entry))?;
                    saved[place].copy_from_slice(&index.to_le_bytes());
                }
                length += ty.bytes() as usize;
            }
            let payload = saved.get(start..start + length).ok_or_else(damaged)?;
            self.frames.push(Frame {
                point: number,
                payload: payload.to_vec(),
            });
            at = (start + length).next_multiple_of(8);
        }
        // Frames are saved innermost first.
        self.frames[first..].reverse();
        if !super::frame::fits(&self.frames) {
            return Err(self.stop(wasmtime::Trap::StackOverflow.into()));
        }
        self.pending = std::mem::take(&mut self.store.data_mut().pending);
        Ok(())
    }

    /// The thread as plain data; it must have been captured.
    ///
    /// # Errors
    /// [`Stop::Trap`] if a table holds what the module cannot name.
    pub fn state(&mut self) -> Result<ThreadState, Stop> {
        let mut globals = Vec::with_capacity(self.globals.len());
        for at in 0..self.globals.len() {
            let val = self.globals[at].get(&mut self.store);
            globals.push(self.from_val(&val)?);
        }
        let mut tables = Vec::with_capacity(self.tables.len());
        for at in 0..self.tables.len() {
            let table = self.tables[at];
            let size = table.size(&self.store);
            let mut entries = Vec::with_capacity(size as usize);
            for entry in 0..size as u32 {
                entries.push(self.index_in(table, entry)?);
            }
            tables.push(entries);
        }
        Ok(ThreadState {
            frames: self.frames.clone(),
            pending: self.pending.clone(),
            stage: 0,
            globals,
            tables,
        })
    }

    /// Puts a captured thread's state into this fresh instance. The state was
    /// checked against the module (see [`ThreadState::check`]).
    ///
    /// # Errors
    /// [`Stop::Trap`] if it does not fit, or its frames cannot be resumed.
    pub fn load(&mut self, state: ThreadState) -> Result<(), Stop> {
        let points: BTreeSet<u32> = state.frames.iter().map(|frame| frame.point).collect();
        let mut points = points.into_iter();
        let prepared = points.try_for_each(|point| self.program.prepare_point(point));
        prepared.map_err(|error| plain_trap(error.to_string()))?;
        self.update_sizes()?;
        for (at, value) in state.globals.iter().enumerate() {
            let val = self.to_val(*value)?;
            self.globals[at]
                .set(&mut self.store, val)
                .map_err(|error| plain_trap(format!("a global cannot be set: {error}")))?;
        }
        self.store.data_mut().limits.count(true);
        for (at, entries) in state.tables.iter().enumerate() {
            let table = self.tables[at];
            let missing = (entries.len() as u64).saturating_sub(table.size(&self.store));
            if missing > 0 {
                table
                    .grow(&mut self.store, missing, Ref::Func(None))
                    .map_err(|error| plain_trap(format!("a table cannot grow: {error}")))?;
            }
            for (entry, index) in (0u32..).zip(entries) {
                let reference = self.reference(*index)?;
                self.set_table(table, entry, reference)?;
            }
        }
        self.store.data_mut().limits.count(false);
        let redrop = format!("{PREFIX}redrop");
        if let Some(function) = self.instance.get_func(&mut self.store, &redrop) {
            self.enter();
            function
                .typed::<(), i32>(&self.store)
                .and_then(|function| function.call(&mut self.store, ()))
                .map_err(|error| plain_trap(format!("segments cannot be dropped: {error}")))?;
        }
        self.frames = state.frames;
        self.pending = state.pending;
        Ok(())
    }

    /// Updates the memory sizes of a spare instance: the thread may be past the call in which it
    /// read them.
    fn update_sizes(&mut self) -> Result<(), Stop> {
        let memories = self.store.data().thread.memories.clone();
        for (number, memory) in memories.iter().enumerate() {
            let name = format!("{PREFIX}m{number}");
            let Some(own) = self.instance.get_memory(&mut self.store, &name) else {
                continue;
            };
            let pages = memory.size_bytes() / WASM_PAGE_BYTES;
            let seen = own.size(&self.store);
            if seen < pages {
                own.grow(&mut self.store, pages - seen).map_err(|error| {
                    plain_trap(format!("a memory's size cannot be updated: {error}"))
                })?;
            }
        }
        Ok(())
    }

    /// Whether no code has run in it.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Its thread switches to another instance: the table growth of this one no longer counts.
    pub(super) fn retire(&mut self) {
        self.store.data_mut().limits.give_back();
    }

    /// Assigns it to a thread that has not run in it.
    pub(super) fn give_to(&mut self, tid: u32) {
        self.store.data_mut().thread.tid = tid;
    }

    /// Its thread's safepoint signal.
    pub fn signal(&self) -> &Arc<Signal> {
        &self.store.data().thread.signal
    }

    fn set_table(&mut self, table: Table, entry: u32, function: Option<Func>) -> Result<(), Stop> {
        table
            .set(&mut self.store, entry.into(), Ref::Func(function))
            .map_err(|error| plain_trap(format!("a table entry cannot be set: {error}")))
    }

    /// The function behind an index plus one; `None` for zero.
    fn reference(&mut self, index: u32) -> Result<Option<Func>, Stop> {
        let Some(index) = index.checked_sub(1) else {
            return Ok(None);
        };
        let position = self.program.meta.directory.binary_search(&index);
        let entry = position
            .ok()
            .and_then(|at| self.directory.get(&mut self.store, at as u64));
        match entry {
            Some(Ref::Func(Some(function))) => Ok(Some(function)),
            _ => Err(plain_trap(format!("no reference to function {index}"))),
        }
    }

    /// Index plus one of the function in a table's entry; zero for null.
    fn index_in(&mut self, table: Table, entry: u32) -> Result<u32, Stop> {
        let Some(Ref::Func(function)) = table.get(&mut self.store, entry.into()) else {
            return Err(plain_trap("a table entry is missing".into()));
        };
        self.index_of(function)
    }

    fn index_of(&mut self, function: Option<Func>) -> Result<u32, Stop> {
        let Some(function) = function else {
            return Ok(0);
        };
        if self.indices.is_none() {
            let mut indices = HashMap::new();
            for (at, index) in (0u64..).zip(&self.program.meta.directory) {
                if let Some(Ref::Func(Some(known))) = self.directory.get(&mut self.store, at) {
                    indices.insert(known.to_raw(&mut self.store) as usize, *index + 1);
                }
            }
            self.indices = Some(indices);
        }
        let raw = function.to_raw(&mut self.store) as usize;
        self.indices
            .as_ref()
            .and_then(|indices| indices.get(&raw).copied())
            .ok_or_else(|| plain_trap("a reference to an unknown function".into()))
    }

    #[expect(clippy::wrong_self_convention, reason = "needs the store")]
    fn to_val(&mut self, value: Value) -> Result<Val, Stop> {
        Ok(match value {
            Value::FuncRef(index) => Val::FuncRef(self.reference(index)?),
            other => to_val(other),
        })
    }

    #[expect(clippy::wrong_self_convention, reason = "needs the store")]
    fn from_val(&mut self, val: &Val) -> Result<Value, Stop> {
        Ok(match val {
            Val::I32(value) => Value::I32(*value as u32),
            Val::I64(value) => Value::I64(*value as u64),
            Val::F32(bits) => Value::F32(*bits),
            Val::F64(bits) => Value::F64(*bits),
            Val::V128(bits) => Value::V128(bits.as_u128()),
            Val::FuncRef(function) => Value::FuncRef(self.index_of(*function)?),
            _ => return Err(plain_trap("a value of an unsupported type".into())),
        })
    }

    /// Whether code trapped while saving its frames: no other code runs after the first is saved.
    /// The only cause is the end of the save area.
    fn is_leaving(&self) -> bool {
        let saved = self.control.word(meta::SAVE_POINTER);
        saved.load(Ordering::Relaxed) > meta::SAVE
    }

    /// Builds the error with the whole stack: the native frames, then the frames not resumed yet.
    fn stop(&self, error: wasmtime::Error) -> Stop {
        if let Some(Exited(code)) = error.downcast_ref() {
            return Stop::Exit(*code);
        }
        let mut backtrace: Vec<String> = error
            .downcast_ref::<wasmtime::WasmBacktrace>()
            .map(|trace| {
                trace
                    .frames()
                    .iter()
                    .filter_map(|frame| match frame.func_name() {
                        // A dispatcher, which the program does not have.
                        Some(name) if name.starts_with(PREFIX) => None,
                        Some(name) => Some(name.to_owned()),
                        None => Some(self.program.meta.function_name(frame.func_index())),
                    })
                    .collect()
            })
            .unwrap_or_default();
        let meta = &self.program.meta;
        let rest = BACKTRACE_MAX.saturating_sub(backtrace.len());
        backtrace.extend(
            self.frames
                .iter()
                .rev()
                .take(rest)
                .filter_map(|frame| meta.point(frame.point))
                .map(|(_, function, _)| meta.function_name(function.index)),
        );
        let message = match error.downcast_ref::<wasmtime::Trap>() {
            _ if self.is_leaving() => wasmtime::Trap::StackOverflow.to_string(),
            Some(trap) => trap.to_string(),
            None => match error.downcast_ref::<HostTrap>() {
                Some(trap) => trap.0.clone(),
                None => format!("{error:#}"),
            },
        };
        Stop::Trap(Trap { message, backtrace })
    }
}

fn plain_trap(message: String) -> Stop {
    Stop::Trap(Trap {
        message,
        backtrace: Vec::new(),
    })
}
