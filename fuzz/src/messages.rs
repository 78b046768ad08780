//! What connections bring.

use crate::formats::{cbor, with};
use crate::{Target, choice};
use bytes::{Bytes, BytesMut};
use keel_api::{
    AuthorityChange, CheckpointRequest, DrainRequest, LabelRequest, MoveRequest, PlanGoal,
    PlanRequest, PolicyRequest, PruneRequest, QuotaRequest, RenameRequest, RestoreRequest,
    RunRequest, SetRequest, SpanRequest, ThreadMove, TokenRequest, VolumeCreateRequest,
    VotersRequest,
};
use keel_balance::policy::Policy;
use keel_balance::round::{Request, Response};
use keel_balance::rules::Rule;
use keel_cluster::NodeName;
use keel_cluster::gossip::datagram::{Opener, Sealer};
use keel_cluster::gossip::keys::{GossipKeys, SecretKey};
use keel_cluster::gossip::{Event, Gossip, Load, Start};
use keel_kind_wasm::control as wasm;
use keel_machine::link::Message;
use keel_machine::worker::control::{self, unpack};
use keel_net::frame::{Class, Decoder};
use keel_wasm::runtime::parts::{Order, Report};
use std::collections::BTreeSet;
use std::time::Duration;

/// Frames of both classes, in two pieces.
pub(crate) const FRAME: Target = Target {
    name: "frame",
    run: |data| {
        let Some((cut, data)) = data.split_first() else {
            return false;
        };
        let (first, second) = data.split_at(data.len() * usize::from(*cut) / 256);
        let mut is_accepted = false;
        for class in [Class::CONTROL, Class::BULK] {
            let decoder = Decoder::new(class);
            let mut buffer = BytesMut::new();
            for piece in [first, second] {
                buffer.extend_from_slice(piece);
                while let Ok(Some(_)) = decoder.decode(&mut buffer) {
                    is_accepted = true;
                }
            }
        }
        is_accepted
    },
    seeds: || {
        let frame = |magic: &[u8; 4]| {
            let mut bytes = vec![100];
            bytes.extend(magic);
            bytes.extend(1_u16.to_le_bytes());
            bytes.extend(7_u16.to_le_bytes());
            bytes.extend(9_u64.to_le_bytes());
            bytes.extend(3_u32.to_le_bytes());
            bytes.extend(b"abc");
            bytes
        };
        vec![frame(b"KEEL"), frame(b"KBLK")]
    },
};

/// Messages between the two workers of a move.
pub(crate) const MOVE: Target = Target {
    name: "move",
    run: |data| {
        let Some((kind, payload)) = choice(data, 32) else {
            return false;
        };
        Message::decode(u16::from(kind), payload).is_ok()
    },
    seeds: || {
        // Kinds without content, and one with an offset and bytes.
        vec![vec![5], with(4, vec![0; 20])]
    },
};

/// Requests and answers between agents and workers, and between balancers.
pub(crate) const RPC: Target = Target {
    name: "rpc",
    run: |data| {
        let Some((which, payload)) = choice(data, 27) else {
            return false;
        };
        let bytes = Bytes::copy_from_slice(payload);
        match which {
            0 => unpack::<control::Start>(&bytes).is_ok(),
            1 => unpack::<control::StartFrom>(&bytes).is_ok(),
            2 => unpack::<control::Checkpoint>(&bytes).is_ok(),
            3 => unpack::<control::CheckpointReport>(&bytes).is_ok(),
            4 => unpack::<control::Receive>(&bytes).is_ok(),
            5 => unpack::<control::MoveEndpoint>(&bytes).is_ok(),
            6 => unpack::<control::Copy>(&bytes).is_ok(),
            7 => unpack::<control::CopyEvent>(&bytes).is_ok(),
            8 => unpack::<control::Frozen>(&bytes).is_ok(),
            9 => unpack::<control::Report>(&bytes).is_ok(),
            10 => unpack::<control::VolumeReport>(&bytes).is_ok(),
            11 => unpack::<control::FileRequest>(&bytes).is_ok(),
            12 => unpack::<control::FileDone>(&bytes).is_ok(),
            13 => unpack::<control::ReadLog>(&bytes).is_ok(),
            14 => unpack::<control::LogChunk>(&bytes).is_ok(),
            15 => unpack::<Request>(&bytes).is_ok(),
            16 => unpack::<Response>(&bytes).is_ok(),
            17 => unpack::<wasm::CopyHome>(&bytes).is_ok(),
            18 => unpack::<wasm::HomeHandover>(&bytes).is_ok(),
            19 => unpack::<wasm::ConnectParts>(&bytes).is_ok(),
            20 => unpack::<wasm::PrepareMember>(&bytes).is_ok(),
            21 => unpack::<wasm::Join>(&bytes).is_ok(),
            22 => unpack::<wasm::AddPart>(&bytes).is_ok(),
            23 => unpack::<wasm::Span>(&bytes).is_ok(),
            24 => unpack::<wasm::MoveThread>(&bytes).is_ok(),
            25 => unpack::<wasm::MoveObject>(&bytes).is_ok(),
            _ => unpack::<wasm::PartsReport>(&bytes).is_ok(),
        }
    },
    seeds: || vec![cbor(15, &Request::View), cbor(16, &Response::NotReady)],
};

