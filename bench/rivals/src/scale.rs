//! Cost against the size of the pool, the length of a chain, the number of leaves and of pools.

use crate::compare::fill;
use crate::floors::{cycle, dependent};
use crate::kvbm::Kvbm;
use crate::kvpool::Kvpool;
use crate::measure::{alone, ends, rounded, Effort, Turns};
use crate::memory::counted;
use crate::world::{Prompt, Rng, Shape, Side, BLOCKS, SLOTS, T};
use serde_json::{json, Value};
use std::hint::black_box;

/// Largest pool that kvbm-logical is given: it takes more than 600 bytes per block.
const KVBM_MOST: usize = 1_000_000;

/// The i-th of the sequences that fill a pool; made again where it is needed, for they would take more room than the pool.
fn sequence(i: usize, hashed: bool) -> Prompt {
    let mut rng = Rng((i as u64 + 1).wrapping_mul(0xD1B5_4A32_D192_ED03));
    if hashed {
        Prompt::random(&mut rng, BLOCKS, T)
    } else {
        Prompt::bare(&mut rng, BLOCKS, T)
    }
}

/// W1 and W2 of a pool of so many blocks that is full: (W1, W2), ns per block.
fn full<S: Side>(side: &S, slots: usize, effort: Effort, hashed: bool) -> (Vec<f64>, Vec<f64>) {
    let sequences = slots / BLOCKS;
    (0..sequences).for_each(|i| side.serve(&sequence(i, hashed), BLOCKS));
    let mut rng = Rng::new();
    let (mut w1, mut w2) = (Vec::new(), Vec::new());
    let calls = effort.calls.min(200);
    for _ in 0..effort.rounds {
        let some: Vec<Prompt> = (0..calls)
            .map(|_| sequence(rng.below(sequences), hashed))
            .collect();
        w1.push(alone(calls, |i| side.claim(&some[i], BLOCKS)) / BLOCKS as f64);
    }
    for round in 0..effort.rounds {
        let fresh: Vec<Prompt> = (0..calls)
            .map(|i| sequence(sequences + round * calls + i, hashed))
            .collect();
        w2.push(alone(calls, |i| side.churn(&fresh[i], BLOCKS)) / BLOCKS as f64);
    }
    (w1, w2)
}

/// 10^4 to `most` blocks; the floor is a dependent load from an array as large as the core's tables.
fn sizes(effort: Effort, most: usize) -> Value {
    let sizes = [10_000, 100_000, 1_000_000, 10_000_000];
    let rows = sizes.into_iter().filter(|&slots| slots <= most).map(|slots| {
        let shape = Shape {
            slots,
            ..Shape::PEERS
        };
        let (core, bytes, _) = counted(|| Kvpool::new(shape));
        let (w1, w2) = full(&core, slots, effort, false);
        drop(core);
        let floor = dependent(&cycle(bytes as usize));
        let kvbm = (slots <= KVBM_MOST).then(|| {
            let (w1, w2) = full(&Kvbm::new(shape), slots, effort, true);
            json!({ "W1": ends(&w1), "W2": ends(&w2) })
        });
        json!({
            "blocks": slots,
            "bytes": bytes,
            "dependent_load": rounded(floor),
            "kvpool-core": { "W1": ends(&w1), "W2": ends(&w2) },
            "kvbm-logical": kvbm,
        })
    });
    json!(rows.collect::<Vec<_>>())
}

/// W1 of chains of 1 to 10^4 blocks, ns per call.
fn chains(effort: Effort, rng: &mut Rng) -> Value {
    let rows = [1, 10, 100, 1_000, 10_000].map(|length| {
        let prompts = Prompt::many(rng, (SLOTS / length).min(1000), length, T);
        let (core, kvbm) = (Kvpool::new(Shape::PEERS), Kvbm::new(Shape::PEERS));
        for prompt in &prompts {
            core.serve(prompt, length);
            kvbm.serve(prompt, length);
        }
        let calls = (16 * effort.calls / length).clamp(3, effort.calls);
        let (mut w1, mut probe) = (Turns::new(), Turns::new());
        for _ in 0..effort.rounds {
            let picks: Vec<usize> = (0..calls).map(|_| rng.below(prompts.len())).collect();
            w1.note(
                Kvpool::NAME,
                alone(calls, |i| core.claim(&prompts[picks[i]], length)),
            );
            w1.note(
                Kvbm::NAME,
                alone(calls, |i| kvbm.claim(&prompts[picks[i]], length)),
            );
            let ask = |i: usize| core.core.probe(&prompts[picks[i]].tokens, b"", None);
            probe.note(Kvpool::NAME, alone(calls, |i| _ = black_box(ask(i))));
        }
        json!({ "blocks": length, "W1": w1.json()["figures"], "probe": probe.json()["figures"] })
    });
    json!(rows)
}

