//! Files that machines start from: read or made on this computer, and uploaded to the node that is
//! asked unless the cluster has them; and `keel image`, which gives those of disks a name.

use crate::cluster::Reach;
use crate::input;
use crate::output;
use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use hyper::Method;
use keel_api::{Client, ClientError, ImageInfo, ImageRequest, Nothing, Uploaded};
use keel_cluster::MachineName;
use keel_kind_qemu::{DiskFormat, ImageHeader, QemuKind, SIGNATURE_BYTES};
use keel_machine::kind::KindName;
use serde::Deserialize;
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Bytes that are sent at once. A file of fewer is uploaded without a question whether the cluster
/// has it.
const PIECE_BYTES: u64 = 1 << 20;

/// Pause before it is looked again whether nodes have an image: first, and at most.
const LOOK_AFTER: Duration = Duration::from_millis(100);
const LOOK_AFTER_MAX: Duration = Duration::from_secs(2);
/// How long it is waited for nodes that all say why they lack it.
const STUCK_PATIENCE: Duration = Duration::from_secs(30);

#[derive(clap::Subcommand)]
pub(crate) enum ImageCommand {
    /// Uploads the image of a disk (qcow2 or raw), and gives it a name; waits until two nodes have
    /// it, if there are so many.
    Import {
        /// The image.
        file: PathBuf,
        /// Its name (default: that of the file).
        #[arg(long)]
        name: Option<String>,
        /// Takes the name from the image that has it; machines made from that one keep it.
        #[arg(long)]
        replace: bool,
    },
    /// Lists the images that have a name, with the nodes that keep them.
    Ls,
    /// Takes names away. The images go a day after the last machine that needs them.
    Rm {
        /// The names.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// An image of a disk in a command or a machine file: the name of one, or else a file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub(crate) enum ImageArg {
    Name(MachineName),
    File(PathBuf),
}

impl From<String> for ImageArg {
    fn from(text: String) -> Self {
        match MachineName::new(&text) {
            Ok(name) => ImageArg::Name(name),
            Err(_) => ImageArg::File(text.into()),
        }
    }
}

impl FromStr for ImageArg {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.to_owned().into())
    }
}

impl ImageArg {
    /// The same in a file of this folder.
    pub(crate) fn beside(self, folder: &Path) -> Self {
        match self {
            ImageArg::Name(name) => ImageArg::Name(name),
            ImageArg::File(path) => ImageArg::File(folder.join(path)),
        }
    }
}

/// The disk in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageDisk {
    /// Hash of the image (BLAKE3, hex).
    pub(crate) hash: String,
    pub(crate) format: DiskFormat,
    /// Its size in bytes.
    pub(crate) bytes: u64,
}

/// The disk in the image of a name.
///
/// # Errors
/// If there is none.
pub(crate) async fn named_disk(client: &Client, name: &MachineName) -> Result<ImageDisk> {
    let found = client.get(&keel_api::path(["images", name.as_str()])).await;
    let image: ImageInfo =
        found.map_err(|error| anyhow!("{error}; a file of this name is ./{name}"))?;
    let formats = [DiskFormat::Qcow2, DiskFormat::Raw];
    let mut formats = formats.into_iter();
    let format = formats.find(|format| format.word() == image.format);
    Ok(ImageDisk {
        hash: image.hash,
        format: format.with_context(|| {
            format!(
                "image {name} is {}: this keel is too old for it",
                image.format
            )
        })?,
        bytes: image.disk_bytes,
    })
}

