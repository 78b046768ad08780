//! The other parts, which join and leave while this one runs.
//!
//! ```text
//!   other part             joining part                    home
//!        │◀── both dial ──▶│ knows it, hears it             │
//!        │◀─────────────────────────── both dial ──────────▶│ knows it last
//!        │◀──────────────────────────────────────── Limit ──│ member: it may
//!        │─── Memory ─────▶│                                │ get threads and pages
//!        ┊                 ┊                                ┊
//!   leaving part         remaining part      has all its pages
//!        │◀────────────────┼───────────────────────── Gone ─│
//!        │─── Gone ────────┼───────────────────────────────▶│ it ignores closed connections
//!        │◀── closed ──────│◀───────────────────────── Gone ─│
//!        │                 │─── Gone ───────────────────────▶│ all know
//! ```
//!
//! The end of a part is not a loss before its first message: whatever was begun with it
//! can be undone. A part that leaves waits until all others have closed its connections,
//! and then ends.

use super::super::peer::{Inbound, Outbound, PeerConnections};
use super::super::wire::PeerMessage;
use super::effects::{Effects, EventContext};
use super::{BeginError, PART_BYTES_MIN, Pages, Shared, SpanError, locked};
use keel_wasm::coherence::{Event, PartId, PartSet};
use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How long the connection of an earlier part with the same number may take to drain, and
/// the polling interval.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_micros(200);
/// How long what a part said last may be on its way when a write to it has failed.
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(500);

/// Changes of the connections that the serving thread reads, in order.
pub(super) enum ConnectionChange {
    Hear(Box<Inbound>),
    Forget(PartId),
}

#[derive(Default)]
pub(super) struct Peers {
    outbound: RwLock<BTreeMap<PartId, Arc<Outbound>>>,
    /// The outbound and the inbound one of each part; shut down at the end, so that no thread
    /// blocks on them.
    sockets: Mutex<BTreeMap<PartId, [TcpStream; 2]>>,
    /// When writes to parts failed, and why, until their inbound connections are read to the end.
    write_failures: Mutex<BTreeMap<PartId, (Instant, String)>>,
    has_write_failures: AtomicBool,
    turns: Mutex<Vec<ConnectionChange>>,
    has_turns: AtomicBool,
    /// Parts that joined and have not sent a message yet.
    new: Mutex<PartSet>,
    /// At the home: parts that are joining and may still be removed; no pages are moved
    /// there.
    joining: Mutex<PartSet>,
    /// This part has left: the others close its connections.
    leaves: AtomicBool,
    /// At the home: parts that know that they have left.
    parting: Mutex<PartSet>,
    /// At the home: the parts that know which part has left.
    know_gone: Mutex<(Option<PartId>, PartSet)>,
    /// At a new home: the parts that know that it is the home.
    know: Mutex<PartSet>,
    /// The part has ended and accepts no further ones. Changes under the lock of `outbound`.
    closed: AtomicBool,
}

impl Peers {
    /// Adds a part; returns its inbound connection.
    pub(super) fn add(&self, part: PartId, ends: PeerConnections) -> Result<Inbound, BeginError> {
        let sockets = [
            ends.out.socket().try_clone()?,
            ends.heard.socket().try_clone()?,
        ];
        let heard = Inbound::new(part, ends.heard, ends.unpacker)?;
        let outbound = Arc::new(Outbound::new(ends.out));
        let mut all = self
            .outbound
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if self.closed.load(Ordering::Acquire) {
            return Err(BeginError::Setup("the machine ends"));
        }
        locked(&self.sockets).insert(part, sockets);
        all.insert(part, outbound);
        Ok(heard)
    }

    pub(super) fn outbound(&self, part: PartId) -> Option<Arc<Outbound>> {
        let all = self.outbound.read().unwrap_or_else(PoisonError::into_inner);
        all.get(&part).cloned()
    }

    pub(super) fn all_outbound(&self) -> Vec<Arc<Outbound>> {
        let all = self.outbound.read().unwrap_or_else(PoisonError::into_inner);
        all.values().cloned().collect()
    }

    pub(super) fn parts(&self) -> PartSet {
        let all = self.outbound.read().unwrap_or_else(PoisonError::into_inner);
        all.keys().copied().collect()
    }

    pub(super) fn count(&self) -> u8 {
        self.parts().len()
    }

