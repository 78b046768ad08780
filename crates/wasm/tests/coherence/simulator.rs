//! Simulator of a machine with several parts: the real protocol, pages with one number each,
//! threads that follow a script, connections with or without FIFO order. After each step it checks
//! that every readable page has the last written value, and that a writer is exclusive.

use crate::setup::{Action, InjectedBug, Op, Operation, Setup, Thread};
use keel_wasm::coherence::{
    Access, Coherence, Command, Config, Event, HeldRun, Holdings, Message, PageId, PartId, PartSet,
    Segment,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Simulator {
    parts: Vec<Coherence>,
    /// Messages in flight from each part to each.
    links: Vec<VecDeque<(Message, Vec<u64>)>>,
    /// Contents of the mapping of each part.
    frames: Vec<BTreeMap<u32, (Access, u64)>>,
    /// Received pages that are not installed yet.
    arrived: Vec<BTreeMap<u32, u64>>,
    pub(crate) truth: Vec<u64>,
    pub(crate) threads: Vec<Thread>,
    /// How often each page changed hands.
    pub(crate) grants: Vec<u32>,
    ticks: Vec<Option<u64>>,
    operations: Vec<Operation>,
    /// Parts being evacuated: their stale copies are not read.
    leaving: BTreeSet<usize>,
    lost: BTreeSet<usize>,
    emptied: BTreeSet<usize>,
    returns: Option<Vec<Op>>,
    /// Whether another part than the home was a directory, and the later events.
    directories_moved: bool,
    pub(crate) went: bool,
    pub(crate) succeeded: bool,
    /// Number of runs received.
    pub(crate) rows: u32,
    hold_micros: u64,
    pinned: BTreeSet<(usize, u32)>,
    pins_left: u32,
    now: u64,
    drops: bool,
    segment_pages: u32,
    unordered: bool,
    merges: bool,
    bug: InjectedBug,
    pub(crate) wrong: Option<String>,
}

fn part(number: usize) -> PartId {
    PartId::new(number).expect("a few parts")
}

fn page(number: u32) -> PageId {
    PageId { memory: 0, number }
}

/// Pages of a run, where runs are not merged.
const ROW_SAID: usize = 2;

/// Splits a long run.
fn split(row: &Message) -> Option<(Message, Message)> {
    let (mut first, mut rest) = (row.clone(), row.clone());
    let Message::Data { more, .. } = &mut first else {
        return None;
    };
    if more.len() < ROW_SAID {
        return None;
    }
    let behind = more.split_off(ROW_SAID - 1);
    if let Message::Data {
        page, txn, more, ..
    } = &mut rest
    {
        page.number += ROW_SAID as u32;
        txn.number = behind[0];
        *more = behind[1..].to_vec();
    }
    Some((first, rest))
}

/// Merges two messages about contiguous pages that differ only in their numbers.
fn merged(one: &Message, other: &Message) -> Option<Message> {
    let mut both = one.clone();
    let (first, count) = one.run()?;
    let (
        Message::Data {
            page, txn, more, ..
        },
        Message::Data {
            txn: next,
            more: rest,
            ..
        },
    ) = (&mut both, other)
    else {
        return None;
    };
    let (number, numbers) = (txn.number, std::mem::take(more));
    (page.number, txn.number) = (first.number + count as u32, next.number);
    more.clone_from(rest);
    if both != *other {
        return None;
    }
    if let Message::Data {
        page, txn, more, ..
    } = &mut both
    {
        (*page, txn.number) = (first, number);
        *more = [&numbers[..], &[next.number], &rest[..]].concat();
    }
    Some(both)
}

impl Simulator {
    pub(crate) fn new(set: &Setup) -> Self {
        let all: PartSet = (0..set.parts).map(part).collect();
        let parts = (0..set.parts)
            .map(|number| {
                Coherence::new(Config {
                    me: part(number),
                    parts: all,
                    origin: PartId::HOME,
                    segment_pages: set.segment_pages,
                    hold_micros: set.hold_micros,
                    seed: set.seed + number as u64,
                })
            })
            .collect();
        let mut frames = vec![BTreeMap::new(); set.parts];
        frames[0] = (0..set.pages)
            .map(|page| (page, (Access::Write, 0)))
            .collect();
        Simulator {
            parts,
            links: vec![VecDeque::new(); set.parts * set.parts],
            frames,
            arrived: vec![BTreeMap::new(); set.parts],
            truth: vec![0; set.pages as usize],
            threads: set
                .threads
                .iter()
                .map(|(part, ops)| Thread {
                    part: *part,
                    left: ops.iter().copied().collect(),
                    seen: Vec::new(),
                    waits: None,
                })
                .collect(),
            grants: vec![0; set.pages as usize],
            ticks: vec![None; set.parts],
            operations: set.operations.clone(),
            leaving: BTreeSet::new(),
            lost: BTreeSet::new(),
            emptied: BTreeSet::new(),
            returns: set.returns.clone(),
            directories_moved: false,
            went: false,
            succeeded: false,
            rows: 0,
            hold_micros: set.hold_micros,
            pinned: BTreeSet::new(),
            pins_left: set.pins,
            now: 0,
            drops: set.drops,
            segment_pages: set.segment_pages,
            unordered: set.unordered,
            merges: set.merges,
            bug: set.bug,
            wrong: None,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.threads.iter().all(|thread| thread.left.is_empty())
    }

    /// No message is in flight and no thread waits.
    pub(crate) fn is_quiescent(&self) -> bool {
        let mut parts = self.parts.iter().enumerate();
        // (Requests of a part that has left are not answered.)
        let rests = |(number, part): (usize, &Coherence)| {
            self.leaving.contains(&number) || part.is_quiescent()
        };
        self.links.iter().all(VecDeque::is_empty) && parts.all(rests)
    }

    /// The enabled actions. Without any but dropping and pinning it is stuck.
    pub(crate) fn actions(&self, actions: &mut Vec<Action>) {
        let count = self.parts.len();
        for from in 0..count {
            for to in 0..count {
                let waiting = self.links[from * count + to].len();
                let reach = match self.unordered {
                    true => waiting,
                    false => waiting.min(1),
                };
                actions.extend((0..reach).map(|number| Action::Deliver { from, to, number }));
            }
        }
        for (number, thread) in self.threads.iter().enumerate() {
            if thread.waits.is_none() && !thread.left.is_empty() {
                actions.push(Action::Run(number));
            }
        }
        for (number, tick) in self.ticks.iter().enumerate() {
            if tick.is_some() {
                actions.push(Action::Tick(number));
            }
        }
        for (number, operation) in self.operations.iter().enumerate() {
            if self.can(*operation) {
                actions.push(Action::Perform(number));
            }
        }
        actions.extend(
            self.pinned
                .iter()
                .map(|(part, page)| Action::Unpin(*part, *page)),
        );
        for (number, frames) in self.frames.iter().enumerate() {
            for at in frames.keys() {
                if self.drops && self.parts[number].can_drop(page(*at)) {
                    actions.push(Action::Drop(number, *at));
                }
                if self.pins_left > 0 && !self.pinned.contains(&(number, *at)) {
                    actions.push(Action::Pin(number, *at));
                }
            }
        }
    }

    fn can(&self, operation: Operation) -> bool {
        match operation {
            // (A move to a part that not all parts know is refused by the home only.)
            Operation::Move(_, _, to) | Operation::MoveRun(_, _, to) => {
                let joins = |operation: &Operation| matches!(operation, Operation::Join(_, part) if *part == to);
                let moves =
                    |operation: &Operation| matches!(operation, Operation::MoveDirectory(..));
                let all_home = !self.directories_moved && !self.operations.iter().any(moves);
                all_home || !self.operations.iter().any(joins)
            }
            Operation::Gather | Operation::Lose(_) => true,
            // (A part that learns of a directory has learned of departures before.)
            Operation::MoveDirectory(segment, to) => {
                let is_gone = |operation: &Operation| matches!(operation, Operation::Leave(..));
                let at = self.directory(segment);
                at.is_some_and(|at| at != to) && !self.operations.iter().any(is_gone)
            }
            // Its threads have left. (A leaving part gets no requests.)
            Operation::Evacuate(part, _) => {
                let mut threads = self.threads.iter();
                let home = &self.parts[0];
                threads.all(|thread| thread.part != part || thread.left.is_empty())
                    && (self.returns.is_none()
                        || !self.directories_moved
                        || self.is_quiescent() && home.directories().next().is_none())
            }
            // The home is notified first of a departure, and last of an arrival.
            Operation::Leave(0, part) => self.emptied.contains(&part),
            Operation::Leave(_, part) => !self.operations.contains(&Operation::Leave(0, part)),
            Operation::Join(by, part) => {
                let before = |operation: &Operation| match operation {
                    Operation::Leave(_, other) => *other == part,
                    Operation::Join(other, _) => by == 0 && *other != 0,
                    _ => false,
                };
                !self.operations.iter().any(before)
            }
            Operation::MigrateHome(by) => {
                let rests = |thread: &Thread| thread.part != 0 || thread.left.is_empty();
                let leaves = self.leaving.is_empty() && self.lost.is_empty();
                leaves
                    && self.is_quiescent()
                    && self.pinned.is_empty()
                    && self.threads.iter().all(rests)
                    && self.parts[by].holders(page(0)).is_none()
                    && self.holdings().is_some()
            }
        }
    }

    /// The home's holdings, if all written pages are elsewhere.
    fn holdings(&self) -> Option<Holdings> {
        let legacy = self.parts[0].holdings().ok()?;
        let is_known = |at: u32| {
            let has = |held: &HeldRun| (held.first..held.first + held.pages).contains(&at);
            legacy.rows.iter().any(has)
        };
        let mut pages = (0..).zip(&self.truth);
        let moved = pages.all(|(at, value)| *value == 0 || is_known(at));
        moved.then_some(legacy)
    }

    /// A part becomes the home, which has given up its pages; a new part gets its number. The
    /// protocol is quiescent.
    fn take_over_home(&mut self, new_home: usize) -> Result<(), String> {
        let legacy = self.holdings().ok_or("the home has something")?;
        self.parts[new_home].take_over_home(&legacy)?;
        for other in (1..self.parts.len()).filter(|other| *other != new_home) {
            self.step(
                other,
                Event::HomeMigrated {
                    new_home: part(new_home),
                },
            );
        }
        self.parts.swap(0, new_home);
        self.frames.swap(0, new_home);
        self.ticks.swap(0, new_home);
        for thread in &mut self.threads {
            thread.part = match thread.part {
                0 => new_home,
                part if part == new_home => 0,
                part => part,
            };
        }
        // (Untouched pages belong to the home.)
        for at in 0..self.truth.len() as u32 {
            if self.parts[0].access(page(at)) == Some(Access::Write) {
                self.frames[0].entry(at).or_insert((Access::Write, 0));
            }
        }
        self.renew(new_home);
        for other in (0..self.parts.len()).filter(|other| *other != new_home) {
            self.step(
                other,
                Event::Join {
                    part: part(new_home),
                },
            );
        }
        Ok(())
    }

    /// The directory of a segment, if none is about to become it.
    fn directory(&self, segment: u32) -> Option<usize> {
        let first = page(segment * self.segment_pages);
        let mut those = self.parts.iter().enumerate();
        those
            .find(|(_, part)| part.holders(first).is_some())
            .map(|(number, _)| number)
    }

    pub(crate) fn act(&mut self, action: Action) {
        match action {
            Action::Deliver { from, to, number } => {
                let link = &mut self.links[from * self.parts.len() + to];
                let (message, values) = link.remove(number).expect("it waits there");
                let first = message.run().map_or(0, |(page, _)| page.number);
                self.arrived[to].extend((first..).zip(values));
                let from = part(from);
                self.step(to, Event::Message { from, message });
            }
            Action::Run(number) => self.run(number),
            Action::Tick(number) => {
                self.now = self.now.max(self.ticks[number].take().unwrap_or_default());
                self.step(number, Event::Tick);
            }
            Action::Drop(number, at) => self.step(number, Event::Drop { page: page(at) }),
            Action::Perform(number) => match self.operations.remove(number) {
                Operation::Move(by, at, to) => {
                    let (page, pages, to) = (page(at), 1, part(to));
                    self.step(by, Event::Move { page, pages, to });
                }
                Operation::MoveRun(by, at, to) => {
                    let pages = self.truth.len() as u32 - at;
                    let (page, to) = (page(at), part(to));
                    self.step(by, Event::Move { page, pages, to });
                }
                Operation::MoveDirectory(segment, to) => {
                    let (number, to) = (segment, part(to));
                    let segment = Segment { memory: 0, number };
                    self.directories_moved = true;
                    self.step(0, Event::MoveDirectory { segment, to });
                }
                Operation::Gather => self.step(0, Event::Gather),
                Operation::Lose(part) => {
                    self.lost.insert(part);
                    self.frames[part].clear();
                    self.ticks[part] = None;
                    self.pinned.retain(|(by, _)| *by != part);
                    for other in 0..self.parts.len() {
                        self.links[part * self.parts.len() + other].clear();
                        self.links[other * self.parts.len() + part].clear();
                    }
                    for thread in &mut self.threads {
                        if thread.part == part {
                            thread.left.clear();
                        }
                    }
                }
                Operation::Evacuate(gives, to) => {
                    self.leaving.insert(gives);
                    if self.returns.is_some() {
                        let others = (0..self.parts.len()).filter(|other| *other != gives);
                        for other in others {
                            self.operations.push(Operation::Leave(other, gives));
                            self.operations.push(Operation::Join(other, gives));
                        }
                    }
                    let (gives, to) = (part(gives), part(to));
                    self.step(0, Event::Evacuate { part: gives, to });
                }
                Operation::MigrateHome(by) => {
                    if let Err(wrong) = self.take_over_home(by) {
                        self.wrong.get_or_insert(wrong);
                    }
                    self.succeeded |= self.directories_moved;
                }
                Operation::Leave(by, gone) => {
                    self.went |= self.directories_moved;
                    self.step(by, Event::PartLeft { part: part(gone) });
                }
                Operation::Join(by, new) => {
                    if self.leaving.remove(&new) {
                        self.renew(new);
                    }
                    self.step(by, Event::Join { part: part(new) });
                    if by == 0 {
                        let left = self.returns.take().unwrap_or_default();
                        self.threads.push(Thread {
                            part: new,
                            left: left.into(),
                            seen: Vec::new(),
                            waits: None,
                        });
                    }
                }
            },
            Action::Pin(number, at) => {
                self.pins_left -= 1;
                self.pinned.insert((number, at));
                self.step(number, Event::Pin { page: page(at) });
            }
            Action::Unpin(number, at) => {
                self.pinned.remove(&(number, at));
                self.step(number, Event::Unpin { page: page(at) });
            }
        }
        self.check();
    }

    /// A part that joins again is a new one, with new connections.
    fn renew(&mut self, number: usize) {
        let count = self.parts.len();
        self.parts[number] = Coherence::new(Config {
            me: part(number),
            parts: (0..count).map(part).collect(),
            origin: PartId::HOME,
            segment_pages: self.segment_pages,
            hold_micros: self.hold_micros,
            seed: number as u64,
        });
        self.frames[number].clear();
        self.arrived[number].clear();
        self.ticks[number] = None;
        self.pinned.retain(|(by, _)| *by != number);
        self.emptied.remove(&number);
        for other in 0..count {
            self.links[number * count + other].clear();
            self.links[other * count + number].clear();
        }
    }

    fn run(&mut self, number: usize) {
        let thread = &self.threads[number];
        let (at, op) = (thread.part, thread.left[0]);
        for (needed, access) in op.needs() {
            let has = self.frames[at].get(&needed).map(|(access, _)| *access);
            if has.is_none_or(|has| has < access) {
                self.threads[number].waits = Some(needed);
                let page = page(needed);
                return self.step(at, Event::Fault { page, access });
            }
        }
        let value = |page: u32| self.frames[at][&page].1;
        let written = match op {
            Op::Read(page) => {
                let value = value(page);
                self.threads[number].seen.push(value);
                Vec::new()
            }
            Op::Write(page, value) => vec![(page, value)],
            Op::Add(page) => vec![(page, value(page) + 1)],
            Op::Swap(one, other) => vec![(one, value(other)), (other, value(one))],
        };
        for (page, value) in written {
            self.frames[at].insert(page, (Access::Write, value));
            self.truth[page as usize] = value;
        }
        self.threads[number].left.pop_front();
    }

    fn step(&mut self, number: usize, event: Event) {
        if self.lost.contains(&number) {
            return;
        }
        for command in self.parts[number].step(event, self.now) {
            if let Err(wrong) = self.execute(number, command) {
                self.wrong.get_or_insert(format!("part {number}: {wrong}"));
            }
        }
    }

    fn execute(&mut self, number: usize, command: Command) -> Result<(), String> {
        let count = self.parts.len();
        let frames = &mut self.frames[number];
        match &command {
            Command::Install { page, pages, .. } => {
                self.rows += u32::from(*pages > 1);
                for at in page.number..page.number + pages {
                    self.grants[at as usize] += 1;
                }
            }
            Command::AllowWrite { page } => self.grants[page.number as usize] += 1,
            _ => {}
        }
        let access = |frames: &BTreeMap<u32, (Access, u64)>, at: u32| {
            frames.get(&at).map(|(access, _)| *access)
        };
        let row = |page: PageId, pages: u32| page.number..page.number + pages;
        match command {
            Command::Send { to, .. } | Command::SendPages { to, .. }
                if self.lost.contains(&to.number()) => {}
            Command::Send { to, message } => {
                self.links[number * count + to.number()].push_back((message, Vec::new()));
            }
            Command::SendPages { to, message } => {
                let (page, pages) = message.run().ok_or("sends no pages")?;
                let mut values = Vec::new();
                for at in row(page, pages as u32) {
                    if access(frames, at) != Some(Access::Read) {
                        return Err(format!("sends page {at} while it is written"));
                    }
                    values.push(frames[&at].1);
                }
                let link = &mut self.links[number * count + to.number()];
                // (Long runs are not merged.)
                if let Some((first, rest)) = split(&message).filter(|_| !self.merges) {
                    let behind = values.split_off(ROW_SAID);
                    link.push_back((first, values));
                    link.push_back((rest, behind));
                    return Ok(());
                }
                let last = link.back_mut().filter(|_| self.merges);
                match last.and_then(|(last, before)| Some((merged(last, &message)?, last, before)))
                {
                    Some((both, last, before)) => {
                        *last = both;
                        before.append(&mut values);
                    }
                    None => link.push_back((message, values)),
                }
            }
            Command::Install {
                page,
                pages,
                access,
            } => {
                for at in row(page, pages) {
                    let value = self.arrived[number].remove(&at);
                    let value = value.ok_or("puts a page in place that did not come")?;
                    let frames = &mut self.frames[number];
                    if frames.insert(at, (access, value)).is_some() {
                        return Err(format!("puts page {at} where one is"));
                    }
                    self.wake(number, at);
                }
            }
            Command::AllowWrite { page } => {
                self.arrived[number].remove(&page.number);
                match frames.get_mut(&page.number) {
                    Some((access @ Access::Read, _)) => *access = Access::Write,
                    _ => return Err(format!("allows writing of page {}", page.number)),
                }
                if self.bug != InjectedBug::SkipWake {
                    self.wake(number, page.number);
                }
            }
            Command::Wake { page } => self.wake(number, page.number),
            Command::Protect { .. } if self.bug == InjectedBug::SkipProtect => {}
            Command::Protect { page, pages } => {
                for at in row(page, pages) {
                    match frames.get_mut(&at) {
                        Some((access @ Access::Write, _)) => *access = Access::Read,
                        _ => return Err(format!("protects page {at}")),
                    }
                }
            }
            Command::Discard { .. } if self.bug == InjectedBug::SkipDiscard => {}
            Command::Discard { page, pages } => {
                for at in row(page, pages) {
                    if access(frames, at) != Some(Access::Read) {
                        return Err(format!("discards page {at}"));
                    }
                    if self.pinned.contains(&(number, at)) {
                        return Err(format!("takes page {at} from who pinned it"));
                    }
                    frames.remove(&at);
                }
            }
            Command::TickAt { micros } => {
                let tick = self.ticks[number].map_or(micros, |tick| tick.min(micros));
                self.ticks[number] = Some(tick);
            }
            Command::Evacuated { part } => {
                self.emptied.insert(part.number());
            }
            Command::Fail { reason } => return Err(reason),
        }
        Ok(())
    }

    fn wake(&mut self, number: usize, page: u32) {
        for thread in &mut self.threads {
            if thread.part == number && thread.waits == Some(page) {
                thread.waits = None;
            }
        }
    }

    fn check(&mut self) {
        if self.wrong.is_some() {
            return;
        }
        for (number, truth) in self.truth.iter().enumerate() {
            let at = number as u32;
            let mut writers = 0;
            let mut readers = 0;
            for (part, frames) in self.frames.iter().enumerate() {
                if self.lost.contains(&part) {
                    continue;
                }
                let frame = frames.get(&at);
                // (Between two commands of a step they may be inconsistent.)
                if frame.map(|(access, _)| *access) != self.parts[part].access(page(at)) {
                    self.wrong = Some(format!(
                        "part {part} takes page {at} for {:?}, and it is {frame:?}",
                        self.parts[part].copy(page(at))
                    ));
                    return;
                }
                match frame {
                    Some((Access::Read, _)) if self.leaving.contains(&part) => {}
                    Some((_, value)) if value != truth => {
                        self.wrong = Some(format!(
                            "part {part} reads {value} in page {at} where {truth} was written"
                        ));
                        return;
                    }
                    Some((Access::Write, _)) => writers += 1,
                    Some((Access::Read, _)) => readers += 1,
                    None => {}
                }
            }
            if writers > 1 || writers == 1 && readers > 0 {
                self.wrong = Some(format!("page {at}: {writers} write, {readers} read"));
                return;
            }
        }
        for part in &self.emptied {
            // (The home decides for the pages of its directory.)
            let has = self.frames[*part].iter().find(|(at, _)| {
                let part = PartId::new(*part).expect("a few parts");
                let holders = self.parts[0].holders(page(**at));
                holders.is_some_and(|holders| holders.has(part))
            });
            if let Some((at, _)) = has {
                self.wrong = Some(format!("part {part} has left, and is to have page {at}"));
                return;
            }
        }
        // A part without further messages must not consider another part than the home a directory,
        // if none is.
        let changes =
            |operation: &Operation| matches!(operation, Operation::Leave(..) | Operation::Join(..));
        if self.directories_moved
            && self.lost.is_empty()
            && !self.operations.iter().any(changes)
            && self.is_quiescent()
            && self.parts[0].directories().next().is_none()
            && let Some(part) = (0..self.parts.len()).find(|part| {
                let mut directories = self.parts[*part].directories();
                !self.leaving.contains(part) && directories.next().is_some()
            })
        {
            self.wrong = Some(format!(
                "part {part} takes one for a directory that is none"
            ));
            return;
        }
        let mut actions = Vec::new();
        self.actions(&mut actions);
        actions.retain(|action| !matches!(action, Action::Drop(..) | Action::Pin(..)));
        // (A thread waiting for a lost part waits until the machine is ended.)
        let is_over = self.is_done() && self.is_quiescent() || !self.lost.is_empty();
        if actions.is_empty() && !is_over {
            self.wrong = Some(format!("it stands still: {:?}", self.threads));
        }
    }
}
