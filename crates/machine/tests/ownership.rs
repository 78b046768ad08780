//! The commit rule, one comparison at a time.

#[path = "common/record.rs"]
mod record;

use keel_cluster::{Epoch, NodeName};
use keel_machine::high_availability::HighAvailability;
use keel_machine::moves::ownership::{
    EndEffect, EpochBase, Failover, GivenUp, ResumeDecision, Settlement, Target, Transfer,
    VersionedRecord, announced, created_at, end, enter_incarnation, fail_over, give_up, may_resume,
    running, start_again,
};
use keel_machine::restart_policy::Restart;
use keel_machine::spec::{Record, Status};
use keel_store::{Compare, KeyValue, Op, Txn};

const EPOCH: Epoch = Epoch {
    incarnation: 1,
    counter: 40,
};

fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn transfer() -> Transfer {
    Transfer {
        machine: "m".parse().unwrap(),
        source: node("a"),
        target: node("b"),
        epoch: EPOCH,
        committed: EPOCH.next(),
        revision: 50,
        is_complete: true,
    }
}

fn epoch(later: u64) -> Epoch {
    Epoch {
        counter: EPOCH.counter + later,
        ..EPOCH
    }
}

fn record(owner: &str, epoch: Epoch, status: Status) -> Record {
    let mut record = record::new("m".parse().unwrap(), node(owner), Restart::No);
    record.epoch = epoch;
    record.status = status;
    record
}

fn found(record: Record) -> VersionedRecord {
    VersionedRecord {
        record,
        revision: 60,
    }
}

fn arriving() -> Status {
    Status::Arriving { from: node("a") }
}

fn failed() -> Status {
    Status::Failed {
        reason: "lost".into(),
    }
}

fn restarting() -> Status {
    Status::Restarting {
        reason: "lost".into(),
        at_unix_ms: 0,
        from_checkpoint: true,
        elsewhere: false,
    }
}

/// The name of a settlement.
fn word(settlement: Settlement) -> &'static str {
    match settlement {
        Settlement::Write { .. } => "write",
        Settlement::Kept(_) => "kept",
        Settlement::Won => "won",
        Settlement::Superseded {
            output_stays: true, ..
        } => "superseded, ended here",
        Settlement::Superseded { .. } => "superseded",
    }
}

#[test]
fn the_record_resolves_doubt() {
    let gone = transfer().settle(None).unwrap();
    assert_eq!(word(gone), "superseded");
    for (record, expected) in [
        (record("a", EPOCH, Status::Running), "write"),
        // An earlier attempt.
        (record("a", epoch(1), Status::Running), "kept"),
        (record("b", epoch(1), arriving()), "won"),
        (record("b", epoch(1), Status::Running), "won"),
        // Treating this as a commit once led to two copies.
        (record("a", EPOCH, failed()), "superseded, ended here"),
        (
            record("a", epoch(1), restarting()),
            "superseded, ended here",
        ),
        (
            record("a", epoch(2), Status::Running),
            "superseded, ended here",
        ),
        (record("b", epoch(1), failed()), "superseded"),
        (record("b", EPOCH, arriving()), "superseded"),
        (record("b", epoch(2), arriving()), "superseded"),
        (record("c", epoch(1), arriving()), "superseded"),
        (record("c", epoch(2), Status::Running), "superseded"),
        // A later machine of the same name.
        (record("b", epoch(9), Status::Scheduled), "superseded"),
        (
            record("a", epoch(9), Status::Scheduled),
            "superseded, ended here",
        ),
    ] {
        let said = format!("{} {} {:?}", record.owner, record.epoch, record.status);
        let settlement = transfer().settle(Some(&found(record))).unwrap();
        assert_eq!(word(settlement), expected, "{said}");
    }
}

/// An acknowledged change is preserved while the ownership is unknown.
#[test]
fn the_settling_write_preserves_the_present_record() {
    let mut now = record("a", EPOCH, Status::Running);
    now.spec.memory_bytes = 77 << 20;
    now.stop_wanted = true;
    let settlement = transfer().settle(Some(&found(now.clone()))).unwrap();
    let Settlement::Write { txn, record } = settlement else {
        panic!("no write");
    };
    now.epoch = epoch(1);
    assert_eq!(*record, now);
    let expected = Txn::new()
        .when_modified_at("machine/m", 60)
        .put("machine/m", now.encode().unwrap());
    assert_eq!(txn, expected);
}

