//! Small file systems for nodes, so that a disk can be full without filling the host's. Mounting
//! them needs privileges.

use anyhow::{Context, Result, ensure};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Name of the file that fills the disk.
const BALLAST: &str = "ballast";

/// A file system in memory; unmounted on drop.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts one of this size in MiB at a path, which is created.
    ///
    /// # Errors
    /// If mounting is not permitted.
    pub fn mount(path: &Path, mib: u32) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "none"])
            .arg(path)
            .output()
            .context("mount")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "no disk for {}: {said}",
            path.display()
        );
        Ok(SmallDisk {
            path: path.to_owned(),
        })
    }

    /// Fills the file system.
    ///
    /// # Errors
    /// Any I/O error except a full disk.
    pub fn fill(&self) -> Result<()> {
        let mut file = std::fs::File::create(self.path.join(BALLAST))?;
        for piece in [1 << 20, 4096, 1] {
            let bytes = vec![0x5a; piece];
            loop {
                match file.write(&bytes) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Frees the space again.
    ///
    /// # Errors
    /// I/O errors.
    pub fn free(&self) -> Result<()> {
        match std::fs::remove_file(self.path.join(BALLAST)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Leaves it mounted for inspection.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Processes that are still ending there are ignored.
        let unmounted = Command::new("umount").arg("-l").arg(&self.path).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.path.display());
        }
    }
}
