//! Access to a machine's files from outside: the contents of a preopen are read and written through
//! the same layers as the guest's accesses, cap-std for host directories and `volume` for volumes.
//! So only the preopen is reachable, and writes to a volume are tracked for moves.
//!
//! Paths are relative to the preopen. Each call is independent: no file stays open between calls,
//! so the machine may move between two of them.

use crate::volume::{Fault, OpenMode, OpenNode, ROOT, Volume, WriteFault};
use cap_std::ambient_authority;
use cap_std::fs::{Dir, OpenOptions};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

#[derive(Debug)]
pub enum Files {
    /// A directory of the host.
    Host(Dir),
    /// A volume.
    Volume(Arc<Volume>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    pub bytes: u64,
    /// Whether it is a directory.
    pub directory: bool,
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// The volume's name of a path's directory itself.
fn named(path: &str) -> &str {
    match path {
        "" => ".",
        path => path,
    }
}

/// Runs an operation on a file of a volume, and repeats it after fetching blocks that it needs. No
/// guest is paused: an operation that is not possible now is an error.
fn retry_after_fetch<T>(
    node: &OpenNode,
    mut work: impl FnMut() -> Result<T, WriteFault>,
) -> io::Result<T> {
    let deadline = Instant::now() + FETCH_PATIENCE;
    loop {
        let blocks = match work() {
            Ok(value) => return Ok(value),
            Err(WriteFault::Errno(Errno::NOSPC)) => {
                return Err(io::Error::other("the volume's quota is used up"));
            }
            Err(WriteFault::Errno(errno)) => return Err(errno.into()),
            Err(WriteFault::HostFull) => {
                return Err(io::Error::other("the node's disk is full"));
            }
            Err(WriteFault::Absent(blocks)) => blocks,
        };
        let Some(pending) = node.fetch(blocks) else {
            return Err(io::Error::other("the volume has no backend"));
        };
        while pending.outcome().is_none() && Instant::now() < deadline {
            std::thread::sleep(FETCH_POLL_INTERVAL);
        }
        let why = match pending.outcome() {
            Some(Ok(())) => continue,
            Some(Err(Fault::Unavailable(why))) => why,
            Some(Err(Fault::DiskFull)) => "the node's disk is full".into(),
            Some(Err(Fault::Lost)) => "a part of it is lost".into(),
            None => "its place does not answer; try again".into(),
        };
        return Err(io::Error::other(why));
    }
}

/// Time-out for fetching remote blocks, and interval of polling for them.
const FETCH_PATIENCE: Duration = Duration::from_secs(10);
const FETCH_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Opens an existing file only, and changes nothing.
const STAT_ONLY: OpenMode = OpenMode {
    follow: true,
    write: false,
    create: false,
    exclusive: false,
    truncate: false,
};

impl Files {
    /// Files of a host directory.
    ///
    /// # Errors
    /// The host's.
    pub fn of_host(path: &Path) -> io::Result<Self> {
        Ok(Files::Host(Dir::open_ambient_dir(
            path,
            ambient_authority(),
        )?))
    }

    /// Metadata of a path; follows links.
    ///
    /// # Errors
    /// The file system's.
    pub fn stat(&self, path: &str) -> io::Result<FileStat> {
        let path = named(path);
        match self {
            Files::Host(dir) => {
                let found = dir.metadata(path)?;
                if !found.is_file() && !found.is_dir() {
                    return Err(io::Error::other("neither a file nor a directory"));
                }
                Ok(FileStat {
                    bytes: found.len(),
                    directory: found.is_dir(),
                })
            }
            Files::Volume(volume) => {
                let node = volume.open(ROOT, path, STAT_ONLY, now_ns())?;
                Ok(FileStat {
                    bytes: node.size(),
                    directory: node.is_directory(),
                })
            }
        }
    }

    /// Reads at most `bytes_max` bytes of a file at an offset, fewer at its end.
    ///
    /// # Errors
    /// The file system's.
    pub fn read_at(&self, path: &str, offset: u64, bytes_max: usize) -> io::Result<Vec<u8>> {
        // Reading a pipe would block.
        if self.stat(path)?.directory {
            return Err(Errno::ISDIR.into());
        }
        let mut bytes = vec![0; bytes_max];
        let mut done = 0;
        while done < bytes_max {
            let (rest, at) = (&mut bytes[done..], offset + done as u64);
            let count = match self {
                Files::Host(dir) => dir.open(path)?.into_std().read_at(rest, at)?,
                Files::Volume(volume) => {
                    let node = volume.open(ROOT, path, STAT_ONLY, now_ns())?;
                    retry_after_fetch(&node, || node.read_at(rest, at))?
                }
            };
            if count == 0 {
                break;
            }
            done += count;
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    /// Writes all bytes at an offset of a file, which is created or truncated first if `begin`.
    ///
    /// # Errors
    /// The file system's; some of the bytes may be written then.
    pub fn write_at(&self, path: &str, offset: u64, bytes: &[u8], begin: bool) -> io::Result<()> {
        match self {
            Files::Host(dir) => {
                let mut options = OpenOptions::new();
                options.write(true).create_new(begin);
                let file = dir.open_with(path, &options)?.into_std();
                file.write_all_at(bytes, offset)
            }
            Files::Volume(volume) => {
                let how = OpenMode {
                    write: true,
                    create: begin,
                    exclusive: begin,
                    ..STAT_ONLY
                };
                let node = volume.open(ROOT, path, how, now_ns())?;
                let mut done = 0;
                while done < bytes.len() {
                    let at = Some(offset + done as u64);
                    let rest = &bytes[done..];
                    match retry_after_fetch(&node, || node.write_at(rest, at, now_ns()))? {
                        (_, 0) => return Err(io::ErrorKind::WriteZero.into()),
                        (_, count) => done += count,
                    }
                }
                Ok(())
            }
        }
    }

    /// Renames a file, replacing a file of that name.
    ///
    /// # Errors
    /// The file system's.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        match self {
            Files::Host(dir) => dir.rename(from, dir, to),
            Files::Volume(volume) => Ok(volume.rename((ROOT, from), (ROOT, to), now_ns())?),
        }
    }

    /// Removes a file.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, path: &str) -> io::Result<()> {
        match self {
            Files::Host(dir) => dir.remove_file(path),
            Files::Volume(volume) => Ok(volume.remove_file(ROOT, path, now_ns())?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{Stalls, VolumeLimits};

    /// Both kinds; the volume has 1 MiB.
    fn both(folder: &Path) -> [Files; 2] {
        let host = folder.join("host");
        std::fs::create_dir(&host).unwrap();
        let limits = VolumeLimits {
            bytes_max: 1 << 20,
            inodes_max: 16,
        };
        let stalls = Arc::new(Stalls::new(|_| {}));
        let volume = Volume::new(&folder.join("volume"), limits, stalls, 1).unwrap();
        [Files::of_host(&host).unwrap(), Files::Volume(volume)]
    }

    #[test]
    fn files_are_written_read_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        for files in both(folder.path()) {
            let text: Vec<u8> = (0..200_000u32).map(|at| at as u8).collect();
            files.write_at("new", 0, &text[..70_000], true).unwrap();
            files
                .write_at("new", 70_000, &text[70_000..], false)
                .unwrap();
            // A second file of that name exceeds the quota.
            assert!(files.write_at("new", 0, b"x", true).is_err());
            files.write_at("old", 0, b"old", true).unwrap();
            files.rename("new", "old").unwrap();
            let stat = FileStat {
                bytes: 200_000,
                directory: false,
            };
            assert_eq!(files.stat("old").unwrap(), stat);
            assert_eq!(files.read_at("old", 0, 1 << 20).unwrap(), text);
            assert_eq!(files.read_at("old", 199_999, 10).unwrap(), text[199_999..]);
            assert_eq!(files.read_at("old", 300_000, 10).unwrap(), b"");
            assert!(files.stat("").unwrap().directory);
            assert!(files.read_at("", 0, 1).is_err() && files.stat("new").is_err());
            files.remove("old").unwrap();
            assert!(files.remove("old").is_err());
            assert!(files.write_at("no/such", 0, b"x", true).is_err());
        }
    }

    #[test]
    fn nothing_outside_is_reached() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), "s").unwrap();
        let [host, volume] = both(folder.path());
        std::os::unix::fs::symlink("../secret", folder.path().join("host/link")).unwrap();
        for files in [&host, &volume] {
            for path in ["../secret", "link", "/etc/passwd", "a/../../secret"] {
                assert!(files.stat(path).is_err(), "{path}");
                assert!(files.read_at(path, 0, 1).is_err(), "{path}");
                assert!(files.remove(&format!("{path}/")).is_err(), "{path}");
            }
            assert!(files.write_at("../new", 0, b"x", true).is_err());
            assert!(files.rename("../secret", "mine").is_err());
        }
        assert!(!folder.path().join("new").exists());
    }

    #[test]
    fn pipes_are_not_waited_for_and_quotas_hold() {
        let folder = tempfile::tempdir().unwrap();
        let [host, volume] = both(folder.path());
        let pipe = folder.path().join("host/pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let error = host.read_at("pipe", 0, 1).unwrap_err();
        assert!(error.to_string().contains("neither a file"), "{error}");
        let error = volume
            .write_at("big", 0, &vec![1; 2 << 20], true)
            .unwrap_err();
        assert!(error.to_string().contains("quota"), "{error}");
    }
}
