//! Runs an original module on unmodified wasmtime with the same WASI: the baseline for instrumented
//! runs. Capture is impossible here.

use super::fiber::Trap;
use super::imports;
use super::machine::{Limits, Outcome};
use super::program::{self, Engine, ProgramError};
use super::signal::Signal;
use super::tables::{self, TableBudget, TableLimits};
use keel_wasi::{CallState, Function, Outcome as WasiOutcome, ParamType, Wasi};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use wasmparser::TypeRef;
use wasmtime::{
    Caller, Extern, FuncType, InstancePre, Linker, MemoryType, MemoryTypeBuilder, Module,
    ResourceLimiter, SharedMemory, Store, Val, ValType,
};

#[derive(Debug, thiserror::Error)]
#[error("exit with code {0}")]
struct Exited(u32);

struct UninstrumentedRun {
    engine: wasmtime::Engine,
    wasi: Arc<Wasi>,
    signal: Signal,
    threads: AtomicU32,
    next_tid: AtomicU32,
    limits: Limits,
    tables: Arc<TableBudget>,
    shared: Option<SharedMemory>,
    instance: Mutex<Option<InstancePre<Context>>>,
    ended: mpsc::Sender<Outcome>,
}

struct Context {
    plain: Arc<UninstrumentedRun>,
    tid: u32,
    limits: StoreLimits,
}

/// Limits of one thread's store.
struct StoreLimits {
    /// For each memory that the module defines.
    memory_bytes: usize,
    tables: TableLimits,
}

impl ResourceLimiter for StoreLimits {
    fn memory_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(desired <= self.memory_bytes)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        self.tables.table_growing(current, desired, maximum)
    }
}

impl Context {
    fn new(plain: &Arc<UninstrumentedRun>, tid: u32) -> Self {
        let bytes = usize::try_from(plain.limits.memory_bytes).unwrap_or(usize::MAX);
        Context {
            plain: plain.clone(),
            tid,
            limits: StoreLimits {
                memory_bytes: bytes,
                tables: TableLimits::plain(plain.tables.clone()),
            },
        }
    }
}

/// The memory type, bounded by the limit: the module may import a smaller memory than it declares.
fn within(ty: &MemoryType, limit_bytes: u64) -> wasmtime::Result<MemoryType> {
    let limit = limit_bytes >> 16;
    if ty.minimum() > limit {
        return Err(wasmtime::Error::msg(format!(
            "the module starts with {} bytes of memory, the limit is {limit_bytes} (raise it with --memory)",
            ty.minimum() << 16
        )));
    }
    let maximum = ty.maximum().unwrap_or(limit).min(limit);
    MemoryTypeBuilder::default()
        .memory64(ty.is_64())
        .shared(true)
        .min(ty.minimum())
        .max(Some(maximum))
        .build()
}

impl Engine {
    /// Runs an original command to its end on unmodified wasmtime.
    ///
    /// # Errors
    /// [`ProgramError`] for an invalid module or unknown imports.
    pub fn run_uninstrumented(
        &self,
        bytes: &[u8],
        wasi: Arc<Wasi>,
        limits: Limits,
    ) -> Result<Outcome, ProgramError> {
        imports::check(
            bytes,
            |import| matches!(import, TypeRef::Memory(memory) if memory.shared),
        )?;
        tables::initial_entries(bytes, false)?;
        let (engine, module) = self.compile_uninstrumented(bytes)?;
        run(engine, &module, wasi, limits)
    }
}

fn run(
    engine: wasmtime::Engine,
    module: &Module,
    wasi: Arc<Wasi>,
    limits: Limits,
) -> Result<Outcome, ProgramError> {
    let shared = module
        .imports()
        .find_map(|import| import.ty().memory().cloned())
        .filter(MemoryType::is_shared)
        .map(|ty| SharedMemory::new(&engine, within(&ty, limits.memory_bytes)?))
        .transpose()
        .map_err(ProgramError::Compile)?;
    let (ended, end) = mpsc::channel();
    let plain = Arc::new(UninstrumentedRun {
        engine,
        wasi,
        signal: Signal::new().map_err(|source| ProgramError::Cache {
            path: "eventfd".into(),
            source,
        })?,
        threads: AtomicU32::new(1),
        next_tid: AtomicU32::new(1),
        limits,
        tables: Arc::default(),
        shared,
        instance: Mutex::new(None),
        ended,
    });
    let linker = link(&plain, module)?;
    let instance = linker
        .instantiate_pre(module)
        .map_err(ProgramError::Compile)?;
    if let Ok(mut slot) = plain.instance.lock() {
        *slot = Some(instance);
    }
    launch(&plain, 0, None).map_err(|source| ProgramError::Cache {
        path: "thread".into(),
        source,
    })?;
    Ok(end.recv().unwrap_or(Outcome::Stopped))
}

