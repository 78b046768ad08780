//! The description of the API at `/v1/openapi.json`, compared with what the command line and nodes
//! send each other.

mod checker;
mod recorder;

use checker::Description;
use keel_testkit::{LocalCluster, wait_for};
use recorder::{Exchange, Recorder};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// Operations that no command requests, or only of whole systems (`systems/agent.rs`).
const WITHOUT_COMMAND: [&str; 5] = [
    "inspect_system",
    "get_liveness",
    "get_readiness",
    "get_metrics",
    "get_openapi",
];

/// Two nodes, the first of which is reached over a socket that records.
struct Bench {
    cluster: LocalCluster,
    folder: tempfile::TempDir,
    recorder: Recorder,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir();
        let folder = folder.expect("a folder");
        let cluster = LocalCluster::start(Path::new(KEEL), folder.path(), &["a", "b"]).await;
        let cluster = cluster.expect("a cluster");
        let recorder = Recorder::start(&folder.path().join("front"), &cluster.folder("a"));
        Bench {
            cluster,
            folder,
            recorder,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    }

    /// What a command says, and whether it succeeded.
    async fn try_keel(&self, args: &[&str]) -> (bool, String) {
        let mut command = Command::new(KEEL);
        command
            .arg("--state-dir")
            .arg(self.path("front"))
            .args(args)
            .current_dir(self.folder.path());
        let output = tokio::task::spawn_blocking(move || command.output());
        let output = output.await.expect("no panic").expect("keel runs");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.success(), said)
    }

    /// What a command says that succeeds. Its words are separated by spaces.
    async fn keel(&self, line: &str) -> String {
        let args: Vec<&str> = line.split(' ').collect();
        let (done, said) = self.try_keel(&args).await;
        assert!(done, "{line}: {said}");
        said
    }

    async fn runs(&self, machine: &str) {
        let running = || async {
            let info = self.cluster.inspect("a", machine).await.ok()?;
            (info.status == "running" && info.memory_bytes.is_some()).then_some(())
        };
        wait_for(&format!("{machine} runs"), running)
            .await
            .expect("in time");
    }

    async fn description(&self) -> serde_json::Value {
        let client = self.cluster.client("a");
        client.get("/v1/openapi.json").await.expect("the document")
    }

    /// All exchanges, once the connections of all commands have ended.
    async fn exchanges(&self) -> Vec<Exchange> {
        let ended = || async { self.recorder.exchanges() };
        wait_for("connections end", ended).await.expect("in time")
    }
}

fn guest(name: &str) -> String {
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests");
    guests
        .join(name)
        .with_extension("wasm")
        .display()
        .to_string()
}

