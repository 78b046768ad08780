//! Pages that are asked for before anybody touches them: those that follow, where a part
//! goes through memory in order. Each is asked for as if a thread stood at it, so the
//! protocol knows nothing of it; what is won is that they come together, for one wake of
//! everybody on the way.
//!
//! As files are read ahead in kernels: a run of faults begins a stream, and its window
//! doubles while it goes on. To read is cheap to guess wrong: gaps (pages that are here
//! already) are passed over. To write takes a page from whoever has it, so only long runs
//! without gaps count, and those that were there before: of a page at which a run to write
//! began twice, as many are asked for as followed it both times. (Bands of a picture, rows
//! of a matrix: what a thread takes as one piece it takes as one piece again. After Somogyi,
//! Wenisch, Ailamaki et al., "Spatial Memory Streaming", ISCA 2006, with a page for what is
//! a line there.) Now and then nothing is asked for, to see whether it is still so.

use keel_wasm::coherence::{Access, PageId};
use std::collections::HashMap;

/// Streams that are known at a time: one for each thread that goes through memory, as far
/// as there are no more.
const STREAMS_MAX: usize = 16;
/// Most pages that are asked for ahead at a time.
const WINDOW_MAX: u32 = 64;
/// Pages of which it is known what followed them, at most; all is learned anew then.
const KNOWN_MAX: usize = 1 << 16;
/// One in so many times nothing is asked for of what is known, to see what follows now.
const SEEN_ANEW: u8 = 8;
/// How far ahead pages are looked for that are not here.
pub(super) const LOOK_MAX: u32 = 128;

/// Faults that make a run.
fn run_min(access: Access) -> u32 {
    match access {
        Access::Read => 2,
        Access::Write => 4,
    }
}

/// Pages between two faults of one run.
fn gap_max(access: Access) -> u32 {
    match access {
        Access::Read => 8,
        Access::Write => 0,
    }
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    memory: u32,
    access: Access,
    /// Where somebody stood last.
    last: u32,
    /// What was asked for last.
    until: u32,
    run: u32,
    window: u32,
    used: u64,
    /// Where the run began that is learned, if one is.
    learns: Option<u32>,
}

/// What followed a page at which runs to write began.
#[derive(Debug, Clone, Copy, Default)]
struct Followed {
    /// Pages, the last time and the time before it.
    last: u8,
    before: u8,
    /// How often that was seen; 2 and more count as 2.
    seen: u8,
    /// How often it was used since.
    used: u8,
}

impl Followed {
    /// A run begins: how many pages are asked for; what follows is to be learned if it is
    /// none.
    fn begin(&mut self) -> u32 {
        let follows = self.last.min(self.before);
        if self.seen == 2 && follows > 0 && self.used + 1 < SEEN_ANEW {
            self.used += 1;
            return follows.into();
        }
        *self = Followed {
            last: 0,
            before: self.last,
            seen: 2.min(self.seen + 1),
            used: 0,
        };
        0
    }
}

/// The streams of one part.
#[derive(Debug, Default)]
pub(super) struct Streams {
    all: Vec<Stream>,
    clock: u64,
    followed: HashMap<PageId, Followed>,
}

impl Streams {
    /// A thread stands at a page: how many of those that follow, and are not here, are to
    /// be asked for too. [`Self::asked`] is told how far that went.
    pub(super) fn stands(&mut self, page: PageId, access: Access) -> u32 {
        self.clock += 1;
        let number = page.number;
        let goes_on = |it: &&mut Stream| {
            let end = it.until.saturating_add(1 + gap_max(access));
            (it.memory, it.access) == (page.memory, access) && number > it.last && number <= end
        };
        if let Some(stream) = self.all.iter_mut().find(goes_on) {
            stream.used = self.clock;
            stream.last = number;
            if number <= stream.until {
                // It is on its way.
                return 0;
            }
            stream.until = number;
            stream.run += 1;
            if let Some(first) = stream.learns {
                let first = PageId {
                    number: first,
                    ..page
                };
                let follow = (number - first.number).min(WINDOW_MAX);
                if let Some(followed) = self.followed.get_mut(&first) {
                    followed.last = follow as u8;
                }
            } else if access == Access::Write {
                // What was asked for is used up: as if a run began here.
                let (window, learns) = begins(&mut self.followed, page);
                stream.learns = learns;
                if window > 0 {
                    return window;
                }
            }
            stream.window = match stream.run >= run_min(access) {
                true => (2 * stream.window).clamp(2, WINDOW_MAX),
                false => 0,
            };
            return stream.window;
        }
        let (window, learns) = match access {
            Access::Write => begins(&mut self.followed, page),
            Access::Read => (0, None),
        };
        let begun = Stream {
            memory: page.memory,
            access,
            last: number,
            until: number,
            run: 1,
            window: 0,
            used: self.clock,
            learns,
        };
        match self.all.len() < STREAMS_MAX {
            true => self.all.push(begun),
            false => {
                if let Some(oldest) = self.all.iter_mut().min_by_key(|it| it.used) {
                    *oldest = begun;
                }
            }
        }
        window
    }

