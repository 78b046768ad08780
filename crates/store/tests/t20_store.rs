//! The conformance suite against the embedded engine with one voter and with three, and over
//! loopback TLS; then what each does beyond it.

mod conformance;

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conformance::Outcome;
use keel_cluster::identity::{CertificateAuthority, ClusterId, NodeIdentity};
use keel_net::rpc::{ServerHandle, everyone_is_member};
use keel_net::{
    BoxFuture, Bytes, Handler, NodeName, Options, PeerId, Peers, Reply, RpcError, Server,
};
use keel_store::encoding::kind;
use keel_store::{
    IfAbsent, RaftOptions, RaftStore, Store, StoreClient, StoreError, StoreHandler, Txn, Voter,
};
use tempfile::TempDir;
use tokio::net::TcpListener;

/// A store and all that it lives on.
struct Engine {
    store: Arc<dyn Store>,
    _server: Option<ServerHandle>,
    _group: Option<keel_testkit::Group>,
    _directory: TempDir,
}

fn first() -> IfAbsent {
    IfAbsent::Found(Voter {
        node: "a".into(),
        address: "127.0.0.1:1".into(),
    })
}

async fn open(directory: &Path) -> Result<RaftStore, StoreError> {
    open_with(directory, RaftOptions::default()).await
}

async fn open_with(directory: &Path, options: RaftOptions) -> Result<RaftStore, StoreError> {
    RaftStore::open(&directory.join("store"), first(), None, options).await
}

async fn embedded() -> Result<Engine, Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    Ok(Engine {
        store: Arc::new(open(directory.path()).await?),
        _server: None,
        _group: None,
        _directory: directory,
    })
}

async fn three_voters() -> Result<Engine, Box<dyn Error>> {
    let group = keel_testkit::Group::of_three(RaftOptions::default()).await?;
    Ok(Engine {
        store: group.client()?,
        _server: None,
        _group: Some(group),
        _directory: tempfile::tempdir()?,
    })
}

async fn remote() -> Result<Engine, Box<dyn Error>> {
    let mut engine = embedded().await?;
    let handler = Arc::new(StoreHandler::new(Arc::clone(&engine.store)));
    let (server, store) = serve(handler).await?;
    engine.store = Arc::new(store);
    engine._server = Some(server);
    Ok(engine)
}

/// `handler` on node a, and node b's way to it.
async fn serve(handler: Arc<dyn Handler>) -> Result<(ServerHandle, StoreClient), Box<dyn Error>> {
    let (server, mut clients) = serve_to(handler, 1).await?;
    Ok((server, clients.remove(0)))
}

/// As `serve`, with a number of connections of node b.
async fn serve_to(
    handler: Arc<dyn Handler>,
    clients: usize,
) -> Result<(ServerHandle, Vec<StoreClient>), Box<dyn Error>> {
    let authority = CertificateAuthority::create(ClusterId::random())?;
    let (a, b) = (NodeName::new("a")?, NodeName::new("b")?);
    let server = Server::serve(
        TcpListener::bind("127.0.0.1:0").await?,
        NodeIdentity::first(&authority, &a)?.server_tls()?,
        everyone_is_member(),
        handler,
        Options::default(),
    )?;
    let identity = NodeIdentity::first(&authority, &b)?;
    let mut all = Vec::new();
    for _ in 0..clients {
        let peers = Peers::new(identity.client_tls()?, Options::default());
        peers.set_address(&a, &server.address().to_string());
        let timeout = Duration::from_secs(10);
        all.push(StoreClient::new(Arc::new(peers), vec![a.clone()], timeout));
    }
    Ok((server, all))
}

macro_rules! conformance {
    ($($check:ident),* $(,)?) => {
        mod embedded_engine {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() -> super::Outcome {
                let engine = super::embedded().await?;
                super::conformance::$check(engine.store.clone()).await
            })*
        }
        mod three_voters {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() -> super::Outcome {
                let engine = super::three_voters().await?;
                super::conformance::$check(engine.store.clone()).await
            })*
        }
        mod over_the_network {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() -> super::Outcome {
                let engine = super::remote().await?;
                super::conformance::$check(engine.store.clone()).await
            })*
        }
    };
}

