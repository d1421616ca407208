//! What the classes share: errors of the core as Python exceptions, arguments as the core's values.

use kvpool_core::types::{PageCopy, RangeSpec, Retain, RetentionSpec};
use kvpool_core::words::Tier;
use kvpool_core::{CacheInfo, Claim, CoreError};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;

pub fn raise(py: Python<'_>, error: CoreError) -> PyErr {
    let (class, message) = match error {
        CoreError::Value(message) => return PyValueError::new_err(message),
        CoreError::Memory(message) => return PyMemoryError::new_err(message),
        CoreError::State(message) => ("LogicError", message),
        CoreError::Invariant(message) => ("InvariantError", message),
    };
    match py
        .import("kvpool.errors")
        .and_then(|errors| errors.getattr(class))
    {
        Ok(class) => match class.call1((message,)) {
            Ok(error) => PyErr::from_value(error),
            Err(error) => error,
        },
        Err(error) => error,
    }
}

pub fn outcome<T>(py: Python<'_>, result: kvpool_core::Result<T>) -> PyResult<T> {
    result.map_err(|error| raise(py, error))
}

pub fn int32s(py: Python<'_>, tokens: &PyBuffer<i32>) -> PyResult<Vec<i32>> {
    if tokens.dimensions() != 1 {
        return Err(PyValueError::new_err("tokens must be one-dimensional"));
    }
    let tokens = tokens.to_vec(py)?;
    if tokens.iter().fold(0, |signs, token| signs | token) >= 0 {
        return Ok(tokens);
    }
    let at = tokens.iter().take_while(|&&token| token >= 0).count();
    Err(PyValueError::new_err(format!(
        "tokens: {} at position {at} is not in 0..2**31-1",
        tokens[at]
    )))
}

/// (pool, whether the source is on the host, source slot, destination slot)
pub type Copies = Vec<(u32, bool, u32, u32)>;
pub fn plan(copies: &[PageCopy]) -> Copies {
    let copy = |c: &PageCopy| (c.pool, c.tier == Tier::Host, c.src, c.dst);
    copies.iter().map(copy).collect()
}

/// ([(start, end, priority, seconds)], decode priority, decode seconds)
pub type Ranges = (Vec<(u64, Option<u64>, u8, Option<f64>)>, u8, Option<f64>);

pub fn retention((ranges, priority, duration): Ranges) -> RetentionSpec {
    RetentionSpec {
        ranges: ranges
            .into_iter()
            .map(|(start, end, priority, duration)| RangeSpec {
                start,
                end: end.unwrap_or(u64::MAX),
                retain: retain(priority, duration),
            })
            .collect(),
        decode: retain(priority, duration),
    }
}

fn retain(priority: u8, duration: Option<f64>) -> Retain {
    Retain {
        priority,
        duration: duration.unwrap_or(f64::INFINITY),
    }
}

/// A claim of a batch: (epoch, retention), (fewest new tokens, most reused ones).
pub fn claim<'a>(
    tokens: Vec<i32>,
    scope: &'a [u8],
    (epoch, ranges): (Option<u64>, &Option<Ranges>),
    (least, most): (Option<u64>, Option<u64>),
) -> Claim<'a> {
    Claim {
        tokens: tokens.into(),
        scope,
        epoch,
        retention: ranges.clone().map(retention),
        least,
        most,
    }
}

/// (reused, capacity, history_length, committed), in tokens
pub type Lengths = (u64, u64, u64, u64);

pub fn lengths(info: &CacheInfo) -> Lengths {
    (info.reused, info.capacity, info.history, info.committed)
}
