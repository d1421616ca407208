//! The books, recomputed from scratch. Everything here only reads.
//!
//! Per pool: `free + active + held + cached + fenced == slots`, and every slot has exactly one owner:
//! the free list, a node of the tree, the private part of one cache, or a fence.

use crate::core::Core;
use crate::error::{CoreError, Result};
use crate::types::{CacheState, PoolBooks, NIL};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Nobody,
    Cached,
    Fenced,
    Held,
    Active,
}

fn uses(core: &Core, pool: usize) -> Vec<Use> {
    let mut uses = vec![Use::Nobody; core.pools[pool].num_slots() as usize + 1];
    let mut mark = |slot: u32, by: Use| {
        if slot != 0 {
            let at = &mut uses[slot as usize];
            *at = (*at).max(by);
        }
    };
    let pages = &core.tree.pages[pool];
    for (node, page) in core.tree.nodes.iter().zip(pages) {
        if node.live {
            mark(page.slot, Use::Cached);
        }
    }
    for cache in &core.caches {
        let by = match cache.state {
            CacheState::Active => Use::Active,
            CacheState::Suspended => Use::Held,
            CacheState::Closed => Use::Fenced,
        };
        for &slot in &cache.tables[pool] {
            mark(slot, by);
        }
        if !core.tree.windowed[pool] {
            for &node in &cache.nodes {
                mark(pages[node as usize].slot, by);
            }
        }
        if cache.source != NIL {
            mark(pages[cache.source as usize].slot, by);
        }
        for &(at, slot) in &cache.fenced {
            if at as usize == pool {
                mark(slot, Use::Fenced);
            }
        }
    }
    uses
}

/// Slots of every pool by what they are.
pub fn books(core: &Core) -> Vec<PoolBooks> {
    (0..core.pools.len()).map(|pool| pool_books(core, pool)).collect()
}

fn pool_books(core: &Core, pool: usize) -> PoolBooks {
    let uses = uses(core, pool);
    let count = |what: Use| uses[1..].iter().filter(|&&u| u == what).count() as u32;
    PoolBooks {
        slots: core.pools[pool].num_slots(),
        free: count(Use::Nobody),
        active: count(Use::Active),
        held: count(Use::Held),
        cached: count(Use::Cached),
        fenced: count(Use::Fenced),
        peak: core.pools[pool].peak(),
    }
}

macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err(CoreError::Invariant(format!($($message)+)));
        }
    };
}

/// Every equation of the module headers.
pub fn check(core: &Core) -> Result<()> {
    check_tree(core)?;
    check_claims(core)?;
    for pool in 0..core.pools.len() {
        check_slots(core, pool)?;
    }
    Ok(())
}

fn check_tree(core: &Core) -> Result<()> {
    let tree = &core.tree;
    let count = tree.nodes.len();
    let mut children = vec![0u32; count];
    let mut claimed_children = vec![0u32; count];
    let (mut live, mut unclaimed) = (0, 0);
    for (i, node) in tree.nodes.iter().enumerate() {
        if !node.live {
            continue;
        }
        live += 1;
        unclaimed += u32::from(node.refs == 0);
        if node.parent != NIL {
            let parent = &tree.nodes[node.parent as usize];
            ensure!(parent.live, "node {i}: its parent {} is gone", node.parent);
            ensure!(
                parent.root == node.root,
                "node {i}: another root than its parent's"
            );
            ensure!(
                parent.depth + 1 == node.depth,
                "node {i}: depth != parent's depth + 1"
            );
            children[node.parent as usize] += 1;
            claimed_children[node.parent as usize] += u32::from(node.refs > 0);
        }
        let before = if node.parent == NIL {
            tree.root_key(node.root)
        } else {
            tree.nodes[node.parent as usize].key
        };
        let tokens = tree.tokens(i as u32);
        ensure!(
            tree.extend_key(before, tokens) == node.key,
            "node {i}: key != hash of its prefix"
        );
        let found = tree.child(node.root, node.parent, node.key, tokens);
        ensure!(found == Some(i as u32), "node {i}: look-up finds {found:?}");
        for (pool, pages) in tree.pages.iter().enumerate() {
            ensure!(
                tree.windowed[pool] || pages[i].slot != 0,
                "node {i}: no page in the full-attention pool {pool}"
            );
        }
    }
    ensure!(
        live + tree.free_nodes() == count,
        "live nodes {live} + free nodes {} != {count}",
        tree.free_nodes()
    );
    ensure!(
        unclaimed == tree.unclaimed,
        "unclaimed {} != nodes with refs == 0: {unclaimed}",
        tree.unclaimed
    );
    let mut claims = vec![0u32; count];
    for cache in &core.caches {
        for node in [cache.deepest(), cache.source] {
            if node != NIL {
                claims[node as usize] += 1;
            }
        }
    }
    for (i, node) in tree.nodes.iter().enumerate().filter(|(_, node)| node.live) {
        ensure!(
            children[i] == node.children,
            "node {i}: children {} != {}",
            node.children,
            children[i]
        );
        ensure!(
            node.refs == claims[i] + claimed_children[i],
            "node {i} ({:?}): refs {} != claims {} + claimed children {}",
            core.tree.at(i as u32),
            node.refs,
            claims[i],
            claimed_children[i]
        );
    }
    let mut users: Vec<(u32, u32)> = tree.root_users().collect();
    for (root, count) in &mut users {
        let nodes = tree.nodes.iter().filter(|n| n.live && n.root == *root).count();
        let caches = core.caches.iter().filter(|c| c.root == *root).count();
        ensure!(
            *count as usize == nodes + caches,
            "root {root}: users {count} != {nodes} nodes + {caches} caches"
        );
    }
    Ok(())
}

