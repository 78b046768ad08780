//! Machines with parts on several nodes, in clusters of real processes: their results are the same
//! as on one node while parts are added and removed and threads move; a lost part ends them with a
//! reason, and no process remains.

use keel_api::{MachineInfo, ObjectInfo, PartsInfo, object_range, object_range_name};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::Spawn;
use keel_testkit::{Guest, LocalCluster, check_numbered, wait_for};
use keel_testkit::{guest, network::Network};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NODES: [&str; 3] = ["a", "b", "c"];

struct Bench {
    cluster: LocalCluster,
    folder: PathBuf,
}

impl Bench {
    async fn new(folder: &Path) -> Self {
        Bench::new_in(folder, None).await
    }

    async fn new_in(folder: &Path, network: Option<Network>) -> Self {
        let cluster = LocalCluster::start_in(Path::new(KEEL), folder, &NODES, network).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder: folder.to_owned(),
        }
    }

    /// Whether it succeeded, and all output.
    fn keel(&self, args: &[&str]) -> (bool, String) {
        let output = Command::new(KEEL)
            .arg("--state-dir")
            .arg(self.folder.join("a"))
            .args(args)
            .output()
            .expect("keel runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.success(),
            text(&output.stdout) + &text(&output.stderr),
        )
    }

    fn does(&self, args: &[&str]) -> String {
        let (done, text) = self.keel(args);
        assert!(done, "{args:?}: {text}");
        text
    }

    fn fails(&self, args: &[&str], with: &str) {
        let (done, text) = self.keel(args);
        assert!(!done && text.contains(with), "{args:?}: {text}");
    }

    fn parts(&self, machine: &str) -> PartsInfo {
        let text = self.does(&["-o", "json", "parts", machine]);
        let parts: Vec<keel_api::PartInfo> = serde_json::from_str(&text).expect("JSON");
        let text = self.does(&["-o", "json", "threads", machine]);
        PartsInfo {
            parts,
            threads: serde_json::from_str(&text).expect("JSON"),
            waits: Vec::new(),
            downtime_micros: None,
        }
    }

    async fn inspect(&self, machine: &str) -> MachineInfo {
        let info = self.cluster.inspect("a", machine).await;
        info.expect("info")
    }

    /// Waits until no process of a part remains on any node.
    async fn no_parts(&self) {
        wait_for("no part is left", || async {
            let left = NODES.iter().map(|node| self.cluster.parts_of(node));
            (left.sum::<usize>() == 0).then_some(())
        })
        .await
        .expect("none");
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

/// Waits until it runs.
async fn run(bench: &Bench, guest: &Guest<'_>) {
    bench.cluster.run(guest).await.expect("it is scheduled");
    wait_for("it runs", || async {
        (bench.inspect(guest.name).await.status == "running").then_some(())
    })
    .await
    .expect("it runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_spans_nodes_while_it_runs() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    let args = ["6", "600000"];
    run(&bench, &Guest::new("alone", "b", &module, &args)).await;
    run(&bench, &Guest::new("spread", "a", &module, &args)).await;
    let mut rng = SmallRng::seed_from_u64(9);
    let mut moves = 0;
    // The home is named or not; two parts on one node; then another home.
    for nodes in ["a,b,c", "b,c", "a,a,b"] {
        let said = bench.does(&["span", "spread", "--nodes", nodes]);
        assert!(said.contains("downtime"), "{said}");
        let parts = bench.parts("spread").parts;
        assert_eq!(parts.len(), 3, "{parts:?}");
        assert_eq!(parts[0].node, "a");
        for _ in 0..12 {
            let tid = rng.random_range(0..7_u32);
            let to = &parts[rng.random_range(0..3)].node;
            let thread = format!("spread/thread/{tid}");
            bench.does(&["move", &thread, "--to", to]);
            moves += 1;
        }
        let said = bench.does(&["unspan", "spread"]);
        assert!(said.contains("on a alone"), "{said}");
        let now = bench.parts("spread");
        assert_eq!(now.parts.len(), 1);
        assert!(now.threads.iter().all(|thread| thread.node == "a"));
        bench.no_parts().await;
    }
    assert_eq!(moves, 36);
    assert_eq!(bench.inspect("spread").await.status, "running");
    // It moves like any other, and spans from its new node.
    bench.does(&["move", "spread", "--to", "c"]);
    bench.does(&["span", "spread", "--nodes", "a,b,c"]);
    assert_eq!(bench.parts("spread").parts[0].node, "c");
    // The agent of its home is restarted: the machine still spans, and the agent finds it.
    bench.cluster.kill_agent("c").expect("an agent");
    bench
        .cluster
        .wait_alive("c")
        .await
        .expect("it is alive again");
    wait_for("its parts are told of", || async {
        let (done, _) = bench.keel(&["parts", "spread"]);
        done.then_some(())
    })
    .await
    .expect("parts");
    bench.does(&["move", "spread/thread/1", "--to", "a"]);
    bench.does(&["unspan", "spread"]);
    for machine in ["spread", "alone"] {
        let info = bench.cluster.wait_end("a", machine).await.expect("its end");
        assert_eq!(info.status, "exited (0)", "{info:?}");
    }
    let outputs = [
        bench.cluster.output("c", "spread").await.expect("output"),
        bench.cluster.output("b", "alone").await.expect("output"),
    ];
    assert_eq!(outputs[0], outputs[1]);
    let events = bench.does(&["events", "spread"]);
    assert!(
        events.contains("machine-spans") && events.contains("machine-alone"),
        "{events}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_said() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    run(&bench, &Guest::new("m", "a", &module, &["2", "4000000"])).await;
    for (args, with) in [
        (&["span", "m", "--nodes", "a"][..], "name other nodes"),
        (&["span", "m", "--nodes", "x"], "no node"),
        (&["span", "m", "--nodes", "A b"], "not valid"),
        (&["span", "nothing", "--nodes", "b"], "no machine"),
        // Names are one segment of a path, whatever their characters.
        (&["span", "../m", "--nodes", "b"], "not valid"),
        (&["stop", "m/kill?"], "not valid"),
        (&["parts", "m?"], "not valid"),
        (&["kill", "m#"], "not valid"),
        (&["unspan", "m"], "on one node already"),
        (&["move", "m/thread/1", "--to", "b"], "no part on"),
        (&["move", "m/thread/one", "--to", "b"], "no number"),
        (&["move", "m/threads", "--to", "b"], "can be moved"),
        (&["shake", "m"], "on one node"),
        (&["move", "m/objects/cache", "--to", "b"], "no part on"),
        (&["move", "m/objects/0x0-0x1000", "--to", "b"], "no part on"),
        (
            &["move", "m/thread/1", "--to", "b", "--dry-run"],
            "whole machines",
        ),
    ] {
        bench.fails(args, with);
    }
    bench.does(&["span", "m", "--nodes", "b"]);
    for (args, with) in [
        (&["span", "m", "--nodes", "a"][..], "name other nodes"),
        (&["span", "m", "--nodes", "b,x"], "no node"),
        (&["set", "m", "--memory", "1G"], "keel unspan"),
        (&["set", "m", "--cpu", "0.5"], "keel unspan"),
        (&["move", "m/thread/99", "--to", "b"], "no thread 99"),
        (&["move", "m/thread/1", "--to", "c"], "no part on"),
        (&["move", "m/objects/0x0-0x1000", "--to", "c"], "no part on"),
        (
            &["move", "m/objects/0xffff0000-0xffffffff", "--to", "b"],
            "outside",
        ),
        (
            &["move", "m/objects/7:0x0-0x1000", "--to", "b"],
            "no memory 7",
        ),
        (&["shake", "m", "--rate", "0"], "more than 0"),
    ] {
        bench.fails(args, with);
    }
    // An invalid request has the same form of error as an impossible one.
    for (request, status) in [
        ("POST /v1/machines/m/parts", "400"),
        ("POST /v1/machines/m/threads/1/move", "400"),
        ("PUT /v1/machines/m/parts", "405"),
        ("POST /v1/machines/m/threads/x/move", "400"),
    ] {
        let mut socket = UnixStream::connect(bench.folder.join("a/api.socket")).expect("a socket");
        let text = format!(
            "{request} HTTP/1.1\r\nHost: keel\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n{{{{{{"
        );
        socket.write_all(text.as_bytes()).expect("it is sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("an answer");
        assert!(answer.contains(&format!(" {status} ")), "{answer}");
        assert!(answer.contains("{\"error\":"), "{answer}");
    }
    // It ran throughout, and ends with all its parts.
    assert_eq!(bench.parts("m").parts.len(), 2);
    assert_eq!(bench.cluster.parts_of("b"), 1);
    let page = bench.does(&["describe", "m"]);
    assert!(page.contains("1 on b: "), "{page}");
    bench.does(&["stop", "m"]);
    bench.no_parts().await;
    assert_eq!(bench.inspect("m").await.status, "stopped");
    // A CPU limit applies on one node only.
    run(&bench, &Guest::new("n", "a", &module, &["2", "4000000"])).await;
    bench.does(&["set", "n", "--cpu", "0.5"]);
    bench.fails(&["span", "n", "--nodes", "b"], "--cpu none");
    bench.no_parts().await;
    assert_eq!(bench.inspect("n").await.status, "running");
    bench.does(&["kill", "n"]);
}

/// Rules and drains hold for parts, whoever requests them; and a node is drained only when its
/// parts have left, too.
#[tokio::test(flavor = "multi_thread")]
async fn rules_and_drains_hold_for_parts() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    run(&bench, &Guest::new("m", "a", &module, &["3", "40000000"])).await;
    let file = folder.path().join("rules.toml");
    let rule = "[[rule]]\nname = \"not-c\"\nrule = \"avoid\"\nnodes.names = [\"c\"]\nmachines.names = [\"m\"]\n";
    std::fs::write(&file, rule).expect("a file");
    bench.does(&["rule", "set", "-f", file.to_str().expect("a path")]);
    bench.fails(&["span", "m", "--nodes", "b,c"], "no part on c: ");
    assert_eq!(bench.parts("m").parts.len(), 1);
    bench.does(&["rule", "rm", "not-c"]);
    bench.does(&["span", "m", "--nodes", "b,c"]);
    bench.does(&["move", "m/thread/1", "--to", "c"]);
    let plan = bench.does(&["drain", "c", "--dry-run"]);
    assert!(plan.contains("a part of a machine leaves"), "{plan}");
    let drained = bench.does(&["drain", "c"]);
    assert_eq!(bench.cluster.parts_of("c"), 0, "{drained}");
    assert!(drained.contains("a part of a machine leaves"), "{drained}");
    let parts = bench.parts("m");
    assert!(parts.threads.iter().all(|thread| thread.node != "c"));
    bench.fails(&["span", "m", "--nodes", "b,c"], "is being drained");
    bench.fails(&["move", "m/thread/1", "--to", "c"], "no part on");
    assert_eq!(bench.inspect("m").await.status, "running");
    bench.does(&["undrain", "c"]);
    bench.does(&["span", "m", "--nodes", "b,c"]);
    bench.does(&["kill", "m"]);
    bench.no_parts().await;
}

/// A machine that spreads its threads has parts before it starts, so each thread starts on the
/// part with the fewest; nothing is moved later. If no other node may have a part it runs all the
/// same.
#[tokio::test(flavor = "multi_thread")]
async fn threads_are_spread_from_the_first_on() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let policy = bench.cluster.set_policy("mode", "automatic").await;
    policy.expect("a policy");
    let module = guest("threads");
    let mut spread = Guest::new("m", "a", &module, &["6", "40000000"]);
    spread.balancing.parts_max = Some(3);
    spread.balancing.spawn = Spawn::Spread;
    run(&bench, &spread).await;
    assert_eq!(bench.parts("m").parts.len(), 3);
    let all = wait_for("its threads run", || async {
        let threads = bench.parts("m").threads;
        (threads.len() == 7).then_some(threads)
    })
    .await
    .expect("threads");
    for node in NODES {
        let there = all.iter().filter(|thread| thread.node == node).count();
        assert!((2..=3).contains(&there), "{all:?}");
    }
    let why = bench.does(&["why", "m"]);
    assert!(why.contains("it has parts before it runs"), "{why}");
    bench.does(&["kill", "m"]);
    bench.no_parts().await;
    for node in ["b", "c"] {
        bench.does(&["drain", node]);
    }
    let alone = Guest {
        name: "n",
        ..spread
    };
    run(&bench, &alone).await;
    assert_eq!(bench.parts("n").parts.len(), 1);
    bench.does(&["kill", "n"]);
}

/// A request is completed even if its client disconnects: it leaves no orphaned parts.
#[tokio::test(flavor = "multi_thread")]
async fn who_asked_may_go() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    run(&bench, &Guest::new("m", "a", &module, &["2", "40000000"])).await;
    for round in 0..4_u64 {
        let mut asking = Command::new(KEEL)
            .arg("--state-dir")
            .arg(bench.folder.join("a"))
            .args(["span", "m", "--nodes", "b,c"])
            .spawn()
            .expect("keel runs");
        // The request arrives after some milliseconds, and creating parts takes some tens.
        std::thread::sleep(Duration::from_millis(10 + 10 * round));
        // It may have ended.
        let _ = asking.kill();
        asking.wait().expect("its end");
        wait_for("all parts are the machine's", || async {
            let has = bench.parts("m").parts.len() - 1;
            let there = bench.cluster.parts_of("b") + bench.cluster.parts_of("c");
            (has == there && (has == 0 || has == 2)).then_some(())
        })
        .await
        .expect("parts");
        wait_for("it is alone", || async {
            let (_, text) = bench.keel(&["unspan", "m"]);
            (bench.parts("m").parts.len() == 1).then_some(text)
        })
        .await
        .expect("it is alone");
        bench.no_parts().await;
    }
    bench.does(&["kill", "m"]);
}

/// A part with a stopped process is reported if a request waits for it; all continue when it does.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_answer_is_named() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    run(&bench, &Guest::new("m", "a", &module, &["3", "40000000"])).await;
    bench.does(&["span", "m", "--nodes", "b,c"]);
    assert_eq!(bench.cluster.stop_parts("b", true), 1);
    bench.fails(
        &["move", "m/thread/1", "--to", "b"],
        "the part on b has not answered for",
    );
    let listed = bench.does(&["parts", "m"]);
    assert!(listed.contains("member, silent for"), "{listed}");
    let described = bench.does(&["describe", "m"]);
    assert!(described.contains(", silent for"), "{described}");
    let events = bench.does(&["events", "m"]);
    assert!(events.contains("part 1 on b does not answer"), "{events}");
    assert_eq!(bench.cluster.stop_parts("b", false), 1);
    wait_for("it is there", || async {
        let thread = bench.parts("m").threads.into_iter();
        let mut thread = thread.filter(|thread| thread.tid == 1);
        (thread.next()?.node == "b").then_some(())
    })
    .await
    .expect("it moved");
    let listed = bench.does(&["parts", "m"]);
    assert!(!listed.contains("silent"), "{listed}");
    wait_for("it is told", || async {
        let events = bench.does(&["events", "m"]);
        events.contains("part 1 on b answers again").then_some(())
    })
    .await
    .expect("an event");
    bench.does(&["kill", "m"]);
    bench.no_parts().await;
}

