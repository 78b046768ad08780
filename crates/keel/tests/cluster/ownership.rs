//! The owner of a machine whose move is in doubt, and the order of epochs, with real processes.

use keel_api::{CheckpointRequest, MachineInfo};
use keel_cluster::Epoch;
use keel_machine::moves::Ending;
use keel_machine::restart_policy::Restart;
use keel_testkit::{Guest, LocalCluster, check_numbered, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NODES: [&str; 3] = ["a", "b", "calm"];

struct Bench {
    folder: tempfile::TempDir,
    cluster: LocalCluster,
}

async fn bench() -> Bench {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &NODES)
        .await
        .expect("a cluster");
    Bench { folder, cluster }
}

fn counter() -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    std::fs::read(path).expect("the guest")
}

fn epoch(info: &MachineInfo) -> Epoch {
    info.epoch.parse().expect("an epoch")
}

impl Bench {
    fn keel(&self, args: &[&str]) -> String {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(self.cluster.folder("calm"))
            .args(args)
            .output()
            .expect("keel runs");
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{args:?}: {said}");
        said
    }

    async fn inspect(&self, machine: &str) -> MachineInfo {
        let info = self.cluster.inspect("calm", machine).await;
        info.expect("the store answers")
    }

    /// Nodes with a process of the machine.
    fn places(&self, machine: &str) -> Vec<&'static str> {
        let has = |node: &&str| self.cluster.workers_of(node, machine) > 0;
        NODES.into_iter().filter(has).collect()
    }

    /// Exactly one process of the machine remains, on the node that the store names, and it
    /// continues to print.
    async fn runs_where_the_store_says(&self, machine: &str) {
        let settled = wait_for("one process, where the store says", || async {
            let info = self.cluster.inspect("calm", machine).await.ok()?;
            let there = self.places(machine) == [info.node.as_str()];
            (info.status == "running" && there).then_some(())
        });
        if let Err(error) = settled.await {
            let info = self.inspect(machine).await;
            panic!(
                "{error}: the store says {} on {} under {}; processes on {:?}",
                info.status,
                info.node,
                info.epoch,
                self.places(machine)
            );
        }
        let printed = || async {
            let output = self.cluster.output("calm", machine).await.ok()?;
            check_numbered(&output, 0).ok()
        };
        let before = printed().await.expect("numbered lines");
        wait_for("it continues", || async {
            (printed().await? > before + 20).then_some(())
        })
        .await
        .expect("it continues");
    }
}

/// The commit's answer is lost, and the source's worker dies before the commit is sent. A
/// regression test: the end of that worker was recorded while the owner was in doubt, so that the
/// store reported a failure at a while the machine ran at b.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_in_doubt_leaves_one_copy() {
    let bench = bench().await;
    let cluster = &bench.cluster;
    for (name, restart) in [
        ("stays-ended", Restart::No),
        ("restarts", Restart::OnFailure),
        ("always", Restart::Always),
    ] {
        let module = counter();
        let mut guest = Guest::new(name, "a", &module, &["1000000", "2"]);
        guest.restart = restart;
        let begun = epoch(&cluster.run(&guest).await.expect("it starts"));
        for (node, failpoint, order) in [
            ("a", "move.commit", "delay(4000)"),
            ("a", "move.committed", "error"),
            ("b", "arrival.settle", "delay(8000)*"),
        ] {
            let ordered = cluster.failpoint(node, failpoint, Some(order)).await;
            ordered.expect("the failpoint");
        }
        let passed = cluster.failpoints_passed("a").len();
        let client = cluster.client("calm");
        let moves = tokio::spawn(async move {
            // The report of the move does not matter, only what runs afterwards.
            let _ = keel_testkit::move_by(&client, name, "b").await;
        });
        wait_for("the commit to be held back", || async {
            let names = cluster.failpoints_passed("a");
            let held = names.iter().skip(passed).any(|it| it == "move.commit");
            held.then_some(())
        })
        .await
        .expect("the commit");
        cluster.kill_worker("a", name).expect("the source's worker");
        tokio::time::timeout(Duration::from_secs(60), moves)
            .await
            .expect("the move ends")
            .expect("the move");
        cluster
            .failpoint("b", "arrival.settle", None)
            .await
            .expect("the failpoint");
        bench.runs_where_the_store_says(name).await;
        let info = bench.inspect(name).await;
        assert!(epoch(&info) > begun, "{info:?}, after {begun}");
        assert_eq!((info.node.as_str(), info.restarts), ("b", 0), "{info:?}");
        cluster.end("calm", name).await.expect("it ends");
    }
}

