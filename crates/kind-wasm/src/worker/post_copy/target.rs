//! The target's side of post-copy: resolves faults of the guest, installs the pages that arrive
//! and requests those that threads wait for. The connection's first messages, up to the
//! resumption of the machine, are read by `worker::target`.

use super::page_set::PageSet;
use super::{locked, lower_priority, passed, shut};
use keel_machine::link::{Hello, Link, LinkError, Message, Purpose, WritePages};
use keel_machine::moves::FillReport;
use keel_machine::worker::PostCopyStatus;
use keel_net::ServerTls;
use keel_wasm::memory::{FaultKind, GuestMemory, MemoryError, PAGE_BYTES, PageFaults, Unavailable};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Bytes mapped for the guest by one call.
const MAP_BYTES: u64 = 1 << 20;
/// Interval at which threads of this module check whether the transfer is complete.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long the source may be disconnected while the machine runs until this is reported.
const DISCONNECTED_PATIENCE: Duration = Duration::from_secs(1);
/// How long the machine has the processors to itself before pages that are present are
/// mapped in the background.
const MAP_AFTER: Duration = Duration::from_millis(5);
/// How long a committed machine waits for the last page names before it requests all
/// pages.
const NAMES_PATIENCE: Duration = Duration::from_millis(200);

/// The target's side of post-copy.
#[derive(Clone)]
pub(in crate::worker) struct PostCopyTarget {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for PostCopyTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filler").finish_non_exhaustive()
    }
}

struct Shared {
    memories: Arc<[Arc<GuestMemory>]>,
    faults: Vec<PageFaults>,
    pages: Mutex<Pages>,
    changed: Condvar,
    done: AtomicBool,
    /// Handles that close the connections in use (background transfer and requested
    /// pages): a new connection of the source means that the old one is dead, whatever
    /// this side observes.
    closers: Mutex<[Option<TcpStream>; 2]>,
}

#[derive(Default)]
struct Pages {
    /// For each memory, the pages that only the source has.
    remote: Vec<PageSet>,
    /// Whether the source has named all of them, or never will.
    all_named: bool,
    names_lost: bool,
    /// Set before the guest may run. From then on `remote` is complete, and a late name
    /// would discard guest writes.
    sealed: bool,
    /// When the guest began to run.
    begun: Option<Instant>,
    /// When a thread began to wait for a page, by memory and page.
    waited: Vec<(u32, u64, Instant)>,
    report: FillReport,
}

impl PostCopyTarget {
    /// From now on guest accesses to these memories are resolved here.
    pub(in crate::worker) fn new(memories: Arc<[Arc<GuestMemory>]>) -> Result<Self, Unavailable> {
        let mut faults = Vec::with_capacity(memories.len());
        for memory in memories.iter() {
            faults.push(PageFaults::start(memory.clone(), true)?);
        }
        let remote = vec![PageSet::default(); memories.len()];
        Ok(PostCopyTarget {
            shared: Arc::new(Shared {
                memories,
                faults,
                pages: Mutex::new(Pages {
                    remote,
                    ..Pages::default()
                }),
                changed: Condvar::new(),
                done: AtomicBool::new(false),
                closers: Mutex::default(),
            }),
        })
    }

    /// Adds pages that the source has kept.
    pub(in crate::worker) fn remote(
        &self,
        memory: u32,
        first_page: u64,
        bits: &[u8],
    ) -> Result<(), LinkError> {
        let mut pages = locked(&self.shared.pages);
        let size = self.shared.memories.get(memory as usize);
        let last = first_page.saturating_add(bits.len() as u64 * 8);
        // Sets are sent in whole words of 64 pages.
        if size.is_none_or(|size| last > size.limit_bytes() / PAGE_BYTES + 64) {
            return Err(LinkError::Message(format!(
                "pages {first_page} to {last} of memory {memory} are outside of it"
            )));
        }
        let Pages { remote, sealed, .. } = &mut *pages;
        if let Some(set) = remote.get_mut(memory as usize)
            && !*sealed
        {
            set.add_message(first_page, bits);
        }
        Ok(())
    }

    /// The source has named all pages that it keeps.
    pub(in crate::worker) fn all_named(&self) {
        locked(&self.shared.pages).all_named = true;
        self.shared.changed.notify_all();
    }

    /// The source will name no further pages.
    pub(in crate::worker) fn names_lost(&self) {
        locked(&self.shared.pages).names_lost = true;
        self.shared.changed.notify_all();
    }