pub(crate) async fn run(reach: &Reach, command: ImageCommand) -> Result<ExitCode> {
    let client = reach.client()?;
    match command {
        ImageCommand::Import {
            file,
            name,
            replace,
        } => {
            let name = match name {
                Some(name) => name,
                None => name_of(&file)?,
            };
            let made = import(&client, &file, &name, replace).await?;
            output::one(reach.format(), &made, &made.name, |made| {
                let nodes = made.keepers.iter().map(|copy| copy.node.as_str());
                format!("{} on {}", made.name, nodes.collect::<Vec<_>>().join(", "))
            })?;
        }
        ImageCommand::Ls => {
            let found: Vec<ImageInfo> = client.get("/v1/images").await?;
            output::list(
                reach.format(),
                &found,
                &[
                    "image", "format", "file", "disk", "nodes", "machines", "age", "hash",
                ],
                |image| image.name.clone(),
                row,
            )?;
        }
        ImageCommand::Rm { names } => {
            for name in names {
                let path = keel_api::path(["images", &name]);
                let _: Nothing = client.call(Method::DELETE, &path, Bytes::new()).await?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(image: &ImageInfo) -> Vec<String> {
    let nodes = image.keepers.iter().map(|copy| match copy.is_there {
        true => copy.node.clone(),
        false => format!("({})", copy.node),
    });
    vec![
        image.name.clone(),
        image.format.clone(),
        output::bytes(image.file_bytes),
        output::bytes(image.disk_bytes),
        nodes.collect::<Vec<_>>().join(", "),
        image.machines.len().to_string(),
        output::ago(image.created_unix_ms),
        image.hash.chars().take(12).collect(),
    ]
}

/// The name of an image that a file has.
fn name_of(file: &Path) -> Result<String> {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let name = MachineName::new(&stem).map_err(anyhow::Error::msg);
    let name =
        name.with_context(|| format!("{} is no name for an image: give it one with --name", stem))?;
    Ok(name.to_string())
}

async fn import(client: &Client, path: &Path, name: &str, replace: bool) -> Result<ImageInfo> {
    let (file, disk) = ImageFile::disk(path)?;
    let at = keel_api::path(["images", name]);
    let before: Result<ImageInfo, ClientError> = client.get(&at).await;
    if let Ok(before) = &before {
        // Before it is uploaded for nothing.
        ensure!(
            replace || before.hash == disk.hash,
            "{name:?} is the name of another image (--replace gives it this one; machines that were made from that one keep it)"
        );
    }
    let kind = QemuKind::kind_name();
    file.upload(client, &kind).await?;
    let request = ImageRequest {
        kind,
        hash: disk.hash,
        replace,
    };
    let image: ImageInfo = client.put(&at, &request).await?;
    wait_for_copies(client, &at, image).await
}

/// Waits until all nodes that are to keep an image have it.
async fn wait_for_copies(client: &Client, at: &str, mut image: ImageInfo) -> Result<ImageInfo> {
    let hash = image.hash.clone();
    let mut pause = LOOK_AFTER;
    // Since when each node that lacks it says why.
    let mut stuck_since = None;
    loop {
        let missing = image.keepers.iter().filter(|copy| !copy.is_there);
        let missing: Vec<_> = missing.collect();
        if missing.is_empty() && !image.keepers.is_empty() {
            return Ok(image);
        }
        let problems = missing.iter().map(|copy| {
            let problem = copy.problem.as_ref()?;
            Some(format!("{}: {problem}", copy.node))
        });
        match problems.collect::<Option<Vec<_>>>() {
            None => stuck_since = None,
            Some(problems) => ensure!(
                stuck_since.get_or_insert_with(Instant::now).elapsed() < STUCK_PATIENCE,
                "the image has its name, but is not on all nodes yet that are to keep it: {}",
                problems.join("; ")
            ),
        }
        tokio::time::sleep(pause).await;
        pause = LOOK_AFTER_MAX.min(pause * 2);
        match client.get::<ImageInfo>(at).await {
            Ok(now) => image = now,
            // The store may have a new leader.
            Err(ClientError::Problem { status: 503, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(
            image.hash == hash,
            "others have given the name to another image meanwhile"
        );
    }
}

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
        let read = input::read(path, input::IMAGE_BYTES_MAX);
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

    /// The image of a disk, and the disk in it.
    ///
    /// # Errors
    /// If it cannot be read, or is no disk.
    pub(crate) fn disk(path: &Path) -> Result<(Self, ImageDisk)> {
        let what = path.display().to_string();
        let (file, disk) = disk(path).with_context(|| what.clone())?;
        let content = Content::File(file, disk.hash.clone());
        Ok((ImageFile { what, content }, disk))
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

    fn is_large(&self) -> bool {
        match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64 > PIECE_BYTES,
            Content::File(..) => true,
        }
    }

    /// Uploads it, unless the cluster has it.
    ///
    /// # Errors
    /// If machines of this kind do not start from it, it has changed since, or no node answers.
    pub(crate) async fn upload(&self, client: &Client, kind: &KindName) -> Result<()> {
        if self.is_large() {
            // Otherwise the answer to the upload says what is wrong. (A node of an earlier version
            // does not know the question.)
            if known(client, kind, &self.hash()).await.is_ok() {
                return Ok(());
            }
        }
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

/// Asks the cluster for an image from which machines of a kind start.
///
/// # Errors
/// If it has none of this hash, or no node answers.
pub(crate) async fn known(
    client: &Client,
    kind: &KindName,
    hash: &str,
) -> Result<Uploaded, ClientError> {
    let path = keel_api::path(["image-files", hash]);
    client.get(&format!("{path}?kind={kind}")).await
}

/// A file, and the disk in it.
fn disk(path: &Path) -> Result<(File, ImageDisk)> {
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
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&file)?;
    let disk = ImageDisk {
        hash: hasher.finalize().to_hex().to_string(),
        format: header.format,
        bytes,
    };
    Ok((file, disk))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_a_name_or_else_a_file() {
        let is_name = |text: &str| matches!(ImageArg::from(text.to_owned()), ImageArg::Name(_));
        assert!(is_name("debian"));
        assert!(is_name("debian-12"));
        for file in ["debian.qcow2", "./debian", "/images/debian", "My_Disk", ""] {
            assert!(!is_name(file), "{file}");
        }
        let beside = |text: &str| ImageArg::from(text.to_owned()).beside(Path::new("/etc"));
        assert_eq!(beside("a.raw"), ImageArg::File("/etc/a.raw".into()));
        assert_eq!(beside("./a"), ImageArg::File("/etc/./a".into()));
        assert_eq!(beside("a"), ImageArg::from("a".to_owned()));
    }

    #[test]
    fn a_disk_is_known_by_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut image = vec![0; 1000];
        image[510..512].copy_from_slice(b"\x55\xaa");
        std::fs::write(&path, &image).unwrap();
        let (file, disk) = ImageFile::disk(&path).unwrap();
        assert_eq!(disk.hash, blake3::hash(&image).to_hex().as_str());
        assert_eq!((disk.format, disk.bytes), (DiskFormat::Raw, 1000));
        assert_eq!(file.hash(), disk.hash);
        std::fs::write(&path, b"no disk").unwrap();
        let refused = format!("{:#}", ImageFile::disk(&path).err().unwrap());
        assert!(refused.contains("image: that is no disk"), "{refused}");
    }

    #[test]
    fn a_file_whose_name_is_none_for_an_image_is_given_one() {
        assert_eq!(
            name_of(Path::new("/a/debian-12.qcow2")).unwrap(),
            "debian-12"
        );
        let refused = format!("{:#}", name_of(Path::new("/a/Debian.qcow2")).unwrap_err());
        assert!(refused.contains("--name"), "{refused}");
    }
}
