//! The copies half of a part: states of its copies, pending requests of its threads, and deferred
//! requests of directories.

use super::message::Txn;
use super::page_map::PageMap;
use super::{
    Access, Command, Config, Message, Output, PageId, PartId, PartSet, ProtocolError, pages_from,
};
use std::collections::{BTreeMap, BTreeSet};

/// State of a part's copy of a page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Copy {
    /// No copy.
    #[default]
    Invalid,
    /// Readable; other parts have copies too.
    Shared,
    /// Readable, and supplies the page to others.
    Owned,
    /// The only copy; writable.
    Modified,
}

/// State of a transaction that gives this part a page.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PendingGrant {
    number: u64,
    /// Transaction, access, and number of expected acknowledgements; `None` before that is known.
    given: Option<(Txn, Access, u8)>,
    /// Whether the bytes arrived, or the present copy is valid.
    with_data: bool,
    acks: u8,
}

/// Why a page must stay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Hold {
    until: u64,
    pins: u32,
}

impl Hold {
    fn is_over(&self, now: u64) -> bool {
        self.pins == 0 && self.until <= now
    }
}

/// A run of pages sent in one message.
struct Row {
    page: PageId,
    txn: Txn,
    access: Access,
    acks: u8,
    more: Vec<u64>,
}

impl Row {
    fn pages(&self) -> usize {
        1 + self.more.len()
    }

    /// Each page with its transaction.
    fn each(&self) -> impl Iterator<Item = (PageId, Txn)> {
        let numbers = std::iter::once(self.txn.number).chain(self.more.iter().copied());
        let txns = numbers.map(|number| Txn { number, ..self.txn });
        pages_from(self.page).zip(txns)
    }

