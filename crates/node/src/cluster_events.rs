//! The events of all nodes. Nodes that do not answer are named; only their events are missing.

use crate::context::Context;
use crate::events::{Events, Filter};
use keel_api::{Event, EventLine, Silence};
use keel_cluster::{MachineName, NodeName};
use keel_machine::worker::control::pack;
use keel_net::{Bytes, RpcError};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// [`Question`] → stream of `EventLine` as JSON.
pub(crate) const EVENTS: u16 = 0x0309;

/// How long a node may take to send its events.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause before a node that does not answer is asked again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The most lines that wait for the client.
const LINES_MAX: usize = 256;

/// A query to a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Question {
    /// Only events about this machine.
    pub(crate) machine: Option<MachineName>,
    /// Earliest time, in milliseconds since 1970-01-01 UTC.
    pub(crate) since_unix_ms: u64,
    /// Only events with greater ids.
    pub(crate) after: u64,
    /// The most events of the answer, newest first.
    pub(crate) limit: u32,
    /// Whether future events follow.
    pub(crate) follow: bool,
}

impl Question {
    fn filter(&self) -> Filter {
        Filter {
            machine: self.machine.clone(),
            since_unix_ms: self.since_unix_ms,
            after: self.after,
        }
    }
}

/// Answers another node in lines of JSON, so that older and newer versions understand each other.
pub(crate) fn answer_peer(events: &Events, question: Question) -> mpsc::Receiver<Bytes> {
    let mut lines = here(events.clone(), question);
    let (send, pieces) = mpsc::channel(LINES_MAX);
    tokio::spawn(async move {
        while let Some(line) = next(&mut lines, &send).await {
            let Ok(bytes) = serde_json::to_vec(&line) else {
                continue;
            };
            if send.send(bytes.into()).await.is_err() {
                return;
            }
        }
    });
    pieces
}

/// The next line, unless the client disconnects first.
async fn next<T>(
    lines: &mut mpsc::Receiver<EventLine>,
    asked: &mpsc::Sender<T>,
) -> Option<EventLine> {
    tokio::select! {
        line = lines.recv() => line,
        () = asked.closed() => None,
    }
}

/// This node's events.
fn here(events: Events, question: Question) -> mpsc::Receiver<EventLine> {
    let (send, lines) = mpsc::channel(LINES_MAX);
    tokio::spawn(async move {
        // Before the files are read: events that are recorded meanwhile appear in both.
        let mut live = events.follow();
        let mut filter = question.filter();
        // Read again if the receiver lagged behind.
        while tell_kept(&events, &mut filter, question.limit, &send).await && question.follow {
            loop {
                let event = tokio::select! {
                    event = live.recv() => event,
                    () = send.closed() => return,
                };
                match event {
                    Ok(event) if filter.fits(&event) => {
                        filter.after = event.id;
                        let line = EventLine::Event(Event::clone(&event));
                        if send.send(line).await.is_err() {
                            return;
                        }
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => break,
                    Err(RecvError::Closed) => return,
                }
            }
        }
    });
    lines
}

/// Sends the stored events; false if they cannot be read, or the client has gone.
async fn tell_kept(
    events: &Events,
    filter: &mut Filter,
    limit: u32,
    send: &mpsc::Sender<EventLine>,
) -> bool {
    let kept = events.newest(filter.clone(), limit as usize).await;
    let (found, left_out) = match kept {
        Ok(kept) => kept,
        Err(error) => {
            let silence = Silence {
                node: events.node().to_owned(),
                reason: format!("its events cannot be read: {error}"),
            };
            // The client may have disconnected.
            let _ = send.send(EventLine::Silent(silence)).await;
            return false;
        }
    };
    if left_out && send.send(EventLine::OlderLeftOut).await.is_err() {
        return false;
    }
    for event in found {
        filter.after = event.id;
        if send.send(EventLine::Event(event)).await.is_err() {
            return false;
        }
    }
    true
}

/// The combined answers of all nodes.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    /// Oldest first.
    pub(crate) events: Vec<Event>,
    /// Nodes that did not answer.
    pub(crate) silent: Vec<Silence>,
    /// Whether there are older events.
    pub(crate) older_left_out: bool,
    /// The last id that each node sent, including events that were left out.
    last: BTreeMap<String, u64>,
}

impl Gathered {
    /// As the lines of an answer.
    pub(crate) fn lines(self) -> Vec<EventLine> {
        let older = self.older_left_out.then_some(EventLine::OlderLeftOut);
        older
            .into_iter()
            .chain(self.events.into_iter().map(EventLine::Event))
            .chain(self.silent.into_iter().map(EventLine::Silent))
            .collect()
    }
}