#[test]
fn only_a_machine_that_has_not_run_there_is_taken_back() {
    let word = |found: Option<&VersionedRecord>| {
        word(transfer().take_back(found, Target::Without, 7).unwrap())
    };
    assert_eq!(word(None), "superseded");
    for (record, expected) in [
        (record("b", epoch(1), arriving()), "write"),
        (record("a", epoch(2), Status::Running), "kept"),
        // Its target's node failed, and it went on elsewhere, or there again.
        (record("c", epoch(2), Status::Running), "superseded"),
        (record("b", epoch(2), Status::Running), "superseded"),
        (record("b", epoch(1), Status::Running), "superseded"),
        (record("b", epoch(1), failed()), "superseded"),
        (record("b", epoch(2), arriving()), "superseded"),
        (record("b", EPOCH, arriving()), "superseded"),
        (
            record("b", epoch(1), Status::Arriving { from: node("c") }),
            "superseded",
        ),
        (record("c", epoch(1), arriving()), "superseded"),
        (
            record("a", epoch(2), restarting()),
            "superseded, ended here",
        ),
        (
            record("a", epoch(1), Status::Running),
            "superseded, ended here",
        ),
    ] {
        let said = format!("{} {} {:?}", record.owner, record.epoch, record.status);
        assert_eq!(word(Some(&found(record))), expected, "{said}");
    }
}

#[test]
fn taking_back_changes_owner_epoch_and_schedules() {
    let mut now = record("b", epoch(1), arriving());
    now.spec.memory_bytes = 77 << 20;
    let settlement = transfer()
        .take_back(Some(&found(now.clone())), Target::Without, 7)
        .unwrap();
    let Settlement::Write { txn, record } = settlement else {
        panic!("no write");
    };
    now.owner = node("a");
    now.epoch = epoch(2);
    now.enter(Status::Running, 7);
    assert_eq!(*record, now);
    let expected = Txn::new()
        .when_modified_at("machine/m", 60)
        .put("machine/m", now.encode().unwrap())
        .delete("schedule/b/m")
        .put("schedule/a/m", Vec::new());
    assert_eq!(txn, expected);
}

#[test]
fn the_commit_compares_all_conditions() {
    let mut now = record("a", EPOCH, Status::Running);
    let entry_of = |transfer: Transfer| {
        let txn = transfer.commit(&now, 7).unwrap();
        let put = txn.then.iter().find_map(|op| match op {
            Op::Put { key, value, .. } if key == "schedule/b/m" => Some(value.clone()),
            _ => None,
        });
        (txn, put.unwrap())
    };
    let is_complete = false;
    let (_, silent) = entry_of(Transfer {
        is_complete,
        ..transfer()
    });
    assert!(silent.is_empty());
    let (txn, entry) = entry_of(transfer());
    // What the target's node may conclude from it.
    assert_eq!(announced(EPOCH, &entry), Some(epoch(1)));
    for (offered, value) in [
        (epoch(1), &entry[..]),
        (epoch(2), &entry),
        (EPOCH, &silent),
        (EPOCH, &entry[..entry.len() - 1]),
        (EPOCH, b"x"),
    ] {
        assert_eq!(announced(offered, value), None);
    }
    now.owner = node("b");
    now.epoch = epoch(1);
    now.enter(arriving(), 7);
    let exists = |key: &str| Compare::Exists { key: key.into() };
    let expected = Txn::new()
        .when_modified_at("machine/m", 50)
        .when(exists("schedule/a/m"))
        .when(exists("reservation/b/m"))
        .when(exists("alive/a"))
        .when(exists("alive/b"))
        .delete("schedule/a/m")
        .put("schedule/b/m", entry)
        .put("machine/m", now.encode().unwrap())
        .delete("reservation/b/m");
    assert_eq!(txn, expected);
}

