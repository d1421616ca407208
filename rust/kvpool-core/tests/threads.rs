//! Threads that do everything at once, on one tier and on two: no wrong byte, no lost page, and the books balance when
//! they stop.
//!
//! A page is an array of one number per position: the hash of scope and tokens up to there. Whoever
//! "computes" a block writes it, whoever reuses one verifies it.

use kvpool_core::events::EventKind;
use kvpool_core::sync::{AtomicU64, Ordering};
use kvpool_core::types::{
    CacheState, CoreConfig, Mover, PageCopy, PolicyKind, PoolSpec, Retain, RetentionSpec,
};
use kvpool_core::words::Tier;
use kvpool_core::{Cache, Claim, Core};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

const T: usize = 2;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n
    }
}

/// `pages[tier][pool][slot][position in block]`
#[derive(Debug)]
struct Pages([Vec<Vec<[AtomicU64; T]>>; 2]);

impl Pages {
    fn new(pools: &[PoolSpec]) -> Self {
        let page = |_| std::array::from_fn(|_| AtomicU64::new(0));
        let tier = |slots: fn(&PoolSpec) -> u32| {
            pools
                .iter()
                .map(|pool| (0..=slots(pool)).map(page).collect())
                .collect()
        };
        Self([tier(|pool| pool.num_slots), tier(|pool| pool.host_slots)])
    }

    fn page(&self, tier: Tier, pool: usize, slot: u32) -> &[AtomicU64; T] {
        &self.0[tier as usize][pool][slot as usize]
    }

    fn copy(&self, pool: usize, from: (Tier, u32), to: (Tier, u32)) {
        let (from, to) = (self.page(from.0, pool, from.1), self.page(to.0, pool, to.1));
        for (from, to) in from.iter().zip(to) {
            let byte = from.load(Ordering::Acquire); // Acquire: partner the store in `compute`
            to.store(byte, Ordering::Release); // Release: partner the load in `verify`
        }
    }
}

/// Copies down at once; refuses now and then.
#[derive(Debug)]
struct Down(Arc<Pages>, AtomicU64);

impl Mover for Down {
    fn offload(&self, pool: usize, src: u32, dst: u32) -> bool {
        if self.1.fetch_add(1, Ordering::Relaxed) % 29 == 28 {
            return false; // Relaxed: a count
        }
        self.0.copy(pool, (Tier::Device, src), (Tier::Host, dst));
        true
    }
}

fn value(scope: usize, epoch: u64, prefix: &[i32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (scope, epoch, prefix).hash(&mut hasher);
    hasher.finish()
}

struct Run<'a> {
    core: &'a Core,
    pages: &'a Pages,
    tiered: bool,
}

struct Open {
    cache: Cache,
    scope: usize,
    epoch: u64,
    tokens: Vec<i32>,
    in_flight: bool,
}

