//! One node's side of gossip as a state machine: datagrams, time and measurements in, datagrams
//! out. No I/O, no clock, and no randomness but that of a seed.

use crate::gossip::datagram::CONTENT_BYTES_MAX;
use crate::gossip::instance::{Instance, Start};
use crate::gossip::load::{Heard, Load, Loads};
use foca::{
    AccumulatingRuntime, Config, Foca, Member, OwnedNotification, PeriodicParams, PostcardCodec,
    State, Timer,
};
use keel_net::NodeName;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{RngExt, SeedableRng};
use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::num::{NonZeroU8, NonZeroU32, NonZeroUsize};
use std::time::Duration;

/// How often a node probes another one. It suspects one that has not answered by then.
const PROBE_PERIOD: Duration = Duration::from_secs(1);
/// After this time without an answer others are asked to probe the node, too.
const ANSWER_WITHIN: Duration = Duration::from_millis(300);
/// How often a node tells three others what is new, if anything is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// How often a node calls members that it has not heard of, and those that are down: they may be on
/// the other side of a network that is whole again.
const CALL_EVERY: Duration = Duration::from_secs(2);
/// How many of them at once.
const CALLED: usize = 3;

const ONE: NonZeroUsize = NonZeroUsize::MIN;

/// Whether a node answers others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Liveness {
    /// It answers.
    Alive,
    /// It did not answer, and may still refute that.
    Suspected,
    /// It does not answer, or told that it stops.
    Down,
}

impl Liveness {
    /// The word for users.
    pub fn name(self) -> &'static str {
        match self {
            Liveness::Alive => "alive",
            Liveness::Suspected => "suspected",
            Liveness::Down => "down",
        }
    }
}

/// What happens to a node's gossip.
#[derive(Debug)]
pub enum Event<'a> {
    /// [`Gossip::wake_at`] has come.
    Tick,
    /// The content of a member's datagram.
    Received(&'a [u8]),
    /// The members of the cluster, by the store.
    Members(BTreeSet<NodeName>),
    /// This node's load.
    Measured(Load),
    /// This node's agent stops, and others should not wait for it.
    Stop,
}

/// The content of a datagram for a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// To whom it goes.
    pub to: NodeName,
    /// At most [`CONTENT_BYTES_MAX`] bytes.
    pub content: Vec<u8>,
}

type Swim = Foca<Instance, PostcardCodec, StdRng, Loads>;

/// Time, order of insertion, and what is due.
struct Due(Duration, u64, Timer<Instance>);

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.0, &self.2, self.1).cmp(&(other.0, &other.2, other.1))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Due {}

/// One node's gossip.
pub struct Gossip {
    node: NodeName,
    swim: Swim,
    runtime: AccumulatingRuntime<Instance>,
    timers: BinaryHeap<Reverse<Due>>,
    timers_made: u64,
    loads: Loads,
    /// By the store, without this node.
    members: BTreeSet<NodeName>,
    call_at: Duration,
    /// Whether another member has answered this one since it began, or began anew.
    is_heard: bool,
    rng: StdRng,
    /// Of events that the protocol refused.
    refused: u64,
}

impl std::fmt::Debug for Gossip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gossip")
            .field("instance", self.swim.identity())
            .field("members", &self.members.len())
            .finish_non_exhaustive()
    }
}

impl Gossip {
    /// The gossip of `node`, whose agent began at `start`.
    pub fn new(node: NodeName, start: Start, seed: u64) -> Self {
        let loads = Loads::of(node.clone());
        let instance = Instance::new(node.clone(), start);
        Gossip {
            swim: swim(instance, 1, seed, &loads),
            node,
            runtime: AccumulatingRuntime::new(),
            timers: BinaryHeap::new(),
            timers_made: 0,
            loads,
            members: BTreeSet::new(),
            call_at: Duration::ZERO,
            is_heard: false,
            // (Of another stream than the protocol's.)
            rng: StdRng::seed_from_u64(!seed),
            refused: 0,
        }
    }

    /// When [`Event::Tick`] is due at the latest.
    pub fn wake_at(&self) -> Duration {
        match self.timers.peek() {
            Some(Reverse(due)) => due.0.min(self.call_at),
            None => self.call_at,
        }
    }

