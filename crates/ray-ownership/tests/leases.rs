//! An owner's leases: requests, pushes, pipelines, recalls and broken leases.

use ray_ids::{ActorId, JobId, LeaseId, NodeId, TaskId, WorkerId};
use ray_ownership::leases::{LeaseClient, LeaseCommand, IDLE_LEASE_MS, MAX_REQUESTS, STALL_MS};

const CLASS: u64 = 1;

fn task(number: u8) -> TaskId {
    TaskId::of(ActorId::nil_in(JobId::from_int(1)), [number; 8])
}

fn lease(number: u8) -> LeaseId {
    LeaseId::from_array([number; 16])
}

fn node(number: u8) -> NodeId {
    NodeId::from_array([number; 28])
}

fn step(client: &mut LeaseClient, act: impl FnOnce(&mut LeaseClient, &mut Vec<LeaseCommand>)) -> Vec<LeaseCommand> {
    let mut commands = Vec::new();
    act(client, &mut commands);
    client.validate().unwrap();
    commands
}

fn submit(client: &mut LeaseClient, number: u8) -> Vec<LeaseCommand> {
    step(client, |c, out| c.submit(task(number), CLASS, true, None, 0, out))
}

fn grant(client: &mut LeaseClient, request: u64, number: u8, now_ms: u64) -> Vec<LeaseCommand> {
    let worker = WorkerId::from_array([number; 28]);
    step(client, |c, out| {
        c.granted(request, lease(number), worker, node(number), 100, now_ms, out)
    })
}

fn push(lease_number: u8, number: u8, sequence: u64) -> LeaseCommand {
    LeaseCommand::Push {
        lease: lease(lease_number),
        task: task(number),
        sequence,
    }
}

fn pushes(commands: &[LeaseCommand]) -> Vec<LeaseCommand> {
    commands
        .iter()
        .filter(|command| matches!(command, LeaseCommand::Push { .. }))
        .cloned()
        .collect()
}

fn request(request: u64, raylet: Option<NodeId>, backlog: u32) -> LeaseCommand {
    LeaseCommand::Request {
        request,
        class: CLASS,
        raylet,
        backlog,
        preferred: None,
    }
}

fn returned(number: u8, worker_exits: bool) -> LeaseCommand {
    LeaseCommand::Return {
        lease: lease(number),
        worker_exits,
    }
}

#[test]
fn every_queued_call_asks_for_a_lease_up_to_the_cap() {
    let mut client = LeaseClient::new();
    assert_eq!(submit(&mut client, 1), [request(1, None, 1)]);
    assert_eq!(submit(&mut client, 2), [request(2, None, 2)]);
    for number in 3..=40 {
        submit(&mut client, number);
    }
    assert_eq!(submit(&mut client, 41), []);
    assert_eq!(client.waiting(), [(CLASS, 41, false)]);
    // Each request's end makes room for another one.
    let mut asked = MAX_REQUESTS;
    for number in 1..=3 {
        let commands = grant(&mut client, u64::from(number), number, 0);
        asked += commands
            .iter()
            .filter(|c| matches!(c, LeaseCommand::Request { .. }))
            .count();
    }
    assert_eq!(asked, MAX_REQUESTS + 3);
}

#[test]
fn a_lease_takes_one_call_at_a_time_until_a_raylet_says_that_no_further_one_is_to_be_had() {
    let mut client = LeaseClient::new();
    for number in 1..=3 {
        submit(&mut client, number);
    }
    assert_eq!(pushes(&grant(&mut client, 1, 1, 0)), [push(1, 1, 100)]);
    assert_eq!(
        pushes(&step(&mut client, |c, out| c.queued(2, 0, out))),
        [push(1, 2, 101)]
    );
    assert_eq!(step(&mut client, |c, out| c.queued(2, 0, out)), [], "said twice");
    // Fast replies deepen the pipeline.
    assert_eq!(
        pushes(&step(&mut client, |c, out| assert!(c.replied(task(1), false, 10, out)))),
        [push(1, 3, 102)]
    );
}

