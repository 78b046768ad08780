//! Periodic checkpoints, and machines that run before their memory is restored, in clusters of
//! real processes.

use keel_api::CheckpointInfo;
use keel_machine::checkpoint::Retention;
use keel_machine::spec::CheckpointPlan;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

struct Bench {
    cluster: LocalCluster,
    folder: PathBuf,
}

impl Bench {
    async fn new(folder: &Path, names: &[&str]) -> Self {
        let cluster = LocalCluster::start(Path::new(KEEL), folder, names).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder: folder.to_owned(),
        }
    }

    fn keel(&self, node: &str, args: &[&str]) -> (bool, String) {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(self.folder.join(node))
            .args(args)
            .output()
            .expect("keel runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.success(),
            text(&output.stdout) + &text(&output.stderr),
        )
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

/// One a second, the newest three are kept, also after a move and a restart of the agent; none is
/// surplus.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_made_by_themselves() {
    let folder = folder();
    let bench = Bench::new(folder.path(), &["a", "b"]).await;
    let kept = folder.path().join("kept").display().to_string();
    let module = guest("counter");
    let machine = Guest {
        checkpoints: Some(CheckpointPlan {
            every_s: 1,
            to: Some(kept.clone()),
            retention: Retention {
                newest: Some(3),
                for_s: None,
            },
        }),
        ..Guest::new("regular", "a", &module, &["1000000", "20"])
    };
    bench.cluster.run(&machine).await.expect("it starts");
    let several = |bench: &Bench, newer: Option<String>| {
        let path = format!("/v1/machines/regular/checkpoints?from={kept}");
        let client = bench.cluster.client("b");
        async move {
            wait_for("three newer checkpoints", || async {
                let all: Vec<CheckpointInfo> = client.get(&path).await.ok()?;
                let newer = all.iter().filter(|info| Some(&info.id) > newer.as_ref());
                (newer.count() >= 3).then(|| all.clone())
            })
            .await
            .expect("they are made")
        }
    };
    let first = several(&bench, None).await;
    assert!(first.len() <= 4, "{} are kept", first.len());
    // One may be in progress.
    for pair in first.windows(2) {
        let apart = pair[0].created_unix_ms - pair[1].created_unix_ms;
        assert!(apart >= 900, "{apart} ms apart");
    }
    let (moved, text) = bench.keel("a", &["move", "regular", "--to", "b"]);
    assert!(moved, "{text}");
    let second = several(&bench, Some(first[0].id.clone())).await;
    bench.cluster.kill_agent("b").expect("it is killed");
    let third = several(&bench, Some(second[0].id.clone())).await;
    let (described, text) = bench.keel("a", &["describe", "regular"]);
    assert!(
        described && text.contains("every 1s") && text.contains("the newest 3"),
        "{text}"
    );
    let (killed, text) = bench.keel("a", &["kill", "regular"]);
    assert!(killed, "{text}");
    let (restored, text) = bench.keel(
        "a",
        &["restore", "regular", "--from", &kept, "--as", "again"],
    );
    assert!(restored, "{text}");
    drop(third);
    for args in [
        ["run", "--checkpoint-keep", "3", "x.wasm"],
        ["run", "--checkpoint-every", "soon", "x.wasm"],
    ] {
        assert!(!bench.keel("a", &args).0);
    }
}

