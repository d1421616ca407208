//! The books, recomputed from scratch, of a core at rest. Everything here only reads.
//!
//! Every slot has exactly one owner: the free stack, a node of the tree, the private part of one
//! cache, or a fence.

use crate::cache::Cache;
use crate::core::Core;
use crate::error::{CoreError, Result};
use crate::pool::Owner;
use crate::types::CacheState;
use crate::words::{Link, Tier};

macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err(CoreError::Invariant(format!($($message)+)));
        }
    };
}

/// Every equation of the module headers.
pub fn check(core: &Core, caches: &[&Cache]) -> Result<()> {
    check_tree(core)?;
    check_refs(core, caches)?;
    if core.tiered {
        check_tiers(core, caches)?;
    }
    for pool in 0..core.pools.len() {
        if core.tree.windowed[pool] {
            check_claims(core, caches, pool)?;
        }
        check_slots(core, caches, Tier::Device, pool)?;
        check_available(core, caches, Tier::Device, pool)?;
        if core.tiered {
            check_slots(core, caches, Tier::Host, pool)?;
            check_available(core, caches, Tier::Host, pool)?;
        }
    }
    Ok(())
}

fn live(core: &Core) -> impl Iterator<Item = usize> + '_ {
    (0..core.tree.nodes.len()).filter(|&index| core.tree.state(index).is_live())
}

fn check_tree(core: &Core) -> Result<()> {
    let tree = &core.tree;
    let mut children = vec![0u32; tree.nodes.len()];
    for i in live(core) {
        let (node, parent) = (&tree.nodes[i], tree.parent(i));
        let block = tree.is_block(i);
        let mut depth = 0;
        if !parent.is_nil() {
            ensure!(
                tree.is_live(parent),
                "node {i}: its parent {} is gone",
                parent.index()
            );
            depth = tree.depth(parent.index()) + 1;
            children[parent.index()] += 1;
            let before = tree.nodes[parent.index()].key.get();
            let is_hash = || tree.extend_key(before, &tree.tokens(i).collect::<Vec<i32>>()) == node.key.get();
            ensure!(!block || is_hash(), "node {i}: key != hash of its prefix");
        }
        ensure!(
            depth == tree.depth(i) || !block,
            "node {i}: depth {} != {depth}",
            tree.depth(i)
        );
        if block && !tree.is_lost(i) {
            let tokens: Vec<i32> = tree.tokens(i).collect();
            let found = tree.child(&tree.root_of(i), parent, node.key.get(), &tokens);
            ensure!(found == Some(tree.at(i)), "node {i}: look-up finds {found:?}");
            ensure!(
                tree.is_in_start(i),
                "node {i}: the chain of its beginning lacks it, or is too long"
            );
        }
        for pool in (0..core.pools.len()).filter(|&pool| !tree.windowed[pool]) {
            ensure!(
                tree.page(pool, i).slot() != 0,
                "node {i}: no page in the full-attention pool {pool}"
            );
        }
    }
    for i in live(core) {
        let counted = tree.children(i);
        ensure!(
            children[i] == counted,
            "node {i}: children {counted} != {}",
            children[i]
        );
    }
    let (count, free) = (live(core).count(), tree.free_nodes().len());
    let all = tree.nodes.len();
    ensure!(
        count + free == all,
        "live nodes {count} + free nodes {free} != {all}"
    );
    Ok(())
}

fn check_refs(core: &Core, caches: &[&Cache]) -> Result<()> {
    let tree = &core.tree;
    let (mut refs, mut holders) = (vec![0u64; tree.nodes.len()], vec![0u64; tree.nodes.len()]);
    for cache in caches {
        for node in [cache.deepest(), cache.source] {
            if !node.is_nil() {
                ensure!(
                    tree.is_live(node),
                    "a cache claims node {} which is gone",
                    node.index()
                );
                refs[node.index()] += 1;
                holders[node.index()] += cache.holder() as u64;
            }
        }
        for pair in cache.nodes.windows(2) {
            let parent = tree.parent(pair[1].index());
            ensure!(
                parent == pair[0],
                "a cache's path: {parent:?} is not {:?}",
                pair[0]
            );
        }
    }
    for i in live(core) {
        let parent = tree.parent(i);
        if tree.state(i).refs() > 0 && !parent.is_nil() {
            refs[parent.index()] += 1;
        }
    }
    for i in live(core) {
        let counted = tree.state(i).refs();
        ensure!(
            counted == refs[i],
            "{}: refs != claims + claimed children = {}",
            tree.describe(i),
            refs[i]
        );
        let kinds = tree.nodes[i].holders.get();
        ensure!(
            kinds == holders[i],
            "node {i}: claims by state {kinds:#x} != {:#x}",
            holders[i]
        );
    }
    Ok(())
}

