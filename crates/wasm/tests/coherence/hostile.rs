//! Arbitrary messages of another part produce only commands and an error, and after the error
//! nothing.

use keel_wasm::coherence::{
    Access, Coherence, Command, Config, Event, HeldRun, Holders, Holdings, Message, PageId, PartId,
    PartSet, Request, Segment, Txn,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

fn part(rng: &mut SmallRng) -> PartId {
    PartId::new(rng.random_range(0..5)).expect("a few parts")
}

fn number(rng: &mut SmallRng) -> u64 {
    match rng.random_range(0..6) {
        0 => u64::MAX,
        1 => rng.random(),
        few => few - 2,
    }
}

fn access(rng: &mut SmallRng) -> Access {
    match rng.random_bool(0.5) {
        true => Access::Read,
        false => Access::Write,
    }
}

fn request(rng: &mut SmallRng) -> Request {
    let (a, b) = (part(rng), part(rng));
    match rng.random_range(0..3) {
        0 => Request::Want {
            part: a,
            access: access(rng),
            has: rng.random(),
        },
        1 => Request::Move { to: a },
        _ => Request::Forget { part: a, to: b },
    }
}

fn message(rng: &mut SmallRng) -> Message {
    let page = PageId {
        memory: 0,
        number: match rng.random_bool(0.02) {
            true => u32::MAX - rng.random_range(0..3),
            false => rng.random_range(0..3),
        },
    };
    let more = match rng.random_range(0..4) {
        0 => (0..rng.random_range(0..3)).map(|_| number(rng)).collect(),
        1 if rng.random_bool(0.05) => vec![1; 2000],
        _ => Vec::new(),
    };
    let segment = Segment {
        memory: 0,
        number: match rng.random_bool(0.05) {
            true => u32::MAX - rng.random_range(0..3),
            false => rng.random_range(0..3),
        },
    };
    let (to, txn_number, acks) = (part(rng), number(rng), rng.random_range(0..4));
    let (number, access) = (txn_number, access(rng));
    let txn = Txn {
        number,
        directory: part(rng),
        is_answer: rng.random(),
    };
    match rng.random_range(0..13) {
        0 => Message::Want {
            page,
            access,
            has: rng.random(),
        },
        1 => Message::Move {
            page,
            pages: match rng.random_range(0..9) {
                0 => u32::MAX,
                few => few - 1,
            },
            to,
        },
        2 => Message::Forward {
            page,
            request: request(rng),
        },
        3 => Message::Fetch {
            page,
            txn,
            to,
            access,
            acks,
            more,
        },
        4 => Message::Invalidate { page, number, to },
        5 => Message::Grant {
            page,
            txn,
            access,
            acks,
        },
        6 => Message::Data {
            page,
            txn,
            access,
            acks,
            more,
        },
        7 => Message::Ack { page, number },
        8 => Message::Done { page, number, more },
        9 => {
            let holders = match rng.random_bool(0.5) {
                true => Holders::Owner(to),
                false => Holders::Readers {
                    owner: to,
                    readers: (0..3).map(|_| part(rng)).collect(),
                },
            };
            let queue = (0..rng.random_range(0..3)).map(|_| request(rng)).collect();
            Message::Segment {
                segment,
                version: number,
                pages: vec![(page, txn_number, holders, queue)],
            }
        }
        10 => Message::Hand { segment, to },
        11 => Message::Gather,
        _ => Message::SegmentAt {
            segment,
            version: number,
        },
    }
}

#[test]
fn anything_may_be_said() {
    let mut failed = 0;
    for seed in 0..30_000 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let parts: PartSet = (0..4).filter_map(PartId::new).collect();
        let mut coherence = Coherence::new(Config {
            me: PartId::new(rng.random_range(0..2)).expect("a few parts"),
            parts,
            origin: PartId::HOME,
            segment_pages: 2,
            hold_micros: rng.random_range(0..2),
            seed,
        });
        let mut is_over = false;
        for now in 0..30 {
            let event = match rng.random_range(0..9) {
                8 => Event::HomeMigrated {
                    new_home: part(&mut rng),
                },
                0 => Event::Fault {
                    page: PageId {
                        memory: 0,
                        number: rng.random_range(0..3),
                    },
                    access: access(&mut rng),
                },
                1 => Event::Tick,
                2 if rng.random_bool(0.3) => Event::Gather,
                _ => Event::Message {
                    from: part(&mut rng),
                    message: message(&mut rng),
                },
            };
            let commands = coherence.step(event, now);
            assert!(!is_over || commands.is_empty(), "seed {seed}");
            is_over |= commands
                .iter()
                .any(|command| matches!(command, Command::Fail { .. }));
        }
        failed += u32::from(is_over);
    }
    assert!(failed > 10_000, "{failed}");
}

/// For arbitrary holdings the next home either takes over or is unchanged.
#[test]
fn anything_may_be_left() {
    let mut succeeded = 0;
    for seed in 0..30_000 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut coherence = Coherence::new(Config {
            me: PartId::new(rng.random_range(0..3)).expect("a few parts"),
            parts: (0..4).filter_map(PartId::new).collect(),
            origin: PartId::HOME,
            segment_pages: 2,
            hold_micros: 0,
            seed,
        });
        let page = PageId {
            memory: 0,
            number: 3,
        };
        if rng.random_bool(0.2) {
            let access = access(&mut rng);
            coherence.step(Event::Fault { page, access }, 0);
        }
        let rows: Vec<HeldRun> = (0..rng.random_range(0..4))
            .map(|_| HeldRun {
                memory: rng.random_range(0..2),
                first: match rng.random_range(0..5) {
                    0 => u32::MAX - rng.random_range(0..3),
                    _ => rng.random_range(0..6),
                },
                holders: match rng.random_bool(0.7) {
                    true => Holders::Owner(part(&mut rng)),
                    false => Holders::Readers {
                        owner: part(&mut rng),
                        readers: [part(&mut rng), part(&mut rng)].into_iter().collect(),
                    },
                },
                pages: match rng.random_bool(0.02) {
                    true => u32::MAX - rng.random_range(0..3),
                    false => rng.random_range(0..4),
                },
            })
            .collect();
        let pages: u64 = rows.iter().map(|row| u64::from(row.pages)).sum();
        let exchanges = match rng.random_bool(0.1) {
            true => rng.random_range(0..9),
            false => pages.min(99),
        };
        let exchanges = (0..exchanges).map(|_| number(&mut rng)).collect();
        let legacy = Holdings { rows, exchanges };
        let before = coherence.clone();
        match coherence.take_over_home(&legacy) {
            Ok(()) => {
                succeeded += 1;
                for held in &legacy.rows {
                    for number in (held.first..=u32::MAX).take(held.pages as usize) {
                        let memory = held.memory;
                        let holders = coherence.holders(PageId { memory, number });
                        assert!(holders.is_some(), "seed {seed}");
                    }
                }
            }
            Err(_) => assert_eq!(coherence, before, "seed {seed}"),
        }
    }
    assert!(succeeded > 1000, "{succeeded}");
}
