//! Sockets: creation, options and who is at the other end. Thin calls, no decisions beyond options.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, RenameFlags, CWD};
use rustix::net::{self, sockopt, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::Config;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);
const BACKLOG: i32 = 4096;

/// Runs `call` with an address for `path`, also where the path is longer than a socket address holds.
fn with_unix_address<T>(path: &Path, call: impl FnOnce(&SocketAddrUnix) -> rustix::io::Result<T>) -> io::Result<T> {
    match SocketAddrUnix::new(path) {
        Ok(address) => Ok(call(&address)?),
        Err(rustix::io::Errno::NAMETOOLONG) => {
            // Name the directory through its descriptor: that is short however deep the directory lies.
            let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            };
            let directory = rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            let short = Path::new("/proc/self/fd")
                .join(directory.as_raw_fd().to_string())
                .join(name);
            Ok(call(&SocketAddrUnix::new(&short)?)?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Where a listening socket's file is until it listens. A process that is killed in between leaves it behind.
pub fn path_before_listening(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// The file appears under its name only once the socket listens, so that whoever sees it can connect: between `bind` and
/// `listen` a connection would be refused.
pub(crate) fn listen_unix(path: &Path) -> io::Result<OwnedFd> {
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    let early = path_before_listening(path);
    // What a killed predecessor of the same name left; nobody else uses this path.
    let _ = std::fs::remove_file(&early);
    with_unix_address(&early, |address| net::bind(&socket, address))?;
    let listening = net::listen(&socket, BACKLOG)
        .and_then(|()| rustix::fs::renameat_with(CWD, &early, CWD, path, RenameFlags::NOREPLACE));
    match listening {
        Ok(()) => Ok(socket),
        Err(error) => {
            let _ = std::fs::remove_file(&early);
            Err(match error {
                rustix::io::Errno::EXIST => rustix::io::Errno::ADDRINUSE.into(),
                error => error.into(),
            })
        }
    }
}

pub(crate) fn connect_unix(path: &Path) -> io::Result<OwnedFd> {
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    with_unix_address(path, |address| net::connect(&socket, address))?;
    Ok(socket)
}

fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

pub(crate) fn listen_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let socket = net::socket_with(family(&address), SocketType::STREAM, FLAGS, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    net::bind(&socket, &address)?;
    net::listen(&socket, BACKLOG)?;
    let bound = SocketAddr::try_from(net::getsockname(&socket)?)?;
    Ok((socket, bound))
}

/// Begins to connect; the socket becomes writable when that is decided.
pub(crate) fn begin_connect_tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = net::socket_with(family(&address), SocketType::STREAM, FLAGS, None)?;
    match net::connect(&socket, &address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// Options of a TCP link: no delay for small frames, and a dead peer or cut network is noticed. The keepalive probes
/// are the kernel's, so a peer that is merely busy for minutes still answers them.
pub(crate) fn set_tcp_options(socket: &OwnedFd, config: &Config) -> io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_tcp_user_timeout(socket, config.tcp_user_timeout.as_millis().min(u32::MAX as u128) as u32)?;
    sockopt::set_socket_keepalive(socket, true)?;
    let second = Duration::from_secs(1);
    sockopt::set_tcp_keepidle(socket, config.tcp_keepalive_idle.max(second))?;
    sockopt::set_tcp_keepintvl(socket, (config.tcp_keepalive_idle / 3).max(second))?;
    sockopt::set_tcp_keepcnt(socket, 3)?;
    Ok(())
}

pub(crate) fn peer_address(socket: impl AsFd) -> Option<SocketAddr> {
    net::getpeername(socket)
        .ok()
        .flatten()
        .and_then(|address| SocketAddr::try_from(address).ok())
}

/// Room for some large frames, so that their sender seldom has to wait for the reader. What is not granted is done without.
pub(crate) fn set_unix_options(socket: &OwnedFd, config: &Config) {
    let _ = sockopt::set_socket_send_buffer_size(socket, config.unix_buffer_bytes);
}

pub(crate) fn is_unix(socket: &OwnedFd) -> io::Result<bool> {
    Ok(net::getsockname(socket)?.address_family() == AddressFamily::UNIX)
}

/// Process and user of the peer of a Unix socket.
pub(crate) fn peer_credentials(socket: &OwnedFd) -> io::Result<(u32, u32)> {
    let credentials = sockopt::socket_peercred(socket)?;
    Ok((credentials.pid.as_raw_nonzero().get() as u32, credentials.uid.as_raw()))
}

pub(crate) fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The outcome of a connect that was in progress.
pub(crate) fn connect_outcome(socket: &OwnedFd) -> io::Result<()> {
    sockopt::socket_error(socket)??;
    Ok(())
}
