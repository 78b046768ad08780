//! One machine's move, as two state machines without any I/O.
//!
//! `source` is seen from the node that gives the machine away and decides,
//! `target` from the worker that receives it. Both are stepped with events by a
//! thin runtime (`keel-node` for the source, [`crate::worker`] for the target),
//! which carries out their commands in order. `ownership` has the transactions that
//! change the owner, `convergence` says when copying is over, `prediction` how a move will
//! go.

pub mod convergence;
pub mod ownership;
pub mod prediction;
mod source;
mod target;

pub use source::{SourceCommand, SourceEvent, SourceMove, SourceState};
pub use target::{TargetCommand, TargetEvent, TargetMove, TargetState};

use self::prediction::Prediction;
use keel_cluster::{Epoch, MachineName, NodeName};
use serde::{Deserialize, Serialize};

/// What a move is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It waits for its turn: others leave the node just now.
    Wait,
    /// Source and target compile the module, where its code is not ready.
    Compile,
    /// The target checks what it is offered, and fetches what it lacks.
    Offer,
    /// Memory is copied while the machine runs.
    Copy,
    /// Its threads come to safepoints.
    Freeze,
    /// What was written since the last round is copied.
    LastPages,
    /// Threads and WASI state are copied, and made ready at the target.
    State,
    /// The store changes the owner.
    Commit,
    /// The target lets it go on.
    Resume,
    /// It runs at the target, and the rest of its memory comes behind it.
    Fill,
}

/// One round of copying.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Bytes of pages sent.
    pub bytes: u64,
    /// How long it took.
    pub micros: u64,
}

/// How a move ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The machine runs at the target.
    Moved,
    /// It runs on at the source.
    Stayed {
        /// Why.
        reason: String,
    },
}

/// How memory came to a machine that ran already.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FillReport {
    /// From the first step at the target until all was there, in microseconds.
    pub micros: u64,
    /// Pages (4 KiB) that were sent unasked.
    pub pushed_pages: u64,
    /// Pages that were sent because a thread waited, and those behind them.
    pub pulled_pages: u64,
    /// Accesses that waited for nothing from elsewhere.
    pub local_faults: u64,
    /// Times that the source connected anew.
    pub reconnects: u64,
    /// Accesses that waited for the source: how many took 2^n to 2^(n+1)
    /// microseconds, for each n from 0.
    pub latency_log2_micros: Vec<u64>,
}

impl FillReport {
    /// Counts an access that waited for the source.
    pub fn add_latency(&mut self, latency: std::time::Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = micros.max(1).ilog2() as usize;
        if self.latency_log2_micros.len() <= bucket {
            self.latency_log2_micros.resize(bucket + 1, 0);
        }
        self.latency_log2_micros[bucket] += 1;
    }

    /// Accesses that waited for the source.
    pub fn remote_faults(&self) -> u64 {
        self.latency_log2_micros.iter().sum()
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let mib = |pages: u64| pages as f64 / 256.0;
        let mut line = format!(
            "memory came behind it in {:.0} ms: {:.1} MiB unasked, {:.1} MiB waited for; {} accesses waited",
            self.micros as f64 / 1000.0,
            mib(self.pushed_pages),
            mib(self.pulled_pages),
            self.remote_faults(),
        );
        for (bucket, count) in self.latency_log2_micros.iter().enumerate() {
            if *count > 0 {
                line += &format!(", {count} of {}-{} µs", 1u64 << bucket, 2u64 << bucket);
            }
        }
        if self.reconnects > 0 {
            line += &format!("; the source connected anew {} time(s)", self.reconnects);
        }
        line
    }
}

