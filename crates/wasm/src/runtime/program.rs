//! From module bytes to a program: instrument, compile, cache, link. The code for resuming threads is left
//! to `resume_code`.
//!
//! Two kinds of files are stored by content hash: instrumented modules (which machines refer to,
//! and which move with them) and compiled code (native code, which never moves, and is loaded only
//! with a valid tag of this node's key).

use super::cache::Cache;
use super::compile_progress::{self, CompileProgress, Compiling};
use super::frame::hex;
use super::host::{self, ThreadContext};
use super::imports;
use super::resume_code::FunctionCode;
use super::tables::{self, TABLES_ENTRIES_MAX};
use crate::instrument::meta::{Meta, TABLE_ENTRIES_MAX};
use crate::instrument::{self, InstrumentError, Layout};
use crate::memory::Creator;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use wasmtime::{Config, InstancePre, Linker, Module, OptLevel};

/// Native stack of a guest thread's WebAssembly code, in bytes. The runtime
/// never rebuilds frames on it, so it is the same before and after a capture.
pub const STACK_BYTES: usize = 1 << 20;

/// Why a module cannot become a program.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The instrumenter refused it.
    #[error(transparent)]
    Instrument(#[from] InstrumentError),
    /// It has unknown imports.
    #[error("the module has unknown imports: {0}")]
    UnknownImports(String),
    /// Its initial tables are too large.
    #[error(
        "the module's tables begin with {entries} entries or more; a machine has at most {TABLE_ENTRIES_MAX} in one table, and {TABLES_ENTRIES_MAX} in all"
    )]
    Tables {
        /// Entries up to and including the table that exceeds the limit.
        entries: u64,
    },
    #[error("the module cannot be compiled: {0:#}")]
    Compile(wasmtime::Error),
    /// It runs, but can be neither moved nor captured.
    #[error("the code for resuming {function} cannot be compiled: {reason}")]
    Clone {
        /// Name of the function.
        function: String,
        reason: String,
    },
    #[error("the cache at {path}: {source}", path = path.display())]
    Cache {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Compilation options; part of the cache key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Canonical NaNs and deterministic relaxed SIMD, so that two runs can be compared bit by bit.
    pub deterministic: bool,
}

/// Compiles modules, with a cache.
#[derive(Clone)]
pub struct Engine {
    inner: wasmtime::Engine,
    options: Options,
    cache: Option<Cache>,
    guest_nice: Option<i32>,
    only_entries: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("cache", &self.cache)
            .finish()
    }
}

pub(crate) fn config(options: Options) -> Config {
    let mut config = Config::new();
    config
        .cranelift_opt_level(OptLevel::Speed)
        .cranelift_nan_canonicalization(options.deterministic)
        .relaxed_simd_deterministic(options.deterministic)
        .wasm_threads(true)
        .wasm_tail_call(true)
        .wasm_multi_memory(true)
        .wasm_memory64(true)
        .wasm_extended_const(true)
        .wasm_relaxed_simd(true)
        .max_wasm_stack(STACK_BYTES)
        .memory_reservation(4 << 30)
        .memory_guard_size(crate::memory::GUARD_BYTES as u64);
    config
}

impl Engine {
    /// An engine without a cache.
    ///
    /// # Errors
    /// [`ProgramError::Compile`] where the host's CPU is not supported.
    pub fn new(options: Options) -> Result<Self, ProgramError> {
        let mut config = config(options);
        config
            .with_host_memory(Arc::new(Creator))
            .wasm_branch_hinting(true)
            // Backtraces name functions only, and frame pointers suffice to find them: without these
            // tables there is less to compile, store and load.
            .generate_address_map(false)
            .native_unwind_info(false);
        let inner = wasmtime::Engine::new(&config).map_err(ProgramError::Compile)?;
        Ok(Engine {
            inner,
            options,
            cache: None,
            guest_nice: None,
            only_entries: false,
        })
    }

    /// An engine with a cache in `folder`, authenticated with a key that is created there at first
    /// use.
    ///
    /// # Errors
    /// As [`Self::new`], and [`ProgramError::Cache`].
    pub fn with_cache(options: Options, folder: &Path) -> Result<Self, ProgramError> {
        let mut engine = Engine::new(options)?;
        let cache = Cache::open(folder).map_err(|source| ProgramError::Cache {
            path: folder.to_owned(),
            source,
        })?;
        engine.cache = Some(cache);
        Ok(engine)
    }