/// A template becomes several machines at once, whose memory follows; each is complete, and can be
/// checkpointed, moved and lost like any other.
#[tokio::test(flavor = "multi_thread")]
async fn machines_start_warm() {
    let folder = folder();
    let bench = Bench::new(folder.path(), &["a", "b"]).await;
    let kept = folder.path().join("kept").display().to_string();
    let module = guest("writer");
    let machine = Guest::new("template", "a", &module, &["64", "20"]);
    bench.cluster.run(&machine).await.expect("it starts");
    let lines = |text: &str| {
        text.lines()
            .filter_map(|line| line.parse::<u64>().ok())
            .collect::<Vec<u64>>()
    };
    let output = |node: &'static str, name: &'static str| {
        let cluster = &bench.cluster;
        async move { cluster.output(node, name).await.unwrap_or_default() }
    };
    wait_for("lines", || async {
        (lines(&output("a", "template").await).len() > 2).then_some(())
    })
    .await
    .expect("lines");
    let (done, text) = bench.keel("a", &["checkpoint", "template", "--to", &kept]);
    assert!(done, "{text}");
    let (done, text) = bench.keel("a", &["kill", "template"]);
    assert!(done, "{text}");
    for name in ["warm-1", "warm-2"] {
        let args = [
            "restore", "template", "--from", &kept, "--as", name, "--warm",
        ];
        let (done, text) = bench.keel("a", &args);
        assert!(done, "{text}");
    }
    // At once: the command waits for the rest of the memory.
    let client = bench.cluster.client("a");
    wait_for("warm-1 runs", || async {
        let info = bench.cluster.inspect("a", "warm-1").await.ok()?;
        (info.status == "running").then_some(())
    })
    .await
    .expect("it runs");
    let report = keel_testkit::move_by(&client, "warm-1", "b").await;
    let report = report.expect("a report");
    assert_eq!(report.ending, keel_machine::moves::Ending::Moved);
    let (done, text) = bench.keel("a", &["checkpoint", "warm-2", "--to", &kept]);
    assert!(done, "{text}");
    for (node, name) in [("b", "warm-1"), ("a", "warm-2")] {
        let before = lines(&output(node, name).await).len();
        wait_for("it checks its memory and continues", || async {
            (lines(&output(node, name).await).len() > before + 3).then_some(())
        })
        .await
        .expect("it continues");
        let numbers = lines(&output(node, name).await);
        let first = numbers[0];
        let text: String = numbers.iter().map(|it| format!("{it}\n")).collect();
        check_numbered(&text, first).expect("none is missing or repeated");
    }
    // A machine with damaged pages is ended with a reason, and does not start elsewhere.
    let pack = std::fs::read_dir(format!("{kept}/machines/template"))
        .expect("packs")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|it| it == "pack"))
        .expect("a pack");
    let mut bytes = std::fs::read(&pack).expect("its bytes");
    for byte in bytes.iter_mut().step_by(1 << 16) {
        *byte ^= 1;
    }
    std::fs::write(&pack, bytes).expect("written");
    let args = [
        "restore", "template", "--from", &kept, "--as", "torn", "--warm",
    ];
    // Whether the command sees it run is not determined: its memory, with the damage, follows
    // later.
    let (done, text) = bench.keel("a", &args);
    let is_named = text.contains("is damaged") && text.contains("keel rm torn");
    assert!(done || is_named, "{text}");
    let info = wait_for("torn ends", || async {
        let info = bench.cluster.inspect("a", "torn").await.ok()?;
        (!info.is_live()).then_some(info)
    })
    .await
    .expect("it ends");
    assert_eq!(info.status, "failed");
    let message = info.message.unwrap_or_default();
    assert!(message.contains("is damaged"), "{message}");
    // If its memory is read first, the command reports the damage, and fails.
    let cold = |name: &'static str, more: &[&'static str]| {
        let mut args = vec!["restore", "template", "--from", &kept, "--as", name];
        args.extend(more);
        bench.keel("a", &args)
    };
    let (done, text) = cold("cold", &[]);
    let is_named = text.contains("is damaged") && text.contains("keel rm cold");
    assert!(!done && is_named, "{text}");
    let (done, text) = cold("detached", &["--detach"]);
    assert!(done && text.trim() == "detached", "{text}");
    // A complete one runs when the command returns.
    let (done, text) = bench.keel("a", &["clone", "warm-2", "--as", "copy"]);
    assert!(done, "{text}");
    let info = bench.cluster.inspect("a", "copy").await.expect("info");
    assert_eq!(info.status, "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_checkpoint_is_made_where_the_quota_is_used_up() {
    let folder = folder();
    let bench = Bench::new(folder.path(), &["a"]).await;
    let place = folder.path().join("kept").display().to_string();
    let module = guest("counter");
    let machine = Guest::new("m", "a", &module, &["1000000", "20"]);
    bench.cluster.run(&machine).await.expect("it starts");
    let quota = |more: &[&str]| {
        let mut args = vec!["checkpoint", "quota", "--from", &place];
        args.extend(more);
        bench.keel("a", &args)
    };
    let checkpoint = || bench.keel("a", &["checkpoint", "m", "--to", &place, "--full"]);
    let (done, text) = quota(&[]);
    assert!(!done, "there is no such place yet: {text}");
    let (done, text) = quota(&["--set", "1k"]);
    assert!(done && text.contains("0 B of 1.00 KiB used"), "{text}");
    let (done, text) = checkpoint();
    assert!(done, "what is begun is completed: {text}");
    let (done, text) = checkpoint();
    assert!(!done && text.contains("their quota is 1024"), "{text}");
    let (_, text) = bench.keel("a", &["events", "m"]);
    assert!(text.contains("their quota is 1024"), "{text}");
    // Once it is raised, at once.
    let (done, text) = quota(&["--set", "1T"]);
    assert!(done && text.contains("of 1.00 TiB used"), "{text}");
    let (done, text) = checkpoint();
    assert!(done, "{text}");
    let (done, text) = quota(&["--none"]);
    assert!(done && text.contains("without a quota"), "{text}");
    let (done, text) = quota(&["--set", "much"]);
    assert!(!done && text.contains("is not a size"), "{text}");
}