/// Commands about one machine, its volumes and files.
async fn use_machines(bench: &Bench) {
    let (counter, place) = (guest("counter"), bench.path("place"));
    std::fs::create_dir_all(&place).expect("a folder");
    let place = place.display().to_string();
    bench
        .keel(&format!("volume create data --at {place} --size 64M"))
        .await;
    bench.keel("volume ls").await;
    bench.keel("volume inspect data").await;
    bench
        .keel(&format!(
            "run -d --name m --on a --restart on-failure --cpu-limit 0.5 --env A=B \
             --volume tmp:1M:/scratch --volume cluster:data:/data:ro --volume {place}:/host:ro \
             --checkpoint-every 1h --checkpoint-keep 3 --balance actual --cpu-target 0.2 \
             {counter} 1000000 20"
        ))
        .await;
    bench.runs("m").await;
    bench
        .keel(&format!(
            "run -d --ha=checkpoint=60s --name h {counter} 1000000 20"
        ))
        .await;
    bench.runs("h").await;
    for line in [
        "ps",
        "-o json ps",
        "inspect m",
        "describe m",
        "-o json inspect m",
    ] {
        bench.keel(line).await;
    }
    for settings in [
        "--memory 1G --cpu 0.75 --restart always",
        "--checkpoint-every 2h --checkpoint-keep-for 1d",
        "--no-checkpoints --ha=checkpoint=60s,priority=7 --balance target",
        "--no-ha --memory-target 64M --io-target 1M",
    ] {
        bench.keel(&format!("set m {settings}")).await;
    }
    for line in [
        "logs m",
        "logs m --since 1h",
        "events",
        "events m --since 1h --limit 5",
    ] {
        bench.keel(line).await;
    }
    let file = bench.file("text", "some text");
    bench.keel(&format!("cp {file} m:/scratch/text")).await;
    bench.keel(&format!("cp m:/scratch/text {file}.copy")).await;
    // Fails where it begins to write, and removes what it began.
    let large = bench.file("large", &"x".repeat(3 << 20));
    let (copied, said) = bench.try_keel(&["cp", &large, "m:/scratch/large"]).await;
    assert!(!copied, "{said}");
    // A program executes no commands; for those of systems see `systems`.
    let (executed, said) = bench.try_keel(&["exec", "m", "--", "true"]).await;
    assert!(!executed && said.contains("of kind wasm"), "{said}");
    let (typed, said) = bench.try_keel(&["console", "m"]).await;
    assert!(!typed && said.contains("have no console"), "{said}");
    let (seen, said) = bench.try_keel(&["vnc", "m"]).await;
    assert!(!seen && said.contains("have no display"), "{said}");
    let machines = bench.file(
        "machines.toml",
        &format!("[machine.two]\nmodule = \"{counter}\"\nargs = [\"1000000\", \"20\"]\n"),
    );
    bench.keel(&format!("apply --diff --file {machines}")).await;
    bench.keel(&format!("apply --file {machines}")).await;
    bench.keel(&format!("apply --file {machines}")).await;
}

async fn use_moves(bench: &Bench) {
    // Checkpoints of the others are made by themselves too, one at a time.
    bench.runs("two").await;
    for line in [
        "checkpoint two --keep 3",
        "checkpoint two --full",
        "checkpoints two",
        "checkpoint prune two --keep 1 --dry-run",
        "checkpoint prune --keep-for 1d",
        "checkpoint quota --set 100G",
        "checkpoint quota",
        "checkpoint quota --none",
        "restore two --as r -d",
        "clone two --as c -d",
        "move two --to b --dry-run",
        "move two --to b --urgency high --downtime 50",
        "move two --to a --post-copy",
        "label m group=web",
        "label --node a zone=x",
    ] {
        bench.keel(line).await;
    }
    let (cancelled, said) = bench.try_keel(&["move", "two", "--cancel"]).await;
    assert!(!cancelled, "{said}");
    let rules = bench.file(
        "rules.toml",
        "[[rule]]\nname = \"apart\"\nrule = \"apart\"\nper = { label = \"zone\" }\n\
         machines.names = [\"m\", \"n-*\"]\n\
         [[rule]]\nname = \"stay\"\nrule = \"stay\"\nmachines.labels = { group = \"db\" }\n",
    );
    bench.keel(&format!("rule set -f {rules}")).await;
    bench.keel("rule ls").await;
    bench.keel("rule rm apart stay").await;
    // Parts, threads and objects.
    let threads = guest("threads");
    bench
        .keel(&format!("run -d --name t --on a {threads} 2 40000000"))
        .await;
    bench.runs("t").await;
    for line in [
        "set t --max-parts 2 --spawn here --part-memory 1G",
        "span t --nodes a,b",
        "parts t",
        "threads t",
        "objects t",
        "shake t --for 1s --rate 20 --seed 1",
        "unspan t",
        "kill t",
    ] {
        bench.keel(line).await;
    }
}

