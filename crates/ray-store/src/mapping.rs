//! The mapped file: owns the mapping, its descriptor, and the operations that give its pages memory.
//!
//! It refuses to let a full file system become a signal: pages are reserved before anybody is allowed to touch them.
//!
//! Invariants:
//! 1. Base, length and geometry never change, and the mapping lives as long as anything that points into it.
//! 2. Words are only read and written as atomics.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::layout::{Geometry, PAGE_BYTES, WORD_BYTES};
use crate::sync::AtomicU64;
use crate::StoreError;

/// How often somebody may take the new file away before creating it is given up.
const CREATE_ATTEMPTS: usize = 16;

/// One mapping of the store's file.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    file: OwnedFd,
    geometry: Geometry,
}

// SAFETY: the mapping is plain shared memory whose words are accessed as atomics and whose object bytes are guarded by
// the protocols of this crate; nothing in it belongs to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> StoreError {
    let path = path.to_path_buf();
    move |errno| StoreError::Io {
        what,
        path,
        source: errno.into(),
    }
}

impl Mapping {
    /// Creates the file, reserves header and index, and locks it for the life of this process. A file that a dead
    /// server left behind is replaced; one whose server lives is refused.
    pub fn create(path: &Path, geometry: Geometry) -> Result<Self, StoreError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        for _ in 0..CREATE_ATTEMPTS {
            let file = match rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR) {
                Err(Errno::EXIST) => {
                    remove_if_stale(path)?;
                    continue;
                }
                other => other.map_err(failed("create", path))?,
            };
            rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(failed("lock", path))?;
            // Before it was locked, somebody who removes stale files may have taken it for one.
            if rustix::fs::fstat(&file).map_err(failed("inspect", path))?.st_nlink == 0 {
                continue;
            }
            let filled = Self::fill(path, file, geometry);
            if filled.is_err() {
                // The error that is already being reported says more than one about cleaning up after it.
                let _ = rustix::fs::unlink(path);
            }
            return filled;
        }
        Err(StoreError::PathInUse {
            path: path.to_path_buf(),
        })
    }

    fn fill(path: &Path, file: OwnedFd, geometry: Geometry) -> Result<Self, StoreError> {
        rustix::fs::ftruncate(&file, geometry.file_bytes()).map_err(failed("size", path))?;
        let mapping = Self::map(path, file, geometry)?;
        mapping.reserve(0, geometry.index_offset() + geometry.index_bytes())?;
        // SAFETY: the header's page was reserved and nobody else knows of the file's contents before the magic, which
        // is stored last.
        unsafe {
            let words = mapping.base.as_ptr().cast::<u64>();
            for (position, value) in geometry.header().into_iter().enumerate().rev() {
                words.add(position).write_volatile(value);
            }
        }
        Ok(mapping)
    }

    /// Maps a file that a server created.
    pub fn attach(path: &Path) -> Result<Self, StoreError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open", path))?;
        let file_bytes = rustix::fs::fstat(&file).map_err(failed("inspect", path))?.st_size as u64;
        let mut header = [0; 40];
        let read = rustix::io::pread(&file, &mut header[..], 0).map_err(failed("read", path))?;
        if read != header.len() {
            return Err(StoreError::BadFile {
                reason: format!("it has only {file_bytes} bytes"),
            });
        }
        let words = std::array::from_fn(|i| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&header[i * 8..i * 8 + 8]);
            u64::from_ne_bytes(eight)
        });
        let geometry = Geometry::from_header(words, file_bytes)?;
        Self::map(path, file, geometry)
    }

    fn map(path: &Path, file: OwnedFd, geometry: Geometry) -> Result<Self, StoreError> {
        let bytes =
            usize::try_from(geometry.file_bytes()).map_err(|_| StoreError::BadConfig("it exceeds the memory"))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, flags, &file, 0) }
            .map_err(failed("map", path))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(StoreError::BadConfig("the kernel mapped it at zero"))?;
        // SAFETY: the range is exactly this mapping. A core dump need not hold every object, and where the kernel does
        // not know this advice nothing is lost.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), bytes, Advice::LinuxDontDump) };
        Ok(Self {
            base,
            bytes,
            file,
            geometry,
        })
    }

    /// Where everything lies.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Shared words of the file, which must have been reserved.
    #[cfg(not(loom))]
    pub fn words(&self, offset: u64, count: u64) -> &[AtomicU64] {
        assert!(offset % WORD_BYTES == 0 && offset + count * WORD_BYTES <= self.geometry.data_offset());
        // SAFETY: the range is aligned and inside of the mapping, and below the data area everything is accessed as
        // atomics once the header is written.
        unsafe {
            std::slice::from_raw_parts(
                self.base.as_ptr().add(offset as usize).cast::<AtomicU64>(),
                count as usize,
            )
        }
    }

    /// Loom's atomics cannot live in a mapping; its tests call the protocols over words of their own.
    #[cfg(loom)]
    pub fn words(&self, _offset: u64, _count: u64) -> &[AtomicU64] {
        unreachable!("the model does not map files, {WORD_BYTES} bytes a word or not")
    }

    /// The address of a byte of the data area.
    pub fn data(&self, offset: u64, len: u64) -> NonNull<u8> {
        assert!(offset <= self.geometry.data_bytes && len <= self.geometry.data_bytes - offset);
        // SAFETY: the range was just checked to be inside of the mapping.
        unsafe { self.base.add((self.geometry.data_offset() + offset) as usize) }
    }

    /// Gives memory to the pages that these bytes of the file touch, or says that there is none.
    pub fn reserve(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let (start, len) = pages(offset, len);
        let result = loop {
            match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, start, len) {
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP) => break self.reserve_by_writing(start, len),
                other => break other,
            }
        };
        result.map_err(|errno| match errno {
            Errno::NOSPC | Errno::DQUOT | Errno::NOMEM => StoreError::NoMemory {
                bytes: len,
                source: errno.into(),
            },
            other => StoreError::Io {
                what: "reserve memory in",
                path: PathBuf::new(),
                source: other.into(),
            },
        })
    }

    fn reserve_by_writing(&self, start: u64, len: u64) -> Result<(), Errno> {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is ours and open. The C library writes one byte into each block that has none.
        match unsafe { libc::posix_fallocate(self.file.as_raw_fd(), start as i64, len as i64) } {
            0 => Ok(()),
            code => Err(Errno::from_raw_os_error(code)),
        }
    }

    /// As `reserve`, for bytes of the data area.
    pub fn reserve_data(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.reserve(self.geometry.data_offset() + offset, len)
    }

    /// Gives memory to pages of the data area and maps them into this process, with several threads for many. Unlike
    /// touching them it costs one system call, and where there is no memory it is an error.
    pub fn populate_data(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let (start, len) = pages(self.geometry.data_offset() + offset, len);
        let threads = crate::copy::threads_for(len as usize) as u64;
        let part = (len / threads).next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
        let result = std::thread::scope(|scope| {
            let mut others = Vec::new();
            let mut at = start + part;
            while at < start + len {
                let bytes = part.min(start + len - at);
                let populate = move || self.populate_pages(at, bytes);
                match std::thread::Builder::new()
                    .name("store-populate".into())
                    .spawn_scoped(scope, populate)
                {
                    Ok(thread) => others.push(thread),
                    Err(_) => self.populate_pages(at, bytes)?,
                }
                at += bytes;
            }
            let own = self.populate_pages(start, part.min(len));
            others.into_iter().fold(own, |result, thread| {
                result.and(thread.join().unwrap_or(Err(Errno::FAULT)))
            })
        });
        match result {
            Ok(()) => Ok(()),
            // The kernel does not know the advice.
            Err(Errno::INVAL) => self.reserve(start, len),
            // EFAULT: touching the page would have been a SIGBUS.
            Err(_) => Err(StoreError::NoMemory {
                bytes: len,
                source: Errno::NOSPC.into(),
            }),
        }
    }

    fn populate_pages(&self, start: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: the pages are inside of the mapping (the data area starts and ends on a page), and populating them
        // changes no byte.
        unsafe {
            let address = self.base.as_ptr().add(start as usize);
            rustix::mm::madvise(address.cast(), len as usize, Advice::LinuxPopulateWrite)
        }
    }

    /// Gives the memory of whole pages inside of this range of the data area back to the system.
    pub fn release_data(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let start = (self.geometry.data_offset() + offset).next_multiple_of(PAGE_BYTES);
        let end = (self.geometry.data_offset() + offset + len) / PAGE_BYTES * PAGE_BYTES;
        if end <= start {
            return Ok(());
        }
        self.punch(start, end - start)
    }

    /// Gives the memory of these pages of the file back to the system; they read as zero when reserved again.
    pub fn punch(&self, start: u64, len: u64) -> Result<(), StoreError> {
        rustix::fs::fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            start,
            len,
        )
        .map_err(|errno| StoreError::Io {
            what: "release memory of",
            path: PathBuf::new(),
            source: errno.into(),
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: whoever holds a pointer into the mapping holds the mapping too, so nothing points into it now.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

fn pages(offset: u64, len: u64) -> (u64, u64) {
    let start = offset / PAGE_BYTES * PAGE_BYTES;
    (start, (offset + len).next_multiple_of(PAGE_BYTES) - start)
}

/// Removes a store's file whose server is dead; an error where it lives or the file is something else.
pub fn remove_if_stale(path: &Path) -> Result<(), StoreError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(failed("open", path))?,
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            return Err(StoreError::PathInUse {
                path: path.to_path_buf(),
            })
        }
        other => other.map_err(failed("lock", path))?,
    }
    let mut magic = [0; 8];
    let read = rustix::io::pread(&file, &mut magic[..], 0).map_err(failed("read", path))?;
    // A server that died before it wrote the header left a file that is empty or zero.
    let ours = read == 0 || magic == crate::layout::MAGIC.to_ne_bytes() || magic == [0; 8];
    if !ours {
        return Err(StoreError::BadFile {
            reason: format!("{} is not an object store", path.display()),
        });
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed("remove", path)(errno)),
    }
}

/// Bytes that can still be written to the file system of this directory.
pub fn available_bytes(directory: &Path) -> Result<u64, StoreError> {
    let stat = rustix::fs::statvfs(directory).map_err(failed("inspect", directory))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
