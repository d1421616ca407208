//! Batches: claim everything, then provide.
//!
//! ```text
//!            claim_all                 provide                copies_done
//!   (none) ───────────> claimed ─────────────────> provided ──────────────> ACTIVE
//!     ^                 in_work     no room │        in_work │ copies_failed
//!     └──────────── discard <───────────────┘                └──> claimed
//! ```
//!
//! All claims of a batch are taken before any slot: what one request needs cannot evict what another one was
//! promised. A claim in work leaves no trace: uses, retention and stale marks change when it is settled.

use super::Core;
use crate::cache::Cache;
use crate::error::Result;
use crate::pool::SlotPool;
use crate::types::RetentionSpec;
use std::borrow::Cow;

/// One request of a batch.
#[derive(Debug, Clone)]
pub struct Claim<'a> {
    /// Its tokens.
    pub tokens: Cow<'a, [i32]>,
    /// Under which reuse is allowed.
    pub scope: &'a [u8],
    /// The manager's if `None`.
    pub epoch: Option<u64>,
    /// Of its blocks.
    pub retention: Option<RetentionSpec>,
    /// Fewest new tokens to be provided; all of them if `None`.
    pub least: Option<u64>,
    /// Most tokens that it may reuse.
    pub most: Option<u64>,
}

/// Why a first chunk cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Memory does not suffice.
    Memory,
    /// It needs more new tokens than are left.
    Tokens,
}

/// A claim that is kept, with its need promised; or why not.
pub type Start = std::result::Result<Cache, Refusal>;

