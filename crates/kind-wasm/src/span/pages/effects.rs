//! Effects of events: the decisions of the protocol are applied to memory, a run of pages
//! by one call, and then its messages are sent.

use super::super::wire::{FrameWriter, PageBytes, PeerMessage, WireError};
use super::page_runs::{PageAction, ROW_ANSWERED, messages_for, pages_in_run, run_pages_max, runs};
use super::{BUCKETS, PAGE, Shared, SpanError, State, WAITED_MAX, locked, offset};
use keel_wasm::coherence::{Access, Command, Event, Message, PageId, PartId};
use keel_wasm::memory::{MemoryError, PAGE_BYTES};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Pages whose events are applied in one step.
const AT_ONCE_PAGES: usize = 128;
/// The same for a batch whose first page a thread waits for, and the factor by which
/// later steps grow.
const AT_ONCE_FIRST: usize = 8;
const AT_ONCE_GROWS: usize = 4;

/// Data that accompanies an event.
#[derive(Debug)]
pub(super) enum EventContext {
    Nothing,
    /// A prefetch: no thread waits for the page.
    Ahead,
    /// The pages that a message carries.
    Pages(PageBytes),
    /// A faulting thread.
    Thread {
        thread: u32,
        /// Offset of the accessed byte within the page.
        byte: u64,
    },
}

/// An event with its context.
pub(super) type PendingEvent = (Event, EventContext);

/// Number of pages that an event concerns.
fn pages_of(event: &Event) -> usize {
    match event {
        Event::Message { message, .. } => message.run().map_or(1, |(_, pages)| pages),
        Event::Move { pages, .. } => *pages as usize,
        _ => 1,
    }
}

/// Whether a thread waits for the effects of an event, here or at another part.
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

/// Pages that arrived with the current event.
#[derive(Debug)]
struct ReceivedPages {
    from: PartId,
    first: PageId,
    pages: PageBytes,
    /// Pages that need not be kept any longer, as a bit set.
    used: u64,
}

impl ReceivedPages {
    /// Index of a page among them.
    fn index(&self, page: PageId) -> Option<usize> {
        let at = page.number.checked_sub(self.first.number)? as usize;
        (page.memory == self.first.memory && at < self.pages.pages()).then_some(at)
    }

    fn uses(&mut self, page: PageId) -> Option<usize> {
        let at = self.index(page)?;
        self.used |= 1 << at;
        Some(at)
    }

    /// Takes all pages if exactly those are wanted, or a single page.
    fn take(&mut self, page: PageId, pages: u32) -> Option<PageBytes> {
        if page == self.first && pages as usize == self.pages.pages() {
            self.used = u64::MAX;
            return Some(self.pages.clone());
        }
        let at = self.uses(page).filter(|_| pages == 1)?;
        Some(self.pages.page(at))
    }

    /// Pages that may be needed later.
    fn left(&self) -> impl Iterator<Item = (PageId, PageBytes)> {
        let left = (0..self.pages.pages()).filter(|at| self.used & 1 << at == 0);
        left.map(|at| {
            // A run's page numbers do not overflow.
            let number = self.first.number + at as u32;
            let page = PageId {
                number,
                ..self.first
            };
            (page, self.pages.page(at))
        })
    }
}

/// Effects of events that are still to be applied or sent.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// Operations, each with its first page and the number of pages.
    actions: Vec<(PageId, u32, PageAction)>,
    /// For each run, by its first page: its length, and the rank of its last operation.
    /// Runs do not overlap.
    ranks: BTreeMap<PageId, (u32, u8)>,
    received: Option<ReceivedPages>,
    /// Messages by receiver.
    frames: BTreeMap<PartId, FrameWriter>,
    /// A new deadline is set.
    is_due: bool,
    /// Steps whose messages are in `frames`.
    steps: u32,
    /// The events are prefetches.
    is_behind: bool,
    /// Further prefetches are queued.
    pub(super) is_ahead: bool,
}

impl Effects {
    /// The messages to a part.
    ///
    /// # Errors
    /// [`SpanError::Inconsistent`] if a frame cannot be encoded, which does not occur.
    pub(super) fn to(&mut self, part: PartId) -> Result<&mut FrameWriter, SpanError> {
        Ok(match self.frames.entry(part) {
            Entry::Occupied(frames) => frames.into_mut(),
            Entry::Vacant(none) => none.insert(FrameWriter::new().map_err(encode_error)?),
        })
    }

