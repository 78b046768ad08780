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

use super::frame::{Frame, Pending, Progress, ThreadState, Value};
use super::program::{Program, ProgramError};
use super::signal::Signal;
use crate::instrument::meta::{self, HOST_MODULE, Meta, PREFIX, SlotType};
use crate::memory::{Control, GuestMemory, MemoryError, WASM_PAGE_BYTES, with_memories};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use wasmtime::{
    AsContextMut, Caller, Func, FuncType, Global, Instance, Linker, Module, Ref, Store, Table, Val,
    ValType,
};

/// What a host call came to.
#[derive(Debug)]
pub enum HostOutcome {
    /// It is done, with these results as bits.
    Done(Vec<u64>),
    /// It was asked to come to a safepoint before it had any effect.
    Interrupted,
    /// The program ends, with this code.
    Exit(u32),
    /// The thread traps.
    Trap(String),
}

/// What a thread's host calls lead to.
pub trait Host: Send + Sync {
    /// Makes the call of imported function `import`.
    fn call(
        &self,
        import: u32,
        args: &[u64],
        progress: &mut Progress,
        thread: &HostThread,
    ) -> HostOutcome;
}

/// The thread that makes a host call.
#[derive(Debug, Clone)]
pub struct HostThread {
    /// Its number in the machine; the main thread has 0.
    pub tid: u32,
    /// How it is asked to come to a safepoint.
    pub signal: Arc<Signal>,
    /// The machine's memories.
    pub memories: Arc<[Arc<GuestMemory>]>,
}

/// What a store carries.
pub(crate) struct ThreadContext {
    host: Arc<dyn Host>,
    thread: HostThread,
    pending: Pending,
}

/// What an import is to the runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportKind {
    /// `memory.grow` of a memory.
    Grow(u32),
    /// `memory.size` of a memory.
    Size(u32),
    /// Lets an instance see a memory's true size.
    Sync(u32),
    /// `memory.atomic.wait32`.
    Wait32(u32),
    /// `memory.atomic.wait64`.
    Wait64(u32),
    /// `memory.atomic.notify`.
    Notify(u32),
    /// A function of WASI preview 1.
    Wasi(keel_wasi::Function),
    /// `wasi.thread-spawn`.
    ThreadSpawn,
    /// A function of the spec test-suite that prints its arguments.
    Print,
}

/// Finds out what each import is.
///
/// # Errors
/// [`ProgramError::UnknownImports`] naming all that machines do not have.
pub(crate) fn import_kinds(meta: &Meta) -> Result<Vec<ImportKind>, ProgramError> {
    let mut unknown = Vec::new();
    let mut kinds = Vec::new();
    for import in &meta.imports {
        let kind = match import.module.as_str() {
            HOST_MODULE => lowered_kind(&import.name, meta),
            "wasi_snapshot_preview1" => wasi_kind(import),
            "wasi"
                if import.name == "thread-spawn"
                    && import.params == [SlotType::I32]
                    && import.results == [SlotType::I32] =>
            {
                Some(ImportKind::ThreadSpawn)
            }
            "spectest" if import.name.starts_with("print") && import.results.is_empty() => {
                Some(ImportKind::Print)
            }
            _ => None,
        };
        match kind {
            Some(kind) => kinds.push(kind),
            None => unknown.push(format!("{}.{}", import.module, import.name)),
        }
    }
    if unknown.is_empty() {
        Ok(kinds)
    } else {
        Err(ProgramError::UnknownImports(unknown.join(", ")))
    }
}

fn lowered_kind(name: &str, meta: &Meta) -> Option<ImportKind> {
    let (what, memory) = name.split_once(':')?;
    let memory: u32 = memory.parse().ok()?;
    meta.memories.get(memory as usize)?;
    Some(match what {
        "grow" => ImportKind::Grow(memory),
        "size" => ImportKind::Size(memory),
        "sync" => ImportKind::Sync(memory),
        "wait32" => ImportKind::Wait32(memory),
        "wait64" => ImportKind::Wait64(memory),
        "notify" => ImportKind::Notify(memory),
        _ => return None,
    })
}

