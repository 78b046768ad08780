//! Machines of another kind than WebAssembly programs: what every kind shares does not depend on
//! the kind. Life cycle, the moves' failpoints, drain, and balancing, with machines that count.

use keel_api::{
    DrainInfo, DrainRequest, DrainState, MachineInfo, MoveRequest, SpanRequest, Urgency,
};
use keel_kind_null::{NullKind, NullSpec};
use keel_machine::failpoint::{ALL, Failpoint, Site};
use keel_machine::kind::{KindName, KindSpec};
use keel_machine::moves::Ending;
use keel_machine::spec::{Balancing, Spawn};
use keel_testkit::drill::{Drill, DrillKind};
use keel_testkit::{Guest, LocalCluster, check_numbered, wait_for};
use std::collections::BTreeMap;
use std::path::Path;

const KEEL: &str = env!("CARGO_BIN_EXE_keel-null");

fn kind(spec: &NullSpec) -> (KindName, KindSpec) {
    (NullKind::kind_name(), spec.to_kind_spec().unwrap())
}

/// A machine that counts until it is stopped.
fn counter<'a>(name: &'a str, node: &'a str) -> Guest<'a> {
    let spec = NullSpec {
        pause_us: 1000,
        ..NullSpec::default()
    };
    let mut guest = Guest::new(name, node, &[], &[]);
    guest.memory_bytes = 1 << 20;
    guest.kind = Some(kind(&spec));
    guest
}

async fn start(folder: &Path, names: &[&str]) -> LocalCluster {
    LocalCluster::start(Path::new(KEEL), folder, names)
        .await
        .expect("a cluster")
}

async fn refused(cluster: &LocalCluster, guest: &Guest<'_>) -> String {
    let refused = cluster.run(guest).await.expect_err("a refusal");
    format!("{refused:#}")
}

