//! The pages of a machine that spans: which part has which, and how they change hands.
//!
//! A machine with several parts has one memory. Each page is written by one part or read
//! by several, never both; so the memory of the whole is that of one computer, page by
//! page (single writer or multiple readers: Li and Hudak, "Memory Coherence in Shared
//! Virtual Memory Systems", 1989; data is forwarded by its owner in three hops, as in
//! DASH, Lenoski and others, 1990). This module decides; it has no memory, no
//! connections and no clock. Whoever runs it tells it of faults and messages and does
//! what it says, in the order in which it says it.
//!
//! What moves, and what comes of it, is said of many pages in a row at once where they are
//! alike; it means the same as if it were said of each of them.
//!
//! Each page has a *directory*, the part that knows who holds it: by default the home,
//! by segments of pages any part. A part's own copy of a page:
//!
//! ```text
//!               Data(Read)                         Grant, Data(Write)
//!   Invalid ───────────────▶ Shared ─────────────────────────────▶ Modified
//!     ▲ ▲ ▲                    │  │                                   │   │
//!     │ │ └─ dropped, at will ─┘  │          Grant        Fetch(Read) │   │
//!     │ └──── Invalidate ─────────┘     Kept ◀────────────────────────┘   │
//!     │                                  │ │ ───────────▶ Modified        │
//!     └──── Fetch(Write), Invalidate ────┘                                │
//!     └──── Fetch(Write) ─────────────────────────────────────────────────┘
//! ```
//!
//! *Kept* is the copy of the part that wrote last: it is read like a shared one, but
//! others get the page from it, so it is not dropped at will.
//!
//! A fault, seen from all sides (the directory is often the owner, or the part itself,
//! and then those messages need no connection):
//!
//! ```text
//!   part          directory          owner, keeper         other readers
//!    │─── Want ──────▶│                   │                      │
//!    │                │───── Fetch ──────▶│                      │
//!    │                │───── Invalidate ──┼─────────────────────▶│   (Write)
//!    │◀──────────────── Data ─────────────│                      │
//!    │◀──────────────────────────── Ack ─────────────────────────│   (Write)
//!    │─── Done ──────▶│
//! ```
//!
//! Who has a copy already gets *Grant* from the directory instead of Data. The directory
//! does nothing else with a page until Done has come; what is wanted meanwhile waits
//! there, in order. So of a page there is one transaction at a time, and all that a part
//! hears of a page between Want and Done belongs to it, in whatever order it comes: nothing
//! depends on the order of messages, on one connection or between several. (That nothing is
//! on its way does, see below.)
//!
//! A part that was just given a page that it asked for holds it for a moment before it
//! gives it away ([`Config::hold_micros`]), so that the access that asked for it takes
//! place; the host pins a page while it copies. What asks for it meanwhile is put off, not
//! refused. What was only moved there may go on at once.
//!
//! A segment's directory moves when nothing is under way in it ([`Event::MoveDirectory`]):
//!
//! ```text
//!   a part          directory           next directory      others
//!    │─── Hand ───────▶│                     │                 │
//!    │                 │─── Segment ────────▶│                 │
//!    │◀──────────── SegmentAt ───────────────│──── SegmentAt ─▶│
//!    │─── Want ───────▶│─── Forward ────────▶│   (who had not heard of it)
//!    │◀──────────── SegmentAt ───────────────│
//! ```
//!
//! Before a part goes, or the home moves, all segments are the home's again
//! ([`Event::Gather`]), and nothing is on its way of before ([`Traffic`]): so nobody asks a
//! part that is gone. Who comes is told by each directory what it is the directory of, as
//! soon as that knows of it, or gets a segment later: by whoever has it when the last one,
//! the home, knows of it.
//!
//! Parts come and go while the others run. Who comes has nothing; who goes gives up what it
//! has first ([`Event::Empty`]), so no transaction ever concerns it again. A page that is to
//! move to a part that is none of them stays where it is.
//!
//! A message of which this part knows that it cannot be is an error that ends the machine
//! ([`Command::Fail`]): its memory is not what the parts think it is. Parts trust each
//! other beyond that: they are one machine.
//!
//! - `message`: what parts say to each other
//! - `directory`: who holds what, and who waits for it
//! - `copies`: what this part holds
//! - `traffic`: whether nothing is on its way between parts
//! - `home_migration`: the home moves
//! - `page_map`: what both are kept in

