//! Models of moves between the tiers: H18 to H24.

use super::{Claimed, Root, Tree};
use crate::models::{fails, holds};
use crate::sync::Weak;
use crate::words::{Link, Page, Tier};
use loom::sync::Arc;
use loom::thread;

const ROOT: Root = Root {
    digest: [0, 0],
    epoch: 0,
};

/// One token per block; full-attention pools, then windowed ones; two private blocks.
fn tree(nodes: u32, full: usize, windowed: usize) -> Arc<Tree> {
    let windows = (0..full + windowed).map(|pool| pool >= full).collect();
    Arc::new(Tree::new(1, nodes, Some(2), windows, 1, false, true))
}

/// A node with one claim and, in each pool, page 1 of the device: claimed in windowed pools by a SUSPENDED cache.
fn insert(tree: &Tree, parent: Link, token: i32) -> Link {
    let dead = tree.take_node().unwrap();
    let key = token as u64;
    let link = tree.write(&dead, &ROOT, parent, key, &[token], 35);
    for pool in 0..tree.pages.len() {
        assert!(tree.set_page(pool, link.index(), 1, u64::from(tree.windowed[pool]), 0));
    }
    tree.publish(dead, link, &ROOT, parent, key, &[token]).unwrap();
    link
}

/// Down to host slot 3, if nobody keeps it. Returns whether it went, and whether it was claimed at that moment.
fn move_down(tree: &Tree, index: usize) -> Option<bool> {
    tree.seize(index)?;
    tree.place_page(0, index, Tier::Host, 3);
    let now = tree.state(index);
    assert!(now.is_live() && now.is_busy(), "taken from under its mover");
    Some(tree.settle(index, Tier::Host).refs() > 0)
}

/// H18: a block that is pinned stays where it is, and is never busy.
fn pin_against_move() {
    let tree = tree(1, 1, 0);
    let a = insert(&tree, Link::NIL, 1).index();
    let other = {
        let tree = tree.clone();
        thread::spawn(move || move_down(&tree, a).is_some())
    };
    let pinned = tree.pin(a);
    let before = (tree.state(a).is_busy(), tree.page(0, a));
    let moved = other.join().unwrap();
    if pinned {
        let after = (tree.state(a).is_busy(), tree.page(0, a));
        assert!(!before.0 && before == after, "a pinned block moved");
        assert!(tree.unpin(a));
    } else {
        assert!(moved, "refused though nothing moved");
    }
    assert_eq!(tree.pins(a), 0);
}

#[test]
fn pin_and_move() {
    holds(3, pin_against_move);
}

#[test]
fn pin_that_leaves_the_state() {
    fails(Weak::PinQuietly, "a pinned block moved", 3, pin_against_move);
}

#[test]
fn move_that_ignores_pins() {
    fails(Weak::SeizeBlind, "a pinned block moved", 3, pin_against_move);
}

/// H19: the last release announces its unit on the tier where the mover left it, and is not lost.
fn release_against_move() {
    let tree = tree(1, 1, 0);
    let a = insert(&tree, Link::NIL, 1).index();
    let other = {
        let tree = tree.clone();
        thread::spawn(move || move_down(&tree, a).unwrap())
    };
    let announced = tree.release(a, |_| {});
    let claimed = other.join().unwrap();
    let tier = if claimed { Tier::Host } else { Tier::Device };
    assert_eq!(
        tree.state(a).refs(),
        0,
        "a release was lost or announced on the wrong tier"
    );
    assert_eq!(
        announced,
        Some(tier),
        "a release was lost or announced on the wrong tier"
    );
}

#[test]
fn release_and_move() {
    holds(3, release_against_move);
}

#[test]
fn release_and_move_that_writes_what_it_saw() {
    fails(Weak::SettleStale, "a release was lost", 3, release_against_move);
}

/// H19: a claim is paid on the tier on which the block is, whatever moves; and it finds the page there.
#[test]
fn claim_and_move() {
    holds(3, || {
        let tree = tree(1, 1, 0);
        let a = insert(&tree, Link::NIL, 1);
        tree.release(a.index(), |_| {});
        let other = {
            let tree = tree.clone();
            thread::spawn(move || move_down(&tree, a.index()).unwrap())
        };
        let first = tree.claim(a, Some(Tier::Device));
        let then = match first {
            Claimed::Unpaid(tier) => tree.claim(a, Some(tier)),
            _ => first,
        };
        let claimed = other.join().unwrap();
        match (first, then) {
            (Claimed::First, _) => assert!(claimed, "paid on the device, and not when it left"),
            (Claimed::Unpaid(Tier::Host), Claimed::First) => assert!(!claimed, "paid on both tiers"),
            (Claimed::Full, _) => assert!(!claimed),
            other => panic!("{other:?}"),
        }
        assert_eq!(tree.state(a.index()).tier(), Tier::Host);
        assert_eq!(tree.page(0, a.index()).slot(), 3);
    });
}