/// A checkpoint does not change its placement; a move affects the home only, and the parts stay on
/// the same nodes, except that the home's old node gets one if the target had none.
#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_and_moves_leave_parts_where_they_are() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    run(&bench, &Guest::new("m", "a", &module, &["3", "40000000"])).await;
    bench.does(&["span", "m", "--nodes", "b"]);
    bench.does(&["move", "m/thread/2", "--to", "b"]);
    let again = async |home: &str, member: &str| {
        wait_for("it spans again", || async {
            let now = bench.parts("m");
            let nodes: Vec<&str> = now.parts.iter().map(|part| part.node.as_str()).collect();
            let moved = now.threads.iter().find(|thread| thread.tid == 2)?;
            (nodes == [home, member] && moved.node == "b").then_some(())
        })
        .await
        .expect("it does");
    };
    again("a", "b").await;
    for number in 0..3 {
        let said = bench.does(&["checkpoint", "m"]);
        assert!(said.contains("downtime"), "{said}");
        // Each but the first has only the changes since.
        assert_eq!(said.contains(" since "), number > 0, "{said}");
        let now = bench.parts("m");
        let thread = now.threads.iter().find(|thread| thread.tid == 2);
        let thread = thread.expect("the thread");
        assert_eq!((now.parts.len(), thread.node.as_str()), (2, "b"));
    }
    assert_eq!(bench.cluster.parts_of("b"), 1);
    bench.does(&["restore", "m", "--as", "twin", "--on", "a"]);
    bench.does(&["kill", "twin"]);
    // Its home moves to a node without a part, and to one with a part, which then moves to the
    // home's old node.
    let part = bench.cluster.part_pids("b");
    bench.does(&["move", "m", "--to", "c"]);
    again("c", "b").await;
    assert_eq!(bench.cluster.part_pids("b"), part, "the same process");
    bench.does(&["move", "m", "--to", "b"]);
    wait_for("its parts have changed places", || async {
        let parts = bench.parts("m").parts.into_iter();
        let nodes: Vec<String> = parts.map(|part| part.node).collect();
        (nodes == ["b", "c"] && bench.cluster.parts_of("b") == 0).then_some(())
    })
    .await
    .expect("all have them");
    bench.does(&["move", "m", "--to", "c"]);
    wait_for("and again", || async {
        let parts = bench.parts("m").parts.into_iter();
        let nodes: Vec<String> = parts.map(|part| part.node).collect();
        (nodes == ["c", "b"]).then_some(())
    })
    .await
    .expect("all have them");
    bench.does(&["move", "m/thread/2", "--to", "b"]);
    // A failed move leaves it unchanged.
    bench.fails(&["move", "m", "--to", "x"], "no node");
    again("c", "b").await;
    assert_eq!(bench.inspect("m").await.status, "running");
    bench.does(&["stop", "m"]);
    bench.no_parts().await;
}

