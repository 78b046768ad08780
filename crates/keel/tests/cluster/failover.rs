//! High availability: machines of a node that fails run on elsewhere, from their checkpoint, and
//! never twice. The witness writes numbered lines with its epoch into a file that all nodes see:
//! two live copies would write a number twice under one epoch, or an older epoch after a newer one.

use keel_api::{MachineInfo, NodeInfo};
use keel_machine::high_availability::{Fence, HighAvailability};
use keel_machine::moves::Ending;
use keel_store::Backup;
use keel_testkit::witness::{Evidence, examine};
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NODES: [&str; 3] = ["a", "b", "c"];
/// Of the witness's memory.
const MIB: &str = "64";

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

/// A folder for a cluster.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

/// What a command says about the node in a folder.
fn keel(state: &Path, args: &[&str]) -> String {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(state)
        .args(args)
        .output()
        .expect("keel runs");
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

/// Replaces a program by one whose agents do not start while there is a file.
fn replace_by_one_that_waits(program: &Path, file: &Path) {
    let (new, file) = (program.with_extension("new"), file.display());
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = agent ]; then while [ -e '{file}' ]; do sleep 0.1; done; fi\n\
         exec '{KEEL}' \"$@\"\n"
    );
    std::fs::write(&new, text).expect("a script");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&new, executable).expect("it is executable");
    std::fs::rename(&new, program).expect("it is put in place");
}

impl Bench {
    async fn new() -> Self {
        Self::with(folder(), Path::new(KEEL)).await
    }

    async fn with(folder: tempfile::TempDir, program: &Path) -> Self {
        std::fs::create_dir(folder.path().join("shared")).expect("a folder");
        let cluster = LocalCluster::start_replicated(program, folder.path(), &NODES).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder,
        }
    }

    fn shared(&self) -> PathBuf {
        self.folder.path().join("shared")
    }

    fn keel(&self, node: &str, args: &[&str]) -> String {
        keel(&self.cluster.folder(node), args)
    }

    /// Starts a witness with high availability, and waits until another node has its checkpoint.
    async fn witness(&self, name: &str, node: &str) {
        self.witness_fenced(name, node, Fence::Timer).await;
    }

    async fn witness_fenced(&self, name: &str, node: &str, fence: Fence) {
        let file = self.shared().join(name).display().to_string();
        let (module, shared) = (guest("witness"), self.shared());
        let args = [file.as_str(), MIB, "1000"];
        let machine = Guest {
            volume: Some(&shared),
            ha: Some(HighAvailability {
                checkpoint_every_ms: 1000,
                fence,
                ..HighAvailability::default()
            }),
            ..Guest::new(name, node, &module, &args)
        };
        self.cluster.run(&machine).await.expect("it starts");
        self.in_sync(node, name).await;
    }

    /// Waits until the machine's node and another one have its checkpoint.
    async fn in_sync(&self, node: &str, name: &str) {
        wait_for("another node has its checkpoint", || async {
            let machine = self.cluster.inspect(node, name).await.ok()?;
            let is_there = machine.in_sync.iter().any(|member| *member != node);
            (is_there && machine.in_sync.iter().any(|member| member == node)).then_some(())
        })
        .await
        .expect("it is copied");
    }

    fn evidence(&self, name: &str) -> Evidence {
        let text = std::fs::read_to_string(self.shared().join(name)).unwrap_or_default();
        examine(&text).expect("one copy wrote")
    }

    /// Waits until a witness has written this many lines more.
    async fn writes_on(&self, name: &str, lines: u64) {
        let before = self.evidence(name).lines;
        wait_for(&format!("{name} writes"), || async {
            (self.evidence(name).lines >= before + lines).then_some(())
        })
        .await
        .expect("it writes on");
    }

    /// Waits until a witness writes under a later epoch than before.
    async fn fails_over(&self, name: &str, epochs: u64) {
        wait_for(&format!("{name} runs elsewhere"), || async {
            (self.evidence(name).epochs > epochs).then_some(())
        })
        .await
        .expect("it is restarted");
    }

    async fn machine(&self, ask: &str, name: &str) -> MachineInfo {
        self.cluster.inspect(ask, name).await.expect("it is known")
    }
}

