//! Linux systems on a network, whose hardware addresses move along: a client notices a move as a
//! delay at most, and a copy that is not the machine has no effect on the network.

use anyhow::{Context, Result, ensure};
use keel_api::MachineInfo;
use keel_kind_qemu::{Interface, Kernel, QemuKind, QemuSpec};
use keel_machine::moves::Ending;
use keel_testkit::bare_system::qemu_is_installed;
use keel_testkit::linux_system::{LinuxSystem, ask};
use keel_testkit::network::Network;
use keel_testkit::{Guest, LocalCluster, wait_for};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const KEEL: &str = env!("CARGO_BIN_EXE_keel");
/// The bridge of each node.
const BRIDGE: &str = "lan";
/// How long a client waits for each step of an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A cluster whose nodes have a bridge each, in one network with a client.
struct Systems {
    cluster: LocalCluster,
    linux: LinuxSystem,
    _folder: tempfile::TempDir,
}

impl Systems {
    /// A cluster of these nodes, of which some have a bridge; none, with the reason, where that
    /// cannot be.
    async fn start(names: &[&str], bridged: &[&str]) -> Result<Option<Self>> {
        let start = async |folder: &Path, network| {
            LocalCluster::start_in(Path::new(KEEL), folder, names, Some(network)).await
        };
        Self::started(names, bridged, start).await
    }

    /// As [`Self::start`], of nodes that have so many cores each, and balance.
    async fn start_balancing(nodes: &[(&str, f64)]) -> Result<Option<Self>> {
        let names: Vec<&str> = nodes.iter().map(|(name, _)| *name).collect();
        let start = async |folder: &Path, network| {
            let program = Path::new(KEEL);
            LocalCluster::start_balancing_in(program, folder, nodes, Some(network)).await
        };
        Self::started(&names, &names, start).await
    }

    async fn started(
        names: &[&str],
        bridged: &[&str],
        start: impl AsyncFnOnce(&Path, Network) -> Result<LocalCluster>,
    ) -> Result<Option<Self>> {
        let folder = tempfile::Builder::new().prefix("keel-").tempdir()?;
        if !qemu_is_installed() {
            return Ok(None);
        }
        let Some(linux) = LinuxSystem::make(folder.path())? else {
            return Ok(None);
        };
        let all: Vec<&str> = names.iter().copied().chain(["client"]).collect();
        let network = match Network::new(&all) {
            Ok(network) => network,
            Err(error) => {
                eprintln!("skipped: no networks can be made here ({error:#})");
                return Ok(None);
            }
        };
        for node in bridged {
            network.bridge(node, BRIDGE)?;
        }
        let cluster = start(folder.path(), network).await?;
        Ok(Some(Systems {
            cluster,
            linux,
            _folder: folder,
        }))
    }

    async fn upload(&self, bytes: &[u8]) -> Result<String> {
        let client = self.cluster.client("a");
        let bytes = bytes.to_vec().into();
        let uploaded = client.upload(&QemuKind::kind_name(), bytes).await?;
        Ok(uploaded.hash)
    }

    /// Runs a system with this address, and these words on its kernel's command line.
    async fn run(&self, name: &str, node: &str, address: &str, words: &str) -> Result<()> {
        let number: u8 = address.rsplit('.').next().context("an address")?.parse()?;
        let spec = QemuSpec {
            cpus: 1,
            kernel: Some(Kernel {
                image: self.upload(&self.linux.kernel).await?,
                initrd: Some(self.upload(&self.linux.initrd).await?),
                append: LinuxSystem::append(&format!("{address}/24"), words),
            }),
            disks: Vec::new(),
            interfaces: vec![Interface {
                bridge: BRIDGE.to_owned(),
                mac: format!("02:00:00:00:01:{number:02x}"),
            }],
            shutdown_s: 1,
        };
        let mut guest = Guest::new(name, node, &[], &[]);
        guest.memory_bytes = 128 << 20;
        let own = spec.to_kind_spec().map_err(anyhow::Error::msg)?;
        guest.kind = Some((QemuKind::kind_name(), own));
        self.cluster.run(&guest).await.map(drop)
    }

    fn network(&self) -> Result<&Network> {
        self.cluster.network().context("a network")
    }

    /// Waits until the system answers the client.
    async fn wait_answer(&self, address: &str) -> Result<()> {
        let network = self.network()?;
        let answers = wait_for("the system answers", || async {
            let asked = std::thread::scope(|scope| {
                let asked = scope.spawn(|| {
                    network.enter("client")?;
                    ask(address, Duration::from_secs(1))
                });
                asked
                    .join()
                    .unwrap_or_else(|_| anyhow::bail!("it panicked"))
            });
            asked.ok()
        });
        ensure!(answers.await? == address);
        Ok(())
    }

