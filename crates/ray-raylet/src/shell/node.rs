//! The node: owns the state of the shell, routes frames to its parts, and keeps the timers.
//!
//! Invariants:
//! 1. A link is in `links` from its first frame until it closes, as what it proved to be.
//! 2. Everything that waits for time is in `timers`, or asked of the scheduler (`next_tick`).

use super::config::{Limits, RayletConfig, RayletError};
use super::evidence::Evidence;
use super::gcs::GcsLink;
use super::logs::Logs;
use super::processes::{Jobs, Process, Watchers};
use super::signals::{self, Signals};
use super::spilling::Spiller;
use super::transfer::{AskedChunk, Waiter};
use super::zygote::{Zygote, ZygoteCommand};
use crate::elsewhere::Elsewhere;
use crate::objects::{Owners, RoomQueue};
use crate::pull::{PullEvent, Pulls, WaiterId};
use crate::scheduler::LocalScheduler;
use crate::spill::SpillIndex;
use crate::types::{Event, Milliseconds};
use bytes::Bytes;
use ray_ids::{LeaseId, NodeId, ObjectId, WorkerId};
use ray_rpc::{AuthToken, CloseReason, Frame, Link, Reactor, Target};
use ray_sched::ResourceSet;
use ray_store::{LocalBuffer, StoreServer};
use ray_wire::kinds;
use ray_wire::{Address, HandOver, NodeInfo};
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a link proved to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LinkRole {
    /// It has not said yet.
    Unknown,
    /// A process of this node.
    Process(WorkerId),
    /// A process of another node.
    Remote(WorkerId),
    /// Another raylet.
    Raylet(NodeId),
    /// It only asks.
    Tool,
}

/// What waits for its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    ConnectGcs,
    GcsAway,
    Report,
    /// A process's link is closed and its exit status is awaited; or the other way round.
    ProcessEnd(WorkerId),
    FlushZygote,
    RestartZygote,
    ReadLogs,
    LeaveAfterDrain,
    /// Somebody waits for room in the object store.
    Room,
    /// What waited for the end of a step.
    Later,
    /// Other raylets are asked again what was asked over a link that closed.
    AskElsewhere,
}

pub(super) const TOKEN_SIGNALS: u64 = 1;
pub(super) const TOKEN_PARENT: u64 = 2;
pub(super) const TOKEN_LOGS: u64 = 3;
/// A zygote's token is this and a count.
pub(super) const TOKEN_ZYGOTE: u64 = 1 << 32;
/// A watched pid's token is this and the pid.
pub(super) const TOKEN_PID: u64 = 2 << 32;

/// How long a worker must have started nothing for its lease to count as idle.
const IDLE_AFTER_MS: u64 = 3;

/// The node.
pub struct Node {
    pub(super) config: RayletConfig,
    pub(super) limits: Limits,
    pub(super) reactor: Arc<Reactor>,
    pub(super) signals: Signals,
    pub(super) node_id: NodeId,
    pub(super) address: Address,
    pub(super) token: AuthToken,
    pub(super) socket_path: PathBuf,
    pub(super) log_directory: PathBuf,
    pub(super) session_name: String,
    pub(super) total: ResourceSet,
    pub(super) start: Instant,
    pub(super) start_time_ms: u64,
    pub(super) scheduler: LocalScheduler,
    pub(super) store: StoreServer,
    pub(super) evidence: Evidence,
    /// When the scheduler is to hear of the time.
    pub(super) tick_due: Option<Milliseconds>,
    /// The sequence that a lease's worker had started when it was last looked at, and since when.
    pub(super) last_started: FxHashMap<LeaseId, (u64, Milliseconds)>,
    pub(super) links: FxHashMap<u64, (Arc<Link>, LinkRole)>,
    pub(super) processes: FxHashMap<WorkerId, Process>,
    pub(super) tokens: FxHashMap<u64, WorkerId>,
    pub(super) pids: FxHashMap<u32, WorkerId>,
    pub(super) remote_owners: FxHashMap<WorkerId, Arc<Link>>,
    pub(super) jobs: Jobs,
    pub(super) watchers: Watchers,
    pub(super) nodes: FxHashMap<NodeId, NodeInfo>,
    pub(super) gcs: GcsLink,
    pub(super) zygote: Option<Zygote>,
    pub(super) zygote_command: ZygoteCommand,
    pub(super) zygote_starts: u64,
    pub(super) zygote_failures: u32,
    /// Fork requests that no zygote has been asked yet.
    pub(super) zygote_backlog: BTreeMap<u64, serde_json::Value>,
    pub(super) logs: Logs,
    pub(super) owners: Owners,
    pub(super) elsewhere: Elsewhere,
    pub(super) room: RoomQueue,
    pub(super) serving_room: bool,
    pub(super) last_extent_recall_ms: Milliseconds,
    pub(super) spilled: SpillIndex,
    pub(super) spiller: Spiller,
    pub(super) spill_error: Option<String>,
    pub(super) spill_not_before: Milliseconds,
    /// Who waits for an object to come back from disk.
    pub(super) restoring: FxHashMap<ObjectId, Vec<WaiterId>>,
    pub(super) pulls: Pulls,
    pub(super) waiters: FxHashMap<WaiterId, Waiter>,
    pub(super) next_waiter: WaiterId,
    pub(super) buffers: FxHashMap<ObjectId, LocalBuffer>,
    /// First chunks, kept until their objects have a buffer.
    pub(super) held_chunks: FxHashMap<ObjectId, Bytes>,
    /// The chunk that is being handled.
    pub(super) arriving: Option<Bytes>,
    pub(super) asked_chunks: FxHashMap<u64, AskedChunk>,
    pub(super) next_chunk: u64,
    pub(super) later: VecDeque<PullEvent>,
    pub(super) peers: FxHashMap<NodeId, Arc<Link>>,
    pub(super) next_token: u64,
    pub(super) timers: BTreeSet<(Milliseconds, Timer)>,
    pub(super) stopping: bool,
    pub(super) outcome: Option<RayletError>,
}

