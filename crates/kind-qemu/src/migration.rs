//! QEMU's migration stream, over the link between the workers of a move.
//!
//! ```text
//!   source                                              target
//!   QEMU ──▶ Unix socket ──▶ worker ══ link, TLS ══▶ worker ──▶ Unix socket ──▶ QEMU
//!            (`migrate`)      IMAGE … IMAGE_END                  (`migrate-incoming`)
//! ```
//!
//! QEMU itself decides what of the memory to send again, and throttles a guest that writes faster
//! than the link (auto-converge). Its limit for the downtime is 0, so that it goes on until
//! nothing is left, or until the worker stops the guest; before 8.0 it stops the guest itself after
//! one pass.

use crate::qmp::{PATIENCE, QmpError};
use crate::vm::{ENDED, Vm, VmEnd};
use keel_machine::link::{Link, LinkError, Message};
use keel_machine::worker::MoveError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use serde_json::json;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// The name of the socket in the worker's folder, which is QEMU's current directory.
const SOCKET: &str = "migration";

/// Bytes of the stream in one message.
const PIECE_BYTES: usize = 64 << 10;

/// The most bytes per second, which is no limit: the link has its own.
const BYTES_PER_S_MAX: u64 = 1 << 40;

/// How long QEMU may take, once all has been sent, to say that it is done.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// What QEMU says of a migration.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Info {
    #[serde(default)]
    pub(crate) status: String,
    #[serde(rename = "error-desc")]
    error: Option<String>,
    #[serde(default)]
    pub(crate) ram: Ram,
}

/// The memory's part.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
pub(crate) struct Ram {
    /// Bytes sent.
    pub(crate) transferred: u64,
    /// Bytes that are known to be left.
    pub(crate) remaining: u64,
    /// How often the pages that were written meanwhile were looked up.
    #[serde(rename = "dirty-sync-count")]
    pub(crate) rounds: u64,
}

impl Info {
    /// Whether it has ended.
    pub(crate) fn has_ended(&self) -> bool {
        ENDED.contains(&self.status.as_str())
    }

    /// # Errors
    /// If it has ended without success.
    pub(crate) fn check(&self) -> Result<(), MoveError> {
        if !self.has_ended() || self.status == "completed" {
            return Ok(());
        }
        let reason = self.error.as_deref().unwrap_or("no reason");
        Err(format!("QEMU's migration has {}: {reason}", self.status).into())
    }
}

/// What an outgoing migration uses, given back at its end.
struct Pumped {
    link: Link,
    result: Result<(), MoveError>,
}

/// The migration of a machine to another worker.
pub(crate) struct Outgoing {
    vm: Arc<Vm>,
    pump: JoinHandle<Pumped>,
}

fn set_up(vm: &Vm, is_source: bool) -> Result<(), QmpError> {
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = json!([
        capability("events", true),
        capability("auto-converge", is_source),
    ]);
    let qmp = vm.qmp()?;
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    )?;
    let parameters = json!({ "max-bandwidth": BYTES_PER_S_MAX, "downtime-limit": 0 });
    qmp.execute("migrate-set-parameters", parameters)
}

impl Outgoing {
    /// Begins to send the machine over `link`, while it runs.
    ///
    /// # Errors
    /// If QEMU refuses; the link is closed then.
    pub(crate) fn begin(vm: &Arc<Vm>, link: Link) -> Result<Self, MoveError> {
        vm.expect_migration();
        set_up(vm, true)?;
        let socket = accept(vm)?;
        let thread = std::thread::Builder::new().name("migration".into());
        let pump = thread.spawn(move || {
            let mut link = link;
            let result = send(&socket, &mut link);
            // A QEMU that still sends fails at once.
            let _ = socket.shutdown(Shutdown::Both);
            Pumped { link, result }
        })?;
        Ok(Outgoing {
            vm: vm.clone(),
            pump,
        })
    }

    /// How far it is.
    pub(crate) fn info(&self) -> Result<Info, QmpError> {
        self.vm.qmp()?.query("query-migrate")
    }

