//! The store as the raylet sees it: owns the file, the index, the allocator, and the registered clients.
//!
//! It refuses to believe a client: what a ring says is checked against what that client was lent, and what makes no
//! sense is an event and not a panic. It is used from one thread; only handles (`StoredObject`, `LocalBuffer`) leave it.
//!
//! Invariants:
//! 1. Every byte is in exactly one place of the ledger; `validate` proves it.
//! 2. An object is in `objects` exactly while its entry is in the index.
//! 3. Memory changes hands only after `release` saw no pin on it: heads of rings stored, entries removed, full fence,
//!    pins scanned, in this order.
//! 4. Positions in rings are kept here; what clients could overwrite is only published, never read back.

mod ledger;
mod lending;
mod objects;
mod rings;
mod types;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ray_ids::{ObjectId, WorkerId};
use rustc_hash::FxHashMap;

use crate::allocator::{Allocator, Temperature};
use crate::index::Index;
use crate::layout::{control, Geometry, CLIENT_FIRST_BYTES, CLIENT_STRIDE_BYTES, MAX_PINS, PINS_A_PAGE};
use crate::layout::{PUBLICATION_RECORDS, PUBLICATION_WORDS, RETURN_RECORDS, RETURN_WORDS, WORD_BYTES};
use crate::local::Hold;
use crate::mapping::Mapping;
use crate::pins::PinWords;
use crate::ranges::RangeSet;
use crate::ring::Ring;
use crate::sync::{AtomicU64, Ordering, Party, ServerParty};
use crate::{ClientSlot, Extent, StoreConfig, StoreError};

pub use types::{
    DeleteOutcome, EvictOutcome, Forgotten, Ledger, LocalPurpose, ObjectEntry, Published, Role, StoreEvent,
};

/// A registered process.
#[derive(Debug)]
struct Client {
    slot: ClientSlot,
    worker: WorkerId,
    /// Lent and not in any object, by what the rings have said so far.
    lent: RangeSet,
    /// Of those, what the client itself was to give memory to, and has not used.
    unreserved: RangeSet,
    published_head: u64,
    returned_tail: u64,
    /// What it is lent next unless it needs more.
    next_lend_bytes: u64,
    /// Pin words that have memory.
    reserved_pins: u64,
    /// Its ring is corrupt and is not read any more.
    broken: bool,
    /// Its ring waits for room in the index, which has been told.
    waits_for_index: bool,
}

/// A sealed object.
#[derive(Debug)]
struct Record {
    entry: ObjectEntry,
    index_slot: usize,
    /// Its place in the order of age.
    age: u64,
    hold: Hold,
}

/// An object that the server fills.
#[derive(Debug)]
struct Filling {
    offset: u64,
    bytes: u64,
    purpose: LocalPurpose,
    hold: Hold,
}

/// Bytes whose object is gone.
#[derive(Debug)]
struct Released {
    offset: u64,
    bytes: u64,
    creator: Option<ClientSlot>,
    hold: Hold,
}

/// The owner of one node's object store.
#[derive(Debug)]
pub struct StoreServer {
    mapping: Arc<Mapping>,
    path: PathBuf,
    fork_generation: u64,
    max_objects: u64,
    allocator: Allocator,
    clients: Vec<Option<Client>>,
    client_count: u64,
    next_client_generation: u32,
    objects: FxHashMap<ObjectId, Record>,
    filling: FxHashMap<ObjectId, Filling>,
    deferred: Vec<Released>,
    primaries: BTreeMap<u64, ObjectId>,
    cache: BTreeMap<u64, ObjectId>,
    primary_bytes: u64,
    cache_bytes: u64,
    next_age: u64,
    next_generation: u64,
    /// Somebody could not be served, so freed memory is not returned to its last user.
    under_pressure: bool,
    /// The file system had no memory for some page when it was last asked.
    memory_is_short: bool,
    /// The raylet says that creators wait, which has the same effect.
    creators_wait: bool,
    events: Vec<StoreEvent>,
}

