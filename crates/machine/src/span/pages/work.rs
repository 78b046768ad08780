//! What follows from events: what the protocol decides is done to memory, pages in a row
//! at once, and then said.

use super::super::ahead::LOOK_MAX;
use super::super::wire::{Frames, PageBytes, Parcel, WireError};
use super::{BUCKETS, PAGE, Shared, SpanError, State, WAITED_MAX, locked, offset};
use keel_wasm::coherence::{Access, Command, Event, Message, PageId, PartId};
use keel_wasm::memory::{MemoryError, PAGE_BYTES};
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Pages that are said in a row where a thread may wait for them: a record of TLS; and
/// where none does.
const ROW_ANSWERED: usize = 4;
const ROW_MOVED: usize = 16;

/// Events of which what follows is done and said at once.
const EVENTS_MAX: usize = 128;

/// What comes beside an event.
#[derive(Debug)]
pub(super) enum Beside {
    Nothing,
    /// The page that a message brings.
    Page(PageBytes),
    /// Who stands.
    Thread {
        /// The OS thread.
        thread: u32,
        /// What of the page it wants: the first byte's place in it.
        byte: u64,
    },
}

/// An event, and what comes beside it.
pub(super) type Happened = (Event, Beside);

/// What is to be done to a page.
#[derive(Debug)]
enum Deed {
    Protect,
    Send(PartId, Message),
    Discard,
    /// With what is allowed, and from whom it came.
    Install(Access, PageBytes, PartId),
    Allow,
    Wake,
}

impl Deed {
    const SEND: u8 = 1;
    const INSTALL: u8 = 3;

    /// Of one page they are done in this order.
    fn rank(&self) -> u8 {
        match self {
            Deed::Protect => 0,
            Deed::Send(..) => Deed::SEND,
            Deed::Discard => 2,
            Deed::Install(..) => Deed::INSTALL,
            Deed::Allow => 4,
            Deed::Wake => 5,
        }
    }
}

/// What follows from events.
#[derive(Debug, Default)]
pub(super) struct Work {
    deeds: Vec<(PageId, Deed)>,
    /// Of each page the rank of the last.
    ranks: FxHashMap<PageId, u8>,
    /// What is said, to whom.
    frames: BTreeMap<PartId, Frames>,
    /// There is a new time to wait for.
    is_due: bool,
    /// Steps of which it is said what follows.
    steps: u32,
}

impl Work {
    /// What is said to a part.
    ///
    /// # Errors
    /// [`SpanError::Disagree`]; none that there is.
    pub(super) fn to(&mut self, part: PartId) -> Result<&mut Frames, SpanError> {
        Ok(match self.frames.entry(part) {
            Entry::Occupied(frames) => frames.into_mut(),
            Entry::Vacant(none) => none.insert(Frames::new().map_err(unsayable)?),
        })
    }

    /// Says something to a part.
    ///
    /// # Errors
    /// [`SpanError::Disagree`], of what cannot be said.
    pub(super) fn put(&mut self, part: PartId, parcel: &Parcel) -> Result<(), SpanError> {
        self.to(part)?.put(parcel).map_err(unsayable)
    }

    /// Says something of threads to a part.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub(super) fn put_note(&mut self, part: PartId, note: &[u8]) -> Result<(), SpanError> {
        self.to(part)?.put_note(note).map_err(unsayable)
    }
}

fn unsayable(error: WireError) -> SpanError {
    SpanError::Disagree(error.to_string())
}

/// Pages in a row with which the same is done.
struct Row<'a> {
    memory: u32,
    first: u32,
    deeds: Vec<&'a Deed>,
}

impl Row<'_> {
    fn offset(&self) -> u64 {
        u64::from(self.first) * PAGE_BYTES
    }

    fn bytes(&self) -> u64 {
        self.deeds.len() as u64 * PAGE_BYTES
    }
}

/// Of pages in rising order.
fn runs<'a>(pages: impl Iterator<Item = (PageId, &'a Deed)>) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'a>> = Vec::new();
    for (page, deed) in pages {
        match rows.last_mut() {
            Some(row)
                if row.memory == page.memory
                    && row.first + row.deeds.len() as u32 == page.number =>
            {
                row.deeds.push(deed);
            }
            _ => rows.push(Row {
                memory: page.memory,
                first: page.number,
                deeds: vec![deed],
            }),
        }
    }
    rows
}

/// So many bytes that are zero.
fn zeros(zeros: &mut Vec<u8>, bytes: usize) -> &[u8] {
    if zeros.len() < bytes {
        zeros.resize(bytes, 0);
    }
    &zeros[..bytes]
}

