//! The gain and the cost of a move, each with an interval, in one unit: *core-seconds*. A move is
//! made when the lower bound of its gain exceeds the upper bound of its cost.
//!
//! The gain is integrated over the expected remaining duration of the load. A load that has lasted
//! for `t` lasts for another `t` in the median, and for `t/3` to `3t` in half of all cases:
//! lifetimes of processes have a Pareto tail of exponent near 1 (Harchol-Balter and Downey,
//! "Exploiting Process Lifetime Distributions for Dynamic Load Balancing", TOCS 1997).
//!
//! A far link costs in three ways: the copy takes as long as the link's rate says, the machine stands
//! still for some of its round trips, and nothing is gained before the machine has arrived.
//!
//! The cost model learns: it keeps the error of its predictions as a factor with a spread, and
//! corrects the next prediction by it.

use crate::load::Factors;
use serde::{Deserialize, Serialize};

/// Copy rate of a move before anything was learned, in bytes per second.
const RATE_BYTES_PER_S: f64 = 800e6;
/// Round trips of a move, and those during which the machine stands still.
const ROUND_TRIPS: f64 = 12.0;
const ROUND_TRIPS_DOWN: f64 = 4.0;
/// Round-trip time from which a node counts as far, in milliseconds: more than a network within a
/// building has.
const FAR_MS: f64 = 5.0;
/// Rate of a far link that no move has used yet, in bytes per second: 100 Mbit/s.
const FAR_BYTES_PER_S: f64 = 12.5e6;
/// Least rate of a link that is computed with, in bytes per second.
const LEAST_BYTES_PER_S: f64 = 1e4;
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

/// The network between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = BalanceLink)]
pub struct Link {
    /// Round-trip time, in milliseconds.
    pub round_trip_ms: f64,
    /// Rate of a copy, in bytes per second.
    pub bytes_per_s: f64,
}

impl Link {
    /// Between nodes of one place.
    pub const NEAR: Link = Link {
        round_trip_ms: 0.0,
        bytes_per_s: RATE_BYTES_PER_S,
    };

    /// Between sites, before anything was measured.
    pub const FAR: Link = Link {
        round_trip_ms: FAR_MS,
        bytes_per_s: FAR_BYTES_PER_S,
    };

    /// A link as it was measured: its round-trip time in milliseconds, and the rate of earlier moves
    /// in bytes per second. One with a short round trip is [`Link::NEAR`]: the cost model learns how
    /// fast it is.
    pub fn measured(round_trip_ms: f64, bytes_per_s: Option<f64>) -> Self {
        if !(round_trip_ms.is_finite() && round_trip_ms >= FAR_MS) {
            return Link::NEAR;
        }
        let rate = bytes_per_s.filter(|rate| rate.is_finite());
        let rate = rate.unwrap_or(FAR_BYTES_PER_S);
        Link {
            round_trip_ms,
            bytes_per_s: rate.clamp(LEAST_BYTES_PER_S, RATE_BYTES_PER_S),
        }
    }

    pub fn is_far(&self) -> bool {
        self.round_trip_ms >= FAR_MS
    }

    /// Whether it is not worth mentioning.
    pub(crate) fn is_near(link: &Link) -> bool {
        !link.is_far()
    }
}

