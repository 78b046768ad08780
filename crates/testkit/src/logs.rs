//! What nodes and workers have logged, for whoever reads why a test failed.

use std::fs;
use std::path::{Path, PathBuf};

/// How much of each log is shown, in bytes: the end.
const SHOWN_BYTES: usize = 12 << 10;

/// Prints the ends of the logs of a node and of its workers.
pub(crate) fn print(node: &str, folder: &Path) {
    let mut files = vec![folder.join("agent.log")];
    for place in ["workers", "parts"] {
        let workers = fs::read_dir(folder.join(place)).into_iter().flatten();
        let workers = workers.flatten().map(|worker| worker.path());
        files.extend(workers.map(|worker| worker.join("worker.log")));
    }
    for file in files {
        let Ok(log) = fs::read(&file) else { continue };
        let end = &log[log.len().saturating_sub(SHOWN_BYTES)..];
        let name: PathBuf = file.strip_prefix(folder).unwrap_or(&file).into();
        println!("── {node}: {}", name.display());
        println!("{}", String::from_utf8_lossy(end));
    }
}
