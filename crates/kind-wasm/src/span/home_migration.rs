//! Moves the home of a machine that spans, while its other parts stay where they are.
//!
//! ```text
//!   home                       successor, a member at first       other members
//!     │ threads ───────────────────────────────────────────────────▶│   running
//!     │ pages, to parts with most room▶│                            │
//!     │ … frozen …                     │                            │
//!     │ the last pages ───────────────▶│                            │   stopped
//!     │ image, [`HomeState`] ─────────▶│ restores the image         │
//!     │ … commit …                     │ [`become_home`] ──────────▶│
//!     ▼ ends                           │ threads ──────────────────▶│   running
//! ```
//!
//! So a machine larger than any node can leave a node: only what its home holds must
//! move. The transfer of the image and the decision happen elsewhere.

use super::home_and_member::{
    Home, HomeListener, MemberChannel, MemberPart, POLL_INTERVAL, SpanningError,
};
use super::pages::{DrainedHome, PART_BYTES_MIN, SpanError};
use keel_wasm::coherence::{Holdings, PartId, PartSet};
use keel_wasm::memory::GuestMemory;
use keel_wasm::runtime::Machine;
use keel_wasm::runtime::parts::{Members, Order, SpawnPolicy};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Once at most this many bytes remain, they are moved while the machine is stopped; the
/// maximum applies where no progress is made.
const LAST_BYTES: u64 = PART_BYTES_MIN + (256 << 10);
const LAST_BYTES_MAX: u64 = 64 << 20;
/// How long no progress may be made before the rest is moved while the machine is
/// stopped, or the migration is given up because the rest is too much.
const NO_PROGRESS_MAX: Duration = Duration::from_secs(2);
/// Minimum time limit for collecting directories.
const COLLECT_TIMEOUT_MIN: Duration = Duration::from_secs(10);

/// A thread and the parts that it is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadLocation {
    pub tid: u32,
    /// The part that has an instance of it.
    pub at: PartId,
    /// The part at which it resumes.
    pub goes_on: PartId,
}

/// State that a home passes to its successor, beside the machine's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeState {
    pub successor: PartId,
    /// The other parts.
    pub members: PartSet,
    /// Size of each memory.
    pub memory_bytes: Vec<u64>,
    /// The directory state.
    pub held: Holdings,
    /// Threads that are not at the home.
    pub threads: Vec<ThreadLocation>,
    /// Where new threads begin.
    pub spawning: SpawnPolicy,
    /// Limit of each part, in bytes.
    pub part_bytes: Option<u64>,
}

/// A home migration at the former home.
#[derive(Debug)]
pub struct HomeMigration {
    home: Arc<Home>,
    successor: PartId,
    /// Threads that were at the home.
    moved_threads: Vec<u32>,
    drained: Option<DrainedHome>,
}

