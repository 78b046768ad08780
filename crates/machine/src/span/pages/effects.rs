//! What follows from events: what the protocol decides is done to memory, pages in a row
//! at once, and then said.

use super::super::wire::{FrameWriter, PageBytes, PeerMessage, WireError};
use super::{BUCKETS, PAGE, Shared, SpanError, State, WAITED_MAX, locked, offset};
use keel_wasm::coherence::{Access, Command, Event, Message, PageId, PartId};
use keel_wasm::memory::{MemoryError, PAGE_BYTES};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Pages that are said in a row where a thread may wait for them: a record of TLS; and
/// where none does, or only for those before them.
const ROW_ANSWERED: usize = 4;
const ROW_MOVED: usize = 16;

/// Pages of events of which what follows is done and said at once.
const AT_ONCE_PAGES: usize = 128;
/// Of those for whose first somebody waits; then more and more.
const AT_ONCE_FIRST: usize = 8;
const AT_ONCE_GROWS: usize = 4;

/// What comes beside an event.
#[derive(Debug)]
pub(super) enum EventContext {
    Nothing,
    /// Nobody stands there.
    Ahead,
    /// The pages that a message brings.
    Pages(PageBytes),
    /// Who stands.
    Thread {
        /// The OS thread.
        thread: u32,
        /// What of the page it wants: the first byte's place in it.
        byte: u64,
    },
}

/// An event, and what comes beside it.
pub(super) type PendingEvent = (Event, EventContext);

/// How many pages an event is about.
fn pages_of(event: &Event) -> usize {
    match event {
        Event::Message { message, .. } => message.row().map_or(1, |(_, pages)| pages),
        Event::Move { pages, .. } => *pages as usize,
        _ => 1,
    }
}

/// Whether somebody waits for what follows, here or at another part.
fn is_waited_for(event: &Event) -> bool {
    match event {
        Event::Fault { .. } => true,
        Event::Message { message, .. } => match message {
            Message::Want { .. } | Message::Invalidate { .. } => true,
            Message::Fetch { txn, .. } => txn.is_answer,
            _ => false,
        },
        _ => false,
    }
}

/// Pages that came with the event that is looked at.
#[derive(Debug)]
struct ReceivedPages {
    from: PartId,
    first: PageId,
    pages: PageBytes,
    /// Those that are of no more use, bit by bit.
    used: u64,
}

impl ReceivedPages {
    /// Where a page is among them, if it is.
    fn index(&self, page: PageId) -> Option<usize> {
        let at = page.number.checked_sub(self.first.number)? as usize;
        (page.memory == self.first.memory && at < self.pages.pages()).then_some(at)
    }

    fn uses(&mut self, page: PageId) -> Option<usize> {
        let at = self.index(page)?;
        self.used |= 1 << at;
        Some(at)
    }

    /// All of them, if that is what is wanted, or one.
    fn take(&mut self, page: PageId, pages: u32) -> Option<PageBytes> {
        if page == self.first && pages as usize == self.pages.pages() {
            self.used = u64::MAX;
            return Some(self.pages.clone());
        }
        let at = self.uses(page).filter(|_| pages == 1)?;
        Some(self.pages.page(at))
    }

    /// Those that may be of use later.
    fn left(&self) -> impl Iterator<Item = (PageId, PageBytes)> {
        let left = (0..self.pages.pages()).filter(|at| self.used & 1 << at == 0);
        left.map(|at| {
            // (Of a row, which there can be.)
            let number = self.first.number + at as u32;
            let page = PageId {
                number,
                ..self.first
            };
            (page, self.pages.page(at))
        })
    }
}

/// What is to be done to a page.
#[derive(Debug)]
enum PageAction {
    Protect,
    Send(PartId, Message),
    Discard,
    /// With what is allowed, and from whom it came.
    Install(Access, PageBytes, PartId),
    Allow,
    Wake,
}

impl PageAction {
    const SEND: u8 = 1;
    const INSTALL: u8 = 3;

    /// Of one page they are done in this order.
    fn rank(&self) -> u8 {
        match self {
            PageAction::Protect => 0,
            PageAction::Send(..) => PageAction::SEND,
            PageAction::Discard => 2,
            PageAction::Install(..) => PageAction::INSTALL,
            PageAction::Allow => 4,
            PageAction::Wake => 5,
        }
    }
}

