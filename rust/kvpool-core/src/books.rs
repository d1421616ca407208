//! The books of a running core: what each slot is, read without stopping anybody.
//!
//! Each slot is looked at once and counts once, so `free + active + held + cached + fenced == slots`
//! whatever others do meanwhile; which of the five a slot in motion is counted as, nobody can say.

use crate::core::Core;
use crate::pool::Owner;
use crate::tree::Holder;
use crate::types::PoolBooks;
use crate::words::Tier;

/// What a page in the tree is, the strongest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Cached,
    Fenced,
    Held,
    Active,
}

fn strongest(holders: u64) -> Use {
    if Holder::Active.is_in(holders) {
        Use::Active
    } else if Holder::Held.is_in(holders) {
        Use::Held
    } else if Holder::Fenced.is_in(holders) {
        Use::Fenced
    } else {
        Use::Cached
    }
}

/// A claim on a node holds its ancestors too.
fn node_uses(core: &Core) -> Vec<Use> {
    let nodes = &core.tree.nodes;
    let mut uses = vec![Use::Cached; nodes.len()];
    for (index, node) in nodes.iter().enumerate() {
        let by = strongest(node.holders.get());
        let mut at = index;
        while uses[at] < by {
            uses[at] = by;
            let parent = core.tree.parent(at);
            if parent.is_nil() {
                break;
            }
            at = parent.index();
        }
    }
    uses
}

/// Slots of every pool on a tier by what they are.
pub fn books(core: &Core, tier: Tier) -> Vec<PoolBooks> {
    let uses = node_uses(core);
    (0..core.pools.len())
        .map(|pool| pool_books(core, tier, pool, &uses))
        .collect()
}

fn pool_books(core: &Core, tier: Tier, pool: usize, uses: &[Use]) -> PoolBooks {
    let slots = &core.slots(tier)[pool];
    let mut books = PoolBooks {
        slots: slots.num_slots(),
        peak: slots.peak(),
        ..PoolBooks::default()
    };
    for slot in 1..=slots.num_slots() {
        let by = match slots.owner(slot) {
            Owner::Free => {
                books.free += 1;
                continue;
            }
            Owner::Active => Use::Active,
            Owner::Held => Use::Held,
            Owner::Fenced | Owner::Retired => Use::Fenced,
            Owner::Node(index) if core.tree.windowed[pool] => {
                strongest(core.tree.pages[pool].holders[index as usize].get())
            }
            Owner::Node(index) => uses[index as usize],
        };
        match by {
            Use::Active => books.active += 1,
            Use::Held => books.held += 1,
            Use::Fenced => books.fenced += 1,
            Use::Cached => books.cached += 1,
        }
    }
    books
}
