"""A stand-in for the NVIDIA driver's library: the calls by which kvpool.machine looks for GPUs, compiled from C."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int* version) { *version = VERSION; return VERSION ? 0 : 999; }
int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuDeviceGetCount(int* count) { *count = GPUS; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 70 + ordinal; return ordinal < GPUS ? 0 : 101; }
int cuDeviceGetName(char* name, int size, int device) {
    strncpy(name, device == 70 ? "Test GPU A" : "Test GPU B", size);
    return 0;
}
int cuDeviceTotalMem_v2(size_t* total, int device) { *total = (size_t)(device - 69) << 36; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? device - 70 : -1;
    return 0;
}
"""


def missing() -> str | None:
    return None if shutil.which("gcc") else "gcc is not installed: the stand-in for the driver cannot be built"


def build(folder: Path, *, version: int = 12080, init: int = 0, gpus: int = 2) -> str:
    """Path of a library that answers so. version 0: it does not tell one."""
    source, library = folder / "driver.c", folder / f"driver-{version}-{init}-{gpus}.so"
    source.write_text(SOURCE)
    defines = [f"-DVERSION={version}", f"-DINIT={init}", f"-DGPUS={gpus}"]
    subprocess.run(["gcc", "-shared", "-fPIC", *defines, str(source), "-o", str(library)], check=True, timeout=60)
    return str(library)
