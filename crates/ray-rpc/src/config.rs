//! What can be set on a reactor, who serves it, and the names of its peers.
//!
//! Invariants:
//! 1. Every limit has a name here and a default; none is hidden in the code that enforces it.

use std::any::Any;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ray_ids::{NodeId, WorkerId};

use crate::error::CloseReason;
use crate::frame::Frame;
use crate::link::Link;

/// Which process of which node a TCP connection wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Target {
    /// The node; `NodeId::NIL` asks for whichever node listens at that address.
    pub node: NodeId,
    /// The process: `WorkerId::NIL` is the raylet itself, `Target::GCS_PROCESS` the control plane.
    pub process: WorkerId,
}

impl Target {
    /// The reserved process id of the GCS.
    pub const GCS_PROCESS: WorkerId = WorkerId::from_array([0; WorkerId::SIZE]);

    /// The raylet of `node`.
    pub fn raylet(node: NodeId) -> Self {
        Self {
            node,
            process: WorkerId::NIL,
        }
    }

    /// The GCS that is reached through `node`.
    pub fn gcs(node: NodeId) -> Self {
        Self {
            node,
            process: Self::GCS_PROCESS,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.process.is_nil() {
            f.write_str("the raylet")?;
        } else if self.process == Self::GCS_PROCESS {
            f.write_str("the GCS")?;
        } else {
            write!(f, "process {}", self.process)?;
        }
        if self.node.is_nil() {
            Ok(())
        } else {
            write!(f, " of node {}", self.node)
        }
    }
}

/// Who is at the other end of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A process of this node.
    Unix {
        /// The socket's path, where one is known.
        path: Option<PathBuf>,
        /// The peer's process id; the listener's for a link that we opened.
        pid: Option<u32>,
    },
    /// A process of any node.
    Tcp {
        /// Its address.
        address: SocketAddr,
        /// What we asked for, where we opened the link.
        target: Option<Target>,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { path, pid } => {
                f.write_str("a process of this node")?;
                if let Some(pid) = pid {
                    write!(f, " (pid {pid})")?;
                }
                if let Some(path) = path {
                    write!(f, " on {}", path.display())?;
                }
                Ok(())
            }
            Self::Tcp {
                address,
                target: Some(target),
            } => write!(f, "{target} at {address}"),
            Self::Tcp { address, target: None } => write!(f, "{address}"),
        }
    }
}

/// What a process does with what its links bring.
///
/// Every method is called by the thread that holds the leader token, one at a time per reactor, with no lock of the
/// reactor held: handlers may send, connect, close and notify. They must not block and must not call
/// [`crate::Reactor::wait`].
pub trait Service: Send + Sync + 'static {
    /// A frame arrived.
    fn on_frame(&self, link: &Arc<Link>, frame: Frame);
    /// The peer's Hello arrived; frames follow.
    fn on_ready(&self, link: &Arc<Link>, peer_hello: &[u8]);
    /// The link is gone. Called exactly once a link, after its last frame.
    fn on_closed(&self, link: &Arc<Link>, reason: &CloseReason);
    /// A TCP peer proved itself and wants another process of this node: hand the socket over, or drop it.
    fn on_stranger(&self, socket: OwnedFd, target: Target) {
        let _ = (socket, target);
    }
    /// After [`crate::Reactor::wake`] from any thread. Several wakes may be answered by one call.
    fn on_wake(&self) {}
    /// The requested time has come. Returns when it wants to be called next.
    fn on_timer(&self, now: Instant) -> Option<Instant> {
        let _ = now;
        None
    }
    /// A watched descriptor is readable, hung up or in error. It is called again until that is no longer so.
    fn on_descriptor_ready(&self, token: u64) {
        let _ = token;
    }
}

/// What happens to a frame that is about to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultAction {
    /// It is sent.
    Deliver,
    /// It is lost.
    Drop,
    /// It, and what is sent behind it, waits this long, so that order is kept.
    Delay(Duration),
    /// The link closes with this sentence, and the frame is lost.
    Close(String),
}

/// Faults for tests: decides about each frame of the user by its kind.
pub trait FaultPolicy: Send + Sync + 'static {
    /// What happens to a frame of this kind on this link.
    fn on_send(&self, link: &Link, kind: u16) -> FaultAction;
}

