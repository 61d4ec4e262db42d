//! The allocator: owns which bytes of the data area are free, and which of those have been used before.
//!
//! It is pure (no memory is touched) and refuses a range that is already free.
//!
//! Invariants:
//! 1. Free ranges are disjoint, not empty, and multiples of the granule; two that touch differ in temperature.
//! 2. `free_bytes` is their sum; what was allocated and not freed is in none of them.
//! 3. A request is refused only where no run of touching free ranges, whatever their temperature, is long enough.
//!
//! Writing into memory that was never touched is an order of magnitude slower than into memory that was, so warm
//! ranges come first: the most recently freed one that is long enough, then the best fit, and only then cold memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::pins::GRANULE_BYTES;

/// How many recently freed ranges are remembered.
const RECENT_RANGES: usize = 32;

/// Whether memory was used before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Temperature {
    /// It was reserved and written before.
    Warm,
    /// It has no pages yet.
    Cold,
}

/// What the allocator gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Cold where any part of it is.
    pub temperature: Temperature,
}

#[derive(Debug, Clone, Copy)]
struct Free {
    len: u64,
    temperature: Temperature,
}

/// Free ranges of one area.
#[derive(Debug, Default, Clone)]
pub struct Allocator {
    ranges: BTreeMap<u64, Free>,
    warm: BTreeSet<(u64, u64)>,
    cold: BTreeSet<(u64, u64)>,
    recent: VecDeque<(u64, u64)>,
    free_bytes: u64,
}

/// The bytes that an object of `size` takes: whole granules, and at least one so that each object has its own offset.
pub const fn allocated_bytes(size: u64) -> u64 {
    let size = if size == 0 { 1 } else { size };
    size.div_ceil(GRANULE_BYTES) * GRANULE_BYTES
}

impl Allocator {
    /// How many bytes are free.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// How many free bytes are warm.
    pub fn warm_bytes(&self) -> u64 {
        self.warm.iter().map(|(len, _)| len).sum()
    }

