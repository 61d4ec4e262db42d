//! The store as workers and drivers see it: owns the client's half of every protocol, and the handles that keep
//! objects in place.
//!
//! It refuses to wait: what needs the raylet is an error that says so (`NeedExtent`, `RingFull`) or `Absent`.
//!
//! Invariants:
//! 1. Only this client's words are stored into, and only under its lock, so each ring has one producer.
//! 2. A `PinnedObject` keeps its bytes, its pin word and the mapping, also after the client was closed or dropped.
//! 3. In a forked child nothing is stored at all.

use std::ops::Deref;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ray_ids::ObjectId;

use crate::allocator::{allocated_bytes, Temperature};
use crate::client_state::{ClientState, SealedHere};
use crate::fork;
use crate::index::{key_words, Index};
use crate::layout::{control, MAX_PINS, PAGE_BYTES, PINS_A_PAGE, PUBLICATION_RECORDS, PUBLICATION_WORDS};
use crate::layout::{RETURN_RECORDS, RETURN_WORDS, WORD_BYTES};
use crate::mapping::Mapping;
use crate::pins::{pin_value, PinWords};
use crate::ring::Ring;
use crate::sync::{AtomicU64, ClientParty, Ordering, Party};
use crate::{ClientSlot, Extent, StoreError};

/// A record's kind: an object was sealed.
pub(crate) const KIND_PUBLISH: u64 = 1;
/// A record's kind: the object's owner lets go of it.
pub(crate) const KIND_DELETE: u64 = 2;

/// From here on mapping an object's pages with one call beats one fault a page.
const POPULATE_BYTES: u64 = 64 << 10;

/// How often a look-up starts over because the object changed under it. It needs that only when the object is deleted
/// and created again meanwhile, so running out means that the answer would be stale anyway.
const LOOKUP_ATTEMPTS: usize = 16;

#[derive(Debug)]
struct Shared {
    mapping: Mapping,
    slot: ClientSlot,
    fork_generation: u64,
    state: Mutex<ClientState>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ClientState> {
        // No invariant spans a panic: the state is changed by plain calls that cannot unwind halfway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_forked(&self) -> bool {
        fork::is_child_of(self.fork_generation)
    }

    fn control(&self, word: u64) -> &AtomicU64 {
        &self.mapping.words(
            self.mapping.geometry().client_offset(self.slot.number) + word * WORD_BYTES,
            1,
        )[0]
    }

    fn index(&self) -> Index<'_> {
        let geometry = self.mapping.geometry();
        Index::new(
            self.mapping
                .words(geometry.index_offset(), geometry.index_bytes() / WORD_BYTES),
        )
    }

    fn ring(&self) -> Ring<'_, PUBLICATION_WORDS> {
        let offset = self.mapping.geometry().ring_offset(self.slot.number);
        let slots = self
            .mapping
            .words(offset, PUBLICATION_RECORDS * PUBLICATION_WORDS as u64);
        Ring::new(
            self.control(control::PUBLISHED_TAIL),
            self.control(control::PUBLISHED_HEAD),
            slots,
        )
    }

    fn pins(&self) -> PinWords<'_> {
        let offset = self.mapping.geometry().pins_offset(self.slot.number);
        PinWords::new(self.control(control::PIN_HIGH), self.mapping.words(offset, MAX_PINS))
    }

    /// Takes what the raylet returned into the free memory.
    fn absorb_returned(&self, state: &mut ClientState) {
        let offset = self.mapping.geometry().client_offset(self.slot.number) + control::RETURNED_RECORDS * WORD_BYTES;
        let slots = self.mapping.words(offset, RETURN_RECORDS * RETURN_WORDS as u64);
        let ring = Ring::<RETURN_WORDS>::new(
            self.control(control::RETURNED_TAIL),
            self.control(control::RETURNED_HEAD),
            slots,
        );
        let before = state.returned_head;
        while let Ok(Some([offset, len])) = ring.peek(state.returned_head) {
            state.free.free(offset, len, Temperature::Warm);
            state.returned_head += 1;
        }
        if state.returned_head != before {
            ring.consume_until::<ClientParty>(state.returned_head);
        }
    }

    fn store_creating(&self, state: &ClientState) {
        ClientParty::store(self.control(control::CREATING), state.creating_bytes, Ordering::Relaxed);
    }

    fn push(
        &self,
        state: &mut ClientState,
        object: &ObjectId,
        metadata: u32,
        rest: [u64; 3],
    ) -> Result<u64, StoreError> {
        let [k0, k1, k2, k3] = key_words(object, metadata);
        let [offset, size, kind] = rest;
        let record = [k0, k1, k2, k3, offset, size, kind, 0];
        if !self.ring().push::<ClientParty>(state.published_tail, &record) {
            return Err(StoreError::RingFull);
        }
        state.published_tail += 1;
        Ok(state.published_tail - 1)
    }

    /// Makes sure that the pin word at this position has memory.
    fn reserve_position(&self, state: &mut ClientState, position: usize) -> Result<(), StoreError> {
        while position as u64 >= state.reserved_pins {
            let offset = self.mapping.geometry().pins_offset(self.slot.number) + state.reserved_pins * WORD_BYTES;
            self.mapping.reserve(offset, PAGE_BYTES)?;
            state.reserved_pins += PINS_A_PAGE;
        }
        Ok(())
    }
}