fn wasi_kind(import: &meta::Import) -> Option<ImportKind> {
    let function = keel_wasi::Function::by_name(&import.name)?;
    let params: Vec<SlotType> = function
        .params()
        .iter()
        .map(|ty| match ty {
            keel_wasi::ParamType::I32 => SlotType::I32,
            keel_wasi::ParamType::I64 => SlotType::I64,
        })
        .collect();
    let results: &[SlotType] = if function.has_result() {
        &[SlotType::I32]
    } else {
        &[]
    };
    (import.params == params && import.results == results).then_some(ImportKind::Wasi(function))
}

/// Defines every import in a linker.
pub(crate) fn link(
    linker: &mut Linker<ThreadContext>,
    module: &Module,
    meta: &Meta,
    kinds: &[ImportKind],
) -> wasmtime::Result<()> {
    // The same function may be imported twice.
    linker.allow_shadowing(true);
    for ((number, import), kind) in (0u32..).zip(&meta.imports).zip(kinds) {
        let convert = |types: &[SlotType]| types.iter().map(|ty| val_type(*ty)).collect::<Vec<_>>();
        let mut results = convert(&import.results);
        results.push(ValType::I32);
        let ty = FuncType::new(module.engine(), convert(&import.params), results);
        let types = import.results.clone();
        let kind = *kind;
        linker.func_new(
            &import.module,
            &import.name,
            ty,
            move |mut caller: Caller<'_, ThreadContext>, params, results| {
                let args: Vec<u64> = params.iter().map(val_bits).collect();
                let mut progress = Progress::Fresh;
                let outcome = host_call(&mut caller, number, kind, &args, &mut progress)?;
                if let ImportKind::Grow(memory) | ImportKind::Sync(memory) = kind {
                    see_size(&mut caller, memory)?;
                }
                let (values, status) = results.split_at_mut(types.len());
                let left = match outcome {
                    None => {
                        caller.data_mut().pending = Pending::Call {
                            import: number,
                            args,
                            progress,
                        };
                        true
                    }
                    Some(bits) => {
                        let leave = caller.data().thread.signal.leave();
                        if leave {
                            // Behind its effect: the results travel.
                            caller.data_mut().pending = Pending::Results(typed(&types, &bits));
                        } else {
                            for ((value, ty), bits) in values.iter_mut().zip(&types).zip(bits) {
                                *value = to_val(Value::from_bits(*ty, bits.into()));
                            }
                        }
                        leave
                    }
                };
                if left {
                    for (value, ty) in values.iter_mut().zip(&types) {
                        *value = to_val(Value::from_bits(*ty, 0));
                    }
                }
                status[0] = Val::I32(i32::from(left));
                Ok(())
            },
        )?;
    }
    Ok(())
}

fn typed(types: &[SlotType], bits: &[u64]) -> Vec<Value> {
    types
        .iter()
        .zip(bits)
        .map(|(ty, bits)| Value::from_bits(*ty, (*bits).into()))
        .collect()
}

fn val_type(ty: SlotType) -> ValType {
    match ty {
        SlotType::I32 => ValType::I32,
        SlotType::I64 => ValType::I64,
        SlotType::F32 => ValType::F32,
        SlotType::F64 => ValType::F64,
        SlotType::V128 => ValType::V128,
        SlotType::FuncRef => ValType::FUNCREF,
    }
}

/// Bits of a host call's argument. No host function takes vectors or
/// references.
fn val_bits(val: &Val) -> u64 {
    match val {
        Val::I32(value) => u64::from(*value as u32),
        Val::I64(value) => *value as u64,
        Val::F32(bits) => u64::from(*bits),
        Val::F64(bits) => *bits,
        _ => 0,
    }
}

fn to_val(value: Value) -> Val {
    match value {
        Value::I32(bits) => Val::I32(bits as i32),
        Value::I64(bits) => Val::I64(bits as i64),
        Value::F32(bits) => Val::F32(bits),
        Value::F64(bits) => Val::F64(bits),
        Value::V128(bits) => Val::V128(bits.into()),
        Value::FuncRef(_) => Val::FuncRef(None),
    }
}

/// The program ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("exit with code {0}")]
struct Exited(u32);

/// A host function found that the guest broke its contract.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct HostTrap(String);