#[test]
fn an_arrival_resumes_only_after_its_own_commit() {
    let verdict = |record: Option<&Record>| may_resume(&node("b"), EPOCH, record);
    assert_eq!(verdict(None), ResumeDecision::Drop);
    for (record, expected) in [
        (
            record("b", epoch(1), arriving()),
            ResumeDecision::Resume(epoch(1)),
        ),
        (
            record("a", EPOCH, Status::Running),
            ResumeDecision::Undecided,
        ),
        (record("a", EPOCH, failed()), ResumeDecision::Drop),
        (record("a", epoch(1), Status::Running), ResumeDecision::Drop),
        (record("a", epoch(1), restarting()), ResumeDecision::Drop),
        (record("b", epoch(1), failed()), ResumeDecision::Drop),
        (record("b", epoch(2), arriving()), ResumeDecision::Drop),
        (record("c", epoch(1), arriving()), ResumeDecision::Drop),
        // A later machine of the same name, which is to be started here.
        (
            record("b", epoch(9), Status::Scheduled),
            ResumeDecision::Drop,
        ),
        (
            record("b", epoch(1), Status::Scheduled),
            ResumeDecision::Drop,
        ),
    ] {
        let said = format!("{} {} {:?}", record.owner, record.epoch, record.status);
        assert_eq!(verdict(Some(&record)), expected, "{said}");
    }
}

#[test]
fn it_is_running_at_the_committed_owner() {
    let b = node("b");
    let from = node("a");
    for (status, filling, expected) in [
        (Status::Scheduled, false, Some(Status::Running)),
        (restarting(), false, Some(Status::Running)),
        (arriving(), false, Some(Status::Running)),
        (
            arriving(),
            true,
            Some(Status::Filling { from: from.clone() }),
        ),
        (
            Status::Filling { from: from.clone() },
            false,
            Some(Status::Running),
        ),
        (Status::Filling { from }, true, None),
        (Status::Running, false, None),
        (failed(), false, None),
    ] {
        let record = record("b", EPOCH, status);
        assert_eq!(running(&record, &b, EPOCH, filling), expected);
        assert_eq!(running(&record, &b, epoch(1), filling), None);
        assert_eq!(running(&record, &node("a"), EPOCH, filling), None);
    }
}

/// The answer to the write of an end was lost: repeating it changes nothing.
#[test]
fn an_end_counts_once() {
    let a = node("a");
    for policy in [Restart::No, Restart::OnFailure, Restart::Always] {
        for status in [
            Status::Running,
            Status::Filling { from: node("c") },
            Status::Scheduled,
        ] {
            let mut now = record("a", EPOCH, status.clone());
            now.spec.restart = policy;
            let effect = end(&mut now, &a, EPOCH, &failed(), 1000);
            assert_eq!(effect, EndEffect::Changed);
            let filling = matches!(status, Status::Filling { .. });
            let restarts = policy != Restart::No || filling;
            assert_eq!(now.status.ended(), !restarts, "{policy:?} {status:?}");
            let written = now.clone();
            let again = end(&mut now, &a, EPOCH, &failed(), 2000);
            let expected = match restarts {
                true => EndEffect::RestartsAlready,
                false => EndEffect::None,
            };
            assert_eq!(again, expected, "{policy:?} {status:?}");
            assert_eq!(now, written, "{policy:?} {status:?}");
        }
    }
}

#[test]
fn an_end_is_of_one_life_on_one_node() {
    let a = node("a");
    for (owner, at, status) in [
        ("b", EPOCH, Status::Running),
        ("a", epoch(1), Status::Running),
        ("a", epoch(9), Status::Scheduled),
        ("a", epoch(2), restarting()),
        ("a", EPOCH, failed()),
    ] {
        let mut now = record(owner, at, status);
        let before = now.clone();
        assert_eq!(
            end(&mut now, &a, EPOCH, &Status::Stopped, 1),
            EndEffect::None
        );
        assert_eq!(now, before);
    }
}