/// What follows from events.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// With the first page, and how many they are.
    deeds: Vec<(PageId, u32, PageAction)>,
    /// Of pages in a row, by the first, how many they are, and the rank of the last. None is
    /// in two of them.
    ranks: BTreeMap<PageId, (u32, u8)>,
    came: Option<ReceivedPages>,
    /// What is said, to whom.
    frames: BTreeMap<PartId, FrameWriter>,
    /// There is a new time to wait for.
    is_due: bool,
    /// Steps of which it is said what follows.
    steps: u32,
    /// It is of pages that were asked for behind one at which somebody stands.
    is_behind: bool,
    /// More is to be asked for, as nobody stands there.
    pub(super) is_ahead: bool,
}

impl Effects {
    /// What is said to a part.
    ///
    /// # Errors
    /// [`SpanError::Inconsistent`]; none that there is.
    pub(super) fn to(&mut self, part: PartId) -> Result<&mut FrameWriter, SpanError> {
        Ok(match self.frames.entry(part) {
            Entry::Occupied(frames) => frames.into_mut(),
            Entry::Vacant(none) => none.insert(FrameWriter::new().map_err(unsayable)?),
        })
    }

    /// Says something to a part.
    ///
    /// # Errors
    /// [`SpanError::Inconsistent`], of what cannot be said.
    pub(super) fn put(&mut self, part: PartId, parcel: &PeerMessage) -> Result<(), SpanError> {
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
    SpanError::Inconsistent(error.to_string())
}

/// Pages in a row with which the same is done.
struct PageRun<'a> {
    first: PageId,
    pages: u32,
    deeds: Vec<&'a PageAction>,
}

impl PageRun<'_> {
    fn offset(&self) -> u64 {
        offset(self.first)
    }

    fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES
    }
}

/// Of pages in rising order.
fn runs<'a>(deeds: impl Iterator<Item = &'a (PageId, u32, PageAction)>) -> Vec<PageRun<'a>> {
    let mut rows: Vec<PageRun<'a>> = Vec::new();
    for (page, pages, deed) in deeds {
        match rows.last_mut() {
            Some(row)
                if row.first.memory == page.memory
                    && row.first.number + row.pages == page.number =>
            {
                row.pages += pages;
                row.deeds.push(deed);
            }
            _ => rows.push(PageRun {
                first: *page,
                pages: *pages,
                deeds: vec![deed],
            }),
        }
    }
    rows
}

/// What is said of pages in a row, each as long as it is said at once.
fn said_of(row: &PageRun<'_>, together: impl Fn(&Message) -> usize) -> Vec<(PartId, Message)> {
    // As messages that differ only in which pages they are about, and all their numbers.
    let mut long: Vec<(PartId, Message, Vec<u64>)> = Vec::new();
    for deed in &row.deeds {
        let PageAction::Send(to, message) = deed else {
            continue;
        };
        let mut alike = message.clone();
        let Message::Data {
            page, txn, more, ..
        } = &mut alike
        else {
            continue;
        };
        let mut numbers = vec![txn.number];
        numbers.append(more);
        if let Some((last_to, last, before)) = long.last_mut()
            && let Message::Data {
                page: first,
                txn: first_txn,
                ..
            } = last
        {
            let (own_page, own_number) = (*page, txn.number);
            (*page, txn.number) = (*first, first_txn.number);
            if last_to == to && *last == alike {
                before.append(&mut numbers);
                continue;
            }
            if let Message::Data { page, txn, .. } = &mut alike {
                (*page, txn.number) = (own_page, own_number);
            }
        }
        long.push((*to, alike, numbers));
    }
    let mut said = Vec::new();
    for (to, message, numbers) in long {
        let Some((first, _)) = message.row() else {
            continue;
        };
        let at_once = together(&message);
        for (at, numbers) in numbers.chunks(at_once).enumerate() {
            let mut message = message.clone();
            if let Message::Data {
                page, txn, more, ..
            } = &mut message
                && let [number, rest @ ..] = numbers
            {
                page.number = first.number + (at * at_once) as u32;
                txn.number = *number;
                more.extend_from_slice(rest);
            }
            said.push((to, message));
        }
    }
    said
}

/// Pages in a row, which there can be.
fn row_of(first: PageId, pages: u32) -> impl Iterator<Item = PageId> {
    let numbers = first.number..first.number + pages;
    numbers.map(move |number| PageId { number, ..first })
}

