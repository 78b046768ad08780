//! Nodes' wall clocks, which can be set while the nodes run: `libfaketime` stands between their
//! processes and the C library.
//!
//! Only the wall clock (`CLOCK_REALTIME`) changes. Leases are measured by `CLOCK_BOOTTIME`, which
//! nobody can set.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian's package `libfaketime` has the library for programs with threads, and where other
/// systems have it.
const LIBRARIES: [&str; 3] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
];

/// The clocks of a cluster's nodes.
#[derive(Debug)]
pub struct WallClocks {
    library: &'static str,
    /// Has a file for each node: by how much its clock is ahead.
    folder: PathBuf,
}

impl WallClocks {
    /// Clocks with files in `folder`, which is created.
    ///
    /// # Errors
    /// If the library is missing, or the folder cannot be created.
    pub fn new(folder: &Path) -> Result<Self> {
        let library = LIBRARIES.into_iter().find(|path| Path::new(path).exists());
        let library = library.context("no libfaketime (apt-get install libfaketime)")?;
        std::fs::create_dir_all(folder)?;
        Ok(WallClocks {
            library,
            folder: folder.to_owned(),
        })
    }

    /// Gives the process of a command, and its children, the node's clock.
    ///
    /// # Errors
    /// If the node's file cannot be written.
    pub(crate) fn give(&self, node: &str, command: &mut Command) -> Result<()> {
        let file = self.folder.join(node);
        if !file.exists() {
            self.set(node, 0)?;
        }
        command
            .env("LD_PRELOAD", self.library)
            .env("FAKETIME_TIMESTAMP_FILE", file)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            // Files keep the times that the kernel gave them.
            .env("NO_FAKE_STAT", "1");
        Ok(())
    }

    /// Sets a node's clock: it is this many seconds ahead, or behind if negative.
    ///
    /// # Errors
    /// If the node's file cannot be written.
    pub fn set(&self, node: &str, ahead_s: i64) -> Result<()> {
        // A process may read it at any time.
        let new = self.folder.join(format!("{node}.new"));
        std::fs::write(&new, format!("{ahead_s:+}\n"))?;
        std::fs::rename(&new, self.folder.join(node))?;
        Ok(())
    }
}
