//! A machine's memory as objects, each of which the same parts hold; and moving them
//! together with their directories.
//!
//! Only the directory part of a page knows who holds it, and only a part knows what its
//! threads waited for, so the home queries the parts:
//!
//! ```text
//!   home                                   member
//!     │─── Ask (placements, pages in transit, idle ranges,      │
//!     │         pages that threads waited for) ────────────────▶│
//!     │◀── Answer ──────────────────────────────────────────────│
//! ```

use super::super::false_sharing::{self, FaultFootprint, HotPage};
use super::super::idle_pages::IdleRange;
use super::super::messages::{Answer, EXAMINED_MAX, Question};
use super::super::wire::PeerMessage;
use super::effects::{Effects, EventContext, PendingEvent};
use super::host_access::page_of;
use super::{MOVES_MAX, Pages, SLEEP_MAX, Shared, SpanError, locked};
use keel_wasm::coherence::{Event, Holders, PageId, PartId, PartSet, Placement, Segment};
use keel_wasm::memory::PAGE_BYTES;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Pages with waits, or idle ranges, in one answer.
const ENTRIES_MAX: usize = 2048;
/// The time limit for answers that are useful but not required.
const HEAT_TIMEOUT: Duration = Duration::from_secs(4);
/// Answers requested from one part for one report.
const PIECES_MAX: usize = 64;
/// The time limit for a required answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the placements are read again while directories move.
const PLACEMENTS_TRIES: u32 = 3;
/// Pages of a moving object in flight, at most: they occupy memory until they are
/// written, and pages that threads wait for queue behind them.
const IN_TRANSIT_PAGES: u32 = 2048;
/// Polling interval.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// A range of a machine's memory that the same parts hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub memory: u32,
    /// Byte range of whole pages.
    pub range: Range<u64>,
    /// The exclusive holder, or the last writer.
    pub owner: PartId,
    /// Other parts with read copies.
    pub readers: PartSet,
    /// Number of ownership changes of its pages so far.
    pub exchanges: u64,
    /// The part that has its directory.
    pub directory: PartId,
}

/// Recent use of a machine's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heat {
    /// Pages that threads waited for, in rising order.
    pub hot: Vec<HotPage>,
    /// Idle ranges of each part, in rising order, rounded to 64 KiB or more.
    pub idle: BTreeMap<PartId, Vec<IdleRange>>,
}

/// Pages that never changed owner belong to the home, if they are populated.
pub(super) fn objects_of<'a>(
    memory: u32,
    here: &[Range<u64>],
    placed: impl Iterator<Item = &'a Placement>,
) -> Vec<Object> {
    let home = |range: Range<u64>| Object {
        memory,
        range,
        owner: PartId::HOME,
        readers: PartSet::default(),
        exchanges: 0,
        directory: PartId::HOME,
    };
    let mut objects = Vec::new();
    // Bytes of `here` from this offset on are not covered by a placement yet.
    let mut from = 0;
    let rest = |from: u64, to: u64, objects: &mut Vec<Object>| {
        let parts = here
            .iter()
            .map(|range| range.start.max(from)..range.end.min(to));
        objects.extend(parts.filter(|range| !range.is_empty()).map(home));
    };
    for placement in placed {
        let start = u64::from(placement.first) * PAGE_BYTES;
        let end = start + u64::from(placement.pages) * PAGE_BYTES;
        rest(from, start, &mut objects);
        from = end;
        let (owner, readers) = match placement.holders {
            Holders::Owner(owner) => (owner, PartSet::default()),
            Holders::Readers { owner, readers } => (owner, readers.without(owner)),
        };
        objects.push(Object {
            memory,
            range: start..end,
            owner,
            readers,
            exchanges: placement.exchanges,
            directory: placement.directory,
        });
    }
    rest(from, u64::MAX, &mut objects);
    objects
}

