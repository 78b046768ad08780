//! Migration of the home: another part takes its place and its number.
//!
//! ```text
//!   home                              next home                       others
//!     holds no page; all threads are suspended, the protocol is quiescent
//!     │─── holdings ────────────────────▶│                               │
//!     ends                               │ is the home, with its number  │
//!                                        │──── HomeMigrated ────────────▶│ the home's number
//!                                        │                               │ means the next home
//! ```
//!
//! The home implicitly holds all pages that never changed hands, and is the directory of all pages
//! ([`Config::origin`](super::Config)). Both transfer at once, so untouched pages need not move one
//! by one. From the first to the last step no part may request a page: the driver suspends all
//! threads.

use super::copies::Copy;
use super::message::Holders;
use super::{Coherence, PageId, PartId, PartSet, ProtocolError};
use serde::{Deserialize, Serialize};

/// A run of pages with the same holders, as the old home knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldRun {
    pub memory: u32,
    /// Index of the first page.
    pub first: u32,
    pub pages: u32,
    pub holders: Holders,
}

/// Holders of all pages, as the old home knows them. Runs and counters are separate lists, as every
/// other page may be a run of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    /// In ascending order.
    pub rows: Vec<HeldRun>,
    /// Number of changes of hands of each page.
    pub exchanges: Vec<u64>,
}

impl HeldRun {
    /// Behind its last page.
    fn end(&self) -> u64 {
        u64::from(self.first) + u64::from(self.pages)
    }
}

impl Holdings {
    /// Its pages with their holders.
    fn pages(&self) -> impl Iterator<Item = (PageId, Holders)> + '_ {
        self.rows.iter().flat_map(|row| {
            let numbers = (row.first..=u32::MAX).take(row.pages as usize);
            numbers.map(|number| {
                let memory = row.memory;
                (PageId { memory, number }, row.holders)
            })
        })
    }

    /// Validates the runs for a set of parts.
    fn check(&self, parts: PartSet) -> Result<(), String> {
        let mut end = (0, 0);
        for row in &self.rows {
            let first = (row.memory, u64::from(row.first));
            if !row.holders.are_subset_of(parts) || row.end() > 1 << 32 {
                return Err(format!(
                    "{:?} hold {} pages from {first:?} on",
                    row.holders, row.pages
                ));
            }
            if first < end {
                return Err(format!("pages from {first:?} on are out of order"));
            }
            end = (row.memory, row.end());
        }
        let pages: u64 = self.rows.iter().map(|row| u64::from(row.pages)).sum();
        match pages == self.exchanges.len() as u64 {
            true => Ok(()),
            false => Err(format!(
                "{} numbers come with {pages} pages",
                self.exchanges.len()
            )),
        }
    }
}

impl Holders {
    fn renamed(self, from: PartId, to: PartId) -> Holders {
        match self {
            Holders::Owner(owner) if owner == from => Holders::Owner(to),
            Holders::Readers { owner, readers } if readers.contains(from) => Holders::Readers {
                owner: if owner == from { to } else { owner },
                readers: readers.without(from).with(to),
            },
            others => others,
        }
    }
}

impl Coherence {
    /// Pages that changed hands, or were about to, and are held by this part, their directory.
    /// (Untouched pages are known to its memories only.)
    pub fn pages_in_use(&self) -> impl Iterator<Item = PageId> {
        let entries = self.directory.entries();
        let own = entries.filter(|(page, holders, _)| {
            holders.has(self.me) && self.copies.copy(*page) != Copy::Invalid
        });
        own.map(|(page, ..)| page)
    }

    /// The holders of all pages for the next home, in ascending order. Omitted pages are untouched,
    /// or still here: the driver must move the home's resident pages first.
    ///
    /// # Errors
    /// The obstacle: a transaction is in progress, this part is not the home, or it holds pages.
    pub fn holdings(&self) -> Result<Holdings, String> {
        if self.failed || self.me != PartId::HOME {
            return Err("only the home can migrate".into());
        }
        if !self.is_quiescent() || self.has_leaving_parts() || self.directories().next().is_some() {
            return Err(
                "pages are in flight, parts are leaving, or another part is a directory".into(),
            );
        }
        let mut holdings = Holdings::default();
        for (page, holders, exchanges) in self.directory.entries() {
            let holders = match holders {
                // (The home dropped its copy.)
                Holders::Readers { owner, readers }
                    if owner != self.me && self.copies.copy(page) == Copy::Invalid =>
                {
                    let readers = readers.without(self.me);
                    Holders::Readers { owner, readers }
                }
                holders => holders,
            };
            if holders.has(self.me) {
                return Err(format!("the home still has {page:?}"));
            }
            holdings.exchanges.push(exchanges);
            match holdings.rows.last_mut() {
                Some(last)
                    if last.memory == page.memory
                        && last.end() == u64::from(page.number)
                        && last.holders == holders =>
                {
                    last.pages += 1;
                }
                _ => holdings.rows.push(HeldRun {
                    memory: page.memory,
                    first: page.number,
                    pages: 1,
                    holders,
                }),
            }
        }
        Ok(holdings)
    }

