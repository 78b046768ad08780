//! A store that begins anew: from a copy that has everything, while agents and workers go on, or
//! from a backup, after all nodes lost their power.

use super::Node::{A, B};
use super::{Defect, World};
use crate::store::{Entries, REVISIONS};
use keel_cluster::Epoch;
use keel_machine::moves::ownership;
use keel_store::Txn;
use keel_store::keys::Key;

/// A backup of the store, and what was true of the machine when it was made.
#[derive(Debug)]
pub(super) struct Backup {
    entries: Entries,
    revision: u64,
    acknowledged: u64,
    first: Epoch,
    deaths: u32,
}

impl World {
    /// The quorum is lost for good, and one voter that has all of the content begins anew.
    pub(super) fn begin_store_anew(&mut self) {
        self.store.incarnation += 1;
        if self.defect != Defect::RepeatsRevisions {
            self.store.revision = u64::from(self.store.incarnation) * REVISIONS;
        }
        let (incarnation, revision) = (self.store.incarnation, self.store.revision);
        if self.defect != Defect::KeepsIncarnation {
            let entries = self.store.entries.values_mut();
            ownership::enter_incarnation(entries, incarnation, revision);
        }
        self.say("the store begins anew");
    }

    /// A backup is made or, if there is one, all nodes lose their power and it is restored. What the
    /// former store was sent may still arrive.
    pub(super) fn back_up_or_restore(&mut self) {
        let Some(backup) = self.backup.take() else {
            self.backup = Some(Backup {
                entries: self.store.entries.clone(),
                revision: self.store.revision,
                acknowledged: self.acknowledged,
                first: self.first,
                deaths: self.deaths,
            });
            return;
        };
        self.processes = [None, None];
        self.endings = [None, None];
        self.given = [None, None];
        if let Some(driver) = self.driver.take() {
            self.store.in_flight.extend(driver.decided.map(|it| it.0));
        }
        self.link = false;
        self.store.unseen.clear();
        self.source_killed = true;
        self.deaths = backup.deaths + 1;
        self.acknowledged = backup.acknowledged;
        self.first = backup.first;
        self.store.entries = backup.entries;
        self.store.revision = backup.revision;
        self.begin_store_anew();
        for node in [A, B] {
            let alive = Txn::new().put(Key::Alive(node.name()), Vec::new());
            assert!(self.store.apply(&alive));
        }
        self.agent_since = [self.store.epochs_so_far(); 2];
        self.say("a backup is restored");
    }
}
