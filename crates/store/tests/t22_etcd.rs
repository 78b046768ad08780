//! The engine over a real etcd: the conformance suite, histories while members fail, log-in, TLS,
//! and what it says where etcd cannot be used.

mod conformance;
mod linearizability;
mod recorder;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use keel_store::{Changes, EtcdOptions, EtcdStore, EtcdTls, Store, StoreError, Txn, Watch};
use keel_testkit::network::Network;
use keel_testkit::{Certificates, ETCD_LIMITS as LIMITS, Etcd};
use recorder::{Recorder, check_all, is_pause, record, wait_answers, wait_until};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

fn options(etcd: &Etcd, prefix: &str) -> EtcdOptions {
    EtcdOptions {
        timeout: Duration::from_secs(10),
        ..EtcdOptions::from_address(&etcd.address(prefix)).expect("an address")
    }
}

async fn client(etcd: &Etcd) -> Result<EtcdStore, StoreError> {
    EtcdStore::connect(&options(etcd, "test")).await
}

/// The next changes, if they come in time.
async fn next(watch: &mut Watch) -> Result<Changes, Box<dyn Error + Send + Sync>> {
    let next = tokio::time::timeout(Duration::from_secs(60), watch.next()).await?;
    Ok(next.ok_or("it ended")??)
}

