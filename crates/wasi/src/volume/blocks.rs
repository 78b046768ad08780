//! Sets of block numbers: blocks with data, and written blocks.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a block: the unit of quota and transfer.
pub const BLOCK_BYTES: u64 = 64 << 10;
/// Bytes of a unit: the granularity of write tracking and of the last block of a file. (Programs
/// write scattered pages: tracking whole blocks would send sixteen times as much.)
pub(crate) const UNIT_BYTES: u64 = 4 << 10;

/// Set of block or unit numbers, as sparse bitmaps of 64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BlockSet {
    words: BTreeMap<u64, u64>,
    count: u64,
}

/// The blocks that bytes lie in.
pub(crate) fn blocks_of(bytes: Range<u64>) -> Range<u64> {
    pieces_of(bytes, BLOCK_BYTES)
}

/// The units that bytes lie in.
pub(crate) fn units_of(bytes: Range<u64>) -> Range<u64> {
    pieces_of(bytes, UNIT_BYTES)
}

fn pieces_of(bytes: Range<u64>, size: u64) -> Range<u64> {
    if bytes.is_empty() {
        return 0..0;
    }
    bytes.start / size..bytes.end.div_ceil(size)
}

/// The bits of `range` within the word of number `word`.
fn mask(word: u64, range: &Range<u64>) -> u64 {
    let first = range.start.max(word * 64) - word * 64;
    let end = range.end.min(word * 64 + 64) - word * 64;
    let below_end = if end == 64 { u64::MAX } else { (1 << end) - 1 };
    below_end & !((1 << first) - 1)
}

impl BlockSet {
    pub(crate) fn len(&self) -> u64 {
        self.count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn contains(&self, block: u64) -> bool {
        let word = self.words.get(&(block / 64));
        word.is_some_and(|word| word & (1 << (block % 64)) != 0)
    }

    /// How many of `range` are missing.
    pub(crate) fn missing(&self, range: Range<u64>) -> u64 {
        let length = range.end.saturating_sub(range.start);
        if length == 0 {
            return 0;
        }
        let words = self.words.range(range.start / 64..=(range.end - 1) / 64);
        let here = words.map(|(word, bits)| u64::from((bits & mask(*word, &range)).count_ones()));
        length - here.sum::<u64>()
    }

    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for word in range.start / 64..=(range.end - 1) / 64 {
            let bits = self.words.entry(word).or_insert(0);
            let new = mask(word, &range) & !*bits;
            *bits |= new;
            self.count += u64::from(new.count_ones());
        }
    }

    /// Removes all from `first` on.
    pub(crate) fn remove_from(&mut self, first: u64) {
        let mut gone = self.words.split_off(&(first / 64));
        if let Some(bits) = gone.get_mut(&(first / 64)) {
            let kept = *bits & ((1 << (first % 64)) - 1);
            *bits &= !kept;
            if kept != 0 {
                self.words.insert(first / 64, kept);
            }
        }
        let gone = gone.values().map(|bits| u64::from(bits.count_ones()));
        self.count -= gone.sum::<u64>();
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (first, last) = (range.start / 64, (range.end - 1) / 64);
        let words = self.words.range_mut(first..=last);
        let mut emptied = Vec::new();
        for (word, bits) in words {
            let gone = mask(*word, &range) & *bits;
            *bits &= !gone;
            self.count -= u64::from(gone.count_ones());
            if *bits == 0 {
                emptied.push(*word);
            }
        }
        for word in emptied {
            self.words.remove(&word);
        }
    }

    /// The first run of those within `range`.
    pub(crate) fn first_run(&self, range: Range<u64>) -> Option<Range<u64>> {
        if self.is_empty() {
            return None;
        }
        let start = range.clone().find(|block| self.contains(*block))?;
        let end = (start..range.end).find(|block| !self.contains(*block));
        Some(start..end.unwrap_or(range.end))
    }

    /// All, as runs in order.
    pub(crate) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (word, bits) in &self.words {
            let mut bits = *bits;
            let mut at = word * 64;
            while bits != 0 {
                let skip = bits.trailing_zeros();
                bits >>= skip;
                at += u64::from(skip);
                let length = bits.trailing_ones();
                bits = bits.checked_shr(length).unwrap_or(0);
                let run = at..at + u64::from(length);
                at = run.end;
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
    use std::collections::BTreeSet;

    /// Compared with a plain set of numbers.
    #[test]
    fn sets_are_sets() {
        for seed in 0..300 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut set = BlockSet::default();
            let mut plain = BTreeSet::new();
            for _ in 0..40 {
                let start = random.random_range(0..300_u64);
                let range = start..start + random.random_range(0..150);
                if random.random_ratio(1, 4) {
                    set.remove_from(start);
                    plain.retain(|block| *block < start);
                } else if random.random_ratio(1, 4) {
                    set.remove(range.clone());
                    plain.retain(|block| !range.contains(block));
                    assert_eq!(set.first_run(range.clone()), None);
                } else {
                    set.insert(range.clone());
                    plain.extend(range.clone());
                }
                let missing = range.clone().filter(|block| !plain.contains(block));
                assert_eq!(set.missing(range.clone()), missing.count() as u64);
                assert_eq!(set.len(), plain.len() as u64);
                assert_eq!(set.contains(start), plain.contains(&start));
                let first = plain.range(range.clone()).next().copied();
                let run = set.first_run(range.clone());
                assert_eq!(run.as_ref().map(|run| run.start), first);
                if let Some(run) = run {
                    assert!(run.clone().all(|block| plain.contains(&block)));
                    assert!(run.end == range.end || !plain.contains(&run.end));
                }
                let runs = set.runs();
                assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
                assert!(runs.iter().cloned().flatten().eq(plain.iter().copied()));
            }
        }
    }

    #[test]
    fn bytes_lie_in_blocks() {
        assert_eq!(blocks_of(5..5), 0..0);
        assert_eq!(blocks_of(0..1), 0..1);
        assert_eq!(blocks_of(65535..65537), 0..2);
        assert_eq!(blocks_of(65536..131_072), 1..2);
        assert_eq!(units_of(4095..4097), 0..2);
    }
}
