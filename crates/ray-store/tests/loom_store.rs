//! The shipping protocols under loom: every interleaving and every reordering that the memory model allows.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p ray-store --release --test loom_store`.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use ray_ids::ObjectId;
use ray_store::index::{Index, ENTRY_WORDS};
use ray_store::pins::{free_fence, pin_value, PinWords};
use ray_store::ring::Ring;
use ray_store::sync::{AtomicU64, ClientParty, Ordering, ServerParty};

const OFFSET: u64 = 128;

fn object(number: u8) -> ObjectId {
    ObjectId::from_array([number; 28])
}

fn words(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

/// Shared words as in the mapping, small, and the bytes of one place in the data area. Loom reports any access to the
/// bytes that is not ordered against a write.
struct Shared {
    index: Vec<AtomicU64>,
    pin_high: AtomicU64,
    pins: Vec<AtomicU64>,
    ring_tail: AtomicU64,
    ring_head: AtomicU64,
    ring: Vec<AtomicU64>,
    bytes: UnsafeCell<u64>,
}

// SAFETY: the cell's accesses are what loom is there to check.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            index: words(2 * ENTRY_WORDS),
            pin_high: AtomicU64::new(0),
            pins: words(2),
            ring_tail: AtomicU64::new(0),
            ring_head: AtomicU64::new(0),
            ring: words(4),
            bytes: UnsafeCell::new(0),
        })
    }

    fn index(&self) -> Index<'_> {
        Index::new(&self.index)
    }

    fn pins(&self) -> PinWords<'_> {
        PinWords::new(&self.pin_high, &self.pins)
    }

    fn ring(&self) -> Ring<'_, 2> {
        Ring::new(&self.ring_tail, &self.ring_head, &self.ring)
    }

    fn write(&self, value: u64) {
        // SAFETY: the protocol says that nobody else accesses the bytes now; loom checks it.
        self.bytes.with_mut(|bytes| unsafe { *bytes = value });
    }

    fn read(&self) -> u64 {
        // SAFETY: as above, for writes.
        self.bytes.with(|bytes| unsafe { *bytes })
    }

    /// As the server does after it took an object away.
    fn is_pinned(&self) -> bool {
        free_fence();
        let mut pinned = false;
        let high = self.pins().high();
        self.pins().scan(high, |offset| pinned |= offset == OFFSET);
        pinned
    }

    /// As a client's `get` of an object in the index.
    fn get(&self, number: u8, position: usize) -> Option<u64> {
        let found = self.index().find(&object(number))?;
        let value = pin_value(found.offset);
        let high = position as u64 + 1;
        if !self
            .pins()
            .pin::<ClientParty>(position, high, value, || self.index().is_current(&found))
        {
            return None;
        }
        assert_eq!((found.offset, found.size), (OFFSET, u64::from(number)));
        let seen = self.read();
        self.pins().unpin::<ClientParty>(position, 0);
        Some(seen)
    }
}

#[test]
fn bytes_in_use_are_never_reused() {
    loom::model(|| {
        let shared = Shared::new();
        shared.write(1);
        let slot = shared
            .index()
            .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
            .unwrap();
        let client = {
            let shared = shared.clone();
            thread::spawn(move || {
                if let Some(seen) = shared.get(1, 0) {
                    assert_eq!(seen, 1);
                }
            })
        };
        shared.index().remove::<ServerParty>(slot);
        if !shared.is_pinned() {
            // Another object takes its place, in the data area and in the index.
            shared.write(2);
            shared
                .index()
                .insert::<ServerParty>(&object(2), 2, OFFSET, 2, 0)
                .unwrap();
        }
        client.join().unwrap();
    });
}

