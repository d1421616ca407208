//! Models of the life of nodes and pages: H1 to H4, H6, H8.

use super::{Claimed, Root, Tree};
use crate::models::{fails, holds};
use crate::sync::Weak;
use crate::words::{Link, Tier};
use loom::sync::Arc;
use loom::thread;

/// One token per block, all in one bucket, or spread over two.
fn tree(nodes: u32, windowed: bool, collide: bool) -> (Arc<Tree>, Root) {
    let tree = Tree::new(1, nodes, None, vec![windowed], 1, collide, true);
    let root = Root {
        digest: [0, 0],
        epoch: 0,
    };
    (Arc::new(tree), root)
}

fn key(tree: &Tree, token: i32) -> u64 {
    if tree.collide {
        0
    } else {
        token as u64
    }
}

/// A node with one claim, or `None` if the tree is full or has it.
fn insert(tree: &Tree, root: &Root, parent: Link, token: i32) -> Option<Link> {
    let dead = tree.take_node()?;
    let key = key(tree, token);
    let link = tree.write(&dead, root, parent, key, &[token], 35);
    match tree.publish(dead, link, root, parent, key, &[token]) {
        Ok(()) => Some(link),
        Err((dead, _)) => {
            tree.recycle(dead);
            None
        }
    }
}

fn unclaimed(tree: &Tree, root: &Root, parent: Link, token: i32) -> Link {
    let link = insert(tree, root, parent, token).unwrap();
    tree.release(link.index(), |_| {});
    link
}

fn find(tree: &Tree, root: &Root, parent: Link, token: i32) -> Option<Link> {
    tree.child(root, parent, key(tree, token), &[token])
}

fn evict(tree: &Tree, link: Link) -> bool {
    match tree.kill(link.index()) {
        Some(dead) => {
            tree.bury(&dead);
            tree.recycle(dead);
            true
        }
        None => false,
    }
}

/// H1, H2: a claim holds the node that was found, or nothing.
fn claim_against_eviction() {
    let (tree, root) = tree(1, false, false);
    let a = unclaimed(&tree, &root, Link::NIL, 1);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            if evict(&tree, a) {
                insert(&tree, &root, Link::NIL, 2).unwrap();
            }
        })
    };
    if matches!(
        tree.claim(a, Some(Tier::Device)),
        Claimed::First | Claimed::Joined
    ) {
        assert_eq!(
            tree.nodes[a.index()].key.get(),
            1,
            "claimed another block than was found"
        );
    }
    other.join().unwrap();
}

#[test]
fn claim_and_evict() {
    holds(2, claim_against_eviction);
}

#[test]
fn claim_without_the_incarnation() {
    fails(
        Weak::ClaimBorn,
        "claimed another block than was found",
        2,
        claim_against_eviction,
    );
}

/// H2: of a claim and an eviction one wins.
#[test]
fn claim_or_evict() {
    holds(2, || {
        let (tree, root) = tree(1, false, false);
        let a = unclaimed(&tree, &root, Link::NIL, 1);
        let other = {
            let tree = tree.clone();
            thread::spawn(move || tree.kill(a.index()).is_some())
        };
        let claimed = tree.claim(a, Some(Tier::Device)) == Claimed::First;
        assert_ne!(other.join().unwrap(), claimed, "both or neither");
    });
}

/// H3: a node that has a child is never evicted, whatever came between the two looks.
fn child_against_eviction() {
    let (tree, root) = tree(2, false, false);
    let a = unclaimed(&tree, &root, Link::NIL, 1);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            if tree.claim(a, Some(Tier::Device)) == Claimed::First {
                let child = insert(&tree, &root, a, 2).unwrap();
                tree.release(child.index(), |_| {});
                tree.release(a.index(), |_| {});
            }
        })
    };
    let killed = tree.kill(a.index()).is_some();
    other.join().unwrap();
    assert!(
        !killed || tree.children(a.index()) == 0,
        "evicted from above its child"
    );
}

#[test]
fn insert_and_evict_the_parent() {
    holds(2, child_against_eviction);
}