/// A machine that is larger than the limit of a part gets its parts before its memory: on a
/// restore with named parts, and on a restart.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_larger_than_a_part_begins_on_several() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let kept = folder.path().join("kept").display().to_string();
    let module = guest("writer");
    let mut machine = Guest::new("m", "a", &module, &["48", "20"]);
    machine.restart = Restart::OnFailure;
    run(&bench, &machine).await;
    let lines = async |name: &str| -> Vec<u64> {
        let text = bench.cluster.output("a", name).await.unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    // It continues, and each of its parts has memory within its limit.
    let goes_on = async |name: &str, nodes: &[&str]| {
        let before = lines(name).await.len();
        wait_for("it continues", || async {
            (lines(name).await.len() > before + 3).then_some(())
        })
        .await
        .expect("it continues");
        let numbers = lines(name).await;
        // Its output before the restart stays.
        let rewound = (1..numbers.len()).rfind(|at| numbers[*at] <= numbers[at - 1]);
        let numbers = &numbers[rewound.unwrap_or(0)..];
        let text: String = numbers.iter().map(|it| format!("{it}\n")).collect();
        check_numbered(&text, numbers[0]).expect("none is missing or repeated");
        let parts = bench.parts(name).parts;
        let on: Vec<&str> = parts.iter().map(|part| part.node.as_str()).collect();
        assert_eq!(on.first(), nodes.first());
        assert_eq!(on.len(), nodes.len());
        assert!(nodes.iter().all(|node| on.contains(node)), "{on:?}");
        for part in &parts {
            let memory = part.memory.as_ref().expect("its memory");
            let mib = memory.resident_bytes >> 20;
            assert!((4..=22).contains(&mib), "{mib} MiB on {}", part.node);
        }
    };
    wait_for("lines", || async {
        (lines("m").await.len() > 2).then_some(())
    })
    .await
    .expect("lines");
    bench.does(&["set", "m", "--max-parts", "3", "--part-memory", "20M"]);
    bench.does(&["checkpoint", "m", "--to", &kept]);
    let again = |args: &[&'static str]| -> Vec<String> {
        let of = ["restore", "m", "--from", &kept, "--as", "twin"].map(str::to_owned);
        of.into_iter()
            .chain(args.iter().map(|it| (*it).to_owned()))
            .collect()
    };
    let restore = |args: &[&'static str]| {
        let args = again(args);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        bench.keel(&args)
    };
    // Automatically for its size; and on request.
    for (args, nodes) in [
        (&[][..], &["a", "b", "c"][..]),
        (&["--nodes", "b,c,c"], &["b", "c", "c"]),
        (&["--on", "c", "--nodes", "a,b"], &["c", "a", "b"]),
    ] {
        let (done, text) = restore(args);
        assert!(done, "{text}");
        goes_on("twin", nodes).await;
        bench.does(&["kill", "twin"]);
        bench.does(&["rm", "twin"]);
    }
    // It cannot be on one node, nor on two; but its parts may be on others.
    let (done, text) = restore(&[]);
    assert!(done, "{text}");
    bench.does(&["span", "twin", "--nodes", "b,b,c"]);
    bench.does(&["span", "twin", "--nodes", "b,b"]);
    goes_on("twin", &["a", "b", "b"]).await;
    bench.does(&["kill", "twin"]);
    bench.does(&["rm", "twin"]);
    for (args, why) in [
        (&["--nodes", "x"][..], "no node"),
        (&["--nodes", "a"], "all of it would be on a"),
        (&["--nodes", "b", "--warm"], "--warm"),
    ] {
        let (done, text) = restore(args);
        assert!(!done && text.contains(why), "{text}");
    }
    let limited = ["set", "m", "--cpu", "0.5"];
    bench.fails(&limited, "applies on one node only");
    // While its memory is still being read it cannot be resumed, but it can be stopped.
    let waits = bench
        .cluster
        .failpoint("a", "spanning-start.spans", Some("delay(3000)"));
    waits.await.expect("an order");
    let (done, text) = restore(&["--detach"]);
    assert!(done, "{text}");
    wait_for("it has parts", || async {
        let (_, text) = bench.keel(&["-o", "json", "parts", "twin"]);
        let parts: Vec<keel_api::PartInfo> = serde_json::from_str(&text).ok()?;
        (parts.len() == 3).then_some(())
    })
    .await
    .expect("parts");
    bench.fails(&["unspan", "twin"], "its memory is still to come");
    bench.fails(&["checkpoint", "twin"], "no machine runs here");
    bench.does(&["stop", "twin"]);
    assert_eq!(bench.inspect("twin").await.status, "stopped");
    bench.does(&["rm", "twin"]);
    let done = bench
        .cluster
        .failpoint("a", "spanning-start.spans", None)
        .await;
    done.expect("no order");
    // Its process is lost: it restarts from the checkpoint, on several nodes at once.
    bench.cluster.kill_worker("a", "m").expect("a worker");
    wait_for("it runs again", || async {
        let info = bench.inspect("m").await;
        (info.status == "running" && info.restarts == 1).then_some(())
    })
    .await
    .expect("it runs");
    let spans = bench.parts("m").parts.len();
    assert_eq!(spans, 3);
    goes_on("m", &["a", "b", "c"]).await;
    bench.does(&["kill", "m"]);
    bench.no_parts().await;
}