fn check_claims(core: &Core) -> Result<()> {
    let tree = &core.tree;
    for pool in (0..core.pools.len()).filter(|&pool| tree.windowed[pool]) {
        let mut claims = vec![0u32; tree.nodes.len()];
        for cache in &core.caches {
            for (i, &node) in cache.nodes.iter().enumerate() {
                let slot = cache.tables[pool][i];
                if slot != 0 {
                    ensure!(
                        tree.pages[pool][node as usize].slot == slot,
                        "pool {pool}: a cache holds slot {slot} of node {node}, which has another page"
                    );
                    claims[node as usize] += 1;
                }
            }
            if cache.source != NIL {
                claims[cache.source as usize] += 1;
            }
        }
        let mut idle = 0;
        for (i, node) in tree.nodes.iter().enumerate().filter(|(_, node)| node.live) {
            let page = &tree.pages[pool][i];
            ensure!(
                page.claims == claims[i],
                "pool {pool} node {i}: claims {} != {}",
                page.claims,
                claims[i]
            );
            ensure!(
                page.claims == 0 || node.refs > 0,
                "pool {pool} node {i}: claimed page of an unclaimed node"
            );
            idle += u32::from(page.slot != 0 && page.claims == 0);
        }
        ensure!(
            idle == tree.idle[pool],
            "pool {pool}: idle {} != pages without a claim {idle}",
            tree.idle[pool]
        );
    }
    Ok(())
}

fn check_slots(core: &Core, pool: usize) -> Result<()> {
    let slots = core.pools[pool].num_slots() as usize;
    let mut owners = vec![0u32; slots + 1];
    for &slot in core.pools[pool].free_slots() {
        owners[slot as usize] += 1;
    }
    for (node, page) in core.tree.nodes.iter().zip(&core.tree.pages[pool]) {
        if node.live {
            owners[page.slot as usize] += u32::from(page.slot != 0);
        }
    }
    for cache in &core.caches {
        let private = cache.tables[pool].iter().skip(cache.nodes.len());
        let fenced = cache
            .fenced
            .iter()
            .filter(|(at, _)| *at as usize == pool)
            .map(|(_, slot)| slot);
        for &slot in private.chain(fenced) {
            owners[slot as usize] += u32::from(slot != 0);
        }
    }
    for (slot, &count) in owners.iter().enumerate().skip(1) {
        ensure!(count == 1, "pool {pool}: slot {slot} has {count} owners, not 1");
    }
    let books = pool_books(core, pool);
    ensure!(
        books.free == core.pools[pool].free(),
        "pool {pool}: free {} != slots that nobody uses {}",
        core.pools[pool].free(),
        books.free
    );
    let sum = books.free + books.active + books.held + books.cached + books.fenced;
    ensure!(
        sum == books.slots,
        "pool {pool}: free + active + held + cached + fenced = {sum} != slots = {}",
        books.slots
    );
    Ok(())
}
