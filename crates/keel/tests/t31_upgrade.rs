//! The binary is replaced, or deleted, while a node runs.

use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// Installs the binary, in place of the present one.
fn install(program: &Path) {
    let new = program.with_extension("new");
    std::fs::copy(KEEL, &new).expect("a copy of the binary");
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