fn other(than: &[&str]) -> &'static str {
    let mut others = NODES.into_iter().filter(|node| !than.contains(node));
    others.next().expect("another node")
}

/// The next agent takes longer to start than a lease lasts.
#[tokio::test(flavor = "multi_thread")]
async fn machines_run_on_while_their_agent_is_restarted_on_request() {
    let folder = folder();
    let waits = folder.path().join("waits");
    let program = folder.path().join("keel");
    std::fs::copy(KEEL, &program).expect("a copy of the binary");
    let bench = Bench::with(folder, &program).await;
    replace_by_one_that_waits(&program, &waits);
    bench.witness("w", "c").await;
    let before = bench.machine("b", "w").await;
    std::fs::write(&waits, "").expect("a file");
    let state = bench.cluster.folder("c");
    let socket = state.join("api.socket");
    let reload = std::thread::spawn(move || keel(&state, &["reload"]));
    wait_for("the agent ends", || async {
        let refused = std::os::unix::net::UnixStream::connect(&socket).is_err();
        refused.then_some(())
    })
    .await
    .expect("it ends");
    // Each takes a millisecond or more: in all longer than a lease.
    bench.writes_on("w", 3000).await;
    assert!(!reload.is_finished(), "{:?}", reload.join());
    let nodes: Vec<NodeInfo> = bench
        .cluster
        .client("a")
        .get("/v1/nodes")
        .await
        .expect("nodes");
    let is_alive = |node: &NodeInfo| node.name == "c" && node.alive;
    assert!(nodes.iter().any(is_alive), "{nodes:?}");
    std::fs::remove_file(&waits).expect("a file");
    let said = reload.join().expect("keel runs");
    assert!(said.contains("node c has a new agent"), "{said}");
    assert!(said.contains("1 machine ran on"), "{said}");
    let after = bench.machine("b", "w").await;
    assert_eq!((after.node, after.epoch), (before.node, before.epoch));
    let evidence = bench.evidence("w");
    assert_eq!((evidence.epochs, evidence.rewinds), (1, 0), "{evidence:?}");
    // The node's usual lease counts again: an agent that is missed now is missed at once.
    bench.writes_on("w", 100).await;
    std::fs::write(&waits, "").expect("a file");
    bench.cluster.kill_agent("c").expect("an agent");
    bench.fails_over("w", 1).await;
    std::fs::remove_file(&waits).expect("a file");
    bench.cluster.wait_alive("c").await.expect("a node");
}

/// Also of the node that leads the store, and of the one that began the cluster.
#[tokio::test(flavor = "multi_thread")]
async fn machines_of_a_node_that_fails_run_on_from_their_checkpoint() {
    let mut bench = Bench::new().await;
    bench.witness("w", "c").await;
    for round in 0..3 {
        bench.writes_on("w", 100).await;
        let leader = bench.cluster.wait_voters("b", 3).await.expect("a leader");
        let target = if round == 0 { "a" } else { leader.as_str() };
        if bench.machine("b", "w").await.node != target {
            let report = bench.cluster.move_machine("b", "w", target).await;
            let report = report.expect("a report");
            assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        }
        bench.in_sync(target, "w").await;
        bench.writes_on("w", 100).await;
        let before = bench.evidence("w");
        let begun = Instant::now();
        bench.cluster.power_off(target);
        bench.fails_over("w", before.epochs).await;
        println!("{target} off: it writes again after {:?}", begun.elapsed());
        bench.writes_on("w", 100).await;
        let after = bench.evidence("w");
        assert_eq!(after.rewinds, before.rewinds + 1);
        let there = other(&[target]);
        let machine = bench.machine(there, "w").await;
        assert_ne!(machine.node, target);
        let events = bench.keel(there, &["events", "--limit", "200"]);
        assert!(events.contains("machine-failed-over"), "{events}");
        let log = bench.keel(there, &["logs", "w"]);
        assert!(log.contains(&format!("its node {target} failed")), "{log}");

        bench.cluster.power_on(target).await.expect("it comes back");
        bench.writes_on("w", 200).await;
        assert_eq!(bench.cluster.workers_of(target, "w"), 0);
        assert_eq!(bench.evidence("w").rewinds, after.rewinds);
    }
}

