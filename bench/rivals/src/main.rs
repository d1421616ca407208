//! W1, W2, W2l and W3 from Rust: kvpool-core beside kvbm-logical (lru), in one process, in turns.
//!
//! With one thread, and with two on disjoint sequences (and, for W1, on one shared sequence): wall time over all
//! blocks of both. W1: pool of 65,536 blocks of 16 tokens, 1,000 cached sequences of 64 blocks, picked at random: claim a full
//! match, read its slots, release. W2: the pool is full of cached blocks; allocate 64, commit new tokens, release.
//! kvbm-logical is given precomputed hashes and compares no tokens; kvpool hashes and compares in every call.

mod leaves;
mod trace;

use dynamo_tokens::TokenBlockSequence;
use kvbm_logical::{BlockManager, BlockRegistry, KvbmSequenceHashProvider, SequenceHash};
use kvpool_core::types::{CoreConfig, PolicyKind, PoolSpec};
use kvpool_core::Core;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

const T: usize = 16;
const BLOCKS: usize = 64;
const SEQUENCES: usize = 1000;
const SLOTS: usize = 65_536;
const ROUNDS: usize = 15;
const CALLS: usize = 1000;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[derive(Clone, Debug)]
struct Meta;

type Rival = BlockManager<Meta>;

fn prompt(rng: &mut Rng) -> Vec<i32> {
    (0..BLOCKS * T + 1).map(|_| (rng.next() >> 33) as i32).collect()
}

fn hashes(prompt: &[i32]) -> Vec<SequenceHash> {
    hashes_of(&prompt[..BLOCKS * T], T)
}

fn hashes_of(tokens: &[i32], tokens_per_block: usize) -> Vec<SequenceHash> {
    let tokens: Vec<u32> = tokens.iter().map(|&token| token as u32).collect();
    let sequence = TokenBlockSequence::from_slice(&tokens, tokens_per_block as u32, Some(1));
    sequence
        .blocks()
        .iter()
        .map(|block| block.kvbm_sequence_hash())
        .collect()
}

fn serve(core: &Core, prompt: &[i32]) {
    serve_tokens(core, prompt, BLOCKS * T);
}

/// A whole request whose first `tokens` tokens are computed and committed.
fn serve_tokens(core: &Core, prompt: &[i32], tokens: usize) {
    let mut copies = Vec::new();
    let mut cache = core.create(prompt, b"", None, None).unwrap();
    let reused = core.info(&cache).unwrap().reused as usize;
    core.resume(&mut cache, &mut copies).unwrap();
    core.copies_done(&mut cache);
    assert!(core.resize(&mut cache, tokens as u64, None).unwrap());
    core.commit(&mut cache, &prompt[reused..tokens]).unwrap();
    black_box(core.table(&cache, 0).unwrap());
    core.close(&mut cache).unwrap();
}

fn serve_rival(manager: &Rival, hashes: &[SequenceHash]) {
    let blocks = manager.allocate_blocks(hashes.len()).expect("room");
    let complete = blocks
        .into_iter()
        .zip(hashes)
        .map(|(block, &hash)| block.stage(hash, T).expect("size"))
        .collect();
    black_box(manager.register_blocks(complete));
}

fn claim(core: &Core, prompt: &[i32]) {
    let mut copies = Vec::new();
    let mut cache = core.create(prompt, b"", None, None).unwrap();
    assert_eq!(core.info(&cache).unwrap().reused as usize, BLOCKS * T);
    core.resume(&mut cache, &mut copies).unwrap();
    core.copies_done(&mut cache);
    black_box(core.table(&cache, 0).unwrap());
    core.close(&mut cache).unwrap();
}

fn claim_rival(manager: &Rival, hashes: &[SequenceHash]) {
    let found = manager.match_blocks(hashes);
    assert_eq!(found.len(), BLOCKS);
    black_box(found.iter().map(|block| block.block_id()).sum::<usize>());
}

/// Wall nanoseconds per block of `CALLS` calls by each of `threads` threads.
fn nanos(threads: usize, f: impl Fn(usize, usize) + Sync) -> f64 {
    let gate = Barrier::new(threads);
    let times: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..threads)
            .map(|thread| {
                let (gate, f) = (&gate, &f);
                scope.spawn(move || {
                    gate.wait();
                    let start = Instant::now();
                    (0..CALLS).for_each(|i| f(thread, i));
                    (start, Instant::now())
                })
            })
            .collect();
        runs.into_iter()
            .map(|run| run.join().expect("a thread"))
            .collect()
    });
    let start = times.iter().map(|(start, _)| *start).min().expect("a thread");
    let end = times.iter().map(|(_, end)| *end).max().expect("a thread");
    (end - start).as_nanos() as f64 / (threads * CALLS * BLOCKS) as f64
}

