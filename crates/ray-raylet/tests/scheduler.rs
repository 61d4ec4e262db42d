//! The local scheduler: what it decides, and that its invariants hold after any order of events.

use bytes::Bytes;
use ray_ids::{ActorId, JobId, LeaseId, NodeId, PlacementGroupId, WorkerId};
use ray_raylet::scheduler::LocalScheduler;
use ray_raylet::types::{death, Command, Event, Random, RequestKey, SchedulerConfig, SchedulerLimits};
use ray_sched::{Labels, Quantity, ResourceName, ResourceSet};
use ray_wire::layout::{ERROR_PLACEMENT_GROUP_REMOVED, ERROR_SYSTEM, ERROR_TASK_UNSCHEDULABLE};
use ray_wire::{
    ActorCreated, ActorCreation, BundleKey, CreateActor, KillActorWorker, LeaseSpecification, NodeInfo, ResourceAmount,
    Strategy, DEATH_CRASHED, STRATEGY_NODE_AFFINITY, STRATEGY_PLACEMENT_GROUP,
};
use std::collections::BTreeMap;

fn amounts(list: &[(&str, f64)]) -> Vec<ResourceAmount> {
    list.iter()
        .map(|(name, value)| ResourceAmount {
            name: (*name).into(),
            amount_e4: (value * 10_000.0) as i64,
        })
        .collect()
}

fn specification(function: &str, list: &[(&str, f64)]) -> LeaseSpecification {
    LeaseSpecification {
        job_id: Bytes::copy_from_slice(JobId::from_int(1).as_bytes()),
        resources: amounts(list),
        function_name: function.into(),
        ..Default::default()
    }
}

fn owner(number: u8) -> WorkerId {
    WorkerId::from_array([number; 28])
}

fn node_id(number: u8) -> NodeId {
    NodeId::from_array([number; 28])
}

fn group_id() -> PlacementGroupId {
    PlacementGroupId::from_array([7; 18])
}

/// A scheduler with what it said so far; every step is validated.
struct Bench {
    scheduler: LocalScheduler,
    now: u64,
    grants: Vec<(RequestKey, LeaseId, WorkerId)>,
    starting: Vec<WorkerId>,
    others: Vec<Command>,
}

impl Bench {
    fn new(cpus: u32) -> Self {
        let total = ResourceSet::cpus(cpus).with(ResourceName::GPU, Quantity::from_int(2));
        Self::with(total, SchedulerLimits::default())
    }

    fn with(total: ResourceSet, limits: SchedulerLimits) -> Self {
        let config = SchedulerConfig {
            node_id: node_id(1),
            total,
            labels: Labels::new(),
            random_seed: [1, 2, 3, 4],
            limits,
        };
        let scheduler = LocalScheduler::new(config).unwrap();
        let mut bench = Self {
            scheduler,
            now: 0,
            grants: vec![],
            starting: vec![],
            others: vec![],
        };
        bench.step(Event::Tick);
        bench
    }

    fn step(&mut self, event: Event) {
        let text = format!("{event:?}");
        for command in self.scheduler.step(event, self.now) {
            match command {
                Command::Grant { key, lease, worker, .. } => self.grants.push((key, lease, worker)),
                Command::StartWorker { worker, .. } => self.starting.push(worker),
                other => self.others.push(other),
            }
        }
        if let Err(problem) = self.scheduler.validate() {
            panic!("after {text}: {problem}");
        }
    }

    /// Registers every worker that was started, and those started meanwhile.
    fn register(&mut self) {
        while let Some(worker) = self.starting.pop() {
            self.step(Event::WorkerReady { worker });
        }
    }

    fn request(&mut self, who: u8, correlation: u64, specification: LeaseSpecification) -> RequestKey {
        let key = RequestKey {
            process: owner(who),
            correlation,
        };
        self.step(Event::RequestLease {
            key,
            specification,
            preferred: None,
            redirected: false,
        });
        key
    }

