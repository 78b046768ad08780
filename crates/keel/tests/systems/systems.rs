//! A cluster of Linux systems with a network: each node has a bridge, and a client asks.

use anyhow::{Context, Result, ensure};
use keel_kind_qemu::{Interface, Kernel, QemuKind, QemuSpec};
use keel_machine::high_availability::HighAvailability;
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
pub(crate) struct Systems {
    pub(crate) cluster: LocalCluster,
    linux: LinuxSystem,
    pub(crate) folder: tempfile::TempDir,
}

impl Systems {
    /// A cluster of these nodes, of which some have a bridge; none, with the reason, where that
    /// cannot be.
    pub(crate) async fn start(names: &[&str], bridged: &[&str]) -> Result<Option<Self>> {
        let start = async |folder: &Path, network| {
            LocalCluster::start_in(Path::new(KEEL), folder, names, Some(network)).await
        };
        Self::started(names, bridged, start).await
    }

    /// As [`Self::start`], of nodes that have so many cores each, and balance.
    pub(crate) async fn start_balancing(nodes: &[(&str, f64)]) -> Result<Option<Self>> {
        let names: Vec<&str> = nodes.iter().map(|(name, _)| *name).collect();
        let start = async |folder: &Path, network| {
            let program = Path::new(KEEL);
            LocalCluster::start_balancing_in(program, folder, nodes, Some(network)).await
        };
        Self::started(&names, &names, start).await
    }

    /// As [`Self::start`], with copies of the store on all nodes.
    pub(crate) async fn start_replicated(names: &[&str]) -> Result<Option<Self>> {
        let start = async |folder: &Path, network| {
            let program = Path::new(KEEL);
            LocalCluster::start_to_be_broken(program, folder, names, Some(network), None).await
        };
        Self::started(names, names, start).await
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
            folder,
        }))
    }

    async fn upload(&self, bytes: &[u8]) -> Result<String> {
        let client = self.cluster.client("a");
        let bytes = bytes.to_vec().into();
        let uploaded = client.upload(&QemuKind::kind_name(), bytes).await?;
        Ok(uploaded.hash)
    }

    /// A system with this address, and these words on its kernel's command line.
    pub(crate) async fn spec(&self, address: &str, words: &str) -> Result<QemuSpec> {
        let number: u8 = address.rsplit('.').next().context("an address")?.parse()?;
        Ok(QemuSpec {
            kernel: Some(Kernel {
                image: self.upload(&self.linux.kernel).await?,
                initrd: Some(self.upload(&self.linux.initrd).await?),
                append: LinuxSystem::append(&format!("{address}/24"), words),
            }),
            interfaces: vec![Interface {
                bridge: BRIDGE.to_owned(),
                mac: format!("02:00:00:00:01:{number:02x}"),
            }],
            shutdown_s: 1,
            ..QemuSpec::default()
        })
    }

    /// Runs a system with this address, and these words on its kernel's command line.
    pub(crate) async fn run(
        &self,
        name: &str,
        node: &str,
        address: &str,
        words: &str,
    ) -> Result<()> {
        let spec = self.spec(address, words).await?;
        self.run_with(name, node, spec, None).await
    }

    /// Runs a system with this spec.
    pub(crate) async fn run_with(
        &self,
        name: &str,
        node: &str,
        spec: QemuSpec,
        ha: Option<HighAvailability>,
    ) -> Result<()> {
        let mut guest = Guest::new(name, node, &[], &[]);
        guest.ha = ha;
        guest.memory_bytes = 128 << 20;
        let own = spec.to_kind_spec().map_err(anyhow::Error::msg)?;
        guest.kind = Some((QemuKind::kind_name(), own));
        self.cluster.run(&guest).await.map(drop)
    }

    pub(crate) fn network(&self) -> Result<&Network> {
        self.cluster.network().context("a network")
    }

    /// Waits until the system answers the client.
    pub(crate) async fn wait_answer(&self, address: &str) -> Result<()> {
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
    pub(crate) fn ask_always(&self, addresses: &[&str]) -> Result<Client> {
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
pub(crate) struct Client {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Result<Answers>>,
}

#[derive(Default)]
pub(crate) struct Answers {
    pub(crate) count: u64,
    pub(crate) slowest: Duration,
}

impl Client {
    /// Ends it; an error if a request had failed.
    pub(crate) fn end(self) -> Result<Answers> {
        self.ends.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ended.unwrap_or_else(|_| anyhow::bail!("the client panicked"))
    }

    /// Ends it; an error if a request had failed, or there were not more than a few.
    pub(crate) fn end_after_many(self) -> Result<()> {
        let Answers { count, slowest } = self.end()?;
        println!("{count} answers, the slowest after {slowest:?}");
        ensure!(count > 10, "{count} answers");
        Ok(())
    }
}
