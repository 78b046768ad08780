//! The nodes that have the code of each program, as far as this one knows.

use keel_cluster::NodeName;
use keel_net::Fingerprint;
use keel_store::KeyValue;
use keel_store::encoding;
use keel_store::keys::Key;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The code of all nodes, as last read from the store.
#[derive(Debug, Default)]
pub(crate) struct CodeLocations(Mutex<BTreeMap<NodeName, BTreeSet<Fingerprint>>>);

impl CodeLocations {
    pub(super) fn table(&self) -> MutexGuard<'_, BTreeMap<NodeName, BTreeSet<Fingerprint>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a node has the code of a program.
    pub(crate) fn has(&self, node: &NodeName, program: &Fingerprint) -> bool {
        self.table()
            .get(node)
            .is_some_and(|programs| programs.contains(program))
    }

    /// Nodes that have the code of a program, by name.
    pub(crate) fn nodes_with(&self, program: &Fingerprint) -> Vec<NodeName> {
        let table = self.table();
        let with = table.iter().filter(|(_, has)| has.contains(program));
        with.map(|(node, _)| node.clone()).collect()
    }

    pub(super) fn take(&self, entry: &KeyValue) {
        let Ok(Key::Code(node)) = entry.key.parse() else {
            return;
        };
        match encoding::decode("a node's code", &entry.value) {
            Ok(programs) => drop(self.table().insert(node, programs)),
            Err(error) => tracing::warn!(%node, %error, "cannot decode the list of its code"),
        }
    }
}
