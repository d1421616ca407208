// Runs CUDA kernels on the CPU: this header, then ptx.hpp, kernels/walk.cu, the families, and SHIM_KERNEL lines.
//
// The threads of a block are fibers of one OS thread: each runs to its next __syncthreads(), in the order that the
// launch asks for, and no thread passes before all are there. If they wait in different places, or some have ended,
// the process aborts and says so. With one thread per block this is plain serial execution.
// Blocks run one after the other; under ThreadSanitizer each on an OS thread of its own, with nothing that orders them,
// and the fibers are known to it, ordered by their barriers alone.
// Shared memory holds rubbish when a block starts. Arguments follow cuLaunchKernel and are read at launch.
#pragma once

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <tuple>
#include <utility>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SHIM_SHARED static thread_local
#else
#define SHIM_SHARED static __attribute__((section("shim_shared")))
extern "C" char __start_shim_shared[], __stop_shim_shared[];
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// The shim's own books are shared by fibers without an order; ThreadSanitizer must look at the kernels alone.
#define SHIM_BOOKS __attribute__((noinline, no_sanitize("thread", "address", "undefined")))

namespace shim {

constexpr int MAX_THREADS = 1024, MAX_COPIES = 64, MAX_BLOCKS = 64;
constexpr size_t STACK = 64 << 10;

struct index3 {
    unsigned x, y, z;
};

struct Copy {
    void* to;
    const void* from;
    unsigned long group;
};

struct Fiber {
    ucontext_t context;
    char* stack;
    index3 index;
    int line;  // of the __syncthreads() where it waits
    bool ended;
    Copy copies[MAX_COPIES];  // [oldest, newest) modulo MAX_COPIES
    unsigned long oldest, newest, group;
    unsigned long barriers;
    void* fake_stack;
    void* tsan;
};

struct Block {
    ucontext_t scheduler;
    void* fake_stack;
    const void* scheduler_stack;
    size_t scheduler_stack_bytes;
    void* tsan;
    char started, passed[2], ended;  // what orders fibers, for ThreadSanitizer; barriers take turns
    Fiber* fibers;
    index3 index, dim, grid;
    unsigned long order;
    void (*body)(void*);
    void* arguments;
};

inline thread_local Block* block;
inline thread_local Fiber* fiber;

SHIM_BOOKS inline index3 thread_index() { return fiber->index; }
SHIM_BOOKS inline index3 block_index() { return block->index; }
SHIM_BOOKS inline index3 block_dim() { return block->dim; }
SHIM_BOOKS inline index3 grid_dim() { return block->grid; }

[[noreturn]] SHIM_BOOKS inline void fail(const char* what, int a, int b) {
    fprintf(stderr, "shim: block %u: ", block->index.x);
    fprintf(stderr, what, a, b);
    fputc('\n', stderr);
    abort();
}

SHIM_BOOKS inline void to_scheduler([[maybe_unused]] bool last) {
    Fiber* self = fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(
        last ? nullptr : &self->fake_stack, block->scheduler_stack, block->scheduler_stack_bytes
    );
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(block->tsan, 1);
#endif
    swapcontext(&self->context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
}

SHIM_BOOKS inline void barrier(int line) {
    fiber->line = line;
#if defined(__SANITIZE_THREAD__)
    char* passed = &block->passed[fiber->barriers++ % 2];
    __tsan_release(passed);
    to_scheduler(false);
    __tsan_acquire(passed);
#else
    to_scheduler(false);
#endif
}

SHIM_BOOKS inline void remember(void* to, const void* from) {
    if (fiber->newest - fiber->oldest == MAX_COPIES) {
        fail("thread %d has more than %d copies on their way", (int)fiber->index.x, MAX_COPIES);
    }
    fiber->copies[fiber->newest++ % MAX_COPIES] = {to, from, fiber->group};
}

SHIM_BOOKS inline void end_group() { ++fiber->group; }

// The next copy that must land so that only the youngest `pending` groups of this thread are on their way.
SHIM_BOOKS inline bool oldest_copy(int pending, void** to, const void** from) {
    if (fiber->oldest == fiber->newest) return false;
    const Copy& copy = fiber->copies[fiber->oldest % MAX_COPIES];
    if (copy.group >= fiber->group || fiber->group - copy.group <= (unsigned long)pending) return false;
    ++fiber->oldest;
    *to = copy.to;
    *from = copy.from;
    return true;
}

SHIM_BOOKS inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&block->started);
#endif
    block->body(block->arguments);
    if (fiber->oldest != fiber->newest) {
        fail("thread %d ended with %d copies on their way", (int)fiber->index.x, (int)(fiber->newest - fiber->oldest));
    }
    fiber->ended = true;
#if defined(__SANITIZE_THREAD__)
    __tsan_release(&block->ended);
#endif
    to_scheduler(true);
}

