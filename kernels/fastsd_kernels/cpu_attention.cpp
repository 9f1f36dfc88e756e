// Attention of bfloat16 on x86 CPUs with AVX512-BF16: softmax(scale Q K^T) V, non-causal, float32 accumulation.
//
// Flash attention (Dao et al. 2022) with a whole head's keys and values packed once per thread, so that both products
// are VDPBF16PS with one operand in registers and the other a broadcast of two numbers from memory:
//   keys    [keys / 16][D / 2][16][2]: a register holds one pair of columns of 16 keys
//   values  [keys / 2][D / 16][16][2]: a register holds 16 columns of one pair of keys
// Strides are in numbers; the last one is 1. Output [batch, queries, heads, D], dense.

#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

namespace {

using bf16 = uint16_t;

constexpr int ROWS = 24;    // queries at a time: a multiple of every group of rows below
constexpr int KEYS = 256;   // keys at a time: their scores stay in the first cache
constexpr int QROWS = 6;    // x 4 registers of scores
constexpr int LANES = 16;

struct Buffers {
    bf16 *keys, *values, *queries, *weights;
    float *scores, *sums, *output;
};

struct Shape {
    int64_t heads, queries, keys, dim;
    const int64_t *q, *k, *v;  // strides of batch, head and row
    float scale;
};

inline int64_t pad(int64_t keys) { return (keys + 63) / 64 * 64; }
inline __m512bh pairs(const void *p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh broadcast(const bf16 *p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

// 2^x for x <= 0, relative error 4e-6: far below a rounding to bfloat16. NaN stays NaN.
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.f), x);
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(0.0096176f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.0555033f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.2402264f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6931472f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

void pack(const Shape &s, const bf16 *k, const bf16 *v, int64_t width, const Buffers &b) {
    const int64_t padded = pad(s.keys), half = s.dim / 2;
    std::memset(b.keys + s.keys / LANES * half * 32, 0, (padded - s.keys / LANES * LANES) * s.dim * 2);
    for (int64_t key = 0; key < s.keys; key++) {
        const bf16 *from = k + key * s.k[2];
        bf16 *to = b.keys + key / LANES * half * 32 + key % LANES * 2;
        for (int64_t pair = 0; pair < half; pair++) std::memcpy(to + pair * 32, from + pair * 2, 4);
    }
    std::memset(b.values, 0, padded * width * LANES * 2);
    for (int64_t key = 0; key < s.keys; key += 2) {
        const bf16 *one = v + key * s.v[2];
        uint32_t *to = reinterpret_cast<uint32_t *>(b.values + key * width * LANES);
        if (key + 1 < s.keys)
            for (int64_t d = 0; d < s.dim; d++) to[d] = one[d] | (uint32_t)one[s.v[2] + d] << 16;
        else
            for (int64_t d = 0; d < s.dim; d++) to[d] = one[d];
    }
}

// Scores of QROWS queries and 64 keys.
inline void score(const bf16 *queries, const bf16 *keys, float *scores, int64_t half) {
    __m512 sum[QROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < QROWS; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[r][j] = _mm512_setzero_ps();
    for (int64_t d = 0; d < half; d++) {
        __m512bh key[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) key[j] = pairs(keys + (j * half + d) * 32);
#pragma GCC unroll 6
        for (int r = 0; r < QROWS; r++) {
            __m512bh query = broadcast(queries + (r * half + d) * 2);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], key[j], query);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < QROWS; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_store_ps(scores + r * KEYS + j * LANES, sum[r][j]);
}

// Add weights x values of some keys to R rows of the output.
template <int WIDTH, int R>
inline void weigh(const bf16 *weights, const bf16 *values, float *output, int64_t keys) {
    __m512 sum[R][WIDTH];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 10
        for (int j = 0; j < WIDTH; j++) sum[r][j] = _mm512_load_ps(output + (r * WIDTH + j) * LANES);
    for (int64_t pair = 0; pair < keys / 2; pair++) {
        __m512bh value[WIDTH];
#pragma GCC unroll 10
        for (int j = 0; j < WIDTH; j++) value[j] = pairs(values + (pair * WIDTH + j) * 32);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            __m512bh weight = broadcast(weights + r * KEYS + pair * 2);
#pragma GCC unroll 10
            for (int j = 0; j < WIDTH; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], value[j], weight);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 10
        for (int j = 0; j < WIDTH; j++) _mm512_store_ps(output + (r * WIDTH + j) * LANES, sum[r][j]);
}

template <int WIDTH, int R>
void rows(const Shape &s, const bf16 *q, int64_t first, int64_t count, const Buffers &b, bf16 *out) {
    const int64_t half = s.dim / 2, padded = pad(s.keys);
    const float factor = s.scale * 1.44269504088896341f;
    std::memset(b.queries, 0, ROWS * half * 4);
    for (int64_t r = 0; r < count; r++) std::memcpy(b.queries + r * half * 2, q + (first + r) * s.q[2], s.dim * 2);
    std::memset(b.output, 0, sizeof(float) * ROWS * WIDTH * LANES);
    float most[ROWS];
    for (int r = 0; r < ROWS; r++) most[r] = -std::numeric_limits<float>::infinity(), b.sums[r] = 0;
    for (int64_t start = 0; start < padded; start += KEYS) {
        const int64_t keys = padded - start < KEYS ? padded - start : KEYS;
        for (int r = 0; r < ROWS; r += QROWS)
            for (int64_t j = 0; j < keys; j += 64)
                score(b.queries + r * half * 2, b.keys + (start + j) * half * 2, b.scores + r * KEYS + j, half);
        const int64_t there = s.keys - start < keys ? s.keys - start : keys;
        for (int r = 0; r < ROWS; r++) {
            float *row = b.scores + r * KEYS;
            for (int64_t j = there; j < keys; j++) row[j] = -std::numeric_limits<float>::infinity();
            __m512 high = _mm512_set1_ps(most[r]);
            for (int64_t j = 0; j < keys; j += LANES) high = _mm512_max_ps(high, _mm512_load_ps(row + j));
            const float now = _mm512_reduce_max_ps(high);
            const __m512 shift = _mm512_set1_ps(-now * factor), times = _mm512_set1_ps(factor);
            __m512 total = _mm512_setzero_ps();
            for (int64_t j = 0; j < keys; j += LANES) {
                __m512 weight = exp2(_mm512_fmadd_ps(_mm512_load_ps(row + j), times, shift));
                total = _mm512_add_ps(total, weight);
                _mm256_store_si256((__m256i *)(b.weights + r * KEYS + j), (__m256i)_mm512_cvtneps_pbh(weight));
            }
            const float old = std::exp2((most[r] - now) * factor);  // 0 in the first block
            b.sums[r] = b.sums[r] * old + _mm512_reduce_add_ps(total);
            if (old != 1)
                for (int j = 0; j < WIDTH; j++) {
                    float *at = b.output + (r * WIDTH + j) * LANES;
                    _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(old)));
                }
            most[r] = now;
        }
        for (int r = 0; r < ROWS; r += R)
            weigh<WIDTH, R>(b.weights + r * KEYS, b.values + start * WIDTH * LANES, b.output + r * WIDTH * LANES, keys);
    }
    for (int64_t r = 0; r < count; r++) {
        const __m512 inverse = _mm512_set1_ps(1 / b.sums[r]);
        for (int j = 0; j < WIDTH; j++) {
            __m256i low = (__m256i)_mm512_cvtneps_pbh(
                _mm512_mul_ps(_mm512_load_ps(b.output + (r * WIDTH + j) * LANES), inverse));
            const int64_t left = s.dim - j * LANES;
            const __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
            _mm256_mask_storeu_epi16(out + (first + r) * s.heads * s.dim + j * LANES, mask, low);
        }
    }
}

using Rows = void (*)(const Shape &, const bf16 *, int64_t, int64_t, const Buffers &, bf16 *);
// By registers of a row of the output; rows x registers stay under the 32 that there are.
const Rows KERNELS[] = {nullptr, rows<1, 12>, rows<2, 12>, rows<3, 8>, rows<4, 6>, rows<5, 4>,
                        rows<6, 4>, rows<7, 3>, rows<8, 3>, rows<9, 2>, rows<10, 2>};

}  // namespace

