//! Drains of nodes, and plans for all of them, in clusters of real processes.

use keel_api::{DrainInfo, DrainState, LedgerInfo, MachineInfo, NodeInfo};
use keel_balance::ledger::Decision;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, wait_for};
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

async fn start(folder: &Path) -> LocalCluster {
    LocalCluster::start(Path::new(KEEL), folder, &["a", "b", "c"])
        .await
        .expect("a cluster of three")
}

/// Runs the CLI against node b; returns whether it succeeded, and all output.
async fn keel(cluster: &LocalCluster, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(KEEL);
    command.arg("--state-dir").arg(cluster.folder("b"));
    command.args(args);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().expect("keel runs");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.success(), said)
}

/// The same for a command that must succeed.
async fn done(cluster: &LocalCluster, args: &[&str]) -> String {
    let (succeeded, said) = keel(cluster, args).await;
    assert!(succeeded, "{args:?}: {said}");
    said
}

/// The same for a command that must be refused.
async fn refused(cluster: &LocalCluster, args: &[&str]) -> String {
    let (succeeded, said) = keel(cluster, args).await;
    assert!(!succeeded, "{args:?}: {said}");
    said
}

async fn on(cluster: &LocalCluster, node: &str) -> Vec<String> {
    let machines = cluster.client("b").get("/v1/machines").await;
    let machines: Vec<MachineInfo> = machines.expect("the machines");
    let there = machines.into_iter().filter(|it| it.node == node);
    there.map(|it| it.name).collect()
}

/// Starts machines that write numbered lines endlessly.
async fn count(cluster: &LocalCluster, node: &str, names: &[&str]) {
    let module = guest("counter");
    for name in names {
        let counter = Guest::new(name, node, &module, &["1000000", "20"]);
        cluster.run(&counter).await.expect("it starts");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_node_is_empty_closed_and_opened_again() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path()).await;
    let names = ["c-1", "c-2", "c-3", "c-4", "c-5", "stays"];
    count(&cluster, "a", &names).await;
    let rules = folder.path().join("rules.toml");
    let pin = "[[rule]]\nname = \"here\"\nrule = \"pin\"\nmachines.names = [\"stays\"]\n\
               nodes.names = [\"a\"]\n";
    std::fs::write(&rules, pin).unwrap();
    done(&cluster, &["rule", "set", "-f", rules.to_str().unwrap()]).await;
    // A plan needs loads, which take some seconds.
    wait_for("a plan can be made", || async {
        let (_, shown) = keel(&cluster, &["drain", "a", "--dry-run"]).await;
        shown.contains("5 moves").then_some(shown)
    })
    .await
    .unwrap();
    let (complete, shown) = keel(&cluster, &["drain", "a", "--dry-run"]).await;
    assert!(!complete && shown.contains("stays stays on a"), "{shown}");
    assert_eq!(on(&cluster, "a").await.len(), 6);

    let said = refused(&cluster, &["drain", "a", "--deadline", "8s"]).await;
    assert!(said.contains("1 machines are still on a"), "{said}");
    assert!(
        said.contains("stays stays on a: no other node has room"),
        "{said}"
    );
    assert_eq!(on(&cluster, "a").await, ["stays"]);
    let info: DrainInfo = cluster.client("c").get("/v1/nodes/a/drain").await.unwrap();
    assert_eq!((info.state, info.moved), (DrainState::Late, 5), "{info:?}");

    // No machine is placed there.
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = module.to_str().unwrap();
    for args in [
        &["run", "-d", "--on", "a", module, "5"][..],
        &["move", "c-1", "--to", "a"],
    ] {
        let said = refused(&cluster, args).await;
        assert!(said.contains("is being drained"), "{said}");
    }
    let nodes: Vec<NodeInfo> = cluster.client("c").get("/v1/nodes").await.unwrap();
    let draining = nodes.iter().filter(|node| node.draining);
    let draining: Vec<&str> = draining.map(|node| node.name.as_str()).collect();
    assert_eq!(draining, ["a"]);

    // Without the rule the drain continues from its present state.
    done(&cluster, &["rule", "rm", "here"]).await;
    let said = done(&cluster, &["drain", "a"]).await;
    assert!(said.contains("a is empty"), "{said}");
    assert_eq!(on(&cluster, "a").await, [""; 0]);
    let why = done(&cluster, &["why", "c-2"]).await;
    assert!(why.contains("a is being drained"), "{why}");
    let ledger: LedgerInfo = cluster.client("b").get("/v1/ledger").await.unwrap();
    let planned = ledger.lines.iter();
    let planned = planned.filter(|it| matches!(it.decision, Decision::Planned { .. }));
    assert!(planned.count() >= 6);

    done(&cluster, &["undrain", "a"]).await;
    let said = refused(&cluster, &["undrain", "a"]).await;
    assert!(said.contains("is not being drained"), "{said}");
    refused(&cluster, &["drain", "nobody"]).await;
    done(&cluster, &["move", "c-1", "--to", "a"]).await;
    for name in names {
        let output = cluster.output("b", name).await.unwrap();
        check_numbered(&output, 0).unwrap();
    }
}

/// The node that is being drained is killed repeatedly; and so is another one, to which machines
/// move.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_outlives_its_agents() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path()).await;
    let names: Vec<String> = (0..8).map(|number| format!("c-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    count(&cluster, "b", &names).await;
    done(&cluster, &["drain", "b", "--detach"]).await;
    for left in [7, 5, 3] {
        wait_for("some went", || async {
            (on(&cluster, "b").await.len() <= left).then_some(())
        })
        .await
        .unwrap();
        cluster
            .kill_agent(if left == 5 { "c" } else { "b" })
            .unwrap();
        cluster
            .wait_alive(if left == 5 { "c" } else { "b" })
            .await
            .unwrap();
    }
    wait_for("all went", || async {
        on(&cluster, "b").await.is_empty().then_some(())
    })
    .await
    .unwrap();
    for name in names {
        let output = cluster.output("a", name).await.unwrap();
        check_numbered(&output, 0).unwrap();
    }
}
