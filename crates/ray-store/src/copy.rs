//! Work on big ranges: owns the choice of how many threads move bytes or fault pages in.
//!
//! It refuses to start threads where the machine has no core to spare or the copy is short.
//!
//! Invariants:
//! 1. Each byte is copied once; the threads' parts are disjoint.

use std::num::NonZeroUsize;

/// Copies shorter than this stay on the caller's thread.
pub const PARALLEL_COPY_BYTES: usize = 8 << 20;
/// Longer copies go around the caches, which they would only flush.
const STREAM_BYTES: usize = 8 << 20;
const MAX_COPY_THREADS: usize = 4;

/// Copies `source` into `destination`, which must be as long, with several threads where that is faster.
///
/// # Panics
/// Where the lengths differ, as `copy_from_slice` does.
pub fn copy_into(destination: &mut [u8], source: &[u8]) {
    copy_with_threads(destination, source, threads_for(source.len()));
}

/// How many threads a range of so many bytes is worth.
pub(crate) fn threads_for(bytes: usize) -> usize {
    if bytes < PARALLEL_COPY_BYTES {
        1
    } else {
        idle_cores().min(MAX_COPY_THREADS)
    }
}

fn copy_with_threads(destination: &mut [u8], source: &[u8], threads: usize) {
    assert_eq!(
        destination.len(),
        source.len(),
        "source and destination have the same length"
    );
    let copy_part = if source.len() > STREAM_BYTES {
        crate::stream::copy
    } else {
        <[u8]>::copy_from_slice
    };
    if threads <= 1 {
        copy_part(destination, source);
        return;
    }
    // Whole pages, so that two threads never fault in the same one.
    let part = source.len().div_ceil(threads).next_multiple_of(4096);
    let all_started = std::thread::scope(|scope| {
        let mut parts = destination.chunks_mut(part).zip(source.chunks(part));
        let own = parts.next();
        for (to, from) in parts {
            let copy = move || copy_part(to, from);
            if std::thread::Builder::new()
                .name("store-copy".into())
                .spawn_scoped(scope, copy)
                .is_err()
            {
                return false;
            }
        }
        if let Some((to, from)) = own {
            copy_part(to, from);
        }
        true
    });
    if !all_started {
        // The part whose thread could not be started went with its closure, so the whole is copied here.
        copy_part(destination, source);
    }
}

/// How many cores are free for this process, counting the one it runs on.
fn idle_cores() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    if cores == 1 {
        return 1;
    }
    // The fourth field is "runnable/total", and the caller is one of the runnable. The file is only read before copies
    // that take a millisecond or more.
    let runnable = std::fs::read_to_string("/proc/loadavg").ok().and_then(|text| {
        let field = text.split(' ').nth(3)?.split('/').next()?;
        field.parse::<usize>().ok()
    });
    (cores + 1).saturating_sub(runnable.unwrap_or(1)).clamp(1, cores)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives_with_any_number_of_threads() {
        let source: Vec<u8> = (0..1_000_003_u32).map(|n| (n % 251) as u8).collect();
        for threads in 1..5 {
            let mut destination = vec![0; source.len()];
            copy_with_threads(&mut destination, &source, threads);
            assert_eq!(destination, source);
        }
        assert!(idle_cores() >= 1);
        let big = vec![3; PARALLEL_COPY_BYTES + 17];
        let mut destination = vec![0; big.len()];
        copy_into(&mut destination, &big);
        assert_eq!(destination, big);
    }
}
