//! Demand curves of machines, synthetic or recorded.

use serde::{Deserialize, Serialize};
use std::f64::consts::TAU;
use std::sync::Arc;

/// CPU demand over time, in cores of the reference speed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", deny_unknown_fields)]
pub enum Curve {
    Steady {
        cores: f64,
    },
    /// A step from one demand to another.
    Step {
        before: f64,
        after: f64,
        /// The instant, in seconds.
        at_s: f64,
    },
    /// Linear rises with an abrupt fall.
    Sawtooth {
        least: f64,
        most: f64,
        /// Seconds of one rise.
        period_s: f64,
        /// Phase shift, in seconds.
        #[serde(default)]
        ahead_s: f64,
    },
    /// A sine wave: day and night.
    Wave {
        least: f64,
        most: f64,
        /// Seconds of one wave.
        period_s: f64,
        /// Phase shift, in seconds.
        #[serde(default)]
        ahead_s: f64,
    },
    /// Random bursts over a constant demand.
    Bursts {
        quiet: f64,
        burst: f64,
        /// Share of time in a burst, 0 to 1.
        share: f64,
        /// Seconds of one burst.
        length_s: f64,
        /// Determines their times.
        #[serde(default)]
        seed: u64,
    },
    /// A new random demand each second, around a mean.
    Noise {
        mean: f64,
        /// Maximum deviation, in cores.
        spread: f64,
        #[serde(default)]
        seed: u64,
    },
    /// Recorded samples; the last one holds.
    Recorded {
        samples: Arc<[f32]>,
        /// Interval of the samples, in seconds.
        every_s: f64,
    },
}

/// A pseudo-random number from 0 to 1 for a seed and a counter (SplitMix64, Steele et al. 2014).
fn chance(seed: u64, count: u64) -> f64 {
    let mut bits = seed
        .wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

impl Curve {
    /// Demand at a time, in cores.
    pub fn cores(&self, at_ms: u64) -> f64 {
        let at_s = at_ms as f64 / 1e3;
        let phase =
            |ahead_s: f64, period_s: f64| ((at_s + ahead_s) / period_s.max(1e-3)).rem_euclid(1.0);
        let demand = match self {
            Curve::Steady { cores } => *cores,
            Curve::Step {
                before,
                after,
                at_s: step_s,
            } => {
                if at_s < *step_s {
                    *before
                } else {
                    *after
                }
            }
            Curve::Sawtooth {
                least,
                most,
                period_s,
                ahead_s,
            } => least + (most - least) * phase(*ahead_s, *period_s),
            Curve::Wave {
                least,
                most,
                period_s,
                ahead_s,
            } => {
                let up = (1.0 - (TAU * phase(*ahead_s, *period_s)).cos()) / 2.0;
                least + (most - least) * up
            }
            Curve::Bursts {
                quiet,
                burst,
                share,
                length_s,
                seed,
            } => {
                let slot = (at_s / length_s.max(1e-3)) as u64;
                if chance(*seed, slot) < *share {
                    *burst
                } else {
                    *quiet
                }
            }
            Curve::Noise { mean, spread, seed } => {
                mean + spread * (2.0 * chance(*seed, at_ms / 1000) - 1.0)
            }
            Curve::Recorded { samples, every_s } => {
                let number = (at_s / every_s.max(1e-3)) as usize;
                let last = samples.len().saturating_sub(1);
                samples
                    .get(number.min(last))
                    .map_or(0.0, |it| f64::from(*it))
            }
        };
        demand.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_what_they_are_called() {
        let step = Curve::Step {
            before: 1.0,
            after: 2.0,
            at_s: 10.0,
        };
        assert_eq!((step.cores(9_999), step.cores(10_000)), (1.0, 2.0));
        let saw = Curve::Sawtooth {
            least: 1.0,
            most: 3.0,
            period_s: 10.0,
            ahead_s: 0.0,
        };
        assert_eq!(
            (saw.cores(0), saw.cores(5_000), saw.cores(10_000)),
            (1.0, 2.0, 1.0)
        );
        let wave = Curve::Wave {
            least: 0.0,
            most: 2.0,
            period_s: 86_400.0,
            ahead_s: 0.0,
        };
        assert!(wave.cores(0) < 1e-9 && (wave.cores(43_200_000) - 2.0).abs() < 1e-9);
        let recorded = Curve::Recorded {
            samples: [0.5f32, 1.5].into(),
            every_s: 300.0,
        };
        assert_eq!((recorded.cores(0), recorded.cores(9_000_000)), (0.5, 1.5));
        let bursts = Curve::Bursts {
            quiet: 0.0,
            burst: 1.0,
            share: 0.25,
            length_s: 5.0,
            seed: 3,
        };
        let on = (0..4000)
            .filter(|it| bursts.cores(it * 5_000) > 0.5)
            .count();
        assert!((800..1200).contains(&on), "{on}");
    }
}
