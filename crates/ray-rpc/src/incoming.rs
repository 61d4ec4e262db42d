//! The receiving half of one link: reads, decodes, pairs descriptors with their frames and checks the Hello.
//!
//! Invariants:
//! 1. Nothing is delivered before the peer's Hello, and the Hello is delivered first.
//! 2. Frames decoded before an error or the end of the stream are delivered before the link closes.
//! 3. A descriptor belongs to the oldest frame that announces one and has none; one that nobody announces closes the link.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::Errno;
use rustix::net::{recvmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use crate::error::{CloseCause, CloseReason};
use crate::frame::{Frame, FrameDecoder, RawFrame, FLAG_DESCRIPTOR, FLAG_INTERNAL, HELLO_MAGIC, KIND_HELLO};

/// Limit of a Hello; a stranger's first frame is not worth more memory.
pub(crate) const HELLO_LIMIT_BYTES: usize = 1 << 20;
/// Descriptors that may have arrived ahead of the end of their frames.
const MAX_UNCLAIMED_DESCRIPTORS: usize = 64;
/// Descriptors one control message may bring; we send one at a time.
const DESCRIPTORS_PER_MESSAGE: usize = 4;

/// Something to deliver.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The peer's Hello.
    Ready(Bytes),
    /// A frame of the user.
    Frame(Frame),
}

/// How a read ended.
#[derive(Debug)]
pub(crate) enum ReadEnd {
    /// Nothing there.
    WouldBlock,
    /// This many bytes came, and there may be more if the flag says so.
    Read { bytes: usize, maybe_more: bool },
    /// The stream is over.
    Ended(CloseReason),
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// The socket; none before a TCP link is proven and after the link is closed.
    pub(crate) socket: Option<Arc<OwnedFd>>,
    decoder: FrameDecoder,
    ready: bool,
    descriptors: VecDeque<OwnedFd>,
    carries_descriptors: bool,
    frame_limit: usize,
    versions: (u16, u16),
}

impl Incoming {
    pub(crate) fn new(carries_descriptors: bool, frame_limit: usize, versions: (u16, u16)) -> Self {
        Self {
            socket: None,
            decoder: FrameDecoder::new(HELLO_LIMIT_BYTES.min(frame_limit)),
            ready: false,
            descriptors: VecDeque::new(),
            carries_descriptors,
            frame_limit,
            versions,
        }
    }

