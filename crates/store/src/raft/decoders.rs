//! Decoders of what voters send each other and have in their files, for fuzzing.

use openraft::error::{InstallSnapshotError, RaftError};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};

use super::snapshot;
use super::types::{Command, LogId, SnapshotMeta, Types, Vote};
use crate::decoder::Decoder;

type Answer<T, E = RaftError<u64>> = Result<T, E>;

pub(crate) fn decoders() -> Vec<Decoder> {
    vec![
        Decoder::of::<(u64, AppendEntriesRequest<Types>)>(),
        Decoder::of::<(u64, VoteRequest<u64>)>(),
        Decoder::of::<(u64, InstallSnapshotRequest<Types>)>(),
        Decoder::of::<(u64, Option<LogId>)>(),
        Decoder::of::<Answer<AppendEntriesResponse<u64>>>(),
        Decoder::of::<Answer<VoteResponse<u64>>>(),
        Decoder::of::<Answer<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>>>(),
        Decoder::of::<openraft::Entry<Types>>(),
        Decoder::of::<Vec<Command>>(),
        Decoder::of::<Vote>(),
        Decoder::of::<LogId>(),
        Decoder::of::<SnapshotMeta>(),
        Decoder {
            name: "snapshot".into(),
            decode: |bytes| snapshot::decode(bytes, 1 << 30).is_ok(),
        },
    ]
}
