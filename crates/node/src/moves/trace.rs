//! What the trace of a move says: its steps at the source by name, why a step failed, and the
//! figures of its report as attributes. [`crate::traces`] makes the spans.

use crate::traces::Span;
use keel_machine::moves::{Ending, MoveReport, SourceCommand, SourceEvent};

/// The name of a step.
pub(super) fn step_name(command: &SourceCommand) -> &'static str {
    match command {
        SourceCommand::StartCopy => "copy",
        SourceCommand::AskStore => "ask store",
        SourceCommand::FreezeAndSend => "freeze and send",
        SourceCommand::Commit { .. } => "commit",
        SourceCommand::SettleByWrite => "settle",
        SourceCommand::TellTarget { .. } => "resume",
        SourceCommand::TakeBack => "take back",
        SourceCommand::Thaw { .. } => "thaw",
        SourceCommand::AbortTarget { .. } => "abort",
        SourceCommand::Serve => "send rest",
        SourceCommand::Forget | SourceCommand::End => "drop copy",
    }
}

/// Marks a step as failed, if it did.
pub(super) fn mark(step: &Span, event: &SourceEvent) {
    match event {
        SourceEvent::Refused(reason)
        | SourceEvent::Cancel(reason)
        | SourceEvent::PeerLost(reason)
        | SourceEvent::StoreUnavailable(reason)
        | SourceEvent::FreezeLate(reason)
        | SourceEvent::CommitRefused(reason)
        | SourceEvent::Superseded { reason, .. } => step.fail(reason.as_str()),
        SourceEvent::CommitUnknown | SourceEvent::OwnWriteUnknown => {
            step.fail("the store's answer was lost");
        }
        SourceEvent::TargetNotRunning => step.fail("the machine does not run at the target"),
        SourceEvent::MachineEnded => step.fail("the machine ended"),
        SourceEvent::Accepted
        | SourceEvent::Converged
        | SourceEvent::StoreAnswered
        | SourceEvent::Prepared
        | SourceEvent::CommitWon
        | SourceEvent::OwnWriteWon { .. }
        | SourceEvent::TargetResumed
        | SourceEvent::Served => {}
    }
}

/// Adds what the report of a move says to its trace. Times are in microseconds.
pub(super) fn describe(trace: &Span, report: &MoveReport) {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    trace.set("keel.machine", report.machine.to_string());
    trace.set("keel.source", report.source.to_string());
    trace.set("keel.target", report.target.to_string());
    trace.set("keel.epoch", report.epoch.to_string());
    trace.set("keel.sent_bytes", number(report.bytes));
    trace.set("keel.rounds", number(report.rounds.len() as u64));
    for (name, micros) in [
        ("keel.downtime_us", report.downtime_micros),
        ("keel.freeze_us", report.freeze_micros),
        ("keel.last_pages_us", report.last_pages_micros),
        ("keel.state_us", report.state_micros),
        ("keel.commit_us", report.commit_micros),
        ("keel.resume_us", report.resume_micros),
    ] {
        trace.set(name, number(micros));
    }
    if let Ending::Stayed { reason } = &report.ending {
        trace.fail(reason.as_str());
    }
}
