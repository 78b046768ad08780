//! What the simulator simulates: how many parts and pages a machine has, what its threads and agents
//! do, and which steps there are.

use keel_wasm::coherence::Access;
use std::collections::VecDeque;

/// An operation of a thread. A page is one number, initially 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Op {
    Read(u32),
    Write(u32, u64),
    /// Increments atomically.
    Add(u32),
    /// An access that needs two pages at once: swaps them.
    Swap(u32, u32),
}

impl Op {
    pub(crate) fn needs(self) -> Vec<(u32, Access)> {
        match self {
            Op::Read(page) => vec![(page, Access::Read)],
            Op::Write(page, _) | Op::Add(page) => vec![(page, Access::Write)],
            Op::Swap(one, other) => vec![(one, Access::Write), (other, Access::Write)],
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Thread {
    pub(crate) part: usize,
    pub(crate) left: VecDeque<Op>,
    pub(crate) seen: Vec<u64>,
    /// The page on which it faults.
    pub(crate) waits: Option<u32>,
}

/// An external operation on a machine; each once, at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Operation {
    /// Requested by a part's agent.
    Move(usize, u32, usize),
    /// A run of pages, in one request.
    MoveRun(usize, u32, usize),
    /// Requested by the home.
    MoveDirectory(u32, usize),
    /// The home gathers all directories.
    Gather,
    /// A part is evacuated to another; its threads have ended.
    Evacuate(usize, usize),
    /// A part is lost, with all its messages in flight.
    Lose(usize),
    /// The first part learns that the second one has left after its evacuation. (It follows from
    /// [`Operation::Evacuate`] where [`Setup::returns`].)
    Leave(usize, usize),
    /// It learns that the other one has joined again, without pages.
    Join(usize, usize),
    /// A part becomes the home, which has given up its pages; a new part gets its number. The
    /// protocol is quiescent.
    MigrateHome(usize),
}

/// An injected bug, to test the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum InjectedBug {
    None,
    /// Pages are sent before they are protected.
    SkipProtect,
    /// Readers acknowledge invalidations, and keep the page.
    SkipDiscard,
    /// Waiters are not woken when a page becomes writable.
    SkipWake,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Deliver {
        from: usize,
        to: usize,
        number: usize,
    },
    Run(usize),
    Tick(usize),
    Drop(usize, u32),
    Perform(usize),
    Pin(usize, u32),
    Unpin(usize, u32),
}

#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) parts: usize,
    pub(crate) pages: u32,
    pub(crate) threads: Vec<(usize, Vec<Op>)>,
    pub(crate) operations: Vec<Operation>,
    /// A part that has left joins again; the operations of its threads then.
    pub(crate) returns: Option<Vec<Op>>,
    pub(crate) hold_micros: u64,
    pub(crate) segment_pages: u32,
    /// Whether copies are dropped at random, and how often pages are pinned.
    pub(crate) drops: bool,
    pub(crate) pins: u32,
    /// Connections are not FIFO.
    pub(crate) unordered: bool,
    /// Messages about contiguous pages are merged.
    pub(crate) merges: bool,
    pub(crate) bug: InjectedBug,
    pub(crate) seed: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            parts: 2,
            pages: 1,
            threads: Vec::new(),
            operations: Vec::new(),
            returns: None,
            hold_micros: 0,
            segment_pages: 1,
            drops: false,
            pins: 0,
            unordered: false,
            merges: false,
            bug: InjectedBug::None,
            seed: 7,
        }
    }
}
