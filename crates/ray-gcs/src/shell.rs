//! The shell: owns the sockets, the clock and the storage, feeds the machine and carries out its commands.
//!
//! It refuses frames before a link's registration, and kinds that are not for the control plane.
//!
//! What frames of one round of the reactor want stored is committed together at the round's end, and what may depend on
//! it is sent after that. While the storage fails, orders are refused with its error, what was done before is held back
//! until it can be stored, and questions are answered.
//!
//! Invariants:
//! 1. Nothing that depends on a mutation leaves before the mutation is committed.
//! 2. A node has one current link; an older one is closed without being taken for the node's death.
//! 3. Commands are carried out in the order in which the machine gave them.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ray_ids::NodeId;
use ray_rpc::{CloseReason, Config, Frame, Link, Reactor, RpcError, Service};
use ray_wire::{kinds, GcsReply, GCS_ERROR_STORAGE};

use crate::error::GcsError;
use crate::messages::{encode_reply, NodeMessage};
use crate::records::Mutation;
use crate::settings::GcsSettings;
use crate::signals::Signals;
use crate::state::{Command, Event, Gcs};
use crate::storage::{SqliteStorage, Storage, Synchronous};

/// How long a failing storage is left alone before it is tried again.
const STORAGE_RETRY: Duration = Duration::from_millis(500);
/// Steps held back by a failing storage beyond which the control plane gives up.
const MAXIMUM_HELD_STEPS: usize = 1_000_000;
const TOKEN_SIGNAL: u64 = 1;
const TOKEN_PARENT: u64 = 2;

/// How to run a control plane.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GcsConfig {
    /// The session's directory.
    pub session_directory: PathBuf,
    /// Where the database is; `<session>/gcs` where it is not given.
    #[serde(default)]
    pub data_directory: Option<PathBuf>,
    /// The socket to listen on; `<session>/sockets/gcs` where it is not given.
    #[serde(default)]
    pub socket_path: Option<PathBuf>,
    /// The session's name, told to every node.
    #[serde(default)]
    pub session_name: String,
    /// Limits and periods by name; unknown names are told to every node.
    #[serde(default)]
    pub system_config: serde_json::Map<String, serde_json::Value>,
    /// What a commit waits for.
    #[serde(default)]
    pub synchronous: Synchronous,
    /// The reading end of a pipe: at its end of file nobody needs the control plane any more.
    #[serde(default)]
    pub parent_fd: Option<i32>,
    /// Where standard output and error go.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
}

impl GcsConfig {
    /// Reads a configuration.
    pub fn from_json(text: &str) -> Result<Self, GcsError> {
        serde_json::from_str(text).map_err(|error| GcsError::Config(error.to_string()))
    }
}

struct Inner {
    gcs: Gcs,
    storage: Box<dyn Storage>,
    /// Of each link that registered, its node.
    bound: HashMap<u64, NodeId>,
    nodes: HashMap<NodeId, Arc<Link>>,
    /// What is to be stored next, and the steps that wait for it.
    unstored: Vec<Mutation>,
    held: Vec<HeldStep>,
    storage_error: Option<(String, Instant)>,
    fatal: Option<GcsError>,
    random_state: u64,
}

/// The commands of a step that are not carried out yet.
struct HeldStep {
    /// It stored nothing and answers questions.
    answers_only: bool,
    commands: Vec<Command>,
}

impl HeldStep {
    fn carry_out(self, inner: &mut Inner) {
        self.commands.into_iter().for_each(|command| carry_out(inner, command));
    }
}

impl Inner {
    fn new(gcs: Gcs, storage: Box<dyn Storage>, random_state: u64) -> Self {
        Self {
            gcs,
            storage,
            bound: HashMap::new(),
            nodes: HashMap::new(),
            unstored: Vec::new(),
            held: Vec::new(),
            storage_error: None,
            fatal: None,
            random_state,
        }
    }
}

struct Shell {
    inner: Mutex<Inner>,
    reactor: Weak<Reactor>,
    start: Instant,
    start_unix_ms: u64,
    signals: Option<Signals>,
    parent: Option<OwnedFd>,
}

impl Shell {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since 1970 that never go back.
    fn now_ms(&self, now: Instant) -> u64 {
        self.start_unix_ms + now.saturating_duration_since(self.start).as_millis() as u64
    }

