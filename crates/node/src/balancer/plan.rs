//! Plans for all nodes: made from their current reports, and carried out wave by wave. The planner
//! is in `keel-balance`. Every move is an ordinary one, which the store may refuse, so an outdated
//! plan moves less, but never wrongly.

use super::actions::{ended, run_move};
use super::handle::NodeBalancer;
use super::plan_confirmation;
use super::queries::gather_loads;
use crate::error::CommandError;
use crate::records::{self, Needs};
use crate::rules::RuleSet;
use keel_api::{
    LeftBehind, NodeLoad, PlanGoal, PlanInfo, PlanLine, PlanRequest, PlanStep, PlannedMachine,
    Silence, Urgency,
};
use keel_balance::Name;
use keel_balance::cost::{CostModel, Link};
use keel_balance::ledger::{Decision, Outcome};
use keel_balance::load::{Factors, MachineSample, Weights};
use keel_balance::plan::{Amounts, Goal, Plan, Problem, RESOURCES, Site, Workload, plan};
use keel_balance::select::Constraint;
use keel_cluster::MachineName;
use keel_machine::spec::BalanceBy;
use keel_store::clock::unix_ms;
use keel_store::keys::Key;
use keel_store::{Compare, Txn, TxnOutcome};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// The resources of a plan: work in cores of the reference speed, memory, and disks.
const CPU: usize = 0;
const MEMORY: usize = 1;
const IO: usize = 2;
/// The least reduction of unevenness by a move, as a share of that of one node in a cluster of
/// two; less with more nodes.
const GAIN_MIN: f64 = 0.02;
/// The most concurrent moves from a node, and to a node.
pub(super) const AT_ONCE: (usize, usize) = (4, 2);
/// The role of the executor of a plan: one at a time.
const ROLE: &str = "plan";

/// All nodes and machines, as currently reported.
pub(super) struct View {
    problem: Problem,
    /// The epoch of each machine.
    epochs: Vec<String>,
    /// Why a machine must not move, by its number.
    fixed: BTreeMap<usize, String>,
    factors: Vec<Factors>,
    fill: f64,
    model: CostModel,
    silent: Vec<Silence>,
}

impl View {
    /// Queries all nodes.
    pub(super) async fn gather(
        handle: &Arc<NodeBalancer>,
        goal: &PlanGoal,
    ) -> Result<Self, CommandError> {
        let for_drain = matches!(goal, PlanGoal::Drain { .. });
        let told = gather_loads(handle).await?;
        let rules_now = handle.rules.cache.set();
        let model = handle.query(|balancer, _, _| *balancer.model());
        let model = model.await.map_err(CommandError::Unavailable)?;
        let minute = (unix_ms() / 60_000 % 1440) as u32;
        let sites: Vec<Site> = told
            .nodes
            .iter()
            .map(|node| site(node, &rules_now))
            .collect();
        let weights = &told.policy.weights;
        let mut samples: BTreeMap<&str, &MachineSample> = BTreeMap::new();
        for sample in told.nodes.iter().filter_map(|node| node.sample.as_ref()) {
            samples.extend(sample.machines.iter().map(|it| (&*it.name, it)));
        }
        let (mut loads, mut factors, mut fixed) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut epochs = Vec::new();
        let mut by_needs: BTreeMap<Needs, Vec<String>> = BTreeMap::new();
        let mut live = handle.placements.live();
        live.sort();
        for (name, owner) in live {
            let Some(at) = sites.iter().position(|site| site.name == owner) else {
                continue;
            };
            // A machine that has just arrived is in no sample yet.
            let used = samples.get(&*name).map(|it| it.factors).unwrap_or_default();
            let thing = rules_now.machine(&name);
            let placed = handle.placements.get(&name);
            if let Some(placed) = &placed {
                let equal = by_needs.entry(placed.needs.clone()).or_default();
                equal.push(name.to_string());
            }
            let mut rules = rules_now.rules.iter();
            let why = match rules.find_map(|rule| rule.forbids_moving(&thing, minute)) {
                _ if placed.as_ref().is_none_or(|placed| !placed.movable) => {
                    Some("it is not running at present".to_owned())
                }
                None if !for_drain
                    && placed
                        .as_ref()
                        .is_some_and(|it| it.balancing.by == BalanceBy::Off) =>
                {
                    Some(Constraint::OptedOut.to_string())
                }
                broken => broken.map(|broken| broken.to_string()),
            };
            let is_fixed = why.is_some();
            fixed.extend(why.map(|why| (loads.len(), why)));
            let bytes = model.predict(&used, &Link::NEAR).bytes;
            loads.push(Workload {
                name,
                labels: thing.labels,
                site: at,
                demand: amounts(&used, sites[at].capacity, &told.nodes[at]),
                fixed: is_fixed,
                bytes,
            });
            factors.push(used);
            epochs.push(placed.map_or_else(String::new, |it| it.epoch.to_string()));
        }
        let count = sites.len().max(1) as f64;
        let mut problem = Problem {
            sites,
            loads,
            weights: weighed(weights),
            hard: [false; RESOURCES],
            rules: [&rules_now.rules[..], &rules_now.hosts.as_rules(&by_needs)].concat(),
            gain_min: GAIN_MIN / count,
            at_once: AT_ONCE,
        };
        problem.hard[MEMORY] = true;
        // Memory that is neither of machines nor of headroom, nor free, belongs to other
        // processes.
        for (number, node) in told.nodes.iter().enumerate() {
            let of_machines: f64 = problem
                .loads
                .iter()
                .filter(|load| load.site == number)
                .map(|load| load.demand[MEMORY])
                .sum();
            let free = node.side.as_ref().map_or(0, |side| side.memory_free_bytes) as f64;
            let site = &mut problem.sites[number];
            site.base[MEMORY] = (site.capacity[MEMORY] - free - of_machines).max(0.0);
        }
        Ok(View {
            problem,
            epochs,
            fixed,
            factors,
            fill: told.policy.fill_load,
            model,
            silent: told.silent,
        })
    }