    /// One read: what it completed is pushed to `arrivals`, also when it ends the link.
    pub(crate) fn read_once(&mut self, peer: &str, buffer: &mut [u8], arrivals: &mut Vec<Arrival>) -> ReadEnd {
        let Some(socket) = self.socket.clone() else {
            return ReadEnd::WouldBlock;
        };
        let capacity = buffer.len();
        let direct = self.decoder.direct_buffer();
        let direct_length = direct.as_ref().map_or(0, |direct| direct.len());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE))];
        let mut control = RecvAncillaryBuffer::new(if self.carries_descriptors {
            &mut space[..]
        } else {
            &mut []
        });
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let result = match direct {
            Some(direct) => {
                let mut pieces = [IoSliceMut::new(direct), IoSliceMut::new(buffer)];
                recvmsg(&*socket, &mut pieces, &mut control, flags)
            }
            None => recvmsg(&*socket, &mut [IoSliceMut::new(buffer)], &mut control, flags),
        };
        let message = match result {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return ReadEnd::WouldBlock,
            // A peer that dies with our bytes unread resets the link, which says no more than an end of the stream.
            Err(Errno::CONNRESET) => return ReadEnd::Ended(self.end_of_stream(peer)),
            Err(error) => return ReadEnd::Ended(read_error(peer, error)),
        };
        if self.carries_descriptors {
            for part in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                    self.descriptors.extend(descriptors);
                }
            }
            if message.flags.contains(ReturnFlags::CTRUNC) {
                return ReadEnd::Ended(protocol(
                    peer,
                    "a control message was truncated, so a descriptor it brought is lost (is this process out of \
                     descriptors?)",
                ));
            }
            if self.descriptors.len() > MAX_UNCLAIMED_DESCRIPTORS {
                return ReadEnd::Ended(protocol(peer, "it sends descriptors that no frame announces"));
            }
        }
        if message.bytes == 0 {
            return ReadEnd::Ended(self.end_of_stream(peer));
        }
        let in_place = message.bytes.min(direct_length);
        if in_place > 0 {
            if let Some(raw) = self.decoder.direct_filled(in_place) {
                if let Err(reason) = self.accept(peer, raw, arrivals) {
                    return ReadEnd::Ended(reason);
                }
            }
        }
        let mut input = &buffer[..message.bytes - in_place];
        while !input.is_empty() {
            match self.decoder.next(&mut input) {
                Ok(Some(raw)) => {
                    if let Err(reason) = self.accept(peer, raw, arrivals) {
                        return ReadEnd::Ended(reason);
                    }
                }
                Ok(None) => {}
                Err(error) if !self.ready => {
                    return ReadEnd::Ended(protocol(peer, &format!("its first bytes are not a Hello ({error})")))
                }
                Err(error) => return ReadEnd::Ended(protocol(peer, &error.to_string())),
            }
        }
        ReadEnd::Read {
            bytes: message.bytes,
            maybe_more: message.bytes == direct_length + capacity,
        }
    }

    fn accept(&mut self, peer: &str, raw: RawFrame, arrivals: &mut Vec<Arrival>) -> Result<(), CloseReason> {
        let descriptor = if raw.flags & FLAG_DESCRIPTOR == 0 {
            None
        } else {
            match self.descriptors.pop_front() {
                Some(descriptor) => Some(descriptor),
                None => return Err(protocol(peer, "a frame announces a descriptor, and none came with it")),
            }
        };
        let is_hello = raw.flags & FLAG_INTERNAL != 0 && raw.kind == KIND_HELLO;
        if !self.ready {
            if !is_hello {
                return Err(protocol(peer, "its first frame is not a Hello"));
            }
            self.check_hello(peer, &raw.header)?;
            self.ready = true;
            self.decoder.set_limit(self.frame_limit);
            arrivals.push(Arrival::Ready(raw.payload));
            return Ok(());
        }
        if raw.flags & FLAG_INTERNAL != 0 {
            // Internal kinds of a later version are skipped, as unknown header fields are.
            return if is_hello {
                Err(protocol(peer, "it said Hello twice"))
            } else {
                Ok(())
            };
        }
        arrivals.push(Arrival::Frame(Frame {
            kind: raw.kind,
            correlation: raw.correlation,
            header: raw.header,
            payload: raw.payload,
            descriptor,
        }));
        Ok(())
    }

    fn check_hello(&self, peer: &str, header: &[u8]) -> Result<(), CloseReason> {
        let Some((&[m0, m1, m2, m3, l0, l1, h0, h1], _)) = header.split_first_chunk::<8>() else {
            return Err(protocol(peer, "its Hello is too short"));
        };
        if [m0, m1, m2, m3] != HELLO_MAGIC {
            return Err(protocol(peer, "its Hello is not this protocol's"));
        }
        let (lowest, highest) = (u16::from_le_bytes([l0, l1]), u16::from_le_bytes([h0, h1]));
        let (own_lowest, own_highest) = self.versions;
        if lowest > own_highest || highest < own_lowest {
            return Err(protocol(
                peer,
                &format!(
                    "it speaks protocol versions {lowest} to {highest}, and this process {own_lowest} to {own_highest}"
                ),
            ));
        }
        Ok(())
    }

    fn end_of_stream(&self, peer: &str) -> CloseReason {
        match self.decoder.unfinished() {
            Some((have, Some(want))) => protocol(
                peer,
                &format!("it closed in the middle of a frame, {have} of {want} bytes had come"),
            ),
            Some((have, None)) => protocol(
                peer,
                &format!("it closed in the middle of a frame's prefix, {have} bytes had come"),
            ),
            None if !self.ready => CloseReason::new(
                CloseCause::PeerClosed,
                format!("{peer} closed the link before it said Hello"),
            ),
            None => CloseReason::new(CloseCause::PeerClosed, format!("{peer} closed the link or died")),
        }
    }
}

fn protocol(peer: &str, problem: &str) -> CloseReason {
    CloseReason::new(
        CloseCause::Protocol,
        format!("the link to {peer} broke the protocol: {problem}"),
    )
}

fn read_error(peer: &str, error: Errno) -> CloseReason {
    let error = std::io::Error::from(error);
    match error.kind() {
        std::io::ErrorKind::TimedOut => CloseReason::new(
            CloseCause::Timeout,
            format!("{peer} does not answer: the link is half open or the network is cut ({error})"),
        ),
        _ => CloseReason::new(CloseCause::Io, format!("reading from {peer} failed: {error}")),
    }
}
