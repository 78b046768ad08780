//! Events of clusters of real processes: told by all nodes, kept over the death
//! of agents, followed while they happen.

use keel_api::{Event, EventKind, EventLine, Silence};
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

fn guest(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../guests/{name}.wasm"));
    std::fs::read(path).expect("a prebuilt guest")
}

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new(names: &[&str]) -> Bench {
        let folder = tempfile::Builder::new()
            .prefix("keel-")
            .tempdir()
            .expect("a folder");
        let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), names)
            .await
            .expect("a cluster");
        Bench { cluster, folder }
    }

    fn command(&self, node: &str, args: &[&str]) -> Command {
        let mut command = Command::new(KEEL);
        command
            .arg("--state-dir")
            .arg(self.folder.path().join(node))
            .args(args);
        command
    }

    fn keel(&self, node: &str, args: &[&str]) -> (i32, String, String) {
        let output = self.command(node, args).output().expect("keel runs");
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// What `keel events` tells of a machine.
    fn told(&self, node: &str, machine: &str) -> (Vec<Event>, Vec<Silence>) {
        let (code, out, err) = self.keel(node, &["events", machine, "-o", "json"]);
        assert_eq!(code, 0, "{err}");
        let told: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        (
            serde_json::from_value(told["events"].clone()).expect("events"),
            serde_json::from_value(told["silent"].clone()).expect("silent nodes"),
        )
    }

    /// Waits until a machine's events are of these kinds, by these nodes.
    async fn wait_kinds(&self, node: &str, machine: &str, expected: &[(&str, EventKind)]) {
        let waited = wait_for(&format!("events of {machine}"), || async {
            let (events, _) = self.told(node, machine);
            let kinds: Vec<(&str, EventKind)> = events
                .iter()
                .map(|event| (event.node.as_str(), event.kind))
                .collect();
            (kinds == expected).then_some(())
        })
        .await;
        if let Err(error) = waited {
            panic!("{error}: {:#?}", self.told(node, machine).0);
        }
    }
}

/// A `keel events --follow` and what it printed so far.
struct Follower {
    child: Child,
    lines: Arc<Mutex<Vec<EventLine>>>,
}

impl Follower {
    fn start(bench: &Bench, node: &str) -> Self {
        let mut child = bench
            .command(node, &["events", "--follow", "-o", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("keel runs");
        let out = BufReader::new(child.stdout.take().expect("its output"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).expect("a line of JSON");
                sink.lock().unwrap().push(line);
            }
        });
        Follower { child, lines }
    }

