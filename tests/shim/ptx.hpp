// Takes the place of kernels/ptx.cu on the CPU: the same names, in C++.
//
// A load or store of 16 bytes is one of its type, so that UBSan sees a pointer that is not aligned. Asynchronous
// copies land as late as the hardware may let them: when their thread waits for them, and not before; until then
// the destination holds rubbish.

struct alignas(16) vec16 {
    unsigned int x, y, z, w;
};

inline vec16 load_once(const vec16* from) { return *from; }
inline void store_once(vec16* to, const vec16& unit) { *to = unit; }
inline unsigned char load_once(const unsigned char* from) { return *from; }
inline void store_once(unsigned char* to, unsigned char unit) { *to = unit; }

// Not inlined: reads of the destination must see what another call wrote.
__attribute__((noinline)) static void land(vec16* to, const vec16* from) { *to = *from; }

inline void start_async(vec16* to_shared, const vec16* from) {
    static const vec16 rubbish = {0xdeadbeefu, 0xdeadbeefu, 0xdeadbeefu, 0xdeadbeefu};
    land(to_shared, &rubbish);
    shim::remember(to_shared, from);
}

inline void end_group_async() { shim::end_group(); }

template <int PENDING>
inline void wait_async() {
    void* to;
    const void* from;
    while (shim::oldest_copy(PENDING, &to, &from)) land((vec16*)to, (const vec16*)from);
}