    fn step(&self, inner: &mut Inner, event: Event) {
        let now_ms = self.now_ms(Instant::now());
        let Inner { gcs, random_state, .. } = inner;
        let commands = gcs.step(event, now_ms, &mut || split_mix(random_state));
        let mut step = HeldStep {
            answers_only: true,
            commands,
        };
        for command in &mut step.commands {
            match command {
                Command::Persist(mutations) => inner.unstored.append(mutations),
                Command::ReplyToNode { .. } => continue,
                Command::SendToNode { .. } | Command::CloseNode { .. } => {}
            }
            step.answers_only = false;
        }
        let nothing_waits = inner.held.is_empty() && inner.unstored.is_empty();
        if nothing_waits || (inner.storage_error.is_some() && step.answers_only) {
            step.carry_out(inner);
        } else {
            inner.held.push(step);
            if let Some(reactor) = self.reactor.upgrade() {
                reactor.wake();
            }
        }
        self.request_timer(inner);
    }

    fn request_timer(&self, inner: &Inner) {
        if let (Some(at), Some(reactor)) = (self.next_timer(inner), self.reactor.upgrade()) {
            reactor.request_timer(at);
        }
    }

    fn next_timer(&self, inner: &Inner) -> Option<Instant> {
        let due = inner.gcs.next_deadline();
        // One millisecond more, because the machine's clock drops fractions.
        let due = due.map(|ms| self.start + Duration::from_millis(ms.saturating_sub(self.start_unix_ms) + 1));
        match (due, inner.storage_error.as_ref().map(|(_, at)| *at)) {
            (Some(due), Some(retry)) => Some(due.min(retry)),
            (due, retry) => due.or(retry),
        }
    }

    /// Commits what is held and sends what waited for it.
    fn flush(&self, inner: &mut Inner) {
        if inner.held.is_empty() || inner.storage_error.as_ref().is_some_and(|(_, at)| *at > Instant::now()) {
            return;
        }
        if let Err(error) = inner.storage.commit(&inner.unstored) {
            if inner.storage_error.is_none() {
                tracing::error!(%error, "the storage fails; orders are refused until it works again");
            }
            inner.storage_error = Some((error.to_string(), Instant::now() + STORAGE_RETRY));
            // Answers to questions need nothing stored.
            let all = std::mem::take(&mut inner.held);
            let (answers, held): (Vec<_>, Vec<_>) = all.into_iter().partition(|step| step.answers_only);
            inner.held = held;
            answers.into_iter().for_each(|step| step.carry_out(inner));
            if inner.held.len() > MAXIMUM_HELD_STEPS {
                inner.fatal = Some(error);
                self.stop();
            }
            self.request_timer(inner);
            return;
        }
        inner.unstored.clear();
        if inner.storage_error.take().is_some() {
            tracing::info!("the storage works again");
        }
        let held = std::mem::take(&mut inner.held);
        held.into_iter().for_each(|step| step.carry_out(inner));
    }

    fn stop(&self) {
        if let Some(reactor) = self.reactor.upgrade() {
            reactor.stop();
        }
    }

    fn on_register(&self, inner: &mut Inner, link: &Arc<Link>, correlation: u64, message: Box<ray_wire::RegisterNode>) {
        let address = message.node.as_ref().and_then(|node| node.address.as_ref());
        let Some(node) = address.and_then(|address| address.node().ok()) else {
            link.close(CloseReason::local("the registration lacks its node's id"));
            return;
        };
        if inner.bound.get(&link.id()).is_some_and(|bound| *bound != node) {
            link.close(CloseReason::local("the link registered for two nodes"));
            return;
        }
        if let Some(old) = inner.nodes.insert(node, link.clone()) {
            if old.id() != link.id() {
                inner.bound.remove(&old.id());
                old.close(CloseReason::local("the node opened another link"));
            }
        }
        inner.bound.insert(link.id(), node);
        tracing::info!(%node, link = link.description(), "node registers");
        self.step(
            inner,
            Event::FromNode {
                node,
                message: NodeMessage::Register { correlation, message },
            },
        );
    }

