//! Whom the kernel ends first when the host itself has no memory left: workers,
//! each of which is one machine that can be started again, before the agent and
//! its parent, without which none is.

/// Added to the badness of a worker, in thousandths of all memory.
const WORKER: i32 = 500;
/// The same of an agent and its parent.
const AGENT: i32 = -500;
const FILE: &str = "/proc/self/oom_score_adj";

/// Makes this process, and what it starts, one of the last to be ended. Needs a
/// right (CAP_SYS_RESOURCE); without it nothing changes.
pub fn spare_agent() {
    adjust(|now| now.min(AGENT));
}

/// Makes this process one of the first to be ended.
pub fn spend_worker() {
    adjust(|now| now.max(WORKER));
}

fn adjust(change: impl Fn(i32) -> i32) {
    let adjusted = std::fs::read_to_string(FILE).and_then(|text| {
        let now = text.trim().parse().map_err(std::io::Error::other)?;
        match change(now) {
            wanted if wanted == now => Ok(()),
            wanted => std::fs::write(FILE, wanted.to_string()),
        }
    });
    if let Err(error) = adjusted {
        tracing::debug!(%error, "whom the kernel ends first stays as it is");
    }
}
