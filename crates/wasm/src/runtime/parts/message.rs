//! Messages between home and member about threads.
//!
//! For a thread at a member the home sends [`Order::Run`], and finally receives exactly one of
//! [`Report::Captured`], [`Report::Finished`] and [`Report::Stopped`]; before that, host calls,
//! each of which it answers. A connection is FIFO.
//!
//! Encoded as a version byte and postcard; the transport identifies the sender and guarantees
//! integrity.

use crate::coherence::PartId;
use crate::runtime::cpu_usage::CoreTime;
use crate::runtime::fiber::Stop;
use crate::runtime::frame::{Progress, Value};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the encoding: the first byte.
const VERSION: u8 = 2;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Entering {
    /// By a call of an export, in its present instance or a fresh one.
    Call { export: String, args: Vec<Value> },
    Resume {
        /// Its state ([`crate::runtime::frame`]) for a fresh instance; `None` continues in the
        /// instance in which it was captured.
        #[serde(with = "serde_bytes")]
        state: Option<Vec<u8>>,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Call {
    /// Its arguments as bits; pointers refer to the machine's memory.
    Bare(Vec<u64>),
    /// A WASI call with its input; the answer carries its output.
    Packed(keel_wasi::PackedCall),
}

/// Result of a host call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    Done {
        /// Its results, as bits.
        results: Vec<u64>,
        /// Output of a packed call.
        #[serde(with = "serde_bytes")]
        output: Vec<u8>,
    },
    /// Interrupted: the thread leaves, and repeats the call later.
    Interrupted(Progress),
    Exit(u32),
    Trap(String),
}

/// From the home to a member.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Order {
    Run {
        tid: u32,
        entering: Entering,
    },
    /// A thread arrives soon: prepare an OS thread for it ([`Report::Expecting`]).
    Expect {
        tid: u32,
    },
    /// Requests a safepoint.
    Interrupt {
        tid: u32,
        /// The thread leaves the member then, as after [`Order::Leave`].
        leaves: bool,
    },
    /// Answer to its host call.
    Answer {
        tid: u32,
        answer: Answer,
    },
    /// A captured thread leaves the member.
    Leave {
        tid: u32,
    },
    /// Makes a memory accessible up to this size; or reduces it again, where growth failed
    /// elsewhere.
    Open {
        memory: u32,
        bytes: u64,
    },
    End,
    /// Requests [`Report::Times`].
    Times,
}

/// From a member to the home.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    Call {
        tid: u32,
        import: u32,
        call: Call,
        /// Progress of the same call before.
        progress: Progress,
    },
    /// An OS thread for the expected thread is ready.
    Expecting {
        tid: u32,
    },
    /// A thread is at a safepoint.
    Captured {
        tid: u32,
        /// It leaves: the member has dropped its state.
        has_left: bool,
        /// Its state, encoded by [`crate::runtime::frame`].
        #[serde(with = "serde_bytes")]
        state: Vec<u8>,
    },
    Finished {
        tid: u32,
        values: Vec<Value>,
    },
    Stopped {
        tid: u32,
        stop: Stop,
    },
    /// Result of [`Order::Open`].
    Opened {
        memory: u32,
        /// As it was ordered.
        bytes: u64,
        /// Whether it is.
        done: bool,
    },
    /// CPU times of the member's threads.
    Times {
        /// Nanoseconds since this part started.
        at_ns: u64,
        /// Per thread, also the microseconds stalled on remote pages, by the part that supplied
        /// them.
        threads: Vec<(u32, CoreTime, BTreeMap<PartId, u64>)>,
    },
}

