//! Initial configuration of a machine.

use crate::clock::{HostClock, SystemClock};
use crate::error::Error;
use crate::stream::{DiscardSink, Input, Sink};
use crate::volume::{Backed, Stalls, VolumeLimits};
use std::path::PathBuf;
use std::sync::Arc;

pub struct Config {
    /// The arguments, the program's name first. No NUL bytes.
    pub args: Vec<String>,
    /// The environment. No NUL bytes, no `=` in names.
    pub env: Vec<(String, String)>,
    /// The preopened directories. They become descriptors after the listeners.
    pub preopens: Vec<Preopen>,
    /// How many listening sockets there are; descriptors from 3 on, as with wasmtime's
    /// `--tcplisten`. Connections come through [`crate::Wasi::network`].
    pub listeners: u32,
    /// Descriptor 0.
    pub stdin: Input,
    /// Descriptor 1.
    pub stdout: Box<dyn Sink>,
    /// Descriptor 2.
    pub stderr: Box<dyn Sink>,
    /// Seed of `random_get`; `None` for one from the operating system.
    pub seed: Option<[u8; 32]>,
    /// Bounds.
    pub limits: Limits,
    pub clock: Arc<dyn HostClock>,
}

impl Default for Config {
    /// No arguments, no directories, empty input, output forgotten, random
    /// seed, the system's clocks.
    fn default() -> Self {
        Self {
            args: Vec::new(),
            env: Vec::new(),
            preopens: Vec::new(),
            listeners: 0,
            stdin: Input::Empty,
            stdout: Box::new(DiscardSink),
            stderr: Box::new(DiscardSink),
            seed: None,
            limits: Limits::default(),
            clock: Arc::new(SystemClock),
        }
    }
}

/// Where the files of a preopen are.
#[derive(Clone, Debug)]
pub enum Source {
    /// A directory of the host, which others may change too.
    Host(PathBuf),
    /// A volume, which moves with the machine.
    Volume {
        /// Folder for its files' bytes; exclusive.
        folder: PathBuf,
        limits: VolumeLimits,
        /// Reports waits for space on the host's disk.
        stalls: Arc<Stalls>,
    },
    /// A volume whose bytes are stored remotely: the folder only has those that were needed here.
    Backed {
        /// Folder for those bytes; exclusive.
        folder: PathBuf,
        limits: VolumeLimits,
        /// Reports waits for space, or for the backend.
        stalls: Arc<Stalls>,
        backed: Backed,
    },
}

/// A preopened directory.
#[derive(Clone, Debug)]
pub struct Preopen {
    pub source: Source,
    /// Its name for the guest, such as `/data`. No NUL bytes.
    pub guest: String,
    /// Whether all modifications fail with `perm`.
    pub read_only: bool,
}

/// Limits on host resources of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open descriptors, including the standard ones and preopens; beyond: errno `mfile`. Capped at
    /// [`Limits::DESCRIPTORS_MAX`].
    pub descriptors_max: u32,
    /// Subscriptions in one `poll_oneoff`; beyond: errno `nomem`.
    pub subscriptions_max: u32,
    /// Entries of a listed directory; beyond: errno `nomem`.
    pub directory_entries_max: u32,
}

impl Limits {
    /// Upper bound for every machine.
    pub const DESCRIPTORS_MAX: u32 = 1 << 20;

    pub(crate) fn clamped(self) -> Self {
        Self {
            descriptors_max: self.descriptors_max.min(Self::DESCRIPTORS_MAX),
            ..self
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            descriptors_max: 4096,
            subscriptions_max: 8192,
            directory_entries_max: 1 << 20,
        }
    }
}

/// Bytes of all arguments, or of the whole environment.
const STRINGS_BYTES_MAX: usize = 16 << 20;

pub(crate) fn check_strings(args: &[String], env: &[(String, String)]) -> Result<(), Error> {
    let nul = |what, found: Option<usize>| match found {
        Some(index) => Err(Error::NulByte { what, index }),
        None => Ok(()),
    };
    nul("argument", args.iter().position(|arg| arg.contains('\0')))?;
    let bad = |(name, value): &(String, String)| name.contains('\0') || value.contains('\0');
    nul("environment variable", env.iter().position(bad))?;
    let misnamed = |(name, _): &(String, String)| name.is_empty() || name.contains('=');
    if let Some(index) = env.iter().position(misnamed) {
        let name = env[index].0.clone();
        return Err(Error::EnvironmentName { index, name });
    }
    let args_bytes = args.iter().map(|arg| arg.len() + 1).sum();
    let env_bytes = env.iter().map(|(n, v)| n.len() + v.len() + 2).sum();
    for (what, size) in [
        ("bytes of arguments", args_bytes),
        ("bytes of environment", env_bytes),
    ] {
        let max = STRINGS_BYTES_MAX;
        if size > max {
            return Err(Error::TooMany { what, size, max });
        }
    }
    Ok(())
}

pub(crate) fn check_preopen_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), Error> {
    for (index, name) in names.enumerate() {
        if name.contains('\0') {
            let what = "preopen name";
            return Err(Error::NulByte { what, index });
        }
    }
    Ok(())
}
