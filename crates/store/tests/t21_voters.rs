//! The embedded store with several voters: growth while it is used, loss of the leader, voters
//! that come back, snapshots for those that are far behind.

mod linearizability;
mod recorder;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use keel_store::{
    Change, Compare, IfAbsent, RaftOptions, Store, StoreError, Txn, TxnOutcome, Watch,
};
use keel_testkit::Group;
use recorder::{check_all, is_pause, record, wait_answers, wait_until};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// Pause before a request that was not answered is made again.
const AGAIN_AFTER: Duration = Duration::from_millis(20);

/// What a writer knows of its counter.
#[derive(Debug, Default)]
struct Written {
    /// The highest number that was answered.
    answered: u64,
    /// Numbers whose fate was never told.
    unknown: u64,
    refused: Vec<StoreError>,
    /// Longest time between two answers.
    longest: Duration,
}

/// Counts up in `key` until `until` says stop; settles an unknown outcome by a write.
async fn count(
    store: Arc<dyn Store>,
    key: String,
    answers: Arc<AtomicU64>,
    mut until: impl FnMut() -> bool,
) -> Result<Written, Box<dyn Error + Send + Sync>> {
    let mut written = Written::default();
    let mut revision = 0;
    let mut number = 0;
    let mut last = Instant::now();
    while !until() {
        let txn = match revision {
            0 => Txn::new().when_absent(key.clone()),
            revision => Txn::new().when_modified_at(key.clone(), revision),
        };
        match store
            .txn(txn.put(key.clone(), (number + 1).to_string()))
            .await
        {
            Ok(TxnOutcome::Committed { revision: at }) => {
                number += 1;
                revision = at;
                written.answered = number;
                answers.fetch_add(1, Relaxed);
                written.longest = written.longest.max(last.elapsed());
                last = Instant::now();
            }
            Ok(TxnOutcome::Refused { current, .. }) => {
                // An earlier one whose fate was unknown had won.
                let current = current.ok_or("the counter is gone")?;
                let found: u64 = String::from_utf8(current.value)?.parse()?;
                assert!(found >= written.answered, "{found} after {written:?}");
                assert!(written.unknown > 0, "{found} was written by nobody");
                number = found;
                revision = current.modified;
            }
            Err(StoreError::Unknown { .. }) => written.unknown += 1,
            Err(error) if is_pause(&error) => {
                written.refused.push(error);
                tokio::time::sleep(AGAIN_AFTER).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(written)
}

/// Follows a prefix across changes of the leader until a key has a value.
async fn follow(
    store: Arc<dyn Store>,
    prefix: &'static str,
    end: (&'static str, &'static str),
) -> Result<Vec<(u64, String, String)>, Box<dyn Error + Send + Sync>> {
    let mut seen = Vec::new();
    let mut next = 1;
    let mut watch: Option<Watch> = None;
    loop {
        let Some(open) = watch.as_mut() else {
            match store.watch(prefix, next).await {
                Ok(open) => watch = Some(open),
                Err(error) if is_pause(&error) => {
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
                Err(error) => return Err(error.into()),
            }
            continue;
        };
        match open.next().await {
            Some(Ok(changes)) => {
                assert!(changes.revision >= next, "{} again", changes.revision);
                next = changes.revision + 1;
                for change in changes.changes {
                    let Change::Put(entry) = change else { continue };
                    let value = String::from_utf8(entry.value)?;
                    let is_end = (entry.key.as_str(), value.as_str()) == end;
                    seen.push((changes.revision, entry.key, value));
                    if is_end {
                        return Ok(seen);
                    }
                }
            }
            Some(Err(error)) if is_pause(&error) => watch = None,
            Some(Err(error)) => return Err(error.into()),
            None => watch = None,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_voter_becomes_three_and_refuses_nothing_meanwhile() -> Outcome {
    let mut group = Group::of_one(RaftOptions::default()).await?;
    let store: Arc<dyn Store> = group.client()?;
    let grown = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|n| {
            let grown = grown.clone();
            let mut rest = 50;
            let until = move || {
                // Some more after the change.
                rest -= u32::from(grown.load(Relaxed));
                rest == 0
            };
            tokio::spawn(count(
                store.clone(),
                format!("k/{n}"),
                Arc::default(),
                until,
            ))
        })
        .collect();
    group.grow_to_three().await?;
    grown.store(true, Relaxed);
    for writer in writers {
        let written = writer.await??;
        assert!(written.answered > 40);
        assert!(
            written.refused.is_empty() && written.unknown == 0,
            "{written:?}"
        );
    }
    let status = group.store(1).status();
    assert_eq!(status.voters.len(), 3);
    assert!(status.learners.is_empty());
    // All three have all of it.
    let revision = group.store(1).revision().await?;
    assert!(revision > 160);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loss_of_leaders_loses_nothing_that_was_answered() -> Outcome {
    let mut group = Group::of_three(RaftOptions::default()).await?;
    let store: Arc<dyn Store> = group.client()?;
    let stop = Arc::new(AtomicBool::new(false));
    let answers = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..3)
        .map(|n| {
            let stop = stop.clone();
            let counting = count(
                store.clone(),
                format!("k/{n}"),
                answers.clone(),
                move || stop.load(Relaxed),
            );
            tokio::spawn(counting)
        })
        .collect();
    let watched = tokio::spawn(follow(store.clone(), "k/", ("k/end", "")));
    let mut outages = Vec::new();
    for round in 0..4 {
        wait_answers(&answers, 60).await?;
        let leader = group.leader(None).await?;
        let begun = Instant::now();
        group.stop(leader).await;
        group.leader(Some(leader)).await?;
        outages.push(begun.elapsed());
        wait_answers(&answers, 20).await?;
        group.start(leader, IfAbsent::Refuse).await?;
        tracing::info!(round, leader);
    }
    stop.store(true, Relaxed);
    let mut answered = BTreeMap::new();
    for (n, writer) in writers.into_iter().enumerate() {
        let written = writer.await??;
        assert!(written.answered > 0);
        answered.insert(format!("k/{n}"), written.answered);
    }
    eprintln!("the store was without a leader for {outages:?}");
    while let Err(error) = store.txn(Txn::new().put("k/end", "")).await {
        assert!(is_pause(&error), "{error}");
    }
    let seen = watched.await??;
    for (key, answered) in &answered {
        let numbers = seen.iter().filter(|(_, of, _)| of == key);
        let numbers: Vec<u64> = numbers
            .map(|(_, _, n)| n.parse())
            .collect::<Result<_, _>>()?;
        // Each number once, in order: no gap and no repetition across the leaders.
        let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
        assert_eq!(numbers, expected, "{key}");
        assert!(numbers.len() as u64 >= *answered, "{key}: {answered}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_live_on_under_the_next_leader_and_end_there() -> Outcome {
    let mut group = Group::of_three(RaftOptions::default()).await?;
    let store: Arc<dyn Store> = group.client()?;
    let (held, left) = (
        store.lease_grant(1500).await?,
        store.lease_grant(1500).await?,
    );
    let txn = Txn::new().put_leased("held", "", held);
    store.txn(txn.put_leased("left", "", left)).await?;
    let leader = group.leader(None).await?;
    group.stop(leader).await;
    let begun = Instant::now();
    let is_there = async || match store.get("left").await {
        Ok(entry) => entry.is_some(),
        Err(error) => {
            assert!(is_pause(&error), "{error}");
            true
        }
    };
    while is_there().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not end");
        match store.lease_renew(held).await {
            Ok(ttl_ms) => assert_eq!(ttl_ms, 1500),
            Err(error) => assert!(is_pause(&error), "{error}"),
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
    assert!(store.get("held").await?.is_some());
    assert_eq!(store.get("left").await?, None);
    let alive = Txn::new().when(Compare::LeaseAlive { lease: left });
    assert!(!store.txn(alive.put("x", "")).await?.is_committed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_far_behind_gets_a_snapshot() -> Outcome {
    let options = RaftOptions {
        snapshot_entries: 50,
        ..RaftOptions::default()
    };
    let mut group = Group::of_three(options).await?;
    let leader = group.leader(None).await?;
    let absent = (1..=3).find(|id| *id != leader).ok_or("alone")?;
    group.stop(absent).await;
    let store: Arc<dyn Store> = group.client()?;
    let lease = store.lease_grant(60_000).await?;
    store
        .txn(Txn::new().put_leased("leased", "", lease))
        .await?;
    for n in 0..300u32 {
        store
            .txn(Txn::new().put(format!("k/{}", n % 7), vec![n as u8; 3000]))
            .await?;
    }
    group.start(absent, IfAbsent::Refuse).await?;
    let before = store.list("").await?;
    // It leads once the other one is gone: it has everything, or is not elected.
    let third = (1..=3)
        .find(|id| ![leader, absent].contains(id))
        .ok_or("alone")?;
    let applied = group.store(leader).status().applied;
    let begun = Instant::now();
    while group.store(absent).status().applied < applied {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "it does not catch up"
        );
        tokio::time::sleep(AGAIN_AFTER).await;
    }
    group.stop(third).await;
    group.leader(None).await?;
    group.store(group.leader(None).await?);
    group.start(third, IfAbsent::Refuse).await?;
    group.stop(leader).await;
    group.leader(Some(leader)).await?;
    assert_eq!(store.list("").await?.entries, before.entries);
    assert_eq!(store.lease_renew(lease).await?, 60_000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_nothing_is_answered_and_all_of_it_comes_back() -> Outcome {
    let mut group = Group::of_three(RaftOptions::default()).await?;
    let store: Arc<dyn Store> = group.client()?;
    store.txn(Txn::new().put("a", "1")).await?;
    let leader = group.leader(None).await?;
    let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
    for id in &others {
        group.stop(*id).await;
    }
    let alone = group.store(leader);
    let begun = Instant::now();
    while alone.is_serving() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it serves alone");
        tokio::time::sleep(AGAIN_AFTER).await;
    }
    for result in [
        alone.get("a").await.map(drop),
        alone.txn(Txn::new().put("a", "2")).await.map(drop),
        alone.lease_grant(1000).await.map(drop),
        alone.watch("", 1).await.map(drop),
    ] {
        assert!(
            matches!(result, Err(StoreError::NotLeader { leader: None })),
            "{result:?}"
        );
    }
    drop(alone);
    group.stop(leader).await;
    // Power loss of all; two of three are enough.
    for id in others {
        group.start(id, IfAbsent::Refuse).await?;
    }
    let entry = store.get("a").await?.ok_or("it is gone")?;
    assert_eq!(entry.value, b"1");
    store.txn(Txn::new().put("a", "3")).await?;
    group.start(leader, IfAbsent::Refuse).await?;
    let entry = store.get("a").await?.ok_or("it is gone")?;
    assert_eq!(entry.value, b"3");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_was_cut_off_deposes_nobody_when_it_comes_back() -> Outcome {
    let group = Group::of_three(RaftOptions::default()).await?;
    let store: Arc<dyn Store> = group.client()?;
    let leader = group.leader(None).await?;
    let cut_off = (1..=3).find(|id| *id != leader).ok_or("alone")?;
    let term = group.store(leader).status().term;
    group.cut_off(cut_off, true);
    let alone = group.store(cut_off);
    wait_until("it would be elected", || alone.status().pre_votes >= 5).await?;
    assert_eq!(alone.status().term, term);
    store.txn(Txn::new().put("a", "1")).await?;
    let applied = group.store(leader).status().applied;
    group.cut_off(cut_off, false);
    wait_until("it follows again", || alone.status().applied >= applied).await?;
    let status = group.store(leader).status();
    assert_eq!((status.term, status.leader), (term, Some(leader)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_is_replaced_by_a_new_one() -> Outcome {
    let mut group = Group::of_three(RaftOptions::default()).await?;
    let leader = group.leader(None).await?;
    let lost = (1..=3).find(|id| *id != leader).ok_or("alone")?;
    group.stop(lost).await;
    // (Another one may lead by now.)
    let client = group.client()?;
    client.txn(Txn::new().put("a", "1")).await?;
    let id = group.store(group.leader(None).await?).next_id().await?;
    assert!(!(1..=3).contains(&id));
    group.prepare(id).await?;
    group.start(id, IfAbsent::Join(id)).await?;
    let mut voters: BTreeSet<u64> = (1..=3).filter(|voter| *voter != lost).collect();
    voters.insert(id);
    let mut tries = 0;
    let leader = loop {
        let leader = group.leader(None).await?;
        let store = group.store(leader);
        let changed = async {
            store.add_learner(id, group.members[&id].voter()).await?;
            store.set_voters(voters.clone()).await
        };
        match changed.await {
            Ok(()) => break leader,
            Err(error) => assert!(is_pause(&error) && tries < 10, "{error}"),
        }
        tries += 1;
    };
    let status = group.store(leader).status();
    assert_eq!(
        status.voters.keys().copied().collect::<BTreeSet<_>>(),
        voters
    );
    assert!(
        status.learners.is_empty() && !status.is_changing,
        "{status:?}"
    );
    // The new one counts: without the old leader there is a quorum.
    group.stop(leader).await;
    let next = group.leader(Some(leader)).await?;
    let entry = group.store(next).get("a").await?.ok_or("it is gone")?;
    assert_eq!(entry.value, b"1");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_voters_that_cannot_be_read_are_refused() -> Outcome {
    let group = Group::of_one(RaftOptions::default()).await?;
    let store = group.store(1);
    let mut seed = 1u64;
    for kind in 0x0110..=0x0114 {
        for length in 0..200usize {
            let bytes: Vec<u8> = (0..length)
                .map(|i| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if i == 0 { 1 } else { (seed >> 40) as u8 }
                })
                .collect();
            let answer = store.answer(kind, &bytes).await;
            let error = answer.err().ok_or("nonsense was answered")?;
            assert!(error.certainly_not_executed(), "{error}");
        }
    }
    assert_eq!(store.revision().await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_are_linearizable_while_leaders_are_lost() -> Outcome {
    let mut group = Group::of_three(RaftOptions::default()).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let begun = Instant::now();
    let answers = Arc::new(AtomicU64::new(0));
    let mut clients = Vec::new();
    // Each knows one voter only, so some stay with a leader that was replaced.
    for seed in 0..6 {
        let store: Arc<dyn Store> = group.client_of(std::iter::once(1 + seed / 2))?;
        clients.push(tokio::spawn(record(
            store,
            seed,
            begun,
            stop.clone(),
            answers.clone(),
        )));
    }
    for round in 0..6 {
        wait_answers(&answers, 60).await?;
        let leader = group.leader(None).await?;
        match round % 2 {
            0 => {
                group.stop(leader).await;
                group.leader(Some(leader)).await?;
                group.start(leader, IfAbsent::Refuse).await?;
            }
            // Nobody hears it any more, and it does not notice at once.
            _ => {
                group.cut_off(leader, true);
                group.leader(Some(leader)).await?;
                wait_answers(&answers, 60).await?;
                group.cut_off(leader, false);
            }
        }
    }
    wait_answers(&answers, 60).await?;
    stop.store(true, Relaxed);
    check_all(clients).await
}
