//! What a directory knows of one page, and the beginning of its transactions.

use super::message::{Holders, Message, Request, Txn};
use super::{Access, Output, PageId, PartId, PartSet, ProtocolError};
use std::collections::VecDeque;

/// A page that is not in its initial state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    pub(super) holders: Holders,
    /// Number of the last transaction.
    pub(super) number: u64,
    /// Receiver and request of the current transaction.
    pub(super) busy: Option<(PartId, Request)>,
    /// Parts involved in the transaction: the supplier of the page and the invalidated readers.
    pub(super) asked: PartSet,
    pub(super) queue: VecDeque<Request>,
}

impl Entry {
    /// A page without a transaction.
    pub(super) fn idle(holders: Holders, number: u64) -> Self {
        Entry {
            holders,
            number,
            busy: None,
            asked: PartSet::default(),
            queue: VecDeque::new(),
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.busy.is_none() && self.queue.is_empty()
    }

    /// Whether a part has the page, or is involved in its transaction, as one that will receive it.
    pub(super) fn involves(&self, part: PartId) -> bool {
        let is_requested = |request: &Request| match request {
            Request::Want { part: by, .. } => *by == part,
            Request::Move { to } | Request::Forget { to, .. } => *to == part,
        };
        self.holders.has(part)
            || self
                .busy
                .is_some_and(|(to, _)| to == part || self.asked.contains(part))
            || self.queue.iter().any(is_requested)
    }

    /// Starts a transaction; false if nothing needs to be done.
    pub(super) fn start_transaction(
        &mut self,
        page: PageId,
        request: Request,
        me: PartId,
        out: &mut Output,
    ) -> Result<bool, ProtocolError> {
        let (to, access, has, is_answer) = match request {
            Request::Want { part, access, has } => (part, access, has, true),
            Request::Move { to } => (to, Access::Write, false, false),
            Request::Forget { part, to } => match self.holders {
                Holders::Readers { owner, readers } if owner != part => {
                    // A leaving part never reads it again.
                    let readers = readers.without(part);
                    self.holders = Holders::Readers { owner, readers };
                    return Ok(false);
                }
                _ if !self.holders.has(part) => return Ok(false),
                _ => (to, Access::Write, false, false),
            },
        };
        if !is_answer && self.holders == Holders::Owner(to) {
            return Ok(false);
        }
        self.number = incremented(self.number)?;
        self.busy = Some((to, request));
        let number = self.number;
        let txn = Txn {
            number,
            directory: me,
            is_answer,
        };
        let (from, others) = self.data_source(to, access, has);
        let acks = others.len();
        self.asked = from.map_or(others, |from| others.with(from));
        match from {
            None => out.send(
                to,
                Message::Grant {
                    page,
                    txn,
                    access,
                    acks,
                },
            ),
            Some(from) => out.send(
                from,
                Message::Fetch {
                    page,
                    txn,
                    to,
                    access,
                    acks,
                    more: Vec::new(),
                },
            ),
        }
        for other in others.iter() {
            out.send(other, Message::Invalidate { page, number, to });
        }
        self.holders = match (access, self.holders) {
            (Access::Write, _) => Holders::Owner(to),
            (Access::Read, Holders::Owner(owner)) if owner == to => self.holders,
            (Access::Read, Holders::Owner(owner)) => Holders::Readers {
                owner,
                readers: PartSet::default().with(owner).with(to),
            },
            (Access::Read, Holders::Readers { owner, readers }) => Holders::Readers {
                owner,
                readers: readers.with(to),
            },
        };
        Ok(true)
    }

    /// The supplier of the page for a part (`None`: it has a copy), and the parts to invalidate.
    fn data_source(&self, to: PartId, access: Access, has: bool) -> (Option<PartId>, PartSet) {
        match (self.holders, access) {
            (Holders::Owner(owner), _) => ((owner != to).then_some(owner), PartSet::default()),
            (Holders::Readers { owner, .. }, Access::Read) => {
                ((owner != to).then_some(owner), PartSet::default())
            }
            (Holders::Readers { owner, readers }, Access::Write) => {
                let others = readers.without(to);
                if owner == to || has && readers.contains(to) {
                    (None, others)
                } else {
                    (Some(owner), others.without(owner))
                }
            }
        }
    }
}

impl Holders {
    /// Whether a part is one of them.
    pub fn has(self, part: PartId) -> bool {
        match self {
            Holders::Owner(owner) => owner == part,
            Holders::Readers { readers, .. } => readers.contains(part),
        }
    }

    /// Whether they are consistent, and among these parts.
    pub(super) fn are_subset_of(self, parts: PartSet) -> bool {
        match self {
            Holders::Owner(owner) => parts.contains(owner),
            Holders::Readers { owner, readers } => {
                readers.contains(owner) && readers.iter().all(|part| parts.contains(part))
            }
        }
    }
}

/// The next number; a number from another part may be the largest possible.
pub(super) fn incremented(number: u64) -> Result<u64, ProtocolError> {
    number
        .checked_add(1)
        .ok_or_else(|| ProtocolError("numbers of transactions have run out".into()))
}
