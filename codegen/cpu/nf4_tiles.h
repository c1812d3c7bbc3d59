// Products of an NF4 weight with some tokens, as bfloat16 in the processor's tiles, where it has them.

#pragma once

#include "nf4_few.h"

#if defined(NF4_PAIRS) && defined(__AMX_BF16__)
#define NF4_TILES

namespace {

// bfloat16 in the processor's tiles: 16 x 32 times 32 x 16, added to 16 x 16 float32.  The left operand lies in memory
// row by row, the right one as pairs: the numbers 2 i and 2 i + 1 of each of its 16 columns side by side.
struct Tiles : Pairs {
    static constexpr int SIDE = 16, LONG = 32;
    static constexpr int BLOCK = LONG;
    static constexpr int DEPTH = 128;
    static constexpr int TILE = 256;
    static constexpr int HEIGHT = 32, WIDE = 512;  // of the weight that a product decodes at a time
    static constexpr int LEAST = 3, MOST = 256;    // tokens

    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };

    struct Session {  // the tiles of this thread
        Session() {
            Shapes shapes;
            for (int i = 0; i < 8; ++i) shapes.bytes[i] = 4 * SIDE, shapes.rows[i] = SIDE;
            _tile_loadconfig(&shapes);
        }
        ~Session() { _tile_release(); }
    };

    static Number* row(Number*, Number* two, int64_t r) { return two + r % 2 * TILE; }
    static void decoded(Number* part, const Number* two, int64_t r, int64_t n) {
        if (r % 2) interleave(two, two + TILE, part + (r - 1) * TILE, n);
    }
};

// Where a matrix of tiles lies: from one row to the next, from one tile to the next along the sum, and across it.
struct Stride {
    int64_t row, along, across;
};

// c[i][j] += a[i] b[j], i < I, j < J, sums of n numbers.
template <int I, int J>
void tiles(const uint16_t* a, Stride as, const uint16_t* b, Stride bs, int64_t n, float* c, Stride cs) {
    _tile_loadd(0, c, 4 * cs.row);
    if constexpr (I > 1) _tile_loadd(1, c + cs.along, 4 * cs.row);
    if constexpr (J > 1) _tile_loadd(2, c + cs.across, 4 * cs.row);
    if constexpr (I > 1 && J > 1) _tile_loadd(3, c + cs.along + cs.across, 4 * cs.row);
    for (int64_t k = 0; k < n; k += Tiles::LONG, a += as.along, b += bs.along) {
        _tile_loadd(4, a, 2 * as.row);
        _tile_loadd(6, b, 2 * bs.row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (I > 1) {
            _tile_loadd(5, a + as.across, 2 * as.row);
            _tile_dpbf16ps(1, 5, 6);
        }
        if constexpr (J > 1) {
            _tile_loadd(7, b + bs.across, 2 * bs.row);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (I > 1 && J > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * cs.row);
    if constexpr (I > 1) _tile_stored(1, c + cs.along, 4 * cs.row);
    if constexpr (J > 1) _tile_stored(2, c + cs.across, 4 * cs.row);
    if constexpr (I > 1 && J > 1) _tile_stored(3, c + cs.along + cs.across, 4 * cs.row);
}

// Here x lies in groups of 16 tokens, each (padded columns / 2, 16 tokens, 2).
void product_rows(const Weight& w, int64_t first, const uint16_t* x, int64_t tokens, float* y, Tiles) {
    alignas(64) uint16_t part[Tiles::HEIGHT * Tiles::WIDE];
    alignas(64) float sums[Tiles::HEIGHT * Tiles::MOST];
    const Sixteen code = code_of(w);
    const int64_t rows = std::min<int64_t>(Tiles::HEIGHT, w.rows - first);
    const int64_t group = Tiles::SIDE * up(w.columns, 32), held = up(tokens, Tiles::SIDE);
    const Stride as = {Tiles::WIDE, Tiles::LONG, Tiles::SIDE * Tiles::WIDE};
    const Stride bs = {2 * Tiles::SIDE, Tiles::SIDE * Tiles::LONG, group};
    const Stride cs = {held, Tiles::SIDE * held, Tiles::SIDE};
    std::fill(sums, sums + Tiles::HEIGHT * held, 0.0f);
    for (int64_t start = 0; start < w.columns; start += Tiles::WIDE) {
        const int64_t stop = std::min(w.columns, start + Tiles::WIDE), n = up(stop - start, Tiles::LONG);
        for (int64_t r = 0; r < Tiles::HEIGHT; ++r) {
            const int64_t at = (first + r) * w.columns, done = r < rows ? stop - start : 0;
            if (done) decode(w, code, at + start, at + stop, part + r * Tiles::WIDE, BFLOAT16);
            std::fill(part + r * Tiles::WIDE + done, part + r * Tiles::WIDE + n, uint16_t(0));
        }
        int64_t t = 0;
        const uint16_t* b = x + start * Tiles::SIDE;
        for (; t + Tiles::SIDE < held; t += 2 * Tiles::SIDE, b += 2 * group)
            tiles<2, 2>(part, as, b, bs, n, sums + t, cs);
        if (t < held) tiles<2, 1>(part, as, b, bs, n, sums + t, cs);
    }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) y[t * w.rows + first + r] = sums[r * held + t];
}

void all_outer(const uint16_t* w, const uint16_t* dy, int64_t dy_stride, int64_t rows, float* g, int64_t g_stride,
               int64_t n, int64_t tokens, Tiles) {
    const Stride as = {dy_stride, Tiles::LONG, Tiles::SIDE * dy_stride};
    const Stride bs = {2 * Tiles::TILE, Tiles::LONG * Tiles::TILE, 2 * Tiles::SIDE};
    const Stride cs = {g_stride, Tiles::SIDE * g_stride, Tiles::SIDE};
    for (; tokens > 0; tokens -= 2 * Tiles::SIDE, dy += 2 * as.across, g += 2 * cs.along)
        for (int64_t k = 0; k < n; k += 2 * Tiles::SIDE)
            if (tokens > Tiles::SIDE)
                tiles<2, 2>(dy, as, w + 2 * k, bs, rows, g + k, cs);
            else
                tiles<1, 2>(dy, as, w + 2 * k, bs, rows, g + k, cs);
}

}  // namespace

#endif
