//! Requests, streams, limits, and what is known when a connection is lost.

#[path = "../common/mod.rs"]
mod common;
mod peers;

use std::collections::HashSet;
use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Authority, Outcome, eventually, name, serve};
use futures::FutureExt;
use keel_net::rpc::{ConnectError, MemberCheck, ServerHandle, everyone_is_member};
use keel_net::{
    BoxFuture, Bytes, Client, ClientTls, Fingerprint, Handler, NodeName, Options, PeerId, Peers,
    PinnedIdentity, Reply, RpcError, Server, ServerTls,
};
use tokio::sync::{Notify, mpsc};

const ECHO: u16 = 1;
const FAIL: u16 = 2;
const REFUSE: u16 = 3;
const HANG: u16 = 4;
const PANIC: u16 = 5;
const COUNT: u16 = 6;
const FOREVER: u16 = 7;
const PUBLIC: u16 = 8;
const BIG: u16 = 9;

const LONG: Duration = Duration::from_secs(20);

#[derive(Default)]
struct TestHandler {
    calls: AtomicUsize,
    hanging: AtomicUsize,
    release: Notify,
    pushed: Arc<AtomicUsize>,
}

impl Handler for TestHandler {
    fn permits(&self, peer: &PeerId, kind: u16) -> bool {
        *peer != PeerId::Anonymous || kind == PUBLIC
    }