impl Run<'_> {
    fn verify(&self, open: &Open) -> usize {
        let info = self.core.info(&open.cache).unwrap();
        let mut verified = 0;
        for pool in 0..self.pages.0[0].len() {
            let table = self.core.table(&open.cache, pool).unwrap();
            for at in 0..info.committed as usize {
                let slot = table[at / T];
                if slot != 0 {
                    let found = self.pages.page(Tier::Device, pool, slot)[at % T].load(Ordering::Acquire); // Acquire: partner the store in `compute`
                    let right = value(open.scope, open.epoch, &open.tokens[..=at]);
                    assert_eq!(
                        found, right,
                        "pool {pool} slot {slot}: wrong byte at position {at}"
                    );
                    verified += 1;
                }
            }
        }
        verified
    }

    fn compute(&self, open: &Open, from: usize, to: usize) {
        for pool in 0..self.pages.0[0].len() {
            let table = self.core.table(&open.cache, pool).unwrap();
            for at in from..to {
                let slot = table[at / T];
                if slot != 0 {
                    let right = value(open.scope, open.epoch, &open.tokens[..=at]);
                    self.pages.page(Tier::Device, pool, slot)[at % T].store(right, Ordering::Release);
                    // Release: partner the load in `verify`
                }
            }
        }
    }

    fn copy(&self, copies: &[PageCopy]) {
        for copy in copies {
            let (from, to) = ((copy.tier, copy.src), (Tier::Device, copy.dst));
            self.pages.copy(copy.pool as usize, from, to);
        }
    }

    /// Some requests: all claimed, then provided or not, some undone first, some closed unprovided.
    fn serve_batch(&self, rng: &mut Rng, open: &mut Vec<Open>) -> usize {
        let (scope, epoch) = (rng.below(2), self.core.epoch());
        let prompts: Vec<Vec<i32>> = (0..1 + rng.below(3))
            .map(|_| (0..2 + rng.below(12)).map(|_| rng.below(2) as i32).collect())
            .collect();
        let claims = prompts.iter().map(|tokens| Claim {
            tokens: tokens.into(),
            scope: [b"a".as_slice(), b"b"][scope],
            epoch: Some(epoch),
            retention: None,
            least: [None, Some(1)][rng.below(2)],
            most: [None, Some(4)][rng.below(2)],
        });
        let caches = self.core.claim_all(claims.collect(), rng.below(4) > 0).unwrap();
        let mut verified = 0;
        for (cache, tokens) in caches.into_iter().zip(prompts) {
            let Some(mut cache) = cache else { continue };
            let (mut copies, wanted) = (Vec::new(), tokens.len() as u64);
            if rng.below(6) == 0 || !self.core.provide(&mut cache, wanted, &mut copies).unwrap() {
                self.core.close(&mut cache).unwrap();
                continue;
            }
            self.copy(&copies);
            if rng.below(6) == 0 {
                self.core.copies_failed(&mut cache);
                self.core.close(&mut cache).unwrap();
                continue;
            }
            self.core.copies_done(&mut cache);
            let one = Open {
                cache,
                scope,
                epoch,
                tokens,
                in_flight: false,
            };
            verified += self.finish_prompt(one, open);
        }
        verified
    }

    /// Computes and commits the rest of a prompt that has room. Returns the positions verified before.
    fn finish_prompt(&self, mut one: Open, open: &mut Vec<Open>) -> usize {
        let verified = self.verify(&one);
        let have = self.core.info(&one.cache).unwrap().committed as usize;
        self.compute(&one, have, one.tokens.len());
        self.core.commit(&mut one.cache, &one.tokens[have..]).unwrap();
        self.verify(&one);
        open.push(one);
        verified
    }

    /// One request from create to ACTIVE with its prompt committed. Returns the positions verified.
    fn serve(&self, rng: &mut Rng, open: &mut Vec<Open>) -> usize {
        let scope = rng.below(2);
        let tokens: Vec<i32> = (0..2 + rng.below(12)).map(|_| rng.below(2) as i32).collect();
        self.core.advance(self.core.counters().requests as f64);
        // An explicit epoch, so that the content is known; it may be an old one by the time of the call.
        let epoch = self.core.epoch();
        let retention = (rng.below(4) == 0).then(|| RetentionSpec {
            ranges: vec![],
            decode: Retain {
                priority: rng.below(100) as u8,
                duration: [2.0, f64::INFINITY][rng.below(2)],
            },
        });
        let name = [b"a".as_slice(), b"b"][scope];
        let mut one = Open {
            cache: self.core.create(&tokens, name, Some(epoch), retention).unwrap(),
            scope,
            epoch,
            tokens,
            in_flight: false,
        };
        if !self.resume(rng, &mut one) {
            return 0;
        }
        let verified = self.verify(&one);
        let have = self.core.info(&one.cache).unwrap().committed as usize;
        if self
            .core
            .resize(&mut one.cache, one.tokens.len() as u64, None)
            .unwrap()
        {
            self.compute(&one, have, one.tokens.len());
            self.core.commit(&mut one.cache, &one.tokens[have..]).unwrap();
            self.verify(&one);
        }
        open.push(one);
        verified
    }

    /// ACTIVE, with all that was committed in its place; or `false`, and closed: with two tiers there may be no room, or a
    /// block on the move, and the copies may fail or not be waited for.
    fn resume(&self, rng: &mut Rng, one: &mut Open) -> bool {
        let mut copies = Vec::new();
        if !self.core.resume(&mut one.cache, &mut copies).unwrap() {
            assert!(self.tiered, "one tier and no room for what is there");
            self.end(one);
            return false;
        }
        self.copy(&copies);
        if !copies.is_empty() && rng.below(8) == 0 {
            if rng.below(2) == 0 {
                self.core.copies_failed(&mut one.cache);
            }
            self.end(one);
            return false;
        }
        self.core.copies_done(&mut one.cache);
        true
    }

    /// Closes, in flight or not.
    fn end(&self, one: &mut Open) {
        let over = self.core.close(&mut one.cache).unwrap();
        assert_eq!(over, !one.in_flight);
        if one.in_flight {
            assert!(self.core.step_end(&mut one.cache, 1).unwrap());
        }
    }

    /// A step begins or ends, or the cache is suspended or resumed, maybe in the middle of a step. `None`: it is closed.
    fn go_on(&self, rng: &mut Rng, one: &mut Open) -> Option<usize> {
        if one.in_flight && rng.below(3) > 0 {
            assert!(!self.core.step_end(&mut one.cache, 1).unwrap());
            one.in_flight = false;
            return Some(0);
        }
        if self.core.info(&one.cache).unwrap().state == CacheState::Active {
            if !one.in_flight && rng.below(3) == 0 {
                self.core.step_begin(&mut one.cache, 1).unwrap();
                one.in_flight = true;
                return Some(0);
            }
            self.core.suspend(&mut one.cache).unwrap();
            if rng.below(3) > 0 {
                return Some(0);
            }
        }
        self.resume(rng, one).then(|| self.verify(one))
    }

    fn thread(&self, seed: u64, steps: usize) -> usize {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let (mut open, mut verified) = (Vec::new(), 0);
        for _ in 0..steps {
            match rng.below(12) {
                0..=3 if open.len() < 3 => verified += self.serve(&mut rng, &mut open),
                4..=5 if open.len() < 3 => verified += self.serve_batch(&mut rng, &mut open),
                6 => {
                    self.core.evict(1 + rng.below(2) as u64);
                }
                7 => {
                    self.core.probe(&[0, 1, 0, 1, 1], b"a", None).unwrap();
                }
                8 if rng.below(40) == 0 => {
                    let _ = self.core.set_epoch(self.core.epoch() + 1); // another thread may have been faster
                }
                8 | 11 if !open.is_empty() => {
                    let at = rng.below(open.len());
                    let mut one: Open = open.swap_remove(at);
                    if let Some(counted) = self.go_on(&mut rng, &mut one) {
                        verified += counted;
                        open.push(one);
                    }
                }
                9 if rng.below(20) == 0 => self.core.clear(),
                10 => {
                    let tier = [Tier::Device, Tier::Host][rng.below(2)];
                    for books in self.core.books(tier) {
                        let sum = books.free + books.active + books.held + books.cached + books.fenced;
                        assert_eq!(sum, books.slots);
                    }
                }
                _ if !open.is_empty() => {
                    let at = rng.below(open.len());
                    let mut one: Open = open.swap_remove(at);
                    if self.core.info(&one.cache).unwrap().state == CacheState::Active {
                        self.verify(&one);
                    }
                    self.end(&mut one);
                }
                _ => {}
            }
        }
        for one in &mut open {
            self.end(one);
        }
        verified
    }
}

