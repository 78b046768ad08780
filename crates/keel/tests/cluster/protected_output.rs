//! Protected output (`ha` with `protect = "output"`): whoever reads the output of a machine sees each
//! line once and in order, whichever node or process fails. The guest numbers its lines: one that
//! was seen and undone would be seen again, and one that was lost would be missing.

use keel_api::MachineInfo;
use keel_machine::high_availability::{HighAvailability, Protect};
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, wait_for};
use std::path::Path;
use std::process::{Child, Command};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NODES: [&str; 3] = ["a", "b", "c"];

fn protected() -> HighAvailability {
    HighAvailability {
        checkpoint_every_ms: 100,
        protect: Protect::Output,
        ..HighAvailability::default()
    }
}

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    fn keel(&self, node: &str, args: &[&str]) -> String {
        let output = self.command(node).args(args).output().expect("keel runs");
        let said = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&said).into_owned()
    }

    fn command(&self, node: &str) -> Command {
        let mut command = Command::new(KEEL);
        command.arg("--state-dir").arg(self.cluster.folder(node));
        command
    }

    async fn machine(&self) -> MachineInfo {
        self.cluster.inspect("a", "m").await.expect("it is known")
    }

    /// Waits until the machine runs under another epoch.
    async fn runs_again(&self, epoch: &str) {
        wait_for("it runs again", || async {
            let machine = self.cluster.inspect("a", "m").await.ok()?;
            (machine.epoch != epoch && machine.status == "running").then_some(())
        })
        .await
        .expect("it runs again");
    }
}

/// A reader that follows the output, and what it has seen.
struct Follower {
    process: Child,
    file: std::path::PathBuf,
}

impl Follower {
    fn begin(bench: &Bench) -> Self {
        let file = bench.folder.path().join("followed");
        let mut command = bench.command("a");
        command.args(["logs", "-f", "m"]);
        command.stdout(std::fs::File::create(&file).expect("a file"));
        Follower {
            process: command.spawn().expect("keel runs"),
            file,
        }
    }

    /// How many lines it saw, each once and in order.
    fn lines(&self) -> u64 {
        let seen = std::fs::read_to_string(&self.file).expect("a file");
        check_numbered(&seen, 0).expect("each line once")
    }