mod copies;
mod directory;
mod home_migration;
mod message;
mod page_map;
mod traffic;

pub use copies::Copy;
pub use home_migration::{HeldRun, Holdings};
pub use message::{Holders, Message, PageEntry, RUN_PAGES_MAX, Request, Txn};
pub use traffic::Traffic;

use copies::Copies;
use directory::Directory;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Parts that a machine has at most.
pub const PARTS_MAX: usize = 64;

/// A part of a machine: its number in the machine's set of parts, below [`PARTS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8")]
pub struct PartId(u8);

impl TryFrom<u8> for PartId {
    type Error = &'static str;

    fn try_from(number: u8) -> Result<Self, Self::Error> {
        PartId::new(number.into()).ok_or("there are no parts of that number")
    }
}

impl PartId {
    /// The home has number 0.
    pub const HOME: PartId = PartId(0);

    /// `None` for a number that no part has.
    pub fn new(number: usize) -> Option<Self> {
        let number = u8::try_from(number).ok()?;
        (usize::from(number) < PARTS_MAX).then_some(PartId(number))
    }

    pub fn number(self) -> usize {
        self.0.into()
    }
}

impl std::fmt::Display for PartId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PartSet(u64);

impl PartSet {
    #[must_use]
    pub fn with(self, part: PartId) -> Self {
        PartSet(self.0 | 1 << (part.0 & 63))
    }

    #[must_use]
    pub fn without(self, part: PartId) -> Self {
        PartSet(self.0 & !(1 << (part.0 & 63)))
    }

    /// Whether it is one of them.
    pub fn contains(self, part: PartId) -> bool {
        self.0 & 1 << (part.0 & 63) != 0
    }

    pub fn len(self) -> u8 {
        self.0.count_ones() as u8
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// All, by number.
    pub fn iter(self) -> impl Iterator<Item = PartId> {
        (0..PARTS_MAX as u8)
            .map(PartId)
            .filter(move |part| self.contains(*part))
    }
}

impl FromIterator<PartId> for PartSet {
    fn from_iter<T: IntoIterator<Item = PartId>>(parts: T) -> Self {
        parts.into_iter().fold(PartSet::default(), PartSet::with)
    }
}

/// A page of 4 KiB; by default the first.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct PageId {
    pub memory: u32,
    /// Number of the page in it.
    pub number: u32,
}

/// Pages that have the same directory: so many in a row, by [`Config::segment_pages`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Segment {
    pub memory: u32,
    /// Number of the segment in it.
    pub number: u32,
}

/// Pages in a row that the same parts hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub memory: u32,
    /// Number of the first page.
    pub first: u32,
    pub pages: u32,
    pub holders: Holders,
    /// How often they changed hands so far, all together.
    pub exchanges: u64,
    pub directory: PartId,
}

/// What is done with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Access {
    Read,
    Write,
}

/// What a part is told at its beginning.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Config {
    pub me: PartId,
    /// All parts.
    pub parts: PartSet,
    /// The part that had all pages when the machine began to span.
    pub origin: PartId,
    /// Pages of a segment; not zero, and the same for all parts.
    pub segment_pages: u32,
    /// For how long a page stays where it just came: at least this long, and less than
    /// twice that, at random, so that two parts that need the same two pages do not take
    /// turns for ever.
    pub hold_micros: u64,
    pub seed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// A thread here stands at a page, or the host needs it.
    Fault {
        page: PageId,
        access: Access,
    },
    /// Another part said something. A page that came with it is kept by whoever runs
    /// this, until [`Command::Install`] or [`Command::Allow`] of that page.
    Message {
        from: PartId,
        message: Message,
    },
    Tick,
    /// The host copies to or from a page, which stays here until it is done. Only where
    /// [`Coherence::access`] says that it is here.
    Pin {
        page: PageId,
    },
    Unpin {
        page: PageId,
    },
    /// Memory is short: a copy is given up that others have, too. Nothing happens to one
    /// that is needed ([`Coherence::can_drop`]).
    Drop {
        page: PageId,
    },
    /// Pages in a row are to be at a part (an object moves, or memory is short).
    Move {
        /// The first.
        page: PageId,
        /// How many they are, [`RUN_PAGES_MAX`] at most.
        pages: u32,
        to: PartId,
    },
    /// A segment gets another directory, once nothing is under way in it; not while parts
    /// leave.
    MoveDirectory {
        segment: Segment,
        to: PartId,
    },
    /// All segments get the home for their directory. Only of the home; it has them, and all
    /// know, when nothing is on its way any more, if no other was moved meanwhile
    /// ([`Coherence::directories`]).
    Gather,
    /// A part whose threads have left gives up its pages: those of which this part is
    /// the directory. [`Command::Emptied`] says when it has none of them.
    Evacuate {
        part: PartId,
        to: PartId,
    },
    /// A part is one of them from now on, and can be told something; it has nothing, and was
    /// told of all of them.
    /// The home is the last that is told, and nothing is to be moved there before.
    Join {
        part: PartId,
    },
    /// A part that gave up what it had is none of them any more; the home is the first
    /// that is told. What it said before and is heard later counts no more.
    PartLeft {
        part: PartId,
    },
    /// The home's number means another part from now on, whose own number is free; nothing
    /// is under way anywhere ([`Coherence::take_over_home`]).
    HomeMigrated {
        new_home: PartId,
    },
}

