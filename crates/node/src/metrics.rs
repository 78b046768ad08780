//! Metrics of this agent, for Prometheus: what only the moment of an event knows is counted here
//! (durations, events); what can be read at any time is added by who answers the request
//! (`front::http::metrics`).
//!
//! Names follow the conventions of Prometheus: units as suffixes, base units, `_total` for
//! counters (<https://prometheus.io/docs/practices/naming/>).

use keel_api::EventKind;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts, Registry};
use std::sync::Arc;
use std::time::Duration;

/// Bounds in seconds of what takes milliseconds: renewals, pauses, downtimes.
const SHORT: [f64; 12] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0,
];
/// Bounds in seconds of what copies memory.
const LONG: [f64; 11] = [
    0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
];

/// What is counted; clones count the same.
#[derive(Debug, Clone)]
pub(crate) struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    events: IntCounterVec,
    gossip: IntCounterVec,
    lease_renewal: Histogram,
    move_downtime: Histogram,
    move_duration: Histogram,
    checkpoint_pause: Histogram,
}

impl Metrics {
    /// Nothing counted yet.
    ///
    /// # Errors
    /// If two metrics have one name, or a name is not valid.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, bounds: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(bounds.to_vec());
            let histogram = Histogram::with_opts(options)?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let events = IntCounterVec::new(
            Opts::new(
                "keel_events_total",
                "Events of this node since its agent started.",
            ),
            &["kind"],
        )?;
        registry.register(Box::new(events.clone()))?;
        for kind in EventKind::ALL {
            // A counter that is missing until its first event hides that event from `rate`.
            events.with_label_values(&[kind.name()]);
        }
        let gossip = IntCounterVec::new(
            Opts::new(
                "keel_gossip_datagrams_total",
                "Datagrams of gossip since this node's agent started.",
            ),
            &["outcome"],
        )?;
        registry.register(Box::new(gossip.clone()))?;
        Ok(Metrics(Arc::new(Inner {
            events,
            gossip,
            lease_renewal: histogram(
                "keel_lease_renewal_seconds",
                "Time that renewals of this node's lease took.",
                &SHORT,
            )?,
            move_downtime: histogram(
                "keel_move_downtime_seconds",
                "Downtime of machines that were moved away from this node.",
                &SHORT,
            )?,
            move_duration: histogram(
                "keel_move_duration_seconds",
                "Duration of moves away from this node.",
                &LONG,
            )?,
            checkpoint_pause: histogram(
                "keel_checkpoint_pause_seconds",
                "Time that machines stood still for a checkpoint.",
                &SHORT,
            )?,
            registry,
        })))
    }

    /// What was counted so far.
    pub(crate) fn gather(&self) -> Vec<prometheus::proto::MetricFamily> {
        self.0.registry.gather()
    }

    pub(crate) fn event(&self, kind: EventKind) {
        self.0.events.with_label_values(&[kind.name()]).inc();
    }

    /// A datagram was `sent`, `received` or `refused`.
    pub(crate) fn gossip(&self, outcome: &str) {
        self.0.gossip.with_label_values(&[outcome]).inc();
    }

    pub(crate) fn lease_renewed(&self, took: Duration) {
        self.0.lease_renewal.observe(took.as_secs_f64());
    }

    pub(crate) fn moved(&self, downtime_micros: u64, total_micros: u64) {
        self.0.move_downtime.observe(seconds(downtime_micros));
        self.0.move_duration.observe(seconds(total_micros));
    }

    pub(crate) fn checkpoint_made(&self, pause_micros: u64) {
        self.0.checkpoint_pause.observe(seconds(pause_micros));
    }
}

fn seconds(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64()
}
