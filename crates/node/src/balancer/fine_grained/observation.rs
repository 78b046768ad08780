//! Inputs of fine-grained decisions: threads, parts, nodes, and memory by its use, built from the
//! reports of workers and other nodes.

use super::super::handle::NodeBalancer;
use super::super::peers::ask;
use super::cores::{Cores, NEWEST_WEIGHT};
use super::tracked_state::{HOT_LOOKS, TrackedMachine};
use crate::spanning;
use futures::future::join_all;
use keel_api::{EventKind, PartInfo};
use keel_balance::Name;
use keel_balance::fine_grained::{Affinity, Node, Object, Observation, Part, Thread};
use keel_balance::round::{Request, Response, View};
use keel_cluster::MachineName;
use keel_kind_wasm::control::{ObjectReport, PartsReport};
use keel_kind_wasm::span::{CpuUsage, Heat, HotPage, PartId, Sharing};
use keel_machine::kind::Kinds;
use keel_machine::worker::control::Report;
use rand::seq::IteratorRandom;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Number of other nodes that are asked while parts are sought.
const ASKED: usize = 8;
/// Least share of its time that a thread waits for pages before it follows them, and least share
/// of that wait that is for pages of one part.
const STANDS: f64 = 0.2;
const STANDS_SHARE: f64 = 0.7;

/// Bytes in memory of a machine on one node, by the same count as for its parts later: untouched
/// pages do not count.
pub(super) async fn bytes_of(kinds: Kinds, report: Report) -> u64 {
    let process = format!("/proc/{}", report.pid);
    let bytes = tokio::task::spawn_blocking(move || kinds.memory_bytes(Path::new(&process)));
    // An ending machine has none.
    bytes.await.ok().flatten().unwrap_or(0)
}

/// Cores of each thread since the last sample.
pub(super) fn threads(report: &PartsReport, known: &mut TrackedMachine) -> Vec<Thread> {
    let now = Instant::now();
    known.held.retain(|_, until| *until > now);
    known.recent.retain(|(_, until)| *until > now);
    known.followed.retain(|_, until| *until > now);
    let (mut took, mut smoothed) = (HashMap::new(), HashMap::new());
    let mut all_page_waits = HashMap::new();
    let threads = report.threads.iter().map(|thread| {
        let before = known.took.get(&thread.tid);
        let (cores, page_waits) = match (before, &thread.took) {
            (Some((part, before)), Some(now)) if *part == thread.part => {
                (cores(before, now), Some(page_waits(before, now)))
            }
            _ => (Cores::default(), None),
        };
        // At a new part it waits for other pages.
        if let Some(page_waits) = page_waits {
            let earlier = known.page_waits.get(&thread.tid);
            all_page_waits.insert(thread.tid, smoothed_page_waits(page_waits, earlier));
        }
        let cores = match known.cores.get(&thread.tid) {
            Some(earlier) => cores.after(earlier),
            None => cores,
        };
        // The first sample has no rates.
        if before.is_some() {
            smoothed.insert(thread.tid, cores);
        }
        if let Some(now) = &thread.took {
            took.insert(thread.tid, (thread.part, now.clone()));
        }
        Thread {
            tid: thread.tid,
            part: thread.part.number() as u32,
            // Also for a thread that waits to be woken: its average demand counts, and programs
            // with barriers wait at any moment.
            cores: cores.wanted,
            ran_cores: cores.ran,
            held: thread.moves_to.is_some() || known.held.contains_key(&thread.tid),
            affinity: None,
        }
    });
    let threads = threads.collect();
    known.took = took;
    known.cores = smoothed;
    known.page_waits = all_page_waits;
    threads
}

/// Share of the time between two samples that a thread waited for pages, by the part that sent
/// them.
pub(super) fn page_waits(before: &CpuUsage, now: &CpuUsage) -> BTreeMap<PartId, f64> {
    let seconds = now.at_ns.saturating_sub(before.at_ns) as f64 / 1e9;
    if seconds <= 0.0 {
        return BTreeMap::new();
    }
    let share = |(part, micros): (&PartId, &u64)| {
        let before = before.stalled_us.get(part).copied().unwrap_or(0);
        (*part, micros.saturating_sub(before) as f64 / 1e6 / seconds)
    };
    now.stalled_us.iter().map(share).collect()
}

