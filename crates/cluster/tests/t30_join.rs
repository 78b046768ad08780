//! Identity, tokens, members, and joining over real connections.

use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use keel_cluster::authority_keys::{self, AuthorityKeys};
use keel_cluster::certificates::{self, Authorities, NODE_LIFETIME};
use keel_cluster::identity::{CertificateAuthority, ClusterId, NodeIdentity, make_csr};
use keel_cluster::join::{self, JoinError, accept_join};
use keel_cluster::members::{self, MemberError, MemberSet, Voter};
use keel_cluster::service::ClusterService;
use keel_cluster::tokens::{self, JoinToken, Role, TokenError, UserToken};
use keel_net::rpc::ServerHandle;
use keel_net::{Client, NodeName, Options, Peers, Server};
use keel_store::keys::Key;
use keel_store::{RaftStore, Store, StoreClient, Txn};
use tempfile::TempDir;
use tokio::net::TcpListener;

type Outcome = Result<(), Box<dyn Error>>;

const NOW: u64 = 1_800_000_000_000;
const HOUR: u64 = 3_600_000;

fn name(name: &str) -> NodeName {
    NodeName::new(name).expect("a valid name in the test")
}

/// A cluster of one voter, node `a`.
struct Cluster {
    authority: Arc<CertificateAuthority>,
    keys: Arc<AuthorityKeys>,
    voter: Arc<RaftStore>,
    store: Arc<dyn Store>,
    _directory: TempDir,
}

async fn cluster() -> Result<Cluster, Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("store");
    let store = Arc::new(RaftStore::open_alone(&file).await?);
    let authority = Arc::new(CertificateAuthority::create(ClusterId::random())?);
    let first = Voter {
        node: name("a"),
        address: "127.0.0.1:1".into(),
    };
    members::found(store.as_ref(), authority.cluster(), &first, NOW).await?;
    let keys = AuthorityKeys::new(Vec::new());
    keys.set(vec![authority.clone()]);
    Ok(Cluster {
        authority,
        keys,
        voter: store.clone(),
        store,
        _directory: directory,
    })
}

impl Cluster {
    async fn token(&self) -> Result<JoinToken, TokenError> {
        let hash = self.authority.fingerprint();
        tokens::create_join_token(self.store.as_ref(), hash, HOUR, NOW).await
    }

    async fn serve(&self) -> Result<(ServerHandle, Arc<MemberSet>), Box<dyn Error>> {
        let (set, _) = MemberSet::follow(self.store.clone()).await?;
        let service =
            ClusterService::new(self.voter.clone(), self.store.clone(), self.keys.clone());
        let server = Server::serve(
            TcpListener::bind("127.0.0.1:0").await?,
            NodeIdentity::first(&self.authority, &name("a"))?.server_tls()?,
            set.check(),
            Arc::new(service),
            Options::default(),
        )?;
        Ok((server, set))
    }
}

#[test]
fn identities_are_kept_private_and_whole() -> Outcome {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("identity");
    assert!(NodeIdentity::load(&path)?.is_none());
    assert!(authority_keys::load(&path)?.is_empty());
    let authority = CertificateAuthority::create(ClusterId::random())?;
    let identity = NodeIdentity::first(&authority, &name("a"))?;
    identity.save(&path)?;
    let authority = Arc::new(authority);
    authority_keys::save(&path, std::slice::from_ref(&authority))?;
    for file in std::fs::read_dir(&path)? {
        assert_eq!(file?.metadata()?.permissions().mode() & 0o777, 0o600);
    }
    let loaded = NodeIdentity::load(&path)?.ok_or("none")?;
    assert_eq!(
        (loaded.node.as_str(), loaded.cluster),
        ("a", authority.cluster())
    );
    loaded.verify()?;
    let mut again = authority_keys::load(&path)?;
    let again = again.pop().ok_or("none")?;
    assert_eq!(again.fingerprint(), authority.fingerprint());
    // What the reloaded authority signs is trusted by the old certificate.
    let csr = make_csr(&name("b"))?;
    let signed = again.sign(&csr.csr_pem, &name("b"), NODE_LIFETIME)?;
    NodeIdentity::from_pem(
        authority.cluster(),
        name("b"),
        signed,
        csr.key_pem,
        authority.certificate_pem().into(),
    )?
    .verify()?;
    Ok(())
}