    /// Number of machines that are on a node or planned there.
    pub(super) fn machines_on(&self, node: &str) -> usize {
        let sites = &self.problem.sites;
        let on = |load: &&Workload| *sites[load.site].name == *node;
        self.problem.loads.iter().filter(on).count()
    }

    /// Makes a plan on a blocking thread, because it takes a processor for seconds in a large
    /// cluster.
    ///
    /// # Errors
    /// [`CommandError::NotFound`] if a node to be drained does not report its load.
    pub(super) async fn plan(self, goal: PlanGoal) -> Result<PlanInfo, CommandError> {
        tokio::task::spawn_blocking(move || self.compute(&goal))
            .await
            .map_err(|error| {
                CommandError::Unavailable(format!("computing the plan failed: {error}"))
            })?
    }

    fn compute(&self, goal: &PlanGoal) -> Result<PlanInfo, CommandError> {
        let of_problem = match goal {
            PlanGoal::Level { moves_max } => Goal::Level {
                moves_max: *moves_max,
            },
            PlanGoal::Pack => Goal::Pack { fill: self.fill },
            PlanGoal::Drain { node } => {
                let sites = &self.problem.sites;
                let number = sites.iter().position(|site| *site.name == **node);
                let missing = || {
                    let what = format!("node {node:?} does not answer (see `keel nodes`)");
                    CommandError::NotFound(what)
                };
                Goal::Drain(vec![number.ok_or_else(missing)?])
            }
        };
        Ok(self.told(goal.clone(), &plan(&self.problem, &of_problem)))
    }

