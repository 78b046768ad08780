//! From bytes to something that can run: instrument, compile, cache, link.
//!
//! Two things are kept on disk by content: instrumented modules (which machines
//! refer to by hash and which travel with them) and compiled code (which never
//! travels: it is native code, and is loaded only if sealed with this node's
//! own key).

use super::fiber::{self, ThreadContext};
use super::frame::hex;
use crate::instrument::{self, InstrumentError, meta::Meta};
use crate::memory::Creator;
use std::path::{Path, PathBuf};
use std::sync::Arc;
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
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("cache", &self.cache).finish()
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
        Ok(Engine { inner, cache: None })
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

    /// Makes a program of a module as its author built it.
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
                self.keep(&name, &bytes)?;
                bytes
            }
        };
        self.load_instrumented(instrumented)
    }

    /// Makes a program of a module that was instrumented before, maybe on
    /// another node.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn load_instrumented(&self, bytes: Vec<u8>) -> Result<Arc<Program>, ProgramError> {
        let meta = instrument::read_meta(&bytes)?;
        let hash = *blake3::hash(&bytes).as_bytes();
        let module = self.compile(&bytes, &hash)?;
        let kinds = fiber::import_kinds(&meta)?;
        let mut linker = Linker::new(&self.inner);
        fiber::link(&mut linker, &module, &meta, &kinds).map_err(ProgramError::Compile)?;
        let instance = linker
            .instantiate_pre(&module)
            .map_err(ProgramError::Compile)?;
        Ok(Arc::new(Program {
            meta,
            hash,
            bytes,
            kinds,
            exports: module
                .exports()
                .filter(|export| export.ty().func().is_some())
                .map(|export| export.name().to_owned())
                .collect(),
            instance,
            engine: self.inner.clone(),
        }))
    }

    fn compile(&self, bytes: &[u8], hash: &[u8; 32]) -> Result<Module, ProgramError> {
        let name = format!("{}.code", hex(hash));
        if let Some(code) = self.cached(&name) {
            // SAFETY: the bytes carry this node's seal, so they are what this
            // node's engine made of this module; wasmtime itself checks that
            // version and settings are those of this engine.
            match unsafe { Module::deserialize(&self.inner, &code) } {
                Ok(module) => return Ok(module),
                Err(error) => tracing::info!(%error, "cached code is of no use, compiling"),
            }
        }
        let module = Module::new(&self.inner, bytes).map_err(ProgramError::Compile)?;
        if self.cache.is_some() {
            let code = module.serialize().map_err(ProgramError::Compile)?;
            self.keep(&name, &code)?;
        }
        Ok(module)
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

    fn keep(&self, name: &str, bytes: &[u8]) -> Result<(), ProgramError> {
        let Some(cache) = &self.cache else {
            return Ok(());
        };
        let path = cache.folder.join(name);
        let mut sealed = bytes.to_vec();
        sealed.extend(cache.seal(name, bytes).as_bytes());
        write_private(&path, &sealed).map_err(|source| ProgramError::Cache { path, source })
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
    file.write_all(bytes)?;
    std::fs::rename(&temporary, path)
}

/// A compiled, instrumented module.
pub struct Program {
    pub(crate) meta: Meta,
    hash: [u8; 32],
    bytes: Vec<u8>,
    pub(crate) kinds: Vec<fiber::ImportKind>,
    exports: Vec<String>,
    pub(crate) instance: InstancePre<ThreadContext>,
    pub(crate) engine: wasmtime::Engine,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program")
            .field("hash", &hex(&self.hash))
            .finish_non_exhaustive()
    }
}

impl Program {
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
        self.exports.iter().any(|export| export == name)
    }
}
