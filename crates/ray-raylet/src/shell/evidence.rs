//! Evidence of starting: a shared file with one word per worker, which the worker writes before it enters user code.
//!
//! Each worker has eight words (a cache line): at its index the highest sequence it started, and at the next the highest
//! it finished, where it says so. The raylet reads them after its death, and to know idle leases from busy ones.
//!
//! Invariants:
//! 1. A worker writes its own words only; the raylet clears them before it gives them to another.

use super::config::RayletError;
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const WORDS_A_WORKER: usize = 8;

/// The file and who has which words.
pub struct Evidence {
    path: PathBuf,
    _file: OwnedFd,
    words: *mut std::ffi::c_void,
    bytes: usize,
    free: Vec<usize>,
}

// SAFETY: the mapping belongs to this value alone, and it is accessed through atomics.
unsafe impl Send for Evidence {}

impl Evidence {
    /// Makes the file for this many workers. It has no name in any directory, so that nothing of it is left however
    /// the raylet ends; workers open it through this process's descriptor.
    pub fn create(workers: usize) -> Result<Self, RayletError> {
        let fail = |error: rustix::io::Errno| RayletError::io("make the evidence of starting", error);
        let file = rustix::fs::memfd_create("ray-evidence", rustix::fs::MemfdFlags::CLOEXEC).map_err(fail)?;
        let bytes = workers * WORDS_A_WORKER * 8;
        rustix::fs::ftruncate(&file, bytes as u64).map_err(fail)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory in use.
        let words = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .map_err(fail)?;
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
        Ok(Self {
            path,
            _file: file,
            words,
            bytes,
            free: (0..workers).rev().collect(),
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Words for a worker, cleared; `None` where every one is taken. The index counts words of 8 bytes.
    pub fn take(&mut self) -> Option<usize> {
        let index = self.free.pop()? * WORDS_A_WORKER;
        for word in 0..WORDS_A_WORKER {
            self.word(index + word).store(0, Ordering::Relaxed);
        }
        Some(index)
    }

    /// Takes the words of a dead worker back.
    pub fn give_back(&mut self, index: usize) {
        self.free.push(index / WORDS_A_WORKER);
    }

    /// The highest sequence that was started.
    pub fn started(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    /// The highest sequence that was finished; 0 where the worker does not say.
    pub fn finished(&self, index: usize) -> u64 {
        self.word(index + 1).load(Ordering::Acquire)
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= self.bytes, "an evidence index comes from take");
        // SAFETY: the index is inside the mapping, which lives as long as self, and the words are 8-aligned.
        unsafe { &*self.words.cast::<AtomicU64>().add(index) }
    }
}

impl Drop for Evidence {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by create with this length and no reference to it is left.
        let _ = unsafe { munmap(self.words, self.bytes) };
    }
}