/// A machine that is larger than the limit of a part moves, part by part and home by home, while
/// it runs and prints; the limit of each part holds throughout.
#[tokio::test(flavor = "multi_thread")]
async fn the_home_of_what_is_larger_than_a_part_moves() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("writer");
    run(&bench, &Guest::new("m", "a", &module, &["48", "20"])).await;
    let lines = async || -> u64 {
        let text = bench.cluster.output("a", "m").await.unwrap_or_default();
        check_numbered(&text, 0).expect("none is missing or repeated")
    };
    let goes_on = async || {
        let before = lines().await;
        wait_for("it continues", || async {
            (lines().await > before + 3).then_some(())
        })
        .await
        .expect("it continues");
    };
    goes_on().await;
    bench.does(&["set", "m", "--max-parts", "4", "--part-memory", "20M"]);
    bench.does(&["span", "m", "--nodes", "b,b,c"]);
    goes_on().await;
    let on = || {
        let parts = bench.parts("m").parts.into_iter();
        let mut nodes: Vec<String> = parts.map(|part| part.node).collect();
        nodes[1..].sort();
        nodes
    };
    for (to, nodes) in [
        ("c", ["c", "a", "b", "b"]),
        ("a", ["a", "b", "b", "c"]),
        ("b", ["b", "a", "b", "c"]),
    ] {
        bench.does(&["move", "m", "--to", to]);
        // All parts know their limit at once, including a new one.
        let keep = || {
            let parts = bench.parts("m").parts.into_iter();
            let keep = parts.map(|part| part.memory.and_then(|it| it.limit_bytes));
            keep.collect::<Vec<Option<u64>>>()
        };
        wait_for("its parts are where they were", || async {
            (on() == nodes && keep() == [Some(20 << 20); 4]).then_some(())
        })
        .await
        .unwrap_or_else(|error| panic!("{error}: {:?}, {:?}", on(), keep()));
        goes_on().await;
        for part in bench.parts("m").parts {
            let mib = part.memory.expect("its memory").resident_bytes >> 20;
            assert!(mib <= 24, "{mib} MiB on {}", part.node);
        }
    }
    // Its home's node is drained, and holds none of its memory any more.
    bench.does(&["drain", "b"]);
    wait_for("nothing of it is there", || async {
        (!on().contains(&"b".to_owned())).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {:?}, {}", on(), bench.does(&["why", "m"])));
    goes_on().await;
    assert_eq!(bench.inspect("m").await.restarts, 0);
    bench.does(&["kill", "m"]);
    bench.no_parts().await;
}

/// Parts are added and removed while it runs, with their threads and memory, also after restarts
/// of their agents, or of the home's.
#[tokio::test(flavor = "multi_thread")]
async fn parts_come_and_go_while_it_runs() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    // It must run longer than the steps below, each of which waits for an agent.
    let args = ["5", "2000000"];
    run(&bench, &Guest::new("m", "a", &module, &args)).await;
    run(&bench, &Guest::new("alone", "b", &module, &args)).await;
    let on = || {
        let parts = bench.parts("m").parts.into_iter();
        parts.map(|part| part.node).collect::<Vec<String>>()
    };
    let threads = |node: &str| {
        let threads = bench.parts("m").threads.into_iter();
        threads.filter(|thread| thread.node == node).count()
    };
    bench.does(&["span", "m", "--nodes", "b"]);
    let members = [["m/thread/1", "b"], ["m/thread/2", "b"]];
    for [thread, to] in members {
        bench.does(&["move", thread, "--to", to]);
    }
    wait_for("they are there", || async {
        (threads("b") == 2).then_some(())
    })
    .await
    .expect("they are");
    // One more part; then one is removed, and its threads move to the home; then another node's is
    // removed, and there are two on one node.
    let said = bench.does(&["span", "m", "--nodes", "b,c"]);
    assert!(said.contains("spans a, b, c"), "{said}");
    bench.does(&["move", "m/thread/3", "--to", "c"]);
    assert_eq!(threads("b"), 2);
    bench.does(&["span", "m", "--nodes", "c"]);
    assert_eq!(on(), ["a", "c"]);
    assert_eq!(threads("b"), 0);
    assert_eq!(bench.cluster.parts_of("b"), 0);
    // It has that placement already.
    bench.does(&["span", "m", "--nodes", "a,c"]);
    for agent in ["c", "a"] {
        bench.cluster.kill_agent(agent).expect("an agent");
        bench
            .cluster
            .wait_alive(agent)
            .await
            .expect("it is alive again");
    }
    // The store has a new leader first.
    wait_for("its parts are changed", || async {
        let (done, _) = bench.keel(&["span", "m", "--nodes", "b,b,c"]);
        done.then_some(())
    })
    .await
    .expect("parts");
    let mut nodes = on();
    nodes.sort();
    assert_eq!(nodes, ["a", "b", "b", "c"]);
    // A replacement gets the threads of the part that it replaces.
    bench.does(&["move", "m/thread/4", "--to", "c"]);
    wait_for("it is there", || async { (threads("c") > 0).then_some(()) })
        .await
        .expect("it is");
    bench.does(&["span", "m", "--nodes", "b"]);
    assert_eq!(on(), ["a", "b"]);
    bench.does(&["move", "m/thread/4", "--to", "b"]);
    wait_for("it is there", || async { (threads("b") > 0).then_some(()) })
        .await
        .expect("it is");
    bench.does(&["span", "m", "--nodes", "c"]);
    assert_eq!(on(), ["a", "c"]);
    assert!(threads("c") > 0);
    bench.does(&["unspan", "m"]);
    bench.no_parts().await;
    for machine in ["m", "alone"] {
        let info = bench.cluster.wait_end("a", machine).await.expect("its end");
        assert_eq!(info.status, "exited (0)", "{info:?}");
    }
    let outputs = [
        bench.cluster.output("a", "m").await.expect("output"),
        bench.cluster.output("b", "alone").await.expect("output"),
    ];
    assert_eq!(outputs[0], outputs[1]);
}

