//! Calls of an actor, at the caller (`ActorCalls`) and at the actor (`ActorOrder`).

use ray_ids::{ActorId, JobId, TaskId, WorkerId};
use ray_ownership::actor_calls::{ActorCalls, ActorCommand, ActorStatus};
use ray_ownership::actor_order::{
    ActorOrder, ArrivedCall, CallKey, CallPlace, OrderCommand, RefusalReason, SeenState, DEFAULT_GROUP,
};

fn task(number: u8) -> TaskId {
    TaskId::of(ActorId::of(JobId::from_int(1), [1; 12]), [number; 8])
}

fn worker(number: u8) -> WorkerId {
    WorkerId::from_array([number; 28])
}

mod caller {
    use super::*;

    fn step(calls: &mut ActorCalls, act: impl FnOnce(&mut ActorCalls, &mut Vec<ActorCommand>)) -> Vec<ActorCommand> {
        let mut commands = Vec::new();
        act(calls, &mut commands);
        calls.validate().unwrap();
        commands
    }

    fn push(number: u8, incarnation: u64, sequence: u64) -> ActorCommand {
        ActorCommand::Push {
            task: task(number),
            worker: worker(incarnation as u8),
            incarnation,
            sequence,
        }
    }

    fn submit(calls: &mut ActorCalls, number: u8, ready: bool, retries: i32) -> Vec<ActorCommand> {
        step(calls, |c, out| c.submit(task(number), "", ready, retries, out))
    }

    fn alive(calls: &mut ActorCalls, incarnation: u64) -> Vec<ActorCommand> {
        step(calls, |c, out| c.alive(worker(incarnation as u8), incarnation, out))
    }

    #[test]
    fn calls_wait_for_the_actor_and_go_out_in_order() {
        let mut calls = ActorCalls::new(false, -1);
        assert_eq!(submit(&mut calls, 1, true, 0), []);
        assert_eq!(submit(&mut calls, 2, true, 0), []);
        assert_eq!(alive(&mut calls, 1), [push(1, 1, 1), push(2, 1, 2)]);
        assert_eq!(alive(&mut calls, 1), [], "said twice");
        assert_eq!(submit(&mut calls, 3, true, 0), [push(3, 1, 3)]);
        assert_eq!(calls.pending(), 3);
        assert!(calls.replied(task(2)) && !calls.replied(task(2)));
    }

    #[test]
    fn a_call_without_its_arguments_holds_back_its_group_alone() {
        let mut calls = ActorCalls::new(false, -1);
        alive(&mut calls, 1);
        submit(&mut calls, 1, false, 0);
        assert_eq!(submit(&mut calls, 2, true, 0), []);
        assert_eq!(
            step(&mut calls, |c, out| c.submit(task(3), "io", true, 0, out)),
            [push(3, 1, 1)]
        );
        assert_eq!(
            step(&mut calls, |c, out| c.ready(task(1), "", out)),
            [push(1, 1, 2), push(2, 1, 3)]
        );
    }

    #[test]
    fn out_of_order_execution_holds_nothing_back() {
        let mut calls = ActorCalls::new(true, -1);
        alive(&mut calls, 1);
        submit(&mut calls, 1, false, 0);
        assert_eq!(submit(&mut calls, 2, true, 0), [push(2, 1, 1)]);
        assert_eq!(step(&mut calls, |c, out| c.ready(task(1), "", out)), [push(1, 1, 2)]);
    }

    #[test]
    fn after_a_restart_unanswered_calls_are_retried_or_fail_and_numbers_begin_again() {
        let mut calls = ActorCalls::new(false, -1);
        alive(&mut calls, 1);
        submit(&mut calls, 1, true, 0);
        submit(&mut calls, 2, true, 1);
        submit(&mut calls, 3, true, -1);
        let commands = step(&mut calls, |c, out| c.disconnected(1, out));
        assert_eq!(commands, [ActorCommand::FailUnavailable { task: task(1) }]);
        assert_eq!(step(&mut calls, |c, out| c.restarting(2, out)), []);
        assert_eq!(calls.status(), &ActorStatus::Pending);
        submit(&mut calls, 4, true, 0);
        assert_eq!(alive(&mut calls, 2), [push(2, 2, 1), push(3, 2, 2), push(4, 2, 3)]);
        // The second loss uses up the first one's retries.
        let commands = step(&mut calls, |c, out| c.restarting(3, out));
        let failed = [2, 4].map(|number| ActorCommand::FailUnavailable { task: task(number) });
        assert_eq!(commands, failed);
        assert_eq!(alive(&mut calls, 3), [push(3, 3, 1)]);
    }