    fn told(&self, goal: PlanGoal, plan: &Plan) -> PlanInfo {
        let name = |site: usize| self.problem.sites[site].name.to_string();
        let steps: Vec<PlanStep> = plan
            .steps
            .iter()
            .map(|step| {
                // (This node knows no links between others.)
                let cost = self.model.predict(&self.factors[step.load], &Link::NEAR);
                PlanStep {
                    machine: self.problem.loads[step.load].name.to_string(),
                    from: name(step.from),
                    to: name(step.to),
                    wave: step.wave,
                    hop: step.hop,
                    bytes: cost.bytes as u64,
                    duration_ms: cost.duration_ms,
                    downtime_ms: cost.downtime_ms,
                }
            })
            .collect();
        let moved: BTreeSet<usize> = plan.steps.iter().map(|step| step.load).collect();
        let machines = moved.into_iter().map(|load| PlannedMachine {
            machine: self.problem.loads[load].name.to_string(),
            node: name(self.problem.loads[load].site),
            epoch: self.epochs[load].clone(),
        });
        let machines: Vec<PlannedMachine> = machines.collect();
        let left = plan.left.iter().map(|(load, why)| {
            let it = &self.problem.loads[*load];
            LeftBehind {
                machine: it.name.to_string(),
                node: name(it.site),
                reason: self.fixed.get(load).unwrap_or(why).clone(),
            }
        });
        PlanInfo {
            goal,
            left: left.collect(),
            before: plan.before,
            after: plan.after,
            duration_ms: duration(&steps),
            id: plan_confirmation::id(&steps, &machines),
            machines,
            steps,
            silent: self.silent.clone(),
        }
    }
}

/// Duration of steps, of which those of a wave run concurrently.
fn duration(steps: &[PlanStep]) -> f64 {
    let mut waves: BTreeMap<usize, f64> = BTreeMap::new();
    for step in steps {
        let longest = waves.entry(step.wave).or_default();
        *longest = longest.max(step.duration_ms.mid);
    }
    waves.values().sum()
}

fn weighed(weights: &Weights) -> Amounts {
    let mut amounts = [0.0; RESOURCES];
    (amounts[CPU], amounts[MEMORY], amounts[IO]) = (weights.cpu, weights.memory, weights.io);
    amounts
}

/// A node; one that has not measured for long enough accepts no machine.
fn site(node: &NodeLoad, rules_now: &RuleSet) -> Site {
    let name: Name = node.node.as_str().into();
    let (mut capacity, mut base) = ([0.0; RESOURCES], [0.0; RESOURCES]);
    if let Some(sample) = &node.sample {
        let has = &sample.capacity;
        (capacity[CPU], capacity[MEMORY]) = (has.power(), has.memory_bytes as f64);
        capacity[IO] = has.io_bytes_per_s;
        base[CPU] = sample.base.cpu_cores * has.speed;
        base[IO] = sample.base.io_bytes_per_s;
    }
    Site {
        labels: rules_now.node(&name).labels,
        open: node.side.is_some() && !rules_now.drains.contains_key(&name),
        name,
        capacity,
        base,
    }
}

fn amounts(factors: &Factors, capacity: Amounts, node: &NodeLoad) -> Amounts {
    let speed = node.sample.as_ref().map_or(1.0, |it| it.capacity.speed);
    let mut amounts = [0.0; RESOURCES];
    amounts[CPU] = factors.cpu_cores * speed;
    amounts[MEMORY] = (factors.memory_bytes as f64).min(capacity[MEMORY]);
    amounts[IO] = factors.io_bytes_per_s;
    amounts
}

/// Makes a plan from the current reports of all nodes.
pub(crate) async fn make(
    handle: &Arc<NodeBalancer>,
    goal: &PlanGoal,
) -> Result<PlanInfo, CommandError> {
    View::gather(handle, goal).await?.plan(goal.clone()).await
}

// ── execution ───────────────────────────────────────────────────────────

/// Moves the machine of a step; returns the outcome.
pub(super) async fn take_step(
    handle: &Arc<NodeBalancer>,
    step: &PlanStep,
    why: &str,
    urgency: Urgency,
    budget_micros: Option<u64>,
) -> Outcome {
    let (machine, target): (Name, Name) = (step.machine.as_str().into(), step.to.as_str().into());
    handle.keep(Decision::Planned {
        machine: machine.clone(),
        target: target.clone(),
        plan: why.to_owned(),
    });
    let outcome = match is_there(handle, step).await {
        Ok(()) => run_move(handle, &machine, &target, urgency, budget_micros)
            .await
            .map_or_else(|why| Outcome::Stayed { why }, |report| ended(&report)),
        Err(why) => Outcome::Stayed { why },
    };
    handle.keep(Decision::Ended {
        machine,
        target,
        outcome: outcome.clone(),
        load: None,
    });
    outcome
}