/// Losses while a part is added, or after one was removed: the machine continues with its parts,
/// or, if its home was lost, ends as at any time.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_lost_while_parts_come_and_go() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    run(&bench, &Guest::new("m", "a", &module, &["3", "40000000"])).await;
    bench.does(&["span", "m", "--nodes", "b"]);
    let order = async |name: &str, order: Option<&str>| {
        let done = bench.cluster.failpoint("a", name, order).await;
        done.expect("an order");
    };
    let has = || {
        let parts = bench.parts("m").parts.into_iter();
        parts.map(|part| part.node).collect::<Vec<String>>()
    };
    order("parts.known", Some("error")).await;
    bench.fails(&["span", "m", "--nodes", "b,c"], "parts.known");
    order("parts.known", None).await;
    assert_eq!(has(), ["a", "b"]);
    wait_for("nothing of it is left", || async {
        (bench.cluster.parts_of("c") == 0).then_some(())
    })
    .await
    .expect("no part");
    // The owner's agent: the new part never joins, and it ends.
    order("parts.known", Some("kill")).await;
    let (done, text) = bench.keel(&["span", "m", "--nodes", "b,c"]);
    assert!(!done, "{text}");
    bench
        .cluster
        .wait_alive("a")
        .await
        .expect("it is alive again");
    wait_for("nothing of it is left", || async {
        (bench.cluster.parts_of("c") == 0).then_some(())
    })
    .await
    .expect("no part");
    wait_for("its parts are told of", || async {
        let (done, _) = bench.keel(&["parts", "m"]);
        done.then_some(())
    })
    .await
    .expect("parts");
    assert_eq!(has(), ["a", "b"]);
    assert_eq!(bench.inspect("m").await.status, "running");
    // A second attempt succeeds. The store has a new leader first.
    wait_for("it has parts on both", || async {
        let (done, _) = bench.keel(&["span", "m", "--nodes", "b,c"]);
        done.then_some(())
    })
    .await
    .expect("parts");
    assert_eq!(has(), ["a", "b", "c"]);
    // The answer is lost: the result is visible.
    order("parts.gone", Some("error")).await;
    bench.fails(&["span", "m", "--nodes", "c"], "parts.gone");
    order("parts.gone", None).await;
    assert_eq!(has(), ["a", "c"]);
    bench.does(&["span", "m", "--nodes", "b,c"]);
    // The home: the machine ends, with all its parts.
    order("parts.gone", Some("kill")).await;
    bench.fails(
        &["span", "m", "--nodes", "c"],
        "the machine's process here: it has ended meanwhile",
    );
    let info = bench.cluster.wait_end("a", "m").await.expect("its end");
    assert!(
        info.status.starts_with("lost") || info.status.starts_with("failed"),
        "{info:?}"
    );
    bench.no_parts().await;
}

