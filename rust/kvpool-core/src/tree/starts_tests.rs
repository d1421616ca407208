//! Chains by beginning and families, against a look at all blocks.

use super::{Root, Tree};
use crate::words::{Link, Tier};

const T: usize = 8;
const ROOT: Root = Root {
    digest: [7, 7],
    epoch: 0,
};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// A block with a page that nobody claims; `None`: it is there, or the tree is full.
fn insert(tree: &Tree, parent: Link, tokens: &[i32]) -> Option<Link> {
    let dead = tree.take_node()?;
    let key = tree.extend_key(parent.0, tokens);
    let link = tree.write(&dead, &ROOT, parent, key, tokens, 35);
    tree.put_page(0, &dead, 1 + link.index() as u32);
    match tree.publish(dead, link, &ROOT, parent, key, tokens) {
        Ok(()) => {
            tree.release(link.index(), |_| {});
            Some(link)
        }
        Err((dead, _)) => {
            tree.unset_page(0, &dead);
            tree.recycle(dead);
            None
        }
    }
}

fn evict(tree: &Tree, link: Link) {
    let dead = tree.kill(link.index()).expect("a leaf that nobody claims");
    tree.strip(0, &dead);
    tree.bury(&dead);
    tree.recycle(dead);
}

fn common(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Blocks that begin with the same `shared` tokens, then go on in one of few ways.
fn block(rng: &mut Rng, shared: usize, ways: usize) -> Vec<i32> {
    (0..T)
        .map(|i| if i < shared { 1 } else { 2 + rng.below(ways) as i32 })
        .collect()
}

fn parents(tree: &Tree) -> [Link; 2] {
    let parent = insert(tree, Link::NIL, &[0; T]).expect("an empty tree");
    tree.claim(parent, Some(Tier::Device));
    [Link::NIL, parent]
}

#[test]
fn closest_child_is_exact_among_few_and_half_as_long_among_many() {
    for seed in 1..15 {
        let mut rng = Rng(seed * 0x9E37_79B9);
        let tree = Tree::new(T, 1 << 14, None, vec![false], seed, false, true);
        let shared = rng.below(T);
        let ways = 1 + rng.below(4);
        for parent in parents(&tree) {
            let mut blocks: Vec<(Link, Vec<i32>)> = Vec::new();
            for _ in 0..180 {
                let tokens = block(&mut rng, shared, ways);
                if let Some(link) = insert(&tree, parent, &tokens) {
                    blocks.push((link, tokens));
                }
                let begins = rng.below(T);
                let asked = block(&mut rng, begins, ways);
                let asked = &asked[..rng.below(T)];
                let best = blocks
                    .iter()
                    .map(|(_, tokens)| common(tokens, asked))
                    .max()
                    .unwrap_or(0);
                let first = blocks.iter().find(|(_, tokens)| common(tokens, asked) == best);
                let found = tree.closest_child(&ROOT, parent, asked);
                let alike = |n: usize| {
                    blocks
                        .iter()
                        .filter(|(_, tokens)| common(tokens, asked) >= n)
                        .count()
                };
                if best == 0 {
                    assert_eq!(found, None, "seed {seed}");
                } else if alike(1) <= 4 {
                    let exact = first.map(|(link, _)| (*link, best));
                    assert_eq!(found, exact, "seed {seed}: among {}", blocks.len());
                } else {
                    let (link, tokens) = found.expect("a child that begins alike");
                    let (_, of) = blocks.iter().find(|(at, _)| *at == link).expect("a child");
                    assert!(
                        common(of, asked) == tokens && 2 * tokens > best,
                        "seed {seed}: {tokens} of {best}"
                    );
                }
            }
            assert!(
                blocks.iter().all(|(link, _)| tree.is_in_start(link.index())),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn closest_child_after_evictions_is_a_child_that_begins_so() {
    for seed in 1..15 {
        let mut rng = Rng(seed * 0x2545_F491);
        let tree = Tree::new(T, 120, Some(0), vec![false], seed, false, true);
        let parents = parents(&tree);
        let mut blocks: Vec<(Link, Link, Vec<i32>)> = Vec::new();
        for _ in 0..600 {
            let parent = parents[rng.below(2)];
            if blocks.len() > 100 || rng.below(3) == 0 && !blocks.is_empty() {
                let at = if rng.below(2) == 0 {
                    0
                } else {
                    rng.below(blocks.len())
                };
                evict(&tree, blocks.remove(at).0);
            } else {
                let tokens = block(&mut rng, 3, 3);
                if let Some(link) = insert(&tree, parent, &tokens) {
                    blocks.push((link, parent, tokens));
                }
            }
            let asked = block(&mut rng, 3, 3);
            if let Some((link, tokens)) = tree.closest_child(&ROOT, parent, &asked[..T - 1]) {
                let (_, of, begins) = blocks.iter().find(|(at, ..)| *at == link).expect("a live child");
                assert!(
                    *of == parent && common(begins, &asked[..T - 1]) == tokens,
                    "seed {seed}"
                );
            }
            assert!(
                blocks.iter().all(|(link, ..)| tree.is_in_start(link.index())),
                "seed {seed}"
            );
            let mut found = Vec::new();
            tree.children_of(parents[1], &mut found);
            let mut all: Vec<Link> = { &blocks }
                .iter()
                .filter(|one| one.1 == parents[1])
                .map(|one| one.0)
                .collect();
            found.sort_unstable();
            all.sort_unstable();
            assert_eq!(found, all, "seed {seed}: all children");
            assert_eq!(
                tree.any_child(parents[1]).is_some(),
                !all.is_empty(),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn without_partial_reuse_no_beginning_is_kept() {
    let tree = Tree::new(T, 8, None, vec![false], 1, false, false);
    let link = insert(&tree, Link::NIL, &[1; T]).expect("an empty tree");
    assert_eq!(tree.closest_child(&ROOT, Link::NIL, &[1; 4]), None);
    let key = tree.extend_key(Link::NIL.0, &[1; T]);
    assert_eq!(tree.child(&ROOT, Link::NIL, key, &[1; T]), Some(link));
}
