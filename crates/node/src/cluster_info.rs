//! The cluster in the form that users see: its nodes, its state, and tokens to join or use it.

use crate::context::Context;
use crate::error::CommandError;
use crate::gossip::NodeGossip;
use crate::records;
use keel_api::{
    ClusterInfo, NodeInfo, StoreInfo, Token, TokenInfo, TokenRequest, TokenUseInfo, VoterInfo,
};
use keel_cluster::gossip::Liveness;
use keel_cluster::members::{self, MemberError};
use keel_cluster::tokens::{self, Role, TokenHolder};
use keel_cluster::voters::VoterCount;
use keel_cluster::{MachineName, NodeName};
use keel_machine::spec::Status;
use keel_store::clock::unix_ms;
use keel_store::keys::{self, Key, TokenId};
use keel_store::{Backup, Txn, encoding};

/// The machines in a node's schedule.
///
/// # Errors
/// [`CommandError`] if there is no such node.
pub(crate) async fn schedule(
    context: &Context,
    node: &NodeName,
) -> Result<Vec<MachineName>, CommandError> {
    if !context.members.contains(node) {
        let what = format!("there is no node {node:?}");
        return Err(CommandError::NotFound(what));
    }
    Ok(records::schedule(&*context.store, node).await?)
}

/// All nodes.
///
/// # Errors
/// [`CommandError`] if the store does not answer.
pub(crate) async fn nodes(
    context: &Context,
    gossip: &NodeGossip,
) -> Result<Vec<NodeInfo>, CommandError> {
    let heard = gossip.known();
    let store = &*context.store;
    let alive = records::alive(store).await?;
    let drains = store.list(keys::DRAINS).await?.entries;
    let records = records::nodes(store).await?;
    let voters = members::voters(store)
        .await
        .map_err(|error| CommandError::Unavailable(error.to_string()))?;
    let mut nodes = Vec::new();
    for (name, member) in context.members.all().iter() {
        let record = records.iter().find(|(node, _)| node == name);
        let record = record.map(|(_, record)| record);
        let heard = heard.get(name).copied().unwrap_or_default();
        nodes.push(NodeInfo {
            name: name.to_string(),
            address: member.address.clone(),
            alive: alive.contains(name),
            draining: drains
                .iter()
                .any(|it| it.key == Key::Drain(name.clone()).to_string()),
            voter: external(context).is_none()
                && voters.voters.iter().any(|voter| voter.node == *name),
            cpus: record.map_or(0, |record| record.cpus),
            memory_bytes: record.map_or(0, |record| record.memory_bytes),
            machines: records::schedule(store, name).await?.len() as u32,
            lacks: record.map_or_else(Vec::new, |record| record.lacks.clone()),
            kinds: record.map_or_else(Vec::new, |record| record.kinds.clone()),
            version: record.map_or_else(String::new, |record| record.version.clone()),
            answers: match *name == context.name {
                true => Some(Liveness::Alive.name().to_owned()),
                false => heard.liveness.map(|it| it.name().to_owned()),
            },
            load: heard.load.map(|(load, _)| f64::from(load.load)),
            load_age_s: heard.load.map(|(_, age)| age.as_secs_f64()),
        });
    }
    Ok(nodes)
}

