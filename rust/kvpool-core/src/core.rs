//! The façade: every operation of a cache, one call each.
//!
//! `available(p) == free(p) + evictable(p)`, evictable = unclaimed nodes (full attention) or pages
//! without a claim (windowed). An operation counts its whole need against `available` in all pools
//! first; only when all of it can be had does it evict and take.

use crate::cache::Cache;
use crate::error::{CoreError, Result};
use crate::evict::{Key, Lru, NodeRef, Order, Policy, Slru};
use crate::pool::SlotPool;
use crate::tree::Tree;
use crate::types::{CacheState, CoreConfig, Counters, PageCopy, PolicyKind, PoolBooks, RetentionSpec, NIL};
use std::cmp::Reverse;

/// Names a cache: index and generation, so that a closed one is never taken for its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheId {
    pub(crate) index: u32,
    pub(crate) gen: u32,
}

impl CacheId {
    /// One number for foreign callers.
    pub fn to_u64(self) -> u64 {
        u64::from(self.gen) << 32 | u64::from(self.index)
    }

    /// The reverse of [`CacheId::to_u64`]; an invented number names no cache.
    pub fn from_u64(raw: u64) -> Self {
        Self {
            index: raw as u32,
            gen: (raw >> 32) as u32,
        }
    }
}

/// What a cache tells of itself.
#[derive(Debug, Clone, Copy)]
pub struct CacheInfo {
    /// Public state.
    pub state: CacheState,
    /// Tokens found in the tree.
    pub reused: u64,
    /// Tokens with storage.
    pub capacity: u64,
    /// Tokens before the next step's input.
    pub history: u64,
    /// Final tokens.
    pub committed: u64,
}

/// The longest valid match of a prompt.
#[derive(Debug, Clone, Copy)]
struct Match {
    tokens: u64,
    source: u32,
}

/// Asks for the largest tables before they are made: a failed `vec!` would end the process.
fn check_memory(config: &CoreConfig) -> Result<()> {
    let nodes = config.max_blocks as usize;
    let slots: usize = config.pools.iter().map(|pool| pool.num_slots as usize).sum();
    let per_node = std::mem::size_of::<crate::tree::Node>()
        + config.pools.len() * std::mem::size_of::<crate::tree::Page>()
        + (1 + config.pools.len()) * 2 * std::mem::size_of::<(Key, NodeRef)>()
        + 4 * config.tokens_per_block as usize
        + 32;
    let bytes = nodes.saturating_mul(per_node).saturating_add(4 * slots);
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| {
        CoreError::Memory(format!(
            "the tables of max_blocks = {nodes} nodes and {slots} slots need {bytes} bytes, which cannot be \
             allocated: lower max_blocks or the number of slots"
        ))
    })
}

/// Tree, pools, caches and their books.
#[derive(Debug)]
pub struct Core {
    pub(crate) config: CoreConfig,
    pub(crate) tree: Tree,
    pub(crate) pools: Vec<SlotPool>,
    pub(crate) caches: Vec<Cache>,
    free_caches: Vec<u32>,
    leaves: Order,
    orders: Vec<Order>,
    policy: Box<dyn Policy>,
    epoch: u64,
    stamp: u64,
    counters: Counters,
    has_full: bool,
    path: Vec<u32>,
    keys: Vec<u64>,
    runs: Vec<Vec<(u32, u32)>>,
}

impl Core {
    /// An empty core. All sizes are fixed from here on.
    pub fn new(config: CoreConfig) -> Result<Self> {
        if config.tokens_per_block == 0 || config.pools.is_empty() || config.max_blocks == 0 {
            return Err(CoreError::Value(
                "tokens_per_block, pools and max_blocks must not be empty".into(),
            ));
        }
        check_memory(&config)?;
        let windowed: Vec<bool> = config.pools.iter().map(|p| p.window.is_some()).collect();
        let pools: Vec<SlotPool> = config.pools.iter().map(|p| SlotPool::new(p.num_slots)).collect();
        let tree = Tree::new(
            config.tokens_per_block as usize,
            config.max_blocks,
            windowed.clone(),
            config.hash_seed,
            config.collide,
        );
        let count = pools.len();
        let policy: Box<dyn Policy> = match config.policy {
            PolicyKind::Lru => Box::new(Lru),
            PolicyKind::Slru => Box::new(Slru::new(config.max_blocks as usize)),
        };
        let nodes = config.max_blocks as usize;
        Ok(Self {
            has_full: windowed.iter().any(|w| !w),
            orders: (0..count)
                .map(|p| Order::new(if windowed[p] { nodes } else { 0 }))
                .collect(),
            leaves: Order::new(nodes),
            tree,
            pools,
            caches: Vec::new(),
            free_caches: Vec::new(),
            policy,
            epoch: 0,
            stamp: 0,
            counters: Counters::default(),
            path: Vec::new(),
            keys: Vec::new(),
            runs: vec![Vec::new(); count],
            config,
        })
    }

    fn t(&self) -> u64 {
        u64::from(self.config.tokens_per_block)
    }

