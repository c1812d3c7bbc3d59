// Products of a large matrix with narrow ones on a CPU, in one pass over it.
//
// Beside a layer's own product, those of its branch have little arithmetic and read the same matrices again, from
// memory: here a block of rows and columns is read once, masked in the first cache, and goes into every product that it
// is part of.  Everything is of float32; `operators.cpp` has the operators.
#pragma once

#include <cmath>
#include <vector>

#include "masks.h"
#include "vectors.h"

namespace {

#if defined(CPU_AVX512)
constexpr int ROWS = 16;  // of a block: as many sums at a time as leave no multiplication waiting
#else
constexpr int ROWS = 8;
#endif

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

// The next block of X, whose rows are fetched while this one is multiplied, or null.
struct Next {
    const float* x;
    int64_t row;
};

// No function: GCC would find it to do nothing.
#define FETCH(next, n) \
    if ((next).x && (n) % 16 == 0) \
        for (int i = 0; i < ROWS; ++i) __builtin_prefetch((next).x + i * (next).row + (n))

// sums (ROWS x LANES) += X F, for a block of X.
void product(const float* tile, int width, const float* factor, float* sums, int64_t sums_row, Next next) {
    Vector sum[ROWS];
    for (int i = 0; i < ROWS; ++i) sum[i] = load(sums + i * sums_row);
    for (int n = 0; n < width; ++n) {
        FETCH(next, n);
        const Vector f = load(factor + n * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sum[i] = fma(all(tile[i * WIDTH + n]), f, sum[i]);
    }
    for (int i = 0; i < ROWS; ++i) store(sums + i * sums_row, sum[i]);
}

// gradient (columns x LANES) += X' L, for a block of X.
void gradient(const float* tile, int width, const float* low, int64_t low_row, float* gradient, Next next) {
    constexpr int CHAINS = 4;  // sums side by side, not to wait for one another
    Vector of_row[ROWS];
    for (int i = 0; i < ROWS; ++i) of_row[i] = load(low + i * low_row);
    for (int n = 0; n < width; ++n) {
        FETCH(next, n);
        Vector part[CHAINS] = {load(gradient + n * LANES)};
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) part[i % CHAINS] = fma(all(tile[i * WIDTH + n]), of_row[i], part[i % CHAINS]);
        for (int c = 1; c < CHAINS; ++c) part[0] += part[c];
        store(gradient + n * LANES, part[0]);
    }
}

// squares (ROWS x LANES) += the squares of a block of X, whose columns are padded with zeros to whole vectors.
void square(const float* tile, int width, float* squares) {
    Vector sum[ROWS];
    for (int i = 0; i < ROWS; ++i) sum[i] = load(squares + i * LANES);
    for (int n = 0; n < width; n += LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sum[i] = fma(load(tile + i * WIDTH + n), load(tile + i * WIDTH + n), sum[i]);
    }
    for (int i = 0; i < ROWS; ++i) store(squares + i * LANES, sum[i]);
}

inline float sum_of(Vector x) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

// What one thread holds, from call to call: its rows of L and of X F padded to whole vectors, its part of X' L.
struct Work {
    std::vector<float> low, sums, factor, gradient, squares;
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

// A block of X without gaps, with zeros below and beside it, masked if the branch drops: rows that are a power of two
// apart would share the sets of the first cache.
void copy_tile(const float* x, int64_t x_row, int rows, int64_t row, int64_t column, int width, const Branch& branch,
               float* tile) {
    alignas(64) uint16_t mask[WIDTH];
    std::memset(tile + rows * WIDTH, 0, (ROWS - rows) * WIDTH * sizeof(float));
    for (int i = 0; i < rows; ++i) {
        std::copy_n(x + i * x_row, width, tile + i * WIDTH);
        std::fill_n(tile + i * WIDTH + width, padded(width, LANES) - width, 0.0f);
        if (!branch.seed) continue;
        masks(Site(branch.seed, branch.threshold), row + i, column, width, mask);
        uint32_t* bits = reinterpret_cast<uint32_t*>(tile + i * WIDTH);
        copy(bits, bits, mask, width);
    }
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
    work.squares.assign(squares ? all_rows * LANES : 0, 0);
    alignas(64) float tile[ROWS * WIDTH];
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const int width = static_cast<int>(std::min<int64_t>(WIDTH, columns - column));
        for (int b = 0; b < count; ++b)
            if (branches[b].factor) pack(branches[b], column, width, &work.factor[at[b] * WIDTH]);
        std::fill(work.gradient.begin(), work.gradient.end(), 0.0f);
        for (int64_t i = 0; i < rows; i += ROWS) {
            const int block = static_cast<int>(std::min<int64_t>(ROWS, rows - i));
            const float* given = x + (first + i) * x_row + column;
            Next next{i + 2 * ROWS <= rows ? given + ROWS * x_row : nullptr, x_row};
            for (int b = 0; b < count; ++b) {
                const Branch& branch = branches[b];
                if (b == 0 || branch.seed || branches[b - 1].seed)
                    copy_tile(given, x_row, block, first + i, column, width, branch, tile);
                if (squares && b == 0) square(tile, width, &work.squares[i * LANES]);
                for (int64_t r = at[b]; r < at[b + 1]; r += LANES) {
                    if (branch.product) {
                        product(tile, width, &work.factor[r * WIDTH], &work.sums[i * ranks + r], ranks, next);
                        next.x = nullptr;
                    }
                    if (branch.gradient) {
                        gradient(tile, width, &work.low[i * ranks + r], ranks, &work.gradient[r * WIDTH], next);
                        next.x = nullptr;
                    }
                }
            }
        }
        for (int64_t r = 0; partial && r < ranks; r += LANES)
            for (int n = 0; n < width; ++n)
                store(partial + (column + n) * ranks + r, load(&work.gradient[r * WIDTH + n * LANES]));
    }
    for (int64_t i = 0; squares && i < rows; ++i) squares[first + i] = sum_of(load(&work.squares[i * LANES]));
    for (int b = 0; b < count; ++b)
        for (int64_t i = 0; branches[b].product && i < rows; ++i)
            for (int64_t r = 0; r < branches[b].rank; ++r)
                branches[b].product[(first + i) * branches[b].product_row + r] =
                    branches[b].scale * work.sums[i * ranks + at[b] + r];
}

// The first `count` lanes of x, to a row or onto what it holds.
inline void put(float* to, Vector x, int count, bool added) {
    if (count >= LANES) return store(to, added ? load(to) + x : x);
    for (int lane = 0; lane < count; ++lane) to[lane] = added ? to[lane] + x[lane] : x[lane];
}

// Y = scale * L F', masked, on a block of its rows, or added to Y: F' as rows of WIDTH columns, L as columns of ROWS rows.
void expand_block(float* y, int64_t y_row, int rows, int width, const Branch& branch, const float* factor,
                  const float* low, const uint16_t* mask, bool added) {
    for (int n = 0; n < width; n += LANES) {
        Vector sum[ROWS] = {};
        for (int64_t r = 0; r < branch.rank; ++r) {
            const Vector f = load(factor + r * WIDTH + n);
#pragma GCC unroll 16
            for (int j = 0; j < ROWS; ++j) sum[j] = fma(all(low[r * ROWS + j]), f, sum[j]);
        }
#pragma GCC unroll 16
        for (int j = 0; j < ROWS; ++j)
            if (j < rows)
                put(y + j * y_row + n, branch.seed ? kept(sum[j], mask + j * WIDTH + n) : sum[j], width - n, added);
    }
}

// Y = the sum over branches of scale * L F', masked, on the rows from `first` to `last`.
void expand(float* y, int64_t y_row, int64_t first, int64_t last, int64_t columns, const Branch* branches, int count) {
    int64_t ranks = 0;
    for (int b = 0; b < count; ++b) ranks = std::max(ranks, branches[b].rank);
    std::vector<float> factor(count * ranks * WIDTH, 0), low(ROWS * ranks);
    alignas(64) uint16_t mask[ROWS * WIDTH];
    for (int64_t column = 0; column < columns; column += WIDTH) {
        const int width = static_cast<int>(std::min<int64_t>(WIDTH, columns - column));
        for (int b = 0; b < count; ++b)
            for (int64_t r = 0; r < branches[b].rank; ++r)
                for (int n = 0; n < width; ++n)
                    factor[(b * ranks + r) * WIDTH + n] = branches[b].factor[(column + n) * branches[b].factor_column +
                                                                             r * branches[b].factor_rank];
        for (int64_t i = first; i < last; i += ROWS) {
            const int block = static_cast<int>(std::min<int64_t>(ROWS, last - i));
            for (int b = 0; b < count; ++b) {
                const Branch& branch = branches[b];
                for (int j = 0; j < ROWS; ++j)
                    for (int64_t r = 0; r < branch.rank; ++r)
                        low[r * ROWS + j] = j < block ? branch.scale * branch.low[(i + j) * branch.low_row + r] : 0.0f;
                for (int j = 0; branch.seed && j < block; ++j)
                    masks(Site(branch.seed, branch.threshold), i + j, column, width, mask + j * WIDTH);
                expand_block(y + i * y_row + column, y_row, block, width, branch, &factor[b * ranks * WIDTH],
                             low.data(), mask, b > 0);
            }
        }
    }
}

// How many parts the rows are split into, and where one begins.
int parts_of(int64_t rows, int threads) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, rows / ROWS)));
}
int64_t share(int64_t rows, int64_t part, int64_t parts) { return padded(rows, ROWS) / ROWS * part / parts * ROWS; }

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

