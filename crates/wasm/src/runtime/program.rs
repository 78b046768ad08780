//! From bytes to something that can run: instrument, compile, cache, link.
//!
//! Two things are kept on disk by content: instrumented modules (which machines
//! refer to by hash and which travel with them) and compiled code (which never
//! travels: it is native code, and is loaded only if sealed with this node's
//! own key).

use super::compile_progress::{self, CompileProgress, Compiling};
use super::frame::hex;
use super::host::{self, ThreadContext};
use crate::instrument::{self, InstrumentError, meta::Meta};
use crate::memory::Creator;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use wasmtime::{Config, InstancePre, Linker, Module, OptLevel};

/// Native stack of a guest thread's WebAssembly code, in bytes. The runtime
/// never rebuilds frames on it, so it is the same before and after a capture.
pub const STACK_BYTES: usize = 1 << 20;

/// Why a module does not become a program.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It was refused by the instrumenter.
    #[error(transparent)]
    Instrument(#[from] InstrumentError),
    /// It imports what machines do not have.
    #[error("the module imports what machines do not have: {0}")]
    UnknownImports(String),
    /// The engine refused it.
    #[error("the module cannot be compiled: {0:#}")]
    Compile(wasmtime::Error),
    /// It runs, but can be neither moved nor captured.
    #[error("what lets the program's threads be resumed cannot be compiled: {0}")]
    Clones(String),
    /// The cache cannot be used.
    #[error("the cache at {path}: {source}", path = path.display())]
    Cache {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// How code is compiled; part of what names cached code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// NaNs get one bit pattern and relaxed SIMD one meaning, so that two runs
    /// can be compared bit by bit.
    pub deterministic: bool,
}

/// Compiles modules, and keeps what it compiled.
#[derive(Clone)]
pub struct Engine {
    inner: wasmtime::Engine,
    cache: Option<Cache>,
    guest_nice: Option<i32>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("cache", &self.cache)
            .finish()
    }
}

