//! Traces of moves for OpenTelemetry: one trace for each move, with the steps of both nodes. Off
//! unless the standard variables name a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`, see
//! <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>), which gets them by OTLP over
//! gRPC.
//!
//! A collector that is away costs spans, never a move: the SDK queues a bounded number of them, and
//! a thread of its own sends them. That spans are lost is said once, and that they arrive again.

use keel_cluster::NodeName;
use keel_cluster::identity::ClusterId;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig};
use opentelemetry_otlp::{ExporterBuildError, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Variables that name the collector; the first that is set counts.
const ENDPOINTS: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];
/// Variables that name a file with the certificates, in PEM, by which a collector is known.
const CERTIFICATES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
];
/// The field of W3C's Trace Context (<https://www.w3.org/TR/trace-context/>).
const TRACEPARENT: &str = "traceparent";

/// Makes spans; without a collector, such as cost nothing.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    tracer: Option<SdkTracer>,
    /// Sends what is queued when it is dropped.
    _provider: Option<SdkTracerProvider>,
}

/// Why there are no traces although a collector is named.
#[derive(Debug, thiserror::Error)]
enum TracesError {
    #[error("{0}")]
    Exporter(#[from] ExporterBuildError),
    #[error("{path}: {error}")]
    Certificate { path: String, error: std::io::Error },
}

impl Traces {
    /// As the environment says. A setting that cannot be used is said in the log: a node does not
    /// fail for its traces.
    pub(crate) fn from_environment(node: &NodeName, cluster: ClusterId) -> Self {
        let Some(endpoint) = variable(ENDPOINTS) else {
            return Traces::default();
        };
        match Self::sent_to(&endpoint, node, cluster) {
            Ok(traces) => traces,
            Err(error) => {
                tracing::warn!(endpoint, %error, "no traces of moves: the collector's settings (OTEL_EXPORTER_OTLP_...) cannot be used");
                Traces::default()
            }
        }
    }

    fn sent_to(endpoint: &str, node: &NodeName, cluster: ClusterId) -> Result<Self, TracesError> {
        let mut exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic();
        if endpoint.starts_with("https:") {
            let mut tls = ClientTlsConfig::new().with_enabled_roots();
            if let Some(path) = variable(CERTIFICATES) {
                let pem = std::fs::read(&path);
                let pem = pem.map_err(|error| TracesError::Certificate { path, error })?;
                tls = tls.ca_certificate(Certificate::from_pem(pem));
            }
            exporter = exporter.with_tls_config(tls);
        }
        let exporter = Spoken {
            inner: exporter.build()?,
            endpoint: endpoint.to_owned(),
            is_away: AtomicBool::new(false),
        };
        let mut resource = Resource::builder().with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.namespace", cluster.to_string()),
            KeyValue::new("service.instance.id", node.to_string()),
        ]);
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name("keel");
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        Ok(Traces {
            tracer: Some(provider.tracer("keel")),
            _provider: Some(provider),
        })
    }

    /// Begins a trace.
    pub(crate) fn begin(&self, name: &'static str) -> Span {
        self.span(name, SpanKind::Internal, Context::new())
    }

    /// Begins this node's part of a trace that another node began; of its own, if that has none.
    pub(crate) fn follow(&self, name: &'static str, traceparent: Option<&str>) -> Span {
        // Without a collector nothing is read.
        if self.tracer.is_none() {
            return Span::default();
        }
        let fields = traceparent.map(|it| (TRACEPARENT.to_owned(), it.to_owned()));
        let fields: HashMap<String, String> = fields.into_iter().collect();
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &fields);
        self.span(name, SpanKind::Server, parent)
    }

    fn span(&self, name: &'static str, kind: SpanKind, parent: Context) -> Span {
        Span(self.tracer.clone().map(|tracer| {
            let builder = tracer.span_builder(name).with_kind(kind);
            let span = builder.start_with_context(&tracer, &parent);
            let context = parent.with_span(span);
            Begun { tracer, context }
        }))
    }
}

/// The value of the first of these variables that is set.
fn variable(names: [&str; 2]) -> Option<String> {
    let values = names
        .into_iter()
        .filter_map(|name| std::env::var(name).ok());
    values.into_iter().find(|value| !value.is_empty())
}

/// A part of a trace. It ends when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Span(Option<Begun>);

#[derive(Debug)]
struct Begun {
    tracer: SdkTracer,
    context: Context,
}

impl Span {
    /// Begins a part of it.
    pub(crate) fn child(&self, name: &'static str) -> Span {
        Span(self.0.as_ref().map(|parent| {
            let tracer = parent.tracer.clone();
            let span = tracer.start_with_context(name, &parent.context);
            let context = parent.context.with_span(span);
            Begun { tracer, context }
        }))
    }

    /// What another node needs to follow it; `None` without a collector.
    pub(crate) fn traceparent(&self) -> Option<String> {
        let begun = self.0.as_ref()?;
        let mut fields = HashMap::new();
        TraceContextPropagator::new().inject_context(&begun.context, &mut fields);
        fields.remove(TRACEPARENT)
    }

    /// Adds an attribute.
    pub(crate) fn set(&self, name: &'static str, value: impl Into<Value>) {
        if let Some(begun) = &self.0 {
            let attribute = KeyValue::new(name, value);
            begun.context.span().set_attribute(attribute);
        }
    }

    /// Marks it as failed.
    pub(crate) fn fail(&self, reason: impl Into<String>) {
        if let Some(begun) = &self.0 {
            begun
                .context
                .span()
                .set_status(Status::error(reason.into()));
        }
    }
}

/// An exporter that says once that its collector does not take spans, and once that it does again.
#[derive(Debug)]
struct Spoken {
    inner: opentelemetry_otlp::SpanExporter,
    endpoint: String,
    is_away: AtomicBool,
}

impl SpanExporter for Spoken {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let exported = self.inner.export(batch).await;
        let was_away = self.is_away.swap(exported.is_err(), Ordering::Relaxed);
        match &exported {
            Err(error) if !was_away => {
                tracing::warn!(endpoint = self.endpoint, %error, "the collector does not take traces; those of now are lost, and moves go on");
            }
            Ok(()) if was_away => {
                tracing::warn!(endpoint = self.endpoint, "the collector takes traces again");
            }
            Ok(()) | Err(_) => {}
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_collector_spans_are_nothing() {
        let traces = Traces::default();
        let span = traces.begin("move");
        assert_eq!(span.traceparent(), None);
        span.child("copy").fail("nothing");
        assert!(traces.follow("accept", Some("00-1-2-01")).0.is_none());
    }

    #[test]
    fn a_trace_is_followed_by_what_it_sends() {
        let provider = SdkTracerProvider::builder().build();
        let traces = Traces {
            tracer: Some(provider.tracer("keel")),
            _provider: Some(provider),
        };
        let id_of = |traceparent: &str| {
            let mut parts = traceparent.split('-');
            parts.nth(1).map(str::to_owned)
        };
        let span = traces.begin("move");
        let sent = span.child("offer").traceparent().unwrap();
        let followed = traces.follow("accept", Some(&sent)).traceparent().unwrap();
        assert_eq!(id_of(&followed), id_of(&sent));
        assert_ne!(followed, sent);
        // What is not of that form begins a trace.
        for bad in [None, Some(""), Some("00-xyz"), Some("\u{0}")] {
            let other = traces.follow("accept", bad).traceparent().unwrap();
            assert_ne!(id_of(&other), id_of(&sent), "{bad:?}");
        }
    }
}
