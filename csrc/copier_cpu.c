/* Copies between host addresses that go past the caches on the way out.
 *
 * A KV block is written once and read much later, so its cache lines would only push others out; ordinary stores also
 * read every line of the destination first. Streaming stores do neither. They are ordered by the fence at the end.
 * memcpy is no substitute even for a warm source: on AMD Zen 4 glibc chooses `rep movsb` for these sizes, which takes
 * four times as long when source and destination have unlucky addresses modulo a page. */

#include "pd.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef void (*stream_fn)(unsigned char *dst, const unsigned char *src, size_t bytes);

enum { WIDEST_BYTES = 64, STREAM_FROM = 512 };

/* Each body copies whole steps; `dst` is aligned to WIDEST_BYTES, what is left over is less than 256 bytes. */

#if defined(__x86_64__)

__attribute__((target("avx512f"))) static void stream_avx512(unsigned char *dst, const unsigned char *src, size_t bytes)
{
    for (; bytes >= 256; bytes -= 256, src += 256, dst += 256) {
        __m512i a = _mm512_loadu_si512(src), b = _mm512_loadu_si512(src + 64);
        __m512i c = _mm512_loadu_si512(src + 128), d = _mm512_loadu_si512(src + 192);
        _mm512_stream_si512((void *)dst, a);
        _mm512_stream_si512((void *)(dst + 64), b);
        _mm512_stream_si512((void *)(dst + 128), c);
        _mm512_stream_si512((void *)(dst + 192), d);
    }
    _mm_sfence();
}

__attribute__((target("avx2"))) static void stream_avx2(unsigned char *dst, const unsigned char *src, size_t bytes)
{
    for (; bytes >= 256; bytes -= 256, src += 256, dst += 256)
        for (int i = 0; i < 256; i += 64) {
            __m256i a = _mm256_loadu_si256((const void *)(src + i)), b = _mm256_loadu_si256((const void *)(src + i + 32));
            _mm256_stream_si256((void *)(dst + i), a);
            _mm256_stream_si256((void *)(dst + i + 32), b);
        }
    _mm_sfence();
}

#elif defined(__aarch64__)

static void stream_neon(unsigned char *dst, const unsigned char *src, size_t bytes)
{
    for (; bytes >= 256; bytes -= 256, src += 256, dst += 256)
        for (int i = 0; i < 256; i += 64)
            __asm__ volatile("ldp q0, q1, [%0]\n\tldp q2, q3, [%0, #32]\n\t"
                             "stnp q0, q1, [%1]\n\tstnp q2, q3, [%1, #32]" ::"r"(src + i), "r"(dst + i)
                             : "v0", "v1", "v2", "v3", "memory");
    __asm__ volatile("dmb ishst" ::: "memory");
}

#endif

static void stream_plain(unsigned char *dst, const unsigned char *src, size_t bytes)
{
    memcpy(dst, src, bytes / 256 * 256);
}

static const struct {
    const char *name;
    stream_fn copy;
} copiers[] = {
#if defined(__x86_64__)
    {"avx512", stream_avx512},
    {"avx2", stream_avx2},
#elif defined(__aarch64__)
    {"neon", stream_neon},
#endif
    {"plain", stream_plain},
};

enum { NUM_COPIERS = sizeof copiers / sizeof copiers[0] };

static int runs_here(int index)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (copiers[index].copy == stream_avx512)
        return __builtin_cpu_supports("avx512f");
    if (copiers[index].copy == stream_avx2)
        return __builtin_cpu_supports("avx2");
#endif
    return index < NUM_COPIERS;
}

const char *pd_copier_name(int index)
{
    return index >= 0 && index < NUM_COPIERS && runs_here(index) ? copiers[index].name : NULL;
}

int pd_copier_count(void)
{
    return NUM_COPIERS;
}

static int best(void)
{
    static int chosen = -1; /* every thread finds the same one */
    int found = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
    if (found < 0) {
        for (found = 0; !runs_here(found); found++)
            ;
        __atomic_store_n(&chosen, found, __ATOMIC_RELAXED);
    }
    return found;
}

void pd_copy_with(int index, void *dst, const void *src, size_t bytes)
{
    unsigned char *to = dst;
    const unsigned char *from = src;
    if (bytes >= STREAM_FROM) {
        size_t head = -(uintptr_t)to & (WIDEST_BYTES - 1);
        memcpy(to, from, head);
        to += head, from += head, bytes -= head;
        copiers[index].copy(to, from, bytes);
        size_t done = bytes / 256 * 256;
        to += done, from += done, bytes -= done;
    }
    memcpy(to, from, bytes);
}

void pd_copy(void *dst, const void *src, size_t bytes)
{
    pd_copy_with(best(), dst, src, bytes);
}
