//! Observes each machine that may have parts once a sample, has `keel_balance` decide, and carries
//! out the decision.

use super::super::handle::NodeBalancer;
use super::actuator::carry_out;
use super::observation::{
    bytes_of, draw, follow_pages, nodes, parts, room, silent, threads, view, waited_cores,
};
use super::tracked_state::{HOT_LOOKS, TrackedMachine};
use crate::events::Note;
use crate::processes::WorkerHandle;
use crate::spanning;
use keel_api::EventKind;
use keel_balance::Name;
use keel_balance::fine_grained::{Action, Choice, Observation, Part, decide, gather_if_slower};
use keel_balance::ledger::Decision;
use keel_balance::policy::{Mode, Policy};
use keel_cluster::{Epoch, MachineName, NodeName};
use keel_kind_wasm::span::Heat;
use keel_machine::spec::{BalanceBy, Balancing, Record, Spawn};
use keel_machine::worker::control::State;
use keel_net::coarse_timer;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Samples after a decision without a further one for that machine: the loads do not reflect the
/// decision before.
const SETTLE_SAMPLES: u32 = 6;
/// How long a moved thread stays. Much shorter than for machines, because its move costs
/// microseconds only.
pub(super) const THREAD_HOLD: Duration = Duration::from_secs(10);
/// How long no thread moves back between two nodes. A thread's weight differs between nodes, and
/// two nodes could alternate.
const COOL_DOWN: Duration = Duration::from_secs(60);
/// Consecutive samples with a loss by its parts before a machine is merged.
const LOSING_SAMPLES: u32 = 5;
/// Interval of locating the objects that threads prefer.
const LIKES_EVERY: Duration = Duration::from_secs(5);
/// How long a thread that followed its pages does not do so again.
pub(super) const FOLLOW_AGAIN: Duration = Duration::from_secs(600);
/// Pause before a failed decision is retried.
const FAILED_AFTER: Duration = Duration::from_secs(15);

/// Observes this node's machines until the agent ends.
pub(in crate::balancer) async fn follow(handle: Arc<NodeBalancer>) {
    let mut known: HashMap<MachineName, TrackedMachine> = HashMap::new();
    loop {
        let policy = handle.query(|balancer, _, _| balancer.policy().0.clone());
        let Ok(policy) = policy.await else { return };
        observe_all(&handle, &policy, &mut known).await;
        coarse_timer::sleep(Duration::from_millis(policy.sample_ms)).await;
    }
}

async fn observe_all(
    handle: &Arc<NodeBalancer>,
    policy: &Policy,
    known: &mut HashMap<MachineName, TrackedMachine>,
) {
    let mut seen = HashSet::new();
    for machine in handle.processes.machines.names() {
        let placed = handle.placements.get(machine.as_str());
        let Some(placed) = placed.filter(|it| it.movable && it.owner == handle.context.name) else {
            continue;
        };
        let balancing = placed.balancing;
        let is_balanced = policy.mode != Mode::Off && balancing.by != BalanceBy::Off;
        let parts_max = balancing.parts_max.filter(|_| is_balanced);
        // The operation that made it span handles it; drains hold for all.
        if parts_max.is_none() && !handle.spanning.marked().contains(&machine) {
            continue;
        }
        let Some(worker) = handle.processes.machines.get(&machine) else {
            continue;
        };
        seen.insert(machine.clone());
        let known = known.entry(machine.clone()).or_default();
        if let Err(error) = observe(
            handle,
            policy,
            &machine,
            &worker,
            (&balancing, parts_max),
            known,
        )
        .await
        {
            tracing::debug!(%machine, error, "cannot observe its threads and memory");
        }
    }
    known.retain(|machine, _| seen.contains(machine));
}

