//! The thread that writes and reads spill files, so that no handler waits for a disk.
//!
//! A file is a sequence of records, each a header of 64 bytes (magic, object, length, checksum, metadata) and the
//! object. A file that could not be written whole is removed, with the reason; a record that does not match its header
//! or its checksum is refused by name.
//!
//! Invariants:
//! 1. A file that is reported as written is complete; of one that is not, nothing is left.
//! 2. Jobs are done in the order of asking.

use super::config::RayletError;
use crate::spill::{checksum, FileId, Location};
use ray_ids::ObjectId;
use ray_rpc::Reactor;
use ray_store::{LocalBuffer, StoredObject};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;

const RECORD_HEADER_BYTES: u64 = 64;
const MAGIC: [u8; 8] = *b"HELISPL1";

enum Job {
    Write {
        file: FileId,
        objects: Vec<(ObjectId, StoredObject)>,
    },
    Read {
        object: ObjectId,
        location: Location,
        buffer: LocalBuffer,
    },
    Prepare {
        object: ObjectId,
        buffer: LocalBuffer,
    },
    Remove(FileId),
}

/// What the thread did.
pub enum Done {
    Written {
        file: FileId,
        results: Vec<(ObjectId, Location)>,
        error: Option<String>,
    },
    Read {
        object: ObjectId,
        location: Location,
        buffer: LocalBuffer,
        error: Option<String>,
    },
    /// The buffer's pages have their memory, or there is none.
    Prepared {
        object: ObjectId,
        buffer: LocalBuffer,
        error: Option<String>,
    },
}

/// The thread and its directory.
pub struct Spiller {
    directory: PathBuf,
    jobs: Option<Sender<Job>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    stopping: Arc<AtomicBool>,
}

fn path_of(directory: &Path, file: FileId) -> PathBuf {
    directory.join(format!("spill-{file:06}"))
}

impl Spiller {
    /// Starts the thread. What an earlier raylet left in the directory is removed.
    pub fn start(directory: &Path, reactor: Arc<Reactor>) -> Result<Self, RayletError> {
        let fail = |error| RayletError::io(format!("make {}", directory.display()), error);
        let _ = std::fs::remove_dir_all(directory);
        std::fs::create_dir_all(directory).map_err(fail)?;
        let (jobs, todo) = std::sync::mpsc::channel();
        let (finished, done) = std::sync::mpsc::channel();
        let at = directory.to_path_buf();
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = stopping.clone();
        let thread = std::thread::Builder::new()
            .name("spill".into())
            .spawn(move || work(&at, &todo, &finished, &reactor, &stop))
            .map_err(|error| RayletError::io("start the spill thread", error))?;
        Ok(Self {
            directory: directory.to_path_buf(),
            jobs: Some(jobs),
            done,
            thread: Some(thread),
            stopping,
        })
    }

    fn ask(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread only ends after this sender is gone.
            let _ = jobs.send(job);
        }
    }

    /// Has objects written to a file.
    pub fn write(&self, file: FileId, objects: Vec<(ObjectId, StoredObject)>) {
        self.ask(Job::Write { file, objects });
    }

    /// Has an object read.
    pub fn read(&self, object: ObjectId, location: Location, buffer: LocalBuffer) {
        self.ask(Job::Read {
            object,
            location,
            buffer,
        });
    }

    /// Has the pages of a big buffer given their memory, which takes long.
    pub fn prepare(&self, object: ObjectId, buffer: LocalBuffer) {
        self.ask(Job::Prepare { object, buffer });
    }

    /// Has a file removed.
    pub fn remove(&self, file: FileId) {
        self.ask(Job::Remove(file));
    }

    /// What was done since the last call.
    pub fn take_done(&self) -> Vec<Done> {
        self.done.try_iter().collect()
    }
}

