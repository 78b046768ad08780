//! Reads the files of a voter, and starts its tasks on the current runtime. The clock, random
//! numbers and the way to other voters come from outside: those of this computer, or simulated
//! ones.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use openraft::SnapshotPolicy;
use rand::rngs::StdRng;
use tokio::sync::mpsc;

use super::answer_times::ANSWER_MAX;
use super::deadlines::Deadlines;
use super::election::{ELECTION_MAX, ELECTION_MIN, Election};
use super::leader::{Leader, Request};
use super::lease_ends::Service;
use super::log::{Log, Opened};
use super::network::{Network, Transport};
use super::open_error::OpenError;
use super::options::RaftOptions;
use super::snapshot::{self, Saved, SnapshotFile};
use super::state_machine::{Shared, StateMachine};
use super::types::{Raft, SnapshotMeta};
use crate::clock::Clock;
use crate::model::Model;
use crate::view::View;

/// Queued changes; further callers wait for room.
const QUEUED_MAX: usize = 4096;

/// What the files of a voter have.
pub(super) struct Loaded {
    pub(super) opened: Opened,
    pub(super) file: SnapshotFile,
    pub(super) model: Model,
    /// The snapshot's, if there is one.
    pub(super) meta: Option<SnapshotMeta>,
}

/// Reads the files of a voter.
pub(super) fn load(folder: &Path, new: Option<u64>, bytes_max: u64) -> Result<Loaded, OpenError> {
    if new.is_some() {
        std::fs::create_dir_all(folder).map_err(OpenError::unusable)?;
    }
    let file = SnapshotFile::new(folder.join("snapshot"));
    let saved = file.load()?;
    let opened = Log::open(&folder.join("log.redb"), new, file.saved())?;
    Loaded::new(opened, file, saved, bytes_max)
}

impl Loaded {
    /// A log and a snapshot of one voter.
    ///
    /// # Errors
    /// Why they do not fit.
    pub(super) fn new(
        opened: Opened,
        file: SnapshotFile,
        saved: Option<Saved>,
        bytes_max: u64,
    ) -> Result<Self, OpenError> {
        let (model, meta) = match saved {
            Some(saved) => {
                let model = snapshot::decode(saved.state.get_ref(), bytes_max);
                (model?, Some(saved.meta))
            }
            None => {
                let model = Model {
                    bytes_max,
                    ..Model::default()
                };
                (model, None)
            }
        };
        let saved = meta.as_ref().and_then(|meta| meta.last_log_id);
        if opened.purged > saved {
            return Err(OpenError::damaged("its snapshot is missing or too old"));
        }
        Ok(Self {
            opened,
            file,
            model,
            meta,
        })
    }
}

/// What a voter's tasks use of the computer that they run on.
pub(super) struct Host {
    /// Without it there are no other voters.
    pub(super) transport: Option<Arc<dyn Transport>>,
    pub(super) service: Arc<dyn Service>,
    pub(super) clock: Clock,
    /// For the times of elections.
    pub(super) random: StdRng,
}

/// The running tasks of a voter, as the others see them.
pub(super) struct Tasks {
    pub(super) leader: Arc<Leader>,
    pub(super) election: Arc<Election>,
    pub(super) requests: mpsc::Sender<Request>,
}

/// Entries after which a voter makes a snapshot: voters of successive numbers differ, so that not all
/// processors and disks of a group are busy with it at once.
fn snapshot_after(id: u64, options: &RaftOptions) -> u64 {
    options.snapshot_entries + options.snapshot_entries * (id % 8) / 16
}

/// Starts the tasks of a voter on the current runtime. What the log writes is written by somebody
/// else.
///
/// # Errors
/// A sentence that says why it cannot run.
pub(super) async fn start(
    log: Log,
    id: u64,
    (file, model, meta): (SnapshotFile, Model, Option<SnapshotMeta>),
    host: Host,
    options: RaftOptions,
) -> Result<Tasks, String> {
    let deadlines = Arc::new(Deadlines::new(host.clock));
    deadlines.replace(model.leases.iter().map(|(id, held)| (*id, held.ttl_ms)));
    let view = Arc::new(View::new(
        model.revision,
        model.entries.clone(),
        options.history_revisions_max,
        options.history_bytes_max,
    ));
    let unsaved = Arc::new(AtomicUsize::new(0));
    let machine = StateMachine::new(
        model,
        meta,
        Shared {
            view: view.clone(),
            deadlines: deadlines.clone(),
            file,
            bytes: unsaved.clone(),
        },
    );
    let config = openraft::Config {
        cluster_name: "keel".into(),
        // See leader.rs.
        enable_heartbeat: false,
        election_timeout_min: ELECTION_MIN,
        election_timeout_max: ELECTION_MAX,
        // See election.rs.
        enable_elect: false,
        install_snapshot_timeout: 2000,
        max_payload_entries: 64,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_after(id, &options)),
        snapshot_max_chunk_size: 1 << 20,
        max_in_snapshot_log_to_keep: options.snapshot_entries / 5,
        purge_batch_size: 64,
        ..openraft::Config::default()
    };
    let mut config = config.validate().map_err(|error| error.to_string())?;
    // `openraft` gives up entries and confirmations after it. It would have it shorter than an election
    // takes, because it is also the time between its heartbeats, which are off.
    config.heartbeat_interval = u64::try_from(ANSWER_MAX.as_millis()).unwrap_or(u64::MAX);
    let config = Arc::new(config);
    let network = Network::new(host.transport, log.flushes.clone());
    let raft = Raft::new(id, config, network.clone(), log.clone(), machine).await;
    let raft = raft.map_err(|error| error.to_string())?;
    let election = Election::new(id, raft.clone(), log.clone(), network);
    tokio::spawn(election.clone().run(host.random));
    let (requests, queued) = mpsc::channel(QUEUED_MAX);
    let (leader, barriers) = Leader::new(id, raft, log, view, deadlines, unsaved, host.clock);
    tokio::spawn(leader.clone().confirm_barriers(barriers));
    tokio::spawn(leader.clone().propose(queued));
    tokio::spawn(leader.clone().end_leases(host.service));
    tokio::spawn(leader.clone().follow());
    Ok(Tasks {
        leader,
        election,
        requests,
    })
}
