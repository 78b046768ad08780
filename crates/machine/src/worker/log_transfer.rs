//! Transfer of a machine's output during a move.
//!
//! ```text
//!   source                                target
//!     │ LOG (offset, bytes) … ────────────▶│ appends contiguous output
//!     │ LOG_BEGINS (offset) ──────────────▶│ earlier output is no longer kept
//!     │ ROUND_END, or IMAGE_END ──────────▶│ was there a gap?
//!     │◀─────────────── LOG_RESEND (offset)│ then output from there on
//!     │ LOG …                              │
//! ```
//!
//! A gap has two causes. First, the source keeps only the newest output: if a machine
//! prints faster than its memory is copied, output that was to be sent next may be
//! dropped. Second, output may be missing at the target while the source still has it. So
//! a gap is no reason to give the move up: a second attempt would find the same gap.

use crate::link::{CHUNK_BYTES, Link, LinkError, Message};
use crate::log::Log;
use std::io;
use std::sync::Arc;

/// How often output is requested again in one move.
const AGAIN_MAX: u32 = 16;

/// The source's side.
#[derive(Debug)]
pub struct LogSource {
    log: Arc<Log>,
    /// Offset of the next bytes to send.
    next: u64,
}

impl LogSource {
    pub fn new(log: Arc<Log>) -> Self {
        LogSource {
            next: log.base(),
            log,
        }
    }

    /// The next message; `None` once all output was sent.
    fn next_message(&mut self) -> io::Result<Option<Message>> {
        let (offset, bytes) = self.log.read(self.next, CHUNK_BYTES)?;
        if offset > self.next {
            self.next = offset;
            return Ok(Some(Message::LogBegins { offset }));
        }
        if bytes.is_empty() {
            return Ok(None);
        }
        self.next = offset + bytes.len() as u64;
        Ok(Some(Message::Log {
            offset,
            bytes: bytes.into(),
        }))
    }

    /// Sends all output that was not sent.
    ///
    /// # Errors
    /// If the output cannot be read, or the connection is lost.
    pub fn send(&mut self, link: &mut Link) -> Result<(), LinkError> {
        while let Some(message) = self.next_message()? {
            link.send(&message)?;
        }
        Ok(())
    }

    /// The target's answer to a round. Output that it lacks is sent in the next round.
    ///
    /// # Errors
    /// [`LinkError`] if the connection is lost, or the target gave up.
    pub fn round_answer(&mut self, link: &mut Link) -> Result<Message, LinkError> {
        loop {
            match link.receive()? {
                Message::LogResend { offset } => self.resume_from(offset),
                other => return Ok(other),
            }
        }
    }

    /// Waits until the target has everything, after `IMAGE_END`. Output that it lacks is
    /// sent at once.
    ///
    /// # Errors
    /// [`LinkError`] if the connection is lost, the target gave up, or it sends anything else.
    pub fn wait_prepared(&mut self, link: &mut Link) -> Result<(), LinkError> {
        loop {
            match link.receive()? {
                Message::Prepared => return Ok(()),
                Message::LogResend { offset } => {
                    self.resume_from(offset);
                    self.send(link)?;
                    link.send(&Message::ImageEnd)?;
                    link.flush()?;
                }
                other => return Err(LinkError::Message(format!("{other:?} out of turn"))),
            }
        }
    }

    /// Continues from an offset that the target requests.
    fn resume_from(&mut self, offset: u64) {
        self.next = self.next.min(offset);
    }
}

/// The target's side.
#[derive(Debug)]
pub struct LogTarget {
    log: Arc<Log>,
    /// Whether a piece did not follow the end of the log.
    lacks: bool,
    requests: u32,
}

impl LogTarget {
    pub fn new(log: Arc<Log>) -> Self {
        LogTarget {
            log,
            lacks: false,
            requests: 0,
        }
    }

