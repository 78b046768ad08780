//! Messages and records of an earlier version, frozen in `frozen_messages.txt`, are read by this
//! one: by a cluster in which everything is done that makes nodes write to each other, or into the
//! store. Each of its processes reads the frozen messages of the types that it meets.
//!
//! The file is made anew once for each version that is released, by that version:
//! `KEEL_FREEZE=1 cargo nextest run -E 'test(=frozen_messages::messages_of_an_earlier_version_are_read)'`.

use keel_machine::high_availability::HighAvailability;
use keel_store::frozen_messages;
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const NODES: [&str; 3] = ["a", "b", "c"];
/// Folder of what the processes write, beside those of the nodes.
const RESULTS: &str = "results";
/// What a balancer answers another node's; nodes ask each other once they have measured for a while.
const BALANCERS_ANSWER: &str = "messages::Response";

fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/frozen_messages.txt")
}

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    /// A command at a node, which succeeds; what it says.
    fn does(&self, node: &str, args: &[&str]) -> String {
        let (success, said) = self.cluster.keel(node, args);
        assert!(success, "{args:?}: {said}");
        said
    }

    /// The folder in which processes write what they read.
    fn results(&self) -> PathBuf {
        self.folder.path().join(RESULTS)
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    async fn safe(&self, machine: &str) {
        wait_for("another node has its checkpoint", || async {
            let info = self.cluster.inspect("b", machine).await.ok()?;
            (info.status == "running" && info.in_sync.len() > 1).then_some(())
        })
        .await
        .expect("in time");
    }

    /// What users do with a cluster.
    async fn commands(&self) {
        let counter = guest("counter");
        let args = ["1000000", "5"];
        let machine = Guest::new("m", "a", &counter, &args);
        self.cluster.run(&machine).await.expect("it starts");
        let kept = Guest {
            ha: Some(HighAvailability {
                checkpoint_every_ms: 1000,
                ..HighAvailability::default()
            }),
            ..Guest::new("h", "a", &counter, &args)
        };
        self.cluster.run(&kept).await.expect("it starts");
        self.safe("h").await;
        for to in ["b", "c", "a"] {
            self.does("b", &["move", "m", "--to", to]);
            self.does("c", &["move", "h", "--to", to]);
        }
        let elsewhere = Guest::new("e", "c", &counter, &args);
        self.cluster.run(&elsewhere).await.expect("it starts");
        self.does("b", &["stop", "e"]);
        self.does("b", &["rm", "e"]);
        let place = self.path("repository");
        self.does("a", &["checkpoint", "m", "--to", &place]);
        self.does(
            "a",
            &["checkpoint", "quota", "--from", &place, "--set", "1G"],
        );
        self.does(
            "a",
            &["volume", "create", "data", "--at", &self.path("volume")],
        );
        self.does("a", &["set", "m", "--restart", "always"]);
        self.does("a", &["label", "m", "app=web"]);
        self.does("a", &["label", "--node", "b", "zone=x"]);
        let rules = "[[rule]]\nname = \"apart\"\nrule = \"apart\"\nmachines.names = [\"m-*\"]\n";
        std::fs::write(self.path("rules"), rules).expect("a file");
        self.does("a", &["rule", "set", "-f", &self.path("rules")]);
        self.does("a", &["token", "user", "somebody", "--role", "viewer"]);
        let threads = guest("threads");
        let spans = Guest::new("s", "a", &threads, &["4", "2000000000"]);
        self.cluster.run(&spans).await.expect("it starts");
        self.does("a", &["span", "s", "--nodes", "b,c"]);
        self.does("a", &["unspan", "s"]);
        self.does("a", &["drain", "c"]);
        self.does("a", &["undrain", "c"]);
        self.does("a", &["store", "backup", &self.path("backup")]);
        self.does("a", &["balance", "--plan", "--dry-run"]);
        self.does("a", &["ca", "rotate"]);
    }

    /// What happens to a cluster.
    async fn events(&mut self) {
        self.cluster.join_via("d", "a").await.expect("it joins");
        self.does("d", &["leave"]);
        // Nodes measure, ask each other, and move what they can.
        self.cluster
            .set_policy("mode", "automatic")
            .await
            .expect("it is set");
        self.cluster
            .set_policy("sample_ms", "500")
            .await
            .expect("it is set");
        wait_for("balancers asked each other", || async {
            let found = found(&self.results());
            let answered = found.iter().any(|it| it.contains(BALANCERS_ANSWER));
            answered.then_some(())
        })
        .await
        .expect("in time");
        self.cluster
            .set_policy("mode", "off")
            .await
            .expect("it is set");
        self.safe("h").await;
        let node = self.cluster.inspect("b", "h").await.expect("known").node;
        let stays = NODES.into_iter().find(|it| *it != node).expect("another");
        self.cluster.power_off(&node);
        wait_for("it runs on elsewhere", || async {
            let info = self.cluster.inspect(stays, "h").await.ok()?;
            (info.status == "running" && info.node != node).then_some(())
        })
        .await
        .expect("in time");
        self.cluster.power_on(&node).await.expect("it is back");
        self.does(stays, &["stop", "h"]);
        self.does(stays, &["rm", "h"]);
    }
}

