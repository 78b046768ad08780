//! Decoders of what other nodes send, and of the records in the store, for fuzzing. A command of a
//! user that another node carries out comes with its answer.

use crate::balancer::{HistoryRange, LedgerFilter};
use crate::checkpoints::{CreateCheckpoint, Discard, FetchCheckpoint, Object};
use crate::cluster_events::Question;
use crate::compilation::CodeState;
use crate::error::CommandError;
use crate::logs::LogOffset;
use crate::machines::{
    ProcessQuery, RemoveMachine, ReportQuery, Sees, SetMachine, StartProcess, StopMachine, TypeIn,
};
use crate::moves::{CancelMove, DryRunCommand, MoveOrder, Offer};
use crate::records::{AuditRecord, InSyncSet, MachineCommand, NodeRecord, Reservation};
use crate::spanning::{
    MoveObjectCommand, MoveThreadCommand, ObjectsQuery, PartsQuery, SpanCommand, UnspanCommand,
};
use crate::volumes::FileCommand;
use crate::voters;
use keel_api::Event;
use keel_cluster::{Epoch, MachineName};
use keel_kind_wasm::control::ConnectNewPart;
use keel_machine::kind::KindName;
use keel_machine::spec::{Record, Spec};
use keel_machine::worker::control::LeaseDeadline;
use keel_net::Fingerprint;
use keel_store::decoders::Decoder;

fn command<C: MachineCommand>() -> [Decoder; 2] {
    [
        Decoder::of::<C>(),
        Decoder::of::<Result<C::Answer, CommandError>>(),
    ]
}

/// All of them.
pub(crate) fn decoders() -> Vec<Decoder> {
    let commands = [
        command::<StopMachine>(),
        command::<RemoveMachine>(),
        command::<SetMachine>(),
        command::<ReportQuery>(),
        command::<StartProcess>(),
        command::<ProcessQuery>(),
        command::<TypeIn>(),
        command::<CancelMove>(),
        command::<DryRunCommand>(),
        command::<CreateCheckpoint>(),
        command::<FileCommand>(),
        command::<LogOffset>(),
        command::<SpanCommand>(),
        command::<UnspanCommand>(),
        command::<PartsQuery>(),
        command::<ObjectsQuery>(),
        command::<MoveObjectCommand>(),
        command::<MoveThreadCommand>(),
    ];
    let mut all: Vec<Decoder> = commands.into_iter().flatten().collect();
    all.extend([
        Decoder::of::<Offer>(),
        Decoder::of::<MoveOrder>(),
        Decoder::of::<ConnectNewPart>(),
        Decoder::of::<FetchCheckpoint>(),
        Decoder::of::<Discard>(),
        Decoder::of::<Question>(),
        Decoder::of::<LedgerFilter>(),
        Decoder::of::<HistoryRange>(),
        Decoder::of::<CodeState>(),
        Decoder::of::<LeaseDeadline>(),
        Decoder::of::<(bool, String)>(),
        Decoder::of::<(MachineName, Epoch)>(),
        Decoder::of::<(KindName, Fingerprint)>(),
        Decoder::of::<(MachineName, u64, bool)>(),
        Decoder::of::<(MachineName, String, u64)>(),
        Decoder::of::<(MachineName, Object)>(),
        Decoder::of::<(MachineName, Vec<String>)>(),
        Decoder::of::<MachineName>(),
        Decoder::of::<Record>(),
        Decoder::of::<Spec>(),
        Decoder::of::<NodeRecord>(),
        Decoder::of::<Reservation>(),
        Decoder::of::<InSyncSet>(),
        Decoder::of::<Sees>(),
        Decoder::of::<AuditRecord>(),
        Decoder {
            name: "settings of a node".into(),
            decode: |bytes| serde_json::from_slice::<crate::context::Settings>(bytes).is_ok(),
        },
        Decoder {
            name: "an event".into(),
            decode: |bytes| serde_json::from_slice::<Event>(bytes).is_ok(),
        },
        Decoder {
            name: "members".into(),
            decode: |bytes| {
                serde_json::from_slice::<Vec<keel_cluster::members::Member>>(bytes).is_ok()
            },
        },
    ]);
    all.extend(voters::decoders());
    all
}