    /// Waits a moment for the last names: the store may tell this node that it owns the
    /// machine earlier than the source does.
    pub(in crate::worker) fn wait_named(&self) {
        let pages = locked(&self.shared.pages);
        let waiting = |pages: &mut Pages| !(pages.all_named || pages.names_lost || pages.sealed);
        drop(
            self.shared
                .changed
                .wait_timeout_while(pages, NAMES_PATIENCE, waiting),
        );
    }

    /// The guest is about to run: from now on absent pages are requested.
    pub(in crate::worker) fn seal(&self) {
        let mut pages = locked(&self.shared.pages);
        if std::mem::replace(&mut pages.sealed, true) || pages.all_named {
            return;
        }
        tracing::warn!("the source did not name all pages that it kept: all are requested");
        for (set, memory) in pages.remote.iter_mut().zip(self.shared.memories.iter()) {
            set.add_bytes(&(0..memory.size_bytes()));
        }
    }

    /// The guest runs from now on.
    pub(in crate::worker) fn start_running(&self) {
        let mut pages = locked(&self.shared.pages);
        pages.begun.get_or_insert_with(Instant::now);
        self.shared.changed.notify_all();
    }

    /// Starts to resolve accesses. `listener` accepts further connections of the source.
    pub(in crate::worker) fn begin(
        &self,
        listener: TcpListener,
        tls: ServerTls,
        expected: Hello,
        tell: impl Fn(PostCopyStatus) + Send + Sync + 'static,
    ) -> std::io::Result<Sender<Link>> {
        let (push, pushes) = channel();
        let (pull, pulls) = channel();
        let (want, wants) = channel();
        let spawn = |name: &str, work: Box<dyn FnOnce(Arc<Shared>) + Send>| {
            let shared = self.shared.clone();
            std::thread::Builder::new()
                .name(name.into())
                .spawn(move || work(shared))
                .map(drop)
        };
        let pushes_in = push.clone();
        spawn(
            "fill-accept",
            Box::new(move |shared| shared.accept(&listener, &tls, &expected, &pushes_in, &pull)),
        )?;
        for memory in 0..self.shared.memories.len() {
            let want = want.clone();
            spawn(
                "fill-faults",
                Box::new(move |shared| shared.answer(memory, &want)),
            )?;
        }
        spawn(
            "fill-pull",
            Box::new(move |shared| shared.request_pages(&wants, &pulls)),
        )?;
        spawn("fill-show", Box::new(|shared| shared.map_all()))?;
        spawn(
            "fill-push",
            Box::new(move |shared| shared.receive(&pushes, &tell)),
        )?;
        Ok(push)
    }
}

