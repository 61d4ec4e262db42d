//! Making a node: owns how configuration becomes a store, a scheduler and the rest, before anybody is served.
//!
//! Invariants: those of `node`.

use super::config::{Limits, RayletConfig, RayletError};
use super::evidence::Evidence;
use super::gcs::GcsLink;
use super::logs::Logs;
use super::node::Node;
use super::processes::{Jobs, Watchers};
use super::signals::Signals;
use super::spilling::Spiller;
use super::zygote::{Zygote, ZygoteCommand};
use crate::elsewhere::Elsewhere;
use crate::objects::{Owners, RoomQueue};
use crate::pull::{PullLimits, Pulls};
use crate::scheduler::LocalScheduler;
use crate::spill::SpillIndex;
use crate::types::{SchedulerConfig, SchedulerLimits};
use ray_ids::{NodeId, WorkerId};
use ray_rpc::{AuthToken, Reactor};
use ray_sched::{ResourceSet, UnitResources};
use ray_store::{StoreConfig, StoreServer};
use ray_wire::Address;
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

impl Node {
    /// Everything that can be made without the reactor's service.
    ///
    /// `zygote` was started before, so that it imports on another core meanwhile.
    pub fn new(
        config: RayletConfig,
        reactor: Arc<Reactor>,
        signals: Signals,
        zygote: Zygote,
    ) -> Result<Self, RayletError> {
        let limits = config.limits()?;
        let node_id = match &config.node_id {
            Some(hex) => NodeId::from_hex(hex).map_err(|error| RayletError::Config(error.to_string()))?,
            None => NodeId::from_random(),
        };
        if config.gcs_socket.is_none() && config.gcs_address.is_none() {
            return Err(RayletError::Config(
                "it names neither gcs_socket nor gcs_address".into(),
            ));
        }
        let token = AuthToken::new(config.auth_token.clone().into_bytes())?;
        let session = config.session_directory.clone();
        let sockets = session.join("sockets");
        let log_directory = config.log_directory();
        for directory in [&sockets, &log_directory] {
            std::fs::create_dir_all(directory)
                .map_err(|error| RayletError::io(format!("make {}", directory.display()), error))?;
        }
        let socket_path = config
            .socket_path
            .clone()
            .unwrap_or_else(|| sockets.join(format!("raylet-{}", node_id.hex())));
        let session_name = file_name_of(&session);
        let units = UnitResources::default();
        let total = ResourceSet::from_user(
            config.resources.iter().map(|(name, value)| (name.as_str(), *value)),
            &units,
        )?;
        let cpus = total.get(&ray_sched::ResourceName::CPU).whole_units().max(0) as usize;
        let or = |value: u64, default: usize| if value == 0 { default } else { value as usize };
        let scheduler_limits = SchedulerLimits {
            idle_workers_kept: cpus.clamp(1, 64),
            spare_workers: or(limits.spare_workers, 1),
            maximum_starting_workers: or(limits.maximum_starting_workers, (4 * cpus).clamp(8, 64)),
            maximum_workers: limits.maximum_workers as usize,
            worker_start_timeout_ms: limits.worker_start_timeout_ms,
            graceful_exit_ms: limits.graceful_exit_ms,
            idle_worker_ms: limits.idle_worker_ms,
            ..SchedulerLimits::default()
        };
        let mut seed = [0_u8; 28];
        seed.copy_from_slice(NodeId::from_random().as_bytes());
        let word = |at: usize| {
            u64::from_le_bytes([
                seed[at],
                seed[at + 1],
                seed[at + 2],
                seed[at + 3],
                seed[at + 4],
                seed[at + 5],
                seed[at + 6],
                seed[at + 7],
            ])
        };
        let scheduler = LocalScheduler::new(SchedulerConfig {
            node_id,
            total: total.clone(),
            labels: config.labels.clone(),
            random_seed: [word(0), word(8), word(16), word(20)],
            limits: scheduler_limits,
        })?;
        let short = &node_id.hex()[..12];
        let store = Self::make_store(&config, &limits, &session_name, short)?;
        let evidence = Evidence::create(limits.maximum_workers as usize + 64)?;
        let logs = Logs::new(&log_directory)?;
        let spiller = Spiller::start(&session.join("spill").join(short), reactor.clone())?;
        let pulls = Pulls::new(PullLimits {
            chunk_bytes: limits.object_chunk_bytes,
            window: limits.object_chunk_window as usize,
            chunk_timeout_ms: limits.object_chunk_timeout_ms,
            total_bytes: limits.object_pull_bytes,
        });
        let zygote_command = ZygoteCommand::of(&config);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            address: Address {
                node_id: ray_wire::id_bytes(node_id.as_bytes()),
                worker_id: ray_wire::id_bytes(WorkerId::NIL.as_bytes()),
                host: config.host.clone(),
                port: 0,
            },
            gcs: GcsLink::default(),
            jobs: Jobs::default(),
            watchers: Watchers::default(),
            config,
            limits,
            reactor,
            signals,
            node_id,
            token,
            socket_path,
            log_directory,
            session_name,
            total,
            start: Instant::now(),
            start_time_ms: since_epoch.as_millis() as u64,
            scheduler,
            store,
            evidence,
            last_started: Default::default(),
            tick_due: None,
            links: FxHashMap::default(),
            processes: FxHashMap::default(),
            tokens: FxHashMap::default(),
            pids: FxHashMap::default(),
            remote_owners: FxHashMap::default(),
            nodes: FxHashMap::default(),
            zygote: Some(zygote),
            zygote_command,
            zygote_starts: 0,
            zygote_failures: 0,
            zygote_backlog: BTreeMap::new(),
            logs,
            owners: Owners::default(),
            elsewhere: Elsewhere::default(),
            room: RoomQueue::default(),
            serving_room: false,
            last_extent_recall_ms: 0,
            spilled: SpillIndex::default(),
            spiller,
            spill_error: None,
            spill_not_before: 0,
            restoring: FxHashMap::default(),
            pulls,
            waiters: FxHashMap::default(),
            next_waiter: 0,
            buffers: FxHashMap::default(),
            held_chunks: FxHashMap::default(),
            arriving: None,
            asked_chunks: FxHashMap::default(),
            next_chunk: 0,
            later: VecDeque::new(),
            peers: FxHashMap::default(),
            next_token: 1,
            timers: BTreeSet::new(),
            stopping: false,
            outcome: None,
        })
    }

    pub(super) fn make_store(
        config: &RayletConfig,
        limits: &Limits,
        session: &str,
        short: &str,
    ) -> Result<StoreServer, RayletError> {
        let capacity_bytes = config.object_store_memory_bytes;
        let path = match &config.store_path {
            Some(path) => path.clone(),
            None => {
                let name = format!("ray-{session}-{short}");
                let (path, in_memory) = ray_store::choose_path(&name, capacity_bytes, &config.session_directory);
                if !in_memory {
                    eprintln!(
                        "raylet: /dev/shm has no room for {capacity_bytes} bytes of object store, which is now on disk at {}: \
                         it will be slower",
                        path.display()
                    );
                }
                path
            }
        };
        if let Some(directory) = path.parent() {
            // A raylet that was killed, of whatever session, could not remove its own; those of living ones stay.
            let _ = ray_store::remove_stale_stores(directory, "ray-");
        }
        Ok(StoreServer::create(StoreConfig {
            path,
            capacity_bytes,
            max_clients: limits.maximum_store_clients as u32,
            max_objects: config.maximum_objects(limits),
        })?)
    }
}

fn file_name_of(session_directory: &std::path::Path) -> String {
    session_directory
        .file_name()
        .map_or_else(|| "session".into(), |name| name.to_string_lossy().into_owned())
}