conformance!(
    puts_gets_lists_and_deletes,
    a_refusal_tells_which_compare_failed,
    concurrent_writers_lose_nothing,
    a_watch_has_no_gaps,
    an_ended_lease_deletes_its_keys_and_wakes_watches,
    a_renewed_lease_lives_on,
    limits_are_named_and_nothing_is_done,
    a_move_commits_once,
);

#[tokio::test]
async fn a_restart_keeps_everything_and_gives_leases_their_full_time() -> Outcome {
    let directory = tempfile::tempdir()?;
    let store = open(directory.path()).await?;
    let lease = store.lease_grant(2000).await?;
    let revoked = store.lease_grant(2000).await?;
    store.lease_revoke(revoked).await?;
    store.txn(Txn::new().put("a", "1")).await?;
    store.txn(Txn::new().put("a", "2").put("b", "x")).await?;
    store.txn(Txn::new().delete("b")).await?;
    store.txn(Txn::new().put_leased("l", "", lease)).await?;
    let before = store.list("").await?;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    drop(store);

    let reopened = Instant::now();
    let store = open(directory.path()).await?;
    assert_eq!(store.list("").await?, before);
    assert!(matches!(
        store.lease_renew(revoked).await,
        Err(StoreError::NoSuchLease { .. })
    ));
    // Lease numbers are never used again.
    assert!(store.lease_grant(1000).await? > revoked);
    // The changes since the newest snapshot are known.
    let mut past = store.watch("", 1).await?;
    assert_eq!(past.next().await.ok_or("over")??.revision, 1);
    let mut watch = store.watch("l", 5).await?;
    let ended = tokio::time::timeout(Duration::from_secs(10), watch.next()).await?;
    assert_eq!(ended.ok_or("over")??.changes[0].key(), "l");
    assert!(reopened.elapsed() >= Duration::from_millis(1900));
    drop(store);
    assert_eq!(open(directory.path()).await?.get("l").await?, None);
    Ok(())
}

const CHILD_DIRECTORY: &str = "KEEL_TEST_STORE_WRITER";

/// The process that [`a_killed_writer_loses_nothing_it_was_answered`] kills: it writes and reports
/// endlessly. On its own it does nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_writer() -> Outcome {
    let Some(directory) = std::env::var_os(CHILD_DIRECTORY) else {
        return Ok(());
    };
    let store = open(Path::new(&directory)).await?;
    for _ in 0..1_000_000 {
        let next = store.revision().await? + 1;
        let txn = Txn::new()
            .put("n", next.to_string())
            .put(format!("log/{next}"), vec![1; 2000]);
        store.txn(txn).await?;
        println!("answered {next}");
    }
    Ok(())
}

#[tokio::test]
async fn a_killed_writer_loses_nothing_it_was_answered() -> Outcome {
    use std::io::BufRead;
    let directory = tempfile::tempdir()?;
    for round in 1..=8u64 {
        let mut child = std::process::Command::new(std::env::current_exe()?)
            .args(["--exact", "killed_writer", "--nocapture"])
            .env(CHILD_DIRECTORY, directory.path())
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("no output")?;
        let mut answered = 0;
        let mut seen = 0;
        for line in std::io::BufReader::new(output).lines() {
            // The test harness may write before it on the same line.
            if let Some((_, n)) = line?.split_once("answered ") {
                answered = n.parse()?;
                seen += 1;
                if seen == 7 * round {
                    child.kill()?;
                }
            }
        }
        child.wait()?;
        assert!(seen >= 7 * round, "the writer ended by itself");
        let store = open(directory.path()).await?;
        let revision = store.revision().await?;
        assert!(revision >= answered, "{revision} < {answered}");
        let n = store.get("n").await?.ok_or("no n")?;
        assert_eq!(n.value, revision.to_string().into_bytes());
        assert_eq!(store.list("log/").await?.entries.len() as u64, revision);
    }
    Ok(())
}

