//! Follows the keys of gossip in the store, and replaces them on one node for all
//! ([`keel_cluster::gossip::keys`]).

use crate::context::Context;
use crate::role::Role;
use keel_cluster::gossip::keys::{self, GossipKeys, KeysError, Outsider, SPREAD_WITHIN};
use keel_store::Revision;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Pause after a failure.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Longest time between two looks at the age of the keys.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// What the store has.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Followed {
    /// The keys, and the revision of their record.
    pub(super) keys: Option<(GossipKeys, Revision)>,
    outsider: Outsider,
}

/// What the store has, from now on until the agent ends.
pub(super) fn follow(context: Arc<Context>) -> watch::Receiver<Followed> {
    let (sender, receiver) = watch::channel(Followed::default());
    tokio::spawn(async move {
        while !sender.is_closed() {
            if let Err(error) = follow_once(&context, &sender).await {
                tracing::debug!(%error, "the keys of gossip cannot be followed, trying again");
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    });
    receiver
}

async fn follow_once(
    context: &Context,
    followed: &watch::Sender<Followed>,
) -> Result<(), KeysError> {
    let store = &*context.store;
    // Both keys have this prefix.
    let prefix = Key::GossipKeys.to_string();
    let listing = store.list(&prefix).await?;
    followed.send_replace(read(context).await?);
    let mut watch = store.watch(&prefix, listing.revision + 1).await?;
    while let Some(changes) = watch.next().await {
        changes?;
        followed.send_replace(read(context).await?);
    }
    Ok(())
}

async fn read(context: &Context) -> Result<Followed, KeysError> {
    Ok(Followed {
        keys: keys::read(&*context.store).await?,
        outsider: keys::outsider(&*context.store).await?,
    })
}

/// Makes the first key, and replaces keys that are due, while this node has the role.
pub(super) async fn replace(
    context: Arc<Context>,
    mut role: Role,
    mut followed: watch::Receiver<Followed>,
) {
    // Since when the record is as it is, as far as this node knows.
    let mut since: Option<(Revision, Instant)> = None;
    loop {
        let wait = if role.is_held() {
            followed.mark_unchanged();
            let known = match read(&context).await {
                Ok(known) => known,
                Err(error) => {
                    tracing::debug!(%error, "the keys of gossip cannot be read");
                    tokio::time::sleep(RETRY_AFTER).await;
                    continue;
                }
            };
            let revision = known.keys.as_ref().map(|(_, revision)| *revision);
            if since.map(|(of, _)| of) != revision {
                since = revision.map(|revision| (revision, Instant::now()));
            }
            let stood = since.map_or(Duration::ZERO, |(_, since)| since.elapsed());
            let step = next_step(&known, stood, unix_ms());
            match step {
                Step::Wait(wait) => wait,
                Step::Write { keys, is_answered } => {
                    let store = &*context.store;
                    let written = keys::write(store, &keys, revision, is_answered).await;
                    if let Err(error) = written {
                        tracing::warn!(%error, "the keys of gossip cannot be replaced yet");
                    }
                    RETRY_AFTER
                }
            }
        } else {
            LOOK_EVERY
        };
        tokio::select! {
            () = role.changed() => {}
            changed = followed.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

#[derive(Debug, PartialEq)]
enum Step {
    Wait(Duration),
    Write {
        keys: GossipKeys,
        /// Whether this begins a replacement: later removals of nodes need another one.
        is_answered: bool,
    },
}

/// What is to be done about a record that has stood for this long.
fn next_step(known: &Followed, stood: Duration, now_unix_ms: u64) -> Step {
    let Some((keys, _)) = &known.keys else {
        return Step::Write {
            keys: GossipKeys::first(now_unix_ms),
            is_answered: true,
        };
    };
    let mut keys = keys.clone();
    let is_rotating = keys.is_rotating();
    if is_rotating && stood < SPREAD_WITHIN {
        return Step::Wait(SPREAD_WITHIN - stood);
    }
    if !is_rotating {
        match known.outsider {
            // It is replaced soon, and would get this key, too.
            Outsider::Voter => return Step::Wait(RETRY_AFTER),
            Outsider::None if !keys.is_old(now_unix_ms) => return Step::Wait(LOOK_EVERY),
            Outsider::None | Outsider::Removed => {}
        }
    }
    keys.step(now_unix_ms);
    Step::Write {
        keys,
        is_answered: !is_rotating,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(known: &mut Followed, is_answered: bool) {
        if is_answered {
            known.outsider = Outsider::None;
        }
    }

    /// Carries the steps out, and tells how many keys there are after each, and how long each
    /// stands.
    fn steps(mut known: Followed, now: u64) -> Vec<(usize, Duration)> {
        let mut steps = Vec::new();
        loop {
            match next_step(&known, Duration::ZERO, now) {
                Step::Wait(wait) => {
                    let count = known.keys.as_ref().map_or(0, |(keys, _)| keys.keys.len());
                    steps.push((count, wait));
                    if wait == LOOK_EVERY {
                        return steps;
                    }
                    match next_step(&known, wait, now) {
                        Step::Write { keys, is_answered } => {
                            answered(&mut known, is_answered);
                            known.keys = Some((keys, 1));
                        }
                        Step::Wait(_) => unreachable!("it has stood long enough"),
                    }
                }
                Step::Write { keys, is_answered } => {
                    answered(&mut known, is_answered);
                    known.keys = Some((keys, 1));
                }
            }
        }
    }

    #[test]
    fn keys_are_made_and_replaced_step_by_step() {
        let first = Followed::default();
        assert_eq!(steps(first, 5), [(1, LOOK_EVERY)]);
        let keys = GossipKeys::first(5);
        let day = 24 * 3600 * 1000;
        let replaced = [(2, SPREAD_WITHIN), (2, SPREAD_WITHIN), (1, LOOK_EVERY)];
        let mut known = Followed {
            keys: Some((keys.clone(), 1)),
            outsider: Outsider::None,
        };
        assert_eq!(steps(known.clone(), 5 + day), [(1, LOOK_EVERY)]);
        assert_eq!(steps(known.clone(), 6 + day), replaced);
        known.outsider = Outsider::Removed;
        assert_eq!(steps(known.clone(), 5), replaced);
        known.outsider = Outsider::Voter;
        let step = next_step(&known, Duration::from_secs(999), 5);
        assert_eq!(step, Step::Wait(RETRY_AFTER));
    }

    /// The node may know the newer key of a replacement that was under way: another one follows.
    #[test]
    fn a_removal_during_a_replacement_is_not_forgotten() {
        let mut keys = GossipKeys::first(5);
        keys.step(5);
        let known = Followed {
            keys: Some((keys, 1)),
            outsider: Outsider::Removed,
        };
        let spread = (2, SPREAD_WITHIN);
        assert_eq!(
            steps(known, 5),
            [spread, spread, spread, spread, (1, LOOK_EVERY)]
        );
    }
}