extern "C" int attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t batch, int64_t heads,
                                int64_t queries, int64_t keys, int64_t dim, const int64_t *qs, const int64_t *ks,
                                const int64_t *vs, float scale) {
    const Shape s{heads, queries, keys, dim, qs, ks, vs, scale};
    const int64_t width = (dim + LANES - 1) / LANES, half = dim / 2, padded = pad(keys);
    const int64_t blocks = (queries + ROWS - 1) / ROWS;
    const int64_t total = batch * heads * blocks;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        const int64_t sizes[] = {padded * half * 4, padded * width * LANES * 2, ROWS * half * 4, ROWS * KEYS * 2,
                                 ROWS * KEYS * 4,   ROWS * 4,                   ROWS * width * LANES * 4};
        int64_t bytes = 0;
        for (int64_t size : sizes) bytes += (size + 63) / 64 * 64;
        char *memory = static_cast<char *>(operator new(bytes, std::align_val_t(64), std::nothrow));
        failed = memory == nullptr;
        void *at[7] = {};
        char *next = memory;
        for (int i = 0; i < 7 && memory != nullptr; i++) at[i] = next, next += (sizes[i] + 63) / 64 * 64;
        const Buffers b{(bf16 *)at[0],  (bf16 *)at[1],  (bf16 *)at[2], (bf16 *)at[3],
                        (float *)at[4], (float *)at[5], (float *)at[6]};
        int64_t packed = -1;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < total; task++) {
            if (memory == nullptr) continue;  // all threads meet at the loop's end, or those that got here wait forever
            const int64_t head = task / blocks, block = task % blocks, first = block * ROWS;
            const int64_t one = head / heads, other = head % heads;
            if (head != packed)
                pack(s, k + one * ks[0] + other * ks[1], v + one * vs[0] + other * vs[1], width, b);
            packed = head;
            const int64_t count = queries - first < ROWS ? queries - first : ROWS;
            KERNELS[width](s, q + one * qs[0] + other * qs[1], first, count, b,
                           out + (one * queries * heads + other) * dim);
        }
        operator delete(memory, std::align_val_t(64));
    }
    return failed;
}
