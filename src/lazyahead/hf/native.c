// Inner loops in bfloat16 for processors with AVX-512 bf16. A row's bits depend on that row alone:
// each has one order of summation, that of oneDNN's products where both compute the same.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t num;

#define INLINE static inline __attribute__((always_inline))
// For loops over independent rows.
#define ROWS _Pragma("omp parallel for num_threads(threads) if (threads > 1 && count >= 64)")

enum {
    LANES = 16,
    BLOCK = 512,  // slots per block of keys, as in cache/blocks.py
    EXTRA = 2,    // columns behind each key, -1 and 0
    MOST_QUERIES = 16,  // that are computed together
    MOST_ROWS = 16,     // of a linear layer
    SHARED = 1 << 21,   // weights from which on threads share a layer: waking them takes time
    HIDDEN = 0xff80,    // -inf
    MOST_WIDTH = 256,
};

// --- numbers ------------------------------------------------------------------------------------

INLINE __m512 widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INLINE __m512 load(const bf16 *at) { return widened(_mm256_loadu_si256((const __m256i *)at)); }
INLINE __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE void store(bf16 *at, __m512 x) { _mm256_storeu_si256((__m256i *)at, rounded(x)); }
INLINE bf16 to_bf16(float x) {
    return (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0);
}

// e^x as a power of two times a polynomial, to 3e-6; 0 far below.
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.f), x);  // of a NaN: the NaN
    x = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(x, n);
    __m512 power = _mm512_set1_ps(0.00958285294f);
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(0.0559064262f));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(0.240240991f));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(0.693124175f));
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(power, n);
}

// --- rows of a layer ----------------------------------------------------------------------------

// Rows scaled to a mean square of 1, rounded if `rounds`, times weight + `offset`.
void rms_norm(const bf16 *in, const bf16 *weight, bf16 *out, num count, num width, float epsilon,
              float offset, int rounds, int threads) {
    ROWS for (num row = 0; row < count; row++) {
        const bf16 *x = in + row * width;
        __m512 squares = _mm512_setzero_ps();
        for (num i = 0; i < width; i += LANES)
            squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
        float mean = _mm512_reduce_add_ps(squares) / width;
        __m512 scale = _mm512_set1_ps(1.f / __builtin_sqrtf(mean + epsilon));
        for (num i = 0; i < width; i += LANES) {
            __m512 scaled = _mm512_mul_ps(load(x + i), scale);
            if (rounds) scaled = widened(rounded(scaled));
            __m512 by = _mm512_add_ps(load(weight + i), _mm512_set1_ps(offset));
            store(out + row * width + i, _mm512_mul_ps(scaled, by));
        }
    }
}

// silu(gate) * up; rows of `gate` and `up` lie `stride` apart.
void silu_mul(const bf16 *gate, const bf16 *up, bf16 *out, num count, num width, num stride,
              int threads) {
    const __m512 one = _mm512_set1_ps(1.f), zero = _mm512_setzero_ps();
    ROWS for (num row = 0; row < count; row++) {
        const bf16 *x = gate + row * stride, *by = up + row * stride;
        for (num i = 0; i < width; i += LANES) {
            __m512 given = load(x + i);
            __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(zero, given)));
            __m512 silu = widened(rounded(_mm512_div_ps(given, below)));
            store(out + row * width + i, _mm512_mul_ps(silu, load(by + i)));
        }
    }
}

// --- linear layers over few rows ----------------------------------------------------------------

// 16 bytes of each of 16 rows, `stride` bytes apart: four vectors of four bytes of each.
INLINE void transposed(const void *in, num stride, __m512i *out) {
    __m512i rows[4];
    for (int i = 0; i < 4; i++) {
        const char *at = (const char *)in + i * stride;
        __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)at));
        x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(at + 4 * stride)), 1);
        x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(at + 8 * stride)), 2);
        rows[i] = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(at + 12 * stride)), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]);
    __m512i b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]);
    __m512i d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
}

