//! Clients of the store in the simulation: callers whose calls are recorded, and readers of
//! watches.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::linearizability::{Call, Op, Values};
use super::world::{Process, World};
use crate::interface::{Change, Compare, KeyValue, Revision, Store, StoreError, Txn, TxnOutcome};

/// Where the recorded clients are: no fault reaches it.
const OUTSIDE: &str = "outside";

/// The keys that the recorded clients use.
const PREFIX: &str = "k/";
pub(super) const KEYS: [&str; 2] = ["k/0", "k/1"];

/// A client gives up a call after it. It does not know then whether the call had an effect.
const PATIENCE: Duration = Duration::from_millis(2_500);

/// Makes one call from a computer, or from a place that no fault reaches, to a voter of any
/// computer.
///
/// # Errors
/// The store's; [`StoreError::Unknown`] if no answer came.
pub(super) async fn call<T>(
    world: &World,
    from: &str,
    request: impl AsyncFnOnce(&Process) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let name = world.pick(&world.voter_names()).unwrap_or_default();
    let Some(process) = world.process(&name) else {
        world.sleep_ms(1..20).await;
        return Err(StoreError::unavailable("its computer is down"));
    };
    let unknown = |reason: &str| StoreError::Unknown {
        reason: reason.into(),
    };
    let exchange = async {
        let arrived = world.travel(from, &name).await;
        if arrived {
            world.served(&name).await;
            let answer = request(&process).await;
            if world.travel(&name, from).await {
                return answer;
            }
        }
        std::future::pending().await
    };
    let answer = tokio::time::timeout(PATIENCE, exchange).await;
    world.detail(|| {
        let status = process.store.status();
        format!(
            "{from} asked {name}, term {}, applied {}",
            status.term, status.applied
        )
    });
    match (process.runs(), answer) {
        (false, _) => Err(unknown("its process ended")),
        (true, Err(_)) => Err(unknown("it did not answer in time")),
        (true, Ok(answer)) => answer,
    }
}

/// Whether a call may be made again: the store was not available, or did not say whether it was.
pub(super) fn is_pause(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Unavailable { .. } | StoreError::Unknown { .. } | StoreError::NotLeader { .. }
    )
}

/// What a client did.
#[derive(Default)]
pub(super) struct Recorded {
    pub(super) calls: Vec<Call>,
    /// Changes that were acknowledged: what each revision put.
    pub(super) acknowledged: BTreeMap<Revision, BTreeMap<String, u64>>,
}

fn number(value: &[u8]) -> Result<u64, String> {
    let text = std::str::from_utf8(value).map_err(|error| error.to_string())?;
    text.parse()
        .map_err(|_| format!("{text:?} was never written"))
}

/// What these keys hold, of entries that were read at once.
pub(super) fn values(keys: &[&str], entries: &[KeyValue]) -> Result<Values, String> {
    let mut found: Values = keys.iter().map(|key| (key.to_string(), None)).collect();
    for entry in entries {
        if let Some(value) = found.get_mut(&entry.key) {
            *value = Some(number(&entry.value)?);
        }
    }
    Ok(found)
}

/// Calls of client `client` to two keys, or to both at once, until `stop`.
pub(super) async fn record(
    world: Arc<World>,
    client: u64,
    calls_max: usize,
    stop: Arc<AtomicBool>,
) -> Result<Recorded, String> {
    let mut recorded = Recorded::default();
    let mut last = Values::new();
    let mut value = client << 32;
    let subsets = [&KEYS[..1], &KEYS[1..], &KEYS[..]];
    while !stop.load(Relaxed) && recorded.calls.len() < calls_max {
        let keys = world.pick(&subsets).unwrap_or(&KEYS);
        let begin = world.begun.elapsed();
        value += 1;
        let done = if world.chance(0.33) {
            let read = async |to: &Process| match keys {
                [key] => Ok(to.store.get(key).await?.into_iter().collect()),
                _ => Ok(to.store.list(PREFIX).await?.entries),
            };
            let found: Result<Vec<KeyValue>, _> = call(&world, OUTSIDE, read).await;
            match found {
                Ok(entries) => {
                    let found = values(keys, &entries)?;
                    last.extend(found.clone());
                    Ok((Op::Read(found), true))
                }
                Err(error) => Err(error),
            }
        } else {
            // Half of the writes have conditions, whatever they write.
            let compared = match world.chance(0.5) {
                true => world.pick(&subsets).unwrap_or(&KEYS),
                false => &[],
            };
            let of = |key: &&str| (key.to_string(), last.get(*key).copied().flatten());
            let when: Values = compared.iter().map(of).collect();
            let put: BTreeMap<_, _> = keys.iter().map(|key| (key.to_string(), value)).collect();
            write(&world, &mut recorded, when, put).await
        };
        let (op, known) = match done {
            Ok(done) => done,
            Err(error) if is_pause(&error) => {
                world.sleep_ms(5..60).await;
                continue;
            }
            Err(error) => return Err(error.to_string()),
        };
        let end = known.then(|| world.begun.elapsed());
        world.detail(|| format!("client {client}: {op:?} since {begin:?}, {end:?}"));
        recorded.calls.push(Call { op, begin, end });
        world.sleep_ms(10..150).await;
    }
    Ok(recorded)
}

