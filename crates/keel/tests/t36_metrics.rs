//! What those see who watch a node: `/metrics` for Prometheus, `/healthz`, `/readyz`.

use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// The value of a metric with these labels, as they are printed.
fn value(text: &str, metric: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(metric))?;
    line.trim().parse().ok()
}

async fn cluster(names: &[&str]) -> (LocalCluster, tempfile::TempDir) {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), names).await;
    (cluster.expect("a cluster"), folder)
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_follow_what_happens_and_the_conventions() {
    let (cluster, _folder) = cluster(&["a", "b"]).await;
    let module = guest("counter");
    let machine = Guest::new("m", "a", &module, &["1000000", "2"]);
    cluster.run(&machine).await.expect("it starts");
    let text = cluster.get_by_socket("a", "/metrics").expect("an answer").1;
    let of = |metric: &str| {
        value(&text, metric).unwrap_or_else(|| panic!("{metric} is missing in:\n{text}"))
    };
    assert_eq!(of("keel_machines_running"), 1.0);
    assert_eq!(of("keel_machine_threads{machine=\"m\"}"), 1.0);
    assert!(of("keel_machine_memory_bytes{machine=\"m\"}") >= 65536.0);
    assert_eq!(of("keel_node_has_lease"), 1.0);
    assert!(of("keel_lease_remaining_seconds") > 0.0);
    assert!(of("keel_lease_renewal_seconds_count") >= 1.0);
    assert_eq!(of("keel_events_total{kind=\"machine-scheduled\"}"), 1.0);
    assert_eq!(
        (of("keel_store_leader"), of("keel_store_voters")),
        (1.0, 1.0)
    );
    assert_eq!(of("keel_cluster_nodes"), 2.0);
    assert_eq!(of("keel_move_downtime_seconds_count"), 0.0);

    cluster.move_machine("a", "m", "b").await.expect("it moves");
    let (at_a, at_b) = (
        cluster.get_by_socket("a", "/metrics").expect("an answer").1,
        cluster.get_by_socket("b", "/metrics").expect("an answer").1,
    );
    assert_eq!(value(&at_a, "keel_machines_running"), Some(0.0));
    assert_eq!(value(&at_a, "keel_move_downtime_seconds_count"), Some(1.0));
    assert_eq!(value(&at_b, "keel_machines_running"), Some(1.0));
    assert_eq!(value(&at_b, "keel_store_voter"), Some(0.0));
    let sent = value(&at_a, "keel_sent_bytes_total{peer=\"b\"}");
    assert!(sent.is_some_and(|bytes| bytes > 0.0), "{at_a}");

    // What Prometheus itself says of the names.
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("skipped: promtool is not installed (apt-get install prometheus)");
        return;
    };
    let mut input = promtool.stdin.take().expect("its input");
    input.write_all(at_a.as_bytes()).expect("it reads");
    drop(input);
    let output = promtool.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

/// A node whose store is gone lives, and is not ready.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_the_store_lives_and_is_not_ready() {
    let (cluster, _folder) = cluster(&["a", "b"]).await;
    for node in ["a", "b"] {
        assert_eq!(
            cluster.get_by_socket(node, "/healthz").expect("an answer"),
            (200, "ok\n".into())
        );
        assert_eq!(
            cluster.get_by_socket(node, "/readyz").expect("an answer"),
            (200, "ready\n".into())
        );
    }
    cluster.stop_agent("a", true).expect("it stops");
    wait_for("b is not ready", || async {
        let (status, said) = cluster.get_by_socket("b", "/readyz").expect("an answer");
        (status == 503 && said.contains("lease")).then_some(())
    })
    .await
    .expect("it says so");
    assert_eq!(
        cluster.get_by_socket("b", "/healthz").expect("an answer").0,
        200
    );
    let text = cluster.get_by_socket("b", "/metrics").expect("an answer").1;
    assert_eq!(value(&text, "keel_node_has_lease"), Some(0.0));
    cluster.stop_agent("a", false).expect("it goes on");
    wait_for("b is ready", || async {
        (cluster.get_by_socket("b", "/readyz").expect("an answer").0 == 200).then_some(())
    })
    .await
    .expect("it is");
}
