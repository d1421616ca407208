//! W1, W1t, W1s, W1 with a windowed pool, W2 on one thread; memory per block; heap allocations per block.

use crate::dynamo::{Dynamo, Keys};
use crate::kvbm::Kvbm;
use crate::kvpool::Kvpool;
use crate::measure::{alone, rounded, Effort, Turns};
use crate::memory::counted;
use crate::world::{Prompt, Rng, Shape, Side, BLOCKS, SEQUENCES, SLOTS, T};
use serde_json::{json, Value};
use std::hint::black_box;

const WINDOWED: Shape = Shape {
    windowed: 1,
    ..Shape::PEERS
};
/// Blocks that a turn of W1t adds.
const TURN: usize = 8;

/// A system in which the prompts are cached, built in turns of so many blocks.
pub fn cached<S: Side>(shape: Shape, prompts: &[Prompt], turn: usize) -> S {
    let side = S::new(shape);
    for prompt in prompts {
        let all = prompt.hashes.len();
        (turn..=all)
            .step_by(turn)
            .for_each(|blocks| side.serve(prompt, blocks));
    }
    side
}

/// Caches new prompts until every block of the pool is taken.
pub fn fill<S: Side>(side: &S, rng: &mut Rng, blocks: usize) {
    for _ in 0..SLOTS.div_ceil(blocks) {
        side.serve(&Prompt::random(rng, blocks, T), blocks);
    }
}

fn claims<S: Side>(side: &S, prompts: &[Prompt], picks: &[usize]) -> f64 {
    let calls = alone(picks.len(), |i| side.claim(&prompts[picks[i]], BLOCKS));
    calls / BLOCKS as f64
}

fn picks(rng: &mut Rng, calls: usize) -> Vec<usize> {
    (0..calls).map(|_| rng.below(SEQUENCES)).collect()
}

/// W1, and the same in turns, with a live holder, and with a windowed pool besides.
pub fn claim(effort: Effort, rng: &mut Rng) -> Value {
    let prompts = Prompt::many(rng, SEQUENCES, BLOCKS, T);
    let core: Kvpool = cached(Shape::PEERS, &prompts, BLOCKS);
    let windowed: Kvpool = cached(WINDOWED, &prompts, BLOCKS);
    let kvbm: Kvbm = cached(Shape::PEERS, &prompts, BLOCKS);
    let keys: Vec<Keys> = prompts.iter().map(Keys::of).collect();
    let dynamo = Dynamo::new();
    dynamo.store(&keys, BLOCKS);
    let mut w1 = Turns::new();
    for _ in 0..effort.rounds {
        let picks = picks(rng, effort.calls);
        w1.note(Kvpool::NAME, claims(&core, &prompts, &picks));
        w1.note(Kvbm::NAME, claims(&kvbm, &prompts, &picks));
        let finds = alone(picks.len(), |i| dynamo.find(&keys[picks[i]]));
        w1.note("dynamo, find only", finds / BLOCKS as f64);
        w1.note(
            "kvpool-core, windowed pool besides",
            claims(&windowed, &prompts, &picks),
        );
    }

    let turned: Kvpool = cached(Shape::PEERS, &prompts, TURN);
    let turned_kvbm: Kvbm = cached(Shape::PEERS, &prompts, TURN);
    let turned_dynamo = Dynamo::new();
    turned_dynamo.store(&keys, TURN);
    let mut w1t = Turns::new();
    for _ in 0..effort.rounds {
        let picks = picks(rng, effort.calls);
        w1t.note(Kvpool::NAME, claims(&turned, &prompts, &picks));
        w1t.note(Kvbm::NAME, claims(&turned_kvbm, &prompts, &picks));
        let finds = alone(picks.len(), |i| turned_dynamo.find(&keys[picks[i]]));
        w1t.note("dynamo, find only", finds / BLOCKS as f64);
        w1t.note(
            "kvpool-core, W1 in the same round",
            claims(&core, &prompts, &picks),
        );
    }

    let mut held: Vec<_> = prompts.iter().map(|prompt| core.open(prompt, BLOCKS)).collect();
    held.iter_mut().for_each(Kvpool::resume);
    let held_kvbm: Vec<_> = prompts.iter().map(|prompt| kvbm.open(prompt, BLOCKS)).collect();
    let mut w1s = Turns::new();
    for _ in 0..effort.rounds {
        let picks = picks(rng, effort.calls);
        w1s.note(Kvpool::NAME, claims(&core, &prompts, &picks));
        w1s.note(Kvbm::NAME, claims(&kvbm, &prompts, &picks));
    }
    drop((held, held_kvbm));
    [&core, &windowed, &turned].iter().for_each(|side| side.check());
    json!({ "W1": w1.json(), "W1t": w1t.json(), "W1s": w1s.json() })
}

fn churns<S: Side>(side: &S, fresh: &[Prompt]) -> f64 {
    alone(fresh.len(), |i| side.churn(&fresh[i], BLOCKS)) / BLOCKS as f64
}