async fn observe(
    handle: &Arc<NodeBalancer>,
    policy: &Policy,
    machine: &MachineName,
    worker: &WorkerHandle,
    (balancing, parts_max): (&Balancing, Option<u32>),
    known: &mut TrackedMachine,
) -> Result<(), String> {
    let state = worker.state().await.map_err(|error| error.to_string())?;
    let State::Running { epoch } = state else {
        return Ok(());
    };
    if (known.worker, known.epoch) != (worker.id(), epoch) {
        // It is another life of the machine.
        *known = TrackedMachine {
            worker: worker.id(),
            epoch,
            ..TrackedMachine::default()
        };
    }
    let report = spanning::parts_report(worker)
        .await
        .map_err(|error| error.to_string())?;
    for (kind, text) in silent(&report, &mut known.silent) {
        let note = Note::machine(kind, machine, text);
        handle.context.events.record(note.under(epoch));
    }
    let mut threads = threads(&report, known);
    let waited_cores = waited_cores(&report, known);
    let now = Instant::now();
    if known.rests_until.is_some_and(|until| now < until)
        || handle.processes.exclusion.is_moving(machine)
    {
        return Ok(());
    }
    let spans = report.nodes.len() > 1;
    let from_beginning = balancing.spawn == Spawn::Spread;
    let Some(home) = view(handle, handle.context.name.as_str()).await else {
        return Ok(());
    };
    let memory_short = (home.state.memory_free_bytes as f64)
        < home.state.capacity.memory_bytes as f64 * policy.memory_headroom;
    // This takes a while for a machine with many objects.
    let some_like = report.threads.iter().any(|thread| thread.likes.is_some());
    let likes_now = some_like && known.likes_at.is_none_or(|at| now >= at);
    if likes_now {
        known.likes_at = Some(now + LIKES_EVERY);
    }
    let wants_objects = balancing.part_memory_bytes.is_some() || memory_short || likes_now;
    let objects = match spans && wants_objects {
        // Without them the other decisions are still possible: drained nodes, and threads.
        true => spanning::objects_report(worker)
            .await
            .inspect_err(
                |error| tracing::warn!(%machine, %error, "the location of its memory is not known"),
            )
            .ok(),
        false => None,
    };
    draw(
        &mut threads,
        &report,
        objects.as_deref().unwrap_or_default(),
        known,
    );
    let will_follow = known.hot.values().any(|(_, looks)| looks + 1 >= HOT_LOOKS);
    let heat = match spans && will_follow {
        // It only adds to the explanation.
        true => spanning::heat_of(worker).await.unwrap_or_default(),
        false => Heat::default(),
    };
    follow_pages(&mut threads, known, &heat.hot);
    let parts = match spans {
        true => parts(&report, objects.as_deref(), &mut known.given),
        false => {
            let report = worker.report().await.map_err(|error| error.to_string())?;
            vec![Part {
                number: 0,
                node: handle.context.name.as_str().into(),
                memory_bytes: Some(bytes_of(handle.context.kinds.clone(), report).await),
                overflows: false,
            }]
        }
    };
    let over = |part: &Part| match (part.memory_bytes, balancing.part_memory_bytes) {
        (Some(has), Some(most)) => has > most,
        _ => false,
    };
    let wants_some = from_beginning || home.state.pressed || parts.iter().any(over);
    if !spans && (parts_max.is_none() || !wants_some) {
        return Ok(());
    }
    let most = parts_max.unwrap_or(0);
    let wants_more = parts.len() < most as usize && (!spans || home.state.pressed);
    let nodes = nodes(handle, machine, home, &parts, wants_more).await;
    let mut scene = Observation {
        parts_max: most,
        from_beginning,
        part_memory_bytes: balancing.part_memory_bytes,
        parts,
        threads,
        nodes,
        waited_cores,
        losing_observations: 0,
        recently_gathered: known.gathered_until.is_some_and(|until| now < until),
        recent: known.recent.iter().map(|(pair, _)| pair.clone()).collect(),
    };
    if spans && parts_max.is_some() && balancing.spawn == Spawn::Auto {
        let room = room(&scene);
        spanning::tell_room(worker, &room)
            .await
            .map_err(|error| error.to_string())?;
    }
    known.losing = match gather_if_slower(&scene, policy) {
        Some(_) => known.losing + 1,
        None => 0,
    };
    scene.losing_observations = known.losing;
    let mut choices = decide(&scene, policy);
    let first = choices.first().map(|choice| &choice.action);
    let must = matches!(first, Some(Action::Leave { .. }));
    let loses = matches!(first, Some(Action::Gather));
    if parts_max.is_none() && !must {
        choices.clear();
    }
    if loses && known.losing < LOSING_SAMPLES {
        choices.clear();
    }
    if choices.is_empty() {
        known.suggested = None;
        return Ok(());
    }
    if policy.mode != Mode::Automatic && !must {
        let first = choices.swap_remove(0);
        if known.suggested.as_ref() != Some(&first.action) {
            known.suggested = Some(first.action.clone());
            record(handle, machine, epoch, policy.mode, first);
        }
        return Ok(());
    }
    let sample = Duration::from_millis(policy.sample_ms);
    known.rests_until = Some(Instant::now() + sample * SETTLE_SAMPLES);
    if choices.iter().any(|choice| choice.action == Action::Gather) {
        let for_long = Duration::from_millis(policy.cool_down_ms);
        known.gathered_until = loses.then(|| Instant::now() + for_long);
    }
    for choice in choices {
        let grain = choice.action.clone();
        let spreads = matches!(grain, Action::Spread { .. });
        let _spreading = spreads.then(|| handle.spreading.begin(machine));
        let mode = if must { Mode::Automatic } else { policy.mode };
        record(handle, machine, epoch, mode, choice);
        let done = carry_out(handle, machine, worker, &grain, objects.as_deref()).await;
        let (outcome, failed) = match done {
            Ok(outcome) => (outcome, false),
            Err(why) => (format!("{grain}: not done: {why}"), true),
        };
        tracing::info!(%machine, outcome, "grains");
        handle.keep(Decision::FineGrainedEnded {
            machine: machine.as_str().into(),
            outcome,
        });
        if failed {
            known.rests_until = Some(Instant::now() + FAILED_AFTER);
            break;
        }
        if let Action::Thread {
            tid,
            from,
            to,
            part,
        } = grain
        {
            let thread = scene.threads.iter().find(|thread| thread.tid == tid);
            if let Some((thread, drawn)) = thread.and_then(|it| Some((it, it.affinity.as_ref()?))) {
                let follows = drawn.stall_share > 0.0 && drawn.part == part;
                // It overloaded the node that it prefers, and would do so again.
                let is_driven_off = drawn.part == thread.part;
                if follows || is_driven_off {
                    known.followed.insert(tid, Instant::now() + FOLLOW_AGAIN);
                }
            }
            known.held.insert(tid, Instant::now() + THREAD_HOLD);
            let until = Instant::now() + COOL_DOWN;
            known.recent.push(((from, to), until));
        }
    }
    Ok(())
}

