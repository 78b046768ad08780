//! State of the balancer, and the handle to its task.

use super::constraints::Snapshot;
use super::dirty_rate::DirtyRates;
use super::drain_progress::Progress;
use super::ledger::Ledger;
use super::links::Links;
use super::recorder::Recorder;
use super::spreading::Spreading;
use crate::compilation::Code;
use crate::context::Context;
use crate::gossip::NodeGossip;
use crate::moves::Moves;
use crate::processes::Processes;
use crate::records::{AliveNodes, Placements};
use crate::rules::Rules;
use crate::spanning::Spanning;
use keel_api::PeerTraffic;
use keel_balance::Name;
use keel_balance::ledger::{Decision, Line};
use keel_balance::round::{Balancer, Event, Request, Response};
use keel_cluster::NodeName;
use keel_machine::moves::MoveReport;
use keel_store::clock::unix_ms;
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{broadcast, oneshot};

/// A query that runs on the balancer between two of its steps.
pub(super) type BalancerQuery = Box<dyn FnOnce(&Balancer, u64, &Snapshot) + Send>;

/// Inputs of the balancer's task.
pub(super) enum Input {
    Event(Event),
    Measured(Box<super::meter::Measured>),
    Asked(Name, Request, oneshot::Sender<Response>),
    Query(BalancerQuery),
    /// The repair of a rule violation has ended.
    RepairOver,
}

/// This node's balancer.
pub(crate) struct NodeBalancer {
    pub(super) context: Arc<Context>,
    pub(super) processes: Arc<Processes>,
    pub(super) code: Arc<Code>,
    pub(super) rules: Arc<Rules>,
    pub(super) spanning: Arc<Spanning>,
    pub(super) moves: Arc<Moves>,
    pub(super) links: Links,
    pub(super) placements: Arc<Placements>,
    pub(super) alive: Arc<AliveNodes>,
    pub(super) gossip: Arc<NodeGossip>,
    pub(super) inputs: UnboundedSender<Input>,
    pub(super) ledger: Ledger,
    pub(super) recorder: Recorder,
    pub(super) dirty_rates: DirtyRates,
    pub(super) traffic: Mutex<Vec<PeerTraffic>>,
    pub(super) spreading: Spreading,
    pub(super) drain: Progress,
}

/// Inputs that are queued until the task runs.
pub(crate) struct Inbox {
    pub(super) inputs: UnboundedReceiver<Input>,
    /// Moves that end from now on.
    pub(super) ended_moves: broadcast::Receiver<Arc<MoveReport>>,
}

/// The lower layers, and the files of the ledger and of the load history.
pub(crate) struct Dependencies {
    pub(crate) context: Arc<Context>,
    pub(crate) processes: Arc<Processes>,
    pub(crate) code: Arc<Code>,
    pub(crate) rules: Arc<Rules>,
    pub(crate) spanning: Arc<Spanning>,
    pub(crate) moves: Arc<Moves>,
    pub(crate) placements: Arc<Placements>,
    pub(crate) alive: Arc<AliveNodes>,
    pub(crate) gossip: Arc<NodeGossip>,
    pub(crate) ledger: Ledger,
    pub(crate) recorder: Recorder,
}

const ENDED: &str = "this node's balancer has ended with its agent";

impl NodeBalancer {
    /// Creates a balancer whose task does not run yet.
    pub(crate) fn new(below: Dependencies) -> (Self, Inbox) {
        let (inputs, receiver) = unbounded_channel();
        let inbox = Inbox {
            inputs: receiver,
            ended_moves: below.moves.ended(),
        };
        let links = Links::new(below.context.clone(), below.moves.clone());
        let balancer = NodeBalancer {
            context: below.context,
            processes: below.processes,
            code: below.code,
            rules: below.rules,
            spanning: below.spanning,
            links,
            moves: below.moves,
            placements: below.placements,
            alive: below.alive,
            gossip: below.gossip,
            inputs,
            ledger: below.ledger,
            recorder: below.recorder,
            dirty_rates: DirtyRates::default(),
            traffic: Mutex::default(),
            spreading: Spreading::default(),
            drain: Progress::default(),
        };
        (balancer, inbox)
    }

    /// Answers another node's balancer.
    pub(crate) async fn answer(
        &self,
        peer: &NodeName,
        question: Request,
    ) -> Result<Response, String> {
        let (reply, answer) = oneshot::channel();
        let asked = Input::Asked(peer.as_str().into(), question, reply);
        self.inputs.send(asked).map_err(|_| ENDED.to_owned())?;
        answer.await.map_err(|_| ENDED.to_owned())
    }

    pub(super) async fn query<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Balancer, u64, &Snapshot) -> T + Send + 'static,
    ) -> Result<T, String> {
        let (reply, answer) = oneshot::channel();
        let query: BalancerQuery = Box::new(|balancer, now_ms, snapshot| {
            // The caller may have gone.
            let _ = reply.send(query(balancer, now_ms, snapshot));
        });
        self.inputs
            .send(Input::Query(query))
            .map_err(|_| ENDED.to_owned())?;
        answer.await.map_err(|_| ENDED.to_owned())
    }

    pub(super) fn tell(&self, event: Event) {
        // The task ends with the agent.
        let _ = self.inputs.send(Input::Event(event));
    }

    /// Records in the ledger a decision that was made outside a round.
    pub(super) fn keep(&self, decision: Decision) {
        self.ledger.keep(Line {
            at_unix_ms: unix_ms(),
            node: self.ledger.node().clone(),
            policy: None,
            model: None,
            decision,
        });
    }
}
