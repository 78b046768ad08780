//! What the home and a member say to each other about threads.
//!
//! Of a thread that is at a member the home says [`Order::Run`], and hears of it in the
//! end just one of [`Report::Captured`], [`Report::Finished`] and [`Report::Stopped`];
//! before that, calls of the host, each of which it answers. All of one connection comes
//! in the order in which it was said.
//!
//! In postcard, behind a version: what carries it says whose it is, and that it is whole.

use crate::coherence::PartId;
use crate::runtime::fiber::Stop;
use crate::runtime::frame::{Progress, Value};
use crate::runtime::governor::CoreTime;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of these messages, their first byte.
const VERSION: u8 = 2;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Entering {
    /// By a call of an export, in the instance that it has, or a fresh one.
    Call { export: String, args: Vec<Value> },
    Resume {
        /// Its state ([`crate::runtime::frame`]), for a fresh instance; without one it
        /// goes on in the instance in which it was captured.
        #[serde(with = "serde_bytes")]
        state: Option<Vec<u8>>,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Call {
    /// Its arguments, as bits: what they point to is in the machine's memory.
    Bare(Vec<u64>),
    /// Of WASI, with all that it reads; what it writes comes with its answer.
    Packed(keel_wasi::PackedCall),
}

/// What a call of the host came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    Done {
        /// Its results, as bits.
        results: Vec<u64>,
        /// What one that came packed writes.
        #[serde(with = "serde_bytes")]
        output: Vec<u8>,
    },
    /// Nothing yet: the thread is to leave, and to make it again.
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
    /// A thread comes in a moment: what it needs is to be awake ([`Report::Expecting`]).
    Expect {
        tid: u32,
    },
    /// It is to come to a safepoint.
    Interrupt {
        tid: u32,
        /// It is not this member's any more then, as after [`Order::Leave`].
        leaves: bool,
    },
    /// Its call of the host is over.
    Answer {
        tid: u32,
        answer: Answer,
    },
    /// It is not this member's any more; it stands.
    Leave {
        tid: u32,
    },
    /// A memory is to be accessible so far; and no further, where it was opened for what did
    /// not succeed elsewhere.
    Open {
        memory: u32,
        bytes: u64,
    },
    End,
    /// It is to say what its threads took ([`Report::Times`]).
    Times,
}

/// From a member to the home.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    Call {
        tid: u32,
        import: u32,
        call: Call,
        /// How far the same call came before.
        progress: Progress,
    },
    /// What a thread needs is awake.
    Expecting {
        tid: u32,
    },
    /// A thread is at a safepoint.
    Captured {
        tid: u32,
        /// It was asked to leave, and has: nothing of it is at the member.
        has_left: bool,
        /// It, as [`crate::runtime::frame`] writes it.
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
    /// A memory is accessible so far, or cannot be.
    Opened {
        memory: u32,
        /// As it was ordered.
        bytes: u64,
        /// Whether it is.
        done: bool,
    },
    /// What the threads that are here took of cores so far.
    Times {
        /// When, in nanoseconds since this part began.
        at_ns: u64,
        /// Of each, and the microseconds that it stood at pages, by the part that gave
        /// them.
        threads: Vec<(u32, CoreTime, BTreeMap<PartId, u64>)>,
    },
}

impl Report {
    /// The thread of which it speaks.
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
    #[error("messages about threads are of version {0}, this is version {VERSION}")]
    Version(u8),
    #[error("a message about threads is damaged: {0}")]
    Damaged(String),
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    // Writing to memory does not fail.
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
        _ => Err(damaged("it goes on after its end")),
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