/// Memory moves: it is present at the target only, and returns when it is used.
#[tokio::test(flavor = "multi_thread")]
async fn memory_is_given_to_other_nodes() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("writer");
    // 48 MiB, of which it continuously writes and checks a little.
    run(&bench, &Guest::new("m", "a", &module, &["48", "1"])).await;
    bench.does(&["span", "m", "--nodes", "b"]);
    let objects = || -> Vec<ObjectInfo> {
        let text = bench.does(&["-o", "json", "objects", "m"]);
        serde_json::from_str(&text).expect("JSON")
    };
    let on = |node: &str| -> u64 {
        let all = objects();
        let there = all.iter().filter(|object| object.node == node);
        there.map(|object| object.bytes).sum()
    };
    wait_for("its memory is there", || async {
        (on("a") > 48 << 20).then_some(())
    })
    .await
    .expect("memory");
    let largest = objects().into_iter().max_by_key(|object| object.bytes);
    let (_, start, bytes) = object_range(&largest.expect("memory").range).expect("a range");
    assert!(bytes > 40 << 20, "{bytes}");
    let name = object_range_name(0, start, 32 << 20);
    let held = |node: &str| bench.cluster.memory_of(node);
    let before = held("a");
    let said = bench.does(&["move", &format!("m/objects/{name}"), "--to", "b"]);
    assert!(said.contains("32.0"), "{said}");
    // Pages that it writes and checks return one by one.
    let (home, member, there) = (held("a"), held("b"), on("b"));
    assert!(there > 1 << 20, "{there}");
    assert!(member > 1 << 20, "{member}");
    assert!(home < before, "{home} of {before}");
    // The directory is on the node that holds the memory, also for pages that returned.
    wait_for("its directory is there, too", || async {
        let known = objects().into_iter();
        let known = known.filter(|object| object.directory == "b");
        (known.map(|object| object.bytes).sum::<u64>() >= (32 << 20) - (64 << 10)).then_some(())
    })
    .await
    .expect("its directory");
    let said = bench.does(&["shake", "m", "--for", "3s", "--rate", "40", "--seed", "3"]);
    assert!(said.contains("moves of threads"), "{said}");
    bench.does(&["unspan", "m"]);
    bench.no_parts().await;
    // It has checked all of it meanwhile, and continues.
    let output = bench.cluster.output("a", "m").await.expect("output");
    let lines = check_numbered(&output, 0).expect("none missing");
    wait_for("it continues", || async {
        let output = bench.cluster.output("a", "m").await.ok()?;
        (check_numbered(&output, 0).ok()? > lines + 3).then_some(())
    })
    .await
    .expect("it continues");
    assert_eq!(bench.inspect("m").await.status, "running");
    bench.does(&["kill", "m"]);
}