#[tokio::test]
async fn files_that_are_no_store_are_refused_clearly() -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("store").join("log.redb");
    std::fs::create_dir_all(directory.path().join("store"))?;
    std::fs::write(&path, vec![0x5a; 20_000])?;
    let message = open(directory.path())
        .await
        .err()
        .ok_or("opened")?
        .to_string();
    assert!(
        message.contains("store") && message.contains("not a store"),
        "{message}"
    );
    std::fs::remove_file(&path)?;
    let _open = open(directory.path()).await?;
    let message = open(directory.path())
        .await
        .err()
        .ok_or("opened")?
        .to_string();
    assert!(message.contains("another process has it open"), "{message}");
    let message = RaftStore::open(
        &directory.path().join("none"),
        IfAbsent::Refuse,
        None,
        RaftOptions::default(),
    )
    .await
    .err()
    .ok_or("opened")?;
    assert!(matches!(message, StoreError::Open { .. }));
    Ok(())
}

/// Bytes changed anywhere: an error or the full contents, never other contents
/// and never a panic.
#[tokio::test]
async fn damage_is_found() -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("store").join("log.redb");
    let store = open(directory.path()).await?;
    for i in 0..50u32 {
        let key = format!("key/{i}");
        store.txn(Txn::new().put(key, vec![i as u8; 900])).await?;
    }
    let good = store.list("").await?;
    drop(store);
    let bytes = std::fs::read(&path)?;
    let mut refused = 0;
    for i in 0..60 {
        let mut damaged = bytes.clone();
        let at = (i * 7919 + 13) * 31 % damaged.len();
        damaged[at] ^= 0x41;
        std::fs::write(&path, &damaged)?;
        match open(directory.path()).await {
            Ok(store) => assert_eq!(store.list("").await?, good, "byte {at}"),
            Err(error) => {
                assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "none of the damage was in use");
    Ok(())
}

#[tokio::test]
async fn a_slow_watch_is_told_that_it_missed_something() -> Outcome {
    let directory = tempfile::tempdir()?;
    let options = RaftOptions {
        history_revisions_max: 10,
        ..RaftOptions::default()
    };
    let store = open_with(directory.path(), options).await?;
    let mut slow = store.watch("k", 1).await?;
    for i in 0..30u32 {
        store.txn(Txn::new().put("k", i.to_string())).await?;
    }
    let compacted = StoreError::Compacted {
        asked: 1,
        oldest: 21,
    };
    assert_eq!(slow.next().await, Some(Err(compacted.clone())));
    assert!(slow.next().await.is_none());
    assert_eq!(store.watch("k", 1).await.err(), Some(compacted));
    let mut good = store.watch("k", 21).await?;
    assert_eq!(good.next().await.ok_or("over")??.revision, 21);
    Ok(())
}

/// Ten thousand watches are told of each change, however slowly one of them reads, or if it does not
/// read at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_watches_are_served_beside_one_that_is_not_read() -> Outcome {
    const CONNECTIONS: usize = 50;
    const WATCHES: usize = 200;
    const CHANGES: u32 = 60;
    let engine = embedded().await?;
    let handler = Arc::new(StoreHandler::new(engine.store.clone()));
    let (_server, clients) = serve_to(handler, CONNECTIONS).await?;
    let mut unread = clients[0].watch("all/", 1).await?;
    let mut watches = Vec::new();
    for client in &clients {
        for number in 0..WATCHES {
            // Most of them wait for what does not change.
            let prefix = match number {
                0 => "all/".to_owned(),
                _ => format!("all/{number}/"),
            };
            watches.push((number, client.watch(&prefix, 1).await?));
        }
    }
    for change in 0..CHANGES {
        let text = change.to_string();
        let txn = Txn::new().put(format!("all/{}/key", change % 2), text);
        clients[1].txn(txn).await?;
    }
    // One change for all.
    let all = (2..WATCHES).fold(Txn::new(), |txn, number| {
        txn.put(format!("all/{number}/key"), "last")
    });
    clients[1].txn(all).await?;
    let told = watches.into_iter().map(|(number, mut watch)| async move {
        let expected = match number {
            0 => CHANGES as usize + 1,
            1 => CHANGES as usize / 2,
            _ => 1,
        };
        for _ in 0..expected {
            watch.next().await.ok_or("over")??;
        }
        Ok::<_, Box<dyn Error>>(())
    });
    futures::future::try_join_all(told).await?;
    // It got what came before its connection's limit, and gets the rest.
    for revision in 1..=u64::from(CHANGES) + 1 {
        assert_eq!(unread.next().await.ok_or("over")??.revision, revision);
    }
    Ok(())
}

