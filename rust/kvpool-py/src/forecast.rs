//! The `Forecast` class: started requests as they will grow, by pool.

use kvpool_core::forecast::Growth;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Mutex;

/// Asked before each start of a pass.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Forecast {
    pools: Mutex<Vec<kvpool_core::forecast::Forecast>>,
}

impl Forecast {
    pub fn new(pools: Vec<kvpool_core::forecast::Forecast>) -> Self {
        Self {
            pools: Mutex::new(pools),
        }
    }
}

#[pymethods]
impl Forecast {
    /// A request starts: its tokens, tokens that it may produce and has produced; per pool the most slots that it can come to
    /// hold, its slots now, those of them that come back. With `available`, per pool what can be had besides its slots: it
    /// is not added if some pool would overflow -> (pool, step, slots missing).
    #[allow(clippy::too_many_arguments)]
    fn start(
        &self,
        share: f64,
        length: u64,
        new: u64,
        produced: u64,
        most: Vec<u64>,
        held: Vec<u64>,
        back: Vec<u64>,
        available: Option<Vec<u64>>,
    ) -> PyResult<Option<(usize, u64, u64)>> {
        let pools = self.pools.try_lock();
        let mut pools =
            pools.map_err(|_| PyValueError::new_err("the forecast is in use by another thread"))?;
        let mut over = None;
        let mut places = Vec::with_capacity(pools.len());
        for (pool, rows) in pools.iter_mut().enumerate() {
            places.push(rows.insert(Growth {
                steps: steps(share, new, produced),
                tokens: length,
                most: most[pool],
                held: held[pool],
                back: back[pool],
            }));
            if let (None, Some(available)) = (over, &available) {
                let found = rows.overflow(available[pool]);
                over = found.map(|(step, missing)| (pool, step, missing));
            }
        }
        if over.is_some() {
            for (rows, place) in pools.iter_mut().zip(places) {
                rows.remove(place);
            }
        }
        Ok(over)
    }
}

/// Steps until a request ends, as expected; at least one.
pub fn steps(share: f64, new: u64, produced: u64) -> u64 {
    ((share * new as f64).round() as u64)
        .saturating_sub(produced)
        .max(1)
}
