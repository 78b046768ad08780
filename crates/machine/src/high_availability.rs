//! What keeps a machine available when its node fails: how often its state is copied to where it
//! survives, and how it is restarted. A part of the machine's specification; the agents carry it
//! out.

use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::time::Duration;

/// Intervals of checkpoints that are possible, in milliseconds.
pub const CHECKPOINT_EVERY_MS: RangeInclusive<u64> = 10..=24 * 3600 * 1000;
/// The default interval, in milliseconds.
pub const CHECKPOINT_EVERY_MS_DEFAULT: u64 = 10_000;
/// The default interval where output waits for the next checkpoint, in milliseconds.
pub const PROTECTED_EVERY_MS_DEFAULT: u64 = 100;
/// The highest priority; 0 is the lowest.
pub const PRIORITY_MAX: u32 = 100;
/// The priority of machines that name none.
pub const PRIORITY_DEFAULT: u32 = 5;
/// Copies of a checkpoint on other nodes, if none are named.
const REPLICAS_DEFAULT: u32 = 1;
/// The most copies of a checkpoint on other nodes.
pub const REPLICAS_MAX: u32 = 4;

/// How a machine is kept available when its node fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(from = "Stored")]
pub struct HighAvailability {
    /// Interval of its checkpoints in milliseconds: what it loses when its node fails is at most
    /// this much of its work. In [`CHECKPOINT_EVERY_MS`].
    pub checkpoint_every_ms: u64,
    /// Machines with a higher one are restarted first, 0 to [`PRIORITY_MAX`].
    pub priority: u32,
    /// Other nodes that have its newest checkpoint, 1 to [`REPLICAS_MAX`].
    pub replicas: u32,
    /// URL of a repository that all nodes reach. Checkpoints go there, and not to other nodes.
    pub to: Option<String>,
    /// What a failure must not undo.
    pub protect: Protect,
    /// How a node that cannot be reached is kept from acting on `host:` volumes, which no receiver
    /// can refuse.
    pub fence: Fence,
}

/// As it is in the store, perhaps by a version that had seconds and fewer settings.
#[derive(Deserialize)]
struct Stored {
    checkpoint_every_ms: Option<u64>,
    checkpoint_every_s: Option<u64>,
    #[serde(default = "priority_default")]
    priority: u32,
    #[serde(default = "replicas_default")]
    replicas: u32,
    #[serde(default)]
    to: Option<String>,
    #[serde(default)]
    protect: Protect,
    #[serde(default)]
    fence: Fence,
}

impl From<Stored> for HighAvailability {
    fn from(stored: Stored) -> Self {
        let in_seconds = stored.checkpoint_every_s.map(|it| it.saturating_mul(1000));
        HighAvailability {
            checkpoint_every_ms: stored
                .checkpoint_every_ms
                .or(in_seconds)
                .unwrap_or(stored.protect.every_ms_default()),
            priority: stored.priority,
            replicas: stored.replicas,
            to: stored.to,
            protect: stored.protect,
            fence: stored.fence,
        }
    }
}

/// What the failure of a node must not undo.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protect {
    /// Nothing: work since the last checkpoint is done again, and its output appears again.
    #[default]
    None,
    /// Output that was seen: it waits until a checkpoint that covers it is on another node (as in
    /// Remus: Cully et al., High Availability via Asynchronous Virtual Machine Replication, NSDI
    /// 2008).
    Output,
}

impl Protect {
    /// The interval of checkpoints if none is named, in milliseconds.
    pub fn every_ms_default(self) -> u64 {
        match self {
            Protect::None => CHECKPOINT_EVERY_MS_DEFAULT,
            Protect::Output => PROTECTED_EVERY_MS_DEFAULT,
        }
    }
}

/// What is known to keep a machine of a lost node from writing outside of the cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fence {
    /// Nothing: the machine has no such outputs.
    #[default]
    None,
    /// The kernel's timer, which kills the machine's process at the end of its node's lease. It
    /// does not help against a kernel that stands still and goes on later.
    Timer,
    /// A program of the operator on each node, which makes certain that a node that failed is off.
    /// Until it says so the machine waits.
    Hook,
}

fn priority_default() -> u32 {
    PRIORITY_DEFAULT
}

fn replicas_default() -> u32 {
    REPLICAS_DEFAULT
}

impl Default for HighAvailability {
    fn default() -> Self {
        HighAvailability {
            checkpoint_every_ms: CHECKPOINT_EVERY_MS_DEFAULT,
            priority: PRIORITY_DEFAULT,
            replicas: REPLICAS_DEFAULT,
            to: None,
            protect: Protect::None,
            fence: Fence::None,
        }
    }
}

