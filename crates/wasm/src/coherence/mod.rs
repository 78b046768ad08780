//! Cache coherence for the pages of a machine that spans several nodes.
//!
//! A machine with several parts has one memory. At any time a page has a single writer or multiple
//! readers, so memory is sequentially consistent per page (Li and Hudak, "Memory Coherence in
//! Shared Virtual Memory Systems", 1989; an owner forwards data in three hops, as in DASH, Lenoski
//! and others, 1990). This module is a pure state machine without memory, connections or clock. Its
//! driver passes faults and messages to it and executes its commands in order.
//!
//! Messages and commands about runs of contiguous pages in the same state are batched; a batch is
//! equivalent to one message per page.
//!
//! Each page has a *directory*, the part that records its holders: by default the home, or any part
//! for a segment of pages. The states of a part's copy of a page:
//!
//! ```text
//!               Data(Read)                         Grant, Data(Write)
//!   Invalid ───────────────▶ Shared ─────────────────────────────▶ Modified
//!     ▲ ▲ ▲                    │  │                                   │   │
//!     │ │ └──── drop (local) ───┘  │          Grant        Fetch(Read) │   │
//!     │ └──── Invalidate ─────────┘     Owned ◀───────────────────────┘   │
//!     │                                  │ │ ───────────▶ Modified        │
//!     └──── Fetch(Write), Invalidate ────┘                                │
//!     └──── Fetch(Write) ─────────────────────────────────────────────────┘
//! ```
//!
//! *Owned* is the copy of the last writer: it is readable like a shared one, but supplies the page
//! to others, so it must not be dropped at will (the O state of MOESI).
//!
//! Handling of a fault (the directory is often the owner or the faulting part itself, and those
//! messages need no connection):
//!
//! ```text
//!   part          directory          owner                 other readers
//!    │─── Want ──────▶│                   │                      │
//!    │                │───── Fetch ──────▶│                      │
//!    │                │───── Invalidate ──┼─────────────────────▶│   (Write)
//!    │◀──────────────── Data ─────────────│                      │
//!    │◀──────────────────────────── Ack ─────────────────────────│   (Write)
//!    │─── Done ──────▶│
//! ```
//!
//! A part that has a copy already receives *Grant* from the directory instead of Data. The
//! directory defers all other requests for a page, in order, until Done. So there is one
//! transaction per page at a time, and all messages about a page that a part receives between Want
//! and Done belong to it, in any order: the protocol does not depend on message order, on one
//! connection or between several. (Quiescence detection does, see below.)
//!
//! After a fault a part holds the page for a short time ([`Config::hold_micros`]) so that the
//! faulting access completes; the host pins a page while it copies. Requests for a held page are
//! deferred, not refused. A page that was only moved there is not held.
//!
//! A segment's directory moves when the segment has no transaction ([`Event::MoveDirectory`]):
//!
//! ```text
//!   a part          directory           next directory      others
//!    │─── Hand ───────▶│                     │                 │
//!    │                 │─── Segment ────────▶│                 │
//!    │◀──────────── SegmentAt ───────────────│──── SegmentAt ─▶│
//!    │─── Want ───────▶│─── Forward ────────▶│   (from a stale requester)
//!    │◀──────────── SegmentAt ───────────────│
//! ```
//!
//! Before a part leaves or the home migrates, all segments return to the home ([`Event::Gather`])
//! and the protocol is quiescent ([`Traffic`]): so no message is sent to a part that has left. Each
//! directory announces its segments to a new part as soon as it learns of it; for a segment that it
//! receives later, the previous directory announces it. The home learns of the part last.
//!
//! Parts join and leave while the others run. A new part has no pages; a leaving part first gives
//! up its pages ([`Event::Evacuate`]), so no later transaction involves it. A move of a page to a
//! part that is not a member is ignored.
//!
//! A message that violates the protocol is an error that ends the machine ([`Command::Fail`]): its
//! memory is no longer consistent. Beyond that parts trust each other: they are one machine.
//!
//! - `message`: messages between parts
//! - `directory`: holders of pages and queued requests
//! - `copies`: copies of this part
//! - `traffic`: quiescence detection
//! - `home_migration`: migration of the home
//! - `page_map`: the map from pages to their state

mod copies;
mod directory;
mod directory_entry;
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

/// Maximum number of parts of a machine.
pub const PARTS_MAX: usize = 64;

/// A part of a machine: its number, below [`PARTS_MAX`].
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

    /// `None` if `number` is not below [`PARTS_MAX`].
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

    /// Whether the set contains a part.
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

    /// All parts, in ascending order.
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

