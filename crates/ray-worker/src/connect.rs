//! Joining a node: the link to the raylet, registration, and the runtime's threads.
//!
//! Invariant: 1. A forked child of a process that connected finds the runtime inert (`is_forked`).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use ray_ids::{JobId, NodeId, WorkerId};
use ray_ownership::leases::LeaseClient;
use ray_ownership::lineage::Lineage;
use ray_ownership::ReferenceTable;
use ray_rpc::{CloseReason, Frame, Link, Reactor, Service, WaitOutcome, Waiter};
use ray_store::{ClientSlot, StoreClient};
use ray_wire::{kinds, Address, RegisterProcess, Welcome};
use rustc_hash::FxHashMap;

use crate::execute::ExecutionQueue;
use crate::inner::{CoreWorker, Inner, State};
use crate::logs::LogQueue;
use crate::service::WorkerService;
use crate::slot::lock;
use crate::WorkerError;

/// What a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Driver,
    Worker,
    Tool,
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectConfig {
    pub raylet_socket: String,
    pub role: Role,
    pub worker_id: Option<WorkerId>,
    pub startup_token: u64,
    pub job_config_json: String,
    pub timeout: Duration,
}

/// What specifications may take in memory for lineage.
const LINEAGE_LIMIT_BYTES: usize = 512 << 20;

static FORKED: AtomicBool = AtomicBool::new(false);
static FORK_HANDLER: Once = Once::new();

extern "C" fn note_fork() {
    FORKED.store(true, Ordering::Release);
}

/// Whether this process is a forked child of one that connected.
pub(crate) fn is_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

fn watch_forks() {
    FORK_HANDLER.call_once(|| {
        // SAFETY: the handler only stores to an atomic, which is allowed between fork and exec.
        unsafe { libc::pthread_atfork(None, None, Some(note_fork)) };
    });
}

/// Serves the reactor until registration is over, then hands everything to the worker's service.
struct Doorway {
    welcome: Mutex<Option<Result<Welcome, String>>>,
    waiter: Waiter,
    service: OnceLock<Arc<WorkerService>>,
    /// What arrived for the service before it was there.
    early: Mutex<Vec<(Arc<Link>, Frame)>>,
}

impl Doorway {
    fn settle(&self, result: Result<Welcome, String>) {
        let mut welcome = lock(&self.welcome);
        if welcome.is_none() {
            *welcome = Some(result);
        }
        self.waiter.notify();
    }
}

impl Service for Doorway {
    fn on_frame(&self, link: &Arc<Link>, frame: Frame) {
        if let Some(service) = self.service.get() {
            return service.on_frame(link, frame);
        }
        if frame.kind == kinds::WELCOME {
            let welcome = ray_wire::decode::<Welcome>("Welcome", frame.header).map_err(|error| error.to_string());
            return self.settle(welcome);
        }
        lock(&self.early).push((link.clone(), frame));
    }

    fn on_ready(&self, link: &Arc<Link>, peer_hello: &[u8]) {
        if let Some(service) = self.service.get() {
            service.on_ready(link, peer_hello);
        }
    }

    fn on_closed(&self, link: &Arc<Link>, reason: &CloseReason) {
        match self.service.get() {
            Some(service) => service.on_closed(link, reason),
            None => self.settle(Err(reason.to_string())),
        }
    }

    fn on_wake(&self) {
        if let Some(service) = self.service.get() {
            for (link, frame) in std::mem::take(&mut *lock(&self.early)) {
                service.on_frame(&link, frame);
            }
        }
    }

    fn on_descriptor_ready(&self, token: u64) {
        if let Some(service) = self.service.get() {
            service.on_descriptor_ready(token);
        }
    }

    fn on_timer(&self, now: Instant) -> Option<Instant> {
        self.service.get().and_then(|service| service.on_timer(now))
    }
}

fn random_u64() -> u64 {
    let id = WorkerId::from_random();
    u64::from_le_bytes(id.as_bytes()[..8].try_into().unwrap_or_default())
}

impl CoreWorker {
    /// Joins the node whose raylet listens at the socket. Waits at most `timeout`.
    pub fn connect(config: ConnectConfig) -> Result<Self, WorkerError> {
        watch_forks();
        ray_rpc::raise_descriptor_limit();
        let fail = |reason: String| WorkerError::Connect {
            socket: config.raylet_socket.clone(),
            reason,
        };
        let reactor = Reactor::new(ray_rpc::Config {
            protocol_versions: ray_wire::PROTOCOL_VERSIONS,
            ..ray_rpc::Config::default()
        })?;
        let doorway = Arc::new(Doorway {
            welcome: Mutex::new(None),
            waiter: Waiter::new(),
            service: OnceLock::new(),
            early: Mutex::new(Vec::new()),
        });
        reactor.set_service(doorway.clone())?;
        let worker_id = config.worker_id.unwrap_or_else(WorkerId::from_random);
        let raylet = reactor
            .connect_unix(&config.raylet_socket)
            .map_err(|error| fail(error.to_string()))?;
        let register = RegisterProcess {
            role: match config.role {
                Role::Driver => ray_wire::ROLE_DRIVER,
                Role::Worker => ray_wire::ROLE_WORKER,
                Role::Tool => ray_wire::ROLE_TOOL,
            },
            worker_id: ray_wire::id_bytes(worker_id.as_bytes()),
            pid: std::process::id(),
            startup_token: config.startup_token,
            job_config_json: config.job_config_json.clone(),
        };
        raylet.send(kinds::REGISTER_PROCESS, 0, ray_wire::encode(&register), &[])?;
        let deadline = Instant::now() + config.timeout;
        let welcome = loop {
            if let Some(welcome) = lock(&doorway.welcome).take() {
                break welcome.map_err(&fail)?;
            }
            match reactor.wait(&doorway.waiter, Some(deadline)) {
                WaitOutcome::TimedOut => {
                    return Err(fail(format!(
                        "it did not answer within {} s",
                        config.timeout.as_secs_f64()
                    )))
                }
                WaitOutcome::Interrupted => return Err(WorkerError::Interrupted),
                _ => {}
            }
        };
        if !welcome.refusal.is_empty() {
            return Err(fail(welcome.refusal));
        }
        Self::enter_node(config, reactor, &doorway, raylet, worker_id, welcome)
    }