// The four bytes at `at`, in all lanes.
INLINE __m512i spread(const void *at) {
    int32_t bytes;
    memcpy(&bytes, at, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// Adds the products of pairs in `a` with the pair at `b`.
INLINE __m512 add_pairs(__m512 sum, __m512i a, const bf16 *b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)spread(b));
}

// Brings 16 lines of memory close, in their order: what the processor does not foresee where 16 rows
// are read side by side.
INLINE void fetch(const void *at) {
    for (int i = 0; i < 16; i++) _mm_prefetch((const char *)at + 64 * i, _MM_HINT_T1);
}

// The products of `count` rows with 16 rows of weights, summed in parts of `part` columns.
INLINE void linear_16(const bf16 *in, const bf16 *weight, const bf16 *bias, bf16 *out, num count,
                      num width, num stride, num part) {
    __m512 totals[MOST_ROWS];
    for (num begin = 0; begin < width; begin += part) {
        const num end = begin + part < width ? begin + part : width;
        __m512 sums[MOST_ROWS];
        for (num r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
        for (num k = begin; k < end; k += 8) {
            if (k % 32 == 0) fetch(weight + 2 * 16 * width + k * 16);
            __m512i parts[4];
            transposed(weight + k, width * sizeof(bf16), parts);
            for (num r = 0; r < count; r++)
                for (int p = 0; p < 4; p++)
                    sums[r] = add_pairs(sums[r], parts[p], in + r * width + k + 2 * p);
        }
        for (num r = 0; r < count; r++)
            totals[r] = begin ? _mm512_add_ps(totals[r], sums[r]) : sums[r];
    }
    for (num r = 0; r < count; r++)
        store(out + r * stride, bias ? _mm512_add_ps(totals[r], load(bias)) : totals[r]);
}

// Rows (count, width) through a linear layer, weight (size, width); rows of `out` lie `stride`
// apart.
void linear_rows(const bf16 *in, const bf16 *weight, const bf16 *bias, bf16 *out, num count,
                 num width, num size, num stride, num part, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && size * width >= SHARED)
    for (num n = 0; n < size; n += 16) switch (count) {
#define LINEAR(c) case c: linear_16(in, weight + n * width, bias ? bias + n : 0, out + n, c, \
                                    width, stride, part); break;
        LINEAR(1) LINEAR(2) LINEAR(3) LINEAR(4) LINEAR(5) LINEAR(6) LINEAR(7) LINEAR(8)
        LINEAR(9) LINEAR(10) LINEAR(11) LINEAR(12) LINEAR(13) LINEAR(14) LINEAR(15) LINEAR(16)
    }
}

// --- 8-bit linear layers ------------------------------------------------------------------------

INLINE __mmask16 left(num count) { return count < LANES ? (1 << count) - 1 : 0xffff; }
INLINE __m512 load_some(__mmask16 some, const bf16 *at) {
    return widened(_mm256_maskz_loadu_epi16(some, at));
}

// A row as codes of -127 to 127. Returns its scale, its largest number over 127: no number where one
// of them is none.
INLINE float quantize(const bf16 *in, int8_t *codes, num width) {
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    __m512i tops = _mm512_setzero_si512();  // as bits, which are in the order of the numbers
    for (num i = 0; i < width; i += LANES) {
        __m512i bits = _mm512_castps_si512(load_some(left(width - i), in + i));
        tops = _mm512_max_epi32(tops, _mm512_and_si512(bits, sign));
    }
    const int32_t bits = _mm512_reduce_max_epi32(tops);
    float top;
    memcpy(&top, &bits, sizeof top);
    const __m512 inverse = _mm512_set1_ps(top == 0 ? 0 : 127.f / top);
    for (num i = 0; i < width; i += LANES) {
        const __mmask16 some = left(width - i);
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(load_some(some, in + i), inverse));
        _mm_mask_storeu_epi8(codes + i, some, _mm512_cvtepi32_epi8(code));
    }
    return top / 127.f;
}

