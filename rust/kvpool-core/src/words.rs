//! The words that carry the protocol, packed into 64 bits. Pure arithmetic; nothing here is shared.
//!
//! ```text
//! State  [ version 36 | live 1 | busy 1 | host 1 | refs 25 ]   of a node
//! Link   [ born    36 | mark 1 | index 27 ]  to a node, at one incarnation; of no node: [ root 36 | mark 1 | nil 27 ]
//! Birth  [ born    36 | depth 28 ]           of a node; of a first block: [ born 36 | root 28 ]
//! Page   [ slot 27 | host 1 | stale 1 | busy 1 | active 17 | claims 17 ] of a node in one pool
//! ```
//!
//! `version` grows whenever refs leave 0, whenever the node dies and whenever it is pinned, so a CAS on a word that was
//! seen with refs 0 succeeds only if nobody claimed since, and one that was seen unpinned if nobody pinned. 2^36 such steps on one index while one
//! thread is stopped between its look and its CAS are taken as impossible (at 10^6 per second: 19 hours).

const INDEX_BITS: u32 = 27;
const FLAG: u64 = 1 << INDEX_BITS;
const LOW: u64 = FLAG - 1;
const VERSION_SHIFT: u32 = INDEX_BITS + 1;
const VERSION: u64 = (1 << 36) - 1;

/// Nodes that a tree can have: the last index means "none".
pub const MAX_NODES: u32 = LOW as u32;
/// References that a node can have; one more is refused. Claims by state are counted in 21 bits each.
pub const MAX_REFS: u64 = if cfg!(test) { 100 } else { (1 << 21) - 1 };

/// A node at one incarnation, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Link(pub u64);

impl Link {
    /// No node: the end of a chain, the parent of a first block.
    pub const NIL: Self = Self(LOW);

    /// Node `index`, born at `born`.
    pub fn new(born: u64, index: u32) -> Self {
        Self((born & VERSION) << VERSION_SHIFT | u64::from(index))
    }
    /// Above the first blocks of a root: no node, and what [`Birth`] has no room for of its digest.
    pub fn above_firsts(digest: u64) -> Self {
        Self(digest & !(FLAG | LOW) | LOW)
    }
    /// Index in the slab.
    pub fn index(self) -> usize {
        (self.0 & LOW) as usize
    }
    /// Version at which the node was born.
    pub fn born(self) -> u64 {
        self.0 >> VERSION_SHIFT
    }
    /// Whether the owner of this word is leaving its chain.
    pub fn is_marked(self) -> bool {
        self.0 & FLAG != 0
    }
    /// The word with the mark.
    pub fn marked(self) -> Self {
        Self(self.0 | FLAG)
    }
    /// The word without the mark.
    pub fn unmarked(self) -> Self {
        Self(self.0 & !FLAG)
    }
    /// Whether it is no node.
    pub fn is_nil(self) -> bool {
        self.index() == LOW as usize
    }
}

/// When a node was born, and how deep; or to which root a first block belongs: the rest of the digest is in the link above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Birth(pub u64);

impl Birth {
    /// Born at this version, with so many blocks before it, as far as they can be counted.
    pub fn new(born: u64, depth: u64) -> Self {
        Self((born & VERSION) << VERSION_SHIFT | depth.min(FLAG | LOW))
    }
    /// Born at this version, the first block of a root.
    pub fn first(born: u64, digest: u64) -> Self {
        Self((born & VERSION) << VERSION_SHIFT | Self::root_bits(digest))
    }
    /// The part of a root's digest that a first block has here.
    pub fn root_bits(digest: u64) -> u64 {
        digest & (FLAG | LOW)
    }
    /// The version.
    pub fn born(self) -> u64 {
        self.0 >> VERSION_SHIFT
    }
    /// Blocks before it; of a first block the part of the digest.
    pub fn low(self) -> u64 {
        self.0 & (FLAG | LOW)
    }
}

