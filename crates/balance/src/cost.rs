//! The gain and the cost of a move, each with an interval, in one unit: *core-seconds*. A move is
//! made when the lower bound of its gain exceeds the upper bound of its cost.
//!
//! The gain is integrated over the expected remaining duration of the load. A load that has lasted
//! for `t` lasts for another `t` in the median, and for `t/3` to `3t` in half of all cases:
//! lifetimes of processes have a Pareto tail of exponent near 1 (Harchol-Balter and Downey,
//! "Exploiting Process Lifetime Distributions for Dynamic Load Balancing", TOCS 1997).
//!
//! The cost model learns: it keeps the error of its predictions as a factor with a spread, and
//! corrects the next prediction by it.

use crate::load::Factors;
use serde::{Deserialize, Serialize};

/// Copy rate of a move before anything was learned, in bytes per second.
const RATE_BYTES_PER_S: f64 = 800e6;
/// Bytes that one core sends or receives per second.
const CORE_BYTES_PER_S: f64 = 1.5e9;
/// Fixed cost of a move before its first byte, in milliseconds and core-seconds.
const SETUP_MS: f64 = 100.0;
const SETUP_CORE_S: f64 = 0.05;
/// Downtime of a move without the final dirty pages, in milliseconds.
const DOWNTIME_MS: f64 = 3.0;
/// Maximum share of a pre-copy round that is dirtied again during it: a guest that writes faster is
/// slowed down.
const REWRITTEN_SHARE_MAX: f64 = 0.8;
/// Weight of the newest error (exponential moving average).
const NEWEST: f64 = 0.2;
/// Spread before anything was learned, as a logarithm: a factor of 2.
const SPREAD: f64 = std::f64::consts::LN_2;
/// Standard deviations that cover four fifths of a normal distribution.
const DEVIATIONS: f64 = 1.28;

/// An estimate with an interval that covers four of five cases.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Estimate {
    /// 10th percentile.
    pub low: f64,
    /// Median.
    pub mid: f64,
    /// 90th percentile.
    pub high: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MoveCost)]
pub struct Cost {
    /// Bytes over the network.
    pub bytes: f64,
    /// From the offer to the end of the move, in milliseconds.
    pub duration_ms: Estimate,
    /// In milliseconds.
    pub downtime_ms: Estimate,
    /// Total, in core-seconds.
    pub core_s: Estimate,
}

impl Cost {
    /// The cost including the compilation of the program at the target, in core-seconds.
    #[must_use]
    pub fn after_compilation(mut self, core_s: f64) -> Self {
        for (estimate, more) in [
            (&mut self.core_s, core_s),
            (&mut self.duration_ms, core_s * 1e3),
        ] {
            estimate.low += more;
            estimate.mid += more;
            estimate.high += more;
        }
        self
    }
}

/// The gain of a move.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MoveGain)]
pub struct Gain {
    /// Decrease of the sum over both nodes of power times load squared.
    pub lowers: f64,
    /// Expected remaining duration of the load, in seconds.
    pub lasts_s: Estimate,
    pub core_s: Estimate,
}

/// Prediction error of one quantity, as the logarithm of a factor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
struct PredictionError {
    mean: f64,
    variance: f64,
    seen: u32,
}

impl Default for PredictionError {
    fn default() -> Self {
        PredictionError {
            mean: 0.0,
            variance: SPREAD * SPREAD,
            seen: 0,
        }
    }
}

impl PredictionError {
    fn learn(&mut self, predicted: f64, actual: f64) {
        if !(predicted > 0.0 && actual > 0.0 && predicted.is_finite() && actual.is_finite()) {
            return;
        }
        // A factor above a thousand is an outlier, not a model error.
        let off = (actual / predicted).ln().clamp(-7.0, 7.0);
        let weight = NEWEST.max(1.0 / f64::from(self.seen + 2));
        let away = off - self.mean;
        self.mean += weight * away;
        self.variance = (1.0 - weight) * (self.variance + weight * away * away);
        self.seen = self.seen.saturating_add(1);
    }

    fn correct(&self, raw: f64) -> Estimate {
        let spread = DEVIATIONS * self.variance.sqrt();
        Estimate {
            low: raw * (self.mean - spread).exp(),
            mid: raw * self.mean.exp(),
            high: raw * (self.mean + spread).exp(),
        }
    }
}

/// Predicts the cost of moves away from a node, and learns from completed ones.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CostModel {
    duration: PredictionError,
    downtime: PredictionError,
}

/// Prediction of the pre-copy model before the learned correction.
struct RawPrediction {
    bytes: f64,
    duration_ms: f64,
    downtime_ms: f64,
}

