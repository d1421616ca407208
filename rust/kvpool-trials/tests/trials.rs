//! What `make soak` and `make fuzz` try at length, for seconds.
#![cfg(not(kvpool_stops))]

use kvpool_trials::run::{bytes, soak, threads};
use std::path::Path;

/// A million calls, or KVPOOL_OPERATIONS; KVPOOL_SEED for other worlds.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect(name))
}

#[test]
fn four_threads_lose_no_page_and_serve_no_wrong_byte() {
    let (seed, calls) = (number("KVPOOL_SEED", 1), number("KVPOOL_OPERATIONS", 1_000_000));
    let mut next = seed;
    let tally = soak(seed, 4, calls, |seed, _| {
        next = seed + 1;
        println!("world {seed} holds"); // shown when a later one fails
    });
    assert!(tally.calls >= calls && tally.worlds == next - seed);
    assert!(
        tally.verified > calls / 10,
        "only {} positions were reused",
        tally.verified
    );
    assert!(tally.quiet > calls / 10_000, "only {} quiet points", tally.quiet);
}

#[test]
fn one_thread_gets_exact_answers() {
    for seed in 1..=40 {
        println!("world {seed}");
        assert!(threads(seed, 1, 5_000).calls >= 5_000);
    }
}

/// Worlds in which blocks that find no room in a window's part of the host stay whole.
#[test]
fn fitting_finds_room_now_where_the_host_is_crowded() {
    for seed in [13, 104] {
        println!("world {seed}");
        assert!(threads(seed, 1, 30_000).calls >= 30_000);
    }
}

/// Every sequence of operations that the fuzzer found worth keeping.
#[test]
fn the_corpus_of_the_fuzzer_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/operations");
    let mut files: Vec<_> = std::fs::read_dir(&corpus)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() > 100, "{} files in {corpus:?}", files.len());
    let (mut calls, mut copies) = (0, 0);
    for file in files {
        println!("{file:?}"); // shown when it fails
        let tally = bytes(&std::fs::read(&file).unwrap());
        (calls, copies) = (calls + tally.calls, copies + tally.copies);
    }
    assert!(
        calls > 1_000 && copies > 100,
        "{calls} calls, {copies} pages copied down"
    );
}
