//! Checks a reference table; for tests and the simulator.
//!
//! It sees what is wrong between two steps: counts without a reason, indices that disagree, holds that nobody ends.
//!
//! Invariant: 1. It changes nothing.

use ray_ids::ObjectId;
use rustc_hash::FxHashMap;

use crate::entry::{Kind, Owned};
use crate::references::ReferenceTable;

impl<V: Default> ReferenceTable<V> {
    /// Checks the invariants; for tests and the simulator.
    pub fn validate(&self) -> Result<(), String> {
        let mut contained: FxHashMap<ObjectId, u32> = FxHashMap::default();
        for entry in self.entries.values() {
            for inner in entry.owned().map_or(&[][..], Owned::contains) {
                *contained.entry(*inner).or_default() += 1;
            }
        }
        for (object, entry) in &self.entries {
            let expected = contained.get(object).copied().unwrap_or(0);
            if entry.contained != expected {
                return Err(format!(
                    "{object:?} is contained {} times and {expected} objects contain it",
                    entry.contained
                ));
            }
            match &entry.kind {
                Kind::Owned(owned) => {
                    let borrowers = owned.borrowers();
                    let live = entry.counted() || !borrowers.is_empty();
                    let kept_for_lineage = owned.freed && owned.lineage_count > 0;
                    if !live && !kept_for_lineage {
                        return Err(format!("{object:?} is owned, uncounted, and was not freed"));
                    }
                    for (borrower, _) in borrowers {
                        if !self
                            .borrowed_by
                            .get(borrower)
                            .is_some_and(|objects| objects.contains(object))
                        {
                            return Err(format!("{object:?}: borrower {borrower:?} is not indexed"));
                        }
                    }
                }
                Kind::Borrowed(borrowed) => {
                    let owner = &borrowed.owner;
                    if !entry.counted() {
                        return Err(format!("{object:?} is borrowed and uncounted"));
                    }
                    if !self.owned_by.get(owner).is_some_and(|objects| objects.contains(object)) {
                        return Err(format!("{object:?}: owner {owner:?} is not indexed"));
                    }
                }
            }
        }
        let mut holds: FxHashMap<ObjectId, u32> = FxHashMap::default();
        for (object, ..) in &self.relays {
            *holds.entry(*object).or_default() += 1;
        }
        for (_, objects) in self.return_holds.values() {
            for object in objects {
                *holds.entry(*object).or_default() += 1;
            }
        }
        for (inner, outers) in &self.held_until_registered {
            if !self.is_registering(inner) {
                return Err(format!(
                    "{outers:?} are held for the registration of {inner:?}, which is not under way"
                ));
            }
            for outer in outers {
                *holds.entry(*outer).or_default() += 1;
            }
        }
        for (object, expected) in holds {
            // The shell may have further holds of its own.
            let held = self.entries.get(&object).map_or(0, |entry| entry.holds);
            if held < expected {
                return Err(format!(
                    "{object:?} is held {held} times and {expected} reasons hold it"
                ));
            }
        }
        for (task, acknowledgement) in &self.return_acknowledgements {
            if let Some(object) = acknowledgement
                .waiting
                .iter()
                .find(|object| !self.is_registering(object))
            {
                return Err(format!(
                    "{task:?} waits for the registration of {object:?}, which is not under way"
                ));
            }
        }
        let covers: u32 = self.covered.values().map(|objects| objects.len() as u32).sum();
        if covers != self.cover_counts.values().sum::<u32>() {
            return Err("the covers of running tasks are miscounted".into());
        }
        Ok(())
    }
}
