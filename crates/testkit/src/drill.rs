//! Drills: one failpoint and one action at a time. The failpoint is triggered, the fault is
//! repaired, and then the machine must run on exactly one node, continue writing its lines, and
//! have rewound only if its process was killed.

use crate::witness::{Evidence, examine};
use crate::{Guest, LocalCluster, wait_for};
use anyhow::{Context, Result, ensure};
use keel_api::{
    CheckpointInfo, CheckpointRequest, MachineInfo, MoveRequest, PartsInfo, SpanRequest, Urgency,
};
use keel_machine::failpoint::{Action, Failpoint, Injection, Site};
use keel_machine::kind::{KindName, KindSpec};
use keel_machine::restart_policy::Restart;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time limit of a request that a fault may block.
const REQUEST_PATIENCE: Duration = Duration::from_secs(25);
/// Pause between attempts to trigger a failpoint.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// How long stopped processes stay stopped.
const STOPPED: Duration = Duration::from_millis(700);

/// The operation that passes a failpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trigger {
    Move,
    PostCopy,
    Checkpoint,
    Restart,
    End,
}

/// The operation that passes a failpoint, and the failpoints that it needs before.
fn trigger_for(name: &str) -> (Trigger, &'static [(&'static str, &'static str)]) {
    let kind = name.split('.').next().unwrap_or_default();
    match (kind, name) {
        (_, "move.settle" | "move.settled") => (Trigger::Move, &[("move.committed", "error")]),
        (_, "move.take-back" | "move.taken-back") => (Trigger::Move, &[("target.go", "kill")]),
        (_, "arrival.asked") => (Trigger::Move, &[("source.go", "error")]),
        (_, "arrival.settle" | "arrival.settled") => {
            (Trigger::Move, &[("source.prepared", "error")])
        }
        (_, "move.thaw" | "source.thaw" | "move.abort") => {
            (Trigger::Move, &[("source.image", "error")])
        }
        (_, "post-copy.pull" | "post-copy.wait") => {
            (Trigger::PostCopy, &[("post-copy.push", "delay(200)")])
        }
        ("post-copy", _) | (_, "move.served") => (Trigger::PostCopy, &[]),
        ("checkpoint", _) => (Trigger::Checkpoint, &[]),
        ("restore" | "start" | "spanning-start", _) => (Trigger::Restart, &[]),
        ("end", _) => (Trigger::End, &[]),
        _ => (Trigger::Move, &[]),
    }
}

/// The result of a drill.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Time from the fault to the machine's next line.
    pub recovery: Duration,
    /// Whether the machine continued from an earlier line.
    pub rewound: bool,
}

/// A machine for drills. Its cluster has one node without faults, and two others between which it
/// moves.
#[derive(Debug)]
pub struct Drill<'a> {
    /// The cluster.
    pub cluster: &'a LocalCluster,
    /// The node without faults, which is asked.
    pub calm: &'a str,
    /// The nodes among which the machine moves; two.
    pub nodes: [&'a str; 2],
    /// The machine.
    pub machine: &'a str,
    /// Folder of the witness's file and the checkpoints, which all nodes see.
    pub folder: &'a Path,
    /// Memory of the machine, in MiB.
    pub mib: u32,
    /// Time between its lines, in microseconds.
    pub pause_us: u32,
    /// Memory limit of its parts in bytes, if it may have up to three parts.
    pub part_memory_bytes: Option<u64>,
    /// Whether it has a part on the node that is asked.
    pub spans: bool,
    /// Another kind of machine than the WebAssembly program `witness.wasm`.
    pub kind: Option<DrillKind>,
}

/// A kind of machine for drills.
#[derive(Debug, Clone)]
pub struct DrillKind {
    /// Its name.
    pub name: KindName,
    /// A machine that writes the lines of a witness into the drill's file.
    pub witness: KindSpec,
    /// A machine that ends at once, with success.
    pub brief: KindSpec,
}