    fn adopt(&self, link: &Link, frame: Frame) {
        let (Some(socket), Some(reactor)) = (frame.descriptor, self.reactor.upgrade()) else {
            link.close(CloseReason::local("a hand-over without a socket"));
            return;
        };
        if let Err(error) = reactor.adopt(socket) {
            tracing::warn!(%error, "a socket that was handed over is not taken");
        }
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn carry_out(inner: &mut Inner, command: Command) {
    match command {
        Command::Persist(_) => {}
        Command::SendToNode { node, message } => send(inner, node, message.encode()),
        Command::ReplyToNode {
            node,
            correlation,
            reply,
        } => send(inner, node, encode_reply(correlation, &reply)),
        Command::CloseNode { node, reason } => {
            if let Some(link) = inner.nodes.remove(&node) {
                inner.bound.remove(&link.id());
                link.close(CloseReason::local(reason));
            }
        }
    }
}

fn send(inner: &Inner, node: NodeId, (kind, correlation, header): (u16, u64, bytes::Bytes)) {
    let Some(link) = inner.nodes.get(&node) else { return };
    match link.send(kind, correlation, header, &[]) {
        Ok(()) | Err(RpcError::LinkClosed { .. }) => {}
        Err(error) => {
            // A frame that cannot be sent must not be missing silently: the node registers anew and is told all again.
            tracing::warn!(%node, kind = kinds::name(kind), %error, "a frame could not be sent");
            link.close(CloseReason::local(error.to_string()));
        }
    }
}

impl Service for Shell {
    fn on_frame(&self, link: &Arc<Link>, frame: Frame) {
        if frame.kind == kinds::HAND_OVER {
            self.adopt(link, frame);
            return;
        }
        let message = match NodeMessage::decode(frame.kind, frame.correlation, frame.header) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(link = link.description(), %error, "a link is closed");
                link.close(CloseReason::local(error.to_string()));
                return;
            }
        };
        let mut inner = self.lock();
        let inner = &mut *inner;
        if let NodeMessage::Register { correlation, message } = message {
            self.on_register(inner, link, correlation, message);
            return;
        }
        let Some(node) = inner.bound.get(&link.id()).copied() else {
            link.close(CloseReason::local("a link begins with its node's registration"));
            return;
        };
        if let (Some((error, _)), NodeMessage::Request { correlation, request }) = (&inner.storage_error, &message) {
            if request.request_id != 0 {
                let error = format!("the control plane cannot store anything now: {error}");
                let reply = GcsReply {
                    error,
                    error_kind: GCS_ERROR_STORAGE,
                    ..GcsReply::default()
                };
                send(inner, node, encode_reply(*correlation, &reply));
                return;
            }
        }
        self.step(inner, Event::FromNode { node, message });
    }

    fn on_ready(&self, link: &Arc<Link>, _peer_hello: &[u8]) {
        tracing::debug!(link = link.description(), "a link is ready");
    }

    fn on_closed(&self, link: &Arc<Link>, reason: &CloseReason) {
        // Links that close because the control plane ends say nothing about their nodes.
        if self.reactor.upgrade().is_none_or(|reactor| reactor.is_stopping()) {
            return;
        }
        let mut inner = self.lock();
        let inner = &mut *inner;
        let Some(node) = inner.bound.remove(&link.id()) else {
            return;
        };
        inner.nodes.remove(&node);
        tracing::info!(%node, %reason, "the node's link closed");
        self.step(
            inner,
            Event::NodeLinkDown {
                node,
                reason: reason.to_string(),
            },
        );
    }

    fn on_wake(&self) {
        self.flush(&mut self.lock());
    }

    fn on_timer(&self, now: Instant) -> Option<Instant> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if inner.gcs.next_deadline().is_some_and(|due| due <= self.now_ms(now)) {
            self.step(inner, Event::Tick);
        }
        self.flush(inner);
        self.next_timer(inner)
    }

    fn on_descriptor_ready(&self, token: u64) {
        let descriptor = match token {
            TOKEN_SIGNAL => self.signals.as_ref().map(Signals::descriptor),
            _ => self.parent.as_ref(),
        };
        let Some(descriptor) = descriptor else { return };
        let mut buffer = [0_u8; 256];
        // SAFETY: the buffer is writable for its length, and the descriptor is open as long as `self` is.
        let count = unsafe { libc::read(descriptor.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        match (token, count) {
            (TOKEN_SIGNAL, 1..) => {
                tracing::info!("a signal asks the control plane to end");
                self.stop();
            }
            (TOKEN_PARENT, 0) => {
                tracing::info!("the process that needed the control plane is gone");
                self.stop();
            }
            _ => {}
        }
    }
}

fn redirect_output(path: &std::path::Path) -> Result<(), GcsError> {
    let failed = |source| GcsError::File {
        action: "opening the log",
        path: path.to_path_buf(),
        source,
    };
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(failed)?;
    for standard in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        // SAFETY: both descriptors are open; dup2 replaces the second one atomically.
        if unsafe { libc::dup2(file.as_raw_fd(), standard) } < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn take_descriptor(number: i32) -> Result<OwnedFd, GcsError> {
    // SAFETY: only asks about the descriptor.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(GcsError::Config(format!(
            "parent_fd is {number}, which is not an open descriptor"
        )));
    }
    // SAFETY: the configuration gives this descriptor to the control plane, which is its only owner from now on.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    // SAFETY: the descriptor is open; without blocking, so that a spurious readiness cannot stop the reactor.
    unsafe {
        libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC);
        let flags = libc::fcntl(number, libc::F_GETFL);
        libc::fcntl(number, libc::F_SETFL, flags | libc::O_NONBLOCK);
    }
    Ok(descriptor)
}

