//! Certificates are renewed, and the cluster's authority is replaced, while machines run and
//! whatever node fails.

use keel_api::{AuthorityInfo, NodeInfo, Nothing, StoreInfo, Token, TokenRequest};
use keel_cluster::identity::NodeIdentity;
use keel_machine::moves::Ending;
use keel_net::{Client, Options, RpcError};
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::path::Path;
use std::time::Duration;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NODES: [&str; 4] = ["a", "b", "c", "d"];

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir();
        let folder = folder.expect("a folder");
        let cluster = LocalCluster::start_replicated(Path::new(KEEL), folder.path(), &NODES).await;
        let bench = Bench {
            cluster: cluster.expect("a cluster"),
            folder,
        };
        bench.reported("a", &NODES, |_| true).await;
        bench
    }

    async fn authority(&self, node: &str) -> Option<AuthorityInfo> {
        self.cluster.client(node).get("/v1/authority").await.ok()
    }

    /// Waits until what the nodes reported satisfies a condition.
    async fn reported(
        &self,
        ask: &str,
        nodes: &[&str],
        is: impl Fn(&AuthorityInfo) -> bool,
    ) -> AuthorityInfo {
        wait_for("the nodes report their certificates", || async {
            let info = self.authority(ask).await?;
            let named = |node: &&str| {
                let mut all = info.nodes.iter().filter(|it| it.node == **node);
                all.any(|it| it.authority.is_some())
            };
            (nodes.iter().all(named) && is(&info)).then_some(info)
        })
        .await
        .expect("in time")
    }

    /// Waits until the authority is replaced.
    async fn replaced(&self, ask: &str, nodes: &[&str]) -> AuthorityInfo {
        let info = self.reported(ask, nodes, |info| !info.is_rotating).await;
        assert_eq!(info.authorities.len(), 1, "{info:?}");
        let new = Some(info.authorities[0].fingerprint.clone());
        for node in &info.nodes {
            assert_eq!((&node.authority, &node.missing), (&new, &None), "{info:?}");
        }
        info
    }

    async fn token(&self, via: &str) -> String {
        let request = TokenRequest::Join { ttl_s: 600 };
        let token: Token = self
            .cluster
            .client(via)
            .post("/v1/tokens", &request)
            .await
            .expect("a token");
        token.token
    }

    async fn address(&self, of: &str) -> String {
        let nodes: Vec<NodeInfo> = self
            .cluster
            .client("a")
            .get("/v1/nodes")
            .await
            .expect("nodes");
        let node = nodes.iter().find(|node| node.name == of).expect("it");
        node.address.clone()
    }

    async fn leader(&self, ask: &str) -> String {
        wait_for("a leader", || async {
            let store: StoreInfo = self.cluster.client(ask).get("/v1/store").await.ok()?;
            let leader = store.voters.into_iter().find(|voter| voter.leads)?;
            Some(leader.node)
        })
        .await
        .expect("a leader")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authority_is_replaced_while_machines_run() {
    let mut bench = Bench::new().await;
    let counter = guest("counter");
    let machine = Guest::new("m", "b", &counter, &["1000000", "2"]);
    bench.cluster.run(&machine).await.expect("it starts");
    let before = bench.authority("a").await.expect("an authority");
    let old_token = bench.token("a").await;
    // A node's identity, as a thief may have it, and a connection that was made with it.
    let stolen = NodeIdentity::load(&bench.cluster.folder("d"));
    let stolen = stolen.expect("readable").expect("an identity");
    let address = bench.address("a").await;
    let a = "a".parse().expect("a name");
    let tls = stolen.client_tls().expect("TLS");
    let open = Client::connect(&address, &tls, &a, Options::default()).await;
    let open = open.expect("it is trusted yet");

    let (ok, said) = bench.cluster.keel("c", &["ca", "rotate"]);
    assert!(ok, "{said}");
    let after = bench.replaced("d", &NODES).await;
    let new = &after.authorities[0].fingerprint;
    assert_ne!(*new, before.authorities[0].fingerprint);
    assert!(said.contains(new.as_str()), "{said}");
    let (_, shown) = bench.cluster.keel("b", &["ca"]);
    assert!(shown.contains(new.as_str()), "{shown}");

    // The machine ran on, and moves between nodes that trust each other anew.
    let info = bench.cluster.inspect("a", "m").await.expect("it is known");
    assert_eq!((info.status.as_str(), info.restarts), ("running", 0));
    let moved = bench.cluster.move_machine("a", "m", "d").await;
    assert_eq!(moved.expect("it moves").ending, Ending::Moved);

    // What was of the old authority is of no use any more.
    let refused = Client::connect(&address, &tls, &a, Options::default()).await;
    assert!(refused.is_err(), "the old certificate is trusted");
    wait_for("the old connection is closed", || async {
        open.is_lost().then_some(())
    })
    .await
    .expect("in time");
    let late = bench.folder.path().join("late");
    let (ok, said) = bench.cluster.keel(
        "late",
        &[
            "join",
            &address,
            "--name",
            "late",
            "--token",
            &old_token,
            "--listen",
            "127.0.0.1:0",
        ],
    );
    assert!(!ok && said.contains("replaced"), "{said}");
    assert!(!late.join("node.pem").exists());

    // Others join, agents start anew with what is on disk, and a second time it is as the first.
    let token = bench.token("b").await;
    let folder = bench.folder.path().to_owned();
    let joined = bench.cluster.join(&folder, "e", &address, &token).await;
    joined.expect("it joins");
    let nodes = ["a", "b", "c", "d", "e"];
    bench.reported("e", &nodes, |_| true).await;
    for node in ["a", "e"] {
        bench.cluster.kill_agent(node).expect("an agent");
    }
    for node in nodes {
        bench.cluster.wait_alive(node).await.expect("it is alive");
    }
    let (ok, said) = bench.cluster.keel("e", &["ca", "rotate"]);
    assert!(ok, "{said}");
    let again = bench.replaced("a", &nodes).await;
    assert_ne!(again.authorities[0].fingerprint, *new);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_waits_for_every_node_and_survives_its_leader() {
    let mut bench = Bench::new().await;
    let leader = bench.leader("a").await;
    let info: StoreInfo = bench
        .cluster
        .client("a")
        .get("/v1/store")
        .await
        .expect("a store");
    let is_voter = |node: &str| info.voters.iter().any(|voter| voter.node == node);
    let away = NODES.into_iter().find(|node| !is_voter(node)).expect("one");
    let asked = NODES
        .into_iter()
        .find(|node| is_voter(node) && *node != leader);
    let asked = asked.expect("one");
    let before = bench.authority(asked).await.expect("an authority");

    bench.cluster.stop_agent(away, true).expect("it stops");
    let client = bench.cluster.client(asked);
    let begun = client.post::<_, Nothing>("/v1/authority/rotate", &());
    begun.await.expect("it begins");
    let waits = bench.reported(asked, &[], |info| {
        let waits = info.nodes.iter().filter(|node| node.missing.is_some());
        let waits: Vec<&str> = waits.map(|node| node.node.as_str()).collect();
        info.is_rotating && info.authorities.len() == 2 && waits == [away]
    });
    let waits = waits.await;
    assert!(waits.authorities[0].signs, "{waits:?}");
    let (ok, said) = bench.cluster.keel(asked, &["ca", "rotate", "--no-wait"]);
    assert!(!ok && said.contains("being replaced already"), "{said}");
    let (_, shown) = bench.cluster.keel(asked, &["ca"]);
    assert!(
        shown.contains("does not trust the new authority"),
        "{shown}"
    );

    // The next leader goes on; whoever was away follows, and so does the old leader.
    bench.cluster.power_off(&leader);
    wait_for("another node leads", || async {
        let store: StoreInfo = client.get("/v1/store").await.ok()?;
        let now = store.voters.into_iter().find(|voter| voter.leads)?;
        (now.node != leader).then_some(())
    })
    .await
    .expect("in time");
    bench.cluster.stop_agent(away, false).expect("it goes on");
    let waits = bench.reported(asked, &[], |info| {
        let waits = info.nodes.iter().filter(|node| node.missing.is_some());
        waits.map(|node| node.node.as_str()).eq([leader.as_str()])
    });
    waits.await;
    bench.cluster.power_on(&leader).await.expect("it starts");
    let after = bench.replaced(asked, &NODES).await;
    assert_ne!(
        after.authorities[0].fingerprint,
        before.authorities[0].fingerprint
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_as_is_set() {
    let bench = Bench::new().await;
    for (lifetime, reason) in [
        ("1s", "60 s"),
        ("20000d", "valid for"),
        ("long", "--lifetime"),
    ] {
        let (ok, said) = bench
            .cluster
            .keel("a", &["ca", "set", "--lifetime", lifetime]);
        assert!(!ok && said.contains(reason), "{lifetime}: {said}");
    }
    let before = NodeIdentity::load(&bench.cluster.folder("d"));
    let before = before.expect("readable").expect("an identity");
    let (ok, said) = bench.cluster.keel("b", &["ca", "set", "--lifetime", "1h"]);
    assert!(ok, "{said}");
    let soon = keel_store::clock::unix_ms() + 3_700_000;
    let ends_soon = |info: &AuthorityInfo| {
        let mut ends = info.nodes.iter().map(|node| node.ends_unix_ms);
        info.lifetime_s == 3600 && ends.all(|ends| ends.is_some_and(|it| it < soon))
    };
    bench.reported("a", &NODES, ends_soon).await;
    let after = NodeIdentity::load(&bench.cluster.folder("d"));
    let after = after.expect("readable").expect("an identity");
    assert_ne!(before.key_pem, after.key_pem, "the key is a new one");
    after.verify().expect("they belong together");
    // Nobody else's certificate is signed for a node, nor anything for who is none.
    let address = bench.address("a").await;
    let a = "a".parse().expect("a name");
    let tls = after.client_tls().expect("TLS");
    let client = Client::connect(&address, &tls, &a, Options::default()).await;
    let client = client.expect("a member");
    let garbage = client.call(
        keel_cluster::certificates::RENEW,
        vec![7; 100].into(),
        Duration::from_secs(5),
    );
    assert!(matches!(garbage.await, Err(RpcError::Refused { .. })));
}
