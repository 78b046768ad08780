//! The disk that belongs to a machine alone: a layer in the format qcow2 over an image that nobody
//! writes. The layer is in the folder of the machine's worker, with which it comes and goes; what is
//! in it moves along ([`crate::disk_copy`]).
//!
//! The image and the layer are named to QEMU one by one: it follows no name in a file, so a system
//! cannot make it open another one.

use crate::spec::{DiskFormat, QemuSpec, RootDisk};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use serde_json::{Value, json};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// QEMU's name for the disk.
pub(crate) const ROOT: &str = "root";
/// The name of the layer in the worker's folder, which is QEMU's current directory.
pub(crate) const FILE: &str = "root.qcow2";

/// How an image in the format qcow2 begins, and how its header goes on: docs/interop/qcow2.txt of
/// QEMU, "Header". Numbers are big-endian.
const QCOW2_SIGNATURE: &[u8] = b"QFI\xfb";
const VERSION_AT: usize = 4;
const BACKING_FILE_AT: usize = 8;
const SIZE_AT: usize = 24;
const ENCRYPTION_AT: usize = 32;
const INCOMPATIBLE_FEATURES_AT: usize = 72;
/// Incompatible features: the image is damaged; its data is in another file.
const IS_CORRUPT: u64 = 1 << 1;
const HAS_DATA_FILE: u64 = 1 << 2;

/// How the first sector of a disk ends from which firmware boots, also one with a GUID partition
/// table ("UEFI Specification" 2.10, section 5.2).
const BOOT_SIGNATURE: &[u8] = b"\x55\xaa";
const BOOT_SIGNATURE_AT: usize = 510;

/// Bytes of an image from which [`ImageHeader::read`] knows it.
pub const SIGNATURE_BYTES: usize = 512;

/// What an image is, from its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageHeader {
    /// Its format. Of an image that nobody writes it may be told from what it contains.
    pub format: DiskFormat,
    /// The size of the disk that it has, in bytes; `None` if that is the file's.
    pub disk_bytes: Option<u64>,
}

impl ImageHeader {
    /// Reads the beginning of an image, [`SIGNATURE_BYTES`] or more.
    ///
    /// # Errors
    /// Why no system has a disk from it.
    pub fn read(beginning: &[u8]) -> Result<Self, String> {
        if is_qcow2(beginning) {
            return qcow2(beginning)
                .unwrap_or_else(|| Err("that is a part of a qcow2 image".into()));
        }
        let signature = beginning.get(BOOT_SIGNATURE_AT..);
        match signature.is_some_and(|rest| rest.starts_with(BOOT_SIGNATURE)) {
            true => Ok(ImageHeader {
                format: DiskFormat::Raw,
                disk_bytes: None,
            }),
            false => {
                Err("that is no disk: neither a qcow2 image, nor one with a boot sector".into())
            }
        }
    }
}

/// Whether QEMU would take a file for a qcow2 image, whatever else it is.
pub(crate) fn is_qcow2(beginning: &[u8]) -> bool {
    beginning.starts_with(QCOW2_SIGNATURE)
}

/// The header of a qcow2 image; `None` if it is cut off.
fn qcow2(bytes: &[u8]) -> Option<Result<ImageHeader, String>> {
    let word = |at| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let long = |at| Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let version = word(VERSION_AT)?;
    let features = match version {
        2 => 0,
        _ => long(INCOMPATIBLE_FEATURES_AT)?,
    };
    let refused = if !matches!(version, 2 | 3) {
        format!("a qcow2 image of version {version}: 2 and 3 are known")
    } else if long(BACKING_FILE_AT)? != 0 {
        "a qcow2 image with a backing file: `qemu-img convert` makes one that is whole".into()
    } else if word(ENCRYPTION_AT)? != 0 {
        "an encrypted qcow2 image: `qemu-img convert` makes one that is not".into()
    } else if features & IS_CORRUPT != 0 {
        "a qcow2 image that is marked as corrupt: `qemu-img check -r all` may repair it".into()
    } else if features & HAS_DATA_FILE != 0 {
        "a qcow2 image whose data is in another file: `qemu-img convert` makes one that is whole"
            .into()
    } else {
        return Some(Ok(ImageHeader {
            format: DiskFormat::Qcow2,
            disk_bytes: Some(long(SIZE_AT)?),
        }));
    };
    Some(Err(refused))
}

/// The layer of a worker's machine.
pub(crate) fn path(folder: &Path) -> PathBuf {
    folder.join(FILE)
}

/// Makes the layer of a machine that has a disk of its own, unless it has been made; checks its
/// image, which is in the folder `images`. Blocks.
///
/// # Errors
/// A message for the user.
pub(crate) fn prepare(folder: &Path, images: &Path, spec: &QemuSpec) -> Result<(), String> {
    let (Some(disk), path) = (&spec.root, path(folder)) else {
        return Ok(());
    };
    check_image(&images.join(&disk.image), disk)
        .map_err(|reason| format!("image {}: {reason}", disk.image))?;
    let made = match path.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => make(&path, disk),
        Err(error) => Err(error),
    };
    made.map_err(|error| format!("its disk {} cannot be made: {error}", path.display()))
}

/// QEMU would open what another image names.
fn check_image(path: &Path, disk: &RootDisk) -> Result<(), String> {
    let read = |path| {
        let image = std::fs::File::open(path)?;
        let mut beginning = Vec::new();
        let most = SIGNATURE_BYTES as u64;
        (&image).take(most).read_to_end(&mut beginning)?;
        Ok((beginning, image.metadata()?.len()))
    };
    let (beginning, file_bytes) = read(path).map_err(|error: io::Error| error.to_string())?;
    let header = ImageHeader::read(&beginning)?;
    if header.format != disk.format {
        let (is, said) = (header.format.word(), disk.format.word());
        return Err(format!("it is {is}, not {said}"));
    }
    let bytes = header.disk_bytes.unwrap_or(file_bytes);
    match bytes <= disk.bytes {
        true => Ok(()),
        false => Err(format!(
            "its disk has {bytes} bytes, more than the {} of the machine's",
            disk.bytes
        )),
    }
}