    /// Waits until all of a stopped guest has been sent; gives the link back.
    pub(crate) fn finish(self) -> (Link, Result<(), MoveError>) {
        let Pumped { link, result } = join(self.pump);
        let has_ended = self.vm.wait_for_migration(END_PATIENCE, &ENDED).is_some();
        let info = self.vm.qmp().and_then(|qmp| qmp.query("query-migrate"));
        let checked = match info {
            // What QEMU says of it would only follow from this.
            _ if result.is_err() => result,
            Ok(_) if !has_ended => Err("QEMU's migration does not end".into()),
            Ok(info) => Info::check(&info),
            Err(error) => Err(error.into()),
        };
        (link, checked)
    }

    /// The link of a migration that was cancelled.
    pub(crate) fn into_link(self) -> Link {
        join(self.pump).link
    }
}

fn join(pump: JoinHandle<Pumped>) -> Pumped {
    pump.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Makes QEMU connect to this worker.
fn accept(vm: &Vm) -> Result<UnixStream, MoveError> {
    let path = vm.folder().join(SOCKET);
    // Of an earlier move.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    let migrate = json!({ "uri": format!("unix:{SOCKET}") });
    vm.qmp()?.execute("migrate", migrate)?;
    let mut wait = [PollFd::new(&listener, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: PATIENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    if poll(&mut wait, Some(&patience)).map_err(io::Error::from)? == 0 {
        return Err("QEMU does not begin its migration".into());
    }
    let (socket, _) = listener.accept()?;
    let _ = fs::remove_file(&path);
    Ok(socket)
}

/// Sends the stream until QEMU closes it.
fn send(mut socket: &UnixStream, link: &mut Link) -> Result<(), MoveError> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = socket.read(&mut piece)?;
        if count == 0 {
            link.flush()?;
            return Ok(());
        }
        link.send(&Message::Image(piece[..count].to_vec().into()))?;
        if count < PIECE_BYTES {
            // Nothing more is there now.
            link.flush()?;
        }
    }
}

/// The migration of a machine from another worker.
pub(crate) struct Incoming {
    vm: Arc<Vm>,
    socket: UnixStream,
}

impl Incoming {
    /// Prepares QEMU, which was started for this.
    ///
    /// # Errors
    /// If it refuses.
    pub(crate) fn begin(vm: &Arc<Vm>) -> Result<Self, MoveError> {
        set_up(vm, false)?;
        let path = vm.folder().join(SOCKET);
        let _ = fs::remove_file(&path);
        let listen = json!({ "uri": format!("unix:{SOCKET}") });
        vm.qmp()?.execute("migrate-incoming", listen)?;
        let socket = UnixStream::connect(&path)?;
        let _ = fs::remove_file(&path);
        Ok(Incoming {
            vm: vm.clone(),
            socket,
        })
    }

    /// Passes a piece on.
    ///
    /// # Errors
    /// If QEMU does not take it: why, if it says so.
    pub(crate) fn take(&mut self, piece: &[u8]) -> Result<(), MoveError> {
        let written = self.socket.write_all(piece);
        written.map_err(|error| self.why(&error.to_string()))
    }

    /// Everything was passed on: waits until QEMU has the whole machine, paused.
    ///
    /// # Errors
    /// If it does not.
    pub(crate) fn finish(self) -> Result<(), MoveError> {
        self.socket.shutdown(Shutdown::Write)?;
        let status = self.vm.wait_for_migration(END_PATIENCE, &ENDED);
        match status.as_deref() {
            Some("completed") => Ok(()),
            Some(other) => Err(self.why(other)),
            None => Err(self.why("it does not end")),
        }
    }

    fn why(&self, seen: &str) -> MoveError {
        let end = self.vm.end_within(Duration::from_secs(1));
        match end {
            Some(VmEnd::Failed(reason)) => LinkError::Aborted(reason).into(),
            _ => LinkError::Aborted(format!("QEMU does not take the machine: {seen}")).into(),
        }
    }
}
