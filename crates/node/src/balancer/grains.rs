//! Threads and memory of the machines of this node that may have parts on others
//! (`max_parts`): looks at each of them once a sample, lets `keel_balance::grains` decide,
//! and does it. Every decision is in the ledger with what it was made of.
//!
//! Of other nodes it asks what rounds ask: their view. Only those with parts are asked,
//! and a few more while parts are sought, so that it costs the same in a cluster of
//! thousands.

use super::{ask, keep};
use crate::agent::Agent;
use crate::events::Note;
use crate::operate::OperateError;
use crate::spanning;
use crate::workers::Worker;
use futures::future::join_all;
use keel_api::{EventKind, SpanRequest};
use keel_balance::Name;
use keel_balance::grains::{
    Choice, Drawn, Grain, Node, Object, Part, Scene, Thread, coldest, decide, loses,
};
use keel_balance::ledger::Decision;
use keel_balance::policy::{Mode, Policy};
use keel_balance::round::{Answer, Question, View};
use keel_cluster::{Epoch, MachineName};
use keel_machine::span::{Heat, HotPage, PartId, Sharing, Took};
use keel_machine::spec::{BalanceBy, Balancing, Spawn};
use keel_machine::worker::control::{
    MoveObject, MoveThread, ObjectReport, PartsReport, Report, State,
};
use keel_wasm::memory::bytes_of_process;
use rand::seq::IteratorRandom;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Other nodes that are asked while parts are sought.
const ASKED: usize = 8;
/// Samples after a decision in which nothing more is done with that machine: before that
/// loads do not show what came of it.
const SETTLE_SAMPLES: u32 = 6;
/// How long a thread stays where it came. Much shorter than for machines: it costs
/// microseconds.
const THREAD_HOLD: Duration = Duration::from_secs(10);
/// How long none goes back between two nodes. A thread weighs another thing where it
/// comes than where it was, and two nodes would take turns.
const COOL_DOWN: Duration = Duration::from_secs(60);
/// Weight of the newest sample in a thread's cores.
const NEWEST_WEIGHT: f64 = 0.4;
/// Samples in a row in which it must lose by its parts before it is brought together.
const LOSING_SAMPLES: u32 = 5;
/// Share of its time that a thread must stand at pages to go to where they come from, and
/// share of that which it must stand at pages from there.
const STANDS: f64 = 0.2;
const STANDS_SHARE: f64 = 0.7;
/// Looks in a row at which that must be so.
const HOT_LOOKS: u32 = 4;
/// How often it is looked where objects are that threads like.
const LIKES_EVERY: Duration = Duration::from_secs(5);
/// How long a thread that went after its pages does not do so again.
const FOLLOW_AGAIN: Duration = Duration::from_secs(600);
/// Pause before a failed decision is tried again.
const FAILED_AFTER: Duration = Duration::from_secs(15);

/// What is remembered of a machine.
#[derive(Default)]
struct Known {
    worker: u64,
    epoch: Epoch,
    took: HashMap<u32, (PartId, Took)>,
    /// Waits for pages so far, in microseconds, and when that was seen.
    waited: Option<(u64, Instant)>,
    held: HashMap<u32, Instant>,
    /// From which nodes to which threads went, and until when none goes back.
    recent: Vec<((Name, Name), Instant)>,
    /// Cores of each thread, smoothed.
    cores: HashMap<u32, Cores>,
    /// Share of its time that each thread stands at pages, by the part that gives them,
    /// smoothed.
    stands: HashMap<u32, BTreeMap<PartId, f64>>,
    /// For so many looks in a row most pages of a thread came from a part.
    hot: HashMap<u32, (PartId, u32)>,
    /// Threads that went to where their pages came from, or had to go from where they
    /// wanted to be, and until when they are not drawn anywhere: what they use where they
    /// are is not seen, and may be more.
    followed: HashMap<u32, Instant>,
    /// Bytes that each part had given away because they were too much.
    given: BTreeMap<PartId, u64>,
    /// When it is looked again where the objects are that threads like.
    likes_at: Option<Instant>,
    /// Nothing is done until then.
    rests_until: Option<Instant>,
    /// It lost by its parts, so often in a row.
    losing: u32,
    /// It is not spread again until then.
    gathered_until: Option<Instant>,
    /// What was only suggested last.
    suggested: Option<Grain>,
}

/// Machines of this node that are given parts just now: rounds do not move them meanwhile.
#[derive(Debug, Clone, Default)]
pub(super) struct Spreading(Arc<Mutex<BTreeSet<Name>>>);

impl Spreading {
    pub(super) fn contains(&self, machine: &Name) -> bool {
        self.machines().contains(machine)
    }

    fn machines(&self) -> MutexGuard<'_, BTreeSet<Name>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A machine is one of them until that is dropped.
    fn begin(&self, machine: &MachineName) -> Begun {
        let machine = Name::from(machine.as_str());
        self.machines().insert(machine.clone());
        Begun(self.clone(), machine)
    }
}

