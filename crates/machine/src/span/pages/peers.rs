//! The other parts, which come and go while this one runs.
//!
//! ```text
//!   the other one          this one                        home
//!        │◀── both dial ──▶│ knows it, hears it             │
//!        │◀─────────────────────────── both dial ──────────▶│ the last that knows it
//!        │◀──────────────────────────────────────── Limit ──│ it is one of them:
//!        │─── Memory ─────▶│                                │ may get threads and pages
//!        ┊                 ┊                                ┊
//!        │                 │                 has all of its pages: nothing concerns it
//!        │◀────────────────┼───────────────────────── Gone ─│
//!        │─── Gone ────────┼───────────────────────────────▶│ it takes nobody for lost
//!        │◀── closed ──────│◀───────────────────────── Gone ─│
//!        │                 │─── Gone ───────────────────────▶│ all know
//! ```
//!
//! Until it is heard it is no loss, whatever it says last: what was begun with it may be
//! undone by its end. Who is gone waits until all have closed its connections, and ends then.

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

/// How long an earlier part of the same number may take to be heard out, and the pause
/// between two looks.
const HEARD_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// What the thread that hears them is to do, in order.
pub(super) enum ConnectionChange {
    Hear(Box<Inbound>),
    Forget(PartId),
}

#[derive(Default)]
pub(super) struct Peers {
    told: RwLock<BTreeMap<PartId, Arc<Outbound>>>,
    /// Broken at the end, so that nobody waits on them.
    sockets: Mutex<BTreeMap<PartId, [TcpStream; 2]>>,
    turns: Mutex<Vec<ConnectionChange>>,
    has_turns: AtomicBool,
    /// Those that joined, and of which nothing was heard.
    new: Mutex<PartSet>,
    /// At the home: those that joined and that the machine has not for sure: nothing is
    /// moved there.
    joining: Mutex<PartSet>,
    /// This part is none any more: others end what they have with it.
    leaves: AtomicBool,
    /// At the home: those that know that they are none any more.
    parting: Mutex<PartSet>,
    /// At the home: who knows of a part that it is none any more.
    know_gone: Mutex<(Option<PartId>, PartSet)>,
    /// At a home that succeeded another one: those that know it.
    know: Mutex<PartSet>,
    /// It is over: nobody joins any more. Changes under the lock of `told`.
    closed: AtomicBool,
}

impl Peers {
    /// One more; who is heard on its connection.
    pub(super) fn add(&self, part: PartId, ends: PeerConnections) -> Result<Inbound, BeginError> {
        let sockets = [
            ends.out.socket().try_clone()?,
            ends.heard.socket().try_clone()?,
        ];
        let heard = Inbound::new(part, ends.heard, ends.unpacker)?;
        let told = Arc::new(Outbound::new(ends.out));
        let mut all = self.told.write().unwrap_or_else(PoisonError::into_inner);
        if self.closed.load(Ordering::Acquire) {
            return Err(BeginError::Setup("the machine ends"));
        }
        locked(&self.sockets).insert(part, sockets);
        all.insert(part, told);
        Ok(heard)
    }

    pub(super) fn told(&self, part: PartId) -> Option<Arc<Outbound>> {
        let all = self.told.read().unwrap_or_else(PoisonError::into_inner);
        all.get(&part).cloned()
    }

    pub(super) fn all_told(&self) -> Vec<Arc<Outbound>> {
        let all = self.told.read().unwrap_or_else(PoisonError::into_inner);
        all.values().cloned().collect()
    }

    /// Which they are.
    pub(super) fn parts(&self) -> PartSet {
        let all = self.told.read().unwrap_or_else(PoisonError::into_inner);
        all.keys().copied().collect()
    }

    pub(super) fn count(&self) -> u8 {
        self.parts().len()
    }

    fn remove(&self, part: PartId) -> Option<Arc<Outbound>> {
        locked(&self.sockets).remove(&part);
        self.counts(part);
        self.has_joined(part);
        let mut parting = locked(&self.parting);
        *parting = parting.without(part);
        let mut all = self.told.write().unwrap_or_else(PoisonError::into_inner);
        all.remove(&part)
    }

