//! Objects on disk: owns in which file each spilled object lies, which files are still needed, and what each object's
//! owner is.
//!
//! Small objects are fused into one file; a file goes when the last object in it is freed. It does no input or output.
//!
//! Invariants:
//! 1. A file has as many live objects as there are locations in it; one without any, that is not being written, is gone.
//! 2. An object is being written, on disk, or neither.

use ray_ids::ObjectId;
use std::collections::{BTreeMap, BTreeSet};

/// Names a spill file.
pub type FileId = u64;

/// Where a spilled object lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub file: FileId,
    /// Where its record starts.
    pub offset: u64,
    /// Length of the object.
    pub length: u64,
    pub checksum: u64,
    pub metadata: u32,
}

/// What is on disk.
#[derive(Debug, Default)]
pub struct SpillIndex {
    next_file: FileId,
    /// Files with the objects that are live in them.
    files: BTreeMap<FileId, BTreeSet<ObjectId>>,
    /// Files that are being written, with what is written and still wanted.
    writing: BTreeMap<FileId, BTreeSet<ObjectId>>,
    locations: BTreeMap<ObjectId, Location>,
    bytes: u64,
}

impl SpillIndex {
    /// Where an object is on disk.
    pub fn location(&self, object: &ObjectId) -> Option<Location> {
        self.locations.get(object).copied()
    }

    /// Whether an object is being written.
    pub fn is_writing(&self, object: &ObjectId) -> bool {
        self.writing.values().any(|objects| objects.contains(object))
    }

    /// Whether any file is being written.
    pub fn is_busy(&self) -> bool {
        !self.writing.is_empty()
    }

    /// Objects and bytes on disk.
    pub fn totals(&self) -> (usize, u64) {
        (self.locations.len(), self.bytes)
    }

    /// Every object on disk.
    pub fn objects(&self) -> impl Iterator<Item = (&ObjectId, &Location)> {
        self.locations.iter()
    }

    /// Begins a file with these objects; those on disk or being written already are left out. `None` if none is left.
    pub fn begin(&mut self, objects: &[ObjectId]) -> Option<(FileId, Vec<ObjectId>)> {
        let fresh = |object: &&ObjectId| !self.locations.contains_key(object) && !self.is_writing(object);
        let chosen: Vec<ObjectId> = objects.iter().filter(fresh).copied().collect();
        if chosen.is_empty() {
            return None;
        }
        self.next_file += 1;
        self.writing.insert(self.next_file, chosen.iter().copied().collect());
        Some((self.next_file, chosen))
    }

    /// A file was written. Answers with the objects that are on disk now, and whether the file must go, because all that
    /// is in it was freed meanwhile or nothing was written.
    pub fn written(&mut self, file: FileId, results: Vec<(ObjectId, Location)>) -> (Vec<ObjectId>, bool) {
        let wanted = self.writing.remove(&file).unwrap_or_default();
        let mut live = BTreeSet::new();
        for (object, location) in results {
            if wanted.contains(&object) {
                self.bytes += location.length;
                self.locations.insert(object, location);
                live.insert(object);
            }
        }
        let done: Vec<ObjectId> = live.iter().copied().collect();
        if live.is_empty() {
            return (done, true);
        }
        self.files.insert(file, live);
        (done, false)
    }

    /// An object's owner let go of it. Answers with the file that must go.
    pub fn free(&mut self, object: &ObjectId) -> Option<FileId> {
        for objects in self.writing.values_mut() {
            objects.remove(object);
        }
        let location = self.locations.remove(object)?;
        self.bytes -= location.length;
        let live = self.files.get_mut(&location.file)?;
        live.remove(object);
        if live.is_empty() {
            self.files.remove(&location.file);
            return Some(location.file);
        }
        None
    }

    /// Checks the invariants.
    pub fn validate(&self) -> Result<(), String> {
        let mut counted = 0;
        for (file, live) in &self.files {
            if live.is_empty() || self.writing.contains_key(file) {
                return Err(format!("spill file {file} has nothing live, or is written still"));
            }
            counted += live.len();
            if live
                .iter()
                .any(|object| self.locations.get(object).is_none_or(|location| location.file != *file))
            {
                return Err(format!("spill file {file} has an object whose place is elsewhere"));
            }
        }
        if counted != self.locations.len() {
            return Err(format!(
                "{} objects are on disk and files hold {counted}",
                self.locations.len()
            ));
        }
        if self.bytes != self.locations.values().map(|location| location.length).sum::<u64>() {
            return Err("the bytes on disk are counted wrongly".into());
        }
        Ok(())
    }
}

/// A checksum that finds truncated, torn and flipped bytes; it is no defence against an attacker.
pub fn checksum(bytes: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    // Four lanes, so that one multiplication need not wait for the last.
    let mut lanes = [
        FACTOR,
        FACTOR.rotate_left(17),
        FACTOR.rotate_left(31),
        FACTOR.rotate_left(47),
    ];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            let word = u64::from_le_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]]);
            *lane = (*lane ^ word).wrapping_mul(FACTOR).rotate_left(29);
        }
    }
    let mut sum = bytes.len() as u64;
    for byte in blocks.remainder() {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(FACTOR).rotate_left(13);
    }
    for lane in lanes {
        sum = (sum ^ lane).wrapping_mul(FACTOR).rotate_left(31);
    }
    sum ^ (sum >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(file: FileId, length: u64) -> Location {
        Location {
            file,
            offset: 0,
            length,
            checksum: 0,
            metadata: 0,
        }
    }

    #[test]
    fn a_file_goes_with_its_last_object() {
        let mut index = SpillIndex::default();
        let objects: Vec<ObjectId> = (0..3).map(|_| ObjectId::from_random()).collect();
        let (file, chosen) = index.begin(&objects).unwrap();
        assert_eq!(chosen.len(), 3);
        assert!(index.begin(&objects).is_none());
        index.free(&objects[0]);
        let results = objects.iter().map(|object| (*object, place(file, 10))).collect();
        let (done, gone) = index.written(file, results);
        assert_eq!((done.len(), gone), (2, false));
        index.validate().unwrap();
        assert_eq!(index.totals(), (2, 20));
        assert_eq!(index.free(&objects[1]), None);
        assert_eq!(index.free(&objects[2]), Some(file));
        index.validate().unwrap();
        let (file, _) = index.begin(&objects).unwrap();
        assert_eq!(index.written(file, vec![]), (vec![], true));
        index.validate().unwrap();
    }

    #[test]
    fn a_checksum_sees_every_byte() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1_003).collect();
        let whole = checksum(&bytes);
        for at in [0, 31, 32, 500, 1_002] {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_ne!(checksum(&changed), whole, "byte {at}");
        }
        assert_ne!(checksum(&bytes[..1_002]), whole);
    }
}
