//! A disk of a simulated computer. When power fails, any of the 512-byte sectors that were written
//! and not synced may be lost. A file of a snapshot is replaced as a whole, or not.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use tokio::sync::mpsc;

use super::super::log::{Disk, Write, queued};

const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct State {
    /// What survives a loss of power for certain, and what processes see.
    durable: Vec<u8>,
    seen: Vec<u8>,
    unsynced: Vec<Unsynced>,
    snapshot: Option<Vec<u8>>,
    is_full: bool,
    /// The process that has it open was refused a write for lack of space.
    has_refused: bool,
    /// Counts losses of power: a process of an earlier one has no access.
    boots: u64,
}

#[derive(Debug)]
enum Unsynced {
    Length(usize),
    Bytes(usize, Vec<u8>),
}

fn put(bytes: &mut Vec<u8>, change: &Unsynced) {
    match change {
        Unsynced::Length(length) => bytes.resize(*length, 0),
        Unsynced::Bytes(offset, piece) => {
            let end = offset + piece.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset..end].copy_from_slice(piece);
        }
    }
}

/// Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct SimulatedDisk(Arc<Mutex<State>>);

impl SimulatedDisk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_full(&self, is_full: bool) {
        self.lock().is_full = is_full;
    }

    pub(super) fn has_refused(&self) -> bool {
        self.lock().has_refused
    }

    /// The disk as one process sees it, until power fails.
    pub(super) fn open(&self) -> OpenDisk {
        let mut state = self.lock();
        state.has_refused = false;
        OpenDisk {
            boots: state.boots,
            disk: self.clone(),
        }
    }

    /// Loses some of what was not synced: with `loses_power` any of it, else nothing. Whatever had
    /// the disk open has it no more.
    pub(super) fn end_processes(&self, loses_power: bool, random: &mut StdRng) {
        let mut state = self.lock();
        state.boots += 1;
        let unsynced = std::mem::take(&mut state.unsynced);
        if loses_power {
            // All, nothing, or any.
            let kept = [0.0, 0.5, 1.0][random.random_range(0..3)];
            for change in &unsynced {
                let pieces = match change {
                    Unsynced::Length(length) => vec![Unsynced::Length(*length)],
                    Unsynced::Bytes(offset, bytes) => sectors(*offset, bytes),
                };
                for piece in pieces {
                    if random.random_bool(kept) {
                        put(&mut state.durable, &piece);
                    }
                }
            }
            state.seen = state.durable.clone();
        } else {
            state.durable = state.seen.clone();
        }
    }
}

/// The parts of a write that are written as a whole.
fn sectors(offset: usize, bytes: &[u8]) -> Vec<Unsynced> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let end = (SECTOR - (offset + at) % SECTOR + at).min(bytes.len());
        pieces.push(Unsynced::Bytes(offset + at, bytes[at..end].to_vec()));
        at = end;
    }
    pieces
}

/// A disk as one process has it open.
#[derive(Debug, Clone)]
pub(super) struct OpenDisk {
    disk: SimulatedDisk,
    boots: u64,
}

impl OpenDisk {
    fn lock(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.lock();
        match state.boots == self.boots {
            true => Ok(state),
            false => Err(io::Error::other("the process has ended")),
        }
    }

    fn lock_for_write(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock()?;
        if state.is_full {
            state.has_refused = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(state)
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().is_ok()
    }

    pub(super) fn replace_snapshot(&self, pieces: &[&[u8]]) -> io::Result<()> {
        self.lock_for_write()?.snapshot = Some(pieces.concat());
        Ok(())
    }

    pub(super) fn snapshot(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.lock()?.snapshot.clone())
    }

    /// Writes what a log queues, each time after as long as `pause` says.
    pub(super) async fn write_all(
        self,
        log: Disk,
        mut writes: mpsc::UnboundedReceiver<Write>,
        mut pause: impl AsyncFnMut() -> Duration,
    ) {
        while let Some(first) = writes.recv().await {
            tokio::time::sleep(pause().await).await;
            if !self.is_open() {
                return;
            }
            let written = log.write(queued(first, &mut writes));
            // On disk, and not told.
            tokio::time::sleep(pause().await / 2).await;
            if !self.is_open() || !written.finish() {
                return;
            }
        }
    }
}

impl redb::StorageBackend for OpenDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock()?.seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.lock()?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = state.seen.get(offset..offset + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut state = self.lock_for_write()?;
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let change = Unsynced::Length(length);
        put(&mut state.seen, &change);
        state.unsynced.push(change);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.lock_for_write()?;
        for change in std::mem::take(&mut state.unsynced) {
            put(&mut state.durable, &change);
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock_for_write()?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let change = Unsynced::Bytes(offset, bytes.to_vec());
        put(&mut state.seen, &change);
        state.unsynced.push(change);
        Ok(())
    }
}