#[test]
fn insert_and_evict_without_a_version() {
    fails(
        Weak::ClaimVersion,
        "evicted from above its child",
        2,
        child_against_eviction,
    );
}

#[test]
fn insert_and_evict_with_two_looks() {
    fails(
        Weak::KillChildren,
        "evicted from above its child",
        2,
        child_against_eviction,
    );
}

#[test]
fn insert_and_evict_with_a_relaxed_release() {
    fails(
        Weak::ReleaseOrder,
        "evicted from above its child",
        2,
        child_against_eviction,
    );
}

/// H4: two threads that publish the same block end with one node.
fn publish_twice() {
    let (tree, root) = tree(2, false, false);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || insert(&tree, &root, Link::NIL, 1).is_some())
    };
    let ours = insert(&tree, &root, Link::NIL, 1).is_some();
    let theirs = other.join().unwrap();
    assert!(ours != theirs, "the same block twice in the tree");
    assert!(find(&tree, &root, Link::NIL, 1).is_some());
}

#[test]
fn publish_and_publish() {
    holds(2, publish_twice);
}

#[test]
fn publish_on_a_later_head() {
    fails(
        Weak::PublishHead,
        "the same block twice in the tree",
        2,
        publish_twice,
    );
}

/// Who sees a link sees the fields of its node.
fn publish_shows_fields() {
    let (tree, root) = tree(1, false, true);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            insert(&tree, &root, Link::NIL, 7);
        })
    };
    let head = tree.by_key.head(0);
    if !head.is_nil() {
        let tokens: Vec<i32> = tree.tokens(head.index()).collect();
        assert_eq!(tokens, [7], "a link to fields that are not written");
    }
    other.join().unwrap();
}

#[test]
fn publish_and_read() {
    holds(2, publish_shows_fields);
}

#[test]
fn publish_without_order() {
    fails(
        Weak::PublishOrder,
        "a link to fields that are not written",
        2,
        publish_shows_fields,
    );
}

/// H6: fields that are believed belong to the incarnation that was linked.
fn read_against_reuse() {
    let (tree, root) = tree(1, false, true);
    let a = unclaimed(&tree, &root, Link::NIL, 1);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            evict(&tree, a);
            let dead = tree.take_node().unwrap();
            tree.write(&dead, &root, Link::NIL, 0, &[2], 35);
            tree.recycle(dead);
        })
    };
    tree.state(a.index()); // a point at which threads may switch
    let tokens: Vec<i32> = tree.tokens(a.index()).collect();
    if tree.is(a) {
        assert_eq!(tokens, [1], "fields of a later incarnation");
    }
    other.join().unwrap();
}

#[test]
fn read_and_reuse() {
    holds(2, read_against_reuse);
}

#[test]
fn read_without_a_second_look() {
    fails(
        Weak::ReadAgain,
        "fields of a later incarnation",
        2,
        read_against_reuse,
    );
}

#[test]
fn read_with_a_late_birth() {
    fails(
        Weak::WriteBirth,
        "fields of a later incarnation",
        2,
        read_against_reuse,
    );
}

/// H27: the way down leads to the block that has these tokens under this parent, or nowhere.
fn follow_against_reuse(token: i32) {
    let (tree, root) = tree(2, false, true);
    let top = insert(&tree, &root, Link::NIL, 9).unwrap();
    tree.claim(top, None);
    let a = unclaimed(&tree, &root, top, 1);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            evict(&tree, a);
            insert(&tree, &root, top, 2)
        })
    };
    let found = tree.follow(top, &[token]);
    let b = other.join().unwrap();
    let right = if token == 1 { Some(a) } else { b };
    assert!(found.is_none() || found == right, "followed to another block");
}

#[test]
fn follow_and_reuse() {
    holds(2, || follow_against_reuse(1));
    holds(2, || follow_against_reuse(2));
}

#[test]
fn follow_without_order() {
    fails(Weak::PublishOrder, "followed to another block", 2, || {
        follow_against_reuse(1)
    });
}

#[test]
fn follow_without_a_second_look() {
    fails(Weak::ReadAgain, "followed to another block", 2, || {
        follow_against_reuse(2)
    });
}