    fn enter_node(
        config: ConnectConfig,
        reactor: Arc<Reactor>,
        doorway: &Arc<Doorway>,
        raylet: Arc<Link>,
        worker_id: WorkerId,
        welcome: Welcome,
    ) -> Result<Self, WorkerError> {
        let fail = |reason: &str| WorkerError::Connect {
            socket: config.raylet_socket.clone(),
            reason: reason.into(),
        };
        let me = welcome.address.ok_or_else(|| fail("its welcome lacks our address"))?;
        let node_id = me.node()?;
        let details: serde_json::Value = serde_json::from_str(&welcome.details_json).unwrap_or_default();
        let auth_token = details["auth_token"]
            .as_str()
            .and_then(|token| ray_rpc::AuthToken::new(token.as_bytes()).ok());
        let store = match config.role {
            Role::Tool => None,
            Role::Driver | Role::Worker => {
                let generation =
                    u32::try_from(welcome.store_slot_generation).map_err(|_| fail("its store slot is malformed"))?;
                let slot = ClientSlot {
                    number: welcome.store_slot,
                    generation,
                };
                Some(StoreClient::attach(Path::new(&welcome.store_path), slot)?)
            }
        };
        let job_id = OnceLock::new();
        if !welcome.job_id.is_empty() {
            if let Ok(job) = JobId::from_binary(&welcome.job_id) {
                if !job.is_nil() {
                    let _ = job_id.set(job);
                }
            }
        }
        let evidence = OnceLock::new();
        if let (Some(path), Some(index)) = (details["evidence_path"].as_str(), details["evidence_index"].as_u64()) {
            let _ = evidence.set(crate::evidence::Evidence::open(Path::new(path), index)?);
        }
        let mut raylets = FxHashMap::default();
        raylets.insert(node_id, raylet.clone());
        let mut nodes = FxHashMap::default();
        nodes.insert(node_id, raylet_address(&me));
        let inner = Arc::new(Inner {
            role: config.role,
            worker_id,
            node_id,
            job_id,
            session_directory: welcome.session_directory,
            details_json: welcome.details_json,
            auth_token,
            raylet,
            store,
            state: Mutex::new(State {
                refs: ReferenceTable::new(worker_id),
                tasks: FxHashMap::default(),
                lineage: Lineage::new(LINEAGE_LIMIT_BYTES),
                lineage_specs: FxHashMap::default(),
                leases: LeaseClient::new(),
                lease_raylets: FxHashMap::default(),
                request_raylets: FxHashMap::default(),
                classes: FxHashMap::default(),
                class_specifications: Vec::new(),
                actors: FxHashMap::default(),
                links: FxHashMap::default(),
                accepted: FxHashMap::default(),
                raylets,
                addresses: FxHashMap::default(),
                nodes,
                pending: FxHashMap::default(),
                streams: FxHashMap::default(),
                last_return: None,
                fetches: FxHashMap::default(),
                fetch_failures: FxHashMap::default(),
                ready: Default::default(),
                retries: Vec::new(),
                frees: FxHashMap::default(),
                ring_dirty: false,
                raylet_gone: None,
                timer_due: None,
                dead_workers: Default::default(),
            }),
            dropped: crossbeam_queue::SegQueue::new(),
            drops_noted: AtomicBool::new(false),
            next_correlation: AtomicU64::new(1),
            next_template: AtomicU32::new(1),
            task_seed: random_u64(),
            next_task: AtomicU64::new(0),
            put_seed: (random_u64() as u32) & (PUT_INDEX_MASK),
            next_put: AtomicU32::new(0),
            execution: ExecutionQueue::new(),
            started: Instant::now(),
            shut_down: AtomicBool::new(false),
            logs: LogQueue::default(),
            reactor: reactor.clone(),
            evidence,
            me,
        });
        inner.reactor.set_hello(inner.me.encode_to_vec());
        if config.role != Role::Tool {
            let path = Path::new(&inner.session_directory)
                .join("sockets")
                .join(worker_id.hex());
            inner.reactor.listen_unix(path)?;
        }
        let _ = doorway.service.set(Arc::new(WorkerService::new(inner.clone())));
        inner.reactor.start_background()?;
        if config.role == Role::Worker {
            inner.raylet.send(kinds::WORKER_LISTENING, 0, Bytes::new(), &[])?;
        }
        if let (Some(extent), Role::Driver | Role::Worker) = (&welcome.first_extent, config.role) {
            inner.take_extent(extent)?;
        }
        // What came before the service was there is delivered by `on_wake`.
        inner.reactor.wake();
        Ok(Self(inner))
    }
}

/// The seed of put indices leaves the bit that marks them.
const PUT_INDEX_MASK: u32 = ray_ids::ObjectId::FIRST_PUT_INDEX - 1;

/// The raylet of the node of a process.
pub(crate) fn raylet_address(process: &Address) -> Address {
    Address {
        worker_id: ray_wire::id_bytes(WorkerId::NIL.as_bytes()),
        ..process.clone()
    }
}

/// The node of an address, or nil where it is malformed.
pub(crate) fn node_of(address: &Address) -> NodeId {
    address.node().unwrap_or(NodeId::NIL)
}
