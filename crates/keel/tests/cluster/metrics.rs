//! What those see who watch a node: `/metrics` for Prometheus, `/healthz`, `/readyz`.

use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
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

/// Whoever asks for all output of a machine and then hardly reads costs its node some MiB, however
/// much is printed meanwhile, and others nothing.
#[tokio::test(flavor = "multi_thread")]
async fn followers_that_hardly_read_cost_little() {
    const FOLLOWERS: usize = 20;
    const READ_BYTES: usize = 96 << 20;
    const GROWN_MAX: f64 = (FOLLOWERS * (6 << 20)) as f64;
    let (cluster, folder) = cluster(&["a"]).await;
    let module = guest("hostile");
    let machine = Guest::new("m", "a", &module, &["flood"]);
    cluster.run(&machine).await.expect("it starts");
    let follow = "/v1/machines/m/logs?follow=true";
    let mut slow: Vec<UnixStream> = (0..FOLLOWERS)
        .map(|_| {
            let socket = folder.path().join("a").join("api.socket");
            let mut slow = UnixStream::connect(socket).expect("a node");
            let request = format!("GET {follow} HTTP/1.1\r\nhost: keel\r\n\r\n");
            slow.write_all(request.as_bytes()).expect("it listens");
            let mut first = [0];
            slow.read_exact(&mut first).expect("an answer");
            slow
        })
        .collect();
    let resident = || {
        let text = cluster.get_by_socket("a", "/metrics").expect("an answer").1;
        value(&text, "keel_agent_resident_memory_bytes").expect("a figure")
    };
    let before = resident();
    let mut quick = cluster
        .client("a")
        .get_stream(follow)
        .await
        .expect("output");
    let mut read = 0;
    while read < READ_BYTES {
        let some = quick.chunk().await.expect("it goes on");
        read += some.expect("it does not end").len();
    }
    let after = resident();
    assert!(after - before < GROWN_MAX, "{before} and {after}");
    // They get what follows, whenever they read on.
    for slow in &mut slow {
        slow.read_exact(&mut vec![0; 64 << 10]).expect("more of it");
    }
}
