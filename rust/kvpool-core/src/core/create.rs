//! Matching a prompt, and claiming what it matches.

use super::Core;
use crate::cache::Cache;
use crate::error::{CoreError, Result};
use crate::tree::{Claimed, Dead, Root};
use crate::types::{CacheState, RetentionSpec};
use crate::words::{Link, Stamp, Tier};
use std::borrow::Cow;
use std::cell::Cell;

/// The longest valid match of a prompt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Match {
    pub tokens: u64,
    pub source: Link,
}

const NOTHING: Match = Match {
    tokens: 0,
    source: Link::NIL,
};

/// Room for one look-up, kept per thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The whole blocks of the match, top down.
    pub path: Vec<Link>,
    /// Keys of all blocks of a prompt, for a policy that wants them.
    keys: Vec<u64>,
    /// Nodes for the blocks of a commit.
    pub nodes: Vec<Dead>,
    /// Keys of the next blocks of a commit, the next one last.
    pub ahead: Vec<u64>,
    /// Which blocks of its cache a commit has put into the tree.
    pub entered: Vec<usize>,
    /// Per pool `runs[i] = (from, sinks)`: pages are present in blocks `[from, i)` and `[0, sinks)`.
    runs: Vec<Vec<(u32, u32)>>,
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Lends the thread's room. Taken out meanwhile, so that a checker may switch threads inside.
pub(super) fn with_scratch<T>(f: impl FnOnce(&mut Scratch) -> T) -> T {
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let result = f(&mut scratch);
    SCRATCH.set(Some(scratch));
    result
}

impl Core {
    // -- matching ---------------------------------------------------------------------------

    /// The longest valid match within the first `most` tokens; leaves its blocks in `scratch.path`.
    fn find(&self, scratch: &mut Scratch, root: &Root, tokens: &[i32], most: usize) -> Match {
        scratch.path.clear();
        let t = self.config.tokens_per_block as usize;
        let mut parent = Link::NIL;
        for block in tokens[..most / t * t].chunks_exact(t) {
            let Some(node) = self.tree.below(root, parent, block) else {
                break;
            };
            scratch.path.push(node);
            if !parent.is_nil() {
                // Blocks that were stored together mostly lie at even distances.
                let stride = node.index().wrapping_sub(parent.index());
                self.tree
                    .warm_reading(node.index().wrapping_add(stride.wrapping_mul(4)));
            }
            parent = node;
        }
        self.count_runs(scratch);
        for blocks in (0..=scratch.path.len()).rev() {
            let at = blocks * t;
            if !self.serves(scratch, blocks, most.min(at + t - 1) as u64) {
                continue; // windows end further on the longer the match
            }
            let parent = if blocks == 0 {
                Link::NIL
            } else {
                scratch.path[blocks - 1]
            };
            if self.config.partial_reuse {
                let rest = &tokens[at..most.min(at + t - 1)];
                if let Some((source, common)) = self.tree.closest_child(root, parent, rest) {
                    if self.serves(scratch, blocks, (at + common) as u64) {
                        scratch.path.truncate(blocks);
                        return Match {
                            tokens: (at + common) as u64,
                            source,
                        };
                    }
                }
            }
            if self.serves(scratch, blocks, at as u64) {
                scratch.path.truncate(blocks);
                return Match {
                    tokens: at as u64,
                    source: Link::NIL,
                };
            }
        }
        scratch.path.clear();
        NOTHING
    }

    pub(super) fn count_runs(&self, scratch: &mut Scratch) {
        scratch.runs.resize_with(self.pools.len(), Vec::new);
        for (pool, runs) in scratch.runs.iter_mut().enumerate() {
            runs.clear();
            if !self.tree.windowed[pool] {
                continue;
            }
            let (mut from, mut sinks) = (0u32, 0u32);
            runs.push((0, 0));
            for (i, node) in scratch.path.iter().enumerate() {
                let i = i as u32;
                if self.tree.page(pool, node.index()).slot() == 0 {
                    from = i + 1;
                } else if sinks == i {
                    sinks = i + 1;
                }
                runs.push((from, sinks));
            }
        }
    }

    /// Whether every pool has a page for every whole block of the path that is live at `m` tokens.
    pub(super) fn serves(&self, scratch: &Scratch, blocks: usize, m: u64) -> bool {
        (0..self.pools.len()).all(|pool| {
            if !self.tree.windowed[pool] {
                return true;
            }
            let (s, e) = self.config.pools[pool].stale(m, self.t());
            let (from, sinks) = scratch.runs[pool][blocks];
            sinks as usize >= s.min(blocks) && (from as usize <= e || e >= blocks)
        })
    }