    /// Slots of a pool that are free or can be made free.
    pub fn available(&self, pool: usize) -> u32 {
        let evictable = if self.tree.windowed[pool] {
            self.tree.idle[pool]
        } else {
            self.tree.unclaimed
        };
        self.pools[pool].free() + evictable
    }

    fn get(&self, id: CacheId) -> Result<&Cache> {
        match self.caches.get(id.index as usize) {
            Some(cache) if cache.gen == id.gen && cache.state != CacheState::Closed => Ok(cache),
            _ => Err(CoreError::State("the cache is CLOSED".into())),
        }
    }

    fn active(&self, id: CacheId, what: &str) -> Result<&Cache> {
        let cache = self.get(id)?;
        if cache.state == CacheState::Active {
            Ok(cache)
        } else {
            Err(CoreError::State(format!(
                "{what} needs an ACTIVE cache, this one is {}: call resume() first",
                cache.state.name()
            )))
        }
    }

    // -- order of eviction ------------------------------------------------------------------

    fn rank(&self, node: u32) -> i16 {
        let n = &self.tree.nodes[node as usize];
        if self.tree.root(n.root).epoch < self.epoch {
            -1
        } else {
            i16::from(n.priority)
        }
    }

    fn leaf_key(&self, node: u32) -> Key {
        let n = &self.tree.nodes[node as usize];
        let pool = self.tree.windowed.iter().position(|w| !w).unwrap_or(0);
        Key {
            priority: self.rank(node),
            in_window: true,
            segment: n.segment,
            used: n.used,
            depth: Reverse(n.depth),
            slot: self.tree.pages[pool][node as usize].slot,
        }
    }

    fn page_key(&self, pool: usize, node: u32) -> Key {
        let n = &self.tree.nodes[node as usize];
        let page = &self.tree.pages[pool][node as usize];
        Key {
            priority: self.rank(node),
            in_window: !page.stale,
            segment: n.segment,
            used: if page.stale {
                page.used
            } else {
                page.used.max(n.used)
            },
            depth: Reverse(n.depth),
            slot: page.slot,
        }
    }

    fn is_leaf(&self, node: u32) -> bool {
        let n = &self.tree.nodes[node as usize];
        n.live && n.refs == 0 && n.children == 0
    }

    fn is_idle(&self, pool: usize, node: u32) -> bool {
        let page = &self.tree.pages[pool][node as usize];
        self.tree.nodes[node as usize].live && page.slot != 0 && page.claims == 0
    }

    /// Enters a leaf into the order; `lowered`: its key fell, so the entry it has is no lower bound.
    fn queue_leaf(&mut self, node: u32, lowered: bool) {
        if !self.is_leaf(node) || (self.tree.nodes[node as usize].queued && !lowered) {
            return;
        }
        if self.leaves.is_full() {
            return self.rebuild_leaves();
        }
        self.tree.nodes[node as usize].queued = true;
        let key = self.leaf_key(node);
        self.leaves.push(key, self.tree.at(node));
    }

    fn queue_page(&mut self, pool: usize, node: u32, lowered: bool) {
        if !self.is_idle(pool, node) || (self.tree.pages[pool][node as usize].queued && !lowered) {
            return;
        }
        if self.orders[pool].is_full() {
            return self.rebuild_pages(pool);
        }
        self.tree.pages[pool][node as usize].queued = true;
        let key = self.page_key(pool, node);
        self.orders[pool].push(key, self.tree.at(node));
    }

    fn rebuild_leaves(&mut self) {
        self.leaves.clear();
        for node in 0..self.config.max_blocks {
            let leaf = self.is_leaf(node);
            self.tree.nodes[node as usize].queued = leaf;
            if leaf {
                let key = self.leaf_key(node);
                self.leaves.push(key, self.tree.at(node));
            }
        }
    }

    fn rebuild_pages(&mut self, pool: usize) {
        self.orders[pool].clear();
        for node in 0..self.config.max_blocks {
            let idle = self.is_idle(pool, node);
            self.tree.pages[pool][node as usize].queued = idle;
            if idle {
                let key = self.page_key(pool, node);
                self.orders[pool].push(key, self.tree.at(node));
            }
        }
    }

    fn rebuild_orders(&mut self) {
        self.rebuild_leaves();
        for pool in 0..self.pools.len() {
            if self.tree.windowed[pool] {
                self.rebuild_pages(pool);
            }
        }
    }

    /// The first leaf in order leaves the tree, with its pages. `false`: there is none.
    fn evict_leaf(&mut self) -> bool {
        while let Some((key, node)) = self.leaves.pop() {
            if !self.tree.is_live(node) {
                continue;
            }
            if !self.is_leaf(node.id) {
                self.tree.nodes[node.id as usize].queued = false;
                continue;
            }
            let now = self.leaf_key(node.id);
            if now > key {
                self.leaves.push(now, node);
                continue;
            }
            let pages = self.drop_node(node.id);
            self.counters.evicted += u64::from(pages);
            return true;
        }
        false
    }

