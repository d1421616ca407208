//! Models of the chains by beginning: a parent's own, and those behind a full one. Each has room for one here.

use super::{Root, Tree};
use crate::models::{fails, holds};
use crate::sync::Weak;
use crate::words::Link;
use loom::sync::Arc;
use loom::thread;

const ROOT: Root = Root {
    digest: [0, 0],
    epoch: 0,
};

/// Three tokens per block: chains of a parent, of the first token, and of two.
fn tree(nodes: u32) -> Arc<Tree> {
    Arc::new(Tree::new(3, nodes, None, vec![false], 1, false, true))
}

/// A block with one claim and a page.
fn insert(tree: &Tree, parent: Link, tokens: [i32; 3]) -> Link {
    let dead = tree.take_node().unwrap();
    let key = tree.extend_key(parent.0, &tokens);
    let link = tree.write(&dead, &ROOT, parent, key, &tokens, 35);
    tree.put_page(0, &dead, 1 + link.index() as u32);
    tree.publish(dead, link, &ROOT, parent, key, &tokens).unwrap();
    link
}

fn release(tree: &Tree, link: Link) {
    tree.release(link.index(), |_| {});
}

fn evict(tree: &Tree, link: Link) {
    let dead = tree.kill(link.index()).unwrap();
    tree.strip(0, &dead);
    tree.bury(&dead);
    tree.recycle(dead);
}

/// Two children that begin alike come at once: each is in a chain that has room for it, and can be found.
fn two_children_at_once() {
    let tree = tree(3);
    let a = insert(&tree, Link::NIL, [9, 9, 9]);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || insert(&tree, a, [1, 2, 3]))
    };
    let ours = insert(&tree, a, [1, 2, 4]);
    let theirs = other.join().unwrap();
    for link in [ours, theirs] {
        assert!(tree.is_in_start(link.index()), "a chain is longer than it may be");
    }
    assert_eq!(
        tree.closest_child(&ROOT, a, &[1, 2]).map(|found| found.1),
        Some(2)
    );
}

#[test]
fn children_and_children() {
    holds(2, two_children_at_once);
}

#[test]
fn children_on_a_later_head() {
    fails(
        Weak::CrowdHead,
        "a chain is longer than it may be",
        2,
        two_children_at_once,
    );
}

/// A child comes while its sibling goes, in whose chain there is no room for two.
#[test]
fn child_and_eviction_of_its_sibling() {
    holds(2, || {
        let tree = tree(3);
        let a = insert(&tree, Link::NIL, [9, 9, 9]);
        let goes = insert(&tree, a, [1, 2, 3]);
        release(&tree, goes);
        let other = {
            let tree = tree.clone();
            thread::spawn(move || evict(&tree, goes))
        };
        let stays = insert(&tree, a, [1, 2, 4]);
        let found = tree.closest_child(&ROOT, a, &[1, 2]);
        assert!(found.is_some_and(|found| found.1 == 2), "a child was missed");
        other.join().unwrap();
        assert!(tree.is_in_start(stays.index()));
        assert_eq!(tree.closest_child(&ROOT, a, &[1, 2]), Some((stays, 2)));
    });
}

/// A child's end is not over when the place of its parent is written anew, and has a child again.
#[test]
fn eviction_and_reuse_of_the_parent() {
    holds(2, || {
        let tree = tree(3);
        let a = insert(&tree, Link::NIL, [9, 9, 9]);
        let child = insert(&tree, a, [1, 2, 3]);
        release(&tree, child);
        release(&tree, a);
        let other = {
            let tree = tree.clone();
            thread::spawn(move || evict(&tree, child))
        };
        if let Some(dead) = tree.kill(a.index()) {
            tree.strip(0, &dead);
            tree.bury(&dead);
            tree.recycle(dead);
            let b = insert(&tree, Link::NIL, [8, 8, 8]);
            if b.index() != a.index() {
                other.join().unwrap(); // the child's place was free first
                return;
            }
            let ours = insert(&tree, b, [1, 5, 6]);
            assert_eq!(
                tree.closest_child(&ROOT, b, &[1, 5]),
                Some((ours, 2)),
                "a child was missed"
            );
            other.join().unwrap();
            assert!(tree.is_in_start(ours.index()));
            assert_eq!(tree.follow(b, &[1, 5, 6]), Some(ours));
        } else {
            other.join().unwrap();
        }
    });
}
