//! Sets of disjoint byte ranges: owns coalescing, and the arithmetic of taking a part out.
//!
//! It refuses to insert what overlaps the set and to remove what is not wholly in it.
//!
//! Invariants:
//! 1. Ranges are disjoint, not empty, and no two touch.
//! 2. `bytes` is the sum of their lengths.

use std::collections::BTreeMap;

/// A set of byte ranges.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct RangeSet {
    ranges: BTreeMap<u64, u64>,
    bytes: u64,
}

impl RangeSet {
    /// How many bytes are in the set.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The ranges as (offset, length) in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges.iter().map(|(offset, len)| (*offset, *len))
    }

    /// The longest range's length.
    pub fn longest(&self) -> u64 {
        self.ranges.values().copied().max().unwrap_or(0)
    }

    /// Whether the whole range is in the set.
    #[cfg(all(test, not(loom)))]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        self.holder(offset, len).is_some()
    }

    fn holder(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let end = offset.checked_add(len)?;
        let (&start, &held) = self.ranges.range(..=offset).next_back()?;
        (len > 0 && end <= start + held).then_some((start, held))
    }

    /// Adds a range; false, and no change, where it is empty or a part of it is there already.
    pub fn insert(&mut self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len) else {
            return false;
        };
        if len == 0 || self.ranges.range(offset..end).next().is_some() {
            return false;
        }
        let mut start = offset;
        let mut total = len;
        if let Some((&before, &held)) = self.ranges.range(..offset).next_back() {
            if before + held > offset {
                return false;
            }
            if before + held == offset {
                start = before;
                total += held;
            }
        }
        if let Some(held) = self.ranges.remove(&end) {
            total += held;
        }
        self.ranges.insert(start, total);
        self.bytes += len;
        true
    }

    /// Takes a range out; false, and no change, where it is not wholly in the set.
    pub fn remove(&mut self, offset: u64, len: u64) -> bool {
        let Some((start, held)) = self.holder(offset, len) else {
            return false;
        };
        self.ranges.remove(&start);
        if start < offset {
            self.ranges.insert(start, offset - start);
        }
        if offset + len < start + held {
            self.ranges.insert(offset + len, start + held - offset - len);
        }
        self.bytes -= len;
        true
    }

    /// Takes out whatever of this range is in the set, and returns it.
    pub fn cut(&mut self, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let end = offset.saturating_add(len);
        let first = self
            .ranges
            .range(..=offset)
            .next_back()
            .map_or(offset, |(start, _)| *start);
        let touched = self
            .ranges
            .range(first..end.max(first))
            .map(|(start, held)| (*start, *held));
        let parts = touched.filter_map(|(start, held)| {
            let (from, to) = (start.max(offset), (start + held).min(end));
            (from < to).then(|| (from, to - from))
        });
        let parts: Vec<_> = parts.collect();
        for &(offset, len) in &parts {
            self.remove(offset, len);
        }
        parts
    }

    /// Empties the set and returns what was in it.
    pub fn take(&mut self) -> Vec<(u64, u64)> {
        self.bytes = 0;
        std::mem::take(&mut self.ranges).into_iter().collect()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_agrees_with_a_set_of_bytes(steps in proptest::collection::vec((0u64..40, 0u64..12, 0u8..3), 1..100)) {
            let mut set = RangeSet::default();
            let mut model = [false; 64];
            for (offset, len, add) in steps {
                let span = offset as usize..(offset + len) as usize;
                if add == 0 {
                    let fits = len > 0 && model[span.clone()].iter().all(|byte| !byte);
                    prop_assert_eq!(set.insert(offset, len), fits);
                    if fits {
                        model[span].fill(true);
                    }
                } else if add == 1 {
                    let expected = model[span.clone()].iter().filter(|byte| **byte).count() as u64;
                    let cut = set.cut(offset, len);
                    prop_assert_eq!(cut.iter().map(|(_, len)| len).sum::<u64>(), expected);
                    model[span].fill(false);
                } else {
                    let there = len > 0 && model[span.clone()].iter().all(|byte| *byte);
                    prop_assert_eq!(set.contains(offset, len), there);
                    prop_assert_eq!(set.remove(offset, len), there);
                    if there {
                        model[span].fill(false);
                    }
                }
                prop_assert_eq!(set.bytes(), model.iter().filter(|byte| **byte).count() as u64);
                let mut previous_end = None;
                for (offset, len) in set.iter() {
                    prop_assert!(previous_end.is_none_or(|end| end < offset) && len > 0);
                    prop_assert!(model[offset as usize..(offset + len) as usize].iter().all(|byte| *byte));
                    previous_end = Some(offset + len);
                }
            }
        }
    }
}
