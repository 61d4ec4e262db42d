//! Storage: commits, reopening, the lock, the schema.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use ray_gcs::{GcsError, Mutation, SqliteStorage, Storage, Synchronous, Table};

/// A directory that goes with the test.
pub struct TestDirectory(pub PathBuf);

impl TestDirectory {
    pub fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("gcs-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TestDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn put(table: Table, key: &str, value: &str) -> Mutation {
    Mutation {
        table,
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Some(Bytes::copy_from_slice(value.as_bytes())),
    }
}

fn delete(table: Table, key: &str) -> Mutation {
    Mutation {
        table,
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: None,
    }
}

#[test]
fn what_was_committed_is_there_again() {
    for synchronous in [Synchronous::Normal, Synchronous::Full] {
        let directory = TestDirectory::new("rows");
        let mut storage = SqliteStorage::open(&directory.0, synchronous).unwrap();
        storage
            .commit(&[
                put(Table::Jobs, "a", "1"),
                put(Table::KeyValue, "a", "2"),
                put(Table::Jobs, "b", "3"),
            ])
            .unwrap();
        storage
            .commit(&[
                put(Table::Jobs, "a", "4"),
                delete(Table::Jobs, "b"),
                delete(Table::Jobs, "c"),
            ])
            .unwrap();
        assert!(storage.description().contains("SQLite"));
        drop(storage);
        let mut storage = SqliteStorage::open(&directory.0, synchronous).unwrap();
        let rows = storage.load().unwrap();
        let rows: Vec<_> = rows
            .iter()
            .map(|row| (row.table, row.key.as_ref(), row.value.as_ref()))
            .collect();
        assert_eq!(
            rows,
            [
                (Table::Jobs, &b"a"[..], &b"4"[..]),
                (Table::KeyValue, &b"a"[..], &b"2"[..])
            ]
        );
    }
}

#[test]
fn a_directory_has_one_owner_and_the_error_names_it() {
    let directory = TestDirectory::new("lock");
    let storage = SqliteStorage::open(&directory.0, Synchronous::Normal).unwrap();
    let error = SqliteStorage::open(&directory.0, Synchronous::Normal).unwrap_err();
    assert!(matches!(error, GcsError::DataDirectoryLocked { .. }));
    let text = error.to_string();
    assert!(
        text.contains(&directory.0.display().to_string()) && text.contains(&std::process::id().to_string()),
        "{text}"
    );
    drop(storage);
    SqliteStorage::open(&directory.0, Synchronous::Normal).unwrap();
}

#[test]
fn a_child_process_does_not_keep_the_lock() {
    let directory = TestDirectory::new("child");
    let storage = SqliteStorage::open(&directory.0, Synchronous::Normal).unwrap();
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    drop(storage);
    let again = SqliteStorage::open(&directory.0, Synchronous::Normal);
    child.kill().unwrap();
    child.wait().unwrap();
    again.unwrap();
}

#[test]
fn another_schema_is_refused() {
    let directory = TestDirectory::new("schema");
    drop(SqliteStorage::open(&directory.0, Synchronous::Normal).unwrap());
    let connection = rusqlite::Connection::open(directory.0.join("gcs.sqlite")).unwrap();
    connection.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(connection);
    let error = SqliteStorage::open(&directory.0, Synchronous::Normal)
        .unwrap_err()
        .to_string();
    assert!(error.contains("99"), "{error}");
}

#[test]
fn a_file_that_is_no_database_is_an_error_and_not_a_new_beginning() {
    let directory = TestDirectory::new("garbage");
    std::fs::write(directory.0.join("gcs.sqlite"), vec![0x5a; 8192]).unwrap();
    assert!(matches!(
        SqliteStorage::open(&directory.0, Synchronous::Normal),
        Err(GcsError::Storage { .. })
    ));
}
