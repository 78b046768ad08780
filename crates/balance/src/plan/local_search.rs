//! Descent and refinement: moves that decrease the unevenness. Their order is left to `waves`.

use super::RESOURCES;
use super::state::{State, add};

/// Approximate number of moves that the descent evaluates, in total and per step: in a large
/// cluster only the most uneven nodes are evaluated.
const EVALUATIONS_MAX: usize = 30_000_000;
const EVALUATIONS_PER_STEP: (usize, usize) = (1_500, 60_000);
/// Targets evaluated per source, where not all are.
const TARGETS_PER_SOURCE: usize = 4;
/// Maximum number of full scans of all sites, when the extreme sites have no move left.
const FULL_SCANS_MAX: usize = 64;
/// Moved machines refined with one ranking of the sites.
const REFINED_PER_BATCH: usize = 32;
/// Maximum number of refinement passes.
const PASSES_MAX: usize = 6;
/// Exchanges evaluated per moved machine.
const EXCHANGES_MAX: usize = 64;

/// Steepest descent until no move is worthwhile or the limit of moves is reached.
pub(super) fn descend(state: &mut State<'_>, moved_max: usize) {
    let sites = state.problem.sites.len();
    let per_site = state.problem.loads.len() / sites.max(1) + 1;
    // Number of heaviest and of lightest sites that are evaluated.
    let (least, most) = EVALUATIONS_PER_STEP;
    let budget = (EVALUATIONS_MAX / state.problem.loads.len().max(1)).clamp(least, most);
    let (mut heaviest, mut lightest) = (sites, sites);
    if sites * sites * per_site > budget {
        let wide = (budget / per_site / TARGETS_PER_SOURCE).isqrt().max(1);
        heaviest = wide.min(sites);
        lightest = (wide * TARGETS_PER_SOURCE).min(sites);
    }
    let moves_max = 2 * state.problem.loads.len();
    let mut full_scans = 0;
    for _ in 0..moves_max {
        let by_excess = state.by_excess();
        let sources = &by_excess[..heaviest];
        let targets = &by_excess[sites - lightest..];
        let mut best = best_move(state, sources, targets);
        if best.is_none() && heaviest < sites && full_scans < FULL_SCANS_MAX {
            full_scans += 1;
            best = by_excess
                .chunks(heaviest)
                .find_map(|sources| best_move(state, sources, targets));
        }
        let Some((load, to)) = best else { return };
        // (A moved machine may move again.)
        let moves_more = state.at[load] == state.problem.loads[load].site;
        if moves_more && state.moved().len() >= moved_max {
            return;
        }
        state.relocate(load, to);
    }
}

/// The best move between these sites, if one decreases the unevenness by enough.
fn best_move(state: &State<'_>, sources: &[usize], targets: &[usize]) -> Option<(usize, usize)> {
    let now = state.unevenness();
    let mut best = (now - state.problem.gain_min, None);
    for &source in sources {
        for &load in &state.on[source] {
            if state.is_pinned(load) {
                continue;
            }
            let demand = &state.problem.loads[load].demand;
            for &target in targets {
                if target == source {
                    continue;
                }
                let then = state.unevenness_if_moved(demand, source, target);
                if then < best.0 && state.can_relocate(load, target) {
                    best = (then, Some((load, target)));
                }
            }
        }
    }
    best.1
}

/// Reduces and improves the moves made so far.
pub(super) fn refine(state: &mut State<'_>, moved_max: usize) {
    for _ in 0..PASSES_MAX {
        let mut changed = false;
        for loads in state.moved().chunks(REFINED_PER_BATCH) {
            let by_excess = state.by_excess();
            for &load in loads {
                changed |=
                    undo(state, load) || redirect(state, load, &by_excess) || exchange(state, load);
            }
        }
        if !changed {
            return;
        }
        descend(state, moved_max);
    }
}

/// Undoes a move that is no longer worthwhile.
fn undo(state: &mut State<'_>, load: usize) -> bool {
    let home = state.problem.loads[load].site;
    let (now, at) = (state.unevenness(), state.at[load]);
    let demand = &state.problem.loads[load].demand;
    let worth = state.unevenness_if_moved(demand, at, home) - now;
    // (Its original site may be closed to other machines.)
    let may = state.fits(demand, home)
        && state.rules_of[load]
            .iter()
            .all(|rule| state.counters[*rule].allows(at, home));
    if worth >= state.problem.gain_min || !may {
        return false;
    }
    state.relocate(load, home);
    true
}

/// Redirects a moved machine to the best site.
fn redirect(state: &mut State<'_>, load: usize, by_excess: &[usize]) -> bool {
    let (mut best, mut to) = (state.unevenness() - 1e-9, None);
    let demand = &state.problem.loads[load].demand;
    for &site in by_excess.iter().rev().take(EXCHANGES_MAX) {
        if site == state.problem.loads[load].site {
            continue;
        }
        let then = state.unevenness_if_moved(demand, state.at[load], site);
        if then < best && state.can_relocate(load, site) {
            (best, to) = (then, Some(site));
        }
    }
    let Some(to) = to else { return false };
    state.relocate(load, to);
    true
}

/// Replaces a moved machine by another one of the same source.
fn exchange(state: &mut State<'_>, load: usize) -> bool {
    let home = state.problem.loads[load].site;
    let there = state.at[load];
    let now = state.unevenness();
    let others: Vec<usize> = state.on[home]
        .iter()
        .copied()
        .filter(|it| state.problem.loads[*it].site == home && !state.is_pinned(*it))
        .take(EXCHANGES_MAX)
        .collect();
    let demand = state.problem.loads[load].demand;
    let mut best = (now - 1e-9, None);
    for other in others {
        // Net demand of the exchange.
        let mut net = state.problem.loads[other].demand;
        add(&mut net, &demand, -1.0);
        let then = state.unevenness_if_moved(&net, home, there);
        if then < best.0 {
            best = (then, Some(other));
        }
    }
    let Some(other) = best.1 else { return false };
    state.relocate(load, home);
    if state.can_relocate(other, there) && state.fits(&[0.0; RESOURCES], home) {
        state.relocate(other, there);
        return true;
    }
    state.relocate(load, there);
    false
}
