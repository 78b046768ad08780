//! A guest's serial console: its output is its machine's output, and what users type is its input.
//!
//! ```text
//!   type_in ──▶ socket, at most 16 bytes ──▶ QEMU's serial port (16 bytes, move with the guest) ──▶ guest
//!   log     ◀── socket ◀───────────────────────────────────────────────────────────────────────── guest
//! ```

use keel_machine::log::{Log, OutputRate, StreamKind, delay_of_held_output};
use keel_machine::worker::control::ConsoleInput;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvFlags, recv};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are read at once.
const PIECE_BYTES: usize = 16 << 10;
/// How long the guest waits until output that could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Bytes on their way to QEMU at once: as many as its port has room for.
const TYPED_BYTES: usize = 16;
/// How often it is looked whether QEMU has taken them.
const TAKEN_INTERVAL: Duration = Duration::from_micros(300);
/// Requests that type or wait for their turn: each occupies a thread.
const TYPISTS_MAX: usize = 8;
/// Sessions that are remembered.
const SESSIONS_MAX: usize = 256;

/// Both ends of the connection to a serial console.
pub(crate) struct Sockets {
    pub(crate) ours: UnixStream,
    /// The same as QEMU's, to take back what QEMU has not read.
    pub(crate) of_qemu: UnixStream,
}

/// The host's end of a serial console.
pub(crate) struct Console {
    /// Locked from a read until what was read is in the log.
    printed: Mutex<Printed>,
    /// Locked while something is typed.
    keyboard: Mutex<Keyboard>,
    /// Who types or waits for a turn.
    typists: AtomicUsize,
    /// Who waits until nothing is typed.
    waiting: AtomicUsize,
    log: Arc<Log>,
}

struct Keyboard {
    /// Does not block.
    socket: UnixStream,
    /// QEMU's end, until QEMU has ended. Empty while the keyboard is not locked.
    of_qemu: Option<UnixStream>,
    sessions: Sessions,
}

/// How many bytes of each session were typed, the last used session at the end.
#[derive(Default)]
struct Sessions(VecDeque<(u64, u64)>);

impl Sessions {
    fn typed(&self, session: u64) -> Option<u64> {
        let mut known = self.0.iter();
        known.find(|it| it.0 == session).map(|it| it.1)
    }

    fn set(&mut self, session: u64, typed: u64) {
        self.0.retain(|it| it.0 != session);
        self.0.push_back((session, typed));
        if self.0.len() > SESSIONS_MAX {
            self.0.pop_front();
        }
    }
}

/// One of those who type.
struct Typist<'a>(&'a AtomicUsize);

impl<'a> Typist<'a> {
    /// `None` if there are enough.
    fn count(typists: &'a AtomicUsize) -> Option<Self> {
        let typist = Typist(typists);
        (typists.fetch_add(1, Ordering::AcqRel) < TYPISTS_MAX).then_some(typist)
    }
}

impl Drop for Typist<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Keeps others from typing.
pub(crate) struct Quiet<'a> {
    keyboard: MutexGuard<'a, Keyboard>,
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
                sessions: Sessions::default(),
            }),
            typists: AtomicUsize::new(0),
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

    /// Types what the guest's port takes in time, while it `runs` and nobody wants the keyboard
    /// [quiet](Self::quiet); returns how many bytes of the session were typed, `None` if that is not
    /// known now. What was typed before is not typed again.
    ///
    /// # Errors
    /// If the piece may have been typed elsewhere, or QEMU's end is broken.
    pub(crate) fn type_in(
        &self,
        input: &ConsoleInput,
        patience: Duration,
        runs: impl Fn() -> bool,
    ) -> Result<Option<u64>, String> {
        let Some(_typist) = Typist::count(&self.typists) else {
            return Ok(None);
        };
        let deadline = Instant::now() + patience;
        let mut keyboard = self.keyboard();
        let mut typed = match keyboard.sessions.typed(input.session) {
            Some(typed) => typed,
            None if input.is_repeated && !input.bytes.is_empty() => {
                let count = input.bytes.len();
                return Err(format!(
                    "the last {count} bytes may have been typed, or not"
                ));
            }
            None => input.offset,
        };
        let Some(of_qemu) = &keyboard.of_qemu else {
            return Ok(None);
        };
        let is_over =
            || self.waiting.load(Ordering::Acquire) > 0 || Instant::now() >= deadline || !runs();
        let before = typed.saturating_sub(input.offset);
        let before = usize::try_from(before).unwrap_or(usize::MAX);
        let rest = input.bytes.get(before..).unwrap_or_default();
        let mut failed = Ok(());
        for piece in rest.chunks(TYPED_BYTES) {
            match type_piece(&keyboard.socket, of_qemu, piece, is_over) {
                Ok(count) => {
                    typed += count as u64;
                    if count < piece.len() {
                        break;
                    }
                }
                Err(error) => {
                    failed = Err(format!("its console is broken: {error}"));
                    break;
                }
            }
        }
        keyboard.sessions.set(input.session, typed);
        failed.map(|()| Some(typed))
    }

    /// Ends what is being typed, and keeps others from typing until the result is dropped: for
    /// stopping the guest.
    pub(crate) fn quiet(&self) -> Quiet<'_> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let keyboard = self.keyboard();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        Quiet { keyboard }
    }

    /// QEMU has ended: lets go of its end, and so ends what follows the output.
    pub(crate) fn close(&self) {
        self.quiet().keyboard.of_qemu = None;
    }

    fn keyboard(&self) -> MutexGuard<'_, Keyboard> {
        self.keyboard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Types a piece that QEMU reads at once or not at all; returns how much QEMU has read. The rest is
