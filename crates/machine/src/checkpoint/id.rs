//! The ids of checkpoints.

use keel_store::clock::unix_ms;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Identifies a checkpoint of a machine: ids increase with time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CheckpointId(String);

impl CheckpointId {
    /// A new id for this time.
    pub fn new(unix_ms: u64) -> Self {
        CheckpointId(format!("{unix_ms:013}-{:08x}", rand::random::<u32>()))
    }

    /// A new id for the present time, or above an earlier one that a clock ahead gave.
    pub fn after(earlier: Option<&CheckpointId>) -> Self {
        let least = earlier.map_or(0, |earlier| earlier.unix_ms() + 1);
        CheckpointId::new(unix_ms().max(least))
    }

    /// Time of the checkpoint, in milliseconds since 1970-01-01 UTC.
    pub fn unix_ms(&self) -> u64 {
        let time = self.0.split('-').next();
        time.and_then(|time| time.parse().ok()).unwrap_or(0)
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<CheckpointId> for String {
    fn from(id: CheckpointId) -> Self {
        id.0
    }
}

impl TryFrom<String> for CheckpointId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for CheckpointId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let well = text.split_once('-').is_some_and(|(time, rest)| {
            time.len() == 13
                && time.bytes().all(|byte| byte.is_ascii_digit())
                && rest.len() == 8
                && rest.bytes().all(|byte| byte.is_ascii_hexdigit())
        });
        if well {
            Ok(CheckpointId(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is not the name of a checkpoint (see `keel checkpoints MACHINE`)"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_increase_though_a_clock_was_ahead() {
        let (past, future) = (
            CheckpointId::new(5),
            CheckpointId::new(unix_ms() + 1_000_000),
        );
        for earlier in [&past, &future] {
            assert!(CheckpointId::after(Some(earlier)) > *earlier);
        }
        let before = unix_ms();
        assert!(CheckpointId::after(None).unix_ms() >= before);
    }
}
