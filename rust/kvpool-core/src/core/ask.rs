//! What a scheduler asks before it decides. Reads only, except that what a cache lacks is counted into the cache itself.
//!
//! Answers are exact while no other thread changes the pools; with others they are a moment's.

use super::Core;
use crate::cache::Cache;
use crate::error::Result;
use crate::evict::Tries;
use crate::types::CacheState;
use crate::words::{Link, Tier};

impl Core {
    /// Per pool: device slots that are free or evictable and promised to nobody; slots that come back when the steps
    /// in flight have ended.
    pub fn pressure(&self) -> Vec<(u32, u32)> {
        let pool = |pool: &crate::pool::SlotPool| (pool.available(), pool.returning.get() as u32);
        self.pools.iter().map(pool).collect()
    }

    /// Per pool: pages that only SUSPENDED caches claim and for which the host has no room; without a host tier any number.
    pub fn stuck(&self) -> Vec<u32> {
        if !self.tiered {
            return vec![u32::MAX; self.pools.len()];
        }
        let pool = |pool: usize| self.suspended_pages(pool).saturating_sub(self.movable(pool));
        (0..self.pools.len()).map(pool).collect()
    }

    /// Most tokens behind the history for which [`Core::provide`] finds room now and leaves `leave` slots of each pool:
    /// `tokens`, or the largest multiple of `unit` below it; 0 if there is room for none.
    pub fn fitting(&self, cache: &mut Cache, tokens: u64, unit: u64, leave: &[u32]) -> Result<u64> {
        self.ready(cache)?;
        let limit = self.config.max_seq_len.unwrap_or(u64::from(u32::MAX));
        let tokens = tokens.min(limit.saturating_sub(cache.history));
        self.look_far(cache, &[]);
        let there = |pool: usize| self.pools[pool].available();
        let mut found = 0;
        if (0..self.pools.len()).all(|pool| self.wants(cache, pool, tokens, leave) <= there(pool)) {
            found = tokens;
        } else if unit > 0 {
            found = self.in_its_place(cache, |cache, tries| {
                let mut fits = |tokens: u64| tries.can_have(|pool| self.wants(cache, pool, tokens, leave));
                if fits(tokens) {
                    return tokens;
                }
                // fits(low * unit) holds for low > 0, fits(high * unit) does not.
                let (mut low, mut high) = (0, tokens.div_ceil(unit));
                while high - low > 1 {
                    let middle = low + (high - low) / 2;
                    if fits(middle * unit) {
                        low = middle;
                    } else {
                        high = middle;
                    }
                }
                low * unit
            });
        }
        cache.far.fill(0);
        Ok(found)
    }

    /// Per pool, the slots that are missing for so many tokens behind the history, with `leave` to be left: none if, and only
    /// if, [`Core::fitting`] finds room for them.
    pub fn lacking(&self, cache: &mut Cache, tokens: u64, leave: &[u32]) -> Result<Vec<u32>> {
        self.ready(cache)?;
        self.look_far(cache, &[]);
        let lacking = self.in_its_place(cache, |cache, tries| {
            let mut lacking = tries.lacking(|pool| self.wants(cache, pool, tokens, leave));
            for (pool, lacks) in lacking.iter_mut().enumerate() {
                *lacks = (*lacks).min(self.needs(cache, pool, tokens));
            }
            lacking
        });
        cache.far.fill(0);
        Ok(lacking)
    }