    /// Begins to ask the systems with these addresses, in turn and without an end.
    fn ask_always(&self, addresses: &[&str]) -> Result<Client> {
        let ends = Arc::<AtomicBool>::default();
        let (stopped, addresses) = (ends.clone(), addresses.iter());
        let addresses: Vec<String> = addresses.map(|it| (*it).to_owned()).collect();
        let enter = self.network()?.entrance("client")?;
        let thread = std::thread::spawn(move || {
            enter()?;
            let mut seen = Answers::default();
            while !stopped.load(Ordering::Relaxed) {
                for address in &addresses {
                    let asked = Instant::now();
                    let answer = ask(address, PATIENCE)
                        .with_context(|| format!("request {} to {address}", seen.count))?;
                    ensure!(answer == *address, "{address} answers as {answer}");
                    seen.count += 1;
                    seen.slowest = seen.slowest.max(asked.elapsed());
                }
            }
            Ok(seen)
        });
        Ok(Client { ends, thread })
    }
}

/// Asks without an end.
struct Client {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Result<Answers>>,
}

#[derive(Default)]
struct Answers {
    count: u64,
    slowest: Duration,
}

impl Client {
    /// Ends it; an error if a request had failed.
    fn end(self) -> Result<Answers> {
        self.ends.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ended.unwrap_or_else(|_| anyhow::bail!("the client panicked"))
    }

    /// Ends it; an error if a request had failed, or there were not more than a few.
    fn end_after_many(self) -> Result<()> {
        let Answers { count, slowest } = self.end()?;
        println!("{count} answers, the slowest after {slowest:?}");
        ensure!(count > 10, "{count} answers");
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_answers_through_moves() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"], &["a", "b"]).await? else {
        return Ok(());
    };
    let address = "10.214.0.101";
    systems.run("s", "a", address, "").await?;
    systems.wait_answer(address).await?;
    let client = systems.ask_always(&[address])?;
    for to in ["b", "a", "b"] {
        let report = systems.cluster.move_machine("a", "s", to).await?;
        assert_eq!(report.ending, Ending::Moved, "{}", report.line());
        println!("{}", report.line());
    }
    // The last one is whole: it is asked there.
    systems.wait_answer(address).await?;
    client.end_after_many()
}

/// Where a bridge is missing a system neither starts nor arrives, and the one that was to go
/// answers all the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_system_stays_where_its_network_is() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"], &["a"]).await? else {
        return Ok(());
    };
    let address = "10.214.0.101";
    systems.run("s", "a", address, "").await?;
    systems.wait_answer(address).await?;
    let client = systems.ask_always(&[address])?;
    let report = systems.cluster.move_machine("a", "s", "b").await?;
    assert_ne!(report.ending, Ending::Moved, "{}", report.line());
    let line = report.line();
    assert!(line.contains("no bridge lan"), "{line}");
    client.end()?;
    systems.wait_answer(address).await?;

    systems.run("t", "b", "10.214.0.102", "").await.ok();
    let ended = systems.cluster.wait_end("a", "t").await?;
    let shown = serde_json::to_string(&ended)?;
    assert!(shown.contains("no bridge lan"), "{shown}");
    Ok(())
}

/// What arrives is not in the network before the commit: a move that fails at its last step is not
/// noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_not_the_machine_is_not_in_its_network() -> Result<()> {
    let Some(systems) = Systems::start(&["a", "b"], &["a", "b"]).await? else {
        return Ok(());
    };
    let (cluster, address) = (&systems.cluster, "10.214.0.101");
    systems.run("s", "a", address, "").await?;
    systems.wait_answer(address).await?;
    let client = systems.ask_always(&[address])?;
    for (node, name) in [("b", "target.ready"), ("a", "source.prepared")] {
        cluster.failpoint(node, name, Some("error")).await?;
        let report = cluster.move_machine("a", "s", "b").await?;
        assert_ne!(report.ending, Ending::Moved, "{}", report.line());
        cluster.failpoint(node, name, None).await?;
    }
    systems.wait_answer(address).await?;
    client.end_after_many()
}

/// A node with three busy systems gives some away, while a client asks all of them; then each agent
/// is killed once.
#[tokio::test(flavor = "multi_thread")]
async fn systems_answer_while_they_are_balanced_and_agents_are_killed() -> Result<()> {
    let nodes = [("a", 0.5), ("b", 0.5), ("c", 0.5)];
    let Some(systems) = Systems::start_balancing(&nodes).await? else {
        return Ok(());
    };
    systems.cluster.set_policy("mode", "off").await?;
    let addresses = ["10.214.0.101", "10.214.0.102", "10.214.0.103"];
    let names = ["one", "two", "three"];
    for (name, address) in names.iter().zip(addresses) {
        systems.run(name, "a", address, "keel.busy").await?;
    }
    for address in addresses {
        systems.wait_answer(address).await?;
    }
    let client = systems.ask_always(&addresses)?;
    systems.cluster.set_policy("mode", "automatic").await?;
    // The nodes share a computer, so that each counts as busy what runs on the others.
    let relieved = wait_for("a system leaves", || async {
        let all: Vec<MachineInfo> = systems.cluster.client("a").get("/v1/machines").await.ok()?;
        let has_left = all.iter().any(|machine| machine.node != "a");
        has_left.then_some(())
    });
    relieved.await?;
    for (node, _) in nodes {
        systems.cluster.kill_agent(node)?;
        systems.cluster.wait_alive(node).await?;
    }
    for address in addresses {
        systems.wait_answer(address).await?;
    }
    client.end_after_many()
}
