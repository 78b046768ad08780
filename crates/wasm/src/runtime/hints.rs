//! Placement hints of a guest (`guests/evenkeel.h`): names of memory ranges, and the affinity of
//! threads to them. They only influence placement.

use keel_wasi::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Maximum bytes of a name.
pub(super) const NAME_BYTES_MAX: usize = 64;
/// Maximum number of names of a machine.
const NAMES_MAX: usize = 4096;

/// A range of a machine's first memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedRange {
    /// Its first byte.
    pub start: u64,
    pub bytes: u64,
}

/// Whether a text is a valid object name: letters, digits, `.`, `_` and `-`, starting with a letter
/// or `_`, so that it is no range; at most 64 bytes.
pub fn is_object_name(name: &str) -> bool {
    let first = name.bytes().next();
    let is_first = first.is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    let can_be = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    is_first && name.len() <= NAME_BYTES_MAX && name.bytes().all(can_be)
}

/// All names of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hints {
    objects: BTreeMap<String, NamedRange>,
    /// The object to which a thread has an affinity.
    preferences: BTreeMap<u32, String>,
}

impl Hints {
    /// Names a range of a memory of `size` bytes, replacing its previous name; an empty range
    /// removes the name.
    ///
    /// # Errors
    /// `inval` for an invalid name, `fault` for a range outside of memory, `nomem` for too many
    /// names.
    pub(super) fn name(&mut self, name: &str, piece: NamedRange, size: u64) -> Result<(), Errno> {
        if !is_object_name(name) {
            return Err(Errno::Inval);
        }
        if piece.bytes == 0 {
            self.objects.remove(name);
            return Ok(());
        }
        let end = piece.start.checked_add(piece.bytes);
        if end.is_none_or(|end| end > size) {
            return Err(Errno::Fault);
        }
        if self.objects.len() >= NAMES_MAX && !self.objects.contains_key(name) {
            return Err(Errno::Nomem);
        }
        self.objects.insert(name.to_owned(), piece);
        Ok(())
    }

    /// Sets a thread's affinity to an object; an empty name removes it.
    ///
    /// # Errors
    /// `noent` for an unknown name.
    pub(super) fn set_preference(&mut self, tid: u32, name: &str) -> Result<(), Errno> {
        if name.is_empty() {
            self.preferences.remove(&tid);
            return Ok(());
        }
        if !self.objects.contains_key(name) {
            return Err(Errno::Noent);
        }
        self.preferences.insert(tid, name.to_owned());
        Ok(())
    }

    pub(super) fn forget(&mut self, tid: u32) {
        self.preferences.remove(&tid);
    }

    pub(super) fn objects(&self) -> &BTreeMap<String, NamedRange> {
        &self.objects
    }

    pub(super) fn preferences(&self) -> &BTreeMap<u32, String> {
        &self.preferences
    }

    /// Validates hints from an untrusted image.
    pub(super) fn is_valid(&self, size: u64) -> bool {
        let is_right = |(name, piece): (&String, &NamedRange)| {
            let end = piece.start.checked_add(piece.bytes);
            is_object_name(name) && piece.bytes > 0 && end.is_some_and(|end| end <= size)
        };
        self.objects.len() <= NAMES_MAX && self.objects.iter().all(is_right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 16;

    fn piece(start: u64, bytes: u64) -> NamedRange {
        NamedRange { start, bytes }
    }

    #[test]
    fn names_are_given_changed_and_taken_away() {
        let mut names = Hints::default();
        names.name("cache", piece(100, 50), SIZE).unwrap();
        names.name("rows.1", piece(0, SIZE), SIZE).unwrap();
        names.name("cache", piece(200, 50), SIZE).unwrap();
        assert_eq!(names.objects().len(), 2);
        assert_eq!(names.objects()["cache"], piece(200, 50));
        assert_eq!(names.set_preference(3, "table"), Err(Errno::Noent));
        names.set_preference(3, "cache").unwrap();
        names.set_preference(4, "rows.1").unwrap();
        names.set_preference(4, "").unwrap();
        assert_eq!(names.preferences().len(), 1);
        names.forget(3);
        names.name("cache", piece(0, 0), SIZE).unwrap();
        assert_eq!(names.objects().len(), 1);
        assert!(names.is_valid(SIZE) && !names.is_valid(SIZE - 1));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut names = Hints::default();
        let long = "x".repeat(65);
        for name in ["", "0x10-0x20", "-x", "a/b", "a b", "ä", "a\0", &long] {
            assert_eq!(
                names.name(name, piece(0, 1), SIZE),
                Err(Errno::Inval),
                "{name:?}"
            );
        }
        for bad in [piece(SIZE, 1), piece(1, SIZE), piece(u64::MAX, 2)] {
            assert_eq!(names.name("a", bad, SIZE), Err(Errno::Fault));
        }
        for at in 0..NAMES_MAX {
            names.name(&format!("n{at}"), piece(0, 1), SIZE).unwrap();
        }
        assert_eq!(names.name("more", piece(0, 1), SIZE), Err(Errno::Nomem));
        names.name("n7", piece(1, 1), SIZE).unwrap();
    }
}
