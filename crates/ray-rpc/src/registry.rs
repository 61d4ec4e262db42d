//! How links, listeners and watched descriptors come to be: listening, connecting, adopting, registering.
//!
//! Invariants:
//! 1. A link is in the registry before its peer can be heard, and its user has prepared it before that.
//! 2. Every Unix peer runs as our own user; every TCP peer has proven the token before it is activated.
//! 3. Whatever failed half way leaves nothing in the registry.

use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};

use crate::auth::AuthToken;
use crate::config::{Peer, Target};
use crate::error::RpcError;
use crate::link::Link;
use crate::reactor::{Chore, Reactor, TAG_LINK, TAG_SHIFT, TAG_SOURCE};
use crate::socket;
use crate::sources::Source;
use crate::sync::lock;

impl Reactor {
    /// Listens on a Unix socket at `path`, which must not exist. Only processes of our own user are served.
    pub fn listen_unix(&self, path: impl AsRef<Path>) -> Result<(), RpcError> {
        self.ensure_usable()?;
        let path = path.as_ref();
        let listener =
            socket::listen_unix(path).map_err(|error| RpcError::io(format!("listen on {}", path.display()), error))?;
        self.add_source(
            Source::UnixListener {
                socket: Arc::new(listener),
                path: path.to_path_buf(),
            },
            EventFlags::IN,
        )?;
        Ok(())
    }

    /// Listens on TCP as `self_target.node`. Peers that prove the token and want `self_target.process` become links; those
    /// that want another process go to [`Service::on_stranger`]. Returns the bound address.
    pub fn listen_tcp(
        &self,
        address: SocketAddr,
        self_target: Target,
        token: AuthToken,
    ) -> Result<SocketAddr, RpcError> {
        self.ensure_usable()?;
        let (listener, bound) =
            socket::listen_tcp(address).map_err(|error| RpcError::io(format!("listen on {address}"), error))?;
        self.add_source(
            Source::TcpListener {
                socket: Arc::new(listener),
                self_target,
                token,
            },
            EventFlags::IN,
        )?;
        Ok(bound)
    }

    /// Connects to a Unix socket. The link takes frames at once; they follow our Hello.
    pub fn connect_unix(&self, path: impl AsRef<Path>) -> Result<Arc<Link>, RpcError> {
        self.connect_unix_with(path, |_| {})
    }

    /// `connect_unix` that shows the link to `prepare` before anything can arrive on it, to hang user data on it.
    pub fn connect_unix_with(
        &self,
        path: impl AsRef<Path>,
        prepare: impl FnOnce(&Arc<Link>),
    ) -> Result<Arc<Link>, RpcError> {
        self.ensure_usable()?;
        let path = path.as_ref();
        self.check_link_limit()?;
        let socket = socket::connect_unix(path)
            .map_err(|error| RpcError::io(format!("connect to {}", path.display()), error))?;
        let pid = self.check_user(&socket, &path.display().to_string())?;
        let peer = Peer::Unix {
            path: Some(path.to_path_buf()),
            pid: Some(pid),
        };
        self.add_link(socket, peer, prepare)
    }

    /// Begins to connect to a process of another node. The link takes frames at once; they leave when both sides have
    /// proven the token. A failure arrives as `on_closed`.
    pub fn connect_tcp(&self, address: SocketAddr, target: Target, token: AuthToken) -> Result<Arc<Link>, RpcError> {
        self.connect_tcp_with(address, target, token, |_| {})
    }

    /// `connect_tcp` that shows the link to `prepare` before anything can arrive on it, to hang user data on it.
    pub fn connect_tcp_with(
        &self,
        address: SocketAddr,
        target: Target,
        token: AuthToken,
        prepare: impl FnOnce(&Arc<Link>),
    ) -> Result<Arc<Link>, RpcError> {
        self.ensure_usable()?;
        self.check_link_limit()?;
        self.begin_connect(address, target, token, prepare)
    }

    /// Makes a link of a connected socket that is already authenticated, for example one that was handed over.
    pub fn adopt(&self, socket: OwnedFd) -> Result<Arc<Link>, RpcError> {
        self.ensure_usable()?;
        self.check_link_limit()?;
        let fail = |error| RpcError::io("adopt a socket", error);
        rustix::io::ioctl_fionbio(&socket, true).map_err(|error| RpcError::io("adopt a socket", error))?;
        let peer = if socket::is_unix(&socket).map_err(fail)? {
            let pid = self.check_user(&socket, "an adopted socket")?;
            Peer::Unix {
                path: None,
                pid: Some(pid),
            }
        } else {
            socket::set_tcp_options(&socket, &self.config).map_err(fail)?;
            let Some(address) = socket::peer_address(&socket) else {
                return Err(RpcError::io(
                    "adopt a socket",
                    std::io::Error::from(std::io::ErrorKind::NotConnected),
                ));
            };
            Peer::Tcp { address, target: None }
        };
        self.add_link(socket, peer, |_| {})
    }

