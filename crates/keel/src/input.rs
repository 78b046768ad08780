//! Files that users name. Each is read up to a limit: a device or a pipe may have no end.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Most bytes of a program.
pub(crate) const MODULE_BYTES_MAX: u64 = keel_wasm::instrument::MODULE_BYTES_MAX as u64;
/// Most bytes of an image that is sent as a whole: a kernel, an initial RAM disk.
pub(crate) const IMAGE_BYTES_MAX: u64 = 1 << 30;
/// Most bytes of a store's backup.
pub(crate) const BACKUP_BYTES_MAX: u64 = 4 << 30;
/// Most bytes of what people and tools write: machines, rules, plans, descriptions.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// What is in a file.
///
/// # Errors
/// If it cannot be read, or has more than `bytes_max`.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        let most = bytes_max >> 20;
        let reason = format!("it is longer than {most} MiB, the most that is read");
        return Err(Error::new(ErrorKind::FileTooLarge, reason));
    }
    Ok(bytes)
}

/// The text in a file.
///
/// # Errors
/// As [`read`], with 16 MiB; or if it is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = read(path, TEXT_BYTES_MAX)?;
    String::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_or_no_text_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "äb").unwrap();
        assert_eq!(read(&path, 3).unwrap(), "äb".as_bytes());
        assert_eq!(read_text(&path).unwrap(), "äb");
        assert_eq!(read(&path, 2).unwrap_err().kind(), ErrorKind::FileTooLarge);
        std::fs::write(&path, b"\xff").unwrap();
        assert_eq!(read_text(&path).unwrap_err().kind(), ErrorKind::InvalidData);
        assert!(read_text(folder.path()).is_err());
        assert_eq!(
            read_text(&path.join("x")).unwrap_err().kind(),
            ErrorKind::NotADirectory
        );
    }

    #[test]
    fn a_file_without_an_end_is_refused() {
        let error = read(Path::new("/dev/zero"), 1 << 20).unwrap_err();
        assert_eq!(
            error.to_string(),
            "it is longer than 1 MiB, the most that is read"
        );
    }
}