    fn call(
        &self,
        peer: PeerId,
        kind: u16,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<Reply, RpcError>> {
        async move {
            self.calls.fetch_add(1, Ordering::SeqCst);
            match kind {
                ECHO => Ok(payload.into()),
                PUBLIC => Ok(Bytes::from(peer.to_string()).into()),
                FAIL => Err(RpcError::failed("the disk is full")),
                REFUSE => Err(RpcError::refused("try node b")),
                HANG => {
                    self.hanging.fetch_add(1, Ordering::SeqCst);
                    self.release.notified().await;
                    Ok(payload.into())
                }
                PANIC => panic!("a bug in the handler (expected in this test)"),
                COUNT => {
                    let (items, stream) = mpsc::channel(1);
                    let n = payload.first().copied().unwrap_or(0);
                    tokio::spawn(async move {
                        for i in 0..n {
                            items.send(Bytes::from(vec![i])).await.ok();
                        }
                    });
                    Ok(Reply::Stream(stream))
                }
                FOREVER => {
                    let (items, stream) = mpsc::channel(1);
                    let pushed = Arc::clone(&self.pushed);
                    tokio::spawn(async move {
                        while items.send(Bytes::from_static(b"x")).await.is_ok() {
                            pushed.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                    Ok(Reply::Stream(stream))
                }
                BIG => Ok(Bytes::from(vec![0; 5 << 20]).into()),
                _ => Err(RpcError::refused("no such kind")),
            }
        }
        .boxed()
    }
}

struct Pair {
    handler: Arc<TestHandler>,
    server: ServerHandle,
    client: Client,
    ca: Authority,
}

async fn pair(options: Options) -> Result<Pair, Box<dyn Error>> {
    pair_with(options, everyone_is_member()).await
}

async fn pair_with(options: Options, member: MemberCheck) -> Result<Pair, Box<dyn Error>> {
    let ca = Authority::new()?;
    let handler = Arc::new(TestHandler::default());
    let tls = ServerTls::node_or_anonymous(&ca.node("a")?)?;
    let server = serve(tls, member, handler.clone(), options.clone()).await?;
    let client = Client::connect(
        &server.address().to_string(),
        &ClientTls::node(&ca.node("b")?)?,
        &name("a"),
        options,
    )
    .await?;
    Ok(Pair {
        handler,
        server,
        client,
        ca,
    })
}

#[tokio::test]
async fn answers_errors_and_panics_arrive_as_what_they_are() -> Outcome {
    let Pair { client, .. } = &pair(Options::default()).await?;
    let call = |kind, text: &'static str| client.call(kind, Bytes::from(text), LONG);
    assert_eq!(call(ECHO, "hello").await?, "hello");
    let error = call(FAIL, "").await.err().ok_or("no error")?;
    assert!(matches!(&error, RpcError::Failed { reason, .. } if reason == "the disk is full"));
    assert!(
        error
            .to_string()
            .starts_with("failed at node a at 127.0.0.1:")
    );
    assert!(matches!(
        call(REFUSE, "").await,
        Err(RpcError::Refused { .. })
    ));
    assert!(matches!(
        call(PANIC, "").await,
        Err(RpcError::Unknown { .. })
    ));
    assert!(matches!(call(BIG, "").await, Err(RpcError::Failed { .. })));
    assert_eq!(call(ECHO, "still there").await?, "still there");
    // The handler learns the peer.
    assert_eq!(call(PUBLIC, "").await?, "node b");
    // Answering a call with a stream is an error, and harms nothing.
    assert!(call(COUNT, "\x05").await.is_err());
    assert!(client.stream(ECHO, Bytes::new()).await.is_err());
    assert_eq!(call(ECHO, "and still").await?, "and still");
    Ok(())
}

#[tokio::test]
async fn requests_that_cannot_be_sent_are_not_sent() -> Outcome {
    let Pair {
        client, handler, ..
    } = &pair(Options::default()).await?;
    for kind in [0, 0xff00, 0xffff] {
        let result = client.call(kind, Bytes::new(), LONG).await;
        assert!(matches!(result, Err(RpcError::NotSent { .. })));
    }
    let long = Bytes::from(vec![0; (4 << 20) + 1]);
    let result = client.call(ECHO, long, LONG).await;
    assert!(matches!(result, Err(RpcError::NotSent { .. })));
    assert_eq!(handler.calls.load(Ordering::SeqCst), 0);
    let longest = Bytes::from(vec![7; 4 << 20]);
    assert_eq!(client.call(ECHO, longest.clone(), LONG).await?, longest);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_share_a_connection() -> Outcome {
    let options = Options {
        in_flight_max: 8,
        queued_frames_max: 2,
        ..Options::default()
    };
    let Pair { client, .. } = &pair(options).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..2000u32 {
        let client = client.clone();
        tasks.spawn(async move {
            let payload = Bytes::from(i.to_string().repeat(1 + i as usize % 50));
            let answer = client.call(ECHO, payload.clone(), LONG).await;
            answer.map(|answer| answer == payload)
        });
    }
    while let Some(good) = tasks.join_next().await {
        assert!(good??);
    }
    Ok(())
}

#[tokio::test]
async fn a_time_out_after_sending_is_unknown_and_before_it_not_sent() -> Outcome {
    let options = Options {
        in_flight_max: 1,
        ..Options::default()
    };
    let Pair {
        client, handler, ..
    } = &pair(options).await?;
    let short = Duration::from_millis(500);
    // Sent, no answer.
    let result = client.call(HANG, Bytes::new(), short).await;
    assert!(
        matches!(result, Err(RpcError::Unknown { .. })),
        "{result:?}"
    );
    // The first is still in flight, so the second never leaves.
    let result = client.call(ECHO, Bytes::new(), short).await;
    assert!(
        matches!(result, Err(RpcError::NotSent { .. })),
        "{result:?}"
    );
    assert_eq!(handler.calls.load(Ordering::SeqCst), 1);
    // When it ends, others proceed; its late answer is ignored.
    handler.release.notify_one();
    assert_eq!(client.call(ECHO, "x".into(), LONG).await?, "x");
    Ok(())
}

#[tokio::test]
async fn a_lost_connection_ends_all_that_waits() -> Outcome {
    let Pair {
        client,
        handler,
        server,
        ..
    } = pair(Options::default()).await?;
    let hanging: Vec<_> = (0..5)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.call(HANG, Bytes::new(), LONG).await })
        })
        .collect();
    let mut stream = client.stream(FOREVER, Bytes::new()).await?;
    assert!(stream.recv().await.is_some_and(|item| item.is_ok()));
    eventually("five requests run", || {
        handler.hanging.load(Ordering::SeqCst) == 5
    })
    .await?;
    server.shutdown().await;
    for task in hanging {
        assert!(matches!(task.await?, Err(RpcError::Unknown { .. })));
    }
    // The stream reports the error repeatedly: never a clean end.
    let mut broken = 0;
    while broken < 2 {
        match stream.recv().await.ok_or("a clean end")? {
            Ok(_) => {}
            Err(error) => {
                assert!(matches!(error, RpcError::Unknown { .. }));
                broken += 1;
            }
        }
    }
    assert!(client.is_lost());
    let result = client.call(ECHO, Bytes::new(), LONG).await;
    assert!(matches!(result, Err(RpcError::NotSent { .. })));
    Ok(())
}

#[tokio::test]
async fn streams_end_are_paced_and_can_be_cancelled() -> Outcome {
    let options = Options {
        stream_items_ahead_max: 4,
        streams_max: 2,
        ..Options::default()
    };
    let Pair {
        client, handler, ..
    } = &pair(options).await?;
    let mut stream = client.stream(COUNT, Bytes::from(vec![200])).await?;
    let mut seen = Vec::new();
    while let Some(item) = stream.recv().await {
        seen.push(item?[0]);
    }
    assert_eq!(seen, (0..200).collect::<Vec<u8>>());
    assert!(stream.recv().await.is_none());
    // No reader: the producer stops after its credit. Requests pass.
    let unread = client.stream(FOREVER, Bytes::new()).await?;
    for _ in 0..20 {
        assert_eq!(client.call(ECHO, "x".into(), LONG).await?, "x");
    }
    assert!(handler.pushed.load(Ordering::SeqCst) <= 4 + 3);
    // Dropped: the producer's receiver goes, and the place is free again.
    drop(unread);
    for _ in 0..20 {
        let mut stream = client.stream(FOREVER, Bytes::new()).await?;
        assert!(stream.recv().await.is_some_and(|item| item.is_ok()));
    }
    let pushed = Arc::clone(&handler.pushed);
    eventually("all producers ended", || Arc::strong_count(&pushed) == 2).await?;
    Ok(())
}

#[tokio::test]
async fn anonymous_peers_may_only_what_the_handler_permits() -> Outcome {
    let Pair {
        ca,
        server,
        handler,
        client,
    } = &pair(Options::default()).await?;
    let tls = ClientTls::join(Fingerprint::of(&ca.certificate()))?;
    let address = server.address().to_string();
    let anonymous = Client::connect_unnamed(&address, &tls, Options::default()).await?;
    let answer = anonymous.call(PUBLIC, Bytes::new(), LONG).await?;
    assert_eq!(answer, "an anonymous peer");
    let before = handler.calls.load(Ordering::SeqCst);
    let result = anonymous.call(ECHO, Bytes::new(), LONG).await;
    assert!(matches!(result, Err(RpcError::Refused { .. })));
    assert_eq!(handler.calls.load(Ordering::SeqCst), before);
    // Nor long payloads: the connection ends.
    let long = Bytes::from(vec![0; 65 << 10]);
    assert!(anonymous.call(PUBLIC, long, LONG).await.is_err());
    assert_eq!(client.call(ECHO, "x".into(), LONG).await?, "x");
    Ok(())
}

#[tokio::test]
async fn anonymous_connections_are_few_and_short() -> Outcome {
    let options = Options {
        anonymous_connections_max: 2,
        anonymous_lifetime: Duration::from_millis(2000),
        ..Options::default()
    };
    let Pair { ca, server, .. } = &pair(options).await?;
    let tls = ClientTls::join(Fingerprint::of(&ca.certificate()))?;
    let address = server.address().to_string();
    let connect = || Client::connect_unnamed(&address, &tls, Options::default());
    let first = connect().await?;
    let _second = connect().await?;
    assert!(matches!(
        connect().await,
        Err(ConnectError::NoGreeting { .. } | ConnectError::Tls(_))
    ));
    eventually("the first was ended", || first.is_lost()).await?;
    connect().await?;
    Ok(())
}

#[tokio::test]
async fn a_removed_node_is_refused_at_once() -> Outcome {
    let removed: Arc<Mutex<HashSet<NodeName>>> = Arc::default();
    let member: MemberCheck = {
        let removed = Arc::clone(&removed);
        Arc::new(move |node| !removed.lock().is_ok_and(|set| set.contains(node)))
    };
    let Pair {
        client, server, ca, ..
    } = &pair_with(Options::default(), member).await?;
    let mut stream = client.stream(FOREVER, Bytes::new()).await?;
    assert!(stream.recv().await.is_some_and(|item| item.is_ok()));
    removed.lock().map_err(|e| e.to_string())?.insert(name("b"));
    // What runs is ended,
    let broken = loop {
        match stream.recv().await {
            Some(Ok(_)) => {}
            end => break end,
        }
    };
    assert!(matches!(broken, Some(Err(_))), "{broken:?}");
    // the connection takes nothing,
    assert!(client.call(ECHO, Bytes::new(), LONG).await.is_err());
    // and a new one is refused by name.
    let again = Client::connect(
        &server.address().to_string(),
        &ClientTls::node(&ca.node("b")?)?,
        &name("a"),
        Options::default(),
    )
    .await;
    let message = again.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("removed from the cluster"), "{message}");
    Ok(())
}