fn check_tiers(core: &Core, caches: &[&Cache]) -> Result<()> {
    let tree = &core.tree;
    let (mut pins, mut near) = (vec![0u64; tree.nodes.len()], vec![0u32; tree.nodes.len()]);
    for cache in caches.iter().filter(|cache| cache.pinned) {
        let source = (!cache.source.is_nil()).then_some(cache.source);
        for node in cache.nodes.iter().chain(&source) {
            pins[node.index()] += 1;
        }
    }
    for i in live(core) {
        let (state, parent) = (tree.state(i), tree.parent(i));
        ensure!(!state.is_busy(), "node {i}: busy outside of any call");
        if state.tier() == Tier::Device && !parent.is_nil() {
            near[parent.index()] += 1;
            ensure!(
                tree.state(parent.index()).tier() == Tier::Device,
                "node {i}: on the device below its parent on the host"
            );
        }
        for pool in 0..core.pools.len() {
            let page = tree.page(pool, i);
            ensure!(!page.is_busy(), "pool {pool} node {i}: busy outside of any call");
            ensure!(
                tree.windowed[pool] || page.tier() == state.tier(),
                "pool {pool} node {i}: on the {:?}, its block on the {:?}",
                page.tier(),
                state.tier()
            );
        }
    }
    let only_held = |i: &usize| {
        let state = tree.state(*i);
        state.tier() == Tier::Device && state.refs() > 0 && pins[*i] == 0
    };
    let (held, counted) = (live(core).filter(only_held).count(), tree.held());
    ensure!(
        held == counted as usize,
        "nodes that only SUSPENDED caches claim: {counted} counted, {held} there"
    );
    for pool in 0..core.pools.len() {
        let counted = tree.pages[pool].held.get();
        let held = live(core).filter(|&i| tree.page(pool, i).is_held()).count();
        ensure!(
            counted == held as u64 || !tree.windowed[pool],
            "pool {pool}: pages that only SUSPENDED caches claim: {counted} counted, {held} there"
        );
    }
    for i in live(core) {
        let (pinned, counted) = (tree.pins(i), tree.near(i));
        ensure!(pinned == pins[i], "node {i}: pins {pinned} != {}", pins[i]);
        ensure!(
            counted == near[i],
            "node {i}: children on the device {counted} != {}",
            near[i]
        );
    }
    Ok(())
}

fn check_claims(core: &Core, caches: &[&Cache], pool: usize) -> Result<()> {
    let tree = &core.tree;
    let (mut claims, mut holders) = (vec![0u64; tree.nodes.len()], vec![0u64; tree.nodes.len()]);
    for cache in caches {
        let mut claim = |node: Link| {
            claims[node.index()] += 1;
            holders[node.index()] += cache.holder() as u64;
        };
        for (&node, &slot) in cache.nodes.iter().zip(&cache.tables[pool]) {
            if slot != 0 {
                let page = tree.page(pool, node.index()).slot();
                // Copies that are out: another cache may have brought the page up first.
                let waits = cache.state != CacheState::Active || cache.undo.is_some();
                let moves = core.tiered && waits;
                ensure!(
                    page == slot || (moves && page != 0),
                    "pool {pool}: a cache holds slot {slot} of {node:?}, which has {page}"
                );
                claim(node);
            }
        }
        if !cache.source.is_nil() {
            claim(cache.source);
        }
    }
    for i in live(core) {
        let page = tree.page(pool, i);
        let (counted, kinds) = (page.claims(), tree.pages[pool].holders[i].get());
        ensure!(
            counted == claims[i],
            "pool {pool} node {i}: claims {counted} != {}",
            claims[i]
        );
        ensure!(
            kinds == holders[i],
            "pool {pool} node {i}: claims by state {kinds:#x} != {:#x}",
            holders[i]
        );
        let claimed = counted == 0 || tree.state(i).refs() > 0;
        ensure!(claimed, "pool {pool} node {i}: claimed page of an unclaimed node");
    }
    Ok(())
}