/// What is to be done. In this order, and before the next event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Command {
    /// Says something to another part.
    Send { to: PartId, message: Message },
    /// Says something to another part, [`Message::Data`], and sends the bytes of its pages
    /// with it.
    SendPages { to: PartId, message: Message },
    /// Puts pages in a row in place that came last, for this access, and wakes their
    /// waiters. Several only if they came with the message that is heard just now.
    Install {
        /// The first.
        page: PageId,
        pages: u32,
        access: Access,
    },
    /// Lets a page that is here be written, and wakes its waiters.
    AllowWrite { page: PageId },
    /// Wakes a page's waiters: what they want is there.
    Wake { page: PageId },
    /// Pages in a row that may be written may only be read; when this is done, nobody
    /// writes.
    Protect {
        /// The first.
        page: PageId,
        pages: u32,
    },
    /// Pages in a row are no longer here; when this is done, nobody reads them.
    Discard {
        /// The first.
        page: PageId,
        pages: u32,
    },
    /// [`Event::Tick`] is wanted then (or soon after), in the time of `now`.
    TickAt {
        /// When.
        micros: u64,
    },
    /// Nothing is had of a part any more of which this one is the directory: it may still
    /// read copies, so its threads must not come back. Said again if a directory came
    /// here since, of a page that the part had.
    Evacuated { part: PartId },
    /// Memory is not what it should be. Nothing more is done.
    Fail { reason: String },
}

/// One part's view of the machine's pages.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Coherence {
    me: PartId,
    parts: PartSet,
    /// Those that were, and are none any more.
    gone: PartSet,
    directory: Directory,
    copies: Copies,
    failed: bool,
}

/// What the two halves of a part want done; what they say to each other is passed on here.
#[derive(Debug, Default)]
struct Output {
    messages: VecDeque<(PartId, Message)>,
    commands: Vec<Command>,
}

impl Output {
    fn send(&mut self, to: PartId, message: Message) {
        self.messages.push_back((to, message));
    }

    fn command(&mut self, command: Command) {
        self.commands.push(command);
    }
}

#[derive(Debug)]
struct ProtocolError(String);

/// A page and those that follow it.
fn pages_from(page: PageId) -> impl Iterator<Item = PageId> {
    let numbers = page.number..=u32::MAX;
    numbers.map(move |number| PageId { number, ..page })
}

/// Whether there can be so many pages in a row, and it can be spoken of them at once.
fn check_run(page: PageId, pages: usize) -> Result<(), ProtocolError> {
    let is_there = (u64::from(page.number) + pages as u64) <= 1 << 32;
    match (1..=RUN_PAGES_MAX).contains(&pages) && is_there {
        true => Ok(()),
        false => Err(ProtocolError(format!(
            "{pages} pages in a row from {page:?} on"
        ))),
    }
}

impl Coherence {
    /// A part at the moment when the machine begins to span.
    pub fn new(config: Config) -> Self {
        let (me, parts) = (config.me, config.parts);
        Coherence {
            me,
            parts,
            gone: PartSet::default(),
            directory: Directory::new(&config),
            copies: Copies::new(config),
            failed: false,
        }
    }