    #[test]
    fn late_news_of_a_life_before_is_ignored() {
        let mut calls = ActorCalls::new(false, -1);
        alive(&mut calls, 1);
        step(&mut calls, |c, out| c.restarting(2, out));
        submit(&mut calls, 1, true, 0);
        assert_eq!(alive(&mut calls, 1), [], "the dead one is not alive again");
        assert_eq!(alive(&mut calls, 2), [push(1, 2, 1)]);
        assert_eq!(step(&mut calls, |c, out| c.disconnected(1, out)), []);
        assert_eq!(step(&mut calls, |c, out| c.restarting(2, out)), []);
        assert_eq!(
            calls.status(),
            &ActorStatus::Alive {
                worker: worker(2),
                incarnation: 2
            }
        );
    }

    #[test]
    fn a_broken_link_to_a_living_actor_goes_on_with_the_next_number() {
        let mut calls = ActorCalls::new(false, -1);
        alive(&mut calls, 1);
        submit(&mut calls, 1, true, 1);
        step(&mut calls, |c, out| c.disconnected(1, out));
        assert_eq!(calls.next_sequence(), 2);
        assert_eq!(alive(&mut calls, 1), [push(1, 1, 2)]);
    }

    #[test]
    fn death_for_good_fails_everything() {
        let mut calls = ActorCalls::new(false, 2);
        alive(&mut calls, 1);
        submit(&mut calls, 1, true, -1);
        submit(&mut calls, 2, false, 0);
        assert!(calls.is_full());
        let failed = [1, 2].map(|number| ActorCommand::FailDead { task: task(number) });
        assert_eq!(step(&mut calls, |c, out| c.dead(out)), failed);
        assert_eq!(
            submit(&mut calls, 3, true, -1),
            [ActorCommand::FailDead { task: task(3) }]
        );
        assert_eq!(alive(&mut calls, 2), []);
        assert!(!calls.is_full());
    }

    #[test]
    fn an_exception_is_retried_while_retries_are_left() {
        let mut calls = ActorCalls::new(false, -1);
        alive(&mut calls, 1);
        submit(&mut calls, 1, true, 1);
        let commands = step(&mut calls, |c, out| assert!(c.retry_after_exception(task(1), "", out)));
        assert_eq!(commands, [push(1, 1, 2)]);
        step(&mut calls, |c, out| assert!(!c.retry_after_exception(task(1), "", out)));
        assert!(calls.replied(task(1)));
    }

    #[test]
    fn only_a_waiting_call_is_taken_back() {
        let mut calls = ActorCalls::new(false, -1);
        submit(&mut calls, 1, true, 0);
        step(&mut calls, |c, _| assert!(c.cancel_waiting(task(1))));
        submit(&mut calls, 2, true, 0);
        alive(&mut calls, 1);
        step(&mut calls, |c, _| assert!(!c.cancel_waiting(task(2))));
    }
}

mod actor {
    use super::*;

    fn step(order: &mut ActorOrder, act: impl FnOnce(&mut ActorOrder, &mut Vec<OrderCommand>)) -> Vec<OrderCommand> {
        let mut commands = Vec::new();
        act(order, &mut commands);
        order.validate().unwrap();
        commands
    }

    fn key(caller: u8, sequence: u64) -> CallKey {
        CallKey {
            caller: worker(caller),
            sequence,
        }
    }

    /// A call whose task's number is its sequence.
    fn call(caller: u8, sequence: u64, group: &str, ready: bool) -> ArrivedCall {
        let key = key(caller, sequence);
        ArrivedCall {
            key,
            task: task(sequence as u8),
            incarnation: 1,
            group: group.to_owned(),
            ready,
        }
    }

    fn push(order: &mut ActorOrder, caller: u8, sequence: u64) -> Vec<OrderCommand> {
        step(order, |o, out| o.push(call(caller, sequence, "", true), out))
    }

    fn finish(order: &mut ActorOrder, caller: u8, sequence: u64) -> Vec<OrderCommand> {
        step(order, |o, out| assert!(o.finished(key(caller, sequence), out)))
    }

    fn run(caller: u8, sequence: u64) -> OrderCommand {
        OrderCommand::Run {
            key: key(caller, sequence),
            task: task(sequence as u8),
            group: DEFAULT_GROUP.into(),
        }
    }

    fn refuse(caller: u8, sequence: u64, reason: RefusalReason) -> OrderCommand {
        OrderCommand::Refuse {
            key: key(caller, sequence),
            task: task(sequence as u8),
            reason,
        }
    }