    fn data(self) -> Message {
        let Row {
            page,
            txn,
            access,
            acks,
            more,
        } = self;
        Message::Data {
            page,
            txn,
            access,
            acks,
            more,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Copies {
    config: Config,
    /// Copies that are not in their initial state.
    copies: PageMap<Copy>,
    /// Pages requested from directories.
    requested: BTreeSet<PageId>,
    pending: PageMap<PendingGrant>,
    held: PageMap<Hold>,
    /// Deferred fetches of held pages, with their sender; at most one per page, as a page has one
    /// transaction at a time.
    deferred: BTreeMap<PageId, (PartId, Message)>,
    random: u64,
}

impl Copies {
    pub(super) fn new(config: Config) -> Self {
        Copies {
            random: config.seed,
            config,
            copies: PageMap::default(),
            requested: BTreeSet::new(),
            pending: PageMap::default(),
            held: PageMap::default(),
            deferred: BTreeMap::new(),
        }
    }

    /// Sets the current parts.
    pub(super) fn set_parts(&mut self, parts: PartSet) {
        self.config.parts = parts;
    }

    /// States of these pages, which are in ascending order; `Err` with a page that the member has
    /// beyond them.
    pub(super) fn copies_of(
        &self,
        pages: impl Iterator<Item = PageId>,
    ) -> Result<Vec<Copy>, PageId> {
        let here = self.copies.iter();
        let mut here = here
            .filter(|(_, copy)| **copy != Copy::Invalid)
            .map(|(page, copy)| (page, *copy))
            .peekable();
        let mut copies = Vec::new();
        for page in pages {
            if let Some((unknown, _)) = here.next_if(|(at, _)| *at < page) {
                return Err(unknown);
            }
            let copy = here.next_if(|(at, _)| *at == page);
            copies.push(copy.map_or(Copy::Invalid, |(_, copy)| copy));
        }
        match here.next() {
            Some((unknown, _)) => Err(unknown),
            None => Ok(copies),
        }
    }

    /// Makes this part the home: it has these pages in these states, and all pages that were never
    /// touched.
    pub(super) fn take_over_home(
        &mut self,
        parts: PartSet,
        touched: impl Iterator<Item = (PageId, Copy)>,
    ) {
        self.copies = touched.collect();
        self.config.me = PartId::HOME;
        self.config.origin = PartId::HOME;
        self.config.parts = parts;
    }

    pub(super) fn copy(&self, page: PageId) -> Copy {
        let at_first = match self.config.me == self.config.origin {
            true => Copy::Modified,
            false => Copy::Invalid,
        };
        self.copies.get(page).copied().unwrap_or(at_first)
    }

    pub(super) fn entries_from(&self, page: PageId) -> impl Iterator<Item = (PageId, Copy)> {
        let last = PageId {
            memory: u32::MAX,
            number: u32::MAX,
        };
        let those = self.copies.range(page..=last);
        those.map(|(page, copy)| (page, *copy))
    }

    pub(super) fn is_quiescent(&self) -> bool {
        self.requested.is_empty() && self.pending.is_empty() && self.deferred.is_empty()
    }

    pub(super) fn is_requested(&self, page: PageId) -> bool {
        self.requested.contains(&page)
    }

    pub(super) fn is_deferred(&self, page: PageId) -> bool {
        self.deferred.contains_key(&page)
    }

    pub(super) fn can_drop(&self, page: PageId) -> bool {
        self.copy(page) == Copy::Shared
            && !self.requested.contains(&page)
            && self.pending.get(page).is_none()
            && self.held.get(page).is_none_or(|held| held.pins == 0)
    }

    /// A thread faults on a page.
    pub(super) fn fault(
        &mut self,
        page: PageId,
        access: Access,
        directory: PartId,
        out: &mut Output,
    ) {
        let copy = self.copy(page);
        let is_enough = match access {
            Access::Read => copy != Copy::Invalid,
            Access::Write => copy == Copy::Modified,
        };
        if is_enough {
            // The page arrived while the kernel delivered the fault.
            out.command(Command::Wake { page });
            return;
        }
        // A thread that needs more access faults again, and requests it then.
        if self.requested.contains(&page) {
            return;
        }
        self.requested.insert(page);
        let has = copy != Copy::Invalid;
        out.send(directory, Message::Want { page, access, has });
    }

    /// Drops a shared copy.
    pub(super) fn drop_copy(&mut self, page: PageId, out: &mut Output) {
        if self.can_drop(page) {
            self.held.remove(page);
            self.set(page, Copy::Invalid);
            out.command(Command::Discard { page, pages: 1 });
        }
    }

    pub(super) fn pin(&mut self, page: PageId) {
        self.held.or_insert_with(page, Hold::default).pins += 1;
    }

    pub(super) fn unpin(
        &mut self,
        page: PageId,
        now: u64,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        if let Some(held) = self.held.get_mut(page) {
            held.pins = held.pins.saturating_sub(1);
        }
        self.retry(page, now, out)
    }

    /// Executes deferred fetches whose hold time is over.
    pub(super) fn tick(&mut self, now: u64, out: &mut Output) -> Result<(), ProtocolError> {
        let pages: Vec<PageId> = self.deferred.keys().copied().collect();
        for page in pages {
            self.retry(page, now, out)?;
        }
        self.held.retain(|_, held| !held.is_over(now));
        Ok(())
    }

    fn retry(&mut self, page: PageId, now: u64, out: &mut Output) -> Result<(), ProtocolError> {
        match self.deferred.remove(&page) {
            Some((from, message)) => self.release(from, message, now, out),
            None => Ok(()),
        }
    }

    /// Whether a page is held; if so, requests a tick for the end of the hold.
    fn defer_if_held(&mut self, page: PageId, now: u64, out: &mut Output) -> bool {
        match self.held.get(page) {
            Some(held) if !held.is_over(now) => {
                if held.pins == 0 {
                    let micros = held.until;
                    out.command(Command::TickAt { micros });
                }
                true
            }
            _ => {
                self.held.remove(page);
                false
            }
        }
    }

    /// The directory demands that a page, a run or a copy is given up.
    pub(super) fn release(
        &mut self,
        from: PartId,
        message: Message,
        now: u64,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let message = match message {
            Message::Fetch {
                page,
                txn,
                to,
                access,
                acks,
                more,
            } if !more.is_empty() => {
                let row = Row {
                    page,
                    txn,
                    access,
                    acks,
                    more,
                };
                return self.release_run(from, row, to, now, out);
            }
            message => message,
        };
        let (page, takes) = match &message {
            Message::Fetch { txn, .. } if txn.directory != from => {
                return Err(ProtocolError(format!(
                    "part {from} fetches for the directory {}",
                    txn.directory
                )));
            }
            Message::Fetch { page, access, .. } => {
                let writes = self.copy(*page) == Copy::Modified;
                (*page, *access == Access::Write || writes)
            }
            Message::Invalidate { page, .. } => (*page, self.copy(*page) != Copy::Invalid),
            other => return Err(ProtocolError(format!("{other:?} requests no page"))),
        };
        if takes && self.defer_if_held(page, now, out) {
            return match self.deferred.insert(page, (from, message)) {
                None => Ok(()),
                Some((_, earlier)) => Err(ProtocolError(format!(
                    "part {from} takes a page a second time, {earlier:?} is put off"
                ))),
            };
        }
        match message {
            Message::Fetch {
                page,
                txn,
                to,
                access,
                acks,
                ..
            } => {
                let data = Message::Data {
                    page,
                    txn,
                    access,
                    acks,
                    more: Vec::new(),
                };
                self.send_page(page, to, data, access, out)
            }
            Message::Invalidate { page, number, to } => {
                match self.copy(page) {
                    Copy::Modified => {
                        return Err(ProtocolError(format!(
                            "part {from} takes {page:?} for a copy, and it is the only one"
                        )));
                    }
                    Copy::Shared | Copy::Owned => self.set(page, Copy::Invalid),
                    // Already dropped.
                    Copy::Invalid => {
                        out.send(to, Message::Ack { page, number });
                        return Ok(());
                    }
                }
                out.command(Command::Discard { page, pages: 1 });
                out.send(to, Message::Ack { page, number });
                Ok(())
            }
            other => Err(ProtocolError(format!("{other:?} requests no page"))),
        }
    }

    /// Sends a page to another part; if it is to be written there, the copy here becomes invalid.
    fn send_page(
        &mut self,
        page: PageId,
        to: PartId,
        message: Message,
        access: Access,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let copy = self.copy(page);
        let can = matches!(copy, Copy::Owned | Copy::Modified);
        if !can || to == self.config.me || !self.config.parts.contains(to) {
            return Err(ProtocolError(format!(
                "part {to} is to get {page:?} from here, where it is {copy:?}"
            )));
        }
        if copy == Copy::Modified {
            out.command(Command::Protect { page, pages: 1 });
            self.set(page, Copy::Owned);
        }
        out.command(Command::SendPages { to, message });
        if access == Access::Write {
            self.set(page, Copy::Invalid);
            out.command(Command::Discard { page, pages: 1 });
        }
        Ok(())
    }

    /// As [`Self::release`], for a run of pages: in one step if this part alone has all of them,
    /// and none is held.
    fn release_run(
        &mut self,
        from: PartId,
        row: Row,
        to: PartId,
        now: u64,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let mut pages = pages_from(row.page).take(row.pages());
        let can = row.access == Access::Write
            && row.txn.directory == from
            && to != self.config.me
            && self.config.parts.contains(to)
            && pages.all(|page| {
                let held = self.held.get(page);
                self.copy(page) == Copy::Modified && held.is_none_or(|held| held.is_over(now))
            });
        if !can {
            return row.each().try_for_each(|(page, txn)| {
                let one = Message::Fetch {
                    page,
                    txn,
                    to,
                    access: row.access,
                    acks: row.acks,
                    more: Vec::new(),
                };
                self.release(from, one, now, out)
            });
        }
        for page in pages_from(row.page).take(row.pages()) {
            self.held.remove(page);
            self.set(page, Copy::Invalid);
        }
        // (Bounded by the length of a run.)
        let (page, pages) = (row.page, row.pages() as u32);
        out.command(Command::Protect { page, pages });
        let message = row.data();
        out.command(Command::SendPages { to, message });
        out.command(Command::Discard { page, pages });
        Ok(())
    }

    fn set(&mut self, page: PageId, copy: Copy) {
        self.copies.insert(page, copy);
    }

    /// A message that gives this part a page or a run arrived.
    pub(super) fn receive_page(
        &mut self,
        from: PartId,
        message: Message,
        now: u64,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let message = match message {
            Message::Data {
                page,
                txn,
                access,
                acks,
                more,
            } if !more.is_empty() => {
                let row = Row {
                    page,
                    txn,
                    access,
                    acks,
                    more,
                };
                return self.receive_run(from, row, now, out);
            }
            message => message,
        };
        let (page, number) = match &message {
            Message::Grant { page, txn, .. } | Message::Data { page, txn, .. } => {
                (*page, txn.number)
            }
            Message::Ack { page, number } => (*page, *number),
            other => return Err(ProtocolError(format!("{other:?} carries no page"))),
        };
        // (Usually the only message of the transaction.)
        let mut pending = self.pending.remove(page).unwrap_or(PendingGrant {
            number,
            given: None,
            with_data: false,
            acks: 0,
        });
        let is_right = pending.number == number;
        let is_first = pending.given.is_none();
        let is_counted = match message {
            Message::Grant {
                txn, access, acks, ..
            } => {
                pending.given = Some((txn, access, acks));
                is_first && txn.directory == from
            }
            Message::Data {
                txn, access, acks, ..
            } => {
                pending.given = Some((txn, access, acks));
                pending.with_data = true;
                is_first
            }
            _ => {
                pending.acks = pending.acks.saturating_add(1);
                true
            }
        };
        if !is_right || !is_counted {
            return Err(ProtocolError(format!(
                "part {from} speaks of transaction {number} of {page:?}, which is in {}",
                pending.number
            )));
        }
        if let Some((txn, access, _)) = pending.given
            && !self.check_expected(page, txn, access)
        {
            return Err(ProtocolError(format!(
                "part {from} gives {page:?}, which nobody asked for"
            )));
        }
        match pending.given {
            Some((txn, access, acks)) if pending.acks == acks => {
                self.finish(page, txn, access, pending.with_data, now, out)
            }
            Some((_, _, acks)) if pending.acks > acks => Err(ProtocolError(format!(
                "too many acknowledgements for {page:?}"
            ))),
            _ => {
                self.pending.insert(page, pending);
                Ok(())
            }
        }
    }

    /// Checks that an answer was requested, and that a moved page is writable.
    fn check_expected(&self, page: PageId, txn: Txn, access: Access) -> bool {
        let is_requested = match txn.is_answer {
            true => self.requested.contains(&page),
            false => access == Access::Write,
        };
        is_requested && self.config.parts.contains(txn.directory)
    }

    /// As [`Self::receive_page`], for a run of pages: in one step if no further message is
    /// expected, and none is here.
    fn receive_run(
        &mut self,
        from: PartId,
        row: Row,
        now: u64,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let mut pages = pages_from(row.page).take(row.pages());
        let can = row.acks == 0
            && pages.all(|page| {
                self.copy(page) == Copy::Invalid
                    && self.pending.get(page).is_none()
                    && self.check_expected(page, row.txn, row.access)
            });
        if !can {
            return row.each().try_for_each(|(page, txn)| {
                let one = Message::Data {
                    page,
                    txn,
                    access: row.access,
                    acks: row.acks,
                    more: Vec::new(),
                };
                self.receive_page(from, one, now, out)
            });
        }
        let copy = match row.access {
            Access::Read => Copy::Shared,
            Access::Write => Copy::Modified,
        };
        let until = self.hold_until(now);
        for page in pages_from(row.page).take(row.pages()) {
            self.set(page, copy);
            self.page_arrived(page, row.txn, until);
        }
        out.command(Command::Install {
            page: row.page,
            // (Bounded by the length of a run.)
            pages: row.pages() as u32,
            access: row.access,
        });
        let done = Message::Done {
            page: row.page,
            number: row.txn.number,
            more: row.more,
        };
        out.send(row.txn.directory, done);
        Ok(())
    }

    /// Hold deadline of a page that arrives now, if it is held.
    fn hold_until(&mut self, now: u64) -> Option<u64> {
        let span = self.config.hold_micros;
        (span > 0).then(|| now + span + self.next_random() % span)
    }

    /// A page has arrived. It is held if a thread waits for it; a moved page is not.
    fn page_arrived(&mut self, page: PageId, txn: Txn, until: Option<u64>) {
        let is_requested = match txn.is_answer {
            true => self.requested.remove(&page),
            // A pending request is still answered if the page was moved here.
            false => self.requested.contains(&page),
        };
        if let Some(until) = until.filter(|_| is_requested) {
            let held = self.held.or_insert_with(page, Hold::default);
            held.until = held.until.max(until);
        }
    }

    /// The transaction is complete: installs the page and informs the directory.
    fn finish(
        &mut self,
        page: PageId,
        txn: Txn,
        access: Access,
        with_data: bool,
        now: u64,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let before = self.copy(page);
        match (before, access) {
            (Copy::Invalid, _) if !with_data => {
                return Err(ProtocolError(format!(
                    "{page:?} is taken to be here, and is not"
                )));
            }
            (Copy::Invalid, _) => {
                let pages = 1;
                out.command(Command::Install {
                    page,
                    pages,
                    access,
                });
                let copy = match access {
                    Access::Read => Copy::Shared,
                    Access::Write => Copy::Modified,
                };
                self.set(page, copy);
            }
            (Copy::Shared | Copy::Owned, Access::Write) => {
                out.command(Command::AllowWrite { page });
                self.set(page, Copy::Modified);
            }
            (Copy::Shared | Copy::Owned, Access::Read) | (Copy::Modified, _) => {
                out.command(Command::Wake { page });
            }
        }
        let until = self.hold_until(now);
        self.page_arrived(page, txn, until);
        let done = Message::Done {
            page,
            number: txn.number,
            more: Vec::new(),
        };
        out.send(txn.directory, done);
        Ok(())
    }

    /// A pseudo-random number (Steele and others, "Fast splittable pseudorandom number generators",
    /// 2014: SplitMix64).
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}