fn report(name: &str, mut ours: Vec<f64>, mut theirs: Vec<f64>) {
    let mut ratios: Vec<f64> = theirs.iter().zip(&ours).map(|(b, a)| b / a).collect();
    for v in [&mut ours, &mut theirs, &mut ratios] {
        v.sort_by(f64::total_cmp);
    }
    println!(
        "{name}: kvpool-core {:.0} / {:.0} ns per block, kvbm-logical lru {:.0} / {:.0}, ratio min {:.1} median {:.1}",
        ours[0],
        ours[ROUNDS / 2],
        theirs[0],
        theirs[ROUNDS / 2],
        ratios[0],
        ratios[ROUNDS / 2]
    );
}

fn make_core(slots: usize, tokens_per_block: usize) -> Core {
    Core::new(CoreConfig {
        tokens_per_block: tokens_per_block as u32,
        pools: vec![PoolSpec {
            name: "kv".into(),
            num_slots: slots as u32,
            host_slots: 0,
            window: None,
            sink_tokens: 0,
        }],
        max_blocks: slots as u32,
        max_seq_len: None,
        partial_reuse: true,
        hash_seed: 1,
        policy: PolicyKind::Lru,
        offload_min_priority: 30,
        collide: false,
    })
    .unwrap()
}

fn make_rival(slots: usize, tokens_per_block: usize) -> Rival {
    BlockManager::builder()
        .block_count(slots)
        .block_size(tokens_per_block)
        .registry(BlockRegistry::builder().build())
        .with_lru_backend()
        .build()
        .expect("a manager")
}

/// Least and median.
fn ends(values: &mut [f64]) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2])
}

fn main() {
    let mut rng = Rng(0x9E37_79B9_7F4A_7C15);
    let (core, manager) = (make_core(SLOTS, T), make_rival(SLOTS, T));
    let prompts: Vec<Vec<i32>> = (0..SEQUENCES).map(|_| prompt(&mut rng)).collect();
    let keys: Vec<Vec<SequenceHash>> = prompts.iter().map(|p| hashes(p)).collect();
    for (p, k) in prompts.iter().zip(&keys) {
        serve(&core, p);
        serve_rival(&manager, k);
    }
    println!("min / median of {ROUNDS} rounds of {CALLS} calls per thread of {BLOCKS} blocks, in turns");

    for (name, threads, shared) in [
        ("W1", 1, false),
        ("W1, 2 threads", 2, false),
        ("W1, 2 threads on one sequence", 2, true),
    ] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let half = SEQUENCES / threads;
            let picks: Vec<usize> = (0..CALLS)
                .map(|_| if shared { 0 } else { rng.next() as usize % half })
                .collect();
            let pick = |thread: usize, i: usize| picks[i] + if shared { 0 } else { thread * half };
            ours.push(nanos(threads, |thread, i| {
                claim(&core, &prompts[pick(thread, i)])
            }));
            theirs.push(nanos(threads, |thread, i| {
                claim_rival(&manager, &keys[pick(thread, i)])
            }));
        }
        report(name, ours, theirs);
    }

    while core.books(kvpool_core::words::Tier::Device)[0].free > 0 {
        let p = prompt(&mut rng);
        serve(&core, &p);
        serve_rival(&manager, &hashes(&p));
    }
    for (name, threads) in [("W2", 1), ("W2, 2 threads", 2)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let fresh: Vec<Vec<i32>> = (0..threads * CALLS).map(|_| prompt(&mut rng)).collect();
            let keys: Vec<Vec<SequenceHash>> = fresh.iter().map(|p| hashes(p)).collect();
            ours.push(nanos(threads, |thread, i| {
                serve(&core, &fresh[thread * CALLS + i])
            }));
            theirs.push(nanos(threads, |thread, i| {
                serve_rival(&manager, &keys[thread * CALLS + i])
            }));
        }
        report(name, ours, theirs);
    }
    core.check(&[]).unwrap();
    drop((core, manager));
    leaves::run(&mut rng);
    match std::env::args().nth(1) {
        Some(path) => trace::run(&path),
        None => println!("W3: give a Mooncake trace as the argument"),
    }
}