    fn duplicate(caller: u8, sequence: u64, state: SeenState) -> OrderCommand {
        OrderCommand::Duplicate {
            key: key(caller, sequence),
            task: task(sequence as u8),
            state,
        }
    }

    #[test]
    fn a_sync_actor_runs_one_call_at_a_time_in_order() {
        let mut order = ActorOrder::new(1, false, 1, &[]);
        assert_eq!(push(&mut order, 1, 1), [run(1, 1)]);
        assert_eq!(push(&mut order, 1, 2), []);
        assert_eq!(push(&mut order, 2, 1), []);
        assert_eq!(order.waiting().len(), 2);
        assert_eq!(finish(&mut order, 1, 1), [run(1, 2)]);
        assert_eq!(finish(&mut order, 1, 2), [run(2, 1)]);
        finish(&mut order, 2, 1);
        assert_eq!(order.unfinished(), 0);
    }

    #[test]
    fn a_call_that_was_seen_is_not_run_again() {
        let mut order = ActorOrder::new(1, false, 1, &[]);
        push(&mut order, 1, 1);
        push(&mut order, 1, 2);
        assert_eq!(push(&mut order, 1, 1), [duplicate(1, 1, SeenState::Unfinished)]);
        assert_eq!(push(&mut order, 1, 2), [duplicate(1, 2, SeenState::Unfinished)]);
        finish(&mut order, 1, 1);
        assert_eq!(push(&mut order, 1, 1), [duplicate(1, 1, SeenState::Finished)]);
        assert_eq!(push(&mut order, 2, 1), [], "another caller's numbers are its own");
    }

    #[test]
    fn a_call_for_another_incarnation_is_refused() {
        let mut order = ActorOrder::new(2, false, 1, &[]);
        assert_eq!(push(&mut order, 1, 1), [refuse(1, 1, RefusalReason::StaleIncarnation)]);
        assert_eq!(order.unfinished(), 0);
    }

    #[test]
    fn a_missing_number_is_waited_for_until_a_fresh_link_says_that_it_does_not_come() {
        let mut order = ActorOrder::new(1, false, 10, &[]);
        assert_eq!(push(&mut order, 1, 2), []);
        assert_eq!(order.place(key(1, 2)), Some(CallPlace::Early));
        assert_eq!(push(&mut order, 1, 1), [run(1, 1), run(1, 2)]);
        assert_eq!(push(&mut order, 1, 5), []);
        assert_eq!(step(&mut order, |o, out| o.hello(worker(1), 5, out)), [run(1, 5)]);
        assert_eq!(
            push(&mut order, 1, 3),
            [duplicate(1, 3, SeenState::Finished)],
            "given up by its caller"
        );
    }

    #[test]
    fn what_a_caller_gave_up_before_it_started_does_not_start() {
        let mut order = ActorOrder::new(1, false, 1, &[]);
        push(&mut order, 1, 1);
        push(&mut order, 1, 2);
        push(&mut order, 2, 1);
        assert_eq!(
            step(&mut order, |o, out| o.hello(worker(1), 3, out)),
            [refuse(1, 2, RefusalReason::GivenUp)]
        );
        assert_eq!(
            step(&mut order, |o, out| o.hello(worker(1), 2, out)),
            [],
            "an older link's word"
        );
        assert_eq!(push(&mut order, 1, 3), []);
        assert_eq!(finish(&mut order, 1, 1), [run(2, 1)]);
    }

    #[test]
    fn groups_have_limits_of_their_own() {
        let mut order = ActorOrder::new(1, false, 2, &[("io".to_owned(), 1)]);
        let io = |sequence| OrderCommand::Run {
            key: key(1, sequence),
            task: task(sequence as u8),
            group: "io".into(),
        };
        assert_eq!(step(&mut order, |o, out| o.push(call(1, 1, "io", true), out)), [io(1)]);
        assert_eq!(step(&mut order, |o, out| o.push(call(1, 2, "io", true), out)), []);
        assert_eq!(push(&mut order, 1, 3), [run(1, 3)]);
        assert_eq!(push(&mut order, 1, 4), [run(1, 4)]);
        assert_eq!(push(&mut order, 1, 5), []);
        assert_eq!(order.groups().collect::<Vec<_>>(), [("", 2, 2, 1), ("io", 1, 1, 1)]);
        assert_eq!(finish(&mut order, 1, 1), [io(2)]);
        assert_eq!(order.running(), 3);
        let unknown = step(&mut order, |o, out| o.push(call(1, 6, "what", true), out));
        assert_eq!(unknown, [], "it joins the default group, which is full");
        assert_eq!(order.find(task(6)), Some(CallPlace::Queued));
    }

