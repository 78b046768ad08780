//! A machine prints more during a move than is kept of its output.

use keel_machine::log::SEGMENT_BYTES_MAX;
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_floods_its_output_moves() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"])
        .await
        .expect("a cluster");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/hostile.wasm");
    let module = std::fs::read(path).expect("a prebuilt guest");
    cluster
        .run(&Guest::new("flood", "a", &module, &["flood"]))
        .await
        .expect("it starts");
    // The move waits between its hello, which names the oldest output, and its first round until
    // that output is deleted, at 16 MiB a second.
    let order = "delay(8000)";
    cluster
        .failpoint("a", "source.hello", Some(order))
        .await
        .expect("an order");
    let written = || async {
        let info = cluster.inspect("a", "flood").await.ok()?;
        info.output_bytes
    };
    let before = wait_for("output", || async {
        written().await.filter(|bytes| *bytes > 0)
    });
    let before = before.await.expect("it prints");
    let report = cluster
        .move_machine("a", "flood", "b")
        .await
        .expect("a report");
    assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    let after = wait_for("it prints on", || async {
        let after = written().await?;
        (after > before + 3 * SEGMENT_BYTES_MAX).then_some(after)
    });
    after.await.expect("more was printed than is kept");
}