    pub(crate) fn check_link_limit(&self) -> Result<(), RpcError> {
        if self.link_count() >= self.config.max_links {
            return Err(RpcError::TooManyLinks {
                limit: self.config.max_links,
            });
        }
        Ok(())
    }

    pub(crate) fn check_user(&self, socket: &OwnedFd, name: &str) -> Result<u32, RpcError> {
        let (pid, peer_uid) =
            socket::peer_credentials(socket).map_err(|error| RpcError::io(format!("identify {name}"), error))?;
        let own_uid = socket::own_user();
        if peer_uid != own_uid {
            return Err(RpcError::ForeignUser {
                peer: format!("{name} (pid {pid})"),
                peer_uid,
                own_uid,
            });
        }
        Ok(pid)
    }

    /// A link whose socket is not there yet.
    pub(crate) fn new_link(&self, peer: Peer) -> Result<Arc<Link>, RpcError> {
        let this = self.this.upgrade().ok_or(RpcError::Stopped)?;
        let hello = self.hello_bytes();
        let link = Link::new(&this, self.new_id(), peer, &hello);
        lock(&self.links).insert(link.id(), Arc::clone(&link));
        Ok(link)
    }

    pub(crate) fn add_link(
        &self,
        socket: OwnedFd,
        peer: Peer,
        prepare: impl FnOnce(&Arc<Link>),
    ) -> Result<Arc<Link>, RpcError> {
        if matches!(peer, Peer::Unix { .. }) {
            socket::set_unix_options(&socket, &self.config);
        }
        let link = self.new_link(peer)?;
        prepare(&link);
        if let Err(error) = self.activate(&link, socket) {
            lock(&self.links).remove(&link.id());
            return Err(error);
        }
        Ok(link)
    }

    /// Starts service of a link whose peer is proven.
    pub(crate) fn activate(&self, link: &Arc<Link>, socket: OwnedFd) -> Result<(), RpcError> {
        let socket = Arc::new(socket);
        // The Hello leaves before the socket is watched, so a peer cannot be answered before it is greeted.
        link.attach(self, &socket);
        let data = EventData::new_u64(TAG_LINK << TAG_SHIFT | link.id());
        // Attaching may have found the socket full and asked for write readiness, which must not be forgotten here.
        let flags = EventFlags::IN | EventFlags::RDHUP;
        epoll::add(&self.inner, &*socket, data, flags).map_err(|error| RpcError::io("watch a socket", error))?;
        link.rewatch(self);
        self.add_chore(self.config.hello_timeout, Chore::HelloDue(link.id()));
        Ok(())
    }

    pub(crate) fn watch_link(&self, socket: &OwnedFd, id: u64, for_write: bool) {
        let mut flags = EventFlags::IN | EventFlags::RDHUP;
        if for_write {
            flags |= EventFlags::OUT;
        }
        let data = EventData::new_u64(TAG_LINK << TAG_SHIFT | id);
        // The only expected failure is a socket that is not registered yet or no longer; both look again themselves.
        let _ = epoll::modify(&self.inner, socket, data, flags);
    }

    pub(crate) fn add_source(&self, source: Source, flags: EventFlags) -> Result<u64, RpcError> {
        let id = self.new_id();
        let mut sources = lock(&self.sources);
        let data = EventData::new_u64(TAG_SOURCE << TAG_SHIFT | id);
        epoll::add(&self.inner, source.descriptor(), data, flags)
            .map_err(|error| RpcError::io("watch a descriptor", error))?;
        sources.insert(id, source);
        Ok(id)
    }

    /// Watches a descriptor of the user (a pipe, a pidfd) for readability, level-triggered:
    /// [`Service::on_descriptor_ready`] is called with `token` until it is drained or unwatched.
    pub fn watch_descriptor(&self, descriptor: BorrowedFd<'_>, token: u64) -> Result<(), RpcError> {
        self.watch(descriptor, token, EventFlags::IN)
    }

    /// As [`Self::watch_descriptor`], edge-triggered: [`Service::on_descriptor_ready`] is called each time that there is
    /// something new, and not again until then, drained or not. For another epoll, whose owner looks into it himself.
    pub fn watch_descriptor_edges(&self, descriptor: BorrowedFd<'_>, token: u64) -> Result<(), RpcError> {
        self.watch(descriptor, token, EventFlags::IN | EventFlags::ET)
    }

    fn watch(&self, descriptor: BorrowedFd<'_>, token: u64, flags: EventFlags) -> Result<(), RpcError> {
        // A duplicate of our own: the user may close theirs at any time without confusing the epoll.
        let descriptor = rustix::io::fcntl_dupfd_cloexec(descriptor, 0)
            .map_err(|error| RpcError::io("watch a descriptor", error))?;
        self.add_source(Source::Descriptor { descriptor, token }, flags)?;
        Ok(())
    }

    /// Stops watching what was watched under `token`.
    pub fn unwatch_descriptor(&self, token: u64) {
        lock(&self.sources).retain(|_, source| {
            let gone = matches!(source, Source::Descriptor { token: known, .. } if *known == token);
            if gone {
                let _ = epoll::delete(&self.inner, source.descriptor());
            }
            !gone
        });
    }
}
