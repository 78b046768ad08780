//! Receiving a machine from another worker, for every kind; the store decides when this
//! worker owns it.
//!
//! ```text
//!   listen ──▶ Receiving ──all arrived──▶ Prepared ──go (source, or agent)──▶ Running
//!                 │ failed, aborted          │ source lost: the agent asks the store
//!                 └──────▶ Dropped ◀─────────┘ failed, aborted
//! ```
//!
//! `moves::TargetMove` decides; this module feeds it and carries out its commands.

use super::control::{MoveEndpoint, Receive, State};
use super::{MoveError, Process, Worker, publish_resumed};
use crate::failpoint;
use crate::link::{Hello, Link, LinkError, Message, Purpose};
use crate::moves::{TargetCommand, TargetEvent, TargetMove, TargetState};
use keel_cluster::{Epoch, MachineName};
use keel_net::{PinnedIdentity, RpcError, ServerTls};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Time limit for the source to connect.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

/// What is known of a source that has connected and identified itself.
pub struct Accepted {
    pub hello: Hello,
    /// For further connections of the same source.
    pub listener: TcpListener,
    pub tls: ServerTls,
}

/// Receives a machine by the connection to its source, and prepares it to resume. It announces
/// neither that the machine is ready nor that it failed.
pub type Receiver = Box<dyn FnOnce(&mut Link, Accepted) -> Result<(), MoveError> + Send>;

/// Why no source was accepted.
#[derive(Debug, thiserror::Error)]
enum AcceptError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("the source cannot connect: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Tls(#[from] keel_net::TlsError),
    #[error("the source did not connect in time")]
    Timeout,
    #[error("the source identifies itself as {0}, which was not agreed")]
    Other(String),
}

/// The source that was agreed on.
struct Expected {
    machine: MachineName,
    offered: Epoch,
    program: Option<[u8; 32]>,
    certificate: keel_net::Fingerprint,
}

impl Process {
    /// # Errors
    /// If the process has a machine.
    pub(super) fn check_empty(&self) -> Result<(), RpcError> {
        match *self.state.borrow() {
            State::Empty => Ok(()),
            _ => Err(RpcError::refused("this worker has a machine already")),
        }
    }
}

/// Prepares to receive a machine; returns where this worker listens for the source.
pub(super) fn receive<W: Worker>(
    worker: &Arc<W>,
    request: Receive,
    runtime: &Handle,
) -> Result<MoveEndpoint, RpcError> {
    worker.process().check_empty()?;
    let expected = Expected {
        machine: request.machine.clone(),
        offered: request.offered,
        program: request.program_hash,
        certificate: request.source,
    };
    let address = request.address.clone();
    let receiver = worker.begin_receive(request, runtime)?;
    let identity = PinnedIdentity::generate().map_err(RpcError::failed)?;
    let listener = TcpListener::bind((address.as_str(), 0))
        .map_err(|error| RpcError::failed(format!("{address}: {error}")))?;
    let place = listener.local_addr().map_err(RpcError::failed)?;
    let endpoint = MoveEndpoint {
        address: place.to_string(),
        fingerprint: identity.fingerprint,
    };
    let offered = expected.offered;
    worker.moves(|moves| moves.target = Some(TargetMove::new(offered)));
    failpoint::pass("target.listening").map_err(RpcError::failed)?;
    worker
        .process()
        .state
        .send_replace(State::Receiving { offered });
    let worker = worker.clone();
    std::thread::Builder::new()
        .name("move-in".into())
        .spawn(move || {
            let arrived = accept(listener, &identity, &expected)
                .map_err(MoveError::from)
                .and_then(|(link, accepted)| receive_from(link, accepted, receiver));
            finish(&worker, arrived, offered);
        })
        .map_err(RpcError::failed)?;
    Ok(endpoint)
}

/// Receives a machine; of a failure its source learns the reason, for its user.
fn receive_from(mut link: Link, accepted: Accepted, receiver: Receiver) -> Result<Link, MoveError> {
    let received = failpoint::pass("target.greeted")
        .map_err(MoveError::from)
        .and_then(|()| receiver(&mut link, accepted));
    match received {
        Ok(()) => Ok(link),
        Err(error) => {
            abort(link, &error);
            Err(error)
        }
    }
}

/// Tells the source why it is left; it notices in any case when the connection closes.
fn abort(mut link: Link, reason: &impl ToString) {
    let _ = link.send(&Message::Abort(reason.to_string()));
    let _ = link.flush();
}

/// Waits for a peer with the agreed certificate and hello.
fn accept(
    listener: TcpListener,
    identity: &PinnedIdentity,
    expected: &Expected,
) -> Result<(Link, Accepted), AcceptError> {
    let tls = ServerTls::pinned(identity, expected.certificate)?;
    listener.set_nonblocking(true)?;
    let (link, hello) = accept_one(&listener, |socket| greet(socket, &tls, expected))?;
    let accepted = Accepted {
        hello,
        listener,
        tls,
    };
    Ok((link, accepted))
}

