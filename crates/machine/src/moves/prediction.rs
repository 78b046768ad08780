//! Predicts the course of a move: a pure function of the machine's writes, the link's
//! rate, and earlier moves.
//!
//! Simulates the rounds of pre-copy with the rule that copying itself follows
//! ([`super::convergence`]), as in published models of live migration (Akoush et al.,
//! "Predicting the Performance of Virtual Machine Migration", MASCOTS 2010): a round
//! takes as long as its bytes take on the link, and the next one has what was written in
//! that time. The writes were sampled: bytes that are written repeatedly count once. What
//! the model does not include (compilation, the store, a busy host) is learned: each
//! prediction is stored in its move's report, and the errors of earlier ones correct the
//! next and determine its interval.

use super::convergence::{self, CopyDecision, LAST_PAGES_BUDGET};
use super::{Ending, MoveReport, Round};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Fixed cost of a round.
const ROUND_OVERHEAD: Duration = Duration::from_micros(500);
/// Cost of a move beside copying, and downtime beside the last pages, before any move is
/// known.
const OFFER_GUESS: Duration = Duration::from_millis(60);
const DOWNTIME_GUESS: Duration = Duration::from_millis(3);
/// Just before the freeze, written pages are sent once more: about this long before it.
const CATCH_UP: Duration = Duration::from_micros(700);
/// Post-copy: naming pages, per GiB of memory.
const NAMING_PER_GIB: Duration = Duration::from_millis(1);
/// Factor of uncertainty without earlier moves.
const UNKNOWN: f64 = 2.0;
/// Minimum factor between the likely value and the bounds of its interval.
const LEAST: f64 = 1.15;
/// Earlier moves that are considered.
const HISTORY_MAX: usize = 16;
/// Shares of time in which a throttled guest runs, in the order of the throttling steps.
const SLOWED: [f64; 6] = [0.5, 0.25, 0.13, 0.07, 0.04, 0.03];

/// A machine's use of memory, sampled while it ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Bytes populated: the size of the first round.
    pub populated_bytes: u64,
    /// Bytes of its own volumes.
    pub volume_bytes: u64,
    /// Distinct bytes written since the start of the sample, at several times.
    pub written: Vec<Written>,
}

/// Distinct bytes written in a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Length of the period in microseconds.
    pub micros: u64,
    /// Bytes in whole pages.
    pub bytes: u64,
}

impl Activity {
    /// Distinct bytes written in a period: as sampled, then extrapolated from the end of
    /// the sample, up to the populated size.
    fn written_in(&self, time: Duration) -> f64 {
        let wanted = time.as_secs_f64() * 1e6;
        let (mut from, mut to) = ((0.0, 0.0), (0.0, 0.0));
        for written in &self.written {
            from = to;
            to = (written.micros as f64, written.bytes as f64);
            if to.0 >= wanted {
                break;
            }
        }
        let slope = if to.0 > from.0 {
            ((to.1 - from.1) / (to.0 - from.0)).max(0.0)
        } else {
            0.0
        };
        (to.1 + (wanted - to.0) * slope).clamp(0.0, self.populated_bytes as f64)
    }

    /// Write rate in bytes per second, from the shortest sample.
    pub fn bytes_per_s(&self) -> u64 {
        self.written.first().map_or(0, |first| {
            (first.bytes as f64 / (first.micros.max(1) as f64 / 1e6)) as u64
        })
    }
}

/// An uncertain value with an interval that contains it in about eight of ten cases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = PredictedRange)]
pub struct Estimate {
    /// Lower bound.
    pub low: u64,
    /// Median.
    pub likely: u64,
    /// Upper bound.
    pub high: u64,
}

impl Estimate {
    /// Whether a value is within the interval.
    pub fn contains(&self, figure: u64) -> bool {
        (self.low..=self.high).contains(&figure)
    }
}

/// The predicted course of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = MovePrediction)]
pub struct Prediction {
    /// Whether this is a post-copy move.
    pub post_copy: bool,
    /// Duration until all is at the target, in microseconds.
    pub total_micros: Estimate,
    /// Downtime in microseconds.
    pub downtime_micros: Estimate,
    /// Bytes sent.
    pub bytes: Estimate,
    /// Rounds of copying.
    pub rounds: u32,
    /// Share of time, in percent, in which the guest's threads run at the end of copying;
    /// 100 without throttling.
    pub speed_percent: u32,
    /// Write rate of the machine, in bytes per second.
    pub written_bytes_per_s: u64,
    /// Rate of the link, in bytes per second.
    pub link_bytes_per_s: u64,
    /// Number of earlier moves considered.
    pub learned_from: u32,
}