/// The node that restarts it has a damaged copy, and a third one an intact one.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_copy_of_a_checkpoint_is_fetched_again() {
    let mut bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.writes_on("w", 100).await;
    bench.keel(
        "c",
        &["set", "w", "--ha=checkpoint=5s,fence=timer,replicas=2"],
    );
    wait_for("all nodes have its checkpoint", || async {
        let machine = bench.cluster.inspect("a", "w").await.ok()?;
        (machine.in_sync.len() == NODES.len()).then_some(())
    })
    .await
    .expect("it is copied");
    let before = bench.evidence("w");
    // Before the next checkpoint: a node that is being drained is given no copy of it.
    bench.keel("a", &["drain", "a"]);
    bench.cluster.power_off("c");
    let copy = bench.cluster.folder("b").join("replicas/machines/w");
    let mut damaged = 0;
    for entry in std::fs::read_dir(copy).expect("its copy") {
        let path = entry.expect("a file").path();
        if path.extension().is_some_and(|it| it == "pack") {
            let mut bytes = std::fs::read(&path).expect("a pack");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes).expect("it is damaged");
            damaged += 1;
        }
    }
    assert!(damaged > 0);
    bench.fails_over("w", before.epochs).await;
    bench.writes_on("w", 100).await;
    assert_eq!(bench.evidence("w").rewinds, before.rewinds + 1);
    assert_eq!(bench.machine("a", "w").await.node, "b");
    let events = bench.keel("a", &["events", "--limit", "200"]);
    assert!(events.contains("is fetched again"), "{events}");
}

/// The agent is back before its node's lease ends.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_is_no_reason_for_a_failover() {
    let bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.writes_on("w", 100).await;
    let before = bench.evidence("w");
    for _ in 0..4 {
        bench.cluster.kill_agent("c").expect("it is killed");
        bench.cluster.wait_alive("c").await.expect("it is back");
        bench.writes_on("w", 500).await;
    }
    let after = bench.evidence("w");
    assert_eq!(
        (after.rewinds, after.epochs),
        (before.rewinds, before.epochs)
    );
}

/// Its source has all of it, which is newer than any checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_on_arrival_at_a_node_that_fails_goes_on_at_its_source() {
    let mut bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.writes_on("w", 100).await;
    let before = bench.evidence("w");
    // The commit is applied, and the target does not resume it: neither told by the source, nor
    // because it sees the commit.
    for (node, name, action) in [
        ("c", "move.go", "delay(1500)"),
        ("b", "target.go", "delay(60000)"),
    ] {
        let held = bench.cluster.failpoint(node, name, Some(action));
        held.await.expect("a failpoint");
    }
    let client = bench.cluster.client("c");
    let moving = tokio::spawn(async move { keel_testkit::move_by(&client, "w", "b").await });
    wait_for("the commit is applied", || async {
        let passed = bench.cluster.failpoints_passed("c");
        passed.iter().any(|name| name == "move.go").then_some(())
    })
    .await
    .expect("it moves");
    bench.cluster.power_off("b");
    bench.writes_on("w", 100).await;
    let after = bench.evidence("w");
    assert_eq!(after.rewinds, before.rewinds, "nothing is undone");
    assert_eq!(after.epochs, before.epochs + 1);
    assert_eq!(bench.machine("c", "w").await.node, "c");
    moving.abort();
}