    fn evict_page(&mut self, pool: usize) -> bool {
        while let Some((key, node)) = self.orders[pool].pop() {
            if !self.tree.is_live(node) {
                continue;
            }
            if !self.is_idle(pool, node.id) {
                self.tree.pages[pool][node.id as usize].queued = false;
                continue;
            }
            let now = self.page_key(pool, node.id);
            if now > key {
                self.orders[pool].push(now, node);
                continue;
            }
            self.drop_page(pool, node.id);
            self.counters.evicted += 1;
            self.remove_if_empty(node.id);
            return true;
        }
        false
    }

    fn drop_page(&mut self, pool: usize, node: u32) {
        let page = std::mem::take(&mut self.tree.pages[pool][node as usize]);
        debug_assert!(page.slot != 0 && page.claims == 0);
        if self.tree.windowed[pool] {
            self.tree.idle[pool] -= 1;
        }
        self.pools[pool].give(page.slot);
        self.counters.dropped += 1;
    }

    fn drop_node(&mut self, node: u32) -> u32 {
        let mut pages = 0;
        for pool in 0..self.pools.len() {
            if self.tree.pages[pool][node as usize].slot != 0 {
                self.drop_page(pool, node);
                pages += 1;
            }
        }
        self.policy.removed(self.tree.nodes[node as usize].key);
        let parent = self.tree.nodes[node as usize].parent;
        self.tree.remove(node);
        if parent != NIL {
            self.queue_leaf(parent, false);
            self.remove_if_empty(parent);
        }
        pages
    }

    /// Without a full-attention pool a node can lose its last page before it is a leaf.
    fn remove_if_empty(&mut self, node: u32) {
        if !self.has_full
            && self.is_leaf(node)
            && self.tree.pages.iter().all(|pool| pool[node as usize].slot == 0)
        {
            self.drop_node(node);
        }
    }

    /// A slot that `available` promised.
    fn take_slot(&mut self, pool: usize) -> u32 {
        loop {
            if let Some(slot) = self.pools[pool].take() {
                return slot;
            }
            let found = if self.tree.windowed[pool] {
                self.evict_page(pool)
            } else {
                self.evict_leaf()
            };
            assert!(
                found,
                "available() promised a slot of pool {pool} that eviction does not find"
            );
        }
    }

    // -- release ----------------------------------------------------------------------------