/// Input of a prediction.
#[derive(Debug, Clone, Copy)]
pub struct PredictionInput<'a> {
    pub activity: &'a Activity,
    /// Rate of the link in a trial, in bytes per second, if there was one.
    pub trial_bytes_per_s: Option<u64>,
    /// Earlier moves over this link, the latest last.
    pub history: &'a [MoveReport],
    /// Time limit for sending what is left while the machine is frozen.
    pub budget: Duration,
}

impl Default for PredictionInput<'_> {
    fn default() -> Self {
        const NOTHING: &Activity = &Activity {
            populated_bytes: 0,
            volume_bytes: 0,
            written: Vec::new(),
        };
        PredictionInput {
            activity: NOTHING,
            trial_bytes_per_s: None,
            history: &[],
            budget: LAST_PAGES_BUDGET,
        }
    }
}

/// Predicts a move; `None` if the link's rate is unknown.
pub fn predict(known: &PredictionInput<'_>, post_copy: bool) -> Option<Prediction> {
    let history: Vec<&MoveReport> = known
        .history
        .iter()
        .filter(|report| report.ending == Ending::Moved)
        .rev()
        .take(HISTORY_MAX)
        .collect();
    let link =
        link_rate(history.iter().copied()).or(known.trial_bytes_per_s.map(|rate| rate as f64))?;
    let link = link.max(1.0);
    let simulate_copying = simulate_copying(known, link, post_copy);
    let stand = median(
        history
            .iter()
            .map(|report| fixed_downtime_micros(report) as f64),
    )
    .unwrap_or(DOWNTIME_GUESS.as_secs_f64() * 1e6);
    let offer = median(history.iter().map(|report| report.offer_micros as f64))
        .unwrap_or(OFFER_GUESS.as_secs_f64() * 1e6);
    let naming = match post_copy {
        true => {
            let gib = known.activity.populated_bytes as f64 / f64::from(1 << 30);
            NAMING_PER_GIB.as_secs_f64() * 1e6 * gib
        }
        false => 0.0,
    };
    let downtime = stand + naming + simulate_copying.last_bytes / link * 1e6;
    let total =
        offer + simulate_copying.micros + downtime + simulate_copying.behind_bytes / link * 1e6;
    let errors = |of: fn(&MoveReport, &Prediction) -> (u64, Estimate)| -> Vec<f64> {
        history
            .iter()
            .filter_map(|report| {
                let predicted = report.predicted.as_ref()?;
                let same = predicted.post_copy == post_copy;
                let (actual, estimate) = of(report, predicted);
                same.then(|| actual.max(1) as f64 / estimate.likely.max(1) as f64)
            })
            .collect()
    };
    Some(Prediction {
        post_copy,
        total_micros: estimate(
            total,
            &errors(|report, predicted| (report.total_micros, predicted.total_micros)),
        ),
        downtime_micros: estimate(
            downtime,
            &errors(|report, predicted| (report.downtime_micros, predicted.downtime_micros)),
        ),
        bytes: estimate(
            simulate_copying.bytes + simulate_copying.behind_bytes,
            &errors(|report, predicted| (report.bytes, predicted.bytes)),
        ),
        rounds: simulate_copying.rounds,
        speed_percent: simulate_copying.speed_percent,
        written_bytes_per_s: known.activity.bytes_per_s(),
        link_bytes_per_s: link as u64,
        learned_from: history.len() as u32,
    })
}

/// The simulated course of copying.
struct CopyModel {
    micros: f64,
    bytes: f64,
    rounds: u32,
    speed_percent: u32,
    /// Sent while the machine is frozen.
    last_bytes: f64,
    /// Sent by post-copy.
    behind_bytes: f64,
}