/// Makes a host call; `None` when it was interrupted before any effect.
fn host_call(
    mut store: impl AsContextMut<Data = ThreadContext>,
    import: u32,
    kind: ImportKind,
    args: &[u64],
    progress: &mut Progress,
) -> wasmtime::Result<Option<Vec<u64>>> {
    let mut context = store.as_context_mut();
    let data = context.data_mut();
    match kind {
        ImportKind::Grow(memory) => {
            let grown = data.thread.memories[memory as usize].grow(args[0]);
            return Ok(Some(vec![grown.unwrap_or(u64::MAX)]));
        }
        ImportKind::Size(memory) => {
            let size = data.thread.memories[memory as usize].size_bytes();
            return Ok(Some(vec![size / WASM_PAGE_BYTES]));
        }
        // The instance is told by the caller, which has its exports.
        ImportKind::Sync(_) => return Ok(Some(Vec::new())),
        _ => {}
    }
    let host = data.host.clone();
    let thread = data.thread.clone();
    match host.call(import, args, progress, &thread) {
        HostOutcome::Done(bits) => Ok(Some(bits)),
        HostOutcome::Interrupted => Ok(None),
        HostOutcome::Exit(code) => Err(Exited(code).into()),
        HostOutcome::Trap(message) => Err(HostTrap(message).into()),
    }
}

/// Lets the calling instance see a memory's true size: another thread's
/// instance, or the machine, may have grown it.
fn see_size(caller: &mut Caller<'_, ThreadContext>, memory: u32) -> wasmtime::Result<()> {
    let pages = caller.data().thread.memories[memory as usize].size_bytes() / WASM_PAGE_BYTES;
    let export = caller.get_export(&format!("{PREFIX}m{memory}"));
    if let Some(own) = export.and_then(wasmtime::Extern::into_memory) {
        let seen = own.size(&*caller);
        if seen < pages {
            own.grow(&mut *caller, pages - seen)?;
        }
    }
    Ok(())
}

/// How a run ended for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// The program asked to exit.
    Exit(u32),
    /// The thread trapped.
    Trap(Trap),
}

/// A guest's fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trap {
    /// What happened.
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

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Run {
    /// The function returned these.
    Finished(Vec<Value>),
    /// The thread was asked to come to a safepoint, and did.
    Captured,
}

/// Why an instance cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FiberError {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine refused.
    #[error("cannot make an instance: {0:#}")]
    Engine(#[from] wasmtime::Error),
    /// The module has no such function.
    #[error("the module exports no function {0:?}")]
    NoExport(String),
}

