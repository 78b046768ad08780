//! The contract of every store implementation. Each check gets an empty store of its own;
//! `tests/t20_store.rs` runs all of them against each engine.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keel_store::{
    Change, Changes, Compare, KEY_BYTES_MAX, LeaseId, Op, Store, StoreError, TXN_PARTS_MAX, Txn,
    TxnOutcome, VALUE_BYTES_MAX, Watch,
};

pub(crate) type Outcome = Result<(), Box<dyn Error>>;
type Shared = Arc<dyn Store>;

const LIMIT: Duration = Duration::from_secs(20);

async fn next(watch: &mut Watch) -> Result<Changes, Box<dyn Error>> {
    let next = tokio::time::timeout(LIMIT, watch.next()).await?;
    Ok(next.ok_or("the watch is over")??)
}

async fn committed(store: &Shared, txn: Txn) -> Result<u64, Box<dyn Error>> {
    match store.txn(txn).await? {
        TxnOutcome::Committed { revision } => Ok(revision),
        refused => Err(format!("{refused:?}").into()),
    }
}

pub(crate) async fn puts_gets_lists_and_deletes(store: Shared) -> Outcome {
    assert_eq!(store.revision().await?, 0);
    assert_eq!(store.get("a").await?, None);
    assert_eq!(committed(&store, Txn::new().put("a", "1")).await?, 1);
    assert_eq!(
        committed(&store, Txn::new().put("a", "2").put("b", "x")).await?,
        2
    );
    let a = store.get("a").await?.ok_or("no a")?;
    assert_eq!((a.created, a.modified, a.lease), (1, 2, None));
    assert_eq!(a.value, b"2");
    committed(&store, Txn::new().put("ab/1", "").put("ac", "")).await?;
    let keys = |prefix: &'static str| {
        let store = Arc::clone(&store);
        async move {
            let listing = store.list(prefix).await?;
            let keys: Vec<String> = listing.entries.into_iter().map(|e| e.key).collect();
            Ok::<_, StoreError>((listing.revision, keys.join(" ")))
        }
    };
    assert_eq!(keys("").await?, (3, "a ab/1 ac b".into()));
    assert_eq!(keys("a").await?, (3, "a ab/1 ac".into()));
    assert_eq!(keys("ab/").await?, (3, "ab/1".into()));
    assert_eq!(keys("zz").await?, (3, String::new()));
    assert_eq!(committed(&store, Txn::new().delete("a")).await?, 4);
    assert_eq!(store.get("a").await?, None);
    // A transaction without effect has no revision.
    assert_eq!(committed(&store, Txn::new().delete("a")).await?, 4);
    assert_eq!(committed(&store, Txn::new()).await?, 4);
    // Put again: created anew.
    committed(&store, Txn::new().put("a", "3")).await?;
    assert_eq!(store.get("a").await?.map(|a| a.created), Some(5));
    Ok(())
}

