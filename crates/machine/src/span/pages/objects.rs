//! A machine's memory in pieces, each of which the same parts hold.

use keel_wasm::coherence::{Holders, PartId, PartSet, Placement};
use keel_wasm::memory::PAGE_BYTES;
use std::ops::Range;

/// A piece of a machine's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// The machine's memory.
    pub memory: u32,
    /// Its bytes, whole pages.
    pub range: Range<u64>,
    /// Who has it: the only one, or the one that wrote it last.
    pub owner: PartId,
    /// Who else has copies to read.
    pub readers: PartSet,
    /// How often its pages changed hands so far.
    pub exchanges: u64,
}

/// What never changed hands is the home's, where it is anywhere.
pub(super) fn objects_of<'a>(
    memory: u32,
    here: &[Range<u64>],
    placed: impl Iterator<Item = &'a Placement>,
) -> Vec<Object> {
    let home = |range: Range<u64>| Object {
        memory,
        range,
        owner: PartId::HOME,
        readers: PartSet::default(),
        exchanges: 0,
    };
    let mut objects = Vec::new();
    // What of `here` lies behind all placements so far.
    let mut from = 0;
    let rest = |from: u64, to: u64, objects: &mut Vec<Object>| {
        let parts = here
            .iter()
            .map(|range| range.start.max(from)..range.end.min(to));
        objects.extend(parts.filter(|range| !range.is_empty()).map(home));
    };
    for placement in placed {
        let start = u64::from(placement.first) * PAGE_BYTES;
        let end = start + u64::from(placement.pages) * PAGE_BYTES;
        rest(from, start, &mut objects);
        from = end;
        let (owner, readers) = match placement.holders {
            Holders::Owner(owner) => (owner, PartSet::default()),
            Holders::Readers { keeper, readers } => (keeper, readers.without(keeper)),
        };
        objects.push(Object {
            memory,
            range: start..end,
            owner,
            readers,
            exchanges: placement.exchanges,
        });
    }
    rest(from, u64::MAX, &mut objects);
    objects
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_piece_by_piece() {
        let part = |number| PartId::new(number).unwrap();
        let at = |page: u64| page * PAGE_BYTES;
        let placed = [
            Placement {
                memory: 0,
                first: 2,
                pages: 2,
                holders: Holders::Owner(part(1)),
                exchanges: 5,
            },
            Placement {
                memory: 0,
                first: 9,
                pages: 1,
                holders: Holders::Readers {
                    keeper: part(0),
                    readers: [part(0), part(2)].into_iter().collect(),
                },
                exchanges: 1,
            },
        ];
        // (Pages that another part has are not here.)
        let here = [at(0)..at(2), at(4)..at(6), at(9)..at(12)];
        let objects = objects_of(0, &here, placed.iter());
        let told: Vec<_> = objects
            .iter()
            .map(|it| {
                let pages = it.range.start / PAGE_BYTES..it.range.end / PAGE_BYTES;
                (pages, it.owner.number(), it.readers.len(), it.exchanges)
            })
            .collect();
        let expected = [
            (0..2, 0, 0, 0),
            (2..4, 1, 0, 5),
            (4..6, 0, 0, 0),
            (9..10, 0, 1, 1),
            (10..12, 0, 0, 0),
        ];
        assert_eq!(told, expected);
        assert_eq!(objects_of(0, &[], [].iter()), []);
    }
}
