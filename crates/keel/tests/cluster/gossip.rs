//! Gossip between nodes: who answers, which load each has, and the keys that seal it.

use keel_cluster::gossip::Start;
use keel_cluster::gossip::datagram::Sealer;
use keel_cluster::gossip::keys::{GossipKeys, decode};
use keel_machine::moves::Ending;
use keel_store::Backup;
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::net::UdpSocket;
use std::path::Path;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

async fn cluster(names: &[&str]) -> (LocalCluster, tempfile::TempDir) {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let cluster = LocalCluster::start_replicated(Path::new(KEEL), folder.path(), names).await;
    (cluster.expect("a cluster"), folder)
}

/// Waits until `ask` says this of whether a node is alive, and whether it answers.
async fn wait_answers(cluster: &LocalCluster, ask: &str, of: &str, alive: bool, answers: &[&str]) {
    let what = format!("{ask} says that {of} is {answers:?}, alive: {alive}");
    let seen = wait_for(&what, || async {
        let node = cluster.node(ask, of).await.ok()?;
        let answer = node.answers.as_deref().unwrap_or_default();
        (node.alive == alive && answers.contains(&answer)).then_some(())
    });
    seen.await.expect("in time");
}

async fn wait_whole(cluster: &LocalCluster, names: &[&str]) {
    for ask in names {
        for of in names {
            wait_answers(cluster, ask, of, true, &["alive"]).await;
        }
    }
}

/// The value of a metric of a node; 0 before it has one.
fn metric(cluster: &LocalCluster, node: &str, name: &str) -> f64 {
    let (_, text) = cluster.get_by_socket(node, "/metrics").expect("an answer");
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.map_or(0.0, |value| value.trim().parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_know_who_answers_and_the_load_of_each() {
    let names = ["a", "b", "c"];
    let (cluster, _folder) = cluster(&names).await;
    wait_whole(&cluster, &names).await;
    for of in names {
        let known = wait_for("its load is known", || async {
            let node = cluster.node("b", of).await.ok()?;
            node.load.zip(node.load_age_s)
        });
        let (load, age_s) = known.await.expect("in time");
        assert!(
            (0.0..50.0).contains(&load) && (0.0..90.0).contains(&age_s),
            "{load} {age_s}"
        );
    }
    // By gossip and by the store.
    cluster.stop_agent("c", true).expect("it stops");
    for ask in ["a", "b"] {
        wait_answers(&cluster, ask, "c", false, &["suspected", "down"]).await;
    }
    cluster.stop_agent("c", false).expect("it goes on");
    wait_whole(&cluster, &names).await;
    // It begins anew.
    cluster.kill_agent("b").expect("it is killed");
    wait_whole(&cluster, &names).await;
}

/// Where datagrams do not pass, all else works.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_datagrams_do_not_arrive_is_alive_and_silent() {
    let names = ["a", "b", "c"];
    let (mut cluster, _folder) = cluster(&names).await;
    wait_whole(&cluster, &names).await;
    let address = cluster.node("a", "c").await.expect("it is one").address;
    cluster.power_off("c");
    let taken = UdpSocket::bind(&address).expect("its address is free");
    cluster.power_on("c").await.expect("it starts without it");
    wait_answers(&cluster, "a", "c", true, &["down"]).await;
    let (_, said) = cluster.keel("a", &["nodes"]);
    assert!(said.contains("alive, silent"), "{said}");
    let module = guest("counter");
    let machine = Guest::new("m", "a", &module, &["1000000", "2"]);
    cluster.run(&machine).await.expect("it starts");
    let moved = cluster.move_machine("a", "m", "c").await;
    assert_eq!(moved.expect("an answer").ending, Ending::Moved);
    drop(taken);
    wait_whole(&cluster, &names).await;
}

/// Nobody outside of the cluster can make nodes believe anything.
#[tokio::test(flavor = "multi_thread")]
async fn datagrams_of_strangers_are_refused() {
    let names = ["a", "b", "c"];
    let (cluster, folder) = cluster(&names).await;
    wait_whole(&cluster, &names).await;
    let address = cluster.node("a", "a").await.expect("it is one").address;
    let stranger = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    // Nothing; too much; a member's datagram that was sealed with another secret, under the true
    // number of the key.
    let mut keys = keys(&cluster, "a", folder.path());
    keys.keys[0].secret = [0; 32];
    let start = Start {
        incarnation: 1,
        revision: u64::MAX,
    };
    let mut sealer = Sealer::new("b".parse().expect("a name"), start);
    sealer.set_keys(&keys);
    let forged = sealer.seal(b"hello").expect("sealed");
    let mut long = vec![0; 60_000];
    long[0] = 1;
    let refused = "keel_gossip_datagrams_total{outcome=\"refused\"}";
    for (count, datagram) in [vec![], long, forged].iter().enumerate() {
        let before = metric(&cluster, "a", refused);
        assert!(before >= count as f64);
        stranger.send_to(datagram, &address).expect("it is sent");
        wait_for("it is counted", || async {
            (metric(&cluster, "a", refused) > before).then_some(())
        })
        .await
        .expect("in time");
    }
    wait_whole(&cluster, &names).await;
}

/// The keys, from a backup of the store.
fn keys(cluster: &LocalCluster, ask: &str, folder: &Path) -> GossipKeys {
    let file = folder.join("backup");
    // (An earlier one is not overwritten.)
    let _ = std::fs::remove_file(&file);
    let path = file.display().to_string();
    let (made, said) = cluster.keel(ask, &["store", "backup", &path]);
    assert!(made, "{said}");
    let backup = Backup::decode(&std::fs::read(&file).expect("it is there")).expect("a backup");
    let entry = backup.entries.iter().find(|it| it.key == "gossip-keys");
    decode(&entry.expect("keys").value).expect("keys")
}

/// Whoever is removed knows the keys: they are replaced, while all others hear each other.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_node_makes_the_keys_be_replaced() {
    let names = ["a", "b", "c", "d"];
    let (mut cluster, folder) = cluster(&names).await;
    wait_whole(&cluster, &names).await;
    let before = keys(&cluster, "a", folder.path());
    assert_eq!(before.keys.len(), 1);
    cluster.power_off("d");
    wait_answers(&cluster, "a", "d", false, &["down"]).await;
    let (removed, said) = cluster.keel("a", &["node", "rm", "d"]);
    assert!(removed, "{said}");
    let begun = std::time::Instant::now();
    loop {
        for ask in &names[..3] {
            for of in &names[..3] {
                // (A busy computer may make one suspect another for a moment.)
                let answers = match cluster.node(ask, of).await {
                    Ok(node) => node.answers,
                    Err(_) => continue,
                };
                assert_ne!(answers.as_deref(), Some("down"), "{ask} of {of}");
            }
        }
        let now = keys(&cluster, "a", folder.path());
        if now.keys.len() == 1 && now != before {
            assert_ne!(now.sealing, before.sealing);
            break;
        }
        assert!(begun.elapsed().as_secs() < 150, "{now:?}");
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    // A new node gets them.
    cluster.join_via("e", "a").await.expect("it joins");
    wait_whole(&cluster, &["a", "b", "c", "e"]).await;
}
