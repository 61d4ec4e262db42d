//! Seeds of the simulator.
//!
//! `RAY_SIM_SEED=n` runs that seed alone and prints its events where it fails; `RAY_SIM_SEEDS=n` runs so many instead of
//! 200; `RAY_SIM_MUTATION=name` plants a fault.

use ray_sim::{Config, Mutation, Summary, World};
use std::panic::{catch_unwind, AssertUnwindSafe};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn mutation() -> Option<Mutation> {
    let name = std::env::var("RAY_SIM_MUTATION").ok()?;
    let known = Mutation::ALL.iter().find(|mutation| format!("{mutation:?}") == name);
    Some(*known.unwrap_or_else(|| panic!("no mutation is called {name:?}: {:?}", Mutation::ALL)))
}

fn run(seed: u64, mutation: Option<Mutation>, trace: bool) -> Result<Summary, String> {
    let config = Config { seed, mutation, trace };
    catch_unwind(AssertUnwindSafe(|| World::new(config).run())).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| "a panic".into());
        Err(format!("a machine panicked: {text}"))
    })
}

#[test]
fn every_seed_ends_with_nothing_lost_nothing_twice_and_nothing_left() {
    if let Some(seed) = number("RAY_SIM_SEED") {
        match run(seed, mutation(), true) {
            Ok(summary) => println!("seed {seed}: {summary:?}"),
            Err(report) => panic!("seed {seed}:\n{report}"),
        }
        return;
    }
    let seeds = number("RAY_SIM_SEEDS").unwrap_or(200);
    let mut failures = Vec::new();
    let mut total = Summary::default();
    for seed in 1..=seeds {
        match run(seed, mutation(), false) {
            Ok(summary) => total = total + summary,
            Err(violation) => failures.push((seed, violation)),
        }
    }
    println!("{seeds} seeds: {total:?}");
    assert!(
        total.deaths > seeds && total.link_breaks > seeds / 4 && total.calls > 5 * seeds,
        "too little happened: {total:?}"
    );
    for (seed, violation) in &failures {
        let shown: String = violation.chars().take(600).collect();
        println!("seed {seed}: {shown}\n    RAY_SIM_SEED={seed} cargo test -p ray-sim --test seeds");
    }
    let which: Vec<u64> = failures.iter().map(|(seed, _)| *seed).collect();
    assert!(
        failures.is_empty(),
        "{} of {seeds} seeds failed: {which:?}",
        failures.len()
    );
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in [3, 5, 11] {
        assert_eq!(run(seed, None, false), run(seed, None, false));
    }
}