/// So many bytes that are zero.
fn zeros(zeros: &mut Vec<u8>, bytes: usize) -> &[u8] {
    if zeros.len() < bytes {
        zeros.resize(bytes, 0);
    }
    &zeros[..bytes]
}

/// Why pages are not said.
enum SendError {
    Memory(SpanError),
    Wire(WireError),
}

impl From<WireError> for SendError {
    fn from(error: WireError) -> Self {
        SendError::Wire(error)
    }
}

/// How many such pages are said in a row at most: who waits for one waits for all of them.
fn together(message: &Message, is_behind: bool) -> usize {
    match message {
        Message::Data { txn, .. } if txn.is_answer && !is_behind => ROW_ANSWERED,
        _ => ROW_MOVED,
    }
}

impl Shared {
    /// Takes note of events, and does what follows. Of many, some after the other: what
    /// follows of the first is under way while others are looked at, and sooner where
    /// somebody waits for it.
    pub(super) fn step(&self, events: Vec<PendingEvent>) {
        let is_waited_for = events
            .first()
            .is_some_and(|(event, _)| is_waited_for(event));
        let mut at_once = match is_waited_for {
            true => AT_ONCE_FIRST,
            false => AT_ONCE_PAGES,
        };
        let mut is_behind = false;
        let mut events = events.into_iter().peekable();
        loop {
            let (mut some, mut pages) = (Vec::new(), 0);
            while let Some(next) = events.next_if(|_| pages < at_once) {
                pages += pages_of(&next.0);
                some.push(next);
            }
            let mut work = Effects {
                is_behind,
                ..Effects::default()
            };
            let done = {
                let mut state = locked(&self.state);
                self.step_in(&mut state, some, &mut work)
            };
            self.say(done, work);
            if events.peek().is_none() {
                return;
            }
            at_once = AT_ONCE_PAGES.min(AT_ONCE_GROWS * at_once);
            is_behind = is_waited_for;
        }
    }

    /// Asks for pages at which nobody stands, some of those that are to be asked for; whether
    /// there were any. Only of the thread that hears others: what it hears meanwhile comes
    /// first.
    pub(super) fn ask_ahead(&self) -> bool {
        let mut work = Effects::default();
        let done = {
            let mut state = locked(&self.state);
            if state.ahead.is_empty() {
                return false;
            }
            if self.is_settling.load(Ordering::SeqCst) {
                state.ahead.clear();
                return false;
            }
            let some = state.ahead.len().min(AT_ONCE_PAGES);
            let mut some: Vec<(PageId, Access)> = state.ahead.drain(..some).collect();
            some.retain(|(page, access)| !state.is_here(*page, *access));
            let events = some.into_iter();
            let events = events.map(|(page, access)| Event::Fault { page, access });
            let events = events.map(|event| (event, EventContext::Ahead));
            self.step_in(&mut state, events.collect(), &mut work)
        };
        self.say(done, work);
        true
    }

