//! Program images: modules as their authors built them, and instrumented ones, by hash.
//! Modules travel between nodes; code compiled for a processor never does (that is
//! `code`'s).

use crate::context::Context;
use crate::error::CommandError;
use crate::processes::PROMPT;
use crate::state_dir::{is_hash, write_whole};
use keel_cluster::NodeName;
use keel_machine::worker::control::pack;
use keel_net::{Bytes, Fingerprint, Reply, RpcError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Request between agents: `(is program, hash)` → stream of the file's pieces.
pub(crate) const FETCH: u16 = 0x0302;

/// Bytes of a module in one piece.
const PIECE_BYTES: usize = 1 << 20;

/// The images that this node has, and those that it can fetch.
pub(crate) struct Images {
    context: Arc<Context>,
}

impl Images {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Images { context }
    }

    /// Keeps a module that a user uploads; its hash.
    ///
    /// # Errors
    /// [`CommandError`] if it is no module, or the disk does not take it.
    pub(crate) async fn upload(&self, module: Bytes) -> Result<String, CommandError> {
        if !module.starts_with(b"\0asm") {
            let what = "that is not a WebAssembly module (it does not begin with \\0asm)";
            return Err(CommandError::Invalid(what.into()));
        }
        let context = self.context.clone();
        tokio::task::spawn_blocking(move || {
            let hash = blake3::hash(&module).to_hex().to_string();
            let path = context.dir.module(&hash);
            if !path.exists() {
                write_whole(&path, &module).map_err(|error| {
                    CommandError::Unavailable(format!("{}: {error}", path.display()))
                })?;
            }
            Ok(hash)
        })
        .await
        .map_err(|error| CommandError::Unavailable(error.to_string()))?
    }

    /// Sends an image to another node.
    ///
    /// # Errors
    /// [`RpcError`] if that is no hash, or the image is not here.
    pub(crate) async fn send(&self, is_program: bool, hash: &str) -> Result<Reply, RpcError> {
        if !is_hash(hash) {
            return Err(RpcError::refused("that is no hash of a module"));
        }
        let path = match is_program {
            true => self.context.dir.program(hash),
            false => self.context.dir.module(hash),
        };
        send_file(path).await
    }

    /// The file of an instrumented module, fetched from a move's source if need be.
    pub(crate) async fn find_program(
        &self,
        source: &NodeName,
        hash: &Fingerprint,
    ) -> Result<PathBuf, String> {
        let hash = hash.to_string();
        let path = self.context.dir.program(&hash);
        if !is_there(&path).await {
            self.fetch(source, true, &hash, &path)
                .await
                .map_err(|error| format!("its module cannot be fetched: {error}"))?;
        }
        Ok(path)
    }

    /// The file of a module as its author built it, fetched from whichever node has
    /// it if need be.
    pub(crate) async fn find_module(&self, hash: &str) -> Result<PathBuf, String> {
        if !is_hash(hash) {
            return Err(format!("{hash:?} is no hash of a module"));
        }
        let path = self.context.dir.module(hash);
        if is_there(&path).await {
            return Ok(path);
        }
        for node in self.context.members.all().keys() {
            if *node == self.context.name {
                continue;
            }
            match tokio::time::timeout(6 * PROMPT, self.fetch(node, false, hash, &path)).await {
                Ok(Ok(())) => return Ok(path),
                Ok(Err(error)) => tracing::debug!(%node, error, "no module from there"),
                Err(_) => tracing::warn!(%node, "a module takes too long"),
            }
        }
        Err(format!(
            "no node that answers has module {hash}; run it again with its file"
        ))
    }

    /// Gets a file from a node and keeps it, if it is what its hash says.
    async fn fetch(
        &self,
        node: &NodeName,
        is_program: bool,
        hash: &str,
        path: &Path,
    ) -> Result<(), String> {
        let question = pack(&(is_program, hash.to_owned())).map_err(|error| error.to_string())?;
        let mut stream = self
            .context
            .peers
            .stream(node, FETCH, question)
            .await
            .map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        while let Some(piece) = stream.recv().await {
            bytes.extend_from_slice(&piece.map_err(|error| error.to_string())?);
            if bytes.len() > 2 * keel_machine::MODULE_BYTES_MAX {
                return Err("the module is too large".into());
            }
        }
        let (hash, path) = (hash.to_owned(), path.to_owned());
        tokio::task::spawn_blocking(move || {
            if blake3::hash(&bytes).to_hex().as_str() != hash {
                return Err("the module is not what its hash says".to_owned());
            }
            write_whole(&path, &bytes).map_err(|error| format!("{}: {error}", path.display()))
        })
        .await
        .map_err(|error| error.to_string())?
    }
}

/// Whether there is such a file; where that cannot be said it is fetched.
async fn is_there(path: &Path) -> bool {
    tokio::fs::try_exists(path).await.unwrap_or_default()
}

/// The file of a module, in pieces, for another node.
async fn send_file(path: PathBuf) -> Result<Reply, RpcError> {
    let opened = tokio::task::spawn_blocking(move || std::fs::File::open(path));
    let mut file = opened
        .await
        .map_err(RpcError::unknown)?
        .map_err(|_| RpcError::refused("this node does not have that module"))?;
    let (send, stream) = mpsc::channel(4);
    std::thread::Builder::new()
        .name("send-file".into())
        .spawn(move || {
            use std::io::Read;
            loop {
                let mut piece = Vec::with_capacity(PIECE_BYTES);
                let read = (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece);
                match read {
                    Ok(0) => return,
                    Ok(_) => {
                        if send.blocking_send(piece.into()).is_err() {
                            return;
                        }
                    }
                    // The receiver checks the hash of the whole.
                    Err(error) => {
                        tracing::warn!(%error, "a module cannot be sent");
                        return;
                    }
                }
            }
        })
        .map_err(RpcError::failed)?;
    Ok(Reply::Stream(stream))
}
