//! Reading the rings: owns the way of a record from a client's ring into the index.
//!
//! It refuses records that speak of bytes which that client was not lent, and to read on in a corrupt ring.
//!
//! Invariants:
//! 1. An object is in the index before its record counts as consumed.
//! 2. No memory is released before the heads of all rings that were read are stored, so that a client which found its
//!    own record still waiting has its pin seen.
//! 3. One pass reads at most one ring's length from each client, so that a fast client cannot keep the raylet.

use ray_ids::ObjectId;

use super::{Published, Released, Role, StoreEvent, StoreServer};
use crate::allocator::allocated_bytes;
use crate::client::{KIND_DELETE, KIND_PUBLISH};
use crate::index::key_of;
use crate::layout::PUBLICATION_RECORDS;
use crate::local::Hold;
use crate::pins::GRANULE_BYTES;
use crate::server::{DeleteOutcome, ObjectEntry};
use crate::sync::ServerParty;
use crate::ClientSlot;

impl StoreServer {
    /// Reads all rings and returns what has happened since the last call, including what other calls read meanwhile.
    pub fn drain_rings(&mut self) -> Vec<StoreEvent> {
        self.drain_all();
        std::mem::take(&mut self.events)
    }

    /// Reads all rings; what they said waits for `drain_rings`.
    pub(super) fn drain_all(&mut self) {
        let mut released = Vec::new();
        let mut deleted = Vec::new();
        let mut late = Vec::new();
        for number in 0..self.clients.len() as u32 {
            self.drain_client(number, &mut released, &mut deleted, &mut late);
        }
        // An object may be let go of in its owner's ring and have been published in another's, which was read later.
        for (object, slot) in late {
            self.delete_by_ring(object, slot, &mut released, &mut deleted);
        }
        if released.is_empty() {
            return;
        }
        let outcomes = self.release(released);
        // The outcome is known only now; the event was placed where its record stood.
        for (event, position) in deleted {
            if let Some(StoreEvent::Deleted { outcome, .. }) = self.events.get_mut(event) {
                *outcome = outcomes[position];
            }
        }
    }

    fn drain_client(
        &mut self,
        number: u32,
        released: &mut Vec<Released>,
        deleted: &mut Vec<(usize, usize)>,
        late: &mut Vec<(ObjectId, ClientSlot)>,
    ) {
        let Some(client) = self.clients[number as usize].as_ref().filter(|client| !client.broken) else {
            return;
        };
        let (slot, first) = (client.slot, client.published_head);
        let mut head = first;
        while head - first < PUBLICATION_RECORDS {
            let record = match self.publications(number).peek(head) {
                Ok(Some(record)) => record,
                Ok(None) => break,
                Err(corrupt) => {
                    self.mark(number, |client| client.broken = true);
                    let reason = format!("its ring's tail is {} where {} is read", corrupt.tail, corrupt.head);
                    self.events.push(StoreEvent::Rejected { slot, reason });
                    break;
                }
            };
            let [k0, k1, k2, k3, offset, size, kind, _] = record;
            let (object, metadata) = key_of([k0, k1, k2, k3]);
            match kind {
                KIND_PUBLISH => {
                    if !self.has_room_in_index() && !self.objects.contains_key(&object) {
                        let told = self.clients[number as usize]
                            .as_ref()
                            .is_some_and(|it| it.waits_for_index);
                        if !told {
                            self.mark(number, |client| client.waits_for_index = true);
                            self.events.push(StoreEvent::IndexFull { slot });
                        }
                        break;
                    }
                    self.mark(number, |client| client.waits_for_index = false);
                    let published = Published {
                        object,
                        slot,
                        offset,
                        size,
                        metadata,
                    };
                    self.publish(published, released);
                }
                KIND_DELETE if self.objects.contains_key(&object) => {
                    self.delete_by_ring(object, slot, released, deleted);
                }
                KIND_DELETE => late.push((object, slot)),
                _ => {
                    let reason = format!("a record of unknown kind {kind}");
                    self.events.push(StoreEvent::Rejected { slot, reason });
                }
            }
            head += 1;
        }
        if head != first {
            self.mark(number, |client| client.published_head = head);
            self.publications(number).consume_until::<ServerParty>(head);
        }
    }

    fn mark(&mut self, number: u32, change: impl FnOnce(&mut super::Client)) {
        if let Some(client) = &mut self.clients[number as usize] {
            change(client);
        }
    }

    pub(super) fn has_room_in_index(&self) -> bool {
        (self.objects.len() + self.filling.len()) < self.max_objects as usize
    }

    fn publish(&mut self, published: Published, released: &mut Vec<Released>) {
        let Published {
            object,
            slot,
            offset,
            size,
            metadata,
        } = published;
        let bytes = size.checked_add(GRANULE_BYTES).map(|_| allocated_bytes(size));
        let taken = match (bytes, self.client(slot)) {
            (Some(bytes), Ok(client)) if offset % GRANULE_BYTES == 0 => {
                let taken = client.lent.remove(offset, bytes);
                if taken && client.unreserved.bytes() > 0 {
                    // The client gave these pages memory before it wrote the object.
                    client.unreserved.cut(offset, bytes);
                }
                taken
            }
            _ => false,
        };
        if !taken {
            let reason = format!("object {object} at {offset} of {size} bytes is not in its extents");
            self.events.push(StoreEvent::Rejected { slot, reason });
            return;
        }
        let bytes = allocated_bytes(size);
        if self.objects.contains_key(&object) {
            released.push(Released {
                offset,
                bytes,
                creator: Some(slot),
                hold: Hold::new(true),
            });
            self.events.push(StoreEvent::Duplicate { object, slot });
            return;
        }
        let generation = self.next_generation();
        let role = Role::Primary;
        let entry = ObjectEntry {
            object,
            offset,
            size,
            metadata,
            role,
            generation,
            creator: Some(slot),
        };
        self.enter(entry);
        self.events.push(StoreEvent::Published(published));
    }

    fn delete_by_ring(
        &mut self,
        object: ObjectId,
        slot: ClientSlot,
        released: &mut Vec<Released>,
        deleted: &mut Vec<(usize, usize)>,
    ) {
        if let Some(gone) = self.take_out(&object) {
            deleted.push((self.events.len(), released.len()));
            released.push(gone);
        }
        self.events.push(StoreEvent::Deleted {
            object,
            slot,
            outcome: DeleteOutcome::Absent,
        });
    }

    /// The objects in a dead client's ring that could not be entered.
    pub(super) fn unread_publications(&self, number: u32) -> Vec<ObjectId> {
        let Some(client) = &self.clients[number as usize] else {
            return Vec::new();
        };
        let ring = self.publications(number);
        let mut lost = Vec::new();
        let mut head = client.published_head;
        while let Ok(Some([k0, k1, k2, k3, _, _, kind, _])) = ring.peek(head) {
            if kind == KIND_PUBLISH {
                lost.push(key_of([k0, k1, k2, k3]).0);
            }
            head += 1;
        }
        lost
    }
}
