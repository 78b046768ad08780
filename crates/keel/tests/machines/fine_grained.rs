//! Machines that may have parts, in clusters whose nodes have quotas: balancing gives them parts,
//! their threads and their memory move to free capacity, and every decision is explained.

use keel_api::{LedgerInfo, ObjectInfo, PartsInfo};
use keel_balance::fine_grained::Action;
use keel_balance::ledger::Decision;
use keel_balance::policy::Mode;
use keel_machine::spec::Spawn;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NODES: [(&str, f64); 3] = [("a", 0.5), ("b", 0.5), ("c", 0.5)];

fn guest_path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../guests/{name}.wasm"))
}

fn guest(name: &str) -> Vec<u8> {
    std::fs::read(guest_path(name)).expect("a prebuilt guest")
}

async fn start(folder: &Path, policy: &[(&str, &str)]) -> LocalCluster {
    let cluster = LocalCluster::start_balancing(Path::new(KEEL), folder, &NODES).await;
    let cluster = cluster.expect("a cluster whose nodes have quotas");
    for (field, value) in policy {
        cluster.set_policy(field, value).await.expect("a policy");
    }
    cluster
}

/// The lines of a program that runs on one node.
fn alone(name: &str, args: &[&str]) -> Vec<String> {
    let mut command = Command::new(KEEL);
    let output = command
        .arg("wasm")
        .arg(guest_path(name))
        .args(args)
        .output();
    let output = output.expect("it runs");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(str::to_owned).collect()
}

async fn parts(cluster: &LocalCluster, machine: &str) -> PartsInfo {
    let path = format!("/v1/machines/{machine}/parts");
    cluster.client("a").get(&path).await.expect("its parts")
}

/// Threads of each node that has some.
async fn threads(cluster: &LocalCluster, machine: &str) -> BTreeMap<String, u32> {
    let mut threads = BTreeMap::new();
    for part in parts(cluster, machine).await.parts {
        if part.threads > 0 {
            *threads.entry(part.node).or_default() += part.threads;
        }
    }
    threads
}

/// MiB of a machine's memory on each node.
async fn memory(cluster: &LocalCluster, machine: &str) -> BTreeMap<String, u64> {
    let path = format!("/v1/machines/{machine}/objects");
    let objects: Vec<ObjectInfo> = match cluster.client("a").get(&path).await {
        Ok(objects) => objects,
        // It is still on one node.
        Err(_) => return BTreeMap::new(),
    };
    let mut memory: BTreeMap<String, u64> = BTreeMap::new();
    for object in objects {
        *memory.entry(object.node).or_default() += object.bytes;
    }
    memory
        .into_iter()
        .map(|(node, bytes)| (node, bytes >> 20))
        .collect()
}

async fn grains(cluster: &LocalCluster) -> Vec<(Mode, Action, String)> {
    let ledger: LedgerInfo = cluster
        .client("a")
        .get("/v1/ledger?limit=10000")
        .await
        .expect("it");
    let decisions = ledger
        .lines
        .into_iter()
        .filter_map(|line| match line.decision {
            Decision::FineGrained { mode, choice, .. } => Some((mode, choice.action, choice.why)),
            _ => None,
        });
    decisions.collect()
}