/// W2l: one eviction of 64 blocks out of 65,536, µs, cached as few long sequences or many short ones.
fn leaves(effort: Effort, rng: &mut Rng) -> Value {
    const EVICTIONS: usize = 32;
    let rows = [64, 16, 4, 1].map(|length| {
        let (core, kvbm) = (Kvpool::new(Shape::PEERS), Kvbm::new(Shape::PEERS));
        fill(&core, rng, length);
        fill(&kvbm, rng, length);
        let mut turns = Turns::new();
        for _ in 0..effort.rounds {
            turns.note(Kvpool::NAME, alone(EVICTIONS, |_| core.evict(BLOCKS)) / 1e3);
            let mut evicted = Vec::with_capacity(EVICTIONS);
            turns.note(
                Kvbm::NAME,
                alone(EVICTIONS, |_| evicted.push(kvbm.evict(BLOCKS))) / 1e3,
            );
            drop(evicted);
            for _ in 0..EVICTIONS * BLOCKS / length {
                let prompt = Prompt::random(rng, length, T);
                core.serve(&prompt, length);
                kvbm.serve(&prompt, length);
            }
        }
        core.check();
        json!({ "leaves": SLOTS / length, "figures": turns.json()["figures"] })
    });
    json!(rows)
}

/// W1 and W2 with more pools, ns per block; one full-attention pool and windows of 256 tokens, or full attention in all.
fn pools(effort: Effort, rng: &mut Rng) -> Value {
    let kinds = [(1, 0), (1, 1), (2, 0), (4, 0), (1, 3), (8, 0)].map(|(full, windowed)| {
        let shape = Shape {
            full,
            windowed,
            ..Shape::PEERS
        };
        let core = Kvpool::new(shape);
        fill(&core, rng, BLOCKS);
        (full, windowed, core, Vec::new(), Vec::new())
    });
    let mut kinds = kinds;
    for _ in 0..effort.rounds {
        let fresh = Prompt::many(rng, effort.calls, BLOCKS, T);
        for (_, _, core, w1, w2) in &mut kinds {
            w2.push(alone(effort.calls, |i| core.churn(&fresh[i], BLOCKS)) / BLOCKS as f64);
            w1.push(alone(effort.calls, |i| core.claim(&fresh[i], BLOCKS)) / BLOCKS as f64);
        }
    }
    let rows = kinds.map(|(full, windowed, core, w1, w2)| {
        core.check();
        json!({ "full": full, "windowed": windowed, "W1": ends(&w1), "W2": ends(&w2) })
    });
    json!(rows)
}

/// A prompt of two blocks whose first `shared` tokens all prompts have.
fn alike(rng: &mut Rng, shared: usize) -> Prompt {
    let mut prompt = Prompt::bare(rng, 2, T);
    prompt.tokens[..shared].fill(7);
    prompt
}

/// A new prompt that begins like all that are cached, ns per call: looked up and let go; and in a full pool looked up,
/// stored (two blocks, evicting as many) and let go. By what they have in common and by their number.
fn beginnings(effort: Effort, rng: &mut Rng) -> Value {
    let mut rows = Vec::new();
    for shared in [0, 1, 5, 12] {
        for cached in [1_000, 4_000, 16_000, 64_000] {
            let core = Kvpool::new(Shape {
                slots: 2 * cached,
                ..Shape::PEERS
            });
            (0..cached).for_each(|_| core.serve(&alike(rng, shared), 2));
            let (mut open, mut serve) = (Turns::new(), Turns::new());
            for _ in 0..effort.rounds {
                let fresh: Vec<Prompt> = (0..effort.calls.min(500)).map(|_| alike(rng, shared)).collect();
                open.note(
                    Kvpool::NAME,
                    alone(fresh.len(), |i| drop(core.open(&fresh[i], 2))),
                );
                serve.note(Kvpool::NAME, alone(fresh.len(), |i| core.serve(&fresh[i], 2)));
            }
            core.check();
            rows.push(json!({
                "shared": shared, "cached": cached,
                "open": open.json()["figures"][Kvpool::NAME], "serve": serve.json()["figures"][Kvpool::NAME],
            }));
        }
    }
    json!(rows)
}

pub fn run(effort: Effort, most: usize, rng: &mut Rng) -> Value {
    json!({
        "sizes": sizes(effort, most),
        "chains": chains(effort, rng),
        "leaves": leaves(effort, rng),
        "pools": pools(effort, rng),
        "beginnings": beginnings(effort, rng),
    })
}