#[test]
fn a_machine_that_was_to_end_is_not_started_again() {
    let mut now = record("a", EPOCH, Status::Running);
    now.spec.restart = Restart::Always;
    now.stop_wanted = true;
    let effect = end(&mut now, &node("a"), EPOCH, &failed(), 1);
    assert_eq!((effect, now.status), (EndEffect::Changed, Status::Stopped));
}

/// The epoch of a new record includes the revision of its creation.
#[test]
fn epochs_begin_above_all_that_the_name_had() {
    let entry = |created: u64, modified: u64, counter: u64| {
        let written = Epoch {
            incarnation: 1,
            counter,
        };
        KeyValue {
            key: "machine/m".into(),
            value: record("a", written, Status::Running).encode().unwrap(),
            created,
            modified,
            lease: None,
        }
    };
    let counter = |entry: &KeyValue| VersionedRecord::read(entry).unwrap().record.epoch.counter;
    assert_eq!(counter(&entry(70, 70, 0)), 70);
    assert_eq!(counter(&entry(70, 71, 70)), 70);
    assert_eq!(counter(&entry(70, 90, 75)), 75);
    // With the base of a cluster that restored a machine of another cluster.
    assert_eq!(counter(&entry(70, 70, 1000)), 1070);
}

#[test]
fn a_base_is_raised_only_by_machines_of_other_clusters() {
    let of = |incarnation: u32, counter: u64| Epoch {
        incarnation,
        counter,
    };
    let base = EpochBase::default().at_least(1);
    assert_eq!(base.epoch(), of(1, 0));
    // The machine ran in this cluster.
    assert_eq!(base.above(of(1, 80), 100), base);
    assert_eq!(base.above(of(1, 100), 100), base);
    // The machine ran in another cluster: later machines begin above its epoch.
    let raised = base.above(of(1, 5000), 100);
    assert!(created_at(raised.epoch(), 101) > of(1, 5000));
    assert_eq!(raised.above(of(1, 80), 200), raised);
    let raised = base.above(of(3, 5), 100);
    assert!(created_at(raised.epoch(), 101) > of(3, 5));
    assert_eq!(raised.at_least(2), raised);
    assert!(created_at(raised.at_least(4).epoch(), 1) > created_at(raised.epoch(), 9999));
}

/// A record of node a, with high availability.
fn highly_available(status: Status) -> VersionedRecord {
    let mut record = record("a", EPOCH, status);
    record.spec.ha = Some(HighAvailability::default());
    found(record)
}

fn given(found: &VersionedRecord) -> Option<Failover> {
    fail_over(found, &node("b"), |_| false, 7).unwrap()
}

/// Only what was found changes, only a node without a lease loses its machine, and only a node with
/// one gets it.
#[test]
fn a_failover_compares_all_that_it_depends_on() {
    let before = highly_available(Status::Running);
    let Failover {
        failed,
        record,
        txn,
    } = given(&before).unwrap();
    assert_eq!((failed, &record.owner), (node("a"), &node("b")));
    // Not that of a move's commit.
    assert_eq!(record.epoch, epoch(2));
    assert!(!transfer().has_won(&record));
    let restarting = Status::Restarting {
        reason: "its node a failed".into(),
        at_unix_ms: 7,
        from_checkpoint: true,
        elsewhere: true,
    };
    assert_eq!(record.status, restarting);
    let expected = Txn::new()
        .when_modified_at("machine/m", 60)
        .when_absent("alive/a")
        .when(Compare::Exists {
            key: "alive/b".into(),
        })
        .put("machine/m", record.encode().unwrap())
        .delete("schedule/a/m")
        .delete("reservation/a/m")
        .put("schedule/b/m", Vec::new());
    assert_eq!(txn, expected);
}

#[test]
fn what_has_ended_or_does_not_ask_for_it_stays() {
    assert_eq!(given(&highly_available(failed())), None);
    assert_eq!(given(&found(record("a", EPOCH, Status::Running))), None);
    let mut there = highly_available(Status::Running);
    there.record.owner = node("b");
    assert_eq!(given(&there), None);
    // It was to end: it does, and runs nowhere.
    let mut stopping = highly_available(Status::Running);
    stopping.record.stop_wanted = true;
    let Failover { record, txn, .. } = given(&stopping).unwrap();
    assert_eq!(record.status, Status::Stopped);
    let puts = |key: &str| {
        let is_put = |op: &Op| matches!(op, Op::Put { key: put, .. } if put == key);
        txn.then.iter().any(is_put)
    };
    assert!(puts("machine/m") && !puts("schedule/b/m"));
}