impl Accepted {
    /// Waits for a further connection of the same source, for another purpose.
    ///
    /// # Errors
    /// If it does not come in time.
    pub fn another_link(&self) -> Result<(Link, Purpose), MoveError> {
        let (link, hello) = accept_one(&self.listener, |socket| {
            let mut link = Link::accept(socket, &self.tls)?;
            match link.receive()? {
                Message::Hello(hello) if hello.is_like(&self.hello) => Ok((link, hello)),
                other => Err(AcceptError::Other(format!("{other:?}"))),
            }
        })?;
        Ok((link, hello.purpose))
    }
}

/// Waits for one connection. Peers that are not welcome are rejected and do not end the move.
fn accept_one(
    listener: &TcpListener,
    greet: impl Fn(TcpStream) -> Result<(Link, Hello), AcceptError>,
) -> Result<(Link, Hello), AcceptError> {
    let deadline = Instant::now() + CONNECT_PATIENCE;
    loop {
        match listener.accept() {
            Ok((socket, peer)) => {
                socket.set_nonblocking(false)?;
                match greet(socket) {
                    Ok(greeted) => return Ok(greeted),
                    Err(error) => tracing::warn!(%peer, %error, "rejected a peer"),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let rest = deadline.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    return Err(AcceptError::Timeout);
                }
                let mut wait = [PollFd::new(listener, PollFlags::IN)];
                let timeout = Timespec {
                    tv_sec: rest.as_secs() as i64,
                    tv_nsec: rest.subsec_nanos().into(),
                };
                poll(&mut wait, Some(&timeout)).map_err(std::io::Error::from)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn greet(
    socket: TcpStream,
    tls: &ServerTls,
    expected: &Expected,
) -> Result<(Link, Hello), AcceptError> {
    let mut link = Link::accept(socket, tls)?;
    match read_hello(&mut link, expected) {
        Ok(hello) => Ok((link, hello)),
        Err(error) => {
            abort(link, &error);
            Err(error)
        }
    }
}

fn read_hello(link: &mut Link, expected: &Expected) -> Result<Hello, AcceptError> {
    let Message::Hello(hello) = link.receive()? else {
        return Err(AcceptError::Other("no hello".into()));
    };
    if hello.machine != expected.machine
        || hello.epoch != expected.offered
        || hello.program != expected.program
    {
        return Err(AcceptError::Other(format!(
            "machine {} under epoch {}",
            hello.machine, hello.epoch
        )));
    }
    Ok(hello)
}

/// A machine has arrived, or not: announces it to the source, and waits for the outcome.
fn finish<W: Worker>(worker: &Arc<W>, arrived: Result<Link, MoveError>, offered: Epoch) {
    let mut link = match arrived {
        Ok(link) => link,
        Err(error) => {
            step_target(worker, TargetEvent::Failed(error.to_string()));
            return;
        }
    };
    step_target(worker, TargetEvent::StateArrived);
    let commands = step_target(worker, TargetEvent::InstancesMade);
    if !commands.contains(&TargetCommand::SendPrepared) {
        return;
    }
    // It may have been dropped meanwhile.
    let is_prepared = worker.moves(|moves| {
        let target = moves.target.as_ref();
        let is_prepared = target.is_some_and(|target| target.state() == TargetState::Prepared);
        if is_prepared {
            worker.process().state.send_replace(State::Prepared {
                offered,
                source_lost: false,
            });
        }
        is_prepared
    });
    if !is_prepared {
        return;
    }
    let said = send_prepared(&mut link).map_err(|error| error.to_string());
    let passed = failpoint::pass("target.prepared").map_err(|error| error.to_string());
    if let Err(error) = said.and(passed) {
        source_lost(worker, error, offered);
        return;
    }
    read_source(worker, &mut link, offered);
    worker.after_source(link);
}

/// Tells the source that the machine is ready.
fn send_prepared(link: &mut Link) -> Result<(), LinkError> {
    link.send(&Message::Prepared)?;
    link.flush()?;
    link.wait_without_timeout()
}

/// Tells the source that the machine runs here.
fn send_resumed(link: &mut Link, epoch: Epoch) -> Result<(), LinkError> {
    failpoint::pass("target.gone").map_err(|error| LinkError::Aborted(error.to_string()))?;
    link.send(&Message::Resumed(epoch))?;
    link.flush()
}

/// Reads messages of the source until it disconnects, or until what follows is the kind's.
fn read_source<W: Worker>(worker: &Arc<W>, link: &mut Link, offered: Epoch) {
    loop {
        let message = link.receive().and_then(|message| {
            let is_kinds = worker.source_message(&message)?;
            Ok((!is_kinds).then_some(message))
        });
        let event = match message {
            Ok(None) => continue,
            Ok(Some(Message::Go(epoch))) => match failpoint::pass("target.go") {
                Ok(()) => TargetEvent::Go(epoch),
                Err(error) => return source_lost(worker, error.to_string(), offered),
            },
            Ok(Some(_)) => TargetEvent::Abort("the source sent a message out of turn".into()),
            Err(LinkError::Aborted(reason)) => TargetEvent::Abort(reason),
            Err(error) => return source_lost(worker, error.to_string(), offered),
        };
        let is_last = !matches!(event, TargetEvent::Go(_)) || worker.expects_more();
        // The source measures downtime until this message arrives.
        step_target_and(worker, event, &mut |epoch| {
            if let Err(error) = send_resumed(link, epoch) {
                // The source asks again through the agents.
                tracing::info!(%error, "cannot tell the source that the machine runs");
            }
        });
        if is_last {
            return;
        }
    }
}

fn source_lost<W: Worker>(worker: &Arc<W>, reason: String, offered: Epoch) {
    worker.source_lost();
    let commands = step_target(worker, TargetEvent::SourceLost(reason));
    if !commands.contains(&TargetCommand::AskAgent) {
        return;
    }
    // The agent may have resumed it meanwhile.
    worker.moves(|moves| {
        let target = moves.target.as_ref();
        if target.is_some_and(|target| target.state() == TargetState::Prepared) {
            worker.process().state.send_replace(State::Prepared {
                offered,
                source_lost: true,
            });
        }
    });
}

/// Steps the target's state machine and carries out its commands, except messages to the
/// source. Returns them; none if the machine was to be resumed and cannot be.
pub fn step_target<W: Worker>(worker: &Arc<W>, event: TargetEvent) -> Vec<TargetCommand> {
    step_target_and(worker, event, &mut |_| {})
}

/// As [`step_target`]; tells the source at once when the machine runs.
fn step_target_and<W: Worker>(
    worker: &Arc<W>,
    event: TargetEvent,
    say_resumed: &mut dyn FnMut(Epoch),
) -> Vec<TargetCommand> {
    // A repeated request to resume is answered after the first one is carried out.
    let _stepping = worker
        .process()
        .stepping
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let commands = worker.moves(|moves| {
        let target = moves.target.as_mut();
        target.map_or_else(Vec::new, |target| target.step(event))
    });
    let mut resumed = None;
    for command in &commands {
        match command {
            TargetCommand::Thaw(epoch) => {
                worker.moves(|moves| moves.epoch = *epoch);
                if let Err(reason) = worker.resume(*epoch) {
                    drop_not_resumed(worker, reason);
                    return Vec::new();
                }
                resumed = Some(*epoch);
            }
            TargetCommand::SendResumed(epoch) => say_resumed(*epoch),
            TargetCommand::Drop(reason) => worker.drop_received(reason),
            TargetCommand::Prepare | TargetCommand::SendPrepared | TargetCommand::AskAgent => {}
        }
    }
    if let Some(epoch) = resumed {
        let state = worker.resumed(epoch);
        let log = worker.process().log();
        publish_resumed(&worker.process().state, log.as_deref(), state);
    }
    commands
}

/// Drops a machine that could not be resumed: its source, which is not told that it runs, takes it
/// back.
fn drop_not_resumed<W: Worker>(worker: &Arc<W>, reason: String) {
    tracing::error!(reason, "a machine that has arrived does not run here");
    let commands = worker.moves(|moves| {
        let target = moves.target.as_mut();
        target.map_or_else(Vec::new, |target| {
            target.step(TargetEvent::NotResumed(reason))
        })
    });
    for command in commands {
        if let TargetCommand::Drop(reason) = command {
            worker.drop_received(&reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::HELLO_VERSION;
    use keel_net::ClientTls;

    #[test]
    fn a_source_learns_why_it_is_not_accepted() {
        let [source, target] = [(); 2].map(|()| PinnedIdentity::generate().unwrap());
        let server = ServerTls::pinned(&target, source.fingerprint).unwrap();
        let client = ClientTls::pinned(&source, target.fingerprint).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let hello = Hello {
            version: HELLO_VERSION,
            machine: "m".parse().unwrap(),
            epoch: Epoch::default(),
            program: None,
            log_base: 0,
            post_copy: false,
            purpose: Purpose::Move,
        };
        let expected = Expected {
            machine: hello.machine.clone(),
            offered: hello.epoch,
            program: hello.program,
            certificate: source.fingerprint,
        };
        let other_version = Message::Hello(Hello {
            version: HELLO_VERSION + 1,
            ..hello.clone()
        });
        let other_machine = Message::Hello(Hello {
            machine: "n".parse().unwrap(),
            ..hello
        });
        for (first, reason) in [
            (other_version, "speaks version"),
            (other_machine, "machine n under epoch"),
            (Message::RoundEnd, "no hello"),
        ] {
            let told = std::thread::scope(|scope| {
                let greeted = scope.spawn(|| {
                    let (socket, _) = listener.accept().unwrap();
                    greet(socket, &server, &expected).map(|_| ())
                });
                let mut link = Link::connect(&address, &client).unwrap();
                link.send(&first).unwrap();
                link.flush().unwrap();
                assert!(greeted.join().unwrap().is_err());
                link.receive()
            });
            match told {
                Err(LinkError::Aborted(told)) => assert!(told.contains(reason), "{told}"),
                told => panic!("{told:?}"),
            }
        }
    }
}
