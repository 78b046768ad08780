//! The files of images and programs on this node: what users upload, and what is fetched from other
//! nodes.

use super::writer::{self, ImageWriter, WrittenImage};
use crate::context::Context;
use crate::error::CommandError;
use crate::processes::PROMPT;
use crate::state_dir::is_hash;
use futures::{Stream, StreamExt};
use keel_cluster::NodeName;
use keel_machine::checkpoint::RepositoryError;
use keel_machine::kind::{IMAGE_BEGINNING_BYTES, KindName};
use keel_machine::worker::control::pack;
use keel_net::{Bytes, Fingerprint, Reply, RpcError};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;

/// Request between agents: `(is program, hash)` → stream of the file's pieces.
pub(crate) const FETCH: u16 = 0x0302;

/// Bytes of a file in one piece.
const PIECE_BYTES: usize = 1 << 20;

/// How long the next piece of a file may take to arrive.
const PIECE_PATIENCE: Duration = PROMPT.saturating_mul(6);

/// The images of this node, and access to those of others.
pub(crate) struct Images {
    pub(super) context: Arc<Context>,
    /// Held while a file is made newer, or is removed because it is old.
    pub(super) ages: Arc<Mutex<()>>,
    /// Held while an image is read from a repository.
    pub(super) reading: tokio::sync::Mutex<()>,
    /// Why images are not here that this node is to keep, by hash.
    problems: Mutex<BTreeMap<String, String>>,
}