impl Node {
    /// Listens, starts the zygote and goes to the control plane.
    pub fn start(&mut self) -> Result<(), RayletError> {
        self.adopt_zygote()?;
        let _ = std::fs::remove_file(&self.socket_path);
        self.reactor.listen_unix(&self.socket_path)?;
        let wanted = (self.config.host.as_str(), self.config.port);
        let address: SocketAddr = wanted
            .to_socket_addrs()
            .map_err(|error| RayletError::io(format!("resolve {}", self.config.host), error))?
            .next()
            .ok_or_else(|| RayletError::Config(format!("host {} has no address", self.config.host)))?;
        let bound = self
            .reactor
            .listen_tcp(address, Target::raylet(self.node_id), self.token.clone())?;
        self.address.port = u32::from(bound.port());
        self.reactor.set_hello(ray_wire::encode(&self.address).to_vec());
        self.reactor
            .watch_descriptor(self.signals.descriptor(), TOKEN_SIGNALS)?;
        self.reactor.watch_descriptor(self.logs.descriptor(), TOKEN_LOGS)?;
        if let Some(descriptor) = self.config.parent_fd {
            // SAFETY: whoever started the raylet left this descriptor open for it.
            let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
            let _ = rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC);
            self.reactor.watch_descriptor(borrowed, TOKEN_PARENT)?;
        }
        self.connect_gcs();
        self.step(Event::Tick);
        Ok(())
    }

    pub(super) fn now(&self) -> Milliseconds {
        self.start.elapsed().as_millis() as u64
    }

    pub(super) fn at(&mut self, delay_ms: u64, timer: Timer) {
        let at = self.now() + delay_ms;
        self.timers.insert((at, timer));
    }

    pub(super) fn cancel_timer(&mut self, timer: Timer) {
        self.timers.retain(|(_, other)| *other != timer);
    }

    pub(super) fn has_timer(&self, timer: Timer) -> bool {
        self.timers.iter().any(|(_, other)| *other == timer)
    }

    /// When `on_timer` is due.
    pub fn next_due(&mut self) -> Option<Instant> {
        let own = self.timers.first().map(|(at, _)| *at);
        // The scheduler counts from the moment that it is asked, so that what it said first holds.
        let tick = self.scheduler.next_tick(self.now());
        self.tick_due = match (self.tick_due, tick) {
            (Some(due), Some(at)) => Some(due.min(at)),
            (_, at) => at,
        };
        let tick = self.tick_due;
        let at = [own, tick, self.pulls.next_tick()].into_iter().flatten().min()?;
        Some(self.start + Duration::from_millis(at))
    }

    /// After every handler: sees to it that the timer fires in time.
    pub fn after(&mut self) {
        if let Some(at) = self.next_due() {
            self.reactor.request_timer(at);
        }
    }

    /// Something is due.
    pub fn on_timer(&mut self, _now: Instant) {
        let now = self.now();
        while let Some((at, timer)) = self.timers.first().copied() {
            if at > now {
                break;
            }
            self.timers.remove(&(at, timer));
            match timer {
                Timer::ConnectGcs => self.connect_gcs(),
                Timer::GcsAway => self.gcs_away_too_long(),
                Timer::Report => self.send_report(),
                Timer::ProcessEnd(worker) => self.process_end_overdue(worker),
                Timer::FlushZygote => self.flush_zygote(),
                Timer::RestartZygote => self.start_zygote(),
                Timer::ReadLogs => self.read_logs(),
                Timer::LeaveAfterDrain => self.stop(None),
                Timer::Room => self.room_timer(),
                Timer::Later => self.run_later(),
                Timer::AskElsewhere => self.ask_where_no_link_is(),
            }
        }
        if self.pulls.next_tick().is_some_and(|at| at <= now) {
            self.step_pulls(PullEvent::Tick);
        }
        if self.tick_due.is_some_and(|at| at <= now) {
            self.tick_due = None;
            self.step(Event::Tick);
        }
    }

    /// The spill thread has something to say.
    pub fn on_wake(&mut self) {
        self.take_spilled();
    }

    /// A watched descriptor is readable.
    pub fn on_descriptor(&mut self, token: u64) {
        match token {
            TOKEN_SIGNALS => self.on_signals(),
            TOKEN_LOGS => {
                if self.logs.take_events() && !self.has_timer(Timer::ReadLogs) {
                    self.at(self.limits.log_interval_ms, Timer::ReadLogs);
                }
            }
            TOKEN_PARENT => {
                let Some(descriptor) = self.config.parent_fd else {
                    return;
                };
                let mut buffer = [0; 64];
                // SAFETY: as in start.
                let read = rustix::io::read(unsafe { BorrowedFd::borrow_raw(descriptor) }, &mut buffer);
                if matches!(read, Ok(0)) {
                    self.reactor.unwatch_descriptor(TOKEN_PARENT);
                    self.stop(None);
                }
            }
            _ if token & TOKEN_PID != 0 => self.watched_pid_ended(token),
            _ if token & TOKEN_ZYGOTE != 0 => self.on_zygote(token),
            _ => self.reactor.unwatch_descriptor(token),
        }
    }

    fn on_signals(&mut self) {
        for signal in self.signals.take() {
            match signal {
                libc::SIGCHLD => {
                    while let Some(exit) = signals::reap_one() {
                        self.child_ended(exit);
                    }
                }
                _ => self.stop(None),
            }
        }
    }

    /// Ends `run`.
    pub(super) fn stop(&mut self, outcome: Option<RayletError>) {
        if !self.stopping {
            self.stopping = true;
            self.outcome = outcome;
            self.reactor.stop();
        }
    }

    /// Why `run` ended.
    pub fn take_outcome(&mut self) -> Result<(), RayletError> {
        self.outcome.take().map_or(Ok(()), Err)
    }

    /// A link's Hello arrived: what is at its other end, where it says so.
    pub fn on_ready(&mut self, link: &Arc<Link>, peer_hello: &[u8]) {
        if self.gcs.is_link(link.id()) {
            return;
        }
        let hello: Option<Address> = ray_wire::decode("hello", Bytes::copy_from_slice(peer_hello)).ok();
        let remote = matches!(link.peer(), ray_rpc::Peer::Tcp { .. });
        let role = match hello
            .as_ref()
            .and_then(|hello| Some((hello.node().ok()?, hello.worker().ok()?)))
        {
            Some((node, worker)) if remote && worker.is_nil() => LinkRole::Raylet(node),
            Some((node, worker)) if remote && !worker.is_nil() => {
                self.elsewhere.note(worker, node);
                self.remote_owners.insert(worker, link.clone());
                LinkRole::Remote(worker)
            }
            _ => LinkRole::Unknown,
        };
        self.links.entry(link.id()).or_insert((link.clone(), role)).1 = role;
    }

    /// A link is gone.
    pub fn on_closed(&mut self, link: &Arc<Link>, reason: &CloseReason) {
        if self.gcs.is_link(link.id()) {
            return self.gcs_lost(&reason.sentence);
        }
        let Some((_, role)) = self.links.remove(&link.id()) else {
            return;
        };
        self.watchers.forget_link(link.id());
        self.cancel_waiters(|waiter| waiter.link.id() == link.id());
        match role {
            LinkRole::Process(worker) => self.process_link_closed(worker, &reason.sentence),
            LinkRole::Remote(worker) => {
                if self
                    .remote_owners
                    .get(&worker)
                    .is_some_and(|known| known.id() == link.id())
                {
                    self.remote_owners.remove(&worker);
                    self.step(Event::OwnerGone { process: worker });
                }
            }
            LinkRole::Raylet(node) => self.peer_closed(node, link),
            LinkRole::Unknown | LinkRole::Tool => {}
        }
    }

    /// A peer from elsewhere wants another process of this node.
    pub fn on_stranger(&mut self, socket: OwnedFd, target: Target) {
        let wanted = if target.process == Target::GCS_PROCESS {
            self.gcs.link()
        } else {
            self.processes
                .get(&target.process)
                .and_then(|process| process.link.clone())
        };
        // Dropping the socket closes it, which is an answer: the peer learns that nobody is there.
        let Some(link) = wanted else { return };
        let peer = rustix::net::getpeername(&socket).ok().flatten();
        let peer = peer
            .and_then(|address| SocketAddr::try_from(address).ok())
            .map(|address| address.to_string());
        let header = ray_wire::encode(&HandOver {
            peer: peer.unwrap_or_default(),
        });
        if let Err(error) = link.send_with_descriptor(kinds::HAND_OVER, 0, header, socket) {
            eprintln!("raylet: a connection for {target} could not be handed over: {error}");
        }
    }

    /// A frame arrived.
    pub fn on_frame(&mut self, link: &Arc<Link>, frame: Frame) {
        if self.stopping {
            return;
        }
        if self.gcs.is_link(link.id()) {
            return self.on_gcs_frame(frame);
        }
        let role = self
            .links
            .entry(link.id())
            .or_insert((link.clone(), LinkRole::Unknown))
            .1;
        if let Err(problem) = self.on_process_frame(link, role, frame) {
            link.close(CloseReason::new(ray_rpc::CloseCause::Protocol, problem));
        }
    }

    /// Feeds the scheduler and carries out what it says.
    pub(super) fn step(&mut self, event: Event) {
        let now = self.now();
        if matches!(event, Event::RequestLease { .. } | Event::Tick) {
            self.sample_activity();
        }
        let before = (self.scheduler.revision(), self.scheduler.waiting());
        let commands = self.scheduler.step(event, now);
        for command in commands {
            self.carry_out(command);
        }
        if before != (self.scheduler.revision(), self.scheduler.waiting()) {
            self.report_soon();
        }
    }

    /// Learns from the workers' own words which leases run something. Workers that do not say are left as they are.
    pub(super) fn sample_activity(&mut self) {
        let now = self.now();
        let (mut idle, mut busy) = (Vec::new(), Vec::new());
        for (lease, worker, first_sequence) in self.scheduler.active_leases() {
            let Some(index) = self.processes.get(&worker).and_then(|process| process.evidence) else {
                continue;
            };
            let (finished, started) = (self.evidence.finished(index), self.evidence.started(index));
            if finished < first_sequence {
                // It says nothing, or nothing was pushed to it yet.
                continue;
            }
            // Between two short calls a worker is idle for a moment; its owner still uses it.
            let seen = self.last_started.entry(lease).or_insert((0, now));
            if seen.0 != started {
                *seen = (started, now);
            }
            if finished >= started && now >= seen.1 + IDLE_AFTER_MS {
                idle.push(lease);
            } else {
                busy.push(lease);
            }
        }
        if self.last_started.len() > 2 * (idle.len() + busy.len()) + 64 {
            let kept: std::collections::HashSet<LeaseId> = idle.iter().chain(&busy).copied().collect();
            self.last_started.retain(|lease, _| kept.contains(lease));
        }
        if !idle.is_empty() || !busy.is_empty() {
            // What waits may be served by what is idle now.
            for command in self.scheduler.step(Event::Activity { idle, busy }, now) {
                self.carry_out(command);
            }
        }
    }

    pub(super) fn report_soon(&mut self) {
        if !self.has_timer(Timer::Report) {
            let since = self.now().saturating_sub(self.gcs.last_report_ms);
            self.at(
                self.limits.resource_report_interval_ms.saturating_sub(since).max(1),
                Timer::Report,
            );
        }
    }

    /// Leaves nothing behind.
    pub fn shut_down(&mut self) {
        let pids: Vec<u32> = self
            .processes
            .values()
            .filter(|process| process.is_child())
            .map(|process| process.pid)
            .collect();
        for pid in pids.into_iter().filter(|pid| *pid != 0) {
            signals::kill_group(pid);
        }
        if let Some(zygote) = self.zygote.take() {
            signals::kill_group(zygote.pid);
        }
        // As their reaper this process inherits what the workers started, until nothing is left.
        let deadline = Instant::now() + Duration::from_millis(2_500);
        loop {
            while signals::reap_one().is_some() {}
            let left = signals::children();
            if left.is_empty() || Instant::now() > deadline {
                break;
            }
            for pid in left {
                signals::kill_group(pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.spiller.stop();
        // The reactor and its service hold each other, so nothing is dropped: files are removed by name.
        for path in [self.store.path(), &self.socket_path] {
            let _ = std::fs::remove_file(path);
        }
        for worker in self.processes.keys() {
            let path = self.config.session_directory.join("sockets").join(worker.hex());
            let _ = std::fs::remove_file(ray_rpc::path_before_listening(&path));
            let _ = std::fs::remove_file(path);
        }
    }
}
