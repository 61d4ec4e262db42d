//! A session's frames over links that break at random.

use proptest::prelude::*;
use ray_ownership::session::{Session, SessionError, ACKNOWLEDGE_EVERY};
use std::collections::VecDeque;

#[test]
fn frames_wait_for_a_link_and_are_forgotten_when_the_peer_has_them() {
    let mut session = Session::new();
    assert!(!session.send(1));
    assert_eq!(session.resumed(0), Ok(vec![1]));
    assert!(session.send(2));
    session.broken();
    assert!(!session.send(3));
    assert_eq!(session.resumed(1), Ok(vec![2, 3]));
    session.validate().unwrap();
    assert_eq!(
        session.resumed(0),
        Err(SessionError {
            claimed: 0,
            sent: 3,
            acknowledged: 1
        })
    );
    assert_eq!(
        session.acknowledged(4),
        Err(SessionError {
            claimed: 4,
            sent: 3,
            acknowledged: 1
        })
    );
}

#[test]
fn a_word_to_the_peer_is_due_after_a_number_of_frames() {
    let mut session: Session<u32> = Session::new();
    let due: Vec<u64> = (0..2 * ACKNOWLEDGE_EVERY).filter_map(|_| session.receive()).collect();
    assert_eq!(due, [ACKNOWLEDGE_EVERY, 2 * ACKNOWLEDGE_EVERY]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_frame_arrives_once_and_in_order(steps in prop::collection::vec(0u8..8, 1..400)) {
        let (mut left, mut right) = (Session::new(), Session::new());
        let mut link: Option<VecDeque<u32>> = None;
        let (mut next, mut arrived) = (0u32, Vec::new());
        for step in steps {
            match step {
                0..=2 => {
                    next += 1;
                    if left.send(next) {
                        link.as_mut().expect("connected").push_back(next);
                    }
                }
                3..=5 => if let Some(frame) = link.as_mut().and_then(VecDeque::pop_front) {
                    arrived.push(frame);
                    if let Some(count) = right.receive() {
                        left.acknowledged(count).unwrap();
                    }
                },
                6 => {
                    link = None;
                    left.broken();
                    right.broken();
                }
                _ => if link.is_none() {
                    link = Some(left.resumed(right.take_in_count()).unwrap().into());
                    right.resumed(left.take_in_count()).unwrap();
                },
            }
            left.validate().unwrap();
            right.validate().unwrap();
        }
        let rest = match link {
            Some(link) => link.into(),
            None => left.resumed(right.take_in_count()).unwrap(),
        };
        arrived.extend(rest);
        prop_assert_eq!(arrived, (1..=next).collect::<Vec<_>>());
        let _: Session<u32> = right;
    }
}
