//! W2l: one eviction of 64 blocks out of 65,536, cached as few long sequences or many short ones.

use crate::{
    ends, hashes_of, make_core, make_rival, serve_rival, serve_tokens, Rng, BLOCKS, ROUNDS, SLOTS, T,
};
use std::hint::black_box;
use std::time::Instant;

/// Evictions per round; the cache is filled again between rounds.
const EVICTIONS: usize = 32;

/// Prints microseconds per eviction for 1,024, 4,096 and 16,384 leaves.
pub fn run(rng: &mut Rng) {
    let mut medians = Vec::new();
    for length in [64, 16, 4] {
        let (core, rival) = (make_core(SLOTS, T), make_rival(SLOTS, T));
        let mut fill = |sequences: usize| {
            for _ in 0..sequences {
                let tokens: Vec<i32> = (0..length * T).map(|_| (rng.next() >> 33) as i32).collect();
                serve_tokens(&core, &tokens, length * T);
                serve_rival(&rival, &hashes_of(&tokens, T));
            }
        };
        fill(SLOTS / length);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for _ in 0..EVICTIONS {
                assert_eq!(core.evict(BLOCKS as u64), BLOCKS as u64);
            }
            ours.push(start.elapsed().as_secs_f64() * 1e6 / EVICTIONS as f64);
            let mut held = Vec::with_capacity(EVICTIONS);
            let start = Instant::now();
            for _ in 0..EVICTIONS {
                held.push(rival.allocate_blocks(BLOCKS).expect("room"));
            }
            theirs.push(start.elapsed().as_secs_f64() * 1e6 / EVICTIONS as f64);
            drop(black_box(held));
            fill(EVICTIONS * BLOCKS / length);
        }
        let (ours, theirs) = (ends(&mut ours), ends(&mut theirs));
        println!(
            "W2l, {} leaves: kvpool-core {:.1} / {:.1} us per 64 blocks, kvbm-logical lru {:.1} / {:.1}",
            SLOTS / length,
            ours.0,
            ours.1,
            theirs.0,
            theirs.1
        );
        medians.push(ours.1);
    }
    println!(
        "W2l: 16,384 leaves cost kvpool-core {:.2} x 1,024 leaves",
        medians[2] / medians[0]
    );
}