/// Whether a machine is still where the plan assumes it.
async fn is_there(handle: &NodeBalancer, step: &PlanStep) -> Result<(), String> {
    let machine = MachineName::new(&step.machine).map_err(|error| error.to_string())?;
    let found = records::get(&*handle.context.store, &machine).await;
    let owner = found.map_err(|error| error.to_string())?.record.owner;
    if owner.as_str() == step.from {
        Ok(())
    } else {
        Err(format!("it is on {owner} by now"))
    }
}

/// Carries out steps, wave by wave, and reports their outcomes. It continues if the client
/// disconnects, and ends early with this node's agent: remaining steps are not carried out then.
///
/// # Errors
/// [`CommandError::Conflict`] while another plan is carried out, or if the cluster has changed
/// since the plan was made; [`CommandError::Invalid`] for steps that are not those of the plan. No
/// machine moves then.
pub(crate) async fn carry_out(
    handle: &Arc<NodeBalancer>,
    plan: PlanRequest,
) -> Result<mpsc::Receiver<PlanLine>, CommandError> {
    let role = take_role(handle).await?;
    // From here on no other plan changes the placement.
    if let Err(error) = plan_confirmation::check(handle, &plan).await {
        give_role_back(handle, &role).await;
        return Err(error);
    }
    let steps = plan.steps;
    // Unbounded by the client's speed: a slow reader delays no step.
    let (send, lines) = mpsc::channel(2 * steps.len() + 1);
    let handle = handle.clone();
    tokio::spawn(async move {
        let waves: BTreeSet<usize> = steps.iter().map(|step| step.wave).collect();
        let mut stayed: BTreeSet<String> = BTreeSet::new();
        for wave in waves {
            let mut moves = JoinSet::new();
            let of_wave = steps.iter().filter(|step| step.wave == wave);
            for step in of_wave.filter(|step| !stayed.contains(&step.machine)) {
                // The client may have disconnected.
                let _ = send.send(PlanLine::Begun(step.clone())).await;
                let (handle, step) = (handle.clone(), step.clone());
                moves.spawn(async move {
                    let why = "a plan that was confirmed";
                    let outcome = take_step(&handle, &step, why, Urgency::Normal, None).await;
                    (step, outcome)
                });
            }
            while let Some(joined) = moves.join_next().await {
                let Ok((step, outcome)) = joined else {
                    continue;
                };
                if !matches!(outcome, Outcome::Moved { .. }) {
                    stayed.insert(step.machine.clone());
                }
                let _ = send.send(PlanLine::Ended { step, outcome }).await;
            }
        }
        give_role_back(&handle, &role).await;
    });
    Ok(lines)
}

async fn take_role(handle: &NodeBalancer) -> Result<Key, CommandError> {
    let role = MachineName::new(ROLE).map_err(|error| CommandError::Invalid(error.to_string()))?;
    let key = Key::Lease(role);
    let Some(lease) = *handle.context.lease.borrow() else {
        return Err(CommandError::Unavailable(
            "this node has no lease at present".into(),
        ));
    };
    let txn = Txn::new().when_absent(key.clone()).put_leased(
        key.clone(),
        handle.context.name.as_str(),
        lease,
    );
    match handle.context.store.txn(txn).await? {
        TxnOutcome::Committed { .. } => Ok(key),
        TxnOutcome::Refused { .. } => {
            let holder = handle.context.store.get(&key.to_string()).await?;
            let holder = holder.map_or_else(String::new, |entry| {
                format!(" by {}", String::from_utf8_lossy(&entry.value))
            });
            let what = format!("a plan is being carried out{holder}; wait for its end");
            Err(CommandError::Conflict(what))
        }
    }
}

/// If this fails, the role is released when this node's lease ends.
async fn give_role_back(handle: &NodeBalancer, key: &Key) {
    let key = key.to_string();
    let txn = Txn::new()
        .when(Compare::Value {
            key: key.clone(),
            value: handle.context.name.as_str().into(),
        })
        .delete(key);
    if let Err(error) = handle.context.store.txn(txn).await {
        tracing::warn!(%error, "no other plan can be carried out before this node's lease ends");
    }
}
