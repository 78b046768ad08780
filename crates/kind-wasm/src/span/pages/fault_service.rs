//! The serving thread of a part: serves page faults and reads the connections of all
//! other parts.

use super::super::adaptive_polling::AdaptivePoller;
use super::super::peer::Inbound;
use super::super::wire::PeerMessage;
use super::effects::{EventContext, PendingEvent};
use super::evictor::FAULT_WAIT_MAX;
use super::{FAULTS_MAX, SLEEP_MAX, Shared, SpanError, locked};
use keel_wasm::coherence::{Access, Event, PageId, PartId, PartSet};
use keel_wasm::memory::{MemoryError, PAGE_BYTES, Spanning};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a part that has left waits for the others to close its connections.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval at which waiting faults check for room.
const FULL_POLL_INTERVAL: Duration = Duration::from_micros(500);

impl Shared {
    /// Serves faults and processes messages until the part ends.
    pub(super) fn serve(&self, mut hearing: Vec<Inbound>) {
        let mut poller = AdaptivePoller::default();
        let mut events = Vec::new();
        // Since when faults wait for room.
        let mut full_since = None;
        // Since when this part waits for its connections to be closed.
        let mut left_since = None;
        while !self.over.load(Ordering::Acquire) {
            for part in self.peers.apply_changes(&mut hearing).iter() {
                // It may have reported its memory until now.
                self.limits.forget(part);
            }
            self.peers.end_inbound_of_lost();
            let waits = (self.is_full() || self.cuts.are_behind())
                && full_since.get_or_insert_with(Instant::now).elapsed() < FAULT_WAIT_MAX;
            if !waits {
                full_since = None;
                if let Err(error) = self.take_faults(&mut events) {
                    return self.end(SpanError::Memory(error.to_string()));
                }
            }
            let (mut heard_some, mut noted) = (false, false);
            let mut ended = PartSet::default();
            let mut succeeded = false;
            let home = hearing
                .iter()
                .position(|inbound| inbound.part() == PartId::HOME);
            for inbound in &mut hearing {
                let mut from = inbound.part();
                if succeeded && from == PartId::HOME {
                    // The end of the former home is not a loss any more.
                    continue;
                }
                let parcels = inbound.read().map(std::mem::take);
                match parcels {
                    Ok(mut parcels) => {
                        heard_some |= !parcels.is_empty();
                        let mut counts = !parcels.is_empty();
                        for message in parcels.drain(..) {
                            match message {
                                PeerMessage::Coherence(message) => {
                                    let event = Event::Message { from, message };
                                    events.push((event, EventContext::Nothing));
                                }
                                PeerMessage::Pages(message, pages) => {
                                    let event = Event::Message { from, message };
                                    events.push((event, EventContext::Pages(pages)));
                                }
                                PeerMessage::Time(guest_ns) => self.listener().saw(guest_ns),
                                PeerMessage::Memory(memory) => {
                                    self.limits.record_peer(from, memory)
                                }
                                PeerMessage::Limit(limit) if from == PartId::HOME => {
                                    // A new home announces the limit when all parts know
                                    // it.
                                    self.is_changing_home.store(false, Ordering::Release);
                                    self.limits.announce(limit);
                                }
                                PeerMessage::Limit(_) => {
                                    let reason = "only the home may announce a limit".into();
                                    return self.end(SpanError::Lost { part: from, reason });
                                }
                                PeerMessage::Cut { number, word } => {
                                    if let Err(error) = self.handle_cut_message(from, number, word)
                                    {
                                        return self.end(error);
                                    }
                                }
                                PeerMessage::Ask(number, question) => {
                                    // The query refers to the messages before it.
                                    self.step(std::mem::take(&mut events));
                                    if let Err(error) = self.handle_question(from, number, question)
                                    {
                                        return self.end(error);
                                    }
                                }
                                PeerMessage::Answer(number, answer) => {
                                    if let Err(error) = self.handle_answer(from, number, answer) {
                                        return self.end(error);
                                    }
                                }
                                PeerMessage::Quiescence { number, word } => {
                                    if let Err(error) = self.handle_quiescence(from, number, word) {
                                        return self.end(error);
                                    }
                                }
                                PeerMessage::UnchangedPages(number, same) => {
                                    if let Err(error) =
                                        self.handle_unchanged_pages(from, number, same)
                                    {
                                        return self.end(error);
                                    }
                                }
                                PeerMessage::CutPages { number, pages } => {
                                    let came = self.handle_cut_pages(from, number, pages);
                                    if let Err(error) = came {
                                        return self.end(error);
                                    }
                                }
                                PeerMessage::Gone(part) => {
                                    counts = false;
                                    if let Err(error) = self.handle_gone(from, part) {
                                        return self.end(error);
                                    }
                                }
                                PeerMessage::Succeeded => {
                                    if let Err(error) = self.handle_new_home(inbound) {
                                        return self.end(error);
                                    }
                                    succeeded |= inbound.part() != from;
                                    from = inbound.part();
                                }
                                PeerMessage::Goodbye { part, reason } => {
                                    (counts, ended) = (false, ended.with(from));
                                    self.handle_goodbye(from, part, reason);
                                }
                                PeerMessage::Note(note) => {
                                    noted = true;
                                    if let Err(reason) = self.listener().note(from, &note) {
                                        return self.end(SpanError::Lost { part: from, reason });
                                    }
                                }
                            }
                        }
                        if counts {
                            self.peers.counts(from);
                        }
                        inbound.keep(parcels);
                    }
                    Err(error) => {
                        ended = ended.with(from);
                        // The end of a connection is less precise than a failed write.
                        let failed = self.peers.write_failure(from);
                        self.lost(from, failed.unwrap_or_else(|| error.to_string()));
                    }
                }
            }
            if let Some(home) = home.filter(|_| succeeded) {
                hearing.remove(home);
            }
            // Connections of parts that ended as expected.
            hearing.retain(|inbound| !ended.contains(inbound.part()));
            if self.peers.leaves() {
                let since = left_since.get_or_insert_with(Instant::now);
                if hearing.is_empty() || since.elapsed() > LEAVE_TIMEOUT {
                    return self.end(SpanError::Ended);
                }
            }
            let due = locked(&self.state).due;
            if due.is_some_and(|due| due <= self.now()) {
                locked(&self.state).due = None;
                events.push((Event::Tick, EventContext::Nothing));
            }
            let mut idle = events.is_empty();
            if !idle {
                self.step(std::mem::take(&mut events));
            }
            idle &= !self.prefetch_some();
            if !idle {
                poller.reset();
            }
            if let Err(error) = self.check_quiescence() {
                return self.end(error);
            }
            if !idle {
            } else if heard_some {
                if noted {
                    // Probably the answer that was expected until then.
                    self.answer_expected_until.store(0, Ordering::Release);
                }
                // More data may be decrypted already, for which no socket becomes
                // readable.
                poller.reset();
            } else if !poller
                .should_poll(self.answer_expected_until.load(Ordering::Acquire) > self.now())
                && let Err(error) = self.sleep(&hearing, due, waits)
            {
                return self.end(SpanError::Memory(error.to_string()));
            }
        }
    }

