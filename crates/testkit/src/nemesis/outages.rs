//! How long the store, and machines that are kept available, stand still.

use crate::LocalCluster;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Pause between two looks at a file.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Pause between two questions of a node to the store.
const ASK_EVERY: Duration = Duration::from_millis(40);
/// Time for a node to answer from the store; another question begins then.
const ANSWER_PATIENCE: Duration = Duration::from_millis(500);

/// Watches until it is dropped.
#[derive(Debug)]
pub(super) struct Outages {
    machines: Arc<Gap>,
    store: Arc<Gap>,
    over: Arc<AtomicBool>,
}

/// The longest time between two signs of life.
#[derive(Debug, Default)]
struct Gap {
    longest_ms: AtomicU64,
}

impl Gap {
    fn note(&self, gap: Duration) {
        let ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
        self.longest_ms.fetch_max(ms, Ordering::Relaxed);
    }

    fn take(&self) -> u64 {
        self.longest_ms.swap(0, Ordering::Relaxed)
    }
}

impl Outages {
    /// Begins to watch the files of machines, and the store by each of some nodes.
    pub(super) fn begin(cluster: &LocalCluster, nodes: &[&str], files: Vec<PathBuf>) -> Self {
        let outages = Outages {
            machines: Arc::default(),
            store: Arc::default(),
            over: Arc::default(),
        };
        for file in files {
            let (gap, over) = (outages.machines.clone(), outages.over.clone());
            tokio::spawn(watch_file(file, gap, over));
        }
        // Whichever node answers: a user asks another one if one is silent.
        let answered = Arc::new(Mutex::new(Instant::now()));
        for node in nodes {
            let client = cluster.client(node);
            let (gap, over) = (outages.store.clone(), outages.over.clone());
            let answered = answered.clone();
            tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let asked = client.get::<serde::de::IgnoredAny>("/v1/volumes");
                    let answer = tokio::time::timeout(ANSWER_PATIENCE, asked).await;
                    if matches!(answer, Ok(Ok(_))) {
                        let now = Instant::now();
                        let mut last = answered.lock().unwrap_or_else(PoisonError::into_inner);
                        gap.note(now.saturating_duration_since(*last));
                        *last = now.max(*last);
                    }
                    tokio::time::sleep(ASK_EVERY).await;
                }
            });
        }
        outages
    }

    /// The longest since the last call, in milliseconds: of a machine, and of the store.
    pub(super) fn take(&self) -> (u64, u64) {
        (self.machines.take(), self.store.take())
    }
}

impl Drop for Outages {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

async fn watch_file(file: PathBuf, gap: Arc<Gap>, over: Arc<AtomicBool>) {
    let (mut length, mut grown) = (0, Instant::now());
    while !over.load(Ordering::Relaxed) {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = std::fs::metadata(&file).map_or(0, |it| it.len());
        if now != length {
            gap.note(grown.elapsed());
            (length, grown) = (now, Instant::now());
        }
    }
}
