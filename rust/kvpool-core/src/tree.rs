//! The radix tree of cached blocks: nodes, look-up, claims and the pages they hold.
//!
//! A node is one token block. Its key is the hash of the whole prefix, its parent and its tokens are
//! compared on every look-up, so a collision costs time and nothing else.
//!
//! - `refs(n) == claims on n + children c of n with refs(c) > 0`: an unclaimed node has no claimed descendant.
//! - `unclaimed == nodes with refs == 0`
//! - in a windowed pool `idle == pages with claims == 0`; a claimed page belongs to a claimed node.
//! - `children(n) == nodes whose parent is n`; a node outlives its children.

use crate::evict::NodeRef;
use crate::types::NIL;
use std::collections::HashMap;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// One token block in the tree.
#[derive(Debug, Clone)]
pub struct Node {
    /// Parent node, or `NIL` for the first block of its root.
    pub parent: u32,
    /// Root that the node belongs to.
    pub root: u32,
    /// Counts reuses of this index.
    pub gen: u32,
    /// Blocks before this one.
    pub depth: u32,
    /// Claims, and children that are claimed.
    pub refs: u32,
    /// Nodes below.
    pub children: u32,
    /// Hash of the whole prefix.
    pub key: u64,
    /// Insertion number.
    pub seq: u64,
    /// Stamp of the last release.
    pub used: u64,
    /// Retention priority.
    pub priority: u8,
    /// Segment of the policy.
    pub segment: u8,
    /// Whether the node is in the tree.
    pub live: bool,
    /// Whether the order of leaves has an entry for it.
    pub queued: bool,
    next_key: u32,
    next_first: u32,
}

/// A page of one node in one pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct Page {
    /// Slot, 0 for none.
    pub slot: u32,
    /// Claims on the page itself (windowed pools only).
    pub claims: u32,
    /// Whether it went stale under a cache and was not claimed as live since.
    pub stale: bool,
    /// Whether the pool's order has an entry for it.
    pub queued: bool,
    /// Stamp: when it went stale if `stale`, else its last release.
    pub used: u64,
}

/// Identity under which reuse is allowed.
#[derive(Debug)]
pub struct Root {
    scope: Box<[u8]>,
    /// Weights epoch.
    pub epoch: u64,
    /// Caches and nodes that belong to it.
    pub users: u32,
    seed: u64,
}

/// Nodes, roots and the two tables that find them.
#[derive(Debug)]
pub struct Tree {
    t: usize,
    seed: u64,
    collide: bool,
    /// The slab.
    pub nodes: Vec<Node>,
    tokens: Vec<i32>,
    /// `pages[pool][node]`.
    pub pages: Vec<Vec<Page>>,
    /// Pools that have a window.
    pub windowed: Vec<bool>,
    free: Vec<u32>,
    by_key: Vec<u32>,
    by_first: Vec<u32>,
    mask: usize,
    roots: Vec<Option<Root>>,
    free_roots: Vec<u32>,
    root_of: HashMap<Box<[u8]>, Vec<(u64, u32)>>,
    seq: u64,
    /// Nodes with `refs == 0`.
    pub unclaimed: u32,
    /// Per pool: pages with no claim (windowed pools only).
    pub idle: Vec<u32>,
}

impl Tree {
    /// An empty tree of at most `max_blocks` nodes.
    pub fn new(t: usize, max_blocks: u32, windowed: Vec<bool>, seed: u64, collide: bool) -> Self {
        let n = max_blocks as usize;
        let buckets = (2 * n).next_power_of_two();
        let node = Node {
            parent: NIL,
            root: NIL,
            gen: 0,
            depth: 0,
            refs: 0,
            children: 0,
            key: 0,
            seq: 0,
            used: 0,
            priority: 0,
            segment: 0,
            live: false,
            queued: false,
            next_key: NIL,
            next_first: NIL,
        };
        Self {
            t,
            seed,
            collide,
            nodes: vec![node; n],
            tokens: vec![0; n * t],
            pages: vec![vec![Page::default(); n]; windowed.len()],
            idle: vec![0; windowed.len()],
            windowed,
            free: (0..max_blocks).rev().collect(),
            by_key: vec![NIL; buckets],
            by_first: vec![NIL; buckets],
            mask: buckets - 1,
            roots: Vec::new(),
            free_roots: Vec::new(),
            root_of: HashMap::new(),
            seq: 0,
            unclaimed: 0,
        }
    }

