// Our operators on a CPU, called by compiled graphs: products of PyTorch, and those of `narrow.h` beside them.
//
// `operators.py` says which calls come here.  The namespace is that of an instruction set, so that a process may hold
// several; nothing here has a derivative, and each operator is what its reference in Python is.

#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "narrow.h"
#include "nf4_linear.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;

// Products of PyTorch in here have no derivative and keep their dtype: the operators are below autograd and autocast.
struct Below {
    at::AutoDispatchBelowADInplaceOrView autograd;
    c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

Tensor rows_of(const Tensor& x) {
    if (x.dim() == 2) return x;
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
    return x.reshape({rows, x.size(-1)});
}

Tensor empty_like(const Tensor& x, int64_t columns) {
    auto sizes = x.sizes().vec();
    sizes.back() = columns;
    return at::empty(sizes, x.options());
}

// Whether `narrow.h` computes with these matrices: float32, without gaps in their rows.
bool narrow_serves(std::initializer_list<const Tensor*> matrices) {
    for (const Tensor* t : matrices)
        if (t->scalar_type() != at::kFloat || (t->stride(1) != 1 && t->size(1) > 1)) return false;
    return true;
}

int32_t threshold_of(double p) { return std::min<int32_t>(static_cast<int32_t>(std::nearbyint(p * 65536)), 65535); }
double scale_of(double p) { return 65536.0 / (65536 - threshold_of(p)); }

Branch branch_of(int64_t rank, double scale) {
    Branch branch{};
    branch.rank = rank;
    branch.scale = static_cast<float>(scale);
    return branch;
}

void set_factor(Branch& branch, const Tensor& columns_by_rank) {
    branch.factor = columns_by_rank.const_data_ptr<float>();
    branch.factor_column = columns_by_rank.stride(0);
    branch.factor_rank = columns_by_rank.stride(1);
}

void set_low(Branch& branch, const Tensor& rows_by_rank) {
    branch.low = rows_by_rank.const_data_ptr<float>();
    branch.low_row = rows_by_rank.stride(0);
}

void set_product(Branch& branch, const Tensor& rows_by_rank) {
    branch.product = rows_by_rank.data_ptr<float>();
    branch.product_row = rows_by_rank.stride(0);
}

void set_gradient(Branch& branch, const Tensor& columns_by_rank) {
    branch.gradient = columns_by_rank.data_ptr<float>();
    branch.gradient_column = columns_by_rank.stride(0);
    branch.gradient_rank = columns_by_rank.stride(1);
}

void run(const Tensor& x, const std::vector<Branch>& branches, float* squares = nullptr) {
    products(x.const_data_ptr<float>(), x.stride(0), x.size(0), x.size(1), branches.data(),
             static_cast<int>(branches.size()), squares, at::get_num_threads());
}

// --- layers --------------------------------------------------------------------------------------------------------

struct Term {
    Tensor a, b;  // a b
    double scale;
    int64_t start;
};

// y += a term, whose columns may be a part of y's.
void add(const Tensor& y, const Term& term) {
    Tensor part = term.b.size(1) == y.size(1) ? y : y.narrow(1, term.start, term.b.size(1));
    part.addmm_(term.a, term.b, 1, term.scale);
}

// y = bias + the sum of terms.  Narrow ones first, of those of all columns: a wide product adds to what is there at no
// cost, while a narrow one after it would have to read and write the output once more.
void add_up(const Tensor& y, const std::optional<Tensor>& bias, std::vector<Term> terms) {
    const int64_t columns = y.size(1);
    // Only in float32, which is what is fast here: other dtypes keep the order of an eager layer, to the bit.
    if (y.scalar_type() == at::kFloat)
        std::stable_sort(terms.begin(), terms.end(), [&](const Term& one, const Term& other) {
            const bool part = one.b.size(1) < columns, other_part = other.b.size(1) < columns;
            return part != other_part ? other_part : one.a.size(1) < other.a.size(1);
        });
    bool first = true;
    for (const Term& term : terms) {
        if (!first) {
            add(y, term);
        } else if (!bias.has_value() && term.scale == 1.0) {
            Tensor out = y;
            at::mm_out(out, term.a, term.b);
        } else {
            Tensor out = y;
            at::addmm_out(out, bias.has_value() ? *bias : y, term.a, term.b, bias.has_value() ? 1 : 0, term.scale);
        }
        first = false;
    }
}

Tensor& adapted_linear_core_out(const Tensor& x, TensorList weight, c10::string_view layout,
                                const std::optional<Tensor>& bias, TensorList h, TensorList B,
                                at::ArrayRef<double> scale, IntArrayRef start, IntArrayRef skip, Tensor& out) {
    const Below below;
    std::vector<Term> terms;
    for (size_t i = 0; i < h.size(); ++i) terms.push_back({rows_of(h[i]), B[i].t(), scale[i], start[i]});
    if (layout == "dense") {
        const Tensor& W = weight[0];
        terms.insert(terms.begin(), {rows_of(x), W.t(), 1.0, 0});
        add_up(out.view({-1, W.size(0)}), bias, std::move(terms));
    } else {
        const Tensor y = out.view({-1, out.size(-1)});
        PackedWeight::of(weight, layout, x.scalar_type()).product(rows_of(x), bias, y);
        for (const Term& term : terms) add(y, term);
    }
    return out;
}

Tensor adapted_linear_core(const Tensor& x, TensorList weight, c10::string_view layout,
                           const std::optional<Tensor>& bias, TensorList h, TensorList B, at::ArrayRef<double> scale,
                           IntArrayRef start, IntArrayRef skip) {
    Tensor out = empty_like(x, layout == "dense" ? weight[0].size(0) : Nf4Layout(layout).rows);
    return adapted_linear_core_out(x, weight, layout, bias, h, B, scale, start, skip, out);
}

Tensor& linear_input_gradient_out(const Tensor& dy, TensorList weight, c10::string_view layout, Tensor& out) {
    const Below below;
    PackedWeight::of(weight, layout, dy.scalar_type()).input_gradient(rows_of(dy), out.view({-1, out.size(-1)}));
    return out;
}

Tensor linear_input_gradient(const Tensor& dy, TensorList weight, c10::string_view layout) {
    Tensor out = empty_like(dy, Nf4Layout(layout).columns);
    return linear_input_gradient_out(dy, weight, layout, out);
}

// dh = scale * X B and dB = scale * X' h.
Branch gradients_of(const Tensor& h, const Tensor& B, double scale, const Tensor& dh, const Tensor& dB) {
    Branch branch = branch_of(B.size(1), scale);
    set_factor(branch, B);
    set_low(branch, h);
    set_product(branch, dh);
    set_gradient(branch, dB);
    return branch;
}

std::tuple<Tensor, Tensor> low_rank_gradients(const Tensor& dy, const Tensor& h, const Tensor& B, double scale) {
    const Below below;
    const Tensor rows = rows_of(dy), low = rows_of(h);
    Tensor dh = at::empty(h.sizes(), h.options()), dB = at::empty(B.sizes(), B.options());
    Tensor dh_rows = dh.view(low.sizes());
    if (narrow_serves({&rows, &low, &B})) {
        run(rows, {gradients_of(low, B, scale, dh_rows, dB)});
    } else {
        at::addmm_out(dh_rows, dh_rows, rows, B, 0, scale);
        at::addmm_out(dB, dB, rows.t(), low, 0, scale);
    }
    return {dh, dB};
}

// a * b summed over rows, while `scaled` takes a * d if it is wanted; it may be a itself.
Tensor sums(const Tensor& a, const Tensor& b, const Tensor* d, const Tensor* scaled) {
    TORCH_CHECK(a.sizes() == b.sizes() && (!d || d->numel() == a.size(-1)), "sums of columns of different matrices");
    const Tensor x = rows_of(a), y = rows_of(b), out = scaled ? scaled->view(x.sizes()) : x;
    if (!narrow_serves({&x, &y, &out})) {
        const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        const Tensor total = at::mul(x.to(wide), y.to(wide)).sum(0).to(a.scalar_type());
        if (scaled) out.copy_(at::mul(x, *d));
        return total;
    }
    Tensor total = at::empty({x.size(1)}, x.options());
    const Tensor factor = scaled ? d->contiguous() : total;
    column_sums(x.const_data_ptr<float>(), x.stride(0), y.const_data_ptr<float>(), y.stride(0), x.size(0), x.size(1),
                total.data_ptr<float>(), scaled ? factor.const_data_ptr<float>() : nullptr,
                scaled ? out.data_ptr<float>() : nullptr, out.stride(0), at::get_num_threads());
    return total;
}

Tensor column_sums(const Tensor& a, const Tensor& b) {
    const Below below;
    return sums(a, b, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> scaled_sums(const Tensor& a, const Tensor& b, const Tensor& d) {
    const Below below;
    const Tensor scaled = at::empty(a.sizes(), a.options());
    return {scaled, sums(a, b, &d, &scaled)};
}

Tensor scaled_sums_(const Tensor& a, const Tensor& b, const Tensor& d) {
    const Below below;
    const Tensor given = a.is_contiguous() ? a : a.contiguous();
    const Tensor total = sums(given, b, &d, &given);
    if (!given.is_same(a)) a.copy_(given);
    return total;
}

// `|W + scale * B A|` row by row, of float32; W is read once.
Tensor adapted_row_norms(TensorList weight, c10::string_view, const Tensor& A, const Tensor& B, double scale) {
    const Below below;
    const Tensor& W = weight[0];
    Tensor product = at::empty(B.sizes(), W.options()), norms = at::empty({W.size(0)}, W.options());
    Branch branch = branch_of(A.size(0), 1.0);
    set_factor(branch, A.t());
    set_product(branch, product);
    float* out = norms.data_ptr<float>();
    run(W, {branch}, out);  // |W|^2 there, to begin with
    const Tensor gram = at::mm(A, A.t()), given = B.stride(1) == 1 ? B : B.contiguous();
    norms_of_sums(out, product.const_data_ptr<float>(), given.const_data_ptr<float>(), given.stride(0),
                  gram.const_data_ptr<float>(), A.size(0), static_cast<float>(scale), W.size(0), at::get_num_threads());
    return norms;
}

// --- dropout -------------------------------------------------------------------------------------------------------

void masked_out(const Tensor& x, const int64_t* seed, double p, const Tensor& out) {
    const Tensor given = x.stride(1) == 1 ? x : x.contiguous();
    dropped(given.const_data_ptr(), given.stride(0), out.data_ptr(), out.stride(0), x.size(0), x.size(1), seed,
            threshold_of(p), x.element_size(), at::get_num_threads());
}

Tensor masked(const Tensor& x, const int64_t* seed, double p) {
    Tensor out = at::empty(x.sizes(), x.options());
    masked_out(x, seed, p, out);
    return out;
}

Tensor& dropout_out(const Tensor& x, const Tensor& seed, double p, Tensor& out) {
    const Below below;
    const Tensor rows = rows_of(x);
    masked_out(rows, seed.const_data_ptr<int64_t>(), p, out.view(rows.sizes()));
    return out.mul_(scale_of(p));
}

Tensor dropout(const Tensor& x, const Tensor& seed, double p) {
    Tensor out = at::empty(x.sizes(), x.options());
    return dropout_out(x, seed, p, out);
}

// Calls `each(number, first rank, rank, seed, p)` for every factor of those that stand one above the other.
template <class Each>
void for_sites(const Tensor& seed, IntArrayRef ranks, at::ArrayRef<double> p, Each each) {
    int64_t first = 0;
    for (size_t i = 0; i < ranks.size(); first += ranks[i++])
        each(first, ranks[i], seed.const_data_ptr<int64_t>() + i, p[i]);
}

Branch dropping(int64_t rank, const int64_t* seed, double p) {
    Branch branch = branch_of(rank, scale_of(p));
    branch.seed = seed;
    branch.threshold = threshold_of(p);
    return branch;
}

Tensor dropped_linear_core(const Tensor& x, const Tensor& A, const Tensor& seeds, IntArrayRef ranks,
                           at::ArrayRef<double> p) {
    const Below below;
    const Tensor rows = rows_of(x), seed = seeds.contiguous();
    Tensor h = empty_like(x, A.size(0));
    const Tensor low = h.view({-1, A.size(0)});
    std::vector<Branch> branches;
    const bool narrow = narrow_serves({&rows, &A});
    for_sites(seed, ranks, p, [&](int64_t first, int64_t rank, const int64_t* site, double pi) {
        Tensor part = low.narrow(1, first, rank);
        const Tensor factor = A.narrow(0, first, rank).t();
        if (narrow) {
            branches.push_back(dropping(rank, site, pi));
            set_factor(branches.back(), factor);
            set_product(branches.back(), part);
        } else {
            at::addmm_out(part, part, masked(rows, site, pi), factor, 0, scale_of(pi));
        }
    });
    if (narrow) run(rows, branches);
    return h;
}

// dx = the sum of dropout(dh_i A_i).
void input_gradient(const Tensor& dx, const Tensor& dh, const Tensor& A, const Tensor& seed, IntArrayRef ranks,
                    at::ArrayRef<double> p) {
    std::vector<Branch> branches;
    const bool narrow = narrow_serves({&dx, &dh, &A});
    if (!narrow) dx.zero_();
    for_sites(seed, ranks, p, [&](int64_t first, int64_t rank, const int64_t* site, double pi) {
        const Tensor low = dh.narrow(1, first, rank), factor = A.narrow(0, first, rank);
        if (narrow) {
            branches.push_back(dropping(rank, site, pi));
            set_factor(branches.back(), factor.t());
            set_low(branches.back(), low);
        } else {
            dx.add_(masked(at::mm(low, factor), site, pi), scale_of(pi));
        }
    });
    if (narrow)
        expand_all(dx.data_ptr<float>(), dx.stride(0), dx.size(0), dx.size(1), branches.data(),
                   static_cast<int>(branches.size()), at::get_num_threads());
}

std::tuple<Tensor, Tensor> dropped_linear_gradients(const Tensor& given, const Tensor& x, const Tensor& A,
                                                    const Tensor& seeds, IntArrayRef ranks, at::ArrayRef<double> p,
                                                    bool input) {
    const Below below;
    const Tensor rows = rows_of(x), dh = rows_of(given), seed = seeds.contiguous();
    Tensor dA = at::empty(A.sizes(), A.options());
    std::vector<Branch> branches;
    const bool narrow = narrow_serves({&rows, &dh, &dA});
    for_sites(seed, ranks, p, [&](int64_t first, int64_t rank, const int64_t* site, double pi) {
        Tensor part = dA.narrow(0, first, rank);
        const Tensor low = dh.narrow(1, first, rank);
        if (narrow) {
            branches.push_back(dropping(rank, site, pi));
            set_low(branches.back(), low);
            set_gradient(branches.back(), part.t());
        } else {
            at::addmm_out(part, part, low.t(), masked(rows, site, pi), 0, scale_of(pi));
        }
    });
    if (narrow) run(rows, branches);
    Tensor dx = at::empty(input ? x.sizes() : IntArrayRef({0}), x.options());
    if (input) input_gradient(dx.view(rows.sizes()), dh, A, seed, ranks, p);
    return {dx, dA};
}

Tensor& sum_of_products_out(TensorList a, TensorList b, const std::optional<Tensor>& dh,
                            const std::optional<Tensor>& A, const std::optional<Tensor>& seed, IntArrayRef ranks,
                            at::ArrayRef<double> p, Tensor& out) {
    const Below below;
    std::vector<Term> terms;
    for (size_t i = 0; i < a.size(); ++i) terms.push_back({a[i], b[i], 1.0, 0});
    if (!dh.has_value()) {
        add_up(out, std::nullopt, std::move(terms));
        return out;
    }
    input_gradient(out, rows_of(*dh), *A, seed->contiguous(), ranks, p);
    for (const Term& term : terms) out.addmm_(term.a, term.b);
    return out;
}

Tensor sum_of_products(TensorList a, TensorList b, const std::optional<Tensor>& dh, const std::optional<Tensor>& A,
                       const std::optional<Tensor>& seed, IntArrayRef ranks, at::ArrayRef<double> p) {
    Tensor out = at::empty({a[0].size(0), b[0].size(1)}, a[0].options());
    return sum_of_products_out(a, b, dh, A, seed, ranks, p, out);
}

}  // namespace

// The kernels for NF4 weights, from `nf4.cpp`.
extern "C" void rewrite_take_nf4(const Nf4* given) { nf4.store(given, std::memory_order_release); }

#define OPERATORS(name) TORCH_LIBRARY_FRAGMENT(name, m)
#define KERNELS(name) TORCH_LIBRARY_IMPL(name, CPU, m)

OPERATORS(REWRITE_NAMESPACE) {
#define CORE \
    "(Tensor x, Tensor[] weight, str layout, Tensor? bias, Tensor[] h, Tensor[] B, float[] scale, int[] start, int[] skip"
#define SUM "(Tensor[] a, Tensor[] b, Tensor? dh=None, Tensor? A=None, Tensor? seed=None, int[] ranks=[], float[] p=[]"
#define INPUT_GRADIENT "(Tensor dy, Tensor[] weight, str layout"
#define DROPOUT "(Tensor x, Tensor seed, float p"
#define OUT ", *, Tensor(a!) out) -> Tensor(a!)"
    m.def("adapted_linear_core" CORE ") -> Tensor");
    m.def("adapted_linear_core.out" CORE OUT);
    m.def("linear_input_gradient" INPUT_GRADIENT ") -> Tensor");
    m.def("linear_input_gradient.out" INPUT_GRADIENT OUT);
    m.def("sum_of_products" SUM ") -> Tensor");
    m.def("sum_of_products.out" SUM OUT);
    m.def("dropout" DROPOUT ") -> Tensor");
    m.def("dropout.out" DROPOUT OUT);
    m.def("low_rank_gradients(Tensor dy, Tensor h, Tensor B, float scale) -> (Tensor, Tensor)");
    m.def("column_sums(Tensor a, Tensor b) -> Tensor");
    m.def("scaled_sums(Tensor a, Tensor b, Tensor d) -> (Tensor, Tensor)");
    m.def("scaled_sums_(Tensor(a!) a, Tensor b, Tensor d) -> Tensor");
    m.def("adapted_row_norms(Tensor[] weight, str layout, Tensor A, Tensor B, float scale) -> Tensor");
    m.def("dropped_linear_core(Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p) -> Tensor");
    m.def(
        "dropped_linear_gradients(Tensor dh, Tensor x, Tensor A, Tensor seed, int[] ranks, float[] p, bool input)"
        " -> (Tensor, Tensor)");
}

KERNELS(REWRITE_NAMESPACE) {
    m.impl("adapted_linear_core", adapted_linear_core);
    m.impl("adapted_linear_core.out", adapted_linear_core_out);
    m.impl("linear_input_gradient", linear_input_gradient);
    m.impl("linear_input_gradient.out", linear_input_gradient_out);
    m.impl("sum_of_products", sum_of_products);
    m.impl("sum_of_products.out", sum_of_products_out);
    m.impl("dropout", dropout);
    m.impl("dropout.out", dropout_out);
    m.impl("low_rank_gradients", low_rank_gradients);
    m.impl("scaled_sums", scaled_sums);
    m.impl("scaled_sums_", scaled_sums_);
    m.impl("column_sums", static_cast<Tensor (*)(const Tensor&, const Tensor&)>(column_sums));
    m.impl("adapted_row_norms", adapted_row_norms);
    m.impl("dropped_linear_core", dropped_linear_core);
    m.impl("dropped_linear_gradients", dropped_linear_gradients);
}
