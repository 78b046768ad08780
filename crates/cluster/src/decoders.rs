//! Decoders of what nodes send each other about membership, and of its records, for fuzzing. The
//! request to join is the only one of a peer that nobody knows.

use keel_store::decoders::Decoder;

use crate::certificates::{Authorities, RenewRequest, RenewResponse, Report};
use crate::failover::Headroom;
use crate::gossip::keys::GossipKeys;
use crate::join::{JoinRequest, JoinResponse};
use crate::members::{self, VoterList};
use crate::tokens;
use crate::voters::VoterCount;

/// All of this crate.
pub fn decoders() -> Vec<Decoder> {
    let mut all = vec![
        Decoder::of::<JoinRequest>(),
        Decoder::of::<JoinResponse>(),
        Decoder::of::<RenewRequest>(),
        Decoder::of::<RenewResponse>(),
        Decoder::of::<Authorities>(),
        Decoder::of::<Report>(),
        Decoder::of::<GossipKeys>(),
        Decoder::of::<VoterList>(),
        Decoder::of::<VoterCount>(),
        Decoder::of::<Headroom>(),
    ];
    all.extend(members::decoders());
    all.extend(tokens::decoders());
    all
}
