//! Errors outside of guest calls: creating a `Wasi`, capturing and restoring.

use std::io;

/// Why a [`crate::Wasi`] could not be created, captured or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Arguments and environment reach the guest as C strings.
    #[error("{what} {index} contains a NUL byte: remove it")]
    NulByte {
        /// `argument`, `environment variable` or `preopen name`.
        what: &'static str,
        /// Its place, from 0.
        index: usize,
    },
    /// An environment variable's name is empty or has a `=`.
    #[error("environment variable {index} has the name {name:?}: use a name without \"=\"")]
    EnvironmentName {
        /// Its place, from 0.
        index: usize,
        name: String,
    },
    /// Something is larger than a limit.
    #[error("{what}: {size} is more than the limit of {max}")]
    TooMany {
        /// The limited quantity.
        what: &'static str,
        size: usize,
        max: usize,
    },
    /// A directory of the host cannot be opened.
    #[error("preopen {guest:?}: cannot open host directory {host:?}: {source}")]
    Preopen {
        guest: String,
        host: String,
        source: io::Error,
    },
    /// A stream of the host cannot be used.
    #[error("{what}: {source}")]
    Host { what: String, source: io::Error },
    /// An open file is at no path that the target could reopen.
    #[error(
        "descriptor {fd}: {path:?} is in no preopen any more (removed or moved by another process): \
         restore the file or let the guest close it"
    )]
    Unreachable {
        fd: u32,
        /// The path on the source host, as far as known.
        path: String,
    },
    /// Snapshots store paths as text.
    #[error("descriptor {fd}: path {path:?} is not UTF-8: rename it")]
    NotUtf8 { fd: u32, path: String },
    /// The host does not report the path of an open file.
    #[error("descriptor {fd}: cannot find out its path (is /proc mounted?): {source}")]
    Locate { fd: u32, source: io::Error },
    /// An open file is missing on the target.
    #[error("descriptor {fd}: cannot open {path:?} in preopen {guest:?} again: {source}")]
    Reopen {
        fd: u32,
        /// The guest's name of the preopen.
        guest: String,
        path: String,
        source: io::Error,
    },
    /// Another file has replaced an open file.
    #[error(
        "descriptor {fd}: {path:?} in preopen {guest:?} is no longer the file that was open \
         ({difference}): put it back"
    )]
    Changed {
        fd: u32,
        /// The guest's name of the preopen.
        guest: String,
        path: String,
        /// In what it differs.
        difference: &'static str,
    },
    /// The snapshot is of another version.
    #[error(
        "WASI snapshot of version {found}, this program reads {supported}: use a matching keel"
    )]
    Version { found: u32, supported: u32 },
    /// The snapshot is inconsistent or exceeds limits.
    #[error("WASI snapshot is damaged: {0}")]
    Damaged(String),
    /// The resources do not match the snapshot.
    #[error("the snapshot needs {needed} preopens, {given} given")]
    Resources { needed: usize, given: usize },
    /// The operating system gave no random seed.
    #[error("no random seed from the operating system: {0}")]
    Seed(String),
}