impl Shared {
    fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Accepts connections of the source.
    fn accept(
        &self,
        listener: &TcpListener,
        tls: &ServerTls,
        expected: &Hello,
        push: &Sender<Link>,
        pull: &Sender<Link>,
    ) {
        while !self.is_done() {
            let (socket, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let mut ready = [PollFd::new(listener, PollFlags::IN)];
                    let patience = Timespec {
                        tv_sec: 0,
                        tv_nsec: POLL_INTERVAL.subsec_nanos().into(),
                    };
                    // The listener is polled again, whatever the result.
                    let _ = poll(&mut ready, Some(&patience));
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection for pages");
                    std::thread::sleep(POLL_INTERVAL);
                    continue;
                }
            };
            let greeted = socket
                .set_nonblocking(false)
                .map_err(LinkError::from)
                .and_then(|()| Link::accept(socket, tls))
                .and_then(|mut link| match link.receive()? {
                    Message::Hello(hello) if hello.is_like(expected) => Ok((link, hello.purpose)),
                    other => Err(LinkError::Message(format!("{other:?} out of turn"))),
                });
            let sent = match greeted {
                Ok((link, Purpose::Push)) => {
                    self.replace(0, &link);
                    push.send(link).is_ok()
                }
                Ok((link, Purpose::Pull)) => {
                    self.replace(1, &link);
                    pull.send(link).is_ok()
                }
                Ok(_) => true,
                Err(error) => {
                    tracing::warn!(%peer, %error, "rejected a peer");
                    true
                }
            };
            if !sent {
                return;
            }
        }
    }

    /// Closes the connection that a new one replaces.
    fn replace(&self, number: usize, link: &Link) {
        self.end(number);
        locked(&self.closers)[number] = link.closer().ok();
    }

    /// Closes a connection, so that the source reconnects.
    fn end(&self, number: usize) {
        shut(locked(&self.closers)[number].take());
    }

    /// Resolves the faults of one memory.
    fn answer(&self, memory: usize, want: &Sender<(u32, u64)>) {
        while !self.is_done() {
            let fault = match self.faults[memory].wait(POLL_INTERVAL) {
                Ok(Some(fault)) => fault,
                Ok(None) => continue,
                Err(error) => {
                    tracing::error!(%error, "cannot resolve accesses to memory");
                    return;
                }
            };
            let page = fault.page / PAGE_BYTES;
            let mut pages = locked(&self.pages);
            if pages.remote[memory].contains(page) {
                // A second thread that waits for the page is woken with the first.
                pages.waited.push((memory as u32, page, Instant::now()));
                drop(pages);
                if want.send((memory as u32, page)).is_err() {
                    return;
                }
                continue;
            }
            pages.report.local_faults += 1;
            drop(pages);
            let answered = match fault.kind {
                FaultKind::Minor => self.faults[memory].map(fault.page, PAGE_BYTES),
                // Not in the file: never written, or arrived just now.
                FaultKind::Missing => match self.has(memory, fault.page) {
                    true => self.faults[memory].map(fault.page, PAGE_BYTES),
                    false => self.faults[memory].provide_zeros(fault.page, PAGE_BYTES),
                },
            };
            if let Err(error) = answered {
                tracing::error!(%error, page, "cannot map a page");
            }
        }
    }

    /// Whether the file contains a page.
    fn has(&self, memory: usize, at: u64) -> bool {
        self.memories[memory]
            .populated_from(at)
            .is_ok_and(|first| first == Some(at))
    }

    /// Installs pages that are still wanted; returns their number.
    fn install(&self, memory: u32, offset: u64, bytes: &[u8]) -> Result<u64, LinkError> {
        passed("post-copy.page")?;
        let number = memory as usize;
        let (Some(of), Some(faults)) = (self.memories.get(number), self.faults.get(number)) else {
            return Err(LinkError::Message(format!(
                "unexpected pages of memory {memory}"
            )));
        };
        let first = offset / PAGE_BYTES;
        let count = bytes.len() as u64 / PAGE_BYTES;
        let mut new = 0;
        let mut pages = locked(&self.pages);
        let mut at = 0;
        while at < count {
            // A run of pages that are still wanted.
            let mut end = at;
            while end < count && pages.remote[number].contains(first + end) {
                end += 1;
            }
            if end == at {
                at += 1;
                continue;
            }
            let from = offset + at * PAGE_BYTES;
            let piece = &bytes[(at * PAGE_BYTES) as usize..(end * PAGE_BYTES) as usize];
            // Under the lock: no other thread writes these pages, and no access is
            // resolved as if they were absent before they are in place.
            of.write(from, piece).map_err(LinkError::memory)?;
            for page in first + at..first + end {
                pages.remote[number].remove(page);
            }
            faults
                .map_rest(from, piece.len() as u64)
                .map_err(LinkError::memory)?;
            new += end - at;
            at = end;
        }
        let now = Instant::now();
        let Pages { waited, report, .. } = &mut *pages;
        waited.retain(|(of, page, since)| {
            let came = *of == memory && (first..first + count).contains(page);
            if came {
                report.add_latency(now - *since);
            }
            !came
        });
        if pages.remote.iter().all(|set| set.count == 0) {
            self.changed.notify_all();
        }
        Ok(new)
    }

    /// Requests the pages that threads wait for.
    fn request_pages(&self, wants: &Receiver<(u32, u64)>, links: &Receiver<Link>) {
        let mut link: Option<Link> = None;
        let mut open: Vec<(u32, u64)> = Vec::new();
        while !self.is_done() {
            if open.is_empty() {
                match wants.recv_timeout(POLL_INTERVAL) {
                    Ok(want) => open.push(want),
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
            open.extend(wants.try_iter());
            open.dedup();
            {
                let pages = locked(&self.pages);
                open.retain(|(memory, page)| pages.remote[*memory as usize].contains(*page));
            }
            // A new connection replaces one that may be dead.
            if let Some(newer) = links.try_iter().last() {
                link = Some(newer);
            }
            let Some(now) = &mut link else {
                match links.recv_timeout(POLL_INTERVAL) {
                    Ok(new) => link = Some(new),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                continue;
            };
            match self.request_once(now, &open) {
                Ok(new) => {
                    locked(&self.pages).report.pulled_pages += new;
                    open.clear();
                }
                Err(error) => {
                    tracing::warn!(%error, "requested pages do not arrive");
                    self.end(1);
                    link = None;
                }
            }
        }
    }

    fn request_once(&self, link: &mut Link, wanted: &[(u32, u64)]) -> Result<u64, LinkError> {
        if wanted.is_empty() {
            return Ok(0);
        }
        passed("post-copy.wait")?;
        for (memory, page) in wanted {
            link.send(&Message::Pull {
                memory: *memory,
                page: *page,
            })?;
        }
        link.flush()?;
        let mut new = 0;
        for _ in wanted {
            let mut whole = WholePages::default();
            let message = link.receive_pages(&mut |memory, offset, bytes| {
                whole.add(memory, offset, bytes, &mut |memory, offset, bytes| {
                    new += self.install(memory, offset, bytes)?;
                    Ok(())
                })
            })?;
            if message != Message::RoundEnd {
                return Err(LinkError::Message(format!("{message:?} out of turn")));
            }
        }
        Ok(new)
    }

    /// Receives the background transfer, over as many connections as needed.
    fn receive(&self, links: &Receiver<Link>, tell: &dyn Fn(PostCopyStatus)) {
        lower_priority();
        let mut first = true;
        let mut alone_since = None;
        loop {
            let mut link = match links.recv_timeout(POLL_INTERVAL) {
                Ok(link) => link,
                Err(RecvTimeoutError::Timeout) => {
                    // If the source died before it sent the go message, no connection was
                    // lost.
                    if locked(&self.pages).begun.is_some()
                        && alone_since.get_or_insert_with(Instant::now).elapsed()
                            > DISCONNECTED_PATIENCE
                    {
                        tell(PostCopyStatus::SourceLost);
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            alone_since = None;
            tell(PostCopyStatus::Receiving);
            if std::mem::take(&mut first) {
                locked(&self.closers)[0] = link.closer().ok();
            } else {
                locked(&self.pages).report.reconnects += 1;
            }
            match self.receive_from(&mut link) {
                Ok(()) => break,
                // Nothing is missing, so the source is not needed to confirm it.
                Err(_) if locked(&self.pages).remote.iter().all(|set| set.count == 0) => break,
                Err(error) => {
                    tracing::warn!(%error, "the connection for pages is lost; waiting for the source");
                    // A connection closes only with its last handle.
                    self.end(0);
                    tell(PostCopyStatus::SourceLost);
                }
            }
        }
        self.done.store(true, Ordering::Release);
        tell(PostCopyStatus::Done);
    }

    fn receive_from(&self, link: &mut Link) -> Result<(), LinkError> {
        // Pages wanted now: after a lost connection fewer than at first.
        let sets = locked(&self.pages).remote.clone();
        for (memory, set) in (0u32..).zip(&sets) {
            for message in set.messages(memory) {
                link.send(&message)?;
            }
        }
        link.send(&Message::RoundEnd)?;
        link.flush()?;
        let mut whole = WholePages::default();
        let mut new = 0;
        let message = link.receive_pages(&mut |memory, offset, bytes| {
            whole.add(memory, offset, bytes, &mut |memory, offset, bytes| {
                new += self.install(memory, offset, bytes)?;
                Ok(())
            })
        });
        locked(&self.pages).report.pushed_pages += new;
        match message? {
            Message::AllSent => {}
            other => return Err(LinkError::Message(format!("{other:?} out of turn"))),
        }
        let mut pages = locked(&self.pages);
        while pages.remote.iter().any(|set| set.count > 0) {
            let (rest, waited) = self
                .changed
                .wait_timeout(pages, Duration::from_secs(5))
                .unwrap_or_else(|error| error.into_inner());
            pages = rest;
            if waited.timed_out() {
                return Err(LinkError::Message("some pages did not arrive".into()));
            }
        }
        let begun = pages.begun;
        pages.report.micros = begun.map_or(0, |begun| micros(begun.elapsed()));
        let report = pages.report.clone();
        drop(pages);
        passed("post-copy.all")?;
        // The source may end once all pages are mapped: then no access can fail.
        link.send(&Message::Filled(report))?;
        link.flush()
    }

    /// Maps the pages of earlier rounds in the background, so that accesses to them do
    /// not fault.
    fn map_all(&self) {
        lower_priority();
        {
            // Not while the machine is stopped for its move.
            let mut pages = locked(&self.pages);
            while pages.begun.is_none() && !self.is_done() {
                pages = self
                    .changed
                    .wait_timeout(pages, POLL_INTERVAL)
                    .unwrap_or_else(|error| error.into_inner())
                    .0;
            }
        }
        std::thread::sleep(MAP_AFTER);
        for ((number, memory), faults) in self.memories.iter().enumerate().zip(&self.faults) {
            let Ok(ranges) = memory.populated() else {
                continue;
            };
            for range in ranges {
                let mut at = range.start;
                while at < range.end && !self.is_done() {
                    let end = (at + MAP_BYTES).min(range.end);
                    if let Err(error) = self.map_pages(number, faults, at..end) {
                        tracing::debug!(%error, "pages are mapped on first access");
                    }
                    at = end;
                }
            }
        }
    }

    fn map_pages(
        &self,
        number: usize,
        faults: &PageFaults,
        range: Range<u64>,
    ) -> Result<(), MemoryError> {
        let mut at = range.start / PAGE_BYTES;
        let last = range.end / PAGE_BYTES;
        while at < last {
            // Under the lock: pages that are still to arrive must not be mapped.
            let pages = locked(&self.pages);
            let remote = pages.remote[number].run(at, u64::MAX);
            let until = remote.as_ref().map_or(last, |run| run.start.min(last));
            if until > at {
                faults.map_rest(at * PAGE_BYTES, (until - at) * PAGE_BYTES)?;
            }
            at = remote.map_or(last, |run| run.end.max(until));
        }
        Ok(())
    }
}

/// Assembles whole pages from pieces.
#[derive(Debug, Default)]
struct WholePages {
    memory: u32,
    offset: u64,
    bytes: Vec<u8>,
}

impl WholePages {
    /// Adds a piece; passes on the pages that are complete.
    fn add(
        &mut self,
        memory: u32,
        offset: u64,
        bytes: &[u8],
        take: &mut WritePages<'_>,
    ) -> Result<(), LinkError> {
        let page = PAGE_BYTES as usize;
        let follows = memory == self.memory && offset == self.offset + self.bytes.len() as u64;
        if !self.bytes.is_empty() && !follows {
            return Err(LinkError::Message("a page is incomplete".into()));
        }
        if self.bytes.is_empty() {
            if !offset.is_multiple_of(PAGE_BYTES) {
                return Err(LinkError::Message(
                    "a piece does not begin at a page".into(),
                ));
            }
            (self.memory, self.offset) = (memory, offset);
            let whole = bytes.len() / page * page;
            if whole > 0 {
                take(memory, offset, &bytes[..whole])?;
            }
            self.offset += whole as u64;
            self.bytes.extend_from_slice(&bytes[whole..]);
            return Ok(());
        }
        let missing = (page - self.bytes.len()).min(bytes.len());
        self.bytes.extend_from_slice(&bytes[..missing]);
        if self.bytes.len() == page {
            take(self.memory, self.offset, &self.bytes)?;
            self.offset += PAGE_BYTES;
            self.bytes.clear();
            if missing < bytes.len() {
                return self.add(memory, offset + missing as u64, &bytes[missing..], take);
            }
        }
        Ok(())
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_assembled_from_any_pieces() {
        let content: Vec<u8> = (0..5 * PAGE_BYTES).map(|at| (at % 251) as u8).collect();
        for size in [1, 7, 4095, 4096, 4097, 9000, 20480] {
            let mut whole = WholePages::default();
            let mut got = Vec::new();
            let mut at = 0;
            for piece in content.chunks(size) {
                whole
                    .add(0, 8192 + at, piece, &mut |_, offset, bytes| {
                        assert_eq!(offset, 8192 + got.len() as u64);
                        assert!(bytes.len().is_multiple_of(PAGE_BYTES as usize));
                        got.extend_from_slice(bytes);
                        Ok(())
                    })
                    .unwrap();
                at += piece.len() as u64;
            }
            assert_eq!(got, content, "{size}");
        }
        let mut whole = WholePages::default();
        let mut none = |_: u32, _: u64, _: &[u8]| Ok(());
        assert!(whole.add(0, 5, &[1], &mut none).is_err());
        assert!(whole.add(0, 4096, &[1], &mut none).is_ok());
        assert!(whole.add(0, 8192, &[1], &mut none).is_err());
    }
}