fn pool(name: &str, num_slots: u32, host_slots: u32, window: Option<u64>) -> PoolSpec {
    PoolSpec {
        name: name.into(),
        num_slots,
        host_slots,
        window,
        sink_tokens: 0,
    }
}

fn run(seed: u64, pools: &[PoolSpec], policy: PolicyKind, threads: u64, steps: usize) -> usize {
    let pages = Arc::new(Pages::new(pools));
    let tiered = pools.iter().any(|pool| pool.host_slots > 0);
    let config = CoreConfig {
        tokens_per_block: T as u32,
        pools: pools.to_vec(),
        max_blocks: 3 + seed as u32 % 20,
        max_seq_len: Some(16),
        partial_reuse: true,
        hash_seed: seed,
        policy,
        offload_min_priority: 30,
        collide: seed % 3 == 0,
    };
    let down = Down(pages.clone(), AtomicU64::new(seed));
    let core = Core::with_mover(config, Box::new(down)).unwrap();
    let run = Run {
        core: &core,
        pages: &pages,
        tiered,
    };
    let verified = std::thread::scope(|scope| {
        let run = &run;
        let all: Vec<_> = (0..threads)
            .map(|i| scope.spawn(move || run.thread(seed * 8 + i, steps)))
            .collect();
        all.into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| panic!("seed {seed}")))
            .sum()
    });
    core.check(&[])
        .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    core.clear();
    core.check(&[])
        .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    for tier in [Tier::Device, Tier::Host] {
        for books in core.books(tier) {
            assert_eq!(
                books.free, books.slots,
                "seed {seed}: a page of the {tier:?} was lost"
            );
        }
    }
    let (mut events, mut stored) = (Vec::new(), HashMap::new());
    core.events.drain(usize::MAX, &mut events);
    let whole = events
        .iter()
        .zip(1..)
        .all(|(event, number)| event.number == number);
    for event in events {
        let change = match event.kind {
            EventKind::Stored => 1,
            EventKind::Removed => -1,
            EventKind::Moved => 0,
        };
        *stored.entry((event.pool, event.key)).or_insert(0) += change;
    }
    let left = stored.values().filter(|&&count| count != 0).count();
    assert!(
        !whole || left == 0,
        "seed {seed}: events leave {left} pages in an empty tree"
    );
    assert_eq!(
        core.available_tokens(),
        16.min(T as u64 * pools.iter().map(|p| u64::from(p.num_slots)).min().unwrap())
    );
    verified
}

