//! A machine's files for its owner, who is outside of it: what a preopen holds is
//! read and written through the same doors as the guest uses, cap-std for
//! directories of the host and `volume` for those of our own. So nothing outside of
//! the preopen is reachable, and what is written to a volume is noted for moves.
//!
//! Paths are relative to the preopen. Each call stands for itself: nothing is
//! open in between, so that a machine may move from one to the next.

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
    /// In a directory of the host.
    Host(Dir),
    /// In a volume of our own.
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

/// The volume's way to say "this directory".
fn named(path: &str) -> &str {
    match path {
        "" => ".",
        path => path,
    }
}

/// Does something with a file of a volume, again when blocks that it needs have been
/// fetched. Nobody is paused for it: what cannot be done now is an error.
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
            return Err(io::Error::other("the volume has no place to fetch from"));
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

/// How long blocks that are elsewhere may take to come, and how often it is looked
/// whether they have.
const FETCH_PATIENCE: Duration = Duration::from_secs(10);
const FETCH_POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Opens nothing that is not there, and changes nothing.
const STAT_ONLY: OpenMode = OpenMode {
    follow: true,
    write: false,
    create: false,
    exclusive: false,
    truncate: false,
};

impl Files {
    /// Those of a directory of the host.
    ///
    /// # Errors
    /// The host's.
    pub fn of_host(path: &Path) -> io::Result<Self> {
        Ok(Files::Host(Dir::open_ambient_dir(
            path,
            ambient_authority(),
        )?))
    }

    /// What a path is; links are followed.
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

    /// Bytes of a file at an offset: at most `bytes_max`, fewer at the end.
    ///
    /// # Errors
    /// The file system's.
    pub fn read_at(&self, path: &str, offset: u64, bytes_max: usize) -> io::Result<Vec<u8>> {
        // A pipe would be waited for.
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

    /// Writes all of some bytes at an offset of a file, which is made anew, empty, if
    /// `begin`.
    ///
    /// # Errors
    /// The file system's; some of the bytes may be there then.
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

    /// Gives a file another name, in the place of a file that has it.
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

    /// Both kinds, the second with room for 1 MiB.
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
            // A second one of that name is another's.
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