    fn grant_of(&self, key: RequestKey) -> Option<(LeaseId, WorkerId)> {
        self.grants
            .iter()
            .find(|(other, ..)| *other == key)
            .map(|(_, lease, worker)| (*lease, *worker))
    }

    fn said(&self, which: impl Fn(&Command) -> bool) -> usize {
        self.others.iter().filter(|command| which(command)).count()
    }

    fn give_back(&mut self, who: u8, lease: LeaseId) {
        self.step(Event::ReturnLease {
            owner: owner(who),
            lease,
            worker_exits: false,
        });
    }
}

#[test]
fn leases_are_granted_up_to_the_cpus_and_recalled_for_others() {
    let mut bench = Bench::new(2);
    bench.register();
    let first = bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    let second = bench.request(1, 2, specification("f", &[("CPU", 1.0)]));
    let third = bench.request(1, 3, specification("f", &[("CPU", 1.0)]));
    // One worker was ready; the other is started because it is waited for.
    bench.register();
    assert!(bench.grant_of(first).is_some() && bench.grant_of(second).is_some());
    assert_eq!(bench.grant_of(third), None);
    assert_eq!(
        bench.said(|c| matches!(c, Command::Queued { key, infeasible: false, .. } if *key == third)),
        1
    );
    // Its own leases of the class are no help to it.
    assert_eq!(bench.said(|c| matches!(c, Command::Recall { .. })), 0);
    let other = bench.request(2, 1, specification("g", &[("CPU", 1.0)]));
    let oldest = bench.grant_of(first).unwrap().0;
    assert_eq!(
        bench.said(|c| matches!(c, Command::Recall { .. })),
        0,
        "a fresh lease is in use before its worker says so"
    );
    bench.now += 100;
    bench.step(Event::Tick);
    assert_eq!(
        bench.said(|c| matches!(c, Command::Recall { lease, .. } if *lease == oldest)),
        1
    );
    assert_eq!(
        bench.said(|c| matches!(c, Command::Recall { .. })),
        1,
        "one lease is enough for one request"
    );
    bench.give_back(1, oldest);
    // Both classes wait for it; whose turn it is gets it, and the other gets the next.
    let next = bench.grant_of(second).unwrap().0;
    bench.give_back(1, next);
    assert!(bench.grant_of(other).is_some());
    assert!(bench.grant_of(third).is_some());
}

#[test]
fn a_worker_serves_one_job() {
    let mut bench = Bench::new(1);
    bench.register();
    let key = bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    let (lease, worker) = bench.grant_of(key).unwrap();
    bench.give_back(1, lease);
    let mut foreign = specification("f", &[("CPU", 1.0)]);
    foreign.job_id = Bytes::copy_from_slice(JobId::from_int(2).as_bytes());
    let other = bench.request(2, 1, foreign);
    bench.register();
    assert_ne!(bench.grant_of(other).unwrap().1, worker);
    let (lease, _) = bench.grant_of(other).unwrap();
    bench.give_back(2, lease);
    let again = bench.request(1, 2, specification("f", &[("CPU", 1.0)]));
    assert_eq!(bench.grant_of(again).unwrap().1, worker);
}

#[test]
fn blocked_workers_give_their_cpu_and_take_it_back_below_zero() {
    let mut bench = Bench::new(1);
    bench.register();
    let parent = bench.request(1, 1, specification("parent", &[("CPU", 1.0)]));
    let (lease, worker) = bench.grant_of(parent).unwrap();
    let mut deeper = specification("child", &[("CPU", 1.0)]);
    deeper.depth = 1;
    let child = bench.request(3, 1, deeper.clone());
    assert_eq!(bench.grant_of(child), None);
    bench.step(Event::Blocked {
        worker,
        lease,
        reason: "get".into(),
    });
    bench.register();
    let (child_lease, _) = bench.grant_of(child).unwrap();
    bench.step(Event::Unblocked { worker, lease });
    let next = bench.request(3, 2, deeper);
    bench.give_back(3, child_lease);
    // The debt is paid first.
    assert_eq!(bench.grant_of(next), None);
    bench.give_back(1, lease);
    bench.register();
    assert!(bench.grant_of(next).is_some());
}

