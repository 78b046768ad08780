//! The pages of a part that a cut needs: they are found, protected, copied before they change, read,
//! and released. When that happens is left to the home and the members.

use super::super::{PAGE, Shared, SpanError, State, locked};
use super::{COPIED_BYTES_MAX, Stage, failed};
use crate::span::messages::CutPages;
use keel_wasm::coherence::{Copy, PageId};
use keel_wasm::memory::{MemoryError, PAGE_BYTES, Spanning};
use roaring::RoaringBitmap;
use std::sync::atomic::Ordering;

/// Pages read while holding the lock once: other users of the lock wait for some
/// microseconds.
const PIECE_PAGES: u32 = 16;
/// Pages that one call protects or releases.
const BATCH_PAGES: u32 = 512;
/// The preparation ends when at most this many pages are unprotected.
const UNPROTECTED_PAGES_MAX: u64 = 512;

impl Shared {
    /// Scans some of a member's pages for owned ones; false once the scan is complete.
    /// The home determines its pages from its memories.
    pub(super) fn scan_owned_batch(&self, state: &mut State) -> bool {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let from = cut_state.as_ref().and_then(|it| it.scan_position);
        let (Some(cut_state), Some(from), false) = (cut_state, from, self.is_home()) else {
            return false;
        };
        cut_state.scan_position = None;
        for (count, (page, copy)) in (0..).zip(coherence.entries_from(from)) {
            if count == BATCH_PAGES {
                cut_state.scan_position = Some(page);
                break;
            }
            if let (Copy::Owned | Copy::Modified, Some(wanted)) =
                (copy, cut_state.wanted.get_mut(page.memory as usize))
            {
                wanted.insert(page.number);
            }
        }
        cut_state.scan_position.is_some()
    }

    /// Whether too many pages are unprotected to end the preparation.
    pub(super) fn has_many_unprotected(&self, state: &State) -> bool {
        let wanted = state.cut_state.iter().flat_map(|it| &it.wanted);
        wanted.map(RoaringBitmap::len).sum::<u64>() > UNPROTECTED_PAGES_MAX
    }