/// The source of a move that was committed takes the machine back; only if it is gone too, the
/// machine is restarted.
#[test]
fn a_machine_on_arrival_is_its_sources_first() {
    let arriving = highly_available(Status::Arriving { from: node("c") });
    let of = |alive: &str| {
        let holds = |from: &NodeName| *from == node(alive);
        fail_over(&arriving, &node("b"), holds, 7).unwrap()
    };
    assert_eq!(of("c"), None);
    assert!(of("d").is_some());
}

/// The machines of a node that was declared dead fail, under an epoch above all that it can send,
/// and only as long as it has no lease.
#[test]
fn what_is_given_up_compares_all_that_it_depends_on() {
    let give = |before: &VersionedRecord, members: &[&str]| {
        let is_member = |other: &NodeName| members.contains(&other.as_str());
        give_up(before, &node("a"), is_member, "it is dead".into(), 7).unwrap()
    };
    let removal = Txn::new()
        .when_modified_at("machine/m", 60)
        .when_absent("alive/a")
        .delete("schedule/a/m");
    for status in [
        Status::Running,
        Status::Scheduled,
        // Its source is the node itself, or no member any more.
        Status::Arriving { from: node("a") },
        Status::Arriving { from: node("c") },
    ] {
        let before = found(record("a", EPOCH, status));
        let GivenUp::Failed { record, txn } = give(&before, &["a", "b"]) else {
            panic!("it stays");
        };
        assert!(matches!(&record.status, Status::Failed { reason } if reason == "it is dead"));
        assert_eq!((&record.owner, record.epoch), (&node("a"), epoch(2)));
        let expected = removal.clone().put("machine/m", record.encode().unwrap());
        assert_eq!(txn, expected);
    }
    // The source of its move has a newer copy than any checkpoint.
    let on_its_way = found(record("a", EPOCH, Status::Arriving { from: node("c") }));
    let held = GivenUp::HeldBy(node("c"));
    assert_eq!(give(&on_its_way, &["a", "b", "c"]), held);
    // What is left of a machine that is another node's, or has ended.
    let elsewhere = found(record("b", EPOCH, Status::Running));
    assert_eq!(give(&elsewhere, &["a"]), GivenUp::NotIts(removal.clone()));
    let ended = found(record("a", EPOCH, failed()));
    assert_eq!(give(&ended, &["a"]), GivenUp::NotIts(removal));
}

/// A machine whose process was lost on a node that is well is restarted there.
#[test]
fn a_lost_process_of_a_machine_with_high_availability_is_restarted() {
    let mut now = highly_available(Status::Running).record;
    let effect = end(&mut now, &node("a"), EPOCH, &failed(), 1);
    assert_eq!(effect, EndEffect::Changed);
    assert!(matches!(
        now.status,
        Status::Restarting {
            from_checkpoint: true,
            ..
        }
    ));
    // It ended by itself.
    let mut now = highly_available(Status::Running).record;
    let exited = Status::Exited { code: 1 };
    end(&mut now, &node("a"), EPOCH, &exited, 1);
    assert_eq!(now.status, exited);
}

/// The target's node has no lease: the machine cannot run there, as long as that is so.
#[test]
fn a_machine_is_taken_back_from_a_node_without_a_lease() {
    let mut won = record("b", epoch(1), arriving());
    won.spec.ha = Some(HighAvailability::default());
    let compares = |target: Target| {
        let next = transfer().take_back(Some(&found(won.clone())), target, 7);
        match next.unwrap() {
            Settlement::Write { txn, record } => {
                assert_eq!((record.owner, record.epoch), (node("a"), epoch(2)));
                txn.compare
            }
            other => panic!("{other:?}"),
        }
    };
    let fenced = Compare::Absent {
        key: "alive/b".into(),
    };
    assert!(compares(Target::Fenced).contains(&fenced));
    assert!(!compares(Target::Without).contains(&fenced));
}

