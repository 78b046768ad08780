//! A map by pages, in their order. Pages mostly come many in a row, so those of 64 in a row
//! are together: what is looked up in a tree is a sixty-fourth of them.

use super::PageId;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::RangeInclusive;

/// Pages that are together.
const ROW: u32 = u64::BITS;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Row<T> {
    /// Which of them are there.
    present: u64,
    /// What they have, in their order.
    values: Vec<T>,
}

impl<T> Row<T> {
    fn has(&self, at: u32) -> bool {
        self.present & 1 << at != 0
    }

    /// Where a page's value is, or would be.
    fn index(&self, at: u32) -> usize {
        (self.present & ((1 << at) - 1)).count_ones() as usize
    }

    fn pages(&self, (memory, row): (u32, u32)) -> impl Iterator<Item = PageId> + use<T> {
        let present = self.present;
        let there = (0..ROW).filter(move |at| present & 1 << at != 0);
        there.map(move |at| PageId {
            memory,
            number: row * ROW + at,
        })
    }
}

/// The map.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PageMap<T> {
    /// By memory, and number of the row; none of them is empty.
    rows: BTreeMap<(u32, u32), Row<T>>,
}

impl<T> Default for PageMap<T> {
    fn default() -> Self {
        PageMap {
            rows: BTreeMap::new(),
        }
    }
}

fn place(page: PageId) -> ((u32, u32), u32) {
    ((page.memory, page.number / ROW), page.number % ROW)
}

