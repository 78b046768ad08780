//! Workers in control groups of their own: limited, accounted, and reported when the kernel kills
//! them for lack of memory. If this user may not create groups, the test reports that and is
//! skipped.

use keel_api::{EventKind, EventLine, MachineInfo, NodeInfo};
use keel_machine::cgroup::{Group, memory_limit_bytes};
use keel_machine::restart_policy::Restart;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::{Path, PathBuf};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const MEMORY_BYTES: u64 = 1 << 30;
/// Limit of the machines of `LocalCluster::run`.
const THREADS_MAX: u32 = 64;

/// A program that touches a page of its 1 GiB about every millisecond.
fn eater() -> Vec<u8> {
    wat::parse_str(
        r#"(module
            (memory (export "memory") 16384)
            (func (export "_start") (local $at i32) (local $spin i32)
                (loop $pages
                    (i32.store (local.get $at) (i32.const 1))
                    (local.set $spin (i32.const 1000000))
                    (loop $pause
                        (local.set $spin (i32.sub (local.get $spin) (i32.const 1)))
                        (br_if $pause (local.get $spin)))
                    (local.set $at (i32.add (local.get $at) (i32.const 4096)))
                    (br_if $pages (i32.lt_u (local.get $at) (i32.const 0x40000000))))))"#,
    )
    .unwrap()
}

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
        let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"]).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder,
        }
    }

    fn worker_folder(&self, machine: &str) -> PathBuf {
        self.folder.path().join("a/workers").join(machine)
    }

    /// The folders of a machine's group; none without privileges.
    fn group_folders(&self, machine: &str) -> Vec<PathBuf> {
        let Ok(text) = std::fs::read(self.worker_folder(machine).join("cgroups")) else {
            return Vec::new();
        };
        let saved: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let folders = saved["folders"].as_array().unwrap();
        folders
            .iter()
            .map(|folder| folder["path"].as_str().unwrap().into())
            .collect()
    }

    async fn start(&self, machine: &str, module: &[u8], restart: Restart) -> MachineInfo {
        let guest = Guest {
            memory_bytes: MEMORY_BYTES,
            restart,
            ..Guest::new(machine, "a", module, &[])
        };
        self.cluster.run(&guest).await.expect("it starts")
    }

    /// Limits a machine's group to 8 MiB more than its present memory.
    fn starve(&self, machine: &str) {
        let group = Group::load(&self.worker_folder(machine)).expect("a group");
        let now = group.usage().memory_bytes.expect("its memory is counted");
        group.limit_memory(now + (8 << 20)).expect("a lower limit");
    }

    /// Events about a machine, of one kind.
    async fn told(&self, machine: &str, kind: EventKind) -> Vec<String> {
        let path = format!("/v1/events?machine={machine}");
        let mut lines = self.cluster.client("a").get_stream(&path).await.unwrap();
        let mut texts = Vec::new();
        while let Some(line) = lines.line().await.unwrap() {
            match line {
                EventLine::Event(event) if event.kind == kind => texts.push(event.text),
                _ => {}
            }
        }
        texts
    }

    /// Why the memory of this node's machines is not limited, if it is not.
    async fn missing(&self) -> Option<String> {
        let nodes: Vec<NodeInfo> = self.cluster.client("a").get("/v1/nodes").await.unwrap();
        let lacks = nodes.into_iter().flat_map(|node| node.lacks);
        lacks.into_iter().find(|lack| lack.contains("cgroups"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_runs_out_of_memory_is_named() {
    let bench = Bench::new().await;
    if let Some(missing) = bench.missing().await {
        eprintln!("not tested: {missing}");
        return;
    }
    let module = eater();
    let info = bench.start("eater", &module, Restart::No).await;
    let groups = bench.group_folders("eater");
    assert!(!groups.is_empty() && groups.iter().all(|group| group.is_dir()));
    let pid = info.pid.expect("a process");
    for group in &groups {
        let processes = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert_eq!(processes.trim(), pid.to_string(), "{}", group.display());
    }
    let score = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    assert!(score.trim().parse::<i32>().unwrap() >= 500, "{score}");
    let counted = info.cgroup.expect("the kernel counts");
    let limit = memory_limit_bytes(1, MEMORY_BYTES, THREADS_MAX);
    assert_eq!(counted.memory_limit_bytes, Some(limit));
    assert!(counted.memory_bytes > Some(0) && counted.memory_peak_bytes >= counted.memory_bytes);
    // Workers of an earlier agent are found, limited and reported as well.
    let group = Group::load(&bench.worker_folder("eater")).expect("a group");
    group.limit_memory(limit / 2).expect("another limit");
    bench.cluster.kill_agent("a").unwrap();
    wait_for("the agent is back, and has bounded it", || async {
        let counted = bench.cluster.inspect("a", "eater").await.ok()?.cgroup;
        (counted?.memory_limit_bytes == Some(limit)).then_some(())
    })
    .await
    .unwrap();
    bench.starve("eater");
    let info = bench.cluster.wait_end("a", "eater").await.unwrap();
    assert_eq!(info.status, "failed");
    let message = info.message.expect("a reason");
    assert!(message.starts_with("out of memory: "), "{message}");
    assert!(message.contains("limit of its cgroup"), "{message}");
    assert_eq!(
        bench.told("eater", EventKind::OutOfMemory).await,
        [message.as_str()]
    );
    wait_for("its group is removed", || async {
        groups.iter().all(|group| !group.exists()).then_some(())
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_ran_out_of_memory_is_started_again() {
    let bench = Bench::new().await;
    if let Some(missing) = bench.missing().await {
        eprintln!("not tested: {missing}");
        return;
    }
    let first = bench.start("eater", &eater(), Restart::OnFailure).await;
    let groups = bench.group_folders("eater");
    bench.starve("eater");
    let again = wait_for("it is restarted", || async {
        let info = bench.cluster.inspect("a", "eater").await.ok()?;
        (info.status == "running" && info.restarts == 1 && info.cgroup.is_some()).then_some(info)
    })
    .await
    .unwrap();
    assert_ne!((again.pid, &again.epoch), (first.pid, &first.epoch));
    let told = bench.told("eater", EventKind::MachineRestarting).await;
    assert!(told[0].contains("out of memory: "), "{told:?}");
    // The new worker has a new group with the whole limit.
    assert!(groups.iter().all(|group| !group.exists()));
    let limit = memory_limit_bytes(1, MEMORY_BYTES, THREADS_MAX);
    assert_eq!(again.cgroup.unwrap().memory_limit_bytes, Some(limit));
    // A cluster of tests leaves no groups.
    drop(bench);
    for group in groups {
        assert!(!group.parent().unwrap().exists(), "{}", group.display());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_end_with_their_machines() {
    let bench = Bench::new().await;
    if let Some(missing) = bench.missing().await {
        eprintln!("not tested: {missing}");
        return;
    }
    bench.start("eater", &eater(), Restart::No).await;
    let groups = bench.group_folders("eater");
    assert!(!groups.is_empty());
    let slices: Vec<PathBuf> = groups
        .iter()
        .map(|group| group.parent().unwrap().to_owned())
        .collect();
    // What an agent left that died between making a group and using it.
    let left: Vec<PathBuf> = slices.iter().map(|slice| slice.join("left.1")).collect();
    for left in &left {
        std::fs::create_dir(left).unwrap();
    }
    bench.cluster.kill_agent("a").unwrap();
    wait_for("what was left is swept", || async {
        left.iter().all(|left| !left.exists()).then_some(())
    })
    .await
    .unwrap();
    assert!(groups.iter().all(|group| group.is_dir()));
    wait_for("the agent is back", || async {
        bench.cluster.inspect("a", "eater").await.ok()?.pid
    })
    .await
    .unwrap();
    let client = bench.cluster.client("a");
    let _: serde_json::Value = client
        .post("/v1/machines/eater/stop", &())
        .await
        .expect("it stops");
    wait_for("its group is removed", || async {
        groups.iter().all(|group| !group.exists()).then_some(())
    })
    .await
    .unwrap();
}
