//! Nodes that run one machine by turns, at computers without voters: each holds a lease, runs the machine while it owns it and
//! its lease has time left, and takes it over from a node whose lease ended.
//!
//! Written from the rules of DESIGN.md, section 5: the deadline is the send time of the renewal,
//! plus the time to live, minus the difference of two clocks, minus the time to hold a machine;
//! only an ended lease makes a machine restartable; each take-over raises the epoch.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::clients::call;
use super::world::{Process, World};
use crate::interface::{Compare, LeaseId, Store, StoreError, Txn, TxnOutcome};

const TTL_MS: u64 = 1_500;
/// One per cent for clocks of different rates.
const DRIFT: Duration = Duration::from_millis(15);
const HOLD: Duration = Duration::from_millis(200);
const RENEW_EVERY: Duration = Duration::from_millis(300);
const RETRY_AFTER: Duration = Duration::from_millis(50);
const MACHINE: &str = "machine";

/// One line of the machine: when it was printed, under which epoch and where.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) at: Duration,
    pub(super) epoch: u64,
    pub(super) node: String,
}

/// A lease, and until when its holder may rely on it, by its own clock.
#[derive(Clone, Copy)]
struct Held {
    lease: LeaseId,
    until: Duration,
}

fn alive(node: &str) -> String {
    format!("alive/{node}")
}

/// The owner and epoch in a record.
fn parse(value: &[u8]) -> Result<(String, u64), String> {
    let text = String::from_utf8_lossy(value);
    let (owner, epoch) = text.split_once(' ').ok_or("no owner")?;
    let epoch = epoch.parse().map_err(|_| format!("no epoch: {text}"))?;
    Ok((owner.to_owned(), epoch))
}

struct Node {
    world: Arc<World>,
    name: String,
    held: Option<Held>,
    /// The epoch under which it owns the machine, as it learned under this lease.
    owns: Option<(u64, LeaseId)>,
}

impl Node {
    fn now(&self) -> Duration {
        let clock = self.world.clock(&self.name);
        clock.map_or(Duration::MAX, |clock| clock.now())
    }

    fn has_time(&self) -> Option<Held> {
        self.held.filter(|held| self.now() < held.until)
    }

    async fn renew(&mut self) -> Result<(), StoreError> {
        let sent = self.now();
        let until = sent + Duration::from_millis(TTL_MS) - DRIFT - HOLD;
        if let Some(Held { lease, .. }) = self.held {
            let renew = async |to: &Process| to.store.lease_renew(lease).await;
            match call(&self.world, &self.name, renew).await {
                Ok(_) => self.held = Some(Held { lease, until }),
                Err(StoreError::NoSuchLease { .. }) => {
                    (self.held, self.owns) = (None, None);
                }
                Err(error) => return Err(error),
            }
            return Ok(());
        }
        let grant = async |to: &Process| to.store.lease_grant(TTL_MS).await;
        let lease = call(&self.world, &self.name, grant).await?;
        let key = alive(&self.name);
        let put = Txn::new().put_leased(key, self.name.clone(), lease);
        let put = async |to: &Process| to.store.txn(put.clone()).await;
        call(&self.world, &self.name, put).await?;
        self.held = Some(Held { lease, until });
        Ok(())
    }

    /// Reads who owns the machine, and takes it if its owner has no lease.
    async fn look(&mut self) -> Result<(), StoreError> {
        let Some(held) = self.has_time() else {
            return Ok(());
        };
        let get = async |to: &Process| to.store.get(MACHINE).await;
        let record = call(&self.world, &self.name, get).await?;
        let (txn, epoch) = match &record {
            None => (Txn::new().when_absent(MACHINE), 1),
            Some(record) => {
                let invalid = |reason: String| StoreError::Invalid { reason };
                let (owner, epoch) = parse(&record.value).map_err(invalid)?;
                if owner == self.name {
                    self.owns = Some((epoch, held.lease));
                    return Ok(());
                }
                self.owns = None;
                let get = async |to: &Process| to.store.get(&alive(&owner)).await;
                if call(&self.world, &self.name, get).await?.is_some() {
                    return Ok(());
                }
                let unchanged = Txn::new().when_modified_at(MACHINE, record.modified);
                (unchanged.when_absent(alive(&owner)), epoch + 1)
            }
        };
        let own_lease = Compare::Attached {
            key: alive(&self.name),
            lease: held.lease,
        };
        let txn = txn
            .when(own_lease)
            .put(MACHINE, format!("{} {epoch}", self.name));
        let put = async |to: &Process| to.store.txn(txn.clone()).await;
        if let TxnOutcome::Committed { .. } = call(&self.world, &self.name, put).await? {
            self.owns = Some((epoch, held.lease));
            let name = self.name.clone();
            self.world
                .note(|| format!("{name} has the machine, epoch {epoch}"));
        }
        Ok(())
    }

    /// The epoch under which the machine may run here at this instant.
    fn runs(&self) -> Option<u64> {
        let held = self.has_time()?;
        let (epoch, lease) = self.owns?;
        (lease == held.lease).then_some(epoch)
    }
}

/// One node's part, until `stop`; the lines that its machine printed.
pub(super) async fn own(
    world: Arc<World>,
    name: String,
    stop: Arc<AtomicBool>,
) -> Result<Vec<Line>, String> {
    let mut lines = Vec::new();
    let mut node = Node {
        world: world.clone(),
        name,
        held: None,
        owns: None,
    };
    let mut renewed = None;
    while !stop.load(Relaxed) {
        let work = async {
            if renewed.is_none_or(|at: Duration| world.begun.elapsed() >= at + RENEW_EVERY) {
                let now = world.begun.elapsed();
                node.renew().await?;
                renewed = Some(now);
            }
            node.look().await
        };
        // The machine runs while its node talks to the store: it is looked at in between.
        let (done, mut ticks) = (work.await, 0);
        match done {
            Err(StoreError::Invalid { reason }) => return Err(reason),
            Err(error) if !super::clients::is_pause(&error) => {
                // The lease ended while it was used.
                (node.held, node.owns) = (None, None);
            }
            _ => {}
        }
        while ticks < 2 {
            ticks += 1;
            // What stands still prints nothing, and is killed if its time is over then.
            world.awake(&node.name).await;
            if let Some(epoch) = node.runs() {
                lines.push(Line {
                    at: world.begun.elapsed(),
                    epoch,
                    node: node.name.clone(),
                });
            }
            tokio::time::sleep(RETRY_AFTER / 2).await;
        }
    }
    Ok(lines)
}

/// Whether no line has an older epoch than a line before, and no epoch has two nodes.
pub(super) fn check(mut lines: Vec<Line>) -> Result<u64, String> {
    lines.sort_by_key(|line| line.at);
    let mut newest: Option<&Line> = None;
    for line in &lines {
        if let Some(newest) = newest {
            let is_other = line.epoch == newest.epoch && line.node != newest.node;
            if line.epoch < newest.epoch || is_other {
                return Err(format!("two copies ran: {line:?} after {newest:?}"));
            }
        }
        newest = Some(line);
    }
    Ok(newest.map_or(0, |line| line.epoch))
}
