//! What the nemesis did, and what came of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of the run.
#[derive(Debug, Default)]
pub struct Tally {
    /// Rounds.
    pub rounds: u64,
    /// Requested moves.
    pub moves: AtomicU64,
    /// Of these, moves during a fault.
    pub disturbed: AtomicU64,
    /// Of these, moves that reached the target.
    pub moved: AtomicU64,
    /// Moves whose machine stayed.
    pub stayed: AtomicU64,
    /// Moves that were refused, or whose answer was lost.
    pub refused: AtomicU64,
    /// Checkpoints that were made.
    pub checkpoints: AtomicU64,
    /// Replacements of the cluster's authority that were asked for.
    pub rotations: AtomicU64,
    /// Faults, by kind, and apart those of the node that led the store.
    pub faults: BTreeMap<String, FaultTally>,
    /// How often a machine rewound to a checkpoint after its process was killed.
    pub rewinds: u64,
    /// Of these, machines with high availability whose node was away.
    pub failovers: u64,
    /// Milliseconds from the repair to the next line of all machines: without and with a killed
    /// process of a machine.
    pub recoveries_ms: [Vec<u64>; 2],
}

/// What came of the faults of a kind.
#[derive(Debug, Default)]
pub struct FaultTally {
    pub count: u64,
    /// The longest time in which a machine with high availability wrote nothing, and in which no
    /// node got an answer from the store, in milliseconds. It contains the fault.
    pub machine_ms: u64,
    pub store_ms: u64,
    /// The most lines of a machine with high availability that were undone at once.
    pub most_repeated: u64,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        writeln!(
            f,
            "{} rounds; {} moves requested, {} of them during a fault: {} moved, {} stayed, {} refused or unanswered; {} checkpoints; {} replacements of the authority; {} rewinds of killed machines, {} of them failovers",
            self.rounds,
            of(&self.moves),
            of(&self.disturbed),
            of(&self.moved),
            of(&self.stayed),
            of(&self.refused),
            of(&self.checkpoints),
            of(&self.rotations),
            self.rewinds,
            self.failovers
        )?;
        for (kind, of) in &self.faults {
            let (count, machine_ms, store_ms) = (of.count, of.machine_ms, of.store_ms);
            let undone = of.most_repeated;
            writeln!(
                f,
                "{kind}: {count} times, longest outage of a machine {machine_ms} ms, of the store {store_ms} ms; at most {undone} lines undone"
            )?;
        }
        let [unharmed, killed] = self.recoveries_ms.each_ref().map(|times| {
            let mut times = times.clone();
            times.sort_unstable();
            let at = |share: usize| times.get(times.len() * share / 100).or(times.last());
            let ms = |time: Option<&u64>| time.copied().unwrap_or(0);
            format!(
                "p50 {} p99 {} max {} ms",
                ms(at(50)),
                ms(at(99)),
                ms(times.last())
            )
        });
        write!(
            f,
            "recovery after repair: {unharmed}; with a killed machine: {killed}"
        )
    }
}
