//! The balancing policy: part of the cluster's spec. Every field has a default that suits most
//! clusters.

use crate::load::Weights;
use serde::{Deserialize, Serialize};

/// Degree of automation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = BalanceMode)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Only measures load.
    Off,
    /// Records the moves that it would make.
    Suggest,
    /// Moves a machine after a user confirms.
    Confirm,
    #[default]
    Automatic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = BalanceStrategy)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Pressed nodes give load to less loaded ones. Without a pressed node nothing moves.
    #[default]
    Level,
    /// Consolidation: as few nodes as carry the load, the others stay free; pressed nodes are
    /// relieved first.
    Pack,
    /// Like `level`, also without a pressed node.
    Spread,
}

/// Which load of a machine counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = LoadBasis)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    #[default]
    Actual,
    /// The value of the spec (`cpu.target`, ...), where it has one.
    Target,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = BalancePolicy)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// How far it goes by itself.
    pub mode: Mode,
    pub strategy: Strategy,
    pub basis: Basis,
    pub weights: Weights,
    /// Difference of two loads below which they count as equal.
    pub margin: f64,
    /// The same as a share of their mean; the greater threshold applies.
    pub margin_share: f64,
    /// Load at which a node counts as pressed.
    pub pressed_load: f64,
    /// Share of time stalled (PSI) at which a node counts as pressed.
    pub pressed_share: f64,
    /// Load up to which `pack` fills a node.
    pub fill_load: f64,
    /// Load up to which `pack` empties a node; a node above it is left alone.
    pub empty_load: f64,
    /// Mean interval between two rounds of a node, in milliseconds.
    pub interval_ms: u64,
    /// Interval between two samples of a node, in milliseconds. A longer one makes balancing
    /// cheaper and slower.
    pub sample_ms: u64,
    /// Samples in the sliding window.
    pub window_samples: usize,
    /// Minimum stay of a machine after its arrival, in milliseconds.
    pub hold_ms: u64,
    /// Time within which a move is not reversed, in milliseconds. Repairs of rules, drains and
    /// failovers ignore it.
    pub cool_down_ms: u64,
    /// Minimum decrease of the sum over nodes of power times load squared per move.
    pub gain_min: f64,
    /// Minimum decrease of the load difference, as a share, where a move would make the lighter
    /// node the heavier one: a move that only swaps the two loads is noise. Among equal machines,
    /// whose nodes differ by one machine or by two, 0.5 admits it from 4/3 of a machine's load on.
    pub shrink_min: f64,
    /// Upper bound of the expected remaining duration of a load, in seconds.
    pub horizon_s: u64,
    /// Share of a node's memory that stays free for failovers.
    pub memory_headroom: f64,
    /// Maximum number of concurrent moves in the cluster; by default one per two nodes.
    pub moves_at_once_max: Option<u32>,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            mode: Mode::default(),
            strategy: Strategy::default(),
            basis: Basis::default(),
            weights: Weights::default(),
            margin: 0.10,
            margin_share: 0.10,
            pressed_load: 0.8,
            pressed_share: 0.10,
            fill_load: 0.7,
            empty_load: 0.35,
            interval_ms: 1000,
            sample_ms: 1000,
            shrink_min: 0.5,
            window_samples: 8,
            hold_ms: 30_000,
            cool_down_ms: 300_000,
            gain_min: 0.01,
            horizon_s: 600,
            memory_headroom: 0.05,
            moves_at_once_max: None,
        }
    }
}

/// An invalid policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("balance.{field} is {found}; it must be {range}")]
pub struct PolicyError {
    pub field: &'static str,
    pub found: String,
    pub range: &'static str,
}