    /// Sets the nice value of guest threads, independent of their process: the code that moves
    /// machines must get CPU time even if guests take all of it.
    #[must_use]
    pub fn with_guest_nice(mut self, nice: i32) -> Self {
        self.guest_nice = Some(nice);
        self
    }

    /// Resumes threads by entry modules alone, whatever the size of a function, as the first threads of a
    /// large one are: for tests of those.
    #[doc(hidden)]
    #[must_use]
    pub fn with_only_entries(mut self) -> Self {
        self.only_entries = true;
        self
    }

    /// Progress of compilation; `None` while nothing is compiled. Callable from any thread at any
    /// rate.
    pub fn compile_progress(&self) -> Option<CompileProgress> {
        CompileProgress::now()
    }

    /// Creates a program from an original module. Imports are checked first.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn load(&self, module: &[u8]) -> Result<Arc<Program>, ProgramError> {
        // (Scanning reports the other unsupported imports.)
        imports::check(module, |_| true)?;
        tables::initial_entries(module, false)?;
        let original = blake3::hash(module);
        let (version, revision) = (instrument::meta::VERSION, instrument::REVISION);
        let name = format!("{}.v{version}.{revision}.wasm", original.to_hex());
        let instrumented = match self.cached(&name) {
            Some(bytes) => bytes,
            None => {
                let bytes = instrument::instrument(module)?;
                self.keep(&name, &bytes);
                bytes
            }
        };
        self.load_instrumented(instrumented)
    }

    /// Creates a program from a module that was instrumented before, possibly on another node.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn load_instrumented(&self, bytes: Vec<u8>) -> Result<Arc<Program>, ProgramError> {
        let meta = instrument::read_meta(&bytes)?;
        let kinds = host::import_kinds(&meta)?;
        let table_entries = tables::initial_entries(&bytes, true)?;
        let hash = *blake3::hash(&bytes).as_bytes();
        let name = code_name(&hash, HOT);
        let module = match self.cached_code(&name) {
            Some(module) => module,
            None => self.compile(&instrument::hot_module(&bytes, &meta)?, &name)?,
        };
        let mut linker = Linker::new(&self.inner);
        let hot = host::link(&mut linker, &module, &meta, &kinds)
            .and_then(|()| linker.instantiate_pre(&module))
            .map_err(ProgramError::Compile)?;
        Ok(Arc::new(Program {
            hash,
            resume_codes: meta.functions.iter().map(|_| OnceLock::new()).collect(),
            layout: OnceLock::new(),
            meta,
            bytes,
            kinds,
            table_entries,
            hot,
            engine: self.clone(),
        }))
    }

    fn compile(&self, bytes: &[u8], name: &str) -> Result<Module, ProgramError> {
        compile(&self.inner, self.cache.as_ref(), bytes, name)
    }

    /// Compiles an original module for unmodified wasmtime, through the cache; also returns the
    /// engine.
    ///
    /// # Errors
    /// [`ProgramError::Compile`].
    pub(super) fn compile_uninstrumented(
        &self,
        bytes: &[u8],
    ) -> Result<(wasmtime::Engine, Module), ProgramError> {
        let mut config = config(self.options);
        config.shared_memory(true);
        let plain = wasmtime::Engine::new(&config).map_err(ProgramError::Compile)?;
        let name = format!("{}.{PLAIN}", blake3::hash(bytes).to_hex());
        let module = compile(&plain, self.cache.as_ref(), bytes, &name)?;
        Ok((plain, module))
    }

    fn cached_code(&self, name: &str) -> Option<Module> {
        cached_code(&self.inner, self.cache.as_ref()?, name)
    }

    fn cached(&self, name: &str) -> Option<Vec<u8>> {
        self.cache.as_ref()?.get(name)
    }

    fn keep(&self, name: &str, bytes: &[u8]) {
        if let Some(cache) = &self.cache {
            cache.put(name, bytes);
        }
    }
}

/// Compiles a module, or loads it from the cache.
fn compile(
    engine: &wasmtime::Engine,
    cache: Option<&Cache>,
    bytes: &[u8],
    name: &str,
) -> Result<Module, ProgramError> {
    let cached = || cached_code(engine, cache?, name);
    if let Some(module) = cached() {
        return Ok(module);
    }
    // Of several workers that start the same module, one compiles and the others wait for the
    // result.
    let lock = cache.and_then(|cache| cache.lock(name));
    if lock.is_some()
        && let Some(module) = cached()
    {
        return Ok(module);
    }
    let compiling = Compiling::begin(compile_progress::functions(bytes));
    let module = Module::new(engine, bytes).map_err(ProgramError::Compile)?;
    drop(compiling);
    if let Some(cache) = cache {
        let code = module.serialize().map_err(ProgramError::Compile)?;
        cache.put(name, &code);
    }
    Ok(module)
}