    async fn sees_more(&self, lines: u64) {
        let before = self.lines();
        wait_for("the follower sees new output", || async {
            (self.lines() >= before + lines).then_some(())
        })
        .await
        .expect("it is followed");
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It has ended with the machine, or its test has failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_readers_saw_is_never_undone() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start_replicated(Path::new(KEEL), folder.path(), &NODES).await;
    let cluster = cluster.expect("a cluster");
    let mut bench = Bench { cluster, folder };
    let module = guest("counter");
    let machine = Guest {
        ha: Some(protected()),
        ..Guest::new("m", "c", &module, &["0", "1"])
    };
    bench.cluster.run(&machine).await.expect("it starts");
    let follower = Follower::begin(&bench);
    let faults = [
        "worker",
        "node",
        "agent",
        "move",
        "output lost",
        "worker",
        "node",
    ];
    for fault in faults {
        follower.sees_more(300).await;
        let before = bench.machine().await;
        let node = before.node.clone();
        match fault {
            // The follower asks node a.
            "node" if node == "a" => continue,
            "node" => {
                bench.cluster.power_off(&node);
                bench.runs_again(&before.epoch).await;
                follower.sees_more(300).await;
                bench.cluster.power_on(&node).await.expect("it is back");
            }
            "worker" => {
                bench.cluster.kill_worker(&node, "m").expect("a process");
                bench.runs_again(&before.epoch).await;
            }
            // As after a loss of power: another node has what was seen.
            "output lost" => {
                let folder = bench.cluster.folder(&node).join("workers/m");
                let mut removed = 0;
                for entry in std::fs::read_dir(folder).expect("a folder") {
                    let path = entry.expect("an entry").path();
                    if path
                        .file_name()
                        .is_some_and(|name| name.to_string_lossy().starts_with("log."))
                    {
                        std::fs::remove_file(path).expect("it is removed");
                        removed += 1;
                    }
                }
                assert!(removed > 0);
                bench.cluster.kill_worker(&node, "m").expect("a process");
                bench.runs_again(&before.epoch).await;
                let kept = bench.cluster.output("a", "m").await.expect("its output");
                assert!(check_numbered(&kept, 0).expect("all of it") > 300);
            }
            "agent" => bench.cluster.kill_agent(&node).expect("an agent"),
            _ => {
                let target = NODES.into_iter().find(|it| *it != node).expect("a node");
                let report = bench.cluster.move_machine("a", "m", target).await;
                let report = report.expect("a report");
                assert_eq!(report.ending, Ending::Moved, "{}", report.line());
            }
        }
        follower.sees_more(300).await;
    }
    // Once its end is recorded nothing undoes it: the rest is seen, too.
    assert!(bench.keel("a", &["stop", "m"]).contains('m'));
    let node = bench.machine().await.node;
    bench.cluster.wait_end(&node, "m").await.expect("it ends");
    let kept = bench.cluster.output("a", "m").await.expect("its output");
    let whole = check_numbered(&kept, 0).expect("each line once");
    wait_for("the follower sees the rest", || async {
        (follower.lines() == whole).then_some(())
    })
    .await
    .expect("it sees all");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_waits_while_no_other_node_has_a_checkpoint() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"]).await;
    let cluster = cluster.expect("a cluster");
    let bench = Bench { cluster, folder };
    let module = guest("counter");
    let machine = Guest {
        ha: Some(protected()),
        ..Guest::new("m", "a", &module, &["0", "1"])
    };
    bench.cluster.run(&machine).await.expect("it starts");
    wait_for("output waits", || async {
        let held = bench.machine().await.held_output_bytes;
        (held.is_some_and(|held| held > 1000)).then_some(())
    })
    .await
    .expect("it prints");
    assert_eq!(bench.cluster.output("a", "m").await.expect("output"), "");
    let page = bench.keel("a", &["describe", "m"]);
    assert!(
        page.contains("wait for a checkpoint on another node"),
        "{page}"
    );
    assert!(page.contains("output protected"), "{page}");
    wait_for("an event says so", || async {
        let events = bench.keel("a", &["events"]);
        events.contains("its output waits for one").then_some(())
    })
    .await
    .expect("an event");
    // Not protected any more: what waited is seen.
    bench.keel("a", &["set", "m", "--ha=checkpoint=1s"]);
    let seen = || async {
        let output = bench.cluster.output("a", "m").await.ok()?;
        let lines = check_numbered(&output, 0).expect("each line once");
        (lines > 100).then_some(lines)
    };
    wait_for("output is seen", seen).await.expect("it is seen");
    // And protected again: only what is new waits.
    bench.keel("a", &["set", "m", "--ha=protect=output"]);
    wait_for("output waits", || async {
        let held = bench.machine().await.held_output_bytes;
        (held.is_some_and(|held| held > 1000)).then_some(())
    })
    .await
    .expect("it waits");
    let lines = seen().await.expect("what was seen before");
    assert_eq!(seen().await, Some(lines));
    bench.keel("a", &["kill", "m"]);
    bench.cluster.wait_end("a", "m").await.expect("it ends");
    assert!(seen().await.expect("its output") > lines);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_protected_is_refused() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"]).await;
    let cluster = cluster.expect("a cluster");
    let bench = Bench { cluster, folder };
    let module = format!("{}/../../guests/counter.wasm", env!("CARGO_MANIFEST_DIR"));
    let volume = format!("{}:/data", bench.folder.path().display());
    for (args, named) in [
        (vec!["--ha=protect=output,to=/kept"], "does not go with"),
        (vec!["--ha=protect=memory"], "output or none"),
        (vec!["--ha=protect=output,checkpoint=1ms"], "10ms"),
        (
            vec!["--ha=protect=output,fence=timer", "--volume", &volume],
            "is to wait for a checkpoint",
        ),
    ] {
        let args = [&["run", "-d"], &args[..], &[&module]].concat();
        let said = bench.keel("a", &args);
        assert!(said.contains(named), "{args:?}: {said}");
    }
    assert!(bench.cluster.inspect("a", "counter").await.is_err());
}
