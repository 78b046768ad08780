//! The pool of connections: made when they are needed, again after a loss, and closed when idle.

use super::common::succeeds;
use super::*;
use std::net::SocketAddr;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Node a, whom every node is a member to.
async fn serve_a(
    ca: &Authority,
    handler: &Arc<TestHandler>,
    options: Options,
) -> Result<ServerHandle, Box<dyn Error>> {
    let tls = ServerTls::node(&ca.node("a")?)?;
    serve(tls, everyone_is_member(), handler.clone(), options).await
}

/// The pool of node b, which knows where node a is.
fn pool(
    ca: &Authority,
    address: SocketAddr,
    options: Options,
) -> Result<(Peers, NodeName), Box<dyn Error>> {
    let peers = Peers::new(ClientTls::node(&ca.node("b")?)?, options);
    let a = name("a");
    peers.set_address(&a, &address.to_string());
    Ok((peers, a))
}

/// Accepts connections to a server and counts them; what they carry waits until it opens.
struct Relay {
    address: SocketAddr,
    opens: watch::Sender<bool>,
    accepted: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Relay {
    async fn start(server: SocketAddr) -> Result<Self, Box<dyn Error>> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (opens, is_open) = watch::channel(false);
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = accepted.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let mut is_open = is_open.clone();
                tokio::spawn(async move {
                    if is_open.wait_for(|is_open| *is_open).await.is_err() {
                        return;
                    }
                    if let Ok(mut to) = tokio::net::TcpStream::connect(server).await {
                        tokio::io::copy_bidirectional(&mut from, &mut to).await.ok();
                    }
                });
            }
        });
        Ok(Self {
            address,
            opens,
            accepted,
            accepting,
        })
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

#[tokio::test]
async fn the_pool_reconnects() -> Outcome {
    let ca = Authority::new()?;
    let options = Options {
        retry_after: Duration::from_millis(20),
        ..Options::default()
    };
    let server_of = |credentials| ServerTls::node(&credentials);
    let handler = Arc::new(TestHandler::default());
    let server = serve(
        server_of(ca.node("a")?)?,
        everyone_is_member(),
        handler.clone(),
        options.clone(),
    )
    .await?;
    let peers = Peers::new(ClientTls::node(&ca.node("b")?)?, options.clone());
    let a = name("a");
    let unknown = peers.call(&a, ECHO, Bytes::new(), LONG).await;
    assert!(matches!(unknown, Err(RpcError::NotSent { .. })));
    let address = server.address();
    peers.set_address(&a, &address.to_string());
    assert_eq!(peers.call(&a, ECHO, "1".into(), LONG).await?, "1");
    let first = peers.client(&a).await?;
    server.shutdown().await;
    eventually("the connection is lost", || first.is_lost()).await?;
    let down = peers.call(&a, ECHO, Bytes::new(), LONG).await;
    assert!(matches!(down, Err(RpcError::NotSent { .. })));
    // Back at the same address.
    let listener = tokio::net::TcpListener::bind(address).await?;
    let tls = server_of(ca.node("a")?)?;
    let _server = Server::serve(listener, tls, everyone_is_member(), handler, options)?;
    let again = async || peers.call(&a, ECHO, "2".into(), LONG).await;
    assert_eq!(succeeds("it answers", again).await?, "2");
    Ok(())
}

/// A node that comes back is asked again as soon as it says something.
#[tokio::test]
async fn who_is_heard_from_is_tried_at_once() -> Outcome {
    let ca = Authority::new()?;
    let options = Options {
        retry_after: LONG * 1000,
        ..Options::default()
    };
    let peers = Peers::new(ClientTls::node(&ca.node("b")?)?, options.clone());
    let a = name("a");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    peers.set_address(&a, &address.to_string());
    drop(listener);
    let refused = peers.call(&a, ECHO, Bytes::new(), LONG).await;
    assert!(matches!(refused, Err(RpcError::NotSent { .. })));
    let listener = tokio::net::TcpListener::bind(address).await?;
    let tls = ServerTls::node(&ca.node("a")?)?;
    let handler = Arc::new(TestHandler::default());
    let _server = Server::serve(listener, tls, everyone_is_member(), handler, options)?;
    let remembered = peers.call(&a, ECHO, Bytes::new(), LONG).await;
    assert!(matches!(remembered, Err(RpcError::NotSent { .. })));
    peers.heard_from(&name("another"));
    peers.heard_from(&a);
    assert_eq!(peers.call(&a, ECHO, "1".into(), LONG).await?, "1");
    Ok(())
}