    /// Adds output at an offset; a piece that does not follow the end is requested again.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn take(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset > self.log.end() {
            self.lacks = true;
            return Ok(());
        }
        self.log.write_at(offset, bytes)
    }

    /// Output before an offset is no longer kept anywhere.
    ///
    /// # Errors
    /// If this cannot be recorded on disk.
    pub fn begins(&mut self, offset: u64) -> io::Result<()> {
        self.log.begin_at(offset)
    }

    /// At the end of a round: requests missing output. Whether any was missing; then the
    /// caller flushes.
    ///
    /// # Errors
    /// If output was requested too often, or the connection is lost.
    pub fn request_missing(&mut self, link: &mut Link) -> Result<bool, LinkError> {
        let request = self.missing()?;
        if let Some(request) = &request {
            link.send(request)?;
        }
        Ok(request.is_some())
    }

    fn missing(&mut self) -> io::Result<Option<Message>> {
        if !std::mem::take(&mut self.lacks) {
            return Ok(None);
        }
        self.requests += 1;
        let offset = self.log.end();
        if self.requests > AGAIN_MAX {
            return Err(io::Error::other(format!(
                "output from {offset} on is missing after repeated requests"
            )));
        }
        Ok(Some(Message::LogResend { offset }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{SEGMENT_BYTES_MAX, StreamKind};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    fn log(folder: &tempfile::TempDir) -> Arc<Log> {
        Arc::new(Log::open(folder.path(), 0).unwrap())
    }

    fn content(log: &Log) -> (u64, Vec<u8>) {
        let (mut at, mut all) = (log.base(), Vec::new());
        loop {
            let (offset, bytes) = log.read(at, 1 << 20).unwrap();
            if bytes.is_empty() {
                return (log.base(), all);
            }
            assert_eq!(offset, at);
            at += bytes.len() as u64;
            all.extend(bytes);
        }
    }

    /// Sends all output; `lost` decides for each piece whether it is lost.
    fn round(source: &mut LogSource, target: &mut LogTarget, mut lost: impl FnMut() -> bool) {
        while let Some(message) = source.next_message().unwrap() {
            match message {
                Message::Log { .. } if lost() => {}
                Message::Log { offset, bytes } => target.take(offset, &bytes).unwrap(),
                Message::LogBegins { offset } => target.begins(offset).unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn missing_output_is_requested_again() {
        for seed in 0..50 {
            let mut random = StdRng::seed_from_u64(seed);
            let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
            let [here, there] = [log(&folders[0]), log(&folders[1])];
            let (mut source, mut target) =
                (LogSource::new(here.clone()), LogTarget::new(there.clone()));
            let mut requests = 0;
            for number in 0..12u8 {
                for _ in 0..random.random_range(0..4) {
                    let text = vec![number; random.random_range(1..60_000)];
                    here.append(StreamKind::Output, &text).unwrap();
                }
                // The last pieces are not lost.
                round(&mut source, &mut target, || {
                    number < 10 && random.random_bool(0.3)
                });
                if let Some(Message::LogResend { offset }) = target.missing().unwrap() {
                    assert_eq!(offset, there.end());
                    source.resume_from(offset);
                    requests += 1;
                }
            }
            // The loss of the last piece is noticed only when another follows.
            here.append(StreamKind::Output, b"end").unwrap();
            for _ in 0..2 {
                round(&mut source, &mut target, || false);
                if let Some(Message::LogResend { offset }) = target.missing().unwrap() {
                    source.resume_from(offset);
                }
            }
            assert_eq!(content(&there), content(&here), "seed {seed}");
            assert!(requests <= AGAIN_MAX);
        }
    }

    #[test]
    fn dropped_output_is_no_gap() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [here, there] = [log(&folders[0]), log(&folders[1])];
        here.append(StreamKind::Output, b"first").unwrap();
        let mut source = LogSource::new(here.clone());
        let mut target = LogTarget::new(there.clone());
        round(&mut source, &mut target, || false);
        // More is printed during the copy than is kept.
        let text = vec![b'x'; 1 << 20];
        for _ in 0..2 * (SEGMENT_BYTES_MAX >> 20) + 8 {
            here.append(StreamKind::Output, &text).unwrap();
        }
        assert!(here.base() > there.end());
        round(&mut source, &mut target, || false);
        assert_eq!(target.missing().unwrap(), None);
        assert_eq!(content(&there), content(&here));
    }

    #[test]
    fn requests_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let mut target = LogTarget::new(log(&folder));
        for _ in 0..AGAIN_MAX {
            target.take(7, b"x").unwrap();
            assert!(target.missing().unwrap().is_some());
        }
        target.take(7, b"x").unwrap();
        assert!(target.missing().is_err());
    }
}