/// Why pages are not said.
enum Unsaid {
    Memory(SpanError),
    Wire(WireError),
}

impl From<WireError> for Unsaid {
    fn from(error: WireError) -> Self {
        Unsaid::Wire(error)
    }
}

/// How many of these pages are said in a row at most: who waits for one waits for all of
/// them.
fn together(deeds: &[&Deed]) -> usize {
    match deeds.first() {
        Some(Deed::Send(_, Message::Data { txn, .. })) if txn.is_answer => ROW_ANSWERED,
        _ => ROW_MOVED,
    }
}

impl Shared {
    /// Takes note of events, and does what follows. Of many, some after the other: what
    /// follows of the first is under way while others are looked at.
    pub(super) fn step(&self, events: Vec<Happened>) {
        let mut events = events.into_iter().peekable();
        loop {
            let some = events.by_ref().take(EVENTS_MAX).collect();
            let mut work = Work::default();
            let done = {
                let mut state = locked(&self.state);
                self.step_in(&mut state, some, &mut work)
            };
            self.say(done, work);
            if events.peek().is_none() {
                return;
            }
        }
    }

    /// Says what is to be said after a step, or how it failed.
    pub(super) fn say(&self, done: Result<(), SpanError>, work: Work) {
        let mut done = done;
        for (to, frames) in work.frames {
            // Whatever is in it has happened.
            match frames.finish(self.listener().time()) {
                Ok(frames) => {
                    if let Some(told) = self.others.told(to)
                        && let Err(error) = told.tell(frames)
                    {
                        self.lost_by(&told, error.to_string());
                    }
                }
                Err(error) => done = done.and(Err(unsayable(error))),
            }
        }
        if work.steps > 0 {
            self.unsaid.fetch_sub(work.steps, Ordering::SeqCst);
        }
        // (Whoever waits for all to be said looks when that thread has looked.)
        if work.is_due || self.is_settling.load(Ordering::SeqCst) {
            self.ring();
        }
        if let Err(error) = done
            && !self.over.load(Ordering::Acquire)
        {
            tracing::error!(%error, "a part of a machine cannot go on");
            self.end(error);
        }
    }

    /// As [`Self::step`], under the lock. After an error nothing is said any more: what was
    /// to be done before it is said may not have been done.
    pub(super) fn step_in(
        &self,
        state: &mut State,
        events: Vec<Happened>,
        work: &mut Work,
    ) -> Result<(), SpanError> {
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        work.steps += 1;
        self.unsaid.fetch_add(1, Ordering::Relaxed);
        let done = self.try_step(state, events, work);
        if let Err(error) = &done {
            work.frames.clear();
            state.failure = Some(error.clone());
        }
        done
    }

    fn try_step(
        &self,
        state: &mut State,
        events: Vec<Happened>,
        work: &mut Work,
    ) -> Result<(), SpanError> {
        for (event, beside) in events {
            if let Event::Message { message, .. } = &event {
                let first = message.segment().map(|segment| PageId {
                    memory: segment.memory,
                    number: segment.number.saturating_mul(self.segment_pages),
                });
                let mut pages = message.pages().chain(first);
                if let Some(page) = pages.find(|page| !self.has(*page)) {
                    return Err(SpanError::Disagree(format!("there is no {page:?} here")));
                }
            }
            match (&event, beside) {
                (Event::Fault { page, access }, beside) => {
                    let thread = match beside {
                        Beside::Thread { thread, byte } => {
                            // (What nobody touched yet may be here all the same.)
                            if state
                                .coherence
                                .access(*page)
                                .is_none_or(|has| has < *access)
                            {
                                state.standing.waits(*page, byte, *access, self.now());
                            }
                            Some(thread)
                        }
                        _ => None,
                    };
                    let since = state.since.entry(*page);
                    since.or_insert_with(|| (Instant::now(), thread));
                }
                (
                    Event::Message {
                        from,
                        message: Message::Data { page, .. },
                    },
                    Beside::Page(bytes),
                ) => {
                    state.arrived.insert(*page, (*from, bytes));
                }
                _ => {}
            }
            let stood = match &event {
                Event::Fault { page, access } => Some((*page, *access)),
                _ => None,
            };
            match &event {
                Event::Message { from, .. } => state.traffic.heard(*from),
                Event::Join { part } | Event::Gone { part } => state.traffic.forget(*part),
                Event::Succeeded { by } => state.traffic.rename(*by, PartId::HOME),
                _ => {}
            }
            let now = self.now();
            for command in state.coherence.step(event, now) {
                self.note(state, command, work)?;
            }
            if let Some((page, access)) = stood {
                self.ask_ahead(state, page, access, work)?;
            }
        }
        self.finish(state, work)
    }