/// The mark in a link word.
pub const MARK: u64 = FLAG;

/// The tier of a page or a block, and of a unit that pays for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Tier {
    /// Memory of the accelerator.
    Device = 0,
    /// Pinned host memory.
    Host = 1,
}

const BUSY: u64 = 1 << 26;
const HOST: u64 = 1 << 25;
const REFS: u64 = HOST - 1;

/// Life of a node: `live` with refs 0 is evictable once it has no children; not `live` is owned by
/// who killed or took it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State(pub u64);

impl State {
    /// Dead, never lived.
    pub const NEW: Self = Self(0);

    /// Steps of life so far.
    pub fn version(self) -> u64 {
        self.0 >> VERSION_SHIFT
    }
    /// Whether it is in the tree.
    pub fn is_live(self) -> bool {
        self.0 & FLAG != 0
    }
    /// Claims on it, and children of it that have refs.
    pub fn refs(self) -> u64 {
        self.0 & REFS
    }
    /// Whether its pages are on the move: it cannot be claimed or killed meanwhile.
    pub fn is_busy(self) -> bool {
        self.0 & BUSY != 0
    }
    /// Where its pages of full-attention pools are, and the units that pay for a claim on it.
    pub fn tier(self) -> Tier {
        if self.0 & HOST == 0 {
            Tier::Device
        } else {
            Tier::Host
        }
    }
    /// Live and at rest on the device, and nobody claims it.
    pub fn is_idle(self) -> bool {
        self.0 & (FLAG | LOW) == FLAG
    }
    /// On the move from here on.
    pub fn busy(self) -> Self {
        Self(self.0 | BUSY)
    }
    /// At rest, on this tier.
    pub fn settled(self, tier: Tier) -> Self {
        Self(self.0 & !(BUSY | HOST) | if tier == Tier::Host { HOST } else { 0 })
    }
    /// A pin more or less to come: only the version grows, so that who saw the state before cannot change it.
    pub fn stirred(self) -> Self {
        Self(self.0.wrapping_add(1 << VERSION_SHIFT))
    }
    /// dead → live with one reference.
    pub fn born(self) -> Self {
        Self((self.0 & !LOW) | FLAG | 1)
    }
    /// One reference more. The version grows when it is the first.
    pub fn claimed(self, keep_version: bool) -> Self {
        if self.refs() == 0 && !keep_version {
            Self(self.stepped() | FLAG | self.0 & HOST | 1)
        } else {
            Self(self.0 + 1)
        }
    }
    /// One reference less.
    pub fn released(self) -> Self {
        Self(self.0 - 1)
    }
    /// live → dead.
    pub fn killed(self) -> Self {
        Self(self.stepped())
    }
    fn stepped(self) -> u64 {
        ((self.version() + 1) & VERSION) << VERSION_SHIFT
    }
}

/// A page of a node in one pool. Claims are counted in windowed pools only, those of ACTIVE caches among them once more
/// if there is a host tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page(pub u64);

/// Claims that a page can have; one more is refused.
pub const MAX_CLAIMS: u64 = if cfg!(test) { 200 } else { (1 << 17) - 1 };
/// Slots that a pool can have on a tier.
pub const MAX_SLOTS: u32 = (1 << 27) - 1;

const ACTIVE_SHIFT: u32 = 17;
const ACTIVE: u64 = 1 << ACTIVE_SHIFT;
const CLAIMS: u64 = ACTIVE - 1;
const PAGE_BUSY: u64 = 1 << 34;
const STALE: u64 = 1 << 35;
const PAGE_HOST: u64 = 1 << 36;
const SLOT_SHIFT: u32 = 37;

impl Page {
    /// No page.
    pub const NONE: Self = Self(0);

