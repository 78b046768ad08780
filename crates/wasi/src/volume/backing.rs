//! Backend interface of a volume whose bytes are stored remotely: fetching blocks that are not in
//! its local folder, and making written bytes durable.
//!
//! Both take as long as a network. So a request returns a [`Pending`], for which a guest's thread
//! waits together with the wake-up of its next safepoint; a request continues even if no thread
//! waits for it. Implementations of [`Backing`] decide how bytes are stored.

use super::Volume;
use crate::abi::{Result, interrupted, types};
use crate::lock::locked;
use crate::wait::{Interrupt, Waited, wait};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use std::fmt::Debug;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Remote storage of a volume's bytes.
pub trait Backing: Send + Sync + Debug {
    /// Fetches blocks of a file into the folder, by [`Volume::fill`].
    fn fetch(&self, volume: &Arc<Volume>, inode: u64, blocks: Range<u64>) -> Pending;

    /// Makes all previous writes durable.
    fn sync(&self) -> Pending;

    /// Backpressure, called before a write: what to wait for if too many written bytes are not yet
    /// durable.
    fn backpressure(&self) -> Option<Pending>;
}

/// Why a request to a [`Backing`] failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Temporarily unavailable: to be retried. Users see this sentence.
    Unavailable(String),
    /// No space on the host's disk for fetched blocks.
    DiskFull,
    /// Permanent: the guest gets an I/O error.
    Lost,
}

#[derive(Debug)]
struct Shared {
    outcome: Mutex<Option<std::result::Result<(), Fault>>>,
    /// Readable once there is an outcome; `None` if the host is out of descriptors, which counts as
    /// [`Fault::Unavailable`].
    event: Option<OwnedFd>,
}

/// A pending request.
#[derive(Debug)]
pub struct Pending(Arc<Shared>);

/// The completing end of a [`Pending`]; dropping it without an outcome counts as
/// [`Fault::Unavailable`].
#[derive(Debug)]
pub struct Promise(Arc<Shared>);

impl Pending {
    /// Both ends.
    pub fn new() -> (Pending, Promise) {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            outcome: Mutex::new(match &event {
                Ok(_) => None,
                Err(error) => Some(Err(Fault::Unavailable(format!(
                    "no descriptor to wait on: {error}"
                )))),
            }),
            event: event.ok(),
        });
        (Pending(shared.clone()), Promise(shared))
    }

    /// The outcome, once known.
    pub fn outcome(&self) -> Option<std::result::Result<(), Fault>> {
        locked(&self.0.outcome).clone()
    }

    /// Waits for it.
    ///
    /// # Errors
    /// The call is interrupted, to be repeated.
    fn wait(&self, interrupt: &dyn Interrupt) -> Result<std::result::Result<(), Fault>> {
        loop {
            if let Some(outcome) = self.outcome() {
                return Ok(outcome);
            }
            let Some(event) = &self.0.event else {
                return Ok(Err(Fault::Lost));
            };
            let fds = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)];
            let (waited, _) = wait(&fds, None, interrupt.wakeup())?;
            if waited == Waited::Interrupted {
                return Err(interrupted());
            }
        }
    }
}

impl Promise {
    /// Sets the outcome.
    pub fn settle(self, outcome: std::result::Result<(), Fault>) {
        self.put(outcome);
    }

    fn put(&self, outcome: std::result::Result<(), Fault>) {
        {
            let mut known = locked(&self.0.outcome);
            if known.is_some() {
                return;
            }
            *known = Some(outcome);
        }
        if let Some(event) = &self.0.event
            && let Err(error) = rustix::io::write(event, &1_u64.to_ne_bytes())
        {
            tracing::error!(%error, "waiters of a volume are not woken");
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.put(Err(Fault::Unavailable("it was given up".into())));
    }
}

/// Repeats a request until it is done. Meanwhile the guest counts as paused.
///
/// # Errors
/// The call is interrupted, or the guest gets an I/O error.
pub(crate) fn wait_done(
    volume: &Volume,
    interrupt: &dyn Interrupt,
    mut ask: impl FnMut() -> Option<Pending>,
) -> Result<()> {
    let folder = volume.folder().to_string_lossy();
    loop {
        let Some(pending) = ask() else {
            break;
        };
        let reason = match pending.wait(interrupt)? {
            Ok(()) => break,
            Err(Fault::Lost) => return Err(types::Errno::Io.into()),
            Err(Fault::Unavailable(reason)) => reason,
            Err(Fault::DiskFull) => folder.to_string(),
        };
        volume
            .stalls()
            .wait_with_reason(&folder, &reason, interrupt)?;
    }
    volume.stalls().written(&folder);
    Ok(())
}

/// Configuration of a volume with a [`Backing`].
#[derive(Clone, Debug)]
pub struct Backed {
    /// Keeps its bytes.
    pub backing: Arc<dyn Backing>,
    /// Initial contents for a new machine; a snapshot has its own.
    pub record: Option<super::VolumeRecord>,
    /// Blocks in the local folder, by file; all others are fetched.
    pub local: LocalBlocks,
}

/// Blocks of files, by inode number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalBlocks(std::collections::BTreeMap<u64, super::blocks::BlockSet>);

impl LocalBlocks {
    /// Records fetched bytes of a file, starting at a block boundary.
    pub fn insert(&mut self, inode: u64, bytes: Range<u64>) {
        let blocks = super::blocks::blocks_of(bytes);
        self.0.entry(inode).or_default().insert(blocks);
    }

    /// Truncates a file's blocks.
    pub fn cut(&mut self, inode: u64, from: u64) {
        if let Some(set) = self.0.get_mut(&inode) {
            set.remove_from(from.div_ceil(super::BLOCK_BYTES));
            if set.is_empty() {
                self.0.remove(&inode);
            }
        }
    }

    pub(super) fn of(&self, inode: u64) -> Option<&super::blocks::BlockSet> {
        self.0.get(&inode)
    }

    /// The blocks' bytes, in order.
    pub fn bytes(&self) -> Vec<(u64, Range<u64>)> {
        let runs = |(inode, set): (&u64, &super::blocks::BlockSet)| {
            let inode = *inode;
            let runs = set.runs().into_iter();
            let bytes = |block: u64| block * super::BLOCK_BYTES;
            runs.map(move |run| (inode, bytes(run.start)..bytes(run.end)))
        };
        self.0.iter().flat_map(runs).collect()
    }
}
