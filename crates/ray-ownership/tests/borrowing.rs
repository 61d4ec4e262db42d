//! The rules of borrowing, one after the other, between tables that are wired by hand.

use ray_ids::{ActorId, JobId, NodeId, ObjectId, TaskId, WorkerId};
use ray_ownership::references::Cover;
use ray_ownership::{ReferenceCommand, ReferenceTable};

type Table = ReferenceTable<()>;

fn worker(number: u8) -> WorkerId {
    WorkerId::from_array([number; 28])
}

fn task(number: u8) -> TaskId {
    TaskId::of(ActorId::nil_in(JobId::from_int(1)), [number; 8])
}

fn object(number: u8) -> ObjectId {
    ObjectId::of(task(number), 1)
}

/// Runs a step, checks the invariants, and gives the commands without the wishes to watch somebody.
fn step(table: &mut Table, act: impl FnOnce(&mut Table, &mut Vec<ReferenceCommand>)) -> Vec<ReferenceCommand> {
    let mut commands = Vec::new();
    act(table, &mut commands);
    table.validate().unwrap();
    commands.retain(|command| !matches!(command, ReferenceCommand::Watch { .. }));
    commands
}

fn freed(object: ObjectId) -> Vec<ReferenceCommand> {
    vec![
        ReferenceCommand::FreeValue { object, nodes: vec![] },
        ReferenceCommand::ReleaseLineage { object },
    ]
}

fn add(owner: WorkerId, object: ObjectId, borrower: WorkerId, generation: u64) -> ReferenceCommand {
    ReferenceCommand::AddBorrower {
        owner,
        object,
        borrower,
        generation,
    }
}

const OWNER: u8 = 1;
const CALLER: u8 = 2;
const BORROWER: u8 = 3;

/// A caller that is a registered borrower of `object(9)`, owned by `OWNER`.
fn registered_caller() -> (Table, ObjectId) {
    let mut caller = Table::new(worker(CALLER));
    let o = object(9);
    caller.own(object(8), ());
    step(&mut caller, |t, c| {
        t.borrow(o, worker(OWNER), Cover::Outer(object(8)), (), c)
    });
    step(&mut caller, |t, c| t.borrower_added(o, worker(CALLER), 1, c));
    step(&mut caller, |t, c| t.remove_local(&object(8), c));
    (caller, o)
}

/// The caller's count must last until the owner has read what this process relays for another one.
#[test]
fn a_borrow_with_relays_under_way_is_listed_at_the_end_of_its_task() {
    let mut borrower = Table::new(worker(BORROWER));
    let (o, other) = (object(9), worker(4));
    step(&mut borrower, |t, c| {
        t.borrow(o, worker(OWNER), Cover::Task(task(1)), (), c)
    });
    // A call of it that had the reference as an argument replies: its worker keeps it, and returns it as well.
    let commands = step(&mut borrower, |t, c| t.relay_borrow(o, other, 1, c));
    assert_eq!(commands, [add(worker(OWNER), o, other, 1)]);
    let cover = Cover::Return {
        task: task(2),
        worker: other,
    };
    let commands = step(&mut borrower, |t, c| t.borrow(o, worker(OWNER), cover, (), c));
    assert_eq!(commands, [add(worker(OWNER), o, worker(BORROWER), 1)]);
    assert_eq!(borrower.end_of_cover(task(1)), [(o, worker(OWNER), 1)]);
    borrower.validate().unwrap();
    // Where nothing is relayed, and once the owner has answered, there is nothing to list.
    step(&mut borrower, |t, c| {
        t.borrow(object(7), worker(OWNER), Cover::Task(task(3)), (), c)
    });
    step(&mut borrower, |t, c| t.borrow(object(7), worker(OWNER), cover, (), c));
    step(&mut borrower, |t, c| {
        t.borrower_added(object(7), worker(BORROWER), 2, c)
    });
    assert_eq!(borrower.end_of_cover(task(3)), []);
}

#[test]
fn an_owned_object_is_freed_everywhere_with_its_last_count() {
    let mut owner = Table::new(worker(OWNER));
    let (o, node) = (object(1), NodeId::from_array([7; 28]));
    owner.own(o, ());
    assert!(owner.add_location(&o, node));
    assert!(owner.add_local(&o));
    assert_eq!(step(&mut owner, |t, c| t.remove_local(&o, c)), []);
    assert_eq!(
        step(&mut owner, |t, c| t.remove_local(&o, c)),
        [
            ReferenceCommand::FreeValue {
                object: o,
                nodes: vec![node]
            },
            ReferenceCommand::ReleaseLineage { object: o }
        ]
    );
    assert!(owner.is_quiet());
    assert!(
        !owner.add_location(&o, node),
        "a copy that shows up late is to be freed"
    );
}