fn cached_code(engine: &wasmtime::Engine, cache: &Cache, name: &str) -> Option<Module> {
    let code = cache.get(name)?;
    // SAFETY: the bytes carry this node's authentication tag, so they are what this node's engine
    // produced from this module; wasmtime itself checks that version and settings match.
    match unsafe { Module::deserialize(engine, &code) } {
        Ok(module) => Some(module),
        Err(error) => {
            tracing::info!(%error, "cached code is unusable, compiling");
            None
        }
    }
}

/// The hash (hex digits) of the program whose code a cache file of this name has; `None` for other
/// files.
pub fn program_of_code(file_name: &str) -> Option<&str> {
    file_name.strip_suffix(HOT)?.strip_suffix('.')
}

fn code_name(hash: &[u8; 32], which: &str) -> String {
    format!("{}.{which}", hex(hash))
}

/// Suffixes of cached code: of the hot module, of the resume module of a function (behind its
/// number, and that of a part), and of the original module.
const HOT: &str = "code";
const RESUME: &str = "resume";
const PLAIN: &str = "plain";

/// A compiled, instrumented module.
///
/// Threads run in the code of its hot module. The code in which captured frames are resumed is compiled
/// when it is first needed.
pub struct Program {
    pub(crate) meta: Meta,
    hash: [u8; 32],
    bytes: Vec<u8>,
    pub(crate) kinds: Vec<host::ImportKind>,
    /// Initial table entries of each thread's instance.
    pub(super) table_entries: u64,
    hot: InstancePre<ThreadContext>,
    resume_codes: Box<[OnceLock<FunctionCode>]>,
    layout: OnceLock<Layout>,
    engine: Engine,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program")
            .field("hash", &hex(&self.hash))
            .finish_non_exhaustive()
    }
}

impl Program {
    /// Nice value of guest threads, if it differs from their process.
    fn guest_nice(&self) -> Option<i32> {
        self.engine.guest_nice
    }

    /// Hash (BLAKE3) of the instrumented module, by which frames and machines refer to it.
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// The instrumented module, to be sent along.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Whether the module exports a function of this name.
    pub fn exports_function(&self, name: &str) -> bool {
        let export = self.hot.module().get_export(name);
        export.is_some_and(|ty| ty.func().is_some())
    }

    /// Compiles a module for resuming, or loads it from the cache.
    pub(super) fn compile_resume(
        &self,
        name: &str,
        extract: impl FnOnce() -> Result<Vec<u8>, ProgramError>,
    ) -> Result<Module, ProgramError> {
        let name = code_name(&self.hash, &format!("{name}.{RESUME}"));
        match self.engine.cached_code(&name) {
            Some(module) => Ok(module),
            None => self.engine.compile(&extract()?, &name),
        }
    }

    /// The code for resuming of each function of the metadata.
    pub(super) fn resume_codes(&self) -> &[OnceLock<FunctionCode>] {
        &self.resume_codes
    }

    /// Whether threads are resumed by entry modules alone.
    pub(super) fn only_entries(&self) -> bool {
        self.engine.only_entries
    }

    pub(super) fn layout(&self) -> Result<&Layout, ProgramError> {
        if let Some(layout) = self.layout.get() {
            return Ok(layout);
        }
        let layout = Layout::read(&self.bytes)?;
        Ok(self.layout.get_or_init(|| layout))
    }

    /// Bytes of machine code in use.
    pub fn code_bytes(&self) -> usize {
        let clones = self.resume_codes.iter().filter_map(OnceLock::get);
        let clones: usize = clones.map(FunctionCode::code_bytes).sum();
        self.hot.module().text().len() + clones
    }

    /// Template of new instances.
    pub(crate) fn linked(&self) -> &InstancePre<ThreadContext> {
        &self.hot
    }

    pub(crate) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.engine.inner
    }
}

/// Lowers the calling thread's priority to that of guests.
pub(super) fn lower_priority(program: &Program) {
    if let Some(nice) = program.guest_nice()
        // (On Linux the nice value is per thread.)
        && let Err(error) = rustix::process::setpriority_process(None, nice)
    {
        tracing::debug!(%error, "the priority of a guest thread cannot be lowered");
    }
}