#[test]
fn a_class_that_forbids_it_is_never_pipelined() {
    let mut client = LeaseClient::new();
    for number in 1..=2 {
        step(&mut client, |c, out| c.submit(task(number), CLASS, false, None, 0, out));
    }
    grant(&mut client, 1, 1, 0);
    assert_eq!(pushes(&step(&mut client, |c, out| c.queued(2, 0, out))), []);
}

#[test]
fn requests_without_anything_to_run_are_withdrawn_and_a_late_grant_goes_back() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    submit(&mut client, 2);
    grant(&mut client, 1, 1, 0);
    step(&mut client, |c, out| c.queued(2, 0, out));
    let commands = step(&mut client, |c, out| assert!(c.replied(task(1), false, 10, out)));
    assert_eq!(commands, [LeaseCommand::CancelRequest { request: 2 }]);
    assert_eq!(grant(&mut client, 2, 2, 0), [returned(2, false)]);
}

#[test]
fn a_recalled_lease_takes_nothing_more_and_goes_back_with_its_last_call() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    submit(&mut client, 2);
    grant(&mut client, 1, 1, 0);
    step(&mut client, |c, out| c.queued(2, 0, out));
    let commands = step(&mut client, |c, out| c.recalled(lease(1), out));
    assert_eq!(commands, [LeaseCommand::Recall { lease: lease(1) }]);
    // The worker gives the unstarted one back; it waits for another lease.
    assert_eq!(
        pushes(&step(&mut client, |c, out| c.tasks_recalled(
            &[task(2)],
            lease(1),
            0,
            out
        ))),
        []
    );
    let commands = step(&mut client, |c, out| assert!(c.replied(task(1), false, 10, out)));
    assert!(commands.contains(&returned(1, false)));
    assert_eq!(client.waiting(), [(CLASS, 1, true)]);
    assert_eq!(pushes(&grant(&mut client, 2, 2, 0)), [push(2, 2, 100)]);
}

#[test]
fn an_idle_lease_goes_back_when_recalled_or_after_its_time() {
    let mut client = LeaseClient::new();
    for number in 1..=2 {
        submit(&mut client, number);
        let commands = grant(&mut client, u64::from(number), number, 0);
        assert_eq!(pushes(&commands).len(), 1);
    }
    for number in 1..=2 {
        step(&mut client, |c, out| assert!(c.replied(task(number), false, 0, out)));
    }
    assert_eq!(client.idle_leases(), 2);
    assert_eq!(
        step(&mut client, |c, out| c.recalled(lease(1), out)),
        [returned(1, false)]
    );
    assert_eq!(
        step(&mut client, |c, out| assert_eq!(
            c.tick(IDLE_LEASE_MS - 1, out),
            Some(IDLE_LEASE_MS)
        )),
        []
    );
    assert_eq!(
        step(&mut client, |c, out| assert_eq!(c.tick(IDLE_LEASE_MS, out), None)),
        [returned(2, false)]
    );
    assert!(client.is_quiet());
}

#[test]
fn a_broken_lease_with_evidence_costs_only_what_was_started() {
    let mut client = LeaseClient::new();
    for number in 1..=3 {
        submit(&mut client, number);
    }
    grant(&mut client, 1, 1, 0);
    step(&mut client, |c, out| c.queued(2, 0, out));
    step(&mut client, |c, out| assert!(c.replied(task(1), false, 10, out)));
    // 2 (sequence 101) runs, 3 (102) waits behind it.
    let commands = step(&mut client, |c, out| c.broken(lease(1), Some(101), 0, out));
    assert_eq!(
        commands[0],
        LeaseCommand::AttemptFailed {
            task: task(2),
            lease: lease(1)
        }
    );
    assert_eq!(client.waiting(), [(CLASS, 1, true)]);
    assert_eq!(
        step(&mut client, |c, out| c.broken(lease(1), Some(101), 0, out)),
        [],
        "told twice"
    );
    assert_eq!(pushes(&grant(&mut client, 2, 3, 0)), [push(3, 3, 100)]);
}

#[test]
fn a_broken_lease_without_evidence_costs_every_attempt() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    submit(&mut client, 2);
    grant(&mut client, 1, 1, 0);
    step(&mut client, |c, out| c.queued(2, 0, out));
    let commands = step(&mut client, |c, out| c.node_died(node(1), 0, out));
    let failed = commands
        .iter()
        .filter(|c| matches!(c, LeaseCommand::AttemptFailed { .. }))
        .count();
    assert_eq!(failed, 2);
    assert!(
        !step(&mut client, |_, _| ()).contains(&returned(1, false)),
        "what is dead is not given back"
    );
}

