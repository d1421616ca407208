// Which thread copies which bytes: the same walk for every family. Stands in front of every family, after ptx.cu.
//
// The pages of a launch are one line of units (16 bytes, or one), page after page. Each block owns one stretch of it:
//
//     pages      |      0      |      1      |      2      |      3      |
//     blocks     [    0    )[    1    )[    2    )[    3    )[    4   )
//
// within which it goes by rows: one unit per thread. The slots of up to WINDOW pages are read at a time, together, into
// shared memory: the lists may lie in host memory, where every read is a trip over the bus.

constexpr int THREADS = 256;  // most threads of a block; any number from 1 works
constexpr int WINDOW = 256;   // pages whose slots a block holds

struct Window {
    int from[WINDOW];
    int to[WINDOW];
};

// Units [begin, end) of a line of `total`, whole rows but for the last block's.
struct Share {
    long long begin, end;

    __device__ __forceinline__ explicit Share(long long total) {
        const long long rows = (total + blockDim.x - 1) / blockDim.x;
        const long long each = (rows + gridDim.x - 1) / gridDim.x * blockDim.x;
        begin = each * blockIdx.x < total ? each * blockIdx.x : total;
        end = begin + each < total ? begin + each : total;
    }
};

// Page (of the window) and unit in it of one thread; a row further costs no division.
struct Cursor {
    long long per_page, pages_of_row, rest_of_row, page, unit;

    __device__ __forceinline__ Cursor(long long at, long long units_per_page)
        : per_page(units_per_page),
          pages_of_row(blockDim.x / units_per_page),
          rest_of_row(blockDim.x % units_per_page),
          page(at / units_per_page),
          unit(at % units_per_page) {}

    __device__ __forceinline__ void next_row() {
        page += pages_of_row;
        unit += rest_of_row;
        if (unit >= per_page) {
            unit -= per_page;
            ++page;
        }
    }
};

// Slots of pages [first, first + count), by all threads of the block. No list: page i is in slot i.
__device__ __forceinline__ void read_slots(
    Window& window, const int* src_slots, const int* dst_slots, long long first, int count
) {
    __syncthreads();  // nobody still needs the window before
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        window.from[i] = src_slots ? src_slots[first + i] : (int)(first + i);
        window.to[i] = dst_slots ? dst_slots[first + i] : (int)(first + i);
    }
    __syncthreads();  // all of this window is there
}

template <typename Unit>
__device__ __forceinline__ const Unit* unit_of(const void* base, int slot, long long page_bytes, long long unit) {
    return (const Unit*)((const char*)base + (long long)slot * page_bytes) + unit;
}

template <typename Unit>
__device__ __forceinline__ Unit* unit_of(void* base, int slot, long long page_bytes, long long unit) {
    return (Unit*)((char*)base + (long long)slot * page_bytes) + unit;
}

// Through registers: a thread issues IN_FLIGHT loads before it stores the first of them.
template <typename Unit>
__device__ __forceinline__ void copy_through_registers(
    Window& window,
    const void* src,
    void* dst,
    const int* src_slots,
    const int* dst_slots,
    long long page_bytes,
    int num_pages
) {
    constexpr int IN_FLIGHT = 4;
    const long long per_page = page_bytes / (long long)sizeof(Unit);
    const Share share(per_page * num_pages);
    for (long long first = share.begin / per_page; first * per_page < share.end; first += WINDOW) {
        const int count = num_pages - first < WINDOW ? (int)(num_pages - first) : WINDOW;
        read_slots(window, src_slots, dst_slots, first, count);
        const long long start = first * per_page, stop = (first + WINDOW) * per_page;
        const long long end = stop < share.end ? stop : share.end;
        long long at = (start > share.begin ? start : share.begin) + threadIdx.x;
        Cursor cursor(at - start, per_page);
        while (at < end) {
            Unit held[IN_FLIGHT];
            Unit* to[IN_FLIGHT];
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; ++i) {
                if (at + (long long)i * blockDim.x < end) {
                    held[i] = load_once(unit_of<Unit>(src, window.from[cursor.page], page_bytes, cursor.unit));
                    to[i] = unit_of<Unit>(dst, window.to[cursor.page], page_bytes, cursor.unit);
                }
                cursor.next_row();
            }
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; ++i) {
                if (at + (long long)i * blockDim.x < end) store_once(to[i], held[i]);
            }
            at += (long long)IN_FLIGHT * blockDim.x;
        }
    }
}