// A sum of products of codes, as a number.
INLINE __m512 scaled(__m512i sums, __m512 weight_scales, float scale) {
    __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), weight_scales);
    return _mm512_mul_ps(x, _mm512_set1_ps(scale));
}

void quantize_rows(const bf16 *in, int8_t *codes, float *scales, num count, num width, num stride,
                   int threads) {
    ROWS for (num row = 0; row < count; row++)
        scales[row] = quantize(in + row * stride, codes + row * width, width);
}

// Sums (count, width) as numbers, plus a bias where there is one.
void scale_rows(const int32_t *in, const float *scales, const float *weight_scales,
                const float *bias, bf16 *out, num count, num width, int threads) {
    ROWS for (num row = 0; row < count; row++) {
        for (num i = 0; i < width; i += LANES) {
            const __mmask16 some = left(width - i);
            const num at = row * width + i;
            __m512 by = _mm512_maskz_loadu_ps(some, weight_scales + i);
            __m512 x = scaled(_mm512_maskz_loadu_epi32(some, in + at), by, scales[row]);
            if (bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(some, bias + i));
            _mm256_mask_storeu_epi16(out + at, some, rounded(x));
        }
    }
}

// The products of `count` rows of codes, 128 added to each, with 16 rows of weights.
INLINE void int8_linear_16(const uint8_t *codes, const float *scales, const int8_t *weight,
                           const float *weight_scales, const int32_t *offsets, const float *bias,
                           bf16 *out, num count, num width, num stride) {
    __m512i sums[MOST_ROWS];
    for (num r = 0; r < count; r++) sums[r] = _mm512_loadu_si512(offsets);
    for (num k = 0; k < width; k += 16) {
        if (k % 64 == 0) fetch(weight + 2 * 16 * width + k * 16);
        __m512i parts[4];
        transposed(weight + k, width, parts);
        for (num r = 0; r < count; r++)
            for (int p = 0; p < 4; p++) {
                const __m512i row = spread(codes + r * width + k + 4 * p);
                sums[r] = _mm512_dpbusd_epi32(sums[r], row, parts[p]);
            }
    }
    for (num r = 0; r < count; r++) {
        __m512 x = scaled(sums[r], _mm512_loadu_ps(weight_scales), scales[r]);
        store(out + r * stride, bias ? _mm512_add_ps(x, _mm512_loadu_ps(bias)) : x);
    }
}

// Rows (count, width) through a linear layer of 8-bit weights (size, width). `offsets`: of each row
// of weights -128 times its sum.
void int8_linear_rows(const bf16 *in, const int8_t *weight, const float *weight_scales,
                      const int32_t *offsets, const float *bias, bf16 *out, num count, num width,
                      num size, int threads) {
    uint8_t codes[count * width];
    float scales[MOST_ROWS];
    for (num row = 0; row < count; row++) {
        scales[row] = quantize(in + row * width, (int8_t *)codes + row * width, width);
        for (num i = 0; i < width; i++) codes[row * width + i] += 128;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && size * width >= SHARED)
    for (num n = 0; n < size; n += 16) switch (count) {
#define INT8(c) case c: int8_linear_16(codes, scales, weight + n * width, weight_scales + n, \
                                       offsets + n, bias ? bias + n : 0, out + n, c, width, size); \
                        break;
        INT8(1) INT8(2) INT8(3) INT8(4) INT8(5) INT8(6) INT8(7) INT8(8)
        INT8(9) INT8(10) INT8(11) INT8(12) INT8(13) INT8(14) INT8(15) INT8(16)
    }
}

// --- attention ----------------------------------------------------------------------------------

INLINE float weigh(bf16 *scores, num width) {
    __m512 total = _mm512_setzero_ps();
    for (num i = 0; i < width; i += LANES) {
        __m512 weight = exponential(load(scores + i));
        total = _mm512_add_ps(total, weight);
        store(scores + i, weight);
    }
    return _mm512_reduce_add_ps(total);
}

