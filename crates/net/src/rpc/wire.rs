//! The connection's own frames: their kinds and payloads.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Code, KIND_RESERVED, RpcError};
use crate::frame::Frame;

pub(super) const HELLO: u16 = KIND_RESERVED + 1;
pub(super) const ANSWER: u16 = KIND_RESERVED + 2;
pub(super) const ERROR: u16 = KIND_RESERVED + 3;
pub(super) const BEGIN: u16 = KIND_RESERVED + 4;
pub(super) const ITEM: u16 = KIND_RESERVED + 5;
pub(super) const END: u16 = KIND_RESERVED + 6;
pub(super) const CREDIT: u16 = KIND_RESERVED + 7;
pub(super) const CANCEL: u16 = KIND_RESERVED + 8;
pub(super) const PING: u16 = KIND_RESERVED + 9;
pub(super) const PONG: u16 = KIND_RESERVED + 10;

/// Longest text in an error or greeting, in bytes.
const TEXT_BYTES_MAX: usize = 4096;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) accepted: bool,
    pub(super) text: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Failure {
    code: Code,
    text: String,
}

pub(super) fn signal(kind: u16, request: u64) -> Frame {
    Frame {
        kind,
        request,
        payload: Bytes::new(),
    }
}

pub(super) fn hello(accepted: bool, text: &str) -> Frame {
    let text = cut(text.to_owned());
    coded(HELLO, 0, &Hello { accepted, text })
}

pub(super) fn credit(request: u64, items: u32) -> Frame {
    coded(CREDIT, request, &items)
}

pub(super) fn error(request: u64, error: RpcError) -> Frame {
    let (code, text) = match error {
        RpcError::NotSent { reason, .. } | RpcError::Refused { reason, .. } => {
            (Code::Refused, reason)
        }
        RpcError::Failed { reason, .. } => (Code::Failed, reason),
        RpcError::Unknown { reason, .. } => (Code::Unknown, reason),
    };
    let text = cut(text);
    coded(ERROR, request, &Failure { code, text })
}

/// The error in an ERROR frame, as seen by the client of `peer`.
pub(super) fn read_error(payload: &[u8], peer: &str) -> RpcError {
    let peer = peer.to_owned();
    match postcard::from_bytes::<Failure>(payload) {
        Ok(Failure { code, text: reason }) => match code {
            Code::Refused => RpcError::Refused { peer, reason },
            Code::Failed => RpcError::Failed { peer, reason },
            Code::Unknown => RpcError::Unknown { peer, reason },
        },
        Err(_) => RpcError::Unknown {
            peer,
            reason: "the answer is an error that cannot be read".into(),
        },
    }
}

fn coded<T: Serialize>(kind: u16, request: u64, value: &T) -> Frame {
    // Serialising these plain types into memory has no way to fail; an empty
    // payload would be refused by the reader.
    let payload = postcard::to_stdvec(value).unwrap_or_default().into();
    Frame {
        kind,
        request,
        payload,
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

/// Whether a greeting, an error or a credit can be read, for fuzzing.
pub(crate) fn is_own(payload: &[u8]) -> bool {
    postcard::from_bytes::<Hello>(payload).is_ok()
        | postcard::from_bytes::<Failure>(payload).is_ok()
        | postcard::from_bytes::<u32>(payload).is_ok()
}
