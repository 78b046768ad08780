//! Copies of images that have a name: each is kept by [`COPIES`] nodes, so that the loss of a node
//! loses none. Every node knows which these are from the store, and fetches what it lacks.

use super::files::{ImageError, Images, is_there};
use super::records::all;
use crate::records::{self, AliveNodes};
use futures::StreamExt;
use futures::future::join_all;
use keel_api::ImageCopy;
use keel_cluster::failover::{ReplicaNode, choose_replicas};
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::{pack, unpack};
use keel_net::{Reply, RpcError};
use keel_store::{Store, StoreError, keys};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Request between agents: a hash → [`Copy`].
pub(crate) const COPY: u16 = 0x0362;

/// How many nodes keep an image.
pub(super) const COPIES: usize = 2;
/// How many images a node fetches at the same time.
const FETCHES: usize = 4;

/// How often a node looks whether it has what it is to keep, beside when names and nodes change.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// Pause before it tries again.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// How long a node may take to say whether it has a copy.
const COPY_PATIENCE: Duration = Duration::from_secs(2);

/// A node's copy of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Copy {
    is_there: bool,
    /// Why it could not be fetched, the last time that this was tried.
    problem: Option<String>,
}

/// The nodes that may keep images: those that are alive, and are not being drained if that leaves
/// enough.
pub(super) async fn candidates(store: &dyn Store) -> Result<Vec<ReplicaNode>, StoreError> {
    let alive = records::alive(store).await?;
    let draining = records::draining(store).await?;
    let zones = records::zones(store).await?;
    Ok(without_draining(alive, &draining)
        .into_iter()
        .map(|node| ReplicaNode {
            zone: zones.get(&node).cloned(),
            node,
            has_earlier: false,
        })
        .collect())
}

fn without_draining(alive: Vec<NodeName>, draining: &BTreeSet<NodeName>) -> Vec<NodeName> {
    let stay = |node: &&NodeName| !draining.contains(*node);
    let staying: Vec<NodeName> = alive.iter().filter(stay).cloned().collect();
    match staying.len() < COPIES {
        true => alive,
        false => staying,
    }
}

/// The nodes that keep the image of a name.
pub(super) fn keepers(name: &MachineName, candidates: &[ReplicaNode]) -> Vec<NodeName> {
    choose_replicas(name, None, COPIES, candidates)
}

/// Keeps this node's share of the images that have a name, until the agent ends.
pub(crate) async fn keep(images: Arc<Images>, alive: Arc<AliveNodes>) {
    let mut nodes = alive.changes();
    let mut retry = RETRY_AFTER;
    loop {
        nodes.mark_unchanged();
        match images.keep_own_share(&mut nodes, retry).await {
            Ok(true) => retry = RETRY_AFTER,
            Ok(false) => retry = LOOK_EVERY.min(retry * 2),
            Err(error) => {
                tracing::warn!(%error, "this node does not know which images it is to keep, trying again");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

impl Images {
    /// Fetches what this node is to keep and lacks, and waits until there may be more, or for
    /// `retry` if it lacks something still. False then.
    ///
    /// # Errors
    /// If the store does not answer.
    async fn keep_own_share(
        &self,
        nodes: &mut watch::Receiver<BTreeSet<NodeName>>,
        retry: Duration,
    ) -> Result<bool, StoreError> {
        let store = &*self.context.store;
        let all = all(store).await?;
        // Before they are fetched, which may take long.
        let mut watch = store.watch(keys::IMAGES, all.revision + 1).await?;
        let candidates = candidates(store).await?;
        let own = all.images.iter().filter_map(|(name, image)| {
            let keepers = keepers(name, &candidates);
            let is_own = keepers.contains(&self.context.name);
            is_own.then_some((keepers, image))
        });
        let own: Vec<_> = own.collect();
        let is_own = |hash: &str| own.iter().any(|(_, image)| image.hash == hash);
        self.lock_problems().retain(|hash, _| is_own(hash));
        // A large one does not keep those waiting that come after it.
        futures::stream::iter(own)
            .for_each_concurrent(FETCHES, |(keepers, image)| async move {
                self.lock_problems().remove(&image.hash);
                let first = keepers.into_iter().chain([image.first_on.clone()]);
                if let Err(problem) = self.find_image_at(&image.hash, first).await {
                    let hash = &image.hash;
                    tracing::warn!(hash, %problem, "this node lacks an image that it is to keep");
                    let problem = problem.to_string();
                    self.lock_problems().insert(hash.clone(), problem);
                }
            })
            .await;
        let is_whole = self.lock_problems().is_empty();
        let pause = if is_whole { LOOK_EVERY } else { retry };
        tokio::select! {
            // The next look sees what it is.
            changes = watch.next() => match changes {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                None => return Err(StoreError::unavailable("the watch ended")),
            },
            _ = nodes.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
        Ok(is_whole)
    }

    /// Answers [`COPY`].
    ///
    /// # Errors
    /// If that is no hash.
    pub(crate) async fn copy_here(&self, hash: &str) -> Result<Reply, RpcError> {
        let copy = self.own_copy(hash).await;
        Ok(pack(&copy.map_err(RpcError::refused)?)?.into())
    }

    async fn own_copy(&self, hash: &str) -> Result<Copy, ImageError> {
        let path = self.image_path(hash)?;
        Ok(Copy {
            is_there: is_there(&path).await,
            problem: self.lock_problems().get(hash).cloned(),
        })
    }

    /// Which of these nodes have an image.
    pub(super) async fn copies_at(&self, hash: &str, nodes: Vec<NodeName>) -> Vec<ImageCopy> {
        let asked = nodes.into_iter().map(|node| async move {
            let copy = match node == self.context.name {
                true => self.own_copy(hash).await.map_err(String::from),
                false => self.copy_at(hash, &node).await,
            };
            let node = node.to_string();
            match copy {
                Ok(Copy { is_there, problem }) => ImageCopy {
                    node,
                    is_there,
                    problem: problem.filter(|_| !is_there),
                },
                Err(problem) => ImageCopy {
                    node,
                    is_there: false,
                    problem: Some(problem),
                },
            }
        });
        join_all(asked).await
    }

    async fn copy_at(&self, hash: &str, node: &NodeName) -> Result<Copy, String> {
        let peers = &self.context.peers;
        let asked = async {
            let question = pack(&hash.to_owned())?;
            unpack(&peers.call(node, COPY, question, COPY_PATIENCE).await?)
        };
        asked.await.map_err(|error: RpcError| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drained_nodes_keep_images_only_where_there_are_no_others() {
        let node = |name: &str| NodeName::new(name).unwrap();
        let alive = || ["a", "b", "c"].map(node).to_vec();
        let draining = |names: &[&str]| names.iter().map(|name| node(name)).collect();
        let left = |names| without_draining(alive(), &draining(names));
        assert_eq!(left(&[]), alive());
        assert_eq!(left(&["b"]), [node("a"), node("c")]);
        assert_eq!(left(&["a", "b"]), alive());
    }
}