    /// What is known of the other members; nothing of those that were never heard of.
    pub fn liveness(&self) -> BTreeMap<NodeName, Liveness> {
        self.known()
            .map(|(node, state)| (node.clone(), state))
            .collect()
    }

    /// The other members that are known not to answer: usually none.
    pub fn silent(&self) -> BTreeSet<NodeName> {
        self.known()
            .filter(|(_, state)| *state != Liveness::Alive)
            .map(|(node, _)| node.clone())
            .collect()
    }

    fn known(&self) -> impl Iterator<Item = (&NodeName, Liveness)> {
        let known = self.swim.iter_membership_state();
        let known = known.filter(|member| self.members.contains(member.id().node()));
        known.map(|member| {
            let state = match member.state() {
                State::Alive => Liveness::Alive,
                State::Suspect => Liveness::Suspected,
                State::Down => Liveness::Down,
            };
            (member.id().node(), state)
        })
    }

    /// How often this node was taken to be down since its agent began, and went on.
    pub fn renewals(&self) -> u32 {
        self.swim.identity().renewals()
    }

    /// The newest load of each node that told one, this one included.
    pub fn loads(&self) -> BTreeMap<NodeName, Heard> {
        self.loads.all()
    }

    /// Number of events that the protocol refused since the agent's start: what members of another
    /// version send, for example.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// What is to be sent after an event at `now`, a time of any origin that never falls.
    pub fn step(&mut self, event: Event<'_>, now: Duration) -> Vec<Outgoing> {
        self.loads.set_now(now);
        let result = match event {
            Event::Tick => Ok(()),
            Event::Received(content) => self.swim.handle_data(content, &mut self.runtime),
            Event::Members(members) => self.set_members(members, now),
            Event::Measured(load) => self.measured(load),
            Event::Stop => self.swim.leave_cluster(&mut self.runtime),
        };
        self.check(result);
        let mut sent = Vec::new();
        self.collect(now, &mut sent);
        while let Some(timer) = self.next_due(now) {
            if self.is_refuted(&timer) {
                continue;
            }
            let result = self.swim.handle_timer(timer, &mut self.runtime);
            self.check(result);
            self.collect(now, &mut sent);
        }
        if self.call_at <= now {
            self.call(now);
            self.collect(now, &mut sent);
        }
        sent
    }

    fn next_due(&mut self, now: Duration) -> Option<Timer<Instance>> {
        let is_due = self.timers.peek().is_some_and(|due| due.0.0 <= now);
        let due = is_due.then(|| self.timers.pop()).flatten();
        due.map(|Reverse(due)| due.2)
    }

    /// Whether this is the end of a suspicion that does not stand any more. `foca` (2.0) ignores it,
    /// but tells the node all the same that it is down, which then begins anew.
    fn is_refuted(&self, timer: &Timer<Instance>) -> bool {
        let Timer::ChangeSuspectToDown {
            member_id,
            incarnation,
            ..
        } = timer
        else {
            return false;
        };
        let stands = |member: &Member<Instance>| {
            member.id() == member_id
                && member.incarnation() == *incarnation
                && member.state() == State::Suspect
        };
        !self.swim.iter_members().any(stands)
    }

    fn check(&mut self, result: Result<(), foca::Error>) {
        if let Err(error) = result {
            self.refused += 1;
            tracing::debug!(%error, "gossip was refused");
        }
    }

    /// Takes what the protocol has to do.
    fn collect(&mut self, now: Duration, sent: &mut Vec<Outgoing>) {
        while let Some((to, content)) = self.runtime.to_send() {
            sent.push(Outgoing {
                to: to.node().clone(),
                content: content.to_vec(),
            });
        }
        while let Some((after, timer)) = self.runtime.to_schedule() {
            self.timers_made += 1;
            let due = Due(now + after, self.timers_made, timer);
            self.timers.push(Reverse(due));
        }
        let mut renewed = None;
        while let Some(notice) = self.runtime.to_notify() {
            match notice {
                OwnedNotification::Active => self.is_heard = true,
                OwnedNotification::Idle | OwnedNotification::Defunct => self.is_heard = false,
                OwnedNotification::Rejoin(instance) => renewed = Some(instance),
                _ => {}
            }
        }
        if let Some(instance) = renewed {
            self.begin_anew(instance, now);
        }
    }

