//! This node's own record in the store: written when its agent starts, and again when it is known
//! which kinds of machines this host executes, and how, since that may have to be tried.

use crate::context::Context;
use crate::host::{HostMemory, cpu_features};
use crate::processes::Processes;
use crate::records::NodeRecord;
use keel_cluster::gossip::Start;
use keel_cluster::members::{self, MemberError};
use keel_machine::kind::Executed;
use keel_store::encoding;
use keel_store::keys::Key;
use keel_store::{Txn, TxnOutcome};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Pause before an attempt to write it is repeated.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Writes it; retries until it succeeds. When this run of the agent began, in the cluster's order.
pub(crate) async fn publish(context: Arc<Context>, processes: Arc<Processes>) -> Option<Start> {
    let mut record = describe(&context, &processes);
    let start = write(&context, &record).await?;
    tokio::spawn(async move {
        let (kinds, cache) = (context.kinds.clone(), context.dir.cache());
        let executed = tokio::task::spawn_blocking(move || kinds.executed_here(&cache)).await;
        // (An error means that the agent ends.)
        if let Ok(executed) = executed {
            record.executes = Some(executed.iter().map(|it| it.kind.clone()).collect());
            for Executed {
                kind,
                how,
                features,
            } in executed
            {
                record.kinds.push(how);
                if !features.is_empty() {
                    record.offers.insert(kind, features);
                }
            }
            write(&context, &record).await;
        }
    });
    Some(start)
}

async fn write(context: &Context, record: &NodeRecord) -> Option<Start> {
    let value = encoding::encode("a node's record", record).ok()?;
    loop {
        match try_write(context, &value).await {
            Ok(start) => return Some(start),
            Err(error) => {
                tracing::warn!(%error, "cannot write this node's record yet");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
    }
}

async fn try_write(context: &Context, value: &[u8]) -> Result<Start, MemberError> {
    let (_, incarnation) = members::cluster_of(&*context.store).await?;
    let txn = Txn::new().put(Key::Node(context.name.clone()), value);
    let outcome = context.store.txn(txn).await?;
    let (TxnOutcome::Committed { revision } | TxnOutcome::Refused { revision, .. }) = outcome;
    Ok(Start {
        incarnation,
        revision,
    })
}

fn describe(context: &Context, processes: &Processes) -> NodeRecord {
    let mut lacks = context.kinds.missing_for_moves();
    lacks.extend(processes.machines.slice().missing());
    NodeRecord {
        address: context.settings.listen.to_string(),
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
        memory_bytes: HostMemory::read().bytes,
        features: cpu_features(),
        lacks,
        kinds: Vec::new(),
        executes: None,
        offers: BTreeMap::new(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
