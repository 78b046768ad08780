//! `keel cp`: files in volumes of machines that run, move or have ended.

use keel_api::MachineInfo;
use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
const MIB: usize = 1 << 20;

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

fn command(state: PathBuf, args: &[&str]) -> Command {
    let mut command = Command::new(KEEL);
    command.arg("--state-dir").arg(state).arg("cp").args(args);
    command
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

impl Bench {
    async fn new(names: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
        let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), names).await;
        Bench {
            cluster: cluster.expect("a cluster"),
            folder,
        }
    }

    /// A machine with a volume of its own at /tmp, and a host directory.
    async fn start(&self, host: &Path) {
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
        let module = std::fs::read(guest).unwrap();
        let args = ["1000000", "20"];
        let guest = Guest {
            tmp_bytes: Some(64 << 20),
            volume: Some(host),
            ..Guest::new("m", "a", &module, &args)
        };
        self.cluster.run(&guest).await.expect("it starts");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of pseudo-random bytes.
    fn file(&self, name: &str, bytes: usize) -> Vec<u8> {
        let mut text = Vec::with_capacity(bytes + 8);
        let mut word = bytes as u64;
        while text.len() < bytes {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.extend(word.to_le_bytes());
        }
        text.truncate(bytes);
        std::fs::write(self.path(name), &text).unwrap();
        text
    }

    fn cp(&self, source: &str, target: &str) -> Output {
        let output = command(self.path("a"), &[source, target]).output();
        output.expect("keel runs")
    }

    fn put(&self, name: &str, target: &str) {
        let output = self.cp(self.path(name).to_str().unwrap(), target);
        assert!(output.status.success(), "{}", error(&output));
    }

    fn got(&self, source: &str) -> Vec<u8> {
        let target = self.path("got");
        let output = self.cp(source, target.to_str().unwrap());
        assert!(output.status.success(), "{}", error(&output));
        std::fs::read(target).unwrap()
    }

    fn refused(&self, source: &str, target: &str) -> String {
        let output = self.cp(source, target);
        assert!(!output.status.success(), "{source} {target}");
        error(&output)
    }

    /// Files, directories and links in its own volume.
    async fn inodes(&self) -> u64 {
        let info = self.cluster.inspect("a", "m").await.unwrap();
        let mut volumes = info.volumes.iter();
        volumes.find_map(|volume| volume.inodes).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_go_in_and_come_out_whole() {
    let bench = Bench::new(&["a"]).await;
    let host = bench.path("host");
    std::fs::create_dir(&host).unwrap();
    bench.start(&host).await;
    let host = host.display();
    for volume in ["/tmp".to_owned(), host.to_string()] {
        for bytes in [0, 1, MIB, 5 * MIB + 3] {
            let text = bench.file("text", bytes);
            bench.put("text", &format!("m:{volume}/copy"));
            assert!(bench.got(&format!("m:{volume}/copy")) == text, "{bytes}");
        }
        // In a directory it gets its own name.
        bench.put("text", &format!("m:{volume}"));
        assert_eq!(bench.got(&format!("m:{volume}/text")).len(), 5 * MIB + 3);
    }
    // Only the two files and the directory itself remain.
    assert_eq!(bench.inodes().await, 3);
    assert_eq!(std::fs::read_dir(bench.path("host")).unwrap().count(), 2);
    // Too much for its quota: no partial file stays.
    bench.file("big", 80 * MIB);
    let big = bench.path("big");
    let said = bench.refused(big.to_str().unwrap(), "m:/tmp/copy");
    assert!(said.contains("quota"), "{said}");
    assert_eq!(bench.inodes().await, 3);
    assert_eq!(bench.got("m:/tmp/copy").len(), 5 * MIB + 3);
    for (source, target, what) in [
        ("m:/nowhere/x", "x", "in no volume"),
        ("m:/tmp/none", "x", "m:/tmp/none: "),
        ("m:/tmp", "x", "is a directory"),
        ("m:/tmp/../etc/passwd", "x", "m:/tmp/../etc/passwd: "),
        ("nobody:/tmp/x", "x", "no machine"),
        ("none", "m:/tmp/x", "cannot read none"),
        ("/", "m:/tmp/x", "only files"),
        ("x", "y", "MACHINE:/PATH"),
        ("m:/tmp/x", "m:/tmp/y", "both are in machines"),
        ("m:/tmp/text", "/no/such/folder/x", "cannot write"),
    ] {
        let said = bench.refused(source, target);
        assert!(said.contains(what), "{source} {target}: {said}");
    }
    // The machine's own volume ends with it, the host's does not.
    let client = bench.cluster.client("a");
    let _: serde_json::Value = client.post("/v1/machines/m/stop", &()).await.unwrap();
    let info: MachineInfo = client.get("/v1/machines/m").await.unwrap();
    assert_eq!(info.status, "stopped");
    let said = bench.refused("m:/tmp/copy", "x");
    assert!(said.contains("ended with it"), "{said}");
    assert_eq!(bench.got(&format!("m:{host}/copy")).len(), 5 * MIB + 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_go_on_while_the_machine_moves() {
    let bench = Bench::new(&["a", "b"]).await;
    let host = bench.path("host");
    std::fs::create_dir(&host).unwrap();
    bench.start(&host).await;
    let text = bench.file("text", 40 * MIB);
    let text_path = bench.path("text");
    let mut copying = command(
        bench.path("a"),
        &[text_path.to_str().unwrap(), "m:/tmp/copy"],
    )
    .spawn()
    .unwrap();
    for node in ["b", "a", "b"] {
        let report = bench.cluster.move_machine("a", "m", node).await.unwrap();
        assert_eq!(report.ending, Ending::Moved);
    }
    assert!(copying.wait().unwrap().success());
    assert!(bench.got("m:/tmp/copy") == text);
    assert_eq!(bench.inodes().await, 2);
    // Also during a copy from it.
    let got = bench.path("out");
    let mut copying = command(bench.path("b"), &["m:/tmp/copy", got.to_str().unwrap()])
        .spawn()
        .unwrap();
    let report = bench.cluster.move_machine("a", "m", "a").await.unwrap();
    assert_eq!(report.ending, Ending::Moved);
    assert!(copying.wait().unwrap().success());
    assert!(std::fs::read(got).unwrap() == text);
}
