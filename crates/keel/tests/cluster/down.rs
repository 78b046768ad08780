//! `keel down`: the node stops; its machines continue, or are stopped first.

use keel_testkit::{Guest, LocalCluster, check_numbered, wait_for};
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

#[tokio::test(flavor = "multi_thread")]
async fn a_node_goes_down_and_its_machines_run_on() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let counter = std::fs::read(path).expect("a prebuilt guest");
    let mut cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"])
        .await
        .expect("a cluster");
    let state = cluster.folder("a");
    let keel = |args: &[&str]| {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(&state)
            .args(args)
            .output()
            .expect("keel runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let endless = Guest::new("lines", "a", &counter, &["1000000", "2"]);
    let before = cluster.run(&endless).await.expect("it starts").pid;

    let (code, out, err) = keel(&["down"]);
    assert_eq!(code, Some(0), "{out}{err}");
    let said: Vec<&str> = out.lines().collect();
    assert_eq!(
        said,
        [
            "stopping a",
            "machines continue to run, and the next `keel up` finds them: lines",
            "it keeps the store: until it is up again, no node can run, move or stop machines",
            "a is down (`keel up` starts it again)",
        ]
    );
    // It waited: all processes are gone except the machine's.
    assert_eq!(cluster.workers_of("a", "lines"), 1);
    assert!(cluster.kill_agent("a").is_err(), "its agent has ended");
    let (code, out, err) = keel(&["down"]);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("no node runs in"), "{err}");

    cluster.power_on("a").await.expect("it is up again");
    let found = wait_for("its machine is found", || async {
        let info = cluster.inspect("a", "lines").await.ok()?;
        (info.status == "running" && info.pid.is_some()).then_some(info)
    });
    assert_eq!(
        found.await.expect("it runs").pid,
        before,
        "the same process"
    );
    let output = cluster.output("a", "lines").await.expect("its output");
    check_numbered(&output, 0).expect("no line is missing");

    let (code, out, err) = keel(&["-o", "json", "down", "--machines"]);
    assert_eq!(code, Some(0), "{out}{err}");
    let lines: Vec<serde_json::Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 2, "{out}");
    assert_eq!(
        (&lines[0]["state"], &lines[1]["state"]),
        (&"stopping".into(), &"down".into())
    );
    assert_eq!(lines[0]["node"], "a");
    assert_eq!(lines[0]["machines_stopped"], serde_json::json!(["lines"]));
    assert_eq!(lines[0]["machines_running_on"], serde_json::json!([]));
    assert_eq!(cluster.workers_of("a", "lines"), 0, "it was stopped first");
    cluster.power_on("a").await.expect("it is up again");
    let info = cluster.inspect("a", "lines").await.expect("its record");
    assert_eq!(info.status, "stopped");
}