impl CostModel {
    fn raw(factors: &Factors) -> RawPrediction {
        let rewritten = (factors.dirty_bytes_per_s / RATE_BYTES_PER_S).min(REWRITTEN_SHARE_MAX);
        let bytes = factors.memory_bytes as f64 / (1.0 - rewritten);
        RawPrediction {
            bytes,
            duration_ms: SETUP_MS + bytes / RATE_BYTES_PER_S * 1e3,
            downtime_ms: DOWNTIME_MS * (1.0 + rewritten),
        }
    }

    /// Predicts the cost of moving a machine with these factors.
    pub fn predict(&self, factors: &Factors) -> Cost {
        let raw = Self::raw(factors);
        let duration_ms = self.duration.correct(raw.duration_ms);
        let downtime_ms = self.downtime.correct(raw.downtime_ms);
        // Both ends copy. Work that the guest would have done during the downtime is done later.
        let work = |downtime_ms: f64| {
            SETUP_CORE_S
                + 2.0 * raw.bytes / CORE_BYTES_PER_S
                + downtime_ms / 1e3 * factors.cpu_cores
        };
        Cost {
            bytes: raw.bytes,
            duration_ms,
            downtime_ms,
            core_s: Estimate {
                low: work(downtime_ms.low),
                mid: work(downtime_ms.mid),
                high: work(downtime_ms.high),
            },
        }
    }

    /// Learns from a completed move of a machine with these factors.
    pub fn learn(&mut self, factors: &Factors, duration_ms: f64, downtime_ms: f64) {
        let raw = Self::raw(factors);
        self.duration.learn(raw.duration_ms, duration_ms);
        self.downtime.learn(raw.downtime_ms, downtime_ms);
    }

    /// Typical error of predicted durations and downtimes, as factors above 1, and the number of
    /// moves observed.
    pub fn error(&self) -> (f64, f64, u32) {
        let factor = |error: &PredictionError| error.variance.sqrt().exp();
        (
            factor(&self.duration),
            factor(&self.downtime),
            self.duration.seen,
        )
    }
}

/// The gain of decreasing the sum of power times load squared by `lowers`, for a load that has
/// lasted `lasted_ms`.
pub fn gain(lowers: f64, lasted_ms: u64, horizon_s: u64) -> Gain {
    let lasted_s = lasted_ms as f64 / 1e3;
    let bound = |s: f64| s.min(horizon_s as f64);
    let lasts_s = Estimate {
        low: bound(lasted_s / 3.0),
        mid: bound(lasted_s),
        high: bound(lasted_s * 3.0),
    };
    let worth = |s: f64| lowers / 2.0 * s;
    Gain {
        lowers,
        lasts_s,
        core_s: Estimate {
            low: worth(lasts_s.low),
            mid: worth(lasts_s.mid),
            high: worth(lasts_s.high),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_writes_much_costs_more() {
        let model = CostModel::default();
        let quiet = Factors {
            memory_bytes: 1 << 30,
            cpu_cores: 1.0,
            ..Factors::default()
        };
        let busy = Factors {
            dirty_bytes_per_s: 400e6,
            ..quiet
        };
        let (quiet, busy) = (model.predict(&quiet), model.predict(&busy));
        assert!(busy.bytes > 1.9 * quiet.bytes);
        assert!(busy.core_s.mid > quiet.core_s.mid);
        assert!(quiet.duration_ms.low < quiet.duration_ms.mid);
        assert!(quiet.duration_ms.mid < quiet.duration_ms.high);
    }

    #[test]
    fn it_learns_a_slow_link_and_grows_sure() {
        let factors = Factors {
            memory_bytes: 1 << 30,
            ..Factors::default()
        };
        let mut model = CostModel::default();
        let before = model.predict(&factors);
        let actual = before.duration_ms.mid * 8.0;
        for _ in 0..30 {
            model.learn(&factors, actual, 4.0);
        }
        let after = model.predict(&factors);
        assert!((after.duration_ms.mid / actual - 1.0).abs() < 0.1);
        assert!(after.duration_ms.high / after.duration_ms.low < 1.6);
        // Nonsense teaches nothing.
        let known = model;
        for nonsense in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            model.learn(&factors, nonsense, nonsense);
        }
        assert_eq!(model, known);
    }

    #[test]
    fn what_lasted_lasts() {
        let short = gain(2.0, 3_000, 600);
        let long = gain(2.0, 300_000, 600);
        assert_eq!(short.core_s.low, 1.0);
        assert_eq!(long.core_s.low, 100.0);
        assert_eq!(long.lasts_s.high, 600.0);
        assert_eq!(gain(-1.0, 300_000, 600).core_s.mid, -150.0);
    }
}
