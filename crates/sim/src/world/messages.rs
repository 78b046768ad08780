//! Requests and responses in flight.

use super::{QueuedEvent, World};
use keel_balance::Name;
use keel_balance::round::{Event, Peers, Request, Response};
use rand::RngExt;
use std::sync::Arc;

/// Bits of a ticket that hold the round; those above hold the requester. So no table of pending
/// requests is needed, which lost messages would let grow.
const ROUND_BITS: u32 = 40;

impl World {
    pub(super) fn publish_peers(&mut self) {
        let alive = self.nodes.iter().filter(|node| node.alive);
        let alive: Arc<[Name]> = alive.map(|node| node.name.clone()).collect();
        let mut this = 0;
        for number in 0..self.nodes.len() {
            if self.nodes[number].alive {
                let peers = Peers::among(alive.clone(), this);
                this += 1;
                self.step(number, Event::Peers(peers));
            }
        }
    }

    /// Sends a message: it is delivered once, twice, or never.
    fn send(&mut self, to: usize, late_ms: u64, doubled: f64, event: Event) {
        let network = self.settings.network;
        if network.lost > 0.0 && self.rng.random_bool(network.lost) {
            return;
        }
        let doubled = network.doubled.max(doubled);
        let (least, most) = network.delay_ms;
        let incarnation = self.nodes[to].incarnation;
        let from_ms = self.now_ms + late_ms;
        if doubled > 0.0 && self.rng.random_bool(doubled) {
            let at_ms = from_ms + self.rng.random_range(least..=most);
            self.queue
                .put(at_ms, QueuedEvent::Deliver(to, incarnation, event.clone()));
        }
        let at_ms = from_ms + self.rng.random_range(least..=most);
        self.queue
            .put(at_ms, QueuedEvent::Deliver(to, incarnation, event));
    }

    pub(super) fn send_request(
        &mut self,
        requester: usize,
        round: u64,
        peer: &Name,
        mut request: Request,
    ) {
        if matches!(request, Request::View) {
            self.rounds += 1;
        }
        if let Some(report_fault) = self.nodes[requester].report_fault {
            report_fault.corrupt_request(&mut request);
        }
        let target = self.node_numbers[peer];
        let event = Event::RequestReceived {
            ticket: (requester as u64) << ROUND_BITS | round,
            peer: self.nodes[requester].name.clone(),
            request,
        };
        self.send(target, 0, 0.0, event);
    }

    pub(super) fn send_response(&mut self, number: usize, ticket: u64, mut response: Response) {
        let node = &self.nodes[number];
        if let Some(report_fault) = node.report_fault {
            report_fault.corrupt_response(&mut response);
        }
        let (late_ms, doubled) = (node.late_ms, node.doubled);
        let requester = (ticket >> ROUND_BITS) as usize;
        let event = Event::ResponseReceived {
            round: ticket & ((1 << ROUND_BITS) - 1),
            response: Some(response),
        };
        self.send(requester, late_ms, doubled, event);
    }
}
