//! Moves of memory away from a part or a node that has too much.

use super::{Action, Alternative, Choice, Observation, Part, mib};
use crate::policy::Policy;
use std::collections::BTreeMap;

/// Maximum bytes of objects per decision.
const OBJECT_BYTES_MAX: u64 = 256 << 20;
/// Minimum bytes that are worth a decision.
const OBJECT_BYTES_MIN: u64 = 1 << 20;
/// Maximum number of objects per decision.
const OBJECTS_AT_ONCE: usize = 32;
/// Share of its limit to which a part is filled, which leaves room for its next accesses.
const FILL_SHARE: f64 = 0.9;
/// Share of its limit at which a part gives memory away, before it has to evict arbitrary pages
/// itself.
const FULL_SHARE: f64 = 0.95;
/// Bytes of a page.
const PAGE: u64 = 4096;

/// Whether a part has almost reached its limit.
fn is_full(has_bytes: u64, most_bytes: u64) -> bool {
    has_bytes as f64 > most_bytes as f64 * FULL_SHARE
}

/// Bytes that a part gives away, with the reason.
fn surplus(observation: &Observation, part: &Part, policy: &Policy) -> Option<(u64, String)> {
    let has = part.memory_bytes?;
    let most = observation.part_memory_bytes;
    if let Some(most) = most.filter(|most| has > *most || part.overflows && is_full(has, *most)) {
        let rest = (most as f64 * FILL_SHARE) as u64;
        let why = format!(
            "the part on {} has {:.1} MiB, with a limit of {:.1} MiB",
            part.node,
            mib(has),
            mib(most)
        );
        return Some((has - rest, why));
    }
    let side = &observation.node(&part.node)?.state;
    let kept = (side.capacity.memory_bytes as f64 * policy.memory_headroom) as u64;
    if side.memory_free_bytes >= kept {
        return None;
    }
    let why = format!(
        "{} has {:.1} MiB of free memory, below the headroom of {:.1} MiB",
        part.node,
        mib(side.memory_free_bytes),
        mib(kept)
    );
    Some((has.min(kept - side.memory_free_bytes), why))
}

/// Bytes that a part accepts without becoming pressed itself.
fn room(observation: &Observation, part: &Part, policy: &Policy) -> u64 {
    let Some(node) = observation.node(&part.node) else {
        return 0;
    };
    if node.forbidden.is_some() {
        return 0;
    }
    let kept = (node.state.capacity.memory_bytes as f64 * policy.memory_headroom) as u64;
    // Twice the headroom: the node's view is some time old.
    let of_node = node.state.memory_free_bytes.saturating_sub(2 * kept);
    let of_part = match (part.memory_bytes, observation.part_memory_bytes) {
        (Some(has), Some(most)) => ((most as f64 * FILL_SHARE) as u64).saturating_sub(has),
        (None, Some(_)) => 0,
        _ => u64::MAX,
    };
    of_node.min(of_part)
}

pub(super) fn relieve_memory(observation: &Observation, policy: &Policy) -> Vec<Choice> {
    let mut rooms: BTreeMap<u32, u64> = observation
        .parts
        .iter()
        .map(|part| (part.number, room(observation, part, policy)))
        .collect();
    let mut choices = Vec::new();
    for from in &observation.parts {
        let Some((mut bytes, why)) = surplus(observation, from, policy) else {
            continue;
        };
        bytes = bytes.min(OBJECT_BYTES_MAX);
        while bytes >= OBJECT_BYTES_MIN {
            let others = observation
                .parts
                .iter()
                .filter(|it| it.number != from.number && it.node != from.node);
            let most = others.max_by_key(|it| {
                let room = rooms.get(&it.number).copied().unwrap_or(0);
                (room, std::cmp::Reverse(it.number))
            });
            let Some(to) = most else { break };
            let room = rooms.entry(to.number).or_default();
            let given = bytes.min(*room) / PAGE * PAGE;
            if given < OBJECT_BYTES_MIN {
                break;
            }
            *room -= given;
            bytes -= given;
            let action = Action::Objects {
                from_part: from.number,
                from: from.node.clone(),
                part: to.number,
                to: to.node.clone(),
                bytes: given,
            };
            let alternatives = vec![Alternative {
                option: "the whole machine".into(),
                finding: "its coldest objects have fewer bytes".into(),
            }];
            choices.push(observation.choice(action, why.clone(), alternatives));
        }
    }
    choices
}

