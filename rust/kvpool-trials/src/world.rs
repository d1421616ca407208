//! A core, its pages, and what all actors share.

use crate::choose::Choose;
use crate::pages::Pages;
use kvpool_core::events::EventKind;
use kvpool_core::sync::{AtomicU64, Ordering};
use kvpool_core::types::{CoreConfig, Mover, PageCopy, PolicyKind, PoolSpec};
use kvpool_core::words::Tier;
use kvpool_core::{Cache, Core};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The tiers.
pub const TIERS: [Tier; 2] = [Tier::Device, Tier::Host];

/// What a world is like.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Of the core.
    pub config: CoreConfig,
    /// Tokens are `0..alphabet`.
    pub alphabet: usize,
    /// One of so many copies down fails; 0: none.
    pub faults: u64,
    /// Whether pages are lost and slots retired.
    pub losses: bool,
}

impl Spec {
    /// Pools of all kinds: small ones in which all is short, or large ones in which much is cached.
    pub fn choose(choose: &mut dyn Choose) -> Self {
        let large = choose.one_in(4);
        let tiered = choose.below(2) == 1;
        let slots = |choose: &mut dyn Choose| match large {
            true => choose.between(30, 200),
            false => choose.between(2, 13),
        } as u32;
        let pool = |choose: &mut dyn Choose, at: usize| PoolSpec {
            name: format!("pool {at}"),
            num_slots: slots(choose),
            host_slots: if tiered { slots(choose).div_ceil(2) } else { 0 },
            window: (choose.below(3) == 2).then(|| choose.between(1, 9) as u64),
            sink_tokens: 0,
        };
        let mut pools: Vec<PoolSpec> = Vec::new();
        for at in 0..[1, 1, 2, 3][choose.below(4)] {
            pools.push(pool(choose, at));
        }
        for pool in pools.iter_mut().filter(|pool| pool.window.is_some()) {
            pool.sink_tokens = [0, 0, 1, 3][choose.below(4)];
        }
        let policy = [PolicyKind::Lru, PolicyKind::Slru][choose.below(2)];
        let config = CoreConfig {
            tokens_per_block: [1, 2, 2, 4][choose.below(4)],
            pools,
            max_blocks: if large { 250 } else { choose.between(2, 30) as u32 },
            max_seq_len: Some(if large { 48 } else { 16 }),
            partial_reuse: choose.below(4) > 0,
            hash_seed: choose.below(251) as u64,
            policy,
            offload_min_priority: [30, 0, 60][choose.below(3)],
            collide: choose.below(4) == 3,
        };
        Self {
            config,
            alphabet: 2 + usize::from(choose.one_in(3)),
            faults: if tiered { [0, 29, 5][choose.below(3)] } else { 0 },
            losses: choose.below(4) == 3,
        }
    }

    /// Whether there is a host tier.
    pub fn tiered(&self) -> bool {
        self.config.pools.iter().any(|pool| pool.host_slots > 0)
    }
}

/// A write to a page: pool, slot, position in the page, value.
pub type Write = (usize, u32, usize, u64);

/// What somebody does in the middle of a copy down.
pub type Meanwhile = Box<dyn FnMut() + Send>;

/// Copies down at once; fails now and then.
pub struct Down {
    pages: Arc<Pages>,
    faults: u64,
    copies: AtomicU64,
    /// Called in the middle of each copy.
    pub meanwhile: Mutex<Option<Meanwhile>>,
}

impl std::fmt::Debug for Down {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Down")
    }
}

#[derive(Debug)]
struct Shared(Arc<Down>);

impl Mover for Shared {
    fn offload(&self, pool: usize, src: u32, dst: u32) -> bool {
        let Down {
            pages,
            faults,
            copies,
            meanwhile,
        } = &*self.0;
        let count = copies.fetch_add(1, Ordering::Relaxed) + 1; // Relaxed: a count
        if let Ok(mut meanwhile) = meanwhile.try_lock() {
            if let Some(meanwhile) = meanwhile.as_mut() {
                meanwhile();
            }
        }
        if *faults > 0 && count % faults == 0 {
            return false;
        }
        pages.copy(pool, (Tier::Device, src), (Tier::Host, dst));
        true
    }
}

/// What the events have told.
#[derive(Debug, Default)]
struct Ledger {
    events: u64,
    last: u64,
    stored: HashMap<(u32, u64), i64>,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    /// What is tried.
    pub core: Core,
    /// What its slots hold.
    pub pages: Arc<Pages>,
    /// What it is like.
    pub spec: Spec,
    /// Who copies down.
    pub down: Arc<Down>,
    /// Slots out of use, by tier and pool.
    retired: Mutex<[Vec<u32>; 2]>,
    ledger: Mutex<Ledger>,
}

impl World {
    /// Nothing is cached.
    pub fn new(spec: Spec) -> Self {
        let pools = &spec.config.pools;
        let pages = Arc::new(Pages::new(pools, spec.config.tokens_per_block as usize));
        let down = Arc::new(Down {
            pages: pages.clone(),
            faults: spec.faults,
            copies: AtomicU64::new(0),
            meanwhile: Mutex::new(None),
        });
        let mover = Box::new(Shared(down.clone()));
        Self {
            core: Core::with_mover(spec.config.clone(), mover).expect("sizes of a trial are small"),
            pages,
            down,
            retired: Mutex::new([vec![0; pools.len()], vec![0; pools.len()]]),
            ledger: Mutex::default(),
            spec,
        }
    }

