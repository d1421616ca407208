//! The hot paths of kvpool-core for an instruction counter: `count.py` runs this under callgrind, which counts inside `hot`.
//!
//! A pool of 4,096 blocks of 16 tokens, full of sequences of 64 blocks. Nothing here is random and one thread runs it, so
//! that the counts repeat. Each function of `hot` does its operation `CALLS` times, on a request of 64 blocks each.

use kvpool_core::types::{CoreConfig, PolicyKind, PoolSpec};
use kvpool_core::{Cache, Core};

const T: usize = 16;
const BLOCKS: usize = 64;
const SLOTS: usize = 4096;
const CALLS: usize = 16;

/// What is counted: one function per path, which the compiler must not take apart.
mod hot {
    use super::{ready, BLOCKS, T};
    use kvpool_core::{Cache, Core};
    use std::hint::black_box;

    #[inline(never)]
    pub fn create(core: &Core, prompts: &[Vec<i32>], caches: &mut Vec<Cache>) {
        for prompt in prompts {
            caches.push(core.create(prompt, b"", None, None).expect("a cache"));
        }
    }

    #[inline(never)]
    pub fn resume(core: &Core, caches: &mut [Cache]) {
        caches.iter_mut().for_each(|cache| ready(core, cache));
    }

    #[inline(never)]
    pub fn block_table(core: &Core, caches: &[Cache]) {
        for cache in caches {
            let table = core.table(cache, 0).expect("active");
            black_box(table.iter().map(|&slot| u64::from(slot)).sum::<u64>());
        }
    }

    #[inline(never)]
    pub fn resize(core: &Core, caches: &mut [Cache]) {
        for cache in caches {
            assert!(core.resize(cache, (BLOCKS * T) as u64, None).expect("active"));
        }
    }

    #[inline(never)]
    pub fn commit(core: &Core, caches: &mut [Cache], prompts: &[Vec<i32>]) {
        for (cache, prompt) in caches.iter_mut().zip(prompts) {
            core.commit(cache, &prompt[..BLOCKS * T]).expect("active");
        }
    }

    /// 16 decodes: room for one token, and the token; the first takes a block, the last fills it.
    #[inline(never)]
    pub fn decode(core: &Core, caches: &mut [Cache], prompts: &[Vec<i32>]) {
        for (cache, prompt) in caches.iter_mut().zip(prompts) {
            for i in 0..T {
                let tokens = (BLOCKS * T + i + 1) as u64;
                assert!(core.resize(cache, tokens, None).expect("active"));
                let token = prompt.get(BLOCKS * T + i).copied().unwrap_or(i as i32);
                core.commit(cache, &[token]).expect("active");
            }
        }
    }

    #[inline(never)]
    pub fn release(core: &Core, caches: &mut Vec<Cache>) {
        for mut cache in caches.drain(..) {
            core.close(&mut cache).expect("open");
        }
    }

    #[inline(never)]
    pub fn probe(core: &Core, prompts: &[Vec<i32>]) {
        for prompt in prompts {
            black_box(core.probe(prompt, b"", None).expect("a length"));
        }
    }

    /// Prompts that begin like thousands of cached ones, and match none of their blocks.
    #[inline(never)]
    pub fn crowd(core: &Core, prompts: &[Vec<i32>]) {
        for prompt in prompts {
            black_box(core.probe(prompt, b"", None).expect("a length"));
        }
    }

    #[inline(never)]
    pub fn evict(core: &Core, calls: usize) {
        (0..calls).for_each(|_| _ = black_box(core.evict(BLOCKS as u64)));
    }

    /// W2: a request of tokens nobody had, its blocks evicted from a full pool.
    #[inline(never)]
    pub fn churn(core: &Core, prompts: &[Vec<i32>]) {
        for prompt in prompts {
            super::serve(core, prompt);
        }
    }
}

/// Prompts of one block and a token, the first five tokens the same in all.
fn alike(from: usize, count: usize) -> Vec<Vec<i32>> {
    let token = |i: usize| ((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as i32;
    let prompt = |i: usize| {
        (0..=T)
            .map(|at| if at < 5 { 7 } else { token(i * T + at) })
            .collect()
    };
    (from..from + count).map(prompt).collect()
}

fn core() -> Core {
    Core::new(CoreConfig {
        tokens_per_block: T as u32,
        pools: vec![PoolSpec {
            name: "kv".into(),
            num_slots: SLOTS as u32,
            host_slots: 0,
            window: None,
            sink_tokens: 0,
        }],
        max_blocks: SLOTS as u32,
        max_seq_len: None,
        partial_reuse: true,
        hash_seed: 1,
        policy: PolicyKind::Lru,
        offload_min_priority: 30,
        collide: false,
    })
    .expect("memory")
}

fn ready(core: &Core, cache: &mut Cache) {
    assert!(core.resume(cache, &mut Vec::new()).expect("open"));
    core.copies_done(cache);
}

fn serve(core: &Core, prompt: &[i32]) {
    let mut cache = core.create(prompt, b"", None, None).expect("a cache");
    ready(core, &mut cache);
    assert!(core
        .resize(&mut cache, (BLOCKS * T) as u64, None)
        .expect("active"));
    core.commit(&mut cache, &prompt[..BLOCKS * T]).expect("active");
    core.close(&mut cache).expect("open");
}

fn prompts(seed: usize) -> Vec<Vec<i32>> {
    let token = |i: usize| ((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as i32;
    let length = BLOCKS * T + 1;
    (0..CALLS)
        .map(|i| {
            (0..length)
                .map(|at| token((seed * CALLS + i) * length + at))
                .collect()
        })
        .collect()
}

fn main() {
    let core = core();
    for seed in 0..=SLOTS / BLOCKS / CALLS {
        prompts(seed).iter().for_each(|prompt| serve(&core, prompt)); // more than fit: what is kept per thread is warm
    }
    let mut caches = Vec::with_capacity(CALLS);

    let cached = prompts(SLOTS / BLOCKS / CALLS);
    hot::probe(&core, &cached);
    hot::create(&core, &cached, &mut caches);
    hot::resume(&core, &mut caches);
    hot::block_table(&core, &caches);
    hot::decode(&core, &mut caches, &cached);
    hot::release(&core, &mut caches);

    hot::churn(&core, &prompts(100));
    hot::evict(&core, 2 * CALLS);

    let fresh = prompts(200);
    for prompt in &fresh {
        let mut cache = core.create(prompt, b"", None, None).expect("a cache");
        ready(&core, &mut cache);
        caches.push(cache);
    }
    hot::resize(&core, &mut caches); // from free slots: the evictions above made room
    hot::commit(&core, &mut caches, &fresh);
    for mut cache in caches.drain(..) {
        core.close(&mut cache).expect("open");
    }
    core.check(&[]).expect("books");
    crowd();
}

fn crowd() {
    let core = core();
    for prompt in alike(0, SLOTS) {
        let mut cache = core.create(&prompt, b"", None, None).expect("a cache");
        ready(&core, &mut cache);
        assert!(core.resize(&mut cache, T as u64, None).expect("active"));
        let from = core.info(&cache).expect("open").committed as usize;
        core.commit(&mut cache, &prompt[from..T]).expect("active");
        core.close(&mut cache).expect("open");
    }
    hot::crowd(&core, &alike(SLOTS, CALLS));
}