impl Spiller {
    /// Ends the thread, once its current job is done, and removes every file.
    pub fn stop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
        if let Some(parent) = self.directory.parent() {
            // Other nodes of the session may have theirs there: then it is not empty and stays.
            let _ = std::fs::remove_dir(parent);
        }
    }
}

fn work(directory: &Path, todo: &Receiver<Job>, finished: &Sender<Done>, reactor: &Reactor, stop: &AtomicBool) {
    while let Ok(job) = todo.recv() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let done = match job {
            Job::Write { file, objects } => {
                let path = path_of(directory, file);
                match write_file(&path, file, &objects) {
                    Ok(results) => Done::Written {
                        file,
                        results,
                        error: None,
                    },
                    Err(error) => {
                        let _ = std::fs::remove_file(&path);
                        let error = Some(format!("{} could not be written: {error}", path.display()));
                        Done::Written {
                            file,
                            results: Vec::new(),
                            error,
                        }
                    }
                }
            }
            Job::Read {
                object,
                location,
                mut buffer,
            } => {
                let path = path_of(directory, location.file);
                let error = read_object(&path, &object, &location, &mut buffer).err();
                let error =
                    error.map(|error| format!("{object} could not be restored from {}: {error}", path.display()));
                Done::Read {
                    object,
                    location,
                    buffer,
                    error,
                }
            }
            Job::Prepare { object, mut buffer } => {
                let error = buffer.writable().err().map(|error| error.to_string());
                Done::Prepared { object, buffer, error }
            }
            Job::Remove(file) => {
                let _ = std::fs::remove_file(path_of(directory, file));
                continue;
            }
        };
        if finished.send(done).is_err() {
            return;
        }
        reactor.wake();
    }
}

fn record_header(object: &ObjectId, location: &Location) -> [u8; RECORD_HEADER_BYTES as usize] {
    let mut header = [0; RECORD_HEADER_BYTES as usize];
    header[..8].copy_from_slice(&MAGIC);
    header[8..36].copy_from_slice(object.as_bytes());
    header[36..44].copy_from_slice(&location.length.to_le_bytes());
    header[44..52].copy_from_slice(&location.checksum.to_le_bytes());
    header[52..56].copy_from_slice(&location.metadata.to_le_bytes());
    header
}

fn write_file(
    path: &Path,
    file: FileId,
    objects: &[(ObjectId, StoredObject)],
) -> std::io::Result<Vec<(ObjectId, Location)>> {
    let mut target = File::options().write(true).create_new(true).open(path)?;
    let mut results = Vec::with_capacity(objects.len());
    for (object, bytes) in objects {
        let offset = target.stream_position()?;
        let location = Location {
            file,
            offset,
            length: bytes.len() as u64,
            checksum: checksum(bytes),
            metadata: bytes.metadata(),
        };
        target.write_all(&record_header(object, &location))?;
        target.write_all(bytes)?;
        results.push((*object, location));
    }
    // Not fsynced: what is spilled need not outlive the machine. Yet a full disk may show late, so the length is checked.
    let expected = target.seek(SeekFrom::End(0))?;
    if target.metadata()?.len() != expected {
        return Err(std::io::Error::other("the file is shorter than what was written"));
    }
    Ok(results)
}

fn read_object(path: &Path, object: &ObjectId, location: &Location, buffer: &mut LocalBuffer) -> std::io::Result<()> {
    let source = File::open(path)?;
    let mut header = [0; RECORD_HEADER_BYTES as usize];
    source.read_exact_at(&mut header, location.offset)?;
    if header != record_header(object, location) {
        return Err(std::io::Error::other("its record's header is damaged"));
    }
    let bytes = buffer.writable().map_err(std::io::Error::other)?;
    source.read_exact_at(bytes, location.offset + RECORD_HEADER_BYTES)?;
    if checksum(bytes) != location.checksum {
        return Err(std::io::Error::other("its bytes are damaged: the checksum differs"));
    }
    Ok(())
}
