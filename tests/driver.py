"""A stand-in for the NVIDIA driver's library, compiled from C: the calls by which kvpool.machine looks for GPUs, and
the batched copy, which copies at once and leaves what it was called with in `batch_seen`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#include <stdint.h>
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
/* As cuda.h of CUDA 12.8 declares them. */
typedef struct { int type, id; } Location;
typedef struct { int srcAccessOrder; Location srcLocHint, dstLocHint; unsigned flags; } Attributes;
struct { uint64_t calls, count, number, first, stream; int order; unsigned flags; } batch_seen;
int cuMemcpyBatchAsync(uint64_t* dsts, uint64_t* srcs, size_t* sizes, size_t count, Attributes* attrs,
                       size_t* attrsIdxs, size_t numAttrs, size_t* failIdx, void* stream) {
    batch_seen.calls++;
    batch_seen.count = count, batch_seen.number = numAttrs, batch_seen.first = attrsIdxs[0];
    batch_seen.stream = (uint64_t)stream;
    batch_seen.order = attrs[0].srcAccessOrder, batch_seen.flags = attrs[0].flags;
    for (size_t i = 0; i < count; i++) {
        if (!sizes[i]) { *failIdx = i; return 1; }
        memcpy((void*)dsts[i], (void*)srcs[i], sizes[i]);
    }
    return 0;
}
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
    *function = 0;
    if (!strcmp(name, "cuGetProcAddress")) *function = cuGetProcAddress_v2;
    if (!strcmp(name, "cuMemcpyBatchAsync") && version >= 12080 && VERSION >= 12080) {
        /* The form that CUDA 13 has, without failIdx, is none that anybody may call as the older one. */
        *function = version < 13000 ? (void*)cuMemcpyBatchAsync : (void*)abort;
    }
    if (status) *status = *function ? 0 : 1;
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
