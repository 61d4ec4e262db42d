//! Everything in the epoll that is not a link: listeners, strangers in the middle of the TCP challenge, watched
//! descriptors and closed sockets that linger.
//!
//! Invariants:
//! 1. A TCP peer becomes a link or is handed over only when it has proven the token; not one byte beyond the challenge is
//!    read before that.
//! 2. At most `max_half_open` accepted strangers exist at once, each for at most the handshake timeout a message; where
//!    another comes, the oldest goes.
//! 3. Running out of descriptors pauses a listener and ends nothing.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use crate::auth::{random_nonce, Acceptor, AuthToken, Initiator, Step, CHALLENGE_BYTES, OPENING_BYTES};
use crate::config::{Peer, Target};
use crate::error::{CloseCause, CloseReason, RpcError};
use crate::link::Link;
use crate::reactor::{Chore, Reactor, TAG_SHIFT, TAG_SOURCE};
use crate::socket;
use crate::sync::lock;

/// Connections accepted before others have their turn.
const ACCEPT_BUDGET: usize = 64;
/// How long a listener rests when the process has no descriptors left.
const LISTENER_PAUSE: Duration = Duration::from_millis(100);
/// Longest message of the challenge.
const MESSAGE_BYTES: usize = if OPENING_BYTES > CHALLENGE_BYTES {
    OPENING_BYTES
} else {
    CHALLENGE_BYTES
};

pub(crate) enum Source {
    UnixListener {
        socket: Arc<OwnedFd>,
        path: PathBuf,
    },
    TcpListener {
        socket: Arc<OwnedFd>,
        self_target: Target,
        token: AuthToken,
    },
    HalfOpen(Box<HalfOpen>),
    Descriptor {
        descriptor: OwnedFd,
        token: u64,
    },
    Lingering {
        socket: Arc<OwnedFd>,
    },
}

impl Source {
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::UnixListener { socket, .. } | Self::TcpListener { socket, .. } | Self::Lingering { socket } => {
                socket.as_fd()
            }
            Self::HalfOpen(half_open) => half_open.socket.as_fd(),
            Self::Descriptor { descriptor, .. } => descriptor.as_fd(),
        }
    }
}

enum Role {
    Accepting {
        acceptor: Acceptor,
        self_target: Target,
    },
    Connecting {
        initiator: Initiator,
        link: Arc<Link>,
        connected: bool,
    },
}

/// A TCP connection that is not proven yet.
pub(crate) struct HalfOpen {
    socket: OwnedFd,
    address: SocketAddr,
    role: Role,
    message: [u8; MESSAGE_BYTES],
    filled: usize,
}

enum Progress {
    Wait,
    Proven(Target),
    Failed(CloseCause, String),
}

impl HalfOpen {
    fn wanted(&self) -> usize {
        match &self.role {
            Role::Accepting { acceptor, .. } => acceptor.wanted_bytes(),
            Role::Connecting { initiator, .. } => initiator.wanted_bytes(),
        }
    }

    /// A fresh socket takes a short message at once; one that does not is broken.
    fn send(&self, message: &[u8]) -> Result<(), String> {
        match rustix::net::send(&self.socket, message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) if sent == message.len() => Ok(()),
            Ok(_) => Err("the socket took only part of a message of the challenge".into()),
            Err(error) => Err(format!("sending the challenge failed: {}", std::io::Error::from(error))),
        }
    }

    fn advance(&mut self) -> Progress {
        loop {
            let wanted = self.wanted();
            let room = &mut self.message[self.filled..wanted];
            match rustix::net::recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    return Progress::Failed(CloseCause::Authentication, "it closed during the challenge".into())
                }
                Ok((count, _)) => self.filled += count,
                Err(Errno::AGAIN) => return Progress::Wait,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    let error = std::io::Error::from(error);
                    return Progress::Failed(CloseCause::Io, format!("reading the challenge failed: {error}"));
                }
            }
            if self.filled < wanted {
                continue;
            }
            self.filled = 0;
            let message = &self.message[..wanted];
            let step = match &mut self.role {
                Role::Accepting { acceptor, .. } => acceptor.on_message(message),
                Role::Connecting { initiator, .. } => initiator.on_message(message),
            };
            let (reply, next) = match step {
                Step::Reply(reply) => (reply, None),
                Step::Proven { reply, target } => (reply, Some(Progress::Proven(target))),
                Step::Refused { reply, sentence } => {
                    (reply, Some(Progress::Failed(CloseCause::Authentication, sentence)))
                }
            };
            if !reply.is_empty() {
                if let Err(problem) = self.send(&reply) {
                    return Progress::Failed(CloseCause::Io, problem);
                }
            }
            if let Some(next) = next {
                return next;
            }
        }
    }
}

