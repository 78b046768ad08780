//! What keeps a machine available when its node fails: how often its state is copied to where it
//! survives, and how it is restarted. A part of the machine's specification; the agents carry it
//! out.

use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// Intervals of checkpoints that are possible, in seconds.
pub const CHECKPOINT_EVERY_S: RangeInclusive<u64> = 1..=24 * 3600;
/// The default interval, in seconds.
pub const CHECKPOINT_EVERY_S_DEFAULT: u64 = 10;
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
pub struct HighAvailability {
    /// Interval of its checkpoints in seconds: what it loses when its node fails is at most this
    /// much of its work. In [`CHECKPOINT_EVERY_S`].
    #[serde(default = "checkpoint_every_s_default")]
    pub checkpoint_every_s: u64,
    /// Machines with a higher one are restarted first, 0 to [`PRIORITY_MAX`].
    #[serde(default = "priority_default")]
    pub priority: u32,
    /// Other nodes that have its newest checkpoint, 1 to [`REPLICAS_MAX`].
    #[serde(default = "replicas_default")]
    pub replicas: u32,
    /// URL of a repository that all nodes reach. Checkpoints go there, and not to other nodes.
    #[serde(default)]
    pub to: Option<String>,
    /// How a node that cannot be reached is kept from acting on `host:` volumes, which no receiver
    /// can refuse.
    #[serde(default)]
    pub fence: Fence,
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
}

fn checkpoint_every_s_default() -> u64 {
    CHECKPOINT_EVERY_S_DEFAULT
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
            checkpoint_every_s: CHECKPOINT_EVERY_S_DEFAULT,
            priority: PRIORITY_DEFAULT,
            replicas: REPLICAS_DEFAULT,
            to: None,
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
        if !CHECKPOINT_EVERY_S.contains(&self.checkpoint_every_s) {
            return Err(format!(
                "high availability with a checkpoint every {} seconds: {} to {} are possible",
                self.checkpoint_every_s,
                CHECKPOINT_EVERY_S.start(),
                CHECKPOINT_EVERY_S.end()
            ));
        }
        if self.priority > PRIORITY_MAX {
            return Err(format!(
                "a priority of {}: 0 to {PRIORITY_MAX} are possible",
                self.priority
            ));
        }
        if let Some(url) = &self.to {
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
        };
        format!(
            "checkpoint every {} s {place}, priority {}{fence}",
            self.checkpoint_every_s, self.priority
        )
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
            of(|it| it.checkpoint_every_s = 0),
            of(|it| it.checkpoint_every_s = 86_401),
            of(|it| it.priority = 101),
            of(|it| it.replicas = 0),
            of(|it| it.replicas = 5),
            of(|it| it.to = Some("nowhere".into())),
            of(|it| (it.to, it.replicas) = (Some("/kept".into()), 2)),
        ];
        let named = [
            "0 seconds",
            "86401 seconds",
            "priority of 101",
            "0 copies",
            "5 copies",
            "\"nowhere\"",
            "not to both",
        ];
        for (refused, name) in refused.into_iter().zip(named) {
            assert!(refused.unwrap_err().contains(name), "{name}");
        }
    }

    #[test]
    fn what_is_not_named_has_its_default() {
        let read: HighAvailability = serde_json::from_str(r#"{"priority":9}"#).unwrap();
        assert_eq!(read.priority, 9);
        assert_eq!(read.checkpoint_every_s, CHECKPOINT_EVERY_S_DEFAULT);
        // Of a newer version.
        assert!(serde_json::from_str::<HighAvailability>(r#"{"prio":9}"#).is_ok());
    }
}
