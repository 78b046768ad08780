//! The epoch of a machine: raised by each change of its owner, by each restart, and by the
//! write that settles a move whose outcome is unknown. A change of the set of its parts does
//! not raise it (`docs/spanning.md`). A message with an older epoch is refused.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// (cluster incarnation, counter), ordered in this order; printed `i.c`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Epoch {
    /// Raised whenever the store begins anew from a copy or a backup.
    pub incarnation: u32,
    /// Raised by each change within the incarnation.
    pub counter: u64,
}

impl Epoch {
    /// The epoch after this one in the same incarnation.
    #[must_use]
    pub fn next(self) -> Self {
        Self {
            counter: self.counter.saturating_add(1),
            ..self
        }
    }

    /// As one number that rises with the epoch, for guests: the incarnation in
    /// the upper 24 bits.
    pub fn token(self) -> u64 {
        u64::from(self.incarnation) << 40 | self.counter & ((1 << 40) - 1)
    }

    /// The epoch after this one in a cluster of this incarnation: the first one of that, if it is a
    /// later one.
    #[must_use]
    pub fn in_incarnation(self, incarnation: u32) -> Self {
        match incarnation > self.incarnation {
            true => Self {
                incarnation,
                counter: 1,
            },
            false => self.next(),
        }
    }

    /// Whether it is the epoch after `before`, given in any incarnation of the cluster.
    pub fn follows(self, before: Epoch) -> bool {
        self == before.in_incarnation(self.incarnation)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.counter)
    }
}

/// A text that is not an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not an epoch: write INCARNATION.COUNTER, as 1.7")]
pub struct EpochError(String);

impl FromStr for Epoch {
    type Err = EpochError;
    fn from_str(text: &str) -> Result<Self, EpochError> {
        let error = || EpochError(text.chars().take(80).collect());
        let (incarnation, counter) = text.split_once('.').ok_or_else(error)?;
        Ok(Self {
            incarnation: incarnation.parse().map_err(|_| error())?,
            counter: counter.parse().map_err(|_| error())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incarnation_counts_more_than_counter() {
        let epoch = |incarnation, counter| Epoch {
            incarnation,
            counter,
        };
        assert!(epoch(1, 900) < epoch(2, 1));
        assert!(epoch(1, 1) < epoch(1, 1).next());
        assert_eq!(epoch(1, 900).in_incarnation(3), epoch(3, 1));
        assert_eq!(epoch(3, 900).in_incarnation(3), epoch(3, 901));
        assert_eq!(epoch(3, 900).in_incarnation(2), epoch(3, 901));
    }

    #[test]
    fn one_epoch_follows_another_in_each_incarnation() {
        let epoch = |incarnation, counter| Epoch {
            incarnation,
            counter,
        };
        for next in [epoch(2, 8), epoch(3, 1), epoch(5, 1)] {
            assert!(next.follows(epoch(2, 7)), "{next}");
        }
        for other in [
            epoch(2, 7),
            epoch(2, 9),
            epoch(3, 2),
            epoch(3, 8),
            epoch(1, 8),
            epoch(1, 1),
        ] {
            assert!(!other.follows(epoch(2, 7)), "{other}");
        }
    }

    #[test]
    fn text_goes_both_ways() {
        let epoch = Epoch {
            incarnation: 1,
            counter: 42,
        };
        assert_eq!(epoch.to_string(), "1.42");
        assert_eq!("1.42".parse(), Ok(epoch));
        for bad in ["", "1", "1.", ".1", "1.2.3", "-1.2", "4294967296.1"] {
            assert!(bad.parse::<Epoch>().is_err(), "{bad}");
        }
    }
}
