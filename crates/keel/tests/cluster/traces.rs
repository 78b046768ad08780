//! Traces of moves, received as a collector of OpenTelemetry receives them: OTLP over gRPC.

use keel_machine::moves::Ending;
use keel_testkit::{Guest, LocalCluster, guest, wait_for};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

const KEEL: &str = env!("CARGO_BIN_EXE_keel");

/// A span, and the node that sent it.
#[derive(Debug, Clone)]
struct Received {
    node: String,
    span: Span,
}

impl Received {
    fn is_root(&self) -> bool {
        self.span.parent_span_id.is_empty()
    }

    fn attribute(&self, name: &str) -> Option<Value> {
        attribute(&self.span.attributes, name)
    }

    /// Why it failed, if it did.
    fn failure(&self) -> Option<&str> {
        let status = self.span.status.as_ref()?;
        (status.code() == StatusCode::Error).then_some(&*status.message)
    }
}

fn attribute(attributes: &[KeyValue], name: &str) -> Option<Value> {
    let mut found = attributes.iter().filter(|it| it.key == name);
    found.next()?.value.clone()?.value
}

#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<Received>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for group in request.into_inner().resource_spans {
            let resource = group.resource.unwrap_or_default().attributes;
            assert_eq!(
                attribute(&resource, "service.name"),
                Some(Value::StringValue("keel".into()))
            );
            let Some(Value::StringValue(node)) = attribute(&resource, "service.instance.id") else {
                return Err(tonic::Status::invalid_argument("of no node"));
            };
            let spans = group.scope_spans.into_iter().flat_map(|it| it.spans);
            all.extend(spans.map(|span| Received {
                node: node.clone(),
                span,
            }));
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Serves until the test ends.
    async fn serve(&self, address: SocketAddr) {
        let listener = TcpListener::bind(address).await.expect("the address");
        let incoming = TcpIncoming::from(listener);
        let service = TraceServiceServer::new(self.clone());
        let server = Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(incoming));
    }

    /// All spans of the first trace that begins with one of this node's, once the other nodes' part
    /// of it has ended too.
    async fn trace(&self, place: usize) -> Vec<Received> {
        wait_for("the spans of a move", || async {
            let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let mut roots = all.iter().filter(|it| it.is_root());
            let id = roots.nth(place)?.span.trace_id.clone();
            let of_trace = all.iter().filter(|it| it.span.trace_id == id);
            let of_trace: Vec<Received> = of_trace.cloned().collect();
            let has_arrived = of_trace.iter().any(|it| it.span.name == "arrive");
            has_arrived.then_some(of_trace)
        })
        .await
        .expect("a trace")
    }
}

/// An address of this test alone, at which nothing listens.
async fn free_address() -> SocketAddr {
    let own: [u8; 3] = rand::random();
    let own = [127, own[0].max(1), own[1], own[2].clamp(1, 254)];
    let listener = TcpListener::bind((std::net::Ipv4Addr::from(own), 0)).await;
    listener.expect("an address").local_addr().expect("a port")
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::Builder::new().prefix("keel-").tempdir();
    folder.expect("a folder")
}

async fn cluster(folder: &Path, more: &[(&str, &str)]) -> LocalCluster {
    let mut environment = vec![("OTEL_BSP_SCHEDULE_DELAY", "100")];
    environment.extend(more);
    let names = ["a", "b"];
    let path = Path::new(KEEL);
    let cluster = LocalCluster::start_with_environment(path, folder, &names, &environment).await;
    let cluster = cluster.expect("a cluster");
    let module = guest("counter");
    let machine = Guest::new("m", "a", &module, &["1000000", "20"]);
    cluster.run(&machine).await.expect("it starts");
    cluster
}

async fn moves(cluster: &LocalCluster, to: &str) {
    let report = cluster.move_machine("a", "m", to).await.expect("a report");
    assert_eq!(report.ending, Ending::Moved);
}