#[tokio::test]
async fn a_full_store_takes_deletes_only() -> Outcome {
    let directory = tempfile::tempdir()?;
    let options = RaftOptions {
        store_bytes_max: 1000,
        ..RaftOptions::default()
    };
    let store = open_with(directory.path(), options).await?;
    store.txn(Txn::new().put("a", vec![0; 900])).await?;
    let full = store.txn(Txn::new().put("b", vec![0; 200])).await;
    assert!(matches!(full, Err(StoreError::Limit { limit: 1000, .. })));
    store.txn(Txn::new().delete("a")).await?;
    store.txn(Txn::new().put("b", vec![0; 200])).await?;
    Ok(())
}

#[tokio::test]
async fn closing_ends_watches_with_a_reason() -> Outcome {
    let directory = tempfile::tempdir()?;
    let store = open(directory.path()).await?;
    let mut watch = store.watch("", 1).await?;
    drop(store);
    let ended = watch.next().await.ok_or("a clean end")?;
    assert!(matches!(ended, Err(StoreError::Unavailable { .. })));
    assert!(watch.next().await.is_none());
    Ok(())
}

/// A voter that accepts requests and fails before it answers.
struct DeadVoter {
    inner: StoreHandler,
    asked: tokio::sync::Notify,
}

impl Handler for DeadVoter {
    fn call(
        &self,
        _: PeerId,
        asked: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        Box::pin(async move {
            let answer = self.inner.answer(asked, &payload).await;
            if asked != kind::REVISION && asked != kind::WATCH {
                self.asked.notify_one();
                std::future::pending::<()>().await;
            }
            answer
        })
    }
}

#[tokio::test]
async fn a_lost_voter_is_unknown_for_changes_and_unavailable_for_reads() -> Outcome {
    let engine = embedded().await?;
    let voter = Arc::new(DeadVoter {
        inner: StoreHandler::new(engine.store.clone()),
        asked: tokio::sync::Notify::new(),
    });
    let (server, remote) = serve(voter.clone()).await?;
    let remote = Arc::new(remote);
    assert_eq!(remote.revision().await?, 0);
    let mut watch = remote.watch("never", 1).await?;
    let change = {
        let remote = Arc::clone(&remote);
        tokio::spawn(async move { remote.txn(Txn::new().put("a", "1")).await })
    };
    voter.asked.notified().await;
    let read = {
        let remote = Arc::clone(&remote);
        tokio::spawn(async move { remote.get("a").await })
    };
    voter.asked.notified().await;
    server.shutdown().await;
    let change = change.await?;
    assert!(
        matches!(change, Err(StoreError::Unknown { .. })),
        "{change:?}"
    );
    // It was committed.
    assert!(engine.store.get("a").await?.is_some());
    let read = read.await?;
    assert!(
        matches!(read, Err(StoreError::Unavailable { .. })),
        "{read:?}"
    );
    let watched = watch.next().await.ok_or("a clean end")?;
    assert!(matches!(watched, Err(StoreError::Unavailable { .. })));
    assert!(watch.next().await.is_none());
    // No voter is left: a change is certainly not made.
    let change = remote.txn(Txn::new().put("b", "1")).await;
    match change {
        Err(StoreError::Unavailable { reason }) => assert!(reason.contains("node a"), "{reason}"),
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}

/// A leader whose voters are far away, behind links that are full.
struct SlowVoter(StoreHandler);

impl Handler for SlowVoter {
    fn call(
        &self,
        _: PeerId,
        asked: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        Box::pin(async move {
            if asked == kind::LEASE_RENEW {
                // Longer than one voter is waited for, shorter than all.
                tokio::time::sleep(Duration::from_millis(550)).await;
            }
            self.0.answer(asked, &payload).await
        })
    }
}

/// A regression test: it was given up when the next voter was asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_renewal_counts() -> Outcome {
    let engine = embedded().await?;
    let handler = StoreHandler::new(engine.store.clone());
    let (_server, remote) = serve(Arc::new(SlowVoter(handler))).await?;
    let (a, gone) = (NodeName::new("a")?, NodeName::new("gone")?);
    let lease = remote.lease_grant(60_000).await?;
    for voters in [vec![a.clone(), gone.clone()], vec![gone, a]] {
        remote.set_voters(voters);
        remote.lease_renew(lease).await?;
    }
    Ok(())
}