/// The store, and who holds it.
///
/// # Errors
/// [`CommandError`] if the store does not answer.
pub(crate) async fn store(context: &Context) -> Result<StoreInfo, CommandError> {
    let store = &*context.store;
    let alive = records::alive(store).await?;
    let list = members::voters(store)
        .await
        .map_err(|error| CommandError::Unavailable(error.to_string()))?;
    let wanted = match store.get(&Key::VoterCount.to_string()).await? {
        Some(entry) => encoding::decode("the number of voters", &entry.value)
            .map_err(|error| CommandError::Unavailable(error.to_string()))?,
        None => VoterCount::Auto,
    };
    let voters: Vec<VoterInfo> = list
        .voters
        .iter()
        .enumerate()
        .map(|(at, voter)| VoterInfo {
            node: voter.node.to_string(),
            number: list.numbers.get(at).copied(),
            address: voter.address.clone(),
            alive: alive.contains(&voter.node),
            closed: list.closed.contains(&voter.node),
            leads: list.leader.as_ref() == Some(&voter.node),
        })
        .collect();
    let quorum = voters.len() / 2 + 1;
    let answering = voters.iter().filter(|voter| voter.alive && !voter.closed);
    Ok(StoreInfo {
        revision: store.revision().await?,
        external: external(context),
        term: list.term,
        wanted: wanted.to_string(),
        spare: u32::try_from(answering.count().saturating_sub(quorum)).unwrap_or(0),
        voters,
    })
}

/// The address of a store outside of the cluster's nodes.
fn external(context: &Context) -> Option<String> {
    let store = context.settings.store.as_ref();
    store.map(|store| store.address.clone())
}

/// A backup of the store: the bytes of its file.
///
/// # Errors
/// [`CommandError`] if the store does not answer.
pub(crate) async fn backup(context: &Context) -> Result<Vec<u8>, CommandError> {
    let listing = context.store.list("").await?;
    let backup = Backup {
        cluster: context.cluster.to_string(),
        revision: listing.revision,
        created_unix_ms: unix_ms(),
        entries: listing.entries,
    };
    let encoding = tokio::task::spawn_blocking(move || backup.encode()).await;
    match encoding {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(CommandError::Unavailable(error.to_string())),
        Err(error) => Err(CommandError::Unavailable(error.to_string())),
    }
}

/// Says how many voters the store shall have. The leader carries it out.
///
/// # Errors
/// [`CommandError::Invalid`] for an even number, [`CommandError::Conflict`] for a store outside of
/// the nodes, and if the store does not answer.
pub(crate) async fn set_voter_count(context: &Context, count: &str) -> Result<(), CommandError> {
    if let Some(address) = external(context) {
        let what = format!("this cluster's store is at {address}: its own nodes hold none");
        return Err(CommandError::Conflict(what));
    }
    let count: VoterCount = count.parse().map_err(CommandError::Invalid)?;
    let value = encoding::encode("the number of voters", &count)
        .map_err(|error| CommandError::Unavailable(error.to_string()))?;
    let txn = Txn::new().put(Key::VoterCount, value);
    context.store.txn(txn).await?;
    Ok(())
}

/// Removes a node from the cluster: this one, or one that is gone.
///
/// # Errors
/// [`CommandError::NotFound`] if it is no member; [`CommandError::Conflict`] if it is another one
/// that is alive, has machines, or is needed for the store; [`CommandError::Unavailable`].
pub(crate) async fn remove_node(context: &Context, node: &NodeName) -> Result<(), CommandError> {
    let store = &*context.store;
    let unavailable = |error: MemberError| CommandError::Unavailable(error.to_string());
    let alive = records::alive(store).await?;
    if *node != context.name && alive.contains(node) {
        let what = format!("node {node} is alive: `keel leave` there removes it");
        return Err(CommandError::Conflict(what));
    }
    let voters = members::voters(store).await.map_err(unavailable)?.voters;
    if voters.iter().any(|voter| voter.node == *node) {
        let others = voters.iter().filter(|voter| voter.node != *node);
        let others = others.filter(|voter| alive.contains(&voter.node)).count();
        // It is replaced only after it is gone.
        let (needed, what) = match external(context) {
            Some(_) => (1, "admits nodes"),
            None => (voters.len() / 2 + 1, "holds the store"),
        };
        if others < needed {
            let what = format!(
                "node {node} {what}, and without it too few nodes do (`keel store` names them): \
                 let others come back or join first, then wait until they do, too"
            );
            return Err(CommandError::Conflict(what));
        }
    }
    members::remove(store, node)
        .await
        .map_err(|error| match error {
            MemberError::NotAMember(_) => CommandError::NotFound(error.to_string()),
            MemberError::HasMachines { first, .. } if *node != context.name => {
                CommandError::Conflict(format!(
                    "node {node} still has machines ({first} …), which wait for it: if it is dead for good, \
                     `keel node rm {node} --node-is-dead` gives them up"
                ))
            }
            MemberError::HasMachines { .. } => CommandError::Conflict(error.to_string()),
            error => unavailable(error),
        })
}

