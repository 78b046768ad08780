//! Whether and when a machine that ended by itself is restarted: a pure decision.
//!
//! ```text
//!   Running ──ended──▶ decide ──▶ Restarting ──delay──▶ Running (next epoch)
//!                         └─────▶ Exited / Trapped / Failed
//! ```
//!
//! The delay doubles with each restart that did not last, as in container engines and
//! init systems, so that a program that ends at once costs little. A machine whose
//! process was lost is restored from its newest checkpoint; a machine that ended by
//! itself would end again in the same way, and restarts from its beginning.

use crate::spec::Status;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Delay before the first restart.
const FIRST_DELAY: Duration = Duration::from_millis(200);
/// The longest delay.
const DELAY_MAX: Duration = Duration::from_secs(60);
/// A machine that ran this long resets the count, as in other container engines.
const STABLE_RUN_MS: u64 = 10_000;

/// Restart policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When it trapped, exited with a code other than 0, could not start, or its worker
    /// was lost.
    OnFailure,
    /// Whenever it ended by itself.
    Always,
}

impl Restart {
    /// Its name for users.
    pub fn word(self) -> &'static str {
        match self {
            Restart::No => "no",
            Restart::OnFailure => "on-failure",
            Restart::Always => "always",
        }
    }
}

/// A restart to perform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartPlan {
    pub delay: Duration,
    /// Number of restarts since the last stable run, including this one.
    pub restarts: u32,
    /// Whether to restore the newest checkpoint, if there is one.
    pub from_checkpoint: bool,
}

/// The restart after the end of a machine that ran `lived_ms` after `restarts` restarts;
/// `None` if it is not restarted.
pub fn decide(policy: Restart, end: &Status, restarts: u32, lived_ms: u64) -> Option<RestartPlan> {
    let failed = match end {
        Status::Exited { code } => *code != 0,
        Status::Trapped { .. } | Status::Failed { .. } => true,
        // By a command, or not ended.
        Status::Stopped
        | Status::Scheduled
        | Status::Running
        | Status::Arriving { .. }
        | Status::Filling { .. }
        | Status::Restarting { .. } => return None,
    };
    match policy {
        Restart::Always => {}
        Restart::OnFailure if failed => {}
        Restart::OnFailure | Restart::No => return None,
    }
    let before = if lived_ms >= STABLE_RUN_MS {
        0
    } else {
        restarts
    };
    let delay = FIRST_DELAY
        .saturating_mul(2u32.saturating_pow(before))
        .min(DELAY_MAX);
    Some(RestartPlan {
        delay,
        restarts: before.saturating_add(1),
        from_checkpoint: matches!(end, Status::Failed { .. }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Status {
        Status::Failed {
            reason: "lost".into(),
        }
    }

    #[test]
    fn policies() {
        let trapped = Status::Trapped {
            message: String::new(),
        };
        let ends = [
            Status::Exited { code: 0 },
            Status::Exited { code: 3 },
            trapped,
            failed(),
            Status::Stopped,
            Status::Running,
        ];
        let restarted = |policy| {
            ends.each_ref()
                .map(|end| decide(policy, end, 0, 0).is_some())
        };
        assert_eq!(restarted(Restart::No), [false; 6]);
        let [on, always] = [Restart::OnFailure, Restart::Always].map(restarted);
        assert_eq!(on, [false, true, true, true, false, false]);
        assert_eq!(always, [true, true, true, true, false, false]);
    }

    #[test]
    fn only_lost_machines_are_restored_from_a_checkpoint() {
        let from = |end| decide(Restart::Always, &end, 0, 0).map(|plan| plan.from_checkpoint);
        assert_eq!(from(failed()), Some(true));
        assert_eq!(from(Status::Exited { code: 1 }), Some(false));
    }

    #[test]
    fn delays_double_up_to_a_minute_and_reset_after_a_stable_run() {
        let mut restarts = 0;
        let mut delays = Vec::new();
        for _ in 0..12 {
            let plan = decide(Restart::OnFailure, &failed(), restarts, 10).unwrap();
            restarts = plan.restarts;
            delays.push(plan.delay.as_millis());
        }
        assert_eq!(delays[..4], [200, 400, 800, 1600]);
        assert_eq!(delays[10..], [60_000, 60_000]);
        let plan = decide(Restart::OnFailure, &failed(), u32::MAX, STABLE_RUN_MS).unwrap();
        assert_eq!((plan.restarts, plan.delay), (1, FIRST_DELAY));
    }
}
