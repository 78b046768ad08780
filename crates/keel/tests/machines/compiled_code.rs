//! Compiled code: compiled ahead on the nodes that may receive a machine, and awaited by a move
//! that comes first.

use keel_api::MachineInfo;
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, wait_for};
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

async fn ready_on(cluster: &LocalCluster, machine: &str, nodes: &[&str]) -> MachineInfo {
    let what = format!("the code of {machine} on {nodes:?}");
    wait_for(&what, || async {
        let info = cluster.inspect("a", machine).await.ok()?;
        (info.ready_on == nodes).then_some(info)
    })
    .await
    .expect("it is compiled")
}

/// Rules limit the nodes of a machine: other nodes do not compile its program.
#[tokio::test(flavor = "multi_thread")]
async fn programs_are_compiled_where_machines_may_go() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b", "c"])
        .await
        .expect("a cluster");
    let rules = folder.path().join("rules.toml");
    std::fs::write(
        &rules,
        "[[rule]]\nname = \"not-c\"\nrule = \"avoid\"\nmachines.names = [\"bound\"]\n\
         nodes.names = [\"c\"]\n",
    )
    .unwrap();
    let keel = |args: &[&str]| {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(cluster.folder("a"))
            .args(args)
            .output()
            .expect("keel runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    keel(&["rule", "set", "-f", rules.to_str().unwrap()]);
    let (bound, free) = (guest("counter"), guest("spinner"));
    let bound = Guest::new("bound", "a", &bound, &["1000000", "20"]);
    cluster.run(&bound).await.expect("it starts");
    let free = Guest::new("free", "b", &free, &["1000000000", "1"]);
    cluster.run(&free).await.expect("it starts");
    ready_on(&cluster, "bound", &["a", "b"]).await;
    ready_on(&cluster, "free", &["a", "b", "c"]).await;
    // c has checked both, and compiled the one.
    ready_on(&cluster, "bound", &["a", "b"]).await;
    let page = keel(&["describe", "bound"]);
    assert!(page.contains("compiled           on a, b"), "{page}");
}

/// A move at once waits for the code, reports that, and loses no output.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_waits_for_code() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"])
        .await
        .expect("a cluster");
    let counter = guest("counter");
    let counter = Guest::new("counter", "a", &counter, &["1000000", "2"]);
    cluster.run(&counter).await.expect("it starts");
    let first = cluster
        .move_machine("a", "counter", "b")
        .await
        .expect("a report");
    assert_eq!(first.ending, Ending::Moved, "{}", first.line());
    // From now on both nodes have the code.
    ready_on(&cluster, "counter", &["a", "b"]).await;
    let back = cluster
        .move_machine("b", "counter", "a")
        .await
        .expect("a report");
    assert_eq!(back.ending, Ending::Moved, "{}", back.line());
    let output = cluster.output("b", "counter").await.expect("output");
    check_numbered(&output, 0).expect("every line once and in order");
}

/// The target compiles what the threads are resumed in before the source freezes them: downtime
/// does not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn code_for_resuming_is_compiled_before_the_freeze() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"])
        .await
        .expect("a cluster");
    let compiled = |node: &str| {
        let files = std::fs::read_dir(cluster.folder(node).join("cache")).expect("a cache");
        let names = files.map(|file| file.expect("an entry").file_name());
        names
            .filter(|name| name.to_string_lossy().ends_with(".resume"))
            .count()
    };
    let counter = guest("counter");
    let counter = Guest::new("counter", "a", &counter, &["1000000", "2"]);
    cluster.run(&counter).await.expect("it starts");
    ready_on(&cluster, "counter", &["a", "b"]).await;
    let ahead = compiled("b");

    // Copying is complete, and the move fails.
    cluster
        .failpoint("a", "source.converged", Some("error"))
        .await
        .expect("an order");
    let failed = cluster.move_machine("a", "counter", "b").await;
    let failed = failed.expect("a report");
    assert_ne!(failed.ending, Ending::Moved, "{}", failed.line());
    assert!(compiled("b") > ahead);

    let moved = cluster.move_machine("a", "counter", "b").await;
    let moved = moved.expect("a report");
    assert_eq!(moved.ending, Ending::Moved, "{}", moved.line());
    let output = cluster.output("b", "counter").await.expect("output");
    check_numbered(&output, 0).expect("every line once and in order");
}
