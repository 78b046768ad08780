//! Pages that are asked for before anybody touches them: those that follow, where a part
//! goes through memory in order. Each is asked for as if a thread stood at it, so the
//! protocol knows nothing of it; what is won is that they come together, for one wake of
//! everybody on the way.
//!
//! As files are read ahead in kernels: a run of faults begins a stream, and its window
//! doubles while it goes on. To read is cheap to guess wrong: gaps (pages that are here
//! already) are passed over. To write takes a page from whoever has it, so only long runs
//! without gaps count.
//!
//! Runs that were there before are known: of a page at which a run began twice, as many are
//! asked for at once as followed it both times. (Bands of a picture, rows of a matrix: what a
//! thread takes as one piece it takes as one piece again. After Somogyi, Wenisch, Ailamaki et
//! al., "Spatial Memory Streaming", ISCA 2006, with a page for what is a line there.) Now and
//! then nothing is asked for, to see whether it is still so.

use keel_wasm::coherence::{Access, PageId};
use std::collections::HashMap;

/// Streams that are known at a time: one for each thread that goes through memory, as far
/// as there are no more.
const STREAMS_MAX: usize = 16;
/// Most pages that are asked for ahead at a time as a run goes on, and as is known.
const WINDOW_MAX: u32 = 64;
const KNOWN_PAGES_MAX: u32 = 256;
/// Pages of which it is known what followed them, at most; all is learned anew then.
const KNOWN_MAX: usize = 1 << 16;
/// One in so many times nothing is asked for of what is known, to see what follows now.
const SEEN_ANEW: u8 = 8;
/// How far ahead pages are looked for that are not here.
const LOOK_MAX: u32 = 2 * WINDOW_MAX;

/// What is to be asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PrefetchWindow {
    /// How many pages that are not here, at most.
    pub(super) pages: u32,
    /// Among how many that follow.
    pub(super) among: u32,
}

impl PrefetchWindow {
    /// As a run goes on.
    fn window(pages: u32) -> Self {
        let among = if pages > 0 { LOOK_MAX } else { 0 };
        PrefetchWindow { pages, among }
    }

    /// What followed before.
    fn known(pages: u32) -> Self {
        let among = pages;
        PrefetchWindow { pages, among }
    }
}

/// Faults that make a run.
fn run_min(access: Access) -> u32 {
    match access {
        Access::Read => 2,
        Access::Write => 4,
    }
}

