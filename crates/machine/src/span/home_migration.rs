//! The home of a machine that spans moves, and its other parts stay where they are.
//!
//! ```text
//!   home                       a member, at first as any          other members
//!     │ threads ───────────────────────────────────────────────────▶│   it runs
//!     │ pages, to where most room is ─▶│                            │
//!     │ … frozen …                     │                            │
//!     │ the last pages ───────────────▶│                            │   it stands
//!     │ image, [`HomeState`] ────────────▶│ a machine of the image     │
//!     │ … it is decided …              │ [`MemberPart::succeed`] ──▶│
//!     ▼ ends                           │ threads ──────────────────▶│   it runs
//! ```
//!
//! So a machine that is larger than any node can leave a node, too: only what its home has
//! must go anywhere. How the image comes there, and who decides, is not here.

use super::pages::{DrainedHome, PART_BYTES_MIN, SpanError};
use super::threads::{Home, HomeListener, LOOK_AGAIN, MemberChannel, MemberPart, SpanningError};
use keel_wasm::coherence::{Holdings, PartId, PartSet};
use keel_wasm::memory::GuestMemory;
use keel_wasm::runtime::Machine;
use keel_wasm::runtime::parts::{Members, Order, Spawning};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// While this is not exceeded the rest goes while it stands; so much of it at most, where
/// nothing leaves any more.
const LAST_BYTES: u64 = PART_BYTES_MIN + (256 << 10);
const LAST_BYTES_MAX: u64 = 64 << 20;
/// How long nothing may leave before the rest goes while it stands, or it is given up,
/// where that is too much.
const STILL: Duration = Duration::from_secs(2);
/// How long directories may take to come home, at least.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// A thread, and where its code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadLocation {
    /// Its number.
    pub tid: u32,
    /// The part that has an instance of it.
    pub at: PartId,
    /// The part at which it goes on.
    pub goes_on: PartId,
}

/// What a home leaves to the part that succeeds it, beside the image of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeState {
    /// The part that it is for.
    pub successor: PartId,
    /// The other parts.
    pub members: PartSet,
    /// How large each memory is.
    pub memory_bytes: Vec<u64>,
    /// Who holds what.
    pub held: Holdings,
    /// Threads that are not at the home.
    pub threads: Vec<ThreadLocation>,
    /// Where threads begin.
    pub spawning: Spawning,
    /// What each part keeps at most, in bytes.
    pub part_bytes: Option<u64>,
}

/// A home that makes way for a member to succeed it.
#[derive(Debug)]
pub struct HomeMigration {
    home: Arc<Home>,
    successor: PartId,
    /// Threads that were at the home.
    sent: Vec<u32>,
    left: Option<DrainedHome>,
}

