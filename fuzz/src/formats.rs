//! What files and the store have.

use crate::types::frozen_of;
use crate::{Target, choice};
use keel_cluster::Epoch;
use keel_cluster::gossip::keys::{self, GossipKeys};
use keel_cluster::tokens::{JoinToken, UserToken};
use keel_cluster::{certificates, members};
use keel_machine::log::split_records;
use keel_machine::moves::ownership::VersionedRecord;
use keel_machine::spec::Spec;
use keel_machine::{checkpoint, cluster_volume};
use keel_net::Fingerprint;
use keel_store::keys::Key;
use keel_store::{Backup, KeyValue, encoding};
use serde::Serialize;

/// An envelope of the format of checkpoints and volumes: magic, version, length, body, hash.
fn sealed(magic: &[u8; 4], version: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    bytes
}

pub(crate) const MANIFEST: Target = Target {
    name: "manifest",
    run: |data| match checkpoint::Manifest::decode(&sealed(b"KCKP", 2, data)) {
        Ok(_) => true,
        Err(checkpoint::FormatError::Version(version)) => panic!("it is {version} now"),
        Err(_) => checkpoint::Manifest::decode(data).is_ok() || checkpoint::is_image_index(data),
    },
    seeds: || {
        let specs = frozen_of("spec::Spec").into_iter();
        let specs = specs.filter_map(|spec| encoding::from_cbor(&spec).ok());
        let index = br#"{"bytes":9000000,"pieces":[0,2]}"#.to_vec();
        specs.filter_map(manifest).chain([index]).collect()
    },
};

/// The body of a manifest.
fn manifest(spec: Spec) -> Option<Vec<u8>> {
    let manifest = checkpoint::Manifest {
        id: checkpoint::CheckpointId::new(1),
        machine: "m".parse().ok()?,
        parent: None,
        generation: 0,
        epoch: Epoch::default(),
        created_unix_ms: 1,
        spec,
        program: Some([7; 32]),
        log_end: 9,
        memory_pages: vec![2],
        runs: Vec::new(),
        packs: Vec::new(),
        block_runs: Vec::new(),
        block_packs: Vec::new(),
        image: vec![1, 2, 3],
    };
    let bytes = manifest.encode().ok()?;
    Some(bytes.get(16..bytes.len().checked_sub(32)?)?.to_vec())
}

pub(crate) const SEGMENT: Target = Target {
    name: "segment",
    run: |data| match cluster_volume::Segment::decode(&sealed(b"KVOL", 1, data)) {
        Ok(_) => true,
        Err(cluster_volume::FormatError::Version(version)) => panic!("it is {version} now"),
        Err(_) => cluster_volume::Segment::decode(data).is_ok(),
    },
    seeds: Vec::new,
};

/// The body of a backup, without its header.
pub(crate) const BACKUP: Target = Target {
    name: "backup",
    run: |data| {
        let hash = blake3::hash(data);
        let bytes = [b"keelbak1".as_slice(), hash.as_bytes(), data].concat();
        Backup::decode(&bytes).is_ok() || Backup::decode(data).is_ok()
    },
    seeds: || {
        let backup = Backup {
            cluster: "c".into(),
            revision: 7,
            created_unix_ms: 1,
            entries: vec![entry("member/a", b"value")],
        };
        let bytes = backup.encode().unwrap_or_default();
        vec![bytes.get(40..).unwrap_or_default().to_vec()]
    },
};

fn entry(key: &str, value: &[u8]) -> KeyValue {
    KeyValue {
        key: key.into(),
        value: value.to_vec(),
        created: 1,
        modified: 2,
        lease: None,
    }
}

/// Values of the store.
pub(crate) const RECORDS: Target = Target {
    name: "records",
    run: |data| {
        let Some((which, value)) = choice(data, 4) else {
            return false;
        };
        match which {
            0 => VersionedRecord::read(&entry("machine/m", value)).is_ok(),
            1 => members::read_voters(value).is_ok(),
            2 => certificates::decode(&entry("authorities", value)).is_ok(),
            _ => keys::decode(value).is_ok(),
        }
    },
    seeds: || {
        let keys = encoding::encode("keys", &GossipKeys::first(7)).unwrap_or_default();
        let voters = encoding::encode("voters", &members::VoterList::default());
        vec![with(3, keys), with(1, voters.unwrap_or_default())]
    },
};

/// A value with the byte that chooses its type.
pub(crate) fn with(which: u8, mut value: Vec<u8>) -> Vec<u8> {
    value.insert(0, which);
    value
}

/// A value as CBOR, with the byte that chooses its type.
pub(crate) fn cbor(which: u8, value: &impl Serialize) -> Vec<u8> {
    with(
        which,
        encoding::to_cbor(value, Vec::new()).unwrap_or_default(),
    )
}

pub(crate) const KEY: Target = Target {
    name: "key",
    run: |data| {
        let Ok(text) = std::str::from_utf8(data) else {
            return false;
        };
        let key: Result<Key, _> = text.parse();
        if let Ok(key) = &key {
            assert_eq!(key.to_string(), text, "keys have one form");
        }
        key.is_ok()
    },
    seeds: || {
        let keys = [
            "cluster",
            "member/a",
            "schedule/a/m",
            "audit/0000019a00000000-00000000000000ff",
            "token/00000000000000ff",
        ];
        keys.map(|key| key.as_bytes().to_vec()).to_vec()
    },
};

pub(crate) const TOKENS: Target = Target {
    name: "tokens",
    run: |data| {
        let Ok(text) = std::str::from_utf8(data) else {
            return false;
        };
        text.parse::<JoinToken>().is_ok() | text.parse::<UserToken>().is_ok()
    },
    seeds: || {
        let id = "00000000000000ff".parse();
        let secret = serde_json::from_value(vec![7; 16].into());
        let Some((id, secret)) = id.ok().zip(secret.ok()) else {
            return Vec::new();
        };
        let join = JoinToken {
            id,
            secret,
            authority: Fingerprint([7; 32]),
        };
        let tokens = [join.to_string(), UserToken { id, secret }.to_string()];
        tokens.map(String::into_bytes).to_vec()
    },
};

/// A machine's output, as it is on disk and between nodes.
pub(crate) const OUTPUT: Target = Target {
    name: "output",
    run: |data| {
        let mut rest = data.to_vec();
        let records = split_records(&mut rest);
        let taken: usize = records.iter().map(|(_, text)| text.len()).sum();
        assert!(taken + rest.len() <= data.len(), "text out of nothing");
        !records.is_empty()
    },
    seeds: || vec![[&[1, 4, 0, 0, 0], b"text".as_slice()].concat()],
};