/// The events of all nodes that answer.
pub(crate) async fn of_cluster(context: &Arc<Context>, question: &Question) -> Gathered {
    let question = Question {
        follow: false,
        ..question.clone()
    };
    let mut asked = JoinSet::new();
    for node in nodes(context) {
        let (context, question) = (context.clone(), question.clone());
        asked.spawn(async move {
            let mut told = Vec::new();
            let telling = tell(&context, &node, &question, &mut told);
            let result = match tokio::time::timeout(PATIENCE, telling).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
            };
            (node, told, result)
        });
    }
    let mut gathered = Gathered::default();
    let mut of_nodes = Vec::new();
    while let Some(joined) = asked.join_next().await {
        let Ok((node, told, result)) = joined else {
            continue;
        };
        let mut events = Vec::new();
        for line in told {
            match line {
                EventLine::Event(event) => events.push(event),
                EventLine::Silent(silence) => gathered.silent.push(silence),
                EventLine::OlderLeftOut => gathered.older_left_out = true,
            }
        }
        of_nodes.push(events);
        if let Err(reason) = result {
            let node = node.to_string();
            gathered.silent.push(Silence { node, reason });
        }
    }
    gathered.silent.sort_by(|a, b| a.node.cmp(&b.node));
    gathered.events = merge(of_nodes);
    for event in &gathered.events {
        gathered.last.insert(event.node.clone(), event.id);
    }
    let excess = gathered
        .events
        .len()
        .saturating_sub(question.limit as usize);
    gathered.older_left_out |= excess > 0;
    gathered.events.drain(..excess);
    gathered
}

/// All members, including this node before it knows the members.
fn nodes(context: &Context) -> BTreeSet<NodeName> {
    let mut nodes: BTreeSet<NodeName> = context.members.all().keys().cloned().collect();
    nodes.insert(context.name.clone());
    nodes
}

/// Collects the events of a node until its answer ends.
async fn tell(
    context: &Arc<Context>,
    node: &NodeName,
    question: &Question,
    told: &mut Vec<EventLine>,
) -> Result<(), String> {
    let mut lines = ask(context, node, question).await?;
    while let Some(line) = lines.recv().await {
        told.push(line?);
    }
    Ok(())
}

/// Asks a node, which may be this one.
async fn ask(
    context: &Arc<Context>,
    node: &NodeName,
    question: &Question,
) -> Result<mpsc::Receiver<Result<EventLine, String>>, String> {
    let (send, lines) = mpsc::channel(LINES_MAX);
    if *node == context.name {
        let mut own = here(context.events.clone(), question.clone());
        tokio::spawn(async move {
            while let Some(line) = next(&mut own, &send).await {
                if send.send(Ok(line)).await.is_err() {
                    return;
                }
            }
        });
        return Ok(lines);
    }
    let text = |error: RpcError| error.to_string();
    let payload = pack(question).map_err(text)?;
    let stream = context.peers.stream(node, EVENTS, payload);
    let mut stream = stream.await.map_err(text)?;
    tokio::spawn(async move {
        loop {
            let item = tokio::select! {
                item = stream.recv() => item,
                () = send.closed() => return,
            };
            let Some(item) = item else { return };
            let line = item.map_err(text).and_then(|bytes| {
                serde_json::from_slice(&bytes)
                    .map_err(|error| format!("its answer cannot be decoded: {error}"))
            });
            let over = line.is_err();
            if send.send(line).await.is_err() || over {
                return;
            }
        }
    });
    Ok(lines)
}

/// Merges the events of several nodes by their clocks, and keeps the order of each node, even if
/// its clock was set back.
fn merge(of_nodes: Vec<Vec<Event>>) -> Vec<Event> {
    let mut all = Vec::new();
    for events in of_nodes {
        let mut at = 0;
        for event in events {
            at = event.at_unix_ms.max(at);
            all.push((at, event));
        }
    }
    // A stable sort keeps the order of each node for equal times.
    all.sort_by(|(at, a), (bt, b)| (at, &a.node).cmp(&(bt, &b.node)));
    all.into_iter().map(|(_, event)| event).collect()
}