#[tokio::test]
async fn a_silent_peer_is_given_up() -> Outcome {
    let options = Options {
        keepalive: Duration::from_millis(100),
        dead_after: Duration::from_millis(1500),
        ..Options::default()
    };
    // A server that greets and then sends nothing.
    let (near, far) = tokio::io::duplex(1 << 16);
    let (mut far_reader, mut far_writer) = tokio::io::split(far);
    let hello = postcard::to_stdvec(&(true, ""))?;
    let frame = keel_net::frame::Frame {
        kind: 0xff01,
        request: 0,
        payload: hello.into(),
    };
    keel_net::frame::write_frame(&mut far_writer, &keel_net::frame::Class::CONTROL, &frame).await?;
    let client = Client::over(near, "node a", "here", options.clone()).await?;
    let result = client.call(ECHO, Bytes::new(), LONG).await;
    assert!(matches!(&result, Err(RpcError::Unknown { reason, .. }) if reason.contains("silent")));
    // It did send pings meanwhile.
    let mut sent = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut far_reader, &mut sent).await?;
    assert!(sent.len() > 3 * keel_net::frame::HEADER_BYTES);
    // Against a live server the pings keep an idle connection.
    let Pair { client, .. } = &pair(options).await?;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(client.call(ECHO, "x".into(), LONG).await?, "x");
    Ok(())
}

