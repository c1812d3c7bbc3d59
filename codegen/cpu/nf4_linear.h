// Products of matrices with an NF4 weight, and gradients of their input.
//
// A product takes the weight as it decodes: rounded to the weight's dtype, then to that of x.  With few tokens it is
// summed in float32, in an order that does not depend on the number of threads; with more, pieces of the decoded weight
// that caches hold go to PyTorch's own product.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <optional>
#include <string_view>

#include "nf4_kernels.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;

std::atomic<const Nf4*> nf4{nullptr};  // until it is handed over

int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

// `nf4:bfloat16:64:11x7`, as `codegen/storage.py` writes it.
struct Nf4Layout {
    Dtype dtype;
    int64_t blocksize, rows, columns;

    explicit Nf4Layout(std::string_view text) {
        const std::string_view whole = text;
        const bool known = until(text, ':') == "nf4";
        const std::string_view name = until(text, ':');
        dtype = name == "bfloat16" ? BFLOAT16 : name == "float16" ? FLOAT16 : FLOAT32;  // float64 is float32, widened
        blocksize = number(until(text, ':'));
        rows = number(until(text, 'x'));
        columns = number(text);
        TORCH_CHECK(known && blocksize > 0 && rows >= 0 && columns >= 0, "not a matrix in NF4: ", whole);
    }

    // Whether the stored tensors have the sizes and dtypes of such a weight; `check_stored` says in Python what they lack.
    bool fits(TensorList stored) const {
        const int64_t count = rows * columns, blocks = ceil_div(count, blocksize);
        if (stored.size() != 2 && stored.size() != 5) return false;
        const bool nested = stored.size() == 5;
        if (stored[0].scalar_type() != at::kByte || stored[0].numel() != ceil_div(count, 2)) return false;
        if (stored[1].dim() != 1 || stored[1].numel() != blocks) return false;
        if (nested && (stored[1].scalar_type() != at::kByte || stored[2].numel() != ceil_div(blocks, 256) ||
                       stored[3].numel() != 256))
            return false;
        for (const Tensor& t : stored.slice(nested ? 2 : 1))
            if (t.scalar_type() != at::kFloat && t.scalar_type() != at::kDouble) return false;
        return true;
    }

  private:
    static std::string_view until(std::string_view& text, char end) {
        const size_t at = std::min(text.find(end), text.size());
        const std::string_view part = text.substr(0, at);
        text.remove_prefix(std::min(at + 1, text.size()));
        return part;
    }

    static int64_t number(std::string_view text) {
        int64_t value = -1;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        return error == std::errc() && end == text.data() + text.size() ? value : -1;
    }
};

class PackedWeight {
    static constexpr int64_t LANES_OF_ROWS = 32, GROUP = 16;  // what rows, and grouped tokens, are padded to
    static constexpr int64_t DEPTH = 1024;                    // rows of the weight in one partial sum of a gradient

    const Nf4& given;
    Weight weight;
    std::array<Tensor, 5> held;  // the pointers are into these
    at::ScalarType dtype;        // of x

    static Dtype code_of(at::ScalarType dtype) {
        return dtype == at::kBFloat16 ? BFLOAT16 : dtype == at::kHalf ? FLOAT16 : FLOAT32;
    }

    PackedWeight(const Nf4& given, const Nf4Layout& layout, TensorList stored, at::ScalarType dtype)
        : given(given), weight{}, dtype(dtype) {
        const bool nested = stored.size() == 5;
        for (size_t i = 0; i < stored.size(); ++i)
            held[i] = (i > (nested ? 1 : 0) ? stored[i].to(at::kFloat) : stored[i]).contiguous();
        weight.code = given.code;
        weight.codes = held[0].const_data_ptr<uint8_t>();
        if (nested) {
            weight.absmax_codes = held[1].const_data_ptr<uint8_t>();
            weight.nested_absmax = held[2].const_data_ptr<float>();
            weight.nested_code = held[3].const_data_ptr<float>();
            weight.offset = held[4].const_data_ptr<float>();
        } else {
            weight.absmax = held[1].const_data_ptr<float>();
        }
        weight.rows = layout.rows, weight.columns = layout.columns, weight.blocksize = layout.blocksize;
        weight.dtype = layout.dtype, weight.product = code_of(dtype);
    }

  public:
    // For products with matrices of a dtype.
    static PackedWeight of(TensorList stored, std::string_view text, at::ScalarType dtype) {
        const Nf4* given = nf4.load(std::memory_order_acquire);
        TORCH_CHECK(given, "the kernels for NF4 weights were not handed over");
        const Nf4Layout layout(text);
        TORCH_CHECK(layout.fits(stored), "these tensors do not store a weight of ", text);
        return PackedWeight(*given, layout, stored, dtype);
    }

    // out (M, d_out) = x (M, d_in) W' + bias.
    void product(const Tensor& x, const std::optional<Tensor>& bias, Tensor out) const {
        if (x.size(0) <= few()) {
            Tensor y = floats_for(out);
            few_product(x, y.data_ptr<float>());
            if (bias.has_value())
                at::add_out(out, y, *bias);
            else if (!y.is_same(out))
                out.copy_(y);
            return;
        }
        const at::ScalarType multiplied = product_dtype();
        const Tensor rows = x.to(multiplied), shift = bias.has_value() ? bias->to(multiplied) : Tensor();
        pieces(true, multiplied, [&](int64_t first, const Tensor& w) {
            const Tensor part = out.narrow(1, first, w.size(0));
            Tensor into = like(part, multiplied);
            if (shift.defined())
                at::addmm_out(into, shift.narrow(0, first, w.size(0)), rows, w.t());
            else
                at::mm_out(into, rows, w.t());
            if (!into.is_same(part)) part.copy_(into);
        });
    }

