//! Files that machines start from: read or made on this computer, and uploaded to the node that is
//! asked.

use anyhow::{Context, Result};
use bytes::Bytes;
use keel_api::Client;
use keel_kind_qemu::{ImageHeader, SIGNATURE_BYTES};
use keel_machine::kind::KindName;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use tokio::sync::mpsc;

/// Bytes that are sent at once.
const PIECE_BYTES: u64 = 1 << 20;

/// One that is whole.
pub(crate) struct ImageFile {
    /// Its path, or what it is.
    what: String,
    content: Content,
}

enum Content {
    Bytes(Bytes),
    /// One that may be larger than memory, and its hash.
    File(File, String),
}

impl ImageFile {
    /// # Errors
    /// If it cannot be read.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let read = std::fs::read(path);
        let bytes = read.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(ImageFile::made(&path.display().to_string(), bytes))
    }

    /// One that was made here, of which errors say what it is.
    pub(crate) fn made(what: &str, bytes: Vec<u8>) -> Self {
        ImageFile {
            what: what.to_owned(),
            content: Content::Bytes(bytes.into()),
        }
    }

    /// The image of a disk; returns what it is, and the size of the disk in bytes.
    ///
    /// # Errors
    /// If it cannot be read, or is no disk.
    pub(crate) fn disk(path: &Path) -> Result<(Self, ImageHeader, u64)> {
        let what = path.display().to_string();
        let (file, header, bytes) = disk(path).with_context(|| what.clone())?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file).with_context(|| what.clone())?;
        let hash = hasher.finalize().to_hex().to_string();
        let content = Content::File(file, hash);
        Ok((ImageFile { what, content }, header, bytes))
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::Bytes(bytes) => bytes,
            Content::File(..) => &[],
        }
    }

    /// The name by which nodes know it: its hash (BLAKE3, hex).
    pub(crate) fn hash(&self) -> String {
        match &self.content {
            Content::Bytes(bytes) => blake3::hash(bytes).to_hex().to_string(),
            Content::File(_, hash) => hash.clone(),
        }
    }

    /// # Errors
    /// If machines of this kind do not start from it, it has changed since, or no node answers.
    pub(crate) async fn upload(&self, client: &Client, kind: &KindName) -> Result<()> {
        let uploaded = match &self.content {
            Content::Bytes(bytes) => client.upload(kind, bytes.clone()).await,
            Content::File(file, _) => {
                let (send, pieces) = mpsc::channel(4);
                let file = file.try_clone().with_context(|| self.what.clone())?;
                let read = tokio::task::spawn_blocking(move || read_pieces(file, &send));
                let uploaded = client.upload_pieces(kind, pieces).await;
                read.await?.with_context(|| self.what.clone())?;
                uploaded
            }
        };
        let uploaded = uploaded.with_context(|| self.what.clone())?;
        let is_same = uploaded.hash == self.hash();
        anyhow::ensure!(is_same, "{} has changed while it was read", self.what);
        Ok(())
    }
}

/// The file of a disk, what it is, and the size of the disk in bytes.
fn disk(path: &Path) -> Result<(File, ImageHeader, u64)> {
    let mut file = File::open(path)?;
    let mut beginning = Vec::new();
    let header_bytes = SIGNATURE_BYTES as u64;
    (&file).take(header_bytes).read_to_end(&mut beginning)?;
    let header = ImageHeader::read(&beginning).map_err(anyhow::Error::msg)?;
    let bytes = match header.disk_bytes {
        Some(bytes) => bytes,
        None => file.seek(std::io::SeekFrom::End(0))?,
    };
    file.rewind()?;
    Ok((file, header, bytes))
}

/// Reads a file from its beginning, until its end or until nobody wants more.
fn read_pieces(mut file: File, pieces: &mpsc::Sender<Bytes>) -> std::io::Result<()> {
    file.rewind()?;
    loop {
        let mut piece = Vec::new();
        (&file).take(PIECE_BYTES).read_to_end(&mut piece)?;
        if piece.is_empty() || pieces.blocking_send(piece.into()).is_err() {
            return Ok(());
        }
    }
}
