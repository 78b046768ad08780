//! Looks at files of hosts, whose file server may hang: then whoever looks waits for as long as it
//! hangs. So each look has a thread of its own, whose answer nobody has to wait for, and there are
//! few for one file.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// How long files may take to be looked at.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most looks at one file at a time.
const LOOKS_MAX: usize = 4;

/// The looks at files of hosts that have not ended, by path.
#[derive(Debug, Clone, Default)]
pub(super) struct Looks(Arc<Mutex<BTreeMap<String, usize>>>);

impl Looks {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at files, on a thread of its own.
    ///
    /// # Errors
    /// If they do not answer in time; what a later answer would be is dropped.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        paths: Vec<String>,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        self.look_within(PATIENCE, paths, look).await
    }

    async fn look_within<T: Send + 'static>(
        &self,
        patience: Duration,
        paths: Vec<String>,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        {
            let mut counts = self.counts();
            let hangs = |path: &&String| counts.get(*path).is_some_and(|count| *count >= LOOKS_MAX);
            if let Some(path) = paths.iter().find(hangs) {
                return Err(format!("{path} does not answer"));
            }
            for path in &paths {
                *counts.entry(path.clone()).or_default() += 1;
            }
        }
        let silent = format!("no answer of {}", paths.join(", "));
        let looking = Looking {
            looks: self.clone(),
            paths,
        };
        let (send, receive) = oneshot::channel();
        let thread = std::thread::Builder::new().name("host-files".into());
        let begun = thread.spawn(move || {
            let found = look();
            drop(looking);
            // Whoever asked may have stopped waiting.
            let _ = send.send(found);
        });
        begun.map_err(|error| error.to_string())?;
        match tokio::time::timeout(patience, receive).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(_)) => Err("the look at its files has failed".into()),
            Err(_) => Err(silent),
        }
    }
}

/// Counts a look until it has ended.
struct Looking {
    looks: Looks,
    paths: Vec<String>,
}

impl Drop for Looking {
    fn drop(&mut self) {
        let mut counts = self.looks.counts();
        for path in &self.paths {
            if let Some(count) = counts.get_mut(path) {
                *count -= 1;
            }
        }
        counts.retain(|_, count| *count > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each look that hangs has a thread; a further one is refused, and others are not held up.
    #[tokio::test]
    async fn a_file_that_does_not_answer_holds_up_few_threads() {
        let (looks, at_once) = (Looks::default(), Duration::from_millis(1));
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        for _ in 0..LOOKS_MAX {
            let held = held.clone();
            let look = looks.look_within(at_once, vec!["/hung".into()], move || {
                held.lock().unwrap().recv().unwrap();
            });
            assert!(look.await.unwrap_err().contains("no answer of /hung"));
        }
        let further = looks.look(vec!["/other".into(), "/hung".into()], || ());
        assert!(further.await.unwrap_err().contains("/hung does not answer"));
        assert_eq!(looks.look(vec!["/other".into()], || 7).await, Ok(7));
        for _ in 0..LOOKS_MAX {
            release.send(()).unwrap();
        }
        while !looks.counts().is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(looks.look(vec!["/hung".into()], || 7).await, Ok(7));
    }
}
