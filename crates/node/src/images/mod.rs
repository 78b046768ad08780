//! Program images, by hash: what machines start from (for `wasm`, modules as their authors built
//! them) and what runs (instrumented modules). Both are sent between nodes; code compiled for a
//! processor never is, see `compilation`.

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

/// Bytes of a file in one piece.
const PIECE_BYTES: usize = 1 << 20;

/// The images of this node, and access to those of others.
pub(crate) struct Images {
    context: Arc<Context>,
}

impl Images {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Images { context }
    }

    /// Stores an image that a user uploads; returns its hash.
    ///
    /// # Errors
    /// [`CommandError`] if no machine starts from it, or it cannot be written.
    pub(crate) async fn upload(&self, image: Bytes) -> Result<String, CommandError> {
        self.context
            .kinds
            .check_image(&image)
            .map_err(CommandError::Invalid)?;
        let context = self.context.clone();
        tokio::task::spawn_blocking(move || {
            let hash = blake3::hash(&image).to_hex().to_string();
            let path = context.dir.image(&hash);
            if !path.exists() {
                write_whole(&path, &image).map_err(|error| {
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
    /// [`RpcError`] if that is not a hash, or the image is not here.
    pub(crate) async fn send(&self, is_program: bool, hash: &str) -> Result<Reply, RpcError> {
        if !is_hash(hash) {
            return Err(RpcError::refused("that is no hash of a module"));
        }
        let path = match is_program {
            true => self.context.dir.program(hash),
            false => self.context.dir.image(hash),
        };
        send_file(path).await
    }

    /// The file of a program, fetched from a move's source if necessary.
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

    /// The file of an image, fetched from any node that has it if necessary.
    pub(crate) async fn find_image(&self, hash: &str) -> Result<PathBuf, String> {
        if !is_hash(hash) {
            return Err(format!("{hash:?} is no hash of a module"));
        }
        let path = self.context.dir.image(hash);
        if is_there(&path).await {
            return Ok(path);
        }
        for node in self.context.members.all().keys() {
            if *node == self.context.name {
                continue;
            }
            match tokio::time::timeout(6 * PROMPT, self.fetch(node, false, hash, &path)).await {
                Ok(Ok(())) => return Ok(path),
                Ok(Err(error)) => {
                    tracing::debug!(%node, error, "cannot fetch a module from the node")
                }
                Err(_) => tracing::warn!(%node, "fetching a module timed out"),
            }
        }
        Err(format!(
            "no node that answers has module {hash}; run it again with its file"
        ))
    }

    /// Fetches a file from a node and stores it, if it matches its hash.
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
            .bulk_stream(node, FETCH, question)
            .await
            .map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        while let Some(piece) = stream.recv().await {
            bytes.extend_from_slice(&piece.map_err(|error| error.to_string())?);
            if bytes.len() > 2 * self.context.kinds.image_bytes_max() {
                return Err("the module is too large".into());
            }
        }
        let (hash, path) = (hash.to_owned(), path.to_owned());
        tokio::task::spawn_blocking(move || {
            if blake3::hash(&bytes).to_hex().as_str() != hash {
                return Err("the module does not match its hash".to_owned());
            }
            write_whole(&path, &bytes).map_err(|error| format!("{}: {error}", path.display()))
        })
        .await
        .map_err(|error| error.to_string())?
    }
}

/// Whether the file exists; on an error it is fetched.
async fn is_there(path: &Path) -> bool {
    tokio::fs::try_exists(path).await.unwrap_or_default()
}

/// Sends a file in pieces to another node, which checks that it is whole.
pub(crate) async fn send_file(path: PathBuf) -> Result<Reply, RpcError> {
    let opened = tokio::task::spawn_blocking(move || std::fs::File::open(path));
    let mut file = opened
        .await
        .map_err(RpcError::unknown)?
        .map_err(|_| RpcError::refused("this node does not have that file"))?;
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
                    // The receiver checks the hash of the whole file.
                    Err(error) => {
                        tracing::warn!(%error, "a file cannot be sent");
                        return;
                    }
                }
            }
        })
        .map_err(RpcError::failed)?;
    Ok(Reply::Stream(stream))
}