fn check_slots(core: &Core, caches: &[&Cache], tier: Tier, pool: usize) -> Result<()> {
    let slots = &core.slots(tier)[pool];
    let mut owners = vec![Vec::new(); slots.num_slots() as usize + 1];
    for slot in slots.free_slots() {
        owners[slot as usize].push(Owner::Free);
    }
    for i in live(core) {
        let page = core.tree.page(pool, i);
        if page.tier() == tier {
            owners[page.slot() as usize].push(Owner::Node(i as u32));
        }
    }
    for cache in caches.iter().filter(|_| tier == Tier::Device) {
        for &slot in cache.tables[pool].iter().skip(cache.nodes.len()) {
            owners[slot as usize].push(cache.private_owner());
        }
        for &(_, slot) in cache.fenced.iter().filter(|(at, _)| *at as usize == pool) {
            owners[slot as usize].push(Owner::Fenced);
        }
    }
    for cache in caches {
        match tier {
            Tier::Device => {
                for &(_, _, slot) in { cache.onboards.iter() }.filter(|(_, at, _)| *at as usize == pool) {
                    owners[slot as usize].push(cache.private_owner());
                }
            }
            Tier::Host => {
                for &(_, slot) in cache.lent.iter().filter(|(at, _)| *at as usize == pool) {
                    if slots.is_left(slot) && owners[slot as usize].is_empty() {
                        owners[slot as usize].push(Owner::Fenced);
                    }
                }
            }
        }
    }
    for slot in 1..=slots.num_slots() {
        if slots.owner(slot) == Owner::Retired {
            owners[slot as usize].push(Owner::Retired);
        }
    }
    for (slot, owners) in owners.iter().enumerate().skip(1) {
        let count = owners.len();
        ensure!(
            count == 1,
            "pool {pool}: slot {slot} has {count} owners, not 1: {owners:?}"
        );
        let known = slots.owner(slot as u32);
        ensure!(
            known == owners[0],
            "pool {pool}: slot {slot} is {:?}'s, not {known:?}'s",
            owners[0]
        );
    }
    let free = owners
        .iter()
        .filter(|owners| owners.contains(&Owner::Free))
        .count() as u64;
    let (taken, all) = (slots.taken(), u64::from(slots.num_slots()));
    ensure!(
        taken + free == all,
        "pool {pool}: taken {taken} + free {free} != slots {all}"
    );
    let books = &core.books(tier)[pool];
    let sum = books.free + books.active + books.held + books.cached + books.fenced;
    ensure!(
        sum == books.slots && u64::from(books.free) == free,
        "pool {pool}: free + active + held + cached + fenced = {sum} != slots = {}",
        books.slots
    );
    Ok(())
}

fn check_available(core: &Core, caches: &[&Cache], tier: Tier, pool: usize) -> Result<()> {
    let tree = &core.tree;
    let slots = &core.slots(tier)[pool];
    let free = slots.free_slots().len();
    let evictable = live(core).filter(|&i| {
        let page = tree.page(pool, i);
        let claimed = if tree.windowed[pool] {
            page.claims() > 0
        } else {
            tree.state(i).refs() > 0
        };
        page.slot() != 0 && page.tier() == tier && !claimed
    });
    let evictable = evictable.count();
    let own = |cache: &&&Cache| tier == Tier::Device && cache.core == core.id;
    let debt: u32 = caches.iter().filter(own).map(|cache| cache.debt[pool]).sum();
    let promised: u32 = caches.iter().filter(own).map(|cache| cache.promise[pool]).sum();
    let available = slots.available();
    ensure!(
        available as usize + promised as usize == free + evictable + debt as usize,
        "pool {pool} on the {tier:?}: available {available} + promised {promised} != free {free} + evictable {evictable}"
    );
    let counted = slots.promised.get();
    ensure!(
        counted == u64::from(promised),
        "pool {pool}: promised {counted} != what claims of batches keep = {promised}"
    );
    let purses: u32 = caches.iter().map(|cache| cache.purse[pool]).sum();
    ensure!(purses == 0, "pool {pool}: {purses} units outside of any call");
    Ok(())
}
