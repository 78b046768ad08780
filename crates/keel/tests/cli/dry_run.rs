//! Predictions of moves, before and after, in a cluster of real processes.

use keel_api::{DryRun, MoveRequest, Urgency};
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, guest, move_as, wait_for};
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// A prediction changes nothing; it uses earlier moves; impossible moves are reported.
#[tokio::test(flavor = "multi_thread")]
async fn moves_are_foretold_and_compared() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"]).await;
    let cluster = cluster.expect("a cluster");
    let module = guest("writer");
    cluster
        .run(&Guest::new("writer", "a", &module, &["64", "50"]))
        .await
        .expect("it starts");
    let client = cluster.client("b");
    let request = |to: &str| MoveRequest {
        to: to.into(),
        post_copy: false,
        checkpoint_to: None,
        urgency: Urgency::Normal,
        downtime_ms: None,
    };
    wait_for("its memory is there", || async {
        let output = cluster.output("a", "writer").await.ok()?;
        (output.lines().count() > 3).then_some(())
    })
    .await
    .expect("lines");
    let before = cluster.inspect("a", "writer").await.expect("info");
    let foretold: DryRun = client
        .post("/v1/machines/writer/dry-run", &request("b"))
        .await
        .expect("a prediction");
    assert_eq!(foretold.refusal, None);
    assert!(foretold.memory_bytes >= 64 << 20, "{foretold:?}");
    // It writes 50 MB/s: the measured rate is positive and plausible.
    let written = foretold.pre_copy.written_bytes_per_s;
    assert!((5 << 20..2 << 30).contains(&written), "{written}");
    assert!(foretold.pre_copy.bytes.likely >= 64 << 20);
    assert_eq!(foretold.pre_copy.learned_from, 0);
    assert_eq!(foretold.post_copy.rounds, 1);
    let after = cluster.inspect("a", "writer").await.expect("info");
    assert_eq!((after.epoch, after.node), (before.epoch, before.node));
    for (number, to) in ["b", "a", "b", "a"].into_iter().enumerate() {
        let report = move_as(&client, "writer", &request(to)).await;
        let report = report.expect("a report");
        assert_eq!(report.ending, Ending::Moved);
        let predicted = report.predicted.as_ref().expect("it was foretold");
        assert!(predicted.total_micros.low <= predicted.total_micros.high);
        assert_eq!(predicted.learned_from as usize, number / 2);
        assert!(report.line().contains("predicted"), "{}", report.line());
        // The next prediction is possible at once.
        let back = if to == "a" { "b" } else { "a" };
        let next: DryRun = client
            .post("/v1/machines/writer/dry-run", &request(back))
            .await
            .expect("a prediction right after a move");
        assert_eq!(next.refusal, None, "{number}");
    }
    let learned: DryRun = client
        .post("/v1/machines/writer/dry-run", &request("b"))
        .await
        .expect("a prediction");
    assert_eq!(learned.pre_copy.learned_from, 2);
    // Checkpoints share the dirty trackers: no written page is missed.
    let kept = folder.path().join("kept").display().to_string();
    let keel = |args: &[&str]| {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(folder.path().join("a"))
            .args(args)
            .output()
            .expect("keel runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout) + &text(&output.stderr),
        )
    };
    for round in 0..3 {
        let (code, text) = keel(&["checkpoint", "writer", "--to", &kept]);
        assert_eq!(code, Some(0), "{round}: {text}");
        let (code, text) = keel(&["move", "writer", "--to", "b", "--dry-run"]);
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("b would accept it from a"), "{text}");
        assert!(text.contains("measured by 2 earlier"), "{text}");
    }
    assert_eq!(keel(&["kill", "writer"]).0, Some(0));
    let (code, text) = keel(&["move", "writer", "--to", "b", "--dry-run"]);
    assert!(
        code == Some(1) && text.contains("only a running one"),
        "{text}"
    );
    let (code, text) = keel(&["restore", "writer", "--from", &kept, "--as", "again"]);
    assert_eq!(code, Some(0), "{text}");
    // The writer checks all of its memory, and would trap.
    wait_for("it continues", || async {
        let output = cluster.output("a", "again").await.ok()?;
        (output.lines().count() > 5).then_some(())
    })
    .await
    .expect("lines");
    let (code, text) = keel(&["move", "again", "--to", "nowhere", "--dry-run"]);
    assert!(code == Some(1) && text.contains("no node"), "{text}");
    let (code, text) = keel(&["move", "again", "--to", "a", "--dry-run"]);
    assert!(
        code == Some(1) && text.contains("is on a already"),
        "{text}"
    );
}
