//! Reads blocks of a volume for a move or a checkpoint, and writes them into the folder of a copy.

use super::content::{Content, FILE_BYTES_MAX, data_path};
use super::{OpenMode, ROOT, Volume, WriteFault};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Reads blocks; keeps the last file open.
#[derive(Debug)]
pub struct BlockReader {
    volume: Arc<Volume>,
    current: Option<(u64, Arc<Content>, Option<File>)>,
}

impl BlockReader {
    /// Reads from `volume`.
    pub fn new(volume: Arc<Volume>) -> Self {
        Self {
            volume,
            current: None,
        }
    }

    /// Fills the start of `buffer` with a file's bytes from an offset on, up to the file's end;
    /// returns their number. Zero for a removed file: its truncation follows.
    ///
    /// # Errors
    /// The host's.
    pub fn read(&mut self, inode: u64, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        // The file may have been created meanwhile.
        let known =
            |(now, _, file): &(u64, Arc<Content>, Option<File>)| *now == inode && file.is_some();
        if !self.current.as_ref().is_some_and(known) {
            let Some(content) = self.volume.content(inode) else {
                return Ok(0);
            };
            let file = match File::open(content.path()) {
                Ok(file) => Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            self.current = Some((inode, content, file));
        }
        let Some((_, content, file)) = &self.current else {
            return Ok(0);
        };
        let size = content.state().size;
        let room = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = room.min(buffer.len());
        let buffer = &mut buffer[..length];
        let mut done = 0;
        while let Some(file) = file.as_ref().filter(|_| done < length) {
            match file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        buffer[done..].fill(0);
        Ok(length)
    }
}

/// Writes the blocks of [`BlockReader`]s into a folder.
#[derive(Debug)]
pub struct BlockWriter {
    folder: PathBuf,
    current: Option<(u64, File)>,
}

impl BlockWriter {
    /// Writes into `folder`, which is made.
    ///
    /// # Errors
    /// The host's.
    pub fn new(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            current: None,
        })
    }

    /// Writes bytes of a file.
    ///
    /// # Errors
    /// `InvalidInput` for an impossible offset, and the host's.
    pub fn write(&mut self, inode: u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > FILE_BYTES_MAX) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("bytes at {offset} of file {inode}"),
            ));
        }
        if self.current.as_ref().is_none_or(|(now, _)| *now != inode) {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(data_path(&self.folder, inode))?;
            self.current = Some((inode, file));
        }
        match &self.current {
            Some((_, file)) => file.write_all_at(bytes, offset),
            None => Ok(()),
        }
    }

    /// Truncates a file; truncation to zero removes it.
    ///
    /// # Errors
    /// The host's.
    pub fn cut(&mut self, inode: u64, bytes: u64) -> io::Result<()> {
        self.current = None;
        let path = data_path(&self.folder, inode);
        let cut = if bytes == 0 {
            std::fs::remove_file(path)
        } else {
            OpenOptions::new().write(true).open(path).and_then(|file| {
                if file.metadata()?.len() > bytes {
                    file.set_len(bytes)?;
                }
                Ok(())
            })
        };
        match cut {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Bytes of one step of an import.
const IMPORT_BYTES: usize = 1 << 20;

impl Volume {
    /// Copies a host directory into the volume's root: files, directories and links.
    ///
    /// # Errors
    /// The host's; `StorageFull` if the volume is full. Copied files remain.
    pub fn import(self: &Arc<Self>, from: &Path, now_ns: u64) -> io::Result<()> {
        let mut todo = vec![(from.to_owned(), String::new())];
        while let Some((host, path)) = todo.pop() {
            for entry in std::fs::read_dir(&host)? {
                let entry = entry?;
                let name = entry.file_name().into_string();
                let name = name.map_err(|name| {
                    io::Error::other(format!("{}: its name is not UTF-8", name.display()))
                })?;
                let path = match path.as_str() {
                    "" => name,
                    above => format!("{above}/{name}"),
                };
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    self.create_directory(ROOT, &path, now_ns)?;
                    todo.push((entry.path(), path));
                } else if kind.is_symlink() {
                    let contents = std::fs::read_link(entry.path())?.into_os_string();
                    let contents = contents
                        .into_string()
                        .map_err(|_| io::Error::other(format!("{path}: a link is not UTF-8")))?;
                    self.make_link(&contents, ROOT, &path, now_ns)?;
                } else if kind.is_file() {
                    self.import_file(&entry.path(), &path, now_ns)?;
                }
            }
        }
        Ok(())
    }

    fn import_file(self: &Arc<Self>, host: &Path, path: &str, now_ns: u64) -> io::Result<()> {
        let how = OpenMode {
            follow: false,
            write: true,
            create: true,
            exclusive: true,
            truncate: false,
        };
        let node = self.open(ROOT, path, how, now_ns)?;
        let mut file = File::open(host)?;
        let mut buffer = vec![0; IMPORT_BYTES];
        loop {
            let count = file.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                match node.write_at(rest, None, now_ns) {
                    Ok((_, written)) => rest = &rest[written..],
                    Err(WriteFault::Errno(errno)) => return Err(errno.into()),
                    Err(WriteFault::Absent(blocks)) => {
                        let what = format!("blocks {blocks:?} of {path} are not here");
                        return Err(io::Error::other(what));
                    }
                    Err(WriteFault::HostFull) => return Err(io::ErrorKind::StorageFull.into()),
                }
            }
        }
    }
}