fn all(seeds: std::ops::Range<u64>, host: impl Fn(u64) -> u32) -> usize {
    let seeds = match std::env::var("KVPOOL_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => seeds.collect::<Vec<u64>>(),
    };
    let mut verified = 0;
    for seed in seeds {
        let (full, host) = (4 + seed as u32 % 9, host(seed));
        let pools = match seed % 4 {
            0 | 1 => vec![pool("full", full, host, None)],
            2 => vec![
                pool("full", full, host, None),
                pool("window", full, host, Some(3)),
            ],
            _ if host > 0 && seed % 8 == 7 => vec![
                pool("full", full, host, None),
                pool("more", full + 1, host + 1, None),
                pool("window", full, host.div_ceil(2), Some(3)),
            ],
            _ => vec![
                pool("near", full, host, Some(3)),
                pool("far", full + 2, host, Some(7)),
            ],
        };
        let policy = if seed % 5 == 0 {
            PolicyKind::Slru
        } else {
            PolicyKind::Lru
        };
        verified += run(seed, &pools, policy, 2 + seed % 3, 1000);
    }
    verified
}

#[test]
fn threads_lose_no_page_and_serve_no_wrong_byte() {
    let verified = all(0..200, |_| 0);
    assert!(
        verified > 1000 || std::env::var("KVPOOL_SEED").is_ok(),
        "only {verified} positions were reused"
    );
}

#[test]
fn threads_on_two_tiers_lose_no_page_and_serve_no_wrong_byte() {
    let verified = all(0..120, |seed| 1 + seed as u32 % 7);
    assert!(
        verified > 1000 || std::env::var("KVPOOL_SEED").is_ok(),
        "only {verified} positions were reused"
    );
}
