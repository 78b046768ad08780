//! The way of a machine's own disk to the target of a move.
//!
//! ```text
//!   source                                                            target
//!   QEMU ──▶ Unix socket ──▶ worker ══ link, DISK_REQUESTS ══▶ worker ──▶ Unix socket ──▶ QEMU
//!        ◀──             ◀──        ◀═ link, DISK_ANSWERS ═══         ◀──             ◀──
//!   (`blockdev-mirror`)                                                         (NBD server)
//! ```
//!
//! The target has made an empty layer over the same image. While the guest runs, the source's QEMU
//! copies its layer there, and then again and again what the guest has written meanwhile. The rest is
//! copied once the guest is stopped, and before the target has the machine: it is on the target's disk
//! then, because QEMU flushes it. The disk of the source stays as it is, for a move that fails. Memory
//! and devices go another way ([`crate::migration`]).
//!
//! QEMU's other way, in which each write of the guest goes to both disks (`write-blocking`), would
//! make the guest's disk as slow as the way to the target, and as fragile as that.

use crate::block_job::COPY;
use crate::channel::{Channel, IncomingChannels};
use crate::qmp::{PATIENCE, QmpError};
use crate::relay::Relay;
use crate::root_disk::ROOT;
use crate::vm::Vm;
use keel_machine::worker::MoveError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// The name of the socket in the worker's folder, which is QEMU's current directory.
const SOCKET: &str = "disk";
/// How long QEMU may take to copy the rest of a stopped guest's disk, until the target's disk has it.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// The copy of a disk, at its source.
pub(crate) struct OutgoingDisk {
    vm: Arc<Vm>,
    _relays: [Relay; 2],
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct DiskProgress {
    pub(crate) copied_bytes: u64,
    pub(crate) left_bytes: u64,
    /// All was copied once: what is left was written since.
    pub(crate) is_copied: bool,
}

impl OutgoingDisk {
    /// Begins to copy the disk to the target, while the guest runs. After an error it may be left in
    /// part, for [`crate::attempt::undo`].
    ///
    /// # Errors
    /// If one of the QEMUs refuses, or the target does not answer.
    pub(crate) fn begin(vm: &Arc<Vm>, channel: Channel) -> Result<Self, MoveError> {
        // What an earlier move has left.
        COPY.cancel(vm)?;
        let path = vm.folder().join(SOCKET);
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let thread = std::thread::Builder::new().name("disk".into());
        let relays = thread.spawn(move || relays(&listener, channel))?;
        vm.forget_job(COPY.id);
        let opened = vm.qmp()?.execute(
            "blockdev-add",
            json!({
                "driver": "nbd",
                "node-name": COPY.target,
                "server": { "type": "unix", "path": SOCKET },
                "export": ROOT,
                "discard": "unmap",
            }),
        );
        let _ = fs::remove_file(&path);
        let relays = join(relays);
        opened?;
        let outgoing = OutgoingDisk {
            vm: vm.clone(),
            _relays: relays?,
        };
        vm.qmp()?.execute(
            "blockdev-mirror",
            json!({
                "job-id": COPY.id,
                "device": ROOT,
                "target": COPY.target,
                // The image below is there.
                "sync": "top",
                "filter-node-name": COPY.filter,
                "copy-mode": "background",
            }),
        )?;
        Ok(outgoing)
    }

    /// How far it is.
    ///
    /// # Errors
    /// If it has failed.
    pub(crate) fn progress(&self) -> Result<DiskProgress, MoveError> {
        let Some(job) = COPY.state(&self.vm)? else {
            let end = self.vm.job_end_within(COPY.id, PATIENCE);
            return Err(failed(end.and_then(Result::err)));
        };
        Ok(DiskProgress {
            copied_bytes: job.offset,
            left_bytes: job.len.saturating_sub(job.offset),
            is_copied: job.ready,
        })
    }

    /// Ends the copy of a stopped guest's disk: the target has all of it then.
    ///
    /// # Errors
    /// If it has not.
    pub(crate) fn finish(&self) -> Result<(), MoveError> {
        let qmp = self.vm.qmp()?;
        // Of a disk that was copied once, this copies the rest.
        match qmp.execute("block-job-cancel", json!({ "device": COPY.id })) {
            // It has ended already.
            Err(QmpError::Refused { .. }) => {}
            told => told?,
        }
        match self.vm.job_end_within(COPY.id, END_PATIENCE) {
            Some(Ok(())) => Ok(qmp.execute("blockdev-del", json!({ "node-name": COPY.target }))?),
            Some(Err(reason)) => Err(failed(Some(reason))),
            None => Err("QEMU does not end the copy of the machine's disk".into()),
        }
    }
}

fn failed(reason: Option<String>) -> MoveError {
    let reason = reason.unwrap_or_else(|| "it ended too early".into());
    format!("its disk cannot be copied to the target: {reason}").into()
}

/// Accepts QEMU, and connects it with the target.
fn relays(listener: &UnixListener, channel: Channel) -> Result<[Relay; 2], MoveError> {
    let mut wait = [PollFd::new(listener, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    if poll(&mut wait, Some(&patience)).map_err(io::Error::from)? == 0 {
        return Err("QEMU does not begin to copy the machine's disk".into());
    }
    let (socket, _) = listener.accept()?;
    channel.at_source(&socket)
}

/// The copy of a disk, at its target.
pub(crate) struct IncomingDisk {
    vm: Arc<Vm>,
    relays: JoinHandle<Result<[Relay; 2], MoveError>>,
}

impl IncomingDisk {
    /// Lets the source write the disk of a QEMU that was started for this, once it has connected.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub(crate) fn begin(vm: &Arc<Vm>, channels: Arc<IncomingChannels>) -> Result<Self, MoveError> {
        let qmp = vm.qmp()?;
        let address = json!({ "type": "unix", "data": { "path": SOCKET } });
        qmp.execute(
            "nbd-server-start",
            json!({ "addr": address, "max-connections": 1 }),
        )?;
        qmp.execute(
            "block-export-add",
            json!({ "type": "nbd", "id": ROOT, "node-name": ROOT, "name": ROOT, "writable": true }),
        )?;
        let path = vm.folder().join(SOCKET);
        let thread = std::thread::Builder::new().name("disk".into());
        let relays = thread.spawn(move || {
            let channel = channels.disk.first()?;
            // QEMU closes a connection over which nothing comes for some seconds.
            let socket = UnixStream::connect(&path)?;
            let _ = fs::remove_file(&path);
            channel.at_target(&socket)
        })?;
        Ok(IncomingDisk {
            vm: vm.clone(),
            relays,
        })
    }

    /// The source has written all: nobody but the guest writes the disk from now on.
    ///
    /// # Errors
    /// If the source never wrote it, or QEMU does not end that.
    pub(crate) fn finish(self) -> Result<(), MoveError> {
        join(self.relays)?;
        Ok(self.vm.qmp()?.execute("nbd-server-stop", json!({}))?)
    }
}

fn join<T>(thread: JoinHandle<T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
