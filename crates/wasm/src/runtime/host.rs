//! Host functions behind a module's imports: their kinds, their definition in the linker, and
//! interruptible calls.

use super::frame::{Pending, Progress, Value};
use super::program::ProgramError;
use super::signal::Signal;
use super::tables::{TableBudget, TableLimits};
use crate::instrument::meta::{self, HOST_MODULE, Meta, PREFIX, SlotType};
use crate::memory::{GuestMemory, WASM_PAGE_BYTES};
use std::sync::Arc;
use wasmtime::{AsContextMut, Caller, FuncType, Linker, Module, Val, ValType};

/// Result of a host call.
#[derive(Debug)]
pub enum HostOutcome {
    /// Complete, with these results as bits.
    Done(Vec<u64>),
    /// Interrupted by a safepoint request before any effect.
    Interrupted,
    /// The program ends, with this code.
    Exit(u32),
    Trap(String),
}

/// Implementation of a thread's host calls.
pub trait Host: Send + Sync {
    /// Performs the call of imported function `import`.
    fn call(
        &self,
        import: u32,
        args: &[u64],
        progress: &mut Progress,
        thread: &HostThread,
    ) -> HostOutcome;

    /// As [`Self::call`], for a WASI call with its input ([`keel_wasi::pack`]); also returns its
    /// output. Only called at the home.
    fn call_packed(
        &self,
        _import: u32,
        _call: &keel_wasi::PackedCall,
        _progress: &mut Progress,
        _thread: &HostThread,
    ) -> (HostOutcome, Vec<u8>) {
        let what = "a call with its buffers came to where none comes";
        (HostOutcome::Trap(what.into()), Vec::new())
    }
}

/// The thread that makes a host call.
#[derive(Debug, Clone)]
pub struct HostThread {
    /// The main thread has 0.
    pub tid: u32,
    /// Its safepoint signal.
    pub signal: Arc<Signal>,
    pub memories: Arc<[Arc<GuestMemory>]>,
    /// The machine's table budget.
    pub tables: Arc<TableBudget>,
}

pub(crate) struct ThreadContext {
    pub(crate) host: Arc<dyn Host>,
    pub(crate) thread: HostThread,
    pub(crate) pending: Pending,
    pub(crate) limits: TableLimits,
}

/// Kind of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportKind {
    /// `memory.grow` of a memory.
    Grow(u32),
    /// `memory.size` of a memory.
    Size(u32),
    /// Updates an instance's memory size.
    Sync(u32),
    /// `memory.atomic.wait32`.
    Wait32(u32),
    /// `memory.atomic.wait64`.
    Wait64(u32),
    /// `memory.atomic.notify`.
    Notify(u32),
    /// A function of WASI preview 1, or of snapshot 0.
    Wasi(keel_wasi::Function),
    /// `evenkeel.epoch`.
    Epoch,
    /// `evenkeel.object`.
    Object,
    /// `evenkeel.prefer`.
    Prefer,
    /// `wasi.thread-spawn`.
    ThreadSpawn,
    /// A function of the spec test-suite that prints its arguments.
    Print,
}

