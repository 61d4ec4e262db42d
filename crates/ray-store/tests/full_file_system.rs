//! A file system that is smaller than the store: every shortage is an error, and never a signal.
//!
//! The test starts itself again in a mount namespace of its own, where it can mount a small tmpfs.
#![cfg(not(loom))]

use std::ffi::{CStr, CString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ray_ids::{ObjectId, WorkerId};
use ray_store::{LocalPurpose, StoreClient, StoreConfig, StoreError, StoreServer};

const CHILD: &str = "RAY_STORE_TEST_SMALL_DIRECTORY";
const FILE_SYSTEM_BYTES: u64 = 24 << 20;
/// Exit status of a child that could not mount.
const CANNOT_MOUNT: i32 = 77;

fn object(number: u64) -> ObjectId {
    let mut bytes = [6; 28];
    bytes[20..].copy_from_slice(&number.to_le_bytes());
    ObjectId::from_array(bytes)
}

fn put(server: &mut StoreServer, client: &StoreClient, number: u64, size: u64) -> Result<(), StoreError> {
    let mut writer = loop {
        match client.create(object(number), size) {
            Err(StoreError::NeedExtent { bytes }) => {
                let extent = server.lend_extent(client.slot(), bytes)?;
                if let Err(error) = client.add_extent(extent) {
                    server.give_back(client.slot(), extent)?;
                    return Err(error);
                }
            }
            other => break other?,
        }
    };
    writer.as_mut_slice().fill(number as u8);
    writer.seal(0).map_err(|unsealed| unsealed.reason)?;
    server.drain_rings();
    Ok(())
}

/// Puts until there is no memory, and tells how many it were.
fn put_until_full(server: &mut StoreServer, client: &StoreClient, first: u64, size: u64) -> u64 {
    for number in first.. {
        match put(server, client, number, size) {
            Ok(()) => {}
            Err(StoreError::NoMemory { .. }) => return number - first,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!("some put fails");
}

fn scenario(directory: &Path) {
    let config = |name: &str, capacity_bytes, max_objects| StoreConfig {
        path: directory.join(name),
        capacity_bytes,
        max_clients: 8,
        max_objects,
    };
    // Not even the index has room; nothing is left behind.
    let refused = StoreServer::create(config("huge", 64 << 20, 1 << 20));
    assert!(matches!(refused, Err(StoreError::NoMemory { .. })));
    assert_eq!(std::fs::read_dir(directory).unwrap().count(), 0);

    let mut server = StoreServer::create(config("store", 64 << 20, 1000)).unwrap();
    let slot = server.register_client(WorkerId::from_random()).unwrap();
    let client = StoreClient::attach(server.path(), slot).unwrap();
    let small = put_until_full(&mut server, &client, 0, 300_000);
    assert!((40..100).contains(&small), "{small} small objects fit");
    let mut buffer = server
        .create_local(object(9999), 20 << 20, LocalPurpose::Restore)
        .unwrap();
    assert!(matches!(buffer.writable(), Err(StoreError::NoMemory { .. })));
    assert!(buffer.readable().is_empty());
    server.abort(buffer);
    server.validate().unwrap();

    let all: Vec<ObjectId> = (0..small).map(object).collect();
    server.delete_many(&all);
    let again = put_until_full(&mut server, &client, 0, 300_000);
    assert!(again >= small, "{again} of {small} objects fit again");
    server.delete_many(&all);
    server.delete_many(&(0..again).map(object).collect::<Vec<_>>());
    for extent in client.unused(u64::MAX) {
        server.give_back(slot, extent).unwrap();
    }
    server.trim(u64::MAX).unwrap();

    let big = put_until_full(&mut server, &client, 5000, 6 << 20);
    assert!((2..4).contains(&big), "{big} big objects fit");
    assert!(matches!(
        put(&mut server, &client, 6000, 40 << 20),
        Err(StoreError::NoMemory { .. })
    ));
    server.validate().unwrap();
    // What failed took no memory away: one more small object fits.
    put(&mut server, &client, 7000, 100_000).unwrap();
    let registered = (0..7)
        .map(|_| server.register_client(WorkerId::from_random()).is_ok())
        .filter(|ok| *ok)
        .count();
    assert!(registered > 0);
    server.validate().unwrap();
}

/// Does nothing unless it was started by the test below.
#[test]
fn child_process() {
    if let Some(directory) = std::env::var_os(CHILD) {
        scenario(&PathBuf::from(directory));
    }
}

fn write_file(path: &CStr, text: &CStr) -> bool {
    // SAFETY: open, write and close take valid strings and a descriptor of this very function.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY);
        let length = text.to_bytes().len();
        let written = libc::write(file, text.as_ptr().cast(), length);
        libc::close(file);
        written == length as isize
    }
}

#[test]
fn a_full_file_system_is_an_error() {
    let directory = std::env::temp_dir().join(format!("ray-store-small-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let target = CString::new(directory.to_str().unwrap()).unwrap();
    let options = CString::new(format!("size={FILE_SYSTEM_BYTES},mode=0700")).unwrap();
    // SAFETY: it cannot fail.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let user_map = CString::new(format!("{user} {user} 1")).unwrap();
    let group_map = CString::new(format!("{group} {group} 1")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child_process", "--test-threads=1"])
        .env(CHILD, &directory);
    let mount = move || {
        // SAFETY: only system calls with valid strings, between fork and exec.
        unsafe {
            if libc::unshare(libc::CLONE_NEWNS) != 0 {
                let mapped = libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) == 0
                    && write_file(c"/proc/self/setgroups", c"deny")
                    && write_file(c"/proc/self/uid_map", &user_map)
                    && write_file(c"/proc/self/gid_map", &group_map);
                if !mapped {
                    libc::_exit(CANNOT_MOUNT);
                }
            }
            let none = std::ptr::null();
            let private = libc::MS_REC | libc::MS_PRIVATE;
            if libc::mount(none, c"/".as_ptr(), none, private, none.cast()) != 0
                || libc::mount(
                    c"tmpfs".as_ptr(),
                    target.as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    options.as_ptr().cast(),
                ) != 0
            {
                libc::_exit(CANNOT_MOUNT);
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes only system calls that are allowed between fork and exec.
    unsafe { command.pre_exec(mount) };
    let output = command.output().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    if output.status.code() == Some(CANNOT_MOUNT) {
        eprintln!("skipped: this system does not let the test mount a file system");
        return;
    }
    assert!(
        output.status.success(),
        "{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
}