#[test]
fn a_dead_worker_breaks_its_lease_with_the_evidence() {
    let mut bench = Bench::new(1);
    bench.register();
    let key = bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    let (lease, worker) = bench.grant_of(key).unwrap();
    bench.step(Event::WorkerGone {
        worker,
        cause: death(DEATH_CRASHED, "x"),
        started_sequence: Some(9),
    });
    let broken =
        |c: &Command| matches!(c, Command::LeaseBroken { lease: l, started_sequence: Some(9), .. } if *l == lease);
    assert_eq!(bench.said(broken), 1);
    assert_eq!(bench.scheduler.available(), bench.scheduler.available());
    let again = bench.request(1, 2, specification("f", &[("CPU", 1.0)]));
    bench.register();
    assert!(bench.grant_of(again).is_some());
}

#[test]
fn a_dead_owner_leaves_nothing() {
    let mut bench = Bench::new(1);
    bench.register();
    let key = bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    bench.request(1, 2, specification("f", &[("CPU", 1.0)]));
    let (_, worker) = bench.grant_of(key).unwrap();
    bench.step(Event::OwnerGone { process: owner(1) });
    assert_eq!(
        bench.said(|c| matches!(c, Command::KillWorker { worker: w, .. } if *w == worker)),
        1
    );
    bench.step(Event::WorkerGone {
        worker,
        cause: death(DEATH_CRASHED, "killed"),
        started_sequence: None,
    });
    assert_eq!(bench.said(|c| matches!(c, Command::LeaseBroken { .. })), 0);
    assert!(bench.scheduler.is_idle());
}

#[test]
fn what_can_never_run_waits_and_says_so_until_a_node_joins() {
    let mut bench = Bench::new(1);
    let key = bench.request(1, 1, specification("f", &[("CPU", 5.0)]));
    let told = |c: &Command| matches!(c, Command::Queued { infeasible: true, reason, .. } if reason.contains("CPU 5"));
    assert_eq!(bench.said(told), 1);
    let joined = NodeInfo {
        address: Some(ray_wire::Address {
            node_id: Bytes::copy_from_slice(node_id(2).as_bytes()),
            ..Default::default()
        }),
        total: amounts(&[("CPU", 8.0)]),
        available: amounts(&[("CPU", 8.0)]),
        alive: true,
        ..Default::default()
    };
    bench.step(Event::ClusterChanged { nodes: vec![joined] });
    assert_eq!(
        bench.said(|c| matches!(c, Command::Redirect { key: k, node } if *k == key && *node == node_id(2))),
        1
    );
    let mut hard = specification("g", &[("CPU", 1.0)]);
    hard.strategy = Some(Strategy {
        kind: STRATEGY_NODE_AFFINITY,
        node_id: Bytes::copy_from_slice(node_id(9).as_bytes()),
        ..Default::default()
    });
    bench.request(1, 2, hard);
    assert_eq!(
        bench.said(|c| matches!(
            c,
            Command::Refuse {
                error_kind: ERROR_TASK_UNSCHEDULABLE,
                ..
            }
        )),
        1
    );
}

fn bundle(index: u32, cpus: f64) -> BundleKey {
    BundleKey {
        placement_group_id: Bytes::copy_from_slice(group_id().as_bytes()),
        index,
        resources: amounts(&[("CPU", cpus)]),
        committed: false,
    }
}

fn in_group(index: i32) -> LeaseSpecification {
    let mut inside = specification("inside", &[("CPU", 1.0)]);
    inside.strategy = Some(Strategy {
        kind: STRATEGY_PLACEMENT_GROUP,
        placement_group_id: Bytes::copy_from_slice(group_id().as_bytes()),
        bundle_index: index,
        ..Default::default()
    });
    inside
}

