//! Passes the bytes of a socket of QEMU on over a link to the other worker of a move, and those of a
//! link to a socket. What they mean is left to the QEMUs at both ends.

use keel_machine::link::{Link, LinkError, Message};
use keel_machine::worker::MoveError;
use rustix::io::ioctl_fionread;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes in one message.
const PIECE_BYTES: usize = 64 << 10;

/// Sends what comes from a socket until QEMU closes it.
///
/// # Errors
/// If one of them fails, or nothing comes within the socket's time limit, if it has one.
pub(crate) fn send(mut socket: &UnixStream, link: &mut Link) -> Result<(), MoveError> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = match socket.read(&mut piece) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err("QEMU sends nothing any more".into());
            }
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            link.flush()?;
            return Ok(());
        }
        link.send(&Message::Image(piece[..count].to_vec().into()))?;
        // QEMU may wait for an answer to what it has sent.
        if ioctl_fionread(socket)? == 0 {
            link.flush()?;
        }
    }
}

/// Writes what comes over a link to a socket until the other side has no more.
fn receive(link: &mut Link, mut socket: &UnixStream) -> Result<(), MoveError> {
    loop {
        match link.receive()? {
            Message::Image(piece) => socket.write_all(&piece)?,
            Message::ImageEnd => return Ok(()),
            other => return Err(LinkError::Message(format!("{other:?} out of turn")).into()),
        }
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    ToLink,
    FromLink,
}

/// A thread that passes bytes on, and their end, until that comes or the relay is dropped.
pub(crate) struct Relay {
    socket: UnixStream,
    link: TcpStream,
    has_ended: Arc<AtomicBool>,
}

impl Relay {
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn start(way: Way, socket: &UnixStream, link: Link) -> Result<Self, MoveError> {
        let (socket, mut link) = (socket.try_clone()?, link);
        // QEMU may have nothing to say for a while; a host that is gone is noticed by the kernel.
        link.wait_without_timeout()?;
        let has_ended = Arc::new(AtomicBool::new(false));
        let relay = Relay {
            socket: socket.try_clone()?,
            link: link.closer()?,
            has_ended: has_ended.clone(),
        };
        let passes = move || {
            let passed = match way {
                Way::ToLink => send(&socket, &mut link).and_then(|()| {
                    link.send(&Message::ImageEnd)?;
                    Ok(link.flush()?)
                }),
                Way::FromLink => receive(&mut link, &socket),
            };
            has_ended.store(true, Ordering::Release);
            if let Err(error) = passed {
                tracing::debug!(%error, ?way, "no more bytes are passed on");
                let _ = socket.shutdown(Shutdown::Both);
                return;
            }
            let _ = match way {
                // The other way may go on.
                Way::ToLink => Ok(()),
                Way::FromLink => socket.shutdown(Shutdown::Write),
            };
        };
        let thread = std::thread::Builder::new().name("relay".into());
        thread.spawn(passes)?;
        Ok(relay)
    }

    /// Whether the end was passed on, or one of both ends is lost.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.link.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use keel_net::{ClientTls, PinnedIdentity, ServerTls};
    use std::net::TcpListener;

    /// Both ends of a connection between workers, the source's first.
    pub(crate) fn links() -> (Link, Link) {
        let [source, target] = [(); 2].map(|()| PinnedIdentity::generate().unwrap());
        let server = ServerTls::pinned(&target, source.fingerprint).unwrap();
        let client = ClientTls::pinned(&source, target.fingerprint).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let accepting = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            Link::accept(socket, &server).unwrap()
        });
        let source = Link::connect(&address, &client).unwrap();
        (source, accepting.join().unwrap())
    }

    /// Whatever its size: who sent it may wait for the answer.
    #[test]
    fn all_that_was_sent_arrives_without_more() {
        let (link, other_link) = links();
        let (mut sender, socket) = UnixStream::pair().unwrap();
        let (other_socket, mut receiver) = UnixStream::pair().unwrap();
        let _from = Relay::start(Way::FromLink, &other_socket, other_link).unwrap();
        let to = Relay::start(Way::ToLink, &socket, link).unwrap();
        for bytes in [1, 28, PIECE_BYTES, 2 * PIECE_BYTES, 3 * PIECE_BYTES + 1] {
            let sent = vec![bytes as u8; bytes];
            let mut arrived = vec![0; bytes];
            std::thread::scope(|scope| {
                scope.spawn(|| sender.write_all(&sent).unwrap());
                receiver.read_exact(&mut arrived).unwrap();
            });
            assert!(sent == arrived, "{bytes}");
        }
        // The end is passed on too, and a relay that is dropped ends.
        sender.shutdown(Shutdown::Write).unwrap();
        assert_eq!(receiver.read(&mut [0]).unwrap(), 0);
        drop(to);
        assert_eq!(sender.read(&mut [0]).unwrap(), 0);
    }
}