impl Policy {
    /// Validates the policy.
    ///
    /// # Errors
    /// [`PolicyError`] for the first invalid field.
    pub fn check(&self) -> Result<(), PolicyError> {
        let share = "from 0 to 1";
        let weight = "from 0 to 100";
        let numbers = [
            ("weights.cpu", self.weights.cpu, 0.0, 100.0, weight),
            ("weights.memory", self.weights.memory, 0.0, 100.0, weight),
            ("weights.io", self.weights.io, 0.0, 100.0, weight),
            (
                "weights.pressure",
                self.weights.pressure,
                0.0,
                100.0,
                weight,
            ),
            ("margin", self.margin, 0.01, 100.0, "from 0.01 to 100"),
            ("margin_share", self.margin_share, 0.0, 1.0, share),
            (
                "pressed_load",
                self.pressed_load,
                0.0,
                100.0,
                "from 0 to 100",
            ),
            ("pressed_share", self.pressed_share, 0.0, 1.0, share),
            ("fill_load", self.fill_load, 0.0, 1.0, share),
            ("empty_load", self.empty_load, 0.0, 1.0, share),
            ("shrink_min", self.shrink_min, 0.0, 0.9, "from 0 to 0.9"),
            ("gain_min", self.gain_min, 1e-6, 1e6, "from 1e-6 to 1e6"),
            (
                "memory_headroom",
                self.memory_headroom,
                0.0,
                0.9,
                "from 0 to 0.9",
            ),
        ];
        for (field, found, least, most, range) in numbers {
            if !(least..=most).contains(&found) {
                let found = found.to_string();
                return Err(PolicyError {
                    field,
                    found,
                    range,
                });
            }
        }
        let window = self.window_samples as u64;
        let day = 24 * 3600 * 1000;
        let counts = [
            (
                "interval_ms",
                self.interval_ms,
                100,
                3_600_000,
                "from 100 to 3600000",
            ),
            (
                "sample_ms",
                self.sample_ms,
                100,
                3_600_000,
                "from 100 to 3600000",
            ),
            ("window_samples", window, 5, 120, "from 5 to 120"),
            ("hold_ms", self.hold_ms, 0, day, "at most a day"),
            (
                "cool_down_ms",
                self.cool_down_ms,
                0,
                7 * day,
                "at most a week",
            ),
            ("horizon_s", self.horizon_s, 1, 86_400, "from 1 to 86400"),
        ];
        for (field, found, least, most, range) in counts {
            if !(least..=most).contains(&found) {
                let found = found.to_string();
                return Err(PolicyError {
                    field,
                    found,
                    range,
                });
            }
        }
        if self.moves_at_once_max == Some(0) {
            return Err(PolicyError {
                field: "moves_at_once_max",
                found: "0".into(),
                range: "at least 1; `mode = \"off\"` stops balancing",
            });
        }
        if self.strategy == Strategy::Pack && self.fill_load >= self.pressed_load {
            return Err(PolicyError {
                field: "fill_load",
                found: self.fill_load.to_string(),
                range: "below balance.pressed_load, or packed nodes would be relieved at once",
            });
        }
        Ok(())
    }

    /// The difference of two loads from which they are uneven.
    pub fn margin_between(&self, one: f64, other: f64) -> f64 {
        self.margin.max(self.margin_share * (one + other) / 2.0)
    }

    /// Maximum number of concurrent moves in a cluster with this number of nodes.
    pub fn moves_at_once(&self, nodes: usize) -> u32 {
        let half = u32::try_from(nodes.div_ceil(2)).unwrap_or(u32::MAX).max(1);
        self.moves_at_once_max.unwrap_or(half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_makes_sense_and_nonsense_is_named() {
        assert_eq!(Policy::default().check(), Ok(()));
        let broken = Policy {
            margin: f64::NAN,
            ..Policy::default()
        };
        assert_eq!(broken.check().unwrap_err().field, "margin");
        let broken = Policy {
            window_samples: 4,
            ..Policy::default()
        };
        assert_eq!(broken.check().unwrap_err().field, "window_samples");
        let broken = Policy {
            strategy: Strategy::Pack,
            fill_load: 0.9,
            ..Policy::default()
        };
        assert_eq!(broken.check().unwrap_err().field, "fill_load");
    }

    #[test]
    fn it_is_written_in_toml() {
        let text = "mode = \"suggest\"\nmargin = 0.2\n[weights]\nmemory = 0.5\n";
        let policy: Policy = toml::from_str(text).unwrap();
        assert_eq!(policy.mode, Mode::Suggest);
        assert_eq!(policy.weights.memory, 0.5);
        assert_eq!(policy.weights.cpu, 1.0);
        let error = toml::from_str::<Policy>("margn = 0.2").unwrap_err();
        assert!(error.to_string().contains("margn"), "{error}");
    }
}