/// Pages that have to be known to follow: of less to read a run has them soon.
fn known_min(access: Access) -> u32 {
    match access {
        Access::Read => 8,
        Access::Write => 1,
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
    /// Where it began, as far as it went on as was known.
    knew: Option<u32>,
}

/// What followed a page at which runs began.
#[derive(Debug, Clone, Copy, Default)]
struct RunHistory {
    /// Pages, the last time and the time before it.
    last: u16,
    before: u16,
    /// How often that was seen; 2 and more count as 2.
    seen: u8,
    /// How often it was used since.
    used: u8,
    /// Pages with those of what was known to follow and did, this time and the time before.
    joined: u16,
    joined_before: u16,
}

impl RunHistory {
    /// A run begins: how many pages are asked for; what follows is to be learned if it is
    /// none.
    fn begin(&mut self) -> u32 {
        let follows = self.last.min(self.before);
        if self.seen == 2 && follows > 0 && self.used + 1 < SEEN_ANEW {
            self.used += 1;
            (self.joined, self.joined_before) = (0, self.joined);
            return follows.into();
        }
        *self = RunHistory {
            last: 0,
            before: self.last,
            seen: 2.min(self.seen + 1),
            // (What was one before is soon one again.)
            joined: follows,
            ..RunHistory::default()
        };
        0
    }

    /// What was known, and what is known to follow it, are so many pages: one piece if they
    /// were so the time before, too. (Who takes pieces as they are free may take two in a
    /// row.)
    fn join(&mut self, pages: u16) {
        self.joined = pages;
        let both = self.joined.min(self.joined_before);
        if both > self.last.min(self.before) {
            (self.last, self.before) = (both, both);
        }
    }
}

/// The streams of one part.
#[derive(Debug, Default)]
pub(super) struct StreamPrefetcher {
    all: Vec<Stream>,
    clock: u64,
    known: RunTable,
}

impl StreamPrefetcher {
    /// A thread, the first one, stands at a page, which may have been asked for already:
    /// which of those that follow, and are not here, are to be asked for too.
    /// [`Self::asked`] is told how far that went.
    pub(super) fn stands(
        &mut self,
        page: PageId,
        access: Access,
        is_asked: bool,
    ) -> PrefetchWindow {
        self.clock += 1;
        let number = page.number;
        let key = |number| (PageId { number, ..page }, access);
        let goes_on = |it: &&mut Stream| {
            let end = it.until.saturating_add(1 + gap_max(access));
            // (What was asked for in an earlier turn may have come and gone.)
            (it.memory, it.access) == (page.memory, access)
                && (it.last < number && number <= end)
                && (is_asked || it.until < number)
        };
        let those = self.all.iter_mut().filter(goes_on);
        if let Some(stream) = those.max_by_key(|it| it.used) {
            stream.used = self.clock;
            stream.last = number;
            if number <= stream.until {
                // It is on its way.
                return PrefetchWindow::default();
            }
            // (Not behind a gap.)
            let follows = number == stream.until + 1;
            stream.until = number;
            stream.run += 1;
            if let Some(first) = stream.learns {
                let pages = (number - first).min(KNOWN_PAGES_MAX);
                self.known.learn(key(first), pages as u16);
            } else {
                // What was asked for is used up: as if a run began here.
                let (known, learns) = self.known.begins(key(number));
                stream.learns = learns;
                let knew = stream.knew.take().filter(|_| follows);
                if known.pages > 0 {
                    // (Of what was asked for last, when it was learned, nobody knows whether
                    // it was used: so one run may be known as several.)
                    if let Some(first) = knew {
                        self.known.join(key(first), number - first + known.pages);
                    }
                    stream.knew = Some(knew.unwrap_or(number));
                    return known;
                }
            }
            stream.window = match stream.run >= run_min(access) {
                true => (2 * stream.window).clamp(2, WINDOW_MAX),
                false => 0,
            };
            return PrefetchWindow::window(stream.window);
        }
        let (known, learns) = self.known.begins(key(number));
        let begun = Stream {
            memory: page.memory,
            access,
            last: number,
            until: number,
            run: 1,
            window: 0,
            used: self.clock,
            learns,
            knew: (known.pages > 0).then_some(number),
        };
        match self.all.len() < STREAMS_MAX {
            true => self.all.push(begun),
            false => {
                if let Some(oldest) = self.all.iter_mut().min_by_key(|it| it.used) {
                    *oldest = begun;
                }
            }
        }
        known
    }

    /// Behind a page at which a thread stands, all to this one were asked for or are here.
    pub(super) fn asked(&mut self, page: PageId, access: Access, until: u32) {
        let of = |it: &&mut Stream| {
            (it.memory, it.access, it.last) == (page.memory, access, page.number)
        };
        let those = self.all.iter_mut().filter(of);
        if let Some(stream) = those.max_by_key(|it| it.used) {
            stream.until = stream.until.max(until);
        }
    }
}

/// What followed pages at which runs began.
#[derive(Debug, Default)]
struct RunTable(HashMap<(PageId, Access), RunHistory>);

impl RunTable {
    /// A run begins at a page: what is known to follow; where the run began whose length is to
    /// be learned, if nothing is.
    fn begins(&mut self, first: (PageId, Access)) -> (PrefetchWindow, Option<u32>) {
        let known = self.0.get_mut(&first).map_or(0, RunHistory::begin);
        match known {
            pages if pages < known_min(first.1) => {
                (PrefetchWindow::default(), Some(first.0.number))
            }
            pages => (PrefetchWindow::known(pages), None),
        }
    }

    /// So many pages followed, as far as is known until now.
    fn learn(&mut self, first: (PageId, Access), pages: u16) {
        // (Of pages that nothing followed nothing is kept: those of who goes in no order.)
        if self.0.len() >= KNOWN_MAX && !self.0.contains_key(&first) {
            self.0.clear();
        }
        let followed = self.0.entry(first).or_insert(RunHistory {
            seen: 1,
            ..RunHistory::default()
        });
        followed.last = pages;
    }

    /// A run that was known went on with another one that was.
    fn join(&mut self, first: (PageId, Access), pages: u32) {
        if let Some(followed) = self.0.get_mut(&first)
            && pages <= KNOWN_PAGES_MAX
        {
            followed.join(pages as u16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u32) -> PageId {
        PageId { memory: 0, number }
    }

    /// Goes through pages of which none is here; where it stood.
    fn through(
        streams: &mut StreamPrefetcher,
        pages: std::ops::Range<u32>,
        access: Access,
    ) -> Vec<u32> {
        let (mut stood, mut asked) = (Vec::new(), 0);
        for number in pages {
            if number < asked {
                continue;
            }
            stood.push(number);
            let ahead = streams.stands(page(number), access, false);
            asked = number + 1 + ahead.pages;
            streams.asked(page(number), access, number + ahead.pages);
        }
        stood
    }

    /// How many pages are asked for.
    fn stands(streams: &mut StreamPrefetcher, number: u32, access: Access) -> u32 {
        streams.stands(page(number), access, false).pages
    }

    #[test]
    fn who_goes_in_order_stands_seldom() {
        let read = through(&mut StreamPrefetcher::default(), 100..200, Access::Read);
        assert_eq!(read, [100, 101, 104, 109, 118, 135, 168]);
        let written = through(&mut StreamPrefetcher::default(), 100..130, Access::Write);
        assert_eq!(written, [100, 101, 102, 103, 106, 111, 120]);
    }

    #[test]
    fn who_does_not_is_asked_nothing_for() {
        let mut streams = StreamPrefetcher::default();
        for number in [5, 900, 30, 31 + 9, 20, 19, 18, 5, 5, 1000] {
            assert_eq!(stands(&mut streams, number, Access::Read), 0, "{number}");
        }
        // (And nothing is kept of it.)
        assert!(streams.known.0.is_empty());
        // Short bands that are written, and pages of others between them.
        for band in [0, 12, 24, 36] {
            let first = 2000 + band;
            let stood = through(&mut streams, first..first + 3, Access::Write);
            assert_eq!(stood.len(), 3);
        }
        // (What followed once may not again: two bands by one thread.)
        assert_eq!(through(&mut streams, 2000..2006, Access::Write).len(), 4);
        // To read is not to write, nor one memory another.
        let mut streams = StreamPrefetcher::default();
        assert_eq!(stands(&mut streams, 1, Access::Read), 0);
        assert_eq!(stands(&mut streams, 2, Access::Write), 0);
        let other = PageId {
            memory: 1,
            number: 2,
        };
        assert_eq!(streams.stands(other, Access::Read, false).pages, 0);
        assert_eq!(stands(&mut streams, 2, Access::Read), 2);
    }

    /// Bands are known when they were used twice, each as long as it was at least; now and
    /// then they are looked at anew.
    #[test]
    fn what_was_a_piece_twice_is_one_the_third_time() {
        // A band, one and what follows by one thread, a shorter one.
        for (access, first, more, less) in [
            (Access::Write, 3, &[100, 101, 102, 103][..], 2),
            (Access::Read, 11, &[100, 101, 104, 109, 118], 10),
        ] {
            let mut streams = StreamPrefetcher::default();
            let mut uses = |pages: u32| {
                let stood = through(&mut streams, 100..100 + pages, access);
                // (Somewhere else, so that the next band begins a run.)
                for other in 0..STREAMS_MAX as u32 {
                    stands(&mut streams, 1_000_000 + 50 * other, access);
                }
                stood
            };
            assert!(uses(first).len() > 1, "{access:?}");
            assert_eq!(uses(2 * first), more);
            for _ in 0..7 {
                assert_eq!(uses(less), [100], "{access:?}");
            }
            // It is shorter now, and that is seen.
            assert!(uses(less).len() > 1, "{access:?}");
            for _ in 0..7 {
                assert_eq!(uses(less), [100], "{access:?}");
            }
        }
        // What is short is read without.
        let mut streams = StreamPrefetcher::default();
        for _ in 0..5 {
            assert_eq!(through(&mut streams, 100..103, Access::Read), [100, 101]);
            through(&mut streams, 5000..5001, Access::Read);
        }
    }

    /// A thread goes through the same pages again and again: the most that are asked for
    /// at once come to be asked for at once, and when nothing is, to see what follows, it
    /// stands as seldom as the first time.
    #[test]
    fn a_long_piece_is_one_and_what_was_asked_for_before_is_not_on_its_way() {
        for access in [Access::Read, Access::Write] {
            let mut streams = StreamPrefetcher::default();
            let mut uses = || through(&mut streams, 1000..1000 + KNOWN_PAGES_MAX + 1, access).len();
            let first = uses();
            assert!(first <= 13, "{access:?}: {first}");
            let turns: Vec<usize> = (0..40).map(|_| uses()).collect();
            assert!(
                turns.iter().all(|stood| *stood <= first + 1),
                "{access:?}: {turns:?}"
            );
            let at_once = turns.iter().filter(|stood| **stood <= 3).count();
            assert!(at_once >= 20, "{access:?}: {turns:?}");
        }
    }

    /// What is known is not asked for further than it went.
    #[test]
    fn what_is_known_ends_where_it_ended() {
        let mut streams = StreamPrefetcher::default();
        for _ in 0..2 {
            through(&mut streams, 100..110, Access::Read);
            through(&mut streams, 50_000..50_001, Access::Read);
        }
        let ahead = streams.stands(page(100), Access::Read, false);
        assert!(0 < ahead.pages && ahead.pages < 10, "{ahead:?}");
        assert_eq!(ahead.among, ahead.pages);
    }

    /// All was asked for in an earlier turn, and is elsewhere again: who begins in the middle
    /// of it is read ahead for as if nothing had been.
    #[test]
    fn what_came_and_went_is_not_on_its_way() {
        for access in [Access::Read, Access::Write] {
            let mut streams = StreamPrefetcher::default();
            streams.stands(page(1000), access, false);
            streams.asked(page(1000), access, 1256);
            // (While it is on its way nothing more is asked for.)
            for number in [1003, 1100] {
                assert_eq!(streams.stands(page(number), access, true).pages, 0);
            }
            assert!(through(&mut streams, 1120..1250, access).len() < 10);
        }
    }

    /// Pieces that one thread happened to take in a row are none; those that it takes in a
    /// row each time are.
    #[test]
    fn pieces_are_one_when_they_follow_each_other_twice() {
        let mut followed = RunHistory {
            last: 9,
            before: 9,
            seen: 2,
            ..RunHistory::default()
        };
        assert_eq!(followed.begin(), 9);
        followed.join(19);
        for _ in 0..2 {
            assert_eq!(followed.begin(), 9);
        }
        followed.join(19);
        assert_eq!(followed.begin(), 9);
        followed.join(15);
        assert_eq!(followed.begin(), 15);
    }

    #[test]
    fn several_threads_have_streams_of_their_own_and_gaps_are_passed() {
        let mut streams = StreamPrefetcher::default();
        for step in 0..3 {
            for thread in 0..8 {
                let at = page(thread * 1000 + step);
                let ahead = streams.stands(at, Access::Read, false).pages;
                assert_eq!(ahead > 0, step == 1, "{thread} {step}");
                streams.asked(at, Access::Read, at.number + ahead);
            }
        }
        // Pages 4 to 11 are here.
        let mut streams = StreamPrefetcher::default();
        assert_eq!(stands(&mut streams, 2, Access::Read), 0);
        assert_eq!(stands(&mut streams, 3, Access::Read), 2);
        streams.asked(page(3), Access::Read, 13);
        assert_eq!(streams.stands(page(12), Access::Read, true).pages, 0);
        assert_eq!(stands(&mut streams, 14, Access::Read), 4);
        // The last page of all.
        let last = page(u32::MAX);
        assert_eq!(stands(&mut streams, u32::MAX, Access::Read), 0);
        streams.asked(last, Access::Read, u32::MAX);
        assert_eq!(stands(&mut streams, u32::MAX, Access::Read), 0);
    }
}