pub(crate) async fn a_refusal_tells_which_compare_failed(store: Shared) -> Outcome {
    let lease = store.lease_grant(60_000).await?;
    let txn = Txn::new().put("a", "1").put_leased("l", "", lease);
    let first = committed(&store, txn).await?;
    let a = || "a".to_owned();
    let holding = vec![
        Compare::Exists { key: a() },
        Compare::Absent { key: "z".into() },
        Compare::ModifiedAt {
            key: a(),
            revision: first,
        },
        Compare::Value {
            key: a(),
            value: b"1".to_vec(),
        },
        Compare::Attached {
            key: "l".into(),
            lease,
        },
        Compare::LeaseAlive { lease },
        Compare::NoneUnder {
            prefix: "z/".into(),
        },
    ];
    let failing = [
        (Compare::Absent { key: a() }, Some("a")),
        (Compare::Exists { key: "z".into() }, None),
        (
            Compare::ModifiedAt {
                key: a(),
                revision: first + 8,
            },
            Some("a"),
        ),
        (
            Compare::ModifiedAt {
                key: "z".into(),
                revision: 0,
            },
            None,
        ),
        (
            Compare::Value {
                key: a(),
                value: b"2".to_vec(),
            },
            Some("a"),
        ),
        (Compare::Attached { key: a(), lease }, Some("a")),
        (
            Compare::LeaseAlive {
                lease: LeaseId(999),
            },
            None,
        ),
        (Compare::NoneUnder { prefix: "l".into() }, Some("l")),
    ];
    for (compare, about) in failing {
        let mut txn = Txn::new().put("never", "");
        txn.compare = holding.clone();
        txn.compare.push(compare.clone());
        txn.compare.push(Compare::Exists {
            key: "also-absent".into(),
        });
        match store.txn(txn).await? {
            TxnOutcome::Refused {
                failed,
                revision,
                current,
            } => {
                assert_eq!(revision, first);
                assert_eq!(failed, holding.len(), "{compare:?}");
                assert_eq!(current.map(|e| e.key).as_deref(), about, "{compare:?}");
            }
            other => return Err(format!("{compare:?}: {other:?}").into()),
        }
    }
    assert_eq!(store.get("never").await?, None);
    let mut txn = Txn::new().put("now", "");
    txn.compare = holding;
    committed(&store, txn).await?;
    Ok(())
}

/// Writers that compare and swap: no increment is lost, none is doubled.
pub(crate) async fn concurrent_writers_lose_nothing(store: Shared) -> Outcome {
    const WRITERS: u64 = 8;
    const EACH: u64 = 25;
    committed(&store, Txn::new().put("n", "0")).await?;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            for step in 0..EACH {
                loop {
                    let n = store.get("n").await?.ok_or(StoreError::Unavailable {
                        reason: "no n".into(),
                    })?;
                    let count = String::from_utf8_lossy(&n.value).parse().unwrap_or(0u64);
                    let txn = Txn::new()
                        .when_modified_at("n", n.modified)
                        .put("n", (count + 1).to_string())
                        .put(format!("log/{writer}/{step}"), (count + 1).to_string());
                    if store.txn(txn).await?.is_committed() {
                        break;
                    }
                }
            }
            Ok::<(), StoreError>(())
        });
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    let total = WRITERS * EACH;
    let n = store.get("n").await?.ok_or("no n")?;
    assert_eq!(n.value, total.to_string().into_bytes());
    let log = store.list("log/").await?.entries;
    let mut counts: Vec<u64> = log
        .iter()
        .filter_map(|e| String::from_utf8_lossy(&e.value).parse().ok())
        .collect();
    counts.sort_unstable();
    assert_eq!(counts, (1..=total).collect::<Vec<_>>());
    assert_eq!(store.revision().await?, total + 1);
    Ok(())
}