/// Orders and reports between the parts of a machine.
pub(crate) const PARTS: Target = Target {
    name: "parts",
    run: |data| Order::decode(data).is_ok() | Report::decode(data).is_ok(),
    seeds: || vec![Order::Leave { tid: 7 }.encode()],
};

fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> bool {
    serde_json::from_slice::<T>(body).is_ok()
}

/// Bodies of requests by HTTP, and the policy, which is one.
pub(crate) const API: Target = Target {
    name: "api",
    run: |data| {
        let Some((which, body)) = choice(data, 21) else {
            return false;
        };
        match which {
            0 => json::<RunRequest>(body),
            1 => json::<SetRequest>(body),
            2 => json::<MoveRequest>(body),
            3 => json::<CheckpointRequest>(body),
            4 => json::<RestoreRequest>(body),
            5 => json::<PlanRequest>(body),
            6 => serde_json::from_slice::<Policy>(body).is_ok_and(|it| it.check().is_ok()),
            7 => json::<PolicyRequest>(body),
            8 => json::<PlanGoal>(body),
            9 => json::<DrainRequest>(body),
            10 => serde_json::from_slice::<Rule>(body).is_ok_and(|it| it.check().is_ok()),
            11 => json::<LabelRequest>(body),
            12 => json::<VotersRequest>(body),
            13 => json::<AuthorityChange>(body),
            14 => json::<TokenRequest>(body),
            15 => json::<RenameRequest>(body),
            16 => json::<SpanRequest>(body),
            17 => json::<ThreadMove>(body),
            18 => json::<PruneRequest>(body),
            19 => json::<QuotaRequest>(body),
            _ => json::<VolumeCreateRequest>(body),
        }
    },
    seeds: || {
        let policy = serde_json::to_vec(&Policy::default()).unwrap_or_default();
        let labels = br#"{"node":true,"name":"a","labels":{"zone":"b"}}"#;
        vec![with(6, policy), with(11, labels.to_vec())]
    },
};

fn name(text: &str) -> Option<NodeName> {
    text.parse().ok()
}

const START: Start = Start {
    incarnation: 1,
    revision: 9,
};

fn keys() -> GossipKeys {
    GossipKeys {
        sealing: 7,
        keys: vec![SecretKey {
            id: 7,
            secret: [7; 32],
            created_unix_ms: 0,
        }],
    }
}

/// Datagrams of anyone, twice each: none is taken twice.
pub(crate) const GOSSIP_DATAGRAM: Target = Target {
    name: "gossip-datagram",
    run: |data| {
        let mut opener = Opener::default();
        opener.set_keys(&keys());
        let first = opener.open(&mut data.to_vec(), |_| true).is_ok();
        let second = opener.open(&mut data.to_vec(), |_| true).is_ok();
        assert!(!second, "it was taken before");
        first
    },
    seeds: || {
        let Some(node) = name("a") else {
            return Vec::new();
        };
        let mut sealer = Sealer::new(node, START);
        sealer.set_keys(&keys());
        sealer.seal(b"content").into_iter().collect()
    },
};

/// What members' datagrams hold, one after the other, each after its length.
pub(crate) const GOSSIP: Target = Target {
    name: "gossip",
    run: |data| {
        let Some(node) = name("a") else {
            return false;
        };
        let mut gossip = Gossip::new(node, START, 1);
        let members: BTreeSet<NodeName> = ["a", "b", "c"].into_iter().filter_map(name).collect();
        let mut now = Duration::ZERO;
        gossip.step(Event::Members(members), now);
        let mut rest = data;
        while let Some((length, after)) = rest.split_first() {
            let length = usize::from(*length).min(after.len());
            let (content, after) = after.split_at(length);
            rest = after;
            now += Duration::from_millis(700);
            gossip.step(Event::Received(content), now);
            gossip.step(Event::Tick, now);
            gossip.step(
                Event::Measured(Load {
                    load: content.len() as f32,
                    memory_free_bytes: 1,
                    is_pressed: false,
                }),
                now,
            );
        }
        gossip.step(Event::Tick, now + Duration::from_secs(60));
        !gossip.liveness().is_empty()
    },
    seeds: || {
        let Some((other, own)) = name("b").zip(name("a")) else {
            return Vec::new();
        };
        // What the other one says at first.
        let mut gossip = Gossip::new(other, START, 2);
        let sent = gossip.step(Event::Members(BTreeSet::from([own])), Duration::ZERO);
        let first = sent.into_iter().next().map(|it| it.content);
        let first = first.and_then(|it| Some(with(u8::try_from(it.len()).ok()?, it)));
        first.into_iter().collect()
    },
};