    /// A page on the device with so many claims, of them so many by ACTIVE caches.
    pub fn new(slot: u32, claims: u64, active: u64) -> Self {
        Self(u64::from(slot) << SLOT_SHIFT | active << ACTIVE_SHIFT | claims)
    }
    /// Its slot, from 1; 0 for no page.
    pub fn slot(self) -> u32 {
        (self.0 >> SLOT_SHIFT) as u32
    }
    /// Where the slot is.
    pub fn tier(self) -> Tier {
        if self.0 & PAGE_HOST == 0 {
            Tier::Device
        } else {
            Tier::Host
        }
    }
    /// Claims on the page itself.
    pub fn claims(self) -> u64 {
        self.0 & CLAIMS
    }
    /// Those of ACTIVE caches.
    pub fn active(self) -> u64 {
        self.0 >> ACTIVE_SHIFT & CLAIMS
    }
    /// Whether it went stale under a cache and was not claimed as live since.
    pub fn is_stale(self) -> bool {
        self.0 & STALE != 0
    }
    /// On the device, and claimed by SUSPENDED caches only.
    pub fn is_held(self) -> bool {
        self.tier() == Tier::Device && self.claims() > 0 && self.active() == 0
    }
    /// Whether it is on the move by itself: who takes the word away leaves the slot to the mover.
    pub fn is_busy(self) -> bool {
        self.0 & PAGE_BUSY != 0
    }
    /// One claim more, by an ACTIVE cache or not.
    pub fn claimed(self, active: bool) -> Self {
        Self(self.0 + 1 + if active { ACTIVE } else { 0 })
    }
    /// A claim became one of an ACTIVE cache.
    pub fn pinned(self) -> Self {
        Self(self.0 + ACTIVE)
    }
    /// A claim of an ACTIVE cache became one of a SUSPENDED cache.
    pub fn unpinned(self) -> Self {
        Self(self.0 - ACTIVE)
    }
    /// Held as live: no longer stale.
    pub fn fresh(self) -> Self {
        Self(self.0 & !STALE)
    }
    /// One claim less.
    pub fn released(self, stale: bool, active: bool) -> Self {
        let less = self.0 - 1 - if active { ACTIVE } else { 0 };
        Self(less | if stale { STALE } else { 0 })
    }
    /// On the move from here on.
    pub fn busy(self) -> Self {
        Self(self.0 | PAGE_BUSY)
    }
    /// At rest in this slot of this tier; claims and mark stay.
    pub fn settled(self, tier: Tier, slot: u32) -> Self {
        let rest = self.0 & (STALE | (ACTIVE - 1) | CLAIMS << ACTIVE_SHIFT);
        let host = if tier == Tier::Host { PAGE_HOST } else { 0 };
        Self(rest | host | u64::from(slot) << SLOT_SHIFT)
    }
}

/// When a block was used: the clock, then a number of its own. Ordered; the default is "never".
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    /// [`clock_word`] of the moment, 0 while no block has a duration.
    pub time: u64,
    /// Number of the release, 0 for an expiry.
    pub count: u64,
}

impl Stamp {
    /// No use: nothing is recorded.
    pub const NONE: Self = Self { time: 0, count: 0 };
}

/// Seconds as a word with the same order; never 0 (that is before all times).
pub fn clock_word(seconds: f64) -> u64 {
    let bits = seconds.to_bits();
    if bits >> 63 == 1 {
        !bits
    } else {
        bits | 1 << 63
    }
}

/// The seconds of a [`clock_word`].
pub fn seconds(word: u64) -> f64 {
    f64::from_bits(if word >> 63 == 1 { word & !(1 << 63) } else { !word })
}