/// A page of 4 KiB.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct PageId {
    pub memory: u32,
    /// Index of the page.
    pub number: u32,
}

/// A segment: contiguous pages with one directory, [`Config::segment_pages`] of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Segment {
    pub memory: u32,
    /// Index of the segment.
    pub number: u32,
}

/// A run of pages with the same holders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub memory: u32,
    /// Index of the first page.
    pub first: u32,
    pub pages: u32,
    pub holders: Holders,
    /// Total number of times that these pages changed hands.
    pub exchanges: u64,
    pub directory: PartId,
}

/// Kind of access to a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Access {
    Read,
    Write,
}

/// Initial configuration of a part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Config {
    pub me: PartId,
    /// All parts.
    pub parts: PartSet,
    /// The part that had all pages when the machine started to span.
    pub origin: PartId,
    /// Pages per segment; not zero, and equal for all parts.
    pub segment_pages: u32,
    /// Minimum hold time of a page after a fault. The actual time is random, up to twice as long,
    /// so that two parts that need the same two pages do not livelock.
    pub hold_micros: u64,
    pub seed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// A thread here faults on a page, or the host needs it.
    Fault {
        page: PageId,
        access: Access,
    },
    /// A message of another part. The driver keeps a page that came with it until
    /// [`Command::Install`] or [`Command::AllowWrite`] for that page.
    Message {
        from: PartId,
        message: Message,
    },
    Tick,
    /// The host starts copying to or from a page, which stays here meanwhile. Only valid if
    /// [`Coherence::access`] allows it.
    Pin {
        page: PageId,
    },
    Unpin {
        page: PageId,
    },
    /// Drops a shared copy to free memory. No effect on a copy that is needed
    /// ([`Coherence::can_drop`]).
    Drop {
        page: PageId,
    },
    /// A run of pages moves to a part (object move, or memory pressure).
    Move {
        /// The first.
        page: PageId,
        /// Number of parts.
        pages: u32,
        to: PartId,
    },
    /// A segment's directory moves as soon as the segment has no transaction; ignored while parts
    /// leave.
    MoveDirectory {
        segment: Segment,
        to: PartId,
    },
    /// All segments return to the home. Only valid at the home; complete, and known to all parts,
    /// once the protocol is quiescent, if no other segment moved meanwhile
    /// ([`Coherence::directories`]).
    Gather,
    /// A leaving part without threads gives up the pages of which this part is the directory.
    /// [`Command::Evacuated`] reports completion.
    Evacuate {
        part: PartId,
        to: PartId,
    },
    /// A part joins: it is reachable, has no pages, and knows all parts. The home is notified last;
    /// no page moves to the part before that.
    Join {
        part: PartId,
    },
    /// A part that was evacuated has left; the home is notified first. Messages of it that arrive
    /// later are ignored.
    PartLeft {
        part: PartId,
    },
    /// The home migrated: the home's number means another part from now on, whose own number is
    /// free; the protocol is quiescent ([`Coherence::take_over_home`]).
    HomeMigrated {
        new_home: PartId,
    },
}

/// Commands to the driver, to be executed in order and before the next event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Command {
    /// Sends a message to another part.
    Send { to: PartId, message: Message },
    /// Sends [`Message::Data`] to another part, with the bytes of its pages.
    SendPages { to: PartId, message: Message },
    /// Installs the latest received bytes of a run of pages with this access, and wakes waiters.
    /// More than one page only if they came with the current message.
    Install {
        /// The first.
        page: PageId,
        pages: u32,
        access: Access,
    },
    /// Allows writes to a resident page, and wakes its waiters.
    AllowWrite { page: PageId },
    /// Wakes the waiters of a page: the access is possible.
    Wake { page: PageId },
    /// Write-protects a run of pages; after it no thread writes them.
    Protect {
        /// The first.
        page: PageId,
        pages: u32,
    },
    /// Unmaps a run of pages; after it no thread reads them.
    Discard {
        /// The first.
        page: PageId,
        pages: u32,
    },
    /// Requests [`Event::Tick`] at or soon after this time, on the clock of `now`.
    TickAt {
        /// When.
        micros: u64,
    },
    /// A leaving part holds none of the pages of which this part is the directory. Its stale copies
    /// may still be readable, so its threads must not return. Repeated if this part became the
    /// directory of a segment with pages of that part since.
    Evacuated { part: PartId },
    /// Memory is inconsistent. No further command follows.
    Fail { reason: String },
}