#[derive(Debug, Clone)]
struct Cache {
    folder: PathBuf,
    key: [u8; 32],
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
            .wasm_branch_hinting(true);
        let inner = wasmtime::Engine::new(&config).map_err(ProgramError::Compile)?;
        Ok(Engine {
            inner,
            cache: None,
            guest_nice: None,
        })
    }

    /// An engine that keeps what it compiles under `folder`, sealed with a key
    /// of its own that is made there when it is first used.
    ///
    /// # Errors
    /// As [`Self::new`], and [`ProgramError::Cache`].
    pub fn with_cache(options: Options, folder: &Path) -> Result<Self, ProgramError> {
        let fail = |source| ProgramError::Cache {
            path: folder.to_owned(),
            source,
        };
        let mut engine = Engine::new(options)?;
        std::fs::create_dir_all(folder).map_err(fail)?;
        let key_path = folder.join("seal.key");
        let key = match std::fs::read(&key_path) {
            Ok(key) if key.len() == 32 => key,
            _ => {
                let mut key = [0; 32];
                rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())
                    .map_err(|errno| fail(errno.into()))?;
                write_private(&key_path, &key).map_err(fail)?;
                // Another process may have been first; the file decides.
                std::fs::read(&key_path).map_err(fail)?
            }
        };
        engine.cache = Some(Cache {
            folder: folder.to_owned(),
            key: key
                .try_into()
                .map_err(|_| fail(std::io::ErrorKind::InvalidData.into()))?,
        });
        Ok(engine)
    }

    /// Guests' threads run at this nice value, whatever their process has: one that
    /// moves machines must get to it also where guests take all there is.
    #[must_use]
    pub fn with_guest_nice(mut self, nice: i32) -> Self {
        self.guest_nice = Some(nice);
        self
    }

    /// How far compiling is; `None` while nothing is compiled. It may be asked from any
    /// thread, as often as wanted.
    pub fn compile_progress(&self) -> Option<CompileProgress> {
        CompileProgress::now()
    }

    /// Makes a program of a module as its author built it. Only what it needs
    /// to run is compiled; see [`Program::prepare_resume`] for the rest.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn load(&self, module: &[u8]) -> Result<Arc<Program>, ProgramError> {
        let original = blake3::hash(module);
        let name = format!("{}.v{}.wasm", original.to_hex(), instrument::meta::VERSION);
        let instrumented = match self.cached(&name) {
            Some(bytes) => bytes,
            None => {
                let bytes = instrument::instrument(module)?;
                self.keep(&name, &bytes);
                bytes
            }
        };
        let program = self.program(instrumented)?;
        match self.cached_code(&program.code_name(WHOLE)) {
            Some(module) => {
                let linked = program.link(&module)?;
                program.whole.get_or_init(|| Ok(linked));
            }
            None => {
                let bytes = instrument::without_clones(&program.bytes, &program.meta)?;
                let module = self.compile(&bytes, &program.code_name(START))?;
                let linked = program.link(&module)?;
                program.start.get_or_init(|| linked);
            }
        }
        Ok(Arc::new(program))
    }

    /// Makes a program of a module that was instrumented before, maybe on
    /// another node; its threads can be resumed at once.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn load_instrumented(&self, bytes: Vec<u8>) -> Result<Arc<Program>, ProgramError> {
        let program = self.program(bytes)?;
        program.prepare_resume()?;
        Ok(Arc::new(program))
    }

    /// A program of which nothing is compiled yet.
    fn program(&self, bytes: Vec<u8>) -> Result<Program, ProgramError> {
        let meta = instrument::read_meta(&bytes)?;
        let kinds = host::import_kinds(&meta)?;
        Ok(Program {
            hash: *blake3::hash(&bytes).as_bytes(),
            meta,
            bytes,
            kinds,
            start: OnceLock::new(),
            whole: OnceLock::new(),
            engine: self.clone(),
        })
    }

    fn compile(&self, bytes: &[u8], name: &str) -> Result<Module, ProgramError> {
        if let Some(module) = self.cached_code(name) {
            return Ok(module);
        }
        // Of many workers that start the same module one compiles, and the others wait
        // for what comes of it.
        let lock = self.lock(name);
        if lock.is_some()
            && let Some(module) = self.cached_code(name)
        {
            return Ok(module);
        }
        let compiling = Compiling::begin(compile_progress::functions(bytes));
        let module = Module::new(&self.inner, bytes).map_err(ProgramError::Compile)?;
        drop(compiling);
        if self.cache.is_some() {
            let code = module.serialize().map_err(ProgramError::Compile)?;
            self.keep(name, &code);
        }
        Ok(module)
    }

    /// Held while something of this name is made; `None` where there is no lock to be
    /// had: then it may be made twice.
    fn lock(&self, name: &str) -> Option<std::fs::File> {
        let path = self.cache.as_ref()?.folder.join(format!("{name}.lock"));
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .ok()?;
        file.lock().ok()?;
        Some(file)
    }

    fn cached_code(&self, name: &str) -> Option<Module> {
        let code = self.cached(name)?;
        // SAFETY: the bytes carry this node's seal, so they are what this
        // node's engine made of this module; wasmtime itself checks that
        // version and settings are those of this engine.
        match unsafe { Module::deserialize(&self.inner, &code) } {
            Ok(module) => Some(module),
            Err(error) => {
                tracing::info!(%error, "cached code is of no use, compiling");
                None
            }
        }
    }

    /// The content of a cache file, if its seal is ours.
    fn cached(&self, name: &str) -> Option<Vec<u8>> {
        let cache = self.cache.as_ref()?;
        let mut bytes = std::fs::read(cache.folder.join(name)).ok()?;
        let body = bytes.len().checked_sub(32)?;
        let seal: [u8; 32] = bytes[body..].try_into().ok()?;
        // `Hash` compares in constant time.
        if cache.seal(name, &bytes[..body]) != seal {
            tracing::warn!(name, "a cache file has no valid seal, ignoring it");
            return None;
        }
        bytes.truncate(body);
        Some(bytes)
    }

    /// Puts something into the cache. Where that is not possible it is made anew
    /// when it is needed again: a full disk must not keep a machine from moving
    /// away.
    fn keep(&self, name: &str, bytes: &[u8]) {
        let Some(cache) = &self.cache else {
            return;
        };
        let path = cache.folder.join(name);
        let mut sealed = bytes.to_vec();
        sealed.extend(cache.seal(name, bytes).as_bytes());
        if let Err(error) = write_private(&path, &sealed) {
            tracing::warn!(path = %path.display(), %error, "compiled code is not kept");
        }
    }
}