#[test]
fn an_argument_that_the_task_does_not_keep_costs_no_message() {
    let mut borrower = Table::new(worker(BORROWER));
    let o = object(1);
    assert_eq!(
        step(&mut borrower, |t, c| t.borrow(
            o,
            worker(OWNER),
            Cover::Task(task(2)),
            (),
            c
        )),
        []
    );
    let dropped = step(&mut borrower, |t, c| t.remove_local(&o, c));
    assert_eq!(
        dropped,
        [ReferenceCommand::FreeValue {
            object: o,
            nodes: vec![]
        }]
    );
    assert_eq!(borrower.end_of_cover(task(2)), []);
    assert!(borrower.is_quiet());
}

#[test]
fn an_argument_that_is_kept_is_listed_once_and_its_end_is_told() {
    let mut owner = Table::new(worker(OWNER));
    let mut borrower = Table::new(worker(BORROWER));
    let o = object(1);
    owner.own(o, ());
    owner.add_submitted(&o);
    step(&mut borrower, |t, c| {
        t.borrow(o, worker(OWNER), Cover::Task(task(2)), (), c)
    });
    // The program's own reference goes while the call runs: the argument's count keeps the object.
    assert_eq!(step(&mut owner, |t, c| t.remove_local(&o, c)), []);
    let retained = borrower.end_of_cover(task(2));
    assert_eq!(retained, [(o, worker(OWNER), 1)]);
    assert_eq!(borrower.end_of_cover(task(2)), []);
    // The reply: first the borrow, then the argument's count.
    assert_eq!(step(&mut owner, |t, c| t.relay_borrow(o, worker(BORROWER), 1, c)), []);
    assert_eq!(step(&mut owner, |t, c| t.remove_submitted(&o, c)), []);
    let dropped = step(&mut borrower, |t, c| t.remove_local(&o, c));
    assert_eq!(
        dropped[0],
        ReferenceCommand::RemoveBorrower {
            owner: worker(OWNER),
            object: o,
            generation: 1
        }
    );
    assert_eq!(
        step(&mut owner, |t, c| t.remove_borrower(o, worker(BORROWER), 1, c)),
        freed(o)
    );
    assert!(owner.is_quiet() && borrower.is_quiet());
}

#[test]
fn what_another_running_task_covers_is_listed_by_the_last_of_them() {
    let mut borrower = Table::new(worker(BORROWER));
    let o = object(1);
    for number in [2, 3] {
        step(&mut borrower, |t, c| {
            t.borrow(o, worker(OWNER), Cover::Task(task(number)), (), c)
        });
    }
    assert_eq!(
        borrower.end_of_cover(task(2)),
        [],
        "the other task's caller counts on it still"
    );
    borrower.validate().unwrap();
    assert_eq!(borrower.end_of_cover(task(3)), [(o, worker(OWNER), 1)]);
}

#[test]
fn a_caller_that_borrows_itself_has_the_owner_note_the_worker_and_counts_until_then() {
    let (mut caller, o) = registered_caller();
    caller.add_submitted(&o);
    step(&mut caller, |t, c| t.remove_local(&o, c));
    assert_eq!(
        step(&mut caller, |t, c| t.relay_borrow(o, worker(BORROWER), 5, c)),
        [add(worker(OWNER), o, worker(BORROWER), 5)]
    );
    assert_eq!(
        step(&mut caller, |t, c| t.relay_borrow(o, worker(BORROWER), 5, c)),
        [],
        "a second time changes nothing"
    );
    assert_eq!(
        step(&mut caller, |t, c| t.remove_submitted(&o, c)),
        [],
        "held until the owner has noted the worker"
    );
    let acknowledged = step(&mut caller, |t, c| t.borrower_added(o, worker(BORROWER), 5, c));
    assert_eq!(
        acknowledged[0],
        ReferenceCommand::RemoveBorrower {
            owner: worker(OWNER),
            object: o,
            generation: 1
        }
    );
    assert_eq!(
        step(&mut caller, |t, c| t.borrower_added(o, worker(BORROWER), 5, c)),
        []
    );
    assert!(caller.is_quiet());
}