/// The peer takes the request's connection but not its bytes: what is still
/// queued was certainly not executed.
#[tokio::test]
async fn what_was_still_queued_is_not_sent() -> Outcome {
    let (near, far) = tokio::io::duplex(256);
    let (_far_reader, mut far_writer) = tokio::io::split(far);
    let frame = keel_net::frame::Frame {
        kind: 0xff01,
        request: 0,
        payload: postcard::to_stdvec(&(true, ""))?.into(),
    };
    keel_net::frame::write_frame(&mut far_writer, &keel_net::frame::Class::CONTROL, &frame).await?;
    let client = Client::over(near, "node a", "here", Options::default()).await?;
    let first = {
        let client = client.clone();
        tokio::spawn(async move {
            let long = Bytes::from(vec![0; 100_000]);
            client.call(ECHO, long, Duration::from_millis(500)).await
        })
    };
    // Let the writer get stuck in the first.
    let limit = Duration::from_millis(300);
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    let second = client.call(ECHO, Bytes::new(), limit).await;
    assert!(matches!(first.await?, Err(RpcError::Unknown { .. })));
    assert!(
        matches!(second, Err(RpcError::NotSent { .. })),
        "{second:?}"
    );
    Ok(())
}

/// It sends pings and asks for more, but takes only some bytes a second.
#[tokio::test]
async fn a_peer_that_hardly_reads_is_given_up() -> Outcome {
    const PING: u16 = 0xff09;
    const CREDIT: u16 = 0xff07;
    let handler = Arc::new(TestHandler::default());
    let (near, far) = tokio::io::duplex(256);
    let options = Options {
        dead_after: Duration::from_millis(1500),
        ..Options::default()
    };
    let mut serving = tokio::spawn(Server::serve_connection(
        far,
        PeerId::Node(name("b")),
        everyone_is_member(),
        handler.clone(),
        options,
    ));
    let (mut reader, mut writer) = tokio::io::split(near);
    let frame = |kind, payload: Vec<u8>| keel_net::frame::Frame {
        kind,
        request: 1,
        payload: payload.into(),
    };
    let credit = frame(CREDIT, postcard::to_stdvec(&2u32)?);
    let more = [bytes_of(&frame(PING, Vec::new()))?, bytes_of(&credit)?].concat();
    let asked = bytes_of(&frame(FOREVER, Vec::new()))?;
    tokio::io::AsyncWriteExt::write_all(&mut writer, &asked).await?;
    let using = async {
        let mut byte = [0];
        // A byte for each time in which it is not given up.
        while tokio::time::timeout(Duration::from_millis(50), &mut serving)
            .await
            .is_err()
        {
            // (It may be given up meanwhile.)
            tokio::io::AsyncWriteExt::write_all(&mut writer, &more)
                .await
                .ok();
            tokio::io::AsyncReadExt::read(&mut reader, &mut byte)
                .await
                .ok();
        }
    };
    tokio::time::timeout(LONG, using).await?;
    let pushed = Arc::clone(&handler.pushed);
    eventually("its stream ended", || Arc::strong_count(&pushed) == 2).await?;
    Ok(())
}