/// A move, told afterwards. Times in microseconds; downtime is what the source
/// saw, from asking the threads to stop to the target's word that they run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MoveReport {
    /// The machine.
    pub machine: MachineName,
    /// From.
    pub source: NodeName,
    /// To.
    pub target: NodeName,
    /// Epoch afterwards.
    pub epoch: Epoch,
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub started_unix_ms: u64,
    /// How it ended.
    pub ending: Ending,
    /// From the offer to its acceptance.
    pub offer_micros: u64,
    /// Copying while the machine ran.
    pub copy_micros: u64,
    /// The rounds of that.
    pub rounds: Vec<Round>,
    /// Whether the guest had to be slowed down for copying to catch up.
    pub slowed: bool,
    /// Threads to safepoints.
    pub freeze_micros: u64,
    /// The last pages.
    pub last_pages_micros: u64,
    /// Bytes of them.
    pub last_bytes: u64,
    /// Threads and WASI state, sent and made ready.
    pub state_micros: u64,
    /// The change of owner in the store.
    pub commit_micros: u64,
    /// From the word to go to the target's answer.
    pub resume_micros: u64,
    /// All of the time that the machine stood still.
    pub downtime_micros: u64,
    /// Bytes of memory and state sent in all.
    pub bytes: u64,
    /// All of it.
    pub total_micros: u64,
    /// How its memory came after it ran there already, if it did (post-copy).
    #[serde(default)]
    pub fill: Option<FillReport>,
    /// What was foretold of it, where that was to be had.
    #[serde(default)]
    pub predicted: Option<Prediction>,
}

impl MoveReport {
    /// Of a move that took no time.
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        MoveReport {
            machine: "m".parse().unwrap(),
            source: "n".parse().unwrap(),
            target: "n".parse().unwrap(),
            epoch: Epoch::default(),
            started_unix_ms: 0,
            ending: Ending::Moved,
            offer_micros: 0,
            copy_micros: 0,
            rounds: Vec::new(),
            slowed: false,
            freeze_micros: 0,
            last_pages_micros: 0,
            last_bytes: 0,
            state_micros: 0,
            commit_micros: 0,
            resume_micros: 0,
            downtime_micros: 0,
            bytes: 0,
            total_micros: 0,
            fill: None,
            predicted: None,
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let ms = |micros: u64| micros as f64 / 1000.0;
        match &self.ending {
            Ending::Stayed { reason } => {
                format!("{} stayed on {}: {reason}", self.machine, self.source)
            }
            Ending::Moved => {
                let line = format!(
                    "{} {} → {} in {:.0} ms, {:.1} MB in {} rounds; stood still {:.2} ms (freeze {:.2}, last pages {:.2}, state {:.2}, commit {:.2}, resume {:.2})",
                    self.machine,
                    self.source,
                    self.target,
                    ms(self.total_micros),
                    self.bytes as f64 / 1e6,
                    self.rounds.len(),
                    ms(self.downtime_micros),
                    ms(self.freeze_micros),
                    ms(self.last_pages_micros),
                    ms(self.state_micros),
                    ms(self.commit_micros),
                    ms(self.resume_micros),
                );
                let line = match &self.fill {
                    Some(fill) => format!("{line}; {}", fill.line()),
                    None => line,
                };
                match &self.predicted {
                    Some(predicted) => format!(
                        "{line}; foretold: {:.0} ms ({:.0} to {:.0}), standing still {:.2} ({:.2} to {:.2})",
                        ms(predicted.total_micros.likely),
                        ms(predicted.total_micros.low),
                        ms(predicted.total_micros.high),
                        ms(predicted.downtime_micros.likely),
                        ms(predicted.downtime_micros.low),
                        ms(predicted.downtime_micros.high),
                    ),
                    None => line,
                }
            }
        }
    }
}

/// What a running move tells those who watch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Round of copying, from 1.
    pub round: u32,
    /// Bytes sent so far.
    pub sent_bytes: u64,
    /// Bytes known to be left.
    pub remaining_bytes: u64,
    /// Bytes a second in the last round.
    pub bytes_per_s: u64,
    /// How long the machine stands still already.
    pub downtime_micros: u64,
    /// How much of the phase is done, 0 to 100, where that is known (`Compile`).
    #[serde(default)]
    pub percent: Option<u8>,
}

impl Progress {
    /// Of a phase in which nothing is sent yet.
    pub fn of(phase: Phase) -> Self {
        Progress {
            phase,
            round: 0,
            sent_bytes: 0,
            remaining_bytes: 0,
            bytes_per_s: 0,
            downtime_micros: 0,
            percent: None,
        }
    }
}