/// The move that was in progress ends after the failover: then nobody needs the process any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_on_its_way_from_a_node_that_fails_leaves_no_process_behind() {
    let bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.writes_on("w", 100).await;
    let before = bench.evidence("w");
    let members = bench.machine("c", "w").await.in_sync;
    let without = NODES
        .into_iter()
        .find(|node| !members.iter().any(|it| it == node));
    let target = without.expect("a node without its checkpoint");
    let held = bench
        .cluster
        .failpoint("c", "source.round", Some("delay(7000)"));
    held.await.expect("a failpoint");
    let client = bench.cluster.client("c");
    let moving = tokio::spawn(async move { keel_testkit::move_by(&client, "w", target).await });
    wait_for("it copies", || async {
        let passed = bench.cluster.failpoints_passed("c");
        passed
            .iter()
            .any(|name| name == "source.round")
            .then_some(())
    })
    .await
    .expect("it moves");
    bench.cluster.stop_agent("c", true).expect("it stops");
    bench.fails_over("w", before.epochs).await;
    bench.cluster.stop_agent("c", false).expect("it goes on");
    let now = bench.machine("a", "w").await.node;
    wait_for("one process is left", || async {
        let all = NODES.iter().map(|node| bench.cluster.workers_of(node, "w"));
        (all.sum::<usize>() == 1 && bench.cluster.workers_of(&now, "w") == 1).then_some(())
    })
    .await
    .expect("the others end");
    bench.writes_on("w", 100).await;
    bench.evidence("w");
    moving.abort();
}

/// What a counter printed: runs of numbers that follow each other.
fn runs(output: &str) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in output.lines().filter_map(|line| line.parse::<u64>().ok()) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    runs
}

/// Its output is whole but for what the failure undid; whoever follows it sees what was undone, and
/// then all that is printed anew.
#[tokio::test(flavor = "multi_thread")]
async fn output_survives_the_failure_of_its_node() {
    let mut bench = Bench::new().await;
    let module = guest("counter");
    let machine = Guest {
        ha: Some(HighAvailability {
            checkpoint_every_ms: 1000,
            ..HighAvailability::default()
        }),
        ..Guest::new("m", "c", &module, &["0", "1"])
    };
    bench.cluster.run(&machine).await.expect("it starts");
    bench.in_sync("c", "m").await;
    let file = bench.folder.path().join("followed");
    let mut follower = Command::new(KEEL)
        .arg("--state-dir")
        .arg(bench.cluster.folder("a"))
        .args(["logs", "-f", "m"])
        .stdout(std::fs::File::create(&file).expect("a file"))
        .spawn()
        .expect("keel runs");
    let followed = || runs(&std::fs::read_to_string(&file).unwrap_or_default());
    let mut before = 0;
    for failed in ["c", "other"] {
        // So many that several checkpoints have output.
        wait_for("it prints", || async {
            let (_, last) = *followed().last()?;
            (last > before + 1500).then_some(())
        })
        .await
        .expect("it is followed");
        let owner = bench.machine("a", "m").await.node;
        let failed = if failed == "c" { "c".to_owned() } else { owner };
        if failed == "a" {
            // The follower asks there.
            break;
        }
        let epoch = bench.machine("a", "m").await.epoch;
        bench.in_sync(&failed, "m").await;
        bench.cluster.power_off(&failed);
        wait_for("it runs elsewhere", || async {
            let machine = bench.cluster.inspect("a", "m").await.ok()?;
            (machine.epoch != epoch && machine.status == "running").then_some(())
        })
        .await
        .expect("it is restarted");
        let lines = || {
            std::fs::read_to_string(&file)
                .unwrap_or_default()
                .lines()
                .count()
        };
        let then = lines();
        wait_for("the follower sees new output", || async {
            (lines() > then + 500).then_some(())
        })
        .await
        .expect("it is followed");
        let seen = followed();
        // (Nothing is undone if the last line was in the checkpoint.)
        if let [.., (_, undone), (again, _)] = seen[..] {
            assert!(again > 0 && again <= undone, "{seen:?}");
        }
        // What is kept has no gap and no repetition, and says what happened.
        let kept = bench.keel("a", &["logs", "m"]);
        let kept_runs = runs(&kept);
        assert_eq!((kept_runs.len(), kept_runs[0].0), (1, 0), "{kept_runs:?}");
        assert!(kept.contains("restored from checkpoint"), "{kept_runs:?}");
        before = followed().last().map_or(0, |(_, last)| *last);
        bench.cluster.power_on(&failed).await.expect("it is back");
    }
    follower.kill().expect("it ends");
    follower.wait().expect("it ends");
}