impl Images {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        let folders = [context.dir.images(), context.dir.programs()];
        for folder in folders {
            if let Err(error) = writer::remove_unfinished(&folder) {
                tracing::warn!(%error, "unfinished files stay in {}", folder.display());
            }
        }
        Images {
            context,
            ages: Arc::default(),
            reading: tokio::sync::Mutex::default(),
            problems: Mutex::default(),
        }
    }

    pub(super) fn lock_problems(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the age of a file 0; false if it is not here, or that cannot be told.
    pub(super) async fn keep_longer(&self, path: &Path) -> bool {
        let (ages, path) = (self.ages.clone(), path.to_owned());
        let kept = tokio::task::spawn_blocking(move || renew(&ages, &path, SystemTime::now()));
        kept.await.is_ok_and(|renewed| renewed.is_ok())
    }

    /// The file of an image, which may not be here.
    ///
    /// # Errors
    /// If that is no hash.
    pub(super) fn image_path(&self, hash: &str) -> Result<PathBuf, ImageError> {
        match is_hash(hash) {
            true => Ok(self.context.dir.image(hash)),
            false => Err(ImageError::NoHash(hash.to_owned())),
        }
    }

    /// Stores an image that a user uploads, for machines of a kind or of any; returns its hash.
    ///
    /// # Errors
    /// [`CommandError`] if no machine starts from it, it is too large, the upload is cut off, or
    /// it cannot be written. Nothing is kept then.
    pub(crate) async fn upload<E: fmt::Display>(
        &self,
        kind: Option<&KindName>,
        pieces: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<String, CommandError> {
        let mut pieces = std::pin::pin!(pieces);
        let stored = self.store_upload(kind, &mut pieces).await;
        if stored.is_err() {
            // A client reads the answer once it has sent everything.
            while let Some(Ok(_)) = pieces.next().await {}
        }
        stored
    }

    async fn store_upload<E: fmt::Display>(
        &self,
        kind: Option<&KindName>,
        pieces: &mut (impl Stream<Item = Result<Bytes, E>> + Unpin),
    ) -> Result<String, CommandError> {
        let writer = ImageWriter::new(&self.context.dir.images());
        let mut beginning = Vec::new();
        let mut received = 0;
        // Known once enough has arrived to see what it is.
        let mut bytes_max = None;
        loop {
            let piece = pieces.next().await.transpose();
            let piece = piece.map_err(|error| {
                CommandError::Invalid(format!("the upload was cut off: {error}"))
            })?;
            if bytes_max.is_none() {
                let rest = IMAGE_BEGINNING_BYTES - beginning.len();
                let seen = piece.as_deref().unwrap_or_default();
                beginning.extend_from_slice(&seen[..seen.len().min(rest)]);
                if piece.is_none() || beginning.len() == IMAGE_BEGINNING_BYTES {
                    let checked = self.context.kinds.check_image(kind, &beginning);
                    bytes_max = Some(checked.map_err(CommandError::Invalid)?);
                }
            }
            let Some(piece) = piece else { break };
            received += piece.len() as u64;
            if let Some(most) = bytes_max.filter(|most| received > *most) {
                return Err(CommandError::Invalid(format!(
                    "the image has more than {most} bytes, the most that machines of its kind start from"
                )));
            }
            if !writer.add(piece).await {
                break;
            }
        }
        let image = writer.finish().await.map_err(CommandError::Unavailable)?;
        let hash = image.hash.clone();
        let path = self.context.dir.image(&hash);
        let kept = self.keep_file(image, path).await;
        kept.map_err(CommandError::Unavailable)?;
        Ok(hash)
    }

    /// Sends an image to another node.
    ///
    /// # Errors
    /// [`RpcError`] if that is not a hash, or the image is not here.
    pub(crate) async fn send(&self, is_program: bool, hash: &str) -> Result<Reply, RpcError> {
        if !is_hash(hash) {
            return Err(RpcError::refused("that is no hash of an image"));
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

    /// The file of an image, fetched from any node that has it if necessary. It stays here for a
    /// while even if nothing needs it.
    ///
    /// # Errors
    /// If no node has it, or it cannot be written.
    pub(crate) async fn find_image(&self, hash: &str) -> Result<PathBuf, ImageError> {
        self.find_image_at(hash, []).await
    }

    /// As [`Self::find_image`]; these nodes are asked first.
    pub(super) async fn find_image_at(
        &self,
        hash: &str,
        first: impl IntoIterator<Item = NodeName>,
    ) -> Result<PathBuf, ImageError> {
        let path = self.image_path(hash)?;
        if self.keep_longer(&path).await {
            return Ok(path);
        }
        let mut asked = BTreeSet::from([self.context.name.clone()]);
        let all = self.context.members.all();
        for node in first.into_iter().chain(all.keys().cloned()) {
            if !asked.insert(node.clone()) {
                continue;
            }
            match self.fetch(&node, false, hash, &path).await {
                Ok(()) => return Ok(path),
                Err(FetchError::Here(error)) => return Err(ImageError::Unwritten(error)),
                Err(FetchError::There(error)) => {
                    tracing::info!(%node, error, "cannot fetch an image from the node");
                }
            }
        }
        Err(ImageError::Nowhere(hash.to_owned()))
    }

    /// Fetches a file from a node and stores it, if it matches its hash.
    async fn fetch(
        &self,
        node: &NodeName,
        is_program: bool,
        hash: &str,
        path: &Path,
    ) -> Result<(), FetchError> {
        let there = |error: &dyn fmt::Display| FetchError::There(error.to_string());
        let question = pack(&(is_program, hash.to_owned())).map_err(|error| there(&error))?;
        let stream = self.context.peers.bulk_stream(node, FETCH, question);
        let stream = tokio::time::timeout(PIECE_PATIENCE, stream).await;
        let stream = stream.map_err(|_| there(&"the node does not answer"))?;
        let mut stream = stream.map_err(|error| there(&error))?;
        let folder = path.parent().unwrap_or(path);
        let writer = ImageWriter::new(folder);
        let mut received = 0;
        loop {
            let next = tokio::time::timeout(PIECE_PATIENCE, stream.recv()).await;
            let next = next.map_err(|_| there(&"the node sends nothing any more"))?;
            let Some(piece) = next else { break };
            let piece = piece.map_err(|error| there(&error))?;
            received += piece.len() as u64;
            if received > self.context.kinds.file_bytes_max() {
                return Err(there(&"the file is too large"));
            }
            if !writer.add(piece).await {
                break;
            }
        }
        let image = writer.finish().await.map_err(FetchError::Here)?;
        if image.hash != hash {
            return Err(there(&"the file does not match its hash"));
        }
        let kept = self.keep_file(image, path.to_owned()).await;
        kept.map_err(FetchError::Here)
    }

    /// Gives a whole image its name.
    pub(super) async fn keep_file(&self, image: WrittenImage, path: PathBuf) -> Result<(), String> {
        let ages = self.ages.clone();
        let kept = tokio::task::spawn_blocking(move || {
            // What is there now may be about to be removed.
            let _held = ages.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = image.keep(&path);
            kept.map_err(|error| format!("{}: {error}", path.display()))
        });
        kept.await.map_err(|error| error.to_string()).flatten()
    }
}

/// Makes the age of a file 0.
pub(super) fn renew(ages: &Mutex<()>, path: &Path, now: SystemTime) -> io::Result<()> {
    let _held = ages.lock().unwrap_or_else(PoisonError::into_inner);
    File::open(path)?.set_modified(now)
}

/// Why there is no file of an image here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("{0:?} is no hash of an image")]
    NoHash(String),
    #[error("no node that answers has image {0}; run it again with its file")]
    Nowhere(String),
    /// It cannot be written.
    #[error("{0}")]
    Unwritten(String),
    /// No node has it, and it cannot be read from where the machine's checkpoint is.
    #[error(transparent)]
    Repository(RepositoryError),
}

impl From<ImageError> for CommandError {
    fn from(error: ImageError) -> Self {
        let text = error.to_string();
        match error {
            ImageError::NoHash(_) => CommandError::Invalid(text),
            ImageError::Nowhere(_) => CommandError::NotFound(text),
            ImageError::Unwritten(_) | ImageError::Repository(_) => CommandError::Unavailable(text),
        }
    }
}

impl From<ImageError> for String {
    fn from(error: ImageError) -> Self {
        error.to_string()
    }
}

/// Why a file was not fetched.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    /// Another node may have it.
    #[error("{0}")]
    There(String),
    /// It cannot be written, whoever sends it.
    #[error("{0}")]
    Here(String),
}

/// Whether the file exists; on an error it is fetched.
pub(super) async fn is_there(path: &Path) -> bool {
    tokio::fs::try_exists(path).await.unwrap_or_default()
}

/// Sends a file in pieces to another node, which checks that it is whole.
pub(crate) async fn send_file(path: PathBuf) -> Result<Reply, RpcError> {
    let opened = tokio::task::spawn_blocking(move || File::open(path));
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