impl Core {
    /// Claims the longest match of each request, in order; takes no slot.
    ///
    /// `promised`: a claim is kept only if it, its need and all kept before it fit together; its need is promised to it
    /// until it is provided or closed. Without, all claims are kept and nothing is promised. A partial block for whose
    /// copy there is no room is given up here, never later. On an error nothing is claimed.
    pub fn claim_all(&self, claims: Vec<Claim<'_>>, promised: bool) -> Result<Vec<Option<Cache>>> {
        let mut caches: Vec<Option<Cache>> = Vec::with_capacity(claims.len());
        for claim in claims {
            let least = claim.least;
            match self.claim_in_work(claim) {
                Ok(mut cache) => {
                    let fits = self.fit(&mut cache, least, promised) || !promised;
                    if !fits {
                        self.close(&mut cache)?;
                    }
                    caches.push(fits.then_some(cache));
                }
                Err(error) => {
                    for mut cache in caches.into_iter().flatten() {
                        self.close(&mut cache)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(caches)
    }

    /// Claims for first chunks, in order, until `budget` new tokens are used up: those behind are not looked at. A first
    /// chunk is `unit` tokens at least, or all (`None`: always all); it and its need are promised as in
    /// [`Core::claim_all`]. `least` is not read.
    pub fn claim_starts(
        &self,
        claims: Vec<Claim<'_>>,
        unit: Option<u64>,
        mut budget: u64,
    ) -> Result<Vec<Start>> {
        let mut starts = Vec::with_capacity(claims.len());
        for claim in claims {
            if budget == 0 {
                break;
            }
            match self.claim_start(claim, unit, budget) {
                Ok((start, used)) => {
                    starts.push(start);
                    budget -= used;
                }
                Err(error) => {
                    for mut cache in starts.into_iter().flatten() {
                        self.close(&mut cache)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(starts)
    }

    fn claim_in_work(&self, claim: Claim<'_>) -> Result<Cache> {
        let most = claim.most.map_or(usize::MAX, |most| most as usize);
        self.claim(
            claim.tokens,
            most,
            claim.scope,
            claim.epoch,
            claim.retention,
            true,
        )
    }

    fn claim_start(&self, claim: Claim<'_>, unit: Option<u64>, budget: u64) -> Result<(Start, u64)> {
        let before: Vec<u32> = self.pools.iter().map(SlotPool::available).collect();
        let all = claim.tokens.len() as u64;
        let mut cache = self.claim_in_work(claim)?;
        for (pool, before) in before.into_iter().enumerate() {
            cache.paid[pool] = before.saturating_sub(self.pools[pool].available());
        }
        // The chunk that `budget` allows; 0 if that is less than one unit and less than all.
        let chunk = |cache: &Cache| {
            let new = all - cache.history;
            match unit {
                _ if new <= budget => new,
                Some(unit) => budget / unit * unit,
                None => 0,
            }
        };
        let mut refusal = Refusal::Tokens;
        if chunk(&cache) > 0 {
            refusal = Refusal::Memory;
            // A partial block that was given up for want of room makes the need larger.
            if self.fit(&mut cache, unit, true) {
                refusal = Refusal::Tokens;
                let used = chunk(&cache);
                if used > 0 {
                    return Ok((Ok(cache), used));
                }
            }
        }
        self.close(&mut cache)?;
        Ok((Err(refusal), 0))
    }

    /// Whether a batch claimed this cache and has not provided it yet.
    pub fn is_in_work(&self, cache: &Cache) -> bool {
        cache.in_work
    }

    /// Whether there is room for the need of a claim, if need be without its partial block; then promises it.
    fn fit(&self, cache: &mut Cache, least: Option<u64>, promised: bool) -> bool {
        loop {
            let all = cache.prompt.len() as u64;
            let capacity = least.map_or(all, |n| cache.history.saturating_add(n).min(all));
            let blocks = capacity.max(cache.capacity).div_ceil(self.t()) as usize;
            self.look_far(cache, &[]);
            let room = if promised {
                self.reserve_need(cache, cache.history, blocks)
            } else {
                self.can_have(|pool| self.need(cache, pool, cache.history, blocks))
            };
            cache.far.fill(0);
            if room {
                if promised {
                    cache.promise.swap_with_slice(&mut cache.purse);
                    for (pool, &units) in self.pools.iter().zip(&cache.promise) {
                        pool.promised.add(u64::from(units));
                    }
                }
                return true;
            }
            if cache.source.is_nil() {
                return false;
            }
            self.shorten(cache);
        }
    }
}

#[cfg(all(test, not(any(kvpool_loom, kvpool_shuttle))))]
mod tests {
    use super::*;
    use crate::types::{CoreConfig, PolicyKind, PoolSpec};

    fn core(host_slots: u32) -> Core {
        let pool = |name: &str, num_slots, window| PoolSpec {
            name: name.into(),
            num_slots,
            host_slots,
            window,
            sink_tokens: 0,
        };
        Core::new(CoreConfig {
            tokens_per_block: 2,
            pools: vec![pool("full", 9, None), pool("window", 9, Some(3))],
            max_blocks: 16,
            max_seq_len: None,
            partial_reuse: true,
            hash_seed: 1,
            policy: PolicyKind::Lru,
            offload_min_priority: 30,
            collide: false,
        })
        .unwrap()
    }

    fn serve(core: &Core, tokens: &[i32]) {
        let mut cache = core.create(tokens, b"", None, None).unwrap();
        core.resume(&mut cache, &mut Vec::new()).unwrap();
        assert!(core.resize(&mut cache, tokens.len() as u64, None).unwrap());
        core.commit(&mut cache, tokens).unwrap();
        core.close(&mut cache).unwrap();
    }

    /// The k-th allocation of a batch fails, for all k: that request gets nothing and leaves nothing, the others run.
    #[test]
    fn a_failed_allocation_rolls_its_request_back_for_every_k() {
        fail_for_every_k(0, 6);
    }

    /// The same with the matches on the host: pages that come up want slots too.
    #[test]
    fn a_failed_allocation_rolls_its_request_back_for_every_k_with_onboarding() {
        fail_for_every_k(9, 9);
    }

    fn fail_for_every_k(host_slots: u32, least: u64) {
        for k in 1.. {
            let core = core(host_slots);
            serve(&core, &[1, 2, 3, 4]);
            if host_slots > 0 {
                assert_eq!((core.evict(2), core.counters().offloaded), (2, 4));
            }
            let prompts: [&[i32]; 3] = [&[1, 2, 3, 9, 9], &[1, 2, 3, 4, 5], &[6, 7]];
            let claims = prompts.iter().map(|&tokens| Claim {
                tokens: tokens.into(),
                scope: b"",
                epoch: None,
                retention: None,
                least: None,
                most: None,
            });
            let caches = core.claim_all(claims.collect(), true).unwrap();
            let mut caches: Vec<Cache> = caches.into_iter().map(Option::unwrap).collect();
            let before = core.counters();
            core.fault.set(k);
            let mut refused = 0;
            for (cache, prompt) in caches.iter_mut().zip(prompts) {
                let held: Vec<Vec<u32>> = cache.tables.clone();
                let promise = cache.promise.clone();
                if core.provide(cache, prompt.len() as u64, &mut Vec::new()).unwrap() {
                    core.copies_done(cache);
                } else {
                    refused += 1;
                    assert_eq!((&cache.tables, &cache.promise), (&held, &promise), "k = {k}");
                }
            }
            core.check(&caches.iter().collect::<Vec<_>>()).unwrap();
            for cache in &mut caches {
                core.close(cache).unwrap();
            }
            core.check(&[]).unwrap();
            assert_eq!(core.counters().requests, before.requests - refused);
            let kept = core.probe(&[1, 2, 3, 4, 0], b"", None).unwrap();
            assert_eq!((kept, core.available_tokens()), (4, 18), "k = {k}");
            if core.fault.get() > 0 {
                assert!(k > least, "fewer allocations than the batch needs");
                assert_eq!(core.counters().onboarded > 0, host_slots > 0);
                return;
            }
            assert_eq!(refused, 1, "k = {k}");
        }
    }
}
