//! Artificial network delay in test builds: every message waits before it is written. This exposes
//! code that relies on fast answers.

use std::sync::OnceLock;
use std::time::Duration;

/// Milliseconds by which each message is delayed.
const ENVIRONMENT: &str = "KEEL_NET_DELAY_MS";
/// More would only make tests time out.
const DELAY_MS_MAX: u64 = 1000;

fn delay() -> Duration {
    static DELAY: OnceLock<Duration> = OnceLock::new();
    *DELAY.get_or_init(|| {
        let ms = std::env::var(ENVIRONMENT).ok();
        let ms = ms.and_then(|ms| ms.parse().ok()).unwrap_or(0);
        Duration::from_millis(DELAY_MS_MAX.min(ms))
    })
}

/// Waits in a task.
pub(crate) async fn wait() {
    if !delay().is_zero() {
        tokio::time::sleep(delay()).await;
    }
}

/// Waits on a thread that may block.
pub fn wait_blocking() {
    if !delay().is_zero() {
        std::thread::sleep(delay());
    }
}