    fn remove(&self, part: PartId) -> Option<Arc<Outbound>> {
        locked(&self.sockets).remove(&part);
        locked(&self.write_failures).remove(&part);
        self.counts(part);
        self.has_joined(part);
        let mut parting = locked(&self.parting);
        *parting = parting.without(part);
        let mut all = self
            .outbound
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        all.remove(&part)
    }

    /// Another part has become the home; its connections had its own number before.
    pub(super) fn replace_home(&self, by: PartId) {
        let mut all = self
            .outbound
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut sockets = locked(&self.sockets);
        let before = all.remove(&by);
        let before = before.and_then(|outbound| all.insert(PartId::HOME, outbound));
        if let Some(before) = before {
            before.finish();
        }
        if let Some(pair) = sockets.remove(&by) {
            sockets.insert(PartId::HOME, pair);
        }
        let mut failures = locked(&self.write_failures);
        failures.remove(&PartId::HOME);
        if let Some(failure) = failures.remove(&by) {
            failures.insert(PartId::HOME, failure);
        }
    }

    /// This part has become the home: the former one is no longer a peer.
    pub(super) fn forget_home(&self) {
        self.turn(ConnectionChange::Forget(PartId::HOME));
        if let Some(outbound) = self.remove(PartId::HOME) {
            outbound.finish();
        }
    }

    /// Records that a part knows this home.
    pub(super) fn acknowledge_home(&self, part: PartId) {
        let mut know = locked(&self.know);
        *know = know.with(part);
    }

    pub(super) fn acknowledged_home(&self) -> PartSet {
        *locked(&self.know)
    }

    fn turn(&self, turn: ConnectionChange) {
        locked(&self.turns).push(turn);
        self.has_turns.store(true, Ordering::Release);
    }

    /// Applies the queued changes to the connections that are read; returns the parts
    /// that were removed.
    pub(super) fn apply_changes(&self, hearing: &mut Vec<Inbound>) -> PartSet {
        let mut gone = PartSet::default();
        if !self.has_turns.swap(false, Ordering::AcqRel) {
            return gone;
        }
        // Under the lock: the removal of a part is awaited by looking at the queue.
        for turn in locked(&self.turns).drain(..) {
            match turn {
                ConnectionChange::Hear(heard) => {
                    gone = gone.without(heard.part());
                    hearing.push(*heard);
                }
                ConnectionChange::Forget(part) => {
                    gone = gone.with(part);
                    hearing.retain(|heard| heard.part() != part);
                }
            }
        }
        gone
    }

    /// Whether no message of an earlier part with this number can still be processed.
    fn is_drained(&self, part: PartId) -> bool {
        let turns = locked(&self.turns);
        !turns
            .iter()
            .any(|turn| matches!(turn, ConnectionChange::Forget(it) if *it == part))
    }

    /// The present number of the part behind an outbound connection.
    fn part_of_outbound(&self, outbound: &Arc<Outbound>) -> Option<PartId> {
        let all = self.outbound.read().unwrap_or_else(PoisonError::into_inner);
        let found = all.iter().find(|(_, it)| Arc::ptr_eq(it, outbound));
        found.map(|(part, _)| *part)
    }

    /// Records a failed write to a part.
    fn record_write_failure(&self, part: PartId, reason: String) {
        let mut failures = locked(&self.write_failures);
        failures.entry(part).or_insert((Instant::now(), reason));
        self.has_write_failures.store(true, Ordering::Release);
    }

    /// Why writes to a part failed, if any did.
    pub(super) fn write_failure(&self, part: PartId) -> Option<String> {
        let failures = locked(&self.write_failures);
        failures.get(&part).map(|(_, reason)| reason.clone())
    }

    /// Ends the inbound connections of parts to which a write failed a while ago, behind the data
    /// that has arrived. One whose part has ended ends by itself.
    pub(super) fn end_inbound_of_lost(&self) {
        if !self.has_write_failures.load(Ordering::Acquire) {
            return;
        }
        for (part, (at, _)) in &*locked(&self.write_failures) {
            if at.elapsed() >= LAST_WORDS_PATIENCE
                && let Some([_, inbound]) = locked(&self.sockets).get(part)
            {
                // It may have ended already.
                let _ = inbound.shutdown(Shutdown::Read);
            }
        }
    }

    pub(super) fn is_joining(&self, part: PartId) -> bool {
        locked(&self.joining).contains(part)
    }

    fn has_joined(&self, part: PartId) {
        let mut joining = locked(&self.joining);
        *joining = joining.without(part);
    }

    pub(super) fn is_new(&self, part: PartId) -> bool {
        locked(&self.new).contains(part)
    }

