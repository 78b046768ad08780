//! The source's side of post-copy: sends the pages that the target lacks, those that threads
//! wait for first. It reads pages of a frozen machine; when it is frozen, and which pages are
//! named, is decided by `worker::source`.

use super::page_set::PageSet;
use super::{locked, lower_priority, passed, shut};
use keel_machine::link::{Link, LinkError, Message, Purpose, TargetEndpoint};
use keel_machine::moves::FillReport;
use keel_wasm::memory::{GuestMemory, PAGE_BYTES};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Pages sent for a faulting page: itself and those behind it.
const PULL_PAGES: u64 = 8;
/// Pages per message of the background transfer.
const PUSH_PAGES: u64 = 16;
/// Pause before the source reconnects.
const RECONNECT_DELAY: Duration = Duration::from_millis(100);

/// The source's side of post-copy: sends all pages that the target lacks, until it has
/// them. `first` is the connection of the move, if it is intact; `unsent` is set to the
/// number of bytes left.
pub(in crate::worker) fn serve(
    way: &TargetEndpoint,
    memories: &[Arc<GuestMemory>],
    first: Option<Link>,
    unsent: &AtomicU64,
) -> FillReport {
    lower_priority();
    let mut first = first;
    loop {
        let served = first
            .take()
            .map_or_else(|| way.connect(Purpose::Push), Ok)
            .and_then(|push| serve_once(way, memories, push, unsent));
        match served {
            Ok(report) => return report,
            Err(error) => {
                tracing::warn!(%error, "cannot send pages; retrying");
                std::thread::sleep(RECONNECT_DELAY);
            }
        }
    }
}

fn serve_once(
    way: &TargetEndpoint,
    memories: &[Arc<GuestMemory>],
    mut push: Link,
    unsent: &AtomicU64,
) -> Result<FillReport, LinkError> {
    let done = AtomicBool::new(false);
    let closer = Mutex::new(None);
    let report = passed("post-copy.serve").and_then(|()| {
        let pull = way.connect(Purpose::Pull)?;
        std::thread::scope(|scope| {
            let (done, closer) = (&done, &closer);
            let report = std::thread::Builder::new()
                .name("fill-pull".into())
                .spawn_scoped(scope, move || {
                    serve_requests(way, pull, memories, done, closer)
                })
                .map_err(LinkError::from)
                .and_then(|_| push_all(&mut push, memories, unsent));
            done.store(true, Ordering::Release);
            shut(locked(closer).take());
            report
        })
    });
    if report.is_err() {
        // The target may hold the connection open.
        shut(push.closer().ok());
    }
    report
}

/// Sends requested pages, over as many connections as needed, until the transfer is
/// complete.
fn serve_requests(
    way: &TargetEndpoint,
    first: Link,
    memories: &[Arc<GuestMemory>],
    done: &AtomicBool,
    closer: &Mutex<Option<TcpStream>>,
) {
    let mut link = Some(first);
    while !done.load(Ordering::Acquire) {
        let connected = match link.take() {
            Some(link) => Ok(link),
            None => way.connect(Purpose::Pull),
        };
        match connected {
            Ok(now) => {
                *locked(closer) = now.closer().ok();
                // The transfer may have completed before this handle existed.
                if !done.load(Ordering::Acquire) {
                    answer_requests(now, memories);
                }
            }
            Err(error) => {
                tracing::debug!(%error, "no connection for requested pages");
                std::thread::sleep(RECONNECT_DELAY);
            }
        }
    }
}

fn read(memory: &GuestMemory) -> impl Fn(u64, &mut [u8]) -> Result<(), LinkError> + '_ {
    |at, bytes| memory.read(at, bytes).map_err(LinkError::memory)
}

/// Sends requested pages until the connection closes.
fn answer_requests(mut link: Link, memories: &[Arc<GuestMemory>]) {
    if let Err(error) = link.wait_without_timeout() {
        tracing::debug!(%error, "cannot set a time limit on the connection");
    }
    loop {
        let answered = link.receive().and_then(|message| {
            passed("post-copy.pull")?;
            let Message::Pull { memory, page } = message else {
                return Err(LinkError::Message(format!("{message:?} out of turn")));
            };
            let of = memories.get(memory as usize).ok_or_else(|| {
                LinkError::Message(format!("unexpected pages of memory {memory}"))
            })?;
            let start = page.saturating_mul(PAGE_BYTES);
            let end = of.size_bytes().min(start + PULL_PAGES * PAGE_BYTES);
            link.send_pages(memory, start..end, false, &read(of))?;
            link.send(&Message::RoundEnd)?;
            link.flush()
        });
        if let Err(error) = answered {
            tracing::debug!(%error, "the connection for requested pages is closed");
            return;
        }
    }
}

fn push_all(
    link: &mut Link,
    memories: &[Arc<GuestMemory>],
    unsent: &AtomicU64,
) -> Result<FillReport, LinkError> {
    let mut sets = vec![PageSet::default(); memories.len()];
    loop {
        match link.receive()? {
            Message::Remote {
                memory,
                first_page,
                bits,
            } => match sets.get_mut(memory as usize) {
                Some(set) => set.add_message(first_page, &bits),
                None => {
                    return Err(LinkError::Message(format!(
                        "unexpected pages of memory {memory}"
                    )));
                }
            },
            Message::RoundEnd => break,
            other => return Err(LinkError::Message(format!("{other:?} out of turn"))),
        }
    }
    let all: u64 = sets.iter().map(|set| set.count).sum();
    unsent.store(all * PAGE_BYTES, Ordering::Relaxed);
    for ((number, memory), set) in (0u32..).zip(memories).zip(&sets) {
        let mut at = 0;
        while let Some(run) = set.run(at, PUSH_PAGES) {
            passed("post-copy.push")?;
            unsent.fetch_sub((run.end - run.start) * PAGE_BYTES, Ordering::Relaxed);
            at = run.end;
            let end = (run.end * PAGE_BYTES).min(memory.size_bytes());
            link.send_pages(number, run.start * PAGE_BYTES..end, false, &read(memory))?;
        }
    }
    link.send(&Message::AllSent)?;
    link.flush()?;
    match link.receive()? {
        Message::Filled(report) => Ok(report),
        other => Err(LinkError::Message(format!("{other:?} out of turn"))),
    }
}