/// What a thread of its own renews does not wait for the runtime that made all other requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_renewed_while_other_requests_stand_still() -> Outcome {
    let engine = embedded().await?;
    let handler = Arc::new(StoreHandler::new(Arc::clone(&engine.store)));
    let (_server, client) = serve(handler).await?;
    let client = Arc::new(client);
    let (granted, lease) = tokio::sync::oneshot::channel();
    let (go_on, stands_still) = std::sync::mpsc::channel::<()>();
    let theirs = client.clone();
    let others = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build()?;
        runtime.block_on(async {
            drop(granted.send(theirs.lease_grant(60_000).await));
            // Its connection is open, and nothing on this runtime runs any more.
            let _ = stands_still.recv();
        });
        std::io::Result::Ok(())
    });
    let lease = lease.await??;
    for _ in 0..3 {
        assert_eq!(client.lease_renew(lease).await?, 60_000);
    }
    drop(go_on);
    let ended = tokio::task::spawn_blocking(move || others.join()).await?;
    Ok(ended.map_err(|_| "the thread panicked")??)
}

#[tokio::test]
async fn the_next_voter_is_asked_when_one_is_down() -> Outcome {
    let engine = embedded().await?;
    let handler = Arc::new(StoreHandler::new(engine.store.clone()));
    let (_server, remote) = serve(handler).await?;
    let (gone, a) = (NodeName::new("gone")?, NodeName::new("a")?);
    remote.set_voters(vec![gone.clone(), a]);
    for i in 0..3u32 {
        remote.txn(Txn::new().put("k", i.to_string())).await?;
    }
    assert_eq!(remote.revision().await?, 3);
    for voters in [vec![gone], vec![]] {
        remote.set_voters(voters);
        let change = remote.txn(Txn::new().put("k", "")).await;
        assert!(matches!(change, Err(StoreError::Unavailable { .. })));
    }
    assert_eq!(engine.store.revision().await?, 3);
    Ok(())
}

#[tokio::test]
async fn requests_that_cannot_be_read_are_refused() -> Outcome {
    let engine = embedded().await?;
    let handler = StoreHandler::new(engine.store.clone());
    let mut seed = 1u64;
    for asked in kind::GET..=kind::REVISION + 1 {
        for length in 0..200usize {
            let bytes: Vec<u8> = (0..length)
                .map(|i| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // The right version often, to get behind it.
                    if i == 0 { 1 } else { (seed >> 40) as u8 & 0x1f }
                })
                .collect();
            if let Err(error) = handler.answer(asked, &bytes).await {
                assert!(error.certainly_not_executed(), "{error}");
            }
        }
    }
    let other_version = handler.answer(kind::GET, &[9, 1, b'a']).await;
    let message = other_version.err().ok_or("read")?.to_string();
    assert!(message.contains("a get has version 9"), "{message}");
    Ok(())
}

#[tokio::test]
async fn workers_and_anonymous_peers_get_nothing() -> Outcome {
    let engine = embedded().await?;
    let handler = StoreHandler::new(engine.store.clone());
    assert!(!handler.permits(&PeerId::Anonymous, kind::GET));
    let fingerprint = keel_net::Fingerprint([0; 32]);
    assert!(!handler.permits(&PeerId::Pinned(fingerprint), kind::GET));
    assert!(handler.permits(&PeerId::Node(NodeName::new("a")?), kind::GET));
    Ok(())
}
