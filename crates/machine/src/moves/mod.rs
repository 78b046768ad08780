//! Moves of machines, as two state machines without I/O.
//!
//! `source` is the move as seen by the source's node, which decides; `target` as seen by
//! the target's worker. A thin runtime (`keel-node` for the source, [`crate::worker`] for
//! the target) passes events to them and executes their commands in order. `ownership`
//! has the transactions that change the owner, `convergence` decides when copying ends,
//! `prediction` predicts the course of a move.
//!
//! `docs/moves.md` explains the whole protocol.

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

/// A phase of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MovePhase)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The move waits in the queue of its node.
    Wait,
    /// Source and target compile the module where code is missing.
    Compile,
    /// The target checks the offer and fetches what it lacks.
    Offer,
    /// Memory is copied while the machine runs.
    Copy,
    /// Threads reach safepoints.
    Freeze,
    /// Pages written since the last round are copied.
    LastPages,
    /// Threads and WASI state are copied and restored at the target.
    State,
    /// The store changes the owner.
    Commit,
    /// The target resumes the machine.
    Resume,
    /// The machine runs at the target while the rest of its memory is transferred
    /// (post-copy).
    Fill,
}

/// A round of copying.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = CopyRound)]
pub struct Round {
    /// Bytes of pages sent.
    pub bytes: u64,
    /// Duration in microseconds.
    pub micros: u64,
}

/// Result of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MoveEnding)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The machine runs at the target.
    Moved,
    /// The machine runs on at the source.
    Stayed { reason: String },
}

/// Report of post-copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = PostCopyReport)]
pub struct FillReport {
    /// From the resumption at the target until all pages had arrived, in microseconds.
    pub micros: u64,
    /// Pages (4 KiB) sent in the background.
    pub pushed_pages: u64,
    /// Pages sent on request, with those behind them.
    pub pulled_pages: u64,
    /// Faults resolved without the source.
    pub local_faults: u64,
    /// Reconnections of the source.
    pub reconnects: u64,
    /// Latencies of faults that waited for the source: for each n from 0, the number that
    /// took 2^n to 2^(n+1) microseconds.
    pub latency_log2_micros: Vec<u64>,
}

impl FillReport {
    /// Counts a fault that waited for the source.
    pub fn add_latency(&mut self, latency: std::time::Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = micros.max(1).ilog2() as usize;
        if self.latency_log2_micros.len() <= bucket {
            self.latency_log2_micros.resize(bucket + 1, 0);
        }
        self.latency_log2_micros[bucket] += 1;
    }

    /// Number of faults that waited for the source.
    pub fn remote_faults(&self) -> u64 {
        self.latency_log2_micros.iter().sum()
    }

    /// One line for users.
    pub fn line(&self) -> String {
        let mib = |pages: u64| pages as f64 / 256.0;
        let mut line = format!(
            "post-copy took {:.0} ms: {:.1} MiB in the background, {:.1} MiB on request; {} faults waited",
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
            line += &format!("; the source reconnected {} time(s)", self.reconnects);
        }
        line
    }
}

/// Report of a finished move. Times in microseconds; downtime is measured at the source,
/// from the request to stop the threads to the target's message that they run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MoveReport {
    #[schema(value_type = String)]
    pub machine: MachineName,
    #[schema(value_type = String)]
    pub source: NodeName,
    #[schema(value_type = String)]
    pub target: NodeName,
    /// The epoch after the move: `incarnation` and `counter`.
    #[schema(value_type = Object)]
    pub epoch: Epoch,
    /// Start of the move, in milliseconds since 1970-01-01 UTC.
    pub started_unix_ms: u64,
    pub ending: Ending,
    /// From the offer to its acceptance.
    pub offer_micros: u64,
    /// Copying while the machine ran.
    pub copy_micros: u64,
    /// The rounds of copying.
    pub rounds: Vec<Round>,
    /// Whether the guest was throttled so that copying could catch up.
    pub slowed: bool,
    /// Threads reaching safepoints.
    pub freeze_micros: u64,
    /// Sending the last pages.
    pub last_pages_micros: u64,
    /// Bytes of the last pages.
    pub last_bytes: u64,
    /// Sending and restoring threads and WASI state.
    pub state_micros: u64,
    /// The change of owner in the store.
    pub commit_micros: u64,
    /// From the go message to the target's answer.
    pub resume_micros: u64,
    /// Total downtime.
    pub downtime_micros: u64,
    /// Bytes of memory and state sent in total.
    pub bytes: u64,
    /// Total duration.
    pub total_micros: u64,
    /// The report of post-copy, if it took place.
    #[serde(default)]
    pub fill: Option<FillReport>,
    /// The prediction for the move, if there was one.
    #[serde(default)]
    pub predicted: Option<Prediction>,
}

impl MoveReport {
    /// A move of zero duration.
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

    /// One line for users.
    pub fn line(&self) -> String {
        let ms = |micros: u64| micros as f64 / 1000.0;
        match &self.ending {
            Ending::Stayed { reason } => {
                format!("{} stayed on {}: {reason}", self.machine, self.source)
            }
            Ending::Moved => {
                let line = format!(
                    "{} {} → {} in {:.0} ms, {:.1} MB in {} rounds; downtime {:.2} ms (freeze {:.2}, last pages {:.2}, state {:.2}, commit {:.2}, resume {:.2})",
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
                        "{line}; predicted: {:.0} ms ({:.0} to {:.0}), downtime {:.2} ms ({:.2} to {:.2})",
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

/// Progress of a running move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MoveProgress)]
pub struct Progress {
    pub phase: Phase,
    /// Round of copying, from 1.
    pub round: u32,
    pub sent_bytes: u64,
    /// Bytes known to be left.
    pub remaining_bytes: u64,
    /// Bytes per second in the last round.
    pub bytes_per_s: u64,
    /// Downtime so far.
    pub downtime_micros: u64,
    /// Progress of the phase, 0 to 100, where known (`Compile`).
    #[serde(default)]
    pub percent: Option<u8>,
}

impl Progress {
    /// Progress in a phase in which nothing is sent.
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