    /// Makes this part the home, with the home's number; all others are notified
    /// ([`super::Event::HomeMigrated`]) before any part requests a page.
    ///
    /// # Errors
    /// The inconsistency; the state is unchanged then.
    pub fn take_over_home(&mut self, holdings: &Holdings) -> Result<(), String> {
        let me = self.me;
        if self.failed || me == PartId::HOME {
            return Err("the home cannot migrate to itself".into());
        }
        if !self.is_quiescent() || !self.directory.is_default() {
            return Err("pages are in flight to the new home".into());
        }
        holdings.check(self.parts.without(PartId::HOME))?;
        let pages = || holdings.pages().map(|(page, _)| page);
        let copies = self
            .copies
            .copies_of(pages())
            .map_err(|unknown| format!("{unknown:?} is here, unknown to the home"))?;
        for ((page, holders), copy) in holdings.pages().zip(&copies) {
            let agrees = match holders {
                Holders::Owner(owner) if owner == me => *copy == Copy::Modified,
                Holders::Readers { owner, .. } if owner == me => *copy == Copy::Owned,
                // (The copy may have been dropped.)
                Holders::Readers { readers, .. } if readers.contains(me) => {
                    matches!(copy, Copy::Shared | Copy::Invalid)
                }
                _ => *copy == Copy::Invalid,
            };
            if !agrees {
                return Err(format!(
                    "{page:?} is {copy:?} here, and {holders:?} hold it"
                ));
            }
        }
        self.me = PartId::HOME;
        self.parts = self.parts.without(me);
        self.copies.take_over_home(self.parts, pages().zip(copies));
        let entries = holdings.pages().zip(&holdings.exchanges);
        let entries = entries.map(|((page, holders), exchanges)| {
            (page, holders.renamed(me, PartId::HOME), *exchanges)
        });
        self.directory.take_over_home(self.parts, entries);
        Ok(())
    }

    /// The home's number means another part from now on.
    pub(super) fn home_migrated(&mut self, new_home: PartId) -> Result<(), ProtocolError> {
        let can = self.me != PartId::HOME && new_home != self.me && new_home != PartId::HOME;
        if !can || !self.parts.contains(new_home) {
            return Err(ProtocolError(format!(
                "part {new_home} cannot become the home"
            )));
        }
        if !self.is_quiescent() || !self.directory.is_default() {
            return Err(ProtocolError(format!(
                "part {new_home} cannot become the home while pages are on their way"
            )));
        }
        self.directory.reset_locations();
        self.set_parts(self.parts.without(new_home));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Access, Command, Config, Event};
    use super::*;

    fn part(number: usize) -> PartId {
        PartId::new(number).unwrap()
    }

    fn page(number: u32) -> PageId {
        PageId { memory: 0, number }
    }

    fn parts(count: usize) -> Vec<Coherence> {
        let all: PartSet = (0..count).map(part).collect();
        let new = |number| {
            Coherence::new(Config {
                me: part(number),
                parts: all,
                origin: PartId::HOME,
                segment_pages: 4,
                hold_micros: 0,
                seed: 1,
            })
        };
        (0..count).map(new).collect()
    }

    /// Delivers an event and all resulting messages; parts by their index.
    fn step(parts: &mut [Coherence], at: usize, event: Event) {
        let mut rest = vec![(at, event)];
        while let Some((at, event)) = rest.pop() {
            for command in parts[at].step(event, 0) {
                match command {
                    Command::Send { to, message } | Command::SendPages { to, message } => {
                        let from = part(at);
                        rest.push((to.number(), Event::Message { from, message }));
                    }
                    Command::Fail { reason } => panic!("part {at}: {reason}"),
                    _ => {}
                }
            }
        }
    }

