//! The requests that a voter serves over `keel-net`: those of other voters, the store's requests
//! and those for certificates from nodes, and the join request from anyone. An agent wraps it in its
//! own handler for the kinds that [`ClusterService::handles`] names.

use crate::authority_keys::AuthorityKeys;
use crate::certificates::{self, CertificateError, RENEW, RenewRequest};
use crate::join::JOIN;
use std::fmt;
use std::sync::Arc;

use futures::FutureExt;
use keel_net::{BoxFuture, Bytes, Handler, PeerId, Reply, RpcError};

use crate::join::{JoinError, JoinRequest, accept_join};
use keel_store::clock::unix_ms;
use keel_store::encoding;
use keel_store::{RaftStore, Store, StoreError, StoreHandler};

/// Store and joining, as one handler.
#[derive(Clone)]
pub struct ClusterService {
    /// This node's own copy of the store, and the requests to it; none of a store outside of the
    /// cluster.
    voter: Option<(Arc<RaftStore>, StoreHandler)>,
    /// The cluster's store, for what is not answered by the leader alone.
    store: Arc<dyn Store>,
    /// The address of a store outside of the cluster.
    external: Option<String>,
    keys: Arc<AuthorityKeys>,
}

impl ClusterService {
    /// Serves `voter`, and admits nodes with `keys` into `store`, wherever its leader is.
    pub fn new(voter: Arc<RaftStore>, store: Arc<dyn Store>, keys: Arc<AuthorityKeys>) -> Self {
        let handler = StoreHandler::new(voter.clone());
        Self {
            voter: Some((voter, handler)),
            store,
            external: None,
            keys,
        }
    }

    /// Admits nodes with `keys` into a `store` outside of the cluster, at `address`.
    pub fn external(store: Arc<dyn Store>, address: String, keys: Arc<AuthorityKeys>) -> Self {
        Self {
            voter: None,
            store,
            external: Some(address),
            keys,
        }
    }

    /// Whether requests of `kind` belong here.
    pub fn handles(kind: u16) -> bool {
        matches!(kind, JOIN | RENEW) || StoreHandler::handles(kind) || RaftStore::handles(kind)
    }

    async fn join(&self, request: &[u8]) -> Result<Reply, RpcError> {
        let request: JoinRequest =
            encoding::decode("a join request", request).map_err(RpcError::refused)?;
        let external = self.external.as_deref();
        let joined = accept_join(
            self.store.as_ref(),
            external,
            &self.keys,
            &request,
            unix_ms(),
        );
        match joined.await {
            Ok(response) => encoding::payload("the answer to a join request", &response)
                .map(Reply::One)
                .map_err(RpcError::unknown),
            Err(error @ JoinError::Store(StoreError::Unknown { .. })) => {
                Err(RpcError::unknown(error))
            }
            Err(error) => {
                tracing::info!(node = %request.node, %error, "join refused");
                Err(RpcError::refused(error))
            }
        }
    }
}

impl ClusterService {
    async fn renew(&self, peer: &PeerId, request: &[u8]) -> Result<Reply, RpcError> {
        let request: RenewRequest =
            encoding::decode("a request for a certificate", request).map_err(RpcError::refused)?;
        let node = peer.node();
        let node = node.ok_or_else(|| RpcError::refused("only nodes have certificates"))?;
        let renewed = certificates::renew(&*self.store, &self.keys, node, &request).await;
        let response = renewed.map_err(|error| match error {
            CertificateError::Store(error) => RpcError::failed(error),
            error => RpcError::refused(error),
        })?;
        let payload = encoding::payload("the answer to a request for a certificate", &response);
        payload.map(Reply::One).map_err(RpcError::failed)
    }
}

impl Handler for ClusterService {
    /// Nodes may send everything, anonymous peers the join request only,
    /// workers nothing.
    fn permits(&self, peer: &PeerId, kind: u16) -> bool {
        match peer {
            PeerId::Node(_) => true,
            PeerId::Anonymous => kind == JOIN,
            PeerId::Pinned(_) => false,
        }
    }

    fn call(
        &self,
        peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        async move {
            match kind {
                JOIN => self.join(&payload).await,
                RENEW => self.renew(&peer, &payload).await,
                kind => match &self.voter {
                    Some((voter, _)) if RaftStore::handles(kind) => {
                        voter.answer(kind, &payload).await
                    }
                    Some((_, handler)) => handler.answer(kind, &payload).await,
                    None => Err(RpcError::refused(
                        "this cluster's store is not in its nodes",
                    )),
                },
            }
        }
        .boxed()
    }
}

impl fmt::Debug for ClusterService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterService({:?})", self.keys)
    }
}
