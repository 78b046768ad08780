//! Clients whose calls are recorded, so that their history can be checked.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use keel_store::{Compare, Store, StoreError, Txn};

use tokio::task::JoinHandle;

use crate::linearizability::{Call, Op, check};

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
    let mut last: Option<u64> = None;
    let mut number = seed << 32;
    while !stop.load(Relaxed) {
        let key = format!("r/{}", next() % 2);
        let begin = begun.elapsed();
        number += 1;
        let bytes = |value: u64| value.to_le_bytes().to_vec();
        // Clients of even numbers only read: a write at a leader that is cut off takes long.
        let kind = if seed.is_multiple_of(2) {
            0
        } else {
            next() % 3
        };
        let (op, known) = match kind {
            0 => match store.get(&key).await {
                Ok(found) => {
                    let found = found.map(|entry| entry.value.try_into()).transpose();
                    last = found.map_err(|_| "not a number")?.map(u64::from_le_bytes);
                    (Op::Read(last), true)
                }
                Err(error) if is_pause(&error) => continue,
                Err(error) => return Err(error.into()),
            },
            1 => match store.txn(Txn::new().put(key.clone(), bytes(number))).await {
                Ok(_) => (Op::Write(number), true),
                Err(StoreError::Unknown { .. }) => (Op::Write(number), false),
                Err(error) if is_pause(&error) => continue,
                Err(error) => return Err(error.into()),
            },
            _ => {
                let from = last;
                let compare = match from {
                    Some(value) => Compare::Value {
                        key: key.clone(),
                        value: bytes(value),
                    },
                    None => Compare::Absent { key: key.clone() },
                };
                let txn = Txn::new().when(compare).put(key.clone(), bytes(number));
                let swap = |done| Op::Swap {
                    from,
                    to: number,
                    done,
                };
                match store.txn(txn).await {
                    Ok(outcome) => (swap(Some(outcome.is_committed())), true),
                    Err(StoreError::Unknown { .. }) => (swap(None), false),
                    Err(error) if is_pause(&error) => continue,
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let end = known.then(|| begun.elapsed());
        answers.fetch_add(1, Relaxed);
        history.push(Call {
            key,
            op,
            begin,
            end,
        });
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