/// H20: a block on the move is not killed.
fn kill_against_move() {
    let tree = tree(1, 1, 0);
    let a = insert(&tree, Link::NIL, 1).index();
    tree.release(a, |_| {});
    let other = {
        let tree = tree.clone();
        thread::spawn(move || move_down(&tree, a).is_some())
    };
    let killed = tree.kill(a);
    let moved = other.join().unwrap();
    let Some(dead) = killed else {
        return assert!(moved, "neither");
    };
    let page = tree.strip(0, &dead).unwrap();
    let tier = if moved { Tier::Host } else { Tier::Device };
    assert_eq!(page.tier(), tier);
    tree.bury(&dead);
}

#[test]
fn kill_and_move() {
    holds(3, kill_against_move);
}

#[test]
fn kill_on_the_move() {
    fails(Weak::KillBusy, "taken from under its mover", 3, kill_against_move);
}

// -- pages of windowed pools ------------------------------------------------------------------

/// The mover's side: what became of the page. `Some(false)`: it was taken away.
fn move_page(tree: &Tree, index: usize) -> Option<bool> {
    tree.seize_page(0, index)?;
    Some(tree.settle_page(0, index, 1, Tier::Host, 3).is_some())
}

/// H21: a page that an ACTIVE cache claims stays where it is.
fn pin_against_page_move() {
    let tree = tree(1, 0, 1);
    let a = insert(&tree, Link::NIL, 1).index();
    let other = {
        let tree = tree.clone();
        thread::spawn(move || move_page(&tree, a))
    };
    let pinned = tree.pin_page(0, a);
    let before = tree.page(0, a);
    other.join().unwrap();
    if pinned {
        assert_eq!(tree.page(0, a), before, "a pinned page moved");
        tree.unpin_page(0, a);
    }
    assert_eq!((tree.page(0, a).active(), tree.page(0, a).claims()), (0, 1));
}

#[test]
fn pin_and_page_move() {
    holds(3, pin_against_page_move);
}

#[test]
fn pin_of_a_page_on_the_move() {
    fails(Weak::PinBusyPage, "a pinned page moved", 3, pin_against_page_move);
}

/// H22: a commit puts its own page in the place of one that is on the host or on its way there, or joins it on the device;
/// each of the three slots has one owner afterwards.
fn commit_against_page_move() {
    let tree = tree(1, 0, 1);
    let a = insert(&tree, Link::NIL, 1).index();
    let other = {
        let tree = tree.clone();
        thread::spawn(move || move_page(&tree, a))
    };
    let replaced = loop {
        if let Some(page) = tree.replace_page(0, a, 7) {
            break Some(page);
        }
        if tree.claim_near(0, a, false, true) == Claimed::Joined {
            break None;
        }
    };
    let page = tree.page(0, a);
    assert!(
        page.tier() == Tier::Device && page.active() == 1,
        "joined a page of the host"
    );
    let moved = other.join().unwrap();
    let page = tree.page(0, a);
    assert!(
        page.tier() == Tier::Device && page.claims() == 2,
        "a claimed page went down"
    );
    let by_mover = moved == Some(false);
    match replaced {
        None => assert!(page.slot() == 1 && moved.is_none()),
        Some(old) => assert!(
            page.slot() == 7 && old.is_busy() == by_mover,
            "a slot without an owner, or with two"
        ),
    }
}

#[test]
fn commit_and_page_move() {
    holds(3, commit_against_page_move);
}

#[test]
fn commit_that_joins_anywhere() {
    fails(
        Weak::ClaimFar,
        "joined a page of the host",
        3,
        commit_against_page_move,
    );
}

#[test]
fn page_move_that_ends_blindly() {
    fails(
        Weak::SettlePage,
        "a claimed page went down",
        3,
        commit_against_page_move,
    );
}

/// H22: the page of a block that is killed while it is on the move is the mover's, and nobody else's.
fn strip_against_page_move() {
    let tree = tree(1, 0, 1);
    let a = insert(&tree, Link::NIL, 1).index();
    let other = {
        let tree = tree.clone();
        thread::spawn(move || move_page(&tree, a))
    };
    let idle = tree.release_page(0, a, false, false);
    tree.release(a, |_| {});
    let dead = tree.kill(a).unwrap();
    let page = tree.strip(0, &dead).unwrap();
    let moved = other.join().unwrap();
    assert_eq!(tree.page(0, a), Page::NONE, "a dead node has a page");
    assert!(idle.is_some());
    match moved {
        Some(true) => assert_eq!((page.tier(), page.slot()), (Tier::Host, 3)),
        Some(false) => assert!(page.is_busy(), "a slot with two owners"),
        None => assert_eq!((page.is_busy(), page.slot()), (false, 1)),
    }
    tree.bury(&dead);
}

#[test]
fn strip_and_page_move() {
    holds(3, strip_against_page_move);
}

#[test]
fn strip_and_page_move_that_ends_blindly() {
    fails(
        Weak::SettlePage,
        "a dead node has a page",
        3,
        strip_against_page_move,
    );
}

