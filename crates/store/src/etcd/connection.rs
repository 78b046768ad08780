//! The way to etcd's members: which one is asked, log-in, time limits, and what an error means.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::codec::Streaming;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::messages::{AuthenticateRequest, AuthenticateResponse};
use crate::interface::{LIST_BYTES_MAX, StoreError};

/// Time to connect to a member.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// Time for a member to answer what can be repeated; another may be faster.
const MEMBER_PATIENCE: Duration = Duration::from_millis(1500);
/// Time for a member to renew a lease, of at least 2 s, and for all of them together.
const RENEWAL_MEMBER_PATIENCE: Duration = Duration::from_millis(600);
const RENEWAL_PATIENCE: Duration = Duration::from_millis(2000);
/// Pause before the members are tried again.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// Interval of pings on connections; etcd refuses more frequent ones.
const PING_EVERY: Duration = Duration::from_secs(6);

/// Where etcd is, and who logs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    /// Members, `host:port`. At least one.
    pub members: Vec<String>,
    /// What all keys of this cluster begin with, without a slash: one etcd may serve several
    /// clusters.
    pub prefix: String,
    /// User and password, for an etcd that asks for them.
    pub user: Option<(String, String)>,
    /// TLS, if this is given.
    pub tls: Option<EtcdTls>,
    /// Time for one request in total.
    pub timeout: Duration,
}

/// PEM files for TLS connections to etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// Authority of etcd's certificates.
    pub authority: PathBuf,
    /// Certificate and key of this client, for an etcd that asks for them.
    pub client: Option<(PathBuf, PathBuf)>,
}

impl EtcdOptions {
    /// Reads `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`. The prefix is `keel` if none is given.
    ///
    /// # Errors
    /// A sentence about what is wrong.
    pub fn from_address(address: &str) -> Result<Self, String> {
        let form = "etcd://HOST:PORT[,HOST:PORT...][/PREFIX]";
        let rest = address
            .strip_prefix("etcd://")
            .ok_or_else(|| format!("`{address}` is not of the form {form}"))?;
        let (members, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let members: Vec<String> = members.split(',').map(str::to_owned).collect();
        for member in &members {
            let port = member
                .rsplit_once(':')
                .map(|(host, port)| (host, port.parse::<u16>()));
            if !matches!(port, Some((host, Ok(_))) if !host.is_empty()) || member.contains('@') {
                return Err(format!("`{member}` is not HOST:PORT; the form is {form}"));
            }
        }
        // One part only: no cluster's keys are under those of another.
        if prefix.contains('/') {
            return Err(format!(
                "the prefix `{prefix}` has a `/`; the form is {form}"
            ));
        }
        Ok(Self {
            members,
            prefix: if prefix.is_empty() { "keel" } else { prefix }.to_owned(),
            user: None,
            tls: None,
            timeout: Duration::from_secs(5),
        })
    }
}

/// How often a request may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// None, or the same when it is repeated.
    Repeatable,
    /// A lease gets its full time again. The same when it is repeated, and useless when late.
    Renewal,
    /// The change may have been made.
    Changes,
}

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The lease of the request has ended or never was.
    NoLease,
    Store(StoreError),
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NoLease => StoreError::Invalid {
                reason: "etcd knows no such lease".into(),
            },
            Failure::Store(error) => error,
        }
    }
}

/// What a member's error means for the request.
enum Verdict {
    /// Certainly not executed; another member, or a later attempt, may answer.
    Retry,
    /// The log-in is over. Not executed.
    LogIn,
    /// The answer was lost.
    Lost,
    Final(Failure),
}

/// Connections to the members of one etcd.
pub(super) struct Connections {
    endpoints: Vec<Endpoint>,
    channels: Vec<Mutex<Option<Channel>>>,
    /// Index of the member that answered last.
    current: AtomicUsize,
    user: Option<(String, String)>,
    token: Mutex<Option<MetadataValue<Ascii>>>,
    timeout: Duration,
}

