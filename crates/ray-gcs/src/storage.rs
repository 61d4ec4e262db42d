//! Storage: owns the database file, its schema and the lock that gives the data directory one owner.
//!
//! It refuses a directory that another process owns, and a database of another schema.
//!
//! Invariants:
//! 1. A commit is all or nothing, and what it returned `Ok` for survives the process's death at any instruction
//!    (with `Synchronous::Full` the machine's too).
//! 2. The lock belongs to the open file and is released by the kernel when the process ends, however it ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rusqlite::{params, Connection};

use crate::error::GcsError;
use crate::records::{Mutation, Row, Table};

/// The version of the database's schema.
const SCHEMA_VERSION: i64 = 1;

/// What a commit waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Synchronous {
    /// The operating system has it: it survives the process.
    #[default]
    Normal,
    /// The disk has it: it survives loss of power.
    Full,
}

/// Where the control plane keeps what it must not forget.
pub trait Storage: Send {
    /// Every row.
    fn load(&mut self) -> Result<Vec<Row>, GcsError>;
    /// Applies all mutations in order, or none.
    fn commit(&mut self, mutations: &[Mutation]) -> Result<(), GcsError>;
    /// The storage and what a commit waits for, in words.
    fn description(&self) -> String;
}

/// SQLite in a directory that this process owns.
#[derive(Debug)]
pub struct SqliteStorage {
    connection: Connection,
    synchronous: Synchronous,
    path: PathBuf,
    // Held for the lock on it; after the connection, so that the database is closed first.
    _lock: File,
}

fn failed(action: &'static str) -> impl Fn(rusqlite::Error) -> GcsError {
    move |source| GcsError::Storage { action, source }
}

/// Takes the directory's lock.
fn lock(directory: &Path) -> Result<File, GcsError> {
    let path = directory.join("gcs.lock");
    let at = |action: &'static str| {
        let path = path.clone();
        move |source| GcsError::File { action, path, source }
    };
    // Files opened here are closed on exec, so that no child keeps the lock.
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(at("opening"))?;
    // SAFETY: the descriptor belongs to `file`, which lives across the call.
    let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0;
    if !locked {
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::WouldBlock {
            return Err(at("locking")(error));
        }
        let mut holder = String::new();
        // The holder's name is a courtesy: without it the error stands all the same.
        let _ = file.read_to_string(&mut holder);
        let holder = if holder.trim().is_empty() {
            "unknown".to_string()
        } else {
            holder.trim().to_string()
        };
        return Err(GcsError::DataDirectoryLocked {
            path: directory.to_path_buf(),
            holder,
        });
    }
    file.set_len(0).map_err(at("writing"))?;
    file.seek(SeekFrom::Start(0)).map_err(at("writing"))?;
    writeln!(file, "{}", std::process::id()).map_err(at("writing"))?;
    Ok(file)
}

impl SqliteStorage {
    /// Opens, or makes, the database in `directory` and takes the directory.
    pub fn open(directory: &Path, synchronous: Synchronous) -> Result<Self, GcsError> {
        std::fs::create_dir_all(directory).map_err(|source| GcsError::File {
            action: "making the data directory",
            path: directory.to_path_buf(),
            source,
        })?;
        let lock = lock(directory)?;
        let path = directory.join("gcs.sqlite");
        let connection = Connection::open(&path).map_err(failed("opening the database"))?;
        // With one owner the log needs no shared index beside it.
        let mode = match synchronous {
            Synchronous::Normal => "NORMAL",
            Synchronous::Full => "FULL",
        };
        connection
            .execute_batch(&format!(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = {mode}; \
                 PRAGMA journal_size_limit = 16777216;"
            ))
            .map_err(failed("setting the database up"))?;
        let found: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(failed("reading the schema's version"))?;
        match found {
            0 => connection
                .execute_batch(&format!(
                    "BEGIN; CREATE TABLE rows (table_number INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, \
                     PRIMARY KEY (table_number, key)); PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                ))
                .map_err(failed("making the schema"))?,
            SCHEMA_VERSION => {}
            found => {
                return Err(GcsError::Schema {
                    path,
                    found,
                    expected: SCHEMA_VERSION,
                })
            }
        }
        Ok(Self {
            connection,
            synchronous,
            path,
            _lock: lock,
        })
    }
}

impl Storage for SqliteStorage {
    fn load(&mut self) -> Result<Vec<Row>, GcsError> {
        let action = "reading the rows";
        let mut statement = self
            .connection
            .prepare("SELECT table_number, key, value FROM rows ORDER BY table_number, key")
            .map_err(failed(action))?;
        let read = |row: &rusqlite::Row<'_>| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, Vec<u8>>(1)?,
                row.get::<_, Vec<u8>>(2)?,
            ))
        };
        let rows = statement.query_map([], read).map_err(failed(action))?;
        let mut all = Vec::new();
        for row in rows {
            let (number, key, value) = row.map_err(failed(action))?;
            // A later version's table is none of this one's business.
            if let Some(table) = Table::from_number(number) {
                all.push(Row {
                    table,
                    key: Bytes::from(key),
                    value: Bytes::from(value),
                });
            }
        }
        Ok(all)
    }

    fn commit(&mut self, mutations: &[Mutation]) -> Result<(), GcsError> {
        let action = "committing";
        let transaction = self.connection.transaction().map_err(failed(action))?;
        {
            let mut put = transaction
                .prepare_cached("INSERT OR REPLACE INTO rows (table_number, key, value) VALUES (?1, ?2, ?3)")
                .map_err(failed(action))?;
            let mut delete = transaction
                .prepare_cached("DELETE FROM rows WHERE table_number = ?1 AND key = ?2")
                .map_err(failed(action))?;
            for mutation in mutations {
                let (table, key) = (mutation.table as i64, mutation.key.as_ref());
                match &mutation.value {
                    Some(value) => put
                        .execute(params![table, key, value.as_ref()])
                        .map_err(failed(action))?,
                    None => delete.execute(params![table, key]).map_err(failed(action))?,
                };
            }
        }
        transaction.commit().map_err(failed(action))
    }

    fn description(&self) -> String {
        let survives = match self.synchronous {
            Synchronous::Normal => "survives the process",
            Synchronous::Full => "survives loss of power",
        };
        format!(
            "SQLite at {}, where what is acknowledged {survives}",
            self.path.display()
        )
    }
}
