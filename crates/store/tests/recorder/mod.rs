//! Clients whose calls are recorded, so that their history can be checked.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use keel_store::{Compare, KeyValue, Store, StoreError, Txn};

use tokio::task::JoinHandle;

use crate::linearizability::{Call, Op, Values, check};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// A client that runs, and then gives the calls that it made.
pub(crate) type Recorder = JoinHandle<Result<Vec<Call>, Box<dyn Error + Send + Sync>>>;

/// Waits until a condition holds.
pub(crate) async fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Outcome {
    let begun = Instant::now();
    while !holds() {
        if begun.elapsed() > Duration::from_secs(60) {
            return Err(format!("{what}: not within a minute").into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Waits until clients got so many more answers.
pub(crate) async fn wait_answers(answers: &AtomicU64, more: u64) -> Outcome {
    let before = answers.load(Relaxed);
    wait_until("answers", || answers.load(Relaxed) >= before + more).await
}

/// Whether the request certainly had no effect, or it is not known.
pub(crate) fn is_pause(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Unavailable { .. } | StoreError::Unknown { .. } | StoreError::NotLeader { .. }
    )
}

/// The keys that all clients read and change.
const PREFIX: &str = "r/";
const KEYS: [&str; 2] = ["r/0", "r/1"];

fn bytes(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn number(entry: KeyValue) -> Result<u64, &'static str> {
    let bytes = entry.value.try_into().map_err(|_| "not a number")?;
    Ok(u64::from_le_bytes(bytes))
}

/// Reads one key, or both at once.
async fn read(store: &dyn Store, keys: &[&str]) -> Result<Values, Box<dyn Error + Send + Sync>> {
    let mut found: Values = keys.iter().map(|key| (key.to_string(), None)).collect();
    let entries = match keys {
        [key] => store.get(key).await?.into_iter().collect(),
        _ => store.list(PREFIX).await?.entries,
    };
    for entry in entries {
        found.insert(entry.key.clone(), Some(number(entry)?));
    }
    Ok(found)
}

/// One client's calls to two keys, recorded until `stop`.
pub(crate) async fn record(
    store: Arc<dyn Store>,
    seed: u64,
    begun: Instant,
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
) -> Result<Vec<Call>, Box<dyn Error + Send + Sync>> {
    let mut random = seed;
    let mut next = || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        random >> 33
    };
    let mut history = Vec::new();
    let mut last = Values::new();
    let mut number = seed << 32;
    while !stop.load(Relaxed) {
        let keys = match next() % 3 {
            0 => &KEYS[..1],
            1 => &KEYS[1..],
            _ => &KEYS[..],
        };
        let begin = begun.elapsed();
        number += 1;
        // Clients of even numbers only read: a write at a leader that is cut off takes long.
        let (op, known) = if seed.is_multiple_of(2) || next() % 3 == 0 {
            match read(&*store, keys).await {
                Ok(found) => {
                    last.extend(found.clone());
                    (Op::Read(found), true)
                }
                Err(error) if error.downcast_ref().is_some_and(is_pause) => continue,
                Err(error) => return Err(error),
            }
        } else {
            // Half of the writes have conditions, of one key or both, whatever they write.
            let compared = match next() % 4 {
                0 => &KEYS[..1],
                1 => &KEYS[..],
                _ => &[],
            };
            let of = |key: &&str| (key.to_string(), last.get(*key).copied().flatten());
            let when: Values = compared.iter().map(of).collect();
            let mut txn = Txn::new();
            for (key, value) in &when {
                let key = key.clone();
                txn = txn.when(match value {
                    Some(value) => Compare::Value {
                        key,
                        value: bytes(*value),
                    },
                    None => Compare::Absent { key },
                });
            }
            for key in keys {
                txn = txn.put(*key, bytes(number));
            }
            let done = match store.txn(txn).await {
                Ok(outcome) => Some(outcome.is_committed()),
                Err(StoreError::Unknown { .. }) => None,
                Err(error) if is_pause(&error) => continue,
                Err(error) => return Err(error.into()),
            };
            let put = keys.iter().map(|key| (key.to_string(), number)).collect();
            (Op::Txn { when, put, done }, done.is_some())
        };
        let end = known.then(|| begun.elapsed());
        answers.fetch_add(1, Relaxed);
        history.push(Call { op, begin, end });
        // Few calls at once, or the search takes too long.
        tokio::time::sleep(Duration::from_millis(next() % 8)).await;
    }
    Ok(history)
}

/// Checks what all clients recorded as one history.
pub(crate) async fn check_all(clients: Vec<Recorder>) -> Outcome {
    let mut history = Vec::new();
    for client in clients {
        history.extend(client.await??);
    }
    let unknown = history.iter().filter(|call| call.end.is_none()).count();
    eprintln!(
        "{} calls, {unknown} of them without an answer",
        history.len()
    );
    assert!(history.len() > 200);
    let checked = tokio::task::spawn_blocking(move || check(&history));
    checked.await??;
    Ok(())
}
