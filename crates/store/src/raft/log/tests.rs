//! Tests of the log of a voter, mostly in memory.

use openraft::CommittedLeaderId;

use super::super::types::Voter;
use super::*;

/// A log in memory; what it writes gets lost.
fn log_of(entries: std::ops::Range<u64>) -> (Log, mpsc::UnboundedReceiver<Write>) {
    let (writes, written) = mpsc::unbounded_channel();
    let entry = |index| Entry {
        log_id: LogId::new(CommittedLeaderId::new(1, 1), index),
        payload: EntryPayload::Blank,
    };
    let entries: BTreeMap<u64, Entry> = entries.map(|index| (index, entry(index))).collect();
    let state = State {
        bytes: entries.values().map(size).sum(),
        entries,
        ..State::default()
    };
    let log = Log {
        id: 1,
        flushes: Flushes::new(None),
        state: Arc::new(Mutex::new(state)),
        writes,
        saved: watch::channel(SavedSnapshot::default()).1,
    };
    (log, written)
}

fn group(index: u64, groups: &[&[u64]]) -> Entry {
    let groups = groups.iter().map(|group| group.iter().copied().collect());
    let nodes: BTreeMap<u64, Voter> = BTreeMap::new();
    let group = openraft::Membership::new(groups.collect(), nodes);
    Entry {
        log_id: LogId::new(CommittedLeaderId::new(1, 1), index),
        payload: EntryPayload::Membership(group),
    }
}

/// A candidate may lead by a vote that it was told: after a loss of power this voter must know of it,
/// or it would give another one to somebody else in the same term.
#[tokio::test]
async fn a_vote_is_told_once_it_is_on_disk() {
    let (mut log, mut written) = log_of(1..2);
    let vote = Vote::new(2, 3);
    let told = tokio::spawn(async move { log.save_vote(&vote).await });
    let Some(Write::Meta("vote", _, done)) = written.recv().await else {
        panic!("it is not written");
    };
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!told.is_finished());
    done.send(Ok(())).unwrap();
    told.await.unwrap().unwrap();
}

/// Entries are sent early only where another voter is needed: a sole one could lose what it has
/// answered to its clients.
#[tokio::test]
async fn a_voter_that_is_enough_waits_for_its_disk() {
    let (mut log, written) = log_of(1..2);
    let needs_others = |log: &Log| log.needs_others(&log.lock());
    let lead = Vote::new_committed(1, 1);
    let cases: [(&[&[u64]], bool); 5] = [
        (&[&[1]], false),
        (&[&[1], &[1, 2, 3]], true),
        (&[&[1, 2, 3]], true),
        (&[&[1, 2, 3], &[1]], true),
        (&[&[2]], true),
    ];
    assert!(!needs_others(&log));
    for (groups, needed) in cases {
        let membership = membership_of(&group(2, groups)).unwrap();
        log.lock().membership = membership.clone();
        log.lock().vote = Some(lead);
        assert_eq!(needs_others(&log), needed, "{groups:?}");
        for other in [
            Vote::new(1, 1),
            Vote::new_committed(1, 2),
            as_follower(lead, 1),
        ] {
            log.lock().vote = Some(other);
            assert!(!needs_others(&log), "{other}");
        }
        // The same group, known by a snapshot.
        let (snapshot, saved) = watch::channel(SavedSnapshot::default());
        snapshot.send_modify(|saved| saved.membership = membership.clone());
        log.saved = saved;
        log.lock().vote = Some(lead);
        log.lock().membership = membership_of(&group(1, &[&[1]])).unwrap();
        assert_eq!(needs_others(&log), needed, "{groups:?} in a snapshot");
        log.saved = watch::channel(SavedSnapshot::default()).1;
    }
    // What is removed from the log does not count.
    {
        let mut state = log.lock();
        state.vote = Some(lead);
        for entry in [group(2, &[&[1]]), group(3, &[&[1], &[1, 2]])] {
            state.membership = membership_of(&entry).unwrap();
            state.entries.insert(entry.log_id.index, entry);
        }
    }
    assert!(needs_others(&log));
    drop(written);
    let from = LogId::new(CommittedLeaderId::new(1, 1), 3);
    assert!(log.truncate(from).await.is_err());
    assert!(!needs_others(&log));
}

#[test]
fn a_leader_that_is_restarted_follows() {
    let lead = Vote::new_committed(7, 2);
    assert_eq!(as_follower(lead, 2), Vote::new(7, 2));
    assert_eq!(as_follower(lead, 3), lead);
}

