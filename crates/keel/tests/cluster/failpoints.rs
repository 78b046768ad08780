//! Every failpoint: a kill and an error at each step of moves, checkpoints, restores, starts and
//! ends. The table of docs/moves.md names the tests of this file.

use keel_machine::failpoint::{ALL, Failpoint, Site};
use keel_machine::moves::Ending;
use keel_testkit::drill::Drill;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// Runs drills for all matching failpoints, with each action.
async fn drill_all(fits: impl Fn(&Failpoint) -> bool, orders: &[&str]) {
    drill_as(fits, orders, (4, None), false).await;
}

/// As [`drill_all`], with a machine of this size in MiB whose parts have this limit in bytes; or
/// one with another part, which stays.
async fn drill_as(
    fits: impl Fn(&Failpoint) -> bool,
    orders: &[&str],
    (mib, part_memory_bytes): (u32, Option<u64>),
    spans: bool,
) {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let names = ["calm", "b", "c"];
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &names)
        .await
        .unwrap();
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/witness.wasm");
    std::fs::copy(path, shared.join("witness.wasm")).unwrap();
    let drill = Drill {
        cluster: &cluster,
        calm: "calm",
        nodes: ["b", "c"],
        machine: "w",
        folder: &shared,
        mib,
        pause_us: 1000,
        part_memory_bytes,
        spans,
        kind: None,
    };
    drill.start().await.unwrap();
    let mut drilled = 0;
    // To run some of them: `EVENKEEL_DRILL=move.go,target.go`.
    let only = std::env::var("EVENKEEL_DRILL").unwrap_or_default();
    let wanted = |it: &&Failpoint| only.is_empty() || only.split(',').any(|name| name == it.name);
    for failpoint in ALL.iter().filter(|it| fits(it)).filter(wanted) {
        for order in orders {
            let outcome = match drill.run(failpoint, order.parse().unwrap()).await {
                Ok(outcome) => outcome,
                Err(error) => panic!("{} {order}: {error:?}", failpoint.name),
            };
            println!("{:<26} {order:<12} {outcome:?}", failpoint.name);
            drilled += 1;
            if outcome.rewound {
                drill.start_afresh().await.unwrap();
            }
        }
    }
    assert!(drilled > 0);
    println!("{drilled} drills: {:?}", drill.evidence().unwrap());
}

fn begins(failpoint: &Failpoint, words: &[&str]) -> bool {
    words.iter().any(|word| failpoint.name.starts_with(word))
}

fn of_post_copy(failpoint: &Failpoint) -> bool {
    begins(failpoint, &["post-copy.", "move.served"])
}

fn of_homes(failpoint: &Failpoint) -> bool {
    begins(failpoint, &["home."])
}

#[tokio::test(flavor = "multi_thread")]
async fn process_killed_or_failed_at_each_step_of_post_copy() {
    drill_all(of_post_copy, &["kill", "error"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn target_agent_killed_or_failed_at_each_step() {
    drill_all(|it| it.site == Site::TargetAgent, &["kill", "error"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn source_agent_killed_or_failed_at_each_step() {
    drill_all(
        |it| it.site == Site::SourceAgent && !of_post_copy(it),
        &["kill", "error"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn target_worker_killed_or_failed_at_each_step() {
    drill_all(
        |it| it.site == Site::TargetWorker && !of_post_copy(it) && !of_homes(it),
        &["kill", "error"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn source_worker_killed_or_failed_at_each_step() {
    drill_all(
        |it| it.site == Site::SourceWorker && !of_post_copy(it) && !of_homes(it),
        &["kill", "error"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn process_killed_or_failed_at_each_step_of_a_checkpoint() {
    drill_all(|it| begins(it, &["checkpoint."]), &["kill", "error"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn process_killed_or_failed_at_each_step_of_a_restore_start_or_end() {
    drill_all(
        |it| begins(it, &["restore.", "start.", "end."]),
        &["kill", "error"],
    )
    .await;
}

/// If it is larger than a part, and so starts on several nodes.
#[tokio::test(flavor = "multi_thread")]
async fn process_killed_or_failed_at_each_step_of_a_spanning_start() {
    let machine = (8, Some(3 << 20));
    drill_as(
        |it| begins(it, &["spanning-start."]),
        &["kill", "error"],
        machine,
        false,
    )
    .await;
}

/// Only the home of a spanning machine moves. Lost agents, and failed steps, have no effect on it;
/// after the loss of any part it ends, and restarts from its checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn agents_killed_or_failed_at_each_step_of_a_home_migration() {
    let agents = |it: &Failpoint| matches!(it.site, Site::SourceAgent | Site::TargetAgent);
    drill_as(
        |it| agents(it) && !of_post_copy(it),
        &["kill", "error"],
        (8, None),
        true,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_killed_or_failed_at_each_step_of_a_home_migration() {
    let workers = |it: &Failpoint| matches!(it.site, Site::SourceWorker | Site::TargetWorker);
    let fits = |it: &Failpoint| workers(it) && !of_post_copy(it);
    drill_as(fits, &["kill", "error"], (8, None), true).await;
}

#[test]
fn every_failpoint_is_driven_by_one_of_these_tests() {
    for it in ALL {
        let of_moves = [
            Site::TargetAgent,
            Site::SourceAgent,
            Site::TargetWorker,
            Site::SourceWorker,
        ];
        // Adding and removing parts: `spanning`. Workers left over: `ownership`.
        let others = [
            "checkpoint.",
            "restore.",
            "start.",
            "end.",
            "spanning-start.",
            "parts.",
            "unscheduled.",
        ];
        assert!(
            of_moves.contains(&it.site) != begins(it, &others),
            "{}",
            it.name
        );
    }
}

/// Who moves a machine reads why the other node cannot take it, whatever its worker was doing.
#[tokio::test(flavor = "multi_thread")]
async fn the_reason_of_a_target_reaches_who_asked() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"])
        .await
        .unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/threads.wasm");
    let module = std::fs::read(path).unwrap();
    let guest = Guest::new("m", "a", &module, &["2", "40000000"]);
    cluster.run(&guest).await.unwrap();
    for name in [
        "target.greeted",
        "target.round",
        "target.image",
        "target.ready",
    ] {
        cluster.failpoint("b", name, Some("error")).await.unwrap();
        // A move right after one whose target failed is refused for a moment.
        let report = wait_for("its target is tried", || async {
            let report = cluster.move_machine("a", "m", "b").await.ok()?;
            let passed = cluster.failpoints_passed("b");
            passed.iter().any(|it| it == name).then_some(report)
        });
        let report = report.await.unwrap();
        assert_ne!(report.ending, Ending::Moved);
        let line = report.line();
        assert!(line.contains(&format!("failpoint {name}")), "{line}");
        cluster.failpoint("b", name, None).await.unwrap();
    }
}