#[test]
fn a_call_given_back_late_is_left_where_it_runs_now() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    submit(&mut client, 2);
    grant(&mut client, 1, 1, 0);
    step(&mut client, |c, out| c.queued(2, 0, out));
    step(&mut client, |c, out| c.recalled(lease(1), out));
    // The worker dies; its word about the recall comes after the evidence.
    step(&mut client, |c, out| c.broken(lease(1), Some(100), 0, out));
    grant(&mut client, 2, 2, 0);
    assert_eq!(client.lease_of(&task(2)).map(|(id, _)| id), Some(lease(2)));
    assert_eq!(
        step(&mut client, |c, out| c.tasks_recalled(&[task(2)], lease(1), 0, out)),
        []
    );
    assert_eq!(client.lease_of(&task(2)).map(|(id, _)| id), Some(lease(2)));
}

#[test]
fn a_lease_that_the_worker_does_not_know_is_given_up_and_its_call_queued_again() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    grant(&mut client, 1, 1, 0);
    let commands = step(&mut client, |c, out| c.stale(task(1), lease(1), 0, out));
    assert_eq!(commands, [returned(1, false), request(2, None, 1)]);
    assert_eq!(step(&mut client, |c, out| c.broken(lease(1), None, 0, out)), []);
}

#[test]
fn a_redirected_request_is_sent_there_and_a_lost_one_to_our_own_raylet() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    assert_eq!(
        step(&mut client, |c, out| c.redirected(1, node(2), out)),
        [request(1, Some(node(2)), 1)]
    );
    step(&mut client, |c, out| c.queued(1, 0, out));
    assert_eq!(
        step(&mut client, |c, out| c.request_lost(1, 0, out)),
        [request(2, None, 1)]
    );
    assert_eq!(
        step(&mut client, |c, out| c.redirected(1, node(3), out)),
        [],
        "that request is over"
    );
}

#[test]
fn a_refusal_fails_what_waits_and_withdraws_the_other_requests() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    submit(&mut client, 2);
    let mut failed = Vec::new();
    let commands = step(&mut client, |c, out| failed = c.refused(1, out));
    assert_eq!(failed, [task(1), task(2)]);
    assert_eq!(commands, [LeaseCommand::CancelRequest { request: 2 }]);
    assert!(client.is_quiet());
}

#[test]
fn a_worker_that_leaves_after_a_call_gets_no_further_one() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    submit(&mut client, 2);
    grant(&mut client, 1, 1, 0);
    let commands = step(&mut client, |c, out| assert!(c.replied(task(1), true, 0, out)));
    assert!(commands.contains(&returned(1, true)));
    assert_eq!(pushes(&commands), []);
    assert_eq!(client.waiting(), [(CLASS, 1, false)]);
}

#[test]
fn a_stalled_pipeline_is_shared_with_an_idle_lease() {
    let mut client = LeaseClient::new();
    for number in 1..=2 {
        submit(&mut client, number);
    }
    grant(&mut client, 1, 1, 0);
    step(&mut client, |c, out| c.queued(2, 0, out));
    let commands = grant(&mut client, 2, 2, STALL_MS);
    assert_eq!(commands, [LeaseCommand::Recall { lease: lease(1) }]);
    let commands = step(&mut client, |c, out| {
        c.tasks_recalled(&[task(2)], lease(1), STALL_MS, out)
    });
    assert_eq!(pushes(&commands), [push(2, 2, 100)]);
}

#[test]
fn a_cancelled_call_leaves_the_queue_and_its_request_is_withdrawn() {
    let mut client = LeaseClient::new();
    submit(&mut client, 1);
    let commands = step(&mut client, |c, out| assert!(c.cancel_queued(task(1), CLASS, out)));
    assert_eq!(commands, [LeaseCommand::CancelRequest { request: 1 }]);
    step(&mut client, |c, out| assert!(!c.cancel_queued(task(1), CLASS, out)));
    assert!(client.is_quiet());
}