    /// Records a message of a part: its end is a loss from now on.
    pub(super) fn counts(&self, part: PartId) {
        let mut new = locked(&self.new);
        *new = new.without(part);
    }

    /// Whether this part has left the machine.
    pub(super) fn leaves(&self) -> bool {
        self.leaves.load(Ordering::Acquire)
    }

    pub(super) fn close(&self) {
        {
            let all = self
                .outbound
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            self.closed.store(true, Ordering::Release);
            for outbound in all.values() {
                outbound.close();
            }
        }
        for socket in locked(&self.sockets).values().flatten() {
            // The socket may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    /// Handles a broken connection to a part.
    pub(super) fn lost(&self, part: PartId, reason: String) {
        // It may have been removed meanwhile.
        let is_one = self.peers.parts().contains(part);
        if self.over.load(Ordering::Acquire) || self.peers.leaves() || !is_one {
            return;
        }
        {
            let mut ignored_loss = locked(&self.ignored_loss);
            if self.is_alone.load(Ordering::Acquire) {
                // This part was released: others that do not know the new home yet must
                // not report this part as lost. If the migration is cancelled, this part
                // has lost a part.
                ignored_loss.get_or_insert(SpanError::Lost { part, reason });
                return;
            }
        }
        match self.peers.is_new(part) {
            true => {
                tracing::info!(%part, reason, "a joining part was lost");
                self.forget(part);
            }
            false => self.end(SpanError::Lost { part, reason }),
        }
    }

    /// Handles a failed write to a part, if it still has that connection. The part is lost once
    /// what it sent before is processed: a part that ends says which part is to blame, and then
    /// closes its connections, so a write may fail before its goodbye is read.
    pub(super) fn outbound_lost(&self, outbound: &Arc<Outbound>, reason: String) {
        if let Some(part) = self.peers.part_of_outbound(outbound) {
            self.peers.record_write_failure(part, reason);
            self.wake();
        }
    }

    /// Handles a part's message that it cannot go on, and which part is to blame.
    pub(super) fn handle_goodbye(&self, from: PartId, part: PartId, reason: String) {
        match self.peers.is_new(from) || self.peers.leaves() {
            true => self.lost(from, reason),
            false => self.end(SpanError::Lost { part, reason }),
        }
    }

    /// Handles the removal of a part, announced by the home. For the removed part this is
    /// the last message; its answer tells the home that it knows.
    pub(super) fn handle_gone(&self, from: PartId, part: PartId) -> Result<(), SpanError> {
        match (from, part) {
            (PartId::HOME, PartId::HOME) => {}
            (PartId::HOME, part) if part == self.me() => {
                self.peers.leaves.store(true, Ordering::Release);
                return self.send_to(PartId::HOME, &PeerMessage::Gone(part));
            }
            (PartId::HOME, part) => {
                self.forget(part);
                return self.send_to(PartId::HOME, &PeerMessage::Gone(part));
            }
            (from, part) if from == part && self.me() == PartId::HOME => {
                let mut parting = locked(&self.peers.parting);
                *parting = parting.with(part);
                return Ok(());
            }
            (from, part) if self.me() == PartId::HOME => {
                let mut know = locked(&self.peers.know_gone);
                if know.0 == Some(part) {
                    know.1 = know.1.with(from);
                }
                return Ok(());
            }
            _ => {}
        }
        let reason = "it announced a removal that only another part may announce".into();
        Err(SpanError::Lost { part: from, reason })
    }

    /// Closes the connections to a part.
    fn forget(&self, part: PartId) {
        if self.peers.outbound(part).is_none() {
            return;
        }
        // First, so that no other part takes its number while its messages may still be
        // processed.
        self.peers.turn(ConnectionChange::Forget(part));
        if let Some(outbound) = self.peers.remove(part) {
            outbound.finish();
            self.limits.forget(part);
            self.step(vec![(Event::PartLeft { part }, EventContext::Nothing)]);
        }
        self.wake();
    }
}

impl Pages {
    /// Whether this part has left its machine or is about to.
    pub fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Acquire) || self.shared.peers.leaves()
    }

    /// The other parts.
    pub fn others(&self) -> PartSet {
        self.shared.peers.parts()
    }

