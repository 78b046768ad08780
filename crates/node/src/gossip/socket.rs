//! The task that feeds the state machine of gossip: datagrams, time, members, keys, this node's
//! load.

use super::doubts::Doubts;
use super::handle::NodeGossip;
use super::keys::Followed;
use crate::context::Context;
use keel_cluster::NodeName;
use keel_cluster::gossip::datagram::{DATAGRAM_BYTES_MAX, Opener, Sealer};
use keel_cluster::gossip::{Event, Gossip, Outgoing, Start};
use keel_net::coarse_timer;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::sync::watch;

/// Pause before the socket is opened anew.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How often the names of hosts are resolved anew.
const RESOLVE_EVERY: Duration = Duration::from_secs(60);

/// Takes part until the agent stops.
pub(super) async fn run(
    gossip: &NodeGossip,
    context: &Arc<Context>,
    start: Start,
    followed: watch::Receiver<Followed>,
) {
    let machine = Gossip::new(context.name.clone(), start, rand::random());
    *gossip
        .machine
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Some(machine);
    let (addresses, resolved) = watch::channel(BTreeMap::new());
    tokio::spawn(resolve(context.clone(), addresses));
    let mut task = Task {
        gossip,
        context,
        sealer: Sealer::new(context.name.clone(), start),
        opener: Opener::default(),
        followed,
        resolved,
        doubts: Doubts::default(),
    };
    let mut stopping = gossip.stopping.subscribe();
    let stops = async {
        // (It lives as long as the agent.)
        let _ = stopping.wait_for(|it| *it).await;
    };
    tokio::pin!(stops);
    let mut is_reported = false;
    loop {
        let taken = async {
            let socket = UdpSocket::bind(context.settings.listen).await?;
            is_reported = false;
            task.take_part(&socket, &mut stops).await
        };
        let Err(error) = taken.await else { return };
        // Nothing new is heard of anybody.
        gossip.doubted.send_replace(BTreeSet::new());
        if !is_reported {
            let address = context.settings.listen;
            tracing::warn!(
                %error,
                "gossip has no UDP socket at {address}: this node counts as silent, until it has one"
            );
            is_reported = true;
        }
        tokio::select! {
            () = &mut stops => return,
            () = tokio::time::sleep(RETRY_AFTER) => {}
        }
    }
}

struct Task<'a> {
    gossip: &'a NodeGossip,
    context: &'a Arc<Context>,
    sealer: Sealer,
    opener: Opener,
    followed: watch::Receiver<Followed>,
    resolved: watch::Receiver<BTreeMap<NodeName, SocketAddr>>,
    doubts: Doubts,
}