impl HighAvailability {
    /// Checks the ranges.
    ///
    /// # Errors
    /// A message for the user.
    pub fn check(&self) -> Result<(), String> {
        if !CHECKPOINT_EVERY_MS.contains(&self.checkpoint_every_ms) {
            let text = |ms: u64| humantime::format_duration(Duration::from_millis(ms));
            return Err(format!(
                "high availability with a checkpoint every {}: {} to {} are possible",
                text(self.checkpoint_every_ms),
                text(*CHECKPOINT_EVERY_MS.start()),
                text(*CHECKPOINT_EVERY_MS.end())
            ));
        }
        if self.priority > PRIORITY_MAX {
            return Err(format!(
                "a priority of {}: 0 to {PRIORITY_MAX} are possible",
                self.priority
            ));
        }
        if let Some(url) = &self.to {
            if self.protects_output() {
                return Err("protected output waits until other nodes have the checkpoint (protect), which does not go with a place for checkpoints that all nodes see (to)".into());
            }
            if self.replicas != REPLICAS_DEFAULT {
                return Err("checkpoints go to a place that all nodes see (to), or to other nodes (replicas), not to both".into());
            }
            if !["/", "file:///", "s3://"]
                .iter()
                .any(|known| url.starts_with(known))
            {
                return Err(format!(
                    "{url:?} is no place for checkpoints: use /a/directory, file:///a/directory or s3://bucket/prefix"
                ));
            }
        }
        if !(1..=REPLICAS_MAX).contains(&self.replicas) {
            return Err(format!(
                "{} copies of each checkpoint on other nodes: 1 to {REPLICAS_MAX} are possible",
                self.replicas
            ));
        }
        Ok(())
    }

    /// One line for users.
    pub fn line(&self) -> String {
        let place = match &self.to {
            Some(url) => format!("to {url}"),
            None if self.replicas == 1 => "on 1 other node".to_owned(),
            None => format!("on {} other nodes", self.replicas),
        };
        let fence = match self.fence {
            Fence::None => "",
            Fence::Timer => ", fenced by timer",
            Fence::Hook => ", fenced by the operator's program",
        };
        let protect = match self.protect {
            Protect::None => "",
            Protect::Output => ", output protected",
        };
        format!(
            "checkpoint every {} {place}, priority {}{protect}{fence}",
            humantime::format_duration(self.checkpoint_every()),
            self.priority
        )
    }

    /// The interval of its checkpoints.
    pub fn checkpoint_every(&self) -> Duration {
        Duration::from_millis(self.checkpoint_every_ms)
    }

    /// Whether its output waits for a checkpoint on another node.
    pub fn protects_output(&self) -> bool {
        self.protect == Protect::Output
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        let of = |change: fn(&mut HighAvailability)| {
            let mut wanted = HighAvailability::default();
            change(&mut wanted);
            wanted.check()
        };
        assert_eq!(of(|_| {}), Ok(()));
        let refused = [
            of(|it| it.checkpoint_every_ms = 9),
            of(|it| it.checkpoint_every_ms = 86_400_001),
            of(|it| it.priority = 101),
            of(|it| it.replicas = 0),
            of(|it| it.replicas = 5),
            of(|it| it.to = Some("nowhere".into())),
            of(|it| (it.to, it.replicas) = (Some("/kept".into()), 2)),
            of(|it| (it.to, it.protect) = (Some("/kept".into()), Protect::Output)),
        ];
        let named = [
            "every 9ms",
            "every 1day 1ms",
            "priority of 101",
            "0 copies",
            "5 copies",
            "\"nowhere\"",
            "not to both",
            "does not go with",
        ];
        for (refused, name) in refused.into_iter().zip(named) {
            assert!(refused.unwrap_err().contains(name), "{name}");
        }
    }

    #[test]
    fn what_is_not_named_has_its_default() {
        let read: HighAvailability = serde_json::from_str(r#"{"priority":9}"#).unwrap();
        assert_eq!(read.priority, 9);
        assert_eq!(read.checkpoint_every_ms, CHECKPOINT_EVERY_MS_DEFAULT);
        let read: HighAvailability = serde_json::from_str(r#"{"protect":"output"}"#).unwrap();
        assert_eq!(read.checkpoint_every_ms, PROTECTED_EVERY_MS_DEFAULT);
        // Of an older version.
        let read: HighAvailability = serde_json::from_str(r#"{"checkpoint_every_s":7}"#).unwrap();
        assert_eq!(read.checkpoint_every_ms, 7000);
        // Of a newer version.
        assert!(serde_json::from_str::<HighAvailability>(r#"{"prio":9}"#).is_ok());
    }
}
