//! Emptying sites: as many as the others have room for, or the named ones of a drain. The order of
//! the moves is left to `waves`.

use super::RESOURCES;
use super::state::State;

/// Empties sites one by one into used ones, the lightest first.
pub(super) fn pack(state: &mut State<'_>, fill: f64) {
    let mut sites: Vec<usize> = (0..state.problem.sites.len()).collect();
    let fullest = |state: &State<'_>, site: usize| {
        (0..RESOURCES)
            .map(|it| state.share(site, it))
            .fold(0.0, f64::max)
    };
    sites.sort_by(|one, other| {
        fullest(state, *one)
            .total_cmp(&fullest(state, *other))
            .then(one.cmp(other))
    });
    for site in sites {
        if state.on[site].is_empty() {
            continue;
        }
        let mut loads = state.on[site].clone();
        loads.sort_by(|one, other| by_size(state, *one, *other));
        let mut gone = Vec::new();
        for &load in &loads {
            let demand = &state.problem.loads[load].demand;
            let within = |to: usize| {
                (0..RESOURCES).all(|it| {
                    let capacity = state.problem.sites[to].capacity[it];
                    capacity <= 0.0
                        || demand[it] <= 0.0
                        || (state.used[to][it] + demand[it]) / capacity <= fill
                })
            };
            // Into the fullest site that accepts it: others may be emptied later.
            let target = (0..state.problem.sites.len())
                .filter(|to| *to != site && !state.on[*to].is_empty() && !state.is_pinned(load))
                .filter(|to| within(*to) && state.can_relocate(load, *to))
                .max_by(|one, other| fullest(state, *one).total_cmp(&fullest(state, *other)));
            let Some(target) = target else { break };
            state.relocate(load, target);
            gone.push(load);
        }
        // A site that does not become empty is no gain.
        if gone.len() < loads.len() {
            for load in gone {
                state.relocate(load, site);
            }
        }
    }
}

/// Empties sites; returns the machines that cannot move, with the reason.
pub(super) fn drain(state: &mut State<'_>, sites: &[usize]) -> Vec<(usize, String)> {
    let mut loads: Vec<usize> = sites
        .iter()
        .flat_map(|site| state.on[*site].clone())
        .collect();
    loads.sort_by(|one, other| by_size(state, *one, *other));
    let mut left = Vec::new();
    for load in loads {
        let demand = &state.problem.loads[load].demand;
        let from = state.at[load];
        if state.problem.loads[load].fixed {
            left.push((load, "it cannot be moved".to_owned()));
            continue;
        }
        let open = (0..state.problem.sites.len()).filter(|to| !sites.contains(to));
        let target = open
            .clone()
            .filter(|to| state.can_relocate(load, *to))
            .min_by(|one, other| {
                let then = |to: usize| state.unevenness_if_moved(demand, from, to);
                then(*one).total_cmp(&then(*other)).then(one.cmp(other))
            });
        match target {
            Some(target) => state.relocate(load, target),
            None if open.clone().any(|to| state.fits(demand, to)) => {
                left.push((
                    load,
                    "no other node has room for it that rules and drains let it go to".to_owned(),
                ));
            }
            None => left.push((load, "no other node has room for it".to_owned())),
        }
    }
    left
}

/// Larger first: small machines fit into the remaining gaps.
fn by_size(state: &State<'_>, one: usize, other: usize) -> std::cmp::Ordering {
    let size = |load: usize| {
        let load = &state.problem.loads[load];
        let capacity = &state.problem.sites[load.site].capacity;
        let shares = load.demand.iter().zip(capacity);
        let shares = shares.map(|(amount, of)| if *of > 0.0 { amount / of } else { 0.0 });
        shares.fold(0.0, f64::max)
    };
    size(other).total_cmp(&size(one)).then(one.cmp(&other))
}