    /// What this part may do with a page now.
    pub fn access(&self, page: PageId) -> Option<Access> {
        match self.copies.copy(page) {
            Copy::Invalid => None,
            Copy::Shared | Copy::Owned => Some(Access::Read),
            Copy::Modified => Some(Access::Write),
        }
    }

    pub fn copy(&self, page: PageId) -> Copy {
        self.copies.copy(page)
    }

    /// How it has pages that are, or may be, not as they were at the beginning: those from
    /// one on, in their order.
    pub fn entries_from(&self, page: PageId) -> impl Iterator<Item = (PageId, Copy)> {
        self.copies.entries_from(page)
    }

    /// Whether a copy may be dropped at will.
    pub fn can_drop(&self, page: PageId) -> bool {
        self.copies.can_drop(page)
    }

    /// Whether a page is to be given away and is held or pinned: no further pin then, or
    /// who wants it might wait for ever.
    pub fn is_deferred(&self, page: PageId) -> bool {
        self.copies.is_deferred(page)
    }

    /// Whether a page was asked for and has not come.
    pub fn is_requested(&self, page: PageId) -> bool {
        self.copies.is_requested(page)
    }

    /// Whether nothing is under way, as far as this part knows.
    pub fn is_quiescent(&self) -> bool {
        self.copies.is_quiescent() && self.directory.is_quiescent()
    }

    /// Whether parts gave up what they had, or do so, as this part, their directory, knows.
    pub fn has_leaving_parts(&self) -> bool {
        self.directory.has_leaving_parts()
    }

    /// Who holds a page, if this part is its directory and nothing is under way with it.
    pub fn holders(&self, page: PageId) -> Option<Holders> {
        self.directory.holders(page)
    }

    /// Whether a page of which this part is the directory is about to be at a part, as
    /// [`Event::Move`] wanted or that part did. One that is not, and was to move there, has
    /// been there: it may be elsewhere again.
    pub fn is_moving_to(&self, page: PageId, to: PartId) -> bool {
        self.directory.is_moving_to(page, to)
    }

    /// Where the pages are of which this part is the directory and that have ever changed
    /// hands, in rising order; all others are where they were at the beginning. Of so many
    /// such pages, at most, from one on; and the page after them.
    pub fn placements(&self, from: PageId, most: usize) -> (Vec<Placement>, Option<PageId>) {
        self.directory.placements(from, most)
    }

    /// Segments of which another part than the home is the directory, as far as this part
    /// knows, and which part that is.
    pub fn directories(&self) -> impl Iterator<Item = (Segment, PartId)> {
        self.directory.remote_segments()
    }

    /// Whether this part is the directory of a page.
    pub fn is_directory_of(&self, page: PageId) -> bool {
        self.directory.directory_of(page) == self.me
    }

    /// Of a range of pages those of which another part than the home is the directory, as far
    /// as this part knows, and which; in rising order, segment by segment.
    pub fn directories_in(
        &self,
        memory: u32,
        pages: std::ops::Range<u32>,
    ) -> impl Iterator<Item = (PartId, std::ops::Range<u32>)> {
        self.directory.remote_segments_in(memory, pages)
    }

    /// The segments that lie in a range of pages as a whole.
    pub fn segments_in(&self, memory: u32, pages: std::ops::Range<u32>) -> Vec<Segment> {
        self.directory.segments_in(memory, pages)
    }

    /// Takes note of an event at a time; what is to be done about it. `now_micros` never
    /// goes back.
    pub fn step(&mut self, event: Event, now_micros: u64) -> Vec<Command> {
        if self.failed {
            return Vec::new();
        }
        let mut out = Output::default();
        if let Err(ProtocolError(reason)) = self.dispatch(event, now_micros, &mut out) {
            self.failed = true;
            out.commands.push(Command::Fail { reason });
        }
        out.commands
    }