/// One process's use of the store. Clones are the same client.
#[derive(Debug, Clone)]
pub struct StoreClient {
    shared: Arc<Shared>,
}

/// What a look-up found.
#[derive(Debug, Clone)]
pub enum Lookup {
    /// The object, pinned.
    Found(PinnedObject),
    /// It is not in the index: the raylet may have it on disk, be receiving it, or not have read its publication yet.
    Absent,
}

impl StoreClient {
    /// Attaches to the raylet's store in the slot that it registered for this process.
    pub fn attach(path: &Path, slot: ClientSlot) -> Result<Self, StoreError> {
        let fork_generation = fork::generation();
        let mapping = Mapping::attach(path)?;
        if u64::from(slot.number) >= mapping.geometry().max_clients || slot.generation == 0 {
            return Err(StoreError::UnknownClient { slot });
        }
        let state = Mutex::new(ClientState::new(mapping.geometry().data_bytes));
        let shared = Shared {
            mapping,
            slot,
            fork_generation,
            state,
        };
        if shared.control(control::GENERATION).load(Ordering::Acquire) != u64::from(slot.generation) {
            return Err(StoreError::UnknownClient { slot });
        }
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// The slot of this process.
    pub fn slot(&self) -> ClientSlot {
        self.shared.slot
    }

    /// The raylet lent an extent. With `NoMemory` it must be given back as it is.
    pub fn add_extent(&self, extent: Extent) -> Result<(), StoreError> {
        if self.shared.is_forked() {
            return Err(StoreError::Forked);
        }
        let Extent { offset, len, reserved } = extent;
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= self.shared.mapping.geometry().data_bytes);
        if end.is_none() {
            return Err(StoreError::NotLent {
                slot: self.shared.slot,
                extent,
            });
        }
        if len == 0 {
            return Ok(());
        }
        if !reserved {
            if let Err(error) = self.shared.mapping.populate_data(offset, len) {
                // A part may have got memory, which others need more. That it failed is what matters.
                let _ = self.shared.mapping.release_data(offset, len);
                return Err(error);
            }
        }
        let mut state = self.shared.lock();
        if !state.free.free(offset, len, Temperature::Warm) {
            return Err(StoreError::NotLent {
                slot: self.shared.slot,
                extent,
            });
        }
        if !reserved {
            state.populated.mark(offset, len);
        }
        Ok(())
    }

    /// Starts an object of `size` bytes in memory that was lent. `NeedExtent` tells what to ask the raylet for.
    pub fn create(&self, object: ObjectId, size: u64) -> Result<ObjectWriter, StoreError> {
        if self.shared.is_forked() {
            return Err(StoreError::Forked);
        }
        let bytes = allocated_bytes(size);
        let mut state = self.shared.lock();
        if state.closed {
            return Err(StoreError::Closed);
        }
        self.shared.absorb_returned(&mut state);
        let allocation = state.free.allocate(bytes).ok_or(StoreError::NeedExtent { bytes })?;
        state.creating_bytes += bytes;
        self.shared.store_creating(&state);
        let untouched = state.populated.mark(allocation.offset, bytes);
        drop(state);
        if let Some((offset, len)) = untouched.filter(|(_, len)| *len >= POPULATE_BYTES) {
            // Only advice: the pages have memory, and where this fails they are mapped one by one when touched.
            let _ = self.shared.mapping.populate_data(offset, len);
        }
        Ok(ObjectWriter {
            shared: Some(self.shared.clone()),
            object,
            offset: allocation.offset,
            size,
        })
    }