#[test]
fn a_machine_that_has_ended_is_started_again() {
    for status in [Status::Scheduled, Status::Running, arriving(), restarting()] {
        let again = start_again(&found(record("b", EPOCH, status)), true, 7);
        assert_eq!(again, Ok(None));
    }
    let cases = [failed(), Status::Stopped, Status::Exited { code: 0 }];
    for (status, elsewhere) in cases.into_iter().zip([false, true, false]) {
        let mut now = record("b", EPOCH, status);
        (now.restarts, now.stop_wanted, now.left_elsewhere) = (3, true, elsewhere);
        let again = start_again(&found(now.clone()), elsewhere, 7)
            .unwrap()
            .unwrap();
        (now.restarts, now.stop_wanted, now.epoch) = (0, false, epoch(1));
        now.enter(again.record.status.clone(), 7);
        assert_eq!(again.record, now);
        let anew = format!("at_unix_ms: 0, from_checkpoint: false, elsewhere: {elsewhere} }}");
        assert!(format!("{:?}", now.status).ends_with(&anew));
        let key = "alive/b".into();
        let mut expected = Txn::new()
            .when_modified_at("machine/m", 60)
            .when(Compare::Exists { key })
            .put("machine/m", now.encode().unwrap())
            .put("schedule/b/m", Vec::new());
        if elsewhere {
            expected = expected.delete("newest-checkpoint/m").delete("in-sync/m");
        }
        assert_eq!(again.txn, expected);
    }
}

/// One that ended by itself, and was to begin anew, does so elsewhere.
#[test]
fn a_failover_continues_no_life_that_has_ended() {
    for from_checkpoint in [true, false] {
        let restarting = Status::Restarting {
            reason: "it exited with code 0".into(),
            at_unix_ms: 1,
            from_checkpoint,
            elsewhere: false,
        };
        let given = given(&highly_available(restarting)).unwrap();
        let Status::Restarting {
            from_checkpoint: then,
            ..
        } = given.record.status
        else {
            panic!("{:?}", given.record.status);
        };
        assert_eq!(then, from_checkpoint);
    }
}

/// The first attempt to start it elsewhere failed: the next one, too, must not take what the node has
/// of an earlier time for the machine's.
#[test]
fn a_failed_start_after_a_failover_is_repeated_as_such() {
    for elsewhere in [true, false] {
        let mut now = highly_available(Status::Running).record;
        now.status = Status::Restarting {
            reason: "its node c failed".into(),
            at_unix_ms: 1,
            from_checkpoint: true,
            elsewhere,
        };
        assert_eq!(
            end(&mut now, &node("a"), EPOCH, &failed(), 1),
            EndEffect::Changed
        );
        let Status::Restarting {
            elsewhere: then, ..
        } = now.status
        else {
            panic!("{:?}", now.status);
        };
        assert_eq!(then, elsewhere);
    }
    let mut now = highly_available(Status::Running).record;
    end(&mut now, &node("a"), EPOCH, &failed(), 1);
    assert!(matches!(
        now.status,
        Status::Restarting {
            elsewhere: false,
            ..
        }
    ));
}

/// The record of a machine at node a under `EPOCH`, in a store that began anew in an incarnation.
fn entered(incarnation: u32) -> VersionedRecord {
    let mut entry = KeyValue {
        key: "machine/m".into(),
        value: record("a", EPOCH, Status::Running).encode().unwrap(),
        created: 5,
        modified: 50,
        lease: None,
    };
    enter_incarnation([&mut entry], incarnation, 1000);
    assert_eq!((entry.created, entry.modified), (5, 1000));
    VersionedRecord::read(&entry).unwrap()
}

/// The next epoch of a machine in a store that began anew.
fn first(incarnation: u32) -> Epoch {
    Epoch {
        incarnation,
        counter: 1,
    }
}