    /// Adds an empty part, which starts at the same time or has started. The home adds it
    /// last; [`Self::welcome`] then tells it that it is a member.
    ///
    /// # Errors
    /// [`BeginError`]; nothing has changed then.
    pub fn join(&self, part: PartId, ends: PeerConnections) -> Result<(), BeginError> {
        let shared = &self.shared;
        if part == shared.me() || shared.peers.outbound(part).is_some() {
            return Err(BeginError::Setup("the part has joined already"));
        }
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while !shared.peers.is_drained(part) {
            if shared.over.load(Ordering::Acquire) || Instant::now() > deadline {
                return Err(BeginError::Setup(
                    "an earlier part with its number is not removed yet",
                ));
            }
            shared.wake();
            std::thread::sleep(POLL_INTERVAL);
        }
        {
            let mut new = locked(&shared.peers.new);
            *new = new.with(part);
        }
        if shared.is_home() {
            let mut joining = locked(&shared.peers.joining);
            *joining = joining.with(part);
        }
        let mut work = Effects::default();
        let (heard, done) = {
            // Under one lock: messages to it are counted from now on, so they must be
            // sent.
            let mut state = locked(&shared.state);
            let heard = shared.peers.add(part, ends);
            let joins = heard
                .iter()
                .map(|_| (Event::Join { part }, EventContext::Nothing));
            let done = shared.step_locked(&mut state, joins.collect(), &mut work);
            (heard, done)
        };
        shared.dispatch(done, work);
        let joined = heard.and_then(|heard| {
            shared.peers.turn(ConnectionChange::Hear(Box::new(heard)));
            Ok(self.spawn_writer(part)?)
        });
        if let Err(error) = joined {
            match shared.peers.outbound(part) {
                Some(_) => shared.forget(part),
                None => {
                    shared.peers.counts(part);
                    shared.peers.has_joined(part);
                }
            }
            return Err(error);
        }
        // It does not know the memory of this part.
        shared.limits.report_again();
        shared.wake();
        match self.failure() {
            None => Ok(()),
            Some(_) => Err(BeginError::Setup("the machine ends")),
        }
    }

    /// Waits for the first message of a part that joined: it runs, and its end is a loss
    /// from now on.
    ///
    /// # Errors
    /// [`SpanError::Lost`] if it ended instead or sends nothing in time.
    pub fn await_started(&self, part: PartId, patience: Duration) -> Result<(), SpanError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            let is_one = self.others().contains(part);
            if is_one && !self.shared.peers.is_new(part) {
                return Ok(());
            }
            if !is_one || Instant::now() >= deadline {
                let reason = "it did not start".into();
                return Err(SpanError::Lost { part, reason });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Completes a join, or cancels a removal: all parts know the part, which may hold
    /// pages from now on. Called at the home.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn welcome(&self, part: PartId) -> Result<(), SpanError> {
        let shared = &self.shared;
        shared.peers.has_joined(part);
        // Held while sending, so that limits stay in order.
        let limit = locked(&shared.limits.of_parts);
        shared.send_to(part, &PeerMessage::Limit(limit.flatten()))
    }