    /// Finds a sealed object and pins it.
    pub fn get(&self, object: &ObjectId) -> Result<Lookup, StoreError> {
        let shared = &self.shared;
        if shared.is_forked() {
            return Err(StoreError::Forked);
        }
        let (index, ring) = (shared.index(), shared.ring());
        for _ in 0..LOOKUP_ATTEMPTS {
            if let Some(found) = index.find(object) {
                let place = Place {
                    offset: found.offset,
                    size: found.size,
                    metadata: found.metadata,
                };
                if let Some(pinned) = self.pin(object, place, || index.is_current(&found))? {
                    return Ok(Lookup::Found(pinned));
                }
                continue;
            }
            let Some(sealed) = shared.lock().sealed_here(object) else {
                return Ok(Lookup::Absent);
            };
            // While the record waits the raylet does not know of the object, so it cannot have deleted it either; and
            // if it reads the record later it will see the pin.
            let place = Place {
                offset: sealed.offset,
                size: sealed.size,
                metadata: sealed.metadata,
            };
            if let Some(pinned) = self.pin(object, place, || ring.consumed() <= sealed.sequence)? {
                return Ok(Lookup::Found(pinned));
            }
            shared.lock().forget_sealed(object);
        }
        Ok(Lookup::Absent)
    }

    /// Whether the object could be got now; by the time of the answer it may have changed.
    pub fn contains(&self, object: &ObjectId) -> bool {
        !self.shared.is_forked()
            && (self.shared.index().find(object).is_some()
                || self
                    .shared
                    .lock()
                    .sealed_here(object)
                    .is_some_and(|it| self.shared.ring().consumed() <= it.sequence))
    }

    fn pin(
        &self,
        object: &ObjectId,
        place: Place,
        is_valid: impl Fn() -> bool,
    ) -> Result<Option<PinnedObject>, StoreError> {
        let shared = &self.shared;
        let mut state = shared.lock();
        if let Some(pin) = state.pin_at(place.offset) {
            // The word is there already, so all that must be known is that it is this very object that it protects.
            let valid = pin.object == *object && is_valid();
            // `pin` may be the last handle now, and its drop takes the lock.
            drop(state);
            return Ok(valid.then_some(PinnedObject { pin }));
        }
        let position = state
            .take_position()
            .ok_or(StoreError::TooManyPins { pinned: state.pinned() })?;
        if let Err(error) = shared.reserve_position(&mut state, position) {
            state.give_position(position);
            return Err(error);
        }
        if !shared
            .pins()
            .pin::<ClientParty>(position, state.high(), pin_value(place.offset), is_valid)
        {
            state.give_position(position);
            return Ok(None);
        }
        let pin = Arc::new(Pin {
            shared: shared.clone(),
            object: *object,
            place,
            position,
        });
        state.remember_pin(place.offset, position, Arc::downgrade(&pin));
        Ok(Some(PinnedObject { pin }))
    }

    /// The owner, which this process is, lets go of the object: the raylet frees it when it next reads the ring.
    pub fn request_delete(&self, object: &ObjectId) -> Result<(), StoreError> {
        if self.shared.is_forked() {
            return Err(StoreError::Forked);
        }
        let mut state = self.shared.lock();
        self.shared.push(&mut state, object, 0, [0, 0, KIND_DELETE])?;
        state.forget_sealed(object);
        Ok(())
    }

    /// Whether it is time to ask the raylet, without waiting for an answer, to read the rings: this client's ring is
    /// half full, or its free memory is half used up while deletions wait to be read. A client that does so after it
    /// seals or deletes hardly ever has to wait. It is told once until the raylet has read something.
    pub fn is_nudge_due(&self) -> bool {
        if self.shared.is_forked() {
            return false;
        }
        let consumed = self.shared.ring().consumed();
        let mut state = self.shared.lock();
        let waiting = state.published_tail.wrapping_sub(consumed);
        let free = state.free.free_bytes();
        if state.nudged_at != Some(consumed) {
            state.nudged_at = None;
            state.free_high = state.free_high.max(free);
        }
        let due = waiting >= PUBLICATION_RECORDS / 2 || (waiting > 0 && free < state.free_high / 2);
        if !due || state.nudged_at.is_some() {
            return false;
        }
        state.nudged_at = Some(consumed);
        state.free_high = free;
        true
    }

    /// Takes up to `limit_bytes` of lent memory that is in no use out of this client, to be given back.
    pub fn unused(&self, limit_bytes: u64) -> Vec<Extent> {
        if self.shared.is_forked() {
            return Vec::new();
        }
        let mut state = self.shared.lock();
        self.shared.absorb_returned(&mut state);
        state
            .free
            .take_warm(limit_bytes)
            .into_iter()
            .map(|(offset, len)| Extent {
                offset,
                len,
                reserved: true,
            })
            .collect()
    }

    /// Bytes of lent memory that is in no use, as of the last call.
    pub fn unused_bytes(&self) -> u64 {
        if self.shared.is_forked() {
            return 0;
        }
        self.shared.lock().free.free_bytes()
    }

