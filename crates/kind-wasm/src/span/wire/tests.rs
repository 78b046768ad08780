//! Messages are encoded by a [`FrameWriter`] and decoded by a [`FrameReader`], and damaged frames are
//! refused.

use super::frame_reader::pages_of;
use super::frame_writer::is_zero;
use super::*;
use crate::span::false_sharing::FaultFootprint;
use crate::span::idle_pages::IdleRange;
use keel_wasm::coherence::{Access, Holders, PageId, Placement, Segment, Traffic, Txn};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

fn samples() -> Vec<PeerMessage> {
    let page = PageId {
        memory: 1,
        number: 77,
    };
    let part = |number| PartId::new(number).unwrap();
    let txn = Txn {
        number: 1 << 40,
        directory: part(2),
        is_answer: true,
    };
    let data = Message::Data {
        page,
        txn,
        access: Access::Write,
        acks: 3,
        more: Vec::new(),
    };
    let segment = Segment {
        memory: 0,
        number: 9,
    };
    vec![
        PeerMessage::Coherence(Message::Want {
            page,
            access: Access::Read,
            has: false,
        }),
        PeerMessage::Pages(
            data.clone(),
            PageBytes {
                bytes: Bytes::new(),
                zeros: 1,
                pages: 1,
            },
        ),
        PeerMessage::Pages(
            data.clone(),
            PageBytes {
                bytes: Bytes::from_static(&[7; PAGE]),
                zeros: 0,
                pages: 1,
            },
        ),
        PeerMessage::Coherence(Message::SegmentAt {
            segment,
            version: 4,
        }),
        PeerMessage::Note(Vec::new()),
        PeerMessage::Memory(PartMemory {
            resident_bytes: 1 << 33,
            limit_bytes: Some(1 << 30),
            given_bytes: 4096,
            dropped_bytes: 0,
        }),
        PeerMessage::Time(1 << 40),
        PeerMessage::Limit(None),
        PeerMessage::Limit(Some(u64::MAX)),
        PeerMessage::Cut {
            number: 7,
            word: CutMessage::More(1 << 20),
        },
        PeerMessage::Quiescence {
            number: 3,
            word: QuiescenceMessage::Quiet({
                let mut traffic = Traffic::default();
                traffic.count_sent(part(3));
                traffic.count_received(part(63));
                traffic
            }),
        },
        PeerMessage::Quiescence {
            number: 4,
            word: QuiescenceMessage::Over,
        },
        PeerMessage::Ask(
            5,
            Question::InTransit {
                memory: 0,
                pages: 16..32,
                to: part(2),
            },
        ),
        PeerMessage::Ask(6, Question::Placements(page)),
        PeerMessage::Ask(7, Question::FaultWaits(page)),
        PeerMessage::Ask(8, Question::Idle(1, 4096)),
        PeerMessage::Answer(
            8,
            Answer::Idle(
                vec![IdleRange {
                    memory: 1,
                    start: 1 << 16,
                    bytes: 1 << 20,
                }],
                Some((2, 0)),
            ),
        ),
        PeerMessage::Answer(
            7,
            Answer::FaultWaits(vec![(page, FaultFootprint::default())], Some(page)),
        ),
        PeerMessage::Answer(5, Answer::InTransit(Some(7))),
        PeerMessage::Answer(
            6,
            Answer::Placements(
                vec![Placement {
                    memory: 1,
                    first: 77,
                    pages: 2,
                    holders: Holders::Owner(part(1)),
                    exchanges: 9,
                    directory: part(2),
                }],
                Some(page),
            ),
        ),
        PeerMessage::Coherence(Message::Gather),
        PeerMessage::Coherence(Message::Hand {
            segment,
            to: part(1),
        }),
        PeerMessage::CutPages {
            number: 7,
            pages: CutPages {
                memory: 1,
                first: 40,
                bytes: Bytes::from_static(&[9; 2 * PAGE]),
            },
        },
        PeerMessage::UnchangedPages(
            7,
            UnchangedPages {
                memory: 0,
                first: 1 << 20,
                pages: 16,
                digest: u128::MAX - 1,
            },
        ),
        PeerMessage::Gone(part(5)),
        PeerMessage::Succeeded,
        PeerMessage::Goodbye {
            part: part(3),
            reason: "its process is gone".into(),
        },
        PeerMessage::Note((0..300 << 10).map(|at| at as u8).collect()),
    ]
}

