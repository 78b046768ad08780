//! Machines with volumes of their own, in clusters of real processes.

use keel_api::{MachineInfo, MoveRequest, Urgency};
use keel_machine::moves::Ending;
use keel_machine::restart_policy::Restart;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, move_as, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

struct Bench {
    cluster: LocalCluster,
    folder: PathBuf,
}

async fn cluster(folder: &Path, names: &[&str]) -> Bench {
    let cluster = LocalCluster::start(Path::new(KEEL), folder, names).await;
    Bench {
        cluster: cluster.expect("a cluster"),
        folder: folder.to_owned(),
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

impl Bench {
    /// The output of a command that must succeed.
    fn keel(&self, node: &str, args: &[&str]) -> String {
        let (done, out, err) = self.try_keel(node, args);
        assert!(done, "{args:?}: {err}");
        out
    }

    fn try_keel(&self, node: &str, args: &[&str]) -> (bool, String, String) {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(self.folder.join(node))
            .args(args)
            .output()
            .expect("keel runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    async fn run_disk(&self, name: &str, node: &str, mib: &str) {
        let module = guest("disk");
        let args = ["/tmp", mib, "0", "1"];
        let disk = Guest {
            tmp_bytes: Some(64 << 20),
            ..Guest::new(name, node, &module, &args)
        };
        self.cluster.run(&disk).await.expect("it starts");
    }

    /// Its lines, checked: none is missing or repeated.
    async fn lines(&self, machine: &str, first: u64) -> u64 {
        let node = self.inspect(machine).await.node;
        let output = self.cluster.output(&node, machine).await.expect("output");
        check_numbered(&output, first).expect("every line once and in order")
    }

    async fn goes_on(&self, machine: &str, first: u64) {
        let before = self.lines(machine, first).await;
        wait_for(&format!("{machine} continues"), || async {
            (self.lines(machine, first).await > before + 3).then_some(())
        })
        .await
        .expect("it continues");
    }

    /// Waits until a machine is paused, and takes all room meanwhile.
    async fn paused(&self, machine: &str, ballast: &Path) -> MachineInfo {
        wait_for(&format!("{machine} is paused"), || async {
            fill(ballast);
            let info = self.inspect(machine).await;
            assert!(info.exit_code.is_none(), "{info:?}");
            (info.status == "paused").then_some(info)
        })
        .await
        .expect("it waits")
    }

    /// Waits until the store reports that a machine runs.
    async fn runs(&self, machine: &str) {
        wait_for(&format!("{machine} runs"), || async {
            let info = self.inspect(machine).await;
            assert!(info.is_live(), "{info:?}");
            (info.status == "running" && info.message.is_none()).then_some(())
        })
        .await
        .expect("it runs");
    }

    async fn inspect(&self, machine: &str) -> MachineInfo {
        let asked = self.cluster.inspect("s", machine).await;
        asked.expect("info")
    }

    async fn moves(&self, machine: &str, to: &str) {
        let report = self.cluster.move_machine("s", machine, to).await;
        let report = report.expect("a report");
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    }
}

/// The guest compares its file with its memory, and ends if a page differs.
#[tokio::test(flavor = "multi_thread")]
async fn volumes_move_along_and_are_kept() {
    let folder = folder();
    let bench = cluster(folder.path(), &["s", "b"]).await;
    bench.run_disk("disk", "s", "16").await;
    bench.goes_on("disk", 1).await;
    for to in ["b", "s", "b", "s", "b"] {
        bench.moves("disk", to).await;
        bench.goes_on("disk", 1).await;
        // The node that it left keeps no state of it.
        let left = if to == "b" { "s" } else { "b" };
        let folder = bench.cluster.folder(left).join("workers/disk");
        wait_for("the source forgets", || async {
            (!folder.exists()).then_some(())
        })
        .await
        .expect("it forgets");
    }
    let info = bench.inspect("disk").await;
    let volume = &info.volumes[0];
    assert_eq!(
        (volume.guest.as_str(), volume.kind.as_str()),
        ("/tmp", "tmp")
    );
    assert_eq!(volume.bytes_max, Some(64 << 20));
    // Truncated data becomes zeros, which do not count.
    assert!(volume.bytes >= Some(15 << 20), "{volume:?}");
    // It was sent, and not all of it during the downtime.
    let report = info.moves.last().expect("a move");
    assert!(
        report.bytes > 16 << 20 && report.last_bytes < 16 << 20,
        "{report:?}"
    );

    let place = bench.folder.join("kept");
    let place = place.to_str().expect("a path");
    // Post-copy delays memory only; files are complete before.
    for to in ["s", "b"] {
        let request = MoveRequest {
            to: to.to_owned(),
            post_copy: true,
            checkpoint_to: Some(place.to_owned()),
            urgency: Urgency::Normal,
            downtime_ms: None,
        };
        let report = move_as(&bench.cluster.client("s"), "disk", &request).await;
        let report = report.expect("a report");
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        bench.goes_on("disk", 1).await;
    }
    for _ in 0..2 {
        bench.keel("b", &["checkpoint", "disk", "--to", place]);
        bench.goes_on("disk", 1).await;
    }
    bench.keel("s", &["stop", "disk"]);
    // The volume ends with the machine; the output stays.
    let folder = bench.cluster.folder("b").join("workers/disk");
    assert!(folder.exists() && !folder.join("volumes").exists());
    bench.keel("s", &["rm", "disk"]);
    bench.keel("s", &["restore", "disk", "--from", place, "--on", "s"]);
    bench.keel(
        "s",
        &[
            "restore", "disk", "--from", place, "--as", "copy", "--on", "b",
        ],
    );
    for machine in ["disk", "copy"] {
        wait_for("it continues", || async {
            let node = bench.inspect(machine).await.node;
            let output = bench.cluster.output(&node, machine).await.ok()?;
            let first: u64 = output.lines().next()?.parse().ok()?;
            let next = check_numbered(&output, first).expect("every line once and in order");
            (next > first + 10).then_some(())
        })
        .await
        .expect("it continues");
        bench.runs(machine).await;
    }
    bench.moves("copy", "s").await;
    bench.runs("copy").await;
    assert_eq!(bench.inspect("copy").await.node, "s");
}

/// The guest creates its file, which must not exist.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_begins_anew_has_empty_volumes() {
    let folder = folder();
    let bench = cluster(folder.path(), &["s"]).await;
    let module = guest("disk");
    let disk = Guest {
        tmp_bytes: Some(64 << 20),
        restart: Restart::Always,
        ..Guest::new("disk", "s", &module, &["/tmp", "4", "0", "1"])
    };
    bench.cluster.run(&disk).await.expect("it starts");
    bench.goes_on("disk", 1).await;
    bench.cluster.kill_worker("s", "disk").expect("a worker");
    wait_for("it begins anew", || async {
        let output = bench.cluster.output("s", "disk").await.ok()?;
        let (_, anew) = output.rsplit_once("\n1\n")?;
        (anew.lines().count() > 10).then_some(())
    })
    .await
    .expect("it begins anew");
    bench.runs("disk").await;
}

/// Node `a` has a small disk. The test runs itself in a mount namespace, in which it can mount
/// one.
#[test]
fn a_full_disk_pauses_a_machine() {
    const VARIABLE: &str = "KEEL_TEST_SMALL_DISK";
    if let Some(folder) = std::env::var_os(VARIABLE) {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(full_disk(Path::new(&folder)));
        return;
    }
    let folder = folder();
    let script = format!(
        "mkdir \"${VARIABLE}/a\" && mount -t tmpfs -o size=400m none \"${VARIABLE}/a\" \
         && exec \"$0\" --exact a_full_disk_pauses_a_machine --nocapture"
    );
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
        .arg(std::env::current_exe().expect("this program"))
        .env(VARIABLE, folder.path())
        .status();
    let status = status.expect("unshare is installed");
    assert!(
        status.success(),
        "see above (a namespace of its own is needed)"
    );
}

async fn full_disk(folder: &Path) {
    let bench = cluster(folder, &["s", "a"]).await;
    bench.run_disk("disk", "a", "16").await;
    bench.run_disk("other", "a", "4").await;
    bench.goes_on("disk", 1).await;
    // All remaining space is taken, so that the machine's new writes, or its output, have no room.
    let ballast = folder.join("a/ballast");
    let info = bench.paused("disk", &ballast).await;
    let message = info.message.expect("a message");
    assert!(
        message.contains("the disk of a is full") && message.contains("keel move disk"),
        "{message}"
    );
    let at = bench.lines("disk", 1).await;
    // After a move it continues: the waiting data is written there.
    bench.moves("disk", "s").await;
    bench.goes_on("disk", 1).await;
    assert!(bench.lines("disk", 1).await > at);
    bench.runs("disk").await;
    // It does not fit back, which is reported.
    bench.paused("other", &ballast).await;
    let back = bench.cluster.move_machine("s", "disk", "a").await;
    let back = back.expect("a report");
    match back.ending {
        Ending::Stayed { reason } => assert!(reason.contains("GiB are free"), "{reason}"),
        Ending::Moved => panic!("there was no room"),
    }
    // With room it continues by itself.
    std::fs::remove_file(&ballast).expect("room");
    bench.goes_on("other", 1).await;
    bench.runs("other").await;
    bench.goes_on("disk", 1).await;
}

/// Appends to a file until there is no room.
fn fill(path: &Path) {
    use std::io::Write;
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path);
    let mut file = file.expect("a file");
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}