    /// Adds a message to a part.
    ///
    /// # Errors
    /// [`SpanError::Inconsistent`] for a message that cannot be encoded.
    pub(super) fn put(&mut self, part: PartId, message: &PeerMessage) -> Result<(), SpanError> {
        self.to(part)?.put(message).map_err(encode_error)
    }

    /// Adds a note about threads to a part.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub(super) fn put_note(&mut self, part: PartId, note: &[u8]) -> Result<(), SpanError> {
        self.to(part)?.put_note(note).map_err(encode_error)
    }
}

fn encode_error(error: WireError) -> SpanError {
    SpanError::Inconsistent(error.to_string())
}

/// This many zero bytes.
fn zeros(zeros: &mut Vec<u8>, bytes: usize) -> &[u8] {
    if zeros.len() < bytes {
        zeros.resize(bytes, 0);
    }
    &zeros[..bytes]
}

/// Why pages cannot be sent.
enum SendError {
    Memory(SpanError),
    Wire(WireError),
}

impl From<WireError> for SendError {
    fn from(error: WireError) -> Self {
        SendError::Wire(error)
    }
}

impl Shared {
    /// Processes events and applies their effects. A large batch is split, so that the
    /// effects of the first events are under way while the rest is processed; the first
    /// pieces are smaller where a thread waits.
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
                self.step_locked(&mut state, some, &mut work)
            };
            self.dispatch(done, work);
            if events.peek().is_none() {
                return;
            }
            at_once = AT_ONCE_PAGES.min(AT_ONCE_GROWS * at_once);
            is_behind = is_waited_for;
        }
    }

    /// Requests some of the queued prefetches; false if there were none. Called only by
    /// the serving thread, so that incoming messages take precedence.
    pub(super) fn prefetch_some(&self) -> bool {
        let mut work = Effects::default();
        let done = {
            let mut state = locked(&self.state);
            if state.prefetches.is_empty() {
                return false;
            }
            if self.is_quiescing.load(Ordering::SeqCst) {
                state.prefetches.clear();
                return false;
            }
            let some = state.prefetches.len().min(AT_ONCE_PAGES);
            let mut some: Vec<(PageId, Access)> = state.prefetches.drain(..some).collect();
            some.retain(|(page, access)| !state.is_here(*page, *access));
            let events = some.into_iter();
            let events = events.map(|(page, access)| Event::Fault { page, access });
            let events = events.map(|event| (event, EventContext::Ahead));
            self.step_locked(&mut state, events.collect(), &mut work)
        };
        self.dispatch(done, work);
        true
    }

    /// Sends the messages of a step, or ends the part if the step failed.
    pub(super) fn dispatch(&self, done: Result<(), SpanError>, work: Effects) {
        let mut done = done;
        for (to, frames) in work.frames {
            // Every effect contained in it has been applied.
            match frames.finish(self.listener().time()) {
                Ok(frames) => {
                    if let Some(outbound) = self.peers.outbound(to)
                        && let Err(error) = outbound.send(frames)
                    {
                        self.outbound_lost(&outbound, error.to_string());
                    }
                }
                Err(error) => done = done.and(Err(encode_error(error))),
            }
        }
        if work.steps > 0 {
            self.unsent_steps.fetch_sub(work.steps, Ordering::SeqCst);
        }
        // The serving thread checks for quiescence whenever all messages are sent.
        if work.is_due || self.is_quiescing.load(Ordering::SeqCst) {
            self.wake();
        }
        if let Err(error) = done
            && !self.over.load(Ordering::Acquire)
        {
            tracing::error!(%error, "a part of a machine failed");
            self.end(error);
        }
    }

    /// As [`Self::step`], with the lock held. After an error no messages are sent,
    /// because an operation that must precede them may be missing.
    pub(super) fn step_locked(
        &self,
        state: &mut State,
        events: Vec<PendingEvent>,
        work: &mut Effects,
    ) -> Result<(), SpanError> {
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        work.steps += 1;
        self.unsent_steps.fetch_add(1, Ordering::Relaxed);
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
        for (event, context) in events {
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
            match (&event, context) {
                (Event::Fault { .. }, EventContext::Ahead) => {}
                (Event::Fault { page, access }, context) => {
                    // Of several accesses to one page only the first triggers a prefetch.
                    if !state.since.contains_key(page) {
                        let is_asked = state.is_asked(*page);
                        stood = Some((*page, *access, is_asked));
                    }
                    let thread = match context {
                        EventContext::Thread { thread, byte } => {
                            // A page may be present although no thread accessed it yet.
                            if !state.is_here(*page, *access) {
                                state
                                    .fault_history
                                    .record_wait(*page, byte, *access, self.now());
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
                    work.received = Some(ReceivedPages {
                        from: *from,
                        first: *page,
                        pages,
                        used: 0,
                    });
                }
                _ => {}
            }
            match &event {
                Event::Message { from, .. } => state.traffic.count_received(*from),
                Event::Join { part } | Event::PartLeft { part } => state.traffic.forget(*part),
                Event::HomeMigrated { new_home } => state.traffic.rename(*new_home, PartId::HOME),
                _ => {}
            }
            let now = self.now();
            for command in state.coherence.step(event, now) {
                self.note(state, command, work)?;
            }
            if let Some(received) = work.received.take() {
                let left = received
                    .left()
                    .map(|(page, it)| (page, (received.from, it)));
                state.arrived.extend(left);
            }
            if let Some((page, access, is_asked)) = stood {
                self.plan_prefetch(state, (page, access, is_asked), work)?;
            }
        }
        self.finish(state, work)
    }

    /// Queues the pages behind a faulting page for prefetching, where memory is accessed
    /// sequentially.
    fn plan_prefetch(
        &self,
        state: &mut State,
        (page, access, is_asked): (PageId, Access, bool),
        work: &mut Effects,
    ) -> Result<(), SpanError> {
        let ahead = state.streams.on_fault(page, access, is_asked);
        let requested = u32::try_from(state.prefetches.len()).unwrap_or(u32::MAX);
        let most = self.limits.ahead_max().saturating_sub(requested);
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
        state.streams.on_requested(page, access, until);
        if missing.len() > ROW_ANSWERED {
            state.prefetches.extend(missing);
            work.is_ahead = true;
            return Ok(());
        }
        // The first of them are requested in the same message.
        let now = self.now();
        for (page, access) in missing {
            let event = Event::Fault { page, access };
            for command in state.coherence.step(event, now) {
                self.note(state, command, work)?;
            }
        }
        Ok(())
    }

    /// Records an operation. Earlier operations are applied first where they concern the
    /// same page and the order matters.
    fn note(
        &self,
        state: &mut State,
        command: Command,
        work: &mut Effects,
    ) -> Result<(), SpanError> {
        let (page, pages, action) = match command {
            Command::Send { to, message } => {
                state.traffic.count_sent(to);
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
            Command::Evacuated { part } => {
                state.emptied = state.emptied.with(part);
                self.changed.notify_all();
                return Ok(());
            }
            Command::Fail { reason } => return Err(SpanError::Inconsistent(reason)),
            Command::SendPages { to, message } => {
                let Some((page, pages)) = message.run() else {
                    return Err(SpanError::Inconsistent(format!("{message:?} has no pages")));
                };
                // No more than a message contains.
                (page, pages as u32, PageAction::Send(to, message))
            }
            Command::Install {
                page,
                pages,
                access,
            } => {
                let received = work.received.as_mut();
                let received = received
                    .and_then(|received| Some((received.from, received.take(page, pages)?)));
                let received =
                    received.or_else(|| state.arrived.remove(&page).filter(|_| pages == 1));
                let Some((from, bytes)) = received else {
                    let what =
                        format!("{pages} pages from {page:?} on were used before they arrived");
                    return Err(SpanError::Inconsistent(what));
                };
                (page, pages, PageAction::Install(access, bytes, from))
            }
            Command::AllowWrite { page } | Command::Wake { page } => {
                if let Some(received) = &mut work.received {
                    received.uses(page);
                }
                state.arrived.remove(&page);
                let allows = matches!(command, Command::AllowWrite { .. });
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
            action,
            PageAction::Install(..) | PageAction::Allow | PageAction::Wake
        );
        if lets_go_on && !state.waiting.is_empty() {
            for page in pages_in_run(page, pages) {
                self.grant(state, page);
            }
        }
        // One step usually protects, sends and discards a page, or makes it accessible;
        // both rarely occur.
        let last = PageId {
            number: page.number + (pages - 1),
            ..page
        };
        let before = work.ranks.range(..=last).next_back();
        let before = before.filter(|(first, (count, _))| {
            first.memory == page.memory && first.number + count > page.number
        });
        if before.is_some_and(|(first, (count, rank))| {
            (*first, *count) != (page, pages) || *rank >= action.rank()
        }) {
            self.finish(state, work)?;
        }
        work.ranks.insert(page, (pages, action.rank()));
        work.actions.push((page, pages, action));
        Ok(())
    }

    /// Applies the recorded operations, a run of pages by one call.
    fn finish(&self, state: &mut State, work: &mut Effects) -> Result<(), SpanError> {
        let failed = |error: MemoryError| SpanError::Memory(error.to_string());
        let mut actions = std::mem::take(&mut work.actions);
        work.ranks.clear();
        for (page, pages, action) in &actions {
            if !matches!(action, PageAction::Protect | PageAction::Send(..)) {
                for page in pages_in_run(*page, *pages) {
                    self.before_change(state, page)?;
                }
            }
        }
        actions.sort_by_key(|(page, _, action)| (action.rank(), *page));
        let with = |rank: u8| {
            let first = actions.partition_point(|(_, _, action)| action.rank() < rank);
            let those = actions[first..].iter();
            those.take_while(move |(_, _, action)| action.rank() == rank)
        };
        for run in runs(with(PageAction::Protect.rank())) {
            let memory = self.memory(run.first.memory)?;
            memory.protect(run.offset(), run.bytes()).map_err(failed)?;
        }
        for run in runs(with(PageAction::SEND)) {
            let memory = self.memory(run.first.memory)?.memory();
            if let Some(PageAction::Send(to, _)) = run.actions.first() {
                // Usually all pages go to this part.
                work.to(*to)?.reserve(run.pages as usize * PAGE);
            }
            let mut offset = run.offset();
            let together = |message: &Message| run_pages_max(message, work.is_behind);
            for (to, message) in messages_for(&run, together) {
                let read = |pages: usize, bytes: &mut Vec<u8>| {
                    let read = memory.append(offset, pages * PAGE, bytes);
                    offset += pages as u64 * PAGE_BYTES;
                    read.map_err(|error| SendError::Memory(failed(error)))
                };
                let messages = work.to(to)?.put_pages(&message, read);
                messages.map_err(|error| match error {
                    SendError::Memory(error) => error,
                    SendError::Wire(error) => encode_error(error),
                })?;
                state.traffic.count_sent(to);
            }
        }
        for run in runs(with(PageAction::Discard.rank())) {
            let memory = self.memory(run.first.memory)?;
            memory.discard(run.offset(), run.bytes()).map_err(failed)?;
        }
        for (page, _, action) in with(PageAction::INSTALL) {
            let PageAction::Install(access, pages, _) = action else {
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
        for (page, pages, action) in &actions {
            match action {
                PageAction::Install(access, _, from) => {
                    self.notify_waiters(state);
                    for page in pages_in_run(*page, *pages) {
                        if let Some(keep) = &mut state.eviction {
                            keep.arrived(page, *access);
                        }
                        self.page_arrived(state, page, Some(*from));
                    }
                }
                PageAction::Allow => {
                    if let Some(keep) = &mut state.eviction {
                        keep.arrived(*page, Access::Write);
                    }
                    self.notify_waiters(state);
                    self.page_arrived(state, *page, None);
                }
                PageAction::Wake => {
                    if let Some(woken) = state.woken.get_mut(page.memory as usize) {
                        woken.insert(page.number);
                    }
                    // The first access to the page may be this one.
                    let access = state.coherence.access(*page);
                    if let (Some(keep), Some(access)) = (&mut state.eviction, access)
                        && !keep.knows(*page)
                    {
                        keep.arrived(*page, access);
                    }
                    state.since.remove(page);
                    self.notify_waiters(state);
                }
                PageAction::Discard => {
                    if let Some(keep) = &mut state.eviction {
                        pages_in_run(*page, *pages).for_each(|page| keep.departed(page));
                    }
                }
                PageAction::Protect | PageAction::Send(..) => {}
            }
        }
        Ok(())
    }

    /// Wakes host accesses after a page arrived. Skipped where none waits, because it is
    /// a system call.
    fn notify_waiters(&self, state: &State) {
        if !state.waiting.is_empty() || !state.granted.is_empty() {
            self.changed.notify_all();
        }
    }

    /// Records that a page has arrived and its waiters go on.
    fn page_arrived(&self, state: &mut State, page: PageId, from: Option<PartId>) {
        let Some((since, thread)) = state.since.remove(&page) else {
            return;
        };
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let (Some(thread), Some(from)) = (thread, from) {
            // Entries of ended threads are never read; there are few.
            if state.wait_micros.len() >= WAITED_MAX {
                state.wait_micros.clear();
            }
            let of = state.wait_micros.entry(thread).or_default();
            let of = of.entry(from).or_default();
            *of = of.saturating_add(micros);
        }
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }
}
