//! Signals as a descriptor: SIGTERM and SIGINT end the raylet, SIGCHLD says that a child ended.
//!
//! Invariant: 1. The signals are blocked in this thread before any other thread starts, so that only the descriptor
//! sees them; they are unblocked again when this value is dropped.

use super::config::RayletError;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The descriptor.
pub struct Signals {
    descriptor: OwnedFd,
    before: libc::sigset_t,
}

/// What a child's end looked like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChildExit {
    pub pid: u32,
    /// As `waitpid` says it.
    pub status: i32,
}

impl Signals {
    /// Blocks the signals in this thread and opens the descriptor.
    pub fn block() -> Result<Self, RayletError> {
        let failed = |what: &str| RayletError::io(what, std::io::Error::last_os_error());
        // SAFETY: the sets are written by sigemptyset and pthread_sigmask before they are read.
        unsafe {
            let mut wanted: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut wanted);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
                libc::sigaddset(&mut wanted, signal);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &wanted, &mut before) != 0 {
                return Err(failed("block signals"));
            }
            let descriptor = libc::signalfd(-1, &wanted, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if descriptor < 0 {
                return Err(failed("open a descriptor for signals"));
            }
            Ok(Self {
                descriptor: OwnedFd::from_raw_fd(descriptor),
                before,
            })
        }
    }

    /// To be watched.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as self.
        unsafe { BorrowedFd::borrow_raw(self.descriptor.as_raw_fd()) }
    }

    /// The signals that have arrived.
    pub fn take(&self) -> Vec<i32> {
        let mut signals = Vec::new();
        let mut buffer = [0_u8; 128 * 8];
        while let Ok(count) = rustix::io::read(&self.descriptor, &mut buffer) {
            for record in buffer[..count].chunks_exact(128) {
                signals.push(i32::from_ne_bytes([record[0], record[1], record[2], record[3]]));
            }
        }
        signals
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: the set was filled by pthread_sigmask in block.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, std::ptr::null_mut());
        }
    }
}

/// Reaps the next child that ended. What is left of the group it led is killed first, while its number cannot be used
/// again.
pub fn reap_one() -> Option<ChildExit> {
    // SAFETY: the record is written by waitid before it is read; si_pid is valid for a child's end.
    unsafe {
        let mut record: libc::siginfo_t = std::mem::zeroed();
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        if libc::waitid(libc::P_ALL, 0, &mut record, options) != 0 || record.si_pid() == 0 {
            return None;
        }
        let pid = record.si_pid();
        if libc::getpgid(pid) == pid {
            libc::kill(-pid, libc::SIGKILL);
        }
        let mut status = 0;
        if libc::waitpid(pid, &mut status, libc::WNOHANG) != pid {
            return None;
        }
        Some(ChildExit {
            pid: pid as u32,
            status,
        })
    }
}

/// Kills a worker and its group. A process that is not the leader of its group yet is killed alone.
pub fn kill_group(pid: u32) {
    if pid <= 1 || pid > i32::MAX as u32 {
        return;
    }
    let pid = pid as i32;
    // SAFETY: kill takes numbers only; the caller holds a pid of a process that is not reaped, or just was.
    unsafe {
        libc::kill(-pid, libc::SIGKILL);
        libc::kill(pid, libc::SIGKILL);
    }
}

/// The pids of this process's children.
pub fn children() -> Vec<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}