fn link(plain: &Arc<UninstrumentedRun>, module: &Module) -> Result<Linker<Context>, ProgramError> {
    let mut linker = Linker::new(&plain.engine);
    linker.allow_shadowing(true);
    let mut unknown = Vec::new();
    for import in module.imports() {
        let (module, name) = (import.module(), import.name());
        let function = Function::by_import(module, name);
        let defined = if let Some(function) = function {
            define(&mut linker, &plain.engine, module, function)
        } else if (module, name) == ("wasi", "thread-spawn") {
            linker
                .func_wrap(module, name, |caller: Caller<'_, Context>, arg: i32| {
                    spawn(&caller.data().plain, arg as u32)
                })
                .map(drop)
        } else if (module, name) == ("evenkeel", "epoch") {
            linker.func_wrap(module, name, || 0u64).map(drop)
        } else if (module, name) == ("evenkeel", "object") {
            // (Names have no effect: it stays in place.)
            let object = |_: u32, _: u32, _: u32, _: u32| 0u32;
            linker.func_wrap(module, name, object).map(drop)
        } else if (module, name) == ("evenkeel", "prefer") {
            linker
                .func_wrap(module, name, |_: u32, _: u32| 0u32)
                .map(drop)
        } else if let Some(memory) = &plain.shared
            && import.ty().memory().is_some()
        {
            let store = Store::new(&plain.engine, Context::new(plain, 0));
            linker
                .define(&store, module, name, memory.clone())
                .map(drop)
        } else {
            unknown.push(format!("{module}.{name}"));
            Ok(())
        };
        defined.map_err(ProgramError::Compile)?;
    }
    if unknown.is_empty() {
        Ok(linker)
    } else {
        Err(ProgramError::UnknownImports(unknown.join(", ")))
    }
}

fn define(
    linker: &mut Linker<Context>,
    engine: &wasmtime::Engine,
    module: &str,
    function: Function,
) -> wasmtime::Result<()> {
    let params = function.params().iter().map(|ty| match ty {
        ParamType::I32 => ValType::I32,
        ParamType::I64 => ValType::I64,
    });
    let results = function.has_result().then_some(ValType::I32);
    let ty = FuncType::new(engine, params, results);
    linker.func_new(
        module,
        function.name(),
        ty,
        move |mut caller, params, results| {
            let args: Vec<u64> = params
                .iter()
                .map(|val| match val {
                    Val::I32(value) => u64::from(*value as u32),
                    Val::I64(value) => *value as u64,
                    _ => 0,
                })
                .collect();
            let plain = caller.data().plain.clone();
            let tid = caller.data().tid;
            let mut state = CallState::default();
            let mut call = |memory: &mut wiggle::GuestMemory<'_>| {
                plain
                    .wasi
                    .call(function, &args, memory, &mut state, tid, &plain.signal)
            };
            let outcome = match (&plain.shared, caller.get_export("memory")) {
                (Some(memory), _) => call(&mut wiggle::GuestMemory::Shared(memory.data())),
                (None, Some(Extern::Memory(memory))) => call(&mut wiggle::GuestMemory::Unshared(
                    memory.data_mut(&mut caller),
                )),
                _ => call(&mut wiggle::GuestMemory::Unshared(&mut [])),
            };
            match outcome {
                WasiOutcome::Done(errno) => {
                    if let Some(result) = results.first_mut() {
                        *result = Val::I32(errno);
                    }
                    Ok(())
                }
                WasiOutcome::Exit(code) => Err(Exited(code).into()),
                WasiOutcome::Trap(message) => Err(wasmtime::Error::msg(message)),
                WasiOutcome::Interrupted => Err(wasmtime::Error::msg("interrupted")),
            }
        },
    )?;
    Ok(())
}

fn spawn(plain: &Arc<UninstrumentedRun>, arg: u32) -> i32 {
    if plain.threads.fetch_add(1, Ordering::Relaxed) >= plain.limits.threads_max {
        plain.threads.fetch_sub(1, Ordering::Relaxed);
        return -1;
    }
    let tid = plain.next_tid.fetch_add(1, Ordering::Relaxed);
    match launch(plain, tid, Some(arg)) {
        Ok(()) => tid as i32,
        Err(_) => -1,
    }
}

fn launch(plain: &Arc<UninstrumentedRun>, tid: u32, arg: Option<u32>) -> std::io::Result<()> {
    let plain = plain.clone();
    std::thread::Builder::new()
        .stack_size(program::STACK_BYTES + (1 << 20))
        .spawn(move || {
            let result = run_thread(&plain, tid, arg);
            plain.threads.fetch_sub(1, Ordering::Relaxed);
            let outcome = match result {
                Ok(()) if tid != 0 => return,
                Ok(()) => Outcome::Exit(0),
                Err(error) => match error.downcast_ref() {
                    Some(Exited(code)) => Outcome::Exit(*code),
                    None => Outcome::Trap(Trap {
                        message: match error.downcast_ref::<wasmtime::Trap>() {
                            Some(trap) => trap.to_string(),
                            None => format!("{error:#}"),
                        },
                        backtrace: Vec::new(),
                    }),
                },
            };
            // The receiver is gone if another thread ended the program.
            let _ = plain.ended.send(outcome);
        })
        .map(drop)
}

fn run_thread(plain: &Arc<UninstrumentedRun>, tid: u32, arg: Option<u32>) -> wasmtime::Result<()> {
    let instance = plain
        .instance
        .lock()
        .unwrap_or_else(|error| error.into_inner())
        .clone()
        .ok_or_else(|| wasmtime::Error::msg("no program"))?;
    let mut store = Store::new(&plain.engine, Context::new(plain, tid));
    store.limiter(|context| &mut context.limits);
    let instance = instance.instantiate(&mut store)?;
    match arg {
        None => instance
            .get_typed_func::<(), ()>(&mut store, "_start")?
            .call(&mut store, ()),
        Some(arg) => instance
            .get_typed_func::<(i32, i32), ()>(&mut store, "wasi_thread_start")?
            .call(&mut store, (tid as i32, arg as i32)),
    }
}