    fn tick(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// One claim less on a node; blocks whose last claim it was get `stamp` and `segment`.
    fn unclaim(&mut self, id: u32, stamp: u64, segment: u8) {
        let mut at = id;
        while at != NIL {
            let n = &mut self.tree.nodes[at as usize];
            n.refs -= 1;
            if n.refs > 0 {
                return;
            }
            n.used = stamp;
            let parent = n.parent;
            let rises = segment > n.segment;
            if rises {
                n.segment = segment;
            }
            self.tree.unclaimed += 1;
            if rises {
                self.policy.protect(self.tree.at(at), stamp);
                self.demote_overflow();
            }
            self.queue_leaf(at, false);
            at = parent;
        }
    }

    fn demote_overflow(&mut self) {
        while let Some((node, used)) = self.policy.overflow() {
            if !self.tree.is_live(node) || self.tree.nodes[node.id as usize].segment == 0 {
                self.policy.demoted();
                continue;
            }
            let now = self.tree.nodes[node.id as usize].used;
            if now > used {
                self.policy.keep(node, now);
                continue;
            }
            self.tree.nodes[node.id as usize].segment = 0;
            self.policy.demoted();
            self.queue_leaf(node.id, true);
            for pool in 0..self.pools.len() {
                if self.tree.windowed[pool] {
                    self.queue_page(pool, node.id, true);
                }
            }
        }
    }

    /// One claim less on a page of a windowed pool. `stale`: because it fell out of the window.
    fn unclaim_page(&mut self, pool: usize, node: u32, stamp: u64, stale: bool) {
        let page = &mut self.tree.pages[pool][node as usize];
        page.claims -= 1;
        let idle = page.claims == 0;
        if idle {
            self.tree.idle[pool] += 1;
        }
        if stale {
            page.stale = true;
            page.used = stamp;
        } else if idle && !page.stale {
            page.used = stamp;
        }
        self.queue_page(pool, node, stale);
    }

    /// Gives a private slot of a cache back, behind the fence if a step may still touch it.
    fn give_private(&mut self, index: u32, pool: usize, slot: u32) {
        let cache = &mut self.caches[index as usize];
        if cache.in_flight > 0 {
            cache.fenced.push((pool as u32, slot));
        } else {
            self.pools[pool].give(slot);
        }
    }

    // -- matching ---------------------------------------------------------------------------

    /// Leaves the path of whole blocks in `self.path` (cut to the match) and their keys in `self.keys`.
    fn find(&mut self, root: u32, tokens: &[i32]) -> Match {
        self.path.clear();
        self.keys.clear();
        let t = self.config.tokens_per_block as usize;
        let most = tokens.len().saturating_sub(1);
        let mut key = self.tree.root_key(root);
        let mut parent = NIL;
        for block in tokens[..most / t * t].chunks_exact(t) {
            key = self.tree.extend_key(key, block);
            let Some(node) = self.tree.child(root, parent, key, block) else {
                break;
            };
            self.path.push(node);
            self.keys.push(key);
            parent = node;
        }
        self.count_runs();
        for blocks in (0..=self.path.len()).rev() {
            let at = blocks * t;
            let parent = if blocks == 0 { NIL } else { self.path[blocks - 1] };
            if self.config.partial_reuse {
                let rest = &tokens[at..most.min(at + t - 1)];
                if let Some((source, common)) = self.tree.closest_child(root, parent, rest) {
                    if self.serves(blocks, (at + common) as u64) {
                        self.cut(blocks);
                        return Match {
                            tokens: (at + common) as u64,
                            source,
                        };
                    }
                }
            }
            if self.serves(blocks, at as u64) {
                self.cut(blocks);
                return Match {
                    tokens: at as u64,
                    source: NIL,
                };
            }
        }
        self.cut(0);
        Match {
            tokens: 0,
            source: NIL,
        }
    }

    fn cut(&mut self, blocks: usize) {
        self.path.truncate(blocks);
        self.keys.truncate(blocks);
    }

    /// `runs[pool][i] = (from, sinks)`: pages are present in blocks `[from, i)` and `[0, sinks)`.
    fn count_runs(&mut self) {
        for pool in 0..self.pools.len() {
            let runs = &mut self.runs[pool];
            runs.clear();
            if !self.tree.windowed[pool] {
                continue;
            }
            let (mut from, mut sinks) = (0u32, 0u32);
            runs.push((0, 0));
            for (i, &node) in self.path.iter().enumerate() {
                let i = i as u32;
                if self.tree.pages[pool][node as usize].slot == 0 {
                    from = i + 1;
                } else if sinks == i {
                    sinks = i + 1;
                }
                runs.push((from, sinks));
            }
        }
    }

    /// Whether every pool has a page for every whole block of the path that is live at `m` tokens.
    fn serves(&self, blocks: usize, m: u64) -> bool {
        (0..self.pools.len()).all(|pool| {
            if !self.tree.windowed[pool] {
                return true;
            }
            let (s, e) = self.config.pools[pool].stale(m, self.t());
            let (from, sinks) = self.runs[pool][blocks];
            sinks as usize >= s.min(blocks) && (from as usize <= e || e >= blocks)
        })
    }

    /// Tokens that `create` would reuse now. Claims and changes nothing.
    pub fn probe(&mut self, tokens: &[i32], scope: &[u8], epoch: Option<u64>) -> Result<u64> {
        let epoch = self.scope_epoch(epoch)?;
        if epoch < self.epoch {
            return Ok(0);
        }
        Ok(match self.tree.find_root(scope, epoch) {
            Some(root) => self.find(root, tokens).tokens,
            None => 0,
        })
    }

    fn scope_epoch(&self, epoch: Option<u64>) -> Result<u64> {
        match epoch {
            None => Ok(self.epoch),
            Some(e) if e > self.epoch => Err(CoreError::Value(format!(
                "scope.epoch is {e}, above the manager's epoch {}: call set_epoch first",
                self.epoch
            ))),
            Some(e) => Ok(e),
        }
    }

    // -- life of a cache --------------------------------------------------------------------

    /// A SUSPENDED cache that claims the longest match of its prompt and takes no slot.
    pub fn create(
        &mut self,
        tokens: &[i32],
        scope: &[u8],
        epoch: Option<u64>,
        retention: Option<RetentionSpec>,
    ) -> Result<(CacheId, u64)> {
        let epoch = self.scope_epoch(epoch)?;
        if let Some(most) = self.config.max_seq_len {
            if tokens.len() as u64 > most {
                return Err(CoreError::Value(format!(
                    "tokens: {} of them exceed max_seq_len = {most}",
                    tokens.len()
                )));
            }
        }
        let old = epoch < self.epoch;
        let root = if old {
            NIL
        } else {
            self.tree.use_root(scope, epoch)
        };
        let found = if old {
            self.cut(0);
            Match {
                tokens: 0,
                source: NIL,
            }
        } else {
            self.find(root, tokens)
        };
        let segment = if self.policy.wants_keys() && !old {
            self.complete_keys(root, tokens);
            self.policy.request(&self.keys, self.path.len())
        } else {
            0
        };
        let blocks = self.path.len();
        let t = self.t();
        let room = self
            .config
            .max_seq_len
            .map_or(0, |most| most.div_ceil(t) as usize);
        let room = room.max(tokens.len().div_ceil(t as usize) + 1);
        let m = found.tokens;
        let mut cache = Cache {
            gen: 0,
            state: CacheState::Suspended,
            root,
            epoch,
            prompt: tokens.to_vec(),
            tail: Vec::with_capacity(t as usize),
            reused: m,
            committed: m,
            history: m,
            capacity: m,
            nodes: Vec::with_capacity(room),
            key: match (old, blocks) {
                (true, _) => 0,
                (_, 0) => self.tree.root_key(root),
                _ => self.keys[blocks - 1],
            },
            detached: old,
            source: found.source,
            copying: false,
            tables: vec![Vec::with_capacity(room); self.pools.len()],
            stale_end: vec![0; self.pools.len()],
            in_flight: 0,
            fenced: Vec::new(),
            retention,
            segment,
        };
        cache.nodes.extend_from_slice(&self.path);
        cache
            .tail
            .extend_from_slice(&tokens[blocks * t as usize..m as usize]);
        if cache.retention.is_some() {
            for (i, &node) in cache.nodes.iter().enumerate() {
                let priority = cache.priority(i as u64 * t);
                let n = &mut self.tree.nodes[node as usize];
                n.priority = n.priority.max(priority);
            }
        }
        if blocks > 0 {
            self.tree.claim(cache.deepest());
        }
        if found.source != NIL {
            self.tree.claim(found.source);
        }
        for pool in 0..self.pools.len() {
            let (s, e) = self.config.pools[pool].stale(m, t);
            let windowed = self.tree.windowed[pool];
            cache.stale_end[pool] = e;
            for i in 0..blocks {
                let live = i < s || i >= e;
                let slot = if live {
                    self.tree.pages[pool][cache.nodes[i] as usize].slot
                } else {
                    0
                };
                cache.tables[pool].push(slot);
                if live && windowed {
                    self.tree.claim_page(pool, cache.nodes[i]);
                }
            }
            if found.source != NIL && windowed {
                self.tree.claim_page(pool, found.source);
            }
        }
        self.counters.requests += 1;
        self.counters.prompt_tokens += tokens.len() as u64;
        self.counters.reused_tokens += m;
        self.counters.prompt_blocks += (tokens.len() as u64).div_ceil(t);
        self.counters.reused_blocks += blocks as u64;
        let id = if let Some(index) = self.free_caches.pop() {
            cache.gen = self.caches[index as usize].gen;
            let gen = cache.gen;
            self.caches[index as usize] = cache;
            CacheId { index, gen }
        } else {
            self.caches.push(cache);
            CacheId {
                index: (self.caches.len() - 1) as u32,
                gen: 0,
            }
        };
        Ok((id, m))
    }

    fn complete_keys(&mut self, root: u32, tokens: &[i32]) {
        let t = self.config.tokens_per_block as usize;
        let mut key = self
            .keys
            .last()
            .copied()
            .unwrap_or_else(|| self.tree.root_key(root));
        for block in tokens[self.keys.len() * t..].chunks_exact(t) {
            key = self.tree.extend_key(key, block);
            self.keys.push(key);
        }
    }

    /// ACTIVE from here on. Returns the copies that the caller must make before anything else
    /// touches the cache, then report by [`Core::copies_done`].
    pub fn resume(&mut self, id: CacheId, copies: &mut Vec<PageCopy>) -> Result<bool> {
        copies.clear();
        let cache = self.get(id)?;
        if cache.state == CacheState::Active {
            return Ok(true);
        }
        let source = cache.source;
        if source == NIL || cache.copying {
            self.caches[id.index as usize].state = CacheState::Active;
            return Ok(true);
        }
        if (0..self.pools.len()).all(|pool| self.available(pool) >= 1) {
            for pool in 0..self.pools.len() {
                let dst = self.take_slot(pool);
                let src = self.tree.pages[pool][source as usize].slot;
                copies.push(PageCopy {
                    pool: pool as u32,
                    src,
                    dst,
                });
                self.caches[id.index as usize].tables[pool].push(dst);
            }
            self.caches[id.index as usize].copying = true;
        } else {
            self.shorten(id.index);
        }
        self.caches[id.index as usize].state = CacheState::Active;
        Ok(true)
    }

    /// The copies of the last [`Core::resume`] are made (or ordered): their source is released.
    pub fn copies_done(&mut self, id: CacheId) {
        let Some(cache) = self.caches.get(id.index as usize) else {
            return;
        };
        if cache.gen == id.gen && cache.copying {
            let stamp = self.tick();
            self.release_source(id.index, stamp);
        }
    }

    /// The copies of the last [`Core::resume`] could not be made: the cache is as it was before.
    pub fn copies_failed(&mut self, id: CacheId) {
        let Some(cache) = self.caches.get_mut(id.index as usize) else {
            return;
        };
        if cache.gen != id.gen || !cache.copying {
            return;
        }
        cache.copying = false;
        cache.state = CacheState::Suspended;
        for pool in 0..self.pools.len() {
            if let Some(slot) = self.caches[id.index as usize].tables[pool].pop() {
                self.pools[pool].give(slot);
            }
        }
    }

    fn release_source(&mut self, index: u32, stamp: u64) {
        let cache = &mut self.caches[index as usize];
        let source = std::mem::replace(&mut cache.source, NIL);
        cache.copying = false;
        if source == NIL {
            return;
        }
        for pool in 0..self.pools.len() {
            if self.tree.windowed[pool] {
                self.unclaim_page(pool, source, stamp, false);
            }
        }
        self.unclaim(source, stamp, 0);
    }

    /// No slot for the partial block: the match ends at the longest whole block that still serves.
    fn shorten(&mut self, index: u32) {
        let t = self.t();
        let stamp = self.tick();
        let nodes = std::mem::take(&mut self.caches[index as usize].nodes);
        self.path.clear();
        self.path.extend_from_slice(&nodes);
        self.count_runs();
        let keep = (0..=nodes.len())
            .rev()
            .find(|&k| self.serves(k, k as u64 * t))
            .unwrap_or(0);
        let m = keep as u64 * t;
        // Claim what becomes live before anything is released.
        for pool in 0..self.pools.len() {
            let (s, e) = self.config.pools[pool].stale(m, t);
            self.caches[index as usize].stale_end[pool] = e;
            let windowed = self.tree.windowed[pool];
            for (i, &node) in nodes.iter().enumerate() {
                let live = i < keep && (i < s || i >= e);
                let held = self.caches[index as usize].tables[pool][i] != 0;
                if live && !held {
                    let slot = self.tree.pages[pool][node as usize].slot;
                    self.caches[index as usize].tables[pool][i] = slot;
                    if windowed {
                        self.tree.claim_page(pool, node);
                    }
                }
                if held && !live && windowed {
                    self.unclaim_page(pool, node, stamp, false);
                }
                if !live {
                    self.caches[index as usize].tables[pool][i] = 0;
                }
            }
            self.caches[index as usize].tables[pool].truncate(keep);
        }
        if keep < nodes.len() {
            if keep > 0 {
                self.tree.claim(nodes[keep - 1]);
            }
            self.unclaim(nodes[nodes.len() - 1], stamp, 0);
        }
        self.release_source(index, stamp);
        let key = match keep {
            0 => self.tree.root_key(self.caches[index as usize].root),
            _ => self.tree.nodes[nodes[keep - 1] as usize].key,
        };
        let cache = &mut self.caches[index as usize];
        self.counters.reused_tokens -= cache.reused - m;
        self.counters.reused_blocks -= (nodes.len() - keep) as u64;
        cache.nodes = nodes;
        cache.nodes.truncate(keep);
        cache.key = key;
        cache.tail.clear();
        cache.reused = m;
        cache.committed = m;
        cache.history = m;
        cache.capacity = m;
    }

    /// SUSPENDED from here on; on one tier the pages stay where they are, claimed.
    pub fn suspend(&mut self, id: CacheId) -> Result<()> {
        self.get(id)?;
        self.caches[id.index as usize].state = CacheState::Suspended;
        Ok(())
    }

    /// Sets capacity and history in all pools, or changes nothing and returns `false`.
    pub fn resize(&mut self, id: CacheId, capacity: u64, history: Option<u64>) -> Result<bool> {
        let cache = self.active(id, "resize")?;
        let history = history.unwrap_or(cache.history);
        let most = self.config.max_seq_len.unwrap_or(u64::from(u32::MAX));
        if history < cache.history || history > capacity || capacity > most {
            return Err(CoreError::Value(format!(
                "resize(capacity={capacity}, history_length={history}): needs {} <= history_length <= capacity <= {most}",
                cache.history
            )));
        }
        let t = self.t();
        let old = cache.capacity.div_ceil(t) as usize;
        let new = capacity.div_ceil(t) as usize;
        let index = id.index as usize;
        // Count first: what staleness gives back serves the same call.
        for pool in 0..self.pools.len() {
            let cache = &self.caches[index];
            let (s, e) = self.config.pools[pool].stale(history, t);
            let sinks = self.sinks(pool);
            let mut back = 0u32;
            for i in cache.stale_end[pool].max(sinks)..e.min(old) {
                if cache.tables[pool][i] == 0 {
                    continue;
                }
                back += if i < cache.nodes.len() {
                    u32::from(self.tree.pages[pool][cache.nodes[i] as usize].claims == 1)
                } else {
                    u32::from(cache.in_flight == 0)
                };
            }
            // Blocks [old, new) that are not in [s, e).
            let stale = e.min(new).saturating_sub(s.max(old));
            let need = new.saturating_sub(old).saturating_sub(stale);
            if need as u64 > u64::from(self.available(pool)) + u64::from(back) {
                return Ok(false);
            }
        }
        if history > self.caches[index].history {
            self.caches[index].history = history;
            self.make_stale(id.index);
        }
        for pool in 0..self.pools.len() {
            let (s, e) = self.config.pools[pool].stale(history, t);
            for _ in new..old {
                let slot = self.caches[index].tables[pool].pop().unwrap_or(0);
                if slot != 0 {
                    self.give_private(id.index, pool, slot);
                }
            }
            for i in old..new {
                let slot = if i < s || i >= e { self.take_slot(pool) } else { 0 };
                self.caches[index].tables[pool].push(slot);
            }
        }
        self.caches[index].capacity = capacity;
        Ok(true)
    }

    fn sinks(&self, pool: usize) -> usize {
        self.config.pools[pool].sink_tokens.div_ceil(self.t()) as usize
    }

    /// Gives back what the history has left behind. Returns whether a table entry changed.
    fn make_stale(&mut self, index: u32) -> bool {
        let mut stamp = None;
        let mut changed = false;
        for pool in 0..self.pools.len() {
            if !self.tree.windowed[pool] {
                continue;
            }
            let history = self.caches[index as usize].history;
            let (_, e) = self.config.pools[pool].stale(history, self.t());
            let from = self.caches[index as usize].stale_end[pool].max(self.sinks(pool));
            let end = e.min(self.caches[index as usize].tables[pool].len());
            for i in from..end {
                let cache = &mut self.caches[index as usize];
                let slot = std::mem::replace(&mut cache.tables[pool][i], 0);
                if slot == 0 {
                    continue;
                }
                changed = true;
                if let Some(&node) = cache.nodes.get(i) {
                    let stamp = *stamp.get_or_insert_with(|| {
                        self.stamp += 1;
                        self.stamp
                    });
                    self.unclaim_page(pool, node, stamp, true);
                } else {
                    self.give_private(index, pool, slot);
                }
            }
            let cache = &mut self.caches[index as usize];
            cache.stale_end[pool] = cache.stale_end[pool].max(e);
        }
        changed
    }

    /// Declares tokens final; full blocks enter the tree. Returns whether a table entry changed.
    pub fn commit(&mut self, id: CacheId, tokens: &[i32]) -> Result<bool> {
        let cache = self.active(id, "commit")?;
        let (committed, capacity) = (cache.committed, cache.capacity);
        if committed + tokens.len() as u64 > capacity {
            return Err(CoreError::Value(format!(
                "commit: {committed} committed + {} tokens exceed the capacity {capacity}",
                tokens.len()
            )));
        }
        let prompt = cache.prompt.get(committed as usize..).unwrap_or(&[]);
        if let Some(at) = prompt.iter().zip(tokens).position(|(a, b)| a != b) {
            return Err(CoreError::State(format!(
                "commit: token {} at position {} differs from the prompt's {}",
                tokens[at],
                committed + at as u64,
                prompt[at]
            )));
        }
        let t = self.config.tokens_per_block as usize;
        let index = id.index;
        let mut changed = false;
        let mut rest = tokens;
        while !rest.is_empty() {
            let cache = &mut self.caches[index as usize];
            let run = rest.len().min(t - cache.tail.len());
            cache.tail.extend_from_slice(&rest[..run]);
            cache.committed += run as u64;
            rest = &rest[run..];
            if cache.tail.len() == t {
                changed |= self.commit_block(index);
                self.caches[index as usize].tail.clear();
            }
        }
        let cache = &mut self.caches[index as usize];
        if cache.committed > cache.history {
            cache.history = cache.committed;
            changed |= self.make_stale(index);
        }
        Ok(changed)
    }

    /// The block in `tail` enters the tree, or the cache takes the tree's pages for it.
    fn commit_block(&mut self, index: u32) -> bool {
        let cache = &self.caches[index as usize];
        if cache.detached || cache.epoch < self.epoch {
            self.caches[index as usize].detached = true;
            return false;
        }
        let i = cache.nodes.len();
        let (root, parent) = (cache.root, cache.deepest());
        let key = self.tree.extend_key(cache.key, &cache.tail);
        let priority = cache.priority((i * self.config.tokens_per_block as usize) as u64);
        let mut changed = false;
        let node = match self.tree.child(root, parent, key, &cache.tail) {
            Some(node) => {
                if self.caches[index as usize].retention.is_some() {
                    let n = &mut self.tree.nodes[node as usize];
                    n.priority = n.priority.max(priority);
                }
                node
            }
            None => {
                if self.tree.free_nodes() == 0 && !self.evict_leaf() {
                    self.caches[index as usize].detached = true;
                    return false;
                }
                let tail = std::mem::take(&mut self.caches[index as usize].tail);
                let node = self.tree.insert(root, parent, key, &tail, priority);
                self.caches[index as usize].tail = tail;
                let Some(node) = node else {
                    self.caches[index as usize].detached = true;
                    return false;
                };
                node
            }
        };
        self.tree.claim(node);
        if parent != NIL {
            // Never the last claim: the child protects it.
            self.unclaim(parent, 0, 0);
        }
        for pool in 0..self.pools.len() {
            let own = self.caches[index as usize].tables[pool][i];
            if own == 0 {
                continue;
            }
            let page = &mut self.tree.pages[pool][node as usize];
            if page.slot == 0 {
                *page = crate::tree::Page { slot: own, ..*page };
                page.claims = 0;
                page.stale = false;
                page.used = 0;
                self.tree.idle[pool] += u32::from(self.tree.windowed[pool]);
            } else if page.slot != own {
                let theirs = page.slot;
                self.caches[index as usize].tables[pool][i] = theirs;
                self.give_private(index, pool, own);
                changed = true;
            }
            if self.tree.windowed[pool] {
                self.tree.claim_page(pool, node);
            }
        }
        let cache = &mut self.caches[index as usize];
        cache.nodes.push(node);
        cache.key = key;
        changed
    }

    /// CLOSED from here on. `false`: a launched step may still touch it, all is given back at its end.
    pub fn close(&mut self, id: CacheId) -> Result<bool> {
        if self.get(id).is_err() {
            return Ok(false);
        }
        self.caches[id.index as usize].state = CacheState::Closed;
        let over = self.caches[id.index as usize].in_flight == 0;
        if over {
            self.release_all(id.index);
        }
        Ok(over)
    }

    fn release_all(&mut self, index: u32) {
        let stamp = self.tick();
        self.release_source(index, stamp);
        let nodes = std::mem::take(&mut self.caches[index as usize].nodes);
        for pool in 0..self.pools.len() {
            let table = std::mem::take(&mut self.caches[index as usize].tables[pool]);
            for (i, &slot) in table.iter().enumerate().rev() {
                if slot == 0 {
                    continue;
                }
                match nodes.get(i) {
                    None => self.pools[pool].give(slot),
                    Some(&node) if self.tree.windowed[pool] => self.unclaim_page(pool, node, stamp, false),
                    Some(_) => {}
                }
            }
        }
        if let Some(&deepest) = nodes.last() {
            let segment = self.caches[index as usize].segment;
            self.unclaim(deepest, stamp, segment);
        }
        let fenced = std::mem::take(&mut self.caches[index as usize].fenced);
        for (pool, slot) in fenced {
            self.pools[pool as usize].give(slot);
        }
        let root = self.caches[index as usize].root;
        if root != NIL {
            self.tree.leave_root(root);
        }
        let cache = &mut self.caches[index as usize];
        cache.root = NIL;
        cache.prompt = Vec::new();
        cache.gen = cache.gen.wrapping_add(1);
        self.free_caches.push(index);
    }

    /// A step that touches these caches is about to be launched: all are fenced, or none.
    pub fn step_begin(&mut self, ids: &[CacheId]) -> Result<()> {
        for &id in ids {
            self.active(id, "step_begin")?;
        }
        for &id in ids {
            self.caches[id.index as usize].in_flight += 1;
        }
        Ok(())
    }

    /// The step is over. Returns which of the caches were closed meanwhile and are released now.
    pub fn step_end(&mut self, ids: &[CacheId]) -> Result<Vec<bool>> {
        for (i, &id) in ids.iter().enumerate() {
            let begun = self.caches.get(id.index as usize).map_or(0, |cache| {
                if cache.gen == id.gen {
                    cache.in_flight as usize
                } else {
                    0
                }
            });
            if ids[..=i].iter().filter(|&&other| other == id).count() > begun {
                return Err(CoreError::State("step_end without step_begin".into()));
            }
        }
        let mut released = Vec::with_capacity(ids.len());
        for &id in ids {
            let cache = &mut self.caches[id.index as usize];
            cache.in_flight -= 1;
            let over = cache.in_flight == 0;
            let closed = over && cache.state == CacheState::Closed;
            if closed {
                self.release_all(id.index);
            } else if over {
                let mut fenced = std::mem::take(&mut cache.fenced);
                for (pool, slot) in fenced.drain(..) {
                    self.pools[pool as usize].give(slot);
                }
                self.caches[id.index as usize].fenced = fenced;
            }
            released.push(closed);
        }
        Ok(released)
    }

    // -- the whole --------------------------------------------------------------------------

    /// Up to `blocks` leaves in order leave the device. Returns how many did.
    pub fn evict(&mut self, blocks: u64) -> u64 {
        let mut done = 0;
        while done < blocks && self.evict_leaf() {
            done += 1;
        }
        done
    }

    /// Drops all that is unclaimed.
    pub fn clear(&mut self) {
        let evicted = self.counters.evicted;
        while self.evict_leaf() {}
        for pool in 0..self.pools.len() {
            if self.tree.windowed[pool] {
                while self.evict_page(pool) {}
            }
        }
        self.counters.evicted = evicted;
    }

    /// Only grows: older epochs match no longer and go first.
    pub fn set_epoch(&mut self, epoch: u64) -> Result<()> {
        if epoch < self.epoch {
            return Err(CoreError::Value(format!(
                "set_epoch({epoch}): the epoch is {} and only grows",
                self.epoch
            )));
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            self.rebuild_orders();
        }
        Ok(())
    }

    /// Largest capacity that one new unmatched cache could get now.
    pub fn available_tokens(&self) -> u64 {
        let slots = (0..self.pools.len())
            .map(|pool| self.available(pool))
            .min()
            .unwrap_or(0);
        let tokens = u64::from(slots) * self.t();
        self.config.max_seq_len.map_or(tokens, |most| tokens.min(most))
    }

    /// What a cache tells of itself.
    pub fn info(&self, id: CacheId) -> Result<CacheInfo> {
        let cache = self.get(id)?;
        Ok(CacheInfo {
            state: cache.state,
            reused: cache.reused,
            capacity: cache.capacity,
            history: cache.history,
            committed: cache.committed,
        })
    }

    /// The slots of an ACTIVE cache in one pool, 0 for stale blocks.
    pub fn table(&self, id: CacheId, pool: usize) -> Result<&[u32]> {
        Ok(&self.active(id, "a block table")?.tables[pool])
    }

    /// Counters since construction.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Books of every pool; walks all caches.
    pub fn books(&self) -> Vec<PoolBooks> {
        crate::check::books(self)
    }

    /// Recomputes all books from scratch.
    pub fn check(&self) -> Result<()> {
        crate::check::check(self)
    }
}