macro_rules! conformance {
    ($($check:ident),* $(,)?) => {
        mod suite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $check() -> super::conformance::Outcome {
                let etcd = super::Etcd::start(1)?;
                let Some(etcd) = etcd else { return Ok(()) };
                super::conformance::$check(std::sync::Arc::new(super::client(&etcd).await?)).await
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_with_other_prefixes_do_not_see_each_other() -> Outcome {
    let Some(etcd) = Etcd::start(1)? else {
        return Ok(());
    };
    let one = EtcdStore::connect(&options(&etcd, "one")).await?;
    let other = EtcdStore::connect(&options(&etcd, "one-2")).await?;
    one.txn(Txn::new().put("a", "1")).await?;
    assert_eq!(other.list("").await?.entries, []);
    let mut watch = other.watch("", other.revision().await? + 1).await?;
    one.txn(Txn::new().put("entries/b", "1")).await?;
    other.txn(Txn::new().put("c", "1")).await?;
    let seen = next(&mut watch).await?;
    assert_eq!(seen.changes[0].key(), "c");
    // A lease of the one is not alive for the other, and its end is no change.
    let lease = one.lease_grant(60_000).await?;
    let alive = Txn::new().when(keel_store::Compare::LeaseAlive { lease });
    assert!(!other.txn(alive.put("d", "")).await?.is_committed());
    Ok(())
}

/// Clients whose calls are recorded.
struct Clients {
    recorders: Vec<Recorder>,
    answers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Clients {
    async fn start(etcd: &Etcd) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let mut clients = Clients {
            recorders: Vec::new(),
            answers: Arc::default(),
            stop: Arc::default(),
        };
        let begun = Instant::now();
        for seed in 0..6 {
            let store: Arc<dyn Store> = Arc::new(client(etcd).await?);
            let (stop, answers) = (clients.stop.clone(), clients.answers.clone());
            let recorder = tokio::spawn(record(store, seed, begun, stop, answers));
            clients.recorders.push(recorder);
        }
        Ok(clients)
    }

    /// Waits until they have more answers.
    async fn go_on(&self) -> Outcome {
        wait_answers(&self.answers, 60).await
    }

    async fn check(self) -> Outcome {
        self.go_on().await?;
        self.stop.store(true, Relaxed);
        check_all(self.recorders).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_are_linearizable_while_members_fail() -> Outcome {
    let Some(mut etcd) = Etcd::start(3)? else {
        return Ok(());
    };
    let clients = Clients::start(&etcd).await?;
    for (turn, member) in [0, 1, 2, 0, 1, 2].into_iter().enumerate() {
        clients.go_on().await?;
        // Each of them both ways.
        if turn % 2 == 0 {
            etcd.kill(member)?;
            clients.go_on().await?;
            etcd.run(member)?;
        } else {
            etcd.pause(member, true)?;
            clients.go_on().await?;
            etcd.pause(member, false)?;
        }
    }
    clients.check().await
}

/// Each member is cut off from everybody, then only from the other two: one that led goes on
/// answering its clients until it learns that it does not lead any more.
#[test]
fn histories_are_linearizable_while_members_are_cut_off() -> Outcome {
    const MEMBERS: [&str; 3] = ["m0", "m1", "m2"];
    let network = match Network::new(&["m0", "m1", "m2", "client"]) {
        Ok(network) => Arc::new(network),
        Err(error) => {
            eprintln!("skipped: no networks can be made here ({error:#})");
            return Ok(());
        }
    };
    let here = network.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .on_thread_start(move || here.enter("client").expect("a name space"))
        .build()?;
    let test = async move {
        let Some(etcd) = Etcd::start_in(&network, &MEMBERS)? else {
            return Ok(());
        };
        let clients = Clients::start(&etcd).await?;
        for (turn, member) in [0, 1, 2, 0, 1, 2].into_iter().enumerate() {
            let member = MEMBERS[member];
            clients.go_on().await?;
            let cut = |cut: bool| -> Outcome {
                if turn % 2 == 0 {
                    return Ok(network.cut(member, cut)?);
                }
                for other in MEMBERS.into_iter().filter(|it| *it != member) {
                    network.cut_one_way(member, other, cut)?;
                }
                Ok(())
            };
            cut(true)?;
            clients.go_on().await?;
            cut(false)?;
        }
        clients.check().await
    };
    runtime.block_on(async { tokio::spawn(test).await? })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_of_a_member_that_stands_still_ends_and_goes_on_elsewhere() -> Outcome {
    let Some(etcd) = Etcd::start(3)? else {
        return Ok(());
    };
    let store = client(&etcd).await?;
    store.txn(Txn::new().put("a", "0")).await?;
    let from = store.revision().await? + 1;
    // This one knows no other member.
    let mut only = options(&etcd, "test");
    only.members.truncate(1);
    let mut watch = EtcdStore::connect(&only).await?.watch("", from).await?;
    etcd.pause(0, true)?;
    let limit = Duration::from_secs(60);
    let error = tokio::time::timeout(limit, watch.next()).await?;
    let error = error.ok_or("it ended without a reason")?;
    assert!(
        matches!(error, Err(StoreError::Unavailable { .. })),
        "{error:?}"
    );
    assert!(watch.next().await.is_none());
    let begun = Instant::now();
    let mut watch = loop {
        match store.watch("", from).await {
            Ok(watch) => break watch,
            Err(error) => assert!(is_pause(&error), "{error}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(60));
    };
    while let Err(error) = store.txn(Txn::new().put("a", "1")).await {
        assert!(is_pause(&error), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    let seen = next(&mut watch).await?;
    assert_eq!(seen.changes[0].key(), "a");
    etcd.pause(0, false)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_logs_in_and_again_when_its_log_in_is_forgotten() -> Outcome {
    let Some(mut etcd) = Etcd::start(1)? else {
        return Ok(());
    };
    etcd.ask_for_user("keel", "secret", "test")?;
    let with = |user: Option<(&str, &str)>, prefix: &str| {
        let mut options = options(&etcd, prefix);
        options.user = user.map(|(name, password)| (name.to_owned(), password.to_owned()));
        options
    };
    for (user, prefix, said) in [
        (None, "test", "asks for a user"),
        (Some(("keel", "wrong")), "test", "authentication failed"),
        (Some(("nobody", "secret")), "test", "authentication failed"),
        (Some(("keel", "secret")), "other", "permission denied"),
    ] {
        let error = EtcdStore::connect(&with(user, prefix)).await;
        let error = error.expect_err("refused").to_string();
        assert!(error.contains(said), "{error}");
    }
    let store = EtcdStore::connect(&with(Some(("keel", "secret")), "test")).await?;
    let lease = store.lease_grant(60_000).await?;
    store.txn(Txn::new().put_leased("a", "1", lease)).await?;
    // It forgets who logged in.
    etcd.kill(0)?;
    etcd.run(0)?;
    let begun = Instant::now();
    while let Err(error) = store.txn(Txn::new().put("b", "1")).await {
        assert!(is_pause(&error), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{error}");
    }
    assert!(store.lease_renew(lease).await? >= 60_000);
    assert_eq!(store.list("").await?.entries.len(), 2);
    store.watch("", 1).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_encrypted_and_both_sides_are_checked() -> Outcome {
    let certificates = Certificates::new()?;
    let file = |name: &str| certificates.file(name);
    let Some(etcd) = Etcd::start_encrypted(&certificates)? else {
        return Ok(());
    };
    let with = |authority: &str, client: bool| {
        let mut options = options(&etcd, "test");
        options.timeout = Duration::from_secs(2);
        options.tls = Some(EtcdTls {
            authority: file(authority),
            client: client.then(|| (file("client.pem"), file("client.key"))),
        });
        options
    };
    let store = EtcdStore::connect(&with("ca.pem", true)).await?;
    store.txn(Txn::new().put("a", "1")).await?;
    store.watch("", 1).await?;
    for options in [
        with("foreign-ca.pem", true),
        with("ca.pem", false),
        options(&etcd, "test"),
    ] {
        let options = EtcdOptions {
            timeout: Duration::from_secs(2),
            ..options
        };
        let refused = EtcdStore::connect(&options).await;
        assert!(
            matches!(refused, Err(StoreError::Unavailable { .. })),
            "{refused:?}"
        );
    }
    let absent = EtcdStore::connect(&with("absent.pem", true)).await;
    assert!(
        matches!(absent, Err(StoreError::Invalid { .. })),
        "{absent:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_with_lower_limits_or_none_at_all_is_refused_with_the_reason() -> Outcome {
    let Some(mut etcd) = Etcd::start_with(1, &[], "http")? else {
        return Ok(());
    };
    let mut asked = options(&etcd, "test");
    asked.timeout = Duration::from_secs(2);
    for more in [&[][..], &LIMITS[..2], &LIMITS[2..]] {
        if !more.is_empty() {
            etcd = Etcd::start_with(1, more, "http")?.ok_or("it is gone")?;
            asked.members = options(&etcd, "test").members;
        }
        let error = EtcdStore::connect(&asked).await.expect_err("refused");
        assert!(error.to_string().contains(&LIMITS.join(" ")), "{error}");
    }
    etcd.kill(0)?;
    let error = EtcdStore::connect(&asked).await.expect_err("nobody there");
    assert!(error.to_string().contains(&asked.members[0]), "{error}");
    // Nothing was changed, and the next member is asked.
    etcd.run(0)?;
    wait_until("it is there", || {
        std::net::TcpStream::connect(&asked.members[0]).is_ok()
    })
    .await?;
    Ok(())
}