/// A walk never misses a live node because one before it was reused in another chain.
fn walk_against_reuse() {
    let (tree, root) = tree(2, false, false);
    // Buckets are the low bits of the key: 1 and 5 share one, 2 has its own.
    unclaimed(&tree, &root, Link::NIL, 1);
    let before = unclaimed(&tree, &root, Link::NIL, 5);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            if evict(&tree, before) {
                insert(&tree, &root, Link::NIL, 2).unwrap();
            }
        })
    };
    assert!(
        find(&tree, &root, Link::NIL, 1).is_some(),
        "a live node was missed"
    );
    other.join().unwrap();
}

#[test]
fn walk_and_reuse() {
    holds(2, walk_against_reuse);
}

#[test]
fn walk_without_a_second_look() {
    fails(Weak::ReadAgain, "a live node was missed", 2, walk_against_reuse);
}

/// H8: two neighbours that leave at once are both gone, and nobody else is.
fn unlink_neighbours() {
    let (tree, root) = tree(3, false, true);
    unclaimed(&tree, &root, Link::NIL, 1);
    let b = unclaimed(&tree, &root, Link::NIL, 2);
    let c = unclaimed(&tree, &root, Link::NIL, 3);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || evict(&tree, c))
    };
    assert!(evict(&tree, b));
    assert!(other.join().unwrap());
    let mut at = tree.by_key.head(0);
    let mut found = Vec::new();
    while !at.is_nil() {
        found.push(tree.tokens(at.index()).next());
        at = tree.by_key.next_of(at);
    }
    assert_eq!(found, [Some(1)], "an evicted node is still linked");
}

#[test]
fn unlink_and_unlink() {
    holds(2, unlink_neighbours);
}

#[test]
fn unlink_without_a_mark() {
    fails(
        Weak::UnlinkMark,
        "an evicted node is still linked",
        2,
        unlink_neighbours,
    );
}

/// A page is claimed or evicted, never both.
fn page_claim_against_eviction() {
    let (tree, root) = tree(1, true, false);
    let dead = tree.take_node().unwrap();
    let a = tree.write(&dead, &root, Link::NIL, 1, &[1], 35);
    assert!(tree.set_page(0, a.index(), 9, 0, 0));
    tree.publish(dead, a, &root, Link::NIL, 1, &[1]).unwrap();
    let other = {
        let tree = tree.clone();
        thread::spawn(move || tree.take_page(0, a.index()))
    };
    let claimed = tree.claim_page(0, a.index(), Some(Tier::Device), false) == Claimed::First;
    let taken = other.join().unwrap();
    assert!(claimed != taken.is_some(), "a claimed page was evicted");
    assert!(!claimed || tree.page(0, a.index()).slot() == 9);
}

#[test]
fn page_claim_and_evict() {
    holds(2, page_claim_against_eviction);
}

#[test]
fn page_evict_that_ignores_claims() {
    fails(
        Weak::PageClaims,
        "a claimed page was evicted",
        2,
        page_claim_against_eviction,
    );
}

/// Three threads: one claims, one inserts below, one evicts. Whatever happens, the child has its parent.
#[test]
fn claim_insert_and_evict() {
    holds(2, || {
        let (tree, root) = tree(2, false, false);
        let a = unclaimed(&tree, &root, Link::NIL, 1);
        let inserter = {
            let tree = tree.clone();
            thread::spawn(move || {
                if matches!(
                    tree.claim(a, Some(Tier::Device)),
                    Claimed::First | Claimed::Joined
                ) {
                    insert(&tree, &root, a, 2);
                }
            })
        };
        let claimer = {
            let tree = tree.clone();
            thread::spawn(move || {
                if matches!(
                    tree.claim(a, Some(Tier::Device)),
                    Claimed::First | Claimed::Joined
                ) {
                    tree.release(a.index(), |_| {});
                }
            })
        };
        evict(&tree, a);
        inserter.join().unwrap();
        claimer.join().unwrap();
        if let Some(child) = find(&tree, &root, a, 2) {
            assert!(tree.is_live(a), "a child without its parent");
            assert!(tree.state(child.index()).refs() == 1);
        }
    });
}
