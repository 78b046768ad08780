//! How many bytes repositories with a quota have. To count them lists all their objects, which is
//! done once a minute at most.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For so long the bytes of a repository are not counted again.
const COUNTED_FOR: Duration = Duration::from_secs(60);

/// The bytes of repositories as they were counted, with what this node has stored since, by URL.
#[derive(Debug, Default)]
pub(super) struct Usage(Mutex<HashMap<String, (Instant, u64)>>);

impl Usage {
    /// The bytes of a repository, if they were counted a short time ago.
    pub(super) fn recent(&self, url: &str) -> Option<u64> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (counted, bytes) = known.get(url)?;
        (counted.elapsed() < COUNTED_FOR).then_some(*bytes)
    }

    pub(super) fn counted(&self, url: &str, bytes: u64) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(url.to_owned(), (Instant::now(), bytes));
    }

    /// A checkpoint of this many bytes was stored.
    pub(super) fn stored(&self, url: &str, bytes: u64) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, used)) = known.get_mut(url) {
            *used = used.saturating_add(bytes);
        }
    }
}