    /// Asks for what follows a page at which a thread stands, where memory is gone
    /// through in order.
    fn ask_ahead(
        &self,
        state: &mut State,
        page: PageId,
        access: Access,
        work: &mut Work,
    ) -> Result<(), SpanError> {
        let mut wanted = state.streams.stands(page, access);
        wanted = wanted.min(self.limits.ahead_max());
        if wanted == 0 {
            return Ok(());
        }
        let size = self.memory(page.memory)?.memory().size_bytes();
        let mut until = page.number;
        for number in page.number.saturating_add(1)..=page.number.saturating_add(LOOK_MAX) {
            let next = PageId { number, ..page };
            if wanted == 0 || offset(next) >= size {
                break;
            }
            until = number;
            if state
                .coherence
                .access(next)
                .is_some_and(|has| has >= access)
            {
                continue;
            }
            wanted -= 1;
            let now = self.now();
            let event = Event::Fault { page: next, access };
            for command in state.coherence.step(event, now) {
                self.note(state, command, work)?;
            }
        }
        state.streams.asked(page, access, until);
        Ok(())
    }

    /// Notes what is to be done; does what was noted before where the order counts: of
    /// one page.
    fn note(&self, state: &mut State, command: Command, work: &mut Work) -> Result<(), SpanError> {
        let (page, deed) = match command {
            Command::Send { to, message } => {
                state.traffic.said(to);
                return work.put(to, &Parcel::Message(message));
            }
            Command::TickAt { micros } => {
                let sooner = state.due.is_none_or(|due| micros < due);
                if sooner {
                    state.due = Some(micros);
                    work.is_due = true;
                }
                return Ok(());
            }
            Command::Emptied { part } => {
                state.emptied = state.emptied.with(part);
                self.changed.notify_all();
                return Ok(());
            }
            Command::Fail { reason } => return Err(SpanError::Disagree(reason)),
            Command::SendPage { to, page, message } => (page, Deed::Send(to, message)),
            Command::Install { page, access } => {
                let Some((from, bytes)) = state.arrived.remove(&page) else {
                    let what = format!("{page:?} is to be used, and has not come");
                    return Err(SpanError::Disagree(what));
                };
                (page, Deed::Install(access, bytes, from))
            }
            Command::Allow { page } => {
                state.arrived.remove(&page);
                (page, Deed::Allow)
            }
            Command::Wake { page } => {
                state.arrived.remove(&page);
                (page, Deed::Wake)
            }
            Command::Protect { page } => (page, Deed::Protect),
            Command::Discard { page } => (page, Deed::Discard),
        };
        if matches!(deed, Deed::Install(..) | Deed::Allow | Deed::Wake) {
            self.grant(state, page);
        }
        // In one step a page is protected, sent and discarded, or something is done with
        // it that lets somebody go on. Rarely both.
        let last = work.ranks.insert(page, deed.rank());
        if last.is_some_and(|last| last >= deed.rank()) {
            self.finish(state, work)?;
            work.ranks.insert(page, deed.rank());
        }
        work.deeds.push((page, deed));
        Ok(())
    }