struct Begun(Spreading, Name);

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.machines().remove(&self.1);
    }
}

/// Looks at this node's machines for ever.
pub(super) async fn follow(agent: Arc<Agent>) {
    let mut known: HashMap<MachineName, Known> = HashMap::new();
    loop {
        let policy = agent
            .balancer
            .look(|balancer, _, _| balancer.policy().0.clone());
        let Ok(policy) = policy.await else { return };
        look_at_all(&agent, &policy, &mut known).await;
        tokio::time::sleep(Duration::from_millis(policy.sample_ms)).await;
    }
}

async fn look_at_all(agent: &Arc<Agent>, policy: &Policy, known: &mut HashMap<MachineName, Known>) {
    let mut seen = HashSet::new();
    for machine in agent.workers.names() {
        let placed = agent.balancer.placements.get(machine.as_str());
        let Some(placed) = placed.filter(|it| it.movable && it.owner == agent.name) else {
            continue;
        };
        let balancing = placed.balancing;
        let is_balanced = policy.mode != Mode::Off && balancing.by != BalanceBy::Off;
        let parts_max = balancing.parts_max.filter(|_| is_balanced);
        // Who let it span sees to it; drains hold for all.
        if parts_max.is_none() && !agent.spanning().contains(&machine) {
            continue;
        }
        let Some(worker) = agent.workers.get(&machine) else {
            continue;
        };
        seen.insert(machine.clone());
        let known = known.entry(machine.clone()).or_default();
        if let Err(error) = look_at(
            agent,
            policy,
            &machine,
            &worker,
            (&balancing, parts_max),
            known,
        )
        .await
        {
            tracing::debug!(%machine, error, "its threads and memory were not looked at");
        }
    }
    known.retain(|machine, _| seen.contains(machine));
}