impl Shared {
    /// Answers a query of the home.
    ///
    /// # Errors
    /// [`SpanError::Lost`] if the sender is not the home.
    pub(super) fn handle_question(
        &self,
        from: PartId,
        number: u64,
        question: Question,
    ) -> Result<(), SpanError> {
        if from != PartId::HOME {
            let reason = "it sent a query that only the home may send".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        let answer = match question {
            Question::Placements(from) => {
                let state = locked(&self.state);
                let (placements, next) = state.coherence.placements(from, EXAMINED_MAX);
                Answer::Placements(placements, next)
            }
            Question::InTransit { memory, pages, to } => {
                let coherence = &locked(&self.state).coherence;
                let mut pages = pages.take(EXAMINED_MAX);
                let in_transit = pages.find(|number| {
                    let number = *number;
                    let page = PageId { memory, number };
                    !coherence.is_directory_of(page) || coherence.is_moving_to(page, to)
                });
                Answer::InTransit(in_transit)
            }
            Question::FaultWaits(from) => {
                let mut state = locked(&self.state);
                let (waits, next) = state.fault_history.pages(from, ENTRIES_MAX, self.now());
                Answer::FaultWaits(waits, next)
            }
            Question::Idle(memory, from) => {
                let (ranges, next) = locked(&self.idle).ranges((memory, from), ENTRIES_MAX);
                Answer::Idle(ranges, next)
            }
        };
        self.send_to(from, &PeerMessage::Answer(number, answer))
    }

    /// Records an answer; late answers are ignored.
    ///
    /// # Errors
    /// [`SpanError::Lost`] if this part does not send queries.
    pub(super) fn handle_answer(
        &self,
        from: PartId,
        number: u64,
        answer: Answer,
    ) -> Result<(), SpanError> {
        if !self.is_home() {
            let reason = "it sent an answer that was not requested".into();
            return Err(SpanError::Lost { part: from, reason });
        }
        let mut state = locked(&self.state);
        if let Some((part, room)) = state.queries.get_mut(&number)
            && *part == from
        {
            *room = Some(answer);
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Queries a part; `None` if it has left.
    fn query(&self, part: PartId, question: Question) -> Result<Option<Answer>, SpanError> {
        self.query_until(part, question, Instant::now() + ANSWER_TIMEOUT)
    }

    fn query_until(
        &self,
        part: PartId,
        question: Question,
        deadline: Instant,
    ) -> Result<Option<Answer>, SpanError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let number = {
            let mut state = locked(&self.state);
            state.query_count += 1;
            let number = state.query_count;
            state.queries.insert(number, (part, None));
            number
        };
        let reports = self.send_to(part, &PeerMessage::Ask(number, question));
        let mut state = locked(&self.state);
        loop {
            let failure = reports.clone().err().or_else(|| state.failure.clone());
            let has_answered = state
                .queries
                .get(&number)
                .is_none_or(|(_, answer)| answer.is_some());
            let is_late = Instant::now() >= deadline;
            let is_gone = !self.peers.parts().contains(part);
            if failure.is_none() && !has_answered && !is_late && !is_gone {
                state = self.wait_changed(state, SLEEP_MAX);
                continue;
            }
            let answer = state.queries.remove(&number).and_then(|(_, answer)| answer);
            return match (failure, answer) {
                (Some(failure), _) => Err(failure),
                (None, None) if !is_gone => Err(SpanError::NoAnswer { part, patience }),
                (None, answer) => Ok(answer),
            };
        }
    }

    /// Placements of all pages that ever changed owner, in rising order.
    fn placements(&self) -> Result<Vec<Placement>, SpanError> {
        for _ in 0..PLACEMENTS_TRIES {
            let before: Vec<_> = self.directories();
            let all = self.placements_once(&before)?;
            // A directory that moved meanwhile may have been missed.
            if self.directories() == before {
                return Ok(all);
            }
        }
        self.placements_once(&self.directories())
    }

    fn placements_once(
        &self,
        directories: &[(Segment, PartId)],
    ) -> Result<Vec<Placement>, SpanError> {
        let (mut all, mut next) = (Vec::new(), Some(PageId::default()));
        while let Some(from) = next {
            let some = locked(&self.state).coherence.placements(from, EXAMINED_MAX);
            all.extend(some.0);
            next = some.1;
        }
        let parts: PartSet = directories.iter().map(|(_, part)| *part).collect();
        for part in parts.iter() {
            let mut next = Some(PageId::default());
            while let Some(from) = next.take() {
                if let Some(Answer::Placements(some, rest)) =
                    self.query(part, Question::Placements(from))?
                {
                    // Guards against a part that never finishes.
                    next = rest.filter(|rest| *rest > from);
                    all.extend(some);
                }
            }
        }
        Ok(in_order(all))
    }

    /// Recent use of memory; parts that do not answer are left out.
    fn heat(&self) -> Result<Heat, SpanError> {
        let deadline = Instant::now() + HEAT_TIMEOUT;
        let (mut reports, mut idle) = (Vec::new(), BTreeMap::new());
        for part in self.peers.parts().with(self.me()).iter() {
            let heard = self
                .wait_reports(part, deadline, &mut reports)
                .and_then(|()| self.idle_ranges_at(part, deadline));
            match heard {
                Ok(ranges) => drop(idle.insert(part, ranges)),
                Err(SpanError::NoAnswer { part, patience }) => {
                    tracing::debug!(%part, ?patience, "no answer about memory use");
                }
                Err(error) => return Err(error),
            }
        }
        let hot = false_sharing::merged(reports);
        Ok(Heat { hot, idle })
    }

    fn wait_reports(
        &self,
        part: PartId,
        deadline: Instant,
        reports: &mut Vec<(PartId, PageId, FaultFootprint)>,
    ) -> Result<(), SpanError> {
        let mut next = Some(PageId::default());
        for _ in 0..PIECES_MAX {
            let Some(from) = next else { break };
            let (waits, rest) = if part == self.me() {
                let mut state = locked(&self.state);
                state.fault_history.pages(from, ENTRIES_MAX, self.now())
            } else {
                match self.query_until(part, Question::FaultWaits(from), deadline)? {
                    Some(Answer::FaultWaits(waits, rest)) => (waits, rest),
                    _ => break,
                }
            };
            reports.extend(waits.into_iter().map(|(page, waits)| (part, page, waits)));
            next = rest.filter(|rest| *rest > from);
        }
        Ok(())
    }

    fn idle_ranges_at(&self, part: PartId, deadline: Instant) -> Result<Vec<IdleRange>, SpanError> {
        let mut ranges: Vec<IdleRange> = Vec::new();
        let mut next = Some((0, 0));
        for _ in 0..PIECES_MAX {
            let Some(from) = next else { break };
            let (some, rest) = if part == self.me() {
                locked(&self.idle).ranges(from, ENTRIES_MAX)
            } else {
                match self.query_until(part, Question::Idle(from.0, from.1), deadline)? {
                    Some(Answer::Idle(some, rest)) => (some, rest),
                    _ => break,
                }
            };
            for range in some {
                let last = ranges.last();
                let end = last.map_or((0, 0), |it| (it.memory, it.start + it.bytes));
                // Ranges out of order could not be searched.
                let is_sound = range.bytes > 0
                    && range.start.checked_add(range.bytes).is_some()
                    && (range.memory, range.start) >= end;
                if is_sound {
                    ranges.push(range);
                }
            }
            next = rest.filter(|rest| *rest > from);
        }
        Ok(ranges)
    }

    /// The first page of a range that may not have reached its destination, after
    /// examining some of them; the end of the range if all have.
    fn first_in_transit(
        &self,
        memory: u32,
        pages: Range<u32>,
        to: PartId,
    ) -> Result<u32, SpanError> {
        let (part, there) = {
            let state = locked(&self.state);
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let coherence = &state.coherence;
            let mut elsewhere = coherence.directories_in(memory, pages.clone());
            let (part, there) = match elsewhere.next() {
                Some((part, there)) => (Some(part), there),
                None => (None, pages.end..pages.end),
            };
            let mut own = (pages.start..there.start).take(EXAMINED_MAX);
            let in_transit = own.find(|number| {
                let number = *number;
                coherence.is_moving_to(PageId { memory, number }, to)
            });
            let examined = pages.start.saturating_add(EXAMINED_MAX as u32);
            match (in_transit, part) {
                (Some(number), _) => return Ok(number),
                (None, None) => return Ok(examined.min(pages.end)),
                (None, Some(_)) if examined < there.start => return Ok(examined),
                (None, Some(part)) => {
                    // Adjacent segments whose directory is at the same part.
                    let rest = elsewhere.take_while(|(at, _)| *at == part);
                    let mut there = there;
                    for (_, next) in rest {
                        if next.start != there.end || there.len() > EXAMINED_MAX / 2 {
                            break;
                        }
                        there.end = next.end;
                    }
                    (part, there)
                }
            }
        };
        let pages = there.clone();
        match self.query(part, Question::InTransit { memory, pages, to })? {
            Some(Answer::InTransit(Some(number))) => Ok(number.clamp(there.start, there.end)),
            _ => Ok(there.end),
        }
    }
}

/// In rising order, each page once: a directory may have moved between two queries.
fn in_order(mut all: Vec<Placement>) -> Vec<Placement> {
    all.sort_by_key(|placement| (placement.memory, placement.first));
    let mut end = (0, 0);
    all.retain_mut(|placement| {
        let first = u64::from(placement.first);
        let last = first + u64::from(placement.pages);
        let from = match end.0 == placement.memory {
            true => first.max(end.1),
            false => first,
        };
        if from >= last {
            return false;
        }
        // Page numbers have 32 bits.
        (placement.first, placement.pages) = (from as u32, (last - from) as u32);
        end = (placement.memory, last);
        true
    });
    all
}

impl Pages {
    /// The memory of the machine as objects, in rising order. Called at the home.
    ///
    /// # Errors
    /// [`SpanError::Memory`]; [`SpanError::NoAnswer`].
    pub fn objects(&self) -> Result<Vec<Object>, SpanError> {
        let placements = self.shared.placements()?;
        let mut objects = Vec::new();
        for (number, memory) in (0..).zip(&self.shared.memories) {
            let here = memory.memory().populated();
            let here = here.map_err(|error| SpanError::Memory(error.to_string()))?;
            let placed = placements.iter().filter(|it| it.memory == number);
            objects.extend(objects_of(number, &here, placed));
        }
        Ok(objects)
    }

    /// Recent use of the machine's memory, from the parts that answer within some
    /// seconds. Called at the home.
    ///
    /// # Errors
    /// The failure of this part.
    pub fn heat(&self) -> Result<Heat, SpanError> {
        self.shared.heat()
    }

    /// Moves whole pages to a part and waits until each has been there; returns the
    /// number of bytes, from the first on, that have within `patience`. Once all have,
    /// that part becomes the directory of the whole segments among them. Called at the
    /// home.
    ///
    /// # Errors
    /// As [`Self::move_pages`]; [`SpanError::Late`] if no page has arrived in time.
    pub fn move_object(
        &self,
        memory: u32,
        range: Range<u64>,
        to: PartId,
        patience: Duration,
    ) -> Result<u64, SpanError> {
        self.check_move(memory, &range, to)?;
        let (first, last) = (range.start / PAGE_BYTES, range.end.div_ceil(PAGE_BYTES));
        // A memory of 64 GiB has 16 Mi pages.
        let (first, last) = (first as u32, last as u32);
        let (mut number, mut requested) = (first, first);
        let deadline = Instant::now().checked_add(patience);
        while number < last && deadline.is_none_or(|deadline| Instant::now() < deadline) {
            let ahead = number.saturating_add(IN_TRANSIT_PAGES).min(last);
            let more = u64::from(requested) * PAGE_BYTES..u64::from(ahead) * PAGE_BYTES;
            self.move_pages(memory, more, to)?;
            requested = ahead;
            // Pages mostly arrive in order. A page that has left again has been there, so
            // pages that were seen are not examined again: examining all of them each
            // time would delay the transfer.
            number = self
                .shared
                .first_in_transit(memory, number..requested, to)?;
            if number < requested {
                std::thread::sleep(POLL_INTERVAL);
            }
        }
        if number == last {
            self.move_directories(memory, first..last, to);
        } else if number == first {
            let page = PageId {
                memory,
                number: first,
            };
            return Err(SpanError::Late { page, patience });
        }
        Ok(u64::from(number - first) * PAGE_BYTES)
    }

    /// Makes a part the directory of the whole segments among some pages, asynchronously.
    fn move_directories(&self, memory: u32, pages: Range<u32>, to: PartId) {
        let segments = locked(&self.shared.state)
            .coherence
            .segments_in(memory, pages);
        for some in segments.chunks(MOVES_MAX) {
            let events = some.iter().map(|segment| {
                let segment = *segment;
                (Event::MoveDirectory { segment, to }, EventContext::Nothing)
            });
            self.step_unless_cut(events.collect());
        }
    }

    /// Starts to move whole pages to a part; does not wait.
    ///
    /// # Errors
    /// [`SpanError::Memory`] for a range outside the memory, or an unknown part.
    pub fn move_pages(&self, memory: u32, range: Range<u64>, to: PartId) -> Result<(), SpanError> {
        self.check_move(memory, &range, to)?;
        let (first, last) = (range.start / PAGE_BYTES, range.end.div_ceil(PAGE_BYTES));
        for at in (first..last).step_by(MOVES_MAX) {
            let page = page_of(memory, at * PAGE_BYTES)?;
            let pages = (last - at).min(MOVES_MAX as u64) as u32;
            self.step_unless_cut(vec![(
                Event::Move { page, pages, to },
                EventContext::Nothing,
            )]);
        }
        Ok(())
    }

    fn check_move(&self, memory: u32, range: &Range<u64>, to: PartId) -> Result<(), SpanError> {
        let size = self.shared.memory(memory)?.memory().size_bytes();
        if range.end > size || range.start > range.end {
            return Err(SpanError::Memory(format!(
                "bytes {:#x}-{:#x} are outside a memory of {size:#x}",
                range.start, range.end
            )));
        }
        let others = &self.shared.peers;
        if !others.parts().with(self.shared.me()).contains(to) || others.is_joining(to) {
            return Err(SpanError::Memory(format!("there is no part {to}")));
        }
        Ok(())
    }
}

/// Adds the move of a page, joined to the previous one where both are adjacent.
pub(super) fn push_move(events: &mut Vec<PendingEvent>, page: PageId, to: PartId) {
    if let Some((
        Event::Move {
            page: first,
            pages,
            to: before,
        },
        _,
    )) = events.last_mut()
        && *before == to
        && (*pages as usize) < MOVES_MAX
        && first.memory == page.memory
        && first.number.checked_add(*pages) == Some(page.number)
    {
        *pages += 1;
        return;
    }
    let pages = 1;
    events.push((Event::Move { page, pages, to }, EventContext::Nothing));
}

impl Pages {
    /// Processes events, but not during a quiescence.
    fn step_unless_cut(&self, mut events: Vec<PendingEvent>) {
        let mut state = locked(&self.shared.state);
        while state.failure.is_none() && self.shared.is_paused(&state) {
            state = self
                .shared
                .cuts
                .changed
                .wait_timeout(state, SLEEP_MAX)
                .unwrap_or_else(|error| error.into_inner())
                .0;
        }
        if state.directories_pinned {
            events.retain(|(event, _)| !matches!(event, Event::MoveDirectory { .. }));
        }
        let mut all = events.iter();
        state.directories_moved |= all.any(|(it, _)| matches!(it, Event::MoveDirectory { .. }));
        let mut work = Effects::default();
        let done = self.shared.step_locked(&mut state, events, &mut work);
        drop(state);
        self.shared.dispatch(done, work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_placements_are_merged() {
        let row = |first, pages, directory| Placement {
            memory: 0,
            first,
            pages,
            holders: Holders::Owner(PartId::HOME),
            exchanges: 1,
            directory: PartId::new(directory).unwrap(),
        };
        let all = vec![row(16, 24, 1), row(10, 10, 0), row(17, 2, 2), row(50, 1, 0)];
        let rows = in_order(all).into_iter();
        let rows: Vec<_> = rows
            .map(|it| (it.first, it.pages, it.directory.number()))
            .collect();
        assert_eq!(rows, [(10, 10, 0), (20, 20, 1), (50, 1, 0)]);
    }

    #[test]
    fn memory_is_split_into_objects() {
        let part = |number| PartId::new(number).unwrap();
        let at = |page: u64| page * PAGE_BYTES;
        let placed = [
            Placement {
                memory: 0,
                first: 2,
                pages: 2,
                holders: Holders::Owner(part(1)),
                exchanges: 5,
                directory: part(1),
            },
            Placement {
                memory: 0,
                first: 9,
                pages: 1,
                holders: Holders::Readers {
                    owner: part(0),
                    readers: [part(0), part(2)].into_iter().collect(),
                },
                exchanges: 1,
                directory: part(0),
            },
        ];
        // Pages of another part are not populated here.
        let here = [at(0)..at(2), at(4)..at(6), at(9)..at(12)];
        let objects = objects_of(0, &here, placed.iter());
        let reports: Vec<_> = objects
            .iter()
            .map(|it| {
                let pages = it.range.start / PAGE_BYTES..it.range.end / PAGE_BYTES;
                (pages, it.owner.number(), it.readers.len(), it.exchanges)
            })
            .collect();
        let expected = [
            (0..2, 0, 0, 0),
            (2..4, 1, 0, 5),
            (4..6, 0, 0, 0),
            (9..10, 0, 1, 1),
            (10..12, 0, 0, 0),
        ];
        assert_eq!(reports, expected);
        assert_eq!(objects_of(0, &[], [].iter()), []);
    }
}