#[test]
fn a_reader_of_the_next_object_sees_its_bytes() {
    loom::model(|| {
        let shared = Shared::new();
        shared.write(1);
        let slot = shared
            .index()
            .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
            .unwrap();
        let client = {
            let shared = shared.clone();
            thread::spawn(move || {
                if let Some(seen) = shared.get(2, 0) {
                    assert_eq!(seen, 2);
                }
            })
        };
        shared.index().remove::<ServerParty>(slot);
        // No one pins the first object, so its place is free once the fence is past.
        free_fence();
        shared.write(2);
        shared
            .index()
            .insert::<ServerParty>(&object(2), 2, OFFSET, 2, 0)
            .unwrap();
        client.join().unwrap();
    });
}

#[test]
fn an_eviction_that_finds_a_pin_leaves_the_object() {
    loom::model(|| {
        let shared = Shared::new();
        shared.write(1);
        let slot = shared
            .index()
            .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
            .unwrap();
        let client = {
            let shared = shared.clone();
            thread::spawn(move || {
                if let Some(seen) = shared.get(1, 1) {
                    assert_eq!(seen, 1);
                }
            })
        };
        shared.index().mark_evicting::<ServerParty>(slot, 1);
        if shared.is_pinned() {
            shared.index().unmark_evicting::<ServerParty>(slot, 1);
        } else {
            shared.index().remove::<ServerParty>(slot);
            // No one pins the first object, so its place is free once the fence is past.
            free_fence();
            shared.write(2);
        }
        client.join().unwrap();
    });
}

#[test]
fn a_published_object_arrives_whole() {
    loom::model(|| {
        let shared = Shared::new();
        let client = {
            let shared = shared.clone();
            thread::spawn(move || {
                shared.write(7);
                let mut tail = 0;
                for value in 1..=3 {
                    // The ring holds two records, so the third one may find it full.
                    if shared.ring().push::<ClientParty>(tail, &[value, value + 10]) {
                        tail += 1;
                    }
                }
                tail
            })
        };
        let mut head = 0;
        let mut seen = Vec::new();
        for _ in 0..2 {
            while let Some([value, check]) = shared.ring().peek(head).unwrap() {
                assert_eq!(check, value + 10);
                assert_eq!(shared.read(), 7);
                seen.push(value);
                head += 1;
                shared.ring().consume_until::<ServerParty>(head);
            }
        }
        let written = client.join().unwrap();
        while let Some([value, _]) = shared.ring().peek(head).unwrap() {
            seen.push(value);
            head += 1;
        }
        assert_eq!(head, written);
        assert_eq!(seen, (1..=written).collect::<Vec<u64>>());
    });
}

#[test]
fn a_creators_pin_from_before_the_record_was_read_is_seen() {
    loom::model(|| {
        let shared = Shared::new();
        let client = {
            let shared = shared.clone();
            thread::spawn(move || {
                shared.write(1);
                assert!(shared.ring().push::<ClientParty>(0, &[1, 0]));
                // As `get` of an object that it sealed itself: valid while the record waits.
                let waiting = || shared.ring().consumed() == 0;
                if shared.pins().pin::<ClientParty>(0, 1, pin_value(OFFSET), waiting) {
                    assert_eq!(shared.read(), 1);
                    shared.pins().unpin::<ClientParty>(0, 0);
                } else {
                    // The record was consumed, so what the server did with it is visible: it is in the index, or was.
                    let seen = shared.get(1, 0);
                    assert!(seen.is_none_or(|seen| seen == 1));
                }
            })
        };
        if shared.ring().peek(0).unwrap().is_some() {
            let slot = shared
                .index()
                .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
                .unwrap();
            shared.ring().consume_until::<ServerParty>(1);
            // Its owner let go of it at once.
            shared.index().remove::<ServerParty>(slot);
            if !shared.is_pinned() {
                shared.write(2);
            }
        }
        client.join().unwrap();
    });
}

#[test]
fn a_consumed_record_is_in_the_index() {
    loom::model(|| {
        let shared = Shared::new();
        let client = {
            let shared = shared.clone();
            thread::spawn(move || {
                shared.write(1);
                assert!(shared.ring().push::<ClientParty>(0, &[1, 0]));
                if shared.ring().consumed() == 1 {
                    assert_eq!(shared.get(1, 0), Some(1));
                }
            })
        };
        if shared.ring().peek(0).unwrap().is_some() {
            shared
                .index()
                .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
                .unwrap();
            shared.ring().consume_until::<ServerParty>(1);
        }
        client.join().unwrap();
    });
}

