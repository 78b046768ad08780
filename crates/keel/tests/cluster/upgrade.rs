//! The binary is replaced, or deleted, while a node runs; a cluster is upgraded node by node.

use keel_api::{AuthorityInfo, CheckpointRequest, Nothing};
use keel_machine::high_availability::HighAvailability;
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, check_numbered, guest, wait_for};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// Installs the binary, in place of the present one.
fn install(program: &Path) {
    install_from(Path::new(KEEL), program);
}

fn install_from(binary: &Path, program: &Path) {
    let new = program.with_extension("new");
    std::fs::copy(binary, &new).expect("a copy of the binary");
    std::fs::rename(&new, program).expect("it is put in place");
}

/// The processes of a node whose command line contains a word, with the file that each runs.
fn images(folder: &Path, word: &str) -> Vec<(u64, PathBuf)> {
    let folder = folder.display().to_string();
    let mut images = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).into_owned();
        let words: Vec<&str> = line.split('\0').collect();
        let ours = words.iter().any(|it| it.starts_with(&folder)) && words.contains(&word);
        let exe = entry.path().join("exe");
        if ours && let Ok(file) = std::fs::metadata(&exe) {
            images.push((file.ino(), exe));
        }
    }
    images
}

#[tokio::test(flavor = "multi_thread")]
async fn a_binary_that_was_replaced_keeps_no_machine_from_starting() {
    let folder = tempfile::Builder::new()
        .prefix("keel-")
        .tempdir()
        .expect("a folder");
    let program = folder.path().join("keel");
    install(&program);
    let cluster = LocalCluster::start(&program, folder.path(), &["a"])
        .await
        .expect("a cluster");
    let state = cluster.folder("a");
    let counter = guest("counter");
    let agent_inode = |what: &'static str, inode: u64| {
        let state = state.clone();
        async move {
            wait_for(what, || async {
                let agents = images(&state, "agent");
                (agents.len() == 1 && agents[0].0 == inode).then_some(())
            })
            .await
            .expect(what);
        }
    };
    let first = std::fs::metadata(&program).expect("installed").ino();
    agent_inode("the agent runs what is installed", first).await;

    // Deleted: a machine starts from the agent's image.
    std::fs::remove_file(&program).expect("it is removed");
    let running = async |name: &str| {
        let info = cluster
            .run(&Guest::new(name, "a", &counter, &["1000000", "2"]))
            .await
            .expect("an answer");
        assert_eq!(info.status, "running", "{name}: {:?}", info.message);
    };
    running("gone").await;

    // An agent that dies now is restarted from its parent's image.
    cluster.kill_agent("a").expect("an agent");
    agent_inode("the agent runs the image of its parent", first).await;
    cluster.wait_alive("a").await.expect("a node");
    running("orphan").await;

    // Replaced by a file that cannot be executed: the same.
    std::fs::write(&program, "half of an executable").expect("a file");
    running("damaged").await;

    // Upgraded: machines still start from the agent's image; the next agent is the new one.
    std::fs::remove_file(&program).expect("it is removed");
    install(&program);
    let second = std::fs::metadata(&program).expect("installed").ino();
    running("upgraded").await;
    let workers = images(&state.join("workers/upgraded"), "worker");
    assert_eq!((workers.len(), workers[0].0), (1, first), "{workers:?}");
    cluster.kill_agent("a").expect("an agent");
    agent_inode("the agent runs what is installed now", second).await;
    cluster.wait_alive("a").await.expect("a node");
    running("new").await;
    let workers = images(&state.join("workers/new"), "worker");
    assert_eq!((workers.len(), workers[0].0), (1, second), "{workers:?}");
    for name in ["gone", "orphan", "damaged", "upgraded", "new"] {
        let info = cluster.inspect("a", name).await.expect("info");
        assert_eq!(info.status, "running", "{name}: {:?}", info.message);
    }
}

/// A cluster of an earlier version is upgraded, one node after the other. Whoever has the new one
/// works with those that have the old one, in both directions, whoever leads the store.
#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_version_works_beside_this_one() {
    let Some(older) = std::env::var_os("KEEL_OLDER").map(PathBuf::from) else {
        println!("skipped: KEEL_OLDER names no earlier binary (`cargo xtask upgrade`)");
        return;
    };
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    let folder = folder.expect("a folder");
    let program = folder.path().join("keel");
    install_from(&older, &program);
    let nodes = ["a", "b", "c"];
    let cluster = LocalCluster::start_replicated(&program, folder.path(), &nodes).await;
    let cluster = cluster.expect("a cluster of the earlier version");
    let counter = guest("counter");
    let machine = Guest::new("m", "a", &counter, &["1000000", "2"]);
    cluster.run(&machine).await.expect("it starts");
    let kept = Guest {
        ha: Some(HighAvailability {
            checkpoint_every_ms: 1000,
            ..HighAvailability::default()
        }),
        ..Guest::new("h", "b", &counter, &["1000000", "2"])
    };
    cluster.run(&kept).await.expect("it starts");

    install(&program);
    for upgraded in nodes {
        let said = Command::new(KEEL)
            .arg("--state-dir")
            .arg(cluster.folder(upgraded))
            .arg("reload")
            .output()
            .expect("keel runs");
        assert!(said.status.success(), "{upgraded}: {said:?}");
        for node in nodes {
            cluster.wait_alive(node).await.expect("it is alive");
        }
        // To each node in turn, as each of them is asked to.
        for (via, to) in nodes.into_iter().zip(["b", "c", "a"]) {
            for name in ["m", "h"] {
                let here = cluster.inspect(via, name).await.expect("it is known").node;
                if here != to {
                    let report = cluster
                        .move_machine(via, name, to)
                        .await
                        .expect("an answer");
                    assert_eq!(report.ending, Ending::Moved, "{upgraded}: {name} to {to}");
                }
            }
        }
        let client = cluster.client(upgraded);
        let request = CheckpointRequest {
            to: Some(folder.path().join("repository").display().to_string()),
            ..CheckpointRequest::default()
        };
        let made = client
            .post::<_, keel_api::CheckpointInfo>("/v1/machines/m/checkpoints", &request)
            .await;
        made.expect("a checkpoint");
        wait_for("another node has its checkpoint", || async {
            let info = cluster.inspect(upgraded, "h").await.ok()?;
            (info.in_sync.len() > 1).then_some(())
        })
        .await
        .expect("in time");
    }
    for name in ["m", "h"] {
        let info = cluster.inspect("a", name).await.expect("it is known");
        assert_eq!((info.status.as_str(), info.restarts), ("running", 0));
        let output = cluster.output("a", name).await.expect("output");
        check_numbered(&output, 0).expect("no line is lost or twice");
    }
    // What only the new version has.
    let client = cluster.client("b");
    wait_for("the authority is known", || async {
        let begun = client.post::<_, Nothing>("/v1/authority/rotate", &());
        begun.await.ok().map(drop)
    })
    .await
    .expect("in time");
    wait_for("the authority is replaced", || async {
        let info: AuthorityInfo = client.get("/v1/authority").await.ok()?;
        (!info.is_rotating).then_some(())
    })
    .await
    .expect("in time");
}
