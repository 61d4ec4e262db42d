//! The server's own hold on bytes: owns buffers that it fills and objects that it reads, as handles that may go to
//! other threads of the raylet.
//!
//! It refuses to know the server: a handle says by its reference count that it is gone, and nothing else.
//!
//! Invariants:
//! 1. While a handle lives the server does not reuse its bytes, and the mapping stays.
//! 2. There is one `LocalBuffer` for its bytes, and nobody else reads or writes them until it is sealed.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use ray_ids::ObjectId;

use crate::mapping::Mapping;

/// Counts handles: the server has one clone, each handle another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hold(Arc<()>);

impl Hold {
    /// Whether a handle lives. Only the server makes handles from none, so once this is false it stays false until the
    /// server makes another.
    pub fn is_held(&self) -> bool {
        let held = Arc::strong_count(&self.0) > 1;
        // Pairs with the release in the drop of the last handle, so that its reads happen before a reuse.
        fence(Ordering::Acquire);
        held
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
    pub(crate) _hold: Hold,
}

impl LocalBuffer {
    /// Which object it will be.
    pub fn object(&self) -> ObjectId {
        self.object
    }
}

impl Deref for LocalBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: this is the only handle to the bytes, and the hold keeps them from being reused.
        unsafe { std::slice::from_raw_parts(self.mapping.data(self.offset, self.size).as_ptr(), self.size as usize) }
    }
}

impl DerefMut for LocalBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and it is borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(self.mapping.data(self.offset, self.size).as_ptr(), self.size as usize)
        }
    }
}
