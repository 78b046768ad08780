//! Channels between the QEMUs at both ends of a move: bytes in both directions, over two connections of
//! their workers, since a connection is used by one thread in each of them. What the bytes mean is left
//! to the QEMUs.

use crate::relay::{Relay, Way};
use keel_machine::link::{Link, Purpose, TargetEndpoint};
use keel_machine::worker::{Accepted, MoveError};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long the source may take until it has connected.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);
/// Pause after a connection that could not be accepted.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// What a channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// The machine's own disk ([`crate::disk_copy`]).
    Disk,
    /// Memory that may follow the guest ([`crate::post_copy`]).
    Memory,
}

impl Use {
    /// The purposes of its connections: from the source's QEMU to the target's, and back.
    fn purposes(self) -> [Purpose; 2] {
        match self {
            Use::Disk => [Purpose::DiskRequests, Purpose::DiskAnswers],
            Use::Memory => [Purpose::Push, Purpose::Pull],
        }
    }
}

/// The connections of a channel.
pub(crate) struct Channel {
    there: Link,
    back: Link,
}

impl Channel {
    /// Connects to the target.
    ///
    /// # Errors
    /// If it does not answer.
    pub(crate) fn connect(target: &TargetEndpoint, of: Use) -> Result<Self, MoveError> {
        let [there, back] = of.purposes();
        Ok(Channel {
            there: target.connect(there)?,
            back: target.connect(back)?,
        })
    }

    /// Connects it with a socket of the source's QEMU, until what is returned is dropped.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub(crate) fn at_source(self, socket: &UnixStream) -> Result<[Relay; 2], MoveError> {
        Ok([
            Relay::start(Way::ToLink, socket, self.there)?,
            Relay::start(Way::FromLink, socket, self.back)?,
        ])
    }

    /// Connects it with a socket of the target's QEMU, until what is returned is dropped.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub(crate) fn at_target(self, socket: &UnixStream) -> Result<[Relay; 2], MoveError> {
        Ok([
            Relay::start(Way::FromLink, socket, self.there)?,
            Relay::start(Way::ToLink, socket, self.back)?,
        ])
    }
}

/// The channels of one use that a source opens, one after the other: each replaces the one before.
pub(crate) struct Opened(Mutex<Receiver<Channel>>);

impl Opened {
    fn lock(&self) -> MutexGuard<'_, Receiver<Channel>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the first one.
    ///
    /// # Errors
    /// If it does not come in time.
    pub(crate) fn first(&self) -> Result<Channel, MoveError> {
        let came = self.lock().recv_timeout(CONNECT_PATIENCE);
        came.map_err(|_| "the source did not connect in time".into())
    }

    /// The newest one that nobody has, if one comes in time.
    pub(crate) fn within(&self, patience: Duration) -> Option<Channel> {
        let opened = self.lock();
        let came = opened.recv_timeout(patience);
        let newer = opened.try_iter().last();
        drop(opened);
        match came {
            Ok(channel) => Some(newer.unwrap_or(channel)),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(patience);
                None
            }
        }
    }
}

/// The channels of a move, at its target. No more are accepted once this is dropped.
pub(crate) struct IncomingChannels {
    pub(crate) disk: Opened,
    pub(crate) memory: Opened,
    is_over: Arc<AtomicBool>,
}

impl Drop for IncomingChannels {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
    }
}

impl IncomingChannels {
    /// Begins to accept them: the source connects before this side's QEMU is ready, and again after it
    /// has lost a connection.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(crate) fn begin(accepted: Accepted) -> io::Result<Self> {
        let ((of_disk, disk), (of_memory, memory)) = (channel(), channel());
        let is_over = Arc::new(AtomicBool::new(false));
        let channels = IncomingChannels {
            disk: Opened(Mutex::new(disk)),
            memory: Opened(Mutex::new(memory)),
            is_over: is_over.clone(),
        };
        let mut pending = [
            Pending::new(Use::Disk, of_disk),
            Pending::new(Use::Memory, of_memory),
        ];
        let accepts = move || {
            while !is_over.load(Ordering::Acquire) {
                match accepted.another_link() {
                    Ok((link, purpose)) => take(&mut pending, link, purpose),
                    Err(error) => {
                        // Nobody may have come for a while.
                        tracing::debug!(%error, "no further connection of a move");
                        std::thread::sleep(ACCEPT_AGAIN_AFTER);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("channels".into());
        thread.spawn(accepts)?;
        Ok(channels)
    }
}

/// The connections of one use that have no partner yet.
struct Pending {
    of: Use,
    halves: [Option<Link>; 2],
    opened: Sender<Channel>,
}

impl Pending {
    fn new(of: Use, opened: Sender<Channel>) -> Self {
        Pending {
            of,
            halves: [None, None],
            opened,
        }
    }
}

fn take(pending: &mut [Pending], link: Link, purpose: Purpose) {
    let place = pending.iter_mut().find_map(|pending| {
        let side = pending.of.purposes().iter().position(|it| *it == purpose)?;
        Some((pending, side))
    });
    let Some((pending, side)) = place else {
        tracing::warn!(?purpose, "rejected a connection out of turn");
        return;
    };
    // A later one of the same side replaces one whose partner never came.
    pending.halves[side] = Some(link);
    if let [Some(_), Some(_)] = &pending.halves
        && let [Some(there), Some(back)] = std::mem::take(&mut pending.halves)
    {
        // Nobody may wait for it any more.
        let _ = pending.opened.send(Channel { there, back });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::relay::tests::links;

    /// Both ends of a channel, the source's first.
    pub(crate) fn channels() -> (Channel, Channel) {
        let ((there, there_arrived), (back, back_arrived)) = (links(), links());
        let arrived = Channel {
            there: there_arrived,
            back: back_arrived,
        };
        (Channel { there, back }, arrived)
    }

    /// Those of memory that are sent to what is returned.
    pub(crate) fn incoming() -> (Arc<IncomingChannels>, Sender<Channel>) {
        let ((_, disk), (of_memory, memory)) = (channel(), channel());
        let incoming = IncomingChannels {
            disk: Opened(Mutex::new(disk)),
            memory: Opened(Mutex::new(memory)),
            is_over: Arc::default(),
        };
        (Arc::new(incoming), of_memory)
    }

    /// A source that could not connect in both directions begins again with both.
    #[test]
    fn a_channel_is_of_the_newest_connections_of_both_directions() {
        let (of_disk, disk) = channel();
        let (of_memory, memory) = channel();
        let mut pending = [
            Pending::new(Use::Disk, of_disk),
            Pending::new(Use::Memory, of_memory),
        ];
        let [old, new, back, of_other] = [(); 4].map(|()| links().0);
        let place = |link: &Link| link.closer().unwrap().local_addr().unwrap();
        let newest = [place(&new), place(&back)];
        take(&mut pending, old, Purpose::Push);
        take(&mut pending, of_other, Purpose::Move);
        take(&mut pending, new, Purpose::Push);
        assert!(memory.try_recv().is_err());
        take(&mut pending, back, Purpose::Pull);
        let opened = memory.try_recv().unwrap();
        assert_eq!([place(&opened.there), place(&opened.back)], newest);
        assert!(disk.try_recv().is_err() && memory.try_recv().is_err());
    }
}
