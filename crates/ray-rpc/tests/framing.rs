//! Properties of framing: any split of a stream gives the same frames, and no bytes make the decoder panic.
#![cfg(not(loom))]

use bytes::Bytes;
use proptest::prelude::*;
use ray_rpc::frame::{encode_prefix, FrameDecoder, FrameError, RawFrame, FIXED_BYTES, PREFIX_BYTES};

fn frame() -> impl Strategy<Value = RawFrame> {
    let length = prop_oneof![Just(0usize), 0..40usize, 0..3000usize, 8000..40_000usize];
    (
        any::<u16>(),
        any::<u16>(),
        any::<u64>(),
        0..300usize,
        length,
        any::<u8>(),
    )
        .prop_map(|(kind, flags, correlation, header, payload, seed)| RawFrame {
            kind,
            flags,
            correlation,
            header: (0..header)
                .map(|index| (index as u8).wrapping_mul(seed))
                .collect::<Vec<_>>()
                .into(),
            payload: (0..payload)
                .map(|index| (index as u8).wrapping_add(seed))
                .collect::<Vec<_>>()
                .into(),
        })
}

fn encode(frames: &[RawFrame]) -> Vec<u8> {
    let mut stream = Vec::new();
    for frame in frames {
        let length = FIXED_BYTES + frame.header.len() + frame.payload.len();
        stream.extend_from_slice(&encode_prefix(
            frame.kind,
            frame.flags,
            frame.correlation,
            frame.header.len(),
            length,
        ));
        stream.extend_from_slice(&frame.header);
        stream.extend_from_slice(&frame.payload);
    }
    stream
}

fn feed(decoder: &mut FrameDecoder, mut piece: &[u8], frames: &mut Vec<RawFrame>) -> Result<(), FrameError> {
    // As the reader does: the rest of a long payload goes straight into its place.
    if let Some(direct) = decoder.direct_buffer() {
        let count = direct.len().min(piece.len());
        direct[..count].copy_from_slice(&piece[..count]);
        frames.extend(decoder.direct_filled(count));
        piece = &piece[count..];
    }
    while !piece.is_empty() {
        frames.extend(decoder.next(&mut piece)?);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_gives_the_same_frames(
        frames in prop::collection::vec(frame(), 1..8),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..30),
    ) {
        let stream = encode(&frames);
        let mut cuts: Vec<usize> = cuts
            .iter()
            .flat_map(|(cut, single)| {
                let at = cut.index(stream.len());
                // Some pieces are single bytes.
                if *single { vec![at, (at + 1).min(stream.len())] } else { vec![at] }
            })
            .chain([0, stream.len()])
            .collect();
        cuts.sort_unstable();
        let mut decoder = FrameDecoder::new(1 << 20);
        let mut decoded = Vec::new();
        for window in cuts.windows(2) {
            feed(&mut decoder, &stream[window[0]..window[1]], &mut decoded).unwrap();
        }
        prop_assert!(decoder.unfinished().is_none());
        prop_assert_eq!(decoded, frames);
    }

    #[test]
    fn garbage_is_an_error_or_waits_but_never_panics(
        garbage in prop::collection::vec(any::<u8>(), 0..200),
        length in 0..5000u32,
        step in 1..50usize,
    ) {
        let mut stream = length.to_le_bytes().to_vec();
        stream.extend_from_slice(&garbage);
        let mut decoder = FrameDecoder::new(4096);
        let mut decoded = Vec::new();
        for piece in stream.chunks(step) {
            if feed(&mut decoder, piece, &mut decoded).is_err() {
                return Ok(());
            }
        }
        let total: usize = decoded.iter().map(|frame| PREFIX_BYTES + frame.header.len() + frame.payload.len()).sum();
        prop_assert!(total <= stream.len());
    }

    #[test]
    fn a_byte_by_byte_stream_gives_the_same_frames(frame in frame()) {
        let stream = encode(std::slice::from_ref(&frame));
        let mut decoder = FrameDecoder::new(1 << 20);
        let mut decoded = Vec::new();
        for byte in stream.chunks(1) {
            feed(&mut decoder, byte, &mut decoded).unwrap();
        }
        prop_assert_eq!(decoded, vec![frame]);
    }
}

#[test]
fn contradictions_are_named() {
    let decode = |prefix: [u8; PREFIX_BYTES]| FrameDecoder::new(1000).next(&mut &prefix[..]).unwrap_err();
    assert_eq!(
        decode(encode_prefix(1, 0, 0, 0, 1001)),
        FrameError::TooLong {
            length: 1001,
            limit: 1000
        }
    );
    assert_eq!(
        decode(encode_prefix(1, 0, 0, 0, 15)),
        FrameError::TooShort { length: 15 }
    );
    assert_eq!(
        decode(encode_prefix(1, 0, 0, 85, 100)),
        FrameError::HeaderBeyondFrame {
            header_length: 85,
            length: 100
        }
    );
    let empty = FrameDecoder::new(1000)
        .next(&mut &encode_prefix(3, 0, 9, 0, 16)[..])
        .unwrap()
        .unwrap();
    assert_eq!((empty.kind, empty.correlation, empty.payload), (3, 9, Bytes::new()));
}
