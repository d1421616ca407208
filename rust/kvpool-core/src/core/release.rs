//! Giving back: stale pages, partial sources, closed caches, fences.

use super::{pending, Core};
use crate::cache::Cache;
use crate::error::{CoreError, Result};
use crate::pool::Owner;
use crate::sync::Counter;
use crate::types::CacheState;
use crate::words::{Link, Stamp, Tier};

impl Core {
    /// One claim less on a page of a windowed pool. `stale`: because it fell out of the window. If it is idle
    /// now, the tier whose unit the caller announces, or keeps.
    pub(super) fn release_page(
        &self,
        cache: &Cache,
        pool: usize,
        index: usize,
        stamp: Stamp,
        stale: bool,
    ) -> Option<Tier> {
        let pages = &self.tree.pages[pool];
        pages.holders[index].sub(cache.holder() as u64);
        let page = self.tree.page(pool, index);
        let last = page.claims() == 1 || self.in_work.get() > 0; // see `record_behind_claims`
        if stamp != Stamp::NONE && (stale || (last && !page.is_stale())) {
            pages.used[index].set(stamp.count);
            if self.is_timed() {
                pages.time[index].set(stamp.time);
            }
        }
        let lowered = stale || page.is_stale();
        let idle = self.tree.release_page(pool, index, stale, cache.pinned);
        if idle.is_some() || cache.pinned {
            self.keeper.report_page(pool, index, lowered);
        }
        idle
    }

    /// Gives a private slot of a cache back, behind the fence if a step may still touch it; the unit for it
    /// goes into the purse.
    pub(super) fn give_private(&self, cache: &mut Cache, pool: usize, slot: u32) {
        if cache.in_flight > 0 {
            self.pools[pool].set_owner(slot, Owner::Fenced);
            cache.fenced.push((pool as u32, slot));
            cache.returning[pool] += 1;
            self.pools[pool].returning.add(1);
        } else {
            self.pools[pool].give(slot);
            cache.purse[pool] += 1;
        }
    }

    /// A page that became idle is available on its tier.
    pub(super) fn announce(&self, pool: usize, idle: Option<Tier>) {
        if let Some(tier) = idle {
            self.slots(tier)[pool].unreserve(1);
        }
    }

    /// As `announce`, but a unit of the device goes into the purse.
    pub(super) fn refund(&self, cache: &mut Cache, pool: usize, idle: Option<Tier>) {
        if idle == Some(Tier::Device) {
            cache.purse[pool] += 1;
        } else {
            self.announce(pool, idle);
        }
    }

    /// Announces what the purse holds.
    pub(super) fn empty_purse(&self, cache: &mut Cache) {
        for (pool, units) in self.pools.iter().zip(&mut cache.purse) {
            pool.unreserve(std::mem::take(units));
        }
    }

    /// Gives back what the history has left behind; units go into the purse. Returns whether a table entry changed.
    pub(super) fn make_stale(&self, cache: &mut Cache) -> bool {
        let mut stamp = Stamp::NONE;
        let mut changed = false;
        for pool in 0..self.pools.len() {
            if !self.tree.windowed[pool] {
                continue;
            }
            let (_, e) = self.config.pools[pool].stale(cache.history, self.t());
            let from = cache.stale_end[pool].max(self.sinks(pool));
            for i in from..e.min(cache.tables[pool].len()) {
                let slot = std::mem::replace(&mut cache.tables[pool][i], 0);
                if slot == 0 {
                    continue;
                }
                changed = true;
                if let Some(&node) = cache.nodes.get(i) {
                    if stamp == Stamp::NONE {
                        stamp = self.tick();
                    }
                    let idle = self.release_page(cache, pool, node.index(), stamp, true);
                    self.refund(cache, pool, idle);
                } else {
                    self.give_private(cache, pool, slot);
                }
            }
            cache.stale_end[pool] = cache.stale_end[pool].max(e);
        }
        changed
    }

    /// Sink blocks of a pool.
    pub(super) fn sinks(&self, pool: usize) -> usize {
        self.config.pools[pool].sink_tokens.div_ceil(self.t()) as usize
    }

    /// Releases the block that a partial match was to be copied from. `Stamp::NONE`: it was not used.
    pub(super) fn release_source(&self, cache: &mut Cache, stamp: Stamp) {
        let source = std::mem::replace(&mut cache.source, Link::NIL);
        cache.copying = false;
        if source.is_nil() {
            return;
        }
        let holder = cache.holder();
        if cache.pinned {
            self.unpin_node(source.index());
        }
        for pool in 0..cache.source_pools {
            if self.tree.windowed[pool] {
                let idle = self.release_page(cache, pool, source.index(), stamp, false);
                self.announce(pool, idle);
            }
        }
        cache.source_pools = 0;
        self.tree.nodes[source.index()].holders.sub(holder as u64);
        self.release_path(source, stamp, 0);
    }

    // -- close ------------------------------------------------------------------------------

    /// CLOSED from here on. `false`: a launched step may still touch it (all is given back at its end), or it
    /// was closed before.
    pub fn close(&self, cache: &mut Cache) -> Result<bool> {
        self.own(cache)?;
        if cache.state == CacheState::Closed {
            return Ok(false);
        }
        if cache
            .undo
            .as_ref()
            .is_some_and(|undo| undo.by != std::thread::current().id())
        {
            return Err(pending());
        }
        if cache.in_flight == 0 {
            if cache.in_work {
                self.discard(cache);
            } else {
                let stamp = self.tick();
                if cache.undo.take().is_some() {
                    self.read(cache);
                    self.stay_down(cache);
                }
                self.release_all(cache, stamp);
            }
            cache.state = CacheState::Closed;
            return Ok(true);
        }
        self.set_holder(cache, CacheState::Closed);
        self.count_returning(cache);
        Ok(false)
    }