fn simulate_copying(known: &PredictionInput<'_>, link: f64, post_copy: bool) -> CopyModel {
    let activity = known.activity;
    let seconds = |bytes: f64| Duration::from_secs_f64((bytes / link).min(1e9));
    let mut left = (activity.populated_bytes + activity.volume_bytes) as f64;
    let mut simulate_copying = CopyModel {
        micros: 0.0,
        bytes: 0.0,
        rounds: 0,
        speed_percent: 100,
        last_bytes: 0.0,
        behind_bytes: 0.0,
    };
    let mut speed = 1.0;
    let mut slower = SLOWED.iter();
    let mut rounds = Vec::new();
    loop {
        let time = seconds(left) + ROUND_OVERHEAD;
        simulate_copying.micros += time.as_secs_f64() * 1e6;
        simulate_copying.bytes += left;
        rounds.push(Round {
            bytes: left as u64,
            micros: time.as_micros() as u64,
        });
        left = activity.written_in(time.mul_f64(speed));
        if post_copy {
            simulate_copying.behind_bytes = left;
            break;
        }
        match convergence::next(&rounds, left as u64, known.budget) {
            CopyDecision::Freeze => {
                simulate_copying.bytes += left;
                simulate_copying.micros += left / link * 1e6;
                break;
            }
            CopyDecision::Slower => speed = slower.next().copied().unwrap_or(speed),
            CopyDecision::Round => {}
        }
    }
    simulate_copying.rounds = rounds.len() as u32;
    simulate_copying.speed_percent = (speed * 100.0) as u32;
    if !post_copy {
        simulate_copying.last_bytes = activity.written_in(CATCH_UP.mul_f64(speed));
        simulate_copying.bytes += simulate_copying.last_bytes;
    }
    simulate_copying
}

/// Rate of the largest rounds of earlier moves, in bytes per second.
pub fn link_rate<'a>(history: impl IntoIterator<Item = &'a MoveReport>) -> Option<f64> {
    median(history.into_iter().filter_map(|report| {
        let largest = report.rounds.iter().max_by_key(|round| round.bytes)?;
        // Short rounds mainly reflect the overhead.
        (largest.bytes >= 1 << 20)
            .then(|| largest.bytes as f64 / (largest.micros.max(1) as f64 / 1e6))
    }))
}

/// Downtime of a move beside its last pages.
fn fixed_downtime_micros(report: &MoveReport) -> u64 {
    report
        .downtime_micros
        .saturating_sub(report.last_pages_micros)
}

fn median(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}

/// The likely value, corrected by the errors of earlier predictions (actual over
/// predicted), with its interval.
fn estimate(likely: f64, errors: &[f64]) -> Estimate {
    let Some(correction) = median(errors.iter().copied()) else {
        return Estimate {
            low: (likely / UNKNOWN) as u64,
            likely: likely as u64,
            high: (likely * UNKNOWN) as u64,
        };
    };
    // A few samples show little of the spread: the interval stays wide until there are
    // many.
    let weight = errors.len() as f64 / (errors.len() as f64 + 2.0);
    let correction = correction.powf(weight);
    let likely = likely * correction;
    let mut sorted: Vec<f64> = errors.iter().map(|error| error / correction).collect();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    let wide = |seen: f64| UNKNOWN.powf(1.0 - weight) * seen.max(1.0).max(LEAST);
    Estimate {
        low: (likely / wide(1.0 / at(0.1).max(1e-3))) as u64,
        likely: likely as u64,
        high: (likely * wide(at(0.9))) as u64,
    }
}

