//! Copies around the caches: owns the loop that big copies run.
//!
//! It refuses nothing: where the processor has no such stores, it is an ordinary copy.
//!
//! Invariants:
//! 1. Every byte is written exactly once, and is visible to other processors before the copy returns.
//!
//! An ordinary store first reads the line that it overwrites, so a copy moves three bytes a byte; a streaming store moves
//! two, and leaves in the caches what was there. The C library's `memmove` does that too from some size on, but there
//! walks several pages at once, which on processors with little memory-level parallelism a core is half as fast as one
//! straight line (measured: 3.3 against 7.7 GB/s for 400 MB).

/// Copies `source` into `destination`, which must be as long.
pub(crate) fn copy(destination: &mut [u8], source: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has the instructions.
        unsafe { x86::copy(destination, source) };
        return;
    }
    destination.copy_from_slice(source);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_stream_si256, _mm_sfence};

    const LINE_BYTES: usize = 64;
    const BLOCK_BYTES: usize = 2 * LINE_BYTES;

    /// # Safety
    /// The processor must have AVX.
    #[target_feature(enable = "avx")]
    pub unsafe fn copy(destination: &mut [u8], source: &[u8]) {
        assert_eq!(
            destination.len(),
            source.len(),
            "source and destination have the same length"
        );
        let head = destination.as_ptr().align_offset(LINE_BYTES).min(source.len());
        let (to_head, to) = destination.split_at_mut(head);
        let (from_head, from) = source.split_at(head);
        to_head.copy_from_slice(from_head);
        let (mut to, mut from) = (to.chunks_exact_mut(BLOCK_BYTES), from.chunks_exact(BLOCK_BYTES));
        for (to, from) in (&mut to).zip(&mut from) {
            let to = to.as_mut_ptr().cast::<__m256i>();
            let from = from.as_ptr().cast::<__m256i>();
            // SAFETY: both blocks have four vectors, and the destination's start on a line, as the head was copied and
            // blocks are whole lines.
            unsafe {
                let first = _mm256_loadu_si256(from);
                let second = _mm256_loadu_si256(from.add(1));
                let third = _mm256_loadu_si256(from.add(2));
                let fourth = _mm256_loadu_si256(from.add(3));
                _mm256_stream_si256(to, first);
                _mm256_stream_si256(to.add(1), second);
                _mm256_stream_si256(to.add(2), third);
                _mm256_stream_si256(to.add(3), fourth);
            }
        }
        to.into_remainder().copy_from_slice(from.remainder());
        // Streaming stores are not ordered with what follows, such as the word that publishes the object.
        _mm_sfence();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    #[test]
    fn every_byte_arrives_at_any_alignment() {
        let source: Vec<u8> = (0..5_000_u32).map(|n| (n % 251) as u8).collect();
        for (from, to) in [(0, 0), (1, 0), (0, 1), (33, 7), (64, 63)] {
            for length in [0, 1, 40, 63, 64, 127, 128, 129, 300, 4_096, 4_900] {
                let mut destination = vec![0xff_u8; 5_000];
                super::copy(&mut destination[to..to + length], &source[from..from + length]);
                assert_eq!(destination[to..to + length], source[from..from + length]);
                assert!(destination[..to]
                    .iter()
                    .chain(&destination[to + length..])
                    .all(|byte| *byte == 0xff));
            }
        }
    }
}
