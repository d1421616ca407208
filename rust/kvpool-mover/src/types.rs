//! Plain data: tiers, directions, streams, events, errors.

/// Streams: one per direction, then the engine's.
pub const STREAMS: usize = 6;
/// The first of the engine's streams: the calling thread itself, whose work is done when it is recorded.
pub const CALLER: usize = 3;

/// Per stream, a place in it: `clock[s] = n` stands for the first n pieces of work.
pub type Clock = [u64; STREAMS];

/// The later place of each stream.
pub fn join(into: &mut Clock, other: &Clock) {
    for (mine, theirs) in into.iter_mut().zip(other) {
        *mine = (*mine).max(*theirs);
    }
}

/// Where pages live. Staging is device memory in which scattered pages are gathered before they are sent as one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// GPU memory, or CPU memory in its place.
    Device = 0,
    /// Host memory.
    Host = 1,
    /// The mover's own.
    Staging = 2,
}

impl Tier {
    /// The public word.
    pub fn name(self) -> &'static str {
        ["device", "host", "staging"][self as usize]
    }
}

/// Which way a batch goes; also the number of its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Device to host.
    Offload = 0,
    /// Host to device.
    Onboard = 1,
    /// Device to device.
    Copy = 2,
}

impl Direction {
    /// All of them, by number.
    pub const ALL: [Self; 3] = [Self::Offload, Self::Onboard, Self::Copy];

    /// The public word.
    pub fn name(self) -> &'static str {
        ["offload", "onboard", "copy"][self as usize]
    }

    /// Tier that is read, tier that is written.
    pub fn ends(self) -> (Tier, Tier) {
        match self {
            Self::Offload => (Tier::Device, Tier::Host),
            Self::Onboard => (Tier::Host, Tier::Device),
            Self::Copy => (Tier::Device, Tier::Device),
        }
    }
}

/// Name of a stream in messages.
pub fn stream_name(stream: usize) -> &'static str {
    match stream {
        0..=2 => Direction::ALL[stream].name(),
        CALLER => "compute",
        _ => "compute stream",
    }
}

/// A place in a stream, from 1; 0 is "nothing yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Stream.
    pub stream: usize,
    /// How many pieces of work it stands for.
    pub place: u64,
}

/// Why a page did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The copy itself failed.
    Copy,
    /// Its source was never written well: an earlier move into it failed.
    Source,
    /// Given up: it was not done in time.
    Timeout,
    /// The mover was closed before it was done.
    Closed,
}

impl Code {
    /// The public word.
    pub fn name(self) -> &'static str {
        ["copy", "source", "timeout", "closed"][self as usize]
    }
}

/// One page of a batch that did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveError {
    /// Why.
    pub code: Code,
    /// Pool index.
    pub pool: usize,
    /// Slot that was to be read.
    pub slot: u32,
    /// Which way.
    pub direction: Direction,
    /// Its number in the batch.
    pub index: u32,
}

/// A call that cannot be: nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// An argument is out of range.
    Value(String),
    /// The state of the mover does not allow it.
    State(String),
}

impl From<String> for Refusal {
    fn from(message: String) -> Self {
        Self::Value(message)
    }
}

impl From<&str> for Refusal {
    fn from(message: &str) -> Self {
        Self::Value(message.into())
    }
}

/// Which work a simulation runs next, of the work that may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Everything as late as possible, the engine's work last.
    ComputeLast,
    /// Moves at once, the engine's work when somebody waits for it.
    CopiesEager,
    /// The engine's work at once, moves when somebody waits for them.
    CopiesLast,
    /// Any, from this seed.
    Random(u64),
}

/// A small seeded generator (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 <= x < n, for a small n > 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// 0 <= x < 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}