fn smoothed_page_waits(
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

/// Adds a preference to threads that persistently wait for pages of one part: to be at that part.
pub(super) fn follow_pages(threads: &mut [Thread], known: &mut TrackedMachine, pages: &[HotPage]) {
    let mut hot = HashMap::new();
    for thread in threads {
        let Some((part, there, all)) = known.page_waits.get(&thread.tid).and_then(hottest) else {
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
        let is_free = thread.affinity.is_none() && !known.followed.contains_key(&thread.tid);
        if is_free && looks >= HOT_LOOKS {
            let why = format!(
                "it waits for pages {:.0} % of its time, {:.0} % of that for pages from there{}",
                all * 100.0,
                there / all * 100.0,
                shares(pages, thread.part, part)
            );
            thread.affinity = Some(Affinity {
                part: part.number() as u32,
                why,
                stall_share: all,
            });
        }
    }
    known.hot = hot;
}

/// Whether two parts use the same bytes of the pages that they take from each other.
fn shares(pages: &[HotPage], one: u32, other: PartId) -> String {
    let both = |page: &&HotPage| {
        let one = PartId::new(one as usize);
        one.is_some_and(|one| page.parts.contains(one)) && page.parts.contains(other)
    };
    let (mut all, mut truly, mut falsely) = (0, 0, 0);
    for page in pages.iter().filter(both) {
        match page.sharing {
            Sharing::Unshared => continue,
            Sharing::Unclear => {}
            Sharing::True => truly += page.waits,
            Sharing::False => falsely += page.waits,
        }
        all += page.waits;
    }
    match falsely {
        0 if truly == 0 => String::new(),
        0 => "; both use the same bytes of the pages that they take from each other".into(),
        _ => format!(
            "; {:.0} % of the waits for pages that they take from each other are for pages of which they use different bytes (false sharing: if these were in different pages, of 4 KiB, no thread would wait)",
            falsely as f64 / all as f64 * 100.0
        ),
    }
}

/// The part for whose pages a thread waits longest, with the total share of its time and the
/// part's share of that.
fn hottest(page_waits: &BTreeMap<PartId, f64>) -> Option<(PartId, f64, f64)> {
    let all = page_waits.values().sum();
    let most = page_waits
        .iter()
        .max_by(|one, other| one.1.total_cmp(other.1));
    most.map(|(part, there)| (*part, *there, all))
}

/// Adds a preference to threads that prefer to be near an object: the part that holds most of it.
pub(super) fn draw(
    threads: &mut [Thread],
    report: &PartsReport,
    objects: &[ObjectReport],
    known: &TrackedMachine,
) {
    for (thread, said) in threads.iter_mut().zip(&report.threads) {
        let Some(name) = &said.likes else { continue };
        if known.followed.contains_key(&thread.tid) {
            continue;
        }
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        let pieces = objects.iter().filter(|object| object.has_name(name));
        for piece in pieces {
            *bytes.entry(piece.owner.number() as u32).or_default() += piece.bytes;
        }
        let all: u64 = bytes.values().sum();
        // If two parts hold as much, the thread stays.
        let most = bytes
            .into_iter()
            .max_by_key(|(part, bytes)| (*bytes, *part == thread.part));
        thread.affinity = most.map(|(part, bytes)| Affinity {
            part,
            why: format!(
                "it prefers to be near {name:?}, of which {:.1} of {:.1} MiB are there",
                bytes as f64 / f64::from(1 << 20),
                all as f64 / f64::from(1 << 20)
            ),
            stall_share: 0.0,
        });
    }
}

/// Cores that a thread used, or waited for, between two samples.
pub(super) fn cores(before: &CpuUsage, now: &CpuUsage) -> Cores {
    let passed = now.at_ns.saturating_sub(before.at_ns);
    if passed == 0 {
        return Cores::default();
    }
    let (before, now) = (&before.time, &now.time);
    let share = |ns: u64| (ns as f64 / passed as f64).min(1.0);
    let ran = now.run_ns.saturating_sub(before.run_ns);
    let waited = now.waited_ns.saturating_sub(before.waited_ns);
    let wanted = match now.is_runnable && before.turns == now.turns {
        // It waits all the time: the kernel counts a wait only once it has ended.
        true => 1.0,
        false => share(ran.saturating_add(waited)),
    };
    Cores {
        wanted,
        ran: share(ran),
    }
}

/// Average number of threads of the home that waited for pages since the last sample.
pub(super) fn waited_cores(report: &PartsReport, known: &mut TrackedMachine) -> f64 {
    // Bucket i has waits below 2^i µs; the middle of the bucket is used.
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

/// Parts as inputs of a decision; `given` is what each had evicted at the last sample.
pub(super) fn parts(
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

/// The view that a node reports of itself.
pub(super) async fn view(handle: &NodeBalancer, node: &str) -> Option<View> {
    let answer = match node == handle.context.name.as_str() {
        true => handle.answer(&handle.context.name, Request::View).await,
        false => ask(handle, node, &Request::View).await,
    };
    match answer {
        Ok(Response::View(view)) => Some(view),
        _ => None,
    }
}

/// The nodes of the home and of the parts, and, if it has no parts yet, some others.
pub(super) async fn nodes(
    handle: &Arc<NodeBalancer>,
    machine: &MachineName,
    home: View,
    parts: &[Part],
    wants_more: bool,
) -> Vec<Node> {
    let own: Name = handle.context.name.as_str().into();
    let name: Name = machine.as_str().into();
    let allowed = handle.query(move |_, _, rules| {
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
    let views = others.iter().map(|node| async { view(handle, node).await });
    let views = join_all(views).await;
    let node = |name: Name, view: View| Node {
        forbidden: allowed.get(&name).cloned().flatten(),
        name,
        state: view.state,
        loads: view.loads,
    };
    let mut nodes = vec![Node {
        // Where the home may be is decided by rounds.
        forbidden: None,
        ..node(own, home)
    }];
    let told = others.into_iter().zip(views);
    nodes.extend(told.filter_map(|(name, view)| Some(node(name, view?))));
    nodes
}

/// Free cores of each part.
pub(super) fn room(scene: &Observation) -> BTreeMap<PartId, f64> {
    let room = scene.parts.iter().filter_map(|part| {
        let node = scene.nodes.iter().find(|it| it.name == part.node)?;
        let free = (1.0 - node.state.load) * node.state.capacity.cores;
        Some((PartId::new(part.number as usize)?, free))
    });
    room.collect()
}

/// Splits an object into ranges that its part uses and ranges that it does not.
pub(super) fn by_use(object: &ObjectReport, heat: &Heat) -> Vec<Object> {
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

/// Events about parts that stop or resume answering; `told` is the state of the last events.
pub(super) fn silent(
    report: &PartsReport,
    told: &mut BTreeMap<PartId, u64>,
) -> Vec<(EventKind, String)> {
    let mut notes = Vec::new();
    for (part, node) in &report.nodes {
        let silent_ms = report.silent_ms.get(part).copied().unwrap_or(0);
        // The age of a new request after an answer may be small although the part does not answer.
        let is_silent = silent_ms >= PartInfo::SILENT_MS;
        let before = told.remove(part);
        if is_silent {
            told.insert(*part, silent_ms);
        }
        match (before, is_silent) {
            (None, true) => notes.push((
                EventKind::PartSilent,
                format!(
                    "its part {part} on {node} does not answer: threads there, and threads \
                     that wait for its memory, are stopped"
                ),
            )),
            (Some(silent_ms), false) => notes.push((
                EventKind::PartAnswers,
                format!(
                    "its part {part} on {node} answers again, after {:.1} s or more",
                    silent_ms as f64 / 1000.0
                ),
            )),
            _ => {}
        }
    }
    // A part that was ended is reported by another event.
    told.retain(|part, _| report.nodes.contains_key(part));
    notes
}

#[cfg(test)]
mod tests {
    use super::super::follow::{FOLLOW_AGAIN, THREAD_HOLD};
    use super::*;
    use keel_cluster::NodeName;
    use keel_kind_wasm::control::ThreadReport;
    use keel_kind_wasm::span::{CoreTime, IdleRange, PartSet};
    use std::time::Duration;

    /// Thread 1 waits 40 % of its time for pages of part 1 and 5 % for those of part 2, thread 2
    /// equally long for both. A report's clock runs twice as fast as its `ms`.
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
                    took: Some(CpuUsage {
                        at_ns: ms * 1_000_000 * 2,
                        time: CoreTime {
                            run_ns: if *tid == 7 { 0 } else { ms * 1_000_000 },
                            waited_ns: if *tid == 7 { 0 } else { ms * 500_000 },
                            turns: if *tid == 7 { 1 } else { *ms },
                            is_runnable: *tid != 9,
                        },
                        stalled_us: stood_of(*tid, *ms),
                    }),
                })
                .collect(),
            ..PartsReport::default()
        }
    }

    #[test]
    fn a_part_that_is_silent_is_told_of_once_and_when_it_answers() {
        let part = |number| PartId::new(number).unwrap();
        let report = |parts: usize, silent_ms: &[(usize, u64)]| PartsReport {
            nodes: (0..parts)
                .map(|it| (part(it), NodeName::new(["a", "b", "c"][it]).unwrap()))
                .collect(),
            silent_ms: silent_ms.iter().map(|(it, ms)| (part(*it), *ms)).collect(),
            ..PartsReport::default()
        };
        let mut told = BTreeMap::new();
        let mut kinds = |parts, silent_ms: &[(usize, u64)]| {
            let notes = silent(&report(parts, silent_ms), &mut told);
            notes.into_iter().collect::<Vec<_>>()
        };
        assert_eq!(kinds(3, &[(1, 1900)]), []);
        let one = kinds(3, &[(1, 2900), (2, 10)]);
        assert_eq!((one.len(), one[0].0), (1, EventKind::PartSilent));
        assert!(one[0].1.contains("part 1 on b"), "{one:?}");
        assert_eq!(kinds(3, &[(1, 3900)]), []);
        let other = kinds(3, &[(1, 4900), (2, 2000)]);
        assert!(
            other.len() == 1 && other[0].1.contains("part 2 on c"),
            "{other:?}"
        );
        let again = kinds(3, &[(1, 3), (2, 2500)]);
        assert_eq!((again.len(), again[0].0), (1, EventKind::PartAnswers));
        assert!(again[0].1.contains("after 4.9 s"), "{again:?}");
        // It ended, or the machine is on one node.
        assert_eq!(kinds(2, &[]), []);
        assert_eq!(kinds(0, &[]), []);
        let anew = kinds(3, &[(2, 2500)]);
        assert_eq!(anew.len(), 1);
    }

    #[test]
    fn cores_are_what_was_taken_and_waited_for_where_a_thread_stayed() {
        let mut known = TrackedMachine::default();
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
        // Thread 2 moved, 7 waits for a core all the time, 9 waits to be woken now and did not
        // before.
        let cores: Vec<f64> = then.iter().map(|it| it.cores).collect();
        assert_eq!(cores, [0.75, 0.0, 1.0, 0.75]);
        let ran: Vec<f64> = then.iter().map(|it| it.ran_cores).collect();
        assert_eq!(ran, [0.5, 0.0, 0.0, 0.5]);
        // The average counts.
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
        let mut known = TrackedMachine::default();
        let at = |ms: u64| report(&[(1, 0, ms), (2, 1, ms), (3, 0, ms)]);
        let page = |number: u32, waits: u64, parts: [usize; 2], sharing: Sharing| HotPage {
            memory: 0,
            number,
            waits,
            parts: parts.into_iter().filter_map(PartId::new).collect(),
            sharing,
        };
        let pages = [
            page(1, 30, [0, 1], Sharing::False),
            page(2, 6, [0, 1], Sharing::True),
            page(5, 4, [0, 1], Sharing::Unclear),
            page(3, 500, [0, 1], Sharing::Unshared),
            page(4, 500, [0, 2], Sharing::True),
        ];
        let drawn = |known: &mut TrackedMachine, report: &PartsReport| {
            let mut all = threads(report, known);
            follow_pages(&mut all, known, &pages);
            all.into_iter().map(|it| it.affinity).collect::<Vec<_>>()
        };
        // The condition must last, and there is no rate at first.
        for second in 1..=u64::from(HOT_LOOKS) {
            assert_eq!(drawn(&mut known, &at(second * 1000)), [None, None, None]);
        }
        let then = drawn(&mut known, &at(9000));
        let first = then[0].as_ref().expect("it is drawn");
        assert_eq!(first.part, 1);
        assert!((first.stall_share - 0.45).abs() < 1e-9, "{first:?}");
        assert!(first.why.contains("45 % of its time"), "{first:?}");
        assert!(first.why.contains("89 %"), "{first:?}");
        assert!(
            first.why.contains("75 % of the waits for pages"),
            "{first:?}"
        );
        let other = PartId::new(1).expect("a part");
        assert_eq!(shares(&pages[2..], 0, other), "", "unknown");
        assert!(shares(&pages[1..], 0, other).contains("the same bytes"));
        assert_eq!(then[1..], [None, None]);
        // After one move it does not follow again soon, and has no rates at the new part.
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
            sharing: Sharing::Unshared,
        };
        let heat = Heat {
            // The first and the last are outside of it.
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
        let mut known = TrackedMachine::default();
        let waits = |count: u64| PartsReport {
            waits: vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, count],
            ..PartsReport::default()
        };
        assert_eq!(waited_cores(&waits(5), &mut known), 0.0);
        std::thread::sleep(Duration::from_millis(5));
        let lost = waited_cores(&waits(105), &mut known);
        // 100 waits of about 768 µs each, in a few milliseconds.
        assert!(lost > 1.0, "{lost}");
        // The counters of a new worker start at zero.
        assert_eq!(waited_cores(&waits(0), &mut known), 0.0);
    }
}