impl HomeMigration {
    /// Threads of the home go to another member, and its pages to those with most room,
    /// while the machine runs; returns when little is left. No thread goes to the successor
    /// meanwhile. `goes_on` is told the bytes that are left, now and then, and says false
    /// where nobody waits for it any more.
    ///
    /// # Errors
    /// [`SpanningError`]; the machine is as it was, with some of its memory elsewhere.
    pub fn begin(
        home: Arc<Home>,
        successor: PartId,
        threads_to: PartId,
        patience: Duration,
        goes_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Self, SpanningError> {
        let members = home.members();
        if !members.contains(successor) || !members.without(successor).contains(threads_to) {
            return Err(keel_wasm::runtime::MachineError::NoPart(successor).into());
        }
        let places = home.machine().places().into_iter();
        let mut leaving = HomeMigration {
            successor,
            sent: places
                .filter(|(_, at)| *at == PartId::HOME)
                .map(|(tid, _)| tid)
                .collect(),
            home,
            left: None,
        };
        match leaving.make_way(threads_to, Instant::now() + patience, goes_on) {
            Ok(()) => Ok(leaving),
            Err(error) => {
                leaving.stay()?;
                Err(error)
            }
        }
    }

    fn make_way(
        &mut self,
        threads_to: PartId,
        deadline: Instant,
        goes_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), SpanningError> {
        let (home, successor) = (&self.home, self.successor);
        home.let_leave(successor, true);
        let leaves = |at: PartId| at == PartId::HOME || at == successor;
        let resident = || home.pages().resident_bytes().unwrap_or(0);
        home.send_threads(leaves, threads_to, deadline, &mut || goes_on(resident()))?;
        home.pages().give_up_own(true);
        let mut last = (u64::MAX, Instant::now());
        loop {
            if let Some(failure) = home.failure() {
                return Err(failure.into());
            }
            let now = Instant::now();
            let bytes = home.pages().resident_bytes()?;
            if bytes <= LAST_BYTES {
                break;
            }
            if !goes_on(bytes) {
                return Err(SpanError::Ended.into());
            }
            if bytes < last.0 {
                last = (bytes, now);
            } else if now >= deadline || now.duration_since(last.1) > STILL {
                // Nobody else takes it.
                if bytes <= LAST_BYTES_MAX && self.has_room(bytes) {
                    break;
                }
                let part = PartId::HOME;
                return Err(SpanError::Full { part, bytes }.into());
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        // (They go with who is the home.)
        home.pages().keep_directories(true);
        let rest = deadline.saturating_duration_since(Instant::now());
        Ok(home.pages().call_directories(rest.max(CALL_WITHIN))?)
    }

    /// Whether what is here can leave while the machine stands: more may have come since.
    ///
    /// # Errors
    /// [`SpanError::Full`].
    pub fn check(&self) -> Result<(), SpanningError> {
        let bytes = self.home.pages().resident_bytes()?;
        match bytes <= LAST_BYTES_MAX {
            true => Ok(()),
            false => Err(SpanError::Full {
                part: PartId::HOME,
                bytes,
            }
            .into()),
        }
    }

    /// Whether the successor has.
    fn has_room(&self, bytes: u64) -> bool {
        let memory = self.home.pages().memory_of_parts();
        memory.get(&self.successor).is_some_and(|memory| {
            let room = |limit: u64| limit.saturating_sub(memory.resident_bytes);
            memory.limit_bytes.is_none_or(|limit| room(limit) >= bytes)
        })
    }

    /// The last pages leave; what the successor has to know. The machine is frozen.
    ///
    /// # Errors
    /// [`SpanningError`]; it may be thawed then, and stay.
    pub fn leave(&mut self, patience: Duration) -> Result<HomeState, SpanningError> {
        let home = &self.home;
        let mut left = home.pages().leave(self.successor, patience)?;
        let places = home.machine().places().into_iter();
        let threads = places.map(|(tid, at)| {
            let goes_on = match self.sent.contains(&tid) {
                true => PartId::HOME,
                false => at,
            };
            ThreadLocation { tid, at, goes_on }
        });
        let legacy = HomeState {
            successor: self.successor,
            members: home.members().without(self.successor),
            memory_bytes: sizes(home.machine().memories()),
            held: left.take_legacy(),
            threads: threads.filter(|it| it.at != PartId::HOME).collect(),
            spawning: home.spawning(),
            part_bytes: home.pages().part_limit(),
        };
        left.let_go();
        self.left = Some(left);
        Ok(legacy)
    }

    /// No other part is the home, nor ever will be: it may be thawed when this returns. Its
    /// successor is a member as any, and threads come back.
    ///
    /// # Errors
    /// [`SpanError`], if a part was lost: it has ended then.
    pub fn stay(&mut self) -> Result<(), SpanError> {
        if let Some(left) = self.left.take() {
            left.stay()?;
        }
        let home = &self.home;
        home.pages().give_up_own(false);
        home.pages().keep_directories(false);
        home.let_leave(self.successor, false);
        for tid in std::mem::take(&mut self.sent) {
            // (One that has ended meanwhile.)
            if let Err(error) = home.machine().move_thread(tid, PartId::HOME) {
                tracing::debug!(tid, %error, "a thread stays where it is");
            }
        }
        Ok(())
    }
}

fn sizes(memories: &[Arc<GuestMemory>]) -> Vec<u64> {
    memories.iter().map(|memory| memory.size_bytes()).collect()
}

impl MemberPart {
    /// Its memories, of which a machine is made that is to succeed the home.
    pub fn memories(&self) -> &Arc<[Arc<GuestMemory>]> {
        self.member().memories()
    }

    /// Whether it knows the same parts, and memories of the same size, as the home.
    ///
    /// # Errors
    /// [`SpanError::Inconsistent`].
    pub fn can_succeed(&self, legacy: &HomeState) -> Result<(), SpanError> {
        if self.pages().others() != legacy.members.with(PartId::HOME) {
            let why = "the home and its successor know other parts";
            return Err(SpanError::Inconsistent(why.into()));
        }
        if sizes(self.memories()) != legacy.memory_bytes {
            let why = "the home's memory grew meanwhile, or could not; try again";
            return Err(SpanError::Inconsistent(why.into()));
        }
        Ok(())
    }

    /// This part is the home from now on, of a machine that was made of the image on its
    /// memories and stands. All others hear it here; threads are on their way to where they
    /// were when this returns, and go on when it is thawed. This part is no member any more.
    /// The others have so long to hear it.
    ///
    /// # Errors
    /// [`SpanningError`]; the machine has ended then.
    pub fn succeed(
        &self,
        machine: &Machine,
        legacy: &HomeState,
        patience: Duration,
    ) -> Result<Home, SpanningError> {
        let pages = self.pages();
        let begun = Instant::now();
        self.can_succeed(legacy)?;
        let (listener, failure) = HomeListener::depending(machine);
        pages.succeed(&legacy.held, Arc::new(listener), patience)?;
        let way = Arc::new(MemberChannel::new(pages.teller()));
        let members = legacy.members.iter().collect();
        machine.set_members(members, Some(way.clone()), legacy.spawning)?;
        for ThreadLocation { tid, at, goes_on } in &legacy.threads {
            // It is in the image, as it was there.
            way.order(*at, &Order::Leave { tid: *tid });
            if *goes_on != PartId::HOME {
                machine.move_thread(*tid, *goes_on)?;
            }
        }
        pages.limit_parts(legacy.part_bytes)?;
        self.is_home_now();
        Ok(Home::of(
            machine,
            pages.clone(),
            legacy.members,
            legacy.spawning,
            failure,
            begun.elapsed(),
        ))
    }
}