fn said(cluster: &LocalCluster, args: &[&str]) -> String {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(cluster.folder("a"))
        .args(args)
        .output()
        .expect("keel runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

/// A renderer overloads its node: it gets parts, its threads move there, its pictures stay the
/// same; when a node is drained its part leaves, and the renderer continues.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_outgrows_its_node_by_itself() {
    let _alone = crate::ALONE.lock().await;
    let folder = folder();
    let cluster = start(folder.path(), &[("mode", "automatic")]).await;
    let module = guest("render");
    let mut render = Guest::new("render", "a", &module, &["6", "480", "320", "1000000"]);
    render.balancing.parts_max = Some(3);
    cluster.run(&render).await.expect("it starts");
    wait_for("its threads are on all nodes", || async {
        let threads = threads(&cluster, "render").await;
        (threads.len() == 3 && threads.values().all(|count| *count > 1)).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {}", said(&cluster, &["why", "render"])));
    let decided = grains(&cluster).await;
    let spread = decided
        .iter()
        .find(|(_, action, _)| matches!(action, Action::Spread { .. }));
    let (_, _, why) = spread.expect("it was decided");
    assert!(why.contains("busy threads press a alone"), "{why}");
    let moved = decided
        .iter()
        .filter(|(_, action, _)| matches!(action, Action::Thread { .. }));
    let why = said(&cluster, &["why", "render"]);
    assert!(moved.clone().count() >= 4, "{decided:?}, {why}");
    assert!(
        moved.clone().all(|(_, _, why)| why.contains("is pressed")),
        "{why}"
    );
    assert!(
        why.contains("gets parts on") && why.contains("thread"),
        "{why}"
    );

    let before = cluster
        .output("a", "render")
        .await
        .expect("output")
        .lines()
        .count();
    let drawn = wait_for("pictures by all nodes", || async {
        let output = cluster.output("a", "render").await.ok()?;
        let whole = &output[..output.rfind('\n')?];
        let lines: Vec<String> = whole.lines().map(str::to_owned).collect();
        (lines.len() > before + 3).then_some(lines)
    });
    let drawn = drawn.await.expect("it draws");
    let first = drawn.len() - 3;
    let again = alone("render", &["2", "480", "320", "3", &first.to_string()]);
    assert_eq!(drawn[first..], again);

    // One of them is drained: no part may be there. Its home may have moved before it got any: an
    // agent that does not know of them yet moves it as a whole.
    let parts_now = parts(&cluster, "render").await.parts;
    let mut stay: Vec<String> = parts_now.into_iter().map(|part| part.node).collect();
    let at = (1..stay.len()).rfind(|at| stay[*at] != "a");
    let goes = stay.remove(at.expect("a part that is not on a"));
    let drained = said(&cluster, &["drain", &goes]);
    wait_for("no part is there", || async {
        let parts = parts(&cluster, "render").await.parts;
        let nodes: Vec<String> = parts.into_iter().map(|part| part.node).collect();
        (cluster.parts_of(&goes) == 0 && nodes == stay).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {drained}, {}", said(&cluster, &["why", "render"])));
    let decided = grains(&cluster).await;
    let left = |action: &Action| match action {
        Action::Leave { nodes } => nodes.len() == 1 && *nodes[0] == *goes,
        _ => false,
    };
    let left = decided.iter().find(|(_, action, _)| left(action));
    assert!(
        left.is_some_and(|(_, _, why)| why.contains(&format!("{goes} must go"))),
        "{decided:?}"
    );
    cluster.end("a", "render").await.expect("it ends");
}

/// Two threads on two nodes that contend for one page are moved together.
#[tokio::test(flavor = "multi_thread")]
async fn threads_that_share_pages_are_brought_together() {
    let _alone = crate::ALONE.lock().await;
    let folder = folder();
    let nodes = [("a", 4.0), ("b", 4.0)];
    let cluster = LocalCluster::start_balancing(Path::new(KEEL), folder.path(), &nodes).await;
    let cluster = cluster.expect("a cluster");
    let policy = cluster.set_policy("mode", "automatic").await;
    policy.expect("a policy");
    let text = r#"(module
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (memory (export "memory") 2 2 shared)
        (func (export "wasi_thread_start") (param $tid i32) (param $arg i32)
            (loop $more
                (drop (i32.atomic.rmw.add (i32.const 0x8000) (i32.const 1)))
                (br $more)))
        (func (export "_start")
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const 2000000000)))
            (drop (call $spawn (i32.const 0)))
            (drop (call $spawn (i32.const 1)))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#;
    let module = wat::parse_str(text).expect("a module");
    let mut pair = Guest::new("pair", "a", &module, &[]);
    pair.balancing.parts_max = Some(2);
    pair.balancing.spawn = Spawn::Spread;
    cluster.run(&pair).await.expect("it starts");
    let followed = || async {
        let decided = grains(&cluster).await;
        let mut moved = decided
            .into_iter()
            .filter_map(|(_, action, why)| match action {
                Action::Thread { .. } if why.contains("it waits for pages") => Some(why),
                _ => None,
            });
        moved.next()
    };
    let why = wait_for("one of them goes to the other", followed).await;
    let why = why.unwrap_or_else(|error| panic!("{error}: {}", said(&cluster, &["why", "pair"])));
    assert!(why.contains("for pages from there"), "{why}");
    assert!(why.contains("both use the same bytes"), "{why}");
    wait_for("both are on one node", || async {
        let workers = parts(&cluster, "pair").await.threads.into_iter();
        let nodes: Vec<String> = workers
            .filter(|thread| thread.tid != 0)
            .map(|thread| thread.node)
            .collect();
        (nodes.len() == 2 && nodes[0] == nodes[1]).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {}", said(&cluster, &["threads", "pair"])));
    let threads = said(&cluster, &["threads", "pair"]);
    assert!(threads.contains("WAITED FOR"), "{threads}");
    cluster.end("a", "pair").await.expect("it ends");
}

/// A machine that a user made span leaves a node that is drained, under any policy, and keeps its
/// other parts, with the threads of the drained one.
#[tokio::test(flavor = "multi_thread")]
async fn parts_leave_a_node_that_is_drained() {
    let _alone = crate::ALONE.lock().await;
    let folder = folder();
    let cluster = start(folder.path(), &[("mode", "off")]).await;
    let module = guest("threads");
    let guest = Guest::new("m", "a", &module, &["3", "40000000"]);
    cluster.run(&guest).await.expect("it starts");
    said(&cluster, &["span", "m", "--nodes", "a,b,c"]);
    said(&cluster, &["move", "m/thread/2", "--to", "b"]);
    said(&cluster, &["move", "m/thread/3", "--to", "c"]);
    wait_for("they are there", || async {
        (threads(&cluster, "m").await.len() == 3).then_some(())
    })
    .await
    .expect("they are");
    said(&cluster, &["drain", "c"]);
    wait_for("its part is gone, and the other one is there", || async {
        let threads = threads(&cluster, "m").await;
        let nodes: Vec<&str> = threads.keys().map(String::as_str).collect();
        (cluster.parts_of("c") == 0 && nodes == ["a", "b"]).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {}", said(&cluster, &["why", "m"])));
    let why = said(&cluster, &["why", "m"]);
    assert!(why.contains("c must go"), "{why}");
    cluster.end("a", "m").await.expect("it ends");
}

/// More memory than the limit of a part: it gets parts, and its unused memory moves there.
#[tokio::test(flavor = "multi_thread")]
async fn memory_that_rests_goes_where_it_fits() {
    let _alone = crate::ALONE.lock().await;
    let folder = folder();
    let cluster = start(folder.path(), &[("mode", "automatic")]).await;
    let module = guest("writer");
    // 60 MiB, of which it continuously writes and checks a little.
    let mut hot = Guest::new("hot", "a", &module, &["60", "1"]);
    hot.balancing.parts_max = Some(3);
    hot.balancing.part_memory_bytes = Some(28 << 20);
    cluster.run(&hot).await.expect("it starts");
    let memory = wait_for("no part has more than it keeps", || async {
        let memory = memory(&cluster, "hot").await;
        let fits = memory.len() == 3 && memory.values().all(|mib| *mib <= 28);
        fits.then_some(memory)
    });
    let memory = memory.await.expect("it is given away");
    let decided = grains(&cluster).await;
    let given = decided
        .iter()
        .filter(|(_, action, _)| matches!(action, Action::Objects { .. }));
    // If it knew the limit of its parts before it had any, as one that moved does, they evict by
    // themselves.
    let parts: PartsInfo = cluster
        .client("a")
        .get("/v1/machines/hot/parts")
        .await
        .expect("its parts");
    let by_themselves = parts.parts.iter().filter_map(|part| part.memory.as_ref());
    let by_themselves: u64 = by_themselves.map(|memory| memory.given_bytes >> 20).sum();
    let enough = given.clone().count() >= 2 || by_themselves >= 30;
    assert!(enough, "{by_themselves} MiB, {decided:?}");
    assert!(
        given
            .clone()
            .all(|(_, _, why)| why.contains("limit of 28.0 MiB")),
        "{decided:?}"
    );
    // Each is rounded down.
    assert!(memory.values().sum::<u64>() >= 57, "{memory:?}");
    // It checks each page that it visits: it continues, or has ended.
    let lines = cluster
        .output("a", "hot")
        .await
        .expect("output")
        .lines()
        .count();
    wait_for("it continues", || async {
        let now = cluster.output("a", "hot").await.ok()?.lines().count();
        (now > lines + 10).then_some(())
    })
    .await
    .expect("it continues");
    // Its limit can be changed meanwhile: no part exceeds it after a moment, copies included.
    said(&cluster, &["set", "hot", "--part-memory", "24M"]);
    let most = 24 << 20;
    wait_for("no part has more than that", || async {
        let path = "/v1/machines/hot/parts";
        let parts: PartsInfo = cluster.client("a").get(path).await.ok()?;
        let fits = parts.parts.iter().all(|part| {
            let memory = part.memory.as_ref();
            memory.is_some_and(|it| it.limit_bytes == Some(most) && it.resident_bytes <= most)
        });
        (fits && parts.parts.len() == 3).then_some(())
    })
    .await
    .expect("it fits");
    cluster.end("a", "hot").await.expect("it ends");
}

/// With balancing in suggest mode, the decision is reported, once; and a machine that is to have
/// parts from its beginning has them.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_suggested_is_not_done() {
    let _alone = crate::ALONE.lock().await;
    let folder = folder();
    let cluster = start(folder.path(), &[("mode", "suggest")]).await;
    let module = guest("threads");
    let mut eager = Guest::new("eager", "a", &module, &["5", "4000000"]);
    eager.balancing.parts_max = Some(2);
    eager.balancing.spawn = Spawn::Spread;
    cluster.run(&eager).await.expect("it starts");
    wait_for("it is suggested", || async {
        (!grains(&cluster).await.is_empty()).then_some(())
    })
    .await
    .expect("it is");
    let line = said(&cluster, &["why", "eager"]);
    assert!(line.contains("only suggested"), "{line}");
    assert_eq!(parts(&cluster, "eager").await.parts.len(), 1);
    cluster
        .set_policy("mode", "automatic")
        .await
        .expect("a policy");
    wait_for("it has a part elsewhere, with threads", || async {
        (threads(&cluster, "eager").await.len() == 2).then_some(())
    })
    .await
    .expect("it spans");
    let decided = grains(&cluster).await;
    let suggested = decided.iter().filter(|(mode, ..)| *mode == Mode::Suggest);
    assert_eq!(suggested.count(), 1, "{decided:?}");
    // Invalid input.
    for (args, with) in [
        (&["run", "--spawn", "here", "x.wasm"][..], "--max-parts"),
        (&["set", "eager", "--max-parts", "1"], "2 to 64"),
        (&["set", "eager", "--max-parts", "many"], "invalid digit"),
        (&["set", "eager", "--part-memory", "64K"], "1 MiB to 64 GiB"),
    ] {
        let text = said(&cluster, args);
        assert!(text.contains(with), "{args:?}: {text}");
    }
    cluster.end("a", "eager").await.expect("it ends");
}
