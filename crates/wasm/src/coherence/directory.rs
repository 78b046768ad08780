//! The directory half of a part: holders of its pages, queued requests, and the known locations of
//! all other directories.

use super::directory_entry::{Entry, incremented};
use super::message::{Holders, Message, PageEntry, Request, Txn};
use super::page_map::PageMap;
use super::{
    Access, Command, Config, Output, PageId, PartId, PartSet, Placement, ProtocolError, Segment,
    pages_from,
};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The largest possible page.
const LAST_PAGE: PageId = PageId {
    memory: u32::MAX,
    number: u32::MAX,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Directory {
    me: PartId,
    parts: PartSet,
    origin: PartId,
    segment_pages: u32,
    entries: PageMap<Entry>,
    /// Number of current transactions.
    under_way: u64,
    /// Segments whose directory is or was not the home, with a version and the directory.
    relocated: BTreeMap<Segment, (u64, PartId)>,
    /// Segments to hand over once they have no transaction.
    departing: BTreeMap<Segment, PartId>,
    /// Parts being evacuated, with the number of remaining pages.
    evacuating: BTreeMap<PartId, u64>,
    /// Parts that have been or are being evacuated, with the new holder: no page goes to them.
    evacuated: BTreeMap<PartId, PartId>,
}

impl Directory {
    pub(super) fn new(config: &Config) -> Self {
        Directory {
            me: config.me,
            parts: config.parts,
            origin: config.origin,
            segment_pages: config.segment_pages.max(1),
            entries: PageMap::default(),
            under_way: 0,
            relocated: BTreeMap::new(),
            departing: BTreeMap::new(),
            evacuating: BTreeMap::new(),
            evacuated: BTreeMap::new(),
        }
    }

    fn segment(&self, page: PageId) -> Segment {
        Segment {
            memory: page.memory,
            number: page.number / self.segment_pages,
        }
    }

    /// Segments that lie completely in a range of pages.
    pub(super) fn segments_in(&self, memory: u32, pages: Range<u32>) -> Vec<Segment> {
        let (first, last) = (
            pages.start.div_ceil(self.segment_pages),
            pages.end / self.segment_pages,
        );
        (first..last)
            .map(|number| Segment { memory, number })
            .collect()
    }

    fn location_of(&self, segment: Segment) -> PartId {
        self.relocated
            .get(&segment)
            .map_or(PartId::HOME, |(_, part)| *part)
    }

    /// The directory of a page, as far as this part knows.
    pub(super) fn directory_of(&self, page: PageId) -> PartId {
        self.location_of(self.segment(page))
    }

    /// Splits a run of pages by directory.
    pub(super) fn directories_of_run(
        &self,
        page: PageId,
        pages: u32,
    ) -> Vec<(PartId, PageId, u32)> {
        let mut rows: Vec<(PartId, PageId, u32)> = Vec::new();
        let mut pages = pages_from(page).take(pages as usize).peekable();
        while let Some(first) = pages.next() {
            let segment = self.segment(first);
            let mut count = 1;
            while pages
                .next_if(|page| self.segment(*page) == segment)
                .is_some()
            {
                count += 1;
            }
            let at = self.location_of(segment);
            match rows.last_mut() {
                Some((last, _, pages)) if *last == at => *pages += count,
                _ => rows.push((at, first, count)),
            }
        }
        rows
    }

    pub(super) fn is_quiescent(&self) -> bool {
        // (Only a departing segment keeps requests queued without a transaction.)
        self.departing.is_empty() && self.under_way == 0
    }

    pub(super) fn has_leaving_parts(&self) -> bool {
        !self.evacuated.is_empty()
    }

    /// Segments whose directory is not the home, as far as this part knows.
    pub(super) fn remote_segments(&self) -> impl Iterator<Item = (Segment, PartId)> {
        let relocated = self.relocated.iter();
        let those = relocated.filter(|(_, (_, at))| *at != PartId::HOME);
        those.map(|(segment, (_, at))| (*segment, *at))
    }

    /// As [`Self::remote_segments`], for a range of pages.
    pub(super) fn remote_segments_in(
        &self,
        memory: u32,
        pages: Range<u32>,
    ) -> impl Iterator<Item = (PartId, Range<u32>)> {
        let size = self.segment_pages;
        let of = |page: u32| Segment {
            memory,
            number: page / size,
        };
        let relocated = self
            .relocated
            .range(of(pages.start)..=of(pages.end.max(pages.start)));
        let those = relocated.filter(|(_, (_, at))| *at != PartId::HOME);
        those.filter_map(move |(segment, (_, at))| {
            let first = segment.number.saturating_mul(size);
            let within = first.max(pages.start)..first.saturating_add(size).min(pages.end);
            (!within.is_empty()).then_some((*at, within))
        })
    }

    /// Whether the home is the directory of all segments, as far as this member knows.
    pub(super) fn is_default(&self) -> bool {
        self.remote_segments().next().is_none()
            && self.entries.is_empty()
            && self.evacuated.is_empty()
    }

    /// Resets all locations: the home is the directory of all segments, and every part knows.
    pub(super) fn reset_locations(&mut self) {
        self.relocated.clear();
    }

    /// All pages that ever changed hands, in ascending order, with holders and number of changes.
    pub(super) fn entries(&self) -> impl Iterator<Item = (PageId, Holders, u64)> {
        let entries = self.entries.iter();
        entries.map(|(page, entry)| (page, entry.holders, entry.number))
    }

    /// Makes this part the home, and the directory of all pages.
    pub(super) fn take_over_home(
        &mut self,
        parts: PartSet,
        entries: impl Iterator<Item = (PageId, Holders, u64)>,
    ) {
        (self.me, self.origin) = (PartId::HOME, PartId::HOME);
        self.parts = parts;
        self.reset_locations();
        let entries = entries.map(|(page, holders, number)| (page, Entry::idle(holders, number)));
        self.entries = entries.collect();
    }

    /// Placements of at most `most` pages starting from one, and the next page, if any.
    pub(super) fn placements(&self, from: PageId, most: usize) -> (Vec<Placement>, Option<PageId>) {
        let mut found: Vec<Placement> = Vec::new();
        for (count, (page, entry)) in self.entries.range(from..=LAST_PAGE).enumerate() {
            if count == most {
                return (found, Some(page));
            }
            if self.directory_of(page) != self.me {
                continue;
            }
            match found.last_mut() {
                Some(last)
                    if last.memory == page.memory
                        && last.first + last.pages == page.number
                        && last.holders == entry.holders =>
                {
                    last.pages += 1;
                    last.exchanges = last.exchanges.saturating_add(entry.number);
                }
                _ => found.push(Placement {
                    memory: page.memory,
                    first: page.number,
                    pages: 1,
                    holders: entry.holders,
                    exchanges: entry.number,
                    directory: self.me,
                }),
            }
        }
        (found, None)
    }

    pub(super) fn holders(&self, page: PageId) -> Option<Holders> {
        if self.directory_of(page) != self.me {
            return None;
        }
        match self.entries.get(page) {
            Some(entry) => entry.busy.is_none().then_some(entry.holders),
            None => Some(Holders::Owner(self.origin)),
        }
    }

    pub(super) fn is_moving_to(&self, page: PageId, to: PartId) -> bool {
        let goes = |request: &Request| *request == Request::Move { to };
        self.entries.get(page).is_some_and(|entry| {
            entry.queue.iter().any(goes) || matches!(entry.busy, Some((part, _)) if part == to)
        })
    }

    fn entry(&mut self, page: PageId) -> &mut Entry {
        let origin = self.origin;
        self.entries
            .or_insert_with(page, || Entry::idle(Holders::Owner(origin), 0))
    }

    /// A request for a page: started immediately, queued after the current transaction, or
    /// forwarded to its present directory.
    pub(super) fn request(
        &mut self,
        page: PageId,
        request: Request,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let at = self.directory_of(page);
        if at != self.me {
            out.send(at, Message::Forward { page, request });
            return Ok(());
        }
        // (The requester had not learned of the departure.)
        if matches!(request, Request::Move { to } if !self.parts.contains(to)) {
            return Ok(());
        }
        self.check(page, &request)?;
        match request {
            Request::Want { part: for_whom, .. } | Request::Move { to: for_whom }
                if self.evacuated.contains_key(&for_whom) =>
            {
                return Ok(());
            }
            _ => {}
        }
        let queue = &mut self.entry(page).queue;
        // (Duplicate moves are merged.)
        if !queue.contains(&request) {
            queue.push_back(request);
        }
        self.start_next(page, out)
    }

    /// Moves a run of pages to a part: pages with one exclusive holder and without a transaction in
    /// batches, the others one by one.
    pub(super) fn move_run(
        &mut self,
        page: PageId,
        pages: u32,
        to: PartId,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let request = Request::Move { to };
        // (The requester had not learned of the departure.)
        if !self.parts.contains(to) {
            return Ok(());
        }
        let me = self.me;
        // Current batch: the holder and its transactions.
        let mut row: Option<(PartId, PageId, Vec<u64>)> = None;
        for page in pages_from(page).take(pages as usize) {
            let segment = self.segment(page);
            let is_here = self.location_of(segment) == me && !self.departing.contains_key(&segment);
            let can = is_here && !self.evacuated.contains_key(&to);
            let entry = self.entry_if(page, can);
            let owner = entry.and_then(|entry| match entry.holders {
                Holders::Owner(owner) if owner != to && entry.is_idle() => Some((owner, entry)),
                _ => None,
            });
            let Some((owner, entry)) = owner else {
                fetch_run(row.take(), me, to, out);
                self.request(page, request, out)?;
                continue;
            };
            entry.number = incremented(entry.number)?;
            entry.busy = Some((to, request));
            entry.asked = PartSet::default().with(owner);
            entry.holders = Holders::Owner(to);
            let number = entry.number;
            self.under_way += 1;
            match &mut row {
                Some((of, _, numbers)) if *of == owner => numbers.push(number),
                _ => {
                    fetch_run(row.take(), me, to, out);
                    row = Some((owner, page, vec![number]));
                }
            }
        }
        fetch_run(row, me, to, out);
        Ok(())
    }

    fn entry_if(&mut self, page: PageId, can: bool) -> Option<&mut Entry> {
        can.then(|| self.entry(page))
    }

    /// A request was forwarded to this part: its requester is informed of the new directory. (It
    /// may have joined after the segment arrived.)
    pub(super) fn forwarded(&mut self, page: PageId, request: &Request, out: &mut Output) {
        let segment = self.segment(page);
        let (Request::Want { part, .. }, Some((version, at))) =
            (request, self.relocated.get(&segment))
        else {
            return;
        };
        if *at == self.me && *part != self.me && self.parts.contains(*part) {
            let version = *version;
            out.send(*part, Message::SegmentAt { segment, version });
        }
    }

    /// Validates a request for a page against the pending ones.
    fn check(&self, page: PageId, request: &Request) -> Result<(), ProtocolError> {
        let is_right = match request {
            Request::Want { part, .. } => {
                // A part with a pending request sends no second one.
                let asks = |queued: &Request| match queued {
                    Request::Want { part: by, .. } => by == part,
                    Request::Move { .. } | Request::Forget { .. } => false,
                };
                let entry = self.entries.get(page);
                let twice = entry.is_some_and(|entry| entry.queue.iter().any(asks));
                self.parts.contains(*part) && !twice
            }
            Request::Move { to } => self.parts.contains(*to),
            Request::Forget { part, to } => {
                self.parts.contains(*part) && self.parts.contains(*to) && part != to
            }
        };
        match is_right {
            true => Ok(()),
            false => Err(ProtocolError(format!("{request:?} of {page:?}"))),
        }
    }

    /// Starts the next request for a page without a transaction.
    fn start_next(&mut self, page: PageId, out: &mut Output) -> Result<(), ProtocolError> {
        let segment = self.segment(page);
        // (The segment may just have been handed over.)
        if self.departing.contains_key(&segment) || self.location_of(segment) != self.me {
            return Ok(());
        }
        let me = self.me;
        loop {
            let entry = self.entry(page);
            if entry.busy.is_some() {
                return Ok(());
            }
            let Some(request) = entry.queue.pop_front() else {
                return Ok(());
            };
            if entry.start_transaction(page, request, me, out)? {
                self.under_way += 1;
                return Ok(());
            }
            self.count_evacuated(request, out);
        }
    }

    pub(super) fn complete(
        &mut self,
        page: PageId,
        number: u64,
        from: PartId,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let entry = self.entry(page);
        let request = match entry.busy {
            Some((to, request)) if to == from && entry.number == number => request,
            busy => {
                return Err(ProtocolError(format!(
                    "part {from} ended transaction {number} of {page:?}, where {busy:?} is under way"
                )));
            }
        };
        entry.busy = None;
        entry.asked = PartSet::default();
        self.under_way = self.under_way.saturating_sub(1);
        self.count_evacuated(request, out);
        self.transfer_if_idle(self.segment(page), out)?;
        self.start_next(page, out)
    }

    /// Updates the evacuation count of a leaving part.
    fn count_evacuated(&mut self, request: Request, out: &mut Output) {
        let Request::Forget { part, .. } = request else {
            return;
        };
        if let Some(evacuated) = self.evacuating.get_mut(&part) {
            *evacuated = evacuated.saturating_sub(1);
            if *evacuated == 0 {
                self.evacuating.remove(&part);
                out.command(Command::Evacuated { part });
            }
        }
    }

    /// Evacuates a part. Its own pending requests are dropped.
    pub(super) fn evacuate(
        &mut self,
        part: PartId,
        to: PartId,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        if self.evacuated.get(&part) == Some(&to) {
            // A repeated request: completion is reported again, or immediately.
            if !self.evacuating.contains_key(&part) {
                out.command(Command::Evacuated { part });
            }
            return Ok(());
        }
        let goes_on = self.parts.contains(to) && !self.evacuated.contains_key(&to);
        if part == to || part == self.origin || self.evacuated.contains_key(&part) || !goes_on {
            return Err(ProtocolError(format!(
                "part {part} gives its pages to {to}"
            )));
        }
        // Evacuation takes precedence over directory moves.
        let staying: Vec<Segment> = std::mem::take(&mut self.departing).into_keys().collect();
        self.evacuated.insert(part, to);
        let mut pages = BTreeSet::new();
        for (page, entry) in self.entries.iter() {
            if entry.involves(part) {
                pages.insert(page);
            }
        }
        // One extra, so that completion waits until all pages were requested.
        self.evacuating.insert(part, pages.len() as u64 + 1);
        for page in &pages {
            self.entry(*page)
                .queue
                .push_back(Request::Forget { part, to });
        }
        let held_back = self.entries.iter().map(|(page, _)| page);
        let staying: Vec<PageId> = held_back
            .filter(|page| staying.contains(&self.segment(*page)))
            .collect();
        for page in pages.into_iter().chain(staying) {
            self.start_next(page, out)?;
        }
        self.count_evacuated(Request::Forget { part, to }, out);
        Ok(())
    }

    /// Sets the current parts.
    pub(super) fn set_parts(&mut self, parts: PartSet) {
        self.parts = parts;
    }

    /// Removes a part.
    ///
    /// # Errors
    /// [`ProtocolError`] if it holds or is about to receive a page.
    pub(super) fn remove_part(&mut self, part: PartId) -> Result<(), ProtocolError> {
        let has = self.entries.iter().any(|(_, entry)| entry.involves(part));
        let is_directory = self.relocated.values().any(|(_, at)| *at == part);
        if has || is_directory || part == self.origin || self.evacuating.contains_key(&part) {
            return Err(ProtocolError(format!("part {part} leaves with pages")));
        }
        self.evacuated.remove(&part);
        Ok(())
    }

    // ── other directories ───────────────────────────────────────────────

    /// Requests that a segment's directory moves: it is handed over once the segment has no
    /// transaction, or the request is passed to its directory. Ignored while parts leave, and if
    /// the target is not a part: the requester had not learned of its departure.
    pub(super) fn hand_over(
        &mut self,
        segment: Segment,
        to: PartId,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        self.check_segment(segment)?;
        let at = self.location_of(segment);
        if at == to || !self.parts.contains(to) {
            return Ok(());
        }
        if at != self.me {
            out.send(at, Message::Hand { segment, to });
        } else if self.evacuated.is_empty() {
            self.departing.insert(segment, to);
            self.transfer_if_idle(segment, out)?;
        }
        Ok(())
    }

    /// Returns all segments of this directory to the home.
    pub(super) fn return_segments(&mut self, out: &mut Output) -> Result<(), ProtocolError> {
        if self.me == PartId::HOME {
            return Ok(());
        }
        let relocated = self.relocated.iter();
        let own = relocated.filter(|(_, (_, at))| *at == self.me);
        for segment in own.map(|(segment, _)| *segment).collect::<Vec<_>>() {
            self.departing.insert(segment, PartId::HOME);
            self.transfer_if_idle(segment, out)?;
        }
        Ok(())
    }

    /// Hands over a departing segment if it has no transaction.
    fn transfer_if_idle(
        &mut self,
        segment: Segment,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        let Some(to) = self.departing.get(&segment).copied() else {
            return Ok(());
        };
        let first = segment.number.saturating_mul(self.segment_pages);
        let page = |number| PageId {
            memory: segment.memory,
            number,
        };
        let last = first.saturating_add(self.segment_pages - 1);
        let range = page(first)..=page(last);
        if self
            .entries
            .range(range.clone())
            .any(|(_, entry)| entry.busy.is_some())
        {
            return Ok(());
        }
        self.departing.remove(&segment);
        let entries = self.entries.take(range).into_iter();
        let pages: Vec<PageEntry> = entries
            .map(|(page, entry)| (page, entry.number, entry.holders, entry.queue.into()))
            .collect();
        let version = self
            .relocated
            .get(&segment)
            .map_or(0, |(version, _)| *version);
        let version = incremented(version)?;
        self.relocated.insert(segment, (version, to));
        out.send(
            to,
            Message::Segment {
                segment,
                version,
                pages,
            },
        );
        Ok(())
    }

    /// Makes this part a segment's directory, and informs the others.
    pub(super) fn adopt_segment(
        &mut self,
        from: PartId,
        segment: Segment,
        version: u64,
        pages: Vec<PageEntry>,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        self.check_segment(segment)?;
        let known = self
            .relocated
            .get(&segment)
            .map_or(0, |(version, _)| *version);
        let is_right = |(page, _, holders, _): &PageEntry| {
            self.segment(*page) == segment && holders.are_subset_of(self.parts)
        };
        if version <= known || !pages.iter().all(is_right) {
            return Err(ProtocolError(format!(
                "{segment:?} comes in version {version}, {known} is known"
            )));
        }
        self.relocated.insert(segment, (version, self.me));
        for part in self.parts.without(self.me).without(from).iter() {
            out.send(part, Message::SegmentAt { segment, version });
        }
        let numbers: Vec<PageId> = pages.iter().map(|(page, ..)| *page).collect();
        for (page, number, holders, queue) in pages {
            let entry = Entry::idle(holders, number);
            if self.entries.insert(page, entry).is_some() {
                return Err(ProtocolError(format!("{page:?} is listed twice")));
            }
            for request in queue {
                self.check(page, &request)?;
                self.entry(page).queue.push_back(request);
            }
            // Pages of a part that has left belong to its successor.
            for (part, to) in self.evacuated.clone() {
                if self.entry(page).involves(part) {
                    *self.evacuating.entry(part).or_default() += 1;
                    let forget = Request::Forget { part, to };
                    self.entry(page).queue.push_back(forget);
                }
            }
        }
        for page in numbers {
            self.start_next(page, out)?;
        }
        Ok(())
    }

    /// Announces the segments of this directory to a new part.
    pub(super) fn announce_to(&self, part: PartId, out: &mut Output) {
        for (segment, (version, at)) in &self.relocated {
            if *at == self.me {
                let (segment, version) = (*segment, *version);
                out.send(part, Message::SegmentAt { segment, version });
            }
        }
    }

    /// Records a segment's directory, if the version is newer.
    ///
    /// # Errors
    /// [`ProtocolError`] for a segment out of bounds.
    pub(super) fn learn_location(
        &mut self,
        at: PartId,
        segment: Segment,
        version: u64,
    ) -> Result<(), ProtocolError> {
        self.check_segment(segment)?;
        let known = self
            .relocated
            .get(&segment)
            .map_or(0, |(version, _)| *version);
        if version > known {
            self.relocated.insert(segment, (version, at));
        }
        Ok(())
    }

    /// Checks the bounds of a segment.
    fn check_segment(&self, segment: Segment) -> Result<(), ProtocolError> {
        match segment.number <= u32::MAX / self.segment_pages {
            true => Ok(()),
            false => Err(ProtocolError(format!("there is no {segment:?}"))),
        }
    }
}

/// Sends the batched fetch to the holder of a run of pages.
fn fetch_run(row: Option<(PartId, PageId, Vec<u64>)>, me: PartId, to: PartId, out: &mut Output) {
    let Some((owner, page, mut numbers)) = row else {
        return;
    };
    let txn = Txn {
        number: numbers.remove(0),
        directory: me,
        is_answer: false,
    };
    out.send(
        owner,
        Message::Fetch {
            page,
            txn,
            to,
            access: Access::Write,
            acks: 0,
            more: numbers,
        },
    );
}