/// A machine was kept under a new epoch after the death of its agent, and its move failed by itself
/// before the worker was told so. A regression test: it ran on under its former epoch, and could not
/// be moved any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_kept_is_told_its_epoch() {
    let bench = bench().await;
    let cluster = &bench.cluster;
    let module = counter();
    let guest = Guest::new("m", "a", &module, &["1000000", "2"]);
    let begun = epoch(&cluster.run(&guest).await.expect("it starts"));
    let copied = Duration::from_millis(1500);
    let delay = format!("delay({})", copied.as_millis());
    for (failpoint, order) in [("source.round", &*delay), ("source.thaw", "error*")] {
        let ordered = cluster.failpoint("a", failpoint, Some(order)).await;
        ordered.expect("the failpoint");
    }
    let client = cluster.client("calm");
    let moves = tokio::spawn(async move {
        let _ = keel_testkit::move_by(&client, "m", "b").await;
    });
    wait_for("it is copied", || async {
        let names = cluster.failpoints_passed("a");
        names.iter().any(|it| it == "source.round").then_some(())
    })
    .await
    .expect("a copy");
    for _ in 0..2 {
        cluster.kill_agent("a").expect("its agent");
        cluster.wait_alive("a").await.expect("another one");
        wait_for("it is kept", || async {
            let info = cluster.inspect("calm", "m").await.ok()?;
            (epoch(&info) > begun).then_some(())
        })
        .await
        .expect("a new epoch");
        // The copy fails between the two agents; nothing tells when.
        let _ = cluster.kill_worker("b", "m");
        tokio::time::sleep(copied).await;
    }
    let _ = moves.await;
    let cleared = cluster.failpoint("a", "source.thaw", None).await;
    cleared.expect("no failpoint");
    wait_for("it can be moved", || async {
        let moved = cluster.move_machine("calm", "m", "b").await;
        moved.is_ok().then_some(())
    })
    .await
    .expect("it moves");
    bench.runs_where_the_store_says("m").await;
    // Each agent keeps it once at most.
    let now = epoch(&bench.inspect("m").await);
    assert!(now <= begun.next().next(), "{now}, after {begun}");
}

/// A fencing token never decreases, whatever is removed, restored or restarted under a name.
#[tokio::test(flavor = "multi_thread")]
async fn epochs_of_a_name_never_fall() {
    let bench = bench().await;
    let cluster = &bench.cluster;
    let module = counter();
    let kept = bench.folder.path().join("kept").display().to_string();
    let guest = Guest::new("m", "a", &module, &["1000000", "2"]);
    let mut newest = epoch(&cluster.run(&guest).await.expect("it starts"));
    let request = CheckpointRequest {
        to: Some(kept.clone()),
        ..CheckpointRequest::default()
    };
    let taken: keel_api::CheckpointInfo = cluster
        .client("calm")
        .post("/v1/machines/m/checkpoints", &request)
        .await
        .expect("a checkpoint");
    for round in 0..4 {
        let to = ["b", "a"][round % 2];
        let report = cluster.move_machine("calm", "m", to).await.expect("a move");
        assert!(report.epoch > newest, "{}", report.line());
        newest = report.epoch;
    }
    for again in ["restore", "run", "restore"] {
        bench.keel(&["stop", "m"]);
        bench.keel(&["rm", "m"]);
        match again {
            "run" => drop(cluster.run(&guest).await.expect("it starts")),
            _ => drop(bench.keel(&["restore", "m", "--from", &kept, "--id", &taken.id])),
        }
        let now = wait_for("it runs", || async {
            let info = cluster.inspect("calm", "m").await.ok()?;
            (info.status == "running").then(|| epoch(&info))
        })
        .await
        .expect("it runs");
        assert!(now > newest, "{again}: {now} after {newest}");
        newest = now;
    }
}

/// A machine leaves and comes back while its former node looks at what it left: the worker in which
/// it arrives was empty when it was asked, and is in use when that node decides. A regression test:
/// it was taken for a worker left over and ended, and the machine stayed.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_in_arrival_is_not_taken_for_one_left_over() {
    let bench = bench().await;
    let cluster = &bench.cluster;
    let module = counter();
    let guest = Guest::new("counter", "a", &module, &["1000000", "2"]);
    cluster.run(&guest).await.expect("it starts");
    // Node a looks at the worker while it is empty, and decides after it was told to receive.
    for (node, failpoint, order) in [
        ("a", "unscheduled.found", "delay(1000)"),
        ("a", "offer.started", "delay(2500)"),
        ("a", "unscheduled.reported", "delay(4000)"),
        ("b", "move.accepted", "delay(5000)"),
    ] {
        let ordered = cluster.failpoint(node, failpoint, Some(order)).await;
        ordered.expect("the failpoint");
    }
    for (from, to) in [("a", "b"), ("b", "a")] {
        let report = cluster.move_machine(from, "counter", to).await;
        let report = report.expect("a report");
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    }
    let passed = cluster.failpoints_passed("a");
    assert!(
        passed.iter().any(|it| it == "unscheduled.found"),
        "{passed:?}"
    );
    bench.runs_where_the_store_says("counter").await;
}