    /// Tokens of a block.
    pub fn t(&self) -> usize {
        self.spec.config.tokens_per_block as usize
    }

    /// Copies down so far.
    pub fn copies(&self) -> u64 {
        self.down.copies.load(Ordering::Relaxed) // Relaxed: a count
    }

    // -- the pages of a cache -------------------------------------------------------------------

    /// Stale blocks, and they alone, have no page; every final position holds `content`, or tells where not. Positions that
    /// were compared.
    pub fn compare(&self, cache: &Cache, content: &[u64]) -> Result<u64, String> {
        let (info, t) = (self.core.info(cache).expect("open"), self.t());
        let mut compared = 0;
        for (pool, spec) in self.spec.config.pools.iter().enumerate() {
            let (s, e) = spec.stale(info.history, t as u64);
            for (block, &slot) in self.core.table(cache, pool).expect("ACTIVE").iter().enumerate() {
                assert_eq!(
                    slot == 0,
                    (s..e).contains(&block),
                    "pool {pool} block {block}: stale or not"
                );
                if slot == 0 {
                    continue;
                }
                let end = ((block + 1) * t).min(info.committed as usize);
                for (at, &right) in content.iter().enumerate().take(end).skip(block * t) {
                    if self.pages.read(Tier::Device, pool, slot, at % t) != right {
                        return Err(format!("pool {pool} slot {slot}: wrong byte at position {at}"));
                    }
                    compared += 1;
                }
            }
        }
        Ok(compared)
    }

    /// Where an ACTIVE cache writes in these pools: positions that are not final.
    pub fn writes(&self, cache: &Cache, content: &[u64], pools: impl Fn(usize) -> bool) -> Vec<Write> {
        let (info, t) = (self.core.info(cache).expect("open"), self.t());
        let mut writes = Vec::new();
        for pool in (0..self.spec.config.pools.len()).filter(|&pool| pools(pool)) {
            let table = self.core.table(cache, pool).expect("ACTIVE");
            for at in info.committed as usize..info.capacity as usize {
                if table[at / t] != 0 {
                    writes.push((pool, table[at / t], at % t, content[at]));
                }
            }
        }
        writes
    }

    /// A forward pass over all positions that have storage and are not final.
    pub fn compute(&self, cache: &Cache, content: &[u64]) {
        for (pool, slot, at, value) in self.writes(cache, content, |_| true) {
            self.pages.write(Tier::Device, pool, slot, at, value);
        }
    }

    /// Makes the copies of a plan.
    pub fn make(&self, copies: &[PageCopy]) {
        for copy in copies {
            let (from, to) = ((copy.tier, copy.src), (Tier::Device, copy.dst));
            self.pages.copy(copy.pool as usize, from, to);
        }
    }

    // -- the whole ------------------------------------------------------------------------------

    /// Takes a slot out of use, at most one of a pool and tier.
    pub fn retire(&self, tier: Tier, pool: usize, slot: u32) {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        if retired[tier as usize][pool] == 0 && self.core.retire(pool, tier, slot) {
            retired[tier as usize][pool] = 1;
        }
    }

    /// Writes down what happened since the last call.
    pub fn read_events(&self) {
        let mut events = Vec::new();
        self.core.events.drain(usize::MAX, &mut events);
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            ledger.events += 1;
            ledger.last = ledger.last.max(event.number);
            let change = match event.kind {
                EventKind::Stored => 1,
                EventKind::Removed => -1,
                EventKind::Moved => continue,
            };
            *ledger.stored.entry((event.pool, event.key)).or_insert(0) += change;
        }
    }

    /// Everything that must hold while nobody is in a call.
    pub fn check<'a>(&self, caches: impl IntoIterator<Item = &'a Cache>) {
        let caches: Vec<&Cache> = caches.into_iter().collect();
        if let Err(error) = self.core.check(&caches) {
            panic!("{error}");
        }
    }

    /// Everything that must hold once all caches are closed: nothing was lost. Returns whether the events told everything.
    pub fn end(&self) -> bool {
        self.check([]);
        self.core.drop_lost();
        self.core.clear();
        self.check([]);
        let retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        for tier in TIERS {
            for (books, retired) in self.core.books(tier).iter().zip(&retired[tier as usize]) {
                assert_eq!(
                    books.free + retired,
                    books.slots,
                    "a slot of the {tier:?} was lost"
                );
            }
        }
        self.read_events();
        let ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = ledger.events == ledger.last;
        let left = ledger.stored.values().filter(|&&count| count != 0).count();
        assert!(
            !whole || left == 0,
            "the events leave {left} pages in an empty tree"
        );
        let room = |(pool, retired): (&PoolSpec, &u32)| u64::from(pool.num_slots - retired) * self.t() as u64;
        let most = self.spec.config.pools.iter().zip(&retired[0]).map(room).min();
        let most = most
            .unwrap_or(0)
            .min(self.spec.config.max_seq_len.unwrap_or(u64::MAX));
        assert_eq!(
            self.core.available_tokens(),
            most,
            "available_tokens of an empty core"
        );
        whole
    }
}