/// The lines that the processes wrote.
fn found(folder: &Path) -> BTreeSet<String> {
    let files = std::fs::read_dir(folder).expect("a folder").flatten();
    let texts = files.map(|file| std::fs::read_to_string(file.path()).expect("a file"));
    let texts: Vec<String> = texts.collect();
    texts
        .iter()
        .flat_map(|text| text.lines())
        .map(str::to_owned)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_an_earlier_version_are_read() {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    let folder = folder.expect("a folder");
    let results = folder.path().join(RESULTS);
    std::fs::create_dir(&results).expect("a folder");
    let freezes = std::env::var_os("KEEL_FREEZE").is_some();
    let (results_text, frozen_text) = (results.display().to_string(), file().display().to_string());
    let mut environment = vec![(frozen_messages::FOLDER, results_text.as_str())];
    if !freezes {
        environment.push((frozen_messages::FILE, &frozen_text));
    }
    let program = Path::new(KEEL);
    let cluster =
        LocalCluster::start_with_environment(program, folder.path(), &NODES, &environment).await;
    let cluster = cluster.expect("a cluster");
    let mut bench = Bench { cluster, folder };
    bench.does("a", &["store", "voters", "3"]);
    bench
        .cluster
        .wait_voters("a", 3)
        .await
        .expect("three voters");
    bench.commands().await;
    bench.events().await;
    for node in NODES {
        bench.cluster.power_off(node);
    }
    let found = found(&results);
    if freezes {
        freeze(&found);
        return;
    }
    let refused: Vec<&String> = found
        .iter()
        .filter(|line| !line.starts_with("read "))
        .collect();
    assert!(refused.is_empty(), "{refused:#?}");
    let read: BTreeSet<&str> = found
        .iter()
        .filter_map(|line| line.strip_prefix("read ")?.split_once(' '))
        .map(|(_, name)| name)
        .collect();
    let frozen = std::fs::read_to_string(file()).expect("frozen messages");
    let frozen = frozen_messages::parse(&frozen).expect("frozen messages");
    let unread: Vec<&String> = frozen
        .keys()
        .filter(|it| !read.contains(it.as_str()))
        .collect();
    assert!(unread.is_empty(), "no process read messages of {unread:?}");
    assert!(frozen.len() > 30, "{} types", frozen.len());
}

/// Makes the file: of each type the shapes that were met, at most a few.
fn freeze(found: &BTreeSet<String>) {
    let mut of_type: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in found {
        let (name, message) = line.rsplit_once(' ').expect("a frozen message");
        of_type.entry(name).or_default().push(message);
    }
    let mut text = String::from(
        "# Messages and records of the version before, one for each shape of each type.\n\
         # cli/frozen_messages.rs says how this file is made.\n",
    );
    for (name, messages) in of_type {
        for message in messages.into_iter().take(frozen_messages::SHAPES_MAX) {
            text.push_str(&format!("{name} {message}\n"));
        }
    }
    std::fs::write(file(), text).expect("the file is written");
}
