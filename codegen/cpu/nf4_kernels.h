// What the kernels of `nf4.cpp` take, and how `operators.cpp` calls them.
//
// They are two libraries: the kernels exist for more instruction sets, and are compiled in two seconds without a header of
// PyTorch.  So the operators get a table of functions; `operators.py` hands it over when both are loaded.

#pragma once

#include <cstdint>

namespace {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Weight {  // as `nf4.py` declares it
    const float* code;            // [16]
    const uint8_t* codes;         // [ceil(rows * columns / 2)]
    const float* absmax;          // [ceil(rows * columns / blocksize)], or null where it is doubly quantised:
    const uint8_t* absmax_codes;  // the same number of codes,
    const float* nested_absmax;   // one for 256 of them,
    const float* nested_code;     // [256]
    const float* offset;          // [1]
    int64_t rows, columns, blocksize;
    int32_t dtype;    // that the weight has
    int32_t product;  // that it is multiplied in
};

// How products with few tokens are given x and dy: as float32, as they are, or as they are with the tokens padded to 16
// and x as groups of 16 tokens, each (columns / 2, 16 tokens, 2).
enum Given : int32_t { AS_FLOAT32 = 0, AS_IT_IS = 1, GROUPED = 2 };

struct Nf4Kernels {  // `nf4.cpp` says what they do
    void (*decode)(const Weight* w, int64_t row, int64_t rows, int64_t column, int64_t columns, void* out,
                   int32_t dtype, int32_t threads);
    int32_t (*layout)(int32_t dtype, int64_t tokens);
    void (*product)(const Weight* w, const void* x, int64_t tokens, float* y, int32_t threads);
    int64_t (*gradient_stride)(int64_t columns);
    void (*input_gradient)(const Weight* w, const void* dy, int64_t tokens, int64_t held, int64_t depth, float* parts,
                           float* dx, int32_t threads);
};

struct Nf4 {  // what is handed over, as `nf4.py` declares it; it stays where it is
    const Nf4Kernels* kernels;
    const float* code;          // [16]
    int64_t piece;              // bytes of a weight that are decoded at a time
    int32_t bfloat16, float16;  // whether the processor has products of such numbers
};

}  // namespace
