//! WASI preview 1 for machines that are captured and moved while they run.
//!
//! All 46 functions, with the errno results of wasmtime 48 on Linux. The state differs: a
//! descriptor is not just a number of the host's kernel but plain data ([`Snapshot`]) from which it
//! can be reopened elsewhere; blocking calls can be interrupted before their effect and repeated
//! ([`Outcome::Interrupted`]); clocks and random streams continue after a move.
//!
//! | file | what it holds |
//! |---|---|
//! | `abi.rs` | types and trait generated from the witx; errno and trap |
//! | `function.rs` | the functions' names and signatures, dispatch |
//! | `call.rs` | the trait: checks arguments, hands on to the files below |
//! | `guest.rs` | copying between guest memory and bounce buffers |
//! | `config.rs` | initial configuration of a machine |
//! | `descriptor.rs` | descriptor table, rights |
//! | `file.rs` | `fd_*` on files and streams |
//! | `directory.rs` | `fd_readdir` |
//! | `path.rs` | `path_*` |
//! | `unlinked_open.rs` | files removed while open; locating open files |
//! | `volume/` | file systems that move with their machine |
//! | `stream.rs` | standard input, output, error |
//! | `socket.rs` | `sock_*` |
//! | `remote_call.rs` | calls executed at another node |
//! | `poll.rs` | `poll_oneoff` |
//! | `wait.rs` | interruptible waiting |
//! | `clock.rs`, `random.rs` | clocks and random streams that continue after a move |
//! | `snapshot.rs`, `restore.rs` | capturing and restoring the state |
//! | `error.rs` | errors outside of guest calls |

#![forbid(unsafe_code)]

mod abi;
mod call;
mod clock;
mod config;
mod descriptor;
mod directory;
mod error;
mod file;
mod function;
mod guest;
mod host_access;
mod path;
mod poll;
mod random;
mod remote_call;
mod restore;
mod snapshot;
mod snapshot_0;
mod socket;
mod stream;
mod unlinked_open;
pub mod volume;
mod wait;

pub use abi::types::Errno;
pub use clock::{CausalClock, HostClock, SystemClock};
pub use config::{Config, Limits, Preopen, Source};
pub use error::Error;
pub use function::{Function, ParamType};
pub use host_access::{FileStat, Files};
pub use remote_call::{OutputTargets, PackedCall, pack};
pub use restore::Resources;
pub use snapshot::{
    ConnectionRecord, DescriptorKind, DescriptorRecord, DirectoryRecord, EntryRecord, FileRecord,
    HostPlace, ListenerRecord, Place, PreopenRecord, SNAPSHOT_VERSION, Snapshot, StdinRecord,
};
pub use stream::{DiscardSink, FdSink, Input, MemorySink, Sink, SinkResult};
pub use wait::Interrupt;
pub use wiggle::GuestMemory;

use crate::clock::GuestClock;
use crate::descriptor::{
    Descriptor, Dropped, FileId, Kind, OpenDirectory, Place as DirPlace, Table,
};
use crate::random::Random;
use crate::stream::Stdin;
use crate::unlinked_open::OpenFiles;
use crate::volume::Volume;
use cap_std::fs::Dir;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Complete; the errno for the guest.
    Done(i32),
    /// Interrupted before its effect. To be repeated later, possibly on another host, with the same
    /// arguments and the same [`CallState`].
    Interrupted,
    /// The guest ended itself with this code.
    Exit(u32),
    /// The guest must trap, with this reason (for example a pointer out of bounds).
    Trap(String),
}

/// State of a call between an interruption and its repetition; plain data, part of the image. Empty
/// again once the call is complete.
#[derive(Serialize, Deserialize, Default, Clone, Debug, PartialEq)]
pub struct CallState {
    /// Start of the first attempt on the guest's monotonic clock, in nanoseconds: relative
    /// time-outs count from it.
    pub started_ns: Option<u64>,
    /// Bytes that `random_get` has already filled, or that `fd_write` or `fd_pwrite` has written
    /// and that are not yet durable.
    pub progress_bytes: u64,
}

/// The WASI side of one machine, shared by all its threads.
pub struct Wasi {
    args: Vec<String>,
    env: Vec<(String, String)>,
    roots: Vec<Root>,
    listeners: u32,
    table: Mutex<Table>,
    files: OpenFiles,
    stdin: Stdin,
    stdout: Box<dyn Sink>,
    stderr: Box<dyn Sink>,
    clock: GuestClock,
    random: Random,
    limits: Limits,
}

