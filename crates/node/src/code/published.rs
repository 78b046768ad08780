//! Which nodes have which code: each node writes its own at `code/NODE`, and follows
//! what the others write. It is advice: a node that lost its cache says so a moment
//! late, and then compiles.

use super::Code;
use crate::agent::Agent;
use keel_cluster::keys::{self, Key};
use keel_cluster::store::{Change, KeyValue, Txn};
use keel_cluster::{NodeName, StoreError, wire};
use keel_net::Fingerprint;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Pause before the store is asked again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// What becomes ready within this time is written at once.
const WRITE_EVERY: Duration = Duration::from_millis(200);

/// What all nodes have, as far as this one has heard.
#[derive(Debug, Default)]
pub(crate) struct Published(Mutex<BTreeMap<NodeName, BTreeSet<Fingerprint>>>);

impl Published {
    fn table(&self) -> MutexGuard<'_, BTreeMap<NodeName, BTreeSet<Fingerprint>>> {
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

    fn take(&self, entry: &KeyValue) {
        let Ok(Key::Code(node)) = entry.key.parse() else {
            return;
        };
        match wire::decode("a node's code", &entry.value) {
            Ok(programs) => drop(self.table().insert(node, programs)),
            Err(error) => tracing::warn!(%node, %error, "what code it has is not known"),
        }
    }
}

/// Writes what is ready here, at each change.
pub(super) async fn publish(agent: Arc<Agent>) {
    let mut changes = agent.code.ready.subscribe();
    loop {
        changes.mark_unchanged();
        if let Err(error) = write(&agent, &agent.code).await {
            tracing::debug!(%error, "what code is here is not in the store yet");
            tokio::time::sleep(RETRY_AFTER).await;
            continue;
        }
        if changes.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(WRITE_EVERY).await;
    }
}

async fn write(agent: &Agent, code: &Code) -> Result<(), String> {
    let ready = code.inner().ready.clone();
    let value = wire::encode("a node's code", &ready).map_err(|error| error.to_string())?;
    let txn = Txn::new().put(Key::Code(agent.name.clone()), value);
    agent
        .store
        .txn(txn)
        .await
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Follows what all nodes have, until the agent ends.
pub(super) async fn follow(agent: Arc<Agent>) {
    loop {
        if let Err(error) = follow_once(&agent).await {
            tracing::debug!(%error, "what code other nodes have is not followed, trying again");
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(agent: &Agent) -> Result<(), StoreError> {
    let published = &agent.code.published;
    let listing = agent.store.list(keys::CODE).await?;
    published.table().clear();
    for entry in &listing.entries {
        published.take(entry);
    }
    let mut watch = agent.store.watch(keys::CODE, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        for change in changes?.changes {
            match change {
                Change::Put(entry) => published.take(&entry),
                Change::Delete { key } => {
                    if let Ok(Key::Code(node)) = key.parse() {
                        published.table().remove(&node);
                    }
                }
            }
        }
    }
    Ok(())
}
