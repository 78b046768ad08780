//! Volumes that outlive their machines, in clusters of real processes. The guest (`ledger`) prints
//! a round's number once all of it is synced. After a restart it checks all data and prints the
//! last round.
//! checks all that it finds and says which round was the last.

use keel_api::{ClusterVolumeInfo, MachineInfo, MoveRequest, Urgency};
use keel_machine::cluster_volume::{Segment, VolumeStore, Writer, WriterEpoch};
use keel_machine::moves::Ending;
use keel_testkit::{LocalCluster, move_as, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

struct Bench {
    cluster: LocalCluster,
    folder: PathBuf,
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

/// The guest's output: consecutive numbers, except at restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Story {
    /// The last printed round.
    last: u64,
    /// Number of starts.
    begun: u32,
}

/// Checks a guest's output: no round is missing or repeated, and each start found at least the
/// rounds printed before.
fn story(text: &str) -> Story {
    let mut story = Story { last: 0, begun: 0 };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    for line in whole.lines() {
        if let Some(found) = line.strip_prefix("found ") {
            let found: u64 = found.parse().expect("a number");
            // A round may be synced before its number is printed.
            let fits = (story.last..=story.last + 1).contains(&found);
            assert!(story.begun == 0 || fits, "{line:?} after {story:?}");
            story = Story {
                last: found,
                begun: story.begun + 1,
            };
        } else {
            let number: u64 = line
                .parse()
                .unwrap_or_else(|_| panic!("{line:?} after {story:?}"));
            assert_eq!(number, story.last + 1, "after {story:?}");
            story.last = number;
        }
    }
    story
}

impl Bench {
    async fn start(folder: &Path) -> Self {
        Self::start_with(folder, &["s", "b"]).await
    }

    async fn start_with(folder: &Path, names: &[&str]) -> Self {
        let cluster = LocalCluster::start(Path::new(KEEL), folder, names).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder: folder.to_owned(),
        }
    }

    fn place(&self) -> String {
        self.folder.join("place").display().to_string()
    }

    /// The output of a command that must succeed.
    fn keel(&self, args: &[&str]) -> String {
        let (done, out, err) = self.try_keel(args);
        assert!(done, "{args:?}: {err}");
        out
    }

    /// The error of a command that must fail.
    fn fails(&self, args: &[&str]) -> String {
        let (done, out, err) = self.try_keel(args);
        assert!(!done, "{args:?}: {out}");
        err
    }

    fn try_keel(&self, args: &[&str]) -> (bool, String, String) {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(self.folder.join("s"))
            .args(args)
            .output()
            .expect("keel runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    fn create(&self, name: &str) {
        let place = self.place();
        self.keel(&["volume", "create", name, "--at", &place, "--size", "64M"]);
    }

    fn volume(&self, name: &str) -> ClusterVolumeInfo {
        let text = self.keel(&["-o", "json", "volume", "inspect", name]);
        serde_json::from_str(&text).expect("JSON")
    }

    fn run_args(machine: &str, node: &str, more: &[&str]) -> Vec<String> {
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/ledger.wasm");
        let mut args = vec!["run", "--detach", "--name", machine, "--on", node];
        args.extend(["--volume", "cluster:data:/data"]);
        args.extend(more);
        let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        args.push(guest.display().to_string());
        args.extend(["/data", "4", "0", "1"].map(str::to_owned));
        args
    }

    fn run(&self, machine: &str, node: &str, more: &[&str]) {
        let args = Self::run_args(machine, node, more);
        self.keel(&args.iter().map(String::as_str).collect::<Vec<_>>());
    }

    async fn inspect(&self, machine: &str) -> MachineInfo {
        let asked = self.cluster.inspect("s", machine).await;
        asked.expect("info")
    }

    async fn story(&self, machine: &str) -> Story {
        let node = self.inspect(machine).await.node;
        story(
            &self
                .cluster
                .output(&node, machine)
                .await
                .unwrap_or_default(),
        )
    }

    /// Waits until it has started this often, and continued for some rounds.
    async fn goes_on(&self, machine: &str, begun: u32) -> Story {
        let story = || async {
            let now = self.story(machine).await;
            if now.begun < begun {
                let info = self.inspect(machine).await;
                assert!(info.is_live(), "{info:?}");
                return None;
            }
            Some(now)
        };
        let first = wait_for(&format!("{machine} begins"), story).await;
        let first = first.expect("it begins").last;
        wait_for(&format!("{machine} continues"), || async {
            story().await.filter(|now| now.last > first + 3)
        })
        .await
        .expect("it continues")
    }

    async fn status(&self, machine: &str, status: &str) -> MachineInfo {
        wait_for(&format!("{machine} is {status}"), || async {
            let info = self.inspect(machine).await;
            (info.status == status).then_some(info)
        })
        .await
        .expect(status)
    }

    async fn moves(&self, machine: &str, to: &str, post_copy: bool) {
        let request = MoveRequest {
            to: to.to_owned(),
            post_copy,
            checkpoint_to: post_copy.then(|| self.folder.join("kept").display().to_string()),
            urgency: Urgency::Normal,
            downtime_ms: None,
        };
        let report = move_as(&self.cluster.client("s"), machine, &request).await;
        let report = report.expect("a report");
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
    }
}

/// The last segment of a volume's log.
fn newest_segment(log: &Path) -> Segment {
    let names = std::fs::read_dir(log).expect("a log");
    let names = names.map(|entry| entry.expect("an entry").path());
    // Temporary files of the store have a `#` in their names.
    let names = names.filter(|path| !path.to_string_lossy().contains('#'));
    let newest = names.max().expect("a segment");
    Segment::decode(&std::fs::read(newest).expect("bytes")).expect("a segment")
}

/// The folder of the objects of the volume `data`.
fn objects_of_data(place: &Path) -> PathBuf {
    let folders = std::fs::read_dir(place).expect("a place");
    let mut folders = folders.map(|entry| entry.expect("an entry").path());
    let is_data = |path: &PathBuf| path.to_string_lossy().contains("/data-");
    folders.find(is_data).expect("a volume")
}

fn files_below(folder: &Path) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path().is_dir() {
            true => count += files_below(&entry.path()),
            false => count += 1,
        }
    }
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_outlive_machines_and_move_with_them() {
    let folder = folder();
    let bench = Bench::start(folder.path()).await;
    let run = |machine: &str| Bench::run_args(machine, "s", &[]);
    let run_fails = |machine: &str| {
        let args = run(machine);
        bench.fails(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert!(run_fails("early").contains("there is no volume \"data\""));
    let error = bench.fails(&["volume", "create", "data", "--at", "ftp://x"]);
    assert!(
        error.contains("not a location for checkpoints or volumes"),
        "{error}"
    );
    let place = bench.place();
    let error = bench.fails(&["volume", "create", "data", "--at", &place, "--size", "100G"]);
    assert!(error.contains("64 GiB"), "{error}");
    bench.create("data");
    let error = bench.fails(&["volume", "create", "data", "--at", &place]);
    assert!(error.contains("in use by another volume"), "{error}");
    assert_eq!(bench.volume("data").machine, None);

    bench.run("first", "s", &[]);
    bench.goes_on("first", 1).await;
    let error = run_fails("second");
    assert!(error.contains("in use by machine \"first\""), "{error}");
    let error = bench.fails(&["volume", "rm", "data"]);
    assert!(error.contains("in use by machine \"first\""), "{error}");
    for (to, post_copy) in [
        ("b", false),
        ("s", false),
        ("b", true),
        ("s", true),
        ("b", false),
    ] {
        bench.moves("first", to, post_copy).await;
        bench.goes_on("first", 1).await;
    }
    let info = bench.inspect("first").await;
    assert_eq!(info.volumes[0].kind, "cluster:data");
    assert_eq!(info.volumes[0].bytes_max, Some(64 << 20));
    // Not all content of the volume was sent.
    let report = info.moves.last().expect("a move");
    assert!(report.last_bytes < 4 << 20, "{report:?}");
    bench.keel(&["stop", "first"]);
    let last = bench.story("first").await.last;
    // An ended machine still holds it.
    let error = run_fails("second");
    assert!(error.contains("in use by machine \"first\""), "{error}");
    bench.keel(&["rm", "first"]);
    let volume = bench.volume("data");
    let content = volume.content.expect("it can be read");
    assert!(
        content.bytes > 1 << 20 && content.inodes == 3,
        "{content:?}"
    );

    bench.run("second", "s", &[]);
    let found = bench.goes_on("second", 1).await;
    assert!(found.last > last, "{found:?}");
    let node = bench.inspect("second").await.node;
    let output = bench.cluster.output(&node, "second").await.expect("output");
    let first: u64 = output
        .strip_prefix("found ")
        .and_then(|rest| rest.lines().next()?.parse().ok())
        .expect("what it found");
    assert!((last..=last + 1).contains(&first), "{first} after {last}");
    bench.keel(&["rm", "--force", "second"]);
    bench.keel(&["volume", "rm", "data"]);
    assert_eq!(files_below(Path::new(&place)), 0);
    assert!(
        bench
            .fails(&["volume", "inspect", "data"])
            .contains("no volume \"data\"")
    );
    // If the place is gone, the name can be freed.
    let gone = folder.path().join("gone");
    let at = gone.display().to_string();
    bench.keel(&["volume", "create", "other", "--at", &at]);
    std::fs::remove_dir_all(&gone).expect("it is removed");
    let error = bench.fails(&["volume", "rm", "other"]);
    assert!(error.contains(&at) && error.contains("--forget"), "{error}");
    bench.keel(&["volume", "rm", "--forget", "other"]);
    assert!(!bench.keel(&["volume", "ls"]).contains("other"));
    // The name is free.
    bench.create("data");
    bench.run("third", "b", &[]);
    assert!(bench.goes_on("third", 1).await.last < first);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_synced_survives_kills() {
    let folder = folder();
    let bench = Bench::start(folder.path()).await;
    bench.create("data");
    bench.run("m", "s", &["--restart", "on-failure"]);
    let mut begun = 1;
    for to in ["b", "s"] {
        bench.goes_on("m", begun).await;
        let node = bench.inspect("m").await.node;
        bench.cluster.kill_worker(&node, "m").expect("a worker");
        begun += 1;
        bench.goes_on("m", begun).await;
        bench.status("m", "running").await;
        bench.moves("m", to, false).await;
        // Just after it resumed there.
        let killed = bench.cluster.kill_worker(to, "m");
        killed.expect("a worker");
        begun += 1;
    }
    bench.goes_on("m", begun).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_take_volumes_along() {
    let folder = folder();
    let bench = Bench::start(folder.path()).await;
    bench.create("data");
    let kept = folder.path().join("kept").display().to_string();
    bench.run("m", "s", &["--restart", "on-failure"]);
    bench.goes_on("m", 1).await;
    let error = bench.fails(&["clone", "m", "--as", "other", "--through", &kept]);
    assert!(error.contains("in use by machine \"m\""), "{error}");
    for _ in 0..3 {
        bench.keel(&["checkpoint", "m", "--to", &kept, "--full", "--keep", "1"]);
        bench.goes_on("m", 1).await;
    }
    // Only the snapshot of the remaining checkpoint is left.
    let content = bench.volume("data").content.expect("it can be read");
    assert_eq!(content.snapshots.len(), 1, "{content:?}");
    assert!(content.snapshots[0].starts_with("m."), "{content:?}");
    bench.keel(&["checkpoint", "m", "--to", &kept, "--full"]);
    bench.keel(&["checkpoint", "prune", "m", "--from", &kept, "--keep", "1"]);
    let pruned = bench.volume("data").content.expect("it can be read");
    assert_eq!(pruned.snapshots.len(), 1, "{pruned:?}");
    assert_ne!(pruned.snapshots, content.snapshots);
    bench.goes_on("m", 1).await;
    // The volume is rolled back together with the machine's memory: otherwise the guest would find
    // pages that differ.
    bench.cluster.kill_worker("s", "m").expect("a worker");
    wait_for("it goes back", || async {
        let output = bench.keel(&["logs", "m"]);
        let (done, _, err) = bench.try_keel(&["logs", "m"]);
        (done && (output + &err).contains("has its content of that checkpoint")).then_some(())
    })
    .await
    .expect("it says so");
    bench.status("m", "running").await;
    let lines = async |node: &str| {
        let output = bench.cluster.output(node, "m").await.unwrap_or_default();
        assert!(!output.contains("differs"), "{output}");
        output.lines().count()
    };
    for to in ["b", "s"] {
        bench.moves("m", to, false).await;
        let before = lines(to).await;
        wait_for("it continues", || async {
            (lines(to).await > before + 5).then_some(())
        })
        .await
        .expect("it continues");
    }
    bench.keel(&["stop", "m"]);
    bench.keel(&["rm", "m"]);
    // Another machine writes to it, then the first is restored.
    bench.run("between", "b", &[]);
    bench.goes_on("between", 1).await;
    let error = bench.fails(&["restore", "m", "--from", &kept]);
    assert!(error.contains("in use by machine \"between\""), "{error}");
    bench.keel(&["rm", "--force", "between"]);
    bench.keel(&["restore", "m", "--from", &kept, "--on", "b"]);
    bench.status("m", "running").await;
    let before = lines("b").await;
    wait_for("it continues", || async {
        (lines("b").await > before + 5).then_some(())
    })
    .await
    .expect("it continues");
    bench.status("m", "running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_vanishes_pauses_machines() {
    let folder = folder();
    let bench = Bench::start(folder.path()).await;
    bench.create("data");
    bench.run("m", "s", &[]);
    let before = bench.goes_on("m", 1).await;
    let (there, away) = (folder.path().join("place"), folder.path().join("away"));
    std::fs::rename(&there, &away).expect("it is taken away");
    let info = bench.status("m", "paused").await;
    let message = info.message.expect("a message");
    assert!(
        message.contains("volume \"data\"") && message.contains("place"),
        "{message}"
    );
    let report = bench
        .cluster
        .move_machine("s", "m", "b")
        .await
        .expect("a report");
    match report.ending {
        Ending::Stayed { reason } => assert!(reason.contains("volume \"data\""), "{reason}"),
        Ending::Moved => panic!("the volume is not there"),
    }
    let error = bench.fails(&["volume", "inspect", "data"]);
    assert!(error.is_empty(), "{error}");
    // Writes in progress create folders again, also while these are removed.
    wait_for("the place is put back", || async {
        let _ = std::fs::remove_dir_all(&there);
        std::fs::rename(&away, &there).ok()
    })
    .await
    .expect("the place");
    let after = bench.goes_on("m", 1).await;
    assert!(after.last > before.last);
    bench.status("m", "running").await;
    bench.moves("m", "b", false).await;
    bench.goes_on("m", 1).await;
}

/// A newer epoch claims the volume: the machine ends with that reason, and writes nothing after
/// the claim.
#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_machine_writes_nothing() {
    let folder = folder();
    let bench = Bench::start(folder.path()).await;
    bench.create("data");
    bench.run("m", "s", &[]);
    bench.goes_on("m", 1).await;
    let log = objects_of_data(&folder.path().join("place")).join("log");
    let newest = || newest_segment(&log);
    let segment = newest();
    let name = "data".parse().expect("a name");
    let store = VolumeStore::open(&name, segment.volume, &bench.place()).expect("a place");
    let epoch = WriterEpoch {
        holding: segment.writer.holding + 1,
        ..segment.writer
    };
    let claimed = Writer::claim(store, epoch, None).await.expect("a claim");
    let info = bench.status("m", "failed").await;
    let message = info.message.expect("a message");
    assert!(
        message.contains("claimed under epoch") && message.contains("\"data\""),
        "{message}"
    );
    let last = newest();
    assert_eq!((last.number, last.writer), (claimed.head(), epoch));
    let found = claimed.state().record().nodes.len();
    assert!(found >= 3, "{found}");
    wait_for("its output is there", || async {
        (bench.story("m").await.begun == 1).then_some(())
    })
    .await
    .expect("output");
}

/// The guest gets an I/O error if a chunk is damaged, and the output names the chunk.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_is_named() {
    let folder = folder();
    let bench = Bench::start(folder.path()).await;
    bench.create("data");
    bench.run("first", "s", &[]);
    bench.goes_on("first", 1).await;
    bench.keel(&["stop", "first"]);
    bench.keel(&["rm", "first"]);
    let mut damaged = 0;
    let chunks = objects_of_data(&folder.path().join("place")).join("chunks");
    let chunks = std::fs::read_dir(chunks).expect("chunks");
    for file in chunks.flat_map(|folder| {
        let files = std::fs::read_dir(folder.expect("a folder").path()).expect("chunks");
        files.map(|file| file.expect("a file").path())
    }) {
        let mut bytes = std::fs::read(&file).expect("bytes");
        bytes[0] ^= 1;
        std::fs::write(&file, bytes).expect("it is damaged");
        damaged += 1;
    }
    assert!(damaged > 2, "{damaged}");
    bench.run("second", "b", &[]);
    let info = bench.status("second", "exited (3)").await;
    assert_eq!(info.exit_code, Some(3));
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(folder.path().join("s"))
        .args(["logs", "second"])
        .output()
        .expect("keel runs");
    let said = String::from_utf8_lossy(&output.stderr);
    let named = said.contains("volume \"data\" cannot be used: object data-");
    assert!(named && said.contains("checksum is wrong"), "{said}");
}

impl Bench {
    async fn order(&self, node: &str, name: &str, order: Option<&str>) {
        let what = format!("{node} takes an order for {name}");
        let ordered = wait_for(&what, || async {
            self.cluster.failpoint(node, name, order).await.ok()
        });
        ordered.await.expect("it takes it");
    }
}

/// A checkpoint that fails after its volumes were snapshotted leaves no snapshots.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_checkpoint_leaves_no_snapshot() {
    let folder = folder();
    let bench = Bench::start(folder.path()).await;
    bench.create("data");
    bench.run("m", "s", &[]);
    bench.goes_on("m", 1).await;
    let kept = folder.path().join("kept").display().to_string();
    bench
        .order("s", "checkpoint.worker.manifest", Some("error"))
        .await;
    let error = bench.fails(&["checkpoint", "m", "--to", &kept]);
    assert!(error.contains("failpoint"), "{error}");
    let content = bench.volume("data").content.expect("it can be read");
    assert_eq!(content.snapshots, [""; 0]);
    bench.keel(&["checkpoint", "m", "--to", &kept]);
    let content = bench.volume("data").content.expect("it can be read");
    assert_eq!(content.snapshots.len(), 1, "{content:?}");
}

/// The target resumes and writes, but is lost before it reports: the machine is taken back to its
/// source, and the volume with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_taken_back_takes_its_volume_back() {
    let folder = folder();
    let bench = Bench::start_with(folder.path(), &["s", "b", "c"]).await;
    bench.create("data");
    bench.run("m", "b", &[]);
    let log = objects_of_data(&folder.path().join("place")).join("log");
    for (source, target) in [("b", "c"), ("b", "c")] {
        bench.goes_on("m", 1).await;
        bench
            .order(target, "arrived.running", Some("delay(20000)*"))
            .await;
        bench
            .order(target, "target.gone", Some("delay(20000)"))
            .await;
        let epoch = newest_segment(&log).writer;
        let client = bench.cluster.client("s");
        let request = MoveRequest {
            to: target.to_owned(),
            post_copy: false,
            checkpoint_to: None,
            urgency: Urgency::Normal,
            downtime_ms: None,
        };
        let enough = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let over = enough.clone();
        let moving = tokio::spawn(async move {
            // An earlier incomplete copy may still be being removed there.
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                if move_as(&client, "m", &request)
                    .await
                    .is_ok_and(|report| report.ending == Ending::Moved)
                {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        });
        // Some segments of the target's.
        let mut first = None;
        wait_for("the target writes", || {
            let newest = newest_segment(&log);
            let first = (newest.writer > epoch).then(|| *first.get_or_insert(newest.number));
            let written = first.is_some_and(|first| newest.number > first + 5);
            async move { written.then_some(()) }
        })
        .await
        .expect("it writes");
        enough.store(true, std::sync::atomic::Ordering::Relaxed);
        bench.cluster.kill_worker(target, "m").expect("a worker");
        // The agent is about to record that it runs. The next one has no failpoints.
        bench.cluster.kill_agent(target).expect("an agent");
        bench.goes_on("m", 1).await;
        bench.status("m", "running").await;
        assert_eq!(bench.inspect("m").await.node, source);
        moving.await.expect("it ends");
    }
    // An earlier incomplete copy is removed in the background.
    wait_for("it moves", || async {
        let report = bench.cluster.move_machine("s", "m", "c").await.ok()?;
        (report.ending == Ending::Moved).then_some(())
    })
    .await
    .expect("it moves");
    bench.goes_on("m", 1).await;
}

/// A kill at any step of a move: synced data is present, and all data is of one instant.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_synced_is_lost_at_any_step_of_a_move() {
    let folder = folder();
    let bench = Bench::start_with(folder.path(), &["s", "b", "c"]).await;
    bench.create("data");
    // These failpoints are passed by other kinds of moves.
    let of_others = [
        "move.settle",
        "move.served",
        "move.take",
        "move.thaw",
        "move.abort",
        "source.thaw",
    ];
    let steps = keel_machine::failpoint::ALL.iter().filter(|failpoint| {
        let kinds = ["move.", "offer.", "target.", "source.", "arrived."];
        kinds.iter().any(|kind| failpoint.name.starts_with(kind))
            && !of_others
                .iter()
                .any(|name| failpoint.name.starts_with(name))
    });
    let mut machine = String::new();
    let mut drilled = 0;
    for failpoint in steps {
        // The pauses before restarts grow.
        let lives = match machine.as_str() {
            "" => 9,
            machine => bench.story(machine).await.begun,
        };
        if lives > 2 {
            if !machine.is_empty() {
                bench.keel(&["rm", "--force", &machine]);
            }
            machine = format!("m{drilled}");
            bench.run(&machine, "b", &["--restart", "on-failure"]);
        }
        bench.goes_on(&machine, 1).await;
        bench.status(&machine, "running").await;
        let source = bench.inspect(&machine).await.node;
        let target = if source == "b" { "c" } else { "b" };
        let at = match failpoint.site.is_target() {
            true => target,
            false => &source,
        };
        let passed = bench.cluster.failpoints_passed(at).len();
        bench.order(at, failpoint.name, Some("kill")).await;
        let client = bench.cluster.client("s");
        let request = MoveRequest {
            to: target.to_owned(),
            post_copy: false,
            checkpoint_to: None,
            urgency: Urgency::Normal,
            downtime_ms: None,
        };
        wait_for(failpoint.name, || async {
            // It may fail, also because of remains of the one before.
            let _ = move_as(&client, &machine, &request).await;
            let names = bench.cluster.failpoints_passed(at);
            let mut names = names[passed..].iter();
            names.any(|name| name == failpoint.name).then_some(())
        })
        .await
        .expect("it is passed");
        bench.order(at, failpoint.name, None).await;
        let story = bench.goes_on(&machine, 1).await;
        println!("{:<18} {story:?}", failpoint.name);
        drilled += 1;
    }
    assert!(drilled > 25, "{drilled}");
}
