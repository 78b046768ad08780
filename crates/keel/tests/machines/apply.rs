//! `keel apply`: machines become equal to those of a file, and a second run changes nothing.

use keel_api::MachineInfo;
use keel_machine::moves::Ending;
use keel_machine::restart_policy::Restart;
use keel_testkit::{LocalCluster, wait_for};
use std::path::Path;
use std::process::{Command, Output};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
}

impl Bench {
    async fn new(names: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir().unwrap();
        let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), names).await;
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/counter.wasm");
        std::fs::copy(guest, folder.path().join("counter.wasm")).unwrap();
        Bench {
            cluster: cluster.expect("a cluster"),
            folder,
        }
    }

    fn apply(&self, text: &str, args: &[&str]) -> Output {
        let file = self.folder.path().join("machines.toml");
        std::fs::write(&file, text).unwrap();
        Command::new(KEEL)
            .arg("--state-dir")
            .arg(self.folder.path().join("a"))
            .args(["apply", "--file"])
            .arg(&file)
            .args(args)
            .output()
            .unwrap()
    }

    /// The output of a command that must succeed.
    fn done(&self, text: &str, args: &[&str]) -> String {
        let output = self.apply(text, args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, text: &str, args: &[&str]) -> String {
        let output = self.apply(text, args);
        assert!(!output.status.success(), "{text}");
        String::from_utf8(output.stderr).unwrap()
    }

    async fn machines(&self) -> Vec<MachineInfo> {
        let client = self.cluster.client("a");
        client.get("/v1/machines").await.unwrap()
    }

    async fn running(&self, machine: &str) -> MachineInfo {
        wait_for(&format!("{machine} runs"), || async {
            let info = self.cluster.inspect("a", machine).await.ok()?;
            (info.status == "running" && info.pid.is_some()).then_some(info)
        })
        .await
        .unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_become_what_the_file_says() {
    let bench = Bench::new(&["a", "b"]).await;
    let file = |memory: &str, pause: &str, secret: &str| {
        format!(
            r#"
[machine.one]
module = "counter.wasm"
args = ["1000000", "{pause}"]
env = {{ PASSWORD = "{secret}" }}
memory = "{memory}"

[machine.two]
module = "counter.wasm"
args = ["1000000", "100"]
volume = ["tmp:1M:/scratch"]
"#
        )
    };
    let first = file("64M", "100", "hunter2");
    assert_eq!(
        bench.done(&first, &["--diff"]),
        "create    one\ncreate    two\n"
    );
    assert_eq!(bench.machines().await, []);
    assert_eq!(bench.done(&first, &[]), "created   one\ncreated   two\n");
    let (one, two) = (bench.running("one").await, bench.running("two").await);
    assert_eq!(one.program, "counter.wasm 1000000 100");
    assert_eq!(one.memory_limit_bytes, 64 << 20);
    assert_eq!(two.volumes[0].bytes_max, Some(1 << 20));
    // A second run, also after a move, changes nothing.
    let same = "unchanged one\nunchanged two\n";
    assert_eq!(bench.done(&first, &[]), same);
    let report = bench.cluster.move_machine("a", "one", "b").await.unwrap();
    assert_eq!(report.ending, Ending::Moved);
    assert_eq!(bench.done(&first, &[]), same);
    // Some changes are made live.
    let one = bench.running("one").await;
    let second = file("128M", "100", "hunter2");
    let changes = "one\n            memory 64M → 128M\nunchanged two\n";
    assert_eq!(
        bench.done(&second, &["--diff"]),
        format!("change    {changes}")
    );
    assert_eq!(bench.running("one").await.memory_limit_bytes, 64 << 20);
    assert_eq!(bench.done(&second, &[]), format!("changed   {changes}"));
    let now = bench.running("one").await;
    assert_eq!((now.memory_limit_bytes, now.pid), (128 << 20, one.pid));
    assert_eq!(bench.done(&second, &[]), same);
    // Others are refused as a whole, and no secret is shown.
    let third = file("256M", "50", "hunter3");
    let error = bench.refused(&third, &[]);
    for part in [
        "--replace",
        "nothing was changed",
        "one: args",
        "one: env PASSWORD a value → another value",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert!(!error.contains("hunter"), "{error}");
    assert_eq!(bench.running("one").await.memory_limit_bytes, 128 << 20);
    let said = bench.done(&third, &["--diff"]);
    assert!(
        said.starts_with("replace   one\n") && !said.contains("hunter"),
        "{said}"
    );
    let said = bench.done(&third, &["--replace"]);
    assert!(said.starts_with("replaced  one\n"), "{said}");
    let new = bench.running("one").await;
    assert_eq!(new.program, "counter.wasm 1000000 50");
    assert_eq!(
        (new.memory_limit_bytes, new.node.as_str()),
        (256 << 20, "b")
    );
    assert_ne!(new.pid, now.pid);
    // The other machine is unchanged.
    assert_eq!(bench.running("two").await.pid, two.pid);
    assert_eq!(bench.done(&third, &["-o", "name"]), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_changes_nothing() {
    let bench = Bench::new(&["a"]).await;
    let good = "[machine.good]\nmodule = \"counter.wasm\"\n";
    for (bad, what) in [
        (
            "[machine.bad]\nmodule = \"counter.wasm\"\nmemroy = 1\n",
            "line 5: there is no key \"memroy\"",
        ),
        ("[machine.bad]\nmodule = \"none.wasm\"\n", "none.wasm"),
        (
            "[machine.bad]\nmodule = \"counter.wasm\"\non = \"nowhere\"\n",
            "no node \"nowhere\"",
        ),
        (
            "[machine.bad]\nmodule = \"counter.wasm\"\nmemory = \"1K\"\n",
            "64 KiB to 64 GiB",
        ),
        (
            "[machine.bad]\nmodule = \"counter.wasm\"\nrm = true\nrestart = \"always\"\n",
            "restarted too",
        ),
        (
            "[machine.\"no name\"]\nmodule = \"counter.wasm\"\n",
            "no name",
        ),
    ] {
        let error = bench.refused(&format!("{good}{bad}"), &[]);
        assert!(error.contains(what), "{bad}: {error}");
        assert_eq!(bench.machines().await, [], "{bad}");
    }
    // A host directory is not rolled back with a checkpoint.
    let host = bench.folder.path().join("host");
    std::fs::create_dir(&host).unwrap();
    let volume = format!(
        "volume = [\"{}:/data\"]\nrestart = \"on-failure\"\n",
        host.display()
    );
    let output = bench.apply(&format!("{good}{volume}"), &[]);
    let warned = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && warned.contains("are not rolled back"),
        "{warned}"
    );
    assert_eq!(bench.running("good").await.restart, Restart::OnFailure);
    let output = bench.apply(&format!("{good}{volume}"), &[]);
    assert!(output.stderr.is_empty());
}

/// The file may leave an address open: then the machine keeps the one that it got.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_system_keeps_the_addresses_that_the_file_leaves_open() {
    let bench = Bench::new(&["a"]).await;
    // It cannot run: there is no such disk.
    let file = |cpu: u32| {
        format!(
            r#"
[machine.db]
kind = "qemu"
disk = ["/nowhere/db.raw"]
net = ["nobridge"]
cpu = {cpu}
"#
        )
    };
    let address = async || bench.machines().await[0].kind_spec["interfaces"][0]["mac"].clone();
    let created = bench.done(&file(1), &[]);
    assert!(created.contains("created"), "{created}");
    let first = address().await;
    assert!(first.is_string(), "{first}");
    let again = bench.done(&file(1), &[]);
    assert!(again.contains("unchanged"), "{again}");
    let said = bench.refused(&file(2), &[]);
    assert!(said.contains("db: cpu 1 → 2"), "{said}");
    let replaced = bench.done(&file(2), &["--replace"]);
    assert!(replaced.contains("replaced"), "{replaced}");
    assert_eq!(address().await, first);
}