impl<T> PageMap<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn get(&self, page: PageId) -> Option<&T> {
        let (key, at) = place(page);
        let row = self.rows.get(&key).filter(|row| row.has(at))?;
        row.values.get(row.index(at))
    }

    pub(super) fn get_mut(&mut self, page: PageId) -> Option<&mut T> {
        let (key, at) = place(page);
        let row = self.rows.get_mut(&key).filter(|row| row.has(at))?;
        let index = row.index(at);
        row.values.get_mut(index)
    }

    /// What it has, made if there is nothing.
    pub(super) fn or_insert_with(&mut self, page: PageId, make: impl FnOnce() -> T) -> &mut T {
        let (key, at) = place(page);
        let row = self.rows.entry(key).or_insert_with(|| Row {
            present: 0,
            values: Vec::new(),
        });
        let index = row.index(at);
        if !row.has(at) {
            row.present |= 1 << at;
            row.values.insert(index, make());
        }
        &mut row.values[index]
    }

    /// What it had.
    pub(super) fn insert(&mut self, page: PageId, value: T) -> Option<T> {
        if let Some(old) = self.get_mut(page) {
            return Some(std::mem::replace(old, value));
        }
        self.or_insert_with(page, || value);
        None
    }

    /// Of pages in rising order, each once: much sooner than one by one.
    pub(super) fn of_rising(pages: impl Iterator<Item = (PageId, T)>) -> Self {
        let (mut rows, mut last) = (Vec::new(), None);
        for (page, value) in pages {
            let (key, at) = place(page);
            let row: &mut Row<T> = match &mut last {
                Some((of, row)) if *of == key => row,
                _ => {
                    let new = Row {
                        present: 0,
                        values: Vec::new(),
                    };
                    rows.extend(last.replace((key, new)));
                    match &mut last {
                        Some((_, row)) => row,
                        None => continue,
                    }
                }
            };
            row.present |= 1 << at;
            row.values.push(value);
        }
        rows.extend(last);
        PageMap {
            rows: rows.into_iter().collect(),
        }
    }

    /// What it had.
    pub(super) fn remove(&mut self, page: PageId) -> Option<T> {
        let (key, at) = place(page);
        let Entry::Occupied(mut row) = self.rows.entry(key) else {
            return None;
        };
        if !row.get().has(at) {
            return None;
        }
        let index = row.get().index(at);
        row.get_mut().present &= !(1 << at);
        let value = row.get_mut().values.remove(index);
        if row.get().present == 0 {
            row.remove();
        }
        Some(value)
    }

    /// Takes those of a range out, in their order.
    pub(super) fn take(&mut self, range: RangeInclusive<PageId>) -> Vec<(PageId, T)> {
        let (first, last) = (place(*range.start()).0, place(*range.end()).0);
        let keys = self.rows.range(first..=last.max(first));
        let keys: Vec<(u32, u32)> = keys.map(|(key, _)| *key).collect();
        let mut taken = Vec::new();
        for key in keys {
            let Entry::Occupied(mut entry) = self.rows.entry(key) else {
                continue;
            };
            let row = entry.get_mut();
            let pages: Vec<PageId> = row.pages(key).collect();
            let values = std::mem::take(&mut row.values);
            for (page, value) in pages.into_iter().zip(values) {
                if range.contains(&page) {
                    row.present &= !(1 << (page.number % ROW));
                    taken.push((page, value));
                } else {
                    row.values.push(value);
                }
            }
            if row.present == 0 {
                entry.remove();
            }
        }
        taken
    }

    /// All, in their order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (PageId, &T)> {
        let rows = self.rows.iter();
        rows.flat_map(|(key, row)| row.pages(*key).zip(&row.values))
    }

    /// Those of a range, in their order.
    pub(super) fn range(
        &self,
        range: RangeInclusive<PageId>,
    ) -> impl Iterator<Item = (PageId, &T)> {
        let (first, last) = (place(*range.start()).0, place(*range.end()).0);
        // (A range that ends before it begins has nothing in it.)
        let rows = self.rows.range(first..=last.max(first));
        rows.flat_map(|(key, row)| row.pages(*key).zip(&row.values))
            .filter(move |(page, _)| range.contains(page))
    }

    /// Keeps those for which it says so, asked in their order.
    pub(super) fn retain(&mut self, mut keeps: impl FnMut(PageId, &mut T) -> bool) {
        self.rows.retain(|key, row| {
            let mut pages = row.pages(*key);
            let mut left = row.present;
            row.values.retain_mut(|value| {
                let Some(page) = pages.next() else {
                    return true;
                };
                let stays = keeps(page, value);
                if !stays {
                    left &= !(1 << (page.number % ROW));
                }
                stays
            });
            row.present = left;
            row.present != 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    /// Does what a map of the standard library does, and looks the same however it came
    /// to be.
    #[test]
    fn it_is_a_map() {
        for seed in 0..20 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut ours, mut theirs) = (PageMap::default(), BTreeMap::new());
            for step in 0..2000u32 {
                let page = PageId {
                    memory: rng.random_range(0..2),
                    number: match rng.random_range(0..9) {
                        0 => u32::MAX - rng.random_range(0..70),
                        _ => rng.random_range(0..200),
                    },
                };
                match rng.random_range(0..6) {
                    0 | 1 => assert_eq!(ours.insert(page, step), theirs.insert(page, step)),
                    2 => {
                        *ours.or_insert_with(page, || step) += 1;
                        *theirs.entry(page).or_insert(step) += 1;
                    }
                    3 => assert_eq!(ours.remove(page), theirs.remove(&page)),
                    4 => assert_eq!(ours.get_mut(page), theirs.get_mut(&page)),
                    _ => assert_eq!(ours.get(page), theirs.get(&page)),
                }
                if step % 500 == 499 {
                    let odd = |value: &u32| value % 3 != 1;
                    let (mut asked, mut expected) = (Vec::new(), Vec::new());
                    ours.retain(|page, value| {
                        asked.push(page);
                        odd(value)
                    });
                    theirs.retain(|page, value| {
                        expected.push(*page);
                        odd(value)
                    });
                    assert_eq!(asked, expected);
                }
            }
            let all: Vec<_> = theirs.iter().map(|(page, value)| (*page, value)).collect();
            assert_eq!(ours.iter().collect::<Vec<_>>(), all);
            assert_eq!(PageMap::of_rising(theirs.clone().into_iter()), ours);
            let page = |number| PageId { memory: 1, number };
            for (first, last) in [(0, 63), (63, 64), (70, 70), (5, u32::MAX), (9, 3)] {
                let range = page(first)..=page(last);
                let expected: Vec<_> = all
                    .iter()
                    .copied()
                    .filter(|(page, _)| range.contains(page))
                    .collect();
                assert_eq!(ours.range(range).collect::<Vec<_>>(), expected);
            }
            let (first, last) = (page(30), page(100));
            let mut rest = ours.clone();
            let taken = rest.take(first..=last);
            assert!(!taken.is_empty());
            let (inside, outside): (Vec<_>, Vec<_>) = theirs
                .clone()
                .into_iter()
                .partition(|(page, _)| (first..=last).contains(page));
            assert_eq!(taken, inside);
            assert_eq!(rest, PageMap::of_rising(outside.into_iter()));
            let mut again = PageMap::default();
            for (page, value) in all.iter().rev() {
                again.insert(*page, **value);
            }
            assert_eq!(again, ours);
            theirs.keys().for_each(|page| {
                assert!(again.remove(*page).is_some());
            });
            assert_eq!(again, PageMap::default());
        }
    }
}