/// W2; dynamo-kv-router stores the same prompts and never removes any.
pub fn churn(effort: Effort, rng: &mut Rng) -> Value {
    let (core, windowed, kvbm) = (
        Kvpool::new(Shape::PEERS),
        Kvpool::new(WINDOWED),
        Kvbm::new(Shape::PEERS),
    );
    fill(&core, rng, BLOCKS);
    fill(&windowed, rng, BLOCKS);
    fill(&kvbm, rng, BLOCKS);
    assert_eq!(core.free(), 0);
    let (dynamo, singly) = (Dynamo::new(), Dynamo::new());
    let mut w2 = Turns::new();
    for _ in 0..effort.rounds {
        let fresh = Prompt::many(rng, effort.calls, BLOCKS, T);
        w2.note(Kvpool::NAME, churns(&core, &fresh));
        w2.note(Kvbm::NAME, churns(&kvbm, &fresh));
        w2.note("kvpool-core, windowed pool besides", churns(&windowed, &fresh));
        let keys: Vec<Keys> = fresh.iter().map(Keys::of).collect();
        let blocks = (effort.calls * BLOCKS) as f64;
        w2.note(
            "dynamo, insert of 64",
            dynamo.store(&keys, BLOCKS).as_nanos() as f64 / blocks,
        );
        w2.note(
            "dynamo, insert one by one",
            singly.store(&keys, 1).as_nanos() as f64 / blocks,
        );
    }
    [&core, &windowed].iter().for_each(|side| side.check());
    w2.json()
}

fn bytes<S: Side>(shape: Shape, rng: &mut Rng) -> [f64; 2] {
    let prompts = Prompt::many(rng, SLOTS / BLOCKS, BLOCKS, T);
    let (side, made, _) = counted(|| S::new(shape));
    let ((), added, _) = counted(|| prompts.iter().for_each(|prompt| side.serve(prompt, BLOCKS)));
    [made as f64 / SLOTS as f64, (made + added) as f64 / SLOTS as f64]
}

/// Live bytes per block: once made, and with every block cached. Those of kvpool's tokens are part of both.
pub fn memory(rng: &mut Rng) -> Value {
    let one = bytes::<Kvpool>(Shape::PEERS, rng);
    let two = bytes::<Kvpool>(WINDOWED, rng);
    let kvbm = bytes::<Kvbm>(Shape::PEERS, rng);
    let prompts = Prompt::many(rng, SLOTS / BLOCKS, BLOCKS, T);
    let keys: Vec<Keys> = prompts.iter().map(Keys::of).collect();
    let (dynamo, made, _) = counted(Dynamo::new);
    let (_, added, _) = counted(|| dynamo.store(&keys, BLOCKS));
    let tokens = (T * size_of::<i32>()) as f64;
    let show = |[made, full]: [f64; 2]| json!([rounded(made), rounded(full)]);
    json!({
        "tokens": tokens,
        "kvpool-core": show(one),
        "kvpool-core, windowed pool besides": show(two),
        "kvpool-core, per pool besides its tokens": rounded(one[1] - tokens),
        "kvpool-core, per pool of two besides its tokens": rounded((two[1] - tokens) / 2.0),
        "kvbm-logical": show(kvbm),
        "dynamo": show([made as f64, (made + added) as f64].map(|bytes| bytes / SLOTS as f64)),
    })
}

/// Heap allocations of one call of 64 blocks: the mean of 100, after 100 that warm up what each thread keeps.
pub fn allocations(rng: &mut Rng) -> Value {
    const CALLS: usize = 100;
    let (core, kvbm) = (Kvpool::new(Shape::PEERS), Kvbm::new(Shape::PEERS));
    fill(&core, rng, BLOCKS);
    fill(&kvbm, rng, BLOCKS);
    let fresh = Prompt::many(rng, 2 * CALLS, BLOCKS, T);
    let mut calls = [0.0; 10];
    for (i, prompt) in fresh.iter().enumerate() {
        let mut at = 0;
        let mut note = |count: u64| {
            calls[at] += if i < CALLS {
                0.0
            } else {
                count as f64 / CALLS as f64
            };
            at += 1;
        };
        note(counted(|| core.evict(BLOCKS)).2);
        let (mut request, _, count) = counted(|| core.open(prompt, BLOCKS));
        note(count);
        note(counted(|| Kvpool::resume(&mut request)).2);
        note(counted(|| assert!(Kvpool::resize(&mut request, BLOCKS))).2);
        note(counted(|| Kvpool::commit(&mut request, prompt, BLOCKS)).2);
        note(counted(|| drop(request)).2);
        note(counted(|| core.core.probe(black_box(&prompt.tokens), b"", None)).2);
        note(counted(|| core.claim(prompt, BLOCKS)).2);
        note(counted(|| kvbm.churn(prompt, BLOCKS)).2);
        note(counted(|| kvbm.claim(prompt, BLOCKS)).2);
    }
    let [evict, create, resume, resize, commit, close, probe, w1, kvbm_w2, kvbm_w1] = calls.map(rounded);
    json!({
        "kvpool-core": { "evict": evict, "create": create, "resume": resume, "resize": resize, "commit": commit,
            "close": close, "probe": probe, "W1": w1, "W2": rounded(calls[1..6].iter().sum()) },
        "kvbm-logical": { "W1": kvbm_w1, "W2": kvbm_w2 },
    })
}
