//! Guest modules, and the state of their threads and connections.

use crate::Target;
use keel_wasi::network::{ConnectionId, Holder, NetworkRecord, StreamRecord};
use keel_wasi::{
    Config, ConnectionRecord, DescriptorKind, DescriptorRecord, Resources, Snapshot, Wasi,
};
use keel_wasm::instrument::meta::{self, Meta};
use keel_wasm::instrument::{instrument, read_meta};
use keel_wasm::runtime::frame::{MAGIC, ThreadState};
use std::collections::BTreeMap;
use std::sync::LazyLock;
use wasm_encoder::{CustomSection, Module};

/// Modules with what instrumentation has to deal with.
const SAMPLES: [&str; 3] = [
    "(module)",
    r#"(module (memory 1) (func (export "_start") (local i32)
        (loop (br_if 0 (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1)))
            (i32.const 9))))))"#,
    r#"(module (type $t (func (param i64) (result f64)))
        (import "wasi_snapshot_preview1" "sched_yield" (func $y (result i32)))
        (table 2 funcref) (elem (i32.const 0) $f) (global $g (mut i32) (i32.const 3))
        (func $f (type $t) (drop (call $y)) (f64.const 1))
        (func (export "_start") (drop (call_indirect (type $t) (i64.const 1) (i32.const 0)))))"#,
];

fn samples() -> Vec<Vec<u8>> {
    SAMPLES
        .iter()
        .filter_map(|it| wat::parse_str(it).ok())
        .collect()
}

/// A user's module. What is accepted has metadata that is accepted.
pub(crate) const MODULE: Target = Target {
    name: "module",
    run: |data| {
        let Ok(instrumented) = instrument(data) else {
            return false;
        };
        assert!(
            read_meta(&instrumented).is_ok(),
            "its own metadata is refused"
        );
        true
    },
    seeds: samples,
};

/// The metadata of an instrumented module, which comes from another node.
pub(crate) const METADATA: Target = Target {
    name: "metadata",
    run: |data| {
        let mut module = Module::new();
        module.section(&CustomSection {
            name: meta::SECTION.into(),
            data: data.into(),
        });
        read_meta(&module.finish()).is_ok()
    },
    seeds: || {
        let instrumented = samples().into_iter().filter_map(|it| instrument(&it).ok());
        instrumented.filter_map(|it| own_section(&it)).collect()
    },
};

/// The content of the custom section with the metadata.
fn own_section(module: &[u8]) -> Option<Vec<u8>> {
    let payloads = wasmparser::Parser::new(0).parse_all(module);
    payloads.flatten().find_map(|payload| match payload {
        wasmparser::Payload::CustomSection(section) if section.name() == meta::SECTION => {
            Some(section.data().to_vec())
        }
        _ => None,
    })
}

static META: LazyLock<Option<Meta>> = LazyLock::new(|| {
    let module = samples().pop()?;
    read_meta(&instrument(&module).ok()?).ok()
});

/// The frames of a thread of a module, which come from another node.
pub(crate) const THREAD: Target = Target {
    name: "thread",
    run: |data| {
        let Some(meta) = &*META else {
            return false;
        };
        let module = [7; 32];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(meta::VERSION.to_le_bytes());
        bytes.extend(module);
        bytes.extend(data);
        ThreadState::decode(&bytes, &module, meta).is_ok()
    },
    seeds: Vec::new,
};

/// A machine with a listener, and two descriptors of connections.
static SNAPSHOT: LazyLock<Option<Snapshot>> = LazyLock::new(|| {
    let config = Config {
        listeners: 1,
        ..Config::default()
    };
    let mut snapshot = Wasi::new(config).ok()?.snapshot().ok()?;
    snapshot
        .descriptors
        .extend([4, 5].map(|fd| DescriptorRecord {
            fd,
            dropped_base: 0,
            dropped_inheriting: 0,
            kind: DescriptorKind::Connection(ConnectionRecord {
                local: None,
                peer: None,
                nonblocking: false,
                shut: 0,
                received: Vec::new(),
            }),
        }));
    Some(snapshot)
});

/// The connections of a machine, which come from another node. What is accepted travels on as it
/// came.
pub(crate) const NETWORK: Target = Target {
    name: "network",
    run: |data| {
        let Ok((network, [])) = postcard::take_from_bytes::<NetworkRecord>(data) else {
            return false;
        };
        let Some(mut snapshot) = SNAPSHOT.clone() else {
            return false;
        };
        snapshot.network = network.clone();
        let Ok(wasi) = Wasi::restore(snapshot, Resources::default()) else {
            return false;
        };
        let again = wasi.snapshot().map(|snapshot| snapshot.network);
        assert_eq!(
            again.as_ref().map(open_ones).ok(),
            Some(open_ones(&network))
        );
        true
    },
    seeds: network_samples,
};

/// What its guest has not closed: of other connections only the last bytes travel on.
fn open_ones(network: &NetworkRecord) -> BTreeMap<ConnectionId, (Holder, StreamRecord)> {
    let connections = network.connections.iter().cloned();
    let open = connections.filter(|(holder, _)| *holder != Holder::Closed);
    open.map(|(holder, stream)| (stream.id, (holder, stream)))
        .collect()
}

/// A connection that waits, one that is open, and one that was closed, with bytes both ways.
fn network_samples() -> Vec<Vec<u8>> {
    let Some(wasi) = SNAPSHOT
        .clone()
        .and_then(|snapshot| Wasi::restore(snapshot, Resources::default()).ok())
    else {
        return Vec::new();
    };
    let address = ([127, 0, 0, 1], 80).into();
    for number in 0..3 {
        let id = ConnectionId { carrier: 1, number };
        if let Ok(connection) = wasi.network().offer(id, 0, address, address) {
            // The first bytes of a connection always have room.
            let _ = connection.deliver(0, b"question");
        }
    }
    let Ok(mut snapshot) = wasi.snapshot() else {
        return Vec::new();
    };
    let holders = [Holder::Listener, Holder::Descriptor(4), Holder::Closed];
    for ((holder, stream), new) in snapshot.network.connections.iter_mut().zip(holders) {
        *holder = new;
        stream.outgoing.extend(b"answer");
    }
    postcard::to_allocvec(&snapshot.network)
        .into_iter()
        .collect()
}
