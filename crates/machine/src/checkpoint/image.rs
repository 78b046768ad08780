//! Images in a repository: files that a machine uses wherever it runs, as the one that its own disk
//! began as a copy of. With them a repository brings a machine back although no node has its images
//! any more.
//!
//! An image is stored once, whichever machines and checkpoints need it:
//!
//! ```text
//!   images/HASH/N.lz4        4 MiB of the image, as an LZ4 block; those that are zeroes are left out
//!   images/HASH/index.json   its size, and which pieces there are
//! ```
//!
//! The index is written last, so an image exists as a whole or not at all. Its hash (BLAKE3) is
//! that of all its bytes: whoever reads it back checks that.

use super::collection::UNFINISHED_MS;
use super::repository::{Repository, RepositoryError, modified_unix_ms};
use futures::{StreamExt, TryStreamExt};
use keel_net::{Bytes, Fingerprint};
use keel_store::clock::unix_ms;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use tokio::sync::mpsc;

/// Bytes of an image in one object, before it is compressed.
const PIECE_BYTES: u64 = 4 << 20;
/// The largest index, in bytes: of an image of some 30 TiB.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Pieces that are read or written at the same time.
const REQUESTS: usize = 4;
/// How the names of pieces end.
const PIECE_SUFFIX: &str = ".lz4";
/// Name of the index among the objects of an image.
pub(super) const INDEX: &str = "index.json";

/// The stored form, JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    bytes: u64,
    /// Numbers of the pieces that are not zeroes, ascending.
    pieces: Vec<u32>,
}

impl Index {
    fn decode(text: &[u8]) -> Result<Self, &'static str> {
        let index: Index =
            serde_json::from_slice(text).map_err(|_| "its index cannot be decoded")?;
        let is_ascending = index.pieces.is_sorted_by(|a, b| a < b);
        let is_within = |last: &u32| u64::from(*last) < index.count();
        match is_ascending && index.pieces.last().is_none_or(is_within) {
            true => Ok(index),
            false => Err("its index names pieces that it cannot have"),
        }
    }

    /// How many pieces the image has, with those that are zeroes.
    fn count(&self) -> u64 {
        self.bytes.div_ceil(PIECE_BYTES)
    }
}

/// Whether a repository has an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptImage {
    /// It is there, and so young that nobody deletes it.
    Young,
    /// It is young now. Somebody may have begun to delete it before: look again with
    /// [`Repository::has_image`] once there is a checkpoint that needs it.
    Renewed,
    Absent,
}

/// An image that a repository has.
#[derive(Debug)]
pub struct StoredImage {
    repository: Repository,
    hash: Fingerprint,
    index: Index,
}

impl Repository {
    fn image_object(&self, hash: &Fingerprint, name: &str) -> Path {
        self.place.path(&["images", &hash.to_string(), name])
    }

    fn image_error(&self, hash: &Fingerprint, reason: impl ToString) -> RepositoryError {
        RepositoryError::Image {
            hash: *hash,
            url: self.url().to_owned(),
            reason: reason.to_string(),
        }
    }

