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
    /// Locked from a read until what was read is in the log.
    input: Mutex<Input>,
    log: Arc<Log>,
}

#[derive(Debug)]
struct Input {
    /// Does not block.
    socket: UnixStream,
    /// What was read and could not be written, for lack of space.
    pending: Vec<u8>,
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
            input: Mutex::new(Input {
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
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        if input.pending.is_empty() {
            let mut piece = [0; PIECE_BYTES];
            match (&input.socket).read(&mut piece) {
                Ok(count) => input.pending.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The other end is gone.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                Err(error) => return Err(error),
            }
        }
        let count = input.pending.len();
        if count > 0 {
            self.log.append(StreamKind::Output, &input.pending)?;
            input.pending.clear();
        }
        Ok(Some(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::log::split_records;
    use std::io::Write;

    #[test]
    fn what_was_printed_is_in_the_log_once_it_is_drained() {
        let folder = tempfile::tempdir().unwrap();
        let log = Arc::new(Log::open(folder.path(), 0).unwrap());
        let (ours, mut guest) = UnixStream::pair().unwrap();
        // After the first piece the thread waits a second or more.
        let console = Console::follow(ours, log.clone(), 1).unwrap();
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
