// Copies whole pages between slots of one pool. Header-free; slots are 32-bit, addresses 64-bit.
//
// copy_pages_u128: page_bytes and both bases are multiples of 16. copy_pages_u8: any size.
// Grid: x strides over the bytes of one page, y over the pages; both are capped by the caller.

struct alignas(16) vec16 {
    unsigned int x, y, z, w;
};

template <typename Unit>
__device__ __forceinline__ void copy_pages(
    const Unit* __restrict__ src,
    Unit* __restrict__ dst,
    const int* __restrict__ src_slots,
    const int* __restrict__ dst_slots,
    long long units_per_page,
    int num_pages
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (int page = blockIdx.y; page < num_pages; page += gridDim.y) {
        const Unit* from = src + (long long)src_slots[page] * units_per_page;
        Unit* to = dst + (long long)dst_slots[page] * units_per_page;
        for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < units_per_page; i += step) {
            to[i] = from[i];
        }
    }
}

extern "C" __global__ void copy_pages_u128(
    const vec16* src, vec16* dst, const int* src_slots, const int* dst_slots, long long page_bytes, int num_pages
) {
    copy_pages<vec16>(src, dst, src_slots, dst_slots, page_bytes / 16, num_pages);
}

extern "C" __global__ void copy_pages_u8(
    const unsigned char* src,
    unsigned char* dst,
    const int* src_slots,
    const int* dst_slots,
    long long page_bytes,
    int num_pages
) {
    copy_pages<unsigned char>(src, dst, src_slots, dst_slots, page_bytes, num_pages);
}
