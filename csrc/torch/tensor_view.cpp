#include "tensor_view.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/SymBool.h>

#include <sstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace neuron_ext {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel takes ", t.scalar_type());
  }
}

std::string shape_of(const at::Tensor& t) {
  std::ostringstream out;
  out << '(';
  const auto sizes = t.sym_sizes();
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

std::string describe(const at::Tensor& t) {
  if (!t.defined()) return "None";
  const std::string dtype(c10::getDtypeNames(t.scalar_type()).first);
  return dtype + " of shape " + shape_of(t);
}

std::ostream& operator<<(std::ostream& out, const Where& where) {
  out << where.operation;
  if (where.layer.has_value()) out << ", layer " << *where.layer;
  return out;
}

void check_layer(const Where& where, const at::Tensor& input, const at::Tensor& weight,
                 const at::Tensor& bias) {
  if (has_plain_sizes(input) && input.dim() >= 1 &&
      fits_plainly(input.sizes().back(), weight, bias)) {
    return;
  }
  TORCH_CHECK(input.dim() >= 1, where, ": input has shape (), expected (*, in_features)");
  TORCH_CHECK(weight.dim() == 1 || weight.dim() == 2, where, ": weight has shape ",
              shape_of(weight), ", expected (out_features, in_features)");
  const auto in_features = weight.sym_size(-1);
  if (!same_size(input.sym_size(-1), in_features)) {
    const bool turned = weight.dim() == 2 && input.sym_size(-1) == weight.sym_size(0);
    TORCH_CHECK(
        false, where, ": input has shape ", shape_of(input), ", that is ", input.sym_size(-1),
        " features, but weight has shape ", shape_of(weight),
        " and so takes in_features = ", in_features,
        turned
            ? ". weight must be (out_features, in_features); this one looks as if it were stored "
              "(in_features, out_features): pass weight.T"
            : "; expected input.shape[-1] == weight.shape[-1]");
  }
  if (weight.dim() == 2) check_bias(where, bias, weight, input.dim());
}

void check_bias(const Where& where, const at::Tensor& bias, const at::Tensor& weight,
                std::int64_t input_dim) {
  if (!bias.defined()) return;
  const auto out_features = weight.sym_size(0);
  bool fits = bias.dim() <= std::max<std::int64_t>(input_dim, 2);
  if (fits && bias.dim() >= 1) {
    const auto last = bias.sym_size(-1);
    fits = last.maybe_as_int() == 1 || same_number(last, out_features) ||
           last.sym_eq(out_features).sym_or(last.sym_eq(1)).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK(fits, where, ": bias has shape ", shape_of(bias), ", expected (", out_features,
              ",), because weight has shape ", shape_of(weight),
              " and so out_features = ", out_features);
}

void check_rows(const char* where, const char* name, const at::Tensor& t, const at::Tensor& input,
                const c10::SymInt& features) {
  bool fits = t.dim() == input.dim();
  for (std::int64_t i = 0; fits && i < t.dim(); ++i) {
    const auto expected = i + 1 < t.dim() ? input.sym_size(i) : features;
    fits = same_size(t.sym_size(i), expected);
  }
  TORCH_CHECK(fits, where, ": ", name, " has shape ", shape_of(t),
              ", expected the shape of input, ", shape_of(input), ", with ", features,
              " as its last size");
}

bool is_row_bias(const at::Tensor& bias, const at::Tensor& input) {
  return bias.dim() <= 1 || (bias.dim() == 2 && input.dim() >= 2 && bias.sym_size(0) == 1);
}

c10::MaybeOwned<at::Tensor> as_vector(const at::Tensor& bias, const at::Tensor& weight) {
  using Vector = c10::MaybeOwned<at::Tensor>;
  if (!bias.defined()) return Vector::borrowed(bias);
  const auto out_features = weight.sym_size(0);
  if (bias.dim() == 1 && bias.sym_size(0) == out_features) return Vector::borrowed(bias);
  return Vector::owned((bias.dim() == 2 ? bias.squeeze(0) : bias).expand_symint({out_features}));
}

RowsView as_rows(const at::Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const std::int64_t last = t.dim() - 1;
  RowsView view{{}, t.const_data_ptr(), 1, sizes[last], 0, strides[last]};
  // Fold the leading dimensions from the inside out; those of size 1 have no say.
  for (std::int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (view.rows == 1) {
      view.row_stride = strides[i];
    } else if (strides[i] != view.row_stride * view.rows && t.numel() > 0) {
      // Three strides or more: a batch that was transposed or sliced twice.
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const at::Tensor copy = t.contiguous();
      view = as_rows(copy);
      view.owner = copy;
      return view;
    }
    view.rows *= sizes[i];
  }
  return view;
}

at::Tensor empty_cpu(at::IntArrayRef sizes, at::ScalarType dtype) {
  return with_large_pages(at::Tensor(at::detail::empty_cpu(sizes, dtype)));
}

at::Tensor with_large_pages(at::Tensor result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole large pages lie in it, and what the question costs is lost in filling it.
  constexpr std::size_t kFewest = std::size_t{4} << 20, kPage = std::size_t{2} << 20;
  if (result.nbytes() < kFewest) return result;
  const auto begin = reinterpret_cast<std::uintptr_t>(result.const_data_ptr());
  const std::uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (begin + result.nbytes()) / kPage * kPage;
  // A system that has none leaves the memory as it is.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

at::Tensor new_empty(const at::Tensor& like, at::IntArrayRef sizes) {
  if (like.is_cpu()) return empty_cpu(sizes, like.scalar_type());
  return at::empty(sizes, like.options());
}

at::Tensor empty_rows(const at::Tensor& input, std::int64_t features) {
  at::DimVector sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = features;
  return new_empty(input, sizes);
}

at::Tensor empty_rows_symint(const at::Tensor& input, const c10::SymInt& features) {
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = features;
  return at::empty_symint(sizes, input.options());
}

}  // namespace neuron_ext
