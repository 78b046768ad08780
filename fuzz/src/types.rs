//! What is decoded as a whole into one type: messages between nodes, records, and files of users.
//! Each crate lists its own, and the fuzzer begins with the frozen messages of their names.

use crate::formats::with;
use crate::{Target, choice};
use keel_store::decoders::Decoder;
use keel_store::frozen_messages;
use std::sync::LazyLock;

const FROZEN: &str = include_str!("../../crates/keel/tests/cli/frozen_messages.txt");

static STORE: LazyLock<Vec<Decoder>> = LazyLock::new(keel_store::decoders::decoders);
static CLUSTER: LazyLock<Vec<Decoder>> = LazyLock::new(keel_cluster::decoders::decoders);
static NODE: LazyLock<Vec<Decoder>> = LazyLock::new(keel_node::decoders);
static FILES: LazyLock<Vec<Decoder>> = LazyLock::new(keel::decoders::decoders);

/// Tries bytes by the decoder that the first one chooses.
fn run(decoders: &[Decoder], data: &[u8]) -> bool {
    let count = u8::try_from(decoders.len()).unwrap_or(u8::MAX);
    choice(data, count).is_some_and(|(which, bytes)| (decoders[usize::from(which)].decode)(bytes))
}

/// The frozen messages of a type.
pub(crate) fn frozen_of(name: &str) -> Vec<Vec<u8>> {
    let all = frozen_messages::parse(FROZEN).unwrap_or_default();
    all.get(name).cloned().unwrap_or_default()
}

fn frozen(decoders: &[Decoder]) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (which, decoder) in (0..).zip(decoders) {
        let messages = frozen_of(&decoder.name).into_iter();
        seeds.extend(messages.map(|message| with(which, message)));
    }
    // Some are of another type of that name.
    seeds.retain(|seed| run(decoders, seed));
    seeds
}

/// Of the store: requests, answers, what voters send each other, their files; an etcd's answers.
pub(crate) const STORE_TYPES: Target = Target {
    name: "store",
    run: |data| run(&STORE, data),
    seeds: || frozen(&STORE),
};

/// Of the cluster: requests to join, certificates, records.
pub(crate) const CLUSTER_TYPES: Target = Target {
    name: "cluster",
    run: |data| run(&CLUSTER, data),
    seeds: || frozen(&CLUSTER),
};

/// Of nodes: requests of other nodes, and their answers.
pub(crate) const NODE_TYPES: Target = Target {
    name: "node",
    run: |data| run(&NODE, data),
    seeds: || frozen(&NODE),
};

/// Files of users, and what they write on the command line.
pub(crate) const USER_FILES: Target = Target {
    name: "files",
    run: |data| run(&FILES, data),
    seeds: || {
        let texts = [
            "[machine.a]\nmodule = \"a.wasm\"\nha = { priority = 5 }\n",
            "[[rule]]\nname = \"apart\"\nkind = \"apart\"\nmachines = [\"a\", \"b\"]\n",
            "current = \"a\"\n",
            "[cluster]\nnodes = 3\n",
            "{}",
            "checkpoint=2s,priority=9",
            "10s",
            "64M",
            "<domain><name>a</name><vcpu>2</vcpu><devices><disk type='file'><source file='/a'/></disk></devices></domain>",
        ];
        let seeds = (0..)
            .zip(texts)
            .map(|(which, text)| with(which, text.into()));
        seeds.filter(|seed| run(&FILES, seed)).collect()
    },
};

/// The connection's own frames: greetings, errors, credits.
pub(crate) const RPC_FRAMES: Target = Target {
    name: "rpc-frames",
    run: keel_net::rpc::is_own_payload,
    seeds: || vec![vec![1, 2, b'o', b'k'], vec![7]],
};

