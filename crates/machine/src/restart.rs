//! Whether a machine that ended by itself is started again, and when: a pure
//! decision.
//!
//! ```text
//!   Running ──ended──▶ decide ──▶ Restarting ──delay──▶ Running (next epoch)
//!                         └─────▶ Exited / Trapped / Failed
//! ```
//!
//! The delay doubles with each restart that did not last, as container engines
//! and init systems do it, so that a program which ends at once costs next to
//! nothing. A machine whose process was taken from it goes on from its newest
//! checkpoint; one that ended by its own doing would end so again, and starts
//! from its beginning.

use crate::spec::Status;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Before the first restart.
const FIRST_DELAY: Duration = Duration::from_millis(200);
/// The longest delay.
const DELAY_MAX: Duration = Duration::from_secs(60);
/// A machine that ran this long starts afresh in the count, as in other container
/// engines.
const STABLE_RUN_MS: u64 = 10_000;

/// When a machine is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When it trapped, exited with another code than 0, could not start, or
    /// its worker was lost.
    OnFailure,
    /// Whenever it ended by itself.
    Always,
}

impl Restart {
    /// As users write it.
    pub fn word(self) -> &'static str {
        match self {
            Restart::No => "no",
            Restart::OnFailure => "on-failure",
            Restart::Always => "always",
        }
    }
}

/// A restart that is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartPlan {
    /// Time until then.
    pub delay: Duration,
    /// How many there were then, since the last good life.
    pub restarts: u32,
    /// Whether it goes on from its newest checkpoint, if there is one.
    pub from_checkpoint: bool,
}

/// What follows the end of a machine that ran `lived_ms` after `restarts`
/// restarts; `None` if it stays as it is.
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
    fn only_what_was_taken_goes_on_from_a_checkpoint() {
        let from = |end| decide(Restart::Always, &end, 0, 0).map(|plan| plan.from_checkpoint);
        assert_eq!(from(failed()), Some(true));
        assert_eq!(from(Status::Exited { code: 1 }), Some(false));
    }

    #[test]
    fn delays_double_up_to_a_minute_and_are_forgotten_after_a_good_life() {
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
