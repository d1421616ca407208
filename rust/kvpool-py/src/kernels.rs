//! The CUDA sources, compiled into the extension so that wheel and sdist always carry them.
//!
//! A source stands alone: kernels/ptx.cu and walk.cu, which every family needs, come first.

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;

macro_rules! family {
    ($name:literal) => {
        (
            $name,
            concat!(
                "#line 1 \"ptx.cu\"\n",
                include_str!("../../../kernels/ptx.cu"),
                "#line 1 \"walk.cu\"\n",
                include_str!("../../../kernels/walk.cu"),
                "#line 1 \"",
                $name,
                ".cu\"\n",
                include_str!(concat!("../../../kernels/", $name, ".cu"))
            ),
        )
    };
}

const SOURCES: &[(&str, &str)] = &[
    family!("copy_pages"),
    family!("copy_ring"),
    family!("gather_pages"),
];

/// Names of the kernel families.
#[pyfunction]
pub fn kernel_names() -> Vec<&'static str> {
    SOURCES.iter().map(|(name, _)| *name).collect()
}

/// CUDA C++ source of one family, complete. KeyError: there is none of that name.
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