/// The coherence state of one part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Coherence {
    me: PartId,
    parts: PartSet,
    /// Former parts.
    gone: PartSet,
    directory: Directory,
    copies: Copies,
    failed: bool,
}

/// Output of the two halves of a part (directory and copies); messages to this part are delivered
/// locally.
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

/// A page and its successors.
fn pages_from(page: PageId) -> impl Iterator<Item = PageId> {
    let numbers = page.number..=u32::MAX;
    numbers.map(move |number| PageId { number, ..page })
}

/// Checks the bounds of a run of pages.
fn check_run(page: PageId, pages: usize) -> Result<(), ProtocolError> {
    let is_there = (u64::from(page.number) + pages as u64) <= 1 << 32;
    match (1..=RUN_PAGES_MAX).contains(&pages) && is_there {
        true => Ok(()),
        false => Err(ProtocolError(format!(
            "a run of {pages} pages from {page:?}"
        ))),
    }
}

impl Coherence {
    /// The state of a part when the machine starts to span.
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

    /// Current access rights to a page.
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

    /// States of the pages from `page` on that may differ from their initial state, in ascending
    /// order.
    pub fn entries_from(&self, page: PageId) -> impl Iterator<Item = (PageId, Copy)> {
        self.copies.entries_from(page)
    }

    /// Whether a copy may be dropped.
    pub fn can_drop(&self, page: PageId) -> bool {
        self.copies.can_drop(page)
    }

    /// Whether a request for a held or pinned page is deferred: it must not be pinned again, or the
    /// requester might starve.
    pub fn is_deferred(&self, page: PageId) -> bool {
        self.copies.is_deferred(page)
    }

    /// Whether a page was requested and has not arrived.
    pub fn is_requested(&self, page: PageId) -> bool {
        self.copies.is_requested(page)
    }

    /// Whether this part knows of no transaction.
    pub fn is_quiescent(&self) -> bool {
        self.copies.is_quiescent() && self.directory.is_quiescent()
    }

    /// Whether parts have been or are being evacuated, as far as this directory knows.
    pub fn has_leaving_parts(&self) -> bool {
        self.directory.has_leaving_parts()
    }

    /// The holders of a page, if this part is its directory and it has no transaction.
    pub fn holders(&self, page: PageId) -> Option<Holders> {
        self.directory.holders(page)
    }

    /// Whether a page of this directory is about to arrive at a part, by [`Event::Move`] or a
    /// request of that part. A page that was to move there and is not about to has been there; it
    /// may be elsewhere again.
    pub fn is_moving_to(&self, page: PageId, to: PartId) -> bool {
        self.directory.is_moving_to(page, to)
    }

    /// Placements of the pages of this directory that have ever changed hands, in ascending order;
    /// all others are in their initial place. At most `most` pages, starting from one; also returns
    /// the next page.
    pub fn placements(&self, from: PageId, most: usize) -> (Vec<Placement>, Option<PageId>) {
        self.directory.placements(from, most)
    }

    /// Segments whose directory is not the home, as far as this part knows, with the directory.
    pub fn directories(&self) -> impl Iterator<Item = (Segment, PartId)> {
        self.directory.remote_segments()
    }

    /// Whether this part is the directory of a page.
    pub fn is_directory_of(&self, page: PageId) -> bool {
        self.directory.directory_of(page) == self.me
    }

    /// The subset of a range of pages whose directory is not the home, as far as this part knows,
    /// with the directory; in ascending order, segment by segment.
    pub fn directories_in(
        &self,
        memory: u32,
        pages: std::ops::Range<u32>,
    ) -> impl Iterator<Item = (PartId, std::ops::Range<u32>)> {
        self.directory.remote_segments_in(memory, pages)
    }

    /// The segments that lie completely in a range of pages.
    pub fn segments_in(&self, memory: u32, pages: std::ops::Range<u32>) -> Vec<Segment> {
        self.directory.segments_in(memory, pages)
    }

    /// Handles an event; returns the commands. `now_micros` must be monotonic.
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
            // (Sent before the part was evacuated.)
            Event::Message { from, .. } if self.gone.contains(from) => {}
            Event::Message { from, message } => {
                if !self.parts.contains(from) || from == self.me {
                    return Err(ProtocolError(format!("part {from} is not another part")));
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
            // (Already known.)
            Event::PartLeft { part } if self.gone.contains(part) => {}
            Event::PartLeft { part } => {
                if !self.parts.contains(part) || part == self.me || part == PartId::HOME {
                    return Err(ProtocolError(format!("part {part} cannot leave")));
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

    /// Delivers messages of this part to itself; sends the others.
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