#[test]
fn what_does_not_belong_together_is_refused() -> Outcome {
    let (one, two) = (
        CertificateAuthority::create(ClusterId::random())?,
        CertificateAuthority::create(ClusterId::random())?,
    );
    let mixed =
        CertificateAuthority::from_pem(one.cluster(), one.certificate_pem(), &two.key_pem());
    assert!(mixed.is_err());
    let (a, b) = (
        NodeIdentity::first(&one, &name("a"))?,
        NodeIdentity::first(&one, &name("b"))?,
    );
    let of = |node: &str, certificate: &str, key: &str, authority: &str| {
        NodeIdentity::from_pem(
            one.cluster(),
            name(node),
            certificate.into(),
            key.into(),
            authority.into(),
        )
        .and_then(|identity| identity.verify())
        .map_err(|e| e.to_string())
    };
    let ca = one.certificate_pem();
    assert_eq!(of("a", &a.certificate_pem, &a.key_pem, ca), Ok(()));
    let other_name = of("a", &b.certificate_pem, &b.key_pem, ca);
    assert!(other_name.is_err_and(|e| e.contains("for node b, not for node a")));
    assert!(of("a", &a.certificate_pem, &b.key_pem, ca).is_err());
    let foreign = of("a", &a.certificate_pem, &a.key_pem, two.certificate_pem());
    assert!(foreign.is_err_and(|e| e.contains("not signed by the cluster CA")));
    // Signing requests that are none.
    for csr in ["", "x", &a.certificate_pem, &"x".repeat(20_000)] {
        assert!(one.sign(csr, &name("a"), NODE_LIFETIME).is_err());
    }
    let mut tampered = make_csr(&name("a"))?.csr_pem;
    let middle = tampered.len() / 2;
    let swapped = if tampered.as_bytes()[middle] == b'A' {
        "B"
    } else {
        "A"
    };
    tampered.replace_range(middle..=middle, swapped);
    assert!(one.sign(&tampered, &name("a"), NODE_LIFETIME).is_err());
    Ok(())
}

#[tokio::test]
async fn tokens_go_both_ways_and_slips_are_found() -> Outcome {
    let cluster = cluster().await?;
    let token = cluster.token().await?;
    let text = token.to_string();
    assert!(text.starts_with("keel1-") && text.len() < 110, "{text}");
    assert_eq!(text.parse::<JoinToken>()?, token);
    assert_eq!(format!("  {text}\n").parse::<JoinToken>()?, token);
    for cut in 0..text.len() {
        assert!(text[..cut].parse::<JoinToken>().is_err());
    }
    for at in 6..text.len() {
        let mut slip = text.clone();
        let other = if &slip[at..=at] == "a" { "b" } else { "a" };
        slip.replace_range(at..=at, other);
        assert_ne!(slip.parse::<JoinToken>().ok(), Some(token.clone()));
    }
    assert!(text.parse::<UserToken>().is_err());
    // The store has neither secret nor token.
    for entry in cluster.store.list("").await?.entries {
        let secret = keel_store::encoding::to_cbor(&token.secret, Vec::new())?;
        assert!(!entry.value.windows(secret.len()).any(|w| w == secret));
    }
    assert!(!format!("{token:?}").contains(&text[14..40]));
    Ok(())
}

