//! The files of a machine's checkpoints in this node's folder of replicas. They have the names
//! that a repository in that folder gives them (`keel_machine::checkpoint`), so that checkpoints
//! are made there, and restored from there, as in any other.

use keel_cluster::MachineName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// Suffix of manifests, the only objects whose content changes.
const MANIFEST: &str = ".manifest";
/// Suffixes of objects that belong to checkpoints.
const PARTS: [&str; 2] = [MANIFEST, ".pack"];
/// Longest name of an object, in bytes.
const NAME_BYTES_MAX: usize = 120;
/// Bytes read at a time for a hash.
const READ_BYTES: usize = 1 << 20;

/// A file of a checkpoint, or the program of a machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Object {
    /// Below `machines/MACHINE`, or `programs` for a program.
    pub(super) name: String,
    pub(super) is_program: bool,
    pub(super) bytes: u64,
    /// BLAKE3, of a manifest: its content changes when its checkpoint is compacted.
    pub(super) hash: Option<[u8; 32]>,
}

impl Object {
    /// Whether its name is one that a repository gives: no part of a path that leads elsewhere.
    pub(super) fn is_valid(&self) -> bool {
        let is_plain = self.name.len() <= NAME_BYTES_MAX
            && !self.name.starts_with('.')
            && self
                .name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-');
        let suffix = match self.is_program {
            true => self.name.ends_with(".wasm"),
            false => PARTS.iter().any(|part| self.name.ends_with(part)),
        };
        is_plain && suffix
    }

    /// Its size in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The checkpoint whose manifest it is.
    pub(super) fn checkpoint(&self) -> Option<&str> {
        self.name.strip_suffix(MANIFEST)
    }

    /// Its file in a folder of replicas.
    pub(super) fn path(&self, folder: &Path, machine: &MachineName) -> PathBuf {
        match self.is_program {
            true => folder.join("programs").join(&self.name),
            false => machine_folder(folder, machine).join(&self.name),
        }
    }

    /// Whether the file is there, with this content as far as that is told. Blocking.
    pub(super) fn is_there(&self, folder: &Path, machine: &MachineName) -> bool {
        let path = self.path(folder, machine);
        let has_size = std::fs::metadata(&path).is_ok_and(|it| it.len() == self.bytes);
        has_size && (self.hash.is_none() || hash_of(&path).ok() == self.hash)
    }
}

/// The folder of a machine's checkpoints.
pub(super) fn machine_folder(folder: &Path, machine: &MachineName) -> PathBuf {
    folder.join("machines").join(machine.as_str())
}

fn hash_of(path: &Path) -> std::io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(*hasher.finalize().as_bytes()),
            read => drop(hasher.update(&buffer[..read])),
        }
    }
}

/// All objects of a machine's checkpoints; manifests last, so that who copies them in this order
/// has a checkpoint as a whole or not at all. Blocking.
///
/// # Errors
/// Of the file system.
pub(super) fn objects_of(
    folder: &Path,
    machine: &MachineName,
    program: Option<[u8; 32]>,
) -> std::io::Result<Vec<Object>> {
    let mut objects = Vec::new();
    for entry in std::fs::read_dir(machine_folder(folder, machine))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let mut object = Object {
            name,
            is_program: false,
            bytes: 0,
            hash: None,
        };
        if !object.is_valid() {
            continue;
        }
        // A file that retention deletes meanwhile is not needed.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        object.bytes = metadata.len();
        if object.name.ends_with(MANIFEST) {
            object.hash = Some(hash_of(&entry.path())?);
        }
        objects.push(object);
    }
    if let Some(hash) = program {
        let mut object = Object {
            name: format!("{}.wasm", keel_net::Fingerprint(hash)),
            is_program: true,
            bytes: 0,
            hash: None,
        };
        object.bytes = std::fs::metadata(object.path(folder, machine))?.len();
        objects.push(object);
    }
    objects.sort_by_key(|it| (it.name.ends_with(MANIFEST), it.name.clone()));
    Ok(objects)
}

/// The files in the folder of a machine's checkpoints that are not among `kept`, manifests first.
/// Blocking.
///
/// # Errors
/// Of the file system.
pub(super) fn others(
    folder: &Path,
    machine: &MachineName,
    kept: &[Object],
) -> std::io::Result<Vec<PathBuf>> {
    let newest = kept.iter().filter_map(Object::checkpoint).max();
    let kept: BTreeSet<&str> = kept.iter().map(|it| it.name.as_str()).collect();
    // A request may be late: what belongs to a newer checkpoint has just come.
    let is_newer = |name: &str| {
        newest.is_some_and(|newest| name.get(..newest.len()).is_some_and(|id| id > newest))
    };
    let folder = machine_folder(folder, machine);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut gone = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let is_needed = |name: &str| kept.contains(name) || is_newer(name);
        if !name.to_str().is_some_and(is_needed) {
            gone.push(folder.join(name));
        }
    }
    let is_manifest = |path: &PathBuf| path.to_string_lossy().ends_with(MANIFEST);
    gone.sort_by_key(|path| !is_manifest(path));
    Ok(gone)
}