#[test]
fn bundles_recall_idle_leases_and_take_their_work_with_them() {
    let mut bench = Bench::new(2);
    bench.register();
    let key = bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    let (lease, _) = bench.grant_of(key).unwrap();
    bench.step(Event::PrepareBundles {
        group: group_id(),
        bundles: vec![bundle(0, 2.0)],
        attempt: 1,
    });
    assert_eq!(bench.said(|c| matches!(c, Command::Recall { .. })), 1);
    assert_eq!(bench.said(|c| matches!(c, Command::AnswerBundlesPrepared { .. })), 0);
    bench.give_back(1, lease);
    assert_eq!(
        bench.said(|c| matches!(c, Command::AnswerBundlesPrepared { success: true, .. })),
        1
    );
    bench.step(Event::CommitBundles {
        group: group_id(),
        attempt: 1,
    });
    assert_eq!(bench.said(|c| matches!(c, Command::AnswerBundlesCommitted { .. })), 1);
    let inside = bench.request(1, 2, in_group(0));
    bench.register();
    let (_, worker) = bench.grant_of(inside).unwrap();
    bench.step(Event::ReturnBundles {
        group: group_id(),
        indices: vec![],
    });
    assert_eq!(
        bench.said(|c| matches!(c, Command::KillWorker { worker: w, .. } if *w == worker)),
        1
    );
    bench.step(Event::WorkerGone {
        worker,
        cause: death(DEATH_CRASHED, "killed"),
        started_sequence: None,
    });
    assert_eq!(
        bench.scheduler.available(),
        ResourceSet::cpus(2).with(ResourceName::GPU, Quantity::from_int(2))
    );
    // Nobody knows the group any more: the control plane is asked, and its word ends the wait.
    bench.request(1, 3, in_group(0));
    assert!(bench.said(|c| matches!(c, Command::AskPlacementGroup { .. })) >= 1);
    bench.step(Event::PlacementGroupRemoved { group: group_id() });
    assert_eq!(
        bench.said(|c| matches!(
            c,
            Command::Refuse {
                error_kind: ERROR_PLACEMENT_GROUP_REMOVED,
                ..
            }
        )),
        1
    );
}

#[test]
fn bundles_that_do_not_fit_are_refused_after_a_moment() {
    let mut bench = Bench::new(2);
    bench.register();
    let key = bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    assert!(bench.grant_of(key).is_some());
    bench.step(Event::PrepareBundles {
        group: group_id(),
        bundles: vec![bundle(0, 2.0)],
        attempt: 1,
    });
    bench.now = bench.scheduler.next_tick(bench.now).unwrap().max(300);
    bench.step(Event::Tick);
    assert_eq!(
        bench.said(|c| matches!(c, Command::AnswerBundlesPrepared { success: false, .. })),
        1
    );
    bench.step(Event::PrepareBundles {
        group: group_id(),
        bundles: vec![bundle(0, 3.0)],
        attempt: 2,
    });
    assert_eq!(
        bench.said(|c| matches!(
            c,
            Command::AnswerBundlesPrepared {
                attempt: 2,
                success: false,
                ..
            }
        )),
        1
    );
}

fn actor(unique: u8, incarnation: u64, cpus: f64) -> CreateActor {
    let id = ActorId::of(JobId::from_int(1), [unique; 12]);
    CreateActor {
        actor_id: Bytes::copy_from_slice(id.as_bytes()),
        incarnation,
        creation: Some(ActorCreation {
            resources: amounts(&[("CPU", cpus)]),
            ..Default::default()
        }),
        job_config_json: String::new(),
    }
}