/// Classifies the imports of an instrumented module.
///
/// # Errors
/// [`ProgramError::UnknownImports`] with all unknown imports.
pub(crate) fn import_kinds(meta: &Meta) -> Result<Vec<ImportKind>, ProgramError> {
    let mut unknown = Vec::new();
    let mut kinds = Vec::new();
    for import in &meta.imports {
        let kind = match import.module.as_str() {
            HOST_MODULE => lowered_kind(import, meta),
            _ => guest_kind(import),
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

/// Kind of an import in the original module; `None` if it is unknown.
pub(super) fn guest_kind(import: &meta::Import) -> Option<ImportKind> {
    match import.module.as_str() {
        "wasi_snapshot_preview1" | "wasi_unstable" => wasi_kind(import),
        "wasi"
            if import.name == "thread-spawn"
                && import.params == [SlotType::I32]
                && import.results == [SlotType::I32] =>
        {
            Some(ImportKind::ThreadSpawn)
        }
        "evenkeel" => evenkeel_kind(import),
        "spectest" if import.name.starts_with("print") && import.results.is_empty() => {
            Some(ImportKind::Print)
        }
        _ => None,
    }
}

/// Functions of `guests/evenkeel.h`.
fn evenkeel_kind(import: &meta::Import) -> Option<ImportKind> {
    let (params, results): (&[SlotType], SlotType) = match import.name.as_str() {
        "epoch" => (&[], SlotType::I64),
        "object" => (&[SlotType::I32; 4], SlotType::I32),
        "prefer" => (&[SlotType::I32; 2], SlotType::I32),
        _ => return None,
    };
    let is_right = import.params == params && import.results == [results];
    is_right.then_some(match params.len() {
        0 => ImportKind::Epoch,
        2 => ImportKind::Prefer,
        _ => ImportKind::Object,
    })
}

fn lowered_kind(import: &meta::Import, meta: &Meta) -> Option<ImportKind> {
    let (what, memory) = import.name.split_once(':')?;
    let memory: u32 = memory.parse().ok()?;
    let address = match meta.memories.get(memory as usize)?.memory64 {
        true => SlotType::I64,
        false => SlotType::I32,
    };
    let (i32, i64) = (SlotType::I32, SlotType::I64);
    let (kind, params, results) = match what {
        "grow" => (ImportKind::Grow(memory), vec![address], vec![address]),
        "size" => (ImportKind::Size(memory), vec![], vec![address]),
        "sync" => (ImportKind::Sync(memory), vec![], vec![]),
        "wait32" => (
            ImportKind::Wait32(memory),
            vec![address, i32, i64, i64],
            vec![i32],
        ),
        "wait64" => (
            ImportKind::Wait64(memory),
            vec![address, i64, i64, i64],
            vec![i32],
        ),
        "notify" => (
            ImportKind::Notify(memory),
            vec![address, i32, i64],
            vec![i32],
        ),
        _ => return None,
    };
    (import.params == params && import.results == results).then_some(kind)
}

fn wasi_kind(import: &meta::Import) -> Option<ImportKind> {
    let function = keel_wasi::Function::by_import(&import.module, &import.name)?;
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
                    update_size(&mut caller, memory)?;
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
                            // The call has taken effect: only its results are pending.
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

pub(crate) fn typed(types: &[SlotType], bits: &[u64]) -> Vec<Value> {
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

pub(crate) fn to_val(value: Value) -> Val {
    match value {
        Value::I32(bits) => Val::I32(bits as i32),
        Value::I64(bits) => Val::I64(bits as i64),
        Value::F32(bits) => Val::F32(bits),
        Value::F64(bits) => Val::F64(bits),
        Value::V128(bits) => Val::V128(bits.into()),
        Value::FuncRef(_) => Val::FuncRef(None),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("exit with code {0}")]
pub(crate) struct Exited(pub(crate) u32);

/// A host function detected a contract violation by the guest.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct HostTrap(pub(crate) String);

/// Performs a host call; `None` if it was interrupted before any effect.
pub(crate) fn host_call(
    mut store: impl AsContextMut<Data = ThreadContext>,
    import: u32,
    kind: ImportKind,
    args: &[u64],
    progress: &mut Progress,
) -> wasmtime::Result<Option<Vec<u64>>> {
    let mut context = store.as_context_mut();
    let data = context.data_mut();
    // The caller updates the instance, since it has its exports.
    if let ImportKind::Sync(_) = kind {
        return Ok(Some(Vec::new()));
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

/// Updates the memory size of the calling instance: another thread's instance, or the machine, may
/// have grown the memory.
fn update_size(caller: &mut Caller<'_, ThreadContext>, memory: u32) -> wasmtime::Result<()> {
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