/// A guest thread.
pub struct Fiber {
    program: Arc<Program>,
    store: Store<ThreadContext>,
    instance: Instance,
    control: Arc<Control>,
    refs: Table,
    directory: Table,
    clones: Table,
    globals: Vec<Global>,
    tables: Vec<Table>,
    /// Raw function references back to indices; filled when first needed.
    indices: Option<HashMap<usize, u32>>,
    frames: Vec<Frame>,
    pending: Pending,
    restore: Vec<u8>,
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
        let control = Arc::new(Control::new()?);
        let memories = thread.memories.clone();
        let signal = thread.signal.clone();
        let mut store = Store::new(
            &program.engine,
            ThreadContext {
                host,
                thread,
                pending: Pending::Nothing,
            },
        );
        let instance = with_memories(&memories, &control, || {
            program.instance.instantiate(&mut store)
        })?;
        let table = |store: &mut Store<ThreadContext>, name: &str| {
            instance
                .get_table(&mut *store, name)
                .ok_or_else(|| FiberError::NoExport(name.to_owned()))
        };
        let refs = table(&mut store, &format!("{PREFIX}refs"))?;
        let directory = table(&mut store, &format!("{PREFIX}dir"))?;
        let clones = table(&mut store, &format!("{PREFIX}clones"))?;
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
            clones,
            globals,
            tables,
            indices: None,
            frames: Vec::new(),
            pending: Pending::Nothing,
            restore: Vec::new(),
        })
    }

    /// Calls an exported function from an idle thread.
    ///
    /// # Errors
    /// [`Stop`] when it ends otherwise than by returning.
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
        self.enter();
        let outcome = function.call(&mut self.store, &params, &mut results);
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

    /// Goes on from the frames.
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

    /// Makes the pending host call, if there is one. False when it was
    /// interrupted again.
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

    /// Runs one frame's clone to its end, or until it leaves again (true).
    fn enter_frame(&mut self, frame: &Frame) -> Result<bool, Stop> {
        let program = self.program.clone();
        let (position, function, point) = program
            .meta
            .point(frame.point)
            .ok_or_else(|| plain_trap("a frame names no point".into()))?;
        let values = match std::mem::take(&mut self.pending) {
            Pending::Results(values) => values,
            _ => Vec::new(),
        };
        self.enter();
        self.fill_restore_area(frame, function, point, &values)?;
        let clone = self.clones.get(&mut self.store, position as u64);
        let Some(Ref::Func(Some(clone))) = clone else {
            return Err(plain_trap("a function has no clone".into()));
        };
        let number = frame.point - function.first_point + 1;
        let outcome = clone
            .typed::<i32, i32>(&self.store)
            .and_then(|clone| clone.call(&mut self.store, number as i32));
        match outcome {
            Err(error) => Err(self.stop(error)),
            Ok(0) => {
                self.pending = Pending::Results(self.results(&function.results)?);
                Ok(false)
            }
            Ok(_) => self.collect().map(|()| true),
        }
    }

    /// Prepares the control memory for running code.
    fn enter(&mut self) {
        let set = |address, value| self.control.word(address).store(value, Ordering::Relaxed);
        set(meta::SAVE_POINTER, meta::SAVE);
        set(meta::REF_POINTER, meta::RESULTS_MAX);
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

    /// Results that a clone left.
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

    /// Takes over what the code saved on its way out, and what it waits for.
    fn collect(&mut self) -> Result<(), Stop> {
        let end = self
            .control
            .word(meta::SAVE_POINTER)
            .load(Ordering::Relaxed);
        let mut saved = vec![0; end.saturating_sub(meta::SAVE) as usize];
        self.control.read(meta::SAVE, &mut saved);
        let program = self.program.clone();
        let first = self.frames.len();
        let mut at = 0;
        while at + meta::FRAME_HEADER_BYTES as usize <= saved.len() {
            let number =
                u32::from_le_bytes([saved[at], saved[at + 1], saved[at + 2], saved[at + 3]]);
            let (_, function, point) = program
                .meta
                .point(number)
                .ok_or_else(|| plain_trap("code saved a frame of no point".into()))?;
            let mut length = 0;
            let start = at + meta::FRAME_HEADER_BYTES as usize;
            for slot in &point.saved {
                let ty = function.slots[*slot as usize];
                if ty == SlotType::FuncRef {
                    let place = start + length..start + length + 4;
                    let mut entry = [0; 4];
                    entry.copy_from_slice(&saved[place.clone()]);
                    let index = self.index_in(self.refs, u32::from_le_bytes(entry))?;
                    saved[place].copy_from_slice(&index.to_le_bytes());
                }
                length += ty.bytes() as usize;
            }
            self.frames.push(Frame {
                point: number,
                payload: saved[start..start + length].to_vec(),
            });
            at = (start + length).next_multiple_of(8);
        }
        // Code leaves innermost first.
        self.frames[first..].reverse();
        if self.frames.len() > super::frame::FRAMES_MAX {
            return Err(plain_trap("call stack exhausted".into()));
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
    /// [`Stop::Trap`] if it does not fit.
    pub fn load(&mut self, state: ThreadState) -> Result<(), Stop> {
        for (at, value) in state.globals.iter().enumerate() {
            let val = self.to_val(*value)?;
            self.globals[at]
                .set(&mut self.store, val)
                .map_err(|error| plain_trap(format!("a global cannot be set: {error}")))?;
        }
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

    /// How its thread is asked to come to a safepoint.
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

    /// Says why code ended, with the whole stack: what was native, then the
    /// frames that were not resumed yet.
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
                    .map(|frame| match frame.func_name() {
                        Some(name) => name.to_owned(),
                        None => self.program.meta.function_name(frame.func_index()),
                    })
                    .collect()
            })
            .unwrap_or_default();
        let meta = &self.program.meta;
        backtrace.extend(
            self.frames
                .iter()
                .rev()
                .filter_map(|frame| meta.point(frame.point))
                .map(|(_, function, _)| meta.function_name(function.index)),
        );
        let message = match error.downcast_ref::<wasmtime::Trap>() {
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