/// Makes an empty layer; under another name first: a layer that has its name is whole. Blocks.
///
/// # Errors
/// What the file system says.
pub(crate) fn make(path: &Path, disk: &RootDisk) -> io::Result<()> {
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = File::create_open(StorageCreateOptions::new().filename(&new))?;
    Qcow2::<File>::create_builder(file)
        .size(disk.bytes)
        .create()?;
    std::fs::File::open(&new)?.sync_all()?;
    rename(&new, path)
}

/// Gives a file that is whole, and on disk, its name. Blocks.
///
/// # Errors
/// What the file system says.
pub(crate) fn rename(from: &Path, path: &Path) -> io::Result<()> {
    std::fs::rename(from, path)?;
    match path.parent() {
        Some(folder) => std::fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Bytes that the layer of a worker's machine occupies; 0 if it has none.
pub(crate) fn occupied_bytes(folder: &Path) -> u64 {
    // Blocks of 512 bytes, whatever those of the file system are: stat(2).
    path(folder)
        .metadata()
        .map_or(0, |found| found.blocks() * 512)
}

/// The layer as QEMU is told, with the image below it. `images` is the folder of images.
pub(crate) fn block_device(disk: &RootDisk, images: &Path) -> Value {
    let mut image = json!({
        "driver": disk.format.word(),
        "node-name": "root-image",
        "read-only": true,
        "file": {
            "driver": "file",
            "filename": images.join(&disk.image).to_string_lossy(),
            "read-only": true,
        },
    });
    if disk.format == DiskFormat::Qcow2 {
        image["backing"] = Value::Null;
    }
    json!({
        "driver": DiskFormat::Qcow2.word(),
        "node-name": ROOT,
        "discard": "unmap",
        "file": { "driver": "file", "filename": FILE, "locking": "on", "discard": "unmap" },
        "backing": image,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32) -> [u8; SIGNATURE_BYTES] {
        let mut bytes = [0; SIGNATURE_BYTES];
        bytes[..4].copy_from_slice(QCOW2_SIGNATURE);
        bytes[VERSION_AT..][..4].copy_from_slice(&version.to_be_bytes());
        bytes[SIZE_AT..][..8].copy_from_slice(&(3_u64 << 30).to_be_bytes());
        bytes
    }

    #[test]
    fn an_image_is_known_by_its_beginning() {
        for version in [2, 3] {
            let known = ImageHeader {
                format: DiskFormat::Qcow2,
                disk_bytes: Some(3 << 30),
            };
            assert_eq!(ImageHeader::read(&header(version)), Ok(known));
        }
        let mut raw = [0; SIGNATURE_BYTES];
        assert!(ImageHeader::read(&raw).is_err());
        raw[BOOT_SIGNATURE_AT..].copy_from_slice(BOOT_SIGNATURE);
        let known = ImageHeader::read(&raw).unwrap();
        assert_eq!((known.format, known.disk_bytes), (DiskFormat::Raw, None));
        assert!(ImageHeader::read(b"").is_err());
        for cut in 0..80 {
            assert!(ImageHeader::read(&header(3)[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn an_image_that_needs_something_else_is_refused_with_what_to_do() {
        for (at, value, words) in [
            (VERSION_AT + 3, 4, "version 4"),
            (BACKING_FILE_AT, 1, "backing file"),
            (ENCRYPTION_AT, 1, "encrypted"),
            (INCOMPATIBLE_FEATURES_AT + 7, 2, "corrupt"),
            (INCOMPATIBLE_FEATURES_AT + 7, 4, "another file"),
        ] {
            let mut bytes = header(3);
            bytes[at] = value;
            let refused = ImageHeader::read(&bytes).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn a_layer_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let images = folder.path();
        std::fs::write(images.join("aa"), header(3)).unwrap();
        let spec = |format, bytes| QemuSpec {
            root: Some(RootDisk {
                image: "aa".into(),
                format,
                bytes,
            }),
            ..QemuSpec::default()
        };
        let refused = |spec: &QemuSpec| prepare(folder.path(), images, spec).unwrap_err();
        let other = refused(&spec(DiskFormat::Raw, 5 << 30));
        assert!(other.contains("it is qcow2, not raw"), "{other}");
        let smaller = refused(&spec(DiskFormat::Qcow2, 2 << 30));
        assert!(smaller.contains("more than the 2147483648"), "{smaller}");
        assert!(!path(folder.path()).exists());
        let spec = spec(DiskFormat::Qcow2, 5 << 30);
        // What a worker left that was killed meanwhile.
        std::fs::write(folder.path().join("root.new"), b"half").unwrap();
        prepare(folder.path(), images, &spec).unwrap();
        let made = std::fs::read(path(folder.path())).unwrap();
        let header = ImageHeader::read(&made).unwrap();
        assert_eq!(header.disk_bytes, Some(5 << 30));
        assert!(occupied_bytes(folder.path()) < 1 << 20);
        std::fs::write(path(folder.path()), b"written").unwrap();
        prepare(folder.path(), images, &spec).unwrap();
        assert_eq!(std::fs::read(path(folder.path())).unwrap(), b"written");
        let gone = prepare(&folder.path().join("gone"), images, &spec).unwrap_err();
        assert!(gone.contains("gone/root.qcow2"), "{gone}");
    }
}