/// A file that a writer left long ago.
fn plant(path: &Path) {
    let file = std::fs::File::create(path).expect("a file");
    let days = std::time::Duration::from_secs(2 * 24 * 3600);
    let old = std::time::SystemTime::now() - days;
    file.set_modified(old).expect("its age is set");
}

/// Of a machine that is gone, and of writers that were killed.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_pruned() {
    let folder = folder();
    let bench = Bench::new(folder.path(), &["a"]).await;
    let kept = folder.path().join("kept");
    let place = kept.display().to_string();
    let module = guest("counter");
    let machine = Guest::new("gone", "a", &module, &["1000000", "20"]);
    bench.cluster.run(&machine).await.expect("it starts");
    for _ in 0..3 {
        let (done, text) = bench.keel("a", &["checkpoint", "gone", "--to", &place, "--full"]);
        assert!(done, "{text}");
    }
    for args in [["kill", "gone"], ["rm", "gone"]] {
        let (done, text) = bench.keel("a", &args);
        assert!(done, "{text}");
    }
    let leftovers = [
        "machines/gone/9000000000000-00000001.0.pack",
        "programs/0000000000000000000000000000000000000000000000000000000000000000.wasm",
    ];
    let leftovers = leftovers.map(|name| kept.join(name));
    leftovers.iter().for_each(|path| plant(path));
    let checkpoints = || {
        std::fs::read_dir(kept.join("machines/gone"))
            .expect("files")
            .count()
    };
    let before = checkpoints();
    let prune = |more: &[&str]| {
        let mut args = vec!["checkpoint", "prune", "--from", &place];
        args.extend(more);
        bench.keel("a", &args)
    };
    let (done, text) = prune(&["--keep", "1", "--dry-run"]);
    assert!(
        done && text.contains("gone:") && text.contains("to be deleted"),
        "{text}"
    );
    assert!(text.contains("1 programs"), "{text}");
    assert_eq!(checkpoints(), before);
    // Nothing is said of what to keep: only what is useless goes.
    let (done, text) = prune(&[]);
    assert!(done && text.contains("parts of unfinished"), "{text}");
    assert!(!leftovers.iter().any(|path| path.exists()));
    let (done, text) = prune(&["gone", "--keep", "1"]);
    assert!(done && text.contains("gone:"), "{text}");
    assert!(checkpoints() < before, "{text}");
    let (done, text) = prune(&["--keep", "1"]);
    assert!(done && text.contains("nothing deleted"), "{text}");
    let (done, text) = bench.keel("a", &["restore", "gone", "--from", &place]);
    assert!(done, "{text}");
    for (more, expected) in [
        (vec!["nobody"], "has no checkpoint in"),
        (vec!["no/name"], "machine:"),
        (vec!["--keep", "0"], "0 is not in 1.."),
    ] {
        let (done, text) = prune(&more);
        assert!(!done && text.contains(expected), "{text}");
    }
    let replicas = folder.path().join("a/replicas").display().to_string();
    let args = ["checkpoint", "prune", "--from", &replicas];
    let (done, text) = bench.keel("a", &args);
    assert!(
        !done && text.contains("the cluster deletes them itself"),
        "{text}"
    );
    let (done, text) = bench.keel("a", &["checkpoint"]);
    assert!(!done && text.contains("<MACHINE>"), "{text}");
}
