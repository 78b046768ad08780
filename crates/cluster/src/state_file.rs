//! Files of the state directory: written whole or not at all, readable by
//! their owner only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Longest state file that is read, in bytes: 1 MiB.
pub const STATE_FILE_BYTES_MAX: u64 = 1 << 20;

/// A file of the state directory that cannot be read or written.
#[derive(Debug, Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct StateFileError {
    /// "read" or "write".
    pub action: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

/// Writes `contents` to `path` with mode 0600: after a crash the file has
/// either the old contents or the new. Makes the directory (mode 0700) if it
/// does not exist.
///
/// # Errors
/// [`StateFileError`]; the old contents remain then.
pub fn write(path: &Path, contents: &[u8]) -> Result<(), StateFileError> {
    replace(path, contents).map_err(|source| StateFileError {
        action: "write",
        path: path.into(),
        source,
    })
}

fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other("it is not the name of a file"));
    };
    let directory = match directory.as_os_str().is_empty() {
        true => Path::new("."),
        false => directory,
    };
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory)?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{:016x}.new", rand::random::<u64>()));
    let temporary = directory.join(temporary);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        fs::remove_file(&temporary).ok();
    }
    written?;
    File::open(directory)?.sync_all()
}

/// Reads `path`, at most [`STATE_FILE_BYTES_MAX`] bytes of text.
///
/// # Errors
/// [`StateFileError`].
pub fn read(path: &Path) -> Result<String, StateFileError> {
    let reading = || {
        let length = fs::metadata(path)?.len();
        if length > STATE_FILE_BYTES_MAX {
            return Err(io::Error::other(format!("it has {length} bytes")));
        }
        fs::read_to_string(path)
    };
    reading().map_err(|source| StateFileError {
        action: "read",
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_and_private() -> Result<(), Box<dyn std::error::Error>> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("new").join("key.pem");
        write(&path, b"one")?;
        write(&path, b"two")?;
        assert_eq!(read(&path)?, "two");
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        let parent = path.parent().ok_or("no parent")?;
        assert_eq!(fs::metadata(parent)?.permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(parent)?.count(), 1, "no temporary file stays");
        Ok(())
    }

    #[test]
    fn errors_name_the_file() -> Result<(), Box<dyn std::error::Error>> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("absent");
        let error = read(&path).map_err(|e| e.to_string());
        assert!(error.is_err_and(|e| e.contains("absent")));
        // A directory occupies the path: nothing is left behind.
        let blocked = directory.path().join("blocked");
        fs::create_dir_all(blocked.join("x"))?;
        assert!(write(&blocked, b"x").is_err());
        assert_eq!(fs::read_dir(directory.path())?.count(), 1);
        Ok(())
    }
}