    #[test]
    fn arguments_under_way_hold_back_their_caller_and_nobody_else() {
        let mut order = ActorOrder::new(1, false, 10, &[]);
        assert_eq!(step(&mut order, |o, out| o.push(call(1, 1, "", false), out)), []);
        assert_eq!(push(&mut order, 1, 2), []);
        assert_eq!(push(&mut order, 2, 1), [run(2, 1)]);
        assert_eq!(order.place(key(1, 1)), Some(CallPlace::WaitsForArguments));
        assert_eq!(
            step(&mut order, |o, out| o.ready(key(1, 1), out)),
            [run(1, 1), run(1, 2)]
        );
        // An early call's arguments may come first.
        step(&mut order, |o, out| o.push(call(1, 4, "", false), out));
        step(&mut order, |o, out| o.ready(key(1, 4), out));
        assert_eq!(push(&mut order, 1, 3), [run(1, 3), run(1, 4)]);
    }

    #[test]
    fn out_of_order_execution_starts_whatever_is_ready_and_still_runs_nothing_twice() {
        let mut order = ActorOrder::new(1, true, 10, &[]);
        assert_eq!(step(&mut order, |o, out| o.push(call(1, 3, "", false), out)), []);
        assert_eq!(push(&mut order, 1, 2), [run(1, 2)]);
        assert_eq!(push(&mut order, 1, 2), [duplicate(1, 2, SeenState::Unfinished)]);
        assert_eq!(push(&mut order, 1, 1), [run(1, 1)]);
        assert_eq!(step(&mut order, |o, out| o.ready(key(1, 3), out)), [run(1, 3)]);
        finish(&mut order, 1, 3);
        assert_eq!(push(&mut order, 1, 3), [duplicate(1, 3, SeenState::Finished)]);
    }

    #[test]
    fn a_cancelled_call_leaves_no_gap() {
        let mut order = ActorOrder::new(1, false, 1, &[]);
        push(&mut order, 1, 1);
        push(&mut order, 1, 2);
        push(&mut order, 1, 4);
        let mut place = None;
        let commands = step(&mut order, |o, out| place = o.cancel(task(2), out));
        assert_eq!(
            (place, commands),
            (Some(CallPlace::Queued), vec![refuse(1, 2, RefusalReason::Cancelled)])
        );
        let commands = step(&mut order, |o, out| place = o.cancel(task(4), out));
        assert_eq!(
            (place, commands),
            (Some(CallPlace::Early), vec![refuse(1, 4, RefusalReason::Cancelled)])
        );
        step(&mut order, |o, out| place = o.cancel(task(1), out));
        assert_eq!(place, Some(CallPlace::Running));
        push(&mut order, 1, 3);
        push(&mut order, 1, 5);
        assert_eq!(finish(&mut order, 1, 1), [run(1, 3)]);
        assert_eq!(finish(&mut order, 1, 3), [run(1, 5)]);
        step(&mut order, |o, out| assert_eq!(o.cancel(task(9), out), None));
    }

    #[test]
    fn a_dead_callers_waiting_calls_are_dropped_and_its_running_one_ends() {
        let mut order = ActorOrder::new(1, false, 1, &[]);
        push(&mut order, 1, 1);
        push(&mut order, 1, 2);
        push(&mut order, 1, 4);
        push(&mut order, 2, 1);
        let commands = step(&mut order, |o, out| o.caller_died(worker(1), out));
        assert_eq!(
            commands,
            [4, 2].map(|sequence| refuse(1, sequence, RefusalReason::CallerDied))
        );
        assert_eq!(push(&mut order, 1, 3), [refuse(1, 3, RefusalReason::CallerDied)]);
        assert_eq!(finish(&mut order, 1, 1), [run(2, 1)]);
        finish(&mut order, 2, 1);
        assert_eq!(order.unfinished(), 0);
    }

    #[test]
    fn an_actor_that_leaves_refuses_what_waits_and_what_comes() {
        let mut order = ActorOrder::new(1, false, 1, &[]);
        push(&mut order, 1, 1);
        push(&mut order, 1, 2);
        assert_eq!(
            step(&mut order, |o, out| o.exit(out)),
            [refuse(1, 2, RefusalReason::Exiting)]
        );
        assert_eq!(push(&mut order, 1, 3), [refuse(1, 3, RefusalReason::Exiting)]);
        assert_eq!(finish(&mut order, 1, 1), []);
        assert_eq!(order.unfinished(), 0);
    }
}