/// A preopened directory; it stays when the guest closes the descriptor, since files opened below
/// it are located through it.
#[derive(Debug)]
pub(crate) struct Root {
    place: RootPlace,
    guest: String,
    read_only: bool,
}

#[derive(Debug)]
pub(crate) enum RootPlace {
    Host { dir: Dir, id: FileId },
    Volume(Arc<Volume>),
}

impl std::fmt::Debug for Wasi {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Wasi")
            .field("args", &self.args)
            .field("roots", &self.roots)
            .finish_non_exhaustive()
    }
}

/// Locks a mutex, ignoring poisoning: every critical section leaves the content valid.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wasi {
    /// The state of a fresh machine.
    ///
    /// # Errors
    /// If strings contain NUL bytes, a limit is exceeded, or a directory or
    /// listener of the host cannot be used.
    pub fn new(config: Config) -> Result<Wasi, Error> {
        config::check_strings(&config.args, &config.env)?;
        config::check_preopen_names(config.preopens.iter().map(|p| p.guest.as_str()))?;
        let seed = match config.seed {
            Some(seed) => seed,
            None => random_bytes()?,
        };
        let machine = u64::from_le_bytes(random_bytes()?);
        let clock = GuestClock::start(config.clock);
        let roots = config
            .preopens
            .iter()
            .map(|preopen| open_root(preopen, None, clock.realtime_ns()))
            .collect::<Result<Vec<_>, _>>()?;
        let limits = config.limits.clamped();
        let table = initial_table(&roots, &config.listeners, limits)?;
        let mut wasi = Wasi {
            args: config.args,
            env: config.env,
            roots,
            listeners: config.listeners.len() as u32,
            table: Mutex::new(table),
            files: OpenFiles::new(machine, 0),
            stdin: Stdin::new(config.stdin),
            stdout: config.stdout,
            stderr: config.stderr,
            clock,
            random: Random::new(seed, BTreeMap::new()),
            limits,
        };
        wasi.open_initial(config.listeners)?;
        Ok(wasi)
    }

    /// Adds listeners and preopens, after standard input, output, error.
    fn open_initial(&mut self, listeners: Vec<std::net::TcpListener>) -> Result<(), Error> {
        for (index, listener) in (0_u32..).zip(listeners) {
            let kind = Kind::Listener(socket::listener(listener, index)?);
            self.push_first(kind)?;
        }
        for index in 0..self.roots.len() {
            let root = &self.roots[index];
            let failed = |source| Error::Host {
                what: format!("preopen {:?}", root.guest),
                source,
            };
            let place = match &root.place {
                RootPlace::Host { dir, id } => DirPlace::Host {
                    dir: dir.try_clone().map_err(failed)?,
                    id: *id,
                },
                RootPlace::Volume(volume) => {
                    let opened = volume.open_root();
                    DirPlace::Volume(opened.map_err(|errno| failed(errno.into()))?)
                }
            };
            let kind = Kind::Directory(OpenDirectory {
                place,
                root: index as u32,
                preopened_as: Some(root.guest.clone()),
                read_only: root.read_only,
                listing: Mutex::default(),
            });
            self.push_first(kind)?;
        }
        Ok(())
    }

    fn push_first(&mut self, kind: Kind) -> Result<(), Error> {
        let descriptor = Descriptor::new(kind, Dropped::default());
        if let Some(id) = descriptor.file_id() {
            self.files.opened(id);
        }
        let max = self.limits.descriptors_max as usize;
        let pushed = locked(&self.table).push(Arc::new(descriptor));
        pushed.map(drop).map_err(|_| Error::TooMany {
            what: "descriptors at the start",
            size: max + 1,
            max,
        })
    }

    /// The volumes, with their indices among the preopens of the configuration.
    pub fn volumes(&self) -> Vec<(u32, Arc<Volume>)> {
        let volume = |(index, root): (u32, &Root)| match &root.place {
            RootPlace::Host { .. } => None,
            RootPlace::Volume(volume) => Some((index, volume.clone())),
        };
        (0_u32..).zip(&self.roots).filter_map(volume).collect()
    }

    /// The guest's monotonic clock, in nanoseconds.
    pub fn monotonic_ns(&self) -> u64 {
        self.clock.monotonic_ns()
    }

    /// Advances the guest's monotonic clock to a time observed at another part.
    pub fn advance_monotonic_to(&self, guest_ns: u64) {
        self.clock.advance_to(guest_ns);
    }

    /// Ends the machine permanently: flushes output, closes every descriptor and removes the files
    /// that existed only because they were open. Not for a machine that was handed over, nor for
    /// one that will be restored from a checkpoint. Dropping a `Wasi` keeps the files.
    pub fn finish(&self) {
        for (name, sink) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if let Err(error) = sink.flush() {
                tracing::warn!(name, %error, "output not flushed");
            }
        }
        let _namespace = self.files.shared();
        loop {
            let next = locked(&self.table).iter().next().map(|(fd, _)| fd);
            let Some(fd) = next else { return };
            let removed = locked(&self.table).remove(fd);
            if let Ok(descriptor) = removed {
                self.release(&descriptor);
            }
        }
    }
}

