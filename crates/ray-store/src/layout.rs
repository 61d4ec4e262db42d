//! The mapping's layout: owns where each part of the file lies, computed from three numbers in its first words.
//!
//! It refuses a file of another format, version, or size.
//!
//! ```text
//! header   1 page: magic, version, number of client areas, entries of the index, bytes of the data area
//! index    entries of 64 bytes
//! clients  areas of CLIENT_STRIDE_BYTES: control page, publication ring, pin words (reserved page by page)
//! data     objects and lent extents, from a multiple of 2 MiB
//! ```
//!
//! Invariants:
//! 1. The layout is a function of the three numbers alone, so both sides of the file agree on it.
//! 2. Words that different parties write often lie in different cache lines.

use crate::StoreError;

/// First word of the file.
pub const MAGIC: u64 = u64::from_le_bytes(*b"HELIOSHM");
/// Second word: raised whenever the layout or a protocol changes.
pub const VERSION: u64 = 1;
/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// Bytes of a word.
pub const WORD_BYTES: u64 = 8;

/// Words of a record in the publication ring.
pub const PUBLICATION_WORDS: usize = 8;
/// Records in a publication ring.
pub const PUBLICATION_RECORDS: u64 = 256;
/// Words of a record in the ring of returned memory.
pub const RETURN_WORDS: usize = 2;
/// Records in the ring of returned memory.
pub const RETURN_RECORDS: u64 = 128;
/// How many different objects one client can pin.
pub const MAX_PINS: u64 = 32 * 1024;
/// Pin words in a page.
pub const PINS_A_PAGE: u64 = PAGE_BYTES / WORD_BYTES;

/// Word offsets in a client's control page; a cache line each.
pub mod control {
    /// Generation of the slot's present holder, zero for none. Server.
    pub const GENERATION: u64 = 0;
    /// Publication ring's tail. Client.
    pub const PUBLISHED_TAIL: u64 = 8;
    /// Publication ring's head. Server.
    pub const PUBLISHED_HEAD: u64 = 16;
    /// Returned memory's tail. Server.
    pub const RETURNED_TAIL: u64 = 24;
    /// Returned memory's head. Client.
    pub const RETURNED_HEAD: u64 = 32;
    /// How many pin words may be in use. Client.
    pub const PIN_HIGH: u64 = 40;
    /// Bytes of objects that are being created. Client; advice for the ledger.
    pub const CREATING: u64 = 41;
    /// How many words of the page are cleared between two holders.
    pub const WORDS: u64 = 512;
    /// Records of returned memory.
    pub const RETURNED_RECORDS: u64 = 128;
}

const RING_BYTES: u64 = PUBLICATION_RECORDS * PUBLICATION_WORDS as u64 * WORD_BYTES;
/// Bytes of a client's area.
pub const CLIENT_STRIDE_BYTES: u64 = PAGE_BYTES + RING_BYTES + MAX_PINS * WORD_BYTES;
/// Bytes of a client's area that are reserved when it registers: all but the later pages of pin words.
pub const CLIENT_FIRST_BYTES: u64 = PAGE_BYTES + RING_BYTES + PAGE_BYTES;

/// Where everything lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Client areas.
    pub max_clients: u64,
    /// Entries of the index, a power of two.
    pub index_entries: u64,
    /// Bytes of the data area.
    pub data_bytes: u64,
}

impl Geometry {
    /// The geometry for these limits; the index gets at least twice as many entries as there may be objects.
    pub fn for_limits(capacity_bytes: u64, max_clients: u32, max_objects: u32) -> Result<Self, StoreError> {
        let data_bytes = capacity_bytes / PAGE_BYTES * PAGE_BYTES;
        if data_bytes == 0 || max_clients == 0 || max_objects == 0 {
            return Err(StoreError::BadConfig(
                "capacity (at least a page), clients and objects must not be zero",
            ));
        }
        if data_bytes > 1 << 46 || max_objects > 1 << 28 || max_clients > 1 << 16 {
            return Err(StoreError::BadConfig("at most 64 TiB, 2^28 objects and 65536 clients"));
        }
        let index_entries = (u64::from(max_objects) * 2).next_power_of_two().max(64);
        Ok(Self {
            max_clients: u64::from(max_clients),
            index_entries,
            data_bytes,
        })
    }