INLINE bf16 dot(const bf16 *a, const bf16 *b, num width) {
    __m512 total = _mm512_setzero_ps();
    for (num i = 0; i < width; i += LANES)
        total = _mm512_fmadd_ps(load(a + i), load(b + i), total);
    return to_bf16(_mm512_reduce_add_ps(total));
}

// Rows of scores become weights in place; the sum of each goes to `totals`.
void weigh_rows(bf16 *scores, float *totals, num count, num width, int threads) {
    ROWS for (num row = 0; row < count; row++) totals[row] = weigh(scores + row * width, width);
}

// The product of each row of a (heads, count, groups, width) with its row of b.
void dot_rows(const bf16 *a, const num *a_strides, const bf16 *b, const num *b_strides, bf16 *out,
              num heads, num count, num groups, num width, int threads) {
    for (num head = 0; head < heads; head++) {
        ROWS for (num row = 0; row < count; row++)
            for (num g = 0; g < groups; g++) {
                const bf16 *x = a + head * a_strides[0] + row * a_strides[1] + g * a_strides[2];
                const bf16 *y = b + head * b_strides[0] + row * b_strides[1] + g * b_strides[2];
                out[(head * count + row) * groups + g] = dot(x, y, width);
            }
    }
}

// Scores (groups, BLOCK) of the keys at `first` to `end` of a block, less the shift that the query
// carries; -inf for those that only fill up vectors.
INLINE void score(const bf16 *query, const bf16 *keys, bf16 *scores, num groups, num width,
                  num first, num end) {
    const num wide = width + EXTRA;
    const __m512i extra = _mm512_set1_epi32(0xbf80);  // -1 and 0
    const __m512 hidden = _mm512_set1_ps(-__builtin_inff());
    for (num j = first / LANES * LANES; j < end; j += LANES) {
        __m512 sums[MOST_QUERIES];
        for (num g = 0; g < groups; g++) sums[g] = _mm512_setzero_ps();
        for (num k = 0; k < width; k += 8) {
            __m512i parts[4];
            transposed(keys + j * wide + k, wide * sizeof(bf16), parts);
            for (num g = 0; g < groups; g++)
                for (int p = 0; p < 4; p++)
                    sums[g] = add_pairs(sums[g], parts[p], query + g * wide + k + 2 * p);
        }
        __mmask16 seen = 0xffff;
        if (end - j < LANES) seen &= (1 << (end - j)) - 1;
        if (first > j) seen &= 0xffff << (first - j);
        for (num g = 0; g < groups; g++) {
            __m512 x = add_pairs(sums[g], extra, query + g * wide + width);
            store(scores + g * BLOCK + j, _mm512_mask_blend_ps(seen, hidden, x));
        }
    }
}

// Weights (groups, BLOCK) over the values at `first` to `end`, rounded, added to (groups, width).
INLINE void add_values(const bf16 *weights, const bf16 *values, float *answer, num groups,
                       num width, num first, num end) {
    for (num d = 0; d < width; d += LANES) {
        __m512 sums[MOST_QUERIES];
        for (num g = 0; g < groups; g++) sums[g] = _mm512_setzero_ps();
        for (num j = first; j < end; j += 2) {
            const bf16 *at = values + j * width + d;
            __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
            __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(at + width)));
            __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
            for (num g = 0; g < groups; g++)
                sums[g] = add_pairs(sums[g], both, weights + g * BLOCK + j);
        }
        for (num g = 0; g < groups; g++) {
            float *at = answer + g * width + d;
            __m512 more = widened(rounded(sums[g]));
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), more));
        }
    }
}

struct rows {
    const bf16 *query, *own, *keys, *values;
    bf16 *out;
    num heads, groups, width, value_width;
    const num *seen;  // of each row the first slot that it sees, and the one behind the last
    num first, end;   // of all rows
    float scaling;
};

