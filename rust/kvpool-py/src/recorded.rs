//! How a core's offloads are made: at once by a callable, or later by whoever takes the record of them; and what becomes of
//! bad pages (the `Recorder` class).

use crate::cache::Cache;
use crate::core::Core;
use kvpool_core::types::Mover;
use kvpool_core::words::Tier;
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// (pool, device slot, host slot), both from 1
type Offloads = Vec<(usize, u32, u32)>;

/// Pages go down by whoever takes the record next; their old slots may be handed out before.
#[derive(Debug, Clone, Default)]
pub struct Recorded(Arc<Mutex<Offloads>>);

impl Recorded {
    fn all(&self) -> MutexGuard<'_, Offloads> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mover for Recorded {
    fn offload(&self, pool: usize, src: u32, dst: u32) -> bool {
        self.all().push((pool, src, dst));
        true
    }
}

/// Pages to the host by a Python callable (pool, device slot, host slot) -> whether it is done, both slots from 1.
#[derive(Debug)]
pub struct Offload(pub Py<PyAny>);

impl Mover for Offload {
    fn offload(&self, pool: usize, src: u32, dst: u32) -> bool {
        Python::attach(|py| {
            let done = self.0.call1(py, (pool, src, dst));
            done.and_then(|done| done.extract(py)).unwrap_or(false)
        })
    }
}

/// A mover's view of a core. Holds no state of its own.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Recorder {
    core: Py<Core>,
}

#[pymethods]
impl Recorder {
    #[new]
    fn new(core: Py<Core>) -> Self {
        Self { core }
    }

    /// -> [(pool, device slot, host slot)], both from 1, since the last call: to be made in this order, before anything
    /// else is moved or computed
    fn take(&self) -> Offloads {
        std::mem::take(&mut *self.core.get().recorded.all())
    }

    /// Pages whose content is bad: (pool, on the host, slot from 1) -> per cache: whether it claims or owns one of them, or
    /// another thread does not leave it
    fn lose(&self, py: Python<'_>, caches: Vec<Py<Cache>>, pages: Vec<(usize, bool, u32)>) -> Vec<bool> {
        let core = &self.core.get().core;
        let tier = |host| if host { Tier::Host } else { Tier::Device };
        let pages = pages.into_iter();
        let bad: Vec<_> = pages
            .map(|(pool, host, slot)| core.lose(pool, tier(host), slot))
            .collect();
        let hit = |cache: &Py<Cache>| match cache.get().look(py) {
            Ok(cache) => bad.iter().any(|page| core.has_bad(&cache, page)),
            Err(_) => true,
        };
        caches.iter().map(hit).collect()
    }

    /// Whether a block on the cache's path is lost, or another thread does not leave the cache.
    fn is_lost(&self, py: Python<'_>, cache: &Bound<'_, Cache>) -> bool {
        let core = &self.core.get().core;
        cache.get().look(py).map_or(true, |cache| core.is_lost(&cache))
    }

    /// Takes slots out of use for good: (pool, on the host, slot from 1) -> those that are not free yet
    fn retire(&self, slots: Vec<(usize, bool, u32)>) -> Vec<(usize, bool, u32)> {
        let core = &self.core.get().core;
        let tier = |host| if host { Tier::Host } else { Tier::Device };
        let mut slots = slots;
        slots.retain(|&(pool, host, slot)| !core.retire(pool, tier(host), slot));
        slots
    }

    /// Drops lost blocks that nobody claims any more.
    fn drop_lost(&self) {
        self.core.get().core.drop_lost();
    }
}