async fn use_cluster(bench: &Bench) {
    let backup = bench.path("backup").display().to_string();
    bench.keel(&format!("store backup {backup}")).await;
    for line in [
        "status",
        "-o json status",
        "nodes",
        "schedule a",
        "store",
        "store voters 1",
        "token join",
        "token user ada --role viewer --expires 1h",
        "token ls",
        "balance",
        "balance policy",
        "balance policy margin=0.2 weights.memory=0.5",
        "balance --plan --dry-run",
        "balance --plan --objective level --moves 3 --dry-run",
        "drain b --dry-run",
        "drain b --deadline 1h -d",
        "undrain b",
        "why m",
        "ledger",
        "ledger m --since 1h --limit 3",
        "history",
        "history b --points 3",
        "history --machine m",
    ] {
        bench.keel(line).await;
    }
    // The nodes measure their loads before they say more.
    let explained = || async {
        let (done, _) = bench.try_keel(&["why-not", "m", "--to", "b"]).await;
        done.then_some(())
    };
    let explained = wait_for("why-not answers", explained).await;
    explained.expect("in time");
    bench.keel("move c --to b").await;
    let planned = || async {
        let args = ["-o", "json", "drain", "b", "--dry-run"];
        let (done, plan) = bench.try_keel(&args).await;
        (done && !plan.contains("\"steps\": []")).then_some(plan)
    };
    let plan = wait_for("a plan has a move", planned).await;
    let plan = bench.file("plan.json", &plan.expect("in time"));
    bench
        .keel(&format!("balance --plan --from {plan} --yes"))
        .await;
    let (confirmed, said) = bench.try_keel(&["balance", "confirm", "m"]).await;
    assert!(!confirmed, "{said}");
    let tokens = bench.keel("token ls").await;
    let id = tokens.lines().find(|line| line.contains("user ada"));
    let id = id.and_then(|line| line.split_whitespace().next());
    bench
        .keel(&format!("token rm {}", id.expect("its number")))
        .await;
    bench.keel("audit").await;
    bench.keel("audit --since 1h --limit 10").await;
    let (removed, said) = bench.try_keel(&["node", "rm", "b"]).await;
    assert!(!removed && said.contains("keel leave"), "{said}");
    let (removed, said) = bench.try_keel(&["node", "rm", "b", "--node-is-dead"]).await;
    assert!(!removed && said.contains("is alive"), "{said}");
    let known = || async { bench.try_keel(&["ca"]).await.0.then_some(()) };
    let known = wait_for("the authority is known", known).await;
    known.expect("in time");
    bench.keel("ca set --lifetime 90d").await;
    bench.keel("ca rotate").await;
    bench.keel("reload").await;
}