impl Connections {
    /// # Errors
    /// A sentence if an address or a file cannot be used.
    pub(super) async fn new(options: &EtcdOptions) -> Result<Self, String> {
        let tls = match &options.tls {
            Some(tls) => Some(tls_config(tls).await?),
            None => None,
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut endpoints = Vec::with_capacity(options.members.len());
        for member in &options.members {
            let wrong = |error: tonic::transport::Error| format!("{member}: {}", explain(&error));
            let mut endpoint = Endpoint::from_shared(format!("{scheme}://{member}"))
                .map_err(wrong)?
                .connect_timeout(CONNECT_PATIENCE)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(PING_EVERY)
                .keep_alive_timeout(PING_EVERY)
                .keep_alive_while_idle(true);
            if let Some(tls) = &tls {
                endpoint = endpoint.tls_config(tls.clone()).map_err(wrong)?;
            }
            endpoints.push(endpoint);
        }
        if endpoints.is_empty() {
            return Err("no member of etcd is named".into());
        }
        Ok(Self {
            channels: endpoints.iter().map(|_| Mutex::default()).collect(),
            endpoints,
            current: AtomicUsize::new(0),
            user: options.user.clone(),
            token: Mutex::default(),
            timeout: options.timeout,
        })
    }

    fn kept(&self, member: usize) -> Option<Channel> {
        let kept = self.channels[member].lock();
        kept.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, member: usize, channel: Option<Channel>) {
        let kept = self.channels[member].lock();
        *kept.unwrap_or_else(PoisonError::into_inner) = channel;
    }

    async fn channel(&self, member: usize) -> Result<Channel, String> {
        if let Some(channel) = self.kept(member) {
            return Ok(channel);
        }
        let endpoint = &self.endpoints[member];
        let channel = tokio::time::timeout(CONNECT_PATIENCE, endpoint.connect()).await;
        let channel = channel.map_err(|_| "no connection in time".to_owned());
        let channel = channel.and_then(|it| it.map_err(|error| explain(&error)));
        let channel = channel.map_err(|reason| format!("{}: {reason}", self.name(member)))?;
        self.keep(member, Some(channel.clone()));
        Ok(channel)
    }

    fn name(&self, member: usize) -> String {
        let uri = self.endpoints[member].uri();
        uri.authority()
            .map_or_else(String::new, |it| it.to_string())
    }

    fn token(&self) -> Option<MetadataValue<Ascii>> {
        let token = self.token.lock();
        token.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = self.token() {
            request.metadata_mut().insert("token", token);
        }
        request
    }

    /// Logs in at a member, if there is a user.
    async fn log_in(&self, channel: &Channel) -> Result<(), Status> {
        let Some((name, password)) = self.user.clone() else {
            return Err(Status::unauthenticated(
                "etcd asks for a user and a password",
            ));
        };
        let message = AuthenticateRequest { name, password };
        let answer: AuthenticateResponse = call(
            channel,
            "/etcdserverpb.Auth/Authenticate",
            Request::new(message),
        )
        .await?;
        let token = answer.token.parse();
        let token = token.map_err(|_| Status::internal("etcd's token cannot be sent back"))?;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(())
    }

    /// Asks the members in turn until one answers, the request's fate is unknown, or its time is
    /// over.
    pub(super) async fn ask<Q, A>(
        &self,
        path: &'static str,
        message: Q,
        effect: Effect,
    ) -> Result<A, Failure>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.try_members(effect, |channel| {
            let request = self.authorized(message.clone());
            async move { call(&channel, path, request).await }
        })
        .await
    }

    /// Opens a stream in both directions; `requests` is asked for one for each attempt.
    pub(super) async fn stream<Q, A, S>(
        &self,
        path: &'static str,
        requests: impl Fn() -> S,
    ) -> Result<Streaming<A>, Failure>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
        S: futures::Stream<Item = Q> + Send + 'static,
    {
        self.try_members(Effect::Repeatable, |channel| {
            open(channel, path, self.authorized(requests()))
        })
        .await
    }