impl Default for Link {
    fn default() -> Self {
        Link::NEAR
    }
}

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
    fn raw(factors: &Factors, link: &Link) -> RawPrediction {
        let rewritten = (factors.dirty_bytes_per_s / link.bytes_per_s).min(REWRITTEN_SHARE_MAX);
        let bytes = factors.memory_bytes as f64 / (1.0 - rewritten);
        let copying_ms = bytes / link.bytes_per_s * 1e3;
        RawPrediction {
            bytes,
            duration_ms: SETUP_MS + ROUND_TRIPS * link.round_trip_ms + copying_ms,
            downtime_ms: DOWNTIME_MS * (1.0 + rewritten) + ROUND_TRIPS_DOWN * link.round_trip_ms,
        }
    }

    /// Milliseconds by which a machine arrives later over a link than over [`Link::NEAR`].
    fn later_ms(factors: &Factors, link: &Link) -> f64 {
        match link.is_far() {
            true => {
                let near = Self::raw(factors, &Link::NEAR).duration_ms;
                (Self::raw(factors, link).duration_ms - near).max(0.0)
            }
            false => 0.0,
        }
    }

    /// Predicts the cost of moving a machine with these factors over a link.
    pub fn predict(&self, factors: &Factors, link: &Link) -> Cost {
        let raw = Self::raw(factors, link);
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

    /// Learns from a completed move of a machine with these factors over a link.
    pub fn learn(&mut self, factors: &Factors, link: &Link, duration_ms: f64, downtime_ms: f64) {
        let raw = Self::raw(factors, link);
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

/// The gain of decreasing the sum of power times load squared by `lowers`, for the load of a machine
/// with these factors that has lasted `lasted_ms`. It begins when the machine has arrived over the link.
pub fn gain(lowers: f64, lasted_ms: u64, horizon_s: u64, factors: &Factors, link: &Link) -> Gain {
    let later_s = CostModel::later_ms(factors, link) / 1e3;
    let lasted_s = lasted_ms as f64 / 1e3;
    let bound = |s: f64| s.min(horizon_s as f64);
    let lasts_s = Estimate {
        low: bound(lasted_s / 3.0),
        mid: bound(lasted_s),
        high: bound(lasted_s * 3.0),
    };
    let worth = |s: f64| lowers / 2.0 * (s - later_s).max(0.0);
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
        let near = Link::NEAR;
        let (quiet, busy) = (model.predict(&quiet, &near), model.predict(&busy, &near));
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
        let near = Link::NEAR;
        let before = model.predict(&factors, &near);
        let actual = before.duration_ms.mid * 8.0;
        for _ in 0..30 {
            model.learn(&factors, &near, actual, 4.0);
        }
        let after = model.predict(&factors, &near);
        assert!((after.duration_ms.mid / actual - 1.0).abs() < 0.1);
        assert!(after.duration_ms.high / after.duration_ms.low < 1.6);
        // Nonsense teaches nothing.
        let known = model;
        for nonsense in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            model.learn(&factors, &near, nonsense, nonsense);
        }
        assert_eq!(model, known);
    }

    #[test]
    fn what_lasted_lasts() {
        let gain = |lowers, lasted_ms, horizon_s| {
            gain(
                lowers,
                lasted_ms,
                horizon_s,
                &Factors::default(),
                &Link::NEAR,
            )
        };
        let short = gain(2.0, 3_000, 600);
        let long = gain(2.0, 300_000, 600);
        assert_eq!(short.core_s.low, 1.0);
        assert_eq!(long.core_s.low, 100.0);
        assert_eq!(long.lasts_s.high, 600.0);
        assert_eq!(gain(-1.0, 300_000, 600).core_s.mid, -150.0);
    }

    /// Sites 100 ms and 100 Mbit/s apart.
    #[test]
    fn a_far_link_costs_time_and_delays_the_gain() {
        let model = CostModel::default();
        let factors = Factors {
            memory_bytes: 64 << 20,
            dirty_bytes_per_s: 1e6,
            cpu_cores: 1.0,
            ..Factors::default()
        };
        let far = Link::measured(100.0, None);
        assert!(far.is_far());
        let (near_cost, far_cost) = (
            model.predict(&factors, &Link::NEAR),
            model.predict(&factors, &far),
        );
        // 64 MiB at 12.5 MB/s, and 8 % that is written again.
        assert!((6_500.0..8_500.0).contains(&far_cost.duration_ms.mid));
        assert!((400.0..420.0).contains(&far_cost.downtime_ms.mid));
        assert!(far_cost.core_s.mid > near_cost.core_s.mid + 0.3);
        let near_gain = gain(2.0, 12_000, 600, &factors, &Link::NEAR);
        let far_gain = gain(2.0, 12_000, 600, &factors, &far);
        assert_eq!((near_gain.core_s.low, far_gain.core_s.low), (4.0, 0.0));
        assert!(far_gain.core_s.mid > 0.0 && far_gain.core_s.mid < near_gain.core_s.mid);
    }

    #[test]
    fn a_link_that_cannot_be_is_not_computed_with() {
        for nothing in [f64::NAN, f64::INFINITY, -1.0, 0.0, 4.9] {
            assert_eq!(Link::measured(nothing, Some(5.0)), Link::NEAR);
        }
        assert_eq!(
            Link::measured(50.0, Some(0.0)).bytes_per_s,
            LEAST_BYTES_PER_S
        );
        assert_eq!(
            Link::measured(50.0, Some(f64::NAN)).bytes_per_s,
            FAR_BYTES_PER_S
        );
        assert_eq!(
            Link::measured(50.0, Some(1e12)).bytes_per_s,
            RATE_BYTES_PER_S
        );
    }
}
