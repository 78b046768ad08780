//! Whom the kernel ends first when the host itself has no memory left: workers,
//! each of which is one machine that can be started again, before the agent and
//! its parent, without which none is. And who goes first where processors are scarce:
//! what balances and moves machines, before guests, or a hot node could not be helped.

/// Added to the badness of a worker, in thousandths of all memory.
const WORKER: i32 = 500;
/// The same of an agent and its parent.
const AGENT: i32 = -500;
const FILE: &str = "/proc/self/oom_score_adj";

/// Nice value of what is not a guest.
const CONTROL_NICE: i32 = -10;
/// Nice value of guests where that of the others can be had.
const GUEST_NICE: i32 = 0;

/// Lets this process, and what it starts, go before guests. Needs a right
/// (CAP_SYS_NICE); without it nothing changes.
pub fn go_first() {
    if let Err(error) = rustix::process::setpriority_process(None, CONTROL_NICE) {
        tracing::debug!(%error, "guests are as important as what moves them");
    }
}

/// The nice value for guests' threads in this process; `None` if they are to have its
/// own.
pub fn guest_nice() -> Option<i32> {
    let own = rustix::process::getpriority_process(None).ok()?;
    (own < GUEST_NICE).then_some(GUEST_NICE)
}

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