/// A program that names its memory, and the preferences of its threads: both are reported, survive
/// a move and a checkpoint, and named objects move by name.
#[tokio::test(flavor = "multi_thread")]
async fn objects_have_names() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    // 1 MiB each from 1 MiB on; a thread prefers the second.
    let text = r#"(module
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (import "evenkeel" "object" (func $object (param i32 i32 i32 i32) (result i32)))
        (import "evenkeel" "prefer" (func $prefer (param i32 i32) (result i32)))
        (memory (export "memory") 64 64 shared)
        (data (i32.const 16) "rowscacheno")
        (func $right (param i32 i32)
            (if (i32.ne (local.get 0) (local.get 1)) (then (call $exit (i32.const 3)))))
        (func (export "wasi_thread_start") (param i32 i32)
            (call $right (call $prefer (i32.const 20) (i32.const 5)) (i32.const 0))
            (call $right (call $prefer (i32.const 25) (i32.const 2)) (i32.const 44))
            (loop $on
                (drop (i32.atomic.rmw.add (i32.const 0x200000) (i32.const 1)))
                (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const 5000000)))
                (br $on)))
        (func (export "_start")
            (call $right (call $object (i32.const 16) (i32.const 4)
                (i32.const 0x100000) (i32.const 0x100000)) (i32.const 0))
            (call $right (call $object (i32.const 20) (i32.const 5)
                (i32.const 0x200000) (i32.const 0x100000)) (i32.const 0))
            (call $right (call $object (i32.const 16) (i32.const 4)
                (i32.const 0x300000) (i32.const 0x100001)) (i32.const 21))
            (call $right (call $object (i32.const 16) (i32.const 65)
                (i32.const 0) (i32.const 1)) (i32.const 28))
            (memory.fill (i32.const 0x100000) (i32.const 7) (i32.const 0x200000))
            (drop (call $spawn (i32.const 0)))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#;
    let module = wat::parse_str(text).expect("a module");
    run(&bench, &Guest::new("m", "a", &module, &[])).await;
    let nodes_of = |name: &str| -> Vec<(String, u64)> {
        let text = bench.does(&["-o", "json", "objects", "m"]);
        let all: Vec<ObjectInfo> = serde_json::from_str(&text).expect("JSON");
        let named = all
            .into_iter()
            .filter(|it| it.name.as_deref() == Some(name));
        named.map(|it| (it.node, it.bytes >> 10)).collect()
    };
    let likes = || bench.does(&["threads", "m"]).contains("cache");
    wait_for("both have names", || async {
        (nodes_of("rows") == [("a".into(), 1024)] && likes()).then_some(())
    })
    .await
    .expect("all have them");
    bench.does(&["span", "m", "--nodes", "b"]);
    let said = bench.does(&["move", "m/objects/rows", "--to", "b"]);
    assert!(said.contains("1.00 MiB"), "{said}");
    assert_eq!(nodes_of("rows"), [("b".into(), 1024)]);
    assert_eq!(nodes_of("cache").first().map(|it| it.0.as_str()), Some("a"));
    // All of it, by parts; and the largest object only.
    let parts = bench.does(&["-o", "name", "objects", "m", "--summary"]);
    assert_eq!(parts.lines().collect::<Vec<_>>(), ["0", "1"]);
    let text = bench.does(&["-o", "json", "objects", "m", "--by", "bytes", "--top", "1"]);
    let largest: Vec<ObjectInfo> = serde_json::from_str(&text).expect("JSON");
    let (all, largest) = (nodes_of("rows"), largest.first().map(|it| it.bytes >> 10));
    assert!(largest >= all.iter().map(|it| it.1).max(), "{largest:?}");
    bench.fails(&["objects", "m", "--by", "colour"], "waits");
    bench.fails(&["objects", "m", "--summary", "--top", "1"], "--summary");
    bench.fails(&["move", "m/objects/columns", "--to", "b"], "calls nothing");
    bench.fails(&["move", "m/objects/-x", "--to", "b"], "neither a range");
    bench.fails(&["move", "m/objects/rows", "--to", "c"], "no part on");
    // Names move with the machine.
    bench.does(&["unspan", "m"]);
    bench.does(&["move", "m", "--to", "c"]);
    assert_eq!(nodes_of("rows"), [("c".into(), 1024)]);
    let kept = folder.path().join("kept").display().to_string();
    bench.does(&["checkpoint", "m", "--to", &kept]);
    bench.does(&["kill", "m"]);
    bench.does(&["rm", "m"]);
    bench.does(&["restore", "m", "--from", &kept, "--on", "c"]);
    assert_eq!(nodes_of("cache"), [("c".into(), 1024)]);
    assert!(likes());
    bench.does(&["kill", "m"]);
}

