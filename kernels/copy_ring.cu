// Whole pages from slots to slots through a ring in shared memory (cp.async, sm_80 and later): a thread has up to
// STAGES - 1 loads on their way and spends no registers on them, so few blocks keep a long bus busy.
//
// A thread reads back only what it started itself: the data needs no barrier, only the slots do.
//
//     units of one thread     [ stored ) [ landed, or on their way, in the ring ) [ not started )
//                                       ^ stage                                   ^ stage + STAGES - 1

constexpr int STAGES = 8;  // a power of two; STAGES * THREADS * 16 bytes of shared memory, 32 KiB

extern "C" __global__ void __launch_bounds__(THREADS) copy_ring_u128(
    const void* src, void* dst, const int* src_slots, const int* dst_slots, long long page_bytes, int num_pages
) {
    __shared__ Window window;
    __shared__ vec16 ring[STAGES][THREADS];
    const long long per_page = page_bytes / (long long)sizeof(vec16);
    const Share share(per_page * num_pages);
    for (long long first = share.begin / per_page; first * per_page < share.end; first += WINDOW) {
        const int count = num_pages - first < WINDOW ? (int)(num_pages - first) : WINDOW;
        read_slots(window, src_slots, dst_slots, first, count);
        const long long start = first * per_page, stop = (first + WINDOW) * per_page;
        const long long end = stop < share.end ? stop : share.end;
        long long storing = (start > share.begin ? start : share.begin) + threadIdx.x, starting = storing;
        Cursor from(starting - start, per_page), to(storing - start, per_page);
        const auto start_one = [&](int stage) {
            if (starting < end) {
                start_async(
                    &ring[stage][threadIdx.x],
                    unit_of<vec16>(src, window.from[from.page], page_bytes, from.unit)
                );
            }
            end_group_async();  // empty past the end, so that one unit stays one group
            from.next_row();
            starting += blockDim.x;
        };
        for (int stage = 0; stage < STAGES - 1; ++stage) start_one(stage);
        for (int stage = 0; storing < end; stage = (stage + 1) % STAGES) {
            // Into the stage that was stored in the round before: that store needed the loaded value, so it is read.
            start_one((stage + STAGES - 1) % STAGES);
            wait_async<STAGES - 1>();
            store_once(
                unit_of<vec16>(dst, window.to[to.page], page_bytes, to.unit), ring[stage][threadIdx.x]
            );
            to.next_row();
            storing += blockDim.x;
        }
    }
}
