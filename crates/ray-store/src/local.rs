//! The server's own hold on bytes: owns buffers that it fills and objects that it reads, as handles that may go to
//! other threads of the raylet.
//!
//! It refuses to know the server: a handle says by its reference count that it is gone, and nothing else.
//!
//! Invariants:
//! 1. While a handle lives the server does not reuse its bytes, and the mapping stays.
//! 2. There is one `LocalBuffer` for its bytes, and nobody else reads or writes them until it is sealed.

use std::ops::Deref;
use std::sync::atomic::{fence, AtomicU8, Ordering};
use std::sync::Arc;

use ray_ids::ObjectId;

use crate::mapping::Mapping;
use crate::StoreError;

/// Counts handles: the server has one clone, each handle another. It carries whether the bytes have memory.
#[derive(Debug, Clone)]
pub(crate) struct Hold(Arc<AtomicU8>);

/// The bytes have no memory yet.
const UNRESERVED: u8 = 0;
/// They have.
const RESERVED: u8 = 1;
/// There was none for them.
const NO_MEMORY: u8 = 2;

impl Hold {
    pub fn new(reserved: bool) -> Self {
        Self(Arc::new(AtomicU8::new(if reserved { RESERVED } else { UNRESERVED })))
    }

    /// Whether a handle lives. Only the server makes handles from none, so once this is false it stays false until the
    /// server makes another.
    pub fn is_held(&self) -> bool {
        let held = Arc::strong_count(&self.0) > 1;
        // Pairs with the release in the drop of the last handle, so that its reads happen before a reuse.
        fence(Ordering::Acquire);
        held
    }

    pub fn is_reserved(&self) -> bool {
        self.0.load(Ordering::Acquire) == RESERVED
    }

    pub fn found_no_memory(&self) -> bool {
        self.0.load(Ordering::Acquire) == NO_MEMORY
    }
}

/// A sealed object that the server reads, to send or to spill it.
#[derive(Debug, Clone)]
pub struct StoredObject {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) metadata: u32,
    pub(crate) _hold: Hold,
}

impl StoredObject {
    /// Its creator's tag.
    pub fn metadata(&self) -> u32 {
        self.metadata
    }
}

impl Deref for StoredObject {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the object is sealed, so nobody writes its bytes, and the hold keeps them from being reused.
        unsafe { std::slice::from_raw_parts(self.mapping.data(self.offset, self.size).as_ptr(), self.size as usize) }
    }
}

/// An object that the server creates: a copy that arrives from another node, or one that is restored.
#[derive(Debug)]
pub struct LocalBuffer {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) object: ObjectId,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) hold: Hold,
}

impl LocalBuffer {
    /// Which object it will be.
    pub fn object(&self) -> ObjectId {
        self.object
    }
}

impl LocalBuffer {
    /// Its bytes. The first call gives a big buffer's pages their memory, which takes long (a second for a few GB), so
    /// it belongs on a thread that may block.
    pub fn writable(&mut self) -> Result<&mut [u8], StoreError> {
        if !self.hold.is_reserved() {
            if let Err(error) = self.mapping.populate_data(self.offset, self.size) {
                // A part may have got memory, which others need more. That it failed is what matters.
                let _ = self.mapping.release_data(self.offset, self.size);
                self.hold.0.store(NO_MEMORY, Ordering::Release);
                return Err(error);
            }
            self.hold.0.store(RESERVED, Ordering::Release);
        }
        // SAFETY: this is the only handle to the bytes, it is borrowed mutably, and the hold keeps them from being
        // reused.
        unsafe {
            let address = self.mapping.data(self.offset, self.size).as_ptr();
            Ok(std::slice::from_raw_parts_mut(address, self.size as usize))
        }
    }

    /// Its bytes, to serve those that have arrived; empty before the first `writable`.
    pub fn readable(&self) -> &[u8] {
        if !self.hold.is_reserved() {
            return &[];
        }
        // SAFETY: as above, and it is borrowed.
        unsafe { std::slice::from_raw_parts(self.mapping.data(self.offset, self.size).as_ptr(), self.size as usize) }
    }
}