    /// Protects a batch of the remaining pages; false if none remain.
    pub(super) fn protect_batch(&self, state: &mut State) -> Result<bool, SpanError> {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let Some(cut_state) = cut_state else {
            return Ok(false);
        };
        let all = cut_state.wanted.iter_mut().zip(&mut cut_state.pages);
        for (number, (wanted, pages)) in (0..).zip(all) {
            let Some((first, count)) = first_run(wanted, BATCH_PAGES) else {
                continue;
            };
            wanted.remove_range(first..first + count);
            let memory = self.memory(number)?;
            let owned = |page| {
                let copy = coherence.copy(PageId {
                    memory: number,
                    number: page,
                });
                matches!(copy, Copy::Owned | Copy::Modified)
            };
            for (first, count) in runs_of((first, count), owned) {
                let (at, bytes) = (u64::from(first), u64::from(count) * PAGE_BYTES);
                let done = memory.protect_here(at * PAGE_BYTES, bytes);
                done.map_err(failed)?;
                pages.insert_range(first..first + count);
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// Called before a page changes or leaves, and after it arrives: copies the old
    /// content if the cut still needs it. Before the mark the page is scanned once more.
    pub(in crate::span::pages) fn before_change(
        &self,
        state: &mut State,
        page: PageId,
    ) -> Result<(), SpanError> {
        if !self.cuts.is_on.load(Ordering::Acquire) {
            return Ok(());
        }
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let Some(cut_state) = cut_state else {
            return Ok(());
        };
        let at = page.memory as usize;
        let Some(pages) = cut_state.pages.get_mut(at) else {
            return Ok(());
        };
        let was_protected = pages.remove(page.number);
        let is_marked = cut_state.stage == Stage::Marked;
        if let (false, Some(wanted)) = (is_marked, cut_state.wanted.get_mut(at)) {
            wanted.insert(page.number);
        }
        if !was_protected {
            return Ok(());
        }
        let memory = self.memory(page.memory)?;
        if is_marked && !cut_state.is_over && !cut_state.gave_up {
            let mut bytes = vec![0; PAGE];
            let at = u64::from(page.number) * PAGE_BYTES;
            memory.memory().read(at, &mut bytes).map_err(failed)?;
            cut_state.copied.push_back(CutPages {
                memory: page.memory,
                first: page.number,
                bytes: bytes.into(),
            });
            let before = self.cuts.copied_bytes.fetch_add(PAGE, Ordering::Relaxed);
            if before >= COPIED_BYTES_MAX {
                cut_state.gave_up = true;
                cut_state.copied.clear();
                self.cuts.copied_bytes.store(0, Ordering::Relaxed);
            }
            self.cuts.changed.notify_all();
        }
        let copy = |number| coherence.copy(PageId { number, ..page });
        unprotect(memory, copy, (page.number, 1))
    }

    /// Called before the host writes to a pinned page.
    pub(in crate::span::pages) fn before_host_write(
        &self,
        page: PageId,
        write: impl FnOnce() -> Result<(), MemoryError>,
    ) -> Result<(), SpanError> {
        if self.cuts.is_on.load(Ordering::Acquire) {
            self.before_change(&mut locked(&self.state), page)?;
        }
        write().map_err(failed)?;
        // The first access to the page may be this one, and host accesses cause no fault.
        if self.limits.is_set() {
            let mut state = locked(&self.state);
            let access = state.coherence.access(page);
            if let (Some(keep), Some(access)) = (&mut state.eviction, access)
                && !keep.knows(page)
            {
                keep.arrived(page, access);
            }
        }
        if self.cuts.is_on.load(Ordering::Acquire) {
            // The page may not have existed during the scan. The cut is not marked while
            // this lock is held.
            let mut state = locked(&self.state);
            let preparing = state.cut_state.as_mut();
            let preparing = preparing.filter(|it| it.stage != Stage::Marked);
            let wanted = preparing.and_then(|it| it.wanted.get_mut(page.memory as usize));
            if let Some(wanted) = wanted {
                wanted.insert(page.number);
            }
        }
        Ok(())
    }

    /// Reads a batch of this part's pages as of the cut; `None` if none remain.
    pub(super) fn read_cut_batch(&self, state: &mut State) -> Result<Option<CutPages>, SpanError> {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let Some(cut_state) = cut_state.as_mut().filter(|it| it.stage == Stage::Marked) else {
            return Ok(None);
        };
        if let Some(copied) = cut_state.copied.pop_front() {
            self.cuts.copied_bytes.fetch_sub(PAGE, Ordering::Relaxed);
            return Ok(Some(copied));
        }
        for (number, pages) in (0..).zip(&mut cut_state.pages) {
            let Some((first, count)) = first_run(pages, PIECE_PAGES) else {
                continue;
            };
            let memory = self.memory(number)?;
            let mut bytes = vec![0; count as usize * PAGE];
            let at = u64::from(first) * PAGE_BYTES;
            memory.memory().read(at, &mut bytes).map_err(failed)?;
            pages.remove_range(first..first + count);
            let copy = |page| {
                coherence.copy(PageId {
                    memory: number,
                    number: page,
                })
            };
            unprotect(memory, copy, (first, count))?;
            return Ok(Some(CutPages {
                memory: number,
                first,
                bytes: bytes.into(),
            }));
        }
        Ok(None)
    }

    /// Releases a batch of protected pages that are no longer needed; false once the cut
    /// is over.
    pub(in crate::span::pages) fn release_batch(
        &self,
        state: &mut State,
    ) -> Result<bool, SpanError> {
        let State {
            cut_state,
            coherence,
            ..
        } = state;
        let pages = cut_state.iter_mut().flat_map(|it| &mut it.pages);
        for (number, pages) in (0..).zip(pages) {
            let Some((first, count)) = first_run(pages, BATCH_PAGES) else {
                continue;
            };
            pages.remove_range(first..first + count);
            let copy = |page| {
                coherence.copy(PageId {
                    memory: number,
                    number: page,
                })
            };
            unprotect(self.memory(number)?, copy, (first, count))?;
            return Ok(true);
        }
        if cut_state.is_none() {
            return Ok(false);
        }
        *cut_state = None;
        self.cuts.copied_bytes.store(0, Ordering::Relaxed);
        self.cuts.is_on.store(false, Ordering::Release);
        // A move of pages may wait for it.
        self.cuts.changed.notify_all();
        Ok(false)
    }
}

/// The first run of pages in the set, limited to `most`.
fn first_run(set: &RoaringBitmap, most: u32) -> Option<(u32, u32)> {
    let mut pages = set.iter();
    let first = pages.next()?;
    let count = 1
        + (first + 1..)
            .zip(pages)
            .take(most as usize - 1)
            .take_while(|(next, page)| next == page)
            .count() as u32;
    Some((first, count))
}

/// Runs of the pages in a range that satisfy a predicate.
fn runs_of((first, count): (u32, u32), is_so: impl Fn(u32) -> bool) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in (first..first + count).filter(|number| is_so(*number)) {
        match runs.last_mut() {
            Some((start, count)) if *start + *count == number => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

/// Makes those of some pages writable that this part may write.
fn unprotect(
    memory: &Spanning,
    copy: impl Fn(u32) -> Copy,
    pages: (u32, u32),
) -> Result<(), SpanError> {
    for (first, count) in runs_of(pages, |number| copy(number) == Copy::Modified) {
        let (at, bytes) = (u64::from(first), u64::from(count) * PAGE_BYTES);
        memory.allow(at * PAGE_BYTES, bytes).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_begin_with_the_first_page() {
        let set = |pages: &[u32]| pages.iter().copied().collect::<RoaringBitmap>();
        assert_eq!(first_run(&set(&[]), 16), None);
        assert_eq!(first_run(&set(&[7]), 16), Some((7, 1)));
        assert_eq!(first_run(&set(&[3, 4, 5, 7]), 16), Some((3, 3)));
        assert_eq!(first_run(&set(&[3, 4, 5, 7]), 2), Some((3, 2)));
        assert_eq!(first_run(&set(&[3, 4]), 1), Some((3, 1)));
    }
}