SHIM_BOOKS inline void resume(Fiber* next) {
    fiber = next;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block->fake_stack, next->stack, STACK);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(next->tsan, 1);
#endif
    swapcontext(&block->scheduler, &next->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_THREAD__)
// What ThreadSanitizer knows of a thread is made once: that costs more than most launches.
SHIM_BOOKS inline void* tsan_fiber(unsigned thread) {
    static void* known[MAX_BLOCKS][MAX_THREADS];
    void** fiber = &known[block->index.x % MAX_BLOCKS][thread];
    if (!*fiber) *fiber = __tsan_create_fiber(0);
    return *fiber;
}
#endif

SHIM_BOOKS inline void start_fibers(unsigned threads, char* stacks) {
    for (unsigned i = 0; i < threads; ++i) {
        Fiber* f = &block->fibers[i];
        memset(f, 0, sizeof *f);
        f->stack = stacks + i * STACK;
        f->index = {i, 0, 0};
        getcontext(&f->context);
        f->context.uc_stack.ss_sp = f->stack;
        f->context.uc_stack.ss_size = STACK;
        f->context.uc_link = nullptr;
        makecontext(&f->context, fiber_main, 0);
#if defined(__SANITIZE_THREAD__)
        f->tsan = tsan_fiber(i);
#endif
    }
}

// Order of the threads in one round: forwards, backwards, or from a middle that moves.
SHIM_BOOKS inline unsigned nth(unsigned i, unsigned threads, unsigned long round) {
    if (block->order == 0) return i;
    if (block->order == 1) return threads - 1 - i;
    return (unsigned)((i + block->order * (round + 1)) % threads);
}

// From barrier to barrier until all have ended.
SHIM_BOOKS inline void run_block(char* stacks) {
    const unsigned threads = block->dim.x;
    start_fibers(threads, stacks);
    for (unsigned long round = 0;; ++round) {
        for (unsigned i = 0; i < threads; ++i) resume(&block->fibers[nth(i, threads, round)]);
        unsigned ended = 0;
        for (unsigned i = 0; i < threads; ++i) ended += block->fibers[i].ended;
        if (ended == threads) break;
        if (ended) fail("%d threads ended while %d wait at a barrier", (int)ended, (int)(threads - ended));
        for (unsigned i = 1; i < threads; ++i) {
            if (block->fibers[i].line != block->fibers[0].line) {
                fail("threads wait at the barriers of lines %d and %d", block->fibers[0].line, block->fibers[i].line);
            }
        }
    }
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(&block->ended);
#endif
}