/// 31 bits of a weights epoch. Those of epochs less than 2^29 apart differ: multiples of the golden ratio keep away from
/// whole numbers.
pub fn era(epoch: u64) -> u32 {
    (epoch.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_word_do_not_touch_each_other() {
        let link = Link::new(VERSION, MAX_NODES - 1);
        assert_eq!((link.born(), link.index()), (VERSION, MAX_NODES as usize - 1));
        assert_eq!(link.marked().unmarked(), link);
        assert_eq!(link.marked().born(), VERSION);
        assert!(Link::NIL.is_nil() && !link.is_nil());
        let (above, birth) = (Link::above_firsts(u64::MAX), Birth::first(3, u64::MAX));
        assert!(above.is_nil() && !above.is_marked() && above.marked().is_nil());
        assert_eq!(
            above.0 & !(FLAG | LOW) | birth.low(),
            u64::MAX,
            "the whole digest"
        );
        assert_eq!(
            (birth.born(), Birth::new(VERSION, u64::MAX)),
            (3, Birth(u64::MAX))
        );
        assert_eq!((Birth::new(7, 5).born(), Birth::new(7, 5).low()), (7, 5));
        let state = State::NEW.born();
        assert_eq!((state.version(), state.is_live(), state.refs()), (0, true, 1));
        assert!(!state.is_idle() && state.released().is_idle() && !state.released().busy().is_idle());
        assert!(!state.released().settled(Tier::Host).is_idle() && !State::NEW.is_idle());
        assert!(!state.is_busy() && state.busy().is_busy() && state.busy().refs() == 1);
        let down = state.busy().settled(Tier::Host);
        assert_eq!((down.tier(), down.is_busy(), down.refs()), (Tier::Host, false, 1));
        assert_eq!(down.released().claimed(false).tier(), Tier::Host);
        assert_eq!(down.released().killed(), State(1 << VERSION_SHIFT));
        assert_eq!((down.stirred().version(), down.stirred().tier()), (1, Tier::Host));
        let free = state.released();
        assert_eq!(free.claimed(false).version(), 1);
        assert_eq!(free.claimed(false).refs(), 1);
        assert_eq!(free.killed(), State(1 << VERSION_SHIFT));
        let page = Page::new(7, 1, 0).released(true, false);
        assert_eq!((page.slot(), page.claims(), page.is_stale()), (7, 0, true));
        assert!(page.claimed(false).is_stale() && !page.claimed(true).fresh().is_stale());
        let most = Page::new(MAX_SLOTS, CLAIMS - 1, CLAIMS - 1).claimed(true).busy();
        assert_eq!(
            (most.claims(), most.active(), most.slot()),
            (CLAIMS, CLAIMS, MAX_SLOTS)
        );
        assert!(most.is_busy() && !most.is_stale() && most.tier() == Tier::Device);
        let host = most.settled(Tier::Host, 3);
        assert_eq!(
            (host.slot(), host.tier(), host.active(), host.is_busy()),
            (3, Tier::Host, CLAIMS, false)
        );
        assert_eq!(
            host.unpinned()
                .released(true, true)
                .settled(Tier::Device, 5)
                .active(),
            CLAIMS - 2
        );
    }

    #[test]
    fn words_of_the_clock_have_the_order_of_the_seconds() {
        let times = [
            f64::NEG_INFINITY,
            -2.5,
            -0.0,
            0.0,
            1e-9,
            3.0,
            f64::MAX,
            f64::INFINITY,
        ];
        for pair in times.windows(2) {
            assert!(clock_word(pair[0]) < clock_word(pair[1]));
        }
        for time in times {
            assert!(clock_word(time) > 0 && seconds(clock_word(time)) == time);
        }
    }

    #[test]
    fn the_version_wraps_without_touching_the_flag() {
        let last = State(VERSION << VERSION_SHIFT | FLAG);
        assert_eq!(last.killed(), State(0));
        assert_eq!(last.claimed(false), State(FLAG | 1));
    }

    /// The nearest epochs that share an era would be Fibonacci numbers apart.
    #[test]
    fn epochs_less_than_2_to_the_29_apart_are_told_apart() {
        for start in [0, 1, 12345, 1 << 40, u64::MAX - (1 << 30)] {
            let (mut before, mut apart) = (1, 1);
            while apart < 1 << 29 {
                assert_ne!(era(start), era(start + apart), "{start} + {apart}");
                (before, apart) = (apart, before + apart);
            }
        }
    }
}
