//! A short vector whose first `N` items need no heap: owns only how such a vector is stored.
//!
//! It exists because a lease asks for one or two resources almost always, and tens of thousands of leases a second
//! must not cost an allocation each. It is written without `unsafe`: unused places hold `T::default()`.
//!
//! Invariants:
//! 1. In the inline form the first `len` places are the items and the others hold the default.
//! 2. A vector that went to the heap stays there until it is dropped or cleared.

use std::ops::{Deref, DerefMut};

/// A vector with room for `N` items in itself.
#[derive(Clone)]
pub(crate) enum InlineVec<T, const N: usize> {
    Inline { len: usize, places: [T; N] },
    Heap(Vec<T>),
}

impl<T: Default, const N: usize> InlineVec<T, N> {
    pub(crate) fn new() -> Self {
        Self::Inline {
            len: 0,
            places: std::array::from_fn(|_| T::default()),
        }
    }

    pub(crate) fn push(&mut self, item: T) {
        let end = self.len();
        self.insert(end, item);
    }

    /// Puts `item` at `at`, which is at most the length, and moves later items up.
    pub(crate) fn insert(&mut self, at: usize, item: T) {
        match self {
            Self::Heap(items) => items.insert(at, item),
            Self::Inline { len, places } if *len < N => {
                places[*len] = item;
                places[at..=*len].rotate_right(1);
                *len += 1;
            }
            Self::Inline { places, .. } => {
                let mut items = Vec::with_capacity(N * 2);
                items.extend(places.iter_mut().map(std::mem::take));
                items.insert(at, item);
                *self = Self::Heap(items);
            }
        }
    }

    pub(crate) fn remove(&mut self, at: usize) -> T {
        match self {
            Self::Heap(items) => items.remove(at),
            Self::Inline { len, places } => {
                places[at..*len].rotate_left(1);
                *len -= 1;
                std::mem::take(&mut places[*len])
            }
        }
    }
}

impl<T: Default, const N: usize> Default for InlineVec<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T, const N: usize> Deref for InlineVec<T, N> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Inline { len, places } => &places[..*len],
            Self::Heap(items) => items,
        }
    }
}

impl<T, const N: usize> DerefMut for InlineVec<T, N> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Inline { len, places } => &mut places[..*len],
            Self::Heap(items) => items,
        }
    }
}

impl<T: std::fmt::Debug, const N: usize> std::fmt::Debug for InlineVec<T, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_behaves_as_a_vector_does(steps in proptest::collection::vec((any::<bool>(), any::<usize>(), any::<u16>()), 0..40)) {
            let mut ours = InlineVec::<u16, 3>::new();
            let mut model = Vec::new();
            for (insert, place, value) in steps {
                if insert || model.is_empty() {
                    let at = place % (model.len() + 1);
                    ours.insert(at, value);
                    model.insert(at, value);
                } else {
                    let at = place % model.len();
                    prop_assert_eq!(ours.remove(at), model.remove(at));
                }
                prop_assert_eq!(&ours[..], &model[..]);
                if let InlineVec::Inline { len, places } = &ours {
                    prop_assert!(places[*len..].iter().all(|place| *place == 0));
                }
            }
        }
    }
}
