//! The evidence of starting: two shared words. In the first a worker notes the sequence that it starts before user code
//! runs, so that after its death the raylet knows what was not started; in the second the sequence that it finished, so
//! that the raylet knows an idle lease from a busy one.
//!
//! Invariant: 1. The words only grow while a lease lasts, and only this process writes them.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

use crate::WorkerError;

const PAGE_BYTES: u64 = 4096;

/// This worker's word.
#[derive(Debug)]
pub(crate) struct Evidence {
    page: *mut std::ffi::c_void,
    word: *const AtomicU64,
}

// SAFETY: the word is atomic and the mapping lives as long as this.
unsafe impl Send for Evidence {}
// SAFETY: as above.
unsafe impl Sync for Evidence {}

impl Evidence {
    /// Maps the word at `index` of the file.
    pub fn open(path: &Path, index: u64) -> Result<Self, WorkerError> {
        let io = |source: std::io::Error| WorkerError::Io {
            what: "map the evidence of starting",
            source,
        };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        let offset = index * 8;
        let page_offset = offset / PAGE_BYTES * PAGE_BYTES;
        if offset + 16 > file.metadata().map_err(io)?.len() {
            return Err(WorkerError::Invalid(format!(
                "the evidence file {} has no word {index}",
                path.display()
            )));
        }
        // SAFETY: a fresh mapping of a file that the raylet never shrinks.
        let page = unsafe {
            mmap(
                std::ptr::null_mut(),
                PAGE_BYTES as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                page_offset,
            )
        }
        .map_err(|source| io(source.into()))?;
        // SAFETY: the offset lies within the page that was just mapped, and is a multiple of 8.
        let word = unsafe { page.cast::<u8>().add((offset - page_offset) as usize) }.cast::<AtomicU64>();
        Ok(Self { page, word })
    }

    /// Notes that this sequence, and all before it, are over: the worker is idle if nothing else was started.
    pub fn finished(&self, sequence: u64) {
        // SAFETY: the raylet gives each worker a whole cache line of words, of which this is the second.
        unsafe { (*self.word.add(1)).store(sequence, Ordering::Release) };
    }

    /// Notes that this sequence is being started.
    pub fn starting(&self, sequence: u64) {
        // SAFETY: `word` points into the mapping that this owns.
        unsafe { (*self.word).store(sequence, Ordering::Release) };
    }
}

impl Drop for Evidence {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by `open` with this length and nobody else uses it.
        let _ = unsafe { munmap(self.page, PAGE_BYTES as usize) };
    }
}
