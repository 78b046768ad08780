//! All parts of a machine in one process, connected as they are over a network: for
//! programs in the foreground, and to try what spans.

use super::peer::{Ends, Hello, PeerError};
use super::threads::{Home, MemberPart, SpanningError, Spread};
use keel_cluster::{Epoch, MachineName};
use keel_net::{ClientTls, PinnedIdentity, ServerTls, TlsError};
use keel_wasm::coherence::{PARTS_MAX, PartId};
use keel_wasm::runtime::Machine;
use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};

/// Why there are no parts.
#[derive(Debug, thiserror::Error)]
pub enum WithinError {
    /// Too few or too many.
    #[error("a machine has 1 to {PARTS_MAX} parts, not {0}")]
    Count(usize),
    /// No certificate.
    #[error("no certificate for a part: {0}")]
    Tls(#[from] TlsError),
    /// A connection.
    #[error("parts cannot be connected: {0}")]
    Io(#[from] std::io::Error),
    /// What was said on it.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// A part.
    #[error(transparent)]
    Spanning(#[from] SpanningError),
}

/// A machine and its members in this process.
#[derive(Debug)]
pub struct Within {
    /// Dropped first: the others end when it says so.
    home: Home,
    members: Vec<MemberPart>,
}

/// What a part needs to greet another.
type Sockets = (usize, TcpStream, TcpStream);

impl Within {
    /// Lets a running machine span `count` parts, itself one of them.
    ///
    /// # Errors
    /// [`WithinError`]; it goes on alone then.
    pub fn begin(
        machine: &Machine,
        count: usize,
        limit_bytes: u64,
        how: Spread,
    ) -> Result<Self, WithinError> {
        if !(1..=PARTS_MAX).contains(&count) {
            return Err(WithinError::Count(count));
        }
        let mut ends = connect(count)?.into_iter();
        let home = ends.next().unwrap_or_default();
        let program = machine.program();
        // What lets threads go on there is compiled while it runs.
        program
            .prepare_resume()
            .map_err(|error| SpanningError::Machine(error.into()))?;
        machine
            .freeze(how.patience)
            .map_err(SpanningError::Machine)?;
        let sizes: Vec<u64> = machine
            .memories()
            .iter()
            .map(|it| it.size_bytes())
            .collect();
        let mut members = Vec::new();
        for (number, ends) in (1..).zip(ends) {
            let me = part(number)?;
            let begun = MemberPart::begin(program.clone(), &sizes, limit_bytes, me, ends);
            match begun {
                Ok(member) => members.push(member),
                Err(error) => {
                    machine.thaw().map_err(SpanningError::Machine)?;
                    return Err(error.into());
                }
            }
        }
        let home = Home::begin(machine, home, how)?;
        Ok(Within { home, members })
    }

    /// The home.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The others.
    pub fn members(&self) -> &[MemberPart] {
        &self.members
    }

    /// Ends the last member as if its node had died.
    pub fn lose_last(&mut self) {
        if let Some(member) = self.members.pop() {
            member.die();
        }
    }

    /// As [`Home::alone`].
    ///
    /// # Errors
    /// As there; the machine has ended then.
    pub fn alone(self, patience: std::time::Duration) -> Result<std::time::Duration, WithinError> {
        let Within { home, members } = self;
        let stood = home.alone(patience).map_err(|(_, error)| error)?;
        drop(members);
        Ok(stood)
    }
}

fn part(number: usize) -> Result<PartId, WithinError> {
    PartId::new(number).ok_or(WithinError::Count(number))
}

/// The connections of each part to all others.
fn connect(count: usize) -> Result<Vec<BTreeMap<PartId, Ends>>, WithinError> {
    let mut identities = Vec::new();
    for _ in 0..count {
        identities.push(PinnedIdentity::generate()?);
    }
    // Of each part: the others, with what dials them and what they dialled.
    let mut sockets: Vec<Vec<Sockets>> = (0..count).map(|_| Vec::new()).collect();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let pair = || {
        let dialled = TcpStream::connect(listener.local_addr()?)?;
        let own = dialled.local_addr()?;
        loop {
            // (Nobody else is taken for it.)
            let (heard, from) = listener.accept()?;
            if from == own {
                return Ok::<_, std::io::Error>((dialled, heard));
            }
        }
    };
    for one in 0..count {
        for other in one + 1..count {
            let (out, heard) = pair()?;
            let (back, heard_back) = pair()?;
            sockets[one].push((other, out, heard_back));
            sockets[other].push((one, back, heard));
        }
    }
    let machine: MachineName = "within".parse().map_err(|_| WithinError::Count(count))?;
    // All at once, as each waits for the others.
    std::thread::scope(|scope| {
        let identities = &identities;
        let machine = &machine;
        let greeting: Vec<Vec<_>> = sockets
            .into_iter()
            .enumerate()
            .map(|(me, sockets)| {
                sockets
                    .into_iter()
                    .map(|(other, out, heard)| {
                        scope.spawn(move || {
                            let pinned = identities[other].fingerprint;
                            let client = ClientTls::pinned(&identities[me], pinned)?;
                            let server = ServerTls::pinned(&identities[me], pinned)?;
                            let (me, other) = (part(me)?, part(other)?);
                            let hello = Hello::new(machine.clone(), Epoch::default(), me, other);
                            let ends = Ends::greet((out, &client), (heard, &server), &hello)?;
                            Ok::<_, WithinError>((other, ends))
                        })
                    })
                    .collect()
            })
            .collect();
        let mut all = Vec::new();
        for greeting in greeting {
            let mut ends = BTreeMap::new();
            for greeted in greeting {
                let (other, end) = greeted
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                ends.insert(other, end);
            }
            all.push(ends);
        }
        Ok(all)
    })
}