impl Prediction {
    /// One line for users.
    pub fn line(&self) -> String {
        let ms = |of: Estimate| {
            let figure = |micros: u64| match micros {
                0..10_000 => format!("{:.1}", micros as f64 / 1000.0),
                _ => format!("{:.0}", micros as f64 / 1000.0),
            };
            format!(
                "{} ms ({} to {})",
                figure(of.likely),
                figure(of.low),
                figure(of.high)
            )
        };
        format!(
            "{}: {}, {:.1} MB in {} round(s); downtime {}{}",
            match self.post_copy {
                true => "post-copy",
                false => "pre-copy",
            },
            ms(self.total_micros),
            self.bytes.likely as f64 / 1e6,
            self.rounds,
            ms(self.downtime_micros),
            match self.speed_percent {
                100 => String::new(),
                percent => format!("; throttled to {percent} % before"),
            }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn activity(populated: u64, rate_per_s: u64, hot: u64) -> Activity {
        let written = [20_000u64, 60_000].map(|micros| Written {
            micros,
            bytes: (rate_per_s * micros / 1_000_000).min(hot),
        });
        Activity {
            populated_bytes: populated,
            volume_bytes: 0,
            written: written.to_vec(),
        }
    }

    fn known(activity: &Activity) -> PredictionInput<'_> {
        PredictionInput {
            activity,
            trial_bytes_per_s: Some(1000 * MIB),
            ..PredictionInput::default()
        }
    }

    #[test]
    fn an_idle_machine_is_copied_once() {
        let quiet = activity(1024 * MIB, 0, 0);
        let prediction = predict(&known(&quiet), false).unwrap();
        assert_eq!((prediction.rounds, prediction.speed_percent), (1, 100));
        assert_eq!(prediction.bytes.likely, 1024 * MIB);
        let ms = prediction.total_micros.likely / 1000;
        assert!((1024..1200).contains(&ms), "{ms}");
        assert!(prediction.downtime_micros.likely < 4000);
        assert!(prediction.total_micros.low < prediction.total_micros.likely);
    }

    #[test]
    fn writers_need_rounds_and_fast_ones_are_throttled() {
        let some = activity(1024 * MIB, 200 * MIB, 1024 * MIB);
        let some = predict(&known(&some), false).unwrap();
        assert!((3..8).contains(&some.rounds) && some.speed_percent == 100);
        assert!(some.bytes.likely > 1200 * MIB);
        // The machine rewrites 64 MiB: no more is ever left.
        let hot = activity(1024 * MIB, 4000 * MIB, 64 * MIB);
        let hot = predict(&known(&hot), false).unwrap();
        assert!(hot.speed_percent < 100, "{hot:?}");
        let wild = activity(1024 * MIB, 2000 * MIB, 1024 * MIB);
        let slow = predict(&known(&wild), false).unwrap();
        assert!(slow.speed_percent <= 25 && slow.rounds <= 40);
        // With a larger budget the guest is not throttled.
        let patient = PredictionInput {
            budget: Duration::from_secs(2),
            ..known(&wild)
        };
        assert_eq!(predict(&patient, false).unwrap().speed_percent, 100);
        // Post-copy needs a single round.
        let after = predict(&known(&wild), true).unwrap();
        assert_eq!((after.rounds, after.speed_percent), (1, 100));
        assert!(after.bytes.likely > 1024 * MIB && after.downtime_micros.likely < 6000);
    }

    fn report(predicted: &Prediction, factor: f64) -> MoveReport {
        let times = |figure: u64| (figure as f64 * factor) as u64;
        MoveReport {
            rounds: vec![Round {
                bytes: 1000 * MIB,
                micros: 1_000_000,
            }],
            offer_micros: 60_000,
            total_micros: times(predicted.total_micros.likely),
            downtime_micros: times(predicted.downtime_micros.likely),
            bytes: times(predicted.bytes.likely),
            predicted: Some(predicted.clone()),
            ..MoveReport::example()
        }
    }

    /// If everything takes 1.5 times as long as the model says, predictions become
    /// correct and more certain.
    #[test]
    fn it_learns_from_its_errors() {
        let quiet = activity(1024 * MIB, 0, 0);
        let mut history = Vec::new();
        let first = predict(&known(&quiet), false).unwrap();
        let truth = first.total_micros.likely * 3 / 2;
        for _ in 0..12 {
            let known = PredictionInput {
                history: &history,
                ..known(&quiet)
            };
            let now = predict(&known, false).unwrap();
            let factor = truth as f64 / now.total_micros.likely as f64;
            history.push(report(&now, factor));
        }
        let known = PredictionInput {
            history: &history,
            ..known(&quiet)
        };
        let last = predict(&known, false).unwrap();
        assert_eq!(last.learned_from, 12);
        assert!(last.total_micros.contains(truth), "{last:?}, {truth}");
        let width = |of: Estimate| of.high as f64 / of.low as f64;
        assert!(width(last.total_micros) < width(first.total_micros));
        let off = |of: Estimate| (of.likely as f64 / truth as f64).ln().abs();
        assert!(off(last.total_micros) < off(first.total_micros));
    }

    #[test]
    fn extreme_values_do_not_panic() {
        let odd = Activity {
            populated_bytes: u64::MAX / 4,
            volume_bytes: 0,
            written: vec![
                Written {
                    micros: 0,
                    bytes: u64::MAX,
                },
                Written {
                    micros: 0,
                    bytes: 0,
                },
            ],
        };
        for rate in [0, 1, u64::MAX] {
            let known = PredictionInput {
                trial_bytes_per_s: Some(rate),
                ..known(&odd)
            };
            for post_copy in [false, true] {
                let it = predict(&known, post_copy).unwrap();
                assert!(it.rounds <= 40 && it.total_micros.low <= it.total_micros.high);
            }
        }
        let nothing = PredictionInput {
            trial_bytes_per_s: None,
            ..known(&odd)
        };
        assert_eq!(predict(&nothing, false), None);
        // Reports of zeros.
        let zeros = [MoveReport::example()];
        let known = PredictionInput {
            history: &zeros,
            ..known(&odd)
        };
        assert!(predict(&known, false).is_some());
    }
}
