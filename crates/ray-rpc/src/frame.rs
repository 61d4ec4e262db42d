//! Frames: how they are laid out, and a decoder that takes the byte stream in any pieces.
//!
//! Layout: `u32 length of what follows | u16 kind | u16 flags | u64 correlation | u32 header length | header | payload`,
//! all little-endian. It refuses frames over the limit and lengths that contradict each other. What kind, header and
//! payload mean is none of its business.
//!
//! Invariants:
//! 1. Any split of a byte stream gives the same frames.
//! 2. The decoder never reserves more than the limit, and nothing before a whole prefix is there.
//! 3. After an error the decoder is not used again.

use std::os::fd::OwnedFd;

use bytes::Bytes;

/// Bytes before the header, the length field included.
pub const PREFIX_BYTES: usize = 20;
/// Bytes of the prefix that the length field counts.
pub const FIXED_BYTES: usize = 16;
/// The frame brings a descriptor.
pub(crate) const FLAG_DESCRIPTOR: u16 = 1;
/// The frame belongs to this crate and not to its user.
pub(crate) const FLAG_INTERNAL: u16 = 0x8000;
/// The internal kind of a Hello.
pub(crate) const KIND_HELLO: u16 = 0;
/// What every Hello begins with.
pub(crate) const HELLO_MAGIC: [u8; 4] = *b"HELI";
/// What is left of a payload is read straight into its place when it is at least this long.
const DIRECT_READ_BYTES: usize = 8 << 10;

/// A frame as it is delivered.
#[derive(Debug)]
pub struct Frame {
    /// What it is, in the user's numbering.
    pub kind: u16,
    /// Which request it belongs to, in the user's numbering.
    pub correlation: u64,
    /// The header.
    pub header: Bytes,
    /// The payload segments, joined.
    pub payload: Bytes,
    /// The descriptor that came along.
    pub descriptor: Option<OwnedFd>,
}

/// Why bytes are not frames.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than allowed.
    #[error("a frame of {length} bytes exceeds the limit of {limit} bytes")]
    TooLong {
        /// What the length field says.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// Too short to be one.
    #[error("a frame of {length} bytes is shorter than the {FIXED_BYTES} bytes that every frame has")]
    TooShort {
        /// What the length field says.
        length: usize,
    },
    /// The header ends beyond its frame.
    #[error("a header of {header_length} bytes does not fit into its frame of {length} bytes")]
    HeaderBeyondFrame {
        /// What the header length field says.
        header_length: usize,
        /// What the length field says.
        length: usize,
    },
}

/// A frame without its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFrame {
    /// The kind.
    pub kind: u16,
    /// The flags.
    pub flags: u16,
    /// The correlation id.
    pub correlation: u64,
    /// The header.
    pub header: Bytes,
    /// The payload.
    pub payload: Bytes,
}

/// The prefix of a frame.
pub fn encode_prefix(
    kind: u16,
    flags: u16,
    correlation: u64,
    header_length: usize,
    total: usize,
) -> [u8; PREFIX_BYTES] {
    let mut prefix = [0; PREFIX_BYTES];
    prefix[0..4].copy_from_slice(&(total as u32).to_le_bytes());
    prefix[4..6].copy_from_slice(&kind.to_le_bytes());
    prefix[6..8].copy_from_slice(&flags.to_le_bytes());
    prefix[8..16].copy_from_slice(&correlation.to_le_bytes());
    prefix[16..20].copy_from_slice(&(header_length as u32).to_le_bytes());
    prefix
}

#[derive(Debug, Clone, Copy)]
struct Prefix {
    kind: u16,
    flags: u16,
    correlation: u64,
    header_length: usize,
    payload_length: usize,
}

fn parse_prefix(bytes: &[u8; PREFIX_BYTES], limit: usize) -> Result<Prefix, FrameError> {
    let [l0, l1, l2, l3, k0, k1, f0, f1, c0, c1, c2, c3, c4, c5, c6, c7, h0, h1, h2, h3] = *bytes;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let header_length = u32::from_le_bytes([h0, h1, h2, h3]) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    if length < FIXED_BYTES {
        return Err(FrameError::TooShort { length });
    }
    if header_length > length - FIXED_BYTES {
        return Err(FrameError::HeaderBeyondFrame { header_length, length });
    }
    Ok(Prefix {
        kind: u16::from_le_bytes([k0, k1]),
        flags: u16::from_le_bytes([f0, f1]),
        correlation: u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
        header_length,
        payload_length: length - FIXED_BYTES - header_length,
    })
}

#[derive(Debug)]
struct Body {
    prefix: Prefix,
    header: Vec<u8>,
    payload: Vec<u8>,
    payload_filled: usize,
}

impl Body {
    fn new(prefix: Prefix) -> Self {
        // Zeroed memory of a large payload comes untouched from the system, so a lying length costs no memory.
        Self {
            prefix,
            header: Vec::with_capacity(prefix.header_length),
            payload: vec![0; prefix.payload_length],
            payload_filled: 0,
        }
    }

