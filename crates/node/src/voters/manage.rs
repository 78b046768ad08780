//! The leader's care for the group of voters, and every node's view of it.

use super::handle::{BECOME_VOTER, BecomeVoter, COPY, Engine, VoterError, Voters};
use keel_cluster::NodeName;
use keel_cluster::failover::zone_of;
use keel_cluster::members::{self, MemberSet, Voter, VoterList};
use keel_cluster::voters::{Candidate, VoterCount, next_voters};
use keel_machine::worker::control::{pack, unpack};
use keel_net::{RpcError, coarse_timer};
use keel_store::keys::{ALIVE, Key, NODE_LABELS};
use keel_store::{RaftStatus, RaftStore, Store, StoreError, encoding};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the leader looks at the group.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Pause after an error.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// A node that is in no list of voters for so long removes its copy.
const RETIRE_AFTER: Duration = Duration::from_secs(120);
/// Time for a node to open its copy.
const BECOME_PATIENCE: Duration = Duration::from_secs(20);
/// How often the voters are asked whether they have their copies.
const COPIES_EVERY: Duration = Duration::from_secs(5);
/// Time for one to answer.
const COPY_PATIENCE: Duration = Duration::from_secs(1);

/// Keeps the voters in number, alive and apart, while this node leads; until the process ends.
pub(crate) async fn manage(voters: Arc<Voters>, all: Arc<MemberSet>) {
    if voters.external().is_some() {
        return;
    }
    let mut states = NodeStates::default();
    loop {
        coarse_timer::sleep(LOOK_EVERY).await;
        let Some(store) = voters.store().filter(|store| store.is_serving()) else {
            // Another leader saw more meanwhile.
            states = NodeStates::default();
            continue;
        };
        if let Err(error) = look(&voters, &store, &all, &mut states).await {
            tracing::warn!(%error, "the group of voters cannot be changed yet");
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }
}

/// Since when each node is alive, or away, as this leader saw it.
#[derive(Default)]
pub(super) struct NodeStates {
    nodes: BTreeMap<NodeName, (bool, Instant)>,
    copies_seen: Option<Instant>,
    /// Voters that said so when they were asked for their copies.
    closed: BTreeSet<NodeName>,
}

impl NodeStates {
    /// Whether it is time to ask the voters for their copies.
    fn copies_are_due(&mut self) -> bool {
        let due = self
            .copies_seen
            .is_none_or(|at| at.elapsed() >= COPIES_EVERY);
        if due {
            self.copies_seen = Some(Instant::now());
        }
        due
    }

    /// What the store says of all nodes.
    pub(super) async fn look(
        &mut self,
        store: &dyn Store,
        all: &MemberSet,
    ) -> Result<BTreeMap<NodeName, Candidate>, StoreError> {
        let (alive, zones) = tokio::try_join!(
            nodes_under(store, ALIVE, |_| Some(())),
            nodes_under(store, NODE_LABELS, zone_of)
        )?;
        let alive = alive.into_keys().collect();
        Ok(self.candidates(all, &alive, &zones))
    }

    fn candidates(
        &mut self,
        all: &MemberSet,
        alive: &BTreeSet<NodeName>,
        zones: &BTreeMap<NodeName, String>,
    ) -> BTreeMap<NodeName, Candidate> {
        let now = Instant::now();
        let members = all.all();
        self.nodes.retain(|node, _| members.contains_key(node));
        let mut candidate = |node: &NodeName| {
            let is_alive = alive.contains(node);
            let state = self.nodes.entry(node.clone()).or_insert((is_alive, now));
            if state.0 != is_alive {
                *state = (is_alive, now);
            }
            Candidate {
                is_alive,
                since: now.saturating_duration_since(state.1),
                zone: zones.get(node).cloned(),
            }
        };
        members
            .keys()
            .map(|node| (node.clone(), candidate(node)))
            .collect()
    }
}

async fn look(
    voters: &Voters,
    store: &RaftStore,
    all: &MemberSet,
    states: &mut NodeStates,
) -> Result<(), VoterError> {
    let status = store.status();
    // Together, so that the voters confirm them in one round.
    let (published, candidates, wanted) = tokio::try_join!(
        async { Ok(members::voters(store).await?) },
        async { Ok(states.look(store, all).await?) },
        wanted_count(store)
    )?;
    let list = voter_list(&status, &states.closed);
    if published != list {
        members::set_voters(store, &list).await?;
    }
    if status.is_changing {
        // An earlier leader died in the middle of it.
        let ids: BTreeSet<u64> = status.voters.keys().copied().collect();
        store.set_voters(ids).await?;
        return publish(store, states).await;
    }
    let moved = with_new_address(&status, all);
    if !moved.is_empty() {
        tracing::info!(?moved, "voters have other addresses");
        store.set_addresses(moved).await?;
        return publish(store, states).await;
    }
    let without = match states.copies_are_due() {
        true => {
            let found = copies(voters, &status, &candidates).await;
            states.closed = found.closed;
            found.lost
        }
        false => BTreeMap::new(),
    };
    if !without.is_empty() {
        renumber(voters, store, &status, all, &without).await?;
        return publish(store, states).await;
    }
    let now = names(&status);
    let Some(next) = next_voters(&now, &voters.name, &candidates, wanted) else {
        let idle: BTreeSet<u64> = status.learners.keys().copied().collect();
        if !idle.is_empty() {
            store.remove_learners(idle).await?;
        }
        return Ok(());
    };
    tracing::info!(?now, ?next, "changing the voters of the store");
    let _changing = voters.keys_changing.lock().await;
    let mut ids = BTreeSet::new();
    for node in &next {
        ids.insert(match id_of(&status.voters, node) {
            Some(id) => id,
            None => add(voters, store, &status, all, node).await?,
        });
    }
    store.set_voters(ids).await?;
    publish(store, states).await
}

/// Nodes of the group that listen elsewhere than it says.
fn with_new_address(status: &RaftStatus, all: &MemberSet) -> BTreeMap<u64, keel_store::Voter> {
    let members = all.all();
    let group = status.voters.iter().chain(&status.learners);
    let moved = group.filter_map(|(id, voter)| {
        let member = members.get(&voter.node.parse::<NodeName>().ok()?)?;
        let now = keel_store::Voter {
            node: voter.node.clone(),
            address: member.address.clone(),
        };
        (now != *voter).then_some((*id, now))
    });
    moved.collect()
}

/// Voters that are alive, and do not have the copies that their numbers stand for.
#[derive(Default)]
struct Copies {
    /// For good.
    lost: BTreeMap<u64, NodeName>,
    /// Open: they may have them.
    closed: BTreeSet<NodeName>,
}

/// Asks the voters for their copies.
async fn copies(
    voters: &Voters,
    status: &RaftStatus,
    candidates: &BTreeMap<NodeName, Candidate>,
) -> Copies {
    let mut found = Copies::default();
    for (id, voter) in &status.voters {
        let Ok(node) = voter.node.parse::<NodeName>() else {
            continue;
        };
        let is_alive = candidates.get(&node).is_some_and(|it| it.is_alive);
        if *id == status.id || !is_alive {
            continue;
        }
        match copy_of(voters, &node).await {
            Ok(held) if held != Some(*id) => drop(found.lost.insert(*id, node)),
            Ok(_) => {}
            Err(CopyError::Closed) => drop(found.closed.insert(node)),
            // Whoever does not answer may have it.
            Err(CopyError::NoAnswer(_)) => {}
        }
    }
    found
}

/// Why the number of a node's copy is not known.
enum CopyError {
    /// It says that its copy is closed.
    Closed,
    NoAnswer(String),
}

impl From<CopyError> for VoterError {
    fn from(error: CopyError) -> Self {
        VoterError::Store(StoreError::unavailable(match error {
            CopyError::Closed => "its copy of the store is closed".to_owned(),
            CopyError::NoAnswer(reason) => reason,
        }))
    }
}

/// The number of the copy that a node has.
async fn copy_of(voters: &Voters, node: &NodeName) -> Result<Option<u64>, CopyError> {
    let none = |error: RpcError| CopyError::NoAnswer(error.to_string());
    let question = pack(&()).map_err(none)?;
    match voters.peers.call(node, COPY, question, COPY_PATIENCE).await {
        Ok(answer) => unpack(&answer).map_err(none),
        Err(RpcError::Refused { .. }) => Err(CopyError::Closed),
        Err(error) => Err(none(error)),
    }
}

/// Gives voters without their copies new ones, under new numbers: what they voted for is forgotten.
async fn renumber(
    voters: &Voters,
    store: &RaftStore,
    status: &RaftStatus,
    all: &MemberSet,
    without: &BTreeMap<u64, NodeName>,
) -> Result<(), VoterError> {
    // One at a time: the others are the quorum.
    let Some((old, node)) = without.first_key_value() else {
        return Ok(());
    };
    tracing::warn!(%node, old, "this voter lost its copy of the store; it gets another one");
    let _changing = voters.keys_changing.lock().await;
    let new = add(voters, store, status, all, node).await?;
    let mut ids: BTreeSet<u64> = status.voters.keys().copied().collect();
    ids.remove(old);
    ids.insert(new);
    Ok(store.set_voters(ids).await?)
}

/// Makes `node` a learner that has everything; its number.
async fn add(
    voters: &Voters,
    store: &RaftStore,
    status: &RaftStatus,
    all: &MemberSet,
    node: &NodeName,
) -> Result<u64, VoterError> {
    let unavailable = |reason: String| VoterError::Store(StoreError::unavailable(reason));
    let authorities = voters.keys.all();
    let authority = authorities.first();
    let authority =
        authority.ok_or_else(|| unavailable("this voter lacks the cluster's authority".into()))?;
    let id = match id_of(&status.learners, node) {
        Some(id) if copy_of(voters, node).await? == Some(id) => id,
        // A number stands for what a copy once had.
        Some(id) => {
            store.remove_learners(BTreeSet::from([id])).await?;
            store.next_id().await?
        }
        None => store.next_id().await?,
    };
    let request = BecomeVoter {
        id,
        term: status.term,
        authority_pem: authority.certificate_pem().to_owned(),
        authority_key_pem: authority.key_pem(),
    };
    let payload = pack(&request).map_err(|error| unavailable(error.to_string()))?;
    let asked = voters
        .peers
        .call(node, BECOME_VOTER, payload, BECOME_PATIENCE)
        .await;
    asked.map_err(|error| unavailable(error.to_string()))?;
    // Two while the authority is replaced.
    for authority in &authorities[1..] {
        voters.give_key(node, authority).await?;
    }
    let member = all.all().get(node).cloned();
    let member = member.ok_or_else(|| unavailable(format!("{node} left the cluster")))?;
    let voter = keel_store::Voter {
        node: node.to_string(),
        address: member.address,
    };
    store.add_learner(id, voter).await?;
    Ok(id)
}

fn names(status: &RaftStatus) -> BTreeSet<NodeName> {
    let names = status.voters.values();
    names.filter_map(|voter| voter.node.parse().ok()).collect()
}

fn id_of(group: &BTreeMap<u64, keel_store::Voter>, node: &NodeName) -> Option<u64> {
    let mut found = group.iter().filter(|(_, it)| it.node == node.as_str());
    found.next().map(|(id, _)| *id)
}

async fn wanted_count(store: &RaftStore) -> Result<VoterCount, VoterError> {
    Ok(match store.get(&Key::VoterCount.to_string()).await? {
        Some(entry) => encoding::decode("the number of voters", &entry.value)
            .map_err(members::MemberError::from)?,
        None => VoterCount::Auto,
    })
}

/// Writes who the voters are, for nodes and for people.
async fn publish(store: &RaftStore, states: &NodeStates) -> Result<(), VoterError> {
    let list = voter_list(&store.status(), &states.closed);
    Ok(members::set_voters(store, &list).await?)
}

fn voter_list(status: &RaftStatus, closed: &BTreeSet<NodeName>) -> VoterList {
    let voter = |it: &keel_store::Voter| {
        Some(Voter {
            node: it.node.parse().ok()?,
            address: it.address.clone(),
        })
    };
    let leader = status.voters.get(&status.id);
    VoterList {
        voters: status.voters.values().filter_map(voter).collect(),
        leader: leader.and_then(|it| it.node.parse().ok()),
        term: status.term,
        numbers: status.voters.keys().copied().collect(),
        closed: closed.iter().cloned().collect(),
    }
}

async fn nodes_under<T>(
    store: &dyn Store,
    prefix: &str,
    read: impl Fn(&[u8]) -> Option<T>,
) -> Result<BTreeMap<NodeName, T>, StoreError> {
    let entries = store.list(prefix).await?.entries;
    let found = entries.iter().filter_map(|entry| {
        let node = match entry.key.parse() {
            Ok(Key::Alive(node) | Key::NodeLabels(node)) => node,
            _ => return None,
        };
        Some((node, read(&entry.value)?))
    });
    Ok(found.collect())
}

/// Opens this node's copy again whenever it stopped or could not be opened, until the process ends.
pub(crate) async fn reopen(voters: Arc<Voters>) {
    loop {
        coarse_timer::sleep(RETRY_AFTER).await;
        match voters.store() {
            Some(store) => {
                let Some(reason) = store.stopped() else {
                    continue;
                };
                voters.tell_stopped(&reason);
            }
            // A store that was moved out of the nodes may have left a copy.
            None if voters.external().is_none()
                && voters.dir.store().exists()
                && !voters.is_damaged() => {}
            None => continue,
        }
        if let Err(error) = voters.reopen().await {
            voters.tell_closed(&error);
        }
    }
}

/// Follows the list of voters until the process ends.
pub(crate) async fn follow(voters: Arc<Voters>) {
    let mut absent_since = None;
    loop {
        if let Err(error) = follow_once(&voters, &mut absent_since).await {
            tracing::warn!(%error, "the list of voters cannot be followed, trying again");
            voters.ask_who_votes().await;
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

async fn follow_once(
    voters: &Voters,
    absent_since: &mut Option<Instant>,
) -> Result<(), VoterError> {
    let key = Key::Voters.to_string();
    let client = voters.client();
    loop {
        let listing = client.list(&key).await?;
        if let Some(entry) = listing.entries.iter().find(|entry| entry.key == key) {
            adopt(voters, &members::read_voters(&entry.value)?, absent_since).await?;
        }
        let mut watch = client.watch(&key, listing.revision + 1).await?;
        // Now and then also without a change: a copy that is no longer needed goes.
        match tokio::time::timeout(RETIRE_AFTER / 4, watch.next()).await {
            Ok(Some(changes)) => drop(changes?),
            Ok(None) => return Ok(()),
            Err(_) => {}
        }
    }
}

async fn adopt(
    voters: &Voters,
    list: &VoterList,
    absent_since: &mut Option<Instant>,
) -> Result<(), VoterError> {
    let members = voters.members.all();
    for voter in &list.voters {
        // The leader may not have noted a new address yet.
        let address = match members.get(&voter.node) {
            Some(member) => &member.address,
            None => &voter.address,
        };
        if voter.node != voters.name {
            voters.peers.set_address(&voter.node, address);
        }
    }
    let names = list.voters.iter().map(|voter| voter.node.clone());
    if let Engine::Embedded(client) = &voters.engine {
        client.set_voters(names.collect());
    }
    let now = list.voters.iter();
    let now: Vec<_> = now
        .map(|it| (it.node.clone(), it.address.clone()))
        .collect();
    voters
        .change_settings(|settings| settings.voters = now)
        .await;
    let is_voter = list.voters.iter().any(|voter| voter.node == voters.name);
    if is_voter || !voters.serves() {
        *absent_since = None;
        return Ok(());
    }
    let since = *absent_since.get_or_insert_with(Instant::now);
    // A learner is in no list yet.
    let asked_lately = voters.asked_since().is_some_and(|it| it < RETIRE_AFTER);
    if since.elapsed() >= RETIRE_AFTER && !asked_lately {
        voters.retire().await?;
        *absent_since = None;
    }
    Ok(())
}
