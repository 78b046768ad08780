//! Machines with parts on several nodes, in clusters of real processes: their results are the same
//! as on one node while parts are added and removed and threads move; a lost part ends them with a
//! reason, and no process remains.

mod memory;

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
    let args = ["6", "1000000"];
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
        // The request may be carried out only now, on a busy computer: it is asked again then.
        wait_for("it is alone", || async {
            let (_, text) = bench.keel(&["unspan", "m"]);
            let there = bench.cluster.parts_of("b") + bench.cluster.parts_of("c");
            (bench.parts("m").parts.len() == 1 && there == 0).then_some(text)
        })
        .await
        .expect("it is alone");
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