/// Sends the collected events, and then new ones of all nodes, including those that join, until
/// the client disconnects.
pub(crate) fn follow_cluster(
    context: &Arc<Context>,
    question: &Question,
    gathered: Gathered,
) -> mpsc::Receiver<EventLine> {
    let (send, lines) = mpsc::channel(LINES_MAX);
    let (context, question) = (context.clone(), question.clone());
    tokio::spawn(async move {
        let known = gathered.last.clone();
        let silent: BTreeSet<String> = gathered
            .silent
            .iter()
            .map(|silence| silence.node.clone())
            .collect();
        for line in gathered.lines() {
            if send.send(line).await.is_err() {
                return;
            }
        }
        let mut changes = context.members.changes();
        let mut followed = BTreeSet::new();
        // It ends with this task.
        let mut tasks = JoinSet::new();
        loop {
            for node in nodes(&context) {
                if !followed.insert(node.clone()) {
                    continue;
                }
                let question = Question {
                    after: known.get(node.as_str()).copied().unwrap_or(0),
                    follow: true,
                    ..question.clone()
                };
                let told = silent.contains(node.as_str());
                tasks.spawn(follow_node(
                    context.clone(),
                    node,
                    question,
                    told,
                    send.clone(),
                ));
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() {
                    // No more members join; the present ones continue.
                    send.closed().await;
                    return;
                },
                () = send.closed() => return,
            }
        }
    });
    lines
}

/// Forwards the events of a node; `silent` tells whether it is known not to answer.
async fn follow_node(
    context: Arc<Context>,
    node: NodeName,
    mut question: Question,
    mut silent: bool,
    send: mpsc::Sender<EventLine>,
) {
    loop {
        let asked = tokio::time::timeout(PATIENCE, ask(&context, &node, &question));
        let mut reason = "it does not answer".to_owned();
        match asked.await {
            Ok(Ok(mut lines)) => {
                while let Some(line) = lines.recv().await {
                    match line {
                        Ok(EventLine::Event(event)) => {
                            silent = false;
                            question.after = event.id;
                            if send.send(EventLine::Event(event)).await.is_err() {
                                return;
                            }
                        }
                        Ok(EventLine::OlderLeftOut) => {}
                        Ok(EventLine::Silent(silence)) => reason = silence.reason,
                        Err(error) => reason = error,
                    }
                }
            }
            Ok(Err(error)) => reason = error,
            Err(_) => {}
        }
        if !context.members.contains(&node) && node != context.name {
            return;
        }
        if !silent {
            silent = true;
            let node = node.to_string();
            let line = EventLine::Silent(Silence { node, reason });
            if send.send(line).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Note;
    use keel_api::EventKind;

    fn event(node: &str, id: u64, at: u64) -> Event {
        Event {
            id,
            at_unix_ms: at,
            node: node.into(),
            machine: None,
            epoch: None,
            kind: EventKind::NodeStarted,
            text: String::new(),
            fields: BTreeMap::new(),
        }
    }

    #[test]
    fn one_order_of_all_nodes_keeps_that_of_each() {
        let a = vec![event("a", 1, 10), event("a", 2, 30), event("a", 3, 20)];
        let b = vec![event("b", 1, 15), event("b", 2, 30), event("b", 3, 40)];
        for of_nodes in [vec![a.clone(), b.clone()], vec![b, a]] {
            let order: Vec<(String, u64)> = merge(of_nodes)
                .into_iter()
                .map(|event| (event.node, event.id))
                .collect();
            let order: Vec<(&str, u64)> = order
                .iter()
                .map(|(node, id)| (node.as_str(), *id))
                .collect();
            // The clock of a was set back before its third.
            assert_eq!(
                order,
                [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 2), ("b", 3)]
            );
        }
    }

    /// A follower misses no event and gets none twice, also when more arrive than it can take.
    #[tokio::test(flavor = "multi_thread")]
    async fn who_follows_sees_each_event_once_and_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let events = Events::open(
            folder.path(),
            &NodeName::new("a").unwrap(),
            crate::metrics::Metrics::new().unwrap(),
        )
        .unwrap();
        let record = |number: u64| {
            events.record(Note::node(EventKind::NodeStarted, "x").with("number", number));
        };
        for number in 0..100 {
            record(number);
        }
        let question = Question {
            machine: None,
            since_unix_ms: 0,
            after: 0,
            limit: 10_000,
            follow: true,
        };
        let mut lines = here(events.clone(), question);
        for burst in 0..4 {
            for number in 0..2000 {
                record(100 + burst * 2000 + number);
            }
            events.flush().await;
        }
        for expected in 0..8100 {
            let line = tokio::time::timeout(Duration::from_secs(60), lines.recv()).await;
            let Ok(Some(EventLine::Event(event))) = line else {
                panic!("{expected}: {line:?}")
            };
            assert_eq!(event.fields["number"], expected.to_string());
        }
    }
}
