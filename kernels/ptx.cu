// The inline PTX, all of it: the rest of kernels/ is plain CUDA C++. Stands in front of every family, with walk.cu.
// To run the kernels on the CPU tests/shim/ptx.hpp takes the place of this file, and only of this one.

struct alignas(16) vec16 {
    unsigned int x, y, z, w;
};

// A page passes once: it should not push out of the first-level cache what the model's kernels keep there.
__device__ __forceinline__ vec16 load_once(const vec16* from) {
    vec16 unit;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(unit.x), "=r"(unit.y), "=r"(unit.z), "=r"(unit.w)
                 : "l"(from)
                 : "memory");
    return unit;
}

__device__ __forceinline__ void store_once(vec16* to, const vec16& unit) {
    asm volatile("st.global.cg.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(unit.x), "r"(unit.y), "r"(unit.z), "r"(unit.w)
                 : "memory");
}

// Bytes go the plain way: neighbours of a warp share a sector, so the cache helps.
__device__ __forceinline__ unsigned char load_once(const unsigned char* from) { return *from; }

__device__ __forceinline__ void store_once(unsigned char* to, unsigned char unit) { *to = unit; }

// sm_80 and later: starts 16 bytes on their way to shared memory, past the registers.
__device__ __forceinline__ void start_async(vec16* to_shared, const vec16* from) {
    asm volatile(
        "{ .reg .u64 shared; cvta.to.shared.u64 shared, %0; cp.async.cg.shared.global [shared], [%1], 16; }"
        :
        : "l"(to_shared), "l"(from)
        : "memory"
    );
}

// Ends a group: what this thread started since the last one. A group may be empty.
__device__ __forceinline__ void end_group_async() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// All groups of this thread but the youngest `PENDING` have landed, and are visible to this thread.
template <int PENDING>
__device__ __forceinline__ void wait_async() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}