impl HomeMigration {
    /// Moves the home's threads to another member and its pages to the parts with most
    /// room, while the machine runs; returns when little is left. No thread moves to the
    /// successor meanwhile. `goes_on` receives the remaining bytes from time to time and
    /// returns false to give up.
    ///
    /// # Errors
    /// [`SpanningError`]; the machine is as before, with some of its memory elsewhere.
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
        let places = home.machine().thread_locations().into_iter();
        let mut leaving = HomeMigration {
            successor,
            moved_threads: places
                .filter(|(_, at)| *at == PartId::HOME)
                .map(|(tid, _)| tid)
                .collect(),
            home,
            drained: None,
        };
        match leaving.drain_home(threads_to, Instant::now() + patience, goes_on) {
            Ok(()) => Ok(leaving),
            Err(error) => {
                leaving.cancel()?;
                Err(error)
            }
        }
    }

    fn drain_home(
        &mut self,
        threads_to: PartId,
        deadline: Instant,
        goes_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), SpanningError> {
        let (home, successor) = (&self.home, self.successor);
        home.set_leaving(successor, true);
        let leaves = |at: PartId| at == PartId::HOME || at == successor;
        let resident = || home.pages().resident_bytes().unwrap_or(0);
        home.send_threads(leaves, threads_to, deadline, &mut || goes_on(resident()))?;
        home.pages().drain_self(true);
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
            } else if now >= deadline || now.duration_since(last.1) > NO_PROGRESS_MAX {
                // No other part takes it.
                if bytes <= LAST_BYTES_MAX && self.has_room(bytes) {
                    break;
                }
                let part = PartId::HOME;
                return Err(SpanError::Full { part, bytes }.into());
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        // They move with the home.
        home.pages().pin_directories(true);
        let rest = deadline.saturating_duration_since(Instant::now());
        Ok(home
            .pages()
            .recall_directories(rest.max(COLLECT_TIMEOUT_MIN))?)
    }

    /// Whether the remaining pages can move while the machine is stopped: more may have
    /// arrived since.
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

    /// Whether the successor has room.
    fn has_room(&self, bytes: u64) -> bool {
        let memory = self.home.pages().memory_of_parts();
        memory.get(&self.successor).is_some_and(|memory| {
            let room = |limit: u64| limit.saturating_sub(memory.resident_bytes);
            memory.limit_bytes.is_none_or(|limit| room(limit) >= bytes)
        })
    }

    /// Moves the last pages; returns the state for the successor. The machine is frozen.
    ///
    /// # Errors
    /// [`SpanningError`]; the machine may then be thawed and stay.
    pub fn leave(&mut self, patience: Duration) -> Result<HomeState, SpanningError> {
        let home = &self.home;
        let mut left = home.pages().leave(self.successor, patience)?;
        let places = home.machine().thread_locations().into_iter();
        let threads = places.map(|(tid, at)| {
            let goes_on = match self.moved_threads.contains(&tid) {
                true => PartId::HOME,
                false => at,
            };
            ThreadLocation { tid, at, goes_on }
        });
        let home_state = HomeState {
            successor: self.successor,
            members: home.members().without(self.successor),
            memory_bytes: sizes(home.machine().memories()),
            held: left.take_holdings(),
            threads: threads.filter(|it| it.at != PartId::HOME).collect(),
            spawning: home.spawning(),
            part_bytes: home.pages().part_limit(),
        };
        left.release();
        self.drained = Some(left);
        Ok(home_state)
    }

    /// Cancels the migration: no other part is the home or will be, and the machine may
    /// be thawed. The successor stays a member, and threads move back.
    ///
    /// # Errors
    /// [`SpanError`] if a part was lost: the machine has ended then.
    pub fn cancel(&mut self) -> Result<(), SpanError> {
        if let Some(left) = self.drained.take() {
            left.cancel()?;
        }
        let home = &self.home;
        home.pages().drain_self(false);
        home.pages().pin_directories(false);
        home.set_leaving(self.successor, false);
        for tid in std::mem::take(&mut self.moved_threads) {
            // The thread may have ended.
            if let Err(error) = home.machine().move_thread(tid, PartId::HOME) {
                tracing::debug!(tid, %error, "a thread was not moved back");
            }
        }
        Ok(())
    }
}

fn sizes(memories: &[Arc<GuestMemory>]) -> Vec<u64> {
    memories.iter().map(|memory| memory.size_bytes()).collect()
}

impl MemberPart {
    /// Its memories, on which the machine's image is restored for a successor.
    pub fn memories(&self) -> &Arc<[Arc<GuestMemory>]> {
        self.member().memories()
    }

    /// Checks that this part knows the same parts and memory sizes as the home.
    ///
    /// # Errors
    /// [`SpanError::Inconsistent`].
    pub fn check_successor(&self, home_state: &HomeState) -> Result<(), SpanError> {
        if self.pages().others() != home_state.members.with(PartId::HOME) {
            let why = "the home and its successor know different parts";
            return Err(SpanError::Inconsistent(why.into()));
        }
        if sizes(self.memories()) != home_state.memory_bytes {
            let why = "the home's memory grew meanwhile, or could not; try again";
            return Err(SpanError::Inconsistent(why.into()));
        }
        Ok(())
    }

    /// Makes this part the home of a machine that was restored on its memories and is
    /// stopped. All others send to it from now on; threads are on their way back to their
    /// parts when this returns, and resume when the machine is thawed. This part is no
    /// longer a member. `patience` is the time limit for the others to acknowledge.
    ///
    /// # Errors
    /// [`SpanningError`]; the machine has ended then.
    pub fn become_home(
        &self,
        machine: &Machine,
        home_state: &HomeState,
        patience: Duration,
    ) -> Result<Home, SpanningError> {
        let pages = self.pages();
        let begun = Instant::now();
        self.check_successor(home_state)?;
        let (listener, failure) = HomeListener::depending(machine);
        pages.become_home(&home_state.held, Arc::new(listener), patience)?;
        let way = Arc::new(MemberChannel::new(pages.notifier()));
        let members = home_state.members.iter().collect();
        machine.set_members(members, Some(way.clone()), home_state.spawning)?;
        for ThreadLocation { tid, at, goes_on } in &home_state.threads {
            // It is in the image, at the part where it was.
            way.order(*at, &Order::Leave { tid: *tid });
            if *goes_on != PartId::HOME {
                machine.move_thread(*tid, *goes_on)?;
            }
        }
        pages.limit_parts(home_state.part_bytes)?;
        self.is_home_now();
        Ok(Home::of(
            machine,
            pages.clone(),
            home_state.members,
            home_state.spawning,
            failure,
            begun.elapsed(),
        ))
    }
}
