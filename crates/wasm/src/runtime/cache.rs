//! Cache files in one folder, authenticated with a key of this node: a file that another party
//! wrote counts as missing.

use std::path::{Path, PathBuf};

/// Length of the authentication tag at the end of each file.
const SEAL_BYTES: usize = 32;

#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
    key: [u8; 32],
}

impl Cache {
    /// Opens a folder and its key, and creates them if missing.
    ///
    /// # Errors
    /// An I/O error of the folder or the key.
    pub(super) fn open(folder: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let key_path = folder.join("seal.key");
        let key = match std::fs::read(&key_path) {
            Ok(key) if key.len() == 32 => key,
            _ => {
                let mut key = [0; 32];
                rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
                write_private(&key_path, &key)?;
                // Another process may have created it first; the file decides.
                std::fs::read(&key_path)?
            }
        };
        let key = key
            .try_into()
            .map_err(|_| std::io::ErrorKind::InvalidData)?;
        let folder = folder.to_owned();
        Ok(Cache { folder, key })
    }

    /// A lock held while the entry is produced; `None` if locking fails: then it may be produced
    /// twice.
    pub(super) fn lock(&self, name: &str) -> Option<std::fs::File> {
        let path = self.folder.join(format!("{name}.lock"));
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .ok()?;
        file.lock().ok()?;
        Some(file)
    }

    /// The content of a file with a valid tag.
    pub(super) fn get(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = std::fs::read(self.folder.join(name)).ok()?;
        let body = bytes.len().checked_sub(SEAL_BYTES)?;
        let seal: [u8; SEAL_BYTES] = bytes[body..].try_into().ok()?;
        // `Hash` compares in constant time.
        if self.seal(name, &bytes[..body]) != seal {
            tracing::warn!(
                name,
                "a cache file has no valid authentication tag, ignoring it"
            );
            return None;
        }
        bytes.truncate(body);
        Some(bytes)
    }

    /// Stores an entry. On failure it is produced again when needed: a full disk must not keep a
    /// machine from moving away.
    pub(super) fn put(&self, name: &str, bytes: &[u8]) {
        let path = self.folder.join(name);
        let mut sealed = bytes.to_vec();
        sealed.extend(self.seal(name, bytes).as_bytes());
        if let Err(error) = write_private(&path, &sealed) {
            tracing::warn!(path = %path.display(), %error, "compiled code is not cached");
        }
    }

    fn seal(&self, name: &str, bytes: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(bytes);
        hasher.finalize()
    }
}

/// Writes a file atomically, readable by its owner only.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // It would use scarce space.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}