    /// Asks what could be had while the cache's own pages stay where they are; if one is on the move, by what is available.
    fn in_its_place<T>(&self, cache: &mut Cache, ask: impl FnOnce(&Cache, &mut Tries<'_>) -> T) -> T {
        let pinned = cache.pinned;
        let stays = self.pin(cache);
        let answer = ask(cache, &mut Tries::new(self, stays));
        if stays && !pinned {
            self.unpin(cache);
        }
        answer
    }

    fn needs(&self, cache: &Cache, pool: usize, tokens: u64) -> u32 {
        let capacity = cache.capacity.max(cache.history + tokens);
        self.need(cache, pool, cache.history, capacity.div_ceil(self.t()) as usize)
    }

    /// Slots of a pool that must be available for so many tokens: none where nothing is needed.
    fn wants(&self, cache: &Cache, pool: usize, tokens: u64, leave: &[u32]) -> u32 {
        match self.needs(cache, pool, tokens) {
            0 => 0,
            need => (need + leave.get(pool).copied().unwrap_or(0)).saturating_sub(cache.promise[pool]),
        }
    }

    /// Whether a launched step may still touch the cache.
    pub fn is_in_flight(&self, cache: &Cache) -> bool {
        cache.in_flight > 0
    }

    /// Per pool, the pages that could leave the device if this ACTIVE cache were suspended now; `None` if one of them
    /// would find no room on the host.
    pub fn below(&self, cache: &Cache) -> Result<Option<Vec<u32>>> {
        self.active(cache, "below")?;
        if !self.tiered || cache.in_flight > 0 {
            return Ok(None);
        }
        let mut pages = Vec::with_capacity(self.pools.len());
        for (pool, host) in self.hosts.iter().enumerate() {
            let mine = |node: &Link| match self.tree.windowed[pool] {
                false => self.tree.pins(node.index()) == 1,
                true => self.tree.page(pool, node.index()).active() == 1,
            };
            let table = &cache.tables[pool];
            let claimed = cache.nodes.iter().zip(table).enumerate();
            let claimed = claimed
                .filter(|(_, (node, &slot))| slot != 0 && mine(node))
                .count();
            let private = table.iter().skip(cache.nodes.len()).filter(|&&slot| slot != 0);
            let count = (claimed + private.count()) as u32;
            if count > 0 && self.movable(pool) + count > host.available() {
                return Ok(None);
            }
            pages.push(count);
        }
        Ok(Some(pages))
    }

    /// Per pool, the live pages of the cache on the device; how many of them nobody else claims.
    pub fn holds(&self, cache: &Cache) -> Result<Vec<(u32, u32)>> {
        self.ready(cache)?;
        let alone = self.alone(cache);
        let pool = |pool: usize| {
            let (mut here, mut own) = (0, 0);
            for (i, _) in cache.tables[pool]
                .iter()
                .enumerate()
                .filter(|(_, &slot)| slot != 0)
            {
                let node = cache.nodes.get(i);
                if node.is_some_and(|node| self.tree.page(pool, node.index()).tier() == Tier::Host) {
                    continue;
                }
                here += 1;
                own += u32::from(self.is_own(cache, pool, i, alone));
            }
            (here, own)
        };
        Ok((0..self.pools.len()).map(pool).collect())
    }

    /// Tokens of a block.
    pub fn tokens_per_block(&self) -> u64 {
        self.t()
    }

    /// Pools.
    pub fn num_pools(&self) -> usize {
        self.pools.len()
    }

    /// Live pages of an open cache in one pool, wherever they are.
    pub fn held(&self, cache: &Cache, pool: usize) -> u32 {
        let (s, e) = self.config.pools[pool].stale(cache.history, self.t());
        let blocks = cache.tables[pool].len();
        (blocks - e.min(blocks).saturating_sub(s)) as u32
    }

    /// As `held`; 0 for one that is SUSPENDED, whose pages may have to be brought back.
    pub fn held_here(&self, cache: &Cache, pool: usize) -> u32 {
        match cache.state {
            CacheState::Active => self.held(cache, pool),
            _ => 0,
        }
    }

    /// Blocks of its path from here on are claimed by nobody else.
    fn alone(&self, cache: &Cache) -> usize {
        let refs = |node: &Link| self.tree.state(node.index()).refs();
        cache.nodes.len()
            - cache
                .nodes
                .iter()
                .rev()
                .take_while(|node| refs(node) == 1)
                .count()
    }

    /// Whether nobody else claims the live page of block `i`.
    fn is_own(&self, cache: &Cache, pool: usize, i: usize, alone: usize) -> bool {
        match cache.nodes.get(i) {
            None => true,
            Some(node) if self.tree.windowed[pool] => self.tree.page(pool, node.index()).claims() == 1,
            Some(_) => i >= alone,
        }
    }

    /// Per pool, what a claim for a start took off what was available (its promise included), and how many of its live
    /// pages others had claimed.
    pub fn costs(&self, cache: &Cache) -> (Vec<u32>, Vec<u32>) {
        let taken = cache
            .paid
            .iter()
            .zip(&cache.promise)
            .map(|(paid, promise)| paid + promise);
        let held = |pool: usize| cache.tables[pool].iter().filter(|&&slot| slot != 0).count() as u32;
        let source = u32::from(!cache.source.is_nil());
        let shared = |(pool, paid): (usize, &u32)| held(pool).saturating_sub(paid.saturating_sub(source));
        (
            taken.collect(),
            cache.paid.iter().enumerate().map(shared).collect(),
        )
    }

    /// Slots that come back at the end of the steps in flight, now that the cache is closed: those that only it has.
    pub(super) fn count_returning(&self, cache: &mut Cache) {
        let alone = self.alone(cache);
        for pool in 0..self.pools.len() {
            let live = cache.tables[pool]
                .iter()
                .enumerate()
                .filter(|(_, &slot)| slot != 0);
            let units = live.filter(|&(i, _)| self.is_own(cache, pool, i, alone)).count() as u32;
            self.pools[pool].returning.add(u64::from(units));
            cache.returning[pool] += units;
        }
    }
}