impl Task<'_> {
    /// Takes part through this socket.
    ///
    /// # Errors
    /// The socket's.
    async fn take_part(
        &mut self,
        socket: &UdpSocket,
        mut stops: impl Future<Output = ()> + Unpin,
    ) -> std::io::Result<()> {
        let mut members = self.context.members.changes();
        members.mark_changed();
        self.followed.mark_changed();
        let mut measured = self.gossip.measured.subscribe();
        let mut received = vec![0; DATAGRAM_BYTES_MAX + 1];
        let mut wake_at = Duration::ZERO;
        loop {
            let wait = wake_at.saturating_sub(self.gossip.now());
            tokio::select! {
                arrived = socket.recv_from(&mut received) => {
                    let (length, from) = arrived?;
                    let datagram = received.get_mut(..length).unwrap_or_default();
                    wake_at = self.receive(socket, datagram, from).unwrap_or(wake_at);
                }
                () = coarse_timer::sleep_at_least(wait) => {
                    wake_at = self.step(socket, Event::Tick);
                    self.update_doubts();
                }
                changed = measured.changed() => if changed.is_ok() {
                    let load = *measured.borrow_and_update();
                    if let Some(load) = load {
                        wake_at = self.step(socket, Event::Measured(load));
                    }
                },
                changed = members.changed() => if changed.is_ok() {
                    let all = self.context.members.all();
                    self.opener.retain(|node| all.contains_key(node));
                    let names: BTreeSet<NodeName> = all.keys().cloned().collect();
                    wake_at = self.step(socket, Event::Members(names));
                },
                changed = self.followed.changed() => if changed.is_ok() {
                    let followed = self.followed.borrow_and_update();
                    if let Some((keys, _)) = &followed.keys {
                        self.sealer.set_keys(keys);
                        self.opener.set_keys(keys);
                    }
                },
                () = &mut stops => {
                    self.step(socket, Event::Stop);
                    return Ok(());
                }
            }
        }
    }

    fn receive(
        &mut self,
        socket: &UdpSocket,
        datagram: &mut [u8],
        from: SocketAddr,
    ) -> Option<Duration> {
        let members = &self.context.members;
        let metrics = &self.context.metrics;
        let opened = self.opener.open(datagram, |node| members.contains(node));
        let content = match opened {
            Ok((_, content)) => content.to_vec(),
            Err(error) => {
                metrics.gossip("refused");
                tracing::debug!(%from, %error, "a datagram was refused");
                return None;
            }
        };
        metrics.gossip("received");
        Some(self.step(socket, Event::Received(&content)))
    }

    /// Feeds the state machine, and sends what it says. When it wants to be woken.
    fn step(&mut self, socket: &UdpSocket, event: Event<'_>) -> Duration {
        let mut machine = self.gossip.machine.lock();
        let machine = machine.as_mut().unwrap_or_else(|it| it.get_mut());
        let Some(machine) = machine.as_mut() else {
            return self.gossip.now() + RETRY_AFTER;
        };
        let sent = machine.step(event, self.gossip.now());
        let addresses = self.resolved.borrow();
        for Outgoing { to, content } in sent {
            let Some(address) = addresses.get(&to) else {
                continue;
            };
            // Before there are keys there is nobody to talk to.
            let Some(datagram) = self.sealer.seal(&content) else {
                continue;
            };
            self.context.metrics.gossip("sent");
            // What the network does not take now is lost, as on the way.
            if let Err(error) = socket.try_send_to(&datagram, *address) {
                tracing::trace!(%to, %error, "a datagram could not be sent");
            }
        }
        machine.wake_at()
    }

    fn update_doubts(&mut self) {
        let silent = {
            let machine = self.gossip.machine.lock();
            let machine = machine.unwrap_or_else(PoisonError::into_inner);
            machine.as_ref().map(Gossip::silent).unwrap_or_default()
        };
        let doubted = self.doubts.update(silent, self.gossip.now());
        self.gossip.doubted.send_if_modified(|known| {
            let is_other = *known != doubted;
            for node in doubted.difference(known) {
                tracing::info!(%node, "the node does not answer datagrams");
            }
            *known = doubted;
            is_other
        });
    }
}

/// Keeps the addresses of all members.
async fn resolve(context: Arc<Context>, addresses: watch::Sender<BTreeMap<NodeName, SocketAddr>>) {
    let mut members = context.members.changes();
    while !addresses.is_closed() {
        members.borrow_and_update();
        let mut resolved = BTreeMap::new();
        for (node, member) in context.members.all().iter() {
            let address = match member.address.parse() {
                Ok(address) => Some(address),
                Err(_) => {
                    let found = tokio::net::lookup_host(&member.address).await;
                    let mut found = found.into_iter().flatten();
                    let same = context.settings.listen.is_ipv4();
                    found.find(|address| address.is_ipv4() == same)
                }
            };
            if let Some(address) = address {
                resolved.insert(node.clone(), address);
            }
        }
        addresses.send_replace(resolved);
        tokio::select! {
            changed = members.changed() => if changed.is_err() {
                return;
            },
            () = coarse_timer::sleep(RESOLVE_EVERY) => {}
        }
    }
}