    /// Asks as [`Connections::ask`] what etcd answers on streams only: one request, one answer.
    pub(super) async fn ask_for_one<Q, A>(
        &self,
        path: &'static str,
        message: Q,
        effect: Effect,
    ) -> Result<A, Failure>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.try_members(effect, |channel| {
            let request = self.authorized(futures::stream::iter([message.clone()]));
            async move {
                let mut answers = open::<Q, A, _>(channel, path, request).await?;
                let answer = answers.message().await?;
                answer.ok_or_else(|| Status::unavailable("the stream ended"))
            }
        })
        .await
    }

    async fn try_members<T, F>(
        &self,
        effect: Effect,
        attempt: impl Fn(Channel) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let (total, patience) = match effect {
            Effect::Repeatable => (self.timeout, MEMBER_PATIENCE),
            Effect::Renewal => (self.timeout.min(RENEWAL_PATIENCE), RENEWAL_MEMBER_PATIENCE),
            Effect::Changes => (self.timeout, self.timeout),
        };
        let count = self.endpoints.len();
        let deadline = Instant::now() + total;
        let mut missing = Vec::new();
        let mut has_logged_in = false;
        loop {
            missing.clear();
            // Once more than there are members: a log-in takes an attempt.
            for _ in 0..=count {
                let member = self.current.load(Ordering::Relaxed) % count;
                let next = || self.current.store((member + 1) % count, Ordering::Relaxed);
                let channel = match self.channel(member).await {
                    Ok(channel) => channel,
                    Err(reason) => {
                        missing.push(reason);
                        next();
                        continue;
                    }
                };
                let rest = deadline.saturating_duration_since(Instant::now());
                let patience = if count > 1 { rest.min(patience) } else { rest };
                let answer = tokio::time::timeout(patience, attempt(channel.clone())).await;
                let status = match answer {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(status)) => status,
                    Err(_) => Status::deadline_exceeded("no answer in time"),
                };
                let name = self.name(member);
                match verdict(&status, effect) {
                    Verdict::Final(failure) => return Err(failure),
                    Verdict::Lost => {
                        self.keep(member, None);
                        next();
                        let reason = format!("etcd at {name}: {}", status.message());
                        return Err(Failure::Store(StoreError::Unknown { reason }));
                    }
                    Verdict::LogIn => {
                        if has_logged_in {
                            return Err(unavailable(format!("etcd: {}", status.message())));
                        }
                        has_logged_in = true;
                        let logging_in = self.log_in(&channel);
                        match tokio::time::timeout(MEMBER_PATIENCE, logging_in).await {
                            Ok(Ok(())) => {}
                            Ok(Err(status)) => {
                                let reason = format!("cannot log in at etcd: {}", status.message());
                                return Err(unavailable(reason));
                            }
                            Err(_) => next(),
                        }
                    }
                    Verdict::Retry => {
                        missing.push(format!("{name}: {}", status.message()));
                        self.keep(member, None);
                        next();
                    }
                }
                if Instant::now() >= deadline {
                    break;
                }
            }
            if Instant::now() + RETRY_AFTER >= deadline {
                missing.dedup();
                return Err(unavailable(format!("etcd: {}", missing.join("; "))));
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }
}

fn unavailable(reason: String) -> Failure {
    Failure::Store(StoreError::unavailable(reason))
}

async fn ready(grpc: &mut Grpc<Channel>) -> Result<(), Status> {
    let ready = grpc.ready().await;
    // Nothing was sent.
    ready.map_err(|error| Status::aborted(explain(&error)))
}

async fn open<Q, A, S>(
    channel: Channel,
    path: &'static str,
    requests: Request<S>,
) -> Result<Streaming<A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
    S: futures::Stream<Item = Q> + Send + 'static,
{
    let mut grpc = Grpc::new(channel).max_decoding_message_size(LIST_BYTES_MAX);
    ready(&mut grpc).await?;
    let codec = ProstCodec::<Q, A>::default();
    let opened = grpc
        .streaming(requests, PathAndQuery::from_static(path), codec)
        .await;
    Ok(opened?.into_inner())
}

async fn call<Q, A>(channel: &Channel, path: &'static str, request: Request<Q>) -> Result<A, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let mut grpc = Grpc::new(channel.clone()).max_decoding_message_size(LIST_BYTES_MAX);
    ready(&mut grpc).await?;
    let codec = ProstCodec::<Q, A>::default();
    let answer = grpc
        .unary(request, PathAndQuery::from_static(path), codec)
        .await;
    Ok(answer?.into_inner())
}