/// The bytes of a connection between the parts of a machine.
pub(crate) const PART_CONNECTION: Target = Target {
    name: "part-connection",
    run: keel_kind_wasm::span::is_connection,
    seeds: || {
        let frame = |kind: u16, payload: &[u8]| {
            let mut bytes = b"KSPN".to_vec();
            bytes.extend(1_u16.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(0_u64.to_le_bytes());
            bytes.extend((payload.len() as u32).to_le_bytes());
            bytes.extend(payload);
            bytes
        };
        // The time, a part that is gone, and that a home has a successor.
        vec![frame(9, &[7; 8]), frame(12, &[1]), frame(13, &[])]
    },
};

/// What QEMU and guest agents say to a worker, specs of its machines, images of their disks, and what
/// checkpoints have of them.
pub(crate) const QEMU: Target = Target {
    name: "qemu",
    run: |data| match choice(data, 5) {
        Some((0, bytes)) => keel_kind_qemu::is_from_qemu(bytes),
        Some((1, bytes)) => keel_kind_qemu::is_spec(bytes),
        Some((2, bytes)) => keel_kind_qemu::is_from_guest_agent(bytes),
        Some((3, bytes)) => keel_kind_qemu::ImageHeader::read(bytes).is_ok(),
        Some((_, bytes)) => keel_kind_qemu::is_from_checkpoint(bytes),
        None => false,
    },
    seeds: || {
        let said = concat!(
            r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#,
            "\r\n",
            r#"{"return": {}, "id": 0}"#,
            "\r\n",
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
            "\r\n",
            r#"{"return": {"status": "active", "ram": {"transferred": 7, "remaining": 9, "dirty-sync-count": 1}}, "id": 1}"#,
            "\r\n",
            r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 2}"#,
            "\r\n",
        );
        let spec = r#"{"cpus": 2, "kernel": {"image": "aa", "append": "b"}, "root": {"image": "cc", "format": "qcow2", "bytes": 1024}, "disks": [{"path": "/a", "format": "raw"}], "interfaces": [{"bridge": "b", "mac": "02:00:00:00:00:01"}], "shutdown_s": 9}"#;
        let agent = br#"{"return": {"exited": true, "exitcode": 0, "out-data": "b2s=", "err-truncated": true}}"#;
        let agent = [b"{\"return\": 5}\n\xff", &agent[..]].concat();
        // Version 3 of qcow2, a disk of 4 GiB.
        let mut image = vec![0; keel_kind_qemu::SIGNATURE_BYTES];
        image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        image[27] = 1;
        vec![
            with(0, said.into()),
            with(
                0,
                br#"{"stats": {"stat-available-memory": 5, "stat-free-memory": 3}, "last-update": 7}"#
                    .to_vec(),
            ),
            with(1, spec.into()),
            with(2, agent),
            with(3, image),
            with(4, memory_stream()),
        ]
    },
};

/// What a node sends to Evenkeel's agent in a guest.
pub(crate) const GUEST_AGENT: Target = Target {
    name: "guest-agent",
    run: keel_guest::is_request,
    seeds: || {
        let start = r#"{"execute": "guest-exec", "arguments": {"path": "cat", "arg": ["-n"], "env": ["A=b"], "input-data": "b2s=", "capture-output": true}}"#;
        let sync = "\n{\"execute\": \"guest-sync-delimited\", \"arguments\": {\"id\": 7}}\n";
        let shutdown = r#"{"execute": "guest-shutdown", "arguments": {"mode": "halt"}, "id": [1]}"#;
        vec![
            [b"{\"half\xff", start.as_bytes(), sync.as_bytes()].concat(),
            format!("{shutdown}\n").into_bytes(),
        ]
    },
};

/// QEMU's copy of two pages of memory, one of which is zero.
fn memory_stream() -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x01q".to_vec();
    // A section of the memory: its number, name, instance and version, and its block.
    bytes.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    bytes.extend(0x2004_u64.to_be_bytes());
    bytes.extend(b"\x01m");
    bytes.extend(0x2000_u64.to_be_bytes());
    bytes.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    // A section of pages.
    bytes.extend(b"\x02\0\0\0\x02");
    bytes.extend(0x1008_u64.to_be_bytes());
    bytes.extend(b"\x01m");
    bytes.extend([7; 4096]);
    bytes.extend(0x22_u64.to_be_bytes());
    bytes.extend(b"\0");
    bytes.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    bytes.extend(b"\x04devices");
    bytes
}
