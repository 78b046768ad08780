//! A guest's serial console: its output is its machine's output, and what users type is its input.
//!
//! ```text
//!   type_in ──▶ socket, at most 16 bytes ──▶ QEMU's serial port (16 bytes, move with the guest) ──▶ guest
//!   log     ◀── socket ◀───────────────────────────────────────────────────────────────────────── guest
//! ```

use keel_machine::log::{Log, OutputRate, StreamKind, delay_of_held_output};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are read at once.
const PIECE_BYTES: usize = 16 << 10;
/// How long the guest waits until output that could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Bytes on their way to QEMU at once: they get lost if the guest moves before its port has room
/// for them.
const TYPED_BYTES: usize = 16;
/// How often it is looked whether QEMU has taken them.
const TAKEN_INTERVAL: Duration = Duration::from_micros(300);

/// Both ends of the connection to a serial console.
pub(crate) struct Sockets {
    pub(crate) ours: UnixStream,
    /// The same as QEMU's, to see how much of it QEMU has not read.
    pub(crate) of_qemu: UnixStream,
}

/// The host's end of a serial console.
pub(crate) struct Console {
    /// Locked from a read until what was read is in the log.
    printed: Mutex<Printed>,
    /// Locked while something is typed.
    keyboard: Mutex<Keyboard>,
    /// Who waits until nothing is typed.
    waiting: AtomicUsize,
    log: Arc<Log>,
}

struct Keyboard {
    /// Does not block.
    socket: UnixStream,
    /// QEMU's end, until QEMU has ended.
    of_qemu: Option<UnixStream>,
}

/// Keeps others from typing.
pub(crate) struct Quiet<'a> {
    _keyboard: MutexGuard<'a, Keyboard>,
}

#[derive(Debug)]
struct Printed {
    /// Does not block.
    socket: UnixStream,
    /// What was read and could not be written, for lack of space.
    pending: Vec<u8>,
}