#[test]
fn an_actor_is_created_once_and_answered_again() {
    let mut bench = Bench::new(1);
    bench.register();
    let message = actor(1, 1, 1.0);
    bench.step(Event::PlaceActor {
        message: message.clone(),
    });
    let worker = bench
        .others
        .iter()
        .find_map(|command| match command {
            Command::CreateActor { worker, .. } => Some(*worker),
            _ => None,
        })
        .unwrap();
    bench.step(Event::PlaceActor {
        message: message.clone(),
    });
    let created = ActorCreated {
        actor_id: message.actor_id.clone(),
        incarnation: 1,
        ..Default::default()
    };
    bench.step(Event::ActorAnswered {
        worker,
        message: created,
    });
    bench.step(Event::PlaceActor {
        message: message.clone(),
    });
    assert_eq!(bench.said(|c| matches!(c, Command::CreateActor { .. })), 1);
    assert_eq!(bench.said(|c| matches!(c, Command::AnswerActor(_))), 2);
    // A second actor finds no room, and says so.
    bench.step(Event::PlaceActor {
        message: actor(2, 1, 1.0),
    });
    bench.now += 1_000;
    bench.step(Event::Tick);
    assert_eq!(
        bench.said(|c| matches!(c, Command::AnswerActor(answer) if answer.rejected)),
        1
    );
    let kill = KillActorWorker {
        actor_id: message.actor_id,
        incarnation: 1,
        cause: None,
        graceful: true,
    };
    bench.step(Event::KillActorWorker { message: kill });
    assert_eq!(
        bench.said(|c| matches!(c, Command::AskToExit { worker: w, .. } if *w == worker)),
        1
    );
    bench.now += 60_000;
    bench.step(Event::Tick);
    assert_eq!(
        bench.said(|c| matches!(c, Command::KillWorker { worker: w, .. } if *w == worker)),
        1
    );
    bench.step(Event::WorkerGone {
        worker,
        cause: death(DEATH_CRASHED, "killed"),
        started_sequence: None,
    });
    assert_eq!(
        bench.said(|c| matches!(
            c,
            Command::ReportDeath {
                actor: Some((_, 1)),
                ..
            }
        )),
        1
    );
    assert!(bench.scheduler.is_idle());
}

/// A control plane that does not hear of it would place it a second time.
#[test]
fn an_actor_that_waits_for_room_is_told_as_here() {
    let mut bench = Bench::new(1);
    bench.register();
    bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    bench.step(Event::PlaceActor {
        message: actor(1, 3, 1.0),
    });
    let here = bench.scheduler.actors_here();
    assert_eq!(here.len(), 1);
    assert_eq!(
        (&here[0].actor_id, here[0].incarnation, &here[0].worker),
        (&actor(1, 3, 1.0).actor_id, 3, &None)
    );
}

#[test]
fn workers_that_never_start_are_an_answer_and_no_hang() {
    let mut bench = Bench::new(1);
    let key = bench.request(1, 1, specification("f", &[("CPU", 1.0)]));
    let mut deaths = 0;
    while bench.said(|c| matches!(c, Command::Refuse { .. })) == 0 {
        let worker = bench.starting.pop().expect("a failed worker is followed by another");
        bench.step(Event::WorkerGone {
            worker,
            cause: death(DEATH_CRASHED, "no module"),
            started_sequence: None,
        });
        deaths += 1;
        assert!(deaths < 10);
    }
    let refused = |c: &Command| matches!(c, Command::Refuse { key: k, error_kind: ERROR_SYSTEM, message } if *k == key && message.contains("no module"));
    assert_eq!(bench.said(refused), 1);
}

