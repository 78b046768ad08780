//! How the leader finds that a lease has ended: its time is over, everything that came until then is
//! served, and no renewal of it waits to be confirmed.
//!
//! Requests are served on the agent's runtime, which may stand still while the store's own thread goes
//! on: a page of the program has to be read from a busy disk, or others have the processors. Renewals
//! that came in time wait there, of all other nodes at once.
//!
//! ```text
//!   time is over ─▶ turns of the service ─▶ over still, and no renewal is being confirmed: proposed
//!                   (what came is read)
//! ```
//!
//! A leader whose service stands still for ever ends no lease: nothing that it could do about the end of
//! one would be served either.

use std::sync::Arc;
use std::time::Duration;

use keel_net::BoxFuture;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::leader::{Leader, Serving, TICK};

/// Where the requests to a voter are served.
pub(super) trait Service: Send + Sync {
    /// Ends when what came before is served, as far as that does not wait for others. `false` if
    /// nothing is served any more.
    fn turn(&self) -> BoxFuture<'static, bool>;
}

/// The runtime of the agent.
pub(super) struct AgentService(pub(super) Handle);

/// How long a task of the agent sleeps twice in a turn. After the first time the runtime has looked for
/// input since the turn began, and before the second one ends what reads it has run.
const TURN_SLEEP: Duration = Duration::from_millis(5);
/// A turn that takes longer had to wait for much that came: there may be more.
const TURN_MAX: Duration = Duration::from_millis(30);
/// So many are enough, however busy the service is.
const TURNS_MAX: usize = 20;

impl Service for AgentService {
    fn turn(&self) -> BoxFuture<'static, bool> {
        let turns = self.0.spawn(async {
            for _ in 0..TURNS_MAX {
                let begun = Instant::now();
                tokio::time::sleep(TURN_SLEEP).await;
                tokio::time::sleep(TURN_SLEEP).await;
                if begun.elapsed() <= TURN_MAX {
                    return;
                }
            }
        });
        Box::pin(async move { turns.await.is_ok() })
    }
}

impl Leader {
    /// Finds leases that have ended, for [`Leader::propose`], until the store is closed.
    pub(super) async fn end_leases(self: Arc<Self>, service: Arc<dyn Service>) {
        let mut serving = self.serving.subscribe();
        loop {
            // (Another voter hears of no renewals: all leases look ended there, and nothing is to do.)
            let begun = serving.wait_for(|now| !matches!(now, Serving::No { .. }));
            match begun.await.as_deref() {
                Ok(Serving::Yes { .. }) => {}
                Ok(_) | Err(_) => return,
            }
            let end = Instant::now() + self.deadlines.wait(TICK);
            tokio::select! {
                () = tokio::time::sleep_until(end.min(self.next_tick(TICK))) => {}
                changed = serving.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            }
            let asked = self.deadlines.now();
            if self.deadlines.wait(TICK).is_zero() {
                if !service.turn().await {
                    return;
                }
                let stood = self.deadlines.now().saturating_sub(asked);
                self.deadlines.served(asked, stood);
            }
            // Also those whose renewals could not be confirmed meanwhile.
            if self.deadlines.has_ended() {
                self.lease_over.notify_one();
            }
        }
    }
}