    fn fault(parts: &mut [Coherence], at: usize, number: u32, access: Access) {
        let page = page(number);
        step(parts, at, Event::Fault { page, access });
        assert!(parts[at].access(page) >= Some(access));
    }

    #[test]
    fn a_member_takes_the_homes_place() {
        let mut all = parts(3);
        fault(&mut all, 1, 0, Access::Write);
        fault(&mut all, 2, 1, Access::Write);
        fault(&mut all, 1, 1, Access::Read);
        fault(&mut all, 2, 6, Access::Write);
        fault(&mut all, 2, 0, Access::Read);
        // It reads pages of others, and so holds copies.
        fault(&mut all, 0, 6, Access::Read);
        assert!(all[0].holdings().unwrap_err().contains("still has"));
        let (at, to) = (page(6), part(1));
        let mut dropped = all.clone();
        step(&mut dropped, 0, Event::Drop { page: at });
        let holdings = dropped[0].holdings().unwrap();
        let readers = PartSet::default().with(part(2));
        let owner = part(2);
        assert_eq!(
            holdings.rows[2].holders,
            Holders::Readers { owner, readers }
        );
        dropped[1].take_over_home(&holdings).unwrap();
        let moves = Event::Move {
            page: at,
            pages: 1,
            to,
        };
        step(&mut all, 0, moves);
        let holdings = all[0].holdings().unwrap();
        assert_eq!(
            holdings.rows.iter().map(|it| it.first).collect::<Vec<_>>(),
            [0, 1, 6]
        );
        let untouched = all[2].clone();
        let mut fewer = holdings.clone();
        fewer.rows.truncate(1);
        assert!(
            all[2]
                .take_over_home(&fewer)
                .unwrap_err()
                .contains("numbers")
        );
        fewer.exchanges.truncate(1);
        assert!(
            all[2]
                .take_over_home(&fewer)
                .unwrap_err()
                .contains("unknown to the home")
        );
        let mut twice = holdings.clone();
        twice.rows.push(holdings.rows[0]);
        twice.exchanges.push(1);
        assert!(
            all[2]
                .take_over_home(&twice)
                .unwrap_err()
                .contains("out of order")
        );
        assert_eq!(all[2], untouched, "as it was");
        all[2].take_over_home(&holdings).unwrap();
        let new_home = part(2);
        assert_eq!(all[1].step(Event::HomeMigrated { new_home }, 0), []);
        // Part 2 has become part 0, and number 2 is free.
        all.swap_remove(0);
        assert_eq!(all[0].holders(page(1)).unwrap(), {
            let readers = [part(0), part(1)].into_iter().collect();
            Holders::Readers {
                owner: part(0),
                readers,
            }
        });
        assert_eq!(all[0].holders(page(6)).unwrap(), Holders::Owner(part(1)));
        // Untouched pages belong to the home.
        assert_eq!(all[0].access(page(9)), Some(Access::Write));
        assert_eq!(all[1].access(page(9)), None);
        for number in [0, 1, 6, 9] {
            for at in [1, 0, 1] {
                fault(&mut all, at, number, Access::Write);
                assert_eq!(all[1 - at].access(page(number)), None);
            }
        }
        // Another part may reuse the number.
        let new = parts(3).swap_remove(2);
        all.push(new);
        for new_home in 0..2 {
            step(&mut all, new_home, Event::Join { part: part(2) });
        }
        fault(&mut all, 2, 6, Access::Write);
        fault(&mut all, 0, 6, Access::Read);
    }

    #[test]
    fn nobody_succeeds_while_pages_are_on_their_way() {
        let mut all = parts(3);
        let (page, access) = (page(0), Access::Write);
        // Its request is not delivered.
        let asked = all[1].step(Event::Fault { page, access }, 0);
        assert!(all[1].take_over_home(&Holdings::default()).is_err());
        let new_home = part(2);
        let failed = all[1].clone().step(Event::HomeMigrated { new_home }, 0);
        assert!(matches!(&failed[..], [Command::Fail { .. }]));
        let [Command::Send { message, .. }] = &asked[..] else {
            panic!("{asked:?}");
        };
        let (from, message) = (part(1), message.clone());
        all[0].step(Event::Message { from, message }, 0);
        assert!(all[0].holdings().is_err());
        assert!(parts(3)[1].holdings().is_err());
        assert!(parts(3)[0].take_over_home(&Holdings::default()).is_err());
    }
}