/// What a member's error means (etcd's `rpctypes/error.go`).
fn verdict(status: &Status, effect: Effect) -> Verdict {
    let says = |text: &str| status.message().contains(text);
    let invalid = || {
        Verdict::Final(Failure::Store(StoreError::Invalid {
            reason: format!("etcd: {}", status.message()),
        }))
    };
    if says("requested lease not found") {
        return Verdict::Final(Failure::NoLease);
    }
    if never_connected(status) {
        return Verdict::Retry;
    }
    match status.code() {
        Code::Unauthenticated => Verdict::LogIn,
        // (etcd reports a missing log-in so, too, and one of before its users were changed.)
        Code::InvalidArgument if says("user name is empty") || says("auth store is old") => {
            Verdict::LogIn
        }
        Code::PermissionDenied => Verdict::Final(unavailable(format!(
            "etcd does not permit it: {} (its user needs to read and write under the prefix)",
            status.message()
        ))),
        Code::InvalidArgument | Code::ResourceExhausted
            if says("too many operations") || says("too large") || says("larger than max") =>
        {
            Verdict::Final(unavailable(format!(
                "etcd: {}; start it with {}",
                status.message(),
                super::LIMIT_SETTINGS
            )))
        }
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => invalid(),
        Code::ResourceExhausted if says("database space exceeded") => {
            Verdict::Final(unavailable(format!(
                "etcd: {} (compact and defragment it, then clear the alarm)",
                status.message()
            )))
        }
        // Refused before it was proposed, or not sent.
        Code::ResourceExhausted | Code::Aborted | Code::FailedPrecondition => Verdict::Retry,
        Code::Unavailable if says("etcdserver: no leader") || says("not started") => Verdict::Retry,
        _ if effect == Effect::Changes => Verdict::Lost,
        _ => Verdict::Retry,
    }
}

/// Whether a lost connection could not be made again: then nothing was sent.
fn never_connected(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// An error with its causes, none of them twice.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}

async fn tls_config(tls: &EtcdTls) -> Result<ClientTlsConfig, String> {
    let read = async |path: &PathBuf| {
        let read = tokio::fs::read(path).await;
        read.map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let authority = Certificate::from_pem(read(&tls.authority).await?);
    let config = ClientTlsConfig::new().ca_certificate(authority);
    Ok(match &tls.client {
        Some((certificate, key)) => {
            let identity = Identity::from_pem(read(certificate).await?, read(key).await?);
            config.identity(identity)
        }
        None => config,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let options = EtcdOptions::from_address("etcd://a:2379,b.example:2380/site-1").unwrap();
        assert_eq!(options.members, ["a:2379", "b.example:2380"]);
        assert_eq!(options.prefix, "site-1");
        let options = EtcdOptions::from_address("etcd://[::1]:2379").unwrap();
        assert_eq!(options.members, ["[::1]:2379"]);
        assert_eq!(options.prefix, "keel");
        for wrong in [
            "",
            "http://a:1",
            "etcd://",
            "etcd://a",
            "etcd://a:x",
            "etcd://:1",
            "etcd://a:1,,b:2",
            "etcd://user:secret@a:1",
            "etcd://a:1/site/one",
        ] {
            let error = EtcdOptions::from_address(wrong).unwrap_err();
            assert!(error.contains("HOST:PORT"), "{wrong}: {error}");
        }
    }

    #[test]
    fn only_what_certainly_did_nothing_is_repeated() {
        // Tokens of the kind JWT are older than a change of the users.
        for text in [
            "etcdserver: revision of auth store is old",
            "etcdserver: user name is empty",
        ] {
            let status = Status::invalid_argument(text);
            assert!(matches!(verdict(&status, Effect::Changes), Verdict::LogIn));
        }
        let refused = tonic::ConnectError("connection refused".into());
        let refused = Status::from_error(Box::new(refused));
        assert!(matches!(verdict(&refused, Effect::Changes), Verdict::Retry));
        let status = |code, text: &str| Status::new(code, text.to_owned());
        for (status, is_lost) in [
            (
                status(Code::Unavailable, "etcdserver: request timed out"),
                true,
            ),
            (
                status(Code::Unavailable, "etcdserver: leader changed"),
                true,
            ),
            (status(Code::Unavailable, "connection reset"), true),
            (status(Code::Unknown, "h2 protocol error"), true),
            (status(Code::DeadlineExceeded, ""), true),
            (status(Code::Cancelled, ""), true),
            (status(Code::Internal, ""), true),
            (status(Code::Unavailable, "etcdserver: no leader"), false),
            (
                status(Code::ResourceExhausted, "etcdserver: too many requests"),
                false,
            ),
        ] {
            let lost = matches!(verdict(&status, Effect::Changes), Verdict::Lost);
            assert_eq!(lost, is_lost, "{status}");
            assert!(
                matches!(verdict(&status, Effect::Repeatable), Verdict::Retry),
                "{status}"
            );
        }
    }
}