async fn machines(cluster: &LocalCluster) -> Vec<MachineInfo> {
    let machines = cluster.client("a").get("/v1/machines").await;
    machines.expect("the machines")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_another_kind_lives_moves_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = start(folder.path(), &["a", "b"]).await;
    cluster.run(&counter("n", "a")).await.expect("it starts");
    for (from, to) in [("a", "b"), ("b", "a"), ("a", "b")] {
        let report = cluster.move_machine("a", "n", to).await.expect("a report");
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        assert_eq!((report.source.as_str(), report.target.as_str()), (from, to));
    }
    // A checkpoint, and a machine from it beside the first.
    let repository = folder.path().join("repository").display().to_string();
    let request = keel_api::CheckpointRequest {
        to: Some(repository),
        ..keel_api::CheckpointRequest::default()
    };
    let client = cluster.client("a");
    let stored: keel_api::CheckpointInfo = client
        .post("/v1/machines/n/checkpoints", &request)
        .await
        .expect("a checkpoint");
    assert_eq!(stored.machine, "n");
    let info = cluster.inspect("a", "n").await.expect("its record");
    assert_eq!(
        (info.kind.as_str(), info.program.as_str()),
        ("null", "count")
    );
    assert_eq!((info.node.as_str(), info.threads), ("b", Some(1)));
    cluster.end("a", "n").await.expect("it is removed");
    // It ends by itself.
    let mut brief = counter("brief", "b");
    let spec = NullSpec {
        last: Some(99),
        ..NullSpec::default()
    };
    brief.kind = Some(kind(&spec));
    cluster.run(&brief).await.expect("it starts");
    let ended = cluster.wait_end("a", "brief").await.expect("its end");
    assert_eq!(ended.exit_code, Some(0), "{ended:?}");
    let output = cluster.output("a", "brief").await.expect("its output");
    let numbers: Vec<&str> = output
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let expected: Vec<String> = (0..100).map(|number| number.to_string()).collect();
    assert_eq!(numbers, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_means_nothing_to_a_kind_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = start(folder.path(), &["a", "b"]).await;
    let with = |balancing: Balancing| {
        let mut guest = counter("n", "a");
        guest.balancing = balancing;
        guest
    };
    let parts = with(Balancing {
        parts_max: Some(3),
        ..Balancing::default()
    });
    let spawn = with(Balancing {
        spawn: Spawn::Spread,
        ..Balancing::default()
    });
    let part_memory = with(Balancing {
        part_memory_bytes: Some(1 << 30),
        ..Balancing::default()
    });
    let mut volume = counter("n", "a");
    volume.volume = Some(folder.path());
    let cases = [
        (parts, "max-parts means nothing"),
        (spawn, "spawn means nothing"),
        (part_memory, "part-memory means nothing"),
        (volume, "volume means nothing"),
    ];
    for (guest, expected) in cases {
        let said = refused(&cluster, &guest).await;
        assert!(said.contains(expected), "{said}");
    }
    // Fields of another kind, and a kind that no node has.
    let mut other = counter("n", "a");
    let module = BTreeMap::from([("module", "ab")]);
    other.kind = Some((NullKind::kind_name(), KindSpec::new(&module).unwrap()));
    let said = refused(&cluster, &other).await;
    assert!(said.contains("`module`"), "{said}");
    other.kind = Some(("qemu".parse().unwrap(), KindSpec::default()));
    let said = refused(&cluster, &other).await;
    assert!(
        said.contains("no machines of kind \"qemu\", only wasm, null"),
        "{said}"
    );
    assert!(machines(&cluster).await.is_empty());
    // What its machines cannot do.
    cluster.run(&counter("n", "a")).await.expect("it starts");
    let client = cluster.client("b");
    let span = SpanRequest {
        nodes: vec!["b".into()],
        here: false,
    };
    let spans: Result<serde_json::Value, _> = client.post("/v1/machines/n/parts", &span).await;
    let said = spans.expect_err("a refusal").to_string();
    assert!(
        said.contains("of kind null, whose machines have no parts"),
        "{said}"
    );
    let post_copy = MoveRequest {
        to: "b".into(),
        post_copy: true,
        checkpoint_to: None,
        urgency: Urgency::Normal,
        downtime_ms: None,
    };
    let moved = keel_testkit::move_as(&client, "n", &post_copy).await;
    let said = format!("{:#}", moved.expect_err("a refusal"));
    assert!(
        said.contains("of kind null, whose memory cannot follow it"),
        "{said}"
    );
    let info = cluster.inspect("b", "n").await.expect("its record");
    assert_eq!((info.node.as_str(), info.status.as_str()), ("a", "running"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_moves_machines_of_all_kinds() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = start(folder.path(), &["a", "b"]).await;
    for name in ["n-0", "n-1", "n-2"] {
        cluster.run(&counter(name, "b")).await.expect("it starts");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = std::fs::read(path).expect("a prebuilt guest");
    let program = Guest::new("program", "b", &module, &["1000000", "20"]);
    cluster.run(&program).await.expect("it starts");
    let client = cluster.client("a");
    let _: serde_json::Value = client
        .post("/v1/nodes/b/drain", &DrainRequest::default())
        .await
        .expect("a drain");
    let drained = wait_for("b is empty", || async {
        let drain: DrainInfo = client.get("/v1/nodes/b/drain").await.ok()?;
        (drain.state == DrainState::Empty).then_some(())
    });
    drained.await.expect("an empty node");
    // A node is empty as soon as the last move is committed; the target says later that it runs.
    let running = wait_for("all run on a", || async {
        let all = machines(&cluster).await;
        let is_there = |it: &MachineInfo| it.node == "a" && it.status == "running";
        all.iter().all(is_there).then_some(())
    });
    running.await.expect("all machines");
    let output = cluster.output("a", "program").await.expect("its output");
    check_numbered(&output, 0).expect("each line once");
}

/// Two kinds in one cluster: the hot node gives machines away, of whichever kind.
#[tokio::test(flavor = "multi_thread")]
async fn machines_of_all_kinds_are_balanced_together() {
    let folder = tempfile::tempdir().unwrap();
    let nodes = [("a", 0.4), ("b", 0.4)];
    let cluster = LocalCluster::start_balancing(Path::new(KEEL), folder.path(), &nodes)
        .await
        .expect("a cluster whose nodes have quotas");
    // Other load of this computer does not matter.
    cluster
        .set_policy("basis", "target")
        .await
        .expect("a policy");
    let target = Balancing {
        cpu_target_millis: Some(1000),
        ..Balancing::default()
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = std::fs::read(path).expect("a prebuilt guest");
    for number in 0..6 {
        let name = format!("m-{number}");
        let mut guest = match number % 2 {
            0 => counter(&name, "a"),
            _ => Guest::new(&name, "a", &module, &["1000000", "500"]),
        };
        guest.memory_bytes = 64 << 20;
        guest.balancing = target;
        cluster.run(&guest).await.expect("it starts");
    }
    let level = wait_for("both nodes have three machines", || async {
        let machines = machines(&cluster).await;
        let on_b = machines.iter().filter(|it| it.node == "b").count();
        (machines.len() == 6 && on_b == 3).then_some(())
    });
    level.await.expect("balance");
}

fn begins(failpoint: &Failpoint, words: &[&str]) -> bool {
    words.iter().any(|word| failpoint.name.starts_with(word))
}

/// A kill and an error at every step of a move that machines without parts and post-copy have.
async fn drill_all(fits: impl Fn(&Failpoint) -> bool) {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
    let cluster = start(folder.path(), &["calm", "b", "c"]).await;
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let spec = NullSpec {
        file: Some(shared.join("w.lines").display().to_string()),
        pause_us: 1000,
        ..NullSpec::default()
    };
    let brief = NullSpec {
        last: Some(5),
        ..NullSpec::default()
    };
    let drill = Drill {
        cluster: &cluster,
        calm: "calm",
        nodes: ["b", "c"],
        machine: "w",
        folder: &shared,
        mib: 1,
        pause_us: 1000,
        part_memory_bytes: None,
        spans: false,
        kind: Some(DrillKind {
            name: NullKind::kind_name(),
            witness: spec.to_kind_spec().unwrap(),
            brief: brief.to_kind_spec().unwrap(),
        }),
    };
    drill.start().await.unwrap();
    assert_eq!(drill.file(), shared.join("w.lines"));
    let mut drilled = 0;
    for failpoint in ALL.iter().filter(|it| fits(it)) {
        for order in ["kill", "error"] {
            let outcome = drill.run(failpoint, order.parse().unwrap()).await;
            let outcome =
                outcome.unwrap_or_else(|error| panic!("{} {order}: {error:?}", failpoint.name));
            println!("{:<18} {order:<12} {outcome:?}", failpoint.name);
            drilled += 1;
            if outcome.rewound {
                drill.start_afresh().await.unwrap();
            }
        }
    }
    assert!(drilled > 0);
    println!("{drilled} drills: {:?}", drill.evidence().unwrap());
}

fn is_for_all_kinds(failpoint: &Failpoint) -> bool {
    !begins(
        failpoint,
        &[
            "post-copy.",
            "move.served",
            "home.",
            "parts.",
            "spanning-start.",
        ],
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn null_moves_survive_faults_of_agents() {
    let agents = |it: &Failpoint| matches!(it.site, Site::SourceAgent | Site::TargetAgent);
    drill_all(|it| is_for_all_kinds(it) && agents(it)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn null_moves_survive_faults_of_workers() {
    let workers = |it: &Failpoint| matches!(it.site, Site::SourceWorker | Site::TargetWorker);
    drill_all(|it| is_for_all_kinds(it) && workers(it)).await;
}

/// Restores by name; checkpoints of this kind have no rounds and packs.
#[tokio::test(flavor = "multi_thread")]
async fn null_checkpoints_and_starts_survive_faults() {
    let others = |it: &Failpoint| {
        begins(it, &["checkpoint.", "restore.", "start.", "end."])
            && !["checkpoint.worker.round", "checkpoint.worker.packs"].contains(&it.name)
    };
    drill_all(others).await;
}