#[tokio::test]
async fn a_token_admits_one_node_once() -> Outcome {
    let cluster = cluster().await?;
    let store = cluster.store.as_ref();
    let accept = async |request: &join::JoinRequest, now| {
        accept_join(store, None, &cluster.keys, request, now)
            .await
            .map_err(|e| e.to_string())
    };
    let token = cluster.token().await?;
    let (signing, request) = join::prepare(&token, &name("b"), "127.0.0.1:2", None)?;
    // A wrong secret, an unknown token, too late: the token is still good.
    let mut wrong = request.clone();
    wrong.secret = cluster.token().await?.secret;
    assert!(
        accept(&wrong, NOW)
            .await
            .is_err_and(|e| e.contains("not valid"))
    );
    let mut wrong = request.clone();
    wrong.token ^= 1;
    assert!(
        accept(&wrong, NOW)
            .await
            .is_err_and(|e| e.contains("not valid"))
    );
    let late = accept(&request, NOW + HOUR).await;
    assert!(late.is_err_and(|e| e.contains("expired")));
    // A name that is taken.
    let (_, taken) = join::prepare(&token, &name("a"), "127.0.0.1:2", None)?;
    assert!(
        accept(&taken, NOW)
            .await
            .is_err_and(|e| e.contains("a node a already"))
    );
    let response = accept(&request, NOW).await?;
    assert_eq!(response.voters.len(), 1);
    let identity = join::conclude(signing, &response)?;
    assert_eq!(identity.node, name("b"));
    // Asked again, since the answer was lost: the same node gets it again,
    assert!(accept(&request, NOW).await.is_ok());
    // another key or another name does not.
    let (_, again) = join::prepare(&token, &name("b"), "127.0.0.1:2", None)?;
    assert!(
        accept(&again, NOW)
            .await
            .is_err_and(|e| e.contains("used by node b"))
    );
    let (_, other) = join::prepare(&token, &name("c"), "127.0.0.1:2", None)?;
    assert!(
        accept(&other, NOW)
            .await
            .is_err_and(|e| e.contains("used by node b"))
    );
    // Removed: the old request brings it back no more.
    members::remove(store, &name("b")).await?;
    assert!(accept(&request, NOW).await.is_err());
    let names: Vec<NodeName> = members::members(store)
        .await?
        .into_iter()
        .map(|m| m.node)
        .collect();
    assert_eq!(names, [name("a")]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_admits_one_node_even_when_many_ask_at_once() -> Outcome {
    let cluster = Arc::new(cluster().await?);
    for round in 0..5 {
        let token = cluster.token().await?;
        let mut asking = tokio::task::JoinSet::new();
        for i in 0..8 {
            let node = name(&format!("n{round}-{i}"));
            let (_, request) = join::prepare(&token, &node, "127.0.0.1:2", None)?;
            let cluster = cluster.clone();
            asking.spawn(async move {
                accept_join(cluster.store.as_ref(), None, &cluster.keys, &request, NOW)
                    .await
                    .is_ok()
            });
        }
        let mut admitted = 0;
        while let Some(good) = asking.join_next().await {
            admitted += u32::from(good?);
        }
        assert_eq!(admitted, 1);
    }
    assert_eq!(members::members(cluster.store.as_ref()).await?.len(), 6);
    Ok(())
}

/// The cluster's first node writes its authority to the store when others may be joining already. A
/// regression test: those were refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_join_while_the_authority_is_written() -> Outcome {
    let cluster = Arc::new(cluster().await?);
    let record = Authorities::first(&NodeIdentity::first(&cluster.authority, &name("a"))?)?;
    let mut asking = tokio::task::JoinSet::new();
    for number in 0..8 {
        let token = cluster.token().await?;
        let node = name(&format!("n-{number}"));
        let (_, request) = join::prepare(&token, &node, "127.0.0.1:2", None)?;
        let cluster = cluster.clone();
        asking.spawn(async move {
            let store = cluster.store.as_ref();
            accept_join(store, None, &cluster.keys, &request, NOW).await
        });
    }
    certificates::write(cluster.store.as_ref(), &record, None).await?;
    while let Some(admitted) = asking.join_next().await {
        admitted??;
    }
    assert_eq!(members::members(cluster.store.as_ref()).await?.len(), 9);
    Ok(())
}

#[tokio::test]
async fn expired_tokens_are_swept() -> Outcome {
    let cluster = cluster().await?;
    let (store, hash) = (cluster.store.as_ref(), cluster.authority.fingerprint());
    cluster.token().await?;
    tokens::create_join_token(store, hash, 3 * HOUR, NOW).await?;
    tokens::create_join_token(store, hash, HOUR, NOW + 2 * HOUR).await?;
    assert_eq!(store.list("token/").await?.entries.len(), 2);
    assert!(
        tokens::create_join_token(store, hash, 0, NOW)
            .await
            .is_err()
    );
    assert!(
        tokens::create_join_token(store, hash, u64::MAX, NOW)
            .await
            .is_err()
    );
    Ok(())
}

#[tokio::test]
async fn user_tokens_have_roles_and_ends() -> Outcome {
    let cluster = cluster().await?;
    let store = cluster.store.as_ref();
    let verify = async |text: &str, now| {
        tokens::verify_user_token(store, text, now)
            .await
            .map(|user| (user.name, user.role))
            .map_err(|e| e.to_string())
    };
    let ann = tokens::create_user_token(store, "ann", Role::Operator, None).await?;
    let bob = tokens::create_user_token(store, "bob", Role::Viewer, Some(NOW + 1)).await?;
    let user = verify(&ann.to_string(), NOW).await?;
    assert_eq!(user, ("ann".into(), Role::Operator));
    assert!(verify(&bob.to_string(), NOW).await.is_ok());
    let late = verify(&bob.to_string(), NOW + 1).await;
    assert!(late.is_err_and(|e| e.contains("expired")));
    let forged = UserToken {
        id: ann.id,
        secret: bob.secret,
    };
    assert!(
        verify(&forged.to_string(), NOW)
            .await
            .is_err_and(|e| e.contains("not valid"))
    );
    assert!(verify("keelu1-abc", NOW).await.is_err());
    assert_eq!(tokens::list_tokens(store).await?.len(), 2);
    assert!(tokens::remove_token(store, ann.id).await?);
    assert!(!tokens::remove_token(store, ann.id).await?);
    assert!(verify(&ann.to_string(), NOW).await.is_err());
    assert!(Role::Admin.includes(Role::Operator) && !Role::Viewer.includes(Role::Operator));
    assert_eq!("admin".parse::<Role>()?.to_string(), "admin");
    assert!("root".parse::<Role>().is_err());
    Ok(())
}

#[tokio::test]
async fn members_are_founded_changed_and_removed() -> Outcome {
    let cluster = cluster().await?;
    let store = cluster.store.as_ref();
    let first = Voter {
        node: name("a"),
        address: "127.0.0.1:1".into(),
    };
    let id = cluster.authority.cluster();
    members::found(store, id, &first, NOW).await?;
    let other = members::found(store, ClusterId::random(), &first, NOW).await;
    assert!(matches!(other, Err(MemberError::OtherCluster(found)) if found == id));
    assert_eq!(members::cluster_of(store).await?, (id, 1));
    members::set_address(store, &name("a"), "host.example:7").await?;
    assert_eq!(members::members(store).await?[0].address, "host.example:7");
    for bad in [
        "",
        "host",
        ":1",
        "host:",
        "host:0",
        "host:70000",
        "a b:1",
        "a\n:1",
    ] {
        assert!(members::check_address(bad).is_err(), "{bad:?}");
    }
    assert!(members::check_address("[::1]:80").is_ok());
    let absent = members::set_address(store, &name("z"), "h:1").await;
    assert!(matches!(absent, Err(MemberError::NotAMember(_))));
    // A node with machines stays.
    let machine = keel_net::MachineName::new("web")?;
    let entry = Key::Schedule(name("a"), machine);
    store.txn(Txn::new().put(entry.clone(), "")).await?;
    let busy = members::remove(store, &name("a")).await;
    assert!(busy.is_err_and(|e| e.to_string().contains("keel drain a")));
    store.txn(Txn::new().delete(entry)).await?;
    members::remove(store, &name("a")).await?;
    let gone = members::remove(store, &name("a")).await;
    assert!(matches!(gone, Err(MemberError::NotAMember(_))));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_works_and_is_removed() -> Outcome {
    let cluster = cluster().await?;
    let (server, set) = cluster.serve().await?;
    let via = server.address().to_string();
    // The service checks expiry by the wall clock.
    let store = cluster.store.as_ref();
    let hash = cluster.authority.fingerprint();
    let now = keel_store::clock::unix_ms();
    let token = tokens::create_join_token(store, hash, HOUR, now).await?;
    let token: JoinToken = token.to_string().parse()?;
    let (identity, voters) = join::join(&via, &token, &name("b"), "127.0.0.1:2", None).await?;
    assert_eq!(voters[0].node, name("a"));
    let mut changes = set.changes();
    let seen = async {
        changes
            .wait_for(|()| set.contains(&name("b")))
            .await
            .map(drop)
    };
    tokio::time::timeout(Duration::from_secs(10), seen).await??;
    // It uses the store as a member.
    let peers = Arc::new(Peers::new(identity.client_tls()?, Options::default()));
    peers.set_address(&name("a"), &via);
    let remote = StoreClient::new(peers, vec![name("a")], Duration::from_secs(10));
    remote.txn(Txn::new().put("node/b", "")).await?;
    // The same token again, from another node.
    let again = join::join(&via, &token, &name("c"), "127.0.0.1:3", None).await;
    assert!(again.is_err_and(|e| e.to_string().contains("used by node b")));
    // A token of another cluster.
    let foreign = CertificateAuthority::create(ClusterId::random())?;
    let mut lure = token.clone();
    lure.authority = foreign.fingerprint();
    let lured = join::join(&via, &lure, &name("c"), "127.0.0.1:3", None).await;
    assert!(lured.is_err_and(|e| e.to_string().contains("for another cluster")));
    // Removed: refused at once, on the connection it has.
    members::remove(store, &name("b")).await?;
    let seen = async {
        changes
            .wait_for(|()| !set.contains(&name("b")))
            .await
            .map(drop)
    };
    tokio::time::timeout(Duration::from_secs(10), seen).await??;
    assert!(remote.txn(Txn::new().put("node/b", "")).await.is_err());
    let message = remote.get("node/b").await.err().ok_or("read")?.to_string();
    assert!(message.contains("removed from the cluster"), "{message}");
    assert!(store.get("node/b").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn an_anonymous_peer_can_only_join() -> Outcome {
    let cluster = cluster().await?;
    let (server, _set) = cluster.serve().await?;
    let tls = keel_net::ClientTls::join(cluster.authority.fingerprint())?;
    let address = server.address().to_string();
    let client = Client::connect_unnamed(&address, &tls, Options::default()).await?;
    for asked in keel_store::encoding::kind::GET..=keel_store::encoding::kind::REVISION {
        let answer = client
            .call(
                asked,
                keel_net::Bytes::from_static(&[1, 0]),
                Duration::from_secs(10),
            )
            .await;
        let message = answer.err().ok_or("answered")?.to_string();
        assert!(message.contains("an anonymous peer may not"), "{message}");
    }
    let junk = client
        .call(
            join::JOIN,
            keel_net::Bytes::from_static(&[1, 0]),
            Duration::from_secs(10),
        )
        .await;
    assert!(junk.is_err_and(|e| e.to_string().contains("a join request cannot be read")));
    let unknown: Result<_, JoinError> = async {
        let token = cluster.token().await?;
        let (_, mut request) = join::prepare(&token, &name("b"), "h:1", None)?;
        request.address = "nowhere".into();
        accept_join(cluster.store.as_ref(), None, &cluster.keys, &request, NOW).await
    }
    .await;
    assert!(matches!(
        unknown,
        Err(JoinError::Member(MemberError::Address(_)))
    ));
    Ok(())
}