    /// The home is another part from now on, which was told under its own number.
    pub(super) fn succeed_home(&self, by: PartId) {
        let mut all = self.told.write().unwrap_or_else(PoisonError::into_inner);
        let mut sockets = locked(&self.sockets);
        let before = all.remove(&by);
        let before = before.and_then(|told| all.insert(PartId::HOME, told));
        if let Some(before) = before {
            before.finish();
        }
        if let Some(pair) = sockets.remove(&by) {
            sockets.insert(PartId::HOME, pair);
        }
    }

    /// This part is the home from now on: who was it is none of the others.
    pub(super) fn forget_home(&self) {
        self.turn(ConnectionChange::Forget(PartId::HOME));
        if let Some(told) = self.remove(PartId::HOME) {
            told.finish();
        }
    }

    /// A part knows that this one is the home.
    pub(super) fn knows_succession(&self, part: PartId) {
        let mut know = locked(&self.know);
        *know = know.with(part);
    }

    pub(super) fn heard_of_succession(&self) -> PartSet {
        *locked(&self.know)
    }

    fn turn(&self, turn: ConnectionChange) {
        locked(&self.turns).push(turn);
        self.has_turns.store(true, Ordering::Release);
    }

    /// Hears those that have come, and no more those that are gone; which those are.
    pub(super) fn take_turns(&self, hearing: &mut Vec<Inbound>) -> PartSet {
        let mut gone = PartSet::default();
        if !self.has_turns.swap(false, Ordering::AcqRel) {
            return gone;
        }
        // (Under the lock: who waits for one to be forgotten looks there.)
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

    /// Whether what an earlier part of that number said may still be taken note of.
    fn is_heard_out(&self, part: PartId) -> bool {
        let turns = locked(&self.turns);
        !turns
            .iter()
            .any(|turn| matches!(turn, ConnectionChange::Forget(it) if *it == part))
    }

    /// The part that is told so now, by its number of today.
    fn told_by(&self, told: &Arc<Outbound>) -> Option<PartId> {
        let all = self.told.read().unwrap_or_else(PoisonError::into_inner);
        let found = all.iter().find(|(_, it)| Arc::ptr_eq(it, told));
        found.map(|(part, _)| *part)
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

    /// Something was heard of a part: its end is a loss from now on.
    pub(super) fn counts(&self, part: PartId) {
        let mut new = locked(&self.new);
        *new = new.without(part);
    }

    /// Whether this part is none any more.
    pub(super) fn leaves(&self) -> bool {
        self.leaves.load(Ordering::Acquire)
    }

    pub(super) fn close(&self) {
        {
            let all = self.told.write().unwrap_or_else(PoisonError::into_inner);
            self.closed.store(true, Ordering::Release);
            for told in all.values() {
                told.close();
            }
        }
        for socket in locked(&self.sockets).values().flatten() {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    /// A part is not heard, or cannot be told anything, any more.
    pub(super) fn lost(&self, part: PartId, reason: String) {
        // (It may have been forgotten since it was looked at.)
        let is_one = self.others.parts().contains(part);
        if self.over.load(Ordering::Acquire) || self.others.leaves() || !is_one {
            return;
        }
        {
            let mut missed = locked(&self.missed);
            if self.is_alone.load(Ordering::Acquire) {
                // It was let go: others that have not heard of who is the home now must not
                // take this one for lost. Should it stay after all, it has lost a part.
                missed.get_or_insert(SpanError::Lost { part, reason });
                return;
            }
        }
        match self.others.is_new(part) {
            true => {
                tracing::info!(%part, reason, "a part that was about to join does not");
                self.forget(part);
            }
            false => self.end(SpanError::Lost { part, reason }),
        }
    }

    /// A part cannot be told anything, if it is still told so.
    pub(super) fn lost_by(&self, told: &Arc<Outbound>, reason: String) {
        if let Some(part) = self.others.told_by(told) {
            self.lost(part, reason);
        }
    }

    /// A part cannot go on, as it says, and who is to blame.
    pub(super) fn hear_goodbye(&self, from: PartId, part: PartId, reason: String) {
        match self.others.is_new(from) || self.others.leaves() {
            true => self.lost(from, reason),
            false => self.end(SpanError::Lost { part, reason }),
        }
    }

    /// A part is none any more, as the home says; of this one that was its last word. Or, to
    /// the home, as the part itself says, which knows it now.
    pub(super) fn hear_gone(&self, from: PartId, part: PartId) -> Result<(), SpanError> {
        match (from, part) {
            (PartId::HOME, PartId::HOME) => {}
            (PartId::HOME, part) if part == self.me() => {
                self.others.leaves.store(true, Ordering::Release);
                return self.tell_part(PartId::HOME, &PeerMessage::Gone(part));
            }
            (PartId::HOME, part) => {
                self.forget(part);
                return self.tell_part(PartId::HOME, &PeerMessage::Gone(part));
            }
            (from, part) if from == part && self.me() == PartId::HOME => {
                let mut parting = locked(&self.others.parting);
                *parting = parting.with(part);
                return Ok(());
            }
            (from, part) if self.me() == PartId::HOME => {
                let mut know = locked(&self.others.know_gone);
                if know.0 == Some(part) {
                    know.1 = know.1.with(from);
                }
                return Ok(());
            }
            _ => {}
        }
        let reason = "it says of who is gone what only another part can say".into();
        Err(SpanError::Lost { part: from, reason })
    }

    /// Nothing is said to a part any more, and nothing heard.
    fn forget(&self, part: PartId) {
        if self.others.told(part).is_none() {
            return;
        }
        // (First: no other part takes its number before nothing of it is heard any more.)
        self.others.turn(ConnectionChange::Forget(part));
        if let Some(told) = self.others.remove(part) {
            told.finish();
            self.limits.forget(part);
            self.step(vec![(Event::Gone { part }, EventContext::Nothing)]);
        }
        self.ring();
    }
}

impl Pages {
    /// Whether this part is one of its machine's no more, or is about to be none.
    pub fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Acquire) || self.shared.others.leaves()
    }

    /// The other parts.
    pub fn others(&self) -> PartSet {
        self.shared.others.parts()
    }

    /// A part that has nothing is one of them; it has begun, or does so at this time. The
    /// home is the last that is told: then [`Self::welcome`] says to it that it is one.
    ///
    /// # Errors
    /// [`BeginError`]; nothing has changed then.
    pub fn join(&self, part: PartId, ends: PeerConnections) -> Result<(), BeginError> {
        let shared = &self.shared;
        if part == shared.me() || shared.others.told(part).is_some() {
            return Err(BeginError::Setup("it is one of them already"));
        }
        let deadline = Instant::now() + HEARD_WITHIN;
        while !shared.others.is_heard_out(part) {
            if shared.over.load(Ordering::Acquire) || Instant::now() > deadline {
                return Err(BeginError::Setup("one of its number is not forgotten yet"));
            }
            shared.ring();
            std::thread::sleep(LOOK_AGAIN);
        }
        {
            let mut new = locked(&shared.others.new);
            *new = new.with(part);
        }
        if shared.is_home() {
            let mut joining = locked(&shared.others.joining);
            *joining = joining.with(part);
        }
        let mut work = Effects::default();
        let (heard, done) = {
            // At once: what is said to it from then on is counted, and so must be told.
            let mut state = locked(&shared.state);
            let heard = shared.others.add(part, ends);
            let joins = heard
                .iter()
                .map(|_| (Event::Join { part }, EventContext::Nothing));
            let done = shared.step_in(&mut state, joins.collect(), &mut work);
            (heard, done)
        };
        shared.say(done, work);
        let joined = heard.and_then(|heard| {
            shared.others.turn(ConnectionChange::Hear(Box::new(heard)));
            Ok(self.spawn_tell(part)?)
        });
        if let Err(error) = joined {
            match shared.others.told(part) {
                Some(_) => shared.forget(part),
                None => {
                    shared.others.counts(part);
                    shared.others.has_joined(part);
                }
            }
            return Err(error);
        }
        // What is here it does not know.
        shared.limits.tell_again();
        shared.ring();
        match self.failure() {
            None => Ok(()),
            Some(_) => Err(BeginError::Setup("the machine ends")),
        }
    }

    /// Waits until a part that joined has said something: it has begun, and its end is a loss
    /// from now on.
    ///
    /// # Errors
    /// [`SpanError::Lost`], if it ended instead, or says nothing.
    pub fn await_begun(&self, part: PartId, patience: Duration) -> Result<(), SpanError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            let is_one = self.others().contains(part);
            if is_one && !self.shared.others.is_new(part) {
                return Ok(());
            }
            if !is_one || Instant::now() >= deadline {
                let reason = "it did not begin".into();
                return Err(SpanError::Lost { part, reason });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// All parts know a part that joined, and the machine has it: it may have pages, as any.
    /// Or it does not go after all. Only of the home.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn welcome(&self, part: PartId) -> Result<(), SpanError> {
        let shared = &self.shared;
        shared.others.has_joined(part);
        // (Who holds this tells.)
        let limit = locked(&shared.limits.of_parts);
        shared.tell_part(part, &PeerMessage::Limit(limit.flatten()))
    }

    /// A part is to give away what it has, to those with most room; what they do not take
    /// stays there. Only of the home.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn give_up(&self, part: PartId) -> Result<(), SpanError> {
        self.shared.tell_part(part, &PeerMessage::Limit(Some(0)))
    }

    /// Bytes that a part has which is to give away what it has; `None` before it heard that.
    pub fn resident_of(&self, part: PartId) -> Option<u64> {
        let others = locked(&self.shared.limits.others);
        let of = others.get(&part)?;
        let heard = of.limit_bytes.is_some_and(|limit| limit <= PART_BYTES_MIN);
        heard.then_some(of.resident_bytes)
    }

    /// A part joins no more, or has given up all its pages ([`Self::empty`]): all others
    /// forget it, and it ends. When they have, directories need not stay any more
    /// ([`Self::keep_directories`]): nobody wants anything to be there. Only of the home.
    ///
    /// # Errors
    /// [`SpanError`].
    pub fn part_with(&self, part: PartId) -> Result<(), SpanError> {
        let shared = &self.shared;
        let mut work = Effects::default();
        // (Before anybody forgets it: what it said counts no more.)
        let event = (Event::Gone { part }, EventContext::Nothing);
        let done = shared.step_in(&mut locked(&shared.state), vec![event], &mut work);
        let failed = done.clone().err();
        shared.say(done, work);
        if let Some(failed) = failed {
            return Err(failed);
        }
        // It first, as it would take who closes its connections for lost. Its own end is no
        // loss from here on.
        {
            let mut new = locked(&shared.others.new);
            *new = new.with(part);
        }
        shared.tell_part(part, &PeerMessage::Gone(part))?;
        let deadline = Instant::now() + HEARD_WITHIN;
        while !locked(&shared.others.parting).contains(part)
            && shared.others.told(part).is_some()
            && Instant::now() < deadline
        {
            std::thread::sleep(LOOK_AGAIN);
        }
        *locked(&shared.others.know_gone) = (Some(part), PartSet::default());
        for other in self.others().without(part).iter() {
            shared.tell_part(other, &PeerMessage::Gone(part))?;
        }
        let all_know = || {
            let others = self.others().without(part);
            let know = locked(&shared.others.know_gone).1;
            others.iter().all(|other| know.contains(other))
        };
        while !all_know() && self.failure().is_none() && Instant::now() < deadline {
            std::thread::sleep(LOOK_AGAIN);
        }
        if all_know() {
            self.keep_directories(false);
        }
        if shared.others.told(part).is_none() {
            // It ended before it heard that, and is forgotten.
            return Ok(());
        }
        shared.others.turn(ConnectionChange::Forget(part));
        if let Some(told) = shared.others.remove(part) {
            told.finish();
        }
        shared.limits.forget(part);
        shared.ring();
        Ok(())
    }
}
