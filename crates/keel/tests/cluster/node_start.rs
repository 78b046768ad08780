//! From `keel up --detach` until the node answers, or nothing of it is left.

use keel_testkit::LocalCluster;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

fn folder() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("keel-").tempdir().expect("a folder")
}

/// The exit code and standard error of `keel up` in a folder.
fn up(folder: &Path, options: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(KEEL)
        .arg("--state-dir")
        .arg(folder)
        .arg("up")
        .args(options)
        .stdin(Stdio::null())
        .output()
        .expect("keel runs");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// The processes that name the folder and are not children of another one that does. An agent's own
/// children come and go, and name it until they run their programs.
fn first_processes_of(folder: &Path) -> Vec<u32> {
    let folder = folder.display().to_string();
    let parents: BTreeMap<u32, Option<u32>> = std::fs::read_dir("/proc")
        .expect("processes")
        .flatten()
        .filter_map(|process| {
            let pid: u32 = process.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(process.path().join("cmdline")).ok()?;
            let status = std::fs::read_to_string(process.path().join("status")).ok()?;
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
            let parent: Option<u32> = parent.and_then(|parent| parent.trim().parse().ok());
            String::from_utf8_lossy(&line)
                .contains(&folder)
                .then_some((pid, parent))
        })
        .collect();
    let is_first =
        |parent: &Option<u32>| parent.is_none_or(|parent| !parents.contains_key(&parent));
    let first = parents.iter().filter(|(_, parent)| is_first(parent));
    first.map(|(pid, _)| *pid).collect()
}

/// Nothing depends on what explains the past.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_histories_keep_no_node_from_starting() {
    let folder = folder();
    let mut cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"])
        .await
        .expect("a cluster");
    let state = cluster.folder("a");
    cluster.power_off("a");
    for name in ["loads", "ledger"] {
        let file = state.join(name).with_extension("redb");
        let length = std::fs::metadata(&file).expect("a file").len();
        let zeroes = vec![0; usize::try_from(length).expect("a length")];
        std::fs::write(&file, zeroes).expect("written");
    }
    cluster.power_on("a").await.expect("it starts");
    for name in ["loads", "ledger"] {
        assert!(
            state.join(name).with_extension("damaged").exists(),
            "{name}"
        );
    }
    for ask in [&["ledger"][..], &["history"]] {
        let (ok, said) = cluster.keel("a", ask);
        assert!(ok, "{ask:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_start_says_why_and_leaves_no_process() {
    let folder = folder();
    let state = folder.path().join("x");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let (code, said) = up(&state, &["--name", "x", "--listen", &address, "--detach"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&address) && said.contains("in use"), "{said}");
    assert_eq!(first_processes_of(&state), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_has_one_supervisor() {
    let folder = folder();
    let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a"])
        .await
        .expect("a cluster");
    let state = cluster.folder("a");
    let supervisor = std::fs::read_to_string(state.join("supervisor.lock")).expect("its lock");
    let (code, said) = up(&state, &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(&format!("process {supervisor} runs the node")) && said.contains("keel down"),
        "{said}"
    );
    assert_eq!(
        first_processes_of(&state),
        [supervisor.parse::<u32>().expect("a process")]
    );
    let (ok, said) = cluster.keel("a", &["nodes"]);
    assert!(ok, "{said}");
}