    fn take_faults(&self, events: &mut Vec<PendingEvent>) -> Result<(), MemoryError> {
        for (number, memory) in (0..).zip(&self.memories) {
            for _ in 0..FAULTS_MAX {
                let Some(touch) = memory.next()? else {
                    break;
                };
                let page = PageId {
                    memory: number,
                    // A memory of 64 GiB has 16 Mi pages.
                    number: (touch.page / PAGE_BYTES) as u32,
                };
                let access = match touch.write {
                    true => Access::Write,
                    false => Access::Read,
                };
                let context = EventContext::Thread {
                    thread: touch.thread,
                    byte: touch.byte,
                };
                events.push((Event::Fault { page, access }, context));
            }
        }
        Ok(())
    }

    /// Sleeps until there is work; only for a moment while faults wait for room.
    fn sleep(&self, hearing: &[Inbound], due: Option<u64>, waits: bool) -> std::io::Result<()> {
        let mut wait: Vec<PollFd<'_>> = vec![PollFd::new(&self.wake_signal, PollFlags::IN)];
        let faults = self.memories.iter().map(Spanning::descriptor);
        let faults = faults.take(if waits { 0 } else { usize::MAX });
        wait.extend(faults.map(|fault| PollFd::from_borrowed_fd(fault, PollFlags::IN)));
        wait.extend(
            hearing
                .iter()
                .map(|it| PollFd::new(it.socket(), PollFlags::IN)),
        );
        let most = if waits { FULL_POLL_INTERVAL } else { SLEEP_MAX };
        let rest = due.map_or(most, |due| {
            Duration::from_micros(due.saturating_sub(self.now())).min(most)
        });
        let timeout = Timespec {
            tv_sec: rest.as_secs() as i64,
            tv_nsec: rest.subsec_nanos().into(),
        };
        match poll(&mut wait, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut count = [0; 8];
        // Usually there is nothing to read.
        let _ = rustix::io::read(&self.wake_signal, &mut count);
        Ok(())
    }
}