#[test]
fn a_reference_inside_an_object_registers_at_once_and_holds_the_outer_one_until_the_answer() {
    let mut table = Table::new(worker(BORROWER));
    let (outer, inner) = (object(1), object(2));
    table.own(outer, ());
    assert_eq!(
        step(&mut table, |t, c| t.borrow(
            inner,
            worker(OWNER),
            Cover::Outer(outer),
            (),
            c
        )),
        [add(worker(OWNER), inner, worker(BORROWER), 1)]
    );
    assert!(table.is_registering(&inner));
    assert_eq!(step(&mut table, |t, c| t.remove_local(&outer, c)), [], "held");
    assert_eq!(
        step(&mut table, |t, c| t.borrower_added(inner, worker(BORROWER), 1, c)),
        freed(outer)
    );
    assert!(!table.is_registering(&inner));
}

#[test]
fn an_answer_to_an_earlier_borrow_does_not_let_the_later_ones_cover_go() {
    let mut table = Table::new(worker(BORROWER));
    let (first, second, inner) = (object(1), object(2), object(3));
    table.own(first, ());
    table.own(second, ());
    step(&mut table, |t, c| {
        t.borrow(inner, worker(OWNER), Cover::Outer(first), (), c)
    });
    step(&mut table, |t, c| t.remove_local(&inner, c));
    step(&mut table, |t, c| {
        t.borrow(inner, worker(OWNER), Cover::Outer(second), (), c)
    });
    step(&mut table, |t, c| t.borrower_added(inner, worker(BORROWER), 1, c));
    assert_eq!(
        step(&mut table, |t, c| t.remove_local(&second, c)),
        [],
        "generation 2 is not acknowledged"
    );
    assert_eq!(
        step(&mut table, |t, c| t.borrower_added(inner, worker(BORROWER), 2, c)),
        freed(second)
    );
}

#[test]
fn a_covered_reference_that_comes_out_of_an_object_too_is_registered_and_not_listed() {
    let mut table = Table::new(worker(BORROWER));
    let (outer, inner) = (object(1), object(2));
    step(&mut table, |t, c| {
        t.borrow(outer, worker(CALLER), Cover::Task(task(6)), (), c)
    });
    step(&mut table, |t, c| {
        t.borrow(inner, worker(OWNER), Cover::Task(task(5)), (), c)
    });
    let commands = step(&mut table, |t, c| {
        t.borrow(inner, worker(OWNER), Cover::Outer(outer), (), c)
    });
    assert_eq!(commands, [add(worker(OWNER), inner, worker(BORROWER), 2)]);
    assert_eq!(table.end_of_cover(task(5)), []);
    table.validate().unwrap();
}

#[test]
fn a_covered_reference_read_back_from_an_object_of_our_own_is_still_listed() {
    let mut table = Table::new(worker(BORROWER));
    let (outer, inner) = (object(1), object(2));
    step(&mut table, |t, c| {
        t.borrow(inner, worker(OWNER), Cover::Task(task(5)), (), c)
    });
    table.own(outer, ());
    table.contain(outer, &[inner]);
    // Holding the outer object holds nothing that the caller does not hold: the reply must list the borrow.
    assert_eq!(
        step(&mut table, |t, c| t.borrow(
            inner,
            worker(OWNER),
            Cover::Outer(outer),
            (),
            c
        )),
        []
    );
    assert_eq!(table.end_of_cover(task(5)), [(inner, worker(OWNER), 1)]);
}

#[test]
fn returned_references_are_held_until_the_caller_acknowledges() {
    let mut executor = Table::new(worker(BORROWER));
    let mut caller = Table::new(worker(CALLER));
    let (inner, t) = (object(3), task(2));
    let result = ObjectId::of(t, 1);
    caller.own(result, ());
    executor.own(inner, ());
    step(&mut executor, |x, c| x.hold_return(t, worker(CALLER), &[inner], c));
    assert_eq!(
        step(&mut executor, |x, c| x.remove_local(&inner, c)),
        [],
        "the call's frame is gone; the hold stays"
    );
    // The caller reads the reply.
    let cover = Cover::Return {
        task: t,
        worker: worker(BORROWER),
    };
    assert_eq!(
        step(&mut caller, |x, c| x.borrow(inner, worker(BORROWER), cover, (), c)),
        [add(worker(BORROWER), inner, worker(CALLER), 1)]
    );
    caller.contain(result, &[inner]);
    step(&mut caller, |x, c| x.remove_local(&inner, c));
    assert_eq!(
        step(&mut caller, |x, c| x.returns_read(t, worker(BORROWER), c)),
        [],
        "the registration is under way"
    );
    assert!({
        let mut commands = Vec::new();
        executor.add_borrower(inner, worker(CALLER), 1, &mut commands)
    });
    assert_eq!(
        step(&mut caller, |x, c| x.borrower_added(inner, worker(CALLER), 1, c)),
        [ReferenceCommand::AcknowledgeReturns {
            worker: worker(BORROWER),
            task: t
        }]
    );
    assert_eq!(step(&mut executor, |x, c| x.returns_acknowledged(t, c)), []);
    let dropped = step(&mut caller, |x, c| x.remove_local(&result, c));
    assert!(dropped.contains(&ReferenceCommand::RemoveBorrower {
        owner: worker(BORROWER),
        object: inner,
        generation: 1
    }));
    assert_eq!(
        step(&mut executor, |x, c| x.remove_borrower(inner, worker(CALLER), 1, c)),
        freed(inner)
    );
    assert!(caller.is_quiet() && executor.is_quiet());
}

