//! Nodes that come back with another address.

use keel_api::{NodeInfo, StoreInfo};
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::path::Path;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

async fn start(folder: &Path, names: &[&str], replicated: bool) -> LocalCluster {
    let cluster = match replicated {
        true => LocalCluster::start_replicated(Path::new(KEEL), folder, names).await,
        false => LocalCluster::start(Path::new(KEEL), folder, names).await,
    };
    cluster.expect("a cluster")
}

async fn address_of(cluster: &LocalCluster, ask: &str, node: &str) -> Option<String> {
    let nodes: Vec<NodeInfo> = cluster.nodes(ask).await.ok()?;
    let node = nodes.into_iter().find(|it| it.name == node)?;
    node.alive.then_some(node.address)
}

/// Another address, at which nobody listens.
fn other(old: &str) -> String {
    let old: std::net::SocketAddr = old.parse().expect("an address");
    let std::net::IpAddr::V4(ip) = old.ip() else {
        panic!("{old} is not of IPv4")
    };
    let [a, b, c, d] = ip.octets();
    format!(
        "{}:{}",
        std::net::Ipv4Addr::new(a, b, c, d % 254 + 1),
        old.port()
    )
}

async fn moves(cluster: &LocalCluster, via: &str, to: &str) {
    wait_for(&format!("a machine moves to {to}"), || async {
        let moved = cluster.move_machine(via, "m", to).await.ok()?;
        (moved.ending == Ending::Moved).then_some(())
    })
    .await
    .expect("it moves");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_voter_of_three_gets_another_address() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    let folder = folder.expect("a folder");
    let names = ["a", "b", "c"];
    let mut cluster = start(folder.path(), &names, true).await;
    let counter = guest("counter");
    let machine = Guest::new("m", "a", &counter, &["1000000", "2"]);
    cluster.run(&machine).await.expect("it starts");
    moves(&cluster, "a", "b").await;
    for name in ["a", "c"] {
        let old = address_of(&cluster, "b", name).await.expect("an address");
        let new = other(&old);
        // Its agent would write the old one again.
        let (ok, said) = cluster.keel(name, &["up", "--listen", &new]);
        assert!(!ok && said.contains("keel down"), "{said}");
        cluster.power_off(name);
        let options = ["--listen", new.as_str()];
        cluster
            .power_on_with(&[name], &options)
            .await
            .expect("it starts");
        for ask in names {
            wait_for(&format!("{ask} knows the new address"), || async {
                (address_of(&cluster, ask, name).await? == new).then_some(())
            })
            .await
            .expect("known");
        }
        // The group has it: all voters follow, and whichever leads next finds the others.
        wait_for("the voters' list says it", || async {
            let store: StoreInfo = cluster.client("b").get("/v1/store").await.ok()?;
            let voter = store.voters.into_iter().find(|it| it.node == name)?;
            (voter.address == new).then_some(())
        })
        .await
        .expect("listed");
        moves(&cluster, "b", name).await;
        moves(&cluster, name, "b").await;
    }
    // Two of three with new addresses are a quorum.
    cluster.power_off("b");
    let leader = cluster.leader("a", Some("b")).await.expect("a leader");
    let started = Guest::new("n", &leader, &counter, &["3", "2"]);
    cluster.run(&started).await.expect("the store accepts it");
}

/// Nobody but itself can say where the store is.
#[tokio::test(flavor = "multi_thread")]
async fn the_only_voter_gets_another_address() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    let folder = folder.expect("a folder");
    let mut cluster = start(folder.path(), &["a", "b", "c"], false).await;
    let counter = guest("counter");
    let machine = Guest::new("m", "b", &counter, &["1000000", "2"]);
    cluster.run(&machine).await.expect("it starts");
    let old = address_of(&cluster, "b", "a").await.expect("an address");
    let new = other(&old);
    cluster.power_off("c");
    cluster.power_off("a");
    let options = ["--listen", new.as_str()];
    cluster
        .power_on_with(&["a"], &options)
        .await
        .expect("it starts");
    moves(&cluster, "b", "a").await;
    // Who was away meanwhile learns it, too.
    cluster.power_on("c").await.expect("it starts");
    moves(&cluster, "c", "c").await;
    assert_eq!(address_of(&cluster, "c", "a").await, Some(new.clone()));
    // The same address again, or port 0, changes nothing.
    cluster.power_off("a");
    let same = format!("{}:0", new.rsplit_once(':').expect("a port").0);
    let options = ["--name", "a", "--listen", same.as_str()];
    cluster
        .power_on_with(&["a"], &options)
        .await
        .expect("it starts");
    wait_for("it is alive", || address_of(&cluster, "b", "a"))
        .await
        .map(|address| assert_eq!(address, new))
        .expect("an address");
}