/// Opens a preopen; with `record` a captured volume.
fn open_root(
    preopen: &Preopen,
    record: Option<volume::VolumeRecord>,
    now_ns: u64,
) -> Result<Root, Error> {
    let place = match &preopen.source {
        Source::Host(host) => open_host(preopen, host)?,
        Source::Volume {
            folder,
            limits,
            stalls,
        } => {
            let opened = match record {
                Some(record) => Volume::restore(record, folder, *limits, stalls.clone(), None)
                    .map_err(|what| damaged_volume(preopen, &what))?,
                None => Volume::new(folder, *limits, stalls.clone(), now_ns)
                    .map_err(|source| failed_preopen(preopen, folder, source))?,
            };
            RootPlace::Volume(opened)
        }
        Source::Backed {
            folder,
            limits,
            stalls,
            backed,
        } => {
            // A new machine has no open files.
            let begins = record.is_none();
            let record = record.or_else(|| backed.record.clone());
            let record = record.unwrap_or_else(|| volume::VolumeRecord::empty(now_ns));
            let opened = Volume::restore(record, folder, *limits, stalls.clone(), Some(backed))
                .map_err(|what| damaged_volume(preopen, &what))?;
            if begins {
                opened.drop_orphans();
            }
            RootPlace::Volume(opened)
        }
    };
    Ok(Root {
        place,
        guest: preopen.guest.clone(),
        read_only: preopen.read_only,
    })
}

fn damaged_volume(preopen: &Preopen, what: &str) -> Error {
    Error::Damaged(format!("volume {:?}: {what}", preopen.guest))
}

fn failed_preopen(preopen: &Preopen, host: &Path, source: std::io::Error) -> Error {
    Error::Preopen {
        guest: preopen.guest.clone(),
        host: host.display().to_string(),
        source,
    }
}

fn open_host(preopen: &Preopen, host: &Path) -> Result<RootPlace, Error> {
    let failed = |source| failed_preopen(preopen, host, source);
    // Not `O_PATH`, as cap-std would: its times must be settable.
    let directory = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECTORY.bits().cast_signed())
        .open(host);
    let dir = Dir::from_std_file(directory.map_err(failed)?);
    let id = FileId::of_path(&dir.dir_metadata().map_err(failed)?);
    Ok(RootPlace::Host { dir, id })
}

fn initial_table(
    roots: &[Root],
    listeners: &[std::net::TcpListener],
    limits: Limits,
) -> Result<Table, Error> {
    let max = limits.descriptors_max as usize;
    let size = 3 + roots.len() + listeners.len();
    if size > max {
        return Err(Error::TooMany {
            what: "descriptors at the start",
            size,
            max,
        });
    }
    let mut table = Table::new(limits.descriptors_max);
    for (fd, kind) in [Kind::Stdin, Kind::Stdout, Kind::Stderr]
        .into_iter()
        .enumerate()
    {
        table.insert(
            fd as u32,
            Arc::new(Descriptor::new(kind, Dropped::default())),
        );
    }
    Ok(table)
}

fn random_bytes<const N: usize>() -> Result<[u8; N], Error> {
    use rand::TryRng;
    let mut bytes = [0; N];
    rand::rngs::SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(|error| Error::Seed(error.to_string()))?;
    Ok(bytes)
}