fn frame(parcel: &PeerMessage) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(parcel, &mut frame).unwrap();
    frame
}

fn stream() -> Vec<u8> {
    samples().iter().flat_map(frame).collect()
}

#[test]
fn the_hello_comes_first() {
    let hello = Hello::new(
        "m".parse().unwrap(),
        Epoch::default(),
        PartId::new(0).unwrap(),
        PartId::new(63).unwrap(),
    );
    let bytes = [encode_hello(&hello).unwrap(), stream()].concat();
    for piece in [1, 7, bytes.len()] {
        let (mut unpacker, mut parcels, mut found) = (FrameReader::default(), Vec::new(), None);
        for piece in bytes.chunks(piece) {
            match &found {
                None => found = unpacker.feed_hello(piece).unwrap(),
                Some(_) => unpacker.feed(piece, &mut parcels).unwrap(),
            }
        }
        unpacker.feed(&[], &mut parcels).unwrap();
        assert_eq!(
            (found.as_ref(), &parcels[..]),
            (Some(&hello), &samples()[..])
        );
    }
    let nameless = FrameReader::default().feed_hello(&stream());
    assert!(matches!(nameless, Err(WireError::Nameless)), "{nameless:?}");
    // A second hello is not a message.
    assert!(
        FrameReader::default()
            .feed(&bytes, &mut Vec::new())
            .is_err()
    );
}

#[test]
fn messages_are_decoded_from_pieces_of_any_size() {
    let bytes = stream();
    for piece in [1, 2, 19, 20, 21, 4096, bytes.len()] {
        let (mut unpacker, mut parcels) = (FrameReader::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            unpacker.feed(piece, &mut parcels).unwrap();
        }
        assert_eq!(parcels, samples(), "{piece}");
        assert!(unpacker.begun.is_empty());
    }
}

#[test]
fn inconsistent_frames_are_refused() {
    let [_, zeros, page, ..] = &samples()[..] else {
        unreachable!("seven of them");
    };
    let (zeros, page) = (frame(zeros), frame(page));
    let want = frame(&samples()[0]);
    let with_kind = |frame: &[u8], kind: u16| {
        let mut frame = frame.to_vec();
        frame[6..8].copy_from_slice(&kind.to_le_bytes());
        let mut parcels = Vec::new();
        FrameReader::default().feed(&frame, &mut parcels)
    };
    // Data without a page, a page without content, pages of other messages, unknown
    // kinds.
    for (frame, kind) in [
        (&zeros, KIND_MESSAGES),
        (&page, KIND_MESSAGES),
        (&want, KIND_PAGES),
        (&want, KIND_HELLO),
        (&want, KIND_UNCHANGED_PAGES + 1),
        (&want, KIND_QUIESCENCE),
        (&want, KIND_SUCCEEDED),
        (&want, KIND_GONE),
        (&want, KIND_CUT_PAGES),
        (&want, KIND_TIME),
    ] {
        assert!(with_kind(frame, kind).is_err(), "{kind}");
    }
    let part = postcard::to_stdvec(&200u8).unwrap();
    assert!(postcard::from_bytes::<PartId>(&part).is_err());
}

fn data(number: u32, more: Vec<u64>) -> Message {
    let page = PageId { memory: 1, number };
    Message::Data {
        page,
        txn: Txn {
            number: 1,
            directory: PartId::HOME,
            is_answer: false,
        },
        access: Access::Write,
        acks: 0,
        more,
    }
}

