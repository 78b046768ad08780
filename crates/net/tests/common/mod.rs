//! A tiny certificate authority and servers for the tests.
#![allow(dead_code, unreachable_pub)]

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use keel_net::rpc::{MemberCheck, ServerHandle};
use keel_net::tls::NodeCredentials;
use keel_net::{Handler, NodeName, Options, Server, ServerTls};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;

pub type Outcome = Result<(), Box<dyn Error>>;

pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new() -> Result<Self, Box<dyn Error>> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        Ok(Self(CertifiedIssuer::self_signed(params, key)?))
    }

    pub fn certificate(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    pub fn node(&self, name: &str) -> Result<NodeCredentials, Box<dyn Error>> {
        self.issue(vec![NodeName::new(name)?.dns()])
    }

    pub fn issue(&self, names: Vec<String>) -> Result<NodeCredentials, Box<dyn Error>> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names)?;
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.0)?;
        Ok(NodeCredentials {
            chain: vec![certificate.der().clone(), self.certificate()],
            key: PrivateKeyDer::from(key),
            authorities: vec![self.certificate()],
        })
    }
}

pub fn name(name: &str) -> NodeName {
    NodeName::new(name).expect("a valid name in the test")
}

pub async fn serve(
    tls: ServerTls,
    member: MemberCheck,
    handler: Arc<dyn Handler>,
    options: Options,
) -> Result<ServerHandle, Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    Ok(Server::serve(listener, tls, member, handler, options)?)
}

/// Waits until `condition` holds, at most ten seconds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) -> Outcome {
    for _ in 0..1000 {
        if condition() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(format!("never happened: {what}").into())
}

/// Waits until `attempt` succeeds, at most ten seconds: what it returned then.
pub async fn succeeds<T, E: std::fmt::Display>(
    what: &str,
    attempt: impl AsyncFn() -> Result<T, E>,
) -> Result<T, Box<dyn Error>> {
    let begun = std::time::Instant::now();
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) if begun.elapsed() > Duration::from_secs(10) => {
                return Err(format!("never happened: {what}: {error}").into());
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
