//! Planted faults: each must be caught by some of the first seeds. Prints which seed caught which.

use ray_sim::{Config, Mutation, World};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Seeds that a mutant may live through.
const SEEDS: u64 = 200;

fn caught_by(mutation: Mutation) -> Option<(u64, String)> {
    (1..=SEEDS).find_map(|seed| {
        let config = Config {
            seed,
            mutation: Some(mutation),
            trace: false,
        };
        let result = catch_unwind(AssertUnwindSafe(|| World::new(config).run()));
        match result {
            Ok(Ok(_)) => None,
            Ok(Err(violation)) => Some((seed, violation)),
            Err(_) => Some((seed, "a machine panicked".into())),
        }
    })
}

#[test]
fn every_mutant_is_caught_by_some_seed() {
    let mut alive = Vec::new();
    for mutation in Mutation::ALL {
        match caught_by(*mutation) {
            Some((seed, violation)) => {
                let shown: String = violation.chars().take(160).collect();
                println!("{:<34} seed {seed:>3}: {shown}", format!("{mutation:?}"));
            }
            None => alive.push(mutation),
        }
    }
    assert!(Mutation::ALL.len() >= 20);
    assert!(alive.is_empty(), "no seed of {SEEDS} caught {alive:?}");
}