/// A run of pages is one message, and its adjacent pages are installed together;
/// other messages share a frame.
#[test]
fn pages_are_sent_in_runs_and_messages_in_batches() {
    let mut bytes = vec![0; ROW_PAGES_MAX * PAGE];
    for at in (0..ROW_PAGES_MAX).filter(|at| ![1, 5, 6].contains(at)) {
        bytes[at * PAGE + 4000] = at as u8 + 1;
    }
    let message = data(100, (1..64).map(|at| 1 << at).collect());
    let mut frames = FrameWriter::new().unwrap();
    let read = |count: usize, frames: &mut Vec<u8>| {
        frames.extend_from_slice(&bytes[..count * PAGE]);
        Ok::<(), WireError>(())
    };
    frames.put_pages(&message, read).unwrap();
    let gather = || PeerMessage::Coherence(Message::Gather);
    for parcel in [gather(), gather(), PeerMessage::Succeeded, gather()] {
        frames.put(&parcel).unwrap();
    }
    // A message that is too long or has other pages is not encoded.
    let long = data(0, vec![1; ROW_PAGES_MAX]);
    assert!(frames.put_pages(&long, read).is_err());
    let none = |_: usize, _: &mut Vec<u8>| Ok::<(), WireError>(());
    assert!(frames.put_pages(&message, none).is_err());
    let encoded = frames.finish(77).unwrap();
    let (mut unpacker, mut parcels) = (FrameReader::default(), Vec::new());
    unpacker.feed(&encoded, &mut parcels).unwrap();
    assert_eq!(parcels.remove(0), PeerMessage::Time(77));
    let rest = parcels.split_off(1);
    assert_eq!(rest, [gather(), gather(), PeerMessage::Succeeded, gather()]);
    // Time, a run, two messages in one frame, and the rest.
    let ours = encoded.windows(4).filter(|it| *it == b"KSPN");
    assert_eq!(ours.count(), 5);
    let Some(PeerMessage::Pages(found, pages)) = parcels.pop() else {
        panic!("{parcels:?}");
    };
    assert_eq!((found, pages.pages()), (message, ROW_PAGES_MAX));
    let (mut at, mut rows) = (0, Vec::new());
    for (count, piece) in pages.pieces() {
        let expected = &bytes[at * PAGE..(at + count) * PAGE];
        match piece {
            Some(piece) => assert!(piece == expected, "{at}"),
            None => assert!(is_zero(expected), "{at}"),
        }
        for number in at..at + count {
            let one = pages.page(number);
            let expected = piece.map(|piece| &piece[(number - at) * PAGE..][..PAGE]);
            assert_eq!(one.pieces().collect::<Vec<_>>(), [(1, expected)]);
        }
        rows.push(count);
        at += count;
    }
    assert_eq!(rows, [1, 1, 3, 2, 57]);
}

#[test]
fn runs_have_the_stated_length() {
    let row = |message: Message, zeros: u64, pages: usize| {
        let encoded = postcard::to_stdvec(&(message, zeros)).unwrap();
        let mut payload = vec![1; pages * PAGE];
        payload.extend(encoded);
        pages_of(payload.into()).map(|parcel| match parcel {
            PeerMessage::Pages(_, pages) => pages.pages(),
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(row(data(7, vec![3; 2]), 0b010, 2).unwrap(), 3);
    assert_eq!(row(data(7, vec![3; 63]), u64::MAX, 0).unwrap(), 64);
    for (message, zeros, pages) in [
        (data(7, vec![3; 2]), 0b010, 3),
        (data(7, vec![3; 2]), 0b010, 1),
        // More pages or zero pages than the message has; no page.
        (data(7, vec![3; 64]), u64::MAX, 1),
        (data(7, vec![3; 2]), 0b1010, 1),
        (data(7, vec![3; 2]), 0b1000, 3),
        (Message::Gather, 0, 1),
    ] {
        let refused = row(message, zeros, pages);
        assert!(refused.is_err(), "{zeros} {pages}: {refused:?}");
    }
}

/// Arbitrary bytes are decoded or refused.
#[test]
fn damaged_bytes_are_errors_or_messages() {
    // Damage in a long note has no effect.
    let samples: Vec<PeerMessage> = samples()
        .into_iter()
        .filter(|it| frame(it).len() < 9000)
        .collect();
    let bytes: Vec<u8> = samples.iter().flat_map(frame).collect();
    let mut rng = SmallRng::seed_from_u64(3);
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut damaged = bytes.clone();
        for _ in 0..rng.random_range(1..4) {
            // Mostly headers and messages are damaged, not pages.
            let at = rng.random_range(0..bytes.len());
            damaged[at] = rng.random();
        }
        damaged.truncate(rng.random_range(0..=bytes.len()));
        let mut parcels = Vec::new();
        let fed = FrameReader::default().feed(&damaged, &mut parcels);
        refused += u32::from(fed.is_err());
        assert!(parcels.len() <= samples.len());
    }
    assert!(refused > 100, "{refused}");
}
