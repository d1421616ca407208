//! Block tables, as rows of one array or in compressed form.

use crate::cache::{look, Cache};
use kvpool_core::{Core, CoreError};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyByteArray;

/// (indptr, indices, last_page_len)
pub type Csr<'py> = (
    Bound<'py, PyByteArray>,
    Bound<'py, PyByteArray>,
    Bound<'py, PyByteArray>,
);

fn bytes_of(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// Entries that the widest table of these caches has.
pub fn widest(py: Python<'_>, core: &Core, caches: &[Py<Cache>], pool: usize) -> PyResult<usize> {
    let mut widest = 0;
    for cache in caches {
        let length = look(py, cache, |cache| Ok(core.table(cache, pool)?.len()))?;
        widest = widest.max(length);
    }
    Ok(widest)
}

/// Writes one row of slots per cache into `out`, or says what is wrong with it; the rest is `fill`.
pub fn rows(
    py: Python<'_>,
    core: &Core,
    caches: &[Py<Cache>],
    pool: usize,
    out: &Bound<'_, PyAny>,
    fill: i32,
) -> PyResult<()> {
    let widest = widest(py, core, caches, pool)?;
    let wrong = |what: &str| PyValueError::new_err(format!("out: {what}"));
    let table = "must be a two-dimensional int32 array";
    let out = PyBuffer::<i32>::get(out).map_err(|_| wrong(table))?;
    let &[rows, columns] = out.shape() else {
        return Err(wrong(table));
    };
    if out.readonly() || !out.is_c_contiguous() {
        return Err(wrong("must be writable and C-contiguous"));
    }
    if rows < caches.len() || columns < widest {
        let least = (caches.len(), widest);
        return Err(wrong(&format!(
            "shape {:?} is smaller than {least:?}",
            (rows, columns)
        )));
    }
    let mut cells = vec![fill; out.item_count()];
    for (cache, row) in caches.iter().zip(cells.chunks_mut(columns.max(1))) {
        look(py, cache, |cache| {
            let table = core.table(cache, pool)?;
            if table.len() > columns {
                return Err(CoreError::State(
                    "block_tables: another thread resized a cache".into(),
                ));
            }
            for (cell, &slot) in row.iter_mut().zip(table) {
                if slot != 0 {
                    *cell = slot as i32;
                }
            }
            Ok(())
        })?;
    }
    out.copy_from_slice(py, &cells)
}

/// Slots that an ACTIVE cache has got since somebody looked at its table: at that many entries, after so many alterations.
pub type Seen = (Py<Cache>, usize, u64);

/// Per cache what is seen now (entries, alterations); per pool all slots that are new since, as int32.
pub type Fresh<'py> = (Vec<(usize, u64)>, Vec<Bound<'py, PyByteArray>>);

pub fn fresh<'py>(py: Python<'py>, core: &Core, seen: &[Seen]) -> PyResult<Fresh<'py>> {
    let mut now = Vec::with_capacity(seen.len());
    let mut slots: Vec<Vec<i32>> = vec![Vec::new(); core.num_pools()];
    for (cache, entries, alterations) in seen {
        look(py, cache, |cache| {
            let altered = core.alterations(cache)?;
            let from = if altered == *alterations { *entries } else { 0 };
            for (pool, slots) in slots.iter_mut().enumerate() {
                let table = core.table(cache, pool)?;
                let new = table.iter().skip(from).filter(|&&slot| slot != 0);
                slots.extend(new.map(|&slot| slot as i32));
            }
            now.push((core.table(cache, 0)?.len(), altered));
            Ok(())
        })?;
    }
    let arrays = slots.iter().map(|slots| PyByteArray::new(py, &bytes_of(slots)));
    Ok((now, arrays.collect()))
}

/// Of a pool: all slots of ACTIVE caches, and where each cache's end; those from each one's history on, and their ends.
pub type Used<'py> = (
    Bound<'py, PyByteArray>,
    Vec<usize>,
    Bound<'py, PyByteArray>,
    Vec<usize>,
);

pub fn used<'py>(py: Python<'py>, core: &Core, caches: &[Py<Cache>], pool: usize) -> PyResult<Used<'py>> {
    let (mut read, mut read_ends) = (Vec::new(), Vec::with_capacity(caches.len()));
    let (mut written, mut written_ends) = (Vec::new(), Vec::with_capacity(caches.len()));
    for cache in caches {
        look(py, cache, |cache| {
            let first = (core.info(cache)?.history / core.tokens_per_block()) as usize;
            for (i, &slot) in { core.table(cache, pool)?.iter() }.enumerate() {
                if slot != 0 {
                    read.push(slot as i32);
                    if i >= first {
                        written.push(slot as i32);
                    }
                }
            }
            Ok(())
        })?;
        read_ends.push(read.len());
        written_ends.push(written.len());
    }
    let array = |values: &[i32]| PyByteArray::new(py, &bytes_of(values));
    Ok((array(&read), read_ends, array(&written), written_ends))
}

/// -> (indptr, indices, last_page_len) as int32 in native byte order
pub fn csr<'py>(
    py: Python<'py>,
    core: &Core,
    caches: &[Py<Cache>],
    pool: usize,
    tokens_per_block: u64,
) -> PyResult<Csr<'py>> {
    let (mut indptr, mut indices, mut last) = (vec![0i32], Vec::new(), Vec::new());
    for cache in caches {
        look(py, cache, |cache| {
            indices.extend(core.table(cache, pool)?.iter().map(|&slot| slot as i32));
            indptr.push(indices.len() as i32);
            let capacity = core.info(cache)?.capacity;
            last.push(match capacity {
                0 => 0,
                _ => ((capacity - 1) % tokens_per_block + 1) as i32,
            });
            Ok(())
        })?;
    }
    let array = |values: &[i32]| PyByteArray::new(py, &bytes_of(values));
    Ok((array(&indptr), array(&indices), array(&last)))
}
