//! Authentication: each pairing of configurations, and the error of its refusal.

mod common;

use std::time::Duration;

use common::{Authority, Outcome, name};
use keel_net::tls::{NodeCredentials, node_of};
use keel_net::{ClientTls, Fingerprint, NodeName, PeerId, PinnedIdentity, ServerTls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const LIMIT: Duration = Duration::from_secs(10);

/// One connection: what each side sees. The client also reads a byte, since
/// only that shows it the server's refusal.
async fn meet(
    server: ServerTls,
    client: ClientTls,
    expected: Option<NodeName>,
) -> Result<(Result<PeerId, String>, Result<(), String>), Box<dyn std::error::Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let serving = async {
        let (stream, from) = listener.accept().await.map_err(|e| e.to_string())?;
        let (mut stream, peer) = server
            .accept(stream, &from.to_string(), LIMIT)
            .await
            .map_err(|e| e.to_string())?;
        stream.write_all(b"!").await.map_err(|e| e.to_string())?;
        stream.shutdown().await.ok();
        Ok(peer)
    };
    let connecting = async {
        let mut stream = client
            .connect(&address, expected.as_ref(), LIMIT)
            .await
            .map_err(|e| e.to_string())?;
        let version = stream.get_ref().1.protocol_version();
        assert_eq!(version, Some(rustls::ProtocolVersion::TLSv1_3));
        stream.read_u8().await.map_err(|e| e.to_string())?;
        Ok(())
    };
    Ok(tokio::join!(serving, connecting))
}

#[tokio::test]
async fn nodes_of_one_cluster_know_each_other_by_name() -> Outcome {
    let ca = Authority::new()?;
    let (server, client) = meet(
        ServerTls::node(&ca.node("a")?)?,
        ClientTls::node(&ca.node("b")?)?,
        Some(name("a")),
    )
    .await?;
    assert_eq!(server, Ok(PeerId::Node(name("b"))));
    assert_eq!(client, Ok(()));
    Ok(())
}

#[tokio::test]
async fn another_node_at_the_address_is_named() -> Outcome {
    let ca = Authority::new()?;
    let (_, client) = meet(
        ServerTls::node(&ca.node("a")?)?,
        ClientTls::node(&ca.node("b")?)?,
        Some(name("c")),
    )
    .await?;
    let message = client.err().unwrap_or_default();
    assert!(
        message.contains("node c at 127.0.0.1")
            && message.contains("another node answered")
            && message.contains("a.node.keel"),
        "{message}"
    );
    Ok(())
}

#[tokio::test]
async fn a_foreign_cluster_is_refused_on_both_sides() -> Outcome {
    let (ca, other) = (Authority::new()?, Authority::new()?);
    // The client refuses the server.
    let (_, client) = meet(
        ServerTls::node(&other.node("a")?)?,
        ClientTls::node(&ca.node("b")?)?,
        Some(name("a")),
    )
    .await?;
    let message = client.err().unwrap_or_default();
    assert!(message.contains("of another cluster"), "{message}");
    // The server refuses the client, which trusts the server.
    let mut foreign = other.node("b")?;
    foreign.authorities = vec![ca.certificate()];
    let (server, client) = meet(
        ServerTls::node(&ca.node("a")?)?,
        ClientTls::node(&foreign)?,
        Some(name("a")),
    )
    .await?;
    assert!(server.is_err_and(|e| e.contains("of another cluster")));
    assert!(client.is_err());
    Ok(())
}

#[tokio::test]
async fn anonymous_peers_enter_only_where_they_may() -> Outcome {
    let ca = Authority::new()?;
    let node = ca.node("a")?;
    let join = || ClientTls::join(Fingerprint::of(&ca.certificate()));
    let (server, client) = meet(ServerTls::node_or_anonymous(&node)?, join()?, None).await?;
    assert_eq!(server, Ok(PeerId::Anonymous));
    assert_eq!(client, Ok(()));
    let (server, client) = meet(ServerTls::node(&node)?, join()?, None).await?;
    assert!(server.is_err_and(|e| e.contains("presented no certificate")));
    assert!(client.is_err());
    // A node is still identified where anonymous peers may connect.
    let (server, _) = meet(
        ServerTls::node_or_anonymous(&node)?,
        ClientTls::node(&ca.node("b")?)?,
        Some(name("a")),
    )
    .await?;
    assert_eq!(server, Ok(PeerId::Node(name("b"))));
    Ok(())
}

#[tokio::test]
async fn a_join_token_trusts_one_authority() -> Outcome {
    let (ca, other) = (Authority::new()?, Authority::new()?);
    let join = || ClientTls::join(Fingerprint::of(&ca.certificate()));
    let server = |c: &NodeCredentials| ServerTls::node_or_anonymous(c);
    let (_, client) = meet(server(&other.node("a")?)?, join()?, None).await?;
    assert!(client.is_err_and(|e| e.contains("for another cluster")));
    // The right CA shown, but the certificate is not signed by it.
    let mut liar = other.node("a")?;
    liar.chain.push(ca.certificate());
    let (_, client) = meet(server(&liar)?, join()?, None).await?;
    assert!(client.is_err_and(|e| e.contains("of another cluster")));
    // Signed by it, but not a node.
    let (_, client) = meet(server(&ca.issue(vec!["user.keel".into()])?)?, join()?, None).await?;
    assert!(client.is_err_and(|e| e.contains("names no node")));
    Ok(())
}

