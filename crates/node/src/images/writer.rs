//! Writes an image while its pieces arrive: to a file beside its place, which gets its name once it
//! is whole. An image is never in memory as a whole, for a disk of a virtual machine has many
//! gigabytes.

use bytes::Bytes;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// How the names of files begin that are not whole.
const UNFINISHED: &str = ".unfinished-";

/// Bytes of zeroes that take no room: whole blocks of any file system.
const HOLE_BYTES: usize = 64 << 10;

/// Pieces that wait for the disk.
const QUEUE: usize = 4;

/// An image that is being written, on a thread of its own. Dropped before the end, it leaves
/// nothing.
pub(super) struct ImageWriter {
    pieces: mpsc::Sender<Bytes>,
    written: JoinHandle<io::Result<WrittenImage>>,
    folder: PathBuf,
}

/// A whole image, which has no name yet.
pub(super) struct WrittenImage {
    file: NamedTempFile,
    /// BLAKE3, hex.
    pub(super) hash: String,
}

impl ImageWriter {
    /// Begins an image in a folder.
    pub(super) fn new(folder: &Path) -> Self {
        let (pieces, arriving) = mpsc::channel(QUEUE);
        let place = folder.to_owned();
        ImageWriter {
            pieces,
            written: tokio::task::spawn_blocking(move || write(&place, arriving)),
            folder: folder.to_owned(),
        }
    }

    /// Adds a piece; false once it cannot be written, and [`Self::finish`] says why.
    pub(super) async fn add(&self, piece: Bytes) -> bool {
        self.pieces.send(piece).await.is_ok()
    }

    /// Waits until the whole image is on disk.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) async fn finish(self) -> Result<WrittenImage, String> {
        let ImageWriter {
            pieces,
            written,
            folder,
        } = self;
        drop(pieces);
        let written = written.await.map_err(io::Error::other).flatten();
        written.map_err(|error| format!("a file in {}: {error}", folder.display()))
    }
}

fn write(folder: &Path, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<WrittenImage> {
    let mut file = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder)?;
    let mut hasher = blake3::Hasher::new();
    while let Some(piece) = pieces.blocking_recv() {
        hasher.update(&piece);
        write_sparse(file.as_file_mut(), &piece)?;
    }
    // What ends in a hole is as long as it was.
    let length = file.stream_position()?;
    file.as_file().set_len(length)?;
    file.as_file().sync_all()?;
    let hash = hasher.finalize().to_hex().to_string();
    Ok(WrittenImage { file, hash })
}

/// Leaves zeroes out: raw images of disks are full of them.
fn write_sparse(file: &mut File, piece: &[u8]) -> io::Result<()> {
    for block in piece.chunks(HOLE_BYTES) {
        match block.iter().all(|byte| *byte == 0) {
            true => _ = file.seek(SeekFrom::Current(block.len() as i64))?,
            false => file.write_all(block)?,
        }
    }
    Ok(())
}

impl WrittenImage {
    /// Gives it its name, for good: it survives a loss of power. Blocks.
    ///
    /// # Errors
    /// If the file cannot be renamed.
    pub(super) fn keep(self, path: &Path) -> io::Result<()> {
        self.file.persist(path).map_err(|error| error.error)?;
        match path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }
}

/// Removes what earlier agents left unfinished. Blocks.
pub(super) fn remove_unfinished(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(UNFINISHED.as_bytes())
        {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    #[tokio::test]
    async fn an_image_gets_its_name_once_it_is_whole_and_otherwise_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let writer = ImageWriter::new(folder.path());
        assert!(writer.add(Bytes::from_static(b"a ")).await);
        assert!(writer.add(Bytes::from_static(b"disk")).await);
        let image = writer.finish().await.unwrap();
        assert_eq!(image.hash, blake3::hash(b"a disk").to_hex().as_str());
        let path = folder.path().join(&image.hash);
        image.keep(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"a disk");
        assert_eq!(names(folder.path()).len(), 1);

        let writer = ImageWriter::new(folder.path());
        assert!(writer.add(Bytes::from_static(b"cut off")).await);
        drop(writer.finish().await.unwrap());
        assert_eq!(names(folder.path()).len(), 1);
    }

    #[tokio::test]
    async fn zeroes_take_no_room() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let writer = ImageWriter::new(folder.path());
        let mut whole = Vec::new();
        // One piece ends in the middle of a block, and the image in a hole.
        for (bytes, filler) in [(100, 1), (3 << 20, 0), (70_000, 2), (5 << 20, 0)] {
            let piece = vec![filler; bytes];
            whole.extend_from_slice(&piece);
            assert!(writer.add(piece.into()).await);
        }
        let image = writer.finish().await.unwrap();
        assert_eq!(image.hash, blake3::hash(&whole).to_hex().as_str());
        let path = folder.path().join("image");
        image.keep(&path).unwrap();
        assert!(std::fs::read(&path).unwrap() == whole);
        let occupied = path.metadata().unwrap().blocks() * 512;
        assert!(occupied < 1 << 20, "{occupied}");
    }

    #[tokio::test]
    async fn a_folder_that_is_gone_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("images");
        let writer = ImageWriter::new(&gone);
        // It may be taken before the thread sees that the folder is gone.
        let _ = writer.add(Bytes::from_static(b"a")).await;
        let refused = writer.finish().await.err().unwrap();
        assert!(refused.contains("images"), "{refused}");
    }

    #[test]
    fn what_an_agent_left_unfinished_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let left = format!("{UNFINISHED}x");
        for name in [&left, "whole"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        remove_unfinished(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["whole"]);
    }
}