    async fn wait(&self, what: &str, fits: impl Fn(&EventLine) -> bool) {
        wait_for(what, || async {
            self.lines.lock().unwrap().iter().any(&fits).then_some(())
        })
        .await
        .expect("it is told");
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machines_life_is_told_by_all_nodes_and_outlives_agents() {
    let bench = Bench::new(&["a", "b"]).await;
    let follower = Follower::start(&bench, "b");
    let counter = guest("counter");
    bench
        .cluster
        .run(&Guest::new("lines", "a", &counter, &["1000000", "2"]))
        .await
        .expect("it starts");
    bench
        .cluster
        .move_machine("b", "lines", "b")
        .await
        .expect("it moves");
    use EventKind as Kind;
    let mut expected = vec![
        ("a", Kind::MachineScheduled),
        ("a", Kind::MachineStarted),
        ("a", Kind::MoveStarted),
        ("b", Kind::MoveAccepted),
    ];
    // The target tells that it runs, the source that it left: nearly at once.
    wait_for("both sides of the move", || async {
        let (events, _) = bench.told("a", "lines");
        let has = |kind| events.iter().any(|event| event.kind == kind);
        (has(Kind::MachineArrived) && has(Kind::MoveDone)).then_some(())
    })
    .await
    .expect("they tell it");
    let (events, silent) = bench.told("a", "lines");
    assert!(silent.is_empty(), "{silent:?}");
    let done = events
        .iter()
        .find(|event| event.kind == Kind::MoveDone)
        .expect("the end of the move");
    assert_eq!(
        (done.node.as_str(), done.epoch.as_deref()),
        ("a", Some("1.2"))
    );
    assert_eq!(done.fields["target"], "b");
    assert!(done.fields["downtime_micros"].parse::<u64>().is_ok());
    let arrived_first = events
        .iter()
        .position(|event| event.kind == Kind::MachineArrived)
        < events.iter().position(|event| event.kind == Kind::MoveDone);
    let mut sides = [("b", Kind::MachineArrived), ("a", Kind::MoveDone)];
    if !arrived_first {
        sides.reverse();
    }
    expected.extend(sides);
    let kept = bench.folder.path().join("kept");
    let kept = kept.to_str().expect("a path");
    let (code, _, err) = bench.keel("a", &["checkpoint", "lines", "--to", kept]);
    assert_eq!(code, 0, "{err}");
    expected.push(("b", Kind::CheckpointMade));
    bench.wait_kinds("b", "lines", &expected).await;

    // The agent's death changes nothing of what was told.
    bench.cluster.kill_agent("b").expect("it dies");
    bench.cluster.wait_alive("b").await.expect("it is back");
    expected.push(("b", Kind::MachineFound));
    bench.wait_kinds("a", "lines", &expected).await;

    // Nor does removing the machine.
    assert_eq!(bench.keel("a", &["rm", "--force", "lines"]).0, 0);
    expected.extend([
        ("b", Kind::StopAsked),
        ("b", Kind::MachineStopped),
        ("b", Kind::MachineRemoved),
    ]);
    bench.wait_kinds("a", "lines", &expected).await;

    // Who followed, through the agent that died, saw each once and in order.
    follower
        .wait(
            "the follower sees the end",
            |line| matches!(line, EventLine::Event(event) if event.kind == Kind::MachineRemoved),
        )
        .await;
    let lines = follower.lines.lock().unwrap().clone();
    for node in ["a", "b"] {
        let ids: Vec<u64> = lines
            .iter()
            .filter_map(|line| match line {
                EventLine::Event(event) if event.node == node => Some(event.id),
                _ => None,
            })
            .collect();
        assert!(ids.is_sorted_by(|a, b| a < b), "{node}: {ids:?}");
    }
    let followed = lines
        .iter()
        .filter(|line| {
            matches!(line, EventLine::Event(event) if event.machine.as_deref() == Some("lines"))
        })
        .count();
    assert_eq!(followed, expected.len(), "{lines:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_do_not_answer_are_named() {
    let mut bench = Bench::new(&["a", "b"]).await;
    let follower = Follower::start(&bench, "a");
    follower
        .wait(
            "b is heard",
            |line| matches!(line, EventLine::Event(event) if event.node == "b"),
        )
        .await;
    bench.cluster.power_off("b");
    follower
        .wait(
            "b's silence",
            |line| matches!(line, EventLine::Silent(silence) if silence.node == "b"),
        )
        .await;
    let (code, out, err) = bench.keel("a", &["events"]);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("node b does not answer"), "{err}");
    assert!(out.contains(" node-started "), "{out}");
    // The node with the store tells that it is gone, and that it is back.
    follower
        .wait("b is away", |line| {
            matches!(line, EventLine::Event(event)
                if event.kind == EventKind::NodeAway && event.fields["of"] == "b")
        })
        .await;
    bench.cluster.power_on("b").await.expect("it starts");
    follower
        .wait("b is alive", |line| {
            matches!(line, EventLine::Event(event)
                if event.kind == EventKind::NodeAlive && event.fields["of"] == "b")
        })
        .await;
    // It is followed again by itself.
    follower
        .wait("b's second start", |line| {
            matches!(line, EventLine::Event(event)
                if event.kind == EventKind::LeaseTaken && event.node == "b")
        })
        .await;
    let starts = || {
        let lines = follower.lines.lock().unwrap();
        lines
            .iter()
            .filter(|line| {
                matches!(line, EventLine::Event(event)
                    if event.kind == EventKind::NodeStarted && event.node == "b")
            })
            .count()
    };
    wait_for("b's second start", || async {
        (starts() == 2).then_some(())
    })
    .await
    .expect("it is told");
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_that_cannot_be_are_named() {
    let bench = Bench::new(&["a"]).await;
    for (args, message) in [
        (vec!["events", "nobody"], "there is no machine \"nobody\""),
        (
            vec!["events", "-f", "nobody"],
            "there is no machine \"nobody\"",
        ),
        (vec!["events", "No Name"], "No Name"),
        (vec!["events", "--since", "soon"], "neither a duration"),
        (vec!["events", "--since", "2999-01-01"], "has not come yet"),
        (vec!["events", "--limit", "0"], "1..=10000"),
        (vec!["events", "--limit", "many"], "many"),
    ] {
        let (code, out, err) = bench.keel("a", &args);
        assert_ne!(code, 0, "{args:?}: {out}");
        assert!(err.contains(message), "{args:?}: {err}");
    }
    let limited = bench.keel("a", &["events", "--limit", "1", "-o", "name"]);
    assert_eq!(
        (limited.0, limited.1.lines().count()),
        (0, 1),
        "{limited:?}"
    );
    assert!(
        limited.2.contains("there are older events"),
        "{}",
        limited.2
    );
    // Nothing is as young as that.
    let (code, out, err) = bench.keel("a", &["events", "--since", "0s"]);
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
}

/// The agent is one of the things that the doctor looks at.
#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_asks_the_agent() {
    let mut bench = Bench::new(&["a"]).await;
    let (code, out, err) = bench.keel("a", &["doctor"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("node a (keel "), "{out}");
    assert!(
        out.contains("is held by this node's agent, process "),
        "{out}"
    );
    bench.cluster.power_off("a");
    let (code, out, err) = bench.keel("a", &["doctor", "-o", "name"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.lines().any(|line| line == "agent"), "{out}");
}