/// Runs a control plane until SIGTERM, SIGINT or the end of `parent_fd`.
pub fn run(config: GcsConfig) -> Result<(), GcsError> {
    if let Some(path) = &config.log_path {
        redirect_output(path)?;
    }
    let session = &config.session_directory;
    let data = config.data_directory.clone().unwrap_or_else(|| session.join("gcs"));
    let socket = config
        .socket_path
        .clone()
        .unwrap_or_else(|| session.join("sockets").join("gcs"));
    let settings = GcsSettings::new(config.session_name.clone(), config.system_config.clone())?;
    let mut storage = SqliteStorage::open(&data, config.synchronous)?;
    let start = Instant::now();
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let start_unix_ms = since_1970.as_millis() as u64;
    let mut random_state = since_1970.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32);
    let rows = storage.load()?;
    let (gcs, commands) = Gcs::restore(settings, rows, start_unix_ms, &mut || split_mix(&mut random_state))?;
    for command in commands {
        // Nobody is connected yet, so only what is to be stored matters.
        if let Command::Persist(mutations) = command {
            storage.commit(&mutations)?;
        }
    }
    tracing::info!(
        epoch = gcs.epoch(),
        storage = storage.description(),
        "the control plane starts"
    );
    let signals = Signals::new()?;
    let parent = config.parent_fd.map(take_descriptor).transpose()?;
    let inner = Inner::new(gcs, Box::new(storage), random_state);
    serve(inner, &socket, (start, start_unix_ms), Some(signals), parent)
}

fn serve(
    inner: Inner,
    socket: &std::path::Path,
    (start, start_unix_ms): (Instant, u64),
    signals: Option<Signals>,
    parent: Option<OwnedFd>,
) -> Result<(), GcsError> {
    let links = |error: RpcError| GcsError::Links(error.to_string());
    // A control plane waits for nobody with burning cores.
    let reactor = Reactor::new(Config {
        spin_us: 0,
        ..Config::default()
    })
    .map_err(links)?;
    let shell = Arc::new(Shell {
        inner: Mutex::new(inner),
        reactor: Arc::downgrade(&reactor),
        start,
        start_unix_ms,
        signals,
        parent,
    });
    reactor.set_service(shell.clone()).map_err(links)?;
    let watch = |descriptor: Option<&OwnedFd>, token: u64| match descriptor {
        Some(descriptor) => reactor.watch_descriptor(descriptor.as_fd(), token).map_err(links),
        None => Ok(()),
    };
    watch(shell.signals.as_ref().map(Signals::descriptor), TOKEN_SIGNAL)?;
    watch(shell.parent.as_ref(), TOKEN_PARENT)?;
    if let Some(directory) = socket.parent() {
        std::fs::create_dir_all(directory).map_err(|source| GcsError::File {
            action: "making the sockets' directory",
            path: directory.to_path_buf(),
            source,
        })?;
    }
    // The data directory's lock is ours, so a socket that is there belongs to a control plane that is no more.
    match std::fs::remove_file(socket) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(GcsError::File {
                action: "removing the old socket",
                path: socket.to_path_buf(),
                source,
            });
        }
        _ => {}
    }
    reactor.listen_unix(socket).map_err(links)?;
    shell.request_timer(&shell.lock());
    reactor.run();
    let mut inner = shell.lock();
    shell.flush(&mut inner);
    let _ = std::fs::remove_file(socket);
    match inner.fatal.take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "shell_tests.rs"]
mod tests;