    /// Behind a page at which a thread stands, all to this one were asked for or are here.
    pub(super) fn asked(&mut self, page: PageId, access: Access, until: u32) {
        let of = |it: &&mut Stream| {
            (it.memory, it.access, it.last) == (page.memory, access, page.number)
        };
        if let Some(stream) = self.all.iter_mut().find(of) {
            stream.until = stream.until.max(until);
        }
    }
}

/// A run to write begins at a page: how many that follow are asked for; where the run began
/// whose length is to be learned, if it is none.
fn begins(followed: &mut HashMap<PageId, Followed>, page: PageId) -> (u32, Option<u32>) {
    if followed.len() >= KNOWN_MAX && !followed.contains_key(&page) {
        followed.clear();
    }
    match followed.entry(page).or_default().begin() {
        0 => (0, Some(page.number)),
        window => (window, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> PageId {
        PageId { memory: 0, number }
    }

    /// Goes through pages of which none is here; where it stood.
    fn through(streams: &mut Streams, pages: std::ops::Range<u32>, access: Access) -> Vec<u32> {
        let (mut stood, mut asked) = (Vec::new(), 0);
        for number in pages {
            if number < asked {
                continue;
            }
            stood.push(number);
            let ahead = streams.stands(page(number), access);
            asked = number + 1 + ahead;
            streams.asked(page(number), access, number + ahead);
        }
        stood
    }

    #[test]
    fn who_goes_in_order_stands_seldom() {
        let read = through(&mut Streams::default(), 100..200, Access::Read);
        assert_eq!(read, [100, 101, 104, 109, 118, 135, 168]);
        let written = through(&mut Streams::default(), 100..130, Access::Write);
        assert_eq!(written, [100, 101, 102, 103, 106, 111, 120]);
    }

    #[test]
    fn who_does_not_is_asked_nothing_for() {
        let mut streams = Streams::default();
        for number in [5, 900, 30, 31 + 9, 20, 19, 18, 5, 5, 1000] {
            assert_eq!(streams.stands(page(number), Access::Read), 0, "{number}");
        }
        // Short bands that are written, and pages of others between them.
        for band in [0, 12, 24, 36] {
            let first = 2000 + band;
            let stood = through(&mut streams, first..first + 3, Access::Write);
            assert_eq!(stood.len(), 3);
        }
        // (What followed once may not again: two bands by one thread.)
        assert_eq!(through(&mut streams, 2000..2006, Access::Write).len(), 4);
        // To read is not to write, nor one memory another.
        let mut streams = Streams::default();
        assert_eq!(streams.stands(page(1), Access::Read), 0);
        assert_eq!(streams.stands(page(2), Access::Write), 0);
        let other = PageId {
            memory: 1,
            number: 2,
        };
        assert_eq!(streams.stands(other, Access::Read), 0);
        assert_eq!(streams.stands(page(2), Access::Read), 2);
    }

    /// Bands are known when they were written twice, each as long as it was at least; now
    /// and then they are looked at anew.
    #[test]
    fn what_was_a_piece_twice_is_one_the_third_time() {
        let mut streams = Streams::default();
        let mut write = |pages: std::ops::Range<u32>| {
            let stood = through(&mut streams, pages, Access::Write);
            // (Somewhere else, so that the next band begins a run.)
            for other in 0..STREAMS_MAX as u32 {
                streams.stands(page(1_000_000 + 5 * other), Access::Write);
            }
            stood
        };
        assert_eq!(write(100..103), [100, 101, 102]);
        // One and the next by one thread.
        assert_eq!(write(100..106), [100, 101, 102, 103]);
        for _ in 0..7 {
            assert_eq!(write(100..103), [100]);
        }
        // It is shorter now, and that is seen.
        assert_eq!(write(100..102), [100, 101]);
        for _ in 0..7 {
            assert_eq!(write(100..102), [100]);
        }
    }

    #[test]
    fn several_threads_have_streams_of_their_own_and_gaps_are_passed() {
        let mut streams = Streams::default();
        for step in 0..3 {
            for thread in 0..8 {
                let at = page(thread * 1000 + step);
                let ahead = streams.stands(at, Access::Read);
                assert_eq!(ahead > 0, step == 1, "{thread} {step}");
                streams.asked(at, Access::Read, at.number + ahead);
            }
        }
        // Pages 4 to 11 are here.
        let mut streams = Streams::default();
        assert_eq!(streams.stands(page(2), Access::Read), 0);
        assert_eq!(streams.stands(page(3), Access::Read), 2);
        streams.asked(page(3), Access::Read, 13);
        assert_eq!(streams.stands(page(12), Access::Read), 0);
        assert_eq!(streams.stands(page(14), Access::Read), 4);
        // The last page of all.
        let last = page(u32::MAX);
        assert_eq!(streams.stands(last, Access::Read), 0);
        streams.asked(last, Access::Read, u32::MAX);
        assert_eq!(streams.stands(last, Access::Read), 0);
    }
}
