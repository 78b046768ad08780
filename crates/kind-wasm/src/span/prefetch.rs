//! Prefetching: where a part accesses memory sequentially, the following pages are
//! requested before a thread accesses them. Each is requested like a faulting page, so
//! the protocol needs no support for it; the gain is that pages arrive together and each
//! thread on the way wakes once.
//!
//! As in the read-ahead of kernels, a run of faults starts a stream whose window doubles
//! while the stream goes on. Wrong predictions are cheap for reads, so gaps (present
//! pages) are passed over. A write takes the page from its owner, so only long runs
//! without gaps count.
//!
//! Earlier runs are remembered: for a page at which a run began twice, as many pages are
//! requested at once as followed both times (bands of a picture or rows of a matrix are
//! accessed as a whole again; after Somogyi, Wenisch, Ailamaki et al., "Spatial Memory
//! Streaming", ISCA 2006, with pages in place of cache lines). From time to time nothing
//! is requested, to observe whether this still holds.

use keel_wasm::coherence::{Access, PageId};
use std::collections::HashMap;

/// Streams per part, at most: one for each thread with sequential access.
const STREAMS_MAX: usize = 16;
/// The largest window of a stream, and of a remembered run.
const WINDOW_MAX: u32 = 64;
const KNOWN_PAGES_MAX: u32 = 256;
/// Remembered runs, at most; the table is cleared when it is full.
const KNOWN_MAX: usize = 1 << 16;
/// One in this many remembered runs is not prefetched but observed.
const SEEN_ANEW: u8 = 8;
/// How far ahead absent pages are searched.
const LOOK_MAX: u32 = 2 * WINDOW_MAX;

/// Pages to request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PrefetchWindow {
    /// The number of absent pages, at most.
    pub(super) pages: u32,
    /// The number of following pages among which they are searched.
    pub(super) among: u32,
}

impl PrefetchWindow {
    /// For a stream.
    fn window(pages: u32) -> Self {
        let among = if pages > 0 { LOOK_MAX } else { 0 };
        PrefetchWindow { pages, among }
    }

    /// For a remembered run.
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

/// The minimum length of a remembered run: shorter runs of reads are detected soon
/// enough.
fn known_min(access: Access) -> u32 {
    match access {
        Access::Read => 8,
        Access::Write => 1,
    }
}

/// The largest gap between two faults of one run, in pages.
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
    /// Page of the last fault.
    last: u32,
    /// The last page requested.
    until: u32,
    run: u32,
    window: u32,
    used: u64,
    /// First page of the run whose length is being learned.
    learns: Option<u32>,
    /// First page of the remembered run that is being followed.
    knew: Option<u32>,
}

/// History of the runs that began at a page.
#[derive(Debug, Clone, Copy, Default)]
struct RunHistory {
    /// Lengths of the last run and the one before.
    last: u16,
    before: u16,
    /// Number of observed runs, at most 2.
    seen: u8,
    /// Number of uses since.
    used: u8,
    /// Lengths together with the adjacent remembered run, the last time and the time
    /// before.
    joined: u16,
    joined_before: u16,
}