    /// Whether an image is there, and stays. One that no checkpoint names yet may be deleted when it
    /// is old (`collection`), so it is made young.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn keep_image(&self, hash: &Fingerprint) -> Result<KeptImage, RepositoryError> {
        let place = self.image_object(hash, INDEX);
        match self.store().head(&place).await {
            Ok(meta) => {
                let age = unix_ms().saturating_sub(modified_unix_ms(&meta));
                if age < UNFINISHED_MS / 2 {
                    return Ok(KeptImage::Young);
                }
            }
            Err(object_store::Error::NotFound { .. }) => return Ok(KeptImage::Absent),
            Err(error) => return Err(error.into()),
        }
        match self.image(hash).await {
            Ok(Some(image)) if image.has_all_pieces().await? => {
                self.put_index(hash, &image.index).await?;
                Ok(KeptImage::Renewed)
            }
            Ok(_) | Err(RepositoryError::Image { .. }) => Ok(KeptImage::Absent),
            Err(error) => Err(error),
        }
    }

    /// Whether an image is there with all of its pieces.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub async fn has_image(&self, hash: &Fingerprint) -> Result<bool, RepositoryError> {
        match self.image(hash).await {
            Ok(Some(image)) => image.has_all_pieces().await,
            Ok(None) | Err(RepositoryError::Image { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Stores the image in a file; returns how many bytes that took. Pieces that an earlier attempt
    /// has stored stay.
    ///
    /// # Errors
    /// [`RepositoryError`]; also if the file cannot be read or has another content.
    pub async fn put_image(
        &self,
        hash: &Fingerprint,
        file: PathBuf,
    ) -> Result<u64, RepositoryError> {
        // A damaged file must not replace intact pieces.
        let (path, expected) = (file.clone(), *hash);
        let checked = tokio::task::spawn_blocking(move || check(&path, &expected)).await;
        let checked = checked.map_err(io::Error::other).flatten();
        checked.map_err(|error| self.image_error(hash, error))?;
        let there = self.image_pieces(hash).await?;
        let (send, pieces) = mpsc::channel(1);
        let read = tokio::task::spawn_blocking(move || read(&file, &there, &send));
        let pieces = futures::stream::unfold(pieces, |mut pieces| async {
            let piece: (u32, Vec<u8>) = pieces.recv().await?;
            Some((piece, pieces))
        });
        let stored = pieces
            .map(|(number, bytes)| async move {
                let (place, length) = (self.piece_place(hash, number), bytes.len() as u64);
                let put = self.store().put(&place, PutPayload::from(bytes)).await;
                put.map(|_| length)
            })
            .buffer_unordered(REQUESTS)
            .try_fold(0, |sum, bytes| async move { Ok(sum + bytes) })
            .await?;
        let index = read.await.map_err(io::Error::other).flatten();
        let index = index.map_err(|error| self.image_error(hash, error))?;
        Ok(stored + self.put_index(hash, &index).await?)
    }

    /// The numbers of an image's pieces that are there.
    async fn image_pieces(&self, hash: &Fingerprint) -> Result<BTreeSet<u32>, RepositoryError> {
        let folder = self.place.path(&["images", &hash.to_string()]);
        let objects = self.store().list(Some(&folder));
        let numbers = objects.try_filter_map(|object| async move {
            let name = object.location.filename().unwrap_or_default();
            let number = name.strip_suffix(PIECE_SUFFIX);
            Ok(number.and_then(|number| number.parse::<u32>().ok()))
        });
        Ok(numbers.try_collect().await?)
    }

    async fn put_index(&self, hash: &Fingerprint, index: &Index) -> Result<u64, RepositoryError> {
        let text = serde_json::to_vec(index).map_err(|error| self.image_error(hash, error))?;
        let bytes = text.len() as u64;
        let place = self.image_object(hash, INDEX);
        self.store().put(&place, PutPayload::from(text)).await?;
        Ok(bytes)
    }

    fn piece_place(&self, hash: &Fingerprint, number: u32) -> Path {
        self.image_object(hash, &format!("{number}{PIECE_SUFFIX}"))
    }

    /// An image; `None` if it is not there.
    ///
    /// # Errors
    /// [`RepositoryError`]; also if its index is damaged.
    pub async fn image(&self, hash: &Fingerprint) -> Result<Option<StoredImage>, RepositoryError> {
        let place = self.image_object(hash, INDEX);
        let text = match self.place.read_at_most(&place, INDEX_BYTES_MAX).await {
            Ok(text) => text,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let index = Index::decode(&text).map_err(|reason| self.image_error(hash, reason))?;
        Ok(Some(StoredImage {
            repository: self.clone(),
            hash: *hash,
            index,
        }))
    }
}

impl StoredImage {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.index.bytes
    }

    /// Its bytes in order, piece by piece. Their hash is not checked.
    pub fn pieces(
        &self,
    ) -> impl futures::Stream<Item = Result<Bytes, RepositoryError>> + Send + Unpin + '_ {
        let pieces = futures::stream::iter(0..self.index.count());
        let pieces = pieces.map(|number| self.piece(number));
        Box::pin(pieces.buffered(REQUESTS))
    }

    async fn piece(&self, number: u64) -> Result<Bytes, RepositoryError> {
        let begin = number * PIECE_BYTES;
        let mut bytes = vec![0; (self.index.bytes - begin).min(PIECE_BYTES) as usize];
        let number = u32::try_from(number).ok();
        let Some(number) = number.filter(|it| self.index.pieces.binary_search(it).is_ok()) else {
            return Ok(bytes.into());
        };
        let damaged = |reason: &str| {
            let reason = format!("piece {number} {reason}");
            self.repository.image_error(&self.hash, reason)
        };
        let place = self.repository.piece_place(&self.hash, number);
        let most = lz4_flex::block::get_maximum_output_size(bytes.len()) as u64;
        let stored = match self.repository.place.read_at_most(&place, most).await {
            Ok(stored) => stored,
            Err(object_store::Error::NotFound { .. }) => return Err(damaged("is missing")),
            Err(error) => return Err(error.into()),
        };
        match lz4_flex::block::decompress_into(&stored, &mut bytes) {
            Ok(length) if length == bytes.len() => Ok(bytes.into()),
            _ => Err(damaged("is damaged")),
        }
    }

    /// Whether nobody has deleted a piece of it.
    async fn has_all_pieces(&self) -> Result<bool, RepositoryError> {
        let there = self.repository.image_pieces(&self.hash).await?;
        Ok(self.index.pieces.iter().all(|piece| there.contains(piece)))
    }
}

/// Checks that a file is the image of this hash. Blocking.
fn check(file: &std::path::Path, hash: &Fingerprint) -> io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(file)?)?;
    match Fingerprint(*hasher.finalize().as_bytes()) == *hash {
        true => Ok(()),
        false => Err(io::Error::other("its file on the node is damaged")),
    }
}

