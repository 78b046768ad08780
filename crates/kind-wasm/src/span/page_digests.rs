//! Unchanged pages at a cut: of memory that many parts hold and whose writes are not tracked, only
//! the digest of runs of pages is sent that have the same hashes as at the last cut
//! ([`PageDigests`]).

use super::messages::{CutPages, CutPiece, UnchangedPages};
use keel_machine::checkpoint::{PageDigests, page_hash};
use keel_wasm::memory::PAGE_BYTES;

const PAGE: usize = PAGE_BYTES as usize;

/// Chains the digest of the preceding pages with the hash of the next one.
pub(crate) fn digest(before: u128, of: u128) -> u128 {
    let mut both = [0; 32];
    both[..16].copy_from_slice(&before.to_le_bytes());
    both[16..].copy_from_slice(&of.to_le_bytes());
    page_hash(&both)
}

/// Whether the hashes of a run are known and match the digest of its sender.
pub(crate) fn agrees(known: &PageDigests, same: &UnchangedPages) -> bool {
    let mut pages = same.first..same.first.saturating_add(same.pages);
    let known = pages.try_fold(0, |before, number| {
        Some(digest(before, known.get(same.memory, number)?))
    });
    known == Some(same.digest)
}

/// Splits pages into runs that are unchanged and runs that changed; the predicate
/// receives memory, number and hash.
pub(crate) fn split_unchanged(
    pages: &CutPages,
    mut is_same: impl FnMut(u32, u32, u128) -> bool,
) -> Vec<CutPiece> {
    let memory = pages.memory;
    let mut pieces: Vec<CutPiece> = Vec::new();
    // A cut has no page beyond the last page number.
    for (at, page) in pages.bytes.chunks_exact(PAGE).enumerate() {
        let first = pages.first + at as u32;
        let hash = page_hash(page);
        match (is_same(memory, first, hash), pieces.last_mut()) {
            (true, Some(CutPiece::Unchanged(same))) => {
                same.pages += 1;
                same.digest = digest(same.digest, hash);
            }
            (false, Some(CutPiece::Pages(last))) => {
                let start = at * PAGE - last.bytes.len();
                last.bytes = pages.bytes.slice(start..(at + 1) * PAGE);
            }
            (true, _) => pieces.push(CutPiece::Unchanged(UnchangedPages {
                memory,
                first,
                pages: 1,
                digest: digest(0, hash),
            })),
            (false, _) => pieces.push(CutPiece::Pages(CutPages {
                memory,
                first,
                bytes: pages.bytes.slice(at * PAGE..(at + 1) * PAGE),
            })),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first: u32, of: &[u8]) -> CutPages {
        let bytes: Vec<u8> = of.iter().flat_map(|byte| [*byte; PAGE]).collect();
        CutPages {
            memory: 1,
            first,
            bytes: bytes.into(),
        }
    }

    #[test]
    fn unchanged_and_changed_pages_are_split() {
        let same_of = |first, of: &[u8]| UnchangedPages {
            memory: 1,
            first,
            pages: of.len() as u32,
            digest: of
                .iter()
                .fold(0, |it, byte| digest(it, page_hash(&[*byte; PAGE]))),
        };
        let same = |first, of: &[u8]| CutPiece::Unchanged(same_of(first, of));
        let mut known = PageDigests::default();
        let mut renewed = |first: u32, of: &[u8]| {
            split_unchanged(&pages(first, of), |memory, number, hash| {
                known.put(memory, number, hash) == Some(hash)
            })
        };
        let all = pages(5, &[1, 2, 3, 4, 0]);
        assert_eq!(renewed(5, &[1, 2, 3, 4, 0]), [CutPiece::Pages(all)]);
        let expected = [
            CutPiece::Pages(pages(4, &[9])),
            same(5, &[1]),
            CutPiece::Pages(pages(6, &[8, 7])),
            same(8, &[4, 0]),
        ];
        assert_eq!(renewed(4, &[9, 1, 8, 7, 4, 0]), expected);
        assert_eq!(
            renewed(4, &[9, 1, 8, 7, 4, 0]),
            [same(4, &[9, 1, 8, 7, 4, 0])]
        );
        let agrees = |first, of: &[u8]| super::agrees(&known, &same_of(first, of));
        assert!(agrees(4, &[9, 1, 8, 7, 4, 0]) && agrees(5, &[1, 8]));
        // A longer run, and other content.
        assert!(!agrees(4, &[9, 1, 8, 7, 4, 0, 0]) && !agrees(3, &[9]));
        assert!(!agrees(5, &[1, 7]) && !agrees(5, &[8, 1]));
        assert_eq!(known.which(|_, number| number > 7), [(1, 8), (1, 9)]);
    }
}