impl Report {
    /// The thread concerned.
    pub(crate) fn tid(&self) -> Option<u32> {
        match self {
            Report::Call { tid, .. }
            | Report::Captured { tid, .. }
            | Report::Finished { tid, .. }
            | Report::Stopped { tid, .. } => Some(*tid),
            Report::Opened { .. } | Report::Times { .. } | Report::Expecting { .. } => None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    #[error("thread messages have version {0}, this node supports {VERSION}")]
    Version(u8),
    #[error("a thread message is corrupt: {0}")]
    Damaged(String),
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    // Writing to a vector does not fail.
    postcard::to_extend(message, vec![VERSION]).unwrap_or_default()
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, MessageError> {
    let damaged = |what: &str| MessageError::Damaged(what.to_owned());
    let (version, body) = bytes.split_first().ok_or(damaged("it is empty"))?;
    if *version != VERSION {
        return Err(MessageError::Version(*version));
    }
    let (message, rest) =
        postcard::take_from_bytes(body).map_err(|error| damaged(&error.to_string()))?;
    match rest {
        [] => Ok(message),
        _ => Err(damaged("it has trailing bytes")),
    }
}

impl Order {
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// It, of its bytes.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes)
    }
}

impl Report {
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// It, of its bytes.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::fiber::Trap;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    fn packed() -> keel_wasi::PackedCall {
        let mut bytes = vec![0; 64];
        bytes[8] = 9;
        let memory = wiggle::GuestMemory::Unshared(&mut bytes);
        let packed = keel_wasi::pack(keel_wasi::Function::PathUnlinkFile, &[3, 8, 5], &memory);
        packed.expect("it can be packed").0
    }

    fn orders() -> Vec<Order> {
        vec![
            Order::Run {
                tid: 7,
                entering: Entering::Call {
                    export: "wasi_thread_start".into(),
                    args: vec![Value::I32(7), Value::V128(1 << 100)],
                },
            },
            Order::Run {
                tid: 7,
                entering: Entering::Resume {
                    state: Some(vec![1, 2, 3]),
                },
            },
            Order::Interrupt {
                tid: 1 << 28,
                leaves: true,
            },
            Order::Expect { tid: 5 },
            Order::Answer {
                tid: 7,
                answer: Answer::Interrupted(Progress::Waiting {
                    remaining_ns: Some(1 << 40),
                }),
            },
            Order::Answer {
                tid: 7,
                answer: Answer::Done {
                    results: vec![0],
                    output: vec![7; 70],
                },
            },
            Order::Answer {
                tid: 7,
                answer: Answer::Trap("out of bounds memory access".into()),
            },
            Order::Open {
                memory: 0,
                bytes: 1 << 33,
            },
            Order::End,
            Order::Times,
        ]
    }

    fn reports() -> Vec<Report> {
        vec![
            Report::Call {
                tid: 3,
                import: 9,
                call: Call::Bare(vec![1, u64::MAX]),
                progress: Progress::Fresh,
            },
            Report::Call {
                tid: 4,
                import: 2,
                call: Call::Packed(packed()),
                progress: Progress::Fresh,
            },
            Report::Expecting { tid: 5 },
            Report::Captured {
                tid: 3,
                has_left: true,
                state: vec![9; 300],
            },
            Report::Stopped {
                tid: 3,
                stop: Stop::Trap(Trap {
                    message: "unreachable".into(),
                    backtrace: vec!["main".into()],
                }),
            },
            Report::Opened {
                memory: 1,
                bytes: 1 << 20,
                done: false,
            },
            Report::Times {
                at_ns: 1 << 40,
                threads: vec![
                    (
                        3,
                        CoreTime {
                            run_ns: 5,
                            waited_ns: 1 << 33,
                            turns: 9,
                            is_runnable: true,
                        },
                        BTreeMap::from([(PartId::HOME, 1 << 35)]),
                    );
                    4
                ],
            },
        ]
    }

    #[test]
    fn what_is_said_is_heard() {
        for order in orders() {
            assert_eq!(Order::decode(&order.encode()).unwrap(), order);
        }
        for report in reports() {
            assert_eq!(Report::decode(&report.encode()).unwrap(), report);
        }
        let mut other = Order::End.encode();
        other[0] = 1;
        assert!(matches!(
            Order::decode(&other),
            Err(MessageError::Version(1))
        ));
        let longer = [Order::End.encode(), vec![0]].concat();
        assert!(Order::decode(&longer).is_err());
        assert!(Report::decode(&[]).is_err());
    }

    #[test]
    fn damaged_bytes_are_errors_or_messages() {
        let mut all: Vec<Vec<u8>> = orders().iter().map(Order::encode).collect();
        all.extend(reports().iter().map(Report::encode));
        let mut rng = SmallRng::seed_from_u64(5);
        let mut refused = 0;
        for round in 0..30_000 {
            let mut bytes = all[round % all.len()].clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            bytes.truncate(rng.random_range(0..=bytes.len()));
            refused += u32::from(Order::decode(&bytes).is_err());
            refused += u32::from(Report::decode(&bytes).is_err());
        }
        assert!(refused > 10_000, "{refused}");
    }
}