#[test]
fn two_clients_and_a_deletion() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let shared = Shared::new();
        shared.write(1);
        let slot = shared
            .index()
            .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
            .unwrap();
        // Both words are one client's here, as of two of its threads under its lock; the words are independent.
        shared.pin_high.store(2, Ordering::Relaxed);
        let clients: Vec<_> = (0..2)
            .map(|position| {
                let shared = shared.clone();
                thread::spawn(move || {
                    let Some(found) = shared.index().find(&object(1)) else {
                        return;
                    };
                    let value = pin_value(found.offset);
                    if shared
                        .pins()
                        .pin::<ClientParty>(position, 2, value, || shared.index().is_current(&found))
                    {
                        assert_eq!(shared.read(), 1);
                        shared.pins().unpin::<ClientParty>(position, 2);
                    }
                })
            })
            .collect();
        shared.index().remove::<ServerParty>(slot);
        if !shared.is_pinned() {
            shared.write(2);
        }
        for client in clients {
            client.join().unwrap();
        }
    });
}

/// The mutants: each protocol with one step left out must fail, or the tests above prove nothing.
mod mutants {
    use super::*;

    /// Whether loom finds an access to the bytes that is not ordered against a write.
    fn fails(model: impl Fn() + Sync + Send + 'static) -> bool {
        let Err(payload) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| loom::model(model))) else {
            return false;
        };
        let text = payload.downcast_ref::<String>().cloned();
        let text = text
            .or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_default();
        assert!(
            text.contains("Causality violation"),
            "it failed for another reason: {text}"
        );
        true
    }

    #[test]
    fn without_the_servers_fence_bytes_are_reused_too_early() {
        assert!(fails(|| {
            let shared = Shared::new();
            shared.write(1);
            let slot = shared
                .index()
                .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
                .unwrap();
            let client = {
                let shared = shared.clone();
                thread::spawn(move || shared.get(1, 0))
            };
            shared.index().remove::<ServerParty>(slot);
            let mut pinned = false;
            let high = shared.pins().high();
            shared.pins().scan(high, |_| pinned = true);
            if !pinned {
                shared.write(2);
            }
            client.join().unwrap();
        }));
    }

    #[test]
    fn without_the_second_look_a_removed_object_is_read() {
        assert!(fails(|| {
            let shared = Shared::new();
            shared.write(1);
            let slot = shared
                .index()
                .insert::<ServerParty>(&object(1), 1, OFFSET, 1, 0)
                .unwrap();
            let client = {
                let shared = shared.clone();
                thread::spawn(move || {
                    if shared.index().find(&object(1)).is_some() {
                        shared.pins().pin::<ClientParty>(0, 1, pin_value(OFFSET), || true);
                        shared.read();
                    }
                })
            };
            shared.index().remove::<ServerParty>(slot);
            if !shared.is_pinned() {
                shared.write(2);
            }
            client.join().unwrap();
        }));
    }

    #[test]
    fn releasing_before_the_head_is_stored_misses_the_creators_pin() {
        assert!(fails(|| {
            let shared = Shared::new();
            let client = {
                let shared = shared.clone();
                thread::spawn(move || {
                    shared.write(1);
                    shared.ring().push::<ClientParty>(0, &[1, 0]);
                    let waiting = || shared.ring().consumed() == 0;
                    if shared.pins().pin::<ClientParty>(0, 1, pin_value(OFFSET), waiting) {
                        shared.read();
                    }
                })
            };
            if shared.ring().peek(0).unwrap().is_some() {
                if !shared.is_pinned() {
                    shared.write(2);
                }
                shared.ring().consume_until::<ServerParty>(1);
            }
            client.join().unwrap();
        }));
    }
}
