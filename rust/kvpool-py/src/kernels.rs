//! The CUDA sources, compiled into the extension so that wheel and sdist always carry them.

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;

const SOURCES: &[(&str, &str)] = &[("copy_pages", include_str!("../../../kernels/copy_pages.cu"))];

/// Names of the kernel files.
#[pyfunction]
pub fn kernel_names() -> Vec<&'static str> {
    SOURCES.iter().map(|(name, _)| *name).collect()
}

/// CUDA C++ source of one kernel file. KeyError: there is none of that name.
#[pyfunction]
pub fn kernel_source(name: &str) -> PyResult<&'static str> {
    SOURCES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, source)| *source)
        .ok_or_else(|| {
            PyKeyError::new_err(format!("no kernel file {name:?}; there are {:?}", kernel_names()))
        })
}