    /// Forgets what it knew, after others took this node to be down and it goes on under another
    /// number: `foca` keeps what it suspected then, and never ends these suspicions.
    fn begin_anew(&mut self, instance: Instance, now: Duration) {
        let nodes = self.members.len() + 1;
        self.swim = swim(instance, nodes, self.rng.random(), &self.loads);
        self.timers.clear();
        self.is_heard = false;
        self.call_at = now;
    }

    fn set_members(
        &mut self,
        mut members: BTreeSet<NodeName>,
        now: Duration,
    ) -> Result<(), foca::Error> {
        members.remove(&self.node);
        if members.iter().any(|node| !self.members.contains(node)) {
            self.call_at = now;
        }
        let before = std::mem::replace(&mut self.members, members);
        self.loads
            .retain(|node| self.members.contains(node) || *node == self.node);
        self.swim.set_config(config(self.members.len() + 1))?;
        // Nobody probes nodes that were removed. (Others may be new, and known to the store only.)
        let known = self.swim.iter_members().map(Member::id);
        let removed =
            known.filter(|it| before.contains(it.node()) && !self.members.contains(it.node()));
        let removed: Vec<_> = removed.cloned().map(Member::down).collect();
        self.swim
            .apply_many(removed.into_iter(), true, &mut self.runtime)
    }

    fn measured(&mut self, load: Load) -> Result<(), foca::Error> {
        let start = self.swim.identity().start();
        match self.loads.own(&self.node, start, load, self.members.len()) {
            Some(told) => self.swim.add_broadcast(&told).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Calls members that are down, and those that this node has not heard of: at first all of them,
    /// and also if none of them has answered it since it began.
    fn call(&mut self, now: Duration) {
        self.call_at = now + CALL_EVERY;
        let active = self.swim.iter_members();
        let active = active.filter(|_| self.is_heard);
        let active: BTreeSet<&NodeName> = active.map(|it| it.id().node()).collect();
        let others = self.members.iter().filter(|node| !active.contains(node));
        let called = others.cloned().sample(&mut self.rng, CALLED);
        for node in called {
            // Whatever its start is: it answers with it.
            let any = Instance::new(node, Start::default());
            let result = self.swim.announce(any, &mut self.runtime);
            self.check(result);
        }
    }
}

/// The protocol's part, for `instance` in a cluster of this many nodes.
fn swim(instance: Instance, nodes: usize, seed: u64, loads: &Loads) -> Swim {
    let rng = StdRng::seed_from_u64(seed);
    Foca::with_custom_broadcast(instance, config(nodes), rng, PostcardCodec, loads.clone())
}

/// The settings for a cluster of this many nodes: how often an update is passed on, and how long a
/// suspicion stands, grow with the logarithm. The latter is as in HashiCorp's memberlist; the former
/// is more (SWIM, section 5: λ·ln n with λ = 4.3): with memberlist's two to four times, a node of a
/// small cluster often hears nothing of an update.
fn config(nodes: usize) -> Config {
    let transmissions = 3 * (nodes + 1).next_power_of_two().trailing_zeros();
    let transmissions = u8::try_from(transmissions).ok().and_then(NonZeroU8::new);
    let nodes = u32::try_from(nodes).ok().and_then(NonZeroU32::new);
    let periodic = |frequency, num_members| {
        Some(PeriodicParams {
            frequency,
            num_members,
        })
    };
    Config {
        probe_period: PROBE_PERIOD,
        probe_rtt: ANSWER_WITHIN,
        max_transmissions: transmissions.unwrap_or(NonZeroU8::MAX),
        max_packet_size: NonZeroUsize::new(CONTENT_BYTES_MAX).unwrap_or(ONE),
        periodic_gossip: periodic(TELL_EVERY, ONE.saturating_add(2)),
        // `call` does that, and for members only.
        periodic_announce_to_down_members: None,
        ..Config::new_lan(nodes.unwrap_or(NonZeroU32::MIN))
    }
}