/// taken back: it would be lost if the guest moved.
fn type_piece(
    mut socket: &UnixStream,
    of_qemu: &UnixStream,
    piece: &[u8],
    is_over: impl Fn() -> bool,
) -> io::Result<usize> {
    if is_over() {
        return Ok(0);
    }
    // It is empty, so it takes all of the piece.
    socket.write_all(piece)?;
    while ioctl_fionread(of_qemu)? > 0 {
        if is_over() {
            let mut rest = [0; TYPED_BYTES];
            // QEMU may be faster. One that finds nothing waits for more.
            return match recv(of_qemu, &mut rest, RecvFlags::DONTWAIT) {
                Ok((count, _)) => Ok(piece.len().saturating_sub(count)),
                Err(Errno::AGAIN) => Ok(piece.len()),
                Err(error) => Err(error.into()),
            };
        }
        std::thread::sleep(TAKEN_INTERVAL);
    }
    Ok(piece.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::log::split_records;
    use std::sync::atomic::AtomicBool;

    /// Would be noticed if it were waited for.
    const LONG: Duration = Duration::from_secs(3600);

    /// After the first piece its thread waits a second or more.
    fn console(log: Arc<Log>) -> (Arc<Console>, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        let of_qemu = guest.try_clone().unwrap();
        let console = Console::follow(Sockets { ours, of_qemu }, log, 1).unwrap();
        (console, guest)
    }

    fn input(session: u64, offset: usize, bytes: &[u8]) -> ConsoleInput {
        ConsoleInput {
            session,
            offset: offset as u64,
            is_repeated: false,
            bytes: bytes.to_vec(),
        }
    }

    #[test]
    fn only_what_is_read_is_typed() {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(Log::open(folder.path(), 0).unwrap());
        let (console, mut guest) = console(log);
        let line = b"a line of more than two pieces\r";
        let whole = input(1, 0, line);
        let stopped = console.type_in(&whole, LONG, || false);
        assert_eq!(stopped, Ok(Some(0)), "nothing is typed at a stopped guest");
        // A guest that reads three bytes, and is stopped then.
        let has_read = AtomicBool::new(false);
        let mut read = vec![0; line.len()];
        let typed = std::thread::scope(|scope| {
            let typing =
                scope.spawn(|| console.type_in(&whole, LONG, || !has_read.load(Ordering::Acquire)));
            guest.read_exact(&mut read[..3]).unwrap();
            has_read.store(true, Ordering::Release);
            typing.join().unwrap()
        });
        assert_eq!(typed, Ok(Some(3)));
        assert_eq!(ioctl_fionread(&guest).unwrap(), 0, "the rest is taken back");
        // The same piece again: what was typed is not typed again.
        let rest = std::thread::scope(|scope| {
            let reader = scope.spawn(|| guest.read_exact(&mut read[3..]).unwrap());
            let typed = console.type_in(&input(1, 0, line), LONG, || true);
            reader.join().unwrap();
            typed
        });
        assert_eq!(rest, Ok(Some(line.len() as u64)));
        assert_eq!(read, line);
        let again = console.type_in(&input(1, 0, line), LONG, || true);
        assert_eq!(again, Ok(Some(line.len() as u64)));
        assert_eq!(ioctl_fionread(&guest).unwrap(), 0);
    }

    #[test]
    fn what_may_have_been_typed_is_typed_where_its_session_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(Log::open(folder.path(), 0).unwrap());
        let (console, mut guest) = console(log);
        let type_in = |input| console.type_in(&input, LONG, || true);
        let repeated = |input| ConsoleInput {
            is_repeated: true,
            ..input
        };
        assert!(type_in(repeated(input(1, 40, b"x"))).is_err());
        assert_eq!(type_in(repeated(input(1, 40, b""))), Ok(Some(40)));
        let mut read = [0; 2];
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| guest.read_exact(&mut read).unwrap());
            assert_eq!(type_in(repeated(input(1, 40, b"y"))), Ok(Some(41)));
            assert_eq!(type_in(input(2, 0, b"z")), Ok(Some(1)));
            reader.join().unwrap();
        });
        assert_eq!(&read, b"yz");
        // The oldest sessions are forgotten.
        for session in 3..=SESSIONS_MAX as u64 + 1 {
            assert_eq!(type_in(input(session, 0, b"")), Ok(Some(0)));
        }
        assert!(type_in(repeated(input(1, 41, b"x"))).is_err());
        assert_eq!(type_in(repeated(input(2, 0, b"z"))), Ok(Some(1)));
    }

    #[test]
    fn typing_ends_for_who_wants_it_quiet_and_with_qemu() {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(Log::open(folder.path(), 0).unwrap());
        let (console, guest) = console(log);
        let begun = |typists| {
            while console.typists.load(Ordering::Acquire) < typists
                || ioctl_fionread(&guest).unwrap() == 0
            {
                std::thread::yield_now();
            }
        };
        std::thread::scope(|scope| {
            // Nobody reads.
            let type_in = || console.type_in(&input(1, 0, b"x"), LONG, || true);
            let typing = scope.spawn(type_in);
            begun(1);
            drop(console.quiet());
            assert_eq!(typing.join().unwrap(), Ok(Some(0)));
            let typing: Vec<_> = (0..TYPISTS_MAX).map(|_| scope.spawn(type_in)).collect();
            begun(TYPISTS_MAX);
            assert_eq!(type_in(), Ok(None), "one more would wait for ever");
            console.close();
            for typing in typing {
                let typed = typing.join().unwrap();
                assert!(matches!(typed, Ok(None | Some(0))), "{typed:?}");
            }
            assert_eq!(type_in(), Ok(None));
        });
        // Nobody else has QEMU's end any more, so the thread that follows the output ends.
        drop(guest);
        while Arc::strong_count(&console) > 1 {
            std::thread::yield_now();
        }
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