impl Console {
    /// Copies the console's output to `log`, at most `bytes_per_s`, until QEMU closes its end. A
    /// guest that prints faster waits, as with a slow serial line.
    pub(crate) fn follow(
        sockets: Sockets,
        log: Arc<Log>,
        bytes_per_s: u64,
    ) -> io::Result<Arc<Self>> {
        let socket = sockets.ours;
        socket.set_nonblocking(true)?;
        let waiting = socket.try_clone()?;
        let console = Arc::new(Console {
            keyboard: Mutex::new(Keyboard {
                socket: socket.try_clone()?,
                of_qemu: Some(sockets.of_qemu),
            }),
            waiting: AtomicUsize::new(0),
            printed: Mutex::new(Printed {
                socket,
                pending: Vec::new(),
            }),
            log,
        });
        let reader = console.clone();
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                let mut rate = OutputRate::new(bytes_per_s);
                loop {
                    let mut wait = [PollFd::new(&waiting, PollFlags::IN)];
                    // After any wake-up the socket is read.
                    let _ = poll(&mut wait, None);
                    match reader.read_some() {
                        Ok(Some(0)) => return,
                        Ok(Some(count)) => rate.wrote(count),
                        Ok(None) => {}
                        Err(error) => {
                            tracing::warn!(%error, "the console's output cannot be written");
                            std::thread::sleep(RETRY_AFTER);
                        }
                    }
                    while let Some(delay) =
                        delay_of_held_output(&reader.log).or_else(|| rate.delay())
                    {
                        std::thread::sleep(delay);
                    }
                }
            })?;
        Ok(console)
    }

    /// Copies what a stopped guest has printed: afterwards the log has all of it.
    pub(crate) fn drain(&self) -> io::Result<()> {
        while self.read_some()?.is_some_and(|count| count > 0) {}
        Ok(())
    }

    /// Copies one piece; returns its size, 0 at the end, and none if there is nothing now.
    ///
    /// # Errors
    /// If it cannot be written: it is kept.
    fn read_some(&self) -> io::Result<Option<usize>> {
        let mut printed = self.printed.lock().unwrap_or_else(PoisonError::into_inner);
        if printed.pending.is_empty() {
            let mut piece = [0; PIECE_BYTES];
            match (&printed.socket).read(&mut piece) {
                Ok(count) => printed.pending.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The other end is gone.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => return Err(error),
            }
        }
        let count = printed.pending.len();
        if count > 0 {
            self.log.append(StreamKind::Output, &printed.pending)?;
            printed.pending.clear();
        }
        Ok(Some(count))
    }

    /// Types what the guest's port takes in time, and while nobody wants it [quiet](Self::quiet);
    /// returns how many bytes that were. Nothing is typed unless the guest `runs`.
    ///
    /// # Errors
    /// If QEMU has ended.
    pub(crate) fn type_in(
        &self,
        bytes: &[u8],
        patience: Duration,
        runs: impl Fn() -> bool,
    ) -> io::Result<usize> {
        let deadline = Instant::now() + patience;
        let keyboard = self.keyboard();
        let Some(of_qemu) = &keyboard.of_qemu else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let is_over = || self.waiting.load(Ordering::Acquire) > 0 || Instant::now() >= deadline;
        let mut typed = 0;
        for piece in bytes.chunks(TYPED_BYTES) {
            // Also what an earlier request has left.
            while ioctl_fionread(of_qemu)? > 0 && !is_over() {
                std::thread::sleep(TAKEN_INTERVAL);
            }
            if ioctl_fionread(of_qemu)? > 0 || is_over() || !runs() {
                break;
            }
            // The socket is empty, so it takes all of a piece or is broken.
            (&keyboard.socket).write_all(piece)?;
            typed += piece.len();
        }
        // So that the guest has them, if it can.
        while ioctl_fionread(of_qemu)? > 0 && !is_over() {
            std::thread::sleep(TAKEN_INTERVAL);
        }
        Ok(typed)
    }

    /// Ends what is being typed, and keeps others from typing until the result is dropped: for
    /// stopping the guest.
    pub(crate) fn quiet(&self) -> Quiet<'_> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let keyboard = self.keyboard();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        Quiet {
            _keyboard: keyboard,
        }
    }

    /// QEMU has ended: lets go of its end, and so ends what follows the output.
    pub(crate) fn close(&self) {
        self.keyboard().of_qemu = None;
    }

    fn keyboard(&self) -> MutexGuard<'_, Keyboard> {
        self.keyboard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::log::split_records;

    /// After the first piece its thread waits a second or more.
    fn console(log: Arc<Log>) -> (Arc<Console>, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        let of_qemu = guest.try_clone().unwrap();
        let console = Console::follow(Sockets { ours, of_qemu }, log, 1).unwrap();
        (console, guest)
    }

    #[test]
    fn only_what_is_read_is_typed() {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(Log::open(folder.path(), 0).unwrap());
        let (console, mut guest) = console(log);
        let none = Duration::ZERO;
        let patience = Duration::from_secs(60);
        assert_eq!(console.type_in(b"stopped", patience, || false).unwrap(), 0);
        // Nobody reads: one piece is on its way, and nothing follows it.
        let line = b"a line of more than two pieces\r";
        let begun = console.type_in(line, Duration::from_millis(50), || true);
        assert_eq!(begun.unwrap(), TYPED_BYTES);
        assert_eq!(console.type_in(&line[16..], none, || true).unwrap(), 0);
        let reader = std::thread::spawn(move || {
            let mut read = vec![0; line.len()];
            guest.read_exact(&mut read).unwrap();
            (guest, read)
        });
        let rest = console.type_in(&line[16..], patience, || true).unwrap();
        assert_eq!(rest, line.len() - TYPED_BYTES);
        let (guest, read) = reader.join().unwrap();
        assert_eq!(read, line);
        // A long text that nobody reads ends once it is to be quiet.
        std::thread::scope(|scope| {
            let typing = scope.spawn(|| console.type_in(&[b'x'; 100], patience, || true));
            while ioctl_fionread(&guest).unwrap() == 0 {
                std::thread::yield_now();
            }
            drop(console.quiet());
            assert_eq!(typing.join().unwrap().unwrap(), TYPED_BYTES);
        });
        console.close();
        assert!(console.type_in(b"x", patience, || true).is_err());
    }

    #[test]
    fn what_was_printed_is_in_the_log_once_it_is_drained() {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(Log::open(folder.path(), 0).unwrap());
        let (console, mut guest) = console(log.clone());
        let printed: String = (0..1000).map(|line| format!("line {line}\n")).collect();
        // At once: the kernel keeps few small pieces.
        guest.write_all(printed.as_bytes()).unwrap();
        console.drain().unwrap();
        let (_, mut bytes) = log.read(0, 1 << 20).unwrap();
        let records = split_records(&mut bytes).into_iter();
        let text: Vec<u8> = records.flat_map(|(_, text)| text).collect();
        assert_eq!(text, printed.as_bytes());
        drop(guest);
        console.drain().unwrap();
    }
}