#[test]
fn machines_of_a_new_store_keep_their_epochs_until_the_next() {
    let found = entered(3);
    assert_eq!(found.record.epoch, EPOCH);
    assert_eq!(found.record.next_epoch(), first(3));
    let mut ended = found.record;
    ended.spec.restart = Restart::Always;
    for effect in [EndEffect::Changed, EndEffect::RestartsAlready] {
        assert_eq!(end(&mut ended, &node("a"), EPOCH, &failed(), 1), effect);
    }
    assert_eq!(ended.epoch, first(3));
    assert_eq!(ended.next_epoch(), first(3).next());
}

/// A record that was never changed has its epoch from its revision, which is another one then.
#[test]
fn a_new_record_of_a_former_store_keeps_its_epoch() {
    let mut entry = KeyValue {
        key: "machine/m".into(),
        value: record("a", epoch(0), Status::Scheduled).encode().unwrap(),
        created: 70,
        modified: 70,
        lease: None,
    };
    let before = VersionedRecord::read(&entry).unwrap().record.epoch;
    enter_incarnation([&mut entry], 2, 1000);
    let after = VersionedRecord::read(&entry).unwrap().record;
    assert_eq!((after.epoch, after.next_epoch()), (before, first(2)));
    // What is no record of a machine, or a damaged one, stays.
    for key in ["machine/m", "label/m"] {
        let mut other = KeyValue {
            key: key.into(),
            value: b"nonsense".to_vec(),
            ..entry.clone()
        };
        let same = other.clone();
        enter_incarnation([&mut other], 2, 2000);
        assert_eq!(other, same);
    }
}

/// An outcome that is unknown when the store begins anew, also twice, is settled as before.
#[test]
fn doubt_outlives_the_store() {
    let written = |settlement: Settlement| match settlement {
        Settlement::Write { record, .. } => *record,
        other => panic!("{other:?}"),
    };
    let now = |record: Record| Some(found(record));
    // Its commit was not applied.
    let kept = written(transfer().settle(Some(&entered(2))).unwrap());
    assert_eq!(kept.epoch, first(2));
    // The answer to that was lost, and the store begins anew once more.
    let again = Record {
        incarnation: 3,
        ..kept
    };
    assert_eq!(
        transfer().settle(now(again).as_ref()).unwrap(),
        Settlement::Kept(first(2))
    );
    // Its commit was applied, and the target does not run it.
    let mut won = record("b", transfer().committed, arriving());
    won.incarnation = 2;
    assert!(transfer().has_won(&won));
    assert_eq!(
        may_resume(&node("b"), EPOCH, Some(&won)),
        ResumeDecision::Resume(transfer().committed)
    );
    let take_back = |record: Record| {
        let found = now(record);
        let target = Target::Without;
        transfer().take_back(found.as_ref(), target, 7).unwrap()
    };
    let back = written(take_back(won));
    assert_eq!((back.epoch, back.owner.as_str()), (first(2), "a"));
    let again = Record {
        incarnation: 3,
        ..back
    };
    assert_eq!(take_back(again), Settlement::Kept(first(2)));
}

/// A move that begins in a new store arrives under the first epoch of its incarnation.
#[test]
fn a_move_enters_the_incarnation() {
    let record = entered(2).record;
    let transfer = Transfer {
        committed: record.next_epoch(),
        ..transfer()
    };
    let txn = transfer.commit(&record, 1).unwrap();
    let put = txn.then.iter().find_map(|op| match op {
        Op::Put { key, value, .. } if key == "machine/m" => Some(value.clone()),
        _ => None,
    });
    let entry = KeyValue {
        key: "machine/m".into(),
        value: put.expect("a record"),
        created: 5,
        modified: 1001,
        lease: None,
    };
    let won = VersionedRecord::read(&entry).unwrap().record;
    assert_eq!(won.epoch, first(2));
    assert!(transfer.has_won(&won));
    let verdict = may_resume(&node("b"), EPOCH, Some(&won));
    assert_eq!(verdict, ResumeDecision::Resume(first(2)));
    // Given away by a failover, it is not taken for that move.
    let mut other = entered(2);
    other.record.spec.ha = Some(HighAvailability::default());
    let given = fail_over(&other, &node("b"), |_| false, 1)
        .unwrap()
        .unwrap();
    assert!(!given.record.epoch.follows(EPOCH));
}