    fn dispatch(&mut self, event: Event, now: u64, out: &mut Output) -> Result<(), ProtocolError> {
        match event {
            Event::Fault { page, access } => {
                let directory = self.directory.directory_of(page);
                self.copies.fault(page, access, directory, out);
            }
            // (It was on its way when its part had nothing any more.)
            Event::Message { from, .. } if self.gone.contains(from) => {}
            Event::Message { from, message } => {
                if !self.parts.contains(from) || from == self.me {
                    return Err(ProtocolError(format!("part {from} is none of the others")));
                }
                self.receive(from, message, now, out)?;
            }
            Event::Tick => self.copies.tick(now, out)?,
            Event::Pin { page } => self.copies.pin(page),
            Event::Unpin { page } => self.copies.unpin(page, now, out)?,
            Event::Drop { page } => self.copies.drop_copy(page, out),
            Event::Move { page, pages, to } => {
                check_run(page, pages as usize)?;
                for (directory, page, pages) in self.directory.directories_of_run(page, pages) {
                    out.send(directory, Message::Move { page, pages, to });
                }
            }
            Event::MoveDirectory { segment, to } => {
                self.directory.hand_over(segment, to, out)?;
            }
            Event::Gather => {
                if self.me != PartId::HOME {
                    return Err(ProtocolError(
                        "only the home has directories brought".into(),
                    ));
                }
                for part in self.parts.without(self.me).iter() {
                    out.send(part, Message::Gather);
                }
            }
            Event::Evacuate { part, to } => self.directory.evacuate(part, to, out)?,
            Event::Join { part } => {
                if self.parts.contains(part) {
                    return Err(ProtocolError(format!("part {part} joins twice")));
                }
                self.gone = self.gone.without(part);
                self.set_parts(self.parts.with(part));
                self.directory.announce_to(part, out);
            }
            // (Known already.)
            Event::PartLeft { part } if self.gone.contains(part) => {}
            Event::PartLeft { part } => {
                if !self.parts.contains(part) || part == self.me || part == PartId::HOME {
                    return Err(ProtocolError(format!("part {part} is to be gone")));
                }
                self.directory.remove_part(part)?;
                self.gone = self.gone.with(part);
                self.set_parts(self.parts.without(part));
            }
            Event::HomeMigrated { new_home } => self.home_migrated(new_home)?,
        }
        self.deliver_locally(now, out)
    }

    fn set_parts(&mut self, parts: PartSet) {
        self.parts = parts;
        self.directory.set_parts(parts);
        self.copies.set_parts(parts);
    }

    /// Hears what this part says to itself; the rest is sent.
    fn deliver_locally(&mut self, now: u64, out: &mut Output) -> Result<(), ProtocolError> {
        while let Some((to, message)) = out.messages.pop_front() {
            if to == self.me {
                self.receive(to, message, now, out)?;
            } else if !self.parts.contains(to) {
                return Err(ProtocolError(format!("there is no part {to}")));
            } else {
                out.command(Command::Send { to, message });
            }
        }
        Ok(())
    }

    fn receive(
        &mut self,
        from: PartId,
        message: Message,
        now: u64,
        out: &mut Output,
    ) -> Result<(), ProtocolError> {
        if let Some((page, pages)) = message.run() {
            check_run(page, pages)?;
        }
        match message {
            Message::Want { page, access, has } => {
                let part = from;
                let request = Request::Want { part, access, has };
                self.directory.request(page, request, out)
            }
            Message::Move { page, pages, to } => self.directory.move_run(page, pages, to, out),
            Message::Forward { page, request } => {
                self.directory.forwarded(page, &request, out);
                self.directory.request(page, request, out)
            }
            Message::Done { page, number, more } => {
                let numbers = std::iter::once(number).chain(more);
                for (page, number) in pages_from(page).zip(numbers) {
                    self.directory.complete(page, number, from, out)?;
                }
                Ok(())
            }
            Message::Segment {
                segment,
                version,
                pages,
            } => self
                .directory
                .adopt_segment(from, segment, version, pages, out),
            Message::Hand { segment, to } => self.directory.hand_over(segment, to, out),
            Message::Gather if from == PartId::HOME => self.directory.return_segments(out),
            Message::Gather => Err(ProtocolError(format!(
                "part {from} has directories brought, and is not the home"
            ))),
            Message::SegmentAt { segment, version } => {
                self.directory.learn_location(from, segment, version)
            }
            Message::Fetch { .. } | Message::Invalidate { .. } => {
                self.copies.release(from, message, now, out)
            }
            Message::Grant { .. } | Message::Data { .. } | Message::Ack { .. } => {
                self.copies.receive_page(from, message, now, out)
            }
        }
    }
}