/// Two threads on two nodes increment two words in one page, and both one word in another.
#[tokio::test(flavor = "multi_thread")]
async fn pages_that_are_shared_falsely_are_told_apart() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let text = r#"(module
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (memory (export "memory") 64 64 shared)
        (func (export "wasi_thread_start") (param $tid i32) (param $arg i32)
            (loop $on
                (drop (i32.atomic.rmw.add
                    (i32.add (i32.const 0x100000) (i32.shl (local.get $arg) (i32.const 11)))
                    (i32.const 1)))
                (drop (i32.atomic.rmw.add (i32.const 0x200000) (i32.const 1)))
                (drop (i32.atomic.rmw.add
                    (i32.add (i32.const 0x300000) (i32.shl (local.get $arg) (i32.const 12)))
                    (i32.const 1)))
                (br $on)))
        (func (export "_start")
            (drop (call $spawn (i32.const 0)))
            (drop (call $spawn (i32.const 1)))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#;
    let module = wat::parse_str(text).expect("a module");
    run(&bench, &Guest::new("m", "a", &module, &[])).await;
    let objects = || -> Vec<ObjectInfo> {
        let text = bench.does(&["-o", "json", "objects", "m"]);
        serde_json::from_str(&text).expect("JSON")
    };
    // On one node there are no waits.
    let alone = objects();
    assert!(alone.iter().all(|it| (it.waits, it.shared_pages) == (0, 0)));
    bench.does(&["span", "m", "--nodes", "b"]);
    bench.does(&["move", "m/thread/2", "--to", "b"]);
    // One page each: the number of shared and of falsely shared ones.
    let told = |at: u64| {
        let object = objects().into_iter().find(|it| {
            let range = object_range(&it.range).expect("a range");
            range.0 == 0 && (range.1..range.1 + range.2).contains(&at)
        });
        let object = object.expect("it is somewhere");
        let is_waited_for = object.waits > 20;
        (
            is_waited_for,
            object.shared_pages,
            object.falsely_shared_pages,
        )
    };
    let said = || bench.does(&["objects", "m"]);
    wait_for("they are told apart", || async {
        let all = [0x10_0000, 0x20_0000, 0x30_0000, 0x30_1000].map(told);
        let expected = [(true, 1, 1), (true, 1, 0), (false, 0, 0), (false, 0, 0)];
        (all == expected).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {}", said()));
    assert!(said().contains("1, 1 falsely"), "{}", said());
    bench.does(&["kill", "m"]);
}

/// The loss of any part at any moment: the machine ends with the name of the lost part, restarts
/// if its policy says so, and no process remains.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_part_is_the_machines_end() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("threads");
    let args = ["4", "4000000"];
    run(&bench, &Guest::new("m", "a", &module, &args)).await;
    bench.does(&["span", "m", "--nodes", "b,c"]);
    bench.does(&["move", "m/thread/1", "--to", "c"]);
    assert_eq!(bench.cluster.kill_parts("c"), 1);
    let info = bench.cluster.wait_end("a", "m").await.expect("its end");
    assert_eq!(info.status, "failed");
    let message = info.message.unwrap_or_default();
    assert!(
        message.contains("part 2 is lost") && message.contains("node c"),
        "{message}"
    );
    bench.no_parts().await;
    // Its home: the other parts end with it.
    let mut again = Guest::new("again", "a", &module, &args);
    again.restart = Restart::OnFailure;
    run(&bench, &again).await;
    bench.does(&["span", "again", "--nodes", "b,c"]);
    bench.cluster.kill_worker("a", "again").expect("a worker");
    bench.no_parts().await;
    // It restarts; and once more, while a member is stopped during the start.
    wait_for("it runs again", || async {
        let info = bench.inspect("again").await;
        (info.status == "running" && info.restarts == 1).then_some(())
    })
    .await
    .expect("it runs");
    bench.cluster.stop_agent("c", true).expect("an agent");
    let spans = async {
        let folder = bench.folder.clone();
        tokio::task::spawn_blocking(move || {
            Command::new(KEEL)
                .arg("--state-dir")
                .arg(folder.join("a"))
                .args(["span", "again", "--nodes", "b,c"])
                .output()
        })
        .await
    };
    let wakes = async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        bench.cluster.wake("c");
    };
    let (spans, ()) = tokio::join!(spans, wakes);
    // It may have waited, or have replaced that node; it is complete in both cases.
    let spans = spans.expect("a task").expect("keel runs").status.success();
    let parts = bench.parts("again").parts.len();
    assert_eq!(parts, if spans { 3 } else { 1 });
    assert_eq!(bench.inspect("again").await.status, "running");
    bench.does(&["stop", "again"]);
    bench.no_parts().await;
}

/// A node is disconnected silently: both sides detect it in time, and end their parts.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_cut_off_is_a_lost_part() {
    let network = match Network::new(&NODES) {
        Ok(network) => network,
        Err(error) => {
            eprintln!("skipped: no networks can be made here ({error:#})");
            return;
        }
    };
    let folder = folder();
    let bench = Bench::new_in(folder.path(), Some(network)).await;
    let module = guest("threads");
    run(&bench, &Guest::new("m", "a", &module, &["4", "4000000"])).await;
    bench.does(&["span", "m", "--nodes", "b,c"]);
    bench.does(&["move", "m/thread/1", "--to", "c"]);
    bench.does(&["move", "m/thread/2", "--to", "b"]);
    let network = bench.cluster.network().expect("a network");
    network.cut("c", true).expect("it is cut off");
    let info = bench.cluster.wait_end("a", "m").await.expect("its end");
    assert_eq!(info.status, "failed");
    let message = info.message.unwrap_or_default();
    assert!(message.contains("part 2 is lost"), "{message}");
    // On the other side, too.
    bench.no_parts().await;
    network.cut("c", false).expect("it is joined again");
}