fn log_of(cluster: &LocalCluster, node: &str) -> String {
    std::fs::read_to_string(cluster.folder(node).join("agent.log")).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_is_one_trace_of_both_nodes() {
    let (folder, collector) = (folder(), Collector::default());
    let address = free_address().await;
    collector.serve(address).await;
    let endpoint = format!("http://{address}");
    let cluster = cluster(folder.path(), &[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]).await;
    moves(&cluster, "b").await;
    let trace = collector.trace(0).await;
    let named = |name: &str| {
        let mut found = trace.iter().filter(|it| it.span.name == name);
        let first = found.next().unwrap_or_else(|| panic!("no {name}"));
        assert!(found.next().is_none(), "two of {name}");
        first
    };
    let root = named("move");
    assert!(root.is_root() && root.failure().is_none() && root.node == "a");
    let text = |text: &str| Some(Value::StringValue(text.into()));
    assert_eq!(root.attribute("keel.machine"), text("m"));
    assert_eq!(root.attribute("keel.target"), text("b"));
    let Some(Value::IntValue(downtime_us)) = root.attribute("keel.downtime_us") else {
        panic!("no downtime: {root:?}");
    };
    let mut steps: Vec<&Received> = trace
        .iter()
        .filter(|it| it.span.parent_span_id == root.span.span_id)
        .collect();
    steps.sort_by_key(|it| it.span.start_time_unix_nano);
    let names: Vec<&str> = steps.iter().map(|it| &*it.span.name).collect();
    assert_eq!(
        names,
        [
            "compile",
            "wait",
            "offer",
            "copy",
            "ask store",
            "freeze and send",
            "commit",
            "resume",
            "drop copy"
        ]
    );
    let (begin, end) = (root.span.start_time_unix_nano, root.span.end_time_unix_nano);
    for step in &steps {
        assert!(step.node == "a" && step.failure().is_none(), "{step:?}");
        assert!(step.span.start_time_unix_nano >= begin, "{step:?}");
        assert!(step.span.end_time_unix_nano <= end, "{step:?}");
    }
    // The downtime is within the steps that make it.
    let time = |name: &str| {
        let span = &named(name).span;
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1000
    };
    let halted = time("freeze and send") + time("commit") + time("resume");
    assert!(u64::try_from(downtime_us).is_ok_and(|it| it > 0 && it <= halted));
    let (arrive, accept) = (named("arrive"), named("accept"));
    assert_eq!((&*arrive.node, &*accept.node), ("b", "b"));
    assert_eq!(arrive.span.kind(), SpanKind::Server);
    assert_eq!(arrive.span.parent_span_id, named("offer").span.span_id);
    assert_eq!(accept.span.parent_span_id, arrive.span.span_id);
    assert_eq!(trace.len(), steps.len() + 3);

    // One that fails says why, at both nodes.
    let ordered = cluster.failpoint("a", "offer.checked", Some("error")).await;
    ordered.expect("a failpoint");
    let report = cluster.move_machine("a", "m", "a").await.expect("a report");
    let Ending::Stayed { reason } = report.ending else {
        panic!("it moved");
    };
    let trace = collector.trace(1).await;
    let failed: Vec<(&str, &str)> = trace
        .iter()
        .filter(|it| it.failure().is_some_and(|it| reason.ends_with(it)))
        .map(|it| (&*it.node, &*it.span.name))
        .collect();
    for expected in [("a", "arrive"), ("b", "offer"), ("b", "move")] {
        assert!(failed.contains(&expected), "{expected:?}: {trace:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_is_said_and_changes_nothing() {
    let (folder, collector) = (folder(), Collector::default());
    let address = free_address().await;
    let endpoint = format!("http://{address}");
    let cluster = cluster(
        folder.path(),
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint)],
    )
    .await;
    moves(&cluster, "b").await;
    let said = |what: &'static str| {
        let cluster = &cluster;
        async move {
            wait_for(what, || async {
                log_of(cluster, "a").contains(what).then_some(())
            })
            .await
            .expect("the log");
        }
    };
    said("the collector does not take traces").await;
    moves(&cluster, "a").await;
    collector.serve(address).await;
    wait_for("a trace that arrives", || async {
        moves(&cluster, "b").await;
        moves(&cluster, "a").await;
        let all = collector.0.lock().unwrap_or_else(PoisonError::into_inner);
        (!all.is_empty()).then_some(())
    })
    .await
    .expect("a trace");
    said("the collector takes traces again").await;
    let log = log_of(&cluster, "a");
    assert_eq!(log.matches("does not take traces").count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_be_used_are_said_and_change_nothing() {
    for (settings, what) in [
        (
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", "not an address")][..],
            "not an address",
        ),
        (
            &[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:1"),
                ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/absent.pem"),
            ],
            "/absent.pem",
        ),
    ] {
        let folder = folder();
        let cluster = cluster(folder.path(), settings).await;
        moves(&cluster, "b").await;
        let log = log_of(&cluster, "a");
        assert!(log.contains("no traces of moves"), "{log}");
        assert!(log.contains(what), "{log}");
    }
}
