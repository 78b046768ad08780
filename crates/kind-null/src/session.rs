//! A move, at its source: one round with the output, then the number.

use crate::counter::Counter;
use keel_cluster::{Epoch, MachineName};
use keel_machine::failpoint;
use keel_machine::link::{HELLO_VERSION, Hello, Link, LinkError, Message, Purpose};
use keel_machine::log::Log;
use keel_machine::moves::{FillReport, Round};
use keel_machine::worker::control::{Copy, CopyEvent, Frozen};
use keel_machine::worker::{LogSource, MoveError, SourceSession};
use keel_net::PinnedIdentity;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

/// One attempt to move the machine.
pub(crate) struct NullSession {
    counter: Arc<Counter>,
    log: LogSource,
    link: Link,
}

impl NullSession {
    /// Connects to the target.
    pub(crate) fn connect(
        name: MachineName,
        epoch: Epoch,
        counter: Arc<Counter>,
        log: Arc<Log>,
        identity: &PinnedIdentity,
        copy: &Copy,
    ) -> Result<Self, MoveError> {
        failpoint::pass("source.connect")?;
        let hello = Hello {
            version: HELLO_VERSION,
            machine: name,
            epoch,
            program: None,
            log_base: log.base(),
            post_copy: false,
            purpose: Purpose::Move,
        };
        let target = copy.target.target(identity, hello)?;
        Ok(NullSession {
            counter,
            log: LogSource::new(log),
            link: target.connect(Purpose::Move)?,
        })
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn unexpected(message: &Message) -> MoveError {
    LinkError::Message(format!("{message:?} out of turn")).into()
}

impl SourceSession for NullSession {
    fn closer(&self) -> Result<TcpStream, MoveError> {
        Ok(self.link.closer()?)
    }

    fn copy(&mut self, tell: &mut dyn FnMut(CopyEvent) -> bool) -> Result<(), MoveError> {
        failpoint::pass("source.hello")?;
        let begun = Instant::now();
        self.log.send(&mut self.link)?;
        self.link.send(&Message::RoundEnd)?;
        self.link.flush()?;
        failpoint::pass("source.round")?;
        match self.log.round_answer(&mut self.link)? {
            Message::RoundDone => {}
            other => return Err(unexpected(&other)),
        }
        failpoint::pass("source.converged")?;
        tell(CopyEvent::Converged {
            rounds: vec![Round {
                bytes: 0,
                micros: micros(begun),
            }],
            slowed: false,
        });
        Ok(())
    }

    fn freeze_and_send(&mut self) -> Result<Frozen, MoveError> {
        self.link.use_frozen_timeout()?;
        failpoint::pass("source.freeze")?;
        let begun = Instant::now();
        let next = self.counter.freeze()?;
        let freeze_micros = micros(begun);
        failpoint::pass("source.frozen")?;
        self.link.send(&Message::Frozen)?;
        self.log.send(&mut self.link)?;
        failpoint::pass("source.last-pages")?;
        let state = Instant::now();
        let image = next.to_le_bytes().to_vec();
        self.link.send(&Message::Image(image.into()))?;
        self.link.send(&Message::ImageEnd)?;
        self.link.flush()?;
        failpoint::pass("source.image")?;
        self.log.wait_prepared(&mut self.link)?;
        failpoint::pass("source.prepared")?;
        // From here on the store decides, however long that takes.
        self.link.wait_without_timeout()?;
        Ok(Frozen {
            freeze_micros,
            last_pages_micros: 0,
            last_bytes: 0,
            state_micros: micros(state),
            bytes: self.link.sent_bytes(),
        })
    }

    fn go(&mut self, epoch: Epoch) -> Result<(), MoveError> {
        failpoint::pass("source.go")?;
        self.link.send(&Message::Go(epoch))?;
        self.link.flush()?;
        match self.link.receive()? {
            Message::Resumed(_) => Ok(failpoint::pass("source.gone")?),
            other => Err(unexpected(&other)),
        }
    }

    /// Everything was sent before the machine resumed.
    fn serve(self, _unsent: &AtomicU64) -> FillReport {
        FillReport::default()
    }

    fn cancel(&mut self) -> Result<(), MoveError> {
        Ok(())
    }

    fn abort(mut self, reason: &str) {
        // The target notices in any case when the connection closes.
        let _ = self.link.send(&Message::Abort(reason.to_owned()));
        let _ = self.link.flush();
    }
}