impl StoreServer {
    /// Creates the file, with all memory that its index needs, and none yet for objects.
    pub fn create(config: StoreConfig) -> Result<Self, StoreError> {
        let geometry = Geometry::for_limits(config.capacity_bytes, config.max_clients, config.max_objects)?;
        let mapping = Mapping::create(&config.path, geometry)?;
        let mut allocator = Allocator::default();
        allocator.free(0, geometry.data_bytes, Temperature::Cold);
        Ok(Self {
            mapping: Arc::new(mapping),
            path: config.path,
            fork_generation: crate::fork::generation(),
            max_objects: u64::from(config.max_objects),
            allocator,
            clients: Vec::new(),
            client_count: 0,
            next_client_generation: 1,
            objects: FxHashMap::default(),
            filling: FxHashMap::default(),
            deferred: Vec::new(),
            primaries: BTreeMap::new(),
            cache: BTreeMap::new(),
            primary_bytes: 0,
            cache_bytes: 0,
            next_age: 0,
            next_generation: 1,
            under_pressure: false,
            memory_is_short: false,
            creators_wait: false,
            events: Vec::new(),
        })
    }

    /// The file that clients attach to.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Makes room for one more process.
    pub fn register_client(&mut self, worker: WorkerId) -> Result<ClientSlot, StoreError> {
        let limit = self.mapping.geometry().max_clients as u32;
        let number = self
            .clients
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.clients.len()) as u32;
        if number >= limit {
            return Err(StoreError::TooManyClients { limit });
        }
        self.mapping
            .reserve(self.mapping.geometry().client_offset(number), CLIENT_FIRST_BYTES)?;
        let slot = ClientSlot {
            number,
            generation: self.next_client_generation,
        };
        self.next_client_generation += 1;
        // The area is zero: it was never used, or `forget_client` cleared it.
        ServerParty::store(
            self.control(number, control::GENERATION),
            u64::from(slot.generation),
            Ordering::Release,
        );
        let client = Client {
            slot,
            worker,
            lent: RangeSet::default(),
            unreserved: RangeSet::default(),
            published_head: 0,
            returned_tail: 0,
            next_lend_bytes: lending::FIRST_LEND_BYTES,
            reserved_pins: PINS_A_PAGE,
            broken: false,
            waits_for_index: false,
        };
        if number as usize == self.clients.len() {
            self.clients.push(Some(client));
        } else {
            self.clients[number as usize] = Some(client);
        }
        self.client_count += 1;
        Ok(slot)
    }

    /// A process has ended, at whatever instruction. What it had published stays; its words are forgotten and its
    /// memory is free again. It must truly have ended: a process that merely lost its link could still write.
    pub fn forget_client(&mut self, slot: ClientSlot) -> Result<Forgotten, StoreError> {
        self.client(slot)?;
        self.drain_all();
        let number = slot.number;
        let lost = self.unread_publications(number);
        let unpublished = self.control(number, control::CREATING).load(Ordering::Relaxed);
        let Some(mut client) = self.clients[number as usize].take() else {
            return Err(StoreError::UnknownClient { slot });
        };
        self.client_count -= 1;
        let high = self.pins(number).high();
        // Whatever the dead one claimed, only words that have memory are touched.
        let high = if self.reserve_pins(&mut client, high) {
            high
        } else {
            client.reserved_pins as usize
        };
        let pins_dropped = self.pins(number).forget::<ServerParty>(high);
        for word in self
            .mapping
            .words(self.mapping.geometry().client_offset(number), control::WORDS)
        {
            ServerParty::store(word, 0, Ordering::Relaxed);
        }
        let rest = self.mapping.geometry().client_offset(number) + CLIENT_FIRST_BYTES;
        // Where the file system cannot punch holes the pages merely stay reserved.
        let _ = self.mapping.punch(rest, CLIENT_STRIDE_BYTES - CLIENT_FIRST_BYTES);
        let unpublished_bytes = unpublished.min(client.lent.bytes());
        let mut extents = Vec::new();
        for (offset, len) in client.lent.take() {
            self.take_back(&mut client.unreserved, offset, len);
            extents.push(Extent {
                offset,
                len,
                reserved: true,
            });
        }
        self.collect();
        Ok(Forgotten {
            worker: client.worker,
            lost,
            unpublished_bytes,
            pins_dropped,
            extents,
        })
    }

    /// The registered clients with the bytes that each is lent and has not used, most first: whom to recall from.
    pub fn lent_by_client(&self) -> Vec<(ClientSlot, WorkerId, u64)> {
        let clients = self.clients.iter().flatten();
        let mut lent: Vec<_> = clients
            .map(|client| (client.slot, client.worker, client.lent.bytes()))
            .collect();
        lent.sort_by_key(|(_, _, bytes)| std::cmp::Reverse(*bytes));
        lent
    }

    fn client(&mut self, slot: ClientSlot) -> Result<&mut Client, StoreError> {
        self.clients
            .get_mut(slot.number as usize)
            .and_then(Option::as_mut)
            .filter(|client| client.slot == slot)
            .ok_or(StoreError::UnknownClient { slot })
    }

    fn control(&self, number: u32, word: u64) -> &AtomicU64 {
        &self
            .mapping
            .words(self.mapping.geometry().client_offset(number) + word * WORD_BYTES, 1)[0]
    }

    fn index(&self) -> Index<'_> {
        let geometry = self.mapping.geometry();
        Index::new(
            self.mapping
                .words(geometry.index_offset(), geometry.index_bytes() / WORD_BYTES),
        )
    }

    fn publications(&self, number: u32) -> Ring<'_, PUBLICATION_WORDS> {
        let offset = self.mapping.geometry().ring_offset(number);
        let slots = self
            .mapping
            .words(offset, PUBLICATION_RECORDS * PUBLICATION_WORDS as u64);
        let (tail, head) = (
            self.control(number, control::PUBLISHED_TAIL),
            self.control(number, control::PUBLISHED_HEAD),
        );
        Ring::new(tail, head, slots)
    }

    fn returns(&self, number: u32) -> Ring<'_, RETURN_WORDS> {
        let offset = self.mapping.geometry().client_offset(number) + control::RETURNED_RECORDS * WORD_BYTES;
        let slots = self.mapping.words(offset, RETURN_RECORDS * RETURN_WORDS as u64);
        let (tail, head) = (
            self.control(number, control::RETURNED_TAIL),
            self.control(number, control::RETURNED_HEAD),
        );
        Ring::new(tail, head, slots)
    }

    fn pins(&self, number: u32) -> PinWords<'_> {
        let words = self
            .mapping
            .words(self.mapping.geometry().pins_offset(number), MAX_PINS);
        PinWords::new(self.control(number, control::PIN_HIGH), words)
    }

    /// Calls `found` with the offset of every pin of every client. False where the pins of a client could not be read,
    /// so that everything must be taken as pinned. The fence must have come before.
    fn scan_pins(&mut self, mut found: impl FnMut(u64)) -> bool {
        let mut clients = std::mem::take(&mut self.clients);
        let complete = clients.iter_mut().flatten().all(|client| {
            let pins = self.pins(client.slot.number);
            let high = pins.high();
            let readable = self.reserve_pins(client, high);
            if readable {
                pins.scan(high, &mut found);
            }
            readable
        });
        self.clients = clients;
        complete
    }

    /// Makes sure that so many pin words of the client have memory. The client reserved the pages before it used them;
    /// asking again costs nothing and protects this process from one that did not.
    fn reserve_pins(&self, client: &mut Client, high: usize) -> bool {
        if high as u64 <= client.reserved_pins {
            return true;
        }
        let words = (high as u64).next_multiple_of(PINS_A_PAGE);
        let offset = self.mapping.geometry().pins_offset(client.slot.number) + client.reserved_pins * WORD_BYTES;
        let reserved = self
            .mapping
            .reserve(offset, (words - client.reserved_pins) * WORD_BYTES)
            .is_ok();
        if reserved {
            client.reserved_pins = words;
        }
        reserved
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // Whoever has the file mapped keeps its memory until the mapping ends; the name must not outlive the server. A
        // forked child is not the server.
        if !crate::fork::is_child_of(self.fork_generation) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}
