//! `keel logs --since`: output since a time, from whichever node wrote it.

use keel_api::{LogOffset, MachineInfo};
use keel_machine::log::split_records;
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_millis() as u64
}

/// Numbers of the lines in a text; each line begins with its number.
fn numbers(text: &str) -> Vec<u64> {
    let first = |line: &str| line.split_whitespace().next()?.parse().ok();
    text.lines().filter_map(first).collect()
}

async fn lines_since(cluster: &LocalCluster, node: &str, since: u64) -> Vec<u64> {
    let client = cluster.client(node);
    let path = format!("/v1/machines/m/logs/offset?since={since}");
    let from: LogOffset = client.get(&path).await.unwrap();
    let path = format!("/v1/machines/m/logs?from={}", from.offset);
    let mut stream = client.get_stream(&path).await.unwrap();
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.chunk().await.unwrap() {
        bytes.extend_from_slice(&chunk);
    }
    let text = split_records(&mut bytes)
        .into_iter()
        .flat_map(|(_, text)| text)
        .collect();
    numbers(&String::from_utf8(text).unwrap())
}

/// Waits until a machine's newest line is beyond a number; returns the newest.
async fn beyond(cluster: &LocalCluster, node: &str, number: u64) -> u64 {
    wait_for(&format!("line {number} was written"), || async {
        let text = cluster.output(node, "m").await.ok()?;
        let last = *numbers(&text).last()?;
        (last > number).then_some(last)
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_is_told_since_a_time_also_after_moves() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"]).await;
    let cluster = cluster.unwrap();
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = std::fs::read(guest).unwrap();
    let args = ["1000000", "20"];
    let counter = Guest::new("m", "a", &module, &args);
    cluster.run(&counter).await.unwrap();
    let early = beyond(&cluster, "a", 5).await;
    // Times are exact to a tenth of a second, so lines of that interval may be included.
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let middle = now_ms();
    let there = beyond(&cluster, "a", early).await;
    let report = cluster.move_machine("a", "m", "b").await.unwrap();
    assert_eq!(report.ending, Ending::Moved);
    let late = beyond(&cluster, "b", there).await;
    for node in ["a", "b"] {
        let all = lines_since(&cluster, node, 0).await;
        assert_eq!(all[0], 0);
        let some = lines_since(&cluster, node, middle).await;
        let (first, last) = (some[0], *some.last().unwrap());
        assert!(
            first > early && first <= there + 1,
            "{early} {first} {there}"
        );
        assert!(last >= late, "{last} {late}");
        // None is missing or repeated.
        assert_eq!(some, (first..=last).collect::<Vec<_>>());
    }
    // The same by the command line, after its end.
    let client = cluster.client("a");
    let _: serde_json::Value = client.post("/v1/machines/m/stop", &()).await.unwrap();
    let info: MachineInfo = client.get("/v1/machines/m").await.unwrap();
    assert_eq!(info.status, "stopped");
    let none = lines_since(&cluster, "a", now_ms() + 3_600_000).await;
    assert_eq!(none, Vec::<u64>::new());
    let logs = |since: &str| {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(folder.path().join("a"))
            .args(["logs", "m", "--since", since])
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (text(output.stdout), text(output.stderr))
    };
    assert_eq!(numbers(&logs("1h").0)[0], 0);
    assert_eq!(numbers(&logs("1970-01-01").0)[0], 0);
    let error = logs("tomorrow").1;
    assert!(error.contains("neither a duration"), "{error}");
}

fn keel_logs(cluster: &LocalCluster, node: &str, machine: &str) -> (bool, String, String) {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(cluster.folder(node))
        .args(["logs", machine])
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (said, error) = (text(output.stdout), text(output.stderr));
    (output.status.success(), said, error)
}

/// Complete output is available also at the moment in which its machine ends or leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_never_becomes_less() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"]).await;
    let cluster = &cluster.unwrap();
    // With free processors no request comes between a worker's last output and its end.
    let over = Arc::new(AtomicBool::new(false));
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    for _ in 0..cores {
        let over = over.clone();
        std::thread::spawn(move || while !over.load(Ordering::Relaxed) {});
    }
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = std::fs::read(guest).unwrap();
    for round in 0..9 {
        let name = format!("m-{round}");
        let node = ["a", "b"][round % 2];
        let counter = Guest::new(&name, node, &module, &["300", "1"]);
        cluster.run(&counter).await.unwrap();
        let moves = tokio::spawn({
            let (client, name) = (cluster.client("a"), name.clone());
            async move {
                // It may have ended before.
                if round % 3 == 2 {
                    let to = ["b", "a"][round % 2];
                    let _ = keel_testkit::move_by(&client, &name, to).await;
                }
            }
        });
        // Until its process has been gone for a while.
        let read = || async {
            let mut lines = 0;
            let begun = Instant::now();
            let mut whole = None;
            while whole.is_none_or(|at: Instant| at.elapsed() < Duration::from_millis(700)) {
                let text = cluster.output("a", &name).await;
                let text = text.unwrap_or_else(|error| panic!("{name}: {error}"));
                let found = numbers(&text).len();
                assert!(found >= lines, "{name}: {found} lines after {lines}");
                lines = found;
                if lines == 300 {
                    whole.get_or_insert_with(Instant::now);
                }
                assert!(begun.elapsed().as_secs() < 60, "{name}: {lines}");
            }
        };
        tokio::join!(read(), read(), read(), read(), read(), read());
        moves.await.unwrap();
    }
    over.store(true, Ordering::Relaxed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_no_empty_output() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"]).await;
    let mut cluster = cluster.unwrap();
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = std::fs::read(guest).unwrap();
    let counter = Guest::new("m", "b", &module, &["5", "1"]);
    cluster.run(&counter).await.unwrap();
    cluster.wait_end("a", "m").await.unwrap();
    let (done, text, error) = keel_logs(&cluster, "a", "m");
    assert!(done && numbers(&text) == [0, 1, 2, 3, 4], "{text}{error}");
    cluster.power_off("b");
    let (done, text, error) = keel_logs(&cluster, "a", "m");
    assert!(!done && text.is_empty(), "{text}");
    assert!(
        error.contains("the output of \"m\" is incomplete") && error.contains("node b"),
        "{error}"
    );
    // A follower gets the same error, and does not wait for ever.
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(cluster.folder("a"))
        .args(["logs", "-f", "m"])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{error}");
    assert!(error.contains("ended early after 0 bytes"), "{error}");
}
