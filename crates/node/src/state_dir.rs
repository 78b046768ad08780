//! The state folder of a node, readable by its user only.
//!
//! ```text
//!   identity files, node.json, members.json   state of keel-cluster and the agent
//!   store/                                    a voter's copy of the store
//!   founded                                   this node began the cluster's store
//!   api.socket                                the local API
//!   workers/MACHINE/                          socket and output of a machine
//!   parts/PART/                                 socket of a part of a machine with another home
//!   images/HASH                               what machines start from
//!   programs/HASH.wasm                        instrumented modules
//!   cache/                                    compiled code, sealed
//!   replicas/                                 checkpoints of machines with high availability
//!   events/                                   events of this node
//!   ledger.redb                               decisions of its balancer
//!   loads.redb                                loads of the last month
//!   supervisor.lock                           of the one process that starts agents here
//! ```

use keel_cluster::MachineName;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// A node's folder.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
    workers: PathBuf,
}

impl StateDir {
    /// Opens the folder at `root`; creates it if necessary.
    ///
    /// # Errors
    /// I/O errors.
    pub fn open(root: &Path) -> std::io::Result<Self> {
        let make = |path: &Path| {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
        };
        make(root)?;
        let root = root.canonicalize()?;
        let dir = StateDir {
            workers: root.join("workers"),
            root,
        };
        for part in [
            "workers",
            "parts",
            "images",
            "programs",
            "cache",
            "checkpoints",
            "replicas",
        ] {
            make(&dir.root.join(part))?;
        }
        Ok(dir)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The local API's socket.
    pub fn api_socket(&self) -> PathBuf {
        self.root.join("api.socket")
    }

    /// The folder of this node's copy of the store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Exists once this node began the cluster's store.
    pub(crate) fn founded(&self) -> PathBuf {
        self.root.join("founded")
    }

    /// The members of the cluster as last known: whom a voter answers before it has the store.
    pub(crate) fn members(&self) -> PathBuf {
        self.root.join("members.json")
    }

    /// The agent's settings.
    pub fn settings(&self) -> PathBuf {
        Self::settings_in(&self.root)
    }

    /// The settings in a folder that may not be a node's yet.
    pub(crate) fn settings_in(root: &Path) -> PathBuf {
        root.join("node.json")
    }

    /// The folders of all machines.
    pub fn workers(&self) -> PathBuf {
        self.workers.clone()
    }

    /// The folders of workers that are parts of machines with another home.
    pub(crate) fn of_parts(&self) -> Self {
        StateDir {
            root: self.root.clone(),
            workers: self.root.join("parts"),
        }
    }

    /// One machine's folder.
    pub fn worker(&self, machine: &MachineName) -> PathBuf {
        self.workers().join(machine.as_str())
    }

    /// What machines start from.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// A file that machines start from: for `wasm`, a module as its author built it.
    pub fn image(&self, hash: &str) -> PathBuf {
        self.images().join(hash)
    }

    /// Instrumented modules.
    pub fn programs(&self) -> PathBuf {
        self.root.join("programs")
    }

    /// An instrumented module.
    pub fn program(&self, hash: &str) -> PathBuf {
        self.programs().join(format!("{hash}.wasm"))
    }

    /// The default place of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Checkpoints of machines with high availability: of those that run here, and of those that
    /// may have to.
    pub(crate) fn replicas(&self) -> PathBuf {
        self.root.join("replicas")
    }

    /// The events.
    pub fn events(&self) -> PathBuf {
        self.root.join("events")
    }

    /// The ledger of the balancer.
    pub fn ledger(&self) -> PathBuf {
        self.root.join("ledger.redb")
    }

    /// Locked by the supervisor of the node in `root`; has its process id.
    pub(crate) fn supervisor_lock_in(root: &Path) -> PathBuf {
        root.join("supervisor.lock")
    }

    /// The measured history of the node and its machines.
    pub fn loads(&self) -> PathBuf {
        self.root.join("loads.redb")
    }

    /// Compiled code.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }
}

/// Whether a text is a module's hash: 64 hex digits. Only such texts become part of a path.
pub(crate) fn is_hash(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Writes a file atomically.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension(format!("{:x}.new", rand::random::<u64>()));
    std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path))
}
