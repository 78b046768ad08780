//! The member's side of a cut: a thread that prepares it and sends its pages to the home, as many as
//! the home has requested.

use super::super::{SLEEP_MAX, Shared, SpanError, locked};
use super::{SAME_BYTES, Stage};
use crate::span::messages::{CutMessage, CutPages, CutPiece};
use crate::span::page_digests;
use crate::span::wire::PeerMessage;
use keel_machine::checkpoint::PageDigests;
use keel_wasm::coherence::PartId;
use std::sync::atomic::Ordering;

impl Shared {
    /// A member's thread that sends the pages of cuts, until the end.
    pub(in crate::span::pages) fn send_cuts(&self) {
        let mut history = DigestHistory::default();
        // A home sends none: it reads its own cut.
        while !self.over.load(Ordering::Acquire) && !self.is_home() {
            if let Err(error) = self.send_cut_batch(&mut history) {
                return self.end(error);
            }
        }
    }

    fn send_cut_batch(&self, history: &mut DigestHistory) -> Result<(), SpanError> {
        let mut guard = locked(&self.state);
        let state = &mut *guard;
        let message = match &state.cut_state {
            Some(cut_state) if cut_state.is_over => return self.release_batch(state).map(drop),
            Some(cut_state) if cut_state.gave_up => {
                let (number, word) = (cut_state.number, CutMessage::GaveUp);
                if let Some(cut_state) = &mut state.cut_state {
                    cut_state.is_over = true;
                }
                Some(PeerMessage::Cut { number, word })
            }
            Some(cut_state) if cut_state.stage == Stage::Preparing && !cut_state.is_done => {
                let number = cut_state.number;
                if self.scan_owned_batch(state) || self.has_many_unprotected(state) {
                    return self.protect_batch(state).map(drop);
                }
                if let Some(cut_state) = &mut state.cut_state {
                    cut_state.is_done = true;
                }
                let word = CutMessage::Prepared;
                Some(PeerMessage::Cut { number, word })
            }
            Some(cut_state)
                if cut_state.stage == Stage::Marked
                    && !cut_state.is_done
                    && cut_state.requested_bytes > 0 =>
            {
                let (number, sequence, since) =
                    (cut_state.number, cut_state.sequence, cut_state.since);
                if let Some(pages) = self.read_cut_batch(state)? {
                    drop(guard);
                    return self
                        .send_cut_pieces(number, history.split_unchanged(sequence, since, &pages));
                }
                if let Some(cut_state) = &mut state.cut_state {
                    cut_state.is_done = true;
                }
                history.complete(number, sequence);
                let word = CutMessage::Done;
                Some(PeerMessage::Cut { number, word })
            }
            _ => None,
        };
        match message {
            Some(message) => {
                drop(guard);
                self.send_to(PartId::HOME, &message)
            }
            None => {
                // Ending the cut wakes this thread; a missed wake-up costs a second.
                let rest = SLEEP_MAX;
                drop(self.cuts.changed.wait_timeout(guard, rest));
                Ok(())
            }
        }
    }

    fn send_cut_pieces(&self, number: u64, pieces: Vec<CutPiece>) -> Result<(), SpanError> {
        let mut bytes = 0;
        let mut parcels = Vec::new();
        for piece in pieces {
            parcels.push(match piece {
                CutPiece::Pages(pages) => {
                    bytes += pages.bytes.len();
                    PeerMessage::CutPages { number, pages }
                }
                CutPiece::Unchanged(same) => {
                    bytes += SAME_BYTES as usize;
                    PeerMessage::UnchangedPages(number, same)
                }
            });
        }
        {
            let mut state = locked(&self.state);
            let cut_state = state.cut_state.as_mut().filter(|it| it.number == number);
            if let Some(cut_state) = cut_state {
                cut_state.requested_bytes -= bytes as i64;
            }
        }
        for message in parcels {
            self.send_to(PartId::HOME, &message)?;
        }
        Ok(())
    }
}

/// Page digests of the cuts that a member has sent.
#[derive(Debug, Default)]
struct DigestHistory {
    /// The last cut that was sent completely, by its number at the home of that time.
    before: Option<(u64, PageDigests)>,
    /// The cut being sent, by its count at this part.
    now: Option<(u64, PageDigests)>,
}

impl DigestHistory {
    /// Splits pages into those unchanged since an earlier cut and the others.
    fn split_unchanged(
        &mut self,
        sequence: u64,
        since: Option<u64>,
        pages: &CutPages,
    ) -> Vec<CutPiece> {
        self.before.take_if(|(number, _)| since != Some(*number));
        let (_, now) = match self.now.take_if(|(now, _)| *now == sequence) {
            Some(now) => self.now.insert(now),
            None => self.now.insert((sequence, PageDigests::default())),
        };
        let before = self.before.as_ref().map(|(_, known)| known);
        page_digests::split_unchanged(pages, |memory, number, hash| {
            now.put(memory, number, hash);
            before.is_some_and(|it| it.get(memory, number) == Some(hash))
        })
    }

    /// Records that a cut was sent completely.
    fn complete(&mut self, number: u64, sequence: u64) {
        let now = self.now.take();
        // The member may have had no pages.
        let known = now.filter(|(now, _)| *now == sequence);
        let known = known.map_or_else(PageDigests::default, |(_, known)| known);
        self.before = Some((number, known));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::span::pages::PAGE;

    /// An abandoned cut leaves nothing behind, even if the next cut, of another home, has
    /// the same number.
    #[test]
    fn digests_belong_to_one_cut() {
        let pages = |byte: u8| CutPages {
            memory: 0,
            first: 7,
            bytes: vec![byte; PAGE].into(),
        };
        let is_same = |pieces: Vec<CutPiece>| matches!(pieces[..], [CutPiece::Unchanged(_)]);
        let mut history = DigestHistory::default();
        assert!(!is_same(history.split_unchanged(0, None, &pages(1))));
        // The first cut of another home, which takes the page from another part.
        history.complete(1, 1);
        assert!(!is_same(history.split_unchanged(2, Some(1), &pages(1))));
        history.complete(2, 2);
        // Only the previous cut counts.
        assert!(is_same(history.split_unchanged(3, Some(2), &pages(1))));
        history.complete(3, 3);
        assert!(!is_same(history.split_unchanged(4, Some(2), &pages(1))));
        history.complete(4, 4);
        assert!(!is_same(history.split_unchanged(5, Some(4), &pages(2))));
        assert!(!is_same(history.split_unchanged(6, None, &pages(2))));
    }
}
