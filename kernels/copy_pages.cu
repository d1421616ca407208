// Whole pages from slots to slots, through registers: 16 bytes per load, or byte by byte for what is not aligned.
// Works on mapped pinned host memory on either side.

extern "C" __global__ void __launch_bounds__(THREADS) copy_pages_u128(
    const void* src, void* dst, const int* src_slots, const int* dst_slots, long long page_bytes, int num_pages
) {
    __shared__ Window window;
    copy_through_registers<vec16>(window, src, dst, src_slots, dst_slots, page_bytes, num_pages);
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_pages_u8(
    const void* src, void* dst, const int* src_slots, const int* dst_slots, long long page_bytes, int num_pages
) {
    __shared__ Window window;
    copy_through_registers<unsigned char>(window, src, dst, src_slots, dst_slots, page_bytes, num_pages);
}
