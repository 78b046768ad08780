//! A set of pages of one memory, and the messages that name its pages. Which pages are in a set,
//! and when it is sent, is decided by those that have one.

use keel_machine::link::Message;
use keel_wasm::memory::PAGE_BYTES;
use std::ops::Range;

/// Bytes of a page set in one message; messages without any page are not sent.
const SET_BYTES: usize = 2 << 10;

/// A set of pages of one memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::worker) struct PageSet {
    words: Vec<u64>,
    pub(super) count: u64,
}

impl PageSet {
    pub(super) fn contains(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// False if the page was in the set already.
    fn insert(&mut self, page: u64) -> bool {
        let at = (page / 64) as usize;
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        let bit = 1 << (page % 64);
        let new = self.words[at] & bit == 0;
        self.words[at] |= bit;
        self.count += u64::from(new);
        new
    }

    /// False if the page was not in the set.
    pub(super) fn remove(&mut self, page: u64) -> bool {
        let was = self.contains(page);
        if was {
            self.words[(page / 64) as usize] &= !(1 << (page % 64));
            self.count -= 1;
        }
        was
    }

    pub(in crate::worker) fn add_bytes(&mut self, range: &Range<u64>) {
        for page in range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES) {
            self.insert(page);
        }
    }

    /// The first run at or behind `from`, limited to `max` pages.
    pub(super) fn run(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let mut at = (from / 64) as usize;
        let mut word = *self.words.get(at)? & (u64::MAX << (from % 64));
        while word == 0 {
            at += 1;
            word = *self.words.get(at)?;
        }
        let first = at as u64 * 64 + u64::from(word.trailing_zeros());
        let mut end = first + 1;
        while end - first < max && self.contains(end) {
            end += 1;
        }
        Some(first..end)
    }

    /// Encodes the set as messages.
    pub(in crate::worker) fn messages(&self, memory: u32) -> Vec<Message> {
        let bytes: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes
            .chunks(SET_BYTES)
            .enumerate()
            .filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0))
            .map(|(number, bytes)| Message::Remote {
                memory,
                first_page: (number * SET_BYTES * 8) as u64,
                bits: bytes.to_vec().into(),
            })
            .collect()
    }

    /// Adds the pages of a message.
    pub(super) fn add_message(&mut self, first_page: u64, bits: &[u8]) {
        let first = (first_page / 64) as usize;
        let (words, rest) = bits.as_chunks::<8>();
        if !first_page.is_multiple_of(64) || !rest.is_empty() {
            // No peer sends unaligned bits; they are handled page by page.
            for (at, byte) in bits.iter().enumerate() {
                for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                    self.insert(first_page + at as u64 * 8 + bit);
                }
            }
            return;
        }
        if self.words.len() < first + words.len() {
            self.words.resize(first + words.len(), 0);
        }
        for (word, bits) in self.words[first..].iter_mut().zip(words) {
            let new = u64::from_le_bytes(*bits) & !*word;
            *word |= new;
            self.count += u64::from(new.count_ones());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_pages() {
        let mut set = PageSet::default();
        set.add_bytes(&(3 * PAGE_BYTES..5 * PAGE_BYTES));
        set.add_bytes(&(64 * PAGE_BYTES..200 * PAGE_BYTES + 1));
        assert_eq!(set.count, 2 + 137);
        assert_eq!(set.run(0, 16), Some(3..5));
        assert_eq!(set.run(4, 16), Some(4..5));
        assert_eq!(set.run(5, 16), Some(64..80));
        assert_eq!(set.run(5, u64::MAX), Some(64..201));
        assert_eq!(set.run(201, 16), None);
        let mut other = PageSet::default();
        for message in set.messages(0) {
            let Message::Remote {
                first_page, bits, ..
            } = message
            else {
                panic!("{message:?}");
            };
            other.add_message(first_page, &bits);
        }
        assert_eq!(other, set);
        // In pieces of any size, and repeatedly.
        let mut odd = PageSet::default();
        for (first, bits) in [
            (3, [3u8].as_slice()),
            (3, &[1]),
            (64, &[0xff; 17]),
            (200, &[1]),
        ] {
            odd.add_message(first, bits);
        }
        odd.add_message(192, &[0xff, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(odd, set);
        assert!(set.remove(3) && !set.remove(3));
        assert_eq!(set.run(0, 16), Some(4..5));
    }
}
