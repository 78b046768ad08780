//! The WASI state of a machine, and how a fresh machine starts with it.

use crate::clock::GuestClock;
use crate::config::{Config, Limits, check_preopen_names, check_strings};
use crate::descriptor::{
    Descriptor, Dropped, Kind, Listener, OpenDirectory, Place as DirPlace, Table,
};
use crate::error::Error;
use crate::lock::locked;
use crate::network::Network;
use crate::random::Random;
use crate::root::{Root, RootPlace, open_root};
use crate::stream::{Sink, Stdin};
use crate::unlinked_open::OpenFiles;
use crate::volume::Volume;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// The WASI side of one machine, shared by all its threads.
pub struct Wasi {
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) roots: Vec<Root>,
    pub(crate) network: Network,
    pub(crate) table: Mutex<Table>,
    pub(crate) files: OpenFiles,
    pub(crate) stdin: Stdin,
    pub(crate) stdout: Box<dyn Sink>,
    pub(crate) stderr: Box<dyn Sink>,
    pub(crate) clock: GuestClock,
    pub(crate) random: Random,
    pub(crate) limits: Limits,
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

impl Wasi {
    /// The state of a fresh machine.
    ///
    /// # Errors
    /// If strings contain NUL bytes, a limit is exceeded, or a directory of the host cannot be
    /// used.
    pub fn new(config: Config) -> Result<Wasi, Error> {
        check_strings(&config.args, &config.env)?;
        check_preopen_names(config.preopens.iter().map(|p| p.guest.as_str()))?;
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
        let table = initial_table(&roots, config.listeners, limits)?;
        let mut wasi = Wasi {
            args: config.args,
            env: config.env,
            roots,
            network: Network::new(config.listeners),
            table: Mutex::new(table),
            files: OpenFiles::new(machine, 0),
            stdin: Stdin::new(config.stdin),
            stdout: config.stdout,
            stderr: config.stderr,
            clock,
            random: Random::new(seed, BTreeMap::new()),
            limits,
        };
        wasi.open_initial()?;
        Ok(wasi)
    }

    /// Adds listeners and preopens, after standard input, output, error.
    fn open_initial(&mut self) -> Result<(), Error> {
        for index in 0..self.network.listeners() {
            if let Some(backlog) = self.network.listener(index) {
                self.push_first(Kind::Listener(Listener {
                    backlog,
                    index,
                    nonblocking: AtomicBool::new(false),
                }))?;
            }
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

    /// The machine's listeners and connections, for who carries them.
    pub fn network(&self) -> &Network {
        &self.network
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

fn initial_table(roots: &[Root], listeners: u32, limits: Limits) -> Result<Table, Error> {
    let max = limits.descriptors_max as usize;
    let size = 3 + roots.len() + listeners as usize;
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