/// Reads an image and passes on its pieces, compressed, but for those that are `there` and those that
/// are zeroes. Blocking.
fn read(
    file: &std::path::Path,
    there: &BTreeSet<u32>,
    pieces: &mpsc::Sender<(u32, Vec<u8>)>,
) -> io::Result<Index> {
    let mut file = File::open(file)?;
    let mut index = Index {
        bytes: 0,
        pieces: Vec::new(),
    };
    let mut piece = Vec::with_capacity(PIECE_BYTES as usize);
    loop {
        piece.clear();
        let length = (&mut file).take(PIECE_BYTES).read_to_end(&mut piece)?;
        if length == 0 {
            return Ok(index);
        }
        let number = u32::try_from(index.bytes / PIECE_BYTES)
            .map_err(|_| io::Error::other("it is too large"))?;
        index.bytes += length as u64;
        if piece.iter().all(|byte| *byte == 0) {
            continue;
        }
        index.pieces.push(number);
        if there.contains(&number) {
            continue;
        }
        let compressed = lz4_flex::block::compress(&piece);
        if pieces.blocking_send((number, compressed)).is_err() {
            return Err(io::Error::other("it cannot be stored"));
        }
    }
}

/// Whether bytes are the index of an image, for fuzzing.
pub fn is_image_index(bytes: &[u8]) -> bool {
    Index::decode(bytes).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: usize = PIECE_BYTES as usize;

    struct Place {
        folder: tempfile::TempDir,
        repository: Repository,
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let url = folder.path().join("place").display().to_string();
            let repository = Repository::create(&url).unwrap();
            Place { folder, repository }
        }

        /// A file with this content, and its hash.
        fn file(&self, content: &[u8]) -> (PathBuf, Fingerprint) {
            let path = self.folder.path().join("image");
            std::fs::write(&path, content).unwrap();
            (path, Fingerprint(*blake3::hash(content).as_bytes()))
        }

        fn object(&self, hash: &Fingerprint, name: &str) -> PathBuf {
            let place = self.folder.path().join("place/images");
            place.join(hash.to_string()).join(name)
        }

        async fn content(&self, hash: &Fingerprint) -> Result<Vec<u8>, RepositoryError> {
            let image = self.repository.image(hash).await?.unwrap();
            let pieces = image.pieces().try_collect::<Vec<_>>().await?;
            Ok(pieces.concat())
        }
    }

    /// Two pieces with a hole of one between them, and the beginning of a fourth.
    fn example() -> Vec<u8> {
        let mut content = vec![1; PIECE];
        content.resize(2 * PIECE, 0);
        content.extend((0..PIECE).map(|at| (at * at % 251) as u8));
        content.extend([7; 1000]);
        content
    }

    #[tokio::test]
    async fn an_image_is_stored_once_without_its_zeroes() {
        let place = Place::new();
        for content in [example(), vec![0; PIECE + 1], Vec::new(), vec![9]] {
            let (file, hash) = place.file(&content);
            let kept = place.repository.keep_image(&hash).await.unwrap();
            assert_eq!(kept, KeptImage::Absent);
            let stored = place.repository.put_image(&hash, file.clone()).await;
            assert!(stored.unwrap() > 0);
            assert!(place.content(&hash).await.unwrap() == content);
            assert!(place.repository.has_image(&hash).await.unwrap());
            let kept = place.repository.keep_image(&hash).await.unwrap();
            assert_eq!(kept, KeptImage::Young);
        }
        let (_, hash) = place.file(&example());
        assert!(!place.object(&hash, "1.lz4").exists());
        assert!(place.object(&hash, "3.lz4").exists());
    }

    #[tokio::test]
    async fn a_file_with_another_content_makes_no_image() {
        let place = Place::new();
        let (_, hash) = place.file(&example());
        let (file, _) = place.file(b"something else");
        let refused = place.repository.put_image(&hash, file).await.unwrap_err();
        assert!(refused.to_string().contains("is damaged"), "{refused}");
        let gone = place.folder.path().join("gone");
        let refused = place.repository.put_image(&hash, gone).await.unwrap_err();
        assert!(refused.to_string().contains("No such file"), "{refused}");
        assert!(place.repository.image(&hash).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn an_old_image_is_young_again_when_it_is_put_and_whole_if_it_was_not() {
        let place = Place::new();
        let (file, hash) = place.file(&example());
        let (index, piece) = (place.object(&hash, INDEX), place.object(&hash, "2.lz4"));
        let make_old = || {
            let old = std::time::Duration::from_millis(UNFINISHED_MS);
            let index = File::options().write(true).open(&index).unwrap();
            let then = std::time::SystemTime::now() - old;
            index.set_modified(then).unwrap();
        };
        let put = async || place.repository.put_image(&hash, file.clone()).await;
        let keep = async || place.repository.keep_image(&hash).await.unwrap();
        let all = put().await.unwrap();
        make_old();
        assert_eq!(keep().await, KeptImage::Renewed);
        assert_eq!(keep().await, KeptImage::Young);
        make_old();
        std::fs::remove_file(&piece).unwrap();
        assert!(!place.repository.has_image(&hash).await.unwrap());
        assert_eq!(keep().await, KeptImage::Absent);
        // Only what is missing is stored.
        assert!(put().await.unwrap() < all);
        assert!(place.content(&hash).await.unwrap() == example());
        std::fs::write(&index, b"{}").unwrap();
        make_old();
        assert_eq!(keep().await, KeptImage::Absent);
        put().await.unwrap();
        assert!(place.content(&hash).await.unwrap() == example());
    }

    #[tokio::test]
    async fn damage_is_named() {
        let place = Place::new();
        let (file, hash) = place.file(&example());
        place.repository.put_image(&hash, file).await.unwrap();
        let piece = place.object(&hash, "2.lz4");
        let whole = std::fs::read(&piece).unwrap();
        let said = async || place.content(&hash).await.unwrap_err().to_string();
        for damaged in [
            &whole[..whole.len() / 2],
            b"",
            &[whole.as_slice(), b"x"].concat(),
        ] {
            std::fs::write(&piece, damaged).unwrap();
            let said = said().await;
            assert!(said.contains("piece 2 is damaged"), "{said}");
        }
        std::fs::write(&piece, vec![0; 2 * PIECE]).unwrap();
        assert!(said().await.contains("bytes"));
        std::fs::remove_file(&piece).unwrap();
        assert!(said().await.contains("piece 2 is missing"));
        for index in [
            "{}",
            r#"{"bytes":1,"pieces":[1]}"#,
            r#"{"bytes":99999999,"pieces":[1,1]}"#,
            r#"{"bytes":99999999,"pieces":[2,1]}"#,
        ] {
            std::fs::write(place.object(&hash, INDEX), index).unwrap();
            let refused = place.repository.image(&hash).await.unwrap_err().to_string();
            assert!(refused.contains("its index"), "{refused}");
        }
    }
}
