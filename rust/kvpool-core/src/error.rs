//! Errors of the core. Pressure (not enough room) is never an error: such calls return `false`.

/// Misuse or a broken invariant; the core's books are unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoreError {
    /// A call that the state of the cache does not allow.
    #[error("{0}")]
    State(String),
    /// An argument out of its range.
    #[error("{0}")]
    Value(String),
    /// Tables of this size cannot be allocated.
    #[error("{0}")]
    Memory(String),
    /// `check()` found an equation that does not hold.
    #[error("{0}")]
    Invariant(String),
}

/// Result of the core's calls.
pub type Result<T> = std::result::Result<T, CoreError>;