    /// Does what was noted, pages in a row at once.
    fn finish(&self, state: &mut State, work: &mut Work) -> Result<(), SpanError> {
        let failed = |error: MemoryError| SpanError::Memory(error.to_string());
        let mut deeds = std::mem::take(&mut work.deeds);
        work.ranks.clear();
        for (page, deed) in &deeds {
            if !matches!(deed, Deed::Protect | Deed::Send(..)) {
                self.changes(state, *page)?;
            }
        }
        deeds.sort_by_key(|(page, deed)| (deed.rank(), *page));
        let with = |rank: u8| {
            let first = deeds.partition_point(|(_, deed)| deed.rank() < rank);
            let those = deeds[first..].iter();
            those
                .take_while(move |(_, deed)| deed.rank() == rank)
                .map(|(page, deed)| (*page, deed))
        };
        for run in runs(with(Deed::Protect.rank())) {
            let memory = self.memory(run.memory)?;
            memory.protect(run.offset(), run.bytes()).map_err(failed)?;
        }
        for run in runs(with(Deed::SEND)) {
            let memory = self.memory(run.memory)?.memory();
            let (mut deeds, mut offset) = (&run.deeds[..], run.offset());
            if let Some(Deed::Send(to, _)) = deeds.first() {
                // (Mostly all go there.)
                work.to(*to)?.reserve(deeds.len() * PAGE);
            }
            while let Some(Deed::Send(to, _)) = deeds.first() {
                let messages = deeds.iter().map_while(|deed| match deed {
                    Deed::Send(part, message) if part == to => Some(message),
                    _ => None,
                });
                let most = together(deeds);
                let read = |pages: usize, bytes: &mut Vec<u8>| {
                    let read = memory.append(offset, pages * PAGE, bytes);
                    read.map_err(|error| Unsaid::Memory(failed(error)))
                };
                let frames = work.to(*to)?;
                let said = frames.put_pages(messages.take(most), read);
                let count = said.map_err(|error| match error {
                    Unsaid::Memory(error) => error,
                    Unsaid::Wire(error) => unsayable(error),
                })?;
                for _ in 0..count {
                    state.traffic.said(*to);
                }
                deeds = deeds.get(count..).unwrap_or_default();
                offset += (count * PAGE) as u64;
            }
        }
        for run in runs(with(Deed::Discard.rank())) {
            let memory = self.memory(run.memory)?;
            memory.discard(run.offset(), run.bytes()).map_err(failed)?;
        }
        for access in [Access::Read, Access::Write] {
            let those = with(Deed::INSTALL)
                .filter(|(_, deed)| matches!(deed, Deed::Install(with, ..) if *with == access));
            for run in runs(those) {
                let memory = self.memory(run.memory)?;
                let write = access == Access::Write;
                let (mut deeds, mut offset) = (&run.deeds[..], run.offset());
                while !deeds.is_empty() {
                    let pages = deeds.iter().map_while(|deed| match deed {
                        Deed::Install(_, page, _) => Some(page),
                        _ => None,
                    });
                    let (count, bytes) = PageBytes::in_a_row(pages);
                    let bytes = match bytes {
                        Some(bytes) => bytes,
                        None => zeros(&mut state.zeros, count * PAGE),
                    };
                    memory.install(offset, bytes, write).map_err(failed)?;
                    deeds = deeds.get(count.max(1)..).unwrap_or_default();
                    offset += (count * PAGE) as u64;
                }
            }
        }
        for run in runs(with(Deed::Allow.rank())) {
            let memory = self.memory(run.memory)?;
            memory.allow(run.offset(), run.bytes()).map_err(failed)?;
        }
        for run in runs(with(Deed::Wake.rank())) {
            let memory = self.memory(run.memory)?;
            memory.wake(run.offset(), run.bytes()).map_err(failed)?;
        }
        for (page, deed) in &deeds {
            match deed {
                Deed::Install(access, _, from) => {
                    if let Some(keep) = &mut state.keep {
                        keep.came(*page, *access);
                    }
                    self.came(state, *page, Some(*from));
                }
                Deed::Allow => {
                    if let Some(keep) = &mut state.keep {
                        keep.came(*page, Access::Write);
                    }
                    self.came(state, *page, None);
                }
                Deed::Wake => {
                    if let Some(woken) = state.woken.get_mut(page.memory as usize) {
                        woken.insert(page.number);
                    }
                    // It may be the first time that anybody touches it.
                    let access = state.coherence.access(*page);
                    if let (Some(keep), Some(access)) = (&mut state.keep, access)
                        && !keep.knows(*page)
                    {
                        keep.came(*page, access);
                    }
                    state.since.remove(page);
                    self.tell_waiting(state);
                }
                Deed::Discard => {
                    if let Some(keep) = &mut state.keep {
                        keep.left(*page);
                    }
                }
                Deed::Protect | Deed::Send(..) => {}
            }
        }
        Ok(())
    }

    /// A page has come, or who waits for it has: the host's accesses that wait look. (Where
    /// none does that is not said: it is a call of the kernel.)
    fn tell_waiting(&self, state: &State) {
        if !state.waiting.is_empty() || !state.granted.is_empty() {
            self.changed.notify_all();
        }
    }

    /// A page is there: who waits for it goes on.
    fn came(&self, state: &mut State, page: PageId, from: Option<PartId>) {
        self.tell_waiting(state);
        let Some((since, thread)) = state.since.remove(&page) else {
            return;
        };
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let (Some(thread), Some(from)) = (thread, from) {
            // (Of threads that ended nobody asks; there are not many of them.)
            if state.stood_at.len() >= WAITED_MAX {
                state.stood_at.clear();
            }
            let of = state.stood_at.entry(thread).or_default();
            let of = of.entry(from).or_default();
            *of = of.saturating_add(micros);
        }
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }
}