    fn fill<'a>(&mut self, mut input: &'a [u8]) -> &'a [u8] {
        let wanted = (self.prefix.header_length - self.header.len()).min(input.len());
        self.header.extend_from_slice(&input[..wanted]);
        input = &input[wanted..];
        let wanted = (self.payload.len() - self.payload_filled).min(input.len());
        self.payload[self.payload_filled..self.payload_filled + wanted].copy_from_slice(&input[..wanted]);
        self.payload_filled += wanted;
        &input[wanted..]
    }

    fn is_complete(&self) -> bool {
        self.header.len() == self.prefix.header_length && self.payload_filled == self.payload.len()
    }

    fn into_frame(self) -> RawFrame {
        RawFrame {
            kind: self.prefix.kind,
            flags: self.prefix.flags,
            correlation: self.prefix.correlation,
            header: Bytes::from(self.header),
            payload: Bytes::from(self.payload),
        }
    }
}

/// Turns a byte stream into frames.
#[derive(Debug)]
pub struct FrameDecoder {
    limit: usize,
    partial: [u8; PREFIX_BYTES],
    partial_length: usize,
    body: Option<Body>,
}

impl FrameDecoder {
    /// A decoder that refuses frames over `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            partial: [0; PREFIX_BYTES],
            partial_length: 0,
            body: None,
        }
    }

    /// Changes the limit for frames whose prefix was not read yet.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// The next frame; consumes `input` as far as it got, and all of it where the answer is `None`.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<RawFrame>, FrameError> {
        if self.body.is_none() {
            if self.partial_length == 0 {
                if let Some(frame) = self.next_in_place(input)? {
                    return Ok(Some(frame));
                }
            } else {
                let wanted = (PREFIX_BYTES - self.partial_length).min(input.len());
                self.partial[self.partial_length..self.partial_length + wanted].copy_from_slice(&input[..wanted]);
                self.partial_length += wanted;
                *input = &input[wanted..];
                if self.partial_length == PREFIX_BYTES {
                    self.partial_length = 0;
                    self.body = Some(Body::new(parse_prefix(&self.partial, self.limit)?));
                }
            }
        }
        let Some(body) = &mut self.body else { return Ok(None) };
        *input = body.fill(input);
        if body.is_complete() {
            return Ok(self.body.take().map(Body::into_frame));
        }
        Ok(None)
    }

    fn next_in_place(&mut self, input: &mut &[u8]) -> Result<Option<RawFrame>, FrameError> {
        let Some((prefix_bytes, rest)) = input.split_first_chunk::<PREFIX_BYTES>() else {
            self.partial[..input.len()].copy_from_slice(input);
            self.partial_length = input.len();
            *input = &[];
            return Ok(None);
        };
        let prefix = parse_prefix(prefix_bytes, self.limit)?;
        let total = prefix.header_length + prefix.payload_length;
        if rest.len() < total {
            self.body = Some(Body::new(prefix));
            *input = rest;
            return Ok(None);
        }
        // Small frames are copied out of the read buffer: a retained value then holds its own bytes and not the buffer.
        let frame = RawFrame {
            kind: prefix.kind,
            flags: prefix.flags,
            correlation: prefix.correlation,
            header: Bytes::copy_from_slice(&rest[..prefix.header_length]),
            payload: Bytes::copy_from_slice(&rest[prefix.header_length..total]),
        };
        *input = &rest[total..];
        Ok(Some(frame))
    }

    /// Where the rest of a long payload belongs; report what was put there with `direct_filled`.
    pub fn direct_buffer(&mut self) -> Option<&mut [u8]> {
        let body = self.body.as_mut()?;
        let left = body.payload.len() - body.payload_filled;
        if body.header.len() < body.prefix.header_length || left < DIRECT_READ_BYTES {
            return None;
        }
        Some(&mut body.payload[body.payload_filled..])
    }

    /// Takes note of `count` bytes read into `direct_buffer`; the frame, where they completed it.
    pub fn direct_filled(&mut self, count: usize) -> Option<RawFrame> {
        let body = self.body.as_mut()?;
        body.payload_filled += count;
        debug_assert!(body.payload_filled <= body.payload.len());
        if body.is_complete() {
            return self.body.take().map(Body::into_frame);
        }
        None
    }

    /// How many bytes of an unfinished frame are here, and how many it has where that is known.
    pub fn unfinished(&self) -> Option<(usize, Option<usize>)> {
        match &self.body {
            Some(body) => Some((
                PREFIX_BYTES + body.header.len() + body.payload_filled,
                Some(PREFIX_BYTES + body.prefix.header_length + body.payload.len()),
            )),
            None if self.partial_length > 0 => Some((self.partial_length, None)),
            None => None,
        }
    }
}