async fn indexes(reader: &mut LogReader, start: u64, end: u64) -> Vec<u64> {
    let found = reader.limited_get_log_entries(start, end).await;
    found.unwrap().iter().map(|it| it.log_id.index).collect()
}

#[tokio::test]
async fn entries_are_sent_without_a_gap() {
    let (mut log, _written) = log_of(70..73);
    let mut reader = log.get_log_reader().await;
    assert_eq!(indexes(&mut reader, 70, 73).await, [70, 71, 72]);
    assert_eq!(indexes(&mut reader, 71, 72).await, [71]);
    // The beginning went to a snapshot.
    assert!(indexes(&mut reader, 32, 73).await.is_empty());
}

#[tokio::test]
async fn a_replaced_leader_sends_no_entries_of_another() {
    let (mut log, written) = log_of(1..4);
    let mut reader = log.get_log_reader().await;
    drop(written);
    // Its answer is that nothing was written, which does not matter here.
    let from = LogId::new(CommittedLeaderId::new(1, 1), 2);
    assert!(log.truncate(from).await.is_err());
    assert!(indexes(&mut reader, 1, 4).await.is_empty());
    assert_eq!(indexes(&mut log.get_log_reader().await, 1, 4).await, [1]);
}

/// The term and index of each entry, and the term and index up to which there are none any more.
type Contents = (Vec<(u64, u64)>, Option<(u64, u64)>);

/// Whatever was removed does not come back after a loss of power: the end of a former leader's entries
/// would follow those of the new one, and the beginning would be a gap.
#[tokio::test]
async fn what_a_log_removes_is_removed_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let id = |term, index| LogId::new(CommittedLeaderId::new(term, 1), index);
    let entry = |term, index| Entry {
        log_id: id(term, index),
        payload: EntryPayload::Blank,
    };
    let (snapshot, saved) = watch::channel(SavedSnapshot::default());
    let reopened = || -> Contents {
        let opened = Log::open(&path, None, saved.clone()).unwrap();
        let state = opened.log.lock();
        let ids = state.entries.values().map(|entry| entry.log_id);
        let pair = |id: LogId| (id.leader_id.term, id.index);
        (ids.map(pair).collect(), state.purged.map(pair))
    };
    let Opened {
        log,
        disk,
        mut writes,
        ..
    } = Log::open(&path, Some(1), saved.clone()).unwrap();
    let records = (0..=4).map(|index| (index, encoded(&entry(1, index)).unwrap()));
    let flush = log.flushes.begin(Some(4), None);
    assert!(
        disk.write(vec![Write::Append(records.collect(), flush)])
            .finish()
    );
    {
        let mut state = log.lock();
        state.entries = (0..=4).map(|index| (index, entry(1, index))).collect();
        state.bytes = state.entries.values().map(size).sum();
    }

    // Another leader's entries replace the last three, of which it has one so far.
    let mut truncated = log.clone();
    let done = tokio::spawn(async move { truncated.truncate(id(1, 2)).await });
    let write = writes.recv().await.unwrap();
    assert!(disk.write(vec![write]).finish());
    done.await.unwrap().unwrap();
    let record = vec![(2, encoded(&entry(2, 2)).unwrap())];
    let flush = log.flushes.begin(Some(2), None);
    assert!(disk.write(vec![Write::Append(record, flush)]).finish());
    drop(disk);
    assert_eq!(reopened(), (vec![(1, 0), (1, 1), (2, 2)], None));

    // A snapshot has the first two.
    let disk = Log::open(&path, None, saved.clone()).unwrap().disk;
    snapshot.send_modify(|saved| saved.last = Some(id(1, 0)));
    let mut purged = log.clone();
    let done = tokio::spawn(async move { purged.purge(id(1, 1)).await });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    // Before that is in its file nothing leaves the log: the power may fail in between.
    assert!(!done.is_finished() && writes.try_recv().is_err());
    assert_eq!(log.lock().entries.len(), 2);
    snapshot.send_modify(|saved| saved.last = Some(id(1, 1)));
    let write = writes.recv().await.unwrap();
    assert!(disk.write(vec![write]).finish());
    done.await.unwrap().unwrap();
    drop(disk);
    assert_eq!(reopened(), (vec![(2, 2)], Some((1, 1))));
}
