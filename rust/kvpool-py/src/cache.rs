//! The `Cache` class: one request's claims and pages, changed by one thread at a time.
//!
//! Who would change a cache that another thread is changing is told so at once, by a `LogicError`. Who only looks disturbs
//! nobody: the others come in as soon as it is out, and it waits, a bounded number of turns, until a change is over.

use crate::convert::outcome;
use kvpool_core::{Cache as CoreCache, CoreError, Result};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

/// What one request holds; only its core can do something with it.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Cache(RwLock<CoreCache>);

/// In a cache, to change it.
pub type Entered<'a> = RwLockWriteGuard<'a, CoreCache>;

/// Turns that are left to others: milliseconds, where a call takes microseconds.
const TURNS: u32 = 1 << 10;

fn busy() -> CoreError {
    CoreError::State("another thread is in a call of this cache: one at a time".into())
}

impl Cache {
    pub fn new(cache: CoreCache) -> Self {
        Self(RwLock::new(cache))
    }

    /// To change it. Waits for nobody who changes it too: a second thread is told so.
    pub fn enter(&self, py: Python<'_>) -> Result<Entered<'_>> {
        if let Ok(entered) = self.0.try_write() {
            return Ok(entered);
        }
        patient(py, || match self.0.try_write() {
            // Looked at, or changed?
            Err(TryLockError::WouldBlock) if self.0.try_read().is_err() => Some(Err(busy())),
            result => settled(result),
        })
    }

    /// To change it where that must not be refused: another thread is given time to leave it.
    pub fn enter_soon(&self, py: Python<'_>) -> Result<Entered<'_>> {
        if let Ok(entered) = self.0.try_write() {
            return Ok(entered);
        }
        patient(py, || settled(self.0.try_write()))
    }

    /// To look at it.
    pub fn look(&self, py: Python<'_>) -> Result<RwLockReadGuard<'_, CoreCache>> {
        if let Ok(looked) = self.0.try_read() {
            return Ok(looked);
        }
        patient(py, || settled(self.0.try_read()))
    }
}

/// `None`: not now.
fn settled<G>(result: std::result::Result<G, TryLockError<G>>) -> Option<Result<G>> {
    match result {
        Ok(guard) => Some(Ok(guard)),
        Err(TryLockError::WouldBlock) => None,
        Err(TryLockError::Poisoned(_)) => Some(Err(CoreError::State(
            "an earlier call of this cache panicked; it cannot be used any more".into(),
        ))),
    }
}

/// Tries until there is an answer, or it has left its turn to others often enough.
#[cold]
fn patient<G>(py: Python<'_>, attempt: impl Fn() -> Option<Result<G>>) -> Result<G> {
    for _ in 0..TURNS {
        if let Some(result) = attempt() {
            return result;
        }
        py.detach(std::thread::yield_now);
    }
    attempt().unwrap_or_else(|| Err(busy()))
}

/// Every cache once, in the order in which they are listed first, with the times it is listed.
pub fn distinct(caches: &[Py<Cache>]) -> Vec<(&Cache, u32)> {
    // Nearly every list has each once: sorted, that shows for a tenth of what a table costs.
    let mut sorted: Vec<*const Cache> = caches
        .iter()
        .map(|cache| std::ptr::from_ref(cache.get()))
        .collect();
    sorted.sort_unstable();
    if sorted.windows(2).all(|pair| pair[0] != pair[1]) {
        return caches.iter().map(|cache| (cache.get(), 1)).collect();
    }
    let mut times: HashMap<*const Cache, u32> = HashMap::with_capacity(caches.len());
    for cache in caches {
        *times.entry(std::ptr::from_ref(cache.get())).or_default() += 1;
    }
    caches
        .iter()
        .map(Py::get)
        .filter_map(|cache| Some((cache, times.remove(&std::ptr::from_ref(cache))?)))
        .collect()
}

/// Enters all caches of a list, each once, with the times it is listed.
pub fn enter_all<'a>(py: Python<'_>, caches: &'a [Py<Cache>]) -> PyResult<Vec<(Entered<'a>, u32)>> {
    let once = distinct(caches);
    let mut entered = Vec::with_capacity(once.len());
    for (cache, times) in once {
        entered.push((outcome(py, cache.enter(py))?, times));
    }
    Ok(entered)
}

/// Runs a call of one cache.
pub fn with<T>(
    py: Python<'_>,
    cache: &Bound<'_, Cache>,
    f: impl FnOnce(&mut CoreCache) -> Result<T>,
) -> PyResult<T> {
    let result = cache.get().enter(py).and_then(|mut cache| f(&mut cache));
    outcome(py, result)
}

/// Runs a call that only looks at one cache.
pub fn look<T>(py: Python<'_>, cache: &Py<Cache>, f: impl FnOnce(&CoreCache) -> Result<T>) -> PyResult<T> {
    outcome(py, cache.get().look(py).and_then(|cache| f(&cache)))
}
