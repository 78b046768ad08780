//! The order of the moves that lead to a placement: waves of concurrent ones. The placement itself is
//! left to the other phases.

use super::state::State;
use super::{Problem, Step};

/// Waves of moves that lead to the placement `to`; also the machines that cannot get there.
pub(super) fn order(problem: &Problem, to: &[usize]) -> (Vec<Step>, Vec<(usize, String)>) {
    let mut state = State::new(problem);
    let mut pending: Vec<usize> = (0..to.len())
        .filter(|it| to[*it] != state.at[*it])
        .collect();
    let mut hopped: Vec<bool> = vec![false; to.len()];
    let mut steps = Vec::new();
    for wave in 0.. {
        if pending.is_empty() {
            break;
        }
        let mut leaving = vec![0; problem.sites.len()];
        let mut coming = vec![0; problem.sites.len()];
        let mut going: Vec<(usize, usize, bool)> = Vec::new();
        for &load in &pending {
            let (from, target) = (state.at[load], to[load]);
            let free = leaving[from] < problem.at_once.0 && coming[target] < problem.at_once.1;
            if free && state.can_relocate(load, target) {
                leaving[from] += 1;
                coming[target] += 1;
                going.push((load, target, false));
            }
        }
        if going.is_empty() {
            // Deadlock: one machine makes an intermediate stop.
            let detour = pending.iter().filter(|it| !hopped[**it]).find_map(|&load| {
                let open = (0..problem.sites.len()).filter(|it| *it != to[load]);
                let mut open = open.filter(|it| state.can_relocate(load, *it));
                open.next().map(|site| (load, site, true))
            });
            let Some(detour) = detour else {
                let why =
                    "it waits for others that wait for it, and no node has room to step aside";
                return (
                    steps,
                    pending.into_iter().map(|it| (it, why.to_owned())).collect(),
                );
            };
            hopped[detour.0] = true;
            going.push(detour);
        }
        // Moves of a wave are concurrent: a departing machine frees its resources only at the end.
        for (load, target, hop) in going {
            if !state.can_relocate(load, target) {
                continue;
            }
            steps.push(Step {
                load,
                from: state.at[load],
                to: target,
                wave,
                hop,
            });
            state.relocate(load, target);
        }
        pending.retain(|load| state.at[*load] != to[*load]);
    }
    (steps, Vec::new())
}