    /// Gives a claim of a batch back as if it had never been: no use, no retention, no count.
    fn discard(&self, cache: &mut Cache) {
        self.copies_failed(cache);
        for pool in 0..self.pools.len() {
            let units = std::mem::take(&mut cache.promise[pool]);
            self.pools[pool].promised.sub(u64::from(units));
            cache.purse[pool] += units;
        }
        let counters = &self.counters;
        let prompt = cache.prompt.len() as u64;
        counters.requests.sub(1);
        counters.prompt_tokens.sub(prompt);
        counters.reused_tokens.sub(cache.reused);
        counters.prompt_blocks.sub(prompt.div_ceil(self.t()));
        counters.reused_blocks.sub(cache.nodes.len() as u64);
        cache.segment = 0;
        self.release_all(cache, Stamp::NONE);
        cache.in_work = false;
        self.in_work.sub(1);
    }

    /// Blocks go last to first, so that the prefix is the youngest; all get one stamp.
    fn release_all(&self, cache: &mut Cache, stamp: Stamp) {
        self.release_source(cache, stamp);
        self.unpin(cache);
        let nodes = std::mem::take(&mut cache.nodes);
        for pool in 0..self.pools.len() {
            let table = std::mem::take(&mut cache.tables[pool]);
            for &slot in table.iter().skip(nodes.len()).rev().filter(|&&slot| slot != 0) {
                self.pools[pool].give(slot);
                cache.purse[pool] += 1;
            }
            if self.tree.windowed[pool] {
                let live = nodes.iter().zip(&table).rev().filter(|(_, &slot)| slot != 0);
                for (node, _) in live {
                    let idle = self.release_page(cache, pool, node.index(), stamp, false);
                    self.refund(cache, pool, idle);
                }
            }
            cache.tables[pool] = table;
        }
        if let Some(&deepest) = nodes.last() {
            self.tree.nodes[deepest.index()]
                .holders
                .sub(cache.holder() as u64);
            self.release_path(deepest, stamp, cache.segment);
        }
        for node in nodes.iter().rev().take(std::mem::take(&mut cache.parked)) {
            self.bury_parked(*node);
        }
        self.drop_fence(cache);
        self.empty_purse(cache);
        cache.nodes = nodes;
        cache.shed();
    }

    fn drop_fence(&self, cache: &mut Cache) {
        for (pool, units) in self.pools.iter().zip(&mut cache.returning) {
            pool.returning.sub(u64::from(std::mem::take(units)));
        }
        for (pool, slot) in cache.fenced.drain(..) {
            self.pools[pool as usize].give(slot);
            cache.purse[pool as usize] += 1;
        }
        for (units, debt) in cache.purse.iter_mut().zip(&mut cache.debt) {
            *units -= std::mem::take(debt);
        }
    }

    // -- steps ------------------------------------------------------------------------------

    /// A step that touches this ACTIVE cache is about to be launched `times` times: it is fenced.
    pub fn step_begin(&self, cache: &mut Cache, times: u32) -> Result<()> {
        self.active(cache, "step_begin")?;
        cache.in_flight += times;
        Ok(())
    }

    /// Whether so many steps of this cache were begun.
    pub fn can_end(&self, cache: &Cache, times: u32) -> Result<()> {
        self.own(cache)?;
        if cache.in_flight < times {
            return Err(CoreError::State("step_end without step_begin".into()));
        }
        Ok(())
    }

    /// The steps are over. Returns whether the cache was closed meanwhile and is released now.
    pub fn step_end(&self, cache: &mut Cache, times: u32) -> Result<bool> {
        self.can_end(cache, times)?;
        cache.in_flight -= times;
        if cache.in_flight > 0 || times == 0 {
            return Ok(false);
        }
        let closed = cache.state == CacheState::Closed;
        if closed {
            let stamp = self.tick();
            self.release_all(cache, stamp);
        } else {
            self.drop_fence(cache);
            self.empty_purse(cache);
            if cache.state == CacheState::Suspended {
                self.lower(cache);
            }
        }
        Ok(closed)
    }

    // -- states -----------------------------------------------------------------------------

    /// Changes the state and with it how all that the cache holds is counted.
    pub(super) fn set_holder(&self, cache: &mut Cache, state: CacheState) {
        let (before, from) = (cache.state, cache.holder());
        cache.state = state;
        let to = cache.holder();
        if (before, from) == (state, to) {
            return;
        }
        cache.alterations += 1; // who was SUSPENDED may find its pages elsewhere
        let private = cache.private_owner();
        let change = |holders: &Counter| {
            holders.add(to as u64);
            holders.sub(from as u64);
        };
        let source = (!cache.source.is_nil()).then_some(cache.source);
        for node in cache.nodes.last().into_iter().chain(&source) {
            change(&self.tree.nodes[node.index()].holders);
        }
        for (pool, table) in cache.tables.iter().enumerate() {
            for &slot in table.iter().skip(cache.nodes.len()).filter(|&&slot| slot != 0) {
                self.pools[pool].pass(slot, private);
            }
            if !self.tree.windowed[pool] {
                continue;
            }
            let live = cache.nodes.iter().zip(table).filter(|(_, &slot)| slot != 0);
            for node in live.map(|(node, _)| node).chain(&source) {
                change(&self.tree.pages[pool].holders[node.index()]);
            }
        }
    }
}