/// A watch from a revision sees each later change once, in order, whole
/// transactions at a time, whether it began before or after them.
pub(crate) async fn a_watch_has_no_gaps(store: Shared) -> Outcome {
    committed(&store, Txn::new().put("w/0", "")).await?;
    let listing = store.list("w/").await?;
    let mut before = store.watch("w/", listing.revision + 1).await?;
    let writing = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for i in 1..=100u32 {
                let txn = Txn::new()
                    .put(format!("w/{i}"), "a")
                    .put(format!("w/{i}+"), "b")
                    .put(format!("other/{i}"), "");
                store.txn(txn).await?;
                store.txn(Txn::new().put("other", "")).await?;
                store.txn(Txn::new().delete(format!("w/{i}"))).await?;
            }
            Ok::<(), StoreError>(())
        })
    };
    let check = async |watch: &mut Watch| -> Outcome {
        let mut last = listing.revision;
        for i in 1..=100u32 {
            let put = next(watch).await?;
            assert!(put.revision > last);
            assert_eq!(put.changes.len(), 2);
            assert_eq!(put.changes[0].key(), format!("w/{i}"));
            assert_eq!(put.changes[1].key(), format!("w/{i}+"));
            assert!(matches!(&put.changes[0], Change::Put(e) if e.modified == put.revision));
            let delete = next(watch).await?;
            assert_eq!(delete.revision, put.revision + 2);
            let key = format!("w/{i}");
            assert_eq!(delete.changes, vec![Change::Delete { key }]);
            last = delete.revision;
        }
        Ok(())
    };
    check(&mut before).await?;
    writing.await??;
    let mut after = store.watch("w/", listing.revision + 1).await?;
    check(&mut after).await?;
    // From the beginning: the listed one too.
    let mut all = store.watch("w/", 0).await?;
    assert_eq!(next(&mut all).await?.changes[0].key(), "w/0");
    // Ahead of the store: it was restored from a backup.
    let ahead = store.watch("w/", store.revision().await? + 2).await;
    assert!(matches!(ahead, Err(StoreError::Ahead { .. })));
    // Quiet until something happens.
    let mut quiet = store.watch("w/", store.revision().await? + 1).await?;
    let silence = tokio::time::timeout(Duration::from_millis(50), quiet.next()).await;
    assert!(silence.is_err());
    committed(&store, Txn::new().put("w/last", "")).await?;
    assert_eq!(next(&mut quiet).await?.changes[0].key(), "w/last");
    Ok(())
}

pub(crate) async fn an_ended_lease_deletes_its_keys_and_wakes_watches(store: Shared) -> Outcome {
    let begun = Instant::now();
    let lease = store.lease_grant(1500).await?;
    let kept = store.lease_grant(60_000).await?;
    assert_ne!(lease, kept);
    let txn = Txn::new()
        .put_leased("alive/a", "", lease)
        .put_leased("alive/b", "", lease)
        .put_leased("alive/c", "", kept)
        .put("alive/d", "");
    let revision = committed(&store, txn).await?;
    // Attached elsewhere since: not deleted with the first lease.
    committed(&store, Txn::new().put_leased("alive/b", "", kept)).await?;
    let mut watch = store.watch("alive/", revision + 2).await?;
    let ended = next(&mut watch).await?;
    assert!(begun.elapsed() >= Duration::from_millis(1500));
    let key = "alive/a".to_owned();
    assert_eq!(ended.changes, vec![Change::Delete { key }]);
    assert_eq!(store.list("alive/").await?.entries.len(), 3);
    // It is ended for everything.
    let gone = Err(StoreError::NoSuchLease { lease });
    assert_eq!(store.lease_renew(lease).await, gone);
    let put = store.txn(Txn::new().put_leased("x", "", lease)).await;
    assert_eq!(put, Err(StoreError::NoSuchLease { lease }));
    let compare = Txn::new().when(Compare::LeaseAlive { lease }).put("x", "");
    assert!(!store.txn(compare).await?.is_committed());
    store.lease_revoke(lease).await?;
    // Revoked: at once, in one revision.
    store.lease_revoke(kept).await?;
    let ended = next(&mut watch).await?;
    assert_eq!(ended.changes.len(), 2);
    assert_eq!(store.list("alive/").await?.entries.len(), 1);
    Ok(())
}