async fn look_at(
    agent: &Arc<Agent>,
    policy: &Policy,
    machine: &MachineName,
    worker: &Worker,
    (balancing, parts_max): (&Balancing, Option<u32>),
    known: &mut Known,
) -> Result<(), String> {
    let state = worker.state().await.map_err(|error| error.to_string())?;
    let State::Running { epoch } = state else {
        return Ok(());
    };
    if (known.worker, known.epoch) != (worker.id(), epoch) {
        // (It is another life of it.)
        *known = Known {
            worker: worker.id(),
            epoch,
            ..Known::default()
        };
    }
    let report = spanning::parts_report(worker).await.map_err(text)?;
    let mut threads = threads(&report, known);
    let waited_cores = waited_cores(&report, known);
    let now = Instant::now();
    if known.rests_until.is_some_and(|until| now < until) || agent.moves().contains_key(machine) {
        return Ok(());
    }
    let spans = report.nodes.len() > 1;
    let from_beginning = balancing.spawn == Spawn::Spread;
    let Some(home) = view(agent, agent.name.as_str()).await else {
        return Ok(());
    };
    let memory_short = (home.side.memory_free_bytes as f64)
        < home.side.capacity.memory_bytes as f64 * policy.memory_headroom;
    // (That takes a while, of a machine with many objects.)
    let some_like = report.threads.iter().any(|thread| thread.likes.is_some());
    let likes_now = some_like && known.likes_at.is_none_or(|at| now >= at);
    if likes_now {
        known.likes_at = Some(now + LIKES_EVERY);
    }
    let wants_objects = balancing.part_memory_bytes.is_some() || memory_short || likes_now;
    let objects = match spans && wants_objects {
        // Without them all the rest goes on: drained nodes, and threads.
        true => spanning::objects_report(worker)
            .await
            .inspect_err(|error| tracing::warn!(%machine, %error, "where its memory is"))
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
        // (It only says more of why.)
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
                node: agent.name.as_str().into(),
                memory_bytes: Some(bytes_of(report).await),
                overflows: false,
            }]
        }
    };
    let over = |part: &Part| match (part.memory_bytes, balancing.part_memory_bytes) {
        (Some(has), Some(most)) => has > most,
        _ => false,
    };
    let wants_some = from_beginning || home.side.pressed || parts.iter().any(over);
    if !spans && (parts_max.is_none() || !wants_some) {
        return Ok(());
    }
    let most = parts_max.unwrap_or(0);
    let wants_more = parts.len() < most as usize && (!spans || home.side.pressed);
    let nodes = nodes(agent, machine, home, &parts, wants_more).await;
    let mut scene = Scene {
        parts_max: most,
        from_beginning,
        part_memory_bytes: balancing.part_memory_bytes,
        parts,
        threads,
        nodes,
        waited_cores,
        losing: 0,
        tried: known.gathered_until.is_some_and(|until| now < until),
        recent: known.recent.iter().map(|(pair, _)| pair.clone()).collect(),
    };
    if spans && parts_max.is_some() && balancing.spawn == Spawn::Auto {
        let room = room(&scene);
        spanning::tell_room(worker, &room).await.map_err(text)?;
    }
    known.losing = match loses(&scene, policy) {
        Some(_) => known.losing + 1,
        None => 0,
    };
    scene.losing = known.losing;
    let mut choices = decide(&scene, policy);
    let first = choices.first().map(|choice| &choice.grain);
    let must = matches!(first, Some(Grain::Leave { .. }));
    let loses = matches!(first, Some(Grain::Gather));
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
        if known.suggested.as_ref() != Some(&first.grain) {
            known.suggested = Some(first.grain.clone());
            record(agent, machine, epoch, policy.mode, first);
        }
        return Ok(());
    }
    let sample = Duration::from_millis(policy.sample_ms);
    known.rests_until = Some(Instant::now() + sample * SETTLE_SAMPLES);
    if choices.iter().any(|choice| choice.grain == Grain::Gather) {
        let for_long = Duration::from_millis(policy.cool_down_ms);
        known.gathered_until = loses.then(|| Instant::now() + for_long);
    }
    for choice in choices {
        let grain = choice.grain.clone();
        let spreads = matches!(grain, Grain::Spread { .. });
        let _spreading = spreads.then(|| agent.balancer.spreading.begin(machine));
        let mode = if must { Mode::Automatic } else { policy.mode };
        record(agent, machine, epoch, mode, choice);
        let done = carry_out(agent, machine, worker, &grain, objects.as_deref()).await;
        let (outcome, failed) = match done {
            Ok(outcome) => (outcome, false),
            Err(why) => (format!("{grain}: not done: {why}"), true),
        };
        tracing::info!(%machine, outcome, "grains");
        keep(
            agent,
            Decision::GrainEnded {
                machine: machine.as_str().into(),
                outcome,
            },
        );
        if failed {
            known.rests_until = Some(Instant::now() + FAILED_AFTER);
            break;
        }
        if let Grain::Thread {
            tid,
            from,
            to,
            part,
        } = grain
        {
            let thread = scene.threads.iter().find(|thread| thread.tid == tid);
            if let Some((thread, drawn)) = thread.and_then(|it| Some((it, it.drawn.as_ref()?))) {
                let follows = drawn.stands > 0.0 && drawn.part == part;
                // It pressed the node where it wants to be: so it would again.
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

/// Bytes that a machine on one node has of its memory, as is counted of its parts later: what
/// it never used does not count.
async fn bytes_of(report: Report) -> u64 {
    let process = format!("/proc/{}", report.pid);
    let bytes = tokio::task::spawn_blocking(move || bytes_of_process(Path::new(&process)));
    // (None of one that ends.)
    bytes.await.ok().flatten().unwrap_or(0)
}

fn text(error: crate::operate::OperateError) -> String {
    error.to_string()
}

fn record(agent: &Agent, machine: &MachineName, epoch: Epoch, mode: Mode, choice: Choice) {
    let decision = Decision::Grain {
        machine: machine.as_str().into(),
        mode,
        choice,
    };
    tracing::info!(decision = %decision, "balancer");
    let note = Note::machine(EventKind::BalanceDecided, machine, decision.to_string());
    agent.events.record(note.under(epoch));
    keep(agent, decision);
}

// ── what is known ───────────────────────────────────────────────────────

/// Cores of each thread since it was looked at last.
fn threads(report: &PartsReport, known: &mut Known) -> Vec<Thread> {
    let now = Instant::now();
    known.held.retain(|_, until| *until > now);
    known.recent.retain(|(_, until)| *until > now);
    known.followed.retain(|_, until| *until > now);
    let (mut took, mut smoothed) = (HashMap::new(), HashMap::new());
    let mut stands_at = HashMap::new();
    let threads = report.threads.iter().map(|thread| {
        let before = known.took.get(&thread.tid);
        let (cores, stands) = match (before, &thread.took) {
            (Some((part, before)), Some(now)) if *part == thread.part => {
                (cores(before, now), Some(stands(before, now)))
            }
            _ => (Cores::default(), None),
        };
        // (Where it comes it waits for others.)
        if let Some(stands) = stands {
            let earlier = known.stands.get(&thread.tid);
            stands_at.insert(thread.tid, smoothed_stands(stands, earlier));
        }
        let cores = match known.cores.get(&thread.tid) {
            Some(earlier) => cores.after(earlier),
            None => cores,
        };
        // (The first look sees nothing.)
        if before.is_some() {
            smoothed.insert(thread.tid, cores);
        }
        if let Some(now) = &thread.took {
            took.insert(thread.tid, (thread.part, now.clone()));
        }
        Thread {
            tid: thread.tid,
            part: thread.part.number() as u32,
            // (Also of one that waits to be woken: what counts is what it takes on
            // average, and programs with barriers wait at any moment.)
            cores: cores.wanted,
            ran: cores.ran,
            held: thread.moves_to.is_some() || known.held.contains_key(&thread.tid),
            drawn: None,
        }
    });
    let threads = threads.collect();
    known.took = took;
    known.cores = smoothed;
    known.stands = stands_at;
    threads
}

/// Share of the time between two looks that a thread stood at pages, by the part that gave
/// them.
fn stands(before: &Took, now: &Took) -> BTreeMap<PartId, f64> {
    let seconds = now.at_ns.saturating_sub(before.at_ns) as f64 / 1e9;
    if seconds <= 0.0 {
        return BTreeMap::new();
    }
    let share = |(part, micros): (&PartId, &u64)| {
        let before = before.stood.get(part).copied().unwrap_or(0);
        (*part, micros.saturating_sub(before) as f64 / 1e6 / seconds)
    };
    now.stood.iter().map(share).collect()
}

fn smoothed_stands(
    now: BTreeMap<PartId, f64>,
    earlier: Option<&BTreeMap<PartId, f64>>,
) -> BTreeMap<PartId, f64> {
    let Some(earlier) = earlier else { return now };
    let mut all: BTreeMap<PartId, f64> = BTreeMap::new();
    for (pages, weight) in [(&now, NEWEST_WEIGHT), (earlier, 1.0 - NEWEST_WEIGHT)] {
        for (part, rate) in pages {
            *all.entry(*part).or_default() += rate * weight;
        }
    }
    all
}

/// Says of threads that wait for pages of one part, all the time, that they would rather be
/// there.
fn follow_pages(threads: &mut [Thread], known: &mut Known, pages: &[HotPage]) {
    let mut hot = HashMap::new();
    for thread in threads {
        let Some((part, there, all)) = known.stands.get(&thread.tid).and_then(hottest) else {
            continue;
        };
        let is_elsewhere = part.number() as u32 != thread.part;
        if !is_elsewhere || all < STANDS || there < all * STANDS_SHARE {
            continue;
        }
        let looks = match known.hot.get(&thread.tid) {
            Some((before, looks)) if *before == part => looks.saturating_add(1),
            _ => 1,
        };
        hot.insert(thread.tid, (part, looks));
        let is_free = thread.drawn.is_none() && !known.followed.contains_key(&thread.tid);
        if is_free && looks >= HOT_LOOKS {
            let why = format!(
                "{:.0} % of its time it stands at pages, {:.0} % of that at such that come from there{}",
                all * 100.0,
                there / all * 100.0,
                shares(pages, thread.part, part)
            );
            thread.drawn = Some(Drawn {
                part: part.number() as u32,
                why,
                stands: all,
            });
        }
    }
    known.hot = hot;
}

/// Whether two parts share what is in the pages that they take from each other.
fn shares(pages: &[HotPage], one: u32, other: PartId) -> String {
    let both = |page: &&HotPage| {
        let one = PartId::new(one as usize);
        one.is_some_and(|one| page.parts.contains(one)) && page.parts.contains(other)
    };
    let (mut all, mut truly, mut falsely) = (0, 0, 0);
    for page in pages.iter().filter(both) {
        match page.sharing {
            Sharing::Nothing => continue,
            Sharing::Unclear => {}
            Sharing::Bytes => truly += page.waits,
            Sharing::PageOnly => falsely += page.waits,
        }
        all += page.waits;
    }
    match falsely {
        0 if truly == 0 => String::new(),
        0 => "; both use the same bytes of those that they take from each other".into(),
        _ => format!(
            "; {:.0} % of the waits for those that they take from each other are for such of which they use different bytes (false sharing: if these were in different pages, of 4 KiB, nobody would wait)",
            falsely as f64 / all as f64 * 100.0
        ),
    }
}

/// The part at whose pages a thread stands longest, for how much of how much of its time.
fn hottest(stands: &BTreeMap<PartId, f64>) -> Option<(PartId, f64, f64)> {
    let all = stands.values().sum();
    let most = stands.iter().max_by(|one, other| one.1.total_cmp(other.1));
    most.map(|(part, there)| (*part, *there, all))
}

/// Says of threads that like to be near an object which part has most of it.
fn draw(threads: &mut [Thread], report: &PartsReport, objects: &[ObjectReport], known: &Known) {
    for (thread, said) in threads.iter_mut().zip(&report.threads) {
        let Some(name) = &said.likes else { continue };
        if known.followed.contains_key(&thread.tid) {
            continue;
        }
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        let pieces = objects
            .iter()
            .filter(|object| object.name.as_ref() == Some(name));
        for piece in pieces {
            *bytes.entry(piece.owner.number() as u32).or_default() += piece.bytes;
        }
        let all: u64 = bytes.values().sum();
        // (Of as much at two it is where it is.)
        let most = bytes
            .into_iter()
            .max_by_key(|(part, bytes)| (*bytes, *part == thread.part));
        thread.drawn = most.map(|(part, bytes)| Drawn {
            part,
            why: format!(
                "it likes to be near {name:?}, of which {:.1} of {:.1} MiB are there",
                bytes as f64 / f64::from(1 << 20),
                all as f64 / f64::from(1 << 20)
            ),
            stands: 0.0,
        });
    }
}

/// What a thread had of a processor, in cores of its node.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Cores {
    /// What it ran, and what it waited for its turn.
    wanted: f64,
    /// What it ran.
    ran: f64,
}

impl Cores {
    /// Smoothed, where it was that much before.
    fn after(self, earlier: &Cores) -> Cores {
        let smoothed =
            |now: f64, earlier: f64| now * NEWEST_WEIGHT + earlier * (1.0 - NEWEST_WEIGHT);
        Cores {
            wanted: smoothed(self.wanted, earlier.wanted),
            ran: smoothed(self.ran, earlier.ran),
        }
    }
}

/// Cores that a thread took, or waited for, between two looks.
fn cores(before: &Took, now: &Took) -> Cores {
    let passed = now.at_ns.saturating_sub(before.at_ns);
    if passed == 0 {
        return Cores::default();
    }
    let (before, now) = (&before.time, &now.time);
    let share = |ns: u64| (ns as f64 / passed as f64).min(1.0);
    let ran = now.run_ns.saturating_sub(before.run_ns);
    let waited = now.waited_ns.saturating_sub(before.waited_ns);
    let wanted = match now.is_runnable && before.turns == now.turns {
        // It waits all the time: the kernel counts waiting only once it is over.
        true => 1.0,
        false => share(ran.saturating_add(waited)),
    };
    Cores {
        wanted,
        ran: share(ran),
    }
}

/// Threads of the home that waited for pages since it was looked at last, on average.
fn waited_cores(report: &PartsReport, known: &mut Known) -> f64 {
    // Bucket i is of waits below 2^i µs: by their middle.
    let micros = (0u32..).zip(&report.waits).map(|(power, count)| {
        let middle = 3u64.checked_shl(power).unwrap_or(u64::MAX) / 4;
        count.saturating_mul(middle)
    });
    let micros = micros.fold(0u64, u64::saturating_add);
    let now = Instant::now();
    let before = known.waited.replace((micros, now));
    match before {
        Some((before, at)) if micros >= before => {
            let passed = now.duration_since(at).as_micros().max(1);
            (micros - before) as f64 / passed as f64
        }
        _ => 0.0,
    }
}

/// `given` is what each of them had given away at the last look.
fn parts(
    report: &PartsReport,
    objects: Option<&[ObjectReport]>,
    given: &mut BTreeMap<PartId, u64>,
) -> Vec<Part> {
    let bytes = |part: PartId| {
        let mine = objects?.iter().filter(|object| object.owner == part);
        Some(mine.map(|object| object.bytes).sum())
    };
    let nodes = report.nodes.iter();
    nodes
        .map(|(part, node)| Part {
            number: part.number() as u32,
            node: node.as_str().into(),
            memory_bytes: bytes(*part),
            overflows: {
                let now = report.memory.get(part).map_or(0, |it| it.given_bytes);
                given.insert(*part, now).unwrap_or(0) < now
            },
        })
        .collect()
}

/// What a node tells of itself.
async fn view(agent: &Agent, node: &str) -> Option<View> {
    let answer = match node == agent.name.as_str() {
        true => agent.balancer.answer(&agent.name, Question::View).await,
        false => ask(agent, node, &Question::View).await,
    };
    match answer {
        Ok(Answer::View(view)) => Some(view),
        _ => None,
    }
}

/// The home's node, those with parts, and, where it has none yet, some others.
async fn nodes(
    agent: &Arc<Agent>,
    machine: &MachineName,
    home: View,
    parts: &[Part],
    wants_more: bool,
) -> Vec<Node> {
    let own: Name = agent.name.as_str().into();
    let name: Name = machine.as_str().into();
    let allowed = agent.balancer.look(move |_, _, rules| {
        let nodes = rules.nodes().iter();
        nodes
            .map(|node| (node.clone(), rules.forbids(&name, node).map(|it| it.why)))
            .collect::<BTreeMap<Name, Option<String>>>()
    });
    let allowed = allowed.await.unwrap_or_default();
    let mut others: Vec<Name> = Vec::new();
    for part in parts {
        if part.node != own && !others.contains(&part.node) {
            others.push(part.node.clone());
        }
    }
    if wants_more {
        let may = allowed
            .iter()
            .filter(|(node, why)| **node != own && why.is_none() && !others.contains(node));
        let more: Vec<Name> = may
            .map(|(node, _)| node.clone())
            .sample(&mut rand::rng(), ASKED);
        others.extend(more);
    }
    let views = others.iter().map(|node| async { view(agent, node).await });
    let views = join_all(views).await;
    let node = |name: Name, view: View| Node {
        forbidden: allowed.get(&name).cloned().flatten(),
        name,
        side: view.side,
        loads: view.loads,
    };
    let mut nodes = vec![Node {
        // (Where the home may not be is the rounds' business.)
        forbidden: None,
        ..node(own, home)
    }];
    let told = others.into_iter().zip(views);
    nodes.extend(told.filter_map(|(name, view)| Some(node(name, view?))));
    nodes
}

/// Cores that are free at each part.
fn room(scene: &Scene) -> BTreeMap<PartId, f64> {
    let room = scene.parts.iter().filter_map(|part| {
        let node = scene.nodes.iter().find(|it| it.name == part.node)?;
        let free = (1.0 - node.side.load) * node.side.capacity.cores;
        Some((PartId::new(part.number as usize)?, free))
    });
    room.collect()
}

/// It has no parts on these nodes any more. What was there goes to its other parts; where
/// these have no room for it, to nodes that have none yet.
async fn leave(
    agent: &Arc<Agent>,
    machine: &MachineName,
    nodes: &[Name],
) -> Result<String, String> {
    let info = spanning::parts_of(agent, machine).await.map_err(text)?;
    let leaves = |node: &str| nodes.iter().any(|it| &**it == node);
    let members = info.parts.iter().skip(1);
    let mut keeps: Vec<String> = members
        .filter(|part| !leaves(&part.node))
        .map(|part| part.node.clone())
        .collect();
    let left = match keeps.is_empty() {
        true => spanning::unspan(agent, machine).await,
        false => span(agent, machine, &keeps).await,
    };
    let why = match left {
        Ok(stood) => return Ok(format!("it stood still for {:.1} ms", stood as f64 / 1e3)),
        Err(error) => text(error),
    };
    let has_part =
        |node: &keel_cluster::NodeName| info.parts.iter().any(|part| part.node == node.as_str());
    let mut rooms = crate::apart::rooms(agent, machine).await;
    rooms.retain(|(node, room)| !has_part(node) && *room >= spanning::ROOM_BYTES_MIN);
    rooms.sort_by_key(|(_, room)| std::cmp::Reverse(*room));
    let leaving = info.parts.iter().skip(1).filter(|part| leaves(&part.node));
    let mut needed: u64 = leaving
        .filter_map(|part| part.memory.as_ref())
        .map(|memory| memory.resident_bytes)
        .sum();
    let mut new = Vec::new();
    for (node, room) in rooms {
        if needed == 0 {
            break;
        }
        needed = needed.saturating_sub(room);
        new.push(node.to_string());
    }
    if new.is_empty() {
        return Err(why);
    }
    keeps.extend(new.iter().cloned());
    let stood = span(agent, machine, &keeps).await.map_err(text)?;
    Ok(format!(
        "{why}; so it has parts on {}; it stood still for {:.1} ms",
        new.join(", "),
        stood as f64 / 1e3
    ))
}

/// It has parts on these nodes; microseconds that it stood still.
async fn span(
    agent: &Arc<Agent>,
    machine: &MachineName,
    nodes: &[String],
) -> Result<u64, OperateError> {
    // (Its home's node, and further times that is named it has further parts.)
    let home = std::iter::once(agent.name.to_string());
    let request = SpanRequest {
        nodes: home.chain(nodes.iter().cloned()).collect(),
        here: false,
    };
    let info = spanning::span(agent, machine, &request).await?;
    Ok(info.stood_micros.unwrap_or(0))
}

/// A piece of memory in pieces that its part uses and such that it does not.
fn by_use(object: &ObjectReport, heat: &Heat) -> Vec<Object> {
    let piece = |start: u64, end: u64, is_idle: bool| {
        let part_of = ObjectReport {
            start,
            bytes: end - start,
            ..object.clone()
        };
        let hot = spanning::hot_in(heat, &part_of).iter();
        let waits: u64 = hot.map(|page| page.waits).sum();
        Object {
            memory: object.memory,
            start,
            bytes: end - start,
            is_idle,
            heat: waits as f64 / ((end - start) / 4096).max(1) as f64,
        }
    };
    let (mut pieces, mut at) = (Vec::new(), object.start);
    for idle in spanning::idle_in(heat, object) {
        let start = idle.start.max(at);
        if start >= idle.end {
            continue;
        }
        if start > at {
            pieces.push(piece(at, start, false));
        }
        pieces.push(piece(start, idle.end, true));
        at = idle.end;
    }
    let end = object.start.saturating_add(object.bytes);
    if at < end {
        pieces.push(piece(at, end, false));
    }
    pieces
}

// ── what is done ────────────────────────────────────────────────────────

async fn carry_out(
    agent: &Arc<Agent>,
    machine: &MachineName,
    worker: &Worker,
    grain: &Grain,
    objects: Option<&[ObjectReport]>,
) -> Result<String, String> {
    let part = |number: u32| {
        PartId::new(number as usize).ok_or_else(|| format!("there is no part {number}"))
    };
    match grain {
        Grain::Spread { nodes } => {
            let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
            let stood = span(agent, machine, &nodes).await.map_err(text)?;
            Ok(format!("it stood still for {:.1} ms", stood as f64 / 1e3))
        }
        Grain::Leave { nodes } => leave(agent, machine, nodes).await,
        Grain::Gather => {
            let stood = spanning::unspan(agent, machine).await.map_err(text)?;
            Ok(format!("it stood still for {:.1} ms", stood as f64 / 1e3))
        }
        Grain::Thread {
            tid,
            part: to,
            to: node,
            ..
        } => {
            let thread = MoveThread {
                tid: *tid,
                to: part(*to)?,
            };
            spanning::thread_to(worker, thread).await.map_err(text)?;
            Ok(format!("thread {tid} goes on on {node}"))
        }
        Grain::Objects {
            from_part,
            part: to,
            to: node,
            bytes,
            ..
        } => {
            let (from, to) = (part(*from_part)?, part(*to)?);
            // (A worker from before an upgrade does not know it.)
            let heat = spanning::heat_of(worker).await;
            if let Err(error) = &heat {
                tracing::warn!(%machine, %error, "how its memory is used: what changed hands least goes");
            }
            let by_exchanges = |object: &ObjectReport| Object {
                memory: object.memory,
                start: object.start,
                bytes: object.bytes,
                is_idle: false,
                heat: object.exchanges as f64 / (object.bytes / 4096).max(1) as f64,
            };
            let mine = objects.unwrap_or_default().iter();
            let mine: Vec<Object> = mine
                .filter(|object| object.owner == from)
                .flat_map(|object| match &heat {
                    Ok(heat) => by_use(object, heat),
                    Err(_) => vec![by_exchanges(object)],
                })
                .collect();
            let (mut moved, mut pieces, mut idle) = (0, 0, 0);
            for object in coldest(&mine, *bytes) {
                idle += if object.is_idle { object.bytes } else { 0 };
                let object = MoveObject {
                    memory: object.memory,
                    start: object.start,
                    bytes: object.bytes,
                    to,
                };
                moved += spanning::object_to(worker, object).await.map_err(text)?;
                pieces += 1;
            }
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            Ok(format!(
                "{:.1} MiB in {pieces} pieces are on {node}, {:.1} MiB of which nobody used for half a minute",
                mib(moved),
                mib(idle)
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_machine::span::{CoreTime, IdleRange, PartSet};
    use keel_machine::worker::control::ThreadReport;

    /// Thread 1 stands 40 % of its time at pages of part 1 and 5 % at those of part 2, 2 as
    /// long at those of both. (A report's clock goes twice as fast as its `ms`.)
    fn stood_of(tid: u32, ms: u64) -> BTreeMap<PartId, u64> {
        let part = |number| PartId::new(number).unwrap();
        match tid {
            1 => BTreeMap::from([(part(1), ms * 800), (part(2), ms * 100)]),
            2 => BTreeMap::from([(part(0), ms * 800), (part(2), ms * 800)]),
            _ => BTreeMap::new(),
        }
    }

    fn report(threads: &[(u32, usize, u64)]) -> PartsReport {
        PartsReport {
            threads: threads
                .iter()
                .map(|(tid, part, ms)| ThreadReport {
                    tid: *tid,
                    part: PartId::new(*part).unwrap(),
                    moves_to: None,
                    waits: *tid == 9,
                    likes: None,
                    took: Some(Took {
                        at_ns: ms * 1_000_000 * 2,
                        time: CoreTime {
                            run_ns: if *tid == 7 { 0 } else { ms * 1_000_000 },
                            waited_ns: if *tid == 7 { 0 } else { ms * 500_000 },
                            turns: if *tid == 7 { 1 } else { *ms },
                            is_runnable: *tid != 9,
                        },
                        stood: stood_of(*tid, *ms),
                    }),
                })
                .collect(),
            ..PartsReport::default()
        }
    }

    #[test]
    fn cores_are_what_was_taken_and_waited_for_where_a_thread_stayed() {
        let mut known = Known::default();
        let first = threads(
            &report(&[(1, 0, 1000), (2, 1, 1000), (7, 0, 1000), (9, 0, 1000)]),
            &mut known,
        );
        assert!(first.iter().all(|it| it.cores == 0.0), "{first:?}");
        known.held.insert(1, Instant::now() + THREAD_HOLD);
        let then = threads(
            &report(&[(1, 0, 2000), (2, 0, 2000), (7, 0, 2000), (9, 0, 2000)]),
            &mut known,
        );
        // 2 moved, 7 waits for a core all the time; 9 waits to be woken now, and did not
        // before.
        let cores: Vec<f64> = then.iter().map(|it| it.cores).collect();
        assert_eq!(cores, [0.75, 0.0, 1.0, 0.75]);
        let ran: Vec<f64> = then.iter().map(|it| it.ran).collect();
        assert_eq!(ran, [0.5, 0.0, 0.0, 0.5]);
        // It is what they had on average that counts.
        let still = threads(
            &report(&[(1, 0, 3000), (2, 0, 3000), (7, 0, 3000), (9, 0, 2000)]),
            &mut known,
        );
        assert!((still[3].cores - 0.45).abs() < 1e-9, "{still:?}");
        let held: Vec<bool> = then.iter().map(|it| it.held).collect();
        assert_eq!(held, [true, false, false, false]);
    }

    #[test]
    fn a_thread_follows_its_pages_once() {
        let mut known = Known::default();
        let at = |ms: u64| report(&[(1, 0, ms), (2, 1, ms), (3, 0, ms)]);
        let page = |number: u32, waits: u64, parts: [usize; 2], sharing: Sharing| HotPage {
            memory: 0,
            number,
            waits,
            parts: parts.into_iter().filter_map(PartId::new).collect(),
            sharing,
        };
        let pages = [
            page(1, 30, [0, 1], Sharing::PageOnly),
            page(2, 6, [0, 1], Sharing::Bytes),
            page(5, 4, [0, 1], Sharing::Unclear),
            page(3, 500, [0, 1], Sharing::Nothing),
            page(4, 500, [0, 2], Sharing::Bytes),
        ];
        let drawn = |known: &mut Known, report: &PartsReport| {
            let mut all = threads(report, known);
            follow_pages(&mut all, known, &pages);
            all.into_iter().map(|it| it.drawn).collect::<Vec<_>>()
        };
        // It must last, and nothing is known at first.
        for second in 1..=u64::from(HOT_LOOKS) {
            assert_eq!(drawn(&mut known, &at(second * 1000)), [None, None, None]);
        }
        let then = drawn(&mut known, &at(9000));
        let first = then[0].as_ref().expect("it is drawn");
        assert_eq!(first.part, 1);
        assert!((first.stands - 0.45).abs() < 1e-9, "{first:?}");
        assert!(first.why.contains("45 % of its time"), "{first:?}");
        assert!(first.why.contains("89 %"), "{first:?}");
        assert!(
            first.why.contains("75 % of the waits for those"),
            "{first:?}"
        );
        let other = PartId::new(1).expect("a part");
        assert_eq!(shares(&pages[2..], 0, other), "", "nobody knows");
        assert!(shares(&pages[1..], 0, other).contains("the same bytes"));
        assert_eq!(then[1..], [None, None]);
        // Once it did, not soon again; and where it comes nothing is known.
        let until = Instant::now() + FOLLOW_AGAIN;
        known.followed.insert(1, until);
        assert_eq!(drawn(&mut known, &at(10_000)), [None, None, None]);
        known.followed.clear();
        assert!(drawn(&mut known, &at(11_000))[0].is_some());
        assert_eq!(drawn(&mut known, &report(&[(1, 1, 12_000)])), [None]);
    }

    #[test]
    fn memory_is_told_apart_by_its_use() {
        let part = |number| PartId::new(number).expect("a part");
        let object = ObjectReport {
            name: None,
            memory: 0,
            start: 0x1_0000,
            bytes: 0x6_0000,
            owner: part(1),
            readers: PartSet::default(),
            exchanges: 7,
            directory: part(0),
        };
        let range = |memory, start, bytes| IdleRange {
            memory,
            start,
            bytes,
        };
        let page = |number: u32, waits: u64| HotPage {
            memory: 0,
            number,
            waits,
            parts: PartSet::default(),
            sharing: Sharing::Nothing,
        };
        let heat = Heat {
            // (The first and the last are outside of it.)
            hot: vec![page(0xf, 99), page(0x20, 8), page(0x2f, 8), page(0x70, 99)],
            idle: BTreeMap::from([
                (part(0), vec![range(0, 0, 1 << 20)]),
                (
                    part(1),
                    vec![
                        range(0, 0, 0x2_0000),
                        range(0, 0x4_0000, 0x1_0000),
                        range(0, 0x6_0000, 0x2_0000),
                        range(1, 0, 1 << 20),
                    ],
                ),
            ]),
        };
        let told: Vec<_> = by_use(&object, &heat)
            .into_iter()
            .map(|it| (it.start >> 16, it.bytes >> 16, it.is_idle, it.heat))
            .collect();
        let expected = [
            (1, 1, true, 0.0),
            (2, 2, false, 0.5),
            (4, 1, true, 0.0),
            (5, 1, false, 0.0),
            (6, 1, true, 0.0),
        ];
        assert_eq!(told, expected);
        let nothing = by_use(&object, &Heat::default());
        assert_eq!(nothing.len(), 1);
        assert_eq!((nothing[0].bytes, nothing[0].is_idle), (0x6_0000, false));
    }

    #[test]
    fn stands_at_pages_are_cores_that_are_lost() {
        let mut known = Known::default();
        let waits = |count: u64| PartsReport {
            waits: vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, count],
            ..PartsReport::default()
        };
        assert_eq!(waited_cores(&waits(5), &mut known), 0.0);
        std::thread::sleep(Duration::from_millis(5));
        let lost = waited_cores(&waits(105), &mut known);
        // 100 of about 768 µs each, in a few milliseconds.
        assert!(lost > 1.0, "{lost}");
        // Another worker begins anew.
        assert_eq!(waited_cores(&waits(0), &mut known), 0.0);
    }
}
