// Scattered pages of a pool into one run of staging memory, and back: the copy engine then moves the run as one.
// Page i of the run lies at i * page_bytes.

extern "C" __global__ void __launch_bounds__(THREADS) gather_pages_u128(
    const void* pool, void* staging, const int* slots, long long page_bytes, int num_pages
) {
    __shared__ Window window;
    copy_through_registers<vec16>(window, pool, staging, slots, nullptr, page_bytes, num_pages);
}

extern "C" __global__ void __launch_bounds__(THREADS) gather_pages_u8(
    const void* pool, void* staging, const int* slots, long long page_bytes, int num_pages
) {
    __shared__ Window window;
    copy_through_registers<unsigned char>(window, pool, staging, slots, nullptr, page_bytes, num_pages);
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter_pages_u128(
    const void* staging, void* pool, const int* slots, long long page_bytes, int num_pages
) {
    __shared__ Window window;
    copy_through_registers<vec16>(window, staging, pool, nullptr, slots, page_bytes, num_pages);
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter_pages_u8(
    const void* staging, void* pool, const int* slots, long long page_bytes, int num_pages
) {
    __shared__ Window window;
    copy_through_registers<unsigned char>(window, staging, pool, nullptr, slots, page_bytes, num_pages);
}