    /// Asks a part to move its pages to the parts with most room; pages without room
    /// stay. Called at the home.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn give_up(&self, part: PartId) -> Result<(), SpanError> {
        self.shared.send_to(part, &PeerMessage::Limit(Some(0)))
    }

    /// Resident bytes of a part that is moving its pages away; `None` before it has
    /// started to.
    pub fn resident_of(&self, part: PartId) -> Option<u64> {
        let others = locked(&self.shared.limits.peers);
        let of = others.get(&part)?;
        let heard = of.limit_bytes.is_some_and(|limit| limit <= PART_BYTES_MIN);
        heard.then_some(of.resident_bytes)
    }

    /// Removes a part that has not completed its join, or that holds no pages any more
    /// ([`Self::empty`]): all others forget it, and it ends. Directories need not be
    /// pinned afterwards ([`Self::pin_directories`]). Called at the home.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn remove_part(&self, part: PartId) -> Result<(), SpanError> {
        let shared = &self.shared;
        let mut work = Effects::default();
        // Before any part forgets it: its counted messages are excluded.
        let event = (Event::PartLeft { part }, EventContext::Nothing);
        let done = shared.step_locked(&mut locked(&shared.state), vec![event], &mut work);
        let failed = done.clone().err();
        shared.dispatch(done, work);
        if let Some(failed) = failed {
            return Err(failed);
        }
        // The part itself is told first, because it would report closed connections as a
        // loss. Its own end is not a loss from here on.
        {
            let mut new = locked(&shared.peers.new);
            *new = new.with(part);
        }
        shared.send_to(part, &PeerMessage::Gone(part))?;
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while !locked(&shared.peers.parting).contains(part)
            && shared.peers.outbound(part).is_some()
            && Instant::now() < deadline
        {
            std::thread::sleep(POLL_INTERVAL);
        }
        *locked(&shared.peers.know_gone) = (Some(part), PartSet::default());
        for other in self.others().without(part).iter() {
            shared.send_to(other, &PeerMessage::Gone(part))?;
        }
        let all_know = || {
            let others = self.others().without(part);
            let know = locked(&shared.peers.know_gone).1;
            others.iter().all(|other| know.contains(other))
        };
        while !all_know() && self.failure().is_none() && Instant::now() < deadline {
            std::thread::sleep(POLL_INTERVAL);
        }
        if all_know() {
            self.pin_directories(false);
        }
        if shared.peers.outbound(part).is_none() {
            // It ended before it was told, and is forgotten.
            return Ok(());
        }
        shared.peers.turn(ConnectionChange::Forget(part));
        if let Some(outbound) = shared.peers.remove(part) {
            outbound.finish();
        }
        shared.limits.forget(part);
        shared.wake();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Listener, PartConfig};
    use super::*;
    use crate::span::in_process::connect;
    use crate::span::wire;
    use std::sync::mpsc::{Receiver, Sender, channel};

    const PATIENCE: Duration = Duration::from_secs(20);

    /// Stops the serving thread in a note until the test lets it go on.
    struct HeldListener {
        stopped: Sender<()>,
        released: Mutex<Receiver<()>>,
        over: Sender<SpanError>,
    }

    impl Listener for HeldListener {
        fn note(&self, _: PartId, _: &[u8]) -> Result<(), String> {
            self.stopped.send(()).map_err(|error| error.to_string())?;
            let released = locked(&self.released).recv_timeout(PATIENCE);
            released.map_err(|error| error.to_string())
        }

        fn time(&self) -> u64 {
            0
        }

        fn saw(&self, _: u64) {}

        fn over(&self, reason: &SpanError) {
            // The test may have failed already.
            let _ = self.over.send(reason.clone());
        }
    }

    fn frame(message: &PeerMessage) -> Vec<u8> {
        let mut frame = Vec::new();
        wire::encode(message, &mut frame).unwrap();
        frame
    }

    /// Part 1 has lost part 2, says so and ends; the home's write to part 1 fails before it reads
    /// that.
    #[test]
    fn a_part_that_ended_is_not_blamed_before_its_goodbye_is_read() {
        let part = |number| PartId::new(number).unwrap();
        let parts: PartSet = [part(0), part(1), part(2)].into_iter().collect();
        let mut ends = connect(parts, |_, _| true).unwrap();
        let mut own = |number: usize| ends.remove(&part(number)).unwrap();
        let [home, mut one, mut two] = [own(0), own(1), own(2)];
        let (stopped, stops) = channel();
        let (release, released) = channel();
        let (over, overs) = channel();
        let released = Mutex::new(released);
        let listener = HeldListener {
            stopped,
            released,
            over,
        };
        let config = PartConfig {
            me: PartId::HOME,
            parts,
            origin: PartId::HOME,
            memories: Arc::new([]),
            segment_pages: 16,
            hold: Duration::ZERO,
            seed: 1,
            room_bytes: None,
        };
        let pages = Pages::begin(config, home, Arc::new(listener)).unwrap();
        let two = two.get_mut(&PartId::HOME).unwrap();
        two.out.write(&frame(&PeerMessage::Note(vec![1]))).unwrap();
        stops.recv_timeout(PATIENCE).unwrap();
        let goodbye = PeerMessage::Goodbye {
            part: part(2),
            reason: "it is silent".into(),
        };
        let mut one = one.remove(&PartId::HOME).unwrap();
        one.out.write(&frame(&goodbye)).unwrap();
        drop(one);
        // Until the kernel knows that nobody reads it.
        let outbound = pages.shared.peers.outbound(part(1)).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let failed = loop {
            assert!(Instant::now() < deadline, "the connection is still open");
            if let Err(error) = outbound.send(frame(&PeerMessage::Note(vec![2]))) {
                break error;
            }
            std::thread::yield_now();
        };
        pages.shared.outbound_lost(&outbound, failed.to_string());
        release.send(()).unwrap();
        let expected = SpanError::Lost {
            part: part(2),
            reason: "it is silent".into(),
        };
        assert_eq!(overs.recv_timeout(PATIENCE).unwrap(), expected);
        assert_eq!(pages.failure(), Some(expected));
    }
}