    /// The objects that this process has pinned. Before it forks, the raylet can be asked to hold them for the child.
    pub fn pinned_objects(&self) -> Vec<ObjectId> {
        if self.shared.is_forked() {
            return Vec::new();
        }
        // The pins are dropped outside of the lock, which their drop may take.
        let pins = self.shared.lock().live_pins();
        pins.iter().map(|pin| pin.object).collect()
    }

    /// Leaves the store: nothing can be created any more, and all unused memory is to be given back. Pinned objects
    /// stay as they are, for as long as the slot stays registered.
    pub fn close(&self) -> Vec<Extent> {
        if self.shared.is_forked() {
            return Vec::new();
        }
        self.shared.lock().closed = true;
        self.unused(u64::MAX)
    }
}

#[derive(Debug, Clone, Copy)]
struct Place {
    offset: u64,
    size: u64,
    metadata: u32,
}

/// A pin word in use.
#[derive(Debug)]
pub(crate) struct Pin {
    shared: Arc<Shared>,
    object: ObjectId,
    place: Place,
    position: usize,
}

impl Drop for Pin {
    fn drop(&mut self) {
        if self.shared.is_forked() {
            return;
        }
        let mut state = self.shared.lock();
        state.forget_pin(self.place.offset, self.position);
        self.shared.pins().unpin::<ClientParty>(self.position, state.high());
    }
}

/// A sealed object, which stays where it is while any clone of this lives.
#[derive(Debug, Clone)]
pub struct PinnedObject {
    pin: Arc<Pin>,
}

impl PinnedObject {
    /// Which object.
    pub fn object(&self) -> ObjectId {
        self.pin.object
    }

    /// Its creator's tag.
    pub fn metadata(&self) -> u32 {
        self.pin.place.metadata
    }
}

impl Deref for PinnedObject {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Place { offset, size, .. } = self.pin.place;
        // SAFETY: the object is sealed, so nobody writes its bytes; the pin keeps them from being reused, and the pin
        // holds the mapping.
        unsafe { std::slice::from_raw_parts(self.pin.shared.mapping.data(offset, size).as_ptr(), size as usize) }
    }
}

impl AsRef<[u8]> for PinnedObject {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// An object that could not be sealed yet.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Unsealed {
    /// Seal it again when the reason is gone.
    pub writer: ObjectWriter,
    /// Why it could not be sealed.
    pub reason: StoreError,
}

/// An object that is being filled. Dropped without `seal` it never existed.
#[derive(Debug)]
pub struct ObjectWriter {
    /// `None` once it is sealed.
    shared: Option<Arc<Shared>>,
    object: ObjectId,
    offset: u64,
    size: u64,
}

impl ObjectWriter {
    /// Which object it will be.
    pub fn object(&self) -> ObjectId {
        self.object
    }

    /// Its bytes, aligned to 64. They hold whatever was there before.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match &self.shared {
            // SAFETY: the bytes are in an extent that is lent to this client, which allocated them to this writer
            // alone, and it is borrowed mutably.
            Some(shared) => unsafe {
                std::slice::from_raw_parts_mut(shared.mapping.data(self.offset, self.size).as_ptr(), self.size as usize)
            },
            None => &mut [],
        }
    }

    /// Publishes the object. With `RingFull` the raylet must read the ring first; the writer comes back for that.
    pub fn seal(mut self, metadata: u32) -> Result<(), Box<Unsealed>> {
        let Some(shared) = self.shared.take() else {
            return Ok(());
        };
        if shared.is_forked() {
            return Err(Box::new(Unsealed {
                writer: self,
                reason: StoreError::Forked,
            }));
        }
        let mut state = shared.lock();
        let (offset, size) = (self.offset, self.size);
        match shared.push(&mut state, &self.object, metadata, [offset, size, KIND_PUBLISH]) {
            Ok(sequence) => {
                state.creating_bytes -= allocated_bytes(size);
                shared.store_creating(&state);
                let consumed = shared.ring().consumed();
                state.remember_sealed(
                    self.object,
                    SealedHere {
                        sequence,
                        offset,
                        size,
                        metadata,
                    },
                    consumed,
                );
                Ok(())
            }
            Err(reason) => {
                drop(state);
                self.shared = Some(shared);
                Err(Box::new(Unsealed { writer: self, reason }))
            }
        }
    }
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take().filter(|shared| !shared.is_forked()) else {
            return;
        };
        let mut state = shared.lock();
        let bytes = allocated_bytes(self.size);
        state.free.free(self.offset, bytes, Temperature::Warm);
        state.creating_bytes -= bytes;
        shared.store_creating(&state);
    }
}