// The answers of the `count` queries that share a key head: `groups` of each row. The largest of
// their sums of weights.
INLINE float attend_head(const struct rows *rows, num head, num count) {
    const num width = rows->width, wide = width + EXTRA, value_width = rows->value_width;
    const num heads = rows->heads, groups = rows->groups;
    bf16 query[MOST_QUERIES * (MOST_WIDTH + EXTRA)], scores[MOST_QUERIES * BLOCK];
    float answer[MOST_QUERIES * MOST_WIDTH] = {0}, totals[MOST_QUERIES] = {0}, most = 0;
    for (num q = 0; q < count; q++) {
        const num row = q / groups, place = (row * heads + head) * groups + q % groups;
        bf16 *at = query + q * wide;
        for (num i = 0; i < width; i += LANES)
            store(at + i, _mm512_mul_ps(load(rows->query + place * width + i),
                                        _mm512_set1_ps(rows->scaling)));
        bf16 own = dot(at, rows->own + (row * heads + head) * width, width);
        bf16 first = dot(at, rows->keys + head * BLOCK * wide, width);
        __m128 two = _mm_castsi128_ps(_mm_set_epi32(0, 0, first << 16, own << 16));
        at[width] = at[width + 1] = two[0] > two[1] ? own : first;
    }
    for (num block = rows->first / BLOCK; block * BLOCK < rows->end; block++) {
        num at = block * heads + head, begin = block * BLOCK;
        num first = rows->first > begin ? rows->first - begin : 0;
        num end = rows->end - begin < BLOCK ? rows->end - begin : BLOCK;
        num from = first / LANES * LANES, to = (end + LANES - 1) / LANES * LANES;
        score(query, rows->keys + at * BLOCK * wide, scores, count, width, first, end);
        for (num q = 0; q < count; q++) {
            const num *seen = rows->seen + q / groups * 2;
            bf16 *own = scores + q * BLOCK;
            for (num j = from; j < to && j < seen[0] - begin; j++) own[j] = HIDDEN;
            for (num j = to; j > from && j > seen[1] - begin; j--) own[j - 1] = HIDDEN;
            totals[q] += weigh(own + from, to - from);
        }
        const bf16 *values = rows->values + at * BLOCK * value_width;
        add_values(scores, values, answer, count, value_width, from, to);
    }
    for (num q = 0; q < count; q++) {
        const num place = (q / groups * heads + head) * groups + q % groups;
        const __m512 total = _mm512_set1_ps(totals[q]);
        for (num d = 0; d < value_width; d += LANES) {
            __m512 sum = _mm512_loadu_ps(answer + q * value_width + d);
            store(rows->out + place * value_width + d, _mm512_div_ps(sum, total));
        }
        if (!(totals[q] <= most)) most = totals[q];  // also where it is no number
    }
    return most;
}

// Few rows over blocks of keys and values; the largest of their sums of weights.
float attend_rows(const bf16 *query, const bf16 *own, const bf16 *keys, const bf16 *values,
                  bf16 *out, const num *seen, num count, num heads, num groups, num width,
                  num value_width, float scaling, int threads) {
    float most = 0;
    const num together = MOST_QUERIES / groups;
    for (num row = 0; row < count; row += together) {
        const num num_rows = count - row < together ? count - row : together;
        struct rows rows = {
            query + row * heads * groups * width, own + row * heads * width, keys, values,
            out + row * heads * groups * value_width, heads, groups, width, value_width,
            seen + row * 2, seen[row * 2], seen[row * 2 + 1], scaling,
        };
        for (num i = 0; i < num_rows; i++) {
            if (rows.seen[i * 2] < rows.first) rows.first = rows.seen[i * 2];
            if (rows.seen[i * 2 + 1] > rows.end) rows.end = rows.seen[i * 2 + 1];
        }
        float tops[heads];
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows.end - rows.first >= BLOCK)
        for (num head = 0; head < heads; head++) switch (num_rows * groups) {
#define CASE(n) case n: tops[head] = attend_head(&rows, head, n); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(6) CASE(8) CASE(9) CASE(12) CASE(15) CASE(16)
            default: tops[head] = attend_head(&rows, head, num_rows * groups);
        }
        for (num head = 0; head < heads; head++)
            if (!(tops[head] <= most)) most = tops[head];
    }
    return most;
}
