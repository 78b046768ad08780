//! `keel set`: limits and the restart policy of running machines change, and stay changed over
//! moves, restarts and checkpoints.

use keel_api::{CheckpointInfo, CheckpointRequest, MachineInfo, RestoreRequest};
use keel_machine::moves::Ending;
use keel_machine::restart_policy::Restart;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const MIB: u64 = 1 << 20;

/// A busy program that allocates 64 KiB every few milliseconds while it can, up to its maximum of
/// 8 MiB.
fn grower() -> Vec<u8> {
    wat::parse_str(
        r#"(module
            (memory (export "memory") 1 128)
            (func (export "_start") (local $spin i32)
                (loop $for_ever
                    (drop (memory.grow (i32.const 1)))
                    (local.set $spin (i32.const 3000000))
                    (loop $pause
                        (local.set $spin (i32.sub (local.get $spin) (i32.const 1)))
                        (br_if $pause (local.get $spin)))
                    (br $for_ever))))"#,
    )
    .unwrap()
}

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new(names: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
        let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), names).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder,
        }
    }

    async fn start(&self, machine: &str, memory_bytes: u64) {
        let module = grower();
        let guest = Guest {
            memory_bytes,
            ..Guest::new(machine, "a", &module, &[])
        };
        self.cluster.run(&guest).await.expect("it starts");
    }

    fn set(&self, args: &[&str]) -> Output {
        Command::new(KEEL)
            .arg("--state-dir")
            .arg(self.folder.path().join("a"))
            .arg("set")
            .args(args)
            .output()
            .unwrap()
    }

    fn done(&self, args: &[&str]) -> String {
        let output = self.set(args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn refused(&self, args: &[&str]) -> String {
        let output = self.set(args);
        assert!(!output.status.success(), "{args:?} was not refused");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    async fn inspect(&self, machine: &str) -> MachineInfo {
        self.cluster.inspect("a", machine).await.unwrap()
    }

    /// Waits until it has this much memory, as a program that allocates does.
    async fn grows_to(&self, machine: &str, bytes: u64) {
        wait_for(&format!("{machine} has {bytes} bytes"), || async {
            let info = self.cluster.inspect("a", machine).await.ok()?;
            (info.memory_bytes == Some(bytes)).then_some(())
        })
        .await
        .unwrap();
    }

    /// Cores that it uses, over a second or more.
    async fn cores(&self, machine: &str) -> f64 {
        let begun = Instant::now();
        let first = self.inspect(machine).await.cpu_micros.expect("it runs");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let wall = begun.elapsed();
        let last = self.inspect(machine).await.cpu_micros.expect("it runs");
        (last - first) as f64 / wall.as_micros() as f64
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_grows_as_far_as_it_may_now() {
    let bench = Bench::new(&["a"]).await;
    bench.start("m", MIB).await;
    bench.grows_to("m", MIB).await;
    let said = bench.done(&["m", "--memory", "2M"]);
    assert!(said.contains("memory 2.00 MiB"), "{said}");
    bench.grows_to("m", 2 * MIB).await;
    let error = bench.refused(&["m", "--memory", "1M"]);
    assert!(error.contains("2097152 bytes already"), "{error}");
    assert_eq!(bench.inspect("m").await.memory_limit_bytes, 2 * MIB);
    // More than the node has, and more than the limit of any machine.
    let error = bench.refused(&["m", "--memory", "65G"]);
    assert!(error.contains("64 KiB to 64 GiB"), "{error}");
    // The maximum of the module is the upper bound.
    bench.done(&["m", "--memory", "16M"]);
    bench.grows_to("m", 8 * MIB).await;
    // Down to its present size.
    bench.done(&["m", "--memory", "8M"]);
    assert_eq!(bench.inspect("m").await.memory_limit_bytes, 8 * MIB);
    let error = bench.refused(&["m", "--cpu", "0"]);
    assert!(error.contains("0.01 to 1000"), "{error}");
    bench.refused(&["m"]);
    let error = bench.refused(&["nobody", "--cpu", "1"]);
    assert!(error.contains("no machine"), "{error}");
    let client = bench.cluster.client("a");
    let _: serde_json::Value = client.post("/v1/machines/m/stop", &()).await.unwrap();
    let error = bench.refused(&["m", "--memory", "16M"]);
    assert!(error.contains("has ended (stopped)"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cpu_limits_come_and_go_while_it_runs() {
    let bench = Bench::new(&["a"]).await;
    bench.start("m", MIB).await;
    bench.grows_to("m", MIB).await;
    bench.done(&["m", "--cpu", "0.1"]);
    // Its remaining quota is used up first.
    wait_for("it is held back", || async {
        (bench.cores("m").await < 0.2).then_some(())
    })
    .await
    .unwrap();
    bench.done(&["m", "--cpu", "none"]);
    wait_for("it runs freely", || async {
        (bench.cores("m").await > 0.3).then_some(())
    })
    .await
    .unwrap();
    // And once more: the throttling thread has ended.
    bench.done(&["m", "--cpu", "0.1"]);
    wait_for("it is held back again", || async {
        (bench.cores("m").await < 0.2).then_some(())
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_set_is_kept() {
    let bench = Bench::new(&["a", "b"]).await;
    bench.start("m", MIB).await;
    let said = bench.done(&[
        "m",
        "--memory",
        "3M",
        "--cpu",
        "0.5",
        "--restart",
        "on-failure",
    ]);
    assert!(said.contains("cpu 0.5 cores, restart on-failure"), "{said}");
    let check = |info: &MachineInfo| {
        assert_eq!(info.memory_limit_bytes, 3 * MIB);
        assert_eq!(info.cpu_limit_millis, Some(500));
        assert_eq!(info.restart, Restart::OnFailure);
    };
    bench.grows_to("m", 3 * MIB).await;
    let report = bench.cluster.move_machine("a", "m", "b").await.unwrap();
    assert_eq!(report.ending, Ending::Moved);
    check(&bench.inspect("m").await);
    // On the new node it can be changed as well, through any node.
    bench.done(&["m", "--memory", "4M"]);
    bench.grows_to("m", 4 * MIB).await;
    bench.done(&["m", "--memory", "4M"]);
    let kept = bench.folder.path().join("kept").display().to_string();
    let request = CheckpointRequest {
        to: Some(kept.clone()),
        ..CheckpointRequest::default()
    };
    let client = bench.cluster.client("a");
    let path = "/v1/machines/m/checkpoints";
    let _: CheckpointInfo = client.post(path, &request).await.unwrap();
    // The policy is the one that was set, and so is the limit of the next life.
    bench.cluster.kill_worker("b", "m").unwrap();
    wait_for("it is restarted", || async {
        let info = bench.cluster.inspect("a", "m").await.ok()?;
        (info.restarts == 1 && info.status == "running").then_some(())
    })
    .await
    .unwrap();
    bench.grows_to("m", 4 * MIB).await;
    let request = RestoreRequest {
        machine: "m".into(),
        id: None,
        from: Some(kept),
        name: Some("copy".into()),
        on: None,
        warm: false,
        nodes: Vec::new(),
    };
    let copy: MachineInfo = client.post("/v1/restore", &request).await.unwrap();
    assert_eq!(copy.memory_limit_bytes, 4 * MIB);
    assert_eq!(copy.restart, Restart::OnFailure);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_set_in_the_middle_of_a_move() {
    let bench = Bench::new(&["a", "b"]).await;
    bench.start("m", MIB).await;
    let pause = Some("delay(5000)");
    let ordered = bench.cluster.failpoint("a", "move.accepted", pause).await;
    ordered.unwrap();
    let (moved, error) = tokio::join!(bench.cluster.move_machine("a", "m", "b"), async {
        wait_for("the move stands", || async {
            let passed = bench.cluster.failpoints_passed("a");
            passed
                .iter()
                .any(|line| line.contains("move.accepted"))
                .then_some(())
        })
        .await
        .unwrap();
        bench.refused(&["m", "--memory", "2M"])
    });
    assert!(
        error.contains("is moving") && error.contains("--cancel"),
        "{error}"
    );
    assert_eq!(moved.unwrap().ending, Ending::Moved);
    bench.done(&["m", "--memory", "2M"]);
    bench.grows_to("m", 2 * MIB).await;
}