/// Deletes files in this order, and the folder of a machine's checkpoints if nothing is left in
/// it. Blocking.
///
/// # Errors
/// Of the file system; what was deleted stays deleted.
pub(super) fn delete(
    folder: &Path,
    machine: &MachineName,
    files: &[PathBuf],
) -> std::io::Result<()> {
    for path in files {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    // It fails if something is left.
    let _ = std::fs::remove_dir(machine_folder(folder, machine));
    Ok(())
}

/// A file that is being written: visible under its name only once all of it is on the disk.
pub(super) struct NewFile {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    is_done: bool,
}

impl NewFile {
    /// Begins it; creates its folder. Blocking.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn create(path: PathBuf) -> std::io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        // Not a name of an object.
        let temporary = path.with_extension(format!("{:x}.new", rand::random::<u64>()));
        let file = File::create(&temporary)?;
        Ok(NewFile {
            file,
            temporary,
            path,
            is_done: false,
        })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Makes it durable under its name. Blocking.
    ///
    /// # Errors
    /// Of the file system; nothing has the name then, or what had it before.
    pub(super) fn finish(mut self) -> std::io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.temporary, &self.path)?;
        self.is_done = true;
        match self.path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_done {
            // What remains is removed with what is not needed.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> MachineName {
        "web".parse().unwrap()
    }

    fn object(name: &str, is_program: bool) -> Object {
        Object {
            name: name.to_owned(),
            is_program,
            bytes: 1,
            hash: None,
        }
    }

    fn write(folder: &Path, name: &str, bytes: &[u8]) {
        let path = machine_folder(folder, &machine()).join(name);
        let mut file = NewFile::create(path).unwrap();
        file.write(bytes).unwrap();
        file.finish().unwrap();
    }

    #[test]
    fn only_names_of_a_repository_are_valid() {
        let id = "0000000000001-00000000";
        for name in [
            format!("{id}.0.pack"),
            format!("{id}.manifest"),
            format!("{id}.g1.v2.pack"),
        ] {
            assert!(object(&name, false).is_valid(), "{name}");
            assert!(!object(&name, true).is_valid(), "{name}");
        }
        assert!(object(&format!("{}.wasm", "ab".repeat(32)), true).is_valid());
        let long = format!("{}.pack", "a".repeat(200));
        for name in [
            "../x.pack",
            "/etc/x.pack",
            ".x.pack",
            "x",
            "x.reading",
            "a b.pack",
            &long,
        ] {
            assert!(!object(name, false).is_valid(), "{name}");
        }
    }

    #[test]
    fn manifests_come_last_and_their_content_counts() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        write(folder, "1.manifest", b"one");
        write(folder, "2.0.pack", b"pages");
        write(folder, "1.0.pack", b"pages");
        let objects = objects_of(folder, &machine(), None).unwrap();
        let names: Vec<&str> = objects.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["1.0.pack", "2.0.pack", "1.manifest"]);
        assert!(objects.iter().all(|it| it.is_there(folder, &machine())));
        // As long as before.
        write(folder, "1.manifest", b"two");
        let lacks: Vec<bool> = objects
            .iter()
            .map(|it| it.is_there(folder, &machine()))
            .collect();
        assert_eq!(lacks, [true, true, false]);
    }

    #[test]
    fn what_is_kept_stays() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        for name in [
            "1.manifest",
            "1.0.pack",
            "2.manifest",
            "2.0.pack",
            "3.0.x.new",
            "3.0.pack",
        ] {
            write(folder, name, b"x");
        }
        let kept = [object("2.manifest", false), object("2.0.pack", false)];
        let discard = |kept: &[Object]| {
            let gone = others(folder, &machine(), kept).unwrap();
            delete(folder, &machine(), &gone).unwrap();
        };
        discard(&kept);
        let left = objects_of(folder, &machine(), None).unwrap();
        let names: Vec<&str> = left.iter().map(|it| it.name.as_str()).collect();
        // That of the next checkpoint has just come.
        assert_eq!(names, ["2.0.pack", "3.0.pack", "2.manifest"]);
        discard(&[]);
        assert!(!machine_folder(folder, &machine()).exists());
        // Again: nothing is there.
        discard(&[]);
    }

    #[test]
    fn an_unfinished_file_has_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1.0.pack");
        let mut file = NewFile::create(path.clone()).unwrap();
        file.write(b"half").unwrap();
        drop(file);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
