//! The zygote seen from the raylet: owns its process, its socket, and the messages both ways.
//!
//! It never blocks: what the socket does not take waits here. A zygote that died is started again, and what it had not
//! answered is asked of the next.
//!
//! Invariants:
//! 1. A fork request is unanswered until "forked" or "fork_failed" arrives, or its worker registers.

use super::config::{RayletConfig, RayletError};
use rustix::net::{socketpair, AddressFamily, SendFlags, SocketFlags, SocketType};
use serde_json::{json, Value};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Longest message taken from the zygote.
const MESSAGE_LIMIT_BYTES: usize = 1 << 20;

/// How to start a zygote.
#[derive(Debug, Clone)]
pub struct ZygoteCommand {
    pub python: PathBuf,
    pub python_path: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub log_directory: PathBuf,
}

impl ZygoteCommand {
    /// The zygote of a raylet with this configuration.
    pub fn of(config: &RayletConfig) -> Self {
        Self {
            python: config.python_executable.clone(),
            python_path: config.python_path.clone(),
            environment: config.worker_env.clone(),
            log_directory: config.log_directory(),
        }
    }
}

/// What the zygote says.
#[derive(Debug, PartialEq)]
pub enum ZygoteEvent {
    Ready,
    Forked {
        token: u64,
        pid: u32,
    },
    ForkFailed {
        token: u64,
        error: String,
    },
    Exited {
        pid: u32,
        status: i32,
    },
    /// End-of-file or garbage.
    Gone,
}

/// A running zygote.
pub struct Zygote {
    pub pid: u32,
    socket: OwnedFd,
    received: Vec<u8>,
    unsent: VecDeque<u8>,
    pub ready: bool,
    /// Requests without an answer, by token.
    pub unanswered: BTreeMap<u64, Value>,
}

impl Zygote {
    /// Starts one. It is a child of this process and is reaped by whoever reaps children.
    pub fn start(command: &ZygoteCommand) -> Result<Self, RayletError> {
        let fail = |error: rustix::io::Errno| RayletError::io("make the zygote's socket", error);
        let (own, child) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(fail)?;
        let log = |suffix: &str| open_log(&command.log_directory.join(format!("zygote.{suffix}")));
        let program = format!(
            "import gc, sys; gc.disable(); sys.path[:0] = {}; from ray._private.zygote import main; main()",
            json!(command.python_path)
        );
        let descriptor = child.as_raw_fd();
        let mut process = Command::new(&command.python);
        process.arg("-E").arg("-c").arg(program).envs(&command.environment);
        process
            .env("HELIOSTAT_ZYGOTE_FD", descriptor.to_string())
            .stdin(Stdio::null());
        process.stdout(log("out")?).stderr(log("err")?);
        // A group of its own, so that a terminal's signals to the driver do not reach it.
        process.process_group(0);
        // SAFETY: fcntl, sigemptyset and sigprocmask are async-signal-safe, the set is filled before it is used, and the
        // descriptor stays open until the spawn is over.
        unsafe {
            process.pre_exec(move || {
                let borrowed = BorrowedFd::borrow_raw(descriptor);
                rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::empty())?;
                // This thread blocks signals to read them; the zygote must hear of its children's ends.
                let mut none: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&mut none);
                libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
                Ok(())
            });
        }
        let spawned = process
            .spawn()
            .map_err(|error| RayletError::io(format!("start the zygote with {}", command.python.display()), error))?;
        drop(child);
        Self::adopt(own, spawned.id())
    }

    /// Takes over a child of this process that is a zygote, or becomes one, at the other end of this socket.
    pub fn adopt(socket: OwnedFd, pid: u32) -> Result<Self, RayletError> {
        let fail = |error: rustix::io::Errno| RayletError::io("set up the zygote's socket", error);
        rustix::io::ioctl_fionbio(&socket, true).map_err(fail)?;
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(fail)?;
        Ok(Self {
            pid,
            socket,
            received: Vec::new(),
            unsent: VecDeque::new(),
            ready: false,
            unanswered: BTreeMap::new(),
        })
    }

    /// The socket, to be watched.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Asks for a worker.
    pub fn fork(&mut self, token: u64, request: Value) {
        self.send(&json!({ "fork": request }));
        self.unanswered.insert(token, request);
    }

    fn send(&mut self, message: &Value) {
        let data = message.to_string();
        self.unsent.extend((data.len() as u32).to_le_bytes());
        self.unsent.extend(data.as_bytes());
        self.flush();
    }

    /// Writes what waits. True if something still waits: call again soon.
    pub fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() {
            let (first, _) = self.unsent.as_slices();
            match rustix::net::send(&self.socket, first, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                // Its end is seen by reading.
                Err(_) => {
                    self.unsent.clear();
                    return false;
                }
            }
        }
        false
    }

    /// Reads what has arrived.
    pub fn receive(&mut self) -> Vec<ZygoteEvent> {
        let mut events = Vec::new();
        let mut buffer = [0; 16 << 10];
        let gone = loop {
            match rustix::io::read(&self.socket, &mut buffer) {
                Ok(0) => break true,
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break false,
                Err(_) => break true,
            }
        };
        while let Some(length) = self.received.get(..4) {
            let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
            if length > MESSAGE_LIMIT_BYTES {
                events.push(ZygoteEvent::Gone);
                return events;
            }
            let Some(message) = self.received.get(4..4 + length) else {
                break;
            };
            match serde_json::from_slice::<Value>(message)
                .ok()
                .and_then(|message| self.read_event(&message))
            {
                Some(event) => events.push(event),
                None => events.push(ZygoteEvent::Gone),
            }
            self.received.drain(..4 + length);
        }
        if gone {
            events.push(ZygoteEvent::Gone);
        }
        events
    }

    fn read_event(&mut self, message: &Value) -> Option<ZygoteEvent> {
        let (kind, body) = message.as_object()?.iter().next()?;
        let number = |name: &str| body.get(name).and_then(Value::as_u64);
        Some(match kind.as_str() {
            "ready" => {
                self.ready = true;
                ZygoteEvent::Ready
            }
            "forked" => {
                let token = number("token")?;
                self.unanswered.remove(&token);
                ZygoteEvent::Forked {
                    token,
                    pid: u32::try_from(number("pid")?).ok()?,
                }
            }
            "fork_failed" => {
                let token = number("token")?;
                self.unanswered.remove(&token);
                ZygoteEvent::ForkFailed {
                    token,
                    error: body.get("error")?.as_str()?.to_string(),
                }
            }
            "exited" => {
                let status = i32::try_from(body.get("status")?.as_i64()?).ok()?;
                ZygoteEvent::Exited {
                    pid: u32::try_from(number("pid")?).ok()?,
                    status,
                }
            }
            _ => return None,
        })
    }
}

/// A log file of a daemon's child, appended to.
pub fn open_log(path: &Path) -> Result<Stdio, RayletError> {
    let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
    Ok(file
        .map_err(|error| RayletError::io(format!("open {}", path.display()), error))?
        .into())
}
