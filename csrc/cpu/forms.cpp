#include "forms.h"

#include <algorithm>

#include "blocking.h"

namespace neuron_ext::cpu {
namespace {

// The few operand's copy of a narrow product, in bytes. From L2 or L3, it's read at less than a
// packed panel costs: on Zen 4, 16 x 32768 to 1024 f32 takes 17 ms, packed 30; 64 x 8192 to 2048
// 26 ms, packed 29.
constexpr std::int64_t kLongestRows = 4 << 20;

/// Whether so few rows are better used with the `many` others where those lie than packed against
/// them. Dot products of long, contiguous operands pass over the wide one once, at the memory's
/// speed; those of short ones spend their time adding up lanes.
bool is_few(std::int64_t rows, std::int64_t many, std::int64_t k, bool k_is_contiguous,
            DType dtype) {
  // More rows than that win on memory alone: of what is in an L2 cache, packing is cheap.
  constexpr std::int64_t kCached = 1 << 20;
  const std::int64_t few_long = many * k * size_of(dtype) > kCached ? 64 : 32;
  const std::int64_t few = k >= 256 && k_is_contiguous ? few_long : k >= 32 ? 8 : 4;
  return rows <= few && rows * k * accumulator_size(dtype) <= kLongestRows;
}

bool has_few_columns(const GemmDesc& desc) {
  // Only where A's rows are contiguous, and without what is done to A as it's packed.
  return desc.n < desc.deciding_m() && desc.a_stride_k == 1 &&
         is_few(desc.n, desc.deciding_m(), desc.k, true, desc.dtype) &&
         desc.prologue == Activation::kIdentity && !desc.has_a_sum;
}

// Strips pay from so many rows on.
constexpr std::int64_t kLong = 64;

bool has_long_column(const GemmDesc& desc) {
  // Rows of A are taken apart, which shuffles do for up to so many (vector-inl.h).
  constexpr std::int64_t kFew = 4;
  return desc.n == 1 && desc.d_stride_m == 1 && desc.deciding_m() >= kLong && desc.k > 0 &&
         (desc.k <= kFew || desc.a_stride_m == 1) && desc.k <= 64 && !desc.has_a_sum;
}

bool has_contiguous_rows(const GemmDesc& desc) {
  return desc.a_stride_k == 1 &&
         (desc.prologue == Activation::kIdentity || desc.saved_stride_k == 1);
}

bool has_long_rows(const GemmDesc& desc) {
  // B as the strips meet it, in an L2 cache.
  constexpr std::int64_t kLargestB = 1 << 14;
  if (desc.deciding_m() < kLong || desc.k == 0 || desc.n == 0 || desc.k > 64 ||
      desc.n * desc.k > kLargestB) {
    return false;
  }
  if (!has_contiguous_columns(desc) && (!has_contiguous_rows(desc) || desc.has_a_sum)) return false;
  if (desc.prologue != Activation::kIdentity) return true;
  // Multiply-adds of vectors for a row of D: of B's rows, or along k and then across lanes.
  const std::int64_t lanes = 64 / accumulator_size(desc.dtype);
  const std::int64_t of_rows = desc.k * divide_up(desc.n, lanes) + 3;
  const std::int64_t of_dots = desc.n * (divide_up(desc.k, lanes) + 4) + 2;
  return of_rows <= of_dots || !has_few_columns(desc);
}

bool has_long_sums(const GemmDesc& desc) {
  return desc.k >= kLong && desc.deciding_m() > 0 && desc.deciding_m() <= 32 && desc.n <= 256 &&
         has_contiguous_columns(desc) && desc.b_stride_n == 1 && !desc.has_bias;
}

}  // namespace

const char* name_of(Form form) {
  switch (form) {
    case Form::kBlocked:
      return "blocked";
    case Form::kFewRows:
      return "few rows";
    case Form::kFewColumns:
      return "few columns";
    case Form::kLongColumn:
      return "long column";
    case Form::kLongRows:
      return "long rows";
    case Form::kLongSums:
      return "long sums";
  }
  return "?";
}

bool has_contiguous_columns(const GemmDesc& desc) {
  return desc.a_stride_m == 1 &&
         (desc.prologue == Activation::kIdentity || desc.saved_stride_m == 1);
}

Form form_of(const GemmDesc& desc) {
  if (has_long_column(desc)) return Form::kLongColumn;
  if (has_long_rows(desc)) return Form::kLongRows;
  if (has_long_sums(desc)) return Form::kLongSums;
  if (has_few_columns(desc)) return Form::kFewColumns;
  if (is_few(desc.deciding_m(), desc.n, desc.k, desc.b_stride_k == 1, desc.dtype))
    return Form::kFewRows;
  return Form::kBlocked;
}

bool is_any(const GemmDesc&, Form) { return true; }
bool is_narrow(const GemmDesc&, Form form) {
  return form == Form::kFewRows || form == Form::kFewColumns;
}
bool is_streamed(const GemmDesc& desc, Form form) {
  // With more of them a matrix engine makes up for packing.
  const std::int64_t few = desc.dtype == DType::kBFloat16 ? 16 : 32;
  return is_narrow(desc, form) && std::min(desc.deciding_m(), desc.n) <= few;
}
bool is_long(const GemmDesc&, Form form) {
  return form == Form::kLongColumn || form == Form::kLongRows || form == Form::kLongSums;
}

bool is_long_in_pairs(const GemmDesc& desc, Form form) {
  // Two k in a place gain where A's rows lie there in pairs. Else, putting them together pays from
  // so many multiply-adds on: for a row of D (Zen 4: 640 lose, 832 gain), or for a k of sums, where
  // both operands' rows are interleaved.
  constexpr std::int64_t kWideRow = 768, kWideSum = 256;
  switch (form) {
    case Form::kLongRows:
      return (desc.k % 2 == 0 && desc.a_stride_k == 1) || desc.n * desc.k >= kWideRow;
    case Form::kLongSums:
      return desc.deciding_m() * desc.n >= kWideSum;
    default:
      return false;
  }
}

}  // namespace neuron_ext::cpu