impl Drill<'_> {
    /// The witness's file.
    pub fn file(&self) -> PathBuf {
        self.folder.join(format!("{}.lines", self.machine))
    }

    /// The module of the witness, if it is a program.
    fn module(&self) -> Result<Vec<u8>> {
        match self.kind {
            Some(_) => Ok(Vec::new()),
            None => Ok(std::fs::read(self.folder.join("witness.wasm"))?),
        }
    }

    fn repository(&self) -> String {
        self.folder.join("repository").display().to_string()
    }

    /// Starts the machine, and makes its first checkpoint. Its module is `witness.wasm` in the
    /// folder.
    ///
    /// # Errors
    /// The node's error.
    pub async fn start(&self) -> Result<()> {
        let witness = self.module()?;
        let (file, mib) = (self.file().display().to_string(), self.mib.to_string());
        let pause = self.pause_us.to_string();
        let args = [file.as_str(), mib.as_str(), pause.as_str()];
        let mut guest = Guest::new(self.machine, self.nodes[0], &witness, &args);
        guest.volume = Some(self.folder).filter(|_| self.kind.is_none());
        let kind = self.kind.as_ref();
        guest.kind = kind.map(|kind| (kind.name.clone(), kind.witness.clone()));
        guest.restart = Restart::OnFailure;
        guest.balancing.part_memory_bytes = self.part_memory_bytes;
        guest.balancing.parts_max = self.part_memory_bytes.map(|_| 3);
        self.cluster.run(&guest).await?;
        self.wait_running(0).await?;
        self.checkpoint().await?;
        Ok(())
    }

    /// Replaces the machine by a new one, so that its restarts do not affect the next drill.
    ///
    /// # Errors
    /// The node's error.
    pub async fn start_afresh(&self) -> Result<()> {
        let client = self.cluster.client(self.calm);
        let path = format!("/v1/machines/{}", self.machine);
        let _: keel_api::Nothing = client.post(&format!("{path}/stop"), &()).await?;
        let _: keel_api::Nothing = client
            .call(hyper::Method::DELETE, &path, bytes::Bytes::new())
            .await?;
        std::fs::remove_file(self.file())?;
        std::fs::remove_dir_all(self.folder.join("repository"))?;
        self.start().await
    }

    /// The lines that the machine has written.
    ///
    /// # Errors
    /// If two copies wrote, or lines are missing.
    pub fn evidence(&self) -> Result<Evidence> {
        examine(&std::fs::read_to_string(self.file())?)
    }

    async fn checkpoint(&self) -> Result<CheckpointInfo> {
        let path = format!("/v1/machines/{}/checkpoints", self.machine);
        let request = CheckpointRequest {
            to: Some(self.repository()),
            keep: Some(3),
            ..CheckpointRequest::default()
        };
        Ok(self.cluster.client(self.calm).post(&path, &request).await?)
    }

    /// Waits until it has one part, on the node without faults.
    async fn span(&self) -> Result<()> {
        let path = format!("/v1/machines/{}/parts", self.machine);
        let request = SpanRequest {
            nodes: vec![self.calm.to_owned()],
            here: false,
        };
        let client = self.cluster.client(self.calm);
        wait_for(&format!("{} spans", self.machine), || async {
            let parts: Result<PartsInfo, _> = client.post(&path, &request).await;
            (parts.ok()?.parts.len() == 2).then_some(())
        })
        .await
    }

    async fn info(&self) -> Option<MachineInfo> {
        self.cluster.inspect(self.calm, self.machine).await.ok()
    }

    /// Waits until the machine runs on one node only and continues to write.
    async fn wait_running(&self, lines: u64) -> Result<String> {
        let runs = wait_for(&format!("{} runs again", self.machine), || async {
            let info = self.info().await?;
            let settled = self.nodes.iter().all(|node| {
                let expected = usize::from(*node == info.node);
                self.cluster.workers_of(node, self.machine) == expected
            });
            let told = self.evidence().ok()?;
            (info.status == "running" && settled && told.lines > lines).then_some(info.node)
        })
        .await;
        match runs {
            Ok(node) => Ok(node),
            Err(error) => {
                // The content of its file explains more than the time-out.
                self.evidence()?;
                let info = self.info().await;
                Err(error.context(format!("{info:?}")))
            }
        }
    }

    async fn order(&self, node: &str, name: &str, order: Option<&str>) -> Result<()> {
        wait_for(&format!("{node} takes an order for {name}"), || async {
            self.cluster.failpoint(node, name, order).await.ok()
        })
        .await
    }

    /// The node where a failpoint is passed, if the machine moves from `source`.
    fn place<'b>(&'b self, site: Site, source: &'b str) -> &'b str {
        let [one, other] = self.nodes;
        match site.is_target() {
            false => source,
            true if one == source => other,
            true => one,
        }
    }

    /// Runs one drill.
    ///
    /// # Errors
    /// The violated condition, or that the failpoint was not passed.
    pub async fn run(&self, failpoint: &Failpoint, order: Injection) -> Result<Outcome> {
        let source = self.wait_running(0).await?;
        if self.spans {
            self.span().await?;
        }
        let before = self.evidence()?;
        let (trigger, ways) = trigger_for(failpoint.name);
        let at = self.place(failpoint.site, &source).to_owned();
        let passed = self.cluster.failpoints_passed(&at).len();
        let mut orders = vec![(failpoint.name, order.to_string())];
        orders.extend(
            ways.iter()
                .map(|(name, order)| (*name, (*order).to_owned())),
        );
        let mut given = Vec::new();
        for (name, order) in &orders {
            let place = keel_machine::failpoint::find(name).context("an unknown failpoint")?;
            let node = self.place(place.site, &source).to_owned();
            self.order(&node, name, Some(order)).await?;
            given.push((node, *name));
        }
        let begun = Instant::now();
        // A first attempt may meet effects of the drill before.
        let provoked = async {
            loop {
                self.provoke(trigger, &source).await;
                tokio::time::sleep(AGAIN_AFTER).await;
                self.back_to(&source).await;
            }
        };
        let watched = async {
            wait_for(&format!("{} passes {}", at, failpoint.name), || async {
                let names = self.cluster.failpoints_passed(&at);
                names[passed..]
                    .iter()
                    .any(|name| name == failpoint.name)
                    .then_some(())
            })
            .await?;
            let fault = Instant::now();
            if order.action == Action::Stop {
                tokio::time::sleep(STOPPED).await;
                self.cluster.wake(&at);
            }
            anyhow::Ok(fault)
        };
        let fault: Result<Instant> = tokio::select! {
            fault = watched => fault,
            never = provoked => match never {},
        };
        let fault = fault.with_context(|| format!("after {:?}", begun.elapsed()))?;
        for (node, name) in &given {
            self.order(node, name, None).await?;
        }
        let lines = self.evidence()?.lines;
        self.wait_running(lines.max(before.lines)).await?;
        let recovery = fault.elapsed();
        let after = self.evidence()?;
        let rewinds = after.rewinds - before.rewinds;
        // Between the commit and the last part that has its new home no fault is tolerated.
        let part = self.spans
            && (failpoint.site.is_worker() && order.action == Action::Kill
                || failpoint.name == "home.succeeds");
        let taken = part || may_rewind(failpoint, order.action, trigger);
        ensure!(
            rewinds == 0 || taken,
            "it rewound {} lines, although its process was not killed",
            after.repeated - before.repeated
        );
        Ok(Outcome {
            recovery,
            rewound: rewinds > 0,
        })
    }

    /// Moves the machine back after a move that did not pass the failpoint, for instance because
    /// no thread waited for a page: the next attempt must begin at the same node.
    async fn back_to(&self, source: &str) {
        let info = self.cluster.inspect(self.calm, self.machine).await;
        if info.is_ok_and(|info| info.status == "running" && info.node != source) {
            let back = self.cluster.move_machine(self.calm, self.machine, source);
            // A move that hangs, or fails, is repeated.
            let _ = tokio::time::timeout(REQUEST_PATIENCE, back).await;
        }
    }

    /// Performs the operation that leads to the failpoint; its answer is ignored.
    async fn provoke(&self, trigger: Trigger, source: &str) {
        let asked = async {
            match trigger {
                Trigger::Move => {
                    let to = self.place(Site::TargetAgent, source);
                    let moved = self.cluster.move_machine(self.calm, self.machine, to).await;
                    drop(moved);
                }
                Trigger::PostCopy => {
                    let to = self.place(Site::TargetAgent, source);
                    let request = MoveRequest {
                        to: to.to_owned(),
                        post_copy: true,
                        checkpoint_to: Some(self.repository()),
                        urgency: Urgency::Normal,
                        downtime_ms: None,
                    };
                    let client = self.cluster.client(self.calm);
                    drop(crate::move_as(&client, self.machine, &request).await);
                }
                Trigger::Checkpoint => drop(self.checkpoint().await),
                Trigger::Restart => {
                    drop(self.cluster.kill_worker(source, self.machine));
                    tokio::time::sleep(STOPPED).await;
                }
                Trigger::End => drop(self.brief(source).await),
            }
        };
        // A blocked request is ignored here.
        let _ = tokio::time::timeout(REQUEST_PATIENCE, asked).await;
    }

    /// Runs a machine that ends at once, and whose end must be recorded.
    async fn brief(&self, node: &str) -> Result<()> {
        let witness = self.module()?;
        let name = format!("{}-{:08x}", self.machine, rand::random::<u32>());
        let mut guest = Guest::new(&name, node, &witness, &["-", "1", "1000", "5"]);
        let kind = self.kind.as_ref();
        guest.kind = kind.map(|kind| (kind.name.clone(), kind.brief.clone()));
        self.cluster.run(&guest).await?;
        let info = self.cluster.wait_end(self.calm, &name).await?;
        ensure!(info.exit_code == Some(0), "{name} is {}", info.status);
        let path = format!("/v1/machines/{name}");
        let client = self.cluster.client(self.calm);
        let _: keel_api::Nothing = client
            .call(hyper::Method::DELETE, &path, bytes::Bytes::new())
            .await?;
        Ok(())
    }
}

/// Whether the machine may run at the target already, resumed by its agent or by the source,
/// whichever is first.
const WENT_ON: [&str; 2] = ["target.go", "target.gone"];

/// Whether the fault kills the machine's own process.
fn may_rewind(failpoint: &Failpoint, action: Action, trigger: Trigger) -> bool {
    let killed = action == Action::Kill
        && (matches!(failpoint.site, Site::SourceWorker | Site::Worker)
            // A part of it is still at the source.
            || trigger == Trigger::PostCopy && failpoint.site.is_worker()
            || WENT_ON.contains(&failpoint.name));
    let lost_there = trigger_for(failpoint.name)
        .1
        .iter()
        .any(|(name, order)| WENT_ON.contains(name) && *order == "kill");
    killed || lost_there || trigger == Trigger::Restart
}