#[tokio::test]
async fn a_certificate_that_names_no_node_or_two_is_refused() -> Outcome {
    let ca = Authority::new()?;
    let names = |names: &[&str]| ca.issue(names.iter().map(|n| (*n).into()).collect());
    for certificate in [
        names(&["user.keel"])?,
        names(&["b.node.keel", "c.node.keel"])?,
        names(&["b.c.node.keel"])?,
    ] {
        assert_eq!(node_of(&certificate.chain[0]), None);
        let (server, _) = meet(
            ServerTls::node(&ca.node("a")?)?,
            ClientTls::node(&certificate)?,
            Some(name("a")),
        )
        .await?;
        assert!(server.is_err_and(|e| e.contains("names no node of this cluster")));
    }
    Ok(())
}

#[tokio::test]
async fn pinned_workers_know_each_other_by_fingerprint() -> Outcome {
    let (source, target, other) = (
        PinnedIdentity::generate()?,
        PinnedIdentity::generate()?,
        PinnedIdentity::generate()?,
    );
    let (server, client) = meet(
        ServerTls::pinned(&target, source.fingerprint)?,
        ClientTls::pinned(&source, target.fingerprint)?,
        None,
    )
    .await?;
    assert_eq!(server, Ok(PeerId::Pinned(source.fingerprint)));
    assert_eq!(client, Ok(()));
    // The client is another one.
    let (server, client) = meet(
        ServerTls::pinned(&target, source.fingerprint)?,
        ClientTls::pinned(&other, target.fingerprint)?,
        None,
    )
    .await?;
    assert!(server.is_err_and(|e| e.contains(&other.fingerprint.to_string())));
    assert!(client.is_err());
    // The server is another one.
    let (_, client) = meet(
        ServerTls::pinned(&other, source.fingerprint)?,
        ClientTls::pinned(&source, target.fingerprint)?,
        None,
    )
    .await?;
    assert!(client.is_err_and(|e| e.contains("another one than was agreed on")));
    Ok(())
}

/// Having the pinned certificate is not enough: its key must sign.
#[tokio::test]
async fn a_stolen_certificate_without_its_key_is_useless() -> Outcome {
    let (source, target) = (PinnedIdentity::generate()?, PinnedIdentity::generate()?);
    let thief = PinnedIdentity::generate()?;
    let stolen = PinnedIdentity {
        cert: target.cert.clone(),
        key: thief.key.clone_key(),
        fingerprint: target.fingerprint,
    };
    // rustls itself refuses a key that does not fit the certificate.
    assert!(ServerTls::pinned(&stolen, source.fingerprint).is_err());
    assert!(ClientTls::pinned(&stolen, source.fingerprint).is_err());
    // A server without that check: the signature gives it away.
    let provider = rustls::crypto::ring::default_provider();
    let key = provider
        .key_provider
        .load_private_key(rustls::pki_types::PrivateKeyDer::Pkcs8(
            thief.key.clone_key(),
        ))?;
    let certified = rustls::sign::CertifiedKey::new(vec![target.cert.clone()], key);
    let resolver = rustls::sign::SingleCertAndKey::from(certified);
    let config = rustls::ServerConfig::builder_with_provider(provider.into())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(std::sync::Arc::new(resolver));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let serving = async {
        let (stream, _) = listener.accept().await?;
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
        acceptor.accept(stream).await.map(drop)
    };
    let client = ClientTls::pinned(&source, target.fingerprint)?;
    let (server, client) = tokio::join!(serving, client.connect(&address, None, LIMIT));
    assert!(server.is_err());
    let message = client.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(
        message.contains("of another cluster") || message.contains("ignature"),
        "{message}"
    );
    Ok(())
}

#[tokio::test]
async fn failures_name_address_and_remedy() -> Outcome {
    let ca = Authority::new()?;
    let client = ClientTls::node(&ca.node("b")?)?;
    // No listener.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    drop(listener);
    let message = client
        .connect(&address, Some(&name("a")), LIMIT)
        .await
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    assert!(
        message.contains("node a") && message.contains(&address) && message.contains("keel up"),
        "{message}"
    );
    // A listener that sends nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let message = client
        .connect(&address, Some(&name("a")), Duration::from_millis(50))
        .await
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    assert!(message.contains("within 50 ms"), "{message}");
    // A listener with another protocol.
    let talking = async {
        let (mut stream, _) = listener.accept().await?;
        let (mut stream2, _) = listener.accept().await?;
        stream.shutdown().await.ok();
        stream2.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await
    };
    let expected = name("a");
    let (_, refused) = tokio::join!(talking, client.connect(&address, Some(&expected), LIMIT));
    let message = refused.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message.contains("does not speak TLS"), "{message}");
    Ok(())
}

#[test]
fn fingerprints_go_both_ways() -> Outcome {
    let identity = PinnedIdentity::generate()?;
    let text = identity.fingerprint.to_string();
    assert_eq!(text.len(), 64);
    assert_eq!(text.parse::<Fingerprint>()?, identity.fingerprint);
    assert!("ab".parse::<Fingerprint>().is_err());
    Ok(())
}

#[test]
fn unusable_credentials_are_named() {
    let error = NodeCredentials::from_pem("", "", "x").map(drop);
    let message = error.err().map(|e| e.to_string()).unwrap_or_default();
    assert!(
        message.contains("certificate of the cluster CA"),
        "{message}"
    );
}