/// Makes a transaction. Its outcome may stay unknown; the second value says whether it is known.
async fn write(
    world: &World,
    recorded: &mut Recorded,
    when: Values,
    put: BTreeMap<String, u64>,
) -> Result<(Op, bool), StoreError> {
    let mut txn = Txn::new();
    for (key, value) in &when {
        let key = key.clone();
        txn = txn.when(match value {
            None => Compare::Absent { key },
            Some(value) => Compare::Value {
                key,
                value: value.to_string().into(),
            },
        });
    }
    for (key, value) in &put {
        txn = txn.put(key.clone(), value.to_string());
    }
    let transact = async move |to: &Process| to.store.txn(txn).await;
    let done = match call(world, OUTSIDE, transact).await {
        Ok(outcome) => {
            if let TxnOutcome::Committed { revision } = outcome {
                recorded.acknowledged.insert(revision, put.clone());
            }
            Some(outcome.is_committed())
        }
        Err(StoreError::Unknown { .. }) => None,
        Err(error) => return Err(error),
    };
    Ok((Op::Txn { when, put, done }, done.is_some()))
}

/// What a reader of a watch saw: the changes of each revision, and the revisions that it could not
/// see because they were forgotten.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) changes: BTreeMap<Revision, Vec<Change>>,
    /// Up to this revision changes may be missing.
    pub(super) complete_after: Revision,
    pub(super) last: Revision,
}

/// Follows all keys, at one voter after another, until `stop`.
pub(super) async fn watch(world: Arc<World>, stop: Arc<AtomicBool>) -> Result<Seen, String> {
    let mut seen = Seen::default();
    while !stop.load(Relaxed) {
        let from = seen.last + 1;
        let name = world.pick(&world.voter_names()).unwrap_or_default();
        let Some(process) = world.process(&name) else {
            world.sleep_ms(5..50).await;
            continue;
        };
        let begun = tokio::time::timeout(PATIENCE, process.store.watch("", from)).await;
        let mut changes = match begun {
            Ok(Ok(changes)) => changes,
            Ok(Err(StoreError::Compacted { .. })) => {
                if let Ok(Ok(listing)) =
                    tokio::time::timeout(PATIENCE, process.store.list("")).await
                    && process.runs()
                {
                    seen.complete_after = listing.revision;
                    seen.last = seen.last.max(listing.revision);
                }
                continue;
            }
            Ok(Err(error)) if is_pause(&error) => {
                world.sleep_ms(5..50).await;
                continue;
            }
            Ok(Err(error)) => return Err(format!("a watch from {from}: {error}")),
            Err(_) => continue,
        };
        // A watch that ended with its process is noticed only by its silence.
        while let Ok(Some(Ok(next))) =
            tokio::time::timeout(Duration::from_millis(700), changes.next()).await
        {
            world.awake(&name).await;
            if !process.runs() {
                break;
            }
            if next.revision <= seen.last {
                return Err(format!(
                    "a watch from {from} gave revision {} after {}",
                    next.revision, seen.last
                ));
            }
            seen.last = next.revision;
            seen.changes.insert(next.revision, next.changes);
        }
    }
    Ok(seen)
}
