//! Storage of a cache: its capacity and history, and what they need in every pool.

use super::Core;
use crate::cache::Cache;
use crate::error::{CoreError, Result};
use crate::pool::Owner;

impl Core {
    /// Sets capacity and history in all pools, or changes nothing and returns `false`.
    ///
    /// Only if another thread is stopped in the middle of an eviction for as long as sixteen searches take, `false` may
    /// have evicted blocks and leave the history raised; the call can be repeated as it was.
    pub fn resize(&self, cache: &mut Cache, capacity: u64, history: Option<u64>) -> Result<bool> {
        self.active(cache, "resize")?;
        let history = history.unwrap_or(cache.history);
        self.check_capacity(cache, capacity, history)?;
        let t = self.t();
        let old = cache.capacity.div_ceil(t) as usize;
        let new = capacity.div_ceil(t) as usize;
        if !self.reserve_need(cache, history, new) {
            return Ok(false);
        }
        if history > cache.history {
            cache.history = history;
            self.make_stale(cache);
        }
        for pool in 0..self.pools.len() {
            for _ in new..old {
                cache.alterations += 1;
                let slot = cache.tables[pool].pop().unwrap_or(0);
                if slot != 0 {
                    self.give_private(cache, pool, slot);
                }
            }
        }
        let grown = (0..self.pools.len()).all(|pool| self.grow(cache, pool, old, new));
        if grown {
            cache.capacity = capacity;
        } else {
            for pool in 0..self.pools.len() {
                while cache.tables[pool].len() > old {
                    cache.alterations += 1;
                    let slot = cache.tables[pool].pop().unwrap_or(0);
                    if slot != 0 {
                        self.pools[pool].give(slot);
                        cache.purse[pool] += 1;
                    }
                }
            }
        }
        self.empty_purse(cache);
        Ok(grown)
    }

    pub(super) fn check_capacity(&self, cache: &Cache, capacity: u64, history: u64) -> Result<()> {
        let most = self.config.max_seq_len.unwrap_or(u64::from(u32::MAX));
        if history < cache.history || history > capacity || capacity > most {
            return Err(CoreError::Value(format!(
                "resize(capacity={capacity}, history_length={history}): needs {} <= history_length <= capacity <= {most}",
                cache.history
            )));
        }
        Ok(())
    }

    /// Slots of a pool for the partial copy and for blocks up to `new`, less what staleness at `history` will give back.
    pub(super) fn need(&self, cache: &Cache, pool: usize, history: u64, new: usize) -> u32 {
        let copy = usize::from(!cache.source.is_nil() && !cache.copying);
        let old = cache.tables[pool].len() + copy;
        let (s, e) = self.config.pools[pool].stale(history, self.t());
        let mut back = 0u32;
        for i in cache.stale_end[pool].max(self.sinks(pool))..e.min(cache.tables[pool].len()) {
            if cache.tables[pool][i] == 0 {
                continue;
            }
            back += match cache.nodes.get(i) {
                Some(node) => u32::from(self.tree.page(pool, node.index()).claims() == 1),
                None => u32::from(cache.in_flight == 0),
            };
        }
        // Blocks [old, new) that are not in [s, e).
        let stale = e.min(new).saturating_sub(s.max(old));
        let grown = new.saturating_sub(old).saturating_sub(stale);
        ((copy + grown) as u32 + cache.far[pool]).saturating_sub(back)
    }

    /// Takes the whole need into the purse, in all pools or none: what was promised first, the rest off `available`.
    pub(super) fn reserve_need(&self, cache: &mut Cache, history: u64, new: usize) -> bool {
        let more = |cache: &Cache, pool: usize| {
            self.need(cache, pool, history, new)
                .saturating_sub(cache.promise[pool])
        };
        let mut pool = 0;
        let mut tried = !self.tiered;
        while pool < self.pools.len() {
            let units = more(cache, pool);
            if self.pools[pool].reserve(units) {
                cache.purse[pool] = units;
                pool += 1;
                continue;
            }
            self.empty_purse(cache);
            if std::mem::replace(&mut tried, true) || !self.make_room(|pool| more(cache, pool)) {
                return false;
            }
            pool = 0;
        }
        for pool in 0..self.pools.len() {
            let promised = std::mem::take(&mut cache.promise[pool]);
            cache.promise_before[pool] = promised;
            self.pools[pool].promised.sub(u64::from(promised));
            cache.purse[pool] += promised;
        }
        true
    }

    /// Slots for blocks `[old, new)` out of the purse. `false`: they could not be found.
    pub(super) fn grow(&self, cache: &mut Cache, pool: usize, old: usize, new: usize) -> bool {
        if new <= old {
            return true;
        }
        let (s, e) = self.config.pools[pool].stale(cache.history, self.t());
        let (s, e) = (s.clamp(old, new), e.clamp(old, new));
        let grown = self.fill(cache, pool, s - old) && {
            let stale = cache.tables[pool].len() + (e - s);
            cache.tables[pool].resize(stale, 0);
            self.fill(cache, pool, new - e)
        };
        if grown {
            self.pools[pool].note_peak();
        }
        grown
    }

    /// Slots for the next `n` blocks out of the purse.
    fn fill(&self, cache: &mut Cache, pool: usize, n: usize) -> bool {
        if n == 0 {
            return true;
        }
        // A page counted as coming back may have found another claimant since.
        let lacking = (n as u32).saturating_sub(cache.purse[pool]);
        if !self.pools[pool].reserve(lacking) {
            return false;
        }
        cache.purse[pool] += lacking;
        let from = cache.tables[pool].len();
        let found = self.take_slots(pool, n, &mut cache.tables[pool]);
        let taken = &cache.tables[pool][from..];
        cache.purse[pool] -= taken.len() as u32;
        for &slot in taken {
            self.pools[pool].set_owner(slot, Owner::Active);
        }
        found
    }
}
