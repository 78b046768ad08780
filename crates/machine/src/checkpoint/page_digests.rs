//! Hashes of page contents at the last checkpoint: of memory whose writes are not tracked, only
//! changed pages are stored again. 16 bytes per page of 4 KiB.

/// The hash of a page: half of a BLAKE3. Collisions do not occur by chance, and a program
/// that constructed one would only harm itself.
pub fn page_hash(page: &[u8]) -> u128 {
    let hash = blake3::hash(page);
    let (half, _) = hash.as_bytes().split_at(16);
    let half = half.try_into().map_or(0, u128::from_le_bytes);
    // Zero stands for an unknown page.
    half.max(1)
}

/// Hashes of pages, by memory and number.
#[derive(Debug, Default)]
pub struct PageDigests {
    memories: Vec<Vec<u128>>,
}

impl PageDigests {
    /// The hash of a page, if it is known.
    pub fn get(&self, memory: u32, number: u32) -> Option<u128> {
        let pages = self.memories.get(memory as usize)?;
        let hash = pages.get(number as usize)?;
        (*hash != 0).then_some(*hash)
    }

    /// Sets the hash of a page; returns the previous one.
    pub fn put(&mut self, memory: u32, number: u32, hash: u128) -> Option<u128> {
        let before = self.get(memory, number);
        let (memory, number) = (memory as usize, number as usize);
        if self.memories.len() <= memory {
            self.memories.resize_with(memory + 1, Vec::new);
        }
        let pages = &mut self.memories[memory];
        if pages.len() <= number {
            // The range between may stay unused; it costs only address space.
            let length = (number + 1).next_power_of_two();
            let mut longer = vec![0; length];
            longer[..pages.len()].copy_from_slice(pages);
            *pages = longer;
        }
        pages[number] = hash;
        before
    }

    /// Forgets a page, which is zero from now on.
    pub fn forget(&mut self, memory: u32, number: u32) {
        let pages = self.memories.get_mut(memory as usize);
        if let Some(hash) = pages.and_then(|pages| pages.get_mut(number as usize)) {
            *hash = 0;
        }
    }

    /// Known pages that satisfy a predicate, by memory and number.
    pub fn which(&self, is_so: impl Fn(u32, u32) -> bool) -> Vec<(u32, u32)> {
        let memories = (0..).zip(&self.memories);
        let pages = memories.flat_map(|(memory, pages)| {
            let known = (0..).zip(pages).filter(|(_, hash)| **hash != 0);
            known.map(move |(number, _)| (memory, number))
        });
        pages
            .filter(|(memory, number)| is_so(*memory, *number))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_known_until_they_are_forgotten() {
        let mut known = PageDigests::default();
        let hash = page_hash(&[7; 4096]);
        assert_eq!(known.put(1, 9, hash), None);
        assert_eq!(known.put(1, 9, hash), Some(hash));
        assert_eq!((known.get(1, 9), known.get(0, 9)), (Some(hash), None));
        assert_eq!(known.put(1, 3, page_hash(&[8; 4096])), None);
        assert_eq!(known.which(|_, number| number > 3), [(1, 9)]);
        known.forget(1, 9);
        assert_eq!((known.get(1, 9), known.get(1, 10)), (None, None));
    }
}