    /// Tokens that `create` would reuse now. Claims and changes nothing.
    pub fn probe(&self, tokens: &[i32], scope: &[u8], epoch: Option<u64>) -> Result<u64> {
        let epoch = self.scope_epoch(epoch)?;
        if epoch < self.epoch() {
            return Ok(0);
        }
        let root = self.root(scope, epoch);
        let most = tokens.len().saturating_sub(1);
        Ok(with_scratch(|scratch| {
            self.find(scratch, &root, tokens, most).tokens
        }))
    }

    // -- create -----------------------------------------------------------------------------

    /// A SUSPENDED cache that claims the longest match of its prompt and takes no slot.
    ///
    /// While other threads hold promises on the last slots, the match may be shorter than what the tree has:
    /// it ends where its pages would have to be taken from those promises.
    pub fn create<'t>(
        &self,
        tokens: impl Into<Cow<'t, [i32]>>,
        scope: &[u8],
        epoch: Option<u64>,
        retention: Option<RetentionSpec>,
    ) -> Result<Cache> {
        let mut cache = self.claim(tokens.into(), usize::MAX, scope, epoch, retention, false)?;
        self.settle(&mut cache);
        Ok(cache)
    }

    /// As `create`, of at most `most` tokens, but nothing of it lasts until [`Core::settle`].
    pub(super) fn claim(
        &self,
        tokens: Cow<'_, [i32]>,
        most: usize,
        scope: &[u8],
        epoch: Option<u64>,
        retention: Option<RetentionSpec>,
        in_work: bool,
    ) -> Result<Cache> {
        let epoch = self.scope_epoch(epoch)?;
        if let Some(most) = self.config.max_seq_len {
            if tokens.len() as u64 > most {
                return Err(CoreError::Value(format!(
                    "tokens: {} of them exceed max_seq_len = {most}",
                    tokens.len()
                )));
            }
        }
        if retention.as_ref().is_some_and(RetentionSpec::is_timed) {
            self.timed.set(1);
        }
        let root = self.root(scope, epoch);
        let mut cache = Cache::new(self, root, tokens, retention);
        let tokens = std::mem::take(&mut cache.prompt);
        cache.in_work = in_work;
        self.in_work.add(u64::from(in_work));
        if epoch < self.epoch() {
            cache.detached = true;
        } else {
            with_scratch(|scratch| self.claim_match(scratch, &mut cache, &tokens, most));
        }
        let counters = &self.counters;
        counters.requests.add(1);
        counters.prompt_tokens.add(tokens.len() as u64);
        counters.reused_tokens.add(cache.reused);
        counters
            .prompt_blocks
            .add((tokens.len() as u64).div_ceil(self.t()));
        counters.reused_blocks.add(cache.nodes.len() as u64);
        cache.prompt = tokens;
        Ok(cache)
    }

    /// The claim holds: retention is applied, pages that had gone stale are live again.
    pub(super) fn settle(&self, cache: &mut Cache) {
        let source = (!cache.source.is_nil()).then_some(cache.source);
        for pool in (0..self.pools.len()).filter(|&pool| self.tree.windowed[pool]) {
            let live = cache.nodes.iter().zip(&cache.tables[pool]);
            let live = live.filter(|(_, &slot)| slot != 0).map(|(node, _)| node);
            for node in live.chain(&source) {
                self.tree.freshen(pool, node.index());
            }
        }
        if cache.retention.is_some() {
            for (i, node) in cache.nodes.iter().enumerate() {
                self.raise_retain(node.index(), cache.retain(i as u64 * self.t()));
            }
        }
        self.in_work.sub(u64::from(std::mem::take(&mut cache.in_work)));
    }

    fn claim_match(&self, scratch: &mut Scratch, cache: &mut Cache, tokens: &[i32], most: usize) {
        let t = self.config.tokens_per_block as usize;
        let mut most = most.min(tokens.len().saturating_sub(1));
        let found = loop {
            let found = self.find(scratch, &cache.root, tokens, most);
            match self.claim_path(&scratch.path) {
                Ok(()) => {}
                Err(None) => continue, // a block went meanwhile: somebody else got on
                Err(Some(blocks)) => {
                    most = blocks * t;
                    continue;
                }
            }
            if self.hold(scratch, cache, found) {
                if cache.in_work {
                    self.pin(cache); // if a block is on the move it is pinned when it is provided
                }
                break found;
            }
            most = if found.source.is_nil() {
                found.tokens.saturating_sub(1) as usize
            } else {
                found.tokens as usize / t * t
            };
        };
        let m = found.tokens;
        let blocks = scratch.path.len();
        if self.keeper.wants_keys() {
            scratch.keys.clear();
            let key_of = |node: &Link| self.tree.nodes[node.index()].key.get();
            scratch.keys.extend(scratch.path.iter().map(key_of));
            let mut key = scratch.keys.last().copied().unwrap_or_else(|| cache.root.key());
            for block in tokens[blocks * t..].chunks_exact(t) {
                key = self.tree.extend_key(key, block);
                scratch.keys.push(key);
            }
            cache.segment = self.keeper.request(&scratch.keys, blocks);
        }
        cache.tail.extend_from_slice(&tokens[blocks * t..m as usize]);
        (cache.reused, cache.committed, cache.history, cache.capacity) = (m, m, m, m);
        if let Some(deepest) = cache.nodes.last() {
            let node = &self.tree.nodes[deepest.index()];
            node.holders.add(cache.holder() as u64);
            cache.key = node.key.get();
        }
    }

    /// With the path claimed: claims the source of the partial block and the live pages of windowed pools.
    /// `false`: something is missing by now; nothing is held, the path neither.
    fn hold(&self, scratch: &Scratch, cache: &mut Cache, found: Match) -> bool {
        cache.nodes.clear();
        cache.nodes.extend_from_slice(&scratch.path);
        if !found.source.is_nil() {
            if !matches!(
                self.claim_child(cache.deepest(), found.source),
                Claimed::First | Claimed::Joined
            ) {
                self.unhold(cache);
                return false;
            }
            cache.source = found.source;
            self.tree.nodes[found.source.index()]
                .holders
                .add(cache.holder() as u64);
        }
        for pool in 0..self.pools.len() {
            let (s, e) = self.config.pools[pool].stale(found.tokens, self.t());
            let windowed = self.tree.windowed[pool];
            cache.stale_end[pool] = e;
            if !windowed {
                let slot_of = |node: &Link| self.tree.page(pool, node.index()).slot();
                cache.tables[pool].extend(cache.nodes.iter().map(slot_of));
                continue;
            }
            for i in 0..cache.nodes.len() {
                let index = cache.nodes[i].index();
                let live = i < s || i >= e;
                if live && !self.hold_page(cache, pool, index) {
                    self.unhold(cache);
                    return false;
                }
                let slot = if live {
                    self.tree.page(pool, index).slot()
                } else {
                    0
                };
                cache.tables[pool].push(slot);
            }
            if !found.source.is_nil() {
                if !self.hold_page(cache, pool, found.source.index()) {
                    self.unhold(cache);
                    return false;
                }
                cache.source_pools = pool + 1;
            }
        }
        true
    }

    /// Claims a page.
    pub(super) fn hold_page(&self, cache: &Cache, pool: usize, index: usize) -> bool {
        let mut paid: Option<Tier> = None;
        let claimed = loop {
            match self.tree.claim_page(pool, index, paid, cache.pinned) {
                Claimed::Unpaid(tier) => {
                    if let Some(before) = paid.take() {
                        self.slots(before)[pool].unreserve(1); // it has moved since
                    }
                    if !self.slots(tier)[pool].reserve(1) {
                        break Claimed::Unpaid(tier);
                    }
                    paid = Some(tier);
                }
                claimed => break claimed,
            }
        };
        if let (Some(tier), true) = (paid, claimed != Claimed::First) {
            self.slots(tier)[pool].unreserve(1);
        }
        let held = matches!(claimed, Claimed::First | Claimed::Joined);
        if held {
            self.tree.pages[pool].holders[index].add(cache.holder() as u64);
        }
        held
    }

    /// Undoes a claim that could not be completed; no use is recorded.
    fn unhold(&self, cache: &mut Cache) {
        for pool in 0..self.pools.len() {
            for (i, slot) in std::mem::take(&mut cache.tables[pool]).into_iter().enumerate() {
                if slot != 0 && self.tree.windowed[pool] {
                    let idle = self.release_page(cache, pool, cache.nodes[i].index(), Stamp::NONE, false);
                    self.announce(pool, idle);
                }
            }
        }
        self.release_source(cache, Stamp::NONE);
        if let Some(&deepest) = cache.nodes.last() {
            self.release_path(deepest, Stamp::NONE, 0);
        }
        cache.nodes.clear();
        debug_assert_eq!(cache.state, CacheState::Suspended);
    }
}