/// With checkpoints in a place that all nodes see; turned on, off and on again while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn high_availability_is_turned_on_and_off_while_a_machine_runs() {
    let mut bench = Bench::new().await;
    let file = bench.shared().join("w").display().to_string();
    let (module, shared) = (guest("witness"), bench.shared());
    let args = [file.as_str(), MIB, "1000"];
    let plain = Guest {
        volume: Some(&shared),
        ..Guest::new("w", "c", &module, &args)
    };
    bench.cluster.run(&plain).await.expect("it starts");
    let place = bench.shared().join("kept").display().to_string();
    let on = format!("--ha=checkpoint=1s,fence=timer,to={place}");
    for setting in [&on[..], "--no-ha", &on] {
        let said = bench.keel("c", &["set", "w", setting]);
        assert!(said.starts_with("w: memory"), "{said}");
    }
    let elsewhere = bench.keel("c", &["set", "w", "--ha=fence=timer"]);
    assert!(elsewhere.contains("another place"), "{elsewhere}");
    let unfenced = bench.keel("c", &["set", "w", &format!("--ha=to={place}")]);
    assert!(unfenced.contains("fence = \"timer\""), "{unfenced}");
    let begun = Instant::now();
    wait_for("a checkpoint is there", || async {
        let listed = bench.keel("c", &["checkpoints", "w", "--from", &place]);
        (listed.lines().count() > 1).then_some(())
    })
    .await
    .expect("it is made");
    println!("the first checkpoint after {:?}", begun.elapsed());
    bench.writes_on("w", 100).await;
    let before = bench.evidence("w");
    assert_eq!(before.epochs, 1);
    bench.cluster.power_off("c");
    bench.fails_over("w", before.epochs).await;
    bench.writes_on("w", 100).await;
    assert_eq!(bench.evidence("w").rewinds, 1);
}

/// Its agent stands still, its machine does not: the worker holds the machine by itself, before
/// another node restarts it.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_whose_agent_stands_still_is_held_before_it_runs_elsewhere() {
    let bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.writes_on("w", 100).await;
    let before = bench.evidence("w");
    bench.cluster.stop_agent("c", true).expect("it stops");
    bench.fails_over("w", before.epochs).await;
    bench.writes_on("w", 100).await;
    // The old copy is still there, and held.
    assert_eq!(bench.cluster.workers_of("c", "w"), 1);
    bench.evidence("w");
    bench.cluster.stop_agent("c", false).expect("it goes on");
    wait_for("the old copy is gone", || async {
        (bench.cluster.workers_of("c", "w") == 0).then_some(())
    })
    .await
    .expect("its agent ends it");
    bench.writes_on("w", 200).await;
    assert_eq!(bench.evidence("w").rewinds, before.rewinds + 1);
}

/// Neither gets any processor time: the kernel kills the worker when the lease ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_is_killed_when_the_lease_ends() {
    let bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.writes_on("w", 100).await;
    let before = bench.evidence("w");
    bench.cluster.stop_agent("c", true).expect("it stops");
    bench.cluster.stop_worker("c", "w", true).expect("it stops");
    wait_for("the kernel kills it", || async {
        (bench.cluster.workers_of("c", "w") == 0).then_some(())
    })
    .await
    .expect("it is killed");
    bench.fails_over("w", before.epochs).await;
    bench.cluster.stop_agent("c", false).expect("it goes on");
    bench.writes_on("w", 200).await;
    assert_eq!(bench.evidence("w").rewinds, before.rewinds + 1);
}