#[test]
fn returns_whose_contents_the_caller_owns_are_acknowledged_at_once() {
    let mut caller = Table::new(worker(CALLER));
    let (inner, t) = (object(3), task(2));
    caller.own(inner, ());
    let cover = Cover::Return {
        task: t,
        worker: worker(BORROWER),
    };
    assert_eq!(
        step(&mut caller, |x, c| x.borrow(inner, worker(CALLER), cover, (), c)),
        []
    );
    assert_eq!(
        step(&mut caller, |x, c| x.returns_read(t, worker(BORROWER), c)),
        [ReferenceCommand::AcknowledgeReturns {
            worker: worker(BORROWER),
            task: t
        }]
    );
}

#[test]
fn the_owner_takes_messages_in_any_order_and_any_number() {
    let mut owner = Table::new(worker(OWNER));
    let o = object(1);
    owner.own(o, ());
    // The end overtakes the beginning.
    step(&mut owner, |t, c| t.remove_borrower(o, worker(BORROWER), 1, c));
    step(&mut owner, |t, c| assert!(t.add_borrower(o, worker(BORROWER), 1, c)));
    assert_eq!(owner.get(&o).unwrap().counts().4, 0, "generation 1 is over");
    // A later borrow counts; the first one's messages, repeated, change nothing.
    step(&mut owner, |t, c| assert!(t.add_borrower(o, worker(BORROWER), 2, c)));
    step(&mut owner, |t, c| assert!(t.add_borrower(o, worker(BORROWER), 1, c)));
    step(&mut owner, |t, c| t.remove_borrower(o, worker(BORROWER), 1, c));
    assert_eq!(owner.get(&o).unwrap().counts().4, 1);
    assert_eq!(step(&mut owner, |t, c| t.remove_local(&o, c)), []);
    assert_eq!(
        step(&mut owner, |t, c| t.remove_borrower(o, worker(BORROWER), 2, c)),
        freed(o)
    );
    assert_eq!(
        step(&mut owner, |t, c| t.remove_borrower(o, worker(BORROWER), 2, c)),
        []
    );
    step(&mut owner, |t, c| {
        assert!(!t.add_borrower(o, worker(BORROWER), 3, c), "it is gone")
    });
    assert!(owner.is_quiet());
}

#[test]
fn contents_live_as_long_as_the_object_that_holds_them() {
    let mut owner = Table::new(worker(OWNER));
    let (outer, inner) = (object(1), object(2));
    owner.own(inner, ());
    owner.own(outer, ());
    owner.contain(outer, &[inner, inner, object(77)]);
    assert_eq!(step(&mut owner, |t, c| t.remove_local(&inner, c)), []);
    let commands = step(&mut owner, |t, c| t.remove_local(&outer, c));
    assert_eq!(commands, [freed(outer), freed(inner)].concat());
    assert!(owner.is_quiet());
}

#[test]
fn a_chain_of_a_hundred_thousand_references_is_freed_without_recursion() {
    let mut owner = Table::new(worker(OWNER));
    let at = |index: u32| ObjectId::of(task(1), index);
    owner.own(at(0), ());
    let mut commands = Vec::new();
    for index in 1..100_000 {
        owner.own(at(index), ());
        owner.contain(at(index), &[at(index - 1)]);
        owner.remove_local(&at(index - 1), &mut commands);
    }
    assert_eq!(commands, []);
    // A thread with a small stack: recursion would end the process.
    let freed = std::thread::Builder::new()
        .stack_size(128 * 1024)
        .spawn(move || {
            owner.remove_local(&at(99_999), &mut commands);
            (owner.is_quiet(), commands.len())
        })
        .unwrap();
    assert_eq!(freed.join().unwrap(), (true, 200_000));
}