/// The state of the cluster.
///
/// # Errors
/// [`CommandError`] if the store does not answer.
pub(crate) async fn status(
    context: &Context,
    gossip: &NodeGossip,
) -> Result<ClusterInfo, CommandError> {
    let nodes = nodes(context, gossip).await?;
    let machines = records::all(&*context.store).await?;
    Ok(ClusterInfo {
        cluster: context.cluster.to_string(),
        node: context.name.to_string(),
        voters: nodes
            .iter()
            .filter(|node| node.voter)
            .map(|node| node.name.clone())
            .collect(),
        store: format!("answers, revision {}", context.store.revision().await?),
        external_store: external(context),
        nodes: nodes.len() as u32,
        nodes_alive: nodes.iter().filter(|node| node.alive).count() as u32,
        machines: machines.len() as u32,
        machines_running: machines
            .iter()
            .filter(|record| matches!(record.status, Status::Running | Status::Filling { .. }))
            .count() as u32,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        agent_started_unix_ms: context.started_unix_ms,
    })
}

/// Creates a token.
///
/// # Errors
/// [`CommandError`].
pub(crate) async fn make_token(
    context: &Context,
    request: TokenRequest,
) -> Result<Token, CommandError> {
    let store = &*context.store;
    let authority = context.identity.issuer();
    let bad = |error: tokens::TokenError| CommandError::Invalid(error.to_string());
    let token = match request {
        TokenRequest::Join { ttl_s } => {
            let ttl_ms = ttl_s.saturating_mul(1000);
            tokens::create_join_token(store, authority, ttl_ms, unix_ms())
                .await
                .map_err(bad)?
                .to_string()
        }
        TokenRequest::User { name, role, ttl_s } => {
            let role: Role = role.parse().map_err(|_| {
                CommandError::Invalid(format!("{role:?} is no role: viewer, operator or admin"))
            })?;
            let expires = ttl_s.map(|ttl_s| unix_ms().saturating_add(ttl_s.saturating_mul(1000)));
            tokens::create_user_token(store, &name, role, expires)
                .await
                .map_err(bad)?
                .to_string()
        }
    };
    Ok(Token {
        token,
        authority: authority.to_string(),
    })
}

/// All tokens, without their secrets.
///
/// # Errors
/// [`CommandError`] if the store does not answer.
pub(crate) async fn tokens(context: &Context) -> Result<Vec<TokenInfo>, CommandError> {
    let listed = tokens::list_tokens(&*context.store).await;
    let listed = listed.map_err(|error| CommandError::Unavailable(error.to_string()))?;
    let info = listed.into_iter().map(|token| TokenInfo {
        id: token.id.to_string(),
        of: match token.of {
            TokenHolder::Node { used_by } => TokenUseInfo::Join {
                used_by: used_by.map(|node| node.to_string()),
            },
            TokenHolder::User { name, role } => TokenUseInfo::User {
                name,
                role: role.to_string(),
            },
        },
        expires_unix_ms: token.expires_unix_ms,
    });
    Ok(info.collect())
}

/// Removes a token.
///
/// # Errors
/// [`CommandError::NotFound`], and if the store does not answer.
pub(crate) async fn remove_token(context: &Context, id: &str) -> Result<(), CommandError> {
    let none = || CommandError::NotFound(format!("there is no token {id:?} (see `keel token ls`)"));
    let number: TokenId = id.parse().map_err(|_| none())?;
    match tokens::remove_token(&*context.store, number).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(none()),
        Err(error) => Err(CommandError::Unavailable(error.to_string())),
    }
}
