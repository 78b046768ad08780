//! Clusters of real processes on loopback: machines run, move, outlive agents, and survive
//! failures.

mod requests;

use keel_api::{
    CheckpointInfo, Client, MachineInfo, MoveRequest, NodeInfo, Token, TokenRequest, Urgency,
};
use keel_cluster::Epoch;
use keel_machine::moves::{Ending, MoveReport};
use keel_machine::restart_policy::Restart;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, move_as, wait_for};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

async fn cluster(names: &[&str]) -> Bench {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), names)
        .await
        .expect("a cluster");
    Bench { cluster, folder }
}

fn keel(bench: &Bench, node: &str, args: &[&str]) -> (i32, String, String) {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(bench.folder.path().join(node))
        .args(args)
        .output()
        .expect("keel runs");
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

async fn lines(cluster: &LocalCluster, node: &str, machine: &str) -> u64 {
    let output = cluster.output(node, machine).await.expect("output");
    check_numbered(&output, 0).expect("every line once and in order")
}

async fn wait_lines(cluster: &LocalCluster, node: &str, machine: &str, count: u64) {
    wait_for(&format!("{machine} prints line {count}"), || async {
        (lines(cluster, node, machine).await > count).then_some(())
    })
    .await
    .expect("it continues");
}

fn epoch(info: &MachineInfo) -> Epoch {
    info.epoch.parse().expect("an epoch")
}

fn moved(report: &MoveReport) {
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_move_and_nothing_is_lost() {
    let bench = cluster(&["a", "b", "c"]).await;
    let cluster = &bench.cluster;
    let counter = guest("counter");
    let started = cluster
        .run(&Guest::new("counter", "a", &counter, &["1000000", "2"]))
        .await
        .expect("it starts");
    assert_eq!(started.status, "running");
    let first = epoch(&started);
    let nodes = ["b", "c", "a"];
    for round in 0..12 {
        let before = lines(cluster, "a", "counter").await;
        // Any node finds the owner.
        let via = nodes[(round + round / 3) % 3];
        let to = nodes[round % 3];
        let report = cluster
            .move_machine(via, "counter", to)
            .await
            .expect("a report");
        moved(&report);
        assert_eq!(report.epoch.counter, first.counter + round as u64 + 1);
        wait_lines(cluster, via, "counter", before).await;
    }
    let info = cluster.inspect("b", "counter").await.expect("info");
    assert_eq!((info.node.as_str(), info.moves.len()), ("a", 12));
    let schedule: Vec<String> = cluster
        .client("c")
        .get("/v1/schedule/a")
        .await
        .expect("schedule");
    assert_eq!(schedule, ["counter"]);
    // The nodes that it left keep no state of it.
    assert!(!cluster.folder("b").join("workers/counter").exists());

    let (code, out, err) = keel(&bench, "c", &["stop", "counter"]);
    assert_eq!(code, 0, "{out}{err}");
    let info = cluster.inspect("a", "counter").await.expect("info");
    assert_eq!(info.status, "stopped");
    assert_eq!(keel(&bench, "b", &["rm", "counter"]).0, 0);
    assert!(cluster.inspect("a", "counter").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_move_with_their_machine_and_results_are_the_same() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let threads = guest("threads");
    let args = ["4", "1000000"];
    cluster
        .run(&Guest::new("still", "a", &threads, &args))
        .await
        .expect("it starts");
    let still = cluster.wait_end("a", "still").await.expect("it ends");
    assert_eq!(still.exit_code, Some(0), "{still:?}");
    cluster
        .run(&Guest::new("moving", "a", &threads, &args))
        .await
        .expect("it starts");
    let mut moves = 0;
    for round in 0..40 {
        let to = ["b", "a"][round % 2];
        // It may end while it moves.
        match cluster.move_machine("a", "moving", to).await {
            Ok(report) if report.ending == Ending::Moved => moves += 1,
            _ => break,
        }
    }
    let moving = cluster.wait_end("a", "moving").await.expect("it ends");
    assert_eq!(moving.exit_code, Some(0), "{moving:?}");
    assert!(moves > 0);
    let output = |machine: &'static str| cluster.output("b", machine);
    assert_eq!(
        output("still").await.expect("output"),
        output("moving").await.expect("output")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_finds_its_machines_running() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let counter = guest("counter");
    for (name, node) in [("on-a", "a"), ("on-b", "b")] {
        cluster
            .run(&Guest::new(name, node, &counter, &["1000000", "2"]))
            .await
            .expect("it starts");
    }
    let before = cluster.inspect("b", "on-b").await.expect("info");
    for node in ["b", "a"] {
        cluster.kill_agent(node).expect("an agent to kill");
        cluster.wait_alive(node).await.expect("it is alive again");
    }
    let after = wait_for("the machine is found", || async {
        let info = cluster.inspect("b", "on-b").await.ok()?;
        info.pid.is_some().then_some(info)
    })
    .await
    .expect("it is found");
    assert_eq!(before.pid, after.pid);
    for (name, to) in [("on-a", "b"), ("on-b", "a")] {
        let count = lines(cluster, "a", name).await;
        wait_lines(cluster, "a", name, count).await;
        // A new agent needs a moment until it has a lease again.
        wait_for("it can move", || async {
            let report = cluster.move_machine("a", name, to).await.ok()?;
            (report.ending == Ending::Moved).then_some(())
        })
        .await
        .expect("it moves");
    }
    // A move waits for a target whose agent begins again, and until that has a lease.
    cluster.kill_agent("b").expect("an agent to kill");
    let report = cluster.move_machine("a", "on-b", "b").await;
    moved(&report.expect("a report"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_in_the_middle_of_a_move_leaves_one_machine_running() {
    let bench = cluster(&["a", "b", "c"]).await;
    let cluster = &bench.cluster;
    let writer = guest("writer");
    cluster
        .run(&Guest::new("writer", "b", &writer, &["64", "50"]))
        .await
        .expect("it starts");
    for (round, sought) in ["socket", "log.0", "log.0"].iter().enumerate() {
        let at = cluster.inspect("a", "writer").await.expect("info").node;
        let to = if at == "b" { "c" } else { "b" };
        let folder = cluster.folder(to).join("workers/writer");
        let over = std::sync::atomic::AtomicBool::new(false);
        let moving = async {
            let report = cluster.move_machine(&at, "writer", to).await;
            over.store(true, std::sync::atomic::Ordering::SeqCst);
            report
        };
        let killing = async {
            // A move that is refused for lack of a lease, or has completed, never gets this far.
            let seen = wait_for("the move has come so far, or is over", || async {
                if over.load(std::sync::atomic::Ordering::SeqCst) {
                    return Some(false);
                }
                folder.join(sought).exists().then_some(true)
            })
            .await
            .expect("it comes so far");
            if seen {
                for _ in 0..round * 200 {
                    tokio::task::yield_now().await;
                }
                cluster.kill_agent(&at).expect("an agent to kill");
            }
        };
        // Whether the move completed or was interrupted: one machine continues, without lost
        // output.
        let (report, ()) = tokio::join!(moving, killing);
        drop(report);
        for node in [at.as_str(), to] {
            cluster.wait_alive(node).await.expect("it is alive again");
        }
        let before = wait_for("its output is found", || async {
            let output = cluster.output("a", "writer").await.ok()?;
            Some(check_numbered(&output, 0).expect("once and in order"))
        })
        .await
        .expect("its output");
        wait_for("it prints more", || async {
            let output = cluster.output("a", "writer").await.ok()?;
            let lines = check_numbered(&output, 0).expect("once and in order");
            (lines > before + 1).then_some(())
        })
        .await
        .expect("it continues");
        let info = cluster.inspect("a", "writer").await.expect("info");
        assert_eq!(info.status, "running", "{info:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_left_can_be_switched_off_and_on() {
    let mut bench = cluster(&["a", "b"]).await;
    let counter = guest("counter");
    bench
        .cluster
        .run(&Guest::new("counter", "b", &counter, &["1000000", "2"]))
        .await
        .expect("it starts");
    let report = bench
        .cluster
        .move_machine("b", "counter", "a")
        .await
        .expect("a report");
    moved(&report);
    bench.cluster.power_off("b");
    let count = lines(&bench.cluster, "a", "counter").await;
    wait_lines(&bench.cluster, "a", "counter", count + 3).await;
    wait_for("b is seen to be away", || async {
        let nodes: Vec<NodeInfo> = bench.cluster.client("a").get("/v1/nodes").await.ok()?;
        nodes
            .iter()
            .any(|node| node.name == "b" && !node.alive)
            .then_some(())
    })
    .await
    .expect("it is noticed");
    // A move to an unreachable node fails, and the machine continues.
    let report = bench
        .cluster
        .move_machine("a", "counter", "b")
        .await
        .expect("a report");
    assert!(
        matches!(report.ending, Ending::Stayed { .. }),
        "{}",
        report.line()
    );
    bench.cluster.power_on("b").await.expect("it starts again");
    wait_for("it moves again", || async {
        let report = bench.cluster.move_machine("a", "counter", "b").await.ok()?;
        (report.ending == Ending::Moved).then_some(())
    })
    .await
    .expect("it moves");
    let count = lines(&bench.cluster, "b", "counter").await;
    wait_lines(&bench.cluster, "b", "counter", count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_killed_at_any_moment_leaves_the_machine_running() {
    let mut bench = cluster(&["a", "b"]).await;
    let writer = guest("writer");
    bench
        .cluster
        .run(&Guest::new("writer", "a", &writer, &["48", "20"]))
        .await
        .expect("it starts");
    for round in 0..4 {
        let folder = bench.cluster.folder("b").join("workers/writer");
        wait_for("the last attempt is cleared away", || async {
            (!folder.exists()).then_some(())
        })
        .await
        .expect("it is cleared away");
        let to_b = bench.cluster.move_machine("a", "writer", "b");
        let kill = async {
            // At a different point of the move each time, by the pages that the target has so far.
            let sought = ["worker.log", "socket", "log.0", "log.0"][round];
            wait_for("the move has come so far", || async {
                folder.join(sought).exists().then_some(())
            })
            .await
            .expect("it comes so far");
            bench.cluster.kill_worker("b", "writer")
        };
        let (report, killed) = tokio::join!(to_b, kill);
        let report = report.expect("a report");
        match report.ending {
            Ending::Stayed { .. } => {
                let count = lines(&bench.cluster, "a", "writer").await;
                wait_lines(&bench.cluster, "a", "writer", count).await;
            }
            // The kill came before the process was started, or after the machine had arrived; then
            // it is lost with its process, and reported so.
            Ending::Moved if killed.is_err() => {
                let back = bench.cluster.move_machine("b", "writer", "a").await;
                moved(&back.expect("a report"));
            }
            Ending::Moved => {
                let info = bench
                    .cluster
                    .wait_end("a", "writer")
                    .await
                    .expect("it is noticed");
                assert_eq!(info.status, "failed", "{info:?}");
                return;
            }
        }
    }
    // Afterwards it can still move.
    let report = wait_for("the target is free again", || async {
        let report = bench.cluster.move_machine("a", "writer", "b").await.ok()?;
        (report.ending == Ending::Moved).then_some(report)
    })
    .await
    .expect("it moves");
    moved(&report);
    bench.cluster.power_off("a");
}

/// A stopped agent loses its connections, but not its machines; and a worker that does not answer
/// for long is killed before it counts as lost.
#[tokio::test(flavor = "multi_thread")]
async fn silence_is_no_proof_of_death() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let counter = guest("counter");
    for name in ["one", "two"] {
        cluster
            .run(&Guest::new(name, "b", &counter, &["1000000", "2"]))
            .await
            .expect("it starts");
    }
    // Longer than the time-out of idle connections.
    cluster.stop_agent("b", true).expect("an agent");
    tokio::time::sleep(Duration::from_secs(13)).await;
    cluster.stop_agent("b", false).expect("an agent");
    let count = lines(cluster, "b", "one").await;
    wait_lines(cluster, "b", "one", count + 2).await;
    wait_for("it moves", || async {
        let report = cluster.move_machine("b", "one", "a").await.ok()?;
        (report.ending == Ending::Moved).then_some(())
    })
    .await
    .expect("it moves");
    let count = lines(cluster, "a", "one").await;
    wait_lines(cluster, "a", "one", count).await;
    let info = cluster.inspect("b", "two").await.expect("info");
    assert_eq!(info.status, "running", "{info:?}");
    let pid = info.pid.expect("a process");
    cluster.stop_worker("b", "two", true).expect("a worker");
    let info = cluster.wait_end("b", "two").await.expect("it is noticed");
    assert_eq!(info.status, "failed", "{info:?}");
    let gone = !std::path::Path::new(&format!("/proc/{pid}/cmdline")).exists()
        || std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty());
    assert!(gone, "its process is still there");
}

/// Back and forth without a pause: each move begins as soon as the last one is reported, on
/// whichever node the machine is.
#[tokio::test(flavor = "multi_thread")]
async fn moves_may_follow_one_another_at_once() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    cluster
        .run(&Guest::new(
            "counter",
            "a",
            &guest("counter"),
            &["1000000", "2"],
        ))
        .await
        .expect("it starts");
    for round in 0..20 {
        let (from, to) = [("a", "b"), ("b", "a")][round % 2];
        let report = cluster.move_machine(from, "counter", to).await;
        let report = report.expect("a report");
        moved(&report);
        // Its source resumed it; its agent did not find it.
        assert!(report.resume_micros > 0);
    }
    let count = lines(cluster, "a", "counter").await;
    wait_lines(cluster, "a", "counter", count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_is_reported_and_others_are_unharmed() {
    let bench = cluster(&["a"]).await;
    let cluster = &bench.cluster;
    let counter = guest("counter");
    for name in ["one", "two"] {
        cluster
            .run(&Guest::new(name, "a", &counter, &["1000000", "2"]))
            .await
            .expect("it starts");
    }
    cluster.kill_worker("a", "one").expect("a worker to kill");
    let info = cluster.wait_end("a", "one").await.expect("it is noticed");
    assert_eq!(info.status, "failed");
    assert!(
        info.message
            .unwrap_or_default()
            .contains("worker process was lost")
    );
    let count = lines(cluster, "a", "two").await;
    wait_lines(cluster, "a", "two", count).await;
    assert_eq!(keel(&bench, "a", &["kill", "two"]).0, 0);
    assert_eq!(keel(&bench, "a", &["rm", "one", "two"]).0, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_move_and_a_stop_find_a_moving_machine() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let writer = guest("writer");
    cluster
        .run(&Guest::new("writer", "a", &writer, &["64", "30"]))
        .await
        .expect("it starts");
    let first = cluster.move_machine("a", "writer", "b");
    let second = async {
        wait_for("the first move has begun", || async {
            match cluster.move_machine("a", "writer", "b").await {
                Err(error) => Some(error.to_string()),
                Ok(_) => None,
            }
        })
        .await
    };
    let (first, second) = tokio::join!(first, second);
    // The first request moved it; the other one got an error.
    match first {
        Ok(report) => moved(&report),
        Err(error) => assert!(error.to_string().contains("moving already"), "{error}"),
    }
    let second = second.expect("an answer");
    assert!(
        second.contains("moving already") || second.contains("on b already"),
        "{second}"
    );

    // A stop cancels the move: the machine must not continue elsewhere.
    let back = cluster.move_machine("a", "writer", "a");
    let (report, stopped) = tokio::join!(back, async {
        wait_for("the move back is under way", || async {
            cluster
                .folder("a")
                .join("workers/writer")
                .exists()
                .then_some(())
        })
        .await
        .expect("it begins");
        keel(&bench, "a", &["stop", "writer"])
    });
    drop(report);
    let ended = wait_for("it is stopped", || async {
        // A stop at the very end of the move reports that.
        if stopped.0 != 0 {
            keel(&bench, "a", &["stop", "writer"]);
        }
        let info = cluster.inspect("b", "writer").await.ok()?;
        (info.status == "stopped").then_some(info)
    })
    .await;
    assert!(ended.is_ok(), "{stopped:?}");
}

/// Post-copy: back and forth, while the machine writes; then the source's worker is killed before
/// all memory has arrived.
#[tokio::test(flavor = "multi_thread")]
async fn memory_comes_after_the_machine() {
    let bench = cluster(&["a", "b"]).await;
    let cluster = &bench.cluster;
    let shared = bench.folder.path().join("kept").display().to_string();
    let writer = guest("writer");
    cluster
        .run(&Guest::new("writer", "a", &writer, &["64", "100"]))
        .await
        .expect("it starts");
    wait_lines(cluster, "a", "writer", 5).await;
    let post_copy = |to: &str| MoveRequest {
        to: to.to_owned(),
        post_copy: true,
        checkpoint_to: Some(shared.clone()),
        urgency: Urgency::Normal,
        downtime_ms: None,
    };
    let mut remote = 0;
    for to in ["b", "a", "b", "a"] {
        let before = lines(cluster, "a", "writer").await;
        let report = move_as(&cluster.client("a"), "writer", &post_copy(to))
            .await
            .expect("a report");
        moved(&report);
        let fill = report.fill.as_ref().expect("how its memory came");
        assert!(
            fill.pushed_pages + fill.pulled_pages > 0,
            "{}",
            report.line()
        );
        remote += fill.remote_faults();
        wait_lines(cluster, "b", "writer", before + 2).await;
        let info = cluster.inspect("b", "writer").await.expect("info");
        assert_eq!((info.status.as_str(), info.node.as_str()), ("running", to));
        // An ordinary move, or a checkpoint, is possible again at once.
        let (code, _, err) = keel(&bench, "a", &["checkpoint", "writer", "--to", &shared]);
        assert_eq!(code, 0, "{err}");
    }
    assert!(remote > 0, "no access had to wait for a page");
    let (code, out, err) = keel(
        &bench,
        "a",
        &[
            "move",
            "writer",
            "--to",
            "b",
            "--post-copy",
            "--checkpoint-to",
            &shared,
        ],
    );
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("post-copy took"), "{out}");
    let (code, _, err) = keel(
        &bench,
        "a",
        &["move", "writer", "--to", "b", "--checkpoint-to", "x"],
    );
    assert_eq!(code, 2, "{err}");
    assert_eq!(keel(&bench, "a", &["stop", "writer"]).0, 0);
}

/// Many machines leave a node at once, and others arrive: all complete, no report is lost, and the
/// limit of concurrent copies holds.
#[tokio::test(flavor = "multi_thread")]
async fn many_machines_move_at_once() {
    let bench = cluster(&["a", "b", "c"]).await;
    let cluster = &bench.cluster;
    let counter = guest("counter");
    let names: Vec<String> = (0..12).map(|number| format!("m{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        let node = ["a", "b", "c"][number % 3];
        cluster
            .run(&Guest::new(name, node, &counter, &["1000000", "5"]))
            .await
            .expect("it starts");
    }
    for round in 0..2 {
        let mut moves = tokio::task::JoinSet::new();
        for (number, name) in names.iter().enumerate() {
            let to = ["b", "c", "a"][(number + round) % 3].to_owned();
            let (client, name) = (cluster.client("a"), name.clone());
            moves.spawn(async move {
                let request = MoveRequest {
                    to,
                    post_copy: false,
                    checkpoint_to: None,
                    urgency: [Urgency::Low, Urgency::Normal, Urgency::High][number % 3],
                    downtime_ms: None,
                };
                move_as(&client, &name, &request).await
            });
        }
        while let Some(report) = moves.join_next().await {
            moved(&report.expect("no panic").expect("a report"));
        }
    }
    for name in &names {
        let count = lines(cluster, "a", name).await;
        wait_lines(cluster, "b", name, count).await;
    }
}