#[test]
fn a_dead_borrower_counts_no_more_and_its_late_relay_does_not_bring_it_back() {
    let mut owner = Table::new(worker(OWNER));
    let o = object(1);
    owner.own(o, ());
    step(&mut owner, |t, c| assert!(t.add_borrower(o, worker(BORROWER), 1, c)));
    step(&mut owner, |t, c| t.worker_died(worker(BORROWER), c));
    step(&mut owner, |t, c| assert!(t.add_borrower(o, worker(BORROWER), 1, c)));
    assert_eq!(step(&mut owner, |t, c| t.remove_local(&o, c)), freed(o));
    assert!(owner.is_quiet());
}

#[test]
fn a_borrower_unknown_until_its_death_was_told_is_watched_again() {
    let mut owner = Table::new(worker(OWNER));
    let o = object(1);
    owner.own(o, ());
    let mut commands = Vec::new();
    owner.add_borrower(o, worker(BORROWER), 1, &mut commands);
    assert_eq!(
        commands,
        [ReferenceCommand::Watch {
            worker: worker(BORROWER)
        }]
    );
    step(&mut owner, |t, c| t.worker_died(worker(BORROWER), c));
    owner.own(object(2), ());
    commands.clear();
    owner.add_borrower(object(2), worker(BORROWER), 2, &mut commands);
    assert_eq!(
        commands,
        [ReferenceCommand::Watch {
            worker: worker(BORROWER)
        }]
    );
}

#[test]
fn a_dead_caller_lets_go_of_what_its_returns_held() {
    let mut executor = Table::new(worker(BORROWER));
    let inner = object(3);
    executor.own(inner, ());
    step(&mut executor, |t, c| {
        t.hold_return(task(2), worker(CALLER), &[inner], c)
    });
    step(&mut executor, |t, c| t.remove_local(&inner, c));
    assert_eq!(
        step(&mut executor, |t, c| t.worker_died(worker(CALLER), c)),
        freed(inner)
    );
    assert!(executor.is_quiet());
}

#[test]
fn a_dead_owner_is_told_nothing_and_holds_nobody_up() {
    let (mut caller, o) = registered_caller();
    let outer = object(5);
    caller.own(outer, ());
    let inner = object(6);
    step(&mut caller, |t, c| {
        t.borrow(inner, worker(OWNER), Cover::Outer(outer), (), c)
    });
    step(&mut caller, |t, c| t.remove_local(&outer, c));
    step(&mut caller, |t, c| t.relay_borrow(o, worker(BORROWER), 5, c));
    let commands = step(&mut caller, |t, c| t.worker_died(worker(OWNER), c));
    assert!(commands.contains(&ReferenceCommand::OwnerDied { object: o }));
    assert!(commands.contains(&ReferenceCommand::OwnerDied { object: inner }));
    assert!(commands.contains(&ReferenceCommand::FreeValue {
        object: outer,
        nodes: vec![]
    }));
    assert!(caller.get(&o).unwrap().owner_is_dead());
    // A relay to the dead owner would be held for ever.
    assert_eq!(step(&mut caller, |t, c| t.relay_borrow(o, worker(BORROWER), 6, c)), []);
    for object in [o, inner] {
        let commands = step(&mut caller, |t, c| t.remove_local(&object, c));
        assert_eq!(
            commands,
            [ReferenceCommand::FreeValue { object, nodes: vec![] }],
            "no word to the dead"
        );
    }
    assert!(caller.is_quiet());
}

#[test]
fn an_owner_that_dies_while_returns_are_registered_does_not_block_the_acknowledgement() {
    let mut caller = Table::new(worker(CALLER));
    let (inner, t) = (object(3), task(2));
    let cover = Cover::Return {
        task: t,
        worker: worker(BORROWER),
    };
    step(&mut caller, |x, c| x.borrow(inner, worker(OWNER), cover, (), c));
    step(&mut caller, |x, c| x.returns_read(t, worker(BORROWER), c));
    let commands = step(&mut caller, |x, c| x.worker_died(worker(OWNER), c));
    assert!(commands.contains(&ReferenceCommand::AcknowledgeReturns {
        worker: worker(BORROWER),
        task: t
    }));
}