// Stacks and books of a block's threads, kept for the next launch: fresh pages cost more than most launches.
SHIM_BOOKS inline char* stacks_of_block() {
    struct Kept {
        char* stacks;
        Fiber* fibers;
        unsigned threads;
    };
    static Kept kept[MAX_BLOCKS];
#if defined(__SANITIZE_THREAD__)
    Kept* mine = &kept[block->index.x % MAX_BLOCKS];
#else
    Kept* mine = &kept[0];  // blocks run one after the other
#endif
    if (mine->threads < block->dim.x) {
        if (mine->threads) munmap(mine->stacks, mine->threads * STACK);
        free(mine->fibers);
        const size_t bytes = block->dim.x * STACK;
        void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        Fiber* fibers = (Fiber*)malloc(block->dim.x * sizeof(Fiber));
        if (stacks == MAP_FAILED || !fibers) fail("no memory for %d stacks of %d bytes", (int)block->dim.x, (int)STACK);
        *mine = {(char*)stacks, fibers, block->dim.x};
    }
    block->fibers = mine->fibers;
    return mine->stacks;
}

SHIM_BOOKS inline void* block_main(void* given) {
    block = (Block*)given;
#if defined(__SANITIZE_THREAD__)
    block->tsan = __tsan_get_current_fiber();
    __tsan_release(&block->started);
#else
    for (char* byte = __start_shim_shared; byte < __stop_shim_shared; ++byte) *byte = (char)0xa5;
#endif
    run_block(stacks_of_block());
    return nullptr;
}

SHIM_BOOKS inline int launch(
    unsigned grid, unsigned threads, unsigned long order, void (*body)(void*), void* arguments
) {
    if (!grid || !threads || threads > MAX_THREADS) return 1;  // CUDA_ERROR_INVALID_VALUE
    static Block blocks[MAX_BLOCKS];
    pthread_t workers[MAX_BLOCKS];
    for (unsigned first = 0; first < grid; first += MAX_BLOCKS) {
        const unsigned count = grid - first < MAX_BLOCKS ? grid - first : MAX_BLOCKS;
        for (unsigned i = 0; i < count; ++i) {
            memset(&blocks[i], 0, sizeof blocks[i]);
            blocks[i].index = {first + i, 0, 0};
            blocks[i].dim = {threads, 1, 1};
            blocks[i].grid = {grid, 1, 1};
            blocks[i].order = order;
            blocks[i].body = body;
            blocks[i].arguments = arguments;
#if defined(__SANITIZE_THREAD__)
            pthread_create(&workers[i], nullptr, block_main, &blocks[i]);
        }
        for (unsigned i = 0; i < count; ++i) pthread_join(workers[i], nullptr);
#else
            block_main(&blocks[i]);
        }
        (void)workers;
#endif
    }
    return 0;
}

// Unpacks cuLaunchKernel's array of pointers to arguments.
template <auto KERNEL, typename Signature>
struct Kernel;

template <auto KERNEL, typename... Arguments>
struct Kernel<KERNEL, void (*)(Arguments...)> {
    using Tuple = std::tuple<Arguments...>;

    static void body(void* arguments) { std::apply(KERNEL, *(Tuple*)arguments); }

    template <size_t... I>
    static int launch(unsigned grid, unsigned threads, unsigned long order, void** given) {
        return launch(grid, threads, order, given, std::index_sequence_for<Arguments...>{});
    }

private:
    template <size_t... I>
    static int launch(unsigned grid, unsigned threads, unsigned long order, void** given, std::index_sequence<I...>) {
        Tuple arguments{*(Arguments*)given[I]...};
        return shim::launch(grid, threads, order, body, &arguments);
    }
};

}  // namespace shim

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ SHIM_SHARED
#define __launch_bounds__(...)
#define __syncthreads() shim::barrier(__LINE__)
#define threadIdx (shim::thread_index())
#define blockIdx (shim::block_index())
#define blockDim (shim::block_dim())
#define gridDim (shim::grid_dim())

// Exports launch_NAME. order: of the threads of a block, 0 forwards, 1 backwards, else turning.
#define SHIM_KERNEL(NAME)                                                                                  \
    extern "C" int launch_##NAME(unsigned grid, unsigned threads, unsigned long order, void** arguments) { \
        return shim::Kernel<&NAME, decltype(&NAME)>::launch(grid, threads, order, arguments);              \
    }
