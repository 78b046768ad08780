//! `random_get`: one ChaCha20 stream per guest thread from the machine's seed.
//! Only the positions are state, so a capture does not change the sequence.

use crate::lock::locked;
use rand::rngs::ChaCha20Rng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// The random streams of a machine.
#[derive(Debug)]
pub(crate) struct Random {
    seed: [u8; 32],
    // Thread to the number of 32-bit words that it has drawn.
    drawn: Mutex<BTreeMap<u32, u64>>,
}

impl Random {
    pub(crate) fn new(seed: [u8; 32], drawn: BTreeMap<u32, u64>) -> Self {
        Self {
            seed,
            drawn: Mutex::new(drawn),
        }
    }

    pub(crate) fn seed(&self) -> [u8; 32] {
        self.seed
    }

    pub(crate) fn drawn(&self) -> BTreeMap<u32, u64> {
        locked(&self.drawn).clone()
    }

    /// Fills `buffer` with the next random bytes of thread `tid`.
    pub(crate) fn fill(&self, tid: u32, buffer: &mut [u8]) {
        let words = buffer.len().div_ceil(4) as u64;
        let position = {
            let mut drawn = locked(&self.drawn);
            let position = drawn.entry(tid).or_insert(0);
            let start = *position;
            *position = start.wrapping_add(words);
            start
        };
        let mut stream = ChaCha20Rng::from_seed(self.seed);
        stream.set_stream(u64::from(tid));
        stream.set_word_pos(u128::from(position));
        stream.fill_bytes(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(random: &Random, tid: u32, count: usize) -> Vec<u8> {
        let mut buffer = vec![0; count];
        random.fill(tid, &mut buffer);
        buffer
    }

    #[test]
    fn goes_on_where_it_was() {
        let whole = Random::new([7; 32], BTreeMap::new());
        let first = draw(&whole, 1, 10);
        let second = draw(&whole, 1, 300);

        let before = Random::new([7; 32], BTreeMap::new());
        assert_eq!(draw(&before, 1, 10), first);
        assert_ne!(draw(&before, 2, 10), first);
        let after = Random::new(before.seed(), before.drawn());
        assert_eq!(draw(&after, 1, 300), second);

        let edge = Random::new([7; 32], BTreeMap::from([(1, u64::MAX)]));
        draw(&edge, 1, 64);
    }
}