#[tokio::test]
async fn a_server_survives_garbage() -> Outcome {
    let handler = Arc::new(TestHandler::default());
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..300u32 {
        let (near, far) = tokio::io::duplex(1 << 16);
        let serving = tokio::spawn(Server::serve_connection(
            far,
            PeerId::Node(name("b")),
            everyone_is_member(),
            handler.clone(),
            Options::default(),
        ));
        let mut garbage = Vec::new();
        for i in 0..400u32 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            garbage.push(seed as u8);
            if i % 20 == 0 && round % 2 == 0 {
                // Right headers with wild kinds, numbers and payloads.
                let base = if round % 4 == 0 { 0xff00 } else { 0 };
                let kind = base | ((seed >> 32) as u16 % 12);
                let frame = keel_net::frame::Frame {
                    kind: if kind == HANG { ECHO } else { kind.max(1) },
                    request: seed % 3,
                    payload: Bytes::from(vec![seed as u8; (seed % 5) as usize]),
                };
                let mut bytes = bytes_of(&frame)?;
                garbage.clear();
                garbage.append(&mut bytes);
            }
        }
        let (mut reader, mut writer) = tokio::io::split(near);
        tokio::io::AsyncWriteExt::write_all(&mut writer, &garbage).await?;
        tokio::io::AsyncWriteExt::shutdown(&mut writer).await.ok();
        drop(writer);
        let mut answer = Vec::new();
        handler.release.notify_waiters();
        tokio::time::timeout(
            LONG,
            tokio::io::AsyncReadExt::read_to_end(&mut reader, &mut answer),
        )
        .await
        .ok();
        tokio::time::timeout(LONG, serving).await??;
    }
    Ok(())
}

fn bytes_of(frame: &keel_net::frame::Frame) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut bytes = bytes::BytesMut::new();
    frame.encode(&keel_net::frame::Class::CONTROL, &mut bytes)?;
    Ok(bytes.to_vec())
}

#[tokio::test]
async fn pinned_workers_can_speak_rpc_too() -> Outcome {
    let (source, target) = (PinnedIdentity::generate()?, PinnedIdentity::generate()?);
    let server = serve(
        ServerTls::pinned(&target, source.fingerprint)?,
        everyone_is_member(),
        Arc::new(TestHandler::default()),
        Options::default(),
    )
    .await?;
    let client = Client::connect_unnamed(
        &server.address().to_string(),
        &ClientTls::pinned(&source, target.fingerprint)?,
        Options::default(),
    )
    .await?;
    let answer = client.call(PUBLIC, Bytes::new(), LONG).await?;
    assert_eq!(answer, format!("worker {}", source.fingerprint));
    Ok(())
}

/// The sides need not agree on how far a stream may run ahead.
#[tokio::test]
async fn the_client_alone_sets_the_pace_of_its_streams() -> Outcome {
    let Pair { server, ca, .. } = &pair(Options::default()).await?;
    for ahead in [1, 2, 3, 1000, u32::MAX] {
        let options = Options {
            stream_items_ahead_max: ahead,
            ..Options::default()
        };
        let address = server.address().to_string();
        let tls = ClientTls::node(&ca.node("b")?)?;
        let client = Client::connect(&address, &tls, &name("a"), options).await?;
        let mut stream = client.stream(COUNT, Bytes::from(vec![250])).await?;
        let mut seen = 0;
        while let Some(item) = stream.recv().await {
            item?;
            seen += 1;
        }
        assert_eq!(seen, 250);
    }
    Ok(())
}

/// A call dropped by its caller frees its place, sent or not.
#[tokio::test]
async fn dropped_calls_leave_nothing_behind() -> Outcome {
    let options = Options {
        in_flight_max: 4,
        ..Options::default()
    };
    let Pair {
        client, handler, ..
    } = &pair(options).await?;
    for round in 1..=5 {
        for i in 1..=4 {
            let running = 4 * (round - 1) + i;
            tokio::select! {
                answer = client.call(HANG, Bytes::new(), LONG) => drop(answer?),
                begun = eventually("it runs", || {
                    handler.hanging.load(Ordering::SeqCst) == running
                }) => begun?,
            }
        }
        for _ in 0..4 {
            handler.release.notify_one();
            tokio::task::yield_now().await;
        }
        handler.release.notify_waiters();
        assert_eq!(client.call(ECHO, "x".into(), LONG).await?, "x");
    }
    Ok(())
}