fn record(handle: &NodeBalancer, machine: &MachineName, epoch: Epoch, mode: Mode, choice: Choice) {
    let decision = Decision::FineGrained {
        machine: machine.as_str().into(),
        mode,
        choice,
    };
    tracing::info!(decision = %decision, "balancer");
    let note = Note::machine(EventKind::BalanceDecided, machine, decision.to_string());
    handle.context.events.record(note.under(epoch));
    handle.keep(decision);
}

impl NodeBalancer {
    /// Records that a machine which spreads its threads gets parts on these nodes before it runs,
    /// with the loads of the nodes as far as they are known.
    pub(crate) fn record_spread_start(&self, record: &Record, loads: &[(NodeName, Option<f64>)]) {
        let name = |node: &NodeName| -> Name { node.as_str().into() };
        let choice = Choice {
        action: Action::Spread {
            nodes: loads.iter().map(|(node, _)| name(node)).collect(),
        },
        why: "its threads begin on all of its nodes (spawn = spread), the least loaded ones: it has parts before it runs".into(),
        loads: {
            let known = loads.iter();
            known
                .filter_map(|(node, load)| Some((name(node), (*load)?)))
                .collect()
        },
        alternatives: Vec::new(),
    };
        self::record(self, &record.name, record.epoch, Mode::Automatic, choice);
    }
}