#[test]
fn a_large_request_is_not_starved_by_small_ones() {
    let mut bench = Bench::new(4);
    bench.register();
    let mut running: Vec<(u8, LeaseId)> = Vec::new();
    let big = RequestKey {
        process: owner(9),
        correlation: 1,
    };
    let mut correlation = 0;
    for round in 0..400 {
        bench.now += 50;
        while running.len() < 4 && correlation < 1_000 {
            correlation += 1;
            let key = bench.request(1, correlation, specification("small", &[("CPU", 1.0)]));
            bench.register();
            match bench.grant_of(key) {
                Some((lease, _)) => running.push((1, lease)),
                None => break,
            }
        }
        if round == 3 {
            bench.request(9, 1, specification("big", &[("CPU", 4.0)]));
        }
        if bench.grant_of(big).is_some() {
            return;
        }
        // One task ends at a time, so that four CPUs are never free by chance.
        if !running.is_empty() {
            let (who, lease) = running.remove(0);
            bench.give_back(who, lease);
            let fresh: Vec<(RequestKey, LeaseId)> = bench
                .grants
                .iter()
                .filter(|(key, ..)| key.process == owner(1))
                .map(|(key, lease, _)| (*key, *lease))
                .collect();
            for (_, lease) in fresh {
                let held = bench.scheduler.active_leases().iter().any(|(id, ..)| *id == lease);
                if held && !running.iter().any(|(_, known)| *known == lease) {
                    running.push((1, lease));
                }
            }
        }
        bench.register();
        bench.step(Event::Tick);
    }
    panic!("the large request waits still");
}

#[test]
fn resources_return_after_any_order_of_events() {
    for seed in 1..=120_u64 {
        random_walk(seed);
    }
}