    // out (M, d_in) = dy (M, d_out) W.
    void input_gradient(const Tensor& dy, const Tensor& out) const {
        Tensor dx = out;
        if (dy.size(0) <= few()) {
            dx = floats_for(out);
            few_gradient(dy, dx.data_ptr<float>());
        } else {
            const at::ScalarType multiplied = product_dtype();
            const Tensor rows = dy.to(multiplied);
            dx = like(out, multiplied);
            pieces(false, multiplied, [&](int64_t first, const Tensor& w) {  // columns: each sum is rounded once
                Tensor part = dx.narrow(1, first, w.size(1));
                at::mm_out(part, rows, w);
            });
        }
        if (!dx.is_same(out)) out.copy_(dx);
    }

  private:
    // Tokens up to which products do not form the weight, measured against forming it.
    int64_t few() const {
        constexpr int64_t FEW = 16, FEW_FLOAT32 = 48, FEW_TILES = 64;
        if (weight.product == FLOAT32 && dtype != at::kFloat) return -1;  // float64
        if (given.kernels->layout(weight.product, FEW_TILES) == GROUPED) return FEW_TILES;
        return product_dtype() == at::kFloat ? FEW_FLOAT32 : FEW;
    }

    // The dtype of larger products: where the processor has no product in 16 bits, float32.
    at::ScalarType product_dtype() const {
        const bool lacking =
            (dtype == at::kBFloat16 && !given.bfloat16) || (dtype == at::kHalf && !given.float16);
        return lacking ? at::kFloat : dtype;
    }

    void few_product(const Tensor& x, float* y) const {
        const int32_t layout = given.kernels->layout(weight.product, x.size(0));
        Tensor rows = padded(x, layout);
        if (layout == GROUPED) rows = rows.view({-1, GROUP, rows.size(1) / 2, 2}).transpose(1, 2).contiguous();
        given.kernels->product(&weight, rows.const_data_ptr(), x.size(0), y, at::get_num_threads());
    }

    void few_gradient(const Tensor& dy, float* dx) const {
        const Tensor rows = padded(dy, given.kernels->layout(weight.product, dy.size(0)));
        const int64_t held = rows.size(0), stride = given.kernels->gradient_stride(weight.columns);
        Tensor parts = at::empty({ceil_div(weight.rows, DEPTH), held, stride}, dy.options().dtype(at::kFloat));
        given.kernels->input_gradient(&weight, rows.const_data_ptr(), dy.size(0), held, DEPTH,
                                      parts.data_ptr<float>(), dx, at::get_num_threads());
    }

    // Rows as the kernels take them, padded with zeros.
    static Tensor padded(const Tensor& x, int32_t layout) {
        const Tensor rows = layout == AS_FLOAT32 ? x.to(at::kFloat) : x;
        const int64_t right = ceil_div(x.size(1), LANES_OF_ROWS) * LANES_OF_ROWS - x.size(1);
        const int64_t below = layout == GROUPED ? ceil_div(x.size(0), GROUP) * GROUP - x.size(0) : 0;
        return right || below ? at::constant_pad_nd(rows, {0, right, 0, below}) : rows.contiguous();
    }

    // Where a result is computed in a dtype: in its place if it has that one.
    static Tensor like(const Tensor& out, at::ScalarType dtype) {
        return out.scalar_type() == dtype ? out : at::empty(out.sizes(), out.options().dtype(dtype));
    }

    static Tensor floats_for(const Tensor& out) {
        return out.is_contiguous() ? like(out, at::kFloat) : at::empty(out.sizes(), out.options().dtype(at::kFloat));
    }

    // Calls `each(first, the rows or columns of the weight from there on)`, one after the other in the same memory.
    template <class Each>
    void pieces(bool of_rows, at::ScalarType multiplied, Each each) const {
        const int64_t count = of_rows ? weight.rows : weight.columns, across = of_rows ? weight.columns : weight.rows;
        const Dtype code = code_of(multiplied);
        const at::ScalarType made = code == FLOAT32 ? at::kFloat : multiplied;
        const int64_t size = code == FLOAT32 ? 4 : 2;
        const int64_t step = std::max<int64_t>(given.piece / size / std::max<int64_t>(across, 1) / 64, 1) * 64;
        const Tensor memory = scratch(std::min(step, count) * across * size, given.piece);
        for (int64_t first = 0; first < count; first += step) {
            const int64_t length = std::min(step, count - first), rows = of_rows ? length : weight.rows,
                          columns = of_rows ? weight.columns : length;
            given.kernels->decode(&weight, of_rows ? first : 0, rows, of_rows ? 0 : first, columns, memory.data_ptr(),
                                  code, at::get_num_threads());
            const Tensor w = at::from_blob(memory.data_ptr(), {rows, columns}, at::TensorOptions().dtype(made));
            each(first, w.to(multiplied));
        }
    }

    // So many bytes that this thread uses again and again, since fresh pages cost more than decoding; not kept beyond
    // `most`.
    static Tensor scratch(int64_t size, int64_t most) {
        thread_local Tensor kept;
        if (kept.defined() && kept.numel() >= size) return kept;
        Tensor memory = at::empty({size}, at::TensorOptions().dtype(at::kByte));
        if (size <= most) kept = memory;
        return memory;
    }
};

}  // namespace
