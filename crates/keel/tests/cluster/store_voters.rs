//! The store on several nodes: it survives the loss of any of them, also of the one that began the
//! cluster.

use keel_api::{NodeInfo, StoreInfo};
use keel_machine::moves::Ending;
use keel_machine::restart_policy::Restart;
use keel_testkit::disk::SmallDisk;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, wait_for};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    /// Starts a machine that counts.
    async fn count(&self, name: &str, node: &str) {
        let counter = guest("counter");
        let machine = Guest::new(name, node, &counter, &["1000000", "2"]);
        self.cluster.run(&machine).await.expect("it starts");
    }
}

async fn cluster(names: &[&str]) -> Bench {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let cluster = LocalCluster::start_replicated(Path::new(KEEL), folder.path(), names)
        .await
        .expect("a cluster");
    Bench { cluster, folder }
}

/// The number of a node's copy of the store.
async fn number(cluster: &LocalCluster, ask: &str, node: &str) -> Option<u64> {
    let store: StoreInfo = cluster.client(ask).get("/v1/store").await.ok()?;
    let voter = store.voters.iter().find(|voter| voter.node == node)?;
    voter.number
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_that_began_the_cluster_may_die() {
    let mut bench = cluster(&["a", "b", "c"]).await;
    let counter = guest("counter");
    for (name, node) in [("one", "b"), ("two", "c")] {
        bench
            .cluster
            .run(&Guest::new(name, node, &counter, &["1000000", "2"]))
            .await
            .expect("it starts");
    }
    let begun = Instant::now();
    bench.cluster.power_off("a");
    // What was running runs, and everything can be asked for: start, move, stop.
    bench
        .cluster
        .run(&Guest::new("three", "b", &counter, &["1000000", "2"]))
        .await
        .expect("a machine starts without a");
    println!("a machine started {:?} after the loss", begun.elapsed());
    assert_ne!(
        bench
            .cluster
            .leader("b", Some("a"))
            .await
            .expect("a leader"),
        "a"
    );
    let report = bench.cluster.move_machine("b", "one", "c").await;
    let report = report.expect("a report");
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    for (name, node) in [("one", "c"), ("two", "c"), ("three", "b")] {
        wait_for(&format!("{name} counts"), || async {
            let output = bench.cluster.output(node, name).await.ok()?;
            (check_numbered(&output, 0).expect("in order") > 3).then_some(())
        })
        .await
        .expect("it goes on");
    }
    let (stopped, said) = bench.cluster.keel("c", &["stop", "two"]);
    assert!(stopped, "{said}");
    wait_for("a is seen to be away", || async {
        let nodes: Vec<NodeInfo> = bench.cluster.client("c").get("/v1/nodes").await.ok()?;
        let a = nodes.into_iter().find(|node| node.name == "a")?;
        (!a.alive && a.voter).then_some(())
    })
    .await
    .expect("it is noticed, and stays a voter for a while");

    // Another node joins through one that did not begin the cluster.
    bench.cluster.join_via("d", "c").await.expect("it joins");
    bench.cluster.power_on("a").await.expect("it comes back");
    let (seen, said) = bench.cluster.keel("a", &["ps"]);
    assert!(seen && said.contains("three"), "{said}");
    // (The others try its address again after a pause.)
    wait_for("a takes a machine", || async {
        let report = bench.cluster.move_machine("d", "three", "a").await.ok()?;
        (report.ending == Ending::Moved).then_some(())
    })
    .await
    .expect("it moves");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_stands_still_is_replaced_and_comes_back_as_a_follower() {
    let bench = cluster(&["a", "b", "c"]).await;
    let first = bench.cluster.wait_voters("a", 3).await.expect("a leader");
    let others: Vec<&str> = ["a", "b", "c"]
        .into_iter()
        .filter(|it| *it != first)
        .collect();
    bench.cluster.stop_agent(&first, true).expect("it stops");
    let counter = guest("counter");
    let second = bench
        .cluster
        .leader(others[0], Some(&first))
        .await
        .expect("a leader");
    bench
        .cluster
        .run(&Guest::new("m", others[0], &counter, &["1000000", "2"]))
        .await
        .expect("it starts");
    bench.cluster.stop_agent(&first, false).expect("it goes on");
    // It learns that it no longer leads, and answers by the one that does.
    wait_for("the first leader answers", || async {
        let info = bench.cluster.inspect(&first, "m").await.ok()?;
        (info.status == "running").then_some(())
    })
    .await
    .expect("it answers");
    let now = bench.cluster.leader(&first, None).await.expect("a leader");
    assert_ne!(now, first, "{second} led");
    bench.cluster.wait_alive(&first).await.expect("it is alive");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_nodes_lose_power_and_return_in_another_order() {
    let mut bench = cluster(&["a", "b", "c"]).await;
    bench.count("m", "b").await;
    for node in ["b", "a", "c"] {
        bench.cluster.power_off(node);
    }
    // Without the one that began the cluster, first.
    bench
        .cluster
        .power_on_all(&["c", "b"])
        .await
        .expect("two of three suffice");
    let info = bench.cluster.inspect("c", "m").await.expect("it is known");
    assert_eq!(info.node, "b");
    bench.cluster.power_on("a").await.expect("the third one");
    bench.cluster.wait_alive("a").await.expect("it is alive");
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_say_how_many_voters_there_are() {
    let bench = cluster(&["a", "b", "c"]).await;
    let (done, said) = bench.cluster.keel("b", &["store", "voters", "2"]);
    assert!(!done && said.contains("1, 3, 5 or auto"), "{said}");
    let (done, said) = bench.cluster.keel("c", &["store", "voters", "1"]);
    assert!(done, "{said}");
    let only = bench.cluster.wait_voters("b", 1).await.expect("one");
    let (done, said) = bench.cluster.keel("b", &["store"]);
    assert!(done && said.contains("voters (1 wanted)"), "{said}");
    assert!(
        said.contains(&format!("{only} at ")) && said.contains("may fail: none"),
        "{said}"
    );
    let (done, said) = bench.cluster.keel("b", &["store", "voters", "auto"]);
    assert!(done, "{said}");
    bench
        .cluster
        .wait_voters("b", 3)
        .await
        .expect("three again");
    bench.count("m", "c").await;
}

/// Node c has a copy that counts: without a, b and c are a quorum.
async fn is_needed_and_counts(bench: &mut Bench) {
    bench.cluster.power_off("a");
    bench.count("m", "c").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_voter_that_lost_its_copy_gets_another_one() {
    let mut bench = cluster(&["a", "b", "c"]).await;
    let first = wait_for("c has a number", || number(&bench.cluster, "a", "c"))
        .await
        .expect("a number");
    bench.cluster.power_off("c");
    let copy = bench.folder.path().join("c").join("store");
    std::fs::remove_dir_all(&copy).expect("its copy");
    bench.cluster.power_on("c").await.expect("it comes back");
    wait_for("it has another copy", || async {
        let now = number(&bench.cluster, "a", "c").await?;
        (now != first && copy.join("log.redb").exists()).then_some(())
    })
    .await
    .expect("another number");
    is_needed_and_counts(&mut bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_zone_that_comes_later_gets_a_voter() {
    let mut bench = cluster(&["a", "b", "c"]).await;
    for node in ["a", "b", "c"] {
        let (ok, said) = bench
            .cluster
            .keel("a", &["label", "--node", node, "zone=one"]);
        assert!(ok, "{said}");
    }
    bench.cluster.join_via("d", "a").await.expect("it joins");
    bench.cluster.power_off("d");
    for (label, named) in [("zone", "KEY=VALUE"), ("zone=a/b", "label zone=a/b")] {
        let (ok, said) = bench.cluster.keel("d", &["up", "--label", label]);
        assert!(!ok && said.contains(named), "{said}");
    }
    let options = ["--label", "zone=two"];
    let started = bench.cluster.power_on_with(&["d"], &options).await;
    started.expect("it starts");
    wait_for("d is a voter", || async {
        let store: StoreInfo = bench.cluster.client("b").get("/v1/store").await.ok()?;
        let nodes: Vec<&str> = store.voters.iter().map(|it| &*it.node).collect();
        (nodes.len() == 3 && nodes.contains(&"d")).then_some(())
    })
    .await
    .expect("a voter of another zone");
}

/// Damages the log in a copy of the store; what it is then.
fn damage(copy: &Path) -> Vec<u8> {
    let log = copy.join("log.redb");
    let mut bytes = std::fs::read(&log).expect("a log");
    // As a disk that lost a block.
    bytes[..4096].fill(0x55);
    std::fs::write(&log, &bytes).expect("a damaged log");
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_voter_whose_copy_is_damaged_gets_another_one() {
    let mut bench = cluster(&["a", "b", "c"]).await;
    let first = wait_for("c has a number", || number(&bench.cluster, "a", "c"))
        .await
        .expect("a number");
    bench.cluster.power_off("c");
    let folder = bench.folder.path().join("c");
    let damaged = damage(&folder.join("store"));
    bench.cluster.power_on("c").await.expect("it comes back");
    wait_for("it has another copy", || async {
        let now = number(&bench.cluster, "a", "c").await?;
        (now != first).then_some(())
    })
    .await
    .expect("another number");
    // What it had is kept.
    let entries = std::fs::read_dir(&folder).expect("its folder").flatten();
    let aside = entries.map(|it| it.path());
    let aside = aside.filter(|it| it.extension().is_some_and(|it| it == "damaged"));
    let aside: Vec<_> = aside.collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    let kept = std::fs::read(aside[0].join("log.redb")).expect("the log");
    assert!(kept == damaged, "the damaged log was changed");
    is_needed_and_counts(&mut bench).await;
}

/// Whether one of the voters may fail, and whether the copy of `node` is closed.
async fn spare(cluster: &LocalCluster, node: &str) -> Option<(u32, bool)> {
    let store: StoreInfo = cluster.client("a").get("/v1/store").await.ok()?;
    let voter = store.voters.iter().find(|it| it.node == node)?;
    Some((store.spare, voter.closed))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_voter_whose_disk_is_full_is_none_to_spare() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    let folder = folder.expect("a folder");
    let disk = match SmallDisk::mount(&folder.path().join("c"), 256) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: no disk can be filled here: {error:#}");
            return;
        }
    };
    let names = ["a", "b", "c"];
    let started = LocalCluster::start_replicated(Path::new(KEEL), folder.path(), &names).await;
    let cluster = started.expect("a cluster");
    wait_for("one may fail", || async {
        (spare(&cluster, "c").await? == (1, false)).then_some(())
    })
    .await
    .expect("three copies");
    disk.fill().expect("a full disk");
    // More than its file has room for.
    let (counter, large) = (guest("counter"), "1".repeat(200_000));
    let count = AtomicUsize::new(0);
    wait_for("none may fail", || async {
        let name = format!("large{}", count.fetch_add(1, Ordering::Relaxed));
        let args = ["1000000", "2", &large];
        let run = cluster.run(&Guest::new(&name, "b", &counter, &args)).await;
        run.expect("the others are a quorum");
        (spare(&cluster, "c").await? == (0, true)).then_some(())
    })
    .await
    .expect("it is seen");
    let (_, said) = cluster.keel("a", &["store"]);
    assert!(
        said.contains("its copy is closed") && said.contains("may fail: none"),
        "{said}"
    );
    disk.free().expect("room");
    wait_for("one may fail again", || async {
        (spare(&cluster, "c").await? == (1, false)).then_some(())
    })
    .await
    .expect("its copy is open");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_voter_refuses_a_damaged_copy() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    let folder = folder.expect("a folder");
    let started = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"]).await;
    let mut cluster = started.expect("a cluster");
    cluster.power_off("a");
    let store = folder.path().join("a").join("store");
    let damaged = damage(&store);
    for _ in 0..2 {
        let (ok, said) = cluster.keel("a", &["up"]);
        let says = said.contains("is damaged") && said.contains("keel store restore");
        assert!(!ok && says, "{said}");
        let (ok, said) = cluster.keel("a", &["recover", "--others-are-lost"]);
        assert!(!ok && said.contains("is damaged"), "{said}");
        let now = std::fs::read(store.join("log.redb")).expect("the log");
        assert!(now == damaged, "the damaged log was changed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_voter_recovers_the_store_when_the_others_are_lost() {
    let mut bench = cluster(&["a", "b", "c"]).await;
    let counter = guest("counter");
    for (name, node) in [("kept", "c"), ("lost", "b")] {
        let mut machine = Guest::new(name, node, &counter, &["1000000", "2"]);
        machine.restart = Restart::Always;
        bench.cluster.run(&machine).await.expect("it starts");
    }
    let (done, said) = bench.cluster.keel("c", &["recover", "--others-are-lost"]);
    assert!(
        !done && said.contains("another process has it open"),
        "{said}"
    );
    for node in ["a", "b", "c"] {
        bench.cluster.power_off(node);
    }
    let (done, said) = bench.cluster.keel("c", &["recover"]);
    assert!(!done && said.contains("--others-are-lost"), "{said}");
    let (done, said) = bench.cluster.keel("c", &["recover", "--others-are-lost"]);
    assert!(done && said.contains("incarnation 2"), "{said}");
    assert!(said.contains("node a must never run again"), "{said}");
    bench.cluster.power_on("c").await.expect("it starts alone");
    assert_eq!(bench.cluster.wait_voters("c", 1).await.expect("one"), "c");
    // Everything is known, and new machines have epochs above all old ones.
    let info = bench
        .cluster
        .inspect("c", "lost")
        .await
        .expect("it is known");
    assert_eq!(info.node, "b");
    bench
        .cluster
        .run(&Guest::new("new", "c", &counter, &["1000000", "2"]))
        .await
        .expect("it starts");
    let info = bench.cluster.inspect("c", "new").await.expect("info");
    assert!(info.epoch.to_string().starts_with("2."), "{}", info.epoch);
    // So has one that was there before, from its next life on.
    epoch_in_incarnation(&bench.cluster, ("c", "kept"), 2).await;
    // A lost node comes back as a new one.
    bench.cluster.join_via("d", "c").await.expect("it joins");
}

/// Waits until a machine runs under an epoch of an incarnation.
async fn epoch_in_incarnation(cluster: &LocalCluster, at: (&str, &str), incarnation: u32) {
    let (node, machine) = at;
    let is_so = async || {
        let info = cluster.inspect(node, machine).await.ok()?;
        let starts = info.epoch.starts_with(&format!("{incarnation}."));
        (info.status == "running" && starts).then_some(())
    };
    let found = wait_for("its epoch is of the new incarnation", is_so).await;
    found.expect("it is");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_brings_the_store_back() {
    let mut bench = cluster(&["a", "b", "c"]).await;
    let file = bench.folder.path().join("backup");
    let file = file.to_str().expect("a path");
    let place = bench.folder.path().join("place");
    std::fs::create_dir_all(&place).expect("a folder");
    let place = place.to_str().expect("a path");
    let create = |name: &str| {
        let (done, said) = bench
            .cluster
            .keel("a", &["volume", "create", name, "--at", place]);
        assert!(done, "{said}");
    };
    create("before");
    let counter = guest("counter");
    let mut m = Guest::new("m", "b", &counter, &["1000000", "2"]);
    m.restart = Restart::Always;
    bench.cluster.run(&m).await.expect("it starts");
    let (done, said) = bench.cluster.keel("b", &["store", "backup", file]);
    assert!(done && said.contains("entries of revision"), "{said}");
    let (done, said) = bench.cluster.keel("b", &["store", "backup", file]);
    assert!(!done && said.contains("exists"), "{said}");
    create("after");
    // Epochs that the backup does not know.
    for to in ["a", "b"] {
        let moved = bench.cluster.move_machine("a", "m", to).await;
        moved.expect("it moves");
    }
    let restore = ["store", "restore", file, "--others-are-lost"];
    let (done, said) = bench.cluster.keel("b", &restore);
    assert!(
        !done && said.contains("another process has it open"),
        "{said}"
    );
    for node in ["a", "b", "c"] {
        bench.cluster.power_off(node);
    }
    let damaged = bench.folder.path().join("damaged");
    let mut bytes = std::fs::read(file).expect("the backup");
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(&damaged, &bytes).expect("a file");
    let damaged = damaged.to_str().expect("a path");
    let (done, said) = bench
        .cluster
        .keel("b", &["store", "restore", damaged, "--others-are-lost"]);
    assert!(!done && said.contains("damaged"), "{said}");
    let (done, restored) = bench.cluster.keel("b", &restore);
    assert!(done, "{restored}");
    bench.cluster.power_on("b").await.expect("it starts");
    let (done, said) = bench.cluster.keel("b", &["volume", "ls"]);
    assert!(
        done && said.contains("before") && !said.contains("after"),
        "{said}"
    );
    epoch_in_incarnation(&bench.cluster, ("b", "m"), 2).await;
    // Once more: epochs of the time since must be below the new ones, too.
    assert!(restored.contains("incarnation 2"), "{restored}");
    bench.cluster.power_off("b");
    let (done, again) = bench.cluster.keel("b", &restore);
    assert!(done && again.contains("incarnation 3"), "{again}");
    bench.cluster.power_on("b").await.expect("it starts");
    epoch_in_incarnation(&bench.cluster, ("b", "m"), 3).await;
}