/// H21: claims and releases of a page while it moves are told by the word that its mover leaves.
#[test]
fn page_claim_release_and_move() {
    holds(3, || {
        let tree = tree(1, 0, 1);
        let a = insert(&tree, Link::NIL, 1).index();
        let other = {
            let tree = tree.clone();
            thread::spawn(move || {
                tree.seize_page(0, a)?;
                tree.settle_page(0, a, 1, Tier::Host, 3)
            })
        };
        let joined = tree.claim_page(0, a, None, false) == Claimed::Joined;
        if joined {
            assert_eq!(tree.release_page(0, a, false, false), None);
        }
        let announced = tree.release_page(0, a, false, false);
        let settled = other.join().unwrap().unwrap();
        let tier = if settled.claims() > 0 {
            Tier::Host
        } else {
            Tier::Device
        };
        assert_eq!(announced, Some(tier), "a unit on the wrong tier");
        assert_eq!((tree.page(0, a).claims(), tree.page(0, a).slot()), (0, 3));
    });
}

// -- up ---------------------------------------------------------------------------------------

/// H23: of two threads that each bring one of two pages up, one lifts the block; each host slot is left once.
fn two_land() {
    let tree = tree(1, 2, 0);
    let a = insert(&tree, Link::NIL, 1).index();
    tree.seize(a).unwrap();
    tree.place_page(0, a, Tier::Host, 3);
    tree.place_page(1, a, Tier::Host, 3);
    tree.settle(a, Tier::Host);
    assert!(tree.pin(a));
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            let left = u32::from(tree.raise_page(0, a, 4).is_some());
            tree.lift(a);
            left
        })
    };
    let left = u32::from(tree.raise_page(1, a, 5).is_some());
    tree.lift(a);
    let left = left + other.join().unwrap();
    assert_eq!(left, 2);
    assert_eq!(
        tree.state(a).tier(),
        Tier::Device,
        "its pages are up, and it is not"
    );
    assert_eq!((tree.page(0, a).slot(), tree.page(1, a).slot()), (4, 5));
}

#[test]
fn land_and_land() {
    holds(3, two_land);
}

#[test]
fn land_and_look_at_what_was() {
    fails(Weak::LiftStale, "its pages are up, and it is not", 3, two_land);
}

// -- private blocks, children -----------------------------------------------------------------

/// H24: a private block that is parked or taken out again is its owner's alone until it is unpinned.
fn park_against_move() {
    let tree = tree(1, 1, 0);
    let dead = tree.take_spare().unwrap();
    let index = dead.index();
    assert!(tree.set_page(0, index, 1, 0, 0));
    let other = {
        let tree = tree.clone();
        thread::spawn(move || move_down(&tree, index).is_some())
    };
    tree.park(dead, &ROOT, Link::NIL, 0, 35);
    let now = (tree.state(index).is_busy(), tree.page(0, index).tier());
    assert_eq!(
        now,
        (false, Tier::Device),
        "a private block moved under its owner"
    );
    let dead = tree.dissolve(index);
    let page = tree.strip_own(0, &dead);
    tree.recycle(dead);
    assert!(!other.join().unwrap(), "a private block moved under its owner");
    assert_eq!((page.slot(), page.tier(), tree.pins(index)), (1, Tier::Device, 0));
}

#[test]
fn park_and_move() {
    holds(3, park_against_move);
}

#[test]
fn park_before_the_pin() {
    fails(
        Weak::ParkUnpinned,
        "a private block moved under its owner",
        3,
        park_against_move,
    );
}

/// H6: who asks for the children of a block gets those, and none that a node of theirs was reused for.
fn children_against_reuse() {
    let tree = tree(4, 1, 0);
    let a = insert(&tree, Link::NIL, 1);
    let b = insert(&tree, Link::NIL, 2);
    let child = |parent: Link, token| {
        assert_eq!(tree.claim(parent, None), Claimed::Joined);
        let link = insert(&tree, parent, token);
        tree.release(link.index(), |_| {});
        tree.release(parent.index(), |_| {});
        link
    };
    let stays = child(a, 3);
    let goes = child(a, 4);
    let other = {
        let tree = tree.clone();
        thread::spawn(move || {
            let dead = tree.kill(goes.index()).unwrap();
            tree.strip(0, &dead);
            tree.bury(&dead);
            tree.recycle(dead);
            assert_eq!(tree.claim(b, None), Claimed::Joined);
            insert(&tree, b, 5)
        })
    };
    let mut found = Vec::new();
    tree.children_of(a, &mut found);
    let any = tree.any_child(a);
    other.join().unwrap();
    assert!(found.contains(&stays), "a child was missed");
    let known = |link: &Link| *link == stays || *link == goes;
    assert!(
        found.iter().all(known) && any.is_some_and(|link| known(&link)),
        "a child of another"
    );
    assert!(found.len() <= 2);
}

#[test]
fn children_and_reuse() {
    holds(2, children_against_reuse);
}

#[test]
fn children_without_a_second_look() {
    fails(Weak::ReadAgain, "a child of another", 2, children_against_reuse);
}