impl Cache {
    fn seal(&self, name: &str, bytes: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(bytes);
        hasher.finalize()
    }
}

/// Writes a file whole or not at all, readable by its owner only.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // It would take room that is missing.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// What names cached code of the whole module, and of the one without clones.
const WHOLE: &str = "code";
const START: &str = "start";

type Linked = Result<InstancePre<ThreadContext>, String>;

/// A compiled, instrumented module.
///
/// Two modules are compiled of it: the one without clones, in which new
/// threads start (it is ready much sooner), and the whole one, in which threads
/// are resumed, and start too once it is there.
pub struct Program {
    pub(crate) meta: Meta,
    hash: [u8; 32],
    bytes: Vec<u8>,
    pub(crate) kinds: Vec<host::ImportKind>,
    start: OnceLock<InstancePre<ThreadContext>>,
    whole: OnceLock<Linked>,
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
    /// The nice value of guests' threads, if it is not their process's.
    pub(super) fn guest_nice(&self) -> Option<i32> {
        self.engine.guest_nice
    }

    /// Hash (BLAKE3) of the instrumented module: what frames and machines name.
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// The instrumented module, for sending it along.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What the instrumenter noted.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Whether the module exports a function of this name.
    pub fn exports_function(&self, name: &str) -> bool {
        self.linked().is_some_and(|instance| {
            instance
                .module()
                .get_export(name)
                .is_some_and(|ty| ty.func().is_some())
        })
    }

    /// Compiles what threads need to go on after a capture, unless it is there.
    /// It takes a few times as long as loading did, so it is best called well
    /// before a machine is frozen, on a thread that may wait: resuming and
    /// freezing call it, and wait.
    ///
    /// # Errors
    /// [`ProgramError::Clones`], the same each time.
    pub fn prepare_resume(&self) -> Result<(), ProgramError> {
        let linked = self.whole.get_or_init(|| {
            self.engine
                .compile(&self.bytes, &self.code_name(WHOLE))
                .and_then(|module| self.link(&module))
                .map_err(|error| error.to_string())
        });
        match linked {
            Ok(_) => Ok(()),
            Err(error) => Err(ProgramError::Clones(error.clone())),
        }
    }

    /// Whether threads can be resumed without compiling first.
    pub fn can_resume(&self) -> bool {
        matches!(self.whole.get(), Some(Ok(_)))
    }

    /// Bytes of machine code in use.
    pub fn code_bytes(&self) -> usize {
        self.linked()
            .map_or(0, |instance| instance.module().text().len())
    }

    /// What new instances are made of.
    pub(crate) fn linked(&self) -> Option<&InstancePre<ThreadContext>> {
        match self.whole.get() {
            Some(Ok(whole)) => Some(whole),
            _ => self.start.get(),
        }
    }

    pub(crate) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.engine.inner
    }

    fn link(&self, module: &Module) -> Result<InstancePre<ThreadContext>, ProgramError> {
        let mut linker = Linker::new(&self.engine.inner);
        host::link(&mut linker, module, &self.meta, &self.kinds)
            .and_then(|()| linker.instantiate_pre(module))
            .map_err(ProgramError::Compile)
    }

    fn code_name(&self, which: &str) -> String {
        format!("{}.{which}", hex(&self.hash))
    }
}