    /// The free ranges as (offset, length, temperature) in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, Temperature)> + '_ {
        self.ranges
            .iter()
            .map(|(offset, free)| (*offset, free.len, free.temperature))
    }

    /// The longest request that would be granted now.
    pub fn largest(&self) -> u64 {
        let single = self.warm.last().map_or(0, |(len, _)| *len);
        self.cold
            .iter()
            .map(|&(_, offset)| self.run_around(offset).1)
            .max()
            .unwrap_or(0)
            .max(single)
    }

    fn sizes(&mut self, temperature: Temperature) -> &mut BTreeSet<(u64, u64)> {
        match temperature {
            Temperature::Warm => &mut self.warm,
            Temperature::Cold => &mut self.cold,
        }
    }

    fn put(&mut self, offset: u64, len: u64, temperature: Temperature) {
        if len > 0 {
            self.ranges.insert(offset, Free { len, temperature });
            self.sizes(temperature).insert((len, offset));
        }
    }

    fn pull(&mut self, offset: u64) -> Option<Free> {
        let free = self.ranges.remove(&offset)?;
        self.sizes(free.temperature).remove(&(free.len, offset));
        Some(free)
    }

    /// Makes a range free; false, and no change, where it is empty, off the granule, or overlaps a free range.
    pub fn free(&mut self, offset: u64, len: u64, temperature: Temperature) -> bool {
        let Some(end) = offset.checked_add(len) else {
            return false;
        };
        if len == 0 || offset % GRANULE_BYTES != 0 || len % GRANULE_BYTES != 0 {
            return false;
        }
        if self.ranges.range(offset..end).next().is_some() {
            return false;
        }
        let (mut start, mut total) = (offset, len);
        if let Some((&before, &held)) = self.ranges.range(..offset).next_back() {
            if before + held.len > offset {
                return false;
            }
            if before + held.len == offset && held.temperature == temperature {
                self.pull(before);
                start = before;
                total += held.len;
            }
        }
        if self
            .ranges
            .get(&end)
            .is_some_and(|after| after.temperature == temperature)
        {
            if let Some(after) = self.pull(end) {
                total += after.len;
            }
        }
        self.put(start, total, temperature);
        self.free_bytes += len;
        if temperature == Temperature::Warm {
            if self.recent.len() == RECENT_RANGES {
                self.recent.pop_front();
            }
            self.recent.push_back((offset, len));
        }
        true
    }

    /// Allocates `len` bytes, rounded up to the granule.
    pub fn allocate(&mut self, len: u64) -> Option<Allocation> {
        let len = allocated_bytes(len);
        if len > self.free_bytes {
            return None;
        }
        if let Some(offset) = self.recent_fit(len) {
            return Some(self.carve(offset, len));
        }
        if let Some(&(_, offset)) = self.warm.range((len, 0)..).next() {
            return Some(self.carve(offset, len));
        }
        if let Some(&(_, offset)) = self.cold.range((len, 0)..).next() {
            return Some(self.carve(offset, len));
        }
        // No single range is long enough, but touching warm and cold ones may be.
        let run = self
            .cold
            .iter()
            .map(|&(_, offset)| self.run_around(offset))
            .find(|(_, total)| *total >= len)?;
        Some(self.carve_run(run.0, len))
    }

    /// Allocates what suits best between `minimum` and `wanted` bytes: warm memory even if somewhat less than wanted,
    /// then cold memory, then the longest range there is.
    pub fn allocate_between(&mut self, minimum: u64, wanted: u64) -> Option<Allocation> {
        let minimum = allocated_bytes(minimum);
        let wanted = allocated_bytes(wanted).max(minimum);
        let longest_warm = self.warm.last().map_or(0, |(len, _)| *len);
        if longest_warm < wanted && longest_warm >= minimum.max(wanted / 4) {
            return self.allocate(longest_warm);
        }
        self.allocate(wanted).or_else(|| {
            let largest = self.largest();
            (largest >= minimum).then(|| self.allocate(largest)).flatten()
        })
    }

    /// Takes up to `len` bytes of cold memory, to warm them.
    pub fn allocate_cold(&mut self, len: u64) -> Option<Allocation> {
        let &(held, offset) = self.cold.first()?;
        let len = (len / GRANULE_BYTES * GRANULE_BYTES).min(held);
        (len > 0).then(|| self.carve(offset, len))
    }

    /// As `allocate_between`, of warm memory only.
    pub fn allocate_warm(&mut self, minimum: u64, wanted: u64) -> Option<Allocation> {
        let minimum = allocated_bytes(minimum);
        let wanted = allocated_bytes(wanted).max(minimum);
        let longest = self.warm.last().map_or(0, |(len, _)| *len);
        if longest < minimum {
            return None;
        }
        self.allocate(wanted.min(longest))
    }

    /// Takes warm memory out, up to `limit` bytes, longest ranges first.
    pub fn take_warm(&mut self, limit: u64) -> Vec<(u64, u64)> {
        let mut taken = Vec::new();
        let mut left = limit / GRANULE_BYTES * GRANULE_BYTES;
        while left > 0 {
            let Some(&(len, offset)) = self.warm.last() else { break };
            let len = len.min(left);
            self.carve(offset, len);
            taken.push((offset, len));
            left -= len;
        }
        taken
    }

    fn recent_fit(&mut self, len: u64) -> Option<u64> {
        for position in (0..self.recent.len()).rev() {
            let (offset, held) = self.recent[position];
            if held < len {
                continue;
            }
            self.recent.remove(position);
            let free = self.ranges.range(..=offset).next_back();
            let still_free = free
                .is_some_and(|(start, free)| free.temperature == Temperature::Warm && offset + len <= start + free.len);
            if still_free {
                return Some(offset);
            }
        }
        None
    }

    /// Takes a part of one free range.
    fn carve(&mut self, offset: u64, len: u64) -> Allocation {
        let start = self.ranges.range(..=offset).next_back().map(|(start, _)| *start);
        let (Some(start), Some(free)) = (start, start.and_then(|start| self.pull(start))) else {
            unreachable!("only offsets inside of free ranges are carved");
        };
        self.put(start, offset - start, free.temperature);
        self.put(offset + len, start + free.len - offset - len, free.temperature);
        self.free_bytes -= len;
        Allocation {
            offset,
            len,
            temperature: free.temperature,
        }
    }

    /// The run of touching free ranges around the one at `offset`, as (start, length).
    fn run_around(&self, offset: u64) -> (u64, u64) {
        let mut start = offset;
        for (&before, free) in self.ranges.range(..offset).rev() {
            if before + free.len != start {
                break;
            }
            start = before;
        }
        let mut end = start;
        for (&next, free) in self.ranges.range(start..) {
            if next != end {
                break;
            }
            end = next + free.len;
        }
        (start, end - start)
    }

    fn carve_run(&mut self, start: u64, len: u64) -> Allocation {
        let mut taken = 0;
        while taken < len {
            let Some(free) = self.ranges.get(&(start + taken)).copied() else {
                unreachable!("a run consists of touching free ranges");
            };
            let part = free.len.min(len - taken);
            self.carve(start + taken, part);
            taken += part;
        }
        Allocation {
            offset: start,
            len,
            temperature: Temperature::Cold,
        }
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let mut total = 0;
        let mut previous: Option<(u64, Temperature)> = None;
        for (offset, len, temperature) in self.iter() {
            if len == 0 || len % GRANULE_BYTES != 0 || offset % GRANULE_BYTES != 0 {
                return Err(format!("free range {offset}+{len} is empty or off the granule"));
            }
            if let Some((end, before)) = previous {
                if end > offset || (end == offset && before == temperature) {
                    return Err(format!(
                        "free range at {offset} overlaps or was not coalesced with the one to {end}"
                    ));
                }
            }
            let sizes = if temperature == Temperature::Warm {
                &self.warm
            } else {
                &self.cold
            };
            if !sizes.contains(&(len, offset)) {
                return Err(format!("free range {offset}+{len} is missing from the sizes"));
            }
            previous = Some((offset + len, temperature));
            total += len;
        }
        if total != self.free_bytes || self.warm.len() + self.cold.len() != self.ranges.len() {
            return Err(format!(
                "free ranges sum to {total} and {} are accounted",
                self.free_bytes
            ));
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn area(len: u64) -> Allocator {
        let mut allocator = Allocator::default();
        assert!(allocator.free(0, len, Temperature::Cold));
        allocator
    }

    #[test]
    fn the_most_recently_freed_range_comes_first() {
        let mut allocator = area(1 << 20);
        let first = allocator.allocate(4096).unwrap();
        let second = allocator.allocate(4096).unwrap();
        let third = allocator.allocate(4096).unwrap();
        assert_eq!(first.temperature, Temperature::Cold);
        allocator.free(first.offset, first.len, Temperature::Warm);
        allocator.free(third.offset, third.len, Temperature::Warm);
        allocator.free(second.offset, second.len, Temperature::Warm);
        let again = allocator.allocate(4096).unwrap();
        assert_eq!((again.offset, again.temperature), (second.offset, Temperature::Warm));
        assert_eq!(allocator.allocate(4096).unwrap().offset, third.offset);
        allocator.validate().unwrap();
    }

    #[test]
    fn a_request_may_span_warm_and_cold_memory() {
        let mut allocator = area(1 << 20);
        let part = allocator.allocate(1 << 19).unwrap();
        allocator.free(part.offset, part.len, Temperature::Warm);
        assert_eq!(allocator.largest(), 1 << 20);
        let all = allocator.allocate(1 << 20).unwrap();
        assert_eq!((all.offset, all.len, all.temperature), (0, 1 << 20, Temperature::Cold));
        assert_eq!(allocator.allocate(1), None);
        assert!(!allocator.free(32, 64, Temperature::Warm), "off the granule");
    }

    #[test]
    fn a_double_free_is_refused() {
        let mut allocator = area(1 << 16);
        assert!(!allocator.free(64, 64, Temperature::Warm));
        assert!(!allocator.free(u64::MAX - 63, 64, Temperature::Warm));
        allocator.validate().unwrap();
    }

    proptest! {
        #[test]
        fn it_never_overlaps_never_loses_a_byte_and_coalesces(
            steps in proptest::collection::vec((0u8..6, 1u64..9000, any::<prop::sample::Index>()), 1..200),
        ) {
            const AREA: u64 = 1 << 17;
            let mut allocator = area(AREA);
            let mut held: Vec<Allocation> = Vec::new();
            for (kind, len, choice) in steps {
                match kind {
                    0 | 1 => {
                        let possible = allocator.largest() >= allocated_bytes(len);
                        let given = allocator.allocate(len);
                        prop_assert_eq!(given.is_some(), possible);
                        held.extend(given);
                    }
                    2 => held.extend(allocator.allocate_between(len, len * 4)),
                    4 => held.extend(allocator.allocate_warm(len, len * 4)),
                    3 if !held.is_empty() => {
                        let old = held.swap_remove(choice.index(held.len()));
                        prop_assert!(allocator.free(old.offset, old.len, Temperature::Warm));
                    }
                    _ => {
                        for (offset, len) in allocator.take_warm(len) {
                            held.push(Allocation { offset, len, temperature: Temperature::Warm });
                        }
                    }
                }
                prop_assert_eq!(allocator.validate(), Ok(()));
                let in_use: u64 = held.iter().map(|allocation| allocation.len).sum();
                prop_assert_eq!(in_use + allocator.free_bytes(), AREA);
                let mut spans: Vec<(u64, u64)> = held.iter().map(|a| (a.offset, a.len)).collect();
                spans.extend(allocator.iter().map(|(offset, len, _)| (offset, len)));
                spans.sort_unstable();
                let mut end = 0;
                for (offset, len) in spans {
                    prop_assert_eq!(offset, end);
                    end = offset + len;
                }
                prop_assert_eq!(end, AREA);
            }
            for old in held.drain(..) {
                prop_assert!(allocator.free(old.offset, old.len, Temperature::Warm));
            }
            prop_assert_eq!(allocator.largest(), AREA);
        }
    }
}