// norms (rows) = the roots of `norms + scale * <2 P + scale * B G, B>` row by row, which are |W + scale * B A|^2 if norms
// are |W|^2, P (rows x rank) is W A' and G (rank x rank) is A A'.
void norms_of_sums(float* norms, const float* product, const float* B, int64_t B_row, const float* gram, int64_t rank,
                   float scale, int64_t rows, int32_t threads) {
    const int64_t ranks = padded(rank, LANES);
#pragma omp parallel num_threads(parts_of(rows, threads))
    {
        std::vector<float> padded_gram(rank * ranks, 0), b(ranks, 0), sum(ranks, 0);
        for (int64_t r = 0; r < rank; ++r) std::copy_n(gram + r * rank, rank, &padded_gram[r * ranks]);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            std::copy_n(B + row * B_row, rank, b.begin());
            for (int64_t r = 0; r < rank; ++r) sum[r] = 2 * product[row * rank + r];
            Vector total{};
            for (int64_t at = 0; at < ranks; at += LANES) {
                Vector part = load(&sum[at]);
                for (int64_t r = 0; r < rank; ++r)
                    part = fma(all(scale * b[r]), load(&padded_gram[r * ranks + at]), part);
                total = fma(part, load(&b[at]), total);
            }
            norms[row] = std::sqrt(std::max(norms[row] + scale * sum_of(total), 0.0f));
        }
    }
}

// out (columns) = the sums over rows of a * b; with a scale of every column also y = a * scale, which may be a itself.
void column_sums(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t rows, int64_t columns,
                 float* out, const float* scale, float* y, int64_t y_row, int32_t threads) {
    const int parts = parts_of(rows, threads);
    std::vector<float> partial(parts * columns, 0);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int part = 0; part < parts; ++part)
        for (int64_t row = share(rows, part, parts); row < std::min(rows, share(rows, part + 1, parts)); ++row) {
            const float* first = a + row * a_row;
            const float* second = b + row * b_row;
            float* sum = &partial[part * columns];
            float* scaled = scale ? y + row * y_row : nullptr;
            int64_t n = 0;
            for (; n + LANES <= columns; n += LANES) {
                const Vector value = load(first + n);
                store(sum + n, load(sum + n) + value * load(second + n));
                if (scale) store(scaled + n, value * load(scale + n));
            }
            for (; n < columns; ++n) {
                sum[n] += first[n] * second[n];
                if (scale) scaled[n] = first[n] * scale[n];
            }
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
