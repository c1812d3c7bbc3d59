// Products of a large matrix with narrow ones on a CPU, in one pass over it, and masks of dropout where they are used.
//
// Beside a layer's own product, those of its branch have little arithmetic and read the same matrices again, from
// memory: here a block of rows and columns is read once, masked in the first cache, and goes into every product that it
// is part of.  Everything is of float32; `operators.cpp` has the operators.
#pragma once

#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

// --- masks: Philox4x32 as `codegen/masks.py` defines them --------------------------------------------------------
//
// Counters sit in lanes of 64 bits, so that a round is two multiplications, two shifts and two xors of vectors: the
// upper halves of lanes hold what is left of products, which the multiplications do not read.  Of two lanes, the even
// one has a call of the first half of its vector and the odd one of the second (`calls`), so that interleaving their
// words gives calls in order.

constexpr int ROUNDS = 7, COLUMNS = 8;  // columns that share a call of the generator
constexpr uint64_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;
constexpr uint32_t W0 = 0x9E3779B9, W1 = 0xBB67AE85;
constexpr int CHAINS = 4;  // vectors of counters at a time: one alone would wait for its multiplications

#if defined(CPU_AVX512)
typedef __m512i Words;
constexpr int CALLS = 8;
inline Words same(uint64_t x) { return _mm512_set1_epi64(x); }
inline Words calls() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
inline Words plus(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words times(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Words joined(Words low, Words high) {  // the lower halves of both, as lanes of 64 bits
    return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
inline Words firsts(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
inline Words seconds(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
#elif defined(CPU_AVX2)
typedef __m256i Words;
constexpr int CALLS = 4;
inline Words same(uint64_t x) { return _mm256_set1_epi64x(x); }
inline Words calls() { return _mm256_setr_epi64x(0, 2, 1, 3); }
inline Words plus(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words times(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words exclusive(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline Words joined(Words low, Words high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
inline Words firsts(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
inline Words seconds(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
#else
typedef uint64_t Words __attribute__((vector_size(16)));
constexpr int CALLS = 2;
constexpr uint64_t LOW = 0xFFFFFFFF;
inline Words same(uint64_t x) { return Words{x, x}; }
inline Words calls() { return Words{0, 1}; }
inline Words plus(Words a, Words b) { return a + b; }
inline Words times(Words a, Words b) { return (a & LOW) * (b & LOW); }
inline Words upper(Words a) { return a >> 32; }
inline Words exclusive(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words joined(Words low, Words high) { return (low & LOW) | (high << 32); }
inline Words firsts(Words a, Words b) { return Words{a[0], b[0]}; }
inline Words seconds(Words a, Words b) { return Words{a[1], b[1]}; }
#endif

constexpr int SPAN = CHAINS * CALLS * COLUMNS;  // columns whose numbers are computed at a time

struct Site {
    uint32_t key[2];
    uint16_t threshold;
    Site(const int64_t* seed, int32_t threshold) : threshold(static_cast<uint16_t>(threshold)) {
        const uint64_t value = static_cast<uint64_t>(*seed);
        key[0] = static_cast<uint32_t>(value);
        key[1] = static_cast<uint32_t>(value >> 32);
    }
};

// Masks of 16 bits, all ones where an element is kept, of SPAN columns of a row from a multiple of COLUMNS on.
void span_of_masks(const Site& site, uint32_t row, uint32_t block, uint16_t* out) {
    Words c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int j = 0; j < CHAINS; ++j) {
        c0[j] = plus(calls(), same(block + j * CALLS));
        c1[j] = same(row);
        c2[j] = c3[j] = same(0);
    }
    const Words m0 = same(M0), m1 = same(M1);
    uint32_t k0 = site.key[0], k1 = site.key[1];
#pragma GCC unroll 7
    for (int round = 0; round < ROUNDS; ++round, k0 += W0, k1 += W1) {
        const Words key0 = same(k0), key1 = same(k1);
#pragma GCC unroll 4
        for (int j = 0; j < CHAINS; ++j) {
            const Words first = times(c0[j], m0), second = times(c2[j], m1);
            c0[j] = exclusive(upper(second), c1[j], key0);
            c2[j] = exclusive(upper(first), c3[j], key1);
            c1[j] = second;
            c3[j] = first;
        }
    }
    for (int j = 0; j < CHAINS; ++j) {
        const Words low = joined(c0[j], c1[j]), high = joined(c2[j], c3[j]);
        const Words halves[2] = {firsts(low, high), seconds(low, high)};
        std::memcpy(out + j * CALLS * COLUMNS, halves, sizeof halves);
    }
    for (int i = 0; i < SPAN; ++i) out[i] = out[i] >= site.threshold ? 0xFFFF : 0;
}

constexpr int WIDTH = 256;  // columns of a block

// Of one row and the columns of a block; what is beyond them is defined too.
void masks(const Site& site, int64_t row, int64_t column, int width, uint16_t* out) {
    for (int at = 0; at < width; at += SPAN)
        span_of_masks(site, static_cast<uint32_t>(row), static_cast<uint32_t>((column + at) / COLUMNS), out + at);
}

template <class Bits>
inline Bits bits_of(uint16_t mask) {
    return static_cast<Bits>(static_cast<int64_t>(static_cast<int16_t>(mask)));
}

template <class Bits>
void copy(const Bits* x, Bits* y, const uint16_t* mask, int width) {
    for (int i = 0; i < width; ++i) y[i] = x[i] & bits_of<Bits>(mask[i]);
}

template <class Bits>
void copy_matrix(const void* x, int64_t x_row, void* y, int64_t y_row, int64_t rows, int64_t columns, const Site& site,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        alignas(64) uint16_t mask[WIDTH];
        for (int64_t at = 0; at < columns; at += WIDTH) {
            const int width = static_cast<int>(std::min<int64_t>(WIDTH, columns - at));
            masks(site, row, at, width, mask);
            copy(static_cast<const Bits*>(x) + row * x_row + at, static_cast<Bits*>(y) + row * y_row + at, mask, width);
        }
    }
}

// --- products ----------------------------------------------------------------------------------------------------

constexpr int ROWS = 8;  // of a block: rows a power of two apart share the sets of the first cache

inline Vector all(float x) {  // not `Vector{} + x`, an addition that no compiler may leave out
#if defined(CPU_AVX512)
    return _mm512_set1_ps(x);
#elif defined(CPU_AVX2)
    return _mm256_set1_ps(x);
#else
    return Vector{x, x, x, x};
#endif
}

inline int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// A narrow factor F (columns x rank) beside a matrix X (rows x columns), with what is computed of it; null where it is
// not.  With a seed, X is X with the elements dropped that the mask drops.  F and G have strides for both dimensions.
struct Branch {
    const float* factor;  // F
    int64_t factor_column, factor_rank;
    const float* low;  // L (rows x rank)
    int64_t low_row;
    float* product;  // scale * X F
    int64_t product_row;
    float* gradient;  // scale * X' L
    int64_t gradient_column, gradient_rank;
    int64_t rank;
    float scale;
    int32_t threshold;
    const int64_t* seed;
};

// The next rows of X are fetched while these are multiplied (no function of its own: GCC would find it to do nothing).
#define FETCH(next, row, n)    \
    if ((next) && (n) % 16 == 0) \
        for (int i = 0; i < ROWS; ++i) __builtin_prefetch((next) + i * (row) + (n))

#if defined(CPU_AVX512)
constexpr int GROUP = 2;  // vectors of ranks that an element of X meets at a time
#else
constexpr int GROUP = 1;
#endif

// sums (ROWS x V LANES) += X F, for the columns of a block.
template <int V>
void product(const float* x, int64_t x_row, int width, const float* factor, float* sums, int64_t sums_row,
             const float* next, int64_t next_row) {
    Vector sum[V][ROWS];
    for (int v = 0; v < V; ++v)
        for (int i = 0; i < ROWS; ++i) sum[v][i] = load(sums + i * sums_row + v * LANES);
    for (int n = 0; n < width; ++n) {
        FETCH(next, next_row, n);
        Vector f[V];
        for (int v = 0; v < V; ++v) f[v] = load(factor + (v * WIDTH + n) * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Vector one = all(x[i * x_row + n]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sum[v][i] = fma(one, f[v], sum[v][i]);
        }
    }
    for (int v = 0; v < V; ++v)
        for (int i = 0; i < ROWS; ++i) store(sums + i * sums_row + v * LANES, sum[v][i]);
}

// gradient (columns x V LANES) += X' L, for the columns of a block.
template <int V>
void gradient(const float* x, int64_t x_row, int width, const float* low, int64_t low_row, float* gradient,
              const float* next, int64_t next_row) {
    constexpr int CHAINS = V == 1 ? 4 : 2;  // sums side by side, not to wait for one another
    Vector of_row[V][ROWS];
    for (int v = 0; v < V; ++v)
        for (int i = 0; i < ROWS; ++i) of_row[v][i] = load(low + i * low_row + v * LANES);
    for (int n = 0; n < width; ++n) {
        FETCH(next, next_row, n);
        Vector part[V][CHAINS] = {};
        for (int v = 0; v < V; ++v) part[v][0] = load(gradient + (v * WIDTH + n) * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Vector one = all(x[i * x_row + n]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) part[v][i % CHAINS] = fma(one, of_row[v][i], part[v][i % CHAINS]);
        }
        for (int v = 0; v < V; ++v) {
            for (int c = 1; c < CHAINS; ++c) part[v][0] += part[v][c];
            store(gradient + (v * WIDTH + n) * LANES, part[v][0]);
        }
    }
}

// squares (rows) += the sums of squares of a block.
void squares_of(const float* x, int64_t x_row, int rows, int width, float* squares) {
    Vector sum[ROWS] = {};
    int n = 0;
    if (rows == ROWS)
        for (; n + LANES <= width; n += LANES) {
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) sum[i] = fma(load(x + i * x_row + n), load(x + i * x_row + n), sum[i]);
        }
    for (int i = 0; i < rows; ++i) {
        float total = 0;
        for (int lane = 0; lane < LANES; ++lane) total += sum[i][lane];
        for (int rest = n; rest < width; ++rest) total += x[i * x_row + rest] * x[i * x_row + rest];
        squares[i] += total;
    }
}

// What one thread holds, from call to call: its rows of L and of X F padded to whole vectors, its part of X' L.
struct Work {
    std::vector<float> low, sums, factor, gradient;
    static Work& of_thread() {
        thread_local Work work;
        return work;
    }
};

// The factor of a branch for the columns of a block, as vectors of ranks: LANES of them for every column, WIDTH columns.
void pack(const Branch& branch, int64_t column, int width, float* factor) {
    const float* from = branch.factor + column * branch.factor_column;
    for (int64_t first = 0; first < branch.rank; first += LANES, factor += WIDTH * LANES) {
        const int count = static_cast<int>(std::min<int64_t>(LANES, branch.rank - first));
        if (branch.factor_rank == 1) {
            for (int n = 0; n < width; ++n)
                std::copy_n(from + n * branch.factor_column + first, count, factor + n * LANES);
            continue;
        }
        for (int r = 0; r < count; ++r) {
            const float* row = from + (first + r) * branch.factor_rank;
            for (int n = 0; n < width; ++n) factor[n * LANES + r] = row[n * branch.factor_column];
        }
    }
}

// A block of X, with zeros below it where it has fewer rows, and masked if the branch drops.
void masked_tile(const float* x, int64_t x_row, int rows, int64_t row, int64_t column, int width, const Branch& branch,
                 float* tile) {
    alignas(64) uint16_t mask[WIDTH];
    std::memset(tile + rows * WIDTH, 0, (ROWS - rows) * WIDTH * sizeof(float));
    for (int i = 0; i < rows; ++i) {
        if (!branch.seed) {
            std::copy_n(x + i * x_row, width, tile + i * WIDTH);
            continue;
        }
        masks(Site(branch.seed, branch.threshold), row + i, column, width, mask);
        copy(reinterpret_cast<const uint32_t*>(x + i * x_row), reinterpret_cast<uint32_t*>(tile + i * WIDTH), mask,
             width);
    }
}

// Vectors of ranks, by GROUP and what is left: `each(first, constant)`, the constant being how many.
template <class Each>
void in_groups(int64_t vectors, Each each) {
    int64_t v = 0;
    for (; v + GROUP <= vectors; v += GROUP) each(v, std::integral_constant<int, GROUP>());
    for (; v < vectors; ++v) each(v, std::integral_constant<int, 1>());
}

void narrow(const float* x, int64_t x_row, int64_t first, int64_t last, int64_t columns, const Branch* branches,
            int count, const int64_t* at, float* squares, float* partial) {
    Work& work = Work::of_thread();
    const int64_t rows = last - first, all_rows = padded(rows, ROWS), ranks = at[count];
    work.low.assign(all_rows * ranks, 0);
    work.sums.assign(all_rows * ranks, 0);
    work.factor.assign(WIDTH * ranks, 0);
    work.gradient.resize(WIDTH * ranks);
    for (int b = 0; b < count; ++b)
        for (int64_t i = 0; branches[b].low && i < rows; ++i)
            std::copy_n(branches[b].low + (first + i) * branches[b].low_row, branches[b].rank,
                        &work.low[i * ranks + at[b]]);
    alignas(64) float tile[ROWS * WIDTH];
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const int width = static_cast<int>(std::min<int64_t>(WIDTH, columns - column));
        for (int b = 0; b < count; ++b)
            if (branches[b].factor) pack(branches[b], column, width, &work.factor[at[b] * WIDTH]);
        std::fill(work.gradient.begin(), work.gradient.end(), 0.0f);
        for (int64_t i = 0; i < rows; i += ROWS) {
            const int block = static_cast<int>(std::min<int64_t>(ROWS, rows - i));
            const float* given = x + (first + i) * x_row + column;
            const float* next = i + 2 * ROWS <= rows ? given + ROWS * x_row : nullptr;
            if (squares) squares_of(given, x_row, block, width, squares + first + i);
            for (int b = 0; b < count; ++b) {
                const Branch& branch = branches[b];
                const bool copied = branch.seed || block < ROWS;
                if (copied) masked_tile(given, x_row, block, first + i, column, width, branch, tile);
                const float* from = copied ? tile : given;
                const int64_t from_row = copied ? WIDTH : x_row;
                in_groups((at[b + 1] - at[b]) / LANES, [&](int64_t v, auto vectors) {
                    const int64_t r = at[b] + v * LANES;
                    if (branch.product)
                        product<vectors()>(from, from_row, width, &work.factor[r * WIDTH], &work.sums[i * ranks + r],
                                           ranks, next, x_row);
                    if (branch.gradient)
                        gradient<vectors()>(from, from_row, width, &work.low[i * ranks + r], ranks,
                                            &work.gradient[r * WIDTH], next, x_row);
                });
            }
        }
        for (int64_t r = 0; partial && r < ranks; r += LANES)
            for (int n = 0; n < width; ++n)
                store(partial + (column + n) * ranks + r, load(&work.gradient[r * WIDTH + n * LANES]));
    }
    for (int b = 0; b < count; ++b)
        for (int64_t i = 0; branches[b].product && i < rows; ++i)
            for (int64_t r = 0; r < branches[b].rank; ++r)
                branches[b].product[(first + i) * branches[b].product_row + r] =
                    branches[b].scale * work.sums[i * ranks + at[b] + r];
}

// Y = the sum over branches of scale * L F', masked, on the rows from `first` to `last`.
void expand(float* y, int64_t y_row, int64_t first, int64_t last, int64_t columns, const Branch* branches, int count) {
    int64_t ranks = 0;
    for (int b = 0; b < count; ++b) ranks = std::max(ranks, branches[b].rank);
    std::vector<float> factor(count * ranks * WIDTH, 0);
    alignas(64) float tile[ROWS * WIDTH], total[ROWS * WIDTH];
    alignas(64) uint16_t mask[WIDTH];
    std::vector<float> low(ROWS * ranks);
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const int width = static_cast<int>(std::min<int64_t>(WIDTH, columns - column));
        for (int b = 0; b < count; ++b)
            for (int64_t r = 0; r < branches[b].rank; ++r)
                for (int n = 0; n < width; ++n)
                    factor[(b * ranks + r) * WIDTH + n] = branches[b].factor[(column + n) * branches[b].factor_column +
                                                                             r * branches[b].factor_rank];
        for (int64_t i = first; i < last; i += ROWS) {
            const int block = static_cast<int>(std::min<int64_t>(ROWS, last - i));
            std::fill_n(total, ROWS * WIDTH, 0.0f);
            for (int b = 0; b < count; ++b) {
                const Branch& branch = branches[b];
                for (int j = 0; j < ROWS; ++j)
                    for (int64_t r = 0; r < branch.rank; ++r)
                        low[r * ROWS + j] = j < block ? branch.scale * branch.low[(i + j) * branch.low_row + r] : 0.0f;
                for (int n = 0; n < width; n += LANES) {
                    Vector sum[ROWS];
                    for (int j = 0; j < ROWS; ++j) sum[j] = Vector{};
                    for (int64_t r = 0; r < branch.rank; ++r) {
                        const Vector f = load(&factor[(b * ranks + r) * WIDTH + n]);
#pragma GCC unroll 8
                        for (int j = 0; j < ROWS; ++j) sum[j] = fma(all(low[r * ROWS + j]), f, sum[j]);
                    }
                    for (int j = 0; j < ROWS; ++j) store(tile + j * WIDTH + n, sum[j]);
                }
                for (int j = 0; j < block; ++j) {
                    float* to = total + j * WIDTH;
                    float* from = tile + j * WIDTH;
                    if (branch.seed) {
                        masks(Site(branch.seed, branch.threshold), i + j, column, width, mask);
                        copy(reinterpret_cast<uint32_t*>(from), reinterpret_cast<uint32_t*>(from), mask, width);
                    }
                    for (int n = 0; n < width; ++n) to[n] += from[n];
                }
            }
            for (int j = 0; j < block; ++j) std::copy_n(total + j * WIDTH, width, y + (i + j) * y_row + column);
        }
    }
}

// How many parts the rows are split into, and where one begins.
int parts_of(int64_t rows, int threads) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, rows / ROWS)));
}
int64_t share(int64_t rows, int64_t part, int64_t parts) { return padded(rows, ROWS) / ROWS * part / parts * ROWS; }

// y = x where it is kept, 0 elsewhere: elements of `size` bytes; the strides are of rows, in elements.
void dropped(const void* x, int64_t x_row, void* y, int64_t y_row, int64_t rows, int64_t columns,
             const int64_t* seed, int32_t threshold, int64_t size, int threads) {
    const auto step = size == 2 ? copy_matrix<uint16_t> : size == 4 ? copy_matrix<uint32_t> : copy_matrix<uint64_t>;
    step(x, x_row, y, y_row, rows, columns, Site(seed, threshold), threads);
}

// The gradient of a branch, of what every part of the rows has summed: (parts, columns, ranks), its own from `at` on.
void finish(const Branch& branch, const float* partial, int parts, int64_t columns, int64_t ranks, int64_t at,
            int64_t from, int64_t to) {
    for (int64_t column = from; column < to; ++column)
        for (int64_t r = 0; r < branch.rank; ++r) {
            float total = 0;
            for (int part = 0; part < parts; ++part) total += partial[(part * columns + column) * ranks + at + r];
            branch.gradient[column * branch.gradient_column + r * branch.gradient_rank] = branch.scale * total;
        }
}

// What the branches ask for, and the sums of squares of rows where `squares` is not null, in one pass over x.
void products(const float* x, int64_t x_row, int64_t rows, int64_t columns, const Branch* branches, int32_t count,
              float* squares, int32_t threads) {
    std::vector<int64_t> at{0};  // where the ranks of a branch begin, in padded ranks
    bool gradients = false;
    for (int b = 0; b < count; ++b) {
        at.push_back(at.back() + padded(branches[b].rank, LANES));
        gradients |= branches[b].gradient != nullptr;
    }
    const int64_t ranks = at.back();
    const int parts = parts_of(rows, threads);
    thread_local std::vector<float> sums;  // of the calling thread
    if (gradients && static_cast<int64_t>(sums.size()) < parts * columns * ranks) sums.resize(parts * columns * ranks);
    float* partial = sums.data();
    if (squares) std::fill_n(squares, rows, 0.0f);
#pragma omp parallel num_threads(parts)
    {
#pragma omp for schedule(static)
        for (int part = 0; part < parts; ++part) {
            const int64_t first = share(rows, part, parts), last = std::min(rows, share(rows, part + 1, parts));
            narrow(x, x_row, first, last, columns, branches, count, at.data(), squares,
                   gradients ? partial + part * columns * ranks : nullptr);
        }
#pragma omp for schedule(static)
        for (int64_t column = 0; column < columns; column += WIDTH)
            for (int b = 0; b < count; ++b)
                if (branches[b].gradient)
                    finish(branches[b], partial, parts, columns, ranks, at[b], column,
                           std::min(columns, column + WIDTH));
    }
}

// out (columns) = the sums over rows of a * b.
void column_sums(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t rows, int64_t columns,
                 float* out, int32_t threads) {
    const int parts = parts_of(rows, threads);
    std::vector<float> partial(parts * columns, 0);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; ++part)
        for (int64_t row = share(rows, part, parts); row < std::min(rows, share(rows, part + 1, parts)); ++row) {
            const float* x = a + row * a_row;
            const float* y = b + row * b_row;
            float* sum = &partial[part * columns];
            for (int64_t column = 0; column < columns; ++column) sum[column] += x[column] * y[column];
        }
    for (int64_t column = 0; column < columns; ++column) {
        out[column] = 0;
        for (int part = 0; part < parts; ++part) out[column] += partial[part * columns + column];
    }
}

// y (rows x columns) = the sum over branches of scale * L F', masked where they have a seed.
void expand_all(float* y, int64_t y_row, int64_t rows, int64_t columns, const Branch* branches, int32_t count,
                int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; ++part)
        expand(y, y_row, share(rows, part, threads), std::min(rows, share(rows, part + 1, threads)), columns, branches,
               count);
}

}  // namespace