impl Reactor {
    pub(crate) fn begin_connect(
        &self,
        address: SocketAddr,
        target: Target,
        token: AuthToken,
        prepare: impl FnOnce(&Arc<Link>),
    ) -> Result<Arc<Link>, RpcError> {
        let initiator = Initiator::new(token, target, random_nonce()?);
        let socket = socket::begin_connect_tcp(address)
            .map_err(|error| RpcError::io(format!("connect to {target} at {address}"), error))?;
        socket::set_tcp_options(&socket, &self.config)
            .map_err(|error| RpcError::io(format!("set options for {address}"), error))?;
        let link = self.new_link(Peer::Tcp {
            address,
            target: Some(target),
        })?;
        prepare(&link);
        let half_open = HalfOpen {
            socket,
            address,
            role: Role::Connecting {
                initiator,
                link: Arc::clone(&link),
                connected: false,
            },
            message: [0; MESSAGE_BYTES],
            filled: 0,
        };
        match self.add_source(Source::HalfOpen(Box::new(half_open)), EventFlags::OUT) {
            Ok(id) => self.add_chore(self.config.connect_timeout, Chore::SourceDue(id)),
            Err(error) => {
                lock(&self.links).remove(&link.id());
                return Err(error);
            }
        }
        Ok(link)
    }

