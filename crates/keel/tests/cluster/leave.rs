//! Nodes leave their cluster, and are removed from it once they are gone.

use keel_api::NodeInfo;
use keel_machine::high_availability::HighAvailability;
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new(names: &[&str], replicated: bool) -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir();
        let folder = folder.expect("a folder");
        let program = Path::new(KEEL);
        let cluster = match replicated {
            true => LocalCluster::start_replicated(program, folder.path(), names).await,
            false => LocalCluster::start(program, folder.path(), names).await,
        };
        Bench {
            cluster: cluster.expect("a cluster"),
            folder,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_leaves_and_joins_again() {
    let mut bench = Bench::new(&["a", "b", "c", "d"], true).await;
    // The one whose loss changes most.
    let leader = bench.cluster.leader("a", None).await.expect("a leader");
    let other = ["a", "b", "c", "d"].into_iter().find(|it| *it != leader);
    let other = other.expect("another");
    let counter = guest("counter");
    let machine = Guest::new("m", &leader, &counter, &["1000000", "2"]);
    bench.cluster.run(&machine).await.expect("it starts");
    let (ok, said) = bench.cluster.keel(&leader, &["leave"]);
    assert!(!ok && said.contains("keel drain"), "{said}");
    let (ok, said) = bench.cluster.keel(other, &["node", "rm", &leader]);
    assert!(!ok && said.contains("is alive"), "{said}");
    let moved = bench.cluster.move_machine(other, "m", other).await;
    assert_eq!(moved.expect("an answer").ending, Ending::Moved);
    let short = Guest::new("short", &leader, &counter, &["3", "2"]);
    bench.cluster.run(&short).await.expect("it starts");
    bench
        .cluster
        .wait_end(other, "short")
        .await
        .expect("it ends");

    let (ok, said) = bench.cluster.keel(&leader, &["leave"]);
    assert!(ok, "{said}");
    assert!(!bench.folder.path().join(&leader).exists());
    let aside = bench.folder.path().join(format!("{leader}.left"));
    assert!(aside.join("node.pem").exists(), "what it had is kept");
    // The others go on without it, and another one holds the store.
    bench.cluster.wait_voters(other, 3).await.expect("three");
    let nodes = bench.cluster.nodes(other).await.expect("nodes");
    assert!(nodes.iter().all(|node| node.name != leader), "{nodes:?}");
    let info = bench.cluster.inspect(other, "m").await.expect("known");
    assert_eq!((info.status.as_str(), info.restarts), ("running", 0));

    // What ended there can be removed by any other.
    let (ok, said) = bench.cluster.keel(other, &["rm", "short"]);
    assert!(ok, "{said}");

    // Its name is free.
    let joined = bench.cluster.join_via(&leader, other).await;
    joined.expect("it joins again");
    // (Those that asked it before it knew its members wait a moment before they ask again.)
    wait_for("it takes machines", || async {
        let moved = bench.cluster.move_machine(other, "m", &leader).await.ok()?;
        (moved.ending == Ending::Moved).then_some(())
    })
    .await
    .expect("in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_gone_is_removed_and_refused_when_it_comes_back() {
    let mut bench = Bench::new(&["a", "b"], false).await;
    let (ok, said) = bench.cluster.keel("a", &["leave"]);
    assert!(!ok && said.contains("too few nodes"), "{said}");
    for (node, reason) in [("c", "not a member"), ("B", "name"), ("a", "is alive")] {
        let (ok, said) = bench.cluster.keel("b", &["node", "rm", node]);
        assert!(!ok && said.contains(reason), "{node}: {said}");
    }
    bench.cluster.power_off("b");
    let dead = || async {
        let nodes = bench.cluster.nodes("a").await.expect("nodes");
        let is_dead = |node: &NodeInfo| node.name == "b" && !node.alive;
        nodes.iter().any(is_dead).then_some(())
    };
    wait_for("it is noticed", dead).await.expect("in time");
    let (ok, said) = bench.cluster.keel("a", &["node", "rm", "b"]);
    assert!(ok && said.contains("b is removed"), "{said}");
    assert_eq!(bench.cluster.nodes("a").await.expect("nodes").len(), 1);
    let (ok, said) = bench.cluster.keel("a", &["node", "rm", "b"]);
    assert!(!ok && said.contains("not a member"), "{said}");

    // What it kept of the cluster is refused.
    let log = bench.folder.path().join("b.log");
    let mut back = Command::new(KEEL)
        .arg("--state-dir")
        .arg(bench.folder.path().join("b"))
        .args(["up", "--name", "b"])
        .stderr(std::fs::File::create(&log).expect("a file"))
        .spawn()
        .expect("keel runs");
    let refused = wait_for("it is refused", || async {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        said.contains("it was removed from the cluster")
            .then_some(())
    });
    let refused = refused.await;
    bench.cluster.power_off("b");
    back.wait().expect("it ends");
    refused.expect("in time");
    assert_eq!(bench.cluster.nodes("a").await.expect("nodes").len(), 1);
}

/// Machines of a node that is dead for good are given up by name only; those with high availability
/// are restarted elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn the_machines_of_a_dead_node_are_given_up_when_somebody_says_so() {
    let mut bench = Bench::new(&["a", "b", "c", "d"], true).await;
    let cluster = &mut bench.cluster;
    let counter = guest("counter");
    let module = guest("counter");
    let plain = Guest::new("plain", "d", &counter, &["1000000", "2"]);
    cluster.run(&plain).await.expect("it starts");
    let kept = Guest {
        ha: Some(HighAvailability {
            checkpoint_every_ms: 500,
            ..HighAvailability::default()
        }),
        ..Guest::new("kept", "d", &module, &["1000000", "2"])
    };
    cluster.run(&kept).await.expect("it starts");
    wait_for("its checkpoint is on another node", || async {
        let info = cluster.inspect("a", "kept").await.ok()?;
        (!info.in_sync.is_empty()).then_some(())
    })
    .await
    .expect("in time");
    let (ok, said) = cluster.keel("a", &["node", "rm", "d", "--node-is-dead"]);
    assert!(!ok && said.contains("is alive"), "{said}");
    cluster.power_off("d");
    wait_for("it is noticed", || async {
        let node = cluster.node("a", "d").await.ok()?;
        (!node.alive).then_some(())
    })
    .await
    .expect("in time");
    let (ok, said) = cluster.keel("a", &["node", "rm", "d"]);
    assert!(!ok && said.contains("--node-is-dead"), "{said}");
    let waits = cluster.inspect("a", "plain").await.expect("known");
    assert_eq!(waits.status, "running", "nobody knows that it is dead");

    let (ok, said) = cluster.keel("a", &["node", "rm", "d", "--node-is-dead"]);
    assert!(ok && said.contains("machine plain is given up"), "{said}");
    assert!(!said.contains("machine kept"), "{said}");
    let lost = cluster.inspect("b", "plain").await.expect("known");
    assert_eq!(lost.status, "failed");
    let kept = cluster.inspect("b", "kept").await.expect("known");
    assert!(kept.node != "d", "{kept:?}");
    // Both can be managed as others are, and the log says who did it.
    let (ok, said) = cluster.keel("b", &["rm", "plain"]);
    assert!(ok, "{said}");
    cluster.wait_voters("b", 3).await.expect("three");
    let (_, audit) = cluster.keel("c", &["audit"]);
    assert!(audit.contains("/v1/nodes/d/give-up"), "{audit}");
}
