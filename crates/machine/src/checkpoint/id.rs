//! The ids of checkpoints.

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