    /// Says what is to be said after a step, or how it failed.
    pub(super) fn say(&self, done: Result<(), SpanError>, work: Effects) {
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
        events: Vec<PendingEvent>,
        work: &mut Effects,
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
        events: Vec<PendingEvent>,
        work: &mut Effects,
    ) -> Result<(), SpanError> {
        for (event, beside) in events {
            if let Event::Message { message, .. } = &event {
                let first = message.segment().map(|segment| PageId {
                    memory: segment.memory,
                    number: segment.number.saturating_mul(self.segment_pages),
                });
                let mut pages = message.pages().chain(first);
                if let Some(page) = pages.find(|page| !self.has(*page)) {
                    return Err(SpanError::Inconsistent(format!(
                        "there is no {page:?} here"
                    )));
                }
            }
            let mut stood = None;
            match (&event, beside) {
                (Event::Fault { .. }, EventContext::Ahead) => {}
                (Event::Fault { page, access }, beside) => {
                    // (Of many at one page one alone says what follows it.)
                    if !state.since.contains_key(page) {
                        let is_asked = state.is_asked(*page);
                        stood = Some((*page, *access, is_asked));
                    }
                    let thread = match beside {
                        EventContext::Thread { thread, byte } => {
                            // (What nobody touched yet may be here all the same.)
                            if !state.is_here(*page, *access) {
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
                    EventContext::Pages(pages),
                ) => {
                    work.came = Some(ReceivedPages {
                        from: *from,
                        first: *page,
                        pages,
                        used: 0,
                    });
                }
                _ => {}
            }
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
            if let Some(came) = work.came.take() {
                let left = came.left().map(|(page, it)| (page, (came.from, it)));
                state.arrived.extend(left);
            }
            if let Some((page, access, is_asked)) = stood {
                self.look_ahead(state, (page, access, is_asked), work)?;
            }
        }
        self.finish(state, work)
    }

    /// What follows a page at which somebody stands is asked for next, where memory is gone
    /// through in order.
    fn look_ahead(
        &self,
        state: &mut State,
        (page, access, is_asked): (PageId, Access, bool),
        work: &mut Effects,
    ) -> Result<(), SpanError> {
        let ahead = state.streams.stands(page, access, is_asked);
        let asked = u32::try_from(state.ahead.len()).unwrap_or(u32::MAX);
        let most = self.limits.ahead_max().saturating_sub(asked);
        let mut wanted = ahead.pages.min(most);
        if wanted == 0 {
            return Ok(());
        }
        let size = self.memory(page.memory)?.memory().size_bytes();
        let (mut until, mut missing) = (page.number, Vec::new());
        for number in page.number.saturating_add(1)..=page.number.saturating_add(ahead.among) {
            let next = PageId { number, ..page };
            if wanted == 0 || offset(next) >= size {
                break;
            }
            until = number;
            if !state.is_here(next, access) {
                wanted -= 1;
                missing.push((next, access));
            }
        }
        state.streams.asked(page, access, until);
        if missing.len() > ROW_ANSWERED {
            state.ahead.extend(missing);
            work.is_ahead = true;
            return Ok(());
        }
        // So few are said with it.
        let now = self.now();
        for (page, access) in missing {
            let event = Event::Fault { page, access };
            for command in state.coherence.step(event, now) {
                self.note(state, command, work)?;
            }
        }
        Ok(())
    }

    /// Notes what is to be done; does what was noted before where the order counts: of
    /// one page.
    fn note(
        &self,
        state: &mut State,
        command: Command,
        work: &mut Effects,
    ) -> Result<(), SpanError> {
        let (page, pages, deed) = match command {
            Command::Send { to, message } => {
                state.traffic.said(to);
                return work.put(to, &PeerMessage::Coherence(message));
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
            Command::Fail { reason } => return Err(SpanError::Inconsistent(reason)),
            Command::SendPages { to, message } => {
                let Some((page, pages)) = message.row() else {
                    return Err(SpanError::Inconsistent(format!("{message:?} has no pages")));
                };
                // (As many as a row has.)
                (page, pages as u32, PageAction::Send(to, message))
            }
            Command::Install {
                page,
                pages,
                access,
            } => {
                let came = work.came.as_mut();
                let came = came.and_then(|came| Some((came.from, came.take(page, pages)?)));
                let came = came.or_else(|| state.arrived.remove(&page).filter(|_| pages == 1));
                let Some((from, bytes)) = came else {
                    let what =
                        format!("{pages} pages from {page:?} on are to be used, and have not come");
                    return Err(SpanError::Inconsistent(what));
                };
                (page, pages, PageAction::Install(access, bytes, from))
            }
            Command::Allow { page } | Command::Wake { page } => {
                if let Some(came) = &mut work.came {
                    came.uses(page);
                }
                state.arrived.remove(&page);
                let allows = matches!(command, Command::Allow { .. });
                (
                    page,
                    1,
                    if allows {
                        PageAction::Allow
                    } else {
                        PageAction::Wake
                    },
                )
            }
            Command::Protect { page, pages } => (page, pages, PageAction::Protect),
            Command::Discard { page, pages } => (page, pages, PageAction::Discard),
        };
        let lets_go_on = matches!(
            deed,
            PageAction::Install(..) | PageAction::Allow | PageAction::Wake
        );
        if lets_go_on && !state.waiting.is_empty() {
            for page in row_of(page, pages) {
                self.grant(state, page);
            }
        }
        // In one step a page is protected, sent and discarded, or something is done with
        // it that lets somebody go on. Rarely both.
        let last = PageId {
            number: page.number + (pages - 1),
            ..page
        };
        let before = work.ranks.range(..=last).next_back();
        let before = before.filter(|(first, (count, _))| {
            first.memory == page.memory && first.number + count > page.number
        });
        if before.is_some_and(|(first, (count, rank))| {
            (*first, *count) != (page, pages) || *rank >= deed.rank()
        }) {
            self.finish(state, work)?;
        }
        work.ranks.insert(page, (pages, deed.rank()));
        work.deeds.push((page, pages, deed));
        Ok(())
    }

    /// Does what was noted, pages in a row at once.
    fn finish(&self, state: &mut State, work: &mut Effects) -> Result<(), SpanError> {
        let failed = |error: MemoryError| SpanError::Memory(error.to_string());
        let mut deeds = std::mem::take(&mut work.deeds);
        work.ranks.clear();
        for (page, pages, deed) in &deeds {
            if !matches!(deed, PageAction::Protect | PageAction::Send(..)) {
                for page in row_of(*page, *pages) {
                    self.changes(state, page)?;
                }
            }
        }
        deeds.sort_by_key(|(page, _, deed)| (deed.rank(), *page));
        let with = |rank: u8| {
            let first = deeds.partition_point(|(_, _, deed)| deed.rank() < rank);
            let those = deeds[first..].iter();
            those.take_while(move |(_, _, deed)| deed.rank() == rank)
        };
        for run in runs(with(PageAction::Protect.rank())) {
            let memory = self.memory(run.first.memory)?;
            memory.protect(run.offset(), run.bytes()).map_err(failed)?;
        }
        for run in runs(with(PageAction::SEND)) {
            let memory = self.memory(run.first.memory)?.memory();
            if let Some(PageAction::Send(to, _)) = run.deeds.first() {
                // (Mostly all go there.)
                work.to(*to)?.reserve(run.pages as usize * PAGE);
            }
            let mut offset = run.offset();
            let together = |message: &Message| together(message, work.is_behind);
            for (to, message) in said_of(&run, together) {
                let read = |pages: usize, bytes: &mut Vec<u8>| {
                    let read = memory.append(offset, pages * PAGE, bytes);
                    offset += pages as u64 * PAGE_BYTES;
                    read.map_err(|error| SendError::Memory(failed(error)))
                };
                let said = work.to(to)?.put_pages(&message, read);
                said.map_err(|error| match error {
                    SendError::Memory(error) => error,
                    SendError::Wire(error) => unsayable(error),
                })?;
                state.traffic.said(to);
            }
        }
        for run in runs(with(PageAction::Discard.rank())) {
            let memory = self.memory(run.first.memory)?;
            memory.discard(run.offset(), run.bytes()).map_err(failed)?;
        }
        for (page, _, deed) in with(PageAction::INSTALL) {
            let PageAction::Install(access, pages, _) = deed else {
                continue;
            };
            let memory = self.memory(page.memory)?;
            let mut offset = offset(*page);
            for (count, bytes) in pages.pieces() {
                let bytes = match bytes {
                    Some(bytes) => bytes,
                    None => zeros(&mut state.zeros, count * PAGE),
                };
                let write = *access == Access::Write;
                memory.install(offset, bytes, write).map_err(failed)?;
                offset += (count * PAGE) as u64;
            }
        }
        for run in runs(with(PageAction::Allow.rank())) {
            let memory = self.memory(run.first.memory)?;
            memory.allow(run.offset(), run.bytes()).map_err(failed)?;
        }
        for run in runs(with(PageAction::Wake.rank())) {
            let memory = self.memory(run.first.memory)?;
            memory.wake(run.offset(), run.bytes()).map_err(failed)?;
        }
        for (page, pages, deed) in &deeds {
            match deed {
                PageAction::Install(access, _, from) => {
                    self.tell_waiting(state);
                    for page in row_of(*page, *pages) {
                        if let Some(keep) = &mut state.keep {
                            keep.came(page, *access);
                        }
                        self.came(state, page, Some(*from));
                    }
                }
                PageAction::Allow => {
                    if let Some(keep) = &mut state.keep {
                        keep.came(*page, Access::Write);
                    }
                    self.tell_waiting(state);
                    self.came(state, *page, None);
                }
                PageAction::Wake => {
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
                PageAction::Discard => {
                    if let Some(keep) = &mut state.keep {
                        row_of(*page, *pages).for_each(|page| keep.left(page));
                    }
                }
                PageAction::Protect | PageAction::Send(..) => {}
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