/// What is copied delays no request, and its connection does not stay.
#[tokio::test]
async fn bulk_data_has_a_connection_of_its_own() -> Outcome {
    let ca = Authority::new()?;
    let handler = Arc::new(TestHandler::default());
    let limited = Options {
        connections_max: 2,
        ..Options::default()
    };
    let server = serve_a(&ca, &handler, limited).await?;
    let address = server.address().to_string();
    let options = Options {
        in_flight_max: 1,
        idle_after: Duration::from_millis(50),
        ..Options::default()
    };
    let tls = ClientTls::node(&ca.node("b")?)?;
    let peers = Arc::new(Peers::new(tls.clone(), options.clone()));
    let a = name("a");
    peers.set_address(&a, &address);
    let bulk = {
        let (peers, a) = (peers.clone(), a.clone());
        tokio::spawn(async move { peers.bulk_call(&a, HANG, "1".into(), LONG).await })
    };
    let hangs = || handler.hanging.load(Ordering::SeqCst) == 1;
    eventually("it hangs", hangs).await?;
    for _ in 0..3 {
        assert_eq!(peers.call(&a, ECHO, "2".into(), LONG).await?, "2");
    }
    eventually("it is measured", || peers.round_trip(&a).is_some()).await?;
    // Both are open as long as they are used: there is no room for a third one.
    let third = async || Client::connect(&address, &tls, &a, options.clone()).await;
    let begun = std::time::Instant::now();
    while begun.elapsed() < 4 * options.idle_after {
        assert!(third().await.is_err());
    }
    handler.release.notify_one();
    assert_eq!(bulk.await??, "1");
    drop(succeeds("the connection is closed", third).await?);
    // It is made again when it is needed, once the third one has ended.
    let again = async || peers.bulk_call(&a, ECHO, "3".into(), LONG).await;
    succeeds("it is made again", again).await?;
    Ok(())
}

/// Its caller may go, and another one come, as the store's thread does when a node ceases to be a voter.
#[tokio::test]
async fn an_urgent_connection_is_made_again_after_the_end_of_its_runtime() -> Outcome {
    let ca = Authority::new()?;
    let handler = Arc::new(TestHandler::default());
    let server = serve_a(&ca, &handler, Options::default()).await?;
    let (peers, a) = pool(&ca, server.address(), Options::default())?;
    let peers = Arc::new(peers);
    assert_eq!(peers.call(&a, ECHO, "0".into(), LONG).await?, "0");
    for text in ["1", "2"] {
        let (peers, a) = (peers.clone(), a.clone());
        let calling = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build()?;
            let calling = peers.urgent_call(&a, ECHO, text.into(), LONG);
            runtime.block_on(calling).map_err(std::io::Error::other)
        });
        let answer = tokio::task::spawn_blocking(move || calling.join()).await?;
        assert_eq!(answer.map_err(|_| "the thread panicked")??, text);
    }
    // The one for control is of this runtime.
    assert_eq!(peers.call(&a, ECHO, "3".into(), LONG).await?, "3");
    Ok(())
}

/// A far node may take longer to be connected than any of those wait who call it: nobody begins anew.
#[tokio::test]
async fn an_urgent_connection_is_made_whoever_gives_up_meanwhile() -> Outcome {
    let ca = Authority::new()?;
    let handler = Arc::new(TestHandler::default());
    let server = serve_a(&ca, &handler, Options::default()).await?;
    let relay = Relay::start(server.address()).await?;
    let (peers, a) = pool(&ca, relay.address, Options::default())?;
    let call = async |patience| peers.urgent_call(&a, ECHO, "1".into(), patience).await;
    for _ in 0..3 {
        let gave_up = call(Duration::from_millis(50)).await;
        assert!(matches!(gave_up, Err(RpcError::NotSent { .. })));
    }
    relay.opens.send_replace(true);
    assert_eq!(call(LONG).await?, "1");
    assert_eq!(relay.accepted(), 1);
    Ok(())
}

/// Between two looks it carries requests, though none is under way at either.
#[tokio::test]
async fn a_connection_that_is_used_now_and_then_stays() -> Outcome {
    let ca = Authority::new()?;
    let handler = Arc::new(TestHandler::default());
    let server = serve_a(&ca, &handler, Options::default()).await?;
    let relay = Relay::start(server.address()).await?;
    relay.opens.send_replace(true);
    let options = Options {
        idle_after: Duration::from_secs(1),
        ..Options::default()
    };
    let (peers, a) = pool(&ca, relay.address, options.clone())?;
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    let begun = std::time::Instant::now();
    while begun.elapsed() < 3 * options.idle_after {
        assert_eq!(peers.urgent_call(&a, ECHO, "1".into(), LONG).await?, "1");
        pace.tick().await;
    }
    assert_eq!(relay.accepted(), 1);
    Ok(())
}

/// However long it would have stayed idle.
#[tokio::test]
async fn a_removed_node_keeps_no_connection_for_bulk_data() -> Outcome {
    let ca = Authority::new()?;
    let limited = Options {
        connections_max: 1,
        ..Options::default()
    };
    let handler = Arc::new(TestHandler::default());
    let server = serve_a(&ca, &handler, limited).await?;
    let address = server.address().to_string();
    let options = Options {
        idle_after: 100 * LONG,
        ..Options::default()
    };
    let tls = ClientTls::node(&ca.node("b")?)?;
    let peers = Peers::new(tls.clone(), options.clone());
    let a = name("a");
    peers.set_address(&a, &address);
    assert_eq!(peers.bulk_call(&a, ECHO, "1".into(), LONG).await?, "1");
    let another = async || Client::connect(&address, &tls, &a, options.clone()).await;
    assert!(another().await.is_err());
    peers.remove(&a);
    succeeds("the connection is closed", another).await?;
    Ok(())
}