    /// Nodes that are not in the tree.
    pub fn free_nodes(&self) -> usize {
        self.free.len()
    }

    /// The tokens of a node.
    pub fn tokens(&self, node: u32) -> &[i32] {
        let at = node as usize * self.t;
        &self.tokens[at..at + self.t]
    }

    /// The node at its generation.
    pub fn at(&self, node: u32) -> NodeRef {
        NodeRef {
            id: node,
            gen: self.nodes[node as usize].gen,
        }
    }

    /// Whether the node was not recycled since.
    pub fn is_live(&self, node: NodeRef) -> bool {
        let n = &self.nodes[node.id as usize];
        n.live && n.gen == node.gen
    }

    // -- roots ------------------------------------------------------------------------------

    /// The root of a scope, if one exists.
    pub fn find_root(&self, scope: &[u8], epoch: u64) -> Option<u32> {
        let epochs = self.root_of.get(scope)?;
        epochs
            .iter()
            .find(|(known, _)| *known == epoch)
            .map(|(_, root)| *root)
    }

    /// The root of a scope, made if need be, with one more user.
    pub fn use_root(&mut self, scope: &[u8], epoch: u64) -> u32 {
        if let Some(root) = self.find_root(scope, epoch) {
            self.root_mut(root).users += 1;
            return root;
        }
        let seed = xxh3_64_with_seed(scope, self.seed ^ epoch.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let made = Root {
            scope: Box::from(scope),
            epoch,
            users: 1,
            seed,
        };
        let root = if let Some(root) = self.free_roots.pop() {
            self.roots[root as usize] = Some(made);
            root
        } else {
            self.roots.push(Some(made));
            (self.roots.len() - 1) as u32
        };
        self.root_of
            .entry(Box::from(scope))
            .or_default()
            .push((epoch, root));
        root
    }

    /// One user less; the last one takes the root along.
    pub fn leave_root(&mut self, root: u32) {
        let users = {
            let r = self.root_mut(root);
            r.users -= 1;
            r.users
        };
        if users == 0 {
            if let Some(r) = self.roots[root as usize].take() {
                if let Some(epochs) = self.root_of.get_mut(&r.scope) {
                    epochs.retain(|(_, known)| *known != root);
                    if epochs.is_empty() {
                        self.root_of.remove(&r.scope);
                    }
                }
                self.free_roots.push(root);
            }
        }
    }

    /// A root that has users.
    pub fn root(&self, root: u32) -> &Root {
        self.roots[root as usize].as_ref().expect("a root with users")
    }

    fn root_mut(&mut self, root: u32) -> &mut Root {
        self.roots[root as usize].as_mut().expect("a root with users")
    }

    /// Users of all roots, for `check`.
    pub fn root_users(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.roots
            .iter()
            .enumerate()
            .filter_map(|(i, r)| r.as_ref().map(|r| (i as u32, r.users)))
    }

    // -- keys -------------------------------------------------------------------------------

    /// Key of the prefix that ends before the first block.
    pub fn root_key(&self, root: u32) -> u64 {
        self.root(root).seed
    }

    /// Key of the prefix `before` followed by one block.
    pub fn extend_key(&self, before: u64, tokens: &[i32]) -> u64 {
        if self.collide {
            return 0;
        }
        // Hash bytes without a copy or unsafe: tokens go through a small stack buffer.
        let mut key = before;
        let mut buffer = [0u8; 256];
        for run in tokens.chunks(64) {
            for (out, token) in buffer.chunks_exact_mut(4).zip(run) {
                out.copy_from_slice(&token.to_le_bytes());
            }
            key = xxh3_64_with_seed(&buffer[..run.len() * 4], key);
        }
        key
    }

    fn first_bucket(&self, root: u32, parent: u32, first: i32) -> usize {
        let x = (u64::from(parent) << 32 | first as u32 as u64) ^ u64::from(root).rotate_left(48);
        let x = (x ^ (x >> 31)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) as usize >> 7 & self.mask
    }

    // -- look-up ----------------------------------------------------------------------------

    /// The child of `parent` (in `root`) with exactly these tokens.
    pub fn child(&self, root: u32, parent: u32, key: u64, tokens: &[i32]) -> Option<u32> {
        let mut at = self.by_key[key as usize & self.mask];
        while at != NIL {
            let n = &self.nodes[at as usize];
            if n.key == key && n.parent == parent && n.root == root && self.tokens(at) == tokens {
                return Some(at);
            }
            at = n.next_key;
        }
        None
    }

    /// The child of `parent` that shares most leading tokens with `tokens` and has a page in every
    /// pool; of several the one inserted first. Cost: the children that share the first token.
    pub fn closest_child(&self, root: u32, parent: u32, tokens: &[i32]) -> Option<(u32, usize)> {
        let first = *tokens.first()?;
        let mut best: Option<(u32, usize)> = None;
        let mut at = self.by_first[self.first_bucket(root, parent, first)];
        while at != NIL {
            let n = &self.nodes[at as usize];
            if n.parent == parent && n.root == root {
                let common = self
                    .tokens(at)
                    .iter()
                    .zip(tokens)
                    .take_while(|(a, b)| a == b)
                    .count();
                let better = match best {
                    None => common > 0,
                    Some((other, most)) => {
                        common > most || (common == most && n.seq < self.nodes[other as usize].seq)
                    }
                };
                if better && self.has_all_pages(at) {
                    best = Some((at, common));
                }
            }
            at = n.next_first;
        }
        best
    }

    /// Whether the node has a page in every pool.
    pub fn has_all_pages(&self, node: u32) -> bool {
        self.pages.iter().all(|pool| pool[node as usize].slot != 0)
    }

    // -- change -----------------------------------------------------------------------------

    /// A new node without pages and claims. `None`: no node is free.
    pub fn insert(&mut self, root: u32, parent: u32, key: u64, tokens: &[i32], priority: u8) -> Option<u32> {
        let id = self.free.pop()?;
        self.seq += 1;
        let depth = if parent == NIL {
            0
        } else {
            self.nodes[parent as usize].children += 1;
            self.nodes[parent as usize].depth + 1
        };
        let at = id as usize * self.t;
        self.tokens[at..at + self.t].copy_from_slice(tokens);
        let bucket = key as usize & self.mask;
        let first = self.first_bucket(root, parent, tokens[0]);
        let gen = self.nodes[id as usize].gen;
        self.nodes[id as usize] = Node {
            parent,
            root,
            gen,
            depth,
            refs: 0,
            children: 0,
            key,
            seq: self.seq,
            used: 0,
            priority,
            segment: 0,
            live: true,
            queued: false,
            next_key: self.by_key[bucket],
            next_first: self.by_first[first],
        };
        self.by_key[bucket] = id;
        self.by_first[first] = id;
        self.unclaimed += 1;
        self.root_mut(root).users += 1;
        Some(id)
    }

    /// Takes an unclaimed node without children and pages out of the tree.
    pub fn remove(&mut self, id: u32) {
        let n = self.nodes[id as usize].clone();
        debug_assert!(n.live && n.refs == 0 && n.children == 0);
        debug_assert!(self.pages.iter().all(|pool| pool[id as usize].slot == 0));
        let bucket = n.key as usize & self.mask;
        let first = self.first_bucket(n.root, n.parent, self.tokens(id)[0]);
        if self.by_key[bucket] == id {
            self.by_key[bucket] = n.next_key;
        } else {
            let mut at = self.by_key[bucket];
            while self.nodes[at as usize].next_key != id {
                at = self.nodes[at as usize].next_key;
            }
            self.nodes[at as usize].next_key = n.next_key;
        }
        if self.by_first[first] == id {
            self.by_first[first] = n.next_first;
        } else {
            let mut at = self.by_first[first];
            while self.nodes[at as usize].next_first != id {
                at = self.nodes[at as usize].next_first;
            }
            self.nodes[at as usize].next_first = n.next_first;
        }
        if n.parent != NIL {
            self.nodes[n.parent as usize].children -= 1;
        }
        let node = &mut self.nodes[id as usize];
        node.live = false;
        node.gen = node.gen.wrapping_add(1);
        self.unclaimed -= 1;
        self.free.push(id);
        self.leave_root(n.root);
    }

    /// One claim more on a node; protects its ancestors.
    pub fn claim(&mut self, id: u32) {
        let mut at = id;
        while at != NIL {
            let n = &mut self.nodes[at as usize];
            n.refs += 1;
            if n.refs > 1 {
                return;
            }
            self.unclaimed -= 1;
            at = n.parent;
        }
    }

    /// One claim more on the page of a node in a windowed pool, as live.
    pub fn claim_page(&mut self, pool: usize, id: u32) {
        let page = &mut self.pages[pool][id as usize];
        debug_assert!(page.slot != 0);
        if page.claims == 0 {
            self.idle[pool] -= 1;
        }
        page.claims += 1;
        page.stale = false;
    }
}