/// Nobody can restart machines without a quorum: they are held, and lose nothing.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_machines_are_held_and_go_on_where_they_stopped() {
    let bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.writes_on("w", 100).await;
    let before = bench.evidence("w");
    for node in ["a", "b"] {
        bench.cluster.stop_agent(node, true).expect("it stops");
    }
    // A line is due each millisecond.
    let last = std::cell::Cell::new((0, Instant::now()));
    wait_for("it is held", || async {
        let lines = bench.evidence("w").lines;
        let (before, since) = last.get();
        if lines != before {
            last.set((lines, Instant::now()));
        }
        (lines == before && since.elapsed() > Duration::from_millis(500)).then_some(())
    })
    .await
    .expect("it is held");
    for node in ["a", "b"] {
        bench.cluster.stop_agent(node, false).expect("it goes on");
    }
    bench.writes_on("w", 200).await;
    let after = bench.evidence("w");
    assert_eq!(
        (after.rewinds, after.epochs),
        (before.rewinds, before.epochs)
    );
    assert_eq!(bench.machine("c", "w").await.node, "c");
}

/// Others wait for their node.
#[tokio::test(flavor = "multi_thread")]
async fn only_machines_that_ask_for_it_are_restarted_elsewhere() {
    let mut bench = Bench::new().await;
    bench.witness("w", "c").await;
    bench.witness("safe", "c").await;
    let module = guest("counter");
    let plain = Guest::new("plain", "c", &module, &["1000000", "2"]);
    bench.cluster.run(&plain).await.expect("it starts");
    let said = bench.keel("c", &["set", "w", "--no-ha"]);
    assert!(said.starts_with("w: memory"), "{said}");
    bench.writes_on("w", 100).await;
    let before = bench.evidence("safe");
    bench.cluster.power_off("c");
    // The one that asks for it was looked at together with the others.
    bench.fails_over("safe", before.epochs).await;
    for name in ["w", "plain"] {
        let machine = bench.machine("a", name).await;
        assert_eq!(machine.node, "c", "{name}");
    }
    assert_eq!(bench.evidence("w").epochs, 1);
}

/// What no receiver refuses needs more than a lease that has ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_waits_until_the_operators_program_switched_its_node_off() {
    let mut bench = Bench::new().await;
    let (asked, is_off) = (bench.shared().join("asked"), bench.shared().join("off"));
    for node in NODES {
        let program = bench.cluster.folder(node).join("fence-node");
        let text = format!(
            "#!/bin/sh\necho $1 >> {}\necho no answer >&2\ntest -e {}\n",
            asked.display(),
            is_off.display()
        );
        std::fs::write(&program, text).expect("a program");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, mode).expect("its mode");
    }
    bench.witness_fenced("fenced", "c", Fence::Hook).await;
    bench.witness("timed", "c").await;
    let (fenced, timed) = (bench.evidence("fenced"), bench.evidence("timed"));
    bench.cluster.power_off("c");
    bench.fails_over("timed", timed.epochs).await;
    // Tried again, and nothing is done meanwhile.
    wait_for("the program was started twice", || async {
        let text = std::fs::read_to_string(&asked).ok()?;
        assert!(text.lines().all(|line| line == "c"), "{text}");
        (text.lines().count() >= 2).then_some(())
    })
    .await
    .expect("it is tried again");
    assert_eq!(bench.machine("a", "fenced").await.node, "c");
    assert_eq!(bench.evidence("fenced").epochs, fenced.epochs);
    let said = bench.keel("a", &["events", "fenced"]);
    let says =
        said.contains("it is not certain that nothing runs there") && said.contains("no answer");
    assert!(says, "{said}");
    std::fs::write(&is_off, "").expect("a switch");
    bench.fails_over("fenced", fenced.epochs).await;
}