impl RunHistory {
    /// A run begins: returns the number of pages to request; 0 if its length is to be
    /// learned.
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
            // Adjacent runs that were joined are soon joined again.
            joined: follows,
            ..RunHistory::default()
        };
        0
    }

    /// The run and the remembered run behind it have this total length: they become one
    /// run if this also held the time before. A thread that takes pieces from a shared
    /// queue may take two adjacent ones by chance.
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
    /// A thread, the first one, faults on a page, which may be requested already: returns
    /// which following pages to request. The caller reports with [`Self::on_requested`]
    /// how far that went.
    pub(super) fn on_fault(
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
            // Pages requested in an earlier iteration may have arrived and left.
            (it.memory, it.access) == (page.memory, access)
                && (it.last < number && number <= end)
                && (is_asked || it.until < number)
        };
        let those = self.all.iter_mut().filter(goes_on);
        if let Some(stream) = those.max_by_key(|it| it.used) {
            stream.used = self.clock;
            stream.last = number;
            if number <= stream.until {
                // The page is in transit.
                return PrefetchWindow::default();
            }
            // Not behind a gap.
            let follows = number == stream.until + 1;
            stream.until = number;
            stream.run += 1;
            if let Some(first) = stream.learns {
                let pages = (number - first).min(KNOWN_PAGES_MAX);
                self.known.learn(key(first), pages as u16);
            } else {
                // The requested pages are used up: treated as the start of a run.
                let (known, learns) = self.known.begin_run(key(number));
                stream.learns = learns;
                let knew = stream.knew.take().filter(|_| follows);
                if known.pages > 0 {
                    // It is unknown whether the last requested pages were used when the
                    // run was learned, so one run may be remembered as several.
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
        let (known, learns) = self.known.begin_run(key(number));
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

    /// Records that all pages behind a faulting page, up to this one, are requested or
    /// present.
    pub(super) fn on_requested(&mut self, page: PageId, access: Access, until: u32) {
        let of = |it: &&mut Stream| {
            (it.memory, it.access, it.last) == (page.memory, access, page.number)
        };
        let those = self.all.iter_mut().filter(of);
        if let Some(stream) = those.max_by_key(|it| it.used) {
            stream.until = stream.until.max(until);
        }
    }
}

/// History of runs, by first page and access.
#[derive(Debug, Default)]
struct RunTable(HashMap<(PageId, Access), RunHistory>);

impl RunTable {
    /// A run begins at a page: returns the pages to request, and the page whose run is to
    /// be learned if its length is unknown.
    fn begin_run(&mut self, first: (PageId, Access)) -> (PrefetchWindow, Option<u32>) {
        let known = self.0.get_mut(&first).map_or(0, RunHistory::begin);
        match known {
            pages if pages < known_min(first.1) => {
                (PrefetchWindow::default(), Some(first.0.number))
            }
            pages => (PrefetchWindow::known(pages), None),
        }
    }

    /// Records the length of a run observed so far.
    fn learn(&mut self, first: (PageId, Access), pages: u16) {
        // Runs of length zero are not stored: they come from random access.
        if self.0.len() >= KNOWN_MAX && !self.0.contains_key(&first) {
            self.0.clear();
        }
        let followed = self.0.entry(first).or_insert(RunHistory {
            seen: 1,
            ..RunHistory::default()
        });
        followed.last = pages;
    }

    /// A remembered run was followed by another remembered run.
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

    /// Accesses pages that are all absent; returns the pages that fault.
    fn access_range(
        streams: &mut StreamPrefetcher,
        pages: std::ops::Range<u32>,
        access: Access,
    ) -> Vec<u32> {
        let (mut faulted, mut asked) = (Vec::new(), 0);
        for number in pages {
            if number < asked {
                continue;
            }
            faulted.push(number);
            let ahead = streams.on_fault(page(number), access, false);
            asked = number + 1 + ahead.pages;
            streams.on_requested(page(number), access, number + ahead.pages);
        }
        faulted
    }

    /// Number of pages requested.
    fn fault(streams: &mut StreamPrefetcher, number: u32, access: Access) -> u32 {
        streams.on_fault(page(number), access, false).pages
    }

    #[test]
    fn sequential_access_faults_rarely() {
        let read = access_range(&mut StreamPrefetcher::default(), 100..200, Access::Read);
        assert_eq!(read, [100, 101, 104, 109, 118, 135, 168]);
        let written = access_range(&mut StreamPrefetcher::default(), 100..130, Access::Write);
        assert_eq!(written, [100, 101, 102, 103, 106, 111, 120]);
    }

    #[test]
    fn random_access_is_not_prefetched() {
        let mut streams = StreamPrefetcher::default();
        for number in [5, 900, 30, 31 + 9, 20, 19, 18, 5, 5, 1000] {
            assert_eq!(fault(&mut streams, number, Access::Read), 0, "{number}");
        }
        // Nothing is stored either.
        assert!(streams.known.0.is_empty());
        // Short bands are written, with pages of other threads between them.
        for band in [0, 12, 24, 36] {
            let first = 2000 + band;
            let faulted = access_range(&mut streams, first..first + 3, Access::Write);
            assert_eq!(faulted.len(), 3);
        }
        // A run seen once may not repeat: two bands of one thread.
        assert_eq!(
            access_range(&mut streams, 2000..2006, Access::Write).len(),
            4
        );
        // Reads and writes are separate, and so are memories.
        let mut streams = StreamPrefetcher::default();
        assert_eq!(fault(&mut streams, 1, Access::Read), 0);
        assert_eq!(fault(&mut streams, 2, Access::Write), 0);
        let other = PageId {
            memory: 1,
            number: 2,
        };
        assert_eq!(streams.on_fault(other, Access::Read, false).pages, 0);
        assert_eq!(fault(&mut streams, 2, Access::Read), 2);
    }

    /// Bands are remembered after two uses, with the shorter length; from time to time
    /// they are observed again.
    #[test]
    fn runs_are_remembered_after_two_uses() {
        // A band, a band with what follows it in one thread, and a shorter one.
        for (access, first, more, less) in [
            (Access::Write, 3, &[100, 101, 102, 103][..], 2),
            (Access::Read, 11, &[100, 101, 104, 109, 118], 10),
        ] {
            let mut streams = StreamPrefetcher::default();
            let mut uses = |pages: u32| {
                let faulted = access_range(&mut streams, 100..100 + pages, access);
                // Elsewhere, so that the next band begins a run.
                for other in 0..STREAMS_MAX as u32 {
                    fault(&mut streams, 1_000_000 + 50 * other, access);
                }
                faulted
            };
            assert!(uses(first).len() > 1, "{access:?}");
            assert_eq!(uses(2 * first), more);
            for _ in 0..7 {
                assert_eq!(uses(less), [100], "{access:?}");
            }
            // A shorter run is detected.
            assert!(uses(less).len() > 1, "{access:?}");
            for _ in 0..7 {
                assert_eq!(uses(less), [100], "{access:?}");
            }
        }
        // Short runs of reads are not remembered.
        let mut streams = StreamPrefetcher::default();
        for _ in 0..5 {
            assert_eq!(
                access_range(&mut streams, 100..103, Access::Read),
                [100, 101]
            );
            access_range(&mut streams, 5000..5001, Access::Read);
        }
    }

    /// A thread accesses the same pages repeatedly: the requests grow to the maximum, and
    /// while runs are observed it faults as rarely as the first time.
    #[test]
    fn long_runs_are_requested_at_once() {
        for access in [Access::Read, Access::Write] {
            let mut streams = StreamPrefetcher::default();
            let mut uses =
                || access_range(&mut streams, 1000..1000 + KNOWN_PAGES_MAX + 1, access).len();
            let first = uses();
            assert!(first <= 13, "{access:?}: {first}");
            let turns: Vec<usize> = (0..40).map(|_| uses()).collect();
            assert!(
                turns.iter().all(|faulted| *faulted <= first + 1),
                "{access:?}: {turns:?}"
            );
            let at_once = turns.iter().filter(|faulted| **faulted <= 3).count();
            assert!(at_once >= 20, "{access:?}: {turns:?}");
        }
    }

    /// A remembered run is not prefetched beyond its end.
    #[test]
    fn remembered_runs_end_where_they_ended() {
        let mut streams = StreamPrefetcher::default();
        for _ in 0..2 {
            access_range(&mut streams, 100..110, Access::Read);
            access_range(&mut streams, 50_000..50_001, Access::Read);
        }
        let ahead = streams.on_fault(page(100), Access::Read, false);
        assert!(0 < ahead.pages && ahead.pages < 10, "{ahead:?}");
        assert_eq!(ahead.among, ahead.pages);
    }

    /// All pages were requested in an earlier iteration and have left again: a run that
    /// begins in the middle is prefetched as a new one.
    #[test]
    fn pages_that_left_are_requested_again() {
        for access in [Access::Read, Access::Write] {
            let mut streams = StreamPrefetcher::default();
            streams.on_fault(page(1000), access, false);
            streams.on_requested(page(1000), access, 1256);
            // While a page is in transit nothing more is requested.
            for number in [1003, 1100] {
                assert_eq!(streams.on_fault(page(number), access, true).pages, 0);
            }
            assert!(access_range(&mut streams, 1120..1250, access).len() < 10);
        }
    }

    /// Pieces that one thread took in a row by chance stay separate; those that it takes
    /// in a row each time are joined.
    #[test]
    fn adjacent_runs_are_joined_after_two_times() {
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
    fn threads_have_separate_streams_and_gaps_are_passed() {
        let mut streams = StreamPrefetcher::default();
        for step in 0..3 {
            for thread in 0..8 {
                let at = page(thread * 1000 + step);
                let ahead = streams.on_fault(at, Access::Read, false).pages;
                assert_eq!(ahead > 0, step == 1, "{thread} {step}");
                streams.on_requested(at, Access::Read, at.number + ahead);
            }
        }
        // Pages 4 to 11 are present.
        let mut streams = StreamPrefetcher::default();
        assert_eq!(fault(&mut streams, 2, Access::Read), 0);
        assert_eq!(fault(&mut streams, 3, Access::Read), 2);
        streams.on_requested(page(3), Access::Read, 13);
        assert_eq!(streams.on_fault(page(12), Access::Read, true).pages, 0);
        assert_eq!(fault(&mut streams, 14, Access::Read), 4);
        // The last possible page.
        let last = page(u32::MAX);
        assert_eq!(fault(&mut streams, u32::MAX, Access::Read), 0);
        streams.on_requested(last, Access::Read, u32::MAX);
        assert_eq!(fault(&mut streams, u32::MAX, Access::Read), 0);
    }
}