fn random_walk(seed: u64) {
    let limits = SchedulerLimits {
        maximum_workers: 12,
        ..SchedulerLimits::default()
    };
    let total = ResourceSet::cpus(4).with(ResourceName::GPU, Quantity::from_int(2));
    let mut bench = Bench::with(total.clone(), limits);
    let mut random = Random::new([seed, seed ^ 77, 3, seed << 7]);
    let mut pick = move |limit: u64| random.next_u64() % limit;
    let mut leases: BTreeMap<LeaseId, (u8, WorkerId)> = BTreeMap::new();
    let mut registered: Vec<WorkerId> = Vec::new();
    let mut actors: BTreeMap<u8, u64> = BTreeMap::new();
    let shapes: [&[(&str, f64)]; 5] = [
        &[("CPU", 1.0)],
        &[("CPU", 2.0)],
        &[("CPU", 0.5), ("GPU", 0.5)],
        &[("GPU", 1.0)],
        &[("CPU", 9.0)],
    ];
    let mut correlation = 0;
    for _ in 0..300 {
        bench.now += pick(40);
        match pick(17) {
            0..=4 => {
                correlation += 1;
                let who = 1 + pick(3) as u8;
                let shape = pick(5) as usize;
                let mut wanted = specification(["a", "b", "c", "d", "e"][shape], shapes[shape]);
                wanted.depth = pick(3) as u32;
                let wanted = if pick(5) == 0 {
                    in_group(pick(3) as i32 - 1)
                } else {
                    wanted
                };
                bench.request(who, correlation, wanted);
            }
            5..=6 => bench.register_some(&mut registered, pick(3)),
            7..=8 => {
                if let Some((lease, (who, _))) = leases.iter().nth(pick(8) as usize).map(|(l, o)| (*l, *o)) {
                    leases.remove(&lease);
                    bench.step(Event::ReturnLease {
                        owner: owner(who),
                        lease,
                        worker_exits: pick(6) == 0,
                    });
                }
            }
            9 => {
                if !registered.is_empty() {
                    let worker = registered.swap_remove(pick(registered.len() as u64) as usize);
                    leases.retain(|_, (_, w)| *w != worker);
                    bench.step(Event::WorkerGone {
                        worker,
                        cause: death(DEATH_CRASHED, "x"),
                        started_sequence: None,
                    });
                }
            }
            10 => bench.step(Event::OwnerGone {
                process: owner(1 + pick(3) as u8),
            }),
            11 => {
                if let Some((lease, (_, worker))) = leases.iter().nth(pick(8) as usize).map(|(l, o)| (*l, *o)) {
                    bench.step(Event::Blocked {
                        worker,
                        lease,
                        reason: "get".into(),
                    });
                }
            }
            12 => {
                if let Some((lease, (_, worker))) = leases.iter().nth(pick(8) as usize).map(|(l, o)| (*l, *o)) {
                    bench.step(Event::Unblocked { worker, lease });
                }
            }
            13 => {
                let unique = pick(4) as u8;
                let incarnation = actors.entry(unique).and_modify(|i| *i += 1).or_insert(1);
                let message = actor(unique, *incarnation, 1.0);
                bench.step(Event::PlaceActor { message });
            }
            14 => {
                let unique = pick(4) as u8;
                let actor_id = actor(unique, 1, 1.0).actor_id;
                let graceful = pick(2) == 0;
                bench.step(Event::KillActorWorker {
                    message: KillActorWorker {
                        actor_id,
                        incarnation: 0,
                        cause: None,
                        graceful,
                    },
                });
            }
            15 => match pick(3) {
                0 => bench.step(Event::PrepareBundles {
                    group: group_id(),
                    bundles: vec![bundle(0, 1.0), bundle(1, 1.0)],
                    attempt: 1 + pick(3),
                }),
                1 => bench.step(Event::CommitBundles {
                    group: group_id(),
                    attempt: 1,
                }),
                _ => bench.step(Event::ReturnBundles {
                    group: group_id(),
                    indices: if pick(2) == 0 { vec![] } else { vec![1] },
                }),
            },
            _ => bench.step(Event::CancelRequest {
                key: RequestKey {
                    process: owner(1 + pick(3) as u8),
                    correlation: pick(correlation + 1),
                },
            }),
        }
        // Actors that are being created answer, some with a failure.
        let creating: Vec<(WorkerId, CreateActor)> = bench
            .others
            .iter()
            .filter_map(|command| match command {
                Command::CreateActor { worker, message } => Some((*worker, (**message).clone())),
                _ => None,
            })
            .collect();
        for (key, lease, worker) in std::mem::take(&mut bench.grants) {
            leases.insert(lease, (key.process.as_bytes()[0], worker));
        }
        let killed: Vec<WorkerId> = bench
            .others
            .iter()
            .filter_map(|command| match command {
                Command::KillWorker { worker, .. } | Command::AskToExit { worker, .. } => Some(*worker),
                _ => None,
            })
            .collect();
        bench.others.clear();
        for (worker, message) in creating {
            let failure = (pick(3) == 0).then(|| death(DEATH_CRASHED, "constructor"));
            let answer = ActorCreated {
                actor_id: message.actor_id,
                incarnation: message.incarnation,
                failure,
                ..Default::default()
            };
            bench.step(Event::ActorAnswered {
                worker,
                message: answer,
            });
        }
        for worker in killed {
            registered.retain(|other| *other != worker);
            bench.starting.retain(|other| *other != worker);
            leases.retain(|_, (_, w)| *w != worker);
            bench.step(Event::WorkerGone {
                worker,
                cause: death(DEATH_CRASHED, "killed"),
                started_sequence: None,
            });
        }
    }
    // Whoever asked leaves, whoever works dies: all is free again.
    for who in 1..=3 {
        bench.step(Event::OwnerGone { process: owner(who) });
    }
    bench.step(Event::JobFinished {
        job: JobId::from_int(1),
    });
    bench.step(Event::ReturnBundles {
        group: group_id(),
        indices: vec![],
    });
    bench.now += 100_000;
    bench.step(Event::Tick);
    for worker in registered {
        bench.step(Event::WorkerGone {
            worker,
            cause: death(DEATH_CRASHED, "end"),
            started_sequence: None,
        });
    }
    assert!(
        bench.scheduler.is_idle(),
        "seed {seed}: {:?}",
        bench.scheduler.describe_leases(0)
    );
    assert_eq!(bench.scheduler.available(), total, "seed {seed}");
}

impl Bench {
    fn register_some(&mut self, registered: &mut Vec<WorkerId>, count: u64) {
        for _ in 0..count {
            if let Some(worker) = self.starting.pop() {
                registered.push(worker);
                self.step(Event::WorkerReady { worker });
            }
        }
    }
}
