//! Events of clusters of real processes: reported by all nodes, kept over the death of agents,
//! followed live.

use keel_api::{Event, EventKind, EventLine, Silence};
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

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

    /// The output of `keel events` for a machine.
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
            let (events, silent) = self.told(node, machine);
            panic!("{error}: not {expected:?} but {events:#?}, silent {silent:?}");
        }
    }
}

/// A `keel events --follow` and its output so far.
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
    let moved = bench
        .cluster
        .move_machine("b", "lines", "b")
        .await
        .expect("it moves");
    let after = moved.epoch.to_string();
    use EventKind as Kind;
    let mut expected = vec![
        ("a", Kind::MachineScheduled),
        ("a", Kind::MachineStarted),
        ("a", Kind::MoveStarted),
        ("b", Kind::MoveAccepted),
    ];
    // The target reports that it runs, the source that it left: nearly at the same time.
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
        (done.node.as_str(), done.epoch.as_ref()),
        ("a", Some(&after))
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

    // The agent's death does not change earlier events.
    bench.cluster.kill_agent("b").expect("it dies");
    bench
        .cluster
        .wait_alive("b")
        .await
        .expect("it is alive again");
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

    // The follower, through the agent that died, got each event once and in order.
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
    // The node with the store reports that it is gone, and that it is back.
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
    // Following resumes by itself.
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
        (vec!["events", "--since", "2999-01-01"], "is in the future"),
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
    // No event is that recent.
    let (code, out, err) = bench.keel("a", &["events", "--since", "0s"]);
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
}

/// The doctor also checks the agent.
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

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_described_on_one_page() {
    let bench = Bench::new(&["a", "b"]).await;
    let counter = guest("counter");
    let volume = bench.folder.path().join("data");
    std::fs::create_dir(&volume).expect("a folder");
    let shown = volume.to_str().expect("a path");
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
    let module = module.to_str().expect("a path");
    let (code, _, err) = bench.keel(
        "a",
        &[
            "run",
            "--detach",
            "--name",
            "lines",
            "--env",
            "COLOUR=secret",
            "--cpu-limit",
            "0.5",
            "--memory",
            "64M",
            "--threads",
            "7",
            "--dir",
            &format!("{shown}::/data::ro"),
            module,
            "1000000",
            "2",
        ],
    );
    assert_eq!(code, 0, "{err}");
    bench
        .cluster
        .run(&Guest::new("other", "a", &counter, &["1000000", "2"]))
        .await
        .expect("it starts");
    // A machine that is only scheduled cannot move yet.
    wait_for("lines runs", || async {
        let info = bench.cluster.inspect("a", "lines").await.ok()?;
        (info.status == "running").then_some(())
    })
    .await
    .expect("it runs");
    let moved = bench
        .cluster
        .move_machine("a", "lines", "b")
        .await
        .expect("it moves");
    let kept = bench.folder.path().join("kept");
    let kept = kept.to_str().expect("a path");
    assert_eq!(bench.keel("a", &["checkpoint", "lines", "--to", kept]).0, 0);
    wait_for("the arrival", || async {
        let (events, _) = bench.told("a", "lines");
        let arrived = |event: &Event| event.kind == EventKind::MachineArrived;
        events.iter().any(arrived).then_some(())
    })
    .await
    .expect("it is told");
    let (code, page, err) = bench.keel("a", &["describe", "lines"]);
    assert_eq!(code, 0, "{err}");
    for part in [
        "lines\n",
        "  status             running, since 2",
        &format!("  node               b, epoch {}\n", moved.epoch),
        "  program            counter.wasm 1000000 2\n",
        "  threads max        7\n",
        "at most 64.00 MiB in each",
        "at most 0.5 core(s)\n",
        &format!("  directory          {shown} as /data (read only)\n"),
        "  environment        COLOUR\n",
        "  network            none\n",
        "  restart            no (0 so far)\n",
        "Last moves\n  2",
        "lines a → b in ",
        &format!(" in {kept}\n"),
        " machine-arrived ",
    ] {
        assert!(page.contains(part), "{part:?} is not in\n{page}");
    }
    // Values may be secret, and other machines are not shown.
    assert!(
        !page.contains("secret") && !page.contains("other"),
        "{page}"
    );

    // A machine created from the checkpoint under the same name has a history of its own.
    assert_eq!(bench.keel("a", &["rm", "--force", "lines"]).0, 0);
    let (code, _, err) = bench.keel("a", &["restore", "lines", "--from", kept]);
    assert_eq!(code, 0, "{err}");
    let page = wait_for("it runs again", || async {
        let (_, page, _) = bench.keel("b", &["describe", "lines"]);
        page.contains("  status             running, ")
            .then_some(page)
    })
    .await
    .expect("it runs again");
    assert!(
        page.contains("  origin             the newest checkpoint of lines in "),
        "{page}"
    );
    assert!(page.contains("Last moves\n  none\n"), "{page}");
    assert!(!page.contains(" machine-removed "), "{page}");

    let (code, out, _) = bench.keel("a", &["describe", "lines", "-o", "json"]);
    let described: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(code, 0);
    assert_eq!(described["machine"]["name"], "lines");
    assert!(described["events"].is_array() && described["machine"]["since_unix_ms"].is_u64());
    let (code, _, err) = bench.keel("a", &["describe", "nobody"]);
    assert_eq!(code, 1);
    assert!(err.contains("there is no machine \"nobody\""), "{err}");
}