/// A machine with parts on all nodes loses one, then its home: it goes on whole each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_parts_goes_on_whole_from_its_checkpoint() {
    let mut bench = Bench::new().await;
    let module = guest("threads");
    let args = ["4", "2000000000"];
    let machine = Guest {
        ha: Some(HighAvailability {
            checkpoint_every_ms: 1000,
            ..HighAvailability::default()
        }),
        ..Guest::new("spread", "b", &module, &args)
    };
    bench.cluster.run(&machine).await.expect("it starts");
    for is_home_lost in [false, true] {
        let home = bench.machine("a", "spread").await.node;
        let said = bench.keel("a", &["span", "spread", "--nodes", "a,b,c"]);
        assert!(said.contains("downtime"), "{said}");
        for (thread, node) in (1..).zip(NODES) {
            let thread = format!("spread/thread/{thread}");
            let said = bench.keel("a", &["move", &thread, "--to", node]);
            assert!(said.contains(&format!("runs on {node}")), "{said}");
        }
        bench.in_sync(&home, "spread").await;
        let before = bench.machine("a", "spread").await;
        let lost = match is_home_lost {
            true => home.as_str(),
            false => other(&["a", &home]),
        };
        bench.cluster.power_off(lost);
        wait_for("it runs on", || async {
            let now = bench.cluster.inspect("a", "spread").await.ok()?;
            (now.status == "running" && now.epoch != before.epoch).then_some(())
        })
        .await
        .expect("it is restarted");
        let log = bench.keel("a", &["logs", "spread"]);
        let why = match is_home_lost {
            true => format!("its node {lost} failed"),
            false => format!("(node {lost})"),
        };
        let says = log.contains(&why) && (is_home_lost || log.contains("is lost: "));
        assert!(says, "{log}");
        assert!(log.contains("restored from checkpoint"), "{log}");
        wait_for("no part is left", || async {
            let left = NODES.iter().map(|node| bench.cluster.parts_of(node));
            (left.sum::<usize>() == 0).then_some(())
        })
        .await
        .expect("none");
        bench.cluster.power_on(lost).await.expect("it comes back");
    }
}

/// The node that acts tells each other one what the loss of a third would bring.
#[tokio::test(flavor = "multi_thread")]
async fn room_is_kept_for_the_loss_of_a_node() {
    let bench = Bench::new().await;
    bench.witness("large", "c").await;
    let (module, shared) = (guest("witness"), bench.shared());
    let file = shared.join("promises").display().to_string();
    let args = [file.as_str(), MIB, "1000"];
    let mut promises = Guest {
        volume: Some(&shared),
        ha: Some(HighAvailability {
            fence: Fence::Timer,
            ..HighAvailability::default()
        }),
        ..Guest::new("promises", "a", &module, &args)
    };
    // The most that can be promised.
    promises.balancing.memory_target_bytes = Some(64 << 30);
    match bench.cluster.run(&promises).await {
        Ok(_) => println!("not refused: this computer has more than 64 GiB free"),
        Err(refused) => {
            let refused = refused.to_string();
            let names = refused.contains("no node would have room for machine \"promises\"");
            assert!(names && refused.contains("memory.target"), "{refused}");
        }
    }
    promises.balancing.memory_target_bytes = Some(64 << 20);
    bench.cluster.run(&promises).await.expect("it starts");
    let backup = bench.folder.path().join("backup");
    wait_for("another node keeps room for it", || async {
        let _ = std::fs::remove_file(&backup);
        bench.keel("b", &["store", "backup", backup.to_str()?]);
        let read = Backup::decode(&std::fs::read(&backup).ok()?).ok()?;
        let mut keys = read.entries.iter().map(|it| &it.key);
        keys.any(|it| it.starts_with("headroom/")).then_some(())
    })
    .await
    .expect("it is in the store");
}