#[test]
fn a_reference_of_our_own_that_comes_back_after_it_was_freed_is_lost_and_asks_nobody() {
    let mut owner = Table::new(worker(OWNER));
    let o = object(1);
    let commands = step(&mut owner, |t, c| {
        t.borrow(o, worker(OWNER), Cover::Task(task(2)), (), c)
    });
    assert_eq!(commands, [ReferenceCommand::OwnerDied { object: o }]);
    assert_eq!(owner.end_of_cover(task(2)), []);
    let commands = step(&mut owner, |t, c| t.remove_local(&o, c));
    assert_eq!(
        commands,
        [ReferenceCommand::FreeValue {
            object: o,
            nodes: vec![]
        }]
    );
    assert!(owner.is_quiet());
}

#[test]
fn what_a_process_keeps_of_its_own_call_needs_no_relay() {
    let (mut caller, o) = registered_caller();
    caller.add_submitted(&o);
    assert_eq!(step(&mut caller, |t, c| t.relay_borrow(o, worker(CALLER), 1, c)), []);
    step(&mut caller, |t, c| t.remove_submitted(&o, c));
    step(&mut caller, |t, c| t.remove_local(&o, c));
    assert!(caller.is_quiet());
}

#[test]
fn lineage_keeps_the_entry_and_not_the_value() {
    let mut owner = Table::new(worker(OWNER));
    let (argument, o) = (object(1), object(2));
    owner.own(argument, ());
    owner.own(o, ());
    owner.add_lineage(&argument);
    assert_eq!(
        step(&mut owner, |t, c| t.remove_local(&argument, c)),
        [ReferenceCommand::FreeValue {
            object: argument,
            nodes: vec![]
        }]
    );
    assert!(owner.is_freed(&argument));
    // The value is made again for a rebuild, and let go afterwards.
    owner.revive(&argument);
    owner.add_submitted(&argument);
    assert!(!owner.is_freed(&argument));
    assert_eq!(
        step(&mut owner, |t, c| t.remove_submitted(&argument, c)),
        [ReferenceCommand::FreeValue {
            object: argument,
            nodes: vec![]
        }]
    );
    assert_eq!(
        step(&mut owner, |t, c| t.remove_lineage(&argument, c)),
        [ReferenceCommand::ReleaseLineage { object: argument }]
    );
    step(&mut owner, |t, c| t.remove_local(&o, c));
    assert!(owner.is_quiet());
}

#[test]
fn a_borrower_whose_caller_died_tells_the_owner_itself() {
    let mut borrower = Table::new(worker(BORROWER));
    let (kept, dropped, of_the_caller) = (object(9), object(10), object(11));
    for (o, owner) in [(kept, OWNER), (dropped, OWNER), (of_the_caller, CALLER)] {
        step(&mut borrower, |t, c| {
            t.borrow(o, worker(owner), Cover::Task(task(1)), (), c)
        });
    }
    let mut retained = borrower.end_of_cover(task(1));
    retained.sort_unstable();
    assert_eq!(retained.len(), 3);
    assert_eq!(
        step(&mut borrower, |t, c| t.passed_by(worker(CALLER), &retained, c)),
        [],
        "the caller is trusted while it lives"
    );
    step(&mut borrower, |t, c| t.remove_local(&dropped, c));
    let died = step(&mut borrower, |t, c| t.worker_died(worker(CALLER), c));
    assert_eq!(
        died,
        [
            ReferenceCommand::OwnerDied { object: of_the_caller },
            add(worker(OWNER), kept, worker(BORROWER), 1)
        ]
    );
    step(&mut borrower, |t, c| t.borrower_added(kept, worker(BORROWER), 1, c));
    assert!(!borrower.is_registering(&kept));
    step(&mut borrower, |t, c| t.remove_local(&kept, c));
    step(&mut borrower, |t, c| t.remove_local(&of_the_caller, c));
    assert!(borrower.is_quiet());
}

#[test]
fn what_a_caller_passed_and_is_over_is_forgotten() {
    let mut borrower = Table::new(worker(BORROWER));
    let o = object(9);
    for call in 0..1000u64 {
        let task = TaskId::of(ActorId::nil_in(JobId::from_int(1)), (call + 100).to_le_bytes());
        step(&mut borrower, |t, c| {
            t.borrow(o, worker(OWNER), Cover::Task(task), (), c)
        });
        let retained = borrower.end_of_cover(task);
        step(&mut borrower, |t, c| t.passed_by(worker(CALLER), &retained, c));
        step(&mut borrower, |t, c| t.remove_local(&o, c));
    }
    assert!(borrower.passed_noted(worker(CALLER)) <= 64);
}