pub(crate) async fn a_renewed_lease_lives_on(store: Shared) -> Outcome {
    let lease = store.lease_grant(1000).await?;
    let revision = committed(&store, Txn::new().put_leased("k", "", lease)).await?;
    // An engine may give longer ones.
    let ttl_ms = store.lease_renew(lease).await?;
    assert!(ttl_ms >= 1000, "{ttl_ms}");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(ttl_ms * 2 + 200) {
        assert_eq!(store.lease_renew(lease).await?, ttl_ms);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(store.get("k").await?.is_some());
    // Renewals are no changes.
    assert_eq!(store.revision().await?, revision);
    let mut watch = store.watch("k", revision + 1).await?;
    next(&mut watch).await?;
    assert_eq!(store.get("k").await?, None);
    Ok(())
}

pub(crate) async fn limits_are_named_and_nothing_is_done(store: Shared) -> Outcome {
    let long_key = "k".repeat(KEY_BYTES_MAX + 1);
    let long_value = vec![0; VALUE_BYTES_MAX + 1];
    let many: Vec<Op> = (0..=TXN_PARTS_MAX)
        .map(|i| Op::Delete { key: i.to_string() })
        .collect();
    let too_much = Txn::new()
        .put("a", vec![0; VALUE_BYTES_MAX])
        .put("b", vec![0; VALUE_BYTES_MAX])
        .put("c", "x");
    let limited = [
        Txn::new().put(long_key.clone(), ""),
        Txn::new().when_absent(long_key.clone()),
        Txn::new().put("k", long_value),
        too_much,
        Txn {
            compare: Vec::new(),
            then: many,
        },
    ];
    for txn in limited {
        let result = store.txn(txn).await;
        assert!(matches!(result, Err(StoreError::Limit { .. })));
    }
    for txn in [
        Txn::new().put("", ""),
        Txn::new().put("twice", "1").delete("twice"),
    ] {
        let result = store.txn(txn).await;
        assert!(matches!(result, Err(StoreError::Invalid { .. })));
    }
    assert!(store.get(&long_key).await.is_err());
    assert!(store.list(&long_key).await.is_err());
    assert!(store.watch(&long_key, 1).await.is_err());
    for ttl_ms in [0, 49, u64::MAX] {
        let result = store.lease_grant(ttl_ms).await;
        assert!(matches!(result, Err(StoreError::Invalid { .. })));
    }
    assert_eq!(store.revision().await?, 0);
    // The limits themselves are allowed, and lists longer than any frame.
    for i in 0..12 {
        let key = format!("{i:0>width$}", width = KEY_BYTES_MAX);
        committed(&store, Txn::new().put(key, vec![i; VALUE_BYTES_MAX])).await?;
    }
    let listing = store.list("").await?;
    assert_eq!((listing.revision, listing.entries.len()), (12, 12));
    assert!(
        listing
            .entries
            .iter()
            .enumerate()
            .all(|(i, e)| e.value.len() == VALUE_BYTES_MAX && e.value[0] == i as u8)
    );
    Ok(())
}

/// The commit of a machine's move, as designed: the owner changes once, only while both nodes are
/// alive, and the loser gets the reason.
pub(crate) async fn a_move_commits_once(store: Shared) -> Outcome {
    let source = store.lease_grant(60_000).await?;
    let target = store.lease_grant(60_000).await?;
    let txn = Txn::new()
        .put("machine/m", "epoch 1.1 owner a")
        .put("schedule/a/m", "")
        .put_leased("alive/a", "", source)
        .put_leased("alive/b", "", target)
        .put("reservation/b/m", "");
    let revision = committed(&store, txn).await?;
    let commit = Txn::new()
        .when_modified_at("machine/m", revision)
        .when(Compare::Exists {
            key: "schedule/a/m".into(),
        })
        .when_absent("schedule/b/m")
        .when(Compare::LeaseAlive { lease: source })
        .when(Compare::Attached {
            key: "alive/b".into(),
            lease: target,
        })
        .when(Compare::Exists {
            key: "reservation/b/m".into(),
        })
        .put("machine/m", "epoch 1.2 owner b")
        .delete("schedule/a/m")
        .delete("reservation/b/m")
        .put("schedule/b/m", "");
    let (first, second) = tokio::join!(store.txn(commit.clone()), store.txn(commit));
    let outcomes = [first?, second?];
    let won = outcomes.iter().filter(|o| o.is_committed()).count();
    assert_eq!(won, 1, "{outcomes:?}");
    let lost = outcomes.iter().find(|o| !o.is_committed());
    assert!(matches!(
        lost,
        Some(TxnOutcome::Refused { failed: 0, current: Some(m), .. }) if m.value == b"epoch 1.2 owner b"
    ));
    assert_eq!(store.list("schedule/").await?.entries.len(), 1);
    Ok(())
}
