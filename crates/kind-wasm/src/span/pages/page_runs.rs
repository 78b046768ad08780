//! Operations on pages, and runs of adjacent pages with the same one: memory is changed, and data
//! sent, a run at a time.

use super::super::wire::PageBytes;
use super::offset;
use keel_wasm::coherence::{Access, Message, PageId, PartId};
use keel_wasm::memory::PAGE_BYTES;

/// Pages per message: where a thread may wait for them (one TLS record), and where none
/// waits, or only for the page before them.
pub(super) const ROW_ANSWERED: usize = 4;
const ROW_MOVED: usize = 16;

/// An operation on a page.
#[derive(Debug)]
pub(super) enum PageAction {
    Protect,
    Send(PartId, Message),
    Discard,
    /// Access to grant, the content, and its sender.
    Install(Access, PageBytes, PartId),
    Allow,
    Wake,
}

impl PageAction {
    pub(super) const SEND: u8 = 1;
    pub(super) const INSTALL: u8 = 3;

    /// The order in which operations on one page are applied.
    pub(super) fn rank(&self) -> u8 {
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

/// A run of pages with the same operation.
pub(super) struct PageRun<'a> {
    pub(super) first: PageId,
    pub(super) pages: u32,
    pub(super) actions: Vec<&'a PageAction>,
}

impl PageRun<'_> {
    pub(super) fn offset(&self) -> u64 {
        offset(self.first)
    }

    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_BYTES
    }
}

/// Joins adjacent pages to runs; the input is sorted.
pub(super) fn runs<'a>(
    actions: impl Iterator<Item = &'a (PageId, u32, PageAction)>,
) -> Vec<PageRun<'a>> {
    let mut rows: Vec<PageRun<'a>> = Vec::new();
    for (page, pages, action) in actions {
        match rows.last_mut() {
            Some(row)
                if row.first.memory == page.memory
                    && row.first.number + row.pages == page.number =>
            {
                row.pages += pages;
                row.actions.push(action);
            }
            _ => rows.push(PageRun {
                first: *page,
                pages: *pages,
                actions: vec![action],
            }),
        }
    }
    rows
}

/// The data messages for a run of pages, split into messages of the permitted length.
pub(super) fn messages_for(
    row: &PageRun<'_>,
    together: impl Fn(&Message) -> usize,
) -> Vec<(PartId, Message)> {
    // Joined first: messages that differ only in page and transaction number.
    let mut long: Vec<(PartId, Message, Vec<u64>)> = Vec::new();
    for action in &row.actions {
        let PageAction::Send(to, message) = action else {
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
    let mut messages = Vec::new();
    for (to, message, numbers) in long {
        let Some((first, _)) = message.run() else {
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
            messages.push((to, message));
        }
    }
    messages
}

/// The pages of a run; their numbers do not overflow.
pub(super) fn pages_in_run(first: PageId, pages: u32) -> impl Iterator<Item = PageId> {
    let numbers = first.number..first.number + pages;
    numbers.map(move |number| PageId { number, ..first })
}

/// The most pages per message: a thread that waits for one page waits for the whole
/// message.
pub(super) fn run_pages_max(message: &Message, is_behind: bool) -> usize {
    match message {
        Message::Data { txn, .. } if txn.is_answer && !is_behind => ROW_ANSWERED,
        _ => ROW_MOVED,
    }
}