/// Grants the right to spin, so that spinners of a node never outnumber its idle cores.
pub trait SpinGate: Send + Sync + 'static {
    /// Takes a slot, or answers that there is none.
    fn try_claim(&self) -> bool;
    /// Gives the slot back.
    fn release(&self);
}

/// A gate over one shared word that counts the free slots, for example in a mapping that all processes of a node share.
pub struct SharedSpinSlots {
    word: Box<dyn AsRef<std::sync::atomic::AtomicU32> + Send + Sync>,
}

impl SharedSpinSlots {
    /// A gate over `word`, which somebody else initialised with the number of slots.
    pub fn new(word: Box<dyn AsRef<std::sync::atomic::AtomicU32> + Send + Sync>) -> Self {
        Self { word }
    }

    fn free(&self) -> &std::sync::atomic::AtomicU32 {
        (*self.word).as_ref()
    }
}

impl SpinGate for SharedSpinSlots {
    fn try_claim(&self) -> bool {
        use std::sync::atomic::Ordering;
        self.free()
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1))
            .is_ok()
    }

    fn release(&self) {
        self.free().fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Settings of a reactor.
#[derive(Clone)]
pub struct Config {
    /// Longest frame, as its length field counts it.
    pub frame_limit_bytes: usize,
    /// How long a leader polls after recent traffic before it sleeps; 0 turns spinning off.
    pub spin_us: u32,
    /// Who grants spinning; without it the one leader of the process may spin where there is more than one core.
    pub spin_gate: Option<Arc<dyn SpinGate>>,
    /// How long a connection may take to open, TCP only.
    pub connect_timeout: Duration,
    /// How long either side of the TCP challenge waits for the other's next message.
    pub handshake_timeout: Duration,
    /// How many TCP strangers may be in the middle of the challenge at once; for one more the oldest is dropped.
    pub max_half_open: usize,
    /// How long a peer may take to say Hello.
    pub hello_timeout: Duration,
    /// How long a link that was closed here may take to send what is queued.
    pub linger_timeout: Duration,
    /// How long sent TCP bytes may stay unacknowledged before the link is given up.
    pub tcp_user_timeout: Duration,
    /// How long a TCP link may be silent before the kernel pings the other end.
    pub tcp_keepalive_idle: Duration,
    /// How many links the process may hold.
    pub max_links: usize,
    /// Queued bytes at which a corked link sends all the same.
    pub cork_limit_bytes: usize,
    /// Age at which what a corked link has queued is sent all the same.
    pub cork_limit_us: u32,
    /// How much a Unix socket holds before its sender must wait for it to be read; the operating system may allow less.
    pub unix_buffer_bytes: usize,
    /// While threads wait and leave in quick turns, the background thread looks at the links this often, which saves each
    /// turn the arming of its alarm: what arrives between two turns is served after this long at the latest. 0: never.
    pub patrol_us: u32,
    /// Faults, for tests.
    pub faults: Option<Arc<dyn FaultPolicy>>,
    /// Lowest and highest protocol version spoken.
    pub protocol_versions: (u16, u16),
}

impl Default for Config {
    fn default() -> Self {
        Self {
            frame_limit_bytes: 512 << 20,
            spin_us: 50,
            spin_gate: None,
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(5),
            max_half_open: 128,
            hello_timeout: Duration::from_secs(30),
            linger_timeout: Duration::from_secs(5),
            tcp_user_timeout: Duration::from_secs(20),
            tcp_keepalive_idle: Duration::from_secs(10),
            max_links: 20_000,
            cork_limit_bytes: 64 << 10,
            cork_limit_us: 100,
            unix_buffer_bytes: 1 << 20,
            patrol_us: 1000,
            faults: None,
            protocol_versions: (1, 1),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("frame_limit_bytes", &self.frame_limit_bytes)
            .field("spin_us", &self.spin_us)
            .field("max_links", &self.max_links)
            .field("protocol_versions", &self.protocol_versions)
            .finish_non_exhaustive()
    }
}

/// What a user hangs on a link.
pub type UserData = Box<dyn Any + Send + Sync>;
