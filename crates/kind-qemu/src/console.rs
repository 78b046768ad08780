//! A guest's serial console, whose output is its machine's output.

use keel_machine::log::{Log, OutputRate, StreamKind, delay_of_held_output};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes that are read at once.
const PIECE_BYTES: usize = 16 << 10;
/// How long the guest waits until output that could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The host's end of a serial console.
pub(crate) struct Console {
    /// Does not block; locked from a read until what was read is in the log.
    socket: Mutex<UnixStream>,
    log: Arc<Log>,
}

impl Console {
    /// Copies the console's output to `log`, at most `bytes_per_s`, until QEMU closes its end. A
    /// guest that prints faster waits, as with a slow serial line.
    pub(crate) fn follow(
        socket: UnixStream,
        log: Arc<Log>,
        bytes_per_s: u64,
    ) -> io::Result<Arc<Self>> {
        socket.set_nonblocking(true)?;
        let waiting = socket.try_clone()?;
        let console = Arc::new(Console {
            socket: Mutex::new(socket),
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
    fn read_some(&self) -> io::Result<Option<usize>> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut piece = [0; PIECE_BYTES];
        match (&*socket).read(&mut piece) {
            Ok(count) => {
                self.log.append(StreamKind::Output, &piece[..count])?;
                Ok(Some(count))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The other end is gone.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some(0)),
            Err(error) => Err(error),
        }
    }
}