async fn end_machines(bench: &Bench) {
    let (removed, said) = bench.try_keel(&["rm", "m"]).await;
    assert!(!removed, "{said}");
    for machine in ["m", "h", "r", "c", "two"] {
        bench.keel(&format!("stop {machine}")).await;
        bench.cluster.wait_end("a", machine).await.expect("it ends");
    }
    bench.keel("start m").await;
    bench.keel("stop m").await;
    bench.cluster.wait_end("a", "m").await.expect("it ends");
    bench.keel("rm m h r c two t").await;
    bench.keel("volume rm data").await;
    let mut image = vec![0; 2 << 20];
    image[510..512].copy_from_slice(b"\x55\xaa");
    let path = bench.path("disk.raw");
    std::fs::write(&path, image).expect("an image");
    let path = path.display();
    bench.keel(&format!("image import {path}")).await;
    bench.keel("image ls").await;
    bench.keel("image rm disk").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openapi_describes_what_commands_and_nodes_say() {
    let bench = Bench::new().await;
    use_machines(&bench).await;
    use_moves(&bench).await;
    use_cluster(&bench).await;
    end_machines(&bench).await;
    let description = Description::new(bench.description().await);
    let mut unused = description.ids();
    let mut wrong = BTreeSet::new();
    for exchange in bench.exchanges().await {
        match description.check(&exchange) {
            Ok(id) => drop(unused.remove(id)),
            Err(error) => drop(wrong.insert(error)),
        }
    }
    assert_eq!(wrong, BTreeSet::new());
    assert_eq!(
        unused,
        WITHOUT_COMMAND.into(),
        "operations without a command"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn openapi_has_the_methods_that_a_node_has() {
    let bench = Bench::new().await;
    let description = Description::new(bench.description().await);
    assert!(description.paths().count() > 40);
    for (path, methods) in description.paths() {
        let target = path.replace(['{', '}'], "");
        let allowed = allowed_methods(&bench.cluster.folder("a"), &target).await;
        assert_eq!(allowed, methods, "{path}");
    }
}

/// The methods that a node names when it refuses another one; `HEAD` goes with `GET`.
async fn allowed_methods(node: &Path, target: &str) -> BTreeSet<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let socket = tokio::net::UnixStream::connect(node.join("api.socket")).await;
    let mut socket = socket.expect("a connection");
    let request = format!("PATCH {target} HTTP/1.1\r\nhost: keel\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut response = String::new();
    socket.read_to_string(&mut response).await.expect("text");
    assert!(response.starts_with("HTTP/1.1 405"), "{target}: {response}");
    let lines = response.lines().filter_map(|line| line.split_once(": "));
    let allowed = lines.filter(|(name, _)| name.eq_ignore_ascii_case("allow"));
    allowed
        .flat_map(|(_, methods)| methods.split(','))
        .filter(|method| *method != "HEAD")
        .map(str::to_owned)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn openapi_that_is_wrong_is_detected() {
    let bench = Bench::new().await;
    let counter = guest("counter");
    bench.keel(&format!("run -d --name m {counter} 10 1")).await;
    bench.keel("events").await;
    bench.keel("logs m").await;
    bench.keel("token join").await;
    let exchanges = bench.exchanges().await;
    let document = bench.description().await;
    let errors = |document: &serde_json::Value| {
        let description = Description::new(document.clone());
        let checked = exchanges.iter().map(|it| description.check(it));
        checked.filter_map(Result::err).collect::<Vec<String>>()
    };
    assert_eq!(errors(&document), Vec::<String>::new());
    let schemas = "/components/schemas";
    let logs = "/paths/~1v1~1machines~1{name}~1logs/get/parameters";
    for (place, old, new, reason) in [
        // A field of a request, of an answer, of a variant and of a line.
        (
            format!("{schemas}/RunRequest/properties"),
            "memory_bytes",
            "memory",
            "POST /v1/machines",
        ),
        (
            format!("{schemas}/MachineInfo/properties"),
            "exit_code",
            "code",
            "GET /v1/machines/m",
        ),
        (
            format!("{schemas}/TokenRequest/oneOf/0/properties"),
            "join",
            "joins",
            "POST /v1/tokens",
        ),
        (
            format!("{schemas}/Event/properties"),
            "at_unix_ms",
            "at",
            "GET /v1/events",
        ),
        // A path, and a kind of content.
        (
            "/paths".to_owned(),
            "/v1/images",
            "/v1/files",
            "/v1/images is not described",
        ),
        (
            "/paths/~1v1~1events/get/responses/200/content".to_owned(),
            "application/x-ndjson",
            "application/json",
            "is not described",
        ),
        (format!("{logs}/1"), "name", "nom", "is not described"),
    ] {
        let mut spoilt = document.clone();
        let object = spoilt.pointer_mut(&place).and_then(|it| it.as_object_mut());
        let object = object.unwrap_or_else(|| panic!("no {place}"));
        let value = object.remove(old).unwrap_or_else(|| panic!("no {old}"));
        object.insert(new.to_owned(), value);
        let errors = errors(&spoilt);
        let found = errors.iter().any(|error| error.contains(reason));
        assert!(found, "{place} {old}: {errors:?}");
    }
}