/// An object: a range of memory at one part.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    pub memory: u32,
    /// Its first byte.
    pub start: u64,
    pub bytes: u64,
    /// Whether its part has not accessed it lately.
    pub is_idle: bool,
    /// Recent page faults per page, on average.
    pub heat: f64,
}

/// The coldest objects of `bytes` in total, of pages of 4 KiB: idle ones first, largest first, as
/// far as one decision's objects hold; then those with the fewest faults, of equal ones the
/// largest.
pub fn coldest(objects: &[Object], bytes: u64) -> Vec<Object> {
    let (mut taken, mut rest) = (Vec::new(), bytes / PAGE * PAGE);
    let mut take = |object: &Object, rest: &mut u64| {
        let bytes = object.bytes.min(*rest);
        *rest -= bytes;
        taken.push(Object {
            bytes,
            ..object.clone()
        });
    };
    let mut places = OBJECTS_AT_ONCE as u64;
    let (mut idle, mut others): (Vec<&Object>, Vec<&Object>) =
        objects.iter().partition(|object| object.is_idle);
    idle.sort_by_key(|object| std::cmp::Reverse(object.bytes));
    for object in idle {
        // (Small objects would use up the number of objects.)
        let would_fill = object.bytes > 0 && rest.div_ceil(object.bytes) <= places;
        match rest > 0 && would_fill {
            true => {
                take(object, &mut rest);
                places -= 1;
            }
            false => others.push(object),
        }
    }
    others.sort_by(|one, other| {
        let by_heat = one.heat.total_cmp(&other.heat);
        by_heat.then_with(|| other.bytes.cmp(&one.bytes))
    });
    for object in others {
        if rest == 0 || places == 0 {
            break;
        }
        take(object, &mut rest);
        places -= 1;
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_coldest_go_first_and_no_more_than_is_wanted() {
        let object = |start: u64, bytes: u64, heat: f64| Object {
            memory: 0,
            start,
            bytes,
            is_idle: false,
            heat,
        };
        let all = [
            object(0, 4 * PAGE, 3.0),
            object(1 << 20, 2 * PAGE, 0.0),
            object(2 << 20, 8 * PAGE, 0.0),
        ];
        let taken = coldest(&all, 9 * PAGE + 7);
        let taken: Vec<_> = taken.iter().map(|it| (it.start >> 20, it.bytes)).collect();
        assert_eq!(taken, [(2, 8 * PAGE), (1, PAGE)]);
        assert_eq!(coldest(&all, PAGE - 1), []);
        assert_eq!(coldest(&all, u64::MAX).len(), 3);
        // Idle objects go before those without faults, which are used locally all the time.
        let mut idle = object(3 << 20, PAGE, 0.5);
        idle.is_idle = true;
        let with = [all.to_vec(), vec![idle]].concat();
        let taken = coldest(&with, 3 * PAGE);
        let taken: Vec<_> = taken.iter().map(|it| (it.start >> 20, it.bytes)).collect();
        assert_eq!(taken, [(3, PAGE), (2, 2 * PAGE)]);
        // Small idle objects do not displace an object that suffices.
        let mut many: Vec<Object> = (10..200).map(|at| object(at << 20, PAGE, 0.0)).collect();
        many.iter_mut().for_each(|it| it.is_idle = true);
        many.push(object(500 << 20, 4096 * PAGE, 0.1));
        many.push(object(600 << 20, 2048 * PAGE, 0.0));
        let taken = coldest(&many, 3000 * PAGE);
        let bytes: Vec<u64> = taken.iter().map(|it| it.bytes / PAGE).collect();
        // (Objects without heat go first, up to the maximum number.)
        assert_eq!(bytes[0], 2048);
        assert_eq!(taken.len(), OBJECTS_AT_ONCE);
        // The rest is filled with them, where they suffice.
        many[0].bytes = 2990 * PAGE;
        let taken = coldest(&many, 3000 * PAGE);
        let bytes: Vec<u64> = taken.iter().map(|it| it.bytes / PAGE).collect();
        assert_eq!(bytes[0], 2990);
        assert!(bytes[1..] == [1; 10], "{bytes:?}");
    }
}