    /// The first words of the file.
    pub fn header(&self) -> [u64; 5] {
        [MAGIC, VERSION, self.max_clients, self.index_entries, self.data_bytes]
    }

    /// The geometry that a file's first words tell.
    pub fn from_header(words: [u64; 5], file_bytes: u64) -> Result<Self, StoreError> {
        let [magic, version, max_clients, index_entries, data_bytes] = words;
        if magic != MAGIC {
            return Err(StoreError::BadFile {
                reason: "it does not start with an object store's magic".into(),
            });
        }
        if version != VERSION {
            return Err(StoreError::BadFile {
                reason: format!("its version is {version}, this program's {VERSION}"),
            });
        }
        let plausible = index_entries.is_power_of_two()
            && index_entries <= 1 << 30
            && (1..=1 << 16).contains(&max_clients)
            && (PAGE_BYTES..=1 << 46).contains(&data_bytes);
        let geometry = Self {
            max_clients,
            index_entries,
            data_bytes,
        };
        if !plausible || geometry.file_bytes() != file_bytes {
            return Err(StoreError::BadFile {
                reason: format!("its {file_bytes} bytes do not fit its header"),
            });
        }
        Ok(geometry)
    }

    /// Where the index starts.
    pub fn index_offset(&self) -> u64 {
        PAGE_BYTES
    }

    /// Bytes of the index.
    pub fn index_bytes(&self) -> u64 {
        self.index_entries * crate::index::ENTRY_WORDS as u64 * WORD_BYTES
    }

    /// Where this client's area starts.
    pub fn client_offset(&self, number: u32) -> u64 {
        self.index_offset() + self.index_bytes() + u64::from(number) * CLIENT_STRIDE_BYTES
    }

    /// Where this client's publication ring starts.
    pub fn ring_offset(&self, number: u32) -> u64 {
        self.client_offset(number) + PAGE_BYTES
    }

    /// Where this client's pin words start.
    pub fn pins_offset(&self, number: u32) -> u64 {
        self.ring_offset(number) + RING_BYTES
    }

    /// Where the data area starts.
    pub fn data_offset(&self) -> u64 {
        const ALIGNMENT: u64 = 2 << 20;
        (self.index_offset() + self.index_bytes() + self.max_clients * CLIENT_STRIDE_BYTES).next_multiple_of(ALIGNMENT)
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.data_offset() + self.data_bytes
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_the_header_round_trips() {
        let geometry = Geometry::for_limits(1 << 24, 3, 1000).unwrap();
        assert_eq!(geometry.index_entries, 2048);
        assert_eq!(
            geometry.client_offset(0),
            geometry.index_offset() + geometry.index_bytes()
        );
        assert_eq!(
            geometry.client_offset(1) - geometry.client_offset(0),
            CLIENT_STRIDE_BYTES
        );
        assert_eq!(
            geometry.pins_offset(0) + MAX_PINS * WORD_BYTES,
            geometry.client_offset(1)
        );
        assert!(geometry.data_offset() >= geometry.client_offset(3));
        assert_eq!(
            Geometry::from_header(geometry.header(), geometry.file_bytes()).unwrap(),
            geometry
        );
        let returned = control::RETURNED_RECORDS + RETURN_RECORDS * RETURN_WORDS as u64;
        assert!(returned * WORD_BYTES <= PAGE_BYTES);
    }

    #[test]
    fn foreign_files_are_refused_with_the_reason() {
        let geometry = Geometry::for_limits(1 << 24, 3, 1000).unwrap();
        let mut words = geometry.header();
        words[1] = 99;
        let error = Geometry::from_header(words, geometry.file_bytes()).unwrap_err();
        assert!(error.to_string().contains("version is 99"), "{error}");
        assert!(Geometry::from_header([0; 5], 0).is_err());
        assert!(Geometry::from_header(geometry.header(), 4096).is_err());
        assert!(Geometry::for_limits(0, 1, 1).is_err());
    }
}