    /// Keeps a closed TCP socket until the peer has closed too, so that our last bytes are not lost to a reset.
    pub(crate) fn linger(&self, socket: Arc<OwnedFd>, limit: Duration) {
        let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Write);
        if let Ok(id) = self.add_source(Source::Lingering { socket }, EventFlags::IN | EventFlags::RDHUP) {
            self.add_chore(limit, Chore::SourceDue(id));
        }
    }

    pub(crate) fn on_source_event(&self, id: u64, flags: EventFlags) {
        let mut sources = lock(&self.sources);
        match sources.get(&id) {
            None => {}
            Some(Source::UnixListener { socket, path }) => {
                let (socket, path) = (Arc::clone(socket), path.clone());
                drop(sources);
                self.accept_from(id, &socket, |accepted| self.accept_unix(accepted, &path));
            }
            Some(Source::TcpListener {
                socket,
                self_target,
                token,
            }) => {
                let (socket, self_target, token) = (Arc::clone(socket), *self_target, token.clone());
                drop(sources);
                self.accept_from(id, &socket, |accepted| self.accept_tcp(accepted, self_target, &token));
            }
            Some(Source::Descriptor { token, .. }) => {
                let token = *token;
                drop(sources);
                self.call_service("on_descriptor_ready", |service| service.on_descriptor_ready(token));
            }
            Some(Source::Lingering { socket }) => {
                let socket = Arc::clone(socket);
                drop(sources);
                self.discard(id, &socket);
            }
            Some(Source::HalfOpen(_)) => {
                let taken = sources.remove(&id);
                drop(sources);
                if let Some(Source::HalfOpen(half_open)) = taken {
                    self.on_half_open_event(id, half_open, flags);
                }
            }
        }
    }

    fn accept_from(&self, id: u64, listener: &OwnedFd, mut accepted: impl FnMut(OwnedFd)) {
        for _ in 0..ACCEPT_BUDGET {
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => accepted(socket),
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    tracing::warn!("this process or machine is out of file descriptors: a listener rests for a moment");
                    let data = EventData::new_u64(TAG_SOURCE << TAG_SHIFT | id);
                    let _ = epoll::modify(&self.inner, listener, data, EventFlags::empty());
                    self.add_chore(LISTENER_PAUSE, Chore::ResumeListener(id));
                    return;
                }
                // The others concern the one connection, which is gone.
                Err(error) => tracing::debug!(%error, "a connection was lost before it was accepted"),
            }
        }
    }

    pub(crate) fn resume_listener(&self, id: u64) {
        if let Some(source) = lock(&self.sources).get(&id) {
            let data = EventData::new_u64(TAG_SOURCE << TAG_SHIFT | id);
            let _ = epoll::modify(&self.inner, source.descriptor(), data, EventFlags::IN);
        }
    }

    fn refuse(&self, sentence: &str) {
        self.count_refusal();
        tracing::warn!("{sentence}");
    }

    fn accept_unix(&self, accepted: OwnedFd, path: &std::path::Path) {
        let result = self.check_link_limit().and_then(|()| {
            let pid = self.check_user(&accepted, &path.display().to_string())?;
            let peer = Peer::Unix {
                path: Some(path.to_path_buf()),
                pid: Some(pid),
            };
            self.add_link(accepted, peer, |_| {})
        });
        if let Err(error) = result {
            self.refuse(&format!("a connection to {} was refused: {error}", path.display()));
        }
    }

    fn accept_tcp(&self, accepted: OwnedFd, self_target: Target, token: &AuthToken) {
        let Some(address) = socket::peer_address(&accepted) else {
            return;
        };
        if self.half_open.load(Ordering::Relaxed) >= self.config.max_half_open && !self.drop_oldest_stranger() {
            self.refuse(&format!(
                "{address} was turned away: no stranger is let in (max_half_open)"
            ));
            return;
        }
        let begun = random_nonce().and_then(|nonce| {
            socket::set_tcp_options(&accepted, &self.config)
                .map_err(|error| RpcError::io(format!("set options for {address}"), error))?;
            let acceptor = Acceptor::new(token.clone(), self_target.node, nonce);
            let role = Role::Accepting { acceptor, self_target };
            let half_open = HalfOpen {
                socket: accepted,
                address,
                role,
                message: [0; MESSAGE_BYTES],
                filled: 0,
            };
            self.add_source(Source::HalfOpen(Box::new(half_open)), EventFlags::IN)
        });
        match begun {
            Ok(id) => {
                self.half_open.fetch_add(1, Ordering::Relaxed);
                self.add_chore(self.config.handshake_timeout, Chore::SourceDue(id));
            }
            Err(error) => self.refuse(&format!("{address} was turned away: {error}")),
        }
    }

    /// Makes room for another stranger. The oldest goes: who means well is through the challenge in a few round trips,
    /// so that a flood of those who keep silent does not shut anybody else out.
    fn drop_oldest_stranger(&self) -> bool {
        let mut sources = lock(&self.sources);
        let strangers = sources.iter().filter_map(|(id, source)| match source {
            Source::HalfOpen(half_open) if matches!(half_open.role, Role::Accepting { .. }) => Some(*id),
            _ => None,
        });
        // Ids count up.
        let Some(oldest) = strangers.min() else { return false };
        let taken = sources.remove(&oldest);
        drop(sources);
        if let Some(Source::HalfOpen(half_open)) = taken {
            let _ = epoll::delete(&self.inner, &half_open.socket);
            let most = self.config.max_half_open;
            let problem = format!("it was the slowest of {most} strangers in the middle of the challenge");
            self.fail_half_open(*half_open, CloseCause::Timeout, &problem);
        }
        true
    }

    fn on_half_open_event(&self, id: u64, mut half_open: Box<HalfOpen>, flags: EventFlags) {
        if let Role::Connecting {
            initiator,
            link,
            connected,
        } = &mut half_open.role
        {
            if !link.is_open() {
                // Closed by its user before it was proven; `on_closed` is under way.
                return;
            }
            if !*connected {
                if !flags.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP) {
                    self.keep_half_open(id, half_open, None);
                    return;
                }
                if let Err(error) = socket::connect_outcome(&half_open.socket) {
                    self.fail_half_open(*half_open, CloseCause::Io, &format!("connecting failed: {error}"));
                    return;
                }
                *connected = true;
                let opening = initiator.opening();
                if let Err(problem) = half_open.send(&opening) {
                    self.fail_half_open(*half_open, CloseCause::Io, &problem);
                    return;
                }
                self.add_chore(self.config.handshake_timeout, Chore::SourceDue(id));
                self.keep_half_open(id, half_open, Some(EventFlags::IN));
                return;
            }
        }
        match half_open.advance() {
            Progress::Wait => self.keep_half_open(id, half_open, None),
            Progress::Failed(cause, problem) => self.fail_half_open(*half_open, cause, &problem),
            Progress::Proven(target) => self.settle(*half_open, target),
        }
    }

    fn keep_half_open(&self, id: u64, half_open: Box<HalfOpen>, flags: Option<EventFlags>) {
        if let Some(flags) = flags {
            let data = EventData::new_u64(TAG_SOURCE << TAG_SHIFT | id);
            let _ = epoll::modify(&self.inner, &half_open.socket, data, flags);
        }
        lock(&self.sources).insert(id, Source::HalfOpen(half_open));
    }

    fn fail_half_open(&self, half_open: HalfOpen, cause: CloseCause, problem: &str) {
        let address = half_open.address;
        match half_open.role {
            Role::Accepting { .. } => {
                self.half_open.fetch_sub(1, Ordering::Relaxed);
                self.refuse(&format!("{address} was turned away: {problem}"));
            }
            Role::Connecting { link, .. } => {
                let sentence = format!("no link to {}: {problem}", link.description());
                tracing::warn!("{sentence}");
                link.begin_close(CloseReason::new(cause, sentence), false);
            }
        }
    }

    fn settle(&self, half_open: HalfOpen, target: Target) {
        let HalfOpen {
            socket, address, role, ..
        } = half_open;
        let _ = epoll::delete(&self.inner, &socket);
        match role {
            Role::Connecting { link, .. } => {
                if let Err(error) = self.activate(&link, socket) {
                    link.begin_close(CloseReason::new(CloseCause::Io, error.to_string()), false);
                }
            }
            Role::Accepting { self_target, .. } => {
                self.half_open.fetch_sub(1, Ordering::Relaxed);
                if target.process != self_target.process {
                    self.call_service("on_stranger", |service| service.on_stranger(socket, target));
                    return;
                }
                let peer = Peer::Tcp { address, target: None };
                let result = self
                    .check_link_limit()
                    .and_then(|()| self.add_link(socket, peer, |_| {}));
                if let Err(error) = result {
                    self.refuse(&format!("a connection from {address} was refused: {error}"));
                }
            }
        }
    }

    /// A stranger's or a lingering socket's time is over.
    pub(crate) fn on_source_due(&self, id: u64) {
        let mut sources = lock(&self.sources);
        let Some(source) = sources.get(&id) else { return };
        let _ = epoll::delete(&self.inner, source.descriptor());
        let taken = sources.remove(&id);
        drop(sources);
        if let Some(Source::HalfOpen(half_open)) = taken {
            let problem = match &half_open.role {
                Role::Connecting { connected: false, .. } => {
                    format!(
                        "it did not accept the connection within {:?}",
                        self.config.connect_timeout
                    )
                }
                _ => format!(
                    "it did not complete the challenge within {:?}",
                    self.config.handshake_timeout
                ),
            };
            self.fail_half_open(*half_open, CloseCause::Timeout, &problem);
        }
    }

    fn discard(&self, id: u64, socket: &OwnedFd) {
        let mut scrap = [0u8; 4096];
        for _ in 0..ACCEPT_BUDGET {
            match rustix::net::recv(socket, &mut scrap[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => break,
            }
        }
        let _ = epoll::delete(&self.inner, socket);
        lock(&self.sources).remove(&id);
    }
}
